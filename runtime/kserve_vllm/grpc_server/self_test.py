"""A few calls to our own gRPC server inside the process, before it is let near clients.

It stands on parts of h2 that are not promised to stay: its windows, its frame buffer, its tables. Should a version of
h2 change one of them, every connection would fail while probes over HTTP stay green. So each of those parts is used
once here, without a socket, against h2's own client.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import cast

import grpc
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    TrailersReceived,
)
from h2.settings import SettingCodes

from kserve_vllm.grpc_server.calls import Services
from kserve_vllm.grpc_server.http2 import Connection

LIMIT_S = 5.0
_MAX_MESSAGE = 1 << 20
# More than a window of h2's default size, and than one frame: so windows are given back on both sides.
_LARGE = 200_000


class SelfTestError(Exception):
    """Our gRPC server does not work with what is installed."""


async def check() -> None:
    """Call a server of our own.

    Raises:
        SelfTestError: it does not answer as it should, within 5 s.
        Exception: whatever a part that has changed raises.
    """
    async with asyncio.timeout(LIMIT_S):
        await _Check().run()


class MemoryTransport(asyncio.Transport):
    """Carries what the server writes to the client."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = bytearray()
        self.closed = False
        self.paused = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.sent += data

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Takes whatever comes."""

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    abort = close


class _Check:
    def __init__(self) -> None:
        self._services = Services(_MAX_MESSAGE)
        self._services.add_generic_rpc_handlers((echo_handlers(),))
        self._server: Connection = self._services.connect()
        self._wire = MemoryTransport()
        self._client = H2Connection(H2Configuration(client_side=True, header_encoding="utf-8"))
        self._events: list[Event] = []

    async def run(self) -> None:
        self._server.connection_made(cast(asyncio.BaseTransport, self._wire))
        try:
            self._client.initiate_connection()
            await self._exchange()
            await self._messages_go_both_ways()
            await self._headers_are_bounded()
            await self._a_stream_can_be_taken_back()
            await self._the_server_says_goodbye()
        finally:
            self._server.connection_lost(None)

    async def _messages_go_both_ways(self) -> None:
        message = bytes(i % 251 for i in range(_LARGE))
        stream = self._begin("echo")
        await self._send(stream, _framed(message))
        data = await self._answer(stream)
        _require(data == _framed(message), "a large message does not come back as it was")
        stream = self._begin("stream")
        await self._send(stream, _framed(b"3"))
        _require(await self._answer(stream) == _framed(b"0") + _framed(b"1") + _framed(b"2"), "a stream is not whole")

    async def _headers_are_bounded(self) -> None:
        """The table of headers follows what a client names, up to our own limit."""
        for size in (0, 1 << 20, 100):
            self._client.update_settings({SettingCodes.HEADER_TABLE_SIZE: size})
            stream = self._begin("echo")
            await self._send(stream, _framed(b"x"))
            _require(await self._answer(stream) == _framed(b"x"), "a call after new settings is not answered")
            bounded = self._server.state.encoder.header_table_size == min(size, 4096)
            _require(bounded, "the table of headers has no bound")

    async def _a_stream_can_be_taken_back(self) -> None:
        stream = self._begin("wait")
        await self._send(stream, _framed(b""))
        self._client.reset_stream(stream, ErrorCodes.CANCEL)
        await self._exchange()
        _require(not self._services.open_calls, "a call that was taken back stays open")

    async def _the_server_says_goodbye(self) -> None:
        stream = self._begin("echo")
        await self._exchange()
        self._services.leave()
        await self._exchange()
        _require(any(isinstance(e, ConnectionTerminated) for e in self._events), "the end is not announced")
        # h2's client reads nothing after that, so this looks at the server's side.
        end = _framed(b"last")
        self._server.data_received(len(end).to_bytes(3, "big") + b"\0\1" + stream.to_bytes(4, "big") + end)
        before = len(self._wire.sent)
        for _ in range(5):
            await asyncio.sleep(0)
        _require(end in self._wire.sent[before:], "an open call does not end after the server's goodbye")

    def _begin(self, method: str) -> int:
        stream = self._client.get_next_available_stream_id()
        named = {":method": "POST", ":scheme": "http", ":path": f"/self.Test/{method}", ":authority": "self"}
        headers = [*named.items(), ("te", "trailers"), ("content-type", "application/grpc")]
        self._client.send_headers(stream, headers)
        return stream

    async def _send(self, stream: int, data: bytes) -> None:
        while data:
            await self._exchange()
            room = min(self._client.local_flow_control_window(stream), self._client.max_outbound_frame_size, len(data))
            if room:
                chunk, data = data[:room], data[room:]
                self._client.send_data(stream, chunk, end_stream=not data)
        await self._exchange()

    async def _answer(self, stream: int) -> bytes:
        """The data of an answer whose status is OK."""
        data = b""
        while True:
            await self._exchange()
            events, self._events = self._events, []
            for event in events:
                if isinstance(event, DataReceived) and event.stream_id == stream:
                    data += event.data or b""
                    self._client.acknowledge_received_data(event.flow_controlled_length or 0, stream)
                elif isinstance(event, (ResponseReceived, TrailersReceived)) and event.stream_id == stream:
                    named = {str(name): str(value) for name, value in event.headers or ()}
                    status = named.get("grpc-status", "0")
                    _require(status == "0", f"a call ends with status {status}: {named.get('grpc-message')}")
                elif isinstance(event, StreamReset) and event.stream_id == stream:
                    raise SelfTestError(f"a call is reset with {event.error_code}")
                elif isinstance(event, StreamEnded) and event.stream_id == stream:
                    return data

    async def _exchange(self) -> None:
        """Carry over what both sides have to say, and give the server its turn of the event loop."""
        if data := self._client.data_to_send():
            self._server.data_received(data)
        for _ in range(5):
            await asyncio.sleep(0)
        if self._wire.sent:
            sent, self._wire.sent = bytes(self._wire.sent), bytearray()
            self._events += self._client.receive_data(sent)
        _require(not self._wire.closed, "the connection is closed")


def echo_handlers() -> grpc.GenericRpcHandler[bytes, bytes]:
    """A service that gives back what it is sent, as one message and as a stream."""

    async def echo(request: bytes, context: object) -> bytes:
        return request

    async def stream(request: bytes, context: object) -> AsyncIterator[bytes]:
        for i in range(int(request)):
            yield b"%d" % i

    async def wait(request: bytes, context: object) -> bytes:
        await asyncio.sleep(LIMIT_S)
        return b""

    return grpc.method_handlers_generic_handler(
        "self.Test",
        {
            "echo": grpc.unary_unary_rpc_method_handler(echo, bytes, bytes),
            "wait": grpc.unary_unary_rpc_method_handler(wait, bytes, bytes),
            "stream": grpc.unary_stream_rpc_method_handler(stream, bytes, bytes),
        },
    )


def _framed(message: bytes) -> bytes:
    return b"\0" + len(message).to_bytes(4, "big") + message


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise SelfTestError(what)
