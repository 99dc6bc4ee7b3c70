"""What every HTTP request passes: health, metrics and refusals at once, everything else through enforcement to an app.

A plain ASGI callable that works from the first second, long before any app exists. Per request it makes a request id,
checks the key and the body's size, and enters enforcement. `send` is wrapped once, by a plain function that only looks
at the first message of a response.
"""

from __future__ import annotations

import asyncio
import logging
import re
import sys
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from http import HTTPStatus
from typing import TYPE_CHECKING, TypeVar

import orjson

from kserve_vllm.core.errors import (
    BodyTooLarge,
    InternalError,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    RequestError,
)
from kserve_vllm.core.lifecycle import Lifecycle
from kserve_vllm.core.request_context import IDENTIFIED, RequestContext
from kserve_vllm.engine.items import check_items
from kserve_vllm.policy.enforcement import Enforcement, Kind
from kserve_vllm.protocols import errors as protocol_errors
from kserve_vllm.protocols import moderation as moderated
from kserve_vllm.protocols.http import bounds, compression
from kserve_vllm.protocols.http.body import BodyBudget, LoopShare, TimedBody
from kserve_vllm.protocols.http.disconnect import ClientGone
from kserve_vllm.protocols.http.endpoints import Endpoints, Target, choose, normalize, of_http
from kserve_vllm.protocols.http.page import Asset
from kserve_vllm.protocols.http.scrapes import Scrapes
from kserve_vllm.protocols.openai.fast_path import FastPath
from kserve_vllm.telemetry.requests import RequestRecorder

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger(__name__)
T = TypeVar("T")


_LIVE = {"/v2/health/live", "/"}
_READY = {"/v2/health/ready", "/health", "/ping"}
_METRICS = {"/metrics", "/metrics/"}
_SERVER = "*"
"""The target of an OPTIONS that asks of the server as a whole (RFC 9110, 9.3.7)."""
_METHODS = b"DELETE, GET, HEAD, OPTIONS, POST"
_READ_ONLY = Target(method="", refusal=MethodNotAllowed, allow=("GET", "HEAD"))
"""What is answered before any route is asked."""
_DOCS = {"/docs", "/docs/oauth2-redirect", "/openapi.json"}
_OURS = re.compile(r"^/v2(/(models|repository|health)(/.*)?)?$|^/v1/(models|adapters|queue|files|batches)(/.*)?$")
OWNER = "kserve_vllm.owner"
"""Key of an ASGI scope that no client makes: tenant and key id of who asked for this before, as in a batch."""
_LENGTHS = (b"content-length", b"transfer-encoding")
_RANK = b"x-data-parallel-rank"
_BODIES = 16  # of the largest size, in all
_EVENT_STREAM = b"text/event-stream"


class RequestMiddleware:
    """The ASGI app that the HTTP server runs.

    Args:
        lifecycle: the state that health answers read.
        enforcement: admits requests and counts them.
        max_body: largest request body in bytes.
        metrics: renders the metrics for an `Accept` header, and says their content type.
        version: the body of `/version`.
        requests: the accounting of all requests.
        split: whether metrics and control calls are answered on a port of their own; see `admin`.
        body_timeout_s: seconds that a client may take to send a body; 0: no limit.
        page: the files of the page for people, by path; answered where metrics are.
        max_json: largest JSON of a request in bytes; None: as `max_body`.
        routers: whether clients are routers, which may choose among engines (`--allow-transfer-params`).
    """

    def __init__(
        self,
        lifecycle: Lifecycle,
        enforcement: Enforcement,
        max_body: int,
        metrics: Callable[[str], tuple[bytes, str]],
        version: Callable[[], dict[str, object]],
        requests: RequestRecorder,
        split: bool = False,
        body_timeout_s: float = 0.0,
        page: Mapping[str, Asset] | None = None,
        max_json: int | None = None,
        routers: bool = False,
    ) -> None:
        self._lifecycle = lifecycle
        self._enforcement = enforcement
        self._split = split
        self._max_body = max_body
        self._max_json = max_body if max_json is None else min(max_json, max_body)
        self._body_timeout_s = body_timeout_s
        self._routers = routers
        self._scrapes = Scrapes(metrics)
        self._version = version
        self._page = page or {}
        self._requests = requests
        self._endpoints = Endpoints()
        self.bodies = BodyBudget(_BODIES * max_body)
        """What requests hold of bodies."""
        self.loop_share = LoopShare()
        self._ours: ASGIApp | None = None
        self._vllm: ASGIApp | None = None
        self._fast: Mapping[str, FastPath] = {}

    def attach(self, ours: ASGIApp, vllm: ASGIApp, fast: Mapping[str, FastPath] | None = None) -> None:
        """Set the apps behind enforcement, once the engine runs, and what answers some of vLLM's paths before it."""
        self._ours, self._vllm, self._fast = ours, vllm, fast or {}
        self._endpoints = Endpoints(ours, vllm)

    def works(self, path: str) -> bool:
        """Whether a POST to this path puts the model to work."""
        return self._endpoints.find("POST", path).kind is Kind.WORK

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI, of the HTTP port."""
        if scope["type"] == "http":
            await self._http(scope, receive, send, not self._split)
        elif scope["type"] == "websocket":
            await self._websocket(scope, receive, send)

    async def admin(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI, of the admin port: everything but websockets, of which there are none."""
        if scope["type"] == "http":
            await self._http(scope, receive, send, True)
        elif scope["type"] == "websocket":
            request_id, _ = _request_id(scope)
            await receive()
            await _refuse_websocket(scope, send, NotFound("the admin port has no websockets"), request_id)

    async def _http(self, scope: Scope, receive: Receive, send: Send, operators: bool) -> None:
        written = scope["path"]
        if written == _SERVER:
            await _answer(send, 200, b"", headers=((b"allow", _METHODS),))
            return
        path: str | None
        try:
            path = normalize(scope)
        except NotFound:
            path = None
        plain_send = send
        reads = scope["method"] in ("GET", "HEAD")
        coding = compression.wanted(scope["headers"])
        if coding is not None or reads:
            send = compression.Compressed(send, coding)
        if path is not None and reads and await self._open_answer(scope, send, operators):
            return
        request_id, headers = _request_id(scope)
        scope[protocol_errors.SHAPE_PATH] = shape = protocol_errors.path_of_shape(written, headers)
        target = Target() if path is None else self._endpoints.find(scope["method"], path)
        if target.refusal is NotFound and self._is_open(path, operators):
            target = replace(_READ_ONLY, method=scope["method"])
        with of_http(self._requests, target, scope, headers, request_id) as context:
            guard = ResponseGuard(send, request_id, shape, self._requests.response_header(context))
            guard.body_send = plain_send  # of a stream, which is not compressed
            try:
                guard.context = context
                await self._answer(scope, receive, guard, headers, target, operators)
            finally:
                context.status, context.error = guard.status, guard.error or context.error

    async def _answer(
        self,
        scope: Scope,
        receive: Receive,
        guard: ResponseGuard,
        headers: dict[bytes, bytes],
        target: Target,
        operators: bool,
    ) -> None:
        context = guard.context
        arrival: _Arrival | None = None
        try:
            if _is_preflight(scope["method"], headers):
                # Browsers ask without the key; vLLM's own answer (--allowed-origins) says what they may send.
                await self._app_for(scope["path"])(scope, receive, guard.send)
                return
            protocol_errors.check_single(scope["headers"], headers)
            if _RANK in headers and not self._routers:
                raise InvalidRequest(
                    "x-data-parallel-rank is taken from routers alone (--allow-transfer-params)",
                    field="x-data-parallel-rank",
                )
            arrival = _Arrival(self, scope, headers, receive, context, target.app is self._vllm)
            async with self._enforcement.enforce(
                context,
                {name.decode("latin-1"): value.decode("latin-1") for name, value in headers.items()},
                # Nothing is known before the engine runs; enforcement says so.
                target.kind or Kind.QUESTION,
                check=lambda: self._check(target, operators),
                body=arrival.read,
                waiting=arrival.wait,
                moderate=arrival.moderate if target.app is self._vllm else None,
                owner=scope.get(OWNER),
            ):
                target.check()
                scope, receive = arrival.handed_on(target)
                if target.method == "POST" and (fast := self._fast.get(target.endpoint)):
                    await fast(scope, receive, guard.send, guard.body_send)
                else:
                    assert target.app is not None  # else `check` has raised
                    await target.app(scope, receive, guard.send)
        except RequestError as error:
            guard.error = error
            await guard.fail(error)
        except ClientGone:
            context.status = guard.status = 499
        except Exception as error:
            if guard.answered:
                log.debug("after the answer to %s: %r", guard.request_id, error)
                return
            guard.error = error
            log.exception("request %s failed", guard.request_id, exc_info=error)
            await guard.fail(InternalError(guard.request_id))
        finally:
            if arrival is not None:
                arrival.close()

    def _check(self, target: Target, operators: bool) -> None:
        """Raise what is known against a request before anything is asked about it.

        Raises:
            NotFound, MethodNotAllowed: nothing here serves it, or the admin port does.
        """
        if self._endpoints.any:
            target.check()
        if target.kind is Kind.CONTROL and not operators:
            raise NotFound("this is answered on the admin port (--admin-port)")

    async def moderated(self, path: str, headers: dict[bytes, bytes], raw: bytes, tenant: str) -> bytes:
        """A body as the model may see it. Our own protocols are moderated where they know their texts.

        Raises:
            InvalidRequest: it can't be read.
            Refused, Unavailable: a hook does not let it pass.
        """
        moderation = self._enforcement.moderation
        assert moderation is not None
        if moderation.looks_at("prompt", tenant):
            moderated.check_content_type(headers.get(b"content-type", b"").decode("latin-1"))
        moderated.check_answer_form(path, raw, moderation, tenant)
        return await moderated.moderate_body(path, raw, moderation, tenant)

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id, headers = _request_id(scope)
        path: str | None
        try:
            path = normalize(scope)
        except NotFound:
            path = None
        target = Target() if path is None else self._endpoints.find("WEBSOCKET", path)
        try:
            with of_http(self._requests, target, scope, headers, request_id) as context:
                protocol_errors.check_single(scope["headers"], headers)
                async with self._enforcement.enforce(
                    context,
                    {name.decode("latin-1"): value.decode("latin-1") for name, value in headers.items()},
                    Kind.WORK,
                    check=lambda: self._check(target, False),
                    moderate=_refuse_streamed,
                ):
                    target.check()
                    assert target.app is not None
                    await target.app(choose(scope, target), receive, send)
                context.status = 101
        except RequestError as error:
            await receive()
            await _refuse_websocket(scope, send, error, request_id)

    def _app_for(self, path: str) -> ASGIApp:
        if self._ours is None or self._vllm is None:
            raise NotFound("no such path")
        return self._ours if path in _DOCS or _OURS.match(path) else self._vllm

    def _is_open(self, path: str | None, operators: bool) -> bool:
        """Whether `_open_answer` answers a GET of this path."""
        if operators and (path in _METRICS or path in self._page):
            return True
        return path in _LIVE or path in _READY or path == "/version"

    async def _open_answer(self, scope: Scope, send: Send, operators: bool) -> bool:
        """Answer what is open to everyone at any time; False if the path is none of that."""
        life, path = self._lifecycle, scope["path"]
        if path in _LIVE:
            await _answer(send, 200 if life.live else 503, orjson.dumps({**life.report(), "status": _alive(life)}))
        elif path in _READY:
            await _answer(send, 200 if life.probed() else 503, orjson.dumps(life.report()))
        elif operators and path in _METRICS:
            accept = next((value for name, value in scope["headers"] if name == b"accept"), b"")
            body, content_type = await self._scrapes.answer(accept.decode("latin-1"))
            await _answer(send, 200, body, content_type.encode())
        elif operators and (asset := self._page.get(path)) is not None:
            await _answer(send, 200, asset.body, headers=asset.headers)
        elif path == "/version":
            await _answer(send, 200, orjson.dumps(self._version()))
        else:
            return False
        return True

    def check_json(self, size: int) -> None:
        """Refuse JSON that would hold the event loop for too long. What no body may have is refused as a body.

        Raises:
            BodyTooLarge: it has too many bytes.
        """
        if self._max_json < size <= self._max_body:
            raise BodyTooLarge(
                f"the JSON of this request is larger than {self._max_json >> 20} MiB (--max-json-mib)", field="body"
            )

    async def read_body(
        self, headers: dict[bytes, bytes], receive: Receive, context: RequestContext, hold: Callable[[int], None]
    ) -> bytes | None:
        """The whole body of a request; None where it has none. `hold` is told of each part's size.

        Raises:
            BodyTooLarge: it is over the limit of size.
            BodyTimeout: it is over the limit of time.
            Unavailable: too much of other bodies is held.
            ClientGone: its client went away.
        """
        length = headers.get(b"content-length")
        if length is None and b"transfer-encoding" not in headers:
            return None
        too_large = BodyTooLarge(f"the body is larger than {self._max_body >> 20} MiB (--max-body-mib)", field="body")
        if length is not None and protocol_errors.whole_number(length, self._max_body) is None:
            raise too_large
        if self._body_timeout_s:
            receive = TimedBody(receive, self._body_timeout_s, context)
        parts: list[bytes] = []
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                raise ClientGone
            part = message.get("body", b"")
            size += len(part)
            if size > self._max_body:
                raise too_large
            hold(len(part))
            parts.append(part)
            more = message.get("more_body", False)
        return parts[0] if len(parts) == 1 else b"".join(parts)


class _Arrival:
    """One request on its way in: its body as it came, then as the model may see it."""

    __slots__ = (
        "_body",
        "_context",
        "_endpoint",
        "_form",
        "_headers",
        "_held",
        "_middleware",
        "_receive",
        "_scope",
        "_to_vllm",
    )

    def __init__(
        self,
        middleware: RequestMiddleware,
        scope: Scope,
        headers: dict[bytes, bytes],
        receive: Receive,
        context: RequestContext,
        to_vllm: bool,
    ) -> None:
        self._middleware = middleware
        self._endpoint = context.endpoint
        self._headers = headers
        self._receive = receive
        self._scope = scope
        self._context = context
        self._to_vllm = to_vllm
        self._held = 0
        self._body: bytes | None = None
        self._form = False

    async def read(self) -> None:
        """Read the body, and refuse one that nobody behind could read.

        Raises:
            RequestError, ClientGone: as `RequestMiddleware.read_body`.
        """
        if (identified := self._scope.get(IDENTIFIED)) is not None:
            identified()
        receive = compression.inflated(self._scope, self._receive)
        if receive is not self._receive:
            self._receive, self._headers = receive, dict(self._scope["headers"])
        content_type = self._headers.get(b"content-type", b"")
        self._form = form = protocol_errors.is_form(content_type)
        if form:
            bounds.check_form(content_type)
        if self._to_vllm and not form:
            # Before it is read, where its length is known.
            self._middleware.check_json(
                protocol_errors.whole_number(self._headers.get(b"content-length", b""), sys.maxsize) or 0
            )
        self._body = body = await self._middleware.read_body(self._headers, receive, self._context, self._hold)
        if body is None or form:
            return
        # Tensors may follow the JSON.
        json_length = protocol_errors.whole_number(
            self._headers.get(b"inference-header-content-length", b""), len(body)
        )
        json_part = body if self._to_vllm or json_length is None else memoryview(body)[:json_length]
        self._middleware.check_json(len(json_part))
        bounds.check_tokenized(self._endpoint, body)
        hold_s = await bounds.check_values(json_part)
        if wait_s := self._middleware.loop_share.wait_s(self._context, hold_s):
            await self.wait(asyncio.sleep(wait_s))
        if self._to_vllm:
            await bounds.check_unicode(body)
            await check_items(self._endpoint, body)

    def _hold(self, size: int) -> None:
        self._middleware.bodies.take(self._context, size)
        self._held += size

    def close(self) -> None:
        """The request is answered."""
        self._middleware.bodies.give(self._context, self._held)
        self._held = 0

    async def wait(self, work: Awaitable[T]) -> T:
        """Wait for `work`, which is cancelled when the client goes away.

        Raises:
            ClientGone: it did.
        """
        patient = _Patient(self._receive)
        self._receive = patient.receive
        return await patient.wait(work)

    async def moderate(self) -> None:
        """Let the model see what the moderation lets pass.

        Raises:
            InvalidRequest, Refused, Unavailable: as `RequestMiddleware.moderated`.
        """
        raw = self._body or b""
        passed = await self._middleware.moderated(self._scope["path"], self._headers, raw, self._context.access.tenant)
        if passed is not raw:
            kept = [(name, value) for name, value in self._scope["headers"] if name not in _LENGTHS]
            self._scope = {**self._scope, "headers": [*kept, (b"content-length", b"%d" % len(passed))]}
            self._body = passed

    def handed_on(self, target: Target) -> tuple[Scope, Receive]:
        """Scope and `receive` for the app that answers."""
        scope = choose(self._scope, target)
        if self._body is None:
            return scope, self._receive
        if self._form:
            return scope, _replay_form(self._body, self._receive)
        return scope, _replay([{"type": "http.request", "body": self._body, "more_body": False}], self._receive)


class _Patient:
    """Lets a request wait whose body has come, and notices that its client goes away meanwhile."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._messages: list[Message] = []

    async def receive(self) -> Message:
        """ASGI's receive: what came while waiting, then what comes."""
        return self._messages.pop(0) if self._messages else await self._receive()

    async def wait(self, work: Awaitable[T]) -> T:
        """Wait for `work`, which is cancelled when the client goes away.

        Raises:
            ClientGone: it did.
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


class ResponseGuard:
    """Watches the start of one response: adds headers, notes the status, and takes internals out of a 500.

    vLLM answers 501 to a request for what the model can't do. That is the request's fault, not the server's, and V2
    and V1 say 400: so does this. What the engine refuses is answered with its own error, whatever vLLM made of
    it; the start of a stream is held back for that until its first piece is there. What vLLM refuses in OpenAI's shape
    at a path of Anthropic's is told in theirs.
    """

    def __init__(self, send: Send, request_id: str, path: str, trace: str | None) -> None:
        self._send = send
        self.body_send = send
        """For the rest of a body that began with `send`."""
        self.request_id = request_id
        self._path = path
        self._trace = trace
        self.context: RequestContext = RequestContext(request_id, "", "")
        self.answered = False
        self.status: int | None = None
        self.error: Exception | None = None
        self._swallow = False
        self._held: Message | None = None

    def send(self, message: Message) -> Awaitable[None]:
        """ASGI's send."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            if self.context.refusal is not None:
                return self._refuse(self.context.refusal)
            if self.status == 500:
                return self._refuse(InternalError(self.request_id))
            if (
                self.status == 501
                or _is_stream(message)
                or (self.status >= HTTPStatus.BAD_REQUEST and protocol_errors.is_anthropic_path(self._path))
            ):
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
        if self.context.refusal is not None:
            await self._refuse(self.context.refusal)
        elif start["status"] == 501:
            await self._refuse(InvalidRequest(_openai_message(message.get("body", b""))))
        else:
            self.answered = True
            if start["status"] >= HTTPStatus.BAD_REQUEST and protocol_errors.is_anthropic_path(self._path):
                start, message = self._as_anthropics(start, message)
            await self._send(self._dressed(start))
            await self._send(message)

    def _as_anthropics(self, start: Message, message: Message) -> tuple[Message, Message]:
        """An error in Anthropic's envelope, where it is one whole in OpenAI's."""
        body = protocol_errors.in_anthropics_shape(start["status"], message.get("body", b""), self.request_id)
        if body is None or message.get("more_body"):
            return start, message
        kept = [(name, value) for name, value in start.get("headers", ()) if name != b"content-length"]
        return {**start, "headers": [*kept, (b"content-length", b"%d" % len(body))]}, {**message, "body": body}

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
        extra = [(name.encode(), value.encode("latin-1")) for name, value in self.context.answer_headers]
        if self._trace is not None:
            extra.append((b"traceresponse", self._trace.encode()))
        if protocol_errors.is_anthropic_path(self._path):
            extra.append((b"request-id", self.request_id.encode("latin-1")))
        return extra

    async def fail(self, error: RequestError) -> None:
        """Answer with an error, unless a response has begun."""
        if self.answered:
            return
        self.answered, self.status = True, error.http_status
        body = protocol_errors.error_body(self._path, error, self.request_id)
        headers = [*protocol_errors.error_headers(error, self.request_id), (b"content-length", str(len(body)).encode())]
        headers += self._extra()
        await self._send({"type": "http.response.start", "status": error.http_status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})


def _replay(messages: list[Message], receive: Receive) -> Receive:
    """Hand out messages that were received already, then what comes after them."""
    messages.reverse()

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


def _replay_form(body: bytes, receive: Receive) -> Receive:
    """The same for a form, which is parsed as it comes: in pieces, between which all else has its turn."""
    left = iter(range(0, len(body) or 1, bounds.PIECE))

    async def replay() -> Message:
        at = next(left, None)
        if at is None:
            return await receive()
        await asyncio.sleep(0)
        end = at + bounds.PIECE
        return {"type": "http.request", "body": body[at:end], "more_body": end < len(body)}

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
    """The caller's `x-request-id` if there is one that is usable, else a new one; the scope has that one alone."""
    headers = dict(scope["headers"])
    given = headers.get(b"x-request-id", b"").decode("latin-1")
    once = len(headers) == len(scope["headers"]) or sum(name == b"x-request-id" for name, _ in scope["headers"]) == 1
    if once and protocol_errors.REQUEST_ID.fullmatch(given):
        return given, headers
    request_id = uuid.uuid4().hex
    kept = [(name, value) for name, value in scope["headers"] if name != b"x-request-id"]
    scope["headers"] = [*kept, (b"x-request-id", request_id.encode())]
    return request_id, headers


async def _refuse_streamed() -> None:
    raise InvalidRequest("texts are moderated here, and what is streamed in can't be")


async def _refuse_websocket(scope: Scope, send: Send, error: RequestError, request_id: str) -> None:
    """Answer a handshake with an HTTP error, where the server can, else with a closed connection."""
    if "websocket.http.response" not in (scope.get("extensions") or {}):
        await send({"type": "websocket.close", "code": 1013, "reason": error.message[:120]})
        return
    body = protocol_errors.error_body(scope["path"], error)
    headers = [*protocol_errors.error_headers(error, request_id), (b"content-length", str(len(body)).encode())]
    await send({"type": "websocket.http.response.start", "status": error.http_status, "headers": headers})
    await send({"type": "websocket.http.response.body", "body": body})


async def _answer(
    send: Send,
    status: int,
    body: bytes,
    content_type: bytes = b"application/json",
    headers: tuple[tuple[bytes, bytes], ...] = (),
) -> None:
    own = [*(headers or ((b"content-type", content_type),)), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": own})
    await send({"type": "http.response.body", "body": body})
