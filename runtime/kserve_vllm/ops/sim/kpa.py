"""Knative's pod autoscaler (KPA): what it decides, and what becomes of the decision.

Behaviour as in knative.dev/serving v0.48.1 (Knative 1.21, unchanged on master in August 2026):
`pkg/autoscaler/scaling/autoscaler.go` (the decision), `pkg/autoscaler/aggregation` (the windows), `pkg/reconciler/
autoscaling/kpa` (bounds, scale to zero). tests/ops/test_knative.py holds it against decisions that Knative's own code
made. Times are seconds; `now` counts from any fixed instant.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

TICK_S = 2.0  # pkg/autoscaler/scaling/multiscaler.go: tickInterval
SCRAPE_S = 1.0  # pkg/autoscaler/metrics/collector.go: scrapeTickInterval, and the bucket's width
_NEVER = -1e18


def _round6(value: float) -> float:
    """Go's math.Round to six digits: halves away from zero."""
    scaled = value * 1e6
    return math.copysign(math.floor(abs(scaled) + 0.5), scaled) / 1e6


class Window:
    """An average over the last `length_s` seconds, in buckets of one second; of a partial window while it fills."""

    def __init__(self, length_s: float) -> None:
        self._length = length_s
        self._buckets = [0.0] * math.ceil(length_s)
        self._first = self._last = _NEVER
        self._total = 0.0

    def record(self, now: float, value: float) -> None:
        """Add a value to the bucket of its second."""
        at = math.floor(now)
        size = len(self._buckets)
        if self._last != at:
            if at + self._length <= self._last:
                return
            if self._first == _NEVER or self._first > at:
                self._first = at
            if at > self._last:
                if at - self._last >= self._length:
                    self._first = at
                    self._buckets = [0.0] * size
                    self._total = 0.0
                else:
                    for index in range(int(self._last) + 1, at + 1):
                        self._total -= self._buckets[index % size]
                        self._buckets[index % size] = 0.0
                self._last = at
        self._buckets[at % size] += value
        self._total += value

    def empty(self, now: float) -> bool:
        """Whether nothing was recorded for longer than the window."""
        return math.floor(now) - self._last > self._length

    def average(self, now: float) -> float:
        """The mean of the buckets that hold data."""
        at = math.floor(now)
        gap = at - self._last
        size = len(self._buckets)
        if gap >= self._length and gap > 0:
            return 0.0
        filled = self._last - self._first + 1
        if gap <= 0:
            return _round6(self._total / min(filled, size))
        total = self._total
        for index in range(int(self._last) + 1, at + 1):
            total -= self._buckets[index % size]
        return _round6(total / min(filled, size - gap))


class WeightedWindow(Window):
    """An average in which a second weighs less the longer ago it is (`metric-aggregation-algorithm:
    weighted-exponential`)."""

    def __init__(self, length_s: float) -> None:
        super().__init__(length_s)
        # So that the weights of all buckets add up to 0.9999, and at least a fifth for the newest.
        self._weight = max(1 - (1 - 0.9999) ** (1 / len(self._buckets)), 0.2)

    def average(self, now: float) -> float:
        """The weighted mean."""
        if self.empty(now):
            return 0.0
        at, size = math.floor(now), len(self._buckets)
        weight, number = self._weight, size
        if at > self._last:
            gap = int(at - self._last)
            weight *= (1 - self._weight) ** gap
            number -= gap
        found = 0.0
        for back in range(number):
            found += self._buckets[(int(self._last) - back) % size] * weight
            weight *= 1 - self._weight
        return found


class Highest:
    """The highest value of the last `length_s` seconds, in buckets of a tick: the delay of scaling down."""

    def __init__(self, length_s: float) -> None:
        self._size = math.ceil(length_s / TICK_S)
        self._kept: deque[tuple[int, int]] = deque()

    def record(self, now: float, value: int) -> int:
        """Add a value and return the highest one."""
        index = math.floor(now) // int(TICK_S)
        while self._kept and value >= self._kept[-1][1]:
            self._kept.pop()
        while self._kept and index - self._kept[0][0] >= self._size:
            self._kept.popleft()
        if self._kept and self._kept[-1][0] == index:
            value = max(value, self._kept.pop()[1])
        self._kept.append((index, value))
        return self._kept[0][1]


@dataclass(frozen=True)
class KPASettings:
    """Settings of a revision; defaults as in Knative's `config-autoscaler`.

    Attributes:
        metric: `concurrency` or `rps`.
        target: requests at once (or per second) of a pod, before the utilization.
        utilization: share of the target that is aimed at.
        target_burst_capacity: requests that must fit beyond those that run, or the activator stays in the path; -1
            keeps it there, 0 never.
        window_s, panic_window_percentage, panic_threshold_percentage: of the averages.
        scale_down_delay_s: how long a lower number must hold.
        max_scale_up_rate, max_scale_down_rate: factors from one decision to the next.
        activation_scale: pods when it starts from zero.
        min_scale, max_scale: bounds; max_scale 0 means none.
        scale_to_zero_grace_s, scale_to_zero_retention_s: how long the last pod stays.
        weighted: the exponential average instead of the plain one.
    """

    metric: str = "concurrency"
    target: float = 100.0
    utilization: float = 0.7
    target_burst_capacity: float = 211.0
    window_s: float = 60.0
    panic_window_percentage: float = 10.0
    panic_threshold_percentage: float = 200.0
    scale_down_delay_s: float = 0.0
    max_scale_up_rate: float = 1000.0
    max_scale_down_rate: float = 2.0
    activation_scale: int = 0
    min_scale: int = 0
    max_scale: int = 0
    scale_to_zero_grace_s: float = 30.0
    scale_to_zero_retention_s: float = 0.0
    weighted: bool = False

    @property
    def panic_window_s(self) -> float:
        """Length of the panic window; never below the second that a bucket is wide."""
        return max(self.window_s * self.panic_window_percentage / 100, SCRAPE_S)


@dataclass(frozen=True)
class ScaleDecision:
    """What the autoscaler wants.

    Attributes:
        desired: pods, before bounds.
        excess_burst_capacity: requests that would still fit; below 0 the activator is in the path.
        valid: False when there was no data to decide on.
    """

    desired: int
    excess_burst_capacity: int
    valid: bool


class Autoscaler:
    """The decision alone: windows of load in, a number of pods out.

    Args:
        settings: the revision's.
        target: load of a pod that is aimed at; by default the settings' target times utilization, at least 0.01.
    """

    def __init__(self, settings: KPASettings, target: float | None = None) -> None:
        self._own = settings
        self._target = max(0.01, settings.target * settings.utilization) if target is None else target
        kind = WeightedWindow if settings.weighted else Window
        self._stable, self._panic = kind(settings.window_s), kind(settings.panic_window_s)
        self._panic_since: float | None = None
        self._panic_pods = 0
        self._delay = Highest(settings.scale_down_delay_s) if settings.scale_down_delay_s > 0 else None

    @property
    def panicking(self) -> bool:
        """Whether it is in panic mode, in which it never scales down."""
        return self._panic_since is not None

    def record(self, now: float, load: float) -> None:
        """The load of all pods together in the last second."""
        self._stable.record(now, load)
        self._panic.record(now, load)

    def decide(self, now: float, ready: int) -> ScaleDecision:
        """Decide on a number of pods while `ready` are ready."""
        if self._stable.empty(now):
            return ScaleDecision(0, 0, False)
        own = self._own
        stable, panic = self._stable.average(now), self._panic.average(now)
        pods = max(1.0, float(ready))
        most, least = math.ceil(own.max_scale_up_rate * pods), math.floor(pods / own.max_scale_down_rate)
        wanted, wanted_in_panic = math.ceil(stable / self._target), math.ceil(panic / self._target)
        by_stable = int(min(max(wanted, least), most))
        by_panic = int(min(max(wanted_in_panic, least), most))
        if own.activation_scale > 1:
            if wanted > 0:
                by_stable = max(by_stable, own.activation_scale)
            if wanted_in_panic > 0:
                by_panic = max(by_panic, own.activation_scale)
        over = wanted_in_panic / pods >= own.panic_threshold_percentage / 100
        if over:
            self._panic_since = now
        elif self._panic_since is not None and self._panic_since + own.window_s < now:
            self._panic_since = None
            self._panic_pods = 0
        desired = by_stable
        if self._panic_since is not None:
            self._panic_pods = desired = max(by_stable, by_panic, self._panic_pods)
        if self._delay is not None:
            desired = self._delay.record(now, desired)
        excess = -1
        if own.target_burst_capacity == 0:
            excess = 0
        elif own.target_burst_capacity > 0:
            excess = math.floor(ready * own.target - own.target_burst_capacity - panic)
        return ScaleDecision(desired, excess, True)


class Reconciler:
    """Bounds and scale to zero: from a decision to the number of pods that the deployment gets.

    The revision is active from the first ready pod on. At a decision of zero it stays one window active, then inactive;
    then the activator takes its requests for the grace period, or the pod is retained longer than that.
    """

    def __init__(self, settings: KPASettings) -> None:
        self._own = settings
        self._active_since: float | None = None
        self._inactive_since: float | None = None

    def scale(self, now: float, desired: int, ready: int, current: int) -> int:
        """The number of pods to have.

        Args:
            now: the time.
            desired: the decision.
            ready: pods that are ready.
            current: pods that the deployment was given last.
        """
        own = self._own
        bounded = max(own.min_scale, desired)
        if own.max_scale:
            bounded = min(bounded, own.max_scale)
        if bounded > 0:
            self._inactive_since = None
        if self._inactive_since is None and self._active_since is None and ready >= max(1, own.min_scale):
            self._active_since = now  # ready pods make it active, with or without traffic
        if bounded > 0:
            return bounded
        if self._inactive_since is None:
            if self._active_since is None:
                return current  # still starting: there is nothing to take away yet
            idle_from = self._active_since + own.window_s
            if now < idle_from:
                return 1
            self._inactive_since = now
        kept = max(own.scale_to_zero_grace_s, own.scale_to_zero_retention_s)
        if now - self._inactive_since < kept:
            return max(current, 1) if current else 0
        self._active_since = None
        return 0
