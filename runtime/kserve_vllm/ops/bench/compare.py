"""Two results beside each other, with the noise of both.

Requests of one run are no independent samples: those that wait in one queue are slow together. So whole stretches of
a run are drawn again (a moving-block bootstrap: Künsch 1989; blocks of about the square root of the number of
requests), and where a load was run several times, whole runs first. The interval is of the ratio new / old.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kserve_vllm.core.errors import ConfigError
from kserve_vllm.ops.bench.result import load_name
from kserve_vllm.ops.model.measured import Row

DRAWS = 1000
FEWEST = 20
"""Requests of a load below which nothing is said of it."""
Values = NDArray[np.float64]
Figure = Callable[[Values], Values]
"""From samples `[draws, values]` to a figure of each: `[draws]`."""


@dataclass(frozen=True)
class FigureDifference:
    """One figure of one load, in both results.

    Attributes:
        load: such as `16 at once`.
        figure: such as `first token p95`.
        old, new: seconds, or per second.
        low, high: the interval of new / old, or None where there is too little for one.
        better_is_less: False for throughput.
        verdict: `better`, `worse`, `same` (the interval lies within the tolerance), or `unclear`.
    """

    load: str
    figure: str
    old: float
    new: float
    low: float | None
    high: float | None
    better_is_less: bool
    verdict: str


@dataclass(frozen=True)
class _Figure:
    name: str
    column: str
    of: Figure
    least: int = FEWEST


def _percentile(share: float) -> Figure:
    return lambda values: np.asarray(np.percentile(values, share, axis=1), dtype=np.float64)


def _mean(values: Values) -> Values:
    return np.asarray(values.mean(axis=1), dtype=np.float64)


_TIMES = tuple(
    _Figure(f"{name} {label}", column, _percentile(share), least)
    for name, column in (("first token", "ttfts"), ("gap", "tpots"), ("end to end", "e2els"))
    for label, share, least in (("p50", 50, FEWEST), ("p95", 95, 60), ("p99", 99, 300))
)


def compare(
    old: Sequence[Row],
    new: Sequence[Row],
    confidence: float = 0.95,
    tolerance: float = 0.05,
    seed: int = 1,
) -> list[FigureDifference]:
    """Every figure of every load that both results have.

    Args:
        old, new: rows; several of one load are several runs of it.
        confidence: of each interval.
        tolerance: a ratio nearer to 1 than this is no difference that matters.
        seed: of the drawing.

    Raises:
        ConfigError: they have no load in common, or hold no single requests.
    """
    before, after = _by_load(old), _by_load(new)
    common = [name for name in before if name in after]
    if not common:
        raise ConfigError(
            f"no load is in both results: {', '.join(before)} in the first, {', '.join(after)} in the second"
        )
    dice = np.random.default_rng(seed)
    found = []
    for name in common:
        for figure in _TIMES:
            a, b = (_columns(rows[name], figure.column) for rows in (before, after))
            if min(sum(map(len, a)), sum(map(len, b))) < figure.least:
                continue
            ratios = _draw(b, figure.of, dice) / _draw(a, figure.of, dice)
            was, now = (float(figure.of(np.concatenate(values)[None, :])[0]) for values in (a, b))
            found.append(_difference(name, figure.name, was, now, ratios, True, confidence, tolerance))
        a, b = ([_per_second(row) for row in rows[name]] for rows in (before, after))
        if all(len(values) >= 5 for values in (*a, *b)):
            ratios = _draw(b, _mean, dice) / _draw(a, _mean, dice)
            was, now = (float(np.mean(np.concatenate(values))) for values in (a, b))
            found.append(_difference(name, "output tokens/s", was, now, ratios, False, confidence, tolerance))
        found.append(_failures(name, before[name], after[name]))
    return found


def _by_load(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        if not row.get("ttfts") and not row.get("e2els"):
            raise ConfigError(
                f"the row of {load_name(row)} has no single requests; vllm bench serve writes them with --save-detailed"
            )
        found.setdefault(load_name(row), []).append(row)
    return found


def _columns(rows: Sequence[Row], column: str) -> list[Values]:
    """The values of each run, in the order of sending; runs without one are left out."""
    found = []
    for row in rows:
        values = row.get(column)
        if values is None and column == "tpots" and row.get("itls"):  # vLLM keeps each gap
            values = [sum(gaps) / len(gaps) if gaps else None for gaps in row["itls"]]
        if values is None and column == "e2els" and row.get("itls"):
            values = [first + sum(gaps) for first, gaps in zip(row["ttfts"], row["itls"], strict=True)]
        kept = np.asarray([value for value in values or () if value is not None], dtype=np.float64)
        if len(kept):
            found.append(kept)
    return found


def _per_second(row: Row) -> Values:
    """Output tokens a second in each second but the last, as if a request's tokens came evenly."""
    starts, lengths = row.get("start_times"), row.get("output_lens")
    firsts, ends = (next(iter(_columns([row], column)), None) for column in ("ttfts", "e2els"))
    if starts is None or lengths is None or ends is None or len(ends) != len(starts):
        return np.zeros(0)
    if firsts is None or len(firsts) != len(starts):
        firsts = np.zeros(len(starts))
    begin = np.asarray(starts, dtype=np.float64)
    begin = begin - begin.min()
    width = max(1.0, float(row["duration"]) / 60)  # at most sixty stretches
    edges = np.arange(0.0, float(row["duration"]) + width, width)
    first, last = begin + firsts, np.maximum(begin + ends, begin + firsts + 1e-6)
    inside = np.clip(edges[:, None], first, last) - first
    sums = ((inside / (last - first)) * np.asarray(lengths, dtype=np.float64)).sum(axis=1)
    return np.asarray(np.diff(sums)[: int(float(row["duration"]) / width)] / width, dtype=np.float64)


def _draw(runs: Sequence[Values], of: Figure, dice: np.random.Generator) -> Values:
    """The figure of many samples that were drawn again: runs, and in each of them blocks of neighbours."""
    if len(runs) == 1:
        return np.maximum(of(_again(runs[0], DRAWS, dice)), 1e-9)
    found = np.empty(DRAWS)
    for draw in range(DRAWS):
        parts = [_again(runs[at], 1, dice)[0] for at in dice.integers(0, len(runs), len(runs))]
        found[draw] = max(float(of(np.concatenate(parts)[None, :])[0]), 1e-9)
    return found


def _again(values: Values, times: int, dice: np.random.Generator) -> Values:
    """A run drawn again in blocks, so many times: `[times, len(values)]`."""
    length = max(1, math.isqrt(len(values)))
    starts = dice.integers(0, len(values) - length + 1, (times, -(-len(values) // length)))
    places = (starts[:, :, None] + np.arange(length)).reshape(times, -1)[:, : len(values)]
    return values[places]


def _difference(
    load: str,
    figure: str,
    old: float,
    new: float,
    ratios: Values,
    better_is_less: bool,
    confidence: float,
    tolerance: float,
) -> FigureDifference:
    tail = 100 * (1 - confidence) / 2
    low, high = float(np.percentile(ratios, tail)), float(np.percentile(ratios, 100 - tail))
    above, below = low > 1 + tolerance, high < 1 - tolerance
    if above or below:
        verdict = "worse" if above == better_is_less else "better"
    elif low > 1 - tolerance and high < 1 + tolerance:
        verdict = "same"
    else:
        verdict = "unclear"
    return FigureDifference(load, figure, old, new, low, high, better_is_less, verdict)


def _failures(load: str, old: Sequence[Row], new: Sequence[Row]) -> FigureDifference:
    """Shares of requests that failed, by Fisher's exact test."""
    from kserve_vllm.ops.rollout.statistics import fisher_greater

    (bad_a, all_a), (bad_b, all_b) = (
        (
            sum(int(r.get("failed") or 0) for r in rows),
            sum(int(r.get("failed") or 0) + int(r["completed"]) for r in rows),
        )
        for rows in (old, new)
    )
    more = bad_b > bad_a and fisher_greater(bad_b, all_b, bad_a, all_a) < 0.025
    fewer = bad_a > bad_b and fisher_greater(bad_a, all_a, bad_b, all_b) < 0.025
    verdict = "worse" if more else "better" if fewer else "same" if bad_a == bad_b == 0 else "unclear"
    return FigureDifference(load, "failed", bad_a / max(all_a, 1), bad_b / max(all_b, 1), None, None, True, verdict)
