"""What keeps a pod from running on a node: GPUs, selectors, volumes, images, quotas."""

from __future__ import annotations

import re
from collections.abc import Callable

from kserve_vllm.ops.diagnose.causes.table import Cause, Match, said
from kserve_vllm.ops.diagnose.facts import SERVING, Facts, condition, dig

_GPU = r"(?:nvidia\.com/(?:gpu|mig-[\w.]*\w)|amd\.com/gpu|intel\.com/gpu|gpu\.intel\.com/\w+|habana\.ai/gaudi)"
_INSUFFICIENT_GPU = re.compile(rf"Insufficient (?P<resource>{_GPU})")


def _pending(f: Facts) -> list[tuple[str, str]]:
    """(pod, scheduler's message) of pods that no node takes."""
    out = []
    for pod in f.unready:
        scheduled = condition(pod, "PodScheduled")
        if scheduled.get("status") == "False":
            out.append((pod["metadata"]["name"], str(scheduled.get("message") or "")))
    return out


def _asked(f: Facts, resource: str) -> int:
    """How many of a resource the pending pod's containers ask for."""
    most = 0
    for pod in f.unready:
        amounts = [dig(c, "resources", "limits", resource) or 0 for c in pod["spec"].get("containers") or []]
        most = max(most, sum(int(a) for a in amounts if str(a).isdigit()))
    return most


def _gpu(f: Facts) -> tuple[str, str, str] | None:
    """(pod, resource, message) where a pod waits for a GPU."""
    for pod, text in _pending(f):
        if match := _INSUFFICIENT_GPU.search(text):
            return pod, match["resource"], text
    return None


def _gpus_of_nodes(f: Facts, resource: str) -> list[int]:
    return [int(n) for node in f.all("Node") if str(n := dig(node, "status", "allocatable", resource) or 0).isdigit()]


def _no_gpu_anywhere(f: Facts) -> Match | None:
    if not (waits := _gpu(f)) or not f.all("Node") or any(_gpus_of_nodes(f, waits[1])):
        return None
    return {"resource": waits[1], "evidence": f"Pod {waits[0]}: {waits[2]}"}


def _larger_than_a_node(f: Facts) -> Match | None:
    if not (waits := _gpu(f)):
        return None
    most, asked = max(_gpus_of_nodes(f, waits[1]), default=0), _asked(f, waits[1])
    if not most or asked <= most:
        return None
    return {"asked": str(asked), "most": str(most), "resource": waits[1], "evidence": f"Pod {waits[0]}: {waits[2]}"}


def _held_by_the_old(f: Facts) -> Match | None:
    """A new pod waits for the GPU that a pod of the version before holds."""
    if not (waits := _gpu(f)):
        return None

    def version(pod: dict[str, object]) -> str:
        labels = dig(pod, "metadata", "labels") or {}
        return str(labels.get("serving.knative.dev/revision") or labels.get("pod-template-hash") or "")

    new = next((version(p) for p in f.unready if p["metadata"]["name"] == waits[0]), "")
    old = [p["metadata"]["name"] for p in f.pods if p not in f.unready and version(p) and version(p) != new]
    if not old or not new:
        return None
    return {"old": old[0], "new": waits[0], "mode": f.mode, "evidence": f"Pod {waits[0]}: {waits[2]}"}


def _pending_says(pattern: str, without: str = "") -> Callable[[Facts], Match | None]:
    compiled = re.compile(pattern)

    def find(f: Facts) -> Match | None:
        for pod, text in _pending(f):
            if (match := compiled.search(text)) and not (without and re.search(without, text)):
                return {
                    "pod": pod,
                    **{k: v or "" for k, v in match.groupdict().items()},
                    "evidence": f"Pod {pod}: {text}",
                }
        return None

    return find


def _gpu_short(f: Facts) -> Match | None:
    waits = _gpu(f)
    return {"pod": waits[0], "resource": waits[1], "evidence": f"Pod {waits[0]}: {waits[2]}"} if waits else None


def _image(pattern: str) -> Callable[[Facts], Match | None]:
    return said(rf"(?:ErrImagePull|ImagePullBackOff|Failed|InspectFailed).*{pattern}", "Pod")


def _unbound(f: Facts) -> Match | None:
    for claim in f.all("PersistentVolumeClaim"):
        name = claim["metadata"]["name"]
        used = any(
            dig(v, "persistentVolumeClaim", "claimName") == name
            for p in f.unready
            for v in p["spec"].get("volumes") or []
        )
        if used and dig(claim, "status", "phase") in ("Pending", "Lost"):
            phase = str(dig(claim, "status", "phase"))
            return {"claim": name, "phase": phase, "evidence": f"PersistentVolumeClaim {name} is {phase}"}
    return None


def _node_lost(f: Facts) -> Match | None:
    sick = {
        n["metadata"]["name"]: condition(n, "Ready").get("reason", "")
        for n in f.all("Node")
        if condition(n, "Ready").get("status") in ("False", "Unknown")
    }
    for pod in f.unready:
        node = str(pod["spec"].get("nodeName") or "")
        if node in sick:
            return {
                "node": node,
                "evidence": f"Node {node} is not ready: {sick[node]}; pod {pod['metadata']['name']} is on it",
            }
    return None


def _no_device_plugin_words(f: Facts) -> Match | None:
    for pod in f.unready:
        for name, status in f.statuses(pod, SERVING):
            for state in (status.get("state") or {}).values():
                text = str((state or {}).get("message") or "")
                if re.search(r"nvidia-container-cli|could not select device driver|libnvidia-ml|nvml error", text):
                    return {
                        "pod": pod["metadata"]["name"],
                        "container": name,
                        "node": str(pod["spec"].get("nodeName")),
                        "evidence": f"Pod {pod['metadata']['name']}: {text}",
                    }
    return None


_WITH_CHART = "# with the chart: inferenceServices.$name."

CAUSES = (
    Cause(
        "gpu-more-than-a-node",
        "The pod asks for more GPUs than any node has",
        86,
        "The pod asks for $asked x $resource, and the largest node has $most: no node can ever take it.",
        ("# fewer GPUs a pod (tensor parallelism), or a multi-node runtime", _WITH_CHART + "parallelism.tensor=$most"),
        _larger_than_a_node,
        explains=("gpu-short",),
    ),
    Cause(
        "gpu-none",
        "No node offers a GPU",
        86,
        "No node of the cluster has $resource to give: there is none, or NVIDIA's device plugin "
        "(the GPU operator) does "
        "not run there.",
        (
            "kubectl get nodes -o custom-columns=NAME:.metadata.name,GPUS:.status.allocatable.nvidia\\.com/gpu && "
            "kubectl get daemonsets --all-namespaces | grep -i nvidia",
        ),
        _no_gpu_anywhere,
        explains=("gpu-short", "gpu-more-than-a-node"),
    ),
    Cause(
        "rollout-needs-gpu",
        "The new pod waits for the GPU of the old one",
        85,
        "A new version starts before the old one ends, which takes one more GPU than there is: $new waits, $old "
        "serves on.",
        (
            "# Standard: let the old pod go first (a gap for one replica), with the chart: "
            "inferenceServices.$name.rollout=replace",
            'kubectl -n $ns patch inferenceservice $name --type merge -p \'{"spec":{"predictor":{"deploymentStrategy":'
            '{"type":"RollingUpdate","rollingUpdate":{"maxSurge":0,"maxUnavailable":1}}}}}\'',
            "# Knative: make room for one more GPU until the new revision is ready",
        ),
        _held_by_the_old,
        explains=("gpu-short",),
    ),
    Cause(
        "gpu-taint",
        "The nodes with GPUs are tainted",
        85,
        "Nodes keep pods away that do not tolerate $taint.",
        (
            'kubectl -n $ns patch inferenceservice $name --type merge -p \'{"spec":{"predictor":{"tolerations":'
            '[{"key":"$key","operator":"Exists","effect":"NoSchedule"}]}}}\'',
            _WITH_CHART + "tolerations",
        ),
        _pending_says(
            r"untolerated taint(?:\(s\))? ?\{(?P<taint>(?P<key>(?!node-role|node\.kubernetes|node\.cloud)"
            r"[\w./-]+)[^}]*)\}"
        ),
        explains=("gpu-short", "node-selector"),
    ),
    Cause(
        "gpu-short",
        "Not enough free GPUs",
        84,
        "$pod waits for $resource: every GPU is taken. It starts as soon as one is free or a node joins.",
        (
            "kubectl get pods --all-namespaces -o custom-columns=NS:.metadata.namespace,POD:.metadata.name,"
            "NODE:.spec.nodeName,GPUS:.spec.containers[*].resources.limits.nvidia\\.com/gpu | grep -v '<none>$$'",
        ),
        _gpu_short,
    ),
    Cause(
        "node-selector",
        "No node matches the selector or affinity",
        85,
        "$pod may only run on nodes with certain labels, and no node with room has them.",
        (
            "kubectl get nodes --show-labels",
            "kubectl -n $ns get pod $pod -o jsonpath='{.spec.nodeSelector}{.spec.affinity}'",
        ),
        _pending_says(r"didn't match Pod's node affinity/selector", without=r"Insufficient nvidia"),
        explains=("cpu-or-memory-short",),
    ),
    Cause(
        "cpu-or-memory-short",
        "Not enough free CPU or memory",
        83,
        "$pod asks for more $what than any node has free.",
        ("kubectl describe nodes | grep -A8 'Allocated resources'", _WITH_CHART + "resources.requests"),
        _pending_says(r"Insufficient (?P<what>cpu|memory|ephemeral-storage)", without=_INSUFFICIENT_GPU.pattern),
    ),
    Cause(
        "pvc-absent",
        "The volume claim does not exist",
        87,
        "$pod mounts the claim $claim, and there is none of this name in $ns.",
        ("kubectl -n $ns get pvc",),
        said(r"persistentvolumeclaim \"(?P<claim>[^\"]+)\" not found", "Pod"),
    ),
    Cause(
        "pvc-unbound",
        "The volume claim is not bound",
        86,
        "The claim $claim is $phase: no storage class provides it, or it waits for a volume in another zone.",
        ("kubectl -n $ns describe pvc $claim",),
        _unbound,
        explains=("cpu-or-memory-short",),
    ),
    Cause(
        "volume-busy",
        "The volume is attached to another node",
        84,
        "A ReadWriteOnce volume can be on one node at a time: a pod on another node still has it. Use ReadOnlyMany or "
        "ReadWriteMany for models that several pods read.",
        ("kubectl -n $ns get pods -o wide && kubectl get volumeattachments",),
        said(r"Multi-Attach error for volume \"(?P<volume>[^\"]+)\"", "Pod"),
    ),
    Cause(
        "mount-source-absent",
        "A ConfigMap or Secret to mount does not exist",
        87,
        "$pod mounts the $kind $source, and there is none in $ns.",
        ("kubectl -n $ns get $kind $source",),
        said(r"MountVolume\.SetUp failed.*?(?P<kind>configmap|secret) \"(?P<source>[^\"]+)\" not found", "Pod"),
    ),
    Cause(
        "secret-absent",
        "A Secret for the environment does not exist",
        87,
        "A variable of $pod comes from the $kind $source, and there is none in $ns.",
        ("kubectl -n $ns create secret generic $source --from-literal=KEY=VALUE",),
        said(r"CreateContainerConfigError.*?(?P<kind>secret|configmap) \"(?P<source>[^\"]+)\" not found", "Pod"),
    ),
    Cause(
        "secret-key-absent",
        "A Secret lacks the key that is asked for",
        87,
        "A variable of $pod comes from the key $key, which the Secret or ConfigMap $source does not have.",
        ("kubectl -n $ns describe secret $source",),
        said(
            r"CreateContainerConfigError.*?couldn't find key (?P<key>\S+) in (?:Secret|ConfigMap) (?P<source>[^\s,]+)",
            "Pod",
        ),
    ),
    Cause(
        "image-absent",
        "The image does not exist",
        86,
        "The registry has no such image or tag: $image.",
        (
            "kubectl -n $ns get pod $pod -o jsonpath='{.spec.containers[*].image}'",
            "# with the chart: image.repository, image.tag",
        ),
        _image(r"(?P<image>\S+/\S+?)\"?: .*(?:not found|manifest unknown)"),
    ),
    Cause(
        "image-pull-secret",
        "The registry wants credentials",
        86,
        "The registry refuses to give the image without credentials, or with these.",
        (
            "kubectl -n $ns create secret docker-registry regcred --docker-server=HOST --docker-username=USER "
            "--docker-password=TOKEN",
            "# with the chart: image.pullSecrets=[regcred]",
        ),
        _image(
            r"(?:401 Unauthorized|403 Forbidden|pull access denied|authorization failed|"
            r"no basic auth credentials|authentication required)"
        ),
        explains=("image-absent",),
    ),
    Cause(
        "image-rate-limited",
        "The registry limits pulls",
        86,
        "The registry answers 429 Too Many Requests: use credentials or a mirror.",
        ("kubectl -n $ns describe pod $pod | grep -A12 Events:",),
        _image(r"(?:429 Too Many Requests|toomanyrequests)"),
        explains=("image-absent",),
    ),
    Cause(
        "registry-unreachable",
        "The registry is not reached",
        85,
        "The node of $pod can't reach the image's registry (name, network, proxy or certificate).",
        ("kubectl -n $ns describe pod $pod | grep -A12 Events:",),
        _image(
            r"(?:i/o timeout|no such host|server misbehaving|failed to do request|"
            r"connection refused|x509: |network is unreachable)"
        ),
        explains=("image-absent",),
    ),
    Cause(
        "image-platform",
        "The image is for another processor",
        86,
        "The image has no variant for the node's architecture (our images are for x86-64).",
        (_WITH_CHART + "nodeSelector: {kubernetes.io/arch: amd64}",),
        said(r"no match for platform in manifest|exec format error", "Pod"),
        explains=("image-absent",),
    ),
    Cause(
        "gpu-driver",
        "The node's GPU driver does not work in containers",
        86,
        "NVIDIA's container tools failed on node $node: the driver is not loaded, was updated "
        "without a restart, or the "
        "toolkit is not set up.",
        (
            "kubectl describe node $node | grep -i nvidia && kubectl get pods --all-namespaces -o wide "
            "--field-selector spec.nodeName=$node | grep -i nvidia",
        ),
        _no_device_plugin_words,
    ),
    Cause(
        "evicted-disk",
        "The pod was evicted for its disk use",
        84,
        "The kubelet evicted $pod: the node or the pod ran out of ephemeral storage. Models that are downloaded count, "
        "so do caches in /tmp.",
        (
            "# a volume claim for the model (storageUri: pvc://...), or more room: runtimes.tmpSizeLimit",
            "kubectl -n $ns describe pod $pod | grep -i -A3 evicted",
        ),
        said(r"Evicted .*(ephemeral|DiskPressure|disk)", "Pod"),
    ),
    Cause(
        "evicted-memory",
        "The pod was evicted for the node's memory",
        84,
        "The node of $pod ran out of memory and the kubelet evicted it: its request is below what it uses.",
        (_WITH_CHART + "resources.requests.memory",),
        said(r"Evicted .*(node was low on resource: memory|MemoryPressure)", "Pod"),
    ),
    Cause(
        "preempted",
        "A pod of higher priority took the place",
        82,
        "The scheduler removed $pod for one of higher priority.",
        ("kubectl get priorityclasses", _WITH_CHART + "priorityClassName"),
        said(r"(Preempted |PreemptionByScheduler|Preempting)", "Pod"),
    ),
    Cause(
        "node-lost",
        "The pod's node is gone",
        85,
        "Node $node does not answer, so its pods are not ready. They are started elsewhere after five minutes, where "
        "there is a GPU.",
        ("kubectl describe node $node", "# if it does not come back: kubectl delete node $node"),
        _node_lost,
    ),
    Cause(
        "quota",
        "The namespace's quota is used up",
        88,
        "A ResourceQuota of $ns forbids one more pod: $quota",
        ("kubectl -n $ns describe resourcequota",),
        said(r"exceeded quota: (?P<quota>.{0,200})"),
    ),
    Cause(
        "quota-needs-limits",
        "The namespace's quota wants limits",
        88,
        "A ResourceQuota of $ns counts limits, and the pod gives none for: $what.",
        (_WITH_CHART + "resources.limits",),
        said(r"failed quota: \S+ must specify (?P<what>[\w.,:\s-]+)"),
    ),
    Cause(
        "pod-security",
        "The namespace's pod security level forbids the pod",
        88,
        "The namespace enforces a Pod Security level that the pod does not meet: $what",
        (
            "kubectl get namespace $ns -o jsonpath='{.metadata.labels}'",
            "# the chart's pods meet `restricted`; look at what inferenceServices.$name adds",
        ),
        said(r"violates PodSecurity \"(?P<level>[^\"]+)\": (?P<what>.{0,200})"),
    ),
    Cause(
        "service-account-absent",
        "The service account does not exist",
        88,
        "The pod runs as the service account $account, which $ns does not have.",
        ("kubectl -n $ns create serviceaccount $account",),
        said(r"serviceaccount \"?(?:[\w-]+/)?(?P<account>[\w.-]+)\"? not found"),
    ),
    Cause(
        "policy-denied",
        "An admission policy forbids the pod",
        86,
        "The webhook $hook denies the pod: $words",
        ("# change what it names, or ask for an exception", "kubectl get validatingwebhookconfigurations"),
        said(
            r"admission webhook \"(?P<hook>(?![\w.-]*knative\.dev|[\w.-]*kserve)[^\"]+)\" denied the request: "
            r"(?P<words>.{0,200})"
        ),
    ),
    Cause(
        "runtime-class-absent",
        "The runtime class does not exist",
        88,
        "The pod asks for the RuntimeClass $cls, which the cluster does not have.",
        ("kubectl get runtimeclasses", _WITH_CHART + "runtimeClassName"),
        said(r"RuntimeClass(?:\.node\.k8s\.io)? \"(?P<cls>[^\"]+)\" not found"),
    ),
    Cause(
        "priority-class-absent",
        "The priority class does not exist",
        88,
        "The pod asks for the PriorityClass $cls, which the cluster does not have.",
        ("kubectl get priorityclasses", _WITH_CHART + "priorityClassName"),
        said(r"no PriorityClass with name (?P<cls>\S+) was found"),
    ),
    Cause(
        "network-not-ready",
        "The node can't give the pod a network",
        80,
        "The pod's sandbox can't be made: the node's network plugin fails or has no addresses left.",
        ("kubectl -n $ns describe pod $pod | grep -A12 Events:",),
        said(r"FailedCreatePodSandBox", "Pod"),
    ),
)
