"""The line of a request is what structlog's loggers would write, though it goes past them."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from kserve_vllm.core.request_context import RequestContext, current
from kserve_vllm.telemetry import logs

FIELDS = {"protocol": "openai", "status": 200, "duration_s": 0.25, "finish_reasons": ["stop"], "tenant": "ü"}
NAME = "kserve_vllm.test_log_lines"


@pytest.fixture(params=["json", "console"])
def written(request: pytest.FixtureRequest) -> Iterator[io.StringIO]:
    """Where lines of one logger go, in one of the forms; structlog as `configure` leaves it, but for its cache."""
    before = structlog.get_config()
    structlog.configure(
        processors=[
            structlog.stdlib.add_logger_name,
            structlog.stdlib.add_log_level,
            logs.add_request,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logs.formatter(request.param))
    logger = logging.getLogger(NAME)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield stream
    finally:
        logger.removeHandler(handler)
        logging.captureWarnings(False)
        structlog.configure(**before)


def lines(stream: io.StringIO) -> list[str]:
    """Without the time that each begins with."""
    found = []
    for line in stream.getvalue().splitlines():
        if line.startswith("{"):
            tree = json.loads(line)
            assert tree["timestamp"].endswith("Z")
            found.append(json.dumps({**tree, "timestamp": ""}))
        else:
            found.append(line.split(" ", 1)[1])
    return found


@pytest.mark.parametrize("level", [logging.INFO, logging.ERROR])
def test_both_ways_write_the_same(written: io.StringIO, level: int) -> None:
    context = RequestContext("r-1", "openai", "/")
    context.trace.trace_id = "0" * 32
    token = current.set(context)
    try:
        structlog.stdlib.get_logger(NAME).log(level, "request", **FIELDS)
        logs.write_event(logging.getLogger(NAME), level, "request", FIELDS)
    finally:
        current.reset(token)
    theirs, ours = lines(written)
    assert ours == theirs
    assert "r-1" in ours


def test_a_level_that_is_off_is_not_written(written: io.StringIO) -> None:
    logs.write_event(logging.getLogger(NAME), logging.DEBUG, "request", FIELDS)
    assert not written.getvalue()
