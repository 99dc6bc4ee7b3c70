"""The simulated KPA against decisions that Knative's own autoscaler made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kserve_vllm.ops.sim import kpa

# Made by tests/ops/recorder (Go) with knative.dev/serving v0.48.1: each scenario is fed to both.
RECORDED: list[dict[str, Any]] = json.loads((Path(__file__).parent / "knative.json").read_text())
_START = 1_800_000_000


@pytest.mark.parametrize("scenario", RECORDED, ids=lambda s: str(s["name"]))
def test_every_decision_is_the_one_of_knative(scenario: dict[str, Any]) -> None:
    own = scenario["spec"]
    settings = kpa.KPASettings(
        metric=own["metric"],
        target=own["total"],
        target_burst_capacity=own["target_burst_capacity"],
        window_s=own["stable_window_s"],
        panic_window_percentage=100 * own["panic_window_s"] / own["stable_window_s"],
        panic_threshold_percentage=100 * own["panic_threshold"],
        scale_down_delay_s=own["scale_down_delay_s"],
        max_scale_up_rate=own["max_scale_up_rate"],
        max_scale_down_rate=own["max_scale_down_rate"],
        activation_scale=own["activation_scale"],
        weighted=own["weighted"],
    )
    scaler = kpa.Autoscaler(settings, target=own["target"])
    decisions = []
    for second, (load, ready) in enumerate(zip(scenario["load"], scenario["ready"], strict=True)):
        now = _START + second
        if load is not None:
            scaler.record(now, load)
        if second % 2 == 0:
            found = scaler.decide(now, ready)
            decisions.append([second, found.desired, found.excess_burst_capacity, int(found.valid)])
    assert decisions == scenario["decisions"]


def test_the_recording_shows_panic_zero_and_the_activator() -> None:
    """Scenarios that would pass with a constant prove nothing."""
    assert len(RECORDED) >= 16
    for scenario in RECORDED:
        assert len({desired for _, desired, _, _ in scenario["decisions"]}) > 1, scenario["name"]
    every = [decision for scenario in RECORDED for decision in scenario["decisions"]]
    assert len(every) > 4000
    assert {decision[3] for decision in every} == {0, 1}
    assert min(decision[2] for decision in every) < 0 < max(decision[2] for decision in every)


def test_the_last_pod_leaves_after_window_grace_and_retention() -> None:
    for retention, leaves in ((0.0, 10 + 60 + 30), (120.0, 10 + 60 + 120)):
        own = kpa.Reconciler(kpa.KPASettings(scale_to_zero_retention_s=retention))
        assert own.scale(10, 1, 1, 1) == 1
        seen = [(now, own.scale(now, 0, 1, 1)) for now in range(11, 300)]
        assert next(now for now, pods in seen if pods == 0) == leaves
    held = kpa.Reconciler(kpa.KPASettings(min_scale=1))
    assert [held.scale(now, 0, 1, 1) for now in (10, 200, 400)] == [1, 1, 1]
