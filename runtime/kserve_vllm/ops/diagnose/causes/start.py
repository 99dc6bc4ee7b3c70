"""What ends a start: the download, the devices, the engine's own refusals, the probes. Mostly read from logs.

Patterns of vLLM's messages are held against the installed vLLM by a test.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from kserve_vllm.ops.cluster import Json
from kserve_vllm.ops.diagnose.causes.table import DEGRADED, Cause, Match, either, logged
from kserve_vllm.ops.diagnose.facts import SERVING, Facts, dig
from kserve_vllm.ops.diagnose.snapshot import moment

_CHART = "# with the chart: inferenceServices.$name."
_INIT = "storage-initializer"


def _killed(*containers: str) -> Callable[[Facts], Match | None]:
    def find(f: Facts) -> Match | None:
        for pod in f.pods:
            for name, status in f.statuses(pod):
                if name not in containers:
                    continue
                for where in ("state", "lastState"):
                    ended = dig(status, where, "terminated") or {}
                    over = status.get("ready") and where == "lastState" and not f.recent(ended.get("finishedAt"))
                    if ended.get("reason") == "OOMKilled" and not over:
                        limit = next(
                            (
                                dig(c, "resources", "limits", "memory")
                                for group in ("containers", "initContainers")
                                for c in pod["spec"].get(group) or []
                                if c["name"] == name
                            ),
                            None,
                        )
                        return {
                            "pod": pod["metadata"]["name"],
                            "limit": str(limit or "no limit; the node's memory"),
                            "container": name,
                            "evidence": f"Pod {pod['metadata']['name']}: container {name} was OOMKilled",
                        }
        return None

    return find


def _killed_by(probe: str) -> Callable[[Facts], Match | None]:
    """The kubelet ended a container for this probe while the server was still loading."""

    def find(f: Facts) -> Match | None:
        for event in f.all("Event"):
            if event.get("reason") != "Killing" or f"failed {probe} probe" not in str(event.get("message")):
                continue
            pod = str(dig(event, "involvedObject", "name"))
            if any(p["metadata"]["name"] == pod for p in f.unready):
                return {"pod": pod, "evidence": f"Pod {pod}: {event.get('message')}"}
        return None

    return find


def _live_while_loading(f: Facts) -> Match | None:
    """Liveness ends a container that has no startup probe."""
    match = _killed_by("liveness")(f)
    if not match:
        return None
    pod = next(p for p in f.unready if p["metadata"]["name"] == match["pod"])
    container: Json = next((c for c in pod["spec"].get("containers") or [] if c["name"] in SERVING), {})
    if container.get("startupProbe"):
        return None
    return dict(match)


def _probe_status(f: Facts) -> Match | None:
    for each in f.said:
        if each.reason != "Unhealthy" or each.kind != "Pod":
            continue
        if match := re.search(r"probe failed: HTTP probe failed with statuscode: (404|401|403|405)", each.text):
            return {"pod": each.name, "code": match[1], "evidence": f"{each.where}: {each.text}"}
    return None


def _health_says(state: str, reason: str = "") -> Callable[[Facts], Match | None]:
    def find(f: Facts) -> Match | None:
        for who, body in f.health.items():
            if body.get("state") == state and re.search(reason, str(body.get("reason", ""))):
                seconds = float(body.get("seconds") or 0)
                return {
                    "pod": who,
                    "seconds": f"{seconds:.0f}",
                    "minutes": f"{seconds / 60:.0f}",
                    "reason": str(body.get("reason", "")),
                    "evidence": f"{who}: state {state} for {seconds:.0f} s {body.get('reason', '')}".strip(),
                }
        return None

    return find


def _slow(f: Facts) -> Match | None:
    """Loading or warming for over ten minutes, and nothing says why."""
    for state in ("loading", "warming", "starting"):
        match = _health_says(state)(f)
        if match and float(match["seconds"]) > 600:
            return {**match, "state": state}
    for pod in f.unready:
        for name, status in f.statuses(pod, (_INIT,)):
            began = moment(dig(status, "state", "running", "startedAt"))
            if began and (f.snapshot.now - began).total_seconds() > 900:
                minutes = (f.snapshot.now - began).total_seconds() / 60
                return {
                    "pod": pod["metadata"]["name"],
                    "state": "downloading",
                    "minutes": f"{minutes:.0f}",
                    "evidence": f"{name} has run for {minutes:.0f} min",
                }
    return None


def _loading(f: Facts) -> Match | None:
    """A pod whose first start goes on, for less than ten minutes; see `_slow` for longer."""
    if f.about_a_server:
        return None
    for pod in f.unready:
        name, body = pod["metadata"]["name"], f.health.get(pod["metadata"]["name"])
        for _, status in f.statuses(pod, SERVING):
            began = moment(dig(status, "state", "running", "startedAt"))
            if began is None or status.get("restartCount") or dig(pod, "metadata", "deletionTimestamp"):
                continue
            state = str((body or {}).get("state", "starting"))
            if body:
                seconds, limit = float(body.get("seconds") or 0), 600
                seen = f"{name}: state {state} for {seconds:.0f} s"
            else:
                seconds, limit = (f.snapshot.now - began).total_seconds(), 60
                seen = f"{name}: started {seconds:.0f} s ago, its port is not open yet"
            if state in ("loading", "warming", "starting") and seconds <= limit:
                return {"pod": name, "state": state, "seconds": f"{seconds:.0f}", "evidence": seen}
    return None


def _exit(code: int) -> Callable[[Facts], Match | None]:
    def find(f: Facts) -> Match | None:
        for pod in f.unready:
            for name, status in f.statuses(pod, SERVING):
                for where in ("state", "lastState"):
                    ended = dig(status, where, "terminated") or {}
                    if ended.get("exitCode") == code and ended.get("reason") != "OOMKilled":
                        return {
                            "pod": pod["metadata"]["name"],
                            "container": name,
                            "restarts": str(status.get("restartCount", 0)),
                            "evidence": f"Pod {pod['metadata']['name']}: exit code {code}, "
                            f"{status.get('restartCount', 0)} restarts",
                        }
        return None

    return find


def _crash(f: Facts) -> Match | None:
    for pod in f.unready:
        for name, status in f.statuses(pod):
            ended = dig(status, "lastState", "terminated") or dig(status, "state", "terminated") or {}
            if (status.get("restartCount") or 0) >= 1 and ended.get("exitCode") not in (None, 0):
                logs = f.snapshot.logs
                at = f"{pod['metadata']['name']}/{name}"
                text = logs.get(f"{at}/previous") or logs.get(at) or str(ended.get("message") or "no log")
                last = text.strip().splitlines() or ["no log"]
                return {
                    "pod": pod["metadata"]["name"],
                    "container": name,
                    "code": str(ended.get("exitCode")),
                    "evidence": f"the last line of {at}: {last[-1][-360:]}",
                }
    return None


_ARGS = ("kubectl -n $ns logs $pod -c $container --previous --tail=60",)
_PATCH_ARGS = ("# add the flag: kubectl -n $ns edit inferenceservice $name   (spec.predictor.model.args)",)

CAUSES = (
    # The download.
    Cause(
        "token-missing",
        "The model is gated and no token is given",
        89,
        "Hugging Face gives this model only to accounts that accepted its terms: HF_TOKEN is missing, or its account "
        "has no access.",
        (
            "kubectl -n $ns create secret generic hf-token --from-literal=HF_TOKEN=hf_...",
            _CHART + "huggingFaceToken.secretName=hf-token   (manifests: inferenceservices/private-hf-model.yaml)",
        ),
        logged(
            r"GatedRepoError|Cannot access gated repo|Access to model \S+ is restricted|"
            r"401 Client Error.*huggingface\.co|Invalid user token|Please log in"
        ),
        explains=("model-absent",),
    ),
    Cause(
        "model-absent",
        "There is no such model",
        88,
        "The storage has no model at the address that is asked for (a typing error, a private repository, another "
        "revision).",
        ("kubectl -n $ns get inferenceservice $name -o jsonpath='{.spec.predictor.model.storageUri}'",),
        logged(
            r"RepositoryNotFoundError|RevisionNotFoundError|404 Client Error.*(?:huggingface|hf)|"
            r"NoSuchKey|NoSuchBucket|"
            r"No model found in|is not a local folder and is not a valid model identifier|"
            r"Failed to fetch model\. The path or model (?P<what>.*) does not exist"
            r"|Invalid repository ID or local directory specified"
            r"|--model (?P<path>/\S+): there is no such file or folder"
        ),
    ),
    Cause(
        "storage-credentials",
        "The storage refuses the credentials",
        88,
        "The bucket answers that these credentials, or none, may not read it. KServe takes them from a Secret on the "
        "service account.",
        (
            "kubectl -n $ns get serviceaccount -o yaml | grep -A3 secrets:",
            "# https://kserve.github.io/website/ : storage, credentials",
        ),
        logged(
            r"AccessDenied|InvalidAccessKeyId|SignatureDoesNotMatch|403 Client Error|Unable to locate credentials|"
            r"NoCredentialsError|does not have storage\.objects\.get access|AuthorizationFailure|"
            r"An error occurred \(403\)"
        ),
    ),
    Cause(
        "hub-unreachable",
        "The model's storage is not reached",
        87,
        "The pod can't reach the place that its model comes from: DNS, an egress policy, a proxy or its certificate.",
        ("kubectl -n $ns get networkpolicies", "# without the internet: storageUri pvc:// or a LocalModelCache"),
        logged(
            r"Failed to resolve '|Temporary failure in name resolution|Max retries exceeded with url|"
            r"LocalEntryNotFoundError|We couldn't connect to 'https://huggingface|"
            r"ConnectTimeout|Network is unreachable|CERTIFICATE_VERIFY_FAILED|Could not connect to the endpoint URL"
        ),
    ),
    Cause(
        "processor-unsuitable",
        "The image is for another processor",
        90,
        "A process of the engine was ended by SIGILL: it used an instruction that this node's processor or its kernel "
        "does not allow.",
        (
            "kubectl get nodes -L kubernetes.io/arch,node.kubernetes.io/instance-type",
            "# an image that was built for these processors, or nodes that the image was built for",
        ),
        either(logged(r"ended by SIGILL|exit code: -4\)|Illegal instruction"), _exit(132)),
    ),
    Cause(
        "disk-full",
        "The disk is full",
        87,
        "The pod ran out of disk while it wrote: the emptyDir's size limit or the node's disk is "
        "smaller than the model.",
        (
            "# with the chart: runtimes.tmpSizeLimit, or storageUri: pvc://...",
            "kubectl -n $ns get pod $pod -o jsonpath='{.spec.volumes}'",
        ),
        logged(r"No space left on device(?!.*(?:shm|psm_|nccl))|OSError: \[Errno 28\](?!.*shm)"),
    ),
    Cause(
        "download-oom",
        "The download was killed for its memory",
        86,
        "The storage initializer may use $limit and needs more for large files.",
        (
            "# KServe's settings: inferenceservice-config, storageInitializer.memoryLimit",
            "kubectl -n kserve get configmap inferenceservice-config -o jsonpath='{.data.storageInitializer}'",
        ),
        _killed(_INIT),
    ),
    Cause(
        "model-incomplete",
        "The model's files are broken or incomplete",
        87,
        "A file of the model can't be read: a Git LFS pointer instead of the weights, a download "
        "that was cut, or files "
        "that are missing.",
        ("kubectl -n $ns exec deploy/$name-predictor -- ls -lL /mnt/models",),
        logged(
            r"HeaderTooLarge|InvalidHeaderDeserialization|MetadataIncompleteBuffer|SafetensorError|"
            r"Cannot find any model weights with|git-lfs|PytorchStreamReader failed|"
            r"does not appear to have a file named|Following weights were not initialized from checkpoint"
        ),
    ),
    # Devices.
    Cause(
        "host-oom",
        "The container was killed for its memory",
        86,
        "The kernel ended $pod: the container may use $limit. Weights pass through memory while "
        "they load, and /dev/shm "
        "and /tmp in memory count too.",
        (
            _CHART + "resources.limits.memory   (more than the weights, plus 8Gi)",
            'kubectl -n $ns patch inferenceservice $name --type merge -p \'{"spec":{"predictor":{"model":{"resources":'
            '{"requests":{"memory":"32Gi"},"limits":{"memory":"32Gi"}}}}}}\'',
        ),
        _killed(*SERVING),
    ),
    Cause(
        "gpu-oom",
        "The GPU's memory is too small",
        85,
        "CUDA ran out of memory while the model was loaded or warmed: weights, cache and peaks do not fit.",
        (
            _CHART + "maxModelLen, quantization, or parallelism.tensor=2 (and gpu.count)",
            "# at once: args --max-model-len=8192 --max-num-seqs=64 --gpu-memory-utilization=0.85",
        ),
        logged(
            r"(?:torch\.(?:cuda\.)?)?OutOfMemoryError|CUDA out of memory|cudaErrorMemoryAllocation|"
            r"HIP out of memory"
        ),
    ),
    Cause(
        "gpu-shared",
        "Another process uses the GPU's memory",
        87,
        "The GPU has less free memory than the engine is told to take ($free GiB free of $total): another process is "
        "on it, such as the pod before, a shared GPU, or one that hangs.",
        ("kubectl -n $ns exec $pod -c $container -- nvidia-smi", "# or take less: args --gpu-memory-utilization=0.45"),
        logged(
            r"Free memory on device \S+ \((?P<free>[\d.]+)/(?P<total>[\d.]+) GiB\).*is less than desired GPU memory "
            r"utilization"
        ),
        explains=("gpu-oom",),
    ),
    Cause(
        "kv-too-small",
        "The KV cache can't hold one full request",
        87,
        "After the weights too little memory is left for a request of the longest length. $estimate",
        (_CHART + "maxModelLen=8192", "# or args --max-model-len=8192, a larger GPU, or --kv-cache-dtype=fp8"),
        logged(
            r"cache is needed, which is larger than the available KV cache memory[^.]*\.?\d* ?[^.]*\. ?"
            r"(?P<estimate>Based on the available memory, the estimated maximum model length is \d+\.)?"
        ),
        explains=("gpu-oom",),
    ),
    Cause(
        "kv-none",
        "Nothing is left for the KV cache",
        87,
        "The weights take all memory that the engine may use.",
        (_CHART + "quantization, parallelism.tensor=2, or a larger GPU", "# or args --gpu-memory-utilization=0.95"),
        logged(r"No available memory for the cache blocks"),
        explains=("gpu-oom",),
    ),
    Cause(
        "no-gpu-visible",
        "The process sees no GPU",
        87,
        "The GPU runtime runs, but the container has no GPU: none is asked for in its limits, or "
        "the runtime class that "
        "passes it in is missing.",
        (
            _CHART + "gpu.count=1   (and runtimeClassName: nvidia where the cluster wants one)",
            "kubectl -n $ns get pod $pod -o jsonpath='{.spec.containers[*].resources.limits}'",
        ),
        logged(
            r"Failed to infer device type|No CUDA GPUs are available|Found no NVIDIA driver on your system|"
            r"cudaErrorNoDevice|no CUDA-capable device is detected|libcuda\.so\.1: cannot open shared object"
        ),
    ),
    Cause(
        "driver-old",
        "The GPU driver is too old for this image",
        87,
        "CUDA of the image wants a newer driver than the node has.",
        (
            "kubectl -n $ns exec $pod -c $container -- nvidia-smi | head -4",
            "# update the driver (GPU operator), or use an image for an older CUDA",
        ),
        logged(
            r"The NVIDIA driver on your system is too old|CUDA driver version is insufficient for CUDA runtime|"
            r"forward compatibility was attempted on non supported HW|cudaErrorInsufficientDriver"
        ),
    ),
    Cause(
        "gpu-hardware",
        "The GPU reports an error",
        86,
        "The driver lost the GPU, or its memory has an error that can't be corrected. The node needs a look, not the "
        "service.",
        ("kubectl -n $ns get pod $pod -o wide", "# on the node: dmesg | grep -i xid ; then drain and restart it"),
        logged(
            r"uncorrectable ECC error|CUDA error: (?:an illegal memory access|unspecified launch failure|device-side "
            r"assert)|GPU is lost|fallen off the bus|cudaErrorECCUncorrectable|\bXid\b"
        ),
    ),
    Cause(
        "nccl",
        "The GPUs can't talk to each other",
        86,
        "NCCL, which joins GPUs of one model, failed: peer to peer access, the network between nodes, or too small a "
        "/dev/shm.",
        (
            "# more is said with env NCCL_DEBUG=INFO; then try NCCL_P2P_DISABLE=1, NCCL_IB_DISABLE=1, "
            "NCCL_SOCKET_IFNAME=eth0",
            "kubectl -n $ns logs $pod -c $container --previous | grep -i nccl",
        ),
        logged(
            r"NCCL error|ncclInternalError|ncclSystemError|ncclUnhandledCudaError|ncclRemoteError|"
            r"unhandled system error|Watchdog caught collective operation timeout"
        ),
    ),
    Cause(
        "shm-too-small",
        "Shared memory is too small",
        88,
        "Worker processes share memory in /dev/shm, and it is full: Kubernetes gives 64 MiB where no volume is mounted "
        "there.",
        (_CHART + "sharedMemory=8Gi   (a Memory emptyDir at /dev/shm)",),
        logged(
            r"(?:/dev/shm|shm|psm_\w+).{0,80}No space left on device|No space left on device.{0,120}"
            r"(?:/dev/shm|shm|psm_)|Bus error|unable to (?:open|mmap|allocate) shared memory"
        ),
        explains=("nccl", "disk-full"),
    ),
    Cause(
        "gpu-capability",
        "The GPU is too old for this data type or method",
        87,
        "The GPU's compute capability is below what the data type or quantization needs.",
        (_CHART + "extraArgs: [--dtype=half]   (or another quantization, or a newer GPU: gpu.products)",),
        logged(
            r"is only supported on GPUs with compute capability|with compute capability of at least|"
            r"no kernel image is available for execution on the device|Minimum capability"
        ),
    ),
    # The engine's refusals.
    Cause(
        "model-len-over",
        "The longest length is beyond what the model was made for",
        87,
        "--max-model-len is $asked, and the model's own limit is lower.",
        (_CHART + "maxModelLen (leave it out to take the model's)",),
        logged(r"User-specified max_model_len \((?P<asked>\d+)\) is greater than the derived max_model_len"),
    ),
    Cause(
        "tp-heads",
        "The model can't be split over so many GPUs",
        87,
        "The number of attention heads ($heads) must be divisible by the tensor parallel size.",
        (_CHART + "parallelism.tensor: a divisor of $heads",),
        logged(r"Total number of attention heads \((?P<heads>\d+)\) must be divisible by tensor parallel size"),
    ),
    Cause(
        "tp-over-gpus",
        "More GPUs are wanted than the pod has",
        87,
        "The parallel size is $size, and the pod sees fewer GPUs.",
        (_CHART + "gpu.count=$size (or leave it empty: the chart derives it)",),
        logged(r"World size \((?P<size>\d+)\) is larger than the number of available GPUs"),
    ),
    Cause(
        "architecture-unknown",
        "This vLLM does not know the model's architecture",
        87,
        "The model's architecture ($arch) is not one that the installed vLLM can run: the model is newer, or is none "
        "for text.",
        ("# an image with a newer vLLM, or another model", "kserve-vllm --version"),
        logged(
            r"Model architectures (?P<arch>\[[^\]]*\]) are not supported for now|"
            r"does not recognize this architecture|Model architectures? .* failed to be inspected"
        ),
    ),
    Cause(
        "trust-remote-code",
        "The model brings code of its own",
        86,
        "The model's folder holds Python code, which is not run unless that is allowed. Allow it only for models that "
        "you trust: it runs with the service's rights.",
        (_CHART + "extraArgs: [--trust-remote-code]",),
        logged(
            r"`trust_remote_code=True`|contains custom code which must be executed|"
            r"loading this model requires you to execute"
        ),
    ),
    Cause(
        "quantization-mismatch",
        "The quantization flag does not fit the model",
        87,
        "The model's files say $has, the flag says $flag.",
        (_CHART + "quantization: leave it out, vLLM reads it from the model",),
        logged(
            r"Quantization method specified in the model config \((?P<has>[^)]*)\) does not match the quantization "
            r"method specified in the `quantization` argument \((?P<flag>[^)]*)\)"
        ),
    ),
    Cause(
        "chat-template-wrong",
        "The chat template can't be used",
        86,
        "The chat template that is given is no file in the container, or no valid Jinja.",
        (
            "kubectl -n $ns get configmap -o name | grep -i template",
            _CHART + "chatTemplate.configMap, chatTemplate.key",
        ),
        logged(
            r"supplied chat template|chat template path doesn't exist|looks like a file path, but it failed to be "
            r"opened|jinja2\.exceptions\.\w+|TemplateSyntaxError"
        ),
    ),
    Cause(
        "adapter-rank",
        "An adapter's rank is above the limit",
        86,
        "The adapter has rank $rank, and the engine was started for less.",
        (_CHART + "lora.maxRank=$rank",),
        logged(r"LoRA rank (?P<rank>\d+) is greater than max_lora_rank"),
    ),
    Cause(
        "flag-unknown",
        "A flag or value of the runtime can't be used",
        86,
        "The server ended with code 2: a setting is wrong. It says: $words",
        (_CHART + "extraArgs / env (kserve-vllm serve --help; --help-engine WORD for engine flags)",),
        logged(
            r"(?:^|\n)kserve-vllm(?: serve)?: (?:error: )?(?P<words>[^\n]{10,240})", when=lambda f: bool(_exit(2)(f))
        ),
    ),
    Cause(
        "port-in-use",
        "A port is taken",
        85,
        "Another process of the pod listens on the port already (a sidecar, hostNetwork, or two containers).",
        _ARGS,
        logged(r"address already in use|Address already in use|Errno 98"),
    ),
    Cause(
        "read-only-filesystem",
        "Something writes where nothing may be written",
        85,
        "The container's root is read-only, and only /tmp may be written. A cache folder points elsewhere.",
        (_CHART + "env: the folder in question below /tmp (HF_HOME, VLLM_CACHE_ROOT, ...)",),
        logged(r"Read-only file system|\[Errno 30\]"),
    ),
    Cause(
        "compiler-missing",
        "torch.compile finds no compiler",
        84,
        "The engine compiles kernels at its start, and the image lacks a C++ compiler or Python's headers.",
        (_CHART + "extraArgs: [--enforce-eager]",),
        logged(r"InvalidCxxCompiler|No working C\+\+ compiler found|Python\.h: No such file|Failed to find C compiler"),
    ),
    # The life of the process.
    Cause(
        "probe-too-early",
        "The liveness probe ends the server while it loads",
        83,
        "There is no startup probe, so liveness counts from the first second, and a model takes longer to load.",
        (
            "# use the chart's runtime, which has a startup probe of 45 min, or give the container one "
            "on /v2/health/ready",
            "kubectl -n $ns get pod $pod -o jsonpath='{.spec.containers[*].livenessProbe}'",
        ),
        _live_while_loading,
    ),
    Cause(
        "startup-too-short",
        "The startup probe gives up before the model is loaded",
        82,
        "The model was still loading when the startup probe's time (periodSeconds x failureThreshold) was over; the "
        "kubelet starts the container anew, for ever.",
        (
            "# with the chart: runtimes.probes.startup.failureThreshold",
            "kubectl -n $ns get pod $pod -o jsonpath='{.spec.containers[*].startupProbe}'",
        ),
        _killed_by("startup"),
    ),
    Cause(
        "probe-path",
        "A probe asks at a path that is not there",
        84,
        "A probe is answered with $code: it asks for another path or port than the runtime's /v2/health/ready and "
        "/v2/health/live on 8080.",
        ("kubectl -n $ns get pod $pod -o jsonpath='{.spec.containers[*].readinessProbe}'",),
        _probe_status,
    ),
    Cause(
        "engine-hung",
        "The engine hangs",
        80,
        "The engine has not answered for the watchdog's time, so the process ends to be started again: $reason.",
        (
            "kubectl -n $ns logs $pod --previous --tail=200",
            "# the last `request` lines before the end, and `dmesg` of its node (Xid)",
        ),
        _health_says("failed", r"(?i)has not answered|hang"),
    ),
    Cause(
        "engine-dead",
        "The engine died while it served",
        79,
        "The engine's process ended by itself. Several pods one after the other point at a "
        "request; one pod alone at its "
        "node.",
        ("kubectl -n $ns logs $pod --previous --tail=200",),
        either(
            logged(r"EngineDeadError|EngineCore encountered a fatal error|the engine (?:died|is dead)"),
            _health_says("failed"),
        ),
    ),
    Cause(
        "unloaded",
        "The model is unloaded",
        82,
        "Somebody unloaded the model through the repository API, so the pod is not ready.",
        ("kubectl -n $ns exec $pod -- curl -s -X POST localhost:8080/v2/repository/models/$name/load",),
        _health_says("unloaded"),
    ),
    Cause(
        "crash-loop",
        "The container ends again and again",
        45,
        "$container of $pod ends with code $code, and no row of the table knows its words. Its last line stands below.",
        ("kubectl -n $ns logs $pod -c $container --previous --tail=100",),
        _crash,
        last_resort=True,
    ),
    Cause(
        "pod-loading",
        "A pod loads its model",
        39,
        "$pod has been $state for $seconds s. Nothing is wrong so far: it gets ready when the model is warm.",
        ("kubectl -n $ns get pods -l serving.kserve.io/inferenceservice=$name -w",),
        _loading,
        DEGRADED,
        explains=("not-ready", "revision-image-or-config"),
        last_resort=True,
    ),
    Cause(
        "slow-start",
        "The model takes long to load",
        40,
        "$pod has been $state for $minutes minutes. A download from far away, a slow volume, or a large model: nothing "
        "says that it failed.",
        (
            "kubectl -n $ns logs $pod --all-containers --tail=20",
            "# faster next time: a volume claim or a LocalModelCache (inferenceservices/pvc-cached.yaml)",
        ),
        _slow,
        DEGRADED,
        last_resort=True,
    ),
)
