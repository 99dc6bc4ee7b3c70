"""A wrong item of a conversation ends its validation; it is not tried as everything that an item could be."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest

from kserve_vllm.core.errors import InvalidRequest
from kserve_vllm.engine.items import MAX_INPUT_ITEMS, check_items

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
ITEM = {"role": "user", "content": "a"}


def refusal(endpoint: str, **body: Any) -> str | None:
    try:
        asyncio.run(check_items(endpoint, json.dumps({"model": "m", **body}).encode()))
    except InvalidRequest as error:
        return error.message
    return None


@pytest.mark.parametrize(
    ("endpoint", "items", "names"),
    [
        (RESPONSES, [1] * 5000, "more than"),
        (RESPONSES, [1] * 900, "input[0]"),
        (RESPONSES, [ITEM] * 50 + [1.5] * 500, "input[50]"),
        (RESPONSES, [ITEM] * 50 + [{"role": 1}] * 500, "input["),
        (RESPONSES, [{"type": "message"}] * 900, "input[0]"),
        (RESPONSES, [ITEM] * (MAX_INPUT_ITEMS + 1), "more than"),
        (CHAT, [1.5] * 90_000, "messages[0]"),
        (CHAT, [{"role": "user", "content": [1] * 90_000}], "messages[0].content"),
        (CHAT, [ITEM] * 40 + [{"role": 1}] * 2000, "messages["),
        (MESSAGES, [None] * 90_000, "messages[0]"),
        (MESSAGES, [ITEM] * 40 + [{"role": 1}] * 2000, "messages["),
    ],
)
def test_a_wrong_item_is_named_and_ends_it(endpoint: str, items: list[Any], names: str) -> None:
    field = "input" if endpoint == RESPONSES else "messages"
    refusal(endpoint, **{field: [ITEM] * 20})  # the models are imported once
    began = time.process_time()
    sentence = refusal(endpoint, **{field: items})
    assert sentence is not None
    assert names in sentence
    # Of the four seconds that 5,000 wrong items took; work of this process, whatever else the machine does.
    assert time.process_time() - began < 1.0


@pytest.mark.parametrize("endpoint", ["/v1/completions", "/v1/completions/render", "/v1/chat/completions/batch"])
def test_so_many_prompts_are_taken_at_once(endpoint: str) -> None:
    field = "messages" if endpoint.startswith("/v1/chat") else "prompt"
    one: Any = [ITEM] if field == "messages" else "a"
    for many, n, taken in (
        (1024, None, True),
        (1025, None, False),
        (8, 128, True),
        (9, 128, False),
        (1025, "x", False),
    ):
        found = refusal(endpoint, **{field: [one] * many, "n": n})
        assert (found is None) is taken
        assert taken or found.startswith(f"{field}: at most")  # type: ignore[union-attr]
    assert refusal(endpoint, **{field: [5] * 100_000, "n": 128}) is None, "one prompt as tokens"
    nan = json.dumps({field: [one] * 1025, "temperature": float("nan")}).encode()
    with pytest.raises(InvalidRequest):
        asyncio.run(check_items(endpoint, nan))


@pytest.mark.parametrize("endpoint", [CHAT, RESPONSES, MESSAGES])
def test_right_items_pass_and_the_rest_is_left_to_vllm(endpoint: str) -> None:
    field = "input" if endpoint == RESPONSES else "messages"
    parts = {"role": "user", "content": [{"type": "input_text" if endpoint == RESPONSES else "text", "text": "a"}]}
    assert refusal(endpoint, **{field: [ITEM, parts] * 100}) is None
    assert refusal(endpoint, **{field: "a text of more than so many bytes"}) is None
    assert refusal(endpoint, **{field: [ITEM] * 100, "temperature": "wrong"}) is None
    assert refusal("/v1/completions", messages=[1] * 100) is None
