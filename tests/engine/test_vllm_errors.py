"""What made vLLM's own routes answer 500, or ended its engine, is the request's fault and answered as such."""

from __future__ import annotations

import json
import threading
import traceback
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi.responses import JSONResponse

from kserve_vllm.engine.faults import sentence_of_client_fault
from tests.clients import SUM, assert_unharmed, post, texts
from tests.support import Server

COMPLETIONS, CHAT, RESPONSES, MESSAGES = "/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"
BASE: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"model": "demo", "prompt": SUM, "max_tokens": 3},
    CHAT: {"model": "demo", "messages": [{"role": "user", "content": SUM}], "max_tokens": 3},
    MESSAGES: {"model": "demo", "messages": [{"role": "user", "content": SUM}], "max_tokens": 3},
    RESPONSES: {"model": "demo", "input": SUM, "max_output_tokens": 3},
    "/tokenize": {"model": "demo", "prompt": SUM},
    "/v1/messages/count_tokens": {"model": "demo", "messages": [{"role": "user", "content": SUM}]},
    "/generative_scoring": {"model": "demo", "query": "a", "items": ["b"], "label_token_ids": [5, 6]},
}
NO_TEXT = [{"grammar": "root ::= root"}, {"json": {"$ref": "#"}}, {"json": {"allOf": [{"$ref": "#"}]}}]
HALF = "\ud800"
ASSISTANT = {"type": "message", "role": "assistant"}

CASES = [
    # read as a table before its type is checked
    *((COMPLETIONS, {"structured_outputs": odd}, "structured_outputs") for odd in (True, 1, 1.5, "a", [], [{}])),
    *((COMPLETIONS, {"structured_outputs": odd, "stream": True}, "structured_outputs") for odd in (1, [])),
    # numbers beyond 64 bits, on their way to the engine's process
    *((path, {"top_k": 2**64}, "top_k") for path in (COMPLETIONS, CHAT, RESPONSES, MESSAGES)),
    (COMPLETIONS, {"top_k": 10**30}, "top_k"),
    # half of a surrogate pair, which is no character
    *((COMPLETIONS, {name: HALF}, name) for name in ("prompt", "stop", "user", "cache_salt", "request_id")),
    (COMPLETIONS, {"bad_words": [HALF]}, "bad_words"),
    (COMPLETIONS, {"vllm_xargs": {"a": HALF}}, "vllm_xargs"),
    (COMPLETIONS, {HALF: 1}, ""),
    (COMPLETIONS, {"prompt": [SUM, HALF]}, "prompt"),
    (CHAT, {"messages": [{"role": "user", "content": f"a {HALF}"}]}, "messages"),
    *((RESPONSES, {name: HALF}, name) for name in ("input", "instructions", "user")),
    (RESPONSES, {"metadata": {"a": HALF}}, "metadata"),
    (MESSAGES, {"system": HALF}, "system"),
    ("/tokenize", {"prompt": HALF}, "prompt"),
    ("/v1/messages/count_tokens", {"system": HALF}, "system"),
    ("/generative_scoring", {"query": HALF}, "query"),
    # grammars that no text satisfies
    *((path, {"structured_outputs": odd}, "grammar") for path in (COMPLETIONS, CHAT, RESPONSES) for odd in NO_TEXT),
    # items of a conversation with nothing in them
    (RESPONSES, {"input": [{**ASSISTANT, "content": []}]}, "input"),
    (RESPONSES, {"input": [{**ASSISTANT, "content": [], "id": "a", "status": "in_progress"}]}, "input"),
    (RESPONSES, {"input": [{**ASSISTANT, "content": [{"type": "refusal", "refusal": "a"}]}]}, "input"),
    (RESPONSES, {"input": [{**ASSISTANT, "content": []}], "stream": True}, "input"),
    # found out after the first event of a stream, which was torn then
    (RESPONSES, {"logit_bias": {"-1": 1}, "stream": True}, "logit_bias"),
    (RESPONSES, {"stop_token_ids": [10**6], "stream": True}, "stop_token_ids"),
    (RESPONSES, {"structured_outputs": {"regex": "("}, "stream": True}, ""),
    (RESPONSES, {"structured_outputs": {"json": {"type": 7}}, "stream": True}, ""),
    # what ended the engine as soon as two of them ran together
    (COMPLETIONS, {"prompt_logprobs": 1}, "prompt_logprobs"),
    (COMPLETIONS, {"prompt_logprobs": 0}, "prompt_logprobs"),
    (COMPLETIONS, {"echo": True, "logprobs": 1}, "prompt_logprobs"),
    (CHAT, {"prompt_logprobs": 1}, "prompt_logprobs"),
]


@pytest.fixture(autouse=True, scope="module")
def nothing_is_left(server: Server) -> Iterator[None]:
    before = len(server.log)
    yield
    assert_unharmed(server)
    assert "failed in vLLM" not in server.log[before:]


@pytest.mark.parametrize(("path", "change", "word"), CASES, ids=[f"{path} {json.dumps(c)}" for path, c, _ in CASES])
def test_a_request_of_a_wrong_form_is_refused(server: Server, path: str, change: dict[str, Any], word: str) -> None:
    answer = post(server, path, json.dumps({**BASE[path], **change}))
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert word in error["message"] + str(error.get("param"))
    assert "\n" not in error["message"]
    assert "Traceback" not in error["message"]


@pytest.mark.parametrize("body", [b'{"prompt": "\xed\xa0\x80"}', json.dumps({"prompt": HALF}).encode("utf-16")])
def test_half_a_pair_is_refused_in_every_encoding(server: Server, body: bytes) -> None:
    answer = post(server, COMPLETIONS, body)
    assert answer.status_code == 400
    assert "prompt" in answer.text


@pytest.mark.parametrize("text", ["\U0001f600", "\\ud800", "\\\\udc00 \U0001f600\U0001f600", "\ufffd", "\x00"])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_whole_pairs_and_backslashes_are_text(server: Server, text: str, ascii_only: bool) -> None:
    answer = post(server, "/tokenize", json.dumps({"model": "demo", "prompt": text}, ensure_ascii=ascii_only).encode())
    assert answer.status_code == 200, answer.text
    back = post(server, "/detokenize", {"model": "demo", "tokens": answer.json()["tokens"]})
    assert text in back.json()["prompt"]


def test_a_request_that_could_not_be_sent_leaves_nothing_behind(server: Server) -> None:
    for change in ({"top_k": 2**64}, {"top_k": 2**64, "n": 3, "temperature": 1.0}, {"top_k": 2**64, "stream": True}):
        post(server, COMPLETIONS, {**BASE[COMPLETIONS], **change})
        post(server, COMPLETIONS, {**BASE[COMPLETIONS], **change, "prompt": [SUM, SUM]})
    assert_unharmed(server)


def test_prompt_logprobs_from_many_clients_leave_the_engine_alive(server: Server) -> None:
    found: list[int] = []

    def ask() -> None:
        for number in range(6):
            body = {**BASE[COMPLETIONS], "prompt": SUM * (number + 1), "prompt_logprobs": 1}
            found.append(post(server, COMPLETIONS, body).status_code)
            found.append(post(server, "/v2/models/demo/infer", texts(SUM)).status_code)

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [200] * 36 + [400] * 36


OURS = {
    "/v2/models/demo/infer": texts(SUM, structured_outputs=NO_TEXT[0]),
    "/v2/models/demo/generate": {"text_input": SUM, "parameters": {"structured_outputs": NO_TEXT[0]}},
    "/v1/models/demo:predict": {"instances": [SUM, "1"], "parameters": {"structured_outputs": NO_TEXT[0]}},
}


@pytest.mark.parametrize("path", OURS)
def test_the_grammar_is_at_fault_in_kserves_protocols_too(server: Server, path: str) -> None:
    answer = post(server, path, OURS[path])
    assert answer.status_code == 400, answer.text
    assert "no text can satisfy the grammar" in answer.json()["error"]


def test_the_grammar_is_at_fault_in_a_stream_of_generate(server: Server) -> None:
    answer = post(server, "/v2/models/demo/generate_stream", OURS["/v2/models/demo/generate"])
    assert "no text can satisfy the grammar" in answer.text
    assert '"text_output"' not in answer.text


def test_a_streamed_response_with_a_grammar_goes_through(server: Server) -> None:
    body = {**BASE[RESPONSES], "structured_outputs": {"regex": "[0-9]{2}"}, "max_output_tokens": 8}
    answer = post(server, RESPONSES, {**body, "stream": True})
    assert "event: response.completed" in answer.text
    assert post(server, RESPONSES, body).status_code == 200


def test_a_stream_says_what_is_wrong(server: Server) -> None:
    body = {**BASE[COMPLETIONS], "stream": True, "structured_outputs": NO_TEXT[0]}
    answer = post(server, COMPLETIONS, body)
    assert '"code": null' in answer.text
    assert "no text can satisfy the grammar" in answer.text


# Whose fault it is


def raised(module: str, code: str) -> Exception:
    """What `code` raises in a module of that name."""
    with pytest.raises(Exception) as caught:
        exec(compile(code, module, "exec"), {"__name__": module})
    return caught.value


PROTOCOL, RENDERER, CORE = "vllm.entrypoints.openai.x.protocol", "vllm.renderers.x", "vllm.v1.engine.core_client"


@pytest.mark.parametrize(
    ("module", "code", "taken_up", "fault"),
    [
        (PROTOCOL, "'a'.get", False, True),
        (PROTOCOL, "'a'.get", True, False),  # it may be the answer that is being built
        (RENDERER, "[][0]", True, True),  # the second prompt of a request whose first one runs
        (RENDERER, "open('/nowhere')", False, False),  # the disk is not the client's
        (RENDERER, "raise MemoryError", False, False),
        (RENDERER, "raise RuntimeError('cannot schedule new futures')", False, False),
        (CORE, "{}['a']", False, False),
        ("kserve_vllm.engine.vllm", "{}['a']", False, False),
    ],
)
def test_only_wrong_data_in_what_reads_requests_is_the_clients_fault(
    module: str, code: str, taken_up: bool, fault: bool
) -> None:
    assert (sentence_of_client_fault(raised(module, code), taken_up) is not None) is fault


def test_the_field_is_named_where_python_knows_the_object() -> None:
    code = "def check(data):\n    return data['tools'].get('a')\ncheck({'model': 'a', 'tools': [1]})"
    error = raised(PROTOCOL, code)
    sentence = sentence_of_client_fault(error, False)
    assert sentence is not None
    assert sentence[1] == "tools"
    assert sentence[0].startswith("tools has the wrong form")


def test_a_fault_of_the_server_stays_500_and_its_trace_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    from fastapi import FastAPI
    from starlette.testclient import TestClient
    from vllm.entrypoints.serve.engine.serving import BaseServing

    from kserve_vllm.engine.hooks.guards import answer_errors

    app = FastAPI()
    answer_errors(app, SimpleNamespace(vllm_config=SimpleNamespace(kv_transfer_config=None)))

    @app.get("/raises")
    async def raises() -> None:
        raise RuntimeError("the disk is gone")

    @app.get("/catches")
    async def catches() -> Any:
        try:
            raise RuntimeError("the disk is gone")
        except RuntimeError as error:
            reply = BaseServing.create_error_response(error)
            return JSONResponse(reply.model_dump(), status_code=reply.error.code)

    client = TestClient(app, raise_server_exceptions=False)
    for path in ("/raises", "/catches"):
        caplog.clear()
        assert client.get(path).status_code == 500
        (record,) = [record for record in caplog.records if "failed in vLLM" in record.getMessage()]
        assert record.exc_info is not None
        assert path.strip("/") in "".join(traceback.format_exception(record.exc_info[1]))
