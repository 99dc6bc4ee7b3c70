"""What stands between clients, vLLM's app and the engine: a client's fault is answered as one, and what would end the
engine does not reach it.

Written against vLLM 0.32.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import TYPE_CHECKING, Protocol

from kserve_vllm.core.coroutines import resume
from kserve_vllm.core.errors import RequestError, anthropic_error, is_anthropic_path, openai_code, shortened
from kserve_vllm.core.request_context import RequestContext, current
from kserve_vllm.engine.engine_request import EngineRequest
from kserve_vllm.engine.faults import (
    NO_TEXT,
    UNSENDABLE,
    field_at_fault,
    sentence_of_client_fault,
    sentence_of_wrong_data,
    speaks_python,
    unsendable,
)
from kserve_vllm.engine.hooks.costs import check_costs
from kserve_vllm.engine.hooks.transfers import check_transfers
from kserve_vllm.engine.hooks.validation_messages import plain_words, sentence_of_a_part, sentence_of_validation

if TYPE_CHECKING:
    from fastapi import FastAPI
    from vllm.entrypoints.pooling.base.serving import PoolingBaseServing
    from vllm.entrypoints.serve.engine.protocol import ErrorResponse
    from vllm.entrypoints.serve.engine.serving import BaseServing
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.output_processor import RequestOutputCollector

log = logging.getLogger(__name__)

_NO_FAULT = (HTTPStatus.NOT_IMPLEMENTED, HTTPStatus.SERVICE_UNAVAILABLE)


def guard_engine(client: AsyncLLM, transfers: bool = False) -> None:
    """Refuse, in front of the engine, what would end it, hold up all others, or can't be sent to it.

    On a CPU, prompt log probabilities of a model with adapters take the logits of every prompt token through a mapping
    that has one row per sequence; the worker dies of it as soon as two sequences run, and with it every request.

    The engine is another process: a number beyond 64 bits or a text that is no Unicode can't be sent. vLLM has the
    request on its books by then and would keep it there for ever.

    Args:
        client: of vLLM.
        transfers: whether clients may say where caches are; see `transfers`.
    """
    from vllm.exceptions import VLLMValidationError
    from vllm.platforms import current_platform
    from vllm.sampling_params import SamplingParams

    processor, core = client.input_processor, client.engine_core
    validate, send = processor._validate_params, core.add_request_async
    no_prompt_logprobs = client.vllm_config.lora_config is not None and current_platform.is_cpu()

    def validate_params(params: object, supported_tasks: tuple[str, ...]) -> object:
        if isinstance(params, SamplingParams):
            try:
                check_costs(params)
                if params.extra_args:
                    check_transfers(params.extra_args, transfers)
            except RequestError as error:
                if (context := current.get()) is not None:
                    # A stream's answer may have begun for vLLM, and not for the client.
                    context.refusal = error
                raise VLLMValidationError(error.message, parameter=error.field) from error
        if no_prompt_logprobs and getattr(params, "prompt_logprobs", None) is not None:
            raise VLLMValidationError(
                "prompt_logprobs (and echo with logprobs) can't be had on a CPU together with adapters",
                parameter="prompt_logprobs",
            )
        return validate(params, supported_tasks)

    async def add_request(request: EngineRequest) -> None:
        field = banning(request.sampling_params) if request.sampling_params is not None else None
        if field is not None:
            client.output_processor.abort_requests([request.request_id], internal=True)
            raise VLLMValidationError(f"{field} leaves no token to choose from", parameter=field)
        try:
            await send(request)
        except UNSENDABLE as error:
            name = unsendable(request, core.encoder.encode)
            if name is None:
                raise
            client.output_processor.abort_requests([request.request_id], internal=True)
            raise VLLMValidationError(f"{name} can't be used: {error}", parameter=name) from error

    processor._validate_params, core.add_request_async = validate_params, add_request
    if client.vllm_config.structured_outputs_config.backend == "auto":
        leave_out_outlines()
    take_up_whole(client)


def leave_out_outlines() -> None:
    """Refuse a schema which neither of the backends takes that are chosen by request.

    vLLM goes on to a third one, outlines, whose expressions grow with the square of a schema's properties, and are read
    on the event loop. The engine has one backend, that of its first request: from then on it would refuse every other's
    `json_object` and grammar.
    """
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.structured_output import backend_outlines

    def refuse(params: SamplingParams) -> None:
        raise VLLMValidationError(
            "structured_outputs: this schema has parts that are not understood, such as patternProperties beside "
            "properties (--structured-outputs-config with the backend outlines may take it)",
            parameter="structured_outputs",
        )

    backend_outlines.validate_structured_output_request_outlines = refuse


def take_up_whole(client: AsyncLLM) -> None:
    """Never leave a request half taken up: who is cancelled in the middle of that has no name yet to abort it by, and
    the engine would generate for nobody.

    What was begun goes on to its end in a task of its own then, and is aborted.

    Args:
        client: vLLM's `AsyncLLM`; its `add_request` is replaced.
    """
    add = client.add_request
    aborting: set[asyncio.Task[None]] = set()

    def give_back(task: asyncio.Task[RequestOutputCollector]) -> None:
        if task.cancelled() or task.exception() is not None:
            return
        abort = asyncio.get_running_loop().create_task(client.abort(task.result().request_id, internal=True))
        aborting.add(abort)
        abort.add_done_callback(aborting.discard)

    async def add_whole(*args: object, **kwargs: object) -> RequestOutputCollector:
        begun = add(*args, **kwargs).__await__()
        try:
            # Mostly it does not wait for anything, and needs no task.
            waits_for = next(begun)
        except StopIteration as done:
            return done.value
        task: asyncio.Task[RequestOutputCollector] = asyncio.get_running_loop().create_task(resume(begun, waits_for))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(give_back)
            raise

    client.add_request = add_whole


def banning(params: SamplingParams) -> str | None:
    """The field that bans every token which `allowed_token_ids` allows, so that the choice would be any; or None.

    Args:
        params: after vLLM's input processor has added token ids to it.
    """
    allowed = params.allowed_token_ids
    if not allowed:
        return None
    left = set(allowed) - {word[0] for word in params.bad_words_token_ids or () if len(word) == 1}
    if not left:
        return "bad_words"
    if params.min_tokens and not left - set(params.all_stop_token_ids):
        return "min_tokens"
    return None


class _AsksForModel(Protocol):
    """A request as vLLM's handlers have it."""

    model: str | None


class Permits(Protocol):
    """Says which models a request may use, and may know of."""

    def permit(self, context: RequestContext, adapter: str | None, asked: str | None = None) -> None:
        """Let a request use the base model (None, or one of its names) or an adapter, or raise a `RequestError`."""

    def knows_base(self, context: RequestContext) -> bool:
        """Whether the caller of a request may know the names of the base model."""


def check_models(permits: Permits, plain: Callable[[str], str], named: Callable[[str], str]) -> None:
    """Ask `permits` wherever vLLM looks whether a model is there: that is the first thing that its handlers do, also
    those that ask nothing of the engine, as for tokens and their number.

    Who may not use a name is told the same whether there is such a model or not.

    Args:
        permits: is asked.
        plain: tells the name of an adapter for its name in the engine.
        named: tells the name that lists have for one that a client has asked for, whether it is there or not.
    """
    from vllm.entrypoints.pooling.base.serving import PoolingBaseServing
    from vllm.entrypoints.serve.engine.serving import BaseServing

    def limited(
        original: Callable[[BaseServing | PoolingBaseServing, _AsksForModel], Awaitable[ErrorResponse | None]],
    ) -> Callable[[BaseServing | PoolingBaseServing, _AsksForModel], Awaitable[ErrorResponse | None]]:
        async def check_model(self: BaseServing | PoolingBaseServing, request: _AsksForModel) -> ErrorResponse | None:
            found = await original(self, request)
            context = current.get()
            if context is None:
                return found
            lora = getattr(self.models, "lora_requests", {}).get(request.model)
            adapter = plain(lora.lora_name) if lora is not None else named(request.model) if request.model else None
            try:
                permits.permit(context, adapter, request.model or None)
            except RequestError as error:
                context.refusal = error
                raise
            if found is not None and not permits.knows_base(context) and hasattr(found, "error"):
                # vLLM's sentence goes on with the names that there are.
                found.error.message = f"The model `{request.model}` does not exist."
            return found

        return check_model

    for cls in (BaseServing, PoolingBaseServing):
        cls._check_model = limited(cls._check_model)  # type: ignore[method-assign,attr-defined]


def check_before_stream(app: FastAPI, client: AsyncLLM, tasks: tuple[str, ...]) -> None:
    """Check a streamed response's parameters before its first event; vLLM does after it, and tears the stream."""
    responses = getattr(app.state, "openai_serving_responses", None)
    if responses is None:
        return
    processor = client.input_processor
    generate = responses._generate_with_builtin_tools

    def checked(*args: object, **kwargs: object) -> object:
        processor._validate_params(kwargs["sampling_params"], tasks)
        return generate(*args, **kwargs)

    responses._generate_with_builtin_tools = checked


def answer_errors(app: FastAPI, client: AsyncLLM) -> None:
    """Have vLLM's app answer 400 to what is the client's fault, and log the trace of every 500.

    All of vLLM's ways to an error go through one function, whether an exception reaches its handlers or is caught by
    what serves a route. Its handler for a failed engine wants vLLM's own HTTP server, which is not there.
    """
    from fastapi import HTTPException, Request, Response
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from pydantic import ValidationError
    from vllm.entrypoints.anthropic import api_router as anthropic
    from vllm.entrypoints.serve.exception_handling import error_response
    from vllm.exceptions import (
        GenerationError,
        RetryableRequestError,
        VLLMClientError,
        VLLMError,
        VLLMValidationError,
    )
    from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

    original = error_response.create_error_response
    shape = _with_words_for_codes()

    def shaped(message: str | Exception, *args: object, **kwargs: object) -> ErrorResponse:
        reply = original(message, *args, **kwargs)
        # Before anything looks through it: it may repeat all that a client has written.
        reply.error.message = shortened(reply.error.message)
        if isinstance(message, VLLMValidationError):
            # Its text repeats the field and the value as Python writes them.
            reply.error.message = error_response.sanitize_message(shortened(str(message.args[0])))
        if "\n" in reply.error.message:
            # Some parsers of grammars draw the place of the fault below it.
            reply.error.message = " ".join(reply.error.message.split())
        if reply.error.code == HTTPStatus.BAD_REQUEST:
            reply.error.message = plain_words(reply.error.message)
        return shape(reply)

    def in_words(message: str | Exception) -> VLLMValidationError | None:
        """An error for the client in its own words, where a handler would tell pydantic's or Python's; else None."""
        # Some handlers hand over no more than a text, from within `except`.
        error = message if isinstance(message, Exception) else sys.exc_info()[1]
        if error is None or (isinstance(message, str) and str(error) not in message):
            return None
        if isinstance(error, ValidationError):
            sentence, field = sentence_of_a_part(error.errors(), field_at_fault(error))
            return VLLMValidationError(sentence, parameter=field)
        if isinstance(error, TypeError) and speaks_python(error):
            sentence, field = sentence_of_wrong_data(error)
            return VLLMValidationError(sentence, parameter=field)
        return None

    # With a connector, a sequence may also fail since its cache did not arrive.
    grammar_alone = client.vllm_config.kv_transfer_config is None

    def explain(error: Exception) -> VLLMClientError | Exception:
        """What a client is told of that is its own fault; else the error as it is."""
        late = isinstance(error, RuntimeError) and "response already started" in str(error)
        if (late or isinstance(error, EngineGenerateError)) and isinstance(error.__cause__, Exception):
            return explain(error.__cause__)
        if isinstance(error, EngineDeadError):
            return error
        if isinstance(error, RequestError) and error.http_status < HTTPStatus.INTERNAL_SERVER_ERROR:
            # Refused at the engine; the middleware answers with the error itself.
            return VLLMValidationError(error.message, parameter=error.field)
        context = current.get()
        if isinstance(error, GenerationError) and not isinstance(error, RetryableRequestError):
            if context is not None and context.engine.stuck and grammar_alone:
                return VLLMValidationError(NO_TEXT, parameter="structured_outputs")
        elif not isinstance(error, VLLMError):
            fault = sentence_of_client_fault(error, taken_up=context is None or context.engine.sequences > 0)
            if fault is not None:
                return VLLMValidationError(fault[0], parameter=fault[1])
        return error

    def create_error_response(message: str | Exception, *args: object, **kwargs: object) -> ErrorResponse:
        if isinstance(message, EngineDeadError):
            return shaped(
                "The engine died; the request was not completed.",
                "ServiceUnavailableError",
                HTTPStatus.SERVICE_UNAVAILABLE,
            )
        reply = shaped(message, *args, **kwargs)
        if reply.error.code == HTTPStatus.BAD_REQUEST and (told := in_words(message)) is not None:
            return shaped(told)
        if reply.error.code < HTTPStatus.INTERNAL_SERVER_ERROR or reply.error.code in _NO_FAULT:
            return reply
        # Some handlers hand over no more than a text, from within `except`.
        error = message if isinstance(message, Exception) else sys.exc_info()[1]
        if isinstance(error, Exception):
            explained = explain(error)
            if isinstance(explained, (VLLMClientError, EngineDeadError)):
                return create_error_response(explained)
        context = current.get()
        log.error(
            "request %s failed in vLLM: %s",
            context.request_id if context is not None else "none",
            message,
            exc_info=error,
        )
        return reply

    for module in [module for name, module in sys.modules.items() if name.startswith("vllm.")]:
        if vars(module).get("create_error_response") is original:
            vars(module)["create_error_response"] = create_error_response

    def to_anthropic(reply: ErrorResponse) -> Response:
        return JSONResponse(anthropic_error(reply.error.code, reply.error.message), reply.error.code)

    anthropic.translate_error_response = to_anthropic

    async def answer(request: Request, error: Exception) -> Response:
        reply = create_error_response(error)
        if is_anthropic_path(request.url.path):
            return to_anthropic(reply)
        return JSONResponse(reply.model_dump(), status_code=reply.error.code)

    async def answer_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        phrase = HTTPStatus(error.status_code).phrase.replace(" ", "").removesuffix("Error")
        reply = shaped(str(error.detail), f"{phrase}Error", HTTPStatus(error.status_code))
        return JSONResponse(reply.model_dump(), status_code=error.status_code, headers=error.headers)

    async def answer_invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        sentence, field = sentence_of_validation(error.errors(), error.body)
        return await answer(request, VLLMValidationError(sentence, parameter=field))

    app.add_exception_handler(RequestValidationError, answer_invalid)
    app.add_exception_handler(HTTPException, answer_http)
    for kind in (VLLMError, ValueError, TypeError, OverflowError, NotImplementedError, Exception):
        app.add_exception_handler(kind, answer)


def _with_words_for_codes() -> Callable[[ErrorResponse], ErrorResponse]:
    """Makes vLLM's error replies be written with a word, or null, for `error.code`, which is the status in vLLM's.

    OpenAI's clients have it as a text. vLLM's own code goes on reading the status from the reply.
    """
    from pydantic import SerializerFunctionWrapHandler, model_serializer
    from vllm.entrypoints.serve.engine.protocol import ErrorInfo, ErrorResponse

    class Info(ErrorInfo):  # type: ignore[misc]
        @model_serializer(mode="wrap")
        def _write(self, write: SerializerFunctionWrapHandler) -> dict[str, object]:
            tree: dict[str, object] = write(self)
            return {**tree, "code": openai_code(self.code, self.param, self.message)}

    class Reply(ErrorResponse):  # type: ignore[misc]
        error: Info

    def shape(reply: ErrorResponse) -> ErrorResponse:
        info = reply.error
        return Reply(error=Info(message=info.message, type=info.type, param=info.param, code=info.code))

    return shape
