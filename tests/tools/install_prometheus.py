"""Get Prometheus and promtool for the tests: Debian's package, installed as root, else unpacked into `.tools/`.

Usage: python tests/tools/install_prometheus.py

Does nothing where both binaries are found. Where they can't be had, it says loudly which tests will be skipped and
ends with 0, so that everything else is still tested.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

UNPACKED = Path(__file__).resolve().parents[2] / ".tools" / "prometheus"
BINARIES = ("prometheus", "promtool")


def find(name: str) -> str | None:
    """Path of a binary, on the PATH or unpacked here."""
    own = UNPACKED / "usr" / "bin" / name
    return shutil.which(name) or (str(own) if own.exists() else None)


def main() -> int:
    """Install what is missing. Returns 0."""
    if all(find(name) for name in BINARIES):
        return 0
    if shutil.which("apt-get") is None:
        return _give_up("this machine has no apt-get")
    try:
        if os.geteuid() == 0:
            _install()
        else:
            _unpack()
    except (subprocess.SubprocessError, OSError) as error:
        return _give_up(str(error))
    return 0 if all(find(name) for name in BINARIES) else _give_up("the package has no such binaries")


def _install() -> None:
    print("installing Debian's prometheus ...", flush=True)
    environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    _run(["apt-get", "update", "-qq"], env=environ)
    with tempfile.TemporaryDirectory() as folder:
        # The tests start servers of their own; the package must not start one.
        policy = Path("/usr/sbin/policy-rc.d")
        ours = not policy.exists()
        if ours:
            policy.write_text("#!/bin/sh\nexit 101\n")
            policy.chmod(0o755)
        try:
            _run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", "prometheus"], env=environ, cwd=folder)
        finally:
            if ours:
                policy.unlink()


def _unpack() -> None:
    print(f"unpacking Debian's prometheus into {UNPACKED} ...", flush=True)
    UNPACKED.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        _run(["apt-get", "download", "prometheus"], cwd=folder)
        (package,) = Path(folder).glob("prometheus_*.deb")
        _run(["dpkg", "-x", str(package), str(UNPACKED)])


def _run(command: list[str], cwd: str | None = None, env: dict[str, str] | None = None) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=cwd, env=env, timeout=600)


def _give_up(why: str) -> int:
    lines = [
        "!" * 78,
        f"prometheus and promtool can't be had: {why}",
        "The tests of rules, and of every query against a real Prometheus, WILL BE SKIPPED.",
        "Install them by hand: https://prometheus.io/download/",
        "!" * 78,
    ]
    print("\n".join(lines), file=sys.stderr, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
