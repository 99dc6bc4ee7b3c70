"""Our gRPC server does what gRPC's own does: the same handlers behind both; a real client, and raw frames."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import logging
import random
import socket
import threading
import time
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    PingAckReceived,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    TrailersReceived,
    WindowUpdated,
)
from h2.settings import SettingCodes, Settings
from hyperframe.frame import GoAwayFrame

from kserve_vllm.config.settings import ServerSettings
from kserve_vllm.core.errors import InvalidRequest
from kserve_vllm.core.lifecycle import Lifecycle, State
from kserve_vllm.grpc_server import http2
from kserve_vllm.grpc_server.calls import Services
from kserve_vllm.policy.enforcement import Enforcement
from kserve_vllm.protocols.oip import grpc_servicer as servicer_module
from kserve_vllm.protocols.oip.grpc_servicer import Servicer
from kserve_vllm.servers.certificates import Certificates
from kserve_vllm.servers.listeners import GRPCServer
from tests.accounting import recorder
from tests.robustness.wire import connect
from tests.support import self_signed

LIMIT = 1 << 20
Code = grpc.StatusCode


class Handlers:
    """Handlers of every kind, which note what becomes of them."""

    def __init__(self) -> None:
        self.cancelled = threading.Event()
        self.began = threading.Event()
        self.taken: list[int] = []

    async def echo(self, request: bytes, context: Any) -> bytes:
        return request

    async def metadata(self, request: bytes, context: Any) -> bytes:
        await context.send_initial_metadata((("first", "1"), ("first-bin", b"\x00\xff")))
        return repr(sorted((k, v) for k, v in context.invocation_metadata() if k.startswith("my-"))).encode()

    async def refuse(self, request: bytes, context: Any) -> bytes:
        await context.abort(Code.RESOURCE_EXHAUSTED, request.decode(), (("why", "rate"), ("why-bin", b"\x01\x02")))
        raise AssertionError

    async def fail(self, request: bytes, context: Any) -> bytes:
        raise RuntimeError("a secret")

    async def wait(self, request: bytes, context: Any) -> bytes:
        self.began.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return b""

    async def give_up(self, request: bytes, context: Any) -> bytes:
        raise asyncio.CancelledError

    async def count(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        number, size = map(int, request.split())
        for i in range(number):
            yield i.to_bytes(4, "big") + bytes(size)
            self.taken.append(i)

    async def watch(self, request: bytes, context: Any) -> None:
        for i in range(3):
            await context.write(b"%d" % i)

    async def add(self, requests: AsyncIterator[bytes], context: Any) -> bytes:
        return b"%d" % sum([int(each) async for each in requests])

    async def both(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        async for each in requests:
            yield each * 2

    async def boxed(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        """Each request asks for so many messages; what can't be sent yet is joined."""
        if not hasattr(context, "outbox"):
            async for each in requests:
                for _ in range(int(each)):
                    yield b"."
            return
        waiting = {"bytes": 0}

        def take(_: Any) -> list[bytes]:
            found, waiting["bytes"] = waiting["bytes"], 0
            return [b"." * found] if found else []

        outbox = context.outbox(take)
        async for each in requests:
            for _ in range(int(each)):
                waiting["bytes"] += 1
                outbox.put_nowait(None)
        await outbox.join()

    async def deaf(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        """Reads nothing."""
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        yield b""

    def generic(self) -> grpc.GenericRpcHandler[Any, Any]:
        kinds: dict[str, Callable[..., Any]] = {
            **dict.fromkeys(
                ("echo", "metadata", "refuse", "fail", "wait", "give_up"), grpc.unary_unary_rpc_method_handler
            ),
            **dict.fromkeys(("count", "watch"), grpc.unary_stream_rpc_method_handler),
            "add": grpc.stream_unary_rpc_method_handler,
            **dict.fromkeys(("both", "boxed", "deaf"), grpc.stream_stream_rpc_method_handler),
        }
        return grpc.method_handlers_generic_handler(
            "test.Test", {name: kind(getattr(self, name), _strict, lambda m: m) for name, kind in kinds.items()}
        )


def _strict(data: bytes) -> bytes:
    if data == b"garbage":
        raise ValueError(data)
    return data


class Running:
    """A server on a loop in a thread of its own."""

    def __init__(self, kind: str) -> None:
        self.handlers = Handlers()
        self.loop = asyncio.new_event_loop()
        self.port = 0
        self.services = Services(max_message=LIMIT)
        self._upstream: Any = None
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self.do(self._start(kind))

    def do(self, work: Any, timeout: float = 30) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout)

    async def _start(self, kind: str) -> None:
        if kind == "grpcio":
            self._upstream = grpc.aio.server(options=[("grpc.max_receive_message_length", LIMIT)])
            self._upstream.add_generic_rpc_handlers((self.handlers.generic(),))
            self.port = self._upstream.add_insecure_port("127.0.0.1:0")
            await self._upstream.start()
        else:
            self.services.add_generic_rpc_handlers((self.handlers.generic(),))
            self.listener = await self.loop.create_server(self.services.connect, "127.0.0.1", 0)
            self.port = self.listener.sockets[0].getsockname()[1]

    async def _stop(self, grace_s: float) -> None:
        if self._upstream is not None:
            await self._upstream.stop(grace_s)
        else:
            self.listener.close()
            await self.services.stop(grace_s)

    def stop(self, grace_s: float = 0.1) -> None:
        self.do(self._stop(grace_s))

    def end(self) -> None:
        self.stop()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        self.loop.close()


@pytest.fixture(params=["ours", "grpcio"])
def running(request: pytest.FixtureRequest) -> Iterator[Running]:
    """One of the two servers."""
    server = Running(request.param)
    yield server
    server.end()


@pytest.fixture
def ours() -> Iterator[Running]:
    """Our server."""
    server = Running("ours")
    yield server
    server.end()


@pytest.fixture
def channel(running: Running) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"127.0.0.1:{running.port}") as channel:
        yield channel


def refused(call: Callable[[], Any]) -> grpc.RpcError:
    """The error that a call ends with."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value


# The same on both


@pytest.mark.parametrize("size", [0, 1, 16_384, 70_000, LIMIT - 10])
def test_a_message_of_any_size_comes_back(channel: grpc.Channel, size: int) -> None:
    message = bytes(i % 251 for i in range(size))
    assert channel.unary_unary("/test.Test/echo")(message, timeout=20) == message


def test_a_message_over_the_limit_is_refused_and_the_connection_goes_on(channel: grpc.Channel) -> None:
    echo = channel.unary_unary("/test.Test/echo")
    assert refused(lambda: echo(bytes(LIMIT + 1), timeout=20)).code() is Code.RESOURCE_EXHAUSTED
    assert echo(b"again", timeout=20) == b"again"


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
def test_a_compressed_message_is_taken(channel: grpc.Channel, compression: grpc.Compression) -> None:
    message = b"again and " * 1000
    assert channel.unary_unary("/test.Test/echo")(message, timeout=20, compression=compression) == message


def test_a_small_message_that_grows_over_the_limit_is_refused(channel: grpc.Channel) -> None:
    echo = channel.unary_unary("/test.Test/echo")
    error = refused(lambda: echo(bytes(LIMIT * 4), timeout=20, compression=grpc.Compression.Gzip))
    assert error.code() is Code.RESOURCE_EXHAUSTED
    assert echo(b"again", timeout=20) == b"again"


def test_metadata_goes_both_ways(channel: grpc.Channel) -> None:
    sent = (("my-text", "a b"), ("my-bytes-bin", b"\x00\x01\xfe"), ("my-text", "twice"))
    answer, call = channel.unary_unary("/test.Test/metadata").with_call(b"", timeout=20, metadata=sent)
    assert answer.decode() == repr(sorted(sent))
    first = dict(call.initial_metadata())
    assert (first["first"], first["first-bin"]) == ("1", b"\x00\xff")


def test_too_much_metadata_is_refused_and_the_connection_goes_on(channel: grpc.Channel) -> None:
    echo = channel.unary_unary("/test.Test/echo")
    assert echo(b"some", timeout=20, metadata=(("my-text", "x" * 7_000),)) == b"some"
    error = refused(lambda: echo(b"", timeout=20, metadata=(("my-text", "x" * 100_000),)))
    assert error.code() is Code.RESOURCE_EXHAUSTED
    assert echo(b"again", timeout=20) == b"again"


@pytest.mark.parametrize("details", ["too many", "50 % of ümläuts\nand lines", ""])
def test_an_error_has_its_code_sentence_and_metadata(channel: grpc.Channel, details: str) -> None:
    error: Any = refused(lambda: channel.unary_unary("/test.Test/refuse")(details.encode(), timeout=20))
    assert (error.code(), error.details()) == (Code.RESOURCE_EXHAUSTED, details)
    trailing = dict(error.trailing_metadata())
    assert (trailing["why"], trailing["why-bin"]) == ("rate", b"\x01\x02")


def test_an_unknown_method_is_unimplemented(channel: grpc.Channel) -> None:
    for path in ("/test.Test/none", "/none.None/echo"):
        assert refused(lambda path=path: channel.unary_unary(path)(b"", timeout=20)).code() is Code.UNIMPLEMENTED


def test_a_deadline_ends_the_handler(channel: grpc.Channel, running: Running) -> None:
    error = refused(lambda: channel.unary_unary("/test.Test/wait")(b"", timeout=0.3))
    assert error.code() is Code.DEADLINE_EXCEEDED
    assert running.handlers.cancelled.wait(5)


def test_a_client_that_cancels_ends_the_handler(channel: grpc.Channel, running: Running) -> None:
    call = channel.unary_unary("/test.Test/wait").future(b"")
    assert running.handlers.began.wait(5)
    call.cancel()
    assert running.handlers.cancelled.wait(5)


def test_a_client_that_vanishes_ends_the_handler(running: Running) -> None:
    channel = grpc.insecure_channel(f"127.0.0.1:{running.port}")
    call = channel.unary_unary("/test.Test/wait").future(b"")
    assert running.handlers.began.wait(5)
    channel.close()
    assert call.done()
    assert running.handlers.cancelled.wait(5)


@pytest.mark.parametrize(("number", "size"), [(0, 0), (1, 0), (300, 10), (20, 200_000)])
def test_a_stream_of_answers_comes_whole_and_in_order(channel: grpc.Channel, number: int, size: int) -> None:
    answers = list(channel.unary_stream("/test.Test/count")(b"%d %d" % (number, size), timeout=30))
    assert [int.from_bytes(each[:4], "big") for each in answers] == list(range(number))
    assert {len(each) for each in answers} <= {4 + size}


def test_a_handler_may_write_instead_of_yielding(channel: grpc.Channel) -> None:
    assert list(channel.unary_stream("/test.Test/watch")(b"", timeout=20)) == [b"0", b"1", b"2"]


def test_a_stream_of_requests_is_read_to_its_end(channel: grpc.Channel) -> None:
    numbers = [b"%d" % i for i in range(100)]
    assert channel.stream_unary("/test.Test/add")(iter(numbers), timeout=20) == b"4950"
    assert channel.stream_unary("/test.Test/add")(iter(()), timeout=20) == b"0"
    assert list(channel.stream_stream("/test.Test/both")(iter(numbers), timeout=20)) == [each * 2 for each in numbers]


def test_requests_larger_than_a_window_are_read(channel: grpc.Channel) -> None:
    messages = [bytes([i]) * (LIMIT - 5) for i in range(12)]
    assert list(channel.stream_stream("/test.Test/both")(iter(messages), timeout=30)) == [m * 2 for m in messages]


def test_a_reader_that_is_slow_holds_up_the_handler(channel: grpc.Channel, running: Running) -> None:
    call = channel.unary_stream("/test.Test/count")(b"200 1000000", timeout=60)
    next(call)
    time.sleep(0.3)
    assert len(running.handlers.taken) < 100
    assert sum(1 for _ in call) == 199


def test_calls_share_a_connection(channel: grpc.Channel) -> None:
    echo = channel.unary_unary("/test.Test/echo")
    futures = [echo.future(b"%d" % i * 1000, timeout=30) for i in range(200)]
    assert [each.result() for each in futures] == [b"%d" % i * 1000 for i in range(200)]


def test_what_is_put_into_an_outbox_arrives(channel: grpc.Channel) -> None:
    answers = list(channel.stream_stream("/test.Test/boxed")(iter([b"10", b"500", b"0"]), timeout=20))
    assert b"".join(answers) == b"." * 510


def test_a_stop_lets_open_calls_end_and_then_ends_them(running: Running) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{running.port}") as channel:
        call = channel.unary_unary("/test.Test/wait").future(b"")
        assert running.handlers.began.wait(5)
        began = time.monotonic()
        running.stop(0.5)
        assert 0.4 < time.monotonic() - began < 5
        assert running.handlers.cancelled.wait(5)
        assert call.exception(5).code() in (Code.UNAVAILABLE, Code.CANCELLED)


# Ours alone


def test_an_exception_is_answered_without_its_words(ours: Running, caplog: pytest.LogCaptureFixture) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{ours.port}") as channel, caplog.at_level(logging.ERROR):
        error: Any = refused(lambda: channel.unary_unary("/test.Test/fail")(b"", timeout=20))
    assert (error.code(), error.details()) == (Code.INTERNAL, "internal server error")
    assert "a gRPC call failed" in caplog.text


def test_a_message_that_can_not_be_decoded_is_told_without_its_words(ours: Running) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{ours.port}") as channel:
        error: Any = refused(lambda: channel.unary_unary("/test.Test/echo")(b"garbage", timeout=20))
    assert (error.code(), error.details()) == (Code.INTERNAL, "the message can't be decoded")


def test_a_handler_that_cancels_itself_ends_its_call(ours: Running) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{ours.port}") as channel:
        assert refused(lambda: channel.unary_unary("/test.Test/give_up")(b"", timeout=20)).code() is Code.CANCELLED


class Raw:
    """A client that sends what it likes."""

    def __init__(self, port: int, window: int | None = None) -> None:
        self.sock = connect(port, 30)
        self.h2 = H2Connection(H2Configuration(client_side=True, header_encoding="utf-8"))
        if window is not None:
            self.h2.local_settings = Settings(client=True, initial_values={SettingCodes.INITIAL_WINDOW_SIZE: window})
        self.h2.initiate_connection()
        self.flush()

    def flush(self) -> None:
        # An empty write fails too where the server has closed.
        if data := self.h2.data_to_send():
            self.sock.sendall(data)

    def ask(self, method: str, message: bytes | None, end: bool = True, **headers: str) -> int:
        """Begin a call; `message` with its prefix, or nothing."""
        stream = self.h2.get_next_available_stream_id()
        named = {
            ":method": "POST",
            ":scheme": "http",
            ":path": f"/test.Test/{method}",
            ":authority": "localhost",
            "te": "trailers",
            "content-type": "application/grpc",
        }
        named |= {name.replace("_", "-") if not name.startswith(":") else name: v for name, v in headers.items()}
        self.h2.send_headers(stream, list(named.items()), end_stream=end and message is None)
        if message is not None:
            self.h2.send_data(stream, message, end_stream=end)
        self.flush()
        return stream

    def go_on_after_goodbye(self) -> None:
        """Read frames after a GOAWAY too, as h2 does not by itself."""
        self.h2._frame_dispatch_table[GoAwayFrame] = http2.read_goaway

    def greet(self) -> None:
        """Read the server's settings, to send as much as they allow."""
        while self.h2.outbound_flow_control_window <= 65_535 or self.h2.remote_settings.initial_window_size <= 65_535:
            self.h2.receive_data(self.sock.recv(65536))
        self.flush()

    def send(self, stream: int, data: bytes, end: bool = False) -> None:
        """Send data of any size, as far as the windows go."""
        for at in range(0, len(data), 16_384):
            self.h2.send_data(stream, data[at : at + 16_384], end_stream=end and at + 16_384 >= len(data))
        self.flush()

    def events(self, until: Callable[[Event], bool], timeout_s: float = 30) -> list[Event]:
        """Everything that comes until `until` holds for something, or the server closes."""
        found: list[Event] = []
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            data = self.sock.recv(65536)
            if not data:
                return found
            new = self.h2.receive_data(data)
            self.flush()
            found += new
            if any(until(event) for event in new):
                return found
        raise TimeoutError(found)

    def status(self, stream: int) -> dict[str, str]:
        """The trailers of a call, or its headers where there was nothing else."""
        events = self.events(lambda e: isinstance(e, StreamEnded) and e.stream_id == stream)
        heads = [e for e in events if isinstance(e, (ResponseReceived, TrailersReceived)) and e.stream_id == stream]
        return {str(name): str(value) for name, value in heads[-1].headers or []}


def until(condition: Callable[[], bool]) -> None:
    """Wait a little for something that must become true."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def framed(message: bytes, flag: int = 0) -> bytes:
    return bytes([flag]) + len(message).to_bytes(4, "big") + message


@pytest.fixture
def raw(ours: Running) -> Iterator[Raw]:
    client = Raw(ours.port)
    yield client
    client.sock.close()


def test_what_is_no_grpc_is_told_so(raw: Raw) -> None:
    assert raw.status(raw.ask("echo", None, content_type="text/plain"))[":status"] == "415"
    assert raw.status(raw.ask("echo", None, **{":method": "GET"}))[":status"] == "405"


def zipped(data: bytes) -> bytes:
    """Always the same bytes, since a test's name has them."""
    return gzip.compress(data, mtime=0)


@pytest.mark.parametrize(
    ("message", "headers", "code"),
    [
        (None, {}, Code.UNIMPLEMENTED),
        (framed(b"cut off")[:-2], {}, Code.INTERNAL),
        (b"\0", {}, Code.INTERNAL),
        (framed(b"x", flag=1), {}, Code.INTERNAL),
        (framed(b"not zipped", flag=1), {"grpc_encoding": "gzip"}, Code.INTERNAL),
        (framed(zipped(bytes(LIMIT + 1)), flag=1), {"grpc_encoding": "gzip"}, Code.RESOURCE_EXHAUSTED),
        (framed(zipped(b"x"), flag=7), {"grpc_encoding": "gzip"}, Code.INTERNAL),
        (framed(zipped(b"whole")[:-9], flag=1), {"grpc_encoding": "gzip"}, Code.INTERNAL),
        (framed(zipped(b"one") + zipped(b"two"), flag=1), {"grpc_encoding": "gzip"}, Code.INTERNAL),
        (framed(b"one") + framed(b"two"), {}, Code.INTERNAL),
        (framed(b"x"), {"grpc_encoding": "snappy"}, Code.UNIMPLEMENTED),
        (framed(b"x"), {"grpc_timeout": "soon"}, Code.INTERNAL),
        (framed(b"x"), {"grpc_timeout": "123456789S"}, Code.INTERNAL),
        (framed(b"x"), {"my-bin": "???"}, Code.INTERNAL),
        (b"\0\xff\xff\xff\xff", {}, Code.RESOURCE_EXHAUSTED),
    ],
)
def test_a_call_that_is_wrong_ends_alone(raw: Raw, message: bytes | None, headers: dict[str, str], code: Code) -> None:
    assert raw.status(raw.ask("echo", message, **headers))["grpc-status"] == str(code.value[0])
    assert raw.status(raw.ask("echo", framed(b"well")))["grpc-status"] == "0"


def test_both_compressions_are_read(raw: Raw) -> None:
    for name, body in (("gzip", gzip.compress(b"hello")), ("deflate", zlib.compress(b"hello"))):
        stream = raw.ask("echo", framed(body, flag=1), grpc_encoding=name)
        events = raw.events(lambda e: isinstance(e, StreamEnded))
        data = b"".join(e.data or b"" for e in events if isinstance(e, DataReceived) and e.stream_id == stream)
        assert data == framed(b"hello")


def test_a_message_in_single_bytes_is_read(raw: Raw) -> None:
    stream = raw.ask("echo", None, end=False)
    for byte in framed(b"slowly"):
        raw.h2.send_data(stream, bytes([byte]), pad_length=3)
        raw.flush()
    raw.h2.end_stream(stream)
    raw.flush()
    assert raw.status(stream)["grpc-status"] == "0"


def test_an_answer_before_the_requests_end_frees_the_stream(raw: Raw) -> None:
    stream = raw.ask("refuse", framed(b"no"), end=False)
    events = raw.events(lambda e: isinstance(e, StreamReset))
    reset = next(e for e in events if isinstance(e, StreamReset))
    assert (reset.stream_id, reset.error_code) == (stream, ErrorCodes.NO_ERROR)
    assert any(isinstance(e, StreamEnded) for e in events)


def test_a_window_of_a_few_bytes_is_kept(ours: Running) -> None:
    client = Raw(ours.port, window=10)
    stream = client.ask("count", framed(b"3 100"))
    got = 0
    while got < 3 * 109:
        events = client.events(lambda e: isinstance(e, DataReceived))
        sizes = [len(e.data or b"") for e in events if isinstance(e, DataReceived)]
        assert sum(sizes) <= 10
        got += sum(sizes)
        if got < 3 * 109:
            client.h2.increment_flow_control_window(sum(sizes), stream)
            client.flush()
    if not any(isinstance(e, StreamEnded) for e in events):
        assert client.status(stream)["grpc-status"] == "0"
    client.sock.close()


def test_what_waits_in_an_outbox_is_joined(ours: Running) -> None:
    client = Raw(ours.port, window=0)
    stream = client.ask("boxed", framed(b"1000") + framed(b"1000"))
    time.sleep(0.5)
    client.h2.increment_flow_control_window(10_000, stream)
    client.flush()
    events = client.events(lambda e: isinstance(e, StreamEnded))
    data = b"".join(e.data or b"" for e in events if isinstance(e, DataReceived))
    assert data == framed(b"." * 2000)
    client.sock.close()


def test_a_deadline_frees_a_call_whose_client_takes_nothing(ours: Running) -> None:
    client = Raw(ours.port, window=0)
    stream = client.ask("echo", framed(b"nobody reads this"), grpc_timeout="300m")
    events = client.events(lambda e: isinstance(e, StreamReset))
    assert next(e for e in events if isinstance(e, StreamReset)).stream_id == stream
    assert not ours.services.open_calls
    client.sock.close()


def test_a_deadline_is_told_to_a_client_that_takes_nothing(ours: Running) -> None:
    client = Raw(ours.port, window=0)
    stream = client.ask("count", framed(b"3 10"), grpc_timeout="300m")
    assert client.status(stream)["grpc-status"] == str(Code.DEADLINE_EXCEEDED.value[0])
    assert not ours.services.open_calls
    client.sock.close()


def test_a_goodbye_lets_open_calls_end(raw: Raw) -> None:
    stream = raw.ask("both", framed(b"1"), end=False)
    raw.sock.sendall(b"\0\0\x08\x07" + bytes(13))
    raw.h2.send_data(stream, framed(b"2"), end_stream=True)
    raw.flush()
    events = raw.events(lambda e: isinstance(e, StreamEnded))
    data = b"".join(e.data or b"" for e in events if isinstance(e, DataReceived))
    assert data == framed(b"11") + framed(b"22")
    assert raw.sock.recv(1) == b""


@pytest.mark.parametrize("method", ["echo", "none", "wait"])
def test_calls_taken_back_before_they_are_read_leave_others_alone(raw: Raw, method: str) -> None:
    """All in one piece: a call, its end, and another call."""
    headers = [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", f"/test.Test/{method}"),
        (":authority", "x"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    ]
    for _ in range(3):
        stream = raw.h2.get_next_available_stream_id()
        raw.h2.send_headers(stream, headers)
        raw.h2.send_data(stream, framed(b"x"))
        raw.h2.reset_stream(stream, ErrorCodes.CANCEL)
    assert raw.status(raw.ask("echo", framed(b"well")))["grpc-status"] == "0"


def test_a_server_that_leaves_says_so_and_ends_what_is_open(ours: Running, raw: Raw) -> None:
    stream = raw.ask("both", framed(b"1"), end=False)
    raw.events(lambda e: isinstance(e, DataReceived))
    stopping = threading.Thread(target=ours.stop, args=(5,))
    stopping.start()
    events = raw.events(lambda e: isinstance(e, ConnectionTerminated))
    assert next(e for e in events if isinstance(e, ConnectionTerminated)).last_stream_id == stream
    end = b"\0\0\x06\0\x01" + stream.to_bytes(4, "big") + framed(b"2")
    raw.sock.sendall(end)
    data = b""
    while chunk := raw.sock.recv(65536):
        data += chunk
    assert framed(b"22") in data
    stopping.join(10)
    assert not stopping.is_alive()


def test_streams_taken_back_without_end_close_the_connection(ours: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http2, "RESETS", 50.0)
    monkeypatch.setattr(http2, "RESETS_PER_S", 1e-3)
    client = Raw(ours.port)
    with pytest.raises((ConnectionError, AssertionError)):  # noqa: PT012
        for _ in range(200):
            client.h2.reset_stream(client.ask("wait", framed(b"x")), ErrorCodes.CANCEL)
            client.flush()
        assert any(
            isinstance(e, ConnectionTerminated) and e.error_code == ErrorCodes.ENHANCE_YOUR_CALM
            for e in client.events(lambda e: isinstance(e, ConnectionTerminated))
        )
        raise ConnectionError("told to be calm")
    client.sock.close()
    with grpc.insecure_channel(f"127.0.0.1:{ours.port}") as channel:
        assert channel.unary_unary("/test.Test/echo")(b"others", timeout=20) == b"others"


@pytest.mark.slow
def test_a_client_that_asks_and_never_reads_is_not_read_any_more(
    ours: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http2, "IDLE_FRAMES", 1e9)
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", ours.port))
        client = H2Connection(H2Configuration(client_side=True))
        client.initiate_connection()
        sock.sendall(client.data_to_send())
        until(lambda: bool(ours.services.connections))
        (connection,) = ours.services.connections
        connection.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        sock.settimeout(0.5)
        pings = (b"\0\0\x08\6" + bytes(5) + bytes(8)) * 10_000
        while connection.writable:
            with contextlib.suppress(TimeoutError):
                sock.send(pings)
        until(lambda: not connection.transport.is_reading())
        assert connection.transport.get_write_buffer_size() < 1 << 20
    with grpc.insecure_channel(f"127.0.0.1:{ours.port}") as channel:
        assert channel.unary_unary("/test.Test/echo")(b"others", timeout=20) == b"others"


@pytest.mark.parametrize(
    "junk",
    [
        b"GET / HTTP/1.1\r\nhost: x\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x40\x01\x00" + bytes(0x4010),
        bytes(100),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0" + b"\0\0\x03\1\4\0\0\0\1\xff\xff\xff",
    ],
)
def test_what_is_no_http2_closes_its_connection_alone(ours: Running, junk: bytes) -> None:
    with socket.create_connection(("127.0.0.1", ours.port), timeout=10) as sock:
        sock.sendall(junk)
        while sock.recv(65536):
            pass
    with grpc.insecure_channel(f"127.0.0.1:{ours.port}") as channel:
        assert channel.unary_unary("/test.Test/echo")(b"others", timeout=20) == b"others"
    until(lambda: not ours.services.connections)
    assert not ours.services.open_calls


# What a client may make the server hold or do


def frame(kind: int, payload: bytes, stream: int = 0) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, 0]) + stream.to_bytes(4, "big") + payload


def inbox(server: Running) -> Any:
    """That of the one call that is open."""
    until(lambda: len(server.services.open_calls) == 1)
    (call,) = server.services.open_calls
    return call.inbox


def others_are_answered(port: int) -> None:
    """A client with a connection of its own has what it asked for."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        assert channel.unary_unary("/test.Test/echo")(b"others", timeout=20) == b"others"


def test_what_is_compressed_is_inflated_when_it_is_read(ours: Running, raw: Raw) -> None:
    bomb = framed(gzip.compress(bytes(LIMIT - 10)), flag=1)
    raw.greet()
    raw.send(raw.ask("deaf", None, end=False, grpc_encoding="gzip"), bomb * 50)
    box = inbox(ours)
    until(lambda: len(box.messages) == 50)
    assert box.unread == 50 * len(bomb)
    assert sum(len(message) for _, message in box.messages) < 50 * len(bomb)


def test_empty_messages_that_nobody_reads_use_up_the_window(ours: Running, raw: Raw) -> None:
    raw.ask("deaf", framed(b"") * 3000, end=False)
    until(lambda: len(inbox(ours).messages) == 3000)
    assert inbox(ours).owed == 3000 * 5
    assert ours.services.budget.held == 3000 * 5


@pytest.mark.parametrize("junk", [b"\0\xff\xff\xff\xff", b"\0\0\x0f\0\0"])
def test_what_comes_after_the_answer_is_not_kept(ours: Running, junk: bytes) -> None:
    client = Raw(ours.port, window=0)
    stream = client.ask("echo", framed(b"answered"), end=False)
    until(lambda: any(call.owes for call in ours.services.open_calls))
    client.h2.send_data(stream, junk)
    client.flush()
    sent = 0
    client.sock.settimeout(20)
    while sent < 5 << 20:
        size = min(client.h2.local_flow_control_window(stream), 16_000)
        if size:
            client.h2.send_data(stream, bytes(size))
            client.flush()
            sent += size
        else:
            client.h2.receive_data(client.sock.recv(65536))
    assert not inbox(ours).partial
    assert not ours.services.budget.held
    client.sock.close()


def test_a_part_of_a_message_is_waited_for_no_longer_than_allowed(ours: Running) -> None:
    ours.services.message_timeout_s = 0.3
    client = Raw(ours.port)
    for method, message in (("echo", None), ("echo", framed(b"cut")[:-1]), ("both", framed(b"cut")[:-1])):
        trailers = client.status(client.ask(method, message, end=False))
        assert trailers["grpc-status"] == str(Code.DEADLINE_EXCEEDED.value[0])
        assert "--body-timeout" in trailers["grpc-message"]
    idle = client.ask("both", framed(b"1"), end=False)
    time.sleep(0.6)
    client.h2.send_data(idle, framed(b"2"), end_stream=True)
    client.flush()
    assert client.status(idle)["grpc-status"] == "0"
    client.sock.close()


def test_a_part_may_take_longer_while_it_is_the_server_that_does_not_read(ours: Running) -> None:
    ours.services.message_timeout_s = 0.3
    client = Raw(ours.port)
    client.ask("deaf", framed(b"whole") + framed(b"cut")[:-1], end=False)
    until(lambda: len(inbox(ours).messages) == 1)
    time.sleep(0.6)
    assert len(ours.services.open_calls) == 1
    client.sock.close()


class Sender:
    """A client with a message that it sends in turns with others, as far as its windows go."""

    def __init__(self, port: int, message: bytes) -> None:
        self.client = Raw(port)
        self.client.greet()
        self.stream = self.client.ask("echo", None, end=False)
        self.rest = framed(message)
        self.answer = ""
        self.client.sock.settimeout(0.01)

    def go_on(self) -> None:
        """Send a little, and read what is there."""
        client = self.client
        size = min(client.h2.local_flow_control_window(self.stream), 16_384, len(self.rest))
        if size:
            chunk, self.rest = self.rest[:size], self.rest[size:]
            client.h2.send_data(self.stream, chunk, end_stream=not self.rest)
            client.flush()
        with contextlib.suppress(TimeoutError):
            for event in client.h2.receive_data(client.sock.recv(65536)):
                if isinstance(event, ResponseReceived | TrailersReceived):
                    self.answer = dict(event.headers or []).get("grpc-status", self.answer)  # type: ignore[call-overload]
                    self.rest = self.rest if not self.answer else b""
                elif isinstance(event, DataReceived):
                    client.h2.acknowledge_received_data(event.flow_controlled_length or 0, self.stream)
            client.flush()


@pytest.mark.slow
def test_parts_of_messages_wait_for_each_other_and_all_of_them_come(ours: Running) -> None:
    ours.services.budget.limit = 2_500_000
    senders = [Sender(ours.port, bytes(700_000)) for _ in range(7)]
    most, waited = 0, False
    end = time.monotonic() + 60
    while not all(each.answer for each in senders):
        assert time.monotonic() < end, [len(each.rest) for each in senders]
        for each in senders:
            each.go_on()
        most = max(most, ours.services.budget.held)
        waited |= len(ours.services.budget.waiting) > 1
    assert [each.answer for each in senders] == ["0"] * 7
    assert waited
    assert most < 2 * 2_500_000
    assert ours.services.budget.held == 0
    assert not ours.services.budget.waiting
    for each in senders:
        each.client.sock.close()


@pytest.mark.slow
def test_parts_of_messages_are_refused_at_twice_the_budget(ours: Running) -> None:
    ours.services.budget.limit, ours.services.budget.least = 300_000, 0
    senders = [Sender(ours.port, bytes(700_000)) for _ in range(7)]
    end = time.monotonic() + 60
    while not all(each.answer for each in senders):
        assert time.monotonic() < end, [len(each.rest) for each in senders]
        for each in senders:
            each.go_on()
        assert ours.services.budget.held < 2 * 300_000 + 700_000
    answers = {each.answer for each in senders}
    assert answers == {"0", str(Code.UNAVAILABLE.value[0])}
    assert ours.services.budget.held == 0
    others_are_answered(ours.port)
    for each in senders:
        each.client.sock.close()


def test_calls_that_are_not_read_hold_up_no_others_on_their_connection(ours: Running, raw: Raw) -> None:
    ours.services.budget.limit = 1 << 30
    raw.greet()
    size = http2.STREAM_WINDOW // 16 - 5
    for number in range(2 * http2.CONNECTION_WINDOW // http2.STREAM_WINDOW):
        stream = raw.ask("deaf", None, end=False)
        for _ in range(16):
            while raw.h2.outbound_flow_control_window < size + 5:
                raw.events(lambda e: isinstance(e, WindowUpdated))
            raw.send(stream, framed(bytes(size)))
        until(lambda many=number: len(ours.services.open_calls) == many + 1)
    while raw.h2.outbound_flow_control_window < 100:
        raw.events(lambda e: isinstance(e, WindowUpdated))
    assert raw.status(raw.ask("echo", framed(b"well")))["grpc-status"] == "0"


def test_a_stream_too_many_is_refused_and_the_connection_goes_on(
    ours: Running, raw: Raw, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http2, "MAX_STREAMS", 3)
    for _ in range(3):
        raw.ask("deaf", framed(b"x"), end=False)
    refused = raw.ask("echo", framed(b"x"))
    events = raw.events(lambda e: isinstance(e, StreamReset))
    reset = next(e for e in events if isinstance(e, StreamReset))
    assert (reset.stream_id, reset.error_code) == (refused, ErrorCodes.REFUSED_STREAM)
    raw.h2.reset_stream(1, ErrorCodes.CANCEL)
    raw.flush()
    assert raw.status(raw.ask("echo", framed(b"well")))["grpc-status"] == "0"


def test_frames_that_concern_all_streams_visit_them_once_a_read(ours: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    visits = reads = 0
    pump, receive = http2.Connection.pump_all, http2.Connection.data_received

    def counted(self: http2.Connection) -> None:
        nonlocal visits
        visits += 1
        pump(self)

    def read(self: http2.Connection, data: bytes) -> None:
        nonlocal reads
        reads += 1
        receive(self, data)

    monkeypatch.setattr(http2.Connection, "pump_all", counted)
    monkeypatch.setattr(http2.Connection, "data_received", read)
    client = Raw(ours.port)
    for _ in range(500):
        client.ask("deaf", None, end=False)
    client.sock.sendall(frame(8, b"\0\0\0\1") * 5000)
    assert client.status(client.ask("echo", framed(b"well")))["grpc-status"] == "0"
    assert reads < 2500, "frames come many to a read, else this shows nothing"
    assert visits < reads + 600, "one for each read, and about one for each write of the client"
    client.sock.close()


def test_settings_without_end_close_the_connection(ours: Running, caplog: pytest.LogCaptureFixture) -> None:
    client = Raw(ours.port)
    client.sock.sendall(frame(4, b"\0\4\0\1\0\0") * 300)
    with contextlib.suppress(ConnectionError):
        while client.sock.recv(65536):
            pass
    assert "changes its settings without end" in caplog.text
    client.sock.close()
    others_are_answered(ours.port)


@pytest.mark.parametrize("size", [0, 100, 2**32 - 1])
def test_the_table_of_headers_is_no_larger_than_ours(ours: Running, size: int) -> None:
    client = Raw(ours.port)
    client.h2.update_settings({SettingCodes.HEADER_TABLE_SIZE: size})
    client.flush()
    for number in range(60):
        trailers = client.status(client.ask(f"none-{number}-{'ü' * 50}", framed(b"")))
        assert trailers["grpc-status"] == str(Code.UNIMPLEMENTED.value[0])
    (connection,) = ours.services.connections
    table = connection.state.encoder.header_table
    assert table.maxsize == min(size, 4096)
    assert table._current_size <= 4096
    for other in (100, 5000, 5000, 200, 300):
        connection.state.encoder.header_table_size = other
    assert connection.state.encoder.table_size_changes == [100, 300] if size != 100 else [200, 300]
    client.sock.close()


def test_a_call_taken_back_as_it_is_given_room_ends(ours: Running) -> None:
    client = Raw(ours.port, window=0)
    stream = client.ask("boxed", framed(b"5"), end=False)
    until(lambda: any(call.owes for call in ours.services.open_calls))
    client.h2.increment_flow_control_window(1000, stream)
    client.h2.reset_stream(stream, ErrorCodes.CANCEL)
    client.flush()
    until(lambda: not ours.services.open_calls)
    client.sock.close()


def test_a_stop_waits_until_the_client_has_the_answer(ours: Running) -> None:
    client = Raw(ours.port, window=1000)
    client.go_on_after_goodbye()
    stream = client.ask("echo", None, end=False)
    client.send(stream, framed(bytes(50_000)), end=True)
    until(lambda: any(call.owes for call in ours.services.open_calls))
    settling = threading.Thread(target=ours.do, args=(ours.services.settle(10),))
    stopping = threading.Thread(target=ours.stop, args=(10,))
    settling.start()
    stopping.start()
    time.sleep(0.3)
    assert settling.is_alive()
    assert stopping.is_alive()
    client.h2.increment_flow_control_window(100_000, stream)
    client.h2.increment_flow_control_window(100_000)
    client.flush()
    events = client.events(lambda e: isinstance(e, StreamEnded))
    assert sum(len(e.data or b"") for e in events if isinstance(e, DataReceived)) == 50_005
    # Until it closes by itself: what it sends while it reads, to acknowledge, must not meet a closed socket.
    client.h2.ping(b"any time")
    client.flush()
    assert any(isinstance(e, PingAckReceived) for e in client.events(lambda e: isinstance(e, PingAckReceived)))
    client.sock.close()
    settling.join(5)
    stopping.join(5)
    assert not settling.is_alive()
    assert not stopping.is_alive()


def test_who_is_told_to_leave_ends_its_calls_and_others_are_answered(ours: Running, raw: Raw) -> None:
    stream = raw.ask("both", framed(b"1"), end=False)
    raw.events(lambda e: isinstance(e, DataReceived))
    idle = Raw(ours.port)
    idle.go_on_after_goodbye()
    until(lambda: len(ours.services.connections) == 2)
    ours.loop.call_soon_threadsafe(ours.services.leave)
    assert any(isinstance(e, ConnectionTerminated) for e in idle.events(lambda e: isinstance(e, ConnectionTerminated)))
    while idle.sock.recv(65536):
        pass
    others_are_answered(ours.port)
    raw.sock.sendall(b"\0\0\x06\0\x01" + stream.to_bytes(4, "big") + framed(b"2"))
    data = b""
    while chunk := raw.sock.recv(65536):
        data += chunk
    assert framed(b"22") in data
    idle.sock.close()


def test_connections_that_say_nothing_are_closed(ours: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http2, "PREFACE_TIMEOUT_S", 0.3)
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    for beginning in (b"P", preface, preface + b"\0\0"):
        with socket.create_connection(("127.0.0.1", ours.port), timeout=5) as sock:
            sock.sendall(beginning)
            while sock.recv(65536):
                pass
    client = Raw(ours.port)
    assert client.status(client.ask("echo", framed(b"well")))["grpc-status"] == "0"
    time.sleep(0.6)
    assert client.status(client.ask("echo", framed(b"still")))["grpc-status"] == "0"
    client.sock.close()


def test_a_frame_that_announces_too_much_is_not_waited_for(raw: Raw) -> None:
    raw.sock.sendall(b"\xff\xff\xff")
    with contextlib.suppress(ConnectionError):
        while raw.sock.recv(65536):
            pass


def test_a_connection_whose_client_reads_nothing_ends_all_the_same(
    ours: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http2, "ABORT_S", 0.3)
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", ours.port))
        client = H2Connection(H2Configuration(client_side=True))
        client.initiate_connection()
        client.increment_flow_control_window(1 << 30)
        client.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 1 << 30})
        headers = {
            ":method": "POST",
            ":scheme": "http",
            ":path": "/test.Test/count",
            ":authority": "x",
            "content-type": "application/grpc",
            "te": "trailers",
        }
        client.send_headers(1, headers.items())
        client.send_data(1, framed(b"100 500000"), end_stream=True)
        sock.sendall(client.data_to_send())
        until(lambda: any(not connection.writable for connection in ours.services.connections))
        (connection,) = ours.services.connections
        ours.loop.call_soon_threadsafe(connection.close)
        until(lambda: not ours.services.connections)


class Refusing:
    """A backend that refuses every request, and counts them."""

    def __init__(self) -> None:
        self.count = 0

    async def pieces(self, *_: Any) -> None:
        self.count += 1
        raise InvalidRequest("refused")


@contextlib.asynccontextmanager
async def served(lifecycle: Lifecycle, backend: Any = None, fast: bool = True) -> AsyncIterator[GRPCServer]:
    """The service of the product over `backend`."""
    servicer = Servicer(lifecycle, Enforcement(lifecycle), recorder(lifecycle))
    servicer.attach(backend)
    server = GRPCServer(
        servicer, ServerSettings(host="127.0.0.1", grpc_port=0, grpc_server="own" if fast else "grpcio"), lifecycle
    )
    await server.start()
    try:
        yield server
    finally:
        await server.stop(0)


def test_requests_of_a_stream_wait_while_their_answers_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servicer_module, "MAX_OPEN", 64)
    monkeypatch.setattr(servicer_module, "MAX_WAITING", 64)

    async def ask() -> None:
        lifecycle, backend = Lifecycle(), Refusing()
        for state in (State.LOADING, State.WARMING, State.READY):
            lifecycle.to(state)
        async with served(lifecycle, backend) as server:

            def send() -> Raw:
                client = Raw(server.port, window=0)
                path = {":path": "/inference.GRPCInferenceService/ModelStreamInfer"}
                stream = client.ask("", framed(b"") * 300, end=False, **path)
                client.h2.send_data(stream, framed(b"") * 300, end_stream=True)
                client.flush()
                until(lambda: backend.count >= 64)
                time.sleep(0.5)
                return client

            client = await asyncio.to_thread(send)
            assert backend.count <= 2 * 64
            client.h2.increment_flow_control_window(1 << 24, 1)
            client.h2.increment_flow_control_window(1 << 24)
            client.flush()
            await asyncio.to_thread(client.events, lambda e: isinstance(e, StreamEnded), 60)
            assert backend.count == 600
            client.sock.close()

    asyncio.run(ask())


@pytest.mark.parametrize("fast", [True, False])
def test_health_is_told_to_all_though_one_watcher_reads_nothing(fast: bool) -> None:
    async def ask() -> None:
        lifecycle = Lifecycle()
        serving = health_pb2.HealthCheckResponse
        async with served(lifecycle, fast=fast) as server:
            path = {":path": "/grpc.health.v1.Health/Watch"}
            deaf = await asyncio.to_thread(Raw, server.port, 0)
            await asyncio.to_thread(deaf.ask, "", framed(b""), **path)
            async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
                stub = health_pb2_grpc.HealthStub(channel)
                leaving = stub.Watch(health_pb2.HealthCheckRequest())
                watching = stub.Watch(health_pb2.HealthCheckRequest())
                for each in (leaving, watching):
                    assert (await each.read()).status == serving.NOT_SERVING
                leaving.cancel()
                unknown = stub.Watch(health_pb2.HealthCheckRequest(service="none"))
                assert (await unknown.read()).status == serving.SERVICE_UNKNOWN
                for state in (State.LOADING, State.WARMING, State.READY):
                    lifecycle.to(state)
                assert (await asyncio.wait_for(watching.read(), 5)).status == serving.SERVING
                for name in ("", "inference.GRPCInferenceService"):
                    request = health_pb2.HealthCheckRequest(service=name)
                    assert (await stub.Check(request, timeout=5)).status == serving.SERVING
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await stub.Check(health_pb2.HealthCheckRequest(service="none"), timeout=5)
                assert caught.value.code() == Code.NOT_FOUND
                lifecycle.to(State.DRAINING)
                assert (await asyncio.wait_for(watching.read(), 5)).status == serving.NOT_SERVING
            deaf.sock.close()

    asyncio.run(ask())


@pytest.mark.parametrize("fast", [True, False])
def test_calls_over_tls_are_answered(tmp_path: Path, fast: bool) -> None:
    cert, key = self_signed(tmp_path)

    async def ask() -> None:
        lifecycle = Lifecycle()
        files = {"ssl_certfile": str(cert), "ssl_keyfile": str(key)}
        settings = ServerSettings(host="127.0.0.1", grpc_port=0, grpc_server="own" if fast else "grpcio", **files)
        servicer = Servicer(lifecycle, Enforcement(lifecycle), recorder(lifecycle))
        shown = Certificates(files["ssl_certfile"], files["ssl_keyfile"], {})
        server = GRPCServer(servicer, settings, lifecycle, certificates=shown)
        await server.start()
        credentials = grpc.ssl_channel_credentials(cert.read_bytes())
        async with grpc.aio.secure_channel(f"localhost:{server.port}", credentials) as channel:
            answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=20)
        assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
        await server.stop(0)

    asyncio.run(ask())


def test_random_frames_do_no_harm(ours: Running) -> None:
    rng = random.Random(5)
    for _ in range(150):
        with socket.create_connection(("127.0.0.1", ours.port), timeout=10) as sock:
            client = H2Connection(H2Configuration(client_side=True))
            client.initiate_connection()
            parts = [client.data_to_send()]
            for _ in range(rng.randint(1, 8)):
                payload = rng.randbytes(rng.choice([0, 4, 5, 8, 40]))
                head = bytes([rng.randint(0, 10), rng.choice([0, 1, 4, 5, 8, 32, 255])])
                parts.append(
                    len(payload).to_bytes(3, "big")
                    + head
                    + rng.choice([0, 1, 3, 2**31 - 1]).to_bytes(4, "big")
                    + payload
                )
            sock.sendall(b"".join(parts))
    with grpc.insecure_channel(f"127.0.0.1:{ours.port}") as channel:
        assert channel.unary_unary("/test.Test/echo")(b"others", timeout=20) == b"others"
