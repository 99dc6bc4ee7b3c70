"""Autoscaling, canary, access and routes: what the values become in each mode."""

from __future__ import annotations

import pytest

from tests.charts import kserve_merge
from tests.charts.support import CHART, Document, load, of_kind, predictor, render, render_ci, service, standard

CI = CHART / "ci"
PROFILES: dict[str, int] = load(CHART / "files" / "profiles.yaml")["maxNumSeqs"]


def isvc_of(values: Document, name: str = "chat") -> Document:
    return of_kind(render(values), "InferenceService")[name]


def annotation(values: Document, key: str) -> str | None:
    found: str | None = isvc_of(values)["metadata"]["annotations"].get(key)
    return found


# Knative's autoscaler.


@pytest.mark.parametrize("profile", PROFILES)
def test_the_target_is_what_the_profile_runs_at_once(profile: str) -> None:
    spec = predictor(service(profile=profile))
    assert (spec["scaleMetric"], spec["scaleTarget"]) == ("concurrency", PROFILES[profile])


def test_the_target_follows_max_num_seqs_unless_it_is_given() -> None:
    assert predictor(service(maxNumSeqs=40))["scaleTarget"] == 40
    assert predictor(service(maxNumSeqs=40, autoscaling={"target": 30}))["scaleTarget"] == 30


def test_knobs_of_knative_become_annotations_of_the_revision() -> None:
    spec = of_kind(render_ci(CI / "knative-autoscaling-values.yaml"), "InferenceService")["chat"]["spec"]["predictor"]
    assert spec["annotations"] == {
        "serving.knative.dev/progress-deadline": "5400s",
        "autoscaling.knative.dev/target-utilization-percentage": "80",
        "autoscaling.knative.dev/window": "120s",
        "autoscaling.knative.dev/panic-window-percentage": "20",
        "autoscaling.knative.dev/panic-threshold-percentage": "300",
        "autoscaling.knative.dev/scale-down-delay": "900s",
        "autoscaling.knative.dev/target-burst-capacity": "0",
        "autoscaling.knative.dev/initial-scale": "2",
    }
    assert spec["containerConcurrency"] == 600
    assert (spec["minReplicas"], spec["maxReplicas"], spec["scaleMetric"], spec["scaleTarget"]) == (2, 10, "rps", 25)


def test_a_knative_service_has_no_autoscaler_class_and_no_keda() -> None:
    assert annotation(service(), "serving.kserve.io/autoscalerClass") is None
    assert "autoScaling" not in predictor(service())


def test_scale_to_zero_keeps_the_last_pod_for_a_while() -> None:
    spec = of_kind(render_ci(CI / "scale-to-zero-values.yaml"), "InferenceService")["chat"]["spec"]["predictor"]
    assert spec["minReplicas"] == 0
    assert spec["annotations"]["autoscaling.knative.dev/scale-to-zero-pod-retention-period"] == "600s"


# HPA and KEDA.


def test_a_fixed_number_of_pods_is_the_default_in_standard_mode() -> None:
    assert annotation(standard(), "serving.kserve.io/autoscalerClass") == "none"
    spec = predictor(standard(autoscaling={"minReplicas": 3}))
    assert (spec["minReplicas"], spec["maxReplicas"]) == (3, 3)


def test_keda_asks_for_the_pods_of_this_service_alone() -> None:
    spec = predictor(standard(autoscaling={"class": "keda"}))
    (metric,) = spec["autoScaling"]["metrics"]
    assert metric["external"]["metric"]["query"] == (
        'sum(vllm:num_requests_waiting{namespace="models",pod=~"chat-predictor-.+"})'
    )
    assert metric["external"]["target"] == {"type": "Value", "value": "4"}
    assert "scaleMetric" not in spec


def test_a_quantile_is_multiplied_by_the_pods_that_report() -> None:
    # KEDA divides the answer by the target to get the number of pods, so a mean over pods would never add one.
    (metric,) = predictor(standard(autoscaling={"class": "keda", "metric": "ttft-p99"}))["autoScaling"]["metrics"]
    query = metric["external"]["metric"]["query"]
    assert "* on() count(count by (pod) (vllm:num_requests_running{" in query
    assert query.endswith("or on() vector(0)")
    (metric,) = predictor(standard(autoscaling={"class": "keda", "metric": "kv-cache"}))["autoScaling"]["metrics"]
    assert metric["external"]["metric"]["query"].startswith("sum(avg by (pod) (vllm:kv_cache_usage_perc{")


def test_kedas_credentials_and_pace_are_handed_on() -> None:
    spec = of_kind(render_ci(CI / "keda-queue-depth-values.yaml"), "InferenceService")["chat"]["spec"]["predictor"]
    (metric,) = spec["autoScaling"]["metrics"]
    assert metric["external"]["authenticationRef"] == {
        "authModes": "bearer",
        "authenticationRef": {"name": "prometheus"},
    }
    assert spec["autoScaling"]["behavior"] == {
        "scaleUp": {"stabilizationWindowSeconds": 0},
        "scaleDown": {"stabilizationWindowSeconds": 600},
    }


def test_hpa_on_cpu_is_the_charts_since_kserves_own_would_lose_its_pace() -> None:
    documents = render_ci(CI / "hpa-cpu-values.yaml")
    isvc = of_kind(documents, "InferenceService")["small"]
    assert isvc["metadata"]["annotations"]["serving.kserve.io/autoscalerClass"] == "external"
    spec = of_kind(documents, "HorizontalPodAutoscaler")["small-kserve-vllm"]["spec"]
    target = {"type": "Utilization", "averageUtilization": 70}
    assert spec["metrics"] == [{"type": "Resource", "resource": {"name": "cpu", "target": target}}]
    assert spec["behavior"] == {"scaleDown": {"stabilizationWindowSeconds": 120}}
    # Percent of a request: without one there is nothing to take a part of.
    runtime = of_kind(documents, "ClusterServingRuntime")["kserve-vllm-cpu"]
    assert runtime["spec"]["containers"][0]["resources"]["requests"]["cpu"]


def test_hpa_on_a_metric_of_vllm_is_the_charts_and_kserve_leaves_it_alone() -> None:
    documents = render_ci(CI / "hpa-vllm-metric-values.yaml")
    scalers = of_kind(documents, "HorizontalPodAutoscaler")
    assert set(scalers) == {"chat-kserve-vllm", "code-kserve-vllm"}
    for isvc in of_kind(documents, "InferenceService").values():
        assert isvc["metadata"]["annotations"]["serving.kserve.io/autoscalerClass"] == "external"
        assert "scaleMetric" not in isvc["spec"]["predictor"]
    spec = scalers["chat-kserve-vllm"]["spec"]
    assert spec["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": "chat-predictor"}
    (metric,) = spec["metrics"]
    assert metric["pods"]["metric"]["name"] == "vllm_kv_cache_usage_perc"
    assert metric["pods"]["target"] == {"type": "AverageValue", "averageValue": "750m"}
    assert spec["behavior"] == {"scaleDown": {"stabilizationWindowSeconds": 600}}
    (metric,) = scalers["code-kserve-vllm"]["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] == "queue_depth"


# Canary.

NEW = {"percent": 10, "storageUri": "hf://org/new"}


def test_the_same_canary_becomes_a_percent_in_knative() -> None:
    isvc = isvc_of(service(canary=NEW))
    assert isvc["spec"]["predictor"]["canaryTrafficPercent"] == 10
    assert isvc["spec"]["predictor"]["model"]["storageUri"] == "hf://org/new"
    assert "canary" not in isvc["spec"]


def test_the_same_canary_becomes_a_variant_in_standard_mode() -> None:
    isvc = isvc_of({**standard(canary=NEW), "cluster": {"gatewayAPI": True}})
    assert "canaryTrafficPercent" not in isvc["spec"]["predictor"]
    assert isvc["spec"]["predictor"]["model"]["storageUri"] == "hf://org/model"
    (canary,) = isvc["spec"]["canary"]
    assert canary["trafficPercent"] == 10
    assert canary["predictor"]["name"] == "canary"
    assert canary["predictor"]["model"]["storageUri"] == "hf://org/new"
    # An autoscaler would fight with the fixed number.
    assert canary["predictor"]["annotations"] == {"serving.kserve.io/autoscalerClass": "none"}
    assert not {"maxReplicas", "scaleTarget", "scaleMetric", "autoScaling"} & set(canary["predictor"])


def test_percent_0_is_a_canary_and_not_none() -> None:
    assert isvc_of(service(canary={**NEW, "percent": 0}))["spec"]["predictor"]["canaryTrafficPercent"] == 0


def test_a_canary_of_a_model_that_the_engine_loads_changes_its_argument() -> None:
    small = of_kind(render_ci(CI / "canary-standard-values.yaml"), "InferenceService")["small"]["spec"]
    (canary,) = small["canary"]
    assert "--model=Qwen/Qwen3-0.6B" in small["predictor"]["model"]["args"]
    changed = [a.replace("Qwen/Qwen3-0.6B", "Qwen/Qwen3-1.7B") for a in small["predictor"]["model"]["args"]]
    assert canary["predictor"]["model"]["args"] == changed


def test_tag_routing_is_an_annotation() -> None:
    key = "serving.kserve.io/enable-tag-routing"
    assert annotation(service(canary=NEW, tagRouting=True), key) == "true"
    assert annotation(service(canary=NEW), key) is None


@pytest.mark.parametrize("tag_routing", [True, False])
@pytest.mark.parametrize("way", ["storageUri", "model"])
def test_promoting_or_undoing_a_canary_gives_the_revision_that_is_there(way: str, tag_routing: bool) -> None:
    def template(**values: object) -> tuple[Document, str | None]:
        documents = render({"inferenceServices": {"chat": {"tagRouting": tag_routing, **values}}})
        isvc = of_kind(documents, "InferenceService")["chat"]
        runtime = of_kind(documents, "ClusterServingRuntime")["kserve-vllm-gpu"]
        made: Document = kserve_merge.knative_service(isvc, kserve_merge.pod(isvc, runtime))["spec"]["template"]
        # KServe notes what it fetches in an annotation of the template.
        return made, isvc["spec"]["predictor"]["model"].get("storageUri")

    canary = template(**{way: "hf://org/model"}, canary={"percent": 10, way: "hf://org/new"})
    assert canary == template(**{way: "hf://org/model"}, canary={"percent": 0, way: "hf://org/new"})
    assert canary == template(**{way: "hf://org/new"})
    assert canary != template(**{way: "hf://org/model"})


# Access.


def test_a_network_policy_of_knative_opens_the_queue_proxy_and_not_the_model() -> None:
    policies = of_kind(render_ci(CI / "network-policy-values.yaml"), "NetworkPolicy")
    rules = policies["open-kserve-vllm"]["spec"]["ingress"]
    assert [p["port"] for p in rules[0]["ports"]] == [8012, 8013, 8022, 8112]
    assert 8080 in [p["port"] for p in rules[1]["ports"]]
    namespaces = [f["namespaceSelector"]["matchLabels"] for f in rules[0]["from"] if "namespaceSelector" in f]
    # Where the pods of gateways run; the chart's own default gateway is in `kserve`, its pods with Envoy Gateway. The
    # scenario's Knative is in another namespace than the default's, and its activator gets through.
    names = ("istio-system", "knative-serving", "kourier-system", "kserve", "envoy-gateway-system", "knative")
    assert namespaces == [{"kubernetes.io/metadata.name": n} for n in names]


def test_a_closed_network_policy_lets_out_names_and_downloads_alone() -> None:
    policies = of_kind(render_ci(CI / "network-policy-values.yaml"), "NetworkPolicy")
    spec = policies["closed-kserve-vllm"]["spec"]
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    assert [p["port"] for p in spec["ingress"][0]["ports"]] == [8080, 8081]
    assert len(spec["ingress"]) == 1
    assert [rule.get("to", [{}])[0].get("ipBlock") for rule in spec["egress"]] == [
        None,
        None,
        {"cidr": "203.0.113.0/24"},
    ]


def test_the_activator_and_the_test_get_through_whatever_else_is_closed() -> None:
    closed = {"enabled": True, "fromNamespaces": [], "metricsFromNamespaces": [], "sameNamespace": False}
    values: Document = {
        "cluster": {"knativeNamespace": "knative"},
        "inferenceServices": {
            "far": {"storageUri": "hf://org/model", "networkPolicy": closed},
            "near": {"storageUri": "hf://org/model", "deploymentMode": "Standard", "networkPolicy": closed},
        },
    }
    documents = render(values)
    policies = of_kind(documents, "NetworkPolicy")
    knative = [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "knative"}}}]
    assert [rule["from"] for rule in policies["far-kserve-vllm"]["spec"]["ingress"]] == [knative, knative]
    (rule,) = policies["near-kserve-vllm"]["spec"]["ingress"]
    label = rule["from"][0]["podSelector"]["matchLabels"]
    assert len(rule["from"]) == 1
    assert label.items() <= of_kind(documents, "Pod")["near-test"]["metadata"]["labels"].items()
    # Without the test there is nobody, and no empty list that an API server would leave out.
    quiet = of_kind(render({**values, "tests": {"enabled": False}}), "NetworkPolicy")["near-kserve-vllm"]
    assert "ingress" not in quiet["spec"]
    assert quiet["spec"]["policyTypes"] == ["Ingress"]


def test_nodes_of_one_model_may_talk_to_each_other() -> None:
    policy = of_kind(render_ci(CI / "multi-node-values.yaml"), "NetworkPolicy")["large-kserve-vllm"]
    inner = policy["spec"]["ingress"][-1]
    assert "ports" not in inner
    assert inner["from"] == [{"podSelector": {"matchLabels": {"serving.kserve.io/inferenceservice": "large"}}}]


def test_a_disruption_budget_selects_the_pods_that_kserve_labels() -> None:
    (budget,) = of_kind(render_ci(CI / "disruption-budget-values.yaml"), "PodDisruptionBudget").values()
    labels = {"serving.kserve.io/inferenceservice": "chat", "component": "predictor"}
    assert budget["spec"]["selector"] == {"matchLabels": labels}
    assert budget["spec"]["maxUnavailable"] == "25%"


@pytest.mark.parametrize(("rollout", "surge", "unavailable"), [("surge", 1, 0), ("replace", 0, 1)])
def test_a_rollout_starts_first_or_stops_first(rollout: str, surge: int, unavailable: int) -> None:
    strategy = predictor(standard(rollout=rollout))["deploymentStrategy"]
    assert strategy["rollingUpdate"] == {"maxSurge": surge, "maxUnavailable": unavailable}
    assert "deploymentStrategy" not in predictor(standard())


def test_credentials_are_names_of_secrets() -> None:
    documents = render_ci(CI / "private-hf-model-values.yaml")
    assert not of_kind(documents, "Secret")
    account = of_kind(documents, "ServiceAccount")["model-reader"]
    assert account["secrets"] == [{"name": "hf-token"}, {"name": "s3-credentials"}]
    assert account["automountServiceAccountToken"] is False
    services = of_kind(documents, "InferenceService")
    assert services["fetched"]["spec"]["predictor"]["serviceAccountName"] == "model-reader"
    (token, _) = services["loaded"]["spec"]["predictor"]["model"]["env"]
    assert token == {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hf-token", "key": "token"}}}


# Routes.


def test_header_routes_come_before_the_default_and_streams_have_their_time() -> None:
    spec = of_kind(render_ci(CI / "routes-gateway-values.yaml"), "HTTPRoute")["chat-route"]["spec"]
    assert spec["hostnames"] == ["chat.example.com"]
    headers = [rule["matches"][0].get("headers", [{}])[0].get("value") for rule in spec["rules"]]
    assert headers == ["long", None, None]
    backends = [(rule["backendRefs"][0]["name"], rule["backendRefs"][0]["port"]) for rule in spec["rules"]]
    assert backends == [("reader-predictor", 80), ("chat-predictor", 8081), ("chat-predictor", 80)]
    assert {rule["timeouts"]["request"] for rule in spec["rules"]} == {"3600s"}


@pytest.mark.parametrize("header", [None, "x-context"])
def test_grpc_s_health_and_reflection_go_where_inference_goes(header: str | None) -> None:
    route: Document = {"hosts": ["a.b"], "inferenceService": "chat"}
    if header:
        route |= {"headerRoutes": [{"header": header, "value": "long", "inferenceService": "chat"}]}
    services = {
        "inference.GRPCInferenceService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    values = {**standard(grpc={"enabled": True}), "routes": {"r": route}}
    rules = of_kind(render(values), "HTTPRoute")["r-route"]["spec"]["rules"]
    rules = [rule for rule in rules if rule["backendRefs"][0]["port"] == 8081]
    assert len(rules) == (2 if header else 1)
    for rule in rules:
        assert {match["path"]["value"].strip("/") for match in rule["matches"]} == services
    assert all(("headers" in match) == (header is not None) for match in rules[0]["matches"])
    values["routes"] = {"r": {**route, "type": "Istio"}}
    istio = of_kind(render(values), "VirtualService")["r-route"]["spec"]["http"][0]
    assert {match["uri"]["prefix"].strip("/") for match in istio["match"]} == services
    assert all(("headers" in match) == (header is not None) for match in istio["match"])


def test_istio_routes_to_knative_by_the_host_that_its_gateway_knows() -> None:
    route = of_kind(render_ci(CI / "routes-istio-values.yaml"), "VirtualService")["small-route"]["spec"]["http"][0]
    assert route["rewrite"] == {"authority": "small-predictor.models.svc.cluster.local"}
    assert route["route"][0]["destination"]["host"] == "knative-local-gateway.istio-system.svc.cluster.local"
    assert route["timeout"] == "600s"
    assert route["retries"] == {"attempts": 0}


def test_pods_that_fail_are_taken_out_of_the_balance_for_every_backend() -> None:
    documents = render_ci(CI / "routes-istio-values.yaml")
    route = of_kind(documents, "VirtualService")["chat-route"]["spec"]["http"]
    assert route[0]["match"] == [{"headers": {"x-context": {"exact": "long"}}}]
    rules = of_kind(documents, "DestinationRule")
    hosts = {r["spec"]["host"] for r in rules.values()}
    assert hosts == {f"{name}-predictor.models.svc.cluster.local" for name in ("chat", "reader")}
    for rule in rules.values():
        assert rule["spec"]["trafficPolicy"]["outlierDetection"]["consecutive5xxErrors"] == 3


# Model caches.


def test_a_job_has_a_new_name_when_what_it_does_changes() -> None:
    def job(**values: object) -> str:
        found = render({"modelCaches": {"m": {"huggingFace": {"repository": "org/model", **values}}}})
        (name,) = of_kind(found, "Job")
        return name

    assert job() == job()
    assert job() != job(revision="v2")


def test_a_claim_outlives_the_release_and_an_existing_one_is_not_written() -> None:
    documents = render_ci(CI / "model-cache-values.yaml")
    claims = of_kind(documents, "PersistentVolumeClaim")
    assert set(claims) == {"qwen3-8b"}
    assert claims["qwen3-8b"]["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    volumes = {
        name.rsplit("-fill-", 1)[0]: job["spec"]["template"]["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"]
        for name, job in of_kind(documents, "Job").items()
    }
    assert volumes == {"qwen3-8b": "qwen3-8b", "tiny": "models"}


def test_a_local_model_cache_is_matched_by_the_storage_uri() -> None:
    documents = render_ci(CI / "local-model-cache-values.yaml")
    cache = of_kind(documents, "LocalModelCache")["qwen3-8b"]["spec"]
    isvc = of_kind(documents, "InferenceService")["chat"]
    assert cache["sourceModelUri"] == isvc["spec"]["predictor"]["model"]["storageUri"]
    assert not of_kind(documents, "Job")


# helm test.


def test_helm_test_has_a_pod_for_each_inferenceservice() -> None:
    documents = render_ci(CI / "routes-gateway-values.yaml")
    pods = of_kind(documents, "Pod")
    assert set(pods) == {"chat-test", "reader-test"}
    for name in ("chat", "reader"):
        pod = pods[f"{name}-test"]
        assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
        arguments = pod["spec"]["containers"][0]["args"]
        url = f"http://{name}-predictor.models.svc.cluster.local"
        assert arguments == [url, name, "generate", "300", "/v2/health/ready", "/openai/v1", "open"]
    assert not of_kind(render({**service(), "tests": {"enabled": False}}), "Pod")
