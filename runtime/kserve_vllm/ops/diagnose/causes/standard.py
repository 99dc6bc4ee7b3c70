"""What goes wrong in Standard mode: Deployments, autoscalers, routes, canaries, budgets."""

from __future__ import annotations

from kserve_vllm.ops.cluster import Json
from kserve_vllm.ops.diagnose.causes.table import DEGRADED, RISK, Cause, Match, said
from kserve_vllm.ops.diagnose.facts import SERVING, Facts, condition, dig, seconds

# The route that KServe writes where the service names no timeout (KServe 0.20 and 0.21, Gateway API).
_ROUTE_DEFAULT_S = 60.0


def _standard(f: Facts) -> bool:
    return f.mode == "Standard"


def _percent_ignored(f: Facts) -> Match | None:
    percent = f.predictor.get("canaryTrafficPercent")
    if not _standard(f) or percent is None:
        return None
    return {"percent": str(percent), "evidence": f"spec.predictor.canaryTrafficPercent: {percent}, mode Standard"}


def _backends(f: Facts) -> list[Json]:
    return [
        backend
        for route in f.all("HTTPRoute")
        for rule in dig(route, "spec", "rules") or []
        for backend in rule.get("backendRefs") or []
    ]


def _gateway_api(f: Facts) -> bool | None:
    """Whether KServe writes HTTPRoutes; None where its settings could not be read."""
    ingress = f.setting("inferenceservice-config", "ingress")
    return bool(ingress.get("enableGatewayApi")) if ingress else None


def _canaries(f: Facts) -> list[Json]:
    return [c for c in dig(f.isvc, "spec", "canary") or [] if (c.get("trafficPercent") or 0) > 0]


def _no_gateway_api(f: Facts) -> Match | None:
    if not _standard(f) or not _canaries(f) or _gateway_api(f) is not False:
        return None
    return {"evidence": "inferenceservice-config: ingress.enableGatewayApi is not true"}


def _no_split(f: Facts) -> Match | None:
    if not _standard(f) or not _canaries(f) or not f.all("HTTPRoute") or _gateway_api(f) is False:
        return None
    names = {str(b.get("name")) for b in _backends(f)}
    for canary in _canaries(f):
        variant = str(dig(canary, "predictor", "name"))
        if not any(variant in name for name in names):
            return {
                "variant": variant,
                "percent": str(canary.get("trafficPercent")),
                "evidence": f"the HTTPRoutes of {f.name} have only: {', '.join(sorted(names))}",
            }
    return None


def _canary_down(f: Facts) -> Match | None:
    for canary in dig(f.isvc, "spec", "canary") or []:
        variant = str(dig(canary, "predictor", "name"))
        for each in f.all("Deployment"):
            name = each["metadata"]["name"]
            if name == f"{f.name}-{variant}-predictor" and not dig(each, "status", "readyReplicas"):
                return {
                    "deployment": name,
                    "percent": str(canary.get("trafficPercent") or 0),
                    "evidence": f"Deployment {name}: none of {dig(each, 'spec', 'replicas')} ready",
                }
    return None


def _foreign_hpa(f: Facts) -> Match | None:
    if not _standard(f):
        return None
    for each in f.all("HorizontalPodAutoscaler"):
        name = each["metadata"]["name"]
        owners = [o.get("kind") for o in each["metadata"].get("ownerReferences") or []]
        if name == f"{f.name}-predictor" and "InferenceService" not in owners:
            return {"hpa": name, "evidence": f"HorizontalPodAutoscaler {name} is owned by {owners or 'nobody'}"}
    return None


def _two_scalers(f: Facts) -> Match | None:
    aims: dict[str, list[str]] = {}
    for each in f.all("HorizontalPodAutoscaler"):
        target = str(dig(each, "spec", "scaleTargetRef", "name"))
        aims.setdefault(target, []).append(each["metadata"]["name"])
    for target, names in aims.items():
        if len(names) > 1:
            return {
                "target": target,
                "names": " and ".join(sorted(names)),
                "extra": sorted(names)[-1],
                "evidence": f"Deployment {target} is the target of {', '.join(sorted(names))}",
            }
    return None


def _no_keda(f: Facts) -> Match | None:
    if not _standard(f) or f.annotation("serving.kserve.io/autoscalerClass") != "keda":
        return None
    error = f.refused("ScaledObject")
    return {"evidence": error["message"]} if error.get("status") == 404 else None


def _at_maximum(f: Facts) -> Match | None:
    waiting = f.metric("vllm:num_requests_waiting") or 0
    for each in f.all("HorizontalPodAutoscaler"):
        most, now = dig(each, "spec", "maxReplicas"), dig(each, "status", "currentReplicas")
        limited = condition(each, "ScalingLimited")
        if limited.get("status") == "True" and limited.get("reason") == "TooManyReplicas" and now == most and waiting:
            return {
                "most": str(most),
                "waiting": f"{waiting:g}",
                "evidence": f"HorizontalPodAutoscaler {each['metadata']['name']}: {limited.get('message')}",
            }
    for each in f.all("PodAutoscaler"):
        most = (dig(each, "metadata", "annotations") or {}).get("autoscaling.knative.dev/max-scale")
        now = dig(each, "status", "actualScale")
        wanted = dig(each, "status", "desiredScale")
        if most and str(most) not in ("0", "") and str(now) == str(wanted) == str(most) and waiting:
            return {
                "most": str(most),
                "waiting": f"{waiting:g}",
                "evidence": f"PodAutoscaler {each['metadata']['name']}: {now} of {most} pods",
            }
    return None


def _route_timeout(f: Facts) -> Match | None:
    if not _standard(f):
        return None
    wants = float(f.predictor.get("timeout") or _ROUTE_DEFAULT_S)
    for route in f.all("HTTPRoute"):
        for rule in dig(route, "spec", "rules") or []:
            has = seconds(dig(rule, "timeouts", "request"))
            if has and (has < wants or (not f.predictor.get("timeout") and has <= _ROUTE_DEFAULT_S)):
                name = route["metadata"]["name"]
                return {
                    "route": name,
                    "has": f"{has:g}",
                    "wants": f"{wants:g}",
                    "evidence": f"HTTPRoute {name}: timeouts.request is {has:g}s",
                }
    return None


def _route_refused(f: Facts) -> Match | None:
    for route in f.all("HTTPRoute"):
        for parent in dig(route, "status", "parents") or []:
            for each in parent.get("conditions") or []:
                if each["type"] in ("Accepted", "ResolvedRefs") and each["status"] == "False":
                    name = route["metadata"]["name"]
                    return {
                        "route": name,
                        "reason": str(each.get("reason")),
                        "gateway": str(dig(parent, "parentRef", "name")),
                        "evidence": f"HTTPRoute {name}: {each['type']} is False, "
                        f"{each.get('reason')} {each.get('message')}",
                    }
        if not (dig(route, "status", "parents") or []) and not f.ready:
            name = route["metadata"]["name"]
            parents = dig(route, "spec", "parentRefs") or [{}]
            return {
                "route": name,
                "reason": "no gateway has answered",
                "gateway": str(parents[0].get("name")),
                "evidence": f"HTTPRoute {name} has no status: no gateway controller has taken it",
            }
    return None


def _grace_short(f: Facts) -> Match | None:
    if not _standard(f):
        return None
    drain = (_number(f.flag("drain-timeout")) or 30.0) + (_number(f.flag("drain-delay")) or 0.0)
    for pod in f.pods:
        grace = float(pod["spec"].get("terminationGracePeriodSeconds") or 30)
        if any(c["name"] in SERVING for c in pod["spec"].get("containers") or []) and grace < drain:
            return {
                "grace": f"{grace:g}",
                "drain": f"{drain:g}",
                "need": f"{drain + 30:g}",
                "evidence": f"Pod {pod['metadata']['name']}: terminationGracePeriodSeconds {grace:g}, "
                f"drain {drain:g} s",
            }
    return None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _budget_blocks(f: Facts) -> Match | None:
    for each in f.all("PodDisruptionBudget"):
        if dig(each, "status", "disruptionsAllowed") != 0 or not dig(each, "status", "expectedPods"):
            continue
        healthy, wanted = dig(each, "status", "currentHealthy"), dig(each, "status", "desiredHealthy")
        expected = dig(each, "status", "expectedPods")
        # Where pods are down, the budget does what it is for.
        if healthy == expected and wanted == expected:
            name = each["metadata"]["name"]
            return {
                "budget": name,
                "evidence": f"PodDisruptionBudget {name}: {healthy} of {expected} pods are healthy, {wanted} must be",
            }
    return None


_PATCH = "kubectl -n $ns patch inferenceservice $name --type merge -p "
CAUSES = (
    Cause(
        "canary-percent-ignored",
        "canaryTrafficPercent does nothing in Standard mode",
        44,
        "canaryTrafficPercent: $percent is Knative's. In Standard mode it is ignored without a word, and the change "
        "went to all pods. From KServe 0.21 spec.canary[] splits the traffic there.",
        (
            "# inferenceservices/canary/standard shows the steps; or let it be done:",
            "kserve-vllm rollout $name -n $ns --model MODEL --steps 1,10,50,100",
        ),
        _percent_ignored,
        DEGRADED,
    ),
    Cause(
        "canary-no-gateway-api",
        "The canary gets no traffic: the Gateway API is off",
        46,
        "spec.canary[] splits traffic by an HTTPRoute, which KServe writes only with enableGatewayApi in its settings.",
        (
            "kubectl -n kserve get configmap inferenceservice-config -o jsonpath='{.data.ingress}'",
            "# set enableGatewayApi: true, kserveIngressGateway, then: kubectl -n kserve rollout restart deployment "
            "kserve-controller-manager",
        ),
        _no_gateway_api,
        DEGRADED,
    ),
    Cause(
        "canary-no-split",
        "The canary gets no traffic: this KServe splits none",
        45,
        "The canary $variant is to get $percent % and is in no HTTPRoute. KServe 0.20 makes a canary's Deployment and "
        "leaves the route alone; the weights came with 0.21.",
        (
            "kubectl -n $ns get httproute $name-predictor -o jsonpath='{.spec.rules[*].backendRefs}'",
            "# upgrade KServe to 0.21",
        ),
        _no_split,
        DEGRADED,
    ),
    Cause(
        "canary-down",
        "The canary has no ready pod",
        49,
        "$deployment has no ready pod and gets $percent % of the traffic, which fails meanwhile; what ails it is told "
        "by its pods.",
        (
            "kubectl -n $ns describe deployment $deployment",
            _PATCH + '\'{"spec":{"canary":null}}\'   # back to the stable one',
        ),
        _canary_down,
    ),
    Cause(
        "hpa-name-taken",
        "An HPA has the name that KServe uses",
        43,
        "$hpa was made by someone else and has the name of KServe's own: KServe deletes it within seconds, or the two "
        "fight.",
        (
            "kubectl -n $ns get hpa $hpa -o yaml > hpa.yaml && kubectl -n $ns delete hpa $hpa   # and "
            "give it another name",
            "kubectl -n $ns annotate inferenceservice $name serving.kserve.io/autoscalerClass=external --overwrite",
        ),
        _foreign_hpa,
        DEGRADED,
    ),
    Cause(
        "two-scalers",
        "Two autoscalers steer the same pods",
        44,
        "$names both scale $target: each undoes what the other does, or both stand still.",
        ("kubectl -n $ns delete hpa $extra   # or the other; with KEDA, delete the ScaledObject that made it",),
        _two_scalers,
        DEGRADED,
    ),
    Cause(
        "hpa-no-metrics",
        "The autoscaler gets no metrics",
        42,
        "The HPA can't read what it scales by: no metrics server, no adapter, or a query that finds nothing.",
        ("kubectl -n $ns describe hpa | grep -A20 Conditions", "kubectl get apiservices | grep metrics"),
        said(r"FailedGet(?:Resource|Pods|External|Object)Metric", "HorizontalPodAutoscaler"),
        DEGRADED,
    ),
    Cause(
        "keda-absent",
        "KEDA is not installed",
        47,
        "autoscalerClass is keda, and the cluster has no KEDA: the number of pods stays as it is. Restart KServe's "
        "controller after installing it, since it looks once, at its start.",
        (
            "helm install keda kedacore/keda -n keda --create-namespace",
            "kubectl -n kserve rollout restart deployment kserve-controller-manager",
        ),
        _no_keda,
        DEGRADED,
    ),
    Cause(
        "keda-prometheus",
        "KEDA gets no answer from Prometheus",
        43,
        "The ScaledObject can't ask Prometheus: its address is wrong, or it wants credentials.",
        (
            "kubectl -n $ns get scaledobject $name-predictor -o jsonpath='{.spec.triggers[*].metadata}'",
            "# with the chart: cluster.prometheusAddress, autoscaling.kedaAuthentication",
        ),
        said(
            r"KEDAScalerFailed|error requesting metrics.*prometheus|ScaledObjectCheckFailed|"
            r"TriggerError",
            "ScaledObject",
        ),
        DEGRADED,
    ),
    Cause(
        "scaler-at-maximum",
        "The autoscaler is at its maximum",
        38,
        "All $most allowed pods run and $waiting requests wait.",
        (
            _PATCH + '\'{"spec":{"predictor":{"maxReplicas":N}}}\'',
            "# with the chart: inferenceServices.$name.autoscaling.maxReplicas",
        ),
        _at_maximum,
        DEGRADED,
    ),
    Cause(
        "route-refused",
        "The gateway does not take the route",
        78,
        "The HTTPRoute $route is not accepted by the gateway $gateway: $reason.",
        (
            "kubectl get gateways --all-namespaces && kubectl -n $ns describe httproute $route",
            "# KServe's settings: inferenceservice-config, ingress.kserveIngressGateway",
        ),
        _route_refused,
    ),
    Cause(
        "route-timeout",
        "The route cuts answers that take long",
        27,
        "The HTTPRoute $route ends a request after $has s; the service wants $wants s, and a long answer is cut in the "
        "middle.",
        (_PATCH + '\'{"spec":{"predictor":{"timeout":3600}}}\'',),
        _route_timeout,
        RISK,
    ),
    Cause(
        "grace-short",
        "Pods are killed before they have drained",
        25,
        "A pod gets $grace s to end and drains for up to $drain s: answers in flight are cut off at a rollout.",
        (_PATCH + '\'{"spec":{"predictor":{"terminationGracePeriodSeconds":$need}}}\'',),
        _grace_short,
        RISK,
    ),
    Cause(
        "budget-blocks",
        "The disruption budget lets no pod go",
        20,
        "$budget allows no disruption though every pod is healthy: draining a node waits for ever.",
        ('kubectl -n $ns patch pdb $budget --type merge -p \'{"spec":{"minAvailable":null,"maxUnavailable":1}}\'',),
        _budget_blocks,
        RISK,
    ),
)
