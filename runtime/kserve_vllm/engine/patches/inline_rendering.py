"""Short prompts are rendered and tokenized where they are, on the event loop.

vLLM hands each chat template and each tokenization to a thread, and has a task of the event loop for each step towards
that. For a prompt of a few hundred characters that costs more than the work: two threads wait for each other and for
the interpreter's lock. So prompts of text go through what vLLM has for callers without an event loop, which is the same
in plain calls. Long prompts stay with the thread, and so does what comes in such numbers that the loop would be held
up.

Written against vLLM 0.32.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, ParamSpec, Protocol, TypeVar

from kserve_vllm.engine.patches.prompt_tokens import PromptTokens, prompt_tokens

if TYPE_CHECKING:
    from vllm.renderers.base import BaseRenderer
    from vllm.v1.engine.async_llm import AsyncLLM

P = ParamSpec("P")
T = TypeVar("T")

SHORT = 4096
"""Characters that are rendered or tokenized in place at most."""
AT_ONCE = 8 * SHORT
"""Characters in one pass of the event loop, of all requests."""
_OTHER = 8  # for a part of a request that is no text


class ShortPrompts:
    """What short prompts are made with.

    Args:
        place: where they are.
        tokens: tokenizes them; None where vLLM's tokenizer does.
    """

    def __init__(self, place: RenderingTurn, tokens: PromptTokens | None) -> None:
        self._place = place
        self.tokens = tokens

    def has_room(self, size: int) -> bool:
        """Whether a chat of so many characters can be rendered and tokenized now; then it has to be."""
        return self._place.has_room(size, works=2)


def render_short_prompts_in_place(client: AsyncLLM, foreign_templates: bool) -> ShortPrompts | None:
    """Let `client` do so. Only where the seam to vLLM's renderers is as known: see `compat`.

    Args:
        foreign_templates: whether a request may bring its own chat template, which may take any time. Then templates
            stay with the thread, where vLLM gives them up after a while.
    """
    from vllm.renderers.hf import HfRenderer, safe_apply_chat_template

    renderer = client.renderer
    place = RenderingTurn(asyncio.get_running_loop())
    # For embeddings among text, vLLM adds a token to the tokenizer later.
    tokens = None if renderer.model_config.enable_prompt_embeds else prompt_tokens(renderer.tokenizer)
    if tokens is not None:
        _tokenize_alone(renderer, tokens)
    _complete_in_place(renderer, place)
    # Asked for with each request, of a copy of the tokenizer each time.
    end = renderer.get_eos_token_id()
    renderer.get_eos_token_id = lambda: end
    tokenize_elsewhere: Callable[[Mapping[str, str], object], Awaitable[object]] = renderer._tokenize_prompt_async

    def tokenize(prompt: Mapping[str, str], params: object) -> Awaitable[object]:
        if place.has_room(len(prompt["prompt"])):
            return place.done(renderer._tokenize_prompt, prompt, params)
        return tokenize_elsewhere(prompt, params)

    renderer._tokenize_prompt_async = tokenize
    if foreign_templates or type(renderer) is not HfRenderer:
        return None
    render_elsewhere: Callable[..., Awaitable[object]] = renderer._apply_chat_template_async

    def render(config: object, tokenizer: object, conversation: object, **options: object) -> Awaitable[object]:
        of_client = [value for name, value in options.items() if name != "chat_template"]
        if place.has_room(characters(conversation) + characters(of_client)):
            return place.done(safe_apply_chat_template, config, tokenizer, conversation, **options)
        return render_elsewhere(config, tokenizer, conversation, **options)

    renderer._apply_chat_template_async = render
    _chat_in_place(renderer, place)
    return ShortPrompts(place, tokens)


class _Tokenize(Protocol):
    """vLLM's parameters of a tokenization, as far as they are read here."""

    def get_encode_kwargs(self) -> dict[str, int | bool | None]:
        """What the tokenizer is called with."""


class _ChatParams(Protocol):
    """vLLM's parameters of a chat's rendering, as far as they are read here."""

    chat_template_kwargs: Mapping[str, object]


def _tokenize_alone(renderer: BaseRenderer, tokens: PromptTokens) -> None:
    """Have `renderer` tokenize short prompts without transformers."""
    tokenize: Callable[[Mapping[str, str], _Tokenize], object] = renderer._tokenize_prompt

    def tokenized(prompt: Mapping[str, str], params: _Tokenize) -> object:
        text = prompt["prompt"]
        # What has to be cut off is cut by the library, and a long text is not tokenized twice for that.
        if len(text) <= SHORT and not renderer._wants_offsets(prompt, params):
            options = params.get_encode_kwargs()
            found = tokens.of(text, bool(options["add_special_tokens"]))
            most = options.get("max_length") if options["truncation"] else None
            if most is None or len(found) <= most:
                return renderer._build_tokens_prompt(found, prompt)
        return tokenize(prompt, params)

    renderer._tokenize_prompt = tokenized


def _complete_in_place(renderer: BaseRenderer, place: RenderingTurn) -> None:
    """Have `renderer` make prompts for completions of one short text without a task."""
    complete_elsewhere: Callable[..., Awaitable[object]] = renderer.render_cmpl_async

    def complete(prompts: Sequence[object], *args: object, **options: object) -> Awaitable[object]:
        text = _only_text(prompts)
        if text is not None and place.has_room(len(text)):
            return place.done(renderer.render_cmpl, prompts, *args, **options)
        return complete_elsewhere(prompts, *args, **options)

    renderer.render_cmpl_async = complete


def _chat_in_place(renderer: BaseRenderer, place: RenderingTurn) -> None:
    """Have `renderer` make the prompt of one short chat without a task."""
    chat_elsewhere: Callable[..., Awaitable[object]] = renderer.render_chat_async

    def chat(
        conversations: Sequence[object], chat_params: _ChatParams, *args: object, **options: object
    ) -> Awaitable[object]:
        if len(conversations) == 1 and _is_plain(conversations[0]):
            # Its tokens are made from what the template has written, of which the messages are all that is long.
            size = characters(conversations[0]) + characters(chat_params.chat_template_kwargs)
            if place.has_room(size, works=2):
                return place.done(renderer.render_chat, conversations, chat_params, *args, **options)
        return chat_elsewhere(conversations, chat_params, *args, **options)

    renderer.render_chat_async = chat


def _only_text(prompts: Sequence[object]) -> str | None:
    """The text of prompts that are no more than that."""
    if len(prompts) != 1 or not isinstance(prompts[0], dict) or prompts[0].keys() != {"prompt"}:
        return None
    text = prompts[0]["prompt"]
    return text if isinstance(text, str) else None


def _is_plain(messages: object) -> bool:
    """Whether messages are text alone, so that nothing has to be fetched for them."""
    return isinstance(messages, list) and all(
        isinstance(message, dict) and isinstance(message.get("content"), str | None) for message in messages
    )


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


class RenderingTurn:
    """The event loop, as far as it may be held up."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._left = AT_ONCE

    def has_room(self, size: int, works: int = 1) -> bool:
        """Whether so many characters can be worked on now, `works` times; they count as being worked on."""
        if size > SHORT or works * size > self._left:
            return False
        if self._left == AT_ONCE:
            self._loop.call_soon(self.rest)
        self._left -= works * (size + _OTHER)
        return True

    def rest(self) -> None:
        """A new pass of the event loop: as many characters again may be rendered on it."""
        self._left = AT_ONCE

    def done(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Awaitable[T]:
        """Do it; a future, as vLLM's own way gives one."""
        future: asyncio.Future[T] = self._loop.create_future()
        try:
            future.set_result(work(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future
