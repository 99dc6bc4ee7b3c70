"""Checks objects as an API server would, except that an unknown field is an error and not silently dropped."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import kubernetes.client

from tests.charts.support import Document
from tests.tools import reduce_crds

# Kinds without a CRD among the published schemas and outside the Kubernetes package: Istio's, for the
# fields that the chart writes (networking.istio.io/v1).
_DURATION = {"type": "string", "pattern": "^[0-9]+s$"}
_DESTINATION = {
    "type": "object",
    "additionalProperties": False,
    "required": ["host", "port"],
    "properties": {
        "host": {"type": "string"},
        "port": {
            "type": "object",
            "additionalProperties": False,
            "required": ["number"],
            "properties": {"number": {"type": "integer"}},
        },
    },
}
# OpenShift's, for the fields that the catalogue writes (route.openshift.io/v1).
_ROUTE: Document = {
    "type": "object",
    "additionalProperties": False,
    "required": ["to"],
    "properties": {
        "to": {
            "type": "object",
            "additionalProperties": False,
            "required": ["kind", "name", "weight"],
            "properties": {
                "kind": {"enum": ["Service"]},
                "name": {"type": "string"},
                "weight": {"type": "integer", "minimum": 0, "maximum": 256},
            },
        },
        "port": {
            "type": "object",
            "additionalProperties": False,
            "required": ["targetPort"],
            "properties": {"targetPort": {"type": ["integer", "string"]}},
        },
        "tls": {
            "type": "object",
            "additionalProperties": False,
            "required": ["termination"],
            "properties": {
                "termination": {"enum": ["edge", "passthrough", "reencrypt"]},
                "insecureEdgeTerminationPolicy": {"enum": ["None", "Allow", "Redirect"]},
            },
        },
    },
}
ISTIO: dict[str, Document] = {
    "VirtualService": {
        "type": "object",
        "additionalProperties": False,
        "required": ["hosts", "gateways", "http"],
        "properties": {
            "hosts": {"type": "array", "items": {"type": "string"}, "minItems": 1},
            "gateways": {"type": "array", "items": {"type": "string", "pattern": "^[^/]+/[^/]+$"}},
            "http": {
                "type": "array",
                "items": {
                    "type": "object",
                    "additionalProperties": False,
                    "required": ["route", "timeout"],
                    "properties": {
                        "match": {"type": "array", "items": {"type": "object"}},
                        "timeout": _DURATION,
                        "retries": {
                            "type": "object",
                            "additionalProperties": False,
                            "properties": {"attempts": {"type": "integer"}},
                        },
                        "rewrite": {
                            "type": "object",
                            "additionalProperties": False,
                            "properties": {"authority": {"type": "string"}},
                        },
                        "route": {
                            "type": "array",
                            "items": {
                                "type": "object",
                                "additionalProperties": False,
                                "properties": {"destination": _DESTINATION},
                            },
                        },
                    },
                },
            },
        },
    },
    "DestinationRule": {
        "type": "object",
        "additionalProperties": False,
        "required": ["host", "trafficPolicy"],
        "properties": {
            "host": {"type": "string"},
            "trafficPolicy": {
                "type": "object",
                "additionalProperties": False,
                "properties": {
                    "loadBalancer": {
                        "type": "object",
                        "additionalProperties": False,
                        "properties": {"simple": {"enum": ["LEAST_REQUEST", "ROUND_ROBIN", "RANDOM"]}},
                    },
                    "outlierDetection": {
                        "type": "object",
                        "additionalProperties": False,
                        "properties": {
                            "consecutive5xxErrors": {"type": "integer"},
                            "interval": _DURATION,
                            "baseEjectionTime": _DURATION,
                            "maxEjectionPercent": {"type": "integer"},
                        },
                    },
                },
            },
        },
    },
}
CORE = {
    "v1/ConfigMap": "V1ConfigMap",
    "v1/PersistentVolumeClaim": "V1PersistentVolumeClaim",
    "v1/Pod": "V1Pod",
    "v1/ServiceAccount": "V1ServiceAccount",
    "apps/v1/Deployment": "V1Deployment",
    "autoscaling/v2/HorizontalPodAutoscaler": "V2HorizontalPodAutoscaler",
    "batch/v1/Job": "V1Job",
    "networking.k8s.io/v1/Ingress": "V1Ingress",
    "networking.k8s.io/v1/NetworkPolicy": "V1NetworkPolicy",
    "policy/v1/PodDisruptionBudget": "V1PodDisruptionBudget",
    "rbac.authorization.k8s.io/v1/Role": "V1Role",
    "rbac.authorization.k8s.io/v1/RoleBinding": "V1RoleBinding",
}
_OBJECT_META = {"name", "namespace", "labels", "annotations"}
# Quantities may be written as numbers; every other map of strings takes strings alone.
_QUANTITIES = {"requests", "limits"}


@functools.cache
def published() -> dict[tuple[str, str], Document]:
    """Schemas of the published CRDs by (apiVersion, kind), as `schemas.json` holds them."""
    return reduce_crds.whole(json.loads(reduce_crds.REDUCED.read_text()))


def unknown_fields(schema: Document, value: Any, at: str) -> Iterator[str]:
    """Yield a line for every field of `value` that a structural schema would prune, and every null it would drop."""
    if value is None:
        if not schema.get("nullable"):
            yield f"{at}: null"
        return
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        rest = schema.get("additionalProperties")
        free = schema.get("x-kubernetes-preserve-unknown-fields") or (not properties and rest is None and _open(schema))
        for key, child in value.items():
            here = f"{at}.{key}"
            if key in properties:
                yield from unknown_fields(properties[key], child, here)
            elif isinstance(rest, dict):
                yield from unknown_fields(rest, child, here)
            elif not free and rest is not True:
                yield f"{here}: unknown field"
    elif isinstance(value, list):
        for index, child in enumerate(value):
            yield from unknown_fields(schema.get("items", {}), child, f"{at}[{index}]")


def _open(schema: Document) -> bool:
    # A structural schema prunes every field of an object that lists none; only a schema without a type is open.
    return "type" not in schema


def crd_problems(document: Document) -> list[str]:
    """What is wrong with a custom resource by its CRD; KeyError when no CRD is known for it."""
    schema = published()[(document["apiVersion"], document["kind"])]
    name = f"{document['kind']}/{document['metadata']['name']}"
    body = {key: value for key, value in document.items() if key not in ("apiVersion", "kind", "metadata")}
    properties = {key: value for key, value in schema["properties"].items() if key in body}
    part = {**schema, "properties": {**properties}}
    problems = [f"{name}: {e.json_path}: {e.message}" for e in jsonschema.Draft7Validator(part).iter_errors(body)]
    problems += list(unknown_fields(part, body, name))
    problems += [f"{name}.metadata.{key}: unknown field" for key in document["metadata"] if key not in _OBJECT_META]
    return problems + list(_text_maps(document["metadata"], f"{name}.metadata"))


def _text_maps(metadata: Document, at: str) -> Iterator[str]:
    for group in ("labels", "annotations"):
        for key, value in (metadata.get(group) or {}).items():
            if not isinstance(value, str):
                yield f"{at}.{group}.{key}: {value!r} is not a string"


def core_problems(document: Document) -> list[str]:
    """What is wrong with one of Kubernetes' own kinds; KeyError when it is not among CORE."""
    model = CORE[f"{document['apiVersion']}/{document['kind']}"]
    name = f"{document['kind']}/{document['metadata']['name']}"
    return list(_core(model, document, name))


def _core(kind: str, value: Any, at: str) -> Iterator[str]:
    """Walk `value` along the Kubernetes package's models; `kind` is one of their type strings."""
    if value is None:
        yield f"{at}: null"
        return
    if match := re.fullmatch(r"[lL]ist\[(.+)\]", kind):
        if not isinstance(value, list):
            yield f"{at}: {value!r} is not a list"
            return
        for index, child in enumerate(value):
            yield from _core(match.group(1), child, f"{at}[{index}]")
    elif match := re.fullmatch(r"[dD]ict[(\[](\w+), (.+)[)\]]", kind):
        if not isinstance(value, dict):
            yield f"{at}: {value!r} is not a map"
            return
        for key, child in value.items():
            quantity = at.rsplit(".", 1)[-1] in _QUANTITIES and isinstance(child, int | float)
            if not quantity:
                yield from _core(match.group(2), child, f"{at}.{key}")
    elif kind in ("str", "datetime"):
        if not isinstance(value, str):
            yield f"{at}: {value!r} is not a string"
    elif kind == "int":
        if not isinstance(value, int) or isinstance(value, bool):
            yield f"{at}: {value!r} is not an integer"
    elif kind == "bool":
        if not isinstance(value, bool):
            yield f"{at}: {value!r} is not true or false"
    elif kind == "object":
        return
    else:
        model = getattr(kubernetes.client, kind)
        names = {json_name: attribute for attribute, json_name in model.attribute_map.items()}
        if not isinstance(value, dict):
            yield f"{at}: {value!r} is not a {kind}"
            return
        for attribute, declared in model.model_fields.items():
            if declared.is_required() and model.attribute_map[attribute] not in value:
                yield f"{at}.{model.attribute_map[attribute]}: required, and not there"
        for key, child in value.items():
            if key not in names:
                yield f"{at}.{key}: unknown field"
            else:
                yield from _core(model.openapi_types[names[key]], child, f"{at}.{key}")


def problems(document: Document) -> list[str]:
    """What is wrong with any object that the chart or the catalogue writes."""
    if f"{document['apiVersion']}/{document['kind']}" in CORE:
        return core_problems(document)
    if document["apiVersion"] in ("networking.istio.io/v1", "route.openshift.io/v1"):
        validator = jsonschema.Draft7Validator({**ISTIO, "Route": _ROUTE}[document["kind"]])
        return [f"{document['kind']}: {e.json_path}: {e.message}" for e in validator.iter_errors(document["spec"])]
    return crd_problems(document)
