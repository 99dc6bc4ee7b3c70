"""How a coroutine is run where a task around it is not wanted: begun by hand, or given up when the client leaves."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Generator
from typing import TYPE_CHECKING, TypeVar

from kserve_vllm.core.coroutines import resume as resume

if TYPE_CHECKING:
    from starlette.types import Message, Receive

T = TypeVar("T")


class ClientGone(Exception):
    """The client closed the connection before the answer was ready."""


async def until_disconnect(receive: Receive, work: Awaitable[T]) -> T:
    """Await `work`, in the running task; it is cancelled when the client goes away, so that the engine aborts.

    Args:
        receive: ASGI's, of a request whose body has been read.
        work: may end in whatever way it likes when it is cancelled.

    Raises:
        ClientGone: the client went away first.
    """
    task = asyncio.current_task()
    assert task is not None
    gone = False

    def leave() -> None:
        nonlocal gone
        gone = True
        task.cancel()

    watcher = _Watcher(receive, leave)
    try:
        done = await work
    except BaseException:
        if not gone:
            raise
    finally:
        watcher.cancel()
    if not gone:
        return done
    if task.uncancel():  # the server stops us as well
        raise asyncio.CancelledError
    raise ClientGone


class _Watcher:
    """Waits for a client to leave; in a task of its own only once something has come from it, which most never do.

    Args:
        receive: ASGI's, of a request whose body has been read.
        leave: called once when the client has gone.
    """

    __slots__ = ("_leave", "_receive", "_receiving", "_task", "_waits_for")

    def __init__(self, receive: Receive, leave: Callable[[], None]) -> None:
        self._receive = receive
        self._leave = leave
        self._task: asyncio.Task[None] | None = None
        self._receiving: Generator[object, object, Message] = receive().__await__()
        self._waits_for: object = None
        try:
            self._waits_for = next(self._receiving)
        except StopIteration as came:
            self._begin(came.value)
        except Exception:
            self._leave()
        else:
            if isinstance(self._waits_for, asyncio.Future):
                self._waits_for.add_done_callback(self._go_on)
            else:
                self._begin(None)

    def _go_on(self, _: object) -> None:
        self._begin(None)

    def _begin(self, message: Message | None) -> None:
        self._task = asyncio.get_running_loop().create_task(self._watch(message))

    async def _watch(self, message: Message | None) -> None:
        with contextlib.suppress(Exception):
            if message is None:
                message = await resume(self._receiving, self._waits_for)
            while message["type"] != "http.disconnect":
                message = await self._receive()
        self._leave()

    def cancel(self) -> None:
        """Watch no longer."""
        if self._task is not None:
            self._task.cancel()
        elif isinstance(self._waits_for, asyncio.Future):
            self._waits_for.remove_done_callback(self._go_on)
            self._receiving.close()
