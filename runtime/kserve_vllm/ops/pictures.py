"""Pictures. matplotlib is an optional extra: `pip install 'kserve-vllm[plan]'`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kserve_vllm.core.errors import ConfigError
from kserve_vllm.ops.model.hardware import Prices
from kserve_vllm.ops.planner import Option

if TYPE_CHECKING:
    from kserve_vllm.ops.simulate import Report

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


def _save(figure: Any, path: Path) -> None:
    try:
        figure.savefig(path, dpi=130, bbox_inches="tight")
    except (OSError, ValueError) as error:
        raise ConfigError(f"--picture {path}: {error}") from None


def draw_runs(path: Path, reports: Sequence[Report]) -> None:
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
