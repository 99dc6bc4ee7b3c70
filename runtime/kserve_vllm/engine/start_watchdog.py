"""A watchdog over the start: one that has failed, or in which nothing moves, comes to an end.

vLLM may wait for ever for a process of its own that neither works nor ends: a worker that has swallowed its SystemExit,
say, is joined without a bound. What can be seen from outside is whether anything moves in the processes, and whether
one of them has said that it failed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import psutil

LOOK_EVERY_S = 2.0
FAILED_GRACE_S = 15.0
"""How long vLLM may take to end by itself once one of its processes has failed to start."""
# What a process uses up that only waits for another: up to 1 % of a processor, as one of vLLM's workers does, and now
# and then a few bytes through a pipe. A log line is longer.
_LEAST_SHARE = 0.03
_LEAST_BYTES = 100
_TICKS = os.sysconf("SC_CLK_TCK")

Used = dict[tuple[int, float], tuple[float, int]]
"""Processor time in seconds, and bytes read and written, of processes (pid, start) and threads (id, 0)."""


class Movement:
    """Tells whether anything has moved in this process or below it.

    Of this process the main thread does not count: its event loop answers probes all the time.

    Args:
        left_out: pids of processes below that don't count, with all that is below them.
    """

    def __init__(self, left_out: Callable[[], Collection[int]] = tuple) -> None:
        self._left_out = left_out
        self._before = self._used()
        self._looked_at = time.monotonic()

    def look(self) -> bool:
        """Whether anything has moved since the last time: one of them computed, or bytes were read or written."""
        now, used = time.monotonic(), self._used()
        cpu_s = moved = 0.0  # of many that wait, the sum would be as much as of one that works
        for key, (seconds, size) in used.items():
            seconds_before, size_before = self._before.get(key, (0.0, 0))
            cpu_s = max(cpu_s, seconds - seconds_before)
            moved += size - size_before
        passed, self._looked_at, self._before = now - self._looked_at, now, used
        return cpu_s >= _LEAST_SHARE * passed or moved >= _LEAST_BYTES

    def _used(self) -> Used:
        used: Used = {}
        waiting = [psutil.Process()]
        left_out = set(self._left_out())
        while waiting:
            with contextlib.suppress(psutil.Error):
                process = waiting.pop()
                waiting += [child for child in process.children() if child.pid not in left_out]
                if process.pid == os.getpid():
                    continue
                times = process.cpu_times()
                used[process.pid, process.create_time()] = (
                    times.user + times.system,
                    _bytes(Path(f"/proc/{process.pid}/io")),
                )
        tasks = Path("/proc/self/task")
        for thread in tasks.iterdir() if tasks.is_dir() else ():
            if int(thread.name) not in (os.getpid(), threading.get_native_id()):
                used[int(thread.name), 0.0] = _seconds(thread / "stat"), _bytes(thread / "io")
        return used


async def stall(
    movement: Movement,
    failures: Callable[[], Sequence[tuple[str, str]]],
    timeout_s: float,
    look_every_s: float = LOOK_EVERY_S,
    failed_grace_s: float = FAILED_GRACE_S,
) -> str:
    """Wait until the start counts as failed, and say why.

    Args:
        movement: what moves.
        failures: (message, exception in one line) of what processes of vLLM have logged as an error, first one first.
        timeout_s: how long nothing may move; 0: as long as it likes.
        look_every_s: how often to look.
        failed_grace_s: how long vLLM may take to end by itself after a process of its own has failed to start.
    """
    still_s = failed_s = 0.0
    looked_at = time.monotonic()
    while True:
        await asyncio.sleep(look_every_s)
        now = time.monotonic()
        # Time in which this process itself stood still, as under `docker pause`, is nobody's fault.
        passed, looked_at = min(now - looked_at, 2 * look_every_s), now
        still_s = 0.0 if movement.look() else still_s + passed
        found = failures()
        if any("failed to start" in message for message, _ in found):
            failed_s += passed
        if failed_s >= failed_grace_s:
            return f"{found[0][1]}; its processes did not end by themselves"
        if timeout_s and still_s >= timeout_s:
            why = f": {found[0][1]}" if found else ""
            return f"for {timeout_s:g} s no process used a processor, read or wrote{why}"


def _bytes(file: Path) -> int:
    """Bytes that a process or thread has read and written, by calls and by paging in files.
    Source: Linux, Documentation/filesystems/proc.rst, 3.3."""
    with contextlib.suppress(OSError, ValueError):
        rows = dict(line.split(": ", 1) for line in file.read_text().splitlines())
        return sum(int(rows.get(name, 0)) for name in ("rchar", "wchar", "read_bytes"))
    return 0


def _seconds(file: Path) -> float:
    """Processor time of a thread. Source: proc(5), fields 14 and 15 of `stat`."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        # The name in the second field may hold anything.
        fields = file.read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS
    return 0.0
