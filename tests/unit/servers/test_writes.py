"""How streams are written: chunks past uvicorn's `send`, all frames of a step before the first write, few writes."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import uvicorn

from kserve_vllm.engine.patches.openai_stream import Hub
from kserve_vllm.grpc_server.http2 import Connection, Connections
from kserve_vllm.protocols.http.chunks import chunks_of, one_write

App = Callable[[Any, Any, Any], Awaitable[None]]

START = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}


@asynccontextmanager
async def serving(app: App, http: str = "httptools") -> AsyncIterator[int]:
    """A real uvicorn with this app; its port."""
    config = uvicorn.Config(app, http=http, lifespan="off", log_config=None, interface="asgi3")  # type: ignore[arg-type]
    server = uvicorn.Server(config)
    listener = socket.create_server(("127.0.0.1", 0))
    # Not `serve`, which would take the signals of this process.
    task = asyncio.create_task(server._serve([listener]))
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        await task
        listener.close()


def part(body: bytes, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": body, "more_body": more}


@pytest.mark.parametrize(("http", "past"), [("httptools", True), ("h11", False)])
def test_a_body_arrives_whole_and_the_connection_serves_the_next_request(http: str, past: bool) -> None:
    async def run() -> None:
        found: list[bool] = []

        async def app(_: Any, receive: Any, send: Any) -> None:
            await receive()
            chunks = chunks_of(send)
            found.append(chunks is not None)
            assert chunks is None or not chunks.open  # nothing has begun
            await send(START)
            await send(part(b"first "))
            for number in range(3):
                if chunks is not None:
                    assert chunks.open
                    chunks.made(b"%d " % number)()
                else:
                    await send(part(b"%d " % number))
            await send(part(b"last", more=False))
            assert chunks is None or not chunks.open

        async with serving(app, http) as port, httpx.AsyncClient(trust_env=False) as client:
            for _ in range(2):
                answer = await client.get(f"http://127.0.0.1:{port}/")
                assert answer.text == "first 0 1 2 last"
                assert "connection" not in answer.headers
        assert found == [past, past]

    asyncio.run(run())


def test_a_send_that_something_is_wrapped_around_is_left_alone() -> None:
    async def send(_: Any) -> None:
        raise AssertionError

    class Other:
        async def send(self, _: Any) -> None:
            raise AssertionError

    assert chunks_of(send) is None
    assert chunks_of(Other().send) is None


def test_chunks_close_where_the_client_does_not_read_and_where_it_is_gone() -> None:
    async def run() -> None:
        closed: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        gone: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

        async def app(_: Any, receive: Any, send: Any) -> None:
            await receive()
            chunks = chunks_of(send)
            assert chunks is not None
            await send(START)
            await send(part(b"first"))
            written = 0
            while chunks.open and written < 1 << 30:
                chunks.made(bytes(1 << 16))()
                written += 1 << 16
                await asyncio.sleep(0)
            closed.set_result(written)
            assert (await receive())["type"] == "http.disconnect"
            gone.set_result(chunks.open)

        async with serving(app) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 10)
            writer.write(b"GET / HTTP/1.1\r\nhost: test\r\n\r\n")
            assert await asyncio.wait_for(closed, 20) < 1 << 28
            writer.close()
            assert not await asyncio.wait_for(gone, 20)
            del reader

    asyncio.run(run())


def test_all_frames_of_a_step_are_made_before_the_first_is_written_and_one_fault_stops_no_other() -> None:
    async def run() -> None:
        done: list[str] = []

        class Stream:
            def __init__(self, name: str) -> None:
                self.name = name

            def wake(self) -> Callable[[], None] | None:
                done.append(f"make {self.name}")
                if self.name == "broken":
                    raise RuntimeError
                return self.write if self.name != "silent" else None

            def write(self) -> None:
                done.append(f"write {self.name}")
                if self.name == "unwritten":
                    raise RuntimeError

        hub = Hub()
        names = ["one", "broken", "silent", "unwritten", "two"]
        for name in names:
            hub.add(Stream(name))  # type: ignore[arg-type]
        await asyncio.sleep(0.01)
        assert done == [*(f"make {name}" for name in names), "write one", "write unwritten", "write two"]

    asyncio.run(run())


class Written(asyncio.Transport):
    """Not a real transport: keeps what is written, write by write."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        self.writes.append(bytes(data))

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return 0

    def close(self) -> None:
        pass


def test_what_a_pass_writes_on_a_grpc_connection_is_one_write_and_much_of_it_does_not_wait() -> None:
    async def run() -> None:
        transport = Written()
        connection = Connection(lambda *_: pytest.fail("nobody asks"), Connections())
        connection.connection_made(transport)
        assert transport.writes == []
        assert not connection.flushed
        await asyncio.sleep(0)
        assert len(transport.writes) == 1
        assert connection.flushed

        for piece in (b"a", b"b", b"c"):
            connection.write(piece)
        await asyncio.sleep(0)
        assert transport.writes[1:] == [b"abc"]

        connection.write(bytes(40 << 10))
        connection.write(b"d")
        assert list(map(len, transport.writes[2:])) == [40 << 10]
        connection.write(b"e")
        connection.close()
        assert transport.writes[3:] == [b"de"]
        connection.write(b"f")
        await asyncio.sleep(0)
        assert len(transport.writes) == 4
        connection.connection_lost(None)

    asyncio.run(run())


def test_the_connections_of_a_pass_are_written_in_a_row_and_one_that_fails_stops_no_other() -> None:
    class Broken(Written):
        def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
            raise OSError

    async def run() -> None:
        connections, transports = Connections(), [Written(), Broken(), Written()]
        made = [Connection(lambda *_: pytest.fail("nobody asks"), connections) for _ in transports]
        for connection, transport in zip(made, transports, strict=True):
            connection.connection_made(transport)
        assert connections == set(made)
        await asyncio.sleep(0)
        assert [len(transport.writes) for transport in transports] == [1, 0, 1]
        for connection in made:
            connection.write(b"a")
            connection.write(b"b")
        await asyncio.sleep(0)
        assert [transport.writes[1:] for transport in transports] == [[b"ab"], [], [b"ab"]]
        for connection in made:
            connection.connection_lost(None)
        assert not connections

    asyncio.run(run())


@pytest.mark.parametrize("http", ["httptools", "h11"])
@pytest.mark.parametrize("close", [False, True])
def test_a_head_and_its_body_are_one_write(http: str, close: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    body = b'{"answer": 42}'

    async def run() -> list[bytes]:
        written: list[bytes] = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await receive()
            cycle = send.__self__
            write = cycle.transport.write
            if http == "httptools":
                monkeypatch.setattr(cycle.transport, "write", lambda data: (written.append(data), write(data)))
            with one_write(send):
                headers = [(b"content-length", b"%d" % len(body)), *([(b"connection", b"close")] if close else [])]
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                await send(part(body, more=False))
            if http == "httptools":
                assert "_Held" not in type(cycle.transport).__name__
                monkeypatch.undo()

        async with serving(app, http) as port, httpx.AsyncClient(trust_env=False) as client:
            for _ in range(2):
                answer = await client.get(f"http://127.0.0.1:{port}/")
                assert answer.content == body
        return written

    written = asyncio.run(run())
    if http == "httptools":
        assert len(written) == 2  # one for each request
        assert all(each.startswith(b"HTTP/1.1 200 OK") and each.endswith(body) for each in written)


def test_a_head_whose_body_does_not_come_is_written_all_the_same() -> None:
    async def run() -> bytes:
        async def app(_: Any, receive: Any, send: Any) -> None:
            await receive()
            with one_write(send):
                await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"9")]})

        async with serving(app) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            head = await reader.readuntil(b"\r\n\r\n")
            writer.close()
            return head

    assert asyncio.run(run()).startswith(b"HTTP/1.1 200 OK")


def test_what_is_not_uvicorns_is_sent_as_it_is() -> None:
    async def send(_: Any) -> None:
        return

    with one_write(send):
        pass
