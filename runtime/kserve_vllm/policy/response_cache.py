"""Answers that were given before, and one generation for all who ask the same at the same time.

The cache stands before the engine and knows nothing of it: a piece is whatever the caller's generator gives, a `Codec`
makes bytes of it. What is the same is the caller's to say, with the bytes that it hands to `ResponseCache.key`.

While an answer is generated it is a flight: a task of its own runs the engine's generator, and everybody who asked, the
first one included, reads what the task has got so far. So it is of no account whose client leaves. The task ends when
the last reader has left. It runs in a copy of the first caller's context, and whatever is recorded by context is
recorded to the first caller. When that one leaves before the end, the oldest of the other readers takes its place: the
context's request context is changed, and `hand_over` is called so that what is already booked to the first can be
moved.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import hashlib
import logging
import operator
import re
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from contextvars import Context, copy_context
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Generic, Literal, Protocol, TypeVar

import orjson
from cachetools import TTLCache

from kserve_vllm.core.errors import Unavailable
from kserve_vllm.core.request_context import RequestContext, current
from kserve_vllm.policy.redis_connection import RedisConnection, RedisUnavailable

if TYPE_CHECKING:
    from redis.asyncio import Redis

P = TypeVar("P")

MAX_ENTRY_BYTES = 1 << 20
_FORMAT = 1  # of keys and values; counted up when either changes
_PREFIX = "{kserve-vllm}:cache:"
_BREATH = 16  # pieces of a stored answer between two turns of the event loop
_AGE = 64  # pieces of a running answer that are kept as they came; older ones are packed

log = logging.getLogger(__name__)


class CacheOutcome(enum.Enum):
    """What the cache did for a request; `header` is the value of `x-cache`."""

    HIT = "hit"
    JOINED = "joined"
    MISS = "miss"
    BYPASS = "bypass"

    @property
    def header(self) -> str:
        """`hit` also for who joined a running generation: it cost the engine nothing."""
        return "hit" if self is CacheOutcome.JOINED else self.value


class Use(enum.Enum):
    """What a client allows the cache to do for one request."""

    NORMAL = "normal"
    FRESH = "fresh"
    """Generate anew, and keep the result."""
    NONE = "none"
    """Neither read nor write."""


_MAX_AGE_0 = re.compile(r'max-age="?0+"?')


def allowed_use(cache_control: str | None) -> Use:
    """What a `Cache-Control` header (RFC 9111, section 5.2.1) of a request allows.

    `no-store`: neither read nor write. `no-cache` and `max-age=0`: don't read, but write. Other directives are
    ignored, as the standard lets a cache do.
    """
    if not cache_control:
        return Use.NORMAL
    directives = {word.strip().lower() for word in cache_control.split(",")}
    if "no-store" in directives:
        return Use.NONE
    if "no-cache" in directives or any(_MAX_AGE_0.fullmatch(word) for word in directives):
        return Use.FRESH
    return Use.NORMAL


class Codec(Protocol[P]):
    """Makes bytes of pieces and pieces of bytes."""

    def pack(self, piece: P) -> bytes | None:
        """One piece as JSON, or None if the answer that it belongs to must not be stored."""

    def unpack(self, value: bytes) -> list[P]:
        """Pieces of a JSON list of what `pack` gave.

        Raises:
            ValueError: it is something else.
        """

    def ends(self, piece: P) -> bool:
        """Whether an answer is complete with this piece."""


class AnswerStore(Protocol):
    """Where answers are kept. Reading and writing never raise for a store that is away."""

    remote: bool
    """Whether asking it takes time."""

    async def get(self, key: str) -> bytes | None:
        """The value, or None.

        Raises:
            StoreAway: the store can't be asked now.
        """

    async def put(self, key: str, value: bytes) -> None:
        """Keep a value; silently not, where that can't be done."""


class StoreUnavailable(Exception):
    """The store can't be asked; the request is answered without it."""


class MemoryStore:
    """Values in this process, the ones not asked for the longest dropped first.

    Args:
        max_bytes: bound on keys, values and what keeping them costs.
        ttl_s: seconds that a value lives.
        clock: seconds, monotonic.
    """

    OVERHEAD_BYTES = 450
    """What an entry costs beside its key's characters and its value's bytes."""

    remote = False

    def __init__(self, max_bytes: int, ttl_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        # Sizes are asked of a value alone, so a key's characters are counted with it.
        self._entries: TTLCache[str, tuple[int, bytes]] = TTLCache(max_bytes, ttl_s, clock, operator.itemgetter(0))

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def size_bytes(self) -> int:
        """What all entries cost."""
        return int(self._entries.currsize)

    async def get(self, key: str) -> bytes | None:
        """The value, or None; never suspends."""
        entry = self._entries.get(key)
        return None if entry is None else entry[1]

    async def put(self, key: str, value: bytes) -> None:
        """Keep a value, unless it alone is over the bound; never suspends."""
        self._entries.pop(key, None)
        with contextlib.suppress(ValueError):
            self._entries[key] = len(key) + len(value) + self.OVERHEAD_BYTES, value


class RedisStore:
    """Values in Redis or Valkey, shared by all replicas. Redis bounds its own memory (`maxmemory`).

    Args:
        remote: the connection.
        ttl_s: seconds that a value lives; whole seconds, at least one.
    """

    remote = True

    def __init__(self, remote: RedisConnection, ttl_s: float) -> None:
        self._remote = remote
        self._ttl_s = max(1, round(ttl_s))

    async def get(self, key: str) -> bytes | None:
        """The value, or None.

        Raises:
            StoreAway: Redis did not answer.
        """

        async def read(redis: Redis) -> bytes | str | None:
            return await redis.get(_PREFIX + key)

        try:
            value = await self._remote.call(read)
        except RedisUnavailable as error:
            raise StoreUnavailable from error
        return value if isinstance(value, bytes) else None

    async def put(self, key: str, value: bytes) -> None:
        """Keep a value, unless Redis is away."""
        try:
            await self._remote.call(lambda redis: redis.set(_PREFIX + key, value, ex=self._ttl_s))
        except RedisUnavailable:
            log.debug("an answer was not stored: Redis is away")


@dataclass(eq=False, slots=True)
class CacheLookup:
    """One request's side of `ResponseCache.answer`.

    Attributes:
        request_context: of the request, which the engine's figures are booked on while it `pays`.
        request_id: the engine's name for a generation that this request starts.
        priority: vLLM's, the smaller the sooner. Nobody waits for a generation that is less urgent than itself.
        fresh: don't read what is stored or running (`Use.FRESH`).
        outcome: what became of it; set before the first piece is given.
        pays: whether the engine's figures go to this request. False for a hit, true for who started the generation,
            and for the one who stayed when that one left.
    """

    request_context: RequestContext | None = None
    request_id: str = ""
    priority: int = 0
    fresh: bool = False
    outcome: CacheOutcome | None = None
    pays: bool = False


class _Flight(Generic[P]):
    """An answer that is being generated, and its readers."""

    def __init__(self, codec: Codec[P], payer: CacheLookup) -> None:
        self._codec = codec
        self.payer = payer
        self.priority = payer.priority
        self.request_id = payer.request_id
        self.readers: dict[CacheLookup, None] = {}
        self.history: list[P | bytes] = []
        self.outcome = CacheOutcome.MISS
        self.error: Exception | None = None
        self.trace: TracebackType | None = None
        self.done = False
        self.context: Context = copy_context()
        self.task: asyncio.Task[None] | None = None
        self.news = asyncio.Event()

    def add(self, piece: P) -> None:
        """Give a piece to all readers. Pieces that most of them have read by now are made small."""
        history = self.history
        history.append(piece)
        old = len(history) - 1 - _AGE
        if old >= 0 and not isinstance(aged := history[old], bytes):
            history[old] = self._codec.pack(aged) or aged
        self._wake()

    def finish(self) -> None:
        """There will be no more pieces."""
        self.done = True
        self._wake()

    def piece(self, at: int) -> P:
        """The piece at a position."""
        item = self.history[at]
        return self._codec.unpack(b"[%b]" % item)[0] if isinstance(item, bytes) else item

    def value(self) -> bytes | None:
        """The whole answer as bytes, or None if it is not complete or must not be stored."""
        if not self.history or isinstance(last := self.history[-1], bytes) or not self._codec.ends(last):
            return None
        packed = []
        for item in self.history:
            one = item if isinstance(item, bytes) else self._codec.pack(item)
            if one is None:
                return None
            packed.append(one)
        return b"[%b]" % b",".join(packed)

    def _wake(self) -> None:
        news, self.news = self.news, asyncio.Event()
        news.set()


class ResponseCache(Generic[P]):
    """Gives an answer from the store, from a generation that is running, or from a new one.

    Args:
        store: where answers are kept.
        codec: makes bytes of pieces.
        scope: `tenant`: answers are kept apart by tenant; `shared`: all tenants share them.
        max_entry_bytes: answers over this size are not stored.
        hand_over: called with the context of a request that left its running generation, that of the one which takes
            its place, and the engine's name for the generation, of which what is open is to be moved.
    """

    def __init__(
        self,
        store: AnswerStore,
        codec: Codec[P],
        scope: Literal["tenant", "shared"],
        max_entry_bytes: int = MAX_ENTRY_BYTES,
        hand_over: Callable[[RequestContext, RequestContext, str], None] = lambda left, stays, request_id: None,
    ) -> None:
        self._store = store
        self._codec = codec
        self._scope = scope
        self._max_entry_bytes = max_entry_bytes
        self._hand_over = hand_over
        self._flights: dict[str, _Flight[P]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    def key(self, request: bytes, *, model: str, adapter: str | None, tenant: str) -> str:
        """Under which an answer is kept: SHA-256, hexadecimal. Neither prompt nor tenant can be read from it.

        Args:
            request: prompt and sampling parameters in canonical form.
            model: what tells one set of weights from another: name and revision.
            adapter: the same of the adapter, or None. Its name alone is not enough where its files can change.
            tenant: who asks; ignored when answers are shared.
        """
        whose = tenant if self._scope == "tenant" else None
        return hashlib.sha256(orjson.dumps([_FORMAT, whose, model, adapter]) + request).hexdigest()

    async def answer(self, key: str, start: Callable[[], AsyncGenerator[P]], asking: CacheLookup) -> AsyncGenerator[P]:
        """Give the pieces of an answer; to be closed when no more of them are wanted.

        A generation that fails before its first piece fails for the one who started it. The others try once more,
        together, in case the reason was that one's own.

        Args:
            key: from `key`.
            start: starts the generation. It is called at most once, in a task of its own, which has a copy of the
                caller's context. It must not refuse for reasons that concern one caller: others may wait for it.
            asking: filled in while pieces are given.

        Raises:
            Unavailable: the server stops.
            Exception: what the generation raised.
        """
        if not self._store.remote and not asking.fresh:
            stored = self._unpacked(key, await self._store.get(key))
            if stored:
                asking.outcome = CacheOutcome.HIT
                for at, piece in enumerate(stored, 1):
                    yield piece
                    if not at % _BREATH:
                        await asyncio.sleep(0)
                return
        for last_try in (False, True):
            flight = self._flights.get(key)
            starts = flight is None or flight.priority > asking.priority or (asking.fresh and not last_try)
            if flight is None or starts:
                flight = self._launch(key, start, asking)
            flight.readers[asking] = None
            at = 0
            try:
                while True:
                    while at < len(flight.history):
                        if not at:
                            asking.outcome = self._outcome(flight, starts)
                        at += 1
                        yield flight.piece(at - 1)
                        if not at % _BREATH:
                            await asyncio.sleep(0)
                    if flight.done:
                        break
                    await flight.news.wait()
            finally:
                self._leave(key, flight, asking)
            if flight.error is None:
                return
            if starts or at or last_try or self._closed:
                # Every reader raises the same object: without this its traceback would grow with each of them.
                raise flight.error.with_traceback(flight.trace)

    async def close(self, timeout_s: float = 1.0) -> None:
        """Wait for answers that are being written, and end what still runs. Nothing may be asked for afterwards."""
        self._closed = True
        if not self._tasks:
            return
        _, running = await asyncio.wait(self._tasks, timeout=timeout_s)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    def _outcome(self, flight: _Flight[P], starts: bool) -> CacheOutcome:
        if starts or flight.outcome is CacheOutcome.HIT:
            return flight.outcome
        return CacheOutcome.JOINED

    def _launch(self, key: str, start: Callable[[], AsyncGenerator[P]], asking: CacheLookup) -> _Flight[P]:
        flight = _Flight(self._codec, asking)
        asking.pays = True
        self._flights[key] = flight
        task = asyncio.create_task(self._fly(key, flight, start, asking.fresh), context=flight.context)
        flight.task = task
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return flight

    async def _fly(self, key: str, flight: _Flight[P], start: Callable[[], AsyncGenerator[P]], fresh: bool) -> None:
        try:
            if not fresh and await self._found(key, flight):
                return
            async with aclosing(start()) as pieces:
                async for piece in pieces:
                    flight.add(piece)
            flight.finish()
            # Who comes while this is written still finds the flight.
            value = flight.value()
            if value is not None and len(value) <= self._max_entry_bytes:
                await self._store.put(key, value)
        except asyncio.CancelledError:
            flight.error = Unavailable("The server stopped before the answer was complete.")
            raise
        except Exception as error:
            if flight.done:
                log.exception("an answer was not stored")
            else:
                flight.error, flight.trace = error, error.__traceback__
        finally:
            flight.finish()
            self._forget(key, flight)

    async def _found(self, key: str, flight: _Flight[P]) -> bool:
        """Look into a remote store, once for all readers."""
        if not self._store.remote:
            return False
        try:
            stored = self._unpacked(key, await self._store.get(key))
        except StoreUnavailable:
            flight.outcome = CacheOutcome.BYPASS
            return False
        if not stored:
            return False
        flight.outcome = CacheOutcome.HIT
        flight.payer.pays = False
        flight.history.extend(stored)
        return True

    def _unpacked(self, key: str, value: bytes | None) -> list[P] | None:
        if value is None:
            return None
        try:
            return self._codec.unpack(value)
        except ValueError:
            log.warning("a stored answer can't be read and is generated anew: %s", key)
            return None

    def _leave(self, key: str, flight: _Flight[P], asking: CacheLookup) -> None:
        """A reader has everything, or its client is gone."""
        del flight.readers[asking]
        if flight.done:
            return
        if not flight.readers:
            assert flight.task is not None
            flight.task.cancel()
            self._forget(key, flight)
            return
        if asking is not flight.payer:
            return
        heir = flight.payer = next(iter(flight.readers))
        heir.pays, asking.pays = True, False
        # The task is waiting somewhere, so its context is free to be entered.
        flight.context.run(current.set, heir.request_context)
        if asking.request_context is not None and heir.request_context is not None:
            self._hand_over(asking.request_context, heir.request_context, flight.request_id)

    def _forget(self, key: str, flight: _Flight[P]) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]
