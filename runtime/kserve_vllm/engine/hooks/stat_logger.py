"""vLLM's Prometheus logger with two changes, handed to the engine's client by its parameter `stat_loggers`."""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm.v1.metrics.loggers import PrometheusStatLogger

if TYPE_CHECKING:
    from prometheus_client import Histogram
    from vllm.config import VllmConfig
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.metrics.stats import IterationStats

log = logging.getLogger(__name__)


def _gauge(*args: object, **kwargs: object) -> object:
    """A gauge. The last process that wrote `vllm:lora_requests_info` speaks for all: its value is a time, and vLLM adds
    up those of all front ends."""
    if kwargs.get("name") == "vllm:lora_requests_info":
        kwargs["multiprocess_mode"] = "mostrecent"
    return PrometheusStatLogger._gauge_cls(*args, **kwargs)


class StatLogger(PrometheusStatLogger):  # type: ignore[misc]
    """vLLM's own, but for the gauge of adapters, and for gaps between tokens where they are observed together."""

    _gauge_cls = staticmethod(_gauge)  # type: ignore[assignment]

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int] | None = None) -> None:
        super().__init__(vllm_config, engine_indexes)
        self._together = False

    def observe_equal_gaps_together(self) -> bool:
        """Write a step's gaps between tokens once for each length that they have: all requests of a step have the same.

        Returns:
            False where prometheus-client's histograms are not as known; then they are written one by one.
        """
        self._together = all(_is_known(histogram) for histogram in self.histogram_inter_token_latency.values())
        if not self._together:
            log.warning("the gaps between tokens are observed one by one: prometheus-client's histogram has changed")
        return self._together

    def record(self, *args: object, **kwargs: object) -> None:
        """A step of an engine. Where gaps are not observed together, whatever a later vLLM hands over is handed on."""
        if self._together:
            self._record_with_gaps(*args, **kwargs)  # type: ignore[arg-type]
        else:
            super().record(*args, **kwargs)

    def _record_with_gaps(
        self,
        scheduler_stats: object,
        iteration_stats: IterationStats | None,
        mm_cache_stats: object = None,
        engine_idx: int = 0,
    ) -> None:
        if iteration_stats is None:
            super().record(scheduler_stats, None, mm_cache_stats, engine_idx)
            return
        gaps = iteration_stats.inter_token_latencies_iter
        # Other loggers read the same object.
        iteration_stats.inter_token_latencies_iter = ()
        try:
            super().record(scheduler_stats, iteration_stats, mm_cache_stats, engine_idx)
        finally:
            iteration_stats.inter_token_latencies_iter = gaps
        observe_all(self.histogram_inter_token_latency[engine_idx], gaps)


def stat_logger_of(client: AsyncLLM) -> StatLogger | None:
    """The logger that the client was given, or None where it keeps no statistics."""
    loggers = client.logger_manager.stat_loggers if client.logger_manager is not None else []
    return next((logger for logger in loggers if isinstance(logger, StatLogger)), None)


def observe_all(histogram: Histogram, values: Sequence[float]) -> None:
    """Observe all values in a histogram of prometheus-client, equal ones at once."""
    for value, times in Counter(values).items():
        histogram._sum.inc(value * times)
        bucket = bisect_left(histogram._upper_bounds, value)
        if bucket < len(histogram._buckets):
            histogram._buckets[bucket].inc(times)


def _is_known(histogram: Histogram) -> bool:
    return all(hasattr(histogram, name) for name in ("_sum", "_upper_bounds", "_buckets"))
