"""Reduce published CustomResourceDefinitions to what validation needs, so that the tests have it on every machine.

Usage: python tests/tools/reduce_crds.py FOLDER    write tests/charts/schemas.json anew from the YAML files in FOLDER

Names, types and bounds are kept, and the defaults of a few kinds; descriptions and rules in code are not. Equal parts,
such as the pod's specification, are written once: `nodes` holds them, and an integer in the place of a schema is an
index into it.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

Schema = dict[str, Any]

REDUCED = Path(__file__).resolve().parents[1] / "charts" / "schemas.json"
_KEPT = {
    "type",
    "required",
    "enum",
    "pattern",
    "format",
    "nullable",
    "minimum",
    "maximum",
    "minLength",
    "maxLength",
    "minItems",
    "maxItems",
    "x-kubernetes-preserve-unknown-fields",
    "x-kubernetes-int-or-string",
}

# Kinds whose defaults are kept: the tests show that the chart writes all that the API server would add.
_WITH_DEFAULTS = {"HTTPRoute", "PodMonitor"}


def _children(schema: Schema, each: Callable[[Any], Any]) -> Schema:
    """The parts of a schema that are schemas again, each put through `each`."""
    found: Schema = {}
    if "properties" in schema:
        found["properties"] = {name: each(child) for name, child in schema["properties"].items()}
    for key in ("items", "additionalProperties", "not"):
        if key in schema:
            found[key] = schema[key] if isinstance(schema[key], bool) else each(schema[key])
    for key in ("allOf", "anyOf", "oneOf"):
        if key in schema:
            found[key] = [each(child) for child in schema[key]]
    return found


def reduced(folder: Path) -> Schema:
    """What `schemas.json` should hold for the CRDs of a folder."""
    nodes: list[Schema] = []
    index: dict[str, int] = {}

    def node(schema: Schema, kept: set[str]) -> int:
        parts = _children(schema, functools.partial(node, kept=kept))
        made = {key: value for key, value in schema.items() if key in kept} | parts
        text = json.dumps(made, sort_keys=True)
        if text not in index:
            index[text] = len(nodes)
            nodes.append(made)
        return index[text]

    kinds: dict[str, int] = {}
    for path in sorted(folder.glob("*.yaml")):
        spec = yaml.safe_load(path.read_text())["spec"]
        for version in spec["versions"]:
            name = f"{spec['group']}/{version['name']} {spec['names']['kind']}"
            kept = _KEPT | ({"default"} if spec["names"]["kind"] in _WITH_DEFAULTS else set())
            kinds[name] = node(version["schema"]["openAPIV3Schema"], kept)
    return {"kinds": kinds, "nodes": nodes}


def whole(stored: Schema) -> dict[tuple[str, str], Schema]:
    """Schemas by (apiVersion, kind), from what `reduced` made."""

    @functools.cache
    def schema(at: int) -> Schema:
        node = stored["nodes"][at]
        return {**node, **_children(node, schema)}

    return {(name.split()[0], name.split()[1]): schema(at) for name, at in stored["kinds"].items()}


def main(arguments: list[str]) -> int:
    """Write the file; returns 0, or 2 where no folder with CRDs is named."""
    if len(arguments) != 1 or not any(Path(arguments[0]).glob("*.yaml")):
        print(__doc__, file=sys.stderr)
        return 2
    made = reduced(Path(arguments[0]))
    lines = ",\n".join(json.dumps(node, sort_keys=True, separators=(",", ":")) for node in made["nodes"])
    kinds = json.dumps(made["kinds"], indent=1, sort_keys=True)
    REDUCED.write_text(f'{{"kinds": {kinds},\n"nodes": [\n{lines}\n]}}\n')
    print(f"{len(made['kinds'])} kinds in {REDUCED}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
