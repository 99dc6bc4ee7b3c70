"""NOTES against an API server: which feature flags of Knative are off, where a service answers, what to run."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from tests.charts.support import CHART, HelmError, helm, tool

Document = dict[str, Any]
# Groups and kinds that the chart writes or looks up: (plural, kind, namespaced).
KINDS = {
    "v1": [
        ("configmaps", "ConfigMap", True),
        ("pods", "Pod", True),
        ("secrets", "Secret", True),
        ("serviceaccounts", "ServiceAccount", True),
        ("persistentvolumeclaims", "PersistentVolumeClaim", True),
    ],
    "networking.k8s.io/v1": [("networkpolicies", "NetworkPolicy", True)],
    "apps/v1": [("deployments", "Deployment", True)],
    "batch/v1": [("jobs", "Job", True)],
    "serving.kserve.io/v1alpha1": [
        ("clusterservingruntimes", "ClusterServingRuntime", False),
        ("localmodelcaches", "LocalModelCache", False),
    ],
    "serving.kserve.io/v1beta1": [("inferenceservices", "InferenceService", True)],
}


class Cluster(ThreadingHTTPServer):
    """An API server that knows a few kinds and holds a few objects, by their path."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _ClusterHandler)
        self.objects: dict[str, Document] = {}


class _ClusterHandler(BaseHTTPRequestHandler):
    server: Cluster
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        answer = self.server.objects.get(path) or discovery(path)
        if answer is None and path.rsplit("/", 1)[-1] in {plural for kinds in KINDS.values() for plural, *_ in kinds}:
            answer = {"kind": "List", "apiVersion": "v1", "metadata": {}, "items": []}
        if answer is None:
            self._send(
                404, {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404}
            )
        else:
            self._send(200, answer)

    def _send(self, status: int, body: Document) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def discovery(path: str) -> Document | None:
    """What an API server says of itself at `path`, or None."""
    if path == "/version":
        return {"major": "1", "minor": "34", "gitVersion": "v1.34.0"}
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/apis":
        groups: dict[str, list[str]] = {}
        for version in KINDS:
            if "/" in version:
                groups.setdefault(version.split("/")[0], []).append(version)
        listed = [
            {
                "name": name,
                "versions": [{"groupVersion": v, "version": v.split("/")[1]} for v in versions],
                "preferredVersion": {"groupVersion": versions[0], "version": versions[0].split("/")[1]},
            }
            for name, versions in groups.items()
        ]
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": listed}
    version = path.removeprefix("/apis/").removeprefix("/api/")
    if version not in KINDS:
        return None
    resources = [
        {"name": plural, "singularName": "", "namespaced": namespaced, "kind": kind, "verbs": ["get", "list", "create"]}
        for plural, kind, namespaced in KINDS[version]
    ]
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version, "resources": resources}


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    server = Cluster()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def features(cluster: Cluster, **data: str) -> None:
    """Put Knative's config-features into the cluster."""
    path = "/api/v1/namespaces/knative-serving/configmaps/config-features"
    cluster.objects[path] = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "config-features", "namespace": "knative-serving"},
        "data": {f"kubernetes.podspec-{name.replace('_', '-')}": value for name, value in data.items()},
    }


def installed(cluster: Cluster, tmp_path: Path, *arguments: str, stdin: str | None = None) -> str:
    """What helm prints for an installation into the cluster, with nothing written there."""
    config = tmp_path / "kubeconfig"
    address = f"http://127.0.0.1:{cluster.server_port}"
    config.write_text(
        yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [{"name": "c", "cluster": {"server": address}}],
                "users": [{"name": "u", "user": {}}],
                "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
                "current-context": "x",
            }
        )
    )
    return helm(
        "install",
        "release",
        str(CHART),
        "--namespace",
        "models",
        "--dry-run=server",
        "--kubeconfig",
        str(config),
        "--disable-openapi-validation",
        *arguments,
        stdin=stdin,
    )


def notes(cluster: Cluster, tmp_path: Path, scenario: str) -> str:
    """NOTES of an installation of a scenario into the cluster."""
    values = str(CHART / "ci" / f"{scenario}-values.yaml")
    return installed(cluster, tmp_path, "--values", values).split("NOTES:")[1]


def put(cluster: Cluster, path: str, document: Document) -> None:
    """Put an object of this release, as far as its metadata does not say otherwise, into the cluster."""
    ours = {"meta.helm.sh/release-name": "release", "meta.helm.sh/release-namespace": "models"}
    metadata = document["metadata"]
    metadata["annotations"] = {**ours, **metadata.get("annotations", {})}
    metadata["labels"] = {"app.kubernetes.io/managed-by": "Helm"}
    cluster.objects[path] = document


def test_flags_that_are_on_are_not_spoken_of(cluster: Cluster, tmp_path: Path) -> None:
    features(
        cluster,
        nodeselector="enabled",
        tolerations="Enabled",
        affinity="allowed",
        topologyspreadconstraints="enabled",
        runtimeclassname="enabled",
        priorityclassname="enabled",
        schedulername="enabled",
    )
    said = notes(cluster, tmp_path, "placement")
    assert "feature flags" not in said


def test_flags_that_are_off_are_named_with_the_services_that_need_them(cluster: Cluster, tmp_path: Path) -> None:
    features(cluster, nodeselector="enabled", tolerations="disabled", affinity="enabled", schedulername="enabled")
    said = notes(cluster, tmp_path, "placement")
    off = re.findall(r"^  (kubernetes\.podspec-\w+) \((\w+)\)$", said, re.MULTILINE)
    assert {flag.removeprefix("kubernetes.podspec-") for flag, _ in off} == {
        "tolerations",
        "topologyspreadconstraints",
        "runtimeclassname",
        "priorityclassname",
    }
    assert {name for _, name in off} == {"here"}


def test_the_command_that_switches_them_on_does(cluster: Cluster, tmp_path: Path) -> None:
    features(cluster, tolerations="disabled")
    said = notes(cluster, tmp_path, "placement")
    command = next(line.strip() for line in said.splitlines() if line.strip().startswith("kubectl patch configmap"))
    words = shlex.split(command)
    assert words[:4] == ["kubectl", "patch", "configmap", "config-features"]
    before = tmp_path / "features.json"
    before.write_text(json.dumps(next(iter(cluster.objects.values()))))
    patched = subprocess.run(
        [tool("kubectl"), "patch", "--local", "-f", str(before), "--type", "merge", "-p", words[-1], "-o", "json"],
        capture_output=True,
        text=True,
        check=True,
    )
    data = json.loads(patched.stdout)["data"]
    assert len(data) == 7
    assert set(data.values()) == {"enabled"}


def test_a_canary_before_there_is_anything_to_split_with_is_warned_of(cluster: Cluster, tmp_path: Path) -> None:
    assert "no revision of chat has had all traffic yet" in notes(cluster, tmp_path, "canary-knative")
    path = "/apis/serving.kserve.io/v1beta1/namespaces/models/inferenceservices/chat"
    cluster.objects[path] = {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {
            "name": "chat",
            "namespace": "models",
            "labels": {"app.kubernetes.io/managed-by": "Helm"},
            "annotations": {"meta.helm.sh/release-name": "release", "meta.helm.sh/release-namespace": "models"},
        },
        "status": {
            "url": "http://chat.models.example.com",
            "components": {"predictor": {"latestRolledoutRevision": "chat-predictor-00001"}},
        },
    }
    said = notes(cluster, tmp_path, "canary-knative")
    assert "no revision of chat" not in said
    assert "It answers at http://chat.models.example.com" in said


def test_the_curl_of_the_notes_asks_what_the_model_does(cluster: Cluster, tmp_path: Path) -> None:
    said = notes(cluster, tmp_path, "gpu-single")
    assert 'curl -sS "$URL/openai/v1/completions"' in said
    body = re.search(r"-d '(\{.*\})'", said)
    assert body is not None
    assert json.loads(body.group(1)) == {"model": "chat", "prompt": "Hello", "max_tokens": 16}
    assert "$URL/openai/v1/embeddings" in notes(cluster, tmp_path, "embeddings")


# What can't change, what another release has, and what a version of KServe breaks.

KSERVE = "/apis/apps/v1/namespaces/kserve/deployments/kserve-controller-manager"
LOOKUPS: dict[str, tuple[str, Document, Document, str]] = {
    "another release's runtime": (
        "/apis/serving.kserve.io/v1alpha1/clusterservingruntimes/kserve-vllm-gpu",
        {
            "apiVersion": "serving.kserve.io/v1alpha1",
            "kind": "ClusterServingRuntime",
            "metadata": {
                "name": "kserve-vllm-gpu",
                "annotations": {"meta.helm.sh/release-name": "platform", "meta.helm.sh/release-namespace": "ml"},
            },
        },
        {},
        "runtimes.gpu: ClusterServingRuntime kserve-vllm-gpu belongs to release platform in namespace ml. To run on "
        "it, set runtimes.enabled to false and `runtime: kserve-vllm-gpu` in the services",
    ),
    "a service in another mode": (
        "/apis/serving.kserve.io/v1beta1/namespaces/models/inferenceservices/chat",
        {
            "apiVersion": "serving.kserve.io/v1beta1",
            "kind": "InferenceService",
            "metadata": {"name": "chat", "annotations": {"serving.kserve.io/deploymentMode": "RawDeployment"}},
        },
        {"inferenceServices": {"chat": {"demo": True, "device": "cpu"}}},
        "inferenceServices.chat: it is there in Standard mode, and KServe does not let the mode change",
    ),
    "a claim of another class": (
        "/api/v1/namespaces/models/persistentvolumeclaims/m",
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": "m"},
            "spec": {"storageClassName": "slow", "accessModes": ["ReadWriteMany"]},
        },
        {"modelCaches": {"m": {"huggingFace": {"repository": "a/b"}, "claim": {"storageClassName": "quick"}}}},
        'modelCaches.m: claim m has storage class "slow", which can\'t change',
    ),
    "a claim with other modes": (
        "/api/v1/namespaces/models/persistentvolumeclaims/m",
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": "m"},
            "spec": {"storageClassName": "slow", "accessModes": ["ReadWriteOnce"]},
        },
        {"modelCaches": {"m": {"huggingFace": {"repository": "a/b"}}}},
        "modelCaches.m: claim m has access modes ReadWriteOnce, which can't change",
    ),
    "a local cache of another model": (
        "/apis/serving.kserve.io/v1alpha1/localmodelcaches/m",
        {
            "apiVersion": "serving.kserve.io/v1alpha1",
            "kind": "LocalModelCache",
            "metadata": {"name": "m"},
            "spec": {"sourceModelUri": "hf://a/old"},
        },
        {
            "modelCaches": {
                "m": {
                    "type": "LocalModelCache",
                    "localModelCache": {"sourceModelUri": "hf://a/new", "nodeGroups": ["g"]},
                }
            }
        },
        "modelCaches.m: LocalModelCache m is there with the model hf://a/old, which can't change",
    ),
    "an initial scale of 0": (
        "/api/v1/namespaces/knative-serving/configmaps/config-autoscaler",
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "config-autoscaler"}, "data": {"_example": ""}},
        {"inferenceServices": {"chat": {"storageUri": "hf://a/b", "autoscaling": {"knative": {"initialScale": 0}}}}},
        "inferenceServices.chat: Knative refuses autoscaling.knative.initialScale 0 unless allow-zero-initial-scale is",
    ),
    "KServe 0.20 and several nodes": (
        KSERVE,
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": "kserve-controller-manager"},
            "spec": {
                "template": {
                    "spec": {
                        "containers": [
                            {"name": "kube-rbac-proxy", "image": "quay.io/brancz/kube-rbac-proxy:v0.18.0"},
                            {
                                "name": "manager",
                                "image": "docker.io/kserve/kserve-controller:v0.20.0@sha256:" + "0" * 64,
                            },
                        ]
                    }
                }
            },
        },
        {
            "inferenceServices": {
                "big": {
                    "deploymentMode": "Standard",
                    "storageUri": "pvc://v/m",
                    "multiNode": {"enabled": True},
                    "parallelism": {"pipeline": 2},
                }
            }
        },
        "inferenceServices.big: KServe 0.20.0 deletes the workers of a multiNode service at every reconcile",
    ),
}


@pytest.mark.parametrize("case", LOOKUPS)
def test_what_the_cluster_would_refuse_is_refused_first(case: str, cluster: Cluster, tmp_path: Path) -> None:
    path, document, values, sentence = LOOKUPS[case]
    text = json.dumps(values)
    assert "NOTES:" in installed(cluster, tmp_path, "--values", "-", stdin=text)
    put(cluster, path, json.loads(json.dumps(document)))
    with pytest.raises(HelmError) as refusal:
        installed(cluster, tmp_path, "--values", "-", stdin=text)
    assert sentence in str(refusal.value)
    # Without a look at the cluster the chart says nothing.
    text = json.dumps({**values, "cluster": {"lookup": False}})
    try:
        answer = installed(cluster, tmp_path, "--values", "-", stdin=text)
    except HelmError as error:
        # Helm itself may say whose an object is.
        answer = str(error)
    assert sentence not in answer


def test_a_version_that_is_not_known_is_warned_of_and_one_that_works_is_not(cluster: Cluster, tmp_path: Path) -> None:
    for scenario in ("multi-node", "canary-standard"):
        assert "WARNING: KServe 0.20" in notes(cluster, tmp_path, scenario)
    document = json.loads(json.dumps(LOOKUPS["KServe 0.20 and several nodes"][1]).replace("v0.20.0", "v0.21.0"))
    put(cluster, KSERVE, document)
    for scenario in ("multi-node", "canary-standard"):
        assert "WARNING: KServe 0.20" not in notes(cluster, tmp_path, scenario)
