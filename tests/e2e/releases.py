"""Releases of the chart by helm, with values small enough for a laptop."""

from __future__ import annotations

import copy
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "charts" / "kserve-vllm"
SCENARIOS = sorted((CHART / "ci").glob("*-values.yaml"))
CATALOGUE = ROOT / "inferenceservices"
MODEL = "/opt/kserve-vllm/lib/python3.11/site-packages/kserve_vllm/demo/model"
"""The demo model inside the image; a second, smaller one with the same tokenizer lies beside it."""
OTHER_MODEL = MODEL.removesuffix("model") + "draft"

Values = dict[str, Any]

POD_MONITOR = ("monitoring.coreos.com/v1", "PodMonitor")
"""Version and kind that a cluster has to have for `MONITORED`, the chart's `monitoring` block."""
MONITORED: Values = {
    "podMonitor": {"enabled": True, "interval": "5s", "anyNamespace": False},
    "prometheusRule": {"enabled": True},
}


class HelmFailed(AssertionError):
    """Helm ended with another code than 0; the text is what it wrote."""


def tool(name: str) -> str:
    """The repository's own helm, or else the one on PATH."""
    own = ROOT / ".tools" / "bin" / name
    found = str(own) if own.exists() else shutil.which(name)
    if found is None:
        raise HelmFailed(f"{name} is missing; run: python tests/tools/install_kube_tools.py")
    return found


def helm(*arguments: str, values: Mapping[str, Any] | None = None, within_s: float = 300) -> str:
    """What helm prints."""
    command = [tool("helm"), *arguments, *(["--values", "-"] if values is not None else [])]
    done = subprocess.run(
        command,
        input=yaml.safe_dump(dict(values)) if values is not None else None,
        capture_output=True,
        text=True,
        check=False,
        timeout=within_s,
    )
    if done.returncode:
        raise HelmFailed(f"helm {' '.join(arguments)}:\n{done.stderr.strip()}\n{done.stdout.strip()}")
    return done.stdout


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> Values:
    """`base` with what `over` changes, block by block, as helm lays values over each other."""
    result = copy.deepcopy(dict(base))
    for key, value in over.items():
        below = result.get(key)
        result[key] = (
            merged(below, value) if isinstance(below, dict) and isinstance(value, Mapping) else copy.deepcopy(value)
        )
    return result


def image_values(image: str) -> Values:
    """The chart's `image` block for `HOST/REPOSITORY:TAG-cpu`."""
    path, _, tag = image.rpartition(":")
    registry, _, repository = path.partition("/")
    if not (registry and repository and tag.endswith("-cpu")):
        raise ValueError(f"E2E_IMAGE must be HOST/REPOSITORY:VERSION-cpu, not {image!r}: the chart writes images so")
    return {"registry": registry, "repository": repository, "tag": tag.removesuffix("-cpu")}


def small(**changes: Any) -> Values:
    """An InferenceService of the demo model in a pod that two cores carry several of."""
    return merged(
        {
            "device": "cpu",
            "demo": True,
            "extraArgs": ["--enforce-eager"],
            "resources": {"requests": {"cpu": "100m", "memory": "1536Mi"}, "limits": {"memory": "4Gi"}},
            # Threads that are bound to cores would all be bound to the same ones.
            "env": [
                {"name": "VLLM_CPU_KVCACHE_SPACE", "value": "1"},
                {"name": "VLLM_CPU_OMP_THREADS_BIND", "value": "nobind"},
            ],
        },
        changes,
    )


def of_model(path: str, **changes: Any) -> Values:
    """The same of a model in a folder of the image."""
    return merged(small(demo=False, model=path), changes)


class Release:
    """A release of the chart in a namespace.

    Args:
        name: of the release; its runtimes bear it too, so that it gets into nobody's way.
        image: `HOST/REPOSITORY:TAG-cpu`.
        values: over the defaults.
    """

    def __init__(self, name: str, namespace: str, image: str, values: Mapping[str, Any]) -> None:
        self.name, self.namespace = name, namespace
        given = values.get("runtimes") or {}
        kinds = [kind for kind in ("cpu", "gpu", "multinode") if (given.get(kind) or {}).get("enabled", True)]
        # A name of a runtime that is not written is refused.
        runtimes = {kind: {"name": f"{name}-{kind}"} for kind in kinds if given.get("enabled", True)}
        self._base: Values = {"image": image_values(image), "runtimes": runtimes}
        self.values = merged(self._base, values)
        self.installed = False

    def install(self, chart: str = str(CHART)) -> float:
        """Install it; the seconds that took, without the pods."""
        began = time.monotonic()
        self.installed = True
        helm("install", self.name, chart, "--namespace", self.namespace, values=self.values)
        return time.monotonic() - began

    def upgrade(self, changes: Mapping[str, Any] | None = None, chart: str = str(CHART)) -> None:
        """Upgrade it to its values with `changes` over them, which stay for later upgrades."""
        self.values = merged(self.values, changes or {})
        helm("upgrade", self.name, chart, "--namespace", self.namespace, values=self.values)

    def test(self, within_s: float = 300) -> str:
        """`helm test`; what it and its pods print."""
        return helm(
            "test",
            self.name,
            "--namespace",
            self.namespace,
            "--logs",
            "--timeout",
            f"{within_s:g}s",
            within_s=within_s + 60,
        )

    def uninstall(self) -> None:
        """Take it away, if it is there."""
        if self.installed:
            helm(
                "uninstall",
                self.name,
                "--namespace",
                self.namespace,
                "--ignore-not-found",
                "--wait",
                "--timeout",
                "180s",
            )
            self.installed = False
