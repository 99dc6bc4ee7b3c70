"""vLLM's Prometheus logger with one change, handed to the engine's client by its parameter `stat_loggers`."""

from __future__ import annotations

from vllm.v1.metrics.loggers import PrometheusStatLogger


def _gauge(*args: object, **kwargs: object) -> object:
    """A gauge. The last process that wrote `vllm:lora_requests_info` speaks for all: its value is a time, and vLLM adds
    up those of all front ends."""
    if kwargs.get("name") == "vllm:lora_requests_info":
        kwargs["multiprocess_mode"] = "mostrecent"
    return PrometheusStatLogger._gauge_cls(*args, **kwargs)


class StatLogger(PrometheusStatLogger):  # type: ignore[misc]
    """vLLM's own, but for the gauge of adapters."""

    _gauge_cls = staticmethod(_gauge)  # type: ignore[assignment]
