"""No query is dead: those of rules, dashboards and KEDA triggers, on a real Prometheus over the real engine."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import yaml

from tests.charts.support import predictor, standard
from tests.clients import until
from tests.observability.conftest import KEY
from tests.observability.load import Client
from tests.observability.prom import Prometheus
from tests.observability.test_rules import RULES
from tests.observability.test_rules import rules as all_rules
from tests.support import ROOT, Server, not_checked
from tests.tools import install_prometheus

LOADS_WITHIN_S = 90.0
# Other engines do not run here: their rules have cases with series of their own (test_rules.py), and tests/charts
# compares the names of metrics with the engines' sources.
OTHER_ENGINES = "engines"
DASHBOARDS = sorted((ROOT / "charts" / "kserve-vllm" / "files" / "dashboards").glob("*.json"))


def rules(kind: str) -> dict[str, str]:
    """Expressions of recordings (`record`) or alerts (`alert`), by name."""
    found = {}
    for path in RULES:
        if path.stem == OTHER_ENGINES:
            continue
        for group in yaml.safe_load(path.read_text())["groups"]:
            found |= {rule[kind]: rule["expr"] for rule in group["rules"] if kind in rule}
    return found


def panels() -> dict[str, str]:
    """Queries of all panels, by dashboard, panel and letter."""
    found = {}
    for path in DASHBOARDS:
        if path.stem == OTHER_ENGINES:
            continue
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel["targets"]:
                found[f"{path.stem}: {panel['title']} {target['refId']}"] = filled(target["expr"])
    return found


def filled(expression: str) -> str:
    """A dashboard's query with everything selected."""
    for name, value in (("$namespace", ".*"), ("$inferenceservice", ".*"), ("$__rate_interval", "1m")):
        expression = expression.replace(name, value)
    return expression


def variables() -> dict[str, tuple[str, str]]:
    """(series, label) of each dashboard variable."""
    found = {}
    for path in DASHBOARDS:
        if path.stem == OTHER_ENGINES:
            continue
        for variable in json.loads(path.read_text())["templating"]["list"]:
            if variable["type"] == "query":
                match = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"])
                assert match
                found[f"{path.stem}: {variable['name']}"] = filled(match[1]), match[2]
    return found


def triggers() -> dict[str, str]:
    """KEDA's queries in the manifests of this runtime, wherever they stand, for any namespace and pod.

    Those of other engines ask for a metric of theirs, which is one that the chart knows of them.
    """
    engines = (ROOT / "charts/kserve-vllm/files/engines").glob("*.yaml")
    theirs = {name for path in engines for name in re.findall(r"^ +queue: (\S+)$", path.read_text(), flags=re.M)}
    assert theirs
    found = {}
    for path in sorted((ROOT / "inferenceservices").rglob("*.yaml")):
        for number, query in enumerate(re.findall(r"^\s*query: (.+)$", path.read_text(), flags=re.M)):
            if not any(f"({name}{{" in query for name in theirs):
                found[f"{path.stem} {number}"] = anywhere(yaml.safe_load(query))
    return found


def anywhere(query: str) -> str:
    """The query of a certain service, for the pods of this test."""
    return re.sub(r'namespace="[^"]*",pod=~"[^"]*"', 'namespace="test",pod=~".+"', query)


def selectors(expression: str) -> set[str]:
    """Metrics with their matchers in an expression, without ranges."""
    bare = re.sub(r"\b(?:by|on|ignoring|without|group_left|group_right)\s*\([^)]*\)", " ", expression)
    bare = re.sub(r"label_replace\(", "(", bare)
    found = re.findall(r"(?<![\w$:\"])([a-zA-Z_:][\w:]*(?:\{[^}]*\})?)(?![\w:]*\()", bare)
    words = {"and", "or", "unless", "bool", "by", "on", "sum", "max", "min", "avg", "count", "offset", "quantile"}
    quoted = set(re.findall(r'"([^"]*)"', re.sub(r"\{[^}]*\}", "", expression)))
    return {name for name in found if name not in words | quoted}


@pytest.fixture(scope="module")
def prometheus(observed: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Prometheus, after loads through every protocol that it has watched.

    A rate needs a scrape before the load and one after it, and a recording what those gave. How long a load takes is
    the machine's affair: it is repeated until all queries have data, and what is asked later is asked of that moment.
    """
    binary = install_prometheus.find("prometheus")
    if binary is None:
        not_checked("no Prometheus: no query was checked; see tests/tools/install_prometheus.py")
    running = Prometheus(binary, tmp_path_factory.mktemp("prometheus"), observed, RULES)
    try:
        until(lambda: len(running.query("up == 1")) == 3, 30)
        deadline = time.monotonic() + LOADS_WITHIN_S
        while not _all_have_data(running) and time.monotonic() < deadline:
            _load(observed)
        running.at = time.time()
        yield running
    finally:
        running.stop()


def _load(server: Server) -> None:
    """Good requests and bad ones, two of them to a model that is not loaded, and a scrape after them."""
    client = Client(server, KEY)
    client.everything()
    Client(server).chat()
    client.post("/v2/repository/models/demo/unload", {})
    assert client.infer().status_code == 503
    client.post("/v2/repository/models/demo/load", {})
    time.sleep(2)


def _all_have_data(prometheus: Prometheus) -> bool:
    recordings = rules("record")
    return all(map(prometheus.query, [*recordings, *recordings.values(), *panels().values(), *triggers().values()]))


@pytest.mark.parametrize("name", rules("record"))
def test_a_recording_has_data(name: str, prometheus: Prometheus) -> None:
    assert prometheus.query(rules("record")[name])
    assert prometheus.query(name), "evaluated as a rule, too"


@pytest.mark.parametrize("name", rules("alert"))
def test_an_alert_parses_and_each_series_that_it_asks_for_is_there(name: str, prometheus: Prometheus) -> None:
    expression = rules("alert")[name]
    prometheus.query(expression)
    assert selectors(expression)
    for selector in selectors(expression):
        # What is there only where something is wrong, is asked for as it is where nothing is.
        assert prometheus.query(selector.replace('{reason="changed"}', '{reason="used"}')), selector


def test_prometheus_evaluates_all_rules_without_an_error(prometheus: Prometheus) -> None:
    groups = prometheus.get("rules")["groups"]
    loaded = [rule for group in groups for rule in group["rules"]]
    assert len(loaded) == len(all_rules())
    assert [rule for rule in loaded if rule["health"] != "ok"] == []


@pytest.mark.parametrize("name", panels())
def test_a_panel_has_data(name: str, prometheus: Prometheus) -> None:
    assert prometheus.query(panels()[name])


@pytest.mark.parametrize("name", variables())
def test_a_dashboards_variable_has_values(name: str, prometheus: Prometheus) -> None:
    series, label = variables()[name]
    assert prometheus.get(f"label/{label}/values", **{"match[]": series}) == [
        {"namespace": "test", "inferenceservice": "demo"}[label]
    ]


@pytest.mark.parametrize("name", triggers())
def test_a_keda_trigger_of_the_manifests_has_data(name: str, prometheus: Prometheus) -> None:
    assert prometheus.query(triggers()[name])


@pytest.mark.parametrize("metric", ["queue-depth", "kv-cache", "ttft-p99"])
def test_a_keda_trigger_of_the_chart_has_data(metric: str, prometheus: Prometheus) -> None:
    spec = predictor(standard(autoscaling={"class": "keda", "metric": metric}))
    query = anywhere(spec["autoScaling"]["metrics"][0]["external"]["metric"]["query"])
    assert 'pod=~".+"' in query
    assert prometheus.query(query)
    for selector in selectors(query):
        assert prometheus.query(selector), selector


def test_a_dead_query_would_be_found(prometheus: Prometheus) -> None:
    assert not prometheus.query("vllm:gpu_cache_usage_perc"), "a name that vLLM dropped long ago"
    assert selectors('max by (pod) (vllm:a{x="y"}) > 0.5 and on (pod) rate(b_total[5m]) > 1') == {
        'vllm:a{x="y"}',
        "b_total",
    }
    with pytest.raises(AssertionError):
        prometheus.query("sum by (")


def test_prometheus_keeps_the_exemplars_with_their_trace_ids(prometheus: Prometheus, observed: Server) -> None:
    trace = "20000000000000000000000000000001"
    Client(observed, KEY).chat(traceparent=f"00-{trace}-00f067aa0ba902b7-01")

    def kept() -> bool:
        now = time.time()
        data = prometheus.get(
            "query_exemplars",
            query="kserve_vllm_time_to_first_token_seconds_bucket",
            start=now - 300,
            end=now + 5,
        )
        return trace in {e["labels"]["trace_id"] for series in data for e in series["exemplars"]}

    until(kept, 30)


def test_the_dashboards_are_what_their_description_says() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "runtime/tools/build_dashboards.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_every_panel_has_a_place_of_its_own_a_unit_and_a_sentence() -> None:
    for path in DASHBOARDS:
        board = json.loads(path.read_text())
        places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in board["panels"]]
        assert len(set(places)) == len(places)
        assert len({panel["title"] for panel in board["panels"]}) == len(places)
        for panel in board["panels"]:
            assert panel["fieldConfig"]["defaults"]["unit"]
            assert panel["description"].endswith(".")


def test_the_folder_holds_the_five_dashboards() -> None:
    found = sorted((ROOT / "charts" / "kserve-vllm" / "files" / "dashboards").glob("*.json"))
    assert [path.stem for path in found] == ["engine", "engines", "scaling", "service", "tenants"]
