"""One question by every protocol: from here through a gateway, and from a pod to the service itself.

In the pod it is a program, `python3 -c SOURCE URL HOST MODEL GRPC_ADDRESS`, which prints JSON. So it takes only what
the image has.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

import httpx

SUM, ANSWER = "17 + 25 =", "42"
_CHAT = [{"role": "user", "content": "What is 17 + 25?"}]


def _text(stream: httpx.Response) -> str:
    """Text of a stream of completions or chats, which has to have an end."""
    text, done = "", False
    for line in stream.iter_lines():
        data = line.removeprefix("data: ")
        if data == "[DONE]":
            done = True
        elif data.startswith("{"):
            for choice in json.loads(data)["choices"]:
                text += choice.get("text") or choice.get("delta", {}).get("content") or ""
    assert done, f"the stream was cut after {text!r}"
    return text


def http(base: str, host: str, model: str, headers: dict[str, str] | None = None) -> dict[str, float]:
    """Ask over every HTTP protocol; milliseconds of each by its name.

    Raises:
        AssertionError: an answer is not the right one.
    """
    took: dict[str, float] = {}
    infer = {
        "inputs": [{"name": "text_input", "datatype": "BYTES", "shape": [2], "data": [SUM, "90 - 31 ="]}],
        "parameters": {"temperature": 0, "max_tokens": 16},
    }
    generate = {"text_input": SUM, "parameters": {"temperature": 0, "max_tokens": 16}}
    completion = {"model": model, "prompt": SUM, "max_tokens": 16, "temperature": 0}
    chat = {"model": model, "messages": _CHAT, "max_tokens": 32, "temperature": 0}
    with httpx.Client(base_url=base, headers={"Host": host, **(headers or {})}, timeout=60, trust_env=False) as client:

        def ask(name: str, path: str, body: Any = None) -> httpx.Response:
            began = time.monotonic()
            answer = client.get(path) if body is None else client.post(path, json=body)
            took[name] = round((time.monotonic() - began) * 1000, 1)
            assert answer.status_code == 200, f"{name}: {answer.status_code} {answer.text[:300]}"
            return answer

        def streamed(name: str, path: str, body: Any) -> str:
            began = time.monotonic()
            with client.stream("POST", path, json={**body, "stream": True}) as answer:
                assert answer.status_code == 200, f"{name}: {answer.status_code} {answer.read()[:300]!r}"
                text = _text(answer)
            took[name] = round((time.monotonic() - began) * 1000, 1)
            return text

        for name, path in {"V2 live": "/v2/health/live", "V2 ready": "/v2/health/ready", "V2 server": "/v2"}.items():
            ask(name, path)
        assert model in str(ask("OpenAI models", "/openai/v1/models").json()["data"])
        assert ANSWER in ask("OpenAI completion", "/openai/v1/completions", completion).json()["choices"][0]["text"]
        assert ANSWER in streamed("OpenAI completion, streamed", "/openai/v1/completions", completion)
        assert ANSWER in ask("OpenAI chat", "/v1/chat/completions", chat).json()["choices"][0]["message"]["content"]
        assert ANSWER in streamed("OpenAI chat, streamed", "/openai/v1/chat/completions", chat)
        responses = ask(
            "OpenAI responses",
            "/v1/responses",
            {"model": model, "input": _CHAT[0]["content"], "max_output_tokens": 32, "temperature": 0},
        )
        assert ANSWER in responses.text
        messages = ask(
            "Anthropic messages",
            "/v1/messages",
            {"model": model, "messages": _CHAT, "max_tokens": 32, "temperature": 0},
        )
        assert ANSWER in messages.text
        assert ask("V2 model", f"/v2/models/{model}").json()["name"] == model
        answer = ask("V2 infer", f"/v2/models/{model}/infer", infer).json()
        texts = next(o["data"] for o in answer["outputs"] if o["name"] == "text_output")
        assert ANSWER in texts[0], texts
        assert "59" in texts[1], texts
        assert ANSWER in ask("V2 generate", f"/v2/models/{model}/generate", generate).json()["text_output"]
        began, text = time.monotonic(), ""
        with client.stream("POST", f"/v2/models/{model}/generate_stream", json=generate) as stream:
            assert stream.status_code == 200, stream.read()
            for line in stream.iter_lines():
                if line.startswith("data:") and "{" in line:
                    text += json.loads(line[5:]).get("text_output", "")
        took["V2 generate, streamed"] = round((time.monotonic() - began) * 1000, 1)
        assert ANSWER in text, text
        predict = ask(
            "V1 predict", f"/v1/models/{model}:predict", {"instances": [SUM], "parameters": {"temperature": 0}}
        ).json()
        assert ANSWER in str(predict["predictions"][0]), predict
    return took


def grpc(address: str, model: str, authority: str = "") -> dict[str, float]:
    """Ask over gRPC: health, reflection, metadata, infer, a stream; milliseconds of each by its name.

    Args:
        address: of the port, or of a gateway that knows the service by `authority`.
    """
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    # By path: importing the kserve package reads sys.argv.
    spec = importlib.util.find_spec("kserve")
    assert spec is not None
    assert spec.submodule_search_locations
    file = Path(spec.submodule_search_locations[0]) / "protocol" / "grpc" / "grpc_predict_v2_pb2.py"
    file_spec = importlib.util.spec_from_file_location("grpc_predict_v2_pb2", file)
    assert file_spec is not None
    assert file_spec.loader is not None
    pb = importlib.util.module_from_spec(file_spec)
    file_spec.loader.exec_module(pb)

    took: dict[str, float] = {}
    options = [("grpc.default_authority", authority)] if authority else []
    with grpc.insecure_channel(address, options) as channel:

        def call(name: str, method: str, request: Any, answer: Any) -> Any:
            began = time.monotonic()
            ask = channel.unary_unary(
                f"/inference.GRPCInferenceService/{method}",
                request_serializer=type(request).SerializeToString,
                response_deserializer=answer.FromString,
            )
            result = ask(request, timeout=60)
            took[name] = round((time.monotonic() - began) * 1000, 1)
            return result

        status = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=60)
        assert status.status == health_pb2.HealthCheckResponse.SERVING, status
        listing = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="*")]), timeout=60
        )
        services = {s.name for answer in listing for s in answer.list_services_response.service}
        assert "inference.GRPCInferenceService" in services, services
        assert call("gRPC ready", "ServerReady", pb.ServerReadyRequest(), pb.ServerReadyResponse).ready
        metadata = call("gRPC model", "ModelMetadata", pb.ModelMetadataRequest(name=model), pb.ModelMetadataResponse)
        assert metadata.name == model, metadata
        request = pb.ModelInferRequest(model_name=model)
        tensor = request.inputs.add(name="text_input", datatype="BYTES", shape=[1])
        tensor.contents.bytes_contents.append(SUM.encode())
        request.parameters["temperature"].string_param = "0"
        answer = call("gRPC infer", "ModelInfer", request, pb.ModelInferResponse)
        assert ANSWER.encode() in answer.SerializeToString(), answer
    return took


if __name__ == "__main__":
    _, _base, _host, _model, _grpc = sys.argv
    print(json.dumps({**http(_base, _host, _model), **(grpc(_grpc, _model) if _grpc != "-" else {})}))
