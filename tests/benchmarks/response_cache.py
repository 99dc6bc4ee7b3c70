"""What the response cache costs a request. Run it with `python -m tests.benchmarks.response_cache`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable

from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from kserve_vllm.engine.hooks.cache_codec import CacheCodec, Record, canonical, records, replay
from kserve_vllm.policy.redis_connection import RedisConnection
from kserve_vllm.policy.response_cache import CacheLookup, MemoryStore, RedisStore, ResponseCache
from tests.support_redis import RedisServer

PROMPT = list(range(20_000, 21_000))
ANSWER_TOKENS = 200


async def generation(tokens: int) -> AsyncGenerator[RequestOutput, None]:
    """An answer that costs nothing to make."""
    for at in range(tokens):
        end = at == tokens - 1
        part = CompletionOutput(0, " word", [1000 + at], None, None, finish_reason="length" if end else None)
        yield RequestOutput("r", None, PROMPT, None, [part], end, num_cached_tokens=0, num_cache_creation_tokens=0)


async def least_us(work: Callable[[], Awaitable[object]], times: int) -> float:
    """Microseconds of one run: the least mean of many short batches, since other programs may be running."""
    best = float("inf")
    for _ in range(times):
        started = time.perf_counter()
        for _ in range(5):
            await work()
        best = min(best, (time.perf_counter() - started) / 5 * 1e6)
        await asyncio.sleep(0.002)
    return best


async def measure(redis_url: str) -> None:
    """Print one line per figure."""
    params = SamplingParams(temperature=0.0, max_tokens=ANSWER_TOKENS)
    prompt = {"type": "token", "prompt_token_ids": PROMPT}
    remote = RedisConnection(redis_url)
    memory = ResponseCache[Record](MemoryStore(1 << 24, 600), CacheCodec(), "tenant")
    redis = ResponseCache[Record](RedisStore(remote, 600), CacheCodec(), "tenant")

    def key() -> str:
        request = canonical(prompt, params)
        assert request is not None
        return memory.key(request, model="m@1", adapter=None, tenant="t")

    async def make_key() -> None:
        key()

    async def ask(cache: ResponseCache[Record], kind: RequestOutputKind, fresh: bool = False, tokens: int = 0) -> None:
        tokens = tokens or ANSWER_TOKENS
        source = cache.answer(f"{same}{tokens}", lambda: records(generation(tokens)), CacheLookup(fresh=fresh))
        async for _ in replay(source, kind, "r", PROMPT):
            pass

    async def plain() -> None:
        async for _ in generation(ANSWER_TOKENS):
            pass

    same = key()
    print(f"key of {len(PROMPT)} prompt tokens: {await least_us(make_key, 500):.0f} us")
    for name, cache in (("memory", memory), ("redis", redis)):
        for tokens in (1, ANSWER_TOKENS):
            await ask(cache, RequestOutputKind.DELTA, tokens=tokens)
            await asyncio.sleep(0.1)
            for kind in (RequestOutputKind.FINAL_ONLY, RequestOutputKind.DELTA):
                cost = await least_us(lambda c=cache, k=kind, t=tokens: ask(c, k, tokens=t), 100)  # type: ignore[misc]
                print(f"hit in {name}, {tokens} pieces, {kind.name}: {cost:.0f} us")
    bare = await least_us(plain, 50)
    for kind in (RequestOutputKind.FINAL_ONLY, RequestOutputKind.DELTA):
        cost = await least_us(lambda k=kind: ask(memory, k, fresh=True), 50)  # type: ignore[misc]
        print(f"miss, {ANSWER_TOKENS} pieces, {kind.name}: {(cost - bare) / ANSWER_TOKENS:.1f} us per piece")
    await memory.close()
    await redis.close()
    await remote.close()


if __name__ == "__main__":
    with RedisServer() as server:
        asyncio.run(measure(server.url))
