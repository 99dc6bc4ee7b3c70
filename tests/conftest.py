"""Fixtures for every test: one server with the demo model for the whole session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support import Server

_ARGUMENTS = [
    "--demo",
    *("--model-name", "demo", "org/demo"),  # the second one has a slash, as names on a hub do
    *("--max-model-len", "1024"),
    "--allow-model-control",
    *("--max-body-mib", "4"),
    *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
    # A model this small would fill its JSON with blanks.
    *("--structured-outputs-config.backend=xgrammar", "--structured-outputs-config.disable_any_whitespace=true"),
]


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """The demo model with its adapters, under model control, shared by all tests that don't end it."""
    running = Server(_ARGUMENTS)
    try:
        yield running.wait_ready()
    finally:
        running.stop()
