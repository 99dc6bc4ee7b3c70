"""Whole answers that are filled into bytes are those that vLLM's own code writes for the same output."""

from __future__ import annotations

import asyncio
import types
from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest

from kserve_vllm.engine.hooks.answer_shape import leave_out_nulls
from kserve_vllm.engine.patches import answer_bytes
from kserve_vllm.engine.patches.answer_bytes import BytesAnswer, wants_text_alone, with_bytes

TEXTS = ("", "42", 'He said: "ü 漢字 🙂"\n\t\\', "\x00\x1b\x7f\u2028\ufffd", "kserve-vllm-mark-id", "</script>" * 200)
REASONS = (("stop", None), ("stop", 7), ("stop", "###"), ("length", None))


@pytest.fixture(scope="module", autouse=True)
def _nulls_left_out() -> None:
    leave_out_nulls()


def handler(kind: str, **changes: Any) -> Any:
    """vLLM's handler, with what it reads while it writes an answer."""
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion

    made = object.__new__(OpenAIServingChat if kind == "chat" else OpenAIServingCompletion)
    vars(made).update(
        {
            "parser_cls": None,
            "response_role": "assistant",
            "enable_auto_tools": False,
            "enable_prompt_tokens_details": False,
            "enable_per_request_metrics": False,
            "enable_log_outputs": False,
            "_include_reasoning_tokens_details": False,
            "request_logger": None,
            "system_fingerprint": "vllm-0",
            "renderer": types.SimpleNamespace(tokenizer=None),
            **changes,
        }
    )
    return made


def output(text: str = "42", reason: str = "stop", stop: int | str | None = None, **changes: Any) -> Any:
    from vllm.outputs import CompletionOutput, RequestOutput

    of_choice = {name: changes.pop(name) for name in ("logprobs", "routed_experts", "index") if name in changes}
    choice = CompletionOutput(
        **{
            "index": 0,
            "text": text,
            "token_ids": [1, 2, 3],
            "cumulative_logprob": None,
            "logprobs": None,
            "finish_reason": reason,
            "stop_reason": stop,
            **of_choice,
        }
    )
    return RequestOutput("r", None, [5] * 11, None, [choice], True, **changes)


async def _only(final: Any) -> AsyncIterator[Any]:
    yield final


async def answered(kind: str, by: Any, final: Any, alone: bool = True, request: Any = None) -> Any:
    """What a handler returns for an output of the engine."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    wants_text_alone.set(alone)
    metadata = types.SimpleNamespace()
    if kind == "chat":
        request = request or ChatCompletionRequest(messages=[{"role": "user", "content": "6 * 7"}])
        return await by.chat_completion_full_generator(
            request, _only(final), 'chatcmpl-"x"', "org/model", [], None, metadata
        )
    request = request or CompletionRequest(prompt="6 * 7", max_tokens=3)
    return by.request_output_to_completion_response([final], request, "cmpl-x", 1_700_000_000, "demo", None, metadata)


def as_bytes(made: Any) -> bytes:
    return made.body if isinstance(made, BytesAnswer) else made.model_dump_json().encode()


def without_time(body: bytes) -> dict[str, Any]:
    """An answer; `created` may be a second later."""
    tree: dict[str, Any] = orjson.loads(body)
    assert abs(tree.pop("created") - 1_700_000_000) >= 0
    return tree


@pytest.mark.parametrize("kind", ["chat", "completion"])
@pytest.mark.parametrize("fingerprint", ["vllm-0", None])
def test_the_bytes_are_vllms(kind: str, fingerprint: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 1_795_000_000.5)
    own = handler(kind, system_fingerprint=fingerprint)
    twin = with_bytes(kind, own)  # type: ignore[arg-type]
    assert twin is not own
    for text in TEXTS:
        for reason, stop in REASONS:
            final = output(text, reason, stop)
            made = asyncio.run(answered(kind, twin, final))
            assert isinstance(made, BytesAnswer)
            assert made.body == as_bytes(asyncio.run(answered(kind, own, final)))


def test_the_role_is_that_of_the_request() -> None:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    request = ChatCompletionRequest(messages=[{"role": "user", "content": "?"}], add_generation_prompt=False)
    own = handler("chat")
    made = asyncio.run(answered("chat", with_bytes("chat", own), output(), request=request))
    assert isinstance(made, BytesAnswer)
    assert orjson.loads(made.body)["choices"][0]["message"]["role"] == "user"


@pytest.mark.parametrize("kind", ["chat", "completion"])
@pytest.mark.parametrize(
    "changes",
    [
        {"kv_transfer_params": {"a": 1}},
        {"ec_transfer_params": {"a": 1}},
        {"encoder_prompt_token_ids": [1]},
        {"index": 1},
    ],
    ids=str,
)
def test_an_output_with_anything_else_in_it_is_vllms(kind: str, changes: dict[str, Any]) -> None:
    own = handler(kind)
    final = output(**changes)
    made = asyncio.run(answered(kind, with_bytes(kind, own), final))  # type: ignore[arg-type]
    assert not isinstance(made, BytesAnswer)
    assert without_time(as_bytes(made)) == without_time(as_bytes(asyncio.run(answered(kind, own, final))))


@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_an_output_that_failed_is_raised_as_vllm_does(kind: str) -> None:
    from vllm.exceptions import GenerationError

    with pytest.raises(GenerationError):
        asyncio.run(answered(kind, with_bytes(kind, handler(kind)), output(reason="error")))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_a_request_for_more_than_text_is_vllms(kind: str) -> None:
    made = asyncio.run(answered(kind, with_bytes(kind, handler(kind)), output(), alone=False))  # type: ignore[arg-type]
    assert not isinstance(made, BytesAnswer)


@pytest.mark.parametrize("kind", ["chat", "completion"])
@pytest.mark.parametrize("flag", ["enable_prompt_tokens_details", "enable_per_request_metrics", "enable_log_outputs"])
def test_a_handler_that_does_more_is_left_alone(kind: str, flag: str) -> None:
    own = handler(kind, **{flag: True})
    assert with_bytes(kind, own) is own  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_answers_of_another_form_are_vllms(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a later vLLM writes something that depends on the text."""
    own = handler(kind)
    twin = with_bytes(kind, own)  # type: ignore[arg-type]
    made: list[object] = []
    prepare = answer_bytes.checked_template

    def other(written: Any, expected: Any) -> Any:
        (marked, created), (sample, then) = written
        made.append(sample)
        return prepare([(marked, created), (sample[:-1] + b',"length":1}', then)], expected)

    monkeypatch.setattr(answer_bytes, "checked_template", other)
    for _ in range(2):
        found = asyncio.run(answered(kind, twin, output()))
        assert not isinstance(found, BytesAnswer)
    assert len(made) == 1  # not tried again
