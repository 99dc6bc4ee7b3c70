"""What the metrics count, how they are named, and that their series are bounded."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as classic

from kserve_vllm.core.errors import EngineGone, Forbidden, InternalError, InvalidRequest, QueueFull, Unavailable
from kserve_vllm.core.lifecycle import Lifecycle, State
from kserve_vllm.core.request_context import RequestContext
from kserve_vllm.telemetry.metrics import DECLARED, OUTCOMES, Metrics
from kserve_vllm.telemetry.requests import RequestRecorder
from kserve_vllm.telemetry.tracing import Tracing
from tests.clients import until
from tests.observability.conftest import KEY
from tests.observability.load import LONG, Client
from tests.support import ROOT, Server


class Books:
    """The accounting on a registry of their own."""

    def __init__(self, **limits: int) -> None:
        self.registry = CollectorRegistry()
        self.lifecycle = Lifecycle()
        self.in_flight = 0
        self.metrics = Metrics(self.lifecycle, lambda: self.in_flight, "1", self.registry, **limits)
        self.metrics.attach("0.32", lambda name: name in ("demo", "upper"), lambda: {"loaded": 1, "unloaded": 2})
        self.requests = RequestRecorder(self.metrics, Tracing(), self.lifecycle)

    def value(self, name: str, **labels: str) -> float | None:
        """One sample."""
        self.metrics.render()
        return self.registry.get_sample_value(name, labels)

    def outcomes(self) -> dict[str, float]:
        """Requests by outcome."""
        found: dict[str, float] = {}
        for family in self.registry.collect():
            for sample in family.samples:
                if sample.name == "kserve_vllm_requests_total":
                    found[sample.labels["outcome"]] = found.get(sample.labels["outcome"], 0) + sample.value
        return found


@pytest.mark.parametrize("each", DECLARED, ids=lambda d: d.name)
def test_a_metric_is_named_by_prometheus_conventions(each: Any) -> None:
    assert re.fullmatch(r"kserve_vllm_[a-z_]+", each.name)
    assert each.text.endswith(".")
    if each.kind == "histogram":
        assert each.name.endswith("_seconds")
        assert list(each.buckets) == sorted(each.buckets)
    assert not each.name.endswith("_total"), "the library adds it"
    units = ("_seconds", "_ratio", "_tokens", "_requests", "_rejections", "_info", "_state", "_adapters", "_in_flight")
    counted = (
        "_loads",
        "_failures",
        "_prompts",
        "_verdicts",
        "_records",
        "_up",
        "_holds",
        "_connections",
        "_in_force",
        "_fallback",
        "_reloads",
        "_lines",
        "_batches_running",
        "_batches_unfinished",
    )
    assert each.name.endswith((*units, *counted))


def test_promtool_finds_nothing_to_improve_in_our_metrics(promtool: str) -> None:
    recorder = Books()
    with recorder.requests.open("v2", "/v2", "id", {}, "demo") as context:
        context.status, context.engine.sequences, context.engine.finished, context.engine.first_token_at = (
            200,
            1,
            1,
            time.time(),
        )
    text = generate_latest(recorder.registry)
    done = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, check=False)
    complaints = [line for line in (done.stdout + done.stderr).decode().splitlines() if "_created" not in line]
    # A state's age and a drain's rest are seconds, and no ratio of seconds.
    assert complaints == []


def test_a_flood_of_tenants_or_models_ends_in_the_label_other() -> None:
    recorder = Books(most_tenants=3, most_models=1)
    for number in range(500):
        with recorder.requests.open("v2", "/v2", "id", {}, f"invented-{number}") as context:
            context.access.tenant, context.status = f"tenant-{number}", 200
    for model in ("demo", "upper"):
        with recorder.requests.open("v2", "/v2", "id", {}, model) as context:
            context.status = 200
    labels = [
        s.labels for f in recorder.registry.collect() for s in f.samples if s.name == "kserve_vllm_requests_total"
    ]
    assert {label["tenant"] for label in labels} == {"tenant-0", "tenant-1", "tenant-2", "other"}
    assert {label["model"] for label in labels} == {"demo", "other"}
    assert (
        recorder.value(
            "kserve_vllm_requests_total", protocol="v2", endpoint="/v2", model="other", tenant="other", outcome="ok"
        )
        == 498
    )


@pytest.mark.parametrize(
    ("state", "status", "error", "outcome", "reason"),
    [
        (State.READY, 200, None, "ok", None),
        (State.READY, 404, None, "client_error", None),
        (State.READY, 500, None, "server_error", None),
        (State.READY, 401, None, "refused", "unauthenticated"),
        (State.READY, 429, None, "refused", "too_many_requests"),
        (State.READY, 503, None, "unavailable", "queue_full"),
        (State.READY, 499, None, "cancelled", None),
        (State.READY, None, None, "cancelled", None),
        (State.READY, 400, InvalidRequest("x"), "client_error", None),
        (State.READY, 403, Forbidden("x"), "refused", "forbidden"),
        (State.READY, 500, InternalError("x"), "server_error", None),
        (State.READY, 503, QueueFull("x"), "unavailable", "queue_full"),
        (State.READY, 503, Unavailable("x"), "unavailable", "unloaded"),
        (State.READY, 503, Unavailable("x", reason="limits_unavailable"), "unavailable", "limits_unavailable"),
        (State.LOADING, 503, Unavailable("x"), "unavailable", "loading"),
        (State.DRAINING, "UNAVAILABLE", Unavailable("x"), "unavailable", "draining"),
        (State.FAILED, 503, EngineGone("x"), "unavailable", "engine_dead"),
        (State.READY, 500, ValueError("x"), "server_error", None),
    ],
)
def test_every_way_to_end_has_an_outcome_and_every_refusal_a_reason(
    state: State, status: Any, error: Exception | None, outcome: str, reason: str | None
) -> None:
    recorder = Books()
    recorder.lifecycle.to(state)
    with recorder.requests.open("v1", "/x", "id", {}) as context:
        context.status, context.error = status, error
    assert recorder.outcomes() == {outcome: 1}
    assert outcome in OUTCOMES
    if reason is not None:
        assert recorder.value("kserve_vllm_rejections_total", protocol="v1", reason=reason) == 1


def test_an_answer_that_the_moderation_cut_off_counts_as_refused_and_not_as_given_up() -> None:
    recorder = Books()
    with recorder.requests.open("openai", "/x", "id", {}) as context:
        context.status, context.engine.sequences, context.engine.aborted, context.cut_off = 200, 1, 1, True
    assert recorder.outcomes() == {"refused": 1}
    assert recorder.value("kserve_vllm_rejections_total", protocol="openai", reason="moderation") == 1


def test_a_stream_that_began_well_and_whose_engine_died_counts_as_server_error() -> None:
    recorder = Books()
    with recorder.requests.open("openai", "/x", "id", {}) as context:
        context.status, context.engine.sequences, context.engine.failed = 200, 1, 1
    assert recorder.outcomes() == {"server_error": 1}


def test_an_exception_that_nobody_caught_still_closes_the_ticket() -> None:
    recorder = Books()
    with pytest.raises(RuntimeError), recorder.requests.open("openai", "/x", "id", {}):
        raise RuntimeError
    assert recorder.outcomes() == {"server_error": 1}


def test_times_come_from_the_ticket_and_the_mean_gap_leaves_the_first_token_out() -> None:
    context = RequestContext("id", "v2", "/x")
    assert context.ttft_s is None
    assert context.engine.itl_s is None
    context.engine.first_token_at, context.engine.decode_s, context.engine.gaps = context.started_at + 0.25, 1.0, 10
    assert context.ttft_s == pytest.approx(0.25)
    assert context.engine.itl_s == pytest.approx(0.1)


def test_drain_progress_goes_from_0_to_1_while_draining_and_is_0_otherwise() -> None:
    recorder = Books()
    recorder.lifecycle.to(State.READY)
    recorder.in_flight = 4
    assert recorder.value("kserve_vllm_drain_progress_ratio") == 0
    recorder.lifecycle.to(State.DRAINING)
    recorder.metrics.begin_drain(60)
    assert recorder.value("kserve_vllm_drain_progress_ratio") == 0
    assert 50 < (recorder.value("kserve_vllm_drain_remaining_seconds") or 0) <= 60
    recorder.in_flight = 1
    assert recorder.value("kserve_vllm_drain_progress_ratio") == 0.75
    recorder.in_flight = 0
    assert recorder.value("kserve_vllm_drain_progress_ratio") == 1


def test_several_processes_with_a_shared_folder_are_put_together(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from kserve_vllm.core.lifecycle import Lifecycle, State\n"
        "from kserve_vllm.telemetry.metrics import Metrics\n"
        "from kserve_vllm.core.request_context import EngineFigures, RequestContext\n"
        "life = Lifecycle(); metrics = Metrics(life, lambda: 2, '1'); life.to(State.READY)\n"
        "ticket = RequestContext('id', 'v2', '/x', model='m', engine=EngineFigures(1, output_tokens=5, queue_s=0.01))\n"
        "metrics.attach('0.32', lambda name: name == 'm', dict)\n"
        "metrics.count(ticket, 'ok', 1.0); text = metrics.render()[0].decode()\n"
        "print(text); sys.stdout.flush(); sys.stdin.read()\n"
    )
    environ = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    start = [sys.executable, "-c", code]
    texts = []
    with (
        subprocess.Popen(start, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first,
    ):
        assert first.stdout is not None
        until(lambda: any(tmp_path.iterdir()), 30)
        while not (line := first.stdout.readline()).startswith("kserve_vllm_build_info"):
            assert line
        # The first one is still alive.
        second = subprocess.run(start, env=environ, input="", capture_output=True, text=True, check=True)
        texts.append(second.stdout)
        assert first.stdin is not None
        first.stdin.close()
    samples = {(s.name, s.labels.get("state")): s.value for f in classic(texts[0]) for s in f.samples}
    assert samples["kserve_vllm_requests_total", None] == 2
    assert samples["kserve_vllm_output_tokens_total", None] == 10
    assert samples["kserve_vllm_queue_time_seconds_count", None] == 2
    assert samples["kserve_vllm_requests_in_flight", None] == 4, "gauges of what lives add up"
    assert samples["kserve_vllm_lifecycle_state", "ready"] == 1, "gauges of a state do not"


# With the real engine


def count(server: Server, **labels: str) -> float:
    """Requests with these labels."""
    return server.metric("kserve_vllm_requests_total", **labels)


def test_each_protocol_counts_its_requests_by_endpoint_model_tenant_and_outcome(observed: Server) -> None:
    client = Client(observed, KEY)
    asks = [
        (client.chat, "openai", "/v1/chat/completions"),
        (client.chat_stream, "openai", "/v1/chat/completions"),
        (client.infer, "v2", "/v2/models/{model_name}/infer"),
        (client.generate, "generate", "/v2/models/{model_name}/generate"),
        (lambda: client.generate(stream=True), "generate", "/v2/models/{model_name}/generate_stream"),
        (client.predict, "v1", "/v1/models/{model_name}:predict"),
        (client.grpc_infer, "grpc", "ModelInfer"),
        (client.grpc_stream, "grpc", "ModelStreamInfer"),
    ]
    for ask, protocol, endpoint in asks:
        labels = {"protocol": protocol, "model": "demo", "tenant": "none", "outcome": "ok"}

        # FastAPI's templates may name a converter: {model_name:path}.
        def now(endpoint: str = endpoint, labels: dict[str, str] = labels) -> float:
            return count(observed, **labels, endpoint=endpoint)

        before = now()
        ask()
        until(lambda now=now, before=before: now() == before + 1, 3)  # type: ignore[misc]


def test_tokens_are_those_of_the_answers_usage(observed: Server) -> None:
    def now(kind: str) -> float:
        return observed.metric(f"kserve_vllm_{kind}_tokens_total", model="upper")

    # The prefix cache holds whole blocks of up to 128 tokens.
    body = {"model": "upper", "prompt": "all of these words are in the cache by now " * 12, **LONG}
    client = Client(observed, KEY)
    assert client.post("/v1/completions", body).status_code == 200
    before = [now(kind) for kind in ("prompt", "cached_prompt", "output")]
    usage = client.post("/v1/completions", body).json()["usage"]
    after = [now(kind) for kind in ("prompt", "cached_prompt", "output")]
    assert after[0] - before[0] == usage["prompt_tokens"]
    assert after[1] - before[1] > 0, "the second prompt is in the prefix cache"
    assert after[2] - before[2] == usage["completion_tokens"] == LONG["max_tokens"]


def test_a_prompt_counts_once_for_its_n_continuations_and_each_of_them_counts(observed: Server) -> None:
    def now(kind: str) -> float:
        return observed.metric(f"kserve_vllm_{kind}_tokens_total", model="french")

    body = {"model": "french", "prompt": ["one two", "three four"], "n": 3, **LONG, "temperature": 1.0}
    before = now("prompt"), now("output")
    usage = Client(observed, KEY).post("/v1/completions", body).json()["usage"]
    assert now("prompt") - before[0] == usage["prompt_tokens"]
    assert now("output") - before[1] == usage["completion_tokens"] == 2 * 3 * LONG["max_tokens"]


def test_vllms_own_histogram_has_every_gap_between_tokens(observed: Server) -> None:
    name = "vllm:inter_token_latency_seconds"

    def now() -> list[float]:
        return [observed.metric(f"{name}_{what}") for what in ("count", "sum")]

    before = now()
    began = time.monotonic()
    for stream in (True, False):
        answer = Client(observed, KEY).post("/v1/completions", {"prompt": "x", **LONG, "stream": stream})
        assert answer.status_code == 200
    seen = time.monotonic() - began
    count, total = (after - first for after, first in zip(now(), before, strict=True))
    assert count == 2 * (int(LONG["max_tokens"]) - 1)
    assert 0 < total < seen


def test_times_add_up(observed: Server) -> None:
    names = ("queue_time", "time_to_first_token", "inter_token_latency", "request_duration")

    def now() -> dict[str, float]:
        return {name: observed.metric(f"kserve_vllm_{name}_seconds_sum", model="demo") for name in names}

    before = now()
    began = time.monotonic()
    assert Client(observed, KEY).chat().status_code == 200
    seen = time.monotonic() - began
    took = {name: after - before[name] for name, after in now().items()}
    assert 0 <= took["queue_time"] < took["time_to_first_token"] < took["request_duration"] < seen
    tokens = int(LONG["max_tokens"])
    whole = took["time_to_first_token"] + took["inter_token_latency"] * (tokens - 1)
    assert whole == pytest.approx(took["request_duration"], rel=0.5)


def test_a_client_that_goes_away_counts_as_cancelled_with_the_tokens_it_cost(observed: Server) -> None:
    before = count(observed, outcome="cancelled"), observed.metric("kserve_vllm_output_tokens_total")
    Client(observed, KEY).give_up()
    until(lambda: count(observed, outcome="cancelled") == before[0] + 1, 5)
    assert observed.metric("kserve_vllm_output_tokens_total") > before[1]
    body = {"model": "demo", "prompt": "x", "max_tokens": 900, "min_tokens": 900, "ignore_eos": True}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{observed.url}/v1/completions", json=body, timeout=0.3, headers={"authorization": f"Bearer {KEY}"})
    until(lambda: count(observed, outcome="cancelled") == before[0] + 2, 5)


def test_a_missing_key_counts_as_refused_and_an_unknown_model_as_client_error(observed: Server) -> None:
    def rejected() -> float:
        return observed.metric("kserve_vllm_rejections_total", reason="unauthenticated", protocol="v1")

    before = count(observed, outcome="refused"), rejected(), count(observed, outcome="client_error", model="other")
    assert Client(observed).predict().status_code == 401
    assert Client(observed, KEY).infer("no-such-model").status_code == 404
    assert count(observed, outcome="refused") == before[0] + 1
    assert rejected() == before[1] + 1
    assert count(observed, outcome="client_error", model="other") == before[2] + 1


def test_paths_that_nothing_serves_share_one_endpoint(observed: Server) -> None:
    for number in range(5):
        Client(observed, KEY).post(f"/invented/{number}", {})
        Client(observed, KEY).post(f"/v2/models/m{number}/invented", {})
    text = httpx.get(observed.url + "/metrics").text
    endpoints = set(re.findall(r'kserve_vllm_requests_total{endpoint="([^"]*)"', text))
    assert "other" in endpoints
    assert not [endpoint for endpoint in endpoints if "invented" in endpoint]


def test_openmetrics_is_answered_where_it_is_asked_for_with_trace_ids_as_exemplars(observed: Server) -> None:
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    Client(observed, KEY).chat(traceparent=f"00-{trace}-00f067aa0ba902b7-01")
    accept = {"accept": "application/openmetrics-text; version=1.0.0"}
    response = httpx.get(observed.url + "/metrics", headers=accept)
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    families = list(openmetrics(response.text))
    with_exemplar = {
        family.name
        for family in families
        for sample in family.samples
        if sample.exemplar and sample.exemplar.labels == {"trace_id": trace}
    }
    assert {"kserve_vllm_requests", "kserve_vllm_time_to_first_token_seconds"} <= with_exemplar
    assert any(family.name.startswith("vllm:") for family in families), "names keep their colon"
    plain = httpx.get(observed.url + "/metrics")
    assert plain.headers["content-type"].startswith("text/plain")
    assert "# {" not in plain.text


def test_adapters_are_counted_by_state(observed: Server) -> None:
    client = Client(observed, KEY)
    assert observed.metric("kserve_vllm_adapters", state="loaded") == 2
    assert client.post("/v2/repository/models/french/unload", {}).status_code == 200
    try:
        assert observed.metric("kserve_vllm_adapters", state="loaded") == 1
        assert observed.metric("kserve_vllm_adapters", state="unloaded") == 1
    finally:
        assert client.post("/v2/repository/models/french/load", {}).status_code == 200


def test_build_info_has_the_versions(observed: Server) -> None:
    versions = httpx.get(observed.url + "/version").json()
    labels = {"version": versions["kserve_vllm"], "vllm_version": versions["version"]}
    assert observed.metric("kserve_vllm_build_info", **labels) == 1


def test_thirty_streams_at_once_are_all_counted_and_none_is_mixed_up(observed: Server) -> None:
    before = count(observed, outcome="ok"), observed.metric("kserve_vllm_output_tokens_total")
    threads = [threading.Thread(target=Client(observed, KEY).chat_stream) for _ in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert count(observed, outcome="ok") == before[0] + 30
    assert observed.metric("kserve_vllm_output_tokens_total") == before[1] + 30 * LONG["max_tokens"]


def test_the_reference_lists_every_metric() -> None:
    page = (ROOT / "docs" / "reference" / "metrics.md").read_text()
    for each in DECLARED:
        assert f"`{each.name}{'_total' if each.kind == 'counter' else ''}`" in page
