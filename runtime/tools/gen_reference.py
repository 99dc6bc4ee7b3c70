"""Write the README's reference tables from the code.

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

README = Path(__file__).resolve().parents[2] / "README.md"


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
    """Rewrite the tables, or compare them."""
    before = README.read_text()
    text = before
    tables = (("settings", settings_table()), ("profiles", profiles_table()), ("metrics", metrics_table()))
    for name, table in tables:
        text, count = re.subn(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", rf"\g<1>{table}\n\g<2>", text, flags=re.S)
        if count != 1:
            raise SystemExit(f"README.md has no <!-- {name} --> ... <!-- /{name} -->")
    if "--check" in sys.argv:
        if text != before:
            print("README.md has drifted; run: .venv/bin/python runtime/tools/gen_reference.py")
        return int(text != before)
    README.write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
