"""Prompts rendered on the event loop come out as those that vLLM renders in its thread, and don't hold the loop up."""

from __future__ import annotations

import asyncio
import threading
import types
from collections.abc import Coroutine, Iterator
from typing import Any

import pytest

from kserve_vllm.config import demo
from kserve_vllm.engine.patches import inline_rendering as rendering
from kserve_vllm.engine.patches.inline_rendering import SHORT, characters, render_short_prompts_in_place

Messages = list[dict[str, Any]]


@pytest.fixture(scope="module")
def config() -> Any:
    """vLLM's configuration of the demo model; no engine is started."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    return AsyncEngineArgs(model=str(demo.folder("model"))).create_engine_config()


@pytest.fixture
def renderer(config: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """vLLM's renderer of the demo model: `threads` it worked in, and how often in the loop's in each of `passes`."""
    import vllm.renderers.hf as hf
    from vllm.renderers import renderer_from_config

    made = renderer_from_config(config)
    made.threads = []
    made.passes = [0]

    def noted(work: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            made.threads.append(threading.current_thread())
            if threading.current_thread() is threading.main_thread():
                made.passes[-1] += 1
            return work(*args, **kwargs)

        return run

    from vllm.utils.async_utils import make_async

    rest = rendering.RenderingTurn.rest

    def next_pass(place: Any) -> None:
        made.passes.append(0)
        rest(place)

    monkeypatch.setattr(rendering.RenderingTurn, "rest", next_pass)
    monkeypatch.setattr(hf, "safe_apply_chat_template", noted(hf.safe_apply_chat_template))
    made._build_tokens_prompt = noted(made._build_tokens_prompt)
    made._apply_chat_template_async = make_async(hf.safe_apply_chat_template, executor=made._executor)
    made._tokenize_prompt_async = make_async(made._tokenize_prompt, executor=made._executor)
    yield made
    made.shutdown()


async def tokens(renderer: Any, messages: Messages, **options: Any) -> list[int]:
    """What the engine would get for a chat."""
    from vllm.renderers import ChatParams, TokenizeParams

    options = {"add_generation_prompt": True, "tokenize": False, **options}  # as vLLM's handler has them
    template = ChatParams(chat_template=None, chat_template_kwargs=options)
    _, (prompt,) = await renderer.render_chat_async([messages], template, TokenizeParams(max_total_tokens=100_000))
    return list(prompt["prompt_token_ids"])


def in_place(renderer: Any, work: Coroutine[Any, Any, Any], foreign_templates: bool = False) -> tuple[Any, list[bool]]:
    """What `work` returns with short prompts in place, and whether each step ran in the loop's thread."""

    async def run() -> Any:
        render_short_prompts_in_place(types.SimpleNamespace(renderer=renderer), foreign_templates)  # type: ignore[arg-type]
        return await work

    renderer.threads.clear()
    renderer.passes[:] = [0]
    found = asyncio.run(run())
    return found, [thread is threading.current_thread() for thread in renderer.threads]


def said(text: str) -> Messages:
    return [{"role": "system", "content": "Add."}, {"role": "user", "content": text}]


@pytest.mark.parametrize("text", ["2 + 2 =", "ü 漢字 🙂 " * 20, "", "x" * SHORT, "12 + 7 = " * 1000])
def test_the_tokens_are_those_of_vllms_own_way(renderer: Any, text: str) -> None:
    expected = asyncio.run(tokens(renderer, said(text)))
    assert len(renderer.threads) == 2
    assert threading.current_thread() not in renderer.threads
    found, on_loop = in_place(renderer, tokens(renderer, said(text)))
    assert found == expected
    assert on_loop == [len(text) < SHORT] * 2


def test_a_template_stays_in_its_thread_where_requests_may_bring_one(renderer: Any) -> None:
    _, on_loop = in_place(renderer, tokens(renderer, said("2 + 2")), foreign_templates=True)
    assert on_loop == [False, True]


@pytest.mark.parametrize("option", [{"times": 10**9}, {"documents": [{"text": "x" * SHORT}]}])
def test_what_may_make_a_template_slow_stays_in_its_thread(renderer: Any, option: dict[str, Any]) -> None:
    _, on_loop = in_place(renderer, tokens(renderer, said("2 + 2"), **option))
    assert on_loop == [False, True]


def test_many_at_once_do_not_hold_up_the_loop(renderer: Any) -> None:
    async def all_of_them() -> list[list[int]]:
        return await asyncio.gather(*(tokens(renderer, said("1 + 1 " * 100)) for _ in range(200)))

    (first, *others), on_loop = in_place(renderer, all_of_them())
    assert all(other == first for other in others)
    assert len(on_loop) == 400
    # How many passes there are while threads do the others is the machine's affair.
    assert 0 < max(renderer.passes) * 600 <= rendering.AT_ONCE
    assert not all(on_loop)


def test_a_failure_is_raised_where_it_is_awaited(renderer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("no such token")

    monkeypatch.setattr(renderer, "_build_tokens_prompt", fail)
    with pytest.raises(ValueError, match="no such token"):
        in_place(renderer, tokens(renderer, said("2 + 2")))


@pytest.mark.parametrize(
    ("value", "size"),
    [("abc", 3), (None, 8), (True, 8), (["ab", {"k": "abc"}], 8 + 2 + 8 + 8 + 3), (1, SHORT + 1), (0.5, SHORT + 1)],
)
def test_characters_of_a_value(value: Any, size: int) -> None:
    assert characters(value) == size


def test_what_a_client_nests_deeply_is_long() -> None:
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    assert characters(nested) > SHORT
