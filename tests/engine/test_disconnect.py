"""A client that goes away has its request aborted in the engine within a second, in every protocol.

The requests would run to the context's end; the engine's own counters show that they don't.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import httpx
import pytest

from tests.clients import assert_unharmed, running, texts, until
from tests.support import Server
from tests.triton import service_pb2, service_pb2_grpc

WITHIN_S = 1.0
N = 16
LONG: dict[str, Any] = {"max_tokens": 1000, "ignore_eos": True, "temperature": 1.0}
OPENAI: dict[str, Any] = {"model": "demo", **LONG, "n": N}
CHAT = [{"role": "user", "content": "Hello"}]


def finished(server: Server) -> float:
    """Requests that the engine has brought to an end of their own; vLLM counts an abort nowhere."""
    return server.metric("vllm:request_success_total") - server.metric(
        "vllm:request_success_total", finished_reason="abort"
    )


@pytest.fixture(autouse=True)
def nothing_is_left(server: Server) -> Iterator[None]:
    """The request was worked on, was aborted in time and not finished, and nothing remains in flight."""
    assert_unharmed(server)
    before = finished(server)
    yield
    took = until(lambda: running(server) == 0, WITHIN_S)
    assert took <= WITHIN_S
    assert finished(server) == before, "the request ran to its end"
    assert_unharmed(server)


def wait_working(server: Server, count: int = N) -> None:
    until(lambda: server.metric("vllm:num_requests_running") >= count, 20)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {**OPENAI, "messages": CHAT, "stream": True}),
        ("/openai/v1/completions", {**OPENAI, "prompt": "Hello", "stream": True}),
        ("/v2/models/demo/generate_stream", {"text_input": "Hello", "parameters": {**LONG, "n": N}}),
    ],
)
def test_leaving_a_stream_over_http_aborts(server: Server, path: str, body: dict[str, Any]) -> None:
    with httpx.stream("POST", server.url + path, json=body, timeout=60) as response:
        assert response.status_code == 200
        lines = response.iter_lines()
        for _ in range(5):
            next(lines)
        wait_working(server, 1)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {**OPENAI, "messages": CHAT}),
        ("/v1/completions", {**OPENAI, "prompt": "Hello"}),
        ("/v1/completions", {**OPENAI, "prompt": ["Hello"] * N, "n": 1}),
        ("/v2/models/demo/infer", texts("Hello", **LONG, n=N)),
        ("/v2/models/demo/infer", texts(*["Hello"] * N, **LONG)),
        ("/v2/models/demo/generate", {"text_input": "Hello", "parameters": {**LONG, "n": N}}),
        ("/v1/models/demo:predict", {"instances": ["Hello"] * N, "parameters": LONG}),
        ("/v1/models/demo:predict", {"instances": [{"messages": CHAT, "n": N}], "parameters": LONG}),
    ],
)
def test_leaving_before_the_answer_over_http_aborts(server: Server, path: str, body: dict[str, Any]) -> None:
    client = httpx.Client(base_url=server.url, timeout=60)
    failed: list[Exception] = []

    def ask() -> None:
        try:
            client.post(path, json=body)
        except (httpx.TransportError, RuntimeError, OSError) as error:
            failed.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    wait_working(server)
    # The socket under a request in flight is closed, as by a process that dies.
    for connection in client._transport._pool.connections:  # type: ignore[attr-defined]
        stream = connection._connection._network_stream
        stream.get_extra_info("socket").shutdown(2)
    thread.join()
    client.close()
    assert failed


def message(*prompts: str, stream: bool = False, **parameters: Any) -> Any:
    request = service_pb2.ModelInferRequest(model_name="demo")
    tensor = request.inputs.add(name="text_input", datatype="BYTES", shape=[len(prompts)])
    tensor.contents.bytes_contents.extend(prompt.encode() for prompt in prompts)
    request.parameters["max_tokens"].int64_param = LONG["max_tokens"]
    request.parameters["ignore_eos"].bool_param = True
    request.parameters["stream"].bool_param = stream
    for name, value in parameters.items():
        request.parameters[name].int64_param = value
    return request


@pytest.fixture
def channel(server: Server) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.grpc_address) as channel:
        yield channel


def by_cancel(call: Any, channel: grpc.Channel) -> None:
    call.cancel()


def by_closing_the_channel(call: Any, channel: grpc.Channel) -> None:
    channel.close()


@pytest.mark.parametrize("leave", [by_cancel, by_closing_the_channel])
@pytest.mark.parametrize("request_message", [message(*["Hello"] * N), message("Hello", n=N)], ids=["batch", "n"])
def test_leaving_a_unary_call_over_grpc_aborts(
    server: Server, channel: grpc.Channel, leave: Callable[[Any, grpc.Channel], None], request_message: Any
) -> None:
    call = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer.future(request_message)
    wait_working(server)
    leave(call, channel)


def test_a_deadline_over_grpc_aborts(server: Server, channel: grpc.Channel) -> None:
    stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
    with pytest.raises(grpc.RpcError) as late:
        stub.ModelInfer(message(*["Hello"] * N), timeout=0.5)
    assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


@pytest.mark.parametrize("leave", [by_cancel, by_closing_the_channel])
def test_leaving_a_stream_over_grpc_aborts_all_its_requests(
    server: Server, channel: grpc.Channel, leave: Callable[[Any, grpc.Channel], None]
) -> None:
    done = threading.Event()

    def requests() -> Iterator[Any]:
        for _ in range(N):
            yield message("Hello", stream=True)
        done.wait(30)

    call = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer(requests())
    assert not next(call).error_message
    wait_working(server)
    leave(call, channel)
    done.set()


def test_a_reader_that_stops_reading_does_not_stop_the_others(server: Server) -> None:
    body = {"text_input": "Hello", "parameters": {**LONG, "n": 4}}
    with httpx.stream("POST", server.url + "/v2/models/demo/generate_stream", json=body, timeout=60) as response:
        next(response.iter_lines())
        began = time.monotonic()
        answer = httpx.get(server.url + "/v2/models/demo", timeout=10)
        assert answer.status_code == 200
        assert time.monotonic() - began < 5
