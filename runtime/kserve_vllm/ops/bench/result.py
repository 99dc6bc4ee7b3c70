"""A benchmark's result: one JSON form, that `plan --calibrate`, `simulate` and `bench compare` read.

    {"schema": "kserve-vllm/bench/1", "date", "url", "model", "protocol", "workload": {...}, "slo": {...},
     "results": [ROW, ...]}

A row is one load. Its names and definitions are those of `vllm bench serve --save-result --save-detailed`
(vllm/benchmarks/serve.py), whose files are therefore read in the same places: `max_concurrency` or `request_rate`,
`completed`, `failed`, `duration` (seconds), `total_input_tokens`, `total_output_tokens`, `request_throughput`,
`request_goodput`, `output_throughput`, `total_token_throughput` (each per second), and `mean_`, `median_`, `std_` and
`p90_`, `p95_`, `p99_` of `ttft_ms` (to the first token), `tpot_ms` (a request's mean gap between tokens), `itl_ms`
(every gap between two pieces of a stream) and `e2el_ms` (to the end).
Per request, in the order of sending: `start_times`, `ttfts`, `tpots`, `e2els` (seconds; null where there is none),
`input_lens`, `output_lens`, and `errors` (the text, "" where it was answered).
Ours alone: `total_cached_tokens` (null where the server does not say), `most_in_flight`, `client_busy`, `good_share`.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import numpy as np

from kserve_vllm.core.errors import ConfigError
from kserve_vllm.ops.bench.load import Played

SCHEMA = "kserve-vllm/bench/1"
PERCENTILES = (90, 95, 99)
Row = dict[str, Any]


@dataclass(frozen=True)
class SLO:
    """What a request has to keep to be good, seconds; None: no bound.

    Attributes:
        first_token: to the first token.
        gap: mean between its tokens.
        end_to_end: to the end.
        share: of all requests that have to be good, failed ones counted.
    """

    first_token: float | None = None
    gap: float | None = None
    end_to_end: float | None = None
    share: float = 0.95

    @property
    def any(self) -> bool:
        """Whether there is a bound."""
        return any(bound is not None for bound in (self.first_token, self.gap, self.end_to_end))

    def good(self, first_token: float | None, gap: float | None, total: float | None) -> bool:
        """Whether an answered request keeps every bound; what it has none of (the gap of one token) is kept."""
        pairs = ((first_token, self.first_token), (gap, self.gap), (total, self.end_to_end))
        return all(bound is None or value is None or value <= bound for value, bound in pairs)


def row(played: Played, slo: SLO) -> Row:
    """The row of what was played."""
    answered = [answer for answer in played.answers if not answer.error]
    good = sum(slo.good(a.first_token, a.gap, a.total) for a in answered) if slo.any else len(answered)
    duration = played.duration_s
    prompt, output = sum(a.prompt for a in answered), sum(a.output for a in answered)
    cached = [a.cached for a in answered if a.cached is not None]
    began = played.answers[0].began if played.answers else 0.0
    pieces = [later - sooner for a in answered for sooner, later in zip(a.arrivals, a.arrivals[1:], strict=False)]
    found: Row = {
        "max_concurrency": played.point.concurrency,
        "request_rate": played.point.rate if played.point.rate is not None else "inf",
        "completed": len(answered),
        "failed": len(played.answers) - len(answered),
        "duration": duration,
        "total_input_tokens": prompt,
        "total_output_tokens": output,
        "total_cached_tokens": sum(cached) if cached else None,
        "request_throughput": len(answered) / duration,
        "request_goodput": good / duration if slo.any else None,
        "good_share": good / max(1, len(played.answers)) if slo.any else None,
        "output_throughput": output / duration,
        "total_token_throughput": (prompt + output) / duration,
        "most_in_flight": played.most_in_flight,
        "client_busy": played.client_busy,
    }
    for name, values in (
        ("ttft", [a.first_token for a in answered]),
        ("tpot", [a.gap for a in answered]),
        ("itl", pieces),
        ("e2el", [a.total for a in answered]),
    ):
        found |= _statistics(name, [value for value in values if value is not None])
    return found | {
        "start_times": [round(a.began - began, 6) for a in played.answers],
        "ttfts": [_rounded(None if a.error else a.first_token) for a in played.answers],
        "tpots": [_rounded(None if a.error else a.gap) for a in played.answers],
        "e2els": [_rounded(None if a.error else a.total) for a in played.answers],
        "input_lens": [a.prompt for a in played.answers],
        "output_lens": [a.output for a in played.answers],
        "errors": [a.error for a in played.answers],
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def _statistics(name: str, values: Sequence[float]) -> Row:
    """Milliseconds; None where nothing was seen."""
    if not values:
        return {f"{kind}_{name}_ms": None for kind in ("mean", "median", "std", *(f"p{p}" for p in PERCENTILES))}
    own = np.asarray(values) * 1000
    found = {"mean": own.mean(), "median": np.median(own), "std": own.std()}
    found |= {f"p{p}": np.percentile(own, p) for p in PERCENTILES}
    return {f"{kind}_{name}_ms": float(value) for kind, value in found.items()}


def kept(found: Row, slo: SLO) -> bool:
    """Whether a load keeps the SLO; without one, whether every request was answered."""
    if not found["completed"]:
        return False
    return cast(float, found["good_share"]) >= slo.share if slo.any else not found["failed"]


def result(
    url: str, model: str, protocol: str, workload: Mapping[str, object], slo: SLO, rows: Sequence[Row]
) -> dict[str, object]:
    """The whole result; the key is not in it."""
    return {
        "schema": SCHEMA,
        "date": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        "url": url,
        "model": model,
        "protocol": protocol,
        "workload": dict(workload),
        "slo": asdict(slo),
        "results": list(rows),
    }


def save(path: Path, content: Mapping[str, object]) -> None:
    """Write a result, whole or not at all. Raises ConfigError."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise ConfigError(f"--save {path}: {error}") from None


def writable(path: Path) -> None:
    """Raises ConfigError where `save` could not write."""
    part = path.with_name(path.name + ".part")
    try:
        part.touch()
        part.unlink()
    except OSError as error:
        raise ConfigError(f"--save {path}: {error.strerror}") from None
    if path.is_dir():
        raise ConfigError(f"--save {path}: a folder")


def load_name(found: Mapping[str, object]) -> str:
    """A row's load, the same for the same load of two results."""
    rate = found.get("request_rate")
    if rate not in (None, "inf") and math.isfinite(float(str(rate))):
        return f"{float(str(rate)):g}/s"
    most = found.get("max_concurrency")
    return f"{most} at once" if most else "all at once"


def errors(rows: Sequence[Row]) -> list[tuple[str, int]]:
    """What went wrong, most often first."""
    return Counter(text for found in rows for text in found.get("errors", ()) if text).most_common()
