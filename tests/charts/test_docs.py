"""The schema and the README are what the generator makes of values.yaml, and every value does something."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.charts.support import CHART, CI_FILES, ROOT, HelmError, load, render

GENERATOR = ROOT / "runtime" / "tools" / "gen_chart_docs.py"


def generate(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(GENERATOR), *arguments], capture_output=True, text=True, check=False)


@pytest.fixture
def copy_of_chart(tmp_path: Path) -> Path:
    chart = tmp_path / "chart"
    shutil.copytree(CHART, chart)
    return chart


def test_the_schema_and_the_readme_are_up_to_date() -> None:
    done = generate("--check")
    assert done.returncode == 0, done.stderr


def test_a_change_of_values_is_noticed(copy_of_chart: Path) -> None:
    values = copy_of_chart / "values.yaml"
    values.write_text(values.read_text().replace("pullPolicy: IfNotPresent", "pullPolicy: Always"))
    done = generate("--check", "--chart", str(copy_of_chart))
    assert done.returncode == 1
    assert "README.md is out of date" in done.stderr
    assert generate("--chart", str(copy_of_chart)).returncode == 0
    assert generate("--check", "--chart", str(copy_of_chart)).returncode == 0
    assert '`"Always"`' in (copy_of_chart / "README.md").read_text()


@pytest.mark.parametrize(
    ("addition", "said"),
    [
        ("\nnew: 1\n", "new has no description"),
        ("\n# -- New.\nnew: null\n", "new is null by default; its @schema must have a type"),
        ("\n# -- New.\nnew: []\n", "new is a list; its @schema must have items"),
        ("\n# -- New.\nnew: {}\n", "new is an empty map; its @schema must say what may be in it"),
    ],
    ids=["no comment", "null", "list", "map"],
)
def test_a_value_that_says_too_little_is_refused(copy_of_chart: Path, addition: str, said: str) -> None:
    values = copy_of_chart / "values.yaml"
    values.write_text(values.read_text() + addition)
    done = generate("--chart", str(copy_of_chart))
    assert done.returncode == 1
    assert said in done.stderr


def objects(schema: Any, at: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every schema of an object, with where it is."""
    if isinstance(schema, dict):
        if schema.get("type") == "object":
            yield at, schema
        for key, child in schema.items():
            yield from objects(child, f"{at}/{key}")
    elif isinstance(schema, list):
        for index, child in enumerate(schema):
            yield from objects(child, f"{at}/{index}")


def test_no_object_of_the_schema_takes_any_key() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    # vLLM's own config, checked by vLLM's parser; parts of Kubernetes' API, checked by its server; Helm's own.
    free = {
        "/properties/global",
        "/definitions/inferenceServiceDefaults/properties/speculative",
        "/definitions/inferenceServiceDefaults/properties/affinity/additionalProperties",
        "/definitions/inferenceServiceDefaults/properties/topologySpreadConstraints/items/properties/labelSelector",
    }
    open_objects = {at for at, schema in objects(schema) if schema.get("additionalProperties", True) is True}
    assert open_objects == free


def leaves(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths of everything that is set in a tree of maps."""
    if isinstance(node, dict) and node:
        for key, child in node.items():
            yield from leaves(child, (*path, str(key)))
    else:
        yield path


ENTRIES = {
    "inferenceServices": "inferenceServiceDefaults",
    "serviceAccounts": "serviceAccountDefaults",
    "routes": "routeDefaults",
    "modelCaches": "modelCacheDefaults",
}


def documented(path: tuple[str, ...]) -> tuple[str, ...]:
    """The path in values.yaml that documents a path in a scenario: entries are described by their defaults."""
    return (ENTRIES[path[0]], *path[2:]) if path[0] in ENTRIES else path


def without(values: Any, path: tuple[str, ...]) -> Any:
    """A copy of `values` without one leaf."""
    changed = copy.deepcopy(values)
    node = changed
    for key in path[:-1]:
        node = node[key]
    del node[path[-1]]
    return changed


def show(values: Any) -> object:
    try:
        return render(values)
    except HelmError as error:
        return str(error)


def defaults() -> set[tuple[str, ...]]:
    return {path for path in leaves(load(CHART / "values.yaml")) if path[0] not in ENTRIES}


# Values that show in NOTES alone, which a render does not have, or that a default already says.
SILENT = {("cluster", "gatewayAPI"), ("image", "tag"), ("cluster", "knativeNamespace")}


def scenarios() -> Iterator[tuple[Any, tuple[str, ...]]]:
    for path in CI_FILES:
        values = load(path) or {}
        for leaf in leaves(values):
            if leaf:
                yield values, leaf


def changed(default: Any) -> Any:
    """Another value of the same type."""
    if isinstance(default, bool):
        return not default
    if isinstance(default, int | float):
        return default + 1
    return None


def test_every_value_that_a_scenario_sets_does_something() -> None:
    idle = set()
    shown: dict[int, object] = {}
    for values, leaf in scenarios():
        before = shown.setdefault(id(values), show(values))
        if show(without(values, leaf)) == before:
            idle.add(documented(leaf))
    # A switch or number that equals its default is set for the reader; no other may be idle.
    known = {("inferenceServiceDefaults", "canary", "replicas")}
    assert idle - SILENT - known <= {p for p in idle if p in EQUAL_TO_DEFAULT}, idle


# Set in a scenario at the value of the default, to be read there.
EQUAL_TO_DEFAULT: set[tuple[str, ...]] = set()


def test_every_value_changes_something_or_is_in_a_scenario() -> None:
    """Each documented value is set in a scenario, or a change of its default changes what is rendered."""
    set_somewhere = set()
    for _, leaf in scenarios():
        path = documented(leaf)
        set_somewhere |= {path[:length] for length in range(1, len(path) + 1)}
    tree = load(CHART / "values.yaml")
    unused = []
    base = render({})
    for path in sorted(defaults() - set_somewhere):
        if path in SILENT:
            continue
        node = tree
        for key in path:
            node = node[key]
        other = changed(node) if not isinstance(node, str) else REPLACEMENTS.get(path)
        values: Any = other
        for key in reversed(path):
            values = {key: values}
        if other is None or render(values) == base:
            unused.append(".".join(path))
    assert not unused


REPLACEMENTS = {
    ("runtimes", "tmpSizeLimit"): "1Gi",
    ("runtimes", "gpu", "sharedMemory"): "1Gi",
    ("runtimes", "cpu", "sharedMemory"): "2Gi",
    ("runtimes", "multinode", "sharedMemory"): "1Gi",
    **{("runtimes", kind, "name"): "other" for kind in ("gpu", "cpu", "multinode")},
    **{("runtimes", kind, "requests", "cpu"): "9" for kind in ("gpu", "cpu", "multinode")},
    **{("runtimes", kind, "requests", "memory"): "9Gi" for kind in ("gpu", "cpu", "multinode")},
}
