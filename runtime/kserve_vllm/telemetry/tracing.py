"""Traces: one span per request with OpenTelemetry's GenAI conventions, and the engine's phases beneath it.

Off unless a setting or a variable of OpenTelemetry's switches it on; off, it is not even imported here, and a
request only has the trace id of its caller's `traceparent` read, for the log. Sources: W3C Trace Context, level 2;
OpenTelemetry's semantic conventions for generative AI and HTTP and RPC spans; its variables as of its specification.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from kserve_vllm.config.settings import trace_exporters
from kserve_vllm.core.errors import ConfigError
from kserve_vllm.core.request_context import RequestContext

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import SpanContext, Tracer
    from opentelemetry.util.types import AttributeValue

log = logging.getLogger(__name__)

_TRACEPARENT = re.compile(r"^[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?$")
_SERVICE = "inference.GRPCInferenceService"
_OPERATIONS = {  # by endpoint; what is not named here generates text
    "/v1/chat/completions": "chat",
    "/v1/messages": "chat",
    "/v1/responses": "chat",
    "/v1/embeddings": "embeddings",
}


_MODEL = ("gen_ai.request.model", "gen_ai.response.model")


class Tracing:
    """Opens and ends spans. This class itself is the one for tracing that is switched off."""

    def open(self, request_context: RequestContext, headers: Mapping[str, str]) -> None:
        """Take the caller's trace context from `headers` (lower-case names) to the request context."""
        match = _TRACEPARENT.match(headers.get("traceparent", ""))
        if match is None or match[1] == "0" * 32 or match[2] == "0" * 16:
            return
        trace = request_context.trace
        trace.trace_id, trace.sampled = match[1], bool(int(match[3], 16) & 1)
        trace.headers = {k: headers[k] for k in ("traceparent", "tracestate") if k in headers}

    def response_header(self, request_context: RequestContext) -> str | None:
        """Value of the `traceresponse` header for the caller, or None."""
        return None

    def close(self, request_context: RequestContext, outcome: str) -> None:
        """End the request's span."""

    def shutdown(self) -> None:
        """Send what is not sent yet."""


class OTLPTracing(Tracing):
    """Sends spans to an OTLP receiver, in batches, from a thread of its own.

    Args:
        endpoint: URL of the receiver, over gRPC or, with `protocol` `http/protobuf`, its traces path; or None.
        ratio: share of the traces to record, 0 to 1, for requests whose caller has not decided; None: as
            `OTEL_TRACES_SAMPLER` and `OTEL_TRACES_SAMPLER_ARG` say, which record all where they are not set.
        version: of this package, for the resource.
        protocol: `grpc` or `http/protobuf`.
        console: whether spans are (also) written to stdout.

    Raises:
        ConfigError: OpenTelemetry is not installed, or `protocol` is unknown.
    """

    def __init__(
        self, endpoint: str | None, ratio: float | None, version: str, protocol: str = "grpc", console: bool = False
    ) -> None:
        try:
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter
            from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
        except ImportError as error:
            raise ConfigError(f"--otlp-endpoint needs opentelemetry-sdk and its OTLP exporter: {error}") from error
        # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES win over these.
        resource = Resource.create().merge(Resource({"service.version": version}))
        if str(resource.attributes.get("service.name", "")).startswith("unknown_service"):
            resource = resource.merge(Resource({"service.name": "kserve-vllm"}))
        self._provider: TracerProvider = TracerProvider(
            # OpenTelemetry reads its variables where it is given none.
            sampler=None if ratio is None else ParentBased(TraceIdRatioBased(ratio)),
            resource=resource,
            shutdown_on_exit=False,
        )
        if endpoint is not None:
            self._provider.add_span_processor(BatchSpanProcessor(_exporter(endpoint, protocol)))
        if console:
            self._provider.add_span_processor(BatchSpanProcessor(ConsoleSpanExporter(out=sys.stdout)))
        self._tracer: Tracer = self._provider.get_tracer("kserve_vllm", version)

    def open(self, request_context: RequestContext, headers: Mapping[str, str]) -> None:
        """Begin the request's span, below the caller's."""
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        context = TraceContextTextMapPropagator().extract(headers)
        span = self._tracer.start_span(
            request_context.endpoint, context, SpanKind.SERVER, start_time=_nanoseconds(request_context.started_at)
        )
        found = span.get_span_context()
        trace = request_context.trace
        trace.span, trace.sampled = span, found.trace_flags.sampled
        trace.trace_id = f"{found.trace_id:032x}"
        trace.headers = {"traceparent": _header(found)}
        if found.trace_state:
            trace.headers = {**trace.headers, "tracestate": found.trace_state.to_header()}

    def response_header(self, request_context: RequestContext) -> str | None:
        """Trace id, our span's id and the sampling decision."""
        span = request_context.trace.span
        return _header(span.get_span_context()) if span is not None else None

    def close(self, request_context: RequestContext, outcome: str) -> None:
        """Fill in what is known by now, add the engine's phases, and end the span."""
        span = request_context.trace.span
        if span is None:
            return
        if span.is_recording():
            from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context

            operation = (
                _OPERATIONS.get(request_context.endpoint, "text_completion")
                if request_context.engine.sequences
                else None
            )
            if operation is not None:
                span.update_name(f"{operation} {request_context.model}")
            span.set_attributes(_attributes(request_context, operation, outcome))
            if outcome in ("server_error", "unavailable"):
                span.set_status(StatusCode.ERROR)
            context = set_span_in_context(span)
            for name, start, end in request_context.engine.phases:
                phase = self._tracer.start_span(
                    f"vllm.{name}", context, SpanKind.INTERNAL, start_time=_nanoseconds(start)
                )
                phase.end(_nanoseconds(max(start, end)))
        span.end()

    def shutdown(self) -> None:
        """Send what is not sent yet, for up to three seconds."""
        self._provider.force_flush(3000)
        self._provider.shutdown()


def tracing_of(endpoint: str | None, ratio: float | None, version: str, environ: Mapping[str, str]) -> Tracing:
    """Tracing as the settings and OpenTelemetry's variables want it.

    `OTEL_SDK_DISABLED` switches it off whatever else is set. `OTEL_TRACES_EXPORTER` may name `console` beside or
    instead of `otlp`; a value that is not known is passed over with a warning, as its specification has it.

    Args:
        endpoint: of the receiver, or None.
        ratio: as `OTLPTracing`.
        version: of this package.
        environ: the variables.

    Raises:
        ConfigError: as `OTLPTracing`.
    """
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        if endpoint is not None:
            log.warning("OTEL_SDK_DISABLED is set: no traces are sent to %s", endpoint)
        return Tracing()
    exporters = trace_exporters(environ)
    for each in exporters:
        if each not in ("otlp", "console", "none"):
            log.warning("OTEL_TRACES_EXPORTER: %r is none of otlp, console, none, and is passed over", each)
    console = "console" in exporters
    if endpoint is None and not console:
        return Tracing()
    names = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
    protocol = next((environ[name].strip() for name in names if environ.get(name, "").strip()), "grpc")
    return OTLPTracing(endpoint, ratio, version, protocol, console)


def _attributes(request_context: RequestContext, operation: str | None, outcome: str) -> dict[str, AttributeValue]:
    attributes: dict[str, AttributeValue] = {
        "kserve_vllm.request_id": request_context.request_id,
        "kserve_vllm.protocol": request_context.protocol,
        "kserve_vllm.tenant": request_context.access.tenant,
        "kserve_vllm.outcome": outcome,
    }
    if request_context.protocol == "grpc":
        attributes |= {"rpc.system": "grpc", "rpc.service": _SERVICE, "rpc.method": request_context.endpoint}
        attributes["rpc.response.status_code"] = str(request_context.status)
    else:
        attributes["http.route"] = request_context.endpoint
        if isinstance(request_context.status, int):
            attributes["http.response.status_code"] = request_context.status
    if outcome != "ok":
        attributes["error.type"] = (
            type(request_context.error).__name__ if request_context.error is not None else str(request_context.status)
        )
    if operation is None:
        return attributes
    engine = request_context.engine
    attributes |= {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "vllm",
        **({} if (model := request_context.model) is None else dict.fromkeys(_MODEL, model)),
        "gen_ai.usage.input_tokens": engine.prompt_tokens,
        "gen_ai.usage.output_tokens": engine.output_tokens,
        "gen_ai.usage.cache_read.input_tokens": engine.cached_tokens,
        "gen_ai.response.finish_reasons": engine.finish_reasons,
        "kserve_vllm.preemptions": engine.preemptions,
    }
    if request_context.ttft_s is not None:
        attributes["gen_ai.response.time_to_first_chunk"] = request_context.ttft_s
    for name, key in (("max_tokens", "max_tokens"), ("temperature", "temperature"), ("top_p", "top_p")):
        if name in engine.sampling:
            attributes[f"gen_ai.request.{key}"] = engine.sampling[name]
    if engine.sampling.get("n", 1) != 1:
        attributes["gen_ai.request.choice.count"] = engine.sampling["n"]
    return attributes


def _header(context: SpanContext) -> str:
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)


def _exporter(endpoint: str, protocol: str) -> SpanExporter:
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        return OTLPSpanExporter(endpoint=endpoint, insecure=not endpoint.startswith("https://"))
    if protocol == "http/protobuf":
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HTTPExporter

        # That of traces alone is used as it is; to the other one the signal's path is added (OTLP's specification).
        whole = "/v1/traces" in endpoint or endpoint == os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "").strip()
        path = endpoint if whole else endpoint.rstrip("/") + "/v1/traces"
        return HTTPExporter(endpoint=path)
    raise ConfigError(f"OTEL_EXPORTER_OTLP_PROTOCOL must be grpc or http/protobuf, not {protocol!r}")
