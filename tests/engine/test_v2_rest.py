"""V2 over REST, through Triton's and KServe's clients and by hand."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import Iterator
from typing import Any

import httpx
import kserve
import numpy as np
import pytest
import tritonclient.http as triton
from kserve.inference_client import RESTConfig
from kserve.protocol.infer_type import InferInput, InferRequest

from tests.clients import GREEDY, SUM, assert_unharmed, infer, outputs, post, tensor, texts
from tests.support import Server

FLAGS = ("return_finish_reason", "return_num_input_tokens", "return_num_output_tokens")


@pytest.fixture
def client(server: Server) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(server.url.removeprefix("http://")) as client:
        yield client


def triton_texts(*prompts: str, binary: bool) -> triton.InferInput:
    array = np.array([prompt.encode() for prompt in prompts], dtype=object)
    tensor = triton.InferInput("text_input", list(array.shape), "BYTES")
    tensor.set_data_from_numpy(array, binary_data=binary)
    return tensor


def ids(server: Server, text: str) -> list[int]:
    body = {"model": "demo", "prompt": text}
    tokens: list[int] = post(server, "/tokenize", body).json()["tokens"]
    return tokens


# Triton's client


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
def test_tritons_client_infers(client: triton.InferenceServerClient, binary_in: bool, binary_out: bool) -> None:
    answer = client.infer(
        "demo",
        [triton_texts(SUM, binary=binary_in)],
        outputs=[triton.InferRequestedOutput("text_output", binary_data=binary_out)],
        request_id="mine",
        parameters=dict(GREEDY),
    )
    text = answer.as_numpy("text_output")[0]
    assert "42" in (text.decode() if binary_out else text)
    assert answer.get_response()["id"] == "mine"
    assert answer.get_response()["model_version"] == "1"
    assert ("data" in answer.get_output("text_output")) is not binary_out


def test_a_batch_answers_each_prompt_as_if_it_were_alone(client: triton.InferenceServerClient, server: Server) -> None:
    prompts = [SUM, "3 + 4 =", "50 - 8 ="]
    answer = client.infer("demo", [triton_texts(*prompts, binary=True)], parameters=dict(GREEDY))
    alone = [outputs(infer(server, texts(prompt)))["text_output"][0] for prompt in prompts]
    assert [text.decode() for text in answer.as_numpy("text_output")] == alone


def test_health_and_metadata_are_told(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    for version in ("", "1"):
        assert client.is_model_ready("demo", version)
        about = client.get_model_metadata("demo", version)
        assert about["name"] == "demo"
        assert about["versions"] == ["1"]
        assert {row["name"]: row["datatype"] for row in about["inputs"]}["text_input"] == "BYTES"
        assert {row["name"]: row["datatype"] for row in about["outputs"]}["text_output"] == "BYTES"
    server = client.get_server_metadata()
    assert server["name"] == "kserve-vllm"
    assert "binary_tensor_data" in server["extensions"]


def test_another_version_than_1_is_not_found(client: triton.InferenceServerClient) -> None:
    assert not client.is_model_ready("demo", "2")
    with pytest.raises(triton.InferenceServerException, match="version '2'"):
        client.infer("demo", [triton_texts(SUM, binary=True)], model_version="2")


@pytest.mark.parametrize("name", ["org/demo", "upper"])
def test_other_names_infer_too(client: triton.InferenceServerClient, name: str) -> None:
    assert client.is_model_ready(name)
    assert client.get_model_metadata(name)["name"] == name
    answer = client.infer(name, [triton_texts(SUM, binary=True)], model_version="1", parameters=dict(GREEDY))
    assert answer.get_response()["model_name"] == name
    assert answer.as_numpy("text_output")[0]


def test_a_percent_encoded_slash_is_part_of_the_name(server: Server) -> None:
    assert infer(server, texts(SUM), model="org%2Fdemo")["model_name"] == "org/demo"


def states(client: triton.InferenceServerClient) -> dict[str, str]:
    return {row["name"]: row["state"] for row in client.get_model_repository_index()}


def test_an_adapter_is_unloaded_and_loaded(client: triton.InferenceServerClient, server: Server) -> None:
    before = outputs(infer(server, texts(SUM), model="upper"))
    assert states(client) == dict.fromkeys(("demo", "org/demo", "upper", "french"), "READY")
    client.unload_model("upper")
    try:
        assert states(client)["upper"] == "UNAVAILABLE"
        assert not client.is_model_ready("upper")
        assert client.is_model_ready("demo")
        refused = post(server, "/v2/models/upper/infer", texts(SUM))
        assert (refused.status_code, "upper" in refused.json()["error"]) == (503, True)
        ready = post(server, "/v2/repository/index", {"ready": True}).json()
        assert "upper" not in {row["name"] for row in ready}
        assert infer(server, texts(SUM))["model_name"] == "demo"
    finally:
        client.load_model("upper")
    assert client.is_model_ready("upper")
    assert outputs(infer(server, texts(SUM), model="upper")) == before


def test_the_base_model_is_unloaded_and_loaded(client: triton.InferenceServerClient, server: Server) -> None:
    client.unload_model("demo")
    try:
        assert states(client)["demo"] == "UNAVAILABLE"
        assert not client.is_server_ready()
        assert client.is_server_live()
        assert not client.is_model_ready("demo")
        assert client.get_model_metadata("demo")["name"] == "demo"
        chat = {"model": "demo", "messages": [{"role": "user", "content": "Hello"}]}
        for path, body in (
            ("/v2/models/demo/infer", texts(SUM)),
            ("/v1/models/demo:predict", {"instances": [SUM]}),
            ("/v1/chat/completions", chat),
        ):
            refused = post(server, path, body)
            assert refused.status_code == 503, path
            assert refused.headers["retry-after"]
            assert "unloaded" in refused.text
    finally:
        client.load_model("demo")
    assert client.is_server_ready()
    assert "42" in outputs(infer(server, texts(SUM)))["text_output"][0]
    assert_unharmed(server)


def test_an_unknown_model_is_neither_loaded_nor_unloaded(client: triton.InferenceServerClient) -> None:
    for call in (client.load_model, client.unload_model):
        with pytest.raises(triton.InferenceServerException, match="no model named 'nope'"):
            call("nope")


def test_tritons_tensors_for_its_vllm_backend_are_taken(client: triton.InferenceServerClient) -> None:
    sampling = triton.InferInput("sampling_parameters", [1], "BYTES")
    sampling.set_data_from_numpy(np.array([json.dumps(GREEDY).encode()], dtype=object))
    flags = []
    for name in ("stream", "exclude_input_in_output", *FLAGS):
        flag = triton.InferInput(name, [1], "BOOL")
        flag.set_data_from_numpy(np.array([name != "stream"]))
        flags.append(flag)
    answer = client.infer("demo", [triton_texts(SUM, binary=True), sampling, *flags])
    assert "42" in answer.as_numpy("text_output")[0].decode()
    assert not answer.as_numpy("text_output")[0].decode().startswith(SUM)
    assert answer.as_numpy("finish_reason")[0] in (b"stop", b"length")
    assert answer.as_numpy("num_input_tokens").dtype == np.uint32
    assert 0 < answer.as_numpy("num_output_tokens")[0] <= GREEDY["max_tokens"]


# KServe's client


def test_kserves_rest_client_infers_over_v2_and_v1(server: Server) -> None:
    async def ask() -> tuple[Any, Any, bool, bool]:
        async with kserve.InferenceRESTClient(RESTConfig(protocol="v2")) as v2:
            prompt = InferInput("text_input", [1], "BYTES", data=[SUM])
            request = InferRequest("demo", [prompt], parameters=dict(GREEDY))
            answer = await v2.infer(server.url, request, model_name="demo")
            ready = await v2.is_model_ready(server.url, "demo") and await v2.is_server_ready(server.url)
            live = await v2.is_server_live(server.url)
        async with kserve.InferenceRESTClient(RESTConfig(protocol="v1")) as v1:
            old = await v1.infer(server.url, {"instances": [SUM], "parameters": dict(GREEDY)}, model_name="demo")
            live = live and await v1.is_server_live(server.url)
            ready = ready and await v1.is_model_ready(server.url, "demo")
        return answer, old, ready, live

    answer, old, ready, live = asyncio.run(ask())
    assert "42" in answer.outputs[0].data[0]
    assert old["predictions"] == answer.outputs[0].data
    assert ready
    assert live


# By hand


@pytest.mark.parametrize("shape", [[4], [2, 2], [4, 1], [1, 2, 2]])
@pytest.mark.parametrize("nested", [True, False])
def test_data_may_be_flat_or_nested_in_any_shape(server: Server, shape: list[int], nested: bool) -> None:
    prompts = np.array([f"{n} + 1 =" for n in range(4)])
    data = prompts.reshape(shape).tolist() if nested else prompts.tolist()
    body = {"inputs": [tensor("text_input", data, shape=shape)], "parameters": dict(GREEDY)}
    (output,) = infer(server, body)["outputs"]
    assert output["shape"] == shape
    assert output["data"] == outputs(infer(server, texts(*prompts.tolist())))["text_output"]


def test_n_above_1_adds_a_last_axis(server: Server) -> None:
    wish = {"n": 3, "temperature": 1.5, "max_tokens": 6, "return_num_output_tokens": True}
    answer = infer(server, texts("One", "Two", **wish))
    for output in answer["outputs"]:
        assert output["shape"] == [2, 3]
        assert len(output["data"]) == 6


def test_token_ids_go_in_and_out(server: Server) -> None:
    prompts = [ids(server, SUM), ids(server, "3 + 4 =")]
    width = max(map(len, prompts))
    padded = [row + [0] * (width - len(row)) for row in prompts]
    body = {
        "inputs": [
            tensor("input_ids", padded, "INT64", [2, width]),
            tensor("input_lengths", [len(row) for row in prompts], "INT32"),
        ],
        "parameters": {**GREEDY, "ignore_eos": True},
    }
    answer = infer(server, body)
    by_name = {output["name"]: output for output in answer["outputs"]}
    assert by_name["output_ids"]["datatype"] == "INT64"
    assert by_name["output_ids"]["shape"] == [2, GREEDY["max_tokens"]]
    assert by_name["output_lengths"]["data"] == [GREEDY["max_tokens"]] * 2
    rows = np.reshape(by_name["output_ids"]["data"], by_name["output_ids"]["shape"]).tolist()
    as_text = [post(server, "/detokenize", {"model": "demo", "tokens": row}).json()["prompt"] for row in rows]
    body = texts(SUM, "3 + 4 =", ignore_eos=True, skip_special_tokens=False)
    assert outputs(infer(server, body))["text_output"] == as_text


def test_one_row_of_token_ids_needs_no_batch_axis(server: Server) -> None:
    row = ids(server, SUM)
    (answer, lengths) = infer(server, {"inputs": [tensor("input_ids", row, "INT32")], "parameters": dict(GREEDY)})[
        "outputs"
    ]
    assert answer["datatype"] == "INT32"
    assert answer["shape"] == [1, lengths["data"][0]]


@pytest.mark.parametrize(
    ("inputs", "repeated"),
    [
        ([], False),
        ([tensor("sampling_parameters", [json.dumps(GREEDY)])], True),
        ([tensor("stream", [False], "BOOL")], True),
        ([tensor("exclude_input_in_output", [True], "BOOL")], False),
        ([tensor("exclude_input_in_output", [False], "BOOL")], True),
    ],
    ids=["plain", "sampling tensor", "stream tensor", "excluded", "included"],
)
def test_the_prompt_is_repeated_where_tritons_backend_would(
    server: Server, inputs: list[dict[str, Any]], repeated: bool
) -> None:
    body = texts(SUM)
    body["inputs"] += inputs
    (text,) = outputs(infer(server, body))["text_output"]
    assert text.startswith(SUM) is repeated
    plain = outputs(infer(server, texts(SUM)))["text_output"][0]
    assert text == (SUM + plain if repeated else plain)


def test_what_is_asked_for_beside_the_text_comes_as_tensors(server: Server) -> None:
    wish = {
        "return_finish_reason": True,
        "return_cumulative_logprob": True,
        "return_logprobs": True,
        "return_num_input_tokens": True,
        "return_num_output_tokens": True,
    }
    body = texts(SUM, **wish, logprobs=2, ignore_eos=True)
    answer = outputs(infer(server, body))
    assert answer["finish_reason"] == ["length"]
    assert answer["num_input_tokens"] == [len(ids(server, SUM))]
    assert answer["num_output_tokens"] == [GREEDY["max_tokens"]]
    (logprobs,) = map(json.loads, answer["logprobs"])
    assert len(logprobs) == GREEDY["max_tokens"]
    best = [max(entry["logprob"] for entry in position.values()) for position in logprobs]
    assert sum(best) == pytest.approx(answer["cumulative_logprob"][0], rel=1e-3)
    assert all(len(position) >= 2 for position in logprobs)


def test_named_outputs_are_answered_in_the_order_asked_for(server: Server) -> None:
    body = texts(SUM, return_finish_reason=True, return_num_output_tokens=True)
    body["outputs"] = [{"name": "num_output_tokens"}, {"name": "text_output"}]
    assert [output["name"] for output in infer(server, body)["outputs"]] == ["num_output_tokens", "text_output"]


def test_binary_tensors_go_both_ways(server: Server) -> None:
    prompts = [SUM.encode(), "ünï ☃".encode()]
    raw = b"".join(struct.pack("<I", len(prompt)) + prompt for prompt in prompts)
    head = json.dumps(
        {
            "id": "bin",
            "inputs": [
                {"name": "text_input", "datatype": "BYTES", "shape": [2], "parameters": {"binary_data_size": len(raw)}},
                {
                    "name": "return_num_output_tokens",
                    "datatype": "BOOL",
                    "shape": [1],
                    "parameters": {"binary_data_size": 1},
                },
                tensor("sampling_parameters", [json.dumps({**GREEDY, "ignore_eos": True})]),
                tensor("exclude_input_in_output", [True], "BOOL"),
            ],
            "parameters": {"binary_data_output": True},
        }
    ).encode()
    answer = httpx.post(
        server.url + "/v2/models/demo/infer",
        content=head + raw + b"\x01",
        headers={"Inference-Header-Content-Length": str(len(head))},
        timeout=60,
    )
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/octet-stream"
    length = int(answer.headers["Inference-Header-Content-Length"])
    tree, rest = json.loads(answer.content[:length]), answer.content[length:]
    sizes = [output["parameters"]["binary_data_size"] for output in tree["outputs"]]
    assert sum(sizes) == len(rest)
    assert not any("data" in output for output in tree["outputs"])
    assert struct.unpack("<2I", rest[sizes[0] :]) == (GREEDY["max_tokens"],) * 2
    found, offset = [], 0
    while offset < sizes[0]:
        (size,) = struct.unpack_from("<I", rest, offset)
        found.append(rest[offset + 4 : offset + 4 + size].decode())
        offset += 4 + size
    expected = texts(SUM, "ünï ☃", ignore_eos=True)
    assert found == outputs(infer(server, expected))["text_output"]


def test_one_output_may_be_binary_beside_a_plain_one(server: Server) -> None:
    body = texts(SUM, return_num_output_tokens=True, ignore_eos=True)
    body["outputs"] = [
        {"name": "text_output"},
        {"name": "num_output_tokens", "parameters": {"binary_data": True}},
    ]
    answer = post(server, "/v2/models/demo/infer", body)
    length = int(answer.headers["Inference-Header-Content-Length"])
    text, number = json.loads(answer.content[:length])["outputs"]
    assert "42" in text["data"][0]
    assert number["parameters"] == {"binary_data_size": 4}
    assert struct.unpack("<I", answer.content[length:]) == (GREEDY["max_tokens"],)


def test_the_chat_template_is_applied_where_asked_for(server: Server) -> None:
    question = "What is 17 + 25?"
    body = texts(question, apply_chat_template=True, max_tokens=24)
    chat = {"model": "demo", "messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 24}
    (text,) = outputs(infer(server, body))["text_output"]
    assert "42" in text
    assert text == post(server, "/v1/chat/completions", chat).json()["choices"][0]["message"]["content"]


def test_one_request_id_may_be_in_use_twice_at_once(server: Server) -> None:
    async def both() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            body = texts(SUM, max_tokens=200, ignore_eos=True)
            calls = [
                client.post("/v2/models/demo/infer", json=body, headers={"x-request-id": "same"}) for _ in range(4)
            ]
            return await asyncio.gather(*calls)

    answers = asyncio.run(both())
    assert [answer.status_code for answer in answers] == [200] * 4
    assert {answer.headers["x-request-id"] for answer in answers} == {"same"}
    assert len({answer.text for answer in answers}) == 1
