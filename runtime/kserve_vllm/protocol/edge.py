"""The front door for HTTP: health, metrics and refusals at once, everything else through the gate to an app.

A plain ASGI callable that works from the first second, long before any app exists. Per request it makes a request id,
checks the key and the body's size, and enters the gate. `send` is wrapped once, by a plain function that only looks at
the first message of a response.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import uuid
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from typing import Any

import orjson

from kserve_vllm.errors import BodyTooLarge, InternalError, InvalidRequest, NotFound, RequestError, Unauthenticated
from kserve_vllm.gate import Gate
from kserve_vllm.lifecycle import Lifecycle
from kserve_vllm.protocol import wire
from kserve_vllm.protocol.endpoints import Endpoints, of_http
from kserve_vllm.protocol.openai_stream import FastPath
from kserve_vllm.telemetry.requests import Requests

log = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

_LIVE = {"/v2/health/live", "/"}
_READY = {"/v2/health/ready", "/health", "/ping"}
_DOCS = {"/docs", "/docs/oauth2-redirect", "/openapi.json"}
_OURS = re.compile(r"^/v2(/(models|repository|health)(/.*)?)?$|^/v1/models(/.*)?$")
_REQUEST_ID = re.compile(r"^[\x21-\x7e]{1,128}$")


class Keys:
    """The keys of `--api-key`; everything passes where there are none."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def check(self, authorization: str | None) -> None:
        """Check an `Authorization` header, in time that does not depend on the key.

        Raises:
            Unauthenticated: it is missing or wrong.
        """
        if not self._digests:
            return
        scheme, _, key = (authorization or "").partition(" ")
        digest = hashlib.sha256(key.strip().encode()).digest()
        known = False
        for other in self._digests:
            known |= hmac.compare_digest(digest, other)
        if not known or scheme.lower() != "bearer":
            raise Unauthenticated("missing or wrong API key; send it as `Authorization: Bearer KEY`")


class Edge:
    """The ASGI app that the HTTP server runs.

    Args:
        lifecycle: the state that health answers read.
        gate: admits requests and counts them.
        keys: checks `Authorization`.
        max_body: largest request body in bytes.
        metrics: renders the metrics for an `Accept` header, and says their content type.
        version: the body of `/version`.
        requests: the books of all requests.
    """

    def __init__(
        self,
        lifecycle: Lifecycle,
        gate: Gate,
        keys: Keys,
        max_body: int,
        metrics: Callable[[str], tuple[bytes, str]],
        version: Callable[[], dict[str, str]],
        requests: Requests,
    ) -> None:
        self._lifecycle = lifecycle
        self._gate = gate
        self._keys = keys
        self._max_body = max_body
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
        self._endpoints = Endpoints(ours, vllm)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "websocket":
            await self._websocket(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if path.startswith("/openai/v1"):
            path = path.removeprefix(wire.OPENAI_ALIAS)
            scope["path"], scope["raw_path"] = path, path.encode()
        if scope["method"] in ("GET", "HEAD") and await self._open_answer(scope, send):
            return
        request_id, headers = _request_id(scope)
        with of_http(self._requests, self._endpoints, scope, headers, request_id) as ticket:
            guard = _Guard(send, request_id, path, self._requests.response_header(ticket))
            try:
                await self._answer(scope, receive, guard, headers)
            finally:
                ticket.status, ticket.error = guard.status, guard.error

    async def _answer(self, scope: Scope, receive: Receive, guard: _Guard, headers: dict[bytes, bytes]) -> None:
        path, request_id = scope["path"], guard.request_id
        try:
            self._keys.check(headers.get(b"authorization", b"").decode("latin-1"))
            with self._gate.enter(needs_model=not _about_models(scope["method"], path)):
                receive = await self._limited(headers, receive)
                if fast := self._fast.get(path):
                    await fast(scope, receive, guard.send, guard.body_send)
                else:
                    await self._app_for(path)(scope, receive, guard.send)
        except RequestError as error:
            guard.error = error
            await guard.fail(error)
        except Exception as error:
            if guard.answered:
                log.debug("after the answer to %s: %r", request_id, error)
                return
            guard.error = error
            log.exception("request %s failed", request_id, exc_info=error)
            await guard.fail(InternalError(request_id))

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id, headers = _request_id(scope)
        try:
            with of_http(self._requests, self._endpoints, scope, headers, request_id) as ticket:
                self._keys.check(headers.get(b"authorization", b"").decode("latin-1"))
                with self._gate.enter():
                    assert self._vllm is not None
                    await self._vllm(scope, receive, send)
                ticket.status = 101
        except RequestError as error:
            await receive()
            await send({"type": "websocket.close", "code": 1013, "reason": error.message[:120]})

    def _app_for(self, path: str) -> ASGIApp:
        if self._ours is None or self._vllm is None:
            raise NotFound("no such path")
        return self._ours if path in _DOCS or _OURS.match(path) else self._vllm

    async def _open_answer(self, scope: Scope, send: Send) -> bool:
        """Answer what is open to everyone at any time; False if the path is none of that."""
        life, path = self._lifecycle, scope["path"]
        if path in _LIVE:
            await _answer(send, 200 if life.live else 503, orjson.dumps({**life.report(), "status": _alive(life)}))
        elif path in _READY:
            await _answer(send, 200 if life.ready else 503, orjson.dumps(life.report()))
        elif path == "/metrics" or path == "/metrics/":
            accept = next((value for name, value in scope["headers"] if name == b"accept"), b"")
            body, content_type = self._metrics(accept.decode("latin-1"))
            await _answer(send, 200, body, content_type.encode())
        elif path == "/version":
            await _answer(send, 200, orjson.dumps(self._version()))
        else:
            return False
        return True

    async def _limited(self, headers: dict[bytes, bytes], receive: Receive) -> Receive:
        """Refuse a body over the limit. A body without a length is read up to the limit first.

        Raises:
            BodyTooLarge: it is over the limit.
        """
        too_large = BodyTooLarge(
            f"the body is larger than {self._max_body >> 20} MiB (--max-body-mib)", field="body", close=True
        )
        length = headers.get(b"content-length")
        if length is not None:
            if int(length) > self._max_body:
                raise too_large
            return receive
        if b"transfer-encoding" not in headers:
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
        messages.reverse()

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        return replay


class _Guard:
    """Watches the start of one response: adds ids, notes the status, and takes internals out of a 500.

    vLLM answers 501 to a request for what the model can't do. That is the request's fault, not the server's, and V2
    and V1 say 400: so does this.
    """

    def __init__(self, send: Send, request_id: str, path: str, trace: str | None) -> None:
        self._send = send
        self.body_send = send
        """For the rest of a body that began with `send`."""
        self.request_id = request_id
        self._path = path
        self._trace = trace
        self.answered = False
        self.status: int | None = None
        self.error: Exception | None = None
        self._swallow = False
        self._refused = False

    def send(self, message: Message) -> Awaitable[None]:
        """ASGI's send."""
        if message["type"] == "http.response.start":
            self.answered = True
            self.status = message["status"]
            if self.status == 500:
                self._swallow = True
                return self.fail(InternalError(self.request_id), forced=True)
            if self.status == 501:
                self._refused = True
                return _nothing()
            headers = message.setdefault("headers", [])
            if not any(name == b"x-request-id" for name, _ in headers):
                message["headers"] = [*headers, (b"x-request-id", self.request_id.encode("latin-1"))]
            if self._trace is not None:
                message["headers"] = [*message["headers"], (b"traceresponse", self._trace.encode())]
        elif self._swallow:
            return _nothing()
        elif self._refused:
            self._swallow = True
            return self.fail(InvalidRequest(_openai_message(message.get("body", b""))), forced=True)
        return self._send(message)

    async def fail(self, error: RequestError, forced: bool = False) -> None:
        """Answer with an error, unless a response has begun."""
        if self.answered and not forced:
            return
        self.answered, self.status = True, error.http_status
        body = wire.error_body(self._path, error)
        headers = [*wire.error_headers(error, self.request_id), (b"content-length", str(len(body)).encode())]
        if self._trace is not None:
            headers.append((b"traceresponse", self._trace.encode()))
        await self._send({"type": "http.response.start", "status": error.http_status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})


def _openai_message(body: bytes) -> str:
    try:
        return str(orjson.loads(body)["error"]["message"])
    except (orjson.JSONDecodeError, LookupError, TypeError):
        return "this model or server does not do that"


def _about_models(method: str, path: str) -> bool:
    """Whether a request asks about models, or loads and unloads them, rather than putting one to work."""
    return method in ("GET", "HEAD", "OPTIONS") or path.startswith("/v2/repository/")


async def _nothing() -> None:
    return None


def _alive(life: Lifecycle) -> str:
    return "alive" if life.live else "dead"


def _request_id(scope: Scope) -> tuple[str, dict[bytes, bytes]]:
    """The caller's `x-request-id` if it is usable, else a new one, set in the scope for everything behind."""
    headers = dict(scope["headers"])
    given = headers.get(b"x-request-id", b"").decode("latin-1")
    if _REQUEST_ID.match(given):
        return given, headers
    request_id = uuid.uuid4().hex
    kept = [(name, value) for name, value in scope["headers"] if name != b"x-request-id"]
    scope["headers"] = [*kept, (b"x-request-id", request_id.encode())]
    return request_id, headers


async def _answer(send: Send, status: int, body: bytes, content_type: bytes = b"application/json") -> None:
    headers = [(b"content-type", content_type), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
