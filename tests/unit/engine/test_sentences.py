"""What pydantic finds becomes one sentence that names the field as the client wrote it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field, TypeAdapter, ValidationError, field_validator, model_validator

from kserve_vllm.core.errors import InvalidRequest
from kserve_vllm.engine import requests
from kserve_vllm.engine.faults import sentence_of_wrong_data
from kserve_vllm.engine.hooks.validation_messages import plain_words, sentence_of_a_part, sentence_of_validation


class Text(BaseModel):
    type: Literal["text"]
    text: str


class Image(BaseModel):
    type: Literal["image"]
    url: str
    width: int


class Body(BaseModel):
    prompt: str | list[int] | list[list[int]]
    n: int = Field(1, ge=1, le=8)
    heat: float | None = None
    kind: Literal["a", "b"] = "a"
    parts: list[Text | Image] = []
    tagged: Annotated[Text | Image, Field(discriminator="type")] | None = None
    bias: dict[str, float] | None = None
    few: list[str] = Field([], max_length=2)
    ends: str | Annotated[list[str], Field(max_length=2)] = []
    stream: bool = False

    @field_validator("heat")
    @classmethod
    def check(cls, value: float | None) -> float | None:
        if value is not None and value < 0:
            raise ValueError("heat can't be below 0\nand more")
        return value


CASES: list[tuple[Any, str, str | None]] = [
    ({}, "prompt is missing", "prompt"),
    ({"prompt": 1}, "prompt must be a string or a list", "prompt"),
    ({"prompt": ["a"]}, "prompt[0] must be an integer or a list", "prompt[0]"),
    ({"prompt": [[1, "a"]]}, "prompt[0][1] must be an integer", "prompt[0][1]"),
    ({"prompt": "a", "n": "two"}, "n must be an integer", "n"),
    ({"prompt": "a", "n": 2.5}, "n must be an integer", "n"),
    ({"prompt": "a", "n": 0}, "n must be at least 1", "n"),
    ({"prompt": "a", "n": 9}, "n must be at most 8", "n"),
    ({"prompt": "a", "heat": "hot"}, "heat must be a number", "heat"),
    ({"prompt": "a", "heat": -1}, "heat can't be below 0", "heat"),
    ({"prompt": "a", "kind": "c"}, 'kind must be "a" or "b"', "kind"),
    ({"prompt": "a", "parts": [{"type": "text"}]}, "parts[0].text is missing", "parts[0].text"),
    ({"prompt": "a", "parts": [{"type": "image", "url": "u"}]}, "parts[0].width is missing", "parts[0].width"),
    ({"prompt": "a", "tagged": {"type": "x"}}, 'tagged must be "text", "image"', "tagged"),
    ({"prompt": "a", "tagged": {}}, "tagged.type is missing", "tagged.type"),
    ({"prompt": "a", "bias": {"7": "x"}}, "bias.7 must be a number", "bias.7"),
    ({"prompt": "a", "bias": []}, "bias must be an object", "bias"),
    ({"prompt": "a", "few": ["a"] * 3}, "few has more than 2 elements", "few"),
    ({"prompt": "a", "ends": ["a"] * 3}, "ends has more than 2 elements", "ends"),
    ({"prompt": "a", "ends": 3}, "ends must be a string or a list", "ends"),
    ({"prompt": "a", "stream": "maybe"}, "stream must be true or false", "stream"),
    ([], "the body must be a JSON object", "the body"),
    ("text", "the body must be a JSON object", "the body"),
]


@pytest.mark.parametrize(("body", "sentence", "field"), CASES, ids=[str(body)[:50] for body, _, _ in CASES])
def test_a_fault_is_one_sentence(body: Any, sentence: str, field: str | None) -> None:
    with pytest.raises(ValidationError) as refused:
        Body.model_validate(body)
    assert sentence_of_validation(refused.value.errors(), body) == (sentence, field)


def test_places_as_fastapi_writes_them_begin_with_body() -> None:
    found = [{"type": "missing", "loc": ("body", "prompt"), "msg": "Field required", "input": {}}]
    assert sentence_of_validation(found, {}) == ("prompt is missing", "prompt")
    # A value that pydantic reads in another form than it was written in.
    lost = [{"type": "string_type", "loc": ("body", "Assistant", 0, "function", "arguments"), "msg": "", "input": None}]
    told = "a part of the request has the wrong form: arguments must be a string"
    assert sentence_of_validation(lost, {"messages": []}) == (told, None)
    broken = [{"type": "json_invalid", "loc": ("body", 1), "msg": "JSON decode error", "ctx": {"error": "Expecting"}}]
    assert sentence_of_validation(broken, "{x") == ("the body is not valid JSON: Expecting", None)
    assert sentence_of_validation(["Only JSON is taken"], None) == ("Only JSON is taken", None)
    assert sentence_of_validation([], None)[1] is None


def test_a_long_value_is_not_echoed() -> None:
    body = {"prompt": "a", "kind": "c" * 100_000}
    with pytest.raises(ValidationError) as refused:
        Body.model_validate(body)
    assert len(sentence_of_validation(refused.value.errors(), body)[0]) < 400


def test_a_part_whose_place_is_not_known_is_named_by_its_field() -> None:
    for value, sentence in (
        ([{"type": "text"}], "a part of messages has the wrong form: text is missing"),
        ([None], "a part of messages has the wrong form: it must be an object"),
        ([{"type": "text", "text": 3}], "a part of messages has the wrong form: text must be a string"),
    ):
        with pytest.raises(ValidationError) as refused:
            TypeAdapter(list[Text | Image]).validate_python(value)
        assert sentence_of_a_part(refused.value.errors(), "messages") == (sentence, "messages")
    with pytest.raises(ValidationError) as refused:
        Body.model_validate({"prompt": "a", "tagged": 3})
    assert sentence_of_a_part(refused.value.errors(), "messages")[1] == "tagged"
    with pytest.raises(ValidationError) as refused:
        Body.model_validate({"prompt": "a", "stream": "maybe"})
    assert sentence_of_a_part(refused.value.errors(), None) == ("stream must be true or false", "stream")
    assert sentence_of_a_part([], None) == ("a part of the request has the wrong form", None)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("none are specified: {'json': None, 'regex': None, 'a': [{}]}", "none are specified"),
        ("Cannot set both `a` and `b` to True.", "Cannot set both `a` and `b` to true."),
        ("a is not None and empty!", "a is not null and empty!"),
        ("None of these is taken", "None of these is taken"),
        ('Correct usage: `{"type": "function"}`', 'Correct usage: `{"type": "function"}`'),
    ],
)
def test_a_sentence_of_vllms_is_told_in_words_of_json(said: str, told: str) -> None:
    assert plain_words(said) == told


def test_what_a_client_wrote_makes_no_error_of_any_length() -> None:
    # To look through 160 KiB of brackets took 8 s.
    assert len(plain_words("Grammar error: " + "(" * 160_000)) < 1100
    error = InvalidRequest("x" * 5000, field="y" * 5000)
    assert (len(error.message), len(error.field or "")) == (1003, 1003)
    assert InvalidRequest("x" * 1000).message == "x" * 1000


class Checked(BaseModel):
    """Trips over a value before its type is checked, as vLLM's models do."""

    few: list[str] = []
    table: dict[str, int] | None = None

    @model_validator(mode="before")
    @classmethod
    def look(cls, data: Any) -> Any:
        for _ in data.get("few", []):
            pass
        if "table" in data:
            data["table"].get("a") + 1
        return data


@pytest.mark.parametrize(
    ("body", "sentence", "field"),
    [
        ({"few": None}, "few must be a list", "few"),
        ({"few": 3}, "few must be a list", "few"),
        ({"few": ["a"], "table": True}, "table must be an object", "table"),
        ({"table": {"a": "x"}}, "table.a must be an integer", "table.a"),
        # Nothing that its type refuses: then Python's own words are still left out.
        ({"table": {}}, "a part of the request has the wrong form", None),
    ],
)
def test_what_trips_a_check_is_named_by_the_fields_type(body: dict[str, Any], sentence: str, field: str | None) -> None:
    with pytest.raises((TypeError, AttributeError)) as tripped:
        Checked.model_validate(body)
    assert sentence_of_wrong_data(tripped.value) == (sentence, field)


@pytest.mark.parametrize("started", [False, True])
def test_vllms_refusals_of_a_request_are_the_clients_at_any_time(
    started: bool, caplog: pytest.LogCaptureFixture
) -> None:
    from vllm.exceptions import VLLMUnprocessableEntityError, VLLMValidationError

    for kind in (VLLMUnprocessableEntityError, VLLMValidationError):
        told = requests.translate(kind("the image is none", parameter="url", value="x" * 99), "r", started, False, True)
        assert (type(told), told.message, told.field) == (InvalidRequest, "the image is none", "url")
    assert not caplog.records
