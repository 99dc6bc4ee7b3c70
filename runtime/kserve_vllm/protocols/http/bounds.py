"""What a request's body may hold, counted in its bytes before anything decodes it.

Decoding, validating and rendering a body are single calls, during which the event loop answers nobody else. How long
they take depends on the number of values far more than on the number of bytes: a text of 28 MiB is read in
milliseconds, a million messages of 28 bytes in seconds. So values are counted first. Counting is cheap for a text of
any size; only where a body could be over a bound is it looked at closely, and then in a thread and in pieces.

Also here: half of a surrogate pair, which is no character and which no tokenizer takes. vLLM reads JSON with Python's
parser, which lets it pass; it fails where it is encoded, anywhere up to the answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

from kserve_vllm.core.errors import BodyTooLarge, InvalidRequest

MAX_STRINGS = 50_000
"""Strings of one body, names of fields included."""
MAX_CONTAINERS = 10_000
"""Objects and lists of one body."""
MAX_VALUES = 1_000_000
"""Values of one body."""

MAX_DIGITS = 1 << 16
"""Digits of a body's numbers, of those alone that have a hundred and more. Python takes 75 us to read 4,000 digits."""
MAX_TOKENIZED = 1 << 20
"""Bytes of a body that is answered with its tokens; a quarter of that where they are told as texts, too."""
LEAST_HOLD_S = 0.02
"""Bodies that hold the event loop for less are not counted: most prompts of a hundred thousand tokens."""

PIECE = 1 << 18
"""Bytes of a form that are parsed in one go."""

Body = TypeVar("Body")
Found = TypeVar("Found")
_TOKENIZED = frozenset({"/tokenize"})
# No body of less bytes can hold more than is taken.
_SMALL = 2 * MAX_CONTAINERS
_AT_ONCE = 1 << 18
_PIECE = 1 << 16
_QUOTE, _COMMA, _BRACKET = b'",['
_ZERO = ord("0")
# Digits are counted by runs of so many that begin at a multiple of it.
_RUN = 64
_HALF_ESCAPE = re.compile(
    rb"\\u[dD](?:[89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD])[c-fC-F])"
)
# Python's parser takes these for half of a pair.
_HALF_BYTES = re.compile(rb"\xed[\xa0-\xbf]")
# The end of a piece that the next one may go on with: a first half, an escape, a character of several bytes.
_UNFINISHED = re.compile(rb"(?:\\u[dD][89abAB][0-9a-fA-F]{2})?\\[^\\]{0,5}\Z|\\u[dD][89abAB][0-9a-fA-F]{2}\Z|\xed\Z")
_HALF = re.compile("[\ud800-\udfff]")
_UTF8_FORM = re.compile(rb";[ \t]*charset=(?:utf-8|\"utf-8\")[ \t]*(?=;|\Z)")


def check_tokenized(endpoint: str, body: bytes) -> None:
    """Refuse a text that would be answered with too many tokens: no context bounds how long that answer gets.

    Raises:
        BodyTooLarge: it has too many bytes.
    """
    if endpoint not in _TOKENIZED:
        return
    most = MAX_TOKENIZED
    if most // 4 < len(body) <= most:
        # Read, since a name can be written in more than one way.
        with contextlib.suppress(ValueError):
            tree = json.loads(body)
            most //= 4 if isinstance(tree, dict) and tree.get("return_token_strs") else 1
    if len(body) > most:
        sentence = f"at most {most >> 10} KiB are turned into tokens at once; ask for the text in parts"
        raise BodyTooLarge(sentence, field="prompt")


def check_form(content_type: bytes) -> None:
    """Refuse a form that names the encoding of its texts, unless that is UTF-8.

    A form's type has no such parameter (RFC 7578, 5.1.2), and whoever reads one takes any codec that Python has for it:
    some fail in ways of their own, and punycode takes a minute of the event loop for 200 KiB.

    Raises:
        InvalidRequest: it does.
    """
    lower = content_type.lower()
    if lower.count(b"charset") != len(_UTF8_FORM.findall(lower)):
        raise InvalidRequest(
            "a form's texts are UTF-8, and its Content-Type names no other charset", field="content-type"
        )


async def check_values(body: bytes | memoryview) -> float:
    """Refuse JSON that holds more values than are read.

    Returns:
        For about how many seconds whoever decodes and validates it will hold the event loop; 0 where that is little.

    Raises:
        InvalidRequest: it does.
    """
    if len(body) <= _SMALL:
        return 0.0
    counts = await _aside(len(body), _count_roughly, body)
    if _sentence(counts) is None and _hold_s(counts) < LEAST_HOLD_S:
        return 0.0
    counts = await asyncio.to_thread(_count, bytes(body))
    if (sentence := _sentence(counts)) is not None:
        raise InvalidRequest(sentence, field="body")
    return _hold_s(counts)


async def has_more_values(body: bytes, most: int) -> bool:
    """Whether JSON holds more values than `most`, by the commas between them."""
    if len(body) <= most or body.count(b",") <= most:
        return False
    return int((await asyncio.to_thread(_count, body))[1]) > most


def excess(body: bytes) -> str | None:
    """Why JSON holds more than is read, or None; for who has a thread of its own for it. As `check_values`."""
    if len(body) <= _SMALL or _sentence(_count_roughly(body)) is None:
        return None
    return _sentence(_count(body))


async def check_unicode(body: bytes) -> None:
    """Refuse JSON with half of a surrogate pair.

    Raises:
        InvalidRequest: there is one; the message names the top-level field where the body is small enough to look.
    """
    if b"\\u" not in body and b"\xed" not in body and b"\x00" not in body:
        return
    if not await _aside(len(body), _has_half_pair, body):
        return
    field = "body"
    if len(body) <= _AT_ONCE:
        with contextlib.suppress(ValueError, RecursionError):
            field = _field_with_half(json.loads(body)) or field
    raise InvalidRequest(f"{field}: half of a surrogate pair is no character", field=field)


async def _aside(size: int, look: Callable[[Body], Found], body: Body) -> Found:
    """Look at a small body here, and at a large one in a thread."""
    return look(body) if size <= _AT_ONCE else await asyncio.to_thread(look, body)


def _count_roughly(body: bytes | memoryview) -> npt.NDArray[np.int64]:
    """The bytes that begin or part values, inside of texts too; up to where a body could be over a bound."""
    data = np.frombuffer(body, dtype=np.uint8)
    counts = np.zeros(4, dtype=np.int64)
    for begin in range(0, len(data), _PIECE):
        counts += _counts(data[begin : begin + _PIECE])
        if _sentence(counts) is not None:
            break
    return counts


def _count(body: bytes) -> npt.NDArray[np.int64]:
    """The same without what stands in texts."""
    counts = np.zeros(4, dtype=np.int64)
    begin, inside = 0, 0
    while begin < len(body):
        piece = body[begin : begin + _PIECE]
        if (len(piece) - len(piece.rstrip(b"\\"))) % 2:
            piece = body[begin : begin + _PIECE + 1]  # with what its last backslash escapes
        begin += len(piece)
        data = np.frombuffer(piece.replace(b"\\\\", b"__").replace(b'\\"', b"__"), dtype=np.uint8)
        # Odd from a text's first quote to before its last one.
        parity = (np.cumsum(data == _QUOTE, dtype=np.uint32) + inside) & 1
        inside = int(parity[-1])
        counts += _counts(data[(parity == 0) | (data == _QUOTE)])
        if _sentence(counts) is not None:
            break
    return counts


def _counts(data: npt.NDArray[np.uint8]) -> tuple[int, int, int, int]:
    """Numbers of quotes, commas, opening brackets and braces, which differ in one bit, and runs of digits."""
    runs = data[: len(data) // _RUN * _RUN].reshape(-1, _RUN) - np.uint8(_ZERO)  # below zero it is over 200
    return (
        int(np.count_nonzero(data == _QUOTE)),
        int(np.count_nonzero(data == _COMMA)),
        int(np.count_nonzero((data & 0xDF) == _BRACKET)),
        int(np.count_nonzero(runs.max(axis=1) < 10)) if len(runs) else 0,
    )


def _hold_s(counts: npt.NDArray[np.int64]) -> float:
    """Seconds of the event loop that so many values cost, at about the rates seen of vLLM's models on a slow core."""
    quotes, commas, opened, _ = (int(count) for count in counts)
    return quotes // 2 * 1e-6 + commas * 0.12e-6 + opened * 18e-6


def _sentence(counts: npt.NDArray[np.int64]) -> str | None:
    quotes, commas, opened, runs = counts
    for count, most, what in (
        (quotes // 2, MAX_STRINGS, "strings"),
        (opened, MAX_CONTAINERS, "objects and lists"),
        (commas, MAX_VALUES, "values"),
        (runs * _RUN, MAX_DIGITS, "digits in numbers that are too long to be any"),
    ):
        if count > most:
            return f"the body holds more than {most} {what}, which is the most that is read"
    return None


def _has_half_pair(body: bytes) -> bool:
    """Whether there is half of a surrogate pair, or text that is no UTF-8 at all."""
    begin = 0
    while begin < len(body):
        end = begin + _PIECE
        # An escaped backslash makes plain text of what follows it.
        piece = body[begin:end].replace(b"\\\\", b"__")
        if end < len(body) and (cut := _UNFINISHED.search(piece)):
            piece = piece[: cut.start()]
        if b"\x00" in piece or _HALF_BYTES.search(piece) or _HALF_ESCAPE.search(piece):
            return True
        begin += len(piece)
    return False


def _field_with_half(tree: object) -> str | None:
    for name, value in tree.items() if isinstance(tree, dict) else [("body", tree)]:
        if any(_HALF.search(json.dumps(part, ensure_ascii=False)) for part in (name, value)):
            return _HALF.sub("\ufffd", str(name))
    return None
