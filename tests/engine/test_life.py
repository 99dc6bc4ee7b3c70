"""How the process starts, drains, and behaves when its engine dies or hangs."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.support import DEMO, Server
from tests.triton import client as triton

LONG = {"ignore_eos": True, "max_tokens": 900, "temperature": 0}


def chat_stream(server: Server, started: threading.Event, http2: bool = False) -> tuple[str, list[str]]:
    """Text and raw data lines of one long chat stream."""
    body = {"model": "demo", "messages": [{"role": "user", "content": "Count."}], "stream": True, **LONG}
    text, lines = "", []
    with (
        httpx.Client(http1=not http2, http2=http2, timeout=120) as client,
        client.stream("POST", f"{server.url}/v1/chat/completions", json=body) as response,
    ):
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if line.startswith("data: "):
                lines.append(line.removeprefix("data: "))
                started.set()
                if lines[-1] != "[DONE]" and json.loads(lines[-1]).get("choices"):
                    text += json.loads(lines[-1])["choices"][0]["delta"].get("content") or ""
    return text, lines


def chat_whole(server: Server, started: threading.Event) -> httpx.Response:
    """A long chat answer that is not streamed."""
    started.set()
    body = {"model": "demo", "messages": [{"role": "user", "content": "Count."}], **LONG}
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120)


def v2_infer(server: Server, started: threading.Event) -> httpx.Response:
    """A long V2 answer."""
    started.set()
    tensor = {"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["1 2 3"]}
    return httpx.post(f"{server.url}/v2/models/demo/infer", json={"inputs": [tensor], "parameters": LONG}, timeout=120)


def generate_stream(server: Server, started: threading.Event) -> list[dict[str, Any]]:
    """Events of a long generate stream."""
    body = {"text_input": "1 2 3", "parameters": LONG}
    events = []
    with httpx.stream("POST", f"{server.url}/v2/models/demo/generate_stream", json=body, timeout=120) as response:
        for line in response.iter_lines():
            if line.startswith("data: "):
                events.append(json.loads(line.removeprefix("data: ")))
                started.set()
    return events


def triton_inputs(stream: bool) -> list[triton.InferInput]:
    """A long request in the tensors of Triton's vLLM backend."""
    text = triton.InferInput("text_input", [1], "BYTES")
    text.set_data_from_numpy(np.array([b"1 2 3"], dtype=object))
    sampling = triton.InferInput("sampling_parameters", [1], "BYTES")
    sampling.set_data_from_numpy(np.array([json.dumps(LONG).encode()], dtype=object))
    flag = triton.InferInput("stream", [1], "BOOL")
    flag.set_data_from_numpy(np.array([stream]))
    return [text, sampling, flag]


def grpc_infer(server: Server, started: threading.Event) -> str:
    """A long answer over gRPC."""
    client = triton.InferenceServerClient(server.grpc_address)
    started.set()
    result = client.infer("demo", triton_inputs(stream=False))
    return str(result.as_numpy("text_output")[0].decode())


def grpc_stream(server: Server, started: threading.Event) -> tuple[int, Exception | None]:
    """Number of responses of a long gRPC stream on the port of HTTP, and the error that ended it."""
    client = triton.InferenceServerClient(server.one_port_address)
    done, count, failure = threading.Event(), 0, None

    def receive(result: Any, error: Exception | None) -> None:
        nonlocal count, failure
        started.set()
        if done.is_set():  # what stop_stream itself causes
            return
        if error is not None:
            failure = error
            done.set()
            return
        count += 1
        if result.get_response().parameters["triton_final_response"].bool_param:
            done.set()

    client.start_stream(receive)
    client.async_stream_infer("demo", triton_inputs(stream=True))
    assert done.wait(120), "the gRPC stream neither ended nor failed"
    client.stop_stream(cancel_requests=True)
    return count, failure


ALL: list[Callable[[Server, threading.Event], Any]] = [
    chat_stream,
    chat_whole,
    v2_infer,
    generate_stream,
    grpc_infer,
    grpc_stream,
]


@pytest.fixture
def fresh() -> Iterator[Callable[..., Server]]:
    """Starts a server that the test may end; whatever is left of it is ended afterwards."""
    servers: list[Server] = []

    def start(*arguments: str) -> Server:
        servers.append(Server([*DEMO, "--max-model-len", "1024", *arguments], fresh=True))
        return servers[-1]

    yield start
    for server in servers:
        server.stop(timeout_s=20)


@pytest.fixture(scope="module")
def doomed() -> Iterator[tuple[Server, Server]]:
    """Two servers whose engines the tests end, started side by side since one start leaves half of two cores idle."""
    probes = ["--engine-probe-interval", "1", "--engine-stall-timeout", "3"]
    servers = [Server([*DEMO, "--max-model-len", "1024", *arguments]) for arguments in ([], probes)]
    try:
        first, second = [server.wait_ready() for server in servers]
        yield first, second
    finally:
        for server in servers:
            server.stop(timeout_s=20)


def grpc_health(server: Server) -> int:
    """The standard health service's answer."""
    with grpc.insecure_channel(server.grpc_address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        return int(stub.Check(health_pb2.HealthCheckRequest(), timeout=5).status)


def in_flight(server: Server, count: int) -> tuple[ThreadPoolExecutor, list[Future[Any]]]:
    """All kinds of long requests, and `count` chat streams, every second one over HTTP/2, each of them under way."""
    pool = ThreadPoolExecutor(count + len(ALL))
    works = [*ALL, *(partial(chat_stream, http2=number % 2 == 1) for number in range(count))]
    events = [threading.Event() for _ in works]
    futures = [pool.submit(work, server, event) for work, event in zip(works, events, strict=True)]
    for event in events:
        assert event.wait(60), "a request did not start"
    deadline = time.monotonic() + 20
    while server.metric("vllm:num_requests_running") + server.metric("vllm:num_requests_waiting") < len(works):
        assert time.monotonic() < deadline, "the requests did not reach the engine together"
        time.sleep(0.05)
    return pool, futures


def test_the_port_is_open_while_the_model_loads_and_sigterm_then_drains_32_streams_to_their_last_token(
    fresh: Callable[..., Server],
) -> None:
    server = fresh("--drain-timeout", "60")
    # Loading: the ports answer from the first second or so, live and not ready, everywhere the same.
    deadline = time.monotonic() + 10
    while not server.health("/v2/health/live"):
        assert time.monotonic() < deadline, server.log
        time.sleep(0.05)
    assert time.monotonic() - server.started_at < 5, "the HTTP port took more than five seconds to open"
    body = server.health("/v2/health/ready")
    assert body["ready"] is False
    assert body["state"] in ("starting", "loading")
    assert 0 <= body["seconds"] <= time.monotonic() - server.started_at
    assert server.status("/v2/health/live") == 200
    for path in ("/v2/health/ready", "/health", "/ping", "/v2/models/demo/ready", "/v1/models/demo"):
        assert server.status(path) == 503, path
    assert grpc_health(server) == health_pb2.HealthCheckResponse.NOT_SERVING
    client = triton.InferenceServerClient(server.grpc_address)
    assert client.is_server_live()
    assert not client.is_server_ready()
    assert not client.is_model_ready("demo")
    refused = httpx.post(f"{server.url}/v1/completions", json={"model": "demo", "prompt": "x"})
    assert refused.status_code == 503
    assert refused.headers["retry-after"].isdigit()
    assert "loading" in refused.json()["error"]["message"]

    server.wait_ready()
    for path in ("/v2/health/ready", "/health", "/ping", "/v2/models/demo/ready", "/v1/models/demo"):
        assert server.status(path) == 200, path
    assert grpc_health(server) == health_pb2.HealthCheckResponse.SERVING
    assert client.is_server_ready()
    assert client.is_model_ready("demo")
    client.close()

    pool, futures = in_flight(server, 32)
    # Ctrl-C in a terminal reaches the engine too.
    for child in server.children("VLLM::"):
        child.send_signal(signal.SIGINT)
    server.process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + 1
    while server.status("/v2/health/ready") != 503:
        assert time.monotonic() < deadline, "still ready a second after SIGTERM"
    assert server.health("/v2/health/ready")["state"] == "draining"
    assert server.status("/v2/health/live") == 200
    assert grpc_health(server) == health_pb2.HealthCheckResponse.NOT_SERVING
    late = httpx.post(f"{server.url}/v1/completions", json={"model": "demo", "prompt": "x"})
    assert late.status_code == 503
    assert late.headers["retry-after"].isdigit()
    assert late.headers["connection"] == "close"
    with pytest.raises(triton.InferenceServerException, match="draining") as refusal:
        triton.InferenceServerClient(server.grpc_address).infer("demo", triton_inputs(stream=False))
    assert "UNAVAILABLE" in refusal.value.status()

    results = [future.result(120) for future in futures]
    pool.shutdown()
    chats = [results[0], *results[len(ALL) :]]
    assert len(chats) == 33
    for _, lines in chats:
        assert lines[-1] == "[DONE]"
        assert json.loads(lines[-2])["choices"][0]["finish_reason"] == "length"
    assert results[1].json()["choices"][0]["finish_reason"] == "length"
    assert results[2].json()["outputs"][0]["data"][0]
    assert "error" not in results[3][-1]
    assert results[4]
    assert results[5][1] is None
    assert server.process.wait(30) == 0


def assert_gone(server: Server, futures: list[Future[Any]], since: float, live_within_s: float) -> None:
    """Not live in time, every request in flight answered with an error of its protocol, exit code not 0 in time."""
    while server.status("/v2/health/live") == 200:
        assert time.monotonic() - since < live_within_s, "still live"
        time.sleep(0.05)
    gone = time.monotonic()
    assert gone - since < live_within_s
    if server.process.poll() is None:
        assert server.status("/v2/health/ready") in (503, 0)
    chat, whole, infer, events, unary, stream = futures
    last = json.loads([line for line in chat.result(30)[1] if line != "[DONE]"][-1])
    assert "error" in last, last
    assert whole.result(30).status_code in (500, 503)
    assert "message" in whole.result().json()["error"]
    assert infer.result(30).status_code == 503
    assert infer.result().json()["error"].startswith("The engine died")
    assert "error" in events.result(30)[-1]
    with pytest.raises(triton.InferenceServerException) as error:
        unary.result(30)
    assert "UNAVAILABLE" in error.value.status()
    assert stream.result(30)[1] is not None
    assert server.process.wait(30) == 1
    assert time.monotonic() - gone < 10 + 2, "the runtime stayed up longer than --engine-dead-exit-after"


def test_a_killed_engine_is_not_live_within_5_s_and_every_request_gets_an_error_of_its_protocol(
    doomed: tuple[Server, Server],
) -> None:
    server, _ = doomed
    pool, futures = in_flight(server, 0)
    left = server.children()
    (engine,) = server.children("EngineCore")
    since = time.monotonic()
    os.kill(engine.pid, signal.SIGKILL)
    assert_gone(server, futures, since, live_within_s=5)
    pool.shutdown()
    assert not [child for child in left if child.is_running() and child.status() != "zombie"], "processes are left over"


def test_a_stopped_engine_is_noticed_within_the_probe_interval_and_the_stall_timeout(
    doomed: tuple[Server, Server],
) -> None:
    _, server = doomed
    pool, futures = in_flight(server, 0)
    (engine,) = server.children("EngineCore")
    since = time.monotonic()
    os.kill(engine.pid, signal.SIGSTOP)
    assert_gone(server, futures, since, live_within_s=1 + 3 + 2)
    pool.shutdown()
