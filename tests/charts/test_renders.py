"""Every scenario renders, and an API server would take every object of it with no field dropped."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.charts import kserve_merge
from tests.charts.schemas import CORE, crd_problems, problems, unknown_fields
from tests.charts.support import (
    CHART,
    CI_FILES,
    CRDS,
    ROOT,
    Document,
    HelmError,
    default_runtimes,
    helm,
    load_all,
    of_kind,
    render,
    render_ci,
    runtimes_of,
    service,
    standard,
    tool,
)
from tests.tools import reduce_crds

scenario = pytest.mark.parametrize("path", CI_FILES, ids=lambda p: p.name.removesuffix("-values.yaml"))


def test_the_tools_are_the_pinned_ones() -> None:
    script = ROOT / "tests" / "tools" / "install_kube_tools.py"
    pins = dict(
        line.split(" = ") for line in script.read_text().splitlines() if line.startswith(("HELM_V", "KUBECTL_V"))
    )
    assert json.loads(pins["HELM_VERSION"]) == helm("version", "--template", "{{.Version}}").strip()
    done = subprocess.run(
        [tool("kubectl"), "version", "--client", "--output=json"], capture_output=True, text=True, check=True
    )
    assert json.loads(pins["KUBECTL_VERSION"]) == json.loads(done.stdout)["clientVersion"]["gitVersion"]


@scenario
def test_a_scenario_passes_helm_lint_strict(path: Path) -> None:
    assert "0 chart(s) failed" in helm("lint", "--strict", str(CHART), "--values", str(path))


@scenario
def test_no_object_of_a_scenario_has_a_field_that_would_be_dropped(path: Path) -> None:
    found = [problem for document in render_ci(path) for problem in problems(document)]
    assert not found, "\n".join(found)


@scenario
def test_kinds_of_kubernetes_itself_have_no_unknown_field(path: Path) -> None:
    own = [d for d in render_ci(path) if f"{d['apiVersion']}/{d['kind']}" in CORE]
    found = [problem for document in own for problem in problems(document)]
    assert not found, "\n".join(found)


@scenario
def test_what_kserve_makes_of_a_scenario_is_valid_too(path: Path) -> None:
    documents = render_ci(path)
    runtimes = runtimes_of(documents)
    found: list[str] = []
    for isvc in of_kind(documents, "InferenceService").values():
        predictor = isvc["spec"]["predictor"]
        template = kserve_merge.pod(isvc, runtimes[predictor["model"]["runtime"]])
        if isvc["metadata"]["annotations"]["serving.kserve.io/deploymentMode"] == "Knative":
            found += crd_problems(kserve_merge.knative_service(isvc, template))
        else:
            found += problems(kserve_merge.deployment(isvc, template))
        if "autoScaling" in predictor and "metrics" in predictor["autoScaling"]:
            found += crd_problems(kserve_merge.scaled_object(isvc))
        if "workerSpec" in predictor:
            worker = kserve_merge.worker_pod(isvc, runtimes[predictor["model"]["runtime"]])
            found += problems(kserve_merge.deployment(isvc, {"metadata": template["metadata"], "spec": worker}))
    assert not found, "\n".join(found)


@scenario
def test_no_two_objects_of_a_scenario_share_kind_and_name(path: Path) -> None:
    names = [(d["kind"], d["metadata"]["name"]) for d in render_ci(path)]
    assert len(names) == len(set(names))


def test_the_chart_can_be_packaged_without_its_scenarios(tmp_path: Path) -> None:
    helm("package", str(CHART), "--destination", str(tmp_path))
    (package,) = tmp_path.glob("*.tgz")
    shown = load_all(helm("template", "release", str(package)))
    assert set(of_kind(shown, "ClusterServingRuntime")) == set(default_runtimes())
    listing = subprocess.run(["tar", "-tzf", str(package)], capture_output=True, text=True, check=True).stdout
    names = {line.removeprefix("kserve-vllm/") for line in listing.splitlines()}
    kept = {p for p in names if not p.startswith(("templates/", "files/"))}
    assert kept == {"Chart.yaml", "README.md", "values.schema.json", "values.yaml", ".helmignore"}
    assert {p.rsplit(".", 1)[-1] for p in names if p.startswith("files/")} == {"py", "yaml", "json", "md", "sh"}


def test_an_unknown_value_is_refused_at_every_level() -> None:
    for values in (
        {"unknown": 1},
        {"runtimes": {"gpu": {"unknown": 1}}},
        service(unknown=1),
        service(autoscaling={"knative": {"unknown": 1}}),
        service(lora={"adapters": [{"name": "a", "path": "/a", "unknown": 1}]}),
        {"routes": {"r": {"unknown": 1}}},
        {"modelCaches": {"m": {"unknown": 1}}},
        {"serviceAccounts": {"a": {"unknown": 1}}},
    ):
        with pytest.raises(HelmError, match="additional properties 'unknown' not allowed"):
            render(values)


def test_values_outside_their_range_are_refused() -> None:
    for values in (
        service(profile="fastest"),
        service(canary={"percent": 101}),
        service(timeoutSeconds=0),
        service(storageUri="a/model"),
        {"inferenceServices": {"Chat": {"demo": True}}},
        {"image": {"tag": "latest"}},
        {"image": {"digests": {"gpu": "sha256:abc"}}},
        {"runtimes": {"progressDeadlineSeconds": 60}},
        {"routes": {"r": {"hosts": ["https://chat.example.com"]}}},
        {"routes": {"r": {"hosts": ["Chat.example.com"]}}},
        {"routes": {"r": {"hosts": ["chat.example.com:8443"]}}},
        {"extraObjects": [{"metadata": {"name": "neither kind nor version"}}]},
    ):
        with pytest.raises(HelmError, match="values don't meet the specifications of the schema"):
            render(values)


TOLERATION = {"key": "a", "operator": "Exists"}
# Each is one that the API server, or the kubelet, refuses.
MISSHAPEN: dict[str, list[Document]] = {
    "inferenceServices": [
        {"labels": {"a": "x" * 64}},
        {"podLabels": {"a": "x y"}},
        {"nodeSelector": {"a b": "x"}},
        {"annotations": {"a b": "x"}},
        {"resources": {"requests": {"memory": "64GB"}}},
        {"resources": {"limits": {"cpu": -1}}},
        {"resources": {"limits": {"cpu": ""}}},
        {"apiKeys": {"secretName": "My_Secret"}},
        {"warmup": {"configMap": "a b"}},
        {"serviceAccountName": "A"},
        {"coldStart": {"cache": {"claim": "a_b"}}},
        {"runtimeClassName": "a b"},
        {"tolerations": [{**TOLERATION, "value": "x"}]},
        {"tolerations": [{"operator": "Equal", "value": "x"}]},
        {"tolerations": [{**TOLERATION, "effect": "NoSchedule", "tolerationSeconds": 1}]},
        {"gpu": {"products": ["x" * 64]}},
        {"podDisruptionBudget": {"maxUnavailable": "0%"}},
        {"podDisruptionBudget": {"maxUnavailable": "101%"}},
        {"networkPolicy": {"egressCIDRs": ["192.0.2.0/33"]}},
        {"networkPolicy": {"fromNamespaces": ["My NS"]}},
        {"storageUri": "hf://org/model "},
        {"extraVolumes": [{"name": "a_b", "emptyDir": {}}]},
        {"extraVolumes": [{"name": "a", "emptyDir": {}, "configMap": {"name": "b"}}]},
        {"extraVolumeMounts": [{"name": "a", "mountPath": "x"}]},
        {"extraVolumeMounts": [{"name": False, "mountPath": "/x"}]},
        {"initContainers": [{"name": "a", "image": "b:1", "env": {"A": "1"}}]},
        {"initContainers": [{"name": "a", "image": "b:1", "env": ["A=1"]}]},
        {"initContainers": [{"name": "a", "image": "b:1", "args": "x"}]},
        {"initContainers": [{"name": "a", "image": "b:1", "volumeMounts": ["/x"]}]},
        {"env": [{"name": "A", "valueFrom": {"secretKeyRef": {"name": "A b", "key": "k"}}}]},
    ],
    "modelCaches": [
        {"job": {"memory": "1 GB"}},
        {"job": {"resources": {"limits": {"cpu": "one"}}}},
        {"claim": {"accessModes": ["ReadWriteMany", "ReadWriteMany"]}},
        {"directory": "a/../../b"},
        {"localModelCache": {"sourceModelUri": "a/b"}},
    ],
    "batchJobs": [{"output": "a//b"}, {"url": "http://a b"}, {"claim": "A"}],
    "routes": [{"hosts": ["a.b", "a.b"]}, {"hosts": ["a" * 64]}, {"gateway": {"name": "A b"}}],
    "serviceAccounts": [{"secrets": ["A b"]}],
}


def test_what_an_api_server_would_refuse_the_schema_refuses_first() -> None:
    values: Document = {
        top: {f"e{number}": entry for number, entry in enumerate(entries)} for top, entries in MISSHAPEN.items()
    }
    release: Document = {
        "commonLabels": {"a": "x y"},
        "image": {"registry": "https://ghcr.io", "repository": "a/b:1", "tag": "a b", "pullSecrets": ["A b"]},
        "monitoring": {"podMonitor": {"interval": "0s"}},
        # Names of an earlier version have the content of what they are called now.
        "runtimes": {"labels": 1},
    }
    with pytest.raises(HelmError) as error:
        render({**values, **release})
    for top, entries in MISSHAPEN.items():
        unseen = [e for n, e in enumerate(entries) if f"'/{top}/e{n}'" not in str(error.value)]
        assert not unseen
    for path in ("commonLabels/a", "image/registry", "image/repository", "image/tag", "image/pullSecrets/0"):
        assert f"'/{path}'" in str(error.value)
    assert "'/monitoring/podMonitor/interval'" in str(error.value)
    assert "'/runtimes/labels'" in str(error.value)


@pytest.mark.skipif(
    not any(CRDS.glob("*.yaml")),
    reason=f"no published CRDs at {CRDS}: the copy in schemas.json was used and not compared with them",
)
def test_the_schemas_are_the_published_ones() -> None:
    assert json.loads(reduce_crds.REDUCED.read_text()) == reduce_crds.reduced(CRDS), "see tests/tools/reduce_crds.py"


def test_the_check_for_unknown_fields_finds_one() -> None:
    (isvc,) = of_kind(render(service()), "InferenceService").values()
    assert not problems(isvc)
    isvc["spec"]["predictor"]["minReplica"] = 1
    isvc["spec"]["predictor"]["model"]["resources"]["limit"] = {}
    found = problems(isvc)
    assert any("predictor.minReplica: unknown field" in line for line in found)
    assert any("resources.limit: unknown field" in line for line in found)


def test_the_check_of_kubernetes_kinds_finds_wrong_fields_and_types() -> None:
    (budget,) = of_kind(render(standard(podDisruptionBudget={"enabled": True})), "PodDisruptionBudget").values()
    assert not problems(budget)
    broken: Document = {**budget, "spec": {**budget["spec"], "maxUnavailible": 1, "unhealthyPodEvictionPolicy": 3}}
    assert len(problems(broken)) == 2
    binding: Document = {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding", "metadata": {"name": "b"}}
    assert problems(binding) == ["RoleBinding/b.roleRef: required, and not there"]


def test_the_walk_honours_structural_schemas() -> None:
    schema: Document = {
        "type": "object",
        "properties": {
            "open": {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
            "closed": {"type": "object", "properties": {"a": {"type": "string", "nullable": True}}},
            "map": {"type": "object", "additionalProperties": {"type": "object", "properties": {}}},
        },
    }
    value: Document = {"open": {"x": 1}, "closed": {"a": None, "b": 1}, "map": {"k": {"c": 1}}, "other": None}
    assert sorted(unknown_fields(schema, value, "")) == [
        ".closed.b: unknown field",
        ".map.k.c: unknown field",
        ".other: unknown field",
    ]
