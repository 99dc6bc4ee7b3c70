"""What a request gets wrong is its own fault over every protocol, with the real engine: never a 500, and it goes on."""

from __future__ import annotations

import json
from typing import Any

import grpc
import httpx
import pytest

from tests.support import Server
from tests.triton import service_pb2, service_pb2_grpc

DIGITS = "9" * 5000
WRONG: list[tuple[str, Any]] = [
    ("structured_outputs", "not an object"),
    ("structured_outputs", 5),
    ("structured_outputs", [1]),
    ("structured_outputs", True),
    ("response_format", 5),
    ("logit_bias", "x"),
    ("stop_token_ids", "x"),
    ("bad_words", 5),
]


def _v2(name: str, value: Any) -> tuple[str, dict[str, Any]]:
    tensor = {"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["hi"]}
    return "/v2/models/demo/infer", {"inputs": [tensor], "parameters": {name: value, "max_tokens": 2}}


def _sampling(name: str, value: Any) -> tuple[str, dict[str, Any]]:
    path, body = _v2("max_tokens", 2)
    text = json.dumps({name: value})
    body["inputs"].append({"name": "sampling_parameters", "datatype": "BYTES", "shape": [1], "data": [text]})
    return path, body


def _generate(name: str, value: Any) -> tuple[str, dict[str, Any]]:
    return "/v2/models/demo/generate", {"text_input": "hi", "parameters": {name: value, "max_tokens": 2}}


def _stream(name: str, value: Any) -> tuple[str, dict[str, Any]]:
    return "/v2/models/demo/generate_stream", _generate(name, value)[1]


def _v1(name: str, value: Any) -> tuple[str, dict[str, Any]]:
    return "/v1/models/demo:predict", {"instances": ["hi"], "parameters": {name: value, "max_tokens": 2}}


@pytest.mark.parametrize("form", [_v2, _sampling, _generate, _stream, _v1], ids=lambda form: form.__name__)
@pytest.mark.parametrize(("name", "value"), WRONG, ids=str)
def test_an_option_of_another_form_is_answered_400(server: Server, form: Any, name: str, value: Any) -> None:
    path, body = form(name, value)
    answer = httpx.post(server.url + path, json=body, timeout=60)
    assert answer.status_code == 400, answer.text
    assert name in answer.text


def _asked(server: Server, stream: bool, parameters: dict[str, Any]) -> str:
    """What one request over gRPC ends with."""
    request = service_pb2.ModelInferRequest(model_name="demo", id="r")
    request.inputs.add(name="text_input", datatype="BYTES", shape=[1]).contents.bytes_contents.append(b"hi")
    for name, value in parameters.items():
        request.parameters[name].string_param = value
    with grpc.insecure_channel(server.grpc_address) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        if stream:
            (answer,) = stub.ModelStreamInfer(iter([request]), timeout=60)
            return str(answer.error_message)
        with pytest.raises(grpc.RpcError) as caught:
            stub.ModelInfer(request, timeout=60)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    return str(caught.value.details())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("structured_outputs", "not an object"),
        ("structured_outputs", "[1]"),
        ("stop_token_ids", f"[{DIGITS}]"),
        ("logit_bias", f'{{"1": {DIGITS}}}'),
        ("response_format", "[" * 5000),
    ],
    ids=["text", "list", "digits", "digits in an object", "nested"],
)
def test_an_option_of_another_form_is_an_invalid_argument(server: Server, stream: bool, name: str, value: str) -> None:
    assert name in _asked(server, stream, {name: value})


def test_a_length_of_thousands_of_digits_is_answered_400(server: Server) -> None:
    headers = {"inference-header-content-length": DIGITS}
    answer = httpx.post(f"{server.url}/v2/models/demo/infer", content=b"{}", headers=headers)
    assert answer.status_code == 400, answer.text


def test_the_server_answers_after_all_that(server: Server) -> None:
    path, body = _v2("max_tokens", 2)
    assert httpx.post(server.url + path, json=body, timeout=60).status_code == 200
    assert server.health("/v2/health/ready").get("ready")
