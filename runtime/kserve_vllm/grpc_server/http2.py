"""HTTP/2 under our gRPC server, and on the HTTP port: one connection of a client, and its streams.

h2 keeps the protocol's state: settings, headers, windows, the life of a stream. Only frames of data, of which there is
one for every token, are written past it, and its windows are kept right. Python's own gRPC server takes 70 to 80 us of
CPU for a streamed message, most of what a token costs; this takes a few.
Source: RFC 9113; for gRPC on top, grpc/grpc, `doc/PROTOCOL-HTTP2.md`.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol, cast

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    PingReceived,
    PriorityUpdated,
    RemoteSettingsChanged,
    RequestReceived,
    StreamEnded,
    StreamReset,
    UnknownFrameReceived,
    WindowUpdated,
)
from h2.exceptions import DenialOfServiceError, FrameTooLargeError, ProtocolError
from h2.settings import SettingCodes, Settings
from h2.stream import H2Stream
from hpack import Encoder, HPACKError
from hyperframe.exceptions import InvalidDataError
from hyperframe.frame import Frame, GoAwayFrame

from kserve_vllm.core import tcp

log = logging.getLogger(__name__)

Headers = list[tuple[bytes, bytes]]

STREAM_WINDOW = 256 << 10
CONNECTION_WINDOW = 8 << 20
_DEFAULT_WINDOW = 65_535
_LEAST_FRAME = 16 << 10  # that every client takes (RFC 9113, 6.5.2)
MAX_STREAMS = 1000
MAX_HEADERS = 16 << 10
"""Bytes that the headers of a request may have, counted as HTTP/2 does (RFC 9113, 6.5.2)."""
# Of larger ones a call is refused and its connection goes on, up to these: bytes when unpacked, and on the wire. A
# block of headers is unpacked in one go, at about a millisecond for a KiB.
_MAX_HEADERS_READ = 256 << 10
_MAX_HEADER_BLOCK = 128 << 10
MAX_CONNECTIONS = 1024
"""Connections that are open at once. Above it, the oldest one goes that has shown no key."""
MAX_KEYLESS_STREAMS = 100
"""Calls of one connection that are open at once and need no key: health, reflection."""
_WRITE_BUFFER = 256 << 10
_MOST_HELD = 32 << 10
# Read in one go: as few bytes as 7 new calls have, at up to a millisecond each, or the rest of one frame of data.
_READ = 128
# What reading may keep the event loop for, on all connections together, until all else has its turn, in seconds. Where
# more waits to be read, all else then has the loop for as long as the turn took with what it began.
TURN_S = 0.001
# What of the loop's time connections get together that have shown no key: so much at once, and this share after that.
# A refused call costs half a millisecond, its log line included; where that is spent later, it is counted when it came.
STRANGERS_S, STRANGERS_SHARE = 0.05, 0.05
REFUSED_S = 0.0005
PREFACE_TIMEOUT_S = 20.0
# What costs us more than the client: so many at once, and so many a second after that. Of settings, each one visits all
# streams of the connection.
RESETS, RESETS_PER_S = 2000.0, 500.0
SETTINGS_CHANGES, SETTINGS_CHANGES_PER_S = 100.0, 10.0
# Frames that move nothing: pings, priorities, unknown ones, data without a byte.
IDLE_FRAMES, IDLE_FRAMES_PER_S = 10_000.0, 1000.0
# The table of headers that a client lets us refer back to; it names a size, and we fill it with what it asked for.
_MAX_TABLE = 4096
# From the first frame of a block of headers to its last one; all else on the connection has to wait for it.
HEADER_TIMEOUT_S = 20.0
_COMPLAIN_EVERY_S = 1.0
# Between the last word to a client and the end: closed at once, the word may not arrive.
_FAREWELL_S = 1.0
# For a client that does not take what was written before the end.
ABORT_S = 5.0
_LOOK_EVERY_S = 0.05
_MOST_REST_S = 0.05
_DATA, _GOAWAY = b"\0", b"\7"
_FRAME_HEADER = 9  # bytes (RFC 9113, 4.1)
_WINDOW_UPDATE = b"\0\0\4\x08\0\0\0\0\0"


class Exchange(Protocol):
    """What runs on a stream."""

    def feed(self, data: bytes, size: int) -> None:
        """Take bytes that the client sent; `size` of them count for its window."""

    def feed_end(self) -> None:
        """The client has sent all."""

    def pump(self) -> None:
        """Go on writing: there may be room now."""

    def lose(self) -> None:
        """The client took the stream back, or is gone; nothing can be written any more."""

    @property
    def keyless(self) -> bool:
        """Whether it was let in without a key, since it needs none."""


class Stream:
    """The outgoing side of one stream, and what its exchange may ask of the connection.

    Args:
        connection: it belongs to.
        stream_id: its number.
        stream: h2's, for its windows.
        receives: whether the client may still send.
    """

    __slots__ = ("_connection", "_head", "_stream", "number", "open", "receives")

    def __init__(self, connection: Connection, stream_id: int, stream: H2Stream, receives: bool) -> None:
        self._connection = connection
        self._stream = stream
        self._head = _DATA + b"\0" + stream_id.to_bytes(4, "big")
        self.number = stream_id
        self.open = True
        """Whether anything may still be written."""
        self.receives = receives
        """Whether the client may still send."""

    @property
    def room(self) -> int:
        """Bytes of data that one frame may have now; 0 while the client or the socket does not take more."""
        connection = self._connection
        if not connection.writable or not self.open:
            return 0
        state = connection.state
        return max(
            0,
            min(
                state.max_outbound_frame_size,
                state.outbound_flow_control_window,
                self._stream.outbound_flow_control_window,
            ),
        )

    def fits(self, size: int) -> bool:
        """Whether `size` bytes of data, 1 or more, go into one frame now. It may say no to more than `_LEAST_FRAME`."""
        connection = self._connection
        return (
            self.open
            and connection.writable
            and size <= _LEAST_FRAME
            and size <= self._stream.outbound_flow_control_window
            and size <= connection.state.outbound_flow_control_window
        )

    def write(self, data: bytes | memoryview) -> None:
        """Write one frame of data. The headers have been sent, and there is room for it."""
        size = len(data)
        connection = self._connection
        connection.state.outbound_flow_control_window -= size
        self._stream.outbound_flow_control_window -= size
        connection.write(b"".join((size.to_bytes(3, "big"), self._head, data)))

    def headers(self, headers: Headers, end: bool = False) -> None:
        """Write headers or trailers. With `end` the stream is over, and what the client still sends is not read."""
        connection = self._connection
        if self._stream.closed:
            # The client took it back in the frames that are being read; the exchange is told when that event comes.
            self.open = False
            return
        connection.state.send_headers(self.number, headers, end_stream=end)
        if end:
            if not self._stream.closed:
                connection.state.reset_stream(self.number, ErrorCodes.NO_ERROR)
            self._close()
        connection.flush()

    def finish(self, data: bytes | memoryview = b"") -> None:
        """Write the last frame of data, for which there is room. The stream is over, and what the client still sends is
        not read."""
        connection = self._connection
        if self._stream.closed:
            self.open = False
            return
        if data:
            connection.state.send_data(self.number, data, end_stream=True)
        else:
            # Takes no room, also where the client has made its window negative.
            connection.state.end_stream(self.number)
        if not self._stream.closed:
            connection.state.reset_stream(self.number, ErrorCodes.NO_ERROR)
        self._close()
        connection.flush()

    def reset(self, code: ErrorCodes) -> None:
        """End the stream without an answer."""
        if not self._stream.closed:
            self._connection.state.reset_stream(self.number, code)
            self._connection.flush()
        self._close()

    @property
    def reads(self) -> bool:
        """Whether the connection is read now."""
        return self._connection.writable

    @property
    def connection(self) -> Connection:
        """That it belongs to."""
        return self._connection

    def acknowledge(self, size: int) -> None:
        """Let the client send `size` bytes more on this stream. What the connection may send is not held back."""
        if size and not self._connection.broken and self._stream.open:
            for update in self._stream.acknowledge_received_data(size):
                self._connection.write(update.serialize())

    def _close(self) -> None:
        self.open = False
        self._connection.forget(self.number)


class _Encoder(Encoder):
    """hpack's, with a table that the client can't make larger than `_MAX_TABLE`."""

    @property
    def header_table_size(self) -> int:
        return int(self.header_table.maxsize)

    @header_table_size.setter
    def header_table_size(self, value: int) -> None:
        table, size = self.header_table, min(value, _MAX_TABLE)
        untold = table.resized
        table.maxsize = size
        if table.resized:
            # Told with the next headers: the least size in between, and the last one (RFC 7541, 4.2).
            least = min([*self.table_size_changes, size])
            self.table_size_changes = [size] if least == size else [least, size]
        else:
            table.resized = untold


class _State(H2Connection):
    """h2's, which leaves it to us to refuse a stream that is one too many: it would close the connection."""

    # How many of those that are over it remembers, to tell a frame that comes late from one that is wrong.
    MAX_CLOSED_STREAMS = 4096

    def _terminate_connection(self, error_code: ErrorCodes) -> None:
        """h2's, which takes two errors that have a code of their own for any other one (RFC 9113, 4.3 and 6.5)."""
        error = sys.exc_info()[1]
        cause = error.__cause__ if error is not None else None
        if isinstance(cause, (HPACKError, IndexError)):
            error_code = ErrorCodes.COMPRESSION_ERROR
        elif isinstance(cause, InvalidDataError) and "must not have payload" in str(cause):
            error_code = ErrorCodes.FRAME_SIZE_ERROR
        super()._terminate_connection(error_code)

    @property
    def open_inbound_streams(self) -> int:
        return min(super().open_inbound_streams, MAX_STREAMS - 1)


class _Allowance:
    """How often something may happen: `burst` times at once, and `per_s` times a second after that."""

    def __init__(self, burst: float, per_s: float, now: float) -> None:
        self._burst, self._per_s = burst, per_s
        self._left, self._at = burst, now

    def use(self, now: float) -> bool:
        """Count one; False where that is too much."""
        self._left = min(self._burst, self._left + (now - self._at) * self._per_s) - 1
        self._at = now
        return self._left >= 0


class _Strangers:
    """Connections that have shown no key and wait to be read on: those of one address in turn, and the addresses in
    turn, so that a newcomer does not wait behind all of somebody else's."""

    def __init__(self) -> None:
        self._waiting: dict[str, dict[Connection, None]] = {}

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def append(self, connection: Connection) -> None:
        """One more."""
        self._waiting.setdefault(connection.address, {})[connection] = None

    def popleft(self) -> Connection:
        """The next one."""
        address, waiting = next(iter(self._waiting.items()))
        connection = next(iter(waiting))
        self.discard(connection)
        if waiting:
            self._waiting[address] = self._waiting.pop(address)
        return connection

    def discard(self, connection: Connection) -> None:
        """This one waits no longer, if it did."""
        waiting = self._waiting.get(connection.address, {})
        waiting.pop(connection, None)
        if not waiting:
            self._waiting.pop(connection.address, None)


class Connections(set["Connection"]):
    """A server's open connections. What one pass of the event loop has for all of them is written in a row.

    Args:
        bounded: whether there are at most `MAX_CONNECTIONS`; else they are counted elsewhere.
    """

    def __init__(self, bounded: bool = True) -> None:
        super().__init__()
        self._bounded = bounded
        self._due: list[Connection] = []
        self._strangers: dict[Connection, None] = {}
        self._complained_at = -_COMPLAIN_EVERY_S
        # That wait to be read on: those that have shown a key, and those that have not.
        self._unread: tuple[deque[Connection], _Strangers] = (deque(), _Strangers())
        # What ends the turn, or begins the next one.
        self._turn: asyncio.Handle | None = None
        self._turn_began = self._turn_ends = 0.0
        self._strangers_left_s, self._strangers_at = STRANGERS_S, 0.0
        self._refill: asyncio.TimerHandle | None = None

    def may_read(self, connection: Connection, now: float) -> bool:
        """Whether this pass of the event loop has time for what one more connection sent."""
        if connection in self._strangers and not self._may_strangers(now):
            return False
        if self._turn is None:
            self._turn_began, self._turn_ends = now, now + TURN_S
            self._turn = asyncio.get_running_loop().call_soon(self._end_turn)
        return not self._unread[0] and now <= self._turn_ends

    def count(self, connection: Connection, read_s: float) -> None:
        """Count the time that a connection took of the loop."""
        if connection in self._strangers:
            self._strangers_left_s -= read_s

    def read_later(self, connection: Connection) -> None:
        """Let this one read on in a later pass, when those before it have."""
        known, strangers = self._unread
        (strangers if connection in self._strangers else known).append(connection)
        if self._turn is None:
            loop = asyncio.get_running_loop()
            self._turn_began = loop.time()
            self._turn = loop.call_soon(self._end_turn)

    def _may_strangers(self, now: float) -> bool:
        grown = self._strangers_left_s + (now - self._strangers_at) * STRANGERS_SHARE
        self._strangers_left_s, self._strangers_at = min(STRANGERS_S, grown), now
        return self._strangers_left_s > 0

    def _end_turn(self) -> None:
        """One pass of the event loop has passed; where more waits, the next turn comes after a rest."""
        self._turn = asyncio.get_running_loop().call_soon(self._rest) if any(self._unread) else None

    def _rest(self) -> None:
        """Leave the loop to all else for as long as the turn took, with the first steps of the requests in it."""
        loop = asyncio.get_running_loop()
        self._turn = loop.call_later(min(loop.time() - self._turn_began, _MOST_REST_S), self._take_turns)

    def _take_turns(self) -> None:
        self._turn = None
        known, strangers = self._unread
        if not (known or strangers):
            return
        loop = asyncio.get_running_loop()
        now = self._turn_began = loop.time()
        self._turn, self._turn_ends = loop.call_soon(self._end_turn), now + TURN_S
        # One at the least, or nothing would ever be read.
        while now <= self._turn_ends and (known or (strangers and self._may_strangers(now))):
            if known:
                known.popleft().read_on()
            elif (stranger := strangers.popleft()).has_left:
                # While it is not read, nobody says so, and it would hold its place.
                stranger.abort()
            else:
                stranger.read_on()
            now = loop.time()
        if not known and not self._may_strangers(now):
            self._turn.cancel()
            self._turn = None
            if self._refill is None:
                self._refill = loop.call_later(TURN_S, self._refilled)

    def _refilled(self) -> None:
        self._refill = None
        if self._turn is None:
            self._take_turns()

    def enter(self, connection: Connection) -> None:
        """A client has connected. Over `MAX_CONNECTIONS` one has to go that has shown no key, the oldest first."""
        self.add(connection)
        self._strangers[connection] = None
        if self._bounded and len(self) > MAX_CONNECTIONS:
            next(iter(self._strangers)).calm("is one connection too many")

    def complains(self, now: float) -> bool:
        """Whether to log once more what a client does; now and then, or clients could fill the log."""
        if now < self._complained_at + _COMPLAIN_EVERY_S:
            return False
        self._complained_at = now
        return True

    def know(self, connection: Connection) -> None:
        """A client has shown a key, or none is asked for."""
        self._strangers.pop(connection, None)

    def exit(self, connection: Connection) -> None:
        """A client is gone."""
        self.discard(connection)
        self._strangers.pop(connection, None)
        known, strangers = self._unread
        strangers.discard(connection)
        if connection in known:
            known.remove(connection)

    def write_soon(self, connection: Connection) -> None:
        """Let this one write what it holds when the pass is over."""
        if not self._due:
            asyncio.get_running_loop().call_soon(self._write)
        self._due.append(connection)

    def _write(self) -> None:
        due, self._due = self._due, []
        for connection in due:
            try:
                connection.let_go()
            except Exception:
                log.exception("a connection could not be written to")


class Connection(asyncio.Protocol):
    """One client's connection.

    Args:
        accept: makes the exchange of a new stream from its request headers.
        connections: of the whole port; this one is in it while it is open.
        max_headers: bytes of a request's headers that the client is told it may send.
    """

    def __init__(
        self,
        accept: Callable[[Stream, Headers], Exchange],
        connections: Connections,
        max_headers: int = MAX_HEADERS,
    ) -> None:
        self._accept = accept
        self._connections = connections
        self.loop = asyncio.get_running_loop()
        self._exchanges: dict[int, tuple[Stream, Exchange]] = {}
        self._leaving = False
        self._answered_at = -_FAREWELL_S
        self._pump_due = False
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._aborting: asyncio.TimerHandle | None = None
        now = self.loop.time()
        self._resets, self._settings, self._idle_frames = (
            _Allowance(RESETS, RESETS_PER_S, now),
            _Allowance(SETTINGS_CHANGES, SETTINGS_CHANGES_PER_S, now),
            _Allowance(IDLE_FRAMES, IDLE_FRAMES_PER_S, now),
        )
        self._unread = b""
        self._header_timer: asyncio.TimerHandle | None = None
        self._waits = False
        self.keyless = 0
        """Calls that are open and need no key."""
        self.state = _State(
            H2Configuration(
                client_side=False,
                header_encoding=None,
                validate_outbound_headers=False,
                normalize_outbound_headers=False,
            )
        )
        self.state.local_settings = Settings(
            client=False,
            initial_values={
                SettingCodes.INITIAL_WINDOW_SIZE: STREAM_WINDOW,
                SettingCodes.MAX_CONCURRENT_STREAMS: MAX_STREAMS,
                SettingCodes.MAX_HEADER_LIST_SIZE: max_headers,
            },
        )
        self.state.encoder = _Encoder()
        # Over its limit h2 closes the connection, with the calls of others on it.
        self.state.decoder.max_header_list_size = _MAX_HEADERS_READ
        # After a client's farewell h2 reads nothing more, though its open streams go on (RFC 9113, 6.8).
        self.state._frame_dispatch_table[GoAwayFrame] = read_goaway
        self.transport: asyncio.Transport
        self.address = ""
        """Of the client."""
        self.writable = True
        """Whether the socket takes what is written."""
        self.broken = False
        """Whether nothing can be read or written any more."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio's: begin with our settings."""
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(_WRITE_BUFFER)
        self.address = str((transport.get_extra_info("peername") or ("",))[0])
        sock = transport.get_extra_info("socket")
        if sock is not None:
            # A client that vanished without a word is noticed by the kernel.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self.state.initiate_connection()
        self.state.increment_flow_control_window(CONNECTION_WINDOW - _DEFAULT_WINDOW)
        self.flush()
        self._opening = self.loop.call_later(PREFACE_TIMEOUT_S, self.close)
        self._connections.enter(self)

    def data_received(self, data: bytes) -> None:
        """asyncio's: what the client sent."""
        if self._unread:
            self._unread += data
            return
        self._unread = data
        if self._connections.may_read(self, self.loop.time()):
            self.read_on()
        else:
            self._read_later()

    def read_on(self) -> None:
        """Read what has come, in parts, for h2 reads all of one before we see what is in it.

        A client that fills its parts with small frames does not hold up others, nor do many that each send a few: all
        of them share what a pass of the event loop has for it, and nothing more is read from who waits.
        """
        data, at, began = self._unread, 0, self.loop.time()
        while at < len(data):
            size = self._read_size()
            self.read_frames(data[at : at + size])
            if self.broken:
                return
            at += size
            now = self.loop.time()
            self._connections.count(self, now - began)
            began = now
            if at < len(data) and not self._connections.may_read(self, now):
                self._unread = data[at:]
                self._read_later()
                return
        self._unread = b""
        if self._waits:
            self._waits = False
            if self.writable:
                self.transport.resume_reading()

    def _read_size(self) -> int:
        begun = self.state.incoming_buffer._data
        if len(begun) < _FRAME_HEADER or begun[3] != _DATA[0]:
            return _READ
        return max(_READ, _FRAME_HEADER + int.from_bytes(begun[:3], "big") - len(begun))

    def _read_later(self) -> None:
        self._waits = True
        self.transport.pause_reading()
        self._connections.read_later(self)

    def read_frames(self, data: bytes) -> None:
        """Read some bytes of what the client sent, and answer what they ask for."""
        try:
            events = self.state.receive_data(data)
            self._check_frame()
            # First of all the acknowledgement of settings: without it, a larger window is not yet ours to use.
            self.flush()
            for event in events:
                if self.broken:
                    return
                self._on_event(event)
            if self._pump_due:
                # Once for all frames that were read, since it visits every stream.
                self._pump_due = False
                self.pump_all()
            self.flush()
        except ProtocolError as error:
            log.debug("a client breaks HTTP/2: %r", error)
            self.close()
        except Exception as error:
            log.warning("a connection is closed after %r", error)
            self.close()

    def connection_lost(self, error: Exception | None) -> None:
        """asyncio's: the client is gone."""
        self._opening.cancel()
        if self._header_timer is not None:
            self._header_timer.cancel()
        if self._aborting is not None:
            self._aborting.cancel()
        self._connections.exit(self)
        self._break()

    def pause_writing(self) -> None:
        """asyncio's: the socket takes no more. Nothing is read meanwhile, or a client that only asks would fill us."""
        self.writable = False
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        """asyncio's: the socket takes more again."""
        self.writable = True
        if not self._waits:
            self.transport.resume_reading()
        self.pump_all()

    def flush(self) -> None:
        """Write what h2 has to say."""
        if data := self.state.data_to_send():
            self.write(data)

    def write(self, data: bytes) -> None:
        """Write frames, together with what else this pass of the event loop writes on this connection.

        A write wakes its reader. So the streams of one step of the engine cost one write, and connections are written
        to one right after the other, when the frames of all of them are made.
        """
        if self.broken:
            return
        if not self._held:
            self._connections.write_soon(self)
        self._held.append(data)
        self._held_bytes += len(data)
        if self._held_bytes > _MOST_HELD:
            # So that the socket can say that it takes no more.
            self.let_go()

    def let_go(self) -> None:
        """Write what is held."""
        if self._held:
            held, self._held, self._held_bytes = self._held, [], 0
            if not self.broken:
                self.transport.write(held[0] if len(held) == 1 else b"".join(held))

    def forget(self, stream_id: int) -> None:
        """An exchange is over."""
        if (found := self._exchanges.pop(stream_id, None)) is not None:
            self.keyless -= found[1].keyless
        self._answered_at = self.loop.time()
        if self._leaving and not self._exchanges:
            self._part()

    def leave(self) -> None:
        """Take no new streams; close when the open ones are over."""
        if self._leaving or self.broken:
            return
        self._leaving = True
        # By hand: after its own, h2 lets nothing more be written.
        last = self.state.highest_inbound_stream_id.to_bytes(4, "big")
        self.write(b"\0\0\x08" + _GOAWAY + b"\0" * 5 + last + b"\0" * 4)
        if not self._exchanges:
            self._part()

    def _part(self) -> None:
        """Close in a while, when the client has taken what was written."""
        self.loop.call_later(_FAREWELL_S, lambda: self.close() if self.flushed else self._part())

    @property
    def taking(self) -> bool:
        """Whether the client may still be reading an answer. Where it writes to a closed socket meanwhile, as it does
        to acknowledge what it reads, the kernel may drop what it has not read."""
        return not self.broken and self.loop.time() < self._answered_at + _FAREWELL_S

    @property
    def flushed(self) -> bool:
        """Whether the socket has all that was written."""
        return self.broken or not (self._held or self.transport.get_write_buffer_size())

    def close(self) -> None:
        """Close at once; exchanges that are open are lost."""
        if not self.broken:
            self.flush()
            self.let_go()
            self._break()
            self._aborting = self.loop.call_later(ABORT_S, self.transport.abort)
            self.transport.close()

    @property
    def has_left(self) -> bool:
        """Whether the client has closed its side, where the kernel tells: of HTTP/2 nothing follows that."""
        return tcp.state(self.transport) in (tcp.CLOSE, tcp.CLOSE_WAIT)

    def abort(self) -> None:
        """End at once, whatever the client has not taken."""
        if not self.transport.is_closing():
            self.close()
        self.transport.abort()

    def identified(self) -> None:
        """The client has shown a key, or none is asked for."""
        self._connections.know(self)

    @property
    def idle(self) -> bool:
        """Whether no stream is open."""
        return not self._exchanges

    @property
    def full(self) -> bool:
        """Whether there are as many calls open as one connection may have without a key."""
        return self.keyless >= MAX_KEYLESS_STREAMS

    def _break(self) -> None:
        self.broken = True
        self._unread = b""
        exchanges, self._exchanges = self._exchanges, {}
        for stream, exchange in exchanges.values():
            stream.open = False
            exchange.lose()

    def _on_event(self, event: Event) -> None:
        if isinstance(event, DataReceived):
            size = int(event.flow_controlled_length or 0)
            # One caller who has to wait does not hold up others on the connection.
            if size and (more := self.state._inbound_flow_control_window_manager.process_bytes(size)):
                self.write(_WINDOW_UPDATE + more.to_bytes(4, "big"))
            if (found := self._exchanges.get(_number(event))) is not None:
                found[1].feed(event.data or b"", size)
            if not size and event.stream_ended is None:
                self._count_idle_frame()
        elif isinstance(event, RequestReceived):
            self._on_request(_number(event), event.headers, event.stream_ended is None)
        elif isinstance(event, StreamEnded):
            if (found := self._exchanges.get(_number(event))) is not None:
                found[0].receives = False
                found[1].feed_end()
        elif isinstance(event, StreamReset):
            self._on_reset(_number(event))
        elif isinstance(event, WindowUpdated):
            if event.stream_id == 0:
                self._pump_due = True
            elif (found := self._exchanges.get(_number(event))) is not None:
                found[1].pump()
        elif isinstance(event, RemoteSettingsChanged):
            self._opening.cancel()
            self._pump_due = True
            if not self._settings.use(self.loop.time()):
                self.calm("changes its settings without end")
        elif isinstance(event, (PingReceived, PriorityUpdated, UnknownFrameReceived)):
            self._count_idle_frame()
        elif isinstance(event, ConnectionTerminated):
            self._on_goodbye()

    def _on_request(self, number: int, headers: Headers, receives: bool) -> None:
        found = self.state.streams.get(number)
        if found is None:
            # The client took it back, and opened another one, in the frames that are being read.
            return
        stream = Stream(self, number, found, receives)
        if self._leaving or len(self._exchanges) >= MAX_STREAMS:
            # gRPC's clients ask again then, another server where this one leaves.
            stream.reset(ErrorCodes.REFUSED_STREAM)
            if not self._resets.use(self.loop.time()):
                self.calm("opens streams that are refused without end")
            return
        exchange = self._accept(stream, headers)
        if stream.open:
            self._exchanges[number] = (stream, exchange)
            self.keyless += exchange.keyless

    def _on_reset(self, number: int) -> None:
        found = self._exchanges.pop(number, None)
        if found is not None:
            self.keyless -= found[1].keyless
            found[0].open = False
            found[1].lose()
        if not self._resets.use(self.loop.time()):
            self.calm("opens streams and takes them back without end")

    def calm(self, what: str) -> None:
        """Close, since the client does more than it may."""
        if self._connections.complains(self.loop.time()):
            log.warning("a client %s; its connection is closed", what)
        self.state.close_connection(ErrorCodes.ENHANCE_YOUR_CALM)
        self.close()

    def _count_idle_frame(self) -> None:
        if not self._idle_frames.use(self.loop.time()):
            self.calm("sends frames that move nothing without end")

    def _check_frame(self) -> None:
        """Look at the length of a frame that has begun, and of a block of headers: h2 does when all of it is there, up
        to 16 MiB and 1 MiB."""
        buffer = self.state.incoming_buffer
        begun = buffer._data
        if len(begun) >= 3 and int.from_bytes(begun[:3], "big") > self.state.max_inbound_frame_size:
            self.state.close_connection(ErrorCodes.FRAME_SIZE_ERROR)
            raise FrameTooLargeError("a frame is too long")
        block = buffer._headers_buffer
        if block and self._header_timer is None:
            self._header_timer = self.loop.call_later(HEADER_TIMEOUT_S, self._headers_too_late)
        elif not block and self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None
        if block and sum(len(each.data) for each in block) > _MAX_HEADER_BLOCK:
            self.state.close_connection(ErrorCodes.ENHANCE_YOUR_CALM)
            raise DenialOfServiceError("a block of headers is too long")

    def _headers_too_late(self) -> None:
        self._header_timer = None
        if self.writable and not self.broken:
            self.calm("does not end its headers")

    def _on_goodbye(self) -> None:
        """The client will open no more streams."""
        self._leaving = True
        if not self._exchanges:
            self.close()

    def pump_all(self) -> None:
        """Send what all streams have waiting, as far as windows go."""
        for _, exchange in list(self._exchanges.values()):
            exchange.pump()


async def poll(done: Callable[[], bool], timeout_s: float) -> None:
    """Wait until `done()` holds, up to `timeout_s` seconds."""
    until = time.monotonic() + timeout_s
    while not done() and time.monotonic() < until:
        await asyncio.sleep(_LOOK_EVERY_S)


def read_goaway(_: Frame) -> tuple[list[Frame], list[Event]]:
    """In place of h2's reader of GOAWAY, after which h2 would read nothing more."""
    return [], [ConnectionTerminated()]


class _OfAStream(Protocol):
    """An event of h2 that is about one stream."""

    @property
    def stream_id(self) -> int | None:
        """Its number."""


def _number(event: _OfAStream) -> int:
    assert event.stream_id is not None
    return event.stream_id
