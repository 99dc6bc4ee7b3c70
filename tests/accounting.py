"""The accounting of requests, for tests that build a server's parts by hand."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from kserve_vllm.core.lifecycle import Lifecycle
from kserve_vllm.telemetry.metrics import Metrics
from kserve_vllm.telemetry.requests import RequestRecorder
from kserve_vllm.telemetry.tracing import Tracing


def recorder(lifecycle: Lifecycle) -> RequestRecorder:
    """The accounting of requests, on a registry of their own."""
    return RequestRecorder(Metrics(lifecycle, lambda: 0, registry=CollectorRegistry()), Tracing(), lifecycle)
