"""Compile caches that outlive a pod: where they lie, and that no two revisions share a folder."""

from __future__ import annotations

from typing import Any

from tests.charts.support import Document, of_kind, predictor, render

CACHED = {"coldStart": {"cache": {"claim": "compiled"}}}
VARIABLES = {"VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"}
BELOW = "/var/cache/kserve-vllm"


def folders(container: Document) -> set[str]:
    """Folders in the claim that hold a container's caches."""
    paths = [each["value"] for each in container["env"] if each["name"] in VARIABLES]
    assert len(paths) == len(VARIABLES)
    assert all(path.startswith(f"{BELOW}/") for path in paths)
    return {path.rpartition("/")[0] for path in paths}


def test_caches_lie_in_the_claim_in_one_folder() -> None:
    found = predictor({"inferenceServices": {"chat": {"model": "org/a", **CACHED}}})
    assert {"name": "compiled", "persistentVolumeClaim": {"claimName": "compiled"}} in found["volumes"]
    assert {"name": "compiled", "mountPath": BELOW} in found["model"]["volumeMounts"]
    assert len(folders(found["model"])) == 1


def test_what_shapes_what_is_compiled_has_a_folder_of_its_own() -> None:
    ways: dict[str, dict[str, Any]] = {
        "one": {},
        "model": {"model": "org/b"},
        "stored": {"model": None, "storageUri": "hf://org/a"},
        "flag": {"maxModelLen": 4096},
        "extra": {"extraArgs": ["--dtype=float16"]},
        "cpu": {"device": "cpu"},
        "gpus": {"parallelism": {"tensor": 2}},
        "same": {"podLabels": {"a": "b"}},
    }
    entries = {name: {"model": "org/a", **CACHED, **values} for name, values in ways.items()}

    def by_service(image: dict[str, Any]) -> dict[str, str]:
        found = of_kind(render({"inferenceServices": entries, **image}), "InferenceService")
        return {name: folders(each["spec"]["predictor"]["model"]).pop() for name, each in found.items()}

    before = by_service({})
    assert before["same"] == before["one"]
    assert len(set(before.values())) == len(ways) - 1
    # A rollout of another image reads nothing that the one before it wrote.
    assert not set(by_service({"image": {"tag": "9.9.9"}}).values()) & set(before.values())


def test_workers_of_several_nodes_have_the_same_folder() -> None:
    chat = {
        "storageUri": "pvc://models/a",
        "deploymentMode": "Standard",
        "multiNode": {"enabled": True},
        "parallelism": {"pipeline": 2, "tensor": 2},
        **CACHED,
    }
    found = predictor({"inferenceServices": {"chat": chat}})
    (worker,) = found["workerSpec"]["containers"]
    assert folders(worker) == folders(found["model"])
    assert {"name": "compiled", "mountPath": BELOW} in worker["volumeMounts"]
    assert {"name": "compiled", "persistentVolumeClaim": {"claimName": "compiled"}} in found["workerSpec"]["volumes"]


def test_an_operators_own_variable_wins() -> None:
    chat = {"model": "org/a", "env": [{"name": "VLLM_CACHE_ROOT", "value": "/mine"}], **CACHED}
    env = predictor({"inferenceServices": {"chat": chat}})["model"]["env"]
    assert [each["value"] for each in env if each["name"] == "VLLM_CACHE_ROOT"] == ["/mine"]


def test_caches_may_lie_on_the_node() -> None:
    cache = {"coldStart": {"cache": {"nodePath": "/var/lib/kserve-vllm/cache"}}}
    values = {"inferenceServices": {"chat": {"model": "org/a", **cache}}}
    found = predictor(values)
    path = {"path": "/var/lib/kserve-vllm/cache", "type": "Directory"}
    assert [each["hostPath"] for each in found["volumes"] if each["name"] == "compiled"] == [path]
    assert {"name": "compiled", "mountPath": BELOW} in found["model"]["volumeMounts"]
    in_a_claim = predictor({"inferenceServices": {"chat": {"model": "org/a", **CACHED}}})
    assert folders(found["model"]) == folders(in_a_claim["model"])
