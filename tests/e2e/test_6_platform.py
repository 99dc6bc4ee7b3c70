"""What needs more than a small cluster has: skipped, and said so, where it is missing."""

from __future__ import annotations

import time

import pytest

from tests.e2e.cluster import Cluster, wait
from tests.e2e.conftest import Record, Suite
from tests.e2e.releases import merged, small
from tests.e2e.traffic import Load

NAME = "chat"


@pytest.mark.needs("gateway", "metrics")
def test_an_hpa_on_cpu_scales(suite: Suite, cluster: Cluster, record: Record) -> None:
    namespace = suite.namespace("hpa")
    scaling = {"class": "hpa", "metric": "cpu", "target": 50, "minReplicas": 1, "maxReplicas": 2}
    values = {
        "cluster": {"deploymentMode": "Standard", "gatewayAPI": True},
        "inferenceServices": {NAME: small(autoscaling=scaling)},
    }
    release = suite.release("hpa", namespace, values)
    release.install()
    cluster.wait_ready(namespace, NAME)
    began = time.monotonic()
    with Load(suite.target(namespace, NAME), workers=6, tokens=64, exactly=True) as load:
        wait(
            "two pods",
            lambda: len(cluster.pods(namespace, NAME)) == 2,
            300,
            seen=lambda: str(cluster.left_in(namespace)),
        )
        record("seconds to the second pod", time.monotonic() - began)
        cluster.wait_ready(namespace, NAME)
    assert not load.count.lost, load.count.lost[:5]
    release.uninstall()


@pytest.mark.needs("gateway")
def test_an_upgrade_from_the_last_released_chart_under_load(
    suite: Suite, cluster: Cluster, request: pytest.FixtureRequest, record: Record
) -> None:
    released = request.config.option.released_chart
    if not released:
        pytest.skip("NOT RUN: no chart of an earlier release is named (--released-chart)")
    namespace = suite.namespace("up")
    values = {"cluster": {"deploymentMode": "Standard", "gatewayAPI": True}, "inferenceServices": {NAME: small()}}
    release = suite.release("up", namespace, merged(values, {}))
    release.install(released)
    cluster.wait_ready(namespace, NAME)
    with Load(suite.target(namespace, NAME), workers=3, pause_s=0.05) as load:
        time.sleep(2)
        release.upgrade()
        time.sleep(5)
        cluster.wait_ready(namespace, NAME)
        time.sleep(2)
    record("requests", load.count.sent)
    record("lost", len(load.count.lost))
    assert not load.count.lost, load.count.lost[:5]
    release.uninstall()


@pytest.mark.needs("gpu")
def test_a_gpu_service_gets_ready(suite: Suite, cluster: Cluster, record: Record) -> None:
    namespace = suite.namespace("gpu")
    gpu = {"device": "gpu", "demo": True, "resources": {"requests": {"cpu": "1", "memory": "6Gi"}}}
    release = suite.release(
        "gpu", namespace, {"cluster": {"deploymentMode": "Standard"}, "inferenceServices": {NAME: gpu}}
    )
    release.install()
    record("seconds to Ready", cluster.wait_ready(namespace, NAME, 850))
    release.uninstall()
