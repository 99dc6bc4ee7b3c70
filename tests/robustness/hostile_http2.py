"""Clients of HTTP/2 that do one thing without pause, for `hostile`: frames that no library sends, to either port."""

from __future__ import annotations

import itertools
import socket
import struct
import time
from collections.abc import Callable, Iterable

from hpack import Encoder

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST, SETTINGS, PING, GOAWAY, WINDOW, CONTINUATION, UNKNOWN = *range(5), 6, 7, 8, 9, 0x77
LASTS_S = 1.0
"""Of one connection, unless the server closes it before."""


def frame(kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> bytes:
    """A frame of HTTP/2."""
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def head(key: str | None, grpc: bool = False, method: str = "POST", extra: Iterable[tuple[str, str]] = ()) -> bytes:
    """The headers of a request, packed without a table."""
    path = "/inference.GRPCInferenceService/ModelInfer" if grpc else "/v1/chat/completions"
    fields = [(":method", method), (":scheme", "http"), (":path", path), (":authority", "x")]
    fields += [("content-type", "application/grpc" if grpc else "application/json")]
    fields += [("te", "trailers")] if grpc else []
    fields += [("authorization", f"Bearer {key}")] if key is not None else []
    return bytes(Encoder().encode([*fields, *extra]))


def blocks(each: bytes, count: int) -> Iterable[bytes]:
    """The same frames for ever, so many at once."""
    return itertools.repeat(each * count)


def requests(packed: bytes, after: Callable[[int], bytes], flags: int = 4) -> Iterable[bytes]:
    """One request after the other, each with frames behind it."""
    for first in itertools.count(1, 100):
        streams = range(first, first + 100, 2)
        yield b"".join(frame(HEADERS, flags, stream, packed) + after(stream) for stream in streams)


def bomb() -> Iterable[bytes]:
    """Fields of one byte that stand for 4,000."""
    encoder, large = Encoder(), ("x-large", "a" * 3900)
    pseudo = [(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "x")]
    yield frame(HEADERS, 5, 1, encoder.encode([*pseudo, large]))
    packed = encoder.encode([*pseudo, *[large] * 3000])
    for stream in itertools.count(3, 2):
        yield frame(HEADERS, 5, stream, packed)


def floods(key: str | None, grpc: bool = False) -> dict[str, Iterable[bytes]]:
    """What each client sends, by its name."""
    packed, asking = head(key, grpc), head(key, grpc, "GET")
    begun = [frame(HEADERS, 4, 1, packed)]
    many = frame(HEADERS, 4, 1, head(key, grpc, extra=[(f"x{number}", "v") for number in range(1000)]))
    windows = b"".join(frame(WINDOW, 0, stream, b"\0\0\0\1") for stream in range(1, 1800, 2))
    opened = b"".join(frame(HEADERS, 4, stream, packed) for stream in range(1, 1800, 2))
    sizes = (frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 1000 + number)) for number in itertools.count())
    return {
        "settings": blocks(frame(SETTINGS), 100),
        "settings that change all windows": itertools.chain([opened], sizes),
        "pings": blocks(frame(PING, 0, 0, bytes(8)), 500),
        "requests that are taken back": requests(packed, lambda stream: frame(RST, 0, stream, b"\0\0\0\x08")),
        "requests": requests(asking, lambda stream: b"", 5),
        "requests with trailers": requests(packed, lambda stream: frame(HEADERS, 5, stream, Encoder().encode([]))),
        "headers that never end": itertools.chain(
            [frame(HEADERS, 0, 1, packed)], blocks(frame(CONTINUATION, 0, 1, b"\0\1a\1b" * 3000), 1)
        ),
        "headers of many fields": itertools.chain([many], requests(packed, lambda stream: b"")),
        "headers that grow": bomb(),
        "a body byte by byte": itertools.chain(begun, itertools.repeat(frame(DATA, 0, 1, b" ") * 500, 500)),
        "a body without bytes": itertools.chain(begun, blocks(frame(DATA, 0, 1), 500)),
        "windows": itertools.chain([opened], blocks(windows, 1)),
        "unknown frames": blocks(frame(UNKNOWN, 0, 0, b"x") * 3 + frame(PRIORITY, 0, 1, b"\0\0\0\0\x10"), 100),
        "large unknown frames": blocks(frame(UNKNOWN, 0, 0, bytes(16384)), 4),
        "goodbyes": blocks(frame(GOAWAY, 0, 0, bytes(8)), 500),
        "streams that never end": itertools.chain(
            [opened], (frame(DATA, 0, stream, b'{"') for stream in range(1, 1800, 2))
        ),
    }


def flood(port: int, sent: Iterable[bytes]) -> str:
    """Send until the server closes the connection, all is sent, or the time is up."""
    with socket.create_connection(("127.0.0.1", port), timeout=5) as sock:
        sock.sendall(PREFACE + frame(SETTINGS) + frame(SETTINGS, 1))
        ends = time.monotonic() + LASTS_S
        for part in sent:
            sock.sendall(part)
            sock.setblocking(False)
            try:
                while sock.recv(1 << 16):
                    pass
                return "closed"
            except BlockingIOError:
                sock.settimeout(5)
            if time.monotonic() > ends:
                return "taken"
    return "ended"
