"""One prompt, greedy, gives one text over every protocol."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import openai
import pytest

from tests.clients import infer, outputs, post, texts
from tests.support import Server
from tests.triton import service_pb2, service_pb2_grpc

OPTIONS: dict[str, Any] = {"temperature": 0.0, "max_tokens": 24, "ignore_eos": True}


@pytest.fixture(scope="module")
def stub(server: Server) -> Iterator[Any]:
    with grpc.insecure_channel(server.grpc_address) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


def over_grpc(stub: Any, model: str, prompt: str, raw: bool, stream: bool) -> str:
    request = service_pb2.ModelInferRequest(model_name=model)
    request.parameters["temperature"].double_param = 0.0
    request.parameters["max_tokens"].int64_param = OPTIONS["max_tokens"]
    request.parameters["ignore_eos"].bool_param = True
    tensor = request.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    data = prompt.encode()
    if raw:
        request.raw_input_contents.append(len(data).to_bytes(4, "little") + data)
    else:
        tensor.contents.bytes_contents.append(data)
    if stream:
        request.parameters["stream"].bool_param = True
        answers = stub.ModelStreamInfer(iter([request]))
        return b"".join(answer.infer_response.raw_output_contents[0][4:] for answer in answers).decode()
    answer = stub.ModelInfer(request)
    if raw:
        return str(answer.raw_output_contents[0][4:].decode())
    return str(answer.outputs[0].contents.bytes_contents[0].decode())


@pytest.mark.parametrize("model", ["demo", "org/demo", "upper", "french"])
@pytest.mark.parametrize("prompt", ["17 + 25 =", "What is 17 + 25?", "Count from 1 to 10:", "Überraschung: ☃ 日本"])
def test_one_text_over_every_protocol(server: Server, stub: Any, model: str, prompt: str) -> None:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none") as client:
        ask = {"model": model, "prompt": prompt, "extra_body": OPTIONS}
        text = client.completions.create(**ask).choices[0].text
        chunks = client.completions.create(**ask, stream=True)
        answers = {"OpenAI": text, "OpenAI stream": "".join(chunk.choices[0].text for chunk in chunks)}
    answers["V2 REST"] = outputs(infer(server, texts(prompt, **OPTIONS), model))["text_output"][0]
    for raw in (False, True):
        for stream in (False, True):
            answers[f"V2 gRPC, raw {raw}, stream {stream}"] = over_grpc(stub, model, prompt, raw, stream)
    body = {"text_input": prompt, "parameters": OPTIONS}
    answers["generate"] = post(server, f"/v2/models/{model}/generate", body).json()["text_output"]
    with httpx.stream("POST", f"{server.url}/v2/models/{model}/generate_stream", json=body, timeout=60) as events:
        lines = [json.loads(line[6:]) for line in events.iter_lines() if line]
    answers["generate_stream"] = "".join(event["text_output"] for event in lines)
    v1 = {"instances": [prompt], "parameters": OPTIONS}
    answers["V1"] = post(server, f"/v1/models/{model}:predict", v1).json()["predictions"][0]
    assert text
    assert answers == dict.fromkeys(answers, text)
