"""What the user gives is merged with what the chart gives, by name or key, and the user wins."""

from __future__ import annotations

import pytest
import yaml

from tests.charts.support import Document, load_all, of_kind, render, service, standard

MINE = {"app.kubernetes.io/name": "mine", "team": "search", "number": 7, "yes": True}
TEXT = {"app.kubernetes.io/name": "mine", "team": "search", "number": "7", "yes": "true"}


@pytest.mark.parametrize("text", ["{a: 1, a: 2}", "env: [{name: A}, {name: B}, {name: A}]"], ids=["a key", "an item"])
def test_what_is_there_twice_is_refused_by_the_loader(text: str) -> None:
    with pytest.raises(yaml.constructor.ConstructorError, match="twice"):
        load_all(text)
    # A merge key may be overridden: that is what it is for.
    assert load_all("a: &a {x: 1}\nb: {<<: *a, x: 2}") == [{"a": {"x": 1}, "b": {"x": 2}}]


def test_labels_and_annotations_of_the_user_win_everywhere() -> None:
    documents = render(
        {
            **service(
                labels=MINE,
                podLabels=MINE,
                annotations={"features.knative.dev/http-full-duplex": "Disabled"},
                podAnnotations={"autoscaling.knative.dev/window": "30s"},
                autoscaling={"knative": {"windowSeconds": 60}},
            ),
            "runtimes": {
                "podLabels": {"app.kubernetes.io/part-of": "mine"},
                "podAnnotations": {"serving.knative.dev/progress-deadline": "1h", "size": 3},
            },
            "monitoring": {
                name: {"enabled": True, "labels": MINE} for name in ("podMonitor", "prometheusRule", "dashboards")
            },
            "serviceAccounts": {"a": {"annotations": {"count": 1}, "secrets": ["s", "s"]}},
            "image": {"pullSecrets": ["p", "p"]},
        }
    )
    isvc = of_kind(documents, "InferenceService")["chat"]
    assert isvc["metadata"]["annotations"]["features.knative.dev/http-full-duplex"] == "Disabled"
    assert isvc["spec"]["predictor"]["annotations"] == {"autoscaling.knative.dev/window": "30s"}
    assert isvc["spec"]["predictor"]["labels"] == TEXT
    for kind in ("InferenceService", "PodMonitor", "PrometheusRule", "ConfigMap"):
        for document in of_kind(documents, kind).values():
            assert TEXT.items() <= document["metadata"]["labels"].items()
    for runtime in of_kind(documents, "ClusterServingRuntime").values():
        assert runtime["spec"]["annotations"]["serving.knative.dev/progress-deadline"] == "1h"
        assert runtime["spec"]["annotations"]["size"] == "3"
        # The PodMonitor selects by the second one, which stays.
        assert runtime["spec"]["labels"] == {
            "app.kubernetes.io/part-of": "mine",
            "kserve-vllm/runtimes-of": "models.release",
        }
        assert runtime["spec"]["imagePullSecrets"] == [{"name": "p"}]
    account = of_kind(documents, "ServiceAccount")["a"]
    assert account["metadata"]["annotations"] == {"count": "1"}
    assert account["secrets"] == [{"name": "s"}]


def env_of(values: Document, kind: str = "InferenceService") -> list[Document]:
    documents = render(values)
    if kind == "InferenceService":
        container: Document = of_kind(documents, kind)["chat"]["spec"]["predictor"]["model"]
    else:
        container = of_kind(documents, "ClusterServingRuntime")[kind]["spec"]["containers"][0]
    found: list[Document] = container["env"]
    return found


def test_environment_is_merged_by_name_and_is_text() -> None:
    mine = [{"name": "HF_HOME", "value": "/cache"}, {"name": "COUNT", "value": 8}, {"name": "COUNT", "value": 9}]
    env = env_of({"runtimes": {"gpu": {"env": mine}}}, "kserve-vllm-gpu")
    assert [e["value"] for e in env if e["name"] == "HF_HOME"] == ["/cache"]
    assert [e["value"] for e in env if e["name"] == "COUNT"] == ["9"]
    reference = {"secretKeyRef": {"name": "mine", "key": "k"}}
    values = service(
        redis={"secretName": "s"},
        env=[{"name": "KSERVE_VLLM_REDIS_URL", "valueFrom": reference}, {"name": "BIG", "value": 10000000}],
    )
    assert env_of(values) == [
        {"name": "KSERVE_VLLM_REDIS_URL", "valueFrom": reference},
        {"name": "BIG", "value": "10000000"},
    ]


def test_numbers_are_taken_where_text_is_asked_for() -> None:
    documents = render(
        {
            **standard(
                nodeSelector={"zone": 1},
                extraArgs=["--seed", 1],
                servedNames=[4],
                serviceAccountName=7,
                tolerations=[{"key": "a", "operator": "Equal", "value": 1}],
                resources={"requests": {"cpu": 8, "memory": "1Gi"}},
            ),
            "runtimes": {"gpu": {"requests": {"cpu": 8}}},
        }
    )
    predictor = of_kind(documents, "InferenceService")["chat"]["spec"]["predictor"]
    assert predictor["nodeSelector"] == {"zone": "1"}
    assert predictor["tolerations"] == [{"key": "a", "operator": "Equal", "value": "1"}]
    assert predictor["serviceAccountName"] == "7"
    assert predictor["model"]["args"][-2:] == ["--seed", "1"]
    assert "--model-name=4" in predictor["model"]["args"]
    runtime = of_kind(documents, "ClusterServingRuntime")["kserve-vllm-gpu"]
    assert runtime["spec"]["containers"][0]["resources"]["requests"]["cpu"] == "8"
