"""Create `.venv` from the lock files, once: a second run with the same locks does nothing.

Usage: python3 runtime/tools/setup_venv.py [--dev] [--venv DIR]

Every package is pinned with hashes and installed without resolving. torch's CPU build comes from the configured
indexes, else from PyTorch's own; where neither has it, PyPI's build with CUDA's libraries serves as well.
"""

from __future__ import annotations

import argparse
import ctypes.util
import hashlib
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOCKS = ROOT / "runtime" / "requirements"
PYTORCH_INDEX = "https://download.pytorch.org/whl/cpu"
_SUPPORTED = ((3, 11), (3, 13))


def main(argv: Sequence[str] | None = None) -> int:
    """Set up the environment. Returns 0, or pip's exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dev", action="store_true", help="also what the tests and checks need")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="where (default: %(default)s)")
    args = parser.parse_args(argv)
    if not _SUPPORTED[0] <= sys.version_info[:2] <= _SUPPORTED[1]:
        print(f"Python 3.11 to 3.13 is needed, this is {sys.version.split()[0]}; try make PYTHON=python3.12 ...")
        return 1
    lock = LOCKS / ("lock-dev.txt" if args.dev else "lock-runtime.txt")
    torch = [LOCKS / "torch-cpu.txt", LOCKS / "torch-pypi.txt"]
    wanted = _stamp([lock, *torch, ROOT / "pyproject.toml"], args.venv)
    stamp = args.venv / ".locks"
    done = stamp.read_text().split() if stamp.exists() else []
    if wanted in done or _stamp([LOCKS / "lock-dev.txt", *torch, ROOT / "pyproject.toml"], args.venv) in done:
        return 0
    if ctypes.util.find_library("numa") is None:
        print(
            "vLLM's CPU build needs the system library libnuma: apt-get install libnuma1, or dnf install numactl-libs"
        )
        return 1
    started = time.monotonic()
    print(f"setting up {args.venv} (about 3.5 GB; two minutes on a fast line)", flush=True)
    if not done and args.venv.exists():
        shutil.rmtree(args.venv)
    if not args.venv.exists():
        venv.create(args.venv, with_pip=True)
    pip = [str(args.venv / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check", "-q"]
    locked = [*pip, "--no-deps", "--require-hashes"]
    if not _has_torch(args.venv):
        code = _install_torch(locked)
        if code:
            return code
    print(f"  {lock.name} ...", flush=True)
    code = _run([*locked, "-r", str(lock)])
    # The wheels bring no byte code; compiled once here, the first start is as fast as the second.
    code = code or _run([*pip, "--no-deps", "--no-build-isolation", "-e", str(ROOT)])
    if code:
        return code
    stamp.write_text("\n".join([wanted]))
    print(f"  done in {time.monotonic() - started:.0f} s", flush=True)
    return 0


def _install_torch(locked: Sequence[str]) -> int:
    """torch from the first place that has it. Returns 0, or pip's exit code at the last place."""
    cpu, pypi = ("-r", str(LOCKS / "torch-cpu.txt")), ("-r", str(LOCKS / "torch-pypi.txt"))
    print("  torch ...", flush=True)
    if _run([*locked, *cpu], quiet=True) == 0:
        return 0
    print(f"  torch's CPU build is not on the configured indexes; asking {PYTORCH_INDEX} ...", flush=True)
    # Once and not for long: where that index can't be reached, pip would wait for minutes.
    if _run([*locked, "--timeout", "20", "--retries", "1", "--index-url", PYTORCH_INDEX, *cpu], quiet=True) == 0:
        return 0
    print(
        "  not to be had there; taking PyPI's torch with CUDA's libraries (4.5 GB), which runs on a CPU too", flush=True
    )
    return _run([*locked, *pypi])


def _run(command: Sequence[str], quiet: bool = False) -> int:
    return subprocess.run(command, stderr=subprocess.DEVNULL if quiet else None, check=False).returncode


def _has_torch(folder: Path) -> bool:
    check = "import importlib.metadata as m; raise SystemExit(m.version('torch') not in ('2.13.0+cpu', '2.13.0'))"
    return _run([str(folder / "bin" / "python"), "-c", check], quiet=True) == 0


def _stamp(files: Sequence[Path], folder: Path) -> str:
    digest = hashlib.sha256(f"{folder.resolve()} {sys.version_info[:2]}".encode())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    raise SystemExit(main())
