"""Runs the real helm and reads what it renders."""

from __future__ import annotations

import copy
import functools
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "charts" / "kserve-vllm"
CATALOGUE = ROOT / "inferenceservices"
GOLDEN = Path(__file__).parent / "golden"
CI_FILES = sorted((CHART / "ci").glob("*-values.yaml"))
CRDS = Path(os.environ.get("KSERVE_VLLM_CRDS", ROOT.parent / "shared" / "crds"))
NAMESPACE = "models"

Document = dict[str, Any]


class HelmError(Exception):
    """Helm refused; the text is what it printed."""


class _CoreLoader(yaml.CSafeLoader):
    """YAML as Kubernetes reads it, and quick enough for the schemas of megabytes. A key twice in one map is refused, as
    Flux and kustomize refuse it: the API server would keep the last one without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        if twice := {key for key in keys if keys.count(key) > 1}:
            raise yaml.constructor.ConstructorError(None, None, f"found {sorted(twice)} twice", node.start_mark)
        return super().construct_mapping(node, deep)


# Lists of Kubernetes whose items have a key, by the field's name; the API server refuses an item twice.
LIST_KEYS: dict[str, tuple[str, ...]] = {
    "containers": ("name",),
    "env": ("name",),
    "imagePullSecrets": ("name",),
    "initContainers": ("name",),
    "ports": ("containerPort", "port", "protocol"),
    "resourceClaims": ("name",),
    "secrets": ("name",),
    "topologySpreadConstraints": ("topologyKey", "whenUnsatisfiable"),
    "volumeMounts": ("mountPath",),
    "volumes": ("name",),
}


def listed_twice(node: Any, at: str = "") -> list[str]:
    """Where a list with keys names an item twice."""
    found: list[str] = []
    if isinstance(node, dict):
        for name, child in node.items():
            if name in LIST_KEYS and isinstance(child, list) and all(isinstance(item, dict) for item in child):
                keys = [tuple(item.get(part) for part in LIST_KEYS[name]) for item in child]
                found += [f"{at}.{name}: {key} twice" for key in sorted(set(keys), key=str) if keys.count(key) > 1]
            found += listed_twice(child, f"{at}.{name}")
    elif isinstance(node, list):
        for index, child in enumerate(node):
            found += listed_twice(child, f"{at}[{index}]")
    return found


def load_all(text: str) -> list[Document]:
    """The documents of a YAML stream, without empty ones; raises where a key, or an item of a keyed list, is twice."""
    documents = [document for document in yaml.load_all(text, Loader=_CoreLoader) if document]
    if twice := listed_twice(documents):
        raise yaml.constructor.ConstructorError(None, None, "; ".join(twice), None)
    return documents


def load(path: Path) -> Any:
    """One YAML document from a file."""
    return yaml.load(path.read_text(encoding="utf-8"), Loader=_CoreLoader)


def tool(name: str) -> str:
    """The repository's own helm or kubectl, or else the one on PATH."""
    own = ROOT / ".tools" / "bin" / name
    found = str(own) if own.exists() else shutil.which(name)
    if found is None:
        raise HelmError(f"{name} is missing; run: python tests/tools/install_kube_tools.py")
    return found


def helm(*arguments: str, stdin: str | None = None, program: str = "helm") -> str:
    """What helm (or `program`, such as helm3) prints; raises HelmError when it fails."""
    # A start takes a tenth of a second; without collecting garbage, a fifth less.
    environ = {**os.environ, "GOGC": "off"}
    done = subprocess.run(
        [tool(program), *arguments], input=stdin, capture_output=True, text=True, check=False, env=environ
    )
    if done.returncode:
        raise HelmError(done.stderr.strip())
    return done.stdout


def render_text(values: Mapping[str, Any], *arguments: str) -> str:
    """What the chart renders from `values`, as helm prints it; rendered once for the same values and arguments."""
    return _rendered(yaml.safe_dump(dict(values)), arguments)


@functools.cache
def _rendered(values: str, arguments: tuple[str, ...]) -> str:
    return helm("template", "release", str(CHART), "--namespace", NAMESPACE, "--values", "-", *arguments, stdin=values)


def render(values: Mapping[str, Any], *arguments: str) -> list[Document]:
    """The objects that the chart renders from `values`."""
    return load_all(render_text(values, *arguments))


def render_ci(path: Path) -> tuple[Document, ...]:
    """The objects that the chart renders from one ci file, rendered once; the caller's own, to change as it likes."""
    return copy.deepcopy(_rendered_ci(path))


@functools.cache
def _rendered_ci(path: Path) -> tuple[Document, ...]:
    return tuple(render(load(path) or {}))


def refused(values: Mapping[str, Any]) -> str:
    """The sentences, a line each, with which the chart refuses `values`; raises when it takes them."""
    try:
        render(values)
    except HelmError as error:
        text = str(error)
    else:
        raise AssertionError(f"the chart takes {values}")
    sentences = re.search(r"execution error at \(.*?\):(.*?)(?:Use --debug|$)", text, re.DOTALL)
    lines = (sentences.group(1) if sentences else text).splitlines()
    return "\n".join(line.strip() for line in lines if line.strip())


def of_kind(documents: Sequence[Document], kind: str) -> dict[str, Document]:
    """The objects of a kind, by name."""
    return {d["metadata"]["name"]: d for d in documents if d["kind"] == kind}


def default_runtimes() -> dict[str, Document]:
    """The ClusterServingRuntimes that the chart's defaults write, by name."""
    return of_kind(render_ci(CHART / "ci" / "default-values.yaml"), "ClusterServingRuntime")


def chart_flags(manifest: Path) -> tuple[str, ...]:
    """What a manifest of the catalogue asks of the chart beyond its defaults: the flags of its line `# Chart: `."""
    lines = [line for line in manifest.read_text().splitlines() if line.startswith("# Chart: ")]
    return tuple(word for line in lines for word in shlex.split(line.removeprefix("# Chart: ")))


@functools.cache
def runtimes_by_flags(flags: tuple[str, ...]) -> dict[str, Document]:
    """The ClusterServingRuntimes that the chart writes with these flags, by name."""
    return of_kind(render({}, *flags), "ClusterServingRuntime") if flags else default_runtimes()


def runtime_of(manifest: Path, isvc: Document) -> Document:
    """The runtime that an InferenceService of a manifest of the catalogue names."""
    return runtimes_by_flags(chart_flags(manifest))[isvc["spec"]["predictor"]["model"]["runtime"]]


def runtimes_of(documents: Sequence[Document]) -> dict[str, Document]:
    """The runtimes for a render's InferenceServices, by name: its own, and another release's where it has none."""
    own = of_kind(documents, "ClusterServingRuntime") | of_kind(documents, "ServingRuntime")
    return own or default_runtimes()


def service(**values: Any) -> Document:
    """Values with one InferenceService `chat` on a fetched model."""
    return {"inferenceServices": {"chat": {"storageUri": "hf://org/model", **values}}}


def standard(**values: Any) -> Document:
    """The same in Standard mode."""
    return service(deploymentMode="Standard", **values)


def predictor(values: Mapping[str, Any], name: str = "chat") -> Document:
    """The predictor that is rendered for `name`."""
    spec: Document = of_kind(render(values), "InferenceService")[name]["spec"]["predictor"]
    return spec
