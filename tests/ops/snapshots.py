"""Snapshots for the tests of diagnose: a healthy base and the change that a fault makes (see cases/README.md)."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import yaml

from kserve_vllm.ops.diagnose.snapshot import Snapshot

FOLDER = Path(__file__).parent / "cases"
# Through JSON, so that nothing is shared between two objects by an anchor.
BASES: dict[str, Any] = json.loads(json.dumps(yaml.safe_load((FOLDER / "bases.yaml").read_text())))
CASES: list[dict[str, Any]] = [
    case
    for path in sorted(FOLDER.glob("*.yaml"))
    if path.name != "bases.yaml"
    for case in yaml.safe_load(path.read_text())
]
RECORDED = sorted((FOLDER / "recorded").glob("*.json"))


def merge(into: Any, change: Any) -> Any:
    """A JSON merge patch (RFC 7386)."""
    if not isinstance(change, dict):
        return change
    out = dict(into) if isinstance(into, dict) else {}
    for key, value in change.items():
        if value is None:
            out.pop(key, None)
        else:
            out[key] = merge(out.get(key), value)
    return out


def _first_pod(body: dict[str, Any]) -> dict[str, Any]:
    pod: dict[str, Any] = body["objects"]["Pod"][0]
    return pod


def _not_ready(body: dict[str, Any]) -> None:
    """The first pod, and with it the service, is not ready."""
    pod = _first_pod(body)
    for each in pod["status"]["conditions"]:
        if each["type"] in ("Ready", "ContainersReady"):
            each["status"] = "False"
            each["reason"] = "ContainersNotReady"
    for status in pod["status"]["containerStatuses"]:
        status["ready"] = False
    for each in body["objects"]["InferenceService"][0]["status"]["conditions"]:
        if each["type"] in ("Ready", "PredictorReady"):
            each["status"] = "False"
    body["answers"].pop(pod["metadata"]["name"], None)


def _event(body: dict[str, Any], kind: str, name: str, reason: str, message: str, of: str = "Warning") -> None:
    body["objects"].setdefault("Event", []).append(
        {
            "type": of,
            "reason": reason,
            "message": message,
            "lastTimestamp": "2026-11-26T11:58:00Z",
            "involvedObject": {"kind": kind, "name": name},
        }
    )


def snapshot(case: dict[str, Any]) -> Snapshot:
    """The snapshot of a case.

    A case has `base` and any of: `pending` (the scheduler's message), `log` (the last words of a container that ended;
    `container`, `exit` and `terminated` say more), `waiting` (a state), `events`, `unready` (nothing but not ready),
    `isvc` (a message of KServe's), `set` (merge patches by kind, of its first object), `drop` (kinds), `add`
    (objects by kind), and the snapshot's own fields.
    """
    body = copy.deepcopy(BASES[case["base"]])
    for key in ("objects", "refused", "logs", "answers"):
        body.setdefault(key, {})
    if "pending" in case:
        _not_ready(body)
        pod = _first_pod(body)
        pod["status"] = {
            "phase": "Pending",
            "conditions": [
                {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": case["pending"]}
            ],
        }
        pod["spec"].pop("nodeName")
        _event(body, "Pod", pod["metadata"]["name"], "FailedScheduling", case["pending"])
    if "log" in case:
        _not_ready(body)
        pod, container = _first_pod(body), case.get("container", "kserve-container")
        group = "initContainerStatuses" if container == "storage-initializer" else "containerStatuses"
        ended = {
            "exitCode": case.get("exit", 1),
            "reason": "Error",
            "finishedAt": "2026-11-26T11:57:00Z",
            **case.get("terminated", {}),
        }
        for status in pod["status"][group]:
            if status["name"] == container:
                status |= {
                    "ready": False,
                    "restartCount": 4,
                    "lastState": {"terminated": ended},
                    "state": {
                        "waiting": {
                            "reason": "CrashLoopBackOff",
                            "message": "back-off 1m20s restarting failed container",
                        }
                    },
                }
        body["logs"][f"{pod['metadata']['name']}/{container}/previous"] = case["log"]
    if "waiting" in case:
        _not_ready(body)
        _first_pod(body)["status"]["containerStatuses"][0]["state"] = {"waiting": case["waiting"]}
    if case.get("unready"):
        _not_ready(body)
    if "isvc" in case:
        for each in body["objects"]["InferenceService"][0]["status"]["conditions"]:
            if each["type"] in ("Ready", "PredictorReady"):
                each["status"] = "False"
        for kind in ("Pod", "Deployment", "KnativeService", "Revision", "PodAutoscaler", "HTTPRoute"):
            body["objects"][kind] = []
        _event(body, "InferenceService", "chat", "InternalError", case["isvc"])
    for event in case.get("events", []):
        name = event.get("name") or _first_pod(body)["metadata"]["name"]
        _event(body, event.get("kind", "Pod"), name, event["reason"], event["message"], event.get("type", "Warning"))
    for kind, change in case.get("set", {}).items():
        body["objects"][kind][0] = merge(body["objects"][kind][0], change)
    for kind in case.get("drop", []):
        body["objects"][kind] = []
    for kind, objects in case.get("add", {}).items():
        body["objects"].setdefault(kind, []).extend(objects)
    for key in ("name", "namespace", "submitted"):
        if key in case:
            body[key] = case[key]
    for key in ("refused", "logs"):
        body[key] |= case.get(key, {})
    if "metrics" in case:
        who = next(iter(body["answers"]))
        body["answers"][who]["metrics"] += case["metrics"]
    if "health" in case:
        who = _first_pod(body)["metadata"]["name"] if body["objects"].get("Pod") else body["name"]
        body["answers"].setdefault(who, {})["health"] = case["health"]
    if "answers" in case:
        body["answers"] = case["answers"]
    return Snapshot(**body)


def recorded(path: Path) -> Snapshot:
    """A snapshot that was taken on a real cluster."""
    return Snapshot(**json.loads(path.read_text()))
