"""One prompt over each protocol, and what came back, in one form.

Some go over HTTP/2, and gRPC's streams to the port of HTTP: no policy may depend on the way in.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import grpc
import httpx

from tests.clients import tensor
from tests.support import Server
from tests.triton import service_pb2, service_pb2_grpc

PROTOCOLS = (
    "chat",
    "chat-stream",
    "completions",
    "completions-stream",
    "responses",
    "messages",
    "infer",
    "generate",
    "generate-stream",
    "predict",
    "grpc",
    "grpc-stream",
)
CHATS = ("chat", "chat-stream", "responses", "messages")
OVER_HTTP2 = ("completions", "completions-stream", "predict", "generate-stream")
_HTTP_STATUS = {
    "OK": 200,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "INVALID_ARGUMENT": 400,
    "RESOURCE_EXHAUSTED": 429,
    "UNAVAILABLE": 503,
}


@dataclass
class Answer:
    """What came back.

    Attributes:
        status: of HTTP; for gRPC, the one that goes with the code.
        headers: with lower-case names; for gRPC, initial and trailing metadata.
        body: text of the body; for gRPC, the error's details or the text that was generated.
    """

    status: int
    headers: Mapping[str, Any] = field(default_factory=dict)
    body: str = ""


def call(
    server: Server,
    protocol: str,
    key: str | None = None,
    prompt: str | None = None,
    model: str = "demo",
    max_tokens: int = 48,
    **headers: str,
) -> Answer:
    """Send one greedy prompt.

    Args:
        server: to send it to.
        protocol: one of `PROTOCOLS`.
        key: sent as a bearer token.
        prompt: a sum with the answer 42 where none is given.
        headers: further headers or metadata, with underscores for dashes.
    """
    prompt = prompt or ("What is 17 + 25?" if protocol in CHATS else "17 + 25 =")
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    if key is not None:
        sent["authorization"] = f"Bearer {key}"
    if protocol.startswith("grpc"):
        return _grpc(server, protocol, sent, prompt, model, max_tokens)
    stream = protocol.endswith("-stream")
    common: dict[str, Any] = {"model": model, "max_tokens": max_tokens, "temperature": 0.0}
    chat = [{"role": "user", "content": prompt}]
    parameters = {"max_tokens": max_tokens, "temperature": 0.0}
    path, body = {
        "chat": ("/v1/chat/completions", {**common, "messages": chat, "stream": stream}),
        "completions": ("/v1/completions", {**common, "prompt": prompt, "stream": stream}),
        "responses": (
            "/v1/responses",
            {"model": model, "input": prompt, "temperature": 0.0, "max_output_tokens": max_tokens, "store": False},
        ),
        "messages": ("/v1/messages", {**common, "messages": chat}),
        "infer": (f"/v2/models/{model}/infer", {"inputs": [tensor("text_input", [prompt])], "parameters": parameters}),
        "generate": (
            f"/v2/models/{model}/generate{'_stream' if stream else ''}",
            {"text_input": prompt, "parameters": parameters},
        ),
        "predict": (f"/v1/models/{model}:predict", {"instances": [prompt], "parameters": parameters}),
    }[protocol.removesuffix("-stream")]
    second = protocol in OVER_HTTP2
    with httpx.Client(http1=not second, http2=second, timeout=120) as client:
        response = client.post(server.url + path, json=body, headers=sent)
    return Answer(response.status_code, dict(response.headers), response.text)


def texts(body: str) -> str:
    """All text of a body or stream, for comparing what was said."""
    found: list[str] = []

    def walk(tree: object, name: str = "") -> None:
        if isinstance(tree, dict):
            for key, value in tree.items():
                walk(value, key)
        elif isinstance(tree, list):
            for value in tree:
                walk(value, name)
        elif isinstance(tree, str) and name in ("text", "content", "text_output", "data", "predictions"):
            found.append(tree)

    for line in [body] if body.lstrip().startswith("{") else body.splitlines():
        line = line.removeprefix("data: ")
        if line.startswith(("{", "[{")):
            walk(json.loads(line))
    return "".join(found) or body


def _grpc(server: Server, protocol: str, sent: dict[str, str], prompt: str, model: str, max_tokens: int) -> Answer:
    request = service_pb2.ModelInferRequest(model_name=model)
    request.inputs.add(name="text_input", datatype="BYTES", shape=[1]).contents.bytes_contents.append(prompt.encode())
    request.parameters["max_tokens"].int64_param = max_tokens
    request.parameters["temperature"].double_param = 0.0
    with grpc.insecure_channel(server.grpc_address if protocol == "grpc" else server.one_port_address) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        try:
            if protocol == "grpc":
                response, ended = stub.ModelInfer.with_call(request, metadata=tuple(sent.items()), timeout=60)
                metadata = dict(ended.initial_metadata()) | dict(ended.trailing_metadata())
                return Answer(200, metadata, response.outputs[0].contents.bytes_contents[0].decode())
            pieces = list(stub.ModelStreamInfer(iter([request]), metadata=tuple(sent.items()), timeout=60))
        except grpc.RpcError as error:
            metadata = dict(error.initial_metadata() or ()) | dict(error.trailing_metadata() or ())
            return Answer(_HTTP_STATUS[error.code().name], metadata, error.details())
    errors = [piece.error_message for piece in pieces if piece.error_message]
    # A stream answers an error of one of its requests in a message; there is no code in it.
    return Answer(
        0 if errors else 200,
        {},
        errors[0]
        if errors
        else "".join(
            piece.infer_response.raw_output_contents[0][4:].decode()
            for piece in pieces
            if piece.infer_response.raw_output_contents
        ),
    )
