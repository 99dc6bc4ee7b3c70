"""Pictures. matplotlib is an optional extra: `pip install 'kserve-vllm[plan]'`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kserve_vllm.core.errors import ConfigError
from kserve_vllm.ops.model.hardware import Prices
from kserve_vllm.ops.planner import Option

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from kserve_vllm.ops.bench.result import SLO, Row
    from kserve_vllm.ops.simulate import SimulationReport

_COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5")


def pyplot() -> Any:
    """matplotlib without a display.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("--picture needs matplotlib: pip install 'kserve-vllm[plan]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as found

    return found


def draw_plan(path: Path, picks: Sequence[Option], prices: Prices) -> None:
    """Draw each GPU's memory in parts, and what the fleet costs a month. Raises ConfigError without matplotlib."""
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 0.45 * len(picks) + 1.8), sharey=True)
    names = [
        f"{o.gpu.name}  {o.replicas}x(TP{o.settings.tensor_parallel_size} PP{o.settings.pipeline_parallel_size})"
        for o in picks
    ]
    parts = ("weights", "draft", "adapters", "activations", "graphs", "outside", "kv_cache")
    starts = [0.0] * len(picks)
    for part, colour in zip(parts, _COLOURS, strict=False):
        sizes = [getattr(option.budget, part) / (1 << 30) for option in picks]
        if any(sizes):
            left.barh(names, sizes, left=starts, color=colour, label=part.replace("_", " "))
            starts = [start + size for start, size in zip(starts, sizes, strict=True)]
    left.set_xlabel("memory of one GPU, GiB")
    left.legend(fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.25), frameon=False)
    right.barh(names, [option.per_month or 0.0 for option in picks], color=_COLOURS[0])
    right.set_xlabel(f"{prices.currency} a month, prices of {prices.dated}")
    left.invert_yaxis()
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    try:
        figure.savefig(path, dpi=130, bbox_inches="tight")
    except (OSError, ValueError) as error:
        raise ConfigError(f"--picture {path}: {error}") from None


def draw_runs(path: Path, reports: Sequence[SimulationReport]) -> None:
    """Draw each run: requests inside, replicas wanted and ready, first tokens. Raises ConfigError as above."""
    plt = pyplot()
    figure, grid = plt.subplots(3, len(reports), figsize=(max(7, 5 * len(reports)), 7), sharex="col", squeeze=False)
    for column, report in enumerate(reports):
        result, own = report.result, report.scenario
        minutes = [at / 60 for at, *_ in result.timeline]
        top, middle, bottom = (grid[row][column] for row in range(3))
        top.set_title(f"{own.name}: {report.good:.1%} in the SLO, {result.gpu_hours:.1f} GPU hours", fontsize=9)
        top.fill_between(minutes, [inside for *_, inside, _ in result.timeline], color=_COLOURS[7], label="inside")
        top.plot(minutes, [waiting for *_, waiting in result.timeline], color=_COLOURS[2], label="waiting", lw=1)
        top.set_ylabel("requests")
        middle.step(minutes, [w for _, w, *_ in result.timeline], color=_COLOURS[1], label="wanted", where="post")
        middle.step(minutes, [r for _, _, r, *_ in result.timeline], color=_COLOURS[4], label="ready", where="post")
        middle.set_ylabel("replicas")
        served = [outcome for outcome in result.outcomes if outcome.result == "ok"]
        thin = served[:: max(1, len(served) // 5000)]
        bottom.plot([o.at / 60 for o in thin], [o.first_token_s for o in thin], ".", ms=1.5, color=_COLOURS[0])
        bottom.axhline(own.first_token_s, color=_COLOURS[2], lw=1, label="SLO")
        bottom.set_ylabel("first token, s")
        bottom.set_yscale("log")
        bottom.set_xlabel("minutes")
        for axes in (top, middle, bottom):
            axes.legend(fontsize=7, frameon=False, loc="upper right")
    _save(figure, path)


def draw_bench(path: Path, rows: Sequence[Row], slo: SLO) -> None:
    """Draw a benchmark: first token and gap over load, and output tokens per second. Raises ConfigError as above."""
    from kserve_vllm.ops.bench.result import load_name

    plt = pyplot()
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.6))
    names = [load_name(row) for row in rows]
    at = range(len(names))
    for axes, title, figures, bound in (
        (left, "first token, ms", ("ttft", "e2el"), slo.first_token),
        (middle, "gap between tokens, ms", ("tpot",), slo.gap),
    ):
        kind = next((name for name in figures if any(row[f"median_{name}_ms"] for row in rows)), figures[0])
        title = "end to end, ms" if kind == "e2el" else title
        for label, share, colour in (("p50", "median", 0), ("p95", "p95", 1), ("p99", "p99", 2)):
            axes.plot(at, [row[f"{share}_{kind}_ms"] for row in rows], "o-", color=_COLOURS[colour], label=label, ms=4)
        bound = slo.end_to_end if kind == "e2el" else bound
        if bound is not None:
            axes.axhline(bound * 1000, color="black", lw=1, ls="--", label="SLO")
        axes.set_title(title, fontsize=9)
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=7, frameon=False)
    right.bar(at, [row["output_throughput"] for row in rows], color=_COLOURS[4], label="all")
    right.set_title("output tokens per second", fontsize=9)
    for axes in (left, middle, right):
        axes.set_xticks(list(at), names, rotation=30, ha="right", fontsize=7)
    _save(figure, path)
