"""One server with everything switched on: keys, JSON logs, model control, and traces to a real OTLP receiver.

For this folder alone: an engine that idles takes processor time from the tests after it.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.observability.otlp import Receiver
from tests.support import DEMO, Server, not_checked
from tests.tools import install_prometheus

KEY = "key-that-no-log-may-hold-4711"


@pytest.fixture(scope="package")
def receiver() -> Iterator[Receiver]:
    """An OTLP receiver."""
    running = Receiver()
    yield running
    running.stop()


@pytest.fixture(scope="package")
def observed(receiver: Receiver) -> Iterator[Server]:
    """The demo model, observed."""
    arguments = [
        *DEMO,
        "--max-model-len",
        "1024",
        "--allow-model-control",
        "--max-body-mib",
        "1",
        "--api-key",
        KEY,
        "--otlp-endpoint",
        receiver.endpoint,
        "--enable-auto-tool-choice",
        "--tool-call-parser",
        "hermes",
    ]
    running = Server(arguments, env={"OTEL_BSP_SCHEDULE_DELAY": "300", "OTEL_RESOURCE_ATTRIBUTES": "team=blue"})
    try:
        yield running.wait_ready()
    finally:
        running.stop()


@pytest.fixture(scope="package")
def talkative(receiver: Receiver) -> Iterator[Server]:
    """The demo model with prompts in the log, and vLLM's own traces beside ours."""
    arguments = [
        *DEMO,
        "--max-model-len",
        "1024",
        "--enable-log-requests",
        "--otlp-endpoint",
        receiver.endpoint,
        "--otlp-traces-endpoint",
        receiver.endpoint,
    ]
    running = Server(arguments, env={"VLLM_LOGGING_LEVEL": "DEBUG", "OTEL_BSP_SCHEDULE_DELAY": "300"})
    try:
        yield running.wait_ready()
    finally:
        running.stop()


@pytest.fixture(scope="package")
def promtool() -> str:
    """Path of promtool."""
    path = install_prometheus.find("promtool")
    if path is None:
        not_checked("no promtool: rules and metrics were not checked; see tests/tools/install_prometheus.py")
    return path
