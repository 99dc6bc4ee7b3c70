"""HTTP/1.1 as RFC 9110 and 9112 have it, byte for byte, and a bound for all that a client can send before a request."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from kserve_vllm.servers import http1
from kserve_vllm.servers.listeners import HTTPServer, reserve
from tests.robustness.wire import ask, read_all, read_answer, served, statuses

HOST = b"Host: x\r\n"
LAST = HOST + b"Connection: close\r\n"
GET, POST = b"GET /a HTTP/1.1\r\n", b"POST /a HTTP/1.1\r\n"
UPGRADE = b"Connection: Upgrade\r\nUpgrade: websocket\r\n"
CHUNKED = POST + LAST + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.fixture(scope="module")
def echo() -> Iterator[HTTPServer]:
    with served() as server:
        yield server


# Each row: the promise, the bytes, and the status of every answer.
ROWS: list[tuple[str, bytes, list[int]]] = [
    ("9112, 3: a plain request", GET + LAST + b"\r\n", [200]),
    ("9112, 2.2: empty lines before a request are ignored", b"\r\n\r\nGET /a HTTP/1.1\r\n" + LAST + b"\r\n", [200]),
    ("9112, 3.2: no Host", b"GET /a HTTP/1.1\r\n\r\n", [400]),
    ("9112, 3.2: two Hosts", GET + HOST + b"Host: y\r\n\r\n", [400]),
    ("9112, 3.2: two equal Hosts", GET + HOST + b"Host: x\r\n\r\n", [400]),
    ("9112, 3.2: a Host that is none", b"GET /a HTTP/1.1\r\nHost: a/b\r\n\r\n", [400]),
    ("9112, 3.2: a Host with a user", b"GET /a HTTP/1.1\r\nHost: me@x\r\n\r\n", [400]),
    ("9112, 3.2: two Hosts in one field", b"GET /a HTTP/1.1\r\nHost: x, y\r\n\r\n", [400]),
    ("9112, 3.2: an empty Host is a Host", b"GET /a HTTP/1.1\r\nHost:\r\nConnection: close\r\n\r\n", [200]),
    ("3986, 3.2.2: an address with a port", b"GET /a HTTP/1.1\r\nHost: [::1]:8080\r\nConnection: close\r\n\r\n", [200]),
    ("9112, 3.2: HTTP/1.0 needs no Host", b"GET /a HTTP/1.0\r\n\r\n", [200]),
    ("9112, 3.2: two Hosts in HTTP/1.0", b"GET /a HTTP/1.0\r\nHost: x\r\nHost: y\r\n\r\n", [400]),
    ("9112, 3.2.2: absolute target", b"GET http://x/a HTTP/1.1\r\n" + LAST + b"\r\n", [200]),
    ("9110, 4.2.1: absolute target without a host", b"GET http:///a HTTP/1.1\r\n" + LAST + b"\r\n", [400]),
    ("9110, 4.2.4: absolute target with a user", b"GET http://u:p@x/a HTTP/1.1\r\n" + LAST + b"\r\n", [400]),
    ("9112, 3.2.2: absolute target without a path", b"GET http://x HTTP/1.1\r\n" + LAST + b"\r\n", [200]),
    ("9112, 3.2.2: the same with a query", b"GET http://x?a=b HTTP/1.1\r\n" + LAST + b"\r\n", [200]),
    ("9112, 3.2.3: this is no proxy", b"CONNECT x:443 HTTP/1.1\r\n" + HOST + b"\r\n", [400]),
    ("9112, 2.3: a version that is not spoken", b"GET /a HTTP/2.0\r\n" + LAST + b"\r\n", [505]),
    ("9110, 9.1: a method that is not known", b"BREW /a HTTP/1.1\r\n" + LAST + b"\r\n", [501]),
    ("9110, 9.1: methods are case-sensitive", b"get /a HTTP/1.1\r\n" + LAST + b"\r\n", [501]),
    ("9112, 5.1: no space before the colon", b"GET /a HTTP/1.1\r\nHost : x\r\n\r\n", [400]),
    ("9112, 5.2: no folded fields", GET + HOST + b"A: b\r\n c\r\n\r\n", [400]),
    ("9110, 5.5: no zero in a field", GET + HOST + b"A: b\0c\r\n\r\n", [400]),
    ("9112, 2.2: no bare carriage return", GET + HOST + b"A: b\rc\r\n\r\n", [400]),
    (
        "9112, 6.1: a length and chunks",
        POST + LAST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        [400],
    ),
    ("9112, 6.2: two lengths", POST + LAST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\nabc", [400]),
    ("9112, 6.2: a list of lengths", POST + LAST + b"Content-Length: 2, 2\r\n\r\nab", [400]),
    ("9110, 8.6: a length with a sign", POST + LAST + b"Content-Length: +2\r\n\r\nab", [400]),
    ("9110, 8.6: a length of 5,000 digits", POST + LAST + b"Content-Length: " + b"1" * 5000 + b"\r\n\r\n", [400]),
    (
        "9112, 6.1: a coding that is not known",
        POST + LAST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        [501],
    ),
    ("9112, 6.1: chunks are not last", POST + LAST + b"Transfer-Encoding: chunked, gzip\r\n\r\n", [400]),
    ("9112, 6.1: HTTP/1.0 has no chunks", b"POST /a HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", [400]),
    ("9110, 5.5: a tab behind a length", POST + LAST + b"Content-Length:\t2\t\r\n\r\nab", [200]),
    (
        "a coding that the parser does not understand is not guessed",
        CHUNKED.replace(b"ked", b"ked\t") + b"0\r\n\r\n",
        [501],
    ),
    ("9112, 7.1: a chunk", CHUNKED + b"3\r\nabc\r\n0\r\n\r\n", [200]),
    ("9112, 7.1.1: an extension is ignored", CHUNKED + b"3;a=b\r\nabc\r\n0\r\n\r\n", [200]),
    ("9112, 7.1: a size that is no number", CHUNKED + b"zz\r\nabc\r\n0\r\n\r\n", [400]),
    ("9112, 7.1: a chunk that is longer than its size", CHUNKED + b"3\r\nabcd\r\n0\r\n\r\n", [400]),
    ("9112, 7.1: a size of 5,000 digits", CHUNKED + b"1" * 5000 + b"\r\n", [400]),
    ("9110, 10.1.1: what can't be expected", POST + LAST + b"Expect: a miracle\r\n\r\n", [417]),
    ("9110, 10.1.1: HTTP/1.0 expects nothing", b"GET /a HTTP/1.0\r\nExpect: a miracle\r\n\r\n", [200]),
    (
        "9110, 10.1.1: 100 before a body",
        POST + LAST + b"Expect: 100-Continue\r\nContent-Length: 2\r\n\r\nab",
        [100, 200],
    ),
    (
        "9110, 7.8: another protocol may be ignored",
        GET + HOST + b"Connection: close, upgrade, HTTP2-Settings\r\n"
        b"Upgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n\r\n",
        [200],
    ),
    *(
        (f"9110, 7.8: {what}", head + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n" + rest, [200, 200])
        for what, head, rest in (
            ("and what follows is HTTP/1.1", GET + HOST, b"\r\nGET /b HTTP/1.1\r\n" + LAST + b"\r\n"),
            ("behind a body", POST + HOST, b"Content-Length: 2\r\n\r\nabGET /b HTTP/1.1\r\n" + LAST + b"\r\n"),
            (
                "behind chunks",
                POST + HOST,
                b"Transfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\nGET /b HTTP/1.1\r\n" + LAST + b"\r\n",
            ),
            (
                "twice",
                POST + HOST,
                b"Content-Length: 2\r\n\r\nabPOST /b HTTP/1.1\r\n"
                + HOST
                + b"Connection: close, Upgrade\r\nUpgrade: h2c\r\n"
                b"Content-Length: 2\r\n\r\ncd",
            ),
        )
    ),
    ("6455, 4.1: a handshake is a GET", POST + LAST + UPGRADE + b"Content-Length: 2\r\n\r\nab", [200]),
    ("6455, 4.1: the same without a body", POST + LAST + UPGRADE + b"\r\n", [200]),
    ("6455, 4.2.1: a handshake without a key", GET + HOST + UPGRADE + b"Sec-WebSocket-Version: 13\r\n\r\n", [400]),
    (
        "6455, 4.4: another version of websockets",
        GET + HOST + UPGRADE + b"Sec-WebSocket-Version: 8\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
        [426],
    ),
    (
        "6455, 4.4: two versions of websockets",
        GET + HOST + UPGRADE + b"Sec-WebSocket-Version: 8, 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
        [426],
    ),
    ("a version of websockets is nothing without a handshake", GET + LAST + b"Sec-WebSocket-Version: 8\r\n\r\n", [200]),
    ("9112, 9.3.2: requests in a row", GET + HOST + b"\r\nGET /b HTTP/1.1\r\n" + LAST + b"\r\n", [200, 200]),
    (
        "9112, 9.3.2: the first is answered before the second is refused",
        GET + HOST + b"\r\nGET /b HTTP/1.1\r\n\r\n",
        [200, 400],
    ),
    ("9112, 9.6: nothing is answered behind close", GET + LAST + b"\r\nGET /b HTTP/1.1\r\n" + LAST + b"\r\n", [200]),
    ("a TLS hello", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", [400]),
    ("what begins as HTTP/2's preface", b"PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n", [400]),
    ("bound: fields of a head", GET + HOST + b"a: b\r\n" * http1.MAX_FIELDS + b"\r\n", [431]),
    ("bound: bytes of a head", GET + HOST + (b"a: " + b"b" * 8000 + b"\r\n") * 9 + b"\r\n", [431]),
    ("bound: bytes of one field", GET + HOST + b"a: " + b"b" * (http1.MAX_HEAD + 1), [431]),
    ("bound: bytes of a name", GET + HOST + b"b" * (http1.MAX_HEAD + 1), [431]),
    ("bound: bytes of a target", b"GET /" + b"a" * http1.MAX_TARGET + b" HTTP/1.1\r\n" + LAST + b"\r\n", [414]),
    ("bound: fields behind a body", CHUNKED + b"0\r\n" + b"a: b\r\n" * (http1.MAX_FIELDS + 1) + b"\r\n", [431]),
    ("bound: one field behind a body", CHUNKED + b"0\r\na: " + b"b" * (2 * http1.MAX_FRAMING), [400]),
    ("bound: one extension of a chunk", CHUNKED + b"3;a=" + b"b" * (2 * http1.MAX_FRAMING), [400]),
    ("bound: chunks of one byte", CHUNKED + b"1\r\na\r\n" * http1.MAX_FRAMING, [400]),
]


@pytest.mark.parametrize(("promise", "sent", "expected"), ROWS, ids=[row[0] for row in ROWS])
def test_a_request_is_answered_as_the_rfcs_have_it(
    echo: HTTPServer, promise: str, sent: bytes, expected: list[int]
) -> None:
    answer = ask(echo.port, sent)
    assert statuses(answer) == expected, answer[:400]


def body(answer: bytes) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(answer.rpartition(b"\r\n\r\n")[2])
    return found


def test_fields_behind_a_body_are_no_fields_of_the_request(echo: HTTPServer) -> None:
    # RFC 9110, 6.5.1: a key in a trailer would authenticate.
    answer = body(ask(echo.port, CHUNKED + b"3\r\nabc\r\n0\r\nAuthorization: Bearer k\r\nX: y\r\n\r\n"))
    assert [name for name, _ in answer["headers"]] == ["host", "connection", "transfer-encoding"]
    assert answer["size"] == 3


@pytest.mark.parametrize(
    ("framing", "sent"),
    [
        (b"Content-Length: 300", b"x" * 300),
        (
            b"Transfer-Encoding: chunked",
            b"96\r\n" + b"x" * 150 + b"\r\n96;a=b\r\n" + b"x" * 150 + b"\r\n0\r\nX: y\r\n\r\n",
        ),
    ],
)
@pytest.mark.parametrize("cut", [0, 1, 200])
def test_a_client_that_offers_http2_is_heard_out(echo: HTTPServer, framing: bytes, sent: bytes, cut: int) -> None:
    """Java's client and `curl --http2` offer it with every first request of a connection."""
    offer = b"Connection: close, Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
    head = POST + HOST + offer + framing + b"\r\n\r\n"
    answer = body(ask(echo.port, head + sent[:cut], sent[cut:], pause_s=0.05))
    assert (answer["size"], answer["path"], answer["method"]) == (300, "/a", "POST")
    assert [name for name, _ in answer["headers"]][-1] == framing.partition(b":")[0].decode().lower()
    oversized = POST + HOST + offer + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"
    assert statuses(ask(echo.port, oversized)) == [400]


def test_an_absolute_target_is_a_path(echo: HTTPServer) -> None:
    for target, path in ((b"http://x/a/b", "/a/b"), (b"http://x", "/"), (b"HTTP://x:80?q=1", "/"), (b"/a", "/a")):
        assert body(ask(echo.port, b"GET " + target + b" HTTP/1.1\r\n" + LAST + b"\r\n"))["path"] == path


def test_http_1_0_gets_no_chunks(echo: HTTPServer) -> None:
    # RFC 9112, 6.1 and 6.3.
    head, _, rest = ask(echo.port, b"GET /stream HTTP/1.0\r\n\r\n").partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head.lower()
    assert b"connection: close" in head.lower()
    assert rest == b"part part part "
    head, _, rest = ask(echo.port, b"GET /stream HTTP/1.1\r\n" + LAST + b"\r\n").partition(b"\r\n\r\n")
    assert b"transfer-encoding: chunked" in head.lower()
    head = ask(echo.port, b"HEAD /stream HTTP/1.0\r\n\r\n")
    assert head.endswith(b"\r\n\r\n")


def test_a_version_of_websockets_that_is_not_spoken_is_told_the_one_that_is(echo: HTTPServer) -> None:
    # RFC 6455, 4.4; RFC 9110, 15.5.22 and 7.8.
    head = ask(echo.port, GET + HOST + UPGRADE + b"Sec-WebSocket-Version: 25\r\n\r\n").partition(b"\r\n\r\n")[0].lower()
    for field in (b"sec-websocket-version: 13", b"upgrade: websocket", b"connection: upgrade", b"connection: close"):
        assert b"\r\n" + field in head


class Patient:
    """Answers when it is told to, or notes that its client is gone."""

    def __init__(self) -> None:
        self.asked, self.answer, self.gone = threading.Event(), threading.Event(), threading.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        self.asked.set()
        gone = asyncio.ensure_future(receive())
        while not self.answer.is_set() and not gone.done():
            await asyncio.sleep(0.01)
        if gone.done():
            self.gone.set()
            return
        gone.cancel()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})


SMALL = POST + HOST + b"Content-Length: 2\r\n\r\nab"


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (SMALL, [200]),
        (SMALL + SMALL, [200, 200]),
        (SMALL + b"GET /a HT", [200]),
        (GET + HOST + b"\r\n", [200]),
        (b"GET /a HTTP/1.0\r\n\r\n", [200]),
        (b"POST /a HTTP/1.0\r\nContent-Length: 2\r\n\r\nab", []),  # it can't be found out whether its client is gone
        (POST + HOST + b"Content-Length: 3\r\n\r\nab", []),
    ],
    ids=["a body", "two in a row", "and half a head", "no body", "1.0", "1.0 with a body", "half a body"],
)
def test_who_ends_its_side_is_answered_what_it_has_asked(sent: bytes, expected: list[int]) -> None:
    # RFC 9293, 3.6: a connection has two sides, each ended by who sends on it.
    app = Patient()
    with served(app) as server, socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
        sock.sendall(sent)
        sock.shutdown(socket.SHUT_WR)
        if expected:
            assert app.asked.wait(10)
            assert not app.gone.wait(0.2)
        else:
            assert app.gone.wait(10)
        app.answer.set()
        assert [status for status in statuses(read_all(sock)) if status != 100] == expected


def test_who_is_gone_is_not_taken_for_one_that_has_ended_its_side() -> None:
    app = Patient()
    with served(app) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
            sock.sendall(SMALL)
            assert app.asked.wait(10)
        assert app.gone.wait(10)


@pytest.mark.parametrize("behind", [SMALL, SMALL + SMALL[:40], b"no request\r\n\r\n"], ids=["two", "three", "garbage"])
@pytest.mark.parametrize("abruptly", [False, True])
def test_who_leaves_requests_behind_is_missed(behind: bytes, abruptly: bool) -> None:
    """Nothing is read while one waits behind another, so the kernel has to be asked."""
    app = Patient()
    with served(app) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
            sock.sendall(SMALL + behind)
            assert app.asked.wait(10)
            if abruptly:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        assert app.gone.wait(10)


def test_who_leaves_a_stream_is_missed_with_its_next_part() -> None:
    gone, sent = threading.Event(), 0

    async def streams(scope: Any, receive: Any, send: Any) -> None:
        nonlocal sent
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        left = asyncio.ensure_future(receive())
        while not left.done():
            await send({"type": "http.response.body", "body": b"part", "more_body": True})
            sent += 1
            await asyncio.wait([left], timeout=1.5)
        gone.set()

    with served(streams) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
            sock.sendall(GET + HOST + b"\r\n")
            assert statuses(sock.recv(4096)) == [200]
            time.sleep(0.2)
            before = sent
        assert gone.wait(10)
        assert sent <= before + 1, "the part after the next one would have told, too"


def test_half_a_head_is_not_kept(echo: HTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http1, "HEAD_TIMEOUT_S", 0.3)
    for part in (b"G", GET + HOST + b"", GET + HOST + b"A"):
        assert statuses(ask(echo.port, part)) == [408]
    # However many bytes come meanwhile, one by one.
    began = time.monotonic()
    slow = [bytes([byte]) for byte in GET + HOST + b"" + b"a: b\r\n" * 20]
    assert statuses(ask(echo.port, *slow, pause_s=0.05)) == [408]
    assert time.monotonic() - began < 5
    # A head that is complete has ended it, for its own answer and for the next request.
    with socket.create_connection(("127.0.0.1", echo.port), timeout=10) as sock:
        for _ in range(2):
            sock.sendall(GET + HOST + b"\r\n")
            assert statuses(read_answer(sock)) == [200]
            time.sleep(0.6)


def test_a_body_behind_its_answer_is_read_for_a_while_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuses(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 401, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    head = POST + HOST + b"Content-Length: 100000000\r\n\r\n"
    with served(refuses) as server:
        monkeypatch.setattr(http1, "UNREAD_TIMEOUT_S", 0.3)
        assert statuses(ask(server.port, head, *[b"x"] * 200, pause_s=0.05)) == [401]
        monkeypatch.setattr(http1, "UNREAD_TIMEOUT_S", 60)
        monkeypatch.setattr(http1, "MAX_UNREAD", 1 << 20)
        ask(server.port, head, *[b"x" * 65536] * 200)
        # One that ends in time leaves the connection as it was.
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
            for _ in range(2):
                sock.sendall(POST + HOST + b"Content-Length: 3\r\n\r\n")
                assert statuses(read_answer(sock)) == [401]
                sock.sendall(b"abc")


def test_a_connection_answers_so_many_requests(echo: HTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http1, "MAX_REQUESTS", 3)
    with socket.create_connection(("127.0.0.1", echo.port), timeout=10) as sock:
        for number in range(3):
            sock.sendall(GET + HOST + b"\r\n")
            assert (b"connection: close" in read_answer(sock).lower()) is (number == 2)
        assert sock.recv(1) == b""


def test_so_many_requests_wait_on_a_connection(echo: HTTPServer) -> None:
    one = GET + HOST + b"\r\n"
    assert statuses(ask(echo.port, one * 10 + GET + LAST + b"\r\n")) == [200] * 11
    found = statuses(ask(echo.port, one * 200))
    assert found[-1] == 503
    assert len(found) <= http1.MAX_PIPELINED + 2


def test_a_port_holds_so_many_connections() -> None:
    one = GET + HOST + b"\r\n"
    with served(max_connections=16) as server:
        idle = [socket.create_connection(("127.0.0.1", server.port), timeout=10) for _ in range(40)]
        # A probe gets through, whoever holds connections without a request, or with half of one.
        for sock in idle[-8:]:
            sock.sendall(b"GET /a HT")
        assert statuses(ask(server.port, GET + LAST + b"\r\n")) == [200]
        assert server.connections.open <= 17
        assert server.connections.evicted >= 24
        for sock in idle:
            sock.close()
        busy = [socket.create_connection(("127.0.0.1", server.port), timeout=10) for _ in range(16)]
        for sock in busy:
            sock.sendall(POST + HOST + b"Content-Length: 2\r\n\r\n")
        deadline = time.monotonic() + 10
        while (refused := statuses(ask(server.port, one))) != [503] and time.monotonic() < deadline:
            time.sleep(0.05)
        assert refused == [503]
        for sock in busy:
            sock.sendall(b"ab")
            assert statuses(read_answer(sock)) == [200]
            sock.close()


def test_a_websocket_counts_as_a_connection() -> None:
    handshake = (
        GET + HOST + UPGRADE + b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    with served(max_connections=16) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
            sock.sendall(handshake)
            assert statuses(sock.recv(4096)) == [101]
            assert server.connections.open == 1
            # A frame that says it has 100 MiB (RFC 6455, 7.4.1: 1009).
            sock.sendall(b"\x82\xff" + (100 << 20).to_bytes(8, "big") + b"mask" + b"x" * 1000)
            assert (1009).to_bytes(2, "big") in read_all(sock)
        deadline = time.monotonic() + 10
        while server.connections.open and time.monotonic() < deadline:
            time.sleep(0.02)
        assert server.connections.open == 0


def test_a_handshake_that_is_refused_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    async def refuses(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.http.response.start", "status": 404, "headers": []})
        await send({"type": "websocket.http.response.body", "body": b"no"})

    handshake = (
        GET + HOST + UPGRADE + b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    with served(refuses) as server:
        assert statuses(ask(server.port, handshake)) == [404]
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_client_that_does_not_read_does_not_hold_the_end(caplog: pytest.LogCaptureFixture) -> None:
    # `served` ends with a grace of a second, after which uvicorn cancels what is left and says so.
    with served() as server, socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(10)
        sock.connect(("127.0.0.1", server.port))
        sock.sendall(b"GET /endless HTTP/1.1\r\n" + HOST + b"\r\n")
        deadline = time.monotonic() + 10
        while not any(each.stalled() for each in list(server.uvicorn.server_state.connections)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert "timeout graceful shutdown exceeded" not in caplog.text


def test_no_part_of_an_answer_waits_until_the_one_before_is_acknowledged() -> None:
    """Also on asyncio's own loop, which sets TCP_NODELAY only where the socket that listens says that it is TCP's."""

    async def is_set() -> bool:
        found = asyncio.get_running_loop().create_future()

        async def accept(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            option = writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            writer.close()
            found.set_result(bool(option))

        listening = reserve("127.0.0.1", 0, "--http-port")
        async with await asyncio.start_server(accept, sock=listening) as server:
            _, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            writer.close()
            return bool(await asyncio.wait_for(found, 10))

    with asyncio.Runner() as runner:
        assert runner.run(is_set())
