"""Requests and checks that the tests of several protocols share."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import httpx

from tests.support import Server

SUM = "17 + 25 ="
"""A prompt that the demo model continues with ` 42`."""
GREEDY: Mapping[str, Any] = {"temperature": 0.0, "max_tokens": 16}


def tensor(name: str, data: Any, datatype: str = "BYTES", shape: Sequence[int] | None = None) -> dict[str, Any]:
    """A V2 input tensor in JSON."""
    return {"name": name, "datatype": datatype, "shape": list(shape) if shape else [len(data)], "data": data}


def texts(*prompts: str, **parameters: Any) -> dict[str, Any]:
    """A V2 request of prompts, greedy unless `parameters` say otherwise."""
    return {"inputs": [tensor("text_input", list(prompts))], "parameters": {**GREEDY, **parameters}}


def post(server: Server, path: str, body: Any, **headers: str) -> httpx.Response:
    """POST JSON (or bytes, as they are)."""
    raw = body if isinstance(body, (bytes, str)) else None
    headers = {"content-type": "application/json", **{name.replace("_", "-"): v for name, v in headers.items()}}
    return httpx.post(
        server.url + path, content=raw, json=None if raw is not None else body, headers=headers, timeout=120
    )


def infer(server: Server, body: Any, model: str = "demo") -> dict[str, Any]:
    """Answer of V2 infer, which must succeed."""
    response = post(server, f"/v2/models/{model}/infer", body)
    assert response.status_code == 200, response.text
    tree: dict[str, Any] = response.json()
    return tree


def outputs(answer: Mapping[str, Any]) -> dict[str, Any]:
    """Output tensors' data by name."""
    return {output["name"]: output["data"] for output in answer["outputs"]}


def until(condition: Callable[[], bool], within_s: float) -> float:
    """Wait for `condition`; the seconds that took.

    Raises:
        AssertionError: it took longer than `within_s`.
    """
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < within_s, f"not within {within_s:g} s"
        time.sleep(0.02)
    return time.monotonic() - began


def running(server: Server) -> float:
    """Requests that the engine works on or has queued."""
    return server.metric("vllm:num_requests_running") + server.metric("vllm:num_requests_waiting")


def assert_unharmed(server: Server) -> None:
    """The server is ready, and nothing is in flight at the edge or in the engine."""
    assert server.health("/v2/health/ready")["ready"]
    # The scrape itself does not pass enforcement.
    until(lambda: server.metric("kserve_vllm_requests_in_flight") == 0 and running(server) == 0, 5)
