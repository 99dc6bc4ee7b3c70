"""OpenAI's Responses as its clients know them, from vLLM's handler.

An answer that was cut off is `incomplete` in its status, in its last item, and in the last event of a stream, where
vLLM says `completed`. A conversation has as many tokens as over the other routes: the chat template has written the
special ones, and none is put before them.

Written against vLLM 0.32.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from fastapi import FastAPI
    from openai.types.responses import ResponseIncompleteEvent
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

_INCOMPLETE = "incomplete"


class _Item(Protocol):
    """An item of an answer: a message, a call of a function, a chain of thought."""

    status: str | None


class _Response(Protocol):
    """An answer, as far as it has come."""

    status: str


class _Event(Protocol):
    """An event of a stream. It has those of the parts that go with its type."""

    type: str
    sequence_number: int
    response: _Response
    item: _Item


def mend_responses(app: FastAPI) -> None:
    """Mend the handler of vLLM's app, where the model has one. Before the first request."""
    handler = getattr(app.state, "openai_serving_responses", None)
    if handler is None:
        return
    _count_alike()
    full, stream = handler.responses_full_generator, handler.responses_stream_generator

    async def whole(*args: object, **kwargs: object) -> object:
        response = await full(*args, **kwargs)
        if getattr(response, "status", None) == _INCOMPLETE and response.output:
            _cut(response.output[-1])
        return response

    async def streamed(*args: object, **kwargs: object) -> AsyncGenerator[_Event | ResponseIncompleteEvent, None]:
        # Whether the answer was cut off is known with the last event alone; the end of an item waits for the next one.
        held: _Event | None = None
        async for event in stream(*args, **kwargs):
            kind = event.type
            if kind == "response.completed" and event.response.status == _INCOMPLETE:
                if held is not None:
                    _cut(held.item)
                event = _incomplete(event)
            if held is not None:
                yield held
                held = None
            if kind == "response.output_item.done":
                held = event
            else:
                yield event
        if held is not None:
            yield held

    replay = handler.responses_background_stream_generator

    async def replayed(*args: object, **kwargs: object) -> AsyncGenerator[_Event, None]:
        # vLLM's waits for `response.completed`, which does not come then.
        async for event in replay(*args, **kwargs):
            yield event
            if event.type == "response.incomplete":
                return

    handler.responses_full_generator, handler.responses_stream_generator = whole, streamed
    handler.responses_background_stream_generator = replayed


def _cut(item: _Item) -> None:
    if getattr(item, "status", None) is not None:
        item.status = _INCOMPLETE


def _incomplete(event: _Event) -> ResponseIncompleteEvent:
    """The last event of a stream that was cut off."""
    from openai.types.responses import ResponseIncompleteEvent
    from vllm.entrypoints.openai.responses.protocol import ResponsesResponse

    class Incomplete(ResponseIncompleteEvent):
        response: ResponsesResponse  # type: ignore[assignment]

    return Incomplete(type="response.incomplete", sequence_number=event.sequence_number, response=event.response)


def _count_alike() -> None:
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

    build = ResponsesRequest.build_tok_params

    def build_tok_params(self: ResponsesRequest, model_config: object) -> object:
        return replace(build(self, model_config), add_special_tokens=False)

    ResponsesRequest.build_tok_params = build_tok_params  # type: ignore[method-assign]
