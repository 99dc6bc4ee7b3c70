"""`kserve-vllm restart`: all pods of a service anew, one after the other, with no request lost."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from datetime import UTC, datetime

from kserve_vllm.core.errors import ConfigError
from kserve_vllm.ops import argument_types
from kserve_vllm.ops.cluster import ApiError, Cluster, Json
from kserve_vllm.ops.diagnose.facts import MODES, condition, dig
from kserve_vllm.ops.operations import CommandFailed, add_cluster_arguments

# What `kubectl rollout restart` writes on a Deployment. On a Deployment of KServe's it is taken back at the next
# reconcile, and the pods are replaced twice; on the predictor KServe passes it on, in both modes.
ANNOTATION = "kubectl.kubernetes.io/restartedAt"
POLL_S = 2.0
_EPILOG = """
Examples:
  kserve-vllm restart chat -n team-a           the usual way for the service (see --method)
  kserve-vllm restart chat --method evict      one pod at a time, the old one first: no free GPU is needed
  kserve-vllm restart chat --dry-run           say which way, and which pods

Ways:
  rollout  a new annotation on the predictor: KServe replaces the pods (Standard: as its Deployment's strategy says, a
           new pod first; Knative: a new revision, which gets the traffic when it is ready). Needs room for one more.
  evict    asks for the eviction of one pod after the other, which PodDisruptionBudgets may put off, and waits for its
           successor. Nothing is changed in the spec. Capacity is one pod less meanwhile. A pod that was not ready
           before is left alone.
  auto     rollout, or evict where a rollout would stop more pods than a PodDisruptionBudget allows, or where a Knative
           canary is under way (a new revision would disturb it).
Either way a pod that ends takes what is in flight to its end, for as long as its drain and grace period allow.

Rights: get and patch on inferenceservices; list on pods and poddisruptionbudgets; get on deployments; for evict, create
on pods/eviction.

Exit codes: 0 all pods that were ready are new and ready, 1 not within --timeout, 2 an argument can't be used, 3 the
cluster refuses.
"""


@dataclass
class RestartReport:
    """What happened.

    Attributes:
        method: `rollout` or `evict`.
        replaced: pods that went, with the seconds that each took to end.
        started: pods that came, with the seconds until each was ready.
        seconds: of it all.
        done: whether all pods that were ready are new and ready.
    """

    method: str
    replaced: dict[str, float] = field(default_factory=dict)
    started: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    done: bool = False


def main(arguments: Sequence[str]) -> int:
    """Run `kserve-vllm restart ...`; returns the exit code.

    Raises:
        ConfigError: an argument can't be used, or there is no such service.
        CommandFailed: the cluster refuses.
    """
    parser = argparse.ArgumentParser(
        prog="kserve-vllm restart",
        description="Start all pods of a service anew, one after the other, and say what happened.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("name", metavar="NAME", help="of the InferenceService")
    parser.add_argument("--method", choices=("auto", "rollout", "evict"), default="auto", help="default: auto")
    parser.add_argument(
        "--timeout",
        type=argument_types.positive,
        default=3600.0,
        metavar="SECONDS",
        help="for all of it (default: %(default)g)",
    )
    parser.add_argument("--dry-run", action="store_true", help="only say what would be done")
    parser.add_argument("--json", action="store_true", help="print JSON at the end")
    add_cluster_arguments(parser)
    args = parser.parse_args(list(arguments))
    cluster = Cluster(args.context, args.kubeconfig)
    namespace = args.namespace or cluster.default_namespace

    def say(line: str) -> None:
        print(line, file=sys.stderr if args.json else sys.stdout, flush=True)

    try:
        restart = Restart(cluster, namespace, args.name, say, args.timeout, POLL_S)
        method, why = restart.method(args.method)
        old = sorted(restart.pods())
        say(f"{args.name}: {len(old)} pods, by {method}{f' ({why})' if why else ''}: {', '.join(old) or 'none'}")
        report = RestartReport(method) if args.dry_run else restart.run(method)
    except ApiError as error:
        raise CommandFailed(f"the cluster refuses: {error}", 3) from None
    if args.json:
        print(json.dumps(report.__dict__, indent=2))
    return 0 if report.done or args.dry_run else 1


class Restart:
    """A restart of one service.

    Args:
        cluster: where.
        namespace, name: of the InferenceService.
        say: a line for people.
        timeout_s: for all of it.
        poll_s: between two questions.
        clock, sleep: monotonic.
    """

    def __init__(
        self,
        cluster: Cluster,
        namespace: str,
        name: str,
        say: Callable[[str], None],
        timeout_s: float = 3600.0,
        poll_s: float = POLL_S,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._cluster, self._namespace, self._name, self._say = cluster, namespace, name, say
        self._timeout_s, self._poll_s, self._clock, self._sleep = timeout_s, poll_s, clock, sleep
        self._leaving: dict[str, float] = {}
        self._coming: dict[str, float] = {}
        self._hinted = False
        try:
            self._isvc = cluster.get("InferenceService", namespace, name)
        except ApiError as error:
            if error.status == 404:
                raise ConfigError(
                    f"there is no InferenceService {namespace}/{name}. kserve-vllm diagnose {name} -n {namespace}"
                ) from error
            raise
        said = str(dig(self._isvc, "status", "deploymentMode") or "")
        self._mode = MODES.get(said, said)

    def pods(self) -> dict[str, Json]:
        """The service's pods by name, those that are on their way out too."""
        selector = f"serving.kserve.io/inferenceservice={self._name}"
        return {
            pod["metadata"]["name"]: pod
            for pod in self._cluster.list("Pod", self._namespace, labelSelector=selector)
            if (pod["metadata"].get("labels") or {}).get("serving.kserve.io/inferenceservice") == self._name
            and dig(pod, "status", "phase") not in ("Failed", "Succeeded")
        }

    def method(self, asked: str) -> tuple[str, str]:
        """The way, and why it is not the usual one.

        Raises:
            ConfigError: the way that was asked for would do harm.
        """
        if asked == "evict":
            return "evict", ""
        reason = self._against_rollout()
        if not reason:
            return "rollout", ""
        if asked == "rollout":
            raise ConfigError(f"{reason}. Use --method evict")
        return "evict", reason

    def _against_rollout(self) -> str:
        percent = dig(self._isvc, "spec", "predictor", "canaryTrafficPercent")
        if self._mode == "Knative":
            return f"a canary is under way at {percent} %" if percent not in (None, 100) else ""
        try:
            deployment = self._cluster.get("Deployment", self._namespace, f"{self._name}-predictor")
        except ApiError as error:
            if error.status == 404:
                return ""
            raise
        replicas = int(dig(deployment, "spec", "replicas") or 0)
        down = _absolute(dig(deployment, "spec", "strategy", "rollingUpdate", "maxUnavailable"), replicas)
        for budget in self._budgets():
            allowed = int(dig(budget, "status", "disruptionsAllowed") or 0)
            if down > allowed:
                name = budget["metadata"]["name"]
                return f"a rollout would stop {down} pods at a time, PodDisruptionBudget {name} allows {allowed}"
        return ""

    def _budgets(self) -> list[Json]:
        """Budgets that select the service's pods by its own label."""
        try:
            found = self._cluster.list("PodDisruptionBudget", self._namespace)
        except ApiError as error:
            if error.status in (403, 404):
                return []
            raise
        wanted = ("serving.kserve.io/inferenceservice", self._name)
        return [b for b in found if wanted in (dig(b, "spec", "selector", "matchLabels") or {}).items()]

    def run(self, method: str) -> RestartReport:
        """Do it, and wait for its end."""
        began = self._clock()
        report = RestartReport(method)
        old = self.pods()
        if not old:
            self._say("no pod runs (scaled to zero, or stopped): the next one is new anyway")
            report.done = True
            return report
        if method == "rollout":
            stamp = datetime.now(UTC).isoformat(timespec="seconds")
            change = {"spec": {"predictor": {"annotations": {ANNOTATION: stamp}}}}
            self._cluster.patch("InferenceService", self._namespace, self._name, change)
            least = int(dig(self._isvc, "spec", "predictor", "minReplicas") or 0)
            sick = self._of_failed_revisions(old)
            for name in sorted(sick):
                self._say(f"{name} was not ready before; it is not waited for: kserve-vllm diagnose {self._name}")
            going = set(old) - sick
            report.done = self._watch(report, going, set(old), min(least, len(going)), began, sick)
        else:
            report.done = self._one_by_one(report, old, began)
        report.seconds = round(self._clock() - began, 1)
        if report.done:
            self._say(f"done: {len(report.started)} pods are new and ready after {report.seconds:.0f} s")
        else:
            left = sorted(set(old) & set(self.pods()))
            self._say(
                f"not through after {report.seconds:.0f} s; old pods that are left: {', '.join(left) or 'none'}. "
                f"What holds it: kserve-vllm diagnose {self._name} -n {self._namespace}"
            )
        return report

    def _of_failed_revisions(self, old: dict[str, Json]) -> set[str]:
        """Pods that a new revision does not end: Knative keeps those of a revision that never got ready until its
        progress deadline. A Deployment ends its failed pods first."""
        sick = {name for name, pod in old.items() if not is_ready(pod) and not pod["metadata"].get("deletionTimestamp")}
        return sick if self._mode == "Knative" and sick != set(old) else set()

    def _one_by_one(self, report: RestartReport, old: dict[str, Json], began: float) -> bool:
        well = [name for name, pod in old.items() if is_ready(pod)]
        for name in sorted(old):
            if name not in well:
                # A canary that fails, a pod without room: its successor may never be ready, and is not waited for.
                self._say(f"{name} was not ready before; it is left alone: kserve-vllm diagnose {self._name}")
                continue
            told = False
            while True:
                try:
                    self._cluster.evict(self._namespace, name)
                    break
                except ApiError as error:
                    if error.status == 404:
                        break
                    if error.status != 429:
                        raise
                    if not told:
                        self._say(f"{name} may not go yet: {error.message}")
                        told = True
                if self._clock() - began > self._timeout_s:
                    return False
                self._sleep(self._poll_s)
            if not self._watch(report, {name}, set(old), len(well), began, set(old) - set(well)):
                return False
        return True

    def _watch(
        self,
        report: RestartReport,
        going: set[str],
        old: set[str],
        wanted: int,
        began: float,
        sick: AbstractSet[str] = frozenset(),
    ) -> bool:
        """Wait until the pods that go are gone and those that are there are ready, `wanted` at the least (an
        autoscaler may want fewer than there were), but for the `sick`; tell what happens meanwhile."""
        while True:
            now = self.pods()
            self._tell(report, now, old)
            staying = [pod for name, pod in now.items() if name not in going | sick]
            ready = [pod for pod in staying if is_ready(pod)]
            if not going & set(now) and len(ready) == len(staying) and len(ready) >= wanted:
                return True
            if self._clock() - began > self._timeout_s:
                return False
            self._sleep(self._poll_s)

    def _tell(self, report: RestartReport, now: dict[str, Json], old: set[str]) -> None:
        at = self._clock()
        for name, pod in now.items():
            if pod["metadata"].get("deletionTimestamp") and name not in self._leaving:
                self._leaving[name] = at
                grace = dig(pod, "spec", "terminationGracePeriodSeconds")
                self._say(f"{name} is leaving; it has up to {grace} s for what is in flight")
            if name not in old and name not in self._coming:
                self._coming[name] = at
                self._say(f"{name} is starting")
            if name in self._coming and name not in report.started and is_ready(pod):
                report.started[name] = round(at - self._coming[name], 1)
                self._say(f"{name} is ready after {report.started[name]:.0f} s")
            waits = condition(pod, "PodScheduled")
            if waits.get("status") == "False" and "Insufficient" in str(waits.get("message")) and not self._hinted:
                self._hinted = True
                self._say(f"{name} finds no room: {waits.get('message')} (--method evict frees the old pod's first)")
        for name in set(self._leaving) - set(now) - set(report.replaced):
            report.replaced[name] = round(at - self._leaving[name], 1)
            self._say(f"{name} is gone after {report.replaced[name]:.0f} s")


def is_ready(pod: Json) -> bool:
    """Whether a pod takes requests."""
    return condition(pod, "Ready").get("status") == "True" and not pod["metadata"].get("deletionTimestamp")


def _absolute(value: object, replicas: int) -> int:
    """A number or percentage of pods that may be down; a percentage is rounded down, as the Deployment controller does.
    Unset is 25 %."""
    text = "25%" if value is None else str(value)
    if text.endswith("%"):
        return math.floor(replicas * float(text[:-1]) / 100)
    return int(text)
