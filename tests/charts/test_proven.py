"""The page of what was shown on clusters follows from the results, and leaves no case and no promise out."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from tests.e2e import promises, proven

E2E = Path(promises.__file__).parent


def _cases_of_the_suite() -> set[str]:
    found = set()
    for path in E2E.glob("test_*.py"):
        tree = ast.parse(path.read_text())
        functions = (node for node in tree.body if isinstance(node, ast.FunctionDef))
        found |= {f"{path.stem}::{function.name}" for function in functions if function.name.startswith("test_")}
    return found


def test_every_case_shows_a_promise_and_every_promise_says_how_it_is_shown() -> None:
    assert promises.cases() == _cases_of_the_suite()
    for group in promises.GROUPS.values():
        assert all(bool(promise.cases) != bool(promise.lacks) for promise in group)


def test_the_page_is_what_the_results_say() -> None:
    assert proven.PAGE.read_text() == proven.page()


def _results(folder: Path, name: str, run: str, **cases: object) -> None:
    cluster = {
        "kubernetes": "v1.0.0",
        "nodes": 1,
        "cpus": 2.0,
        "gpus": 0,
        "kserve": "0.21.0",
        "knative": "1.21",
        "gateway_api": True,
        "gateway_controller": "x",
        "keda": False,
        "prometheus_operator": False,
        "resource_metrics": False,
    }
    runs = {run: {"date": "2026-01-01", "commit": "abc", "image": "h/r:1-cpu", "cluster": cluster}}
    (folder / name).write_text(json.dumps({"runs": runs, "cases": {n: {"run": run, **c} for n, c in cases.items()}}))


@pytest.mark.parametrize(
    ("outcome", "says"),
    [
        ("passed", "| holds | requests: 3 |"),
        ("failed", "| **does not hold** | requests: 3; seen: lost two |"),
        ("skipped", "| never run | no metrics |"),
    ],
)
def test_a_row_tells_what_became_of_its_case(tmp_path: Path, outcome: str, says: str) -> None:
    case = "test_6_platform::test_an_hpa_on_cpu_scales"
    reason = {"failed": "lost two", "skipped": "NOT RUN: no metrics"}.get(outcome)
    figures = {} if outcome == "skipped" else {"requests": 3}
    entry = {"outcome": outcome, "seconds": 1.0, "figures": figures, **({"reason": reason} if reason else {})}
    _results(tmp_path, "a.json", "20260101T000000Z", **{case: entry})
    (row,) = (line for line in proven.page(tmp_path).splitlines() if "test_an_hpa_on_cpu_scales" in line)
    assert says in row


def test_a_later_run_counts_and_a_skip_replaces_nothing(tmp_path: Path) -> None:
    case = "test_6_platform::test_an_hpa_on_cpu_scales"
    _results(
        tmp_path,
        "a.json",
        "20260101T000000Z",
        **{case: {"outcome": "failed", "seconds": 1.0, "figures": {}, "reason": "old"}},
    )
    _results(
        tmp_path, "b.json", "20260102T000000Z", **{case: {"outcome": "passed", "seconds": 1.0, "figures": {"n": 1}}}
    )
    _results(
        tmp_path,
        "c.json",
        "20260103T000000Z",
        **{case: {"outcome": "skipped", "seconds": 1.0, "figures": {}, "reason": "x"}},
    )
    (row,) = (line for line in proven.page(tmp_path).splitlines() if "test_an_hpa_on_cpu_scales" in line)
    assert "| holds | n: 1 |" in row
