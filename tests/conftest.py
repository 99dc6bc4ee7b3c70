"""For every test: one server with the demo model for the whole session, and who runs beside whom."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests import support
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


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let `-n 2 --dist loadgroup` run one engine at a time: whatever starts servers in one process, files in the other.

    A file starts servers where it takes `Server` or `free_port` from `tests.support`.
    """
    for item in items:
        module = vars(item.getparent(pytest.Module).obj)
        starts = any(module.get(name) is getattr(support, name) for name in ("Server", "free_port"))
        item.add_marker(pytest.mark.xdist_group("servers" if starts else item.path.stem))


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """The demo model with its adapters, under model control, shared by all tests that don't end it."""
    running = Server(_ARGUMENTS)
    try:
        yield running.wait_ready()
    finally:
        running.stop()
