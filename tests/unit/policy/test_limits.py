"""Limits hold exactly: under load, over time, over replicas, and while Redis comes and goes."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kserve_vllm.core.errors import RateLimited, Unavailable
from kserve_vllm.policy.quotas.counters import MemoryCounters, RedisCounters
from kserve_vllm.policy.quotas.limiter import Grant, Quota, RateLimiter
from kserve_vllm.policy.redis_connection import RedisConnection
from tests.support import ROOT
from tests.support_redis import RedisServer
from tests.unit.policy.enter_many import passes

S = 1_000_000_000
ACME = "tenant:acme"
# A machine that is busy with other tests makes a Redis slow that is there.
PATIENT_S = 10.0


class Clock:
    """Nanoseconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1_000 * S

    def __call__(self) -> int:
        return self.now


@asynccontextmanager
async def redis_limits(
    url: str, away: Literal["allow", "deny"] = "deny", timeout_s: float = PATIENT_S, **settings: Any
) -> AsyncIterator[tuple[RateLimiter, RedisConnection]]:
    remote = RedisConnection(url, timeout_s=timeout_s)
    limits = RateLimiter(RedisCounters(remote, **settings), away)
    try:
        yield limits, remote
    finally:
        await limits.close()
        await remote.close()


# What a test of both stores needs: limits with a short window.
Body = Callable[[RateLimiter], Awaitable[None]]


@pytest.fixture(params=["memory", pytest.param("redis", marks=pytest.mark.integration)])
def on_store(request: pytest.FixtureRequest) -> Callable[[Body], None]:
    """Run a test body with limits in memory, and with limits in Redis; their window is 2 s."""

    async def in_memory(body: Body) -> None:
        await body(RateLimiter(MemoryCounters(window_s=2.0, buckets=10)))

    async def in_redis(body: Body, url: str) -> None:
        async with redis_limits(url, window_s=2.0, buckets=10) as (limits, _):
            await body(limits)

    def run(body: Body) -> None:
        if request.param == "memory":
            asyncio.run(in_memory(body))
        else:
            asyncio.run(in_redis(body, request.getfixturevalue("redis_server").url))

    return run


async def refusal(awaitable: Awaitable[Any]) -> RateLimited:
    with pytest.raises(RateLimited) as refused:
        await awaitable
    return refused.value


async def enters(limits: RateLimiter, quota: Quota, held: list[Grant] | None = None) -> bool:
    """Whether a request passes now; what it was given is put into `held`."""
    try:
        grant = await limits.enter([quota])
    except RateLimited:
        return False
    if held is not None:
        held.append(grant)
    return True


async def soon(check: Callable[[], Awaitable[bool]], limit_s: float = 5.0) -> None:
    async with asyncio.timeout(limit_s):
        while not await check():
            await asyncio.sleep(0.02)


# No race


@pytest.mark.parametrize("kind", ["requests", "tokens", "concurrent"])
def test_of_200_at_once_exactly_100_pass_in_memory(kind: str) -> None:
    async def main() -> int:
        limits = RateLimiter(MemoryCounters())
        return sum(await asyncio.gather(*[passes(limits, kind, "acme") for _ in range(200)]))

    assert asyncio.run(main()) == 100


@pytest.mark.parametrize("kind", ["requests", "tokens", "concurrent"])
def test_of_100_at_once_from_each_of_two_processes_exactly_100_pass_in_redis(
    redis_server: RedisServer, kind: str
) -> None:
    replicas = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.unit.policy.enter_many", redis_server.url, kind],
            cwd=ROOT,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for _ in range(2)
    ]
    try:
        for replica in replicas:
            assert replica.stdout is not None
            assert replica.stdout.readline() == "ready\n"
        for tenant in range(10):
            for replica in replicas:
                assert replica.stdin is not None
                replica.stdin.write(f"{tenant}\n")
                replica.stdin.flush()
            passed = [int(replica.stdout.readline()) for replica in replicas if replica.stdout is not None]
            assert sum(passed) == 100
            if all(passed):
                break
        else:
            pytest.fail("the two never ran at the same time, so this showed nothing")
    finally:
        for replica in replicas:
            replica.communicate(timeout=30)
    assert [replica.returncode for replica in replicas] == [0, 0]


def test_what_one_subject_refuses_is_taken_of_none(on_store: Callable[[Body], None]) -> None:
    async def body(limits: RateLimiter) -> None:
        service, tenant = Quota("service", 5, 100, 5), Quota(ACME, 2, 20, 2)
        grants = [await limits.enter([service, tenant]) for _ in range(2)]
        for _ in range(10):
            await refusal(limits.enter([service, tenant]))
            assert (await refusal(limits.reserve(grants[0], 21))).reason == "tokens_per_minute"
        for _ in range(3):  # what is left of the service
            await limits.enter([service])
        await limits.reserve(await limits.enter([Quota("service", tokens_per_minute=100)]), 100)

    on_store(body)


# Time


@settings(deadline=None, max_examples=200)
@given(
    limit=st.integers(1, 8),
    steps=st.lists(
        st.tuples(
            st.one_of(st.integers(0, 3 * S), st.sampled_from([5 * S, 55 * S, 60 * S, 60 * S + 1, 65 * S])),
            st.integers(1, 4),
        ),
        max_size=80,
    ),
)
def test_in_any_60_s_no_more_than_the_limit_pass_and_a_refused_one_passes_when_told(
    limit: int, steps: list[tuple[int, int]]
) -> None:
    clock = Clock()
    counters = MemoryCounters(clock=clock)
    limits = RateLimiter(counters)
    passed: list[tuple[int, int]] = []

    async def main() -> None:
        grant = await limits.enter([Quota(ACME, tokens_per_minute=limit)])
        for pause, tokens in steps:
            clock.now += pause
            try:
                await limits.reserve(grant, tokens)
                wait = 0
            except RateLimited as refused:
                wait = refused.retry_after_s
            if wait:
                # Refused only where 65 s saw too much, and given when it was promised.
                assert sum(n for t, n in passed if t > clock.now - 65 * S) + tokens > limit
                assert wait <= 65
                clock.now += wait * S
                await limits.reserve(grant, tokens)
            assert (wait is None) == (tokens > limit)
            if wait is None:
                continue
            passed.append((clock.now, tokens))

    asyncio.run(main())
    for start, _ in passed:
        assert sum(tokens for at, tokens in passed if start <= at <= start + 60 * S) <= limit


def test_the_window_slides_and_the_wait_that_is_named_suffices(on_store: Callable[[Body], None]) -> None:
    async def body(limits: RateLimiter) -> None:
        quota = Quota(ACME, requests_per_minute=3)
        started = time.monotonic()
        for _ in range(3):
            await limits.enter([quota])
        refused = await refusal(limits.enter([quota]))
        assert refused.reason == "requests_per_minute"
        assert refused.retry_after_s is not None
        told = f"Rate limit reached for tenant 'acme': 3 requests per minute. Try again in {refused.retry_after_s} s."
        assert refused.message == told
        assert 2 <= refused.retry_after_s <= 3

        await soon(lambda: enters(limits, quota))
        assert 2.0 <= time.monotonic() - started < 3.0

    on_store(body)


# Settling


def test_tokens_that_were_not_used_are_given_back_and_more_than_reserved_is_owed(
    on_store: Callable[[Body], None],
) -> None:
    async def body(limits: RateLimiter) -> None:
        quotas = [Quota("service", tokens_per_minute=200), Quota(ACME, tokens_per_minute=100)]
        grant = await limits.enter(quotas)
        await limits.reserve(grant, 60)
        await limits.reserve(grant, 40)
        assert ("x-ratelimit-remaining-tokens", "0") in grant.headers()
        other = await limits.enter(quotas)
        await refusal(limits.reserve(other, 1))
        limits.settle(grant, 30)
        limits.settle(grant, 0)  # once only

        async def left(tokens: int) -> bool:
            probe = await limits.enter(quotas)
            return ("x-ratelimit-remaining-tokens", str(tokens)) in probe.headers()

        await soon(lambda: left(70), 1.5)
        await limits.reserve(other, 50)
        limits.settle(other, 90)  # 40 more than reserved, and 20 more than there were
        await asyncio.sleep(0.05)
        assert (await refusal(limits.enter(quotas))).reason == "tokens_per_minute"

    on_store(body)


def test_places_are_free_again_when_their_request_ends(on_store: Callable[[Body], None]) -> None:
    async def body(limits: RateLimiter) -> None:
        quota = Quota(ACME, concurrent=2)
        first, second = await limits.enter([quota]), await limits.enter([quota])
        refused = await refusal(limits.enter([quota]))
        assert (refused.reason, refused.retry_after_s) == ("concurrent", 1)
        assert "2 requests at once" in refused.message
        held: list[Grant] = []

        limits.settle(first, 0)
        limits.settle(first, 0)  # frees no second place
        await soon(lambda: enters(limits, quota, held))
        await asyncio.sleep(0.05)
        assert not await enters(limits, quota)
        for grant in [second, *held]:
            limits.settle(grant, 0)
        await soon(lambda: enters(limits, quota))

    on_store(body)


def test_a_request_that_can_never_pass_is_told_so(on_store: Callable[[Body], None]) -> None:
    async def body(limits: RateLimiter) -> None:
        grant = await limits.enter([Quota("key:k1", tokens_per_minute=100)])
        refused = await refusal(limits.reserve(grant, 101))
        assert refused.retry_after_s is None
        assert "too large for key 'k1'" in refused.message
        assert "101 tokens" in refused.message
        assert (await refusal(limits.enter([Quota(ACME, requests_per_minute=0)]))).retry_after_s is None
        await limits.reserve(grant, 100)

    on_store(body)


def test_headers_are_openais_and_of_the_subject_with_least_left() -> None:
    clock = Clock()
    limits = RateLimiter(MemoryCounters(clock=clock))

    async def main() -> None:
        quotas = [Quota("service", 100, 50), Quota(ACME, 10, 1000), Quota("key:k1")]
        await limits.enter(quotas)
        clock.now += 2 * S
        grant = await limits.enter(quotas)
        await limits.reserve(grant, 20)
        assert grant.headers() == [
            ("x-ratelimit-limit-requests", "10"),
            ("x-ratelimit-remaining-requests", "8"),
            ("x-ratelimit-reset-requests", "1m3s"),
            ("x-ratelimit-limit-tokens", "50"),
            ("x-ratelimit-remaining-tokens", "30"),
            ("x-ratelimit-reset-tokens", "1m3s"),
        ]
        for _ in range(8):
            await limits.enter(quotas)
        assert ("x-ratelimit-remaining-requests", "0") in (await refusal(limits.enter(quotas))).headers
        assert (await limits.enter([])).headers() == []

    asyncio.run(main())


# Memory


@pytest.mark.slow
def test_subjects_that_are_idle_for_longer_than_the_window_are_dropped() -> None:
    clock = Clock()
    counters = MemoryCounters(clock=clock)
    limits = RateLimiter(counters)

    async def main() -> None:
        long = await limits.enter([Quota("tenant:long", concurrent=1)])
        for i in range(100_000):
            await limits.enter([Quota(f"key:{i}", 10, 1000)])
            clock.now += S // 100
        # Those of 65 s, and no more.
        assert 6000 < len(counters) < 6700
        clock.now += 100 * S
        for _ in range(3000):
            await limits.enter([Quota(ACME, 10_000, 1000)])
        assert len(counters) == 2
        assert (await refusal(limits.enter([Quota("tenant:long", concurrent=1)]))).reason == "concurrent"
        limits.settle(long, 0)
        await limits.enter([Quota("tenant:long", concurrent=1)])

    asyncio.run(main())


def test_keys_in_redis_expire(redis_server: RedisServer) -> None:
    async def main() -> None:
        async with redis_limits(redis_server.url, window_s=0.5, buckets=5, lease_s=0.6) as (limits, remote):
            grant = await limits.enter([Quota(ACME, 10, 100, 10)])
            await limits.reserve(grant, 10)
            assert await remote.call(lambda redis: redis.dbsize()) == 3
            limits.settle(grant, 20)

            async def empty() -> bool:
                return await remote.call(lambda redis: redis.dbsize()) == 0

            await soon(empty)

    asyncio.run(main())


# Leases


def test_a_crashed_replica_loses_its_places_and_a_long_request_keeps_its_own(redis_server: RedisServer) -> None:
    quota = Quota(ACME, concurrent=2)

    async def main() -> None:
        async with redis_limits(redis_server.url, lease_s=1.5) as (limits, _):
            long = await limits.enter([quota])
            crash = (
                "import asyncio, os, sys; sys.path.insert(0, 'runtime')\n"
                "from tests.unit.policy.enter_many import *\n"
                "async def main():\n"
                f"    limits = RateLimiter(RedisCounters(RedisConnection('{redis_server.url}'), lease_s=1.5))\n"
                f"    await limits.enter([Quota({ACME!r}, concurrent=2)])\n"
                "    os._exit(3)\n"
                "asyncio.run(main())\n"
            )
            crashed = await asyncio.create_subprocess_exec(sys.executable, "-c", crash, cwd=ROOT)
            assert await crashed.wait() == 3

            await soon(lambda: enters(limits, quota))
            # Many leases later, ours and the one just entered are still held.
            for _ in range(30):
                await asyncio.sleep(0.1)
                assert not await enters(limits, quota)
            limits.settle(long, 0)
            await soon(lambda: enters(limits, quota))

    asyncio.run(main())


def test_places_are_booked_again_in_a_redis_that_lost_its_data(redis_server: RedisServer) -> None:
    quota = Quota(ACME, concurrent=2)

    async def main() -> None:
        async with redis_limits(redis_server.url, "allow", lease_s=3.0) as (limits, remote):
            grants = [await limits.enter([quota])]
            redis_server.stop()
            grants.append(await limits.enter([quota]))  # counted in this process, since Redis is away
            assert not remote.there
            redis_server.start()

            async def held() -> bool:
                if not remote.there:
                    return False
                return await remote.call(lambda redis: redis.zcard("{kserve-vllm}:limits:concurrent:" + ACME)) == 2

            await soon(held)
            assert (await refusal(limits.enter([quota]))).reason == "concurrent"
            for grant in grants:
                limits.settle(grant, 0)

            async def none() -> bool:
                return await remote.call(lambda redis: redis.dbsize()) == 0

            await soon(none, 1.5)  # not by expiry

    asyncio.run(main())


# Redis away


def test_deny_refuses_while_redis_is_away_and_goes_on_when_it_is_back(redis_server: RedisServer) -> None:
    quota = Quota(ACME, requests_per_minute=3, tokens_per_minute=100)

    async def main() -> None:
        remote = RedisConnection(redis_server.url, timeout_s=PATIENT_S)
        limits = RateLimiter(RedisCounters(remote), "deny")
        grant = await limits.enter([quota])
        redis_server.stop()
        for _ in range(5):
            started = time.monotonic()
            with pytest.raises(Unavailable) as refused:
                await limits.enter([quota])
            assert time.monotonic() - started < 0.5
            assert (refused.value.reason, refused.value.retry_after_s) == ("limits_unavailable", 1)
        with pytest.raises(Unavailable):
            await limits.reserve(grant, 10)
        limits.settle(grant, 10)
        assert not remote.there
        redis_server.start()

        async def back() -> bool:
            return remote.there

        await soon(back)
        for _ in range(3):  # its data is gone, and nothing of the time without it was counted
            await limits.enter([quota])
        assert (await refusal(limits.enter([quota]))).reason == "requests_per_minute"
        await limits.close()
        await remote.close()

    asyncio.run(main())


@pytest.mark.parametrize("how", ["killed", "hangs"])
def test_allow_limits_in_this_process_while_redis_is_away_and_together_when_it_is_back(
    redis_server: RedisServer, how: str
) -> None:
    quota = Quota(ACME, requests_per_minute=3, tokens_per_minute=100)

    async def main() -> None:
        timeout_s = 0.25 if how == "hangs" else PATIENT_S
        async with redis_limits(redis_server.url, "allow", timeout_s) as (limits, remote):
            grants = [await limits.enter([quota]) for _ in range(3)]
            await limits.reserve(grants[0], 100)
            await refusal(limits.enter([quota]))
            redis_server.stop() if how == "killed" else redis_server.freeze()
            started = time.monotonic()
            grants += [await limits.enter([quota]) for _ in range(3)]
            assert time.monotonic() - started < 0.5
            assert (await refusal(limits.enter([quota]))).reason == "requests_per_minute"
            assert not remote.there
            await limits.reserve(grants[3], 60)
            await refusal(limits.reserve(grants[4], 41))
            limits.settle(grants[3], 50)
            await limits.reserve(grants[4], 41)
            redis_server.start() if how == "killed" else redis_server.thaw()

            async def back() -> bool:
                return remote.there

            await soon(back)
            if how == "killed":  # the new server starts with nothing
                for _ in range(3):
                    await limits.enter([quota])
            assert (await refusal(limits.enter([quota]))).reason == "requests_per_minute"
            assert remote.there
            for grant in grants:
                limits.settle(grant, 0)

    asyncio.run(main())


def test_closing_waits_until_redis_knows_what_was_settled(redis_server: RedisServer) -> None:
    quota = Quota(ACME, tokens_per_minute=100_000, concurrent=1000)

    async def main() -> None:
        remote = RedisConnection(redis_server.url, timeout_s=PATIENT_S)
        limits = RateLimiter(RedisCounters(remote))
        grants = await asyncio.gather(*[limits.enter([quota]) for _ in range(300)])
        await asyncio.gather(*[limits.reserve(grant, 10) for grant in grants])
        for grant in grants:
            limits.settle(grant, 7)
        await limits.close()
        key = "{kserve-vllm}:limits:tokens:" + ACME
        assert sum(map(int, await remote.call(lambda redis: redis.hvals(key)))) == 2100
        assert await remote.call(lambda redis: redis.dbsize()) == 1
        await remote.close()

    asyncio.run(main())
