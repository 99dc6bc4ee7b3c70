"""Answers as the moderation lets them pass: with their escapes undone, and beside others to the same request."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kserve_vllm.core.errors import Refused
from kserve_vllm.core.request_context import RequestContext
from kserve_vllm.engine.hooks.output_filter import filtered
from kserve_vllm.policy.moderation.hooks import Moderation


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


# Escapes, which vLLM's parsers of tool calls undo, and clients

HOOKS = """
hooks:
  - {name: fruit, action: redact, patterns: [{literal: pear, replacement: fig}, {literal: birné}, {literal: a/b}]}
  - {name: smile, action: refuse, patterns: [{literal: "\\U0001f600"}, {regex: 'so\\s+so'}]}
"""


def streamed(folder: Path, pieces: list[str]) -> tuple[str, str | None]:
    """What a client sees of an answer that comes in these pieces, and its finish reason; `refused` for an error."""
    (folder / "hooks.yaml").write_text(HOOKS, "utf-8")
    moderation = Moderation(folder / "hooks.yaml")

    def new_filter() -> Any:
        return moderation.answer("")

    async def outputs() -> AsyncGenerator[Any, None]:
        for number, piece in enumerate(pieces):
            output = step(piece, finished=number == len(pieces) - 1)
            output.outputs[0].finish_reason = "stop" if output.finished else None
            yield output

    async def read() -> list[Any]:
        context = RequestContext("r", "openai", "/x")
        return [each async for each in filtered(outputs(), context, new_filter, False)]

    try:
        found = asyncio.run(read())
    except Refused:
        return "", "refused"
    return "".join(each.outputs[0].text for each in found), found[-1].outputs[0].finish_reason


def cut(text: str, size: int) -> list[str]:
    return [text[at : at + size] for at in range(0, len(text), size)]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 1000])
@pytest.mark.parametrize(
    "text",
    [
        r'{"x": "p\u0065ar"}',
        r'{"x": "\u0070\u0065\u0061\u0072"}',
        r'{"x": "birn\u00e9"}',
        r'{"x": "birn\u00E9 and so on, for longer than is held back of an answer: a hundred characters and a few"}',
        r'{"x": "a\/b"}',
        r'{"x": "\ud83d\ude00"}',
        r'{"x": "so\nso"}',
        r'{"x": "\\\u0070ear"}',
        r"p\u0065ar",
        r"some text, then p\u0065ar",
    ],
)
def test_escapes_hide_nothing_from_a_moderation(tmp_path: Path, text: str, size: int) -> None:
    shown, reason = streamed(tmp_path, cut(text, size))
    assert reason in ("refused", "content_filter")
    shown = reread(shown)
    for word in ("pear", "birné", "a/b", "\U0001f600", "so\nso"):
        assert word not in shown
    assert size > 7 or not text.startswith("some") or shown.startswith("some text"), "what stood before had passed"


def reread(text: str) -> str:
    """A text as a reader of JSON has it."""
    text = re.sub(r"\\u([0-9a-fA-F]{4})", lambda found: chr(int(found[1], 16)), text)
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text.replace("\\n", "\n").replace("\\/", "/")


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 1000])
@pytest.mark.parametrize(
    ("text", "seen"),
    [
        (r'{"x": "pl\u0075m \n \" \\ \/ \ud83d\ude01"}', None),
        (r"\frac{a}{b} \times \u \ud83d \ud83d\u0041 \.", None),
        (r"\\u0070ear is no escape", r"\\u0070ear is no escape"),
        (r'{"x": "a pear\n"}', r'{"x": "a fig\n"}'),
        ("no escapes, a pear", "no escapes, a fig"),
        ("ends with \\", None),
        ("", None),
    ],
)
def test_an_answer_with_escapes_comes_whole_where_they_hide_nothing(
    tmp_path: Path, text: str, seen: str | None, size: int
) -> None:
    assert streamed(tmp_path, cut(text, size) or [""]) == (text if seen is None else seen, "stop")


def test_what_has_no_escape_waits_for_nothing() -> None:
    """As it was: a filter that holds nothing back lets each piece through when it comes."""

    class Open:
        rest = ""

        async def feed(self, text: str) -> str:
            return text

        async def finish(self) -> str:
            return ""

    async def outputs() -> AsyncGenerator[Any, None]:
        for piece in ("a", "b", "\\", "n", "c"):
            output = step(piece, finished=piece == "c")
            output.outputs[0].finish_reason = "stop" if output.finished else None
            yield output

    async def read() -> list[str]:
        context = RequestContext("r", "openai", "/x")
        return [each.outputs[0].text async for each in filtered(outputs(), context, Open, False)]

    assert asyncio.run(read()) == ["a", "b", "\\n", "c"]
