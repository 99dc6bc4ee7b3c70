"""Write the reference pages' tables from the code.

Usage: gen_reference.py [--check]

A table stands between `<!-- NAME -->` and `<!-- /NAME -->`. `--check` changes nothing and fails on drift.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from kserve_vllm.config import settings
from kserve_vllm.config.profiles import PROFILES
from kserve_vllm.telemetry.metrics import DECLARED

PAGES = Path(__file__).resolve().parents[2] / "docs" / "reference"


def settings_table() -> str:
    """A row per setting: flag, default, what it does."""
    rows = ["| flag | default | what it does |", "| --- | --- | --- |"]
    for _, name, info in settings.fields():
        default = "" if info.default_factory or info.default is None else f"`{info.default}`"
        spellings = ", ".join(f"`--{flag}`" for flag in [settings.flag_name(name), *settings.aliases(info)])
        rows.append(f"| {spellings} | {default} | {info.description} |")
    return "\n".join(rows)


def profiles_table() -> str:
    """A row per profile: name, its flags, when to choose it."""
    rows = ["| profile | engine flags | for |", "| --- | --- | --- |"]
    for name, profile in PROFILES.items():
        flags = " ".join(f"--{flag}" + ("" if value is True else f" {value}") for flag, value in profile.flags.items())
        rows.append(f"| `{name}` | `{flags}` | {profile.summary} |")
    return "\n".join(rows)


def metrics_table() -> str:
    """A row per metric of ours: name as Prometheus sees it, kind, labels, what it counts."""
    rows = ["| metric | kind | labels | what it counts |", "| --- | --- | --- | --- |"]
    for each in DECLARED:
        name = each.name + ("_total" if each.kind == "counter" else "")
        labels = ", ".join(f"`{label}`" for label in each.labels)
        rows.append(f"| `{name}` | {each.kind} | {labels} | {each.text} |")
    return "\n".join(rows)


def main() -> int:
    """Rewrite the tables, or compare them. Returns 0, or 1 where `--check` finds drift."""
    drifted = []
    for name, table in (("settings", settings_table()), ("profiles", profiles_table()), ("metrics", metrics_table())):
        page = PAGES / f"{name}.md"
        before = page.read_text()
        text, count = re.subn(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", rf"\g<1>{table}\n\g<2>", before, flags=re.S)
        if count != 1:
            raise SystemExit(f"{page} has no <!-- {name} --> ... <!-- /{name} -->")
        if text == before:
            continue
        drifted.append(page.name)
        if "--check" not in sys.argv:
            page.write_text(text)
    if drifted and "--check" in sys.argv:
        print(f"{', '.join(drifted)} drifted; run: .venv/bin/python runtime/tools/gen_reference.py")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
