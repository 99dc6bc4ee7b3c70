"""`kserve-vllm restart`: both ways, budgets, and what it says. The API server and what replaces pods are fakes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kserve_vllm.cli import main
from kserve_vllm.ops import restart as module
from kserve_vllm.ops.restart import ANNOTATION
from tests.ops.fake_api import FakeApi

NAME = "chat"


class World:
    """Replaces pods as a Deployment with a surge does, or after an eviction; each change comes with the next list.

    Args:
        api: where the objects are.
        pods: how many there are.
        mode: of the service.
    """

    def __init__(self, api: FakeApi, pods: int = 2, mode: str = "Standard", **predictor: Any) -> None:
        self.api, self.made = api, 0
        self.fewest = pods
        self.wanted = pods
        self.todo: list[tuple[str, str]] = []
        self.stuck = False
        self.sick: set[str] = set()
        api.put(
            "InferenceService",
            {
                "metadata": {"name": NAME},
                "status": {"deploymentMode": mode},
                "spec": {"predictor": {"minReplicas": pods, **predictor}},
            },
        )
        self.strategy({"maxSurge": 1, "maxUnavailable": 0})
        for _ in range(pods):
            self.new(True)
        api.on_write = self._written
        answer = api.answer

        def turn(method: str, target: str, body: Any) -> tuple[int, Any]:
            if method == "GET" and "/pods?" in target:
                self.step()
            return answer(method, target, body)

        api.answer = turn  # type: ignore[method-assign]

    def strategy(self, rolling: dict[str, Any]) -> None:
        """How the Deployment replaces pods."""
        self.api.put(
            "Deployment",
            {
                "metadata": {"name": f"{NAME}-predictor"},
                "spec": {"replicas": self.wanted, "strategy": {"rollingUpdate": rolling}},
            },
        )

    def new(self, ready: bool) -> str:
        """One more pod."""
        self.made += 1
        name = f"chat-predictor-{self.made}"
        self.api.put(
            "Pod",
            {
                "metadata": {"name": name, "labels": {"serving.kserve.io/inferenceservice": NAME}},
                "spec": {"terminationGracePeriodSeconds": 100},
                "status": {"phase": "Running", "conditions": [{"type": "Ready", "status": str(ready)}]},
            },
        )
        return name

    def _written(self, method: str, path: str, body: Any) -> None:
        if method == "EVICT":
            self.todo += [("leave", path), ("create", ""), ("gone", path)]
        elif method == "PATCH" and "/inferenceservices/" in path:
            for number in range(1, self.wanted + 1):
                old = f"chat-predictor-{number}"
                self.todo += [("create", ""), ("leave", old), ("gone", old)]

    def step(self) -> None:
        """One turn of the controllers."""
        for name in list(self.names()):
            pod = self.api.get("Pod", name)
            if pod["status"]["conditions"][0]["status"] == "False" and not self.stuck and name not in self.sick:
                pod["status"]["conditions"][0]["status"] = "True"
                self.api.put("Pod", pod)
                return
        if self.todo:
            what, name = self.todo.pop(0)
            if what == "create":
                created = self.new(False)
                if self.stuck:
                    pod = self.api.get("Pod", created)
                    pod["status"]["conditions"].append(
                        {
                            "type": "PodScheduled",
                            "status": "False",
                            "message": "0/1 nodes: 1 Insufficient nvidia.com/gpu",
                        }
                    )
                    self.api.put("Pod", pod)
                    self.todo.clear()
            elif what == "leave":
                pod = self.api.get("Pod", name)
                pod["metadata"]["deletionTimestamp"] = "2026-11-26T12:00:00Z"
                self.api.put("Pod", pod)
            else:
                self.api.drop("Pod", name)
        self.fewest = min(self.fewest, len(self.ready()))

    def names(self) -> list[str]:
        """All pods."""
        return [path.rsplit("/", 1)[1] for path in self.api.objects if "/pods/" in path]

    def ready(self) -> list[str]:
        """Pods that take requests."""
        pods = [self.api.get("Pod", name) for name in self.names()]
        return [p["metadata"]["name"] for p in pods if module.is_ready(p)]

    def budget(self, allowed: int, selector: dict[str, str] | None = None) -> None:
        """A PodDisruptionBudget."""
        labels = selector or {"serving.kserve.io/inferenceservice": NAME}
        self.api.put(
            "PodDisruptionBudget",
            {
                "metadata": {"name": "chat"},
                "spec": {"selector": {"matchLabels": labels}},
                "status": {"disruptionsAllowed": allowed},
            },
        )


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL_S", 0.01)


def restart(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, report and what was said."""
    code = main(["restart", NAME, "--json", *arguments])
    captured = capsys.readouterr()
    return code, json.loads(captured.out) if captured.out else {}, captured.err


@pytest.mark.parametrize("mode", ["Standard", "Knative"])
def test_a_rollout_replaces_every_pod_and_says_so(mode: str, api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    world = World(api, 2, mode)
    code, report, said = restart(capsys)
    assert (code, report["done"], report["method"]) == (0, True, "rollout")
    assert sorted(world.ready()) == ["chat-predictor-3", "chat-predictor-4"]
    assert world.fewest == 2, "there were never fewer pods than before"
    assert set(report["replaced"]) == {"chat-predictor-1", "chat-predictor-2"}
    assert set(report["started"]) == {"chat-predictor-3", "chat-predictor-4"}
    assert "chat-predictor-1 is leaving; it has up to 100 s for what is in flight" in said
    patched = api.get("InferenceService", NAME)["spec"]["predictor"]["annotations"]
    assert list(patched) == [ANNOTATION]
    assert "annotations" not in api.get("InferenceService", NAME)["metadata"]


def test_the_pod_of_a_failed_revision_is_not_waited_for(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    """Knative keeps it until its progress deadline, whatever is newer."""
    world = World(api, 2, "Knative")
    world.made = 9
    failed = world.new(False)
    world.made, world.sick = 2, {failed}
    code, report, said = restart(capsys, "--timeout", "5")
    assert (code, report["done"], report["method"]) == (0, True, "rollout")
    assert set(report["replaced"]) == {"chat-predictor-1", "chat-predictor-2"}
    assert f"{failed} was not ready before; it is not waited for" in said
    assert "2 pods are new" in said


def test_an_eviction_takes_one_pod_after_the_other(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    world = World(api, 3)
    code, report, _ = restart(capsys, "--method", "evict")
    assert (code, report["done"]) == (0, True)
    assert sorted(world.ready()) == ["chat-predictor-4", "chat-predictor-5", "chat-predictor-6"]
    assert world.fewest == 2, "one less at a time"
    assert [write[0] for write in api.writes] == ["EVICT"] * 3
    assert api.get("InferenceService", NAME)["spec"]["predictor"] == {"minReplicas": 3}


def test_a_budget_that_holds_is_waited_for(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    World(api, 2)
    refusals = iter([True, True, False, False])
    api.evict_answer = lambda pod: (
        (429, "Cannot evict pod as it would violate the pod's disruption budget.")
        if next(refusals, False)
        else (201, "")
    )
    code, _, said = restart(capsys, "--method", "evict")
    assert code == 0
    assert said.count("may not go yet: Cannot evict pod") == 1


def test_a_budget_that_never_lets_go_ends_with_one_and_no_pod_is_lost(
    api: FakeApi, capsys: pytest.CaptureFixture[str]
) -> None:
    world = World(api, 2)
    api.evict_answer = lambda pod: (429, "disruption budget")
    code, report, said = restart(capsys, "--method", "evict", "--timeout", "0.3")
    assert (code, report["done"]) == (1, False)
    assert len(world.ready()) == 2
    assert "old pods that are left: chat-predictor-1, chat-predictor-2" in said


def test_a_rollout_that_would_break_a_budget_becomes_evictions(
    api: FakeApi, capsys: pytest.CaptureFixture[str]
) -> None:
    world = World(api, 4)
    world.strategy({"maxSurge": 0, "maxUnavailable": "50%"})
    world.budget(1)
    code, report, said = restart(capsys)
    assert (code, report["method"]) == (0, "evict")
    assert "a rollout would stop 2 pods at a time, PodDisruptionBudget chat allows 1" in said
    assert main(["restart", NAME, "--method", "rollout"]) == 2
    assert "Use --method evict" in capsys.readouterr().err
    world.budget(1, {"app": "something-else"})
    assert main(["restart", NAME, "--dry-run"]) == 0
    assert "by rollout" in capsys.readouterr().out


def test_in_mid_canary_no_revision_is_made(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    World(api, 2, "Knative", canaryTrafficPercent=10)
    code, report, said = restart(capsys)
    assert (code, report["method"]) == (0, "evict")
    assert "a canary is under way at 10 %" in said


def test_no_room_for_one_more_pod_is_said(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    world = World(api, 2)
    world.stuck = True
    code, report, said = restart(capsys, "--timeout", "1")
    assert (code, report["done"]) == (1, False)
    assert "chat-predictor-3 finds no room: 0/1 nodes: 1 Insufficient nvidia.com/gpu (--method evict" in said
    assert world.ready() == ["chat-predictor-1", "chat-predictor-2"]


def test_a_dry_run_and_a_service_without_pods_write_nothing(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    World(api, 2)
    assert restart(capsys, "--dry-run")[0] == 0
    for name in ("chat-predictor-1", "chat-predictor-2"):
        api.drop("Pod", name)
    code, report, said = restart(capsys)
    assert (code, report["done"]) == (0, True)
    assert "scaled to zero" in said
    assert api.writes == []


def test_a_missing_service_and_missing_rights_are_sentences(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["restart", "nobody"]) == 2
    assert "there is no InferenceService team-a/nobody" in capsys.readouterr().err
    World(api, 2)
    api.forbidden.add("/api/v1|pods")
    assert main(["restart", NAME]) == 3
    assert "the cluster refuses: 403" in capsys.readouterr().err
