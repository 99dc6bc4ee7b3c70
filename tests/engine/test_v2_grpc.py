"""V2 over gRPC, through Triton's and KServe's clients and with plain messages."""

from __future__ import annotations

import asyncio
import json
import queue
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import grpc
import kserve
import numpy as np
import pytest
from google.protobuf import descriptor_pool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from kserve.protocol.grpc import grpc_predict_v2_pb2
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub
from kserve.protocol.infer_type import InferInput, InferRequest

from tests.clients import GREEDY, SUM, assert_unharmed, infer, outputs, texts
from tests.support import Server
from tests.triton import aio, client, service_pb2, service_pb2_grpc

SERVICE = "inference.GRPCInferenceService"


@pytest.fixture
def triton(server: Server) -> Iterator[client.InferenceServerClient]:
    with client.InferenceServerClient(server.grpc_address) as connected:
        yield connected


@pytest.fixture
def channel(server: Server) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.grpc_address) as channel:
        yield channel


@pytest.fixture
def stub(channel: grpc.Channel) -> Any:
    return service_pb2_grpc.GRPCInferenceServiceStub(channel)


def prompt(*texts: str) -> client.InferInput:
    tensor = client.InferInput("text_input", [len(texts)], "BYTES")
    tensor.set_data_from_numpy(np.array([text.encode() for text in texts], dtype=object))
    return tensor


def flag(name: str, value: bool) -> client.InferInput:
    tensor = client.InferInput(name, [1], "BOOL")
    tensor.set_data_from_numpy(np.array([value]))
    return tensor


def sampling(**options: Any) -> client.InferInput:
    tensor = client.InferInput("sampling_parameters", [1], "BYTES")
    tensor.set_data_from_numpy(np.array([json.dumps({**GREEDY, **options}).encode()], dtype=object))
    return tensor


def expected(server: Server, text: str = SUM, **parameters: Any) -> str:
    answer: str = outputs(infer(server, texts(text, **parameters)))["text_output"][0]
    return answer


# Unary calls


def test_health_and_metadata_are_told(triton: client.InferenceServerClient) -> None:
    assert triton.is_server_live()
    assert triton.is_server_ready()
    assert triton.is_model_ready("demo")
    assert triton.is_model_ready("upper", "1")
    assert triton.get_server_metadata().name == "kserve-vllm"
    about = triton.get_model_metadata("org/demo", "1")
    assert about.name == "org/demo"
    assert list(about.versions) == ["1"]
    assert {tensor.name: tensor.datatype for tensor in about.inputs}["text_input"] == "BYTES"
    assert {tensor.name: list(tensor.shape) for tensor in about.outputs}["text_output"] == [-1]


def test_a_batch_is_inferred_with_raw_contents(triton: client.InferenceServerClient, server: Server) -> None:
    answer = triton.infer(
        "demo", [prompt(SUM, "3 + 4 ="), sampling(), flag("exclude_input_in_output", True)], request_id="mine"
    )
    assert [text.decode() for text in answer.as_numpy("text_output")] == [
        expected(server),
        expected(server, "3 + 4 ="),
    ]
    response = answer.get_response()
    assert (response.id, response.model_name, response.model_version) == ("mine", "demo", "1")


def test_the_aio_client_infers(server: Server) -> None:
    async def ask() -> str:
        async with aio.InferenceServerClient(server.grpc_address) as connected:
            assert await connected.is_model_ready("demo")
            answer = await connected.infer("demo", [prompt(SUM)], parameters={"max_tokens": 16, "top_k": 1})
            text: bytes = answer.as_numpy("text_output")[0]
            return text.decode()

    assert asyncio.run(ask()) == expected(server)


def typed(text: str = SUM, model: str = "demo", **parameters: Any) -> Any:
    """A request with typed contents; parameters in the field that suits their type."""
    request = service_pb2.ModelInferRequest(model_name=model, id="typed")
    tensor = request.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    tensor.contents.bytes_contents.append(text.encode())
    kinds = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}
    for name, value in parameters.items():
        setattr(request.parameters[name], kinds[type(value)], value)
    return request


def test_typed_contents_are_answered_with_typed_contents(stub: Any, server: Server) -> None:
    answer = stub.ModelInfer(typed(**GREEDY, return_num_output_tokens=True, ignore_eos=True))
    text, number = answer.outputs
    assert text.contents.bytes_contents[0].decode() == expected(server, ignore_eos=True)
    assert list(number.contents.uint_contents) == [GREEDY["max_tokens"]]
    assert not answer.raw_output_contents
    assert answer.id == "typed"


def test_parameters_may_be_doubles_or_text(stub: Any, server: Server) -> None:
    plain = expected(server)
    answer = stub.ModelInfer(typed(temperature=0.0, max_tokens="16", stop=json.dumps([plain[1:2]])))
    assert answer.outputs[0].contents.bytes_contents[0].decode() == plain[: plain.index(plain[1:2])]
    sampled = {"temperature": 1.9, "max_tokens": 24, "seed": 5, "ignore_eos": True}
    answer = stub.ModelInfer(typed(**sampled))
    assert answer.outputs[0].contents.bytes_contents[0].decode() == expected(server, **sampled)


def test_typed_token_ids_are_answered(stub: Any) -> None:
    request = typed(**GREEDY, ignore_eos=True)
    del request.inputs[:]
    tensor = request.inputs.add(name="input_ids", datatype="INT64", shape=[2, 3])
    tensor.contents.int64_contents.extend([11, 12, 13, 14, 15, 16])
    ids, lengths = stub.ModelInfer(request).outputs
    assert list(ids.shape) == [2, GREEDY["max_tokens"]]
    assert len(ids.contents.int64_contents) == 2 * GREEDY["max_tokens"]
    assert list(lengths.contents.int_contents) == [GREEDY["max_tokens"]] * 2


def test_models_are_indexed_unloaded_and_loaded(triton: client.InferenceServerClient, stub: Any) -> None:
    def states() -> dict[str, str]:
        return {row.name: row.state for row in triton.get_model_repository_index().models}

    assert states() == dict.fromkeys(("demo", "org/demo", "upper", "french"), "READY")
    stub.RepositoryModelUnload(service_pb2.RepositoryModelUnloadRequest(model_name="french"))
    try:
        assert states()["french"] == "UNAVAILABLE"
        assert not triton.is_model_ready("french")
        with pytest.raises(grpc.RpcError) as refused:
            stub.ModelInfer(typed(model="french"))
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        ready = stub.RepositoryIndex(service_pb2.RepositoryIndexRequest(ready=True)).models
        assert "french" not in {row.name for row in ready}
    finally:
        stub.RepositoryModelLoad(service_pb2.RepositoryModelLoadRequest(model_name="french"))
    assert states()["french"] == "READY"


def test_the_base_model_is_unloaded_and_loaded(triton: client.InferenceServerClient, stub: Any, server: Server) -> None:
    triton.unload_model("demo")
    try:
        assert not triton.is_server_ready()
        assert not triton.is_model_ready("demo")
        assert triton.is_server_live()
        with pytest.raises(grpc.RpcError, match="unloaded") as refused:
            stub.ModelInfer(typed())
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        assert ("retry-after", "5") in refused.value.trailing_metadata()
    finally:
        triton.load_model("demo")
    assert triton.is_server_ready()
    assert_unharmed(server)


def test_a_call_of_triton_that_is_not_served_says_so(stub: Any) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        stub.TraceSetting(service_pb2.TraceSettingRequest(model_name="demo"))
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


# ModelStreamInfer


class Stream:
    """Triton's stream with what it calls back put into a queue."""

    def __init__(self, triton: client.InferenceServerClient) -> None:
        self._queue: queue.Queue[tuple[Any, Any]] = queue.Queue()
        triton.start_stream(callback=lambda result, error: self._queue.put((result, error)))

    def next(self) -> tuple[Any, Any]:
        return self._queue.get(timeout=60)

    def until_final(self) -> list[Any]:
        """Responses up to the one that is marked as final."""
        found = []
        while True:
            result, error = self.next()
            assert error is None, error
            found.append(result.get_response())
            if found[-1].parameters["triton_final_response"].bool_param:
                return found


@pytest.fixture
def stream(triton: client.InferenceServerClient) -> Iterator[Stream]:
    yield Stream(triton)
    triton.stop_stream()


def text_of(response: Any) -> str:
    if not response.outputs:
        return ""
    raw: bytes = response.raw_output_contents[0]
    assert int.from_bytes(raw[:4], "little") == len(raw) - 4
    return raw[4:].decode()


def test_tokens_are_streamed(triton: client.InferenceServerClient, stream: Stream, server: Server) -> None:
    inputs = [prompt(SUM), flag("stream", True), sampling(max_tokens=20, ignore_eos=True)]
    triton.async_stream_infer("demo", inputs, request_id="s")
    responses = stream.until_final()
    assert len(responses) > 5
    assert "".join(map(text_of, responses)) == expected(server, max_tokens=20, ignore_eos=True)
    assert {response.id for response in responses} == {"s"}
    assert [response.parameters["triton_final_response"].bool_param for response in responses[:-1]] == [False] * (
        len(responses) - 1
    )


def test_the_final_response_is_empty_where_asked_for(
    triton: client.InferenceServerClient, stream: Stream, server: Server
) -> None:
    inputs = [prompt(SUM), flag("stream", True), sampling()]
    triton.async_stream_infer("demo", inputs, request_id="s", enable_empty_final_response=True)
    *responses, last = stream.until_final()
    assert not last.outputs
    assert last.id == "s"
    assert "".join(map(text_of, responses)) == expected(server)
    assert all(response.outputs for response in responses)


def test_a_request_without_stream_is_answered_once(
    triton: client.InferenceServerClient, stream: Stream, server: Server
) -> None:
    triton.async_stream_infer("demo", [prompt(SUM)], parameters={"max_tokens": 16, "top_k": 1})
    (response,) = stream.until_final()
    assert text_of(response) == expected(server)


def test_stream_may_be_a_parameter(stub: Any, server: Server) -> None:
    answers = list(stub.ModelStreamInfer(iter([typed(**GREEDY, stream=True)])))
    assert "".join(text_of(answer.infer_response) for answer in answers) == expected(server)
    assert len(answers) > 1


def test_n_streams_say_which_of_them_a_piece_belongs_to(stub: Any) -> None:
    request = typed(n=3, temperature=1.0, max_tokens=5, ignore_eos=True, stream=True, return_num_output_tokens=True)
    answers = [answer.infer_response for answer in stub.ModelStreamInfer(iter([request]))]
    tokens = dict.fromkeys(range(3), 0)
    for answer in answers:
        tokens[answer.parameters["index"].int64_param] += int.from_bytes(answer.raw_output_contents[1], "little")
    assert tokens == {0: 5, 1: 5, 2: 5}
    finals = [answer.parameters["triton_final_response"].bool_param for answer in answers]
    assert finals == [False] * (len(answers) - 1) + [True]


def test_requests_on_one_stream_are_answered_side_by_side(stub: Any, server: Server) -> None:
    requests = []
    for number, text in enumerate((SUM, "3 + 4 =", "50 - 8 =")):
        request = typed(text, **GREEDY, stream=True)
        request.parameters["max_tokens"].int64_param = 60 if number == 0 else 8
        request.parameters["ignore_eos"].bool_param = True
        request.id = text
        requests.append(request)
    found: dict[str, str] = {}
    finished = []
    for answer in stub.ModelStreamInfer(iter(requests)):
        response = answer.infer_response
        found[response.id] = found.get(response.id, "") + text_of(response)
        if response.parameters["triton_final_response"].bool_param:
            finished.append(response.id)
    assert finished[-1] == SUM, "the first and longest request held up the others"
    assert found == {
        request.id: expected(
            server, request.id, max_tokens=request.parameters["max_tokens"].int64_param, ignore_eos=True
        )
        for request in requests
    }


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda r: setattr(r, "model_name", "nope"), "no model named 'nope'"),
        (lambda r: setattr(r.inputs[0], "datatype", "FP32"), "text_input"),
        (lambda r: r.inputs[0].shape.append(7), "shape"),
        (lambda r: setattr(r.parameters["n"], "string_param", "many"), "n must be an integer"),
        (lambda r: setattr(r.parameters["exclude_input_in_output"], "bool_param", False), "exclude_input_in_output"),
        (lambda r: setattr(r, "model_version", "3"), "version '3'"),
    ],
    ids=["model", "datatype", "shape", "n", "exclude", "version"],
)
def test_an_error_in_a_stream_keeps_it_open(
    stub: Any, server: Server, spoil: Callable[[Any], None], sentence: str
) -> None:
    bad, good = typed(**GREEDY, stream=True), typed(**GREEDY, stream=True)
    spoil(bad)
    bad.id = "bad"
    to_send: queue.Queue[Any] = queue.Queue()
    answers = stub.ModelStreamInfer(iter(to_send.get, None))
    to_send.put(bad)
    error = next(answers)
    assert sentence in error.error_message
    assert error.infer_response.id == "bad"
    to_send.put(good)
    text = ""
    for answer in answers:
        text += text_of(answer.infer_response)
        if answer.infer_response.parameters["triton_final_response"].bool_param:
            break
    assert text == expected(server)
    to_send.put(None)
    assert list(answers) == []


def test_a_grammar_that_no_text_satisfies_is_the_requests_fault(stub: Any) -> None:
    grammar = json.dumps({"grammar": "root ::= root"})
    with pytest.raises(grpc.RpcError) as refused:
        stub.ModelInfer(typed(structured_outputs=grammar))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "no text can satisfy the grammar" in refused.value.details()
    (answer,) = stub.ModelStreamInfer(iter([typed(structured_outputs=grammar, stream=True)]))
    assert "no text can satisfy the grammar" in answer.error_message


def test_the_aio_client_streams(server: Server) -> None:
    async def ask() -> str:
        async def requests() -> AsyncIterator[dict[str, Any]]:
            yield {"model_name": "demo", "inputs": [prompt(SUM), flag("stream", True), sampling()]}

        text = ""
        async with aio.InferenceServerClient(server.grpc_address) as connected:
            async for result, error in connected.stream_infer(requests()):
                assert error is None
                text += result.as_numpy("text_output")[0].decode()
        return text

    assert asyncio.run(ask()) == expected(server)


# KServe's client, health and reflection


def test_kserves_grpc_client_infers(server: Server) -> None:
    async def ask() -> tuple[str, bool]:
        async with kserve.InferenceGRPCClient(server.grpc_address) as connected:
            request = InferRequest(
                "demo",
                [InferInput("text_input", [1], "BYTES", data=[SUM.encode()])],
                parameters={"max_tokens": 16, "top_k": 1},
            )
            answer = await connected.infer(request)
            ready = await connected.is_model_ready("demo") and await connected.is_server_ready()
            return answer.outputs[0].as_numpy()[0].decode(), ready and await connected.is_server_live()

    assert asyncio.run(ask()) == (expected(server), True)


def test_kserves_messages_name_the_model_to_load_too(channel: grpc.Channel) -> None:
    stub = GRPCInferenceServiceStub(channel)
    answer = stub.RepositoryModelUnload(grpc_predict_v2_pb2.RepositoryModelUnloadRequest(model_name="french"))
    assert (answer.model_name, answer.isUnloaded) == ("french", True)
    answer = stub.RepositoryModelLoad(grpc_predict_v2_pb2.RepositoryModelLoadRequest(model_name="french"))
    assert (answer.model_name, answer.isLoaded) == ("french", True)


def test_standard_health_is_checked_and_watched(channel: grpc.Channel, triton: client.InferenceServerClient) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    states = health_pb2.HealthCheckResponse
    for name in ("", SERVICE):
        assert health.Check(health_pb2.HealthCheckRequest(service=name)).status == states.SERVING
    with pytest.raises(grpc.RpcError) as unknown:
        health.Check(health_pb2.HealthCheckRequest(service="nope"))
    assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
    watch = health.Watch(health_pb2.HealthCheckRequest(service=SERVICE), timeout=30)
    assert next(watch).status == states.SERVING
    triton.unload_model("demo")
    try:
        assert next(watch).status == states.NOT_SERVING
    finally:
        triton.load_model("demo")
    assert next(watch).status == states.SERVING
    watch.cancel()


def test_reflection_describes_the_service(channel: grpc.Channel) -> None:
    database = ProtoReflectionDescriptorDatabase(channel)
    assert set(database.get_services()) == {
        SERVICE,
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    pool = descriptor_pool.DescriptorPool(database)
    service = pool.FindServiceByName(SERVICE)
    stream = service.methods_by_name["ModelStreamInfer"]
    assert stream.client_streaming
    assert stream.server_streaming
    assert set(stream.output_type.fields_by_name) == {"error_message", "infer_response"}
    assert "double_param" in pool.FindMessageTypeByName("inference.InferParameter").fields_by_name
    assert {"ServerLive", "ModelInfer", "RepositoryIndex", "RepositoryModelLoad"} <= set(service.methods_by_name)
