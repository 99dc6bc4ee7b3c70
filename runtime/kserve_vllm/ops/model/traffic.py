"""Requests: made up from a shape, or read from a real service's records."""

from __future__ import annotations

import csv
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from kserve_vllm.core.errors import ConfigError

_TIME = ("time", "timestamp", "arrived_at", "start", "TIMESTAMP")
_PROMPT = ("prompt_tokens", "input_tokens", "input_length", "ContextTokens")
_OUTPUT = ("output_tokens", "completion_tokens", "output_length", "GeneratedTokens")


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request.

    Attributes:
        at: seconds after the beginning.
        prompt: tokens of the prompt.
        output: tokens of the answer.
        cached: tokens of the prompt that a warm prefix cache holds.
        priority: 0 is served first.
    """

    at: float
    prompt: int
    output: int
    cached: int = 0
    priority: int = 1


@dataclass(frozen=True)
class Traffic:
    """What a plan needs to know of the requests.

    Attributes:
        rate: requests per second at the peak.
        prompt, output: mean tokens.
        prompt_max, output_max: tokens of the longest ones.
        cached: mean tokens of a prompt that the prefix cache holds.
        mean_rate: requests per second over all of the time.
        source: for people.
    """

    rate: float
    prompt: int
    output: int
    prompt_max: int
    output_max: int
    cached: int
    mean_rate: float
    source: str


def read_trace(path: Path) -> list[Arrival]:
    """Read records, JSON lines or CSV, sorted by time, the first one at 0 seconds.

    Fields: a time (RFC 3339, or seconds), prompt and output tokens; `cached_tokens` and `priority` are optional. The
    runtime's own usage records (`--usage-sink file:PATH`) are such a file, and so are Azure's LLM traces and
    Mooncake's. Records of requests that were refused and have no tokens are left out.

    Raises:
        ConfigError: the file can't be read, or holds no such records.
    """
    found: list[tuple[float, int, int, int, int]] = []
    number = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:  # spreadsheets write a byte order mark
            if path.suffix == ".csv":
                reader = csv.DictReader(stream)
                for row in reader:
                    number = reader.line_num
                    found += _record(row)
            else:
                for line in stream:
                    number += 1
                    if line.strip():
                        found += _record(json.loads(line))
    except OSError as error:
        raise ConfigError(f"--trace {path}: {error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--trace {path}: not text in UTF-8") from None
    except (ValueError, TypeError, OverflowError, RecursionError, csv.Error) as error:
        what = "not JSON; a trace has one object a line" if isinstance(error, json.JSONDecodeError) else str(error)
        raise ConfigError(f"--trace {path}, line {max(number, 1)}: {what}") from None
    if not found:
        raise ConfigError(f"--trace {path}: no request with tokens in it")
    found.sort()
    first = found[0][0]
    unit = 1e-3 if found[-1][0] - first > 1e3 * 86400 * 40 else 1.0  # Mooncake counts milliseconds
    return [
        Arrival((at - first) * unit, prompt, output, cached, priority) for at, prompt, output, cached, priority in found
    ]


def _record(row: object) -> Iterator[tuple[float, int, int, int, int]]:
    """A row as seconds, prompt, output, cached tokens and class; nothing where it has no tokens.

    Raises:
        ValueError: it is no such row.
    """
    if not isinstance(row, Mapping):
        raise ValueError("not an object; a trace has one object a line")
    at = _seconds(_field(row, _TIME))
    prompt, output = _tokens(_field(row, _PROMPT)), _tokens(_field(row, _OUTPUT))
    if prompt > 0:
        cached = min(_tokens(row.get("cached_tokens") or 0), prompt - 1)
        yield at, prompt, max(output, 1), cached, _class(row.get("priority"))


def _field(row: Mapping[str, Any], names: Sequence[str]) -> Any:
    for name in names:
        if row.get(name) not in (None, ""):
            return row[name]
    raise ValueError(f"none of {', '.join(names)} is there")


def _tokens(value: object) -> int:
    try:
        found = float(str(value))
    except ValueError:
        found = math.nan
    if not 0 <= found < 1e9:
        raise ValueError(f"{value!r} is not a number of tokens")
    return int(found)


def _seconds(value: Any) -> float:
    try:
        seconds = float(value)
    except ValueError:
        return _date(value)
    if not abs(seconds) < 1e15:
        raise ValueError(f"{value!r} is not a time")
    return seconds


def _date(value: object) -> float:
    try:
        text = str(value).replace("Z", "+00:00")
        head, dot, rest = text.partition(".")
        digits = rest.partition("+")[0] if dot else ""
        if len(digits) > 6:  # Azure writes seven
            text = f"{head}.{digits[:6]}{rest[len(digits) :]}"
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        raise ValueError(f"{value!r} is not a time; RFC 3339 or seconds are") from None


def _class(value: object) -> int:
    if value in (None, ""):
        return 1
    names = {"interactive": 0, "high": 0, "standard": 1, "normal": 1, "default": 1, "batch": 2, "low": 2}
    return names.get(str(value).lower(), 1) if not str(value).lstrip("-").isdigit() else int(str(value))


def describe(requests: Sequence[Arrival], window_s: float = 60.0, source: str = "trace") -> Traffic:
    """The peak of a trace: the busiest `window_s` seconds of it, its mean lengths and its longest ones."""
    length = max(requests[-1].at, 1.0)
    window = min(window_s, length)
    counts: dict[int, int] = {}
    for request in requests:
        counts[int(request.at / window)] = counts.get(int(request.at / window), 0) + 1
    number = len(requests)
    return Traffic(
        rate=max(counts.values()) / window,
        prompt=max(1, round(sum(r.prompt for r in requests) / number)),
        output=max(1, round(sum(r.output for r in requests) / number)),
        prompt_max=max(r.prompt for r in requests),
        output_max=max(r.output for r in requests),
        cached=round(sum(r.cached for r in requests) / number),
        mean_rate=number / length,
        source=f"{source}: {number:,} requests in {length / 3600:.2f} h, peak of {window:g} s",
    )


@dataclass(frozen=True)
class TrafficShape:
    """Arrivals to make up: a Poisson process whose rate changes with time.

    Attributes:
        kind: `constant`, `ramp` (from 0 to the rate), `bursts` (a tenth of the rate, and the rate for one minute of
        five)
            or `day` (a sine from a fifth of the rate at night to the rate).
        rate: requests per second at the peak.
        duration_s: seconds.
        prompt, output: mean tokens; lengths are spread log-normally with `spread` as the deviation of the logarithm.
        cached_share: share of a prompt that the prefix cache holds.
        classes: priority to its share of the requests.
    """

    kind: str
    rate: float
    duration_s: float
    prompt: int = 512
    output: int = 128
    spread: float = 0.0
    cached_share: float = 0.0
    classes: tuple[tuple[int, float], ...] = ((1, 1.0),)
    seed: int = 1

    def rate_at(self, at: float) -> float:
        """Requests per second at a time in seconds."""
        if self.kind == "ramp":
            return self.rate * at / self.duration_s
        if self.kind == "bursts":
            return self.rate if at % 300 >= 240 else self.rate / 10
        if self.kind == "day":
            return self.rate * (0.6 - 0.4 * math.cos(2 * math.pi * at / min(86400.0, self.duration_s)))
        return self.rate

    def requests(self) -> list[Arrival]:
        """Make them up; the same seed gives the same ones.

        Raises:
            ConfigError: a kind that there is not.
        """
        if self.kind not in ("constant", "ramp", "bursts", "day"):
            raise ConfigError(f"arrivals {self.kind!r} is none of constant, ramp, bursts, day")
        dice = random.Random(self.seed)  # noqa: S311 - a simulation has to be repeatable
        found = []
        at = 0.0
        while self.rate > 0:
            at += dice.expovariate(self.rate)
            if at >= self.duration_s:
                break
            if dice.random() * self.rate > self.rate_at(at):
                continue
            prompt, output = self._length(dice, self.prompt), self._length(dice, self.output)
            lot, priority = dice.random(), self.classes[-1][0]
            for name, share in self.classes:
                if lot < share:
                    priority = name
                    break
                lot -= share
            found.append(Arrival(at, prompt, output, min(int(prompt * self.cached_share), prompt - 1), priority))
        return found

    def _length(self, dice: random.Random, mean: int) -> int:
        if not self.spread:
            return mean
        return max(1, round(dice.lognormvariate(math.log(mean) - self.spread**2 / 2, self.spread)))
