"""Replicas with continuous batching under an autoscaler, as discrete events.

A replica's engine runs in steps, as vLLM's scheduler does: every running sequence gets a token, and the rest of the
step's tokens goes to prompts, first come first served within their class (chunked prefill). Steps without a prompt in
them are all alike until a sequence ends, one arrives or the cache is full, so they are taken in one leap; that is what
makes a hundred replicas quick. A full cache sends the newest sequence back to the queue (recomputation), as vLLM's
does.
"""

from __future__ import annotations

import gc
import heapq
import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kserve_vllm.ops.model.steptime import StepTime
from kserve_vllm.ops.model.traffic import Arrival
from kserve_vllm.ops.sim.scalers import KnativeScaler, Scaler, Sight


@dataclass(frozen=True)
class ReplicaSettings:
    """One replica.

    Attributes:
        max_num_seqs, max_num_batched_tokens: the engine's flags.
        kv_tokens: tokens of its cache.
        max_concurrent: requests that the runtime lets into the engine, 0 for no bound (`--max-concurrent`).
        queue: requests that may wait in front of it (`--queue-size`); more are refused with 429.
        queue_timeout_s: how long they may wait, 0 for no bound; then 503.
        container_concurrency: Knative's hard bound per pod, 0 for none.
        overhead_s: what proxies and front end add to a first token.
        gpus: GPUs of a replica.
    """

    max_num_seqs: int = 128
    max_num_batched_tokens: int = 8192
    kv_tokens: int = 500_000
    max_concurrent: int = 0
    queue: int = 1000
    queue_timeout_s: float = 0.0
    container_concurrency: int = 0
    overhead_s: float = 0.0
    gpus: int = 1


@dataclass(frozen=True)
class ColdStart:
    """Seconds of each phase, from the wish for a replica to its first request.

    `node_s` counts where no free node is left of `free_nodes`; `None` for as many as are wanted.
    """

    node_s: float = 0.0
    image_s: float = 20.0
    download_s: float = 60.0
    load_s: float = 30.0
    compile_s: float = 40.0
    ready_s: float = 5.0
    free_nodes: int | None = None

    def phases(self, free: bool) -> tuple[tuple[str, float], ...]:
        """Name and seconds of each phase."""
        parts = (
            ("image", self.image_s),
            ("download", self.download_s),
            ("load", self.load_s),
            ("compile", self.compile_s),
            ("ready", self.ready_s),
        )
        return parts if free else (("node", self.node_s), *parts)


@dataclass(slots=True)
class Job:
    """A request inside the fleet."""

    request: Arrival
    left: int  # tokens of the prompt (and, after a preemption, of the answer so far) still to compute
    tokens: int  # tokens in the cache
    output_left: int
    first_at: float = -1.0
    ends_step: int = 0
    running: bool = False
    gone: bool = False
    number: int = 0
    replica: _Replica | None = None


@dataclass(slots=True)
class ServedOutcome:
    """What became of a request: `ok`, `refused` (429), `queue-timeout` (503), `client-timeout`, `cut`, `unfinished`."""

    at: float
    result: str
    first_token_s: float
    gap_s: float
    total_s: float
    prompt: int
    output: int


@dataclass
class Result:
    """What a run gave.

    Attributes:
        outcomes: one per request.
        timeline: (seconds, replicas that were asked for, replicas that were ready, requests inside, waiting).
        replica_hours, gpu_hours: from the pod's start to its end, cold starts included.
        cold_starts: how many there were.
        duration_s: of the traffic.
        events: events that were handled.
    """

    outcomes: list[ServedOutcome] = field(default_factory=list)
    timeline: list[tuple[float, int, int, int, int]] = field(default_factory=list)
    replica_hours: float = 0.0
    gpu_hours: float = 0.0
    cold_starts: int = 0
    preemptions: int = 0
    duration_s: float = 0.0
    events: int = 0


class _Replica:
    """One pod: queue of the runtime, engine, cache."""

    __slots__ = (
        "busy_s",
        "computing",
        "decode",
        "draining",
        "ends",
        "fleet",
        "inside",
        "kv",
        "leap_at",
        "leap_dt",
        "leap_left",
        "number",
        "parts",
        "prefill",
        "ready",
        "running",
        "settings",
        "started",
        "step_count",
        "stopped",
        "version",
        "waiting",
    )

    def __init__(self, fleet: Fleet, number: int, now: float) -> None:
        self.fleet, self.number, self.started = fleet, number, now
        self.settings = fleet.settings
        self.ready = self.draining = self.stopped = False
        self.waiting: list[tuple[int, int, Job]] = []  # (class, number, sequence): queue of the runtime
        self.prefill: list[tuple[int, int, Job]] = []  # in the engine, prompt not computed yet
        self.ends: list[tuple[int, int, Job]] = []  # running, by the step in which they end
        self.running = 0
        self.inside = 0  # requests that the pod has
        self.kv = 0
        self.decode = 0
        self.step_count = 0
        self.version = 0
        self.computing = False
        self.leap_at, self.leap_dt, self.leap_left = 0.0, 0.0, 0
        self.busy_s = 0.0
        self.parts: list[Job] = []

    def put(self, sequence: Job, now: float) -> bool:
        """Take a request; False when the queue is full."""
        own, request = self.settings, sequence.request
        if request.prompt - request.cached + request.output > own.kv_tokens:
            return False
        sequence.replica = self
        entry = (request.priority, sequence.number, sequence)
        if own.max_concurrent and self.inside - len(self.waiting) >= own.max_concurrent:
            if len(self.waiting) >= own.queue:
                return False
            heapq.heappush(self.waiting, entry)
            if own.queue_timeout_s:
                self.fleet.after(own.queue_timeout_s, lambda: self._give_up(sequence))
        else:
            heapq.heappush(self.prefill, entry)
        self.inside += 1
        self._interrupt(now)
        return True

    def _give_up(self, sequence: Job) -> None:
        if any(entry[2] is sequence for entry in self.waiting):
            self.waiting = [entry for entry in self.waiting if entry[2] is not sequence]
            heapq.heapify(self.waiting)
            self.inside -= 1
            self.fleet.finish(sequence, "queue-timeout")

    def abort(self, sequence: Job) -> None:
        """The client has gone: the engine drops the sequence before its next step."""
        self.inside -= 1
        if sequence.running:
            self.ends = [entry for entry in self.ends if entry[2] is not sequence]
            heapq.heapify(self.ends)
            self.running -= 1
            request = sequence.request
            produced = request.output - max(0, sequence.ends_step - self.step_count)
            self.kv = max(0, self.kv - (request.prompt - request.cached + produced - 1))
            sequence.running = False
        elif any(entry[2] is sequence for entry in self.waiting):
            self.waiting = [entry for entry in self.waiting if entry[2] is not sequence]
            heapq.heapify(self.waiting)
            return
        if self.waiting:
            heapq.heappush(self.prefill, heapq.heappop(self.waiting))

    def _interrupt(self, now: float) -> None:
        """A request came: begin a step, or end the leap with the step that runs now."""
        if not self.computing:
            self._step(now)
        elif self.leap_left > 1 and self.running < self.settings.max_num_seqs:
            done = min(self.leap_left, max(1, math.ceil((now - self.leap_at) / self.leap_dt - 1e-9)))
            self.leap_left = done
            self.version += 1
            self.fleet.call(self.leap_at + done * self.leap_dt, self._end_leap, self.version)

    def _step(self, now: float) -> None:
        """Begin a step with prompts in it, or a leap of steps without."""
        own, step = self.settings, self.fleet.step_of
        if not self.running and not self.prefill:
            self.computing = False
            if self.draining and not self.inside:
                self.fleet.gone(self, now)
            return
        self.computing = True
        budget = own.max_num_batched_tokens - self.running
        parts: list[Job] = []
        tokens, pairs = 0, 0.0
        room = own.kv_tokens - self.kv - self.running
        while self.prefill and budget > 0 and self.running + len(parts) < own.max_num_seqs:
            head = self.prefill[0][2]
            if head.gone:
                heapq.heappop(self.prefill)
                self.kv = max(0, self.kv - max(0, head.tokens - head.request.cached))
                continue
            if head.tokens == 0 and head.left > room and (self.running or parts):
                break
            piece = min(head.left, budget)
            if head.tokens == 0:
                head.tokens = head.request.cached
            pairs += piece * (head.tokens + piece / 2)
            head.left -= piece
            head.tokens += piece
            self.kv += piece
            room -= piece
            budget -= piece
            tokens += piece
            if head.left:
                break
            heapq.heappop(self.prefill)
            parts.append(head)
        context = self.kv / max(self.running + len(parts), 1)
        if tokens:
            seconds = step(self.running, context, tokens, pairs / tokens)
            self.leap_at, self.leap_dt, self.leap_left = now, seconds, 1
            self.version += 1
            self.parts = parts
            self.fleet.call(now + seconds, self._end_mixed, self.version)
            return
        if not self.running:  # whoever waited has gone
            self._step(now)
            return
        leap = max(1, self.ends[0][0] - self.step_count)
        free = own.kv_tokens - self.kv
        if free < self.running:
            self._preempt()
            self._step(now)
            return
        leap = min(leap, max(1, free // self.running), 256)
        seconds = step(self.running, context + leap / 2, 0, 0.0)
        self.leap_at, self.leap_dt, self.leap_left = now, seconds, leap
        self.version += 1
        self.fleet.call(now + leap * seconds, self._end_leap, self.version)

    def _preempt(self) -> None:
        """The newest sequence goes back to the queue; what it had is computed again."""
        self.fleet.result.preemptions += 1
        for _, _, half in self.prefill:
            if half.tokens > half.request.cached and not half.gone:  # half a prompt is the newest of all
                computed = half.tokens - half.request.cached
                self.kv, half.left, half.tokens = max(0, self.kv - computed), half.left + computed, 0
                return
        _, _, victim = max((entry for entry in self.ends if entry[2].running), key=lambda entry: entry[2].number)
        self.ends = [entry for entry in self.ends if entry[2] is not victim]
        heapq.heapify(self.ends)
        produced = victim.request.output - (victim.ends_step - self.step_count)
        victim.running = False
        victim.output_left = max(1, victim.ends_step - self.step_count)
        self.running -= 1
        grown = victim.request.prompt - victim.request.cached + produced
        self.kv = max(0, self.kv - grown + 1)
        victim.left, victim.tokens = grown, 0
        heapq.heappush(self.prefill, (victim.request.priority, victim.number, victim))

    def _advance(self, steps: int, now: float) -> None:
        self.step_count += steps
        self.kv += steps * self.running
        self.busy_s += steps * self.leap_dt
        ends = self.ends
        while ends and ends[0][0] <= self.step_count:
            sequence = heapq.heappop(ends)[2]
            self.running -= 1
            self._leave(sequence, now)

    def _leave(self, sequence: Job, now: float) -> None:
        request = sequence.request
        self.kv = max(0, self.kv - (request.prompt - request.cached) - request.output + 1)
        sequence.running = False
        self.inside -= 1
        self.fleet.finish(sequence, "ok", now)
        if self.waiting:
            heapq.heappush(self.prefill, heapq.heappop(self.waiting))

    def _end_leap(self, now: float, version: int) -> None:
        if version != self.version or self.stopped:
            return
        self._advance(self.leap_left, now)
        self._step(now)

    def _end_mixed(self, now: float, version: int) -> None:
        if version != self.version or self.stopped:
            return
        self._advance(1, now)
        for sequence in self.parts:
            if sequence.gone:
                self.kv = max(0, self.kv - (sequence.tokens - sequence.request.cached))
                continue
            if sequence.first_at < 0:
                sequence.first_at = now
            if sequence.output_left <= 1:
                self._leave(sequence, now)
                continue
            # This step gave its first token.
            sequence.ends_step = self.step_count + sequence.output_left - 1
            sequence.running = True
            self.running += 1
            heapq.heappush(self.ends, (sequence.ends_step, sequence.number, sequence))
        self._step(now)

    def stop(self, now: float) -> None:
        """End at once; what is inside is cut."""
        self.stopped = True
        for _, _, sequence in [*self.waiting, *self.prefill, *self.ends]:
            self.fleet.finish(sequence, "cut", now)
        self.inside = 0


class Fleet:
    """The simulation.

    Args:
        requests: sorted by time.
        step: step time of the engine.
        settings: one replica.
        cold: phases of a start.
        scaler: the autoscaler.
        initial: replicas that are ready at the beginning.
        routing: `random`, `round-robin` or `least` (requests inside); Knative's activator takes the better of two.
        drain_s: how long a replica that is taken away may finish its requests.
        client_timeout_s: when clients give up, counted from arrival; 0 for never.
        seed: of what is random.
        progress: called about every simulated minute with seconds done.
    """

    def __init__(
        self,
        requests: Sequence[Arrival],
        step: StepTime,
        settings: ReplicaSettings,
        cold: ColdStart,
        scaler: Scaler,
        *,
        initial: int = 1,
        routing: str = "random",
        drain_s: float = 60.0,
        client_timeout_s: float = 0.0,
        seed: int = 1,
        duration_s: float | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> None:
        self.requests, self.step, self.settings, self.cold, self.scaler = requests, step, settings, cold, scaler
        self.step_of = step.function()
        self.routing, self.drain_s, self.client_timeout_s = routing, drain_s, client_timeout_s
        self.result = Result(duration_s=duration_s or (requests[-1].at if requests else 0.0))
        self._dice = random.Random(seed)  # noqa: S311 - a simulation has to be repeatable
        self._progress = progress
        self._events: list[tuple[float, int, Callable[[float, int], None], int]] = []
        self._count = 0
        self.now = 0.0
        self.replicas: list[_Replica] = []
        self._ready: list[_Replica] = []
        self._held: deque[Job] = deque()
        self._inside = 0
        self._worked = 0.0  # when the last request was answered
        self._integral, self._since = 0.0, 0.0
        self._arrived = 0
        self._firsts: deque[tuple[float, float]] = deque()
        self._turn = 0
        self._numbers = 0
        self._wanted = initial
        for _ in range(initial):
            replica = self._start(0.0, warm=True)
            replica.ready = True
            self._ready.append(replica)

    # ---- events

    def call(self, at: float, what: Callable[[float, int], None], version: int = 0) -> None:
        """Call `what(now, version)` at a time."""
        self._count += 1
        heapq.heappush(self._events, (at, self._count, what, version))

    def after(self, seconds: float, what: Callable[[], None]) -> None:
        """Call `what()` after so many seconds."""
        self.call(self.now + seconds, lambda _now, _version: what())

    def run(self) -> Result:
        """Run until all requests are answered, or an hour after the last one came."""
        # Millions of small objects and no cycles among them: looking for cycles would take a fifth of the time.
        collecting = gc.isenabled()
        gc.disable()
        try:
            return self._run()
        finally:
            if collecting:
                gc.enable()

    def _run(self) -> Result:
        requests, number = self.requests, len(self.requests)
        index = 0
        self.call(1.0, self._tick)
        last = self.result.duration_s
        events = self._events
        handled = 0
        while True:
            arrival = requests[index].at if index < number else math.inf
            if events and events[0][0] <= arrival:
                at, _, what, version = heapq.heappop(events)
                if at > last and ((index >= number and not self._inside) or at > last + 3600):
                    break
                self.now = at
                what(at, version)
            elif index < number:
                self.now = arrival
                self._arrive(requests[index])
                index += 1
            else:
                break
            handled += 1
        end = max(last, min(self.now, last + 3600))
        if not self.result.timeline:  # shorter than a look at the fleet
            self.result.timeline.append((end, self._wanted, len(self._ready), self._inside, len(self._held)))
        for replica in [*self.replicas]:
            if replica.inside:
                for _, _, sequence in [*replica.waiting, *replica.prefill, *replica.ends]:
                    self.finish(sequence, "unfinished", end)
            self._bill(replica, end)
        for sequence in self._held:
            self.finish(sequence, "unfinished", end)
        self.result.events = handled
        return self.result

    def _tick(self, now: float, _version: int) -> None:
        """Once a second: show the fleet to the scaler and do what it wants."""
        self._integrate(now)
        concurrency, self._integral = self._integral, 0.0
        while self._firsts and self._firsts[0][0] < now - 60:
            self._firsts.popleft()
        firsts = sorted(value for _, value in self._firsts) if now % 5 < 1 else []
        if firsts:
            self._p99 = firsts[min(len(firsts) - 1, int(0.99 * len(firsts)))]
        elif not self._firsts:
            self._p99 = 0.0
        ready = self._ready
        busy = kv = 0.0
        running = waiting = 0
        for replica in ready:
            busy += min(replica.busy_s, 1.0)
            replica.busy_s = 0.0
            kv += replica.kv
            running += replica.running
            waiting += len(replica.waiting) + len(replica.prefill)
        number = max(len(ready), 1)
        sight = Sight(
            now,
            self._wanted,
            len(ready),
            concurrency,
            self._arrived,
            running,
            waiting,
            kv / number / self.settings.kv_tokens,
            busy / number,
            self._p99,
            len(self._held),
        )
        self._arrived = 0
        self._scale(self.scaler.look(sight), now)
        if math.floor(now) % 5 == 0:
            self.result.timeline.append((now, self._wanted, len(ready), self._inside, waiting + len(self._held)))
        if self._progress and math.floor(now) % 60 == 0:
            self._progress(now)
        self.call(now + 1.0, self._tick)

    _p99 = 0.0

    # ---- replicas

    def _scale(self, wanted: int, now: float) -> None:
        self._wanted = wanted
        alive = [replica for replica in self.replicas if not replica.draining]
        for _ in range(wanted - len(alive)):
            self._start(now)
        surplus = len(alive) - wanted
        if surplus > 0:
            # As a ReplicaSet does: pods that are not ready first, then the youngest.
            for replica in sorted(alive, key=lambda r: (r.ready, -r.started, -r.number))[:surplus]:
                self._take_away(replica, now)

    def _start(self, now: float, warm: bool = False) -> _Replica:
        self._numbers += 1
        replica = _Replica(self, self._numbers, now)
        self.replicas.append(replica)
        if not warm:
            self.result.cold_starts += 1
            free = self.cold.free_nodes is None or len(self.replicas) <= self.cold.free_nodes
            self.call(
                now + sum(seconds for _, seconds in self.cold.phases(free)),
                lambda at, _v: self._become_ready(replica, at),
            )
        return replica

    def _become_ready(self, replica: _Replica, now: float) -> None:
        if replica.draining or replica.stopped:
            return
        replica.ready = True
        self._ready.append(replica)
        held, self._held = self._held, deque()
        for sequence in held:
            self._route(sequence, now)

    def _take_away(self, replica: _Replica, now: float) -> None:
        replica.draining = True
        if replica in self._ready:
            self._ready.remove(replica)
        if not replica.inside:
            self.gone(replica, now)
        else:
            self.call(now + self.drain_s, lambda at, _v: self._cut(replica, at))

    def _cut(self, replica: _Replica, now: float) -> None:
        if replica in self.replicas:
            replica.stop(now)
            self.gone(replica, now)

    def gone(self, replica: _Replica, now: float) -> None:
        """A replica's pod has ended."""
        if replica in self.replicas:
            self.replicas.remove(replica)
            replica.stopped = True
            self._bill(replica, now)

    def _bill(self, replica: _Replica, now: float) -> None:
        # What is left over when the traffic ends is worked off by GPUs that are paid like any other.
        until = min(now, max(self.result.duration_s, self._worked, replica.started))
        hours = max(0.0, until - replica.started) / 3600
        self.result.replica_hours += hours
        self.result.gpu_hours += hours * self.settings.gpus

    # ---- requests

    def _integrate(self, now: float) -> None:
        self._integral += self._inside * (now - self._since)
        self._since = now

    def _arrive(self, request: Arrival) -> None:
        self._arrived += 1
        self._integrate(self.now)
        self._inside += 1
        self._numbers += 1
        sequence = Job(request, request.prompt - request.cached, 0, request.output, number=self._numbers)
        if self.client_timeout_s:
            self.after(self.client_timeout_s, lambda: self._client_left(sequence))
        self._route(sequence, self.now)

    def _client_left(self, sequence: Job) -> None:
        if not sequence.gone:
            if sequence in self._held:
                self._held.remove(sequence)
            elif sequence.replica is not None:
                sequence.replica.abort(sequence)
            self.finish(sequence, "client-timeout")

    def _route(self, sequence: Job, now: float) -> None:
        if sequence.gone:
            return
        ready = self._ready
        if not ready:
            if self.scaler.activator:
                self._held.append(sequence)
            else:  # nothing behind the service: the connection is refused
                self.finish(sequence, "refused", now)
            return
        through_activator = isinstance(self.scaler, KnativeScaler) and self.scaler.excess < 0
        hard = self.settings.container_concurrency
        if through_activator and hard:
            free = [replica for replica in ready if replica.inside < hard]
            if not free:
                self._held.append(sequence)
                return
            replica = min(free, key=lambda r: r.inside)
        elif len(ready) == 1:
            replica = ready[0]
        elif self.routing == "least":
            replica = min(ready, key=lambda r: r.inside)
        elif self.routing == "round-robin":
            self._turn += 1
            replica = ready[self._turn % len(ready)]
        elif through_activator:  # the better of two: pkg/activator/net/lb_policy.go
            one, other = self._dice.choice(ready), self._dice.choice(ready)
            replica = one if one.inside <= other.inside else other
        else:
            replica = ready[int(self._dice.random() * len(ready))]
        if not replica.put(sequence, now):
            self.finish(sequence, "refused", now)

    def finish(self, sequence: Job, result: str, now: float | None = None) -> None:
        """Note what became of a request."""
        if sequence.gone:
            return
        sequence.gone = True
        now = self.now if now is None else now
        self._integrate(max(now, self._since))
        self._inside -= 1
        self._worked = now
        request = sequence.request
        first = sequence.first_at - request.at + self.settings.overhead_s if sequence.first_at >= 0 else -1.0
        gap = 0.0
        if result == "ok":
            gap = (now - sequence.first_at) / max(request.output - 1, 1)
            self._firsts.append((now, first))
        self.result.outcomes.append(
            ServedOutcome(
                request.at,
                result,
                first,
                gap,
                now - request.at + self.settings.overhead_s,
                request.prompt,
                request.output,
            )
        )
        if self._held and self.settings.container_concurrency and self._ready:
            self._route(self._held.popleft(), now)
