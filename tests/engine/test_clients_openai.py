"""What SDKs send by themselves is taken, what would change an answer is not dropped in silence, and what comes back is
what OpenAI's clients know."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from tests.clients import SUM, post
from tests.support import Server

MESSAGES = [{"role": "user", "content": SUM}]
BASE: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "demo", "messages": MESSAGES, "max_tokens": 2, "temperature": 0},
    "/v1/completions": {"model": "demo", "prompt": SUM, "max_tokens": 2, "temperature": 0},
    "/v1/responses": {"model": "demo", "input": SUM, "max_output_tokens": 2, "temperature": 0},
    "/v1/messages": {"model": "demo", "messages": MESSAGES, "max_tokens": 2, "temperature": 0},
    "/v1/messages/count_tokens": {"model": "demo", "messages": MESSAGES},
    "/tokenize": {"model": "demo", "messages": MESSAGES},
    "/detokenize": {"model": "demo", "tokens": [5, 6]},
}
CHAT, COMPLETIONS, RESPONSES, ANTHROPIC = list(BASE)[:4]
LONG = "Tell me about KServe"


def request_models() -> dict[str, list[Any]]:
    """vLLM's models of the bodies, by path."""
    from vllm.entrypoints.anthropic import protocol as messages
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
    from vllm.entrypoints.serve.tokenize import protocol as tokenize

    return {
        CHAT: [ChatCompletionRequest],
        COMPLETIONS: [CompletionRequest],
        RESPONSES: [ResponsesRequest],
        ANTHROPIC: [messages.AnthropicMessagesRequest],
        "/v1/messages/count_tokens": [messages.AnthropicCountTokensRequest],
        "/tokenize": [tokenize.TokenizeChatRequest, tokenize.TokenizeCompletionRequest],
        "/detokenize": [tokenize.DetokenizeRequest],
    }


@pytest.mark.parametrize(
    ("path", "stream"), [*((path, False) for path in BASE), *((path, True) for path in list(BASE)[:4])]
)
def test_null_is_taken_for_every_field_that_may_be_left_out(server: Server, path: str, stream: bool) -> None:
    base = {**BASE[path], **({"stream": True} if stream else {})}
    plain = post(server, path, base)
    assert plain.status_code == 200, plain.text
    fields = [name for model in request_models()[path] for name, f in model.model_fields.items() if not f.is_required()]
    fields = [name for name in fields if name not in ("prompt", "stream")]
    assert len(fields) > (0 if path == "/detokenize" else 3)
    refused = {}
    for name in fields:
        answer = post(server, path, {**base, name: None} if name not in base else {**base, name: base[name]})
        if answer.status_code != 200 or '"error":{' in answer.text.replace(" ", ""):
            refused[name] = answer.text[:200]
    assert refused == {}
    together = post(server, path, {**dict.fromkeys(fields), **base})
    assert together.status_code == 200, together.text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", list(BASE)[:4])
def test_top_p_of_0_is_the_likeliest_token(server: Server, path: str, stream: bool) -> None:
    body = {**BASE[path], "stream": stream, "top_p": 0, "temperature": 1, "seed": 3}
    if path == ANTHROPIC:
        del body["seed"]
    answers = {text_of(post(server, path, body).text) for _ in range(4)}
    assert answers == {text_of(post(server, path, {**BASE[path], "stream": stream}).text)}


def text_of(body: str) -> str:
    """The generated text, of an answer or a stream."""
    found = []
    for line in body.splitlines():
        tree = json.loads(line.removeprefix("data: ")) if "{" in line else {}
        for choice in tree.get("choices", []):
            found.append(
                choice.get("text") or (choice.get("message") or choice.get("delta") or {}).get("content") or ""
            )
        delta = tree.get("delta")
        found.append(delta if isinstance(delta, str) else (delta or {}).get("text", ""))
        for item in [*tree.get("output", []), *([tree] if tree.get("type") == "message" else [])]:
            found += [part["text"] for part in item["content"]]
    return "".join(found)


TAKEN: list[tuple[str, dict[str, Any]]] = [
    (
        CHAT,
        {
            "foo": 1,
            "metadata": {"a": "b"},
            "store": True,
            "modalities": ["text"],
            "service_tier": "auto",
            "prediction": None,
            "verbosity": "low",
            "safety_identifier": "a",
            "prompt_cache_key": "b",
        },
    ),
    (CHAT, {"max_tokens": None, "max_completion_tokens": 2}),
    (COMPLETIONS, {"max_tokens": None, "max_completion_tokens": 2}),
    (COMPLETIONS, {"suffix": "", "best_of": 1, "echo": None}),
    (CHAT, {"messages": [{"role": "developer", "content": [{"type": "text", "text": "Be brief"}]}, *MESSAGES]}),
    (
        CHAT,
        {
            "messages": [
                *MESSAGES,
                {
                    "role": "assistant",
                    "content": [{"type": "text", "text": "42"}],
                    "name": None,
                    "refusal": None,
                    "tool_calls": None,
                    "function_call": None,
                    "audio": None,
                    "annotations": None,
                },
                *MESSAGES,
            ]
        },
    ),
    (
        CHAT,
        {
            "messages": [
                {
                    "role": "user",
                    "name": None,
                    "content": [{"type": "text", "text": "17 +"}, {"type": "text", "text": " 25 ="}],
                }
            ]
        },
    ),
    (
        CHAT,
        {
            "tools": [{"type": "function", "function": {"name": "f", "description": None, "parameters": None}}],
            "tool_choice": None,
            "parallel_tool_calls": None,
        },
    ),
    (CHAT, {"functions": None, "function_call": None, "audio": None, "web_search_options": None}),
    (
        RESPONSES,
        {
            "input": [
                {"role": "developer", "content": "hi"},
                {"role": "user", "content": [{"type": "input_text", "text": SUM}]},
            ],
            "instructions": None,
        },
    ),
    (
        RESPONSES,
        {
            "foo": 1,
            "safety_identifier": "a",
            "prompt_cache_key": "x",
            "conversation": None,
            "text": {"format": {"type": "text"}, "verbosity": "low"},
        },
    ),
    (
        ANTHROPIC,
        {
            "foo": 1,
            "service_tier": "auto",
            "container": None,
            "mcp_servers": [],
            "context_management": None,
            "system": [{"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}],
        },
    ),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "change"), TAKEN, ids=[json.dumps(c)[:50] for _, c in TAKEN])
def test_what_sdks_send_is_taken(server: Server, path: str, change: dict[str, Any], stream: bool) -> None:
    answer = post(server, path, {**BASE[path], **change, "stream": stream})
    assert answer.status_code == 200, answer.text
    assert '"error":{' not in answer.text


GUIDED: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"guided_choice": ["yes", "no"]}, ("yes", "no")),
    ({"guided_regex": "(apple|pear)"}, ("apple", "pear")),
    ({"guided_grammar": 'root ::= "apple" | "pear"'}, ("apple", "pear")),
    ({"guided_json": {"enum": ["apple", "pear"]}}, ('"apple"', '"pear"')),
    ({"guided_choice": ["yes", "no"], "guided_decoding_backend": "xgrammar", "guided_json": None}, ("yes", "no")),
    ({"guided_choice": ["yes", "no"], "guided_whitespace_pattern": None}, ("yes", "no")),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(("fields", "allowed"), GUIDED, ids=[json.dumps(f)[:60] for f, _ in GUIDED])
def test_former_guided_decoding_holds(
    server: Server, path: str, fields: dict[str, Any], allowed: tuple[str, ...], stream: bool
) -> None:
    answer = post(server, path, {**BASE[path], **fields, "max_tokens": 24, "stream": stream})
    assert answer.status_code == 200, answer.text
    assert text_of(answer.text) in allowed


NOT_DROPPED: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, {"guided_choice": ["a"], "structured_outputs": {"choice": ["b"]}}, "guided_choice"),
    (CHAT, {"guided_json": {"type": "object"}, "guided_decoding_backend": "outlines"}, "guided_decoding_backend"),
    (CHAT, {"guided_choice": []}, "guided_choice"),
    (CHAT, {"guided_json": "{"}, "guided_json"),
    (ANTHROPIC, {"guided_choice": ["a"]}, "guided_choice"),
    (COMPLETIONS, {"best_of": 3}, "best_of"),
    (COMPLETIONS, {"logits_processors": ["x"]}, "logits_processors"),
    (CHAT, {"functions": [{"name": "f"}]}, "functions"),
    (CHAT, {"function_call": {"name": "f"}}, "function_call"),
    (CHAT, {"modalities": ["text", "audio"]}, "modalities"),
    (COMPLETIONS, {"suffix": "x"}, "suffix"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "change", "word"), NOT_DROPPED, ids=[json.dumps(c)[:50] for _, c, _ in NOT_DROPPED])
def test_what_would_change_the_answer_is_refused(
    server: Server, path: str, change: dict[str, Any], word: str, stream: bool
) -> None:
    answer = post(server, path, {**BASE[path], **change, "stream": stream})
    assert answer.status_code == 400, answer.text
    assert word in answer.json()["error"]["message"]


def test_bans_that_leave_no_token_are_refused(server: Server) -> None:
    (letter,) = post(server, "/tokenize", {"model": "demo", "prompt": "a", "add_special_tokens": False}).json()[
        "tokens"
    ]
    base = BASE[COMPLETIONS]
    ok = post(server, COMPLETIONS, {**base, "allowed_token_ids": [letter]})
    assert ok.json()["choices"][0]["text"] == "aa"
    for change in (
        {"allowed_token_ids": [letter], "bad_words": ["a"]},
        {"allowed_token_ids": [1], "min_tokens": 2},
        {"structured_outputs": {"choice": ["yes", "no"]}, "bad_words": ["yes", "no"]},
        {"structured_outputs": {"regex": "a"}, "bad_words": ["a"]},
    ):
        answer = post(server, COMPLETIONS, {**base, **change, "max_tokens": 5})
        assert answer.status_code == 400, answer.text
        assert "bad_words" in answer.text or "min_tokens" in answer.text
    server_is_alive = post(server, COMPLETIONS, base)
    assert server_is_alive.status_code == 200


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(
    "more",
    [{}, {"n": 2, "temperature": 1}, {"logprobs": 1}, {"tools": [{"type": "function", "function": {"name": "f"}}]}],
)
def test_every_chunk_but_the_last_has_null_usage(server: Server, path: str, more: dict[str, Any]) -> None:
    if path == CHAT and "logprobs" in more:
        more = {"logprobs": True}
    body = {**BASE[path], **more, "stream": True, "stream_options": {"include_usage": True}}
    if path == COMPLETIONS:
        body.pop("tools", None)
    for headers in ({}, {"endpoint_load_metrics_format": "none"}):
        answer = post(server, path, body, **headers)
        assert answer.status_code == 200, answer.text
        chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
        assert len(chunks) > 2
        assert all(chunk["usage"] is None and chunk["choices"] for chunk in chunks[:-1])
        assert chunks[-1]["usage"]["prompt_tokens"] > 0
        assert chunks[-1]["choices"] == []
    without = post(server, path, {**BASE[path], "stream": True})
    assert "usage" not in without.text


def test_a_cut_response_is_incomplete_everywhere(server: Server) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        whole = client.responses.create(model="demo", input=LONG, max_output_tokens=3, temperature=0)
        assert whole.status == "incomplete"
        assert whole.incomplete_details is not None
        assert whole.incomplete_details.reason == "max_output_tokens"
        assert [item.status for item in whole.output] == ["incomplete"]  # type: ignore[union-attr]
        events = list(
            client.responses.create(model="demo", input=LONG, max_output_tokens=3, temperature=0, stream=True)
        )
        assert events[-1].type == "response.incomplete"
        assert events[-1].response.status == "incomplete"
        assert [item.status for item in events[-1].response.output] == ["incomplete"]  # type: ignore[union-attr]
        done = [event for event in events if event.type == "response.output_item.done"]
        assert [event.item.status for event in done] == ["incomplete"]  # type: ignore[union-attr]
        numbers = [event.sequence_number for event in events]
        assert numbers == sorted(numbers)
        assert len(set(numbers)) == len(numbers)


def test_a_whole_response_is_completed(server: Server) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        events = list(client.responses.create(model="demo", input=SUM, temperature=0, stream=True))
        assert events[-1].type == "response.completed"
        assert [item.status for item in events[-1].response.output] == ["completed"]  # type: ignore[union-attr]
        assert client.responses.create(model="demo", input=SUM, temperature=0).status == "completed"


def test_a_conversation_has_as_many_tokens_everywhere(server: Server) -> None:
    conversations: list[list[dict[str, Any]]] = [
        MESSAGES,
        [{"role": "system", "content": "Be brief"}, *MESSAGES, {"role": "assistant", "content": "42"}, *MESSAGES],
        [{"role": "user", "content": [{"type": "text", "text": "17 +"}, {"type": "text", "text": " 25 ="}]}],
    ]
    for talk in conversations:
        system = [each["content"] for each in talk if each["role"] == "system"]
        rest = [each for each in talk if each["role"] != "system"]
        typed = [
            each
            if isinstance(each["content"], str)
            else {**each, "content": [{**part, "type": "input_text"} for part in each["content"]]}
            for each in talk
        ]
        anthropics = {"model": "demo", "messages": rest, **({"system": system[0]} if system else {})}
        counts = {
            "tokenize": post(server, "/tokenize", {"model": "demo", "messages": talk}).json()["count"],
            "chat": post(server, CHAT, {**BASE[CHAT], "messages": talk}).json()["usage"]["prompt_tokens"],
            "responses": post(server, RESPONSES, {**BASE[RESPONSES], "input": typed}).json()["usage"]["input_tokens"],
            "messages": post(server, ANTHROPIC, {**anthropics, "max_tokens": 2}).json()["usage"]["input_tokens"],
            "count": post(server, "/v1/messages/count_tokens", anthropics).json()["input_tokens"],
        }
        assert len(set(counts.values())) == 1, counts


def test_json_under_a_schema_ends(server: Server) -> None:
    schema = {
        "type": "object",
        "properties": {"sum": {"type": "integer"}},
        "required": ["sum"],
        "additionalProperties": False,
    }
    body = {
        **BASE[CHAT],
        "max_tokens": 64,
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}},
    }
    for seed in range(5):
        choice = post(server, CHAT, {**body, "temperature": 1.5, "seed": seed}).json()["choices"][0]
        text = choice["message"]["content"]
        assert not any(blank in text for blank in " \n\t"), text


def test_answers_have_the_fields_that_their_descriptions_require(server: Server) -> None:
    chat = post(server, CHAT, BASE[CHAT]).json()
    assert not {"annotations", "function_call"} & set(chat["choices"][0]["message"])
    assert not {"service_tier"} & set(chat)
    completion = post(server, COMPLETIONS, BASE[COMPLETIONS]).json()
    for usage in (chat["usage"], completion["usage"]):
        assert set(usage) == {"prompt_tokens", "total_tokens", "completion_tokens"}
    asked = {**BASE[RESPONSES], "store": False, "safety_identifier": "me", "prompt_cache_key": "mine"}
    whole = post(server, RESPONSES, asked).json()
    stream = post(server, RESPONSES, {**asked, "stream": True}).text
    events = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
    for response in [whole, *(event["response"] for event in events if "response" in event)]:
        assert {"error", "completed_at"} <= set(response)
        assert response["text"] == {"format": {"type": "text"}}
        assert (response["store"], response["safety_identifier"], response["prompt_cache_key"]) == (False, "me", "mine")
        assert response["top_logprobs"] == 0
        for item in response["output"]:
            assert "phase" not in item
            assert all(part["logprobs"] == [] for part in item["content"])
    assert not [event for event in events if "phase" in event.get("item", {})]
    assert len([event for event in events if "item" in event]) == 2
    assert len([event for event in events if "response" in event]) == 3


def test_anthropics_answers_have_the_fields_that_their_description_requires(server: Server) -> None:
    whole = post(server, ANTHROPIC, BASE[ANTHROPIC]).json()
    stream = post(server, ANTHROPIC, {**BASE[ANTHROPIC], "stream": True}).text
    (started,) = (json.loads(line[6:]) for line in stream.splitlines() if '"message_start"' in line and "data" in line)
    for message in (whole, started["message"]):
        assert {"stop_reason", "stop_sequence", "stop_details", "container"} <= set(message)
        assert {"cache_creation", "server_tool_use", "service_tier", "inference_geo"} <= set(message["usage"])
    assert whole["content"][0]["citations"] is None


def test_anthropics_sdk_lists_models_as_its_own(server: Server) -> None:
    import anthropic

    with anthropic.Anthropic(base_url=server.url, api_key="none", _strict_response_validation=True) as client:
        names = [model.id for model in client.models.list()]
        assert "demo" in names
        assert client.models.retrieve("demo").max_tokens
        with pytest.raises(anthropic.NotFoundError):
            client.models.retrieve("nobody")
