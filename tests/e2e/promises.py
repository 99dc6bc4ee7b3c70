"""What README, chart and catalogue promise about clusters, and the cases that show it.

A test of `make test` holds that every case here exists and that every case of the suite is named here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Promise:
    """One promise.

    Attributes:
        text: what is promised.
        where: the document that promises it.
        cases: `file::function` below tests/e2e; a parametrized one stands for all of its cases. None: never run.
        lacks: what a cluster would have to have, where there is no case.
    """

    text: str
    where: str
    cases: tuple[str, ...] = ()
    lacks: str = ""


_OBJECTS, _STANDARD, _FAILURES = "test_1_objects", "test_2_standard", "test_3_failures"
_SHARING, _KNATIVE, _PLATFORM = "test_4_sharing", "test_5_knative", "test_6_platform"
_OPERATORS = "test_7_operators"
_CHART, _README, _CATALOGUE = "chart", "README", "catalogue"

GROUPS: dict[str, tuple[Promise, ...]] = {
    "Objects": (
        Promise(
            "Every scenario of the chart (`ci/`) is taken by the webhooks of KServe and Knative, and KServe "
            "writes its workload",
            _CHART,
            (f"{_OBJECTS}::test_a_scenario_is_taken_and_written",),
        ),
        Promise(
            "KServe makes of each scenario the pods by which the chart's own tests judge it",
            _CHART,
            (f"{_OBJECTS}::test_kserve_s_workload_is_what_our_model_of_it_says",),
        ),
        Promise(
            "What the chart writes, no controller takes away or writes anew",
            _CHART,
            (f"{_OBJECTS}::test_what_the_chart_writes_stays_as_it_is",),
        ),
        Promise(
            "An upgrade that changes no value restarts no model",
            _CHART,
            (f"{_OBJECTS}::test_an_upgrade_that_changes_nothing_restarts_nothing",),
        ),
        Promise(
            "A new version's runtimes stand beside the old ones (`versionInName`, `keepOnUpgrade`, `autoSelect`)",
            _CHART,
            (f"{_OBJECTS}::test_runtimes_of_the_next_version_are_taken_beside_those_of_this_one",),
        ),
        Promise(
            "A release that is removed leaves nothing but what it was told to keep",
            _CHART,
            (f"{_OBJECTS}::test_a_scenario_is_removed_without_rest",),
        ),
        Promise(
            "Each manifest of the catalogue applies as it is",
            _CATALOGUE,
            (
                f"{_OBJECTS}::test_every_manifest_of_the_catalogue_is_taken_written_and_removed",
                f"{_OBJECTS}::test_a_service_that_kserve_refuses_is_refused_here_too",
            ),
        ),
    ),
    "Standard mode": (
        Promise("`helm install` gives a ready service", _CHART, (f"{_STANDARD}::test_install_to_ready",)),
        Promise("`helm test` asks it", _CHART, (f"{_STANDARD}::test_helm_test",)),
        Promise(
            "Pods run where Pod Security is `restricted`",
            _CHART,
            (f"{_STANDARD}::test_pods_under_pod_security_restricted",),
        ),
        Promise(
            "OpenAI's API, Anthropic's messages, V2, generate and V1 answer through the gateway",
            _README,
            (f"{_STANDARD}::test_every_protocol_through_the_gateway",),
        ),
        Promise(
            "The same from inside of the cluster, and gRPC with health and reflection",
            _README,
            (f"{_STANDARD}::test_every_protocol_from_inside_and_grpc",),
        ),
        Promise("gRPC through the gateway", _README, (f"{_STANDARD}::test_grpc_through_the_gateway",)),
        Promise("Metrics of our own beside vLLM's", _README, (f"{_STANDARD}::test_metrics_from_inside",)),
        Promise(
            "Pods are scraped as the PodMonitor says; rules and dashboards find what was scraped",
            _CHART,
            (f"{_STANDARD}::test_what_is_scraped_is_what_rules_and_dashboards_ask_for",),
        ),
        Promise("No stream is cut", _README, (f"{_STANDARD}::test_no_stream_is_cut",)),
        Promise(
            "A rolling upgrade under load loses no request",
            _CHART,
            (f"{_STANDARD}::test_an_upgrade_under_load_loses_nothing",),
        ),
        Promise(
            "A canary that KServe would send no request is refused (KServe 0.20)",
            _CHART,
            (f"{_STANDARD}::test_a_canary_that_would_get_no_request_is_refused",),
        ),
        Promise("A canary loses no request", _CHART, (f"{_STANDARD}::test_a_canary_in_standard_mode_loses_nothing",)),
        Promise(
            "A canary gets its percent of the requests (KServe 0.21)",
            _CHART,
            (f"{_STANDARD}::test_canary_shares_in_standard_mode",),
        ),
    ),
    "When something breaks": (
        Promise(
            "A pod that is deleted finishes its streams",
            _README,
            (f"{_STANDARD}::test_a_pod_that_is_deleted_finishes_its_streams",),
        ),
        Promise(
            "A drain of nodes waits for the PodDisruptionBudget, and loses no request",
            _CHART,
            (f"{_STANDARD}::test_a_drain_of_nodes_waits_for_the_disruption_budget",),
        ),
        Promise(
            "When the engine dies, every request is told, the process exits with code 1 and the pod comes back",
            _README,
            (f"{_STANDARD}::test_a_killed_engine_ends_the_pod_s_process_with_code_1",),
        ),
        Promise(
            "A container that is killed for memory comes back",
            _README,
            (f"{_STANDARD}::test_a_container_killed_for_memory_comes_back",),
        ),
        Promise(
            "An image that can't be pulled: the service is not ready, and the cluster says why",
            _CHART,
            (f"{_FAILURES}::test_an_image_that_can_not_be_pulled",),
        ),
        Promise(
            "A missing Secret: the service is not ready, and the cluster says why",
            _CHART,
            (f"{_FAILURES}::test_a_secret_that_is_missing",),
        ),
        Promise(
            "A model that is not there: the process ends, and its log says why",
            _README,
            (f"{_FAILURES}::test_a_model_that_is_not_there",),
        ),
    ),
    "Several teams": (
        Promise("Keys hold through the gateway", _README, (f"{_SHARING}::test_keys_through_the_gateway",)),
        Promise("Limits hold through the gateway", _README, (f"{_SHARING}::test_limits_through_the_gateway",)),
        Promise("Adapters answer through the gateway", _README, (f"{_SHARING}::test_adapters_through_the_gateway",)),
        Promise("Moderation refuses and redacts", _README, (f"{_SHARING}::test_moderation_through_the_gateway",)),
        Promise("In the queue, a higher class waits less", _README, (f"{_SHARING}::test_a_higher_class_waits_less",)),
        Promise(
            "Replicas share their limits in Redis", _README, (f"{_SHARING}::test_replicas_share_their_limits_in_redis",)
        ),
        Promise(
            "A second release that would take the first one's runtimes is refused, and harms nothing",
            _CHART,
            (f"{_SHARING}::test_a_second_release_with_the_same_runtimes_is_refused_and_harms_nothing",),
        ),
        Promise(
            "Two releases run side by side, the second with runtimes of its namespace",
            _CHART,
            (f"{_SHARING}::test_two_releases_side_by_side",),
        ),
        Promise(
            "A team without a release runs the catalogue's `cpu-demo` on the runtimes of another",
            _CATALOGUE,
            (f"{_SHARING}::test_a_tenant_s_service_on_the_runtimes_of_another",),
        ),
    ),
    "Knative mode": (
        Promise(
            "`helm install` gives a ready service", _CHART, (f"{_KNATIVE}::test_install_to_ready_in_knative_mode",)
        ),
        Promise("`helm test` asks it", _CHART, (f"{_KNATIVE}::test_helm_test_in_knative_mode",)),
        Promise(
            "All protocols over HTTP answer through Knative's proxies",
            _README,
            (f"{_KNATIVE}::test_every_protocol_through_knative_s_proxies",),
        ),
        Promise(
            "No stream is cut (with `features.knative.dev/http-full-duplex`)",
            _README,
            (f"{_KNATIVE}::test_no_stream_is_cut_in_knative_mode",),
        ),
        Promise(
            "gRPC and REST on the one port that Knative takes",
            _CHART,
            (f"{_KNATIVE}::test_grpc_and_rest_on_knative_s_one_port",),
        ),
        Promise(
            "A canary that never gets ready takes no request",
            _CHART,
            (f"{_KNATIVE}::test_a_canary_that_never_gets_ready_takes_no_request",),
        ),
        Promise(
            "A canary gets its percent of the requests, and is promoted without a lost request or a second load",
            _CHART,
            (f"{_KNATIVE}::test_canary_shares_in_knative_mode",),
        ),
        Promise(
            "A canary is taken back without a lost request",
            _CHART,
            (f"{_KNATIVE}::test_a_canary_is_rolled_back_without_a_lost_request",),
        ),
        Promise(
            "Each revision of a canary has a URL of its own",
            _CHART,
            (f"{_KNATIVE}::test_each_revision_of_a_canary_has_a_url_of_its_own",),
        ),
        Promise(
            "Pods follow the requests at once, and no stream is cut when one goes",
            _CHART,
            (f"{_KNATIVE}::test_scaling_up_by_concurrency_and_down_without_a_cut_stream",),
        ),
        Promise(
            "No pod while nobody asks; all who ask first are answered",
            _CHART,
            (
                f"{_KNATIVE}::test_one_request_from_zero",
                f"{_KNATIVE}::test_to_zero_and_from_zero_with_ten_at_once",
            ),
        ),
    ),
    "Commands of an operator": (
        Promise(
            "`rollout` takes the traffic from a canary that never gets ready, refuses, or is slow",
            "guide to rollouts",
            (f"{_OPERATORS}::test_a_worse_canary_is_rolled_back",),
        ),
        Promise(
            "`rollout` promotes a good model, loses no request, and goes on after it was killed at any step",
            "guide to rollouts",
            (f"{_OPERATORS}::test_a_good_model_is_promoted_though_the_command_is_killed_at_every_step",),
        ),
        Promise(
            "`rolloutJobs`: the Job takes a worse model back and promotes a good one, with its own Role alone",
            _CHART,
            (f"{_OPERATORS}::test_a_job_of_the_chart_rolls_out",),
        ),
        Promise(
            "`restart` loses no request",
            "guide to diagnosing",
            (f"{_OPERATORS}::test_a_service_is_restarted_without_a_lost_request",),
        ),
        Promise(
            "`diagnose` finds nothing wrong with a service that runs",
            "guide to diagnosing",
            (f"{_OPERATORS}::test_a_service_that_runs_is_diagnosed_as_such",),
        ),
    ),
    "What needs more of a cluster": (
        Promise("An HPA on CPU scales pods", _CHART, (f"{_PLATFORM}::test_an_hpa_on_cpu_scales",)),
        Promise(
            "KEDA scales pods by the engine's queue", _CHART, (f"{_PLATFORM}::test_keda_scales_by_the_engine_s_queue",)
        ),
        Promise(
            "An upgrade from the chart as it was last released loses no request",
            _CHART,
            (f"{_PLATFORM}::test_an_upgrade_from_the_last_released_chart_under_load",),
        ),
        Promise("A service on a GPU gets ready", _CHART, (f"{_PLATFORM}::test_a_gpu_service_gets_ready",)),
        Promise("A model over several nodes", _CHART, lacks="nodes with GPUs"),
        Promise("Prometheus' operator acts on PodMonitor and PrometheusRule", _CHART, lacks="Prometheus' operator"),
        Promise("A NetworkPolicy keeps others out", _CHART, lacks="a network that enforces policies"),
        Promise("Models from hubs, object stores, volumes and image registries", _CHART, lacks="a way out, or a store"),
        Promise("Istio's routes and the ejection of failing pods", _CHART, lacks="Istio"),
        Promise("A stream of 15 minutes is not cut", _README, (f"{_PLATFORM}::test_a_stream_of_minutes_is_not_cut",)),
    ),
}


def cases() -> set[str]:
    """All cases that a promise names."""
    return {case for promises in GROUPS.values() for promise in promises for case in promise.cases}
