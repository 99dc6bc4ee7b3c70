"""The queue in front of the engine: who may go in now, who waits, who is turned away.

There are as many slots as requests that the engine should work on at once. A request that finds no slot waits with
others of its class. Whenever a slot is free, it goes to the oldest request of the highest class that may run; a class
may hold no more slots than its share, and while it is at its share, lower classes go past it. So no slot stays free
while a request waits that may have it.

The queue is bounded in total and per class, and in time. When it is full in total, the newest request of the lowest
class below the newcomer's is turned away to make room; a class's own bound is never exceeded.

One event loop, no locks, no tasks: a waiting request is a future, and one timer serves all deadlines, since all
requests may wait equally long. What a request costs does not depend on how many wait.
"""

from __future__ import annotations

import asyncio
import copy
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import TypedDict

from kserve_vllm.core.errors import ConfigError, QueueTimeout, RateLimited, RequestError, Unavailable
from kserve_vllm.core.types import Priority

_SMOOTHING = 0.1
_RETRY_MAX_S = 60
_TIMER_MIN_S = 0.001


def class_values(items: Iterable[str], setting: str) -> dict[Priority, float]:
    """Read `class=number` pairs as flags give them.

    Args:
        items: such as `batch=0.25`; the last of a class counts.
        setting: the flag's name, for the message.

    Raises:
        ConfigError: an item is not of that form, names no class, or its number is negative or no number.
    """
    found = {}
    for item in items:
        name, _, value = item.partition("=")
        try:
            number = float(value)
            if not (0 <= number < math.inf):
                raise ValueError
            found[Priority[name.strip().upper()]] = number
        except (KeyError, ValueError):
            names = ", ".join(p.name.lower() for p in Priority)
            raise ConfigError(f"{setting}: {item!r} is not CLASS=NUMBER, with a class of {names}.") from None
    return found


class ClassStats(TypedDict):
    """What an operator is told of one class: numbers of requests, and seconds; None: not known yet."""

    in_use: int
    slots: int
    waiting: int
    queue_size: int
    oldest_wait_s: float
    estimated_wait_s: float | None


class QueueStats(TypedDict):
    """What an operator is told of the whole queue: numbers of requests, seconds, and totals since the start."""

    slots: int
    in_use: int
    waiting: int
    queue_size: int
    timeout_s: float | None
    mean_held_s: float | None
    classes: dict[str, ClassStats]
    granted: int
    refused: int
    evicted: int
    timed_out: int
    gone: int


class Slot:
    """The right to be in the engine, to be given back once.

    Attributes:
        waited_s: seconds that the request waited for it.
    """

    __slots__ = ("_admission", "_index", "_since", "waited_s")

    def __init__(self, admission: PriorityQueue | None, index: int, since: float, waited_s: float) -> None:
        self._admission = admission
        self._index = index
        self._since = since
        self.waited_s = waited_s

    def release(self) -> None:
        """Give the slot back, to whoever is next; a second call does nothing. In the event loop's thread only."""
        admission = self._admission
        if admission is not None:
            self._admission = None
            admission._release(self._index, self._since)

    def __enter__(self) -> Slot:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()


class _Waiter:
    """A request that waits. Its future gets the time at which it was let in, or the error that ends the wait."""

    __slots__ = ("future", "since")

    def __init__(self, future: asyncio.Future[float | RequestError], since: float) -> None:
        self.future = future
        self.since = since


_Line = OrderedDict[_Waiter, None]


class PriorityQueue:
    """Hands out slots by class, then by arrival.

    Args:
        slots: requests allowed through at once; 0: no queue, everything passes at once.
        queue_size: most requests that wait, of all classes together.
        class_sizes: most requests of a class that wait; `queue_size` for a class that is not named.
        timeout_s: seconds that a request may wait; `math.inf` for no end.
        shares: part of the slots, 0 to 1, that a class may hold at once, rounded down but never below one slot; all
            slots for a class that is not named.
        clock: monotonic seconds.

    Raises:
        ConfigError: a number is out of its range.
    """

    def __init__(
        self,
        slots: int,
        queue_size: int,
        class_sizes: Mapping[Priority, float],
        timeout_s: float,
        shares: Mapping[Priority, float],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if slots < 0 or queue_size < 0 or not timeout_s >= 0:
            raise ConfigError("The number of slots, the queue's size and its timeout can't be negative.")
        for priority, size in class_sizes.items():
            if size < 0 or size != int(size):
                name = priority.name.lower()
                raise ConfigError(f"The size of the queue's class {name} must be a whole number, 0 or more.")
        for priority, share in shares.items():
            if not 0 <= share <= 1:
                raise ConfigError(f"The share of the class {priority.name.lower()} must be from 0 to 1, not {share:g}.")
        self._slots = self._free = slots
        self._size = queue_size
        self._sizes = [min(queue_size, int(class_sizes.get(p, queue_size))) for p in Priority]
        # The tiny summand: 0.29 * 100 is a little less than 29.
        self._caps = [max(1, min(slots, int(slots * shares.get(p, 1.0) + 1e-9))) for p in Priority]
        self._timeout_s = timeout_s
        self._clock = clock
        self._used = [0] * len(Priority)
        self._lines: list[_Line] = [OrderedDict() for _ in Priority]
        self._waiting = 0
        self._timer: asyncio.TimerHandle | None = None
        self._held_s: float | None = None
        """Mean time that a slot was held, of late ones more than of early ones."""
        self.granted = 0
        self.refused = 0
        self.evicted = 0
        self.timed_out = 0
        self.gone = 0
        """Requests whose clients went away while they waited."""

    @property
    def waiting(self) -> int:
        """Requests that wait now."""
        return self._waiting

    def passes(self, priority: Priority) -> bool:
        """Whether `acquire` would return at once."""
        return not self._slots or (self._free > 0 and self._used[priority] < self._caps[priority])

    async def acquire(self, priority: Priority) -> Slot:
        """Wait for a slot. Whoever is cancelled while waiting leaves the queue and holds nothing.

        Use it as `with await admission.acquire(priority):`, or call `release` on what it returns, whatever happens.

        Raises:
            RateLimited: there was no room to wait (reason `queue_full`), or a higher class took the room (`evicted`).
            QueueTimeout: the wait was too long (reason `queue_timeout`).
            RequestError: what `fail` or `close` was called with.
        """
        if not self._slots:
            return _FREE
        index = int(priority)
        now = self._clock()
        # Nobody of this class waits then, and those who wait above it may not run: see `_let_in`.
        if self._free and self._used[index] < self._caps[index]:
            self._free -= 1
            self._used[index] += 1
            self.granted += 1
            return Slot(self, index, now, 0.0)
        self._make_room(index)
        waiter = _Waiter(asyncio.get_running_loop().create_future(), now)
        self._lines[index][waiter] = None
        self._waiting += 1
        if self._timer is None:
            self._set_timer(self._timeout_s)
        try:
            outcome = await waiter.future
        except BaseException:
            self._leave(index, waiter)
            raise
        if isinstance(outcome, RequestError):
            raise outcome
        return Slot(self, index, outcome, outcome - now)

    def estimated_wait_s(self, priority: Priority) -> float | None:
        """Seconds that a newcomer of the class would wait; None while nothing is known about how long requests take.

        From the requests that would go first, and the mean time that a slot was held of late. Those of higher classes
        who come later are not in it.
        """
        index = int(priority)
        if not self._slots or (self._free and self._used[index] < self._caps[index]):
            return 0.0
        if self._held_s is None:
            return None
        ahead = sum(len(line) for line in self._lines[: index + 1])
        own = len(self._lines[index])
        return self._held_s * max((ahead + 1) / self._slots, (own + 1) / self._caps[index])

    def stats(self) -> QueueStats:
        """What an operator asks for: numbers of requests, seconds, and totals since the start."""
        now = self._clock()
        classes: dict[str, ClassStats] = {}
        for priority in Priority:
            line = self._lines[priority]
            wait = self.estimated_wait_s(priority)
            classes[priority.name.lower()] = {
                "in_use": self._used[priority],
                "slots": self._caps[priority] if self._slots else 0,
                "waiting": len(line),
                "queue_size": self._sizes[priority],
                "oldest_wait_s": round(max(0.0, now - next(iter(line)).since), 6) if line else 0.0,
                "estimated_wait_s": None if wait is None else round(wait, 6),
            }
        return {
            "slots": self._slots,
            "in_use": self._slots - self._free,
            "waiting": self._waiting,
            "queue_size": self._size,
            "timeout_s": self._timeout_s if math.isfinite(self._timeout_s) else None,
            "mean_held_s": None if self._held_s is None else round(self._held_s, 6),
            "classes": classes,
            "granted": self.granted,
            "refused": self.refused,
            "evicted": self.evicted,
            "timed_out": self.timed_out,
            "gone": self.gone,
        }

    def fail(self, error: RequestError) -> None:
        """End every wait with a copy of this error, as when the engine is dead. Slots that are held stay held."""
        for line in self._lines:
            while line:
                waiter, _ = line.popitem(last=False)
                self._waiting -= 1
                if not waiter.future.done():
                    # A copy each: an exception that several tasks raise collects the tracebacks of all of them.
                    waiter.future.set_result(copy.copy(error))

    def close(self) -> None:
        """The end of a drain: whoever still waits is told so. A drain itself needs nothing: who waits gets a turn."""
        sentence = "The server stopped before it was this request's turn."
        self.fail(Unavailable(sentence, retry_after_s=1, close=True, reason="stopped"))
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _make_room(self, index: int) -> None:
        """See to it that one more of the class may wait, or raise why it may not."""
        if len(self._lines[index]) < self._sizes[index]:
            if self._waiting < self._size:
                return
            for lower in range(len(self._lines) - 1, index, -1):
                if self._lines[lower]:
                    waiter, _ = self._lines[lower].popitem()
                    self._waiting -= 1
                    # Done: the client went away this moment, which makes room as well.
                    if not waiter.future.done():
                        self.evicted += 1
                        waiter.future.set_result(self._turned_away(lower, "evicted"))
                    return
        self.refused += 1
        raise self._turned_away(index, "queue_full")

    def _turned_away(self, index: int, reason: str) -> RateLimited:
        if reason == "evicted":
            message = "The queue is full, and this request had to make room for one of a higher class. Try again later."
        else:
            message = f"The queue for requests of class {Priority(index).name.lower()} is full. Try again later."
        return RateLimited(message, retry_after_s=self._retry_after_s(index), reason=reason)

    def _retry_after_s(self, index: int) -> int:
        wait_s = self.estimated_wait_s(Priority(index)) or 0.0
        return max(1, min(_RETRY_MAX_S, math.ceil(wait_s)))

    def _release(self, index: int, since: float) -> None:
        now = self._clock()
        held_s = now - since
        self._held_s = held_s if self._held_s is None else self._held_s + _SMOOTHING * (held_s - self._held_s)
        self._give_back(index, now)

    def _give_back(self, index: int, now: float) -> None:
        self._free += 1
        self._used[index] -= 1
        if self._waiting:
            self._let_in(now)

    def _let_in(self, now: float) -> None:
        """After a slot came free: give it to the next.

        Before it came free, nobody waited who may have had a slot. So one at most may go now, and afterwards that holds
        again.
        """
        for index, line in enumerate(self._lines):
            while line and self._free and self._used[index] < self._caps[index]:
                waiter, _ = line.popitem(last=False)
                self._waiting -= 1
                if not waiter.future.done():
                    self._free -= 1
                    self._used[index] += 1
                    self.granted += 1
                    waiter.future.set_result(now)

    def _leave(self, index: int, waiter: _Waiter) -> None:
        """A task was cancelled while it waited, or after its future had been answered and before it ran again."""
        future = waiter.future
        if future.done() and not future.cancelled():
            if isinstance(future.result(), RequestError):
                return
            self.granted -= 1
            self._give_back(index, self._clock())
        elif self._lines[index].pop(waiter, self) is None:
            self._waiting -= 1
        self.gone += 1

    def _set_timer(self, delay_s: float) -> None:
        if math.isfinite(delay_s):
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(max(_TIMER_MIN_S, delay_s), self._expire)

    def _expire(self) -> None:
        """End the waits that took too long; come again when the next one would."""
        self._timer = None
        now = self._clock()
        last = now - self._timeout_s
        oldest: float | None = None
        for index, line in enumerate(self._lines):
            while line:
                waiter = next(iter(line))
                if waiter.since > last:
                    oldest = waiter.since if oldest is None else min(oldest, waiter.since)
                    break
                del line[waiter]
                self._waiting -= 1
                if not waiter.future.done():
                    self.timed_out += 1
                    error = QueueTimeout(
                        f"The request waited {self._timeout_s:g} s for the engine, as long as it may. Try again later.",
                        retry_after_s=self._retry_after_s(index),
                        reason="queue_timeout",
                    )
                    waiter.future.set_result(error)
        if oldest is not None:
            self._set_timer(oldest - last)


_FREE = Slot(None, 0, 0.0, 0.0)
