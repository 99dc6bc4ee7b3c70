"""How long a client may take to send a request's body, and how much of bodies is held at once.

A body that never ends would hold a place among the requests in flight for ever, and a slot of the queue with it.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Generator
from typing import TYPE_CHECKING

from kserve_vllm.core.errors import BodyTimeout, RateLimited, Unavailable
from kserve_vllm.core.request_context import RequestContext
from kserve_vllm.protocols.http.bounds import LEAST_HOLD_S
from kserve_vllm.protocols.http.disconnect import resume

if TYPE_CHECKING:
    from starlette.types import Message

SHARE = 0.02
"""Of the event loop, for one caller's bodies of very many values."""
MOST_WAIT_S = 10.0
"""Seconds that such a body waits for its turn."""


class BodyBudget:
    """What requests hold of bodies together, from their first byte to their answer's end.

    Args:
        total: bytes of all; one caller with a key may hold half.
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self._held: dict[str | None, int] = {}
        self.held = 0

    def take(self, context: RequestContext, size: int) -> None:
        """Hold more of a body.

        Raises:
            Unavailable: too much is held already.
        """
        own = self._held.get(context.access.key_id, 0) + size
        most = self._total if context.access.key_id is None else self._total // 2
        if own > most or self.held + size > self._total:
            whose = "the server holds" if self.held + size > self._total else "requests with this key hold"
            raise Unavailable(
                f"{whose} too much of request bodies at once",
                field="body",
                retry_after_s=1,
                close=True,
                reason="bodies",
            )
        self._held[context.access.key_id] = own
        self.held += size

    def give(self, context: RequestContext, size: int) -> None:
        """Hold it no longer."""
        self.held -= size
        left = self._held.get(context.access.key_id, 0) - size
        if left > 0:
            self._held[context.access.key_id] = left
        else:
            self._held.pop(context.access.key_id, None)


class LoopShare:
    """What bodies of many values may take of the event loop: a small share of it for each caller.

    Decoding and validating such a body is one call that holds the loop for up to `watchdog.HOLD_S`, during which no
    other client gets a token. A caller who sends one after the other waits in between, and only he does.
    """

    def __init__(self) -> None:
        self.free_at: dict[str | None, float] = {}

    def wait_s(self, context: RequestContext, hold_s: float) -> float:
        """Take a turn, and say in how many seconds it comes; 0 for what holds the loop for little.

        Raises:
            RateLimited: it would be in over `MOST_WAIT_S`.
        """
        if hold_s < LEAST_HOLD_S:
            return 0.0
        now = asyncio.get_running_loop().time()
        free_at = {caller: at for caller, at in self.free_at.items() if at > now}
        wait_s = max(0.0, free_at.get(context.access.key_id, now) - now)
        if wait_s > MOST_WAIT_S:
            raise RateLimited(
                "too many bodies of very many values at once; send fewer values, or fewer such requests a minute",
                field="body",
                retry_after_s=math.ceil(wait_s - MOST_WAIT_S),
                reason="bodies",
            )
        free_at[context.access.key_id] = now + wait_s + hold_s / SHARE
        self.free_at = free_at
        return wait_s


class TimedBody:
    """ASGI's receive, of a request with a body, that gives up on the body when it takes too long.

    The time runs from when the body is first waited for until it is complete. A body that is there already is handed on
    with no timer.

    Args:
        receive: ASGI's.
        limit_s: seconds for the whole body.
        request context: of the request; told why there is no body, since apps make an error of their own of what is
        raised.
    """

    __slots__ = ("_complete", "_context", "_limit_s", "_receive", "_refusal", "_until")

    def __init__(self, receive: Callable[[], Awaitable[Message]], limit_s: float, context: RequestContext) -> None:
        self._receive = receive
        self._limit_s = limit_s
        self._context = context
        self._until: float | None = None
        self._complete = False
        self._refusal: BodyTimeout | None = None

    def __call__(self) -> Awaitable[Message]:
        """ASGI's receive.

        Raises:
            BodyTimeout: when awaited, the time is up.
        """
        return self._receive() if self._complete else self._part()

    async def _part(self) -> Message:
        if self._refusal is not None:
            raise self._refusal
        receiving = self._receive().__await__()
        message: Message
        try:
            waits_for = next(receiving)
        except StopIteration as done:
            message = done.value
        else:
            message = await self._late_part(receiving, waits_for)
        self._complete = not message.get("more_body")
        return message

    async def _late_part(self, receiving: Generator[object, object, Message], waits_for: object) -> Message:
        if self._until is None:
            self._until = asyncio.get_running_loop().time() + self._limit_s
        try:
            async with asyncio.timeout_at(self._until):
                return await resume(receiving, waits_for)
        except TimeoutError:
            sentence = f"the body did not come within {self._limit_s:g} s (--body-timeout)"
            self._refusal = self._context.refusal = BodyTimeout(sentence, field="body", close=True)
            raise self._refusal from None
