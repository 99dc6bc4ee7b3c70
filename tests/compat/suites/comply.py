"""llm-comply: answers against OpenAI's, Open Responses' and Anthropic's descriptions."""

from __future__ import annotations

import functools
import json
import subprocess
from pathlib import Path

from tests.compat.base import RUN_WITHIN_S, Case, Folder, Suite, Target, one_line

_PINNED = "llm-comply==0.5.0"
# Format by its name there, with the name of the suite.
_FORMATS = {"openai-chat": "comply-chat", "open-responses": "comply-responses", "anthropic": "comply-messages"}


def _run(form: str, target: Target, folder: Path) -> list[Case]:
    python = Folder(folder / "llm-comply").python(_PINNED)
    command = [str(python.parent / "llm-comply"), "run", "--format", form, "--json", "--model", target.model]
    command += ["--base-url", f"{target.url}/v1", "--api-key", "none"]
    done = subprocess.run(command, capture_output=True, timeout=RUN_WITHIN_S, check=False)
    return [
        Case(each["id"], each["status"], one_line("; ".join(each.get("errors") or ())))
        for each in json.loads(done.stdout)["results"]
    ]


SUITES = [
    Suite(name, f"llm-comply, format `{form}`", f"PyPI {_PINNED}", functools.partial(_run, form), tools=True)
    for form, name in _FORMATS.items()
]
