"""A snapshot, read: what the causes ask for, without a rule of its own about what is wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Any, cast

from kserve_vllm.ops.cluster import Json
from kserve_vllm.ops.diagnose.snapshot import Snapshot, moment
from kserve_vllm.ops.exposition import Sample, samples

SERVING = ("kserve-container", "worker-container")
MODES = {"Serverless": "Knative", "Knative": "Knative", "RawDeployment": "Standard", "Standard": "Standard"}
# Conditions that are bad when they hold.
_BAD_WHEN_TRUE = {"ReplicaFailure", "DisruptionTarget"}
_RECENT = timedelta(hours=1)


@dataclass(frozen=True)
class Said:
    """One thing that the cluster says.

    Attributes:
        where: the object, such as `Pod chat-predictor-5d`.
        kind, name: of it.
        reason: one word, or "".
        text: the message.
        container: whose state it is, or "".
    """

    where: str
    kind: str
    name: str
    reason: str
    text: str
    container: str = ""


@dataclass(frozen=True)
class Line:
    """One line of a container's log."""

    pod: str
    container: str
    text: str


class Facts:
    """What a snapshot tells.

    Args:
        snapshot: of a service or of one server.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.name, self.namespace = snapshot.name, snapshot.namespace

    def all(self, kind: str) -> list[Json]:
        """The objects of a kind."""
        return self.snapshot.objects.get(kind) or []

    def refused(self, what: str) -> Json:
        """Why something could not be read; empty where it could."""
        return self.snapshot.refused.get(what) or {}

    @property
    def about_a_server(self) -> bool:
        """Whether one server was asked at its URL, and no cluster."""
        return not self.namespace

    @cached_property
    def isvc(self) -> Json:
        """The InferenceService; empty where there is none."""
        return next((o for o in self.all("InferenceService") if o["metadata"]["name"] == self.name), {})

    @cached_property
    def predictor(self) -> Json:
        """`spec.predictor`."""
        return dig(self.isvc, "spec", "predictor") or {}

    @cached_property
    def model(self) -> Json:
        """`spec.predictor.model`."""
        return self.predictor.get("model") or {}

    @cached_property
    def mode(self) -> str:
        """`Knative` or `Standard`."""
        said = dig(self.isvc, "status", "deploymentMode") or self.annotation("serving.kserve.io/deploymentMode")
        if said:
            return MODES.get(said, said)
        if self.all("KnativeService"):
            return "Knative"
        settings = self.setting("inferenceservice-config", "deploy")
        return MODES.get(str(settings.get("defaultDeploymentMode", "")), "Standard" if self.isvc else "")

    def annotation(self, key: str) -> str:
        """The predictor's annotation, else the service's, else the runtime's: KServe's order."""
        for source in (
            self.predictor.get("annotations"),
            dig(self.isvc, "metadata", "annotations"),
            dig(self.runtime, "spec", "annotations"),
        ):
            if source and key in source:
                return str(source[key])
        return ""

    @cached_property
    def runtime(self) -> Json:
        """The runtime that the service names or was given; empty where it is unknown."""
        named = (
            self.model.get("runtime")
            or dig(self.isvc, "status", "servingRuntimeName")
            or dig(self.isvc, "status", "clusterServingRuntimeName")
        )
        return next((r for r in self.runtimes if r["metadata"]["name"] == named), {})

    @cached_property
    def runtimes(self) -> list[Json]:
        """The runtimes that the service may use."""
        return self.all("ServingRuntime") + self.all("ClusterServingRuntime")

    def setting(self, config: str, key: str) -> Json:
        """A JSON value of a ConfigMap of KServe's; empty where it is none."""
        try:
            return cast(Json, json.loads(self.config(config).get(key, "{}")))
        except ValueError:
            return {}

    def config(self, name: str) -> Mapping[str, str]:
        """The data of a ConfigMap of KServe or Knative; empty where it could not be read."""
        found = next((o for o in self.all("ConfigMap") if o["metadata"]["name"] == name), {})
        return found.get("data") or {}

    @cached_property
    def ready(self) -> bool:
        """Whether KServe says that the service is ready."""
        return condition(self.isvc, "Ready").get("status") == "True"

    @cached_property
    def pods(self) -> list[Json]:
        """The service's pods that are not on their way out."""
        return [pod for pod in self.all("Pod") if not pod["metadata"].get("deletionTimestamp")]

    @cached_property
    def unready(self) -> list[Json]:
        """Pods that are not ready."""
        return [p for p in self.pods if condition(p, "Ready").get("status") != "True"]

    @cached_property
    def args(self) -> list[str]:
        """Arguments of the serving container, from a pod where there is one, else from the service."""
        for pod in self.pods:
            for container in pod["spec"].get("containers") or []:
                if container["name"] in SERVING:
                    return [str(word) for word in container.get("args") or []]
        return [str(word) for word in self.model.get("args") or []]

    def flag(self, name: str) -> str:
        """The value of a flag of the serving container; "" where it is not given."""
        spelled = {f"--{name}", f"--{name.replace('-', '_')}"}
        for at, word in enumerate(self.args):
            head, equals, value = word.partition("=")
            if head in spelled:
                following = self.args[at + 1] if at + 1 < len(self.args) else ""
                return value if equals else ("true" if following.startswith("--") else following or "true")
        return ""

    def statuses(self, pod: Json, only: tuple[str, ...] = ()) -> Iterator[tuple[str, Json]]:
        """Containers' statuses of a pod, init containers' first."""
        for group in ("initContainerStatuses", "containerStatuses"):
            for status in dig(pod, "status", group) or []:
                if not only or status["name"] in only:
                    yield status["name"], status

    @cached_property
    def said(self) -> list[Said]:
        """What conditions, container states and events say that is not well, and what is of now."""
        return [*self._conditions(), *self._states(), *self._events(), *self._submission()]

    def _submission(self) -> Iterator[Said]:
        if self.snapshot.submitted:
            yield Said("the manifest", "Manifest", self.name, "Refused", self.snapshot.submitted)

    def _conditions(self) -> Iterator[Said]:
        for kind in (
            "InferenceService",
            "KnativeService",
            "Revision",
            "Route",
            "PodAutoscaler",
            "Deployment",
            "ReplicaSet",
            "HorizontalPodAutoscaler",
            "ScaledObject",
            "Pod",
        ):
            objects = [self.isvc] if kind == "InferenceService" and self.isvc else self.all(kind)
            for obj in objects:
                if kind == "InferenceService" and not self.isvc:
                    continue
                name = obj["metadata"]["name"]
                for each in dig(obj, "status", "conditions") or []:
                    bad = "True" if each["type"] in _BAD_WHEN_TRUE else "False"
                    unknown = each["status"] == "Unknown" and each.get("message")
                    if each["status"] == bad or unknown:
                        yield Said(f"{kind} {name}", kind, name, each.get("reason") or "", each.get("message") or "")
        failure = dig(self.isvc, "status", "modelStatus", "lastFailureInfo") or {}
        if failure and not self.ready:
            text = failure.get("message") or ""
            yield Said(f"InferenceService {self.name}", "InferenceService", self.name, failure.get("reason", ""), text)

    def _states(self) -> Iterator[Said]:
        for pod in self.pods:
            name = pod["metadata"]["name"]
            status = pod.get("status") or {}
            if status.get("phase") == "Failed":
                yield Said(f"Pod {name}", "Pod", name, status.get("reason") or "", status.get("message") or "")
            for container, each in self.statuses(pod):
                state = each.get("state") or {}
                for found in (state.get("waiting"), state.get("terminated")):
                    if found and found.get("reason") not in ("Completed", "PodInitializing", "ContainerCreating"):
                        yield Said(
                            f"Pod {name}", "Pod", name, found.get("reason") or "", found.get("message") or "", container
                        )
                last = (each.get("lastState") or {}).get("terminated")
                if last and (not each.get("ready") or self.recent(last.get("finishedAt"))):
                    yield Said(
                        f"Pod {name}", "Pod", name, last.get("reason") or "", last.get("message") or "", container
                    )

    def _events(self) -> Iterator[Said]:
        unready = {pod["metadata"]["name"] for pod in self.unready}
        for event in self.all("Event"):
            about = event.get("involvedObject") or {}
            kind, name = about.get("kind", ""), about.get("name", "")
            if event.get("type") == "Normal" and event.get("reason") != "Killing":
                continue
            # What a pod went through before it became ready is over.
            if kind == "Pod" and name not in unready:
                continue
            scaler = kind in ("HorizontalPodAutoscaler", "ScaledObject")
            if kind != "Pod" and ((self.ready and not scaler) or not self.recent(_last(event))):
                continue
            yield Said(f"{kind} {name}", kind, name, event.get("reason") or "", event.get("message") or "")

    def recent(self, text: str | None) -> bool:
        """Whether something happened within the last hour; yes where the time is unknown."""
        at = moment(text)
        return at is None or self.snapshot.now - at < _RECENT

    @cached_property
    def lines(self) -> list[Line]:
        """Log lines of containers that are not well: not ready now, or started again within the hour."""
        found = []
        for pod in self.pods:
            name = pod["metadata"]["name"]
            for container, status in self.statuses(pod):
                last = (status.get("lastState") or {}).get("terminated") or {}
                ended = (status.get("state") or {}).get("terminated") or {}
                if status.get("ready") and not (last and self.recent(last.get("finishedAt"))):
                    continue
                if ended.get("exitCode") == 0:
                    continue
                # The run before a restart tells why it ended; the present one may tell nothing yet.
                for key in (f"{name}/{container}/previous", f"{name}/{container}"):
                    for line in (self.snapshot.logs.get(key) or "").splitlines():
                        found.append(Line(name, container, _words(line)))
        return found

    def metric(self, name: str, **labels: str) -> float | None:
        """The sum of a metric over all servers, of the samples with these labels; None where nobody has it."""
        values = [value for found, has, value in self._samples if found == name and labels.items() <= has.items()]
        return sum(values) if values else None

    def highest(self, name: str, **labels: str) -> float | None:
        """The highest value of a metric."""
        values = [value for found, has, value in self._samples if found == name and labels.items() <= has.items()]
        return max(values) if values else None

    def labelled(self, name: str, label: str) -> dict[str, float]:
        """A metric's values summed by one label."""
        out: dict[str, float] = {}
        for found, has, value in self._samples:
            if found == name and label in has:
                out[has[label]] = out.get(has[label], 0.0) + value
        return out

    @cached_property
    def _samples(self) -> list[Sample]:
        out: list[Sample] = []
        for answer in self.snapshot.answers.values():
            text = answer.get("metrics")
            if not isinstance(text, str):
                continue
            out += samples(text)
        return out

    @cached_property
    def health(self) -> dict[str, Json]:
        """By pod or URL, the body of the readiness answer, with its `status`."""
        out = {}
        for who, answer in self.snapshot.answers.items():
            health = answer.get("health")
            if health:
                body = health["body"] if isinstance(health["body"], dict) else {"text": health["body"]}
                out[who] = {**body, "status": health["status"]}
        return out

    def event_about(self, kind: str, pattern: str) -> Said | None:
        """The first thing said about a kind of object that matches."""
        return next((s for s in self.said if s.kind == kind and re.search(pattern, f"{s.reason} {s.text}")), None)


def dig(obj: object, *keys: str) -> Any:
    """A value deep in a dictionary; None where the way ends."""
    for key in keys:
        if not isinstance(obj, dict):
            return None
        obj = obj.get(key)
    return obj


def condition(obj: Json, kind: str) -> Json:
    """A condition of an object; empty where it has none of this type."""
    return next((c for c in dig(obj, "status", "conditions") or [] if c["type"] == kind), {})


def seconds(text: object) -> float | None:
    """A duration as Go and the Gateway API write it (`600s`, `1m30s`, `1h`); None where it is none."""
    if not isinstance(text, str) or not re.fullmatch(r"(\d+(\.\d+)?(h|ms|m|s))+", text):
        return None
    unit = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
    return sum(float(number) * unit[of] for number, _, of in re.findall(r"(\d+(\.\d+)?)(h|ms|m|s)", text))


def _last(event: Json) -> str | None:
    times = (event.get("lastTimestamp"), event.get("eventTime"), dig(event, "metadata", "creationTimestamp"))
    return next((str(time) for time in times if time), None)


def _words(line: str) -> str:
    """The message of a JSON log line with its exception, or the line."""
    if line.startswith("{"):
        try:
            body = json.loads(line)
        except ValueError:
            return line
        if isinstance(body, dict) and "event" in body:
            return f"{body['event']} {body.get('exception', '')}".strip()
    return line
