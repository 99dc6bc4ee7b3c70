"""A Kubernetes cluster through the `kubernetes` client, as plain JSON.

One way for every kind, custom or not: a path goes in, a dictionary comes out. What can't be read is an `ApiError`
with the server's status, so that a caller can tell a missing right from a missing object.
"""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode

from kserve_vllm.core.errors import ConfigError

Json = dict[str, Any]

# Kind to (API path, whether it lies in a namespace). Events are read through the core API, as kubectl does.
KINDS: Mapping[str, tuple[str, bool]] = {
    "InferenceService": ("/apis/serving.kserve.io/v1beta1|inferenceservices", True),
    "ServingRuntime": ("/apis/serving.kserve.io/v1alpha1|servingruntimes", True),
    "ClusterServingRuntime": ("/apis/serving.kserve.io/v1alpha1|clusterservingruntimes", False),
    "LocalModelCache": ("/apis/serving.kserve.io/v1alpha1|localmodelcaches", False),
    "Deployment": ("/apis/apps/v1|deployments", True),
    "ReplicaSet": ("/apis/apps/v1|replicasets", True),
    "Pod": ("/api/v1|pods", True),
    "Event": ("/api/v1|events", True),
    "Service": ("/api/v1|services", True),
    "PersistentVolumeClaim": ("/api/v1|persistentvolumeclaims", True),
    "ResourceQuota": ("/api/v1|resourcequotas", True),
    "ServiceAccount": ("/api/v1|serviceaccounts", True),
    "Node": ("/api/v1|nodes", False),
    "ConfigMap": ("/api/v1|configmaps", True),
    "HorizontalPodAutoscaler": ("/apis/autoscaling/v2|horizontalpodautoscalers", True),
    "PodDisruptionBudget": ("/apis/policy/v1|poddisruptionbudgets", True),
    "ScaledObject": ("/apis/keda.sh/v1alpha1|scaledobjects", True),
    "HTTPRoute": ("/apis/gateway.networking.k8s.io/v1|httproutes", True),
    "Gateway": ("/apis/gateway.networking.k8s.io/v1|gateways", True),
    "VirtualService": ("/apis/networking.istio.io/v1beta1|virtualservices", True),
    "KnativeService": ("/apis/serving.knative.dev/v1|services", True),
    "Revision": ("/apis/serving.knative.dev/v1|revisions", True),
    "Route": ("/apis/serving.knative.dev/v1|routes", True),
    "PodAutoscaler": ("/apis/autoscaling.internal.knative.dev/v1alpha1|podautoscalers", True),
}
# Where Kubernetes tells a pod its namespace.
NAMESPACE_FILE = "/var/run/secrets/kubernetes.io/serviceaccount/namespace"
MISSING_CLIENT = (
    "this command talks to a cluster and needs the Kubernetes client, which is not installed. "
    "Install it: pip install 'kserve-vllm[ops]'"
)


class ApiError(Exception):
    """The API server did not give what was asked for.

    Attributes:
        status: the HTTP status, or 0 where nothing answered.
        message: the server's words.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}" if status else message)
        self.status = status
        self.message = message


def path_of(kind: str, namespace: str = "", name: str = "") -> str:
    """The API path of a kind's list, or of one object."""
    where, namespaced = KINDS[kind]
    group, plural = where.split("|")
    inside = f"/namespaces/{namespace}" if namespaced and namespace else ""
    return f"{group}{inside}/{plural}" + (f"/{name}" if name else "")


class Cluster:
    """The cluster that a kubeconfig, or the pod that this runs in, points at.

    Args:
        context: of the kubeconfig; its current one where none is given.
        kubeconfig: a file; `KUBECONFIG` or `~/.kube/config` where none is given.
        timeout_s: for one request.

    Raises:
        ConfigError: there is no client, or no configuration that it can use.
    """

    def __init__(self, context: str | None = None, kubeconfig: str | None = None, timeout_s: float = 15.0) -> None:
        try:
            from kubernetes import client, config
            from kubernetes.config.config_exception import ConfigException
        except ImportError as error:
            raise ConfigError(MISSING_CLIENT) from error
        settings = client.Configuration()
        # The client reads the variable once, when it is imported.
        chosen = kubeconfig or os.environ.get("KUBECONFIG") or None
        self.default_namespace = "default"
        try:
            config.load_kube_config(chosen, context, client_configuration=settings)  # type: ignore[no-untyped-call]
            self.default_namespace = _namespace_of(config, chosen, context)
        except Exception as error:  # a file of another kind, a cut one, a cloud's plug-in: each has errors of its own
            if context or kubeconfig:
                raise ConfigError(f"the kubeconfig can't be used: {_one_line(error)}") from error
            try:
                config.load_incluster_config(client_configuration=settings)  # type: ignore[no-untyped-call]
                with open(NAMESPACE_FILE, encoding="utf-8") as file:
                    self.default_namespace = file.read().strip()
            except (ConfigException, OSError) as inside:
                raise ConfigError(
                    f"no cluster is configured: {_one_line(error)}. Set KUBECONFIG or give --kubeconfig; for a "
                    "server without a cluster: kserve-vllm diagnose --url http://localhost:8080, or kserve-vllm top "
                    "http://localhost:8080"
                ) from inside
        # A cluster that is away is told at once, not after three tries.
        settings.retries = False  # type: ignore[assignment]
        self._client = client.ApiClient(settings)
        # Its connections are closed with it.
        weakref.finalize(self, self._client.rest_client.pool_manager.clear)
        self._timeout_s = timeout_s
        self.server = str(settings.host)

    def get(self, kind: str, namespace: str, name: str) -> Json:
        """One object.

        Raises:
            Unreadable: it is not there, or may not be read.
        """
        return self._json("GET", path_of(kind, namespace, name))

    def list(self, kind: str, namespace: str = "", **query: str) -> list[Json]:
        """All objects of a kind, in one namespace or in all of them; `query` as labelSelector, fieldSelector.

        Raises:
            Unreadable: the kind is not known there, or may not be listed.
        """
        found: list[Json] = []
        more = ""
        while True:
            asked = {**query, "limit": "500", **({"continue": more} if more else {})}
            body = self._json("GET", path_of(kind, namespace), asked)
            found += body.get("items") or []
            more = (body.get("metadata") or {}).get("continue") or ""
            if not more:
                return found

    def patch(self, kind: str, namespace: str, name: str, change: Json, dry_run: bool = False) -> Json:
        """Merge a change into an object (RFC 7386); with `dry_run` the server checks it and keeps nothing."""
        query = {"dryRun": "All"} if dry_run else {}
        return self._json(
            "PATCH", path_of(kind, namespace, name), query, change, {"Content-Type": "application/merge-patch+json"}
        )

    def create(self, kind: str, namespace: str, body: Json, dry_run: bool = False) -> Json:
        """Make an object."""
        return self._json("POST", path_of(kind, namespace), {"dryRun": "All"} if dry_run else {}, body)

    def replace(self, kind: str, namespace: str, name: str, body: Json, dry_run: bool = False) -> Json:
        """Put an object in place of one whose resourceVersion is the same."""
        return self._json("PUT", path_of(kind, namespace, name), {"dryRun": "All"} if dry_run else {}, body)

    def delete(self, kind: str, namespace: str, name: str) -> None:
        """Delete an object; what it owns is deleted by Kubernetes after it."""
        self._json("DELETE", path_of(kind, namespace, name))

    def evict(self, namespace: str, pod: str) -> None:
        """Ask for a pod's eviction, which PodDisruptionBudgets may refuse.

        Raises:
            Unreadable: with status 429 where a budget refuses it.
        """
        body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod, "namespace": namespace}}
        self._json("POST", path_of("Pod", namespace, pod) + "/eviction", {}, body)

    def log(self, namespace: str, pod: str, container: str, previous: bool = False, lines: int = 400) -> str:
        """The end of a container's log."""
        query = {"container": container, "tailLines": str(lines), "limitBytes": str(512 * 1024)}
        if previous:
            query["previous"] = "true"
        return self.fetch_text("GET", path_of("Pod", namespace, pod) + "/log", query)[1]

    def through_pod(
        self,
        namespace: str,
        pod: str,
        port: int,
        path: str,
        body: Json | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> tuple[int, str]:
        """Ask a pod over HTTP through the API server, which takes the right `get` (or `create`) on `pods/proxy`.

        Returns:
            The pod's status and text, whatever the status is; the API server's own refusals too.

        Raises:
            Unreadable: the API server itself did not answer.
        """
        where = f"{path_of('Pod', namespace, pod)}:{port}/proxy{path}"
        return self.fetch_text(
            "GET" if body is None else "POST", where, {}, body, dict(headers or {}), timeout_s, any_status=True
        )

    def _json(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Json | None = None,
        headers: dict[str, str] | None = None,
    ) -> Json:
        _, text = self.fetch_text(method, path, query or {}, body, headers)
        try:
            answer = json.loads(text)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise ApiError(0, f"{self.server}{path} did not answer in JSON as Kubernetes does")
        return answer

    def fetch_text(
        self,
        method: str,
        path: str,
        query: Mapping[str, str],
        body: Json | None = None,
        headers: dict[str, str] | None = None,
        timeout_s: float | None = None,
        any_status: bool = False,
    ) -> tuple[int, str]:
        """Status and body of one request to the API server; raises `ApiError` for a refusal, unless `any_status`."""
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        # Values of the Authorization header come from the client; the URL is ours, so that dots and colons survive.
        headers = {"Accept": "*/*", "Content-Type": "application/json", **(headers or {})}
        self._client.update_params_for_auth(headers, [], ["BearerToken"], path, method, body)
        url = self.server + path + (f"?{urlencode(query)}" if query else "")
        try:
            answer = self._client.rest_client.request(  # type: ignore[no-untyped-call]
                method, url, headers=headers, body=body, _request_timeout=timeout_s or self._timeout_s
            )
            raw = answer.data if answer.data is not None else answer.read()
            status, text = int(answer.status), (raw or b"").decode(errors="replace")
        except ApiException as error:
            status, text = int(error.status or 0), _words(error.body) or str(error.reason)
            if not any_status:
                raise ApiError(status, text) from None
        except (HTTPError, OSError) as error:
            raise ApiError(0, f"{self.server} does not answer: {error}") from None
        if status >= 400 and not any_status:
            raise ApiError(status, _message(text))
        return status, text


def _one_line(error: Exception) -> str:
    """An error in one line; of one without words, its kind. What Python says of a value that was read is no help."""
    if isinstance(error, (TypeError, AttributeError, KeyError, IndexError)):
        return "the file is no kubeconfig"
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def _words(body: object) -> str:
    if isinstance(body, bytes):
        body = body.decode(errors="replace")
    return str(body) if body else ""


def _message(text: str) -> str:
    """The message of a Kubernetes `Status`, or the text's beginning."""
    try:
        return str(json.loads(text)["message"])
    except (ValueError, KeyError, TypeError):
        return text[:300]


def _namespace_of(config: Any, kubeconfig: str | None, context: str | None) -> str:
    contexts, active = config.list_kube_config_contexts(kubeconfig)
    chosen = next((c for c in contexts if c["name"] == context), active) if context else active
    return str((chosen or {}).get("context", {}).get("namespace") or "default")
