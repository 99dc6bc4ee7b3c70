"""What a client does wrong is answered in its protocol's shape and harms nobody."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import grpc
import httpx
import pytest

from kserve_vllm.core.errors import InternalError
from kserve_vllm.core.lifecycle import Lifecycle, State
from kserve_vllm.policy.enforcement import Enforcement
from kserve_vllm.protocols.http.middleware import RequestMiddleware
from kserve_vllm.protocols.oip.grpc_servicer import Servicer
from tests.accounting import recorder
from tests.clients import SUM, assert_unharmed, infer, post, tensor, texts
from tests.support import Routed, Server
from tests.triton import service_pb2, service_pb2_grpc

LONG = "word " * 1100
INFER, GENERATE, V1 = "/v2/models/demo/infer", "/v2/models/demo/generate", "/v1/models/demo:predict"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
OVER_LIMIT = 5 << 20


@pytest.fixture(autouse=True, scope="module")
def nothing_is_left(server: Server) -> Iterator[None]:
    yield
    assert_unharmed(server)
    unforeseen = [line for line in server.log.splitlines() if line.startswith("ERROR") and " kserve_vllm." in line]
    assert not unforeseen


@pytest.fixture
def stub(server: Server) -> Iterator[Any]:
    with grpc.insecure_channel(server.grpc_address) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


def chat(content: Any = SUM, **options: Any) -> dict[str, Any]:
    return {"model": "demo", "messages": [{"role": "user", "content": content}], "max_tokens": 4, **options}


def completion(prompt: Any = SUM, **options: Any) -> dict[str, Any]:
    return {"model": "demo", "prompt": prompt, "max_tokens": 4, **options}


def one(item: dict[str, Any], **parameters: Any) -> dict[str, Any]:
    return {"inputs": [item], "parameters": parameters}


def check(answer: httpx.Response, status: int, *words: str) -> None:
    """The status, the shape of the path's protocol, a sentence with `words`, and a request id."""
    assert answer.status_code == status, answer.text
    assert answer.headers["x-request-id"]
    path = answer.request.url.path
    error = answer.json()["error"]
    if path.startswith(("/v2", "/v1/models")):
        assert set(answer.json()) == {"error"}
        sentence = error
    else:
        assert set(error) == {"message", "type", "param", "code"}
        assert error["code"] is None or error["code"].isidentifier()
        sentence = error["message"] + str(error["param"])
    assert isinstance(sentence, str)
    for word in words:
        assert word in sentence
    assert "Traceback" not in sentence
    assert ".py" not in sentence


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, chat(model="nope")),
        (COMPLETIONS, completion(model="nope")),
        ("/v1/responses", {"model": "nope", "input": "a"}),
        ("/tokenize", {"model": "nope", "prompt": "a"}),
        ("/v2/models/nope/infer", texts(SUM)),
        ("/v2/models/nope/generate", {"text_input": "a"}),
        ("/v2/models/nope/generate_stream", {"text_input": "a"}),
        ("/v2/models/no/such/name/infer", texts(SUM)),
        ("/v1/models/nope:predict", {"instances": ["a"]}),
        ("/v2/repository/models/nope/load", {}),
        ("/v2/repository/models/nope/unload", {}),
    ],
)
def test_an_unknown_model_is_not_found(server: Server, path: str, body: Any) -> None:
    check(post(server, path, body), 404, "such/name" if "such" in path else "" if "repository" in path else "nope")


@pytest.mark.parametrize("path", ["/v2/models/nope", "/v2/models/nope/ready", "/v1/models/nope", "/v2/models/no/pe"])
def test_an_unknown_model_has_no_metadata(server: Server, path: str) -> None:
    check(httpx.get(server.url + path), 404, "no model named")


@pytest.mark.parametrize("path", ["/v2/nope", "/v2/nope/infer", "/v1/nope", "/nope", "/openai/v2"])
def test_an_unknown_path_is_not_found(server: Server, path: str) -> None:
    check(post(server, path, {}), 404, "no such path")


@pytest.mark.parametrize("action", ["infer", "generate", "generate_stream"])
def test_an_unknown_version_is_not_found(server: Server, action: str) -> None:
    check(post(server, f"/v2/models/demo/versions/2/{action}", texts(SUM)), 404, "version '2'")
    check(httpx.get(server.url + "/v2/models/demo/versions/2"), 404, "version '2'")
    check(httpx.get(server.url + "/v2/models/demo/versions/2/ready"), 404, "version '2'")


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/v1/responses", "/tokenize", INFER, GENERATE, V1])
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"a": NaN}',
        b"[1, 2]",
        b'"text"',
        b"null",
        b"\xff\xfe{}",
        b"[" * 5000 + b"]" * 5000,
        b'{"a":' * 3000 + b"1" + b"}" * 3000,
        b'{"instances": [Infinity]}',
    ],
    ids=["empty", "cut off", "NaN", "list", "text", "null", "not UTF-8", "deep list", "deep object", "Infinity"],
)
def test_malformed_json_is_refused(server: Server, path: str, body: bytes) -> None:
    answer = post(server, path, body)
    check(answer, 400)


@pytest.mark.parametrize(
    ("item", "words"),
    [
        (tensor("text_input", [SUM], "FP32"), ["text_input", "BYTES"]),
        (tensor("text_input", [1], "BYTES"), ["text_input", "strings"]),
        (tensor("text_input", [SUM], shape=[2]), ["text_input", "[2]"]),
        (tensor("text_input", [SUM], shape=[-1]), ["shape"]),
        (tensor("text_input", [SUM], shape=[2**40]), ["shape"]),
        (tensor("text_input", [SUM], shape=[2**30, 2**30, 2**30]), ["text_input"]),
        (tensor("text_input", [], shape=[0, 2**31 - 1, 2**31 - 1, 2**31 - 1]), ["text_input"]),
        (tensor("text_input", [SUM], shape=[1] * 9), ["shape"]),
        (tensor("text_input", [], shape=[0]), ["text_input has 0 prompts"]),
        (tensor("text_input", ["a"] * 513), ["text_input has 513 prompts"]),
        (tensor("text_input", [LONG]), ["1024"]),
        (tensor("text_input", [""]), ["prompt"]),
        ({"name": "text_input", "datatype": "BYTES", "shape": [1]}, ["data is missing"]),
        ({"name": "text_input", "datatype": "BYTES", "data": ["a"]}, ["shape"]),
        ({"name": "text_input", "shape": [1], "data": ["a"]}, ["datatype"]),
        ({"datatype": "BYTES", "shape": [1], "data": ["a"]}, ["name"]),
        (tensor("text_input", ["a"], "BYTE"), ["text_input", "BYTE"]),
        (tensor("text", ["a"]), ["unknown input 'text'"]),
        (tensor("input_ids", ["a"]), ["input_ids"]),
        (tensor("input_ids", [1.5], "INT64"), ["input_ids"]),
        (tensor("input_ids", [2**40], "INT64"), []),
        (tensor("input_ids", [-5], "INT64"), []),
        (tensor("input_ids", [2**70], "INT64"), ["input_ids"]),
        (tensor("input_ids", [[1, 2], [3]], "INT64", [2, 2]), ["input_ids", "nested"]),
        (tensor("input_ids", list(range(8)), "INT64", [2, 2, 2]), ["input_ids"]),
        (tensor("stream", [True], "BOOL"), ["text_input"]),
    ],
)
def test_a_malformed_tensor_is_refused(server: Server, item: dict[str, Any], words: list[str]) -> None:
    check(post(server, INFER, one(item)), 400, *words)


@pytest.mark.parametrize(
    ("inputs", "word"),
    [
        ([], "text_input"),
        ({}, "inputs"),
        ([3], "inputs"),
        ([tensor("text_input", ["a"])] * 2, "twice"),
        ([tensor("text_input", ["a"]), tensor("input_ids", [1], "INT64")], "input_ids"),
        ([tensor("text_input", ["a"]), tensor("stream", [1], "INT32")], "stream"),
        ([tensor("text_input", ["a"]), tensor("stream", [True], "BOOL")], "generate_stream"),
        ([tensor("text_input", ["a"]), tensor("sampling_parameters", ["{"])], "sampling_parameters"),
        ([tensor("text_input", ["a"]), tensor("sampling_parameters", ["[]"])], "sampling_parameters"),
        ([tensor("text_input", ["a"]), tensor("sampling_parameters", ['{"max_tokens": "x"}'])], "max_tokens"),
        ([tensor("text_input", ["a"]), tensor("sampling_parameters", ["[" * 9999])], "sampling_parameters"),
        ([tensor("text_input", ["a"]), tensor("input_lengths", [1], "INT32")], "input_lengths"),
        ([tensor("input_ids", [1], "INT64"), tensor("input_lengths", [2], "INT32")], "input_ids"),
    ],
)
def test_inputs_that_do_not_fit_together_are_refused(server: Server, inputs: Any, word: str) -> None:
    check(post(server, INFER, {"inputs": inputs}), 400, word)


PARAMETERS = [
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 100_000}, "max_tokens"),
    ({"max_tokens": "many"}, "max_tokens"),
    ({"max_tokens": {"a": 1}}, "max_tokens"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 2}, "top_p"),
    ({"top_k": -5}, "top_k"),
    ({"n": 0}, "n"),
    ({"n": []}, "n"),
    ({"n": 10**9}, "n"),
    ({"seed": 2**80}, "seed"),
    ({"logprobs": 10_000}, "logprobs"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"99999999": 1}}, "logit_bias"),
    ({"stop": 3}, "stop"),
    ({"min_tokens": 9, "max_tokens": 3}, "min_tokens"),
    ({"allowed_token_ids": []}, "allowed_token_ids"),
    ({"allowed_token_ids": [10**7]}, "allowed_token_ids"),
    ({"stop_token_ids": ["a"]}, "stop_token_ids"),
    ({"bad_words": [""]}, ""),
    ({"truncate_prompt_tokens": 10**6}, "truncate_prompt_tokens"),
    ({"structured_outputs": {"regex": "("}}, ""),
    ({"structured_outputs": {"json": {"type": 7}}}, ""),
    ({"structured_outputs": {"grammar": "nonsense ::="}}, ""),
    ({"structured_outputs": {"choice": []}}, ""),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, ""),
    ({"response_format": {"type": "json_schema"}}, ""),
    ({"response_format": {"type": "nonsense"}}, "response_format"),
]


@pytest.mark.parametrize(("options", "word"), PARAMETERS, ids=[json.dumps(options) for options, _ in PARAMETERS])
@pytest.mark.parametrize("path", [INFER, GENERATE, GENERATE + "_stream", V1, COMPLETIONS])
def test_a_parameter_out_of_range_is_refused(server: Server, path: str, options: dict[str, Any], word: str) -> None:
    body = {
        INFER: {"inputs": [tensor("text_input", [SUM])], "parameters": options},
        V1: {"instances": [SUM], "parameters": options},
        COMPLETIONS: completion(**options),
    }.get(path, {"text_input": SUM, "parameters": options})
    check(post(server, path, body), 400, word)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (INFER, one(tensor("text_input", [SUM]), temperatur=1)),
        (GENERATE, {"text_input": SUM, "parameters": {"temperatur": 1}}),
        (V1, {"instances": [{"prompt": SUM, "temperatur": 1}]}),
    ],
)
def test_an_unknown_parameter_is_refused_with_the_nearest_name(server: Server, path: str, body: Any) -> None:
    check(post(server, path, body), 400, "unknown parameter 'temperatur'", "'temperature'")


def test_an_unknown_output_is_refused(server: Server) -> None:
    body = {**texts(SUM), "outputs": [{"name": "nope"}]}
    check(post(server, INFER, body), 400, "no output named 'nope'", "text_output")


@pytest.mark.parametrize(
    ("path", "body", "word"),
    [
        (CHAT, chat(LONG), "1024"),
        (COMPLETIONS, completion(LONG), "1024"),
        (COMPLETIONS, completion([]), "prompt"),
        (COMPLETIONS, completion(None), "prompt"),
        (COMPLETIONS, completion({"a": 1}), "prompt"),
        (COMPLETIONS, completion([[2**40]]), ""),
        (CHAT, {"model": "demo"}, "messages"),
        (CHAT, chat(temperature="hot"), "temperature"),
        (CHAT, chat(tool_choice={"type": "function", "function": {"name": "x"}}), "tool"),
        (CHAT, chat(messages=[]), ""),
        (CHAT, chat([{"type": "image_url", "image_url": {"url": "http://localhost:1/x.png"}}]), ""),
    ],
)
def test_openais_mistakes_are_answered_in_openais_shape(server: Server, path: str, body: Any, word: str) -> None:
    check(post(server, path, body), 400, word)


# The body's size and form


@pytest.mark.parametrize("path", [CHAT, INFER, GENERATE, V1])
@pytest.mark.parametrize("chunked", [False, True])
def test_too_large_a_body_is_refused(server: Server, path: str, chunked: bool) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(OVER_LIMIT >> 16):
            yield b" " * (1 << 16)

    content = pieces() if chunked else b" " * OVER_LIMIT
    with httpx.Client(base_url=server.url, timeout=60) as client:
        check(
            client.post(path, content=content, headers={"content-type": "application/json"}),
            413,
            "4 MiB",
            "--max-body-mib",
        )
        # What was still sent has been read, or the client would have seen no answer.
        assert client.get("/v2/health/live").status_code == 200


def test_a_body_just_under_the_limit_is_read(server: Server) -> None:
    body = json.dumps(texts(SUM)).encode()
    padded = body + b" " * ((4 << 20) - len(body))
    assert post(server, INFER, padded).status_code == 200
    chunked = httpx.post(server.url + INFER, content=iter([body, b" " * 1000]), timeout=60)
    assert chunked.status_code == 200


@pytest.mark.parametrize("length", ["-1", "x", "99999999", "1.5", "", "+2", "²"])
def test_a_wrong_header_length_of_binary_data_is_refused(server: Server, length: str) -> None:
    answer = post(server, INFER, b"{}", **{"inference_header_content_length": length.encode("latin-1")})
    check(answer, 400, "Inference-Header-Content-Length")


@pytest.mark.parametrize(
    ("size", "tail", "word"),
    [
        (99, b"1234", "99 bytes"),
        (2, b"\x00\x00", "text_input"),
        (-1, b"", "binary_data_size"),
        (True, b"1", "binary_data_size"),
        ("8", b"12345678", "binary_data_size"),
        (4, b"\xff\xff\xff\xff", "cut off"),
        (6, b"\x02\x00\x00\x00\xff\xfe", "UTF-8"),
        (5, b"\x01\x00\x00\x00aXYZ", "belong to no input"),
    ],
)
def test_binary_data_that_does_not_add_up_is_refused(server: Server, size: Any, tail: bytes, word: str) -> None:
    item = {"name": "text_input", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": size}}
    head = json.dumps({"inputs": [item]}).encode()
    check(post(server, INFER, head + tail, inference_header_content_length=str(len(head))), 400, word)


# Raw HTTP


def raw(server: Server, request: bytes) -> tuple[int, bytes]:
    """Send bytes; the status (0 where the connection is closed without one) and the whole answer."""
    with socket.create_connection(("127.0.0.1", server.http_port), timeout=20) as sock:
        sock.sendall(request)
        answer = b""
        while chunk := sock.recv(65536):
            answer += chunk
    return int(answer.split(b" ", 2)[1]) if answer else 0, answer


CLOSE = b"Host: x\r\nConnection: close\r\n"


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET /v2/health/ready HTTP/1.0\r\n\r\n", 200),
        (b"GET /v2/models/demo HTTP/1.0\r\n\r\n", 200),
        (b"POST /v2/models/demo/infer HTTP/1.0\r\nContent-Length: 2\r\n\r\n{}", 400),
        (b"POST /v2/models/demo/infer HTTP/1.0\r\n\r\n", 400),
        (b"GET /v2/models/\xff\xfe HTTP/1.1\r\n" + CLOSE + b"\r\n", 400),
        (b"GET /v2/models/%FF%FE HTTP/1.1\r\n" + CLOSE + b"\r\n", 404),
        (b"GET /v2/models/%00 HTTP/1.1\r\n" + CLOSE + b"\r\n", 404),
        (b"GET /v2/models/%zz HTTP/1.1\r\n" + CLOSE + b"\r\n", 404),
        (b"GET /v1/models/%F0%9F%98%80 HTTP/1.1\r\n" + CLOSE + b"\r\n", 404),
        (b"GET /openai/v1/models/%FF HTTP/1.1\r\n" + CLOSE + b"\r\n", 404),
        (b"GET /v2/models/../../etc/passwd HTTP/1.1\r\n" + CLOSE + b"\r\n", 404),
        (b"GET http://x/v2/models/demo HTTP/1.1\r\n" + CLOSE + b"\r\n", 200),
        (b"GET /v2/models/demo?a=%FF&b[]=%00 HTTP/1.1\r\n" + CLOSE + b"\r\n", 200),
        (b"GET /v2/models/demo HTTP/1.1\r\nX-Request-Id: \xff\xfe\r\nTraceparent: \xff\r\n" + CLOSE + b"\r\n", 200),
        (b"GET /v2/models/demo HTTP/1.1\r\nAuthorization: \xff\r\n" + CLOSE + b"\r\n", 200),
        (b"POST /v2/models/demo/infer HTTP/1.1\r\nContent-Length: x\r\n" + CLOSE + b"\r\n{}", 400),
        (b"POST /v2/models/demo/infer HTTP/1.1\r\nContent-Length: -1\r\n" + CLOSE + b"\r\n{}", 400),
        (b"POST /v2/models/demo/infer HTTP/1.1\r\nContent-Length: 99999999999999999999999\r\n" + CLOSE + b"\r\n", 400),
        (b"POST /v2/models/demo/infer HTTP/1.1\r\nTransfer-Encoding: chunked\r\n" + CLOSE + b"\r\nzz\r\n", 400),
        (b"POST /v2/models/demo/infer HTTP/1.1\r\nContent-Length: 2\r\nAccept: \xff\r\n" + CLOSE + b"\r\n{}", 400),
        (b"POST /v1/completions HTTP/1.1\r\nContent-Length: 2\r\nContent-Type: \xff\r\n" + CLOSE + b"\r\n{}", 400),
        (b"BREW /v2 HTTP/1.1\r\n" + CLOSE + b"\r\n", 501),
        (b"nonsense\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    ],
)
def test_odd_http_is_answered(server: Server, request_bytes: bytes, status: int) -> None:
    found, answer = raw(server, request_bytes)
    assert found == status, answer
    if b"X-Request-Id: \xff" in request_bytes:
        assert b"\r\nx-request-id: " in answer.lower()
        assert b"\xff" not in answer


def test_every_path_answers_every_method_below_500(server: Server) -> None:
    paths = httpx.get(server.url + "/openapi.json").json()["paths"]
    odd = []
    with httpx.Client(base_url=server.url, timeout=30) as client:
        for path, operations in paths.items():
            filled = path.replace("{model_name}", "demo").replace("{model_version}", "1").replace("{response_id}", "r")
            for method in ("HEAD", "OPTIONS", "PUT", "PATCH", "DELETE", "TRACE", "GET"):
                answer = client.request(method, filled)
                documented = method.lower() in operations
                # vLLM's exporter of metrics answers every method alike.
                refused = answer.status_code in (404, 405) or documented or path == "/metrics"
                if answer.status_code >= 500 or (method in ("PUT", "DELETE") and not refused):
                    odd.append((method, filled, answer.status_code))
    assert not odd


@pytest.mark.parametrize("path", [INFER, GENERATE, GENERATE + "_stream", V1, "/v2/repository/models/demo/load"])
def test_another_method_than_post_is_not_allowed(server: Server, path: str) -> None:
    for method in ("PUT", "DELETE", "GET"):
        answer = httpx.request(method, server.url + path)
        check(answer, 405, method)
        assert answer.headers["allow"] == "POST"


def test_the_callers_request_id_is_answered(server: Server) -> None:
    for path, body in ((INFER, texts(SUM)), (CHAT, chat()), (V1, {"instances": [SUM]}), ("/v2/nope", {})):
        assert post(server, path, body, x_request_id="mine-1").headers["x-request-id"] == "mine-1"
        assert len(post(server, path, body, x_request_id="not usable").headers["x-request-id"]) == 32


# gRPC


def message(text: str = SUM) -> Any:
    request = service_pb2.ModelInferRequest(model_name="demo")
    request.parameters["max_tokens"].int64_param = 4
    request.inputs.add(name="text_input", datatype="BYTES", shape=[1]).contents.bytes_contents.append(text.encode())
    return request


def _raw_contents(*items: bytes) -> Callable[[Any], None]:
    def change(request: Any) -> None:
        request.inputs[0].ClearField("contents")
        request.raw_input_contents.extend(items)

    return change


def _parameter(name: str, field: str, value: Any) -> Callable[[Any], None]:
    return lambda request: setattr(request.parameters[name], field, value)


@pytest.mark.parametrize(
    ("spoil", "code", "words"),
    [
        (lambda r: setattr(r, "model_name", "nope"), "NOT_FOUND", "no model named 'nope'"),
        (lambda r: setattr(r, "model_name", ""), "NOT_FOUND", "no model named ''"),
        (lambda r: setattr(r, "model_version", "2"), "NOT_FOUND", "version '2'"),
        (lambda r: setattr(r.inputs[0], "datatype", "FP32"), "INVALID_ARGUMENT", "text_input"),
        (lambda r: setattr(r.inputs[0], "datatype", "nope"), "INVALID_ARGUMENT", "text_input"),
        (lambda r: setattr(r.inputs[0], "datatype", "FP16"), "INVALID_ARGUMENT", "raw_input_contents"),
        (lambda r: r.inputs[0].shape.append(2), "INVALID_ARGUMENT", "takes 2"),
        (lambda r: r.inputs[0].shape.append(-2), "INVALID_ARGUMENT", "shape"),
        (lambda r: r.inputs[0].shape.append(2**62), "INVALID_ARGUMENT", "shape"),
        (lambda r: r.inputs[0].shape.extend([1] * 9), "INVALID_ARGUMENT", "shape"),
        (lambda r: r.inputs[0].ClearField("contents"), "INVALID_ARGUMENT", "0 elements"),
        (lambda r: r.ClearField("inputs"), "INVALID_ARGUMENT", "text_input"),
        (lambda r: r.inputs.append(r.inputs[0]), "INVALID_ARGUMENT", "twice"),
        (lambda r: setattr(r.inputs[0], "name", "x" * 100_000), "INVALID_ARGUMENT", "unknown input"),
        (lambda r: setattr(r.inputs[0], "name", "\n☃\x00" * 2000), "INVALID_ARGUMENT", "unknown input"),
        (lambda r: r.inputs[0].contents.bytes_contents.__setitem__(0, b"\xff\xfe"), "INVALID_ARGUMENT", "UTF-8"),
        (lambda r: r.inputs[0].contents.bytes_contents.__setitem__(0, LONG.encode()), "INVALID_ARGUMENT", "1024"),
        (_raw_contents(b"a", b"b"), "INVALID_ARGUMENT", "raw_input_contents"),
        (_raw_contents(b"\x09\x00\x00\x00abc"), "INVALID_ARGUMENT", "cut off"),
        (_raw_contents(b"\x02\x00\x00\x00\xff\xfe"), "INVALID_ARGUMENT", "UTF-8"),
        (lambda r: r.raw_input_contents.append(b""), "INVALID_ARGUMENT", "contents must be empty"),
        (lambda r: r.outputs.add(name="nope"), "INVALID_ARGUMENT", "no output named 'nope'"),
        (_parameter("nonsense", "int64_param", 1), "INVALID_ARGUMENT", "unknown parameter"),
        (_parameter("temperature", "double_param", float("nan")), "INVALID_ARGUMENT", "temperature"),
        (_parameter("temperature", "double_param", float("inf")), "INVALID_ARGUMENT", "temperature"),
        (_parameter("max_tokens", "int64_param", -1), "INVALID_ARGUMENT", "max_tokens"),
        (_parameter("stop", "string_param", "[1"), "", ""),
        (_parameter("logit_bias", "string_param", "{1"), "INVALID_ARGUMENT", "logit_bias"),
        (_parameter("stream", "bool_param", True), "INVALID_ARGUMENT", "ModelStreamInfer"),
        (lambda r: r.parameters["n"].SetInParent(), "", ""),
    ],
)
def test_the_same_mistakes_have_a_code_over_grpc(
    stub: Any, spoil: Callable[[Any], None], code: str, words: str
) -> None:
    request = message()
    spoil(request)
    if not code:
        assert stub.ModelInfer(request).outputs
        return
    with pytest.raises(grpc.RpcError) as refused:
        stub.ModelInfer(request)
    assert refused.value.code() is grpc.StatusCode[code], refused.value.details()
    assert words in refused.value.details()


def test_a_batch_too_large_is_refused_over_grpc(stub: Any) -> None:
    request = message()
    request.inputs[0].shape[0] = 513
    request.inputs[0].contents.bytes_contents.extend([b"a"] * 512)
    with pytest.raises(grpc.RpcError, match="513 prompts") as refused:
        stub.ModelInfer(request)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_an_unknown_model_has_no_metadata_over_grpc_and_is_not_ready(stub: Any) -> None:
    for fields, word in (({"name": "nope"}, "nope"), ({"name": "demo", "version": "2"}, "version '2'")):
        with pytest.raises(grpc.RpcError, match=word) as refused:
            stub.ModelMetadata(service_pb2.ModelMetadataRequest(**fields))
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND
    assert not stub.ModelReady(service_pb2.ModelReadyRequest(name="nope")).ready, "as Triton answers"


@pytest.mark.parametrize("data", [b"\xff\xff\xff", b"\x0a\x02\xff\xfe", b"\x0a\xff"])
def test_a_message_that_is_no_protobuf_is_an_invalid_argument(server: Server, data: bytes) -> None:
    with grpc.insecure_channel(server.grpc_address) as channel:
        prefix = "/inference.GRPCInferenceService/"
        for name in ("ModelInfer", "ModelMetadata", "RepositoryModelLoad"):
            with pytest.raises(grpc.RpcError, match="decoded") as refused:
                channel.unary_unary(prefix + name)(data)
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        answers = channel.stream_stream(prefix + "ModelStreamInfer")(iter([data, message().SerializeToString()]))
        parsed = [service_pb2.ModelStreamInferResponse.FromString(answer) for answer in answers]
        assert sorted(bool(answer.error_message) for answer in parsed) == [False, True]


def test_too_large_a_message_and_too_much_metadata_are_refused(stub: Any) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        stub.ModelInfer(message("x" * OVER_LIMIT))
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    with pytest.raises(grpc.RpcError) as refused:
        stub.ModelInfer(message(), metadata=[("x-request-id", "x" * 100_000)])
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert stub.ModelInfer(message(), metadata=[("x-request-id", "x" * 4000), ("b-bin", b"\xff")]).outputs


def test_an_unknown_call_is_unimplemented(server: Server) -> None:
    with grpc.insecure_channel(server.grpc_address) as channel:
        for name in ("/inference.GRPCInferenceService/Nope", "/nope.Nope/Nope"):
            with pytest.raises(grpc.RpcError) as refused:
                channel.unary_unary(name)(b"")
            assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


# Faults of ours, with apps and backends that fail on purpose

SECRET = "the secret is in /etc/secret.py"


def failing_edge(app: Any) -> tuple[httpx.AsyncClient, Enforcement]:
    lifecycle = Lifecycle()
    lifecycle.to(State.READY)
    enforcement = Enforcement(lifecycle)
    routed = Routed(app, CHAT, "/v1/messages", "/v1/models/{model_name}:predict", "/v2/models/{model_name}/infer")
    middleware = RequestMiddleware(lifecycle, enforcement, 1 << 20, lambda accept: (b"", ""), dict, recorder(lifecycle))
    middleware.attach(routed, routed)
    return httpx.AsyncClient(transport=httpx.ASGITransport(middleware), base_url="http://edge"), enforcement


def test_json_over_its_limit_is_refused_before_it_is_decoded_and_tensors_beside_it_are_not() -> None:
    reached: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        reached.append(scope["path"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(300):
            yield b" " * 1024

    async def run() -> None:
        lifecycle = Lifecycle()
        lifecycle.to(State.READY)
        middleware = RequestMiddleware(
            lifecycle,
            Enforcement(lifecycle),
            1 << 20,
            lambda accept: (b"", ""),
            dict,
            recorder(lifecycle),
            max_json=200 << 10,
        )
        middleware.attach(Routed(app, "/v2/models/{model_name}/infer"), Routed(app, CHAT))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(middleware), base_url="http://edge") as client:
            for path in (CHAT, INFER):
                for content in (b" " * 300_000, pieces()):
                    answer = await client.post(path, content=content)
                    assert answer.status_code == 413
                    assert "--max-json-mib" in answer.text
            assert (await client.post(CHAT, content=b" " * 100_000)).status_code == 200
            head = {"inference-header-content-length": "2"}
            assert (await client.post(INFER, content=b"{}" + bytes(900_000), headers=head)).status_code == 200
            form = {"content-type": "multipart/form-data; boundary=x"}
            assert (await client.post(CHAT, content=b" " * 300_000, headers=form)).status_code == 200

    asyncio.run(run())
    assert reached == [CHAT, INFER, CHAT]


async def _raises(scope: Any, receive: Any, send: Any) -> None:
    raise RuntimeError(SECRET)


async def _answers_500(scope: Any, receive: Any, send: Any) -> None:
    headers = [(b"content-type", b"text/plain")]
    await send({"type": "http.response.start", "status": 500, "headers": headers})
    await send({"type": "http.response.body", "body": SECRET.encode(), "more_body": True})
    await send({"type": "http.response.body", "body": SECRET.encode()})


async def _raises_after_answering_500(scope: Any, receive: Any, send: Any) -> None:
    await _answers_500(scope, receive, send)
    raise RuntimeError(SECRET)


@pytest.mark.parametrize("app", [_raises, _answers_500, _raises_after_answering_500])
@pytest.mark.parametrize("path", [CHAT, INFER, V1, "/v1/messages"])
def test_a_fault_of_ours_is_answered_with_a_request_id_and_no_internals(app: Any, path: str) -> None:
    async def ask() -> httpx.Response:
        client, enforcement = failing_edge(app)
        async with client:
            answer = await client.post(path, json={}, headers={"x-request-id": "the-id"})
        assert enforcement.in_flight == 0
        return answer

    answer = asyncio.run(ask())
    assert answer.status_code == 500
    assert "the-id" in answer.text
    assert answer.headers["x-request-id"] == "the-id"
    assert "secret" not in answer.text
    if path == "/v1/messages":
        assert answer.json()["error"]["type"] == "api_error"


def test_what_vllm_does_not_implement_is_the_requests_fault(server: Server) -> None:
    answer = post(server, "/v1/systemone", {"questions": {}, "state": None})
    check(answer, 400, "does not support the structured decision API")


def test_a_fault_of_ours_over_grpc_has_a_request_id_and_no_internals() -> None:
    class Backend:
        async def infer(self, request: Any, metadata: Any, message: Any) -> Any:
            raise RuntimeError(SECRET)

        async def pieces(self, *_: Any) -> None:
            """Leave it to `stream`."""

        async def stream(self, request: Any, metadata: Any, new: Any) -> Any:
            yield new()
            raise RuntimeError(SECRET)

    async def ask() -> tuple[Any, Any]:
        lifecycle = Lifecycle()
        lifecycle.to(State.READY)
        servicer = Servicer(lifecycle, Enforcement(lifecycle), recorder(lifecycle))
        servicer.attach(Backend())
        server = grpc.aio.server()
        server.add_generic_rpc_handlers((servicer.handler(),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            with pytest.raises(grpc.RpcError) as refused:
                await stub.ModelInfer(message(), metadata=[("x-request-id", "the-id")])
            answers = [a async for a in stub.ModelStreamInfer(iter([message()]), metadata=[("x-request-id", "the-id")])]
        await server.stop(None)
        return refused.value, answers

    error, (first, second) = asyncio.run(ask())
    assert error.code() is grpc.StatusCode.INTERNAL
    assert error.details() == InternalError("the-id").message
    assert not first.error_message
    assert "the-id" in second.error_message
    assert "secret" not in second.error_message


def test_an_answer_that_fails_in_its_middle_is_cut_off_and_not_mended() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})
        raise RuntimeError(SECRET)

    sent: list[Any] = []

    async def ask() -> None:
        lifecycle = Lifecycle()
        lifecycle.to(State.READY)
        middleware = RequestMiddleware(
            lifecycle, Enforcement(lifecycle), 1 << 20, lambda accept: (b"", ""), dict, recorder(lifecycle)
        )
        middleware.attach(Routed(app, CHAT), Routed(app, CHAT))

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": CHAT, "headers": []}
        await middleware(scope, lambda: asyncio.sleep(60), send)

    asyncio.run(ask())
    assert [part["type"] for part in sent] == ["http.response.start", "http.response.body"]


def test_bad_requests_from_many_threads_leave_good_ones_alone(server: Server) -> None:
    expected = infer(server, texts(SUM))
    found: list[Any] = []

    def work(number: int) -> None:
        for _ in range(5):
            if number % 2:
                found.append(post(server, INFER, texts(SUM, max_tokens="x")).status_code == 400)
            else:
                found.append(infer(server, texts(SUM)) == expected)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 40
