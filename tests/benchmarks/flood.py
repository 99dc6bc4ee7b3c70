"""Time to first token of critical requests, alone and under a flood of batch work. Loopback only, bounded in time.

    python -m tests.benchmarks.flood

Starts the demo model with a queue in front of the engine, asks one critical stream at a time, first alone and then
while 32 clients of class batch ask without a pause, and prints medians and their ratio.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time

import httpx

from tests.support import DEMO, Server

CLIENTS = 32
SHORT = {"model": "demo", "prompt": "17 + 25 =", "max_tokens": 16, "temperature": 1.0, "stream": True}
LONG = {"model": "demo", "prompt": "1, 2, 3", "max_tokens": 128, "ignore_eos": True, "temperature": 1.0}


async def first_token_s(client: httpx.AsyncClient, url: str) -> float:
    """Seconds from a critical request to its first token."""
    started = time.perf_counter()
    found = 0.0
    async with client.stream("POST", url + "/v1/completions", json=SHORT, headers={"x-priority": "critical"}) as answer:
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            if not found and line.startswith("data: {") and json.loads(line[6:])["choices"][0]["text"]:
                found = time.perf_counter() - started
    return found


async def flood(client: httpx.AsyncClient, url: str, stop: asyncio.Event, done: list[int]) -> None:
    """One client of class batch, until told to stop."""
    while not stop.is_set():
        answer = await client.post(url + "/v1/completions", json=LONG, headers={"x-priority": "batch"})
        done.append(answer.status_code)


async def measure(url: str, times: int) -> tuple[list[float], list[float], list[int]]:
    """Seconds to the first token alone and under the flood, and the statuses of the flood's requests."""
    limits = httpx.Limits(max_connections=CLIENTS + 4)
    async with httpx.AsyncClient(timeout=120, limits=limits) as others, httpx.AsyncClient(timeout=60) as critical:
        for _ in range(10):
            await first_token_s(critical, url)
        alone = [await first_token_s(critical, url) for _ in range(times)]
        stop, done = asyncio.Event(), list[int]()
        tasks = [asyncio.create_task(flood(others, url, stop, done)) for _ in range(CLIENTS)]
        await asyncio.sleep(3)
        under = []
        for _ in range(times):
            under.append(await first_token_s(critical, url))
            await asyncio.sleep(0.02)
        stop.set()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return alone, under, done


def main() -> None:
    """Run it once and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--times", type=int, default=100, help="critical requests of each kind")
    parser.add_argument("--max-concurrent", type=int, default=8)
    parser.add_argument("--class-share", default="batch=0.13")
    args = parser.parse_args()
    server = Server(
        [
            *DEMO,
            "--max-model-len",
            "1024",
            "--max-concurrent",
            str(args.max_concurrent),
            "--class-share",
            args.class_share,
            "--queue-timeout",
            "120",
        ]
    )
    try:
        server.wait_ready()
        alone, under, done = asyncio.run(measure(server.url, args.times))
    finally:
        server.stop()
    assert set(done) == {200}, set(done)
    first, second = statistics.median(alone) * 1e3, statistics.median(under) * 1e3
    print(
        f"{CLIENTS} clients of class batch, {len(done)} of their requests answered; "
        f"--max-concurrent {args.max_concurrent} --class-share {args.class_share}"
    )
    print(
        f"time to first token of critical requests, median of {args.times}: {first:.1f} ms alone, "
        f"{second:.1f} ms under the flood, ratio {second / first:.2f}"
    )


if __name__ == "__main__":
    main()
