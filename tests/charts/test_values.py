"""Every value does something or is refused, wherever it stands; and no change of one value breaks an upgrade.

Each value of values.yaml is changed alone, in many contexts: for the entries of a map a whole context is one render, in
which every entry has another change. The entries that are refused, by their names in the sentences, are taken out and
the rest is rendered again.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.charts import upgrades
from tests.charts.support import CHART, Document, HelmError, helm, load, load_all, refused, render

DEFAULTS: Document = load(CHART / "values.yaml")
SCHEMA: Document = json.loads((CHART / "values.schema.json").read_text())
NAMES: Document = load(CHART / "files" / "names.yaml")

# Another setting for values whose default says nothing of what they may be. By the end of the path.
EXAMPLES: dict[str, Any] = {
    "deploymentMode": "Standard",
    "runtime": "somebody-elses",
    "labels": {"team": "a"},
    "annotations": {"team": "a"},
    "podLabels": {"team": "b"},
    "podAnnotations": {"team": "b"},
    "storageUri": "s3://bucket/other",
    "model": "org/other",
    "modelFormat": "huggingface",
    "servedNames": ["other"],
    "quantization": "awq",
    "speculative": {"method": "ngram", "num_speculative_tokens": 2},
    "extraArgs": ["--seed=1"],
    "env": [{"name": "A", "value": "b"}],
    "adapters": [{"name": "a", "path": "/mnt/models/a"}],
    "maxRank": 32,
    "products": ["NVIDIA-L4"],
    "productLabel": "gpu",
    "resource": "amd.com/gpu",
    "requests": {"memory": "3Gi"},
    "limits": {"memory": "40Gi"},
    "sharedMemory": "3Gi",
    "memory": "3Gi",
    "cpu": "3",
    "nodeSelector": {"pool": "a"},
    "tolerations": [{"key": "a", "operator": "Exists"}],
    "affinity": {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}},
    "topologySpreadConstraints": [{"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "ScheduleAnyway"}],
    "rollout": "surge",
    "class": "keda",
    "metric": "rps",
    "mode": "basic",
    "target": 3,
    "timeoutSeconds": 300,
    "progressDeadlineSeconds": 5000,
    "windowSeconds": 30,
    "panicWindowPercentage": 20,
    "panicThresholdPercentage": 300,
    "terminationGracePeriodSeconds": 333,
    "percent": 20,
    "maxUnavailable": 2,
    "fromNamespaces": ["a"],
    "metricsFromNamespaces": ["a"],
    "egressCIDRs": ["203.0.113.0/24"],
    "existing": "there",
    "size": "3Gi",
    "accessModes": ["ReadOnlyMany"],
    "directory": "there",
    "repository": "org/other",
    "nodePath": "/var/cache/compiled",
    "endpoint": "https://hub.example.com",
    "exclude": ["*.bin"],
    "files": [{"url": "https://a.example.com/b", "sha256": "0" * 64, "path": "b"}],
    "gpuResource": "amd.com/gpu",
    "tensorrtLLM.model": "other",
    "sourceModelUri": "hf://org/other",
    "modelSize": "3Gi",
    "nodeGroups": ["other"],
    "hosts": ["other.example.com"],
    "inferenceService": "other",
    "headerRoutes": [{"header": "x-a", "value": "b", "inferenceService": "other"}],
    "secrets": ["s"],
    "imagePullSecrets": ["s"],
    "pullSecrets": ["s"],
    "tag": "9.9.9",
    "digests.cpu": "sha256:" + "1" * 64,
    "digests.gpu": "sha256:" + "1" * 64,
    "kserveVersion": "0.21.0",
    "prometheusAddress": "http://other:9090",
    "domainTemplate": "{{.Name}}.{{.Namespace}}",
    "tmpSizeLimit": "3Gi",
    "interval": "5s",
    "commonLabels": {"team": "c"},
    "commonAnnotations": {"team": "c"},
    "platform": "openshift",
    "extraObjects": [{"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "x"}}],
    "httpProxy": "http://p:1",
    "httpsProxy": "http://p:1",
    "noProxy": ["a"],
    "domain": "corp.example",
    "envFrom": [{"secretRef": {"name": "s"}}],
    "initContainers": [{"name": "i", "image": "i:1"}],
    "extraVolumes": [{"name": "x", "emptyDir": {}}],
    "extraVolumeMounts": [{"name": "tmp", "mountPath": "/x"}],
    "image": "registry.example.com/a:1",
    "securityContext": {"capabilities": {"add": ["IPC_LOCK"]}},
    "extra": {"mine": {}},
    "engines": {"sglang": {"enabled": True}},
    "resources": {"limits": {"cpu": 2}},
    "parameters": {"a": "b"},
    "sampleRatio": 0.5,
    "serverArgs": ["--model=org/other"],
    "url": "http://other",
    "input": "other.jsonl",
    "output": "others.jsonl",
    "args": ["--seed=1"],
    "steps": [5, 100],
    "address": "http://other:9090",
    "resourceClaims": [{"name": "g", "resourceClaimName": "c"}],
    "startupSeconds": 100,
    "egress": [{"ports": [{"port": 6379}]}],
    "availability": 0.99,
    "firstToken": 0.9,
    "firstTokenSeconds": 1,
    "runbookURL": "https://wiki.example.com/runbook",
    "alerts": {"KServeVllmSlowFirstToken": {"enabled": False}},
}
# Numbers that may not be just one more than the default.
NUMBERS = {
    "maxReplicas": 7,
    "count": 2,
    "maxNumSeqs": 33,
    "maxSeqLen": 33,
    "tensor": 2,
    "pipeline": 2,
    "data": 2,
    "replicas": 1,
    "confidence": 0.9,
    "quantile": 0.8,
    "maxErrorRate": 0.2,
    "maxRefusalRate": 0.2,
    "minEqual": 0.2,
    "maxRefusalDrift": 0.2,
}


def leaves(node: Document, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path, default) of every value; free maps and lists are one value each."""
    for key, default in node.items():
        if isinstance(default, dict) and default and key != "labels":
            yield from leaves(default, (*path, key))
        else:
            yield (*path, key), default


def schema_at(top: str, path: tuple[str, ...]) -> Document:
    node: Document = SCHEMA["definitions"].get(top) or SCHEMA["properties"][top]
    for key in path:
        node = node["properties"][key]
    return node


def other(top: str, path: tuple[str, ...], default: Any) -> Any:
    """A setting of a value that is not its default."""
    for length in (3, 2, 1):
        end = ".".join(path[-length:])
        if end in EXAMPLES:
            return EXAMPLES[end]
    if path[-1] in NUMBERS:
        return NUMBERS[path[-1]]
    if isinstance(default, bool):
        return not default
    choices = [c for c in schema_at(top, path).get("enum", []) if c not in (default, None, "")]
    if choices:
        return choices[0]
    if isinstance(default, int | float):
        return default + 1
    if default is None:
        return 5
    assert isinstance(default, str), f"EXAMPLES lacks {'.'.join(path)}"
    return "other"


def value_at(values: Mapping[str, Any], path: tuple[str, ...], default: Any) -> Any:
    node: Any = values
    for key in path:
        if not isinstance(node, dict) or key not in node:
            return default
        node = node[key]
    return node


def changed(values: Document, path: tuple[str, ...], setting: Any) -> Document:
    """A copy of `values` with one value set."""
    result = copy.deepcopy(values)
    node = result
    for key in path[:-1]:
        node = node.setdefault(key, {})
    node[path[-1]] = setting
    return result


MODEL = {"storageUri": "hf://org/model"}
STANDARD = {**MODEL, "deploymentMode": "Standard"}
SERVICES: dict[str, Document] = {
    "Knative": MODEL,
    "loaded by the engine": {"model": "org/model", "huggingFaceToken": {"secretName": "s"}},
    "CPU": {"demo": True, "device": "cpu"},
    "Knative canary": {**MODEL, "canary": {"percent": 10, "storageUri": "hf://org/new"}},
    "to zero": {**MODEL, "autoscaling": {"minReplicas": 0}},
    "Standard": STANDARD,
    "Standard canary": {
        **STANDARD,
        "autoscaling": {"minReplicas": 4},
        "canary": {"percent": 10, "storageUri": "hf://org/new"},
    },
    "HPA on CPU": {**STANDARD, "autoscaling": {"class": "hpa", "metric": "cpu"}},
    "HPA on vLLM": {**STANDARD, "autoscaling": {"class": "hpa"}},
    "KEDA": {**STANDARD, "autoscaling": {"class": "keda", "kedaAuthentication": {"name": "a"}}},
    "several nodes": {
        **STANDARD,
        "storageUri": "pvc://v/m",
        "multiNode": {"enabled": True},
        "parallelism": {"pipeline": 2},
    },
    "adapters": {**MODEL, "lora": {"adapters": [{"name": "one", "path": "/1"}, {"name": "two", "path": "/2"}]}},
    "files": {
        **STANDARD,
        "chatTemplate": {"configMap": "c"},
        "apiKeys": {"secretName": "s"},
        "redis": {"secretName": "s"},
        "lora": {"watched": {"configMap": "c"}},
        "warmup": {"configMap": "c"},
        "moderation": {"configMap": "c"},
        "gpu": {"products": ["A"]},
        "grpc": {"enabled": True},
    },
    "stored": {"storage": {"path": "there", "key": "k"}},
    "claims": {**STANDARD, "resourceClaims": [{"name": "a", "resourceClaimName": "b"}]},
    "SGLang": {**STANDARD, "engine": "sglang"},
    "Ollama": {**MODEL, "engine": "ollama", "device": "cpu"},
    "traced": {**MODEL, "tracing": {"endpoint": "http://c:4317"}, "redis": {"secretName": "s"}},
    "guarded": {
        **STANDARD,
        "networkPolicy": {"enabled": True, "restrictEgress": True},
        "podDisruptionBudget": {"enabled": True},
    },
}
REPOSITORY = {"huggingFace": {"repository": "org/model"}}
CACHES: dict[str, Document] = {
    "a claim": REPOSITORY,
    "a claim that is there": {**REPOSITORY, "claim": {"existing": "c"}},
    "a hub with a token": {"huggingFace": {"repository": "org/model", "tokenSecret": {"name": "s"}}},
    "an engine": {**REPOSITORY, "tensorrtLLM": {"model": "chat"}},
    "files": {"files": [{"url": "https://a.example.com/a", "sha256": "0" * 64, "path": "a"}]},
    "LocalModelCache": {
        "type": "LocalModelCache",
        "localModelCache": {"sourceModelUri": "hf://a/b", "nodeGroups": ["g"]},
    },
}
ROUTES: dict[str, Document] = {
    "GatewayAPI": {"hosts": ["a.example.com"], "inferenceService": "chat"},
    "Istio": {"hosts": ["a.example.com"], "inferenceService": "chat", "type": "Istio"},
    "ejection": {
        "hosts": ["a.example.com"],
        "inferenceService": "chat",
        "type": "Istio",
        "outlierEjection": {"enabled": True},
    },
    "Ingress": {"hosts": ["a.example.com"], "inferenceService": "chat", "type": "Ingress"},
    "no timeouts": {"hosts": ["a.example.com"], "inferenceService": "chat", "gateway": {"timeouts": False}},
}
BATCHES: dict[str, Document] = {
    "a batch for a server": {"claim": "c", "url": "http://chat", "apiKey": {"secretName": "s"}},
    "a batch with its own": {"claim": "c", "serverArgs": ["--demo"]},
}
ROLLOUTS: dict[str, Document] = {
    "a rollout": {"model": "hf://org/new"},
    "a rollout with answers": {
        "image": "registry.example.com/new:1",
        "answers": {"configMap": "c", "apiKey": {"secretName": "s"}},
        "prometheus": {"tokenSecret": {"name": "s"}},
    },
}
CONTEXTS = [
    *(("inferenceServices", "inferenceServiceDefaults", name, base) for name, base in SERVICES.items()),
    *(("modelCaches", "modelCacheDefaults", name, base) for name, base in CACHES.items()),
    *(("batchJobs", "batchJobDefaults", name, base) for name, base in BATCHES.items()),
    *(("rolloutJobs", "rolloutJobDefaults", name, base) for name, base in ROLLOUTS.items()),
    *(("routes", "routeDefaults", name, base) for name, base in ROUTES.items()),
    ("serviceAccounts", "serviceAccountDefaults", "an account", {}),
    ("runtimes.extra", "extraRuntimeDefaults", "a runtime for GPUs", {}),
    ("runtimes.extra", "extraRuntimeDefaults", "a runtime for CPUs", {"base": "cpu"}),
]
AROUND: Document = {
    "cluster": {"gatewayAPI": True, "lookup": False},
    "inferenceServices": {name: {**STANDARD, "timeoutSeconds": 60} for name in ("chat", "other")},
}
# The cluster is asked before these change in place: tests/charts/test_notes.py.
LOOKED_UP = {"deploymentMode", "claim.accessModes", "claim.storageClassName", "localModelCache.sourceModelUri"}


def around(top: str, entries: Document) -> Document:
    """Values with `entries` in the map `top`, among what they need."""
    outer, _, inner = top.partition(".")
    if inner:
        return {**AROUND, outer: {inner: entries}}
    return {**AROUND, top: {**AROUND.get(top, {}), **entries}}


def objects_of(documents: list[Document], name: str) -> list[Document]:
    """The objects that an entry makes, with `name` in place of its name."""
    mine = [text for d in documents if name in (text := json.dumps(d))]
    cleaned: list[Document] = [json.loads(text.replace(name, "NAME")) for text in mine]
    return sorted(cleaned, key=lambda d: (d["kind"], d["metadata"]["name"]))


@pytest.mark.parametrize(("top", "defaults", "context", "base"), CONTEXTS, ids=[f"{c[0]}-{c[2]}" for c in CONTEXTS])
def test_every_value_of_an_entry_does_something_or_is_refused(
    top: str, defaults: str, context: str, base: Document
) -> None:
    entries: dict[str, Document] = {"e000": base}
    paths: dict[str, tuple[str, ...]] = {}
    for path, default in leaves(DEFAULTS[defaults]):
        setting = other(defaults, path, default)
        if path == ("modelFormat",) and not {"storageUri", "storage"} & base.keys():
            # There the other one is what an empty format means.
            setting = "kserve-vllm"
        if (context, path) == ("Knative canary", ("storageUri",)):
            # What the earlier revision runs is not in the manifest any more; NOTES say it.
            continue
        if path != ("enabled",) and setting != value_at(base, path, default):
            name = f"e{len(entries):03}"
            entries[name], paths[name] = changed(base, path, setting), path
    refusals: dict[str, str] = {}
    services: Document = {}
    if top == "routes":
        # Two routes with one host, or with ejection for one service, take from each other: each has its own.
        services = {f"{name}-svc": AROUND["inferenceServices"]["chat"] for name in entries}
        for name, entry in entries.items():
            own = {"hosts": [f"{name}.example.com"], "inferenceService": f"{name}-svc"}
            entries[name] = {**entry, **{key: value for key, value in own.items() if paths.get(name) != (key,)}}
    while True:
        try:
            values = around(top, entries)
            documents = render({**values, "inferenceServices": {**values["inferenceServices"], **services}})
            break
        except HelmError as error:
            named = dict(re.findall(rf"{re.escape(top)}\.(e\d+): (.*)", str(error)))
            if not named:
                raise
            refusals |= named
            for name in named:
                del entries[name]
    before = objects_of(documents, "e000")
    assert before
    for name in entries.keys() - {"e000"}:
        after = objects_of(documents, name)
        assert after != before, f"{'.'.join(paths[name])} = {value_at(entries[name], paths[name], None)} does nothing"
        if ".".join(paths[name]) not in LOOKED_UP:
            broken = upgrades.broken_by(upgrades.reduced(before), upgrades.reduced(after))
            assert not broken, f"{'.'.join(paths[name])} changes what can't change of {broken}"
    assert len(refusals) < len(paths), refusals


def everything(values: Document) -> str:
    """What helm prints, with NOTES; or the refusal's sentences."""
    text = json.dumps(values)
    try:
        printed = helm(
            "install", "release", str(CHART), "--dry-run=client", "--namespace", "models", "--values", "-", stdin=text
        )
    except HelmError as error:
        if "schema" in str(error):
            raise
        return str(error)
    return re.sub(r"LAST DEPLOYED: .*", "", printed)


RELEASES: dict[str, Document] = {
    "all on": {
        "inferenceServices": {"chat": {**STANDARD, "apiKeys": {"secretName": "s"}}, "small": MODEL},
        "modelCaches": {"m": REPOSITORY},
        "tests": {"apiKey": {"secretName": "s"}},
        "caBundle": {"configMap": "c"},
        "proxy": {"httpProxy": "http://p:2"},
        "monitoring": {name: {"enabled": True} for name in ("podMonitor", "prometheusRule", "dashboards")},
    },
    "nothing": {"runtimes": {"enabled": False}},
    "some off": {
        "inferenceServices": {"chat": MODEL},
        "runtimes": {"cpu": {"enabled": False}, "multinode": {"enabled": False}},
        "tests": {"enabled": False},
    },
}
# Each release shows what the ones before it do not.
TOPS: dict[str, tuple[str, ...]] = {
    "all on": (
        "image",
        "cluster",
        "commonLabels",
        "commonAnnotations",
        "extraObjects",
        "caBundle",
        "proxy",
        "podSecurity",
        "runtimes",
        "monitoring",
        "tests",
    ),
    "nothing": ("image", "caBundle", "proxy", "podSecurity", "runtimes", "monitoring", "tests"),
    "some off": ("image", "runtimes", "tests"),
}
assert set(TOPS["all on"]) == {
    t for t in DEFAULTS if not t.endswith("Defaults") and f"{t[:-1]}Defaults" not in DEFAULTS
}


@pytest.mark.parametrize("context", RELEASES)
def test_every_value_of_the_release_does_something_or_is_refused(context: str) -> None:
    base = RELEASES[context]
    tasks = {}
    for top in TOPS[context]:
        for path, default in leaves({top: DEFAULTS[top]}):
            setting = other(top, path[1:] or path, default)
            if setting != value_at(base, path, default):
                tasks[".".join(path)] = changed(base, path, setting)
    # Threads wait for helm; two keep both cores of a small machine busy.
    with ThreadPoolExecutor(2) as pool:
        after = dict(zip(tasks, pool.map(everything, tasks.values()), strict=True))
    before = everything(base)
    assert len(tasks) > 30
    assert not [path for path, text in after.items() if text == before]


def test_defaults_are_for_an_entry_what_its_own_values_are() -> None:
    entries: Document = {
        "inferenceServices": {
            "chat": {
                **SERVICES["files"],
                **SERVICES["guarded"],
                "networkPolicy": {**SERVICES["guarded"]["networkPolicy"], "egress": [{"ports": [{"port": 6380}]}]},
            }
        },
        "modelCaches": {"m": CACHES["a hub with a token"]},
        "routes": {"r": ROUTES["ejection"]},
        "serviceAccounts": {"a": {"secrets": ["s"]}},
    }
    defaults = {f"{top[:-1]}Defaults": value for top, named in entries.items() for value in named.values()}
    empty: Document = {top: {name: {} for name in named} for top, named in entries.items()}
    assert render({**AROUND, **entries}) == render({**AROUND, **defaults, **empty})


# Null, entries that are off, earlier charts.

WHOLE: Document = {
    **AROUND,
    "modelCaches": {"m": REPOSITORY},
    "batchJobs": {"b": BATCHES["a batch with its own"]},
    "rolloutJobs": {"chat": ROLLOUTS["a rollout"]},
    "serviceAccounts": {"a": {}},
    "routes": {"r": ROUTES["GatewayAPI"]},
}


def test_null_is_the_default_for_a_value_and_for_a_whole_block() -> None:
    plain = render(WHOLE)
    for top, values in DEFAULTS.items():
        if top in ("inferenceServices", *WHOLE):
            continue
        assert render({**WHOLE, top: None}) == plain, top
        if not isinstance(values, dict):
            continue
        nulls = {key: None for key in values}
        assert render({**WHOLE, top: nulls}) == plain, top
    nulls = {
        key: None for key in DEFAULTS["inferenceServiceDefaults"] if key not in AROUND["inferenceServices"]["chat"]
    }
    services = {name: {**nulls, **entry} for name, entry in AROUND["inferenceServices"].items()}
    assert render({**WHOLE, "inferenceServices": services}) == plain


def nulls_of(node: Document) -> Document:
    """The same tree with null for each value."""
    return {k: nulls_of(v) if isinstance(v, dict) and v and k != "labels" else None for k, v in node.items()}


def test_null_is_the_default_for_every_single_value() -> None:
    plain = render(WHOLE)
    deep = {top: nulls_of(v) for top, v in DEFAULTS.items() if isinstance(v, dict) and v and top not in WHOLE}
    assert len(deep) > 10
    assert render({**WHOLE, **deep}) == plain
    services = {
        name: {**{k: v for k, v in nulls_of(DEFAULTS["inferenceServiceDefaults"]).items() if k not in entry}, **entry}
        for name, entry in AROUND["inferenceServices"].items()
    }
    assert render({**WHOLE, "inferenceServices": services}) == plain


def test_null_takes_back_what_the_defaults_of_the_values_say() -> None:
    values: Document = {
        "inferenceServiceDefaults": {
            "nodeSelector": {"pool": "a", "zone": "b"},
            "autoscaling": {"maxReplicas": 9},
            "maxModelLen": 5,
        },
        "inferenceServices": {
            "chat": {**MODEL, "nodeSelector": {"pool": None}, "autoscaling": None, "maxModelLen": None},
            "other": MODEL,
        },
    }
    found = {d["metadata"]["name"]: d["spec"]["predictor"] for d in render(values) if d["kind"] == "InferenceService"}
    assert found["chat"]["nodeSelector"] == {"zone": "b"}
    assert (found["chat"]["maxReplicas"], found["other"]["maxReplicas"]) == (3, 9)
    assert "--max-model-len=5" in found["other"]["model"]["args"]
    assert "--max-model-len=5" not in found["chat"]["model"]["args"]


def test_a_refusal_of_the_schema_names_the_one_thing_that_is_wrong() -> None:
    for top, entry in (("inferenceServices", {"maxModelLen": "32"}), ("routes", {"timeoutSeconds": "9"})):
        with pytest.raises(HelmError) as refusal:
            render({top: {"chat": entry}})
        wrong = [line.strip() for line in str(refusal.value).splitlines() if ": got " in line]
        assert wrong == [f"- at '/{top}/chat/{next(iter(entry))}': got string, want null or integer"]


def test_a_values_file_may_have_anchors_on_keys_of_its_own() -> None:
    text = "x-large: &large {storageUri: 'hf://a/b', maxModelLen: 5}\n"
    text += "inferenceServices: {chat: {<<: *large, maxModelLen: 6}}"
    (chat,) = [
        d for d in load_all(helm("template", "r", str(CHART), "-f", "-", stdin=text)) if "predictor" in d["spec"]
    ]
    assert "--max-model-len=6" in chat["spec"]["predictor"]["model"]["args"]


def test_an_entry_that_is_null_or_switched_off_is_not_there() -> None:
    extra: Document = {"broken": {"enabled": False}, "gone": None}
    off = {
        "inferenceServices": {**WHOLE["inferenceServices"], **extra},
        "routes": {**WHOLE["routes"], **extra},
        "modelCaches": {**WHOLE["modelCaches"], **extra},
        "batchJobs": {**WHOLE["batchJobs"], **extra},
        "rolloutJobs": {**WHOLE["rolloutJobs"], **extra},
        "serviceAccounts": {**WHOLE["serviceAccounts"], **extra},
    }
    assert render({**WHOLE, **off}) == render(WHOLE)
    default_off = {
        **WHOLE,
        "rolloutJobs": {},
        "serviceAccountDefaults": {"enabled": False},
        "serviceAccounts": {"a": {}, "b": {"enabled": True}},
    }
    assert [d["metadata"]["name"] for d in render(default_off) if d["kind"] == "ServiceAccount"] == ["b"]


def test_values_kept_from_an_earlier_chart_lack_blocks_and_work(tmp_path: Path) -> None:
    """`helm upgrade --reuse-values` renders the new templates with the old chart's defaults alone."""
    chart = tmp_path / "kserve-vllm"
    shutil.copytree(CHART, chart)
    (chart / "values.yaml").write_text(json.dumps({"image": {"tag": ""}, "monitoring": {"podMonitor": {}}}))
    text = helm("template", "release", str(chart), "--namespace", "models", "--values", "-", stdin=json.dumps(WHOLE))
    assert load_all(text) == render(WHOLE)


def test_an_earlier_name_means_the_new_one_and_notes_say_so() -> None:
    old: Document = changed(
        MODEL,
        ("sharing",),
        {
            "keys": {"secret": "s", "key": "a"},
            "redis": {"secret": "r", "key": "b"},
            "adapters": {"configMap": "c", "key": "d"},
            "warmup": {"configMap": "e", "key": "f"},
            "moderation": {"configMap": "g", "key": "h"},
        },
    )
    old["canary"] = {"percent": 1, "storageUri": "hf://org/new", "tagRouting": True}
    new: Document = {
        **MODEL,
        "apiKeys": {"secretName": "s", "key": "a"},
        "redis": {"secretName": "r", "key": "b"},
        "lora": {"watched": {"configMap": "c", "key": "d"}},
        "warmup": {"configMap": "e", "key": "f"},
        "moderation": {"configMap": "g", "key": "h"},
        "tagRouting": True,
        "canary": {"percent": 1, "storageUri": "hf://org/new"},
    }
    standard = {"cluster": {"gatewayAPI": True}}
    pairs: list[tuple[Document, Document]] = [
        ({"inferenceServices": {"chat": old}}, {"inferenceServices": {"chat": new}}),
        (
            {**standard, "inferenceServices": {"chat": {**STANDARD, "canary": {**new["canary"], "name": "x"}}}},
            {**standard, "inferenceServices": {"chat": {**STANDARD, "canary": {**new["canary"], "variant": "x"}}}},
        ),
        (
            {"runtimes": {"annotations": {"a": "b"}, "labels": {"c": "d"}}},
            {"runtimes": {"podAnnotations": {"a": "b"}, "podLabels": {"c": "d"}}},
        ),
        (
            {"inferenceServices": {"chat": MODEL}, "inferenceServiceDefaults": {"sharing": {"keys": {"secret": "s"}}}},
            {"inferenceServices": {"chat": {**MODEL, "apiKeys": {"secretName": "s"}}}},
        ),
        (
            {"batchJobDefaults": {"image": "gpu"}, "batchJobs": {"b": {"claim": "c", "serverArgs": ["--demo"]}}},
            {"batchJobs": {"b": {"claim": "c", "serverArgs": ["--demo"], "serverImage": "gpu"}}},
        ),
    ]
    tried = set()
    for before, after in pairs:
        assert render(before) == render(after)
        notes = everything(before).split("NOTES:")[1]
        tried |= set(re.findall(r"^  (?:inferenceServices\.chat|\w+)\.(\S+) is now called", notes, re.MULTILINE))
        assert "is now called" not in everything(after)
    assert tried == {old for renames in NAMES["renamed"].values() for old in renames}


def test_a_name_that_is_tried_often_gets_a_sentence() -> None:
    for wrong, right in NAMES["instead"]["inferenceServiceDefaults"].items():
        values = {"inferenceServices": {"chat": changed(MODEL, tuple(wrong.split(".")), ["x"])}}
        assert f"inferenceServices.chat: there is no {wrong}; write {right}." in refused(values)


def test_the_model_that_a_knative_canary_is_measured_against_is_in_the_notes() -> None:
    values = {"inferenceServices": {"chat": SERVICES["Knative canary"]}}
    assert "hf://org/new takes 10 % of the requests, hf://org/model the rest" in everything(values)
