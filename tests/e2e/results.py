"""What a run has shown, as JSON: for each case its outcome and figures, and the versions, date and commit it ran at."""

from __future__ import annotations

import fcntl
import json
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(__file__).parent / "results"
Tree = dict[str, Any]


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def commit() -> str:
    """The commit of the working tree, with `+` behind it where there are changes to what is tested."""
    changed = _git("status", "--porcelain", "--", "charts", "inferenceservices", "runtime", "Dockerfile")
    return _git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")


class Results:
    """A file of results. A case that ran replaces what was there of it; the others stay with the run they are of.

    Args:
        path: the file; made if it is not there.
        versions: what the cluster has, see `Found.versions`.
        image: the runtime's image.
        note: what a reader has to know of the cluster.
    """

    def __init__(self, path: Path, versions: Mapping[str, Any], image: str, note: str = "") -> None:
        self.path = path
        now = datetime.now(UTC)
        self._run = now.strftime("%Y%m%dT%H%M%SZ")
        self._about = {
            "date": now.strftime("%Y-%m-%d"),
            "commit": commit(),
            "image": image,
            "cluster": dict(versions),
            **({"note": note} if note else {}),
        }

    def write(self, case: str, outcome: str, seconds: float, figures: Mapping[str, Any], reason: str = "") -> None:
        """Put down one case. A skipped one does not replace what an earlier run has shown.

        Args:
            case: `file::function` below tests/e2e.
            outcome: `passed`, `failed` or `skipped`.
            figures: what was seen, by words for it.
            reason: of a skip or failure.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Two runs at once, such as one of a stream of minutes beside the others, write into one file.
        with self.path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._write(case, outcome, seconds, figures, reason)

    def _write(self, case: str, outcome: str, seconds: float, figures: Mapping[str, Any], reason: str) -> None:
        tree: Tree = json.loads(self.path.read_text()) if self.path.exists() else {"runs": {}, "cases": {}}
        tree["runs"][self._run] = self._about
        cases = tree["cases"]
        if outcome == "skipped" and cases.get(case, {}).get("outcome") in ("passed", "failed"):
            return
        cases[case] = {"outcome": outcome, "seconds": round(seconds, 1), "run": self._run, "figures": dict(figures)}
        if reason:
            cases[case]["reason"] = reason
        used = {c["run"] for c in cases.values()}
        tree["runs"] = {run: what for run, what in tree["runs"].items() if run in used}
        tree["cases"] = dict(sorted(cases.items()))
        self.path.write_text(json.dumps(tree, indent=1, ensure_ascii=False) + "\n")
