"""What commands print on terminals without UTF-8 or colours, and into pipes whose reader has left."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kserve_vllm.cli import main
from kserve_vllm.ops.operations import COMMANDS
from kserve_vllm.ops.tables import bar, spark
from kserve_vllm.telemetry import logs
from tests.support import ROOT

pytestmark = pytest.mark.integration

CLOSED = "http://127.0.0.1:1"
# Something that each command prints and that takes no engine.
PRINTS = {
    "profiles": [],
    "health": ["--http-port=1"],
    "keys": ["--help"],
    "config": ["--help"],
    "plan": ["--params=8B", "--speed=roofline", "--rate=2"],
    "simulate": ["--example"],
    "batch": ["--help"],
    "bench": [CLOSED],
    "top": [CLOSED, "--once", "--interval=0.2"],
    "diagnose": ["--causes"],
    "restart": ["chat", "--kubeconfig=/nonexistent"],
    "rollout": ["chat", "--model=hf://a/b", "--kubeconfig=/nonexistent"],
}


def run(*arguments: str, stdout: int = subprocess.PIPE, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kserve_vllm", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, **variables},
    )


def test_every_command_is_tried() -> None:
    assert PRINTS.keys() >= COMMANDS.keys()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_s_help_names_its_exit_codes(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert re.search(r"Exit codes:? 0 .*2 an argument|Exit codes: 0 .*2 a file", capsys.readouterr().out, re.DOTALL)


@pytest.mark.parametrize("command", PRINTS)
def test_a_reader_that_has_left_is_no_error(command: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = run(command, *PRINTS[command], stdout=writer)
    os.close(writer)
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr
    # argparse prints its help without a look at the reader, and what says why on standard error has its own code.
    expected = {"--help": (0, 141), CLOSED: (3, 141), "chat": (2,)}
    assert done.returncode in expected.get((*PRINTS[command], "")[0], (141,))


def test_a_terminal_without_utf_8_gets_bars_all_the_same(tmp_path: Path) -> None:
    plan = run("plan", *PRINTS["plan"], PYTHONIOENCODING="ascii")
    assert plan.returncode == 0, plan.stderr
    assert "#####" in plan.stdout
    scenario = tmp_path / "scenario.yaml"
    scenario.write_text(run("simulate", "--example").stdout, "utf-8")
    drawn = run("simulate", str(scenario), PYTHONIOENCODING="latin-1")
    assert drawn.returncode in (0, 1), drawn.stderr
    assert "Traceback" not in drawn.stderr
    assert "?" not in spark([0, 1, 2]) + bar(1, 2)


@pytest.mark.parametrize(
    ("terminal", "variables", "coloured"),
    [
        (True, {}, True),
        (True, {"NO_COLOR": "1"}, False),
        (True, {"NO_COLOR": ""}, True),
        (True, {"TERM": "dumb"}, False),
        (False, {}, False),
    ],
)
def test_colours_are_for_terminals_that_want_them(
    terminal: bool, variables: dict[str, str], coloured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal, raising=False)
    record = logs.logging.LogRecord("a", 20, "p", 1, "hello", (), None)
    assert ("\x1b[" in logs.formatter("console").format(record)) == coloured
