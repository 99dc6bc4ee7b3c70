"""One service in Standard mode: ready, asked by every protocol, upgraded, and hurt in every way while it works."""

from __future__ import annotations

import inspect
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import numpy
import pytest
from kubernetes import client
from kubernetes.client.exceptions import ApiException

from tests import triton
from tests.e2e import protocols, scraping
from tests.e2e.cluster import Cluster, wait
from tests.e2e.conftest import Record, Suite
from tests.e2e.releases import CHART, MODEL, MONITORED, OTHER_MODEL, POD_MONITOR, HelmFailed, Release, Values, of_model
from tests.e2e.traffic import Count, Load, Target, ask, fingerprint, percentile, within_three_sigma

NAME = "chat"
LONG_TOKENS = 1500
"""The longest stream; the model's context ends at 2048."""
_LONG_S = 10.0
"""How long streams last that something happens to, while nothing does: far less than the drain may take."""

DASHBOARDS = sorted((CHART / "files" / "dashboards").glob("*.json"))

# Run in the serving container, whose first process is the runtime. Prints the pid that it has ended.
_KILL_ENGINE = """
import os, psutil, signal
every = list(psutil.process_iter(["name", "cmdline"]))
# This command names it too.
others = [p for p in every if p.pid != os.getpid()]
engine = [p for p in others if "EngineCore" in " ".join([p.info["name"], *(p.info["cmdline"] or [])])]
assert engine, [p.info for p in every]
for process in engine:
    os.kill(process.pid, signal.SIGKILL)
print(engine[0].pid)
"""
# The kernel ends the process that weighs most and may be ended first: the first process of the container is put first.
_EAT_MEMORY = """
import pathlib
pathlib.Path("/proc/1/oom_score_adj").write_text("1000")
held = []
while True:
    held.append(bytearray(b"x" * (64 << 20)))
"""


@dataclass
class Service:
    """The release, its service and how it got ready."""

    release: Release
    target: Target
    install_s: float
    ready_s: float

    @property
    def namespace(self) -> str:
        """Where it is."""
        return self.release.namespace


def _route_host(namespace: str) -> str:
    """Host of the chart's own route."""
    return f"route-{namespace}.example.com"


@pytest.fixture(scope="module")
def service(suite: Suite) -> Iterator[Service]:
    """`chat` in Standard mode with gRPC, on one pod, in a namespace in which Pod Security is `restricted`."""
    namespace = suite.namespace("std")
    values: Values = {
        "cluster": {"deploymentMode": "Standard", "gatewayAPI": suite.cluster.found.gateway_api},
        "inferenceServices": {NAME: of_model(MODEL, grpc={"enabled": True})},
    }
    if suite.cluster.found.gateway_api:
        # KServe's own route carries HTTP alone; the chart's carries gRPC too.
        values["routes"] = {NAME: {"hosts": [_route_host(namespace)], "inferenceService": NAME}}
    if suite.cluster.has_kind(*POD_MONITOR):
        values["monitoring"] = MONITORED
    release = suite.release("std", namespace, values)
    install_s = release.install()
    ready_s = suite.cluster.wait_ready(namespace, NAME)
    yield Service(release, suite.target(namespace, NAME), install_s, ready_s)
    if not suite.keep:
        release.uninstall()


def _pods(cluster: Cluster, service: Service) -> list[str]:
    return [pod.metadata.name for pod in cluster.pods(service.namespace, NAME)]


def _ready_pod(cluster: Cluster, service: Service) -> str:
    """The only pod, once it is ready and no other is left: what came before may have changed it."""

    def only() -> str | None:
        pods = cluster.pods(service.namespace, NAME, every=True)
        ready = [p for p in pods if all(status.ready for status in p.status.container_statuses or [])]
        return str(ready[0].metadata.name) if len(pods) == len(ready) == 1 else None

    return str(wait("one pod, ready", only, 240, seen=lambda: cluster.story(service.namespace, NAME)))


def _with_streams(service: Service, streams: int, act: Callable[[], None]) -> Count:
    """Have long streams running, `act`, and give what came of the streams."""
    count = Count()
    lock = threading.Lock()
    # How many tokens that is depends on the machine, by a factor of ten.
    probe = Load(service.target, workers=streams, count=streams, stream=True, tokens=64, exactly=True).run(120)
    assert not probe.lost, probe.lost[:5]
    tokens = min(LONG_TOKENS, max(200, int(_LONG_S * 64 / percentile(probe.seconds, 0.5))))

    def stream() -> None:
        with service.target.client(300) as http:
            began = time.monotonic()
            try:
                status, _, text = service.target.completion(http, stream=True, tokens=tokens, exactly=True)
            except Exception as error:
                status, text = -1, f"{type(error).__name__}: {error}"
            with lock:
                if status == 200:
                    count.whole += 1
                    count.seconds.append(time.monotonic() - began)
                else:
                    count.lost.append(f"after {time.monotonic() - began:.1f} s: {status} {text[:200]}")

    threads = [threading.Thread(target=stream, daemon=True) for _ in range(streams)]
    for thread in threads:
        thread.start()
    time.sleep(2.0)  # all of them have begun by then, and none has ended
    act()
    for thread in threads:
        thread.join(300)
    return count


def test_install_to_ready(service: Service, cluster: Cluster, record: Record) -> None:
    record("helm install, seconds", service.install_s)
    record("then to Ready, seconds", service.ready_s)
    (pod,) = cluster.pods(service.namespace, NAME)
    assert all(status.restart_count == 0 for status in pod.status.container_statuses)


def test_helm_test(service: Service, record: Record) -> None:
    said = service.release.test()
    assert f"{NAME} is ready and wrote" in said, said
    record("it says", next(line for line in said.splitlines() if "is ready and wrote" in line).strip())


def test_pods_under_pod_security_restricted(service: Service, cluster: Cluster, record: Record) -> None:
    """The namespace refuses whatever is not `restricted`: the service's pod and that of `helm test` are there."""
    labels = cluster.core.read_namespace(service.namespace).metadata.labels
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    bad = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "bad"},
        "spec": {"containers": [{"name": "bad", "image": "bad"}]},
    }
    with pytest.raises(ApiException) as refused:
        cluster.core.create_namespaced_pod(service.namespace, bad)
    assert refused.value.status == 403
    record("pods that run there", len(cluster.core.list_namespaced_pod(service.namespace).items))


@pytest.mark.needs("gateway")
def test_every_protocol_through_the_gateway(service: Service, record: Record) -> None:
    took = protocols.http(service.target.base, service.target.host, NAME)
    record("questions answered", len(took))


def test_every_protocol_from_inside_and_grpc(service: Service, inside: Callable[..., str], record: Record) -> None:
    host = f"{NAME}-predictor.{service.namespace}.svc.cluster.local"
    took = json.loads(
        inside(inspect.getsource(protocols), f"http://{host}", host, NAME, f"{host}:8081").splitlines()[-1]
    )
    assert any(name.startswith("gRPC") for name in took)
    record("questions answered", len(took))
    record("of them over gRPC", sum(name.startswith("gRPC") for name in took))


@pytest.mark.needs("gateway")
def test_grpc_through_the_gateway(service: Service, record: Record) -> None:
    """Over the chart's route: KServe's has HTTP alone. Health and reflection too, by Python's client and Triton's."""
    address, host = httpx.URL(service.target.base).netloc.decode(), _route_host(service.namespace)
    assert ask(replace(service.target, host=host), "/v2/health/ready").status_code == 200
    record("questions answered", len(protocols.grpc(address, NAME, host)))
    arguments = [("grpc.default_authority", host)]
    with triton.client.InferenceServerClient(address, channel_args=arguments) as client:
        assert client.is_server_live()
        assert client.is_model_ready(NAME)
        text = triton.client.InferInput("text_input", [1], "BYTES")
        text.set_data_from_numpy(numpy.array([protocols.SUM.encode()], dtype=object))
        answer = client.infer(NAME, [text], parameters={"temperature": "0", "max_tokens": 16})
        said = answer.as_numpy("text_output")[0].decode()
        record("Triton's client is answered", said.strip()[:60])
        assert protocols.ANSWER in said


def test_metrics_from_inside(service: Service, inside: Callable[..., str], record: Record) -> None:
    host = f"{NAME}-predictor.{service.namespace}.svc.cluster.local"
    text = inside(f"import httpx; print(httpx.get('http://{host}/metrics', timeout=30).text)")
    for name in ("kserve_vllm_requests_total", "vllm:num_requests_running"):
        assert name in text
    record("families of metrics", text.count("# TYPE "))


def _panels() -> dict[str, str]:
    """Queries of the chart's dashboards with everything selected, by dashboard, panel and letter."""
    found = {}
    for path in DASHBOARDS:
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel["targets"]:
                query = target["expr"].replace("$__rate_interval", "1m")
                query = query.replace("$namespace", ".*").replace("$inferenceservice", ".*")
                found[f"{path.stem}: {panel['title']} {target['refId']}"] = query
    return found


def test_what_is_scraped_is_what_rules_and_dashboards_ask_for(
    service: Service, cluster: Cluster, tmp_path: Path, record: Record
) -> None:
    """A Prometheus of the suite's own reads the pods as the PodMonitor says, with the PrometheusRule's rules."""
    scraping.skip_unless_possible(cluster)
    prometheus = scraping.of_namespace(cluster, service.namespace, tmp_path, rules=True)
    try:
        seen = lambda: json.dumps(prometheus.get("targets")["activeTargets"])[:1500]  # noqa: E731
        (up,) = wait("a pod that is scraped", lambda: prometheus.query("up == 1"), 60, seen=seen)
        with Load(service.target, workers=3):
            wait("rates", lambda: prometheus.query("sum(rate(kserve_vllm_requests_total[1m])) > 0"), 60)
            time.sleep(25)
        labels = {name: up["metric"].get(name) for name in ("namespace", "inferenceservice", "revision")}
        record("labels of what is scraped", labels)
        assert labels == {
            "namespace": service.namespace,
            "inferenceservice": NAME,
            "revision": f"{NAME}-predictor",
        }
        rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
        bad = [f"{rule['name']}: {rule.get('lastError')}" for rule in rules if rule["health"] != "ok"]
        record("rules evaluated", len(rules))
        record("alerts that fire", sorted(r["name"] for r in rules if r.get("state") == "firing") or "none")
        panels = {name: bool(prometheus.query(query)) for name, query in _panels().items()}
        record("queries of dashboards with data", f"{sum(panels.values())} of {len(panels)}")
        record("without", ", ".join(sorted(name for name, found in panels.items() if not found)) or "none")
        assert not bad, bad
        assert sum(panels.values()) > len(panels) / 2, panels
    finally:
        prometheus.stop()


@pytest.mark.needs("gateway")
def test_no_stream_is_cut(service: Service, request: pytest.FixtureRequest, record: Record) -> None:
    count = Load(service.target, workers=4, count=request.config.option.streams, stream=True).run(600)
    record("streams whole", count.whole)
    record("cut", count.cut)
    record("not answered", len(count.lost) - count.cut)
    record("median, seconds", percentile(count.seconds, 0.5))
    assert not count.lost, count.lost[:5]
    assert count.whole == request.config.option.streams


@pytest.mark.needs("gateway")
def test_an_upgrade_under_load_loses_nothing(service: Service, cluster: Cluster, record: Record) -> None:
    before = set(_pods(cluster, service))
    with Load(service.target, workers=3, pause_s=0.05) as load:
        time.sleep(2)
        env = [*service.release.values["inferenceServices"][NAME]["env"], {"name": "E2E_ROUND", "value": "2"}]
        service.release.upgrade({"inferenceServices": {NAME: {"env": env}}})
        wait("a new pod", lambda: set(_pods(cluster, service)) - before, 60)
        took = cluster.wait_ready(service.namespace, NAME)
        wait(
            "the old pods gone",
            lambda: not before & {p.metadata.name for p in cluster.pods(service.namespace, NAME, every=True)},
            150,
        )
        time.sleep(2)
    record("requests", load.count.sent)
    record("lost", len(load.count.lost))
    record("seconds of the rollout", took)
    assert load.count.whole > 20
    assert not load.count.lost, load.count.lost[:5]


@pytest.mark.needs("gateway")
def test_a_pod_that_is_deleted_finishes_its_streams(service: Service, cluster: Cluster, record: Record) -> None:
    pod = _ready_pod(cluster, service)
    count = _with_streams(service, 8, lambda: cluster.core.delete_namespaced_pod(pod, service.namespace))
    record("streams", count.sent)
    record("lost", len(count.lost))
    record("longest, seconds", max(count.seconds, default=0.0))
    assert not count.lost, count.lost
    assert count.whole == 8
    cluster.wait_ready(service.namespace, NAME)


@pytest.mark.needs("gateway")
def test_a_drain_of_nodes_waits_for_the_disruption_budget(service: Service, cluster: Cluster, record: Record) -> None:
    """By the Eviction API, which is what `kubectl drain` calls: two pods at once, under load."""
    service.release.upgrade(
        {"inferenceServices": {NAME: {"autoscaling": {"minReplicas": 2}, "podDisruptionBudget": {"enabled": True}}}}
    )
    wait("two pods", lambda: len(_pods(cluster, service)) == 2, 60)
    cluster.wait_ready(service.namespace, NAME)
    first, second = _pods(cluster, service)

    def evict(pod: str) -> int:
        try:
            body = client.V1Eviction(metadata=client.V1ObjectMeta(name=pod, namespace=service.namespace))
            cluster.core.create_namespaced_pod_eviction(pod, service.namespace, body)
        except ApiException as error:
            return int(error.status)
        return 201

    budget = f"/apis/policy/v1/namespaces/{service.namespace}/poddisruptionbudgets"
    wait(
        "the budget counts two pods",
        lambda: all(b["status"].get("currentHealthy") == 2 for b in cluster.get(budget)["items"]),
        30,
        seen=lambda: str(cluster.get(budget)),
    )
    with Load(service.target, workers=2, pause_s=0.05) as load:
        time.sleep(1)
        assert evict(first) == 201
        refused = evict(second)
        waited = time.monotonic()
        wait("the second one may go", lambda: evict(second) == 201, 300, 1.0)
        record("seconds until the second one may go", time.monotonic() - waited)
        wait(
            "the second one gone",
            lambda: second not in {p.metadata.name for p in cluster.pods(service.namespace, NAME, every=True)},
            150,
        )
    record("answer to the second eviction at once", refused)
    record("requests", load.count.sent)
    record("lost", len(load.count.lost))
    assert refused == 429
    assert not load.count.lost, load.count.lost[:5]
    service.release.upgrade(
        {"inferenceServices": {NAME: {"autoscaling": {"minReplicas": 1}, "podDisruptionBudget": {"enabled": False}}}}
    )
    wait("one pod", lambda: len(cluster.pods(service.namespace, NAME, every=True)) == 1, 200)
    cluster.wait_ready(service.namespace, NAME)


@pytest.mark.needs("gateway")
def test_a_killed_engine_ends_the_pod_s_process_with_code_1(service: Service, cluster: Cluster, record: Record) -> None:
    pod = _ready_pod(cluster, service)
    before = cluster.container(service.namespace, pod).restart_count
    killed = 0.0

    def kill() -> None:
        nonlocal killed
        cluster.execute(service.namespace, pod, ["python3", "-c", _KILL_ENGINE], "kserve-container")
        killed = time.monotonic()

    count = _with_streams(service, 4, kill)
    record("streams told of it", f"{len(count.lost)} of 4 within {time.monotonic() - killed:.1f} s")
    assert count.whole == 0
    status = wait(
        "a restart", lambda: (s := cluster.container(service.namespace, pod)).restart_count > before and s, 60
    )
    record("seconds to the restart", time.monotonic() - killed)
    record("exit code", status.last_state.terminated.exit_code)
    record("termination message", (status.last_state.terminated.message or "none").strip()[:200])
    assert status.last_state.terminated.exit_code == 1
    cluster.wait_ready(service.namespace, NAME)
    record("seconds to Ready again", time.monotonic() - killed)
    assert ask(service.target, "/v2/health/ready").status_code == 200


@pytest.mark.needs("gateway")
def test_a_container_killed_for_memory_comes_back(service: Service, cluster: Cluster, record: Record) -> None:
    pod = _ready_pod(cluster, service)
    before = cluster.container(service.namespace, pod).restart_count
    began = time.monotonic()
    with pytest.raises(Exception):  # noqa: B017 - whatever becomes of a session whose container is killed
        cluster.execute(service.namespace, pod, ["python3", "-c", _EAT_MEMORY], "kserve-container", 60)
    status = wait(
        "a restart",
        lambda: (s := cluster.container(service.namespace, pod)).restart_count > before and s,
        120,
        seen=lambda: str(cluster.container(service.namespace, pod)),
    )
    record(
        "Kubernetes says", f"{status.last_state.terminated.reason}, exit code {status.last_state.terminated.exit_code}"
    )
    assert status.last_state.terminated.reason == "OOMKilled"
    cluster.wait_ready(service.namespace, NAME)
    record("seconds to Ready again", time.monotonic() - began)


@pytest.mark.needs("gateway")
def test_a_canary_that_would_get_no_request_is_refused(service: Service, cluster: Cluster, record: Record) -> None:
    """KServe 0.20 starts a Standard canary's pods and sends them nothing: the chart looks the version up."""
    if cluster.splits_standard_canary:
        pytest.skip(f"NOT RUN: KServe {cluster.found.kserve} gives a canary in Standard mode its part")
    values: Values = {"inferenceServices": {NAME: {"canary": {"percent": 10, "model": OTHER_MODEL}}}}
    if not cluster.tells_kserve_version:
        values["cluster"] = {"kserveVersion": cluster.found.kserve}
    before = service.release.values
    with pytest.raises(HelmFailed) as refused:
        service.release.upgrade(values)
    service.release.values = before
    said = next(line for line in str(refused.value).splitlines() if "sends no traffic" in line)
    record("helm says", said.strip())
    assert ask(service.target, "/v2/health/ready").status_code == 200


@pytest.fixture(scope="module")
def canary(service: Service, cluster: Cluster) -> str:
    """A canary at 10 %, ready; the fingerprint of the stable model."""
    if not cluster.splits_standard_canary:
        pytest.skip(f"NOT RUN: KServe {cluster.found.kserve} routes nothing to a canary in Standard mode; 0.21 does")
    stable = fingerprint(service.target)
    canary = {"percent": 10, "model": OTHER_MODEL, "replicas": 1}
    service.release.upgrade({"inferenceServices": {NAME: {"canary": canary}}})
    name = f"{NAME}-canary-predictor"
    wait(
        "the canary's Deployment",
        lambda: name in {d.metadata.name for d in cluster.apps.list_namespaced_deployment(service.namespace).items},
        60,
    )
    wait(
        "the canary's pod",
        lambda: cluster.apps.read_namespaced_deployment(name, service.namespace).status.ready_replicas == 1,
        300,
        seen=lambda: cluster.story(service.namespace, NAME),
    )
    cluster.wait_ready(service.namespace, NAME)
    return stable


@pytest.mark.needs("gateway")
def test_a_canary_in_standard_mode_loses_nothing(service: Service, canary: str, record: Record) -> None:
    count = Load(service.target, workers=4, count=100, tokens=4).run(300)
    record("of 100, answered by the canary at 10 %", count.whole - count.who[canary])
    record("lost", len(count.lost))
    assert not count.lost, count.lost[:5]


@pytest.mark.needs("gateway")
def test_canary_shares_in_standard_mode(service: Service, canary: str, record: Record) -> None:
    for percent in (10, 0, 50, 100):
        service.release.upgrade({"inferenceServices": {NAME: {"canary": {"percent": percent}}}})
        time.sleep(3)
        count = Load(service.target, workers=4, count=400, stream=False, tokens=4).run(300)
        assert not count.lost, count.lost[:5]
        record(f"of 400 at {percent} %", count.whole - count.who[canary])
        assert within_three_sigma(count.whole - count.who[canary], 400, percent)
