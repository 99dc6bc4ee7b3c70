"""Write charts/kserve-vllm/files/fields.json: the fields that Kubernetes knows in what the chart's values hand on.

Usage: python -m tests.tools.chart_fields [--check]

What an InferenceService and its runtime may have is taken from KServe's published CRDs (tests/charts/schemas.json),
since KServe drops every other field without a word; the rules of a NetworkPolicy, which no CRD has, from the models of
the Kubernetes package. Equal parts are written once: `nodes` holds them, and `roots` says by the name of a value which
one describes it. A node has `types`, and with them `fields` and `required` of an object, `each` of a map or `items` of
a list (indexes into `nodes`).
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import kubernetes.client

from tests.tools import reduce_crds

Schema = dict[str, Any]

ROOT = Path(__file__).resolve().parents[2]
FIELDS = ROOT / "charts" / "kserve-vllm" / "files" / "fields.json"


class Nodes:
    """Nodes by their content."""

    def __init__(self) -> None:
        self.nodes: list[Schema] = []
        self._index: dict[str, int] = {}

    def add(self, node: Schema) -> int:
        """The index of a node."""
        text = json.dumps(node, sort_keys=True)
        if text not in self._index:
            self._index[text] = len(self.nodes)
            self.nodes.append(node)
        return self._index[text]

    def of_crd(self, schema: Schema) -> int:
        """A part of a CRD."""
        if schema.get("x-kubernetes-int-or-string"):
            return self.add({"types": ["string", "integer"]})
        node: Schema = {"types": [schema["type"]] if "type" in schema else []}
        if "properties" in schema:
            node["fields"] = {name: self.of_crd(child) for name, child in schema["properties"].items()}
            node["required"] = schema.get("required", [])
        if isinstance(schema.get("additionalProperties"), dict):
            node["each"] = self.of_crd(schema["additionalProperties"])
        if "items" in schema:
            node["items"] = self.of_crd(schema["items"])
        return self.add(node)

    def of_model(self, kind: str) -> int:
        """A type of the Kubernetes package, by its name there."""
        plain = {"str": ["string"], "int": ["integer"], "bool": ["boolean"], "object": ["string", "integer"]}
        if kind in plain:
            return self.add({"types": plain[kind]})
        if match := re.fullmatch(r"[lL]ist\[(.+)\]", kind):
            return self.add({"types": ["array"], "items": self.of_model(match.group(1))})
        if match := re.fullmatch(r"[dD]ict[(\[]\w+, (.+)[)\]]", kind):
            return self.add({"types": ["object"], "each": self.of_model(match.group(1))})
        model = getattr(kubernetes.client, kind)
        names = model.attribute_map
        fields = {names[own]: self.of_model(child) for own, child in model.openapi_types.items()}
        required = [names[own] for own, declared in model.model_fields.items() if declared.is_required()]
        return self.add({"types": ["object"], "fields": fields, "required": required})


def made() -> str:
    """What the file should hold."""
    whole = reduce_crds.whole(json.loads(reduce_crds.REDUCED.read_text()))
    service = whole[("serving.kserve.io/v1beta1", "InferenceService")]["properties"]["spec"]["properties"]["predictor"]
    pod = service["properties"]
    container = pod["model"]["properties"]
    nodes = Nodes()
    roots = {
        "affinity": nodes.of_crd(pod["affinity"]),
        "envFrom": nodes.of_crd(container["envFrom"]),
        "extraVolumeMounts": nodes.of_crd(container["volumeMounts"]),
        "extraVolumes": nodes.of_crd(pod["volumes"]),
        "initContainers": nodes.of_crd(pod["initContainers"]),
        "securityContext": nodes.of_crd(container["securityContext"]),
        "topologySpreadConstraints": nodes.of_crd(pod["topologySpreadConstraints"]),
        "egress": nodes.of_model("list[V1NetworkPolicyEgressRule]"),
    }
    lines = ",\n".join(json.dumps(node, sort_keys=True, separators=(",", ":")) for node in nodes.nodes)
    return f'{{"roots": {json.dumps(roots)},\n"nodes": [\n{lines}\n]}}\n'


def main(arguments: list[str]) -> int:
    """Write the file, or with --check compare; returns 1 where it is not what it should be."""
    if arguments == ["--check"]:
        return int(FIELDS.read_text() != made())
    FIELDS.write_text(made())
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
