"""The simulated fleet: one replica by hand, autoscalers by their own rules, and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from kserve_vllm.cli import command as cli
from kserve_vllm.core.errors import ConfigError
from kserve_vllm.ops import simulate
from kserve_vllm.ops.model import steptime
from kserve_vllm.ops.model.traffic import Arrival, TrafficShape
from kserve_vllm.ops.sim.fleet import ColdStart, Fleet, ReplicaSettings, Result
from kserve_vllm.ops.sim.scalers import HPA, Fixed, Rules, Scaler, Sight, scaler

# 10 ms a step, 1 ms for each sequence in it, 0.1 ms for each token of a prompt.
STEPS = {"fixed": 0.010, "per_sequence": 0.001, "per_prompt_token": 0.0001}
SCENARIO: dict[str, Any] = {
    "model": {"steps": STEPS},
    "arrivals": {"rate": 2, "duration": 300, "prompt": 100, "output": 50},
    "scaler": {"class": "fixed", "replicas": 2},
    "slo": {"first_token": 1, "gap": 0.05},
}


def fleet(requests: list[Arrival], own: Scaler | None = None, cold: ColdStart | None = None, **settings: Any) -> Fleet:
    """A fleet of one replica with the steps above."""
    step = simulate.scenario_of(SCENARIO, "x").step
    outer = {
        name: settings.pop(name)
        for name in ("initial", "drain_s", "client_timeout_s", "duration_s")
        if name in settings
    }
    return Fleet(requests, step, ReplicaSettings(**settings), cold or ColdStart(), own or Fixed(1), **outer)


def counts(result: Result) -> dict[str, int]:
    """Outcomes by name."""
    found: dict[str, int] = {}
    for outcome in result.outcomes:
        found[outcome.result] = found.get(outcome.result, 0) + 1
    return found


# ---- one replica


def test_one_request_by_hand() -> None:
    result = fleet([Arrival(5.0, 200, 11)], overhead_s=0.003).run()
    (outcome,) = result.outcomes
    # One step computes the prompt: 10 ms and 200 tokens; ten more steps give the other tokens.
    assert outcome.first_token_s == pytest.approx(0.010 + 200 * 0.0001 + 0.003)
    assert outcome.gap_s == pytest.approx(0.010 + 0.001 + 0.0001)
    assert outcome.total_s == pytest.approx(0.030 + 10 * 0.0111 + 0.003)


def test_a_long_prompt_is_cut_and_others_go_on() -> None:
    """Chunks of 100 tokens less one per running sequence; each of its steps also gives the first request a token."""
    result = fleet([Arrival(0.0, 10, 100), Arrival(0.5, 500, 2)], max_num_batched_tokens=100).run()
    first, second = sorted(result.outcomes, key=lambda outcome: outcome.at)
    # The second comes while a step runs, waits for its end, and takes six steps of at most 99 tokens.
    assert 6 * 0.011 + 0.05 <= second.first_token_s <= 6 * 0.011 + 0.05 + 0.012
    assert first.gap_s > 0.011


def test_sequences_wait_for_a_place_in_the_batch() -> None:
    result = fleet([Arrival(0.0, 10, 101) for _ in range(4)], max_num_seqs=2).run()
    firsts = sorted(outcome.first_token_s for outcome in result.outcomes)
    assert firsts[1] < 0.03
    assert firsts[2] > 100 * 0.012


def test_a_batch_runs_as_fast_as_the_planner_says() -> None:
    """Closed loop of eight: the planner's steady state and the simulator's steps are two ways to the same rate."""
    requests = [Arrival(0.0, 100, 50) for _ in range(800)]
    result = fleet(requests, max_num_seqs=8).run()
    step = simulate.scenario_of(SCENARIO, "x").step
    planned = steptime.operate(step, 8, 100, 50, 0).requests_per_s
    last = max(outcome.total_s for outcome in result.outcomes)
    assert 800 / last == pytest.approx(planned, rel=0.05)


def test_steps_without_change_are_leapt_over() -> None:
    """What makes a hundred replicas quick: events per request do not grow with the length of the answers."""

    def events(output: int) -> float:
        requests = TrafficShape("constant", 5, 200, prompt=100, output=output).requests()
        run = fleet(requests, duration_s=200).run()
        return (run.events - 200) / len(requests)

    assert events(200) < 1.5 * events(20)
    assert events(200) < 8


def test_a_full_cache_sends_the_newest_back_and_all_are_answered() -> None:
    requests = [Arrival(0.1 * i, 100, 300) for i in range(20)]
    running = fleet(requests, kv_tokens=1000, max_num_seqs=20)
    result = running.run()
    assert counts(result) == {"ok": 20}
    assert result.preemptions > 0
    assert all(outcome.first_token_s >= 0.02 for outcome in result.outcomes)
    alone = fleet([Arrival(0.0, 900, 200)], kv_tokens=1000).run()
    assert counts(alone) == {"refused": 1}


def test_the_cache_is_empty_when_all_have_left() -> None:
    dice = TrafficShape("constant", 8, 120, prompt=200, output=100, spread=0.8, cached_share=0.3, seed=5)
    running = fleet(dice.requests(), kv_tokens=4000, max_num_seqs=16, client_timeout_s=9.0, duration_s=120)
    result = running.run()
    assert len(result.outcomes) == len(running.requests)
    assert {"ok", "client-timeout"} <= set(counts(result))
    assert result.preemptions > 0
    (replica,) = running.replicas
    assert (replica.kv, replica.inside, replica.running) == (0, 0, 0)


def test_the_queue_refuses_times_out_and_knows_classes() -> None:
    requests = [Arrival(0.001 * i, 10, 200, priority=2 if i < 6 else 0) for i in range(8)]
    result = fleet(requests, max_concurrent=1, queue=6, queue_timeout_s=6.0).run()
    assert counts(result)["refused"] == 1
    assert counts(result)["queue-timeout"] >= 1
    served = [o for o in result.outcomes if o.result == "ok"]
    # The one of class 0 that found room came seventh and is served second.
    order = [round(o.at, 3) for o in sorted(served, key=lambda o: o.at + o.first_token_s)]
    assert order[:2] == [0.0, 0.006]


def test_a_replica_that_is_taken_away_drains_and_is_cut() -> None:
    class RedisUnavailable:
        activator = False

        def look(self, sight: Sight) -> int:
            return 2 if sight.now < 2 else 1

    slow = [Arrival(0.1 * i, 10, 2000) for i in range(10)]
    cut = fleet(slow, RedisUnavailable(), initial=2, drain_s=5.0).run()
    assert counts(cut)["cut"] >= 1
    kept = fleet(slow, RedisUnavailable(), initial=2, drain_s=600.0).run()
    assert counts(kept) == {"ok": 10}
    assert kept.replica_hours > cut.replica_hours * 0 + 10 / 3600 / 10


# ---- cold start and scalers


def test_from_zero_a_request_waits_for_all_phases() -> None:
    own = scaler({"class": "knative", "min": 0, "max": 3, "target": 10})
    cold = ColdStart(node_s=100, image_s=10, download_s=20, load_s=5, compile_s=4, ready_s=1, free_nodes=0)
    result = fleet([Arrival(50.5, 10, 10)], own, cold, initial=0, duration_s=400).run()
    (outcome,) = result.outcomes
    assert outcome.result == "ok"
    assert 140 <= outcome.first_token_s <= 142
    # Gone again a window and a grace period after it was ready and idle.
    assert result.replica_hours * 3600 == pytest.approx(140 + 60 + 30, abs=12)
    assert result.cold_starts == 1
    without = fleet([Arrival(50.5, 10, 10)], Fixed(0), cold, initial=0).run()
    assert counts(without) == {"refused": 1}


def test_knative_panics_on_a_burst_and_hpa_takes_its_time() -> None:
    burst = {"kind": "bursts", "rate": 60, "duration": 900, "prompt": 100, "output": 100}
    cold = dict.fromkeys(("image", "download", "load", "compile", "ready"), 1)
    tree = {**SCENARIO, "arrivals": burst, "cold_start": cold, "replica": {"max_num_seqs": 32}}
    knative = simulate.run(
        simulate.scenario_of({**tree, "scaler": {"class": "knative", "target": 20, "min": 1, "max": 10}}, "knative")
    )
    hpa = simulate.run(
        simulate.scenario_of(
            {**tree, "scaler": {"class": "hpa", "metric": "concurrency", "target": 14, "min": 1, "max": 10}}, "hpa"
        )
    )

    def first_growth(report: simulate.SimulationReport) -> float:
        before = max(wanted for s, wanted, *_ in report.result.timeline if s < 240)
        return next(s for s, wanted, *_ in report.result.timeline if s >= 240 and wanted > before)

    assert first_growth(knative) <= 250
    assert first_growth(hpa) > first_growth(knative)
    # HPA keeps what it has for 300 s, Knative lets go after its window.
    low_knative = min(w for s, w, *_ in knative.result.timeline if 400 < s < 530)
    low_hpa = min(w for s, w, *_ in hpa.result.timeline if 400 < s < 530)
    assert low_knative < low_hpa
    assert hpa.result.gpu_hours > knative.result.gpu_hours


def sight(now: float, replicas: int, ready: int, **more: Any) -> Sight:
    """What a scaler sees, mostly nothing."""
    values = {
        "concurrency": 0.0,
        "arrived": 0,
        "running": 0,
        "waiting": 0,
        "kv_usage": 0.0,
        "busy": 0.0,
        "first_token_p99": 0.0,
        "held": 0,
    }
    return Sight(now, replicas, ready, **{**values, **more})


@pytest.mark.parametrize(
    ("replicas", "ready", "waiting", "wanted"),
    [
        (2, 2, 8, 2),  # 4 each: the target
        (2, 2, 8.6, 2),  # within a tenth
        (2, 2, 10, 3),  # ceil(10 / 4)
        (2, 2, 100, 6),  # four more at most, or twice as many
        (8, 8, 1000, 16),
        (4, 2, 40, 8),  # two are not ready: counted as idle, 10 each of four
        (4, 2, 17, 4),  # and then nothing is left to add
        (4, 4, 2, 4),  # fewer only after 300 s
    ],
)
def test_hpa_decides_as_kubernetes_does(replicas: int, ready: int, waiting: float, wanted: int) -> None:
    own = HPA(metric="concurrency", target=4, max_replicas=50, delay_s=0)
    assert own.look(sight(0.0, replicas, replicas, concurrency=4.0 * replicas)) == replicas
    assert own.look(sight(own.sync_s, replicas, ready, concurrency=float(waiting))) == wanted


def test_hpa_scales_down_after_its_window_only() -> None:
    own = HPA(metric="concurrency", target=4, max_replicas=50, delay_s=0)
    replicas, seen = 8, {}
    for now in range(0, 700):
        replicas = own.look(sight(float(now), replicas, replicas, concurrency=32.0 if now < 100 else 3.0))
        seen[now] = replicas
    assert seen[380] == 8
    assert seen[420] == 1


def test_keda_goes_to_zero_and_back() -> None:
    own = scaler({"class": "keda", "min": 0, "max": 5, "target": 4, "metric": "queue-depth", "metric_delay": 0})
    replicas, seen = 1, {}
    for now in range(0, 1000):
        load = 20 if 700 <= now < 800 else 0
        replicas = own.look(sight(float(now), replicas, replicas, waiting=load))
        seen[now] = replicas
    assert seen[290] == 1
    assert seen[340] == 0
    assert seen[699] == 0
    assert seen[731] >= 1
    assert seen[770] == 5


def test_rules_wait_and_cool_down() -> None:
    own = Rules(up_waiting=2, hold_s=10, cooldown_s=30, max_replicas=4, down_busy=0.5)
    replicas, seen = 1, {}
    for now in range(0, 300):
        busy = now < 120
        replicas = own.look(sight(float(now), replicas, replicas, waiting=50 if busy else 0, busy=0.9 if busy else 0.1))
        seen[now] = replicas
    assert (seen[9], seen[10], seen[39], seen[41]) == (1, 2, 2, 3)
    assert max(seen.values()) == 4
    assert seen[299] == 1


def test_no_run_that_keeps_the_slo_is_below_the_bound() -> None:
    tree = {
        **SCENARIO,
        "arrivals": {"kind": "day", "rate": 30, "duration": 1200, "prompt": 200, "output": 80},
        "replica": {"max_num_seqs": 32},
        "slo": {"first_token": 2, "gap": 0.05},
    }
    kept = 0
    for own in (
        {"class": "fixed", "replicas": 2},
        {"class": "fixed", "replicas": 6},
        {"class": "knative", "target": 20, "min": 1, "max": 6},
        {"class": "rules", "max": 6},
    ):
        report = simulate.run(simulate.scenario_of({**tree, "scaler": own}, "x"))
        if report.kept:
            kept += 1
            assert report.result.gpu_hours > report.least_gpu_hours > 0
    assert kept >= 1


def test_work_that_is_left_when_the_traffic_ends_is_paid() -> None:
    """All are answered by one replica, long after the last one came; the bound is what all of them take."""
    tree = {
        **SCENARIO,
        "arrivals": {"rate": 40, "duration": 60, "prompt": 200, "output": 80},
        "scaler": {"class": "fixed", "replicas": 1},
        "replica": {"max_num_seqs": 8, "queue": 100_000},
    }
    report = simulate.run(simulate.scenario_of(tree, "x"))
    assert report.counts == {"ok": len(report.scenario.requests)}
    assert report.result.gpu_hours > report.least_gpu_hours > 60 / 3600


def test_a_night_without_requests_has_a_bill_and_knative_goes_to_zero() -> None:
    quiet = {**SCENARIO, "arrivals": {"rate": 0, "duration": 1800}}
    fixed = simulate.run(simulate.scenario_of({**quiet, "scaler": {"class": "fixed", "replicas": 2}}, "x"))
    assert fixed.kept
    assert fixed.result.gpu_hours == pytest.approx(1.0)
    knative = simulate.run(simulate.scenario_of({**quiet, "scaler": {"class": "knative", "min": 0, "max": 2}}, "x"))
    # A window and a grace period after it was ready, with or without a first request (knative.dev/serving,
    # pkg/reconciler/autoscaling/kpa/kpa.go: computeActiveCondition).
    assert knative.result.timeline[-1][1] == 0
    assert 60 / 3600 < knative.result.gpu_hours < 120 / 3600


def test_a_trace_of_one_request_has_a_fleet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "one.jsonl").write_text('{"time": 1, "prompt_tokens": 9, "output_tokens": 3}\n')
    assert cli.main(["simulate", write(tmp_path / "a.yaml", arrivals={"trace": "one.jsonl"}), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["runs"]
    assert (found["replicas_max"], found["outcomes"]) == (2, {"ok": 1})
    assert found["gpu_hours"] > found["least_gpu_hours"]


@pytest.mark.parametrize("kind", ["constant", "ramp", "bursts", "day"])
def test_arrivals_have_their_rate(kind: str) -> None:
    shape = TrafficShape(kind, 20, 3000, prompt=100, output=10, spread=0.5, classes=((0, 0.25), (2, 0.75)))
    requests = shape.requests()
    share = {"constant": 1.0, "ramp": 0.5, "bursts": 0.2 + 0.8 * 0.1, "day": 0.6}[kind]
    assert len(requests) / 3000 == pytest.approx(20 * share, rel=0.05)
    assert sum(r.prompt for r in requests) / len(requests) == pytest.approx(100, rel=0.05)
    assert sum(r.priority == 0 for r in requests) / len(requests) == pytest.approx(0.25, abs=0.03)
    assert shape.requests() == requests


# ---- the command


def write(path: Path, **changes: Any) -> str:
    """A scenario file."""
    path.write_text(yaml.safe_dump({**SCENARIO, **changes}))
    return str(path)


def test_the_example_runs_and_is_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["simulate", "--example"]) == 0
    file = tmp_path / "scenario.yaml"
    file.write_text(capsys.readouterr().out)
    code = cli.main(["simulate", str(file), "--set", "arrivals.duration=400", "--json"])
    (found,) = json.loads(capsys.readouterr().out)["runs"]
    assert code == (0 if found["slo"]["kept"] else 1)
    assert sum(found["outcomes"].values()) == found["requests"]
    assert found["speed"]["source"] == "roofline on H100's data sheet"


def test_people_read_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "run.png"
    assert cli.main(["simulate", write(tmp_path / "a.yaml"), "--picture", str(picture)]) == 0
    text = capsys.readouterr().out
    assert "SLO       kept: 100.00% of the requests within it" in text
    assert "for a perfect scaler" in text
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_two_files_are_compared_and_a_search_finds_the_cheapest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = write(tmp_path / "one.yaml")
    many = write(tmp_path / "many.yaml", scaler={"class": "fixed", "replicas": 5})
    assert cli.main(["simulate", many, "--compare", one]) == 0
    assert "* one" in capsys.readouterr().out
    assert (
        cli.main(
            ["simulate", one, "--search", "scaler.replicas=1,3", "--search", "replica.max_num_seqs=4,64", "--json"]
        )
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert len(found["runs"]) == 4
    assert found["best"].startswith("replicas=1")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scaler": {"class": "kpa"}}, "none of knative, hpa, keda, rules, fixed"),
        ({"scaler": {"class": "hpa", "min": 0}}, "does not go to zero"),
        ({"scaler": {"class": "hpa", "metrics": "x"}}, "scaler.metrics: hpa knows metric, target"),
        ({"scaler": {"class": "keda", "metric": "gpu"}}, "none of queue-depth"),
        ({"scaler": {"class": "knative", "window": 2}}, "6 to 3600"),
        ({"scaler": {"class": "knative", "target": "many"}}, "scaler.target: 'many' is not a number"),
        ({"scaler": {"class": "knative", "panic_window_percentage": 1e12}}, "not a number of 1 to 100"),
        ({"scaler": {"class": "knative", "target_burst_capacity": "all"}}, "scaler.target_burst_capacity: 'all'"),
        ({"scaler": {"class": "hpa", "scale_up_window": [1]}}, "scaler.scale_up_window: [1]"),
        ({"scaler": {"class": "rules", "down_busy": "x"}}, "scaler.down_busy: 'x'"),
        ({"scaler": {"class": "fixed", "replicas": 1e9}}, "not a number of 0 to 10000"),
        ({"initial": 1e12}, "not a number of 0 to 10000"),
        ({"price": "dear"}, "price: 'dear' is not a number"),
        ({"slo": {"share": 2}}, "slo.share: 2 is not a number of 0 to 1"),
        ({"arrivals": {"classes": {"gold": 1}}}, "add up to 1"),
        ({"arrivals": {"rate": "1e7", "duration": "1e7"}}, "take a shorter duration"),
        ({"model": {"params": "8B", "kv_cache_dtype": "fp6"}}, "none of auto, fp8"),
        ({"scaler": {"class": "rules", "max": 2.5}}, "not a whole number"),
        ({"replicas": {}}, "there is no such field"),
        ({"arrivals": {"rate": -1}}, "not a number of at least 0"),
        ({"arrivals": {"kind": "weekly"}}, "none of constant"),
        ({"arrivals": {"rate": 0, "duration": 1e9}}, "arrivals.duration: 1000000000.0 is not a number of 1 to"),
        ({"arrivals": {"trace": "nowhere.jsonl"}}, "arrivals.trace: "),
        ({"model": {"params": "70B", "gpu": "L4"}}, "kserve-vllm plan finds a size that fits"),
        ({"model": {}}, "give path or params"),
        ({"routing": "best"}, "none of random"),
    ],
)
def test_a_scenario_that_cannot_be_used_says_where(
    changes: dict[str, Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "bad.yaml", **changes)
    assert cli.main(["simulate", path]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert path in said


@pytest.mark.parametrize("content", ["{", "a: !!python/object:x y", "\0", "[", "- 1"])
def test_a_file_that_is_no_scenario_is_one_sentence(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.yaml").write_text(content)
    assert cli.main(["simulate", str(tmp_path / "a.yaml")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_trace_whose_times_are_years_apart_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A second of the fleet takes time, whether there are requests in it or not."""
    lines = [{"time": at, "prompt_tokens": 10, "output_tokens": 1} for at in (0, 1, 1e12)]
    (tmp_path / "usage.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert cli.main(["simulate", write(tmp_path / "a.yaml", arrivals={"trace": "usage.jsonl"})]) == 2
    assert "more than a year: is a time of it wrong?" in capsys.readouterr().err
    of_it = {"trace": "usage.jsonl", "duration": 60}
    assert cli.main(["simulate", write(tmp_path / "a.yaml", arrivals=of_it)]) == 0


def test_files_of_one_name_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "b").mkdir()
    one, two = write(tmp_path / "a.yaml"), write(tmp_path / "b" / "a.yaml")
    assert cli.main(["simulate", one, "--compare", two, "--compare", one, "--json"]) == 0
    assert [run["name"] for run in json.loads(capsys.readouterr().out)["runs"]] == [one, two, f"{one} (3)"]


def test_a_kept_slo_is_the_exit_code(tmp_path: Path) -> None:
    assert cli.main(["simulate", write(tmp_path / "a.yaml", slo={"first_token": 0.001})]) == 1
    with pytest.raises(ConfigError, match="add up to 1"):
        simulate.scenario_of({**SCENARIO, "arrivals": {"classes": {0: 0.5}}}, "x")


def test_a_trace_is_played(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [{"time": f"2026-01-31T12:00:{i:02d}Z", "prompt_tokens": 100, "output_tokens": 10} for i in range(60)]
    (tmp_path / "usage.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert cli.main(["simulate", write(tmp_path / "a.yaml", arrivals={"trace": "usage.jsonl"}), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["runs"]
    assert (found["requests"], found["duration_s"]) == (60, 59)
