"""Recording rules and alerts: promtool's opinion, a case that fires and a quiet one for each, and the runbook."""

from __future__ import annotations

import functools
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support import ROOT

FILES = ROOT / "charts" / "kserve-vllm" / "files"
RULES = sorted((FILES / "rules").glob("*.yaml"))
CASES = sorted((Path(__file__).parent / "rules").glob("*.yaml"))


def rules() -> list[dict[str, Any]]:
    """Every rule."""
    return [rule for path in RULES for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]]


@functools.cache
def cases(path: Path) -> list[dict[str, Any]]:
    """The cases in a file."""
    found: list[dict[str, Any]] = yaml.safe_load(path.read_text())["tests"]
    return found


ALERTS = {rule["alert"]: rule for rule in rules() if "alert" in rule}


def test_promtool_accepts_the_rules(promtool: str) -> None:
    done = subprocess.run([promtool, "check", "rules", *map(str, RULES)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sum(int(n) for n in re.findall(r"(\d+) rules found", done.stdout)) == len(rules())


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_each_case_of_the_alerts_holds(path: Path, promtool: str) -> None:
    done = subprocess.run([promtool, "test", "rules", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("alert", ALERTS)
def test_each_alert_has_a_case_that_fires_and_one_that_stays_quiet(alert: str) -> None:
    fires = quiet = 0
    for path in CASES:
        for case in cases(path):
            for check in case["promql_expr_test"]:
                if check["expr"] == f'count(ALERTS{{alertname="{alert}",alertstate="firing"}})':
                    fires += bool(check["exp_samples"])
                    quiet += not check["exp_samples"]
    assert fires
    assert quiet


@pytest.mark.parametrize("alert", ALERTS)
def test_each_alert_names_a_paragraph_of_the_runbook(alert: str) -> None:
    file, _, anchor = ALERTS[alert]["annotations"]["runbook"].partition("#")
    text = (FILES / file).read_text()
    paragraphs = dict(re.findall(r"^## (\w+)\n\n(.+?)(?=\n## |\Z)", text, flags=re.M | re.S))
    assert anchor == alert.lower()
    assert len(paragraphs[alert].split()) > 20


def test_the_runbook_has_no_paragraph_of_an_alert_that_is_gone_and_no_dead_link() -> None:
    text = (FILES / "RUNBOOK.md").read_text()
    assert set(re.findall(r"^## (\w+)$", text, flags=re.M)) == set(ALERTS)
    assert set(re.findall(r"\]\(#(\w+)\)", text)) <= {alert.lower() for alert in ALERTS}


def test_every_alert_says_how_bad_it_is_and_what_is_wrong() -> None:
    for rule in ALERTS.values():
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert {"summary", "description", "runbook"} == set(rule["annotations"])


def test_every_recorded_series_is_used_somewhere() -> None:
    texts = "".join(path.read_text() for path in [*RULES, *(FILES / "dashboards").glob("*.json")])
    for rule in rules():
        if "record" in rule:
            assert texts.count(rule["record"]) > 1, rule["record"]
