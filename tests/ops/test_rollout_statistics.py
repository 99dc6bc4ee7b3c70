"""The tests that know noise: against known values, against each other, and against how often they are wrong."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kserve_vllm.ops.rollout.judge import Thresholds, judge
from kserve_vllm.ops.rollout.prometheus import FIRST_TOKEN, GAP, Sample
from kserve_vllm.ops.rollout.statistics import difference_bounds, fisher_greater, mean_above, quantile, ratio_bounds

BOUNDS = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120]


def test_fishers_exact_test_has_the_textbooks_values() -> None:
    # Fisher's tea: all four cups right of eight, 1/70; three of four, 17/70.
    assert fisher_greater(4, 4, 0, 4) == pytest.approx(1 / 70)
    assert fisher_greater(3, 4, 1, 4) == pytest.approx(17 / 70)
    assert fisher_greater(0, 100, 0, 100) == 1.0
    assert fisher_greater(5, 100, 5, 100) > 0.5
    assert fisher_greater(300_000, 1_000_000, 100_000, 1_000_000) == pytest.approx(0.0, abs=1e-12)


def test_newcombes_interval_has_his_published_values() -> None:
    # Newcombe 1998, table II, method 10, 95 % two-sided: 56/70 - 48/80 and 9/10 - 3/10.
    _, low, high = difference_bounds(56, 70, 48, 80, 0.025)
    assert (low, high) == (pytest.approx(0.0524, abs=5e-4), pytest.approx(0.3339, abs=5e-4))
    _, low, high = difference_bounds(9, 10, 3, 10, 0.025)
    assert (low, high) == (pytest.approx(0.1705, abs=5e-4), pytest.approx(0.8090, abs=5e-4))


def test_a_quantile_is_interpolated_as_prometheus_does() -> None:
    # 90 of 100 up to 0.1, 10 up to 0.25: p95 is in the middle of the second bucket.
    assert quantile([90, 10, 0], [0.1, 0.25], 0.95) == pytest.approx(0.175)
    assert quantile([100, 0, 0], [0.1, 0.25], 0.5) == pytest.approx(0.05)
    assert quantile([0, 0, 100], [0.1, 0.25], 0.5) == 0.25, "above the highest bound Prometheus answers with that bound"


def histogram(values: np.ndarray) -> list[float]:
    """Counts of each bucket alone."""
    counts, _ = np.histogram(values, bins=[0, *BOUNDS, np.inf])
    return [float(count) for count in counts]


def sample(rng: np.random.Generator, n: int, errors: float = 0.002, slow: float = 1.0, refused: float = 0.01) -> Sample:
    """What a version of that kind might have done."""
    bad, no = int(rng.binomial(n, errors)), int(rng.binomial(n, refused))
    first = rng.lognormal(math.log(0.18 * slow), 0.6, n)
    gap = rng.lognormal(math.log(0.02 * slow), 0.3, n)
    return Sample(
        {"ok": n - bad - no, "server_error": bad, "refused": no},
        {FIRST_TOKEN: histogram(first), GAP: histogram(gap)},
        {FIRST_TOKEN: BOUNDS, GAP: BOUNDS},
        {FIRST_TOKEN: float(first.sum()), GAP: float(gap.sum())},
        pods=1,
    )


def test_the_bootstraps_interval_holds_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    held = 0

    def draw(scale: float, n: int) -> list[float]:
        return histogram(rng.lognormal(math.log(0.15 * scale), 0.5, n))

    # The truth of what Prometheus shows: the interpolated quantiles of as good as endless histograms.
    truth = quantile(draw(1.5, 2_000_000), BOUNDS, 0.9) / quantile(draw(1.0, 2_000_000), BOUNDS, 0.9)
    for _ in range(100):
        _, low, high = ratio_bounds(draw(1.5, 400), draw(1.0, 400), BOUNDS, 0.9, 0.05)
        held += low <= truth <= high
    # 90 % by design.
    assert 80 <= held <= 98


def test_the_means_test_is_not_wrong_more_often_than_it_says() -> None:
    rng = np.random.default_rng(5)
    alarms = 0
    for _ in range(1000):
        mine, theirs = rng.lognormal(math.log(0.18), 0.5, 400), rng.lognormal(math.log(0.15), 0.5, 400)
        alarms += mean_above(histogram(mine), mine.sum(), histogram(theirs), theirs.sum(), BOUNDS, 1.2)[2] < 0.05
    # 50 by design, or fewer: coarse buckets overstate the variance.
    assert 0 < alarms <= 70


def test_what_lies_within_one_bucket_is_seen_by_the_mean() -> None:
    rng = np.random.default_rng(6)

    def gaps(mean: float, n: int) -> Sample:
        values = rng.uniform(mean - 0.0003, mean + 0.0003, n)
        return Sample({"ok": n}, {GAP: histogram(values)}, {GAP: BOUNDS}, {GAP: float(values.sum())}, pods=1)

    verdict = judge(gaps(0.024, 500), gaps(0.012, 5000), Thresholds())
    assert verdict.phase == "Failed", verdict.words
    assert judge(gaps(0.0121, 500), gaps(0.012, 5000), Thresholds()).phase == "Successful"


def test_an_equal_canary_is_hardly_ever_failed() -> None:
    rng = np.random.default_rng(2)
    thresholds = Thresholds(looks=1)
    verdicts = [judge(sample(rng, 300), sample(rng, 6000), thresholds).phase for _ in range(100)]
    # 5 % at the most, by Bonferroni; thresholds make it rarer still.
    assert verdicts.count("Failed") <= 4
    assert verdicts.count("Successful") > 50


@pytest.mark.parametrize(
    ("worse", "metric"),
    [
        ({"errors": 0.08}, "error-rate"),
        ({"slow": 2.0}, "first-token"),
        ({"slow": 2.0}, "gap"),
        ({"refused": 0.2}, "refusal-rate"),
    ],
)
def test_a_worse_canary_is_failed_and_by_the_right_metric(worse: dict[str, float], metric: str) -> None:
    rng = np.random.default_rng(3)
    verdict = judge(sample(rng, 800, **worse), sample(rng, 8000), Thresholds(looks=20))
    assert verdict.phase == "Failed"
    check = next(c for c in verdict.checks if c.metric == metric)
    assert check.phase == "Failed", verdict.words
    assert "allowed" in check.words


def test_few_samples_are_inconclusive_unless_there_is_no_doubt() -> None:
    rng = np.random.default_rng(4)
    assert judge(sample(rng, 20), sample(rng, 5000), Thresholds()).phase == "Inconclusive"
    down = Sample({"ok": 2, "server_error": 18}, pods=1)
    assert judge(down, Sample({"ok": 5000}, pods=1), Thresholds()).phase == "Failed"
    assert judge(Sample(), Sample({"ok": 5000}), Thresholds()).phase == "Inconclusive"


def test_one_error_in_a_hundred_may_be_noise() -> None:
    canary, stable = Sample({"ok": 98, "server_error": 2}), Sample({"ok": 9995, "server_error": 5})
    verdict = judge(canary, stable, Thresholds(error_rate=0.01))
    assert verdict.phase == "Inconclusive"
    assert "it may be noise" in verdict.words


def test_small_differences_in_time_hurt_nobody() -> None:
    fast = Sample({"ok": 5000}, {FIRST_TOKEN: [5000.0, *[0.0] * 13]}, {FIRST_TOKEN: BOUNDS}, {FIRST_TOKEN: 20.0})
    slower = Sample(
        {"ok": 5000}, {FIRST_TOKEN: [4000.0, 1000.0, *[0.0] * 12]}, {FIRST_TOKEN: BOUNDS}, {FIRST_TOKEN: 30.0}
    )
    verdict = judge(slower, fast, Thresholds())
    assert verdict.phase == "Successful", verdict.words


def test_a_service_without_tokens_is_judged_by_its_errors_alone() -> None:
    verdict = judge(Sample({"ok": 500}), Sample({"ok": 500}), Thresholds())
    assert [check.metric for check in verdict.checks] == ["error-rate", "refusal-rate"]
    assert verdict.phase == "Successful"


def test_a_pod_that_started_anew_fails_the_canary() -> None:
    canary = Sample({"ok": 500}, restarts=1, pods=1)
    assert judge(canary, Sample({"ok": 500}), Thresholds()).phase == "Failed"


def test_clients_own_mistakes_count_for_nobody() -> None:
    canary = Sample({"ok": 500, "client_error": 400, "cancelled": 300})
    assert canary.requests == 500
    assert judge(canary, Sample({"ok": 500}), Thresholds()).phase == "Successful"
