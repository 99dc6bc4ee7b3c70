"""Every scenario of the chart and every manifest of the catalogue: taken by the webhooks, written, kept, removed.

In namespaces that may hold no pod, so that no GPU and no download is needed and nothing waits for a start.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes.client.exceptions import ApiException
from kubernetes.utils.quantity import parse_quantity

from tests.charts import kserve_merge
from tests.e2e.cluster import Cluster, Object, wait
from tests.e2e.conftest import Record, Suite
from tests.e2e.releases import CATALOGUE, CHART, SCENARIOS, HelmFailed, Release, Values, helm

_AT_ONCE = 3
_KSERVE_ACTS_WITHIN_S = 5.0
"""A controller that takes an object for its own deletes or rewrites it within this; see the case below."""
NAMES = [path.name.removesuffix("-values.yaml") for path in SCENARIOS]
MANIFESTS = sorted(CATALOGUE.rglob("*.yaml"))


@dataclass
class Scenario:
    """A scenario on the cluster; `problem` says why it is not."""

    release: Release
    objects: list[Object] = field(default_factory=list)
    problem: str = ""
    missing: str = ""
    seconds: float = 0.0
    generations: dict[str, int] = field(default_factory=dict)
    uninstalled: bool = False


def _is_knative(thing: Object) -> bool:
    return bool(thing["metadata"]["annotations"]["serving.kserve.io/deploymentMode"] == "Knative")


def _missing(cluster: Cluster, objects: list[Object]) -> str:
    """What the cluster lacks for these objects; empty if nothing."""
    for thing in objects:
        if thing["kind"] == "InferenceService" and _is_knative(thing) and not cluster.found.knative:
            return "Knative Serving"
        try:
            cluster.path_of(thing, "default")
        except LookupError:
            return f"the kind {thing['kind']}"
        if thing["kind"] == "InferenceService" and _is_knative(thing) and _writes_claims(thing):
            features = cluster.get("/api/v1/namespaces/knative-serving/configmaps/config-features") or {}
            if features.get("data", {}).get(_WRITES) != "enabled":
                return f"Knative's feature {_WRITES}"
    return ""


_WRITES = "kubernetes.podspec-persistent-volume-write"
"""Knative refuses a claim that a pod may write to, unless this is `enabled` in its ConfigMap config-features."""


def _writes_claims(isvc: Object) -> bool:
    """Whether a service has a claim that is not read-only."""
    volumes = isvc["spec"]["predictor"].get("volumes", [])
    claims = {
        v["name"] for v in volumes if v.get("persistentVolumeClaim", {"readOnly": True}).get("readOnly") is not True
    }
    mounts = isvc["spec"]["predictor"].get("model", {}).get("volumeMounts", [])
    return any(mount["name"] in claims and not mount.get("readOnly") for mount in mounts)


def _kept(objects: list[Object]) -> list[Object]:
    """Those that helm is told to leave."""
    return [o for o in objects if (o["metadata"].get("annotations") or {}).get("helm.sh/resource-policy") == "keep"]


def _documents(text: str) -> list[Object]:
    return [d for d in yaml.safe_load_all(text) if d]


def _install(cluster: Cluster, scenario: Scenario) -> None:
    release = scenario.release
    # `--no-hooks` leaves the pods of `helm test` out of what is compared.
    rendered = helm(
        "template", release.name, str(CHART), "--namespace", release.namespace, "--no-hooks", values=release.values
    )
    scenario.objects = _documents(rendered)
    scenario.missing = _missing(cluster, scenario.objects)
    if scenario.missing:
        return
    try:
        scenario.seconds = release.install()
    except HelmFailed as error:
        scenario.problem = str(error)


# What the scenario `storage` names, and every cluster has its own of.
_MODELSCOPE: Object = {
    "apiVersion": "serving.kserve.io/v1alpha1",
    "kind": "ClusterStorageContainer",
    "metadata": {"name": "modelscope"},
    "spec": {
        "container": {"name": "storage-initializer", "image": "registry.invalid/modelscope-initializer:1"},
        "supportedUriFormats": [{"prefix": "ms://"}],
        "workloadType": "initContainer",
    },
}


@pytest.fixture(scope="module")
def stores(cluster: Cluster) -> Iterator[None]:
    """A ClusterStorageContainer of the name that a scenario has, unless the cluster has one."""
    path = f"{cluster.path_of(_MODELSCOPE, '')}/{_MODELSCOPE['metadata']['name']}"
    ours = cluster.get(path) is None
    if ours:
        cluster.apply(_MODELSCOPE, "")
    yield
    if ours:
        cluster.delete(_MODELSCOPE, "")


@pytest.fixture(scope="module")
def platform(suite: Suite) -> Iterator[Release]:
    """A release of the runtimes that other releases and the catalogue run on, by their usual names."""
    namespace = suite.namespace("cat", {"pod-security.kubernetes.io/enforce": "privileged"})
    suite.cluster.forbid_pods(namespace)
    named: Values = {kind: {"name": f"kserve-vllm-{kind}"} for kind in ("cpu", "gpu", "multinode")}
    release = suite.release("cat", namespace, {"runtimes": named})
    path = "/apis/serving.kserve.io/v1alpha1/clusterservingruntimes/kserve-vllm-cpu"
    if suite.cluster.get(path) is None:
        release.install()
    yield release
    release.uninstall()


@pytest.fixture
def catalogue(platform: Release) -> str:
    """The platform's namespace, with the runtimes that the catalogue's lines `# Chart: ` ask for too. Not before the
    scenarios are gone: some of them have runtimes of these names."""
    more = {
        "extra": {"kserve-vllm-amd": {"image": "registry.invalid/kserve-vllm:0.1.0-rocm"}},
        "engines": {"sglang": {"enabled": True}, "llama-cpp": {"enabled": True}},
    }
    if platform.installed:
        platform.values["runtimes"] = {**platform.values["runtimes"], **more}
        platform.upgrade()
    return platform.namespace


@pytest.fixture(scope="module")
def scenarios(suite: Suite, stores: None, platform: Release, request: pytest.FixtureRequest) -> Mapping[str, Scenario]:
    """All scenarios that were asked for, each in a namespace of its own, some time after they were installed."""
    made = {}
    asked = {item.callspec.params.get("name") for item in request.session.items if hasattr(item, "callspec")}
    for n, path in enumerate(SCENARIOS):
        if asked and NAMES[n] not in asked:
            continue
        namespace = suite.namespace(f"sc{n}", {"pod-security.kubernetes.io/enforce": "privileged"})
        suite.cluster.forbid_pods(namespace)
        made[NAMES[n]] = Scenario(suite.release(f"sc{n}", namespace, yaml.safe_load(path.read_text()) or {}))
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(lambda s: _install(suite.cluster, s), made.values()))
    time.sleep(_KSERVE_ACTS_WITHIN_S)
    return made


def _usable(scenarios: Mapping[str, Scenario], name: str) -> Scenario:
    scenario = scenarios[name]
    if scenario.missing:
        pytest.skip(f"NOT RUN: the cluster lacks {scenario.missing}")
    assert not scenario.problem, scenario.problem
    return scenario


def _same(have: Any, want: Any) -> bool:
    """Whether `have` holds all of `want`; a server adds defaults."""
    if isinstance(want, dict):
        return isinstance(have, dict) and all(_same(have.get(key), value) for key, value in want.items())
    if isinstance(want, list):
        return isinstance(have, list) and len(have) == len(want) and all(map(_same, have, want))
    return str(have) == str(want) or _quantity(have) == _quantity(want) is not None


def _quantity(value: Any) -> Decimal | None:
    """A quantity such as `800m` or `0.8` as a number; None for anything else."""
    try:
        return Decimal(parse_quantity(value))  # type: ignore[no-untyped-call]
    except (ValueError, TypeError, AttributeError):
        return None


def _written(cluster: Cluster, namespace: str, isvc: Object) -> bool:
    """Whether KServe has made the workload of a service."""
    variant = isvc["spec"]["predictor"].get("name", "")
    group, plural = ("serving.knative.dev", "services") if _is_knative(isvc) else ("apps", "deployments")
    listing = cluster.get(f"/apis/{group}/v1/namespaces/{namespace}/{plural}") or {"items": []}
    name = "-".join(part for part in (isvc["metadata"]["name"], variant, "predictor") if part)
    return any(item["metadata"]["name"] == name for item in listing["items"])


def _wait_written(cluster: Cluster, namespace: str, isvc: Object) -> None:
    name = isvc["metadata"]["name"]
    wait(
        f"workload of {name}",
        lambda: _written(cluster, namespace, isvc),
        120,
        seen=lambda: cluster.story(namespace, name),
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_scenario_is_taken_and_written(
    scenarios: Mapping[str, Scenario], cluster: Cluster, record: Record, name: str
) -> None:
    scenario = _usable(scenarios, name)
    namespace = scenario.release.namespace
    services = [o for o in scenario.objects if o["kind"] == "InferenceService"]
    for isvc in services:
        _wait_written(cluster, namespace, isvc)
        live = cluster.isvc(namespace, isvc["metadata"]["name"])
        scenario.generations[isvc["metadata"]["name"]] = live["metadata"]["generation"]
    record("objects", len(scenario.objects))
    record("helm install, seconds", scenario.seconds)


@pytest.mark.parametrize("name", NAMES)
def test_what_the_chart_writes_stays_as_it_is(scenarios: Mapping[str, Scenario], cluster: Cluster, name: str) -> None:
    """A controller that takes an object for its own deletes it or writes it anew."""
    scenario = _usable(scenarios, name)
    wrong = []
    for thing in scenario.objects:
        label = f"{thing['kind']} {thing['metadata']['name']}"
        namespace = thing["metadata"].get("namespace", scenario.release.namespace)
        live = cluster.get(f"{cluster.path_of(thing, namespace)}/{thing['metadata']['name']}")
        if live is None:
            wrong.append(f"{label} is gone")
        elif thing["kind"] != "InferenceService" and not _same(live.get("spec"), thing.get("spec")):
            # KServe's own webhook completes an InferenceService.
            wrong.append(f"{label} has another spec: {live.get('spec')}")
    assert not wrong, "\n".join(wrong)


def _differences(have: Any, want: Any, at: str = "") -> list[str]:
    """Where `have`, in which a server has written its defaults, does not hold what `want` does."""
    if isinstance(want, dict) and isinstance(have, dict):
        return [line for key, value in want.items() for line in _differences(have.get(key), value, f"{at}.{key}")]
    if isinstance(want, list) and isinstance(have, list) and len(have) == len(want):
        return [line for n, value in enumerate(want) for line in _differences(have[n], value, f"{at}[{n}]")]
    # What is empty the server may leave out.
    return [] if _same(have, want) or not (have or want) else [f"{at}: {have!r}, and the model says {want!r}"]


def _sorted_env(template: Object) -> Object:
    """The same with environment and volumes by name and mounts by path: their order says nothing here."""
    spec = template["spec"]
    for container in [*spec["containers"], *spec.get("initContainers", [])]:
        # By name alone: what refers to another variable keeps its place by what the chart's own tests hold.
        container["env"] = sorted(container.get("env", []), key=lambda item: item["name"])
        container["volumeMounts"] = sorted(container.get("volumeMounts", []), key=lambda item: item["mountPath"])
    spec["volumes"] = sorted(spec.get("volumes", []), key=lambda item: item["name"])
    return template


def _modelled(isvc: Object, runtime: Object) -> dict[str, Object]:
    """Path below the namespace, and pod template (of a Knative Service its revision's), as our model has them."""
    template = kserve_merge.pod(isvc, runtime)
    if _is_knative(isvc):
        service = kserve_merge.knative_service(isvc, template)
        return {f"serving.knative.dev/v1 services {service['metadata']['name']}": service["spec"]["template"]}
    variant = isvc["spec"]["predictor"].get("name", "")
    name = "-".join(part for part in (isvc["metadata"]["name"], variant, "predictor") if part)
    labels = {**template["metadata"]["labels"], "app": f"isvc.{name}"}
    made = {f"apps/v1 deployments {name}": {**template, "metadata": {**template["metadata"], "labels": labels}}}
    if "workerSpec" in isvc["spec"]["predictor"]:
        made[f"apps/v1 deployments {name}-worker"] = {"spec": kserve_merge.worker_pod(isvc, runtime)}
    return made


@pytest.mark.parametrize("name", NAMES)
def test_kserve_s_workload_is_what_our_model_of_it_says(
    scenarios: Mapping[str, Scenario], cluster: Cluster, record: Record, name: str
) -> None:
    """The chart's tests judge pods by `tests/charts/kserve_merge.py`: here it is judged by KServe itself."""
    scenario = _usable(scenarios, name)
    runtimes = {o["metadata"]["name"]: o for o in scenario.objects if o["kind"].endswith("ServingRuntime")}
    wrong, compared = [], 0
    for isvc in (o for o in scenario.objects if o["kind"] == "InferenceService"):
        runtime = runtimes.get(isvc["spec"]["predictor"]["model"]["runtime"])
        if runtime is None:
            continue
        isvc["metadata"]["namespace"] = scenario.release.namespace
        for where, template in _modelled(isvc, runtime).items():
            base, plural, workload = where.split()
            live = cluster.get(f"/apis/{base}/namespaces/{scenario.release.namespace}/{plural}/{workload}")
            if live is None and workload.endswith("-worker") and cluster.deletes_workers:
                record("workers not compared", f"KServe {cluster.found.kserve} deletes them at every reconcile")
                continue
            if live is None:
                wrong.append(f"{where} is not there")
                continue
            wrong += _differences(_sorted_env(live["spec"]["template"]), _sorted_env(template), workload)
            compared += 1
    record("workloads compared", compared)
    assert not wrong, "\n".join(wrong)


def test_an_upgrade_that_changes_nothing_restarts_nothing(
    scenarios: Mapping[str, Scenario], cluster: Cluster, record: Record
) -> None:
    usable = [s for s in scenarios.values() if not s.missing and not s.problem]

    def upgrade(scenario: Scenario) -> list[str]:
        scenario.release.upgrade()
        changed = []
        for name, before in scenario.generations.items():
            after = cluster.isvc(scenario.release.namespace, name)["metadata"]["generation"]
            changed += (
                [f"{scenario.release.namespace}/{name}: generation {before} -> {after}"] if after != before else []
            )
        return changed

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        changed = [line for lines in pool.map(upgrade, usable) for line in lines]
    record("scenarios", len(usable))
    assert not changed, changed


def test_runtimes_of_the_next_version_are_taken_beside_those_of_this_one(
    suite: Suite, cluster: Cluster, record: Record
) -> None:
    """Chosen by format, kept on upgrade: KServe refuses two of one priority."""
    path = next(path for path in SCENARIOS if path.name == "versioned-runtimes-values.yaml")
    values = {"runtimes": yaml.safe_load(path.read_text())["runtimes"]}
    release = suite.release("next", suite.namespace("next"), values)
    runtimes = "/apis/serving.kserve.io/v1alpha1/clusterservingruntimes"
    listed = f"{runtimes}?labelSelector=app.kubernetes.io/instance={release.name}"
    priorities: dict[str, int] = {}
    for version in ("98.0.0", "98.0.1", "98.1.0"):
        release.values["image"] = {**release.values["image"], "tag": version}
        if release.installed:
            release.upgrade()
        else:
            release.install()
        priorities = {
            item["metadata"]["name"]: item["spec"]["supportedModelFormats"][0]["priority"]
            for item in cluster.get(listed)["items"]
        }
    record("runtimes of three versions", len(priorities))
    of_cpu = [priority for name, priority in sorted(priorities.items()) if "-cpu-" in name]
    assert len(priorities) == 6
    assert of_cpu == sorted(of_cpu)
    release.uninstall()
    cluster.delete_what_is_left_of(release.name)


@pytest.fixture(scope="module")
def uninstalled(scenarios: Mapping[str, Scenario], cluster: Cluster) -> Mapping[str, Scenario]:
    """The scenarios after `helm uninstall`."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(lambda s: s.release.uninstall(), scenarios.values()))
    return scenarios


@pytest.mark.parametrize("name", NAMES)
def test_a_scenario_is_removed_without_rest(uninstalled: Mapping[str, Scenario], cluster: Cluster, name: str) -> None:
    scenario = _usable(uninstalled, name)
    release, namespace = scenario.release, scenario.release.namespace
    kept = _kept(scenario.objects)
    expected = {thing["metadata"]["name"] for thing in kept}

    def rest() -> list[str]:
        left = cluster.left_in(namespace) + cluster.left_of_release(release.name)
        return [what for what in left if what.partition("/")[2] not in expected]

    try:
        wait("nothing left", lambda: not rest(), 60, 1.0, seen=lambda: "\n".join(rest()))
        for thing in kept:
            path = f"{cluster.path_of(thing, namespace)}/{thing['metadata']['name']}"
            assert cluster.get(path) is not None, f"{thing['metadata']['name']} was to be kept"
    finally:
        for thing in kept:
            cluster.delete(thing, namespace)


# -- The catalogue ---


def _key(thing: Object) -> tuple[str, str]:
    return thing["kind"], thing["metadata"]["name"]


def _lacks_runtime(cluster: Cluster, objects: list[Object]) -> str:
    """The runtime that a manifest names and the cluster has not; empty if none."""
    for thing in objects:
        if thing["kind"] == "InferenceService":
            name = thing["spec"]["predictor"]["model"]["runtime"]
            if cluster.get(f"/apis/serving.kserve.io/v1alpha1/clusterservingruntimes/{name}") is None:
                return f"the runtime {name}"
    return ""


def test_every_manifest_of_the_catalogue_is_taken_written_and_removed(
    catalogue: str, cluster: Cluster, record: Record
) -> None:
    """The steps of a canary one after the other, on one another, as they are meant to be applied."""
    taken, missing, wrong = 0, [], []
    before = set(cluster.left_in(catalogue))
    steps: dict[Path, list[Path]] = {}
    for path in MANIFESTS:
        steps.setdefault(path.parent if path.parent != CATALOGUE else path, []).append(path)
    for paths in steps.values():
        applied: list[Object] = []
        for path in paths:
            objects = _documents(path.read_text())
            if lacks := _missing(cluster, objects) or _lacks_runtime(cluster, objects):
                missing.append(f"{path.stem}: {lacks}")
                continue
            try:
                for thing in objects:
                    cluster.apply(thing, catalogue)
                    if all(_key(thing) != _key(other) for other in applied):
                        applied.append(thing)
                for isvc in (o for o in objects if o["kind"] == "InferenceService"):
                    _wait_written(cluster, catalogue, isvc)
                taken += 1
            except (ApiException, AssertionError) as error:
                wrong.append(f"{path.relative_to(CATALOGUE)}: {str(getattr(error, 'body', error))[:600]}")
        for thing in applied:
            cluster.delete(thing, catalogue)
        # The canary's steps of the two modes bear one name.
        names = {thing["metadata"]["name"] for thing in applied if thing["kind"] == "InferenceService"}
        gone = lambda names=names: not names & {s["metadata"]["name"] for s in cluster.isvcs(catalogue)}  # noqa: E731
        wait("its services removed", gone, 60)
    wait(
        "the catalogue removed",
        lambda: set(cluster.left_in(catalogue)) <= before,
        120,
        1.0,
        seen=lambda: str(set(cluster.left_in(catalogue)) - before),
    )
    record("manifests taken, written and removed", taken)
    if missing:
        record("not run for lack of what they need", "; ".join(missing))
    assert not wrong, "\n".join(wrong)


def test_a_service_that_kserve_refuses_is_refused_here_too(platform: Release, cluster: Cluster) -> None:
    """The webhooks are asked at all: without this, `taken` says nothing."""
    broken = _documents((CATALOGUE / "cpu-demo.yaml").read_text())[0]
    broken["spec"]["predictor"]["minReplicas"] = 3
    broken["spec"]["predictor"]["maxReplicas"] = 1
    with pytest.raises(ApiException) as refused:
        cluster.apply(broken, platform.namespace)
    assert "admission webhook" in str(refused.value.body)
