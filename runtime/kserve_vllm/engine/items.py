"""Messages and input items, looked at a few at a time before vLLM looks at all of them.

vLLM's request models try each item of a conversation as every kind of item there is, and keep an error for each try.
A body of 10 KiB with 5,000 numbers for items becomes 305,000 errors that way: four seconds of the event loop, and
1.6 GiB. In slices the first wrong item ends it, and the loop turns in between.

Written against vLLM 0.32.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

import orjson

from kserve_vllm.core.errors import InvalidRequest

if TYPE_CHECKING:
    from pydantic import BaseModel

MAX_INPUT_ITEMS = 1_000
"""Items of `input` of the Responses API: each takes a tenth of a millisecond to validate."""

MAX_PROMPTS = 1_024
"""Prompts, or conversations, of one request, times `n`: each is a sequence of the engine's."""

_SLICE = 16
_SEVERAL: Mapping[str, str] = {
    "/v1/completions": "prompt",
    "/v1/completions/render": "prompt",
    "/v1/chat/completions/batch": "messages",
}
_FIELDS: Mapping[str, str] = {
    "/v1/chat/completions": "messages",
    "/v1/chat/completions/render": "messages",
    "/v1/messages": "messages",
    "/v1/messages/render": "messages",
    "/v1/messages/count_tokens": "messages",
    "/v1/responses": "input",
    "/v1/responses/render": "input",
}


async def check_items(endpoint: str, body: bytes) -> None:
    """Refuse a conversation that holds an item which is none.

    Args:
        endpoint: the route's template.
        body: of the request; whatever else is wrong with it is left to vLLM.

    Raises:
        InvalidRequest: names the item.
    """
    if (several := _SEVERAL.get(endpoint)) is not None:
        _check_prompts(several, body)
    field = _FIELDS.get(endpoint)
    # So few bytes can't hold more items than one slice.
    if field is None or len(body) < 2 * _SLICE:
        return
    try:
        tree = orjson.loads(body)
    except orjson.JSONDecodeError:
        return
    items = tree.get(field) if isinstance(tree, dict) else None
    if not isinstance(items, list):
        return
    if field == "input" and len(items) > MAX_INPUT_ITEMS:
        raise InvalidRequest(
            f"input has more than {MAX_INPUT_ITEMS} items, which is the most that is read", field=field
        )
    for at, item in enumerate(items):
        if not isinstance(item, dict):
            raise InvalidRequest(f"{field}[{at}] must be an object", field=field)
        content = item.get("content")
        if isinstance(content, list) and not all(isinstance(part, dict | str) for part in content):
            raise InvalidRequest(f"{field}[{at}].content holds a part that is no object", field=field)
    if len(items) > _SLICE:
        await _check_slices(endpoint, field, items)


def _check_prompts(field: str, body: bytes) -> None:
    """Refuse a request that is thousands of them.

    Raises:
        InvalidRequest: it is.
    """
    if b"[" not in body:
        return
    try:
        tree = orjson.loads(body)
    except orjson.JSONDecodeError:
        try:
            # vLLM's parser takes some of what this one does not.
            tree = json.loads(body)
        except (ValueError, RecursionError):
            return
    prompts = tree.get(field) if isinstance(tree, dict) else None
    if not isinstance(prompts, list) or not prompts or isinstance(prompts[0], int):
        return
    many = tree.get("n")
    if len(prompts) * (many if isinstance(many, int) and many > 0 else 1) > MAX_PROMPTS:
        raise InvalidRequest(
            f"{field}: at most {MAX_PROMPTS}, times n, are taken at once; send them in parts, or as a batch",
            field=field,
        )


async def _check_slices(endpoint: str, field: str, items: list[object]) -> None:
    from pydantic import ValidationError

    model = _model(endpoint)
    for begin in range(0, len(items), _SLICE):
        try:
            model.model_validate({field: items[begin : begin + _SLICE]})
        except ValidationError as error:
            # Errors of fields that are not given here say nothing.
            for each in error.errors(include_url=False, include_input=False, include_context=False):
                at = each["loc"]
                if len(at) > 1 and at[0] == field:
                    where = begin + at[1] if isinstance(at[1], int) else begin
                    raise InvalidRequest(f"{field}[{where}]: {each['msg']}", field=field) from None
        except Exception:  # noqa: S112 - a rule of vLLM's about the whole request, which it will state itself
            continue
        await asyncio.sleep(0)


def _model(endpoint: str) -> type[BaseModel]:
    model: type[BaseModel]
    if endpoint.startswith("/v1/responses"):
        from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

        model = ResponsesRequest
    elif endpoint.startswith("/v1/messages"):
        from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest

        model = AnthropicMessagesRequest
    else:
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

        model = ChatCompletionRequest
    return model
