"""The comparison of `make compat` itself, without a network and without a server."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.compat import page, tools_model
from tests.compat.base import Case, Deviation, Expected, Folder, NotInstalled, cases_of, compare, expectations
from tests.compat.suites import SUITES
from tests.compat.suites.sdk_tests import by_test
from tests.support import ROOT

LISTED = Expected(passes=1, deviations=(Deviation(("tool *",), "no tools", "model"),))
PASSED, FAILED = Case("chat", "passed"), Case("tool call", "failed", "refused")


@pytest.mark.parametrize(
    ("cases", "expected", "says"),
    [
        ([PASSED, FAILED], LISTED, []),
        ([PASSED, Case("tool call", "skipped")], LISTED, []),
        ([PASSED, FAILED, Case("image", "failed", "500")], LISTED, ["image failed, and is not in expected.toml: 500"]),
        ([PASSED], LISTED, ["tool * is listed, but deviates no longer"]),
        (
            [PASSED, Case("tool call", "passed")],
            LISTED,
            ["tool * is listed, but deviates no longer", "2 passed, and 1 are listed (`passes`)"],
        ),
        ([FAILED], LISTED, ["0 passed, and 1 are listed (`passes`)"]),
        ([PASSED], None, ["the suite is not in expected.toml"]),
    ],
)
def test_what_is_not_as_listed_is_told(cases: list[Case], expected: Expected | None, says: list[str]) -> None:
    assert compare(cases, expected) == says


@pytest.mark.parametrize("entry", ['cases = ["a"]\nwhose = "ours"', 'cases = ["a"]\nreason = "b"\nwhose = "nobody"'])
def test_a_deviation_needs_its_reason_and_whose_it_is(entry: str, tmp_path: Path) -> None:
    file = tmp_path / "expected.toml"
    file.write_text(f"[one]\npasses = 1\n[[one.deviation]]\n{entry}\n")
    with pytest.raises(ValueError, match="needs a reason"):
        expectations(file)


def test_every_suite_is_listed_and_no_other() -> None:
    assert set(expectations()) == {suite.name for suite in SUITES}


def test_the_page_is_what_the_results_say() -> None:
    assert page.PAGE.read_text() == page.current(), "run: python -m tests.compat.page"


def test_the_results_that_are_kept_are_as_listed() -> None:
    import json

    kept, listed = json.loads(page.RESULTS.read_text()), expectations()
    faults = {
        name: compare([Case(**case) for case in entry["cases"]], listed.get(name))
        for name, entry in kept["suites"].items()
    }
    assert not {name: found for name, found in faults.items() if found}


def test_the_page_shows_what_is_not_as_listed_and_what_was_not_run() -> None:
    entry = {"what": "a|b", "version": "1", "date": "2026-01-01", "cases": [vars(PASSED), vars(FAILED)]}
    about = {"date": "2026-01-01", "vllm": "1", "python": "3", "node": "20"}
    made = page.page(
        {"about": about, "suites": {"one": entry, "two": entry}, "not_installed": {"three": "no network"}},
        {"one": LISTED, "two": Expected(2)},
        {"four": "has no program"},
    )
    assert "| `one` | a\\|b | 1 | 2026-01-01 | 2 | 1 | 1 |" in made
    assert "| `two` | a\\|b | 1 | 2026-01-01 | 2 | 1 | 1, **not as listed** |" in made
    assert "| `tool call` | what the model lacks | no tools |" in made
    assert "- **three**: no network" in made
    assert "- **four**: has no program" in made


def test_variants_of_a_test_are_one_case(tmp_path: Path) -> None:
    case = '<testcase file="tests/api_resources/chat/test_completions.py" name="test_{name}">{inner}</testcase>'
    cases = [
        case.format(name="method_create[loose]", inner=""),
        case.format(name="method_create[strict]", inner='<failure message="404 no such&#10; path"/>'),
        case.format(name="method_list[loose]", inner=""),
        case.format(name="method_list[aiohttp]", inner="<skipped/>"),
        case.format(name="method_update", inner="<skipped/>"),
    ]
    report = tmp_path / "report.xml"
    report.write_text(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>")
    assert by_test(report) == [
        Case("chat/test_completions: method_create", "failed", "404 no such path"),
        Case("chat/test_completions: method_list", "passed"),
        Case("chat/test_completions: method_update", "skipped"),
    ]


def test_a_script_that_ends_early_is_a_failure() -> None:
    line = '{"case": "one", "ok": true, "detail": ""}\n'
    assert cases_of(f"noise\n{line}", "", 0) == [Case("one", "passed")]
    assert cases_of(line, "boom", 1)[1] == Case("the script itself", "failed", "boom")
    assert cases_of("", "boom", 0) == [Case("the script itself", "failed", "boom")]


def test_an_installation_that_fails_is_told_and_made_anew(tmp_path: Path) -> None:
    folder, made = Folder(tmp_path / "one"), []

    def fail() -> None:
        raise subprocess.CalledProcessError(1, "pip", stderr=b"no such version")

    with pytest.raises(NotInstalled, match="no such version"):
        folder.once("one==1", fail)
    for version in ("one==1", "one==1", "one==2"):
        folder.once(version, lambda version=version: made.append(version))  # type: ignore[misc]
    assert made == ["one==1", "one==2"]


def test_the_model_that_calls_tools_is_made_once_and_anew_from_another_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "train.py"
    monkeypatch.setattr(tools_model, "SCRIPT", script)
    (tmp_path / "train_demo_model.py").write_text("")
    write = "import pathlib, sys\nout = pathlib.Path(sys.argv[2])\nout.mkdir(parents=True)\n"
    script.write_text(write + "(out / 'model.safetensors').write_text('one')")
    first = tools_model.build(tmp_path)
    (first / "model.safetensors").write_text("kept")
    assert (tools_model.build(tmp_path) / "model.safetensors").read_text() == "kept"
    script.write_text(write + "(out / 'model.safetensors').write_text('two')")
    second = tools_model.build(tmp_path)
    assert (second / "model.safetensors").read_text() == "two"
    assert not first.exists()
    script.write_text("raise SystemExit('no memory')")
    with pytest.raises(NotInstalled, match="no memory"):
        tools_model.build(tmp_path)


@pytest.mark.slow
def test_the_command_names_suites_and_what_is_not_run() -> None:
    def ask(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tests.compat", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)

    listed = ask("--list").stdout
    assert all(suite.name in listed for suite in SUITES)
    assert "not run: " in listed
    wrong = ask("--only", "nobody")
    assert wrong.returncode == 1
    assert "no suite named nobody" in wrong.stderr
