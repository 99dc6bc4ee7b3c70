"""Short prompts are rendered and tokenized where they are, on the event loop.

vLLM hands each chat template and each tokenization to a thread. For a prompt of a few hundred characters that costs
more than the work: two threads wait for each other and for the interpreter's lock. Long prompts stay with the thread,
and so does what comes in such numbers that the loop would be held up.

Written against vLLM 0.32.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, ParamSpec, TypeVar

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

P = ParamSpec("P")
T = TypeVar("T")

SHORT = 4096
"""Characters that are rendered or tokenized in place at most."""
_AT_ONCE = 8 * SHORT
"""Characters in one pass of the event loop, of all requests."""
_OTHER = 8  # for a part of a request that is no text


def render_short_prompts_in_place(client: AsyncLLM, foreign_templates: bool) -> None:
    """Let `client` do so. Only where the seam to vLLM's renderers is as known: see `compat`.

    Args:
        foreign_templates: whether a request may bring its own chat template, which may take any time. Then templates
            stay with the thread, where vLLM gives them up after a while.
    """
    from vllm.renderers.hf import HfRenderer, safe_apply_chat_template

    renderer = client.renderer
    place = _Place(asyncio.get_running_loop())
    tokenize_elsewhere: Callable[[Mapping[str, str], object], Awaitable[object]] = renderer._tokenize_prompt_async

    def tokenize(prompt: Mapping[str, str], params: object) -> Awaitable[object]:
        if place.has_room(len(prompt["prompt"])):
            return place.done(renderer._tokenize_prompt, prompt, params)
        return tokenize_elsewhere(prompt, params)

    renderer._tokenize_prompt_async = tokenize
    if foreign_templates or type(renderer) is not HfRenderer:
        return
    render_elsewhere: Callable[..., Awaitable[object]] = renderer._apply_chat_template_async

    def render(config: object, tokenizer: object, conversation: object, **options: object) -> Awaitable[object]:
        of_client = [value for name, value in options.items() if name != "chat_template"]
        if place.has_room(characters(conversation) + characters(of_client)):
            return place.done(safe_apply_chat_template, config, tokenizer, conversation, **options)
        return render_elsewhere(config, tokenizer, conversation, **options)

    renderer._apply_chat_template_async = render


def characters(value: object) -> int:
    """How much a template may have to write of this; beyond `SHORT`, just some number beyond it.

    A number may be a count of something: it is more than `SHORT`. No recursion: a client decides how deep this goes.
    """
    size = 0
    left: list[object] = [value]
    while left and size <= SHORT:
        each = left.pop()
        if isinstance(each, str):
            size += len(each)
        elif isinstance(each, dict):
            size += _OTHER * len(each)
            left.extend(each.values())
        elif isinstance(each, list | tuple):
            size += _OTHER * len(each)
            left.extend(each)
        else:
            size += _OTHER if each is None or isinstance(each, bool) else SHORT + 1
    return size


class _Place:
    """The event loop, as far as it may be held up."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._left = _AT_ONCE

    def has_room(self, size: int) -> bool:
        """Whether so many characters can be worked on now; they count as being worked on."""
        if size > SHORT or size > self._left:
            return False
        if self._left == _AT_ONCE:
            self._loop.call_soon(self._rest)
        self._left -= size + _OTHER
        return True

    def _rest(self) -> None:
        self._left = _AT_ONCE

    def done(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Awaitable[T]:
        """Do it; a future, as vLLM's own way gives one."""
        future: asyncio.Future[T] = self._loop.create_future()
        try:
            future.set_result(work(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future
