"""Compressed bodies: requests are inflated within the bound of their size, whole answers compressed where asked for.

Streams are not compressed: a frame would wait in the compressor for the next one.
Sources: RFC 9110, 8.4 (content codings; `deflate` is zlib's format, and some clients send it bare) and 12.5.3
(`Accept-Encoding`).
"""

from __future__ import annotations

import asyncio
import gzip
import zlib
from collections.abc import Awaitable, Iterable
from typing import TYPE_CHECKING, Any

from kserve_vllm.core.errors import InvalidRequest, UnsupportedCoding
from kserve_vllm.core.request_context import current

if TYPE_CHECKING:
    from starlette.types import Message, Receive, Scope, Send

Header = tuple[bytes, bytes]

CODINGS = ("gzip", "deflate")
_PART = 1 << 20
"""Most bytes that are inflated at once."""
MAX_MEMBERS = 1_024
"""Members of a body in gzip, which may all be empty: the rest of what has come is copied for each."""
_LEAST = 1024
"""Answers below this many bytes fit into one packet as they are."""
_VARY = (b"vary", b"accept-encoding")
_IN_A_THREAD = 1 << 16
_COMPRESSIBLE = (
    b"application/json",
    b"application/cloudevents+json",
    b"application/octet-stream",
    b"application/openmetrics",
    b"text/plain",
    b"text/html",
)


def inflated(scope: Scope, receive: Receive) -> Receive:
    """ASGI's receive for a body as it was before it was compressed; `receive` itself where it was not.

    The scope's headers no longer speak of the compression then, nor of the length, which only the end will tell: who
    bounds the size of bodies without a length bounds this one.

    Raises:
        UnsupportedCoding: the body is compressed in another way than gzip or deflate.
    """
    codings = [
        each.strip().lower()
        for name, value in scope["headers"]
        if name == b"content-encoding"
        for each in value.decode("latin-1").split(",")
    ]
    codings = [each for each in codings if each not in ("", "identity")]
    if not codings:
        return receive
    coding = codings[0].removeprefix("x-")
    if len(codings) > 1 or coding not in CODINGS:
        sentence = f"content-encoding {', '.join(codings)!r} is not inflated here; send gzip, deflate or none"
        raise UnsupportedCoding(sentence, field="content-encoding")
    gone = (b"content-encoding", b"content-length", b"transfer-encoding")
    scope["headers"] = [header for header in scope["headers"] if header[0] not in gone]
    scope["headers"].append((b"transfer-encoding", b"chunked"))
    return _Inflated(receive, coding)


class _Inflated:
    """ASGI's receive, in parts of at most `_PART` bytes."""

    def __init__(self, receive: Receive, coding: str) -> None:
        self._receive = receive
        self._coding = coding
        self._zlib: Any = None
        self._rest = b""
        self._more = True
        self._full = False
        self._over = False
        self._members = 1

    async def __call__(self) -> Message:
        """The next part.

        Raises:
            InvalidRequest: the body is not what its header says.
        """
        if self._over:
            return await self._receive()
        part = b""
        while not part and not self._over:
            if self._full or self._members % 16 == 0:
                # Others have their turn while a small body becomes a large one, or nothing at all.
                await asyncio.sleep(0)
            if not self._full and not self._rest and self._more:
                message = await self._receive()
                if message["type"] != "http.request":
                    return message
                self._rest, self._more = bytes(message.get("body", b"")), bool(message.get("more_body"))
            try:
                part = self._inflate()
            except zlib.error as error:
                raise self._refuse(f"the body can't be inflated: {error}") from None
            self._over = not (self._rest or self._more or self._full)
        if self._over and (self._zlib is None or not self._zlib.eof):
            raise self._refuse("the compressed body ends too early")
        return {"type": "http.request", "body": part, "more_body": not self._over}

    def _inflate(self) -> bytes:
        if not self._rest and not self._full:
            return b""
        if self._zlib is None:
            # zlib's format begins with a method of 8 and a check of two bytes; bare deflate hardly ever does.
            wrapped = self._rest[0] & 0x0F == 8 and int.from_bytes(self._rest[:2].ljust(2, b"\0"), "big") % 31 == 0
            self._zlib = zlib.decompressobj(31 if self._coding == "gzip" else 15 if wrapped else -15)
        elif self._zlib.eof:
            if self._coding != "gzip":
                raise zlib.error("something follows its end")
            self._members += 1
            if self._members > MAX_MEMBERS:
                raise zlib.error(f"it has more than {MAX_MEMBERS} members")
            # gzip's format lets one member follow the other.
            self._zlib = zlib.decompressobj(31)
        part: bytes = self._zlib.decompress(self._rest, _PART)
        self._rest = self._zlib.unused_data if self._zlib.eof else self._zlib.unconsumed_tail
        self._full = len(part) == _PART and not self._zlib.eof
        return part

    def _refuse(self, sentence: str) -> InvalidRequest:
        self._over = True
        refusal = InvalidRequest(sentence, field="body")
        context = current.get()
        if context is not None:  # apps make an error of their own of what is raised while they read
            context.refusal = refusal
        return refusal


def wanted(headers: Iterable[Header]) -> str | None:
    """The coding that a client asks for in `Accept-Encoding` and that is known here, the best first; or None."""
    found: dict[str, float] = {}
    for name, value in headers:
        if name != b"accept-encoding":
            continue
        for part in value.decode("latin-1").lower().split(","):
            coding, _, rest = part.partition(";")
            key, _, number = rest.strip().partition("=")
            try:
                found[coding.strip()] = float(number) if key.strip() == "q" else 1.0
            except ValueError:
                found[coding.strip()] = 0.0
    best = max(CODINGS, key=lambda coding: found.get(coding, found.get("*", 0.0)))
    return best if found.get(best, found.get("*", 0.0)) > 0 else None


class Compressed:
    """ASGI's send for a client that takes compressed answers; streams and small answers go through as they are.

    A HEAD has the fields of its GET (RFC 9110, 9.3.2): the body that an app makes for both is compressed for both.

    Args:
        send: ASGI's.
        coding: `gzip` or `deflate`; None: caches are told that others get another answer (RFC 9110, 12.5.5).
    """

    def __init__(self, send: Send, coding: str | None) -> None:
        self._send = send
        self._coding = coding
        self._start: Message | None = None
        self._parts: list[bytes] = []

    def __call__(self, message: Message) -> Awaitable[None]:
        """ASGI's send."""
        if message["type"] == "http.response.start":
            if not _compressible(message):
                return self._send(message)
            if self._coding is None:
                return self._send({**message, "headers": [*message["headers"], _VARY]})
            self._start = message
            return _nothing()
        if self._start is None:
            return self._send(message)
        self._parts.append(message.get("body", b""))
        return _nothing() if message.get("more_body") else self._finish()

    async def _finish(self) -> None:
        start, self._start = self._start, None
        assert start is not None
        assert self._coding is not None
        body = b"".join(self._parts)
        headers = [*(header for header in start["headers"] if header[0] != b"content-length"), _VARY]
        if body:  # an app may leave it out for a HEAD, and nobody knows its length then
            if len(body) > _IN_A_THREAD:
                body = await asyncio.to_thread(_compress, body, self._coding)
            else:
                body = _compress(body, self._coding)
            headers.append((b"content-encoding", self._coding.encode()))
            headers.append((b"content-length", b"%d" % len(body)))
        await self._send({**start, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})


def _compressible(start: Message) -> bool:
    """Whether an answer is whole, large enough and not compressed yet."""
    headers = dict(start.get("headers", ()))
    kind = headers.get(b"content-type", b"")
    length = int(headers.get(b"content-length", b"0"))
    return length >= _LEAST and kind.startswith(_COMPRESSIBLE) and b"content-encoding" not in headers


def _compress(body: bytes, coding: str) -> bytes:
    # The lowest level: most of what there is to win, at a tenth of the time.
    return gzip.compress(body, 1, mtime=0) if coding == "gzip" else zlib.compress(body, 1)


async def _nothing() -> None:
    return None
