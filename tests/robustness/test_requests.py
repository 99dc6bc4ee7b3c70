"""Requests to the real server that would get around a policy, hold its loop, or be answered with a fault of ours."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from kserve_vllm.core.errors import RateLimited
from kserve_vllm.core.request_context import Access, RequestContext
from kserve_vllm.protocols.http import bounds
from kserve_vllm.protocols.http.body import MOST_WAIT_S, SHARE, LoopShare
from kserve_vllm.telemetry.watchdog import HOLD_S, watch_loop
from tests.robustness.wire import ask, read_answer, statuses
from tests.support import Server

CHAT, COMPLETIONS, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses"
INFER, GENERATE, PREDICT = "/v2/models/demo/infer", "/v2/models/demo/generate", "/v1/models/demo:predict"
SUM = "What is 2 plus 3?"


def message(path: str = CHAT, *fields: bytes, body: bytes | None = None, method: bytes = b"POST") -> bytes:
    """A request as it goes over the wire, with a small chat in it."""
    if body is None:
        body = json.dumps({"model": "demo", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}).encode()
    head = [
        method + b" " + path.encode() + b" HTTP/1.1",
        b"Host: x",
        b"Connection: close",
        *fields,
        b"Content-Length: %d" % len(body),
    ]
    if not any(field.lower().startswith(b"content-type") for field in fields):
        head.append(b"Content-Type: application/json")
    return b"\r\n".join(head) + b"\r\n\r\n" + body


FORM = b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\n-zaza\r\n--b--\r\n'
FORM_TYPE = b"Content-Type: multipart/form-data; boundary=b"
HALF = json.dumps({"model": "demo", "messages": [{"role": "user", "content": "\ud83d"}]}).encode()

# Each row: the promise, the bytes, the status.
ROWS: list[tuple[str, bytes, int]] = [
    ("the plain request", message(), 200),
    ("a line break hides no path", message(CHAT + "%0A"), 404),
    ("nor below /openai", message("/openai" + CHAT + "%0A"), 404),
    ("nor of the others", message(COMPLETIONS + "%0A"), 404),
    ("nor of those", message(MESSAGES + "%0A"), 404),
    ("nor of these", message(RESPONSES + "%0A"), 404),
    ("a slash at the end is no other path", message(CHAT + "/"), 200),
    ("nor below /openai (no redirect loses it)", message("/openai" + CHAT + "/"), 200),
    ("3986, 2.3: an encoded letter is the same letter", message("/v1/chat/completion%73"), 200),
    ("a doubled slash is no path of ours", message("/v1//chat/completions"), 404),
    ("dots are no path of ours", message("/x/.." + CHAT), 404),
    ("9110, 5.3: two keys", message(CHAT, b"Authorization: Bearer a", b"Authorization: Bearer b"), 400),
    ("9110, 5.3: two types", message(CHAT, b"Content-Type: application/json", b"Content-Type: text/plain"), 400),
    ("9110, 8.3.1: types have no case", message(CHAT, b"Content-Type: application/JSON"), 200),
    ("half a pair, whatever the type's case", message(CHAT, b"Content-Type: application/JSON", body=HALF), 400),
    ("9110, 15.5.6: a wrong method", message(CHAT, method=b"DELETE"), 405),
    ("9110, 15.5.6: of a path with a name", message(INFER, method=b"DELETE"), 405),
    ("9110, 15.5.6: POST of a list", message("/v1/models"), 405),
    ("9110, 9.3.2: HEAD where GET is", message("/v1/models", method=b"HEAD", body=b""), 200),
    ("9110, 9.3.2: HEAD of V2", message("/v2/models/demo", method=b"HEAD", body=b""), 200),
    ("9110, 15.5.6: of what no route answers", message("/", body=b""), 405),
    ("9110, 15.5.6: of metrics", message("/metrics", method=b"DELETE", body=b""), 405),
    ("9110, 9.3.8: TRACE", message("/version", method=b"TRACE", body=b""), 405),
    ("KServe's verb that is not served", message("/v1/models/demo:explain"), 404),
    ("batched CloudEvents", message(PREDICT, b"Content-Type: application/cloudevents-batch+json", body=b"[]"), 415),
    ("/v2/ is /v2", message("/v2/", method=b"GET", body=b""), 200),
    ("a name with an encoded slash", message("/v2/models/org%2Fdemo", method=b"GET", body=b""), 200),
    ("its probe", message("/v2/models/org%2Fdemo/ready", method=b"GET", body=b""), 200),
    ("which engine answers is not for clients to say", message(CHAT, b"X-Data-Parallel-Rank: 0"), 400),
    ("7578, 5.1.2: a form names no codec", message("/v1/files", FORM_TYPE + b"; charset=punycode", body=FORM), 400),
    ("however it is written", message("/v1/files", FORM_TYPE + b' ;CharSet = "idna"', body=FORM), 400),
    ("but UTF-8, which it is", message("/v1/files", FORM_TYPE + b"; charset=UTF-8", body=FORM), 404),
    ("a closed route of vLLM", message("/metrics/x", method=b"GET", body=b""), 404),
]


@pytest.mark.parametrize(("promise", "sent", "status"), ROWS, ids=[row[0] for row in ROWS])
def test_no_spelling_gets_around(server: Server, promise: str, sent: bytes, status: int) -> None:
    answer = ask(server.http_port, sent)
    assert statuses(answer) == [status], answer[:600]
    if status == 405:
        assert b"\r\nallow: " in answer.lower()
    if sent.startswith(b"HEAD"):
        assert answer.endswith(b"\r\n\r\n")


@pytest.mark.parametrize(
    ("path", "shape"),
    [
        ("/v1/nope", lambda tree: tree["error"]["message"]),
        ("/openai/v1/nope", lambda tree: tree["error"]["message"]),
        ("/v2/nope", lambda tree: tree["error"]),
        ("/v1/models/demo/nope:predict/", lambda tree: tree["error"]),
        ("/v1/messages/nope", lambda tree: tree["error"]["message"] if tree["type"] == "error" else None),
    ],
)
def test_what_is_not_there_is_said_in_the_protocols_shape(
    server: Server, path: str, shape: Callable[[Any], Any]
) -> None:
    answer = httpx.post(server.url + path, json={})
    assert answer.status_code == 404
    assert isinstance(shape(answer.json()), str)


def test_of_two_request_ids_neither_is_taken(server: Server) -> None:
    answer = ask(server.http_port, message(CHAT, b"X-Request-Id: mine-1", b"X-Request-Id: mine-2"))
    assert statuses(answer) == [200]
    assert b"mine-" not in answer


def test_a_wrong_handshake_gets_an_http_answer(server: Server) -> None:
    handshake = (
        b"GET %b HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    for path in (b"/v1/nope", CHAT.encode(), b"/v1/realtime%0A"):
        with socket.create_connection(("127.0.0.1", server.http_port), timeout=20) as sock:
            sock.sendall(handshake % path)
            answer = read_answer(sock)
        assert statuses(answer) == [404]
        assert b'"no such path"' in answer


# What was 500 once, or could be: each is the request's fault, in every protocol.

LONG = "9" * 5000


def instance(**fields: Any) -> dict[str, Any]:
    return {"instances": [{"prompt": SUM, "max_tokens": 2, **fields}]}


def tensor(**parameters: Any) -> dict[str, Any]:
    return {
        "inputs": [{"name": "text_input", "datatype": "BYTES", "shape": [1], "data": [SUM]}],
        "parameters": parameters,
    }


def generate(**parameters: Any) -> dict[str, Any]:
    return {"text_input": SUM, "parameters": parameters}


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": "demo", "prompt": "a", "max_tokens": 2, **fields}


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "demo", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2, **fields}


def formatted(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


def tool(schema: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": schema, "strict": True}}


PROPERTIES = {f"p{number}": {"type": "string"} for number in range(800)}
WORDS = [f"word {number}" for number in range(1001)]  # vLLM takes equal ones for one
SLOW = {"type": "object", "properties": PROPERTIES, "minProperties": 200, "maxProperties": 400}
ENDLESS = {"type": "array", "items": {"type": "integer"}, "minItems": 10_000_000_000}
ODD = {"type": "object", "properties": {"a": {"type": "string"}}, "patternProperties": {"b": {"type": "string"}}}

A_LONG_NAME = "OpenAI: a name of 100 KiB"
FAULTS: list[tuple[str, str, Any]] = [
    ("V1: structured_outputs is a text", PREDICT, instance(structured_outputs="x")),
    ("V1: structured_outputs is a list", PREDICT, instance(structured_outputs=[1])),
    ("V1: structured_outputs is a number", PREDICT, instance(structured_outputs=1)),
    ("V2: structured_outputs is a text", INFER, tensor(structured_outputs="x")),
    ("V2: structured_outputs is a list", INFER, tensor(structured_outputs="[1]")),
    ("V2: structured_outputs is true", INFER, tensor(structured_outputs=True)),
    ("V2: response_format is a text", INFER, tensor(response_format="x")),
    ("generate: structured_outputs is a text", GENERATE, generate(structured_outputs="x")),
    ("generate: structured_outputs is a number", GENERATE, generate(structured_outputs=1.5)),
    ("V2: a number of 5,000 digits in an option", INFER, tensor(logit_bias="{" + f'"1": {LONG}' + "}")),
    ("V2: in a list of options", INFER, tensor(stop_token_ids=f"[{LONG}]")),
    (
        "V2: in the sampling parameters",
        INFER,
        {
            "inputs": [
                *tensor()["inputs"],
                {"name": "sampling_parameters", "datatype": "BYTES", "shape": [1], "data": ['{"seed": ' + LONG + "}"]},
            ]
        },
    ),
    ("V2: in the JSON", INFER, f'{{"inputs": [], "id": {LONG}}}'),
    ("V1: in the JSON", PREDICT, f'{{"instances": [{LONG}]}}'),
    ("OpenAI: in the JSON", CHAT, f'{{"model": "demo", "messages": [], "seed": {LONG}}}'),
    ("OpenAI: in a stream's JSON", COMPLETIONS, f'{{"model": "demo", "prompt": "a", "stream": true, "seed": {LONG}}}'),
    ("Anthropic: in the JSON", MESSAGES, f'{{"model": "demo", "messages": [], "max_tokens": {LONG}}}'),
    ("V1: too many stop strings", PREDICT, instance(stop=["x"] * 129)),
    ("V2: too many stop strings", INFER, tensor(stop=json.dumps(["x"] * 129))),
    ("generate: too many forbidden words", GENERATE, generate(bad_words=json.dumps(WORDS))),
    ("OpenAI: too many answers", COMPLETIONS, {"model": "demo", "prompt": "a", "n": 129}),
    ("OpenAI: too many stop strings in a stream", COMPLETIONS, completion(stop=["x"] * 129, stream=True)),
    ("OpenAI: too many forbidden words in a stream", CHAT, chat(bad_words=WORDS, stream=True)),
    ("OpenAI: a bias for too many tokens", CHAT, chat(logit_bias=dict.fromkeys(range(4097), 1))),
    ("OpenAI: a schema that takes seconds", CHAT, chat(structured_outputs={"json": SLOW})),
    ("OpenAI: the same as a format", CHAT, chat(response_format=formatted(SLOW), stream=True)),
    ("OpenAI: the same in a tool that has to be called", CHAT, chat(tools=[tool(SLOW)], tool_choice="required")),
    ("OpenAI: a schema of items without end", CHAT, chat(structured_outputs={"json": ENDLESS})),
    (
        "OpenAI: an error that repeats 40 KiB",
        CHAT,
        chat(structured_outputs={"regex": "(" * 20_000 + "a" + ")" * 20_000}),
    ),
    (A_LONG_NAME, CHAT, chat(model="x" * 100_000)),
    ("V2: a schema of items without end", INFER, tensor(structured_outputs=json.dumps({"json": ENDLESS}))),
    ("OpenAI: a schema for a third backend", CHAT, chat(structured_outputs={"json": ODD})),
    (
        "OpenAI: a slow schema of a response",
        RESPONSES,
        {
            "model": "demo",
            "input": "a",
            "stream": True,
            "text": {"format": {"type": "json_schema", "name": "x", "schema": SLOW}},
        },
    ),
    (
        "Anthropic: too many stop strings",
        MESSAGES,
        {
            "model": "demo",
            "messages": [{"role": "user", "content": "a"}],
            "max_tokens": 2,
            "stop_sequences": ["x"] * 129,
        },
    ),
    (
        "OpenAI: structured_outputs is a text",
        CHAT,
        {"model": "demo", "messages": [{"role": "user", "content": "a"}], "structured_outputs": "x"},
    ),
]


@pytest.mark.parametrize(("promise", "path", "body"), FAULTS, ids=[row[0] for row in FAULTS])
def test_a_clients_fault_is_no_fault_of_ours(server: Server, promise: str, path: str, body: Any) -> None:
    content = body.encode() if isinstance(body, str) else json.dumps(body).encode()
    answer = httpx.post(server.url + path, content=content, headers={"content-type": "application/json"}, timeout=60)
    assert answer.status_code == (404 if promise == A_LONG_NAME else 400), answer.text
    assert answer.json()["error"]
    assert len(answer.text) < 2000


SAID = {"do_remote_prefill": True, "remote_prefill_cached_tokens": -5, "prompt_token_ids": [5]}
PROMPT = {"model": "demo", "prompt": "a", "max_tokens": 2}
TALK = {"model": "demo", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
TRANSFERS: list[tuple[str, str, bytes]] = [
    ("of a chat", CHAT, json.dumps({**TALK, "kv_transfer_params": SAID}).encode()),
    ("of a streamed chat", CHAT, json.dumps({**TALK, "stream": True, "kv_transfer_params": SAID}).encode()),
    ("of an encoder", CHAT, json.dumps({**TALK, "ec_transfer_params": SAID}).encode()),
    ("of a completion", COMPLETIONS, json.dumps({**PROMPT, "kv_transfer_params": SAID}).encode()),
    ("of a message", MESSAGES, json.dumps({**TALK, "kv_transfer_params": SAID}).encode()),
    ("of a response", RESPONSES, json.dumps({"model": "demo", "input": "a", "kv_transfer_params": SAID}).encode()),
    ("by way of SageMaker", "/invocations", json.dumps({**TALK, "kv_transfer_params": SAID}).encode()),
    ("beside what is no JSON", CHAT, json.dumps({**TALK, "x": float("nan"), "kv_transfer_params": SAID}).encode()),
    (
        "among vLLM's arguments",
        COMPLETIONS,
        json.dumps({**PROMPT, "vllm_xargs": {"kv_transfer_params": "x", "ec_transfer_params": [1]}}).encode(),
    ),
]


@pytest.mark.parametrize(("promise", "path", "body"), TRANSFERS, ids=[row[0] for row in TRANSFERS])
def test_a_client_does_not_say_where_caches_are_nor_another_prompt(
    server: Server, promise: str, path: str, body: bytes
) -> None:
    answer = httpx.post(server.url + path, content=body, headers={"content-type": "application/json"}, timeout=60)
    assert answer.status_code == 400, answer.text
    assert "--allow-transfer-params" in answer.text


def test_a_length_of_thousands_of_digits_is_refused(server: Server) -> None:
    for length in (LONG, "-1", "1e3", "٣", "0x1", "99999999999"):
        answer = httpx.post(
            server.url + INFER, content=b"{}", headers={b"inference-header-content-length": length.encode()}
        )
        assert answer.status_code == 400, answer.text


# Bounds of a body, and the loop that nothing below them holds


def test_values_are_counted_where_they_are_values() -> None:
    async def check(body: bytes) -> str | None:
        try:
            await bounds.check_values(body)
        except Exception as error:
            return str(error)
        return None

    def found(body: bytes) -> str:
        return asyncio.run(check(body)) or "taken"

    many = bounds.MAX_STRINGS
    assert "strings" in found(b'["a"' + b',"a"' * many + b"]")
    assert found(b'["a"' + b',"a"' * (many - 1) + b"]") == "taken"
    assert "objects and lists" in found(b"[" + b"{}," * bounds.MAX_CONTAINERS + b"{}]")
    assert found(b"[" + b"{}," * (bounds.MAX_CONTAINERS - 2) + b"{}]") == "taken"
    assert "values" in found(b"[1" + b",1" * (bounds.MAX_VALUES + 1) + b"]")
    assert found(b"[1" + b",1" * (bounds.MAX_VALUES - 1) + b"]") == "taken"
    # Python reads a number in the square of its length.
    numbers = b",".join([b"9" * 4_000] * 17)
    assert "digits" in found(b"[" + numbers + b"]")
    assert found(b'["' + numbers + b'"]') == "taken", "a text of digits is a text"
    assert found(b"[" + b",".join([b"9" * 60] * 20_000) + b"]") == "taken"
    # Whatever stands in a text is one text.
    for part in (b",[{", rb"\"", rb"\\", b'\\",[', rb"\\\"{", b"\\\\" * 7 + b'\\"'):
        text = b'["' + part * (3_000_000 // len(part)) + b'"]'
        assert found(text) == "taken", part
        assert "strings" in found(text[:-1] + b',"a"' * many + b"]"), part


def test_what_a_body_will_hold_the_loop_for_is_told_by_its_values() -> None:
    def told(body: bytes) -> float:
        return asyncio.run(bounds.check_values(body))

    tokens = b'{"prompt":[1' + b",1" * 900_000 + b"]}"
    messages = b"[" + b",".join([b'{"role":"user","content":"a"}'] * 9_000) + b"]"
    assert 0.05 < told(tokens) < 0.2
    assert 0.1 < told(messages) < 0.3
    assert told(b'["' + b"a, " * 1_000_000 + b'"]') < 0.001, "what stands in a text costs nothing"
    assert told(b'{"prompt":[1' + b",1" * 100_000 + b"]}") == 0, "a long prompt is no load"


def test_a_text_is_turned_into_tokens_up_to_a_bound(server: Server) -> None:
    most = bounds.MAX_TOKENIZED
    for size, texts, status in ((most // 4, False, 200), (1000, True, 200), (most // 4, True, 413), (most, False, 413)):
        body = {"model": "demo", "prompt": "a" * size, "return_token_strs": True}
        if not texts:
            del body["return_token_strs"]
        answer = httpx.post(server.url + "/tokenize", json=body, timeout=60)
        assert answer.status_code == status
    assert "in parts" in answer.json()["error"]["message"]
    disguised = json.dumps({"model": "demo", "prompt": "a" * (most // 4), "return_token_strs": True})
    answer = httpx.post(
        server.url + "/tokenize",
        content=disguised.replace("token_strs", "token\\u005fstrs"),
        headers={"content-type": "application/json"},
        timeout=60,
    )
    assert answer.status_code == 413


def test_a_caller_of_heavy_bodies_waits_and_nobody_else_does() -> None:
    async def run() -> None:
        share = LoopShare()
        one, other = (RequestContext("r", "openai", "/", access=Access(key_id=key)) for key in ("one", "other"))
        assert [share.wait_s(one, 0.001) for _ in range(1000)] == [0] * 1000, "what is light is not counted"
        assert share.wait_s(one, 0.1) == 0
        assert share.wait_s(one, 0.1) == pytest.approx(0.1 / SHARE, abs=0.1)
        assert share.wait_s(one, 0.001) == 0, "nor held up"
        assert share.wait_s(other, 0.1) == 0
        assert share.wait_s(one, 0.1) == pytest.approx(0.2 / SHARE, abs=0.5)
        with pytest.raises(RateLimited, match="very many values") as refused:
            share.wait_s(one, 0.1)
        assert 0 < (refused.value.retry_after_s or 0) <= 0.3 / SHARE - MOST_WAIT_S + 1
        # Who waited for long enough goes on, and is forgotten.
        loop = asyncio.get_running_loop()
        now = loop.time()
        loop.time = lambda: now + 60  # type: ignore[method-assign]
        assert share.wait_s(one, 0.1) == 0
        assert list(share.free_at) == ["one"]

    asyncio.run(run())


@pytest.mark.parametrize("step", [0, 1, 5, 6, 7, 11, 12, 13])
def test_half_of_a_pair_is_found_wherever_it_stands(step: int) -> None:
    async def check(body: bytes) -> bool:
        try:
            await bounds.check_unicode(body)
        except Exception:
            return False
        return True

    for size in (10, (1 << 16) - 20 + step, (1 << 19) + step):
        filler = b"x" * size
        for taken, part in (
            (True, rb"\ud83d\ude00"),
            (True, rb"\\ud83d"),
            (True, rb"\\\\ud83d\\ude00"),
            (True, rb"\\\ud83d\ude00"),
            (True, "é😀\ud7ff".encode()),
            (False, rb"\ud83d"),
            (False, rb"\ude00"),
            (False, rb"\\\ud83d"),
            (False, rb"\ud83d\\\ude00"),
            (False, rb"\ud83d\ud83d\ude00"),
            (False, rb"\ud83d\ude00\ude00"),
            (False, b"\xed\xa0\xbd"),
            (False, b"a\x00"),
        ):
            body = b'{"a":"' + filler + part + b"z" * 40 + b'"}'
            assert asyncio.run(check(body)) is taken, (size, part)
            if taken and len(body) < 1 << 17:
                json.loads(body)


def test_the_watchdog_sees_what_holds_the_loop() -> None:
    async def run() -> list[tuple[float, bool]]:
        seen: list[tuple[float, bool]] = []
        task = asyncio.create_task(watch_loop(lambda lag, held: seen.append((lag, held)), 0.01))
        await asyncio.sleep(0.05)
        end = time.process_time() + 2 * HOLD_S
        while time.process_time() < end:
            pass
        await asyncio.sleep(0.05)
        time.sleep(1.5 * HOLD_S)  # noqa: ASYNC251 - waiting is no work, and others are to blame for it
        await asyncio.sleep(0.05)
        task.cancel()
        return seen

    seen = asyncio.run(run())
    assert [held for _, held in seen].count(True) == 1
    assert sum(lag > HOLD_S for lag, _ in seen) >= 2


def binary(body: bytes, count: int) -> tuple[bytes, dict[str, str]]:
    """An infer request whose one BYTES input follows its JSON."""
    head = json.dumps(
        {
            "inputs": [
                {
                    "name": "text_input",
                    "datatype": "BYTES",
                    "shape": [count],
                    "parameters": {"binary_data_size": len(body)},
                }
            ]
        }
    ).encode()
    return head + body, {"inference-header-content-length": str(len(head))}


def heavy() -> list[tuple[str, str, bytes, dict[str, str]]]:
    """Requests that are as much as a body of 4 MiB, which the shared server takes, can be."""
    room = (4 << 20) - 1000
    one = b'{"role":"user","content":"a"}'
    rows: list[tuple[str, str, bytes, dict[str, str]]] = []

    more = b',"a"' * 40_000
    pair = rb"\ud83d\ude00"
    numbered = b",".join(b'"%d":1' % i for i in range(40_000))
    elements = b'{"inputs":[{"name":"text_input","datatype":"BYTES","shape":[1000000],"data":['

    def chat(inner: bytes, more: bytes = b"") -> bytes:
        return b'{"model":"demo","max_tokens":1,"messages":[' + inner + b"]" + more + b"}"

    few = b",".join([one] * 9_000)
    rows += [
        ("messages beyond the bound", CHAT, chat(b",".join([one] * (room // (len(one) + 1)))), {}),
        ("messages below the bound", CHAT, chat(few), {}),
        ("texts below the bound", COMPLETIONS, b'{"model":"demo","prompt":"a","stop":["a"' + more + b"]}", {}),
        ("tokens below the bound", COMPLETIONS, b'{"model":"demo","prompt":[1' + b",1" * 900_000 + b"]}", {}),
        ("one long text", CHAT, chat(b'{"role":"user","content":"' + b"a, " * (room // 3) + b'"}'), {}),
        ("one text of escapes", CHAT, chat(b'{"role":"user","content":"' + pair * (room // 12) + b'"}'), {}),
        ("lists in lists", CHAT, b"[" * room, {}),
        ("names", CHAT, chat(one, b"," + numbered), {}),
        ("elements of V2's JSON", INFER, elements + b'"",' * (room // 3 - 50) + b'""]}]}', {}),
        ("instances of V1", PREDICT, b'{"instances":[' + b'"a",' * 45_000 + b'"a"]}', {}),
        ("empty elements of V2's binary form", INFER, *binary(bytes(room), room // 4)),
        ("the same under a smaller shape", INFER, *binary(bytes(room), 1)),
    ]
    return rows


def test_no_request_holds_the_loop(server: Server) -> None:
    """Held by the server's own work: a machine that is busy otherwise makes it late, which is not counted."""
    held: dict[str, float] = {}
    for name, path, body, headers in heavy():
        before = server.metric("kserve_vllm_event_loop_holds_total")
        answer = httpx.post(
            server.url + path, content=body, headers={"content-type": "application/json"} | headers, timeout=120
        )
        assert answer.status_code == (200 if name == "names" else 400), (name, answer.text[:300])
        time.sleep(0.3)  # for the watchdog to wake up
        if after := server.metric("kserve_vllm_event_loop_holds_total") - before:
            held[name] = after
    assert not held, "\n".join(line for line in server.log.splitlines() if "loop was held" in line)


def test_probes_are_answered_beside_hostile_clients(server: Server) -> None:
    """Four clients that send what is above, time and again, beside probes: none of those fails."""
    ending = threading.Event()

    def hostile() -> None:
        while not ending.is_set():
            for _, path, body, headers in heavy()[:4]:
                httpx.post(server.url + path, content=body, headers=headers, timeout=120)
                if ending.is_set():
                    return

    threads = [threading.Thread(target=hostile) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(10):
            assert httpx.get(server.url + "/v2/health/live", timeout=60).status_code == 200
            time.sleep(0.1)
    finally:
        ending.set()
        for thread in threads:
            thread.join()
