"""Clients of every protocol on the HTTP port: what they get is what they get elsewhere."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import numpy as np
import openai
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from h2.errors import ErrorCodes
from h2.events import DataReceived

from tests.clients import SUM, tensor
from tests.http2 import Client
from tests.robustness.wire import close_clients
from tests.support import Server, wait_until
from tests.triton import client as triton

MESSAGES = [{"role": "user", "content": SUM}]
CHAT: dict[str, Any] = {"model": "demo", "messages": MESSAGES, "max_tokens": 12, "temperature": 0}
PROMPT: dict[str, Any] = {"model": "demo", "prompt": SUM, "max_tokens": 12, "temperature": 0}
USAGE = {"stream_options": {"include_usage": True}}
TENSORS = {"inputs": [tensor("text_input", [SUM])], "parameters": {"max_tokens": 12, "temperature": 0}}

REQUESTS: list[tuple[str, str, dict[str, Any] | None]] = [
    ("POST", "/v1/chat/completions", CHAT),
    ("POST", "/v1/chat/completions", {**CHAT, "stream": True, **USAGE}),
    ("POST", "/v1/chat/completions", {**CHAT, "stream": True, "logprobs": True, "top_logprobs": 2}),
    ("POST", "/v1/chat/completions", {**CHAT, "model": "nobody"}),
    ("POST", "/v1/chat/completions", {**CHAT, "max_tokens": -1}),
    ("POST", "/v1/completions", PROMPT),
    ("POST", "/v1/completions", {**PROMPT, "stream": True, "n": 2}),
    ("POST", "/v1/messages", CHAT),
    ("POST", "/v1/messages", {**CHAT, "stream": True}),
    ("POST", "/v2/models/demo/infer", TENSORS),
    ("POST", "/v2/models/demo/generate_stream", {"text_input": SUM, "parameters": {"max_tokens": 12}}),
    ("POST", "/v1/models/demo:predict", {"instances": [SUM], "parameters": {"max_tokens": 12}}),
    ("GET", "/v2/models/demo", None),
    ("GET", "/v1/models", None),
    ("GET", "/openapi.json", None),
    ("GET", "/nowhere", None),
    ("POST", "/v1/chat/completions", None),
    ("POST", "/v1/embeddings", {"model": "demo", "input": "x"}),
]
# Made anew for each request: names of it, and times.
_NEW = re.compile(r'[0-9a-f]{16,32}|(?<="created":)\s*[0-9]+|(?<="created_at":)\s*[0-9.]+|toolu_\w+')
_OF_ONE = {"date", "x-request-id", "request-id", "transfer-encoding", "connection", "content-length"}


# What a stream may bring in one event or in several: a loop that is late takes several passes of the engine at once.
_IN_PARTS = {"content", "text", "text_output", "token_ids", "tokens", "token_logprobs", "top_logprobs", "text_offset"}


def _joined(text: str) -> dict[str, Any]:
    """What the events of a stream say together, by its place in them: parts are joined, the rest is what was said."""
    told: dict[str, Any] = {}

    def walk(value: Any, place: str, name: str) -> None:
        if name in _IN_PARTS and isinstance(value, (str, list)):
            told[place] = told.get(place, type(value)()) + value
        elif isinstance(value, dict):
            for key, each in value.items():
                walk(each, f"{place}.{key}", key)
        elif isinstance(value, list):
            for each in value:
                which = each.get("index", "") if isinstance(each, dict) else ""
                walk(each, f"{place}[{which}]", name)
        elif value not in told.setdefault(place, []):
            told[place].append(value)

    for line in text.splitlines():
        field, _, value = line.partition(": ")
        walk(json.loads(value) if value.startswith("{") else value, field, "")
    return told


def _said(answer: httpx.Response) -> tuple[int, dict[str, str], Any]:
    headers = {name: value for name, value in answer.headers.items() if name not in _OF_ONE}
    text = _NEW.sub("0", answer.text)
    streamed = headers.get("content-type", "").startswith("text/event-stream")
    return answer.status_code, headers, _joined(text) if streamed else text


@pytest.mark.parametrize("row", REQUESTS, ids=lambda row: f"{row[1]} {json.dumps(row[2])[-40:]}")
def test_an_answer_over_http2_is_that_over_http1(server: Server, row: tuple[str, str, dict[str, Any] | None]) -> None:
    method, path, body = row
    answers = []
    for second in (False, True):
        with httpx.Client(http1=not second, http2=second, timeout=60) as client:
            answers.append(client.request(method, server.url + path, json=body))
    assert [answer.http_version for answer in answers] == ["HTTP/1.1", "HTTP/2"]
    assert _said(answers[1]) == _said(answers[0])


def test_openais_sdk_over_both_versions(server: Server) -> None:
    told = []
    for second in (False, True):
        http = httpx.Client(http1=not second, http2=second)
        with openai.OpenAI(base_url=server.url + "/v1", api_key="x", http_client=http) as client:
            whole = client.chat.completions.create(**CHAT).choices[0].message.content
            pieces = client.chat.completions.create(**CHAT, stream=True)
            told += [whole, "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)]
    assert told[0]
    assert len(set(told)) == 1


def test_tritons_client_beside_http(server: Server) -> None:
    text = triton.InferInput("text_input", [1], "BYTES")
    text.set_data_from_numpy(np.array([SUM.encode()], dtype=object))
    told = []
    for address in (server.grpc_address, server.one_port_address):
        with triton.InferenceServerClient(address) as client:
            assert client.is_server_ready()
            assert client.get_model_metadata("demo").name == "demo"
            answer = client.infer("demo", [text], parameters={"max_tokens": 12, "temperature": 0.0})
            told.append(answer.as_numpy("text_output")[0])
    assert told[0]
    assert told[0] == told[1]


def test_grpcurls_list_and_describe_beside_http(server: Server) -> None:
    service = "inference.GRPCInferenceService"
    asked = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol=service),
    ]
    with grpc.insecure_channel(server.one_port_address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        listed, described = stub.ServerReflectionInfo(iter(asked), timeout=20)
    assert service in {each.name for each in listed.list_services_response.service}
    assert described.file_descriptor_response.file_descriptor_proto


@pytest.fixture
def raw(server: Server) -> Iterator[Client]:
    yield Client(int(server.one_port_address.rpartition(":")[2]))
    close_clients()


def test_a_stream_that_its_client_takes_back_ends_in_the_engine(server: Server, raw: Client) -> None:
    body = json.dumps({**CHAT, "stream": True, "max_tokens": 900, "ignore_eos": True}).encode()
    made = server.metric("vllm:generation_tokens_total") or 0
    # One connection stays open for all of them.
    for _ in range(3):
        stream = raw.begin("POST", "/v1/chat/completions", ("content-type", "application/json"), end=False)
        raw.send(stream, body)
        raw.until(lambda e, of=stream: isinstance(e, DataReceived) and e.stream_id == of)  # type: ignore[misc]
        raw.h2.reset_stream(stream, ErrorCodes.CANCEL)
        raw.flush()
    wait_until(lambda: not server.metric("vllm:num_requests_running"), 60, "the engine goes on")
    assert (server.metric("vllm:generation_tokens_total") or 0) - made < 3 * 900, "they ran to their ends"
    assert raw.ask("GET", "/v2/health/live").status == 200
