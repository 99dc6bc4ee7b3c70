"""Every metric of our own, declared once, beside vLLM's in one registry.

`DECLARED` is the one list: the objects, the README's table and the tests are made from it. Where
`PROMETHEUS_MULTIPROC_DIR` is set, the values of all processes that share the folder are put together; gauges then say
how.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, multiprocess
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector

from kserve_vllm.core.lifecycle import Lifecycle, State
from kserve_vllm.core.request_context import RequestContext

OUTCOMES = ("ok", "client_error", "refused", "unavailable", "cancelled", "server_error")
_TEXT = "text/plain; version=0.0.4; charset=utf-8"
# The objective for the first token is 500 ms: it has to be a boundary.
_FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_BETWEEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_WHOLE_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_LAG_S = (0.01, 0.025, 0.05, 0.1, 0.2, 0.5, 1, 2.5, 5, 10)
_QUEUE_S = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


@dataclass(frozen=True)
class Declared:
    """One metric.

    Attributes:
        name: without the `_total` of a counter.
        kind: `counter`, `gauge` or `histogram`.
        text: what it counts, with its unit.
        labels: label names.
        buckets: upper boundaries, of a histogram.
        merge: how a gauge's values of several processes become one.
    """

    name: str
    kind: str
    text: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    merge: str = "livesum"


_WHO = ("model", "tenant")
_USED = ("model", "adapter", "tenant", "protocol")
DECLARED: tuple[Declared, ...] = (
    Declared(
        "kserve_vllm_requests",
        "counter",
        "Requests that were answered, refused or given up.",
        ("protocol", "endpoint", "model", "tenant", "outcome"),
    ),
    Declared(
        "kserve_vllm_rejections",
        "counter",
        "Requests that were turned away, and answers that a moderation cut off, by reason.",
        ("protocol", "reason"),
    ),
    Declared(
        "kserve_vllm_time_to_first_token_seconds",
        "histogram",
        "From a request's arrival to its first token, in seconds; recorded when the request ends.",
        _WHO,
        _FIRST_TOKEN_S,
    ),
    Declared(
        "kserve_vllm_inter_token_latency_seconds",
        "histogram",
        "Mean time between two tokens of one request, in seconds; one value a request.",
        _WHO,
        _BETWEEN_S,
    ),
    Declared(
        "kserve_vllm_request_duration_seconds",
        "histogram",
        "From a request's arrival to the end of its answer, in seconds; requests that reached the engine.",
        _WHO,
        _WHOLE_S,
    ),
    Declared(
        "kserve_vllm_queue_time_seconds",
        "histogram",
        "Time in the engine's queue before a request was first scheduled, in seconds.",
        _WHO,
        _QUEUE_S,
    ),
    Declared("kserve_vllm_prompt_tokens", "counter", "Tokens of prompts, cached ones included.", _USED),
    Declared(
        "kserve_vllm_cached_prompt_tokens", "counter", "Tokens of prompts that were found in the prefix cache.", _USED
    ),
    Declared(
        "kserve_vllm_output_tokens",
        "counter",
        "Tokens that were generated, those of cancelled requests included.",
        _USED,
    ),
    Declared(
        "kserve_vllm_openai_requests",
        "counter",
        "Chat and completion requests by who wrote the answer: our fast path (fast) or vLLM's app (vllm).",
        ("path",),
    ),
    Declared("kserve_vllm_requests_in_flight", "gauge", "Requests that have entered and not been answered."),
    Declared(
        "kserve_vllm_lifecycle_state", "gauge", "1 for the state that the process is in.", ("state",), merge="livemax"
    ),
    Declared(
        "kserve_vllm_lifecycle_state_seconds",
        "gauge",
        "How long the process has been in its state, in seconds.",
        merge="livemax",
    ),
    Declared(
        "kserve_vllm_start_phase_seconds",
        "gauge",
        "How long each phase of the start took, in seconds: process, imports, engine_process, weights, compile, "
        "graphs, warm_up; their sum is from the creation of the process to ready. first_probe is what came after.",
        ("phase",),
        merge="livemax",
    ),
    Declared(
        "kserve_vllm_drain_progress_ratio",
        "gauge",
        "Share of the requests in flight at the beginning of a drain that have ended; 0 while not draining.",
        merge="livemin",
    ),
    Declared(
        "kserve_vllm_drain_remaining_seconds",
        "gauge",
        "Seconds until requests in flight are cut off; 0 while not draining.",
        merge="livemax",
    ),
    Declared(
        "kserve_vllm_adapters",
        "gauge",
        "Adapters (LoRA) by state: loaded, loading, failed or unloaded.",
        ("state",),
        merge="livemax",
    ),
    Declared("kserve_vllm_adapter_loads", "counter", "Versions of an adapter that were loaded.", ("adapter",)),
    Declared(
        "kserve_vllm_adapter_failures",
        "counter",
        "Attempts to load an adapter that failed; the version before is served on.",
        ("adapter",),
    ),
    Declared(
        "kserve_vllm_warmup_prompts",
        "counter",
        "Prompts of the warm-up file that were run through the prefix cache, by outcome: ok or failed.",
        ("outcome",),
    ),
    Declared(
        "kserve_vllm_redis_up",
        "gauge",
        "1 while the Redis that replicas share answers, 0 while not, or where there is none.",
        merge="livemin",
    ),
    Declared(
        "kserve_vllm_waiting_requests", "gauge", "Requests that wait in front of the engine, by class.", ("priority",)
    ),
    Declared(
        "kserve_vllm_response_cache_requests",
        "counter",
        "Requests by what the response cache had for them: hit, miss or bypass.",
        ("result",),
    ),
    Declared(
        "kserve_vllm_moderation_verdicts",
        "counter",
        "Texts that a moderation hook refused, redacted or failed to look at.",
        ("hook", "where", "verdict"),
    ),
    Declared(
        "kserve_vllm_usage_records",
        "counter",
        "Usage records by what became of them: sent, dropped, or failed (a try that is repeated).",
        ("result",),
    ),
    Declared(
        "kserve_vllm_key_file_failures", "gauge", "Times that a changed key file could not be used.", merge="livemax"
    ),
    Declared(
        "kserve_vllm_shortcut_in_force",
        "gauge",
        "1 for a shortcut of --fast-path that is taken, else 0, with the reason: used, left_out, not_applicable "
        "(to this model or these flags), or changed (vLLM or a library is not as known).",
        ("shortcut", "reason"),
        merge="livemax",
    ),
    Declared(
        "kserve_vllm_event_loop_lag_seconds",
        "histogram",
        "How late a timer of the event loop was, ten times a second: how long probes and tokens waited for "
        "whatever else was done.",
        buckets=_LAG_S,
    ),
    Declared(
        "kserve_vllm_event_loop_holds",
        "counter",
        "Times that the event loop was held for over 200 ms by work of this process; each is logged at the "
        "level warning.",
    ),
    Declared("kserve_vllm_http_connections", "gauge", "Open connections of the HTTP port."),
    Declared(
        "kserve_vllm_grpc_fallback",
        "gauge",
        "1 while grpcio's server answers gRPC since our own failed its test at the start, else 0.",
        merge="livemax",
    ),
    Declared(
        "kserve_vllm_tls_reloads",
        "counter",
        "Changes of the TLS files by outcome: ok, or failed (the old certificate is shown on).",
        ("outcome",),
    ),
    Declared("kserve_vllm_batches_running", "gauge", "Batches (--batch-dir) that this process works on."),
    Declared(
        "kserve_vllm_batches_unfinished",
        "gauge",
        "Batches in --batch-dir that are not over, whoever works on them; those that wait are the rest.",
        merge="livemax",
    ),
    Declared("kserve_vllm_batch_lines_in_flight", "gauge", "Requests of batches that are being answered."),
    Declared(
        "kserve_vllm_batch_lines",
        "counter",
        "Requests of batches that are over, by outcome: completed, failed, expired or cancelled.",
        ("outcome",),
    ),
    Declared(
        "kserve_vllm_build_info",
        "gauge",
        "Always 1; the versions are in the labels.",
        ("version", "vllm_version", "python_version"),
        merge="livemax",
    ),
)


class Bounded:
    """Lets through the first `limit` values of a label; whatever comes after is `other`."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._seen: set[str] = set()

    def __call__(self, value: str) -> str:
        """The value, or `other`."""
        if value not in self._seen:
            if len(self._seen) >= self._limit:
                return "other"
            self._seen.add(value)
        return value


class _Constant(Collector):
    """A gauge that is not kept in the processes' folder."""

    def __init__(self, name: str, text: str, value: float) -> None:
        self._family = GaugeMetricFamily(name, text, value)

    def collect(self) -> Iterable[GaugeMetricFamily]:
        return [self._family]


class Metrics:
    """Our metrics, registered with the registry that vLLM uses too.

    Args:
        lifecycle: the state to show.
        in_flight: tells the number of requests in flight.
        version: of this package.
        registry: where they are registered.
        most_tenants, most_models: how many of each get series of their own.
        started_at: when the server was started, where several processes answer for it, in seconds of the wall clock.
    """

    def __init__(
        self,
        lifecycle: Lifecycle,
        in_flight: Callable[[], int],
        version: str = "",
        registry: CollectorRegistry = REGISTRY,
        most_tenants: int = 50,
        most_models: int = 100,
        started_at: float | None = None,
    ) -> None:
        self._lifecycle = lifecycle
        self._in_flight = in_flight
        self._version = version
        self._registry = registry
        self._tenant = Bounded(most_tenants)
        self._model = Bounded(most_models)
        self._counters: dict[str, Counter] = {}
        self._gauges: dict[str, Gauge] = {}
        self._histograms: dict[str, Histogram] = {}
        for each in DECLARED:
            self._declare(each)
        self._adapters: Callable[[], Mapping[str, int]] = dict
        self._serves: Callable[[str], bool] = lambda name: False
        self._drain: tuple[int, float] | None = None
        self._watched: list[Callable[[Metrics], None]] = []
        self._started_at = started_at
        self._show_state(lifecycle)
        lifecycle.on_change(self._show_state)

    def _declare(self, each: Declared) -> None:
        name, text, labels, registry = each.name, each.text, each.labels, self._registry
        if each.kind == "counter":
            self._counters[name] = Counter(name, text, labels, registry=registry)
        elif each.kind == "histogram":
            self._histograms[name] = Histogram(name, text, labels, buckets=each.buckets, registry=registry)
        else:
            self._gauges[name] = Gauge(name, text, labels, registry=registry, multiprocess_mode=each.merge)  # type: ignore[arg-type]

    def attach(
        self, vllm_version: str, serves: Callable[[str], bool], adapters: Callable[[], Mapping[str, int]]
    ) -> None:
        """Set what is known once the engine runs: its version, whether a name is served, and adapters by state."""
        self._serves, self._adapters = serves, adapters
        self._gauges["kserve_vllm_build_info"].labels(self._version, vllm_version, platform.python_version()).set(1)

    def show_shortcuts(self, reasons: Mapping[str, str]) -> None:
        """Show which shortcuts are taken, and why the others are not. Once, when all is decided."""
        for name, reason in reasons.items():
            self._gauges["kserve_vllm_shortcut_in_force"].labels(name, reason).set(reason == "used")

    def show_start(self, phases: Mapping[str, float]) -> None:
        """Show how long the phases of the start took, in seconds."""
        for phase, seconds in phases.items():
            self._gauges["kserve_vllm_start_phase_seconds"].labels(phase).set(seconds)

    def show_redis(self, there: bool) -> None:
        """Show whether the Redis that replicas share answers."""
        self._gauges["kserve_vllm_redis_up"].set(1 if there else 0)

    def show_grpc_fallback(self, fallen: bool) -> None:
        """Show whether grpcio's server answers since our own failed its test."""
        self._gauges["kserve_vllm_grpc_fallback"].set(int(fallen))

    def watch(self, refresh: Callable[[Metrics], None]) -> None:
        """Call `refresh` before metrics are rendered, to set what is looked up."""
        self._watched.append(refresh)

    def set_waiting(self, waiting: Mapping[str, int]) -> None:
        """Show how many requests wait in front of the engine, by class."""
        for name, count in waiting.items():
            self._gauges["kserve_vllm_waiting_requests"].labels(name).set(count)

    def show_key_file_failures(self, count: int) -> None:
        """Show how often a changed key file could not be used."""
        self._gauges["kserve_vllm_key_file_failures"].set(count)

    def count_verdict(self, hook: str, where: str, verdict: str) -> None:
        """Count what a moderation hook did with a prompt or an answer."""
        self._counters["kserve_vllm_moderation_verdicts"].labels(hook, where, verdict).inc()

    def count_usage(self, result: str, count: int = 1) -> None:
        """Count usage records that were sent, dropped or failed."""
        self._counters["kserve_vllm_usage_records"].labels(result).inc(count)

    def begin_drain(self, timeout_s: float) -> None:
        """Show from now on how far the drain is."""
        self._drain = self._in_flight(), timeout_s

    def count(self, context: RequestContext, outcome: str, duration_s: float) -> None:
        """Count a request that is over. The trace id is the exemplar where the trace is recorded."""
        model, tenant = self.model_label(context.model), self._tenant(context.access.tenant)
        trace = context.trace
        exemplar = {"trace_id": trace.trace_id} if trace.sampled and trace.trace_id else None
        self._counters["kserve_vllm_requests"].labels(context.protocol, context.endpoint, model, tenant, outcome).inc(
            1, exemplar
        )
        if context.cache is not None:
            self._counters["kserve_vllm_response_cache_requests"].labels(context.cache).inc()
        if not context.engine.sequences:
            return
        used = model, "none" if context.adapter is None else model, tenant, context.protocol
        for name, tokens in (
            ("kserve_vllm_prompt_tokens", context.engine.prompt_tokens),
            ("kserve_vllm_cached_prompt_tokens", context.engine.cached_tokens),
            ("kserve_vllm_output_tokens", context.engine.output_tokens),
        ):
            self._counters[name].labels(*used).inc(tokens)
        for name, value in (
            ("kserve_vllm_time_to_first_token_seconds", context.ttft_s),
            ("kserve_vllm_inter_token_latency_seconds", context.engine.itl_s),
            ("kserve_vllm_queue_time_seconds", context.engine.queue_s),
            ("kserve_vllm_request_duration_seconds", duration_s),
        ):
            if value is not None:
                self._histograms[name].labels(model, tenant).observe(value, exemplar)

    def reject(self, protocol: str, reason: str) -> None:
        """Count a request that was turned away."""
        self._counters["kserve_vllm_rejections"].labels(protocol, reason).inc()

    def count_adapter(self, name: str, loaded: bool) -> None:
        """Count an attempt to load an adapter."""
        metric = "kserve_vllm_adapter_loads" if loaded else "kserve_vllm_adapter_failures"
        self._counters[metric].labels(self._model(name)).inc()

    def count_warmup(self, done: bool) -> None:
        """Count a prompt of the warm-up file."""
        self._counters["kserve_vllm_warmup_prompts"].labels("ok" if done else "failed").inc()

    def observe_lag(self, lag_s: float, held: bool) -> None:
        """Note how late the event loop was, and whether work of this process held it."""
        self._histograms["kserve_vllm_event_loop_lag_seconds"].observe(lag_s)
        if held:
            self._counters["kserve_vllm_event_loop_holds"].inc()

    def count_tls_reload(self, usable: bool) -> None:
        """Count a change of the TLS files."""
        self._counters["kserve_vllm_tls_reloads"].labels("ok" if usable else "failed").inc()

    def show_batches(self, running: int, unfinished: int, in_flight: int) -> None:
        """Show how many batches there are, and how many of their requests are being answered."""
        self._gauges["kserve_vllm_batches_running"].set(running)
        self._gauges["kserve_vllm_batches_unfinished"].set(unfinished)
        self._gauges["kserve_vllm_batch_lines_in_flight"].set(in_flight)

    def count_batch_line(self, outcome: str, count: int = 1) -> None:
        """Count requests of batches that are over."""
        self._counters["kserve_vllm_batch_lines"].labels(outcome).inc(count)

    def show_connections(self, count: int) -> None:
        """Show how many connections the HTTP port has."""
        self._gauges["kserve_vllm_http_connections"].set(count)

    def count_path(self, path: str) -> None:
        """Count a chat or completion request: `fast` or `vllm`."""
        self._counters["kserve_vllm_openai_requests"].labels(path).inc()

    def model_label(self, model: str | None) -> str:
        """A served name as it is, `other` for a name that is not served, `none` where no model was named."""
        if model is None:
            return "none"
        return self._model(model) if self._serves(model) else "other"

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """All metrics and their content type: OpenMetrics with exemplars where `accept` asks for it, else text."""
        self.refresh()
        registry = self._registry
        if os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
            registry = CollectorRegistry()
            multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
            if self._started_at is not None:
                # The collector knows none of the process's own metrics, and alerts count restarts by this one.
                text = "Start time of the process since unix epoch in seconds."
                registry.register(_Constant("process_start_time_seconds", text, self._started_at))
        # Not `choose_encoder`: it writes `vllm_` for `vllm:` where a scraper names no escaping, as Prometheus 2 does.
        if "application/openmetrics-text" in accept:
            body: bytes = openmetrics.generate_latest(  # type: ignore[no-untyped-call]
                registry, escaping=openmetrics.ALLOWUTF8, version="1.0.0"
            )
            return body, "application/openmetrics-text; version=1.0.0; charset=utf-8"
        return generate_latest(registry), _TEXT

    def refresh(self) -> None:
        """Set what is looked up when someone asks. Where several processes share a folder, the one that is asked reads
        what the others have set: they have to do so time and again."""
        for refresh in self._watched:
            refresh(self)
        count = self._in_flight()
        self._gauges["kserve_vllm_requests_in_flight"].set(count)
        self._gauges["kserve_vllm_lifecycle_state_seconds"].set(self._lifecycle.seconds)
        adapters = self._adapters()
        for state in ("loaded", "loading", "failed", "unloaded"):
            self._gauges["kserve_vllm_adapters"].labels(state).set(adapters.get(state, 0))
        progress = remaining = 0.0
        if self._drain is not None and self._lifecycle.state is State.DRAINING:
            initial, timeout_s = self._drain
            progress = 1 - min(1.0, count / initial) if initial else 1.0
            remaining = max(0.0, timeout_s - self._lifecycle.seconds)
        self._gauges["kserve_vllm_drain_progress_ratio"].set(progress)
        self._gauges["kserve_vllm_drain_remaining_seconds"].set(remaining)

    def _show_state(self, lifecycle: Lifecycle) -> None:
        for state in State:
            self._gauges["kserve_vllm_lifecycle_state"].labels(state.value).set(state is lifecycle.state)
