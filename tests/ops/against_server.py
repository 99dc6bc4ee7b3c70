"""One simulated replica beside the real server on the demo model, under the same arrivals.

    python -m tests.ops.against_server [SECONDS]

The server's step time is measured first (streams alone and together, short prompts and long ones), then Poisson
arrivals are played against it and against the simulator, and both are printed. It says nothing on a machine that
others use: the steps are measured before and after the run, and where they differ by more than a fifth, so it says.

Exit codes: 0 the first token's p50 and p99 are within 15 %, 1 they are not, 3 the machine was not quiet.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
from dataclasses import dataclass

import httpx

from kserve_vllm.ops import simulate
from kserve_vllm.ops.model.traffic import Arrival, TrafficShape
from tests.support import Server

BAND = 0.15
QUIET = 0.2
"""Share by which a step may be slower or quicker after the run."""
SEQUENCES = 4
OUTPUT = 64


@dataclass(frozen=True)
class Timed:
    """One stream: seconds to its first token, and between tokens."""

    first: float
    gap: float


async def stream(client: httpx.AsyncClient, prompt: int, output: int) -> Timed:
    """Send a prompt of that many tokens and time its stream. Each prompt is another one: nothing is cached."""
    began = time.perf_counter()
    stream.number += 1  # type: ignore[attr-defined]
    ids = [20 + (stream.number * 7919 + 31 * i) % 600 for i in range(prompt)]  # type: ignore[attr-defined]
    body = {"model": "demo", "prompt": ids, "max_tokens": output, "ignore_eos": True, "stream": True, "temperature": 0}
    first = 0.0
    async with client.stream("POST", "/v1/completions", json=body) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {") and not first:
                first = time.perf_counter()
    return Timed(first - began, (time.perf_counter() - first) / (output - 1))


stream.number = 0  # type: ignore[attr-defined]


async def steps(client: httpx.AsyncClient) -> dict[str, float]:
    """Measure the parts of a step, seconds: fixed, per sequence, per token of a prompt, and what lies outside of it."""
    gaps = {}
    for together in (1, SEQUENCES):
        own = [await asyncio.gather(*(stream(client, 32, OUTPUT) for _ in range(together))) for _ in range(6)]
        gaps[together] = statistics.median(timed.gap for batch in own for timed in batch)
    firsts = {n: statistics.median([(await stream(client, n, 2)).first for _ in range(15)]) for n in (32, 480)}
    sequence = max(0.0, (gaps[SEQUENCES] - gaps[1]) / (SEQUENCES - 1))
    token = max(0.0, (firsts[480] - firsts[32]) / (480 - 32))
    fixed = gaps[1] - sequence
    return {
        "fixed": fixed,
        # The simulator counts a running sequence's token with the prompts' tokens.
        "per_sequence": max(0.0, sequence - token),
        "per_prompt_token": token,
        "overhead": max(0.0, firsts[32] - 32 * token - fixed),
    }


async def play(client: httpx.AsyncClient, requests: list[Arrival]) -> list[Timed]:
    """Send them at their times."""
    began = time.perf_counter()

    async def one(request: Arrival) -> Timed:
        await asyncio.sleep(max(0.0, request.at - (time.perf_counter() - began)))
        return await stream(client, request.prompt, request.output)

    return list(await asyncio.gather(*(one(request) for request in requests)))


async def main() -> int:
    """Measure, play, simulate, print."""
    duration = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
    arguments = [
        "--demo",
        "--model-name",
        "demo",
        "--max-num-seqs",
        str(SEQUENCES),
        "--max-model-len",
        "1024",
        "--no-enable-prefix-caching",
    ]
    server = Server(arguments, fresh=True).wait_ready()
    try:
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
            await asyncio.gather(*(stream(client, 32, 16) for _ in range(8)))
            before = await steps(client)
            service = before["per_prompt_token"] * 200 + OUTPUT * (before["fixed"] / SEQUENCES + before["per_sequence"])
            rate = 0.6 / service
            requests = TrafficShape(
                "constant", rate, duration, prompt=200, output=OUTPUT, spread=0.3, seed=3
            ).requests()
            real = await play(client, requests)
            after = await steps(client)
    finally:
        server.stop()
    for name, parts in (("before", before), ("after", after)):
        print(name, json.dumps({key: round(value * 1000, 3) for key, value in parts.items()}), "ms")
    mean = {key: (before[key] + after[key]) / 2 for key in before}
    scenario = simulate.scenario_of(
        {
            "model": {"steps": {key: mean[key] for key in ("fixed", "per_sequence", "per_prompt_token")}},
            "arrivals": {"rate": rate, "duration": duration},
            "scaler": {"class": "fixed", "replicas": 1},
            "replica": {"max_num_seqs": SEQUENCES, "max_num_batched_tokens": 2048, "overhead": mean["overhead"]},
        },
        "one",
    )
    from dataclasses import replace

    report = simulate.run(replace(scenario, requests=requests))
    firsts, gaps = simulate.percentiles([t.first for t in real]), simulate.percentiles([t.gap for t in real])
    print(f"{len(requests)} requests at {rate:.2f}/s")
    for label, own, simulated in (("first token", firsts, report.first_token), ("gap", gaps, report.gap)):
        for p in ("p50", "p90", "p99"):
            print(
                f"{label} {p}: real {own[p] * 1000:.1f} ms, simulated {simulated[p] * 1000:.1f} ms, "
                f"{simulated[p] / own[p] - 1:+.0%}"
            )
    times = [
        step["fixed"] + SEQUENCES * step["per_sequence"] + 200 * step["per_prompt_token"] + step["overhead"]
        for step in (before, after)
    ]
    if abs(times[1] / times[0] - 1) > QUIET:
        print(f"not quiet: a step took {times[0] * 1000:.1f} ms before and {times[1] * 1000:.1f} ms after")
        return 3
    off = max(abs(report.first_token[p] / firsts[p] - 1) for p in ("p50", "p99"))
    print(f"first token within {off:.0%}")
    return int(off > BAND)


if __name__ == "__main__":
    raise SystemExit(asyncio.run(main()))
