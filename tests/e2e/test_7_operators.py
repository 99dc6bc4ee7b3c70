"""Knative mode: the commands of an operator on a service that is being used, judged by a real Prometheus."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from tests.e2e import scraping
from tests.e2e.cluster import Cluster, wait
from tests.e2e.conftest import Record, Suite
from tests.e2e.releases import MODEL, MONITORED, OTHER_MODEL, Release, Values, of_model
from tests.e2e.traffic import Load, Target, fingerprint

pytestmark = pytest.mark.needs("knative")
CHAT = "chat"
_PROMOTED, _ROLLED_BACK = 0, 1
_WITHIN_S = 900.0
_ENDS = ("Complete", "Failed")


@dataclass
class Service:
    """A service that is scraped, and whom to ask."""

    namespace: str
    target: Target
    prometheus: str

    def command(self, *arguments: str) -> list[str]:
        """`kserve-vllm ...`, about this namespace."""
        return [sys.executable, "-u", "-m", "kserve_vllm", *arguments, "--namespace", self.namespace]

    def rollout(self, *arguments: str) -> list[str]:
        """A rollout that looks often and judges early."""
        quick = ("--interval", "10", "--initial-delay", "5", "--count", "12", "--min-samples", "25", "--wait", "120")
        return self.command("rollout", CHAT, *arguments, *quick, "--prometheus", self.prometheus)


def _installed(suite: Suite, word: str) -> tuple[str, Release]:
    """Namespace and release of `chat` on one pod in Knative mode, ready, with a PodMonitor."""
    namespace = suite.namespace(word)
    values: Values = {
        "cluster": {"deploymentMode": "Knative"},
        "inferenceServices": {CHAT: of_model(MODEL)},
        "monitoring": MONITORED,
    }
    release = suite.release(word, namespace, values)
    release.install()
    suite.cluster.wait_ready(namespace, CHAT)
    return namespace, release


@pytest.fixture(scope="module")
def service(suite: Suite, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """`chat` on one pod, read by a Prometheus as the chart's PodMonitor says."""
    scraping.skip_unless_possible(suite.cluster)
    namespace, release = _installed(suite, "op")
    prometheus = scraping.of_namespace(suite.cluster, namespace, tmp_path_factory.mktemp("prometheus"))
    try:
        yield Service(namespace, suite.target(namespace, CHAT), prometheus.url)
    finally:
        prometheus.stop()
    if not suite.keep:
        release.uninstall()


def _run(command: Sequence[str]) -> tuple[int, str]:
    """Exit code and all that a command wrote."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_WITHIN_S)
    return done.returncode, done.stdout + done.stderr


def _killed_at(command: Sequence[str], sign: str) -> str:
    """Start a command and kill it when it has written a line that matches; what it wrote until then."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    too_late = threading.Timer(_WITHIN_S, process.kill)
    too_late.start()
    said: list[str] = []
    try:
        for line in process.stdout:
            said.append(line)
            if re.search(sign, line):
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
                return "".join(said)
        raise AssertionError(f"it ended with {process.wait()} before {sign!r}:\n{''.join(said)}")
    finally:
        too_late.cancel()
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.stdout.close()


def _history(service: Service) -> Any:
    code, said = _run(service.command("rollout", CHAT, "--status", "--json"))
    assert code == 0, said
    return json.loads(said)


@pytest.mark.timeout(1800)
def test_a_worse_canary_is_rolled_back(service: Service, cluster: Cluster, record: Record) -> None:
    """One that never gets ready, one that refuses, one that is slow."""
    stable = fingerprint(service.target)
    worse = {
        "never ready": ("--model", "/models/not-there", "--progress-deadline", "180"),  # for the way back too
        "refuses": ("--arg=--requests-per-minute=6", "--steps", "50,100"),
        "slow": ("--arg=--max-num-seqs=1", "--steps", "50,100"),
    }
    for name, arguments in worse.items():
        with Load(service.target, workers=6, tokens=24, pause_s=0.05, expected=(429,)) as load:
            began = time.monotonic()
            code, said = _run(service.rollout(*arguments))
        seen = f"{name}: {said[-3000:]}"
        record(f"{name}: seconds", time.monotonic() - began)
        record(f"{name}: why", next((at for at in said.splitlines() if "rolling back" in at), "").strip()[:200])
        record(f"{name}: requests, lost", f"{load.count.sent}, {len(load.count.lost)}")
        assert code == _ROLLED_BACK, seen
        assert not load.count.lost, (load.count.lost[:5], seen)
        wait("the stable model alone", lambda: {fingerprint(service.target) for _ in range(5)} == {stable}, 60)
        wait("one pod", lambda: len(cluster.pods(service.namespace, CHAT)) == 1, 180)


def test_a_good_model_is_promoted_though_the_command_is_killed_at_every_step(
    service: Service, cluster: Cluster, record: Record
) -> None:
    stable = fingerprint(service.target)
    # Four processes on a node with two cores are slower now and then by more than a fifth.
    roomy = ("--max-first-token", "5", "--max-gap", "5")
    begin = service.rollout("--model", OTHER_MODEL, "--steps", "10,50,100", *roomy)
    go_on = service.rollout(*roomy)
    # The new model would end at its first token: without a second one there is no gap to judge it by.
    with Load(service.target, workers=6, tokens=24, exactly=True, pause_s=0.05) as load:
        began = time.monotonic()
        _killed_at(begin, r"making the canary")
        for step in ("step 1 of 3", "step 2 of 3", "step 3 of 3"):
            _killed_at(go_on, re.escape(step))
        code, said = _run(go_on)
        took = time.monotonic() - began
        time.sleep(2)
    record("killed", "while the canary was made, and at each of 3 steps")
    record("to the promotion, seconds", took)
    record("requests", load.count.sent)
    record("lost", len(load.count.lost))
    assert code == _PROMOTED, said[-3000:]
    assert not load.count.lost, (load.count.lost[:5], said[-2000:])
    wait("the new model alone", lambda: stable not in {fingerprint(service.target) for _ in range(5)}, 60)
    assert _history(service)["phase"] == "Succeeded"


@pytest.mark.timeout(1800)
def test_a_job_of_the_chart_rolls_out(
    suite: Suite,
    cluster: Cluster,
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    record: Record,
) -> None:
    """With the rights of its own Role alone: a worse model is taken back, then a good one is promoted."""
    address = request.config.option.reachable
    scraping.skip_unless_possible(cluster, address)
    namespace, release = _installed(suite, "job")
    target = suite.target(namespace, CHAT)
    stable = fingerprint(target)
    prometheus = scraping.of_namespace(cluster, namespace, tmp_path_factory.mktemp("prometheus"), address)
    rollout: Values = {
        "model": OTHER_MODEL,
        "steps": [50, 100],
        **{"intervalSeconds": 10, "initialDelaySeconds": 5, "count": 12, "minSamples": 25},
        # Four processes on a node with two cores are slower now and then by more than a fifth.
        **{"maxFirstToken": 5, "maxGap": 5},
    }
    ways: dict[str, tuple[Values, str]] = {
        "one that is not there": ({"model": "/models/not-there", "progressDeadlineSeconds": 240}, "Failed"),
        "a good one": ({"progressDeadlineSeconds": 900}, "Complete"),
    }
    try:
        for name, (changes, wanted) in ways.items():
            began = time.monotonic()
            with Load(target, workers=6, tokens=24, exactly=True, pause_s=0.05, expected=(429,)) as load:
                release.upgrade(
                    {"cluster": {"prometheusAddress": prometheus.url}, "rolloutJobs": {CHAT: {**rollout, **changes}}}
                )
                seen = _end_of_the_job(cluster, namespace)
            record(f"{name}: the Job is", seen)
            record(f"{name}: seconds", time.monotonic() - began)
            record(f"{name}: requests, lost", f"{load.count.sent}, {len(load.count.lost)}")
            assert seen == wanted, _said_by_the_job(cluster, namespace)
            assert not load.count.lost, load.count.lost[:5]
            answers = {fingerprint(target) for _ in range(5)}
            assert (answers == {stable}) is (wanted == "Failed"), answers
    finally:
        prometheus.stop()
    release.uninstall()


def _job(cluster: Cluster, namespace: str) -> Any:
    """The newest rollout Job of a namespace."""
    jobs = cluster.get(f"/apis/batch/v1/namespaces/{namespace}/jobs")["items"]
    return max(jobs, key=lambda each: each["metadata"]["creationTimestamp"])


def _end_of_the_job(cluster: Cluster, namespace: str) -> str:
    """The condition that a rollout's Job ends with: Complete or Failed."""
    ends: list[str] = []

    def ended() -> bool:
        conditions = _job(cluster, namespace).get("status", {}).get("conditions") or []
        ends[:] = [each["type"] for each in conditions if each["status"] == "True" and each["type"] in _ENDS]
        return bool(ends)

    wait("the end of the rollout's Job", ended, _WITHIN_S, seen=lambda: _said_by_the_job(cluster, namespace))
    return ends[0]


def _said_by_the_job(cluster: Cluster, namespace: str) -> str:
    """What the pods of the newest Job wrote."""
    name = _job(cluster, namespace)["metadata"]["name"]
    pods = cluster.get(f"/api/v1/namespaces/{namespace}/pods?labelSelector=job-name%3D{name}")["items"]
    return "\n".join(cluster.logs(namespace, pod["metadata"]["name"], container="rollout")[-3000:] for pod in pods)


def test_a_service_is_restarted_without_a_lost_request(service: Service, cluster: Cluster, record: Record) -> None:
    before = {pod.metadata.name for pod in cluster.pods(service.namespace, CHAT)}
    with Load(service.target, workers=3, tokens=24, pause_s=0.05) as load:
        began = time.monotonic()
        code, said = _run(service.command("restart", CHAT))
        record("seconds", time.monotonic() - began)
        time.sleep(2)
    record("it says", said.strip().splitlines()[-1][:200])
    record("requests", load.count.sent)
    record("lost", len(load.count.lost))
    assert code == 0, said
    assert not load.count.lost, (load.count.lost[:5], said)
    wait("other pods", lambda: not before & {pod.metadata.name for pod in cluster.pods(service.namespace, CHAT)}, 180)


def test_a_service_that_runs_is_diagnosed_as_such(service: Service, record: Record) -> None:
    code, said = _run(service.command("diagnose", CHAT))
    record("it says", said.strip().splitlines()[0][:200])
    assert code == 0, said
