"""What vLLM refuses at Anthropic's paths is told in Anthropic's shape, whichever of its routes did."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from kserve_vllm.core.errors import Forbidden, NotFound
from kserve_vllm.core.request_context import RequestContext
from kserve_vllm.protocols import errors as wire
from kserve_vllm.protocols.http.middleware import ResponseGuard
from tests.robustness.test_places import middleware

THEIRS = {"type": "error", "error": {"type": "invalid_request_error", "message": "no"}, "request_id": "r"}
OPENAIS = {"error": {"message": "no", "type": "BadRequestError", "param": None, "code": None}}


def answered(
    path: str, status: int, *parts: bytes, refusal: Forbidden | None = None
) -> tuple[dict[bytes, bytes], bytes]:
    """Headers and body that a client gets of an answer in these parts."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def run() -> None:
        guard = ResponseGuard(send, "r", path, None)
        guard.context = RequestContext("r", "openai", path)
        guard.context.refusal = refusal
        length = sum(map(len, parts))
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % length)]
        await guard.send({"type": "http.response.start", "status": status, "headers": headers})
        for number, part in enumerate(parts):
            await guard.send({"type": "http.response.body", "body": part, "more_body": number < len(parts) - 1})

    asyncio.run(run())
    body = b"".join(message["body"] for message in sent[1:])
    headers = dict(sent[0]["headers"])
    assert headers[b"content-length"] == b"%d" % len(body)
    return headers, body


@pytest.mark.parametrize("path", ["/v1/messages/render", "/openai/v1/messages", "/v1/messages/count_tokens"])
@pytest.mark.parametrize(
    ("status", "kind"), [(400, "invalid_request_error"), (404, "not_found_error"), (429, "rate_limit_error")]
)
def test_an_error_at_anthropics_paths_has_their_shape(path: str, status: int, kind: str) -> None:
    headers, body = answered(path, status, json.dumps(OPENAIS).encode())
    assert json.loads(body) == {"type": "error", "error": {"type": kind, "message": "no"}, "request_id": "r"}
    without = json.dumps({"type": "error", "error": {"type": kind, "message": "no"}}).encode()
    assert json.loads(wire.in_anthropics_shape(status, without, "r") or b"") == json.loads(body)
    assert wire.in_anthropics_shape(status, body, "r") is None
    assert headers[b"request-id"] == b"r"


def test_so_has_a_refusal() -> None:
    tree = json.loads(
        answered("/v1/messages/render", 400, json.dumps(OPENAIS).encode(), refusal=Forbidden("not you"))[1]
    )
    assert (tree["type"], tree["error"]) == ("error", {"type": "permission_error", "message": "not you"})


@pytest.mark.parametrize(
    ("path", "status", "parts"),
    [
        ("/v1/messages", 400, [json.dumps(THEIRS).encode()]),
        ("/v1/messages", 200, [json.dumps(OPENAIS).encode()]),
        ("/v1/chat/completions", 400, [json.dumps(OPENAIS).encode()]),
        ("/v1/messages", 400, [b"no JSON"]),
        ("/v1/messages", 400, [b'{"error": 1}']),
        ("/v1/messages", 400, [b"[]"]),
        ("/v1/messages", 400, [b'{"error": {"message":', b' "a"}}']),
    ],
)
def test_other_answers_are_left_alone(path: str, status: int, parts: list[bytes]) -> None:
    assert answered(path, status, *parts)[1] == b"".join(parts)


@pytest.mark.parametrize("field", ["model", "model_name"])
def test_a_model_that_is_not_there_is_named_as_openais_field(field: str) -> None:
    for path in ("/v1/chat/completions", "/openai/v1/models/nope"):
        error = json.loads(wire.error_body(path, NotFound("no such model", field=field)))["error"]
        assert (error["param"], error["code"]) == ("model", "model_not_found")


@pytest.mark.parametrize(
    ("path", "header", "shape"),
    [
        ("/v1/files", "", "OpenAI"),
        ("/v1/files", "anthropic-version", "Anthropic"),
        ("/openai/v1/files/x", "anthropic-version", "Anthropic"),
        ("/v1/batches", "x-api-key", "OpenAI"),
        ("/v1/models/x", "", "KServe"),
        ("/v1/models/x", "x-stainless-lang", "OpenAI"),
        ("/v1/models/x", "anthropic-version", "Anthropic"),
        ("/v1/models/x:predict", "anthropic-version", "KServe"),
        ("/v1/models/x:predict", "x-stainless-lang", "KServe"),
        ("/openai/v1/models/x", "x-stainless-lang", "OpenAI"),
        ("/v2/models/x", "anthropic-version", "KServe"),
        ("/v1/messages/batches", "", "Anthropic"),
        ("/nowhere", "anthropic-version", "Anthropic"),
    ],
)
def test_who_asks_tells_the_shape_where_the_path_does_not(path: str, header: str, shape: str) -> None:
    by = wire.path_of_shape(path, {header.encode(): b"1"} if header else {})
    tree = json.loads(wire.error_body(by, NotFound("no")))
    assert shape == ("Anthropic" if "type" in tree else "KServe" if tree == {"error": "no"} else "OpenAI")


@pytest.mark.parametrize("path", ["/v1/files", "/v1/nothing"])
def test_the_edge_refuses_in_the_shape_of_who_asks(path: str) -> None:
    async def ask(**headers: str) -> httpx.Response:
        transport = httpx.ASGITransport(middleware())
        async with httpx.AsyncClient(transport=transport, base_url="http://edge") as client:
            return await client.get(path, headers={**headers, "content-encoding": "br"})

    openais, theirs = asyncio.run(ask()), asyncio.run(ask(**{"anthropic-version": "2023-06-01"}))
    assert openais.status_code == theirs.status_code == 404
    assert set(openais.json()["error"]) == {"message", "type", "param", "code"}
    assert theirs.json()["error"]["type"] == "not_found_error"
    assert theirs.headers["request-id"] == theirs.json()["request_id"]
