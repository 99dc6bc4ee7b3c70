"""Get AIConfigurator for the test of the extra `kserve-vllm[plan]`, into `.tools/plan`.

Usage: python -m tests.tools.install_aiconfigurator     (about 800 MB; does nothing where it is there)

Where it can't be had, it says loudly which test will be skipped and ends with 0, so that all else is still tested.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOCK = ROOT / "runtime" / "requirements" / "lock-plan.txt"
PLACE = ROOT / ".tools" / "plan"
"""A folder for the end of `sys.path`: what the environment has too is taken from there."""


def installed() -> bool:
    """Whether it is there, as the lock file has it."""
    stamp = PLACE / ".lock"
    return stamp.exists() and stamp.read_text() == LOCK.read_text()


def main() -> int:
    """Install it where it is missing. Returns 0."""
    if installed():
        return 0
    print("installing AIConfigurator (about 800 MB) ...", flush=True)
    shutil.rmtree(PLACE, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps"]
    try:
        subprocess.run([*command, "--require-hashes", "--target", str(PLACE), "-r", str(LOCK)], check=True, timeout=900)
        (PLACE / ".lock").write_text(LOCK.read_text())
    except (subprocess.SubprocessError, OSError) as error:
        line = "!" * 78
        print(f"{line}\nAIConfigurator can't be had: {error}\nIts test WILL BE SKIPPED.\n{line}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
