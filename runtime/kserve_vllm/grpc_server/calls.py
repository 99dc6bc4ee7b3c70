"""gRPC calls on HTTP/2 streams: messages, metadata, deadlines and the status at the end.

Runs the handlers that one would give to `grpc.aio.server`, with that part of its `ServicerContext` which ours, health
and reflection use, and one thing more: an `SendBuffer`, which writes a message where it comes up, in no task.
Source: grpc/grpc, `doc/PROTOCOL-HTTP2.md` and `doc/compression.md`.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import inspect
import logging
import re
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeAlias, TypeVar
from urllib.parse import quote

import grpc
from h2.errors import ErrorCodes

from kserve_vllm.grpc_server.http2 import (
    MAX_HEADERS,
    MAX_KEYLESS_STREAMS,
    Connection,
    Connections,
    Headers,
    Stream,
    poll,
)
from kserve_vllm.grpc_server.receive_buffer import WINDOW_BITS, ReceiveBudget, ReceiveBuffer, ReceiveShare, Unreadable
from kserve_vllm.protocols.oip.grpc_enforcement import ADMITTED, Metadata, Screened

log = logging.getLogger(__name__)
T = TypeVar("T")
if TYPE_CHECKING:
    # Of methods with whichever messages.
    Handlers: TypeAlias = grpc.GenericRpcHandler[Any, Any]

_TIMEOUT = re.compile(rb"^([0-9]{1,8})([HMSmun])$")
_UNITS_S = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
# Headers that are the protocol's, not the caller's metadata.
_RESERVED = frozenset(
    {b"te", b"content-type", b"content-length", b"grpc-timeout", b"grpc-encoding", b"grpc-accept-encoding"}
)
LAST_WORD_S = 1.0
_MAX_PATH = 200
KEYLESS_MESSAGE = 64 << 10
"""Bytes of a message, and of messages that wait to be read, of a call that needs no key."""
KEYLESS_HELD, _KEYLESS_LEAST = 4 << 20, 16 << 10
MAX_KEYLESS_CALLS = 8192
"""Calls of all connections that are open at once and need no key. Above it, the connection with most of them goes."""
_ENCODINGS = b"identity, deflate, gzip"
_HEAD: Headers = [
    (b":status", b"200"),
    (b"content-type", b"application/grpc"),
    (b"grpc-accept-encoding", _ENCODINGS),
]
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f]")
# What grpc-message may hold as it is: printable ASCII but the percent sign.
_PLAIN = "".join(chr(c) for c in range(0x20, 0x7F) if chr(c) != "%")


@dataclass
class Services:
    """What a gRPC server answers.

    Attributes:
        max_message: largest message from a client, in bytes, before and after it is decompressed.
        message_timeout_s: that a message may take to come in; 0: as long as it likes.
        screen: decides about a call by its path and metadata, before any of its messages is read.
        handlers: generic handlers, asked in turn.
        connections: those that are open, of the port that is gRPC's own.
        shared: those of ports that have calls among other requests, and open and close their connections themselves.
        open_calls: those that are not at their end, on whichever port.
    """

    max_message: int
    message_timeout_s: float = 60.0
    screen: Callable[[str, Metadata], Screened] = lambda path, metadata: ADMITTED
    handlers: list[Handlers] = field(default_factory=list)
    connections: Connections = field(default_factory=Connections)
    shared: list[Connections] = field(default_factory=list)
    open_calls: set[Call] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.budget = ReceiveBudget(4 * self.max_message)
        """For what calls hold of messages that are not complete, or not read yet."""
        self.keyless_budget = ReceiveBudget(KEYLESS_HELD, _KEYLESS_LEAST)
        """The same for calls that need no key."""
        self._shares: weakref.WeakValueDictionary[Hashable, ReceiveShare] = weakref.WeakValueDictionary()

    def share(self, owner: Hashable, budget: ReceiveBudget) -> ReceiveShare:
        """What a caller holds of a budget."""
        found = self._shares.get((owner, id(budget)))
        if found is None:
            found = self._shares[owner, id(budget)] = ReceiveShare(budget)
        return found

    def connect(self) -> Connection:
        """The protocol of a new connection."""
        return Connection(self.accept, self.connections)

    def accept(self, stream: Stream, headers: Headers) -> Call:
        """The call that a client makes on a new stream, of a connection of whichever port."""
        return Call(self, stream, headers)

    def shed(self) -> None:
        """Make room for one more call without a key: close the connection that has the most of them."""
        everywhere = [each for port in (self.connections, *self.shared) for each in port]
        if sum(each.keyless for each in everywhere) >= MAX_KEYLESS_CALLS:
            max(everywhere, key=lambda each: each.keyless).calm("has more calls without a key than any other")

    def leave(self) -> None:
        """Let clients that are connected now open no new calls here; they go to another server."""
        for connection in list(self.connections):
            connection.leave()

    async def settle(self, timeout_s: float) -> None:
        """Wait until clients have taken what was answered, up to `timeout_s` seconds."""
        await poll(
            lambda: all(each.flushed for each in self.connections) and not any(call.owes for call in self.open_calls),
            timeout_s,
        )

    async def stop(self, grace_s: float) -> None:
        """Take no new calls, give open ones `grace_s` seconds, then end what is left and close all connections.

        Whatever clients do, this takes no longer than `grace_s` and three times `LAST_WORD_S`.
        """
        self.leave()
        await asyncio.gather(*(call.finish(grace_s) for call in list(self.open_calls)))
        # gRPC's clients close by themselves then, once they have read all.
        await poll(lambda: not any(each.taking for each in self.connections), min(grace_s, LAST_WORD_S))
        for connection in list(self.connections):
            connection.close()
        # What is written last goes out after that.
        await poll(lambda: not self.connections, LAST_WORD_S)
        for connection in list(self.connections):
            connection.abort()

    def add_generic_rpc_handlers(self, handlers: Iterable[Handlers]) -> None:
        """As `grpc.aio.Server` has it."""
        self.handlers.extend(handlers)

    def add_registered_method_handlers(self, name: str, handlers: object) -> None:
        """As `grpc.aio.Server` has it. Generated code calls both; one is enough."""

    def find(self, method: str, metadata: Metadata) -> Any:
        """The handler of a path, `/service/method`, or None."""
        details = _Details(method, tuple(metadata))
        return next((found for each in self.handlers if (found := each.service(details)) is not None), None)


@dataclass
class _Details(grpc.HandlerCallDetails):
    method: str
    invocation_metadata: tuple[tuple[str, str | bytes], ...]


class _Ended(Exception):
    """A handler ended its call with a status."""


class Call:
    """One call, from its request headers to its status; the context that its handler gets.

    Args:
        services: of the server.
        stream: that it runs on.
        headers: of the request.
    """

    def __init__(self, services: Services, stream: Stream, headers: Headers) -> None:
        self._services = services
        self._stream = stream
        self._loop = asyncio.get_running_loop()
        self.keyless = False
        """Whether it was let in without a key, since it needs none."""
        share = services.share(stream.connection, services.keyless_budget)
        self.inbox = ReceiveBuffer(
            stream, share, KEYLESS_MESSAGE, services.message_timeout_s, self._cut, max_unread=KEYLESS_MESSAGE
        )
        self._begun = False
        self._pending: deque[bytes | memoryview] = deque()
        self._room: asyncio.Future[None] | None = None
        self._outbox: SendBuffer[Any] | None = None
        self._trailers: Headers | None = None
        self._status: tuple[grpc.StatusCode, str, Metadata] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._ended: asyncio.Future[None] | None = None
        self._metadata: Metadata = ()
        self._handler: Any = None
        self._open(headers)

    # What handlers use

    def invocation_metadata(self) -> Metadata:
        """The caller's metadata: text, and bytes where the name ends in `-bin`."""
        return self._metadata

    async def send_initial_metadata(self, metadata: Metadata) -> None:
        """Send the headers of the answer now, with metadata among them."""
        self._begin(metadata)

    async def write(self, message: object) -> None:
        """Send a message of a stream; waits while the client does not take what was sent before."""
        await self._wait_for_room()
        self.send(self._handler.response_serializer(message))

    def outbox(self, take: Callable[[T], list[bytes]]) -> SendBuffer[T]:
        """A queue for what is sent as soon as it can be.

        Args:
            take: the serialized messages of something that was put, asked for when they can be sent.
        """
        self._outbox = made = SendBuffer(self, take)
        return made

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Metadata = ()) -> NoReturn:
        """End the call with an error."""
        self._status = (code, details, trailing_metadata)
        raise _Ended

    # Reading

    def feed(self, data: bytes, size: int) -> None:
        """Take bytes that the client sent."""
        self.inbox.feed(data, size)

    def feed_end(self) -> None:
        """The client has sent all."""
        self.inbox.feed_end()

    def __aiter__(self) -> AsyncIterator[object]:
        return self

    async def __anext__(self) -> object:
        try:
            message = await self.inbox.get()
        except Unreadable as error:
            await self.abort(error.code, error.details)
        if message is None:
            raise StopAsyncIteration
        try:
            return self._handler.request_deserializer(message)
        except Exception:
            await self.abort(grpc.StatusCode.INTERNAL, "the message can't be decoded")

    # Writing

    @property
    def blocked(self) -> bool:
        """Whether something that was sent still waits for the client to take it."""
        return bool(self._pending) or not self._stream.fits(1)

    @property
    def owes(self) -> bool:
        """Whether something is left that was answered and not sent."""
        return bool(self._pending or self._trailers or (self._outbox is not None and self._outbox.waiting))

    @property
    def open(self) -> bool:
        """Whether the client still waits for anything."""
        return self._stream.open

    def send(self, message: bytes) -> None:
        """Send a serialized message; it waits here if the client does not take it now."""
        if self._trailers is not None or not self._stream.open:
            return
        if not self._begun:
            self._begin(())
        data = b"\0%b%b" % (len(message).to_bytes(4, "big"), message)
        if not self._pending and self._stream.fits(len(data)):
            self._stream.write(data)
        else:
            self._pending.append(data)
            self.pump()

    def pump(self) -> None:
        """Write what waits, as far as there is room."""
        pending, stream = self._pending, self._stream
        while pending and (room := stream.room):
            chunk = pending.popleft()
            if len(chunk) > room:
                chunk = memoryview(chunk)
                pending.appendleft(chunk[room:])
                chunk = chunk[:room]
            stream.write(chunk)
        if pending or not stream.open:
            return
        if self._trailers is not None:
            self._close()
            return
        if self._room is not None and not self._room.done() and stream.room:
            self._room.set_result(None)
        if self._outbox is not None:
            self._outbox.drain()

    def lose(self) -> None:
        """The client is gone, or does not want the answer any more."""
        self._over()
        if self._task is not None:
            self._task.cancel()

    async def finish(self, timeout_s: float) -> None:
        """Wait until the client has the whole answer; end the call after `timeout_s` seconds, since the server ends."""
        if self not in self._services.open_calls:
            return
        self._ended = self._loop.create_future()
        await asyncio.wait({self._ended}, timeout=timeout_s)
        self._give_up(grpc.StatusCode.UNAVAILABLE, "the server is closing")
        await asyncio.wait({self._ended}, timeout=LAST_WORD_S)

    async def _wait_for_room(self) -> None:
        while self.blocked and self._stream.open:
            self._room = self._loop.create_future()
            await self._room

    def _begin(self, metadata: Metadata) -> None:
        if not self._begun and self._stream.open:
            self._begun = True
            self._stream.headers(_HEAD + _encoded(metadata))

    def _end(self, code: grpc.StatusCode, details: str, trailing: Metadata) -> None:
        """Send the status, after what waits."""
        self.inbox.close()
        if self._trailers is not None or not self._stream.open:
            return
        head = [] if self._begun else _HEAD
        trailers = [*head, (b"grpc-status", str(code.value[0]).encode())]
        if details:
            # Half of a surrogate pair has no UTF-8, and the call has to end all the same.
            trailers.append((b"grpc-message", quote(details.encode("utf-8", "replace"), safe=_PLAIN).encode()))
        self._trailers = trailers + _encoded(trailing)
        self.pump()

    def _close(self) -> None:
        trailers = self._trailers
        assert trailers is not None
        self._over()
        self._stream.headers(trailers, end=True)

    def _over(self) -> None:
        """Nothing more will be read or written."""
        if self._timer is not None:
            self._timer.cancel()
        self._services.open_calls.discard(self)
        self._pending.clear()
        self.inbox.close()
        if self._outbox is not None:
            self._outbox.drop()
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)

    # The call itself

    def _open(self, headers: Headers) -> None:
        """Read the request's headers and begin, or answer at once that it can't be."""
        named = dict(headers)
        content_type = named.get(b"content-type", b"")
        if named.get(b":method") != b"POST" or not content_type.startswith(b"application/grpc"):
            status = b"405" if named.get(b":method") != b"POST" else b"415"
            return self._stream.headers([(b":status", status), (b"content-length", b"0")], end=True)
        self._services.open_calls.add(self)
        size = sum(len(name) + len(value) + 32 for name, value in headers)
        if size > MAX_HEADERS:
            sentence = f"the metadata has {size} bytes; at most {MAX_HEADERS} are taken"
            return self._end(grpc.StatusCode.RESOURCE_EXHAUSTED, sentence, ())
        try:
            self._metadata = _decoded(headers)
            timeout_s = _timeout_s(named.get(b"grpc-timeout"))
        except ValueError as error:
            return self._end(grpc.StatusCode.INTERNAL, str(error), ())
        encoding = named.get(b"grpc-encoding", b"identity").decode("latin-1")
        if encoding in WINDOW_BITS:
            self.inbox.encoding = encoding
        elif encoding != "identity":
            return self._end(grpc.StatusCode.UNIMPLEMENTED, f"grpc-encoding {encoding} is not taken", ())
        path = named.get(b":path", b"").decode("latin-1")
        self._handler = self._services.find(path, self._metadata)
        if self._handler is None:
            return self._end(grpc.StatusCode.UNIMPLEMENTED, f"there is no method {path[:_MAX_PATH]}", ())
        if (refusal := self._screen(path)) is not None:
            return self._end(*refusal)
        if not self._handler.request_streaming:
            self.inbox.expect_one()
        if timeout_s is not None:
            self._timer = self._loop.call_later(timeout_s, self._too_late)
        self._task = self._loop.create_task(self._handle())
        self._task.add_done_callback(self._answered)
        return None

    def _screen(self, path: str) -> tuple[grpc.StatusCode, str, Metadata] | None:
        """Decide by the headers alone; with what the call is to be refused, or None."""
        services, connection = self._services, self._stream.connection
        screened = services.screen(path, self._metadata)
        if screened.refusal is not None:
            return screened.refusal
        if not screened.keyless:
            connection.identified()
            owner: Hashable = connection if screened.owner is None else screened.owner
            self.inbox.admit(services.share(owner, services.budget), services.max_message)
            return None
        if connection.keyless >= MAX_KEYLESS_STREAMS:
            sentence = f"at most {MAX_KEYLESS_STREAMS} calls that need no key are open at once on one connection"
            return grpc.StatusCode.RESOURCE_EXHAUSTED, sentence, ()
        services.shed()
        self.keyless, self._metadata = True, ()
        return None

    def _answered(self, task: asyncio.Task[None]) -> None:
        """The handler is done, one way or the other."""
        if self._status is None:
            if task.cancelled():
                self._status = (grpc.StatusCode.CANCELLED, "the call was cancelled", ())
            elif (error := task.exception()) is not None:
                log.error("a gRPC call failed", exc_info=error)
                self._status = (grpc.StatusCode.INTERNAL, "internal server error", ())
            else:
                self._status = (grpc.StatusCode.OK, "", ())
        elif not task.cancelled():
            task.exception()  # is the one that ended it
        try:
            self._end(*self._status)
        except Exception:
            log.exception("a gRPC call could not be ended as it should")
            self._trailers = None
            self._end(grpc.StatusCode.INTERNAL, "internal server error", ())

    async def _handle(self) -> None:
        handler = self._handler
        request: object = self
        if not handler.request_streaming:
            try:
                request = await anext(self)
            except StopAsyncIteration:
                await self.abort(grpc.StatusCode.UNIMPLEMENTED, "there is no message in the request")
        answer = (handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream)(
            request, self
        )
        if inspect.isasyncgen(answer):
            try:
                async for message in answer:
                    await self.write(message)
            finally:
                await answer.aclose()
        elif handler.response_streaming:
            await answer
        else:
            self.send(handler.response_serializer(await answer))

    def _cut(self, code: grpc.StatusCode, details: str) -> None:
        """End the call from outside of its handler."""
        if self._task is None or self._task.done() or self._status is not None:
            return
        self._status = (code, details, ())
        self.inbox.close()
        self._task.cancel()

    def _too_late(self) -> None:
        """The caller's deadline has passed."""
        self._give_up(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")

    def _give_up(self, code: grpc.StatusCode, details: str) -> None:
        """End the call now, also where its client takes nothing."""
        if self._task is not None and not self._task.done():
            # A client that does not take what waits for it is told all the same.
            self._pending.clear()
            if self._outbox is not None:
                self._outbox.drop()
            self._cut(code, details)
        else:
            # All is said, but the client does not take it.
            self._over()
            self._stream.reset(ErrorCodes.CANCEL)


class SendBuffer(Generic[T]):
    """Messages of a streamed call that are written from wherever they come up, while the client takes them.

    Args:
        call: that they belong to.
        take: the serialized messages of something that was put, asked for when they can be sent.
    """

    def __init__(self, call: Call, take: Callable[[T], list[bytes]]) -> None:
        self._call = call
        self._take = take
        self._items: deque[T] = deque()
        self._draining = False
        self._empty: asyncio.Future[None] | None = None

    @property
    def waiting(self) -> bool:
        """Whether anything waits to be sent."""
        return bool(self._items)

    def put_nowait(self, item: T) -> None:
        """Send what `item` holds, now or when the client takes it."""
        self._items.append(item)
        self.drain()

    def drain(self) -> None:
        """Send what waits, as far as there is room."""
        call, items = self._call, self._items
        if self._draining:
            return
        self._draining = True
        try:
            while items and not call.blocked:
                for message in self._take(items.popleft()):
                    call.send(message)
        finally:
            self._draining = False
        if not items:
            self._tell()

    async def join(self) -> None:
        """Wait until all has been sent, or can't be any more."""
        if self._items and self._call.open:
            self._empty = asyncio.get_running_loop().create_future()
            await self._empty

    def drop(self) -> None:
        """Nothing can be sent any more."""
        self._items.clear()
        self._tell()

    def _tell(self) -> None:
        if self._empty is not None and not self._empty.done():
            self._empty.set_result(None)


def _timeout_s(value: bytes | None) -> float | None:
    if value is None:
        return None
    match = _TIMEOUT.match(value)
    if match is None:
        raise ValueError("grpc-timeout is not a number of at most 8 digits with a unit")
    return int(match[1]) * _UNITS_S[match[2]]


def _decoded(headers: Headers) -> Metadata:
    """The metadata among a request's headers.

    Raises:
        ValueError: a value is not what its name says.
    """
    found: list[tuple[str, str | bytes]] = []
    for name, value in headers:
        if name.startswith(b":") or name in _RESERVED:
            continue
        key = name.decode("latin-1")
        if not key.endswith("-bin"):
            found.append((key, value.decode("latin-1")))
            continue
        for part in value.split(b","):
            digits = part.strip().rstrip(b"=")
            try:
                found.append((key, base64.b64decode(digits + b"=" * (-len(digits) % 4), validate=True)))
            except binascii.Error as error:
                raise ValueError(f"{key} is not base64") from error
    return tuple(found)


def _encoded(metadata: Metadata) -> Headers:
    """Metadata as headers; what no header can hold is left out of a text."""
    return [
        (
            name.encode("latin-1"),
            _UNPRINTABLE.sub("?", value).encode("latin-1", "replace")
            if isinstance(value, str)
            else base64.b64encode(value).rstrip(b"="),
        )
        for name, value in metadata
    ]
