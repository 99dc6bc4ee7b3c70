"""Write what the chart derives from its commented values.yaml: values.schema.json, README.md and files/defaults.json.

Run it without arguments after a change of values.yaml, README.in.md or files/names.yaml; with --check it writes
nothing and fails when a file is not what it would write.

files/defaults.json holds the defaults once more, for the templates: Helm takes a value out that is null in an overlay
and knows nothing of new blocks with --reuse-values, and the templates put the defaults back.

The comments directly above a key say what it is:

    # -- Description, over as many lines as it takes.
    # @schema {minimum: 1}
    key: 3

The type comes from the default. `@schema` is one line of YAML whose keywords are laid over the schema.
Two keywords are this script's own: `entries: NAME` makes a map whose entries have the schema of the
top-level key NAME, and `namePattern`/`nameMaxLength` bound the names in such a map. An object takes no
keys but those that are listed, unless its `@schema` says otherwise. Null is taken everywhere and means the default; a
number is taken where text without a pattern is asked for (the templates write it as text), unless `@schema` has a type.

files/names.yaml lists names that values had in an earlier version (`renamed`) and names that people try (`instead`).
The schema takes both, so that the templates can move or explain them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).resolve().parents[2] / "charts" / "kserve-vllm"
PLACEHOLDER = "<!-- values -->"

# What the API server takes for names of objects, labels and quantities (apimachinery's validation, resource.Quantity).
OBJECT_NAME = "^([a-z0-9]([-a-z0-9.]*[a-z0-9])?)?$"
# Values that are the name of an object, by their own key or by the block's that they are in.
OBJECT_NAME_KEYS = {
    "claim",
    "configMap",
    "existing",
    "priorityClassName",
    "runtimeClassName",
    "secretName",
    "serviceAccountName",
    "storageClassName",
    "storageContainerName",
    "tlsSecretName",
}
OBJECT_NAME_BLOCKS = {"gateway", "kedaAuthentication", "tokenSecret"}
NAMESPACE = "^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"
# The largest whole number of Kubernetes' fields that have 32 bits, as most have.
WHOLE_NUMBER = 2**31 - 1
QUANTITY_KEYS = {"cpu", "memory", "modelSize", "sharedMemory", "size", "tmpSizeLimit"}
QUANTITY = "^([0-9]+([.][0-9]*)?|[.][0-9]+)([KMGTPE]i|[numkMGTPE]|[eE][-+]?[0-9]+)?$"

# Shapes of Kubernetes that appear in several places.
SHARED: dict[str, Any] = {
    "objectName": {
        "type": ["string", "number"],
        "minimum": 0,
        "minLength": 1,
        "maxLength": 253,
        "pattern": OBJECT_NAME,
    },
    "named": {
        "type": "object",
        "additionalProperties": False,
        "required": ["name"],
        "properties": {"name": {"$ref": "#/definitions/objectName"}},
    },
    "labelKey": {
        "pattern": "^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$",
    },
    "labelValue": {
        "type": ["string", "number", "boolean", "null"],
        "maxLength": 63,
        "pattern": "^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$",
    },
    "quantity": {"type": ["string", "number", "null"], "minimum": 0, "pattern": QUANTITY},
    "envVar": {
        "type": "object",
        "additionalProperties": False,
        "required": ["name"],
        "properties": {
            "name": {"type": "string", "pattern": "^[-._A-Za-z][-._A-Za-z0-9]*$"},
            # A number or true is written as text.
            "value": {"type": ["string", "number", "boolean"]},
            "valueFrom": {
                "type": "object",
                "additionalProperties": False,
                "minProperties": 1,
                "maxProperties": 1,
                "properties": {
                    "secretKeyRef": {"$ref": "#/definitions/keyRef"},
                    "configMapKeyRef": {"$ref": "#/definitions/keyRef"},
                    "fieldRef": {
                        "type": "object",
                        "additionalProperties": False,
                        "required": ["fieldPath"],
                        "properties": {"fieldPath": {"type": "string"}, "apiVersion": {"type": "string"}},
                    },
                    "resourceFieldRef": {
                        "type": "object",
                        "additionalProperties": False,
                        "required": ["resource"],
                        "properties": {
                            "resource": {"type": "string"},
                            "containerName": {"type": "string"},
                            "divisor": {"type": "string"},
                        },
                    },
                },
            },
        },
        "oneOf": [{"required": ["value"]}, {"required": ["valueFrom"]}],
    },
    "keyRef": {
        "type": "object",
        "additionalProperties": False,
        "required": ["name", "key"],
        "properties": {
            "name": {"$ref": "#/definitions/objectName"},
            "key": {"type": "string", "pattern": "^[-._a-zA-Z0-9]+$"},
            "optional": {"type": "boolean"},
        },
    },
    "toleration": {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "key": {"type": "string"},
            "operator": {"enum": ["Exists", "Equal"]},
            "value": {"type": ["string", "number", "boolean"]},
            "effect": {"enum": ["NoSchedule", "PreferNoSchedule", "NoExecute"]},
            "tolerationSeconds": {"type": "integer"},
        },
        # The API server refuses an operator with a value that it does not compare, or without the key that it does.
        "if": {"required": ["operator"], "properties": {"operator": {"const": "Exists"}}},
        "then": {"not": {"required": ["value"]}},
        "else": {"required": ["key"]},
        "dependencies": {
            "tolerationSeconds": {"required": ["effect"], "properties": {"effect": {"const": "NoExecute"}}},
        },
    },
    # Parts of Kubernetes' API, which its server checks.
    "affinityTerms": {"type": ["object", "null"], "additionalProperties": True},
    "anyObject": {"type": ["object", "string"], "additionalProperties": True},
    "wholeObject": {
        "type": ["object", "string"],
        "additionalProperties": True,
        "required": ["apiVersion", "kind", "metadata"],
    },
    "container": {
        "type": "object",
        "additionalProperties": True,
        "required": ["name", "image"],
        # What the templates look into.
        "properties": {
            "name": {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"},
            "args": {"type": ["array", "null"]},
            "command": {"type": ["array", "null"]},
            "env": {
                "type": ["array", "null"],
                "items": {
                    "type": "object",
                    "additionalProperties": True,
                    "required": ["name"],
                    "properties": {"name": {"type": "string"}},
                },
            },
            "volumeMounts": {"type": ["array", "null"], "items": {"$ref": "#/definitions/volumeMount"}},
        },
    },
    "envFrom": {"type": "object", "additionalProperties": True, "minProperties": 1},
    # A name and one source.
    "volume": {
        "type": "object",
        "additionalProperties": True,
        "required": ["name"],
        "minProperties": 2,
        "maxProperties": 2,
        "properties": {"name": {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"}},
    },
    "volumeMount": {
        "type": "object",
        "additionalProperties": True,
        "required": ["name", "mountPath"],
        "properties": {"name": {"type": "string"}, "mountPath": {"type": "string", "pattern": "^/"}},
    },
    "quantities": {"type": "object", "additionalProperties": {"$ref": "#/definitions/quantity"}},
}


class ValuesError(Exception):
    """values.yaml is not commented as this script wants it."""


@dataclass
class Value:
    """One key of values.yaml: where it is, what its comment says, its default and the keys below it."""

    path: tuple[str, ...]
    description: str
    overlay: dict[str, Any]
    default: Any
    children: list[Value] = field(default_factory=list)


def comment_above(lines: list[str], line: int, column: int) -> list[str]:
    """Return the comment lines directly above line number `line` (from 0) with the same indent, in order."""
    found: list[str] = []
    mark = " " * column + "#"
    while line > 0 and lines[line - 1].startswith(mark):
        line -= 1
        found.append(lines[line].strip().removeprefix("#").removeprefix(" "))
    return found[::-1]


def parse(text: str) -> list[Value]:
    """Read the commented keys of values.yaml; raises ValuesError for a key without a description."""
    lines = text.splitlines()

    def walk(node: yaml.MappingNode, defaults: dict[str, Any], path: tuple[str, ...]) -> list[Value]:
        values = []
        for key, child in node.value:
            here = (*path, str(key.value))
            words: list[str] = []
            overlay: dict[str, Any] = {}
            started = False
            for comment in comment_above(lines, key.start_mark.line, key.start_mark.column):
                if comment.startswith("@schema "):
                    overlay = yaml.safe_load(comment.removeprefix("@schema "))
                elif comment.startswith("-- ") or started:
                    started = True
                    words.append(comment.removeprefix("-- "))
            if not words:
                raise ValuesError(f"{'.'.join(here)} has no description (a comment that begins with '# -- ')")
            default = defaults[key.value]
            value = Value(here, " ".join(words), overlay, default)
            # A flow mapping such as {} is a value, a block mapping a group of keys.
            if isinstance(child, yaml.MappingNode) and not child.flow_style:
                value.children = walk(child, default, here)
            values.append(value)
        return values

    root = yaml.compose(text)
    if not isinstance(root, yaml.MappingNode):
        raise ValuesError("values.yaml is not a mapping")
    return walk(root, yaml.safe_load(text), ())


def schema_of(value: Value) -> dict[str, Any]:
    """Return the JSON schema of one value."""
    schema: dict[str, Any] = {"description": value.description}
    overlay = dict(value.overlay)
    default = value.default
    if "entries" in overlay:
        names = {"pattern": overlay.pop("namePattern"), "maxLength": overlay.pop("nameMaxLength")}
        schema |= {"type": "object", "propertyNames": names}
        # The definition takes null itself: of a choice of two, helm would name both in its refusals. Inside of `allOf`
        # it names the entry even where it is the name of a property that is wrong.
        schema["additionalProperties"] = {"allOf": [{"$ref": f"#/definitions/{overlay.pop('entries')}"}]}
    elif isinstance(default, bool):
        schema["type"] = "boolean"
    elif isinstance(default, int):
        schema["type"] = "integer"
    elif isinstance(default, float):
        schema["type"] = "number"
    elif isinstance(default, str):
        schema["type"] = "string" if {"pattern", "enum"} & set(overlay) else ["string", "number"]
        schema |= text_of(value.path, empty=not default)
    elif isinstance(default, list):
        schema["type"] = "array"
        if "items" not in overlay:
            raise ValuesError(f"{'.'.join(value.path)} is a list; its @schema must have items")
    elif isinstance(default, dict):
        schema |= {"type": "object", "additionalProperties": False}
        if value.children:
            schema["properties"] = {child.path[-1]: schema_of(child) for child in value.children}
        elif "additionalProperties" not in overlay:
            raise ValuesError(f"{'.'.join(value.path)} is an empty map; its @schema must say what is in it")
    elif "type" not in overlay:
        raise ValuesError(f"{'.'.join(value.path)} is null by default; its @schema must have a type")
    schema |= overlay
    if "integer" in schema["type"] and "enum" not in schema:
        schema.setdefault("maximum", WHOLE_NUMBER)
    return nullable(schema)


def text_of(path: tuple[str, ...], *, empty: bool) -> dict[str, Any]:
    """Return the schema's keywords for names of objects and quantities, which may be `empty` text where it says so."""
    *_, block, key = ("", *path)
    if key == "namespace" or key.endswith("Namespace"):
        # An unquoted name of digits alone is a number to YAML.
        return {"minimum": 0, "multipleOf": 1, "pattern": NAMESPACE}
    if key in OBJECT_NAME_KEYS or (block in OBJECT_NAME_BLOCKS and key in ("name", "sectionName")):
        return {"minimum": 0, "maxLength": 253, "pattern": OBJECT_NAME}
    if key in QUANTITY_KEYS:
        return {"minimum": 0, "pattern": f"^$|{QUANTITY}" if empty else QUANTITY}
    return {}


def nullable(schema: dict[str, Any]) -> dict[str, Any]:
    """Return `schema` with null taken too, in its type and in its list of choices."""
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    if "null" not in kinds:
        schema["type"] = [*kinds, "null"]
    if "enum" in schema and None not in schema["enum"]:
        schema["enum"] = [*schema["enum"], None]
    return schema


def take_other_names(definition: dict[str, Any], names: dict[str, str], description: str, *, renamed: bool) -> None:
    """Let `definition`, the schema of an object, take dotted `names`.

    What was `renamed` has the content of the value that it is called now; any other name takes any content.
    """
    for name, new in names.items():
        wanted: dict[str, Any] = {}
        if renamed:
            wanted = definition
            for part in new.split("."):
                wanted = wanted["properties"][part]
        node = definition
        *parents, last = name.split(".")
        for parent in parents:
            child = {"type": ["object", "null"], "additionalProperties": False, "description": description}
            node = node.setdefault("properties", {}).setdefault(parent, child)
        # A value whose name stays and whose content is another one is described by the new content.
        node.setdefault("properties", {}).setdefault(last, {**wanted, "description": description})


def build_schema(values: list[Value], names: dict[str, Any]) -> dict[str, Any]:
    """Return the whole values.schema.json. `names` is files/names.yaml."""
    shared_names = {leaf.overlay["entries"] for value in values for leaf in leaves(value) if "entries" in leaf.overlay}
    definitions: dict[str, Any] = dict(SHARED)
    # Helm hands a chart that is a dependency the key `global`, whether it wants it or not.
    properties: dict[str, Any] = {
        "global": {
            "type": ["object", "null"],
            "description": "A parent chart's, for all its charts. Of it imageRegistry and imagePullSecrets are read.",
            "properties": {
                "imageRegistry": {"type": ["string", "null"]},
                "imagePullSecrets": {
                    "type": ["array", "null"],
                    "items": {"anyOf": [{"$ref": "#/definitions/objectName"}, {"$ref": "#/definitions/named"}]},
                },
            },
        },
        # And the key that a parent chart's `condition` reads.
        "enabled": {"type": "boolean", "description": "For the condition of a parent chart."},
    }
    for value in values:
        name = value.path[-1]
        if name in shared_names:
            definitions[name] = schema_of(value)
            properties[name] = {"$ref": f"#/definitions/{name}"}
        else:
            properties[name] = schema_of(value)
    for top, renames in names["renamed"].items():
        take_other_names({**properties, **definitions}[top], renames, "An earlier name; still taken.", renamed=True)
    for top, others in names["instead"].items():
        meant = "Not a value; the chart says what to write."
        take_other_names({**properties, **definitions}[top], others, meant, renamed=False)
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Values of the kserve-vllm chart",
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
        "patternProperties": {"^x-": {"description": "The user's own, to put YAML anchors on. It is not read."}},
        "definitions": definitions,
    }


def leaves(value: Value) -> Iterator[Value]:
    """Yield the values below `value` that are set themselves, or `value` when it is one."""
    if not value.children:
        yield value
    for child in value.children:
        yield from leaves(child)


def cell(text: str) -> str:
    """Escape what would end a cell of a Markdown table."""
    return text.replace("|", "\\|")


def build_table(values: list[Value]) -> str:
    """Return the Markdown reference: one table for each top-level key."""
    parts = []
    for top in values:
        parts.append(f"### {top.path[0]}\n\n{top.description}\n")
        rows = ["| Value | Default | What it is |", "| --- | --- | --- |"]
        below = [leaf for leaf in leaves(top) if leaf is not top]
        for leaf in below:
            default = json.dumps(leaf.default, ensure_ascii=False)
            text = leaf.description
            choices = leaf.overlay.get("enum")
            if choices:
                text += " One of: " + ", ".join(f"`{json.dumps(choice)}`" for choice in choices) + "."
            rows.append(f"| `{'.'.join(leaf.path[1:])}` | `{cell(default)}` | {cell(text)} |")
        if below:
            parts.append("\n".join(rows) + "\n")
    return "\n".join(parts).rstrip("\n")


def outputs(chart: Path) -> dict[Path, str]:
    """Return what the generated files of `chart` should hold, by path."""
    values = parse((chart / "values.yaml").read_text(encoding="utf-8"))
    prose = (chart / "README.in.md").read_text(encoding="utf-8")
    if PLACEHOLDER not in prose:
        raise ValuesError(f"README.in.md lacks {PLACEHOLDER}")
    names = yaml.safe_load((chart / "files" / "names.yaml").read_text(encoding="utf-8"))
    defaults = yaml.safe_load((chart / "values.yaml").read_text(encoding="utf-8"))
    return {
        chart / "values.schema.json": json.dumps(build_schema(values, names), indent=2, ensure_ascii=False) + "\n",
        chart / "README.md": prose.replace(PLACEHOLDER, build_table(values)),
        chart / "files" / "defaults.json": json.dumps(defaults, indent=1, ensure_ascii=False) + "\n",
    }


def main(argv: list[str] | None = None) -> int:
    """Write or check the generated files; returns the exit status."""
    parser = argparse.ArgumentParser(description="Generate the chart's schema and README from values.yaml.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a file is out of date")
    parser.add_argument("--chart", type=Path, default=CHART, help="directory of the chart")
    options = parser.parse_args(argv)
    try:
        wanted = outputs(options.chart)
    except ValuesError as error:
        print(error, file=sys.stderr)
        return 1
    stale = [p for p, text in wanted.items() if not p.exists() or p.read_text(encoding="utf-8") != text]
    for path in stale:
        if options.check:
            print(f"{path.name} is out of date; run: python runtime/tools/gen_chart_docs.py", file=sys.stderr)
        else:
            path.write_text(wanted[path], encoding="utf-8")
            print(f"wrote {path.name}")
    return 1 if stale and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
