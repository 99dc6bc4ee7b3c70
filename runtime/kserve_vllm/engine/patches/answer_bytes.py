"""Whole answers of text alone, filled into bytes that vLLM's own code has written once.

vLLM builds five models for an answer and writes them as JSON. For a request that wanted nothing but the text of one
choice, all that differs from one answer to the next is a handful of values. So vLLM writes one answer with marks for
those, and each answer after that is made from it. Before it is used, vLLM writes another one, which has to come out of
the marks as well. Answers with anything else in them are vLLM's.

Written against vLLM 0.32.
"""

from __future__ import annotations

import copy
import logging
import time
import types
from collections.abc import AsyncIterator, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, TypeAlias, cast

import orjson

from kserve_vllm.engine.patches.openai_stream import Handler, Kind, OpenAIRequest, handler_is_plain

if TYPE_CHECKING:
    from pydantic import BaseModel
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
    from vllm.outputs import RequestOutput

log = logging.getLogger(__name__)

wants_text_alone: ContextVar[bool] = ContextVar("wants_text_alone", default=False)
"""Whether the running request holds nothing that changes what stands in an answer beside its text."""

Values: TypeAlias = Mapping[str, object]
_WORDS = {name: f"kserve-vllm-mark-{name}" for name in ("id", "model", "role", "text", "finish_reason", "stop_reason")}
_PROMPT, _COMPLETION = 7_640_000_000_000_001, 120_000_000_000_000
_NUMBERS = {"prompt": _PROMPT, "completion": _COMPLETION, "total": _PROMPT + _COMPLETION}
_FINISHED = frozenset({"stop", "length"})


class Template:
    """An answer as bytes, with places for what differs.

    Args:
        written: with marks.
        created: vLLM's time in it.
    """

    def __init__(self, written: bytes, created: int) -> None:
        marks = [(orjson.dumps(mark), name) for name, mark in (*_WORDS.items(), *_NUMBERS.items())]
        marks.append((b'"created":%d' % created, "created"))
        places = sorted((written.index(mark), mark, name) for mark, name in marks if written.count(mark) == 1)
        self._parts: list[tuple[bytes, str]] = []
        at = 0
        for place, mark, name in places:
            begin = place if name != "created" else place + len(b'"created":')
            self._parts.append((written[at:begin], name))
            at = place + len(mark)
        self._end = written[at:]
        self.names = frozenset(name for _, name in self._parts)
        """What is filled in."""

    def filled(self, values: Values) -> bytes:
        """An answer with these values, each of them one that JSON has."""
        return b"".join([part + orjson.dumps(values[name]) for part, name in self._parts]) + self._end


class BytesAnswer:
    """What a handler returns in place of vLLM's model of an answer.

    Attributes:
        body: JSON.
    """

    __slots__ = ("body",)

    def __init__(self, body: bytes) -> None:
        self.body = body


def with_bytes(kind: Kind, handler: Handler) -> Handler:
    """A copy of vLLM's handler that answers with `BytesAnswer` where `wants_text_alone`; the handler itself where it
    does more to an answer than write it."""
    if not handler_is_plain(kind, handler) or handler.enable_prompt_tokens_details:
        return handler
    twin = copy.copy(handler)
    if kind == "chat":
        if handler.parser_cls is None:
            twin.chat_completion_full_generator = _Chats(handler).answer
    else:
        twin.request_output_to_completion_response = _Completions(handler).answer
    return twin


class _Chats:
    def __init__(self, handler: OpenAIServingChat) -> None:
        self._handler = handler
        self._template: Template | None = None
        self._works = True

    async def answer(
        self,
        request: OpenAIRequest,
        outputs: AsyncIterator[RequestOutput],
        request_id: str,
        model: str,
        *args: object,
        **kwargs: object,
    ) -> BytesAnswer | BaseModel:
        """In the place of `chat_completion_full_generator`."""
        made: BaseModel
        write = self._handler.chat_completion_full_generator
        if not (wants_text_alone.get() and self._works):
            made = await write(request, outputs, request_id, model, *args, **kwargs)
            return made
        if self._template is None:
            await self._prepare()
        created = int(time.time())
        # A cancelled request is not answered; vLLM would make an answer for it.
        final: RequestOutput | None = None
        async for output in outputs:
            final = output
        if final is None or self._template is None or not _is_text_alone(final):
            made = await write(request, _again(final), request_id, model, *args, **kwargs)
            return made
        role = self._handler.get_chat_request_role(request)
        return BytesAnswer(self._template.filled(_values(final, request_id, model, created, role)))

    async def _prepare(self) -> None:
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

        written = []
        for values in (_MARKED, _SAMPLE):
            request = ChatCompletionRequest(
                messages=[{"role": values["role"], "content": "?"}], add_generation_prompt=False
            )
            made = await self._handler.chat_completion_full_generator(
                request,
                _again(_output(values)),
                values["id"],
                values["model"],
                [],
                self._handler.renderer.tokenizer,
                types.SimpleNamespace(),
            )
            written.append((made.model_dump_json().encode(), made.created))
        self._template = checked_template(written, {*_MARKED, "created"})
        self._works = self._template is not None


class _Completions:
    def __init__(self, handler: OpenAIServingCompletion) -> None:
        self._handler = handler
        self._template: Template | None = None
        self._works = True

    def answer(
        self,
        finals: list[RequestOutput],
        request: OpenAIRequest,
        request_id: str,
        created: int,
        model: str,
        *args: object,
        **kwargs: object,
    ) -> BytesAnswer | BaseModel:
        """In the place of `request_output_to_completion_response`."""
        if wants_text_alone.get() and self._works and len(finals) == 1 and _is_text_alone(finals[0]):
            if self._template is None:
                self._prepare()
            if self._template is not None:
                return BytesAnswer(self._template.filled(_values(finals[0], request_id, model, created, None)))
        write = self._handler.request_output_to_completion_response
        made: BaseModel = write(finals, request, request_id, created, model, *args, **kwargs)
        return made

    def _prepare(self) -> None:
        from vllm.entrypoints.openai.completion.protocol import CompletionRequest

        written = []
        for values in (_MARKED, _SAMPLE):
            made = self._handler.request_output_to_completion_response(
                [_output(values)],
                CompletionRequest(prompt="?", max_tokens=1),
                values["id"],
                1_700_000_000,
                values["model"],
                self._handler.renderer.tokenizer,
                types.SimpleNamespace(),
            )
            written.append((made.model_dump_json().encode(), made.created))
        self._template = checked_template(written, {*_MARKED, "created"} - {"role"})
        self._works = self._template is not None


_MARKED: Values = {**_WORDS, **_NUMBERS}
_SAMPLE: Values = {
    "id": 'cmpl-"1"',
    "model": "a/b c",
    "role": "user",
    "text": 'said: "ü 漢字 🙂"\n\t\\ \x1b\x7f\u2028 </s>',
    "finish_reason": "stop",
    "stop_reason": 7,
    "prompt": 11,
    "completion": 5,
    "total": 16,
}


class _Tokens(list[int]):
    """As many tokens as are said, without any."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self._count = count

    def __len__(self) -> int:
        return self._count


def _output(values: Values) -> RequestOutput:
    """An output of the engine that becomes an answer with these values."""
    from vllm.outputs import CompletionOutput, RequestOutput

    text, reason = values["text"], values["finish_reason"]
    tokens = _Tokens(cast(int, values["completion"]))
    choice = CompletionOutput(0, text, tokens, None, None, finish_reason=reason, stop_reason=values["stop_reason"])
    return RequestOutput("", None, _Tokens(cast(int, values["prompt"])), None, [choice], True)


def checked_template(written: list[tuple[bytes, int]], expected: set[str]) -> Template | None:
    """The template of the first answer, if it makes the second one; else None, and vLLM writes all of them."""
    (marked, created), (sample, created_then) = written
    template = Template(marked, created)
    if template.names == expected and template.filled({**_SAMPLE, "created": created_then}) == sample:
        return template
    log.warning("vLLM writes whole answers: its own have another form than is known here")
    return None


def _values(final: RequestOutput, request_id: str, model: str, created: int, role: str | None) -> Values:
    choice = final.outputs[0]
    prompt, completion = len(final.prompt_token_ids or ()), len(choice.token_ids)
    return {
        "id": request_id,
        "model": model,
        "role": role,
        "text": choice.text,
        "finish_reason": choice.finish_reason,
        "stop_reason": choice.stop_reason,
        "prompt": prompt,
        "completion": completion,
        "total": prompt + completion,
        "created": created,
    }


def _is_text_alone(final: RequestOutput) -> bool:
    """Whether an output has nothing but the text of one choice."""
    if len(final.outputs) != 1 or final.prompt_token_ids is None:
        return False
    choice = final.outputs[0]
    return (
        choice.index == 0
        and choice.finish_reason in _FINISHED
        and choice.logprobs is None
        and choice.routed_experts is None
        and choice.spec_decode_metrics is None
        and final.prompt_logprobs is None
        and final.encoder_prompt_token_ids is None
        and final.kv_transfer_params is None
        and final.ec_transfer_params is None
    )


async def _again(final: RequestOutput | None) -> AsyncIterator[RequestOutput]:
    if final is not None:
        yield final
