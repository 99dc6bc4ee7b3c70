"""Whole answers of vLLM's OpenAI handlers, from a parsed body to JSON, without a web framework around them.

Everything is vLLM's own: its request model, its handler, its answer (see `answer_bytes`), its handlers for exceptions.
What is left out is what FastAPI and its middleware do around those.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kserve_vllm.engine.patches.answer_bytes import BytesAnswer, wants_text_alone, with_bytes
from kserve_vllm.engine.patches.openai_stream import Handler, Kind, OpenAIRequest, app_is_bare, validated
from kserve_vllm.engine.patches.plain_chats import with_plain_chats
from kserve_vllm.engine.vllm import VLLMEngine

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.types import Scope


@dataclass(frozen=True, slots=True)
class WholeAnswer:
    """What goes over the wire: an HTTP status and JSON."""

    status: int
    body: bytes


class Question:
    """A validated request that the engine has not seen.

    Args:
        handler: vLLM's, for requests of this kind.
        kind: which of its methods is meant.
        request: vLLM's model of the body.
        app: vLLM's.
        scope: of the HTTP request; its headers are read.
        text_alone: whether nothing in it changes what stands in an answer beside its text.
    """

    __slots__ = ("_app", "_handler", "_kind", "_request", "_scope", "_text_alone")

    def __init__(
        self,
        handler: Handler,
        kind: Kind,
        request: OpenAIRequest,
        app: FastAPI,
        scope: Scope,
        text_alone: bool = False,
    ) -> None:
        self._text_alone = text_alone
        self._handler = handler
        self._kind = kind
        self._request = request
        self._app = app
        self._scope = scope

    async def answer(self) -> WholeAnswer:
        """Run vLLM's handler. What it raises is answered by the handlers for exceptions that vLLM's app has."""
        from fastapi import Request

        self._scope["app"] = self._app
        raw = Request(self._scope)
        wants_text_alone.set(self._text_alone)
        try:
            if self._kind == "chat":
                made = await self._handler.create_chat_completion(self._request, raw)
            else:
                made = await self._handler.create_completion(self._request, raw)
        except Exception as error:
            handlers = self._app.exception_handlers
            found = next((handlers[cls] for cls in type(error).__mro__ if cls in handlers), None)
            if found is None:
                raise
            made = found(raw, error)
            response = await made if inspect.isawaitable(made) else made
            return WholeAnswer(response.status_code, bytes(response.body))
        if type(made) is BytesAnswer:
            return WholeAnswer(200, made.body)
        refused = getattr(made, "error", None)
        return WholeAnswer(200 if refused is None else refused.code, made.model_dump_json().encode())


class AnswerHandler:
    """Takes requests for whole answers. Made after the engine has started.

    Args:
        engine: the started engine.
    """

    def __init__(self, engine: VLLMEngine) -> None:
        self._app = engine.app
        self.handlers: dict[Kind, Handler] = {}
        if app_is_bare(engine):
            state = engine.app.state
            found: dict[Kind, Handler | None] = {
                "chat": getattr(state, "openai_serving_chat", None),
                "completion": getattr(state, "openai_serving_completion", None),
            }
            self.handlers = {kind: with_bytes(kind, handler) for kind, handler in found.items() if handler is not None}
            if (chats := self.handlers.get("chat")) is not None:
                self.handlers["chat"] = with_plain_chats(chats, engine.short_prompts)

    def serves(self, kind: Kind) -> bool:
        """Whether answers of this kind can be given here at all."""
        return kind in self.handlers

    def take(self, kind: Kind, body: dict[str, object], scope: Scope, text_alone: bool = False) -> Question | None:
        """Validate a request.

        Args:
            body: the parsed JSON, of a request that wants no stream.
            scope: of the HTTP request.
            text_alone: whether nothing in it changes what stands in an answer beside its text.

        Returns:
            None where vLLM's app has to answer: it refuses the body.
        """
        request = validated(kind, body)
        if request is None:
            return None
        return Question(self.handlers[kind], kind, request, self._app, scope, text_alone)
