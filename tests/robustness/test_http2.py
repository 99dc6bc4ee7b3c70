"""Our HTTP/2 keeps to RFC 9113 and RFC 7541: frames by bytes, and the answer that the RFC asks for.

The sections and cases are those of h2spec that apply to a server that answers gRPC. A fault of one stream may be
answered as one of the connection (RFC 9113, 5.4.1); what may not happen is that it is answered as if it was none.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import pytest
from hpack import Decoder, Encoder

from kserve_vllm.config.settings import ServerSettings
from kserve_vllm.grpc_server import http2
from kserve_vllm.servers import http1
from kserve_vllm.servers.listeners import HTTPServer
from tests.robustness.wire import connect, echo, listening
from tests.unit.servers.test_grpc_server import LIMIT, Running, framed

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, ACK, END_HEADERS, PADDED, PRIORITIZED = 1, 1, 4, 8, 32
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

NO_ERROR, PROTOCOL_ERROR, INTERNAL_ERROR, FLOW_CONTROL_ERROR, SETTINGS_TIMEOUT, STREAM_CLOSED = range(6)
FRAME_SIZE_ERROR, REFUSED_STREAM, CANCEL, COMPRESSION_ERROR = range(6, 10)
ENHANCE_YOUR_CALM = 11

PSEUDO = ((":method", "POST"), (":scheme", "http"), (":path", "/test.Test/echo"), (":authority", "localhost"))
REST = (("te", "trailers"), ("content-type", "application/grpc"))


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def block(*headers: tuple[str, str]) -> bytes:
    """Headers packed without the table, so that blocks do not depend on each other."""
    out = bytearray()
    for name, value in headers:
        out.append(0)
        for text in (name.encode(), value.encode("latin-1")):
            assert len(text) < 16_000
            out += _integer(len(text), 7) + text
    return bytes(out)


def _integer(value: int, bits: int) -> bytes:
    """RFC 7541, 5.1, with zeros in front of the prefix."""
    most = (1 << bits) - 1
    if value < most:
        return bytes([value])
    out, value = bytearray([most]), value - most
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


GOOD = block(*PSEUDO, *REST)


def ask(stream: int = 1, flags: int = END_HEADERS, head: bytes = GOOD) -> bytes:
    """Request headers; the client goes on unless `flags` say otherwise."""
    return frame(HEADERS, flags, stream, head)


def whole(stream: int = 1) -> bytes:
    """A call that is answered."""
    return ask(stream) + frame(DATA, END_STREAM, stream, framed(b"well"))


def without(*names: str) -> bytes:
    return block(*(pair for pair in PSEUDO if pair[0] not in names), *REST)


def instead(**values: str) -> bytes:
    """The headers with other values of pseudo-headers."""
    return block(*((name, values.get(name[1:], value)) for name, value in PSEUDO), *REST)


class Frame(NamedTuple):
    kind: int
    flags: int
    stream: int
    payload: bytes

    @property
    def code(self) -> int | None:
        """The error code, of a frame that has one."""
        at = {RST_STREAM: 0, GOAWAY: 4}.get(self.kind)
        return None if at is None else int.from_bytes(self.payload[at : at + 4], "big")


class Wire:
    """A connection that begins as it should, unless told otherwise."""

    def __init__(self, port: int, begin: bytes = PREFACE + frame(SETTINGS, 0, 0)) -> None:
        self.sock = connect(port)
        self._data = b""
        self.send(begin)

    def send(self, data: bytes) -> None:
        # The server may have closed already, which is what some of these ask for.
        with contextlib.suppress(ConnectionError):
            self.sock.sendall(data)

    def frames(self) -> Iterator[Frame]:
        """What the server sends until it closes."""
        while True:
            while len(self._data) >= 9:
                size = int.from_bytes(self._data[:3], "big")
                if len(self._data) < 9 + size:
                    break
                head, payload = self._data[:9], self._data[9 : 9 + size]
                self._data = self._data[9 + size :]
                yield Frame(head[3], head[4], int.from_bytes(head[5:], "big"), payload)
            try:
                more = self.sock.recv(65536)
            except ConnectionError:
                return
            if not more:
                return
            self._data += more

    def until(self, kind: int, flags: int = 0, stream: int | None = None) -> Frame:
        """The next frame of a kind with these flags."""
        for each in self.frames():
            if each.kind == kind and each.flags & flags == flags and stream in (None, each.stream):
                return each
            if each.kind == GOAWAY:
                raise AssertionError(f"the connection ends: {each}")
        raise AssertionError("the connection is closed")


@pytest.fixture(scope="module", params=["gRPC's port", "HTTP's port"])
def server(request: pytest.FixtureRequest) -> Iterator[Running]:
    """The calls of the tests, on a port of their own or beside HTTP."""
    running = Running("ours")
    http = running.do(_beside_http(running)) if request.param == "HTTP's port" else None
    yield running
    if http is not None:
        running.do(http.stop(0))
    running.end()


async def _beside_http(running: Running) -> HTTPServer:
    http = HTTPServer(echo, ServerSettings(host="127.0.0.1"), 0)
    assert http.http2 is not None
    http.http2.take_calls(running.services.accept)
    http.start()
    await listening(http)
    running.port = http.port
    return http


@pytest.fixture
def wire(server: Running) -> Iterator[Wire]:
    client = Wire(server.port)
    yield client
    client.sock.close()


@dataclass
class Case:
    """Bytes after the preface and settings, and the error codes of which one has to come; none: it goes on."""

    section: str
    what: str
    sent: bytes
    codes: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.section} {self.what}"


def setting(*pairs: tuple[int, int]) -> bytes:
    return frame(SETTINGS, 0, 0, b"".join(struct.pack(">HI", *pair) for pair in pairs))


def update(stream: int, by: int) -> bytes:
    return frame(WINDOW_UPDATE, 0, stream, by.to_bytes(4, "big"))


ENDED = whole()
RESET = ask() + frame(RST_STREAM, 0, 1, CANCEL.to_bytes(4, "big"))
FAULT = (PROTOCOL_ERROR,)
CLOSED = (STREAM_CLOSED,)
UNPADDED = frame(HEADERS, END_HEADERS | PADDED, 1, b"\xff" + GOOD[:20])
SELF_DEPENDENT = (1).to_bytes(4, "big") + b"\x10"
LONG = bytes(16_385)

CASES = [
    # 4 HTTP frames
    Case("4.1", "a frame of an unknown type", frame(22, 0, 0, b"12345678")),
    Case("4.1", "flags that mean nothing", frame(PING, 0x16, 0, bytes(8))),
    Case("4.1", "the reserved bit", frame(PING, 0, 0x80000000, bytes(8))),
    Case("4.2", "data of 16,384 bytes", ask() + frame(DATA, END_STREAM, 1, framed(bytes(16_379)))),
    Case("4.2", "data that is too long", ask() + frame(DATA, END_STREAM, 1, LONG), (FRAME_SIZE_ERROR,)),
    Case("4.2", "headers that are too long", frame(HEADERS, END_HEADERS, 1, LONG), (FRAME_SIZE_ERROR,)),
    Case(
        "4.3", "headers that can't be unpacked", frame(HEADERS, END_HEADERS, 1, b"\xff\xff\xff"), (COMPRESSION_ERROR,)
    ),
    Case("4.3", "a priority within headers", ask(1, 0) + frame(PRIORITY, 0, 1, bytes(5)), FAULT),
    Case("4.3", "another stream's headers within headers", ask(1, 0) + ask(3), FAULT),
    # 5.1 stream states
    Case("5.1", "idle: data", frame(DATA, END_STREAM, 1, b"x"), FAULT),
    Case("5.1", "idle: a reset", frame(RST_STREAM, 0, 1, bytes(4)), FAULT),
    Case("5.1", "idle: a window", update(1, 100), FAULT),
    Case("5.1", "idle: a continuation", frame(CONTINUATION, END_HEADERS, 1, GOOD), FAULT),
    Case("5.1", "half closed: data", whole() + frame(DATA, END_STREAM, 1, b"x"), CLOSED),
    Case("5.1", "half closed: headers", whole() + ask(1, END_HEADERS | END_STREAM), CLOSED),
    Case("5.1", "half closed: a continuation", ENDED + frame(CONTINUATION, END_HEADERS, 1, GOOD), CLOSED + FAULT),
    Case("5.1", "reset: data", RESET + frame(DATA, END_STREAM, 1, b"x"), CLOSED),
    Case("5.1", "reset: headers", RESET + ask(1, END_HEADERS | END_STREAM), CLOSED),
    Case("5.1", "reset: a continuation", RESET + frame(CONTINUATION, END_HEADERS, 1, GOOD), CLOSED + FAULT),
    Case("5.1.1", "a stream with an even number", ask(2), FAULT),
    Case("5.1.1", "a number below an earlier one", ask(5) + ask(3), FAULT),
    Case(
        "5.3.1",
        "headers that depend on themselves",
        frame(HEADERS, END_HEADERS | PRIORITIZED, 1, SELF_DEPENDENT + GOOD),
        FAULT,
    ),
    Case("5.3.1", "a priority that depends on itself", frame(PRIORITY, 0, 1, SELF_DEPENDENT), FAULT),
    Case("5.5", "an unknown frame within headers", ask(1, 0) + frame(22, 0, 0, bytes(8)), FAULT),
    # 6 frame definitions
    Case("6.1", "data of stream 0", frame(DATA, END_STREAM, 0, b"x"), FAULT),
    Case("6.1", "more padding than data", ask() + frame(DATA, END_STREAM | PADDED, 1, b"\x08" + b"12345"), FAULT),
    Case("6.1", "data with padding", ask() + frame(DATA, END_STREAM | PADDED, 1, b"\x03" + framed(b"x") + bytes(3))),
    Case("6.2", "headers of stream 0", ask(0), FAULT),
    Case("6.2", "more padding than headers", UNPADDED, FAULT),
    Case(
        "6.2",
        "headers with padding and priority",
        frame(HEADERS, END_HEADERS | PADDED | PRIORITIZED, 1, b"\x02" + bytes(4) + b"\x10" + GOOD + bytes(2))
        + frame(DATA, END_STREAM, 1, framed(b"x")),
    ),
    Case("6.3", "a priority", frame(PRIORITY, 0, 3, bytes(4) + b"\x10") + whole()),
    Case("6.3", "a priority of stream 0", frame(PRIORITY, 0, 0, bytes(5)), FAULT),
    Case("6.3", "a priority of another length", ask() + frame(PRIORITY, 0, 1, bytes(4)), (FRAME_SIZE_ERROR,)),
    Case("6.4", "a reset of stream 0", frame(RST_STREAM, 0, 0, bytes(4)), FAULT),
    Case("6.4", "a reset of another length", ask() + frame(RST_STREAM, 0, 1, bytes(3)), (FRAME_SIZE_ERROR,)),
    Case("6.5", "an acknowledgement that is not empty", frame(SETTINGS, ACK, 0, bytes(6)), (FRAME_SIZE_ERROR,)),
    Case("6.5", "settings of a stream", frame(SETTINGS, 0, 1, b"\0\3\0\0\0\1"), FAULT),
    Case("6.5", "settings of another length", frame(SETTINGS, 0, 0, bytes(5)), (FRAME_SIZE_ERROR,)),
    Case("6.5.2", "push that is neither 0 nor 1", setting((2, 2)), FAULT),
    Case("6.5.2", "a window that is too large", setting((4, 1 << 31)), (FLOW_CONTROL_ERROR,)),
    Case("6.5.2", "frames that are too small", setting((5, 16_383)), FAULT),
    Case("6.5.2", "frames that are too large", setting((5, 1 << 24)), FAULT),
    Case("6.5.2", "an unknown setting", setting((0xFF, 1))),
    Case("6.7", "a ping of a stream", frame(PING, 0, 1, bytes(8)), FAULT),
    Case("6.7", "a ping of another length", frame(PING, 0, 0, bytes(6)), (FRAME_SIZE_ERROR,)),
    Case("6.8", "a goodbye of a stream", frame(GOAWAY, 0, 1, bytes(8)), FAULT),
    Case("6.9", "a window of 0 more", update(0, 0), FAULT),
    Case("6.9", "a stream's window of 0 more", ask() + update(1, 0), FAULT),
    Case("6.9", "a window of another length", frame(WINDOW_UPDATE, 0, 0, bytes(3)), (FRAME_SIZE_ERROR,)),
    Case("6.9.1", "a window over the maximum", update(0, 2**31 - 1) * 2, (FLOW_CONTROL_ERROR,)),
    Case("6.9.1", "a stream's window over the maximum", ask() + update(1, 2**31 - 1) * 2, (FLOW_CONTROL_ERROR,)),
    Case(
        "6.10",
        "continuations",
        ask(1, 0, GOOD[:5])
        + frame(CONTINUATION, 0, 1, GOOD[5:9])
        + frame(CONTINUATION, END_HEADERS, 1, GOOD[9:])
        + frame(DATA, END_STREAM, 1, framed(b"x")),
    ),
    Case(
        "6.10",
        "data within continuations",
        ask(1, 0, GOOD[:5]) + frame(CONTINUATION, 0, 1, GOOD[5:9]) + frame(DATA, END_STREAM, 1, b"x"),
        FAULT,
    ),
    Case(
        "6.10", "a continuation of stream 0", ask(1, 0, GOOD[:5]) + frame(CONTINUATION, END_HEADERS, 0, GOOD[5:]), FAULT
    ),
    Case("6.10", "a continuation after the end of headers", ask() + frame(CONTINUATION, END_HEADERS, 1, GOOD), FAULT),
    Case(
        "6.10",
        "continuations without end",
        ask(1, 0, b"") + frame(CONTINUATION, 0, 1, b"") * 70,
        (PROTOCOL_ERROR, ENHANCE_YOUR_CALM),
    ),
    Case(
        "6.10",
        "headers of over 128 KiB",
        ask(1, 0, b"") + frame(CONTINUATION, 0, 1, bytes(16_384)) * 9,
        (ENHANCE_YOUR_CALM,),
    ),
    Case("7", "a reset with an unknown code", ask() + frame(RST_STREAM, 0, 1, b"\0\0\0\xff")),
    # 8 HTTP semantics
    Case("8.1", "second headers that are not the last", ask() + ask(), FAULT),
    Case(
        "8.1",
        "trailers of a request",
        ask() + frame(DATA, 0, 1, framed(b"x")) + ask(1, END_HEADERS | END_STREAM, block(("my-trailer", "1"))),
    ),
    Case("8.2.1", "an upper-case name", ask(head=block(*PSEUDO, *REST, ("My-Name", "x"))), FAULT),
    Case("8.2.1", "a name with a space", ask(head=block(*PSEUDO, *REST, ("my name", "x"))), FAULT),
    Case("8.2.1", "a value with a line break", ask(head=block(*PSEUDO, *REST, ("my-name", "x\r\ny: z"))), FAULT),
    Case("8.2.2", "a header of the connection", ask(head=block(*PSEUDO, *REST, ("connection", "keep-alive"))), FAULT),
    Case(
        "8.2.2",
        "another coding of the transfer",
        ask(head=block(*PSEUDO, *REST, ("transfer-encoding", "chunked"))),
        FAULT,
    ),
    Case("8.2.2", "te that is not trailers", ask(head=block(*PSEUDO, ("te", "deflate"), REST[1])), FAULT),
    Case("8.3", "an unknown pseudo-header", ask(head=block(*PSEUDO, (":test", "x"), *REST)), FAULT),
    Case("8.3", "a pseudo-header of answers", ask(head=block(*PSEUDO, (":status", "200"), *REST)), FAULT),
    Case("8.3", "a pseudo-header in trailers", ask() + ask(1, END_HEADERS | END_STREAM, block((":path", "/"))), FAULT),
    Case("8.3", "a pseudo-header after the others", ask(head=block(*REST, *PSEUDO)), FAULT),
    Case("8.3.1", "an empty path", ask(head=instead(path="")), FAULT),
    *(Case("8.3.1", f"no {name}", ask(head=without(name)), FAULT) for name in (":method", ":scheme", ":path")),
    *(Case("8.3.1", f"{pair[0]} twice", ask(head=block(*PSEUDO, pair, *REST)), FAULT) for pair in PSEUDO[:3]),
    Case(
        "8.1.1",
        "less data than was announced",
        ask(head=block(*PSEUDO, *REST, ("content-length", "90"))) + frame(DATA, END_STREAM, 1, framed(b"x")),
        FAULT,
    ),
    Case(
        "8.1.1",
        "more data than was announced",
        ask(head=block(*PSEUDO, *REST, ("content-length", "1"))) + frame(DATA, END_STREAM, 1, framed(b"x")),
        FAULT,
    ),
    Case("8.1.1", "a length that is no number", ask(head=block(*PSEUDO, *REST, ("content-length", "9" * 5000))), FAULT),
    Case("8.4", "a push of a client", frame(PUSH_PROMISE, END_HEADERS, 1, (2).to_bytes(4, "big") + GOOD), FAULT),
    # RFC 7541
    Case("7541 2.3.3", "an index that is not there", ask(head=b"\xff\x30" + GOOD), (COMPRESSION_ERROR,)),
    Case("7541 4.2", "a table's size at the end", ask(head=GOOD + b"\x20"), (COMPRESSION_ERROR,)),
    Case("7541 5.2", "Huffman's padding of over 7 bits", ask(head=GOOD + b"\0\1x\x82\xff\xff"), (COMPRESSION_ERROR,)),
    Case("7541 5.2", "Huffman's padding of zeros", ask(head=GOOD + b"\0\1x\x81\0"), (COMPRESSION_ERROR,)),
    Case("7541 5.2", "Huffman's end of string", ask(head=GOOD + b"\0\1x\x84\xff\xff\xff\xfc"), (COMPRESSION_ERROR,)),
    Case("7541 6.1", "the index 0", ask(head=b"\x80" + GOOD), (COMPRESSION_ERROR,)),
    Case("7541 6.3", "a table over the limit", ask(head=b"\x3f\xe1\xff\x03" + GOOD), (COMPRESSION_ERROR,)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_frame_is_answered_as_the_rfc_wants(server: Running, wire: Wire, case: Case) -> None:
    wire.send(case.sent)
    if not case.codes:
        wire.send(frame(PING, 0, 0, b"still on"))
        while wire.until(PING, ACK).payload != b"still on":
            pass
        wire.send(whole(101))
        assert wire.until(HEADERS, END_STREAM, 101)
    else:
        seen = [each.code for each in wire.frames() if each.code not in (None, NO_ERROR)] if _closes(case) else []
        if not _closes(case):
            seen = [next(each.code for each in wire.frames() if each.code is not None)]
        assert set(seen) & set(case.codes), f"{seen} is none of {case.codes}"
    others = Wire(server.port)
    others.send(whole())
    assert others.until(HEADERS, END_STREAM, 1)
    others.sock.close()


def _closes(case: Case) -> bool:
    """Whether the connection ends after this. After what is sent to a stream that was reset, it goes on."""
    return not case.what.startswith(("reset: data", "reset: headers", "half closed", "a stream's window"))


def test_the_server_begins_with_its_settings(wire: Wire) -> None:
    first = next(wire.frames())
    assert (first.kind, first.flags, first.stream) == (SETTINGS, 0, 0)
    told = dict(struct.iter_unpack(">HI", first.payload))
    assert told[3] == http2.MAX_STREAMS
    assert told[6] in (http2.MAX_HEADERS, http1.MAX_HEAD)


@pytest.mark.parametrize("begin", [b"GET / HTTP/1.1\r\nhost: x\r\n\r\n", b"INVALID PREFACE\r\n\r\n" + bytes(20)])
def test_a_preface_that_is_wrong_ends_the_connection(server: Running, begin: bytes) -> None:
    # Of gRPC's own port: beside HTTP this is HTTP/1.1.
    wire = Wire(server.listener.sockets[0].getsockname()[1], begin)
    # To its end; a GOAWAY may be left out, since the other side does not speak HTTP/2 (3.4).
    assert [each.code for each in wire.frames() if each.kind == GOAWAY] in ([], [PROTOCOL_ERROR])
    wire.sock.close()


def test_an_error_of_the_connection_names_the_last_stream_and_closes(wire: Wire) -> None:
    wire.send(whole(5) + frame(DATA, 0, 0, b"x"))
    goodbye = next(each for each in wire.frames() if each.kind == GOAWAY)
    assert int.from_bytes(goodbye.payload[:4], "big") == 5
    assert goodbye.code == PROTOCOL_ERROR
    assert not list(wire.frames())


def test_settings_are_acknowledged_in_their_order(wire: Wire) -> None:
    wire.send(setting((4, 100), (4, 1)) + whole())
    for _ in range(2):
        wire.until(SETTINGS, ACK)
    assert len(wire.until(DATA, stream=1).payload) == 1, "the last value holds"


def test_a_ping_is_answered_with_its_own_bytes_and_an_answer_with_nothing(wire: Wire) -> None:
    wire.send(frame(PING, ACK, 0, b"unasked!") + frame(PING, 0, 0, b"12345678"))
    assert wire.until(PING).payload == b"12345678"


def test_a_window_is_kept_when_it_grows_and_when_it_becomes_negative(wire: Wire) -> None:
    wire.send(setting((4, 3)) + whole())
    assert len(wire.until(DATA, stream=1).payload) == 3
    # 9 bytes in all; after 3 of them the window shrinks by 1, to -1: of 3 more, 2 can be used.
    wire.send(setting((4, 2)) + update(1, 3))
    assert len(wire.until(DATA, stream=1).payload) == 2
    wire.send(setting((4, 100)))
    assert len(wire.until(DATA, stream=1).payload) == 4
    assert wire.until(HEADERS, END_STREAM, 1)


def test_a_stream_too_many_is_refused_and_the_connection_goes_on(
    server: Running, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    """5.1.2; the others on the connection are of other users where a proxy is in between."""
    monkeypatch.setattr(http2, "MAX_STREAMS", 4)
    deaf = block(*((n, v if n != ":path" else "/test.Test/deaf") for n, v in PSEUDO), *REST)
    wire.send(b"".join(ask(number, head=deaf) for number in range(1, 11, 2)))
    refused = wire.until(RST_STREAM)
    assert (refused.stream, refused.code) in {(9, REFUSED_STREAM), (9, PROTOCOL_ERROR)}
    wire.send(frame(RST_STREAM, 0, 1, CANCEL.to_bytes(4, "big")) + whole(11))
    assert wire.until(HEADERS, END_STREAM, 11)


def test_the_server_keeps_to_the_clients_largest_frame_and_table(server: Running) -> None:
    wire = Wire(server.port, PREFACE + setting((1, 0), (4, 1 << 20), (5, 1 << 20)))
    wire.send(ask() + b"".join(frame(DATA, 0, 1, part) for part in _parts(framed(bytes(60_000)))))
    wire.send(frame(DATA, END_STREAM, 1))
    decoder = Decoder()
    decoder.max_allowed_table_size = 0
    size = 0
    for each in wire.frames():
        if each.kind == HEADERS:
            decoder.decode(each.payload)
            assert decoder.header_table_size == 0
            if each.flags & END_STREAM:
                break
        elif each.kind == DATA:
            size += len(each.payload)
    assert size == 60_005
    wire.sock.close()


def _parts(data: bytes) -> Iterator[bytes]:
    for at in range(0, len(data), 16_384):
        yield data[at : at + 16_384]


def test_table_references_across_requests_are_understood(wire: Wire) -> None:
    encoder = Encoder()
    for number in range(1, 40, 2):
        wire.send(ask(number, head=encoder.encode([*PSEUDO, *REST, ("my-name", "x" * 50)])))
        wire.send(frame(DATA, END_STREAM, number, framed(b"x")))
        assert wire.until(HEADERS, END_STREAM, number)


# What costs the server more than the client (9113, 10.5)


@pytest.mark.parametrize(
    "flood",
    [
        frame(PING, 0, 0, bytes(8)),
        frame(PRIORITY, 0, 3, bytes(4) + b"\x10"),
        frame(22, 0, 0),
        frame(DATA, 0, 1),
        setting((3, 5)),
    ],
    ids=["ping", "priority", "unknown", "empty data", "settings"],
)
def test_frames_that_move_nothing_end_the_connection(
    wire: Wire, server: Running, flood: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http2, "IDLE_FRAMES", 100.0)
    wire = Wire(server.port)
    wire.send(ask() + flood * 3000)
    codes = [each.code for each in wire.frames() if each.kind == GOAWAY]
    assert codes in ([ENHANCE_YOUR_CALM], []), "told so, unless the connection was reset before"
    wire.sock.close()


def test_others_have_their_turn_while_a_flood_is_read(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of what one read brought, since that can be 256 KiB of frames of nine bytes."""
    monkeypatch.setattr(http2, "TURN_S", 0.0)
    monkeypatch.setattr(http2, "IDLE_FRAMES", 1e9)
    turns: list[str] = []

    async def flood() -> None:
        connection = server.services.connect()
        connection.connection_made(_Nowhere())
        connection.data_received(PREFACE + frame(SETTINGS, 0, 0))
        read = connection.read_frames
        monkeypatch.setattr(connection, "read_frames", lambda data: (turns.append("read"), read(data))[1])
        server.loop.call_soon(turns.append, "other")
        connection.data_received(frame(PING, 0, 0, bytes(8)) * 4000)
        await asyncio.sleep(0.1)
        connection.connection_lost(None)

    server.do(flood())
    assert turns.count("read") >= 3
    assert turns.index("other") <= 1


def test_many_connections_share_a_turn(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them sends little enough to be read in one go; all together hold up the others no longer than one."""
    monkeypatch.setattr(http2, "TURN_S", 0.0)
    turns: list[str] = []

    async def flood() -> None:
        opened = [server.services.connect() for _ in range(6)]
        for number, connection in enumerate(opened):
            connection.connection_made(_Nowhere())
            read = connection.read_frames
            name = str(number)
            monkeypatch.setattr(
                connection, "read_frames", lambda data, name=name, read=read: (turns.append(name), read(data))[1]
            )
        for connection in opened:
            connection.data_received(PREFACE + frame(SETTINGS, 0, 0) + frame(PING, 0, 0, bytes(8)) * 10)
        ends = server.loop.time() + 0.1
        while server.loop.time() < ends:
            turns.append("other")
            await asyncio.sleep(0)
        for connection in opened:
            connection.connection_lost(None)

    server.do(flood())
    read = [turn for turn in turns if turn != "other"]
    assert all(read.count(str(number)) > 1 for number in range(6))
    # One after the other, and nobody twice before all were read once.
    assert sorted(read[1:7]) == [str(number) for number in range(6)]
    assert not [pair for pair in itertools.pairwise(turns) if "other" not in pair], "two were read in one pass"


def test_who_has_shown_no_key_gets_a_share_and_leaves_the_rest(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls that are refused for want of a key cost their client little; they may cost the others only so much."""
    monkeypatch.setattr(http2, "STRANGERS_S", 0.01)
    monkeypatch.setattr(http2, "STRANGERS_SHARE", 0.5)
    connections = http2.Connections()

    class Reader:
        """Reads for 4 ms whenever it may."""

        address, has_left = "a", False

        def __init__(self) -> None:
            self.read = 0

        def read_on(self) -> None:
            self.read += 1
            connections.count(self, 0.004)  # type: ignore[arg-type]
            connections.read_later(self)  # type: ignore[arg-type]

    async def run() -> tuple[Reader, Reader, float]:
        stranger, known = Reader(), Reader()
        connections.enter(stranger)  # type: ignore[arg-type]
        connections.enter(known)  # type: ignore[arg-type]
        connections.know(known)  # type: ignore[arg-type]
        began = server.loop.time()
        stranger.read_on()
        await asyncio.sleep(0.1)
        alone = stranger.read
        known.read_on()
        await asyncio.sleep(0.05)
        assert known.read > 100, "it waits for nobody"
        assert stranger.read <= alone + 1, "those that have shown a key come first"
        connections.exit(known)  # type: ignore[arg-type]
        before = stranger.read
        await asyncio.sleep(0.1)
        assert stranger.read > before, "and the others go on behind them"
        connections.exit(stranger)  # type: ignore[arg-type]
        return stranger, known, server.loop.time() - began

    stranger, _, passed_s = server.do(run())
    assert 3 <= stranger.read <= (0.1 + 0.5 * passed_s) / 0.004 + 2


def test_what_is_read_without_end_leaves_half_of_the_loop(server: Running) -> None:
    """Known or not: a token passes the loop several times on its way out, and would wait for a turn each time."""
    connections = http2.Connections()
    took: list[float] = []

    class Reader:
        """Reads for a millisecond whenever it may."""

        address = "a"

        def read_on(self) -> None:
            began = time.perf_counter()
            while time.perf_counter() < began + 0.001:
                pass
            took.append(time.perf_counter() - began)
            connections.read_later(self)  # type: ignore[arg-type]

    async def run() -> float:
        reader = Reader()
        connections.enter(reader)  # type: ignore[arg-type]
        connections.know(reader)  # type: ignore[arg-type]
        began = time.perf_counter()
        reader.read_on()
        await asyncio.sleep(0.3)
        connections.exit(reader)  # type: ignore[arg-type]
        return time.perf_counter() - began

    passed_s = server.do(run())
    assert 0.05 < sum(took) / passed_s < 0.65


def test_a_newcomer_does_not_wait_behind_all_of_somebody_elses(server: Running) -> None:
    """Nor does one that has left, and is not read, hold its place."""
    connections = http2.Connections()
    read: list[str] = []

    class Reader:
        """Reads whenever it may."""

        def __init__(self, address: str, has_left: bool = False) -> None:
            self.address, self.has_left = address, has_left

        def read_on(self) -> None:
            read.append(self.address)
            connections.read_later(self)  # type: ignore[arg-type]

        def abort(self) -> None:
            read.append("left")
            connections.exit(self)  # type: ignore[arg-type]

    async def run() -> None:
        readers = [*(Reader("a") for _ in range(50)), Reader("a", has_left=True), Reader("b")]
        for each in readers:
            connections.enter(each)  # type: ignore[arg-type]
            connections.read_later(each)  # type: ignore[arg-type]
        await asyncio.sleep(0.1)
        for each in readers:
            connections.exit(each)  # type: ignore[arg-type]
        count = len(read)
        await asyncio.sleep(0.05)
        assert len(read) == count

    server.do(run())
    assert "b" in read[:2]
    assert abs(read.count("a") - read.count("b")) <= 2
    assert read.count("left") == 1


class _Nowhere:
    """A transport that keeps nothing."""

    def write(self, data: bytes) -> None:
        """Forget it."""

    def get_extra_info(self, name: str) -> None:
        """There is nothing below it."""

    def __getattr__(self, name: str) -> object:
        return lambda *_, **__: 0


def test_a_message_over_the_limit_is_refused_by_its_first_bytes(wire: Wire) -> None:
    wire.send(ask() + frame(DATA, 0, 1, b"\0" + (LIMIT + 1).to_bytes(4, "big")))
    ended = wire.until(HEADERS, END_STREAM, 1)
    assert dict(Decoder().decode(ended.payload))["grpc-status"] == "8"


def test_a_header_block_is_given_up_when_it_does_not_end(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a block of headers holds up all other streams of its connection (9113, 4.3)."""
    monkeypatch.setattr(http2, "HEADER_TIMEOUT_S", 0.3)
    wire = Wire(server.port)
    began = time.monotonic()
    wire.send(ask(1, 0, GOOD[:5]))
    list(wire.frames())
    assert time.monotonic() - began < 10
    wire.sock.close()
