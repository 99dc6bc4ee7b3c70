"""What clusters and companies need beside the usual: volumes, certificates, OpenShift, devices, stores, parents."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from kserve_vllm.telemetry.metrics import DECLARED
from tests.charts import kserve_merge, schemas
from tests.charts.support import (
    CHART,
    Document,
    HelmError,
    helm,
    load,
    load_all,
    of_kind,
    predictor,
    refused,
    render,
    render_ci,
    render_text,
    service,
    standard,
)

CI = CHART / "ci"
OPENSHIFT = ("--api-versions", "security.openshift.io/v1")
KINDS = ("cpu", "gpu", "multinode")
CACHE: Document = {"modelCaches": {"m": {"huggingFace": {"repository": "org/model"}}}}


def ci(name: str) -> list[Document]:
    return list(render_ci(CI / f"{name}-values.yaml"))


def pods_of(documents: list[Document]) -> Iterator[tuple[str, Document]]:
    """(kind, pod spec) of everything that runs."""
    for document in documents:
        spec = document.get("spec", {})
        if document["kind"] == "Pod":
            yield "Pod", spec
        elif document["kind"] == "Job":
            yield "Job", spec["template"]["spec"]
        elif document["kind"].endswith("ServingRuntime"):
            yield "runtime", spec
            if "workerSpec" in spec:
                yield "worker", spec["workerSpec"]


def env_of(container: Document) -> dict[str, Any]:
    return {e["name"]: e.get("value", e.get("valueFrom")) for e in container["env"]}


# Volumes, environment, init containers.


def test_a_volume_of_the_user_replaces_the_runtimes_of_the_same_name() -> None:
    mine = {"name": "tmp", "persistentVolumeClaim": {"claimName": "scratch"}}
    for values in ({**service(extraVolumes=[mine])}, {**service(), "runtimes": {"gpu": {"extraVolumes": [mine]}}}):
        documents = render(values)
        isvc = of_kind(documents, "InferenceService")["chat"]
        pod = kserve_merge.pod(isvc, of_kind(documents, "ClusterServingRuntime")["kserve-vllm-gpu"])["spec"]
        (tmp,) = [v for v in pod["volumes"] if v["name"] == "tmp"]
        assert tmp["persistentVolumeClaim"] == {"claimName": "scratch"}
        assert [m["mountPath"] for m in pod["containers"][0]["volumeMounts"] if m["name"] == "tmp"] == ["/tmp"]


def test_services_runtimes_and_jobs_take_volumes_mounts_and_environment() -> None:
    more: Document = {
        "extraVolumes": [{"name": "x", "emptyDir": {}}],
        "extraVolumeMounts": [{"name": "x", "mountPath": "/x"}],
        "envFrom": [{"secretRef": {"name": "s"}}],
    }
    several: Document = {
        "storageUri": "pvc://v/m",
        "deploymentMode": "Standard",
        "multiNode": {"enabled": True},
        "parallelism": {"pipeline": 2},
    }
    documents = render(
        {
            "inferenceServices": {"chat": {"storageUri": "hf://a/b", **more}, "large": {**several, **more}},
            "runtimes": {kind: more for kind in KINDS},
            "modelCaches": {"m": {**CACHE["modelCaches"]["m"], "job": more}},
            "tests": {"enabled": False},
        }
    )
    specs = [spec for _, spec in pods_of(documents)]
    assert len(specs) == 5
    for spec in specs:
        (container,) = spec["containers"]
        assert {"name": "x", "emptyDir": {}} in spec["volumes"]
        assert {"name": "x", "mountPath": "/x"} in container["volumeMounts"]
        assert container["envFrom"] == [{"secretRef": {"name": "s"}}]
    for isvc in of_kind(documents, "InferenceService").values():
        spec = isvc["spec"]["predictor"]
        parts = [(spec, spec["model"])]
        if "workerSpec" in spec:
            parts.append((spec["workerSpec"], spec["workerSpec"]["containers"][0]))
        for pod, container in parts:
            assert pod["volumes"] == [{"name": "x", "emptyDir": {}}]
            assert container["volumeMounts"] == [{"name": "x", "mountPath": "/x"}]
            assert container["envFrom"] == [{"secretRef": {"name": "s"}}]


def test_init_containers_reach_services_with_their_workers_and_jobs() -> None:
    first = [{"name": "first", "image": "first:1"}]
    values: Document = standard(
        storageUri="pvc://v/m", multiNode={"enabled": True}, parallelism={"pipeline": 2}, initContainers=first
    )
    found = predictor(values)
    assert found["initContainers"] == found["workerSpec"]["initContainers"] == first
    cache = {"modelCaches": {"m": {**CACHE["modelCaches"]["m"], "job": {"initContainers": first}}}}
    (job,) = of_kind(render(cache), "Job").values()
    assert job["spec"]["template"]["spec"]["initContainers"] == first


@pytest.mark.parametrize(
    ("values", "flag"),
    [
        ({"initContainers": [{"name": "a", "image": "b:1"}]}, "podspec-init-containers"),
        (
            {"env": [{"name": "CPUS", "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu"}}}]},
            "podspec-fieldref",
        ),
        ({"extraVolumes": [{"name": "a", "hostPath": {"path": "/a"}}]}, "podspec-volumes-hostpath"),
        ({"extraVolumes": [{"name": "a", "csi": {"driver": "d"}}]}, "podspec-volumes-csi"),
        ({"extraVolumes": [{"name": "a", "ephemeral": {}}]}, "podspec-volumes-ephemeral"),
        ({"extraVolumes": [{"name": "a", "image": {"reference": "d"}}]}, "podspec-volumes-image"),
        (
            {
                "extraVolumes": [{"name": "a", "persistentVolumeClaim": {"claimName": "c"}}],
                "extraVolumeMounts": [{"name": "a", "mountPath": "/a"}],
            },
            "podspec-persistent-volume-write",
        ),
    ],
    ids=["init containers", "a limit", "host path", "CSI", "a claim of its own", "image", "a claim to write on"],
)
def test_notes_name_the_flags_of_knative_for_what_the_user_adds(values: Document, flag: str) -> None:
    text = helm(
        "install", "release", str(CHART), "--dry-run=client", "--values", "-", stdin=json.dumps(service(**values))
    )
    assert f"kubernetes.{flag}: enabled (chat)" in text
    plain = helm("install", "release", str(CHART), "--dry-run=client", "--values", "-", stdin=json.dumps(service()))
    assert flag not in plain


def test_a_service_may_have_more_room_for_what_its_engine_downloads() -> None:
    documents = render({"inferenceServices": {"chat": {"model": "org/model", "tmpSizeLimit": "200Gi"}}})
    isvc = of_kind(documents, "InferenceService")["chat"]
    pod = kserve_merge.pod(isvc, of_kind(documents, "ClusterServingRuntime")["kserve-vllm-gpu"])["spec"]
    assert [v["emptyDir"] for v in pod["volumes"] if v["name"] == "tmp"] == [{"sizeLimit": "200Gi"}]


# Certificates, a proxy.


@pytest.mark.parametrize(
    ("given", "volume"),
    [({"configMap": "ca"}, {"configMap": {"name": "ca"}}), ({"secretName": "ca"}, {"secret": {"secretName": "ca"}})],
    ids=["ConfigMap", "Secret"],
)
def test_certificates_reach_services_and_jobs(given: Document, volume: Document) -> None:
    documents = render({**service(), **CACHE, "caBundle": {**given, "key": "all.pem"}})
    spec = of_kind(documents, "InferenceService")["chat"]["spec"]["predictor"]
    (job,) = of_kind(documents, "Job").values()
    pod = job["spec"]["template"]["spec"]
    for volumes, container in ((spec["volumes"], spec["model"]), (pod["volumes"], pod["containers"][0])):
        assert {"name": "ca", **volume} in volumes
        assert {"name": "ca", "mountPath": "/etc/kserve-vllm/ca", "readOnly": True} in container["volumeMounts"]
        for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "AWS_CA_BUNDLE"):
            assert env_of(container)[name] == "/etc/kserve-vllm/ca/all.pem"
    # No flag of the runtime reads it.
    assert not [a for a in spec["model"]["args"] if "ca" in a.split("=")[0].split("-")]


def test_a_proxy_reaches_services_and_jobs_and_leaves_the_cluster_out() -> None:
    documents = render(
        {
            **service(env=[{"name": "NO_PROXY", "value": "mine"}]),
            **CACHE,
            "cluster": {"domain": "corp.example"},
            "proxy": {"httpsProxy": "http://proxy:3128", "noProxy": ["10.0.0.0/8"]},
        }
    )
    (job,) = of_kind(documents, "Job").values()
    found = env_of(job["spec"]["template"]["spec"]["containers"][0])
    assert found["HTTPS_PROXY"] == found["https_proxy"] == "http://proxy:3128"
    assert found["NO_PROXY"] == found["no_proxy"] == "localhost,127.0.0.1,::1,.svc,.corp.example,10.0.0.0/8"
    assert "HTTP_PROXY" not in found
    chat = env_of(of_kind(documents, "InferenceService")["chat"]["spec"]["predictor"]["model"])
    assert (chat["HTTPS_PROXY"], chat["NO_PROXY"]) == ("http://proxy:3128", "mine")


# All objects.


def test_common_labels_and_annotations_are_on_every_object_and_lose_against_its_own() -> None:
    documents = render(
        {
            "commonLabels": {"team": "a", "number": 1},
            "commonAnnotations": {"owner": "b", "helm.sh/resource-policy": "none"},
            "inferenceServices": {
                "chat": {
                    "deploymentMode": "Standard",
                    "storageUri": "hf://a/b",
                    "labels": {"team": "c"},
                    "autoscaling": {"class": "hpa"},
                    "networkPolicy": {"enabled": True},
                    "podDisruptionBudget": {"enabled": True},
                },
            },
            "routes": {
                "a": {"hosts": ["a.example.com"], "inferenceService": "chat"},
                "b": {
                    "hosts": ["b.example.com"],
                    "inferenceService": "chat",
                    "type": "Istio",
                    "outlierEjection": {"enabled": True},
                },
                "c": {"hosts": ["c.example.com"], "inferenceService": "chat", "type": "Ingress"},
            },
            "serviceAccounts": {"a": {}},
            "cluster": {"gatewayAPI": True},
            "rolloutJobs": {"chat": {"model": "hf://a/new"}},
            "modelCaches": {
                **CACHE["modelCaches"],
                "n": {
                    "type": "LocalModelCache",
                    "localModelCache": {"sourceModelUri": "hf://a/b", "nodeGroups": ["g"]},
                },
            },
            "monitoring": {name: {"enabled": True} for name in ("podMonitor", "prometheusRule", "dashboards")},
        }
    )
    kinds = {d["kind"] for d in documents}
    written = {
        line.split(": ")[1]
        for path in (CHART / "templates").rglob("*.yaml")
        for line in path.read_text().splitlines()
        if line.startswith("kind: ")
    }
    assert kinds == written | {"ClusterServingRuntime"}
    for document in documents:
        labels, annotations = document["metadata"]["labels"], document["metadata"]["annotations"]
        assert labels["team"] == ("c" if document["kind"] == "InferenceService" else "a")
        assert labels["number"] == "1"
        assert annotations["owner"] == "b"
        keep = document["kind"] == "PersistentVolumeClaim"
        assert annotations["helm.sh/resource-policy"] == ("keep" if keep else "none")


def test_flux_can_be_kept_from_all_that_has_text_like_its_variables() -> None:
    key = "kustomize.toolkit.fluxcd.io/substitute"
    values: Document = {
        **service(engine="llama-cpp", device="cpu", storageUri="s3://b/m.gguf"),
        "monitoring": {"dashboards": {"enabled": True}},
        "commonAnnotations": {key: "disabled"},
    }
    like = [d for d in render(values) if "${" in json.dumps(d)]
    assert {d["kind"] for d in like} == {"ConfigMap", "ClusterServingRuntime"}
    assert {d["metadata"]["annotations"][key] for d in like} == {"disabled"}


def test_extra_objects_are_maps_or_text_and_may_be_templates() -> None:
    made = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: '{{ .Release.Name }}-text'}\n"
    as_map = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "{{ .Release.Namespace }}-map"}}
    found = of_kind(render({"extraObjects": [made, as_map]}), "ConfigMap")
    assert set(found) == {"release-text", "models-map"}


# OpenShift.


@pytest.mark.parametrize("how", ["by its value", "by the API"])
def test_openshift_gives_out_users_and_the_rest_stays_locked_down(how: str) -> None:
    values: Document = {**service(), **CACHE}
    if how == "by its value":
        values["podSecurity"] = {"platform": "openshift"}
    documents = render(values, *(OPENSHIFT if how == "by the API" else ()))
    text = json.dumps(documents)
    assert not [word for word in ("runAsUser", "runAsGroup", "fsGroup") if word in text]
    found = list(pods_of(documents))
    assert {kind for kind, _ in found} == {"Pod", "Job", "runtime", "worker"}
    for _, spec in found:
        for container in spec["containers"]:
            # Pod Security `restricted`, all of it.
            security = container["securityContext"]
            assert security["runAsNonRoot"] is True
            assert security["allowPrivilegeEscalation"] is False
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert security["seccompProfile"] == {"type": "RuntimeDefault"}


def test_the_image_s_user_is_named_elsewhere_and_where_the_value_says_so() -> None:
    cases: list[tuple[Document, tuple[str, ...]]] = [({}, ()), ({"podSecurity": {"platform": "kubernetes"}}, OPENSHIFT)]
    for values, arguments in cases:
        runtimes = of_kind(render(values, *arguments), "ClusterServingRuntime")
        container = runtimes["kserve-vllm-gpu"]["spec"]["containers"][0]
        assert container["securityContext"]["runAsUser"] == 1000
        assert "USER" not in env_of(container)


def test_names_are_looked_up_at_openshifts_port_too() -> None:
    values = standard(networkPolicy={"enabled": True, "restrictEgress": True})
    ports = []
    for arguments in (("--api-versions", "v1"), OPENSHIFT):
        (policy,) = of_kind(render(values, *arguments), "NetworkPolicy").values()
        ports.append([(p["port"], p["protocol"]) for p in policy["spec"]["egress"][0]["ports"]])
    assert ports[0] == [(53, "UDP"), (53, "TCP")]
    assert ports[1] == [*ports[0], (5353, "UDP"), (5353, "TCP")]


def test_egress_takes_rules_in_kubernetes_terms() -> None:
    rule = {"to": [{"namespaceSelector": {"matchLabels": {"a": "b"}}}], "ports": [{"port": 6379, "protocol": "TCP"}]}
    values = standard(networkPolicy={"enabled": True, "restrictEgress": True, "egress": [rule]})
    (policy,) = of_kind(render(values), "NetworkPolicy").values()
    assert policy["spec"]["egress"][-1] == rule


# Devices.


def test_a_runtime_of_ones_own_has_its_image_and_is_run_on_by_name() -> None:
    documents = ci("amd")
    runtime = of_kind(documents, "ClusterServingRuntime")["kserve-vllm-amd"]
    container = runtime["spec"]["containers"][0]
    assert container["image"] == "registry.example.com/kserve-vllm:0.1.0-rocm"
    assert env_of(container)["HIP_FORCE_DEV_KERNARG"] == "1"
    isvc = of_kind(documents, "InferenceService")["chat"]
    pod = kserve_merge.pod(isvc, runtime)["spec"]["containers"][0]
    assert pod["resources"]["limits"] == {"amd.com/gpu": "1"}
    # The chart's three have theirs.
    others = of_kind(documents, "ClusterServingRuntime").keys() - {"kserve-vllm-amd"}
    assert len(others) == 3


def test_a_runtime_of_ones_own_is_found_under_a_versioned_name() -> None:
    values = {**service(runtime="mine"), "runtimes": {"versionInName": True, "extra": {"mine": {}}}}
    documents = render(values)
    (isvc,) = of_kind(documents, "InferenceService").values()
    assert isvc["spec"]["predictor"]["model"]["runtime"] == "mine-0-1-0"
    assert "mine-0-1-0" in of_kind(documents, "ClusterServingRuntime")


def test_a_runtime_of_ones_own_is_never_chosen_by_itself_and_is_off_with_the_others() -> None:
    extra = {"mine": {"base": "cpu", "kvCacheGiB": 7}, "gone": {"enabled": False}}
    runtimes = of_kind(render({"runtimes": {"autoSelect": True, "extra": extra}}), "ClusterServingRuntime")
    assert set(runtimes) == {"kserve-vllm-cpu", "kserve-vllm-gpu", "kserve-vllm-multinode", "mine"}
    assert not any(f["autoSelect"] for f in runtimes["mine"]["spec"]["supportedModelFormats"])
    container = runtimes["mine"]["spec"]["containers"][0]
    assert container["image"].endswith("-cpu")
    assert env_of(container)["VLLM_CPU_KVCACHE_SPACE"] == "7"
    off = {"runtimes": {"enabled": False, "extra": extra}}
    assert "runtimes.extra does nothing while runtimes.enabled is false" in refused(off)


def test_each_runtime_takes_an_image_and_more_of_a_security_context() -> None:
    add = {"capabilities": {"add": ["IPC_LOCK"]}}
    digest = "registry.example.com:5000/a/b@sha256:" + "1" * 64
    values = {"runtimes": {kind: {"image": digest, "securityContext": add} for kind in KINDS}}
    for kind, spec in pods_of(render(values)):
        assert kind in ("runtime", "worker")
        (container,) = spec["containers"]
        assert container["image"] == digest
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["IPC_LOCK"]}
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
    for wrong in ("a:latest", "a", "registry:5000/a"):
        with pytest.raises(HelmError, match="values don't meet the specifications of the schema"):
            render({"runtimes": {"gpu": {"image": wrong}}})


def test_extended_resources_stand_beside_the_gpu() -> None:
    values = service(resources={"limits": {"rdma/ib": 1, "nvidia.com/gpumem": 8000, "hugepages-2Mi": "1Gi"}})
    resources = predictor(values)["model"]["resources"]
    assert resources["limits"] == {
        "nvidia.com/gpu": "1",
        "rdma/ib": "1",
        "nvidia.com/gpumem": "8000",
        "hugepages-2Mi": "1Gi",
    }
    assert resources["requests"] == resources["limits"]
    gaudi = predictor(service(gpu={"resource": "habana.ai/gaudi", "count": 2}))["model"]["resources"]
    assert gaudi["limits"] == {"habana.ai/gaudi": "2"}
    cpu = predictor(service(device="cpu", resources={"limits": {"intel.com/qat": 1}}))["model"]["resources"]
    assert cpu["limits"] == {"intel.com/qat": "1"}


def test_claims_ask_for_devices_without_a_count() -> None:
    claim = {"name": "gpu", "resourceClaimTemplateName": "one"}
    spec = predictor(standard(resourceClaims=[claim], parallelism={"tensor": 4}))
    assert spec["resourceClaims"] == [claim]
    assert spec["model"]["resources"] == {"claims": [{"name": "gpu"}]}
    both = predictor(standard(resourceClaims=[claim], gpu={"count": 1}))["model"]["resources"]
    assert both["limits"] == {"nvidia.com/gpu": "1"}


# Stores.


@pytest.mark.parametrize("uri", ["ms://a/b", "model-registry://a/b", "oci+native://a/b:1", "hf://a/b", "x-y.z+1://a"])
def test_any_scheme_is_taken(uri: str) -> None:
    assert predictor(service(storageUri=uri))["model"]["storageUri"] == uri


def test_a_stored_model_and_a_named_container_reach_kserve() -> None:
    services = of_kind(ci("storage"), "InferenceService")
    assert services["scope"]["spec"]["predictor"]["storageContainerName"] == "modelscope"
    model = services["listed"]["spec"]["predictor"]["model"]
    assert model["storage"] == {"key": "company", "path": "qwen3", "parameters": {"bucket": "models"}}
    assert model["modelFormat"]["name"] == "kserve-vllm"
    assert not {"storageUri"} & set(model)
    assert not [a for a in model["args"] if a.startswith("--model")]


# Clusters.


def test_the_domain_of_the_cluster_is_in_every_host_name() -> None:
    values: Document = {
        **standard(),
        "cluster": {"domain": "k8s.example.com"},
        "routes": {
            "a": {
                "type": "Istio",
                "hosts": ["a.example.com"],
                "inferenceService": "chat",
                "outlierEjection": {"enabled": True},
            },
            "b": {"type": "Istio", "hosts": ["b.example.com"], "inferenceService": "small"},
        },
    }
    values["inferenceServices"]["small"] = {"storageUri": "hf://a/b"}
    text = render_text(values)
    assert "cluster.local" not in text
    assert "chat-predictor.models.svc.k8s.example.com" in text
    assert "knative-local-gateway.istio-system.svc.k8s.example.com" in text


def test_pods_listen_on_ipv6_and_go_to_nodes_of_one_architecture() -> None:
    documents = ci("ipv6")
    isvc = of_kind(documents, "InferenceService")["chat"]
    pod = kserve_merge.pod(isvc, of_kind(documents, "ClusterServingRuntime")["kserve-vllm-gpu"])["spec"]
    assert "--host=::" in kserve_merge.expanded(pod["containers"][0])
    assert pod["nodeSelector"] == {"kubernetes.io/arch": "amd64"}
    everything = list(pods_of(render({**service(), **CACHE, "image": {"architecture": "amd64"}})))
    assert len(everything) == 6
    assert all(spec["nodeSelector"] == {"kubernetes.io/arch": "amd64"} for _, spec in everything)
    assert "--host" not in render_text({})
    notes = helm(
        "install",
        "r",
        str(CHART),
        "--dry-run=client",
        "--values",
        "-",
        stdin=json.dumps({**service(), "image": {"architecture": "arm64"}}),
    )
    assert "kubernetes.podspec-nodeselector: enabled (chat)" in notes


def test_an_ingress_passes_tokens_on_and_gives_streams_their_time() -> None:
    (ingress,) = of_kind(ci("ingress-nginx"), "Ingress").values()
    annotations = ingress["metadata"]["annotations"]
    nginx = {k.split("/")[1]: v for k, v in annotations.items() if k.startswith("nginx.ingress.kubernetes.io/")}
    assert nginx["proxy-buffering"] == nginx["proxy-next-upstream"] == "off"
    assert nginx["proxy-read-timeout"] == nginx["proxy-send-timeout"] == "3600"
    assert annotations["cert-manager.io/cluster-issuer"] == "company"
    assert ingress["metadata"]["name"] == "chat-route"
    assert ingress["spec"]["tls"] == [{"hosts": ["chat.example.com"], "secretName": "chat-tls"}]
    (rule,) = ingress["spec"]["rules"]
    (path,) = rule["http"]["paths"]
    assert path["backend"]["service"] == {"name": "chat-predictor", "port": {"number": 80}}


def test_a_gateway_of_gke_gets_a_listener_and_no_timeouts() -> None:
    spec = of_kind(ci("gke-gateway"), "HTTPRoute")["chat-route"]["spec"]
    assert spec["parentRefs"][0]["sectionName"] == "https"
    assert not [rule for rule in spec["rules"] if "timeouts" in rule]


def defaulted(schema: Document, value: Any, at: str) -> Iterator[str]:
    """Where the API server would add a field to `value` by the defaults of `schema`."""
    if isinstance(value, dict):
        for name, child in schema.get("properties", {}).items():
            if name not in value and "default" in child:
                yield f"{at}.{name}"
            elif name in value:
                yield from defaulted(child, value[name], f"{at}.{name}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from defaulted(schema.get("items", {}), item, f"{at}[{index}]")


@pytest.mark.parametrize(
    ("kind", "scenario"),
    [
        ("HTTPRoute", "routes-gateway"),
        ("HTTPRoute", "gke-gateway"),
        ("PodMonitor", "monitoring"),
        ("PodMonitor", "engines"),
    ],
    ids=["HTTPRoute", "GKE", "PodMonitor", "two ports"],
)
def test_the_api_server_adds_nothing_that_argo_cd_would_see(kind: str, scenario: str) -> None:
    found = of_kind(ci(scenario), kind)
    assert found
    for document in found.values():
        schema = schemas.published()[(document["apiVersion"], kind)]
        assert list(defaulted(schema["properties"]["spec"], document["spec"], kind)) == []
        bare = json.loads(
            json.dumps(document["spec"]).replace('"action": "replace", ', "").replace('"weight": 1', '"x": 1')
        )
        assert list(defaulted(schema["properties"]["spec"], bare, kind))


# A parent chart.


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    """A chart that has this one as a dependency with a condition."""
    chart = tmp_path / "parent"
    (chart / "charts").mkdir(parents=True)
    (chart / "templates").mkdir()
    helm("package", str(CHART), "--destination", str(chart / "charts"))
    version = load(CHART / "Chart.yaml")["version"]
    dependency = {
        "name": "kserve-vllm",
        "version": version,
        "repository": "https://charts.example.com",
        "condition": "kserve-vllm.enabled",
    }
    about = {"apiVersion": "v2", "name": "parent", "version": "1.0.0", "dependencies": [dependency]}
    (chart / "Chart.yaml").write_text(yaml.safe_dump(about))
    mine = {"enabled": True, **service(gpu=None)}
    (chart / "values.yaml").write_text(yaml.safe_dump({"global": {"imageRegistry": "x"}, "kserve-vllm": mine}))
    return chart


def test_a_parent_chart_switches_it_on_and_off(parent: Path) -> None:
    helm("lint", "--strict", str(parent))
    on = load_all(helm("template", "release", str(parent), "--namespace", "models"))
    assert of_kind(on, "InferenceService").keys() == {"chat"}
    assert len(of_kind(on, "ClusterServingRuntime")) == 3
    off = helm("template", "release", str(parent), "--set", "kserve-vllm.enabled=false")
    assert not load_all(off)
    one = helm("template", "release", str(parent), "--set", "kserve-vllm.inferenceServices.chat.enabled=false")
    assert not of_kind(load_all(one), "InferenceService")


# Features of the runtime, time, rules.


def test_features_of_the_runtime_are_flags_of_it() -> None:
    isvc = of_kind(ci("features"), "InferenceService")["chat"]
    args = isvc["spec"]["predictor"]["model"]["args"]
    assert {
        "--api-server-count=2",
        "--response-cache=memory",
        "--usage-sink=log",
        "--otlp-endpoint=http://collector.monitoring:4317",
        "--trace-sample-ratio=0.1",
    } <= set(args)
    assert not [
        a for a in predictor(service())["model"]["args"] if a.startswith(("--api", "--resp", "--usage", "--ot"))
    ]


def test_a_small_model_may_fail_fast() -> None:
    documents = render(service(startupSeconds=120, progressDeadlineSeconds=150))
    isvc = of_kind(documents, "InferenceService")["chat"]
    merged = kserve_merge.pod(isvc, of_kind(documents, "ClusterServingRuntime")["kserve-vllm-gpu"])
    probe = merged["spec"]["containers"][0]["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] == 120
    assert probe["httpGet"] == {"path": "/v2/health/ready", "port": 8080}
    assert merged["metadata"]["annotations"]["serving.knative.dev/progress-deadline"] == "150s"
    short = predictor(service(startupSeconds=10))["model"]["startupProbe"]
    assert short == {"periodSeconds": 2, "failureThreshold": 5}


def alerts_of(**settings: Any) -> dict[str, Document]:
    values = {"monitoring": {"prometheusRule": {"enabled": True, **settings}}}
    (rule,) = of_kind(render(values), "PrometheusRule").values()
    return {r["alert"]: r for group in rule["spec"]["groups"] for r in group["rules"] if "alert" in r}


def test_objectives_move_the_burn_rates_and_only_these() -> None:
    plain, moved = alerts_of(), alerts_of(availability=0.99, firstToken=0.95)
    assert plain.keys() == moved.keys()
    changed = {name for name in plain if plain[name] != moved[name]}
    kinds = ("AvailabilityBurnFast", "AvailabilityBurnSlow", "FirstTokenBurnFast", "FirstTokenBurnSlow")
    assert changed == {f"KServeVllm{kind}" for kind in kinds}
    for name in changed:
        old, new = ("0.001", "0.01") if "Availability" in name else ("0.01", "0.05")
        assert plain[name]["expr"].count(f"* {old}") == moved[name]["expr"].count(f"* {new}") == 4


def test_a_loose_objective_asks_for_no_more_failures_than_there_are_requests() -> None:
    for objective in (0.9, 0.5):
        found = alerts_of(availability=objective, firstToken=objective)
        for name in ("KServeVllmAvailabilityBurnFast", "KServeVllmFirstTokenBurnFast", "KServeVllmFirstTokenBurnSlow"):
            for factor, budget in re.findall(r"> ([0-9.]+)(?: [*] ([0-9.]+))?", found[name]["expr"]):
                assert float(factor) * float(budget or 1) <= 0.9


def test_each_alert_leads_to_its_paragraph_of_the_runbook() -> None:
    home = load(CHART / "Chart.yaml")["home"]
    anchors = {
        line[3:].lower() for line in (CHART / "files" / "RUNBOOK.md").read_text().splitlines() if line[:3] == "## "
    }
    for base, settings in (
        (f"{home}/blob/main/charts/kserve-vllm/files/RUNBOOK.md", {}),
        ("https://wiki.example.com/runbook", {"runbookURL": "https://wiki.example.com/runbook"}),
    ):
        found = alerts_of(**settings)
        assert {alert["annotations"]["runbook_url"] for alert in found.values()} == {f"{base}#{a}" for a in anchors}
        assert not [name for name, alert in found.items() if "runbook" in alert["annotations"]]


def test_an_alert_takes_every_duration_and_null_for_what_it_has() -> None:
    plain = alerts_of()["KServeVllmSlowStart"]
    changes: Document = {"for": None, "severity": None, "enabled": None, "labels": {"team": None}}
    assert alerts_of(alerts={"KServeVllmSlowStart": changes})["KServeVllmSlowStart"] == plain
    for given, written in (("1h30m", "1h30m"), (0, "0s"), ("0", "0s")):
        assert alerts_of(alerts={"KServeVllmSlowStart": {"for": given}})["KServeVllmSlowStart"]["for"] == written


@pytest.mark.parametrize(("seconds", "boundary"), [(1, "1.0"), (2.5, "2.5"), (0.25, "0.25"), (30, "30.0")])
def test_a_first_token_is_in_time_at_a_boundary_of_the_histogram(seconds: float, boundary: str) -> None:
    values = {"monitoring": {"prometheusRule": {"enabled": True, "firstTokenSeconds": seconds}}}
    text = json.dumps(render(values))
    assert text.count(f'le=\\"{boundary}\\"') == 7
    assert 'le=\\"0.5\\"' not in text
    assert text.count(f"took longer than {seconds} s.") == 2


def test_the_boundaries_that_can_be_chosen_are_the_metrics() -> None:
    (metric,) = [each for each in DECLARED if each.name == "kserve_vllm_time_to_first_token_seconds"]
    rule = json.loads((CHART / "values.schema.json").read_text())["properties"]["monitoring"]["properties"][
        "prometheusRule"
    ]
    choices = rule["properties"]["firstTokenSeconds"]["enum"]
    assert set(choices) - {None} <= set(metric.buckets)


def test_single_alerts_can_be_changed_and_left_out() -> None:
    found = alerts_of(
        alerts={
            "KServeVllmSlowFirstToken": {"enabled": False},
            "KServeVllmAvailabilityBurnSlow": {"for": "1h", "severity": "page", "labels": {"team": 7}},
        }
    )
    assert found.keys() == alerts_of().keys() - {"KServeVllmSlowFirstToken"}
    changed = found["KServeVllmAvailabilityBurnSlow"]
    assert changed["for"] == "1h"
    assert changed["labels"].items() >= {"severity": "page", "team": "7"}.items()


# What chart-testing asks for.


def test_the_chart_says_where_it_is_from_and_who_keeps_it() -> None:
    about = load(CHART / "Chart.yaml")
    home = "https://github.com/kserve-vllm/kserve-vllm"
    assert about["home"] == home
    assert about["sources"] == [home]
    assert about["maintainers"][0]["url"].startswith("https://")
    path = about["icon"].split("/main/")[1]
    assert (CHART.parents[1] / path).exists()
