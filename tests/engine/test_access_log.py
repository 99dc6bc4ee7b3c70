"""The access log is off unless it is asked for, and never holds probes."""

from __future__ import annotations

import logging

import httpx

from kserve_vllm.telemetry.logs import NoProbes, configuration
from tests.support import Server


def test_no_access_line_is_written_by_default(server: Server) -> None:
    httpx.get(server.url + "/v2/models").raise_for_status()
    assert "uvicorn.access" not in server.log


def test_access_lines_are_let_through_only_where_asked_for_and_never_for_probes() -> None:
    for wanted in (False, True):
        assert configuration("json", "INFO", wanted)["loggers"]["uvicorn.access"]["propagate"] is wanted

    def passes(path: str) -> bool:
        record = logging.LogRecord("uvicorn.access", logging.INFO, "", 0, "", ("client", "GET", path, "1.1", 200), None)
        return NoProbes().filter(record)

    assert passes("/v1/chat/completions")
    assert passes("/v2/models/demo/infer")
    assert not any(map(passes, ("/v2/health/ready", "/health", "/ping", "/metrics", "/metrics/", "/")))
