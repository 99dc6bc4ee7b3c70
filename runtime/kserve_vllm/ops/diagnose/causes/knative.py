"""What Knative refuses, gives up on or cuts."""

from __future__ import annotations

import re

from kserve_vllm.ops.diagnose.causes.table import DEGRADED, RISK, Cause, Match, either, said
from kserve_vllm.ops.diagnose.facts import SERVING, Facts, dig, seconds

# Fields of a pod that Knative takes only with a flag of its ConfigMap config-features (Knative Serving 1.21).
_FLAG_OF = {
    "nodeSelector": "podspec-nodeselector",
    "tolerations": "podspec-tolerations",
    "affinity": "podspec-affinity",
    "topologySpreadConstraints": "podspec-topologyspreadconstraints",
    "runtimeClassName": "podspec-runtimeclassname",
    "priorityClassName": "podspec-priorityclassname",
    "schedulerName": "podspec-schedulername",
    "initContainers": "podspec-init-containers",
    "fieldRef": "podspec-fieldref",
    "resourceFieldRef": "podspec-fieldref",
    "persistentVolumeClaim": "podspec-persistent-volume-claim",
    "dnsPolicy": "podspec-dnspolicy",
    "dnsConfig": "podspec-dnsconfig",
    "hostAliases": "podspec-hostaliases",
    "hostNetwork": "podspec-hostnetwork",
    "hostPath": "podspec-volumes-hostpath",
    "shareProcessNamespace": "podspec-shareprocessnamespace",
}
# What no flag allows.
_NEVER = {
    "lifecycle": "hooks (the runtime drains by itself; leave them out)",
    "terminationGracePeriodSeconds": "the grace period (Knative's is timeoutSeconds: spec.predictor.timeout)",
    "livenessProbe.terminationGracePeriodSeconds": "a grace period of a probe",
    "activeDeadlineSeconds": "a deadline of the pod",
    "hostIPC": "the host's IPC",
    "restartPolicy": "a restart policy",
}
_FULL_DUPLEX = "features.knative.dev/http-full-duplex"
_STARVED_MILLICORES = 25


def _knative(f: Facts) -> bool:
    return f.mode == "Knative"


def _routed(f: Facts) -> bool:
    """Knative's route has a revision to go to: before that it has no ingress yet, and no need of one."""
    waiting = r"RevisionMissing .*is waiting for a Revision to become ready"
    return _knative(f) and f.event_about("Route", waiting) is None


def _no_knative(f: Facts) -> Match | None:
    """Knative's kinds are not served, or some of them only: left-overs, or custom resource definitions alone."""
    for kind in ("KnativeService", "Revision"):
        error = f.refused(kind)
        if _knative(f) and not f.ready and error.get("status") == 404:
            return {"evidence": f"{kind}s of serving.knative.dev: {error['message']}"}
    return None


def _refused_field(f: Facts) -> tuple[str, str] | None:
    """(last name of the field, Knative's words)."""
    for each in f.said:
        if "must not set the field" not in each.text and "may not set the field" not in each.text:
            continue
        if match := re.search(r"(?:must|may) not set the field\(s\): ([\w.\[\], -]+)", each.text):
            field = match[1].split(",")[0].strip()
            return re.sub(r"\[\d+\]", "", field).rsplit(".", 1)[-1], f"{each.where}: {each.text}"
    return None


def _flag_off(f: Facts) -> Match | None:
    if not (field := _refused_field(f)) or field[0] not in _FLAG_OF:
        return None
    return {"field": field[0], "flag": f"kubernetes.{_FLAG_OF[field[0]]}", "evidence": field[1]}


def _pvc_flag_off(f: Facts) -> Match | None:
    for each in f.said:
        if match := re.search(r"Persistent volume claim (?P<write>write )?support is (?:off|disabled)", each.text):
            flag = "persistent-volume-write" if match["write"] else "persistent-volume-claim"
            return {
                "field": "persistentVolumeClaim",
                "flag": f"kubernetes.podspec-{flag}",
                "evidence": f"{each.where}: {each.text}",
            }
    return None


def _never(f: Facts) -> Match | None:
    if not (field := _refused_field(f)) or field[0] not in _NEVER:
        return None
    return {"field": field[0], "what": _NEVER[field[0]], "evidence": field[1]}


def _cuts_streams(f: Facts) -> Match | None:
    if not _knative(f):
        return None
    revisions = [r for r in f.all("Revision") if _serves(f, r["metadata"]["name"])]
    for each in revisions:
        if str((dig(each, "metadata", "annotations") or {}).get(_FULL_DUPLEX, "")).lower() != "enabled":
            name = each["metadata"]["name"]
            return {"revision": name, "evidence": f"Revision {name} has no annotation {_FULL_DUPLEX}: Enabled"}
    return None


def _serves(f: Facts, revision: str) -> bool:
    """Whether a revision has or will have traffic."""
    for service in f.all("KnativeService"):
        status = service.get("status") or {}
        if revision in (status.get("latestCreatedRevisionName"), status.get("latestReadyRevisionName")):
            return True
        if any(t.get("revisionName") == revision and t.get("percent") for t in status.get("traffic") or []):
            return True
    return False


def _starved_proxy(f: Facts) -> Match | None:
    if not _knative(f):
        return None
    for pod in f.pods:
        for container in pod["spec"].get("containers") or []:
            if container["name"] != "queue-proxy":
                continue
            asks = _millicores(dig(container, "resources", "requests", "cpu"))
            if asks is not None and asks < _STARVED_MILLICORES:
                return {
                    "cpu": f"{asks:g}m",
                    "least": f"{_STARVED_MILLICORES}m",
                    "evidence": f"Pod {pod['metadata']['name']}: queue-proxy asks for {asks:g}m CPU",
                }
    return None


def _millicores(text: object) -> float | None:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(m?)", str(text or ""))
    return None if not match else float(match[1]) * (1 if match[2] else 1000)


def _canary_not_ready(f: Facts) -> Match | None:
    if not _knative(f) or f.predictor.get("canaryTrafficPercent") is None:
        return None
    status = dig(f.isvc, "status", "components", "predictor") or {}
    created, ready = status.get("latestCreatedRevision"), status.get("latestReadyRevision")
    if created and created != ready:
        return {
            "created": created,
            "ready": str(ready),
            "percent": str(f.predictor["canaryTrafficPercent"]),
            "evidence": f"latestCreatedRevision {created}, latestReadyRevision {ready}",
        }
    return None


def _third_revision(f: Facts) -> Match | None:
    """In mid-canary the revision that was rolled out and the newest are not the only ones since."""
    percent = f.predictor.get("canaryTrafficPercent")
    if not _knative(f) or percent in (None, 0, 100):
        return None
    status = dig(f.isvc, "status", "components", "predictor") or {}
    stable, newest = status.get("latestRolledoutRevision"), status.get("latestCreatedRevision")
    numbers = [int(m[1]) if (m := re.search(r"-(\d{5})$", str(name))) else None for name in (stable, newest)]
    if None in numbers or numbers[1] - numbers[0] < 2:  # type: ignore[operator]
        return None
    return {
        "newest": str(newest),
        "stable": str(stable),
        "between": str(numbers[1] - numbers[0] - 1),  # type: ignore[operator]
        "evidence": f"latestRolledoutRevision {stable}, latestCreatedRevision {newest}",
    }


def _keda_ignored(f: Facts) -> Match | None:
    if _knative(f) and f.predictor.get("autoScaling"):
        return {"evidence": "spec.predictor.autoScaling is set, the deployment mode is Knative"}
    return None


def _class_ignored(f: Facts) -> Match | None:
    cls = f.annotation("serving.kserve.io/autoscalerClass")
    if _knative(f) and cls in ("keda", "hpa", "external"):
        return {"cls": cls, "evidence": f"serving.kserve.io/autoscalerClass: {cls}, the deployment mode is Knative"}
    return None


def _slower_than_deadline(f: Facts) -> Match | None:
    """The deadline is shorter than the startup probe, so that it will end a model that loads in time."""
    if not _knative(f):
        return None
    deadline = seconds(f.annotation("serving.knative.dev/progress-deadline")) or seconds(
        f.config("config-deployment").get("progress-deadline") or "600s"
    )
    for pod in f.pods:
        for container in pod["spec"].get("containers") or []:
            probe = container.get("startupProbe")
            if container["name"] in SERVING and probe and deadline:
                budget = (probe.get("periodSeconds") or 10) * (probe.get("failureThreshold") or 3)
                if budget > deadline:
                    return {
                        "deadline": f"{deadline:g}",
                        "budget": f"{budget:g}",
                        "evidence": f"progress-deadline {deadline:g} s, startup probe {budget:g} s",
                    }
    return None


_PATCH = "kubectl -n $ns patch inferenceservice $name --type merge -p "
CAUSES = (
    Cause(
        "knative-absent",
        "Knative is not installed",
        92,
        "The service's mode is Knative, and the cluster has no Knative Serving. The mode of a "
        "service can't be changed: "
        "make it anew as Standard, or install Knative and restart KServe's controller, which looks once, at its start.",
        (
            "kubectl -n $ns delete inferenceservice $name   # then apply it with the annotation "
            "serving.kserve.io/deploymentMode: Standard",
        ),
        either(
            said(r"ServerlessModeRejected"),
            said(r"Knative Serving is not available"),
            _no_knative,
        ),
    ),
    Cause(
        "knative-flag-off",
        "A feature flag of Knative is off",
        91,
        "Knative refuses $field in a pod unless $flag is enabled in its ConfigMap config-features; most are off by "
        "default.",
        (
            "kubectl -n knative-serving patch configmap config-features --type merge -p "
            '\'{"data":{"$flag":"enabled"}}\'',
        ),
        either(_flag_off, _pvc_flag_off),
    ),
    Cause(
        "knative-field-refused",
        "Knative refuses this field whatever the flags",
        91,
        "Knative never takes $field: $what.",
        ("kubectl -n $ns edit inferenceservice $name   # take $field out", "# or Standard mode"),
        _never,
    ),
    Cause(
        "knative-two-ports",
        "Knative takes one port",
        91,
        "A Knative service has one container port, and the pod names more. REST and gRPC share one: "
        "8080, with the name h2c.",
        ("kubectl -n $ns edit inferenceservice $name   # ports: containerPort 8080 with the name h2c, and no other",),
        said(r"more than one container port is set"),
    ),
    Cause(
        "knative-mount-writable",
        "Knative wants these mounts read-only",
        91,
        "ConfigMaps and Secrets must be mounted with readOnly: true in Knative.",
        ("kubectl -n $ns edit inferenceservice $name   # volumeMounts: readOnly: true",),
        said(r"volume mount should be readOnly for this type of volume|must be read-?only"),
    ),
    Cause(
        "knative-timeout",
        "The timeout is above Knative's maximum",
        91,
        "spec.predictor.timeout is $asked s, and the cluster allows $most s (config-defaults, "
        "max-revision-timeout-seconds).",
        (
            _PATCH + '\'{"spec":{"predictor":{"timeout":$most}}}\'',
            "# or raise it: kubectl -n knative-serving patch configmap config-defaults --type merge -p "
            '\'{"data":{"max-revision-timeout-seconds":"$asked"}}\'',
        ),
        said(r"expected 0 <= (?P<asked>\d+) <= (?P<most>\d+): .*[tT]imeoutSeconds"),
    ),
    Cause(
        "knative-privileged",
        "Knative refuses the security context",
        91,
        "Knative takes only part of a security context: $what is not allowed"
        " (the flag kubernetes.podspec-securitycontext allows some).",
        ("kubectl -n $ns edit inferenceservice $name   # securityContext",),
        said(r"not set the field\(s\): \S*?(?P<what>securityContext\.\w+)"),
    ),
    Cause(
        "image-digest",
        "Knative can't resolve the image to a digest",
        86,
        "Knative asks the registry for the image's digest before it starts a pod, and the registry did not answer as "
        "hoped.",
        (
            "# credentials: the service account's imagePullSecrets. A registry that only nodes reach:",
            "kubectl -n knative-serving patch configmap config-deployment --type merge -p "
            '\'{"data":{"registries-skipping-tag-resolving":"kind.local,ko.local,dev.local,HOST"}}\'',
        ),
        said(r"failed to resolve image to digest|Unable to fetch image"),
    ),
    Cause(
        "initial-scale-zero",
        "Knative refuses to start with no pod",
        91,
        "initial-scale 0 is allowed only where config-autoscaler has allow-zero-initial-scale.",
        (
            "kubectl -n knative-serving patch configmap config-autoscaler --type merge -p "
            '\'{"data":{"allow-zero-initial-scale":"true"}}\'',
        ),
        said(r"initial-scale.*(?:must be greater than 0|invalid value)|invalid value: 0: .*initial-scale"),
    ),
    Cause(
        "progress-deadline",
        "Knative gave up before the model was loaded",
        62,
        "The revision was not ready within its progress deadline (600 s unless the annotation says otherwise), so its "
        "pods were removed. Where nothing else is wrong, the model needs longer.",
        (
            _PATCH + '\'{"spec":{"predictor":{"annotations":{"serving.knative.dev/progress-deadline":"3600s"}}}}\'',
            "# with the chart: inferenceServices.$name.progressDeadlineSeconds=3600",
        ),
        said(
            r"ProgressDeadlineExceeded|failed to become ready within|Initial scale was never achieved|"
            r"has timed out progressing",
            when=_knative,
        ),
    ),
    Cause(
        "ingress-none",
        "Knative has no ingress that works",
        76,
        "The revision is there, but no ingress (Kourier, Istio, Contour) has taken its route, so nothing reaches it.",
        (
            "kubectl -n knative-serving get configmap config-network -o jsonpath='{.data.ingress-class}' && "
            "kubectl get pods --all-namespaces | grep -E 'net-|kourier|istio'",
        ),
        said(
            r"IngressNotConfigured|Uninitialized Waiting for load balancer|LoadBalancerNotReady|"
            r"Ingress has not yet been reconciled|IngressNotReady",
            when=_routed,
        ),
    ),
    Cause(
        "revision-image-or-config",
        "Knative's revision is missing",
        50,
        "The Knative service waits for a revision that is not there.",
        ("kubectl -n $ns describe ksvc $name-predictor",),
        said(r"RevisionMissing", when=_knative),
        last_resort=True,
    ),
    Cause(
        "canary-not-ready",
        "The canary's revision is not ready",
        48,
        "$created is to get $percent % and is not ready, so all traffic stays at $ready. It was made by the last "
        "change; what ails it is told by its pods.",
        (
            "kubectl -n $ns get revision $created -o jsonpath='{.status.conditions}'",
            _PATCH + '\'{"spec":{"predictor":{"canaryTrafficPercent":0}}}\'   # roll back',
        ),
        _canary_not_ready,
    ),
    Cause(
        "canary-third-revision",
        "Something changed in mid-canary",
        35,
        "Between the stable revision $stable and the newest, $newest, lies another one: a change of the runtime, or "
        "of any field, in mid-canary makes a third revision, and the split is now between other versions than the "
        "canary began with.",
        (_PATCH + '\'{"spec":{"predictor":{"canaryTrafficPercent":0}}}\'   # back to $stable, then begin again',),
        _third_revision,
        DEGRADED,
    ),
    Cause(
        "queue-proxy-starved",
        "Knative's sidecar has next to no CPU",
        28,
        "queue-proxy asks for $cpu CPU. On a busy node it then misses its own probe, and the activator cuts streams in "
        "flight.",
        (
            "kubectl -n knative-serving patch configmap config-deployment --type merge -p "
            '\'{"data":{"queue-sidecar-cpu-request":"50m"}}\'',
        ),
        _starved_proxy,
        RISK,
    ),
    Cause(
        "streams-cut",
        "Knative cuts some streams",
        26,
        "Without full duplex, queue-proxy closes the connection's request side early: 7 of 1,000 streams were cut in "
        "the middle in our measurement, none with the annotation $full_duplex on the revision's template.",
        (
            _PATCH + '\'{"spec":{"predictor":{"annotations":'
            '{"features.knative.dev/http-full-duplex":"Enabled"}}}}\'   # makes one new revision',
        ),
        lambda f: None if (m := _cuts_streams(f)) is None else {**m, "full_duplex": f"{_FULL_DUPLEX}: Enabled"},
        RISK,
    ),
    Cause(
        "deadline-below-probe",
        "Knative's deadline is shorter than the startup probe",
        24,
        "Knative gives up after $deadline s, while the startup probe allows $budget s: a model that takes longer than "
        "the deadline is killed though it loads.",
        (_PATCH + '\'{"spec":{"predictor":{"annotations":{"serving.knative.dev/progress-deadline":"${budget}s"}}}}\'',),
        _slower_than_deadline,
        RISK,
    ),
    Cause(
        "autoscaling-ignored",
        "autoScaling does nothing in Knative",
        22,
        "spec.predictor.autoScaling (KEDA's metrics) is read in Standard mode only; here Knative's scaleMetric and "
        "scaleTarget count.",
        (_PATCH + '\'{"spec":{"predictor":{"autoScaling":null,"scaleMetric":"concurrency","scaleTarget":64}}}\'',),
        _keda_ignored,
        RISK,
    ),
    Cause(
        "autoscaler-ignored",
        "The autoscaler's class does nothing in Knative",
        21,
        "serving.kserve.io/autoscalerClass is $cls, which steers Standard mode only: Knative's own autoscaler is at "
        "work.",
        ("kubectl -n $ns annotate inferenceservice $name serving.kserve.io/autoscalerClass-",),
        _class_ignored,
        RISK,
    ),
)
