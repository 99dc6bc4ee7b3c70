"""vLLM's engine processes where several front ends share them.

Written against vLLM 0.32.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing.connection
import threading
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Protocol

import psutil

from kserve_vllm.core.errors import ConfigError
from kserve_vllm.engine.arguments import configure
from kserve_vllm.engine.vllm import spared_interrupts

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.engine.utils import CoreEngineProcManager, EngineZmqListeners

_STOP_S = 5.0
_LOOK_EVERY_S = 0.25


class _Coordinator(Protocol):
    """vLLM's process that tells front ends how busy the engines are, where there are several engines."""

    proc: BaseProcess

    def get_stats_publish_address(self) -> str:
        """Where it does so."""

    def shutdown(self, timeout: float | None = None) -> None:
        """End it; after `timeout` seconds by force."""


class EngineProcesses:
    """The engine processes, in the process that starts the front ends. All methods block.

    Args:
        args: vLLM's arguments, from `parse_engine_args`.
        count: of front ends.
    """

    def __init__(self, args: argparse.Namespace, count: int) -> None:
        self._args = args
        self._count = count
        self._manager: CoreEngineProcManager | None = None
        self._coordinator: _Coordinator | None = None
        self._listeners: EngineZmqListeners | None = None
        self._processes: list[psutil.Process] = []
        self._stopping = threading.Event()
        self.started = False
        """Whether the model is loaded."""

    def start(self, hand_over: Callable[[int, dict[str, object], list[int]], None]) -> None:
        """Start the processes and wait until the model is loaded.

        Args:
            hand_over: called for each front end, as soon as the processes are started, with its index, what
                `AsyncLLM` takes as `client_addresses`, and the pids of the processes.

        Raises:
            ConfigError: the flags contradict each other, the model, or several front ends.
            Exception: whatever vLLM raises where loading fails.
        """
        from vllm.v1.engine.utils import bind_engine_zmq_listeners, launch_core_engines
        from vllm.v1.executor import Executor

        config, engine_args = configure(self._args, self._count, -1)
        _check(config)
        self._listeners = listeners = bind_engine_zmq_listeners(config, self._count)
        log_stats = not engine_args.disable_log_stats
        executor = Executor.get_class(config)
        with spared_interrupts(), launch_core_engines(config, executor, log_stats, listeners.addresses) as launch:
            self._manager, self._coordinator = launch.engine_manager, launch.coordinator
            pids = [process.pid for process in self._own() if process.pid is not None]
            for index, (inputs, outputs) in enumerate(zip(listeners.inputs, listeners.outputs, strict=True)):
                addresses: dict[str, object] = {
                    "input_address": inputs.address,
                    "output_address": outputs.address,
                    "input_listener": inputs.socket,
                    "output_listener": outputs.socket,
                }
                if self._coordinator is not None:
                    addresses["stats_update_address"] = self._coordinator.get_stats_publish_address()
                hand_over(index, addresses, pids)
                inputs.close()
                outputs.close()
        # Workers that outlive their engine belong to init, and are found no more.
        for pid in pids:
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                self._processes += [process, *process.children(recursive=True)]
        self.started = True

    def wait(self) -> str | None:
        """Wait until one of the processes dies, and say so; None after `stop`."""
        sentinels = [process.sentinel for process in self._own()]
        while not self._stopping.is_set():
            if not sentinels:
                self._stopping.wait()
            elif multiprocessing.connection.wait(sentinels, _LOOK_EVERY_S) and not self._stopping.is_set():
                return "the engine process died"
        return None

    def stop(self) -> None:
        """End the processes."""
        self._stopping.set()
        if self._manager is not None:
            self._manager.shutdown(timeout=_STOP_S)
        if self._coordinator is not None:
            self._coordinator.shutdown(timeout=_STOP_S)
        self.kill()
        if self._listeners is not None:
            self._listeners.cleanup()

    def kill(self) -> None:
        """Send SIGKILL to the engine and worker processes."""
        for process in self._processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def _own(self) -> list[BaseProcess]:
        found: list[BaseProcess] = [] if self._manager is None else list(self._manager.processes)
        return found if self._coordinator is None else [*found, self._coordinator.proc]


def _check(config: VllmConfig) -> None:
    """Refuse what vLLM can't do for several front ends, or what can't be passed on to processes that run already."""
    multimodal = config.model_config.multimodal_config
    for wrong, flag in (
        (config.parallel_config.enable_elastic_ep, "--enable-elastic-ep"),
        (config.parallel_config.data_parallel_backend == "ray", "--data-parallel-backend ray"),
        (multimodal is not None and multimodal.mm_tensor_ipc == "torch_shm", "--mm-tensor-ipc torch_shm"),
    ):
        if wrong:
            raise ConfigError(f"{flag} wants one front end: leave it out, or use --api-server-count 1")
