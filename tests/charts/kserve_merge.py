"""What KServe makes of an InferenceService and its runtime: the pod, by the rules of its controller.

A model of the rules and not of the code: arguments are appended, environment merges by name, resources by
key, volumes and mounts by name and path, ports by number; of a runtime's pod fields only a few reach the
pod; placeholders of Go's templates are filled in the merged container alone.
"""

from __future__ import annotations

import copy
import json
import math
import re
from typing import Any

from tests.charts.support import Document

# Of a runtime, besides containers.
RUNTIME_POD_FIELDS = (
    "nodeSelector", "affinity", "tolerations", "volumes", "imagePullSecrets", "schedulerName", "resourceClaims"
)  # fmt: skip
# Fields of the predictor that are KServe's own and not the pod's.
PREDICTOR_FIELDS = {
    "annotations", "autoScaling", "batcher", "canaryTrafficPercent", "containerConcurrency", "deploymentStrategy",
    "labels", "logger", "maxReplicas", "minReplicas", "model", "name", "scaleMetric", "scaleMetricType", "scaleTarget",
    "storageContainerName", "storageUris", "timeout", "workerSpec",
}  # fmt: skip
# Fields of `model` that are not the container's.
MODEL_FIELDS = {"modelFormat", "runtime", "runtimeVersion", "protocolVersion", "storageUri", "storage", "confidential"}
_KEYS = {"env": "name", "volumeMounts": "mountPath", "ports": "containerPort", "volumes": "name",
         "imagePullSecrets": "name"}  # fmt: skip


class MergeError(Exception):
    """KServe would mark the InferenceService as invalid."""


def _by_key(base: list[Document], patch: list[Document], key: str) -> list[Document]:
    # What the patch names comes in its order, as a strategic merge has it; the rest keeps its own before it.
    new = {item[key]: item for item in patch}
    kept = [item for item in base if item[key] not in new]
    old = {item[key]: item for item in base}
    return kept + [_merge(old.get(item[key], {}), item) for item in patch]


def _merge(base: Document, patch: Document) -> Document:
    merged = copy.deepcopy(base)
    for name, value in patch.items():
        if name in _KEYS and name in merged:
            merged[name] = _by_key(merged[name], value, _KEYS[name])
        elif isinstance(value, dict) and isinstance(merged.get(name), dict):
            if name == "valueFrom":
                merged[name] = copy.deepcopy(value)
            else:
                merged[name] = _merge(merged[name], value)
        else:
            merged[name] = copy.deepcopy(value)
    if "value" in patch and "valueFrom" in merged:
        del merged["valueFrom"]
    return merged


def merge_container(runtime: Document, service: Document) -> Document:
    """The runtime's container with the InferenceService's laid over it."""
    merged = _merge(runtime, service)
    arguments = [*runtime.get("args", []), *service.get("args", [])]
    if arguments:
        merged["args"] = arguments
    return merged


def fill_placeholders(container: Document, metadata: Document) -> Document:
    """Fill {{.Name}}, {{.Namespace}}, {{.Labels.x}} and {{.Annotations.x}}; raises MergeError for anything else."""

    def value(match: re.Match[str]) -> str:
        action = match.group(1).strip()
        if action == ".Name":
            return str(metadata["name"])
        if action == ".Namespace":
            return str(metadata.get("namespace", ""))
        if found := re.fullmatch(r"\.(Labels|Annotations)\.([\w-]+)", action):
            return str(metadata.get(found.group(1).lower(), {}).get(found.group(2), ""))
        raise MergeError(f"failed to replace placeholders: {{{{{action}}}}}")

    text = re.sub(r"\{\{(.*?)\}\}", value, json.dumps(container))
    if "{{" in text:
        raise MergeError("failed to replace placeholders: an action is not closed")
    filled: Document = json.loads(text)
    return filled


def is_multi_model(predictor: Document) -> bool:
    """True when KServe takes the service for multi-model serving and injects its agent."""
    model = predictor["model"]
    stored = model.get("storageUri") or model.get("storage") or predictor.get("storageUris")
    return not stored and model["modelFormat"]["name"] != "huggingface"


def supports(runtime: Document, model: Document) -> bool:
    """True when a runtime that is named takes the model's format (case-sensitive, version if given)."""
    wanted = model["modelFormat"]
    return any(
        form["name"] == wanted["name"] and ("version" not in wanted or form.get("version") == wanted["version"])
        for form in runtime["spec"]["supportedModelFormats"]
    )


def _pod_fields(runtime_spec: Document, predictor: Document) -> Document:
    base = {name: runtime_spec[name] for name in RUNTIME_POD_FIELDS if name in runtime_spec}
    own = {name: value for name, value in predictor.items() if name not in PREDICTOR_FIELDS and name != "containers"}
    return _merge(base, {k: v for k, v in own.items() if k not in ("pipelineParallelSize", "tensorParallelSize")})


def _set_env(container: Document, name: str, value: str) -> None:
    container["env"] = [e for e in container.get("env", []) if e["name"] != name] + [{"name": name, "value": value}]


def pod(service: Document, runtime: Document) -> Document:
    """The pod template (metadata and spec) of an InferenceService's predictor."""
    predictor = service["spec"]["predictor"]
    spec = runtime["spec"]
    if not supports(runtime, predictor["model"]):
        raise MergeError(f"{runtime['metadata']['name']} does not support {predictor['model']['modelFormat']}")
    if predictor["model"].get("protocolVersion", "v1") not in spec.get("protocolVersions", ["v1"]):
        raise MergeError("the runtime does not support the protocol version")
    by_name = {c["name"]: c for c in spec["containers"]}
    own = {name: value for name, value in predictor["model"].items() if name not in MODEL_FIELDS}
    container = merge_container(by_name["kserve-container"], own)
    container = fill_placeholders(container, service["metadata"])
    _set_env(container, "INFERENCE_SERVICE_NAME", service["metadata"]["name"])
    fields = _pod_fields(spec, predictor)
    metadata = {
        "labels": {
            **spec.get("labels", {}),
            **service["metadata"].get("labels", {}),
            **predictor.get("labels", {}),
            "serving.kserve.io/inferenceservice": service["metadata"]["name"],
            "component": "predictor",
        },
        "annotations": {
            **spec.get("annotations", {}),
            **service["metadata"].get("annotations", {}),
            **predictor.get("annotations", {}),
        },
    }
    result = {"metadata": metadata, "spec": {**fields, "containers": [container]}}
    if "workerSpec" in predictor:
        tensor, pipeline = parallel_sizes(service, runtime)
        for name, value in _sizes(tensor, pipeline).items():
            _set_env(container, name, value)
        _gpus(container, tensor)
    return result


def parallel_sizes(service: Document, runtime: Document) -> tuple[int, int]:
    """(tensor, pipeline) of a multi-node service: the InferenceService's over the runtime's."""
    theirs, own = runtime["spec"]["workerSpec"], service["spec"]["predictor"]["workerSpec"]
    tensor = own.get("tensorParallelSize", theirs.get("tensorParallelSize", 1))
    return tensor, own.get("pipelineParallelSize", theirs.get("pipelineParallelSize", 1))


def _sizes(tensor: int, pipeline: int) -> dict[str, str]:
    return {
        "PIPELINE_PARALLEL_SIZE": str(pipeline),
        "TENSOR_PARALLEL_SIZE": str(tensor),
        "RAY_NODE_COUNT": str(pipeline),
        "REQUEST_GPU_COUNT": str(tensor),
    }


def _gpus(container: Document, count: int) -> None:
    resources = container.setdefault("resources", {})
    for group in ("limits", "requests"):
        resources.setdefault(group, {})["nvidia.com/gpu"] = str(count)


def ray_node_count(service: Document, runtime: Document) -> int:
    """Nodes by KServe's older rule, which counts GPUs: the newer one, by stages, must come to the same."""
    tensor, pipeline = parallel_sizes(service, runtime)
    worker = merge_container(
        runtime["spec"]["workerSpec"]["containers"][0], service["spec"]["predictor"]["workerSpec"]["containers"][0]
    )
    return math.ceil(tensor * pipeline / int(worker["resources"]["requests"]["nvidia.com/gpu"]))


def worker_pod(service: Document, runtime: Document) -> Document:
    """The pod spec of the workers. Placeholders are not filled there."""
    own, theirs = service["spec"]["predictor"]["workerSpec"], runtime["spec"]["workerSpec"]
    container = merge_container(theirs["containers"][0], (own.get("containers") or [{}])[0])
    tensor, pipeline = parallel_sizes(service, runtime)
    name = service["metadata"]["name"]
    extra = {
        **_sizes(tensor, pipeline),
        "ISVC_NAME": name,
        "HEAD_SVC": f"{name}-head-1",
        "WORKER_SVC": f"{name}-workers-1",
    }
    for key, value in extra.items():
        _set_env(container, key, value)
    _gpus(container, tensor)
    return {**_pod_fields(theirs, own), "containers": [container]}


def expanded(container: Document) -> list[str]:
    """The arguments as the kubelet hands them over, with $(NAME) from the environment."""
    known = {e["name"]: e.get("value", "192.0.2.1") for e in container.get("env", [])}

    def value(match: re.Match[str]) -> str:
        if match.group(1) not in known:
            raise MergeError(f"$({match.group(1)}) is not in the environment")
        return str(known[match.group(1)])

    return [re.sub(r"\$\(([A-Za-z_][A-Za-z0-9_]*)\)", value, argument) for argument in container.get("args", [])]


def knative_service(service: Document, template: Document) -> Document:
    """The Knative Service that KServe writes for a predictor."""
    predictor: Document = service["spec"]["predictor"]
    annotations: dict[str, Any] = dict(template["metadata"]["annotations"])
    annotations["autoscaling.knative.dev/class"] = "kpa.autoscaling.knative.dev"
    annotations["autoscaling.knative.dev/min-scale"] = str(predictor.get("minReplicas", 1))
    if predictor.get("maxReplicas"):
        annotations["autoscaling.knative.dev/max-scale"] = str(predictor["maxReplicas"])
    if "scaleTarget" in predictor:
        annotations["autoscaling.knative.dev/target"] = str(predictor["scaleTarget"])
    if "scaleMetric" in predictor:
        annotations["autoscaling.knative.dev/metric"] = predictor["scaleMetric"]
    spec = {**template["spec"]}
    for name, field in (("timeoutSeconds", "timeout"), ("containerConcurrency", "containerConcurrency")):
        if field in predictor:
            spec[name] = predictor[field]
    return {
        "apiVersion": "serving.knative.dev/v1",
        "kind": "Service",
        "metadata": {"name": f"{service['metadata']['name']}-predictor", "namespace": "models"},
        "spec": {"template": {"metadata": {**template["metadata"], "annotations": annotations}, "spec": spec}},
    }


def deployment(service: Document, template: Document) -> Document:
    """The Deployment that KServe writes in Standard mode."""
    name = f"{service['metadata']['name']}-predictor"
    labels = {**template["metadata"]["labels"], "app": f"isvc.{name}"}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "namespace": "models"},
        "spec": {
            "selector": {"matchLabels": {"app": f"isvc.{name}"}},
            "template": {"metadata": {**template["metadata"], "labels": labels}, "spec": template["spec"]},
        },
    }


def scaled_object(service: Document) -> Document:
    """The ScaledObject that KServe writes for autoscalerClass keda."""
    predictor = service["spec"]["predictor"]
    triggers = []
    for metric in predictor["autoScaling"]["metrics"]:
        external = metric["external"]
        trigger: Document = {
            "type": external["metric"]["backend"],
            "metadata": {
                "serverAddress": external["metric"]["serverAddress"],
                "query": external["metric"]["query"],
                "threshold": str(external["target"]["value"]),
            },
        }
        if reference := external.get("authenticationRef"):
            trigger["authenticationRef"] = {"name": reference["authenticationRef"]["name"]}
            if reference.get("authModes"):
                trigger["metadata"]["authModes"] = reference["authModes"]
        triggers.append(trigger)
    name = f"{service['metadata']['name']}-predictor"
    return {
        "apiVersion": "keda.sh/v1alpha1",
        "kind": "ScaledObject",
        "metadata": {"name": name, "namespace": "models"},
        "spec": {
            "scaleTargetRef": {"name": name},
            "triggers": triggers,
            "minReplicaCount": predictor.get("minReplicas", 1),
            "maxReplicaCount": predictor["maxReplicas"],
        },
    }
