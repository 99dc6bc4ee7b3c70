"""The whole command with a real Prometheus, which scrapes pages of two versions; the API server is the fake."""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from kserve_vllm.cli import main
from kserve_vllm.ops.rollout.prometheus import FIRST_TOKEN, GAP, Prometheus
from kserve_vllm.telemetry.metrics import DECLARED
from tests.ops.controllers import NAME, NAMESPACE, FakeKnative
from tests.ops.fake_api import FakeApi
from tests.support import free_port, not_checked, wait_until
from tests.tools import install_prometheus

STABLE, CANARY = "chat-predictor-00001", "chat-predictor-00002"


class Version:
    """The metrics page of a pod, with the runtime's own names, labels and buckets."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        declared = {each.name: each for each in DECLARED}
        requests = declared["kserve_vllm_requests"]
        self.requests = Counter(requests.name, requests.text, requests.labels, registry=self.registry)
        self.times = {
            name: Histogram(name, "", declared[name].labels, buckets=declared[name].buckets, registry=self.registry)
            for name in (FIRST_TOKEN, GAP)
        }
        self.started = Gauge("process_start_time_seconds", "", registry=self.registry)
        self.started.set(time.time() - 60)
        self.lock = threading.Lock()

    def serve(self, count: int, outcome: str = "ok", first: float = 0.2, gap: float = 0.02) -> None:
        """Count requests that were served so."""
        with self.lock:
            self.requests.labels("openai", "chat", "chat", "a", outcome).inc(count)
            for _ in range(count):
                self.times[FIRST_TOKEN].labels("chat", "a").observe(first)
                self.times[GAP].labels("chat", "a").observe(gap)

    def page(self) -> bytes:
        """What a scrape gets."""
        with self.lock:
            return generate_latest(self.registry)


@pytest.fixture
def versions() -> dict[str, Version]:
    """A page for each version."""
    return {STABLE: Version(), CANARY: Version()}


@pytest.fixture
def prometheus(tmp_path: Path, versions: dict[str, Version]) -> Iterator[str]:
    """The address of a real Prometheus that scrapes the versions every second."""
    binary = install_prometheus.find("prometheus")
    if binary is None:
        not_checked("no prometheus; see tests/tools/install_prometheus.py")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/plain; version=0.0.4")
            self.end_headers()
            self.wfile.write(versions[self.path.strip("/")].page())

        def log_message(self, *_: Any) -> None:
            pass

    pages = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=pages.serve_forever, args=(0.02,), daemon=True).start()
    jobs = [
        {
            "job_name": revision,
            "metrics_path": f"/{revision}",
            "static_configs": [
                {
                    "targets": [f"127.0.0.1:{pages.server_address[1]}"],
                    "labels": {
                        "namespace": NAMESPACE,
                        "inferenceservice": NAME,
                        "revision": revision,
                        "pod": f"{revision}-pod",
                    },
                }
            ],
        }
        for revision in versions
    ]
    config = tmp_path / "prometheus.yml"
    config.write_text(yaml.safe_dump({"global": {"scrape_interval": "1s"}, "scrape_configs": jobs}))
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with (tmp_path / "prometheus.log").open("w") as log:
        process = subprocess.Popen(
            [
                binary,
                f"--config.file={config}",
                f"--storage.tsdb.path={tmp_path}/data",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            wait_until(lambda: _up(url), 60, "Prometheus is not ready")
            yield url
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)
            pages.shutdown()
            pages.server_close()


def _up(url: str) -> bool:
    try:
        body = httpx.get(f"{url}/api/v1/query", params={"query": "count(up == 1)"}, timeout=2).json()
        return bool(body["data"]["result"]) and body["data"]["result"][0]["value"][1] == "2"
    except (httpx.HTTPError, KeyError, ValueError):
        return False


class Traffic:
    """Serves requests on both versions for as long as it is entered."""

    def __init__(self, versions: dict[str, Version], **canary: Any) -> None:
        self._versions, self._canary = versions, canary
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        errors = self._canary.pop("errors", 0.0)
        while not self._over.wait(0.2):
            self._versions[STABLE].serve(200)
            self._versions[CANARY].serve(round(40 * (1 - errors)), **self._canary)
            if errors:
                self._versions[CANARY].serve(round(40 * errors), "server_error", **self._canary)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def rollout(prometheus: str, *more: str) -> int:
    """The command, quick."""
    return main(
        [
            "rollout",
            NAME,
            "--prometheus",
            prometheus,
            "--model",
            "hf://a/new",
            "--steps",
            "10,100",
            "--interval",
            "3",
            "--initial-delay",
            "1",
            "--count",
            "6",
            "--progress-deadline",
            "60",
            *more,
        ]
    )


def test_a_good_model_is_promoted(
    api: FakeApi, prometheus: str, versions: dict[str, Version], capsys: pytest.CaptureFixture[str]
) -> None:
    world = FakeKnative(api)
    with Traffic(versions):
        assert rollout(prometheus) == 0
    assert world.share(CANARY) == 100
    out = capsys.readouterr().out
    for words in ("error-rate: Successful", "first-token: Successful", "gap: Successful", "promoted: model hf://a/new"):
        assert words in out


@pytest.mark.parametrize(
    ("canary", "metric"),
    [({"errors": 0.1}, "error-rate"), ({"first": 0.9}, "first-token"), ({"gap": 0.024}, "gap")],
    ids=["errs", "slow", "slow within one bucket"],
)
def test_a_worse_model_is_rolled_back(
    canary: dict[str, float],
    metric: str,
    api: FakeApi,
    prometheus: str,
    versions: dict[str, Version],
    capsys: pytest.CaptureFixture[str],
) -> None:
    world = FakeKnative(api)
    more = ["--max-gap", "1.1"] if metric == "gap" else []
    with Traffic(versions, **canary):
        assert rollout(prometheus, *more) == 1
    assert world.restored()
    assert f"{metric}: Failed" in capsys.readouterr().out


def test_the_first_error_of_a_new_series_is_counted(prometheus: str, versions: dict[str, Version]) -> None:
    client = Prometheus(prometheus)
    since = time.time()
    time.sleep(2.5)
    versions[CANARY].serve(1, "server_error")
    versions[CANARY].serve(7)
    time.sleep(2.5)
    sample = client.sample(NAMESPACE, NAME, CANARY, since, time.time())
    assert (sample.errors, sample.requests, sample.pods, sample.restarts) == (1, 8, 1, 0)
    assert sum(sample.histograms[FIRST_TOKEN]) == 8
    assert sample.sums[FIRST_TOKEN] == pytest.approx(8 * 0.2)
    assert client.sample(NAMESPACE, "another", CANARY, since, time.time()).pods == 0


def test_a_process_that_starts_anew_is_seen_and_its_counters_begin_at_zero(
    prometheus: str, versions: dict[str, Version]
) -> None:
    client = Prometheus(prometheus)
    versions[CANARY].serve(50)
    time.sleep(2.5)
    since = time.time()
    versions[CANARY] = Version()
    versions[CANARY].started.set(time.time())
    versions[CANARY].serve(60)
    time.sleep(2.5)
    sample = client.sample(NAMESPACE, NAME, CANARY, since, time.time())
    assert (sample.requests, sample.restarts) == (60, 1)


def test_a_dry_run_says_what_there_is_to_judge(
    api: FakeApi, prometheus: str, versions: dict[str, Version], capsys: pytest.CaptureFixture[str]
) -> None:
    FakeKnative(api)
    assert rollout(prometheus, "--dry-run") == 0
    out = capsys.readouterr().out
    assert "the API server would take it" in out
    assert f"the last ten minutes of {STABLE}:" in out
    assert "nothing was written" in out
    assert api.writes == []
