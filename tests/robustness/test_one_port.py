"""HTTP/1.1, HTTP/2 and gRPC on one port: who answers what, that HTTP/2 gets nothing past what HTTP/1.1 refuses, and
that what a client may make the server hold has an end."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import random
import re
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    InformationalResponseReceived,
    ResponseReceived,
    StreamReset,
)

from kserve_vllm.config.settings import ServerSettings
from kserve_vllm.grpc_server import self_test
from kserve_vllm.grpc_server.http2 import REFUSED_S, Connections
from kserve_vllm.policy.quotas.counters import MemoryCounters
from kserve_vllm.policy.quotas.limiter import Quota, RateLimiter
from kserve_vllm.policy.tenants import Tenants
from kserve_vllm.protocols.oip.grpc_servicer import SERVICE
from kserve_vllm.servers import http1, http2
from kserve_vllm.servers.certificates import Certificates
from kserve_vllm.servers.listeners import GRPCServer, HTTPServer
from tests.http2 import Client
from tests.robustness.test_grpc_intake import INFER, KEYS, Product
from tests.robustness.test_places import CHAT, middleware
from tests.robustness.wire import ask, close_clients, echo, listening, read_answer, served, statuses
from tests.support import not_checked, self_signed, wait_until

Fields = list[tuple[str, str]]


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    """Clients' sockets, after each test."""
    yield
    close_clients()


@pytest.fixture(scope="module")
def port() -> Iterator[HTTPServer]:
    with served() as server:
        yield server


@pytest.fixture
def client(port: HTTPServer) -> Iterator[Client]:
    speaks = Client(port.port)
    yield speaks
    speaks.sock.close()


def inner(server: HTTPServer) -> http2.HTTP2:
    """What has the server's HTTP/2."""
    assert server.http2 is not None
    return server.http2


# Who answers


def test_the_preface_decides_however_it_is_cut(port: HTTPServer) -> None:
    settings = b"\0\0\0\4\0\0\0\0\0"
    for cut in (1, 3, 14, 23):
        with socket.create_connection(("127.0.0.1", port.port), timeout=20) as sock:
            sock.sendall(http1.PREFACE[:cut])
            time.sleep(0.02)
            sock.sendall(http1.PREFACE[cut:] + settings)
            assert sock.recv(9)[3] == 4, "the server's settings"
    # Methods that begin as it does, byte by byte.
    for method in (b"POST", b"PUT", b"PATCH", b"PROPFIND"):
        sent = method + b" /a HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        assert statuses(ask(port.port, sent[:1], sent[1:2], sent[2:], pause_s=0.02)) == [200]
    assert statuses(ask(port.port, http1.PREFACE[:18] + b"XX\r\n\r\n")) == [400]


def test_half_a_preface_is_waited_for_as_long_as_a_head(port: HTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http1, "HEAD_TIMEOUT_S", 0.2)
    assert statuses(ask(port.port, http1.PREFACE[:10])) == [408]


def test_without_http2_a_preface_is_refused() -> None:
    with served(http2=False) as server:
        assert statuses(ask(server.port, http1.PREFACE)) == [400]
        assert server.http2 is None


def test_clients_of_both_versions_are_told_the_same(port: HTTPServer) -> None:
    url = f"http://127.0.0.1:{port.port}"
    with httpx.Client(http1=False, http2=True) as second, httpx.Client() as first:
        for method, path, sent in (
            ("GET", "/a%20b?q=1", b""),
            ("POST", "/b", b"x" * 3_000_000),
            ("HEAD", "/c", b""),
            ("GET", "/stream", b""),
            ("PUT", "/d", b"y"),
            ("OPTIONS", "/e", b""),
        ):
            answers = [client.request(method, url + path, content=sent) for client in (first, second)]
            assert [each.http_version for each in answers] == ["HTTP/1.1", "HTTP/2"]
            one, two = ({name: value for name, value in each.headers.items()} for each in answers)
            assert one.pop("transfer-encoding", "chunked") == "chunked"
            for headers in (one, two):
                headers.pop("date")
                headers.pop("content-length", None)
            assert one == two
            texts = [each.text for each in answers]
            if texts[0].startswith("{"):
                trees = [json.loads(text) for text in texts]
                assert [tree.pop("version") for tree in trees] == ["1.1", "2"]
                for tree in trees:
                    tree["headers"] = sorted(pair for pair in tree["headers"] if pair[0] != "connection")
                texts = [json.dumps(tree) for tree in trees]
            assert texts[0] == texts[1]


def test_curl_speaks_it_too(port: HTTPServer) -> None:
    curl = shutil.which("curl")
    if curl is None or b"HTTP2" not in subprocess.run([curl, "--version"], capture_output=True, check=True).stdout:
        not_checked("curl with HTTP/2 is not here")
    url = f"http://127.0.0.1:{port.port}/a"
    # Of a body this large curl waits for a 100; with none it goes on after a second.
    for size in (3, 2_000_000):
        done = subprocess.run(
            [curl, "-sS", "--http2-prior-knowledge", "--data-binary", "@-", "-w", "\n%{http_version}", url],
            input=b"z" * size,
            capture_output=True,
            check=True,
            timeout=30,
        )
        body, _, version = done.stdout.decode().rpartition("\n")
        assert (version, json.loads(body)["size"]) == ("2", size)


# What HTTP/1.1 refuses is refused, and what HTTP/2 adds is right

TARGETS = [
    "/a",
    "/",
    "//a",
    "/a//b",
    "/%2e%2e/a",
    "/a%0A",
    "/a%00",
    "/a?b=c&d=%20",
    "/a#b",
    "/a;x=1",
    "/A",
    "/%C3%A4",
    "/a%FF",
    "/openai/v1/models",
    "a",
    "*",
    "http:/x",
    "/a b",
    "/\xe4",
    "/a\x01",
    "/" + "a" * http1.MAX_TARGET,
    "/a?" + "b" * 9000,
]
METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND", "QUERY", "M-SEARCH", "BREW", "get"]
HEADS: list[Fields] = [
    [("a", "b")] * 3,
    [("a", "b")] * http1.MAX_FIELDS,
    [("a" * 20, "b" * 7000)] * 10,
    [("a", "b\tc")],
    [("a", "b\x01c")],
    [("a", "b\x7fc")],
    [("a", "\xe4")],
    [("a", "")],
    [("a(b", "c")],
    [("expect", "a miracle")],
]
HOSTS = ["x", "x:8080", "[::1]:8080", "a/b", "me@x", "x, y", "x y"]


def plain(
    port: int, method: str, path: str, fields: Fields, host: str = "x", body: bytes = b""
) -> tuple[int, dict[str, Any]]:
    """Status and body of an answer over HTTP/1.1."""
    lines = [f"{method} {path} HTTP/1.1", f"host: {host}", *(f"{name}: {value}" for name, value in fields)]
    answer = ask(port, "\r\n".join([*lines, "connection: close", "", ""]).encode("latin-1") + body)
    return statuses(answer)[-1], _tree(answer.rpartition(b"\r\n\r\n")[2])


def _tree(body: bytes) -> dict[str, Any]:
    """A body, without what differs between two requests; of a refusal, whose it is counts, and not its sentence."""
    try:
        tree: dict[str, Any] = json.loads(body)
    except ValueError:
        return {}
    tree.pop("version", None)
    if "error" in tree:
        return {"type": tree["error"]["type"]}
    tree["headers"] = [pair for pair in tree.get("headers", []) if pair[0] not in ("connection", "x-request-id")]
    return tree


@pytest.mark.parametrize("path", TARGETS, ids=lambda path: ascii(path[:20]))
def test_a_target_is_taken_or_refused_as_over_http1(port: HTTPServer, client: Client, path: str) -> None:
    answer = client.ask("GET", path)
    assert (answer.status, _tree(answer.body)) == plain(port.port, "GET", path, [])


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_taken_or_refused_as_over_http1(port: HTTPServer, client: Client, method: str) -> None:
    answer = client.ask(method, "/a")
    assert (answer.status, _tree(answer.body)) == plain(port.port, method, "/a", [])


@pytest.mark.parametrize("fields", HEADS, ids=lambda fields: ascii(fields[-1])[:40])
def test_fields_are_taken_or_refused_as_over_http1(port: HTTPServer, client: Client, fields: Fields) -> None:
    answer = client.ask("GET", "/a", *fields)
    status, tree = plain(port.port, "GET", "/a", fields)
    assert answer.status == status
    if status == 200:
        assert _tree(answer.body) == tree
    # The connection goes on: others are on it where a proxy is in between.
    assert client.ask("GET", "/a").status == 200


@pytest.mark.parametrize("host", HOSTS)
def test_an_authority_is_taken_or_refused_as_a_host_is(port: HTTPServer, client: Client, host: str) -> None:
    answer = client.ask("GET", "/a", host=host)
    assert (answer.status, _tree(answer.body)) == plain(port.port, "GET", "/a", [], host)


@pytest.mark.parametrize(
    ("pseudo", "fields"),
    [
        ([], [("host", "y")]),
        ([], [("connection", "keep-alive")]),
        ([], [("upgrade", "websocket")]),
        ([], [("keep-alive", "timeout=1")]),
        ([], [("proxy-connection", "close")]),
        ([], [("transfer-encoding", "chunked")]),
        ([], [("content-length", "0"), ("content-length", "3")]),
        ([(":method", "CONNECT"), (":authority", "x:443")], []),
        (
            [
                (":method", "CONNECT"),
                (":protocol", "websocket"),
                (":scheme", "http"),
                (":path", "/v1/realtime"),
                (":authority", "x"),
            ],
            [],
        ),
        ([(":method", "GET"), (":scheme", "http"), (":path", "/a")], []),
    ],
    ids=[
        "another host",
        "connection",
        "upgrade",
        "keep-alive",
        "proxy-connection",
        "transfer-encoding",
        "two lengths",
        "CONNECT",
        "extended CONNECT",
        "no host",
    ],
)
def test_what_has_no_place_in_http2_reaches_no_app(
    client: Client, port: HTTPServer, monkeypatch: pytest.MonkeyPatch, pseudo: Fields, fields: Fields
) -> None:
    reached: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        reached.append(scope["path"])
        await echo(scope, receive, send)

    monkeypatch.setattr(inner(port), "app", app)
    usual = [(":method", "GET"), (":scheme", "http"), (":path", "/a"), (":authority", "x")]
    client.h2.send_headers(1, [*(pseudo or usual), *fields], end_stream=True)
    client.flush()
    ended = client.until(lambda e: isinstance(e, (ConnectionTerminated, StreamReset, ResponseReceived)))
    if isinstance(ended, ResponseReceived):
        assert client.answer(1).status == 400
    assert not reached


def test_cookies_are_joined_and_the_authority_is_the_host(client: Client) -> None:
    answer = client.ask("GET", "/a", ("cookie", "a=1"), ("x", "y"), ("cookie", "b=2"), host="h:1")
    assert json.loads(answer.body)["headers"] == [["host", "h:1"], ["x", "y"], ["cookie", "a=1; b=2"]]


def test_fields_behind_a_body_are_no_fields_of_the_request(client: Client) -> None:
    stream = client.begin("POST", "/a", end=False)
    client.h2.send_data(stream, b"abc")
    client.h2.send_headers(stream, [("authorization", "Bearer k")], end_stream=True)
    client.flush()
    found = json.loads(client.answer(stream).body)
    assert found["headers"] == [["host", "x"], ["transfer-encoding", "chunked"]]
    assert found["size"] == 3


def test_100_is_said_where_it_is_expected(client: Client) -> None:
    stream = client.begin("POST", "/a", ("expect", "100-continue"), ("content-length", "2"), end=False)
    client.until(lambda e: isinstance(e, InformationalResponseReceived))
    client.send(stream, b"ab")
    assert client.answer(stream).status == 200


def test_a_body_that_is_not_read_is_passed_over_when_the_answer_is_there() -> None:
    async def hasty(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 204, "headers": [(b"connection", b"close")]})
        await send({"type": "http.response.body", "body": b""})

    with served(hasty) as server:
        client = Client(server.port)
        for _ in range(3):
            stream = client.begin("POST", "/a", end=False)
            answer = client.answer(stream)
            assert (answer.status, answer.body, "connection" in answer.headers) == (204, b"", False)
        assert inner(server).unread == 0


@pytest.mark.parametrize("started", [False, True])
def test_an_app_that_fails_is_no_answer_that_looks_whole(started: bool, caplog: pytest.LogCaptureFixture) -> None:
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        if started:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"half", "more_body": True})
        if scope["path"] == "/raise":
            raise RuntimeError("no")

    with served(broken) as server, caplog.at_level(logging.CRITICAL):
        client = Client(server.port)
        for path in ("/raise", "/return"):
            answer = client.ask("GET", path)
            assert (answer.reset == ErrorCodes.INTERNAL_ERROR) if started else (answer.status == 500)
        assert not inner(server).requests


# A client that does not take, or goes


def test_an_answer_waits_for_its_client_and_ends_with_it(port: HTTPServer) -> None:
    client = Client(port.port, window=100_000)
    stream = client.begin("GET", "/endless")
    wait_until(lambda: len(inner(port).requests) == 1, 10, "the request did not come")
    (request,) = inner(port).requests
    wait_until(lambda: request.pending_bytes > http2.MAX_UNTAKEN, 10, "nothing waits")
    time.sleep(0.1)
    assert request.pending_bytes <= http2.MAX_UNTAKEN + 65536, "one message more than the bound"
    client.h2.reset_stream(stream, ErrorCodes.CANCEL)
    client.flush()
    wait_until(lambda: not inner(port).requests and not inner(port).tasks, 10, "its app did not end")
    assert client.ask("GET", "/a").status == 200, "the connection goes on"
    # With the connection, too.
    client.begin("GET", "/endless")
    wait_until(lambda: len(inner(port).tasks) == 1, 10, "the request did not come")
    client.sock.close()
    wait_until(lambda: not inner(port).tasks, 10, "its app did not end")


def test_a_window_that_grows_lets_an_answer_go_on(port: HTTPServer) -> None:
    client = Client(port.port, window=5)
    stream = client.begin("GET", "/stream")
    client.until(lambda e: isinstance(e, DataReceived), take=False)
    client.h2.increment_flow_control_window(100, stream)
    client.flush()
    assert client.answer(stream).body == b"part part part "
    client.sock.close()


def test_bodies_that_nobody_reads_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    async def deaf(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(0.5)
        await echo(scope, receive, send)

    monkeypatch.setattr(http2, "MAX_UNREAD_BODIES", 20_000)
    with served(deaf) as server:
        client = Client(server.port)
        streams = [client.begin("POST", "/a", end=False) for _ in range(3)]
        for stream in streams:
            client.send(stream, bytes(9_000))
        assert [client.answer(stream).status for stream in streams] == [200, 200, 503]
        assert inner(server).unread == 0


def test_connections_of_both_versions_are_counted_together() -> None:
    with served(max_connections=16) as server:
        oldest, *clients = [Client(server.port) for _ in range(16)]
        for client in clients:
            assert client.ask("GET", "/a").status == 200
        assert server.connections.open == 16
        # The one that has waited longest goes; one that has a request stays.
        assert statuses(ask(server.port, b"GET /a HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")) == [200]
        with pytest.raises(ConnectionError):
            oldest.until(lambda e: False)
        for client in clients:
            client.begin("GET", "/endless")
        wait_until(lambda: len(inner(server).requests) == 15, 10, "the requests did not come")
        with socket.create_connection(("127.0.0.1", server.port)) as last:
            last.sendall(b"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n")
            wait_until(lambda: server.connections.open == 16, 10, "it did not come")
            time.sleep(0.05)
            assert statuses(ask(server.port, b"")) == [503]
        for client in clients:
            client.sock.close()
        wait_until(lambda: server.connections.open == 0, 10, "they are counted for ever")


def test_requests_at_once_are_bounded_and_who_takes_nothing_makes_room() -> None:
    with served(max_connections=16) as server:
        busy, stalled = Client(server.port), Client(server.port, window=0)
        streams = [busy.begin("GET", "/endless") for _ in range(10)]
        for _ in range(6):
            stalled.begin("GET", "/a")
        wait_until(lambda: len(inner(server).requests) == 16, 10, "the requests did not come")
        other = Client(server.port)
        assert other.ask("GET", "/a").status == 200
        with pytest.raises(ConnectionError):
            stalled.until(lambda e: False)
        streams += [busy.begin("GET", "/endless") for _ in range(6)]
        wait_until(lambda: len(inner(server).requests) == 16, 10, "the requests did not come")
        refused = other.ask("GET", "/a")
        assert refused.status == 503
        assert b"--max-connections" in refused.body
        for each in (busy, other):
            each.sock.close()


def test_a_connection_that_waits_is_sent_away_as_one_of_http1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kserve_vllm.servers.listeners._KEEP_ALIVE_S", 0.3)
    with served() as server:
        client = Client(server.port)
        assert client.ask("GET", "/a").status == 200
        gone = client.until(lambda e: isinstance(e, ConnectionTerminated))
        assert isinstance(gone, ConnectionTerminated)
        assert gone.error_code == ErrorCodes.NO_ERROR
        wait_until(lambda: server.connections.open == 0, 10, "it stays")


def test_an_access_line_is_as_that_of_http1(caplog: pytest.LogCaptureFixture) -> None:
    with served(access_log=True) as server, caplog.at_level(logging.INFO, "uvicorn.access"):
        Client(server.port).ask("GET", "/a?b=c")
        httpx.get(f"http://127.0.0.1:{server.port}/a?b=c")
    lines = [
        re.sub(r":[0-9]+ ", ":0 ", record.getMessage()) for record in caplog.records if record.name == "uvicorn.access"
    ]
    assert lines == [f'127.0.0.1:0 - "GET /a?b=c HTTP/{version}" 200' for version in ("2", "1.1")]


def test_random_frames_leave_nothing_behind(port: HTTPServer) -> None:
    rng = random.Random(7)
    head = b"\x82\x86\x84\x41\x01x"  # GET, http, /, and an authority
    for _ in range(120):
        with socket.create_connection(("127.0.0.1", port.port), timeout=10) as sock:
            sent = http1.PREFACE + b"\0\0\0\4\0\0\0\0\0"
            for _ in range(rng.randint(1, 12)):
                kind = rng.choice([0, 0, 1, 1, 1, 2, 3, 4, 6, 7, 8, 9, 20])
                payload = head if kind == 1 and rng.random() < 0.8 else rng.randbytes(rng.choice([0, 1, 4, 5, 8, 300]))
                stream = rng.choice([0, 1, 3, 5, 7])
                sent += len(payload).to_bytes(3, "big") + bytes([kind, rng.choice([0, 1, 4, 5, 5, 12])])
                sent += stream.to_bytes(4, "big") + payload
            sock.sendall(sent)
            sock.settimeout(0.02)
            with contextlib.suppress(OSError):
                sock.recv(65536)
    wait_until(lambda: not inner(port).requests and not inner(port).tasks, 10, "requests are left")
    wait_until(lambda: port.connections.open == 0, 20, "connections are left")
    assert inner(port).unread == 0
    assert Client(port.port).ask("GET", "/a").status == 200


# The end of the server


def test_what_is_open_ends_whole_after_the_goodbye() -> None:
    with served() as server:
        client = Client(server.port, window=5)
        stream = client.begin("GET", "/stream")
        client.until(lambda e: isinstance(e, DataReceived), take=False)
        loop = next(iter(inner(server).connections)).loop
        loop.call_soon_threadsafe(server.leave)
        # h2's client reads nothing after a goodbye, so this reads the frames.
        client.sock.sendall(b"\0\0\4\x08\0" + stream.to_bytes(4, "big") + (100).to_bytes(4, "big"))
        data = b""
        while more := client.sock.recv(65536):
            data += more
        last = b"\0\0\5\0\1" + stream.to_bytes(4, "big") + b"part "
        assert (data.count(b"part "), last in data) == (2, True), data
        assert data.find(b"\0\0\x08\x07\0") > data.index(last), "the goodbye comes behind the end"
        assert b"\0\0\4\x03\0" not in data, "no reset"
        settled = asyncio.run_coroutine_threadsafe(server.settle(1), loop)
        settled.result(5)
        assert server.connections.open == 0


def test_the_end_waits_for_no_client_that_takes_nothing() -> None:
    with served() as server:
        stalled, slow = Client(server.port, window=0), Client(server.port)
        stalled.begin("GET", "/endless")
        slow.begin("POST", "/a", end=False)
        wait_until(lambda: len(inner(server).requests) == 2, 10, "the requests did not come")
        loop = next(iter(inner(server).connections)).loop
        began = time.monotonic()
        asyncio.run_coroutine_threadsafe(server.stop(0.5), loop).result(20)
        assert time.monotonic() - began < 10
        assert not inner(server).connections
        assert not inner(server).tasks


# gRPC beside it, with keys


class OnePort(Product):
    """The edge and the service, both with the key file, on one port."""

    def __init__(self, folder: Path, kind: str = "own", **files: Any) -> None:
        super().__init__(folder, kind)
        counters = {"limits": RateLimiter(MemoryCounters()), "service": Quota("service", 1000, None, None)}
        self.edge = middleware(tenants=Tenants(str(folder / "keys.json")), **counters)
        self.do(self._open(files))

    async def _open(self, files: dict[str, Any]) -> None:
        shown = Certificates(files["ssl_certfile"], files["ssl_keyfile"], {}) if files else None
        self.http = HTTPServer(self.edge, ServerSettings(host="127.0.0.1", **files), 0, certificates=shown)
        self.http.start()
        await self.http.join(self._server)
        await listening(self.http)

    def end(self) -> None:
        self.do(self.http.stop(0))
        super().end()


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OnePort]:
    running = OnePort(tmp_path_factory.mktemp("one"))
    yield running
    running.end()


def _calls(channel: grpc.Channel) -> None:
    """grpcurl's list and describe, health, and a call that needs a key."""
    asked = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        *(
            reflection_pb2.ServerReflectionRequest(file_containing_symbol=symbol)
            for symbol in (
                SERVICE,
                f"{SERVICE}.ModelInfer",
                "inference.ModelInferRequest.id",
                f"{SERVICE}.Nothing",
                "inference.ModelInferRequest.nothing",
                "nothing",
            )
        ),
    ]
    listed, *described = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter(asked), timeout=20)
    assert SERVICE in {each.name for each in listed.list_services_response.service}
    found = [bool(each.file_descriptor_response.file_descriptor_proto) for each in described]
    assert found == [True, True, True, False, False, False]
    health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=20)
    assert health.status == health_pb2.HealthCheckResponse.SERVING
    infer = channel.unary_unary(INFER)
    for metadata, code in (
        ((), grpc.StatusCode.UNAUTHENTICATED),
        ((("authorization", f"Bearer {KEYS['alpha']}"),), grpc.StatusCode.INVALID_ARGUMENT),
    ):
        with pytest.raises(grpc.RpcError) as raised:
            infer(b"", timeout=20, metadata=metadata)
        assert raised.value.code() is code


def test_grpc_is_answered_on_both_ports_under_the_same_keys(one: OnePort) -> None:
    for port in (one.port, one.http.port):
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            _calls(channel)


def test_one_connection_has_calls_and_requests(one: OnePort) -> None:
    client = Client(one.http.port)
    call = client.begin(
        "POST", f"/{SERVICE}/ServerLive", ("content-type", "application/grpc"), ("te", "trailers"), end=False
    )
    request = client.begin("GET", "/v2/health/live")
    client.send(call, b"\0" * 5)
    assert client.answer(request).status == 200
    answered = client.answer(call)
    assert (answered.headers["content-type"], answered.body[:5]) == ("application/grpc", b"\0\0\0\0\2")
    # gRPC-web is another protocol, and a second type could be read in two ways: neither is a call.
    for kinds in (["application/grpc-web"], ["application/grpcx"], ["application/json", "application/grpc"]):
        fields = [("content-type", kind) for kind in kinds]
        refused = client.ask("POST", f"/{SERVICE}/ServerLive", *fields, body=b"\0" * 5)
        expected = 401 if len(kinds) == 1 else 400
        assert (refused.status, refused.headers["content-type"]) == (expected, "application/json")
    client.sock.close()


REQUESTS: list[tuple[str, str, Fields, bytes]] = [
    ("GET", "/v2/health/ready", [], b""),
    ("GET", "/metrics", [], b""),
    ("GET", "/version", [], b""),
    ("POST", CHAT, [], b'{"model": "demo"}'),
    ("POST", CHAT, [("authorization", "Bearer wrong")], b'{"model": "demo"}'),
    ("POST", CHAT, [("x-api-key", KEYS["alpha"])], b'{"model": "demo"}'),
    ("POST", CHAT, [("authorization", f"Bearer {KEYS['alpha']}")], b'{"model": "demo"}'),
    ("POST", CHAT, [("authorization", f"Bearer {KEYS['alpha']}")], b"[" * 400_000),
    ("POST", CHAT, [("authorization", f"Bearer {KEYS['alpha']}")] * 2, b"{}"),
    ("POST", CHAT + "/", [("authorization", f"Bearer {KEYS['beta']}")], b"{}"),
    ("POST", "/openai" + CHAT, [("authorization", f"Bearer {KEYS['beta']}")], b"{}"),
    ("POST", CHAT + "%0A", [("authorization", f"Bearer {KEYS['beta']}")], b"{}"),
    ("POST", CHAT + "%0A", [], b"{}"),
    ("POST", "/v1//chat/completions", [("authorization", f"Bearer {KEYS['beta']}")], b"{}"),
    ("GET", CHAT, [("authorization", f"Bearer {KEYS['beta']}")], b""),
    ("POST", "/v2/repository/models/demo/load", [("authorization", f"Bearer {KEYS['beta']}")], b"{}"),
    ("POST", CHAT, [("authorization", f"Bearer {KEYS['beta']}"), ("content-encoding", "br")], b"{}"),
    ("OPTIONS", CHAT, [("origin", "https://a"), ("access-control-request-method", "POST")], b""),
]
OF_ONE_REQUEST = {"date", "x-request-id", "connection", "transfer-encoding", "content-length"}


@pytest.mark.parametrize("row", REQUESTS, ids=lambda row: f"{row[0]} {row[1]} {len(row[2])} {len(row[3])}")
def test_a_policy_says_the_same_over_both_versions(one: OnePort, row: tuple[str, str, Fields, bytes]) -> None:
    method, path, fields, body = row
    sized = [*fields, ("content-length", str(len(body)))] if body else fields
    lines = [f"{method} {path} HTTP/1.1", "host: x", *(f"{name}: {value}" for name, value in sized), "", ""]
    with socket.create_connection(("127.0.0.1", one.http.port), timeout=20) as sock:
        sock.sendall("\r\n".join(lines).encode() + body)
        head, _, said = read_answer(sock).partition(b"\r\n\r\n")
    status, *rest = head.decode().split("\r\n")
    first = {name.lower(): value for name, value in (line.split(": ", 1) for line in rest)}
    client = Client(one.http.port)
    stream = client.begin(method, path, *sized, end=not body)
    for at in range(0, len(body), 16_384):
        while client.h2.local_flow_control_window(stream) < 16_384:
            client.more()
        client.send(stream, body[at : at + 16_384], end=at + 16_384 >= len(body))
    second = client.answer(stream)
    client.sock.close()
    assert second.status == int(status.split()[1])
    if path != "/metrics":
        said, body = (
            re.sub(rb'[0-9a-f]{32}|"version": "[12.]+"|"seconds":[0-9.]+', b"", each) for each in (said, second.body)
        )
        assert body == said
    ours, theirs = (
        {n: v for n, v in headers.items() if n not in OF_ONE_REQUEST and not n.startswith("x-ratelimit-re")}
        for headers in (first, second.headers)
    )
    assert ours == theirs


def test_a_body_over_the_limit_is_refused_by_its_length_or_its_size(one: OnePort) -> None:
    client = Client(one.http.port)
    key = ("authorization", f"Bearer {KEYS['alpha']}")
    stream = client.begin("POST", CHAT, key, ("content-length", str(2 << 20)), end=False)
    assert client.answer(stream).status == 413
    # Without a length: when too much of it has come.
    stream = client.begin("POST", CHAT, key, end=False)
    sent = 0
    while not any(isinstance(e, ResponseReceived) and e.stream_id == stream for e in client.found):
        if client.h2.local_flow_control_window(stream) >= 16_384:
            client.send(stream, bytes(16_384), end=False)
            sent += 16_384
        else:
            client.more()
    assert client.answer(stream).status == 413
    assert 1 << 20 <= sent <= 2 << 20
    client.sock.close()


def test_keyless_calls_of_both_ports_are_counted_together(one: OnePort, monkeypatch: pytest.MonkeyPatch) -> None:
    from kserve_vllm.grpc_server import calls

    monkeypatch.setattr(calls, "MAX_KEYLESS_CALLS", 6)
    watch = ("POST", "/grpc.health.v1.Health/Watch", ("content-type", "application/grpc"), ("te", "trailers"))
    greedy, other = Client(one.http.port), Client(one.port)

    def keyless() -> int:
        return sum(each.keyless for each in (*inner(one.http).connections, *one.services.connections))

    for client, count in ((greedy, 4), (other, 2)):
        before = keyless()
        for _ in range(count):
            client.send(client.begin(*watch, end=False), b"\0" * 5)
        wait_until(lambda all_of_them=before + count: keyless() == all_of_them, 10, "calls are missing")  # type: ignore[misc]
    other.send(other.begin(*watch, end=False), b"\0" * 5)
    with pytest.raises(ConnectionError):
        greedy.until(lambda e: isinstance(e, ConnectionError))
    other.sock.close()


def test_grpcios_server_keeps_its_port_and_this_one_says_so(tmp_path: Path) -> None:
    running = OnePort(tmp_path, "grpcio")
    try:
        assert not running.http.answers_grpc
        with grpc.insecure_channel(f"127.0.0.1:{running.port}") as channel:
            _calls(channel)
        with grpc.insecure_channel(f"127.0.0.1:{running.http.port}") as channel, pytest.raises(grpc.RpcError) as raised:
            channel.unary_unary(INFER)(b"", timeout=20)
        assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert f"port {running.port}" in str(raised.value.details())
        assert Client(running.http.port).ask("GET", "/v2/health/live").status == 200
    finally:
        running.end()


def test_where_h2_does_not_work_http2_is_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fails() -> None:
        raise self_test.SelfTestError("as it were")

    monkeypatch.setattr(self_test, "check", fails)
    running = OnePort(tmp_path, "auto")
    try:
        assert statuses(ask(running.http.port, http1.PREFACE)) == [400]
        assert statuses(ask(running.http.port, b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")) == [200]
    finally:
        running.end()
    assert "HTTP/2 is off" in caplog.text


def test_a_server_without_a_port_of_its_own_answers_beside_http(tmp_path: Path) -> None:
    running = OnePort(tmp_path)

    async def alone() -> tuple[GRPCServer, HTTPServer]:
        settings = ServerSettings(host="127.0.0.1", grpc_port=0)
        server = GRPCServer(running.servicer, settings, running.lifecycle, listen=False)
        await server.start()
        http = HTTPServer(running.edge, settings, 0)
        http.start()
        await http.join(server)
        return server, http

    server, http = running.do(alone())
    try:
        assert server.port == 0
        with grpc.insecure_channel(f"127.0.0.1:{http.port}") as channel:
            _calls(channel)
    finally:
        running.do(http.stop(0))
        running.do(server.stop(0))
        running.end()


def test_with_tls_the_client_chooses_by_alpn(tmp_path: Path) -> None:
    cert, key = self_signed(tmp_path)
    files = {"ssl_certfile": str(cert), "ssl_keyfile": str(key)}
    running = OnePort(tmp_path, **files)
    try:
        trust = ssl.create_default_context(cafile=files["ssl_certfile"])
        url = f"https://localhost:{running.http.port}/v2/health/live"
        for wanted, version in ((True, "HTTP/2"), (False, "HTTP/1.1")):
            with httpx.Client(http2=wanted, verify=trust) as client:
                assert client.get(url).http_version == version
        credentials = grpc.ssl_channel_credentials(cert.read_bytes())
        with grpc.secure_channel(f"localhost:{running.http.port}", credentials) as channel:
            _calls(channel)
    finally:
        running.end()


def test_who_has_shown_no_key_is_a_stranger_until_it_does(tmp_path: Path) -> None:
    """Its frames, and requests that are refused, get the share of the event loop that they get on gRPC's port."""
    rows = [{"id": "a", "tenant": "a", "sha256": hashlib.sha256(KEYS["alpha"].encode()).hexdigest()}]
    (tmp_path / "keys.json").write_text(json.dumps({"keys": rows}))
    with served(middleware(tenants=Tenants(str(tmp_path / "keys.json")))) as server:
        strangers = inner(server).connections._strangers
        client = Client(server.port)
        assert client.ask("POST", CHAT, ("content-type", "application/json"), body=b"{}").status == 401
        assert client.ask("GET", "/version").status == 200
        assert len(strangers) == 1
        answer = client.ask(
            "POST", CHAT, ("content-type", "application/json"), ("authorization", f"Bearer {KEYS['alpha']}"), body=b"{}"
        )
        assert answer.status == 200
        assert not strangers
        client.sock.close()


def test_a_refused_request_counts_for_what_it_costs_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its app runs when it has been read: a stranger's requests would else take the loop's time for nothing."""
    counted: list[float] = []
    monkeypatch.setattr(Connections, "count", lambda self, connection, read_s: counted.append(read_s))
    with served() as server:
        client = Client(server.port)
        for _ in range(3):
            assert client.ask("GET", "/a").status == 200
        client.sock.close()
    assert counted.count(REFUSED_S) == 3
