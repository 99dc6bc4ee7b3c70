"""OpenAI's Responses as its clients know them, from vLLM's handler.

An answer that was cut off is `incomplete` in its status, in its last item, and in the last event of a stream, where
vLLM says `completed`. A conversation has as many tokens as over the other routes: the chat template has written the
special ones, and none is put before them. What follows a stored response (`previous_response_id`) sees the calls of
tools in it, which vLLM leaves out, so that their results would answer nothing. Every answer has the fields that
OpenAI's description and Open Responses' require of it, and null where they let it be null alone. A stream that the
engine refuses to go on with ends with an event for the error.

Written against vLLM 0.32.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from kserve_vllm.core.errors import RequestError

if TYPE_CHECKING:
    from fastapi import FastAPI
    from openai.types.responses import (
        ResponseErrorEvent,
        ResponseIncompleteEvent,
        ResponseOutputItem,
        ResponseTextConfig,
    )
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest, ResponsesResponse

_INCOMPLETE = "incomplete"
_ECHOED = ("safety_identifier", "prompt_cache_key")
"""Fields of a request that its answer repeats, and that vLLM's does not have."""
_WHOLE = frozenset({"response.created", "response.in_progress", "response.completed"})
"""Events that hold the answer."""
_OPENING = frozenset({"response.created", "response.in_progress"})
_OF_ITEMS = frozenset(f"response.{of}.{end}" for of in ("output_item", "content_part") for end in ("added", "done"))
"""Events that hold an item or a part of one."""

_CALLS = frozenset({"function_call", "custom_tool_call"})


class _Item(Protocol):
    """An item of an answer: a message, a call of a function, a chain of thought; or a part of one."""

    status: str | None
    logprobs: object


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
    count_alike()
    full, stream = handler.responses_full_generator, handler.responses_stream_generator

    async def whole(request: ResponsesRequest, *args: object, **kwargs: object) -> object:
        response = await full(request, *args, **kwargs)
        _complete(response, request)
        if getattr(response, "status", None) == _INCOMPLETE and response.output:
            _cut(response.output[-1])
        return response

    async def mended(
        request: ResponsesRequest, *args: object, **kwargs: object
    ) -> AsyncGenerator[_Event | ResponseIncompleteEvent, None]:
        # Whether the answer was cut off is known with the last event alone; the end of an item waits for the next one.
        held: _Event | None = None
        async for event in stream(request, *args, **kwargs):
            kind = event.type
            if kind in _WHOLE:
                _complete(event.response, request)
            elif kind in _OF_ITEMS:
                _complete_item(getattr(event, "item", None) or event.part)
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

    def streamed(
        request: ResponsesRequest, *args: object, **kwargs: object
    ) -> AsyncGenerator[_Event | ResponseIncompleteEvent | ResponseErrorEvent, None]:
        return _ended(mended(request, *args, **kwargs))

    replay = handler.responses_background_stream_generator

    async def replayed(*args: object, **kwargs: object) -> AsyncGenerator[_Event, None]:
        # vLLM's waits for `response.completed`, which does not come then.
        async for event in replay(*args, **kwargs):
            yield event
            if event.type in ("response.incomplete", "error"):
                return

    renderer = handler.online_renderer
    render = renderer.render_responses

    async def rendered(
        request: ResponsesRequest,
        *,
        previous_messages: list[object] | None = None,
        previous_response_outputs: list[ResponseOutputItem] | None = None,
        **others: object,
    ) -> object:
        outputs = previous_response_outputs or []
        if not renderer.use_harmony and any(item.type in _CALLS for item in outputs):
            from vllm.entrypoints.openai.responses.utils import construct_chat_messages_with_tool_call

            said = construct_chat_messages_with_tool_call([item for item in outputs if item.type != "reasoning"])
            previous_messages, previous_response_outputs = [*(previous_messages or ()), *said], None
        return await render(
            request,
            previous_messages=previous_messages,
            previous_response_outputs=previous_response_outputs,
            **others,
        )

    renderer.render_responses = rendered
    handler.responses_full_generator, handler.responses_stream_generator = whole, streamed
    handler.responses_background_stream_generator = replayed


async def _ended(
    events: AsyncGenerator[_Event | ResponseIncompleteEvent, None],
) -> AsyncGenerator[_Event | ResponseIncompleteEvent | ResponseErrorEvent, None]:
    """A stream that ends with an event for its error, where the engine refuses to go on; without, the connection would
    be cut. vLLM announces an answer before it asks the engine: that waits, so that what is refused from its beginning
    is answered with an error's status.

    Raises:
        RequestError: the engine refuses the request before its first token.
    """
    opening: list[_Event | ResponseIncompleteEvent] = []
    number = 0
    try:
        async for event in events:
            number = event.sequence_number + 1
            if event.type in _OPENING:
                opening.append(event)
                continue
            for each in opening:
                yield each
            opening.clear()
            yield event
    except RequestError as error:
        if opening or not number:
            raise
        yield _failed(error, number)
    for each in opening:
        yield each


def _failed(error: RequestError, number: int) -> ResponseErrorEvent:
    """The last event of a stream that the engine ends."""
    from openai.types.responses import ResponseErrorEvent

    code = error.openai_code or error.reason or error.openai_type
    return ResponseErrorEvent(type="error", code=code, message=error.message, param=error.field, sequence_number=number)


def _complete(response: ResponsesResponse, request: ResponsesRequest) -> None:
    """Write the required fields into an answer of vLLM's, which keeps fields that its class does not know."""
    if getattr(response, "object", None) != "response":
        return  # an error
    response.error = getattr(response, "error", None)
    response.completed_at = int(time.time()) if response.status == "completed" else None
    response.store = bool(request.store)
    for name in _ECHOED:
        setattr(response, name, getattr(request, name, None))
    if response.text is None:
        response.text = _text()
    for name, nothing in (("top_logprobs", 0), ("presence_penalty", 0.0), ("frequency_penalty", 0.0)):
        if getattr(response, name, nothing) is None:
            setattr(response, name, nothing)
    for item in response.output:
        _complete_item(item)


def _complete_item(item: _Item) -> None:
    """Of an item or a part of one: no null where only a list may stand."""
    if getattr(item, "type", None) == "output_text" and getattr(item, "logprobs", item) is None:
        item.logprobs = []
    for part in getattr(item, "content", None) or ():
        _complete_item(part)


def _cut(item: _Item) -> None:
    if getattr(item, "status", None) is not None:
        item.status = _INCOMPLETE


def _text() -> ResponseTextConfig:
    from openai.types.responses import ResponseTextConfig
    from openai.types.shared import ResponseFormatText

    return ResponseTextConfig(format=ResponseFormatText(type="text"))


def _incomplete(event: _Event) -> ResponseIncompleteEvent:
    """The last event of a stream that was cut off."""
    from openai.types.responses import ResponseIncompleteEvent
    from vllm.entrypoints.openai.responses import protocol

    class Incomplete(ResponseIncompleteEvent):
        response: protocol.ResponsesResponse  # type: ignore[assignment]

    return Incomplete(type="response.incomplete", sequence_number=event.sequence_number, response=event.response)


def count_alike() -> None:
    """Have `/v1/responses` count a prompt's tokens as `/v1/chat/completions` does; changes a class of vLLM's."""
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

    build = ResponsesRequest.build_tok_params

    def build_tok_params(self: ResponsesRequest, model_config: object) -> object:
        return replace(build(self, model_config), add_special_tokens=False)

    ResponsesRequest.build_tok_params = build_tok_params  # type: ignore[method-assign]
