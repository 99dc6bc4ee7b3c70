"""What keys, limits and moderation cost a request: microseconds of processor time, the least of several runs.

python -m tests.benchmarks.policies
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import uvloop

from kserve_vllm.policy.moderation.hooks import Moderation
from kserve_vllm.policy.quotas.counters import MemoryCounters, RedisCounters
from kserve_vllm.policy.quotas.limiter import Quota, RateLimiter
from kserve_vllm.policy.redis_connection import RedisConnection
from kserve_vllm.policy.tenants import Tenants, digest
from tests.support_redis import RedisServer

RUNS, TIMES = 7, 500
QUOTAS = [Quota("service", 10**9, 10**12), Quota("tenant:a", 10**9, 10**12, 10**6), Quota("key:a", 10**9, 10**12)]
PATTERNS = [f"(?i)\\bsecret[- ]?{i}\\b" for i in range(20)]
TEXT = ("All the things that a patient reader may find in here are plain words and nothing else at all. " * 22)[:2000]


async def least_us(what: str, work: Callable[[], Awaitable[object]]) -> None:
    """Print the least mean of several runs, since other programs may be running."""
    best = float("inf")
    for _ in range(RUNS):
        begin = time.process_time()
        for _ in range(TIMES):
            await work()
        best = min(best, (time.process_time() - begin) / TIMES * 1e6)
    print(f"{best:8.1f} us  {what}", flush=True)


async def keys(folder: Path) -> None:
    """Finding out whose key it is."""
    for count in (10, 100_000):
        path = folder / f"{count}.json"
        entries = [{"id": f"k{i}", "tenant": f"t{i % 100}", "sha256": digest(f"kv-{i}")} for i in range(count)]
        path.write_text(json.dumps({"keys": entries}))
        tenants = Tenants(str(path))

        async def identify(tenants: Tenants = tenants) -> object:
            return tenants.identify("kv-7")

        await least_us(f"key, one of {count:,}", identify)


async def limits(store: MemoryCounters | RedisCounters, where: str) -> None:
    """Taking, reserving and settling for key, tenant and service."""
    held = RateLimiter(store)

    async def one() -> None:
        grant = await held.enter(QUOTAS)
        await held.reserve(grant, 200)
        grant.headers()
        held.settle(grant, 100)

    await least_us(f"limits of key, tenant and service, {where}", one)
    await held.close()


async def moderation(folder: Path) -> None:
    """Twenty patterns over a prompt, and over an answer that is streamed."""
    path = folder / "hooks.yaml"
    hook = {"name": "h", "action": "redact", "patterns": [{"regex": p, "replacement": "x"} for p in PATTERNS]}
    path.write_text(json.dumps({"hooks": [hook]}))
    looking = Moderation(path)
    await least_us("moderation, 20 patterns, prompt of 2,000 characters", lambda: looking.prompt([TEXT], "a"))
    growing = looking.answer("a")
    assert growing is not None
    await least_us("moderation, 20 patterns, a streamed piece of 5 characters", lambda: growing.feed("word "))
    await looking.close()


async def main() -> None:
    """Print one line per figure."""
    with tempfile.TemporaryDirectory() as name, RedisServer() as redis:
        folder = Path(name)
        await keys(folder)
        await limits(MemoryCounters(), "in memory")
        remote = RedisConnection(redis.url)
        await limits(RedisCounters(remote), "in Redis")
        await remote.close()
        await moderation(folder)


if __name__ == "__main__":
    uvloop.run(main())
