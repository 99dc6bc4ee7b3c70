"""Serialized messages of `ModelStreamInfer`, put together from bytes that are fixed per request and the new text.

A message is made when the call can take it: what came while another one was being written is in one message.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from kserve_vllm.core.errors import RequestError
from kserve_vllm.engine.patches.openai_stream import TextStream

# Protobuf tags of fields with a length: field 6 of ModelInferResponse, and field 2 of ModelStreamInferResponse.
_RAW_OUTPUT_CONTENTS = b"\x32"
_INFER_RESPONSE = b"\x12"

_GIVEN_UP = "error"
"""Why a sequence has ended that the engine could not go on with."""


class Pieces:
    """The messages of one streamed request with one output, `text_output`.

    Args:
        stream: the engine's output.
        heads: a serialized `ModelInferResponse` without contents, for all messages but the last, and for the last.
        after: a whole one to send at the very end, or None.
        translate: what an exception of the engine becomes, given whether there was output; None where it has given up.
    """

    def __init__(
        self,
        stream: TextStream,
        heads: tuple[bytes, bytes],
        after: bytes | None,
        translate: Callable[[Exception | None, bool], RequestError],
    ) -> None:
        self._stream = stream
        self._heads = heads
        self._after = after
        self._translate = translate
        self._queued = False

    async def run(self, put: Callable[[Pieces], None]) -> None:
        """Put this object whenever there is something to take, until the engine is done.

        Raises:
            RequestError: whatever the engine answers.
        """
        stream = self._stream
        done = asyncio.get_running_loop().create_future()

        def ready() -> None:
            if not self._queued:
                self._queued = True
                put(self)
            if stream.over and not done.done():
                done.set_result(None)

        stream.on_ready = ready
        if stream.waiting:
            ready()
        try:
            await done
        finally:
            await stream.close()
        if stream.error is not None or stream.finish_reason == _GIVEN_UP:
            raise self._translate(stream.error, stream.begun)

    def take(self) -> list[bytes]:
        """Serialized `ModelStreamInferResponse` messages with what has come since the last time."""
        stream = self._stream
        self._queued = False
        text, count = stream.text, stream.new_tokens
        stream.text, stream.new_tokens = "", 0
        last = stream.finish_reason is not None
        if not (text or count or last) or stream.finish_reason == _GIVEN_UP:
            return []
        raw = text.encode()
        contents = len(raw).to_bytes(4, "little") + raw
        response = b"".join((self._heads[last], _RAW_OUTPUT_CONTENTS, _length(contents), contents))
        messages = [response, self._after] if last and self._after is not None else [response]
        return [b"".join((_INFER_RESPONSE, _length(each), each)) for each in messages]


def _length(data: bytes) -> bytes:
    return _LENGTHS[len(data)] if len(data) < len(_LENGTHS) else _varint(len(data))


def _varint(value: int) -> bytes:
    """Protobuf's base-128 form of a length."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


_LENGTHS = tuple(map(_varint, range(1024)))
