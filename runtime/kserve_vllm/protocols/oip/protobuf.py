"""Counts what is in a serialized `ModelInferRequest` before it is parsed.

A field may take two bytes on the wire and a hundred in memory, and all of a message is parsed in one go: ten million
empty elements would hold up everybody for seconds. So fields are counted first, and counting stops at the limit.
Source of the format: protobuf.dev, "Encoding"; of the field numbers: kserve/open-inference-protocol.
"""

from __future__ import annotations

from kserve_vllm.core.errors import InvalidRequest

MAX_FIELDS = 70_000
"""Fields in one message, elements of BYTES tensors among them."""
MAX_PACKED = 10 << 20
"""Bytes of one packed field: numbers of a tensor take up to ten each."""
# In `ModelInferRequest` field 5 is an input, whose field 5 is its contents; their field 8 holds elements of bytes.
_INPUTS = _CONTENTS = 5
_BYTES_CONTENTS = 8
_DEPTH_OF_CONTENTS = 2


def check_size(data: bytes) -> None:
    """Let a message be parsed, or not. What is malformed is let pass: the parser says so.

    Raises:
        InvalidRequest: it has more fields, or more packed numbers, than are taken.
    """
    # A field has two bytes at least.
    if len(data) <= 2 * MAX_FIELDS:
        return
    count = 0
    # Where each part that holds fields begins and ends, and how deep it lies.
    parts = [(0, len(data), 0)]
    while parts:
        at, end, depth = parts.pop()
        while at < end:
            count += 1
            if count > MAX_FIELDS:
                raise InvalidRequest(
                    f"the message has more than {MAX_FIELDS} fields or elements; send numbers in raw_input_contents, "
                    "and fewer texts"
                )
            try:
                tag, at = _varint(data, at)
                kind, number = tag & 7, tag >> 3
                if kind == 0:
                    _, at = _varint(data, at)
                elif kind == 1:
                    at += 8
                elif kind == 5:
                    at += 4
                elif kind == 2:
                    size, at = _varint(data, at)
                    inner, at = at, at + size
                    if depth < _DEPTH_OF_CONTENTS and number == _INPUTS:
                        parts.append((inner, min(at, end), depth + 1))
                    elif depth == _DEPTH_OF_CONTENTS and number != _BYTES_CONTENTS and size > MAX_PACKED:
                        raise InvalidRequest("a tensor has too many numbers; send them in raw_input_contents")
                else:
                    # A group, which the format has given up; a parser would read what is in it.
                    raise InvalidRequest("the message holds a group, which no message of this service has")
            except IndexError:
                return


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The number at a place, and the place after it.

    Raises:
        IndexError: the data end before it, or it is longer than ten bytes.
    """
    value = data[at]
    at += 1
    if value < 0x80:
        return value, at
    value &= 0x7F
    for shift in range(7, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise IndexError
