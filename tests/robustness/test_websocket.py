"""Websockets: what a client sends after its handshake, and behind one that is not answered yet (RFC 6455)."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import logging
import socket
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from kserve_vllm.servers import websocket
from kserve_vllm.servers.listeners import HTTPServer
from kserve_vllm.servers.websocket import Turns, WebSocket
from tests.robustness.test_places import middleware
from tests.robustness.wire import read_all, served

KEY = base64.b64encode(bytes(16))
HANDSHAKE = (
    b"GET /ws HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: " + KEY + b"\r\n"
)
CONT, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10


def frame(kind: int, data: bytes = b"", last: bool = True, compressed: bool = False) -> bytes:
    """A frame of a client, with a mask of zeros."""
    size = len(data)
    length = bytes([0x80 | size]) if size < 126 else bytes([0x80 | 126]) + struct.pack(">H", size & 0xFFFF)
    if size > 0xFFFF:
        length = bytes([0x80 | 127]) + struct.pack(">Q", size)
    return bytes([last << 7 | compressed << 6 | kind]) + length + bytes(4) + data


_open: list[socket.socket] = []


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    """Closes the sockets of the test."""
    yield
    while _open:
        _open.pop().close()


def test_the_admin_port_refuses_a_handshake_and_is_no_fault(caplog: pytest.LogCaptureFixture) -> None:
    with served(middleware().admin) as server:
        refused = read_all(opened(server.port))
    assert refused.startswith(b"HTTP/1.1 404 ")
    assert b"no websockets" in refused
    assert not [each for each in caplog.records if each.levelname == "ERROR"]


def opened(port: int, *fields: bytes) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", port), timeout=10)
    _open.append(sock)
    sock.sendall(HANDSHAKE + b"".join(field + b"\r\n" for field in fields) + b"\r\n")
    return sock


def answer(sock: socket.socket) -> bytes:
    """The head of the handshake's answer."""
    head = b""
    while b"\r\n\r\n" not in head:
        head += sock.recv(1)
    return head


def end(sock: socket.socket) -> int | None:
    """The code of the last frame that comes; None where the connection was reset before it."""
    with contextlib.suppress(OSError):
        found = read_all(sock)
        if (at := found.rfind(bytes([0x80 | CLOSE]))) >= 0:
            return int.from_bytes(found[at + 2 : at + 4], "big")
    return None


@pytest.fixture(scope="module")
def port() -> Iterator[HTTPServer]:
    with served() as server:
        yield server


BEGUN = frame(TEXT, b"a", last=False)


@pytest.mark.parametrize(
    ("what", "begin", "flood", "code"),
    [
        ("pings", b"", frame(PING, b"x") * 200, 1008),
        ("pongs", b"", frame(PONG) * 200, 1008),
        ("fragments without a byte", BEGUN, frame(CONT, last=False) * 200, 1008),
        ("fragments of a message", BEGUN, frame(CONT, b"a", last=False) * websocket.MAX_FRAGMENTS, 1008),
        ("a message over the bound", b"", frame(BINARY, bytes((16 << 20) + 1)), 1009),
        ("text that is none", b"", frame(TEXT, b"\xff\xfe"), 1007),
        ("a compressed frame, which was not agreed on", b"", frame(TEXT, b"a", compressed=True), 1002),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_too_much_ends_the_connection(
    port: HTTPServer, caplog: pytest.LogCaptureFixture, what: str, begin: bytes, flood: bytes, code: int
) -> None:
    sock = opened(port.port)
    assert answer(sock).startswith(b"HTTP/1.1 101")
    with contextlib.suppress(OSError):
        sock.sendall(begin + flood)
    assert end(sock) in (code, None)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_what_is_not_too_much_does_not(port: HTTPServer) -> None:
    sock = opened(port.port)
    answer(sock)
    sock.sendall(frame(PING, b"x") * 20 + BEGUN + frame(CONT, b"a", last=False) * 5000 + frame(CONT, b"a"))
    sock.sendall(frame(BINARY, bytes(1 << 20)) + frame(CLOSE, struct.pack(">H", 1000)))
    assert end(sock) == 1000


def test_messages_are_not_compressed(port: HTTPServer) -> None:
    """16 MiB of zeros come in as 16 KiB; 32 of them would be waiting for the app."""
    packed = zlib.compress(bytes(16 << 20))
    assert len(packed) < 20 << 10
    head = answer(opened(port.port, b"Sec-WebSocket-Extensions: permessage-deflate"))
    assert head.startswith(b"HTTP/1.1 101")
    assert b"extensions" not in head.lower()


@pytest.mark.parametrize("field", [b"X-Long: " + b"a" * 9000, *[b"\r\n".join([b"a: b"] * 124)]], ids=["long", "many"])
def test_a_handshake_that_its_parser_does_not_take_is_answered(port: HTTPServer, field: bytes) -> None:
    """It has bounds below ours; uvicorn would leave the connection open for ever, without a word."""
    found = read_all(opened(port.port, field))
    assert found.startswith(b"HTTP/1.1 431"), found[:100]


class _Nowhere:
    """A transport that keeps nothing, and notes whether it is read."""

    reads = True

    def pause_reading(self) -> None:
        self.reads = False

    def resume_reading(self) -> None:
        self.reads = True

    def is_closing(self) -> bool:
        return False

    def get_extra_info(self, name: str) -> None:
        """There is nothing below it."""

    def __getattr__(self, name: str) -> object:
        return lambda *_, **__: None


def _opened_by_hand(turns: Turns) -> WebSocket:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        """Whoever tests says what it says."""
        await asyncio.Event().wait()

    config = uvicorn.Config(app, log_config=None, ws_per_message_deflate=False)
    config.load()
    made = WebSocket(turns, config=config, server_state=ServerState(), app_state={})
    made.connection_made(_Nowhere())  # type: ignore[arg-type]
    made.data_received(HANDSHAKE + b"\r\n")
    return made


def test_nothing_is_read_before_the_handshake_is_accepted() -> None:
    """The key is looked at by then."""

    async def run() -> None:
        each = _opened_by_hand(Turns())
        each.data_received(frame(TEXT, b"early") + frame(PONG) * 50)
        await asyncio.sleep(0.05)
        assert len(each.unread) == 11 + 50 * 6
        assert not each.transport.reads  # type: ignore[attr-defined]
        assert (await each.receive())["type"] == "websocket.connect"
        await each.send({"type": "websocket.accept"})
        assert (await each.receive())["text"] == "early"  # type: ignore[typeddict-item]
        each.connection_lost(None)

    asyncio.run(run())


def test_others_have_their_turn_while_a_flood_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the connections sends what takes a fifth of a second to read; nobody waits for that."""
    monkeypatch.setattr(websocket, "TURN_S", 0.0)
    turns: list[str] = []

    async def flood() -> None:
        opened = [_opened_by_hand(shared) for shared in [Turns()] for _ in range(3)]
        for number, each in enumerate(opened):
            await each.send({"type": "websocket.accept"})
            take = each.take_frames
            monkeypatch.setattr(each, "take_frames", lambda take=take, name=str(number): (turns.append(name), take()))
            each.data_received(BEGUN + frame(CONT, b"a", last=False) * 2000)
            assert not each.transport.reads  # type: ignore[attr-defined]
        for _ in range(100):
            turns.append("other")
            await asyncio.sleep(0)
        for each in opened:
            each.connection_lost(None)

    asyncio.run(flood())
    assert all(turns.count(str(number)) > 20 for number in range(3))
    assert not [pair for pair in itertools.pairwise(turns) if "other" not in pair], "two were read in one pass"


def test_a_client_that_takes_nothing_is_not_read() -> None:
    """Its pings would fill us with answers."""

    async def run() -> None:
        each = _opened_by_hand(Turns())
        await each.send({"type": "websocket.accept"})
        each.pause_writing()
        each.data_received(frame(PING, b"x") * 10)
        await asyncio.sleep(0.01)
        assert len(each.unread) == 70
        assert not each.transport.reads  # type: ignore[attr-defined]
        each.resume_writing()
        await asyncio.sleep(0.01)
        assert not each.unread
        assert each.transport.reads  # type: ignore[attr-defined]
        each.connection_lost(None)

    asyncio.run(run())


def test_a_message_waits_until_the_app_has_taken_the_one_before() -> None:
    async def run() -> None:
        each = _opened_by_hand(Turns())
        await each.send({"type": "websocket.accept"})
        assert (await each.receive())["type"] == "websocket.connect"
        each.data_received(frame(BINARY, bytes(100_000)) * 3)
        for left in (200_000, 100_000, 0):
            await asyncio.sleep(0.05)
            assert each.queue.qsize() == 1
            assert left - 8192 <= len(each.unread) <= left + 100
            assert len((await each.receive())["bytes"]) == 100_000  # type: ignore[typeddict-item]
        await asyncio.sleep(0.01)
        assert each.transport.reads  # type: ignore[attr-defined]
        each.connection_lost(None)

    asyncio.run(run())
