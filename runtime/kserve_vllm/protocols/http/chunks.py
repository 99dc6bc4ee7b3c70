"""Chunks of a streamed body, written to the socket in a plain call.

uvicorn's `send` is a coroutine that looks at a response's whole life each time. Between the first message of a body and
the last there is only one thing to do, and where many streams are written in a row, what is done between two writes is
time in which readers are woken for a single frame.

Written against uvicorn 0.54 with httptools: `send` is a method of the object that has the connection's state. Where
it is anything else, streams are written through it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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

    __slots__ = ("_cycle",)

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle

    @property
    def open(self) -> bool:
        """Whether a chunk can be written now: a chunked body has begun, and the client is there and reads."""
        cycle = self._cycle
        return (
            cycle.chunked_encoding is True
            and not cycle.flow.write_paused
            and not cycle.disconnected
            and not cycle.response_complete
        )

    def made(self, body: bytes) -> Callable[[], None]:
        """What writes one chunk, which is not the last one of its body; to be called before anything is awaited, and
        only while `open`."""
        return partial(self._cycle.transport.write, b"%x\r\n%b\r\n" % (len(body), body))


def chunks_of(send: Send) -> Chunks | None:
    """What writes chunks past this ASGI `send`, or None where it is not uvicorn's own."""
    cycle = getattr(send, "__self__", None)
    if RequestResponseCycle is None or type(cycle) is not RequestResponseCycle:
        return None
    return Chunks(cycle) if all(hasattr(cycle, name) for name in _READ) else None
