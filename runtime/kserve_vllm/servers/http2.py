"""HTTP/2 on the HTTP port: requests for the ASGI app, and gRPC calls beside them, stream by stream.

A connection comes here from `http1` when it begins with HTTP/2's preface. What a request means is decided by the same
app as over HTTP/1.1, and what is refused before an app sees it is refused with the same statuses and bounds.

Sources: RFC 9110 (semantics), RFC 9113 (HTTP/2), named where they decide; ASGI 3, as uvicorn has it.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections import deque
from collections.abc import Callable, Iterable
from http import HTTPStatus
from typing import TYPE_CHECKING
from urllib.parse import unquote

import grpc
import httptools
from h2.errors import ErrorCodes
from uvicorn.protocols.utils import get_client_addr, get_path_with_query_string

from kserve_vllm.core.request_context import IDENTIFIED
from kserve_vllm.grpc_server.http2 import REFUSED_S, Connection, Connections, Exchange, Headers, Stream, poll
from kserve_vllm.servers import http1
from kserve_vllm.servers.http1 import RequestRefusal

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Scope

log = logging.getLogger(__name__)
_access = logging.getLogger("uvicorn.access")

MAX_UNTAKEN = 64 << 10
"""Bytes of an answer that wait for a client to take them; its app waits above that."""
MAX_UNREAD_BODIES = 64 << 20
"""Bytes of all requests' bodies that no app has read yet."""
_LAST_WORD_S = 1.0
_GRPC = re.compile(rb"application/grpc(?:[+;].*)?", re.DOTALL)
# What the parser of HTTP/1.1 knows (llhttp): another one is answered 501 there, too.
_METHODS = frozenset(
    b"DELETE GET HEAD POST PUT CONNECT OPTIONS TRACE COPY LOCK MKCOL MOVE PROPFIND PROPPATCH SEARCH UNLOCK BIND REBIND "
    b"UNBIND ACL REPORT MKACTIVITY CHECKOUT MERGE M-SEARCH NOTIFY SUBSCRIBE UNSUBSCRIBE PATCH PURGE MKCALENDAR LINK "
    b"UNLINK SOURCE QUERY".split()
)
# RFC 9112, 3.2: no space, no control character, and what is not ASCII is encoded.
_TARGET = re.compile(rb"/[\x21-\x7e]*")
_TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9a-z-]+")
_UNPRINTABLE = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_IN_AN_ANSWER = re.compile(rb"[\x00-\x1f\x7f()<>@,;:\[\]={} \t\\\"]")
# RFC 9113, 8.2.2.
_OF_A_CONNECTION = frozenset({b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade"})
_NO_BODY = frozenset({HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED})
_FAULT = b"Internal Server Error"


class HTTP2:
    """HTTP/2 of one port.

    Args:
        app: ASGI's, that answers what is no gRPC call.
        open_connections: of the port, with those of HTTP/1.1.
        most: requests that may be open at once, on all connections; one more is answered 503.
        access_log: whether to write a line for each request.
    """

    def __init__(
        self, app: ASGIApp, open_connections: http1.HTTPConnections, most: int, access_log: bool = False
    ) -> None:
        self.app = app
        self.open = open_connections
        self.most = most
        self.access_log = access_log
        self.connections = Connections(bounded=False)
        """Those of HTTP/2; `open` has them as well."""
        self.requests: set[HTTP2Request] = set()
        """Those whose answer is not written."""
        self.tasks: set[asyncio.Task[None]] = set()
        self.unread = 0
        """Bytes of bodies that no app has read."""
        self._calls: Callable[[Stream, Headers], Exchange] | None = None
        self._no_calls = (grpc.StatusCode.UNAVAILABLE, "gRPC is not ready on this port yet")

    def take_calls(self, accept: Callable[[Stream, Headers], Exchange]) -> None:
        """Say what answers gRPC calls."""
        self._calls = accept

    @property
    def answers_calls(self) -> bool:
        """Whether gRPC calls are answered."""
        return self._calls is not None

    def refuse_calls(self, sentence: str) -> None:
        """Say why gRPC calls are not answered here."""
        self._no_calls = (grpc.StatusCode.UNIMPLEMENTED, sentence)

    def connect(self, first: http1.HTTP1) -> asyncio.Protocol:
        """The protocol of a connection that began as one of HTTP/1.1."""
        return _Connection(self, first)

    def accept(self, stream: Stream, headers: Headers) -> Exchange:
        """What runs on a new stream."""
        kinds = [value for name, value in headers if name == b"content-type"]
        if len(kinds) != 1 or not _GRPC.fullmatch(kinds[0]):
            return HTTP2Request(self, stream, headers)
        if self._calls is not None:
            return self._calls(stream, headers)
        code, sentence = self._no_calls
        head = [(b":status", b"200"), (b"content-type", b"application/grpc")]
        stream.headers([*head, (b"grpc-status", b"%d" % code.value[0]), (b"grpc-message", sentence.encode())], end=True)
        return _Refused()

    def make_room(self) -> bool:
        """Whether one more request may be open. Where there are too many, the connection is closed that leaves most
        answers where they are."""
        if len(self.requests) < self.most:
            return True
        found = max(
            (each for each in self.connections if isinstance(each, _Connection)),
            key=lambda each: each.untaken,
            default=None,
        )
        if found is None or not found.untaken:
            return False
        found.calm("does not take the answers to its requests")
        return len(self.requests) < self.most

    def leave(self) -> None:
        """Let clients that are connected now send their next request elsewhere; open ones go on."""
        for connection in list(self.connections):
            connection.leave()

    async def settle(self, timeout_s: float) -> None:
        """Wait until clients have taken what was answered, up to `timeout_s` seconds."""
        await poll(lambda: all(each.flushed for each in self.connections) and not self.requests, timeout_s)

    async def stop(self, grace_s: float) -> None:
        """Take no new requests, give open ones `grace_s` seconds, then end what is left and close all connections.

        Clients that do not take what is sent to them had their time. It takes no longer than `grace_s` and three times
        `_LAST_WORD_S`.
        """
        self.leave()
        for request in list(self.requests):
            request.end_stalled()
        # gRPC calls among them are ended by who has them.
        await poll(self._idle, grace_s)
        for task in list(self.tasks):
            task.cancel()
        await poll(self._idle, _LAST_WORD_S)
        for connection in list(self.connections):
            connection.close()
        await poll(lambda: not self.connections, _LAST_WORD_S)
        for connection in list(self.connections):
            connection.abort()

    def _idle(self) -> bool:
        return all(each.idle and not each.taking for each in self.connections)


class _Connection(Connection):
    """One connection of the HTTP port: counted with those of HTTP/1.1, and closed as those are where it is idle.

    Args:
        port: that it belongs to.
        first: what had it until its preface came.
    """

    def __init__(self, port: HTTP2, first: http1.HTTP1) -> None:
        super().__init__(port.accept, port.connections, http1.MAX_HEAD)
        self.first = first
        self._port = port
        self._running: set[int] = set()
        self._leaves_later = False
        self._idle_timer: asyncio.TimerHandle | None = None

    @property
    def untaken(self) -> int:
        """Streams that are answered, and whose client does not take the answer."""
        return len(self._exchanges) - len(self._running)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio's."""
        super().connection_made(transport)
        self._port.open.add(self)
        self._wait()

    def connection_lost(self, error: Exception | None) -> None:
        """asyncio's."""
        self._port.open.remove(self)
        self._unwait()
        super().connection_lost(error)

    def leave(self) -> None:
        """Take no new streams, and close when the open ones are over.

        While a request is open, that is not said: some clients' libraries read nothing behind a GOAWAY (Python's h2,
        which httpx uses), and would lose the answer. gRPC's clients all do.
        """
        self._leaves_later = any(isinstance(each[1], HTTP2Request) for each in self._exchanges.values())
        if not self._leaves_later:
            super().leave()

    def forget(self, stream_id: int) -> None:
        """An exchange is over."""
        super().forget(stream_id)
        self.rest(stream_id)
        if self._leaves_later:
            # The frame that ends the exchange may be written right after this.
            self.loop.call_soon(self.leave)

    def rest(self, stream_id: int) -> None:
        """An exchange needs nothing more of us."""
        if stream_id in self._running:
            self._running.discard(stream_id)
            if not self._running and not self.broken:
                self._port.open.idle(self)
                self._wait()

    def _on_request(self, number: int, headers: Headers, receives: bool) -> None:
        super()._on_request(number, headers, receives)
        found = self._exchanges.get(number)
        if found is not None and not (isinstance(found[1], HTTP2Request) and found[1].answered):
            self._running.add(number)
            self._port.open.busy(self)
            self._unwait()

    def _on_reset(self, number: int) -> None:
        super()._on_reset(number)
        self.rest(number)

    def _wait(self) -> None:
        """Close it in a while, as one of HTTP/1.1 that is kept alive."""
        self._unwait()
        self._idle_timer = self.loop.call_later(self.first.timeout_keep_alive, self.leave)

    def _unwait(self) -> None:
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None


class _Refused:
    """What was answered when it came."""

    keyless = False

    def feed(self, data: bytes, size: int) -> None:
        """Nobody reads it."""

    def feed_end(self) -> None:
        """Nobody waits for it."""

    def pump(self) -> None:
        """There is nothing to write."""

    def lose(self) -> None:
        """There is nothing to lose."""


class HTTP2Request:
    """One request, from its headers to the end of its answer; ASGI's `receive` and `send` for its app.

    Args:
        port: that it came to.
        stream: that it runs on.
        headers: of the request, pseudo-headers first.
    """

    keyless = False

    def __init__(self, port: HTTP2, stream: Stream, headers: Headers) -> None:
        self._port = port
        self._stream = stream
        connection = stream.connection
        assert isinstance(connection, _Connection)
        self._connection = connection
        self._scope: Scope = {}
        self._event = asyncio.Event()
        self._body = bytearray()
        self._owed = 0
        self._ended = not stream.receives
        self._told_end = False
        self._continue = False
        self._gone = False
        self._refused = False
        self._started = False
        self.answered = False
        """Whether its app has answered; the client may not have taken all of it."""
        self._pending: deque[bytes | memoryview] = deque()
        self.pending_bytes = 0
        self._left: int | None = None
        self._room: asyncio.Future[None] | None = None
        fits = port.make_room()
        if connection.broken:
            # It was this one that had to go.
            self._gone = True
            stream.open = False
            return
        port.requests.add(self)
        try:
            self._scope = self._read(headers)
            if not fits:
                raise RequestRefusal(503, "too many requests are open (--max-connections)")
        except RequestRefusal as refusal:
            self._refuse(refusal, dict(headers).get(b":path", b""))
            if not stream.open:
                self._over()
            return
        port.connections.count(connection, REFUSED_S)
        task = connection.loop.create_task(self._run())
        port.tasks.add(task)
        task.add_done_callback(port.tasks.discard)

    # The head

    def _read(self, headers: Headers) -> Scope:
        """ASGI's scope.

        Raises:
            Refusal: what HTTP/1.1 refuses in a head. What HTTP/2 has refused, h2 did: a pseudo-header too many or too
                few, `host` beside another `:authority`, fields of the connection.
        """
        if sum(len(name) + len(value) + 4 for name, value in headers) > http1.MAX_HEAD:
            raise RequestRefusal(431, f"the head of the request is larger than {http1.MAX_HEAD >> 10} KiB")
        pseudo: dict[bytes, bytes] = {}
        fields: Headers = []
        cookies: list[bytes] = []
        for name, value in headers:
            if name.startswith(b":"):
                pseudo[name] = value
            elif not _TOKEN.fullmatch(name) or _UNPRINTABLE.search(value):
                raise RequestRefusal(400, "a field of the request can't be one of HTTP")
            elif name == b"cookie":
                # RFC 9113, 8.2.3: in parts, for the table.
                cookies.append(value)
            elif name != b"host":
                fields.append((name, value))
        host = pseudo.get(b":authority") or dict(headers).get(b"host", b"")
        # As HTTP/1.1 has it: in front of the others.
        fields.insert(0, (b"host", host))
        if cookies:
            fields.append((b"cookie", b"; ".join(cookies)))
        method, target = pseudo[b":method"], pseudo.get(b":path", b"")
        if len(target) > http1.MAX_TARGET:
            raise RequestRefusal(414, f"the target of the request is longer than {http1.MAX_TARGET >> 10} KiB")
        if len(fields) > http1.MAX_FIELDS:
            raise RequestRefusal(431, f"the head of the request has more than {http1.MAX_FIELDS} fields")
        if method not in _METHODS:
            raise RequestRefusal(501, "this method is not known")
        if not http1.HOST.fullmatch(host):
            raise RequestRefusal(400, "the Host field holds no host")
        # A tunnel has no path (RFC 9113, 8.5), and one for another protocol (RFC 8441) is not offered.
        of_server = method == b"OPTIONS" and target == http1.SERVER
        if method == b"CONNECT" or not (of_server or _TARGET.fullmatch(target)):
            raise RequestRefusal(400, "the target of a request is a path")
        self._read_framing(fields)
        try:
            url = httptools.parse_url(target)
        except httptools.HttpParserInvalidURLError:
            raise RequestRefusal(400, "the target of a request is a path") from None
        path = url.path.decode("ascii")
        first = self._connection.first
        return {
            "type": "http",
            "asgi": {"version": first.asgi_version, "spec_version": "2.3"},
            "http_version": "2",
            "server": first.server,
            "client": first.client,
            "scheme": first.scheme,
            "method": method.decode("ascii"),
            "root_path": first.root_path,
            "path": first.root_path + (unquote(path) if "%" in path else path),
            "raw_path": first.root_path.encode("ascii") + url.path,
            "query_string": url.query or b"",
            "headers": fields,
            "state": first.app_state.copy(),
            IDENTIFIED: self._connection.identified,
        }

    def _read_framing(self, fields: Headers) -> None:
        """Whether there is a body, and how it is said to come.

        Raises:
            Refusal: two lengths, one that is none, or what can't be expected.
        """
        lengths = [value for name, value in fields if name == b"content-length"]
        if len(lengths) > 1 or not all(each.isdigit() for each in lengths):
            raise RequestRefusal(400, "a request has one Content-Length")
        for name, value in fields:
            if name == b"expect":
                if value.lower() != b"100-continue":
                    raise RequestRefusal(417, "only 100-continue can be expected")
                self._continue = True
        if self._stream.receives and not lengths:
            # HTTP/2 says the end of a body by a flag; this is how those behind know that there is one.
            fields.append((b"transfer-encoding", b"chunked"))

    def _refuse(self, refusal: RequestRefusal, target: bytes) -> None:
        """Answer without an app; what one says later is not heard."""
        self._refused = True
        fields, body = refusal.answer(target)
        self._begin(refusal.status, fields)
        self._put(body, True)

    # The app

    async def _run(self) -> None:
        try:
            await self._port.app(self._scope, self.receive, self.send)
        except asyncio.CancelledError:
            self._fail()
            raise
        except Exception as error:
            log.error("an app failed", exc_info=error)
            self._fail()
        else:
            if not self.answered and not self._gone:
                log.error("an app returned without completing its answer")
                self._fail()

    def _fail(self) -> None:
        """End what its app did not."""
        if self.answered or self._gone:
            return
        if self._started:
            self._over()
            self._stream.reset(ErrorCodes.INTERNAL_ERROR)
        else:
            self._begin(
                500, [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", b"%d" % len(_FAULT))]
            )
            self._put(_FAULT, True)

    async def receive(self) -> Message:
        """ASGI's receive."""
        if self._continue and not self._started and not self._gone and not self._ended:
            self._continue = False
            self._stream.headers([(b":status", b"100")])
        while True:
            if self._gone or self.answered:
                return {"type": "http.disconnect"}
            if self._body or (self._ended and not self._told_end):
                body, self._body = bytes(self._body), bytearray()
                self._told_end = self._ended
                self._credit(len(body))
                return {"type": "http.request", "body": body, "more_body": not self._ended}
            await self._event.wait()
            self._event.clear()

    async def send(self, message: Message) -> None:
        """ASGI's send. It waits while the client does not take what was sent before."""
        while self.pending_bytes > MAX_UNTAKEN and not self._gone:
            if self._room is None or self._room.done():
                self._room = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._room)
        if self._gone or self._refused:
            return
        kind = message["type"]
        if not self._started:
            if kind != "http.response.start":
                raise RuntimeError(f"Expected ASGI message 'http.response.start', but got '{kind}'.")
            status = message["status"]
            if self._port.access_log:
                _access.info(
                    '%s - "%s %s HTTP/%s" %d',
                    get_client_addr(self._scope),  # type: ignore[arg-type]
                    self._scope["method"],
                    get_path_with_query_string(self._scope),  # type: ignore[arg-type]
                    "2",
                    status,
                )
            self._begin(status, message.get("headers", ()))
        elif self.answered:
            raise RuntimeError(f"Unexpected ASGI message '{kind}' sent, after response already completed.")
        elif kind == "http.response.body":
            self._put(message.get("body", b""), not message.get("more_body", False))
        else:
            raise RuntimeError(f"Expected ASGI message 'http.response.body', but got '{kind}'.")

    # Writing

    def _begin(self, status: int, fields: Iterable[tuple[bytes, bytes]]) -> None:
        """Send the head of the answer."""
        head: Headers = [(b":status", b"%d" % status)]
        for name, value in [*self._connection.first.server_state.default_headers, *fields]:
            lower = name.lower()
            if _IN_AN_ANSWER.search(name) or _UNPRINTABLE.search(value):
                raise RuntimeError("Invalid HTTP header.")
            if lower == b"content-length" and self._left is None:
                self._left = int(value)
            if lower not in _OF_A_CONNECTION:
                head.append((lower, value.strip(b" \t")))
        if self._scope.get("method") == "HEAD" or status in _NO_BODY:
            self._left = 0
        self._started, self._continue = True, False
        self._stream.headers(head)

    def _put(self, body: bytes, last: bool) -> None:
        """Send a part of the body, now or when the client takes it."""
        if self._scope.get("method") == "HEAD":
            body = b""
        if self._left is not None:
            self._left -= len(body)
            if self._left < 0:
                raise RuntimeError("Response content longer than Content-Length")
            if last and self._left:
                raise RuntimeError("Response content shorter than Content-Length")
        stream = self._stream
        if last:
            self.answered = True
            self._drop_body()
            self._event.set()
        if not self._pending and not last and body and stream.fits(len(body)):
            stream.write(body)
            return
        if body:
            self._pending.append(body)
            self.pending_bytes += len(body)
        self.pump()
        if last and stream.open:
            self._connection.rest(stream.number)

    def pump(self) -> None:
        """Write what waits, as far as there is room."""
        pending, stream = self._pending, self._stream
        while pending and (room := stream.room):
            chunk = pending.popleft()
            if len(chunk) > room:
                chunk = memoryview(chunk)
                pending.appendleft(chunk[room:])
                chunk = chunk[:room]
            self.pending_bytes -= len(chunk)
            if self.answered and not pending:
                self._finish(chunk)
                return
            stream.write(chunk)
        if self.answered and not pending and stream.open:
            self._finish()
        elif self.pending_bytes <= MAX_UNTAKEN:
            self._wake()

    def _finish(self, chunk: bytes | memoryview = b"") -> None:
        self._over()
        self._stream.finish(chunk)

    def _wake(self) -> None:
        if self._room is not None and not self._room.done():
            self._room.set_result(None)

    def _over(self) -> None:
        """Nothing more will be read or written."""
        self._gone = True
        self._port.requests.discard(self)
        self._pending.clear()
        self.pending_bytes = 0
        self._drop_body()
        self._event.set()
        self._wake()

    def end_stalled(self) -> None:
        """End it if its client does not take what is there, since the server ends."""
        if self._pending and not self._gone:
            self._over()
            self._stream.reset(ErrorCodes.CANCEL)

    # What the connection tells

    def feed(self, data: bytes, size: int) -> None:
        """Take a part of the body; `size` bytes of it count for the client's window."""
        if self.answered or self._gone:
            # What is sent after the answer is passed over, as far as the window allows.
            return
        self._body += data
        self._port.unread += len(data)
        self._owed += size - len(data)
        self._event.set()
        if self._port.unread > MAX_UNREAD_BODIES and not self._started:
            self._refuse(
                RequestRefusal(503, "the server holds too much of request bodies that it could not read yet"),
                self._scope["raw_path"],
            )

    def feed_end(self) -> None:
        """The client has sent all."""
        self._ended = True
        self._event.set()

    def lose(self) -> None:
        """The client took the request back, or is gone."""
        self._over()

    def _credit(self, size: int) -> None:
        """So many bytes of the body have been read; let the client send as many more."""
        self._port.unread -= size
        padding, self._owed = self._owed, 0
        self._stream.acknowledge(size + padding)

    def _drop_body(self) -> None:
        self._port.unread -= len(self._body)
        self._body.clear()
