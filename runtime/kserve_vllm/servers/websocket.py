"""Websockets on one connection: what uvicorn and its parser leave open, bounded.

A subclass of uvicorn's protocol, for what comes in. uvicorn reads all that has come in one go, and a frame may have two
bytes: a client could hold the event loop for seconds with one packet's worth of them, before its key is looked at. So
nothing behind a handshake is read until the app has accepted it, and then in turns, which all connections share.

Source: RFC 6455. Written against uvicorn 0.54 with websockets 17.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

if TYPE_CHECKING:
    from uvicorn._types import ASGIReceiveEvent, ASGISendEvent
    from uvicorn.config import Config
    from uvicorn.server import ServerState
    from websockets.frames import Frame

MAX_FRAGMENTS = 65_536
"""Frames of one message."""
IDLE_FRAMES = 100
"""Pings, pongs and fragments without a byte, of one connection at once."""
IDLE_FRAMES_PER_S = 10
"""The same, a second after that."""
# Bytes that are read in one go, up to 128 frames at 20 us each; and in the middle of a frame.
_READ, _READ_OF_A_FRAME = 256, 4096
TURN_S = 0.003
_VIOLATION = 1008  # of a policy: RFC 6455, 7.4.1
_INVALID_TEXT = 1007


class Turns:
    """What reading may keep the event loop for, on all connections together, until all else has its turn."""

    def __init__(self) -> None:
        self._waiting: deque[WebSocket] = deque()
        self._due = False

    def wait(self, connection: WebSocket) -> None:
        """Let this one read in the next turn."""
        self._waiting.append(connection)
        if not self._due:
            self._due = True
            asyncio.get_running_loop().call_soon(self._run)

    def _run(self) -> None:
        loop = asyncio.get_running_loop()
        ends = loop.time() + TURN_S
        while self._waiting:
            connection = self._waiting.popleft()
            if connection.read_some():
                self._waiting.append(connection)
            if loop.time() > ends:
                break
        self._due = bool(self._waiting)
        if self._due:
            loop.call_soon(self._run)


class WebSocket(WebSocketsSansIOProtocol):
    """One connection, from its handshake on.

    Args:
        turns: that it shares with others.
        config, server_state, app_state: uvicorn's.
    """

    def __init__(
        self, turns: Turns, *, config: Config, server_state: ServerState, app_state: dict[str, object]
    ) -> None:
        super().__init__(config, server_state, app_state)
        self._turns = turns
        self.unread = bytearray()
        self._waits = False
        """For its turn."""
        self._paused = False
        self._size = _READ
        self._fragments = 0
        self._idle_left = float(IDLE_FRAMES)
        self._idle_at = self.loop.time()

    # What comes in

    def data_received(self, data: bytes) -> None:
        """asyncio's."""
        self.unread += data
        if not self.handshake_initiated:
            # The handshake, which has been read already.
            while self.unread and not self.handshake_initiated:
                self.take_frames()
        self._go_on()

    def read_some(self) -> bool:
        """Read a little of what has come. Returns whether there is more that may be read now."""
        if self._readable:
            self.take_frames()
        self._waits = self._readable
        if not self._waits:
            self._rest()
        return self._waits

    @property
    def _readable(self) -> bool:
        """Whether there is something to read, and nothing has to come before: the app's word on the handshake, its
        taking of the last message, the client's taking of what was written."""
        return bool(
            self.unread
            and self.handshake_complete
            and not self.read_paused
            and not self.disconnected
            and self.writable.is_set()
        )

    def _go_on(self) -> None:
        if self._waits:
            self._pause()
        elif self._readable:
            self._waits = True
            self._pause()
            self._turns.wait(self)
        else:
            self._rest()

    def take_frames(self) -> None:
        """Read the next part of what the client sent; what is left waits for another turn."""
        part = bytes(self.unread[: self._size])
        del self.unread[: self._size]
        self._size = min(2 * self._size, _READ_OF_A_FRAME)
        super().data_received(part)
        if self.transport.is_closing() and not self.close_sent:
            self.unread.clear()

    def _rest(self) -> None:
        """Have more sent, or not, until it can be read."""
        if self.unread or self.read_paused or not self.writable.is_set():
            self._pause()
        elif self._paused:
            self._paused = False
            self.transport.resume_reading()

    def _pause(self) -> None:
        if not self._paused:
            self._paused = True
            self.transport.pause_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio's."""
        self.unread.clear()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """asyncio's. Nothing is read meanwhile: a client that only pings would fill us with answers."""
        super().pause_writing()
        self._pause()

    def resume_writing(self) -> None:
        """asyncio's."""
        super().resume_writing()
        self._go_on()

    # What it means

    def handle_ping(self) -> None:
        """uvicorn's."""
        self._size = _READ
        if self._count_idle_frame():
            super().handle_ping()

    def handle_pong(self, event: Frame) -> None:
        """uvicorn's."""
        self._size = _READ
        if self._count_idle_frame():
            super().handle_pong(event)

    def handle_text(self, event: Frame) -> None:
        """uvicorn's."""
        self._size, self._fragments = _READ, 0
        super().handle_text(event)

    def handle_bytes(self, event: Frame) -> None:
        """uvicorn's."""
        self._size, self._fragments = _READ, 0
        super().handle_bytes(event)

    def handle_cont(self, event: Frame) -> None:
        """uvicorn's."""
        self._size = _READ
        self._fragments += 1
        if self._fragments >= MAX_FRAGMENTS:
            self._fail(_VIOLATION, "the message has too many fragments")
        elif event.data or event.fin or self._count_idle_frame():
            super().handle_cont(event)

    def send_receive_event_to_app(self) -> None:
        """uvicorn's, which writes at level error that a client's text is none."""
        if self.curr_msg_data_type == "text":
            try:
                b"".join(self.frames).decode()
            except UnicodeDecodeError:
                self._fail(_INVALID_TEXT, "the text is not UTF-8")
                return
        paused = self.read_paused
        super().send_receive_event_to_app()
        self._paused |= self.read_paused and not paused

    def _count_idle_frame(self) -> bool:
        now = self.loop.time()
        self._idle_left = min(IDLE_FRAMES, self._idle_left + (now - self._idle_at) * IDLE_FRAMES_PER_S) - 1
        self._idle_at = now
        if self._idle_left < 0:
            self._fail(_VIOLATION, "frames that move nothing are sent without end")
        return self._idle_left >= 0

    def _fail(self, code: int, why: str) -> None:
        if not self.close_sent:
            self.unread.clear()
            self.conn.fail(code, why)
            self.handle_parser_exception()

    # ASGI

    async def receive(self) -> ASGIReceiveEvent:
        """uvicorn's, which would have more sent while there is something to read."""
        message = await self.queue.get()
        if self.read_paused and self.queue.empty():
            self.read_paused = False
            self._go_on()
        return message

    async def send(self, message: ASGISendEvent) -> None:
        """uvicorn's. With the first message the app has answered the handshake."""
        await super().send(message)
        if not self.disconnected and not self.transport.is_closing():
            self._go_on()
