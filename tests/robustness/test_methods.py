"""Methods and spellings of paths through the whole edge, to apps of FastAPI whose routes are bound."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from starlette.middleware.cors import CORSMiddleware

from kserve_vllm.protocols.http.page import Asset
from tests.http2 import Client
from tests.robustness.test_places import middleware
from tests.robustness.wire import ask, close_clients, served, statuses


def apps() -> tuple[FastAPI, FastAPI]:
    """Ours and vLLM's, in small."""
    ours, vllm = FastAPI(), FastAPI()
    vllm.add_middleware(CORSMiddleware, allow_origins=["*"])

    @ours.get("/v2/models/{model_name:path}/ready")
    async def ready(model_name: str) -> str:
        return model_name

    @ours.post("/v2/models/{model_name:path}/infer")
    async def infer(model_name: str, request: Request) -> list[str]:
        return [model_name, (await request.body()).decode()]

    @vllm.post("/v1/completions")
    async def complete(body: dict[str, Any]) -> dict[str, Any]:
        return body

    return ours, vllm


@pytest.mark.parametrize(
    ("method", "path", "status", "text"),
    [
        ("GET", "/v2/models/org%2Fdemo/ready", 200, '"org/demo"'),
        ("HEAD", "/v2/models/demo/ready", 200, ""),
        ("POST", "/v2/models/demo/infer", 200, '["demo","{\\"a\\":1}"]'),
        ("POST", "/v1/completions", 200, '{"a":1}'),
        ("POST", "/v1/completions/", 200, '{"a":1}'),
        ("POST", "/openai/v1/completions", 200, '{"a":1}'),
        ("POST", "/openai/v1/completions%0A", 404, None),
        ("POST", "/v1/completions%0A", 404, None),
        ("OPTIONS", "/v1/completions", 405, None),
        ("GET", "/v1/completions", 405, None),
        ("POST", "/v2/models/demo/ready", 405, None),
        ("POST", "/v2/models/demo/infer%0A", 404, None),
    ],
)
def test_a_method_and_a_path_are_answered_as_they_are_meant(
    method: str, path: str, status: int, text: str | None
) -> None:
    async def ask() -> httpx.Response:
        found = middleware()
        found.attach(*apps())
        async with httpx.AsyncClient(transport=httpx.ASGITransport(found), base_url="http://edge") as client:
            return await client.request(method, path, json={"a": 1} if method == "POST" else None)

    answer = asyncio.run(ask())
    assert answer.status_code == status
    assert ("allow" in answer.headers) is (status == 405)
    if text is not None:
        assert answer.text == text


@pytest.mark.parametrize("target", [b"*", b"http://edge"])
def test_an_options_of_the_server_as_a_whole_is_answered(target: bytes) -> None:
    # RFC 9110, 9.3.7; RFC 9112, 3.2.4.
    with served(middleware()) as server:
        asked = b"OPTIONS " + target + b" HTTP/1.1\r\nHost: edge\r\n\r\n"
        last = b"OPTIONS * HTTP/1.1\r\nHost: edge\r\nConnection: close\r\n\r\n"
        answer = ask(server.port, asked + last)
        assert statuses(answer) == [200, 200]
        assert answer.lower().count(b"allow: delete, get, head, options, post\r\n") == 2
        assert answer.lower().count(b"content-length: 0\r\n") == 2
        for method in (b"GET", b"POST"):
            assert statuses(ask(server.port, last.replace(b"OPTIONS", method))) == [400]
        client = Client(server.port)
        assert client.answer(client.begin("OPTIONS", "*")).headers["allow"] == "DELETE, GET, HEAD, OPTIONS, POST"
        assert client.answer(client.begin("GET", "*")).status == 400
    close_clients()


def asked(method: str, path: str, **headers: str) -> httpx.Response:
    """An answer of the edge with a page."""

    async def run() -> httpx.Response:
        found = middleware({"/ui": Asset(b"<p>" * 1000, ((b"content-type", b"text/html"),))})
        found.attach(*apps())
        async with httpx.AsyncClient(transport=httpx.ASGITransport(found), base_url="http://edge") as client:
            return await client.request(method, path, headers={"accept-encoding": "identity", **headers})

    return asyncio.run(run())


@pytest.mark.parametrize("path", ["/ui", "/health", "/ping", "/", "/version", "/metrics"])
def test_what_is_open_to_everyone_takes_a_get_and_a_head_alone(path: str) -> None:
    assert asked("GET", path).status_code == 200
    for method in ("POST", "DELETE", "OPTIONS"):
        answer = asked(method, path)
        assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD")


def test_a_head_has_the_fields_of_its_get() -> None:
    # RFC 9110, 8.6 and 9.3.2: the length of what a GET would have got.
    plain = asked("GET", "/ui")
    assert (plain.headers["content-length"], plain.headers["vary"]) == ("3000", "accept-encoding")
    get, head = (asked(method, "/ui", **{"accept-encoding": "gzip"}) for method in ("GET", "HEAD"))
    assert get.headers["content-encoding"] == "gzip"
    assert int(get.headers["content-length"]) < 3000
    assert head.headers == get.headers
