"""What needs more than a small cluster has: skipped, and said so, where it is missing."""

from __future__ import annotations

import json
import time

import pytest

from tests.e2e import scraping
from tests.e2e.cluster import Cluster, wait
from tests.e2e.conftest import Record, Suite
from tests.e2e.releases import MODEL, MONITORED, Values, merged, of_model, small
from tests.e2e.traffic import PROMPT, Load

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


@pytest.mark.needs("gateway", "keda")
def test_keda_scales_by_the_engine_s_queue(
    suite: Suite,
    cluster: Cluster,
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    record: Record,
) -> None:
    """One sequence at a time and six clients: five requests wait, and one for each pod is wanted."""
    address = request.config.option.reachable
    scraping.skip_unless_possible(cluster, address)
    namespace = suite.namespace("keda")
    scaling = {"class": "keda", "metric": "queue-depth", "target": 1, "minReplicas": 1, "maxReplicas": 2}
    values: Values = {
        "cluster": {"deploymentMode": "Standard", "gatewayAPI": True},
        "inferenceServices": {NAME: small(maxNumSeqs=1)},
        "monitoring": MONITORED,
    }
    release = suite.release("keda", namespace, values)
    release.install()
    cluster.wait_ready(namespace, NAME)
    prometheus = scraping.of_namespace(cluster, namespace, tmp_path_factory.mktemp("prometheus"), address)
    try:
        release.upgrade(
            {
                "cluster": {"prometheusAddress": prometheus.url},
                "inferenceServices": {NAME: {"autoscaling": {**scaling, "stabilization": {"scaleDownSeconds": 0}}}},
            }
        )
        cluster.wait_ready(namespace, NAME)
        began = time.monotonic()
        with Load(suite.target(namespace, NAME), workers=6, tokens=64, exactly=True) as load:
            wait(
                "two ready pods",
                lambda: cluster.ready_pods(namespace, NAME) == 2,
                300,
                seen=lambda: str(cluster.left_in(namespace)),
            )
            record("seconds to the second pod's first request", time.monotonic() - began)
        began = time.monotonic()
        wait("one pod", lambda: len(cluster.pods(namespace, NAME)) == 1, 300)
        record("seconds until it went again", time.monotonic() - began)
    finally:
        prometheus.stop()
    record("requests", load.count.sent)
    record("lost", len(load.count.lost))
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


@pytest.mark.timeout(3600)
def test_a_stream_of_minutes_is_not_cut(
    suite: Suite, cluster: Cluster, request: pytest.FixtureRequest, record: Record
) -> None:
    """A context longer than the demo model was trained for: what it writes is nonsense, and it writes on and on."""
    minutes = request.config.option.stream_minutes
    if not minutes:
        pytest.skip("NOT RUN: it takes minutes and a core of its own (--stream-minutes 15)")
    namespace = suite.namespace("long")
    timeout = int(60 * minutes) + 60
    mode = "Knative" if cluster.longest_request_s >= timeout else "Standard"
    tokens = 120_000
    override = json.dumps({"max_position_embeddings": 2 * tokens})
    long = of_model(MODEL, maxModelLen=2 * tokens, extraArgs=["--enforce-eager", "--hf-overrides", override])
    values: Values = {
        "cluster": {"deploymentMode": mode, "gatewayAPI": True, "maxRevisionTimeoutSeconds": timeout},
        "inferenceServices": {NAME: {**long, "timeoutSeconds": timeout}},
    }
    release = suite.release("long", namespace, values)
    release.install()
    cluster.wait_ready(namespace, NAME)
    target = suite.target(namespace, NAME)
    began, pieces, last, longest = time.monotonic(), 0, time.monotonic(), 0.0
    body = {"model": NAME, "prompt": PROMPT, "max_tokens": tokens, "ignore_eos": True, "stream": True}
    with target.client(120) as client, client.stream("POST", "/openai/v1/completions", json=body) as answer:
        assert answer.status_code == 200, answer.read()
        for line in answer.iter_lines():
            now = time.monotonic()
            longest, last, pieces = max(longest, now - last), now, pieces + line.startswith("data: {")
            if now - began > minutes * 60:
                break
            assert "[DONE]" not in line, f"all {tokens} tokens were written after {now - began:.0f} s"
    took = time.monotonic() - began
    record("mode", mode)
    record("minutes", took / 60)
    record("tokens", pieces)
    record("longest pause, seconds", longest)
    assert took >= minutes * 60, f"cut after {took:.0f} s and {pieces} tokens"
    release.uninstall()
