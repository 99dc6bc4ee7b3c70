"""The verdict on a canary: four comparisons with the stable version, each with its numbers."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Literal

from kserve_vllm.ops.cluster import Json
from kserve_vllm.ops.rollout.prometheus import FIRST_TOKEN, GAP, Sample
from kserve_vllm.ops.rollout.statistics import difference_bounds, fisher_greater, mean_above, quantile, ratio_bounds

# Argo Rollouts' words for what an analysis gives.
Phase = Literal["Successful", "Failed", "Inconclusive", "Error"]
METRICS = ("error-rate", "refusal-rate", "first-token", "gap")
# Two shares, and of two histograms a quantile and a mean.
_COMPARISONS = 6
# Below these differences nobody is hurt, whatever the ratio: seconds.
_FLOOR_S = {FIRST_TOKEN: 0.010, GAP: 0.001}


@dataclass(frozen=True)
class Thresholds:
    """What may be worse, and how sure one has to be.

    Attributes:
        error_rate, refusal_rate: by how much the canary's share may be above stable's, 0.01 for a percentage point.
        first_token, gap: how many times stable's quantile and mean the canary's may be.
        quantile: which one.
        min_samples: the fewest requests of each side for a verdict.
        confidence: of the whole rollout: the chance that an equal canary passes all looks of all steps.
        looks: how many verdicts there may be in all (steps x count); the confidence is shared among them (Bonferroni).
    """

    error_rate: float = 0.01
    refusal_rate: float = 0.05
    first_token: float = 1.2
    gap: float = 1.2
    quantile: float = 0.9
    min_samples: int = 100
    confidence: float = 0.95
    looks: int = 20

    @property
    def alpha(self) -> float:
        """The chance of a false alarm that one comparison may have."""
        return (1 - self.confidence) / (max(1, self.looks) * _COMPARISONS)


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        metric: of `METRICS`, or `restarts`.
        phase: what it gives.
        canary, stable: their values: shares, or seconds.
        words: the comparison in a sentence with its numbers.
    """

    metric: str
    phase: Phase
    canary: float
    stable: float
    words: str

    def to_json(self) -> Json:
        """For the history."""
        return asdict(self)


@dataclass(frozen=True)
class Verdict:
    """All comparisons of one look, and what follows from them."""

    phase: Phase
    checks: tuple[Check, ...]

    @property
    def words(self) -> str:
        """The comparisons, a line each."""
        return "\n".join(f"{check.metric}: {check.phase}. {check.words}" for check in self.checks)


def judge(canary: Sample, stable: Sample, thresholds: Thresholds) -> Verdict:
    """Compare a canary with the stable version.

    `Failed`: some comparison is worse than its threshold, and noise is ruled out. `Successful`: there are enough
    samples, and every comparison is within its threshold. `Inconclusive`: too few samples, or a difference over the
    threshold that may be noise.
    """
    checks = [
        _share("error-rate", canary.errors, canary, stable.errors, stable, thresholds.error_rate, thresholds),
        _share("refusal-rate", canary.refusals, canary, stable.refusals, stable, thresholds.refusal_rate, thresholds),
    ]
    for metric, name, factor in (
        (FIRST_TOKEN, "first-token", thresholds.first_token),
        (GAP, "gap", thresholds.gap),
    ):
        if check := _latency(name, metric, canary, stable, factor, thresholds):
            checks.append(check)
    if canary.restarts:
        words = f"{canary.restarts} of the canary's {canary.pods} pods started anew"
        checks.append(Check("restarts", "Failed", canary.restarts, stable.restarts, words))
    phases = [check.phase for check in checks]
    phase: Phase = next((p for p in ("Failed", "Inconclusive") if p in phases), "Successful")
    return Verdict(phase, tuple(checks))


def _share(
    name: str, bad: int, canary: Sample, stable_bad: int, stable: Sample, margin: float, thresholds: Thresholds
) -> Check:
    n, m = canary.requests, stable.requests
    if not n or not m:
        side = "canary" if not n else "stable version"
        return Check(name, "Inconclusive", 0.0, 0.0, f"the {side} had no requests")
    mine, theirs = bad / n, stable_bad / m
    difference, low, high = difference_bounds(bad, n, stable_bad, m, thresholds.alpha)
    p = fisher_greater(bad, n, stable_bad, m)
    words = (
        f"canary {_percent(mine)} ({bad} of {n}), stable {_percent(theirs)} ({stable_bad} of {m}): "
        f"{difference * 100:+.2f} points, between {low * 100:+.2f} and {high * 100:+.2f}; allowed {margin * 100:+.2f}; "
        f"Fisher's exact p {p:.2g}, alarm below {thresholds.alpha:.2g}"
    )
    if p < thresholds.alpha and difference > margin:
        # Beyond doubt, however few the samples are.
        return Check(name, "Failed", mine, theirs, words)
    if min(n, m) < thresholds.min_samples:
        return Check(
            name, "Inconclusive", mine, theirs, f"{words}; {thresholds.min_samples} samples of each are needed"
        )
    if difference > margin:
        return Check(name, "Inconclusive", mine, theirs, f"{words}; it may be noise")
    return Check(name, "Successful", mine, theirs, words)


def _latency(
    name: str, metric: str, canary: Sample, stable: Sample, factor: float, thresholds: Thresholds
) -> Check | None:
    """The comparison of a histogram; None where neither side has it (embeddings have no gap)."""
    mine, theirs = canary.histograms.get(metric, []), stable.histograms.get(metric, [])
    n, m = sum(mine), sum(theirs)
    if not n and not m:
        return None
    if not n or not m:
        side = "canary" if not n else "stable version"
        return Check(name, "Inconclusive", 0.0, 0.0, f"the {side} has no values")
    bounds = canary.bounds[metric]
    if bounds != stable.bounds[metric]:
        return Check(name, "Inconclusive", 0.0, 0.0, "the two versions' histograms have other buckets")
    q = thresholds.quantile
    here, there = quantile(mine, bounds, q), quantile(theirs, bounds, q)
    point, low, high = ratio_bounds(mine, theirs, bounds, q, thresholds.alpha)
    mean, mean_there, p = mean_above(
        mine, canary.sums.get(metric, 0.0), theirs, stable.sums.get(metric, 0.0), bounds, factor
    )
    words = (
        f"canary p{100 * q:g} {_seconds(here)} ({n:g} values), stable {_seconds(there)} ({m:g}): {point:.2f} times, "
        f"between {low:.2f} and {high:.2f} (bootstrap over the buckets); means {_seconds(mean)} and "
        f"{_seconds(mean_there)} (Welch's p {p:.2g}); allowed {factor:g} times, alarm below {thresholds.alpha:.2g}"
    )
    if min(n, m) < thresholds.min_samples:
        # A bootstrap of a handful of values knows nothing of what it has not seen.
        return Check(name, "Inconclusive", here, there, f"{words}; {thresholds.min_samples} samples of each are needed")
    over = point > factor and here - there > _FLOOR_S[metric]
    mean_over = mean > factor * mean_there and mean - mean_there > _FLOOR_S[metric]
    if (over and low > factor) or (mean_over and p < thresholds.alpha):
        return Check(name, "Failed", here, there, words)
    if over or mean_over:
        return Check(name, "Inconclusive", here, there, f"{words}; it may be noise")
    return Check(name, "Successful", here, there, words)


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _seconds(value: float) -> str:
    return "none" if math.isnan(value) else f"{value * 1000:.1f} ms" if value < 1 else f"{value:.2f} s"
