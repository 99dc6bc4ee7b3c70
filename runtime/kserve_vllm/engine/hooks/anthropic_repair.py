"""Anthropic's Messages as its clients know them, from vLLM's handler.

An error in the middle of a stream is an event with Anthropic's type and the error's own sentence, where vLLM tells what
its own model of a chunk found wrong with it. An answer, whole or begun in a stream, has the fields that Anthropic's
description requires of it, also where they are null; a call of a tool names its caller.

Written against vLLM 0.32.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING

import orjson

from kserve_vllm.core.errors import anthropic_error

if TYPE_CHECKING:
    from fastapi import FastAPI
    from vllm.entrypoints.anthropic.protocol import AnthropicMessagesResponse

_ERROR = 'data: {"error"'
_START = "event: message_start\ndata: "
_BLOCK = "event: content_block_start\ndata: "
_CALLER = {"type": "direct"}
"""Of a tool that the model itself calls, as it always is here."""
_NULLS = ("stop_reason", "stop_sequence", "stop_details", "container")
_NULLS_OF_USAGE = (
    "cache_creation",
    "cache_creation_input_tokens",
    "cache_read_input_tokens",
    "inference_geo",
    "output_tokens_details",
    "server_tool_use",
    "service_tier",
)


def mend_messages(app: FastAPI) -> None:
    """Mend the handler of vLLM's app, where the model has one. Before the first request."""
    handler = getattr(app.state, "anthropic_serving_messages", None)
    if handler is None:
        return
    whole, stream = handler.messages_full_converter, handler.message_stream_converter

    def answered(*args: object, **kwargs: object) -> AnthropicMessagesResponse:
        made = whole(*args, **kwargs)
        return _answer_class()(**{name: getattr(made, name) for name in type(made).model_fields})

    async def streamed(chunks: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
        errors: list[dict[str, object]] = []
        events = stream(_until_error(chunks, errors))
        async for event in events:
            yield complete_start(event)
            break
        async for event in events:
            yield _started_block(event) if event.startswith(_BLOCK) else event
        if errors:
            yield f"event: error\ndata: {orjson.dumps(errors[0]).decode()}\n\n"

    handler.messages_full_converter, handler.message_stream_converter = answered, streamed


@functools.cache
def _answer_class() -> type[AnthropicMessagesResponse]:
    """vLLM's class of an answer, written with its fields that are null and that clients read."""
    from vllm.entrypoints.anthropic.protocol import AnthropicMessagesResponse

    class MessageAnswer(AnthropicMessagesResponse):  # type: ignore[misc]
        def model_dump(self, *args: object, **kwargs: object) -> dict[str, object]:
            tree: dict[str, object] = super().model_dump(*args, **kwargs)
            return complete_message(tree)

    return MessageAnswer


def complete_message(message: dict[str, object]) -> dict[str, object]:
    """An answer with null in the fields that are required and that vLLM left out."""
    if isinstance(usage := message.get("usage"), dict):
        message["usage"] = {**dict.fromkeys(_NULLS_OF_USAGE), **usage}
    content = message.get("content")
    for block in content if isinstance(content, list) else ():
        if block.get("type") == "text":
            block.setdefault("citations", None)
        elif block.get("type") == "tool_use":
            block.setdefault("caller", _CALLER)
    return {**dict.fromkeys(_NULLS), **message}


def complete_start(event: str) -> str:
    """The first event of a stream, with a complete answer; unchanged where it is another event."""
    if not event.startswith(_START):
        return event
    tree = orjson.loads(event.removeprefix(_START))
    tree["message"] = complete_message(tree["message"])
    return f"{_START}{orjson.dumps(tree).decode()}\n\n"


def _started_block(event: str) -> str:
    """The first event of a block, with who calls where it is a call of a tool."""
    tree = orjson.loads(event.removeprefix(_BLOCK))
    if tree["content_block"]["type"] == "tool_use":
        tree["content_block"].setdefault("caller", _CALLER)
    return f"{_BLOCK}{orjson.dumps(tree).decode()}\n\n"


async def _until_error(chunks: AsyncGenerator[str, None], errors: list[dict[str, object]]) -> AsyncGenerator[str, None]:
    """The chunks of a chat up to an error, which goes into `errors`."""
    async for chunk in chunks:
        if chunk.startswith(_ERROR):
            message = str(orjson.loads(chunk.removeprefix("data: "))["error"]["message"])
            errors.append(anthropic_error(500, message))
            return
        yield chunk
