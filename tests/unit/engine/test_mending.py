"""Bodies as clients send them become bodies that vLLM's routes take, without a server."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import logging
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from pydantic import BaseModel

from kserve_vllm.core.errors import InvalidRequest, NotFound, Unavailable
from kserve_vllm.core.request_context import RequestContext, current
from kserve_vllm.engine.faults import ClientFaults, is_client_fault
from kserve_vllm.engine.hooks import anthropic_repair, responses_repair, stored_responses
from kserve_vllm.engine.hooks.anthropic_repair import mend_messages
from kserve_vllm.engine.hooks.request_repair import Mender, Route, mender_of, with_null_usage

CHAT = Route(
    frozenset(
        {"model", "messages", "n", "top_p", "max_tokens", "max_completion_tokens", "structured_outputs", "tools"}
    ),
    frozenset({"n"}),
)
COMPLETION = Route(
    frozenset({"model", "prompt", "n", "top_p", "max_tokens", "suffix", "structured_outputs"}), frozenset()
)
PLAIN = Route(frozenset({"model", "input"}), frozenset())
RESPONSE = Route(frozenset({"model", "input", "previous_response_id"}), frozenset())
MESSAGE = Route(frozenset({"model", "messages", "stop_sequences"}), frozenset())
ROUTES = {"/chat": CHAT, "/completion": COMPLETION, "/plain": PLAIN, "/response": RESPONSE, "/message": MESSAGE}


def mender(knows_developer: bool = False) -> Mender:
    return Mender(ROUTES, "xgrammar", knows_developer)


@pytest.mark.parametrize("named", [{}, {"model": None}, {"model": ""}])
def test_a_request_names_its_model_where_that_is_asked_for(named: dict[str, Any]) -> None:
    path = "/v1/chat/completions"
    body = {"messages": [], **named}
    Mender({path: CHAT}, "xgrammar", False).mend(path, dict(body))
    strict = Mender({path: CHAT, "/plain": PLAIN}, "xgrammar", False, strict=True)
    with pytest.raises(InvalidRequest, match="model is missing") as refused:
        strict.mend(path, dict(body))
    assert refused.value.field == "model"
    strict.mend(path, {**body, "model": "demo"})
    strict.mend("/plain", dict(body))


@pytest.mark.parametrize("name", ["kv_transfer_params", "ec_transfer_params"])
def test_where_a_cache_is_may_be_said_by_a_router_alone(name: str) -> None:
    told = {"model": "demo", "messages": [], name: {"do_remote_prefill": True}}
    router = Mender(ROUTES, "auto", False, transfers=True)
    assert not router.mend("/chat", dict(told))
    with pytest.raises(InvalidRequest, match=f"{name} must be an object"):
        router.mend("/chat", {**told, name: "x"})
    for path in ("/chat", "/completion", "/response", "/message"):
        with pytest.raises(InvalidRequest, match="--allow-transfer-params") as refused:
            mender().mend(path, dict(told))
        assert refused.value.field == name
        for nothing in (None, {}):
            mender().mend(path, {**told, name: nothing})


HOSTED = {"type": "web_search", "search_context_size": "low"}
OWN = {"type": "function", "name": "f", "parameters": {}}


@pytest.mark.parametrize(
    ("tools", "left_out"),
    [
        ([OWN, HOSTED], "web_search"),
        ([HOSTED, {"type": "mcp", "server_label": "a"}, HOSTED], "mcp, web_search"),
        ([OWN, {"type": "custom", "name": "c"}, {"type": "namespace", "name": "n", "tools": []}], None),
        ([{"type": "no\r\nheader: 1"}, {"type": 1}, {"type": None}, {"type": []}, {}, 3, {"type": "x" * 65}], None),
        ("web_search", None),
        (None, None),
    ],
)
def test_tools_that_the_server_would_run_are_left_out_and_the_answer_says_so(tools: Any, left_out: str | None) -> None:
    route = {"/v1/responses": Route(frozenset({"model", "input", "tools", "tool_choice"}), frozenset())}
    body = {"model": "demo", "input": "a", "tools": tools}

    def headers(mender: Mender) -> list[tuple[str, str]]:
        context = RequestContext("r", "openai", "/v1/responses")
        token = current.set(context)
        try:
            for _ in range(2):  # a body that is mended is looked at twice
                mender.mend("/v1/responses", copy.deepcopy(body))
        finally:
            current.reset(token)
        return context.answer_headers

    assert headers(Mender(route, "auto", False)) == ([("x-ignored-tools", left_out)] if left_out else [])
    assert headers(Mender(route, "auto", False, strict=True, has_tools=True)) == []
    strict = Mender(route, "auto", False, strict=True)
    if left_out is None:
        assert headers(strict) == []
        return
    with pytest.raises(InvalidRequest, match=left_out) as refused:
        strict.mend("/v1/responses", body)
    assert refused.value.field == "tools"
    for choice, field in (({"type": "web_search"}, "tool_choice"), ("auto", None), ({"type": "function"}, None)):
        asked = {**body, "tool_choice": choice}
        if field is None:
            Mender(route, "auto", False).mend("/v1/responses", asked)
        else:
            with pytest.raises(InvalidRequest, match="run by the server") as refused:
                Mender(route, "auto", False).mend("/v1/responses", asked)
            assert refused.value.field == field


def test_the_log_says_once_which_tools_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    mender = Mender({"/v1/responses": Route(frozenset({"tools"}), frozenset())}, "auto", False)
    for number in range(200):
        mender.mend("/v1/responses", {"tools": [HOSTED, {"type": f"made_up_{number}"}]})
    told = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert "web_search" in told[0]
    assert len(told) < 40
    context = RequestContext("r", "openai", "/v1/responses")
    token = current.set(context)
    try:
        mender.mend("/v1/responses", {"tools": [{"type": f"made_up_{number}"} for number in range(200)]})
    finally:
        current.reset(token)
    assert len(context.answer_headers[0][1]) < 1024


MENDED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("/chat", {"n": None, "tools": None}, {"tools": None}),
    ("/chat", {"top_p": 0}, {"top_p": 1e-6}),
    ("/chat", {"top_p": 0.0}, {"top_p": 1e-6}),
    ("/completion", {"max_completion_tokens": 3}, {"max_tokens": 3}),
    ("/completion", {"max_completion_tokens": 3, "max_tokens": None}, {"max_tokens": 3}),
    ("/completion", {"max_completion_tokens": 3, "max_tokens": 4}, {"max_tokens": 4}),
    ("/completion", {"suffix": "", "best_of": 2, "n": 2}, {"n": 2}),
    ("/completion", {"guided_regex": "a"}, {"structured_outputs": {"regex": "a"}}),
    (
        "/completion",
        {"guided_choice": ["a"], "structured_outputs": {"choice": None}},
        {"structured_outputs": {"choice": ["a"]}},
    ),
    (
        "/completion",
        {"guided_json": {"a": 1}, "guided_decoding_backend": "xgrammar:no-fallback"},
        {"structured_outputs": {"json": {"a": 1}}},
    ),
    ("/chat", {"functions": [], "function_call": "auto", "audio": None, "modalities": ["text"]}, {}),
    (
        "/chat",
        {"messages": [{"role": "developer", "content": "a", "name": None}]},
        {"messages": [{"role": "system", "content": "a"}]},
    ),
    ("/plain", {"input": [{"role": "developer", "content": None}]}, {"input": [{"role": "system", "content": None}]}),
    ("/response", {"input": "a", "conversation": None}, {"input": "a"}),
    ("/message", {"mcp_servers": [], "container": None}, {}),
]


@pytest.mark.parametrize(("path", "body", "mended"), MENDED)
def test_a_body_is_mended_once(path: str, body: dict[str, Any], mended: dict[str, Any]) -> None:
    tree = copy.deepcopy(body)
    assert mender().mend(path, tree)
    assert tree == mended
    assert not mender().mend(path, tree)
    assert tree == mended


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/chat", {"messages": [{"role": "user", "content": None}], "top_p": 0.5, "n": 1, "unknown": 1}),
        ("/chat", {"top_p": False}),
        ("/chat", {"messages": "text", "max_completion_tokens": 3}),
        ("/elsewhere", {"guided_json": {}, "top_p": 0}),
        ("/plain", {"input": "text", "top_p": 0}),
        ("/chat", {"conversation": "mine", "container": "red", "mcp_servers": 1}),
    ],
)
def test_other_bodies_are_left_alone(path: str, body: dict[str, Any]) -> None:
    tree = copy.deepcopy(body)
    assert not mender().mend(path, tree)
    assert tree == body


def test_a_template_that_knows_developers_gets_them() -> None:
    tree = {"messages": [{"role": "developer", "content": "a"}]}
    assert not mender(knows_developer=True).mend("/chat", tree)
    assert tree["messages"][0]["role"] == "developer"


def test_a_server_that_chooses_the_backend_takes_those_it_has() -> None:
    chooses = Mender(ROUTES, "auto", knows_developer=False)
    for name in ("auto", "xgrammar", "guidance:disable-any-whitespace"):
        assert chooses.mend("/completion", {"guided_decoding_backend": name})
    with pytest.raises(InvalidRequest):
        chooses.mend("/completion", {"guided_decoding_backend": "outlines"})


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/completion", {"best_of": 3}, "best_of"),
        ("/completion", {"guided_json": {}, "structured_outputs": {"json": {}}}, "guided_json"),
        ("/completion", {"guided_json": {}, "structured_outputs": 3}, "structured_outputs"),
        ("/completion", {"guided_decoding_backend": "outlines"}, "guided_decoding_backend"),
        ("/plain", {"guided_regex": "a"}, "guided_regex"),
        ("/chat", {"functions": [1]}, "functions"),
        ("/chat", {"modalities": ["audio"]}, "modalities"),
        ("/chat", {"web_search_options": {"a": 1}}, "web_search_options"),
        ("/response", {"conversation": "conv_1"}, "conversation"),
        ("/response", {"conversation": {"id": "conv_1"}}, "conversation"),
        ("/message", {"mcp_servers": [{"type": "url", "url": "https://x", "name": "x"}]}, "mcp_servers"),
        ("/message", {"container": "c_1"}, "container"),
    ],
)
def test_what_is_not_done_is_refused(path: str, body: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        mender().mend(path, body)
    assert refused.value.field == field
    assert field in refused.value.message


class One(BaseModel):
    prompt: str
    n: int = 1
    heat: float | None = None


class Other(BaseModel):
    messages: list[str]
    whole: bool = False
    anything: Any = None


def test_what_a_route_takes_is_read_from_its_model() -> None:
    app = FastAPI()

    @app.post("/both")
    async def both(body: One | Other) -> None: ...

    @app.get("/none")
    async def none() -> None: ...

    found = mender_of(app, "auto", None)
    assert found.covers("/both")
    assert not found.covers("/none")
    tree = {"n": None, "heat": None, "whole": None, "anything": None, "prompt": None}
    assert found.mend("/both", tree)
    assert tree == {"heat": None, "anything": None, "prompt": None}


@pytest.mark.parametrize(
    ("frame", "mended"),
    [
        (b'data: {"choices":[{"text":"\\"usage\\":"}]}', b'data: {"choices":[{"text":"\\"usage\\":"}],"usage":null}'),
        (b'data: {"choices":[],"usage":{"a":1}}', b'data: {"choices":[],"usage":{"a":1}}'),
        (b"data: [DONE]", b"data: [DONE]"),
        (b'data: {"error":{"message":"a"}}', b'data: {"error":{"message":"a"}}'),
        (b"", b""),
    ],
)
def test_chunks_without_usage_get_null(frame: bytes, mended: bytes) -> None:
    assert with_null_usage(frame) == mended
    assert with_null_usage(frame + b"\n\n") == mended + b"\n\n"


class VLLMError(Exception):
    """Named as vLLM's."""


class VLLMClientError(VLLMError):
    """Named as vLLM's."""


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (VLLMClientError("a"), True),
        (VLLMError("a"), False),
        (InvalidRequest("a"), True),
        (NotFound("a"), True),
        (Unavailable("a"), False),
        (ValueError("a"), True),
        (RuntimeError("a"), False),
        (None, False),
    ],
)
def test_whose_fault_an_exception_is(error: BaseException | None, fault: bool) -> None:
    assert is_client_fault(error, taken_up=False) is fault


def test_a_clients_fault_is_written_at_level_info() -> None:
    def filtered(name: str, text: str, error: BaseException | None, level: int = logging.ERROR) -> logging.LogRecord:
        exc_info = (type(error), error, None) if error is not None else None
        record = logging.LogRecord(name, level, "", 1, text, (), exc_info)
        assert ClientFaults().filter(record)
        return record

    faults = filtered("vllm.entrypoints.anthropic.api_router", "Error in create_messages: a", VLLMClientError("a"))
    assert (faults.levelname, faults.exc_info) == ("INFO", None)
    assert "Error in create_messages" in faults.getMessage()
    for spoken in (
        filtered("vllm.entrypoints.openai.serving", "Error with model nobody", None),
        filtered(
            "vllm.entrypoints.openai.chat_completion.serving",
            "Error in chat_completion_full_generator - cannot determine if tools should be extracted.",
            None,
        ),
        # In the engine's process, which knows no request.
        filtered("vllm.v1.structured_output", "Failed to compile grammar for request %s", RuntimeError("a")),
    ):
        assert (spoken.levelno, spoken.exc_info) == (logging.INFO, None)
    parser = "vllm.tool_parsers.hermes_tool_parser"
    failed = "Error in extracting tool call from response."
    token = current.set(RequestContext("r", "openai", "/v1/chat/completions"))
    try:
        # A tool call that `max_tokens` has cut off, or that is none.
        for error in (KeyError("a"), AttributeError("a"), SyntaxError("a"), TimeoutError("a"), None):
            assert filtered(parser, failed, error).levelno == logging.INFO
        assert filtered("vllm.reasoning.abs", "Error", None).levelno == logging.INFO
        for error in (ImportError("a"), NameError("a"), NotImplementedError("a"), MemoryError("a")):
            assert filtered(parser, failed, error).levelno == logging.ERROR
    finally:
        current.reset(token)
    # Nobody has asked for anything: the parser itself does not work.
    assert filtered(parser, "no such token", None).levelno == logging.ERROR
    assert filtered(parser, failed, KeyError("a")).levelno == logging.ERROR
    assert filtered("vllm.v1.structured_output", "Failed to compile grammar for request %s", ImportError("a")).exc_info
    for record in (
        filtered("vllm.entrypoints.anthropic.api_router", "Error", RuntimeError("a")),
        filtered("kserve_vllm.app.process", "Error", VLLMClientError("a")),
        filtered("vllm.v1.engine.core", "EngineCore encountered a fatal error.", None),
    ):
        assert record.levelno == logging.ERROR


def test_an_error_within_anthropics_stream_is_an_event_of_its_own() -> None:
    async def chunks() -> AsyncGenerator[str, None]:
        yield 'data: {"id": "a"}\n\n'
        yield 'data: {"error": {"message": "no text", "type": "InternalServerError", "param": null, "code": null}}\n\n'
        yield "data: [DONE]\n\n"

    async def converted(source: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
        async for chunk in source:
            yield chunk.upper()

    handler = SimpleNamespace(messages_full_converter=None, message_stream_converter=converted)
    app = SimpleNamespace(state=SimpleNamespace(anthropic_serving_messages=handler))
    mend_messages(app)  # type: ignore[arg-type]

    async def read() -> list[str]:
        return [event async for event in handler.message_stream_converter(chunks())]  # type: ignore[misc]

    first, last = asyncio.run(read())
    assert first == 'DATA: {"ID": "A"}\n\n'
    assert last.startswith("event: error\ndata: ")
    error = json.loads(last.partition("data: ")[2])
    assert error == {"type": "error", "error": {"type": "api_error", "message": "no text"}}


@pytest.mark.parametrize("kind", ["whole", "begun"])
def test_an_answer_of_anthropics_gets_what_is_required_of_it(kind: str) -> None:
    message = {"id": "a", "content": [{"type": "text", "text": "a"}], "usage": {"input_tokens": 1, "output_tokens": 2}}
    if kind == "whole":
        made = anthropic_repair.complete_message(copy.deepcopy(message))
    else:
        event = "event: message_start\ndata: " + json.dumps({"type": "message_start", "message": message}) + "\n\n"
        made = json.loads(anthropic_repair.complete_start(event).partition("data: ")[2])["message"]
    assert made["usage"].items() >= {"input_tokens": 1, "cache_read_input_tokens": None, "service_tier": None}.items()
    assert made["content"] == [{"type": "text", "text": "a", "citations": None}]
    assert made.items() >= {"id": "a", "stop_details": None, "stop_sequence": None, "container": None}.items()


def test_a_call_of_anthropics_names_its_caller_whole_and_begun_in_a_stream() -> None:
    call = {"type": "tool_use", "id": "a", "name": "f", "input": {}}
    made = anthropic_repair.complete_message({"content": [copy.deepcopy(call)]})
    assert made["content"] == [{**call, "caller": {"type": "direct"}}]

    async def started(block: dict[str, object]) -> str:
        async def events(source: object) -> AsyncGenerator[str, None]:
            yield "event: message_stop\ndata: {}\n\n"
            tree = {"type": "content_block_start", "index": 1, "content_block": block}
            yield f"event: content_block_start\ndata: {json.dumps(tree)}\n\n"

        handler = SimpleNamespace(messages_full_converter=None, message_stream_converter=events)
        mend_messages(SimpleNamespace(state=SimpleNamespace(anthropic_serving_messages=handler)))  # type: ignore[arg-type]
        return [event async for event in handler.message_stream_converter(None)][1]  # type: ignore[call-arg]

    for block, wanted in ((call, made["content"][0]), ({"type": "text", "text": ""}, {"type": "text", "text": ""})):
        kind, _, data = asyncio.run(started(block)).partition("\ndata: ")
        assert kind == "event: content_block_start"
        assert json.loads(data) == {"type": "content_block_start", "index": 1, "content_block": wanted}


def test_what_follows_a_stored_response_sees_its_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    from openai.types.responses import ResponseFunctionToolCall, ResponseOutputMessage, ResponseOutputText

    monkeypatch.setattr(responses_repair, "count_alike", lambda: None)
    call = ResponseFunctionToolCall(type="function_call", call_id="c", name="f", arguments="{}")
    part = ResponseOutputText(type="output_text", text="a", annotations=[])
    text = ResponseOutputMessage(id="m", type="message", role="assistant", status="completed", content=[part])

    async def render(request: object, **given: Any) -> dict[str, Any]:
        return given

    def asked(outputs: list[Any] | None, harmony: bool = False) -> dict[str, Any]:
        renderer = SimpleNamespace(render_responses=render, use_harmony=harmony)
        handler = SimpleNamespace(
            responses_full_generator=None,
            responses_stream_generator=None,
            responses_background_stream_generator=None,
            online_renderer=renderer,
        )
        state = SimpleNamespace(openai_serving_responses=handler)
        responses_repair.mend_responses(SimpleNamespace(state=state))  # type: ignore[arg-type]
        before = [{"role": "user", "content": "q"}]
        given = {"previous_messages": before, "previous_response_outputs": outputs, "tool_server": 1}
        return dict(asyncio.run(renderer.render_responses(None, **given)))  # type: ignore[arg-type]

    made = asked([text, call])
    assert made["previous_response_outputs"] is None
    assert made["tool_server"] == 1
    question, answer = made["previous_messages"]
    assert question == {"role": "user", "content": "q"}
    assert (answer["role"], answer["content"], answer["tool_calls"][0]["id"]) == ("assistant", "a", "c")
    for outputs, harmony in (([text], False), (None, False), ([call], True)):
        kept = asked(outputs, harmony)
        assert (kept["previous_response_outputs"], len(kept["previous_messages"])) == (outputs, 1)


def test_a_stored_response_is_its_tenants_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM keeps them by id, which a client may choose, for whoever names it, and forgets none."""
    monkeypatch.setattr(stored_responses, "MOST", 2)

    class Handler:
        enable_store = True

        def __init__(self) -> None:
            self.response_store: dict[str, str] = {}
            self.msg_store: dict[str, str] = {}
            self.event_store: dict[str, str] = {}

        async def create_responses(self, request: Any, raw: Any = None) -> str:
            self.response_store[request.request_id] = self.msg_store[request.request_id] = "kept"
            return "made"

        async def retrieve_responses(self, response_id: str, starting_after: Any, stream: Any) -> str:
            return self.response_store[response_id]

        async def cancel_responses(self, response_id: str) -> str:
            return self.response_store[response_id]

    handler = Handler()
    app = SimpleNamespace(state=SimpleNamespace(openai_serving_responses=handler))
    stored_responses.keep_apart(app)  # type: ignore[arg-type]

    def ask(tenant: str, number: str, before: str | None = None, store: bool = True) -> Any:
        wanted = SimpleNamespace(request_id=number, previous_response_id=before, store=store)
        return by(tenant, handler.create_responses(wanted))

    def by(tenant: str, work: Any) -> Any:
        context = RequestContext("r", "openai", "/v1/responses")
        context.access.tenant = tenant
        current.set(context)
        with contextlib.suppress(InvalidRequest, NotFound):
            return asyncio.run(work)
        assert context.refusal is not None
        return context.refusal.http_status

    def read(tenant: str, number: str) -> Any:
        return by(tenant, handler.retrieve_responses(number, starting_after=None, stream=False))

    assert ask("a", "1") == "made"
    assert (read("a", "1"), read("b", "1"), read("b", "nope")) == ("kept", 404, 404)
    assert (by("a", handler.cancel_responses("1")), by("b", handler.cancel_responses("1"))) == ("kept", 404)
    assert (ask("b", "1"), ask("a", "1")) == (400, 400)
    assert (ask("b", "2", before="1"), ask("a", "2", before="1"), ask("b", "x", store=False)) == (404, "made", "made")
    assert ask("a", "3") == "made"
    assert (read("a", "1"), read("a", "3")) == (404, "kept")
    assert set(handler.response_store) == set(handler.msg_store) == {"2", "3", "x"}


def test_a_response_gets_what_is_required_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(responses_repair, "count_alike", lambda: None)  # changes a class of vLLM's for good

    def part() -> Any:
        return SimpleNamespace(type="output_text", text="a", logprobs=None)

    def response(status: str) -> Any:
        item = SimpleNamespace(type="message", status=status, content=[part()])
        return SimpleNamespace(object="response", status=status, output=[item], text=None, top_logprobs=None)

    async def full(request: Any) -> Any:
        return response(request.status)

    async def stream(request: Any) -> AsyncGenerator[Any, None]:
        yield SimpleNamespace(type="response.created", response=response("in_progress"), sequence_number=0)
        yield SimpleNamespace(type="response.content_part.done", part=part(), sequence_number=1)
        yield SimpleNamespace(type="response.completed", response=response("completed"), sequence_number=2)

    handler = SimpleNamespace(
        responses_full_generator=full,
        responses_stream_generator=stream,
        responses_background_stream_generator=None,
        online_renderer=SimpleNamespace(render_responses=None),
    )
    responses_repair.mend_responses(SimpleNamespace(state=SimpleNamespace(openai_serving_responses=handler)))  # type: ignore[arg-type]
    asked = SimpleNamespace(status="completed", store=True, prompt_cache_key="k")

    async def read() -> tuple[Any, list[Any]]:
        events = handler.responses_stream_generator(asked)  # type: ignore[call-arg]
        return await handler.responses_full_generator(asked), [event async for event in events]  # type: ignore[misc]

    whole, (created, part_done, completed) = asyncio.run(read())
    for made in (whole, created.response, completed.response):
        assert (made.error, made.store, made.prompt_cache_key, made.safety_identifier) == (None, True, "k", None)
        assert made.top_logprobs == 0
        assert made.text.format.type == "text"
        assert made.output[0].content[0].logprobs == []
    assert created.response.completed_at is None
    assert whole.completed_at > 0
    assert part_done.part.logprobs == []


def test_a_response_that_the_engine_refuses_ends_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """From its beginning with one that has a status, later with an event; never with a connection that is cut."""
    monkeypatch.setattr(responses_repair, "count_alike", lambda: None)
    refusal = InvalidRequest("no such luck", field="top_logprobs")

    async def stream(said: bool) -> AsyncGenerator[Any, None]:
        response = SimpleNamespace(object="error")
        for number, kind in enumerate(("response.created", "response.in_progress")):
            yield SimpleNamespace(type=kind, response=response, sequence_number=number)
        if said:
            yield SimpleNamespace(type="response.output_text.delta", sequence_number=2)
        raise refusal

    handler = SimpleNamespace(
        responses_full_generator=None,
        responses_stream_generator=stream,
        responses_background_stream_generator=None,
        online_renderer=SimpleNamespace(render_responses=None),
    )
    responses_repair.mend_responses(SimpleNamespace(state=SimpleNamespace(openai_serving_responses=handler)))  # type: ignore[arg-type]

    async def read(said: bool) -> list[Any]:
        return [event async for event in handler.responses_stream_generator(said)]

    *_, delta, last = asyncio.run(read(True))
    assert delta.type == "response.output_text.delta"
    assert (last.type, last.message, last.param) == ("error", "no such luck", "top_logprobs")
    assert last.sequence_number == delta.sequence_number + 1
    with pytest.raises(InvalidRequest):
        asyncio.run(read(False))
