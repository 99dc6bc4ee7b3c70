"""The API tests of OpenAI's and Anthropic's SDKs for Python, from their own source, against the server.

They were written for a mock that answers by the description, so they name models that the server has not: those names
are replaced in the unpacked copy. A case is a test in all its variants (sync and async, loose and strict).
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

from tests.compat.base import RUN_WITHIN_S, Case, Folder, NotInstalled, Suite, Target, one_line

_FOR_TESTS = (
    "pytest==9.2.0",
    "pytest-asyncio==1.4.0",
    "pytest-timeout==2.4.0",
    "inline-snapshot",
    "aiohttp",
    "httpx_aiohttp",
)


@dataclass(frozen=True)
class _Sdk:
    """What is run of an SDK's tests: files below `tests/api_resources`, and the path at which its API begins."""

    pinned: str
    requirements: tuple[str, ...]
    files: tuple[str, ...]
    base: str


_SDKS = {
    "openai-python": _Sdk(
        "openai==3.51.0",
        ("httpx2", "rich", "numpy"),
        (
            "test_models.py",
            "test_completions.py",
            "chat/test_completions.py",
            "test_responses.py",
            "responses",
            "test_embeddings.py",
            "test_batches.py",
            "test_files.py",
        ),
        "/v1",
    ),
    "anthropic-python": _Sdk(
        "anthropic==2.10.0",
        ("httpx2", "respx", "http-snapshot[httpx]==0.1.9", "dirty-equals", "time-machine"),
        ("test_models.py", "test_messages.py"),
        "",
    ),
}
_MODEL_NAMES = re.compile(r'(model(?:_id)?=|^ +)"(?:(?<==")[^"]+|(?:gpt|claude|ft:gpt|model_id)[^"]*)"', re.MULTILINE)
"""A model's name, as an argument by name or at the start of a line."""


def _run(name: str, target: Target, folder: Path) -> list[Case]:
    sdk = _SDKS[name]
    source = Folder(folder / f"{name}-source").unpacked(sdk.pinned, "--no-binary", ":all:")
    python = Folder(folder / name).python(sdk.pinned, *_FOR_TESTS, *sdk.requirements)
    tests = source / "tests" / "api_resources"
    if not tests.is_dir():
        raise NotInstalled(f"the source of {sdk.pinned} has no tests/api_resources")
    for file in tests.rglob("test_*.py"):
        text = _MODEL_NAMES.sub(rf'\1"{target.model}"', file.read_text())
        file.write_text(text.replace("max_tokens=1024", "max_tokens=16"))
    report = folder / f"{name}.xml"
    report.unlink(missing_ok=True)
    options = [
        "-q",
        "-p",
        "no:cacheprovider",
        "-o",
        "addopts=",
        "-o",
        "filterwarnings=default",
        "-o",
        "junit_family=xunit1",
    ]
    options += ["--timeout=60", "--tb=line", "--show-capture=no", f"--junitxml={report}"]
    files = [f"tests/api_resources/{each}" for each in sdk.files]
    done = subprocess.run(
        [str(python), "-m", "pytest", *options, *files],
        cwd=source,
        env={**os.environ, "TEST_API_BASE_URL": target.url + sdk.base, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=RUN_WITHIN_S,
        check=False,
    )
    if not report.is_file():
        raise NotInstalled(f"{sdk.pinned}: its tests do not start: {one_line(done.stdout[-300:])}")
    return by_test(report)


def by_test(report: Path) -> list[Case]:
    """Cases of a JUnit report: variants of a test are one case, which passed if all of them did.

    The name is the test's file below `api_resources` and its function, as `chat/test_completions: method_create`.
    """
    found: dict[str, list[tuple[str, str]]] = {}
    for element in ET.parse(report).iter("testcase"):
        test = element.get("name", "").partition("[")[0].removeprefix("test_")
        where = element.get("file", "").removeprefix("tests/api_resources/").removesuffix(".py")
        problem = element.find("failure")
        if problem is None:
            problem = element.find("error")
        outcome = "failed" if problem is not None else "skipped" if element.find("skipped") is not None else "passed"
        detail = "" if problem is None else problem.get("message") or ""
        found.setdefault(f"{where}: {test}", []).append((outcome, detail))
    cases = []
    for name, variants in found.items():
        outcomes = {outcome for outcome, _ in variants}
        outcome = "failed" if "failed" in outcomes else "passed" if "passed" in outcomes else "skipped"
        cases.append(Case(name, outcome, one_line(next((detail for _, detail in variants if detail), ""))))
    return cases


SUITES = [
    Suite(
        name,
        f"the SDK's own API tests: {', '.join(f.removesuffix('.py') for f in sdk.files)}",
        f"PyPI {sdk.pinned}",
        functools.partial(_run, name),
        tools=name == "anthropic-python",
    )
    for name, sdk in _SDKS.items()
]
