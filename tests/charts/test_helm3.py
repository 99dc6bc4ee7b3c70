"""Helm 3 makes of every scenario what Helm 4 does, takes it, refuses the same values, and reads null in the same way.

The version is the oldest that the chart's README promises (tests/tools/install_kube_tools.py).
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from tests.charts.support import (
    CHART,
    CI_FILES,
    NAMESPACE,
    ROOT,
    Document,
    HelmError,
    helm,
    load,
    load_all,
    of_kind,
    render,
    render_ci,
    service,
)


def helm3(*arguments: str, stdin: str | None = None) -> str:
    """What Helm 3 prints; raises HelmError when it fails."""
    return helm(*arguments, stdin=stdin, program="helm3")


def render3(values: Document) -> list[Document]:
    """The objects that the chart renders from `values` with Helm 3."""
    words = ("template", "release", str(CHART), "--namespace", NAMESPACE, "--values", "-")
    return load_all(helm3(*words, stdin=json.dumps(values)))


def by_name(documents: list[Document]) -> dict[str, Document]:
    """Objects by kind and name: the two write them in another order."""
    return {f"{d['kind']}/{d['metadata']['name']}": d for d in documents}


def test_it_is_the_pinned_one_and_the_oldest_that_the_readme_promises() -> None:
    script = (ROOT / "tests" / "tools" / "install_kube_tools.py").read_text()
    pin = re.search(r'^HELM3_VERSION = "v(3\.\d+)\.\d+"$', script, re.MULTILINE)
    assert pin is not None
    assert helm3("version", "--template", "{{.Version}}").strip().startswith(f"v{pin.group(1)}.")
    assert f"Helm {pin.group(1)} and 4" in (CHART / "README.md").read_text()


@pytest.mark.parametrize("path", CI_FILES, ids=lambda path: path.name.removesuffix("-values.yaml"))
def test_it_makes_of_a_scenario_what_helm_4_does(path: Path) -> None:
    assert by_name(render3(load(path) or {})) == by_name(list(render_ci(path)))


def test_lint_finds_nothing() -> None:
    assert "0 chart(s) failed" in helm3("lint", "--strict", str(CHART))
    every = [word for name in ("engines", "monitoring", "sharing") for word in ("--values", str(ci(name)))]
    assert "0 chart(s) failed" in helm3("lint", "--strict", str(CHART), *every)


def ci(name: str) -> Path:
    return CHART / "ci" / f"{name}-values.yaml"


# One for each keyword of the schema, since the two read it with another library.
@pytest.mark.parametrize(
    "values",
    [
        {"unknown": 1},
        {"runtimes": {"gpu": {"unknown": 1}}},
        service(autoscaling={"knative": {"unknown": 1}}),
        service(profile="fastest"),
        service(canary={"percent": 101}),
        service(timeoutSeconds=0),
        service(storageUri="a/model"),
        service(env=[{"value": "no name"}]),
        {"inferenceServices": {"Chat": {"demo": True}}},
        {"inferenceServices": {"a" * 64: {"demo": True}}},
        {"image": {"tag": "latest"}},
        {"image": {"registry": ""}},
        {"monitoring": {"prometheusRule": {"availability": 1}}},
        {"modelCaches": {"m": {"claim": {"accessModes": []}}}},
        {"modelCaches": {"m": {"job": {"resources": {"other": {}}}}}},
    ],
    ids=lambda values: json.dumps(values)[:60],
)
def test_it_refuses_what_the_schema_does(values: Document) -> None:
    for refuse in (render, render3):
        with pytest.raises(HelmError, match="values don't meet the specifications of the schema"):
            refuse(values)


def test_a_contradiction_has_its_sentence_there_too() -> None:
    with pytest.raises(HelmError, match=r"gpu\.count does nothing with device cpu"):
        render3(service(device="cpu", gpu={"count": 1}))


def test_null_is_the_default_there_too() -> None:
    defaults = load(CHART / "values.yaml")
    blocks = {top: None for top in defaults if top not in ("inferenceServices", "enabled")}
    inner = {top: {key: None for key in block} for top, block in defaults.items() if top.endswith("Defaults")}
    plain = by_name(render(service()))
    for nulls in (blocks, inner):
        assert by_name(render3({**nulls, **service()})) == plain


def test_a_parent_chart_has_it_as_a_dependency_with_a_condition(tmp_path: Path) -> None:
    chart = tmp_path / "parent"
    (chart / "charts").mkdir(parents=True)
    (chart / "templates").mkdir()
    helm3("package", str(CHART), "--destination", str(chart / "charts"))
    dependency = {
        "name": "kserve-vllm",
        "version": load(CHART / "Chart.yaml")["version"],
        "repository": "https://charts.example.com",
        "condition": "kserve-vllm.enabled",
    }
    about = {"apiVersion": "v2", "name": "parent", "version": "1.0.0", "dependencies": [dependency]}
    (chart / "Chart.yaml").write_text(yaml.safe_dump(about))
    values = {"global": {"imageRegistry": "x"}, "kserve-vllm": {"enabled": True, **service(gpu=None)}}
    (chart / "values.yaml").write_text(yaml.safe_dump(values))
    on = load_all(helm3("template", "release", str(chart), "--namespace", NAMESPACE))
    assert of_kind(on, "InferenceService").keys() == {"chat"}
    assert not load_all(helm3("template", "release", str(chart), "--set", "kserve-vllm.enabled=false"))
