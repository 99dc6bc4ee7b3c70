"""A Prometheus of the suite's own that reads a cluster's pods as a PodMonitor says, with the rules of a PrometheusRule.

It runs where the suite does and reads pods through the API server, so that it needs no image and no way to the pods.
What Prometheus' operator does with the two objects is done here, as far as the chart's objects have it, and so is the
discovery of pods: Debian's Prometheus is built without Kubernetes'.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import yaml
from kubernetes import client
from kubernetes.client.exceptions import ApiException

from tests.e2e.cluster import Cluster, Object, wait
from tests.e2e.releases import POD_MONITOR


def binary() -> str | None:
    """Path of Prometheus; None where it is not installed."""
    return shutil.which("prometheus")


def skip_unless_possible(cluster: Cluster, address: str = "127.0.0.1") -> None:
    """Skip a case where no Prometheus can read what the chart's PodMonitor says.

    Args:
        cluster: that is to be read.
        address: where Prometheus would listen; "" where it has to be told and was not.
    """
    if binary() is None or not cluster.has_kind(*POD_MONITOR):
        pytest.skip("NOT RUN: no Prometheus is installed here, or the cluster has no kind PodMonitor")
    if not address:
        pytest.skip("NOT RUN: it needs a Prometheus here at an address that the cluster reaches (--reachable)")


def of_namespace(
    cluster: Cluster, namespace: str, folder: Path, address: str = "127.0.0.1", rules: bool = False
) -> Scraper:
    """A Prometheus that reads what the one PodMonitor of a namespace says, with the rules of its one PrometheusRule."""
    where = f"/apis/monitoring.coreos.com/v1/namespaces/{namespace}"
    (monitor,) = cluster.get(f"{where}/podmonitors")["items"]
    groups: list[Object] = []
    if rules:
        (rule,) = cluster.get(f"{where}/prometheusrules")["items"]
        groups = rule["spec"]["groups"]
    return Scraper(cluster, folder, monitor, groups, address)


def _snake(tree: Any) -> Any:
    """Keys of a Kubernetes object as Prometheus' own configuration has them: sourceLabels -> source_labels."""
    if isinstance(tree, dict):
        return {re.sub(r"(?<!^)([A-Z])", r"_\1", key).lower(): _snake(value) for key, value in tree.items()}
    return [_snake(item) for item in tree] if isinstance(tree, list) else tree


def _label(name: str) -> str:
    return "__meta_kubernetes_pod_label_" + re.sub(r"[^a-zA-Z0-9_]", "_", name)


def _credentials() -> tuple[str, Object]:
    """Address of the API server, and how Prometheus gets in, by the current kubeconfig."""
    settings: Any = client.Configuration.get_default_copy()
    inside: Object = {"tls_config": {"ca_file": settings.ssl_ca_cert}}
    if settings.cert_file:
        inside["tls_config"] |= {"cert_file": settings.cert_file, "key_file": settings.key_file}
    if token := settings.api_key.get("authorization"):
        inside["authorization"] = {"credentials": token.removeprefix("Bearer ")}
    return settings.host, inside


def _job(monitor: Object, number: int, endpoint: Mapping[str, Any], targets: Path) -> Object:
    """A scrape configuration of one endpoint of a PodMonitor."""
    address, inside = _credentials()
    namespace = monitor["metadata"]["namespace"]
    anywhere = monitor["spec"].get("namespaceSelector", {}).get("any", False)
    labels = monitor["spec"]["selector"]["matchLabels"]
    path = f"/api/v1/namespaces/${{1}}/pods/${{2}}:{endpoint['portNumber']}/proxy{endpoint['path']}"
    pod = ["__meta_kubernetes_namespace", "__meta_kubernetes_pod_name"]
    relabel: list[Object] = [
        *({"action": "keep", "source_labels": [_label(name)], "regex": re.escape(v)} for name, v in labels.items()),
        {
            "action": "keep",
            "source_labels": ["__meta_kubernetes_pod_container_port_number"],
            "regex": str(endpoint["portNumber"]),
        },
        {"action": "drop", "source_labels": ["__meta_kubernetes_pod_phase"], "regex": "(Failed|Succeeded)"},
        {"source_labels": [pod[0]], "target_label": "namespace"},
        {"source_labels": [pod[1]], "target_label": "pod"},
        {"source_labels": ["__meta_kubernetes_pod_container_name"], "target_label": "container"},
        *_snake(endpoint.get("relabelings", [])),
        {"source_labels": pod, "regex": "(.+);(.+)", "target_label": "__metrics_path__", "replacement": path},
        {"source_labels": ["__address__"], "target_label": "instance"},
        {"target_label": "__address__", "replacement": urlsplit(address).netloc},
    ]
    if not anywhere:
        relabel.insert(0, {"action": "keep", "source_labels": [pod[0]], "regex": re.escape(namespace)})
    return {
        "job_name": f"{namespace}/{monitor['metadata']['name']}/{number}",
        "scheme": urlsplit(address).scheme,
        "scrape_interval": endpoint["interval"],
        "file_sd_configs": [{"files": [str(targets)], "refresh_interval": "2s"}],
        "relabel_configs": relabel,
        **inside,
    }


class Scraper:
    """Prometheus, while the block runs.

    Args:
        cluster: whose pods it reads.
        folder: for its files.
        monitor: a PodMonitor of the chart, as the cluster has it.
        rules: `spec.groups` of its PrometheusRule.
        address: where it listens.
    """

    def __init__(
        self, cluster: Cluster, folder: Path, monitor: Object, rules: list[Object], address: str = "127.0.0.1"
    ) -> None:
        found = binary()
        assert found is not None
        endpoints = monitor["spec"]["podMetricsEndpoints"]
        self._cluster, self._targets, self._ended = cluster, folder / "targets.json", threading.Event()
        self._look()
        (folder / "rules.yml").write_text(yaml.safe_dump({"groups": rules}))
        (folder / "prometheus.yml").write_text(
            yaml.safe_dump(
                {
                    "global": {"scrape_interval": "5s", "evaluation_interval": "5s"},
                    "rule_files": [str(folder / "rules.yml")],
                    "scrape_configs": [
                        _job(monitor, n, endpoint, self._targets) for n, endpoint in enumerate(endpoints)
                    ],
                }
            )
        )
        with socket.socket() as free:
            free.bind((address, 0))
            port = free.getsockname()[1]
        self.url = f"http://{address}:{port}"
        self._log = (folder / "log").open("w+")
        self._process = subprocess.Popen(
            [
                found,
                f"--config.file={folder}/prometheus.yml",
                f"--storage.tsdb.path={folder}/data",
                f"--web.listen-address={address}:{port}",
            ],
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        self._discovery = threading.Thread(target=self._discover, daemon=True)
        self._discovery.start()
        wait("Prometheus", self._up, 60)

    def _look(self) -> None:
        """Write the targets that Prometheus' discovery of pods would find."""
        found = []
        for pod in self._cluster.core.list_pod_for_all_namespaces().items:
            about = {
                "__meta_kubernetes_namespace": pod.metadata.namespace,
                "__meta_kubernetes_pod_name": pod.metadata.name,
                "__meta_kubernetes_pod_phase": pod.status.phase,
                **{_label(name): value for name, value in (pod.metadata.labels or {}).items()},
            }
            for container in pod.spec.containers:
                for port in container.ports or [] if pod.status.pod_ip else []:
                    at = {
                        "__meta_kubernetes_pod_container_name": container.name,
                        "__meta_kubernetes_pod_container_port_number": str(port.container_port),
                    }
                    found.append({"targets": [f"{pod.status.pod_ip}:{port.container_port}"], "labels": about | at})
        new = self._targets.with_suffix(".new")
        new.write_text(json.dumps(found))
        new.replace(self._targets)

    def _discover(self) -> None:
        while not self._ended.wait(2):
            with contextlib.suppress(ApiException, OSError):
                self._look()

    def _up(self) -> bool:
        assert self._process.poll() is None, Path(self._log.name).read_text()[-2000:]
        try:
            return httpx.get(f"{self.url}/-/ready", trust_env=False).status_code == 200
        except httpx.TransportError:
            return False

    def get(self, path: str, **parameters: str) -> Any:
        """The data of an answer of its API.

        Raises:
            AssertionError: it refuses, such as a query that does not parse.
        """
        body = httpx.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=30, trust_env=False).json()
        assert body["status"] == "success", body
        return body["data"]

    def query(self, expression: str) -> list[Object]:
        """Series of an instant query that have a number."""
        data = self.get("query", query=expression)
        rows: list[Object] = data["result"] if data["resultType"] == "vector" else [{"value": data["result"]}]
        return [row for row in rows if row["value"][1] != "NaN"]

    def stop(self) -> None:
        """End it."""
        self._ended.set()
        self._discovery.join(30)
        self._process.terminate()
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()
