"""`kserve-vllm simulate`: an autoscaler on recorded or made-up traffic, before the GPUs are bought."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from kserve_vllm.core.errors import ConfigError
from kserve_vllm.ops.model import hardware, measured, memory, steptime, traffic, weights
from kserve_vllm.ops.model.traffic import Arrival, TrafficShape
from kserve_vllm.ops.sim.fleet import ColdStart, Fleet, ReplicaSettings, Result
from kserve_vllm.ops.sim.scalers import MOST_REPLICAS, number_of, scaler
from kserve_vllm.ops.tables import money, seconds, spark, table

EXAMPLE = """\
# A scenario for `kserve-vllm simulate`. Times are seconds.
model: {params: 8B, gpu: H100}        # or path: FOLDER; also quantization, tensor, pipeline, gpu_memory_utilization
# model: {steps: bench.json}          # or the speed of any device alone, from `kserve-vllm bench --save bench.json`
# calibrate: bench.json               # the first model, moved to your own measurement on that GPU
arrivals: {kind: bursts, rate: 40, duration: 3600, prompt: 1000, output: 200}   # constant, ramp, bursts, day
# arrivals: {trace: usage.jsonl}      # or what a service really did: its --usage-sink file
replica: {max_num_seqs: 128}          # also max_num_batched_tokens, max_concurrent, queue, queue_timeout,
                                      # container_concurrency, overhead
cold_start: {image: 20, download: 60, load: 30, compile: 40, ready: 5}   # also node, free_nodes
scaler: {class: knative, target: 64, min: 1, max: 10}                    # or hpa, keda, rules, fixed
slo: {first_token: 2, gap: 0.05, share: 0.95}
client_timeout: 120
"""

_EPILOG = f"""
Start with a scenario and look at what its autoscaler does:
  kserve-vllm simulate --example > scenario.yaml
  kserve-vllm simulate scenario.yaml --picture run.png
Change a value, compare two files, or search for the cheapest values that keep the SLO:
  kserve-vllm simulate scenario.yaml --set scaler.target=32 --set scaler.min=2
  kserve-vllm simulate scenario.yaml --compare hpa.yaml --compare keda.yaml
  kserve-vllm simulate scenario.yaml --search scaler.target=16,32,64 --search scaler.min=1,2,4

The example:
{"".join("  " + line + chr(10) for line in EXAMPLE.splitlines())}
Scalers, and the fields of each beside min and max:
  knative  metric (concurrency, rps), target, target_utilization_percentage, window, panic_window_percentage,
           panic_threshold_percentage, target_burst_capacity, scale_down_delay, scale_to_zero_retention, ...
  hpa      metric (queue-depth, concurrency, running, kv-cache, ttft-p99, busy), target, scale_up_window,
           scale_down_window, metric_delay, ...
  keda     as hpa, and polling, cooldown; min: 0 goes to zero
  rules    up_waiting, up_first_token, down_busy, up_step, hold, cooldown
  fixed    replicas

Exit codes: 0 the SLO was kept (by the best, with --compare and --search), 1 it was not, 2 a file can't be used.
docs/guides/simulating.md says what is simulated and how far it may be off.
"""


@dataclass(frozen=True)
class Scenario:
    """A scenario, read and checked.

    Attributes:
        name: for people.
        requests: sorted by time.
        duration_s: of the traffic.
        step: step time.
        replica, cold: one replica and its start.
        scaler: fields of the scaler.
        initial: replicas at the beginning.
        routing, drain_s, client_timeout_s, seed: see `fleet.Fleet`.
        first_token_s, gap_s, share: the SLO: so large a share of the requests has a first token and gaps within.
        price: per GPU and hour, or None.
        currency: its unit.
    """

    name: str
    requests: Sequence[Arrival]
    duration_s: float
    step: steptime.StepTime
    replica: ReplicaSettings
    cold: ColdStart
    scaler: Mapping[str, object]
    initial: int
    routing: str
    drain_s: float
    client_timeout_s: float
    seed: int
    first_token_s: float
    gap_s: float
    share: float
    price: float | None
    currency: str


@dataclass(frozen=True)
class SimulationReport:
    """What a run comes to.

    Attributes:
        scenario: what was run.
        result: what happened.
        good: share of the requests within the SLO.
        kept: whether that is enough.
        counts: outcomes.
        first_token, gap: seconds at 50, 90, 95, 99 %.
        cost: of the GPU hours, or None.
        least_gpu_hours: what no scaler can go below: see `least_gpu_hours`.
        took_s: seconds of computing.
    """

    scenario: Scenario
    result: Result
    good: float
    kept: bool
    counts: Mapping[str, int]
    first_token: Mapping[str, float]
    gap: Mapping[str, float]
    cost: float | None
    least_gpu_hours: float
    took_s: float

    def machine(self) -> dict[str, object]:
        """For JSON."""
        own = self.scenario
        return {
            "name": own.name,
            "scaler": dict(own.scaler),
            "requests": len(own.requests),
            "duration_s": own.duration_s,
            "slo": {
                "first_token_s": own.first_token_s,
                "gap_s": own.gap_s,
                "share": own.share,
                "good": self.good,
                "kept": self.kept,
            },
            "outcomes": dict(self.counts),
            "first_token_s": dict(self.first_token),
            "gap_s": dict(self.gap),
            "gpu_hours": self.result.gpu_hours,
            "replica_hours": self.result.replica_hours,
            "least_gpu_hours": self.least_gpu_hours,
            "cost": self.cost,
            "currency": own.currency,
            "cold_starts": self.result.cold_starts,
            "preemptions": self.result.preemptions,
            "replicas_max": max((ready for _, _, ready, _, _ in self.result.timeline), default=0),
            "speed": {"source": own.step.source, "band": own.step.band},
            "timeline": [
                {"s": s, "wanted": w, "ready": r, "inside": i, "waiting": q} for s, w, r, i, q in self.result.timeline
            ],
            "took_s": self.took_s,
        }


def main(arguments: Sequence[str]) -> int:
    """Run `kserve-vllm simulate ...`; returns the exit code.

    Raises:
        ConfigError: a scenario can't be used.
    """
    args = parser().parse_args(list(arguments))
    if args.example:
        print(EXAMPLE, end="")
        return 0
    if args.scenario is None:
        raise ConfigError("name a scenario; kserve-vllm simulate --example > scenario.yaml writes one to begin with")
    if args.search and args.compare:
        raise ConfigError("--search and --compare: one at a time")
    quiet = args.json or not sys.stderr.isatty()
    base = _read(args.scenario)
    changes = [_change(word) for word in args.set]
    if args.search:
        reports = _search(args, base, changes, quiet)
    else:
        paths = (args.scenario, *args.compare)
        reports = [
            run(_scenario(path, _changed(_read(path), changes), name), quiet)
            for path, name in zip(paths, _names(paths), strict=True)
        ]
    best = cheapest(reports)
    shown = sorted(reports, key=lambda r: (not r.kept, r.result.gpu_hours))[:10] if args.search else reports
    if args.json:
        print(
            json.dumps(
                {"runs": [report.machine() for report in shown], "best": best.scenario.name if best else None}, indent=2
            )
        )
    elif len(reports) == 1:
        print(_human(reports[0]))
    else:
        print(_compared(shown, best))
    if args.picture:
        from kserve_vllm.ops.pictures import draw_runs

        draw_runs(args.picture, shown[:4])
        print(f"drawn: {args.picture}", file=sys.stderr)
    return 0 if best else 1


def _names(paths: Sequence[Path]) -> list[str]:
    """A name for each file, no two alike: without its folder where that tells them apart."""
    stems = [path.stem for path in paths]
    if len(set(stems)) == len(stems):
        return stems
    found: list[str] = []
    for path in map(str, paths):
        found.append(path if path not in found else f"{path} ({len(found) + 1})")
    return found


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    top = argparse.ArgumentParser(
        prog="kserve-vllm simulate",
        description="Try an autoscaler on recorded or made-up traffic.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    top.add_argument("scenario", nargs="?", type=Path, help="YAML file")
    top.add_argument("--example", action="store_true", help="print a scenario to begin with")
    top.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="change a value of the scenario")
    top.add_argument(
        "--compare", action="append", default=[], type=Path, metavar="FILE", help="run this scenario beside it"
    )
    top.add_argument("--search", action="append", default=[], metavar="PATH=A,B,C", help="try each of these values")
    top.add_argument("--json", action="store_true", help="for machines")
    top.add_argument("--picture", type=Path, metavar="PNG", help="draw the run; needs matplotlib")
    return top


# ---- reading


def _read(path: Path) -> dict[str, object]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: not a scenario; kserve-vllm simulate --example prints one")
    return content


def _scenario(path: Path, tree: Mapping[str, object], name: str) -> Scenario:
    """The scenario of a file; what is wrong with it is said with the file's name."""
    try:
        return scenario_of(tree, name, path.parent)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _change(word: str) -> tuple[list[str], object]:
    name, equals, value = word.partition("=")
    if not equals or not name:
        raise ConfigError(f"{word!r}: write PATH=VALUE, such as scaler.target=32")
    return name.split("."), _value(word, value)


def _value(word: str, text: str) -> object:
    try:
        found: object = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"{word!r}: {text!r} is no value in YAML") from None
    return found


def _changed(tree: dict[str, object], changes: Sequence[tuple[Sequence[str], object]]) -> dict[str, object]:
    found: dict[str, object] = json.loads(json.dumps(tree, default=str))
    for path, value in changes:
        at: Any = found
        for part in path[:-1]:
            at = at.setdefault(part, {})
            if not isinstance(at, dict):
                raise ConfigError(f"{'.'.join(path)}: {part} has no parts")
        at[path[-1]] = value
    return found


_MOST = 1e15  # of any number of a scenario
# Requests of a scenario: each takes some 400 bytes while it is simulated.
_MAX_REQUESTS = 10_000_000
_MAX_DURATION_S = 366 * 86400.0
"""A fleet is looked at each second of it: a year takes minutes."""


class _Part:
    """A part of a scenario that knows which of its fields were read."""

    def __init__(self, content: object, name: str) -> None:
        if content is None:
            content = {}
        if not isinstance(content, Mapping):
            raise ConfigError(f"{name}: not a table of fields")
        self._content, self._name, self._read = dict(content), name, set[str]()

    def number(self, name: str, default: float, least: float = 0.0, most: float = _MOST) -> float:
        value = number_of(self.any(name, default))
        if value is None or not least <= value <= most:
            bounds = f"at least {least:g}" if most == _MOST else f"{least:g} to {most:g}"
            raise ConfigError(f"{self._name}.{name}: {self._content.get(name)!r} is not a number of {bounds}")
        return value

    def whole(self, name: str, default: int, least: int = 0, most: float = _MOST) -> int:
        value = self.number(name, default, least, most)
        if value != int(value):
            raise ConfigError(f"{self._name}.{name}: {value!r} is not a whole number")
        return int(value)

    def text(self, name: str, default: str = "") -> str:
        return str(self.any(name, default) or "")

    def any(self, name: str, default: Any = None) -> Any:
        self._read.add(name)
        return self._content.get(name, default)

    def done(self) -> None:
        unknown = [name for name in self._content if name not in self._read]
        if unknown:
            raise ConfigError(
                f"{self._name}.{unknown[0]}: there is no such field; it knows {', '.join(sorted(self._read))}"
            )


def scenario_of(tree: Mapping[str, object], name: str, folder: Path = Path()) -> Scenario:
    """Read a scenario.

    Args:
        tree: its content.
        name: for people.
        folder: where its paths begin.

    Raises:
        ConfigError: a field is unknown, missing, or can't be used.
    """
    top = _Part(tree, name)
    requests, duration, own_traffic = _arrivals(_Part(top.any("arrivals"), "arrivals"), folder, top.whole("seed", 1))
    step, settings, gpu, room = _engine(top, folder, own_traffic)
    part = _Part(top.any("replica"), "replica")
    replica = ReplicaSettings(
        max_num_seqs=part.whole("max_num_seqs", settings.max_num_seqs, 1),
        max_num_batched_tokens=part.whole("max_num_batched_tokens", settings.max_num_batched_tokens, 16),
        kv_tokens=part.whole("kv_tokens", room, 1),
        max_concurrent=part.whole("max_concurrent", 0),
        queue=part.whole("queue", 1000),
        queue_timeout_s=part.number("queue_timeout", 0),
        container_concurrency=part.whole("container_concurrency", 0),
        overhead_s=part.number("overhead", 0),
        gpus=part.whole("gpus", settings.tensor_parallel_size * settings.pipeline_parallel_size, 1),
    )
    part.done()
    part = _Part(top.any("cold_start"), "cold_start")
    nodes = part.any("free_nodes")
    cold = ColdStart(
        **{
            f"{name}_s": part.number(name, default)
            for name, default in (
                ("node", 0.0),
                ("image", 20.0),
                ("download", 60.0),
                ("load", 30.0),
                ("compile", 40.0),
                ("ready", 5.0),
            )
        },
        free_nodes=None if nodes is None else part.whole("free_nodes", 0),
    )
    part.done()
    part = _Part(top.any("slo"), "slo")
    slo = part.number("first_token", 2.0), part.number("gap", 0.1), part.number("share", 0.95, 0.0, 1.0)
    part.done()
    own_scaler = top.any("scaler") or {"class": "fixed", "replicas": 1}
    if not isinstance(own_scaler, Mapping):
        raise ConfigError("scaler: not a table of fields")
    scaler(own_scaler)  # speaks up before anything runs
    prices = hardware.prices()
    price = None if top.any("price") is None else top.number("price", 0.0)
    if price is None and gpu:
        price = prices.per_hour.get(gpu)
    lowest = int(number_of(own_scaler.get("replicas", own_scaler.get("min", 1))) or 0)
    found = Scenario(
        name=name,
        requests=requests,
        duration_s=duration,
        step=step,
        replica=replica,
        cold=cold,
        scaler=own_scaler,
        initial=top.whole("initial", max(lowest, 1), 0, MOST_REPLICAS),
        routing=top.text("routing", "random"),
        drain_s=top.number("drain", 60.0),
        client_timeout_s=top.number("client_timeout", 0.0),
        seed=top.whole("seed", 1),
        first_token_s=slo[0],
        gap_s=slo[1],
        share=slo[2],
        price=price,
        currency=prices.currency,
    )
    if found.routing not in ("random", "round-robin", "least"):
        raise ConfigError(f"routing: {found.routing!r} is none of random, round-robin, least")
    top.done()
    return found


def _arrivals(part: _Part, folder: Path, seed: int) -> tuple[list[Arrival], float, traffic.Traffic]:
    if trace := part.text("trace"):
        try:
            requests = traffic.read_trace(folder / trace)
        except ConfigError as error:
            raise ConfigError(str(error).replace("--trace ", "arrivals.trace: ", 1)) from None
        duration = part.number("duration", max(requests[-1].at, 1.0), 1.0)
        if duration > _MAX_DURATION_S:
            raise ConfigError(
                f"arrivals.trace: its requests lie {duration / 86400:,.0f} days apart, more than a year: is a time of "
                "it wrong? arrivals.duration takes the first seconds of it"
            )
        requests = [request for request in requests if request.at <= duration]
        part.done()
        return requests, duration, traffic.describe(requests, source=trace)
    classes = part.any("classes") or {1: 1.0}
    try:
        shares = {int(name): float(share) for name, share in classes.items()}
    except (AttributeError, TypeError, ValueError):
        shares = {}
    if abs(sum(shares.values()) - 1) > 1e-6 or min(shares.values()) < 0:
        raise ConfigError("arrivals.classes: shares of the classes, such as {0: 0.8, 2: 0.2}, that add up to 1")
    shape = TrafficShape(
        kind=part.text("kind", "constant"),
        rate=part.number("rate", 1.0),
        duration_s=part.number("duration", 3600, 1, _MAX_DURATION_S),
        prompt=part.whole("prompt", 1000, 1),
        output=part.whole("output", 200, 1),
        spread=part.number("spread", 0.0, 0.0, 5.0),
        cached_share=part.number("shared_prefix", 0.0, 0.0, 1.0),
        classes=tuple(shares.items()),
        seed=seed,
    )
    part.done()
    if shape.rate * shape.duration_s > _MAX_REQUESTS:
        raise ConfigError(
            f"arrivals: up to {shape.rate * shape.duration_s:,.0f} requests, more than {_MAX_REQUESTS:,} that fit the "
            "memory; take a shorter duration"
        )
    requests = shape.requests()
    if not requests:  # what a fleet costs at night is worth knowing
        idle = traffic.Traffic(0.0, shape.prompt, shape.output, shape.prompt, shape.output, 0, 0.0, shape.kind)
        return requests, shape.duration_s, idle
    return requests, shape.duration_s, traffic.describe(requests, source=shape.kind)


def _engine(
    top: _Part, folder: Path, load: traffic.Traffic
) -> tuple[steptime.StepTime, memory.EngineSettings, str | None, int]:
    """Step time, engine flags, the GPU's name, and tokens of cache."""
    part = _Part(top.any("model"), "model")
    calibrate = top.text("calibrate")
    table_ = part.any("steps")
    if isinstance(table_, str):
        step = measured.fitted_steps(folder / table_)
        part.done()
        return step, memory.EngineSettings(), None, 1 << 30
    if table_:
        # Measured on any device: seconds = fixed + per_sequence * sequences + per_prompt_token * tokens.
        own = _Part(table_, "model.steps")
        step = steptime.StepTime(
            fixed=own.number("fixed", 0.0),
            read_per_kv_token=own.number("per_context_token", 0.0),
            read_weights=0.0,
            read_experts=0.0,
            experts=0,
            experts_per_token=0,
            compute_per_token=own.number("per_prompt_token", 0.0),
            compute_per_pair=0.0,
            reduce_start=0.0,
            reduce_per_token=0.0,
            per_sequence=own.number("per_sequence", 0.0),
            source="the scenario's own steps",
            band=measured.CALIBRATED_BAND,
        )
        own.done()
        part.done()
        return step, memory.EngineSettings(), None, 1 << 30
    quantization = part.text("quantization") or None
    path, params = part.text("path"), part.text("params")
    if bool(path) == bool(params):
        raise ConfigError("model: give path or params (or steps), one of them")
    if path:
        own_path = folder / path
        model = weights.read_model(str(own_path) if own_path.exists() else path, quantization)
    else:
        model = weights.guess_model(params, quantization)
    gpu = hardware.gpu(part.text("gpu", "H100"))
    longest = load.prompt_max + load.output_max
    settings = memory.EngineSettings(
        tensor_parallel_size=part.whole("tensor", 1, 1),
        pipeline_parallel_size=part.whole("pipeline", 1, 1),
        gpu_memory_utilization=part.number("gpu_memory_utilization", 0.92, 0.01, 1.0),
        max_model_len=part.whole("max_model_len", max(longest, 2048), 1),
        kv_cache_dtype=part.text("kv_cache_dtype", "auto"),
    )
    if settings.kv_cache_dtype not in memory.CACHE_DTYPES:
        raise ConfigError(
            f"model.kv_cache_dtype: {settings.kv_cache_dtype!r} is none of {', '.join(memory.CACHE_DTYPES)}"
        )
    part.done()
    space = memory.budget(model.architecture, model.weights, gpu, settings)
    if space.kv_tokens < longest:
        raise ConfigError(
            f"model: on {settings.tensor_parallel_size} x {gpu.name} the cache has room for {space.kv_tokens:,} "
            f"tokens, the longest request has {longest:,}; kserve-vllm plan finds a size that fits"
        )
    step = steptime.roofline(model.architecture, model.weights, gpu, settings)
    if calibrate:
        step = measured.with_benchmark(step, folder / calibrate)
    return step, settings, gpu.name, space.kv_tokens


# ---- running


def run(scenario: Scenario, quiet: bool = True) -> SimulationReport:
    """Run one scenario."""
    began = time.monotonic()

    def progress(at: float) -> None:
        if not quiet:
            print(f"\r{scenario.name}: {min(100, 100 * at / scenario.duration_s):.0f} % ", end="", file=sys.stderr)

    fleet = Fleet(
        scenario.requests,
        scenario.step,
        scenario.replica,
        scenario.cold,
        scaler(scenario.scaler),
        initial=scenario.initial,
        routing=scenario.routing,
        drain_s=scenario.drain_s,
        client_timeout_s=scenario.client_timeout_s,
        seed=scenario.seed,
        duration_s=scenario.duration_s,
        progress=progress,
    )
    result = fleet.run()
    if not quiet:
        print("\r" + " " * 40 + "\r", end="", file=sys.stderr)
    served = [outcome for outcome in result.outcomes if outcome.result == "ok"]
    good = sum(
        outcome.first_token_s <= scenario.first_token_s and outcome.gap_s <= scenario.gap_s for outcome in served
    )
    share = good / len(result.outcomes) if result.outcomes else 1.0
    counts: dict[str, int] = {}
    for outcome in result.outcomes:
        counts[outcome.result] = counts.get(outcome.result, 0) + 1
    return SimulationReport(
        scenario,
        result,
        share,
        share >= scenario.share,
        counts,
        percentiles([o.first_token_s for o in served]),
        percentiles([o.gap_s for o in served if o.output > 1]),
        None if scenario.price is None else result.gpu_hours * scenario.price,
        least_gpu_hours(scenario),
        time.monotonic() - began,
    )


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """The 50th, 90th, 95th and 99th percentile, by nearest rank."""
    ordered = sorted(values)
    if not ordered:
        return {}
    return {f"p{p}": ordered[min(len(ordered) - 1, math.ceil(p / 100 * len(ordered)) - 1)] for p in (50, 90, 95, 99)}


def least_gpu_hours(scenario: Scenario) -> float:
    """GPU hours that no scaler can go below while the gap of the SLO is kept.

    A perfect one would know the future and start replicas at once; its replicas would always run the largest batch
    whose gap the SLO allows. Each request then takes its prompt's time and its share of the steps of that batch.
    Nothing is rounded up to whole replicas, so what can be reached is a little above.
    """
    step, own = scenario.step, scenario.replica
    if not scenario.requests:
        return 0.0
    number = len(scenario.requests)
    prompt = sum(r.prompt for r in scenario.requests) / number
    output = sum(r.output for r in scenario.requests) / number
    cached = sum(r.cached for r in scenario.requests) / number
    context = prompt + output / 2
    most = max(1, min(own.max_num_seqs, int(own.kv_tokens / max(context - cached, 1))))
    # Time of a sequence in a batch of n is the step's n-th part, which falls with n: take the largest allowed.
    batch = max((n for n in range(1, most + 1) if step.step(n, context) <= scenario.gap_s), default=1)
    marginal = step.step(batch, context, own.max_num_batched_tokens, prompt / 2) - step.step(batch, context)
    per_prompt_token = marginal / own.max_num_batched_tokens
    per_output_token = step.step(batch, context) / batch
    busy = sum((r.prompt - r.cached) * per_prompt_token + (r.output - 1) * per_output_token for r in scenario.requests)
    return busy / 3600 * own.gpus


def _search(
    args: argparse.Namespace, base: dict[str, object], changes: Sequence[tuple[list[str], object]], quiet: bool
) -> list[SimulationReport]:
    axes = []
    for word in args.search:
        path, _, values = word.partition("=")
        choices = [_value(word, value) for value in values.split(",") if value]
        if not choices:
            raise ConfigError(f"--search {word!r}: write PATH=A,B,C, such as scaler.target=16,32,64")
        axes.append([(path.split("."), value) for value in choices])
    grid = list(itertools.product(*axes))
    if len(grid) > 500:
        raise ConfigError(f"--search: {len(grid)} combinations are too many (500); take fewer values")
    reports = []
    first = _scenario(args.scenario, _changed(base, changes), args.scenario.stem)
    for number, combination in enumerate(grid, start=1):
        label = " ".join(f"{path[-1]}={value}" for path, value in combination)
        tree = _changed(base, [*changes, *combination])
        scenario = _scenario(args.scenario, tree, label)
        if all(path[0] != "arrivals" for path, _ in combination):
            scenario = replace(scenario, requests=first.requests)
        if not quiet:
            print(f"[{number}/{len(grid)}] {label}", file=sys.stderr)
        reports.append(run(scenario, quiet))
    return reports


def cheapest(reports: Sequence[SimulationReport]) -> SimulationReport | None:
    """The run with the fewest GPU hours among those that keep the SLO."""
    return min((report for report in reports if report.kept), key=lambda r: (r.result.gpu_hours, -r.good), default=None)


# ---- for people


def _human(report: SimulationReport) -> str:
    own, result = report.scenario, report.result
    ready = [r for _, _, r, _, _ in result.timeline]
    wanted = [w for _, w, _, _, _ in result.timeline]
    inside = [i for _, _, _, i, _ in result.timeline]
    top = max([*ready, *wanted, 1])
    bad = ", ".join(f"{count:,} {name}" for name, count in sorted(report.counts.items()) if name != "ok") or "none"
    rows = [("", *(f"{name}" for name in ("p50", "p90", "p95", "p99")), "SLO")]
    for label, found, bound in (("first token", report.first_token, own.first_token_s), ("gap", report.gap, own.gap_s)):
        rows.append(
            (label, *(seconds(found[p]) if found else "-" for p in ("p50", "p90", "p95", "p99")), seconds(bound))
        )
    kind = " ".join(f"{key}={value}" for key, value in own.scaler.items())
    ratio = f"; {result.gpu_hours / report.least_gpu_hours:.1f} times that here" if report.least_gpu_hours else ""
    cost = f", {own.currency} {money(report.cost)}" if report.cost is not None else ""
    return "\n".join(
        [
            f"{own.name}: {kind}",
            f"{len(own.requests):,} requests in {own.duration_s / 3600:.2f} h; speed from {own.step.source}, "
            f"band {own.step.band:.0%}",
            "",
            f"replicas wanted   {spark(wanted, top=top)} {max(wanted, default=0)} at most",
            f"replicas ready    {spark(ready, top=top)} {max(ready, default=0)} at most",
            f"requests inside   {spark(inside)} {max(inside, default=0):,} at most",
            "",
            table(rows, right=range(1, 6)),
            "",
            f"SLO       {'kept' if report.kept else 'NOT kept'}: {report.good:.2%} of the requests within it, "
            f"{own.share:.0%} asked for",
            f"served    {report.counts.get('ok', 0):,}; not served: {bad}",
            f"GPUs      {result.gpu_hours:.2f} GPU hours{cost}; {result.cold_starts} cold starts, "
            f"{result.preemptions:,} preemptions",
            f"bound     {report.least_gpu_hours:.2f} GPU hours for a perfect scaler that serves all{ratio}",
            f"simulated in {report.took_s:.1f} s",
        ]
    )


def _compared(reports: Sequence[SimulationReport], best: SimulationReport | None) -> str:
    rows = [("", "SLO", "WITHIN", "FIRST TOKEN P50", "P99", "GAP P99", "NOT SERVED", "REPLICAS", "GPU HOURS", "COST")]
    for report in reports:
        first, gap = report.first_token, report.gap
        rows.append(
            (
                ("* " if report is best else "  ") + report.scenario.name,
                "kept" if report.kept else "not kept",
                f"{report.good:.2%}",
                seconds(first["p50"]) if first else "-",
                seconds(first["p99"]) if first else "-",
                seconds(gap["p99"]) if gap else "-",
                f"{sum(n for k, n in report.counts.items() if k != 'ok'):,}",
                str(max((r for _, _, r, _, _ in report.result.timeline), default=0)),
                f"{report.result.gpu_hours:.2f}",
                money(report.cost) if report.cost is not None else "-",
            )
        )
    words = "* the cheapest that keeps the SLO" if best else "None of them keeps the SLO"
    bound = min(report.least_gpu_hours for report in reports)
    return f"{table(rows, right=range(2, 10))}\n{words}; a perfect scaler would take {bound:.2f} GPU hours"
