"""The messages of a gRPC call on their way in: cut out of the stream, counted, and inflated when they are read.

What clients may make the server hold is bounded four times: HTTP/2's windows for each stream, a `ReceiveBudget` for all
calls together, a fair part of it for each caller, and a time limit for each message.
Source of the frame, a flag and a length before each message: grpc/grpc, `doc/PROTOCOL-HTTP2.md`.
"""

from __future__ import annotations

import asyncio
import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import grpc

from kserve_vllm.grpc_server.http2 import Stream

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


@dataclass(eq=False)
class ReceiveShare:
    """What one caller holds of a budget.

    Attributes:
        budget: that it is a part of.
        held: bytes now.
    """

    budget: ReceiveBudget
    held: int = 0

    @property
    def fair(self) -> bool:
        """Whether it is no more than its part where all that hold something have the same."""
        return self.held <= max(self.budget.least, self.budget.limit // max(1, len(self.budget.shares)))

    def change(self, by: int) -> None:
        """So many bytes more, or fewer, are held."""
        self.held += by
        budget = self.budget
        if self.held:
            budget.shares.add(self)
        else:
            budget.shares.discard(self)
        budget.change(by)
        if by < 0 and budget.waiting and self.fair:
            for inbox in [each for each in budget.waiting if each.share is self]:
                budget.leave(inbox)
                inbox.credit()


@dataclass
class ReceiveBudget:
    """What all calls may hold together of messages that are not complete, or not read yet.

    Over the limit, the parts of messages wait for each other: their clients may send what their windows let them, and
    only the one that waits longest may send more. At twice the limit the others are refused. Neither holds for callers
    who have no more than their fair share: so one who fills the budget stands in nobody's way but its own.

    Most that can be held is three times the limit, one message, and `least` for each caller.

    Attributes:
        limit: in bytes.
        least: bytes that every caller may hold, however many there are.
        held: bytes now.
        waiting: calls with a part of a message, the one that may go on first.
        shares: those that hold something.
    """

    limit: int
    least: int = 256 << 10
    held: int = 0
    waiting: dict[ReceiveBuffer, None] = field(default_factory=dict)
    shares: set[ReceiveShare] = field(default_factory=set)

    def change(self, by: int) -> None:
        """So many bytes more, or fewer, are held."""
        self.held += by
        while by < 0 and self.waiting and self.held <= self.limit:
            inbox = next(iter(self.waiting))
            del self.waiting[inbox]
            inbox.credit()

    def lets(self, inbox: ReceiveBuffer) -> bool:
        """Whether the client of a call that has a part of a message may send more of it now."""
        if self.held <= self.limit or inbox.share.fair:
            return True
        self.waiting.setdefault(inbox)
        return self.is_first(inbox)

    def is_first(self, inbox: ReceiveBuffer) -> bool:
        """Whether it is this one's turn among those that wait."""
        return next(iter(self.waiting), None) is inbox

    def refuses(self, inbox: ReceiveBuffer) -> bool:
        """Whether there is no place any more for a part of a message."""
        return self.held > 2 * self.limit and not inbox.share.fair and not self.is_first(inbox)

    def leave(self, inbox: ReceiveBuffer) -> None:
        """A call has its message, or is over."""
        if inbox in self.waiting:
            first = self.is_first(inbox)
            del self.waiting[inbox]
            if first and self.waiting:
                next(iter(self.waiting)).credit()


class ReceiveBuffer:
    """What the client of one call has sent.

    Args:
        stream: that it comes over.
        share: what its caller holds of the server's budget.
        max_message: largest message in bytes, before and after it is inflated.
        max_unread: bytes of whole messages that may wait to be read; more end the call. None: what the window allows.
        timeout_s: that a message may take from its first byte to its last; 0: as long as it likes.
        fail: ends the call with a status.
    """

    def __init__(
        self,
        stream: Stream,
        share: ReceiveShare,
        max_message: int,
        timeout_s: float,
        fail: Callable[[grpc.StatusCode, str], None],
        max_unread: int | None = None,
    ) -> None:
        self._stream = stream
        self.share = share
        self._budget = share.budget
        self._max_unread = max_unread
        self._max_message = max_message
        self._timeout_s = timeout_s
        self._end_call = fail
        self._loop = asyncio.get_running_loop()
        self.partial = bytearray()
        self._held = 0
        self.messages: deque[tuple[int, bytes]] = deque()
        self.unread = 0
        self.owed = 0
        self._single = False
        self._count = 0
        self._closed = False
        self._timer: asyncio.TimerHandle | None = None
        self._arrival: asyncio.Future[None] | None = None
        self.encoding: str | None = None
        """That of compressed messages; None where the client named none."""

    def admit(self, share: ReceiveShare, max_message: int) -> None:
        """Count for another share from now on, before anything has come. What waits to be read has no bound then but
        the window's."""
        self.share, self._budget = share, share.budget
        self._max_message, self._max_unread = max_message, None

    def expect_one(self) -> None:
        """Take one message, which has to come in time, and no second one."""
        self._single = True
        self._clock()

    def feed(self, data: bytes, size: int) -> None:
        """Take bytes; `size` of them count for the client's window."""
        self.owed += size
        if not self._closed:
            self.partial += data
            self._split()
            self._settle()
            if self.partial and self._budget.refuses(self):
                self._fail(grpc.StatusCode.UNAVAILABLE, "too much is sent to this server at once; try again")
            elif self._max_unread is not None and self.unread > self._max_unread:
                self._fail(grpc.StatusCode.RESOURCE_EXHAUSTED, "more is sent than is read; wait for the answers")
        self.credit()

    def feed_end(self) -> None:
        """The client has sent all."""
        if self.partial and not self._closed:
            self._fail(grpc.StatusCode.INTERNAL, "the last message is cut off")
        self._wake()

    async def get(self) -> bytes | None:
        """The next message, inflated; None where there will be none.

        Raises:
            Unreadable: it can't be inflated.
        """
        while not self.messages:
            if self._closed or not self._stream.receives:
                return None
            self._arrival = self._loop.create_future()
            await self._arrival
        flag, message = self.messages.popleft()
        self.unread -= PREFIX + len(message)
        self._settle()
        self.credit()
        return self._inflated(flag, message) if flag else message

    def close(self) -> None:
        """Nothing will be read any more: forget what is here, and pass over what still comes."""
        if self._closed:
            return
        self._closed = True
        self.partial.clear()
        self.messages.clear()
        self.unread = 0
        self._settle()
        self._budget.leave(self)
        self.credit()

    def credit(self) -> None:
        """Let the client send more: not for what waits to be read, nor for a part where it is not its turn."""
        if self.partial and not self._budget.lets(self):
            return
        free = self.owed - self.unread
        if free > 0:
            self.owed -= free
            self._stream.acknowledge(free)

    @property
    def _why(self) -> str:
        """Where the largest message is set, if it is."""
        return " (--max-body-mib)" if self._max_unread is None else ""

    def _split(self) -> None:
        """Cut messages out of what has come."""
        partial = self.partial
        while len(partial) >= PREFIX:
            length = int.from_bytes(partial[1:PREFIX], "big")
            if length > self._max_message:
                sentence = f"the message has {length} bytes; at most {self._max_message} are taken{self._why}"
                return self._fail(grpc.StatusCode.RESOURCE_EXHAUSTED, sentence)
            if len(partial) < PREFIX + length:
                break
            self.messages.append((partial[0], bytes(partial[PREFIX : PREFIX + length])))
            del partial[: PREFIX + length]
            self.unread += PREFIX + length
            self._count += 1
            self._unclock()
            self._budget.leave(self)
        if self._single and self._count and (partial or self._count > 1):
            return self._fail(grpc.StatusCode.INTERNAL, "there is more than one message in the request")
        return None

    def _settle(self) -> None:
        """Book what is held, watch the clock over it, and wake the reader."""
        held = len(self.partial) + self.unread
        by, self._held = held - self._held, held
        if self.partial:
            self._clock()
        elif self._closed:
            self._unclock()
        if by:
            self.share.change(by)
        if self.messages or self._closed:
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
        self._timer = None
        waits = self in self._budget.waiting and not self._budget.is_first(self)
        if self.unread or waits or not self._stream.reads:
            # It is us who did not let the client send.
            return self._clock()
        return self._fail(
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
            sentence = f"the message is larger than {self._max_message} bytes when decompressed{self._why}"
            raise Unreadable(grpc.StatusCode.RESOURCE_EXHAUSTED, sentence)
        if not inflater.eof or inflater.unused_data:
            raise Unreadable(grpc.StatusCode.INTERNAL, "a compressed message is cut off, or something follows it")
        return plain
