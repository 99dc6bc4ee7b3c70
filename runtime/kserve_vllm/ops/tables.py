"""Tables, bars and numbers for people."""

from __future__ import annotations

from collections.abc import Sequence

_BARS = " ▁▂▃▄▅▆▇█"


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Columns under a first row of titles; `right` are the columns whose cells stand at the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def gib(size: float) -> str:
    """Bytes as GiB."""
    value = size / (1 << 30)
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"


def money(value: float) -> str:
    """An amount with as many digits as it needs."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:,.2f}" if value >= 0.1 else f"{value:.4f}"


def seconds(value: float) -> str:
    """Seconds or milliseconds."""
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.2f} s"


def spark(values: Sequence[float], width: int = 72, top: float | None = None) -> str:
    """A line of bars: the mean of each of `width` parts."""
    if not values:
        return ""
    size = max(1.0, len(values) / width)
    parts = []
    at = 0.0
    while at < len(values):
        part = values[int(at) : max(int(at) + 1, int(at + size))]
        parts.append(max(part))
        at += size
    peak = top or max(parts) or 1.0
    return "".join(_BARS[min(8, max(0, round(8 * value / peak)))] for value in parts)


def bar(value: float, top: float, width: int = 30) -> str:
    """A horizontal bar."""
    return "█" * max(0, round(width * value / top)) if top > 0 else ""
