"""No object of the chart bears a name that KServe's reconcilers write: they would take it over, or delete it.

The names are those of KServe's source at 0.21: pkg/controller/v1beta1/inferenceservice/reconcilers (deployment,
service, hpa, keda, ingress: NAME and NAME-predictor and the same for transformer and explainer;
ingress/httproute_reconciler.go and kube_ingress_reconciler.go), pkg/constants (PredictorServiceName,
DefaultPredictorServiceName, CanaryPredictorServiceName, PredictorWorkerServiceName, HeadServiceName) and modelconfig;
Knative adds the revisions.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.charts.support import CI_FILES, Document, of_kind, refused, render_ci, standard

COMPONENTS = ("predictor", "transformer", "explainer")
# Kinds that KServe or Knative writes for an InferenceService.
KINDS = {
    "Deployment",
    "Service",
    "HorizontalPodAutoscaler",
    "ScaledObject",
    "HTTPRoute",
    "GRPCRoute",
    "VirtualService",
    "Ingress",
    "Route",
    "ConfigMap",
    "Revision",
    "Configuration",
    "OpenTelemetryCollector",
    "ServiceAccount",
    "PodDisruptionBudget",
    "DestinationRule",
    "TriggerAuthentication",
}


def owned_by_kserve(service: Document) -> re.Pattern[str]:
    """What the names of KServe's objects for an InferenceService look like."""
    name = re.escape(service["metadata"]["name"])
    variants = [re.escape(canary["predictor"]["name"]) for canary in service["spec"].get("canary", [])]
    components = [f"{name}-{component}" for component in COMPONENTS]
    components += [f"{name}-{variant}-{component}" for variant in variants for component in COMPONENTS]
    roots = [name, *components]
    endings = "(-default|-canary|-worker|-metrics|-head|-workers|-auth|-kube-rbac-proxy-sar-config|-\\d{5}(-private)?)?"
    ranks = f"|{name}-(head|workers?)(-\\d+)?"
    tags = f"|(latest|prev)-{name}-predictor"
    return re.compile(f"({'|'.join(roots)}){endings}{ranks}{tags}|modelconfig-{name}-\\d+")


@pytest.mark.parametrize("path", CI_FILES, ids=lambda path: path.name.removesuffix("-values.yaml"))
def test_no_object_of_a_scenario_has_a_name_of_kserves(path: Path) -> None:
    documents = render_ci(path)
    ours = [d for d in documents if d["kind"] in KINDS]
    for service in of_kind(documents, "InferenceService").values():
        pattern = owned_by_kserve(service)
        taken = [f"{d['kind']}/{d['metadata']['name']}" for d in ours if pattern.fullmatch(d["metadata"]["name"])]
        assert not taken


@pytest.mark.parametrize(
    "name",
    [
        "chat",
        "chat-predictor",
        "chat-transformer",
        "chat-v2-predictor",
        "chat-predictor-00003",
        "chat-predictor-worker",
        "modelconfig-chat-0",
        "latest-chat-predictor",
        "chat-head-1",
        "chat-predictor-default",
    ],
)
def test_the_list_knows_the_names_of_kserve(name: str) -> None:
    service = {"metadata": {"name": "chat"}, "spec": {"canary": [{"predictor": {"name": "v2"}}]}}
    assert owned_by_kserve(service).fullmatch(name)
    assert not owned_by_kserve(service).fullmatch(f"other-{name}")
    assert not owned_by_kserve(service).fullmatch("chat-kserve-vllm")
    assert not owned_by_kserve(service).fullmatch("chat-route")


def test_a_route_that_would_get_such_a_name_is_refused() -> None:
    values = standard()
    values["inferenceServices"]["front-route"] = values["inferenceServices"]["chat"]
    route = {"hosts": ["a.example.com"], "inferenceService": "chat"}
    assert "give the route another name" in refused({**values, "routes": {"front": route}})
