"""Prompts of short chats that are nothing but messages, without what vLLM works out for each of them anew.

Which template is taken, with which variables, in which form it wants a message's content, how long a prompt may be: for
a request that sets nothing of that, it is the same each time. So what vLLM hands to the template is noted once, and
what it makes of a few chats is compared with what is made here, before it is used. Requests with any other field, and
chats that are not taken or too long, are vLLM's.

Written against vLLM 0.32.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias, cast

from kserve_vllm.engine.patches.inline_rendering import ShortPrompts

if TYPE_CHECKING:
    from jinja2 import Template
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat

log = logging.getLogger(__name__)

_FIELDS = frozenset(
    "model messages stream stream_options temperature top_p top_k min_p n max_tokens max_completion_tokens stop seed "
    "presence_penalty frequency_penalty repetition_penalty logit_bias ignore_eos min_tokens stop_token_ids "
    "include_stop_str_in_output skip_special_tokens spaces_between_special_tokens user priority bad_words "
    "allowed_token_ids request_id session_id".split()
)
"""That have nothing to do with the prompt, but for the messages and the number of tokens."""
_MESSAGE = {"role", "content"}
_ROLES = frozenset({"system", "user", "assistant"})
_HEADER = "x-"
"""Begins a line that vLLM leaves out of some system messages."""
_OTHER = 16  # characters of a message beside its content

Message: TypeAlias = dict[str, object]
_TRIED: Sequence[list[Message]] = (
    [{"role": "user", "content": "kserve-vllm looks what a chat becomes"}],
    [{"role": "system", "content": " Be kind.\n"}, {"role": "user", "content": "ü 漢字 🙂\n\n 2 + 2 "}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<b> & 'c' \"d\" {{ e }} {% f %}"},
        {"role": "user", "content": " "},
    ],
)


def with_plain_chats(handler: OpenAIServingChat, prompts: ShortPrompts | None) -> OpenAIServingChat:
    """A copy of vLLM's handler that makes the prompts of plain chats itself; the handler where it can't."""
    if prompts is None or prompts.tokens is None:
        return handler
    online = handler.online_renderer
    if online.parser is not None or online.use_harmony:
        return handler
    twin = copy.copy(handler)
    twin.render_chat_request = PlainChats(handler, prompts).render
    return twin


class PlainChats:
    """In the place of `OpenAIServingChat.render_chat_request`.

    Args:
        handler: vLLM's.
        prompts: what short prompts are made with.
    """

    def __init__(self, handler: OpenAIServingChat, prompts: ShortPrompts) -> None:
        assert prompts.tokens is not None
        self._handler = handler
        self._prompts = prompts
        self._tokens = prompts.tokens
        self._most = int(handler.model_config.max_model_len)
        self._write: Callable[[list[Message]], str] | None = None
        self._in_parts = False
        self._tried = False
        self._works = False

    async def render(self, request: ChatCompletionRequest) -> object:
        """vLLM's, of a validated request: the conversation and the engine's inputs, or an error."""
        own: Callable[[ChatCompletionRequest], Awaitable[object]] = self._handler.render_chat_request
        if not self._is_plain(request):
            return await own(request)
        if not self._tried:
            self._tried = True
            await self._prepare()
        if not self._works or not self._prompts.has_room(_size(request.messages)):
            return await own(request)
        if await self._handler._check_model(request) is not None:
            return await own(request)
        self._handler._preflight(request.n or 1)
        # Not by its name, which pydantic calls deprecated with each request.
        wanted = vars(request)["max_tokens"] if request.max_completion_tokens is None else request.max_completion_tokens
        made = self._made(request.messages, wanted or 0)
        return await own(request) if made is None else made

    def _is_plain(self, request: ChatCompletionRequest) -> bool:
        messages = request.messages
        return (
            _FIELDS.issuperset(request.model_fields_set)
            and isinstance(messages, list)
            and bool(messages)
            and all(map(_is_plain, messages))
        )

    def _made(self, messages: list[Message], wanted: int) -> tuple[list[Message], list[dict[str, object]]] | None:
        """Conversation and prompt; None where vLLM has to say what is wrong."""
        assert self._write is not None
        arrival = time.time()
        conversation: list[Message] = [
            {
                "role": message["role"],
                "content": [{"type": "text", "text": message["content"]}] if self._in_parts else message["content"],
            }
            for message in messages
        ]
        try:
            text = self._write(conversation)
        except Exception:
            return None
        tokens = self._tokens.of(text, False)
        if not text or not 0 <= wanted < self._most - len(tokens):
            return None
        prompt = {"type": "token", "prompt_token_ids": tokens, "prompt": text, "arrival_time": arrival}
        return conversation, [prompt]

    async def _prepare(self) -> None:
        """Note what vLLM gives to the template, and see whether the same comes out here."""
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

        render = self._handler.online_renderer.render_chat
        try:
            with _noted() as calls:
                await render(ChatCompletionRequest(messages=_TRIED[0]))
            # Others' chats may have been rendered meanwhile.
            own = [call for call in calls if _content(call[1]) == _TRIED[0][0]["content"]]
            # In another thread, where there was no room here: then another time.
            if not own:
                self._tried = False
                return
            template, variables = own[0]
            first = cast("list[Message]", variables.pop("messages"))[0]
            self._in_parts = not isinstance(first["content"], str)
            self._write = lambda conversation: template.render(messages=conversation, **variables)
            for messages in _TRIED:
                if not await self._agrees(messages):
                    log.warning("vLLM makes the prompts of all chats: its own have another form than is known here")
                    return
            self._works = True
        except Exception as error:
            log.warning("vLLM makes the prompts of all chats: %r", error)

    async def _agrees(self, messages: list[Message]) -> bool:
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.exceptions import VLLMValidationError

        made = self._made(messages, 0)
        try:
            found = await self._handler.online_renderer.render_chat(ChatCompletionRequest(messages=messages))
        except VLLMValidationError:
            return made is None  # the template does not take it
        if made is None or not isinstance(found, tuple):
            return False
        (conversation, (prompt,)), (ours, (own_prompt,)) = found, made
        return bool(conversation == ours and {**prompt, "arrival_time": 0} == {**own_prompt, "arrival_time": 0})


def _is_plain(message: object) -> bool:
    """Whether a message is text of one of the common roles."""
    if not isinstance(message, dict) or message.keys() != _MESSAGE or message["role"] not in _ROLES:
        return False
    content = message["content"]
    if not isinstance(content, str) or not content:
        return False
    return message["role"] != "system" or not content.startswith(_HEADER)


def _content(variables: Mapping[str, object]) -> object:
    """The text of the first message that a template was given."""
    content = cast("list[Message]", variables["messages"])[0]["content"]
    return content[0]["text"] if isinstance(content, list) else content


def _size(messages: Sequence[Mapping[str, str]]) -> int:
    return sum(len(message["content"]) + _OTHER for message in messages)


@contextlib.contextmanager
def _noted() -> Iterator[list[tuple[Template, dict[str, object]]]]:
    """Which templates are rendered in this thread meanwhile, and with what."""
    from jinja2 import Template

    here = threading.get_ident()
    calls: list[tuple[Template, dict[str, object]]] = []
    render = Template.render

    def noting(self: Template, *args: object, **kwargs: object) -> str:
        if threading.get_ident() == here and not args and "messages" in kwargs:
            calls.append((self, dict(kwargs)))
        return render(self, *args, **kwargs)

    Template.render = noting  # type: ignore[method-assign]
    try:
        yield calls
    finally:
        Template.render = render  # type: ignore[method-assign]
