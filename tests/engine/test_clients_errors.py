"""Errors have the shape of who asked: OpenAI's, Anthropic's, V2's; one sentence that names the field."""

from __future__ import annotations

import json
import re
from typing import Any

import anthropic
import httpx
import openai
import pytest

from tests.clients import SUM, post
from tests.support import Server

MESSAGES = [{"role": "user", "content": SUM}]
CHAT = {"model": "demo", "messages": MESSAGES, "max_tokens": 3}
COMPLETION = {"model": "demo", "prompt": SUM, "max_tokens": 3}
RESPONSE = {"model": "demo", "input": SUM, "max_output_tokens": 3}
_PYTHON = re.compile(
    r"\bNone\b|\bTrue\b|\bFalse\b|pydantic|Traceback|validation error|input_value|'(type|loc|msg)':|Input should|<class"
)

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("/v1/chat/completions", {"model": "demo"}, "messages"),
    ("/v1/chat/completions", {**CHAT, "temperature": "hot"}, "temperature"),
    ("/v1/chat/completions", {**CHAT, "messages": "x"}, "messages"),
    ("/v1/chat/completions", {**CHAT, "messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
    ("/v1/chat/completions", {**CHAT, "stop": 3}, "stop"),
    ("/v1/chat/completions", {**CHAT, "stop": ["a", 3]}, "stop[1]"),
    ("/v1/chat/completions", {**CHAT, "tools": [{"type": "function"}]}, "tools[0].function"),
    ("/v1/chat/completions", {**CHAT, "response_format": {"type": "x"}}, "response_format.type"),
    ("/v1/chat/completions", {**CHAT, "max_tokens": 9999}, "max_tokens"),
    ("/v1/chat/completions", {**CHAT, "top_logprobs": 3}, "top_logprobs"),
    ("/v1/chat/completions", {**CHAT, "stream": True, "n": "two"}, "n"),
    ("/v1/completions", {**COMPLETION, "prompt": {}}, "prompt"),
    ("/v1/completions", {**COMPLETION, "logprobs": -2}, "logprobs"),
    ("/v1/responses", {"model": "demo"}, "input"),
    ("/v1/responses", {**RESPONSE, "truncation": "x"}, "truncation"),
    ("/tokenize", {"model": "demo"}, "prompt"),
    # vLLM's own checks trip over these before their types are looked at, or tell of them in Python's words.
    ("/v1/chat/completions", {**CHAT, "messages": None}, "messages must be a list"),
    ("/v1/chat/completions", {**CHAT, "messages": 0}, "messages must be a list"),
    (
        "/v1/chat/completions",
        {**CHAT, "messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "text is missing",
    ),
    ("/v1/chat/completions", {**CHAT, "structured_outputs": True}, "structured_outputs must be an object"),
    ("/v1/chat/completions", {**CHAT, "structured_outputs": {}}, "structured outputs"),
    ("/v1/chat/completions", {**CHAT, "stop": ["a"] * 5}, "stop has more than 4 elements"),
    ("/v1/responses", {**RESPONSE, "tools": 0}, "tools must be a list"),
    ("/v1/responses", {**RESPONSE, "conversation": "conv_1"}, "conversation"),
    ("/v1/chat/completions/batch", {**CHAT, "messages": [MESSAGES], "response_format": {}}, "response_format"),
    ("/tokenize", {"model": "demo", "messages": [{"role": "user", "content": [None]}]}, "messages"),
    ("/invocations", {"model": "demo", "messages": None}, "messages"),
]
ANTHROPIC: list[tuple[str, dict[str, Any], int, str, str]] = [
    ("", {"model": "demo"}, 400, "invalid_request_error", "messages"),
    ("", {"model": "demo", "messages": MESSAGES}, 400, "invalid_request_error", "max_tokens"),
    ("", {**CHAT, "max_tokens": 0}, 400, "invalid_request_error", "max_tokens"),
    ("", {**CHAT, "temperature": 9}, 400, "invalid_request_error", "temperature"),
    ("", {**CHAT, "messages": [{"role": "z", "content": "a"}]}, 400, "invalid_request_error", "messages[0].role"),
    ("", {**CHAT, "max_tokens": 5000}, 400, "invalid_request_error", "max_"),
    ("", {**CHAT, "max_tokens": 5000, "stream": True}, 400, "invalid_request_error", "max_"),
    ("", {**CHAT, "model": "nobody"}, 404, "not_found_error", "nobody"),
    ("", {**CHAT, "container": "c_1"}, 400, "invalid_request_error", "container"),
    ("/count_tokens", {"model": "demo"}, 400, "invalid_request_error", "messages"),
    ("/count_tokens", {"model": "nobody", "messages": MESSAGES}, 404, "not_found_error", "nobody"),
]


BELOW_OPENAI = [("/openai" + path, body, field) for path, body, field in REFUSED if path.startswith("/v1")]


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [*REFUSED, *BELOW_OPENAI],
    ids=[f"{p} {json.dumps(b)[:60]}" for p, b, _ in [*REFUSED, *BELOW_OPENAI]],
)
def test_openais_errors_name_the_field_in_a_sentence(
    server: Server, path: str, body: dict[str, Any], field: str
) -> None:
    answer = post(server, path, body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] is None
    assert field in error["message"]
    assert "\n" not in error["message"]
    assert not _PYTHON.search(error["message"]), error["message"]


@pytest.mark.parametrize(("path", "body", "status", "kind", "word"), ANTHROPIC)
@pytest.mark.parametrize("prefix", ["", "/openai"])
def test_anthropics_errors_have_its_envelope(
    server: Server, prefix: str, path: str, body: dict[str, Any], status: int, kind: str, word: str
) -> None:
    answer = post(server, f"{prefix}/v1/messages{path}", body)
    assert answer.status_code == status
    assert answer.headers["request-id"]
    tree = answer.json()
    assert tree["type"] == "error"
    assert tree["error"]["type"] == kind
    assert word in tree["error"]["message"]
    assert not _PYTHON.search(tree["error"]["message"])


@pytest.mark.parametrize(
    ("body", "kind"), [("{x", "application/json"), ("{}", "text/plain"), ("[]", "application/json")]
)
def test_a_body_that_is_no_json_is_refused_in_the_same_envelope(server: Server, body: str, kind: str) -> None:
    answer = post(server, "/v1/messages", body, content_type=kind)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"
    for path in ("/v1/chat/completions", "/invocations"):
        plain = post(server, path, body, content_type=kind)
        assert plain.status_code == 400
        assert (plain.json()["error"]["type"], plain.json()["error"]["code"]) == ("BadRequestError", None)
        assert not _PYTHON.search(plain.text)


@pytest.mark.parametrize("path", ["/v1/embeddings", "/openai/v1/audio/transcriptions", "/rerank"])
def test_what_another_kind_of_model_does_is_not_found_with_a_reason(server: Server, path: str) -> None:
    answer = post(server, path, {"model": "demo", "input": SUM})
    assert answer.status_code == 404
    assert "the model that is served does not do what" in answer.json()["error"]["message"]


def test_a_response_that_is_not_stored_can_not_be_gone_on_from(server: Server) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        first = client.responses.create(model="demo", input=SUM, max_output_tokens=2)
        assert (first.model_extra or {}).get("store", getattr(first, "store", None)) is False
        with pytest.raises(openai.NotFoundError, match="responses are not stored here") as missing:
            client.responses.create(model="demo", input=SUM, previous_response_id=first.id)
        assert missing.value.param == "previous_response_id"


def test_openais_sdk_reads_code_and_param(server: Server) -> None:
    with openai.OpenAI(base_url=f"{server.url}/openai/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.NotFoundError) as missing:
            client.chat.completions.create(model="nobody", messages=MESSAGES)  # type: ignore[arg-type]
        assert missing.value.code == "model_not_found"
        assert missing.value.param == "model"
        with pytest.raises(openai.NotFoundError) as unknown:
            client.models.retrieve("nobody")
        assert unknown.value.code == "model_not_found"
        with (
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as other,
            pytest.raises(openai.NotFoundError) as plain,
        ):
            other.models.retrieve("nobody")
        assert plain.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as long:
            client.completions.create(model="demo", prompt="a " * 3000)
        assert long.value.code == "context_length_exceeded", long.value.message
        with pytest.raises(openai.BadRequestError) as wrong:
            client.completions.create(model="demo", prompt=SUM, temperature=-1)
        assert wrong.value.code is None


def test_anthropics_sdk_reads_type_and_request_id(server: Server) -> None:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        with pytest.raises(anthropic.BadRequestError) as wrong:
            client.messages.create(model="demo", max_tokens=0, messages=MESSAGES)  # type: ignore[arg-type]
        assert wrong.value.request_id
        body: Any = wrong.value.body
        assert body["error"]["type"] == "invalid_request_error"
        with pytest.raises(anthropic.NotFoundError) as unknown:
            client.models.retrieve("nobody")
        missing: Any = unknown.value.body
        assert missing["error"]["type"] == "not_found_error"
        with pytest.raises(anthropic.NotFoundError):
            client.messages.create(model="nobody", max_tokens=3, messages=MESSAGES)  # type: ignore[arg-type]
        answer = client.messages.with_raw_response.create(model="demo", max_tokens=3, messages=MESSAGES)  # type: ignore[arg-type]
        assert answer.headers["request-id"]


def test_anthropics_answers_have_their_fields(server: Server) -> None:
    plain_body = {**CHAT, "max_tokens": 8, "stream": True}
    plain = post(server, "/v1/messages", plain_body)
    assert plain.status_code == 200
    assert "event: message_stop" in plain.text
    answer = post(server, "/v1/messages", {**CHAT, "max_tokens": 3}).json()
    assert answer["stop_sequence"] is None
    assert answer["stop_reason"] == "max_tokens"


def test_v2_and_v1_keep_theirs(server: Server) -> None:
    for status, path, body in (
        (404, "/v2/models/nobody/infer", {"inputs": []}),
        (400, "/v2/models/demo/infer", {}),
        (400, "/v2/models/demo/generate", {}),
        (400, "/v1/models/demo:predict", {"instances": 3}),
        (400, "/v1/models/demo:predict", {"instances": [SUM], "parameters": {"temperature": "hot"}}),
        (400, "/v1/models/demo:predict", {"instances": [{"messages": [{"role": "user", "content": 1}]}]}),
    ):
        answer = post(server, path, body)
        assert answer.status_code == status, (path, body)
        assert list(answer.json()) == ["error"]
        assert not _PYTHON.search(answer.json()["error"])
    assert list(httpx.get(f"{server.url}/v1/models/nobody").json()) == ["error"]


def test_a_clients_mistakes_are_no_errors_in_the_log(server: Server) -> None:
    before = len(server.log)
    for path, body, *_ in REFUSED:
        post(server, path, body)
        post(server, path, {**body, "model": "nobody"})
    for path, body, *_ in ANTHROPIC:
        post(server, f"/v1/messages{path}", body)
    stuck = {**COMPLETION, "structured_outputs": {"choice": ["yes", "no"]}, "bad_words": ["yes", "no"]}
    assert post(server, "/v1/completions", stuck).status_code == 400
    # Found out by the engine when the stream has begun.
    assert post(server, "/v1/completions", {**stuck, "stream": True}).status_code == 200
    new = server.log[before:]
    assert '"level":"error"' not in new, [line for line in new.splitlines() if '"level":"error"' in line]
