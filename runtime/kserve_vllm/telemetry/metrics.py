"""Every metric of our own, declared once, beside vLLM's in one registry."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import REGISTRY, Gauge, generate_latest

from kserve_vllm.lifecycle import Lifecycle, State


class Metrics:
    """Our metrics, registered with the registry that vLLM uses too.

    Args:
        lifecycle: the state to show.
        in_flight: tells the number of requests in flight.
    """

    def __init__(self, lifecycle: Lifecycle, in_flight: Callable[[], int]) -> None:
        self._state = Gauge("kserve_vllm_lifecycle_state", "1 for the state that the process is in.", ["state"])
        self._requests = Gauge("kserve_vllm_requests_in_flight", "Requests that have entered and not been answered.")
        self._requests.set_function(in_flight)
        self._seconds = Gauge("kserve_vllm_lifecycle_state_seconds", "How long the process has been in its state.")
        self._seconds.set_function(lambda: lifecycle.seconds)
        lifecycle.on_change(self._show)
        self._show(lifecycle)

    def _show(self, lifecycle: Lifecycle) -> None:
        for state in State:
            self._state.labels(state.value).set(state is lifecycle.state)

    def render(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(REGISTRY)
