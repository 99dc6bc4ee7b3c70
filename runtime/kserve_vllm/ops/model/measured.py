"""Measurements that move the roofline: AIConfigurator's kernels, or one's own benchmark."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from kserve_vllm.core.errors import ConfigError
from kserve_vllm.ops.model.architecture import Architecture
from kserve_vllm.ops.model.hardware import GPU
from kserve_vllm.ops.model.memory import EngineSettings, whole_experts
from kserve_vllm.ops.model.steptime import StepTime, operate

# AIConfigurator interpolates kernels that were measured, and sums them. Its authors give no band for one figure;
# against the published figures in tests/ops/published.yaml it is as far off as this.
AICONFIGURATOR_BAND = 0.30
CALIBRATED_BAND = 0.15
# Two models of one thing that differ by more than this factor can't both be believed. Seen for FP8 experts over eight
# GPUs, where AIConfigurator 0.12 gives a fifth of the published rate.
DISAGREEMENT = 2.5
_BATCHES = (1, 8, 64, 256)


def aiconfigurator_installed() -> bool:
    """Whether the optional extra `kserve-vllm[plan]` is there."""
    return importlib.util.find_spec("aiconfigurator") is not None


def with_aiconfigurator(
    step: StepTime,
    architecture: Architecture,
    gpu: GPU,
    settings: EngineSettings,
    hub_id: str,
    prompt: int,
    output: int,
) -> StepTime:
    """The same step time, moved to AIConfigurator's measured kernels.

    Raises:
        LookupError: it does not know this GPU or this model, or lacks kernels for it; the text says which.
    """
    if not gpu.aiconfigurator:
        raise LookupError(f"AIConfigurator has not measured {gpu.name}")
    method = architecture.quantization.method
    modes = {"none": "bfloat16", "fp8": "fp8", "awq": "int4_wo", "gptq": "int4_wo", "nvfp4": "nvfp4", "int8": "int8_wo"}
    if method not in modes:
        raise LookupError(f"AIConfigurator has no kernels for {method}")
    common: dict[str, Any] = {
        "model_path": hub_id,
        "system_name": gpu.aiconfigurator,
        "backend_name": "vllm",
        "tp_size": settings.tensor_parallel_size,
        "pp_size": settings.pipeline_parallel_size,
        "gemm_quant_mode": modes[method],
        "kvcache_quant_mode": "bfloat16" if settings.kv_cache_dtype == "auto" else "fp8",
    }
    if architecture.experts:
        whole, ranks = whole_experts(architecture, settings.tensor_parallel_size), settings.tensor_parallel_size
        slices = {"moe_tp_size": 1 if whole else ranks, "moe_ep_size": ranks if whole else 1}
        common |= {**slices, "moe_quant_mode": modes[method]}
    decode, prefill = [], []
    with _quiet():
        try:
            from aiconfigurator.cli.api import cli_estimate

            for batch in (b for b in _BATCHES if b <= max(settings.max_num_seqs, 1)):
                found = cli_estimate(mode="static_gen", isl=prompt, osl=max(output, 2), batch_size=batch, **common)
                decode.append((batch, prompt + output / 2, found.tpot / 1000))
            found = cli_estimate(mode="static_ctx", isl=prompt, osl=1, batch_size=1, **common)
            prefill.append((prompt, found.ttft / 1000))
        except Exception as error:  # its own errors are of many kinds, all of them "not this one"
            raise LookupError(
                f"AIConfigurator: {str(error).splitlines()[0][:200] if str(error) else type(error).__name__}"
            ) from None
    if not all(seconds > 0 for *_, seconds in decode) or not all(seconds > 0 for _, seconds in prefill):
        raise LookupError("AIConfigurator gave no times")
    apart = max(max(r, 1 / r) for r in (seconds / step.step(batch, context) for batch, context, seconds in decode))
    if apart > DISAGREEMENT:
        raise LookupError(
            f"AIConfigurator and the data sheet are {apart:.1f} times apart for this model; neither was measured"
        )
    # The host's work is not among its kernels.
    host = step.fixed + 0.0
    decode = [(batch, context, max(seconds, host)) for batch, context, seconds in decode]
    return step.moved(
        decode, prefill, f"AIConfigurator's measured kernels for {hub_id} on {gpu.aiconfigurator}", AICONFIGURATOR_BAND
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """It logs, warns and prints while it loads its tables."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def read_benchmark(path: Path) -> list[Mapping[str, Any]]:
    """Rows of a benchmark: one object per concurrency, as `vllm bench serve --save-result` writes it; or a list of
    such, or an object whose `results` is one.

    Raises:
        ConfigError: the file can't be read, or a row lacks what is needed.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--calibrate {path}: {error}") from None
    rows = content.get("results", content) if isinstance(content, Mapping) else content
    rows = rows if isinstance(rows, list) else [rows]
    for row in rows:
        missing = [
            name
            for name in ("completed", "total_input_tokens", "total_output_tokens", "duration")
            if not isinstance(row, Mapping) or not row.get(name)
        ]
        if missing or not (row.get("median_tpot_ms") or row.get("mean_tpot_ms")):
            raise ConfigError(
                f"--calibrate {path}: a row lacks {', '.join(missing) or 'median_tpot_ms'}; it reads what "
                "`vllm bench serve --save-result` writes"
            )
    return rows


def with_benchmark(step: StepTime, path: Path, stages: int = 1) -> StepTime:
    """The same step time, moved to one's own measurement.

    Each row gives the batch that ran (Little's law: output tokens per second times seconds per token) and the time per
    token; the row with the smallest batch gives the time of a prompt.

    Raises:
        ConfigError: see `read_benchmark`.
    """
    bare = replace(step, decode_scale=(), prefill_scale=1.0)
    points: dict[int, list[tuple[float, float]]] = {}
    first: tuple[float, float] | None = None
    for row in read_benchmark(path):
        number = float(row["completed"])
        prompt, output = float(row["total_input_tokens"]) / number, float(row["total_output_tokens"]) / number
        gap = float(row.get("median_tpot_ms") or row["mean_tpot_ms"]) / 1000
        running = max(1, round(float(row["total_output_tokens"]) / float(row["duration"]) * gap))
        computed = operate(bare, running, max(1, round(prompt)), max(1, round(output)), 0, stages).gap_s
        points.setdefault(running, []).append((gap, computed))
        first_token = float(row.get("median_ttft_ms") or row.get("mean_ttft_ms") or 0) / 1000
        if first_token and (first is None or running < first[0]):
            first = (running, first_token / (bare.prefill(round(prompt)) * stages + computed))
    scale = tuple(sorted((float(n), sum(g for g, _ in p) / sum(c for _, c in p)) for n, p in points.items()))
    low = scale[0][1]
    return replace(
        step,
        decode_scale=scale,
        prefill_scale=min(max(first[1], low / 4), low * 4) if first else low,
        source=f"{path.name}, measured at {', '.join(f'{n:g}' for n, _ in scale)} sequences at once",
        band=CALIBRATED_BAND,
    )
