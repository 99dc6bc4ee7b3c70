"""Which fields of the chart's objects can't change once they are there, by the rules of the API server and KServe."""

from __future__ import annotations

import copy
from collections.abc import Iterable

from tests.charts.support import Document

DEPLOYMENT_MODE = "serving.kserve.io/deploymentMode"


def fixed_fields(document: Document) -> Document:
    """What an update of `document` may not touch; {} for kinds that can change as a whole.

    Job: pod template, selector and the policy for failures. RoleBinding: the role. PersistentVolumeClaim: all of the
    spec but the size, which may grow. StatefulSets and Deployments are KServe's. InferenceService: the deployment mode
    (KServe's webhook). LocalModelCache: where the model is from (a rule of its schema). ServingRuntimes: workers can't
    be taken out (KServe's webhook).
    """
    spec = document.get("spec", {})
    match document["kind"]:
        case "Job":
            return {name: spec.get(name) for name in ("template", "selector", "podFailurePolicy")}
        case "RoleBinding":
            return {"roleRef": document["roleRef"]}
        case "PersistentVolumeClaim":
            return {name: value for name, value in spec.items() if name != "resources"}
        case "InferenceService":
            return {"mode": document["metadata"]["annotations"][DEPLOYMENT_MODE]}
        case "LocalModelCache":
            return {"sourceModelUri": spec["sourceModelUri"]}
        case "ClusterServingRuntime" | "ServingRuntime":
            return {"workers": "workerSpec" in spec}
    return {}


def reduced(documents: Iterable[Document]) -> dict[str, Document]:
    """The fixed fields of all objects that Helm updates in place, by kind and name. Hooks are made anew."""
    found = {}
    for document in documents:
        metadata = document["metadata"]
        if "helm.sh/hook" not in metadata.get("annotations", {}):
            found[f"{document['kind']}/{metadata['name']}"] = copy.deepcopy(fixed_fields(document))
    return found


def broken_by(before: dict[str, Document], after: dict[str, Document]) -> list[str]:
    """Objects that are there before and after an upgrade and whose fixed fields differ."""
    return [name for name, fields in before.items() if name in after and fields != after[name]]
