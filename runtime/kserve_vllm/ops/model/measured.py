"""Measurements that move the roofline: AIConfigurator's kernels, or one's own benchmark."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import itertools
import json
import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from kserve_vllm.core.errors import ConfigError
from kserve_vllm.ops.model.architecture import Architecture
from kserve_vllm.ops.model.hardware import GPU
from kserve_vllm.ops.model.memory import EngineSettings, whole_experts
from kserve_vllm.ops.model.steptime import StepTime, operate

Row = Mapping[str, Any]
"""A load of a benchmark's file, as `read_benchmark` let it pass; its other fields are those of whichever program."""

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


def read_benchmark(path: Path, name: str = "--calibrate", timed: bool = True) -> list[Row]:
    """Rows of a benchmark: a result of `kserve-vllm bench --save`, whose form `ops.bench.result` describes; or one
    object per load, as `vllm bench serve --save-result` writes it; or a list of such.

    Args:
        path: the file.
        name: of the argument, for errors.
        timed: whether each row must have the time between tokens.

    Raises:
        ConfigError: the file can't be read, or a row lacks what is needed.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name} {path}: {error}") from None
    rows = content.get("results", content) if isinstance(content, Mapping) else content
    rows = rows if isinstance(rows, list) else [rows]
    for row in rows:
        missing = [
            name
            for name in ("completed", "total_input_tokens", "total_output_tokens", "duration")
            if not isinstance(row, Mapping) or not row.get(name)
        ]
        if missing or (timed and not (row.get("median_tpot_ms") or row.get("mean_tpot_ms"))):
            raise ConfigError(
                f"{name} {path}: a row lacks {', '.join(missing) or 'median_tpot_ms'}; it reads what "
                "`kserve-vllm bench --save` and `vllm bench serve --save-result` write"
                + ("; answers that come whole have no time between tokens" if not missing else "")
            )
    if not rows:
        raise ConfigError(f"{name} {path}: no load in it")
    return rows


@dataclass(frozen=True)
class Load:
    """What calibration needs of a row.

    Attributes:
        prompt, output: mean tokens.
        cached: mean tokens of a prompt that came from the prefix cache, where the row says so.
        gap_s: time between two tokens of a stream.
        first_token_s: to the first token, or 0 where the row has none.
        running: sequences that ran at once, by Little's law: output tokens per second times seconds per token.
    """

    prompt: float
    output: float
    cached: float
    gap_s: float
    first_token_s: float
    running: float


def load_of(row: Row) -> Load:
    """A row that `read_benchmark` let pass."""
    number = float(row["completed"])
    gap = float(row.get("median_tpot_ms") or row["mean_tpot_ms"]) / 1000
    return Load(
        float(row["total_input_tokens"]) / number,
        float(row["total_output_tokens"]) / number,
        float(row.get("total_cached_tokens") or 0) / number,
        gap,
        float(row.get("median_ttft_ms") or row.get("mean_ttft_ms") or 0) / 1000,
        max(1.0, float(row["total_output_tokens"]) / float(row["duration"]) * gap),
    )


def fitted_steps(path: Path) -> StepTime:
    """A step time from a benchmark alone, for a device that no data sheet is known of.

    A step takes `fixed + per_sequence * sequences + per_prompt_token * new tokens`. Each load gives the time between
    tokens, in which the prompts of the others are computed too (for each running sequence one in `output` steps), and
    the one with the fewest sequences the time to the first token. The three are the least squares of the relative
    errors, none below 0.

    Raises:
        ConfigError: the file can't be used, or has fewer than two loads.
    """
    loads = [load_of(row) for row in read_benchmark(path, "model.steps")]
    if len({round(load.running, 1) for load in loads}) < 2:
        raise ConfigError(f"model.steps {path}: it takes two loads at least, such as --concurrency 1,8")
    left, right = [], []
    for load in loads:
        new = max(1.0, load.prompt - load.cached)
        left.append([1.0, load.running, load.running / max(load.output, 1.0) * new])
        right.append(load.gap_s)
    fewest = min(loads, key=lambda load: load.running)
    if fewest.first_token_s:
        left.append([1.0, 1.0, max(1.0, fewest.prompt - fewest.cached)])
        right.append(fewest.first_token_s)
    scale = 1 / np.asarray(right)
    best: tuple[float, dict[int, float]] = (math.inf, {})
    # Three unknowns, so every choice of those that are not 0 can be tried (non-negative least squares).
    for chosen in itertools.chain.from_iterable(itertools.combinations(range(3), n) for n in (3, 2, 1)):
        matrix = np.asarray(left)[:, chosen] * scale[:, None]
        found, *_ = np.linalg.lstsq(matrix, np.ones(len(right)), rcond=None)
        if (found < 0).any():
            continue
        error = float(((matrix @ found - 1) ** 2).sum())
        if error < best[0] - 1e-12:
            best = error, dict(zip(chosen, map(float, found), strict=True))
    parts = best[1]
    off = math.sqrt(best[0] / len(right))
    return StepTime(
        fixed=parts.get(0, 0.0),
        read_per_kv_token=0.0,
        read_weights=0.0,
        read_experts=0.0,
        experts=0,
        experts_per_token=0,
        compute_per_token=parts.get(2, 0.0),
        compute_per_pair=0.0,
        reduce_start=0.0,
        reduce_per_token=0.0,
        # A running sequence is a token of the step too.
        per_sequence=max(0.0, parts.get(1, 0.0) - parts.get(2, 0.0)),
        source=f"{path.name}, steps fitted to {len(loads)} loads",
        band=max(CALIBRATED_BAND, 2 * off),
    )


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
        load = load_of(row)
        running, prompt, cached = round(load.running), max(1, round(load.prompt)), round(load.cached)
        computed = operate(bare, running, prompt, max(1, round(load.output)), cached, stages).gap_s
        points.setdefault(running, []).append((load.gap_s, computed))
        if load.first_token_s and (first is None or running < first[0]):
            first = (running, load.first_token_s / (bare.prefill(prompt, cached) * stages + computed))
    scale = tuple(sorted((float(n), sum(g for g, _ in p) / sum(c for _, c in p)) for n, p in points.items()))
    low = scale[0][1]
    return replace(
        step,
        decode_scale=scale,
        prefill_scale=min(max(first[1], low / 4), low * 4) if first else low,
        source=f"{path.name}, measured at {', '.join(f'{n:g}' for n, _ in scale)} sequences at once",
        band=CALIBRATED_BAND,
    )
