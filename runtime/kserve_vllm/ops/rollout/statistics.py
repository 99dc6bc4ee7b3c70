"""Is the canary worse, or is it noise? Two tests for what Prometheus holds: counts, and histograms' buckets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

# The bootstrap has to see the tail that it is asked for: so many draws beyond the bound.
_BEYOND, _FEWEST_ROUNDS, _MOST_ROUNDS = 20, 2_000, 50_000


def fisher_greater(canary: int, canary_all: int, stable: int, stable_all: int) -> float:
    """The probability of at least so many events in the canary if both had the same ratio: Fisher's exact test,
    one-sided (R. A. Fisher, Statistical Methods for Research Workers, 1934). Exact for small counts, which a z-test is
    not.

    Args:
        canary, stable: events (errors, refusals).
        canary_all, stable_all: requests.
    """
    events, total = canary + stable, canary_all + stable_all
    if not events or not canary_all or not stable_all:
        return 1.0
    most = min(events, canary_all)

    def log_choose(n: int, k: int) -> float:
        return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)

    whole = log_choose(total, events)
    terms = (
        log_choose(canary_all, k) + log_choose(stable_all, events - k) - whole
        for k in range(max(canary, events - stable_all), most + 1)
    )
    return min(1.0, math.fsum(math.exp(term) for term in terms))


def difference_bounds(
    canary: int, canary_all: int, stable: int, stable_all: int, alpha: float
) -> tuple[float, float, float]:
    """Canary's ratio less stable's, with its bounds: Newcombe's hybrid of Wilson scores (R. G. Newcombe, Interval
    estimation for the difference between independent proportions, Statistics in Medicine 17, 1998, method 10).

    Args:
        canary, canary_all, stable, stable_all: as for `fisher_greater`; both sides have requests.
        alpha: chance that the truth lies above the upper bound, and as much below the lower.
    """
    first, second = canary / canary_all, stable / stable_all
    low1, high1 = _wilson(first, canary_all, alpha)
    low2, high2 = _wilson(second, stable_all, alpha)
    low = first - second - math.sqrt((first - low1) ** 2 + (high2 - second) ** 2)
    high = first - second + math.sqrt((high1 - first) ** 2 + (second - low2) ** 2)
    return first - second, low, high


def _wilson(ratio: float, n: int, alpha: float) -> tuple[float, float]:
    z = NormalDist().inv_cdf(1 - alpha)
    centre = ratio + z * z / (2 * n)
    spread = z * math.sqrt(ratio * (1 - ratio) / n + z * z / (4 * n * n))
    return (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)


def quantile(counts: Sequence[float], bounds: Sequence[float], q: float) -> float:
    """A quantile of a histogram, interpolated within its bucket as Prometheus's `histogram_quantile` does.

    Args:
        counts: of each bucket alone, one more than `bounds`: the last has no upper bound.
        bounds: upper bounds, ascending, of all buckets but the last.
        q: 0 to 1.
    """
    values = _quantiles(np.asarray([counts], dtype=float), np.asarray(bounds, dtype=float), q)
    return float(values[0])


def ratio_bounds(
    canary: Sequence[float], stable: Sequence[float], bounds: Sequence[float], q: float, alpha: float, seed: int = 7
) -> tuple[float, float, float]:
    """Canary's quantile over stable's, with its bounds: the percentile bootstrap (B. Efron, Bootstrap methods, Annals
    of Statistics 7, 1979) over the buckets' counts. The seed is fixed: the same counts give the same verdict.

    Args:
        canary, stable: counts of each bucket alone.
        bounds: upper bounds of all buckets but the last.
        q: of the quantile.
        alpha: chance that the truth lies above the upper bound, and as much below the lower.
    """
    edges = np.asarray(bounds, dtype=float)
    rounds = int(min(_MOST_ROUNDS, max(_FEWEST_ROUNDS, _BEYOND / alpha)))
    rng = np.random.default_rng(seed)

    def draws(counts: Sequence[float]) -> Any:
        there = np.rint(np.asarray(counts, dtype=float)).astype(np.int64)
        sampled = rng.multinomial(int(there.sum()), there / there.sum(), size=rounds)
        return _quantiles(sampled.astype(float), edges, q)

    ratios = draws(canary) / np.maximum(draws(stable), 1e-9)
    low, high = np.quantile(ratios, [alpha, 1 - alpha])
    point = quantile(canary, bounds, q) / max(quantile(stable, bounds, q), 1e-9)
    return point, float(low), float(high)


def mean_above(
    canary: Sequence[float],
    canary_sum: float,
    stable: Sequence[float],
    stable_sum: float,
    bounds: Sequence[float],
    factor: float,
) -> tuple[float, float, float]:
    """Both means, and the probability of such a difference if canary's were at most `factor` times stable's: Welch's
    test (B. L. Welch, Biometrika 34, 1947) in its normal limit. It sees what lies within one bucket, which a quantile
    of buckets does not.

    The means are exact, from the histograms' sums. The variances are those of the buckets' middles, and within a
    bucket that of an even spread, width^2 / 12 (W. F. Sheppard, 1898).

    Args:
        canary, stable: counts of each bucket alone.
        canary_sum, stable_sum: sums of the values.
        bounds: upper bounds of all buckets but the last.
        factor: 1 or more.
    """
    edges = np.asarray([0.0, *bounds, bounds[-1] * 2])
    middles, within = (edges[1:] + edges[:-1]) / 2, (edges[1:] - edges[:-1]) ** 2 / 12

    def of(counts: Sequence[float], total: float) -> tuple[float, float]:
        share = np.asarray(counts, dtype=float) / sum(counts)
        variance = float((share * (within + (middles - (share * middles).sum()) ** 2)).sum())
        return total / sum(counts), variance / sum(counts)

    (mine, mine_error), (theirs, theirs_error) = of(canary, canary_sum), of(stable, stable_sum)
    z = (mine - factor * theirs) / math.sqrt(mine_error + factor**2 * theirs_error + 1e-30)
    return mine, theirs, NormalDist().cdf(-z)


def _quantiles(counts: Any, edges: Any, q: float) -> Any:
    """The quantile of each row of counts."""
    cumulative = np.cumsum(counts, axis=1)
    rank = q * cumulative[:, -1]
    at = (cumulative < rank[:, None]).sum(axis=1)
    # In the bucket without an upper bound Prometheus answers with the highest bound.
    inside = np.minimum(at, len(edges) - 1)
    rows = np.arange(len(counts))
    lower = np.where(inside > 0, edges[np.maximum(inside - 1, 0)], 0.0)
    before = np.where(inside > 0, cumulative[rows, np.maximum(inside - 1, 0)], 0.0)
    within = np.maximum(counts[rows, inside], 1e-12)
    value = lower + (edges[inside] - lower) * np.clip((rank - before) / within, 0.0, 1.0)
    return np.where(at >= len(edges), edges[-1], value)
