"""Services that can't start: what the cluster and our logs say of it, and how soon."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.e2e.cluster import Cluster, wait
from tests.e2e.conftest import Record, Suite
from tests.e2e.releases import Release, merged, of_model, small

_HAS_WAITED = ("ErrImagePull", "ImagePullBackOff", "CreateContainerConfigError", "CrashLoopBackOff", "InvalidImageName")


@pytest.fixture(scope="module")
def namespace(suite: Suite) -> str:
    """One namespace for all that fails."""
    return suite.namespace("bad")


def _start(
    suite: Suite, namespace: str, name: str, values: dict[str, Any], image: dict[str, Any] | None = None
) -> Release:
    base = {"cluster": {"deploymentMode": "Standard"}, "tests": {"enabled": False}, "inferenceServices": {name: values}}
    release = suite.release(name, namespace, merged(base, {"image": image or {}}))
    release.install()
    return release


def _waiting(cluster: Cluster, namespace: str, name: str) -> Any:
    """State of the container that waits for something, or has ended."""
    for pod in cluster.pods(namespace, name):
        status = cluster.container(namespace, pod.metadata.name)
        if status and status.state.waiting and status.state.waiting.reason in _HAS_WAITED:
            return status
        if status and (status.state.terminated or status.restart_count):
            return status
    return None


def _says(cluster: Cluster, namespace: str, name: str, record: Record) -> None:
    """Put down what KServe tells of a service that is not ready, and check that it does not call it ready."""
    wait("KServe's word on it", lambda: cluster.conditions(cluster.isvc(namespace, name)), 30)
    thing = cluster.isvc(namespace, name)
    ready = cluster.conditions(thing)["Ready"]
    assert ready["status"] != "True"
    record("Ready", f"{ready['status']} {ready.get('reason', '')}".strip())
    model = thing.get("status", {}).get("modelStatus", {})
    failure = model.get("lastFailureInfo", {})
    record(
        "modelStatus",
        f"{model.get('transitionStatus', 'none')}: {failure.get('reason', '')} {failure.get('message', '')}".strip()[
            :300
        ],
    )


def test_an_image_that_can_not_be_pulled(suite: Suite, cluster: Cluster, namespace: str, record: Record) -> None:
    began = time.monotonic()
    release = _start(suite, namespace, "nopull", small(), {"tag": "0.0.0-not-there"})
    status = wait(
        "a reason", lambda: _waiting(cluster, namespace, "nopull"), 120, seen=lambda: cluster.story(namespace, "nopull")
    )
    record("seconds until Kubernetes says so", time.monotonic() - began)
    record("Kubernetes says", status.state.waiting.reason)
    assert status.state.waiting.reason in ("ErrImagePull", "ImagePullBackOff")
    assert "0.0.0-not-there" in status.image + str(status.state.waiting.message)
    _says(cluster, namespace, "nopull", record)
    release.uninstall()


def test_a_secret_that_is_missing(suite: Suite, cluster: Cluster, namespace: str, record: Record) -> None:
    began = time.monotonic()
    release = _start(suite, namespace, "notoken", of_model("org/model", huggingFaceToken={"secretName": "hub-token"}))
    status = wait(
        "a reason",
        lambda: _waiting(cluster, namespace, "notoken"),
        120,
        seen=lambda: cluster.story(namespace, "notoken"),
    )
    record("seconds until Kubernetes says so", time.monotonic() - began)
    record("Kubernetes says", f"{status.state.waiting.reason}: {status.state.waiting.message}")
    assert status.state.waiting.reason == "CreateContainerConfigError"
    assert "hub-token" in status.state.waiting.message
    _says(cluster, namespace, "notoken", record)
    release.uninstall()


def test_a_model_that_is_not_there(suite: Suite, cluster: Cluster, namespace: str, record: Record) -> None:
    """The process ends with a sentence, and is started again with growing pauses: Kubernetes' CrashLoopBackOff."""
    began = time.monotonic()
    release = _start(suite, namespace, "nomodel", of_model("/models/not-there"))
    ended: Callable[[], Any] = lambda: (s := _waiting(cluster, namespace, "nomodel")) and s.restart_count and s  # noqa: E731
    status = wait("an end", ended, 240, seen=lambda: cluster.story(namespace, "nomodel"))
    record("seconds until the first restart", time.monotonic() - began)
    last = status.last_state.terminated
    (pod,) = cluster.pods(namespace, "nomodel")
    lines = [line for line in cluster.logs(namespace, pod.metadata.name, previous=True).splitlines() if line.strip()]
    record("exit code", last.exit_code)
    record("last line of the log", lines[-1][:300] if lines else "none")
    record("termination message", (last.message or "none").strip()[:300])
    assert last.exit_code != 0
    assert any("/models/not-there" in line for line in lines[-5:]), lines[-5:]
    _says(cluster, namespace, "nomodel", record)
    release.uninstall()
