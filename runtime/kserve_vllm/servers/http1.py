"""HTTP/1.1 on one connection: what uvicorn and its parser leave open, bounded, and what they let pass, refused.

A subclass of uvicorn's protocol, for the time in which a request comes in; what goes out is uvicorn's, but for answers
to HTTP/1.0. Nothing here runs per streamed token. A connection that begins with HTTP/2's preface is handed on.

Sources: RFC 9110 (semantics), RFC 9112 (HTTP/1.1), named where they decide. Written against uvicorn 0.54 with
httptools 0.9.
"""

from __future__ import annotations

import asyncio
import itertools
import re
import sys
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from http import HTTPStatus
from typing import Any, Protocol

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from kserve_vllm.core import tcp
from kserve_vllm.core.errors import InvalidRequest, RequestError
from kserve_vllm.protocols import errors as protocol_errors

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
"""What a client begins with that speaks HTTP/2 (RFC 9113, 3.4)."""
MAX_HEAD = 64 << 10
"""Bytes of a request's head: first line and fields."""
MAX_TARGET = 16 << 10
"""Bytes of a request's target, in its first line."""
MAX_FIELDS = 128
"""Fields of a head; and of the trailers behind a body."""
MAX_FRAMING = 64 << 10
"""Bytes of a chunked body that are not the body itself (sizes, extensions, trailers), beyond one for each that is."""
HEAD_TIMEOUT_S = 20.0
"""Seconds from a request's first byte to the end of its head."""
MAX_PIPELINED = 16
"""Requests of a connection that wait for the answer to the one before."""
MAX_REQUESTS = 10_000
"""Requests of one connection; the last one's answer closes it."""
MAX_UNREAD = 16 << 20
"""Bytes that are still read of a body whose request has been answered, before the connection is closed."""
UNREAD_TIMEOUT_S = 10.0
"""Seconds for which they are read."""
ASK_AFTER_S = (0.02, 0.05, 0.1, 0.1, 0.2, 0.2, 0.5)
"""Seconds between the questions whether a client is still there that has sent all it has; the last is repeated."""

WEBSOCKET_VERSION = b"13"
"""Of the protocol of websockets: RFC 6455's."""
_SPOKEN = ((b"sec-websocket-version", WEBSOCKET_VERSION), (b"upgrade", b"websocket"), (b"connection", b"upgrade"))
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_LINES = 32  # what else a first line holds, and the empty line
_METHOD = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+ \S")
# RFC 3986, 3.2.2 and 3.2.3: a name or address, and a port.
HOST = re.compile(rb"(?:\[[0-9A-Fa-f:.%]+\]|[A-Za-z0-9._~%!$&'()*+,;=-]*)(?::[0-9]{0,5})?")
SERVER = b"*"
"""The target of an OPTIONS that asks of the server as a whole (RFC 9110, 9.3.7)."""
# RFC 9110, 4.2.1 and 4.2.4: an authority, and no user's name in it.
_PATH_AND_QUERY = re.compile(rb"https?://[^/?#@]+(?=[/?#]|$)", re.IGNORECASE)


class RequestRefusal(Exception):
    """A request that is answered before any app sees it; the connection is closed.

    Args:
        status: of the answer.
        sentence: says why.
        fields: further ones of the answer.
    """

    def __init__(self, status: int, sentence: str, fields: Sequence[tuple[bytes, bytes]] = ()) -> None:
        super().__init__(sentence)
        self.status = status
        self.sentence = sentence
        self.fields = tuple(fields)

    def answer(self, target: bytes) -> tuple[list[tuple[bytes, bytes]], bytes]:
        """Fields and body of the answer to a request for `target`."""
        error: RequestError = InvalidRequest(self.sentence)
        error.http_status, error.close = self.status, True
        if self.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            error.openai_type = "ServiceUnavailableError"
        body = protocol_errors.error_body(_path(target), error)
        fields = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), *self.fields]
        return fields, body


class Held(Protocol):
    """A connection that is counted."""

    transport: asyncio.Transport


class HTTPConnections:
    """The open connections of one port, oldest idle one first.

    Args:
        most: how many may be open. One more closes the one that has waited longest for a request; where none waits, the
            new one is answered 503.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._open = 0
        # Ordered by insertion: a connection that becomes idle goes to the end.
        self._idle: dict[Held, None] = {}
        self.evicted = 0

    @property
    def open(self) -> int:
        """How many are open."""
        return self._open

    def add(self, connection: Held) -> bool:
        """Take a new connection in; False where there is no room for it."""
        self._open += 1
        if self._open > self._most:
            if not self._idle:
                return False
            oldest = next(iter(self._idle))
            self._idle.pop(oldest)
            self.evicted += 1
            oldest.transport.abort()
        self._idle[connection] = None
        return True

    def remove(self, connection: Held) -> None:
        """Forget a connection that is closed."""
        self._open -= 1
        self._idle.pop(connection, None)

    def busy(self, connection: Held) -> None:
        """A request of it has come."""
        self._idle.pop(connection, None)

    def idle(self, connection: Held) -> None:
        """It waits for a request."""
        self._idle[connection] = None


class HTTP1(HttpToolsProtocol):
    """One connection.

    Args:
        open_connections: those of the port.
        http2: makes what takes over a connection that begins with HTTP/2's preface; None: such a one is refused.
        arguments: uvicorn's.
    """

    def __init__(
        self,
        open_connections: HTTPConnections,
        http2: Callable[[HTTP1], asyncio.Protocol] | None,
        *arguments: Any,
        **named: Any,
    ) -> None:
        super().__init__(*arguments, **named)
        self._open = open_connections
        self._http2 = http2
        self._begun = b""
        """What may become HTTP/2's preface, while `_http2` is there."""
        self._in_head = True
        self._head_bytes = 0
        self._target_bytes = 0
        self._pending = 0
        """Bytes of a head that is not complete, or of a body's framing, less the body."""
        self._body_bytes = 0
        self._unread = 0
        self._trailers = 0
        self._requests = 0
        self._refusal: RequestRefusal | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._head_timed = False
        self._last = b""
        self._rest = b""
        """What follows a request that offered another protocol."""
        self._body_skipped = False
        """Whether the parser has left out the body of such a request."""
        self._goes_on = False
        """Whether a new parser is told where the one before had come to."""
        self._running: RequestResponseCycle | None = None
        """The request that is being answered; `cycle` is the newest one."""
        self._watcher: asyncio.TimerHandle | None = None
        self._asking: Iterator[float] | None = None
        """When to ask a client that has ended its side whether it is still there; None while its side is open."""

    # The connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """asyncio's."""
        super().connection_made(transport)
        if not self._open.add(self):
            self._refuse(RequestRefusal(503, "too many connections are open (--max-connections)"))
        else:
            # A connection on which nothing ever comes is closed as one that is kept alive.
            self._set_timer(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio's."""
        self._unset_timer()
        self._open.remove(self)
        if self._watcher is not None:
            self._watcher.cancel()
        if (running := self._running) is not None and not running.response_complete:
            # uvicorn tells the newest one, which may wait behind it.
            running.disconnected = True
            running.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """asyncio's."""
        if self._refusal is not None:
            return
        if self._http2 is not None:
            data = self._begun + data
            if data.startswith(PREFACE):
                self._hand_on(data)
                return
            if PREFACE.startswith(data):
                self._begun = data
                if not self._head_timed:
                    self._head_timed = True
                    self._set_timer(HEAD_TIMEOUT_S, self._head_timeout)
                return
            self._http2 = None
        self._pending += len(data)
        self._last = data
        try:
            super().data_received(data)
            while self._rest and self._refusal is None:
                self._last, self._rest = self._rest, b""
                super().data_received(self._last)
            if self._in_head:
                if self._pending > 0 and not self._head_timed:
                    self._head_timed = True
                    self._set_timer(HEAD_TIMEOUT_S, self._head_timeout)
                if self._pending > MAX_HEAD:
                    raise RequestRefusal(431, f"the head of the request is larger than {MAX_HEAD >> 10} KiB")
            elif self._pending > MAX_FRAMING + self._body_bytes:
                raise RequestRefusal(
                    400, "the body is sent in too many and too small chunks, or with too much beside it"
                )
        except RequestRefusal as refusal:
            self._refuse(refusal)

    def eof_received(self) -> bool:  # type: ignore[override]
        """asyncio's. The client has ended its side (RFC 9293, 3.6): what it has asked for is answered, unless it is
        gone altogether, which looks the same from here.

        Over TLS nobody can end one side alone in asyncio; the connection is closed then.
        """
        cycle = self.cycle  # of the newest request, which is the last one now
        waits = cycle is not None and not cycle.response_complete and not cycle.more_body
        if self._asking is not None:
            return waits
        if not waits or self.scheme == "https":
            return False
        if cycle.scope["http_version"] == "1.0" and cycle.scope["method"] not in ("GET", "HEAD"):
            # It can't be asked, see `_ask`, and a model is not to work for nobody.
            return False
        cycle.keep_alive = False
        self._asking = itertools.chain(ASK_AFTER_S, itertools.repeat(ASK_AFTER_S[-1]))
        self._ask()
        return True

    def _ask(self) -> None:
        """Find out whether a client that has ended its side is still there, and forget its requests if it is not.

        Its kernel says so when something is sent to it, and not before. An interim answer is the one thing that may be
        sent while there is no answer (RFC 9110, 15.2), though not in HTTP/1.0, and changes nothing. Where an answer has
        begun, its next part asks.
        """
        if self._asking is None or not self._answers:
            return
        if self._turned_down():
            self.transport.abort()
            return
        self._say_continue()
        self._set_timer(next(self._asking), self._ask)

    def _watch(self) -> None:
        """Look now and then whether the client is still there. While another request waits behind the one that is
        answered, nothing may be read, and nobody says that it has left."""
        if self._watcher is None:
            self._watcher = self.loop.call_later(ASK_AFTER_S[-1], self._look)

    def _look(self) -> None:
        self._watcher = None
        if self._asking is not None or not self._answers:
            return
        state = tcp.state(self.transport)
        if state == tcp.CLOSE:
            self.transport.abort()
            return
        if state == tcp.CLOSE_WAIT:
            self._say_continue()
        self._watch()

    @property
    def _answers(self) -> bool:
        """Whether a request is being answered."""
        running = self._running
        return running is not None and not running.response_complete and not self.transport.is_closing()

    def _say_continue(self) -> None:
        """The interim answer, where the answer has not begun."""
        running = self._running
        if running is not None and not running.response_started and running.scope["http_version"] == "1.1":
            self.transport.write(_CONTINUE)

    def _turned_down(self) -> bool:
        """Whether the client's kernel has ended the connection, where this one tells; the event loop would find out
        with the next thing that it writes."""
        return tcp.state(self.transport) == tcp.CLOSE

    def _hand_on(self, data: bytes) -> None:
        """This is a connection of HTTP/2."""
        assert self._http2 is not None
        self._unset_timer()
        self._open.remove(self)
        self.connections.discard(self)
        protocol = self._http2(self)
        self.transport.set_protocol(protocol)
        protocol.connection_made(self.transport)
        protocol.data_received(data)

    def send_400_response(self, msg: str) -> None:
        """uvicorn's, for what its parser refuses."""
        error = sys.exc_info()[1]
        refused = error.__context__ if isinstance(error, httptools.HttpParserCallbackError) else None
        if isinstance(refused, RequestRefusal):
            self._refuse(refused)
        elif isinstance(error, httptools.HttpParserInvalidMethodError) and _METHOD.match(self._last.lstrip()):
            # RFC 9110, 9.1.
            self._refuse(RequestRefusal(501, "this method is not known"))
        elif "HTTP version" in str(error):
            self._refuse(RequestRefusal(505, "this is answered in HTTP/1.1 and HTTP/1.0"))
        else:
            self._refuse(RequestRefusal(400, "this is no HTTP/1.1 request that can be read"))

    def _refuse(self, refusal: RequestRefusal) -> None:
        """Answer, once the answers to requests before are out, and close the connection."""
        if self._refusal is not None:
            return
        self._refusal = refusal
        self._unset_timer()
        first_in_line = not self.pipeline
        self.pipeline.clear()
        cycle = self.cycle
        if cycle is None or cycle.response_complete:
            self._answer_refusal()
        elif first_in_line and cycle.more_body and not cycle.response_started:
            # The body of this request is what is refused.
            cycle.disconnected = True
            cycle.message_event.set()
            self._answer_refusal()
        else:
            # It is answered behind the answer to the request before, or cut off behind the one to itself.
            cycle.keep_alive = not cycle.more_body
            self.flow.pause_reading()
            self._watch()

    def _answer_refusal(self) -> None:
        if self.transport.is_closing() or self._refusal is None:
            return
        refusal = self._refusal
        fields, body = refusal.answer(self.url if self.scope else b"")
        fields.append((b"connection", b"close"))
        head = b"HTTP/1.1 %d %b\r\n" % (refusal.status, HTTPStatus(refusal.status).phrase.encode())
        self.transport.write(head + b"".join(b"%b: %b\r\n" % field for field in fields) + b"\r\n" + body)
        self.transport.close()

    def handle_websocket_upgrade(self) -> None:
        """uvicorn's. The connection counts as open until the protocol that takes it over has lost it.

        uvicorn calls it an error of the app that a handshake is answered in HTTP, which any client can bring about; so
        it is told that the handshake is over.
        """
        super().handle_websocket_upgrade()
        taken_by: Any = self.transport.get_protocol()
        if not taken_by.handshake_initiated:
            # Its parser has bounds of its own, and would say nothing more.
            taken_by.connections.discard(taken_by)
            self.transport.set_protocol(self)
            raise RequestRefusal(431, "the handshake has a line of more than 8 KiB, or too many fields")
        lost, send = taken_by.connection_lost, taken_by.send

        def connection_lost(exc: Exception | None) -> None:
            self._open.remove(self)
            lost(exc)

        async def send_and_note(message: MutableMapping[str, object]) -> None:
            await send(message)
            if message["type"] == "websocket.http.response.body" and not message.get("more_body"):
                taken_by.handshake_complete = True

        taken_by.connection_lost, taken_by.send = connection_lost, send_and_note

    def _set_timer(self, after_s: float, then: Callable[[], None]) -> None:
        self._unset_timer()
        self._timer = self.loop.call_later(after_s, then)

    def _unset_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _head_timeout(self) -> None:
        self._refuse(RequestRefusal(408, f"the head of the request did not come within {HEAD_TIMEOUT_S:g} s"))

    def _unread_timeout(self) -> None:
        self.transport.close()

    # The parser

    def on_message_begin(self) -> None:
        """httptools'."""
        if self._goes_on:
            return
        super().on_message_begin()
        self._in_head = True
        self._head_bytes = self._target_bytes = self._body_bytes = self._trailers = self._unread = 0

    def on_url(self, url: bytes) -> None:
        """httptools'."""
        if self._goes_on:
            return
        self._target_bytes += len(url)
        if self._target_bytes > MAX_TARGET:
            raise RequestRefusal(414, f"the target of the request is longer than {MAX_TARGET >> 10} KiB")
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """httptools'. Fields behind the body are no part of the head, and nobody here wants them (RFC 9110, 6.5.1)."""
        if self._goes_on:
            return
        if not self._in_head:
            self._trailers += 1
            if self._trailers > MAX_FIELDS:
                raise RequestRefusal(431, f"there are more than {MAX_FIELDS} fields behind the body")
            return
        self._head_bytes += len(name) + len(value) + 4
        if len(self.headers) >= MAX_FIELDS:
            raise RequestRefusal(431, f"the head of the request has more than {MAX_FIELDS} fields")
        if self._head_bytes > MAX_HEAD:
            raise RequestRefusal(431, f"the head of the request is larger than {MAX_HEAD >> 10} KiB")
        # RFC 9110, 5.5: blanks and tabs around a value are no part of it; the parser leaves a tab at the end. How it
        # has understood a coding is its own affair, which is not to be told another way here.
        if value.endswith(b"\t") and name.lower() != b"transfer-encoding":
            value = value.rstrip(b" \t")
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """httptools'."""
        if self._goes_on:
            return
        self._in_head = self._head_timed = False
        # What came behind the head belongs to the body.
        self._pending = max(0, self._pending - self._target_bytes - self._head_bytes - _LINES)
        self._unset_timer()
        self._check_head()
        if len(self.pipeline) >= MAX_PIPELINED:
            raise RequestRefusal(503, f"more than {MAX_PIPELINED} requests wait on this connection")
        self._open.busy(self)
        self._requests += 1
        before = self.cycle
        super().on_headers_complete()
        cycle = self.cycle
        if cycle is before:  # a websocket's handshake, which is answered elsewhere
            return
        if self.pipeline:
            self._watch()
        else:
            self._running = cycle
        if self.scope["http_version"] == "1.0":
            cycle.__class__ = _UntilClose
        self._body_skipped = self.parser.should_upgrade() and bool(self._framing())
        if self._requests >= MAX_REQUESTS or self.parser.get_method() == b"CONNECT":
            cycle.keep_alive = False

    def _check_head(self) -> None:
        """Refuse what RFC 9112 has refused, and what two servers in a row could read in two ways."""
        version = self.parser.get_http_version()
        if version not in ("1.0", "1.1"):
            raise RequestRefusal(505, "this is answered in HTTP/1.1 and HTTP/1.0")
        hosts, coding, of_websocket = [], [], []
        for name, value in self.headers:
            if name == b"host":
                hosts.append(value)
            elif name == b"transfer-encoding":
                coding.append(value.lower())
            elif name == b"sec-websocket-version":
                of_websocket.append(value)
            elif name == b"expect" and version != "1.0" and value.lower() != b"100-continue":
                raise RequestRefusal(417, "only 100-continue can be expected")
        # RFC 9112, 3.2.
        if len(hosts) > 1 or (not hosts and version == "1.1"):
            raise RequestRefusal(400, "a request has one Host field")
        if hosts and not HOST.fullmatch(hosts[0]):
            raise RequestRefusal(400, "the Host field holds no host")
        # RFC 9112, 6.1.
        if coding and version == "1.0":
            raise RequestRefusal(400, "HTTP/1.0 has no Transfer-Encoding")
        if coding and coding != [b"chunked"]:
            raise RequestRefusal(501, "the only Transfer-Encoding that is understood is chunked")
        # RFC 6455, 4.4; RFC 9110, 15.5.22. A handshake without a version is refused as one.
        if (
            of_websocket
            and of_websocket != [WEBSOCKET_VERSION]
            and self.parser.should_upgrade()
            and self._should_upgrade()
        ):
            raise RequestRefusal(426, "the only version of websockets that is spoken is 13", _SPOKEN)
        asks_server = self.parser.get_method() == b"OPTIONS"
        # RFC 9112, 3.2.2: an absolute target's path may be empty, which of an OPTIONS means the server (3.2.4).
        if (origin := _PATH_AND_QUERY.match(self.url)) is not None:
            self.url = self.url[origin.end() :] or (SERVER if asks_server else b"/")
            if self.url.startswith((b"?", b"#")):
                self.url = b"/" + self.url
        if not self.url.startswith(b"/") and not (asks_server and self.url == SERVER):
            raise RequestRefusal(400, "the target of a request is a path")

    def _should_upgrade(self) -> bool:
        # RFC 6455, 4.1: a handshake is a GET of HTTP/1.1. Every other request is answered as it stands.
        return (
            self.parser.get_method() == b"GET" and self.parser.get_http_version() == "1.1" and super()._should_upgrade()
        )

    def _framing(self) -> bytes:
        """The field that says where the body ends; empty where there is no body. The parser has checked it."""
        for name, value in self.headers:
            if name == b"transfer-encoding" or (name == b"content-length" and int(value)):
                return b"%b: %b" % (name, value)
        return b""

    def _unsupported_upgrade_warning(self) -> None:
        """uvicorn's, for a request that offers another protocol, as Java's client and `curl --http2` do with HTTP/2.

        None is taken up, so HTTP/1.1 goes on, body and all (RFC 9110, 7.8). The parser takes what follows the head for
        that other protocol; another parser goes on where it has stopped.
        """
        upgrade = sys.exc_info()[1]
        assert isinstance(upgrade, httptools.HttpParserUpgrade)
        self._rest = self._last[upgrade.args[0] :]
        self.parser = httptools.HttpRequestParser(self)
        # As uvicorn has it: data behind the last request of a connection is no error.
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        if self._body_skipped:
            self._body_skipped, self._goes_on = False, True
            self.parser.feed_data(b"POST / HTTP/1.1\r\nhost: h\r\n%b\r\n\r\n" % self._framing())
            self._goes_on = False

    def on_body(self, body: bytes) -> None:
        """httptools'."""
        self._body_bytes += len(body)
        self._pending -= len(body)
        super().on_body(body)
        if self.cycle is not None and self.cycle.response_complete:
            self._unread += len(body)
            if self._unread > MAX_UNREAD:
                self.transport.close()

    def on_message_complete(self) -> None:
        """httptools'."""
        if self._body_skipped:
            return
        super().on_message_complete()
        self._unset_timer()
        # What follows is another request's head.
        self._in_head, self._pending = True, 0
        if self.cycle is not None and self.cycle.response_complete:
            self._open.idle(self)

    def on_response_complete(self) -> None:
        """uvicorn's."""
        if self._refusal is not None:
            self._answer_refusal()
            return
        if self.pipeline:
            self._running = self.pipeline[-1][0]
        super().on_response_complete()
        if self.pipeline:
            self._watch()
        if self.transport.is_closing():
            return
        if not self._in_head:
            # The answer came before the end of its request's body.
            self._set_timer(UNREAD_TIMEOUT_S, self._unread_timeout)
        elif self.cycle.response_complete:
            self._open.idle(self)

    def stalled(self) -> bool:
        """Whether an answer waits for a client that does not read."""
        return self.flow is not None and self.flow.write_paused


class _UntilClose(RequestResponseCycle):
    """An answer to HTTP/1.0, which knows no chunks: one without a length ends with the connection (RFC 9112, 6.3)."""

    async def send(self, message: Any) -> None:
        """ASGI's send."""
        if message["type"] == "http.response.start":
            if not any(name.lower() == b"content-length" for name, _ in message.get("headers", ())):
                self.chunked_encoding, self.expected_content_length = False, sys.maxsize
        elif not message.get("more_body") and self.expected_content_length > 1 << 62:
            self.expected_content_length = len(message.get("body", b""))
        await super().send(message)


def abort_stalled(connections: Iterable[object]) -> int:
    """Close connections whose clients do not take what is sent; returns how many."""
    found = [each for each in connections if isinstance(each, HTTP1) and each.stalled()]
    for each in found:
        each.transport.abort()
    return len(found)


def _path(target: bytes) -> str:
    return target.partition(b"?")[0].decode("latin-1")
