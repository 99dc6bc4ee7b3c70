"""What a request's sampling parameters may cost, before vLLM looks at them.

vLLM turns a schema, an expression or a grammar into an automaton, on the event loop first and in the engine after it,
and how long that takes depends on its form far more than on its size: an object of 250 properties of which some number
may be there, written in 6 KiB, takes seconds. Stop strings are looked for at every token, forbidden words are tokenized
one by one on the event loop and gone through by the engine at every step, for all that run beside. So all of these are
counted here, over every protocol, and a request that is over a bound is refused with a sentence that names it.

The rates behind the bounds are those of xgrammar 0.2.8 and a vocabulary of 32,000 tokens, on a slow core.

Written against vLLM 0.32.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence, Sized
from typing import TYPE_CHECKING

from kserve_vllm.core.errors import InvalidRequest

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams, StructuredOutputsParams

MAX_LISTED: Mapping[str, int] = {
    "stop": 128,
    "bad_words": 1_000,
    "stop_token_ids": 4_096,
    "logit_bias": 4_096,
}
"""Entries of a parameter. A stop string costs about 0.2 us a token, a forbidden word 80 us once and 1 us a step."""
MAX_WORD = 1_024
"""Characters of one stop string, or forbidden word."""
MAX_GRAMMAR: Mapping[str, int] = {
    "regex": 64 << 10,
    "grammar": 64 << 10,
    "json": 256 << 10,
    "structural_tag": 256 << 10,
}
"""Characters of what an answer has to match. 64 KiB of an expression take 50 ms."""
MAX_CHOICES = 10_000
"""Values that are given to choose from, together: `choice`, and every `enum` of a schema."""
MAX_CHOICE_TEXT = 256 << 10
"""Characters of all of `choice`."""
MAX_PROPERTIES = 5_000
"""Properties, and alternatives, of a schema with all that is in it; OpenAI takes as many. They take 2 s to compile."""
MAX_ORDERS = 500_000
"""Of every object of a schema the square of the properties that may be left out, times `minProperties` or
`maxProperties` where it has one; together. As many take 1 to 2 s to compile, and 0.1 s of the event loop."""
MAX_ITEMS = 50_000
"""`minItems`, `maxItems` and their like in a schema, together. guidance lays out each item: as many take 0.2 s of the
event loop and 100 MiB. Ten thousand million, in 60 bytes, ended the process."""
MAX_TAGS = 500
"""Structures of a structural tag."""

_COUNTS = ("minItems", "maxItems", "minContains", "maxContains", "minProperties", "maxProperties")


def check_costs(params: SamplingParams) -> None:
    """Refuse sampling parameters that would hold up everybody else.

    Raises:
        InvalidRequest: names the parameter, and says what it may have.
    """
    for name, most in MAX_LISTED.items():
        value = getattr(params, name)
        if isinstance(value, Sized) and len(value) > most and not isinstance(value, str):
            raise InvalidRequest(f"{name} has {len(value)} entries; at most {most} are taken", field=name)
    for name in ("stop", "bad_words"):
        words = getattr(params, name)
        if isinstance(words, Sequence) and any(isinstance(word, str) and len(word) > MAX_WORD for word in words):
            raise InvalidRequest(f"{name} has an entry of more than {MAX_WORD} characters", field=name)
    if (outputs := params.structured_outputs) is not None:
        check_grammar(outputs)


def check_grammar(outputs: StructuredOutputsParams) -> None:
    """Refuse what takes too long to be turned into an automaton.

    Raises:
        InvalidRequest: names it, and says what it may have.
    """
    for name, most in MAX_GRAMMAR.items():
        value = getattr(outputs, name)
        try:
            size = len(value) if isinstance(value, str) else 0 if value is None else len(json.dumps(value))
        except RecursionError:
            raise InvalidRequest(
                f"structured_outputs.{name} is nested too deeply", field="structured_outputs"
            ) from None
        if size > most:
            raise _over(f"structured_outputs.{name} has {size} characters", most)
    choices = outputs.choice
    if isinstance(choices, Sequence) and not isinstance(choices, str):
        if len(choices) > MAX_CHOICES:
            raise _over(f"structured_outputs.choice has {len(choices)} values", MAX_CHOICES)
        if (size := sum(len(choice) for choice in choices if isinstance(choice, str))) > MAX_CHOICE_TEXT:
            raise _over(f"structured_outputs.choice has {size} characters", MAX_CHOICE_TEXT)
    for name in ("json", "structural_tag"):
        tree = getattr(outputs, name)
        if isinstance(tree, str):
            try:
                tree = json.loads(tree)
            except (ValueError, RecursionError):
                continue  # which vLLM says
        if isinstance(tree, dict | list):
            check_schema(f"structured_outputs.{name}", tree)


def check_schema(name: str, tree: object) -> None:
    """Raise `InvalidRequest` for a JSON schema whose grammar would take too long to compile."""
    trees, properties, choices, orders, tags, items = [tree], 0, 0, 0, 0, 0
    while trees:
        node = trees.pop()
        if isinstance(node, list):
            trees.extend(each for each in node if isinstance(each, dict | list))
            continue
        if not isinstance(node, dict):
            continue
        trees.extend(each for each in node.values() if isinstance(each, dict | list))
        choices += _length(node.get("enum"))
        items += max(_number(node.get(each)) for each in _COUNTS)
        properties += sum(_length(node.get(each)) for each in ("anyOf", "oneOf", "allOf", "prefixItems"))
        tags += sum(_length(node.get(each)) for each in ("structures", "tags"))
        for each in ("properties", "patternProperties"):
            own = node.get(each)
            if isinstance(own, dict):
                properties += len(own)
                orders += _orders(node, own)
    for found, most, what in (
        (properties, MAX_PROPERTIES, "properties and alternatives"),
        (choices, MAX_CHOICES, "values to choose from"),
        (tags, MAX_TAGS, "structures"),
        (items, MAX_ITEMS, "items, by its minItems and maxItems"),
    ):
        if found > most:
            raise _over(f"{name} has {found} {what}", most)
    if orders > MAX_ORDERS:
        raise InvalidRequest(
            f"{name} has objects whose properties can be there or not in too many ways: name more of them in "
            "`required`, or leave out minProperties and maxProperties",
            field="structured_outputs",
        )


def _orders(node: Mapping[str, object], properties: Mapping[str, object]) -> int:
    """In how many ways one property may follow another, about."""
    if "minProperties" in node or "maxProperties" in node:
        return len(properties) ** 2 * max(1, _number(node.get("minProperties")), _number(node.get("maxProperties")))
    required = node.get("required")
    named = {each for each in required if isinstance(each, str)} if isinstance(required, list) else set()
    return len(properties.keys() - named) ** 2


def _number(value: object) -> int:
    """A number that is given as a count, as far as it matters; 0 for anything else, as NaN."""
    if not isinstance(value, int | float) or not value > 0:
        return 0
    return int(value) if value <= MAX_ITEMS else MAX_ITEMS + 1


def _length(value: object) -> int:
    return len(value) if isinstance(value, list) else 0


def _over(found: str, most: int) -> InvalidRequest:
    return InvalidRequest(f"{found}; at most {most} are taken", field="structured_outputs")
