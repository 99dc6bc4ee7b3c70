"""A front end's place among several (`--api-server-count`): which one it is, and its line to its supervisor."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, NoReturn

import psutil

if TYPE_CHECKING:
    import ctypes


class SupervisorChannel:
    """What a front end knows of the others.

    The supervisor says `engine` (vLLM's addresses for this front end, the pids of the engine), `ready` (all have
    loaded), `stop` and `gone` (the engine, with the reason). The front end says `alive`, `loaded`, `hangs` (the engine,
    with the reason) and `refused` (a setting, with the sentence).

    Args:
        index: of this front end, from 0.
        count: of front ends.
        line: to the supervisor.
        started_at: when the supervisor was started, in seconds of the wall clock.
        counters: for vLLM's `--max-num-queued-reqs`: numbers that all front ends share; None where it is not given.
    """

    def __init__(
        self,
        index: int,
        count: int,
        line: Connection,
        started_at: float,
        counters: ctypes.Array[ctypes.c_longlong] | None = None,
    ) -> None:
        self.index = index
        self.count = count
        self.started_at = started_at
        self.counters = counters
        self._line = line
        self._engine: list[psutil.Process] = []

    def attend(self, on_stop: Callable[[], None], on_gone: Callable[[str], None]) -> None:
        """Hear what the supervisor says from now on, and end with it. To be called in the event loop."""
        self._loop = asyncio.get_running_loop()
        self._handlers: dict[str, Callable[..., None]] = {"stop": lambda _: on_stop(), "gone": on_gone}
        self._addresses: asyncio.Future[dict[str, object]] = self._loop.create_future()
        self._all_loaded = asyncio.Event()
        threading.Thread(target=self._hear, name="supervisor-channel", daemon=True).start()

    async def addresses(self) -> dict[str, object]:
        """Where vLLM's client meets the engine; comes once the engine's process is started."""
        return await self._addresses

    async def others(self) -> None:
        """Say that this front end has loaded, and wait until all have."""
        self._say("loaded")
        await self._all_loaded.wait()

    def report_life(self) -> None:
        """Say that the event loop turns."""
        self._say("alive")

    def report_hang(self, reason: str) -> None:
        """Have the engine ended, for all."""
        self._say("hangs", reason)

    def report_refusal(self, sentence: str) -> None:
        """Say which setting can't be used."""
        self._say("refused", sentence)

    def _say(self, word: str, value: object = None) -> None:
        # A supervisor that has gone is seen by who listens.
        with contextlib.suppress(OSError):
            self._line.send((word, value))

    def _hear(self) -> None:
        while True:
            try:
                word, value = self._line.recv()
            except (EOFError, OSError):
                self._end_with_supervisor()
            if word == "engine":
                value, pids = value
                self._engine = _trees(pids)
            try:
                self._loop.call_soon_threadsafe(self._take, word, value)
            except RuntimeError:  # the loop is closed: this process ends
                return

    def _take(self, word: str, value: Any) -> None:
        if word == "engine":
            if not self._addresses.done():
                self._addresses.set_result(value)
        elif word == "ready":
            self._all_loaded.set()
        else:
            self._handlers[word](value)

    def _end_with_supervisor(self) -> NoReturn:
        """The supervisor was killed: nobody would end the engine, or this process, or hold the port."""
        for process in [*self._engine, *_trees([each.pid for each in self._engine if each.is_running()])]:
            with contextlib.suppress(psutil.Error):
                process.kill()
        os._exit(1)


def _trees(pids: Sequence[int]) -> list[psutil.Process]:
    found = []
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            found += [process, *process.children(recursive=True)]
    return found
