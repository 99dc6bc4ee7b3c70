"""Pictures. matplotlib is an optional extra: `pip install 'kserve-vllm[plan]'`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kserve_vllm.errors import ConfigError
from kserve_vllm.ops.model.hardware import Prices
from kserve_vllm.ops.planner import Option

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
