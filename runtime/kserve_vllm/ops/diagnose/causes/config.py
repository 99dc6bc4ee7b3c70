"""What KServe can't turn into pods: runtimes, formats, modes and values that don't fit."""

from __future__ import annotations

import difflib

from kserve_vllm.ops.diagnose.causes.table import DEGRADED, Cause, Match, either, said
from kserve_vllm.ops.diagnose.facts import MODES, SERVING, Facts, dig
from kserve_vllm.ops.diagnose.snapshot import moment


def _named(f: Facts) -> str:
    return str(f.model.get("runtime") or "")


def _runtime_absent(f: Facts) -> Match | None:
    named = _named(f)
    if not named or f.ready or f.runtime or "ClusterServingRuntime" in f.snapshot.refused:
        return None
    there = [r["metadata"]["name"] for r in f.runtimes]
    if not there:
        return None
    near = difflib.get_close_matches(named, there, 1, 0.5)
    return {
        "runtime": named,
        "there": ", ".join(sorted(there)[:8]),
        "near": (near or sorted(there))[0],
        "evidence": f"spec.predictor.model.runtime: {named}",
    }


def _no_runtimes(f: Facts) -> Match | None:
    if not f.isvc or f.ready or f.runtimes or not f.model:
        return None
    if {"ClusterServingRuntime", "ServingRuntime"} & set(f.snapshot.refused):
        return None
    return {"evidence": "no ServingRuntime and no ClusterServingRuntime is there"}


def _runtime_off(f: Facts) -> Match | None:
    if f.runtime and dig(f.runtime, "spec", "disabled") and not f.ready:
        return {
            "runtime": f.runtime["metadata"]["name"],
            "evidence": "the runtime has spec.disabled: true",
            "kind": str(f.runtime.get("kind", "clusterservingruntime")).lower(),
        }
    return None


def _format_unknown(f: Facts) -> Match | None:
    wanted = dig(f.model, "modelFormat", "name")
    reason = dig(f.isvc, "status", "modelStatus", "lastFailureInfo", "reason")
    text = str(dig(f.isvc, "status", "modelStatus", "lastFailureInfo", "message") or "")
    if f.ready or reason != "NoSupportingRuntime" or "protocol" in text or not f.runtimes:
        return None
    # A runtime that is named has to take the format by itself.
    asked = [f.runtime] if f.runtime else f.runtimes
    known = sorted({e["name"] for r in asked for e in dig(r, "spec", "supportedModelFormats") or []})
    version = dig(f.model, "modelFormat", "version")
    return {
        "format": f"{wanted}" + (f" version {version}" if version else ""),
        "known": ", ".join(known) or "none",
        "evidence": f"InferenceService {f.name}: NoSupportingRuntime {text}",
    }


def _format_case(f: Facts) -> Match | None:
    wanted = str(dig(f.model, "modelFormat", "name") or "")
    known = {e["name"] for r in f.runtimes for e in dig(r, "spec", "supportedModelFormats") or []}
    if f.ready or not wanted or wanted in known:
        return None
    same = next((name for name in sorted(known) if name.lower() == wanted.lower()), None)
    return (
        None
        if same is None
        else {"format": wanted, "right": same, "evidence": f"spec.predictor.model.modelFormat.name: {wanted}"}
    )


def _stopped(f: Facts) -> Match | None:
    key = "serving.kserve.io/stop"
    if (dig(f.isvc, "metadata", "annotations") or {}).get(key) == "true":
        return {"evidence": f"metadata.annotations[{key}]: true"}
    return None


def _mode_changed(f: Facts) -> Match | None:
    wanted = (dig(f.isvc, "metadata", "annotations") or {}).get("serving.kserve.io/deploymentMode")
    has = dig(f.isvc, "status", "deploymentMode")
    if wanted and has and MODES.get(wanted, wanted) != MODES.get(has, has):
        return {"wanted": wanted, "has": has, "evidence": f"annotation {wanted}, status.deploymentMode {has}"}
    return None


def _agent(f: Facts) -> Match | None:
    if not f.model or f.model.get("storageUri") or dig(f.model, "storage") or f.model.get("storageUris"):
        return None
    if dig(f.model, "modelFormat", "name") == "huggingface":
        return None
    for pod in f.unready:
        for container in pod["spec"].get("containers") or []:
            if container["name"] == "agent":
                return {
                    "format": str(dig(f.model, "modelFormat", "name")),
                    "evidence": f"Pod {pod['metadata']['name']} has a container named agent",
                }
    return None


def _rewritten(f: Facts) -> Match | None:
    for source in (f.isvc, f.runtime):
        for where in ("annotations", "labels"):
            for holder in (dig(source, "metadata", where), dig(source, "spec", where)):
                if holder and "serving.kserve.io/server-type" in holder and not f.ready:
                    return {
                        "evidence": f"{source.get('kind')} {source['metadata']['name']}: "
                        "serving.kserve.io/server-type is set"
                    }
    return None


def _worker_image(f: Facts) -> Match | None:
    """A multi-node service of which only the head is there."""
    if f.predictor.get("workerSpec") is None or f.ready:
        return None
    for each in f.all("Deployment"):
        if each["metadata"]["name"].endswith("-worker") and not dig(each, "status", "readyReplicas"):
            name = each["metadata"]["name"]
            return {"worker": name, "evidence": f"Deployment {name}: 0 of {dig(each, 'spec', 'replicas')} ready"}
    if any(c["name"] in SERVING for p in f.pods for c in p["spec"].get("containers") or []) and not any(
        e["metadata"]["name"].endswith("-worker") for e in f.all("Deployment")
    ):
        return {"worker": f"{f.name}-predictor-worker", "evidence": "there is no Deployment of workers"}
    return None


def _not_ready(f: Facts) -> Match | None:
    if not f.isvc or f.ready or f.annotation("serving.kserve.io/stop") == "true":
        return None
    words = [f"{each.where}: {each.reason} {each.text}".strip() for each in f.said if each.reason or each.text]
    return {"evidence": "; ".join(dict.fromkeys(words)) or "the InferenceService has no status yet"}


_PRIORITY = r"same priority assigned for the model format (?P<format>\S+)(?P<rest>.*)"

CAUSES = (
    Cause(
        "stopped",
        "The service is stopped on purpose",
        92,
        "The annotation serving.kserve.io/stop is true, so KServe has removed its pods.",
        ("kubectl -n $ns annotate inferenceservice $name serving.kserve.io/stop-",),
        _stopped,
    ),
    Cause(
        "runtimes-none",
        "No runtime is installed",
        92,
        "The service needs a ServingRuntime or ClusterServingRuntime and the cluster has none: this chart is not "
        "installed, or with runtimes.scope=Namespaced in another namespace.",
        ("helm install kserve-vllm charts/kserve-vllm -n $ns",),
        _no_runtimes,
    ),
    Cause(
        "runtime-absent",
        "The named runtime does not exist",
        92,
        "The service asks for the runtime $runtime, and there are only: $there.",
        (
            "kubectl -n $ns patch inferenceservice $name --type merge -p "
            '\'{"spec":{"predictor":{"model":{"runtime":"$near"}}}}\'',
        ),
        _runtime_absent,
    ),
    Cause(
        "runtime-disabled",
        "The runtime is disabled",
        92,
        "The runtime $runtime has spec.disabled, so KServe makes no pods of it.",
        ('kubectl -n $ns patch $kind $runtime --type merge -p \'{"spec":{"disabled":false}}\'',),
        either(_runtime_off, said(r"specified runtime (?P<runtime>\S+) is disabled")),
    ),
    Cause(
        "format-case",
        "The model format is spelled in another case",
        91,
        "Format names are told apart by case: the service says $format, the runtime $right.",
        (
            "kubectl -n $ns patch inferenceservice $name --type merge -p "
            '\'{"spec":{"predictor":{"model":{"modelFormat":{"name":"$right"}}}}}\'',
        ),
        _format_case,
        explains=("format-unsupported",),
    ),
    Cause(
        "format-unsupported",
        "No runtime takes this model format",
        90,
        "The service asks for the format $format. The runtimes that it may use take: $known. A runtime is chosen by "
        "itself only where it has autoSelect; name it otherwise.",
        (
            'kubectl -n $ns patch inferenceservice $name --type merge -p \'{"spec":{"predictor":{"model":'
            '{"runtime":"kserve-vllm-gpu","modelFormat":{"name":"kserve-vllm"}}}}}\'',
        ),
        _format_unknown,
    ),
    Cause(
        "protocol-unsupported",
        "The runtime does not speak the asked protocol",
        91,
        "spec.predictor.model.protocolVersion names a protocol that the runtime does not list (unset counts as v1).",
        (
            "kubectl -n $ns patch inferenceservice $name --type merge -p "
            '\'{"spec":{"predictor":{"model":{"protocolVersion":"v2"}}}}\'',
        ),
        said(r"does not support specified protocol version"),
    ),
    Cause(
        "format-collides",
        "Two runtimes claim the same format with the same priority",
        91,
        "KServe refuses a runtime whose format, version, protocol and priority another one has: $format$rest.",
        (
            "# another priority, or no automatic choice: --set runtimes.autoSelect=false",
            "kubectl get clusterservingruntimes -o custom-columns=NAME:.metadata.name,"
            "FORMATS:.spec.supportedModelFormats[*].name,PRIORITY:.spec.supportedModelFormats[*].priority",
        ),
        said(_PRIORITY),
        explains=("service-absent",),
    ),
    Cause(
        "mode-changed",
        "The deployment mode was changed on a service that exists",
        90,
        "The mode can't be changed once it is set: the annotation says $wanted, the service was made as $has. KServe "
        "refuses the change.",
        (
            "kubectl -n $ns get inferenceservice $name -o yaml > $name.yaml && kubectl -n $ns delete inferenceservice "
            "$name && kubectl -n $ns apply -f $name.yaml",
        ),
        either(_mode_changed, said(r"deploymentMode cannot be changed from '(?P<has>\w+)' to '(?P<wanted>\w+)'")),
        explains=("service-absent",),
    ),
    Cause(
        "placeholder-braces",
        "Two opening braces in an argument or variable",
        90,
        "KServe fills Go templates in arguments and environment. A chat template or JSON with two opening braces is "
        "taken for one and fails. Put it into a file: a ConfigMap that is mounted.",
        (
            "kubectl -n $ns create configmap $name-template --from-file=template.jinja",
            "# then with the chart: inferenceServices.$name.chatTemplate.configMap=$name-template",
        ),
        said(r"failed to replace placeholders"),
    ),
    Cause(
        "storage-uri",
        "KServe does not know this storage address",
        91,
        "The model's address begins with nothing that KServe can fetch: $uri. A hub id is written hf://OWNER/NAME.",
        (
            "kubectl -n $ns patch inferenceservice $name --type merge -p "
            '\'{"spec":{"predictor":{"model":{"storageUri":"hf://OWNER/NAME"}}}}\'',
        ),
        said(r"storageUri, must be one of.*StorageUri \[(?P<uri>[^\]]*)\] is not supported"),
        explains=("service-absent",),
    ),
    Cause(
        "autoscaler-class",
        "KServe does not know this autoscaler",
        91,
        "The annotation serving.kserve.io/autoscalerClass is $cls. In Standard mode it is hpa, keda, external or none; "
        "Knative's own autoscaler takes no annotation at all.",
        ("kubectl -n $ns annotate inferenceservice $name serving.kserve.io/autoscalerClass-",),
        said(r"\[(?P<cls>[^\]]*)\] is not a supported autoscaler class type"),
        explains=("service-absent",),
    ),
    Cause(
        "agent-sidecar",
        "KServe takes the service for a multi-model server",
        72,
        "A model predictor without storageUri gets an agent sidecar, which waits for models that never come, unless "
        "its format is huggingface. Here the format is $format.",
        (
            "kubectl -n $ns patch inferenceservice $name --type merge -p "
            '\'{"spec":{"predictor":{"model":{"modelFormat":{"name":"huggingface"}}}}}\'',
        ),
        _agent,
    ),
    Cause(
        "image-rewritten",
        "KServe rewrites the image's name",
        79,
        "serving.kserve.io/server-type makes KServe put -cpu or -gpu behind the image's tag, and no such image exists.",
        ("kubectl -n $ns annotate inferenceservice $name serving.kserve.io/server-type-",),
        _rewritten,
        explains=("image-absent",),
    ),
    Cause(
        "workers-absent",
        "The workers of the multi-node service are not there",
        58,
        "The head waits for its workers, and $worker has none ready. KServe 0.20.0 deletes them at every reconcile "
        "(mended in 0.21).",
        ("kubectl -n $ns describe deployment $worker && kubectl -n $ns get pods -l app=isvc.$worker",),
        _worker_image,
    ),
    Cause(
        "replicas-bounds",
        "minReplicas is above maxReplicas",
        91,
        "The service can't have at least more pods than it may have at most.",
        ('kubectl -n $ns patch inferenceservice $name --type merge -p \'{"spec":{"predictor":{"maxReplicas":4}}}\'',),
        said(r"'MinReplicas' cannot be greater than MaxReplicas"),
        explains=("service-absent",),
    ),
    Cause(
        "gitops-fight",
        "Somebody undoes the changes",
        30,
        "The spec has been changed $generation times in $hours h: two tools (helm, Argo CD, a script, a "
        "person) set different values in turn, and each change starts pods anew.",
        ("kubectl -n $ns get inferenceservice $name -o yaml --show-managed-fields | grep -E 'manager:|time:'",),
        lambda f: _generations(f),
        DEGRADED,
    ),
    Cause(
        "not-ready",
        "The service is not ready, and no row of the table knows why",
        8,
        "Nothing that is known to go wrong was found. A service that was just applied needs a moment; otherwise the "
        "words of its conditions and events stand below.",
        ("kubectl -n $ns describe inferenceservice $name", "kubectl -n $ns get events --sort-by=.lastTimestamp | tail"),
        _not_ready,
        last_resort=True,
    ),
    Cause(
        "refused",
        "The API server refuses the manifest",
        60,
        "The manifest can't be applied as it is; the API server's words stand below.",
        ("# mend the field that is named, then: kubectl -n $ns apply -f FILE",),
        said(r"^Refused (?P<words>.*)", "Manifest"),
        explains=("service-absent",),
        last_resort=True,
    ),
)


def _generations(f: Facts) -> Match | None:
    made = moment(dig(f.isvc, "metadata", "creationTimestamp"))
    generation = dig(f.isvc, "metadata", "generation") or 0
    if made is None or generation < 30:
        return None
    hours = max(1.0, (f.snapshot.now - made).total_seconds() / 3600)
    if generation / hours < 20:
        return None
    return {
        "generation": str(generation),
        "hours": f"{hours:.0f}",
        "evidence": f"generation {generation} after {hours:.1f} h",
    }
