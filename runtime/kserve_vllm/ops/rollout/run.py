"""The rollout itself: from step to step, each kept before the next, so that it can be killed anywhere and go on."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from kserve_vllm.ops.cluster import ApiError
from kserve_vllm.ops.rollout.judge import Check, Thresholds, Verdict, judge
from kserve_vllm.ops.rollout.modes import CanaryFailed, Driver
from kserve_vllm.ops.rollout.prometheus import Prometheus, PrometheusError, Sample
from kserve_vllm.ops.rollout.state import RolloutState, StateStore

PROMOTED, ROLLED_BACK, STOPPED, PAUSED = 0, 1, 3, 4
NOT_RESTORED = "not restored"
"""In the history: the traffic is back, and the spec may still name the canary."""
_BACK = "traffic is back"
_BEFORE_S = 600.0
T = TypeVar("T")


class Stop(Exception):
    """Somebody asked this process to end; the rollout stays where it is."""


@dataclass(frozen=True)
class Options:
    """How a rollout goes. Words as Flagger and Argo Rollouts have them.

    Attributes:
        interval_s: between two looks at a step.
        initial_delay_s: how long a step's first traffic is not judged: caches are cold.
        count: how many looks a step may have before it is inconclusive for good.
        threshold: how many failed looks of a step roll the canary back.
        progress_deadline_s: how long the canary may take to get ready, and a split to be in force.
        on_inconclusive: what follows where a step ends without a verdict.
        thresholds: what may be worse.
        poll_s: between two questions to the cluster.
        patience_s: how long an API server that does not answer is asked again.
    """

    interval_s: float = 60.0
    initial_delay_s: float = 30.0
    count: int = 5
    threshold: int = 1
    progress_deadline_s: float = 3600.0
    on_inconclusive: Literal["rollback", "pause", "promote"] = "rollback"
    thresholds: Thresholds = field(default_factory=Thresholds)
    poll_s: float = 3.0
    patience_s: float = 300.0


class _Late(CanaryFailed):
    """Something was not so by its deadline, and may be later."""


class Rollout:
    """One rollout of one service.

    Args:
        driver: of the service's mode.
        store: where the state is kept.
        prometheus: what is judged by.
        namespace, name: of the InferenceService.
        options: how it goes.
        answers: compares answers once the canary is ready; none where that was not asked for.
        say: a line for people.
        clock, sleep: of the wall.
    """

    def __init__(
        self,
        driver: Driver,
        store: StateStore,
        prometheus: Prometheus,
        namespace: str,
        name: str,
        options: Options,
        answers: Callable[[RolloutState], list[Check]] | None = None,
        say: Callable[[str], None] = print,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._driver, self._store, self._prometheus = driver, store, prometheus
        self._namespace, self._name, self._options = namespace, name, options
        self._answers, self._say, self._clock, self._sleep = answers, say, clock, sleep

    def run(self, state: RolloutState) -> int:
        """Go on from where `state` is until it is over. Returns the exit code.

        Raises:
            Superseded: another process goes on.
            Unreadable: the cluster refused something, or did not answer for too long.
        """
        self._keep(state)
        try:
            if state.phase == "Paused":
                state.phase, state.looks = "Progressing" if state.canary else "Initializing", 0
            if state.phase == "Initializing":
                self._initialize(state)
            while state.phase == "Progressing":
                self._step(state)
            if state.phase == "Promoting":
                self._promote(state)
        except CanaryFailed as error:
            self._begin_rollback(state, str(error))
        except Stop:
            self._say(
                f"stopped at {state.weight} %, step {state.step + 1} of {len(state.steps)}; the canary keeps its "
                "traffic. Run the same command again to go on, or with --abort to roll back."
            )
            return STOPPED
        if state.phase == "RollingBack":
            self._roll_back(state)
        return {"Succeeded": PROMOTED, "Failed": ROLLED_BACK, "Paused": PAUSED}.get(state.phase, STOPPED)

    def abort(self, state: RolloutState) -> int:
        """Roll back now."""
        self._begin_rollback(state, "aborted by hand")
        self._roll_back(state)
        return ROLLED_BACK if state.phase == "Failed" else STOPPED

    def _initialize(self, state: RolloutState) -> None:
        self._say(f"{state.words}: making the canary beside {state.stable}, without traffic")
        self._ask(lambda: self._driver.start(state))
        self._until(lambda: self._is_ready(state), "the canary is not ready")
        self._say(f"canary {state.canary} is ready")
        if not state.baseline:
            # What stable did before: for a rollout whose only step leaves it no traffic.
            now = self._clock()
            try:
                state.baseline = self._sample(state.stable, now - _BEFORE_S, now).to_json()
            except PrometheusError as error:
                self._say(f"Prometheus: {error}")
        state.note("ready", self._clock(), canary=state.canary)
        if self._answers is not None:
            checks = self._answers(state)
            for check in checks:
                self._say(f"  {check.metric}: {check.phase}. {check.words}")
            state.note("answers", self._clock(), checks=[check.to_json() for check in checks])
            if any(check.phase != "Successful" for check in checks):
                worst = next(check for check in checks if check.phase != "Successful")
                raise CanaryFailed(f"the answers differ too much: {worst.metric}: {worst.words}")
        state.phase = "Progressing"
        self._keep(state)

    def _is_ready(self, state: RolloutState) -> bool:
        state.canary = self._driver.ready(state)
        return bool(state.canary)

    def _step(self, state: RolloutState) -> None:
        """One weight: shift, wait, look until there is a verdict."""
        weight, options = state.weight, self._options
        if why := self._ask(lambda: self._driver.disturbed(state)):
            self._pause(state, why)
            return
        if not state.since:
            self._say(f"step {state.step + 1} of {len(state.steps)}: {weight} %")
            self._until(lambda: self._driver.shift(state, weight), f"the traffic is not split at {weight} %")
            state.since, state.looks, state.failed_checks = self._clock(), 0, 0
            state.note("shifted", self._clock())
            self._keep(state)
        begin = state.since + options.initial_delay_s
        while True:
            self._wait_until(begin + (state.looks + 1) * options.interval_s)
            if why := self._ask(lambda: self._driver.disturbed(state)):
                self._pause(state, why)
                return
            verdict = self._look(state, begin)
            state.looks += 1
            state.failed_checks += verdict.phase == "Failed"
            self._say(f"look {state.looks} of {options.count} at {weight} %: {verdict.phase}")
            for line in verdict.words.splitlines():
                self._say(f"  {line}")
            state.note(
                "look",
                self._clock(),
                phase=verdict.phase,
                checks=[check.to_json() for check in verdict.checks],
            )
            if state.failed_checks >= options.threshold:
                worst = next((c for c in verdict.checks if c.phase == "Failed"), verdict.checks[0])
                raise CanaryFailed(f"{worst.metric}: {worst.words}")
            if verdict.phase == "Successful":
                self._advance(state)
                return
            if state.looks >= options.count:
                self._inconclusive(state, verdict)
                return
            self._keep(state)

    def _inconclusive(self, state: RolloutState, verdict: Verdict) -> None:
        worst = next(c for c in verdict.checks if c.phase == verdict.phase)
        why = f"no verdict after {state.looks} looks at {state.weight} %: {worst.metric}: {worst.words}"
        if self._options.on_inconclusive == "rollback":
            raise CanaryFailed(why)
        if self._options.on_inconclusive == "pause":
            self._pause(state, why)
            return
        self._say(f"{why}; going on, as asked")
        self._advance(state)

    def _pause(self, state: RolloutState, why: str) -> None:
        state.phase, state.reason = "Paused", why
        state.note("paused", self._clock(), reason=why)
        self._keep(state)
        self._say(f"paused at {state.weight} %: {why}")

    def _advance(self, state: RolloutState) -> None:
        if state.step + 1 < len(state.steps):
            state.step += 1
            state.since, state.looks, state.failed_checks = 0.0, 0, 0
        else:
            state.phase = "Promoting"
        self._keep(state)

    def _promote(self, state: RolloutState) -> None:
        self._say(f"promoting {state.canary}")
        try:
            self._until(lambda: self._driver.promote(state), "the promotion is not through")
        except CanaryFailed as error:
            # The canary has passed and has the traffic: going back would be worse than staying.
            self._pause(state, f"{error}; the canary keeps its traffic")
            return
        state.phase = "Succeeded"
        state.note("promoted", self._clock())
        self._keep(state)
        self._say(f"promoted: {state.words}")

    def _begin_rollback(self, state: RolloutState, why: str) -> None:
        state.phase, state.reason = "RollingBack", why
        state.note("rolling back", self._clock(), reason=why)
        self._keep(state)
        self._say(f"rolling back: {why}")

    def _roll_back(self, state: RolloutState) -> None:
        if not (state.history and state.history[-1]["event"] == _BACK):
            try:
                self._until(lambda: self._driver.take_back(state), "the traffic is not back")
            except CanaryFailed as error:
                state.note("not rolled back", self._clock(), reason=str(error))
                self._keep(state)
                self._say(f"NOT rolled back: {error}. Run the command again.")
                return
            state.note(_BACK, self._clock())
            self._keep(state)
        self._say(f"rolled back: all traffic is at {state.stable}")
        late = ""
        try:
            self._until(lambda: self._driver.restore(state), "the old version's new revision is not ready")
        except _Late as error:
            late = str(error)
        except CanaryFailed as error:
            state.note(NOT_RESTORED, self._clock(), reason=str(error))
            self._say(f"the service keeps its canary, without traffic: {error}")
        if said := self._ask(lambda: self._driver.clear(state)):
            self._say(said)
        if late:
            self._say(f"the service does not yet say what it said before: {late}. Run the command again to go on.")
            return
        state.phase = "Failed"
        state.note("rolled back", self._clock())
        self._keep(state)

    def _look(self, state: RolloutState, begin: float) -> Verdict:
        now = self._clock()
        try:
            canary = self._sample(state.canary, begin, now)
            if state.weight < 100:
                stable = self._sample(state.stable, begin, now)
                state.baseline = stable.to_json()
            else:
                stable = Sample(**state.baseline) if state.baseline else Sample()
        except PrometheusError as error:
            return Verdict("Error", (Check("prometheus", "Error", 0, 0, str(error)),))
        return judge(canary, stable, self._options.thresholds)

    def _sample(self, revision: str, since: float, until: float) -> Sample:
        return self._prometheus.sample(self._namespace, self._name, revision, since, until)

    def _keep(self, state: RolloutState) -> None:
        self._ask(lambda: self._store.save(state, self._driver.isvc()))

    def _until(self, done: Callable[[], bool], otherwise: str) -> None:
        """Ask until it is so.

        Raises:
            _Late: it is not so by the deadline.
        """
        deadline = self._clock() + self._options.progress_deadline_s
        while not self._ask(done):
            if self._clock() >= deadline:
                raise _Late(f"{otherwise} after {self._options.progress_deadline_s:g} s")
            self._sleep(self._options.poll_s)

    def _wait_until(self, moment: float) -> None:
        while (left := moment - self._clock()) > 0:
            self._sleep(min(left, self._options.poll_s))

    def _ask(self, question: Callable[[], T]) -> T:
        """Ask the cluster, again where it is away for a while: an API server that restarts ends no rollout."""
        deadline = self._clock() + self._options.patience_s
        while True:
            try:
                return question()
            except ApiError as error:
                passing = error.status in (0, 409, 429) or error.status >= 500
                if not passing or self._clock() >= deadline:
                    raise
                self._say(f"the cluster: {error}; asking again")
                self._sleep(self._options.poll_s)
