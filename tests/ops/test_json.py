"""With `--json` standard output has one document, whatever becomes of a command; on its keys scripts rely."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from kserve_vllm.cli import command as cli
from kserve_vllm.ops import restart
from tests.ops.fake_api import FakeApi
from tests.ops.test_bench import Stub
from tests.ops.test_restart import World
from tests.ops.test_rollout_run import FakeKnative

NOBODY = "http://127.0.0.1:9"
"""Nothing listens there."""
SCENARIO = {
    "model": {"params": "8B", "gpu": "H100"},
    "arrivals": {"rate": 1, "duration": 60},
    "scaler": {"class": "fixed"},
}
PLAN = ["plan", "--params", "8B", "--gpu", "H100", "--speed", "roofline"]
BENCH = ["--concurrency", "2", "--requests", "2", "--warmup", "0", "--output", "2", "--prompt", "16"]
FAILED = {"error"}


@pytest.fixture
def stub() -> Iterator[Stub]:
    """A server to put load on."""
    running = Stub()
    yield running
    running.stop()


def document(capsys: pytest.CaptureFixture[str], code: int, *arguments: str) -> Any:
    """What a command prints for machines; it has to end with this code."""
    try:
        ended = cli.main([*arguments, "--json"])
    except SystemExit as end:
        ended = int(str(end.code))
    out, said = capsys.readouterr()
    assert ended == code, said
    found = json.loads(out, parse_constant=lambda word: pytest.fail(f"{word} is not of JSON"))
    if isinstance(found, dict) and set(found) == FAILED:
        assert found["error"].keys() == {"message", "exit_code"}
        assert found["error"]["exit_code"] == code
        assert code == 130 or said, "people are told, too"
        assert "Traceback" not in said
    return found


def test_plan(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = document(capsys, 0, *PLAN)
    assert found.keys() == {"model", "traffic", "prices", "chosen", "gpus", "levers", "engines", "not_asked"}
    assert found["chosen"].keys() >= {
        *("gpu", "tensor_parallel_size", "pipeline_parallel_size", "max_model_len", "max_num_seqs", "replicas", "gpus"),
        *("gap_s", "first_token_p95_s", "per_hour", "per_month", "per_million_tokens", "memory_bytes", "kv_tokens"),
    }
    assert document(capsys, 1, *PLAN, "--gap", "1e-12")["chosen"] is None
    for more in (["--gpu", "H100x"], ["--rate", "x"], ["--picture", str(tmp_path / "no" / "folder.png")]):
        assert document(capsys, 2, *PLAN, *more).keys() == FAILED


def test_simulate(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(yaml.safe_dump(SCENARIO))
    found = document(capsys, 0, "simulate", str(file))
    assert found.keys() == {"runs", "best"}
    assert found["runs"][0].keys() == {
        *("name", "scaler", "requests", "duration_s", "slo", "outcomes", "first_token_s", "gap_s", "gpu_hours"),
        *("replica_hours", "least_gpu_hours", "cost", "currency", "cold_starts", "preemptions", "replicas_max"),
        *("speed", "timeline", "took_s"),
    }
    for more in (["--set", "scaler"], ["--picture", str(tmp_path / "no" / "folder.png")]):
        assert document(capsys, 2, "simulate", str(file), *more).keys() == FAILED


def test_bench(capsys: pytest.CaptureFixture[str], stub: Stub, tmp_path: Path) -> None:
    saved = tmp_path / "a.json"
    found = document(capsys, 0, "bench", stub.url, *BENCH, "--save", str(saved))
    assert found.keys() == json.loads(saved.read_text()).keys()
    assert found.keys() >= {"results", "model", "slo"}
    assert found["results"][0].keys() >= {
        *("completed", "failed", "duration", "request_throughput", "output_throughput", "total_input_tokens"),
        *("median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p95_tpot_ms", "median_e2el_ms"),
    }
    compared = document(capsys, 0, "bench", "compare", str(saved), str(saved))
    assert compared.keys() == {"worse", "differences"}
    assert compared["differences"][0].keys() >= {"load", "figure", "old", "new", "low", "high", "verdict"}
    assert document(capsys, 3, "bench", NOBODY, *BENCH).keys() == FAILED
    stub.status = 429
    assert "no room" in document(capsys, 3, "bench", stub.url, *BENCH)["error"]["message"]
    assert document(capsys, 2, "bench", "compare", str(saved), str(tmp_path / "b")).keys() == FAILED


@pytest.mark.parametrize("address", ["http://[", "http://x:99999", "ftp://x", "http://", "http://:80"])
def test_an_address_that_is_none_is_a_sentence(capsys: pytest.CaptureFixture[str], address: str) -> None:
    for command in (["bench", address], ["top", address, "--once"]):
        assert "no address of a server" in document(capsys, 2, *command)["error"]["message"]
    code, key = (1, "findings") if address.startswith("ftp") else (2, "error")
    assert document(capsys, code, "diagnose", "--url", address)[key]


@pytest.mark.parametrize("header", ["ä:x", "a b:c", "a:b\nc: d", ":x", "x"])
def test_a_header_that_is_none_is_a_sentence(capsys: pytest.CaptureFixture[str], header: str) -> None:
    assert "write NAME:VALUE" in document(capsys, 2, "bench", NOBODY, "--header", header)["error"]["message"]


def test_top(capsys: pytest.CaptureFixture[str], api: FakeApi) -> None:
    found = document(capsys, 3, "top", NOBODY, "--once", "--interval", "0.2")
    assert found.keys() == {"name", "traffic_percent", "total", "groups", "servers"}
    assert found["total"].keys() >= {"state", "pods", "running", "waiting", "output_per_s", "kv_used", "error"}
    assert document(capsys, 3, "top", "nothing", "--once", "--interval", "0.2").keys() == FAILED
    assert document(capsys, 3, "top", NOBODY, "--interval", "0.2").keys() == FAILED
    assert document(capsys, 2, "top", NOBODY, "--interval", "0").keys() == FAILED


def test_diagnose(capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, 1, "diagnose", "--url", NOBODY)
    assert found.keys() == {"name", "namespace", "takenAt", "mode", "ready", "unreadable", "findings"}
    assert found["findings"][0].keys() == {"cause", "title", "severity", "rank", "why", "mend", "evidence"}
    assert document(capsys, 0, "diagnose", "--causes")[0].keys() == {"cause", "severity", "rank", "title"}
    assert document(capsys, 2, "diagnose").keys() == FAILED
    assert document(capsys, 2, "diagnose", "--from", "/nowhere").keys() == FAILED


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "clusters: 3", "current-context: x"])
def test_without_a_kubeconfig_it_is_said_what_to_do(
    content: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "config").write_text(content)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    monkeypatch.setattr("kubernetes.config.incluster_config.SERVICE_TOKEN_FILENAME", str(tmp_path / "none"))
    for command in (["diagnose", "x"], ["restart", "x"], ["rollout", "x"], ["top", "x", "--once"]):
        message = document(capsys, 2, *command)["error"]["message"]
        assert "Set KUBECONFIG or give --kubeconfig" in message
        assert "object" not in message.partition("Set KUBECONFIG")[0].replace("Expected object", "")


def test_restart(capsys: pytest.CaptureFixture[str], api: FakeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restart, "POLL_S", 0.01)
    World(api, 2)
    keys = {"method", "replaced", "started", "seconds", "done"}
    planned = document(capsys, 0, "restart", "chat", "--dry-run")
    assert planned.keys() == keys
    assert not planned["done"]
    assert document(capsys, 0, "restart", "chat").keys() == keys
    assert document(capsys, 2, "restart", "nobody").keys() == FAILED
    assert document(capsys, 2, "restart", "chat", "--timeout", "nan").keys() == FAILED
    api.forbidden.add("/api/v1|pods")
    assert document(capsys, 3, "restart", "chat").keys() == FAILED


def test_rollout(capsys: pytest.CaptureFixture[str], api: FakeApi) -> None:
    FakeKnative(api)
    assert document(capsys, 0, "rollout", "chat", "--status") == {}
    for more in (["--prometheus", NOBODY, "--dry-run"], ["--max-gap", "nan"], ["--abort"], []):
        assert document(capsys, 2, "rollout", "chat", "--model", "hf://a/new", *more).keys() == FAILED
    api.forbidden.add("/api/v1|configmaps")
    found = document(capsys, 3, "rollout", "chat", "--status")
    assert found.keys() == FAILED
