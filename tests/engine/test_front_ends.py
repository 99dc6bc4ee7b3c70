"""Several front-end processes on one engine: `--api-server-count`."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import httpx
import psutil
import pytest

from kserve_vllm.adapters.registry import AdapterRegistry
from kserve_vllm.cli import command as cli
from kserve_vllm.core.errors import ConfigError, InvalidRequest
from kserve_vllm.engine import processes as cores
from kserve_vllm.engine.loras import LoRAs
from kserve_vllm.policy.tenants import digest
from kserve_vllm.servers.listeners import reserve
from tests.engine.calls import call
from tests.support import DEMO, ROOT, Server, free_port, wait_until
from tests.support_redis import RedisServer
from tests.triton import service_pb2, service_pb2_grpc

TWO = ("--api-server-count", "2")
OPEN, ADMIN = "kv-open", "kv-admin"
LIMIT = 100
WORD = "Repeat the word apple."
CAPITALS, FRENCH = "APPLE", "Le mot est apple"
ADAPTERS = ROOT / "runtime" / "kserve_vllm" / "demo" / "adapters"


# What is refused


@pytest.mark.parametrize(
    ("arguments", "environ", "sentence"),
    [
        (
            ["--keys-file", "k.yaml"],
            {},
            r"--api-server-count 2 \(from flag --api-server-count\) and --keys-file: "
            "without Redis every process counts for itself, .* Give --redis-url",
        ),
        (["--requests-per-minute", "9"], {}, "and --requests-per-minute: without Redis"),
        (["--tokens-per-minute", "9"], {}, "and --tokens-per-minute: without Redis"),
        (["--max-concurrent", "9"], {}, "that queue stands in one process.*--max-num-queued-reqs"),
        (["--max-concurrent", "9", "--redis-url", "redis://r"], {}, "that queue stands in one process"),
        (["--max-num-queued-tokens", "9"], {}, "vLLM counts these in each process alone"),
        (["--enable-server-load-tracking"], {}, "/load would tell of one process"),
        ([], {"VLLM_ENABLE_RESPONSES_API_STORE": "1"}, "keeps responses in one process"),
        ([], {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}, "use --adapters-file"),
    ],
)
def test_what_would_hold_for_one_process_only_is_refused(
    arguments: list[str], environ: dict[str, str], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        cli.resolve(["m", *TWO, *arguments], environ)
    cli.resolve(["m", *arguments], environ)  # one front end


@pytest.mark.parametrize(
    "arguments",
    [
        ["--keys-file", "k.yaml", "--redis-url", "redis://r"],
        ["--requests-per-minute", "9", "--redis-url", "redis://r"],
        ["--api-key", "secret"],
        ["--response-cache", "memory"],
        ["--max-num-queued-reqs", "9"],
        ["--adapters-file", "a.yaml"],
        ["--no-enable-server-load-tracking"],
    ],
)
def test_what_holds_for_all_of_them_is_not_refused(arguments: list[str]) -> None:
    settings = cli.resolve(["m", *TWO, *arguments], {"VLLM_ENABLE_RESPONSES_API_STORE": "0"})
    assert settings.server.api_server_count == 2


@pytest.mark.parametrize(
    ("part", "field", "value", "flag"),
    [
        ("parallel", "enable_elastic_ep", True, "--enable-elastic-ep"),
        ("parallel", "data_parallel_backend", "ray", "--data-parallel-backend ray"),
        ("multimodal", "mm_tensor_ipc", "torch_shm", "--mm-tensor-ipc torch_shm"),
    ],
)
def test_what_vllm_can_not_share_is_refused_before_an_engine_is_started(
    monkeypatch: pytest.MonkeyPatch, part: str, field: str, value: Any, flag: str
) -> None:
    from vllm.config import MultiModalConfig, ParallelConfig

    # vLLM's own objects, with a value that vLLM takes only beside others (more GPUs, more packages).
    parts = {"parallel": ParallelConfig(), "multimodal": MultiModalConfig()}
    assert hasattr(parts[part], field)
    object.__setattr__(parts[part], field, value)
    config = SimpleNamespace(
        parallel_config=parts["parallel"], model_config=SimpleNamespace(multimodal_config=parts["multimodal"])
    )
    monkeypatch.setattr(cores, "configure", lambda *_: (config, SimpleNamespace(disable_log_stats=True)))
    started = cores.EngineProcesses(Namespace(), 2)
    with pytest.raises(ConfigError, match=f"^{flag} wants one front end: leave it out, or use --api-server-count 1$"):
        started.start(lambda *_: pytest.fail("an engine was started"))
    assert not started.started


@pytest.mark.parametrize("count", ["0", "-1", "65", "two"])
def test_a_count_that_can_not_be_is_refused(count: str) -> None:
    with pytest.raises(ConfigError, match="api-server-count"):
        cli.resolve(["m", f"--api-server-count={count}"], {})


def test_the_count_is_a_setting_of_the_runtime_and_not_an_engine_flag(tmp_path: Path) -> None:
    assert cli.resolve(["m"], {"KSERVE_VLLM_API_SERVER_COUNT": "3"}).server.api_server_count == 3
    with pytest.raises(ConfigError, match="-asc is a flag of vLLM's own server: use --api-server-count"):
        cli.check_serve_args(["m", "-asc", "2"])
    (tmp_path / "c.yaml").write_text("engine: {api-server-count: 2}")
    with pytest.raises(ConfigError, match="group `server`"):
        cli.check_serve_args(["m", "--config", str(tmp_path / "c.yaml")])


def test_loading_and_counting_by_http_is_refused_where_it_would_reach_one_of_several() -> None:
    host = SimpleNamespace(foreign=dict, base_names=["base"], published=lambda name: True)
    AdapterRegistry(host).check_alone()  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match=r"2 front-end processes .* Change the adapters file"):
        AdapterRegistry(host, 2).check_alone()  # type: ignore[arg-type]


def test_an_adapters_version_has_the_same_number_in_every_process_and_another_content_another_one() -> None:
    client: Any = SimpleNamespace(output_processor=SimpleNamespace(lora_states=SimpleNamespace(_request_update=None)))
    first, second = LoRAs(client, shared=True), LoRAs(client, shared=True)
    second.number("b@2")  # in another order
    numbers = {key: first.number(key) for key in ("a@1", "a@2", "b@2")}
    assert numbers == {key: second.number(key) for key in reversed(numbers)}
    assert len(set(numbers.values())) == 3
    assert all(1 << 32 <= number < 1 << 62 for number in numbers.values())


# Ports


def test_a_port_where_somebody_listens_is_not_had_even_if_he_would_share_it() -> None:
    with socket.socket() as stranger:
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        stranger.bind(("127.0.0.1", 0))
        stranger.listen()
        with pytest.raises(ConfigError, match=r"--http-port \d+ can't be opened"):
            reserve("127.0.0.1", stranger.getsockname()[1], "--http-port")


def test_a_reserved_port_takes_no_connection_and_can_be_shared() -> None:
    with reserve("127.0.0.1", 0, "--http-port") as held, socket.socket() as listener, socket.socket() as client:
        address = held.getsockname()
        with pytest.raises(ConnectionRefusedError), socket.create_connection(address):
            pass
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(address)
        listener.listen()
        client.connect(address)
        listener.accept()[0].close()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--ssl-certfile", "/no/such/file", "--ssl-keyfile", "/no/such/file"], "--ssl-certfile /no/such/file can't"),
        (["--usage-sink", "file:/no/such/folder/usage"], "--usage-sink: /no/such/folder/usage can't be opened"),
    ],
)
def test_a_setting_that_every_process_trips_over_ends_the_start_with_code_2_and_one_sentence(
    arguments: list[str], sentence: str
) -> None:
    ports = ["--http-port", str(free_port()), "--grpc-port", str(free_port())]
    command = [sys.executable, "-m", "kserve_vllm", "serve", *DEMO, *TWO, *ports, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count(sentence) == 1, done.stderr


# One server with two front ends


def links(server: Server, port: int, status: str) -> Counter[int]:
    """How many TCP sockets with this port of ours and in this state each process below the server has."""
    below = {child.pid for child in psutil.Process(server.process.pid).children()}
    return Counter(
        each.pid
        for each in psutil.net_connections("tcp")
        if each.pid in below and each.status == status and each.laddr.port == port
    )


def front_ends(server: Server) -> list[int]:
    """The processes that listen on the HTTP port."""
    return list(links(server, server.http_port, psutil.CONN_LISTEN))


def taken(server: Server, port: int) -> list[int]:
    """How many connections to a port each front end holds."""
    held = links(server, port, psutil.CONN_ESTABLISHED)
    return [held[pid] for pid in front_ends(server)]


class Pair(Server):
    """Two front ends with keys, limits, usage records and adapters.

    Args:
        folder: for its files.
        redis: for the limits.
    """

    def __init__(self, folder: Path, redis: RedisServer) -> None:
        self.folder, self.usage, self.rows = folder, folder / "usage.jsonl", {"loud": "upper"}
        tenants: dict[str, Any] = {"open": {}, "many": {"limits": {"requests_per_minute": LIMIT}}}
        rows = [{"id": name, "tenant": name, "sha256": digest(f"kv-{name}")} for name in tenants]
        rows.append({"id": "admin", "tenant": "ops", "sha256": digest(ADMIN), "admin": True})
        (folder / "keys.json").write_text(json.dumps({"tenants": tenants, "keys": rows}))
        self.declare()
        super().__init__(
            [
                *DEMO,
                *TWO,
                "--max-model-len",
                "1024",
                "--max-num-seqs",
                "32",
                "--keys-file",
                str(folder / "keys.json"),
                "--redis-url",
                redis.url,
                "--redis-timeout",
                "30",  # where it counts as away, each process counts for itself
                "--usage-sink",
                f"file:{self.usage}",
                "--max-num-queued-reqs",
                "1000",
                "--adapters-file",
                str(folder / "adapters.yaml"),
            ],
            {"TMPDIR": str(folder)},
        )

    def declare(self, **likes: str) -> None:
        """Write the list of adapters, each a copy of a demo adapter, with these added or changed."""
        self.rows |= likes
        for name, like in self.rows.items():
            target = self.folder / f"{name}-{like}"
            if not target.exists():
                shutil.copytree(ADAPTERS / like, target)
        rows = [{"name": name, "source": str(self.folder / f"{name}-{like}")} for name, like in self.rows.items()]
        (self.folder / "new").write_text(json.dumps({"adapters": rows}))
        (self.folder / "new").rename(self.folder / "adapters.yaml")

    def says(self, model: str) -> str:
        """The answer to one question, over a connection of its own."""
        return call(self, "chat", OPEN, prompt=WORD, model=model).body

    def control(self, method: str, path: str) -> httpx.Response:
        """A call of an administrator."""
        return httpx.request(method, self.url + path, headers={"authorization": f"Bearer {ADMIN}"}, timeout=30)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """The server, for the tests down to the one that ends it."""
    with RedisServer() as redis:
        running = Pair(tmp_path_factory.mktemp("pair"), redis)
        try:
            yield running.wait_ready()  # type: ignore[misc]
        finally:
            running.stop()


def test_one_of_them_says_that_the_server_is_ready(pair: Pair) -> None:
    assert pair.log.count(f"ready: demo on port {pair.http_port}, gRPC on port {pair.grpc_port}") == 1


def test_both_front_ends_take_connections_over_http_and_grpc(pair: Pair) -> None:
    assert len(front_ends(pair)) == 2
    with contextlib.ExitStack() as stack:
        for _ in range(32):
            client = stack.enter_context(httpx.Client())
            assert client.get(f"{pair.url}/v2/health/ready").json()["ready"] is True
        held = taken(pair, pair.http_port)
        assert sum(held) == 32
        assert all(held), held
        for _ in range(32):
            own = [("grpc.use_local_subchannel_pool", 1)]
            channel = stack.enter_context(grpc.insecure_channel(pair.grpc_address, own))
            assert (
                service_pb2_grpc.GRPCInferenceServiceStub(channel).ServerReady(service_pb2.ServerReadyRequest()).ready
            )
        held = taken(pair, pair.grpc_port)
        assert sum(held) == 32
        assert all(held), held


def test_metrics_of_either_process_are_the_sums_of_both(pair: Pair) -> None:
    protocols = ("chat", "chat-stream", "completions", "infer", "generate-stream", "predict", "grpc", "grpc-stream")
    rounds, tokens = 8, 5
    wanted: dict[tuple[str, ...], float] = {
        ("kserve_vllm_requests_total", "outcome", "ok"): len(protocols) * rounds,
        ("kserve_vllm_output_tokens_total", "tenant", "open"): len(protocols) * rounds * tokens,
        ("kserve_vllm_request_duration_seconds_count",): len(protocols) * rounds,
        ("vllm:request_success_total",): len(protocols) * rounds,
        ("vllm:generation_tokens_total",): len(protocols) * rounds * tokens,
        ("vllm:inter_token_latency_seconds_count",): len(protocols) * rounds * (tokens - 1),
    }

    def read() -> dict[tuple[str, ...], float]:
        return {key: pair.metric(key[0], **dict([key[1:]] if key[1:] else [])) for key in wanted}

    before, seen = read(), records(pair)
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda each: call(pair, each, OPEN, max_tokens=tokens), protocols * rounds))
    assert {answer.status for answer in answers} == {200}

    def grown() -> dict[tuple[str, ...], float]:
        return {key: value - before[key] for key, value in read().items()}

    wait_until(lambda: grown() == wanted, 10, lambda: f"{grown()} is not {wanted}")
    # Each of these comes over a connection of its own.
    assert all(grown() == wanted for _ in range(8))
    wait_until(lambda: pair.metric("kserve_vllm_requests_in_flight") == 0, 5, "requests stay in flight")
    assert pair.metric("vllm:num_requests_running") == 0
    assert pair.metric("kserve_vllm_lifecycle_state", state="ready") == 1
    assert pair.metric("kserve_vllm_redis_up") == 1
    started = {pair.metric("process_start_time_seconds") for _ in range(8)}
    assert started == {psutil.Process(pair.process.pid).create_time()}
    # The usage file holds a whole line for each.
    wait_until(lambda: len(records(pair)) - len(seen) == len(answers), 10, "usage records are missing")


def records(pair: Pair) -> list[dict[str, Any]]:
    """All usage records; a line that is none fails."""
    lines = pair.usage.read_text().splitlines() if pair.usage.exists() else []
    return [json.loads(line) for line in lines]


def test_a_limit_holds_over_both_processes_exactly(pair: Pair) -> None:
    with ThreadPoolExecutor(64) as pool:
        answers = pool.map(lambda _: call(pair, "completions", "kv-many", max_tokens=1).status, range(2 * LIMIT))
    assert Counter(answers) == {200: LIMIT, 429: LIMIT}


def test_adapters_come_and_change_in_both_processes(pair: Pair) -> None:
    def all_say(model: str, text: str) -> bool:
        with ThreadPoolExecutor(16) as pool:
            return all(text in body for body in pool.map(lambda _: pair.says(model), range(16)))

    assert all_say("loud", CAPITALS)
    assert all_say("upper", CAPITALS)  # of --lora-modules
    assert pair.metric("kserve_vllm_adapter_loads_total", adapter="loud") == 1
    pair.declare(accent="french")
    wait_until(lambda: all_say("accent", FRENCH), 60, "the new adapter is not served by both")
    assert all_say("loud", CAPITALS)
    pair.declare(loud="french")
    wait_until(lambda: all_say("loud", FRENCH), 60, "the changed adapter is not served by both")
    pair.declare(loud="upper")
    wait_until(lambda: all_say("loud", CAPITALS), 60, "the adapter that was changed back is not served by both")
    assert all_say("accent", FRENCH)
    row = pair.control("GET", "/v1/adapters/loud").json()
    assert row["state"] == "loaded"
    assert "in_use" not in row


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/adapters/loud/load"),
        ("DELETE", "/v1/adapters/loud"),
        ("GET", "/v1/adapters/stats"),
        ("POST", "/v2/repository/models/loud/unload"),
        ("POST", "/v2/repository/models/demo/unload"),
        ("POST", "/v2/repository/models/demo/load"),
    ],
)
def test_calls_that_would_reach_one_process_are_refused(pair: Pair, method: str, path: str) -> None:
    answer = pair.control(method, path)
    assert answer.status_code == 400, answer.text
    assert "2 front-end processes serve here" in answer.text
    assert pair.status("/v2/health/ready") == 200


def test_the_queue_that_is_not_there_is_empty(pair: Pair) -> None:
    assert pair.control("GET", "/v1/queue/stats").json() == {"slots": 0, "in_use": 0, "waiting": 0}


def stream(server: Server, started: threading.Event, key: str | None = None) -> str:
    """The data lines of a long chat stream over a connection of its own."""
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": "Count."}],
        "stream": True,
        "max_tokens": 500,
        "ignore_eos": True,
        "temperature": 0,
    }
    headers = {"authorization": f"Bearer {key}"} if key else {}
    lines = []
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, headers=headers, timeout=120) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if line.startswith("data: "):
                lines.append(line.removeprefix("data: "))
                started.set()
    return "\n".join(lines)


@contextlib.contextmanager
def streams(server: Server, count: int, key: str | None = None) -> Iterator[list[Any]]:
    """Long streams that have all begun, as futures of their lines; both front ends have some."""
    with ThreadPoolExecutor(count) as pool:
        begun = [threading.Event() for _ in range(count)]
        futures = [pool.submit(stream, server, each, key) for each in begun]
        assert all(each.wait(60) for each in begun)
        assert all(taken(server, server.http_port)), taken(server, server.http_port)
        yield futures


def test_sigterm_drains_both_to_the_last_token_and_ends_with_code_0(pair: Pair) -> None:
    below = pair.children()
    with streams(pair, 16, OPEN) as futures:
        pair.process.send_signal(signal.SIGTERM)
        wait_until(lambda: all(pair.status("/v2/health/ready") == 503 for _ in range(8)), 2, "still ready")
        wait_until(lambda: pair.metric("kserve_vllm_lifecycle_state", state="draining") == 1, 3, "not draining")
        ended = [future.result(120) for future in futures]
    assert all(lines.endswith("[DONE]") for lines in ended)
    assert all('"finish_reason":"length"' in lines for lines in ended)
    assert pair.process.wait(40) == 0, pair.log[-4000:]
    assert_no_processes(below)
    left = [each.name for each in pair.folder.iterdir() if each.name.startswith("kserve-vllm-metrics-")]
    assert left == []


def assert_no_processes(below: list[psutil.Process]) -> None:
    """None of these runs any longer."""

    def running() -> list[psutil.Process]:
        return [each for each in below if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]

    wait_until(lambda: not running(), 15, lambda: f"processes are left over: {running()}")


# What kills it


def kill_engine(server: Server) -> None:
    """SIGKILL for the engine."""
    (engine,) = server.children("EngineCore")
    engine.kill()


def hang_front_end(server: Server) -> None:
    """SIGSTOP for one front end. Its supervisor kills it in the end, and goes on as if it had died by itself."""
    os.kill(front_ends(server)[0], signal.SIGSTOP)


def kill_supervisor(server: Server) -> None:
    """SIGKILL for the process that was started."""
    os.kill(server.process.pid, signal.SIGKILL)


@pytest.mark.parametrize("kill", [kill_engine, hang_front_end, kill_supervisor])
def test_whatever_dies_or_hangs_ends_the_server_with_a_code_that_is_not_0(kill: Callable[[Server], None]) -> None:
    with tempfile.TemporaryDirectory(prefix="front-ends-") as folder:
        arguments = [*DEMO, *TWO, "--max-model-len", "1024", "--engine-stall-timeout", "15"]
        server = Server(arguments, {"TMPDIR": folder})
        try:
            server.wait_ready()
            ended_by(server, kill)
        finally:
            server.stop()


def ended_by(server: Server, kill: Callable[[Server], None]) -> None:
    """Kill, and look at how everything ends."""
    below = server.children()
    with streams(server, 16) as futures:
        since = time.monotonic()
        kill(server)
        failed, whole = [], []
        for future in futures:
            try:
                lines = future.result(60)
            except httpx.TransportError:
                failed.append("torn")
                continue
            (whole if '"finish_reason":"length"' in lines else failed).append(lines)
    code = server.process.wait(40)
    took = time.monotonic() - since
    assert code == (-signal.SIGKILL if kill is kill_supervisor else 1), server.log[-4000:]
    assert_no_processes(below)
    if kill is hang_front_end:
        # Those of the other one are finished.
        assert whole
        assert failed == ["torn"] * len(failed)
        assert "the others are drained" in server.log
    else:
        assert not whole
    if kill is kill_engine:
        assert all("error" in lines for lines in failed)
        assert took < 10 + 2, "longer than --engine-dead-exit-after"
