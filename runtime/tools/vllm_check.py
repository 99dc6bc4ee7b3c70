"""Say what a version of vLLM changes for this project, from a wheel, of which nothing is imported.

Usage: vllm_check.py [--accept] WHEEL        a wheel's file, of vLLM or of a library that is in the table
       vllm_check.py [--accept] --installed  what is installed here, with uvicorn, h2, hpack, kserve, prometheus-client

Shown are: imports of ours that are gone; touchpoints (kserve_vllm/engine/compat.py) that have changed, with what
happens then; routes that nobody has classified (kserve_vllm/protocols/http/endpoints.py); fields of requests that
nobody has. `--accept` adds what was found to the fingerprints that are known, once someone has read the changes.
Exit code 0: nothing to do; 1: there is.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from kserve_vllm.engine import compat
from kserve_vllm.engine.inspection import Inspector, Installed, Wheel, imports_of, routes_of
from kserve_vllm.protocols.http.endpoints import is_classified

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "runtime" / "kserve_vllm"
_REQUESTS = {
    "vllm.entrypoints.openai.chat_completion.protocol.ChatCompletionRequest": "chat",
    "vllm.entrypoints.openai.completion.protocol.CompletionRequest": "completion",
    "vllm.entrypoints.openai.responses.protocol.ResponsesRequest": "responses",
    "vllm.entrypoints.anthropic.protocol.AnthropicMessagesRequest": "messages",
    "vllm.entrypoints.pooling.embed.protocol.EmbeddingCompletionRequest": "embeddings",
}
_FIELDS = "request fields: "


def missing_imports(inspector: Inspector) -> list[str]:
    """Imports from vLLM in our sources that a version has not, nor the other place that the table names."""
    elsewhere = {name: row.names for row in compat.TABLE for name in row.names}
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        for name in sorted(imports_of(file.read_text(), "vllm")):
            if all(inspector.look(each, "exists") is None for each in elsewhere.get(name, (name,))):
                found.append(f"{file.relative_to(PACKAGE)}: {name}")
    return found


def new_routes(inspector: Inspector, modules: list[str]) -> list[str]:
    """Routes that are for administrators alone since nobody has said what they are."""
    found = set()
    for module in modules:
        tree = inspector.module(module)
        for method, path in routes_of(tree) if tree is not None else ():
            template = re.sub(r"\{(\w+):\w+\}", r"{\1}", path)
            if not is_classified(template):
                found.add(f"{method} {template}  ({module})")
    return sorted(found)


def request_fields(inspector: Inspector) -> dict[str, set[str]]:
    """Fields of each kind of request."""
    return {
        kind: {field for field in (inspector.look(name, "fields") or "").split() if not field.startswith("_")}
        for name, kind in _REQUESTS.items()
    }


def main() -> int:
    """Look, and say what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, nargs="?")
    parser.add_argument("--installed", action="store_true")
    parser.add_argument("--accept", action="store_true")
    args = parser.parse_args()
    if (args.wheel is None) is not args.installed:
        parser.error("name a wheel, or --installed")
    if args.installed:
        inspector, packages = Inspector(Installed()), {row.package for row in compat.TABLE}
        version = compat.installed_version("vllm")
        place = Installed().folder("vllm")
        assert place is not None, "vLLM is not installed"
        modules = [
            ".".join(file.relative_to(place.parent).with_suffix("").parts).removesuffix(".__init__")
            for file in sorted((place / "entrypoints").rglob("*.py"))
        ]
    else:
        wheel = Wheel(args.wheel)
        name, version = args.wheel.name.split("-")[:2]
        version = version.partition("+")[0]
        inspector, packages = Inspector(wheel), {name.removesuffix("_cpu")}
        modules = wheel.modules("vllm.entrypoints")
    known = json.loads(compat.FINGERPRINTS.read_text()) if compat.FINGERPRINTS.exists() else {}
    rows = [row for row in compat.TABLE if row.package in packages]
    subject = "vLLM" if "vllm" in packages else next(iter(packages))
    print(f"{subject} {version}: {len(rows)} touchpoints, written for vLLM {' and '.join(compat.KNOWN_VERSIONS)}")
    todo = 0

    def section(title: str, lines: list[str]) -> None:
        nonlocal todo
        todo += len(lines)
        print(f"\n{title}: {len(lines) or 'none'}")
        for line in lines:
            print(f"  {line}")

    if "vllm" in packages:
        section("imports that are gone", missing_imports(inspector))
    changed = []
    for row in rows:
        now = compat.fingerprint(inspector, row)
        if now is None or now not in known.get(row.key, {}):
            changed.append(_explain(row, now, known.get(row.key, {})))
        if now is not None:
            label = compat.installed_version(row.package) if args.installed else version
            versions = known.setdefault(row.key, {}).setdefault(now, [])
            if label not in versions:
                versions.append(label)
    section("touchpoints that differ", changed)
    if "vllm" in packages:
        section("routes that nobody has classified (for administrators until then)", new_routes(inspector, modules))
    unknown = []
    for kind, names in request_fields(inspector).items() if "vllm" in packages else ():
        before = set(known.get(_FIELDS + kind, {}))
        unknown += [f"{kind}: {name}" for name in sorted(names - before)]
        entry = known.setdefault(_FIELDS + kind, {})
        for name in names:
            if version not in entry.setdefault(name, []):
                entry[name].append(version)
    if "vllm" in packages:
        section("fields of requests that nobody has classified (the fast path leaves them to vLLM)", unknown)
    if args.accept:
        keys = {row.key for row in compat.TABLE} | {_FIELDS + kind for kind in _REQUESTS.values()}
        kept = {
            key: {mark: sorted(versions) for mark, versions in sorted(entry.items())}
            for key, entry in sorted(known.items())
            if key in keys
        }
        compat.FINGERPRINTS.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
        print(f"\nadded to {compat.FINGERPRINTS.relative_to(ROOT)}")
        return 0
    return int(todo > 0)


def _explain(row: compat.Touchpoint, now: str | None, before: dict[str, list[str]]) -> str:
    what = f"{row.otherwise}{f' ({chr(44).join(row.shortcuts)})' if row.shortcuts else ''}"
    if now is None:
        return f"{what}: {row.key} is gone; {row.why}"
    if row.kind in ("fields", "signature") and before:
        last = set(list(before)[-1].split())
        changes = [f"+{word}" for word in now.split() if word not in last]
        changes += [f"-{word}" for word in sorted(last - set(now.split()))]
        return f"{what}: {row.key} {' '.join(changes) or 'has another order'}; {row.why}"
    return f"{what}: {row.key} has changed; {row.why}"


if __name__ == "__main__":
    sys.exit(main())
