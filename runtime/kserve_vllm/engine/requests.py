"""Requests of V1, V2 and generate as vLLM's own request types, and vLLM's refusals as ours.

Written against vLLM 0.32 and 0.33; `compat` holds the table of what is leant on.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING, TypeVar

from kserve_vllm.core.errors import (
    EngineGone,
    InternalError,
    InvalidRequest,
    NotFound,
    QueueFull,
    RequestError,
    Unavailable,
)
from kserve_vllm.core.request_context import current
from kserve_vllm.engine.faults import NO_TEXT, is_template_error, sentence_of_client_fault
from kserve_vllm.engine.hooks.validation_messages import sentence_of_validation

if TYPE_CHECKING:
    from pydantic import BaseModel
    from vllm.logprobs import Logprob

log = logging.getLogger(__name__)
M = TypeVar("M", bound="BaseModel")

# What a V1, V2 or generate request may set: OpenAI's and vLLM's names, as CompletionRequest takes them.
SAMPLING_OPTIONS = frozenset(
    "frequency_penalty logit_bias logprobs max_tokens min_tokens n presence_penalty seed stop temperature top_p top_k "
    "min_p repetition_penalty stop_token_ids include_stop_str_in_output ignore_eos skip_special_tokens "
    "spaces_between_special_tokens truncate_prompt_tokens allowed_token_ids bad_words add_special_tokens "
    "response_format structured_outputs priority cache_salt user length_penalty".split()
)


def translate(
    error: Exception | None, request_id: str, started: bool, errored: bool, grammar_alone: bool
) -> RequestError:
    """What an exception of vLLM's becomes for a client.

    Args:
        error: the exception; None where a sequence has ended with the reason `error`.
        request_id: for the log, where it is a fault of the server.
        started: whether anything was generated before it.
        errored: whether the engine has said that it is dead.
        grammar_alone: whether the engine gives up no sequence but for its grammar.
    """
    from pydantic import ValidationError
    from vllm.exceptions import (
        GenerationError,
        GracefulHTTPError,
        RetryableRequestError,
        VLLMClientError,
        VLLMNotFoundError,
    )
    from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

    if error is None:
        error = GenerationError("the engine gave the sequence up")
    if isinstance(error, EngineGenerateError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    if isinstance(error, RequestError):
        return error
    if isinstance(error, EngineDeadError) or errored:
        return EngineGone("The engine died; the request was not completed.", retry_after_s=5)
    if isinstance(error, VLLMNotFoundError):
        return NotFound(str(error), field="model")
    if isinstance(error, VLLMClientError):  # its text would name the field and the value once more
        return InvalidRequest(str(error.args[0] if error.args else error), field=getattr(error, "parameter", None))
    if isinstance(error, GracefulHTTPError):
        return QueueFull(str(error), retry_after_s=1)
    if isinstance(error, RetryableRequestError):
        return Unavailable(str(error), retry_after_s=1)
    context = current.get()
    if isinstance(error, GenerationError) and grammar_alone and context is not None and context.engine.stuck:
        return InvalidRequest(NO_TEXT, field="structured_outputs")
    if isinstance(error, ValidationError):
        sentence, field = sentence_of_validation(error.errors(include_url=False), None)
        return InvalidRequest(sentence, field=field)
    # Before anything was generated, vLLM raises these for what is wrong with a request.
    plain = (ValueError, TypeError, OverflowError, NotImplementedError)
    if not started and (isinstance(error, plain) or is_template_error(error)):
        return InvalidRequest(str(error))
    # What trips over a value of another shape than it reads: a number where a table belongs.
    if (fault := sentence_of_client_fault(error, taken_up=started)) is not None:
        return InvalidRequest(fault[0], field=fault[1])
    log.error("request %s failed", request_id, exc_info=error)
    return InternalError(request_id)


def validated(model: type[M], tree: dict[str, object]) -> M:
    """vLLM's model of a request.

    Raises:
        InvalidRequest: a sentence that names the field.
    """
    from pydantic import ValidationError

    try:
        return model.model_validate(tree)
    except ValidationError as error:
        sentence, field = sentence_of_validation(error.errors(include_url=False), tree)
        raise InvalidRequest(sentence, field=field) from None


def reject_unknown_options(options: Mapping[str, object], known: set[str] | frozenset[str] = SAMPLING_OPTIONS) -> None:
    """Refuse an option that vLLM would drop.

    Raises:
        InvalidRequest: a sentence with the nearest name.
    """
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise InvalidRequest(f"unknown parameter {name!r}{hint}", field=name)


def raise_error_response(result: object) -> None:
    """Raise what vLLM returns as an ErrorResponse value."""
    from vllm.entrypoints.serve.engine.protocol import ErrorResponse

    if not isinstance(result, ErrorResponse):
        return
    info = result.error
    if info.code == HTTPStatus.NOT_FOUND:
        raise NotFound(info.message, field=info.param)
    if info.code >= HTTPStatus.INTERNAL_SERVER_ERROR:
        raise Unavailable(info.message, retry_after_s=1)
    raise InvalidRequest(info.message, field=info.param)


# Written for a token that can't be had: JSON has no infinity. vLLM's OpenAI routes write the same.
_LEAST_LOGPROB = -9999.0


def plain_logprobs(logprobs: Sequence[Mapping[int, Logprob]]) -> list[dict[str, dict[str, object]]]:
    """vLLM's logprobs as JSON-ready values, in the shape of Triton's vLLM backend."""
    return [
        {
            str(token): {
                "logprob": max(entry.logprob, _LEAST_LOGPROB),
                "rank": entry.rank,
                "decoded_token": entry.decoded_token,
            }
            for token, entry in position.items()
        }
        for position in logprobs
    ]
