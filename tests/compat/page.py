"""Writes docs/reference/compatibility.md from the last results and the list of what is expected.

python -m tests.compat.page            write it
python -m tests.compat.page --check    fail if it would change
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.compat.base import RESULTS, ROOT, Case, Expected, compare, expectations

PAGE = ROOT / "docs" / "reference" / "compatibility.md"
_HEAD = """<!-- Written by `python -m tests.compat.page` from tests/compat; do not edit. -->
# Compatibility: others' suites

What test suites and clients of others found when they were last run against this server by
`make compat`: installed from their registries in the versions named, and compared with a checked-in list
(`tests/compat/expected.toml`). A failure that is not in the list fails the run; so does one in the list that is gone.

Suites with a + are run on a model that calls tools and ends its JSON: the demo model as taught further by a script of
ours, `runtime/tools/train_tools_model.py`, served with `--tool-call-parser hermes` and `--strict-openai true`; the
others on the demo model itself. What it calls and copies is what it was taught, so it shows how calls pass
through the server.
"""
_WHOSE = {"model": "what the model lacks", "ours": "what is not served, or otherwise", "suite": "the suite's own"}


def page(
    results: Mapping[str, Any],
    expected: Mapping[str, Expected],
    not_run: Mapping[str, str],
    with_tools: frozenset[str] = frozenset(),
) -> str:
    """The page as text; suites in `with_tools` were asked of the model that calls tools."""
    lines = [_HEAD]
    about = results["about"]
    lines.append(
        f"Last run: {about['date']}, vLLM {about['vllm']}, Python {about['python']}, Node {about['node']}, on a CPU.\n"
    )
    lines += ["| Suite | What it asks | From | Run on | Cases | Passed | Deviate |", "|" + " --- |" * 7]
    for name, entry in results["suites"].items():
        cases = [Case(**case) for case in entry["cases"]]
        passed = sum(case.outcome == "passed" for case in cases)
        verdict = f"{len(cases) - passed}"
        if compare(cases, expected.get(name)):
            verdict += ", **not as listed**"
        about_it = [
            f"`{name}`{' +' if name in with_tools else ''}",
            _cell(entry["what"]),
            _cell(entry["version"]),
            entry["date"],
        ]
        lines.append(f"| {' | '.join(about_it)} | {len(cases)} | {passed} | {verdict} |")
    lines += ["", "## What deviates, and why", ""]
    for name, entry in results["suites"].items():
        told = expected.get(name)
        if told is None or not told.deviations:
            continue
        lines += [f"### {name}", "", "| Cases | Whose | Why |", "| --- | --- | --- |"]
        for each in told.deviations:
            hit = [
                case["name"]
                for case in entry["cases"]
                if case["outcome"] != "passed" and told.why(case["name"]) is each
            ]
            shown = ", ".join(f"`{case}`" for case in hit[:6]) + (f" and {len(hit) - 6} more" if len(hit) > 6 else "")
            lines.append(f"| {_cell(shown)} | {_WHOSE[each.whose]} | {_cell(each.reason)} |")
        lines.append("")
    lines += ["## Not run", ""]
    told = results.get("not_installed", {})
    without = {name: "no result is kept." for name in expected if name not in results["suites"] and name not in told}
    missing = {**not_run, **without, **told}
    lines += [f"- **{name}**: {' '.join(why.split())}" for name, why in missing.items()]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def current() -> str:
    """The page of the checked-in results."""
    from tests.compat.suites import NOT_RUN, SUITES

    with_tools = frozenset(suite.name for suite in SUITES if suite.tools)
    return page(json.loads(RESULTS.read_text()), expectations(), NOT_RUN, with_tools)


def write(check: bool = False, file: Path = PAGE) -> bool:
    """Write the page, or only look with `check`. Returns whether it was as it shall be."""
    text = current()
    same = file.is_file() and file.read_text() == text
    if not same and not check:
        file.write_text(text)
    return same


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail on drift")
    options = parser.parse_args()
    if not write(options.check) and options.check:
        raise SystemExit(f"{PAGE.name} drifted; run: python -m tests.compat.page")
