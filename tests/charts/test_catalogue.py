"""The manifests of the catalogue apply as they are, on the runtimes that the chart's defaults write.

A manifest that needs another runtime says in its line `# Chart: ` with which flags the chart writes it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from tests.charts import kserve_merge
from tests.charts.schemas import crd_problems, problems
from tests.charts.support import (
    CATALOGUE,
    CHART,
    GOLDEN,
    Document,
    chart_flags,
    load,
    load_all,
    of_kind,
    render_ci,
    runtime_of,
    runtimes_by_flags,
    runtimes_of,
)

MANIFESTS = sorted(CATALOGUE.rglob("*.yaml"))
LISTED = (
    "cpu-demo gpu-single awq-quantized tensor-parallel multi-node scale-to-zero keda-queue-depth canary multi-lora "
    "speculative-decoding long-context embeddings grpc gpu-sharing private-hf-model pvc-cached openshift "
    "tenant-release amd hami ingress-nginx ipv6 sglang llama-cpp"
).split()
# Those that are the chart's own scenario of the same name, written out.
WRITTEN_OUT = ["openshift", "tenant-release", "amd", "hami", "ingress-nginx", "ipv6", "sglang", "llama-cpp"]
IDS = [str(path.relative_to(CATALOGUE).with_suffix("")) for path in MANIFESTS]
manifest = pytest.mark.parametrize("path", MANIFESTS, ids=IDS)


def service_of(path: Path) -> Document:
    """The one InferenceService of a manifest."""
    (found,) = of_kind(load_all(path.read_text()), "InferenceService").values()
    return found


def is_knative(isvc: Document) -> bool:
    mode: str = isvc["metadata"]["annotations"]["serving.kserve.io/deploymentMode"]
    assert mode in ("Knative", "Standard")
    return mode == "Knative"


def merged(path: Path) -> list[Document]:
    """The objects that KServe makes of the InferenceService of a manifest."""
    isvc = service_of(path)
    runtime = runtime_of(path, isvc)
    template = kserve_merge.pod(isvc, runtime)
    if is_knative(isvc):
        return [kserve_merge.knative_service(isvc, template)]
    made = [kserve_merge.deployment(isvc, template)]
    predictor = isvc["spec"]["predictor"]
    if "workerSpec" in predictor:
        worker = kserve_merge.worker_pod(isvc, runtime)
        made.append(kserve_merge.deployment(isvc, {"metadata": template["metadata"], "spec": worker}))
    if "autoScaling" in predictor:
        made.append(kserve_merge.scaled_object(isvc))
    return made


def test_the_catalogue_has_every_entry_and_the_table_lists_them_all() -> None:
    entries = {path.relative_to(CATALOGUE).parts[0].removesuffix(".yaml") for path in MANIFESTS}
    assert entries == set(LISTED)
    table = (CATALOGUE / "README.md").read_text()
    links = set(re.findall(r"^\| \[[^]]+\]\(([^)]+)\)", table, re.MULTILINE))
    assert links == {f"{e}.yaml" for e in LISTED if e != "canary"} | {"canary/knative", "canary/standard"}


@manifest
def test_a_manifest_says_what_it_shows_and_what_it_needs(path: Path) -> None:
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert header[0].startswith(("# Shows: ", "# Step "))
    assert any(line.startswith("# Needs: ") for line in header)


@manifest
def test_a_manifest_has_no_field_that_would_be_dropped(path: Path) -> None:
    found = [problem for document in load_all(path.read_text()) for problem in problems(document)]
    assert not found, "\n".join(found)


@manifest
def test_what_kserve_makes_of_a_manifest_is_valid(path: Path) -> None:
    found = []
    for document in merged(path):
        found += crd_problems(document) if "knative" in document["apiVersion"] else problems(document)
    assert not found, "\n".join(found)


@manifest
def test_what_kserve_makes_of_a_manifest_is_what_it_was(path: Path, update_golden: bool) -> None:
    golden = GOLDEN / path.relative_to(CATALOGUE)
    text = yaml.safe_dump_all(merged(path), sort_keys=True, width=120)
    if update_golden:
        golden.parent.mkdir(parents=True, exist_ok=True)
        golden.write_text(text)
    assert golden.exists(), "run pytest tests/charts --update-golden and read the difference"
    assert load_all(golden.read_text()) == load_all(text)


def test_no_golden_file_is_left_over() -> None:
    assert {p.relative_to(GOLDEN) for p in GOLDEN.rglob("*.yaml")} == {p.relative_to(CATALOGUE) for p in MANIFESTS}


@manifest
def test_a_manifest_is_not_taken_for_multi_model_serving(path: Path) -> None:
    assert not kserve_merge.is_multi_model(service_of(path)["spec"]["predictor"])


@manifest
def test_a_manifest_leaves_the_drain_its_time(path: Path) -> None:
    isvc = service_of(path)
    predictor = isvc["spec"]["predictor"]
    arguments = predictor["model"].get("args", [])
    given = {a.split("=")[0]: int(a.split("=")[1]) for a in arguments if a.startswith("--drain-")}
    drain = given.get("--drain-timeout", 60) + given.get("--drain-delay", 0)
    if is_knative(isvc):
        assert "terminationGracePeriodSeconds" not in predictor
        assert drain <= predictor["timeout"] <= 600
    else:
        # Endpoints need a moment to learn that a pod leaves; another engine's pod sleeps that long.
        sleep = predictor["model"].get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        assert given.get("--drain-delay", sleep) >= 5
        assert drain < predictor["terminationGracePeriodSeconds"]
        assert predictor["timeout"] > 60


@manifest
def test_the_gpus_of_a_manifest_are_as_many_as_its_parallelism(path: Path) -> None:
    isvc = service_of(path)
    runtime = runtime_of(path, isvc)
    container = kserve_merge.pod(isvc, runtime)["spec"]["containers"][0]
    words = dict(a.split("=", 1) for a in kserve_merge.expanded(container) if "=" in a)
    stages = 1 if "workerSpec" in isvc["spec"]["predictor"] else int(words.get("--pipeline-parallel-size", 1))
    needed = int(words.get("--tensor-parallel-size", words.get("--tp-size", 1))) * stages
    limits = container["resources"].get("limits", {})
    whole = [n for resource, n in limits.items() if re.fullmatch(r"(nvidia|amd)\.com/(gpu|mig-.+)", resource)]
    assert sum(map(int, whole)) == (0 if runtime["metadata"]["name"].endswith("-cpu") else needed)


@manifest
def test_no_manifest_holds_a_secret_or_a_floating_image(path: Path) -> None:
    text = path.read_text()
    assert ":latest" not in text
    assert not of_kind(load_all(text), "Secret")
    for document in load_all(text):
        for container in document.get("spec", {}).get("template", {}).get("spec", {}).get("containers", []):
            assert container["image"] == f"ghcr.io/kserve-vllm/kserve-vllm:{version()}-cpu"
            assert all("valueFrom" in e for e in container["env"] if e["name"].endswith(("TOKEN", "KEY", "SECRET")))


def version() -> str:
    return str(load(CHART / "Chart.yaml")["appVersion"])


@pytest.mark.parametrize("mode", ["knative", "standard"])
def test_the_steps_of_a_canary_are_numbered_and_change_one_service(mode: str) -> None:
    steps = sorted((CATALOGUE / "canary" / mode).glob("*.yaml"))
    assert [int(p.name.split("-")[0]) for p in steps] == list(range(1, len(steps) + 1))
    assert {service_of(p)["metadata"]["name"] for p in steps} == {"canary"}


def test_the_walk_in_knative_goes_from_0_to_100_percent_and_back() -> None:
    steps = [service_of(p)["spec"]["predictor"] for p in sorted((CATALOGUE / "canary" / "knative").glob("*.yaml"))]
    first, new = steps[0]["model"]["storageUri"], steps[1]["model"]["storageUri"]
    assert first != new
    walk = [(step["model"]["storageUri"], step.get("canaryTrafficPercent")) for step in steps]
    assert walk == [(first, None), (new, 0), (new, 10), (new, 50), (new, None), (new, 0)]
    # Anything else that changes would be a third revision.
    for step in steps[1:]:
        assert {k: v for k, v in step.items() if k != "canaryTrafficPercent"} == {
            k: v for k, v in steps[1].items() if k != "canaryTrafficPercent"
        }


def test_the_walk_in_standard_mode_goes_from_0_to_100_percent_and_back() -> None:
    specs = [service_of(p)["spec"] for p in sorted((CATALOGUE / "canary" / "standard").glob("*.yaml"))]
    walk = []
    for spec in specs:
        canary = [(c["predictor"]["name"], c["trafficPercent"]) for c in spec.get("canary", [])]
        walk.append((spec["predictor"]["name"], *canary))
    assert walk == [
        ("v1",),
        ("v1", ("v2", 0)),
        ("v1", ("v2", 10)),
        ("v1", ("v2", 50)),
        ("v1", ("v2", 100)),
        ("v2",),
        ("v2", ("v1", 100)),
    ]
    models: dict[str, str] = {}
    for spec in specs:
        for variant in [spec["predictor"], *(c["predictor"] for c in spec.get("canary", []))]:
            # KServe refuses a new name without a new model, and a promotion that loads again would be a gap.
            assert models.setdefault(variant["name"], variant["model"]["storageUri"]) == variant["model"]["storageUri"]
    assert len(set(models.values())) == 2


def test_a_canary_in_standard_mode_has_a_fixed_number_of_pods() -> None:
    for path in (CATALOGUE / "canary" / "standard").glob("*.yaml"):
        spec = service_of(path)["spec"]
        for canary in spec.get("canary", []):
            predictor = canary["predictor"]
            assert predictor["minReplicas"] <= spec["predictor"]["minReplicas"]
            assert not {"maxReplicas", "scaleTarget", "scaleMetric", "autoScaling"} & set(predictor)
            assert predictor["name"] != spec["predictor"]["name"]


def test_head_and_workers_of_the_multi_node_service_get_the_same_engine() -> None:
    isvc = service_of(CATALOGUE / "multi-node.yaml")
    head = kserve_merge.pod(isvc, runtime_of(CATALOGUE / "multi-node.yaml", isvc))["spec"]["containers"][0]
    worker = kserve_merge.worker_pod(isvc, runtime_of(CATALOGUE / "multi-node.yaml", isvc))["containers"][0]
    alone = ("--model_name", "--model=", "--node-rank", "--master-addr", "--headless", "--drain-")
    shaped = [[a for a in kserve_merge.expanded(c) if not a.startswith(alone)] for c in (head, worker)]
    assert sorted(shaped[0]) == sorted(shaped[1])
    assert {"--nnodes=2", "--tensor-parallel-size=8", "--pipeline-parallel-size=2"} <= set(shaped[0])
    assert head["resources"]["limits"] == worker["resources"]["limits"]
    assert kserve_merge.ray_node_count(isvc, runtime_of(CATALOGUE / "multi-node.yaml", isvc)) == 2


def as_the_chart_has_it(isvc: Document, runtime: Document) -> Document:
    """The pod of a service and how many there are, without its names, Helm's labels and what only sizes it."""
    predictor = isvc["spec"]["predictor"]
    pod = json.loads(
        json.dumps(kserve_merge.pod(isvc, runtime))
        .replace(f"={isvc['metadata']['name']}", "=NAME")
        .replace(f'"{isvc["metadata"]["name"]}"', '"NAME"')
    )
    pod["metadata"]["labels"] = {
        name: value for name, value in pod["metadata"]["labels"].items() if "kubernetes.io/" not in name
    }
    for container in pod["spec"]["containers"]:
        container["args"] = [a for a in container["args"] if not a.startswith(("--max-model-len", "--host"))]
        container["resources"] = {
            group: {name: str(n) for name, n in amounts.items() if "/" in name}
            for group, amounts in container["resources"].items()
        }
        container["volumeMounts"].sort(key=lambda mount: str(mount["mountPath"]))
    return {"pod": pod, "storage": predictor["model"].get("storageUri"), "several": predictor.get("storageUris")}


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_a_manifest_is_the_chart_s_scenario_of_its_name(name: str) -> None:
    path = CATALOGUE / f"{name}.yaml"
    mine = service_of(path)
    scenario = list(render_ci(CHART / "ci" / f"{name}-values.yaml"))
    (theirs,) = of_kind(scenario, "InferenceService").values()
    model = theirs["spec"]["predictor"]["model"]
    if name == "openshift":
        # A larger model, since it is not about the model.
        model["storageUri"] = mine["spec"]["predictor"]["model"]["storageUri"]
    found = as_the_chart_has_it(mine, runtime_of(path, mine))
    wanted = as_the_chart_has_it(theirs, runtimes_of(scenario)[model["runtime"]])
    if name in ("amd", "ipv6", "sglang"):
        # The scenario's runtime has settings that the manifest's flags do not repeat.
        for each in (found, wanted):
            each["pod"]["spec"].pop("nodeSelector", None)
            for container in each["pod"]["spec"]["containers"]:
                container["env"] = [e for e in container["env"] if e["name"] != "HIP_FORCE_DEV_KERNARG"]
    assert found == wanted


def test_flags_of_the_chart_are_asked_for_only_where_the_defaults_do_not_do() -> None:
    asked = {path.stem for path in MANIFESTS if chart_flags(path)}
    assert asked == {"openshift", "amd", "sglang", "llama-cpp"}
    for path in MANIFESTS:
        if path.stem in asked - {"openshift"}:
            assert service_of(path)["spec"]["predictor"]["model"]["runtime"] not in runtimes_by_flags(())


def test_the_pod_on_openshift_names_no_user_and_its_names_are_looked_up_at_5353() -> None:
    path = CATALOGUE / "openshift.yaml"
    pod = merged(path)[0]["spec"]["template"]
    assert not [word for word in ("runAsUser", "runAsGroup", "fsGroup") if word in json.dumps(pod)]
    (policy,) = of_kind(load_all(path.read_text()), "NetworkPolicy").values()
    assert {(53, "UDP"), (53, "TCP"), (5353, "UDP"), (5353, "TCP")} == {
        (p["port"], p["protocol"]) for p in policy["spec"]["egress"][0]["ports"]
    }


def test_the_ingress_is_the_chart_s() -> None:
    (mine,) = of_kind(load_all((CATALOGUE / "ingress-nginx.yaml").read_text()), "Ingress").values()
    (theirs,) = of_kind(render_ci(CHART / "ci" / "ingress-nginx-values.yaml"), "Ingress").values()
    text = json.dumps(theirs["spec"]).replace("chat-predictor", "ingress-nginx-predictor")
    assert mine["spec"] == json.loads(text)
    nginx = {k: v for k, v in theirs["metadata"]["annotations"].items() if k.startswith("nginx.")}
    assert mine["metadata"]["annotations"] == nginx
