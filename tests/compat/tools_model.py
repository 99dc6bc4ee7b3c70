"""The model that calls tools, for suites that ask for them: the demo model, trained further here when it is missing.

It is made rather than checked in: its weights are the outcome of a script, and no part of the product. What it is
taught, and how well it knows it, is told by `runtime/tools/train_tools_model.py`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from kserve_vllm.config import demo
from tests.compat.base import ROOT, NotInstalled

NAME = "demo-tools"
FLAGS = ("--model-name", NAME, "--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--enforce-eager")
STRICT = ("--strict-openai", "true")
"""As OpenAI's API is, which these suites are written for."""
SCRIPT = ROOT / "runtime" / "tools" / "train_tools_model.py"
WITHIN_S = 1500.0


def fingerprint() -> str:
    """Of all that the model is made from: both scripts, and the demo model."""
    digest = hashlib.sha256()
    for file in (SCRIPT, SCRIPT.with_name("train_demo_model.py"), demo.folder() / "model.safetensors"):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def build(folder: Path) -> Path:
    """The model's folder below this one; trained first where it is missing or was made from something else.

    Raises:
        NotInstalled: it can't be trained here.
    """
    where = folder / "tools-model"
    made = where / fingerprint()
    if (made / "model.safetensors").is_file():
        return made
    shutil.rmtree(where, ignore_errors=True)  # of another script
    half = where / "half-made"
    print("training the model that calls tools, once: about five minutes on one core", flush=True)
    began, said = time.monotonic(), ""
    # One thread, so that the same script gives the same weights wherever the processor is the same.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, str(SCRIPT), "--out", str(half)]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            said = (said + line)[-2000:]
            print(f"    {line.rstrip()}", flush=True)
            if time.monotonic() - began > WITHIN_S:
                process.kill()
    if process.returncode:
        raise NotInstalled(f"the model that calls tools was not made: {said[-300:]}")
    half.rename(made)
    print(f"    made in {time.monotonic() - began:.0f} s: {made}", flush=True)
    return made
