"""The cluster of the current kubeconfig: what it has, and what the tests read of it and do to it."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kubernetes import client, config
from kubernetes.client.exceptions import ApiException
from kubernetes.dynamic import DynamicClient
from kubernetes.stream import stream

Object = dict[str, Any]

RUN_LABEL = "kserve-vllm.e2e/run"
"""On every namespace of the suite; its value is the run's id."""
_ISVC = ("serving.kserve.io", "v1beta1")
_OURS_ANYWAY = {
    "events",
    "serviceaccounts/default",
    "configmaps/kube-root-ca.crt",
    "configmaps/istio-ca-root-cert",
    "resourcequotas/no-pods",
}


class NotInTime(AssertionError):
    """Something did not come about within its time; the text holds what was seen instead."""


@dataclass(frozen=True)
class Found:
    """What a cluster has; a version is empty where the thing is missing, and `unknown` where it does not say."""

    kubernetes: str
    nodes: int
    cpus: float
    gpus: int
    kserve: str
    knative: str
    gateway_api: bool
    gateway_controller: str
    keda: bool
    prometheus_operator: bool
    resource_metrics: bool

    def versions(self) -> dict[str, Any]:
        """As JSON for the results."""
        return asdict(self)


def wait(
    what: str, done: Callable[[], Any], within_s: float, every_s: float = 0.5, seen: Callable[[], str] | None = None
) -> Any:
    """What `done()` gives once that is true.

    Raises:
        NotInTime: it was not within `within_s` seconds; `seen` tells what there was instead.
    """
    deadline = time.monotonic() + within_s
    while not (result := done()):
        if time.monotonic() > deadline:
            raise NotInTime(f"{what}: not within {within_s:g} s\n{seen() if seen else ''}")
        time.sleep(every_s)
    return result


class Cluster:
    """The API of the current kubeconfig's cluster.

    Args:
        run: the id of this run, which labels everything it makes.
        said: versions by name that the cluster itself does not tell, such as `{"kserve": "0.20.0"}`.
    """

    def __init__(self, run: str, said: Mapping[str, str]) -> None:
        config.load_kube_config()  # type: ignore[no-untyped-call]
        self.run = run
        # Any: in the client's own types every field of every object may be None.
        self.api: Any = client.ApiClient()
        self._dynamic: Any = DynamicClient(self.api)  # type: ignore[no-untyped-call]
        self.core: Any = client.CoreV1Api(self.api)
        self.apps: Any = client.AppsV1Api(self.api)
        self.policy: Any = client.PolicyV1Api(self.api)
        self.custom: Any = client.CustomObjectsApi(self.api)
        self._by_base: dict[str, list[Object]] = {}
        self._kinds: list[tuple[str, str, bool, str]] | None = None
        self.found = self._discover(said)

    # -- What there is --------------------------------------------------------------------------------------------

    def _request(self, method: str, path: str, body: str | None = None, content_type: str = "application/json") -> Any:
        """JSON that the API answers; raises ApiException where it refuses."""
        return self._dynamic.request(method, path, body, content_type=content_type, serializer=lambda _, tree: tree)

    def get(self, path: str) -> Any:
        """The JSON at a path of the API; None where there is nothing."""
        try:
            return self._request("GET", path)
        except ApiException as error:
            if error.status in (404, 405, 503):
                return None
            raise

    def _deployments(self, name: str) -> list[Any]:
        return [d for d in self.apps.list_deployment_for_all_namespaces().items if name in d.metadata.name]

    def _discover(self, said: Mapping[str, str]) -> Found:
        version = client.VersionApi(self.api).get_code()
        nodes = self.core.list_node().items
        capacity = [node.status.allocatable for node in nodes]
        groups = {g["name"] for g in self.get("/apis")["groups"]}
        settings = self._kserve_settings()
        gateway = json.loads(settings.get("ingress", "{}"))
        controllers = []
        if "gateway.networking.k8s.io" in groups:
            classes = self.get("/apis/gateway.networking.k8s.io/v1/gatewayclasses") or {"items": []}
            controllers = [c["spec"]["controllerName"] for c in classes["items"]]
        return Found(
            kubernetes=version.git_version,
            nodes=len(nodes),
            cpus=sum(float(client_quantity(c.get("cpu", "0"))) for c in capacity),
            gpus=sum(int(count) for c in capacity for name, count in c.items() if name.endswith("/gpu")),
            kserve=(kserve := self._kserve_version(settings)) and said.get("kserve", kserve),
            knative=(knative := self._knative_version(groups)) and said.get("knative", knative),
            gateway_api=bool(gateway.get("enableGatewayApi")) and "gateway.networking.k8s.io" in groups,
            gateway_controller=", ".join(sorted(controllers)),
            keda={"external.metrics.k8s.io", "keda.sh"} <= groups,
            prometheus_operator=bool(self._deployments("prometheus-operator")),
            resource_metrics="metrics.k8s.io" in groups,
        )

    def _kserve_settings(self) -> dict[str, str]:
        for namespace in ("kserve", "kserve-system"):
            try:
                return dict(self.core.read_namespaced_config_map("inferenceservice-config", namespace).data or {})
            except ApiException as error:
                if error.status != 404:
                    raise
        return {}

    def _kserve_version(self, settings: Mapping[str, str]) -> str:
        """From the controller's image; else by what the schema of InferenceServices has."""
        for deployment in self._deployments("kserve-controller-manager"):
            for container in deployment.spec.template.spec.containers:
                if match := re.search(r":v?(\d+\.\d+\.\d+\S*)$", container.image):
                    return match[1]
        crd = self.get("/apis/apiextensions.k8s.io/v1/customresourcedefinitions/inferenceservices.serving.kserve.io")
        if crd is None:
            return ""
        schemas = [v["schema"]["openAPIV3Schema"] for v in crd["spec"]["versions"] if v["name"] == _ISVC[1]]
        spec = schemas[0]["properties"]["spec"]["properties"]
        return "0.21" if "tracing" in spec else "0.20" if "canary" in spec else "unknown"

    def _knative_version(self, groups: set[str]) -> str:
        if "serving.knative.dev" not in groups:
            return ""
        activators = [d for d in self._deployments("activator") if d.metadata.namespace == "knative-serving"]
        if not activators:
            return ""
        return str((activators[0].metadata.labels or {}).get("app.kubernetes.io/version", "unknown"))

    @property
    def longest_request_s(self) -> float:
        """Seconds that Knative lets a revision's requests take at most; 0 without Knative."""
        if not self.found.knative:
            return 0
        data = self.get("/api/v1/namespaces/knative-serving/configmaps/config-defaults").get("data") or {}
        return float(data.get("max-revision-timeout-seconds", 600))

    @property
    def splits_standard_canary(self) -> bool:
        """Whether this KServe gives a canary in Standard mode its part: 0.20 makes its pods and no route to them."""
        return self._kserve_is_at_least(0, 21)

    @property
    def tells_kserve_version(self) -> bool:
        """Whether KServe's controller is a Deployment, whose image the chart reads the version from."""
        return bool(list(self._deployments("kserve-controller-manager")))

    @property
    def deletes_workers(self) -> bool:
        """Whether this KServe deletes the worker Deployment of a multi-node service again, as 0.20 does."""
        return self._kserve_is_at_least(0, 20) and not self._kserve_is_at_least(0, 21)

    def _kserve_is_at_least(self, major: int, minor: int) -> bool:
        match = re.match(r"(\d+)\.(\d+)", self.found.kserve)
        return match is not None and (int(match[1]), int(match[2])) >= (major, minor)

    # -- Namespaces and what is in them -----------------------------------------------------------------------------

    def make_namespace(self, name: str, labels: Mapping[str, str] | None = None) -> str:
        """A namespace of this run in which Pod Security is enforced as `restricted`."""
        security = {"pod-security.kubernetes.io/enforce": "restricted"}
        meta = client.V1ObjectMeta(name=name, labels={RUN_LABEL: self.run, **security, **(labels or {})})
        self.core.create_namespace(client.V1Namespace(metadata=meta))
        wait(
            f"default service account of {name}",
            lambda: any(a.metadata.name == "default" for a in self.core.list_namespaced_service_account(name).items),
            60,
        )
        return name

    def forbid_pods(self, namespace: str) -> None:
        """Let the namespace hold no pod, so that controllers write everything but pods."""
        quota = client.V1ResourceQuota(
            metadata=client.V1ObjectMeta(name="no-pods"), spec=client.V1ResourceQuotaSpec(hard={"pods": "0"})
        )
        self.core.create_namespaced_resource_quota(namespace, quota)

    def _kinds_of(self, base: str) -> list[Object]:
        """Kinds of a group and version. Kept: a cluster that gets a new kind meanwhile is another cluster."""
        if base not in self._by_base:
            self._by_base[base] = (self.get(base) or {"resources": []})["resources"]
        return self._by_base[base]

    def _resources(self) -> list[tuple[str, str, bool, str]]:
        """(path of the group and version, plural, namespaced, kind) of everything that can be listed and deleted."""
        if self._kinds is None:
            self._kinds = []
            for versions in [["/api/v1"], *(_versions(group) for group in self.get("/apis")["groups"])]:
                seen: set[str] = set()
                for path in versions:
                    for r in self._kinds_of(path):
                        if "/" not in r["name"] and r["name"] not in seen and {"list", "delete"} <= set(r["verbs"]):
                            seen.add(r["name"])
                            self._kinds.append((path, r["name"], r["namespaced"], r["kind"]))
        return self._kinds

    def left_in(self, namespace: str) -> list[str]:
        """`plural/name` of everything in a namespace that Kubernetes itself did not put there."""
        left = []
        for path, plural, namespaced, _ in self._resources():
            if not namespaced or plural in _OURS_ANYWAY:
                continue
            listing = self.get(f"{path}/namespaces/{namespace}/{plural}") or {"items": []}
            left += [f"{plural}/{item['metadata']['name']}" for item in listing["items"]]
        return sorted(set(left) - _OURS_ANYWAY)

    def left_of_release(self, release: str) -> list[str]:
        """`plural/name` of everything outside of namespaces that bears the label of a helm release."""
        left = []
        for path, plural, namespaced, _ in self._resources():
            if not namespaced:
                listing = self.get(f"{path}/{plural}?labelSelector=app.kubernetes.io/instance={release}") or {
                    "items": []
                }
                left += [f"{plural}/{item['metadata']['name']}" for item in listing["items"]]
        return sorted(left)

    def releases_outside(self) -> set[str]:
        """Names of the helm releases of objects outside of namespaces."""
        found = set()
        for path, plural, namespaced, _ in self._resources():
            if not namespaced:
                listing = self.get(f"{path}/{plural}?labelSelector=app.kubernetes.io/instance") or {"items": []}
                found |= {item["metadata"]["labels"]["app.kubernetes.io/instance"] for item in listing["items"]}
        return found

    def delete_what_is_left_of(self, release: str) -> None:
        """Delete what a release has left outside of namespaces, having been told to keep it."""
        for path, plural, namespaced, _ in self._resources():
            if not namespaced:
                listing = self.get(f"{path}/{plural}?labelSelector=app.kubernetes.io/instance={release}") or {
                    "items": []
                }
                for item in listing["items"]:
                    self._request("DELETE", f"{path}/{plural}/{item['metadata']['name']}")

    def path_of(self, thing: Mapping[str, Any], namespace: str) -> str:
        """Path under which an object's kind is listed."""
        version = thing["apiVersion"]
        base = f"/api/{version}" if "/" not in version else f"/apis/{version}"
        for resource in self._kinds_of(base):
            if resource["kind"] == thing["kind"] and "/" not in resource["name"]:
                where = f"{base}/namespaces/{namespace}" if resource["namespaced"] else base
                return f"{where}/{resource['name']}"
        raise LookupError(f"the cluster has no kind {thing['kind']} of {version}")

    def has_kind(self, version: str, kind: str) -> bool:
        """Whether the cluster has a kind, such as `monitoring.coreos.com/v1`, `PodMonitor`."""
        return any(resource["kind"] == kind for resource in self._kinds_of(f"/apis/{version}"))

    def apply(self, thing: Object, namespace: str) -> Object:
        """Write an object as `kubectl apply --server-side` does."""
        path = f"{self.path_of(thing, namespace)}/{thing['metadata']['name']}?fieldManager=e2e&force=true"
        written: Object = self._request("PATCH", path, json.dumps(thing), "application/apply-patch+yaml")
        return written

    def delete(self, thing: Object, namespace: str) -> None:
        """Delete an object, and whatever it owns."""
        path = f"{self.path_of(thing, namespace)}/{thing['metadata']['name']}?propagationPolicy=Background"
        self._request("DELETE", path)

    # -- InferenceServices --------------------------------------------------------------------------------------------

    def isvc(self, namespace: str, name: str) -> Object:
        """An InferenceService as it is now."""
        found: Object = self.custom.get_namespaced_custom_object(*_ISVC, namespace, "inferenceservices", name)
        return found

    def isvcs(self, namespace: str) -> list[Object]:
        """The InferenceServices of a namespace."""
        items: list[Object] = self.custom.list_namespaced_custom_object(*_ISVC, namespace, "inferenceservices")["items"]
        return items

    def conditions(self, thing: Object) -> dict[str, Object]:
        """Conditions of an object by type."""
        return {c["type"]: c for c in thing.get("status", {}).get("conditions", [])}

    def is_ready(self, namespace: str, name: str) -> bool:
        """Ready in all respects: its newest revision serves, and of its Deployments every pod is the newest."""
        thing = self.isvc(namespace, name)
        if self.conditions(thing).get("Ready", {}).get("status") != "True":
            return False
        predictor = thing["status"].get("components", {}).get("predictor", {})
        if predictor.get("latestCreatedRevision", "") != predictor.get("latestReadyRevision", ""):
            return False
        if thing["metadata"]["annotations"].get("serving.kserve.io/deploymentMode") in ("Knative", "Serverless"):
            return True
        return all(self.rolled_out(namespace, name))

    def rolled_out(self, namespace: str, name: str) -> Iterator[bool]:
        """Whether each Deployment of an InferenceService has all pods of its newest template, and no other."""
        selector = f"serving.kserve.io/inferenceservice={name}"
        for deployment in self.apps.list_namespaced_deployment(namespace, label_selector=selector).items:
            status, wanted = deployment.status, deployment.spec.replicas
            yield (
                status.observed_generation == deployment.metadata.generation
                and (status.updated_replicas or 0) == wanted
                and (status.replicas or 0) == wanted
                and (status.available_replicas or 0) == wanted
            )

    def wait_ready(self, namespace: str, name: str, within_s: float = 600) -> float:
        """Wait until an InferenceService is ready; the seconds that took."""
        began = time.monotonic()
        wait(
            f"{namespace}/{name} Ready",
            lambda: self.is_ready(namespace, name),
            within_s,
            0.5,
            lambda: self.story(namespace, name),
        )
        return time.monotonic() - began

    def host(self, namespace: str, name: str) -> str:
        """Host of an InferenceService's `status.url`."""
        return host_of(self.isvc(namespace, name)["status"]["url"])

    def pods(self, namespace: str, name: str, every: bool = False) -> list[Any]:
        """Pods of an InferenceService; those that are on their way out only with `every`."""
        found = self.core.list_namespaced_pod(
            namespace, label_selector=f"serving.kserve.io/inferenceservice={name}"
        ).items
        return [p for p in found if every or p.metadata.deletion_timestamp is None]

    def ready_pods(self, namespace: str, name: str) -> int:
        """How many pods of an InferenceService are ready, every container of them."""
        pods = self.pods(namespace, name)
        return sum(
            bool(p.status.container_statuses) and all(s.ready for s in p.status.container_statuses) for p in pods
        )

    def story(self, namespace: str, name: str) -> str:
        """Conditions, pods, events and the end of the logs: what to read when a service does not get ready."""
        lines = []
        for condition in self.conditions(self.isvc(namespace, name)).values():
            words = (condition.get("reason", ""), condition.get("message", ""))
            lines.append(f"{condition['type']}={condition['status']} {' '.join(words)}")
        for pod in self.pods(namespace, name, every=True):
            lines.append(f"pod {pod.metadata.name} {pod.status.phase}")
            for status in pod.status.container_statuses or []:
                lines.append(f"  {status.name} restarts={status.restart_count} state={status.state.to_dict()}")
            lines.append(self.logs(namespace, pod.metadata.name)[-2500:])
        for event in self.core.list_namespaced_event(namespace).items[-15:]:
            lines.append(
                f"event {event.involved_object.kind}/{event.involved_object.name}: {event.reason} {event.message}"
            )
        return "\n".join(lines)

    def logs(self, namespace: str, pod: str, previous: bool = False, container: str = "kserve-container") -> str:
        """Log of a container; empty where there is none."""
        try:
            text: str = self.core.read_namespaced_pod_log(pod, namespace, container=container, previous=previous)
        except ApiException:
            return ""
        return text

    def container(self, namespace: str, pod: str, name: str = "kserve-container") -> Any:
        """Status of a pod's container; None before there is one, or after the pod is gone."""
        try:
            found = self.core.read_namespaced_pod(pod, namespace)
        except ApiException as error:
            if error.status != 404:
                raise
            return None
        return next((s for s in found.status.container_statuses or [] if s.name == name), None)

    def execute(
        self, namespace: str, pod: str, command: Sequence[str], container: str | None = None, within_s: float = 300
    ) -> str:
        """What a command in a container prints.

        Raises:
            AssertionError: it ended with another code than 0.
        """
        extra = {"container": container} if container else {}
        session = stream(
            self.core.connect_get_namespaced_pod_exec,
            pod,
            namespace,
            command=list(command),
            stdin=False,
            stdout=True,
            stderr=True,
            tty=False,
            _preload_content=False,
            **extra,
        )
        session.run_forever(timeout=within_s)
        out, err = session.read_stdout() or "", session.read_stderr() or ""
        code = session.returncode
        session.close()
        # Where the other side had ended it, `close` leaves the socket open.
        session.sock.shutdown()
        if code != 0:
            raise AssertionError(f"{command[:2]} in {pod} ended with {code}:\n{out[-2000:]}\n{err[-2000:]}")
        return out


def _versions(group: Object) -> list[str]:
    """Paths of a group's versions, the preferred one first: a kind may be in another one alone."""
    preferred = group["preferredVersion"]["groupVersion"]
    others = [v["groupVersion"] for v in group["versions"] if v["groupVersion"] != preferred]
    return [f"/apis/{version}" for version in [preferred, *others]]


def host_of(url: str) -> str:
    """Host of a URL, with its port if it has one."""
    return re.sub(r"^https?://", "", url).split("/")[0]


def client_quantity(text: str) -> float:
    """A quantity of Kubernetes such as `3920m` as a number."""
    return float(text[:-1]) / 1000 if text.endswith("m") else float(text)
