"""Plays requests: so many at once, or so many a second, bounded by number and by time."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from kserve_vllm.ops.bench.clients import LoadAnswer, LoadClient
from kserve_vllm.ops.bench.prompts import Prompts

# Of an open loop; a server that does not answer must not fill the memory of who asks.
MOST_IN_FLIGHT = 4096


@dataclass(frozen=True)
class Point:
    """One load.

    Attributes:
        concurrency: requests that are always in flight (a closed loop), or None.
        rate: requests a second at random times (Poisson arrivals, an open loop), or None; one of the two.
        requests: most that are sent.
        time_s: no more is sent after so long; what is in flight then is waited for.
    """

    concurrency: int | None
    rate: float | None
    requests: int
    time_s: float

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.concurrency} at once" if self.concurrency else f"{self.rate:g}/s"


@dataclass
class Played:
    """What came of a point.

    Attributes:
        point: which.
        answers: in the order in which they were sent.
        duration_s: from the first request to the last answer.
        client_busy: processor time of this process over the time it took: near 1 the client itself is the bottleneck.
        most_in_flight: requests in flight at the most.
    """

    point: Point
    answers: list[LoadAnswer] = field(default_factory=list)
    duration_s: float = 0.0
    client_busy: float = 0.0
    most_in_flight: int = 0


def arrivals(rate: float, number: int, seed: int) -> list[float]:
    """Seconds after the beginning of so many Poisson arrivals, stretched so that their mean rate is exact."""
    dice = random.Random(seed)  # noqa: S311 - a benchmark has to be repeatable
    times = list(itertools.accumulate(dice.expovariate(rate) for _ in range(number)))
    return [at * number / rate / times[-1] for at in times]


async def play(
    client: LoadClient,
    prompts: Prompts,
    point: Point,
    seed: int = 0,
    first: int = 0,
    progress: Callable[[Played], None] = lambda played: None,
) -> Played:
    """Play one point.

    Args:
        client: sends.
        prompts: what is sent.
        point: the load.
        seed: of the times of arrival.
        first: number of the first prompt, so that no point sends the prompts of another.
        progress: called after each answer.
    """
    played = Played(point)
    in_flight = 0
    began, worked = time.perf_counter(), time.process_time()

    async def one(index: int) -> None:
        nonlocal in_flight
        in_flight += 1
        played.most_in_flight = max(played.most_in_flight, in_flight)
        try:
            played.answers.append(await client.send(prompts[first + index]))
        finally:
            in_flight -= 1
        progress(played)

    if point.concurrency is not None:
        numbers = iter(range(point.requests))

        async def worker() -> None:
            for index in numbers:
                if time.perf_counter() - began >= point.time_s:
                    return
                await one(index)

        async with asyncio.TaskGroup() as group:
            for _ in range(min(point.concurrency, point.requests)):
                group.create_task(worker())
    else:
        assert point.rate is not None
        number = max(1, min(point.requests, int(point.rate * point.time_s)))
        async with asyncio.TaskGroup() as group:
            for index, at in enumerate(arrivals(point.rate, number, seed)):
                await asyncio.sleep(max(0.0, began + at - time.perf_counter()))
                if in_flight >= MOST_IN_FLIGHT:
                    now = time.perf_counter()
                    error = f"not sent: {MOST_IN_FLIGHT} others were in flight"
                    played.answers.append(LoadAnswer(began=now, ended=now, error=error))
                    continue
                group.create_task(one(index))
    played.duration_s = time.perf_counter() - began
    played.client_busy = (time.process_time() - worked) / played.duration_s
    played.answers.sort(key=lambda answer: answer.began)
    return played
