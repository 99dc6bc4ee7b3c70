"""For every test: one server with the demo model for the whole session, and who runs beside whom."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from httpx._transports import default as httpx_transport

from tests import zygote
from tests.support import Server

_ARGUMENTS = [
    "--demo",
    *("--model-name", "demo", "org/demo"),  # the second one has a slash, as names on a hub do
    *("--max-model-len", "1024"),
    "--allow-model-control",
    *("--max-body-mib", "4"),
    *("--allowed-origins", '["https://chat.example"]'),
    *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
]


# Each client reads the certificates of all authorities, which takes 25 ms of processor time, for a plain request too.
httpx_transport.create_ssl_context = functools.cache(httpx_transport.create_ssl_context)


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--no-engine`: for a quick answer, without the files that start servers."""
    parser.addoption("--no-engine", action="store_true", help="leave out the files whose tests start an engine")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out what `--no-engine` does not want."""
    if not config.getoption("--no-engine") or collection_path.suffix != ".py" or collection_path.stem == "conftest":
        return None
    return True if collection_path.name.startswith("test_") and _starts_engine(collection_path) else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the tests of files that start servers (`engine`), and those that need another program (`integration`)."""
    for item in items:
        if _starts_engine(item.path):
            item.add_marker(pytest.mark.engine)
        if _PROGRAMS.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.integration)
    if not config.option.collectonly and any(_starts_engine(item.path) for item in items):
        zygote.begin()  # it imports while tests without servers run


_PROGRAMS = {"redis_server", "promtool", "wheel"}
"""Fixtures that start another program, or a build."""


@functools.cache
def _starts_engine(path: Path) -> bool:
    """Whether a file starts servers: it takes `Server` or `free_port` from `tests.support`, or starts a command."""
    text = path.read_text()
    taken = re.search(r"^from tests\.support import .*\b(Server|free_port)\b", text, re.MULTILINE)
    started = re.search(r'sys\.executable,\s+"-m",\s+"kserve_vllm",\s+"serve"', text)
    return taken is not None or started is not None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `-n 2`: all files that start servers in one process, but for a few; those that import vLLM in one process,
    since that takes 20 s; the others file by file."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):  # type: ignore[misc]
        """Tests of one file stay together."""

        def _split_scope(self, nodeid: str) -> str:
            return _group(config.rootpath / nodeid.partition("::")[0])

    return ByFile(config, log)


# They start servers of their own, and no clock runs in them: they may share the processor with other servers. Files
# with the same name beside them have their servers in common.
_PATIENT = {
    "test_embeddings": "embeddings",
    "test_image": "image",
    "test_answers": "answers",
    # Long, so that both processes have about as much to do.
    **dict.fromkeys(("test_adapters", "test_rollout_prometheus"), "adapters"),
    **dict.fromkeys(("test_schemathesis", "test_same_answer", "test_clients_openai"), "answers_compared"),
    **dict.fromkeys(("test_logs", "test_metrics", "test_queries", "test_traces"), "observability"),
}


@functools.cache
def _group(path: Path) -> str:
    """Who runs with whom."""
    others = "vllm" if _imports_vllm(path) else path.stem
    return _PATIENT.get(path.stem) or ("servers" if _starts_engine(path) else others)


@functools.cache
def _imports_vllm(path: Path) -> bool:
    """Whether a file's tests import vLLM, by themselves or by what they import."""
    text = path.read_text()
    return re.search(r"^\s*(from|import) vllm\b|\bimport upstream$", text, re.MULTILINE) is not None


@pytest.fixture(autouse=True)
def root_logger() -> None:
    """Libraries that are imported in passing set the root logger's level; ours inherit it, and tests read them."""
    logging.root.setLevel(logging.WARNING)


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """The demo model with its adapters, under model control, shared by all tests that don't end it."""
    running = Server(_ARGUMENTS)
    try:
        yield running.wait_ready()
    finally:
        running.stop()
