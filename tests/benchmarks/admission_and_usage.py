"""What the queue and the usage records cost per request: microseconds of CPU time, the median of several runs.

python -m tests.benchmarks.admission_and_usage
"""

from __future__ import annotations

import asyncio
import logging
import math
import statistics
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import uvloop

from kserve_vllm.core.types import Priority
from kserve_vllm.policy.priority_queue import PriorityQueue
from kserve_vllm.policy.usage import Usage, UsageRecord, timestamp
from kserve_vllm.telemetry import logs

RUNS, TIMES = 7, 20_000


async def median_us(what: str, work: Callable[[], Awaitable[float]]) -> float:
    """Print and return the median of what `work` says one request takes, from its seconds."""
    found = statistics.median([await work() * 1e6 for _ in range(RUNS)])
    print(f"{found:8.2f} us  {what}")
    return found


async def one_after_the_other(slots: int) -> float:
    """Nobody waits."""
    queue = PriorityQueue(slots, 1024, {}, 30.0, {})
    begin = time.thread_time()
    for _ in range(TIMES):
        (await queue.acquire(Priority.NORMAL)).release()
    return (time.thread_time() - begin) / TIMES


async def all_at_once(admission: bool) -> float:
    """All but four wait, in five classes; without the queue, the same tasks wait once for the loop."""
    queue = PriorityQueue(4, TIMES, {}, 30.0, {Priority.BATCH: 0.5})

    async def request(priority: Priority) -> None:
        if admission:
            with await queue.acquire(priority):
                await asyncio.sleep(0)
        else:
            await asyncio.sleep(0)

    begin = time.thread_time()
    await asyncio.gather(*[request(Priority(i % 5)) for i in range(TIMES)])
    return (time.thread_time() - begin) / TIMES


async def evictions() -> float:
    """A full queue of batch requests, each evicted by a critical one."""
    queue = PriorityQueue(1, TIMES, {}, math.inf, {})
    first = await queue.acquire(Priority.NORMAL)

    async def request(priority: Priority) -> None:
        (await queue.acquire(priority)).release()

    batch = [asyncio.create_task(request(Priority.BATCH)) for _ in range(TIMES)]
    await asyncio.sleep(0)
    begin = time.thread_time()
    critical = [asyncio.create_task(request(Priority.CRITICAL)) for _ in range(TIMES)]
    results = await asyncio.gather(*batch, return_exceptions=True)
    taken = (time.thread_time() - begin) / TIMES
    assert sum(isinstance(r, Exception) for r in results) == TIMES
    first.release()
    await asyncio.gather(*critical)
    return taken


RECORD = UsageRecord(
    timestamp(time.time()),
    "3f1c9a52-6a5e-4b1e-9a53-5c1b9df0f6e1",
    "team-a",
    "team-a-2026",
    "demo",
    "pirate",
    "openai",
    "/v1/chat/completions",
    "ok",
    200,
    812,
    640,
    128,
    1.523,
    0.112,
    "normal",
    "miss",
)


async def records(sink: str, whole: bool) -> float:
    """CPU seconds per record: of the loop's thread until it is handed over, or of all threads until it is out."""
    usage = Usage(sink)
    begin, cpu = time.thread_time(), time.process_time()
    for i in range(TIMES):
        usage.record(RECORD)
        if not i % 100:
            await asyncio.sleep(0.001)
    handed_over = time.thread_time() - begin
    await usage.close(30)
    assert usage.sent == TIMES
    return (time.process_time() - cpu if whole else handed_over) / TIMES


def receiver() -> ThreadingHTTPServer:
    """A server that takes everything; in this process, so its time is in the CPU time too."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


async def main() -> None:
    print("queue: acquire and release")
    await median_us("off (--max-concurrent 0)", lambda: one_after_the_other(0))
    await median_us("a slot is free", lambda: one_after_the_other(8))
    bare = await median_us("(a task that waits once, without a queue)", lambda: all_at_once(False))
    waits = await median_us("a task that waits in the queue, of 20,000", lambda: all_at_once(True))
    print(f"{waits - bare:8.2f} us  of that the queue")
    await median_us("a batch request evicted by a critical one, tasks and errors included", evictions)
    print("usage: one record")
    server = receiver()
    with tempfile.NamedTemporaryFile() as file:
        for sink in (f"file:{file.name}", f"http://127.0.0.1:{server.server_port}/"):
            name = sink.partition(":")[0]
            await median_us(f"{name}: handed over", lambda sink=sink: records(sink, False))  # type: ignore[misc]
            await median_us(f"{name}: of all threads", lambda sink=sink: records(sink, True))  # type: ignore[misc]
    logs.configure("json")
    handler = logging.getLogger().handlers[0]
    assert isinstance(handler, logging.StreamHandler)
    with open("/dev/null", "w") as nowhere:  # noqa: ASYNC230
        handler.setStream(nowhere)
        await median_us("log: written to /dev/null", lambda: records("log", True))
    logs.forget()
    server.shutdown()


if __name__ == "__main__":
    uvloop.run(main())
