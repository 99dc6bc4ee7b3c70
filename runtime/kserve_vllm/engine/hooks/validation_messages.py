"""What pydantic finds wrong with a request, as one sentence that names the field as the client wrote it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kserve_vllm.core.errors import shortened

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

_MAX_CHARS = 300
# Words of a place in pydantic's errors that are fields of a request, and not names of types.
_FIELD = re.compile(r"(?!(?:str|int|float|bool|list|dict|tuple|set|bytes|nullable)\b)[a-z_][a-z0-9_]*")
# Python's way to write a value within a sentence of vLLM's.
_DICTIONARY = re.compile(r"[:=]?\s*[\[(]*\{'[^']*': .*", re.DOTALL)
_JSON_WORDS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\bTrue\b"), "true"),
    (re.compile(r"\bFalse\b"), "false"),
    (re.compile(r"\bNone\b(?! of\b)"), "null"),
)
_EXPECTED: Mapping[str, str] = {
    "string": "a string",
    "int": "an integer",
    "float": "a number",
    "decimal": "a number",
    "bool": "true or false",
    "list": "a list",
    "tuple": "a list",
    "set": "a list",
    "dict": "an object",
    "mapping": "an object",
    "model": "an object",
    "dataclass": "an object",
    "typed": "an object",
    "none": "null",
}
"""First word of a type of pydantic's errors to what JSON should have held."""
_KIND_OF_VALUE = ("_type", "_parsing", "_from_float", "_attributes_type", "_sub_type", "_unicode")
_BOUNDS: Mapping[str, tuple[str, str]] = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("greater than", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("less than", "lt"),
}


@dataclass(frozen=True)
class _Fault:
    """One of pydantic's errors: the field as it stands in JSON, which branch of a union found it, and what it is."""

    path: tuple[str | int, ...]
    branch: tuple[str, ...]
    expected: str | None
    sentence: str
    field: str | None


def sentence_of_validation(errors: Sequence[ErrorDetails | str], body: object) -> tuple[str, str | None]:
    """One sentence about the likeliest mistake, and the field at fault.

    pydantic tells of every branch of a union. What the client meant is taken to be the branch with the fewest errors,
    of those the one that got furthest into the value.

    Args:
        errors: as `ValidationError.errors()` gives them, or sentences.
        body: what was validated, with which the places in the errors are told from the names of pydantic's types.
    """
    if errors and isinstance(errors[0], str):
        return _short(errors[0]), None
    faults = [_fault(error, body) for error in errors if not isinstance(error, str)]
    if not faults:
        return "the request has the wrong form", None
    top = faults[0].path[:1]
    branches: dict[tuple[str, ...], list[_Fault]] = {}
    for fault in faults:
        if fault.path[:1] == top:
            branches.setdefault(fault.branch, []).append(fault)
    # A value of the right kind that is too long, say, was meant for that branch, and not for one of another kind.
    best = min(
        branches.values(),
        key=lambda found: (len(found), -max(len(each.path) for each in found), found[0].expected is not None),
    )
    chosen = best[0]
    alike = [found[0] for found in branches.values() if len(found) == len(best) and found[0].path == chosen.path]
    expected = list(dict.fromkeys(each.expected for each in alike if each.expected))
    name = _name(chosen.path)
    if chosen.expected and expected:
        return _short(f"{name} must be {' or '.join(expected)}"), chosen.field or name
    return _short(chosen.sentence), chosen.field or (name if chosen.path else None)


def sentence_of_a_part(errors: Sequence[ErrorDetails], field: str | None) -> tuple[str, str | None]:
    """One sentence about a part of a request that vLLM validates later, when its place in the body is not known, and
    the top-level field that it is a part of.

    Args:
        errors: as `ValidationError.errors()` gives them.
        field: taken for that field where the errors don't begin with one.
    """
    first = errors[0]["loc"][:1] if errors else ()
    if first and isinstance(first[0], str) and _FIELD.fullmatch(first[0]):
        field = first[0]
    whole = f"a part of {field or 'the request'} has the wrong form"
    branches: dict[str, list[ErrorDetails]] = {}
    for error in errors:
        types = (word for word in error["loc"] if isinstance(word, str) and not _FIELD.fullmatch(word))
        branches.setdefault(next(types, ""), []).append(error)
    if not branches:
        return whole, field
    error = min(branches.values(), key=len)[0]
    names = [word for word in error["loc"] if isinstance(word, str) and _FIELD.fullmatch(word)]
    name, kind = names[-1] if names else "it", error["type"]
    if kind == "missing" and names:
        return f"{whole}: {name} is missing", field
    if kind.endswith(_KIND_OF_VALUE) and (expected := _EXPECTED.get(kind.split("_")[0])):
        return f"{name} must be {expected}" if names == [field] else f"{whole}: {name} must be {expected}", field
    return whole, field


def plain_words(text: str) -> str:
    """A sentence of vLLM's without what only Python's readers can read: dictionaries are left out, and the words for
    true, false and null are JSON's."""
    text = _DICTIONARY.sub("", shortened(text))
    for word, json in _JSON_WORDS:
        text = word.sub(json, text)
    return text


def _fault(error: ErrorDetails, body: object) -> _Fault:
    path, branch = _placed(error.get("loc") or (), body, missing=error.get("type") == "missing")
    # A place that is not in the body: pydantic read the value in another form than it was written.
    lost = not path and bool(branch)
    name = "a part of the request" if lost else _name(path)
    kind, context = str(error.get("type", "")), error.get("ctx") or {}
    if kind == "json_invalid":
        return _Fault((), branch, None, f"the body is not valid JSON: {context.get('error', '')}".rstrip(": "), None)
    if kind == "missing":
        return _Fault(path, branch, None, f"{name} is missing", None)
    if kind.endswith(_KIND_OF_VALUE) and (expected := _EXPECTED.get(kind.split("_")[0])):
        if lost:
            known = [word for word in branch if _FIELD.fullmatch(word)]
            what = f"{known[-1]} must be {expected}" if known else f"{expected} is missing"
            return _Fault(path, branch, None, f"{name} has the wrong form: {what}", None)
        return _Fault(path, branch, "a JSON object" if not path else expected, "", None)
    if kind in ("literal_error", "enum", "union_tag_invalid"):
        options = context.get("expected") or context.get("expected_tags") or ""
        return _Fault(path, branch, str(options).replace("'", '"'), "", None)
    if kind in _BOUNDS:
        words, key = _BOUNDS[kind]
        return _Fault(path, branch, None, f"{name} must be {words} {context.get(key)}", None)
    if kind in ("value_error", "assertion_error"):
        cause = context.get("error")
        text = str(cause.args[0]) if isinstance(cause, Exception) and cause.args else str(error.get("msg", ""))
        text = text.removeprefix("Value error, ").removeprefix("Assertion failed, ").strip() or "has the wrong form"
        field = getattr(cause, "parameter", None)
        line = text.splitlines()[0]
        named = str(field or name).split("[")[0].split(".")[-1] in line or not path
        return _Fault(path, branch, None, line if named else f"{name}: {line}", field)
    if kind in ("too_long", "string_too_long"):
        return _Fault(path, branch, None, f"{name} has more than {context.get('max_length')} elements", None)
    if kind in ("too_short", "string_too_short"):
        return _Fault(path, branch, None, f"{name} has fewer than {context.get('min_length')} elements", None)
    if kind == "extra_forbidden":
        return _Fault(path, branch, None, f"{name} is no field that is known here", None)
    if kind == "union_tag_not_found":
        tag = str(context.get("discriminator", "type")).strip("'")
        return _Fault((*path, tag), branch, None, f"{_name((*path, tag))} is missing", None)
    return _Fault(path, branch, None, f"{name} has the wrong form", None)


def _placed(loc: Sequence[int | str], body: object, missing: bool) -> tuple[tuple[str | int, ...], tuple[str, ...]]:
    """The keys and indices of a place in `body`, and the other words of the place: names of pydantic's types."""
    words = list(loc)
    if words and words[0] == "body":
        words = words[1:]
    path: list[str | int] = []
    branch: list[str] = []
    at: object = body
    for position, word in enumerate(words):
        last = position == len(words) - 1
        if isinstance(at, dict) and (word in at or (missing and last)):
            path.append(word)
            at = at.get(word)
        elif isinstance(at, list) and isinstance(word, int) and 0 <= word < len(at):
            path.append(word)
            at = at[word]
        else:
            branch.append(str(word))
    return tuple(path), tuple(branch)


def _name(path: Sequence[str | int]) -> str:
    if not path:
        return "the body"
    name = ""
    for part in path:
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else str(part)
    return name


def _short(text: str) -> str:
    return text if len(text) <= _MAX_CHARS else text[:_MAX_CHARS] + "..."
