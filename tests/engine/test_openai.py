"""OpenAI's API and Anthropic's messages, through their own clients."""

from __future__ import annotations

import json
from collections.abc import Iterator

import anthropic
import httpx
import openai
import pytest

from tests.clients import SUM, post
from tests.support import Server

QUESTION = [{"role": "user", "content": "What is 17 + 25?"}]


@pytest.fixture(params=["/v1", "/openai/v1"])
def client(request: pytest.FixtureRequest, server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + request.param, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def one(server: Server) -> Iterator[openai.OpenAI]:
    """A client under /v1, for what need not be asked under both prefixes."""
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def test_a_chat_is_answered(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="demo", messages=QUESTION, temperature=0, max_tokens=24)
    assert "42" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_streamed_chat_is_the_same_text_in_pieces_and_ends_with_usage(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="demo", messages=QUESTION, temperature=0, max_tokens=24)
    chunks = list(
        client.chat.completions.create(
            model="demo",
            messages=QUESTION,
            temperature=0,
            max_tokens=24,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content
    assert len([piece for piece in pieces if piece]) > 1
    assert chunks[-1].usage == whole.usage
    assert not chunks[-1].choices


def test_a_completion_is_answered(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="demo", prompt=SUM, temperature=0, max_tokens=16)
    assert "42" in answer.choices[0].text


def test_a_batch_of_prompts_gives_a_choice_each(one: openai.OpenAI) -> None:
    answer = one.completions.create(model="demo", prompt=[SUM, "3 + 4 ="], temperature=0, max_tokens=16)
    alone = [
        one.completions.create(model="demo", prompt=prompt, temperature=0, max_tokens=16).choices[0].text
        for prompt in (SUM, "3 + 4 =")
    ]
    assert [choice.text for choice in answer.choices] == alone


def test_n_gives_that_many_choices(one: openai.OpenAI) -> None:
    answer = one.chat.completions.create(model="demo", messages=QUESTION, n=3, max_tokens=4, temperature=1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]


def test_stop_ends_the_text_before_the_stop_string(one: openai.OpenAI) -> None:
    free = one.completions.create(model="demo", prompt=SUM, temperature=0, max_tokens=16).choices[0].text
    stop = free[1:2]
    cut = one.completions.create(model="demo", prompt=SUM, temperature=0, max_tokens=16, stop=[stop]).choices[0]
    assert cut.text == free[: free.index(stop)]
    assert cut.finish_reason == "stop"


def test_a_seed_repeats_what_was_sampled(one: openai.OpenAI) -> None:
    def sample(seed: int) -> str:
        options = {"temperature": 2.0, "max_tokens": 16, "extra_body": {"ignore_eos": True}}
        return one.completions.create(model="demo", prompt="Hello", seed=seed, **options).choices[0].text

    first = sample(7)
    assert sample(7) == first
    assert {sample(seed) for seed in range(8, 14)} != {first}


def test_logprobs_are_given_per_token_and_are_at_most_zero(one: openai.OpenAI) -> None:
    answer = one.chat.completions.create(
        model="demo", messages=QUESTION, temperature=0, max_tokens=4, logprobs=True, top_logprobs=2
    )
    assert "refusal" in answer.choices[0].logprobs.model_fields_set  # null, which OpenAI's description requires
    tokens = answer.choices[0].logprobs.content
    assert len(tokens) == answer.usage.completion_tokens
    for token in tokens:
        assert token.logprob <= 0
        assert len(token.top_logprobs) == 2
        assert token.logprob == max(other.logprob for other in token.top_logprobs)


def test_json_schema_forces_the_form_of_the_answer(one: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"sum": {"enum": [41, 42]}},
        "required": ["sum"],
        "additionalProperties": False,
    }
    answer = one.chat.completions.create(
        model="demo",
        messages=QUESTION,
        temperature=0,
        max_tokens=64,
        response_format={"type": "json_schema", "json_schema": {"name": "sum", "schema": schema, "strict": True}},
    )
    assert json.loads(answer.choices[0].message.content)["sum"] in (41, 42)
    assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("constraint", "allowed"),
    [({"choice": ["apple", "pear"]}, {"apple", "pear"}), ({"regex": "[xy]{3}"}, None)],
    ids=["choice", "regex"],
)
def test_structured_outputs_bind_the_text(one: openai.OpenAI, constraint: dict, allowed: set[str] | None) -> None:
    answer = one.chat.completions.create(
        model="demo", messages=QUESTION, temperature=0, max_tokens=16, extra_body={"structured_outputs": constraint}
    )
    text = answer.choices[0].message.content
    assert text in allowed if allowed else set(text) <= set("xy")
    assert len(text) == 3 or allowed


def test_a_named_tool_is_called(one: openai.OpenAI, server: Server) -> None:
    tool = {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds.",
            "strict": True,
            "parameters": {
                "type": "object",
                "properties": {"sign": {"enum": ["plus", "minus"]}},
                "required": ["sign"],
                "additionalProperties": False,
            },
        },
    }
    # A model this small would go on with blanks between the JSON's parts, which are free to it, for ever.
    blanks = {
        str(token): -100
        for blank in (" ", "\n", "\t", "\r")
        for token in httpx.post(
            f"{server.url}/tokenize", json={"model": "demo", "prompt": blank, "add_special_tokens": False}
        ).json()["tokens"]
    }
    answer = one.chat.completions.create(
        model="demo",
        messages=QUESTION,
        temperature=0,
        max_tokens=128,
        tools=[tool],
        logit_bias=blanks,
        tool_choice={"type": "function", "function": {"name": "add"}},
    )
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "add"
    assert json.loads(call.function.arguments)["sign"] in ("plus", "minus")


def test_models_are_listed_for_openai_and_v1_in_one_body(client: openai.OpenAI, server: Server) -> None:
    assert {model.id for model in client.models.list()} == {"demo", "org/demo", "upper", "french"}
    body = httpx.get(server.url + "/v1/models").json()
    assert body["object"] == "list"
    assert body["models"] == [card["id"] for card in body["data"]]


@pytest.mark.parametrize("name", ["demo", "org/demo", "upper"])
def test_a_model_is_retrieved(client: openai.OpenAI, name: str) -> None:
    card = client.models.retrieve(name)
    assert card.id == name
    assert card.object == "model"


def test_an_unknown_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nope")
    with pytest.raises(openai.NotFoundError, match="nope"):
        client.chat.completions.create(model="nope", messages=QUESTION)


def test_an_adapter_answers_under_its_name(one: openai.OpenAI) -> None:
    def ask(model: str) -> str:
        answer = one.chat.completions.create(
            model=model, temperature=0, max_tokens=24, messages=[{"role": "user", "content": "Repeat the word apple."}]
        )
        assert answer.model == model
        return answer.choices[0].message.content

    plain, upper = ask("demo"), ask("upper")
    assert plain.lower() == plain
    assert upper == upper.upper() != plain


def test_responses_are_answered(client: openai.OpenAI) -> None:
    answer = client.responses.create(model="demo", input="What is 17 + 25?", temperature=0, max_output_tokens=24)
    assert "42" in answer.output_text


def test_streamed_responses_end_with_the_whole_text(one: openai.OpenAI) -> None:
    events = list(
        one.responses.create(model="demo", input="What is 17 + 25?", temperature=0, max_output_tokens=24, stream=True)
    )
    deltas = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert events[-1].type == "response.completed"
    assert events[-1].response.output_text == deltas
    assert "42" in deltas


def test_anthropic_messages_are_answered(server: Server) -> None:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        # The client knows no temperature any more; the server does.
        ask = {"model": "demo", "max_tokens": 24, "messages": QUESTION, "extra_body": {"temperature": 0}}
        answer = client.messages.create(**ask)
        assert "42" in answer.content[0].text
        with client.messages.stream(**ask) as stream:
            assert "".join(stream.text_stream) == answer.content[0].text


def test_detokenize_undoes_tokenize(server: Server) -> None:
    tokens = post(server, "/tokenize", {"model": "demo", "prompt": SUM, "add_special_tokens": False}).json()
    assert tokens["count"] == len(tokens["tokens"])
    back = post(server, "/detokenize", {"model": "demo", "tokens": tokens["tokens"]}).json()
    assert back["prompt"] == SUM


def test_the_server_tells_its_versions(server: Server) -> None:
    assert set(httpx.get(server.url + "/version").json()) == {"version", "kserve_vllm", "shortcuts", "touchpoints"}


def test_invocations_answer_with_the_model_that_the_body_names(server: Server) -> None:
    """SageMaker's route takes the model from a header, and takes the base model where there is none."""
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    for model, header, answers in (
        ("upper", {}, "upper"),
        ("demo", {"x-amzn-sagemaker-adapter-identifier": "upper"}, "upper"),
        (None, {}, "demo"),
    ):
        asked = body if model is None else {**body, "model": model}
        answer = httpx.post(server.url + "/invocations", json=asked, headers=header, timeout=60)
        assert answer.status_code == 200, answer.text
        assert answer.json()["model"] == answers
    assert httpx.post(server.url + "/invocations", json={**body, "model": "nobody"}, timeout=60).status_code == 404
