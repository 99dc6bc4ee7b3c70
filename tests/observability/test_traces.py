"""Spans as a real OTLP receiver gets them, and the W3C context in and out."""

from __future__ import annotations

import contextlib
import itertools
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from kserve_vllm.core.request_context import EngineFigures, RequestContext
from kserve_vllm.protocols.oip.grpc_servicer import Messages
from kserve_vllm.telemetry.tracing import OTLPTracing, Tracing, tracing_of
from tests.clients import until
from tests.observability.conftest import KEY
from tests.observability.load import LONG, Client
from tests.observability.otlp import Receiver, values
from tests.observability.test_logs import request_lines
from tests.support import Server

CALLER = "00f067aa0ba902b7"


def parent(trace: str, flags: str = "01") -> str:
    """A caller's `traceparent`."""
    return f"00-{trace}-{CALLER}-{flags}"


def of_kind(spans: list[Span], kind: int) -> list[Span]:
    """Spans of a kind."""
    return [span for span in spans if span.kind == kind]


def test_a_chat_leaves_a_server_span_with_genai_attributes_and_the_engines_phases_beneath_it(
    observed: Server, receiver: Receiver
) -> None:
    trace = "10000000000000000000000000000001"
    response = Client(observed, KEY).chat(traceparent=parent(trace), tracestate="vendor=1", x_request_id="trace-1")
    spans = receiver.trace(trace, 4)
    (server,) = of_kind(spans, Span.SPAN_KIND_SERVER)
    assert server.parent_span_id.hex() == CALLER
    assert server.trace_state == "vendor=1"
    assert server.name == "chat demo"
    usage = response.json()["usage"]
    expected = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "vllm",
        "gen_ai.request.model": "demo",
        "gen_ai.usage.input_tokens": usage["prompt_tokens"],
        "gen_ai.usage.output_tokens": usage["completion_tokens"],
        "gen_ai.response.finish_reasons": ["length"],
        "gen_ai.request.max_tokens": LONG["max_tokens"],
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
        "kserve_vllm.request_id": "trace-1",
        "kserve_vllm.outcome": "ok",
    }
    found = values(server.attributes)
    assert {name: found.get(name) for name in expected} == expected
    assert found["gen_ai.response.time_to_first_chunk"] > 0
    phases = sorted(of_kind(spans, Span.SPAN_KIND_INTERNAL), key=lambda span: span.start_time_unix_nano)
    assert [span.name for span in phases] == ["vllm.queue", "vllm.prefill", "vllm.decode"]
    slack = 20_000_000  # the clocks of two processes, in nanoseconds
    for span in phases:
        assert span.parent_span_id == server.span_id
        assert server.start_time_unix_nano - slack <= span.start_time_unix_nano <= span.end_time_unix_nano
        assert span.end_time_unix_nano <= server.end_time_unix_nano + slack
    for before, after in itertools.pairwise(phases):
        assert abs(before.end_time_unix_nano - after.start_time_unix_nano) < 1_000_000
    # Out: the caller learns the ids.
    assert response.headers["traceresponse"] == f"00-{trace}-{server.span_id.hex()}-01"


def test_the_log_line_has_the_spans_trace_id_where_the_caller_sent_none(observed: Server, receiver: Receiver) -> None:
    header = Client(observed, KEY).predict(x_request_id="trace-2").headers["traceresponse"]
    trace = header.split("-")[1]
    until(lambda: bool(request_lines(observed, "trace-2")), 3)
    (line,) = request_lines(observed, "trace-2")
    assert line["trace_id"] == trace
    (server,) = of_kind(receiver.trace(trace, 4), Span.SPAN_KIND_SERVER)
    assert server.parent_span_id == b""
    assert server.name == "text_completion demo"


def test_grpc_takes_the_context_from_metadata_and_gives_its_own_back(observed: Server, receiver: Receiver) -> None:
    trace = "10000000000000000000000000000003"
    messages = Messages()
    request = messages.ModelInferRequest(model_name="demo")
    tensor = request.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    tensor.contents.bytes_contents.append(b"17 + 25 =")
    with grpc.insecure_channel(observed.grpc_address) as channel:
        call = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=messages.ModelInferResponse.FromString,
        )
        metadata = (("traceparent", parent(trace)), ("authorization", f"Bearer {KEY}"))
        _, done = call.with_call(request, metadata=metadata, timeout=60)
        initial: dict[str, Any] = dict(done.initial_metadata())
    (server,) = of_kind(receiver.trace(trace, 4), Span.SPAN_KIND_SERVER)
    assert server.parent_span_id.hex() == CALLER
    found = values(server.attributes)
    assert (found["rpc.system"], found["rpc.method"]) == ("grpc", "ModelInfer")
    assert found["rpc.response.status_code"] == "OK"
    assert initial["traceresponse"] == f"00-{trace}-{server.span_id.hex()}-01"


def test_each_request_of_a_grpc_stream_has_a_span(observed: Server, receiver: Receiver) -> None:
    trace = "10000000000000000000000000000004"
    Client(observed, KEY).grpc_stream(traceparent=parent(trace))
    spans = receiver.trace(trace, 4)
    (server,) = of_kind(spans, Span.SPAN_KIND_SERVER)
    assert values(server.attributes)["rpc.method"] == "ModelStreamInfer"
    assert values(server.attributes)["gen_ai.usage.output_tokens"] == LONG["max_tokens"]


def test_an_error_is_on_the_span(observed: Server, receiver: Receiver) -> None:
    trace = "10000000000000000000000000000005"
    assert Client(observed, KEY).infer("no-such-model", traceparent=parent(trace)).status_code == 404
    (server,) = receiver.trace(trace, 1)
    found = values(server.attributes)
    assert (found["kserve_vllm.outcome"], found["http.response.status_code"]) == ("client_error", 404)
    assert found["error.type"]
    assert server.status.code == Status.STATUS_CODE_UNSET, "a client's error is not an error of a server span"


def test_a_caller_that_does_not_sample_is_followed(observed: Server, receiver: Receiver) -> None:
    trace = "10000000000000000000000000000006"
    response = Client(observed, KEY).chat(traceparent=parent(trace, "00"))
    assert response.headers["traceresponse"].endswith("-00")
    sampled = "10000000000000000000000000000007"
    Client(observed, KEY).chat(traceparent=parent(sampled))
    assert len(receiver.trace(sampled, 4)) == 4
    assert receiver.trace(trace, 1, timeout_s=0.5) == []


def test_the_resource_names_the_service_and_takes_opentelemetrys_variables(
    observed: Server, receiver: Receiver
) -> None:
    trace = "10000000000000000000000000000008"
    Client(observed, KEY).chat(traceparent=parent(trace))
    receiver.trace(trace, 4)
    (resource, *_) = receiver.resources
    assert resource["service.name"] == "kserve-vllm"
    assert resource["service.version"]
    assert resource["team"] == "blue"


def test_vllms_own_span_lies_beneath_ours_where_its_flag_switches_it_on(talkative: Server, receiver: Receiver) -> None:
    trace = "10000000000000000000000000000009"
    assert Client(talkative).infer(traceparent=parent(trace)).status_code == 200
    # The request has two prompts: ours, three phases for each, and vLLM's for each.
    spans = receiver.trace(trace, 1 + 2 * 3 + 2)
    (ours,) = [span for span in spans if span.name == "text_completion demo"]
    theirs = [span for span in spans if span.name == "llm_request"]
    assert len(theirs) == 2
    for span in theirs:
        assert span.parent_span_id == ours.span_id


# Without an engine


def test_the_ratio_is_kept() -> None:
    receiver = Receiver()
    try:
        for ratio, least, most in ((0.0, 0, 0), (0.25, 20, 100), (1.0, 200, 200)):
            tracing = OTLPTracing(receiver.endpoint, ratio, "1")
            contexts = [RequestContext(str(number), "v2", "/x") for number in range(200)]
            for context in contexts:
                tracing.open(context, {})
                tracing.close(context, "ok")
            tracing.shutdown()
            got = sum(bool(receiver.trace(context.trace.trace_id or "", 1, timeout_s=0)) for context in contexts)
            assert least <= got <= most, ratio
            assert got == sum(context.trace.sampled for context in contexts)
    finally:
        receiver.stop()


def test_a_receiver_over_http_gets_them_too() -> None:
    paths: list[str] = []
    spans: list[Span] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"])))
            paths.append(self.path)
            spans.extend(s for r in request.resource_spans for scope in r.scope_spans for s in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
        tracing = OTLPTracing(f"http://127.0.0.1:{http.server_address[1]}", 1.0, "1", "http/protobuf")
        context = RequestContext("1", "v2", "/x", model="demo", engine=EngineFigures(sequences=1))
        tracing.open(context, {})
        tracing.close(context, "ok")
        tracing.shutdown()
        http.shutdown()
    assert paths == ["/v1/traces"]
    assert [span.name for span in spans] == ["text_completion demo"]


def test_a_receiver_that_is_gone_costs_a_request_nothing() -> None:
    tracing = OTLPTracing("http://127.0.0.1:1", 1.0, "1")
    context = RequestContext("1", "v2", "/x")
    tracing.open(context, {})
    tracing.close(context, "ok")
    with contextlib.suppress(Exception):
        tracing.shutdown()
    assert context.trace.trace_id


def test_switched_off_it_imports_nothing_and_still_reads_the_callers_trace_id() -> None:
    code = (
        "import sys, json\n"
        "from kserve_vllm.telemetry.tracing import Tracing\n"
        "from kserve_vllm.core.request_context import RequestContext\n"
        "t = RequestContext('1', 'v2', '/x'); tracing = Tracing()\n"
        "tracing.open(t, {'traceparent': '00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01'})\n"
        "tracing.close(t, 'ok')\n"
        "print(json.dumps([t.trace.trace_id, t.trace.span, [m for m in sys.modules if m[:13] == 'opentelemetry']]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == ["4bf92f3577b34da6a3ce929d0e0e4736", None, []]


@pytest.mark.parametrize(
    "header",
    [
        "",
        "x",
        "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
        "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
        "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
    ],
)
def test_a_broken_traceparent_is_passed_over(header: str) -> None:
    context = RequestContext("1", "v2", "/x")
    Tracing().open(context, {"traceparent": header})
    assert context.trace.trace_id is None


def sampled(tracing: Tracing, count: int = 200) -> int:
    """How many of that many requests without a caller's decision are recorded."""
    found = 0
    for number in range(count):
        context = RequestContext(str(number), "openai", "/v1/completions")
        tracing.open(context, {})
        found += context.trace.sampled
        tracing.close(context, "ok")
    tracing.shutdown()
    return found


def test_what_kserve_makes_of_spec_tracing_decides_where_no_flag_does(
    monkeypatch: pytest.MonkeyPatch, receiver: Receiver
) -> None:
    made = {
        "OTEL_SERVICE_NAME": "my-model",
        "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint,
        "OTEL_TRACES_EXPORTER": "otlp",
        "OTEL_TRACES_SAMPLER": "parentbased_traceidratio",
        "OTEL_TRACES_SAMPLER_ARG": "0.25",
        "OTEL_RESOURCE_ATTRIBUTES": "k8s.pod.name=a,k8s.node.name=b",
    }
    for name, value in made.items():
        monkeypatch.setenv(name, value)
    assert 20 <= sampled(tracing_of(receiver.endpoint, None, "0", made)) <= 90
    assert sampled(tracing_of(receiver.endpoint, 0.0, "0", made)) == 0
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    assert sampled(tracing_of(receiver.endpoint, None, "0", made)) == 0
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_on")
    before = len(receiver.resources)
    assert sampled(tracing_of(receiver.endpoint, None, "0", made), 1) == 1
    (resource,) = receiver.resources[before:]
    assert (resource["service.name"], resource["k8s.pod.name"]) == ("my-model", "a")


def test_opentelemetrys_switch_holds_over_an_endpoint(caplog: pytest.LogCaptureFixture) -> None:
    assert type(tracing_of("http://a:1", None, "0", {"OTEL_SDK_DISABLED": "True"})) is Tracing
    assert "no traces are sent to http://a:1" in caplog.text
    assert type(tracing_of(None, None, "0", {"OTEL_TRACES_EXPORTER": "none"})) is Tracing


def test_spans_are_written_to_the_console_where_the_variable_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert sampled(tracing_of(None, 1.0, "0", {"OTEL_TRACES_EXPORTER": "console"}), 1) == 1
    assert '"name": "/v1/completions"' in capsys.readouterr().out
