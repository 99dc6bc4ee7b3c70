"""The one path of a request: may it pass now, and is anything still in flight.

Every protocol meets the same gate once per request; nothing here runs per token.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from kserve_vllm.errors import EngineGone, Unavailable
from kserve_vllm.lifecycle import Lifecycle, State

_RETRY_LOADING_S = 5
_RETRY_DRAINING_S = 1


class Gate:
    """Admits requests while the server is ready and counts those in flight."""

    def __init__(self, lifecycle: Lifecycle) -> None:
        self._lifecycle = lifecycle
        self._in_flight = 0
        self._closed = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def in_flight(self) -> int:
        """Requests that have entered and not left."""
        return self._in_flight

    def close(self) -> None:
        """Refuse everything new from now on. What is in flight goes on."""
        self._closed = True

    def refusal(self, needs_model: bool = True) -> Unavailable | None:
        """Why a request that arrives now is refused, or None if it may pass.

        Args:
            needs_model: False for a request about models, such as one that loads them; those pass while the base
                model is unloaded.
        """
        life = self._lifecycle
        if life.state is State.FAILED:
            return EngineGone(life.sentence(), retry_after_s=_RETRY_LOADING_S, close=True)
        if self._closed or life.state is State.STOPPED:
            return Unavailable(life.sentence(), retry_after_s=_RETRY_DRAINING_S, close=True)
        if life.ready or life.state is State.DRAINING:
            return None
        if life.state is State.READY and not needs_model:
            return None
        return Unavailable(life.sentence(), retry_after_s=_RETRY_LOADING_S)

    @contextmanager
    def enter(self, needs_model: bool = True) -> Iterator[None]:
        """Count one request for as long as the block runs.

        Args:
            needs_model: as for `refusal`.

        Raises:
            Unavailable: the server is loading, draining or unloaded.
            EngineGone: the engine is dead.
        """
        refusal = self.refusal(needs_model)
        if refusal is not None:
            raise refusal
        self._in_flight += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self._idle.set()

    async def wait_idle(self, timeout_s: float) -> bool:
        """Wait until nothing is in flight; False if that takes longer than `timeout_s` seconds."""
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            return False
        return True
