"""Sampling parameters whose cost for others is bounded, without a server."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from kserve_vllm.core.errors import InvalidRequest
from kserve_vllm.engine.hooks import costs

NONE = dict.fromkeys(("json", "regex", "choice", "grammar", "structural_tag"))


def optional(count: int, **more: Any) -> dict[str, Any]:
    """An object whose properties may be left out."""
    return {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(count)}, **more}


def needed(count: int) -> dict[str, Any]:
    return optional(count, required=[f"p{n}" for n in range(count)])


def check(**fields: Any) -> None:
    params = {"stop": None, "bad_words": None, "stop_token_ids": None, "logit_bias": None, "structured_outputs": None}
    costs.check_costs(SimpleNamespace(**{**params, **fields}))  # type: ignore[arg-type]


def grammar(**fields: Any) -> None:
    check(structured_outputs=SimpleNamespace(**{**NONE, **fields}))


@pytest.mark.parametrize(
    ("field", "taken", "over"),
    [
        ("stop", ["x"] * 128, ["x"] * 129),
        ("stop", ["x" * 1024], ["x" * 1025]),
        ("bad_words", ["x"] * 1000, ["x"] * 1001),
        ("bad_words", ["x" * 1024], ["x", "x" * 1025]),
        ("stop_token_ids", list(range(4096)), list(range(4097))),
        ("logit_bias", dict.fromkeys(range(4096), 1.0), dict.fromkeys(range(4097), 1.0)),
    ],
)
def test_entries_are_counted(field: str, taken: Any, over: Any) -> None:
    check(**{field: taken})
    with pytest.raises(InvalidRequest, match=field) as refused:
        check(**{field: over})
    assert refused.value.field == field


TAG = {"begin": "<a>", "schema": {"type": "object"}, "end": "</a>"}
GRAMMARS: list[tuple[str, Any, Any]] = [
    ("regex", "a" * (64 << 10), "a" * (64 << 10) + "a"),
    ("grammar", 'root ::= "a"', " " * ((64 << 10) + 1)),
    ("json", {"description": "a" * (200 << 10)}, {"description": "a" * (256 << 10)}),
    ("choice", ["a"] * 10_000, ["a"] * 10_001),
    ("choice", ["a" * 1000] * 262, ["a" * 1000] * 263),
    ("json", {"enum": list(range(10_000))}, {"anyOf": [{"enum": list(range(5_001))}, {"enum": list(range(5_000))}]}),
    ("json", needed(5_000), needed(5_001)),
    ("json", optional(707), optional(708)),
    ("json", {"anyOf": [optional(500), optional(500)]}, {"anyOf": [optional(500), {"items": optional(501)}]}),
    ("json", optional(100, maxProperties=50), optional(100, maxProperties=51)),
    ("json", optional(7, minProperties=10_000), optional(8, minProperties=10_000)),
    ("json", {"maxItems": 50_000}, {"maxItems": 50_001}),
    ("json", {"minItems": 25_000, "maxItems": 25_000, "items": {"minItems": 25_000}}, {"minItems": 10_000_000_000}),
    ("json", {"anyOf": [{"maxItems": 5_000}] * 10}, {"anyOf": [{"maxItems": 5_000}] * 11}),
    ("json", {"minItems": 2.0}, {"minItems": 1e300}),
    ("json", optional(1, minProperties=2.0), optional(1, minProperties=1e300)),
    ("json", {"anyOf": [{}] * 5_000}, {"$defs": {"a": {"allOf": [{"oneOf": [{}] * 5_000}]}}}),
    ("structural_tag", {"structures": [TAG] * 500, "triggers": ["<a"]}, {"structures": [TAG] * 501, "triggers": []}),
]


@pytest.mark.parametrize(("name", "taken", "over"), GRAMMARS)
@pytest.mark.parametrize("as_text", [False, True])
def test_what_an_answer_has_to_match_is_bounded(name: str, taken: Any, over: Any, as_text: bool) -> None:
    if as_text and isinstance(taken, dict):
        taken, over = json.dumps(taken), json.dumps(over)
    grammar(**{name: taken})
    with pytest.raises(InvalidRequest) as refused:
        grammar(**{name: over})
    assert refused.value.field == "structured_outputs"
    assert name in refused.value.message


@pytest.mark.parametrize(
    "value",
    [
        1,
        "{",
        "[" * 5000,
        [],
        [1],
        {"maxItems": "x"},
        {"maxItems": None, "minItems": [1]},
        {"maxItems": float("nan")},
        optional(3, maxProperties=float("-inf")),
        {"enum": 1, "properties": [], "required": {}, "minProperties": "x"},
        {"anyOf": "x"},
    ],
)
def test_what_has_another_form_is_left_to_vllm(value: Any) -> None:
    grammar(json=value, structural_tag=value)


def test_what_is_nested_too_deeply_to_be_written_is_refused() -> None:
    deep: Any = {}
    for _ in range(20_000):
        deep = {"a": deep}
    with pytest.raises(InvalidRequest, match="nested"):
        grammar(json=deep)


def test_a_schema_of_any_depth_is_looked_at() -> None:
    deep: Any = {"enum": list(range(costs.MAX_CHOICES + 1))}
    for _ in range(20_000):
        deep = {"a": deep}
    with pytest.raises(InvalidRequest, match="values to choose from"):
        costs.check_schema("x", deep)
