"""The schema, the README and the defaults are what the generator makes of values.yaml."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.charts.support import CHART, ROOT, Document, load, render

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
        ("\n# -- New.\nnew: {}\n", "new is an empty map; its @schema must say what is in it"),
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
        if schema.get("type") == "object" or "object" in (schema.get("type") or ()):
            yield at, schema
        for key, child in schema.items():
            yield from objects(child, f"{at}/{key}")
    elif isinstance(schema, list):
        for index, child in enumerate(schema):
            yield from objects(child, f"{at}/{index}")


def test_no_object_of_the_schema_takes_any_key() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    # vLLM's own config, checked by vLLM's parser; parts of Kubernetes' API, checked by the templates; Helm's own.
    free = {
        "/properties/global",
        *(
            f"/definitions/{name}"
            for name in ("affinityTerms", "anyObject", "wholeObject", "container", "envFrom", "volume", "volumeMount")
        ),
        *(f"/properties/runtimes/properties/{kind}/properties/securityContext" for kind in ("cpu", "gpu", "multinode")),
        "/definitions/container/properties/env/items",
        "/definitions/extraRuntimeDefaults/properties/securityContext",
        "/definitions/engineRuntimeDefaults/properties/securityContext",
        "/definitions/inferenceServiceDefaults/properties/speculative",
        "/definitions/inferenceServiceDefaults/properties/topologySpreadConstraints/items/properties/labelSelector",
    }
    open_objects = {at for at, schema in objects(schema) if schema.get("additionalProperties", True) is True}
    assert open_objects == free


def values_in_docs() -> Iterator[Any]:
    """Every block of the documentation that is values of the chart, as a parameter with its file for a name."""
    tops = load(CHART / "values.yaml").keys()
    pages = [ROOT / "README.md", CHART / "README.md", ROOT / "inferenceservices" / "README.md"]
    for page in [*pages, *sorted((ROOT / "docs").rglob("*.md"))]:
        text = page.read_text()
        blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        blocks += re.findall(r"^\$ cat \S*values\S*\n(.*?)(?=^\$ |^```)", text, re.MULTILINE | re.DOTALL)
        for block in blocks:
            try:
                values = yaml.safe_load(block)
            except yaml.YAMLError:
                continue
            if isinstance(values, dict) and values.keys() and values.keys() <= tops:
                yield pytest.param(values, id=f"{page.relative_to(ROOT)}: {' '.join(values)}")


@pytest.mark.parametrize("values", list(values_in_docs()))
def test_values_in_the_documentation_are_taken(values: Document) -> None:
    for service in values.get("inferenceServices", {}).values():
        if not service.keys() & {"storageUri", "storage", "model", "demo"}:
            service["storageUri"] = "hf://org/model"
    assert render(values)


def test_there_are_values_in_the_documentation() -> None:
    assert len(list(values_in_docs())) > 3
