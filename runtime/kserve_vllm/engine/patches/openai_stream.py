"""Streams of vLLM's OpenAI handlers, from a parsed body to text, without what those add to every token.

vLLM's own handler validates and renders a request and calls the engine; only its last step, the generator of frames, is
left out. The engine's output for a request then goes into a `TextStream`: there is no task and no generator between
vLLM's output processor and the response, and no output object per token. All streams that got something in one step of
the engine are told in one callback of the event loop.

Written against vLLM 0.32; what moves there is mended here. Where something is not as expected (another handler class,
a middleware, a parser that rewrites text), `StreamHandler` says no, and vLLM answers.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias, TypeVar

import orjson

from kserve_vllm.core.errors import RequestError
from kserve_vllm.core.request_context import current
from kserve_vllm.core.types import TextJob
from kserve_vllm.engine.faults import is_client_fault
from kserve_vllm.engine.hooks.request_repair import with_null_usage
from kserve_vllm.engine.hooks.submission import ASKED, Lookup, SubmissionHooks
from kserve_vllm.engine.patches.plain_chats import with_plain_chats
from kserve_vllm.engine.patches.plain_outputs import send_to
from kserve_vllm.engine.vllm import VLLMEngine, is_for_browsers

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
    from vllm.entrypoints.generate.base.protocol import DeltaMessage
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
    from vllm.outputs import RequestOutput
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.output_processor import RequestState

log = logging.getLogger(__name__)

T = TypeVar("T")
Kind = Literal["chat", "completion"]
Handler: TypeAlias = "OpenAIServingChat | OpenAIServingCompletion"
OpenAIRequest: TypeAlias = "ChatCompletionRequest | CompletionRequest"
Call: TypeAlias = "tuple[tuple[object, SamplingParams, str], dict[str, object]]"
"""Arguments of `AsyncLLM.generate`: prompt, parameters and request id, and those by name."""

# Stand for what differs from request to request while vLLM's models write a frame once.
_ID, _MODEL, _ROLE, _TEXT, _FINISH, _STOP = _WORDS = tuple(f"kserve-vllm-mark-{i}" for i in range(6))
_CREATED, _PROMPT, _COMPLETION, _TOTAL = _NUMBERS = tuple(7_640_000_000_000_000 + i for i in range(4))


# What a handler asks of the engine's client beside the call that is caught.
_READ_WHILE_PREPARING = ASKED - {"add_request"} | {"vllm_config", "model_config", "renderer", "input_processor"}


@dataclass(frozen=True)
class Frames:
    """The frames of one response, as bytes to fill in.

    Attributes:
        first: comes before everything else; empty for completions.
        head, tail: stand before and after a piece of text, which is a JSON string with its quotes.
        last: the frame with the finish reason; holds the marks of `fill_last`.
        last_empty: the same without text.
        with_usage: whether `first`, `head`, `tail` and `last` hold marks for `fill_usage`.
        ends_without_tokens: whether an answer that has no token at all gets a frame with its finish reason, as from
            vLLM 0.33 on.
    """

    first: bytes
    head: bytes
    tail: bytes
    last: bytes
    last_empty: bytes
    with_usage: bool
    ends_without_tokens: bool = False

    def fill_last(self, text: str, finish_reason: str, stop_reason: int | str | None, empty: bool) -> bytes:
        """The frame that ends a choice; `empty` leaves the text's field out."""
        frame = (self.last_empty if empty else self.last).replace(_mark(_TEXT), orjson.dumps(text))
        frame = frame.replace(_mark(_FINISH), orjson.dumps(finish_reason))
        return frame.replace(_mark(_STOP), orjson.dumps(stop_reason))

    @staticmethod
    def fill_usage(frame: bytes, prompt_tokens: int, completion_tokens: int) -> bytes:
        """Write token counts into a frame made with `with_usage`."""
        for mark, value in (
            (_PROMPT, prompt_tokens),
            (_COMPLETION, completion_tokens),
            (_TOTAL, prompt_tokens + completion_tokens),
        ):
            frame = frame.replace(_mark(mark), b"%d" % value)
        return frame


class TextStream:
    """What the engine has made of one request and nobody has taken yet.

    vLLM's output processor sees it as the request's queue. Whoever writes the response is called through `on_ready`,
    takes `text` and `new_tokens`, and sets them back to nothing.

    Attributes:
        text: new text.
        new_tokens: number of tokens behind it.
        begun: whether there was any output.
        finish_reason, stop_reason: set with the last text.
        error: what was raised instead of an output.
        prompt_tokens: length of the prompt.
        cached: how many of those were found in the prefix cache, and how many were written to it.
        on_ready: called from the event loop, in no task; outputs wait while it is None. What it returns is called
            once all streams of the same step have been told.
    """

    __slots__ = (
        "_call",
        "_client",
        "_hub",
        "_internal_id",
        "_pump",
        "_queued",
        "_state",
        "_submission",
        "_take_text",
        "begun",
        "cached",
        "error",
        "finish_reason",
        "new_tokens",
        "on_ready",
        "prompt_tokens",
        "stop_reason",
        "text",
    )

    def __init__(
        self, hub: Hub, client: AsyncLLM, call: Call, submission: SubmissionHooks[Lookup] | None = None
    ) -> None:
        self._submission = submission
        self._hub = hub
        self._client = client
        self._call = call
        self._state: RequestState  # only where `take` is called
        self._internal_id: str | None = None
        self._pump: asyncio.Task[None] | None = None
        self._take_text: Callable[[bool, bool], str] | None = None
        self._queued = False
        self.text = ""
        self.new_tokens = 0
        self.prompt_tokens = 0
        self.cached: tuple[int | None, int | None] = None, None
        self.begun = False
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.error: Exception | None = None
        self.on_ready: Callable[[], Callable[[], None] | None] | None = None

    # The engine's side

    def put(self, output: RequestOutput | Exception) -> None:
        """An output of vLLM's for this request, or an exception."""
        if isinstance(output, Exception):
            self.error = self.error or output
        else:
            if output.prompt_token_ids is not None:
                self.prompt_tokens = len(output.prompt_token_ids)
            if not self.begun:
                self.cached = output.num_cached_tokens, output.num_cache_creation_tokens
            self.begun = True
            for choice in output.outputs:
                self.text += choice.text
                self.new_tokens += len(choice.token_ids)
                if choice.finish_reason is not None:
                    self.finish_reason, self.stop_reason = choice.finish_reason, choice.stop_reason
        self._tell()

    def take(
        self,
        new_token_ids: list[int],
        pooling_output: object,
        finish_reason: object,
        stop_reason: int | str | None,
        *_: object,
        **__: object,
    ) -> None:
        """In the place of `RequestState.make_request_output`: the same, without making two objects of it."""
        assert self._take_text is not None
        text = self._take_text(finish_reason is not None, True)
        if text:
            self.text += text
        self.new_tokens += len(new_token_ids)
        if not self.begun:
            self.begun = True
            self.cached = self._state.num_cached_tokens, self._state.num_cache_creation_tokens
        if finish_reason is not None:
            self.finish_reason, self.stop_reason = str(finish_reason), stop_reason
        if not self._queued:
            self._queued = True
            self._hub.add(self)

    def more(self, text: str, tokens: int) -> None:
        """Text in the middle of an answer, and the number of tokens behind it."""
        self.text += text
        self.new_tokens += tokens
        if not self._queued:
            self._queued = True
            self._hub.add(self)

    def _tell(self) -> None:
        if not self._queued:
            self._queued = True
            self._hub.add(self)

    def wake(self) -> Callable[[], None] | None:
        """Hand what has come to the writer, and return what it wants to do last. Only the hub calls this."""
        self._queued = False
        return self.on_ready() if self.on_ready is not None else None

    # The response's side

    @property
    def waiting(self) -> bool:
        """Whether there is something to take."""
        return bool(self.text or self.new_tokens or self.finish_reason or self.error)

    @property
    def over(self) -> bool:
        """Whether the engine is done with this request."""
        return self.finish_reason is not None or self.error is not None

    @property
    def refusable(self) -> bool:
        """Whether outputs are looked at on their way, so that an error may still come in place of an answer."""
        return self._pump is not None

    async def start(self) -> None:
        """Hand the request to the engine. What goes wrong is in `error`, as vLLM's generator would raise it.

        Raises:
            RequestError: a policy does not let it pass.
        """
        client = self._client
        args, kwargs = self._call
        prompt, params, request_id = args
        if self._submission is not None and self._submission.follows():
            self._pump = asyncio.create_task(self._run(client.generate(*args, **kwargs)))
            return
        if self._submission is not None:
            await self._submission.admit(prompt, params, kwargs)
        try:
            queue = await client.add_request(request_id, prompt, params, **kwargs)
        except Exception as error:
            self.put(_as_generate_raises(error))
            return
        self._internal_id = queue.request_id
        state = client.output_processor.request_states.get(queue.request_id)
        if state is not None:
            self._state = state
            self.prompt_tokens = state.prompt_len
            state.queue = self
            if state.stream_interval == 1 and state.parent_req is None and state.detokenizer is not None:
                self._take_text = state.detokenizer.get_next_output_text
                state.make_request_output = self.take
                send_to(state, self.more)
        if queue.output is not None:
            # Came before the queue was replaced.
            self.put(queue.output)

    async def _run(self, outputs: AsyncIterator[RequestOutput]) -> None:
        try:
            async for output in outputs:
                self.put(output)
        except Exception as error:
            self.put(error)

    async def close(self) -> None:
        """Abort the request in the engine if it is not done with it."""
        self.on_ready = None
        if self._pump is not None:
            self._pump.cancel()
            await asyncio.gather(self._pump, return_exceptions=True)
        elif self._internal_id is not None and not self.over:
            await self._client.abort(self._internal_id, internal=True)


class OpenAIStream(TextStream):
    """A stream that becomes frames of OpenAI's protocol.

    Attributes:
        frames: how they look.
        include_usage: whether a frame with the usage comes at the end.
        skips_empty: whether a piece without text gets no frame.
    """

    __slots__ = ("_context", "_prepared", "frames", "include_usage", "skips_empty")

    def __init__(
        self, hub: Hub, client: AsyncLLM, prepared: _Prepared, submission: SubmissionHooks[Lookup] | None = None
    ) -> None:
        super().__init__(hub, client, prepared.call, submission)
        self._prepared = prepared
        self._context = current.get()
        self.frames, self.include_usage, self.skips_empty = prepared.shape

    def usage(self, completion_tokens: int) -> bytes:
        """The frame with the usage of the whole request."""
        return _usage_frame(self._prepared, self.cached, self.prompt_tokens, completion_tokens)

    def failure(self) -> bytes:
        """The frame that vLLM sends for an exception in mid-stream."""
        # This runs in a callback of the event loop, where no request is the current one.
        token = current.set(self._context)
        try:
            return _failure_frame(self._prepared, self.error)
        finally:
            current.reset(token)


class Hub:
    """Tells all streams that got something in one step of the engine in one callback of the event loop."""

    def __init__(self) -> None:
        self._ready: list[TextStream] = []
        self._loop = asyncio.get_running_loop()

    def add(self, stream: TextStream) -> None:
        """Tell this stream soon."""
        if not self._ready:
            self._loop.call_soon(self._tell)
        self._ready.append(stream)

    def _tell(self) -> None:
        ready, self._ready = self._ready, []
        # A write wakes its reader. So that a reader on the same machine is woken once for many frames, and not between
        # the making of one and the next, all frames are made before the first one is written.
        _call_each(_call_each([stream.wake for stream in ready]))


def _call_each(calls: Iterable[Callable[[], T | None]]) -> list[T]:
    """What those that return something return; what one of them raises is logged and stops no other."""
    results = []
    for call in calls:
        try:
            result = call()
        except Exception:
            log.exception("a stream could not be written")
        else:
            if result is not None:
                results.append(result)
    return results


@dataclass
class _Prepared:
    """A request as vLLM's handler would have handed it to its generator of frames."""

    kind: Kind
    handler: Handler
    request_id: str
    model: str
    created: int
    call: Call
    shape: tuple[Frames, bool, bool]
    media: Mapping[str, int] | None = None


caught_calls: ContextVar[list[Call] | None] = ContextVar("caught", default=None)
"""Calls of the engine that the running request's handler has made while it was prepared."""


class _Catcher:
    """Stands for the engine while vLLM's handler prepares a request: keeps its calls instead of making them.

    All requests share one, so that what is kept belongs to the request's own context: whatever vLLM awaits between the
    call and the end of its handler, no request gets another one's prompt.
    """

    def __init__(self, client: AsyncLLM) -> None:
        self._client = client

    def generate(self, prompt: object, sampling_params: SamplingParams, request_id: str, **options: object) -> _Catcher:
        """Keep the call, in place of `AsyncLLM.generate`."""
        calls = caught_calls.get()
        if calls is None:
            raise RuntimeError("the engine was called outside of a request")
        calls.append(((prompt, sampling_params, request_id), options))
        return self

    def __getattr__(self, name: str) -> object:
        if name not in _READ_WHILE_PREPARING:
            # vLLM answers the request then.
            raise AttributeError(f"{name} is not known to be asked for by a handler that prepares a request")
        found: object = getattr(self._client, name)
        return found


class StreamHandler:
    """Begins streams. Made in the event loop, after the engine has started.

    Args:
        engine: the started engine.
    """

    def __init__(self, engine: VLLMEngine) -> None:
        self.hub = Hub()
        self.client = engine.client
        self._engine = engine
        self._templates: dict[tuple[Kind, bool, bool], Frames] = {}
        self._handlers: dict[Kind, Handler] = {}
        if _app_is_plain(engine):
            state = engine.app.state
            names: dict[Kind, str] = {"chat": "openai_serving_chat", "completion": "openai_serving_completion"}
            for kind, name in names.items():
                handler = getattr(state, name, None)
                if handler is not None and handler_is_plain(kind, handler):
                    self._handlers[kind] = self.without_last_step(kind, handler)

    def serves(self, kind: Kind) -> bool:
        """Whether streams of this kind can be answered here at all."""
        return kind in self._handlers

    async def begin(self, kind: Kind, body: dict[str, object], scope: Scope) -> OpenAIStream | None:
        """Validate and render a request, and hand it to the engine.

        Args:
            body: the parsed JSON.
            scope: of the HTTP request; its headers are read.

        Returns:
            None where vLLM's own handler has to answer: it would refuse the request, or answer in another way. The
            engine has not seen the request then.
        """
        from fastapi import Request

        request = validated(kind, body)
        if request is None:
            return None
        handler = self._handlers[kind]
        token = caught_calls.set([])
        try:
            if kind == "chat":
                made = await handler.create_chat_completion(request, Request(scope))
            else:
                made = await handler.create_completion(request, Request(scope))
        except Exception as error:
            log.debug("vLLM answers a request that could not be prepared: %r", error)
            return None
        finally:
            caught_calls.reset(token)
        if not isinstance(made, _Prepared):
            return None
        stream = OpenAIStream(self.hub, self.client, made, self._engine.submission)
        await stream.start()
        return stream

    async def begin_job(self, job: TextJob) -> TextStream:
        """The stream of one prompt with `n` of 1, for V2.

        Raises:
            RequestError: as `TextTasks.generate` before its first piece.
        """
        try:
            engine_input, params, priority, lora = await self._engine.text.prepare(job)
        except Exception as error:
            raise self.translate(error, job.request_id, started=False) from error
        options = {"lora_request": lora, "priority": priority, "trace_headers": job.trace_headers}
        stream = TextStream(
            self.hub, self.client, ((engine_input, params, job.request_id), options), self._engine.submission
        )
        await stream.start()
        return stream

    def translate(self, error: Exception | None, request_id: str, started: bool) -> RequestError:
        """What an exception of vLLM's becomes for a client; None stands for finish reason `error`."""
        return self._engine.text.translate(error, request_id, started)

    def without_last_step(self, kind: Kind, handler: Handler) -> Handler:
        """A copy of vLLM's handler that returns what it would have streamed from."""
        twin = copy.copy(with_plain_chats(handler, self._engine.short_prompts) if kind == "chat" else handler)
        twin.engine_client = _Catcher(self.client)

        def prepared(
            request: OpenAIRequest, request_id: str, model: str, created: int, media: Mapping[str, int] | None = None
        ) -> _Prepared | None:
            calls = caught_calls.get()
            if calls is None or len(calls) != 1:
                return None
            shape = self._shape(kind, handler, request, request_id, model, created)
            return _Prepared(kind, handler, request_id, model, created, calls[0], shape, media=media)

        def chat(
            request: ChatCompletionRequest,
            _: object,
            request_id: str,
            model: str,
            *__: object,
            mm_token_counts: Mapping[str, int] | None = None,
            **___: object,
        ) -> _Prepared | None:
            return prepared(request, request_id, model, int(time.time()), mm_token_counts)

        def completion(
            request: CompletionRequest, _: object, __: object, request_id: str, created: int, model: str, **___: object
        ) -> _Prepared | None:
            return prepared(request, request_id, model, created)

        if kind == "chat":
            twin.chat_completion_stream_generator = chat
        else:
            twin.completion_stream_generator = completion
        return twin

    def _shape(
        self, kind: Kind, handler: Handler, request: OpenAIRequest, request_id: str, model: str, created: int
    ) -> tuple[Frames, bool, bool]:
        from vllm.entrypoints.serve.utils.api_utils import should_include_usage

        include_usage, continuous = should_include_usage(request.stream_options, handler.enable_force_include_usage)
        key = kind, include_usage, continuous
        frames = self._templates.get(key)
        if frames is None:
            frames = self._templates[key] = write_frames(kind, handler, include_usage, continuous)
        filled = [
            (_mark(_ID), orjson.dumps(request_id)),
            (_mark(_MODEL), orjson.dumps(model)),
            (_mark(_CREATED), b"%d" % created),
        ]
        if kind == "chat":
            filled.append((_mark(_ROLE), orjson.dumps(handler.get_chat_request_role(request))))
        parts = [frames.first, frames.head, frames.tail, frames.last, frames.last_empty]
        for mark, value in filled:
            parts = [part.replace(mark, value) for part in parts]
        first, head, tail, last, last_empty = parts
        skips_empty = kind == "chat" and handler.parser_cls is not None
        ends = frames.ends_without_tokens
        return Frames(first, head, tail, last, last_empty, continuous, ends), include_usage, skips_empty


def _usage_frame(
    prepared: _Prepared, cached: tuple[int | None, int | None], prompt_tokens: int, completion_tokens: int
) -> bytes:
    """The frame that ends a stream with `include_usage`, written by vLLM's models."""
    from vllm.entrypoints.openai.chat_completion import serving
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionStreamResponse
    from vllm.entrypoints.openai.completion.protocol import CompletionStreamResponse
    from vllm.entrypoints.serve.engine.protocol import PromptTokenUsageInfo, UsageInfo

    handler = prepared.handler
    usage = UsageInfo(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
    )
    common = {
        "id": prepared.request_id,
        "created": prepared.created,
        "model": prepared.model,
        "choices": [],
        "usage": usage,
        "system_fingerprint": handler.system_fingerprint,
    }
    if prepared.kind == "chat":
        usage.prompt_tokens_details = serving._make_prompt_tokens_details(
            handler.enable_prompt_tokens_details, *cached, dict(prepared.media or {})
        )
        chunk = ChatCompletionStreamResponse(**common, object="chat.completion.chunk")
        return _event(chunk.model_dump_json(exclude_unset=True, exclude_none=True))
    if handler.enable_prompt_tokens_details and cached[0] is not None:
        usage.prompt_tokens_details = PromptTokenUsageInfo(cached_tokens=cached[0])
    return _event(CompletionStreamResponse(**common).model_dump_json(exclude_unset=False, exclude_none=True))


def _failure_frame(prepared: _Prepared, error: Exception | None) -> bytes:
    """The frame that vLLM's generators send for an exception; None stands for finish reason `error`."""
    from vllm.exceptions import GenerationError

    handler = prepared.handler
    if error is None:
        error = GenerationError("Internal server error")
    # From vLLM 0.33 on, errors of chats are no strings before they are frames.
    as_models = prepared.kind == "chat" and hasattr(handler, "chat_completion_stream_generator_raw")
    try:
        # vLLM hands over its text alone; what the fault was is looked up in the exception that is being handled.
        raise error
    except GenerationError as raised:
        if as_models:
            reply = handler.create_error_response(
                str(raised), err_type="InternalServerError", status_code=raised.status_code
            )
            return _event(reply.model_dump_json())
        return _event(handler._convert_generation_error_to_streaming_response(raised))
    except Exception as raised:
        _log_failure(prepared.request_id, raised)
        if as_models:
            return _event(handler.create_error_response(raised).model_dump_json())
        return _event(handler.create_streaming_error_response(raised))


def _log_failure(request_id: str, error: Exception) -> None:
    """Write what ended a stream to the log: as an error unless it is the client's, who is told of it."""
    context = current.get()
    if is_client_fault(error, taken_up=context is None or context.engine.sequences > 0):
        log.info("request %s was refused in mid-stream (%s)", request_id, type(error).__name__)
    else:
        log.error("request %s failed in mid-stream", request_id, exc_info=error)


def write_frames(kind: Kind, handler: Handler, include_usage: bool, continuous: bool) -> Frames:
    """Frames with marks in them, written once by vLLM's own models, so that fields and their order are vLLM's."""
    write = _chat_frames if kind == "chat" else _completion_frames
    frames = write(handler, include_usage, continuous)
    if include_usage:
        frames = tuple(map(with_null_usage, frames))
    first, delta, last, last_empty = map(_with_marks, frames)
    head, found, tail = delta.partition(_mark(_TEXT))
    assert found, "vLLM's frame holds no text"
    return Frames(first, head, tail, last, last_empty, continuous, _has_transfer_params(kind))


def _has_transfer_params(kind: Kind) -> bool:
    """Whether frames of answers have the fields that came with vLLM 0.33."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionStreamResponse
    from vllm.entrypoints.openai.completion.protocol import CompletionStreamResponse

    model = ChatCompletionStreamResponse if kind == "chat" else CompletionStreamResponse
    return "kv_transfer_params" in model.model_fields


def _chat_frames(handler: OpenAIServingChat, include_usage: bool, continuous: bool) -> tuple[bytes, ...]:
    from vllm.entrypoints.generate.base.protocol import DeltaMessage
    from vllm.entrypoints.openai.chat_completion.protocol import (
        ChatCompletionResponseStreamChoice,
        ChatCompletionStreamResponse,
    )
    from vllm.entrypoints.serve.engine.protocol import UsageInfo

    def frame(delta: DeltaMessage, choice: Mapping[str, object], chunk: Mapping[str, object], tokens: int) -> bytes:
        made = ChatCompletionStreamResponse(
            id=_ID,
            object="chat.completion.chunk",
            created=_CREATED,
            choices=[ChatCompletionResponseStreamChoice(index=0, delta=delta, logprobs=None, **choice)],
            model=_MODEL,
            **chunk,
        )
        if not include_usage and handler.system_fingerprint is not None and choice["finish_reason"] is not None:
            made.system_fingerprint = handler.system_fingerprint
        if continuous:
            made.usage = UsageInfo(
                prompt_tokens=_PROMPT,
                completion_tokens=tokens,
                total_tokens=_PROMPT if not tokens else _TOTAL,
                completion_tokens_details=None,
            )
        return _event(made.model_dump_json(exclude_unset=True))

    going = {"finish_reason": None, "token_ids": None}
    end = {"finish_reason": _FINISH, "stop_reason": _STOP, "token_ids": None}
    opening = {"prompt_token_ids": None, "prompt_text": None}
    transfer: dict[str, object] = {}
    if _has_transfer_params("chat"):
        transfer, end["weight_versions"] = {"kv_transfer_params": None}, None
    return (
        frame(DeltaMessage(role=_ROLE, content=""), {"finish_reason": None}, opening, 0),
        frame(DeltaMessage(content=_TEXT), going, transfer, _COMPLETION),
        frame(DeltaMessage(content=_TEXT), end, transfer, _COMPLETION),
        frame(DeltaMessage(), end, transfer, _COMPLETION),
    )


def _completion_frames(handler: OpenAIServingCompletion, include_usage: bool, continuous: bool) -> tuple[bytes, ...]:
    from vllm.entrypoints.openai.completion.protocol import CompletionResponseStreamChoice, CompletionStreamResponse
    from vllm.entrypoints.serve.engine.protocol import UsageInfo

    # Fields that came with vLLM 0.33.
    transfer = {"kv_transfer_params": None} if _has_transfer_params("completion") else {}
    versions = {"weight_versions": None} if transfer else {}

    def frame(finish_reason: str | None, stop_reason: str | None) -> bytes:
        choice = CompletionResponseStreamChoice(
            index=0,
            text=_TEXT,
            logprobs=None,
            finish_reason=finish_reason,
            stop_reason=stop_reason,
            prompt_token_ids=None,
            token_ids=None,
            **versions,
        )
        made = CompletionStreamResponse(
            id=_ID, object="text_completion", created=_CREATED, model=_MODEL, choices=[choice], **transfer
        )
        if not include_usage and handler.system_fingerprint is not None and finish_reason is not None:
            made.system_fingerprint = handler.system_fingerprint
        if continuous:
            made.usage = UsageInfo(prompt_tokens=_PROMPT, completion_tokens=_COMPLETION, total_tokens=_TOTAL)
        return _event(made.model_dump_json(exclude_unset=True))

    last = frame(_FINISH, _STOP)
    return b"", frame(None, None), last, last


def validated(kind: Kind, body: dict[str, object]) -> OpenAIRequest | None:
    """vLLM's model of a parsed body, or None where vLLM refuses it."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    try:
        return (ChatCompletionRequest if kind == "chat" else CompletionRequest).model_validate(body)
    except Exception as error:
        log.debug("vLLM refuses a body: %r", error)
        return None


async def headers(engine: VLLMEngine, content_type: str) -> list[tuple[bytes, bytes]]:
    """What vLLM's app puts at the head of an answer of this type, for a request without an `Origin`.

    Its middleware for browsers may add a header to those too, as its version and flags have it: so it is asked.
    """
    found: list[tuple[bytes, bytes]] = []

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", content_type.encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

    async def nothing() -> Message:
        return {"type": "http.disconnect"}

    async def note(message: Message) -> None:
        found.extend(message["headers"])

    app: ASGIApp = answer
    for each in reversed(engine.app.user_middleware):
        if is_for_browsers(each):
            app = each.cls(app, *each.args, **each.kwargs)
    await app({"type": "http", "method": "POST", "path": "/", "headers": []}, nothing, note)
    return found


def app_is_bare(engine: VLLMEngine) -> bool:
    """Whether nothing is switched on in vLLM's app that looks at requests or answers of its handlers."""
    from vllm import envs

    args = engine.app.state.args
    return not (
        args.middleware
        or args.api_key
        or envs.VLLM_API_KEY
        or envs.VLLM_DEBUG_LOG_API_SERVER_RESPONSE
        or getattr(engine.app.state, "enable_server_load_tracking", False)
    )


def _app_is_plain(engine: VLLMEngine) -> bool:
    """Whether nothing is switched on in vLLM that would do more to a stream than send it."""
    args, config = engine.app.state.args, engine.client.vllm_config
    return app_is_bare(engine) and not (
        float(getattr(args, "sse_keep_alive_interval", 0) or 0) > 0
        or config.kv_transfer_config is not None
        or config.speculative_config is not None
    )


def handler_is_plain(kind: str, handler: Handler) -> bool:
    """Whether a handler is vLLM's own, and no parser of it rewrites text where a request brings no tools."""
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
    from vllm.parser.abstract_parser import DelegatingParser

    # Completions have the switch from vLLM 0.33 on.
    if handler.enable_per_request_metrics or getattr(handler, "enable_log_outputs", False):
        return False
    if kind == "completion":
        return type(handler) is OpenAIServingCompletion
    if type(handler) is not OpenAIServingChat:
        return False
    parser = handler.parser_cls
    if parser is None:
        return True
    return (
        parser.__bases__ == (DelegatingParser,)
        and parser.reasoning_parser_cls is None
        and not handler._include_reasoning_tokens_details
        and not getattr(parser.tool_parser_cls, "engine_based_streaming", False)
    )


def _as_generate_raises(error: Exception) -> Exception:
    """What `AsyncLLM.generate` would raise where taking a request up raised `error`."""
    from vllm.exceptions import GenerationError, GracefulHTTPError, VLLMClientError
    from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

    if isinstance(error, (EngineDeadError, VLLMClientError, GracefulHTTPError, GenerationError, RequestError)):
        return error
    wrapped: Exception = EngineGenerateError()
    wrapped.__cause__ = error
    return wrapped


def _mark(placeholder: str | int) -> bytes:
    """Bytes that no JSON text holds, so that nothing of a request is ever taken for a mark."""
    return f"\x00{placeholder}\x00".encode()


def _with_marks(frame: bytes) -> bytes:
    placeholders: tuple[str | int, ...] = (*_WORDS, *_NUMBERS)
    for placeholder in placeholders:
        frame = frame.replace(orjson.dumps(placeholder), _mark(placeholder))
    return frame


def _event(json: str) -> bytes:
    return b"data: " + json.encode() + b"\n\n"
