"""The generate extension: plain JSON in, plain JSON or server-sent events out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.clients import GREEDY, SUM, infer, outputs, post, texts
from tests.support import Server

PATHS = ["/v2/models/demo/generate", "/v2/models/demo/versions/1/generate"]


def body(text: str = SUM, **parameters: Any) -> dict[str, Any]:
    return {"text_input": text, "parameters": {**GREEDY, **parameters}}


def events(server: Server, path: str, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    with httpx.stream("POST", server.url + path, json=request, timeout=60) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        for line in response.iter_lines():
            if line:
                assert line.startswith("data: ")
                yield json.loads(line.removeprefix("data: "))


@pytest.mark.parametrize("path", PATHS)
def test_a_prompt_is_continued(server: Server, path: str) -> None:
    answer = post(server, path, body()).json()
    assert set(answer) == {"model_name", "model_version", "text_output"}
    assert (answer["model_name"], answer["model_version"]) == ("demo", "1")
    assert "42" in answer["text_output"]


@pytest.mark.parametrize("path", [f"{path}_stream" for path in PATHS])
def test_pieces_are_streamed_as_events(server: Server, path: str) -> None:
    pieces = list(events(server, path, body(max_tokens=20, ignore_eos=True)))
    assert len(pieces) > 5
    whole = post(server, PATHS[0], body(max_tokens=20, ignore_eos=True)).json()["text_output"]
    assert "".join(piece["text_output"] for piece in pieces) == whole
    assert {piece["model_name"] for piece in pieces} == {"demo"}


def test_details_give_the_finish_reason_and_logprobs(server: Server) -> None:
    for more in ({}, {"return_logprobs": True}):
        answer = post(server, PATHS[0], body(details=True, ignore_eos=True, **more)).json()
        assert answer["details"]["finish_reason"] == "length"
        assert len(answer["details"]["logprobs"]) == GREEDY["max_tokens"]
        assert set(answer["details"]["logprobs"][0]) == {"id", "text", "logprob", "special"}
    pieces = list(events(server, PATHS[0] + "_stream", body(details=True, ignore_eos=True)))
    reasons = [piece["details"]["finish_reason"] for piece in pieces]
    assert reasons == [None] * (len(pieces) - 1) + ["length"]


def test_the_id_comes_back(server: Server) -> None:
    assert post(server, PATHS[0], {**body(), "id": "mine"}).json()["id"] == "mine"
    assert {piece["id"] for piece in events(server, PATHS[0] + "_stream", {**body(), "id": "mine"})} == {"mine"}


def test_n_gives_a_list_of_texts(server: Server) -> None:
    answer = post(server, PATHS[0], body(n=2, temperature=1.0)).json()
    assert len(answer["text_output"]) == 2


def test_tritons_fields_are_taken(server: Server) -> None:
    plain = outputs(infer(server, texts(SUM)))["text_output"][0]
    for sampling in (dict(GREEDY), json.dumps(GREEDY)):
        request = {"text_input": SUM, "sampling_parameters": sampling, "stream": False}
        assert post(server, PATHS[0], request).json()["text_output"] == SUM + plain
        request["exclude_input_in_output"] = True
        request["return_num_output_tokens"] = True
        answer = post(server, PATHS[0], request).json()
        assert answer["text_output"] == plain
        assert 0 < answer["num_output_tokens"] <= GREEDY["max_tokens"]


def test_an_adapter_generates_under_its_name(server: Server) -> None:
    assert post(server, "/v2/models/upper/generate", body()).json()["model_name"] == "upper"


@pytest.mark.parametrize("path", ["generate", "generate_stream"])
@pytest.mark.parametrize(
    ("request_body", "sentence"),
    [
        ({}, "text_input"),
        ({"text_input": 3}, "text_input"),
        ({"text_input": ["a"]}, "text_input"),
        ({"text_input": "a", "parameters": []}, "parameters"),
        ({"text_input": "a", "parameters": {"details": 1}}, "details"),
        ({"text_input": "a", "parameters": {"max_tokens": "many"}}, "max_tokens"),
        ({"text_input": "a", "parameters": {"n": []}}, "n must be an integer"),
        ({"text_input": "a", "parameters": {"temperatur": 1}}, "did you mean 'temperature'"),
        ({"text_input": "a", "max_tokens": 4}, "max_tokens"),
        ({"text_input": "a", "id": 4}, "id"),
        ({"text_input": ""}, "prompt"),
        ({"text_input": "word " * 1100}, "context"),
    ],
)
def test_what_is_wrong_is_named_before_anything_is_streamed(
    server: Server, path: str, request_body: dict[str, Any], sentence: str
) -> None:
    answer = post(server, f"/v2/models/demo/{path}", request_body)
    assert answer.status_code == 400
    assert set(answer.json()) == {"error"}
    assert sentence in answer.json()["error"]
