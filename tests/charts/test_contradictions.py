"""Values that contradict each other end with a sentence that names the value and says what to do."""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest

from tests.charts.support import CHART, Document, HelmError, refused, render, service, standard

GATEWAY: Document = {"cluster": {"gatewayAPI": True}}
DEMO: Document = {"demo": True, "device": "cpu"}
NEW: Document = {"storageUri": "hf://org/new"}
ZONES: Document = {"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule"}
PAIR: Document = {
    "chat": {"storageUri": "hf://org/model"},
    "here": {"storageUri": "hf://org/model", "deploymentMode": "Standard"},
}


def route(**values: Any) -> Document:
    return {"inferenceServices": PAIR, "routes": {"r": {"hosts": ["a.example.com"], **values}}}


def cache(**values: Any) -> Document:
    return {"modelCaches": {"m": values}}


def batch(**values: Any) -> Document:
    """A file of requests."""
    return {"batchJobs": {"b": values}}


def rollout(service: Document | None = None, **values: Any) -> Document:
    """A rollout Job for a service in Standard mode, which may have other values."""
    here = {"storageUri": "s3://b/model", "deploymentMode": "Standard", **(service or {})}
    return {**GATEWAY, "inferenceServices": {"r": here}, "rolloutJobs": {"r": values}}


def only(**values: Any) -> Document:
    """One InferenceService with exactly these values."""
    return {"inferenceServices": {"chat": values}}


CASES: dict[str, tuple[Document, str]] = {
    # Kubernetes' own terms.
    "a volume of no kind": (
        service(extraVolumes=[{"name": "a", "emptydir": {}}]),
        "inferenceServices.chat.extraVolumes[0]: Kubernetes has no field emptydir here, but",
    ),
    "a field deep down": (
        service(affinity={"podAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 1}]}}),
        "podAffinity.preferredDuringSchedulingIgnoredDuringExecution[0]: the field podAffinityTerm is missing",
    ),
    "a number where Kubernetes has text": (
        service(initContainers=[{"name": "a", "image": "b:1", "env": [{"name": "A", "value": 1}]}]),
        "env[0].value: Kubernetes asks for type string here, and this is of type integer; put it into quotes",
    ),
    "text where Kubernetes has a map": (
        service(networkPolicy={"enabled": True, "restrictEgress": True, "egress": [{"to": ["10.0.0.0/8"]}]}),
        "networkPolicy.egress[0].to[0]: Kubernetes asks for type object here, and this is of type string.",
    ),
    "a selector misspelt": (
        service(
            topologySpreadConstraints=[
                {
                    "maxSkew": 1,
                    "topologyKey": "zone",
                    "whenUnsatisfiable": "DoNotSchedule",
                    "labelSelector": {"matchLabel": {}},
                }
            ]
        ),
        "topologySpreadConstraints[0].labelSelector: Kubernetes has no field matchLabel here",
    ),
    "a field of the pod in a container": (
        {"runtimes": {"gpu": {"securityContext": {"fsGroup": 1}}}},
        "runtimes.gpu.securityContext: Kubernetes has no field fsGroup here",
    ),
    "a field of a Job": (
        cache(huggingFace={"repository": "a/b"}, job={"envFrom": [{"secret": {"name": "s"}}]}),
        "modelCaches.m.job.envFrom[0]: Kubernetes has no field secret here, but configMapRef, prefix, secretRef",
    ),
    "a mount of no volume": (
        service(extraVolumeMounts=[{"name": "models", "mountPath": "/x"}]),
        "extraVolumeMounts mounts the volume models, and there is none of that name; add it to extraVolumes",
    ),
    "a runtime's mount of no volume": (
        {"runtimes": {"cpu": {"extraVolumeMounts": [{"name": "a", "mountPath": "/x"}]}}},
        "runtimes.cpu: extraVolumeMounts mounts the volume a, and there is none of that name",
    ),
    "a Job's mount of no volume": (
        batch(claim="c", url="http://a", job={"extraVolumeMounts": [{"name": "models", "mountPath": "/x"}]}),
        "batchJobs.b.job: extraVolumeMounts mounts the volume models, and there is none of that name",
    ),
    "an init container's mount of no volume": (
        service(initContainers=[{"name": "a", "image": "b:1", "volumeMounts": [{"name": "c", "mountPath": "/x"}]}]),
        "initContainers.a mounts the volume c, and there is none of that name",
    ),
    "a worker's mount of a front end's file": (
        standard(
            storageUri="pvc://c/m",
            multiNode={"enabled": True},
            parallelism={"pipeline": 2},
            apiKeys={"secretName": "s"},
            extraVolumeMounts=[{"name": "keys", "mountPath": "/x"}],
        ),
        "extraVolumeMounts mounts the volume keys, and there is none of that name",
    ),
    "a mount over the model": (
        service(
            extraVolumes=[{"name": "a", "emptyDir": {}}],
            extraVolumeMounts=[{"name": "a", "mountPath": "/mnt/models/"}],
        ),
        "extraVolumeMounts mounts a at /mnt/models, where KServe mounts the model; take another path",
    ),
    "an init container with a name that is taken": (
        cache(huggingFace={"repository": "a/b"}, job={"initContainers": [{"name": "fill", "image": "a:1"}]}),
        "modelCaches.m.job: initContainers has fill, as another container of the pod is called; give it another name",
    ),
    "a volume that Knative refuses": (
        service(extraVolumes=[{"name": "a", "nfs": {"server": "b", "path": "/c"}}]),
        "inferenceServices.chat: the volume a is of a kind (nfs) that Knative refuses; set deploymentMode: Standard",
    ),
    "a volume twice": (
        service(extraVolumes=[{"name": "a", "emptyDir": {}}, {"name": "a", "secret": {"secretName": "s"}}]),
        "extraVolumes has a twice",
    ),
    "two mounts on one path": (
        service(extraVolumeMounts=[{"name": "tmp", "mountPath": "/x"}, {"name": "shm", "mountPath": "/x/"}]),
        "extraVolumeMounts has /x twice",
    ),
    "thousandths of a byte": (
        service(resources={"limits": {"memory": "512m"}}),
        "inferenceServices.chat.resources.limits.memory: 512m is less than a mebibyte",
    ),
    "an object of no kind": (
        {"extraObjects": ["metadata: {name: a}"]},
        "extraObjects[0]: an object has apiVersion, kind and metadata.name; this one has metadata",
    ),
    "an object that is no YAML": ({"extraObjects": ["a: b: c"]}, "extraObjects[0]: it is no object in YAML: "),
    "an object twice": (
        {"extraObjects": [{"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "a"}}] * 2},
        "extraObjects[1]: Secret /a is there twice",
    ),
    "an annotation of an object that is a number": (
        {"extraObjects": ["{apiVersion: v1, kind: Secret, metadata: {name: a, annotations: {b: 1}}}"]},
        "extraObjects[0]: metadata.annotations.b is no text; put it into quotes",
    ),
    # The model.
    "no model": (only(), "give exactly one of storageUri, storage, model and demo; 0 are given"),
    "two models": (service(demo=True), "give exactly one of storageUri, storage, model and demo; 2 are given"),
    "no storageUri where KServe would inject an agent": (
        only(model="org/model", modelFormat="kserve-vllm"),
        "without a storageUri and with modelFormat kserve-vllm, KServe takes the service for multi-model serving and "
        "puts an agent sidecar into its pods",
    ),
    "an adapter is fetched but the model is not": (
        only(model="org/model", lora={"adapters": [{"name": "a", "storageUri": "hf://org/a"}]}),
        "KServe fetches an adapter's storageUri only together with the model's",
    ),
    "adapters beside a mounted model": (
        only(storageUri="pvc://v/m", lora={"adapters": [{"name": "a", "storageUri": "hf://org/a"}]}),
        "a model from pvc:// or oci:// is mounted whole",
    ),
    "an adapter from a volume": (
        service(lora={"adapters": [{"name": "a", "storageUri": "pvc://v/a"}]}),
        "adapter a cannot come from pvc://v/a",
    ),
    "a token that nothing reads": (
        service(huggingFaceToken={"secretName": "s"}),
        "huggingFaceToken.secretName does nothing with a storageUri or demo",
    ),
    "adapters of both kinds": (
        service(lora={"adapters": [{"name": "a", "path": "/mnt/a"}], "watched": {"configMap": "c"}}),
        "list all of them in the ConfigMap of lora.watched",
    ),
    "adapters in a batch without adapters": (
        service(lora={"maxLoras": 2}),
        "lora.maxLoras does nothing without lora.adapters",
    ),
    "a rank without adapters": (service(lora={"maxRank": 16}), "lora.maxRank does nothing without lora.adapters"),
    "a runtime that is off": (
        {**service(), "runtimes": {"gpu": {"enabled": False}}},
        "it runs on runtimes.gpu, which is not enabled",
    ),
    # Arguments and environment.
    "a flag that has a value": (
        service(extraArgs=["--max-num-seqs=4"]),
        "extraArgs has --max-num-seqs; set maxNumSeqs instead, other values are derived from it",
    ),
    "a flag that the ports rely on": (service(extraArgs=["--http-port", "9000"]), "extraArgs has --http-port, which"),
    "a key in plain text": (service(extraArgs=["--api-key=x"]), "extraArgs has --api-key with a secret in plain text"),
    "a template on the command line": (
        service(extraArgs=["--override-generation-config={{ x }}"]),
        "has two opening braces; KServe fills placeholders",
    ),
    "a template in the environment": (
        service(env=[{"name": "A", "value": "{{ x }}"}]),
        "has two opening braces; KServe fills placeholders",
    ),
    "a blocked variable": (service(env=[{"name": "PYTHONPATH", "value": "/x"}]), "KServe refuses PYTHONPATH"),
    "a secret as plain text": (
        service(env=[{"name": "HF_TOKEN", "value": "x"}]),
        "HF_TOKEN looks like a secret and is given as plain text; use valueFrom.secretKeyRef",
    ),
    "a flag of a runtime that targets follow": (
        {"runtimes": {"gpu": {"extraArgs": ["--max_num_seqs=4"]}}},
        "extraArgs has --max-num-seqs, which belongs to each InferenceService or to the chart",
    ),
    "a template in a runtime": (
        {"runtimes": {"cpu": {"extraArgs": ["--x={{ y }}"]}}},
        "two opening braces in extraArgs or env would be taken for a placeholder of KServe",
    ),
    "a blocked variable of a runtime": (
        {"runtimes": {"multinode": {"env": [{"name": "TENSOR_PARALLEL_SIZE", "value": "8"}]}}},
        "KServe refuses TENSOR_PARALLEL_SIZE in the environment of a runtime",
    ),
    "a secret of a runtime as plain text": (
        {"runtimes": {"gpu": {"env": [{"name": "HF_TOKEN", "value": "x"}]}}},
        "runtimes.gpu: HF_TOKEN looks like a secret",
    ),
    "a flag in another spelling": (service(extraArgs=["--max_model_len", "4"]), "extraArgs has --max-model-len; set"),
    "a flag in vLLM's short spelling": (service(extraArgs=["-tp=4"]), "extraArgs has --tensor-parallel-size; set"),
    "a flag that takes GPUs": (
        service(extraArgs=["--data-parallel-size-local", "2"]),
        "extraArgs has --data-parallel-size-local; set parallelism or multiNode instead, GPUs are counted by them",
    ),
    "copies of the model by a flag": (
        service(extraArgs=["--data-parallel-size=2"]),
        "extraArgs has --data-parallel-size; set parallelism.data instead",
    ),
    "a flag of a runtime that takes GPUs": (
        {"runtimes": {"gpu": {"extraArgs": ["-tp", "4"]}}},
        "runtimes.gpu: extraArgs has --tensor-parallel-size, which belongs to each InferenceService or to the chart",
    ),
    "a setting by its variable": (
        service(env=[{"name": "KSERVE_VLLM_MAX_NUM_SEQS", "value": 4}]),
        "KSERVE_VLLM_MAX_NUM_SEQS in env is --max-num-seqs; set maxNumSeqs instead",
    ),
    "a port by its variable": (
        service(env=[{"name": "KSERVE_VLLM_HTTP_PORT", "value": "9000"}]),
        "KSERVE_VLLM_HTTP_PORT in env is --http-port, which GPUs, probes and ports of the chart rely on",
    ),
    "a variable that KServe sets": (
        {
            "inferenceServices": {
                "chat": {
                    "deploymentMode": "Standard",
                    "storageUri": "pvc://v/m",
                    "multiNode": {"enabled": True},
                    "parallelism": {"pipeline": 2},
                    "env": [{"name": "TENSOR_PARALLEL_SIZE", "value": "2"}],
                }
            }
        },
        "KServe sets TENSOR_PARALLEL_SIZE of a multiNode service itself; set parallelism",
    ),
    "a cloud's secret as plain text": (
        service(env=[{"name": "AWS_SECRET_ACCESS_KEY", "value": "x"}]),
        "AWS_SECRET_ACCESS_KEY looks like a secret and is given as plain text",
    ),
    "a password in an address": (
        service(env=[{"name": "KSERVE_VLLM_REDIS_URL", "value": "redis://:pw@redis:6379/0"}]),
        "KSERVE_VLLM_REDIS_URL looks like a secret and is given as plain text",
    ),
    "a password by its short name": (
        service(env=[{"name": "MYSQL_PWD", "value": "x"}]),
        "MYSQL_PWD looks like a secret and is given as plain text",
    ),
    "a key inside a connection string": (
        service(env=[{"name": "STORE", "value": "Protocol=https;AccountName=a;AccountKey=abc=="}]),
        "STORE looks like a secret and is given as plain text",
    ),
    "a password in an address of a value": (
        service(usageSink="https://user:pw@sink.example.com"),
        "inferenceServices.chat.usageSink: the address has a password in plain text",
    ),
    "a password in an address of a list": (
        service(lora={"adapters": [{"name": "a", "storageUri": "https://user:pw@a.example.com/b"}]}),
        "inferenceServices.chat.lora.adapters[0].storageUri: the address has a password in plain text",
    ),
    "a password in Prometheus's address": (
        {"cluster": {"prometheusAddress": "http://user:pw@prometheus:9090"}},
        "cluster.prometheusAddress: the address has a password in plain text",
    ),
    "a password in a hub's address": (
        cache(huggingFace={"repository": "a/b", "endpoint": "https://user:pw@hub.example.com"}),
        "modelCaches.m.huggingFace.endpoint: the address has a password in plain text",
    ),
    "a password in the address for a batch": (
        batch(claim="c", url="http://user:pw@chat"),
        "batchJobs.b.url: the address has a password in plain text",
    ),
    "a token of a cache's Job": (
        cache(huggingFace={"repository": "a/b"}, job={"env": [{"name": "HF_TOKEN", "value": "x"}]}),
        "modelCaches.m: HF_TOKEN looks like a secret",
    ),
    "a key of a batch's Job": (
        batch(claim="c", url="http://chat", job={"env": [{"name": "OPENAI_API_KEY", "value": "x"}]}),
        "batchJobs.b: OPENAI_API_KEY looks like a secret",
    ),
    "a token of a rollout's Job": (
        rollout(model="s3://b/new", job={"env": [{"name": "HF_TOKEN", "value": "x"}]}),
        "rolloutJobs.r: HF_TOKEN looks like a secret",
    ),
    "an account that is called as a rollout's": (
        {**rollout(model="s3://b/new"), "serviceAccounts": {"r-rollout": {}}},
        "the account that it writes would be called as serviceAccounts.r-rollout",
    ),
    "a password on the command line": (
        service(extraArgs=["--usage-sink=https://user:pw@sink.example.com"]),
        "extraArgs has --usage-sink with a secret in plain text",
    ),
    "a token on a runtime's command line": (
        {"runtimes": {"cpu": {"extraArgs": ["--hf-token=hf_abc"]}}},
        "runtimes.cpu: extraArgs has --hf-token with a secret in plain text",
    ),
    # GPUs.
    "GPUs fewer than tensor parallel size": (
        service(gpu={"count": 2}, parallelism={"tensor": 4}),
        "gpu.count is 2, but the parallelism (tensor 4, pipeline 1, data 1) needs 4 GPUs in a pod",
    ),
    "GPUs fewer than tensor times pipeline": (
        service(gpu={"count": 2}, parallelism={"tensor": 2, "pipeline": 2}),
        "gpu.count is 2, but the parallelism (tensor 2, pipeline 2, data 1) needs 4 GPUs in a pod",
    ),
    "a share of a GPU for several": (
        service(gpu={"resource": "aliyun.com/gpu-mem", "count": 8}, parallelism={"tensor": 2}),
        "aliyun.com/gpu-mem is a share of one GPU, but the parallelism needs 2 GPUs",
    ),
    "GPUs on a CPU": (service(device="cpu", gpu={"count": 1}), "gpu.count does nothing with device cpu"),
    # Multi-node.
    "multi-node in Knative": (
        only(storageUri="pvc://v/m", multiNode={"enabled": True}, parallelism={"pipeline": 2}),
        "multiNode works in Standard mode only",
    ),
    "multi-node on CPUs": (standard(device="cpu", multiNode={"enabled": True}), "multiNode needs device gpu"),
    "multi-node with a fetched model": (
        standard(multiNode={"enabled": True}, parallelism={"pipeline": 2}),
        "multiNode takes the model from pvc:// or oci:// only",
    ),
    "multi-node that scales": (
        standard(
            storageUri="pvc://v/m",
            multiNode={"enabled": True},
            parallelism={"pipeline": 2},
            autoscaling={"class": "keda"},
        ),
        "multiNode does not scale; set autoscaling.class to none",
    ),
    "multi-node on one node": (
        standard(storageUri="pvc://v/m", multiNode={"enabled": True}, parallelism={"tensor": 8}),
        "parallelism.pipeline must be 2 or more",
    ),
    "two groups of nodes": (
        standard(
            storageUri="pvc://v/m",
            multiNode={"enabled": True},
            parallelism={"pipeline": 2},
            autoscaling={"minReplicas": 2},
        ),
        "KServe runs one group of nodes",
    ),
    "multi-node with a count of GPUs": (
        standard(storageUri="pvc://v/m", multiNode={"enabled": True}, parallelism={"pipeline": 2}, gpu={"count": 2}),
        "with multiNode KServe gives each node parallelism.tensor GPUs",
    ),
    "multi-node on shares": (
        standard(
            storageUri="pvc://v/m",
            multiNode={"enabled": True},
            parallelism={"pipeline": 2},
            gpu={"resource": "aliyun.com/gpu-mem"},
        ),
        "aliyun.com/gpu-mem is a share of a GPU, and a multiNode service takes whole ones",
    ),
    "multi-node on a KServe that deletes its workers": (
        {
            **standard(storageUri="pvc://v/m", multiNode={"enabled": True}, parallelism={"pipeline": 2}),
            "cluster": {"kserveVersion": "v0.20.1"},
        },
        "KServe 0.20.1 deletes the workers of a multiNode service at every reconcile",
    ),
    # Names.
    "a name too long for Standard": (
        {"inferenceServices": {"a" * 49: {"demo": True, "device": "cpu", "deploymentMode": "Standard"}}},
        "the name has 49 characters and may have 48: KServe labels its pods isvc.NAME-predictor in Standard mode",
    ),
    "a name too long for several nodes": (
        {
            "inferenceServices": {
                "a" * 42: {
                    "deploymentMode": "Standard",
                    "storageUri": "pvc://v/m",
                    "multiNode": {"enabled": True},
                    "parallelism": {"pipeline": 2},
                }
            }
        },
        "the name has 42 characters and may have 41: KServe labels the workers of a multiNode service",
    ),
    "a name too long for tags": (
        {"inferenceServices": {"a" * 47: {"demo": True, "device": "cpu", "tagRouting": True}}},
        "the name has 47 characters and may have 46: with tagRouting Knative calls a revision latest-NAME-predictor",
    ),
    "a name too long for a canary": (
        {"inferenceServices": {"a" * 49: {"storageUri": "hf://a/b", "canary": {**NEW, "percent": 1}}}},
        "the name has 49 characters and may have 48: with a canary Knative calls the other revision",
    ),
    "a name too long for Knative": (
        {"inferenceServices": {"a" * 54: {"demo": True, "device": "cpu"}}},
        "the name has 54 characters and may have 53: Knative's Service of it ends in -predictor",
    ),
    "a name too long for its variant": (
        {
            "inferenceServices": {
                "a" * 43: {
                    "deploymentMode": "Standard",
                    "storageUri": "hf://a/b",
                    "canary": {**NEW, "percent": 1, "variant": "quick"},
                }
            },
            **GATEWAY,
        },
        "name and canary.variant together may have 47 characters",
    ),
    "a name too long with its namespace": (
        {
            **standard(),
            "cluster": {"domainTemplate": "{{ .Name }}-{{.Namespace}}-" + "a" * 50 + ".{{ .IngressDomain }}"},
        },
        "KServe's host name for it would begin with chat-predictor-models-aaaaa",
    ),
    "a canary that is called as another service": (
        {
            "inferenceServices": {
                "chat": {"deploymentMode": "Standard", "storageUri": "hf://a/b", "canary": {**NEW, "percent": 1}},
                "chat-canary": {"deploymentMode": "Standard", "storageUri": "hf://a/b"},
            },
            **GATEWAY,
        },
        "its canary's objects would be called as those of inferenceServices.chat-canary; change canary.variant",
    ),
    "a route that is called as KServe's own": (
        {
            "inferenceServices": {"chat-route": {"storageUri": "hf://a/b", "deploymentMode": "Standard"}},
            "routes": {"chat": {"hosts": ["a.example.com"], "inferenceService": "chat-route"}},
        },
        "its object would be called chat-route, as the one that KServe writes for inferenceServices.chat-route",
    ),
    "an earlier name beside its new one": (
        service(canary={"percent": 1, "storageUri": "hf://org/new", "name": "a", "variant": "b"}),
        "canary.name is the earlier name of canary.variant, and both are given; take canary.name out",
    ),
    "a name of KServe's": (service(args=["--seed=1"]), "there is no args; write extraArgs"),
    # Runtimes.
    "no runtime at all": (
        {**service(), "runtimes": {"enabled": False}},
        "this release writes no runtimes (runtimes.enabled); name one of another release in `runtime`",
    ),
    "a runtime by name that follows": (
        service(runtime="kserve-vllm-cpu"),
        "runtime kserve-vllm-cpu is this release's own; leave `runtime` empty",
    ),
    "a runtime of one's own that is called as the chart's": (
        {"runtimes": {"extra": {"kserve-vllm-gpu": {}}}},
        "runtimes.extra.kserve-vllm-gpu: runtimes.gpu has this name; take another one",
    ),
    "a secret of a runtime of one's own": (
        {"runtimes": {"extra": {"mine": {"env": [{"name": "HF_TOKEN", "value": "x"}]}}}},
        "runtimes.extra.mine: HF_TOKEN looks like a secret",
    ),
    "a flag of a runtime of one's own": (
        {"runtimes": {"extra": {"mine": {"extraArgs": ["--port=1"]}}}},
        "runtimes.extra.mine: extraArgs has --port, which belongs to each InferenceService or to the chart",
    ),
    "KV cache of a CPU on a GPU": (
        {"runtimes": {"extra": {"mine": {"kvCacheGiB": 9}}}},
        "runtimes.extra.mine: kvCacheGiB does nothing except with base cpu",
    ),
    # Ways out.
    "TLS in the pod": (service(extraArgs=["--ssl-certfile=/a"]), "extraArgs has --ssl-certfile, which probes"),
    "TLS in the pod, as KServe names it": (
        service(env=[{"name": "KSERVE_TLS_CERT_FILE", "value": "/a"}]),
        "KSERVE_TLS_CERT_FILE in env is --ssl-certfile, which GPUs, probes",
    ),
    "a password of a proxy": (
        {**service(), "proxy": {"httpsProxy": "http://me:secret@proxy:3128"}},
        "proxy.httpsProxy: it has a password in plain text",
    ),
    "certificates from two places": (
        {**service(), "caBundle": {"configMap": "a", "secretName": "b"}},
        "caBundle: give one of configMap and secretName",
    ),
    "a proxy for nobody": (
        {"proxy": {"httpProxy": "http://proxy:3128"}},
        "proxy.httpProxy does nothing without inferenceServices and without a Job",
    ),
    "the chart's own condition": ({"enabled": False}, "enabled is for the condition of a parent chart"),
    "an alert that is not there": (
        {"monitoring": {"prometheusRule": {"enabled": True, "alerts": {"Nonsense": {"for": "1m"}}}}},
        "monitoring.prometheusRule.alerts: there is no alert Nonsense; there are KServeEngine",
    ),
    "a canary of a stored model": (
        only(storage={"path": "a"}, canary={"percent": 1, "model": "org/new"}),
        "a model in `storage` has no canary",
    ),
    "a cache in no Redis": (service(responseCache="redis"), "responseCache redis needs the address of a Redis"),
    "compiled in two places": (
        service(coldStart={"cache": {"claim": "compiled", "nodePath": "/cache"}}),
        "coldStart.cache has both claim and nodePath",
    ),
    "GPUs among the other resources": (
        service(resources={"limits": {"nvidia.com/gpu": 2}}),
        "resources.limits has nvidia.com/gpu; set gpu.count instead",
    ),
    "claims in Knative": (
        service(resourceClaims=[{"name": "a", "resourceClaimName": "b"}]),
        "resourceClaims does nothing in Knative mode",
    ),
    "claims over several nodes": (
        standard(
            storageUri="pvc://v/m",
            multiNode={"enabled": True},
            parallelism={"pipeline": 2},
            resourceClaims=[{"name": "a", "resourceClaimName": "b"}],
        ),
        "resourceClaims does nothing with multiNode, whose GPUs KServe counts",
    ),
    # Other engines; tests/charts/test_engines.py has more.
    "an engine on a device that it lacks": (
        service(engine="sglang", device="cpu", apiKeys={"secretName": "s"}),
        "inferenceServices.chat: SGLang runs on gpu only; set device.",
    ),
    "what another engine cannot do": (
        service(engine="sglang", apiKeys={"secretName": "s"}),
        "SGLang cannot do apiKeys.secretName: keys and tenants are kserve-vllm's; check keys at the gateway.",
    ),
    "a model that Triton would have to load": (
        only(engine="triton", model="org/model"),
        "Triton with TensorRT-LLM takes no model; give storageUri with the repository",
    ),
    "a flag of another engine that has a value": (
        service(engine="tgi", extraArgs=["--num-shard=2"]),
        "extraArgs has --num-shard; set parallelism.tensor instead, other values are derived from it.",
    ),
    "another engine's port": (
        service(engine="tgi", extraArgs=["-p", "1"]),
        "extraArgs has -p, which probes, ports and Services of the chart rely on.",
    ),
    "a setting of kserve-vllm for another engine": (
        service(engine="tgi", env=[{"name": "KSERVE_VLLM_SEED", "value": 1}, {"name": "MODEL_ID", "value": "x"}]),
        "KSERVE_VLLM_SEED in env is read by kserve-vllm alone, and Text Generation Inference is another engine.",
    ),
    "a variable of another engine that has a value": (
        service(engine="tgi", env=[{"name": "MODEL_ID", "value": "x"}]),
        "MODEL_ID in env is the chart's; set model instead.",
    ),
    "a metric that another engine lacks": (
        standard(engine="tgi", autoscaling={"class": "keda", "metric": "kv-cache"}),
        "Text Generation Inference has no metric for autoscaling.metric kv-cache; it has cpu and memory",
    ),
    "a quantile of another engine without a name": (
        standard(engine="sglang", autoscaling={"class": "hpa", "metric": "ttft-p99"}),
        "give autoscaling.hpaMetricName, under which prometheus-adapter serves the quantile",
    ),
    "an engine's runtime that is off": (
        {**service(engine="tgi"), "runtimes": {"engines": {"tgi": {"enabled": False}}}},
        "it runs on runtimes.engines.tgi, which is not enabled",
    ),
    "an engine's runtime that nobody uses": (
        {"runtimes": {"engines": {"tgi": {"sharedMemory": "2Gi"}}}},
        "runtimes.engines.tgi: what it says does nothing, since no InferenceService has engine tgi",
    ),
    "a flag of an engine's runtime that is the chart's": (
        {"runtimes": {"engines": {"tgi": {"enabled": True, "extraArgs": ["--port=1"]}}}},
        "runtimes.engines.tgi: extraArgs has --port, which belongs to each InferenceService or to the chart.",
    ),
    "an engine that is not built": (
        cache(huggingFace={"repository": "a/b"}, tensorrtLLM={"tensor": 2}),
        "tensorrtLLM.tensor does nothing without tensorrtLLM.model",
    ),
    # What the API server would refuse, or find nothing by.
    "a request above its limit": (
        service(resources={"requests": {"cpu": 2}, "limits": {"cpu": "1500m"}}),
        "inferenceServices.chat.resources: requests.cpu 2 is above limits.cpu 1500m, and such a pod is refused",
    ),
    "a request of a Job above its limit": (
        cache(
            huggingFace={"repository": "a/b"},
            job={"resources": {"requests": {"memory": "1.5Gi"}, "limits": {"memory": "1G"}}},
        ),
        "modelCaches.m.job.resources: requests.memory 1.5Gi is above limits.memory 1G",
    ),
    "a request of the tests above its limit": (
        {**service(), "tests": {"resources": {"requests": {"cpu": 1}, "limits": {"cpu": "50m"}}}},
        "tests.resources: requests.cpu 1 is above limits.cpu 50m",
    ),
    "more devices than are asked for": (
        service(resources={"requests": {"rdma/ib": 1}, "limits": {"rdma/ib": 2}}),
        "of rdma/ib a pod has what it asks for, so that requests and limits have to be the same",
    ),
    "half a device": (service(resources={"limits": {"rdma/ib": "500m"}}), "limits.rdma/ib is 500m, and of devices"),
    "a label that selects": (
        service(podLabels={"serving.kserve.io/inferenceservice": "x"}),
        "a label has serving.kserve.io/inferenceservice, by which the chart's PodMonitor, NetworkPolicy and",
    ),
    "a service that is called as what KServe writes for another": (
        {"inferenceServices": {"chat": {"storageUri": "hf://a/b"}, "chat-predictor": {"storageUri": "hf://a/b"}}},
        "inferenceServices.chat: KServe writes objects called chat-predictor for it, as for",
    ),
    "adapters of one name": (
        service(lora={"adapters": [{"name": "a", "path": "/a"}, {"name": "a", "path": "/b"}]}),
        "inferenceServices.chat: lora.adapters has a twice; take one out",
    ),
    "an adapter that is called as the model": (
        service(servedNames=["b"], lora={"adapters": [{"name": "b", "path": "/a"}]}),
        "adapter b is called as the model itself",
    ),
    "an engine built into its model": (
        cache(huggingFace={"repository": "a/b"}, tensorrtLLM={"model": "chat", "directory": "model"}),
        "directory and tensorrtLLM.directory are the same, and the repository would be written into the model",
    ),
    "runtimes of one name": (
        {"runtimes": {"gpu": {"name": "a"}, "cpu": {"name": "a"}}},
        "runtimes.cpu: runtimes.gpu has this name; take another one",
    ),
    "an engine's runtime that is called as the chart's": (
        {**service(engine="sglang"), "runtimes": {"engines": {"sglang": {"name": "kserve-vllm"}}}},
        "runtimes.engines.sglang: runtimes.gpu has this name; take another one",
    ),
    # Flags.
    "a flag and its value in one word": (
        service(extraArgs=["--seed 5"]),
        'extraArgs has "--seed 5", which no parser takes apart; write FLAG=VALUE, or flag and value as two items',
    ),
    "a flag of one letter with its value attached": (service(extraArgs=["-n2"]), "extraArgs has --nnodes; set"),
    "a feature by its flag": (service(extraArgs=["--usage-sink", "log"]), "extraArgs has --usage-sink; set usageSink"),
    "a flag of the batch that has a value": (
        batch(claim="c", serverArgs=["--demo", "--out=/x"]),
        "batchJobs.b: serverArgs has --out; set output instead",
    ),
    # Scaling.
    "a minimum by its annotation": (
        service(podAnnotations={"autoscaling.knative.dev/min-scale": 3}),
        "an annotation has autoscaling.knative.dev/min-scale; set autoscaling.minReplicas instead",
    ),
    "a minimum by the annotation's earlier spelling": (
        service(annotations={"autoscaling.knative.dev/minScale": 3}),
        "an annotation has autoscaling.knative.dev/minScale; set autoscaling.minReplicas instead",
    ),
    "another autoscaler of Knative by its annotation": (
        service(annotations={"autoscaling.knative.dev/class": "hpa.autoscaling.knative.dev"}),
        "an annotation has autoscaling.knative.dev/class; set autoscaling.class instead",
    ),
    "a deadline below the startup probe by its annotation": (
        service(podAnnotations={"serving.knative.dev/progress-deadline": "60s"}),
        "an annotation has serving.knative.dev/progress-deadline; set progressDeadlineSeconds instead",
    ),
    "tags by their annotation": (
        service(annotations={"serving.kserve.io/enable-tag-routing": "true"}),
        "an annotation has serving.kserve.io/enable-tag-routing; set tagRouting instead",
    ),
    "no pods at first by the annotation": (
        service(podAnnotations={"autoscaling.knative.dev/initial-scale": 0}),
        "an annotation has autoscaling.knative.dev/initial-scale; set autoscaling.knative.initialScale instead",
    ),
    "zones that are wished for and have to be": (
        service(topologySpreadConstraints=[{**ZONES, "whenUnsatisfiable": "ScheduleAnyway", "minDomains": 2}]),
        "minDomains is for whenUnsatisfiable DoNotSchedule alone",
    ),
    "a label of a spread twice": (
        service(
            topologySpreadConstraints=[
                {**ZONES, "labelSelector": {"matchLabels": {"a": "b"}}, "matchLabelKeys": ["a"]},
            ]
        ),
        "topologySpreadConstraints: a is in matchLabelKeys and in labelSelector",
    ),
    "an affinity of a Job that Kubernetes does not know": (
        batch(claim="c", url="http://a", job={"affinity": {"nodeAffinity": {"required": []}}}),
        "batchJobs.b.job.affinity.nodeAffinity: Kubernetes has no field required here",
    ),
    "an affinity of the tests that Kubernetes does not know": (
        {**service(), "tests": {"affinity": {"nodeAffinity": {"required": []}}}},
        "tests.affinity.nodeAffinity: Kubernetes has no field required here",
    ),
    "a share of the cache in percent": (
        standard(autoscaling={"class": "keda", "metric": "kv-cache", "target": 80}),
        "autoscaling.target for kv-cache is a share of the cache, at most 1; 80 would never be reached",
    ),
    "a target above the hard limit": (
        service(autoscaling={"target": 50, "knative": {"containerConcurrency": 10}}),
        "autoscaling.target 50 is above autoscaling.knative.containerConcurrency 10, which Knative then takes instead",
    ),
    "a Redis behind a closed door": (
        service(
            redis={"secretName": "s"},
            networkPolicy={"enabled": True, "restrictEgress": True, "egressCIDRs": ["10.0.0.0/8"]},
        ),
        "networkPolicy.restrictEgress lets nothing out to where redis.secretName leads; add a rule to",
    ),
    "records behind a closed door": (
        service(
            usageSink="https://sink:8443",
            networkPolicy={"enabled": True, "restrictEgress": True, "egressCIDRs": ["10.0.0.0/8"]},
        ),
        "networkPolicy.restrictEgress lets nothing out to where usageSink leads",
    ),
    # Routes that take from each other.
    "a host of two routes": (
        {
            "inferenceServices": PAIR,
            "routes": {name: {"hosts": ["a.example.com"], "inferenceService": "here"} for name in ("r", "s")},
        },
        "routes.s: host a.example.com is answered by routes.r already, at the same gateway",
    ),
    "a header twice": (
        route(
            inferenceService="here",
            headerRoutes=[{"header": name, "value": "b", "inferenceService": "here"} for name in ("x-a", "X-A")],
        ),
        "routes.r: headerRoutes has x-a: b twice, and the second one is never asked",
    ),
    "more rules than a route has": (
        route(
            inferenceService="here",
            headerRoutes=[{"header": "x-a", "value": str(n), "inferenceService": "here"} for n in range(16)],
        ),
        "routes.r: an HTTPRoute has at most 16 rules, and this one would have 17",
    ),
    "two rules for one host's pods": (
        {
            "inferenceServices": PAIR,
            "routes": {
                name: {
                    "type": "Istio",
                    "hosts": [f"{name}.example.com"],
                    "inferenceService": "here",
                    "outlierEjection": {"enabled": True},
                }
                for name in ("r", "s")
            },
        },
        "routes.s: routes.r has outlierEjection for here already, and Istio takes one DestinationRule for a host",
    ),
    # Secrets; more of their looks are below.
    "a token of an init container": (
        service(initContainers=[{"name": "i", "image": "i:1", "env": [{"name": "HF_TOKEN", "value": "x"}]}]),
        "inferenceServices.chat.initContainers.i: HF_TOKEN looks like a secret",
    ),
    "a token on an init container's command line": (
        cache(
            huggingFace={"repository": "a/b"},
            job={"initContainers": [{"name": "i", "image": "i:1", "args": ["--api-key=x"]}]},
        ),
        "modelCaches.m.job.initContainers.i: its command has a secret in plain text",
    ),
    "a key of a storage": (
        only(storage={"path": "a", "parameters": {"secret_access_key": "x"}}),
        "storage.parameters.secret_access_key: it looks like a secret and is given as plain text",
    ),
    "a signed address": (
        service(storageUri="https://h/m?X-Amz-Signature=abc"),
        "inferenceServices.chat.storageUri: it has a secret in plain text, which all see who may read the objects",
    ),
    "a token in an annotation of all objects": (
        {"commonAnnotations": {"a": "Bearer abcdefgh"}},
        "commonAnnotations.a: it has a secret in plain text",
    ),
    # Nothing.
    "a default that no service uses": (
        {**service(), "inferenceServiceDefaults": {"rollout": "surge"}},
        "inferenceServiceDefaults: rollout does nothing for any InferenceService: it does nothing in Knative mode",
    ),
    "monitoring that is off": (
        {"monitoring": {"podMonitor": {"interval": "5s"}}},
        "monitoring.podMonitor.interval does nothing while monitoring.podMonitor.enabled is false",
    ),
    # Time.
    "a timeout over the cluster's limit": (
        service(timeoutSeconds=900),
        "timeoutSeconds is 900, but Knative refuses more than the cluster's max-revision-timeout-seconds of 600",
    ),
    "a grace in Knative": (
        service(terminationGracePeriodSeconds=300),
        "terminationGracePeriodSeconds does nothing in Knative mode",
    ),
    "a drain longer than the grace": (
        standard(terminationGracePeriodSeconds=60, drain={"timeoutSeconds": 120}),
        "the drain takes 130 s (delay 10, timeout 120), but the pod is killed after 60 s; raise "
        "terminationGracePeriodSeconds",
    ),
    "a drain longer than Knative's timeout": (
        service(timeoutSeconds=100, drain={"timeoutSeconds": 120}),
        "the drain takes 120 s (delay 0, timeout 120), but the pod is killed after 100 s; raise timeoutSeconds",
    ),
    "a progress deadline in Standard": (
        standard(progressDeadlineSeconds=1200),
        "progressDeadlineSeconds does nothing in Standard mode",
    ),
    "a deadline before the startup probe's": (
        service(progressDeadlineSeconds=1200),
        "Knative would give up after 1200 s, while the startup probe still allows 2400 s",
    ),
    "a rollout in Knative": (service(rollout="replace"), "rollout does nothing in Knative mode"),
    "a rollout of several nodes": (
        standard(storageUri="pvc://v/m", multiNode={"enabled": True}, parallelism={"pipeline": 2}, rollout="surge"),
        "KServe replaces all nodes of a multiNode service at once",
    ),
    # Autoscaling.
    "a mode by its annotation": (
        service(annotations={"serving.kserve.io/deploymentMode": "Standard"}),
        "an annotation has serving.kserve.io/deploymentMode; set deploymentMode instead",
    ),
    "a class by an annotation of all objects": (
        {**standard(), "commonAnnotations": {"serving.kserve.io/autoscalerClass": "hpa"}},
        "an annotation has serving.kserve.io/autoscalerClass; set autoscaling.class instead",
    ),
    "kpa as autoscaler class": (service(autoscaling={"class": "kpa"}), "KServe refuses kpa as autoscalerClass"),
    "an HPA in Knative": (
        service(autoscaling={"class": "hpa"}),
        "autoscaling.class hpa does not exist in Knative mode; it takes knative",
    ),
    "Knative's autoscaler in Standard": (
        standard(autoscaling={"class": "knative"}),
        "autoscaling.class knative does not exist in Standard mode; it takes none, hpa, keda",
    ),
    "a metric that Knative does not take": (
        service(autoscaling={"metric": "queue-depth"}),
        "autoscaling.metric queue-depth cannot be used by knative in Knative mode; it takes concurrency, rps",
    ),
    "a metric that KEDA does not take": (
        standard(autoscaling={"class": "keda", "metric": "concurrency"}),
        "autoscaling.metric concurrency cannot be used by keda in Standard mode; it takes queue-depth, kv-cache, "
        "ttft-p99",
    ),
    "a metric that HPA does not take": (
        standard(autoscaling={"class": "hpa", "metric": "rps"}),
        "autoscaling.metric rps cannot be used by hpa in Standard mode",
    ),
    "a metric for a fixed number": (
        standard(autoscaling={"metric": "cpu"}),
        "autoscaling.metric cpu cannot be used by none in Standard mode; it takes none",
    ),
    "a target for a fixed number": (
        standard(autoscaling={"target": 3}),
        "autoscaling.target does nothing with autoscaling.class none",
    ),
    "requests per second without a target": (
        service(autoscaling={"metric": "rps"}),
        "requests per second cannot be derived from a profile; give autoscaling.target",
    ),
    "half a request": (
        service(autoscaling={"target": 1.5}),
        "autoscaling.target for concurrency must be a whole number",
    ),
    "maxReplicas below minReplicas": (
        service(autoscaling={"minReplicas": 5, "maxReplicas": 2}),
        "autoscaling.maxReplicas 2 is below minReplicas 5",
    ),
    "a fixed number with room above": (
        standard(autoscaling={"maxReplicas": 4}),
        "autoscaling.class none keeps minReplicas pods; maxReplicas 4 would never be reached",
    ),
    "scale to zero in Standard": (
        standard(autoscaling={"class": "keda", "minReplicas": 0}),
        "only Knative scales to zero: without a pod there is no metric",
    ),
    "a knob of Knative in Standard": (
        standard(autoscaling={"knative": {"windowSeconds": 60}}),
        "autoscaling.knative.windowSeconds does nothing in Standard mode",
    ),
    "retention of a pod that stays": (
        service(autoscaling={"knative": {"scaleToZeroRetentionSeconds": 60}}),
        "autoscaling.knative.scaleToZeroRetentionSeconds does nothing while autoscaling.minReplicas is more than 0",
    ),
    "stabilization in Knative": (
        service(autoscaling={"stabilization": {"scaleDownSeconds": 60}}),
        "autoscaling.stabilization.scaleDownSeconds does nothing except with autoscaling.class hpa or keda",
    ),
    "KEDA's credentials for an HPA": (
        standard(autoscaling={"class": "hpa", "kedaAuthentication": {"name": "x"}}),
        "autoscaling.kedaAuthentication.name does nothing except with autoscaling.class keda",
    ),
    "a mode of credentials without a name": (
        standard(autoscaling={"class": "keda", "kedaAuthentication": {"mode": "basic"}}),
        "autoscaling.kedaAuthentication.mode does nothing without autoscaling.kedaAuthentication.name",
    ),
    "a metric's name for KServe's own HPA": (
        standard(autoscaling={"class": "hpa", "metric": "cpu", "hpaMetricName": "x"}),
        "autoscaling.hpaMetricName does nothing except with autoscaling.class hpa on a metric of vLLM",
    ),
    # Canary.
    "a canary percent in Standard without the Gateway API": (
        standard(canary={"percent": 10, "storageUri": "hf://org/new"}),
        "a canary percent in Standard mode needs KServe's Gateway API support (enableGatewayApi); without it KServe "
        "ignores it silently",
    ),
    "a canary without a percent": (
        service(canary={"storageUri": "hf://org/new"}),
        "canary.storageUri does nothing without canary.percent",
    ),
    "a canary without a model": (service(canary={"percent": 10}), "the canary's model must come the same way"),
    "a canary of a demo": (only(demo=True, canary={"percent": 10}), "the canary needs a model of its own"),
    "a canary with two models": (
        service(canary={"percent": 10, "storageUri": "hf://org/new", "model": "org/new"}),
        "give one of canary.storageUri and canary.model",
    ),
    "a canary that comes another way": (
        service(canary={"percent": 10, "model": "org/new"}),
        "the canary's model must come the same way as the service's",
    ),
    "pods of a canary in Knative": (
        service(canary={"percent": 10, "storageUri": "hf://org/new", "replicas": 1}),
        "canary.replicas does nothing in Knative mode",
    ),
    "a tag in Standard": (
        standard(tagRouting=True),
        "tagRouting does nothing in Standard mode",
    ),
    "a canary of several nodes": (
        {
            **standard(
                storageUri="pvc://v/m",
                multiNode={"enabled": True},
                parallelism={"pipeline": 2},
                canary={"percent": 10, "storageUri": "pvc://v/n"},
            ),
            **GATEWAY,
        },
        "KServe has no canary for multi-node services",
    ),
    "a canary with fetched adapters": (
        {
            **standard(
                canary={"percent": 10, "storageUri": "hf://org/new"},
                lora={"adapters": [{"name": "a", "storageUri": "hf://org/a"}]},
            ),
            **GATEWAY,
        },
        "KServe does not fetch adapters for a canary in Standard mode",
    ),
    "a canary on a KServe that does not split": (
        {
            **standard(canary={"percent": 10, "storageUri": "hf://org/new"}),
            "cluster": {"gatewayAPI": True, "kserveVersion": "0.20.0"},
        },
        "KServe 0.20.0 sends no traffic to a Standard canary",
    ),
    "more pods of the canary than of the service": (
        {**standard(canary={"percent": 50, "storageUri": "hf://org/new", "replicas": 2}), **GATEWAY},
        "canary.replicas 2 is more than minReplicas 1, which KServe refuses",
    ),
    # Around the pods.
    "gRPC in Knative by grpcio's server": (
        service(grpc={"enabled": True}, extraArgs=["--grpc-server=grpcio"]),
        "Knative takes one port, and with --grpc-server=grpcio gRPC is not answered on it",
    ),
    "gRPC in Knative without HTTP/2": (
        service(grpc={"enabled": True}, extraArgs=["--http2", "false"]),
        "Knative takes one port, and with --http2 false gRPC is not answered on it",
    ),
    "gRPC in Knative without HTTP/2, by environment": (
        service(grpc={"enabled": True}, env=[{"name": "KSERVE_VLLM_HTTP2", "value": "false"}]),
        "Knative takes one port, and with --http2=false gRPC is not answered on it",
    ),
    "gRPC that is switched off": (
        standard(grpc={"enabled": True}, extraArgs=["--grpc-server=off"]),
        "--grpc-server=off and grpc.enabled contradict each other",
    ),
    "a disruption budget in Knative": (
        service(podDisruptionBudget={"enabled": True}),
        "podDisruptionBudget.enabled does nothing in Knative mode",
    ),
    "open blocks without closed egress": (
        service(networkPolicy={"enabled": True, "egressCIDRs": ["203.0.113.0/24"]}),
        "networkPolicy.egressCIDRs does nothing while networkPolicy.restrictEgress is false",
    ),
    # Routes.
    "a route without a host": ({**service(), "routes": {"r": {"inferenceService": "chat"}}}, "give at least one host"),
    "a route without a service": (route(), "give inferenceService, the name of the one that answers"),
    "a route to nowhere": (route(inferenceService="other"), "there is no inferenceServices.other"),
    "an HTTPRoute to Knative": (
        route(inferenceService="chat"),
        "in Knative mode the Service of chat points at Knative's gateway and cannot be the backend of an HTTPRoute",
    ),
    "ejection behind Knative's gateway": (
        route(type="Istio", inferenceService="chat", outlierEjection={"enabled": True}),
        "outlierEjection needs the pods behind the route",
    ),
    "ejection by the Gateway API": (
        route(inferenceService="here", outlierEjection={"enabled": True}),
        "outlierEjection is Istio's; set type: Istio",
    ),
    "a route that cuts streams": (
        route(inferenceService="here", timeoutSeconds=60),
        "its timeoutSeconds 60 would cut streams of here, which may take 3600 s",
    ),
    "an Ingress to Knative": (
        route(type="Ingress", inferenceService="chat"),
        "the Service of chat points at Knative's gateway and cannot be the backend of an Ingress",
    ),
    "an Ingress by header": (
        route(
            type="Ingress",
            inferenceService="here",
            headerRoutes=[{"header": "x-a", "value": "b", "inferenceService": "here"}],
        ),
        "an Ingress cannot route by header",
    ),
    "a gateway of an Ingress": (
        route(type="Ingress", inferenceService="here", gateway={"name": "a"}),
        "gateway.name does nothing with type Ingress",
    ),
    "a time that no timeouts carry": (
        route(inferenceService="here", timeoutSeconds=4000, gateway={"timeouts": False}),
        "timeoutSeconds does nothing while gateway.timeouts is false",
    ),
    # Batches.
    "a batch without a claim": (batch(url="http://a"), "batchJobs.b: give the claim with the requests in claim"),
    "a batch that nobody answers": (batch(claim="c"), "give one of url, of a server that runs, and serverArgs"),
    "a batch over its own requests": (
        batch(claim="c", url="http://a", input="a.jsonl", output="a.jsonl"),
        "input and output are the same file",
    ),
    "a batch with a secret in its arguments": (
        batch(claim="c", serverArgs=["--api-key=plain"]),
        "serverArgs has --api-key with a secret in plain text",
    ),
    "a batch's key that nobody asks for": (
        batch(claim="c", serverArgs=["--demo"], apiKey={"secretName": "s"}),
        "apiKey.secretName does nothing without a url",
    ),
    "a batch's server beside another": (
        batch(claim="c", url="http://a", serverImage="gpu"),
        "serverImage does nothing with a url",
    ),
    # Rollouts.
    "a rollout of nothing": (rollout(), "rolloutJobs.r: say what is new: model, image or args"),
    "a rollout of a flag in two words": (
        rollout(args=["--max-num-seqs", "3"]),
        'args has "3"; each is one flag with its value, as in --max-num-seqs=128',
    ),
    "a rollout of a secret": (
        rollout(args=["--api-key=plain"]),
        "args has --api-key with a secret in plain text; give the service it as environment",
    ),
    "steps down": (rollout(model="s3://b/new", steps=[50, 10]), "steps have to rise, and 10 comes after 50"),
    "more failures than looks": (
        rollout(model="s3://b/new", count=2, threshold=3),
        "threshold 3 cannot be reached in 2 looks at a step",
    ),
    "a rollout beside a canary by hand": (
        rollout({"canary": {"percent": 10, "storageUri": "s3://b/new"}}, model="s3://b/new"),
        "inferenceServices.r has canary.percent, and the Job sets the percent itself",
    ),
    "a rollout of another engine": (
        rollout({"engine": "sglang"}, model="s3://b/new"),
        "a rollout is judged by kserve-vllm's metrics, and inferenceServices.r runs SGLang",
    ),
    "a new model without its scheme": (
        rollout(model="org/new"),
        "model org/new has no scheme, and the model of inferenceServices.r is s3://b/model",
    ),
    "a rollout of what is there": (
        rollout(model="s3://b/model"),
        "inferenceServices.r has this model already. After a promotion, take the rollout Job out",
    ),
    "a rollout without the Gateway API": (
        {**rollout(model="s3://b/new"), "cluster": {"gatewayAPI": False}},
        "in Standard mode a rollout needs KServe's Gateway API support",
    ),
    "a rollout on a KServe that does not split": (
        {**rollout(model="s3://b/new"), "cluster": {"gatewayAPI": True, "kserveVersion": "0.20.0"}},
        "rolloutJobs.r: KServe 0.20.0 sends no traffic to a Standard canary",
    ),
    "a rollout Job of several nodes": (
        rollout(
            {"storageUri": "pvc://v/m", "multiNode": {"enabled": True}, "parallelism": {"pipeline": 2}},
            model="pvc://v/n",
        ),
        "KServe has no canary for multi-node services, so that a rollout has nothing to shift",
    ),
    "a rollout with fetched adapters": (
        rollout({"lora": {"adapters": [{"name": "a", "storageUri": "s3://b/a"}]}}, model="s3://b/new"),
        "give those of inferenceServices.r as path",
    ),
    "a name too long for a rollout": (
        {
            **GATEWAY,
            "inferenceServices": {"a" * 42: {"storageUri": "s3://b/model", "deploymentMode": "Standard"}},
            "rolloutJobs": {"a" * 42: {"model": "s3://b/new"}},
        },
        "the name may have 41 characters for a rollout",
    ),
    "a key of answers that are not compared": (
        rollout(model="s3://b/new", answers={"minEqual": 0.5}),
        "answers.minEqual does nothing without answers.configMap",
    ),
    # Model caches.
    "a cache of nothing": (cache(), "give one of huggingFace.repository and files"),
    "a local cache of nothing": (
        cache(type="LocalModelCache"),
        "a LocalModelCache needs localModelCache.sourceModelUri",
    ),
    "a local cache with a Job": (
        cache(
            type="LocalModelCache",
            localModelCache={"sourceModelUri": "hf://a/b", "nodeGroups": ["g"]},
            huggingFace={"repository": "a/b"},
        ),
        "huggingFace.repository does nothing with type LocalModelCache",
    ),
    "a claim with node groups": (
        cache(huggingFace={"repository": "a/b"}, localModelCache={"nodeGroups": ["g"]}),
        "localModelCache.nodeGroups does nothing with type PersistentVolumeClaim",
    ),
}


@functools.cache
def said(case: str) -> str:
    """What the chart says to the values of a case."""
    return refused(CASES[case][0])


# What needs a cluster to be said; tests/charts/test_notes.py has them.
BY_LOOKUP = (
    "ClusterServingRuntime ",
    "claim %s has",
    "LocalModelCache %s",
    "it is there in %s mode",
    "allow-zero-initial-scale",
)


@pytest.mark.parametrize("case", CASES)
def test_a_contradiction_fails_with_its_sentence(case: str) -> None:
    assert CASES[case][1] in " ".join(said(case).split())
    places = (
        "inferenceService",
        "routes.",
        "modelCaches.m",
        "batchJobs.b",
        "cluster.",
        "rolloutJobs.",
        "runtimes.",
        "commonAnnotations.",
        "tests.",
        "monitoring.",
        "proxy.",
        "caBundle: ",
        "extraObjects[",
        "enabled",
    )
    assert all(line.startswith(places) for line in said(case).splitlines())


def test_every_sentence_of_the_chart_has_a_case() -> None:
    templates = "".join(path.read_text() for path in (CHART / "templates").rglob("_*.tpl"))
    formats = re.findall(r'^ *\{\{ printf "((?:[^"\\]|\\.)*%s(?:[^"\\]|\\.)*[.](?:\)[.])?)"', templates, re.MULTILINE)
    formats += re.findall(r'append \$internal\.misnamed \(printf "((?:[^"\\]|\\.)*)"', templates)
    assert len(formats) > 70
    answers = [line for case in CASES for line in said(case).splitlines()]
    for text in formats:
        if any(beginning in text for beginning in BY_LOOKUP):
            continue
        pattern = ".*".join(re.escape(part) for part in re.split(r"%[sdq]", text))
        assert any(re.fullmatch(pattern, answer.strip()) for answer in answers), f"no case for: {text}"


def test_all_sentences_come_at_once_and_from_the_file_of_the_object() -> None:
    with pytest.raises(HelmError) as error:
        render({"inferenceServices": {"a": {}, "b": {"demo": True, "gpu": {"count": 1}, "device": "cpu"}}})
    assert "templates/inferenceservices.yaml" in str(error.value)
    assert "inferenceServices.a: give exactly one" in str(error.value)
    assert "inferenceServices.b: gpu.count does nothing with device cpu." in str(error.value)
    for values, file in (
        (route(inferenceService="other"), "httproutes"),
        (route(type="Istio", inferenceService="other"), "virtualservices"),
        (cache(), "persistentvolumeclaims"),
        (rollout(), "rolloutjobs"),
        (cache(type="LocalModelCache"), "localmodelcaches"),
        ({"runtimes": {"gpu": {"extraArgs": ["--port=1"]}}}, "runtimes"),
    ):
        with pytest.raises(HelmError, match=f"templates/{file}[.]yaml"):
            render(values)


@pytest.mark.parametrize(
    "values",
    [
        service(),
        standard(),
        {**standard(autoscaling={"minReplicas": 2}, canary={**NEW, "percent": 50, "replicas": 2}), **GATEWAY},
        service(gpu={"count": 4}, parallelism={"tensor": 2, "pipeline": 2}),
        service(gpu={"resource": "aliyun.com/gpu-mem", "count": 8}),
        {**service(timeoutSeconds=900), "cluster": {"maxRevisionTimeoutSeconds": 900}},
        standard(terminationGracePeriodSeconds=130, drain={"timeoutSeconds": 120}),
        service(env=[{"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}]),
        service(env=[{"name": "HF_TOKEN_PATH", "value": "/x"}, {"name": "AWS_ACCESS_KEY_ID", "value": "x"}]),
        service(env=[{"name": "GOOGLE_APPLICATION_CREDENTIALS", "value": "/var/secrets/key.json"}]),
        {**service(sharedMemory="1.5G"), "runtimes": {"tmpSizeLimit": "500G"}},
        service(usageSink="https://sink.example.com/a:b@c", extraArgs=["--max-concurrent=4"]),
        {"inferenceServices": {"a" * 53: DEMO}, "cluster": {"domainTemplate": "{{.Name}}.x"}},
        {"inferenceServices": {"a" * 46: {**DEMO, "tagRouting": True}}},
        service(
            topologySpreadConstraints=[
                {"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": what}
                for what in ("DoNotSchedule", "ScheduleAnyway")
            ]
        ),
        {**standard(extraVolumes=[{"name": "a", "newKind": {}}]), "cluster": {"checkFields": False}},
        service(runtime="theirs", extraVolumeMounts=[{"name": "theirs", "mountPath": "/x"}]),
        {"extraObjects": ["{{ if false }}x{{ end }}", "{apiVersion: v1, kind: List, items: [{a: b}]}"]},
        service(resources={"limits": None, "requests": {"cpu": None}}, env=[{"name": "a.b-c", "value": 1}]),
        {"runtimes": {"gpu": {"securityContext": {"runAsUser": None}}}},
        service(labels={"size": "8"}, podAnnotations={"memory": "large"}, affinity={"nodeAffinity": None}),
    ],
    ids=[
        "Knative",
        "Standard",
        "canary",
        "enough GPUs",
        "a share",
        "a raised limit",
        "just in time",
        "a reference",
        "a path of a token",
        "a path of credentials",
        "sizes in other units",
        "an address without a password",
        "the longest name",
        "the longest tag",
        "both kinds of a spread",
        "a field that is newer",
        "a volume of another release's runtime",
        "an object under a condition, and a list",
        "nothing in the place of a quantity",
        "nothing in the place of a user",
        "labels that look like sizes",
    ],
)
def test_the_neighbours_of_contradictions_are_taken(values: Document) -> None:
    assert render(values)


def env(name: str, value: str) -> list[Document]:
    return [{"name": name, "value": value}]


SECRETS: dict[str, Document] = {
    "a header with credentials": {"env": env("OTEL_EXPORTER_OTLP_HEADERS", "Authorization=Bearer%20abc")},
    "a header with a key": {"env": env("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "x-team=abc,api-key=abcdef")},
    "an address that is a secret": {"env": env("WEBHOOK", "https://hooks.slack.com/services/T0/B0/x")},
    "a token in a query": {"env": env("SINK", "https://a.example.com/x?v=1&token=abc")},
    "a signature": {"env": env("BLOB", "https://x.blob.core.windows.net/c?sv=1&sig=abc")},
    "a token as the user": {"env": env("REPO", "https://ghp_abcdefghijklmnop@github.com/x")},
    "a private key": {"env": env("CERT", "-----BEGIN RSA PRIVATE KEY-----")},
    "a signed token": {"env": env("X", "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJ4In0.c2ln")},
    "a key by its name": {"env": env("AZURE_STORAGE_KEY", "x")},
    "a password by its name": {"env": env("REDIS_AUTH", "x")},
    "a flag with a header": {"extraArgs": ["--header", "authorization=Bearer abc"]},
    "another key": {"engine": "sglang", "extraArgs": ["--admin-api-key=x"]},
    "a sink with a key": {"usageSink": "https://a.example.com/x?api_key=abc"},
    "a speculator's token": {"speculative": {"method": "x", "token": "hf_abcdefghijklmnop"}},
}
NO_SECRETS: dict[str, Document] = {
    "a header": {"env": env("OTEL_EXPORTER_OTLP_HEADERS", "x-zone=a")},
    "a query": {"env": env("SINK", "https://a.example.com/x?tokenizer=abc")},
    "a number of tokens": {"env": env("MAX_TOKENS", "5")},
    "a socket": {"env": env("SSH_AUTH_SOCK", "/tmp/x")},
    "a model": {"model": "org/hf_llama_3_8b_instruct", "storageUri": ""},
}


def test_a_secret_is_known_by_its_looks() -> None:
    tried = {f"s{n}": {"storageUri": "hf://org/model", **values} for n, values in enumerate(SECRETS.values())}
    tried |= {f"n{n}": {"storageUri": "hf://org/model", **values} for n, values in enumerate(NO_SECRETS.values())}
    named = set(re.findall(r"^inferenceServices[.](\w+)", refused({"inferenceServices": tried}), re.MULTILINE))
    assert named == {name for name in tried if name.startswith("s")}
