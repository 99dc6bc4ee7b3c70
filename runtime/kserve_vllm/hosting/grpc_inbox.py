"""The messages of a gRPC call on their way in: cut out of the stream, counted, and inflated when they are read.

What a client may make the server hold is bounded three times: HTTP/2's windows bound what is complete and not yet read,
a `Budget` what is not complete, of all calls together, and a time limit how long a message may take.
Source of the frame, a flag and a length before each message: grpc/grpc, `doc/PROTOCOL-HTTP2.md`.
"""

from __future__ import annotations

import asyncio
import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import grpc

from kserve_vllm.hosting.http2 import Stream

PREFIX = 5
"""Bytes before each message: a flag, and the length."""
_COMPRESSED = 1
WINDOW_BITS = {"deflate": zlib.MAX_WBITS, "gzip": 16 + zlib.MAX_WBITS}
"""zlib's parameter for each encoding that is read."""


class Unreadable(Exception):
    """A message that can't be used.

    Attributes:
        code: to end the call with.
        details: the sentence for the caller.
    """

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(details)
        self.code, self.details = code, details


@dataclass
class Budget:
    """What all calls may hold together of messages that are not complete yet.

    Over it, clients may send what their windows let them, and no more until others are done.

    Attributes:
        limit: in bytes.
        held: bytes now.
        waiting: calls that may not send more for now.
    """

    limit: int
    held: int = 0
    waiting: dict[Inbox, None] = field(default_factory=dict)

    @property
    def spent(self) -> bool:
        """Whether as much is held as may be."""
        return self.held > self.limit

    def change(self, by: int) -> None:
        """So many bytes more, or fewer, are held."""
        self.held += by
        while by < 0 and self.waiting and not self.spent:
            inbox = next(iter(self.waiting))
            del self.waiting[inbox]
            inbox.credit()


class Inbox:
    """What the client of one call has sent.

    Args:
        stream: that it comes over.
        budget: of the server.
        max_message: largest message in bytes, before and after it is inflated.
        timeout_s: that a message may take from its first byte to its last; 0: as long as it likes.
        fail: ends the call with a status.
    """

    def __init__(
        self,
        stream: Stream,
        budget: Budget,
        max_message: int,
        timeout_s: float,
        fail: Callable[[grpc.StatusCode, str], None],
    ) -> None:
        self._stream = stream
        self._budget = budget
        self._max_message = max_message
        self._timeout_s = timeout_s
        self._end_call = fail
        self._loop = asyncio.get_running_loop()
        self._partial = bytearray()
        self._held = 0
        self._messages: deque[tuple[int, bytes]] = deque()
        self._unread = 0
        self._owed = 0
        self._single = False
        self._count = 0
        self._closed = False
        self._timer: asyncio.TimerHandle | None = None
        self._arrival: asyncio.Future[None] | None = None
        self.encoding: str | None = None
        """That of compressed messages; None where the client named none."""

    def expect_one(self) -> None:
        """Take one message, which has to come in time, and no second one."""
        self._single = True
        self._clock()

    def feed(self, data: bytes, size: int) -> None:
        """Take bytes; `size` of them count for the client's window."""
        self._owed += size
        if not self._closed:
            self._partial += data
            self._split()
            self._settle()
        self.credit()

    def feed_end(self) -> None:
        """The client has sent all."""
        if self._partial and not self._closed:
            self._fail(grpc.StatusCode.INTERNAL, "the last message is cut off")
        self._wake()

    async def get(self) -> bytes | None:
        """The next message, inflated; None where there will be none.

        Raises:
            Unreadable: it can't be inflated.
        """
        while not self._messages:
            if self._closed or not self._stream.receives:
                return None
            self._arrival = self._loop.create_future()
            await self._arrival
        flag, message = self._messages.popleft()
        self._unread -= PREFIX + len(message)
        self.credit()
        return self._inflated(flag, message) if flag else message

    def close(self) -> None:
        """Nothing will be read any more: forget what is here, and pass over what still comes."""
        if self._closed:
            return
        self._closed = True
        self._partial.clear()
        self._messages.clear()
        self._unread = 0
        self._budget.waiting.pop(self, None)
        self._settle()
        self.credit()

    def credit(self) -> None:
        """Let the client send more: not for what waits to be read, nor for a part where others hold too much."""
        if self._partial and self._budget.spent:
            self._budget.waiting[self] = None
            return
        free = self._owed - self._unread
        if free > 0:
            self._owed -= free
            self._stream.acknowledge(free)

    def _split(self) -> None:
        """Cut messages out of what has come."""
        partial = self._partial
        while len(partial) >= PREFIX:
            length = int.from_bytes(partial[1:PREFIX], "big")
            if length > self._max_message:
                sentence = f"the message has {length} bytes; at most {self._max_message} are taken (--max-body-mib)"
                return self._fail(grpc.StatusCode.RESOURCE_EXHAUSTED, sentence)
            if len(partial) < PREFIX + length:
                break
            self._messages.append((partial[0], bytes(partial[PREFIX : PREFIX + length])))
            del partial[: PREFIX + length]
            self._unread += PREFIX + length
            self._count += 1
            self._unclock()
        if self._single and self._count and (partial or self._count > 1):
            return self._fail(grpc.StatusCode.INTERNAL, "there is more than one message in the request")
        return None

    def _settle(self) -> None:
        """Book what is held, watch the clock over it, and wake the reader."""
        held = len(self._partial)
        by, self._held = held - self._held, held
        if held:
            self._clock()
        elif self._closed:
            self._unclock()
        if by:
            self._budget.change(by)
        if self._messages or self._closed:
            self._wake()

    def _fail(self, code: grpc.StatusCode, details: str) -> None:
        self._end_call(code, details)
        self.close()

    def _clock(self) -> None:
        if self._timer is None and self._timeout_s:
            self._timer = self._loop.call_later(self._timeout_s, self._too_late)

    def _unclock(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_late(self) -> None:
        self._fail(
            grpc.StatusCode.DEADLINE_EXCEEDED,
            f"the message was not complete within {self._timeout_s:g} s (--body-timeout)",
        )

    def _wake(self) -> None:
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(None)

    def _inflated(self, flag: int, message: bytes) -> bytes:
        if flag != _COMPRESSED or self.encoding is None:
            raise Unreadable(
                grpc.StatusCode.INTERNAL, "a message is marked as compressed, but grpc-encoding is not set"
            )
        inflater = zlib.decompressobj(WINDOW_BITS[self.encoding])
        try:
            plain = inflater.decompress(message, self._max_message + 1)
        except zlib.error as error:
            raise Unreadable(grpc.StatusCode.INTERNAL, "a message can't be decompressed") from error
        if len(plain) > self._max_message:
            sentence = f"the message is larger than {self._max_message} bytes when decompressed (--max-body-mib)"
            raise Unreadable(grpc.StatusCode.RESOURCE_EXHAUSTED, sentence)
        if not inflater.eof or inflater.unused_data:
            raise Unreadable(grpc.StatusCode.INTERNAL, "a compressed message is cut off, or something follows it")
        return plain
