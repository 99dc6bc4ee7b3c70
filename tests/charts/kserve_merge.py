"""What KServe makes of an InferenceService and its runtime: the pod, by the rules of its controller.

A model of the rules and not of the code: arguments are appended, environment merges by name, resources by
key, volumes and mounts by name and path, ports by number; of a runtime's pod fields only a few reach the
pod; placeholders of Go's templates are filled in the merged container alone. Several `storageUris` are written into
the pod's template, a single `storageUri` is not: KServe's webhook for pods acts on that one.

`make e2e` compares it with what the cluster's KServe writes, for each scenario of the chart.
"""

from __future__ import annotations

import copy
import json
import math
import posixpath
import re
from typing import Any

from tests.charts.support import Document

# Of a runtime, besides containers.
RUNTIME_POD_FIELDS = (
    "nodeSelector",
    "affinity",
    "tolerations",
    "volumes",
    "imagePullSecrets",
    "schedulerName",
    "resourceClaims",
)
# Fields of the predictor that are KServe's own and not the pod's.
PREDICTOR_FIELDS = {
    "annotations",
    "autoScaling",
    "batcher",
    "canaryTrafficPercent",
    "containerConcurrency",
    "deploymentStrategy",
    "labels",
    "logger",
    "maxReplicas",
    "minReplicas",
    "model",
    "name",
    "scaleMetric",
    "scaleMetricType",
    "scaleTarget",
    "storageContainerName",
    "storageUris",
    "timeout",
    "workerSpec",
}
# Fields of `model` that are not the container's.
MODEL_FIELDS = {"modelFormat", "runtime", "runtimeVersion", "protocolVersion", "storageUri", "storage", "confidential"}
_KEYS = {
    "env": "name",
    "volumeMounts": "mountPath",
    "ports": "containerPort",
    "volumes": "name",
    "imagePullSecrets": "name",
}


GPU_RESOURCES = ("nvidia.com/gpu", "amd.com/gpu", "intel.com/gpu", "habana.ai/gaudi")
MODELS = "/mnt/models"
"""Where KServe puts what it fetched, unless a mount path is named."""


_HUGGING_FACE = {
    "HF_HUB_ENABLE_HF_TRANSFER": "1",
    "HF_XET_HIGH_PERFORMANCE": "1",
    "HF_XET_NUM_CONCURRENT_RANGE_GETS": "8",
}
"""What KServe's storage initializer has in its environment wherever it fetches from."""


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
    others = [copy.deepcopy(c) for c in spec["containers"] if c["name"] != "kserve-container"]
    containers = [container, *others, *copy.deepcopy(predictor.get("containers", []))]
    result = {"metadata": metadata, "spec": {**fields, "containers": containers}}
    if "workerSpec" in predictor:
        tensor, pipeline = parallel_sizes(service, runtime)
        for name, value in _sizes(tensor, pipeline).items():
            _set_env(container, name, value)
        # KServe adds them: what the runtime does not read, it must not fall over either.
        _set_env(container, "MODEL_NAME", service["metadata"]["name"])
        if predictor["model"].get("storageUri", "").partition("://")[0] in ("pvc", "oci"):
            _set_env(container, "MODEL_DIR", MODELS)
        _gpus(container, tensor, metadata["annotations"])
    _fetch(result["spec"], predictor.get("storageUris", []))
    return result


def _mount(spec: Document, container: Document, volume: Document, mount: Document) -> None:
    """A mount and its volume, unless the container mounts that volume already."""
    mounts = container.setdefault("volumeMounts", [])
    if any(m["name"] == mount["name"] for m in mounts):
        return
    mounts.append(mount)
    if all(v["name"] != volume["name"] for v in spec.setdefault("volumes", [])):
        spec["volumes"].append(volume)


def _fetch(spec: Document, uris: list[Document]) -> None:
    """Several `storageUris`: claims are mounted, all else is fetched by one container before the start."""
    container, fetched = spec["containers"][0], []
    for source in uris:
        at = source.get("mountPath", MODELS)
        name = at.strip("/").replace("/", "-")
        scheme, _, rest = source["uri"].partition("://")
        if scheme == "pvc":
            volume = {"name": name, "persistentVolumeClaim": {"claimName": rest.partition("/")[0]}}
            _mount(spec, container, volume, {"name": name, "mountPath": at, "readOnly": True})
        elif scheme.partition("+")[0] != "oci":
            fetched.append((source["uri"], at))
    if not fetched:
        return
    at = posixpath.commonpath([at for _, at in fetched])
    name = at.strip("/").replace("/", "-")
    initializer: Document = {
        "name": "storage-initializer",
        "args": [word for pair in fetched for word in pair],
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "env": [{"name": name, "value": value} for name, value in _HUGGING_FACE.items()],
    }
    for target, read_only in ((container, True), (initializer, False)):
        mount = {"name": name, "mountPath": at, **({"readOnly": True} if read_only else {})}
        _mount(spec, target, {"name": name, "emptyDir": {}}, mount)
    spec.setdefault("initContainers", []).append(initializer)


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


def _gpus(container: Document, count: int, annotations: Document) -> None:
    """The count of GPUs by the name that the container has for them: one of KServe's, or of an annotation's list."""
    resources = container.setdefault("resources", {})
    known = [*GPU_RESOURCES, *json.loads(annotations.get("serving.kserve.io/gpu-resource-types", "[]"))]
    asked = {**resources.get("limits", {}), **resources.get("requests", {})}
    name = next((name for name in known if str(asked.get(name, "0")) != "0"), GPU_RESOURCES[0])
    for group in ("limits", "requests"):
        resources.setdefault(group, {})[name] = str(count)


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
    _gpus(container, tensor, service["metadata"].get("annotations", {}))
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
    for name, field in (
        ("timeoutSeconds", "timeout"),
        ("responseStartTimeoutSeconds", "timeout"),
        ("containerConcurrency", "containerConcurrency"),
    ):
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
