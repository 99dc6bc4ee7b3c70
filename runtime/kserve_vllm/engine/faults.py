"""Whose fault an exception is that vLLM raised for a request, as far as that can be told.

vLLM's own handlers answer 500 to every exception that they did not foresee, and leave no trace of it. Most of those are
requests with a wrong shape: vLLM reads many parts of a request as untyped trees, and trips over a number where a table
belongs. That is the client's fault where two things hold: the exception is of a kind that wrong data raises, and it
was raised by code that does nothing but read a request. Whatever else is raised stays a fault of the server.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from types import FrameType

from kserve_vllm.core.errors import RequestError
from kserve_vllm.core.request_context import current
from kserve_vllm.engine.engine_request import EngineRequest

# What Python raises for data of another shape, type or size than was expected.
_OF_WRONG_DATA = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    RecursionError,
    NotImplementedError,
)
# These turn a request into what the engine takes, and are used for nothing else.
_READS_REQUESTS = (
    "vllm.renderers.",
    "vllm.inputs.",
    "vllm.sampling_params",
    "vllm.pooling_params",
    "vllm.multimodal.",
    "vllm.v1.engine.input_processor",
    "vllm.v1.structured_output.",
)
_FETCHES = "vllm.connections"
NO_TEXT = (
    "structured_outputs, response_format or a tool's parameters: no text can satisfy the grammar, "
    "or none that bad_words, allowed_token_ids, min_tokens and logit_bias leave"
)
"""What a client is told whose sequence the engine has given up for its grammar."""
_NO_FILES = "Cannot load local files"
_PYTHON = re.compile(
    r"object (is|of|has|does)\b|\bNoneType\b|unhashable|subscriptable|indices must be|operand|not supported between"
    r"|argument|expected (str|bytes|int)|int too large|must be (str|real number)|sequence item"
    r"|Numerical result out of range|math (domain|range) error"
)
_MOST_VALUES = 64
"""Elements of a list or an object that is looked at once more, to say what is wrong with it."""
# These define requests and answers: they read a request as long as the engine has taken up nothing.
_READS_BOTH = (".protocol", ".utils", ".types")


def sentence_of_client_fault(error: BaseException, taken_up: bool) -> tuple[str, str | None] | None:
    """What to tell the client, with the field at fault where it is known; None where the client is not at fault.

    Args:
        error: an exception that vLLM has no answer of its own for.
        taken_up: whether the engine has taken up any part of the request.
    """
    if isinstance(error, RuntimeError) and str(error).startswith(_NO_FILES):
        return "files of the server are not read: send the medium itself, as a data URL", None
    modules = [str(frame.f_globals.get("__name__", "")) for frame in _frames(error)]
    if _FETCHES in modules and _is_of_fetching(error):
        return "a medium can't be fetched from the URL that the request names", None
    if not isinstance(error, _OF_WRONG_DATA) and not is_template_error(error):
        return None
    reading = any(f"{name}.".startswith(_READS_REQUESTS) or name.startswith(_READS_REQUESTS) for name in modules)
    if not taken_up:
        reading |= any(name.startswith("vllm.entrypoints.") and name.endswith(_READS_BOTH) for name in modules)
    if not reading:
        return None
    return sentence_of_wrong_data(error)


def sentence_of_wrong_data(error: BaseException) -> tuple[str, str | None]:
    """What to tell a client of an exception that its data raised, and the field at fault where it is known.

    What Python says by itself of an operation that failed tells a client nothing and is left out.
    """
    misfit = _misfit(error)
    if misfit is not None:
        return misfit
    field = field_at_fault(error)
    what = f"{field} has the wrong form" if field else "a part of the request has the wrong form"
    if is_template_error(error):
        what = "the chat template can't be applied"
    text = str(error).splitlines()[0] if str(error) else ""
    return (what if not text or speaks_python(error) else f"{what}: {text}"), field


def speaks_python(error: BaseException) -> bool:
    """Whether an exception's text is the interpreter's, about its own objects, and was not written for a reader."""
    if isinstance(error, (LookupError, AttributeError, AssertionError)):
        return True
    return isinstance(error, (TypeError, ArithmeticError)) and _PYTHON.search(str(error)) is not None


def is_client_fault(error: BaseException | None, taken_up: bool) -> bool:
    """Whether an exception is answered with 4xx, so that nobody who runs the server has to hear of it.

    Args:
        error: what vLLM raised for a request.
        taken_up: whether the engine has taken up any part of the request.
    """
    if error is None:
        return False
    names = {cls.__name__ for cls in type(error).__mro__}
    if isinstance(error, RequestError):
        return error.http_status < 500
    if "EngineGenerateError" in names and error.__cause__ is not None:
        return is_client_fault(error.__cause__, taken_up)
    if "VLLMClientError" in names or "RequestValidationError" in names:
        return True
    if "VLLMError" in names:
        return False
    plain = isinstance(error, (ValueError, TypeError, OverflowError, NotImplementedError)) and not taken_up
    return plain or is_template_error(error) or sentence_of_client_fault(error, taken_up) is not None


class ClientFaults(logging.Filter):
    """Writes at level info, and without a trace, what vLLM's routes call an error though it is a client's mistake.

    It is answered to that client; at level error, any client could set off an operator's alert.
    """

    _SPOKEN = (
        "Error with model ",
        "Failed to advance FSM",
        "Unexpected: grammar rejected tokens",
        "Error in chat_completion_full_generator - cannot determine",
    )
    """Begin such lines that come without an exception."""
    _READ_ANSWERS = ("vllm.tool_parsers.", "vllm.reasoning.", "vllm.parser.")
    """Loggers of what reads a model's text, which `max_tokens` may cut off anywhere, and which a client can have
    written in any form; it is answered as it is then. What they say outside of a request, and what no text can bring
    about, such as a parser that lacks a module or a method, is for who runs the server."""
    _COMPILES = "Failed to compile grammar for request"
    """Begins a line of the engine's process about a grammar that it can't use; its request is refused."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Lets every line through."""
        if record.levelno < logging.ERROR or not record.name.startswith("vllm."):
            return True
        context = current.get()
        error = record.exc_info[1] if record.exc_info else None
        if record.name.startswith(self._READ_ANSWERS):
            fault = context is not None and (error is None or self._comes_of_text(error))
        elif str(record.msg).startswith(self._COMPILES):
            fault = not isinstance(error, (ImportError, OSError, MemoryError))
        elif error is not None:
            fault = is_client_fault(error, taken_up=context is None or context.engine.sequences > 0)
        else:
            fault = str(record.msg).startswith(self._SPOKEN) or (context is not None and context.engine.stuck)
        if fault:
            record.levelno, record.levelname = logging.INFO, "INFO"
            if error is not None:
                record.msg, record.args = f"{record.getMessage().splitlines()[0]} ({type(error).__name__})", ()
            record.exc_info = record.exc_text = None
        return True

    def _comes_of_text(self, error: BaseException) -> bool:
        """Whether text of another form than a parser reads can raise this."""
        if isinstance(error, NotImplementedError):
            return False
        own = f"{type(error).__module__}.".startswith(self._READ_ANSWERS)
        return own or isinstance(error, (*_OF_WRONG_DATA, SyntaxError, TimeoutError))


def _is_of_fetching(error: BaseException) -> bool:
    """Whether another server did not answer, or not as it should; aiohttp is not imported for it."""
    return isinstance(error, OSError) or any(cls.__module__.startswith("aiohttp.") for cls in type(error).__mro__)


def is_template_error(error: BaseException) -> bool:
    """Whether a chat template raised this; jinja2 is not imported for it."""
    return any(cls.__name__ == "TemplateError" for cls in type(error).__mro__)


def unsendable(request: EngineRequest, encode: Callable[[object], object]) -> str | None:
    """The field of a request to the engine that can't be encoded for its process, or None if there is none.

    Args:
        request: to the engine.
        encode: encodes any value as it is sent.
    """
    for part in (request.sampling_params, request.pooling_params, request):
        for name in getattr(part, "__struct_fields__", ()):
            if name in ("sampling_params", "pooling_params"):
                continue
            try:
                encode(getattr(part, name))
            except UNSENDABLE:
                return str(name).lstrip("_")
    return None


UNSENDABLE = (UnicodeError, OverflowError, TypeError, RecursionError)
"""What encoding raises for a value that can't be sent."""


def _frames(error: BaseException) -> Iterator[FrameType]:
    trace = error.__traceback__
    while trace is not None:
        yield trace.tb_frame
        trace = trace.tb_next


def _misfit(error: BaseException) -> tuple[str, str | None] | None:
    """The sentence about a field that its own type refuses, where a model's check tripped over it before that."""
    from pydantic import BaseModel, PydanticUserError, TypeAdapter, ValidationError

    from kserve_vllm.engine.hooks.validation_messages import sentence_of_validation

    for frame in reversed(list(_frames(error))):
        model, data = frame.f_locals.get("cls"), frame.f_locals.get("data")
        if not (isinstance(model, type) and issubclass(model, BaseModel) and isinstance(data, dict)):
            continue
        for name, value in data.items():
            field = model.model_fields.get(name)
            if (
                field is None
                or field.annotation is None
                or (isinstance(value, (list, dict)) and len(value) > _MOST_VALUES)
            ):
                continue
            try:
                TypeAdapter(field.annotation).validate_python(value)
            except ValidationError as refused:
                found = [{**each, "loc": (name, *each["loc"])} for each in refused.errors()]
                return sentence_of_validation(found, data)  # type: ignore[arg-type]
            except (PydanticUserError, *_OF_WRONG_DATA):
                continue
    return None


def field_at_fault(error: BaseException) -> str | None:
    """The top-level field of the request that was being read, where the trace shows it."""
    frames = list(_frames(error))
    fields: dict[str, object] = {}
    for frame in frames:
        data, request = frame.f_locals.get("data"), frame.f_locals.get("request")
        if isinstance(data, dict):
            fields |= data
        elif hasattr(type(request), "model_fields"):
            fields |= vars(request)
    culprit = getattr(error, "obj", None)
    if culprit is not None:
        for name, value in fields.items():
            if value is culprit:
                return str(name)
    for frame in reversed(frames):
        for name, value in fields.items():
            if isinstance(value, (list, dict)) and value and any(value is other for other in frame.f_locals.values()):
                return str(name)
    return None
