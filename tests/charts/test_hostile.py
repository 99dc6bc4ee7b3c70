"""Settings of the wrong kind, size or alphabet: a sentence, or objects that the API server takes; no failed template.

What the schema refuses is not rendered: its own words are the sentence. The rest is rendered, all of a kind of entry at
once; the entries that are refused by name are taken out, and the rest is rendered again.
"""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import pytest

from tests.charts.schemas import problems
from tests.charts.support import CHART, Document, HelmError, helm, load_all
from tests.charts.test_values import (
    AROUND,
    BATCHES,
    CACHES,
    DEFAULTS,
    ROLLOUTS,
    ROUTES,
    SCHEMA,
    SERVICES,
    around,
    changed,
    leaves,
)

HOSTILE: dict[str, Any] = {
    "null in a list": [None],
    "an empty text in a list": [""],
    "an empty map in a list": [{}],
    "null in a map": {"a": None},
    "a long text": "x" * 300,
    "a substitution of Flux": "${VAR}",
    "a template": "{{ .x }}",
    "text of YAML": "a: b\n- c",
    "another alphabet": "\u00e9 \u2028",
    "a number with a sign": -1,
    "a part of one": 1.5,
    "a huge number": 10**30,
    "true": True,
}
KINDS: dict[str, tuple[str, str, Document]] = {
    "a Knative service": (
        "inferenceServices",
        "inferenceServiceDefaults",
        {**SERVICES["traced"], "autoscaling": {"minReplicas": 0}},
    ),
    "a Standard service": (
        "inferenceServices",
        "inferenceServiceDefaults",
        {**SERVICES["files"], **SERVICES["KEDA"], "networkPolicy": {"enabled": True}},
    ),
    "a cache": ("modelCaches", "modelCacheDefaults", CACHES["an engine"]),
    "a batch": ("batchJobs", "batchJobDefaults", BATCHES["a batch with its own"]),
    "a rollout": ("rolloutJobs", "rolloutJobDefaults", ROLLOUTS["a rollout with answers"]),
    "a route": ("routes", "routeDefaults", ROUTES["ejection"]),
    "another route": ("routes", "routeDefaults", ROUTES["GatewayAPI"]),
    "an account": ("serviceAccounts", "serviceAccountDefaults", {}),
    "a runtime": ("runtimes.extra", "extraRuntimeDefaults", {"base": "cpu"}),
}


def entries_of(defaults: str, base: Document) -> dict[str, tuple[str, Document]]:
    """By name: what is wrong where, and the entry, of all that the schema takes."""
    checker = jsonschema.Draft7Validator({"$ref": f"#/definitions/{defaults}", "definitions": SCHEMA["definitions"]})
    found: dict[str, tuple[str, Document]] = {}
    for path, default in leaves(DEFAULTS[defaults]):
        for label, setting in HOSTILE.items():
            entry = changed(base, path, setting)
            if setting is not default and checker.is_valid(entry):
                found[f"e{len(found):03}"] = (f"{label} in {'.'.join(path)}", entry)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_hostile_setting_is_a_sentence_or_good_objects(kind: str) -> None:
    top, defaults, base = KINDS[kind]
    entries = entries_of(defaults, base)
    assert entries
    services: Document = {}
    if top == "routes":
        # Two routes with one host, or with ejection for one service, take from each other: each has its own.
        for name, (_, entry) in entries.items():
            services[f"{name}-svc"] = AROUND["inferenceServices"]["chat"]
            if entry["hosts"] == base["hosts"]:
                entry["hosts"] = [f"{name}.example.com"]
            if entry["inferenceService"] == base["inferenceService"]:
                entry["inferenceService"] = f"{name}-svc"
    text = ""
    while not text:
        values = around(top, {name: entry for name, (_, entry) in entries.items()})
        values["inferenceServices"] = {**values["inferenceServices"], **services}
        try:
            text = helm("template", "r", str(CHART), "--values", "-", stdin=json.dumps(values))
        except HelmError as error:
            said = str(error)
            named = entries.keys() & set(re.findall(rf"^.*?{re.escape(top)}\.(e\d+)\b", said, re.MULTILINE))
            if "execution error at" not in said or not named:
                raise
            for name in named:
                del entries[name]
    assert entries
    for document in load_all(text):
        found = problems(document)
        assert not found, (found, [words for name, (words, _) in entries.items() if name in json.dumps(document)])
