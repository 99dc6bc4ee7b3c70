"""Each cause of the table is found in its recorded case, first; and nothing is found where nothing is wrong."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

from kserve_vllm.config.settings import fields, flag_name
from kserve_vllm.ops.diagnose.causes import CAUSES, judge
from tests.ops.snapshots import CASES, RECORDED, recorded, snapshot

BROKEN = [case for case in CASES if case["cause"]]
HEALTHY = [case for case in CASES if not case["cause"]]


@pytest.mark.parametrize("case", BROKEN, ids=lambda case: f"{case['cause']} after {case['after'][:30]}")
def test_exactly_the_cause_of_a_recorded_case_comes_first(case: dict[str, Any]) -> None:
    findings = judge(snapshot(case))
    assert [f.cause.id for f in findings][:1] == [case["cause"]], [(f.cause.id, f.evidence) for f in findings]
    first = findings[0]
    assert first.evidence
    for text in (first.why, *first.mend):
        left = re.findall(r"\$\{?(?:name|ns|pod|container|where|[a-z]+)\b\}?", text)
        assert not left, f"{first.cause.id} leaves {left} in {text!r}"
    assert first.mend


@pytest.mark.parametrize("case", HEALTHY, ids=lambda case: case["after"][:50])
def test_nothing_is_found_where_nothing_is_wrong(case: dict[str, Any]) -> None:
    assert [(f.cause.id, f.evidence) for f in judge(snapshot(case))] == []


def test_every_cause_has_a_case_and_every_case_a_cause() -> None:
    ids = [cause.id for cause in CAUSES]
    assert len(ids) == len(set(ids)) >= 50
    assert set(ids) == {case["cause"] for case in BROKEN}
    known = {gone for cause in CAUSES for gone in cause.explains}
    assert known <= set(ids), "a row explains a cause that does not exist"


def test_one_odd_object_does_not_hide_the_other_causes() -> None:
    taken = snapshot(next(c for c in BROKEN if c["cause"] == "gpu-short"))
    taken.objects["PodDisruptionBudget"] = ["not an object"]  # type: ignore[list-item]
    taken.objects["HTTPRoute"] = [{"metadata": {"name": "x"}, "spec": {"rules": 7}}]
    broken: list[str] = []
    assert judge(taken, broken)[0].cause.id == "gpu-short"
    assert broken
    with pytest.raises(TypeError):
        judge(taken)


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_a_snapshot_of_a_real_cluster_is_judged_by_its_name(path: Path) -> None:
    first = [f.cause.id for f in judge(recorded(path))][:1]
    wanted = path.stem.split("__")[0]
    assert first == ([] if wanted == "healthy" else [wanted])


def test_a_sentence_keeps_a_dollar_and_names_the_service() -> None:
    case = next(c for c in BROKEN if c["cause"] == "gpu-short")
    finding = judge(snapshot(case))[0]
    assert "chat-predictor-7d9f8b6c5-x2x4z waits for nvidia.com/gpu" in finding.why
    assert finding.mend[0].endswith("'<none>$'")


@pytest.mark.slow
def test_every_flag_of_the_server_that_a_remedy_names_exists() -> None:
    # The rest is kubectl's, helm's or of another subcommand.
    told = [line for cause in CAUSES for line in cause.mend if not re.search("kubectl|helm|--set|kserve-vllm", line)]
    ours = [line for line in told if line.startswith("#") or "extraArgs" in line]
    named = {flag for line in ours for flag in re.findall(r"--[a-z][a-z0-9-]+", line)}
    assert {"--redis-away", "--max-model-len", "--dtype"} <= named
    from vllm.engine.arg_utils import AsyncEngineArgs

    known = {name for _, name, _ in fields()} | {each.name for each in dataclasses.fields(AsyncEngineArgs)}
    assert named - {f"--{flag_name(name)}" for name in known} - {"--help", "--help-engine"} == set()


# A literal piece of each pattern that reads vLLM's words, and the module that writes them.
VLLM_WRITES = {
    "No available memory for the cache blocks": "v1/core/kv_cache_utils.py",
    "cache is needed, which is larger than the available KV cache ": "v1/core/kv_cache_utils.py",
    "is less than desired GPU memory utilization ": "v1/worker/utils.py",
    "Failed to infer device type": "config/device.py",
    "User-specified max_model_len (": "config/model.py",
    "than the derived max_model_len (": "config/model.py",
    "Total number of attention heads (": "config/model.py",
    "Quantization method specified in the model config ": "config/model.py",
    "World size (": "config/parallel.py",
    "is larger than the number of ": "config/parallel.py",
    "are not supported for now. ": "model_executor/models/registry.py",
    "Cannot find any model weights with `": "model_executor/model_loader/default_loader.py",
    "is greater than max_lora_rank": "lora/peft_helper.py",
    "looks like a file path, but it failed to be opened. ": "renderers/chat_utils.py",
    "with compute capability of at least 8.0. ": "platforms/cuda.py",
    "EngineCore encountered a fatal error.": "v1/engine/core.py",
    "`trust_remote_code=True` in LLM": "transformers_utils/config.py",
}


@pytest.mark.parametrize("words", VLLM_WRITES, ids=lambda words: words[:30])
def test_the_installed_vllm_still_says_what_the_table_reads(words: str) -> None:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.submodule_search_locations
    source = Path(spec.submodule_search_locations[0]) / VLLM_WRITES[words]
    assert words in source.read_text()
