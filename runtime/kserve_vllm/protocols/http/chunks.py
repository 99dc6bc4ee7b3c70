"""Chunks of a streamed body, written to the socket in a plain call; and a whole answer in one write.

uvicorn's `send` is a coroutine that looks at a response's whole life each time. Between the first message of a body and
the last there is only one thing to do, and where many streams are written in a row, what is done between two writes is
time in which readers are woken for a single frame. It writes an answer's head and its body apart, so that who waits for
the answer is woken twice.

Written against uvicorn 0.54 with httptools: `send` is a method of the object that has the connection's state. Where
it is anything else, streams are written through it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio

    from starlette.types import Send

try:
    from uvicorn.protocols.http.httptools_impl import RequestResponseCycle
except ImportError:  # uvicorn without httptools: it has another class, which keeps its state elsewhere
    RequestResponseCycle = None  # type: ignore[assignment,misc]

_READ = ("chunked_encoding", "flow", "disconnected", "response_complete", "transport")


class Chunks:
    """Writes a response's chunks.

    Args:
        cycle: uvicorn's object for one request and its response.
    """

    __slots__ = ("cycle",)

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self.cycle = cycle

    @property
    def open(self) -> bool:
        """Whether a chunk can be written now: a chunked body has begun, and the client is there and reads."""
        cycle = self.cycle
        return (
            cycle.chunked_encoding is True
            and not cycle.flow.write_paused
            and not cycle.disconnected
            and not cycle.response_complete
        )

    def made(self, body: bytes) -> Callable[[], None]:
        """What writes one chunk, which is not the last one of its body; to be called before anything is awaited, and
        only while `open`."""
        return partial(self.cycle.transport.write, b"%x\r\n%b\r\n" % (len(body), body))


def chunks_of(send: Send) -> Chunks | None:
    """What writes chunks past this ASGI `send`, or None where it is not uvicorn's own."""
    cycle = getattr(send, "__self__", None)
    if RequestResponseCycle is None or type(cycle) is not RequestResponseCycle:
        return None
    return Chunks(cycle) if all(hasattr(cycle, name) for name in _READ) else None


@contextlib.contextmanager
def one_write(send: Send) -> Iterator[None]:
    """Have what is sent in the block, the head of an answer and its body, go to the socket together.

    Args:
        send: ASGI's; where it is not uvicorn's own, nothing is changed.
    """
    chunks = chunks_of(send)
    if chunks is None:
        yield
        return
    cycle = chunks.cycle
    transport = cycle.transport
    held = _Held(transport)
    cycle.transport = held  # type: ignore[assignment]
    try:
        yield
    finally:
        cycle.transport = transport
        if not cycle.disconnected:
            held.flush()


class _Held:
    """A transport whose first write waits for the second one.

    Args:
        transport: what is written to.
    """

    __slots__ = ("_first", "_transport")

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._first: bytes | None = None

    def write(self, data: bytes) -> None:
        """asyncio's."""
        if self._first is None:
            self._first = data
        else:
            first, self._first = self._first, b""
            self._transport.write(first + data)

    def flush(self) -> None:
        """Write what waits."""
        if self._first:
            self._transport.write(self._first)
            self._first = b""

    def close(self) -> None:
        """asyncio's."""
        self.flush()
        self._transport.close()

    def __getattr__(self, name: str) -> object:
        return getattr(self._transport, name)
