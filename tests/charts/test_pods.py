"""What matters about the pods that come out: merge, ports, probes, drain, security, placement, Knative's rules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.charts import kserve_merge
from tests.charts.support import (
    CATALOGUE,
    CHART,
    CI_FILES,
    Document,
    default_runtimes,
    helm,
    load,
    load_all,
    of_kind,
    predictor,
    render,
    render_ci,
    runtime_of,
    runtimes_of,
    service,
    standard,
)

VERSION = "0.1.0"
# What is known of every other engine than kserve-vllm.
ENGINES: dict[str, Document] = {path.stem: load(path) for path in sorted((CHART / "files" / "engines").glob("*.yaml"))}
# The flag by which each engine learns what clients call the model. TGI takes every name; Triton takes the one of the
# directory in the repository, which the model cache that builds it writes (tensorrtLLM.model).
NAME_FLAGS = {
    "kserve-vllm": "--model_name",
    "sglang": "--served-model-name",
    "lmdeploy": "--model-name",
    "llama-cpp": "--alias",
    "ollama": "--name",
    "tgi": "",
    "triton": "",
}
# Knative's switch for each gated pod field.
GATED = {
    "nodeSelector": "kubernetes.podspec-nodeselector",
    "tolerations": "kubernetes.podspec-tolerations",
    "affinity": "kubernetes.podspec-affinity",
    "topologySpreadConstraints": "kubernetes.podspec-topologyspreadconstraints",
    "runtimeClassName": "kubernetes.podspec-runtimeclassname",
    "priorityClassName": "kubernetes.podspec-priorityclassname",
    "schedulerName": "kubernetes.podspec-schedulername",
}
# Of the fields that KServe adds.
FETCHES = {"initContainers": "kubernetes.podspec-init-containers"}
# Pod fields that Knative always takes.
FREE = {
    "containers",
    "volumes",
    "serviceAccountName",
    "imagePullSecrets",
    "enableServiceLinks",
    "automountServiceAccountToken",
}


def everything() -> Iterator[tuple[str, Document, Document]]:
    """(where, InferenceService, runtime) of every scenario and every manifest."""
    for path in CI_FILES:
        documents = render_ci(path)
        runtimes = runtimes_of(documents)
        for isvc in of_kind(documents, "InferenceService").values():
            yield path.stem, isvc, runtimes[isvc["spec"]["predictor"]["model"]["runtime"]]
    for path in sorted(CATALOGUE.rglob("*.yaml")):
        for isvc in of_kind(load_all(path.read_text()), "InferenceService").values():
            yield str(path.relative_to(CATALOGUE)), isvc, runtime_of(path, isvc)


def mode_of(isvc: Document) -> str:
    mode: str = isvc["metadata"]["annotations"]["serving.kserve.io/deploymentMode"]
    return mode


EVERYTHING = list(everything())
each = pytest.mark.parametrize(
    ("isvc", "runtime"),
    [(isvc, runtime) for _, isvc, runtime in EVERYTHING],
    ids=[f"{where}-{isvc['metadata']['name']}" for where, isvc, _ in EVERYTHING],
)


def container_of(isvc: Document, runtime: Document) -> Document:
    found: Document = kserve_merge.pod(isvc, runtime)["spec"]["containers"][0]
    return found


def engine_of(runtime: Document) -> str:
    """Name of the engine that a runtime runs: its own model format's."""
    formats = {form["name"] for form in runtime["spec"]["supportedModelFormats"]} - {"huggingface"}
    (own,) = formats
    return str(own) if own == "kserve-vllm" else str(own).removeprefix("kserve-")


def claim_of(pod: Document, mount: Document) -> str:
    """Name of the claim that a mount is of; empty for another volume."""
    (volume,) = [v for v in pod["volumes"] if v["name"] == mount["name"]]
    return str(volume.get("persistentVolumeClaim", {}).get("claimName", ""))


def merged(values: Document, name: str = "chat") -> Document:
    """The pod template of one InferenceService in `values`, on its runtime."""
    documents = render(values)
    isvc = of_kind(documents, "InferenceService")[name]
    runtimes = of_kind(documents, "ClusterServingRuntime")
    return kserve_merge.pod(isvc, runtimes[isvc["spec"]["predictor"]["model"]["runtime"]])


def flags_in_notes(*arguments: str) -> str:
    """NOTES of an installation with `arguments`, as helm prints them without a cluster to look at."""
    return helm("install", "release", str(CHART), "--dry-run=client", *arguments).split("NOTES:")[1]


# Security.


@each
def test_the_container_is_locked_down_after_the_merge(isvc: Document, runtime: Document) -> None:
    container = container_of(isvc, runtime)
    # OpenShift gives the user out; the runtime's own name for it says so.
    user = {} if any(e["name"] == "USER" for e in container["env"]) else {"runAsUser": 1000}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
        "runAsNonRoot": True,
        "seccompProfile": {"type": "RuntimeDefault"},
        **user,
    }


@each
def test_the_pod_has_no_token_and_no_service_links(isvc: Document, runtime: Document) -> None:
    pods = [kserve_merge.pod(isvc, runtime)["spec"]]
    if "workerSpec" in isvc["spec"]["predictor"]:
        pods.append(kserve_merge.worker_pod(isvc, runtime))
    for pod in pods:
        assert pod["automountServiceAccountToken"] is False
        assert pod["enableServiceLinks"] is False


@each
def test_the_image_is_the_version_of_the_chart_or_the_engines(isvc: Document, runtime: Document) -> None:
    flavour = "cpu" if "-cpu" in runtime["metadata"]["name"] else "gpu"
    image = container_of(isvc, runtime)["image"].split("@")[0]
    if engine_of(runtime) in ENGINES:
        assert image == ENGINES[engine_of(runtime)]["images"][flavour]
        return
    if runtime["metadata"]["name"] == "kserve-vllm-amd":
        flavour = "rocm"
    assert image.endswith(f"/kserve-vllm:{VERSION}-{flavour}")


def test_a_digest_is_added_to_the_tag() -> None:
    digest = "sha256:" + "0" * 64
    runtimes = of_kind(render({"image": {"digests": {"cpu": digest}}}), "ClusterServingRuntime")
    images = {n: r["spec"]["containers"][0]["image"] for n, r in runtimes.items()}
    assert images["kserve-vllm-cpu"] == f"ghcr.io/kserve-vllm/kserve-vllm:{VERSION}-cpu@{digest}"
    assert images["kserve-vllm-gpu"] == f"ghcr.io/kserve-vllm/kserve-vllm:{VERSION}-gpu"


@each
def test_secrets_are_given_by_reference(isvc: Document, runtime: Document) -> None:
    for variable in container_of(isvc, runtime)["env"]:
        if variable["name"].endswith(("TOKEN", "SECRET", "PASSWORD", "KEY")):
            assert "secretKeyRef" in variable["valueFrom"]


def test_pods_of_the_chart_itself_are_locked_down() -> None:
    seen: dict[str, set[str]] = {}
    for path in CI_FILES:
        for document in render_ci(path):
            if document["kind"] not in ("Pod", "Job"):
                continue
            spec = document["spec"] if document["kind"] == "Pod" else document["spec"]["template"]["spec"]
            # One of them alone talks to the Kubernetes API.
            assert spec["automountServiceAccountToken"] is (spec["containers"][0]["name"] == "rollout")
            assert spec["enableServiceLinks"] is False
            assert spec["securityContext"]["runAsNonRoot"] is True
            assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
            for container in spec["containers"] + spec.get("initContainers", []):
                assert container["securityContext"]["readOnlyRootFilesystem"] is True
                assert container["securityContext"]["allowPrivilegeEscalation"] is False
                assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
                seen.setdefault(container["name"], set()).add(container["image"].rsplit("/", 1)[1])
                # What starts an engine on a GPU asks for one, and nothing else does.
                on_gpu = any(name.endswith("/gpu") for name in container["resources"].get("limits", {}))
                assert on_gpu == (not container["image"].endswith("-cpu")), container["name"]
    ours = f"kserve-vllm:{VERSION}"
    assert seen == {
        "ask": {f"{ours}-cpu"},
        "fill": {f"{ours}-cpu"},
        "batch": {f"{ours}-cpu", f"{ours}-gpu"},
        "rollout": {f"{ours}-cpu"},
        "build": {ENGINES["triton"]["images"]["gpu"].rsplit("/", 1)[1]},
    }


# The file system.


@each
def test_what_is_written_goes_to_tmp_or_to_the_claim_for_it(isvc: Document, runtime: Document) -> None:
    pod = kserve_merge.pod(isvc, runtime)["spec"]
    container, engine = pod["containers"][0], engine_of(runtime)
    mounts = {m["mountPath"]: m for m in container["volumeMounts"]}
    files = {path for path in mounts if mounts[path].get("readOnly")}
    compiled = {path for path in mounts if path not in files and claim_of(pod, mounts[path])}
    assert set(mounts) - files - compiled == {"/tmp", "/dev/shm"}
    volumes = {v["name"]: v for v in pod["volumes"]}
    assert volumes[mounts["/dev/shm"]["name"]]["emptyDir"]["medium"] == "Memory"
    assert "medium" not in volumes[mounts["/tmp"]["name"]]["emptyDir"]
    env = {e["name"]: e.get("value", "") for e in container["env"]}
    for name in ("HOME", "XDG_CACHE_HOME", "HF_HOME"):
        assert (env[name] + "/").startswith("/tmp/")
    caches = {"TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"}
    if engine not in ENGINES:
        caches.add("VLLM_CACHE_ROOT")
        assert compiled <= {"/var/cache/kserve-vllm"}
    else:
        # No claim is written to, and the engine's own variables with paths are of /tmp; one is the model that is read.
        assert not compiled
        caches |= {name for name, value in ENGINES[engine]["env"].items() if value.startswith("/")} - {"MODEL_ID"}
        assert not [name for name in env if name.startswith("VLLM_")]
    below = f"{min(compiled, default='/tmp')}/"
    for name in caches:
        assert (env[name] + "/").startswith(below), name


def test_shared_memory_of_an_inferenceservice_replaces_the_runtimes() -> None:
    volumes = merged(service(sharedMemory="32Gi"))["spec"]["volumes"]
    assert [v for v in volumes if v["name"] == "shm"] == [
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "32Gi"}}
    ]


# Ports and probes.


@each
def test_ports_are_what_the_mode_takes(isvc: Document, runtime: Document) -> None:
    ports = container_of(isvc, runtime)["ports"]
    # KServe's Service sends port 80 to the first one.
    assert ports[0]["containerPort"] == 8080
    if mode_of(isvc) == "Knative":
        assert len(ports) == 1
        # By the name h2c Knative's proxies speak HTTP/2, which gRPC needs.
        assert ports[0].get("name", "") == ("h2c" if isvc["metadata"]["name"] == "one-port" else "")
        return
    # The metrics of another engine may have a port of their own, which the PodMonitor and KServe's annotation name.
    scraped = runtime["spec"]["annotations"].get("prometheus.kserve.io/port", "8080")
    others = {p["containerPort"]: p["name"] for p in ports[1:]}
    assert set(others) <= {8081, int(scraped)}
    assert scraped == "8080" or int(scraped) in others
    if others:
        # A name with "grpc" makes a port HTTP/2.
        grpc = [number for number, name in others.items() if "grpc" in name]
        assert grpc == [number for number in others if number == 8081]
        assert "grpc" not in ports[0]["name"]


@each
def test_probes_ask_the_engine_and_leave_a_70b_model_its_time(isvc: Document, runtime: Document) -> None:
    container = container_of(isvc, runtime)
    paths = {name: container[name]["httpGet"] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    facts = ENGINES.get(engine_of(runtime), {"ready": "/v2/health/ready", "live": "/v2/health/live"})
    ready = facts["ready"].replace("{{.Name}}", isvc["metadata"]["name"])
    assert paths["startupProbe"] == paths["readinessProbe"] == {"path": ready, "port": 8080}
    assert paths["livenessProbe"] == {"path": facts["live"], "port": 8080}
    startup = container["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 30 * 60


@each
def test_knative_waits_longer_than_the_startup_probe(isvc: Document, runtime: Document) -> None:
    template = kserve_merge.pod(isvc, runtime)
    deadline = template["metadata"]["annotations"]["serving.knative.dev/progress-deadline"]
    startup = template["spec"]["containers"][0]["startupProbe"]
    assert int(deadline.removesuffix("s")) > startup["periodSeconds"] * startup["failureThreshold"]


@each
def test_knatives_proxies_are_told_not_to_cut_streams(isvc: Document, runtime: Document) -> None:
    # On the service itself too: it may run on somebody else's runtime.
    key = "features.knative.dev/http-full-duplex"
    assert kserve_merge.pod(isvc, runtime)["metadata"]["annotations"][key] == "Enabled"
    assert (key in isvc["metadata"]["annotations"]) == (mode_of(isvc) == "Knative")


# Time.


@each
def test_the_drain_fits_into_the_grace(isvc: Document, runtime: Document) -> None:
    spec = isvc["spec"]["predictor"]
    words = kserve_merge.expanded(container_of(isvc, runtime))
    drain = sum(int(w.split("=")[1]) for w in words if w.startswith(("--drain-timeout=", "--drain-delay=")))
    if mode_of(isvc) == "Knative":
        assert "terminationGracePeriodSeconds" not in spec
        assert drain <= spec["timeout"] <= 600
    else:
        assert drain < spec["terminationGracePeriodSeconds"]


def test_streams_are_not_cut_after_a_minute_in_either_mode() -> None:
    assert predictor(service())["timeout"] == 600
    assert predictor(standard())["timeout"] == 3600
    assert predictor({**service(), "cluster": {"maxRevisionTimeoutSeconds": 300}})["timeout"] == 300


def test_the_grace_follows_the_drain_unless_it_is_given() -> None:
    assert predictor(standard(drain={"timeoutSeconds": 300}))["terminationGracePeriodSeconds"] == 340
    assert predictor(standard(terminationGracePeriodSeconds=90))["terminationGracePeriodSeconds"] == 90


# The merge.


@each
def test_the_runtime_takes_the_format_and_no_agent_is_injected(isvc: Document, runtime: Document) -> None:
    assert kserve_merge.supports(runtime, isvc["spec"]["predictor"]["model"])
    assert not kserve_merge.is_multi_model(isvc["spec"]["predictor"])


@each
def test_the_model_is_served_under_the_name_of_the_inferenceservice(isvc: Document, runtime: Document) -> None:
    words = kserve_merge.expanded(container_of(isvc, runtime))
    engine = engine_of(runtime)
    if flag := NAME_FLAGS[engine]:
        assert f"{flag}={isvc['metadata']['name']}" in words
        assert engine != "kserve-vllm" or words[0].startswith(flag)
    else:
        assert not [word for word in words if "name=" in word and "hostname=" not in word]


@each
def test_no_request_is_above_its_limit_after_the_merge(isvc: Document, runtime: Document) -> None:
    resources = container_of(isvc, runtime)["resources"]
    limits = resources.get("limits", {})
    for name, limit in limits.items():
        assert amount(resources["requests"][name]) <= amount(limit), name
    # llama.cpp runs small models on one core; the others have the tokenizer and the scheduler beside the model.
    least = (1, "4Gi") if engine_of(runtime) == "llama-cpp" else (2, "6Gi")
    assert amount(resources["requests"]["cpu"]) >= least[0]
    assert amount(resources["requests"]["memory"]) >= amount(least[1])


def amount(quantity: str | int) -> float:
    """A Kubernetes quantity as a number."""
    text = str(quantity)
    for suffix, factor in (("Ti", 2**40), ("Gi", 2**30), ("Mi", 2**20), ("m", 1e-3)):
        if text.endswith(suffix):
            return float(text.removesuffix(suffix)) * factor
    return float(text)


def test_a_limit_alone_is_the_request_too() -> None:
    resources = merged(service(resources={"limits": {"cpu": "2", "memory": "8Gi"}}))["spec"]["containers"][0][
        "resources"
    ]
    assert resources["requests"] == {"cpu": "2", "memory": "8Gi", "nvidia.com/gpu": "1"}


def resources_of(documents: Sequence[Document], kind: str) -> Document:
    (found,) = of_kind(documents, kind).values()
    spec = found["spec"]["template"]["spec"] if kind == "Job" else found["spec"]
    resources: Document = spec["containers"][0]["resources"]
    return resources


def test_what_is_given_alone_moves_the_charts_own_request_or_limit() -> None:
    model = {"huggingFace": {"repository": "org/model"}}
    small = {"requests": {"nvidia.com/gpu": 1}, "limits": {"cpu": "500m", "memory": "512Mi"}}
    job = resources_of(render({"modelCaches": {"m": {**model, "job": {"resources": small}}}}), "Job")
    assert job["requests"] == {"cpu": "500m", "memory": "512Mi", "nvidia.com/gpu": "1"}
    assert job["limits"] == {"cpu": "500m", "memory": "512Mi", "nvidia.com/gpu": "1"}
    large = {"requests": {"memory": "4Gi"}, "limits": {"cpu": 2}}
    pod = resources_of(render({**service(), "tests": {"resources": large}}), "Pod")
    assert pod == {"requests": {"cpu": "100m", "memory": "4Gi"}, "limits": {"cpu": "2", "memory": "4Gi"}}


def test_devices_and_huge_pages_are_limits_too_and_numbers_are_text() -> None:
    given = {"rdma/ib": 1, "hugepages-2Mi": "1Gi", "cpu": 0.5}
    resources = predictor(service(device="cpu", resources={"requests": given}))["model"]["resources"]
    assert resources == {
        "requests": {"rdma/ib": "1", "hugepages-2Mi": "1Gi", "cpu": "0.5"},
        "limits": {"rdma/ib": "1", "hugepages-2Mi": "1Gi"},
    }


def test_the_build_of_an_engine_has_the_jobs_quota_and_environment() -> None:
    job = {"resources": {"limits": {"cpu": 2, "memory": "2Gi"}}, "envFrom": [{"secretRef": {"name": "s"}}]}
    values = {"huggingFace": {"repository": "org/model"}, "tensorrtLLM": {"model": "chat"}, "job": job}
    (found,) = of_kind(render({"modelCaches": {"m": values}}), "Job").values()
    spec = found["spec"]["template"]["spec"]
    assert spec["initContainers"][0]["resources"]["limits"] == {"cpu": "2", "memory": "2Gi"}
    assert spec["containers"][0]["resources"]["limits"] == {"cpu": "2", "memory": "64Gi", "nvidia.com/gpu": "1"}
    assert spec["containers"][0]["envFrom"] == job["envFrom"]


def test_a_spread_without_a_selector_is_about_the_services_pods() -> None:
    spread = {"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule"}
    own = {**spread, "topologyKey": "node", "labelSelector": {"matchLabels": {"a": "b"}}}
    found = predictor(standard(topologySpreadConstraints=[spread, own]))["topologySpreadConstraints"]
    assert found[0]["labelSelector"] == {"matchLabels": {"serving.kserve.io/inferenceservice": "chat"}}
    assert found[1] == own


def test_placeholders_of_kserve_fail_the_model_as_they_fail_kserve() -> None:
    with pytest.raises(kserve_merge.MergeError):
        kserve_merge.fill_placeholders({"args": ["{{ messages }}"]}, {"name": "chat"})
    with pytest.raises(kserve_merge.MergeError):
        kserve_merge.fill_placeholders({"args": ["{{ .Name"]}, {"name": "chat"})
    filled = kserve_merge.fill_placeholders(
        {"args": ["{{.Name}} {{.Labels.team}}"]}, {"name": "a", "labels": {"team": "b"}}
    )
    assert filled == {"args": ["a b"]}


def test_arguments_come_after_the_runtimes() -> None:
    values = {**service(extraArgs=["--seed=1"]), "runtimes": {"gpu": {"extraArgs": ["--enable-prefix-caching"]}}}
    assert kserve_merge.expanded(merged(values)["spec"]["containers"][0]) == [
        "--model_name=chat",
        "--enable-prefix-caching",
        "--profile=balanced",
        "--drain-timeout=60",
        "--seed=1",
    ]


def test_environment_of_the_inferenceservice_wins_by_name() -> None:
    values = service(env=[{"name": "HF_HOME", "value": "/tmp/elsewhere"}])
    env = merged(values)["spec"]["containers"][0]["env"]
    assert [e["value"] for e in env if e["name"] == "HF_HOME"] == ["/tmp/elsewhere"]


def test_an_upgrade_of_the_chart_does_not_change_what_pods_are_made_of() -> None:
    documents = render(service())
    isvc = of_kind(documents, "InferenceService")["chat"]
    labels = {**isvc["metadata"]["labels"], **isvc["spec"]["predictor"].get("labels", {})}
    assert not [v for v in labels.values() if VERSION in v]


# Placement.


def test_gpu_products_are_added_to_every_required_term() -> None:
    path = CHART / "ci" / "placement-values.yaml"
    for isvc in of_kind(render_ci(path), "InferenceService").values():
        affinity = isvc["spec"]["predictor"]["affinity"]["nodeAffinity"]
        terms = affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
        assert len(terms) == 2
        for zone, term in zip("ab", terms, strict=True):
            assert term["matchExpressions"] == [
                {"key": "topology.kubernetes.io/zone", "operator": "In", "values": [zone]},
                {
                    "key": "gpu.example.com/product",
                    "operator": "In",
                    "values": ["NVIDIA-H100-80GB-HBM3", "NVIDIA-H200"],
                },
            ]


def test_gpu_products_alone_make_a_node_affinity() -> None:
    affinity = predictor(service(gpu={"products": ["NVIDIA-L4"], "productLabel": "gpu"}))["affinity"]
    assert affinity["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"] == [
        {"matchExpressions": [{"key": "gpu", "operator": "In", "values": ["NVIDIA-L4"]}]}
    ]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, {"nvidia.com/gpu": "1"}),
        ({"parallelism": {"tensor": 4, "pipeline": 2}}, {"nvidia.com/gpu": "8"}),
        ({"gpu": {"count": 2}}, {"nvidia.com/gpu": "2"}),
        ({"gpu": {"resource": "nvidia.com/mig-1g.10gb"}}, {"nvidia.com/mig-1g.10gb": "1"}),
        ({"gpu": {"resource": "aliyun.com/gpu-mem", "count": 8}}, {"aliyun.com/gpu-mem": "8"}),
    ],
    ids=["one", "by parallelism", "by count", "a slice", "a share"],
)
def test_gpus_are_requested_and_limited_alike(values: Document, expected: Document) -> None:
    resources = predictor(service(**values))["model"]["resources"]
    assert resources == {"requests": expected, "limits": expected}


# Knative.


@pytest.mark.parametrize(
    ("isvc", "runtime"),
    [(isvc, runtime) for _, isvc, runtime in EVERYTHING if mode_of(isvc) == "Knative"],
    ids=[f"{where}-{isvc['metadata']['name']}" for where, isvc, _ in EVERYTHING if mode_of(isvc) == "Knative"],
)
def test_a_knative_pod_has_only_fields_that_knative_takes(isvc: Document, runtime: Document) -> None:
    pod = kserve_merge.pod(isvc, runtime)["spec"]
    assert set(pod) <= FREE | set(GATED) | set(FETCHES)
    volumes = {v["name"]: v for v in pod["volumes"]}
    for container in pod["containers"] + pod.get("initContainers", []):
        assert "lifecycle" not in container
        for mount in container["volumeMounts"]:
            if {"configMap", "secret"} & set(volumes[mount["name"]]):
                assert mount["readOnly"] is True


def test_notes_name_exactly_the_flags_that_a_scenario_needs() -> None:
    placed = CHART / "ci" / "placement-values.yaml"
    notes = flags_in_notes("--values", str(placed))
    for flag in GATED.values():
        assert f"{flag}: enabled (here)" in notes
    assert "podspec-init-containers" not in notes
    adapters = flags_in_notes("--values", str(CHART / "ci" / "multi-lora-values.yaml"))
    assert "kubernetes.podspec-init-containers: enabled (assistants)" in adapters
    volume = flags_in_notes("--values", str(CHART / "ci" / "lora-path-values.yaml"))
    assert "kubernetes.podspec-persistent-volume-claim: enabled (assistants)" in volume
    runtime = flags_in_notes("--values", str(CHART / "ci" / "namespaced-runtimes-values.yaml"))
    assert "kubernetes.podspec-nodeselector: enabled (chat)" in runtime
    for plain in ("gpu-single", "grpc"):
        assert "feature flags" not in flags_in_notes("--values", str(CHART / "ci" / f"{plain}-values.yaml"))


@pytest.mark.parametrize("path", CI_FILES, ids=lambda p: p.stem)
def test_every_gated_field_of_a_scenario_is_in_its_notes(path: Path) -> None:
    documents = render_ci(path)
    runtimes = of_kind(documents, "ClusterServingRuntime") | of_kind(documents, "ServingRuntime")
    needed = set()
    for name, isvc in of_kind(documents, "InferenceService").items():
        if mode_of(isvc) == "Knative":
            pod = kserve_merge.pod(isvc, runtimes[isvc["spec"]["predictor"]["model"]["runtime"]])["spec"]
            gated = GATED | FETCHES
            needed |= {(gated[field], name) for field in pod if field in gated}
            claims = {v["name"] for v in pod["volumes"] if "persistentVolumeClaim" in v}
            needed |= {("kubernetes.podspec-persistent-volume-claim", name) for _ in claims}
            mounts = [m for container in pod["containers"] for m in container["volumeMounts"] if m["name"] in claims]
            if not all(m.get("readOnly") for m in mounts):
                needed.add(("kubernetes.podspec-persistent-volume-write", name))
    notes = flags_in_notes("--values", str(path))
    for flag, name in needed:
        assert any(line.strip().startswith(flag) and name in line for line in notes.splitlines()), flag


# Runtimes.


def test_the_runtimes_have_formats_that_collide_with_no_other() -> None:
    for runtime in default_runtimes().values():
        formats = runtime["spec"]["supportedModelFormats"]
        assert not any(f["autoSelect"] for f in formats)
        assert {f["name"] for f in formats} == {"kserve-vllm", "huggingface"}
        assert runtime["spec"]["protocolVersions"] == ["v1", "v2", "grpc-v2"]
        # It would make the controller rewrite the image.
        assert "serving.kserve.io/server-type" not in runtime["metadata"].get("annotations", {})


def test_auto_selection_gives_each_runtime_a_priority_of_its_own() -> None:
    runtimes = of_kind(render({"runtimes": {"autoSelect": True}}), "ClusterServingRuntime")
    chosen = {
        name: [(f["name"], f["priority"]) for f in r["spec"]["supportedModelFormats"] if f["autoSelect"]]
        for name, r in runtimes.items()
    }
    assert chosen == {
        "kserve-vllm-gpu": [("kserve-vllm", 30)],
        "kserve-vllm-cpu": [("kserve-vllm", 20)],
        "kserve-vllm-multinode": [("kserve-vllm", 10)],
    }


def test_a_version_in_the_name_reaches_the_inferenceservices() -> None:
    documents = render({**service(), "runtimes": {"versionInName": True, "keepOnUpgrade": True}})
    runtimes = of_kind(documents, "ClusterServingRuntime")
    assert set(runtimes) == {f"kserve-vllm-{kind}-0-1-0" for kind in ("gpu", "cpu", "multinode")}
    for runtime in runtimes.values():
        assert runtime["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    isvc = of_kind(documents, "InferenceService")["chat"]
    assert isvc["spec"]["predictor"]["model"]["runtime"] == "kserve-vllm-gpu-0-1-0"


def test_kserve_takes_runtimes_of_a_newer_version_beside_the_old_ones_and_chooses_them() -> None:
    """It refuses two runtimes of one priority for a format."""
    kept = {"versionInName": True, "keepOnUpgrade": True, "autoSelect": True}
    seen: list[int] = []
    for version in ("0.1.0", "0.1.1", "0.2.0-rc1", "0.10.0", "1.0.0", "v1.0.1"):
        runtimes = of_kind(render({"runtimes": kept, "image": {"tag": version}}), "ClusterServingRuntime")
        priorities = sorted(r["spec"]["supportedModelFormats"][0]["priority"] for r in runtimes.values())
        assert not set(seen) & set(priorities)
        assert len(set(priorities)) == 3
        assert min(priorities) > max(seen, default=0)
        seen += priorities
    assert max(seen) < 2**31


def test_runtimes_of_a_namespace_are_in_the_namespace_of_the_release() -> None:
    documents = render({"runtimes": {"scope": "Namespaced"}})
    assert not of_kind(documents, "ClusterServingRuntime")
    assert {r["metadata"]["namespace"] for r in of_kind(documents, "ServingRuntime").values()} == {"models"}


def test_a_runtime_has_no_limits_that_could_contradict_a_request() -> None:
    for runtime in default_runtimes().values():
        for container in runtime["spec"]["containers"] + runtime["spec"].get("workerSpec", {}).get("containers", []):
            assert set(container["resources"]) == {"requests"}
            assert set(container["resources"]["requests"]) == {"cpu", "memory"}


def test_workers_of_a_multi_node_service_are_locked_down_and_watched() -> None:
    (worker,) = default_runtimes()["kserve-vllm-multinode"]["spec"]["workerSpec"]["containers"]
    assert worker["name"] == "worker-container"
    assert worker["securityContext"]["readOnlyRootFilesystem"] is True
    assert "ports" not in worker
    assert worker["livenessProbe"]["exec"]["command"][:2] == ["python3", "-c"]
    # Placeholders are not filled in workers.
    assert "{{" not in str(worker)
