"""The response cache: its stores, one generation for all who ask together, and Redis gone in the middle."""

from __future__ import annotations

import asyncio
import gc
import tracemalloc
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from typing import Any

import orjson
import pytest

from kserve_vllm.core.errors import Unavailable
from kserve_vllm.core.request_context import RequestContext, current
from kserve_vllm.policy.redis_connection import RedisConnection
from kserve_vllm.policy.response_cache import (
    CacheLookup,
    CacheOutcome,
    MemoryStore,
    RedisStore,
    ResponseCache,
    Use,
    allowed_use,
)
from tests.support_redis import RedisServer

PIECES = ["one ", "two ", "three."]


class Texts:
    """Pieces that are strings; one with a full stop ends an answer, one with `!` must not be stored."""

    def pack(self, piece: str) -> bytes | None:
        return None if "!" in piece else orjson.dumps(piece)

    def unpack(self, value: bytes) -> list[str]:
        found = orjson.loads(value)
        if not isinstance(found, list):
            raise ValueError("not a list")
        return found

    def ends(self, piece: str) -> bool:
        return "." in piece


class Engine:
    """Gives pieces when told to; counts what is asked of it."""

    def __init__(self, pieces: list[str] = PIECES, error: Exception | None = None, fail_at: int = 0) -> None:
        self.pieces, self.error, self.fail_at = pieces, error, fail_at
        self.calls = self.ended = self.aborted = 0
        self.contexts: list[RequestContext | None] = []
        self.go = asyncio.Semaphore(0)
        self.free_running = True

    def hold(self) -> Engine:
        """Give a piece only for each `step`."""
        self.free_running = False
        return self

    async def step(self) -> None:
        """Give the next piece and let everybody read it."""
        self.go.release()
        await settle()

    async def generate(self) -> AsyncGenerator[str, None]:
        self.calls += 1
        self.contexts.append(current.get())
        try:
            for at, piece in enumerate(self.pieces):
                if not self.free_running:
                    await self.go.acquire()
                else:
                    await asyncio.sleep(0)
                if self.error is not None and at == self.fail_at:
                    raise self.error
                yield piece
            self.ended += 1
        except (asyncio.CancelledError, GeneratorExit):
            self.aborted += 1
            raise


class Clock:
    """Seconds that a test sets."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


async def settle() -> None:
    """Let everything that can run do so."""
    for _ in range(20):
        await asyncio.sleep(0)


def context(name: str) -> RequestContext:
    return RequestContext(name, "openai", "/v1/completions")


def memory_cache(max_bytes: int = 1 << 20, **more: Any) -> ResponseCache[str]:
    return ResponseCache(MemoryStore(max_bytes, 60), Texts(), "tenant", **more)


async def read(
    cache: ResponseCache[str], engine: Engine, asking: CacheLookup | None = None, key: str = "k"
) -> list[str]:
    asking = asking or CacheLookup()
    return [piece async for piece in cache.answer(key, engine.generate, asking)]


def reader(
    cache: ResponseCache[str], engine: Engine, asking: CacheLookup, got: list[str] | None = None
) -> asyncio.Task[list[str]]:
    """A client in a task of its own, with its request context in the context."""

    async def run() -> list[str]:
        current.set(asking.request_context)
        mine = got if got is not None else []
        async for piece in cache.answer("k", engine.generate, asking):
            mine.append(piece)
        return mine

    return asyncio.create_task(run())


def run(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """A test that is a coroutine; it must leave no task behind."""

    def test_in_loop(*args: Any, **kwargs: Any) -> None:
        async def whole() -> None:
            await test(*args, **kwargs)
            await settle()
            assert asyncio.all_tasks() == {asyncio.current_task()}

        asyncio.run(whole())

    test_in_loop.__name__ = test.__name__
    test_in_loop.__wrapped__ = test  # type: ignore[attr-defined]
    return test_in_loop


# The store in memory


@run
async def test_the_memory_store_never_costs_more_than_its_bound() -> None:
    store = MemoryStore(10_000, 60)
    for number in range(200):
        await store.put(f"key{number}", b"x" * (37 * number % 3000))
        assert store.size_bytes <= 10_000
    assert len(store) > 2
    await store.put("too big", b"x" * 10_000)
    assert await store.get("too big") is None
    assert len(store) > 2


@pytest.mark.slow
@pytest.mark.parametrize("values", [20_000, 22_000], ids=["before the dict grows", "after"])
def test_what_an_entry_is_said_to_cost_is_no_less_than_what_it_costs(values: int) -> None:
    @run
    async def scene() -> None:
        store = MemoryStore(1 << 30, 60)
        gc.collect()
        tracemalloc.start()
        for number in range(values):
            await store.put(f"{number:064x}", bytes(200))
        grown = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert 0.85 * store.size_bytes < grown <= store.size_bytes

    scene()


@run
async def test_the_entry_not_asked_for_the_longest_goes_first() -> None:
    store = MemoryStore(3 * (1 + 100 + MemoryStore.OVERHEAD_BYTES), 60)
    for key in "abc":
        await store.put(key, bytes(100))
    await store.get("a")
    await store.put("d", bytes(100))
    assert [key for key in "abcd" if await store.get(key) is not None] == ["a", "c", "d"]


@run
async def test_an_entry_is_gone_when_its_time_is_over() -> None:
    clock = Clock()
    store = MemoryStore(10_000, 60, clock)
    await store.put("a", b"1")
    clock.now += 59
    await store.put("b", b"2")
    assert await store.get("a") == b"1"
    clock.now += 1
    assert await store.get("a") is None
    assert await store.get("b") == b"2"
    assert len(store) == 1


@run
async def test_writing_a_key_again_counts_once_and_renews_its_time() -> None:
    clock = Clock()
    store = MemoryStore(10_000, 60, clock)
    await store.put("a", bytes(100))
    size = store.size_bytes
    clock.now += 50
    await store.put("a", bytes(100))
    assert store.size_bytes == size
    clock.now += 50
    assert await store.get("a") is not None


# Keys


def test_tenants_share_answers_only_when_told_to() -> None:
    apart = ResponseCache(MemoryStore(0, 1), Texts(), "tenant")
    shared = ResponseCache(MemoryStore(0, 1), Texts(), "shared")
    key = {"model": "m@1", "adapter": None}
    assert apart.key(b"r", tenant="a", **key) != apart.key(b"r", tenant="b", **key)
    assert shared.key(b"r", tenant="a", **key) == shared.key(b"r", tenant="b", **key)


@pytest.mark.parametrize(
    "other", [{"model": "m@2"}, {"adapter": "x"}, {"adapter": ""}, {"model": 'm@1",null]'}], ids=str
)
def test_model_revision_and_adapter_are_part_of_the_key(other: dict[str, Any]) -> None:
    cache = memory_cache()
    same: dict[str, Any] = {"model": "m@1", "adapter": None, "tenant": "a"}
    assert cache.key(b"r", **same) == cache.key(b"r", **same)
    assert cache.key(b"r", **same) != cache.key(b"r", **{**same, **other})
    assert cache.key(b"r", **same) != cache.key(b"s", **same)


@pytest.mark.parametrize(
    ("header", "use"),
    [
        (None, Use.NORMAL),
        ("", Use.NORMAL),
        ("max-age=60", Use.NORMAL),
        ("x-no-store", Use.NORMAL),
        ("no-cache", Use.FRESH),
        ("No-Cache, max-age=60", Use.FRESH),
        ("max-age=0", Use.FRESH),
        ("no-store", Use.NONE),
        ("no-cache,no-store", Use.NONE),
    ],
)
def test_cache_control_is_understood(header: str | None, use: Use) -> None:
    assert allowed_use(header) is use


# Hits and misses


@run
async def test_the_second_request_is_answered_from_the_store_piece_by_piece() -> None:
    cache, engine = memory_cache(), Engine()
    first, second = CacheLookup(), CacheLookup()
    assert await read(cache, engine, first) == PIECES
    assert await read(cache, engine, second) == PIECES
    assert engine.calls == 1
    assert (first.outcome, first.pays) == (CacheOutcome.MISS, True)
    assert (second.outcome, second.pays) == (CacheOutcome.HIT, False)


@run
async def test_another_key_is_another_answer() -> None:
    cache, engine = memory_cache(), Engine()
    await read(cache, engine, key="a")
    await read(cache, engine, key="b")
    assert engine.calls == 2


@pytest.mark.parametrize(
    "pieces", [["one ", "aborted!."], ["not ended "], ["long " * 300, "."], []], ids=["bad", "cut", "long", "none"]
)
def test_an_answer_that_is_not_whole_or_not_fit_is_given_but_not_stored(pieces: list[str]) -> None:
    @run
    async def scene() -> None:
        cache, engine = memory_cache(max_entry_bytes=1000), Engine(pieces)
        assert await read(cache, engine) == pieces
        assert await read(cache, engine) == pieces
        assert engine.calls == 2

    scene()


@run
async def test_a_fresh_answer_is_generated_and_replaces_the_stored_one() -> None:
    cache = memory_cache()
    await read(cache, Engine(["old."]))
    asking = CacheLookup(fresh=True)
    assert await read(cache, Engine(["new."]), asking) == ["new."]
    assert asking.outcome is CacheOutcome.MISS
    assert await read(cache, Engine(["newer."])) == ["new."]


@run
async def test_a_stored_answer_that_cannot_be_read_is_generated_anew() -> None:
    store = MemoryStore(10_000, 60)
    cache = ResponseCache(store, Texts(), "tenant")
    for broken in (b"{", b"{}"):
        await store.put("k", broken)
        asking = CacheLookup()
        assert await read(cache, Engine(), asking) == PIECES
        assert asking.outcome is CacheOutcome.MISS
        assert await store.get("k") == orjson.dumps(PIECES)


@run
async def test_a_long_replay_lets_others_run() -> None:
    cache = memory_cache()
    await read(cache, Engine(["."] * 100))
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(other())
    await read(cache, Engine())
    task.cancel()
    assert turns >= 6
    await asyncio.gather(task, return_exceptions=True)


# One generation for all who ask together


@run
async def test_a_thousand_who_ask_together_cost_one_generation() -> None:
    cache, engine = memory_cache(), Engine(["word "] * 200 + ["."])
    askings = [CacheLookup() for _ in range(1000)]
    answers = await asyncio.gather(*(read(cache, engine, asking) for asking in askings))
    assert engine.calls == 1
    assert all(answer == engine.pieces for answer in answers)
    assert [asking.outcome for asking in askings] == [CacheOutcome.MISS] + [CacheOutcome.JOINED] * 999
    assert {asking.outcome.header for asking in askings if asking.outcome} == {"miss", "hit"}
    assert sum(asking.pays for asking in askings) == 1


@run
async def test_who_joins_gets_every_piece_when_the_first_one_gets_it() -> None:
    cache, engine = memory_cache(), Engine().hold()
    first: list[str] = []
    second: list[str] = []
    tasks = [reader(cache, engine, CacheLookup(), first), reader(cache, engine, CacheLookup(), second)]
    for count in (1, 2, 3):
        await engine.step()
        assert first == second == PIECES[:count]
    await asyncio.gather(*tasks)


@pytest.mark.parametrize("already", [1, 63, 64, 65, 150])
def test_who_joins_late_gets_all_that_was_before(already: int) -> None:
    @run
    async def scene() -> None:
        engine = Engine([f"{number} " for number in range(160)] + ["."]).hold()
        cache = memory_cache()
        first = reader(cache, engine, CacheLookup())
        for _ in range(already):
            await engine.step()
        got: list[str] = []
        asking = CacheLookup()
        late = reader(cache, engine, asking, got)
        await settle()
        assert got == engine.pieces[:already]
        for _ in range(161 - already):
            await engine.step()
        assert await first == await late == engine.pieces
        assert asking.outcome is CacheOutcome.JOINED
        assert engine.calls == 1
        assert await read(cache, engine) == engine.pieces

    scene()


@run
async def test_pieces_that_cannot_be_stored_reach_a_late_reader_too() -> None:
    engine = Engine(["bad! "] * 150 + ["."]).hold()
    cache = memory_cache()
    first = reader(cache, engine, CacheLookup())
    for _ in range(120):
        await engine.step()
    late = reader(cache, engine, CacheLookup())
    for _ in range(31):
        await engine.step()
    assert await first == await late == engine.pieces


@pytest.mark.parametrize("before", [0, 1, 2])
def test_nobody_who_joined_notices_that_the_first_client_left(before: int) -> None:
    @run
    async def scene() -> None:
        moved: list[tuple[str, str, str]] = []
        cache = memory_cache(
            hand_over=lambda left, stays, name: moved.append((left.request_id, stays.request_id, name))
        )
        engine = Engine().hold()
        asked = [CacheLookup(context(name), f"{name}-0") for name in "abc"]
        tasks = [reader(cache, engine, asking) for asking in asked]
        await settle()
        for _ in range(before):
            await engine.step()
        tasks[0].cancel()
        await settle()
        assert tasks[0].cancelled()
        for _ in range(3 - before):
            await engine.step()
        assert await tasks[1] == await tasks[2] == PIECES
        assert (engine.calls, engine.aborted) == (1, 0)
        assert [asking.pays for asking in asked] == [False, True, False]
        assert moved == [("a", "b", "a-0")]
        assert await read(cache, engine) == PIECES
        assert engine.calls == 1

    scene()


@run
async def test_what_is_booked_by_context_after_the_first_left_goes_to_who_stayed() -> None:
    seen: list[str] = []

    async def generate() -> AsyncGenerator[str, None]:
        for piece in PIECES:
            await step.acquire()
            now = current.get()
            assert now is not None
            seen.append(now.request_id)
            yield piece

    step = asyncio.Semaphore(0)
    engine = Engine()
    engine.generate = generate  # type: ignore[method-assign]
    cache = memory_cache()
    tasks = [reader(cache, engine, CacheLookup(context(name))) for name in "abc"]
    for left in (0, 1, None):
        await settle()
        step.release()
        await settle()
        if left is not None:
            tasks[left].cancel()
    assert await tasks[2] == PIECES
    assert seen == ["a", "b", "c"]


@run
async def test_the_generation_is_aborted_when_the_last_client_has_left() -> None:
    cache, engine = memory_cache(), Engine().hold()
    tasks = [reader(cache, engine, CacheLookup()) for _ in range(3)]
    await engine.step()
    for count, task in enumerate(tasks, 1):
        task.cancel()
        await settle()
        assert engine.aborted == (count == 3)
    again = reader(cache, engine, CacheLookup())
    for _ in range(3):
        await engine.step()
    assert await again == PIECES
    assert engine.calls == 2


@run
async def test_who_comes_in_the_moment_in_which_the_last_client_leaves_is_answered() -> None:
    cache, engine = memory_cache(), Engine().hold()
    pieces = cache.answer("k", engine.generate, CacheLookup())
    engine.go.release()
    assert await anext(pieces) == PIECES[0]
    await pieces.aclose()
    # In the same step of the event loop: the first generation has not been told yet that it is given up.
    for _ in PIECES:
        engine.go.release()
    assert await read(cache, engine) == PIECES
    assert (engine.calls, engine.aborted) == (2, 1)


@run
async def test_who_wants_a_fresh_answer_does_not_join_one_that_is_running() -> None:
    cache, old, new = memory_cache(), Engine(["old."]).hold(), Engine(["new."])
    first = reader(cache, old, CacheLookup())
    await settle()
    assert await reader(cache, new, CacheLookup(fresh=True)) == ["new."]
    await old.step()
    assert await first == ["old."]


@run
async def test_a_client_that_leaves_before_anything_ran_leaves_nothing_behind() -> None:
    cache, engine = memory_cache(), Engine()
    pieces = cache.answer("k", engine.generate, CacheLookup())
    await pieces.aclose()
    task = reader(cache, engine, CacheLookup())
    await asyncio.sleep(0)
    task.cancel()
    await settle()
    assert await read(cache, engine) == PIECES


@run
async def test_a_client_that_reads_slowly_holds_nobody_up() -> None:
    engine = Engine([f"{number} " for number in range(200)] + ["."])
    cache = memory_cache()
    slow = cache.answer("k", engine.generate, CacheLookup())
    got = [await anext(slow)]
    assert await read(cache, engine) == engine.pieces
    got += [piece async for piece in slow]
    assert got == engine.pieces
    assert engine.calls == 1


@run
async def test_when_a_generation_fails_in_the_middle_all_are_told_and_the_next_one_is_new() -> None:
    cache, engine = memory_cache(), Engine(error=RuntimeError("broken"), fail_at=1)
    results = await asyncio.gather(*(read(cache, engine) for _ in range(50)), return_exceptions=True)
    assert [str(result) for result in results] == ["broken"] * 50
    assert engine.calls == 1
    assert await read(cache, Engine()) == PIECES


@run
async def test_when_a_generation_fails_before_its_first_piece_the_others_try_once_more_together() -> None:
    cache, failing, working = memory_cache(), Engine(error=RuntimeError("mine alone")), Engine()
    asked = [CacheLookup() for _ in range(50)]
    first = reader(cache, failing, asked[0])
    others = [reader(cache, working, asking) for asking in asked[1:]]
    with pytest.raises(RuntimeError, match="mine alone"):
        await first
    assert await asyncio.gather(*others) == [PIECES] * 49
    assert (failing.calls, working.calls) == (1, 1)
    assert [asking.outcome for asking in asked[1:]] == [CacheOutcome.MISS] + [CacheOutcome.JOINED] * 48


@run
async def test_what_fails_for_everybody_is_tried_twice_and_no_more() -> None:
    cache, engine = memory_cache(), Engine(error=RuntimeError("broken"))
    results = await asyncio.gather(*(read(cache, engine) for _ in range(50)), return_exceptions=True)
    assert [str(result) for result in results] == ["broken"] * 50
    assert engine.calls == 2


@run
async def test_the_traceback_of_a_shared_error_does_not_grow() -> None:
    cache, engine = memory_cache(), Engine(error=RuntimeError("broken"), fail_at=1)
    results = await asyncio.gather(*(read(cache, engine) for _ in range(200)), return_exceptions=True)
    depth, trace = 0, results[0].__traceback__  # type: ignore[union-attr]
    names = set()
    while trace is not None:
        depth += 1
        names.add(trace.tb_frame.f_code.co_name)
        trace = trace.tb_next
    assert depth < 12
    assert "generate" in names


@run
async def test_the_more_urgent_does_not_wait_for_the_less_urgent() -> None:
    cache, slow, quick = memory_cache(), Engine().hold(), Engine()
    batch = reader(cache, slow, CacheLookup(priority=10))
    await settle()
    urgent = CacheLookup(priority=0)
    assert await reader(cache, quick, urgent) == PIECES
    assert urgent.outcome is CacheOutcome.MISS
    for _ in range(3):
        await slow.step()
    assert await batch == PIECES
    cache = memory_cache()
    urgent_task = reader(cache, slow, CacheLookup(priority=0))
    joined = CacheLookup(priority=10)
    batch = reader(cache, quick, joined)
    for _ in range(3):
        await slow.step()
    assert await batch == await urgent_task == PIECES
    assert joined.outcome is CacheOutcome.JOINED


@pytest.mark.parametrize("pieces", [0, 1])
def test_a_stop_ends_what_runs_and_says_so(pieces: int) -> None:
    asyncio.run(_stop(pieces))


async def _stop(pieces: int) -> None:
    cache, engine = memory_cache(), Engine().hold()
    tasks = [reader(cache, engine, CacheLookup()) for _ in range(3)]
    await settle()
    for _ in range(pieces):
        await engine.step()
    await cache.close(0.01)
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(result, Unavailable)
    assert (engine.calls, engine.aborted) == (1, 1)


# Redis


@pytest.fixture
def redis_server() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


def redis_cache(remote: RedisConnection, **more: Any) -> ResponseCache[str]:
    return ResponseCache(RedisStore(remote, 60), Texts(), "tenant", **more)


def test_answers_in_redis_are_shared_by_replicas_and_end(redis_server: RedisServer) -> None:
    @run
    async def scene() -> None:
        remotes = [RedisConnection(redis_server.url), RedisConnection(redis_server.url)]
        one, two = (redis_cache(remote) for remote in remotes)
        first, second = CacheLookup(), CacheLookup()
        engine = Engine()
        assert await read(one, engine, first) == PIECES
        await one.close()
        assert await read(two, engine, second) == PIECES
        assert (first.outcome, second.outcome, second.pays) == (CacheOutcome.MISS, CacheOutcome.HIT, False)
        keys = await remotes[0].call(lambda redis: redis.keys("*cache*"))
        assert keys == [b"{kserve-vllm}:cache:k"]
        lives = await remotes[0].call(lambda redis: redis.ttl(keys[0]))
        assert 50 < lives <= 60
        for remote in remotes:
            await remote.close()

    scene()


def test_a_thousand_who_ask_together_ask_redis_once(redis_server: RedisServer) -> None:
    @run
    async def scene() -> None:
        remote = RedisConnection(redis_server.url)
        cache, engine = redis_cache(remote), Engine()
        for calls in (1, 1):
            before = (await remote.call(lambda redis: redis.info("commandstats"))).get("cmdstat_get", {"calls": 0})
            askings = [CacheLookup() for _ in range(1000)]
            answers = await asyncio.gather(*(read(cache, engine, asking) for asking in askings))
            assert answers == [PIECES] * 1000
            after = (await remote.call(lambda redis: redis.info("commandstats")))["cmdstat_get"]
            assert after["calls"] == before["calls"] + 1
            assert engine.calls == calls
            await asyncio.sleep(0.1)
        assert {asking.outcome for asking in askings} == {CacheOutcome.HIT}
        assert not any(asking.pays for asking in askings)
        await cache.close()
        await remote.close()

    scene()


def test_without_redis_answers_are_generated_and_when_it_is_back_they_are_stored(redis_server: RedisServer) -> None:
    @run
    async def scene() -> None:
        states: list[bool] = []
        remote = RedisConnection(redis_server.url, states.append)
        cache, engine = redis_cache(remote), Engine()
        await read(cache, engine)
        hit = CacheLookup()
        await asyncio.sleep(0.1)
        await read(cache, engine, hit)
        assert (hit.outcome, engine.calls) == (CacheOutcome.HIT, 1)

        redis_server.stop()
        loop = asyncio.get_running_loop()
        for calls in (2, 3):
            started = loop.time()
            askings = [CacheLookup() for _ in range(20)]
            assert await asyncio.gather(*(read(cache, engine, asking) for asking in askings)) == [PIECES] * 20
            assert [a.outcome for a in askings] == [CacheOutcome.BYPASS] + [CacheOutcome.JOINED] * 19
            assert engine.calls == calls
            assert loop.time() - started < 1

        redis_server.start()
        for _ in range(100):
            if states[-1:] == [True]:
                break
            await asyncio.sleep(0.05)
        asking = CacheLookup()
        assert await read(cache, engine, asking) == PIECES
        assert asking.outcome is CacheOutcome.MISS  # the server was killed and has forgotten
        await asyncio.sleep(0.1)
        await read(cache, engine, asking)
        assert asking.outcome is CacheOutcome.HIT
        await cache.close()
        await remote.close()

    scene()


def test_who_comes_while_the_answer_is_written_to_redis_gets_it(redis_server: RedisServer) -> None:
    @run
    async def scene() -> None:
        remote = RedisConnection(redis_server.url)
        cache, engine = redis_cache(remote), Engine()
        await read(cache, engine)  # returns with the last piece, before the answer is stored
        late = CacheLookup()
        assert await read(cache, engine, late) == PIECES
        assert engine.calls == 1
        assert late.outcome is CacheOutcome.JOINED
        await cache.close()
        await remote.close()

    scene()
