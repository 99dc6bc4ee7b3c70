"""Prompts of plain chats are those that vLLM makes, for templates of all kinds; others are left to vLLM."""

from __future__ import annotations

import asyncio
import random
import types
from collections.abc import Iterator
from typing import Any

import pytest

from kserve_vllm.config import demo
from kserve_vllm.engine.patches.inline_rendering import SHORT, render_short_prompts_in_place
from kserve_vllm.engine.patches.plain_chats import PlainChats, with_plain_chats

pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated")

IN_PARTS = (
    "{%- for m in messages -%}<|{{ m.role }}|>"
    "{%- for part in m.content -%}{%- if part.type == 'text' -%}{{ part.text }}{%- endif -%}{%- endfor -%}"
    "{{ eos_token }}{%- endfor -%}{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)
PLAIN = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
STRICT = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system message here') }}{% endif %}" + PLAIN
WITH_VARIABLES = "{% if enable_thinking is defined and enable_thinking %}<think>{% endif %}{{ tone }}" + PLAIN
TEMPLATES: dict[str, tuple[str | None, dict[str, Any]]] = {
    "the model's": (None, {}),
    "in parts": (IN_PARTS, {}),
    "plain": (PLAIN, {}),
    "strict": (STRICT, {}),
    "with variables": (WITH_VARIABLES, {"enable_thinking": True, "tone": "dry"}),
}
WORDS = ("17 + 25 =", "ü 漢字 🙂", '"quotes" \\ \n', " ", "<|user|>", "<|eos|>x", "{{ bos_token }}", "a" * 70)


@pytest.fixture(scope="module")
def config() -> Any:
    """vLLM's configuration of the demo model; no engine is started."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    return AsyncEngineArgs(model=str(demo.folder("model")), max_model_len=512).create_engine_config()


@pytest.fixture
def renderer(config: Any) -> Iterator[Any]:
    from vllm.renderers import renderer_from_config

    made = renderer_from_config(config)
    yield made
    made.shutdown()


class Handler:
    """As much of vLLM's handler as a prompt needs."""

    def __init__(self, renderer: Any, template: str | None = None, **variables: Any) -> None:
        from vllm.renderers.online_renderer import OnlineRenderer

        self.model_config = renderer.model_config
        self.online_renderer = OnlineRenderer(
            renderer.model_config,
            renderer,
            request_logger=None,
            chat_template=template,
            chat_template_content_format="auto",
            default_chat_template_kwargs=variables,
        )
        self.asked = 0
        self.refusal: object = None

    async def _check_model(self, _: Any) -> object:
        return self.refusal

    def _preflight(self, _: int) -> None:
        return None

    async def render_chat_request(self, request: Any) -> Any:
        """vLLM's."""
        self.asked += 1
        return self.refusal or await self.online_renderer.render_chat(request)


def chat(messages: Any, **fields: Any) -> Any:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    return ChatCompletionRequest(messages=messages, **fields)


def said(rng: random.Random) -> list[dict[str, str]]:
    roles = rng.choice([["user"], ["system", "user"], ["user", "assistant", "user"], ["assistant"], ["system"]])
    return [{"role": role, "content": " ".join(rng.choices(WORDS, k=rng.randint(1, 5)))} for role in roles]


async def _outcome(work: Any) -> Any:
    """What comes out, without the time; or what is raised, in words."""
    try:
        found = await work
    except Exception as error:
        return type(error), str(error)
    if not isinstance(found, tuple):
        return found
    conversation, (prompt,) = found
    return conversation, {**prompt, "arrival_time": 0}


def plain(handler: Handler, renderer: Any) -> PlainChats:
    prompts = render_short_prompts_in_place(types.SimpleNamespace(renderer=renderer), False)  # type: ignore[arg-type]
    assert prompts is not None
    return PlainChats(handler, prompts)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_are_vllms(name: str, renderer: Any) -> None:
    template, variables = TEMPLATES[name]
    rng = random.Random(name)

    async def run() -> tuple[int, int]:
        theirs, handler = Handler(renderer, template, **variables), Handler(renderer, template, **variables)
        chats = plain(handler, renderer)
        for number in range(60):
            await asyncio.sleep(0)
            fields: dict[str, Any] = rng.choice(
                [{}, {"max_tokens": 20}, {"max_completion_tokens": 5, "stop": ["x"]}, {"temperature": 0, "seed": 3}]
            )
            request = chat(said(rng) if number else [{"role": "user", "content": "2 + 2"}], model="demo", **fields)
            expected = await _outcome(theirs.render_chat_request(request))
            assert await _outcome(chats.render(request)) == expected
        return handler.asked, 60

    asked, of = asyncio.run(run())
    # Only what a template refuses is left to vLLM, which says why.
    assert asked == 0 if name != "strict" else 0 < asked < of


OTHER: list[dict[str, Any]] = [
    {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}], "tool_choice": "none"},
    {"chat_template_kwargs": {"tone": "kind"}},
    {"add_generation_prompt": False},
    {"continue_final_message": True, "add_generation_prompt": False},
    {"truncate_prompt_tokens": 3},
    {"cache_salt": "x"},
    {"reasoning_effort": "low"},
    {"add_special_tokens": True},
    {"return_token_ids": True},
    {"echo": True},
    {"documents": [{"title": "t", "text": "x"}]},
    {"response_format": {"type": "json_object"}},
    {"some_field": 1},
    {"max_tokens": 100_000},
    {"max_tokens": 512},
]


@pytest.mark.parametrize("fields", OTHER, ids=str)
def test_other_requests_are_vllms(fields: dict[str, Any], renderer: Any) -> None:
    async def run() -> None:
        handler = Handler(renderer, WITH_VARIABLES)
        chats = plain(handler, renderer)
        await chats.render(chat([{"role": "user", "content": "2"}]))
        before = handler.asked
        request = chat([{"role": "user", "content": "2 + 2"}], **fields)
        expected = await _outcome(Handler(renderer, WITH_VARIABLES).render_chat_request(request))
        assert await _outcome(chats.render(request)) == expected
        assert handler.asked == before + 1

    asyncio.run(run())


MESSAGES: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": ""}],
    [{"role": "user", "content": [{"type": "text", "text": "2"}]}],
    [{"role": "user", "content": "2", "name": "me"}],
    [{"role": "developer", "content": "2"}],
    [{"role": "tool", "content": "2", "tool_call_id": "1"}],
    [{"role": "system", "content": "x-anthropic-billing-header: cch=1\nBe kind."}, {"role": "user", "content": "2"}],
    [{"role": "user", "content": "2 " * 400}],
    [{"role": "user", "content": "x" * (SHORT + 1)}],
]


@pytest.mark.parametrize("messages", MESSAGES, ids=lambda found: str(found)[:60])
def test_other_messages_are_vllms(messages: list[dict[str, Any]], renderer: Any) -> None:
    async def run() -> None:
        handler = Handler(renderer)
        chats = plain(handler, renderer)
        await chats.render(chat([{"role": "user", "content": "2"}]))
        before = handler.asked
        expected = await _outcome(Handler(renderer).render_chat_request(chat(messages)))
        assert await _outcome(chats.render(chat(messages))) == expected
        assert handler.asked == before + 1

    asyncio.run(run())


def test_a_model_that_is_not_there_is_vllms_to_refuse(renderer: Any) -> None:
    async def run() -> None:
        handler = Handler(renderer)
        chats = plain(handler, renderer)
        await chats.render(chat([{"role": "user", "content": "2"}]))
        handler.refusal = object()
        assert await chats.render(chat([{"role": "user", "content": "2"}])) is handler.refusal

    asyncio.run(run())


def test_prompts_of_another_form_are_vllms(renderer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a later vLLM adds something to them."""

    async def run() -> None:
        handler = Handler(renderer)
        chats = plain(handler, renderer)
        render = handler.online_renderer.render_chat

        async def other(request: Any) -> Any:
            conversation, (prompt,) = await render(request)
            return conversation, [{**prompt, "more": 1}]

        monkeypatch.setattr(handler.online_renderer, "render_chat", other)
        for number in range(3):
            _, (prompt,) = await chats.render(chat([{"role": "user", "content": "2"}]))
            assert prompt["more"] == 1
            assert handler.asked == number + 1

    asyncio.run(run())


def test_a_handler_with_a_parser_is_left_alone(renderer: Any) -> None:
    handler: Any = Handler(renderer)
    assert with_plain_chats(handler, None) is handler

    async def prompts() -> Any:
        return render_short_prompts_in_place(types.SimpleNamespace(renderer=renderer), False)  # type: ignore[arg-type]

    made = asyncio.run(prompts())
    assert with_plain_chats(handler, made) is not handler
    handler.online_renderer.parser = object
    assert with_plain_chats(handler, made) is handler
