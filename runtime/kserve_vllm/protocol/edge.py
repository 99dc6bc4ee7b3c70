"""The front door for HTTP: health, metrics and refusals at once, everything else through the gate to an app.

A plain ASGI callable that works from the first second, long before any app exists. Per request it makes a request id,
checks the key and the body's size, and enters the gate. `send` is wrapped once, by a plain function that only looks at
the first message of a response.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import uuid
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

import orjson

from kserve_vllm.errors import BodyTooLarge, InternalError, InvalidRequest, NotFound, RequestError
from kserve_vllm.gate import Gate, Kind, headers_of
from kserve_vllm.lifecycle import Lifecycle
from kserve_vllm.protocol import compression, moderated, wire
from kserve_vllm.protocol.body import TimedBody
from kserve_vllm.protocol.endpoints import Endpoints, kind_of, of_http
from kserve_vllm.protocol.openai_fast import FastPath
from kserve_vllm.protocol.steps import ClientGone
from kserve_vllm.telemetry.requests import Requests
from kserve_vllm.ticket import Ticket

log = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

_LIVE = {"/v2/health/live", "/"}
_READY = {"/v2/health/ready", "/health", "/ping"}
_DOCS = {"/docs", "/docs/oauth2-redirect", "/openapi.json"}
_OURS = re.compile(r"^/v2(/(models|repository|health)(/.*)?)?$|^/v1/(models|adapters|queue)(/.*)?$")
_EVENT_STREAM = b"text/event-stream"
# What may be half of a surrogate pair: an escape without its other half beside it, bytes that Python's parser takes for
# one, or any other encoding than UTF-8, which has zero bytes.
_HALF_PAIR = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F]|\xed[\xa0-\xbf]|\x00"
)
_HALF = re.compile("[\ud800-\udfff]")


class Edge:
    """The ASGI app that the HTTP server runs.

    Args:
        lifecycle: the state that health answers read.
        gate: admits requests and counts them.
        max_body: largest request body in bytes.
        metrics: renders the metrics for an `Accept` header, and says their content type.
        version: the body of `/version`.
        requests: the books of all requests.
        split: whether metrics and control calls are answered on a port of their own; see `admin`.
        body_timeout_s: seconds that a client may take to send a body; 0: no limit.
    """

    def __init__(
        self,
        lifecycle: Lifecycle,
        gate: Gate,
        max_body: int,
        metrics: Callable[[str], tuple[bytes, str]],
        version: Callable[[], dict[str, str]],
        requests: Requests,
        split: bool = False,
        body_timeout_s: float = 0.0,
    ) -> None:
        self._lifecycle = lifecycle
        self._gate = gate
        self._split = split
        self._max_body = max_body
        self._body_timeout_s = body_timeout_s
        self._metrics = metrics
        self._version = version
        self._requests = requests
        self._endpoints = Endpoints()
        self._ours: ASGIApp | None = None
        self._vllm: ASGIApp | None = None
        self._fast: Mapping[str, FastPath] = {}

    def attach(self, ours: ASGIApp, vllm: ASGIApp, fast: Mapping[str, FastPath] | None = None) -> None:
        """Set the apps behind the gate, once the engine runs, and what answers some of vLLM's paths before it."""
        self._ours, self._vllm, self._fast = ours, vllm, fast or {}
        self._endpoints = Endpoints(ours, getattr(vllm, "app", vllm))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI, of the HTTP port."""
        if scope["type"] == "http":
            await self._http(scope, receive, send, not self._split)
        elif scope["type"] == "websocket":
            await self._websocket(scope, receive, send)

    async def admin(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI, of the admin port: everything but work."""
        if scope["type"] == "http":
            await self._http(scope, receive, send, True)

    async def _http(self, scope: Scope, receive: Receive, send: Send, operators: bool) -> None:
        path = scope["path"]
        scope[wire.WRITTEN_PATH] = written = path
        if path.startswith("/openai/v1"):
            path = path.removeprefix(wire.OPENAI_ALIAS)
            scope["path"], scope["raw_path"] = path, path.encode()
        plain_send = send
        if scope["method"] != "HEAD" and (coding := compression.wanted(scope["headers"])) is not None:
            send = compression.Compressed(send, coding)
        if scope["method"] in ("GET", "HEAD") and await self._open_answer(scope, send, operators):
            return
        request_id, headers = _request_id(scope)
        with of_http(self._requests, self._endpoints, scope, headers, request_id) as ticket:
            guard = _Guard(send, request_id, written, self._requests.response_header(ticket))
            guard.body_send = plain_send  # of a stream, which is not compressed
            try:
                guard.ticket = ticket
                await self._answer(scope, receive, guard, headers, operators)
            finally:
                ticket.status, ticket.error = guard.status, guard.error or ticket.error

    async def _answer(
        self, scope: Scope, receive: Receive, guard: _Guard, headers: dict[bytes, bytes], operators: bool
    ) -> None:
        path, request_id, ticket = scope["path"], guard.request_id, guard.ticket
        try:
            if _is_preflight(scope["method"], headers):
                # Browsers ask without the key; vLLM's own answer (--allowed-origins) says what they may send.
                await self._app_for(path)(scope, receive, guard.send)
                return
            named = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers.items()}
            key, wanted = headers_of(named)
            caller = self._gate.identify(ticket, key)
            kind = kind_of(scope["method"], ticket.endpoint)
            if kind is Kind.CONTROL:
                if not operators:
                    raise NotFound("this is answered on the admin port (--admin-port)")
                self._gate.check_control(caller)
            with self._gate.enter(needs_model=kind is Kind.WORK):
                receive = compression.inflated(scope, receive)
                headers = dict(scope["headers"])
                receive = await self._limited(headers, receive, ticket)
                if kind is Kind.WORK:
                    ticket.cache_control = named.get("cache-control", "").lower()
                    patient = _Patient(receive)
                    await self._gate.admit(ticket, caller, wanted, patient.wait)
                    receive = patient.receive
                app = self._app_for(path)
                if app is self._vllm and b"json" in headers.get(b"content-type", b""):
                    receive = await _unicode_only(receive)
                if kind is Kind.WORK and self._gate.moderation is not None and app is self._vllm:
                    receive = await self._moderated(scope, named, receive, ticket)
                if fast := self._fast.get(path):
                    await fast(scope, receive, guard.send, guard.body_send)
                else:
                    await app(scope, receive, guard.send)
        except RequestError as error:
            guard.error = error
            await guard.fail(error)
        except ClientGone:
            ticket.status = guard.status = 499
        except Exception as error:
            if guard.answered:
                log.debug("after the answer to %s: %r", request_id, error)
                return
            guard.error = error
            log.exception("request %s failed", request_id, exc_info=error)
            await guard.fail(InternalError(request_id))

    async def _moderated(self, scope: Scope, headers: dict[str, str], receive: Receive, ticket: Ticket) -> Receive:
        """The body as the model may see it. Our own protocols are moderated where they know their texts.

        Raises:
            InvalidRequest: it can't be read.
            Refused, Unavailable: a hook does not let it pass.
        """
        moderation, path = self._gate.moderation, scope["path"]
        assert moderation is not None
        if moderation.looks_at("prompt", ticket.tenant):
            moderated.check_content_type(headers.get("content-type"))
        parts: list[bytes] = []
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            parts.append(message.get("body", b""))
            if not message.get("more_body"):
                break
        raw = b"".join(parts)
        moderated.check_answer_form(path, raw, moderation, ticket.tenant)
        passed = await moderated.moderate_body(path, raw, moderation, ticket.tenant)
        if passed is not raw:
            kept = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
            scope["headers"] = [*kept, (b"content-length", str(len(passed)).encode())]
        body: list[Message] = [{"type": "http.request", "body": passed, "more_body": False}]

        async def replay() -> Message:
            return body.pop() if body else await receive()

        return replay

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id, headers = _request_id(scope)
        try:
            with of_http(self._requests, self._endpoints, scope, headers, request_id) as ticket:
                key, wanted = headers_of({n.decode("latin-1"): v.decode("latin-1") for n, v in headers.items()})
                caller = self._gate.identify(ticket, key)
                if self._gate.moderation is not None:
                    raise InvalidRequest("texts are moderated here, and what is streamed in can't be")
                with self._gate.enter():
                    assert self._vllm is not None
                    await self._gate.admit(ticket, caller, wanted)
                    await self._vllm(scope, receive, send)
                ticket.status = 101
        except RequestError as error:
            await receive()
            await send({"type": "websocket.close", "code": 1013, "reason": error.message[:120]})

    def _app_for(self, path: str) -> ASGIApp:
        if self._ours is None or self._vllm is None:
            raise NotFound("no such path")
        return self._ours if path in _DOCS or _OURS.match(path) else self._vllm

    async def _open_answer(self, scope: Scope, send: Send, operators: bool) -> bool:
        """Answer what is open to everyone at any time; False if the path is none of that."""
        life, path = self._lifecycle, scope["path"]
        if path in _LIVE:
            await _answer(send, 200 if life.live else 503, orjson.dumps({**life.report(), "status": _alive(life)}))
        elif path in _READY:
            await _answer(send, 200 if life.ready else 503, orjson.dumps(life.report()))
        elif operators and (path == "/metrics" or path == "/metrics/"):
            accept = next((value for name, value in scope["headers"] if name == b"accept"), b"")
            body, content_type = self._metrics(accept.decode("latin-1"))
            await _answer(send, 200, body, content_type.encode())
        elif path == "/version":
            await _answer(send, 200, orjson.dumps(self._version()))
        else:
            return False
        return True

    async def _limited(self, headers: dict[bytes, bytes], receive: Receive, ticket: Ticket) -> Receive:
        """Refuse a body over the limit of size, and have one over the limit of time refused where it is read. A body
        without a length is read up to the limit first.

        Raises:
            BodyTooLarge: it is over the limit of size.
            BodyTimeout: it has no length and is over the limit of time.
        """
        too_large = BodyTooLarge(
            f"the body is larger than {self._max_body >> 20} MiB (--max-body-mib)", field="body", close=True
        )
        length = headers.get(b"content-length")
        if length is not None:
            if int(length) > self._max_body:
                raise too_large
        elif b"transfer-encoding" not in headers:
            return receive
        if self._body_timeout_s:
            receive = TimedBody(receive, self._body_timeout_s, ticket)
        if length is not None:
            return receive
        messages: list[Message] = []
        size = 0
        while True:
            message = await receive()
            messages.append(message)
            size += len(message.get("body", b""))
            if size > self._max_body:
                raise too_large
            if not message.get("more_body"):
                break
        return _replay(messages, receive)


class _Patient:
    """Lets a request wait before its body is read, and notices that its client goes away meanwhile."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._messages: list[Message] = []

    async def receive(self) -> Message:
        """ASGI's receive: what came while waiting, then what comes."""
        return self._messages.pop(0) if self._messages else await self._receive()

    async def wait(self, work: Awaitable[Any]) -> Any:
        """Wait for `work`, which is cancelled when the client goes away.

        Raises:
            ClientGone: it did.
            BodyTimeout: its body, which comes meanwhile, takes too long.
        """
        task = asyncio.ensure_future(work)
        watcher = asyncio.ensure_future(self._watch())
        try:
            await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            watcher.result()
            raise ClientGone
        finally:
            watcher.cancel()
            task.cancel()
            await asyncio.gather(task, watcher, return_exceptions=True)

    async def _watch(self) -> None:
        """Until the client is gone. What it sends is kept."""
        while True:
            message = await self._receive()
            self._messages.append(message)
            if message["type"] == "http.disconnect":
                return


class _Guard:
    """Watches the start of one response: adds headers, notes the status, and takes internals out of a 500.

    vLLM answers 501 to a request for what the model can't do. That is the request's fault, not the server's, and V2
    and V1 say 400: so does this. What the engine's door refuses is answered with its own error, whatever vLLM made of
    it; the start of a stream is held back for that until its first piece is there.
    """

    def __init__(self, send: Send, request_id: str, path: str, trace: str | None) -> None:
        self._send = send
        self.body_send = send
        """For the rest of a body that began with `send`."""
        self.request_id = request_id
        self._path = path
        self._trace = trace
        self.ticket: Ticket = Ticket(request_id, "", "")
        self.answered = False
        self.status: int | None = None
        self.error: Exception | None = None
        self._swallow = False
        self._held: Message | None = None

    def send(self, message: Message) -> Awaitable[None]:
        """ASGI's send."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            if self.ticket.refusal is not None:
                return self._refuse(self.ticket.refusal)
            if self.status == 500:
                return self._refuse(InternalError(self.request_id))
            if self.status == 501 or _is_stream(message):
                self._held = message
                return _nothing()
            self.answered = True
            return self._send(self._dressed(message))
        if self._swallow:
            return _nothing()
        if self._held is not None:
            return self._send_held(message)
        return self._send(message)

    async def _send_held(self, message: Message) -> None:
        start, self._held = self._held, None
        assert start is not None
        if self.ticket.refusal is not None:
            await self._refuse(self.ticket.refusal)
        elif start["status"] == 501:
            await self._refuse(InvalidRequest(_openai_message(message.get("body", b""))))
        else:
            self.answered = True
            await self._send(self._dressed(start))
            await self._send(message)

    def _refuse(self, error: RequestError) -> Awaitable[None]:
        """Answer an error instead of what vLLM answers."""
        self._swallow = True
        if not isinstance(error, InternalError):
            self.error = error
        return self.fail(error)

    def _dressed(self, start: Message) -> Message:
        headers = list(start.get("headers", ()))
        if not any(name == b"x-request-id" for name, _ in headers):
            headers.append((b"x-request-id", self.request_id.encode("latin-1")))
        return {**start, "headers": headers + self._extra()}

    def _extra(self) -> list[tuple[bytes, bytes]]:
        extra = [(name.encode(), value.encode("latin-1")) for name, value in self.ticket.answer_headers]
        if self._trace is not None:
            extra.append((b"traceresponse", self._trace.encode()))
        if wire.is_anthropic_path(self._path):
            extra.append((b"request-id", self.request_id.encode("latin-1")))
        return extra

    async def fail(self, error: RequestError) -> None:
        """Answer with an error, unless a response has begun."""
        if self.answered:
            return
        self.answered, self.status = True, error.http_status
        body = wire.error_body(self._path, error, self.request_id)
        headers = [*wire.error_headers(error, self.request_id), (b"content-length", str(len(body)).encode())]
        headers += self._extra()
        await self._send({"type": "http.response.start", "status": error.http_status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})


async def _unicode_only(receive: Receive) -> Receive:
    """Refuse a JSON body with half of a surrogate pair, which is no character and which no tokenizer takes.

    vLLM reads JSON with Python's parser, which lets it pass; it fails where it is encoded, anywhere up to the answer.

    Raises:
        InvalidRequest: there is one; the message names the top-level field.
    """
    messages: list[Message] = []
    while not messages or messages[-1].get("more_body"):
        messages.append(await receive())
    body = b"".join(message.get("body", b"") for message in messages)
    if _HALF_PAIR.search(body):
        # A doubled backslash before it makes it plain text; only a parser can tell.
        with contextlib.suppress(ValueError, RecursionError):
            tree = json.loads(body)
            for name, value in tree.items() if isinstance(tree, dict) else [("body", tree)]:
                if any(_HALF.search(json.dumps(part, ensure_ascii=False)) for part in (name, value)):
                    field = _HALF.sub("\ufffd", str(name))
                    raise InvalidRequest(f"{field}: half of a surrogate pair is no character", field=field)
    return _replay(messages, receive)


def _replay(messages: list[Message], receive: Receive) -> Receive:
    """Hand out messages that were received already, then what comes after them."""
    messages.reverse()

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


def _openai_message(body: bytes) -> str:
    try:
        return str(orjson.loads(body)["error"]["message"])
    except (orjson.JSONDecodeError, LookupError, TypeError):
        return "this model or server does not do that"


def _is_stream(start: Message) -> bool:
    return any(name == b"content-type" and value.startswith(_EVENT_STREAM) for name, value in start.get("headers", ()))


async def _nothing() -> None:
    return None


def _alive(life: Lifecycle) -> str:
    return "alive" if life.live else "dead"


def _is_preflight(method: str, headers: Mapping[bytes, bytes]) -> bool:
    """Whether a browser asks what a page of another origin may send."""
    return method == "OPTIONS" and b"origin" in headers and b"access-control-request-method" in headers


def _request_id(scope: Scope) -> tuple[str, dict[bytes, bytes]]:
    """The caller's `x-request-id` if it is usable, else a new one, set in the scope for everything behind."""
    headers = dict(scope["headers"])
    given = headers.get(b"x-request-id", b"").decode("latin-1")
    if wire.REQUEST_ID.fullmatch(given):
        return given, headers
    request_id = uuid.uuid4().hex
    kept = [(name, value) for name, value in scope["headers"] if name != b"x-request-id"]
    scope["headers"] = [*kept, (b"x-request-id", request_id.encode())]
    return request_id, headers


async def _answer(send: Send, status: int, body: bytes, content_type: bytes = b"application/json") -> None:
    headers = [(b"content-type", content_type), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
