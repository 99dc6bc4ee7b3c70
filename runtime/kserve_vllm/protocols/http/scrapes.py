"""Metrics, for who asks without a key: rendering takes about 10 ms of the event loop, whoever asks and how often."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

SHARE = 0.25
"""Of the event loop, for rendering metrics."""
_OPENMETRICS = "application/openmetrics-text"


class Scrapes:
    """Renders metrics as often as their share of the event loop allows. All who wait meanwhile get the same, which is
    rendered after the last of them has asked.

    Args:
        render: all metrics for an `Accept` header, and their content type.
    """

    def __init__(self, render: Callable[[str], tuple[bytes, str]]) -> None:
        self._render = render
        self._next: dict[str, asyncio.Task[tuple[bytes, str]]] = {}
        self._free_at = 0.0

    async def answer(self, accept: str) -> tuple[bytes, str]:
        """All metrics, and their content type."""
        form = _OPENMETRICS if _OPENMETRICS in accept else ""
        if not self._next and asyncio.get_running_loop().time() >= self._free_at:
            return self._rendered(form)
        if form not in self._next:
            self._next[form] = asyncio.create_task(self._later(form))
        # One that leaves takes it from no other.
        return await asyncio.shield(self._next[form])

    async def _later(self, form: str) -> tuple[bytes, str]:
        loop = asyncio.get_running_loop()
        while (left_s := self._free_at - loop.time()) > 0:
            await asyncio.sleep(left_s)
        del self._next[form]
        return self._rendered(form)

    def _rendered(self, form: str) -> tuple[bytes, str]:
        loop = asyncio.get_running_loop()
        began = loop.time()
        found = self._render(form)
        now = loop.time()
        self._free_at = now + (now - began) * (1 / SHARE - 1)
        return found
