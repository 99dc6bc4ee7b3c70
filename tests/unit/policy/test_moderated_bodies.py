"""Every text of a request that a model may see is found, whatever the protocol, and can be replaced."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from kserve_vllm.core.errors import InvalidRequest, Refused
from kserve_vllm.core.types import TextJob
from kserve_vllm.policy.moderation.hooks import Moderation
from kserve_vllm.protocols import moderation as moderated

BAD = "a falcon flies"
GOOD = "a bird flies"


@pytest.fixture
def redact(tmp_path: Path) -> Moderation:
    return load(
        tmp_path,
        "redact",
        {"literal": "falcon", "replacement": "bird"},
        {"regex": r"\b\d{16}\b", "replacement": "[card]"},
    )


@pytest.fixture
def refuse(tmp_path: Path) -> Moderation:
    return load(tmp_path, "refuse", {"literal": "falcon"}, {"literal": "build a bomb"})


def load(folder: Path, action: str, *patterns: dict[str, str]) -> Moderation:
    path = folder / f"{action}.yaml"
    path.write_text(
        yaml.safe_dump({"hooks": [{"name": "h", "action": action, "patterns": list(patterns), "tenants": ["t"]}]})
    )
    return Moderation(path)


def passed(moderation: Moderation, body: Any, path: str = "/v1/chat/completions") -> Any:
    raw = json.dumps(body).encode()
    return json.loads(asyncio.run(moderated.moderate_body(path, raw, moderation, "t")))


def said(content: Any, **fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": content}], **fields}


TOOL = {"type": "function", "function": {"name": "f", "description": BAD, "parameters": {"type": "object"}}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": json.dumps({"q": BAD, "n": 1})}}
BODIES = {
    "chat": ("/v1/chat/completions", said(BAD)),
    "chat parts": ("/v1/chat/completions", said([{"type": "text", "text": BAD}])),
    "chat bare parts": ("/v1/chat/completions", said([BAD])),
    "chat system": ("/v1/chat/completions", {"messages": [{"role": "system", "content": BAD}]}),
    "chat role": ("/v1/chat/completions", {"messages": [{"role": BAD, "content": "x"}]}),
    "chat name": ("/v1/chat/completions", {"messages": [{"role": "user", "name": BAD, "content": "x"}]}),
    "chat unknown field": ("/v1/chat/completions", {"messages": [{"role": "user", "whatever": {"deep": [BAD]}}]}),
    "chat tool result": ("/v1/chat/completions", {"messages": [{"role": "tool", "tool_call_id": "1", "content": BAD}]}),
    "chat tool call": ("/v1/chat/completions", {"messages": [{"role": "assistant", "tool_calls": [CALL]}]}),
    "chat reasoning": ("/v1/chat/completions", {"messages": [{"role": "assistant", "reasoning_content": BAD}]}),
    "chat tools": ("/v1/chat/completions", said("x", tools=[TOOL])),
    "chat tool properties": ("/v1/chat/completions", said("x", tools=[{"parameters": {"properties": {BAD: {}}}}])),
    "chat documents": ("/v1/chat/completions", said("x", documents=[{"title": "t", "text": BAD}])),
    "chat template arguments": ("/v1/chat/completions", said("x", chat_template_kwargs={"persona": BAD})),
    "chat template names": ("/v1/chat/completions", said("x", chat_template_kwargs={BAD: True})),
    "chat schema": ("/v1/chat/completions", said("x", response_format={"json_schema": {"description": BAD}})),
    "chat choice": ("/v1/chat/completions", said("x", structured_outputs={"choice": [BAD]})),
    "chat image url": ("/v1/chat/completions", said([{"type": "image_url", "image_url": {"url": f"data:{BAD}"}}])),
    "chat unknown top": ("/v1/chat/completions", said("x", some_new_field={"text": BAD})),
    "chat batch": ("/v1/chat/completions/batch", {"messages": [[{"role": "user", "content": BAD}]]}),
    "completion": ("/v1/completions", {"prompt": BAD}),
    "completions": ("/v1/completions", {"prompt": ["x", BAD]}),
    "completion suffix": ("/v1/completions", {"prompt": "x", "suffix": BAD}),
    "responses": ("/v1/responses", {"input": BAD}),
    "responses items": ("/v1/responses", {"input": [said([{"type": "input_text", "text": BAD}])["messages"][0]]}),
    "responses output": ("/v1/responses", {"input": [{"type": "function_call_output", "call_id": "1", "output": BAD}]}),
    "responses call": ("/v1/responses", {"input": [{"type": "function_call", "name": "f", "arguments": f'["{BAD}"]'}]}),
    "responses instructions": ("/v1/responses", {"input": "x", "instructions": BAD}),
    "responses prompt": ("/v1/responses", {"input": "x", "prompt": {"id": "p", "variables": {"v": BAD}}}),
    "responses history": ("/v1/responses", {"input": "x", "previous_input_messages": said(BAD)["messages"]}),
    "messages": ("/v1/messages", said(BAD)),
    "messages system": ("/v1/messages", said("x", system=BAD)),
    "messages system blocks": ("/v1/messages", said("x", system=[{"type": "text", "text": BAD}])),
    "messages tool use": ("/v1/messages", said([{"type": "tool_use", "id": "1", "name": "f", "input": {"q": BAD}}])),
    "messages tool input names": ("/v1/messages", said([{"type": "tool_use", "name": "f", "input": {BAD: 1}}])),
    "messages tool result": ("/v1/messages", said([{"type": "tool_result", "content": [{"text": BAD}]}])),
    "messages thinking": ("/v1/messages", said([{"type": "thinking", "thinking": BAD}])),
    "messages tool": ("/v1/messages", said("x", tools=[{"name": "f", "description": BAD, "input_schema": {}}])),
    "embedding": ("/v1/embeddings", {"input": BAD}),
    "embeddings": ("/v1/embeddings", {"input": [BAD]}),
    "embedding chat": ("/v1/embeddings", said(BAD)),
    "cohere embed": ("/v2/embed", {"texts": [BAD]}),
    "pooling": ("/pooling", {"input": BAD}),
    "pooling data": ("/pooling", {"data": {"text": BAD}, "task": "embed"}),
    "classify": ("/classify", {"input": [BAD]}),
    "score": ("/score", {"text_1": "x", "text_2": [BAD]}),
    "score queries": ("/score", {"queries": BAD, "documents": ["x"]}),
    "score parts": ("/score", {"data_1": {"content": [{"type": "text", "text": BAD}]}, "data_2": "x"}),
    "rerank": ("/v2/rerank", {"query": "x", "documents": [BAD]}),
    "rerank instruction": ("/rerank", {"query": "x", "documents": ["y"], "instruction": BAD}),
    "any door": ("/invocations", {"prompt": BAD}),
}


@pytest.mark.parametrize(("path", "body"), BODIES.values(), ids=BODIES.keys())
def test_a_text_is_found_and_replaced_wherever_a_model_may_see_it(
    redact: Moderation, refuse: Moderation, path: str, body: Any
) -> None:
    found = [text for _, text in moderated.texts_of(path, body)]
    assert any(BAD in text for text in found)
    clean = passed(redact, body, path)
    assert clean == json.loads(json.dumps(body).replace(BAD, GOOD))
    with pytest.raises(Refused):
        passed(refuse, body, path)


@pytest.mark.parametrize(
    "body",
    [
        said("x", model=BAD, user=BAD, stop=[BAD], request_id=BAD),
        said("hello", temperature=0.5, seed=1234567890123456, logit_bias={"1234567890123456": 1.0}),
        {"prompt": "x", "cache_salt": BAD},
    ],
)
def test_what_reaches_no_model_is_left_alone(redact: Moderation, body: Any) -> None:
    raw = json.dumps(body).encode()
    assert asyncio.run(moderated.moderate_body("/v1/completions", raw, redact, "t")) is raw


def test_a_body_without_a_match_is_the_same_object(redact: Moderation) -> None:
    for path, body in BODIES.values():
        raw = json.dumps(body).replace(BAD, GOOD).encode()
        assert asyncio.run(moderated.moderate_body(path, raw, redact, "t")) is raw


def test_a_tenant_without_hooks_is_not_looked_at(redact: Moderation) -> None:
    for raw in (b"not json", json.dumps({"prompt": [1, 2], "suffix": BAD}).encode()):
        assert asyncio.run(moderated.moderate_body("/v1/completions", raw, redact, "other")) is raw


def test_escapes_in_the_arguments_of_a_tool_call_hide_nothing(redact: Moderation) -> None:
    hidden = '{"q": "a f\\u0061lcon", "more": [{"f\\u0061lcon": 1}]}'
    body = {"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": hidden}}]}]}
    clean = passed(redact, body)["messages"][0]["tool_calls"][0]["function"]["arguments"]
    assert json.loads(clean) == {"q": "a bird", "more": [{"bird": 1}]}
    body["messages"][0]["tool_calls"][0]["function"]["arguments"] = "no json: falcon"  # type: ignore[index]
    assert passed(redact, body)["messages"][0]["tool_calls"][0]["function"]["arguments"] == "no json: bird"


def test_a_number_can_be_a_text(redact: Moderation) -> None:
    body = said([{"type": "tool_use", "name": "pay", "input": {"card": 4111111111111111, "amount": 12}}])
    block = passed(redact, body)["messages"][0]["content"][0]
    assert block["input"] == {"card": "[card]", "amount": 12}


def test_what_stands_across_parts_is_refused(redact: Moderation, refuse: Moderation) -> None:
    def parts(*texts: str) -> dict[str, Any]:
        return said([{"type": "text", "text": text} for text in texts])

    for moderation in (redact, refuse):
        with pytest.raises(Refused):
            passed(moderation, parts("a fal", "con"))
    with pytest.raises(Refused):
        passed(refuse, parts("build a ", "bomb"))
    assert passed(redact, parts("a falcon", "or two falcons")) == parts("a bird", "or two birds")
    assert passed(refuse, parts("fine", "text")) == parts("fine", "text")


@pytest.mark.parametrize(
    "content",
    [
        ["a fal", "con"],
        ["a fal", {"type": "text", "text": "con"}],
        [{"type": "text", "text": "a fal"}, {"type": "refusal", "refusal": "con"}],
        [{"type": "thinking", "thinking": "a fal"}, {"type": "text", "text": "con"}],
    ],
)
def test_parts_are_joined_of_whatever_kind_they_are(redact: Moderation, content: list[Any]) -> None:
    spoken = {"model": "m", "messages": [{"role": "assistant", "content": content}]}
    for body in (spoken, {**spoken, "messages": [spoken["messages"]]}):
        with pytest.raises(Refused):
            passed(redact, body)


@pytest.mark.parametrize("parts", [["tool", "box"], ["function", " keys"], ["a high", "", "user"]])
def test_a_word_of_the_protocols_is_a_word_where_texts_stand(tmp_path: Path, parts: list[str]) -> None:
    moderation = load(
        tmp_path, "refuse", {"literal": "toolbox"}, {"literal": "function keys"}, {"regex": r"high\s*user"}
    )
    for content in ([{"type": "text", "text": part} for part in parts], parts):
        with pytest.raises(Refused):
            passed(moderation, said(content))
    for body in ({"prompt": "user"}, {"input": ["tool"]}, said("function"), said([{"type": "text", "text": "auto"}])):
        with pytest.raises(Refused):
            passed(load(tmp_path, "refuse", {"regex": "^(user|tool|function|auto)$"}), body)


def test_a_word_of_the_protocols_is_left_where_they_use_it(tmp_path: Path) -> None:
    moderation = load(tmp_path, "refuse", {"regex": "^(user|tool|function|auto|text|object)$"})
    body = said([{"type": "text", "text": "hi"}], tool_choice="auto", text={"format": {"type": "text"}}, tools=[TOOL])
    assert passed(moderation, body) == body


def test_arguments_name_each_field_once(redact: Moderation) -> None:
    """Of two values one is looked at, and the text may be handed on as it is."""
    for hidden in ('{"q": "a falcon", "q": "x"}', '{"q": {"a": "a falcon", "a": 1}}', '[{"a": 1, "a": 2}]'):
        body = {"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": hidden}}]}]}
        with pytest.raises(InvalidRequest, match="names a field twice"):
            passed(redact, body)


PICTURE = "falcon" + "iVBORw0KGgo" * 40
IMAGE = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PICTURE}"}}
MEDIA = {
    "image": [
        IMAGE,
        {"type": "input_image", "image_url": f"data:image/png;base64,{PICTURE}"},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PICTURE}},
    ],
    "audio": [
        {"type": "input_audio", "input_audio": {"data": PICTURE, "format": "wav"}},
        {"type": "audio_url", "audio_url": {"url": f"data:audio/ogg;codecs=opus;base64,{PICTURE}"}},
    ],
    "video": [{"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{PICTURE}"}}],
}


@pytest.mark.parametrize("medium", MEDIA)
def test_media_that_the_model_takes_are_left_alone_and_others_are_not(refuse: Moderation, medium: str) -> None:
    for part in MEDIA[medium]:
        for body in (said([part]), {"messages": [said([part])["messages"]]}, {"input": said([part])["messages"]}):
            refuse.media = frozenset({medium})
            assert passed(refuse, body) == body
            for media in (frozenset(), frozenset(MEDIA) - {medium}):
                refuse.media = media
                with pytest.raises(Refused):
                    passed(refuse, body)


@pytest.mark.parametrize(
    "body",
    [
        said([{"type": "text", "text": PICTURE}]),
        said([{"type": "input_audio", "input_audio": {"data": "a falcon", "format": "wav"}}]),
        said([{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PICTURE} and"}}]),
        said([{"type": "image_url", "image_url": {"url": f"data:image/png,{PICTURE}"}}]),
        said([{"type": "image_url", "image_url": {"url": f"data:text/plain;base64,{PICTURE}"}}]),
        said([{"type": "image_url", "image_url": {"url": f"data:image/falcon png;base64,{PICTURE}"}}]),
        said([{"type": "image_url", "image_url": {"url": f"https://x/{PICTURE}"}}]),
        said([{**IMAGE, "text": "falcon"}]),
        said([{"type": "text", "image_url": {"url": f"data:image/png;base64,{PICTURE}"}}]),
        said([{"type": ["image_url"], "image_url": {"url": f"data:image/png;base64,{PICTURE}"}}]),
        said([{"image_url": {"url": f"data:image/png;base64,{PICTURE}"}}]),
        said([{"type": "text", "text": "x", "content": [IMAGE]}]),
        said(PICTURE),
        said({"type": "image_url", "data": PICTURE}),
        said("x", data=PICTURE, url=PICTURE, images=[PICTURE]),
        said("x", documents=[{"content": [IMAGE]}]),
        said("x", chat_template_kwargs={"messages": said([IMAGE])["messages"]}),
        said(
            "x", tools=[{"type": "function", "function": {"name": "f", "parameters": {"default": {"data": PICTURE}}}}]
        ),
        {
            "messages": [
                {"role": "assistant", "tool_calls": [{"function": {"arguments": json.dumps({"content": [IMAGE]})}}]}
            ]
        },
        {"messages": [{"role": "user", "content": "x", "image_url": {"url": f"data:image/png;base64,{PICTURE}"}}]},
        {"prompt": PICTURE},
        {"prompt": {"data": PICTURE}},
        {"input": [IMAGE]},
        {"data": PICTURE},
    ],
)
def test_what_only_looks_like_a_medium_is_looked_at(refuse: Moderation, body: Any) -> None:
    refuse.media = frozenset(MEDIA)
    with pytest.raises(Refused):
        passed(refuse, body)


def test_texts_beside_media_are_replaced(redact: Moderation) -> None:
    redact.media = frozenset(MEDIA)
    body = said([IMAGE, {"type": "text", "text": BAD}, *MEDIA["audio"]])
    assert passed(redact, body) == said([IMAGE, {"type": "text", "text": GOOD}, *MEDIA["audio"]])


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"prompt": [1, 2, 3]}, "prompt"),
        ({"prompt": [[1, 2], [3]]}, "prompt"),
        ({"prompt": ["1", 2]}, "prompt"),
        ({"prompt": [1.0, True]}, "prompt"),
        ({"input": [5]}, "input"),
        ({"input": [["x"], [5]]}, "input"),
        ({"token_ids": [5], "sampling_params": {}}, "token_ids"),
        # Whatever the field: scores are made of these, and another version of vLLM may have more.
        ({"query": [5], "items": ["x"], "label_token_ids": [5, 6]}, "query"),
        ({"query": "x", "items": [[5], [6]]}, "items"),
        ({"messages": [], "not_known_yet": [[5]]}, "not_known_yet"),
        ({"prompt": "x", "prompt_embeds": "AAAA"}, "prompt_embeds"),
        (said([{"type": "prompt_embeds", "data": "AAAA"}]), "prompt_embeds"),
        (said([{"type": "text", "text": "x", "uuid": "u", "prompt_embeds": 1, "data": "AAAA"}]), "prompt_embeds"),
        # Another prompt than the messages, for routers of disaggregated prefill.
        (said("x", kv_transfer_params={"prompt_token_ids": [5]}), "kv_transfer_params"),
        (said("x", not_known_yet={"more": {"token_ids": [[5]]}}), "not_known_yet"),
        (said("x", not_known_yet=[{"more": [{"token_ids": [5]}]}]), "not_known_yet"),
        ({"messages": [[{"role": "user", "content": [{"type": "prompt_embeds", "data": "A"}]}]]}, "prompt_embeds"),
        (said("x", chat_template="{{ 'fal' ~ 'con' }}"), "chat_template"),
        (said("x", chat_template_kwargs={"chat_template": "{{ 1 }}"}), "chat_template"),
    ],
)
def test_prompts_that_can_not_be_read_are_refused(redact: Moderation, body: Any, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        passed(redact, body)
    assert caught.value.field == field
    assert "prompts are moderated here" in caught.value.message


@pytest.mark.parametrize("inner", [b'{"token_ids": [5]}', b'{"type": "prompt_embeds"}'])
def test_what_can_not_be_read_is_found_as_deep_as_json_goes(redact: Moderation, inner: bytes) -> None:
    deep = b'{"messages": ' + b'{"content": ' * 850 + inner + b"}" * 851

    def further_down(frames: int) -> object:
        """As below a server's own calls."""
        return further_down(frames - 1) if frames else moderated.check_readable(tree)

    tree = orjson.loads(deep)
    with pytest.raises(InvalidRequest, match="prompts are moderated here"):
        further_down(150)


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff\xfe\xff", b"[" * 100_000], ids=["empty", "cut", "binary", "deep"])
def test_bodies_that_are_no_json_are_refused(redact: Moderation, raw: bytes) -> None:
    with pytest.raises(InvalidRequest, match="no JSON that can be read"):
        asyncio.run(moderated.moderate_body("/v1/completions", raw, redact, "t"))


def test_what_json_allows_and_others_do_not_is_looked_at_all_the_same(refuse: Moderation) -> None:
    """vLLM's parser takes these, so ours has to."""
    text = '{"prompt": "a falcon", "temperature": NaN}'
    doubled = '{"prompt": "x", "prompt": "a falcon"}'
    for raw in (text.encode(), text.encode("utf-16"), doubled.encode(), b'{"prompt": "\\ud800 a falcon"}'):
        with pytest.raises(Refused):
            asyncio.run(moderated.moderate_body("/v1/completions", raw, refuse, "t"))


def test_a_rewritten_body_keeps_everything_else(redact: Moderation) -> None:
    body = {
        "prompt": "a falcon: ü \ud800",
        "seed": 2**70,
        "temperature": 0.1,
        "stop": None,
        "n": 1,
        "x": {"y": [1, {}]},
    }
    assert passed(redact, body) == {**body, "prompt": "a bird: ü \ud800"}


@pytest.mark.parametrize("body", [{"messages": [{}] * 60_000}, {"prompt": [["x"] * 300] * 200}])
def test_a_body_of_very_many_values_is_refused(redact: Moderation, body: Any) -> None:
    with pytest.raises(InvalidRequest, match="more than 50000 values"):
        passed(redact, body)


def test_a_body_of_very_many_values_is_not_even_parsed(redact: Moderation, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parser would hold the event loop, and for a number that orjson does not take it is Python's."""
    monkeypatch.setattr(moderated.json, "loads", lambda raw: pytest.fail("it was parsed"))
    raw = b'{"x":NaN,"y":[1' + b",1" * moderated.MAX_VALUES + b"]}"
    with pytest.raises(InvalidRequest, match="more than 50000 values"):
        asyncio.run(moderated.moderate_body("/v1/completions", raw, redact, "t"))


def test_a_text_full_of_commas_is_one_value(redact: Moderation) -> None:
    body = {"prompt": "," * (2 * moderated.MAX_VALUES)}
    assert passed(redact, body, "/v1/completions") == body


def test_the_event_loop_goes_on_beside_the_look_at_a_large_body(
    redact: Moderation, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []
    look = moderated.texts_of

    def noted(*args: Any) -> Any:
        threads.append(threading.current_thread().name)
        return look(*args)

    monkeypatch.setattr(moderated, "texts_of", noted)
    for count in (10, 40_000):
        passed(redact, {"metadata": {f"a{number}": BAD for number in range(count)}})
    assert threads[0] == threading.main_thread().name != threads[1]


def test_a_body_that_is_nested_deeply_is_refused(redact: Moderation) -> None:
    tree: Any = "x"
    for _ in range(800):
        tree = [tree]
    for body in ({"messages": tree}, {"other": tree}):
        with pytest.raises(InvalidRequest, match="nested too deeply"):
            passed(redact, body)


def test_parts_of_many_messages_are_looked_at_together(redact: Moderation, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    prompt = Moderation.prompt

    async def counted(self: Moderation, texts: list[str], tenant: str) -> list[str]:
        asked.append(len(texts))
        return await prompt(self, texts, tenant)

    monkeypatch.setattr(Moderation, "prompt", counted)
    parts = [{"type": "text", "text": "a bird"}, {"type": "text", "text": "flies"}]
    body = {"messages": [{"role": "user", "content": parts}] * 300}
    assert passed(redact, body) == body
    assert asked == [600, 300 * 4]
    body["messages"][150] = {"role": "user", "content": [{"type": "text", "text": each} for each in ("fal", "con")]}
    with pytest.raises(Refused, match="across several parts"):
        passed(redact, body)


@pytest.mark.parametrize(
    "raw",
    [
        b'{"return_token_ids": true}',
        rb'{"return_token\u005fids": true}',
        '{"return_token_ids": true}'.encode("utf-16"),
        '{"return_token_ids": true}'.encode("utf-32-le"),
        b'{"enable_response_messages": true}',
        rb'{"use_be\u0061m_search": true}',
    ],
    ids=["plain", "escaped", "utf-16", "utf-32", "messages", "beam"],
)
def test_answers_in_another_form_are_refused_however_they_are_asked_for(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "answers.yaml"
    hook = {"name": "h", "action": "redact", "on": "answer", "patterns": [{"literal": "falcon"}]}
    path.write_text(yaml.safe_dump({"hooks": [hook]}))
    with pytest.raises(InvalidRequest, match="would show them unmoderated"):
        moderated.check_answer_form("/v1/responses", raw, Moderation(path), "t")
    if b"true" in raw:
        moderated.check_answer_form("/v1/responses", raw.replace(b"true", b"false"), Moderation(path), "t")


def test_tokenizing_is_not_moderated(refuse: Moderation) -> None:
    for path in ("/tokenize", "/detokenize", "/v1/messages/count_tokens"):
        assert passed(refuse, {"prompt": BAD, "tokens": [1]}, path) == {"prompt": BAD, "tokens": [1]}


def test_forms_are_refused() -> None:
    for kind in ("multipart/form-data; boundary=x", "Application/X-WWW-Form-Urlencoded"):
        with pytest.raises(InvalidRequest, match="forms can't be read"):
            moderated.check_content_type(kind)
    for kind in ("application/json", "application/json; charset=utf-8", None, ""):
        moderated.check_content_type(kind)


def job(**fields: Any) -> TextJob:
    return TextJob("m", "r", **fields)


def test_a_job_is_looked_at_like_a_body(redact: Moderation, refuse: Moderation) -> None:
    def clean(each: TextJob) -> TextJob:
        return asyncio.run(moderated.moderate_job(each, redact, "t"))

    assert clean(job(prompt=BAD, options={"n": 2}, stream=True)) == job(prompt=GOOD, options={"n": 2}, stream=True)
    messages = [{"role": "user", "content": BAD}]
    assert clean(job(messages=messages)).messages == [{"role": "user", "content": GOOD}]
    assert messages[0]["content"] == BAD
    assert clean(job(prompt="x", options={"structured_outputs": {"choice": [BAD]}})).options == {
        "structured_outputs": {"choice": [GOOD]}
    }
    fine = job(prompt=GOOD, messages=None, options={"stop": [BAD]})
    assert clean(fine) is fine
    with pytest.raises(Refused):
        asyncio.run(moderated.moderate_job(job(prompt=BAD), refuse, "t"))
    with pytest.raises(InvalidRequest, match="not token ids"):
        clean(job(prompt=[1, 2]))
    assert asyncio.run(moderated.moderate_job(job(prompt=[1, 2]), redact, "other")) == job(prompt=[1, 2])


@pytest.mark.parametrize("field", ["stop_token_ids", "allowed_token_ids", "logprob_token_ids", "label_token_ids"])
def test_numbers_that_choose_among_tokens_are_no_text(redact: Moderation, field: str) -> None:
    body = {"prompt": BAD, field: [5, 6]}
    assert passed(redact, body) == {**body, "prompt": GOOD}


def test_inputs_of_pooling_are_looked_at(redact: Moderation) -> None:
    fine = ["x", GOOD]
    assert asyncio.run(moderated.moderate_texts(["x", BAD], redact, "t")) == fine
    assert asyncio.run(moderated.moderate_texts(fine, redact, "t")) is fine
    with pytest.raises(InvalidRequest, match="token ids"):
        asyncio.run(moderated.moderate_texts([[1, 2]], redact, "t"))


def strings(tree: Any) -> Iterator[str]:
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from strings(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from strings(value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)


@pytest.mark.slow
@given(st.dictionaries(st.text(max_size=8), JSON, max_size=4))
def test_replacing_with_the_same_texts_changes_nothing_and_every_text_is_replaced(body: dict[str, Any]) -> None:
    # Within an object: a list of numbers at the top may be a text as token ids, which is refused.
    body = {f"x-{name}": {"value": value} for name, value in body.items()}
    texts = [text for _, text in moderated.texts_of("/x", body)]
    assert moderated.replace_texts("/x", body, texts) is body
    assert set(strings(body)) - {""} <= set(texts) | moderated.PROTOCOL_WORDS
    other = moderated.replace_texts("/x", body, ["*"] * len(texts))
    assert set(strings(other)) <= {"*", ""} | moderated.PROTOCOL_WORDS
