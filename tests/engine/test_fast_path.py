"""The fast path and vLLM's own app are the same to a client.

Each request goes twice through one server: as it is, and with a header that vLLM's app looks at and finds nothing to
say to, so that it answers. Status, headers and every frame or answer are compared; only `created` is left out, and
pieces of text that stand next to each other are joined, since either side may join them.
"""

from __future__ import annotations

import contextlib
import json
import random
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import httpx
import psutil
import pytest

from tests.clients import assert_unharmed, post, running, until
from tests.support import Server
from tests.triton import service_pb2, service_pb2_grpc

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_WORDS = [
    "17 + 25 =",
    "Grüße",
    "日本語のテキスト",
    "🙂🙃",
    "a" * 50,
    '"quotes" \\ and \n lines',
    "1, 2, 3,",
    "\u2028",
    "Hello",
]
_IGNORED_HEADERS = {"date", "content-length"}
_BY_VLLM = {"endpoint_load_metrics_format": "none"}


@pytest.fixture(scope="module")
def plain() -> Iterator[Server]:
    """The demo model without a tool parser, so that vLLM's handler has no parser at all.

    In float32: bfloat16 has so few numbers that two tokens can be equally likely, and which is drawn is chance.
    """
    arguments = ["--demo", "--model-name", "demo", "--max-model-len", "1024", "--enable-prompt-tokens-details"]
    running = Server([*arguments, "--dtype", "float32"])
    try:
        yield running.wait_ready()
    finally:
        running.stop()


@pytest.fixture(scope="module")
def bare() -> Iterator[Server]:
    """As `plain`, but with usage in its plain form: then whole answers of text alone are filled into bytes."""
    running = Server(["--demo", "--model-name", "demo", "--max-model-len", "1024", "--dtype", "float32"])
    try:
        yield running.wait_ready()
    finally:
        running.stop()


def by_path(server: Server, path: str) -> float:
    return server.metric("kserve_vllm_openai_requests_total", path=path)


def finished(server: Server) -> float:
    """Requests that ran to their end."""
    ended = server.metric("vllm:request_success_total")
    return ended - server.metric("vllm:request_success_total", finished_reason="abort")


def common(rng: random.Random) -> dict[str, Any]:
    """Fields that the fast path takes."""
    body: dict[str, Any] = {"model": "demo", "stream": True, "max_tokens": rng.choice([1, 2, 7, 24])}
    choose: list[tuple[str, list[Any]]] = [
        ("temperature", [0, 0.0, 0.7, 1]),
        ("top_p", [1, 0.9]),
        ("top_k", [-1, 5]),
        ("min_p", [0.0, 0.1]),
        ("n", [1, None]),
        ("stop", ["4", [" ", "2"], [], None, "\n"]),
        ("stop_token_ids", [[5], []]),
        ("include_stop_str_in_output", [True, False]),
        ("ignore_eos", [True, False]),
        ("min_tokens", [0, 1]),
        ("presence_penalty", [0.5, -0.5]),
        ("frequency_penalty", [0.3]),
        ("repetition_penalty", [1.1]),
        ("logit_bias", [{"7": 5.0}, {}]),
        ("skip_special_tokens", [True, False]),
        ("spaces_between_special_tokens", [True, False]),
        ("user", ["someone"]),
        ("priority", [0]),
        ("bad_words", [["4"], []]),
        ("truncate_prompt_tokens", [8, None]),
        (
            "stream_options",
            [
                None,
                {},
                {"include_usage": True},
                {"include_usage": True, "continuous_usage_stats": True},
                {"include_usage": False},
                {"continuous_usage_stats": True},
            ],
        ),
        ("response_format", [{"type": "text"}, None]),
        ("structured_outputs", [{"choice": ["yes", "no"]}, {"regex": "[0-9]{2}"}]),
    ]
    for name, values in rng.sample(choose, rng.randint(0, 5)):
        body[name] = rng.choice(values)
    if body.get("temperature") != 0:
        body["seed"] = rng.randint(0, 1000)
    return body


def chat_body(rng: random.Random) -> dict[str, Any]:
    messages: list[dict[str, Any]] = []
    if rng.random() < 0.4:
        messages.append({"role": "system", "content": rng.choice(_WORDS)})
    for _ in range(rng.randint(0, 2)):
        messages.append({"role": "user", "content": rng.choice(_WORDS)})
        messages.append({"role": "assistant", "content": rng.choice(_WORDS)})
    text = rng.choice(_WORDS)
    messages.append({"role": "user", "content": rng.choice([text, text, [{"type": "text", "text": text}]])})
    body = {**common(rng), "messages": messages}
    if rng.random() < 0.2:
        body["max_completion_tokens"] = 3
    if rng.random() < 0.1:
        body |= {"continue_final_message": True, "add_generation_prompt": False}
        messages.append({"role": "assistant", "content": "The"})
    return body


def completion_body(rng: random.Random) -> dict[str, Any]:
    return {**common(rng), "prompt": rng.choice([*_WORDS, [3, 4, 5]])}


# What is refused, or what vLLM's handler has to answer.
_CHANGES: list[dict[str, Any]] = [
    {"model": "nobody"},
    {"model": 7},
    {"model": None},
    {"max_tokens": -1},
    {"max_tokens": 0},
    {"max_tokens": "3"},
    {"max_tokens": 5000},
    {"max_tokens": 2.5},
    {"temperature": -1},
    {"temperature": "hot"},
    {"top_p": 2},
    {"top_k": -7},
    {"min_p": 3},
    {"n": 2, "max_tokens": 1},
    {"n": 0},
    {"n": True},
    {"seed": 2**70},
    {"seed": "x"},
    {"stop": 3},
    {"stop": ["a", 3]},
    {"stop": ""},
    {"stop_token_ids": ["a"]},
    {"stop_token_ids": [10**9]},
    {"logit_bias": {"99999999": 1}},
    {"logit_bias": {"a": 1}},
    {"allowed_token_ids": []},
    {"allowed_token_ids": [10**9]},
    {"bad_words": [""]},
    {"logprobs": 1, "max_tokens": 1},
    {"logprobs": True, "top_logprobs": 2, "max_tokens": 1},
    {"echo": True},
    {"use_beam_search": True},
    {"return_token_ids": True, "max_tokens": 1},
    {"return_tokens_as_token_ids": True},
    {"stream_options": {"include_usage": "yes"}},
    {"stream_options": {"include_usage": True, "more": 1}},
    {"stream_options": 3},
    {"stream": "true"},
    {"stream": 1},
    {"stream": False, "stream_options": {"include_usage": True}},
    {"stream_interval": 3},
    {"unknown_field": [1, 2]},
    {"priority": 3},
    {"min_tokens": 50, "max_tokens": 3},
    {"presence_penalty": 9},
    {"repetition_penalty": 0},
    {"truncate_prompt_tokens": -5},
    {"response_format": {"type": "json_schema"}},
    {"response_format": {"type": "nothing"}},
    {"structured_outputs": {"choice": ["a"], "regex": "b"}},
    {"structured_outputs": {"regex": "(("}},
    {"cache_salt": ""},
    {"request_id": "mine"},
    {"tools": [], "tool_choice": "auto"},
    {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]},
    {"tool_choice": "none"},
]
_CHAT_CHANGES: list[dict[str, Any]] = [
    {"messages": []},
    {"messages": None},
    {"messages": "hello"},
    {"messages": [{"role": "user"}]},
    {"messages": [{"role": "nobody", "content": "x"}]},
    {"messages": [{"content": "x"}]},
    {"messages": [{"role": "user", "content": None}]},
    {"messages": [{"role": "user", "content": 3}]},
    {"messages": [{"role": "user", "content": []}]},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x"}}]}]},
    {"messages": [{"role": "user", "content": "too long " * 1000}]},
    {"messages": [{"role": "assistant", "content": "x", "tool_calls": []}, {"role": "user", "content": "y"}]},
    {"messages": [{"role": "user", "content": "x", "name": "me"}]},
    {"chat_template_kwargs": {"a": 1}},
    {"chat_template": "{{ messages }}"},
    {"add_generation_prompt": True, "continue_final_message": True},
    {"reasoning_effort": "low"},
]
_COMPLETION_CHANGES: list[dict[str, Any]] = [
    {"prompt": ""},
    {"prompt": None},
    {"prompt": []},
    {"prompt": [[3, 4], [5]]},
    {"prompt": ["a", "b"]},
    {"prompt": ["a"]},
    {"prompt": [3, -1]},
    {"prompt": [10**8]},
    {"prompt": [True]},
    {"prompt": 3},
    {"prompt": "too long " * 1000},
    {"suffix": "x"},
    {"max_tokens": None},
]
_RAW = [
    b"",
    b"{",
    b"[]",
    b"null",
    b'{"stream": true}',
    b'{"model": "demo", "stream": true, "max_tokens": NaN}',
    b'\xff{"a": 1}',
    b'{"model": "demo", "stream": true, "prompt": "\\ud800", "messages": []}',
]


def ask(server: Server, path: str, body: Any, **headers: str) -> httpx.Response:
    return post(server, path, body, x_request_id="same-1", **headers)


def frames(response: httpx.Response) -> list[Any]:
    """The body: parsed frames with neighbouring text joined, or one JSON tree."""
    if not response.headers["content-type"].startswith("text/event-stream"):
        tree = response.json()
        if isinstance(tree, dict):
            tree.pop("created", None)
        return [tree]
    assert response.text.endswith("\n\n")
    parsed: list[Any] = []
    for event in response.text.removesuffix("\n\n").split("\n\n"):
        assert event.startswith("data: ")
        data = event.removeprefix("data: ")
        if data == "[DONE]":
            parsed.append(data)
            continue
        frame = json.loads(data)
        frame.pop("created", None)
        parsed.append(frame)
    # Several choices come in any order.
    parsed.sort(key=_index)
    found: list[Any] = []
    for frame in parsed:
        if found and _joins(found[-1], frame):
            _join(found[-1], frame)
        else:
            found.append(frame)
    return found


def _index(frame: Any) -> int:
    """Of the frame's choice; those without one come after all."""
    choices = frame.get("choices") if isinstance(frame, dict) else None
    return int(choices[0]["index"]) if choices else 1000


def _text(frame: Any) -> dict[str, Any] | None:
    """What holds a frame's text, where the frame has one choice without an end."""
    choices = frame.get("choices") if isinstance(frame, dict) else None
    if not choices or "role" in choices[0].get("delta", {}):
        return None
    return choices[0].get("delta", choices[0])  # type: ignore[no-any-return]


def _joins(before: Any, frame: Any) -> bool:
    if _text(before) is None or _text(frame) is None or "error" in frame or "logprobs" not in frame["choices"][0]:
        return False
    if _index(before) != _index(frame):
        return False
    return before["choices"][0]["finish_reason"] is None and before["choices"][0]["logprobs"] is None


def _join(before: Any, frame: Any) -> None:
    name = "content" if "delta" in frame["choices"][0] else "text"
    text = (_text(before) or {}).get(name, "") + (_text(frame) or {}).get(name, "")
    before.clear()
    before.update(frame)
    holder = _text(before)
    assert holder is not None
    holder[name] = text


def assert_same(server: Server, path: str, body: dict[str, Any]) -> httpx.Response:
    """Both ways answer alike. A salt of their own keeps either from finding the other's prefix in the cache."""
    salts = [{"cache_salt": f"{time.monotonic_ns()}"} for _ in range(2)] if "cache_salt" not in body else [{}, {}]
    ours = ask(server, path, {**body, **salts[0]})
    theirs = ask(server, path, {**body, **salts[1]}, **_BY_VLLM)
    assert ours.status_code == theirs.status_code, (body, ours.text, theirs.text)
    assert headers(ours) == headers(theirs)
    assert frames(ours) == frames(theirs), json.dumps(body)
    return ours


def headers(response: httpx.Response) -> dict[str, str]:
    return {name: value for name, value in response.headers.items() if name not in _IGNORED_HEADERS}


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("seed", range(5))
def test_streams_are_the_same(plain: Server, path: str, seed: int) -> None:
    rng = random.Random(f"{path}{seed}")
    make = chat_body if path == CHAT else completion_body
    fast, vllm = by_path(plain, "fast"), by_path(plain, "vllm")
    refused = 0
    for _ in range(25):
        answer = assert_same(plain, path, make(rng))
        refused += answer.status_code != 200
    assert refused <= 8
    # A refusal goes to vLLM, and is counted as answered by it.
    assert by_path(plain, "fast") - fast == 25 - refused
    assert by_path(plain, "vllm") - vllm == 25 + refused


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_streams_are_the_same_with_a_tool_parser(server: Server, path: str) -> None:
    rng = random.Random(path)
    make = chat_body if path == CHAT else completion_body
    fast = by_path(server, "fast")
    for _ in range(20):
        assert_same(server, path, make(rng))
    assert by_path(server, "fast") - fast >= 15


def whole_body(rng: random.Random, path: str) -> dict[str, Any]:
    """What wants no stream: as for one, with fields that only vLLM's handler knows."""
    body = chat_body(rng) if path == CHAT else completion_body(rng)
    body.pop("stream_options", None)
    del body["stream"]
    more: list[tuple[str, list[Any]]] = [
        ("stream", [False, None]),
        ("n", [2, 3]),
        ("logprobs", [True] if path == CHAT else [0, 2]),
        ("echo", [True]),
        ("return_token_ids", [True]),
        ("prompt_logprobs", [1]),
        ("use_beam_search", [True]),
        ("unknown_field", ["x"]),
    ]
    for name, values in rng.sample(more, rng.randint(0, 2)):
        body[name] = rng.choice(values)
    return body


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("seed", range(3))
def test_whole_answers_are_the_same(plain: Server, path: str, seed: int) -> None:
    rng = random.Random(f"whole{path}{seed}")
    fast, vllm = by_path(plain, "fast"), by_path(plain, "vllm")
    refused = 0
    for _ in range(25):
        answer = assert_same(plain, path, whole_body(rng, path))
        assert answer.headers["content-type"] == "application/json"
        refused += answer.status_code != 200
    assert refused <= 10
    # A body that vLLM's model refuses goes to vLLM's app; what its handler refuses does not.
    assert by_path(plain, "fast") - fast >= 25 - refused
    assert by_path(plain, "fast") - fast + by_path(plain, "vllm") - vllm == 50


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_whole_answers_of_text_alone_are_the_same(bare: Server, path: str) -> None:
    rng = random.Random(f"text{path}")
    for number in range(40):
        body = whole_body(rng, path) if number % 4 == 0 else text_body(rng, path)
        answer = assert_same(bare, path, body)
        if number % 4:
            assert answer.status_code == 200
            # As vLLM writes it, to the byte: no blanks, and every field in its place.
            theirs = ask(bare, path, body, **_BY_VLLM)
            created = [each.json()["created"] for each in (answer, theirs)]
            wanted = theirs.text.replace(f'"created":{created[1]},', f'"created":{created[0]},', 1)
            assert without_text(answer) == without_text(theirs, wanted)


def text_body(rng: random.Random, path: str) -> dict[str, Any]:
    """A request for nothing but text."""
    words = " ".join(rng.choice(_WORDS) for _ in range(rng.randint(1, 6)))
    body: dict[str, Any] = {"model": "demo", "max_tokens": rng.randint(1, 24), "temperature": 0}
    roles = rng.sample(["system", "user", "assistant", "user"], 3)
    messages = [{"role": role, "content": words} for role in roles]
    body |= {"messages": messages} if path == CHAT else {"prompt": words}
    for name, value in (("stop", ["2", "e"]), ("ignore_eos", True), ("stop_token_ids", [20, 30]), ("seed", 3)):
        if rng.random() < 0.3:
            body[name] = value
    return body


def without_text(answer: httpx.Response, text: str | None = None) -> str:
    """An answer as it was written, but for what was generated."""
    choice = answer.json()["choices"][0]
    said = json.dumps(choice.get("text", choice.get("message", {}).get("content")), ensure_ascii=False)
    return (answer.text if text is None else text).replace(said, "TEXT")


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_whole_answers_are_the_same_with_a_tool_parser(server: Server, path: str) -> None:
    rng = random.Random(f"tools{path}")
    fast = by_path(server, "fast")
    for _ in range(15):
        assert_same(server, path, whole_body(rng, path))
    assert by_path(server, "fast") - fast >= 10
    if path == CHAT:
        function = {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
        body = {
            "model": "demo",
            "messages": [{"role": "user", "content": "Hi"}],
            "max_tokens": 40,
            "temperature": 0,
            "tools": [{"type": "function", "function": function}],
        }
        for choice in ("auto", "none", "required", {"type": "function", "function": {"name": "add"}}):
            ours = ask(server, path, {**body, "tool_choice": choice})
            theirs = ask(server, path, {**body, "tool_choice": choice}, **_BY_VLLM)
            assert ours.status_code == theirs.status_code == 200
            assert without_ids(frames(ours)) == without_ids(frames(theirs))


def without_ids(trees: list[Any]) -> list[Any]:
    """Without what is drawn for each call of a tool, and what the prefix cache had of the prompt."""
    for tree in trees:
        tree["usage"].pop("prompt_tokens_details", None)
        for choice in tree["choices"]:
            for call in choice["message"].get("tool_calls", []):
                assert call.pop("id")
    return trees


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("stream", [True, False])
def test_what_is_refused_or_left_to_vllm_is_the_same(plain: Server, path: str, stream: bool) -> None:
    base: dict[str, Any] = {"model": "demo", "stream": stream, "max_tokens": 4, "temperature": 0}
    base |= {"messages": [{"role": "user", "content": "Hi"}]} if path == CHAT else {"prompt": "Hi"}
    for change in [*_CHANGES, *(_CHAT_CHANGES if path == CHAT else _COMPLETION_CHANGES)]:
        assert_same(plain, path, {**base, **change})
    for missing in ("model", "max_tokens", "messages", "prompt"):
        assert_same(plain, path, {name: value for name, value in base.items() if name != missing})


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_bodies_that_are_no_object_are_refused_by_vllm(plain: Server, path: str) -> None:
    fast = by_path(plain, "fast")
    for raw in _RAW:
        answer = ask(plain, path, raw)
        assert answer.status_code == 400, (raw, answer.text)
        assert "error" in answer.json()
    assert by_path(plain, "fast") == fast


def test_what_vllms_middleware_looks_at_is_left_to_vllm(plain: Server) -> None:
    body = {"model": "demo", "prompt": "Hi", "stream": True, "max_tokens": 2}
    fast = by_path(plain, "fast")
    answer = post(plain, COMPLETIONS, body, origin="http://elsewhere.example")
    assert answer.status_code == 200
    answer = post(plain, COMPLETIONS, json.dumps(body), content_type="text/plain")
    assert answer.status_code == 400
    assert httpx.get(plain.url + COMPLETIONS).status_code == 405
    assert by_path(plain, "fast") == fast


def test_a_body_sent_in_chunks_is_answered(plain: Server) -> None:
    body = json.dumps({"model": "demo", "prompt": "Hi", "stream": True, "max_tokens": 4}).encode()
    pieces = [body[i : i + 10] for i in range(0, len(body), 10)]
    fast = by_path(plain, "fast")
    for _ in range(3):
        answer = httpx.post(
            plain.url + COMPLETIONS, content=iter(pieces), headers={"content-type": "application/json"}, timeout=60
        )
        assert frames(answer)[-1] == "[DONE]"
    assert by_path(plain, "fast") == fast + 3


def test_a_stream_is_booked_like_any_other(plain: Server) -> None:
    who = {"endpoint": CHAT, "outcome": "ok", "model": "demo"}
    requests = plain.metric("kserve_vllm_requests_total", **who)
    tokens = plain.metric("kserve_vllm_output_tokens_total")
    first = plain.metric("kserve_vllm_time_to_first_token_seconds_count")
    body = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 9, "ignore_eos": True}
    answer = post(plain, CHAT, {**body, "stream": True})
    assert frames(answer)[-2]["choices"][0]["finish_reason"] == "length"
    until(lambda: plain.metric("kserve_vllm_requests_total", **who) == requests + 1, 5)
    assert plain.metric("kserve_vllm_output_tokens_total") == tokens + 9
    assert plain.metric("kserve_vllm_time_to_first_token_seconds_count") == first + 1


def grpc_answers(server: Server, prompt: str, named: bool, **parameters: Any) -> list[Any]:
    """Messages of one streamed request; with the output named, the general way has to answer."""
    request = service_pb2.ModelInferRequest(model_name="demo", id="7")
    tensor = request.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    tensor.contents.bytes_contents.append(prompt.encode())
    for name, value in {"stream": True, **parameters}.items():
        kind = {bool: "bool_param", int: "int64_param", str: "string_param"}[type(value)]
        setattr(request.parameters[name], kind, value)
    if named:
        request.outputs.add(name="text_output")
    with grpc.insecure_channel(server.grpc_address) as channel:
        return list(service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer(iter([request]), timeout=60))


def joined(answers: list[Any]) -> tuple[str, list[Any]]:
    """The whole text, and the kinds of messages that came, each once, in their order."""
    text = b""
    kinds: list[Any] = []
    for answer in answers:
        response = answer.infer_response
        for raw in response.raw_output_contents:
            assert int.from_bytes(raw[:4], "little") == len(raw) - 4
            text += raw[4:]
        del response.raw_output_contents[:]
        if not kinds or kinds[-1] != answer:
            kinds.append(answer)
    return text.decode(), kinds


@pytest.mark.parametrize(
    "parameters",
    [
        {"max_tokens": 12, "temperature": 0},
        {"max_tokens": 1, "temperature": 0, "ignore_eos": True},
        {"max_tokens": 20, "temperature": 0, "triton_enable_empty_final_response": True},
        {"max_tokens": 9, "seed": 4, "stop": '[" "]', "apply_chat_template": True},
        {"max_tokens": 0},
        {"max_tokens": 12, "unknown": 1},
        {"max_tokens": 12, "temperature": -1},
        {"max_tokens": 12, "logit_bias": '{"99999999": 1}'},
    ],
)
def test_a_grpc_stream_is_the_same(plain: Server, parameters: dict[str, Any]) -> None:
    for prompt in ("17 + 25 =", "Grüße 🙂", "too long " * 1000):
        fast, slow = (joined(grpc_answers(plain, prompt, named, **parameters)) for named in (False, True))
        assert fast == slow
        assert fast[0] or fast[1][0].error_message


def test_every_frame_comes_when_its_token_does(plain: Server) -> None:
    body = {"model": "demo", "prompt": "Hi", "max_tokens": 60, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", plain.url + COMPLETIONS, json=body, timeout=60) as response:
        chunks = [chunk for chunk in response.iter_raw() if chunk]
    assert len(chunks) > 15


def long_body(path: str, stream: bool) -> dict[str, Any]:
    """A request that its client will not wait for."""
    asked = {"messages": [{"role": "user", "content": "Hi"}]} if path == CHAT else {"prompt": "Hi"}
    return {"model": "demo", "max_tokens": 900, "ignore_eos": True, "stream": stream, **asked}


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_leaving_before_a_whole_answer_aborts_within_a_second(plain: Server, path: str) -> None:
    assert_unharmed(plain)
    before = plain.metric("kserve_vllm_requests_total", outcome="cancelled")
    fast = by_path(plain, "fast")
    done = finished(plain)
    raw = json.dumps(long_body(path, stream=False)).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(raw)}\r\n\r\n"
    with contextlib.ExitStack() as left:
        for _ in range(16):
            sock = left.enter_context(socket.create_connection(("127.0.0.1", plain.http_port)))
            sock.sendall(head.encode() + raw)
        until(lambda: running(plain) == 16, 10)
    assert until(lambda: running(plain) == 0, 1.0) <= 1.0
    assert by_path(plain, "fast") == fast + 16
    until(lambda: plain.metric("kserve_vllm_requests_total", outcome="cancelled") == before + 16, 5)
    assert finished(plain) == done, "a request ran to its end"
    assert_unharmed(plain)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_leaving_aborts_within_a_second(plain: Server, path: str) -> None:
    assert_unharmed(plain)
    before = plain.metric("kserve_vllm_requests_total", outcome="cancelled")
    fast = by_path(plain, "fast")
    done = finished(plain)
    body = long_body(path, stream=True)
    with httpx.Client(base_url=plain.url, timeout=60) as client:
        open_streams = [client.send(client.build_request("POST", path, json=body), stream=True) for _ in range(16)]
        for response in open_streams:
            next(response.iter_lines())
        assert by_path(plain, "fast") == fast + 16
        for response in open_streams:
            response.close()
        assert until(lambda: running(plain) == 0, 1.0) <= 1.0
    assert finished(plain) == done, "a request ran to its end"
    until(lambda: plain.metric("kserve_vllm_requests_total", outcome="cancelled") == before + 16, 5)
    assert_unharmed(plain)


def test_a_client_that_reads_slowly_gets_everything(plain: Server) -> None:
    """With frames larger than the socket's buffers; others are served meanwhile."""
    body = json.dumps(
        {
            "model": "demo",
            "prompt": "Hi",
            "max_tokens": 1000,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
    ).encode()
    fast = by_path(plain, "fast")
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        sock.connect(("127.0.0.1", plain.http_port))
        head = (
            f"POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            f"x-request-id: {'i' * 120}\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        sock.sendall(head.encode() + body)
        until(lambda: by_path(plain, "fast") == fast + 1 and running(plain) == 0, 30)
        assert post(plain, COMPLETIONS, {"model": "demo", "prompt": "Hi"}).status_code == 200
        received = b""
        sock.settimeout(20)
        while part := sock.recv(1 << 16):
            received += part
    assert b"data: [DONE]\n\n" in received
    usage = [json.loads(line[6:]) for line in received.split(b"\n") if line.startswith(b'data: {"id"')][-1]["usage"]
    assert usage["completion_tokens"] == 1000
    assert_unharmed(plain)


def test_an_engine_that_dies_in_mid_stream_is_told_alike(plain: Server) -> None:
    """The last test of this server."""
    body = {"model": "demo", "prompt": "Hi", "max_tokens": 1000, "ignore_eos": True, "stream": True}
    header = {name.replace("_", "-"): value for name, value in _BY_VLLM.items()}
    with httpx.Client(base_url=plain.url, timeout=60) as client, ThreadPoolExecutor(2) as pool:
        sent = [client.build_request("POST", COMPLETIONS, json=body, headers=more) for more in ({}, header)]
        streams = [client.send(request, stream=True) for request in sent]
        lines = [response.iter_lines() for response in streams]
        for each in lines:
            next(each)
        whole = [pool.submit(ask, plain, COMPLETIONS, {**body, "stream": False}, **more) for more in ({}, _BY_VLLM)]
        until(lambda: running(plain) == 4, 10)
        engine = next(child for child in plain.children("EngineCore"))
        psutil.Process(engine.pid).kill()
        ends = [[line for line in each if line][-2:] for each in lines]
        ours, theirs = (each.result() for each in whole)
    assert ours.status_code == theirs.status_code >= 500
    assert frames(ours) == frames(theirs)
    assert ends[0] == ends[1]
    assert "error" in json.loads(ends[0][0].removeprefix("data: "))
    assert ends[0][1] == "data: [DONE]"


def test_the_fast_path_can_be_switched_off() -> None:
    running = Server(["--demo", "--model-name", "demo", "--fast-path", "false"])
    try:
        running.wait_ready()
        answer = post(running, COMPLETIONS, {"model": "demo", "prompt": "Hi", "stream": True, "max_tokens": 4})
        assert frames(answer)[-1] == "[DONE]"
        assert post(running, COMPLETIONS, {"model": "demo", "prompt": "Hi", "max_tokens": 4}).status_code == 200
        assert by_path(running, "fast") == 0
        # gRPC is then served by the grpcio package.
        text, kinds = joined(grpc_answers(running, "17 + 25 =", False, max_tokens=8, temperature=0))
        assert text
        assert [kind.error_message for kind in kinds] == [""] * len(kinds)
    finally:
        running.stop()
