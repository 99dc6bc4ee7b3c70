"""Several front ends on one engine (`--api-server-count`): holds the ports, starts the engine and the front ends, and
ends them together.

Each front end is a process with the whole application of `bootstrap`, a client of the same engine. The kernel spreads
connections over them (SO_REUSEPORT). They become ready together, drain together, and when one of them dies the others
drain and the server exits with code 1.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, NoReturn

import psutil
from prometheus_client import multiprocess

from kserve_vllm.app import process as bootstrap
from kserve_vllm.config.settings import Settings
from kserve_vllm.core import termination
from kserve_vllm.core.errors import ConfigError
from kserve_vllm.core.supervisor_channel import SupervisorChannel
from kserve_vllm.engine.arguments import parse_engine_args
from kserve_vllm.engine.processes import EngineProcesses
from kserve_vllm.engine.start_watchdog import Movement, stall
from kserve_vllm.servers.listeners import reserve
from kserve_vllm.telemetry import logs

log = logging.getLogger(__name__)

_METRICS = "PROMETHEUS_MULTIPROC_DIR"
_COUNTERS_EACH = 64
"""Room for a front end in the numbers of `--max-num-queued-reqs`; vLLM takes a line of the processor's cache."""
_LOOK_EVERY_S = 1.0
_LATE_S = 30.0
"""How long after its own bound a front end that does not end is killed."""


def run(settings: Settings) -> int:
    """Serve until told to stop. Returns the exit code: 0 after a drain, 1 where anything failed.

    Raises:
        ConfigError: a setting can't be used.
    """
    bootstrap.prepare(settings)
    fresh = None
    if not os.environ.get(_METRICS):
        # Before the front ends import prometheus_client, which looks at it once.
        fresh = os.environ[_METRICS] = tempfile.mkdtemp(prefix="kserve-vllm-metrics-")
    try:
        return asyncio.run(_Supervisor(settings, fresh).main())
    finally:
        _tidy(fresh)


def _tidy(folder: str | None) -> None:
    logs.forget()
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
        os.environ.pop(_METRICS, None)


def _front_end(settings: Settings, channel: SupervisorChannel) -> None:
    """What the process of a front end runs."""
    try:
        code = bootstrap.run(settings, channel)
    except ConfigError as error:
        channel.report_refusal(str(error))
        code = 2
    sys.exit(code)


@dataclass(eq=False)
class _Child:
    """One front end, as the supervisor sees it."""

    process: BaseProcess
    line: Connection
    loaded: bool = False
    gone: bool = False
    heard_at: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def say(self, word: str, value: object = None) -> None:
        """Tell it something; nothing happens if it has ended."""
        with self.lock:
            try:
                self.line.send((word, value))
            except OSError:
                log.debug("front end %s does not listen", self.process.name)


class _Supervisor:
    """One run of the server.

    Args:
        settings: the effective settings.
        folder: for metrics, to be removed at the end; None where the operator has named one.
    """

    def __init__(self, settings: Settings, folder: str | None) -> None:
        self._settings = settings
        self._folder = folder
        self._count = settings.server.api_server_count
        self._children: list[_Child] = []
        self._cores: EngineProcesses | None = None
        self._ended = asyncio.Event()
        self._signalled = False
        self._told = False  # to end
        self._code = 0
        self._refusal: ConfigError | None = None
        self._failure: str | None = None  # of the start

    async def main(self) -> int:
        """From the reserved ports to the exit code."""
        server = self._settings.server
        held = {
            name: reserve(server.host, getattr(server, name), f"--{name.replace('_', '-')}")
            for name in ("http_port", "grpc_port", "admin_port")
            # 0 switches these two off.
            if name == "http_port" or (getattr(server, name) and (name, server.grpc_server) != ("grpc_port", "off"))
        }
        ports = {name: sock.getsockname()[1] for name, sock in held.items()}
        self._start(replace(self._settings, server=server.model_copy(update=ports)))
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        log.info("%d front ends on HTTP port %d", self._count, ports["http_port"])
        launching = asyncio.create_task(self._launch())
        watching = asyncio.create_task(self._watch())
        watchdog = asyncio.create_task(self._watch_start())
        await self._ended.wait()
        watching.cancel()
        watchdog.cancel()
        for sock in held.values():
            sock.close()
        await self._close(launching)
        if self._refusal is not None:
            raise self._refusal
        return self._code

    def _start(self, settings: Settings) -> None:
        """Start the front ends, so that the ports are open before anything is loaded."""
        loop = asyncio.get_running_loop()
        context = multiprocessing.get_context("spawn")
        counters = None
        if any(flag.key == "max-num-queued-reqs" for flag in settings.engine):
            counters = context.RawArray("q", self._count * _COUNTERS_EACH)
        started_at = psutil.Process().create_time()
        # A terminal's Ctrl-C reaches every process; the front ends leave it to this one.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            for index in range(self._count):
                ours, theirs = context.Pipe()
                channel = SupervisorChannel(index, self._count, theirs, started_at, counters)
                process = context.Process(target=_front_end, args=(settings, channel), name=f"FrontEnd_{index}")
                process.start()
                theirs.close()
                child = _Child(process, ours)
                self._children.append(child)
                loop.add_reader(ours.fileno(), self._hear, child)
                loop.add_reader(process.sentinel, self._on_exit, child)
        finally:
            signal.signal(signal.SIGINT, before)

    async def _launch(self) -> None:
        """Start the engine, then watch it."""
        try:
            settings = self._settings
            args = await asyncio.to_thread(parse_engine_args, settings.engine_argv(), settings.model.compact_json)
            self._cores = cores = EngineProcesses(args, self._count)
            await asyncio.to_thread(cores.start, self._hand_over)
        except Exception as error:
            if self._told:
                return
            if isinstance(error, ConfigError):
                self._refusal = error
                self._give_up(2)
                return
            log.exception("loading failed", exc_info=error)
            self._fail_start(logs.cause() or termination.describe(error))
            return
        reason = await asyncio.to_thread(cores.wait)
        if reason is not None:
            self._on_engine_gone(reason)

    async def _watch_start(self) -> None:
        """End a start that counts as failed. What front ends do while they wait for the engine does not count."""
        timeout_s = self._settings.lifecycle.start_stall_timeout
        movement = Movement(lambda: [child.process.pid or 0 for child in self._children])
        waiting = bootstrap.waits_for_others(self._settings)
        watching = asyncio.create_task(stall(movement, logs.failures, 0.0 if waiting else timeout_s))
        try:
            while not watching.done():
                await asyncio.wait({watching}, timeout=_LOOK_EVERY_S)
                if self._told or (self._cores is not None and self._cores.started):
                    return
            self._fail_start(watching.result())
        finally:
            watching.cancel()

    def _fail_start(self, reason: str) -> None:
        self._failure = f"the start failed: {reason}"
        self._leave_word(self._failure)
        self._give_up(1)

    def _leave_word(self, sentence: str) -> None:
        termination.write(self._settings.lifecycle.termination_message_path, sentence)

    def _hand_over(self, index: int, addresses: dict[str, object], pids: list[int]) -> None:
        self._children[index].say("engine", (addresses, pids))

    # What the front ends say and do

    def _hear(self, child: _Child) -> None:
        try:
            # All that is there: after a front end's end nobody asks again.
            while child.line.poll():
                self._take(child, *child.line.recv())
        except (EOFError, OSError):
            asyncio.get_running_loop().remove_reader(child.line.fileno())

    def _take(self, child: _Child, word: str, value: Any) -> None:
        child.heard_at = asyncio.get_running_loop().time()
        if word == "loaded":
            child.loaded = True
            if all(each.loaded for each in self._children):
                for each in self._children:
                    each.say("ready")
        elif word == "hangs":
            self._on_engine_gone(value)
            if self._cores is not None:
                self._cores.kill()
        elif word == "refused" and not self._told:
            self._refusal = ConfigError(value)
            self._give_up(2)

    async def _watch(self) -> None:
        """Kill a front end that hangs: a probe meets one of them by chance, and would often find another one well."""
        limit = self._settings.lifecycle.engine_stall_timeout
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            for child in self._children:
                if child.loaded and not child.gone and loop.time() - child.heard_at > limit:
                    log.critical("%s has not answered for %g s", child.process.name, limit)
                    self._leave_word(f"{child.process.name} did not answer for {limit:g} s")
                    child.process.kill()

    def _on_exit(self, child: _Child) -> None:
        self._hear(child)
        loop = asyncio.get_running_loop()
        loop.remove_reader(child.process.sentinel)
        loop.remove_reader(child.line.fileno())
        child.process.join()
        child.gone = True
        code, pid = child.process.exitcode, child.process.pid
        multiprocess.mark_process_dead(pid, os.environ[_METRICS])  # type: ignore[no-untyped-call]
        if code:
            self._code = self._code or (code if code > 0 else 1)
        if not self._told:
            log.critical("%s (pid %s) ended with code %s; the others are drained", child.process.name, pid, code)
            self._leave_word(f"{child.process.name} ended with code {code}; the other front ends were drained")
            self._code = self._code or 1
            self._tell_to_stop()
        if all(each.gone for each in self._children):
            self._ended.set()

    def _on_engine_gone(self, reason: str) -> None:
        self._told, self._code = True, 1
        cause = logs.cause(last=True)
        self._leave_word(reason + (f": {cause}" if cause else ""))
        for child in self._children:
            child.say("gone", reason)
        self._kill_after(self._settings.lifecycle.engine_dead_exit_after + _LATE_S)

    # The end

    def _on_signal(self) -> None:
        if self._signalled:
            log.warning("second signal: exiting at once")
            self._leave_word("a second signal came before the server had ended")
            self._kill_all()
            os._exit(1)
        self._signalled = True
        if not self._told:
            self._tell_to_stop()

    def _tell_to_stop(self) -> None:
        self._told = True
        for child in self._children:
            child.say("stop")
        life = self._settings.lifecycle
        self._kill_after(life.drain_delay + life.drain_timeout + _LATE_S)

    def _give_up(self, code: int) -> None:
        """Nothing is in flight yet."""
        self._told, self._code = True, code
        self._kill_after(0)

    def _kill_after(self, seconds: float) -> None:
        asyncio.get_running_loop().call_later(seconds, self._kill_front_ends)

    def _kill_front_ends(self) -> None:
        for child in self._children:
            if not child.gone:
                child.process.kill()

    def _kill_all(self) -> None:
        for process in psutil.Process().children(recursive=True):
            process.kill()

    async def _close(self, launching: asyncio.Task[None]) -> None:
        """End the engine, after the last front end."""
        if self._cores is not None and self._cores.started:
            await asyncio.to_thread(self._cores.stop)
            await launching
            return
        if launching.done() and self._failure is None:
            self._kill_all()
            return
        # The thread that waits for the engine can't be interrupted; the process ends without it.
        self._end_at_once()

    def _end_at_once(self) -> NoReturn:
        self._kill_all()
        _tidy(self._folder)
        if self._refusal is not None:
            self._leave_word(f"kserve-vllm: {self._refusal}")
            print(f"kserve-vllm: {self._refusal}", file=sys.stderr)
        if self._failure is not None:
            log.critical("%s; exiting with code %d", self._failure, self._code)
        sys.stderr.flush()
        os._exit(self._code)
