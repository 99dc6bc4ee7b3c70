"""How an error looks on the wire: one place for every protocol's shape."""

from __future__ import annotations

import re
from typing import Any

import orjson

from kserve_vllm.errors import RequestError

KSERVE_PREFIXES = ("/v2", "/v1/models/")
OPENAI_ALIAS = "/openai"
REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
"""What a caller may name its request: that, and nothing beside it, can stand in a log and a header."""


def is_kserve_path(path: str) -> bool:
    """Whether a path belongs to V1 or V2, so that its errors are `{"error": "..."}`."""
    if path.startswith("/v2"):
        return not path.startswith(("/v2/rerank", "/v2/embed", "/v2/chat"))
    return path.startswith("/v1/models")


def error_body(path: str, error: RequestError) -> bytes:
    """The JSON body of an error, in the shape of the protocol that `path` belongs to."""
    tree: dict[str, Any]
    if is_kserve_path(path):
        tree = {"error": error.message}
    elif path.startswith("/v1/messages"):
        tree = {"type": "error", "error": {"type": _anthropic_type(error), "message": error.message}}
    else:
        tree = {
            "error": {
                "message": error.message,
                "type": error.openai_type,
                "param": error.field,
                "code": error.http_status,
            }
        }
    return orjson.dumps(tree)


def error_headers(error: RequestError, request_id: str) -> list[tuple[bytes, bytes]]:
    """Response headers that go with an error."""
    headers = [(b"content-type", b"application/json"), (b"x-request-id", request_id.encode("latin-1"))]
    if error.retry_after_s is not None:
        headers.append((b"retry-after", str(error.retry_after_s).encode()))
    if error.reason is not None:
        headers.append((b"x-refusal-reason", error.reason.encode("latin-1")))
    if error.close:
        headers.append((b"connection", b"close"))
    if error.http_status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    return headers


def _anthropic_type(error: RequestError) -> str:
    return {
        400: "invalid_request_error",
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        408: "timeout_error",
        413: "request_too_large",
        429: "rate_limit_error",
        503: "overloaded_error",
    }.get(error.http_status, "api_error")
