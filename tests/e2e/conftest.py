"""Runs the chart and the image on the cluster of the current kubeconfig; everything it makes is removed at the end.

E2E_IMAGE=HOST/REPOSITORY:VERSION-cpu pytest tests/e2e --gateway http://ADDRESS

Not part of `make test`: it needs a cluster with KServe. Namespaces and releases are called e2e-RUN-..., RUN being four
digits of its own; `--keep` leaves them for looking, `--clean` removes what runs that were killed have left, and ends.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import secrets
import signal
import subprocess
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from kubernetes.client.exceptions import ApiException

from tests.e2e.cluster import RUN_LABEL, Cluster, wait
from tests.e2e.releases import Release, Values, helm
from tests.e2e.results import FOLDER, Results
from tests.e2e.traffic import Target

_CASE_WITHIN_S = 900
_FIGURES = pytest.StashKey[dict[str, Any]]()
_SUITE = pytest.StashKey["Suite"]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("e2e", "a real cluster")
    group.addoption(
        "--gateway",
        default=os.environ.get("E2E_GATEWAY", ""),
        help="URL of the gateway, by which hosts of services are reached",
    )
    group.addoption(
        "--knative-gateway",
        default=os.environ.get("E2E_KNATIVE_GATEWAY", ""),
        help="the same of Knative's ingress, if it is another one",
    )
    group.addoption(
        "--versions",
        default=os.environ.get("E2E_VERSIONS", ""),
        help="kserve=0.20.0,knative=1.21: what the cluster does not tell",
    )
    group.addoption(
        "--results",
        type=Path,
        default=Path(os.environ.get("E2E_RESULTS", FOLDER / "cluster.json")),
        help="file of results",
    )
    group.addoption("--streams", type=int, default=2000, help="streams of which none may be cut, in each mode")
    group.addoption("--stream-minutes", type=float, default=0, help="how long one stream has to last; 0: not tried")
    group.addoption(
        "--released-chart",
        default=os.environ.get("E2E_RELEASED_CHART", ""),
        help="the chart as it was last released: folder, archive or oci://",
    )
    group.addoption("--redis", default=os.environ.get("E2E_REDIS", ""), help="URL of a Redis that pods reach")
    group.addoption(
        "--reachable",
        default=os.environ.get("E2E_REACHABLE", ""),
        help="an address of this machine that the cluster reaches: the suite's Prometheus listens there for KEDA",
    )
    group.addoption("--note", default="", help="what a reader of the results has to know of this cluster")
    group.addoption("--keep", action="store_true", help="leave everything in place at the end")
    group.addoption("--clean", action="store_true", help="remove what earlier runs have left, run nothing")


@dataclass
class Suite:
    """What a run holds."""

    cluster: Cluster
    image: str
    gateways: dict[str, str]
    results: Results
    keep: bool
    releases: list[Release] = field(default_factory=list)
    namespaces: list[str] = field(default_factory=list)
    cleaned: bool = False

    def namespace(self, name: str, labels: Mapping[str, str] | None = None) -> str:
        """A new namespace of this run."""
        full = f"e2e-{self.cluster.run}-{name}"
        self.namespaces.append(full)
        return self.cluster.make_namespace(full, labels)

    def release(self, name: str, namespace: str, values: Values) -> Release:
        """A release of this run, not installed yet."""
        made = Release(f"e2e-{self.cluster.run}-{name}", namespace, self.image, values)
        self.releases.append(made)
        return made

    def target(self, namespace: str, name: str, headers: Mapping[str, str] | None = None) -> Target:
        """An InferenceService behind its gateway."""
        thing = self.cluster.isvc(namespace, name)
        mode = thing["metadata"]["annotations"]["serving.kserve.io/deploymentMode"]
        return Target(self.gateways[mode], self.cluster.host(namespace, name), name, dict(headers or {}))

    def clean(self) -> None:
        """Remove every release and namespace of this run; complains of what stays."""
        if self.keep or self.cleaned:
            return
        self.cleaned = True
        left = []
        for release in reversed(self.releases):
            try:
                release.uninstall()
            except (AssertionError, subprocess.TimeoutExpired) as error:
                left.append(f"release {release.name}: {error}")
        left += remove_namespaces(self.cluster, self.namespaces)
        for release in self.releases:
            self.cluster.delete_what_is_left_of(release.name)
            left += [f"{release.name}: {what}" for what in self.cluster.left_of_release(release.name)]
        if left:
            raise AssertionError("not removed:\n" + "\n".join(left))


def remove_namespaces(cluster: Cluster, names: list[str]) -> list[str]:
    """Delete namespaces and wait until they are gone; those that are not."""
    for name in names:
        for thing in cluster.isvcs(name):
            # First what has a controller that cleans up after it, and that the namespace's end could overtake.
            with contextlib.suppress(ApiException):
                cluster.delete(thing, name)

    def gone(name: str) -> bool:
        # Pods too: the namespace controller looks again only after half the grace period of one that it finds.
        return not cluster.isvcs(name) and not cluster.core.list_namespaced_pod(name).items

    for name in names:
        with contextlib.suppress(ApiException, AssertionError):
            wait(f"{name} without services and pods", functools.partial(gone, name), 60)
        with contextlib.suppress(ApiException):
            cluster.core.delete_namespace(name)

    def there() -> list[str]:
        return [n.metadata.name for n in cluster.core.list_namespace().items if n.metadata.name in names]

    with contextlib.suppress(AssertionError):
        wait("namespaces gone", lambda: not there(), 240)
    return [f"namespace {name}" for name in there()]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs(what): skipped, and said so, where the cluster lacks it")
    # A job that is cancelled cleans up too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(_CASE_WITHIN_S, func_only=False))


def pytest_sessionstart(session: pytest.Session) -> None:
    config = session.config
    if config.option.collectonly:
        return
    said = dict(pair.split("=", 1) for pair in config.option.versions.split(",") if pair)
    cluster = Cluster(secrets.token_hex(2), said)
    if config.option.clean:
        _clean_all(cluster)
        pytest.exit("removed what earlier runs had left", returncode=0)
    if not cluster.found.kserve:
        pytest.exit("the cluster of the current kubeconfig has no KServe", returncode=2)
    image = os.environ.get("E2E_IMAGE", "")
    if not image:
        pytest.exit(
            "E2E_IMAGE names no image: HOST/REPOSITORY:VERSION-cpu, one that the cluster's nodes have or can pull",
            returncode=2,
        )
    gateway = config.option.gateway or _gateway(cluster)
    gateways = {"Standard": gateway, "Knative": config.option.knative_gateway or gateway}
    results = Results(config.option.results, cluster.found.versions(), image, config.option.note)
    config.stash[_SUITE] = Suite(cluster, image, gateways, results, config.option.keep)


def _gateway(cluster: Cluster) -> str:
    """Address of KServe's Gateway, by its status."""
    gateways = cluster.get("/apis/gateway.networking.k8s.io/v1/gateways") or {"items": []}
    for gateway in gateways["items"]:
        for address in gateway.get("status", {}).get("addresses", []):
            return f"http://{address['value']}"
    pytest.exit("no Gateway has an address; name one: --gateway http://ADDRESS", returncode=2)


def _clean_all(cluster: Cluster) -> None:
    names = [n.metadata.name for n in cluster.core.list_namespace(label_selector=RUN_LABEL).items]
    for release in {label for label in cluster.releases_outside() if re.match(r"e2e-[0-9a-f]{4}-", label)}:
        # A run that was killed has left what helm was told to keep.
        cluster.delete_what_is_left_of(release)
    releases = [(name, release) for name in names for release in helm("list", "--namespace", name, "--short").split()]
    for name, release in releases:
        helm("uninstall", release, "--namespace", name, "--wait", "--timeout", "180s")
        cluster.delete_what_is_left_of(release)
    if left := remove_namespaces(cluster, names):
        pytest.exit(f"not removed: {left}", returncode=1)


@pytest.hookimpl(wrapper=True)
def pytest_sessionfinish(session: pytest.Session) -> Generator[None, None, None]:
    """After the fixtures' ends, also after ^C."""
    try:
        yield
    finally:
        suite = session.config.stash.get(_SUITE, None)
        if suite is not None:
            # A second ^C does not end the cleaning.
            before = signal.signal(signal.SIGINT, signal.SIG_IGN)
            try:
                suite.clean()
            finally:
                signal.signal(signal.SIGINT, before)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    suite = item.config.stash.get(_SUITE, None)
    if suite is not None and (report.when == "call" or report.outcome != "passed"):
        figures: dict[str, Any] = item.stash.get(_FIGURES, {})
        case = item.nodeid.removeprefix("tests/e2e/").replace(".py::", "::")
        reason = ""
        if report.skipped and isinstance(report.longrepr, tuple):
            reason = report.longrepr[2].removeprefix("Skipped: ")
        elif report.failed:
            reason = str(call.excinfo.value).split("\n")[0][:300] if call.excinfo else ""
        suite.results.write(case, report.outcome, report.duration, figures, reason)
    return report


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    suite = config.stash.get(_SUITE, None)
    if suite is None:
        return
    terminalreporter.section("the cluster, and what it has shown")
    terminalreporter.line(
        ", ".join(f"{name} {what or 'none'}" for name, what in suite.cluster.found.versions().items())
    )
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            terminalreporter.line(f"{report.nodeid.partition('::')[2]}: {name}: {value}")
    for report in terminalreporter.getreports("skipped"):
        why = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
        terminalreporter.line(f"NOT RUN {report.nodeid.partition('::')[2]}: {why}", yellow=True)
    terminalreporter.line(f"results: {suite.results.path}")


Record = Callable[[str, Any], None]


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Record:
    """Puts down a figure of the case: words for it, and what was seen."""
    figures = request.node.stash.setdefault(_FIGURES, {})

    def put(name: str, value: Any) -> None:
        figures[name] = round(value, 2) if isinstance(value, float) else value
        request.node.user_properties.append((name, figures[name]))

    return put


@pytest.fixture(scope="session")
def suite(request: pytest.FixtureRequest) -> Suite:
    """This run."""
    return request.config.stash[_SUITE]


@pytest.fixture(scope="session")
def cluster(suite: Suite) -> Cluster:
    """The cluster."""
    return suite.cluster


_HAS: Mapping[str, tuple[Callable[[Cluster], bool], str]] = {
    "knative": (lambda c: bool(c.found.knative), "the cluster has no Knative Serving"),
    "gateway": (lambda c: c.found.gateway_api, "KServe does not use the Gateway API here"),
    "gpu": (lambda c: c.found.gpus > 0, "no node has a GPU"),
    "keda": (lambda c: c.found.keda, "KEDA does not run here"),
    "prometheus": (lambda c: c.found.prometheus_operator, "Prometheus' operator does not run here"),
    "metrics": (lambda c: c.found.resource_metrics, "nothing serves metrics.k8s.io, so an HPA sees no load"),
    "nodes": (lambda c: c.found.nodes > 1, "the cluster has one node"),
}


@pytest.fixture(autouse=True)
def _needs(request: pytest.FixtureRequest) -> None:
    for mark in request.node.iter_markers("needs"):
        for what in mark.args:
            has, why = _HAS[what]
            if not has(request.getfixturevalue("cluster")):
                pytest.skip(f"NOT RUN: {why}")


@pytest.fixture(scope="session")
def inside(suite: Suite) -> Iterator[Callable[..., str]]:
    """Runs a Python program in a pod of the cluster, with the image's packages: `inside(source, *arguments)`."""
    namespace = suite.namespace("inside")
    secure = {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
        "runAsNonRoot": True,
        "runAsUser": 1000,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    container = {
        "name": "inside",
        "image": suite.image,
        "imagePullPolicy": "IfNotPresent",
        "securityContext": secure,
        "command": ["python3", "-c", "import time; time.sleep(7200)"],
        "resources": {"requests": {"cpu": "10m", "memory": "64Mi"}},
    }
    spec = {
        "containers": [container],
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 1,
        "automountServiceAccountToken": False,
    }
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "inside"}, "spec": spec}
    suite.cluster.core.create_namespaced_pod(namespace, pod)
    began = time.monotonic()
    wait(
        "a pod to ask from",
        lambda: suite.cluster.core.read_namespaced_pod("inside", namespace).status.phase == "Running",
        300,
        seen=lambda: str(suite.cluster.core.read_namespaced_pod("inside", namespace).status)[:2000],
    )
    print(f"a pod to ask from: {time.monotonic() - began:.1f} s")

    def run(source: str, *arguments: str) -> str:
        return suite.cluster.execute(namespace, "inside", ["python3", "-c", source, *arguments])

    yield run
    if not suite.keep:
        suite.cluster.core.delete_namespaced_pod("inside", namespace, grace_period_seconds=1)
