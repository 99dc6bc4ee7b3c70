"""Knative mode: streams, canary by revisions, scaling by concurrency, to zero and from zero."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import pytest

from tests.e2e import protocols
from tests.e2e.cluster import Cluster, host_of, wait
from tests.e2e.conftest import Record, Suite
from tests.e2e.releases import MODEL, MONITORED, OTHER_MODEL, POD_MONITOR, Release, Values, of_model
from tests.e2e.traffic import Count, Load, Target, fingerprint, percentile, within_three_sigma

pytestmark = pytest.mark.needs("knative")
CHAT, ZERO = "chat", "zero"
_SHARE_OF = 400


@dataclass
class Service:
    """The release, and how to ask its service."""

    release: Release
    target: Target
    ready_s: float = 0.0

    @property
    def namespace(self) -> str:
        """Where it is."""
        return self.release.namespace


@pytest.fixture(scope="module")
def service(suite: Suite) -> Iterator[Service]:
    """`chat` in Knative mode on one pod."""
    namespace = suite.namespace("kn")
    values: Values = {"cluster": {"deploymentMode": "Knative"}, "inferenceServices": {CHAT: of_model(MODEL)}}
    if suite.cluster.has_kind(*POD_MONITOR):
        values["monitoring"] = MONITORED
    release = suite.release("kn", namespace, values)
    release.install()
    took = suite.cluster.wait_ready(namespace, CHAT)
    yield Service(release, suite.target(namespace, CHAT), took)
    if not suite.keep:
        release.uninstall()


@pytest.fixture(scope="module")
def zero(suite: Suite) -> Iterator[Service]:
    """`zero`: no pod while nobody asks, a second one at more than two requests at once, and quick about both."""
    namespace = suite.namespace("zero")
    scaling = {
        "minReplicas": 0,
        "maxReplicas": 2,
        "target": 2,
        "knative": {"windowSeconds": 20, "targetUtilizationPercentage": 100, "scaleToZeroRetentionSeconds": 0},
    }
    values = {
        "cluster": {"deploymentMode": "Knative"},
        "inferenceServices": {ZERO: of_model(MODEL, autoscaling=scaling)},
    }
    release = suite.release("zero", namespace, values)
    release.install()
    took = suite.cluster.wait_ready(namespace, ZERO)
    yield Service(release, suite.target(namespace, ZERO), took)
    if not suite.keep:
        release.uninstall()


def _revisions(cluster: Cluster, service: Service) -> list[str]:
    path = f"/apis/serving.knative.dev/v1/namespaces/{service.namespace}/revisions"
    return sorted(item["metadata"]["name"] for item in cluster.get(path)["items"])


def _change(cluster: Cluster, service: Service, canary: Values, model: str = MODEL) -> None:
    """Write another canary block, and wait until KServe and Knative say that it is so."""
    current = service.release.values["inferenceServices"][CHAT]
    current.pop("canary", None)
    service.release.upgrade({"inferenceServices": {CHAT: {"model": model, **({"canary": canary} if canary else {})}}})
    time.sleep(2)  # until KServe has seen it
    cluster.wait_ready(service.namespace, CHAT)


def _traffic(cluster: Cluster, service: Service) -> list[dict[str, object]]:
    path = f"/apis/serving.knative.dev/v1/namespaces/{service.namespace}/services/{CHAT}-predictor"
    traffic: list[dict[str, object]] = cluster.get(path)["status"]["traffic"]
    return traffic


def _share(service: Service, stable: str) -> tuple[int, Count]:
    """How many of 400 requests somebody else than `stable` answered."""
    count = Load(service.target, workers=4, count=_SHARE_OF, stream=False, tokens=4).run(300)
    return count.whole - count.who[stable], count


def _settle(service: Service, stable: str, percent: int) -> float:
    """Seconds until the proxies do what the route says: Knative calls a route ready when it is written.

    For 0 and 100 % alone, where one answer of the wrong model shows that they do not yet.
    """
    began, right = time.monotonic(), 0
    while percent in (0, 100) and right < 20:
        right = right + 1 if (fingerprint(service.target) == stable) == (percent == 0) else 0
        assert time.monotonic() - began < 30, f"at {percent} % the other model still answers after 30 s"
    return time.monotonic() - began


def test_install_to_ready_in_knative_mode(service: Service, record: Record) -> None:
    record("to Ready, seconds", service.ready_s)


def test_helm_test_in_knative_mode(service: Service, record: Record) -> None:
    said = service.release.test()
    assert f"{CHAT} is ready and wrote" in said, said
    record("it says", next(line for line in said.splitlines() if "is ready and wrote" in line).strip())


def test_every_protocol_through_knative_s_proxies(service: Service, record: Record) -> None:
    record("questions answered", len(protocols.http(service.target.base, service.target.host, CHAT)))


def test_no_stream_is_cut_in_knative_mode(service: Service, request: pytest.FixtureRequest, record: Record) -> None:
    count = Load(service.target, workers=4, count=request.config.option.streams, stream=True).run(700)
    record("streams whole", count.whole)
    record("cut", count.cut)
    record("not answered", len(count.lost) - count.cut)
    record("median, seconds", percentile(count.seconds, 0.5))
    assert not count.lost, count.lost[:5]
    assert count.whole == request.config.option.streams


def test_grpc_and_rest_on_knative_s_one_port(
    service: Service, cluster: Cluster, request: pytest.FixtureRequest, record: Record
) -> None:
    """The port is named h2c, so that Knative's proxies speak HTTP/2 to it, whatever the client speaks."""
    for enabled in (True, False):
        before = _revisions(cluster, service)
        service.release.upgrade({"inferenceServices": {CHAT: {"grpc": {"enabled": enabled}}}})
        wait("a new revision", lambda seen=before: len(_revisions(cluster, service)) > len(seen), 60)  # type: ignore[misc]
        time.sleep(2)  # until KServe has seen it
        cluster.wait_ready(service.namespace, CHAT)
        if not enabled:
            return
        target = service.target
        record("questions over HTTP/1.1", len(protocols.http(target.base, target.host, CHAT)))
        record("questions over gRPC", len(protocols.grpc(target.base.split("//")[1], CHAT, target.host)))
        count = Load(target, workers=4, count=request.config.option.streams // 4, stream=True).run(300)
        record("streams whole", count.whole)
        assert not count.lost, count.lost[:5]


def test_a_canary_that_never_gets_ready_takes_no_request(service: Service, cluster: Cluster, record: Record) -> None:
    stable, before = fingerprint(service.target), _revisions(cluster, service)
    service.release.upgrade({"inferenceServices": {CHAT: {"canary": {"percent": 50, "model": "/models/not-there"}}}})
    wait("a new revision", lambda: len(_revisions(cluster, service)) > len(before), 60)
    (bad,) = set(_revisions(cluster, service)) - set(before)

    def restarts() -> int:
        pods = [p for p in cluster.pods(service.namespace, CHAT) if p.metadata.name.startswith(bad)]
        return sum(s.restart_count for p in pods for s in p.status.container_statuses or [])

    with Load(service.target, workers=2, tokens=4, pause_s=0.1) as load:
        began = time.monotonic()
        wait("a start that failed", lambda: restarts() > 0, 240, seen=lambda: cluster.story(service.namespace, CHAT))
        record("seconds until its first restart", time.monotonic() - began)
        time.sleep(3)
    others = load.count.whole - load.count.who[stable]
    record("requests meanwhile", load.count.sent)
    record("answered by the canary, or lost", others + len(load.count.lost))
    assert not load.count.lost, load.count.lost[:5]
    assert others == 0
    _change(cluster, service, {})


def test_canary_shares_in_knative_mode(service: Service, cluster: Cluster, record: Record) -> None:
    """0, 1, 10, 50 and 100 %, promoted; one load of the new model for all of it."""
    stable, before = fingerprint(service.target), set(_revisions(cluster, service))
    for percent in (0, 1, 10, 50, 100):
        with Load(service.target, workers=1, tokens=4, pause_s=0.2) as meanwhile:
            _change(cluster, service, {"percent": percent, "model": OTHER_MODEL})
        assert not meanwhile.count.lost, meanwhile.count.lost[:5]
        settled = _settle(service, stable, percent)
        if percent in (0, 100):
            record(f"seconds until twenty answers in a row are right, at {percent} %", settled)
        share, count = _share(service, stable)
        record(f"of {_SHARE_OF} at {percent} %", share)
        assert not count.lost, count.lost[:5]
        assert within_three_sigma(share, _SHARE_OF, percent), (
            f"{share} of {_SHARE_OF} at {percent} %: {_traffic(cluster, service)}"
        )
    with Load(service.target, workers=2, tokens=4, pause_s=0.1) as meanwhile:
        _change(cluster, service, {}, model=OTHER_MODEL)
        time.sleep(2)
    new = set(_revisions(cluster, service)) - before
    record("new revisions from the first step to the promotion", len(new))
    record("requests during the promotion", meanwhile.count.sent)
    record("lost", len(meanwhile.count.lost))
    assert not meanwhile.count.lost, meanwhile.count.lost[:5]
    assert meanwhile.count.who[stable] == 0, "the old model answered after 100 %"
    assert len(new) == 1, f"the promoted state is another revision: {new}"


def test_a_canary_is_rolled_back_without_a_lost_request(service: Service, cluster: Cluster, record: Record) -> None:
    """Back to the model from before, which is a new canary's way out: percent 0, and then no canary."""
    stable = fingerprint(service.target)
    _change(cluster, service, {"percent": 50, "model": MODEL}, model=OTHER_MODEL)
    with Load(service.target, workers=3, tokens=4, pause_s=0.05) as load:
        time.sleep(3)
        began = time.monotonic()
        _change(cluster, service, {"percent": 0, "model": MODEL}, model=OTHER_MODEL)
        record("seconds until 0 %", time.monotonic() - began)
        time.sleep(2)
    record("requests", load.count.sent)
    record("lost", len(load.count.lost))
    assert not load.count.lost, load.count.lost[:5]
    share, count = _share(service, stable)
    record(f"of {_SHARE_OF} after it", share)
    assert not count.lost
    assert share == 0


def test_each_revision_of_a_canary_has_a_url_of_its_own(service: Service, cluster: Cluster, record: Record) -> None:
    stable = fingerprint(service.target)
    _change(cluster, service, {"percent": 10, "model": MODEL, "tagRouting": True}, model=OTHER_MODEL)
    urls = {str(t["tag"]): str(t["url"]) for t in _traffic(cluster, service) if t.get("tag")}
    answered = {tag: fingerprint(replace(service.target, host=host_of(url))) == stable for tag, url in urls.items()}
    record("URLs", ", ".join(f"{tag}: {'stable' if old else 'new'} model" for tag, old in sorted(answered.items())))
    assert answered == {"latest": False, "prev": True}


def _pods(cluster: Cluster, service: Service) -> int:
    return len(cluster.pods(service.namespace, ZERO, every=True))


def _ready(cluster: Cluster, service: Service) -> int:
    pods = cluster.pods(service.namespace, ZERO)
    return sum(
        all(s.ready for s in pod.status.container_statuses or []) and pod.status.phase == "Running" for pod in pods
    )


def test_scaling_up_by_concurrency_and_down_without_a_cut_stream(
    service: Service, zero: Service, cluster: Cluster, record: Record
) -> None:
    service.release.uninstall()  # two cores don't carry more pods
    with Load(zero.target, workers=8, stream=True, tokens=64, exactly=True) as load:
        began = time.monotonic()
        wait("two pods", lambda: _ready(cluster, zero) == 2, 300, seen=lambda: cluster.story(zero.namespace, ZERO))
        record("seconds to the second pod", time.monotonic() - began)
        time.sleep(5)
        load.keep(1)
        began = time.monotonic()
        wait("one pod again", lambda: _pods(cluster, zero) == 1, 300, seen=lambda: cluster.story(zero.namespace, ZERO))
        record("seconds back to one", time.monotonic() - began)
    record("streams", load.count.sent)
    record("cut or lost", len(load.count.lost))
    assert load.count.whole > 20
    assert not load.count.lost, load.count.lost[:5]


def test_one_request_from_zero(zero: Service, cluster: Cluster, record: Record) -> None:
    """What a service costs whose pod is gone: one request, which one pod starts for."""
    asked, count = _from_zero(zero, cluster, record, 1)
    record(_PHASES, _phases(cluster, zero, asked))
    record("until the first token; seconds", min(count.first_s, default=0.0))


def test_to_zero_and_from_zero_with_ten_at_once(zero: Service, cluster: Cluster, record: Record) -> None:
    """Two pods start for them, on the same processors where there is one node."""
    asked, count = _from_zero(zero, cluster, record, 10)
    record(_PHASES, _phases(cluster, zero, asked))
    record("until the first token; seconds", min(count.first_s, default=0.0))
    record("until the last answer was whole; seconds", max(count.seconds, default=0.0))


_PHASES = "the request held, until the pod that was ready first was made, scheduled, started, ready; seconds"


def _from_zero(zero: Service, cluster: Cluster, record: Record, requests: int) -> tuple[datetime, Count]:
    """Wait until there is no pod, then ask so many times at once; none may be lost."""
    began = time.monotonic()
    wait("no pod", lambda: _pods(cluster, zero) == 0, 300, seen=lambda: cluster.story(zero.namespace, ZERO))
    record("seconds to no pod", time.monotonic() - began)
    asked = datetime.now(UTC)
    count = Load(zero.target, workers=requests, count=requests, tokens=8, stream=True).run(300)
    record("asked at once from zero", count.sent)
    record("answered", count.whole)
    assert not count.lost, count.lost
    assert count.whole == requests
    return asked, count


def _phases(cluster: Cluster, service: Service, since: datetime) -> str:
    """Seconds from `since` to each step of the start of the pod that was ready first, as Kubernetes has put them down
    (whole seconds)."""

    def since_of(pod: Any) -> dict[str, datetime]:
        return {c.type: c.last_transition_time for c in pod.status.conditions if c.status == "True"}

    ready = [pod for pod in cluster.pods(service.namespace, ZERO) if "Ready" in since_of(pod)]
    pod = min(ready, key=lambda pod: since_of(pod)["Ready"])
    status = next(s for s in pod.status.container_statuses if s.name == "kserve-container")
    at = since_of(pod)
    times = (pod.metadata.creation_timestamp, at["PodScheduled"], status.state.running.started_at, at["Ready"])
    return ", ".join(f"{max(0.0, (t - since).total_seconds()):.0f}" for t in times)
