"""The frames of streams, written by vLLM's own models with marks in them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import create_model

from kserve_vllm.engine.patches import openai_stream


@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_frames_have_the_fields_of_vllm_0_33_where_its_models_have_them(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's models of today with the fields that 0.33 has added stand for those of 0.33, which can't run here."""
    from vllm.entrypoints.openai.chat_completion import protocol as chat
    from vllm.entrypoints.openai.completion import protocol as completion

    module: Any = chat if kind == "chat" else completion
    names = {
        "chat": ("ChatCompletionStreamResponse", "ChatCompletionResponseStreamChoice"),
        "completion": ("CompletionStreamResponse", "CompletionResponseStreamChoice"),
    }[kind]
    handler: Any = SimpleNamespace(system_fingerprint=None)
    before = openai_stream.write_frames(kind, handler, False, False)
    assert not before.ends_without_tokens
    choice = create_model(names[1], __base__=getattr(module, names[1]), weight_versions=(list[Any] | None, None))
    response = create_model(
        names[0],
        __base__=getattr(module, names[0]),
        choices=(list[choice], ...),  # type: ignore[valid-type]
        kv_transfer_params=(dict[str, Any] | None, None),
    )
    monkeypatch.setattr(module, names[1], choice)
    monkeypatch.setattr(module, names[0], response)
    after = openai_stream.write_frames(kind, handler, False, False)
    assert after.ends_without_tokens
    assert after.first == before.first
    for new, old in (
        (after.head + after.tail, before.head + before.tail),
        (after.last, before.last),
        (after.last_empty, before.last_empty),
    ):
        assert old.count(b"kv_transfer_params") == 0
        assert new.count(b'"kv_transfer_params":null') == 1
    # Of a chat the last choice alone has the versions, of a completion each one.
    assert after.last.count(b'"weight_versions":null') == after.last_empty.count(b'"weight_versions":null') == 1
    assert after.tail.count(b'"weight_versions":null') == (kind == "completion")
    frame = after.fill_last("", "stop", None, empty=True)
    assert b'"finish_reason":"stop"' in frame
    # An answer without a token: a chat's delta is empty, a completion's text too.
    assert (b'"delta":{}' if kind == "chat" else b'"text":""') in frame


@pytest.mark.parametrize(("mistake", "level"), [(True, "INFO"), (False, "ERROR")])
def test_a_clients_mistake_in_mid_stream_is_no_error_in_the_log(
    mistake: bool, level: str, caplog: pytest.LogCaptureFixture
) -> None:
    from vllm.exceptions import VLLMUnprocessableEntityError

    answered: list[Exception] = []

    def create(error: Exception) -> str:
        answered.append(error)
        return "{}"

    prepared: Any = SimpleNamespace(
        kind="completion", request_id="r", handler=SimpleNamespace(create_streaming_error_response=create)
    )
    error = VLLMUnprocessableEntityError("the image is none") if mistake else RuntimeError("a fault")
    with caplog.at_level("INFO"):
        assert openai_stream._failure_frame(prepared, error) == b"data: {}\n\n"
    assert answered == [error]
    assert [(each.levelname, each.exc_info is None) for each in caplog.records] == [(level, mistake)]
