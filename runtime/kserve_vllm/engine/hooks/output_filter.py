"""Lets a filter see every answer of the engine before a client does."""

from __future__ import annotations

import copy
from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING, Protocol

from kserve_vllm.core.errors import InvalidRequest, RequestError
from kserve_vllm.core.request_context import RequestContext

if TYPE_CHECKING:
    from vllm.outputs import CompletionOutput, RequestOutput
    from vllm.sampling_params import SamplingParams

_REFUSED = "content_filter"


class Filter(Protocol):
    """Looks at one growing answer."""

    rest: str

    async def feed(self, text: str) -> str:
        """What may be sent now."""

    async def finish(self) -> str:
        """What may be sent at the end."""


def check_parameters(params: SamplingParams) -> None:
    """Refuse what would show an answer in another form than its filtered text.

    Raises:
        InvalidRequest: log probabilities are asked for; they spell the answer out.
    """
    if params.logprobs is not None or params.prompt_logprobs is not None:
        raise InvalidRequest("answers are moderated here, and log probabilities would show them", field="logprobs")


async def filtered(
    stream: AsyncGenerator[RequestOutput, None],
    context: RequestContext,
    new_filter: Callable[[], Filter],
    cumulative: bool,
) -> AsyncGenerator[RequestOutput, None]:
    """vLLM's outputs with their texts as the filter lets them pass.

    An answer that is refused at its beginning is an error. One that is refused later ends with what may be shown and
    the finish reason `content_filter`, as do all answers to the same request.

    Args:
        stream: of one request.
        request context: of the request; a refusal at the beginning is left on it.
        new_filter: makes the filter of one answer (of `n`).
        cumulative: whether each output repeats the text so far, and not only what is new.
    """
    filters: dict[int, Filter] = {}
    seen: dict[int, int] = {}
    passed: dict[int, str] = {}
    ended: set[int] = set()
    begun = False
    async for output in stream:
        for choice in output.outputs:
            each = filters.setdefault(choice.index, new_filter())
            new = choice.text[seen.get(choice.index, 0) :] if cumulative else choice.text
            seen[choice.index] = len(choice.text)
            text = ""
            try:
                text = await each.feed(new)
                if choice.finish_reason is not None:
                    ended.add(choice.index)
                    text += await each.finish()
            except RequestError as error:
                text += each.rest
                if not begun and not text:
                    context.refusal = error
                    raise
                context.cut_off = True
                choice.text = passed.get(choice.index, "") + text if cumulative else text
                ended.discard(choice.index)
                yield _cut_off(output, choice, set(filters), ended)
                return
            passed[choice.index] = passed.get(choice.index, "") + text
            choice.text = passed[choice.index] if cumulative else text
            begun = begun or bool(text)
        if output.finished or any(choice.text or choice.finish_reason for choice in output.outputs):
            yield output


def _cut_off(output: RequestOutput, refused: CompletionOutput, begun: set[int], ended: set[int]) -> RequestOutput:
    """The last output: what may be shown of the refused answer, and the end of every answer that has not ended.

    Args:
        output: with the refused answer; those in front of it were looked at, those behind it were not.
        refused: of the answers; its text is what may be shown.
        begun: indices of the answers that were looked at, now or before.
        ended: of those, the ones that have come whole.
    """
    here = {choice.index: choice for choice in output.outputs}
    looked_at = set()
    for choice in output.outputs:
        looked_at.add(choice.index)
        if choice is refused:
            break
    choices = []
    for index in sorted((begun - ended) | set(here)):
        if index in ended:
            # It came whole with this output.
            choices.append(here[index])
            continue
        choice = copy.copy(here.get(index, refused))
        choice.index = index
        choice.finish_reason, choice.stop_reason = _REFUSED, None
        if index not in looked_at:
            choice.text, choice.token_ids = "", []
        choices.append(choice)
    last = copy.copy(output)
    last.outputs, last.finished = choices, True
    return last
