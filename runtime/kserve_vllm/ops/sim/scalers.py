"""Autoscalers: each looks at the fleet at its own rhythm and says how many replicas there should be.

Sources: `kpa` for Knative; Kubernetes 1.34 `pkg/controller/podautoscaler` (HPA: tolerance, stabilization, policies,
pods that are not ready); KEDA 2.17 (ScaledObject: polling, activation and cooldown, an HPA on an external metric).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from kserve_vllm.core.errors import ConfigError
from kserve_vllm.ops.sim import kpa


@dataclass(frozen=True)
class Sight:
    """What an autoscaler can see.

    Attributes:
        now: seconds.
        replicas: pods that were asked for.
        ready: pods that take requests.
        concurrency: requests inside, those that wait for a pod too, averaged over the last second.
        arrived: requests that came in the last second.
        running, waiting: requests in engines' batches, and in queues of pods and engines.
        kv_usage: mean share of the cache that is in use.
        busy: mean share of the last second that engines computed.
        first_token_p99: seconds, over the last minute; 0 without requests.
        held: requests that wait for a first pod.
    """

    now: float
    replicas: int
    ready: int
    concurrency: float
    arrived: int
    running: int
    waiting: int
    kv_usage: float
    busy: float
    first_token_p99: float
    held: int


class Scaler(Protocol):
    """An autoscaler."""

    # Whether a load balancer of Knative's (activator) stands in front: it holds requests while there is no pod.
    activator: bool

    def look(self, sight: Sight) -> int:
        """Called once a second: the number of replicas to have."""


class Fixed:
    """Always the same number."""

    activator = False

    def __init__(self, replicas: int) -> None:
        self._replicas = replicas

    def look(self, sight: Sight) -> int:
        """The number."""
        return self._replicas


class KnativeScaler:
    """Knative's KPA on concurrency or requests per second."""

    activator = True

    def __init__(self, settings: kpa.KPASettings) -> None:
        self._settings = settings
        self._decider, self._reconciler = kpa.Autoscaler(settings), kpa.Reconciler(settings)
        self._wanted = -1
        self.excess = -1 if settings.target_burst_capacity else 0

    def look(self, sight: Sight) -> int:
        """Record every second, decide every second one; a request without a pod is told at once ("poke")."""
        if self._wanted < 0:  # it finds the revision as it is
            self._wanted = max(sight.replicas, self._settings.min_scale)
        load = sight.concurrency if self._settings.metric == "concurrency" else float(sight.arrived)
        if sight.ready or sight.held or load:
            self._decider.record(sight.now, load)
        poked = sight.held > 0 and sight.replicas == 0
        if poked or math.floor(sight.now) % int(kpa.TICK_S) == 0:
            found = self._decider.decide(sight.now, sight.ready)
            desired = found.desired if found.valid else (0 if sight.replicas == 0 else self._wanted)
            if found.valid:
                self.excess = found.excess_burst_capacity
            self._wanted = self._reconciler.scale(sight.now, desired, sight.ready, sight.replicas)
        return self._wanted


METRICS = ("queue-depth", "concurrency", "running", "kv-cache", "ttft-p99", "busy")


def metric_of(sight: Sight, name: str) -> tuple[float, bool]:
    """A metric of the fleet, and whether it is a sum over pods (True) or already a mean."""
    if name == "queue-depth":
        return float(sight.waiting + sight.held), True
    if name == "concurrency":
        return sight.concurrency, True
    if name == "running":
        return float(sight.running), True
    if name == "kv-cache":
        return sight.kv_usage, False
    if name == "ttft-p99":
        return sight.first_token_p99, False
    if name == "busy":
        return sight.busy, False
    raise ConfigError(f"scaler.metric {name!r} is none of {', '.join(METRICS)}")


@dataclass
class HPA:
    """Kubernetes' horizontal pod autoscaler on a metric of the pods.

    Attributes:
        metric, target: one of METRICS, and its value per pod.
        min_replicas, max_replicas: bounds.
        sync_s: how often it decides (15 s).
        delay_s: how old the metric is: scrape, adapter, cache.
        tolerance: relative difference that is let be (0.1).
        up_window_s, down_window_s: stabilization (0 and 300).
        up_percent, up_pods, up_period_s: most that is added in a period: the larger of the two (100 %, 4 pods, 15 s).
        down_percent, down_period_s: most that is taken in a period (100 %, 15 s).
        external: the metric comes from outside the pods, as KEDA's does.
    """

    metric: str = "queue-depth"
    target: float = 4.0
    min_replicas: int = 1
    max_replicas: int = 3
    sync_s: float = 15.0
    delay_s: float = 15.0
    tolerance: float = 0.1
    up_window_s: float = 0.0
    down_window_s: float = 300.0
    up_percent: float = 100.0
    up_pods: int = 4
    up_period_s: float = 15.0
    down_percent: float = 100.0
    down_period_s: float = 15.0
    external: bool = False
    activator: bool = False
    _seen: deque[tuple[float, float, bool]] = field(default_factory=deque)
    _recommended: deque[tuple[float, int]] = field(default_factory=deque)
    _changes: deque[tuple[float, int]] = field(default_factory=deque)
    _wanted: int = 0
    _next: float = 0.0

    def look(self, sight: Sight) -> int:
        """Decide every `sync_s` seconds on what the metric was `delay_s` ago."""
        value, is_sum = metric_of(sight, self.metric)
        self._seen.append((sight.now, value, is_sum))
        while len(self._seen) > 1 and self._seen[1][0] <= sight.now - self.delay_s:
            self._seen.popleft()
        if not self._wanted:
            self._wanted = max(self.min_replicas, sight.replicas)
        if sight.now >= self._next:
            self._next = sight.now + self.sync_s
            self._wanted = self._decide(sight)
        return self._wanted

    def _decide(self, sight: Sight) -> int:
        current = sight.replicas
        if current == 0:
            return max(self.min_replicas, 0)
        _, value, is_sum = self._seen[0]
        proposed = self._proposed(value, is_sum, current, sight.ready)
        now = sight.now
        longest = max(self.up_window_s, self.down_window_s)
        while self._recommended and self._recommended[0][0] < now - longest:
            self._recommended.popleft()
        self._recommended.append((now, proposed))
        up = min(number for at, number in self._recommended if at >= now - self.up_window_s)
        down = max(number for at, number in self._recommended if at >= now - self.down_window_s)
        stabilized = min(max(current, up), down)
        bounded = self._rates(stabilized, current, now)
        bounded = min(max(bounded, self.min_replicas), self.max_replicas)
        if bounded != current:
            self._changes.append((now, bounded - current))
        return bounded

    def _proposed(self, value: float, is_sum: bool, current: int, ready: int) -> int:
        if self.external and is_sum:  # an average value over all replicas: a sum is divided by the target
            return (
                current
                if abs(value / (self.target * current) - 1) <= self.tolerance
                else math.ceil(value / self.target)
            )
        pods = max(ready, 1)
        ratio = value / pods / self.target if is_sum else value / self.target
        if ready >= current or ratio <= 1:
            return current if abs(ratio - 1) <= self.tolerance else math.ceil(ratio * pods)
        # Pods that are not ready are taken to have no load, which damps what is asked for.
        damped = ratio * pods / current
        if damped <= 1 + self.tolerance:
            return current
        return math.ceil(damped * current)

    def _rates(self, wanted: int, current: int, now: float) -> int:
        while self._changes and self._changes[0][0] < now - max(self.up_period_s, self.down_period_s):
            self._changes.popleft()
        if wanted > current:
            added = sum(n for at, n in self._changes if n > 0 and at > now - self.up_period_s)
            start = current - added
            return min(wanted, max(math.ceil(start * (1 + self.up_percent / 100)), start + self.up_pods))
        if wanted < current:
            taken = -sum(n for at, n in self._changes if n < 0 and at > now - self.down_period_s)
            start = current + taken
            return max(wanted, math.floor(start * (1 - self.down_percent / 100)))
        return wanted


@dataclass
class KEDA:
    """A ScaledObject with a Prometheus query: KEDA starts the first replica and stops the last one, an HPA does
    the rest.

    Attributes:
        hpa: the HPA that KEDA makes; its metric is an average value over all replicas.
        polling_s: how often KEDA asks while there is no replica (30 s).
        cooldown_s: how long the query must be 0 before the last replica goes (300 s).
        min_replicas: 0 lets it go to zero.
    """

    hpa: HPA
    polling_s: float = 30.0
    cooldown_s: float = 300.0
    min_replicas: int = 1
    activator: bool = False
    _active: float = 0.0
    _next: float = 0.0
    _zero: bool = False

    def look(self, sight: Sight) -> int:
        """From zero and to zero by KEDA, in between by the HPA."""
        value, _ = metric_of(sight, self.hpa.metric)
        if sight.now >= self._next:
            self._next = sight.now + self.polling_s
            if value > 0 or sight.held:
                self._active, self._zero = sight.now, False
            elif self.min_replicas == 0 and sight.now - self._active >= self.cooldown_s:
                self._zero = True
        if self._zero:
            return 0
        return max(1, self.hpa.look(sight))


@dataclass
class Rules:
    """A rule-based scaler: more when the queue or the first token is over a bound, fewer when engines are idle.

    Attributes:
        up_waiting: requests that wait per replica, above which `up_step` replicas are added.
        up_first_token_s: 99th percentile of the first token above which they are added too; 0 for none.
        down_busy: share of the time that engines compute, below which one replica goes, while nothing waits.
        up_step: replicas that are added at once.
        hold_s: how long a condition must hold.
        cooldown_s: time after a change in which nothing is changed.
        min_replicas, max_replicas: bounds.
    """

    up_waiting: float = 2.0
    up_first_token_s: float = 0.0
    down_busy: float = 0.3
    up_step: int = 1
    hold_s: float = 30.0
    cooldown_s: float = 60.0
    min_replicas: int = 1
    max_replicas: int = 3
    activator: bool = False
    _over: float | None = None
    _under: float | None = None
    _changed: float = -1e9

    def look(self, sight: Sight) -> int:
        """Apply the rules once a second."""
        waiting = sight.waiting + sight.held
        slow = self.up_first_token_s and sight.first_token_p99 > self.up_first_token_s
        over = bool(waiting > self.up_waiting * max(sight.ready, 1) or slow)
        under = not over and not waiting and sight.busy < self.down_busy
        self._over = (self._over if self._over is not None else sight.now) if over else None
        self._under = (self._under if self._under is not None else sight.now) if under else None
        wanted = min(max(sight.replicas, self.min_replicas), self.max_replicas)
        if sight.now - self._changed < self.cooldown_s:
            return wanted
        changed = wanted
        if self._over is not None and sight.now - self._over >= self.hold_s:
            changed = min(wanted + self.up_step, self.max_replicas)
        elif self._under is not None and sight.now - self._under >= self.hold_s:
            changed = max(wanted - 1, self.min_replicas)
        if changed != wanted:
            self._changed, self._over, self._under = sight.now, None, None
        return changed


# Names in a scenario, per class, and the field or parameter that each sets. They are the chart's where it has them.
_KNATIVE = {
    "metric": "metric",
    "target": "target",
    "min": "min_scale",
    "max": "max_scale",
    "window": "window_s",
    "panic_window_percentage": "panic_window_percentage",
    "panic_threshold_percentage": "panic_threshold_percentage",
    "target_burst_capacity": "target_burst_capacity",
    "scale_down_delay": "scale_down_delay_s",
    "max_scale_up_rate": "max_scale_up_rate",
    "max_scale_down_rate": "max_scale_down_rate",
    "activation_scale": "activation_scale",
    "scale_to_zero_grace": "scale_to_zero_grace_s",
    "scale_to_zero_retention": "scale_to_zero_retention_s",
    "weighted": "weighted",
}
_HPA = {
    "metric": "metric",
    "target": "target",
    "min": "min_replicas",
    "max": "max_replicas",
    "sync": "sync_s",
    "metric_delay": "delay_s",
    "tolerance": "tolerance",
    "scale_up_window": "up_window_s",
    "scale_down_window": "down_window_s",
    "up_percent": "up_percent",
    "up_pods": "up_pods",
    "up_period": "up_period_s",
    "down_percent": "down_percent",
    "down_period": "down_period_s",
}
_RULES = {
    "up_waiting": "up_waiting",
    "up_first_token": "up_first_token_s",
    "down_busy": "down_busy",
    "up_step": "up_step",
    "hold": "hold_s",
    "cooldown": "cooldown_s",
    "min": "min_replicas",
    "max": "max_replicas",
}


def scaler(values: Mapping[str, Any]) -> Scaler:
    """Make a scaler from the part `scaler` of a scenario.

    Raises:
        ConfigError: an unknown class or field, or a value that can't be used.
    """
    own = {name: value for name, value in values.items() if value is not None}
    kind = str(own.pop("class", "knative"))
    if kind == "fixed":
        replicas = own.pop("replicas", 1)
        _nothing_left(own, "fixed", {"replicas": ""})
        return Fixed(int(_checked({"replicas": replicas})["replicas"]))
    if kind == "knative":
        if "target_utilization_percentage" in own:
            percent = _checked({"target_utilization_percentage": own.pop("target_utilization_percentage")})
            own["utilization"] = percent["target_utilization_percentage"] / 100
        fields = {**_KNATIVE, "utilization": "utilization"}
        _nothing_left(own, kind, {**_KNATIVE, "target_utilization_percentage": "", "utilization": ""})
        own = _checked(own)
        settings = kpa.KPASettings(**{fields[name]: value for name, value in own.items()})
        if settings.metric not in ("concurrency", "rps"):
            raise ConfigError(f"scaler.metric {settings.metric!r}: Knative knows concurrency and rps")
        if not 6 <= settings.window_s <= 3600:
            raise ConfigError("scaler.window: Knative takes 6 to 3600 seconds")
        if settings.target <= 0 or settings.max_scale_down_rate <= 1 or settings.max_scale_up_rate <= 1:
            raise ConfigError("scaler: target must be above 0, rates above 1")
        if settings.max_scale and settings.max_scale < settings.min_scale:
            raise ConfigError("scaler.max is below scaler.min")
        return KnativeScaler(settings)
    if kind in ("hpa", "keda"):
        extra = {"polling": "", "cooldown": ""} if kind == "keda" else {}
        _nothing_left(own, kind, {**_HPA, **extra})
        own = _checked(own)
        polling, cooldown = float(own.pop("polling", 30.0)), float(own.pop("cooldown", 300.0))
        lowest = int(own.get("min", 1))
        if kind == "hpa" and lowest < 1:
            raise ConfigError("scaler.min: an HPA does not go to zero")
        own["min"] = max(1, lowest)
        hpa = HPA(**{_HPA[name]: value for name, value in own.items()}, external=kind == "keda")
        metric_of(Sight(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0), hpa.metric)
        if hpa.target <= 0 or hpa.max_replicas < hpa.min_replicas:
            raise ConfigError("scaler: target must be above 0, max at least min")
        return hpa if kind == "hpa" else KEDA(hpa, polling, cooldown, lowest)
    if kind == "rules":
        _nothing_left(own, kind, _RULES)
        own = _checked(own)
        rules = Rules(**{_RULES[name]: value for name, value in own.items()})
        if rules.max_replicas < rules.min_replicas:
            raise ConfigError("scaler.max is below scaler.min")
        return rules
    raise ConfigError(f"scaler.class {kind!r} is none of knative, hpa, keda, rules, fixed")


MOST_REPLICAS = 10_000  # of a fleet; a scenario that asks for more holds a slip of the pen
# Bounds of the fields that are not simply at least 0, lowest and highest. Knative's are those of its webhook
# (pkg/autoscaler/config/config.go): validate.
_BOUNDS: Mapping[str, tuple[float, float]] = {
    "target_utilization_percentage": (1, 100),
    "utilization": (0.01, 1),
    "panic_window_percentage": (1, 100),
    "panic_threshold_percentage": (110, 1000),
    "target_burst_capacity": (-1, 1e9),
    "scale_down_delay": (0, 3600),
    "scale_to_zero_retention": (0, 3600),
    "activation_scale": (0, MOST_REPLICAS),
    "min": (0, MOST_REPLICAS),
    "max": (0, MOST_REPLICAS),
    "replicas": (0, MOST_REPLICAS),
    "up_step": (1, MOST_REPLICAS),
    "up_pods": (0, MOST_REPLICAS),
    "down_busy": (0, 1),
    "sync": (0.1, 86400),
    "polling": (1, 86400),
}
_WHOLE = ("activation_scale", "min", "max", "replicas", "up_step", "up_pods")


def number_of(value: object) -> float | None:
    """A finite number of a scenario, or None; YAML reads 1e6 as a text, so a text that is a number is one."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        found = float(value)
    except (OverflowError, ValueError):
        return None
    return found if math.isfinite(found) else None


def _checked(own: Mapping[str, object]) -> dict[str, Any]:
    """The fields of a scaler as numbers within their bounds. Raises ConfigError with the field's name."""
    found: dict[str, Any] = {}
    for name, value in own.items():
        if name == "metric":
            found[name] = str(value)
        elif name == "weighted":
            if not isinstance(value, bool):
                raise ConfigError(f"scaler.weighted: {value!r} is neither true nor false")
            found[name] = value
        else:
            lowest, highest = _BOUNDS.get(name, (0.0, 1e9))
            number = number_of(value)
            if number is None or not lowest <= number <= highest:
                raise ConfigError(f"scaler.{name}: {value!r} is not a number of {lowest:g} to {highest:g}")
            if name in _WHOLE and number != int(number):
                raise ConfigError(f"scaler.{name}: {value!r} is not a whole number")
            found[name] = int(number) if name in _WHOLE else number
    return found


def _nothing_left(own: Mapping[str, Any], kind: str, known: Mapping[str, str]) -> None:
    unknown = [name for name in own if name not in known]
    if unknown:
        raise ConfigError(f"scaler.{unknown[0]}: {kind} knows {', '.join(name for name in known)}")
