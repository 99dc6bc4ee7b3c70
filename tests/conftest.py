"""Fixtures for every test: one server with the demo model for the whole session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support import Server


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """The demo model with its adapters, under model control, shared by all tests that don't end it."""
    running = Server(["--demo", "--max-model-len", "1024", "--allow-model-control", "--max-body-mib", "4"])
    try:
        yield running.wait_ready()
    finally:
        running.stop()
