"""Takes a snapshot: of a service in a cluster, or of one server that answers at a URL. Reads, never writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime

from kserve_vllm.ops.cluster import ApiError, Cluster, Json
from kserve_vllm.ops.diagnose.snapshot import Snapshot, hide_in_text, without_secrets
from kserve_vllm.ops.exposition import METRICS_BYTES, fetch

_HTTP_PORT = 8080
# Kinds that may be absent from a healthy cluster: their absence is a fact, not a fault.
_OF_NAMESPACE = (
    "ServingRuntime",
    "Deployment",
    "ReplicaSet",
    "Pod",
    "Event",
    "Service",
    "PersistentVolumeClaim",
    "ResourceQuota",
    "HorizontalPodAutoscaler",
    "PodDisruptionBudget",
    "ScaledObject",
    "HTTPRoute",
    "VirtualService",
    "KnativeService",
    "Revision",
    "Route",
    "PodAutoscaler",
)
_CONFIG_MAPS = (
    ("kserve", "inferenceservice-config"),
    ("knative-serving", "config-features"),
    ("knative-serving", "config-defaults"),
    ("knative-serving", "config-deployment"),
    ("knative-serving", "config-autoscaler"),
)
# The names are prefixes: a service, its predictor, its canaries.
_OWN = (
    "KnativeService",
    "Revision",
    "Route",
    "PodAutoscaler",
    "Deployment",
    "ReplicaSet",
    "Pod",
    "Service",
    "HorizontalPodAutoscaler",
    "PodDisruptionBudget",
    "ScaledObject",
    "HTTPRoute",
    "VirtualService",
)
_MOST_PODS_ASKED = 6


def collect(
    cluster: Cluster,
    namespace: str,
    name: str,
    kserve_namespace: str = "kserve",
    knative_namespace: str = "knative-serving",
    manifest: Json | None = None,
    progress: Callable[[str], None] = lambda step: None,
) -> Snapshot:
    """Read everything about a service that this user may read; what may not be read is written down.

    Args:
        cluster: where.
        namespace, name: of the InferenceService.
        kserve_namespace, knative_namespace: where their controllers and settings are.
        manifest: an InferenceService to try without keeping it (`dryRun=All`).
        progress: told each step, for a person who waits.
    """
    seen = Snapshot(name, namespace, datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"))
    progress("the InferenceService")
    try:
        seen.objects["InferenceService"] = [without_secrets(cluster.get("InferenceService", namespace, name))]
    except ApiError as error:
        _refuse(seen, "InferenceService", error)
        if error.status == 0:
            return seen
        _list(seen, cluster, "InferenceService", namespace, keep=lambda found: True)
    progress("its runtime, pods and events")
    _list(seen, cluster, "ClusterServingRuntime")
    for kind in _OF_NAMESPACE:
        _list(seen, cluster, kind, namespace, keep=_belongs(name) if kind in _OWN else None)
    _events_of_the_service_alone(seen)
    _list(seen, cluster, "Node", keep=lambda node: True, trim=_node)
    _list(seen, cluster, "LocalModelCache")
    progress("the settings of KServe and Knative")
    for where, config in _CONFIG_MAPS:
        where = {"kserve": kserve_namespace, "knative-serving": knative_namespace}[where]
        try:
            seen.objects.setdefault("ConfigMap", []).append(without_secrets(cluster.get("ConfigMap", where, config)))
        except ApiError as error:
            _refuse(seen, f"ConfigMap {where}/{config}", error)
    try:
        seen.objects["Controller"] = [
            without_secrets(found)
            for found in cluster.list("Deployment", kserve_namespace)
            if "controller" in found["metadata"]["name"]
        ]
    except ApiError as error:
        _refuse(seen, f"Deployments in {kserve_namespace}", error)
    if manifest is not None:
        progress("what the API server says of the manifest")
        seen.submitted = _submit(cluster, namespace, name, manifest)
    progress("logs, health and metrics of the pods")
    for pod in _most_telling(seen.objects.get("Pod", [])):
        _ask_pod(seen, cluster, pod)
    return seen


def collect_url(url: str, api_key: str = "", timeout_s: float = 5.0) -> Snapshot:
    """Ask one server for its health and metrics.

    Args:
        url: its base, such as `http://localhost:8080`.
        api_key: sent as a bearer token where the server wants one for its metrics.
        timeout_s: for each question.
    """
    base = url.rstrip("/")
    seen = Snapshot(base, "", datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"))
    answers: Json = {}
    for key, path in (("health", "/v2/health/ready"), ("live", "/v2/health/live"), ("metrics", "/metrics")):
        status, text = fetch(base + path, api_key, timeout_s)
        if status == 0:
            seen.refused[path] = {"status": 0, "message": text}
            if key == "health":
                break
        answers[key] = text if key == "metrics" and status == 200 else _answer(status, text)
    seen.answers[base] = answers
    return seen


def _answer(status: int, text: str) -> Json:
    try:
        body: object = json.loads(text)
    except ValueError:
        body = text[:2000]
    return {"status": status, "body": body}


def _refuse(seen: Snapshot, what: str, error: ApiError) -> None:
    seen.refused[what] = {"status": error.status, "message": hide_in_text(error.message[:1000])}


def _list(
    seen: Snapshot,
    cluster: Cluster,
    kind: str,
    namespace: str = "",
    keep: Callable[[Json], bool] | None = None,
    trim: Callable[[Json], Json] = without_secrets,
) -> None:
    try:
        seen.objects[kind] = [trim(found) for found in cluster.list(kind, namespace) if keep is None or keep(found)]
    except ApiError as error:
        # Kind by kind, so that one missing right costs one kind.
        if kind not in seen.refused:
            _refuse(seen, kind, error)


def _belongs(name: str) -> Callable[[Json], bool]:
    """Whether an object is the service's: by label, or by the names that KServe gives."""

    def check(obj: Json) -> bool:
        metadata = obj["metadata"]
        labels = metadata.get("labels") or {}
        named = metadata["name"]
        return (
            labels.get("serving.kserve.io/inferenceservice") == name
            or labels.get("app") == f"isvc.{name}-predictor"
            or named in (name, f"{name}-predictor")
            or named.startswith((f"{name}-predictor-", f"keda-hpa-{name}-predictor"))
        )

    return check


def _events_of_the_service_alone(seen: Snapshot) -> None:
    names = {obj["metadata"]["name"] for kind in _OWN for obj in seen.objects.get(kind, [])} | {seen.name}
    claims = {obj["metadata"]["name"] for obj in seen.objects.get("PersistentVolumeClaim", [])}

    def about(event: Json) -> bool:
        named = (event.get("involvedObject") or {}).get("name", "")
        return named in names | claims or named.startswith(f"{seen.name}-predictor")

    seen.objects["Event"] = [event for event in seen.objects.get("Event", []) if about(event)]


def _node(node: Json) -> Json:
    """What matters of a node; whole nodes would fill the snapshot."""
    spec, status = node.get("spec") or {}, node.get("status") or {}
    return {
        "metadata": {"name": node["metadata"]["name"], "labels": node["metadata"].get("labels") or {}},
        "spec": {key: spec[key] for key in ("taints", "unschedulable") if key in spec},
        "status": {
            "allocatable": status.get("allocatable") or {},
            "conditions": [
                {key: condition.get(key) for key in ("type", "status", "reason", "message")}
                for condition in status.get("conditions") or []
            ],
        },
    }


def _submit(cluster: Cluster, namespace: str, name: str, manifest: Json) -> str:
    """What the API server says of a manifest, or nothing where it would take it."""
    try:
        try:
            there = cluster.get("InferenceService", namespace, name)
        except ApiError as error:
            if error.status not in (403, 404):
                raise
            cluster.create("InferenceService", namespace, manifest, dry_run=True)
        else:
            body = {
                **manifest,
                "metadata": {**manifest["metadata"], "resourceVersion": there["metadata"]["resourceVersion"]},
            }
            cluster.replace("InferenceService", namespace, name, body, dry_run=True)
    except ApiError as error:
        return hide_in_text(f"{error.status}: {error.message}")
    return ""


def _most_telling(pods: list[Json]) -> list[Json]:
    """Pods that are not ready first, and only so many of them."""

    def ready(pod: Json) -> bool:
        conditions = (pod.get("status") or {}).get("conditions") or []
        return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)

    return sorted(pods, key=ready)[:_MOST_PODS_ASKED]


def _ask_pod(seen: Snapshot, cluster: Cluster, pod: Json) -> None:
    name = pod["metadata"]["name"]
    status = pod.get("status") or {}
    for group in ("initContainerStatuses", "containerStatuses"):
        for container in status.get(group) or []:
            _read_logs(seen, cluster, name, container)
    running = any(
        "running" in (c.get("state") or {})
        for c in status.get("containerStatuses") or []
        if c["name"] in ("kserve-container", "worker-container")
    )
    if not running:
        return
    answers: Json = {}
    for key, path in (("health", "/v2/health/ready"), ("live", "/v2/health/live"), ("metrics", "/metrics")):
        try:
            code, text = cluster.through_pod(seen.namespace, name, _HTTP_PORT, path)
        except ApiError as error:
            _refuse(seen, f"{path} of pod {name}", error)
            continue
        if code == 403 and '"Status"' in text:
            seen.refused["pods/proxy"] = {"status": 403, "message": str(_answer(code, text)["body"])[:500]}
            break
        answers[key] = text[:METRICS_BYTES] if key == "metrics" and code == 200 else _answer(code, text)
    if answers:
        seen.answers[name] = answers


def _read_logs(seen: Snapshot, cluster: Cluster, pod: str, container: Json) -> None:
    state = container.get("state") or {}
    if "waiting" in state and not container.get("lastState") and not container.get("restartCount"):
        return
    wanted = [(False, f"{pod}/{container['name']}")]
    if container.get("restartCount"):
        wanted.append((True, f"{pod}/{container['name']}/previous"))
    for previous, key in wanted:
        try:
            seen.logs[key] = hide_in_text(cluster.log(seen.namespace, pod, container["name"], previous))
        except ApiError as error:
            what = "pods/log" if error.status == 403 else f"log of {key}"
            _refuse(seen, what, error)
