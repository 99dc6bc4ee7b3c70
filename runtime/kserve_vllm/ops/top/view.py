"""Two readings of a server's health and metrics become the figures of the time between them."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from kserve_vllm.ops.exposition import samples

OWN = "kserve_vllm_"
# Counters of which rates are shown, by the label that their tables are of.
_FIRST_TOKEN, _GAP = f"{OWN}time_to_first_token_seconds", f"{OWN}inter_token_latency_seconds"
_CLASSES = {"0": "interactive", "1": "normal", "2": "batch"}


@dataclass(frozen=True)
class ServerReading:
    """What one server said.

    Attributes:
        at: seconds of a clock that never goes back.
        health: the body of `/v2/health/ready`; empty where it did not answer.
        metrics: value by (name, sorted labels).
        error: why something is missing, or "".
        group: the revision or deployment of a pod, or "".
    """

    at: float
    health: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[tuple[str, tuple[tuple[str, str], ...]], float] = field(default_factory=dict)
    error: str = ""
    group: str = ""

    def each(self, name: str) -> Iterable[tuple[dict[str, str], float]]:
        """Labels and value of each sample of a metric."""
        return ((dict(labels), value) for (found, labels), value in self.metrics.items() if found == name)

    def total(self, name: str) -> float | None:
        """The sum of a metric; None where the server does not have it."""
        values = [value for _, value in self.each(name)]
        return sum(values) if values else None


def read(get: Callable[[str], tuple[int, str]], group: str = "") -> ServerReading:
    """Ask a server through `get`, which takes a path and gives a status and a text (0: nothing answers)."""
    status, text = get("/v2/health/ready")
    if not status:
        return ServerReading(time.monotonic(), error=text, group=group)
    try:
        health = json.loads(text)
    except ValueError:
        health = None
    if not isinstance(health, dict):
        return ServerReading(time.monotonic(), error=f"/v2/health/ready answers {status} and no JSON", group=group)
    code, page = get("/metrics")
    at = time.monotonic()
    if code != 200:
        error = f"no metrics ({code or page}): they may be on --admin-port"
        return ServerReading(at, health, error=error, group=group)
    found: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
    for name, labels, value in samples(page):
        if not math.isfinite(value):  # a gauge that has nothing to tell
            continue
        key = name, tuple(sorted(labels.items()))
        found[key] = found.get(key, 0.0) + value
    return ServerReading(at, health, found, group=group)


@dataclass
class View:
    """The figures of one server, or of several together. Rates and quantiles are of the time between two readings;
    None where there was nothing to see in it.

    Attributes:
        state: of the lifecycle, with its reason; `gone` where nothing answers.
        state_s: seconds in it.
        running, waiting: requests in the engine, and in its queue.
        queued: requests in front of the engine, by class.
        in_flight: requests that have entered and not been answered.
        requests_per_s, refused_per_s, prompt_per_s, output_per_s: requests, and tokens.
        first_token_s, gap_s: at p50 and p95, seconds.
        kv_used: share of the KV cache.
        prefix_hits: share of prompt tokens that the prefix cache had.
        tenants, adapters: tokens a second, prompts' and answers', by tenant and by adapter.
        adapter_states: adapters by state.
        pods: how many servers, and how many of them are ready.
        error: why something is missing, or "".
    """

    state: str
    state_s: float = 0.0
    running: float | None = None
    waiting: float | None = None
    queued: dict[str, float] = field(default_factory=dict)
    in_flight: float | None = None
    requests_per_s: float | None = None
    refused_per_s: float | None = None
    prompt_per_s: float | None = None
    output_per_s: float | None = None
    first_token_s: dict[str, float] = field(default_factory=dict)
    gap_s: dict[str, float] = field(default_factory=dict)
    kv_used: float | None = None
    prefix_hits: float | None = None
    tenants: dict[str, float] = field(default_factory=dict)
    adapters: dict[str, float] = field(default_factory=dict)
    adapter_states: dict[str, float] = field(default_factory=dict)
    pods: tuple[int, int] = (1, 0)
    error: str = ""

    def machine(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


def view(pairs: Sequence[tuple[ServerReading, ServerReading]]) -> View:
    """The figures of servers between two readings of each, (before, after)."""
    now = [after for _, after in pairs]
    ready = sum(bool(reading.health.get("ready")) for reading in now)
    found = View(*_state(now), pods=(len(now), ready))
    found.error = "; ".join(dict.fromkeys(reading.error for reading in now if reading.error))
    found.running, found.waiting = _sum(now, "vllm:num_requests_running"), _sum(now, "vllm:num_requests_waiting")
    found.in_flight = _sum(now, f"{OWN}requests_in_flight")
    found.queued = _by(now, f"{OWN}waiting_requests", "priority")
    found.queued = {_CLASSES.get(name, name): value for name, value in sorted(found.queued.items()) if value}
    found.adapter_states = {k: v for k, v in _by(now, f"{OWN}adapters", "state").items() if v}
    caches = [value for reading in now for _, value in reading.each("vllm:kv_cache_usage_perc")]
    found.kv_used = sum(caches) / len(caches) if caches else None
    found.requests_per_s = _rate(pairs, f"{OWN}requests_total")
    found.refused_per_s = _rate(pairs, f"{OWN}rejections_total")
    found.prompt_per_s, found.output_per_s = (_rate(pairs, f"{OWN}{w}_tokens_total") for w in ("prompt", "output"))
    found.first_token_s, found.gap_s = _quantiles(pairs, _FIRST_TOKEN), _quantiles(pairs, _GAP)
    prompt = _grown(pairs, f"{OWN}prompt_tokens_total")
    if prompt:
        found.prefix_hits = (_grown(pairs, f"{OWN}cached_prompt_tokens_total") or 0.0) / prompt
    for label, into in (("tenant", found.tenants), ("adapter", found.adapters)):
        rates: dict[str, float] = defaultdict(float)
        for before, after in pairs:
            for word in ("prompt", "output"):
                for labels, grown in _increase(before, after, f"{OWN}{word}_tokens_total"):
                    rates[labels.get(label, "")] += grown / max(after.at - before.at, 1e-3)
        into.update({k or "-": v for k, v in sorted(rates.items(), key=lambda item: -item[1]) if v > 0})
    return found


def _state(now: Sequence[ServerReading]) -> tuple[str, float]:
    """The state that most concerns a person: one that is not ready before those that are."""
    worst = min(now, key=lambda reading: (bool(reading.health.get("ready")), bool(reading.health)), default=None)
    if worst is None:
        return "no pods", 0.0
    if not worst.health:
        return "gone", 0.0
    state = str(worst.health.get("state", "unknown"))
    reason = worst.health.get("reason")
    seconds = worst.health.get("seconds")
    return (f"{state}: {reason}" if reason else state), float(seconds) if isinstance(seconds, int | float) else 0.0


def _sum(now: Sequence[ServerReading], name: str) -> float | None:
    values = [value for reading in now if (value := reading.total(name)) is not None]
    return sum(values) if values else None


def _by(now: Sequence[ServerReading], name: str, label: str) -> dict[str, float]:
    found: dict[str, float] = defaultdict(float)
    for reading in now:
        for labels, value in reading.each(name):
            found[labels.get(label, "")] += value
    return dict(found)


def _increase(before: ServerReading, after: ServerReading, name: str) -> Iterable[tuple[dict[str, str], float]]:
    """How much each sample of a counter has grown; a counter that fell began anew."""
    if not before.metrics:
        return
    for (found, labels), value in after.metrics.items():
        if found == name:
            old = before.metrics.get((found, labels), 0.0)
            yield dict(labels), value - old if value >= old else value


def _grown(pairs: Sequence[tuple[ServerReading, ServerReading]], name: str) -> float | None:
    found = [grown for before, after in pairs for _, grown in _increase(before, after, name)]
    return sum(found) if found else None


def _rate(pairs: Sequence[tuple[ServerReading, ServerReading]], name: str) -> float | None:
    seen = [(before, after) for before, after in pairs if before.metrics and after.metrics]
    if not seen:
        return None
    return sum(
        sum(grown for _, grown in _increase(before, after, name)) / max(after.at - before.at, 1e-3)
        for before, after in seen
    )


def _quantiles(pairs: Sequence[tuple[ServerReading, ServerReading]], name: str) -> dict[str, float]:
    from kserve_vllm.ops.rollout.statistics import quantile

    upto: dict[float, float] = defaultdict(float)
    for before, after in pairs:
        for labels, grown in _increase(before, after, f"{name}_bucket"):
            with contextlib.suppress(KeyError, ValueError):
                upto[float(labels["le"])] += grown
    bounds = sorted(upto)
    if not bounds or not upto[bounds[-1]] or not math.isfinite(bounds[0]):
        return {}
    counts = [upto[bound] - (upto[bounds[at - 1]] if at else 0.0) for at, bound in enumerate(bounds)]
    finite = [bound for bound in bounds if math.isfinite(bound)]
    return {label: quantile(counts, finite, q) for label, q in (("p50", 0.5), ("p95", 0.95))}
