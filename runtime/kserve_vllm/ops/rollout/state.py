"""What a rollout has done so far, kept in the cluster so that another process can go on.

It lies in a ConfigMap NAME-rollout that the InferenceService owns, and not in an annotation of the InferenceService
itself: KServe passes its annotations on to the pods (`ServiceAnnotationDisallowedList` names the few that it does not),
so that every entry would restart them, or make one more revision.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from kserve_vllm.core.errors import ConfigError
from kserve_vllm.ops.cluster import ApiError, Cluster, Json

# Flagger's words for where a canary is.
Phase = Literal["Initializing", "Progressing", "Promoting", "Succeeded", "Failed", "RollingBack", "Paused"]
OPEN = ("Initializing", "Progressing", "Promoting", "RollingBack", "Paused")
_KEY = "rollout.json"
_MOST_ENTRIES = 200


class Superseded(Exception):
    """Another process goes on with this rollout."""


@dataclass
class RolloutState:
    """Where a rollout is.

    Attributes:
        mode: `Knative` or `Standard`.
        change: what the canary has in place of the stable predictor's fields, a JSON merge patch.
        words: the change for people.
        stable: the stable version's name in metrics (a revision, or a Deployment).
        before: what the change replaced, as a merge patch that takes it back.
        newest: in Knative the newest revision before the change: the stable one, or one that another change has left
            without traffic, which must not be taken for the canary.
        steps: weights in percent.
        step: which one is on, counted from 0.
        phase: as Flagger has it.
        canary: the canary's name in metrics, once it is known.
        since: when the present step's weight held, seconds of the wall clock; 0 before.
        looks: how many verdicts the present step has had.
        failed_checks: how many of them were `Failed`.
        baseline: the stable version's sample of the last step, for the step that leaves it no traffic.
        reason: why it is rolled back or paused.
        history: `{"at", "step", "weight", "event", ...}`, oldest first.
        id: who began it (`--id`), or "" by hand.
        ended: by id, the phase in which earlier rollouts of this service ended.
    """

    mode: str
    change: Json
    words: str
    stable: str
    before: Json
    steps: list[int]
    step: int = 0
    phase: Phase = "Initializing"
    canary: str = ""
    since: float = 0.0
    looks: int = 0
    failed_checks: int = 0
    baseline: Json = field(default_factory=dict)
    reason: str = ""
    history: list[Json] = field(default_factory=list)
    id: str = ""
    ended: dict[str, str] = field(default_factory=dict)
    newest: str = ""

    @property
    def weight(self) -> int:
        """The present step's weight in percent."""
        return self.steps[min(self.step, len(self.steps) - 1)]

    def endings(self) -> dict[str, str]:
        """How each rollout with an id ended, this one too where it is over; the last ones of many."""
        over = {self.id: str(self.phase)} if self.id and self.phase not in OPEN else {}
        return dict(list({**self.ended, **over}.items())[-_MOST_ENTRIES:])

    def note(self, event: str, at: float, **more: Any) -> None:
        """Write down what happened."""
        stamp = datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        self.history.append({"at": stamp, "step": self.step, "weight": self.weight, "event": event, **more})
        # An object holds 1 MiB.
        del self.history[:-_MOST_ENTRIES]


class StateStore:
    """Keeps the state of a service's rollout.

    Args:
        cluster: where.
        namespace, name: of the InferenceService.
    """

    def __init__(self, cluster: Cluster, namespace: str, name: str) -> None:
        self._cluster, self._namespace, self._service = cluster, namespace, name
        self.name = f"{name}-rollout"
        self._version = ""

    def load(self) -> RolloutState | None:
        """What was kept last; None where there was no rollout.

        Raises:
            Unreadable: it may not be read.
            ConfigError: what lies there is no state.
        """
        try:
            found = self._cluster.get("ConfigMap", self._namespace, self.name)
        except ApiError as error:
            if error.status == 404:
                return None
            raise
        self._version = found["metadata"]["resourceVersion"]
        try:
            return RolloutState(**json.loads(found["data"][_KEY]))
        except (KeyError, ValueError, TypeError) as error:
            raise ConfigError(f"ConfigMap {self._namespace}/{self.name} holds no rollout: {error}") from error

    def save(self, state: RolloutState, owner: Json) -> None:
        """Keep it.

        Args:
            state: where the rollout is.
            owner: the InferenceService, with which the ConfigMap goes.

        Raises:
            Superseded: another process has written since.
            Unreadable: it may not be written.
        """
        metadata = owner["metadata"]
        body: Json = {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {
                "name": self.name,
                "namespace": self._namespace,
                "labels": {"app.kubernetes.io/part-of": "kserve-vllm"},
                "ownerReferences": [
                    {
                        "apiVersion": "serving.kserve.io/v1beta1",
                        "kind": "InferenceService",
                        "name": metadata["name"],
                        "uid": metadata.get("uid", ""),
                    }
                ],
            },
            "data": {_KEY: json.dumps(asdict(state))},
        }
        try:
            if not self._version:
                kept = self._cluster.create("ConfigMap", self._namespace, body)
            else:
                body["metadata"]["resourceVersion"] = self._version
                kept = self._cluster.replace("ConfigMap", self._namespace, self.name, body)
        except ApiError as error:
            if error.status == 409:
                if self._is_kept(body["data"][_KEY]):
                    return
                raise Superseded(f"another process goes on with the rollout of {self._service}") from error
            raise
        self._version = kept["metadata"]["resourceVersion"]

    def _is_kept(self, text: str) -> bool:
        """Whether a write whose answer got lost has arrived."""
        found = self._cluster.get("ConfigMap", self._namespace, self.name)
        if (found.get("data") or {}).get(_KEY) != text:
            return False
        self._version = found["metadata"]["resourceVersion"]
        return True
