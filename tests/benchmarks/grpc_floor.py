"""What Python's gRPC server costs for a streamed message with nothing behind it: the floor of our gRPC stream.

    python -m tests.benchmarks.grpc_floor

64 streams get a ready-made message every 14 ms for four seconds; the client counts frames, in a process of its own.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import uvloop

from tests.benchmarks.load import H2Call

_SERVICE, _METHOD = "floor.Floor", "Stream"
_STREAMS, _STEPS, _STEP_S = 64, 300, 0.014
_MESSAGE = bytes(120)


def client(port: int) -> None:
    """Open all streams and take what comes, until killed."""

    async def one() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        call = H2Call(reader, writer, f"/{_SERVICE}/{_METHOD}", {})
        call.send(b"go")
        while True:
            await call.receive()

    async def every() -> None:
        await asyncio.gather(*(one() for _ in range(_STREAMS)))

    uvloop.run(every())


async def measure() -> float:
    """Microseconds of this process's CPU time for one message."""
    queues: list[asyncio.Queue[bytes]] = []

    async def stream(requests: Any, context: Any) -> AsyncIterator[bytes]:
        queue: asyncio.Queue[bytes] = asyncio.Queue()
        queues.append(queue)
        while True:
            yield await queue.get()

    server = grpc.aio.server()
    handlers = {_METHOD: grpc.stream_stream_rpc_method_handler(stream)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    asking = multiprocessing.get_context("spawn").Process(target=client, args=(port,), daemon=True)
    asking.start()
    try:
        async with asyncio.timeout(60):
            while len(queues) < _STREAMS:
                await asyncio.sleep(0.05)
        began = time.process_time()
        for _ in range(_STEPS):
            for queue in queues:
                queue.put_nowait(_MESSAGE)
            await asyncio.sleep(_STEP_S)
        return 1e6 * (time.process_time() - began) / (_STEPS * _STREAMS)
    finally:
        asking.kill()
        await server.stop(None)


if __name__ == "__main__":
    print(f"{uvloop.run(measure()):.1f} us of CPU for a message")
