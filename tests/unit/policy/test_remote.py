"""The client of Redis: quick to fail, and back by itself."""

from __future__ import annotations

import asyncio
import time

import pytest

from kserve_vllm.core.errors import ConfigError
from kserve_vllm.policy.redis_connection import RedisConnection, RedisUnavailable
from tests.support_redis import RedisServer

# Where a server that is there must not be taken for lost, however busy the machine is.
PATIENT_S = 10.0


async def ping(remote: RedisConnection) -> float:
    """Seconds until `RedisUnavailable`; fails if the call is answered."""
    started = time.monotonic()
    with pytest.raises(RedisUnavailable):
        await remote.call(lambda redis: redis.get("x"))
    return time.monotonic() - started


async def until_there(remote: RedisConnection, limit_s: float = 5.0) -> None:
    async with asyncio.timeout(limit_s):
        while not remote.there:
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("crash", [True, False], ids=["killed", "stopped orderly"])
def test_a_server_that_is_stopped_and_started_is_found_again(redis_server: RedisServer, crash: bool) -> None:
    states: list[bool] = []

    async def main() -> None:
        remote = RedisConnection(redis_server.url, states.append, PATIENT_S)
        await remote.call(lambda redis: redis.set("x", "1"))
        redis_server.stop(crash)
        assert await ping(remote) < 0.5
        assert await ping(remote) < 0.02  # nothing is sent
        assert states == [False]
        redis_server.start()
        await until_there(remote)  # no request is needed for it
        assert states == [False, True]
        assert await remote.call(lambda redis: redis.get("x")) is None
        await remote.close()

    asyncio.run(main())


def test_a_server_that_was_started_again_between_two_calls_was_never_away(redis_server: RedisServer) -> None:
    states: list[bool] = []

    async def main() -> None:
        remote = RedisConnection(redis_server.url, states.append, PATIENT_S)
        await asyncio.gather(*[remote.call(lambda redis: redis.get("x")) for _ in range(20)])
        redis_server.stop()
        redis_server.start()
        await asyncio.sleep(0.1)  # until this process has heard that its connections are closed
        await asyncio.gather(*[remote.call(lambda redis: redis.get("x")) for _ in range(20)])
        await remote.close()

    asyncio.run(main())
    assert states == []


def test_a_server_that_hangs_is_given_up_within_half_a_second_by_every_caller(redis_server: RedisServer) -> None:
    async def main() -> None:
        remote = RedisConnection(redis_server.url)
        await remote.call(lambda redis: redis.set("x", "1"))
        redis_server.freeze()
        started = time.monotonic()
        took = await asyncio.gather(*[ping(remote) for _ in range(200)])
        assert max(took) < 0.5
        assert time.monotonic() - started < 0.5
        assert not remote.there
        redis_server.thaw()
        await until_there(remote)
        assert await remote.call(lambda redis: redis.get("x")) == b"1"
        await remote.close()

    asyncio.run(main())


def test_a_server_that_is_away_at_the_start_is_found_when_it_comes() -> None:
    server = RedisServer()

    async def main() -> None:
        remote = RedisConnection(server.url, timeout_s=PATIENT_S)
        assert await ping(remote) < 0.5
        server.start()
        await until_there(remote)
        await remote.call(lambda redis: redis.set("x", "1"))
        await remote.close()

    try:
        asyncio.run(main())
    finally:
        server.stop()


def test_a_busy_event_loop_is_not_taken_for_a_lost_server(redis_server: RedisServer) -> None:
    async def main() -> None:
        remote = RedisConnection(redis_server.url)
        # The first call: it has to connect, which takes several answers.
        asking = asyncio.create_task(remote.call(lambda redis: redis.echo("x")))
        await asyncio.sleep(0)
        time.sleep(0.6)  # noqa: ASYNC251
        assert await asking == b"x"
        assert remote.there
        await remote.close()

    asyncio.run(main())


def test_a_server_that_takes_no_writes_is_away_until_it_does(redis_server: RedisServer) -> None:
    async def main() -> None:
        remote = RedisConnection(redis_server.url, timeout_s=PATIENT_S)
        redis_server.command("REPLICAOF", "127.0.0.1", "1")
        with pytest.raises(RedisUnavailable, match="read only"):
            await remote.call(lambda redis: redis.set("x", "1"))
        await asyncio.sleep(0.5)
        assert not remote.there
        redis_server.command("REPLICAOF", "NO", "ONE")
        await until_there(remote)
        await remote.call(lambda redis: redis.set("x", "1"))
        await remote.close()

    asyncio.run(main())


def test_many_calls_at_once_wait_for_their_turn(redis_server: RedisServer) -> None:
    async def main() -> None:
        remote = RedisConnection(redis_server.url, timeout_s=PATIENT_S)
        answers = await asyncio.gather(*[remote.call(lambda redis: redis.incr("n")) for _ in range(1000)])
        assert sorted(answers) == list(range(1, 1001))
        await remote.close()

    asyncio.run(main())


def test_valkey_urls_are_understood(redis_server: RedisServer) -> None:
    async def main() -> None:
        remote = RedisConnection(redis_server.url.replace("redis://", "valkey://"), timeout_s=PATIENT_S)
        assert await remote.call(lambda redis: redis.echo("x")) == b"x"
        await remote.close()

    asyncio.run(main())


def test_a_url_that_is_none_is_refused_without_its_password() -> None:
    for url in ("http://:secret@somewhere", "redis://user:secret/pass@host:6379", "redis://user:secret#@host"):
        with pytest.raises(ConfigError, match="--redis-url") as refused:
            RedisConnection(url)
        assert "secret" not in str(refused.value)
