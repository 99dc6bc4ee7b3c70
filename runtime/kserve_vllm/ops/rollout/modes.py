"""How traffic is split in KServe's two modes. Every step can be done again: a rollout that was killed goes on.

Knative: `predictor.canaryTrafficPercent`, against the last revision that had all traffic.
Standard: `spec.canary[]`, from KServe 0.21 and with the Gateway API.
"""

from __future__ import annotations

import math
from typing import Protocol

from kserve_vllm.core.errors import ConfigError
from kserve_vllm.ops.cluster import ApiError, Cluster, Json
from kserve_vllm.ops.diagnose.facts import MODES, condition, dig
from kserve_vllm.ops.rollout.state import RolloutState

VARIANT = "canary"


class CanaryFailed(Exception):
    """The canary can't get traffic; the message says why."""


class Driver(Protocol):
    """A mode. Methods that return a bool say whether it is so by now, and are asked again."""

    mode: str

    def isvc(self) -> Json:
        """The InferenceService as it is now."""

    def stable(self) -> str:
        """The stable version's name in metrics."""

    def newest(self) -> str:
        """The newest revision that there is; "" where the mode has none."""

    def start(self, state: RolloutState, dry_run: bool = False) -> None:
        """Make the canary, without traffic."""

    def ready(self, state: RolloutState) -> str:
        """The canary's name in metrics once it is ready, else ""; raises `CanaryFailed` where it never will be."""

    def shift(self, state: RolloutState, weight: int) -> bool:
        """Give the canary its share."""

    def promote(self, state: RolloutState) -> bool:
        """Make the canary the stable version."""

    def take_back(self, state: RolloutState) -> bool:
        """Give all traffic to the stable version."""

    def restore(self, state: RolloutState) -> bool:
        """Once the traffic is back: let the service say again what it said before, without a canary; raises
        `CanaryFailed` where that would give the canary traffic."""

    def clear(self, state: RolloutState) -> str:
        """After that: end what a canary that never got ready would go on running. What there is to say of it, or ""."""

    def disturbed(self, state: RolloutState) -> str:
        """Why this is no longer the rollout that was begun, or ""."""


def driver_of(cluster: Cluster, namespace: str, name: str) -> Driver:
    """The driver for a service's mode.

    Raises:
        ConfigError: there is no such service, or its mode has no canary.
    """
    try:
        found = cluster.get("InferenceService", namespace, name)
    except ApiError as error:
        if error.status == 404:
            raise ConfigError(
                f"there is no InferenceService {namespace}/{name}. kserve-vllm diagnose {name} -n {namespace}"
            ) from error
        raise
    said = dig(found, "status", "deploymentMode") or (found["metadata"].get("annotations") or {}).get(
        "serving.kserve.io/deploymentMode", ""
    )
    mode = MODES.get(said, said)
    if mode == "Knative":
        return KnativeMode(cluster, namespace, name)
    if mode == "Standard":
        return StandardMode(cluster, namespace, name)
    raise ConfigError(f"{namespace}/{name} has no deployment mode yet ({said or 'no status'}): wait until it is ready")


class _Base:
    def __init__(self, cluster: Cluster, namespace: str, name: str) -> None:
        self.cluster, self.namespace, self.name = cluster, namespace, name

    def isvc(self) -> Json:
        return self.cluster.get("InferenceService", self.namespace, self.name)

    def _patch(self, change: Json, dry_run: bool = False) -> Json:
        return self.cluster.patch("InferenceService", self.namespace, self.name, {"spec": change}, dry_run)

    def clear(self, state: RolloutState) -> str:
        return ""


class KnativeMode(_Base):
    """Revisions, and a percentage for the newest."""

    mode = "Knative"

    def stable(self) -> str:
        status = self._status()
        traffic = _shares(status)
        whole = [revision for revision, percent in traffic.items() if percent == 100]
        if not whole:
            raise ConfigError(f"{self.name} is in the middle of another canary: {traffic or 'it has no traffic yet'}")
        return whole[0]

    def newest(self) -> str:
        return str(self._status().get("latestCreatedRevision") or "")

    def _made(self, state: RolloutState, status: Json) -> str:
        """The revision that the change has made; "" while there is none."""
        created = str(status.get("latestCreatedRevision") or "")
        return "" if created in (state.stable, state.newest) else created

    def _status(self) -> Json:
        return dig(self.isvc(), "status", "components", "predictor") or {}

    def start(self, state: RolloutState, dry_run: bool = False) -> None:
        self._patch({"predictor": {**state.change, "canaryTrafficPercent": 0}}, dry_run)

    def ready(self, state: RolloutState) -> str:
        status = self._status()
        created = self._made(state, status)
        if not created:
            return ""
        if created == status.get("latestReadyRevision"):
            return created
        try:
            revision = self.cluster.get("Revision", self.namespace, created)
        except ApiError:
            return ""
        failed = condition(revision, "Ready")
        if failed.get("status") == "False":
            raise CanaryFailed(f"revision {created} is not ready: {failed.get('reason')} {failed.get('message')}")
        return ""

    def shift(self, state: RolloutState, weight: int) -> bool:
        if self.isvc()["spec"]["predictor"].get("canaryTrafficPercent") != weight:
            self._patch({"predictor": {"canaryTrafficPercent": weight}})
        return _shares(self._status()).get(state.canary, 0) == weight

    def promote(self, state: RolloutState) -> bool:
        if "canaryTrafficPercent" in self.isvc()["spec"]["predictor"]:
            self._patch({"predictor": {"canaryTrafficPercent": None}})
        return _shares(self._status()).get(state.canary, 0) == 100

    def take_back(self, state: RolloutState) -> bool:
        if self.isvc()["spec"]["predictor"].get("canaryTrafficPercent") != 0:
            self._patch({"predictor": {"canaryTrafficPercent": 0}})
        status = self._status()
        state.canary = state.canary or self._made(state, status)  # one that never got ready
        return _shares(status).get(state.stable, 0) == 100

    def restore(self, state: RolloutState) -> bool:
        """A spec that goes on naming the canary would keep its pods, and the next change would begin from it.

        In two steps. Without a percentage Knative gives all traffic to the newest revision that is ready, which is the
        canary until the old template's new one is: that one is made at 0 %.
        """
        predictor, status = self.isvc()["spec"]["predictor"], self._status()
        newest = str(status.get("latestCreatedRevision") or "")
        if "canaryTrafficPercent" not in predictor:
            return _shares(status).get(newest, 0) == 100
        if merged(predictor, state.before) != predictor:
            last = status.get("latestRolledoutRevision")
            if last != state.stable:
                # What a canary leaves, KServe gives to the last revision that ever had all traffic.
                raise CanaryFailed(f"{last} had all traffic, and KServe would give it back to it beside a new revision")
            self._patch({"predictor": {**state.before, "canaryTrafficPercent": 0}})
        elif newest != state.canary and newest == status.get("latestReadyRevision"):
            self._patch({"predictor": {"canaryTrafficPercent": None}})
        return False

    def clear(self, state: RolloutState) -> str:
        """Knative keeps the pod of a revision that never got ready until its progress deadline, which for a large model
        is an hour, though nothing is sent to it. Its Deployment goes with it."""
        canary = state.canary
        if not canary or canary == self._status().get("latestCreatedRevision"):
            return ""
        try:
            revision = self.cluster.get("Revision", self.namespace, canary)
            if condition(revision, "Ready").get("status") == "True" or not dig(revision, "status", "desiredReplicas"):
                return ""
            self.cluster.delete("Revision", self.namespace, canary)
        except ApiError as error:
            if error.status == 404:
                return ""
            if error.status == 403:
                return (
                    f"revision {canary} never got ready and keeps its pod until Knative gives up on it; it may not "
                    f"be deleted from here ({error}): kubectl delete revision {canary} -n {self.namespace}"
                )
            raise
        return f"revision {canary}, which never got ready, is deleted: it would have kept its pod"

    def disturbed(self, state: RolloutState) -> str:
        created = self._status().get("latestCreatedRevision")
        if state.canary and created and created != state.canary:
            return (
                f"something changed the service in mid-rollout: the newest revision is {created}, the canary was "
                f"{state.canary}"
            )
        return ""


class StandardMode(_Base):
    """A second Deployment, and weights in the HTTPRoute."""

    mode = "Standard"

    def stable(self) -> str:
        own = dig(self.isvc(), "spec", "predictor", "name")
        names = [f"{self.name}-{own}-predictor"] if own else []
        for name in [*names, f"{self.name}-predictor"]:
            try:
                self.cluster.get("Deployment", self.namespace, name)
            except ApiError as error:
                if error.status != 404:
                    raise
                continue
            return name
        raise ConfigError(f"{self.name} has no Deployment yet: wait until it is ready")

    def newest(self) -> str:
        return ""

    @property
    def _deployment(self) -> str:
        return f"{self.name}-{VARIANT}-predictor"

    def _canary(self, state: RolloutState, weight: int, replicas: int) -> Json:
        """The canary as the schema wants it: the container has a name here, and not in the predictor."""
        model = dig(self.isvc(), "spec", "predictor", "model") or {}
        inner = {"name": "kserve-container", "modelFormat": model.get("modelFormat"), **state.change.get("model", {})}
        rest = {key: value for key, value in state.change.items() if key != "model"}
        predictor = {"name": VARIANT, "minReplicas": replicas, **rest, "model": inner}
        return {"canary": [{"trafficPercent": weight, "predictor": predictor}]}

    def start(self, state: RolloutState, dry_run: bool = False) -> None:
        isvc = self.isvc()
        others = [c for c in dig(isvc, "spec", "canary") or [] if dig(c, "predictor", "name") != VARIANT]
        if others:
            raise ConfigError(f"{self.name} has another canary already: {dig(others[0], 'predictor', 'name')}")
        if dig(isvc, "spec", "canary"):
            return
        kept = self._patch(self._canary(state, 0, 1), dry_run)
        if not dig(kept, "spec", "canary"):
            raise ConfigError(
                "this KServe has no spec.canary, so in Standard mode it can split no traffic: KServe 0.21 or later is "
                "needed, with the Gateway API"
            )

    def _replicas(self, weight: int) -> int:
        """As many of the stable version's pods as its share of the traffic; KServe allows no more."""
        least = int(dig(self.isvc(), "spec", "predictor", "minReplicas") or 1)
        return max(1, min(least, math.ceil(least * weight / 100)))

    def _there(self, name: str, least: int = 1) -> bool:
        """Whether a Deployment is rolled out, with so many pods at the least."""
        try:
            found = self.cluster.get("Deployment", self.namespace, name)
        except ApiError as error:
            if error.status == 404:
                return False
            raise
        return rolled_out(found) and int(dig(found, "spec", "replicas") or 0) >= least

    def ready(self, state: RolloutState) -> str:
        try:
            found = self.cluster.get("Deployment", self.namespace, self._deployment)
        except ApiError as error:
            if error.status == 404:
                return ""
            raise
        stuck = condition(found, "Progressing")
        if stuck.get("status") == "False":
            raise CanaryFailed(f"Deployment {self._deployment}: {stuck.get('reason')} {stuck.get('message')}")
        return self._deployment if rolled_out(found) else ""

    def _now(self) -> tuple[int, int]:
        """The canary's weight and replicas in the spec."""
        canary: Json = next(iter(dig(self.isvc(), "spec", "canary") or []), {})
        return int(canary.get("trafficPercent") or 0), int(dig(canary, "predictor", "minReplicas") or 1)

    def shift(self, state: RolloutState, weight: int) -> bool:
        now, replicas = self._now()
        wanted = max(replicas, self._replicas(weight))
        if replicas < wanted:
            # Pods first, then their traffic.
            self._patch(self._canary(state, now, wanted))
            return False
        if not self._there(self._deployment):
            return False
        if now != weight:
            self._patch(self._canary(state, weight, wanted))
        return self._share() == weight

    def _share(self) -> float:
        """The canary's share in the HTTPRoutes, in percent; 0 where none has it."""
        for route in ("", "-predictor"):
            try:
                found = self.cluster.get("HTTPRoute", self.namespace, f"{self.name}{route}")
            except ApiError as error:
                if error.status == 404:
                    continue
                raise
            for rule in dig(found, "spec", "rules") or []:
                weights = {str(b.get("name")): b.get("weight", 1) for b in rule.get("backendRefs") or []}
                if self._deployment in weights and sum(weights.values()):
                    return float(100 * weights[self._deployment] / sum(weights.values()))
        return 0.0

    def promote(self, state: RolloutState) -> bool:
        """The stable Deployment takes the new model while the canary serves, and then the traffic back, pod by pod:
        KServe keeps the stable version at `minReplicas` less the canary's pods, so taking the canary away at once would
        leave one pod with all traffic."""
        isvc = self.isvc()
        predictor = isvc["spec"]["predictor"]
        if merged(predictor, state.change) != predictor:
            self._patch({"predictor": state.change})
            return False
        if dig(isvc, "spec", "canary"):
            _, replicas = self._now()
            whole = int(predictor.get("minReplicas") or 1)
            if not self._there(state.stable, max(whole - replicas, 1)):
                return False
            if replicas > 1:
                self._patch(self._canary(state, 100 * (replicas - 1) // whole, replicas - 1))
                return False
            self._patch({"canary": None})
        return self._share() == 0

    def take_back(self, state: RolloutState) -> bool:
        now, replicas = self._now()
        if dig(self.isvc(), "spec", "canary"):
            if now or replicas > 1:
                # One pod at once: each one that the canary has is one that KServe takes off the stable version.
                self._patch(self._canary(state, 0, 1))
            # The route first: KServe deletes a canary's pods before it rewrites the route.
            if self._share():
                return False
            self._patch({"canary": None})
        return self._share() == 0

    def restore(self, state: RolloutState) -> bool:
        """The canary was beside the predictor, which nobody has changed."""
        return True

    def disturbed(self, state: RolloutState) -> str:
        names = [dig(c, "predictor", "name") for c in dig(self.isvc(), "spec", "canary") or []]
        if state.canary and names != [VARIANT]:
            return f"something changed spec.canary in mid-rollout: it has {names or 'no canary'} now"
        return ""


def rolled_out(deployment: Json) -> bool:
    """Whether all pods of a Deployment are of its newest version and ready: what `kubectl rollout status` waits for."""
    wanted = int(dig(deployment, "spec", "replicas") or 0)
    status = deployment.get("status") or {}
    seen = (status.get("observedGeneration") or 0) >= (deployment["metadata"].get("generation") or 0)
    return bool(
        seen
        and (status.get("updatedReplicas") or 0) >= wanted
        and (status.get("availableReplicas") or 0) >= wanted
        and (status.get("replicas") or 0) <= (status.get("updatedReplicas") or 0)
    )


def merged(into: Json, change: Json) -> Json:
    """A JSON merge patch applied (RFC 7386)."""
    out = dict(into)
    for key, value in change.items():
        if value is None:
            out.pop(key, None)
        elif isinstance(value, dict):
            out[key] = merged(out[key] if isinstance(out.get(key), dict) else {}, value)
        else:
            out[key] = value
    return out


def inverse(into: Json, change: Json) -> Json:
    """The merge patch that takes a change back."""
    out: Json = {}
    for key, value in change.items():
        before = into.get(key)
        out[key] = inverse(before, value) if isinstance(value, dict) and isinstance(before, dict) else before
    return out


def _shares(status: Json) -> dict[str, int]:
    """Percent of the traffic by revision."""
    out: dict[str, int] = {}
    for each in status.get("traffic") or []:
        if each.get("percent"):
            out[str(each.get("revisionName"))] = out.get(str(each.get("revisionName")), 0) + int(each["percent"])
    return out
