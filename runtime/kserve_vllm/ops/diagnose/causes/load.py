"""What goes wrong while it serves, by metrics and health; and a server that is asked at its URL."""

from __future__ import annotations

import re
from collections.abc import Callable

from kserve_vllm.ops.diagnose.causes.table import DEGRADED, Cause, Match
from kserve_vllm.ops.diagnose.facts import Facts

# Shares of requests that are worth a word, and the fewest requests to speak of a share at all.
_SHARE, _FEWEST = 0.01, 100.0


def _rejected(*reasons: str) -> Callable[[Facts], Match | None]:
    """More than a hundredth of all requests were turned away for one of these reasons."""

    def find(f: Facts) -> Match | None:
        by = f.labelled("kserve_vllm_rejections_total", "reason")
        all_of_them = f.metric("kserve_vllm_requests_total") or 0.0
        for reason in reasons:
            count = by.get(reason, 0.0)
            if count and all_of_them >= _FEWEST and count / all_of_them > _SHARE:
                return {
                    "count": f"{count:g}",
                    "share": f"{100 * count / all_of_them:.1f}",
                    "reason": reason,
                    "evidence": f"kserve_vllm_rejections_total{{reason={reason!r}}} is {count:g} of "
                    f"{all_of_them:g} requests",
                }
        return None

    return find


def _kv_full(f: Facts) -> Match | None:
    used = f.highest("vllm:kv_cache_usage_perc")
    if used is None or used < 0.95:
        return None
    return {"used": f"{100 * used:.0f}", "evidence": f"vllm:kv_cache_usage_perc is {used:.3f}"}


def _preempted(f: Facts) -> Match | None:
    count, done = f.metric("vllm:num_preemptions_total"), f.metric("vllm:request_success_total")
    if not count or not done or done < _FEWEST or count / done < 0.1:
        return None
    return {
        "count": f"{count:g}",
        "done": f"{done:g}",
        "evidence": f"vllm:num_preemptions_total is {count:g}, {done:g} requests were finished",
    }


def _adapters(f: Facts) -> Match | None:
    failed = f.metric("kserve_vllm_adapters", state="failed") or 0
    counts = {k: v for k, v in f.labelled("kserve_vllm_adapter_failures_total", "adapter").items() if v}
    if not failed:
        return None
    return {
        "failed": f"{failed:g}",
        "names": ", ".join(sorted(counts)) or "see the log",
        "evidence": f"kserve_vllm_adapters{{state='failed'}} is {failed:g}",
    }


def _redis(f: Facts) -> Match | None:
    if f.metric("kserve_vllm_redis_up") != 0:
        return None
    lost = f.labelled("kserve_vllm_rejections_total", "reason").get("limits_unavailable", 0)
    named = bool(f.flag("redis-url"))
    if not (named or lost):
        return None
    return {"lost": f"{lost:g}", "evidence": "kserve_vllm_redis_up is 0"}


def _at_least(name: str, **labels: str) -> Callable[[Facts], Match | None]:
    def find(f: Facts) -> Match | None:
        value = f.metric(name, **labels)
        return {"count": f"{value:g}", "evidence": f"{name} is {value:g}"} if value else None

    return find


def _usage(f: Facts) -> Match | None:
    lost = f.metric("kserve_vllm_usage_records_total", result="dropped")
    return (
        {"count": f"{lost:g}", "evidence": f"kserve_vllm_usage_records_total{{result='dropped'}} is {lost:g}"}
        if lost
        else None
    )


def _moderation(f: Facts) -> Match | None:
    failed = f.metric("kserve_vllm_moderation_verdicts_total", verdict="failed")
    if not failed:
        return None
    hooks = sorted(f.labelled("kserve_vllm_moderation_verdicts_total", "hook"))
    return {
        "hook": ", ".join(hooks),
        "count": f"{failed:g}",
        "evidence": f"kserve_vllm_moderation_verdicts_total{{verdict='failed'}} is {failed:g}",
    }


def _errors(f: Facts) -> Match | None:
    by = f.labelled("kserve_vllm_requests_total", "outcome")
    served = by.get("ok", 0) + by.get("server_error", 0)
    errors = by.get("server_error", 0)
    if served < _FEWEST or errors / served < _SHARE:
        return None
    return {
        "count": f"{errors:g}",
        "share": f"{100 * errors / served:.1f}",
        "evidence": f"kserve_vllm_requests_total{{outcome='server_error'}} is {errors:g} of {served:g}",
    }


def _queue_waits(f: Facts) -> Match | None:
    waiting, running = f.metric("vllm:num_requests_waiting") or 0, f.metric("vllm:num_requests_running") or 0
    pods = max(1, len(f.snapshot.answers))
    if waiting / pods <= 10:
        return None
    return {
        "waiting": f"{waiting:g}",
        "running": f"{running:g}",
        "evidence": f"vllm:num_requests_waiting is {waiting:g} over {pods} servers",
    }


def _draining(f: Facts) -> Match | None:
    for who, body in f.health.items():
        if body.get("state") == "draining":
            return {"who": who, "evidence": f"{who}: state draining for {body.get('seconds')} s"}
    return None


def _warm_failed(f: Facts) -> Match | None:
    failed = f.metric("kserve_vllm_warmup_prompts_total", outcome="failed")
    return (
        {"count": f"{failed:g}", "evidence": f"kserve_vllm_warmup_prompts_total{{outcome='failed'}} is {failed:g}"}
        if failed
        else None
    )


# A server at a URL.
def _health_refusal(f: Facts) -> str:
    return str(f.refused("/v2/health/ready").get("message", "")) if f.about_a_server else ""


def _nothing_there(f: Facts) -> Match | None:
    text = _health_refusal(f)
    if not re.search(r"refused|timed out|not known|unreachable|No route|Name or service|Temporary failure", text):
        return None
    return {"text": text, "evidence": text}


def _not_trusted(f: Facts) -> Match | None:
    text = _health_refusal(f)
    return {"text": text, "evidence": text} if re.search("certificate verify failed|CERTIFICATE_VERIFY", text) else None


def _not_http(f: Facts) -> Match | None:
    text = _health_refusal(f)
    if _not_trusted(f) or not re.search(
        r"no HTTP answer|BadStatusLine|reset by peer|without response|WRONG_VERSION|SSL|certificate|"
        r"is no http://",
        text,
    ):
        return None
    return {"text": text, "evidence": text}


def _guarded(f: Facts) -> Match | None:
    if f.about_a_server:
        for who, body in f.health.items():
            if "state" not in body and body["status"] in (401, 403):
                return {"status": str(body["status"]), "evidence": f"{who}/v2/health/ready: HTTP {body['status']}"}
    return None


def _another_server(f: Facts) -> Match | None:
    if not f.about_a_server or _guarded(f):
        return None
    for who, body in f.health.items():
        if "state" not in body:
            return {"status": str(body["status"]), "evidence": f"{who}/v2/health/ready: HTTP {body['status']}"}
    return None


def _still_loading(f: Facts) -> Match | None:
    if not f.about_a_server:
        return None
    for who, body in f.health.items():
        seconds = float(body.get("seconds") or 0)
        if body.get("state") in ("starting", "loading", "warming") and seconds <= 600:
            return {
                "state": str(body["state"]),
                "seconds": f"{seconds:.0f}",
                "evidence": f"{who}: {body['state']} for {seconds:.0f} s",
            }
    return None


def _metrics_closed(f: Facts) -> Match | None:
    if not f.about_a_server:
        return None
    for who, answer in f.snapshot.answers.items():
        metrics = answer.get("metrics")
        if isinstance(metrics, dict) and metrics.get("status") in (401, 403):
            return {"status": str(metrics["status"]), "evidence": f"{who}/metrics: HTTP {metrics['status']}"}
    return None


_CHART = "# with the chart: inferenceServices.$name."
CAUSES = (
    Cause(
        "server-unreachable",
        "Nothing listens there",
        100,
        "Nothing answers at $name: no server runs, it listens on another port or address, or a port-forward has ended.",
        ("kserve-vllm serve --demo", "# a service in a cluster: kubectl -n NAMESPACE port-forward POD 8080:8080"),
        _nothing_there,
    ),
    Cause(
        "server-not-http",
        "What listens there does not speak plain HTTP",
        100,
        "$text. The gRPC port (8081) and a port with TLS answer so: give the HTTP port, and https:// where there is "
        "TLS.",
        ("kserve-vllm diagnose --url http://localhost:8080",),
        _not_http,
    ),
    Cause(
        "server-untrusted",
        "Its certificate is not trusted here",
        100,
        "$text. It is signed by an authority that this machine does not know, has run out, or is for another name than "
        "the URL's.",
        (
            "openssl s_client -showcerts -connect HOST:PORT </dev/null | openssl x509 -noout -subject -issuer -dates",
            "SSL_CERT_FILE=ca.pem kserve-vllm diagnose --url $name",
        ),
        _not_trusted,
    ),
    Cause(
        "server-guarded",
        "Something in front of it wants a login",
        99,
        "The answer to /v2/health/ready is HTTP $status. This runtime answers health without a key: a gateway, a proxy "
        "or a service mesh in front of it does not let this request through.",
        (
            "curl -si $name/v2/health/ready | head -20",
            "# past the gateway, in a cluster: kubectl -n NAMESPACE port-forward POD 8080:8080",
        ),
        _guarded,
    ),
    Cause(
        "server-another",
        "Another server answers there",
        99,
        "The answer to /v2/health/ready is HTTP $status and none of this runtime's: another program listens there, or "
        "the URL has a path too much.",
        ("curl -si $name/v2/health/ready | head -20",),
        _another_server,
    ),
    Cause(
        "server-loading",
        "The server is still loading",
        60,
        "It is $state since $seconds s. The port is open from the first second; ready is said when the model is warm.",
        ("watch -n2 curl -s $name/v2/health/ready",),
        _still_loading,
        DEGRADED,
    ),
    Cause(
        "metrics-closed",
        "The metrics need a key",
        15,
        "/metrics is answered with $status, so load could not be judged.",
        ("KSERVE_VLLM_API_KEY=... kserve-vllm diagnose --url $name --api-key-env KSERVE_VLLM_API_KEY",),
        _metrics_closed,
        DEGRADED,
    ),
    Cause(
        "redis-down",
        "The Redis that replicas share does not answer",
        59,
        "Limits are shared through Redis, and it does not answer; $lost requests were turned away for it.",
        (
            "kubectl -n $ns get pods -l app=redis",
            "# --redis-url, --redis-timeout, and --redis-away for what happens meanwhile",
        ),
        _redis,
        DEGRADED,
    ),
    Cause(
        "adapter-broken",
        "An adapter can't be loaded",
        57,
        "$failed adapters failed to load ($names): files that are missing or broken, a rank above the limit, or one "
        "that was made for another model.",
        (
            "kubectl -n $ns logs -l serving.kserve.io/inferenceservice=$name -c kserve-container --tail=-1 | grep -i "
            "adapter",
        ),
        _adapters,
        DEGRADED,
    ),
    Cause(
        "queue-full",
        "Requests are turned away: the queue is full",
        56,
        "$count requests ($share %) found no room in the queue: more arrive than the pods can serve.",
        (
            _CHART + "autoscaling.maxReplicas   (more pods), or maxNumSeqs (more at a time, slower each)",
            "# clients should honour Retry-After",
        ),
        _rejected("queue_full", "queue_timeout"),
        DEGRADED,
    ),
    Cause(
        "kv-full",
        "The KV cache is full",
        55,
        "$used % of the KV cache is in use: requests wait, or are preempted and done twice.",
        (_CHART + "maxModelLen, autoscaling.maxReplicas, parallelism.tensor, or a lower maxNumSeqs",),
        _kv_full,
        DEGRADED,
        explains=("queue-waits",),
    ),
    Cause(
        "preemptions",
        "The scheduler takes requests back",
        54,
        "$count preemptions for $done finished requests: the KV cache is too small for so many at a time, and their "
        "work is done twice.",
        (_CHART + "maxNumSeqs: lower",),
        _preempted,
        DEGRADED,
    ),
    Cause(
        "queue-waits",
        "Requests wait in the engine's queue",
        53,
        "$waiting requests wait and $running run.",
        (_CHART + "autoscaling.maxReplicas   (more pods)",),
        _queue_waits,
        DEGRADED,
    ),
    Cause(
        "errors",
        "Requests fail in the server",
        58,
        "$count requests ($share % of those accepted) ended in a server error.",
        (
            "kubectl -n $ns logs -l serving.kserve.io/inferenceservice=$name -c kserve-container --tail=-1 | grep "
            "server_error | tail -3",
        ),
        _errors,
        DEGRADED,
    ),
    Cause(
        "moderation-down",
        "A moderation hook does not answer",
        52,
        "Hooks ($hook) failed to look at $count texts; what happens then is what their on_failure says.",
        (
            "kubectl -n $ns logs -l serving.kserve.io/inferenceservice=$name -c kserve-container --tail=-1 | grep -i "
            "moderation | tail -5",
        ),
        _moderation,
        DEGRADED,
    ),
    Cause(
        "keys-file-broken",
        "The changed key file can't be used",
        51,
        "The key file was changed $count times to something that can't be used; the keys of before stay valid, new "
        "ones do not work.",
        ("kserve-vllm keys list --file keys.yaml", "kubectl -n $ns get secret -o name | grep -i key"),
        _at_least("kserve_vllm_key_file_failures"),
        DEGRADED,
    ),
    Cause(
        "limits",
        "Tenants run into their limits",
        36,
        "$count requests ($share %) were over a tenant's limit ($reason). That is what limits are for; raise them if "
        "they are meant to pass.",
        ("# the key file: limits of the tenant",),
        _rejected("too_many_requests"),
        DEGRADED,
    ),
    Cause(
        "usage-lost",
        "Usage records are lost",
        34,
        "$count usage records could not be delivered and were dropped.",
        (
            "kubectl -n $ns logs -l serving.kserve.io/inferenceservice=$name -c kserve-container "
            "--tail=-1 | grep 'usage "
            "records'",
        ),
        _usage,
        DEGRADED,
    ),
    Cause(
        "warmup-failed",
        "Prompts of the warm-up file fail",
        18,
        "$count prompts of the warm-up file could not be run, so their prefixes are cold.",
        (
            "kubectl -n $ns logs -l serving.kserve.io/inferenceservice=$name -c kserve-container --tail=-1 | grep -i "
            "warm",
        ),
        _warm_failed,
        DEGRADED,
    ),
    Cause(
        "draining",
        "The server is on its way out",
        33,
        "$who finishes what is in flight and takes nothing new.",
        ("# nothing to do where a rollout is under way; otherwise start it again",),
        _draining,
        DEGRADED,
    ),
)
