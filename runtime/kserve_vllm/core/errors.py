"""Every error that the runtime raises on purpose, and what it becomes on the wire.

    KServeVLLMError
    ├── ConfigError            a flag, variable or file that can't be used; ends the start with code 2
    └── RequestError           answered to a client
        ├── InvalidRequest     400  INVALID_ARGUMENT    names the field that is wrong
        ├── Refused            400  INVALID_ARGUMENT    the moderation does not let a text pass
        ├── Unauthenticated    401  UNAUTHENTICATED
        ├── Forbidden          403  PERMISSION_DENIED
        ├── NotFound           404  NOT_FOUND
        ├── MethodNotAllowed   405  UNIMPLEMENTED
        ├── BodyTimeout        408  DEADLINE_EXCEEDED
        ├── BodyTooLarge       413  RESOURCE_EXHAUSTED
        ├── UnsupportedMedia   415  INVALID_ARGUMENT    the body is of a type that is not read here
        ├── UnsupportedCoding  415  INVALID_ARGUMENT    the body is compressed in a way that is not inflated
        ├── RateLimited        429  RESOURCE_EXHAUSTED  over a limit, or no room in the queue
        ├── Unavailable        503  UNAVAILABLE         loading, draining, unloaded, overloaded
        │   ├── DeadlinePassed 503  UNAVAILABLE         the client's own timeout ran out (V2's `timeout`)
        │   ├── QueueTimeout   503  UNAVAILABLE         waited too long in front of the engine
        │   ├── QueueFull      503  UNAVAILABLE         the engine's queue is at its bound
        │   └── EngineGone     503  UNAVAILABLE         the engine died or hangs
        └── InternalError      500  INTERNAL            a request id and nothing else

Each class carries its HTTP status, its gRPC status name and its OpenAI error type, so that the mapping exists once.
"""

from __future__ import annotations

from collections.abc import Sequence

OPENAI_ALIAS = "/openai"
MODEL_NOT_FOUND = "model_not_found"
MAX_MESSAGE = 1_000
"""Characters of a message: what a client wrote, and is told of, may have any length."""


def shortened(message: str) -> str:
    """A message as it may be logged, looked through and sent."""
    return message if len(message) <= MAX_MESSAGE else f"{message[:MAX_MESSAGE]}..."


class KServeVLLMError(Exception):
    """Base of all errors raised by this package."""


class ConfigError(KServeVLLMError):
    """A setting can't be used. The message says which one, where it came from and what to do."""


class RequestError(KServeVLLMError):
    """An error that is answered to a client.

    Attributes:
        http_status: status code over HTTP.
        grpc_status: name of the `grpc.StatusCode`.
        openai_type: `error.type` in OpenAI's error body.
        openai_code: `error.code` there: a word, or None where OpenAI has none for it.
        field: the request field at fault, or None.
        retry_after_s: seconds after which a retry makes sense, or None.
        close: whether the connection should be closed after the answer.
        reason: one word for programs that says why the request was turned away, or None.
    """

    http_status: int = 500
    grpc_status: str = "INTERNAL"
    openai_type: str = "InternalServerError"
    openai_code: str | None = None

    def __init__(
        self,
        message: str,
        *,
        field: str | None = None,
        retry_after_s: int | None = None,
        close: bool = False,
        reason: str | None = None,
    ) -> None:
        # Half of a surrogate pair, which JSON may bring, has no UTF-8: it could not be answered over any protocol.
        message = shortened(message).encode("utf-8", "replace").decode()
        super().__init__(message)
        self.message = message
        self.field = field if field is None else shortened(field).encode("utf-8", "replace").decode()
        self.retry_after_s = retry_after_s
        self.close = close
        self.reason = reason


class InvalidRequest(RequestError):
    """The request can't be understood or can't be served as it is."""

    http_status = 400
    grpc_status = "INVALID_ARGUMENT"
    openai_type = "BadRequestError"


class Refused(RequestError):
    """A text that the moderation does not let pass. The message names the rule, never the text."""

    http_status = 400
    grpc_status = "INVALID_ARGUMENT"
    openai_type = "content_filter"
    openai_code = "content_filter"


class Unauthenticated(RequestError):
    """No key, or a wrong one."""

    http_status = 401
    grpc_status = "UNAUTHENTICATED"
    openai_type = "AuthenticationError"
    openai_code = "invalid_api_key"


class Forbidden(RequestError):
    """The caller may not do this."""

    http_status = 403
    grpc_status = "PERMISSION_DENIED"
    openai_type = "PermissionDeniedError"


class NotFound(RequestError):
    """No such model, version or path."""

    http_status = 404
    grpc_status = "NOT_FOUND"
    openai_type = "NotFoundError"


class MethodNotAllowed(RequestError):
    """The path exists, but not for this method.

    Attributes:
        allow: the methods that it is answered for.
    """

    http_status = 405
    grpc_status = "UNIMPLEMENTED"
    openai_type = "MethodNotAllowedError"

    def __init__(self, message: str, allow: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.allow = tuple(allow)


class BodyTimeout(RequestError):
    """The request body took too long to come."""

    http_status = 408
    grpc_status = "DEADLINE_EXCEEDED"
    openai_type = "RequestTimeoutError"


class BodyTooLarge(RequestError):
    """The request body is over the limit."""

    http_status = 413
    grpc_status = "RESOURCE_EXHAUSTED"
    openai_type = "RequestEntityTooLargeError"


class UnsupportedMedia(RequestError):
    """The request's body is of a type that is not read here."""

    http_status = 415
    grpc_status = "INVALID_ARGUMENT"
    openai_type = "UnsupportedMediaTypeError"


class UnsupportedCoding(RequestError):
    """The request's body is compressed in a way that is not inflated here."""

    http_status = 415
    grpc_status = "INVALID_ARGUMENT"
    openai_type = "UnsupportedMediaTypeError"


class RateLimited(RequestError):
    """Over a limit of the key, the tenant or the service, or no room in the queue.

    Attributes:
        headers: `x-ratelimit-*` headers for the answer; set by who knows them.
    """

    http_status = 429
    grpc_status = "RESOURCE_EXHAUSTED"
    openai_type = "RateLimitError"
    openai_code = "rate_limit_exceeded"
    headers: Sequence[tuple[str, str]] = ()


class Unavailable(RequestError):
    """Not now: the model is loading, unloaded or overloaded, or the server is draining."""

    http_status = 503
    grpc_status = "UNAVAILABLE"
    openai_type = "ServiceUnavailableError"


class DeadlinePassed(Unavailable):
    """The time that the client gave its request (V2's parameter `timeout`) ran out; Triton answers 503 too."""


class QueueTimeout(Unavailable):
    """The request waited in front of the engine for as long as it may."""


class QueueFull(Unavailable):
    """The engine's queue is at its bound (`--max-num-queued-reqs`, `--max-num-queued-tokens`)."""


class EngineGone(Unavailable):
    """The engine process died or no longer answers."""


class InternalError(RequestError):
    """A fault of ours. The message carries a request id; the details are in the log."""

    def __init__(self, request_id: str) -> None:
        super().__init__(f"Internal error; request id {request_id}. The server's log has the details.")
        self.request_id = request_id


def is_anthropic_path(path: str) -> bool:
    """Whether a path belongs to Anthropic's API, also below `/openai`."""
    return path.removeprefix(OPENAI_ALIAS).startswith("/v1/messages")


def openai_code(status: int, param: str | None, message: str) -> str | None:
    """`error.code` of an error that vLLM answers: a word that OpenAI's clients know, or None.

    Args:
        status: of HTTP.
        param: the field at fault.
        message: vLLM says in words alone that a prompt is too long.
    """
    if status == 404 and (param == "model" or message.startswith("The model ")):
        return MODEL_NOT_FOUND
    if status == 400 and "maximum context length" in message:
        return "context_length_exceeded"
    return {401: "invalid_api_key", 429: "rate_limit_exceeded"}.get(status)


def anthropic_error(status: int, message: str) -> dict[str, object]:
    """An error in Anthropic's envelope."""
    kind = _ANTHROPIC_TYPES.get(status) or ("invalid_request_error" if 400 <= status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": message}}


_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    529: "overloaded_error",
}
