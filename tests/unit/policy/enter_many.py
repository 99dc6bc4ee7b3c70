"""A replica of its own for test_limits: sends 100 requests at once when told to, and says how many passed.

Usage: enter_many.py URL requests|tokens|concurrent    (each line on its standard input names a tenant to send for)
"""

from __future__ import annotations

import asyncio
import sys

from kserve_vllm.core.errors import RateLimited
from kserve_vllm.policy.quotas.counters import RedisCounters
from kserve_vllm.policy.quotas.limiter import Quota, RateLimiter
from kserve_vllm.policy.redis_connection import RedisConnection


def quota(kind: str, tenant: str) -> Quota:
    """Lets 100 requests of 10 tokens pass."""
    return Quota(
        f"tenant:{tenant}",
        requests_per_minute=100 if kind == "requests" else None,
        tokens_per_minute=1000 if kind == "tokens" else None,
        concurrent=100 if kind == "concurrent" else None,
    )


async def passes(limits: RateLimiter, kind: str, tenant: str) -> bool:
    """Send one request of 10 tokens that does not end."""
    try:
        # A second subject with room for all: taken together with the first one, or not at all.
        grant = await limits.enter([Quota("service", 10_000, 100_000, 10_000), quota(kind, tenant)])
        await limits.reserve(grant, 10)
    except RateLimited:
        return False
    return True


async def main(url: str, kind: str) -> None:
    """Count those of 100 that pass, for each tenant that is named."""
    remote = RedisConnection(url, timeout_s=10.0)  # as long as it takes on a busy machine
    limits = RateLimiter(RedisCounters(remote), "deny")
    await remote.call(lambda redis: redis.ping())
    print("ready", flush=True)
    for line in sys.stdin:
        print(sum(await asyncio.gather(*[passes(limits, kind, line.strip()) for _ in range(100)])), flush=True)
    await limits.close()
    await remote.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
