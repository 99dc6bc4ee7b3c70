"""Draw the dashboards' panels from a Prometheus server's data, for the README.

Usage: draw_dashboards.py PROMETHEUS_URL FOLDER

Asks for the last minutes that have data and writes one PNG per dashboard. Needs matplotlib, which nothing else here
does: `.venv/bin/pip install matplotlib`. `tests/observability/draw_load_run.py` starts all that it takes.
"""

from __future__ import annotations

import json
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

DASHBOARDS = Path(__file__).resolve().parents[2] / "charts" / "kserve-vllm" / "files" / "dashboards"
_SHOWN_S = 120
_COLUMNS = 4


def series(url: str, expression: str, seconds: int) -> list[dict[str, Any]]:
    """The series of a range query over the last `seconds`, a point a second."""
    for name, value in (("$namespace", ".*"), ("$inferenceservice", ".*"), ("$__rate_interval", "15s")):
        expression = expression.replace(name, value)
    now = time.time()
    form = urllib.parse.urlencode({"query": expression, "start": now - seconds, "end": now, "step": 1})
    with urllib.request.urlopen(f"{url}/api/v1/query_range?{form}", timeout=30) as answer:
        rows: list[dict[str, Any]] = json.load(answer)["data"]["result"]
    return rows


def label(template: str, metric: dict[str, str]) -> str:
    """Grafana's legend of a series."""
    for name, value in metric.items():
        template = template.replace(f"{{{{{name}}}}}", value)
    return template


def draw(url: str, board: dict[str, Any], file: Path, seconds: int = _SHOWN_S) -> int:
    """One dashboard as a grid of small panels. Returns how many panels have data."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = board["panels"]
    rows = -(-len(panels) // _COLUMNS)
    figure, axes = pyplot.subplots(rows, _COLUMNS, figsize=(4.1 * _COLUMNS, 2.3 * rows), squeeze=False)
    filled = 0
    for number, axis in enumerate(axes.flat):
        if number >= len(panels):
            axis.set_axis_off()
            continue
        panel = panels[number]
        drawn = 0
        for target in panel["targets"]:
            for row in series(url, target["expr"], seconds):
                points = [(float(at), float(value)) for at, value in row["values"] if value != "NaN"]
                if points:
                    end = time.time()
                    axis.plot(
                        [at - end for at, _ in points],
                        [value for _, value in points],
                        linewidth=1.1,
                        label=label(target["legendFormat"], row["metric"]),
                    )
                    drawn += 1
        filled += bool(drawn)
        unit = panel["fieldConfig"]["defaults"]["unit"]
        names = {"reqps": "requests/s", "s": "seconds", "percentunit": "share", "short": ""}
        axis.set_title(panel["title"] + (f" ({names[unit]})" if names.get(unit) else ""), fontsize=8)
        axis.tick_params(labelsize=6)
        axis.set_ylim(bottom=0)
        axis.margins(y=0.1)
        axis.set_xlim(-seconds, 0)
        axis.grid(alpha=0.25)
        if 0 < drawn <= 8:
            axis.legend(fontsize=5, loc="upper left", frameon=False)
    figure.suptitle(f"{board['title']}, last {seconds} s", fontsize=10)
    figure.tight_layout()
    figure.savefig(file, dpi=75)
    pyplot.close(figure)
    # A few colours are enough, and a third of the size.
    from PIL import Image

    Image.open(file).convert("RGB").quantize(24).save(file, optimize=True)
    return filled


def main() -> int:
    """Draw every dashboard."""
    url, folder = sys.argv[1], Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(DASHBOARDS.glob("*.json")):
        board = json.loads(path.read_text())
        filled = draw(url, board, folder / f"{path.stem}.png")
        print(f"{path.stem}: {filled} of {len(board['panels'])} panels have data")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
