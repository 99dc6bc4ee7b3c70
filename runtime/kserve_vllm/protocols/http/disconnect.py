"""How a coroutine is run where a task around it is not wanted: begun by hand, or given up when the client leaves."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable
from typing import TYPE_CHECKING, TypeVar

from kserve_vllm.core.coroutines import resume as resume

if TYPE_CHECKING:
    from starlette.types import Receive

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

    async def watch() -> None:
        nonlocal gone
        with contextlib.suppress(Exception):
            while (await receive())["type"] != "http.disconnect":
                pass
        gone = True
        task.cancel()

    watcher = asyncio.create_task(watch())
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
