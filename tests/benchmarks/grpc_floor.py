"""What a gRPC server costs for a streamed message with nothing behind it: the grpcio package's, and ours.

    python -m tests.benchmarks.grpc_floor [--repeat 5]

64 streams get a ready-made message every 14 ms for four seconds; the client counts frames, in a process of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import statistics
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import uvloop

from kserve_vllm.grpc_server.calls import Call, Services
from tests.benchmarks.load import H2Connection

_SERVICE, _METHOD = "floor.Floor", "Stream"
_STREAMS, _STEPS, _STEP_S = 64, 300, 0.014
_MESSAGE = bytes(120)


def client(port: int) -> None:
    """Open all streams and take what comes, until killed."""

    async def one() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        connection = H2Connection(reader, writer)
        connection.send(connection.open(f"/{_SERVICE}/{_METHOD}", {}), b"go")
        while True:
            await connection.receive()

    async def every() -> None:
        await asyncio.gather(*(one() for _ in range(_STREAMS)))

    uvloop.run(every())


class _Streams:
    """Where the messages of all open streams are put."""

    def __init__(self) -> None:
        self.put: list[Callable[[bytes], None]] = []

    async def answer(self, requests: Any, context: Any) -> AsyncIterator[bytes]:
        """The handler: what is put, as it comes, for ever."""
        if isinstance(context, Call):
            self.put.append(context.outbox(lambda message: [message]).put_nowait)
            await asyncio.Event().wait()
        queue: asyncio.Queue[bytes] = asyncio.Queue()
        self.put.append(queue.put_nowait)
        while True:
            yield await queue.get()


async def measure(kind: str) -> float:
    """Microseconds of this process's CPU time for one message, behind the server `kind`."""
    streams = _Streams()
    handlers = {_METHOD: grpc.stream_stream_rpc_method_handler(streams.answer, bytes, bytes)}
    generic = grpc.method_handlers_generic_handler(_SERVICE, handlers)
    server: Any
    if kind == "ours":
        server = Services(max_message=1 << 20)
        listener = await asyncio.get_running_loop().create_server(server.connect, "127.0.0.1", 0)
        port = listener.sockets[0].getsockname()[1]
    else:
        server = grpc.aio.server()
        port = server.add_insecure_port("127.0.0.1:0")
    server.add_generic_rpc_handlers((generic,))
    if kind != "ours":
        await server.start()
    asking = multiprocessing.get_context("spawn").Process(target=client, args=(port,), daemon=True)
    asking.start()
    try:
        async with asyncio.timeout(60):
            while len(streams.put) < _STREAMS:
                await asyncio.sleep(0.05)
        began = time.process_time()
        for _ in range(_STEPS):
            for put in streams.put:
                put(_MESSAGE)
            await asyncio.sleep(_STEP_S)
        return 1e6 * (time.process_time() - began) / (_STEPS * _STREAMS)
    finally:
        asking.kill()
        await server.stop(0)


def main() -> None:
    """Measure both, in alternation."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=3, help="alternations (%(default)s), of about 12 seconds each")
    args = parser.parse_args()
    found: dict[str, list[float]] = {"grpcio": [], "ours": []}
    for _ in range(args.repeat):
        for kind, taken in found.items():
            taken.append(uvloop.run(measure(kind)))
            print(f"{kind}: {taken[-1]:.1f} us of CPU for a message", flush=True)
    print(", ".join(f"{kind}: median {statistics.median(taken):.1f} us" for kind, taken in found.items()))


if __name__ == "__main__":
    main()
