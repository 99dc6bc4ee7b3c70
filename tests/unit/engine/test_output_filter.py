"""What becomes of the other answers to a request, where the moderation refuses one of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

from kserve_vllm.core.errors import Refused
from kserve_vllm.core.request_context import RequestContext
from kserve_vllm.engine.hooks.output_filter import filtered


class NoPlums:
    """Lets pass what stands before a plum."""

    rest = ""

    def __init__(self) -> None:
        self._text = ""

    async def feed(self, text: str) -> str:
        self._text += text
        return ""

    async def finish(self) -> str:
        self.rest, plum, _ = self._text.partition("plum")
        if plum:
            raise Refused("no plums")
        return self.rest


def step(*texts: str | None, finished: bool = True) -> Any:
    """An output that has a text for each answer, or None where there is none of it; all of them end with it."""
    choices = [
        SimpleNamespace(index=index, text=text, token_ids=[1], finish_reason="stop", stop_reason=None)
        for index, text in enumerate(texts)
        if text is not None
    ]
    return SimpleNamespace(outputs=choices, finished=finished)


def seen(*steps: Any, cumulative: bool = False) -> list[list[tuple[int, str, str]]]:
    """Index, text and finish reason of all answers that are let through."""

    async def outputs() -> AsyncGenerator[Any, None]:
        for each in steps:
            yield each

    async def read() -> list[Any]:
        context = RequestContext("r", "openai", "/x")
        return [each async for each in filtered(outputs(), context, NoPlums, cumulative)]

    found = asyncio.run(read())
    return [[(each.index, each.text, each.finish_reason) for each in output.outputs] for output in found]


def test_one_that_is_refused_takes_no_other_from_a_whole_answer() -> None:
    """As many answers as were asked for, or a client that counts on them fails: those that came whole, and the others
    cut off."""
    for cumulative in (False, True):
        assert seen(step("a fig", "a plum", "a plum too"), cumulative=cumulative) == [
            [(0, "a fig", "stop"), (1, "a ", "content_filter"), (2, "", "content_filter")]
        ]


def test_one_that_ended_before_does_not_end_twice() -> None:
    assert seen(step("a fig", None, finished=False), step(None, "a plum", "a pear")) == [
        [(0, "a fig", "stop")],
        [(1, "a ", "content_filter"), (2, "", "content_filter")],
    ]
