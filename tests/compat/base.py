"""What every suite shares: where it is installed, what it asks, what it found, and how that is compared."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SCRIPTS = HERE / "scripts"
EXPECTED = HERE / "expected.toml"
RESULTS = HERE / "results.json"
INSTALL_WITHIN_S = 600.0
RUN_WITHIN_S = 480.0


class NotInstalled(Exception):
    """A suite, or a program that it needs, can't be had here; the message says what failed."""


@dataclass(frozen=True)
class Case:
    """One thing that a suite asked.

    Attributes:
        name: within the suite.
        outcome: `passed`, `failed` or `skipped`, by the suite's own word.
        detail: what it says of a failure, in a line.
    """

    name: str
    outcome: str
    detail: str = ""


@dataclass(frozen=True)
class Target:
    """The server under test.

    Attributes:
        url: of HTTP, without a path.
        grpc: host and port.
        model: its name.
        pid: of its process, where it was started here.
    """

    url: str
    grpc: str
    model: str = "demo"
    pid: int | None = None


@dataclass(frozen=True)
class Folder:
    """A scratch environment, `.tools/compat/NAME`. What is there in the pinned version is not fetched again."""

    path: Path

    def once(self, what: str, make: Callable[[], None]) -> None:
        """Make `what` unless this folder holds just that; a half-made folder is made anew."""
        stamp = self.path / "installed.txt"
        if stamp.is_file() and stamp.read_text() == what:
            return
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir(parents=True)
        try:
            make()
        except (subprocess.SubprocessError, OSError) as error:
            output = getattr(error, "stderr", None) or b""
            raise NotInstalled(f"{what}: {error} {output.decode(errors='replace')[-300:]}".strip()) from error
        stamp.write_text(what)

    def command(self, *command: str) -> None:
        """Run a step of the installation in the folder."""
        subprocess.run(command, cwd=self.path, check=True, capture_output=True, timeout=INSTALL_WITHIN_S)

    def python(self, *requirements: str) -> Path:
        """An environment of its own with these requirements. Returns its interpreter."""

        def make() -> None:
            self.command(sys.executable, "-m", "venv", str(self.path))
            self.command("bin/pip", "install", "--quiet", "--disable-pip-version-check", *requirements)

        self.once(" ".join(requirements), make)
        return self.path / "bin" / "python"

    def node(self, *packages: str) -> Path:
        """A folder whose scripts find these packages of npm. Returns it."""

        def make() -> None:
            (self.path / "package.json").write_text('{"private": true, "type": "module"}')
            self.command("npm", "install", "--silent", "--no-audit", "--no-fund", "--save-exact", *packages)

        self.once(" ".join(packages), make)
        return self.path

    def go(self, package: str, version: str) -> Path:
        """A program of a Go module, built here. Returns it."""
        if shutil.which("go") is None:
            raise NotInstalled(f"{package}: there is no Go here to build it with")

        def make() -> None:
            subprocess.run(
                ["go", "install", f"{package}@{version}"],
                cwd=self.path,
                check=True,
                capture_output=True,
                timeout=INSTALL_WITHIN_S,
                env={**os.environ, "GOBIN": str(self.path / "bin"), "GOFLAGS": "-buildvcs=false"},
            )

        self.once(f"{package}@{version}", make)
        (program,) = (self.path / "bin").iterdir()
        return program

    def unpacked(self, requirement: str, *kind: str) -> Path:
        """A package's archive from PyPI, unpacked: its source with `--no-binary :all:`. Returns the folder in it."""

        def make() -> None:
            self.command(sys.executable, "-m", "pip", "download", "-q", "--no-deps", *kind, "-d", "got", requirement)
            (archive,) = (self.path / "got").iterdir()
            if archive.suffix == ".whl":
                shutil.unpack_archive(archive, self.path / "source", "zip")
            else:
                shutil.unpack_archive(archive, self.path / "source", filter="data")

        self.once(requirement, make)
        inside = list((self.path / "source").iterdir())
        return inside[0] if len(inside) == 1 else self.path / "source"


@dataclass(frozen=True)
class Suite:
    """A suite of others, or a client of others that a script of ours drives.

    Attributes:
        name: on the command line.
        what: what it asks, for the table.
        version: what is installed, as its registry names it.
        run: installs what it needs below the folder, and asks the target.
        ends_server: it ends the server that it asks, so it comes last and can't be run with `--url`.
        tools: it asks the model that calls tools, see `tools_model`; else the demo model.
    """

    name: str
    what: str
    version: str
    run: Callable[[Target, Path], list[Case]]
    ends_server: bool = False
    tools: bool = False


def script(name: str, runner: Sequence[str], target: Target, folder: Path) -> list[Case]:
    """Run one of our scripts with a client's own environment, and read the case of each line that it prints.

    Args:
        name: of a file in `scripts`, copied beside the packages, so that Node finds them.
        runner: the interpreter.
        target: what it asks, given as variables.
        folder: where it runs.
    """
    process = start_script(name, runner, target, folder)
    with process:
        try:
            output, errors = process.communicate(timeout=RUN_WITHIN_S)
        except subprocess.TimeoutExpired:
            process.kill()
            output, errors = process.communicate()
    return cases_of(output, errors, process.returncode)


def start_script(name: str, runner: Sequence[str], target: Target, folder: Path) -> subprocess.Popen[str]:
    """Start one of our scripts; see `script`."""
    for file in SCRIPTS.iterdir():
        if file.is_file():
            shutil.copy(file, folder)
    env = {**os.environ, "URL": target.url, "GRPC": target.grpc, "MODEL": target.model, "PYTHONPATH": ""}
    pipe = subprocess.PIPE
    return subprocess.Popen([*runner, name], cwd=folder, env=env, stdout=pipe, stderr=pipe, text=True)


def cases_of(output: str, errors: str, status: int) -> list[Case]:
    """The cases that a script printed; one more, failed, where it did not come to its end."""
    cases = []
    for line in output.splitlines():
        if line.startswith('{"case"'):
            found = json.loads(line)
            cases.append(Case(found["case"], "passed" if found["ok"] else "failed", one_line(found["detail"])))
    if status or not cases:
        cases.append(Case("the script itself", "failed", one_line(errors[-400:])))
    return cases


def one_line(text: str, most: int = 300) -> str:
    """Text in one line, cut."""
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1] + "…"


@dataclass(frozen=True)
class Deviation:
    """Cases that may differ from `passed`, and why.

    Attributes:
        cases: names, or patterns with `*`.
        reason: in a sentence, for the page.
        whose: `model` (the demo model lacks it), `ours` (not served, or served otherwise), `suite` (its own fault).
    """

    cases: Sequence[str]
    reason: str
    whose: str


@dataclass(frozen=True)
class Expected:
    """What a suite shall find: how many cases pass, and which do not."""

    passes: int = 0
    deviations: Sequence[Deviation] = field(default_factory=tuple)

    def why(self, name: str) -> Deviation | None:
        """The deviation that a case falls under; None where it shall pass."""
        for each in self.deviations:
            if any(fnmatchcase(name, pattern) for pattern in each.cases):
                return each
        return None


def expectations(file: Path = EXPECTED) -> dict[str, Expected]:
    """The checked-in list, by suite.

    Raises:
        ValueError: an entry lacks its reason, or says whose it is by another word.
    """
    read: dict[str, Expected] = {}
    for name, entry in tomllib.loads(file.read_text()).items():
        deviations = []
        for each in entry.get("deviation", ()):
            if not each.get("reason") or each.get("whose") not in ("model", "ours", "suite"):
                raise ValueError(
                    f"{file.name}: {name}: {each.get('cases')} needs a reason, and whose = model, ours or suite"
                )
            deviations.append(Deviation(tuple(each["cases"]), each["reason"], each["whose"]))
        read[name] = Expected(int(entry["passes"]), tuple(deviations))
    return read


def compare(cases: Iterable[Case], expected: Expected | None) -> list[str]:
    """What is not as the list says, a sentence each: unlisted deviations, listed ones that are gone, lost cases."""
    if expected is None:
        return [f"the suite is not in {EXPECTED.name}"]
    cases, faults, seen = list(cases), [], set()
    for case in cases:
        known = expected.why(case.name)
        if case.outcome == "passed":
            continue
        if known is None:
            faults.append(f"{case.name} {case.outcome}, and is not in {EXPECTED.name}: {case.detail}")
        else:
            seen |= {pattern for pattern in known.cases if fnmatchcase(case.name, pattern)}
    for each in expected.deviations:
        faults += [f"{name} is listed, but deviates no longer" for name in each.cases if name not in seen]
    passed = sum(case.outcome == "passed" for case in cases)
    if passed != expected.passes:
        faults.append(f"{passed} passed, and {expected.passes} are listed (`passes`)")
    return faults
