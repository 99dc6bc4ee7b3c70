"""Writes docs/reference/proven.md from the results: every promise, the case that shows it, and what was seen.

python -m tests.e2e.proven            write it
python -m tests.e2e.proven --check    fail if it would change
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tests.e2e.promises import GROUPS, Promise
from tests.e2e.results import FOLDER, ROOT

PAGE = ROOT / "docs" / "reference" / "proven.md"
_HEAD = """<!-- Written by `python -m tests.e2e.proven` from tests/e2e/results; do not edit. -->
# Proven on a cluster

What the README, the chart and the catalogue promise about clusters, and what was seen when it was last tried on a real
one by [`make e2e`](../../tests/e2e/README.md). The latest run of each case counts; what was never run says so.
"""
_MARKS = {"passed": "holds", "failed": "**does not hold**", "skipped": "never run"}
Case = dict[str, Any]


def load(folder: Path) -> dict[str, list[Case]]:
    """Cases by `file::function`, each with its parameter, its run and the file it is of; the latest run of each."""
    latest: dict[str, Case] = {}
    for file in sorted(folder.glob("*.json")):
        tree = json.loads(file.read_text())
        for name, case in tree["cases"].items():
            found = {**case, "name": name, "run": case["run"], "at": tree["runs"][case["run"]]}
            known = latest.get(name)
            # What ran somewhere says more than that it was skipped elsewhere.
            if known is None or (found["outcome"] != "skipped", found["run"]) > (
                known["outcome"] != "skipped",
                known["run"],
            ):
                latest[name] = found
    by_function: dict[str, list[Case]] = {}
    for name in sorted(latest):
        by_function.setdefault(name.partition("[")[0], []).append(latest[name])
    return by_function


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _figures(figures: Mapping[str, Any]) -> str:
    return "; ".join(f"{name}: {value}" for name, value in figures.items())


def _row(promise: Promise, results: Mapping[str, list[Case]]) -> tuple[str, str, str]:
    """(outcome, what was seen, commits and dates) of a promise."""
    found: list[Case] = [case for function in promise.cases for case in results.get(function, [])]
    ran = [case for case in found if case["outcome"] != "skipped"]
    if not ran:
        reasons = sorted({case["reason"].removeprefix("NOT RUN: ") for case in found if case.get("reason")})
        why = "; ".join(reasons) or promise.lacks
        return "never run", f"lacks: {why}" if promise.lacks and not reasons else why, ""
    failed = [case for case in ran if case["outcome"] == "failed"]
    seen = []
    for function in promise.cases:
        of_function = [case for case in ran if case["name"].partition("[")[0] == function]
        if any("[" in case["name"] for case in of_function):
            passed = sum(case["outcome"] == "passed" for case in of_function)
            seen.append(f"{passed} of {len(of_function)}")
            skipped = [
                case for case in found if case["name"].startswith(f"{function}[") and case["outcome"] == "skipped"
            ]
            if skipped:
                seen.append(f"{len(skipped)} never run")
        else:
            seen += [_figures(case["figures"]) for case in of_function if case["figures"]]
    seen += [f"{case['name'].partition('[')[2].rstrip(']') or 'seen'}: {case.get('reason', '')}" for case in failed]
    when = sorted({f"{case['at']['date']}, {case['at']['commit']}" for case in ran})
    return _MARKS["failed" if failed else "passed"], "; ".join(seen), "<br>".join(when)


def _clusters(cases: Iterable[Case]) -> list[str]:
    """A line for each cluster that the cases ran on."""
    lines = set()
    for case in cases:
        has = case["at"]["cluster"]
        extras = [
            word
            for key, word in (
                ("keda", "KEDA"),
                ("prometheus_operator", "Prometheus' operator"),
                ("resource_metrics", "resource metrics"),
            )
            if has[key]
        ]
        versions = (
            f"Kubernetes {has['kubernetes']}",
            f"KServe {has['kserve']}",
            f"Knative Serving {has['knative'] or 'none'}",
            f"gateway {has['gateway_controller'] or 'none'}",
        )
        size = f"nodes: {has['nodes']}, CPUs: {has['cpus']:g}, GPUs: {has['gpus']}"
        note = f" ({case['at']['note']})" if case["at"].get("note") else ""
        lines.add(
            f"- {', '.join(versions)}; {size}; "
            f"{', '.join(extras) or 'without KEDA, Prometheus and resource metrics'}{note}"
        )
    return sorted(lines)


def page(folder: Path = FOLDER) -> str:
    """The page's text from the results in a folder."""
    results = load(folder)
    ran = [case for cases in results.values() for case in cases if case["outcome"] != "skipped"]
    lines = [_HEAD]
    if ran:
        lines += ["Ran on:", "", *_clusters(ran), ""]
    for group, promises in GROUPS.items():
        lines += [
            f"## {group}",
            "",
            "| Promise | Of | | Seen | Case | When, commit |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for promise in promises:
            outcome, seen, when = _row(promise, results)
            names = "<br>".join(f"`{case.partition('::')[2]}`" for case in promise.cases)
            lines.append(f"| {_cell(promise.text)} | {promise.where} | {outcome} | {_cell(seen)} | {names} | {when} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.e2e.proven", description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if the page would change")
    if parser.parse_args().check:
        if not PAGE.exists() or PAGE.read_text() != page():
            print(
                f"{PAGE.relative_to(ROOT)} is not what the results say; run: python -m tests.e2e.proven",
                file=sys.stderr,
            )
            return 1
        return 0
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
