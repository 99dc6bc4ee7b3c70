"""What keeps one from seeing the service at all, or the service from being there."""

from __future__ import annotations

import difflib

from kserve_vllm.ops.diagnose.causes.table import DEGRADED, Cause, Match, said
from kserve_vllm.ops.diagnose.facts import Facts, dig
from kserve_vllm.ops.diagnose.snapshot import moment

# KServe derives names of up to 63 characters from the service's (platform of KServe 0.20 and 0.21).
LONGEST, LONGEST_WITH_TAGS, LONGEST_MULTI_NODE, LONGEST_LABEL = 48, 46, 41, 63


def _unreachable(f: Facts) -> Match | None:
    error = f.refused("InferenceService")
    if f.about_a_server or not error or error["status"] != 0:
        return None
    return {"evidence": error["message"]}


def _signed_out(f: Facts) -> Match | None:
    error = f.refused("InferenceService")
    return {"evidence": error["message"]} if error.get("status") == 401 else None


def _no_right(f: Facts) -> Match | None:
    error = f.refused("InferenceService")
    return {"evidence": error["message"]} if error.get("status") == 403 else None


def _no_kserve(f: Facts) -> Match | None:
    error = f.refused("InferenceService")
    # A path of an API group that is not served is answered so; a missing object has a message that names it.
    if error.get("status") == 404 and "not find the requested resource" in error["message"]:
        return {"evidence": error["message"]}
    if error.get("status") == 404 and error["message"].startswith("404 page not found"):
        return {"evidence": error["message"]}
    return None


def _too_long(f: Facts) -> Match | None:
    if f.about_a_server or not f.name:
        return None
    limit, why = LONGEST, "KServe derives longer names from it"
    if f.annotation("serving.kserve.io/enable-tag-routing") == "true":
        limit, why = LONGEST_WITH_TAGS, "with tag routing KServe derives still longer names from it"
    if f.predictor.get("workerSpec") is not None:
        limit, why = LONGEST_MULTI_NODE, "with workers KServe derives still longer names from it"
    label = f"{f.name}-{f.namespace}"
    if len(f.name) > limit:
        return {
            "limit": str(limit),
            "because": why,
            "length": str(len(f.name)),
            "what": "name",
            "evidence": f"{f.name}: {len(f.name)} characters",
        }
    if len(label) > LONGEST_LABEL and not f.ready:
        return {
            "limit": str(LONGEST_LABEL),
            "because": "it is one label of the host name, NAME-NAMESPACE",
            "length": str(len(label)),
            "what": "name with its namespace",
            "evidence": f"{label}: {len(label)} characters",
        }
    return None


def _absent(f: Facts) -> Match | None:
    error = f.refused("InferenceService")
    if f.about_a_server or f.isvc or error.get("status") != 404 or _no_kserve(f) or f.snapshot.submitted:
        return None
    there = [o["metadata"]["name"] for o in f.all("InferenceService")]
    near = difflib.get_close_matches(f.name, there, 1, 0.6)
    hint = (
        f"Did you mean {near[0]}?"
        if near
        else (f"There are: {', '.join(sorted(there)[:8])}." if there else "There is none in this namespace.")
    )
    return {"hint": hint, "near": near[0] if near else f.name, "evidence": error["message"]}


def _webhook_of_kserve(f: Facts) -> bool:
    return not any("certificate" in each.text for each in f.said if "failed calling webhook" in each.text)


def _controller_down(f: Facts) -> Match | None:
    for each in f.all("Controller"):
        if "kserve" not in each["metadata"]["name"]:
            continue
        wanted = dig(each, "spec", "replicas")
        if wanted == 0 or not dig(each, "status", "readyReplicas"):
            name, ns = each["metadata"]["name"], each["metadata"].get("namespace", "kserve")
            return {"controller": name, "kns": ns, "evidence": f"Deployment {ns}/{name}: 0 of {wanted} ready"}
    return None


def _not_seen(f: Facts) -> Match | None:
    if not f.isvc or (f.snapshot.objects.get("Controller") and _controller_down(f)):
        return None
    generation = dig(f.isvc, "metadata", "generation")
    observed = dig(f.isvc, "status", "observedGeneration")
    # A status appears within seconds; a minute without any means that nobody looks.
    made = moment(dig(f.isvc, "metadata", "creationTimestamp"))
    old = made is None or (f.snapshot.now - made).total_seconds() > 60
    if old and not dig(f.isvc, "status", "conditions") and not f.all("Event"):
        return {"evidence": "the InferenceService has neither status nor events"}
    if isinstance(observed, int) and isinstance(generation, int) and observed < generation - 1 and not f.all("Event"):
        return {"evidence": f"observedGeneration is {observed}, generation is {generation}"}
    return None


def _half_blind(f: Facts) -> Match | None:
    lost = sorted(what for what, error in f.snapshot.refused.items() if error.get("status") == 403)
    if not lost or "InferenceService" in lost:
        return None
    # A cluster's nodes and its settings are often not for everyone, and rarely decide.
    matter = [w for w in lost if w in ("Pod", "Event", "Deployment", "Revision", "KnativeService", "pods/log")]
    if not matter or f.ready:
        return None
    return {"lost": ", ".join(lost), "verbs": ", ".join(matter), "evidence": f.snapshot.refused[matter[0]]["message"]}


CAUSES = (
    Cause(
        "cluster-unreachable",
        "The cluster does not answer",
        100,
        "Nothing could be read: the API server of the current context is not reached. The service may be well.",
        ("kubectl config current-context && kubectl cluster-info",),
        _unreachable,
    ),
    Cause(
        "signed-out",
        "The cluster does not know you",
        100,
        "The API server refuses the credentials of the current context: a token has ended, or belongs elsewhere.",
        ("kubectl config current-context && kubectl auth whoami",),
        _signed_out,
    ),
    Cause(
        "rights-missing",
        "You may not read the service",
        100,
        "The API server refuses to show InferenceServices of namespace $ns to you, so nothing can be said about $name.",
        (
            "# someone who may: kubectl -n $ns create rolebinding diagnose --clusterrole=view --user=YOU",
            "kubectl -n $ns auth can-i get inferenceservices.serving.kserve.io",
        ),
        _no_right,
    ),
    Cause(
        "kserve-not-installed",
        "KServe is not installed in this cluster",
        99,
        "The API server knows no InferenceServices: KServe's custom resource definitions are not there.",
        (
            "# https://kserve.github.io/website/ : install KServe 0.21 or later, then this chart:",
            "kubectl get crd inferenceservices.serving.kserve.io",
        ),
        _no_kserve,
    ),
    Cause(
        "name-too-long",
        "The service's name is too long",
        97,
        "The $what has $length characters and may have $limit: $because. KServe refuses it, or never gets it ready.",
        (
            "# choose a shorter name; a service can't be renamed, so delete it and apply it again",
            "kubectl -n $ns delete inferenceservice $name",
        ),
        _too_long,
    ),
    Cause(
        "service-absent",
        "There is no such InferenceService",
        96,
        "Namespace $ns has no InferenceService named $name. $hint If you applied one, the API server refused it: "
        "apply it again and read the answer, or let diagnose try it with --file.",
        (
            "kubectl get inferenceservices --all-namespaces | grep -w $near",
            "kserve-vllm diagnose $name -n $ns --file inferenceservice.yaml",
        ),
        _absent,
    ),
    Cause(
        "webhook-down",
        "KServe's webhook does not answer",
        95,
        "The API server has to ask a webhook before it takes the object, and nothing answers there: its controller is "
        "down, still starting, or a network policy stands between.",
        (
            "kubectl -n kserve get pods,endpoints && kubectl -n kserve rollout restart deployment "
            "kserve-controller-manager",
        ),
        said(
            r"failed calling webhook \"(?P<hook>[^\"]+)\".*(connection refused|no endpoints available|deadline "
            r"exceeded|i/o timeout|no route to host|EOF)",
            when=_webhook_of_kserve,
        ),
        explains=("service-absent",),
    ),
    Cause(
        "webhook-certificate",
        "The certificate of a webhook is not trusted",
        95,
        "The API server asks the webhook $hook and does not trust its certificate: cert-manager has not (re)issued it, "
        "or the CA bundle in the webhook's configuration is an old one.",
        ("kubectl -n kserve get certificate,secret && kubectl -n kserve delete secret kserve-webhook-server-cert",),
        said(r"failed calling webhook \"(?P<hook>[^\"]+)\".*x509: "),
    ),
    Cause(
        "controller-down",
        "KServe's controller is not running",
        93,
        "$controller has no ready pod, so nothing turns the InferenceService into pods, and "
        "changes stay without effect.",
        ("kubectl -n $kns get pods && kubectl -n $kns logs deployment/$controller --tail=50",),
        _controller_down,
    ),
    Cause(
        "controller-blind",
        "Nobody looks after the InferenceService",
        90,
        "The object is there, but no controller has said anything about it: KServe's controller is not running, or is "
        "set to watch other namespaces.",
        ("kubectl get pods --all-namespaces -l control-plane=kserve-controller-manager",),
        _not_seen,
    ),
    Cause(
        "rights-half",
        "Some of it may not be read by you",
        9,
        "The service is not ready, and these could not be read: $lost. The cause may lie there.",
        ("# someone who may: kubectl -n $ns create rolebinding diagnose --clusterrole=view --user=YOU",),
        _half_blind,
        DEGRADED,
    ),
)
