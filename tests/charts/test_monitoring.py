"""Rules, dashboards and queries ask for metrics that exist, and reach the cluster as they are in the files."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

from kserve_vllm.telemetry.metrics import DECLARED
from tests.charts.support import CHART, helm, load, load_all, of_kind, predictor, render, render_ci, standard

RULES = CHART / "files" / "rules"
DASHBOARDS = CHART / "files" / "dashboards"
RUNBOOK = "https://github.com/kserve-vllm/kserve-vllm/blob/main/charts/kserve-vllm/files/RUNBOOK.md"
SCENARIO = CHART / "ci" / "monitoring-values.yaml"
# Prometheus' own, its client library's, and those of NVIDIA's DCGM exporter.
OTHER = {"up", "process_start_time_seconds", "DCGM_FI_DEV_FB_FREE", "DCGM_FI_DEV_FB_USED", "DCGM_FI_DEV_GPU_UTIL"}


def expressions() -> dict[str, str]:
    """Every query that the chart ships, by where it is."""
    found = {}
    for path in RULES.glob("*.yaml"):
        for group in load(path)["groups"]:
            for rule in group["rules"]:
                found[f"{path.name}: {rule.get('alert') or rule['record']}"] = rule["expr"]
    for path in DASHBOARDS.glob("*.json"):
        board = json.loads(path.read_text())
        for panel in board["panels"]:
            for target in panel["targets"]:
                found[f"{path.name}: {panel['title']} {target['refId']}"] = target["expr"]
        for variable in board["templating"]["list"]:
            if isinstance(variable["query"], dict):
                found[f"{path.name}: ${variable['name']}"] = variable["query"]["query"]
    for metric in ("queue-depth", "kv-cache", "ttft-p99"):
        spec = predictor(standard(autoscaling={"class": "keda", "metric": metric}))
        found[f"keda: {metric}"] = spec["autoScaling"]["metrics"][0]["external"]["metric"]["query"]
    return found


EXPRESSIONS = expressions()


def names_of(expression: str) -> set[str]:
    """Names of metrics in a query: whatever is left without strings, selectors, functions and labels."""
    text = re.sub(r'"[^"]*"', "", expression)
    text = re.sub(r"\{[^}]*\}", "", text)
    text = re.sub(r"\b(?:by|on|without|ignoring)\s*\([^)]*\)", "", text)
    text = re.sub(r"label_values\(([^,]+),[^)]*\)", r"\1", text)
    text = re.sub(r"\[[^]]*\]", "", text)
    words = re.findall(r"(?<![\w$:.])[a-zA-Z_:][\w:]*+(?!\s*\()", text)
    return set(words) - {"or", "and", "unless", "by", "on", "offset"}


def recorded() -> set[str]:
    return {
        rule["record"]
        for path in RULES.glob("*.yaml")
        for group in load(path)["groups"]
        for rule in group["rules"]
        if "record" in rule
    }


def exposed() -> set[str]:
    """Names of vLLM's metrics, from the source of the installed vLLM, and of ours, as Prometheus sees them."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None, "NO VLLM: no query was checked; run `make setup-dev`"
    assert spec.submodule_search_locations
    names: set[str] = set()
    for path in (Path(spec.submodule_search_locations[0]) / "v1").rglob("*.py"):
        text = path.read_text(errors="ignore")
        for maker, name in re.findall(r'(gauge|counter|histogram)_cls\(\s*name="(vllm:[\w:]+)"', text):
            counted = {"gauge": [name], "counter": [f"{name}_total"], "histogram": []}[maker]
            names.update(counted)
            if maker == "histogram":
                names.update(f"{name}_{part}" for part in ("bucket", "sum", "count"))
    assert len(names) > 30
    for ours in DECLARED:
        suffixes = {"gauge": [""], "counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}[ours.kind]
        names.update(ours.name + suffix for suffix in suffixes)
    # Of other engines: what their own sources name, with the suffixes that Prometheus' client adds to a histogram.
    flags = json.loads((Path(__file__).parent / "engine_flags.json").read_text())
    theirs = {
        name for known in flags.values() for name in known if re.match(r"(sglang|lmdeploy|llamacpp):|tgi_|nv_", name)
    }
    return names | theirs | {f"{name}_{part}" for name in theirs for part in ("bucket", "sum", "count")}


@pytest.mark.parametrize("where", EXPRESSIONS)
def test_a_query_asks_for_metrics_that_exist(where: str) -> None:
    unknown = names_of(EXPRESSIONS[where]) - exposed() - recorded() - OTHER
    assert names_of(EXPRESSIONS[where])
    assert not unknown


def test_a_query_for_a_metric_that_does_not_exist_would_be_found() -> None:
    assert names_of('sum by (pod) (rate(vllm:no_such{a="b"}[5m])) > 0 or vector(0)') == {"vllm:no_such"}


@pytest.mark.parametrize("where", EXPRESSIONS)
def test_brackets_of_a_query_are_closed(where: str) -> None:
    text = re.sub(r'"[^"]*"', "", EXPRESSIONS[where])
    for opening, closing in ("()", "{}", "[]"):
        assert text.count(opening) == text.count(closing)


def test_every_recorded_series_is_used() -> None:
    used = set().union(*(names_of(e) for e in EXPRESSIONS.values()))
    texts = "".join(path.read_text() for path in RULES.glob("*.yaml"))
    for name in recorded():
        assert name in used or texts.count(name) > 1, name


def test_the_rules_reach_the_cluster_as_they_are_in_the_files() -> None:
    (rule,) = of_kind(render_ci(SCENARIO), "PrometheusRule").values()
    groups = [group for path in sorted(RULES.glob("*.yaml")) for group in load(path)["groups"]]
    for each in (each for group in groups for each in group["rules"] if "alert" in each):
        # A file's own link becomes one that leads there from anywhere.
        each["annotations"]["runbook_url"] = f"{RUNBOOK}#{each['annotations'].pop('runbook').partition('#')[2]}"
    assert rule["spec"]["groups"] == groups
    assert rule["metadata"]["labels"]["release"] == "prometheus"


def test_every_alert_says_what_is_wrong_and_what_to_look_at() -> None:
    alerts = [r for p in RULES.glob("*.yaml") for g in load(p)["groups"] for r in g["rules"] if "alert" in r]
    for alert in alerts:
        assert {"summary", "description"} <= set(alert["annotations"])
        assert alert["labels"]["severity"] in ("warning", "critical")
        assert "for" in alert


def test_the_alert_for_loading_waits_longer_than_the_startup_probe() -> None:
    (alert,) = [
        r
        for p in RULES.glob("*.yaml")
        for g in load(p)["groups"]
        for r in g["rules"]
        if r.get("alert") == "KServeVllmEngineNotReady"
    ]
    startup = load(CHART / "values.yaml")["runtimes"]["probes"]["startup"]
    assert int(alert["for"].removesuffix("m")) * 60 > startup["periodSeconds"] * startup["failureThreshold"]


def test_dashboards_reach_the_cluster_as_they_are_in_the_files() -> None:
    boards = of_kind(render_ci(SCENARIO), "ConfigMap")
    data: dict[str, Any] = {}
    for board in boards.values():
        assert board["metadata"]["labels"]["grafana_dashboard"] == "yes-please"
        data |= {name: json.loads(text) for name, text in board["data"].items()}
    assert data == {path.name: json.loads(path.read_text()) for path in DASHBOARDS.glob("*.json")}


def test_two_releases_with_the_longest_names_share_no_object_and_scrape_no_pod_of_each_other() -> None:
    names: list[set[tuple[str, str]]] = []
    labels: list[str] = []
    for release in ("a" * 53, "a" * 52 + "b"):
        command = ("template", release, str(CHART), "--namespace", "models", "--values", str(SCENARIO))
        documents = load_all(helm(*command, "--set", "runtimes.scope=Namespaced"))
        own = [d for d in documents if d["kind"] in ("ConfigMap", "PodMonitor", "PrometheusRule")]
        names.append({(d["kind"], d["metadata"]["name"]) for d in own})
        assert len(names[-1]) == len(own), "no two of one release"
        assert all(len(name) <= 253 for _, name in names[-1])
        (monitor,) = of_kind(documents, "PodMonitor").values()
        labels.append(monitor["spec"]["selector"]["matchLabels"]["kserve-vllm/runtimes-of"])
    assert not names[0] & names[1]
    assert labels[0] != labels[1]
    assert all(len(label) <= 63 for label in labels)


@pytest.mark.parametrize(
    ("knative", "app", "revision"),
    [
        ("chat-predictor-00002", "chat-predictor-00002", "chat-predictor-00002"),
        ("", "isvc.chat-predictor", "chat-predictor"),
        ("", "isvc.chat-canary-predictor", "chat-canary-predictor"),
    ],
)
def test_the_pod_monitor_names_the_revision_in_both_modes(knative: str, app: str, revision: str) -> None:
    (monitor,) = of_kind(render_ci(SCENARIO), "PodMonitor").values()
    (rule,) = [
        rule for rule in monitor["spec"]["podMetricsEndpoints"][0]["relabelings"] if rule["targetLabel"] == "revision"
    ]
    assert rule["sourceLabels"] == [
        "__meta_kubernetes_pod_label_serving_knative_dev_revision",
        "__meta_kubernetes_pod_label_app",
    ]
    # Prometheus' expressions are anchored, and a group that took no part is empty.
    match = re.fullmatch(rule["regex"], f"{knative};{app}")
    assert match
    assert rule["replacement"] == "$1$2"
    assert (match[1] or "") + (match[2] or "") == revision


def test_the_pod_monitor_finds_pods_of_both_modes_by_the_runtimes_label() -> None:
    (monitor,) = of_kind(render_ci(SCENARIO), "PodMonitor").values()
    (wanted,) = monitor["spec"]["selector"]["matchLabels"].items()
    runtimes = of_kind(render_ci(SCENARIO), "ClusterServingRuntime")
    for runtime in runtimes.values():
        assert wanted in runtime["spec"]["labels"].items()
        assert runtime["spec"]["containers"][0]["ports"][0]["containerPort"] == 8080
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    # Knative renames the port, so the name would find nothing there.
    assert endpoint["portNumber"] == 8080
    assert "namespaceSelector" not in monitor["spec"]
    (monitor,) = of_kind(render({"monitoring": {"podMonitor": {"enabled": True}}}), "PodMonitor").values()
    assert monitor["spec"]["namespaceSelector"] == {"any": True}


def test_dashboards_name_no_objective_as_fixed_that_values_move() -> None:
    for path in DASHBOARDS.glob("*.json"):
        assert not re.findall(r'"title": "[^"]*\d+ (?:ms|s|%)', path.read_text()), path.name


def test_notes_say_which_panels_stay_empty_without_the_rules() -> None:
    for rules in (False, True):
        on = {"dashboards": {"enabled": True}, "prometheusRule": {"enabled": rules}}
        text = json.dumps({"monitoring": on})
        said = helm("install", "r", str(CHART), "--dry-run=client", "-f", "-", stdin=text).split("NOTES:")[1]
        assert ("panels of the dashboards that show its recordings stay empty" in said) != rules
