"""The commands in the guides run, and the figures in them are the ones that the tests hold."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from kserve_vllm.cli import command as cli
from tests.ops import capacity
from tests.ops.test_simulate import SCENARIO
from tests.support import ROOT

GUIDES = ROOT / "docs" / "guides"


def commands(name: str) -> list[str]:
    """The lines of a guide that call the command."""
    return re.findall(r"^    (kserve-vllm .+)$", (GUIDES / name).read_text(), re.MULTILINE)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the files that the guides speak of."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Qwen3-8B").mkdir()
    (tmp_path / "Qwen3-8B" / "config.json").write_text(json.dumps(capacity.CONFIGS["mistral"]))
    records = [{"time": f"2026-01-31T12:00:{i:02d}Z", "prompt_tokens": 300, "output_tokens": 50} for i in range(60)]
    (tmp_path / "usage.jsonl").write_text("\n".join(map(json.dumps, records)))
    short = {**SCENARIO, "arrivals": {"rate": 2, "duration": 60, "prompt": 50, "output": 20}}
    (tmp_path / "scenario.yaml").write_text(yaml.safe_dump({**short, "scaler": {"class": "knative", "max": 4}}))
    (tmp_path / "hpa.yaml").write_text(yaml.safe_dump({**short, "scaler": {"class": "hpa"}}))
    return tmp_path


@pytest.mark.parametrize("command", [*commands("sizing.md"), *commands("simulating.md")])
def test_a_command_of_a_guide_runs(command: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(command.partition(" > ")[0])[1:]
    speed = ["--speed", "roofline"] if words[0] == "plan" else []
    assert cli.main([*words, *speed]) == 0, capsys.readouterr().err
    assert capsys.readouterr().out
    for written in ("values.yaml", "run.png"):
        assert (folder / written).exists() == (written in command)


def test_there_are_commands_to_run() -> None:
    assert len(commands("sizing.md")) >= 4
    assert len(commands("simulating.md")) >= 5


def test_the_guide_counts_the_decisions() -> None:
    recorded = json.loads((Path(__file__).parent / "knative.json").read_text())
    number = sum(len(scenario["decisions"]) for scenario in recorded)
    assert f"all {number:,} decisions" in (GUIDES / "simulating.md").read_text()
    assert f"{len(recorded)} scenarios" in (GUIDES / "simulating.md").read_text()
