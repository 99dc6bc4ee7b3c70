"""Time to first token of live streams, alone and while a batch is answered beside them. Loopback only, bounded in time.

    python -m tests.benchmarks.batch

Starts the demo model with `--batch-dir`, and asks with a few live clients; in turns without a batch and with one, so
that whatever else the machine does weighs on both. Prints medians, 99th percentiles and their ratios.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time

import httpx

from tests.benchmarks.flood import SHORT
from tests.support import DEMO, Server

LINES = 20_000
BODY = {"model": "demo", "prompt": "1, 2, 3", "max_tokens": 128, "ignore_eos": True, "temperature": 1.0}


async def first_token_s(client: httpx.AsyncClient) -> float:
    """Seconds from a request to its first token."""
    started = time.perf_counter()
    found = 0.0
    async with client.stream("POST", "/v1/completions", json=SHORT) as answer:
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            if not found and line.startswith("data: {") and json.loads(line[6:])["choices"][0]["text"]:
                found = time.perf_counter() - started
    return found


async def live(http: httpx.AsyncClient, clients: int, seconds: float) -> list[float]:
    """Seconds to the first token of all requests of some clients, each asking after a short pause."""
    found: list[float] = []
    until = time.monotonic() + seconds

    async def ask() -> None:
        while time.monotonic() < until:
            found.append(await first_token_s(http))
            await asyncio.sleep(0.05)

    await asyncio.gather(*(ask() for _ in range(clients)))
    return found


async def begin(http: httpx.AsyncClient) -> str:
    """A batch that is worked on."""
    line = {"method": "POST", "url": "/v1/completions", "body": BODY}
    content = "".join(json.dumps({"custom_id": str(n), **line}) + "\n" for n in range(LINES))
    file = (await http.post("/v1/files", files={"file": ("in.jsonl", content)}, data={"purpose": "batch"})).json()
    wanted = {"input_file_id": file["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
    made = (await http.post("/v1/batches", json=wanted)).json()
    while (await http.get(f"/v1/batches/{made['id']}")).json()["request_counts"]["completed"] < 1:
        await asyncio.sleep(0.1)
    return str(made["id"])


async def end(http: httpx.AsyncClient, batch_id: str) -> int:
    """Cancel a batch; how many of its lines were answered."""
    await http.post(f"/v1/batches/{batch_id}/cancel")
    while (found := (await http.get(f"/v1/batches/{batch_id}")).json())["status"] != "cancelled":
        await asyncio.sleep(0.1)
    return int(found["request_counts"]["completed"])


async def measure(url: str, clients: int, rounds: int, seconds: float) -> tuple[list[float], list[float], int]:
    """Seconds to the first token alone and beside a batch, and the lines of batches that were answered."""
    alone: list[float] = []
    beside: list[float] = []
    lines = 0
    async with httpx.AsyncClient(base_url=url, timeout=120) as http:
        await live(http, clients, 3)
        for _ in range(rounds):
            alone += await live(http, clients, seconds)
            batch_id = await begin(http)
            # Let the runner see that there are others before it counts, as where live traffic is steady.
            await live(http, clients, 1)
            beside += await live(http, clients, seconds)
            lines += await end(http, batch_id)
    return alone, beside, lines


def main() -> None:
    """Run it once and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--clients", type=int, default=2, help="live clients")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each kind")
    parser.add_argument("--seconds", type=float, default=10.0, help="of a turn")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = Server([*DEMO, "--max-model-len", "1024", "--batch-dir", folder])
        try:
            server.wait_ready()
            alone, beside, lines = asyncio.run(measure(server.url, args.clients, args.rounds, args.seconds))
        finally:
            server.stop()
    for name, share in (("median", 50), ("99th percentile", 99)):
        first, second = (statistics.quantiles(each, n=100)[share - 1] * 1e3 for each in (alone, beside))
        print(
            f"time to first token, {name}: {first:.1f} ms alone, {second:.1f} ms beside a batch, "
            f"ratio {second / first:.2f}"
        )
    print(
        f"{len(alone)} requests alone, {len(beside)} beside a batch, of which {lines} lines were answered; "
        f"{args.clients} live clients"
    )


if __name__ == "__main__":
    main()
