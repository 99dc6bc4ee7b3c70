"""boofuzz over V2's URLs and bodies."""

from __future__ import annotations

from pathlib import Path

from tests.compat.base import Case, Folder, Suite, Target, script
from tests.compat.suites.proxies import answers

_PINNED = "boofuzz==0.4.2"


def _run(target: Target, folder: Path) -> list[Case]:
    python = Folder(folder / "boofuzz").python(_PINNED)
    cases = script("boofuzz_v2.py", [str(python)], target, folder / "boofuzz")
    return [*cases, Case("the server is live after it", "passed" if answers(target) else "failed")]


SUITES = [Suite("boofuzz", "V2's URLs, names and bodies, mutated: below 500", f"PyPI {_PINNED}", _run)]
