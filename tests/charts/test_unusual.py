"""What unusual names, quantities, registries and parent charts make of the values."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import yaml

from tests.charts.schemas import problems
from tests.charts.support import CHART, Document, helm, load, load_all, of_kind, render, service, standard
from tests.charts.test_ways_out import pods_of
from tests.tools import chart_fields

CACHE: Document = {"huggingFace": {"repository": "org/model"}}


def test_the_fields_that_kubernetes_knows_are_those_of_the_schemas() -> None:
    assert chart_fields.FIELDS.read_text() == chart_fields.made(), "run: python -m tests.tools.chart_fields"


def test_names_that_yaml_takes_for_something_else_stay_text() -> None:
    on = {"demo": True, "device": "cpu"}
    rest: Document = {"networkPolicy": {"enabled": True}, "deploymentMode": "Standard"}
    values: Document = {
        "cluster": {"gatewayAPI": True, "knativeNamespace": "0"},
        "inferenceServices": {
            "null": {**on, "networkPolicy": {"enabled": True}},
            "true": {**on, **rest, "podDisruptionBudget": {"enabled": True}, "autoscaling": {"class": "hpa"}},
            "on": {
                "storageUri": "hf://a/b",
                **rest,
                "canary": {"percent": 1, "storageUri": "hf://a/c", "variant": "no"},
            },
            "off": {"storageUri": "hf://a/b", "runtime": "1e3", "autoscaling": {"class": "keda"}, **rest},
        },
        "runtimes": {"scope": "Namespaced", "gpu": {"name": "yes"}, "extra": {"1e3": {}}},
        "routes": {
            "0": {"hosts": ["1.2"], "inferenceService": "true", "gateway": {"name": "true", "namespace": "1e3"}},
            "1e4": {"hosts": ["1.3"], "inferenceService": "true", "type": "Ingress", "ingress": {"className": "on"}},
            "no": {"hosts": ["1.4"], "inferenceService": "true", "type": "Istio", "outlierEjection": {"enabled": True}},
        },
        "modelCaches": {
            "123": CACHE,
            "0x1f": {
                "type": "LocalModelCache",
                "localModelCache": {"sourceModelUri": "hf://a/b", "nodeGroups": ["on"]},
            },
        },
        "serviceAccounts": {"1e3": {}},
        "batchJobs": {"0": {"claim": "1", "url": "http://a"}},
        "rolloutJobs": {"true": {"args": ["--seed=1"]}},
        "monitoring": {name: {"enabled": True} for name in ("podMonitor", "prometheusRule", "dashboards")},
    }
    documents = load_all(helm("template", "1e3", str(CHART), "-n", "123", "-f", "-", stdin=json.dumps(values)))
    assert len(documents) > 30
    assert [problem for document in documents for problem in problems(document)] == []
    assert {d["metadata"].get("namespace", "123") for d in documents} == {"123"}
    assert {d["metadata"]["labels"]["app.kubernetes.io/instance"] for d in documents} == {"1e3"}


def test_quantities_have_every_form_that_kubernetes_takes() -> None:
    limits = {
        "cpu": 1e3,
        "memory": "1e12",
        "ephemeral-storage": "128974848000m",
        "hugepages-2Mi": "1Gi",
        "rdma/ib": "1k",
    }
    documents = render(
        {
            **service(
                resources={"limits": limits, "requests": {"cpu": ".5"}},
                sharedMemory=2**30,
                tmpSizeLimit="1e11",
                podLabels={"a": 1e21, "b": 0.5},
            ),
            "runtimes": {"tmpSizeLimit": 1e11, "cpu": {"sharedMemory": "0.5Gi", "requests": {"cpu": 1.5}}},
            "modelCaches": {"m": {**CACHE, "claim": {"size": "1Pi"}, "job": {"cpu": 0.5, "memory": "1E9"}}},
        }
    )
    assert [problem for document in documents for problem in problems(document)] == []
    found = of_kind(documents, "InferenceService")["chat"]["spec"]["predictor"]
    assert found["model"]["resources"]["limits"]["cpu"] == "1000"
    assert found["labels"] == {"a": "1000000000000000000000", "b": "0.5"}
    assert [v["emptyDir"]["sizeLimit"] for v in found["volumes"]] == ["100000000000", "1073741824"]


def test_one_registry_and_one_pull_secret_do_for_every_pod() -> None:
    engines: Document = {"sglang": "gpu", "llama-cpp": "cpu", "tgi": "gpu", "triton": "gpu", "lmdeploy": "gpu"}
    services = {n: {"engine": n, "device": d, "storageUri": "hf://a/b"} for n, d in engines.items()}
    values: Document = {
        "inferenceServices": {**services, "chat": {"storageUri": "hf://a/b"}},
        "modelCaches": {"m": {**CACHE, "tensorrtLLM": {"model": "triton"}}},
        "batchJobs": {"b": {"claim": "c", "url": "http://a"}},
        "rolloutJobs": {"chat": {"args": ["--seed=1"]}},
    }
    shared: Document = {"imageRegistry": "mirror.example.com:5000/all", "imagePullSecrets": ["a", {"name": "b"}]}
    own: Document = {"image": {"registry": "own.example.com", "pullSecrets": ["own"]}}
    mirror: Document = {"engineRuntimeDefaults": {"registry": "mirror.example.com"}}
    for more, hosts, secrets in (
        ({"global": shared}, {"mirror.example.com:5000/all"}, ["a", "b"]),
        ({"global": shared, **own, **mirror}, {"own.example.com", "mirror.example.com"}, ["own"]),
    ):
        pods = list(pods_of(render({**values, **more})))
        assert len(pods) > 15
        for _, pod in pods:
            assert [secret["name"] for secret in pod["imagePullSecrets"]] == secrets
            for container in pod["containers"] + pod.get("initContainers", []):
                assert container["image"].startswith(tuple(f"{host}/" for host in hosts)), container["image"]
    # What a parent says to all its charts may do nothing in one.
    assert not render({"global": shared, "runtimes": {"enabled": False}})
    untouched = render({**values, "global": None})
    assert "docker.io/lmsysorg/sglang" in json.dumps(untouched)


def test_a_parent_may_have_it_twice(tmp_path: Path) -> None:
    (tmp_path / "charts").mkdir()
    helm("package", str(CHART), "--destination", str(tmp_path / "charts"))
    version = load(CHART / "Chart.yaml")["version"]
    twice = [{"name": "kserve-vllm", "version": version, "alias": alias, "repository": ""} for alias in ("one", "two")]
    about = {"apiVersion": "v2", "name": "parent", "version": "1.0.0", "dependencies": twice}
    (tmp_path / "Chart.yaml").write_text(yaml.safe_dump(about))
    on = {name: {"enabled": True} for name in ("podMonitor", "prometheusRule", "dashboards")}
    values: Document = {
        "one": {"monitoring": on, **standard()},
        "two": {"monitoring": on, "runtimes": {"scope": "Namespaced"}},
    }
    documents = load_all(helm("template", "release", str(tmp_path), "-f", "-", stdin=json.dumps(values)))
    names = [(d["kind"], d["metadata"]["name"]) for d in documents]
    assert len(names) == len(set(names))
    selected = [d["spec"]["selector"]["matchLabels"] for d in of_kind(documents, "PodMonitor").values()]
    assert len(selected) == 2
    for labels in selected:
        pods = [d for d in documents if labels.items() <= d.get("spec", {}).get("labels", {}).items()]
        assert len({d["kind"] for d in pods}) == 1


def test_the_same_values_render_the_same_twice_and_by_the_cluster_not_at_all() -> None:
    values = json.dumps(
        {**service(), "modelCaches": {"m": CACHE}, "batchJobs": {"b": {"claim": "c", "url": "http://a"}}}
    )
    first, second = (helm("template", "r", str(CHART), "-f", "-", stdin=values) for _ in range(2))
    assert first == second
    templates = "".join(path.read_text() for path in (CHART / "templates").rglob("*.*"))
    changing = r"\b(rand[A-Z]\w+|uuidv4|genCA|gen\w+Cert|genPrivateKey|htpasswd|bcrypt)\b|[({=] *-? *now\b"
    assert not re.findall(changing, templates)
    # One place asks the cluster, and cluster.lookup switches it off.
    assert len(re.findall(r"[{=] *lookup ", templates)) == 1


def test_what_notes_give_to_paste_is_a_command() -> None:
    keyed = {"storageUri": "hf://a/b", "apiKeys": {"secretName": "s"}}
    services: Document = {"keyed": keyed, "open": {"storageUri": "hf://a/b", "task": "embed"}}
    cases: list[Document] = [
        {},
        {"runtimes": {"enabled": False}},
        {"inferenceServices": services, "rolloutJobs": {"keyed": {"args": ["--seed=1"]}}},
    ]
    for values in cases:
        said = helm("install", "r", str(CHART), "--dry-run=client", "-f", "-", stdin=json.dumps(values))
        notes = said.split("NOTES:")[1]
        assert "<" not in notes
        commands = re.findall(r"^ *(?:kubectl|helm|curl|kserve-vllm |[A-Z_]+=)(?:.*\\\n)*.*$", notes, re.MULTILINE)
        assert len(commands) > (7 if "inferenceServices" in values else 0)
        subprocess.run(["bash", "-n", "-c", "\n".join(commands)], check=True)
        assert ("demo.runtime=RUNTIME" in notes) == ("runtimes" in values)
        keys = ["$API_KEY" in command for command in commands if "curl" in command]
        assert keys == ([True, False] if "inferenceServices" in values else [])


def test_classes_and_places_of_pods_reach_jobs_and_tests() -> None:
    here: Document = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [{"matchFields": []}]}}
    place: Document = {
        "priorityClassName": "low",
        "nodeSelector": {"pool": 1},
        "tolerations": [{"key": "a", "operator": "Exists"}],
        "affinity": {"nodeAffinity": here, "podAffinity": None},
    }
    job = {**place, "runtimeClassName": "nvidia"}
    documents = render(
        {
            **service(),
            "modelCaches": {"m": {**CACHE, "job": job}},
            "batchJobs": {"b": {"claim": "c", "url": "http://a", "job": job}},
            "rolloutJobs": {"chat": {"args": ["--seed=1"], "job": job}},
            "tests": place,
            "image": {"architecture": "amd64"},
        }
    )
    mine = [pod for _, pod in pods_of(documents) if pod.get("priorityClassName") == "low"]
    for pod in mine:
        assert pod["nodeSelector"] == {"pool": "1", "kubernetes.io/arch": "amd64"}
        assert pod["tolerations"] == place["tolerations"]
        assert pod["affinity"] == {"nodeAffinity": here}
    assert sorted(str(pod.get("runtimeClassName")) for pod in mine) == ["None", "nvidia", "nvidia", "nvidia"]
