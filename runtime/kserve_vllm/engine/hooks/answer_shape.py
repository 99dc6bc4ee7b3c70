"""Answers in the shape of the protocols' descriptions, where vLLM writes null for what may only be left out.

And where it leaves out what may only be null: `refusal` beside the log-probabilities of a message.

Fields of chats and of the usage that OpenAI's description does not let be null, and those of responses that Open
Responses' does not, are left out where vLLM has nothing for them. Clients that check answers against the description
refuse such an answer whole.

Written against vLLM 0.32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import BaseModel


def leave_out_nulls() -> None:
    """Have vLLM's classes of whole answers leave these fields out. Before the first request."""
    from openai.types.responses import (
        ResponseOutputItemAddedEvent,
        ResponseOutputItemDoneEvent,
        ResponseOutputMessage,
        ResponseTextConfig,
    )
    from vllm.entrypoints.openai.chat_completion import protocol as chat
    from vllm.entrypoints.openai.completion import protocol as completion
    from vllm.entrypoints.openai.responses import protocol as responses

    usage = chat.ChatCompletionResponse.model_fields["usage"].annotation
    _without(usage, "prompt_tokens_details", "completion_tokens_details")
    _without(chat.ChatMessage, "annotations", "function_call")
    _without(chat.ChatCompletionResponseChoice)
    _without(chat.ChatCompletionResponse, "service_tier")
    _with_null(chat.ChatCompletionLogProbs, "refusal")
    _without(completion.CompletionResponse, "service_tier")
    _without(ResponseOutputMessage, "phase")
    _without(ResponseTextConfig, "verbosity")
    _without(responses.ResponsesResponse, "user")
    for event in (
        ResponseOutputItemAddedEvent,
        ResponseOutputItemDoneEvent,
        responses.ResponseCreatedEvent,
        responses.ResponseInProgressEvent,
        responses.ResponseCompletedEvent,
    ):
        _without(event)


def _with_null(model: type[BaseModel], name: str) -> None:
    """Have a class that takes fields beyond its own write this one as null, also where unset fields are left out."""
    made = model.__init__

    def init(self: BaseModel, /, **fields: object) -> None:
        made(self, **{name: None, **fields})

    model.__init__ = init  # type: ignore[method-assign]


def _without(model: type[BaseModel], *names: str) -> None:
    """Leave out fields of a class where they are null. Without names: only take up what changed in its parts."""
    for name in names:
        if name in model.model_fields:
            model.model_fields[name].exclude_if = _is_none
    model.model_rebuild(force=True)


def _is_none(value: object) -> bool:
    return value is None
