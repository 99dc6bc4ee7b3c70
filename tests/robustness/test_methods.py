"""Methods and spellings of paths through the whole edge, to apps of FastAPI whose routes are bound."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from starlette.middleware.cors import CORSMiddleware

from tests.robustness.test_places import middleware


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
