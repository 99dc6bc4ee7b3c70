"""KServe V1: instances in, predictions out."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.clients import GREEDY, SUM, infer, outputs, post, texts
from tests.support import Server

PATH = "/v1/models/demo:predict"


def predict(server: Server, instances: list[Any], model: str = "demo", **parameters: Any) -> list[Any]:
    body = {"instances": instances, "parameters": {**GREEDY, **parameters}}
    answer = post(server, f"/v1/models/{model}:predict", body)
    assert answer.status_code == 200, answer.text
    assert set(answer.json()) == {"predictions"}
    predictions: list[Any] = answer.json()["predictions"]
    return predictions


def test_strings_are_answered_with_strings(server: Server) -> None:
    prompts = [SUM, "3 + 4 ="]
    answers = predict(server, prompts)
    assert "42" in answers[0]
    assert answers == outputs(infer(server, texts(*prompts)))["text_output"]


def test_objects_are_answered_with_objects(server: Server) -> None:
    (answer,) = predict(server, [{"prompt": SUM, "max_tokens": 3, "ignore_eos": True}])
    assert answer["finish_reason"] == "length"
    assert answer["completion_tokens"] == 3
    assert answer["prompt_tokens"] > 3
    assert answer["text"] == predict(server, [SUM], max_tokens=3, ignore_eos=True)[0]


def test_messages_go_through_the_chat_template(server: Server) -> None:
    messages = [{"role": "user", "content": "What is 17 + 25?"}]
    (answer,) = predict(server, [{"messages": messages, "max_tokens": 24}])
    chat = {"model": "demo", "messages": messages, "temperature": 0, "max_tokens": 24}
    choice = post(server, "/v1/chat/completions", chat).json()["choices"][0]
    assert "42" in answer["text"]
    assert (answer["text"], answer["finish_reason"]) == (choice["message"]["content"], choice["finish_reason"])


def test_strings_and_objects_mix_in_order(server: Server) -> None:
    first, second = predict(server, [{"prompt": "3 + 4 ="}, SUM])
    assert first["text"] == predict(server, ["3 + 4 ="])[0]
    assert second == predict(server, [SUM])[0]


def test_n_above_1_answers_an_instance_with_a_list(server: Server) -> None:
    ((one, two),) = predict(server, ["Hello"], n=2, temperature=1.5)
    assert isinstance(one, str)
    assert isinstance(two, str)


def test_openais_newer_name_of_max_tokens_is_taken(server: Server) -> None:
    (answer,) = predict(server, [{"prompt": SUM, "max_completion_tokens": 2, "ignore_eos": True}])
    assert answer["completion_tokens"] == 2


@pytest.mark.parametrize("model", ["upper", "org/demo"])
def test_other_names_predict_too(server: Server, model: str) -> None:
    assert predict(server, [SUM], model=model)[0]


def test_models_are_listed_and_their_state_told(server: Server) -> None:
    assert {"demo", "org/demo", "upper", "french"} == set(httpx.get(server.url + "/v1/models").json()["models"])
    state = httpx.get(server.url + "/v1/models/demo").json()
    assert (state["name"], state["ready"]) == ("demo", True)


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({}, "instances"),
        ({"instances": "text"}, "instances"),
        ({"instances": []}, "instances has 0 entries"),
        ({"instances": ["a"] * 513}, "instances has 513 entries"),
        ({"instances": [3]}, "instances[0]"),
        ({"instances": ["a", None]}, "instances[1]"),
        ({"instances": [{}]}, "instances[0]"),
        ({"instances": [{"prompt": "a", "messages": []}]}, "instances[0]"),
        ({"instances": [{"prompt": 3}]}, "instances[0].prompt"),
        ({"instances": [{"messages": "hello"}]}, "instances[0].messages"),
        ({"instances": [{"messages": [{"role": 3}]}]}, "messages"),
        ({"instances": ["a"], "parameters": []}, "parameters"),
        ({"instances": ["a"], "parameters": "x"}, "parameters"),
        ({"instances": ["a"], "parameters": {"nonsense": 1}}, "nonsense"),
        ({"instances": [{"prompt": "a", "top_p": 7}]}, "top_p"),
        ({"instances": [""]}, "prompt"),
        ({"instances": ["word " * 1100]}, "context"),
    ],
)
def test_what_is_wrong_is_named(server: Server, body: dict[str, Any], sentence: str) -> None:
    answer = post(server, PATH, body)
    assert answer.status_code == 400
    assert set(answer.json()) == {"error"}
    assert sentence in answer.json()["error"]
