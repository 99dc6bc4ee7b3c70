"""How an error looks on the wire: one place for every protocol's shape."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import orjson

from kserve_vllm.core.errors import (
    MODEL_NOT_FOUND,
    OPENAI_ALIAS,
    InvalidRequest,
    MethodNotAllowed,
    RequestError,
    UnsupportedCoding,
    anthropic_error,
    is_anthropic_path,
)

__all__ = [
    "OPENAI_ALIAS",
    "REQUEST_ID",
    "SHAPE_PATH",
    "check_single",
    "error_body",
    "error_headers",
    "in_anthropics_shape",
    "is_anthropic_path",
    "is_form",
    "is_kserve_path",
    "path_of_shape",
    "whole_number",
]

KSERVE_PREFIXES = ("/v2", "/v1/models/")
SHAPE_PATH = "kserve_vllm.shape"
"""Key of an ASGI scope: the path by which errors get their shape, from `path_of_shape`."""
REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
"""What a caller may name its request: that, and nothing beside it, can stand in a log and a header."""


_SINGLE = frozenset(
    {
        b"authorization",
        b"x-api-key",
        b"x-priority",
        b"content-type",
        b"content-length",
        b"content-encoding",
        b"inference-header-content-length",
    }
)


def check_single(fields: Sequence[tuple[bytes, bytes]], as_mapping: Mapping[bytes, bytes]) -> None:
    """Refuse a request that gives a field twice of which there can be one (RFC 9110, 5.3): who stands in front of this
    server may have looked at the other one.

    Args:
        fields: as they were sent, with lower-case names.
        as_mapping: the same, by name.

    Raises:
        InvalidRequest: names the field.
    """
    if len(fields) == len(as_mapping):
        return
    seen: set[bytes] = set()
    for name, _ in fields:
        if name in _SINGLE and name in seen:
            field = name.decode("latin-1")
            raise InvalidRequest(f"the header {field} is given more than once", field=field)
        seen.add(name)


def is_form(content_type: bytes) -> bool:
    """Whether a body of this type is a form, whose parts may be anything."""
    kind = content_type.partition(b";")[0].strip().lower()
    return kind.startswith(b"multipart/") or kind == b"application/x-www-form-urlencoded"


def whole_number(text: bytes | str, most: int) -> int | None:
    """A number of ASCII digits up to `most`; None for anything else, of whatever length."""
    digits = text.decode("latin-1") if isinstance(text, bytes) else text
    if not digits.isascii() or not digits.isdigit():
        return None
    digits = digits.lstrip("0") or "0"
    if len(digits) > len(str(most)):
        return None
    return number if (number := int(digits)) <= most else None


def is_kserve_path(path: str) -> bool:
    """Whether a path belongs to V1 or V2, so that its errors are `{"error": "..."}`."""
    if path.startswith("/v2"):
        return not path.startswith(("/v2/rerank", "/v2/embed", "/v2/chat"))
    return path.startswith("/v1/models")


def path_of_shape(path: str, headers: Mapping[bytes, bytes]) -> str:
    """A path of the protocol that a client speaks, for paths that several protocols have in common.

    Anthropic's clients name the version of their API in every request; OpenAI's and Anthropic's SDKs name themselves.
    Without either, a path belongs to who has had it first: V1's models to KServe, files and batches to OpenAI.

    Args:
        path: as the client wrote it.
        headers: of the request, with lower-case names.
    """
    plain = path.removeprefix(OPENAI_ALIAS)
    if path.startswith("/v2") or (plain.startswith("/v1/models/") and plain.endswith(":predict")):
        return path
    if b"anthropic-version" in headers:
        return "/v1/messages"
    return OPENAI_ALIAS + plain if plain.startswith("/v1/models") and b"x-stainless-lang" in headers else path


def error_body(path: str, error: RequestError, request_id: str | None = None) -> bytes:
    """The JSON body of an error, in the shape of the protocol that `path` belongs to.

    Args:
        path: as the client wrote it: below `/openai`, errors have OpenAI's shape also where V1 has the same path.
        error: what to answer.
        request_id: shown to Anthropic's clients, whose envelope has a field for it.
    """
    tree: dict[str, object]
    if is_kserve_path(path):
        tree = {"error": error.message}
    elif is_anthropic_path(path):
        tree = anthropic_error(error.http_status, error.message)
        if request_id is not None:
            tree["request_id"] = request_id
    else:
        code, field = error.openai_code, error.field
        if code is None and error.http_status == 404 and field in ("model", "model_name"):
            code, field = MODEL_NOT_FOUND, "model"
        tree = {"error": {"message": error.message, "type": error.openai_type, "param": field, "code": code}}
    return orjson.dumps(tree)


def in_anthropics_shape(status: int, body: bytes, request_id: str) -> bytes | None:
    """An error in OpenAI's shape in that of Anthropic's clients, or one of theirs with its id; None for all else.

    Args:
        status: of HTTP.
        body: JSON, `{"error": {"message": ...}}`.
        request_id: as for `error_body`.
    """
    try:
        tree = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    if isinstance(tree, dict) and tree.get("type") == "error" and "request_id" not in tree:
        return orjson.dumps({**tree, "request_id": request_id})
    error = tree.get("error") if isinstance(tree, dict) and tree.get("type") != "error" else None
    if not isinstance(error, dict) or not isinstance(error.get("message"), str):
        return None
    return orjson.dumps({**anthropic_error(status, error["message"]), "request_id": request_id})


def error_headers(error: RequestError, request_id: str) -> list[tuple[bytes, bytes]]:
    """Response headers that go with an error."""
    headers = [(b"content-type", b"application/json"), (b"x-request-id", request_id.encode("latin-1"))]
    if error.retry_after_s is not None:
        headers.append((b"retry-after", str(error.retry_after_s).encode()))
    if error.reason is not None:
        headers.append((b"x-refusal-reason", error.reason.encode("latin-1")))
    if error.close:
        headers.append((b"connection", b"close"))
    if isinstance(error, MethodNotAllowed) and error.allow:
        headers.append((b"allow", ", ".join(error.allow).encode()))
    if isinstance(error, UnsupportedCoding):
        headers.append((b"accept-encoding", b"gzip, deflate"))
    if error.http_status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    return headers
