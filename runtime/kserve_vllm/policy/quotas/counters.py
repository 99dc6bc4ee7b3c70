"""What was used in the last minute and what runs now, of many subjects: in memory, or in Redis for all replicas.

Time is cut into buckets, and a window is the current bucket and the 12 whole ones before it (of 5 s each, for 60 s).
So whatever lies within one window's length of time is counted together, wherever it starts: a limit holds exactly, and
what was used is free again after 60 to 65 s.

Both stores take several counters in one step, all or none.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from importlib.resources import files
from typing import Literal, NamedTuple, Protocol

import structlog

from kserve_vllm.policy.redis_connection import RedisConnection, RedisUnavailable

Kind = Literal["requests", "tokens", "concurrent"]

_PLACE_WAIT_S = 1.0  # when a place will be free is not known
_SWEEP = 4  # idle subjects dropped per step; more than one, so that sweeping outruns growth

_log = structlog.stdlib.get_logger(__name__)


class Ask(NamedTuple):
    """A wish to take an amount of one counter: requests or tokens of a window, or places that run at once."""

    subject: str
    kind: Kind
    limit: int
    amount: int


class Level(NamedTuple):
    """How far a counter is used, and in how many seconds it would be empty if nothing more came."""

    used: int
    reset_s: float


class CounterAnswer(NamedTuple):
    """What came of some asks.

    Attributes:
        bucket: in which the amounts were booked; needed to give them back.
        levels: one per ask, after it was granted, or as they are if it was not.
        short: index of the ask that stands longest in the way; None if all were granted.
        wait_s: seconds until that one could be granted.
    """

    bucket: int
    levels: list[Level]
    short: int | None = None
    wait_s: float = 0.0


class Counters(Protocol):
    """A store of counters.

    `take` grants all asks or none; no `amount` may be over its `limit`. The other methods return at once.
    """

    async def take(self, asks: Sequence[Ask], lease: str = "") -> CounterAnswer:
        """Take; `lease` names the places that are taken. Raises `RedisUnavailable`."""

    def leave(self, asks: Sequence[Ask], lease: str) -> None:
        """Free the places that were taken under this lease."""

    def give(self, subjects: Sequence[str], bucket: int, tokens: int) -> None:
        """Give back tokens that were taken in a bucket, as far as they still count."""

    def add(self, subjects: Sequence[str], tokens: int) -> None:
        """Book tokens that were used already, past any limit."""

    async def close(self) -> None:
        """Finish what was begun."""


class _Window:
    """Amounts per bucket of one counter, oldest first, and their sum."""

    __slots__ = ("amounts", "total")

    def __init__(self) -> None:
        self.amounts: dict[int, int] = {}
        self.total = 0

    def forget(self, before: int) -> None:
        amounts = self.amounts
        while amounts:
            bucket = next(iter(amounts))
            if bucket >= before:
                break
            self.total -= amounts.pop(bucket)

    def add(self, bucket: int, amount: int) -> None:
        self.amounts[bucket] = self.amounts.get(bucket, 0) + amount
        self.total += amount

    def remove(self, bucket: int, amount: int) -> None:
        held = self.amounts.get(bucket, 0)
        if held <= amount:
            amount = held
            self.amounts.pop(bucket, None)
        else:
            self.amounts[bucket] = held - amount
        self.total -= amount

    def last_needed(self, amount: int) -> int:
        """The bucket after whose end so much will be free."""
        bucket = -1
        for bucket, held in self.amounts.items():  # noqa: B007
            amount -= held
            if amount <= 0:
                break
        return bucket


class _Subject:
    __slots__ = ("requests", "running", "tokens", "touched")

    def __init__(self) -> None:
        self.requests: _Window | None = None
        self.tokens: _Window | None = None
        self.running = 0
        self.touched = 0

    def window(self, kind: Kind) -> _Window:
        if kind == "requests":
            self.requests = found = self.requests or _Window()
        else:
            self.tokens = found = self.tokens or _Window()
        return found


class MemoryCounters:
    """Counters of this process. Nothing in here waits, so nothing can come between a check and what follows it.

    A subject that was idle for longer than the window is dropped, a few with each step.

    Args:
        window_s: length of the window in seconds.
        buckets: whole buckets per window.
        clock: nanoseconds, never going back.
    """

    def __init__(self, window_s: float = 60.0, buckets: int = 12, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self.window_s = window_s
        self.buckets = buckets
        self._width = -(-int(window_s * 1e9) // buckets)
        self._clock = clock
        self._subjects: OrderedDict[str, _Subject] = OrderedDict()

    def __len__(self) -> int:
        return len(self._subjects)

    async def take(self, asks: Sequence[Ask], lease: str = "") -> CounterAnswer:
        """See `Counters`."""
        return self.take_now(asks)

    def take_now(self, asks: Sequence[Ask]) -> CounterAnswer:
        """`take` without waiting."""
        now = self._clock()
        bucket = now // self._width
        oldest = bucket - self.buckets
        short, wait = None, -1.0
        found: list[tuple[_Subject, _Window | None]] = []
        for index, ask in enumerate(asks):
            subject = self._subject(ask.subject, now)
            if ask.kind == "concurrent":
                found.append((subject, None))
                if subject.running + ask.amount > ask.limit and wait < _PLACE_WAIT_S:
                    short, wait = index, _PLACE_WAIT_S
                continue
            counted = subject.window(ask.kind)
            counted.forget(oldest)
            found.append((subject, counted))
            missing = counted.total + ask.amount - ask.limit
            if missing > 0:
                delay = self._leaves(counted.last_needed(missing), now)
                if delay > wait:
                    short, wait = index, delay
        if short is None:
            for ask, (subject, window) in zip(asks, found, strict=True):
                if window is None:
                    subject.running += ask.amount
                elif ask.amount:
                    window.add(bucket, ask.amount)
        self._sweep(now)
        levels = [
            Level(subject.running, 0.0)
            if window is None
            else Level(window.total, self._leaves(next(reversed(window.amounts)), now) if window.amounts else 0.0)
            for subject, window in found
        ]
        return CounterAnswer(bucket, levels, short, max(wait, 0.0))

    def leave(self, asks: Sequence[Ask], lease: str = "") -> None:
        """See `Counters`."""
        for ask in asks:
            subject = self._subjects.get(ask.subject)
            if subject is not None:
                subject.running -= ask.amount

    def give(self, subjects: Sequence[str], bucket: int, tokens: int) -> None:
        """See `Counters`."""
        for name in subjects:
            subject = self._subjects.get(name)
            if subject is not None and subject.tokens is not None:
                subject.tokens.remove(bucket, tokens)

    def add(self, subjects: Sequence[str], tokens: int) -> None:
        """See `Counters`."""
        now = self._clock()
        for name in subjects:
            self._subject(name, now).window("tokens").add(now // self._width, tokens)

    async def close(self) -> None:
        """Nothing is open."""

    def _subject(self, name: str, now: int) -> _Subject:
        subject = self._subjects.get(name)
        if subject is None:
            subject = self._subjects[name] = _Subject()
        else:
            self._subjects.move_to_end(name)
        subject.touched = now
        return subject

    def _leaves(self, bucket: int, now: int) -> float:
        """Seconds until a bucket no longer counts."""
        return ((bucket + self.buckets + 1) * self._width - now) / 1e9

    def _sweep(self, now: int) -> None:
        past = now - (self.buckets + 1) * self._width
        for _ in range(_SWEEP):
            name, subject = next(iter(self._subjects.items()), ("", None))
            if subject is None or subject.touched >= past:
                break
            if subject.running:  # its requests are still going on: look again in a while
                self._subject(name, now)
            else:
                del self._subjects[name]


_LUA = files("kserve_vllm.policy.quotas") / "lua"
_TAKE = (_LUA / "take.lua").read_text()
_BOOK = (_LUA / "book.lua").read_text()
_BATCH = 500  # entries of one _BOOK
_KEPT = 10_000  # freed places that are remembered while Redis is away
_RETRY_S = 0.5
_CLOSE_S = 2.0


class RedisCounters:
    """Counters of all replicas that share one Redis.

    To take is one script, so one atomic step and one round trip. What is given back is sent in the background, in
    batches; `close` waits for it. Give-backs that Redis did not confirm are not repeated, since that could give back
    twice: such tokens stay booked until their window has passed.

    A place is a lease of 30 s which is renewed every 10 s for as long as the request runs: it survives a Redis that
    lost its data, and ends by itself when the replica that held it is gone. Keys of idle subjects expire.

    Args:
        remote: the server.
        window_s: length of the window in seconds; the same in all replicas.
        buckets: whole buckets per window; the same in all replicas.
        lease_s: seconds after which the places of a crashed replica are free.
        prefix: of all keys; replicas with the same prefix share their limits. The part in braces keeps all keys in one
            slot of a cluster, which the script needs.
    """

    def __init__(
        self,
        remote: RedisConnection,
        window_s: float = 60.0,
        buckets: int = 12,
        lease_s: float = 30.0,
        prefix: str = "{kserve-vllm}:limits",
    ) -> None:
        self.window_s = window_s
        self.buckets = buckets
        self._remote = remote
        self._lease_s = lease_s
        self._prefix = prefix
        self._width = -(-int(window_s * 1e6) // buckets)
        self._lease_us = int(lease_s * 1e6)
        self._leases: dict[str, list[str]] = {}  # keys of the places that are held, by lease
        self._waiting: list[tuple[str, str, str, int]] = []  # key, what, bucket or lease, amount
        self._wake = asyncio.Event()
        self._writer: asyncio.Task[None] | None = None
        self._closing = False

    async def take(self, asks: Sequence[Ask], lease: str = "") -> CounterAnswer:
        """See `Counters`."""
        self._start()
        keys = [f"{self._prefix}:{ask.kind}:{ask.subject}" for ask in asks]
        arguments: list[str | int] = [self._width, self.buckets, self._lease_us, lease, int(_PLACE_WAIT_S * 1e6)]
        for ask in asks:
            arguments += (ask.kind, ask.limit, ask.amount)
        places = [key for key, ask in zip(keys, asks, strict=True) if ask.kind == "concurrent"]
        try:
            answer = await self._remote.call(lambda redis: redis.register_script(_TAKE)(keys, arguments))
        except BaseException as error:
            # It may have been taken; nobody else would free it.
            if places and not (isinstance(error, RedisUnavailable) and not error.sent):
                self._free(places, lease)
            raise
        bucket, short, wait, flat = answer
        levels = [Level(flat[i], flat[i + 1] / 1e6) for i in range(0, len(flat), 2)]
        if short:
            return CounterAnswer(bucket, levels, short - 1, wait / 1e6)
        if places:
            self._leases[lease] = places
        return CounterAnswer(bucket, levels)

    def adopt(self, asks: Sequence[Ask], lease: str) -> None:
        """Book places that were taken elsewhere while Redis was away, as soon as it is back."""
        self._start()
        self._leases[lease] = [f"{self._prefix}:concurrent:{ask.subject}" for ask in asks]

    def leave(self, asks: Sequence[Ask], lease: str) -> None:
        """See `Counters`."""
        if (places := self._leases.pop(lease, None)) is not None:
            self._free(places, lease)

    def give(self, subjects: Sequence[str], bucket: int, tokens: int) -> None:
        """See `Counters`."""
        self._later([(f"{self._prefix}:tokens:{each}", "give", str(bucket), tokens) for each in subjects])

    def add(self, subjects: Sequence[str], tokens: int) -> None:
        """See `Counters`."""
        self._later([(f"{self._prefix}:tokens:{each}", "add", "", tokens) for each in subjects])

    async def close(self) -> None:
        """Send what is to be given back, for two seconds at most."""
        self._closing = True
        self._wake.set()
        if self._writer is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._writer, _CLOSE_S)

    def _free(self, places: list[str], lease: str) -> None:
        self._later([(key, "leave", lease, 0) for key in places])

    def _later(self, entries: list[tuple[str, str, str, int]]) -> None:
        self._waiting += entries
        self._wake.set()

    def _start(self) -> None:
        if self._writer is None:
            self._writer = asyncio.get_running_loop().create_task(self._write(), name="limits in redis")

    async def _write(self) -> None:
        """Send what waits, and renew the leases; one after the other, so that no renewal overtakes a leave."""
        loop = asyncio.get_running_loop()
        due = loop.time() + self._lease_s / 3
        while not (self._closing and not self._waiting):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(due):
                    await self._wake.wait()
            self._wake.clear()
            renewing = loop.time() >= due and not self._closing
            entries, self._waiting = self._waiting, []
            if renewing:
                entries += [(key, "renew", lease, 0) for lease, places in self._leases.items() for key in places]
            try:
                while entries:
                    await self._send(entries[:_BATCH])
                    del entries[:_BATCH]
                if renewing:
                    due = loop.time() + self._lease_s / 3
            except RedisUnavailable:
                if self._closing:
                    return
                # Those may be repeated: a lease has a name.
                left = [each for each in entries if each[1] == "leave"]
                self._waiting = (left + self._waiting)[:_KEPT]
                await asyncio.sleep(_RETRY_S)
                if self._waiting:
                    self._wake.set()
            except Exception:
                _log.exception("limits could not be given back")
                await asyncio.sleep(_RETRY_S)

    async def _send(self, entries: list[tuple[str, str, str, int]]) -> None:
        arguments: list[str | int] = [self._width, self.buckets, self._lease_us]
        for _, what, name, amount in entries:
            arguments += (what, name, amount)
        keys = [key for key, *_ in entries]
        await self._remote.call(lambda redis: redis.register_script(_BOOK)(keys, arguments))
