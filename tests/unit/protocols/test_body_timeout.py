"""A body that does not come holds no place: over real sockets, with apps that read it in their own ways."""

from __future__ import annotations

import asyncio
import functools
import itertools
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvloop
from fastapi import FastAPI, Request
from prometheus_client import CollectorRegistry
from pydantic import BaseModel

from kserve_vllm.cli import command as cli
from kserve_vllm.config.settings import ServerSettings
from kserve_vllm.core.lifecycle import Lifecycle, State
from kserve_vllm.core.request_context import RequestContext
from kserve_vllm.core.types import Priority
from kserve_vllm.policy.enforcement import Enforcement, Policies
from kserve_vllm.policy.priority_queue import PriorityQueue
from kserve_vllm.protocols.http.body import TimedBody
from kserve_vllm.protocols.http.middleware import RequestMiddleware
from kserve_vllm.servers.listeners import HTTPServer
from kserve_vllm.telemetry.metrics import Metrics
from kserve_vllm.telemetry.requests import RequestRecorder
from kserve_vllm.telemetry.tracing import Tracing
from tests.robustness.wire import listening
from tests.support import Routed

CHAT, MESSAGES, EMBEDDINGS, PREDICT = "/v1/chat/completions", "/v1/messages", "/v1/embeddings", "/v1/models/m:predict"
FORM = "/v1/audio/transcriptions"
LIMIT_S, LONGER_S = 0.3, 0.7
BODY = b'{"text": "0123456789"}'
LENGTH = f"content-length: {len(BODY)}\r\n".encode()
CHUNKED = b"transfer-encoding: chunked\r\n"


class Body(BaseModel):
    text: str


async def plain(scope: Any, receive: Any, send: Any) -> None:
    """Reads as a plain ASGI app does, and answers with what it read after a while, looking out for the client."""
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
        if message["type"] == "http.disconnect":
            return
    leaving = asyncio.ensure_future(receive())
    await asyncio.wait([leaving], timeout=LONGER_S if b"slowly" in body else 0)
    leaving.cancel()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


class Fast:
    """Stands before vLLM's app, as `FastPath`."""

    async def __call__(self, scope: Any, receive: Any, send: Any, body_send: Any) -> None:
        await plain(scope, receive, send)


def frameworks() -> FastAPI:
    """Reads as FastAPI does, which makes 400 of whatever is raised meanwhile, and as Starlette does."""
    app = FastAPI()

    @app.post(CHAT)
    @app.post(EMBEDDINGS)
    @app.post(FORM)
    @app.post(MESSAGES)
    async def typed(body: Body) -> str:
        return body.text

    @app.post(PREDICT)
    async def raw(request: Request) -> str:
        return (await request.body()).decode()

    return app


class Served:
    """An edge on a port of its own."""

    def __init__(self, limit_s: float) -> None:
        lifecycle = Lifecycle()
        lifecycle.to(State.READY)
        self.admission = PriorityQueue(1, 8, {}, 60, {})
        self.enforcement = Enforcement(lifecycle, Policies(admission=self.admission))
        self.metrics = Metrics(lifecycle, lambda: 0, registry=CollectorRegistry())
        self.closed: list[RequestContext] = []
        recorder = RequestRecorder(self.metrics, Tracing(), lifecycle, self.closed.append)
        middleware = RequestMiddleware(
            lifecycle, self.enforcement, 1 << 20, self.metrics.render, dict, recorder, body_timeout_s=limit_s
        )
        app = frameworks()

        async def vllm(scope: Any, receive: Any, send: Any) -> None:
            await (plain if scope["path"] == EMBEDDINGS else app)(scope, receive, send)

        middleware.attach(
            Routed(app, "/v1/models/{model_name}:predict"),
            Routed(vllm, CHAT, EMBEDDINGS, FORM, MESSAGES),
            {CHAT: Fast()},  # type: ignore[dict-item]
        )
        self.server = HTTPServer(middleware, ServerSettings(host="127.0.0.1"), 0)

    async def ask(self, head: bytes, *parts: bytes, path: str = CHAT, every_s: float = 0.0) -> tuple[int, bytes]:
        """Send a request's parts and read to the connection's end; the status and the whole answer."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.server.port)
        kind = "text/plain" if path == FORM else "application/json"  # JSON is read by the edge first
        writer.write(f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: {kind}\r\n".encode() + head + b"\r\n")
        reading = asyncio.ensure_future(reader.read())
        for part in parts:
            await asyncio.sleep(every_s)
            for _ in range(5):  # what the server, on this loop, did meanwhile is read before more is sent
                await asyncio.sleep(0)
            if reading.done():
                break
            writer.write(part)
        answer = await asyncio.wait_for(reading, 20)
        writer.close()
        return int(answer.split(b" ", 2)[1]), answer

    def nothing_is_held(self) -> bool:
        stats = self.admission.stats()
        return (self.enforcement.in_flight, stats["in_use"], stats["waiting"]) == (0, 0, 0)


@asynccontextmanager
async def serving(limit_s: float = LIMIT_S) -> AsyncIterator[Served]:
    served = Served(limit_s)
    served.server.start()
    await listening(served.server)
    try:
        yield served
        assert served.nothing_is_held()
    finally:
        await served.server.stop(1)


def together(works: Sequence[Callable[[Served], Awaitable[None]]], limit_s: float = LIMIT_S) -> None:
    """Each at a server of its own, all at the same time."""

    async def one(work: Callable[[Served], Awaitable[None]]) -> None:
        async with serving(limit_s) as served:
            await work(served)

    async def go() -> None:
        await asyncio.gather(*map(one, works))

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:  # as the server
        runner.run(go())


def run(work: Callable[[Served], Awaitable[None]], limit_s: float = LIMIT_S) -> None:
    together([work], limit_s)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


NEVER = {
    "nothing": (LENGTH, ()),
    "half": (LENGTH, (BODY[:9],)),
    "in drips": (LENGTH, tuple(BODY[i : i + 1] for i in range(len(BODY)))),
    "chunks without an end": (CHUNKED, (chunk(BODY),)),
    "chunks in drips": (CHUNKED, tuple(chunk(BODY[i : i + 1]) for i in range(len(BODY)))),
    "nothing after 100": (LENGTH + b"expect: 100-continue\r\n", ()),
}


async def _is_answered_408(served: Served, path: str, how: str) -> None:
    head, parts = NEVER[how]
    began = time.monotonic()
    # Not just when the connection is closed: what comes after that takes the answer away.
    status, answer = await served.ask(head, *parts, path=path, every_s=0.11)
    # The server's loop counts in whole milliseconds, from the beginning of the pass in which the clock is set.
    assert LIMIT_S - 0.01 <= time.monotonic() - began < LIMIT_S + 5, how
    answer = answer.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
    status, headers, body = int(answer[9:12]), *answer.split(b"\r\n\r\n", 1)
    assert status == 408, how  # a body in drips is complete in the end
    assert b"connection: close" in headers
    sentence = "the body did not come within 0.3 s (--body-timeout)"
    tree = json.loads(body)
    assert (tree.pop("request_id", None) is not None) is (path == MESSAGES)
    assert tree == {
        PREDICT: {"error": sentence},
        MESSAGES: {"type": "error", "error": {"type": "timeout_error", "message": sentence}},
    }.get(path, {"error": {"message": sentence, "type": "RequestTimeoutError", "param": "body", "code": None}})
    assert served.nothing_is_held(), how
    (context,) = served.closed
    assert (context.status, context.outcome) == (408, "refused"), how
    assert b'reason="body_timeout"} 1.0' in served.metrics.render("")[0]


@pytest.mark.parametrize("path", [CHAT, MESSAGES, EMBEDDINGS, FORM, PREDICT])
def test_a_body_that_does_not_come_is_answered_408_and_holds_nothing(path: str) -> None:
    """In each way, each at a server of its own; they wait at the same time."""
    together([functools.partial(_is_answered_408, path=path, how=how) for how in NEVER])


def test_a_body_in_pieces_that_comes_in_time_is_read() -> None:
    pieces = [BODY[:5], BODY[5:12], BODY[12:]]

    async def is_read(served: Served, path: str, head: bytes) -> None:
        parts = [*map(chunk, pieces), b"0\r\n\r\n"] if head is CHUNKED else pieces
        status, answer = await served.ask(b"connection: close\r\n" + head, *parts, path=path, every_s=0.05)
        assert status == 200, (path, head)
        assert b"0123456789" in answer

    kinds = itertools.product([CHAT, MESSAGES, EMBEDDINGS, PREDICT], [LENGTH, CHUNKED])
    together([functools.partial(is_read, path=path, head=head) for path, head in kinds], limit_s=5)


@pytest.mark.parametrize("parts", [(b"slowly",), (b"slow", b"ly")])
def test_only_the_body_is_timed_and_never_the_answer(parts: tuple[bytes, ...]) -> None:
    async def ask(served: Served) -> None:
        began = time.monotonic()
        status, answer = await served.ask(b"connection: close\r\ncontent-length: 6\r\n", *parts, every_s=0.05)
        assert status == 200
        assert b"slowly" in answer
        assert time.monotonic() - began > LIMIT_S + 0.2

    run(ask)


def test_zero_switches_the_limit_off() -> None:
    async def ask(served: Served) -> None:
        status, _ = await served.ask(b"connection: close\r\n" + LENGTH, BODY[:5], BODY[5:], every_s=0.4)
        assert status == 200

    run(ask, limit_s=0)


def test_a_body_that_does_not_come_while_its_request_waits_leaves_the_queue() -> None:
    async def ask(served: Served) -> None:
        with await served.admission.acquire(Priority.NORMAL):
            status, _ = await served.ask(LENGTH, BODY[:5])
            assert status == 408
            assert served.admission.stats()["waiting"] == 0
            assert served.enforcement.in_flight == 0

    run(ask)


def test_a_client_that_leaves_before_its_body_is_complete_is_gone_and_not_late() -> None:
    async def ask(served: Served) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.server.port)
        writer.write(b"POST " + CHAT.encode() + b" HTTP/1.1\r\nhost: x\r\n" + LENGTH + b"\r\n" + BODY[:5])
        await asyncio.sleep(0.1)
        assert not served.nothing_is_held()
        writer.close()
        await asyncio.sleep(0.1)
        assert [context.outcome for context in served.closed] == ["cancelled"]
        del reader

    run(ask)


def test_a_drain_waits_for_no_body_longer_than_that() -> None:
    async def ask(served: Served) -> None:
        asking = asyncio.ensure_future(served.ask(LENGTH, BODY[:5]))
        await asyncio.sleep(0.1)
        served.enforcement.close()
        assert await served.enforcement.wait_idle(LIMIT_S + 1)
        assert (await asking)[0] == 408

    run(ask)


def test_a_body_that_is_there_sets_no_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    def timer(*_: Any) -> Any:
        raise AssertionError("a timer was set")

    async def ask() -> None:
        queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        messages = [{"type": "http.request", "body": b"a", "more_body": more} for more in (True, False)]
        for message in messages:
            queue.put_nowait(message)
        monkeypatch.setattr(asyncio, "timeout_at", timer)
        receive = TimedBody(queue.get, 60, RequestContext("r", "openai", CHAT))
        assert [await receive(), await receive()] == messages
        asyncio.get_running_loop().call_soon(queue.put_nowait, {"type": "http.disconnect"})
        assert (await receive())["type"] == "http.disconnect"  # not the body's time any more

    asyncio.run(ask())


def test_what_came_too_late_does_not_bring_a_request_back() -> None:
    async def ask() -> None:
        queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        receive = TimedBody(queue.get, 0.05, context := RequestContext("r", "openai", CHAT))
        for _ in range(2):
            with pytest.raises(type(context.refusal) if context.refusal else Exception, match="did not come"):
                await receive()
            queue.put_nowait({"type": "http.request", "body": b"", "more_body": False})

    asyncio.run(ask())


def test_the_limit_is_a_setting_of_the_server() -> None:
    assert cli.resolve(["m"], {}).server.body_timeout == 60
    assert cli.resolve(["m", "--body-timeout", "0"], {}).server.body_timeout == 0
    assert cli.resolve(["m"], {"KSERVE_VLLM_BODY_TIMEOUT": "2.5"}).server.body_timeout == 2.5


@pytest.fixture(autouse=True)
def _no_noise(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Nothing of this is an error of ours."""
    yield
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
