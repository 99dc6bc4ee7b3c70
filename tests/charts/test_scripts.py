"""The scripts that the chart puts into containers, run as they are there: python3 -c SCRIPT ARGUMENTS."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.charts.support import CHART, of_kind, render, render_ci, service

SCRIPTS = CHART / "files" / "scripts"


class Hub(ThreadingHTTPServer):
    """A model hub on this machine: a listing, files with Range, and a count of what was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _HubHandler)
        self.files: dict[str, bytes] = {}
        self.asked: list[tuple[str, str | None]] = []
        self.tokens: list[str | None] = []
        self.cut_after: int | None = None
        self.ranges = True

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _HubHandler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.0"

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        hub = self.server
        hub.tokens.append(self.headers.get("Authorization"))
        if self.path.startswith("/api/models/org/model/revision/main"):
            self._send(200, json.dumps(listing(hub.files)).encode())
            return
        name = self.path.removeprefix("/org/model/resolve/c0ffee/")
        hub.asked.append((name, self.headers.get("Range")))
        if name not in hub.files:
            self._send(404, b"")
            return
        body, status = hub.files[name], 200
        wanted = self.headers.get("Range")
        if wanted and hub.ranges:
            first = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if first >= len(body):
                self._send(416, b"")
                return
            body, status = body[first:], 206
        if hub.cut_after is not None and len(body) > hub.cut_after:
            cut, hub.cut_after = hub.cut_after, None
            self._send(status, body[:cut], length=len(body))
            return
        self._send(status, body)

    def _send(self, status: int, body: bytes, length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)


def listing(files: dict[str, bytes]) -> dict[str, Any]:
    """A repository as the hub's API lists it: large files with a SHA-256, others with git's SHA-1."""
    siblings: list[dict[str, Any]] = []
    for name, body in files.items():
        blob = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
        entry: dict[str, Any] = {"rfilename": name, "blobId": blob, "size": len(body)}
        if name.endswith(".safetensors"):
            entry["lfs"] = {"sha256": hashlib.sha256(body).hexdigest(), "size": len(body)}
        siblings.append(entry)
    return {"sha": "c0ffee", "siblings": siblings}


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    server.files = {
        "config.json": b'{"model_type": "llama"}',
        "model.safetensors": bytes(range(256)) * 4096,
        "original/weights.pth": b"not wanted",
    }
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def fill(hub: Hub, root: Path, token: str | None = None, **source: Any) -> subprocess.CompletedProcess[str]:
    """Run the Job's script with the arguments that the chart renders."""
    values = {"huggingFace": {"repository": "org/model", "endpoint": hub.address}, "directory": "a/model", **source}
    (job,) = of_kind(render({"modelCaches": {"m": values}}), "Job").values()
    container = job["spec"]["template"]["spec"]["containers"][0]
    env = {"PATH": os.environ["PATH"], "KSERVE_VLLM_CACHE_ROOT": str(root)} | ({"HF_TOKEN": token} if token else {})
    return subprocess.run(
        [sys.executable, *container["command"][1:], *container["args"]],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def present(root: Path) -> set[str]:
    folder = root / "a/model"
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")}


def test_a_repository_is_fetched_without_what_is_excluded(hub: Hub, tmp_path: Path) -> None:
    done = fill(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert present(tmp_path) == {"config.json", "model.safetensors"}
    assert (tmp_path / "a/model/model.safetensors").read_bytes() == hub.files["model.safetensors"]
    assert "2 files fetched, 0 were there" in done.stdout


def test_a_second_run_fetches_nothing(hub: Hub, tmp_path: Path) -> None:
    fill(hub, tmp_path)
    hub.asked.clear()
    done = fill(hub, tmp_path)
    assert hub.asked == []
    assert "0 files fetched, 2 were there" in done.stdout


def test_a_download_goes_on_where_it_was_cut_off(hub: Hub, tmp_path: Path) -> None:
    hub.cut_after = 100_000
    done = fill(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert ("model.safetensors", "bytes=100000-") in hub.asked
    assert (tmp_path / "a/model/model.safetensors").read_bytes() == hub.files["model.safetensors"]


def test_a_part_of_an_earlier_run_is_used(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "a/model"
    folder.mkdir(parents=True)
    (folder / "model.safetensors.part").write_bytes(hub.files["model.safetensors"][:5000])
    assert fill(hub, tmp_path).returncode == 0
    assert ("model.safetensors", "bytes=5000-") in hub.asked


@pytest.mark.parametrize("ranges", [True, False], ids=["with ranges", "without ranges"])
def test_a_part_that_is_whole_or_wrong_ends_in_the_right_file(hub: Hub, tmp_path: Path, ranges: bool) -> None:
    hub.ranges = ranges
    folder = tmp_path / "a/model"
    folder.mkdir(parents=True)
    (folder / "model.safetensors.part").write_bytes(hub.files["model.safetensors"])
    (folder / "config.json.part").write_bytes(b"#" * 10)
    done = fill(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert (folder / "model.safetensors").read_bytes() == hub.files["model.safetensors"]
    assert (folder / "config.json").read_bytes() == hub.files["config.json"]


def test_a_file_that_was_changed_is_fetched_again(hub: Hub, tmp_path: Path) -> None:
    fill(hub, tmp_path)
    target = tmp_path / "a/model/model.safetensors"
    target.write_bytes(b"x" * len(hub.files["model.safetensors"]))
    done = fill(hub, tmp_path)
    assert "1 files fetched, 1 were there" in done.stdout
    assert target.read_bytes() == hub.files["model.safetensors"]


def test_files_are_checked_even_when_the_ledger_is_lost(hub: Hub, tmp_path: Path) -> None:
    fill(hub, tmp_path)
    (tmp_path / "a/model/.kserve-vllm-cache.json").unlink()
    hub.asked.clear()
    assert "0 files fetched, 2 were there" in fill(hub, tmp_path).stdout
    assert hub.asked == []
    assert (tmp_path / "a/model/.kserve-vllm-cache.json").exists()


def test_a_missing_file_ends_the_job_with_its_name(hub: Hub, tmp_path: Path) -> None:
    sha = hashlib.sha256(b"").hexdigest()
    files = [{"url": f"{hub.address}/org/model/resolve/c0ffee/none", "sha256": sha, "path": "none"}]
    done = fill(hub, tmp_path, huggingFace={}, files=files)
    assert done.returncode == 1
    assert "could not fetch none" in done.stderr


def test_files_by_address_are_fetched_and_checked(hub: Hub, tmp_path: Path) -> None:
    body = hub.files["config.json"]
    url = f"{hub.address}/org/model/resolve/c0ffee/config.json"
    files = [{"url": url, "sha256": hashlib.sha256(body).hexdigest(), "path": "sub/config.json"}]
    assert fill(hub, tmp_path, token="secret", huggingFace={}, files=files).returncode == 0
    assert (tmp_path / "a/model/sub/config.json").read_bytes() == body
    # A token is for the hub, not for any address.
    assert set(hub.tokens) == {None}


def test_the_token_is_sent_to_the_hub(hub: Hub, tmp_path: Path) -> None:
    fill(hub, tmp_path, token="secret")
    assert set(hub.tokens) == {"Bearer secret"}


def test_a_listing_cannot_write_outside_its_directory(hub: Hub, tmp_path: Path) -> None:
    hub.files["../../../outside.json"] = b"{}"
    done = fill(hub, tmp_path)
    assert done.returncode == 1
    assert "leads outside" in done.stderr
    assert not list(tmp_path.rglob("outside.json"))


# The workers of a multi-node service.


def start_worker(tmp_path: Path, peers: list[list[str]] | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the start script with a `kserve-vllm` that prints its arguments, and with `peers` as what DNS answers."""
    fake = tmp_path / "kserve-vllm"
    fake.write_text('#!/bin/sh\necho "$@"\n')
    fake.chmod(0o755)
    prelude = ""
    if peers is not None:
        prelude = (
            "import socket, time\n"
            f"answers = iter({peers!r})\n"
            "def answer(host, *rest, **more):\n"
            "    assert host == 'large-workers-1'\n"
            "    found = next(answers)\n"
            "    if not found: raise socket.gaierror('no such host')\n"
            "    return [(2, 1, 6, '', (address, 0)) for address in found]\n"
            "socket.getaddrinfo = answer\n"
            "time.sleep = lambda seconds: None\n"
        )
    script = prelude + (SCRIPTS / "worker_start.py").read_text()
    base = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "VLLM_HOST_IP": "10.0.0.2"}
    return subprocess.run(
        [sys.executable, "-c", script, "--headless", "--nnodes=2"],
        env=base | env,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_the_worker_of_two_nodes_is_rank_1_without_asking_anyone(tmp_path: Path) -> None:
    done = start_worker(tmp_path, PIPELINE_PARALLEL_SIZE="2")
    assert done.stdout.strip() == "serve --headless --nnodes=2 --node-rank=1"


def test_workers_of_more_nodes_take_their_place_in_the_list_that_all_see(tmp_path: Path) -> None:
    peers = [[], ["10.0.0.2"], ["10.0.0.3", "10.0.0.4", "10.0.0.1"], ["10.0.0.3", "10.0.0.2", "10.0.0.1"]]
    done = start_worker(tmp_path, peers, PIPELINE_PARALLEL_SIZE="4", WORKER_SVC="large-workers-1")
    assert done.stdout.splitlines()[-1] == "serve --headless --nnodes=2 --node-rank=2"
    assert "waiting for 3 workers" in done.stdout


def test_more_than_two_nodes_need_a_kserve_that_names_the_workers(tmp_path: Path) -> None:
    done = start_worker(tmp_path, PIPELINE_PARALLEL_SIZE="3")
    assert done.returncode == 1
    assert "WORKER_SVC" in done.stderr


class _Head(BaseHTTPRequestHandler):
    started = "1.7e+09"

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(f"# HELP x\nprocess_start_time_seconds {self.started}\n".encode())


def probe(tmp_path: Path, port: int) -> int:
    """Exit status of the worker's liveness probe, with its memory and the head's port moved here."""
    script = (SCRIPTS / "worker_live.py").read_text()
    moved = script.replace("/tmp/head-started", str(tmp_path / "head-started")).replace(":8080/", f":{port}/")
    assert f"{{head}}:{port}/metrics" in moved
    env = {"PATH": os.environ["PATH"], "HEAD_SVC": "127.0.0.1"}
    return subprocess.run(
        [sys.executable, "-c", moved], env=env, capture_output=True, timeout=30, check=False
    ).returncode


def test_a_worker_lives_as_long_as_the_head_that_it_joined(tmp_path: Path) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Head)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    port = server.server_port
    try:
        assert probe(tmp_path, 1) == 0, "the head may still be starting"
        assert probe(tmp_path, port) == 0
        assert probe(tmp_path, port) == 0
        _Head.started = "1.8e+09"
        assert probe(tmp_path, port) == 1, "another head"
        _Head.started = "1.7e+09"
        assert probe(tmp_path, port) == 0
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert probe(tmp_path, port) == 1, "the head is gone"


def test_a_worker_that_starts_again_forgets_the_head_of_before(tmp_path: Path) -> None:
    script = (SCRIPTS / "worker_start.py").read_text()
    memory = tmp_path / "head-started"
    memory.write_text("1.7e+09")
    fake = tmp_path / "kserve-vllm"
    fake.write_text("#!/bin/sh\n")
    fake.chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "VLLM_HOST_IP": "10.0.0.2", "PIPELINE_PARALLEL_SIZE": "2"}
    moved = script.replace("/tmp/head-started", str(memory))
    assert moved != script
    subprocess.run([sys.executable, "-c", moved], env=env, check=True, timeout=30)
    assert not memory.exists()


# helm test.


class _Service(BaseHTTPRequestHandler):
    ready_after = 1
    tokens = 8
    bodies: list[dict[str, Any]] = []
    key = ""

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        cls = type(self)
        assert self.path == "/v2/health/ready"
        cls.ready_after -= 1
        self.send_response(200 if cls.ready_after < 0 else 503)
        self.end_headers()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).bodies.append({"path": self.path, **body})
        answers = {
            "/openai/v1/completions": {"usage": {"completion_tokens": self.tokens}},
            "/openai/v1/embeddings": {"data": [{"embedding": [0.5] * self.tokens}]},
        }
        allowed = not self.key or self.headers.get("Authorization") == f"Bearer {self.key}"
        self.send_response(200 if allowed else 401)
        self.end_headers()
        self.wfile.write(json.dumps(answers[self.path] if allowed else {"error": "no key"}).encode())


@pytest.fixture
def answering() -> Iterator[int]:
    _Service.ready_after, _Service.tokens, _Service.bodies, _Service.key = 1, 8, [], ""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Service)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server.server_port
    server.shutdown()
    server.server_close()
    thread.join()


def smoke(
    port: int, name: str, scenario: str, patience: str = "30", key: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the test pod's own command against this machine; `key` is what its Secret holds."""
    pod = of_kind(render_ci(CHART / "ci" / f"{scenario}-values.yaml"), "Pod")[f"{name}-test"]
    container = pod["spec"]["containers"][0]
    arguments = [f"http://127.0.0.1:{port}", *container["args"][1:3], patience, *container["args"][4:]]
    environment = {name: value for name, value in os.environ.items() if name != "API_KEY"}
    return subprocess.run(
        [sys.executable, *container["command"][1:], *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=environment if key is None else {**environment, "API_KEY": key},
    )


def test_helm_test_waits_for_readiness_and_asks_for_one_completion(answering: int) -> None:
    done = smoke(answering, "chat", "gpu-single")
    assert done.returncode == 0, done.stderr
    assert _Service.bodies == [{"path": "/openai/v1/completions", "model": "chat", "prompt": "Hello", "max_tokens": 8}]


def test_helm_test_asks_an_embedding_model_for_an_embedding(answering: int) -> None:
    done = smoke(answering, "embedder", "embeddings")
    assert done.returncode == 0, done.stderr
    assert _Service.bodies == [{"path": "/openai/v1/embeddings", "model": "embedder", "input": "Hello"}]


def test_helm_test_fails_when_the_service_is_not_ready_or_says_nothing(answering: int) -> None:
    _Service.ready_after = 1000
    done = smoke(answering, "chat", "gpu-single", patience="0")
    assert done.returncode == 1
    assert "is not ready after 0 s" in done.stderr
    _Service.ready_after, _Service.tokens = 0, 0
    done = smoke(answering, "chat", "gpu-single")
    assert done.returncode == 1
    assert "answered with nothing" in done.stderr


def test_helm_test_of_a_service_with_keys_sends_one_or_is_content_with_401(answering: int) -> None:
    _Service.key = "secret"
    done = smoke(answering, "chat", "sharing")
    assert (done.returncode, done.stderr) == (0, "")
    assert "asks for an API key; give one in tests.apiKey" in done.stdout
    done = smoke(answering, "chat", "sharing", key="secret")
    assert done.returncode == 0, done.stderr
    assert "wrote 8 tokens" in done.stdout
    # A wrong key, a service that lets everybody in, and one that should be open and is not.
    assert smoke(answering, "chat", "sharing", key="wrong").returncode == 1
    assert smoke(answering, "chat", "gpu-single").returncode == 1
    _Service.key = ""
    done = smoke(answering, "chat", "sharing")
    assert "should ask for an API key, and answered without one" in done.stderr


def test_the_test_pod_takes_its_key_from_the_service_or_from_the_tests() -> None:
    reference = {"secretKeyRef": {"name": "s", "key": "k"}}
    own = service(env=[{"name": "KSERVE_VLLM_API_KEY", "valueFrom": reference}])
    (pod,) = of_kind(render(own), "Pod").values()
    (variable,) = pod["spec"]["containers"][0]["env"]
    assert variable == {"name": "API_KEY", "valueFrom": reference}
    (pod,) = of_kind(
        render({**service(apiKeys={"secretName": "keys"}), "tests": {"apiKey": {"secretName": "plain"}}}), "Pod"
    ).values()
    (variable,) = pod["spec"]["containers"][0]["env"]
    assert variable["valueFrom"] == {"secretKeyRef": {"name": "plain", "key": "api-key"}}
    assert pod["spec"]["containers"][0]["args"][-1] == "keys"
