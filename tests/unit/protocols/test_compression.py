"""Compressed bodies, without a server: what is inflated, what is refused, what is compressed."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import random
import zlib
from typing import Any

import pytest

from kserve_vllm.core.errors import InvalidRequest, UnsupportedCoding
from kserve_vllm.protocols.http import compression
from kserve_vllm.protocols.http.compression import Compressed, inflated, wanted

TEXT = b"".join(b"%d " % n for n in range(500_000))  # more than one part


def bare(data: bytes) -> bytes:
    """deflate without zlib's head, as some clients send it."""
    made = zlib.compressobj(wbits=-15)
    return made.compress(data) + made.flush()


def scope_of(*codings: str) -> dict[str, Any]:
    return {"headers": [(b"content-length", b"7"), *((b"content-encoding", each.encode()) for each in codings)]}


async def read(scope: dict[str, Any], chunks: list[bytes]) -> bytes:
    """The whole body, which must end."""
    messages = [
        {"type": "http.request", "body": each, "more_body": i < len(chunks) - 1} for i, each in enumerate(chunks)
    ]

    async def receive() -> Any:
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    reading = inflated(scope, receive)
    parts = []
    while True:
        message = await reading()
        assert message["type"] == "http.request"
        assert len(message["body"]) <= 1 << 20
        parts.append(message["body"])
        if not message["more_body"]:
            return b"".join(parts)


@pytest.mark.parametrize("text", [b"", b"{}", TEXT, bytes(3 << 20)], ids=["empty", "short", "long", "zeros"])
@pytest.mark.parametrize(
    ("coding", "compress"),
    [
        ("gzip", gzip.compress),
        ("x-gzip", gzip.compress),
        ("deflate", zlib.compress),
        ("deflate", bare),
        ("GZIP", lambda text: gzip.compress(text[:5]) + gzip.compress(text[5:])),
    ],
    ids=["gzip", "x-gzip", "zlib", "bare", "members"],
)
@pytest.mark.parametrize("size", [1 << 30, 1000])
def test_a_compressed_body_is_read_as_it_was(coding: str, compress: Any, text: bytes, size: int) -> None:
    packed = compress(text)
    scope = scope_of(coding)
    chunks = [packed[i : i + size] for i in range(0, len(packed), size)]
    assert asyncio.run(read(scope, chunks)) == text
    assert (b"transfer-encoding", b"chunked") in scope["headers"]  # so that its size is bounded
    assert not any(name in (b"content-length", b"content-encoding") for name, _ in scope["headers"])


def test_a_body_may_come_byte_by_byte() -> None:
    packed = gzip.compress(b'{"a": 1}')
    assert asyncio.run(read(scope_of("gzip"), [bytes([each]) for each in packed])) == b'{"a": 1}'


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_a_body_that_is_not_what_it_says_is_refused(coding: str) -> None:
    compress = gzip.compress if coding == "gzip" else zlib.compress
    packed = compress(TEXT)
    for wrong in (b"{}", b"x" * 100, packed[:-1], packed[: len(packed) // 2], packed + b"x", b""):
        with pytest.raises(InvalidRequest) as refused:
            asyncio.run(read(scope_of(coding), [wrong]))
        assert "body" in refused.value.message


def test_members_without_end_are_refused_and_hold_nobody_up() -> None:
    empty = gzip.compress(b"")
    most = compression.MAX_MEMBERS - 1
    assert asyncio.run(read(scope_of("gzip"), [empty * most + gzip.compress(b"{}")])) == b"{}"

    async def beside() -> int:
        turns = 0

        async def others() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        task = asyncio.ensure_future(others())
        with pytest.raises(InvalidRequest, match="members"):
            await read(scope_of("gzip"), [empty * 10_000])
        task.cancel()
        return turns

    assert asyncio.run(beside()) >= most // 16


def test_any_bytes_are_read_or_refused() -> None:
    rng = random.Random(7)
    packed = gzip.compress(b'{"prompt": "17 + 25 ="}')
    for _ in range(2000):
        broken = bytearray(packed)
        for _ in range(rng.randint(1, 3)):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        with contextlib.suppress(InvalidRequest):
            asyncio.run(read(scope_of(rng.choice(["gzip", "deflate"])), [bytes(broken)]))


@pytest.mark.parametrize("codings", [("br",), ("zstd",), ("gzip", "gzip"), ("gzip, deflate",), ("compress",), ("a b",)])
def test_another_coding_is_refused(codings: tuple[str, ...]) -> None:
    with pytest.raises(UnsupportedCoding):
        asyncio.run(read(scope_of(*codings), [b""]))


def test_a_plain_body_is_left_alone() -> None:
    async def receive() -> Any:
        return {}

    scope = scope_of("identity")
    assert inflated(scope, receive) is receive
    assert scope == scope_of("identity")


@pytest.mark.parametrize(
    ("asked", "chosen"),
    [
        ("gzip", "gzip"),
        ("deflate", "deflate"),
        ("gzip, deflate, br", "gzip"),
        ("gzip;q=0.2, deflate;q=0.9", "deflate"),
        ("gzip;q=0", None),
        ("*", "gzip"),
        ("br", None),
        ("identity", None),
        ("*;q=0", None),
        ("gzip;q=x", None),
        ("gzip;q=0, *", "deflate"),
        ("", None),
    ],
)
def test_the_client_says_which_coding_it_takes(asked: str, chosen: str | None) -> None:
    assert wanted([(b"accept-encoding", asked.encode())]) == chosen
    assert wanted([]) is None


def answered(start: dict[str, Any], *bodies: bytes, coding: str = "gzip") -> list[dict[str, Any]]:
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def run() -> None:
        compressed = Compressed(send, coding)
        await compressed({"type": "http.response.start", "status": 200, **start})
        for i, body in enumerate(bodies):
            await compressed({"type": "http.response.body", "body": body, "more_body": i < len(bodies) - 1})

    asyncio.run(run())
    return sent


def head(kind: bytes, length: int | None) -> dict[str, Any]:
    return {"headers": [(b"content-type", kind), *([] if length is None else [(b"content-length", b"%d" % length)])]}


@pytest.mark.parametrize(("coding", "undo"), [("gzip", gzip.decompress), ("deflate", zlib.decompress)])
@pytest.mark.parametrize("size", [2000, 200_000])
def test_a_whole_answer_is_compressed(coding: str, undo: Any, size: int) -> None:
    body = TEXT[:size]
    start, answer = answered(head(b"application/json", size), body[:100], body[100:], coding=coding)
    headers = dict(start["headers"])
    assert headers[b"content-encoding"] == coding.encode()
    assert int(headers[b"content-length"]) == len(answer["body"]) < size
    assert undo(answer["body"]) == body


@pytest.mark.parametrize(
    ("kind", "length"), [(b"text/event-stream", None), (b"application/json", 500), (b"image/png", 4000), (b"", None)]
)
def test_streams_and_small_answers_are_not(kind: bytes, length: int | None) -> None:
    bodies = [b"a" * 100, b"b" * 100]
    assert [each["body"] for each in answered(head(kind, length), *bodies)[1:]] == bodies
