"""What KServe's controllers would do, for the fake API server: just as much as a rollout and a restart can see.

Written after KServe 0.20 (Knative) and its master (Standard), as seen on a cluster: see docs of the platform in each
method. Nothing here decides anything that the tests judge.
"""

from __future__ import annotations

from typing import Any

from tests.ops.fake_api import FakeApi

NAME, NAMESPACE = "chat", "team-a"
_READY = [{"type": "Ready", "status": "True"}]


class FakeKnative:
    """Revisions by template, and traffic by canaryTrafficPercent.

    Args:
        api: where the objects are.
        ready: whether a new revision gets ready; a message why not, else "".
    """

    def __init__(self, api: FakeApi, ready: str = "") -> None:
        self.api, self.failure = api, ready
        self.revisions = 0
        self.rolled_out, self.previous = "", ""
        self.templates: dict[str, Any] = {}
        self.shifts: list[int] = []
        self.most: dict[str, int] = {}  # the largest share that a revision ever had
        api.put(
            "InferenceService",
            {
                "metadata": {"name": NAME, "uid": "u-1", "generation": 1},
                "spec": {
                    "predictor": {
                        "minReplicas": 1,
                        "model": {
                            "modelFormat": {"name": "kserve-vllm"},
                            "storageUri": "hf://a/old",
                            "args": ["--profile=balanced"],
                        },
                    }
                },
                "status": {"deploymentMode": "Knative", "conditions": _READY},
            },
        )
        self.reconcile()
        api.on_write = self._written

    def _written(self, method: str, path: str, body: Any) -> None:
        if "/inferenceservices/" in path:
            self.reconcile()

    def reconcile(self) -> None:
        """One turn of the controller."""
        isvc = self.api.get("InferenceService", NAME)
        predictor = dict(isvc["spec"]["predictor"])
        percent = predictor.pop("canaryTrafficPercent", None)
        newest = next(reversed(self.templates), "")
        if not newest or self.templates[newest] != predictor:
            self.revisions += 1
            newest = f"{NAME}-predictor-{self.revisions:05d}"
            self.templates[newest] = predictor
        first = next(iter(self.templates.values()))
        fails = bool(self.failure) and self.templates[newest] != first
        ready = self.rolled_out if fails else newest
        if self.revisions > 1:
            conditions = [
                {
                    "type": "Ready",
                    "status": "False" if fails else "True",
                    "reason": "ProgressDeadlineExceeded" if fails else "",
                    "message": self.failure,
                }
            ]
            # Of one that never got ready, Knative wants a pod until its progress deadline.
            status = {"conditions": conditions, "desiredReplicas": 1}
            self.api.put("Revision", {"metadata": {"name": newest}, "status": status})
        if not self.rolled_out or (percent in (None, 100) and ready != self.rolled_out):
            self.previous, self.rolled_out = self.rolled_out, ready
        # 0 after a promotion gives all traffic to the revision that had it before.
        stable = self.previous if self.rolled_out == ready and percent == 0 and self.previous else self.rolled_out
        share = 100 if percent is None or stable == ready else percent
        traffic = [{"revisionName": ready, "percent": share, "latestRevision": True}]
        if share < 100:
            traffic.append({"revisionName": stable, "percent": 100 - share, "tag": "prev"})
        self.most[ready] = max(self.most.get(ready, 0), share)
        if percent is not None and (not self.shifts or self.shifts[-1] != percent):
            self.shifts.append(percent)
        isvc["status"]["components"] = {
            "predictor": {
                "latestCreatedRevision": newest,
                "latestReadyRevision": ready,
                "latestRolledoutRevision": self.rolled_out,
                "traffic": traffic,
            }
        }
        self.api.put("InferenceService", isvc)

    def share(self, revision: str) -> int:
        """The percent of the traffic that a revision has."""
        status = self.api.get("InferenceService", NAME)["status"]["components"]["predictor"]
        return sum(t["percent"] for t in status["traffic"] if t["revisionName"] == revision)

    def restored(self) -> bool:
        """Whether all is as at the beginning: a revision of the first template, all traffic, no word of a canary."""
        predictor = self.api.get("InferenceService", NAME)["spec"]["predictor"]
        first = next(iter(self.templates.values()))
        return predictor == first and self.share(next(reversed(self.templates))) == 100


class FakeStandard:
    """Deployments for predictor and canary, and weights in the HTTPRoute.

    Args:
        api: where the objects are.
        splits: whether this KServe writes weights (0.21) or not (0.20).
        has_canary: whether it knows `spec.canary` at all.
        replicas: of the stable version.
        ready: whether the canary gets ready.
    """

    def __init__(
        self, api: FakeApi, splits: bool = True, has_canary: bool = True, replicas: int = 2, ready: bool = True
    ) -> None:
        self.api, self.splits, self.has_canary, self.ready = api, splits, has_canary, ready
        self.weights: list[int] = []
        self.canary_replicas: list[int] = []
        self.handed_over: list[tuple[int, int]] = []
        api.put(
            "InferenceService",
            {
                "metadata": {"name": NAME, "uid": "u-1", "generation": 1},
                "spec": {
                    "predictor": {
                        "minReplicas": replicas,
                        "model": {
                            "modelFormat": {"name": "kserve-vllm"},
                            "args": ["--model=a/old", "--max-num-seqs", "64"],
                        },
                    }
                },
                "status": {"deploymentMode": "Standard", "conditions": _READY},
            },
        )
        self.reconcile()
        api.on_write = self._written

    def _written(self, method: str, path: str, body: Any) -> None:
        if "/inferenceservices/" in path:
            self.reconcile()

    def _deployment(self, name: str, replicas: int, ready: bool) -> None:
        status: dict[str, Any] = {"observedGeneration": 1, "replicas": replicas, "updatedReplicas": replicas}
        if ready:
            status |= {"availableReplicas": replicas, "readyReplicas": replicas}
        else:
            status["conditions"] = [
                {
                    "type": "Progressing",
                    "status": "False",
                    "reason": "ProgressDeadlineExceeded",
                    "message": "the replica set has timed out progressing",
                }
            ]
        self.api.put(
            "Deployment",
            {"metadata": {"name": name, "generation": 1}, "spec": {"replicas": replicas}, "status": status},
        )

    def reconcile(self) -> None:
        """One turn of the controller."""
        isvc = self.api.get("InferenceService", NAME)
        if not self.has_canary:
            isvc["spec"].pop("canary", None)
            self.api.put("InferenceService", isvc)
        whole = isvc["spec"]["predictor"]["minReplicas"]
        taken = sum(c["predictor"]["minReplicas"] for c in isvc["spec"].get("canary") or [] if self.ready)
        # The stable version gives up as many pods as the canary has (KServe's predictor.go).
        stable = max(whole - taken, 1)
        self._deployment(f"{NAME}-predictor", stable, True)
        backends = [{"name": f"{NAME}-predictor"}]
        canary = next(iter(isvc["spec"].get("canary") or []), None)
        if canary:
            replicas = canary["predictor"]["minReplicas"]
            assert replicas <= isvc["spec"]["predictor"]["minReplicas"], "KServe's webhook refuses more"
            assert canary["predictor"]["model"]["name"] == "kserve-container", "the schema wants it"
            self.canary_replicas.append(replicas)
            self._deployment(f"{NAME}-canary-predictor", replicas, self.ready)
            weight = canary["trafficPercent"]
            if self.splits:
                backends = [
                    {"name": f"{NAME}-predictor", "weight": 100 - weight},
                    {"name": f"{NAME}-canary-predictor", "weight": weight},
                ]
            if not self.weights or self.weights[-1] != weight:
                self.weights.append(weight)
        else:
            self.api.drop("Deployment", f"{NAME}-canary-predictor")
        share = canary["trafficPercent"] if canary else 0
        if isvc["spec"]["predictor"]["model"]["args"][0].endswith("new"):
            self.handed_over.append((stable, 100 - share))
        self.api.put("HTTPRoute", {"metadata": {"name": NAME}, "spec": {"rules": [{"backendRefs": backends}]}})
