"""Tensors, parameters and extensions mean here what they mean to Triton's clients, and to the protocol's."""

from __future__ import annotations

import json
import math
import queue
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import tritonclient.http as triton_http

from tests.clients import GREEDY, SUM, infer, outputs, post, tensor, texts
from tests.support import Server
from tests.triton import client, service_pb2, service_pb2_grpc

LONG = "Tell me about KServe"
OUTPUTS = [
    *("text_output", "output_ids", "output_lengths", "finish_reason", "cumulative_logprob", "logprobs"),
    *("num_input_tokens", "num_output_tokens"),
]


def sampling(**options: Any) -> dict[str, Any]:
    return tensor("sampling_parameters", [json.dumps({**GREEDY, **options})])


def flag(name: str, value: bool = True) -> dict[str, Any]:
    return tensor(name, [value], "BOOL")


def streamed(
    server: Server,
    inputs: dict[str, Any],
    parameters: dict[str, Any] | None = None,
    shape: Any = (1,),
    outputs: list[str] | None = None,
) -> list[Any]:
    """Answers of ModelStreamInfer through Triton's client; an error is raised."""
    made = []
    for name, value in {"text_input": LONG, "stream": True, **inputs}.items():
        datatype = "BOOL" if isinstance(value, bool) else "BYTES"
        each = client.InferInput(name, list(shape) if name == "text_input" else [1], datatype)
        array = np.array(
            [value if isinstance(value, bool) else value.encode()], dtype=bool if isinstance(value, bool) else object
        )
        each.set_data_from_numpy(array.reshape(shape if name == "text_input" else (1,)))
        made.append(each)
    found: queue.Queue[Any] = queue.Queue()
    with client.InferenceServerClient(server.grpc_address) as connected:
        connected.start_stream(lambda result, error: found.put(error or result))
        wanted = [client.InferRequestedOutput(name) for name in outputs] if outputs else None
        connected.async_stream_infer("demo", made, parameters=parameters or {}, outputs=wanted)
        answers = []
        while True:
            result = found.get(timeout=60)
            if isinstance(result, Exception):
                raise result
            answers.append(result)
            if result.get_response().parameters["triton_final_response"].bool_param:
                return answers


def test_a_message_that_is_not_the_last_has_none_for_its_finish_reason(server: Server) -> None:
    answers = streamed(
        server,
        {
            "return_finish_reason": True,
            "sampling_parameters": json.dumps({**GREEDY, "max_tokens": 4, "ignore_eos": True}),
        },
    )
    reasons = [answer.as_numpy("finish_reason")[0].decode() for answer in answers]
    assert len(reasons) > 1
    assert set(reasons[:-1]) == {"None"}
    assert reasons[-1] == "length"


def test_logprobs_that_were_not_computed_are_null(server: Server) -> None:
    body = {"inputs": [tensor("text_input", [SUM]), sampling(), flag("return_logprobs")]}
    assert outputs(infer(server, body))["logprobs"] == ["null"]
    answers = streamed(server, {"return_logprobs": True, "sampling_parameters": json.dumps(dict(GREEDY))})
    assert {answer.as_numpy("logprobs")[0] for answer in answers} == {b"null"}
    body["inputs"][1] = sampling(logprobs=1)
    (found,) = outputs(infer(server, body))["logprobs"]
    assert len(json.loads(found)) > 1


def test_logprobs_beside_banned_tokens_are_numbers(server: Server) -> None:
    body = texts(SUM, return_logprobs=True, logprobs=5, allowed_token_ids=[24, 25], max_tokens=3)
    (found,) = outputs(infer(server, body))["logprobs"]
    assert "Infinity" not in found
    assert all(math.isfinite(entry["logprob"]) for position in json.loads(found) for entry in position.values())


@pytest.mark.parametrize("name", OUTPUTS)
def test_every_output_of_the_metadata_can_be_asked_for_by_name(server: Server, name: str) -> None:
    listed = httpx.get(f"{server.url}/v2/models/demo").json()["outputs"]
    assert [each["name"] for each in listed] == OUTPUTS
    (answer,) = infer(server, {**texts(SUM), "outputs": [{"name": name}]})["outputs"]
    assert answer["name"] == name
    assert answer["datatype"] == next(each["datatype"] for each in listed if each["name"] == name)
    assert all(value is not None for value in answer["data"])
    ids = post(server, "/tokenize", {"model": "demo", "prompt": SUM}).json()["tokens"]
    (same,) = infer(
        server, {"inputs": [tensor("input_ids", ids, "INT64")], "parameters": dict(GREEDY), "outputs": [{"name": name}]}
    )["outputs"]
    if name in ("text_output", "output_lengths", "finish_reason", "num_output_tokens"):
        assert same["data"] == answer["data"]
    answers = streamed(server, {}, {"max_tokens": "3"}, outputs=[name])
    assert all(each.as_numpy(name) is not None for each in answers)


def test_an_output_that_is_not_there_is_refused(server: Server) -> None:
    answer = post(server, "/v2/models/demo/infer", {**texts(SUM), "outputs": [{"name": "nothing"}]})
    assert answer.status_code == 400
    assert "nothing" in answer.json()["error"]


def test_lora_name_names_an_adapter(server: Server) -> None:
    def ask(name: str | None, model: str = "demo", as_parameter: bool = False) -> httpx.Response:
        inputs = [tensor("text_input", ["What is KServe?"]), flag("exclude_input_in_output")]
        named = {} if name is None else {"lora_name": name}
        body = {"inputs": [*inputs, sampling(**({} if as_parameter else named))]}
        if as_parameter:
            body["parameters"] = named
        return post(server, f"/v2/models/{model}/infer", body)

    upper = ask(None, "upper").json()["outputs"]
    assert ask("upper").json()["outputs"] == upper
    assert ask("upper", as_parameter=True).json()["outputs"] == upper
    assert ask(None).json()["outputs"] != upper
    for wrong in ("nobody", "demo", 3):
        refused = ask(wrong)  # type: ignore[arg-type]
        assert refused.status_code == 400
        assert "lora_name" in refused.json()["error"]
    answers = streamed(server, {"sampling_parameters": json.dumps({**GREEDY, "lora_name": "upper"})})
    assert b"".join(each.as_numpy("text_output")[0] for each in answers).isupper()


def test_parameters_of_tritons_clients_are_taken(server: Server) -> None:
    plain = outputs(infer(server, texts(SUM)))["text_output"]
    with triton_http.InferenceServerClient(server.url.removeprefix("http://")) as connected:
        made = triton_http.InferInput("text_input", [1], "BYTES")
        made.set_data_from_numpy(np.array([SUM.encode()], dtype=object))
        for options in (
            {"priority": 1, "timeout": 60_000_000},
            {"sequence_id": 7, "sequence_start": True, "sequence_end": True},
            {"sequence_id": "seven", "sequence_start": True},
            {"request_compression_algorithm": "gzip", "response_compression_algorithm": "gzip"},
            {"request_compression_algorithm": "deflate", "response_compression_algorithm": "deflate"},
        ):
            answer = connected.infer("demo", [made], parameters=dict(GREEDY), **options)
            assert [each.decode() for each in answer.as_numpy("text_output")] == plain, options
    with client.InferenceServerClient(server.grpc_address) as over_grpc:
        grpc_made = client.InferInput("text_input", [1], "BYTES")
        grpc_made.set_data_from_numpy(np.array([SUM.encode()], dtype=object))
        for options in (
            {"priority": 1, "timeout": 60_000_000},
            {"sequence_id": 7},
            {"sequence_id": "seven", "sequence_end": True},
        ):
            answer = over_grpc.infer("demo", [grpc_made], parameters={"temperature": "0", "max_tokens": 16}, **options)
            assert [each.decode() for each in answer.as_numpy("text_output")] == plain, options


def test_a_timeout_that_runs_out_ends_the_request(server: Server) -> None:
    body = texts(LONG, timeout=1, max_tokens=500, ignore_eos=True)
    answer = post(server, "/v2/models/demo/infer", body)
    assert answer.status_code == 503
    assert "timeout" in answer.json()["error"]
    with pytest.raises(client.InferenceServerException, match="timeout"):
        streamed(server, {}, {"timeout": 1, "max_tokens": "500", "ignore_eos": True})
    assert post(server, "/v2/models/demo/infer", texts(LONG, timeout="soon")).status_code == 400
    assert post(server, "/v2/models/demo/infer", texts(LONG, timeout=0, max_tokens=1)).status_code == 200


@pytest.mark.parametrize("shape", [(1,), (1, 1), (1, 1, 1)])
@pytest.mark.parametrize("more", [{}, {"return_num_output_tokens": True}])
def test_a_streamed_answer_has_the_shape_of_its_prompt(server: Server, shape: tuple[int, ...], more: Any) -> None:
    for answer in streamed(server, more, {"max_tokens": "3"}, shape=shape):
        assert answer.as_numpy("text_output").shape == shape


def test_configuration_and_statistics(server: Server) -> None:
    infer(server, texts(SUM))
    with triton_http.InferenceServerClient(server.url.removeprefix("http://")) as connected:
        config = connected.get_model_config("demo")
        rest = connected.get_inference_statistics("demo")
        assert connected.get_model_config("demo", "1") == config
        all_models = connected.get_inference_statistics()
        extensions = connected.get_server_metadata()["extensions"]
        assert not connected.is_model_ready("nothing")
        with pytest.raises(triton_http.InferenceServerException):
            connected.get_model_config("nothing")
    assert {"model_configuration", "statistics"} <= set(extensions)
    assert config["backend"] == "vllm"
    assert config["model_transaction_policy"] == {"decoupled": True}
    assert {each["name"]: each["data_type"] for each in config["input"]}["text_input"] == "TYPE_STRING"
    assert [each["name"] for each in config["output"]] == OUTPUTS
    with client.InferenceServerClient(server.grpc_address) as over_grpc:
        same = over_grpc.get_model_config("demo", as_json=True)["config"]
        counted = over_grpc.get_inference_statistics("demo", as_json=True)
        assert len(over_grpc.get_inference_statistics(as_json=True)["model_stats"]) > 1
        assert not over_grpc.is_model_ready("nothing")
        assert not over_grpc.is_model_ready("demo", "7")
        assert over_grpc.is_model_ready("demo")
    assert [each["name"] for each in same["input"]] == [each["name"] for each in config["input"]]
    assert same["output"][0]["data_type"] == "TYPE_STRING"
    names = {each["name"] for each in all_models["model_stats"]}
    assert {"demo", "upper"} <= names
    (row,) = rest["model_stats"]
    assert row["inference_stats"]["success"]["count"] >= 1
    assert row["inference_stats"]["success"]["ns"] >= row["inference_stats"]["compute_infer"]["ns"] > 0
    assert (
        int(counted["model_stats"][0]["inference_stats"]["success"]["count"])
        >= row["inference_stats"]["success"]["count"]
    )
    before = row["inference_stats"]
    infer(server, texts(SUM))
    post(server, "/v2/models/demo/infer", texts(SUM, temperature=-1))
    after = httpx.get(f"{server.url}/v2/models/demo/stats").json()["model_stats"][0]["inference_stats"]
    assert after["success"]["count"] == before["success"]["count"] + 1
    assert after["fail"]["count"] == before["fail"]["count"] + 1


def generate(server: Server, path: str = "generate", **parameters: Any) -> httpx.Response:
    body = {"text_input": SUM, "parameters": {**GREEDY, **parameters}}
    return post(server, f"/v2/models/demo/{path}", body)


def test_generate_tells_its_details_in_the_protocols_words(server: Server) -> None:
    ended = generate(server, details=True).json()
    assert ended["details"]["finish_reason"] == "eos_token"
    tokens = ended["details"]["logprobs"]
    assert all(set(token) == {"id", "text", "logprob", "special"} for token in tokens)
    assert all(isinstance(token["id"], int) and token["logprob"] <= 0 for token in tokens)
    assert "".join(token["text"] for token in tokens if not token["special"]) == ended["text_output"]
    assert tokens[-1]["special"]
    assert generate(server, details=True, max_tokens=1).json()["details"]["finish_reason"] == "length"
    stopped = generate(server, details=True, stop=["2"], max_tokens=16).json()
    assert stopped["details"]["finish_reason"] == "stop_sequence"
    assert "details" not in generate(server).json()


def test_generate_stream_has_a_token_in_each_event(server: Server) -> None:
    answer = generate(server, "generate_stream", details=True)
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: ")]
    whole = generate(server, details=True).json()
    assert "".join(event["text_output"] for event in events) == whole["text_output"]
    assert [event["details"]["finish_reason"] for event in events][:-1] == [None] * (len(events) - 1)
    assert events[-1]["details"]["finish_reason"] == "eos_token"
    found = [token for event in events for token in event["details"]["logprobs"]]
    assert [token["id"] for token in found] == [token["id"] for token in whole["details"]["logprobs"]]
    assert [event["details"]["token"] for event in events] == [event["details"]["logprobs"][-1] for event in events]


@pytest.mark.parametrize("path", ["generate", "generate_stream"])
@pytest.mark.parametrize("value", ["yes", "true", 1, 0, []])
def test_stream_must_be_a_bool(server: Server, path: str, value: Any) -> None:
    for body in ({"text_input": SUM, "stream": value}, {"text_input": SUM, "parameters": {"stream": value}}):
        answer = post(server, f"/v2/models/demo/{path}", body)
        assert answer.status_code == 400
        assert "stream" in answer.json()["error"]


@pytest.mark.parametrize("path", ["generate", "generate_stream"])
def test_stream_that_is_null_is_left_out(server: Server, path: str) -> None:
    body = {"text_input": SUM, "stream": None, "parameters": {"stream": None, "max_tokens": 2}}
    answer = post(server, f"/v2/models/demo/{path}", body)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream" if "stream" in path else "application/json")


@pytest.mark.parametrize("prefixed", [False, True])
def test_a_body_without_json_is_the_prompt(server: Server, prefixed: bool) -> None:
    raw = SUM.encode()
    body = len(raw).to_bytes(4, "little") + raw if prefixed else raw
    answer = httpx.post(
        f"{server.url}/v2/models/demo/infer",
        content=body,
        headers={"inference-header-content-length": "0", "content-type": "application/octet-stream"},
        timeout=60,
    )
    assert answer.status_code == 200, answer.text
    length = int(answer.headers["inference-header-content-length"])
    (described,) = json.loads(answer.content[:length])["outputs"]
    assert described["name"] == "text_output"
    rest = answer.content[length:]
    assert int.from_bytes(rest[:4], "little") == len(rest) - 4
    empty = httpx.post(f"{server.url}/v2/models/demo/infer", headers={"inference-header-content-length": "0"})
    assert empty.status_code == 400


def test_the_request_id_comes_back_in_grpc_metadata(server: Server) -> None:
    with grpc.insecure_channel(server.grpc_address) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        for name, request in (
            ("ServerMetadata", service_pb2.ServerMetadataRequest()),
            ("ModelMetadata", service_pb2.ModelMetadataRequest(name="demo")),
        ):
            _, call = getattr(stub, name).with_call(request, metadata=(("x-request-id", "my-id"),))
            assert dict(call.initial_metadata())["x-request-id"] == "my-id"
            _, call = getattr(stub, name).with_call(request)
            assert dict(call.initial_metadata())["x-request-id"]
        with pytest.raises(grpc.RpcError) as refused:
            stub.ModelMetadata.with_call(service_pb2.ModelMetadataRequest(name="no"), metadata=(("x-request-id", "i"),))
        assert dict(refused.value.initial_metadata())["x-request-id"] == "i"
        call = stub.ModelStreamInfer(iter(()), metadata=(("x-request-id", "stream-id"),))
        assert dict(call.initial_metadata())["x-request-id"] == "stream-id"
