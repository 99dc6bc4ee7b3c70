"""Browsers, compressed bodies and CloudEvents, on every route alike; and a clean end."""

from __future__ import annotations

import gzip
import json
import zlib
from typing import Any

import httpx
import pytest
from cloudevents.conversion import to_binary, to_structured
from cloudevents.http import CloudEvent, from_http

from tests.clients import GREEDY, SUM, post, texts
from tests.support import DEMO, Server

ORIGIN = {"origin": "https://chat.example"}
ASKED = [
    ("GET", "/v1/models", None),
    ("GET", "/v1/models/demo", None),
    ("GET", "/openai/v1/models", None),
    ("GET", "/v2", None),
    ("GET", "/v2/models/demo", None),
    ("GET", "/v2/health/ready", None),
    ("GET", "/health", None),
    ("GET", "/version", None),
    ("GET", "/metrics", None),
    ("GET", "/nothing/here", None),
    ("POST", "/v2/models/demo/infer", texts(SUM, max_tokens=1)),
    ("POST", "/v2/models/demo/generate_stream", {"text_input": SUM, "parameters": {"max_tokens": 2}}),
    ("POST", "/v2/models/nobody/infer", {}),
    ("POST", "/v1/models/demo:predict", {"instances": [SUM], "parameters": {"max_tokens": 1}}),
    (
        "POST",
        "/v1/chat/completions",
        {"model": "demo", "messages": [{"role": "user", "content": SUM}], "max_tokens": 1},
    ),
    ("POST", "/v1/completions", {"model": "demo", "prompt": SUM, "max_tokens": 2, "stream": True}),
    ("POST", "/v1/messages", {"model": "demo"}),
]


@pytest.mark.parametrize(("method", "path", "body"), ASKED, ids=[f"{m} {p}" for m, p, _ in ASKED])
def test_a_browser_may_read_every_answer(server: Server, method: str, path: str, body: Any) -> None:
    answer = httpx.request(method, server.url + path, json=body, headers=ORIGIN, timeout=60)
    assert answer.headers.get_list("access-control-allow-origin") == [ORIGIN["origin"]]
    assert "x-request-id" in answer.headers["access-control-expose-headers"]
    plain = httpx.request(method, server.url + path, json=body, timeout=60)
    assert "access-control-allow-origin" not in plain.headers
    assert plain.status_code == answer.status_code
    asked = {"access-control-request-method": method, "access-control-request-headers": "authorization,content-type"}
    preflight = httpx.options(server.url + path, headers={**ORIGIN, **asked})
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == ORIGIN["origin"]
    assert method in preflight.headers["access-control-allow-methods"]
    assert "authorization" in preflight.headers["access-control-allow-headers"].lower()
    other = {"origin": "https://elsewhere.example"}
    assert (
        "access-control-allow-origin" not in httpx.request(method, server.url + path, json=body, headers=other).headers
    )
    assert httpx.options(server.url + path, headers={**other, **asked}).status_code == 400


COMPRESSED = [each for each in ASKED if each[0] == "POST" and each[1] != "/v2/models/nobody/infer"]


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
@pytest.mark.parametrize(("method", "path", "body"), COMPRESSED, ids=[p for _, p, _ in COMPRESSED])
def test_a_compressed_body_is_read_on_every_route(
    server: Server, coding: str, method: str, path: str, body: Any
) -> None:
    pack = gzip.compress if coding == "gzip" else zlib.compress
    headers = {"content-encoding": coding, "content-type": "application/json"}
    answer = httpx.post(server.url + path, content=pack(json.dumps(body).encode()), headers=headers, timeout=60)
    assert answer.status_code == post(server, path, body).status_code, answer.text
    broken = httpx.post(server.url + path, content=b"\x1f\x8b nonsense", headers=headers, timeout=60)
    assert broken.status_code == 400
    assert "inflated" in broken.text
    other = httpx.post(server.url + path, content=b"x", headers={**headers, "content-encoding": "br"}, timeout=60)
    assert other.status_code == 415
    assert other.headers["accept-encoding"] == "gzip, deflate"


@pytest.mark.parametrize("path", ["/v1/completions", "/v2/models/demo/infer", "/v1/models/demo:predict"])
def test_a_body_is_not_inflated_beyond_the_bound(server: Server, path: str) -> None:
    bomb = gzip.compress(bytes(64 << 20))  # the server takes 4 MiB
    headers = {"content-encoding": "gzip", "content-type": "application/json"}
    answer = httpx.post(server.url + path, content=bomb, headers=headers, timeout=60)
    assert answer.status_code == 413
    assert "4 MiB" in answer.text


def test_whole_answers_are_compressed_where_asked_for(server: Server) -> None:
    for path in ("/v2/models/demo", "/openapi.json", "/metrics"):
        plain = httpx.get(server.url + path, headers={"accept-encoding": "identity"}, timeout=60)
        assert "content-encoding" not in plain.headers
        for coding in ("gzip", "deflate"):
            packed = httpx.get(server.url + path, headers={"accept-encoding": coding}, timeout=60)
            assert packed.headers["content-encoding"] == coding
            assert int(packed.headers["content-length"]) < len(plain.content)
            if path != "/metrics":
                assert packed.content == plain.content
    body = {"text_input": SUM, "parameters": {**GREEDY}}
    stream = post(server, "/v2/models/demo/generate_stream", body, accept_encoding="gzip")
    assert "content-encoding" not in stream.headers
    chat = {"model": "demo", "prompt": SUM, "stream": True, "max_tokens": 200, "ignore_eos": True}
    assert "content-encoding" not in post(server, "/v1/completions", chat, accept_encoding="gzip").headers


ATTRIBUTES = {"type": "com.example.ask", "source": "https://example.com", "id": "event-1"}


@pytest.mark.parametrize("write", [to_binary, to_structured])
def test_predict_takes_and_answers_events(server: Server, write: Any) -> None:
    data = {"instances": [SUM], "parameters": dict(GREEDY)}
    headers, body = write(CloudEvent(ATTRIBUTES, data))
    answer = httpx.post(f"{server.url}/v1/models/demo:predict", content=body, headers=headers, timeout=60)
    assert answer.status_code == 200, answer.text
    event = from_http(dict(answer.headers), answer.content)
    assert event["type"] == "io.kserve.inference.response"
    assert event["source"] == "io.kserve.inference.demo"
    assert event["id"] != "event-1"
    plain = post(server, "/v1/models/demo:predict", data).json()
    found = event.data
    assert (json.loads(found) if isinstance(found, (bytes, str)) else found) == plain


def test_an_event_that_lacks_something_is_refused(server: Server) -> None:
    headers, body = to_binary(CloudEvent(ATTRIBUTES, {"instances": [SUM]}))
    for name in ("ce-id", "ce-source", "ce-type"):
        less = {key: value for key, value in headers.items() if key != name}
        answer = httpx.post(f"{server.url}/v1/models/demo:predict", content=body, headers=less)
        assert answer.status_code == 400
        assert name.removeprefix("ce-") in answer.json()["error"]
    structured = {"content-type": "application/cloudevents+json"}
    for wrong in (b"{", b"[]", b"{}", json.dumps({**ATTRIBUTES, "specversion": "1.0", "data_base64": "*"}).encode()):
        answer = httpx.post(f"{server.url}/v1/models/demo:predict", content=wrong, headers=structured)
        assert answer.status_code == 400
        assert list(answer.json()) == ["error"]


def test_the_loggers_id_is_handed_through(server: Server) -> None:
    body = {"instances": [SUM], "parameters": {"max_tokens": 1}}
    assert post(server, "/v1/models/demo:predict", body, ce_id="logged").headers["ce-id"] == "logged"
    assert post(server, "/v2/models/demo/infer", texts(SUM), ce_id="logged").headers["ce-id"] == "logged"


def test_a_clean_end_is_no_error() -> None:
    server = Server(DEMO)
    try:
        server.wait_ready()
        for stream in (True, False):
            body = {"model": "demo", "prompt": SUM, "max_tokens": 200, "ignore_eos": True, "stream": stream}
            assert post(server, "/v1/completions", body).status_code == 200
            assert post(server, "/v1/completions", {**body, "n": 2}).status_code == 200
        assert post(server, "/v2/models/demo/generate_stream", {"text_input": SUM}).status_code == 200
    finally:
        before = len(server.log)
        server.process.terminate()
        code = server.process.wait(60)
        said = server.log[before:]
        server.stop()
    assert code == 0
    assert "EngineDeadError" not in said
    assert '"level":"error"' not in said, said[-3000:]
