"""Triton's extensions that its load generators and analyzers ask first: a model's configuration and its statistics.

Sources: Triton's model configuration and statistics extensions; `model_config.proto` and `grpc_service.proto` of
triton-inference-server/common, for names and meanings.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

from kserve_vllm.core.request_context import RequestContext

VERSION = "1"

DATA_TYPES: Mapping[str, str] = {
    name: f"TYPE_{'STRING' if name == 'BYTES' else name}"
    for name in "BOOL UINT8 UINT16 UINT32 UINT64 INT8 INT16 INT32 INT64 FP16 FP32 FP64 BYTES".split()
}
"""V2 datatype to its name in a model's configuration, in the order of their numbers there, from 1."""

SPANS = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output", "cache_hit", "cache_miss")


def configuration(metadata: Mapping[str, Any], generates: bool) -> dict[str, object]:
    """A model's configuration, as Triton gives that of a model of its vLLM backend.

    Args:
        metadata: of the model, as V2 gives it.
        generates: whether it continues text, so that one request may have many responses.
    """

    def tensors(found: Sequence[Mapping[str, str]], optional: bool) -> list[dict[str, object]]:
        return [
            {
                "name": each["name"],
                "data_type": DATA_TYPES[each["datatype"]],
                "dims": each["shape"],
                **({"optional": each["name"] != "text_input"} if optional else {}),
            }
            for each in found
        ]

    return {
        "name": metadata["name"],
        "platform": "",
        "backend": "vllm",
        "version_policy": {"latest": {"num_versions": 1}},
        # Requests are batched by the engine, step by step; a tensor's first axis is not the batch that Triton means.
        "max_batch_size": 0,
        "input": tensors(metadata["inputs"], optional=True),
        "output": tensors(metadata["outputs"], optional=False),
        "model_transaction_policy": {"decoupled": generates},
    }


class _Row(TypedDict):
    last_inference: int
    inference_count: int
    execution_count: int
    inference_stats: dict[str, dict[str, int]]
    batch_stats: list[object]


class Statistics:
    """Counts what each model has answered since the start, over all protocols. Of this process alone.

    Args:
        known: whether a name is that of a model here; what is asked for under other names is not counted.
    """

    def __init__(self, known: Callable[[str], bool]) -> None:
        self._known = known
        self._models: dict[str, _Row] = {}

    def count(self, context: RequestContext) -> None:
        """Count a request that is over. Questions are none."""
        name = context.adapter or context.model or context.base_model
        if context.quiet or name is None or not self._known(name):
            return
        row = self._models.setdefault(name, _nothing())
        spans = row["inference_stats"]
        good = context.outcome == "ok"
        if good and not context.engine.sequences and context.cache != "hit":
            return  # tokens were counted, or the like
        _add(spans["success" if good else "fail"], context.duration_s)
        if not good:
            return
        queue_s = context.engine.queue_s or 0.0
        row["last_inference"] = int(time.time() * 1000)
        row["inference_count"] += max(1, context.engine.finished)
        row["execution_count"] += 1
        _add(spans["queue"], queue_s)
        _add(spans["compute_input"], 0.0)
        _add(spans["compute_infer"], max(0.0, context.duration_s - queue_s))
        _add(spans["compute_output"], 0.0)
        if context.cache in ("hit", "miss"):
            _add(spans[f"cache_{context.cache}"], context.duration_s if context.cache == "hit" else 0.0)

    def of(self, names: Sequence[str]) -> dict[str, object]:
        """The statistics of models: counts, times in nanoseconds, the last inference in milliseconds since 1970."""
        rows = [{"name": name, "version": VERSION, **self._models.get(name, _nothing())} for name in names]
        return {"model_stats": rows}


def _nothing() -> _Row:
    spans = {name: {"count": 0, "ns": 0} for name in SPANS}
    return {
        "last_inference": 0,
        "inference_count": 0,
        "execution_count": 0,
        "inference_stats": spans,
        "batch_stats": [],
    }


def _add(span: dict[str, int], seconds: float) -> None:
    span["count"] += 1
    span["ns"] += int(seconds * 1e9)
