"""Lets a filter see every answer of the engine before a client does: as the model wrote it, and as it is read where it
is JSON.

vLLM's parsers of tool calls read the model's JSON and write it anew, and so do clients with what they are sent: of
`\\u0070ear` they make what a filter of the text alone has not seen. So where an answer has an escape, what passes the
filter is looked at once more with its escapes undone, and waits until that has passed, too.
"""

from __future__ import annotations

import copy
import re
from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING, Protocol

from kserve_vllm.core.errors import InvalidRequest, Refused, RequestError
from kserve_vllm.core.request_context import RequestContext

if TYPE_CHECKING:
    from vllm.outputs import CompletionOutput, RequestOutput
    from vllm.sampling_params import SamplingParams

_REFUSED = "content_filter"
_ESCAPE = re.compile(
    r"\\(?:"
    r"u(?P<high>[dD][89abAB][0-9a-fA-F]{2})\\u(?P<low>[dD][c-fC-F][0-9a-fA-F]{2})"
    # What may go on in the next piece.
    r"|(?P<open>(?:u[dD][89abAB][0-9a-fA-F]{2}(?:\\(?:u[0-9a-fA-F]{0,3})?)?|u[0-9a-fA-F]{0,3})?\Z)"
    r"|u(?P<one>[0-9a-fA-F]{4})"
    r"|(?P<sign>[\"\\/bfnrt]))"
)
_SIGNS = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}


class Filter(Protocol):
    """Looks at one growing answer."""

    rest: str

    async def feed(self, text: str) -> str:
        """What may be sent now."""

    async def finish(self) -> str:
        """What may be sent at the end."""


class _AsRead:
    """A filter of an answer, and of what a reader of JSON makes of it.

    Args:
        new_filter: makes the filter.
    """

    def __init__(self, new_filter: Callable[[], Filter]) -> None:
        self._new_filter = new_filter
        self._filter = new_filter()
        self.rest = ""
        """What may still be sent where `finish` raised."""
        self._again: Filter | None = None
        self._passed: list[str] = []
        # Of what has passed the first filter: what is not sent yet, the begin of an escape at its end, and what the
        # second filter has not let pass yet, with its escapes undone.
        self._waiting = self._open = self._due = ""

    async def feed(self, text: str) -> str:
        """What may be sent now.

        Raises:
            RequestError: nothing more may be.
        """
        return await self._look(await self._filter.feed(text), False)

    async def finish(self) -> str:
        """What may be sent at the end.

        Raises:
            RequestError: what is in `rest`, and nothing more.
        """
        try:
            text = await self._filter.finish()
        except RequestError as error:
            try:
                self.rest = await self._look(self._filter.rest, True)
            except RequestError:
                self.rest = ""
            raise error
        return await self._look(text, True)

    async def _look(self, text: str, last: bool) -> str:
        if self._again is None:
            if "\\" not in text:
                self._passed.append(text)
                return text
            self._again = self._new_filter()
            await self._read("".join(self._passed), False)
            self._passed.clear()
        self._waiting += text
        await self._read(text, last)
        if self._due or self._open:
            return ""
        text, self._waiting = self._waiting, ""
        return text

    async def _read(self, text: str, last: bool) -> None:
        """Show the second filter what comes next.

        Raises:
            RequestError: it does not let it pass as it is. Where in the answer a replacement belongs can't be said.
        """
        assert self._again is not None
        text, self._open = _unescaped(self._open + text, last)
        self._due += text
        passed = await self._again.feed(text) if text else ""
        if last:
            passed += await self._again.finish()
        if not self._due.startswith(passed) or (last and len(passed) < len(self._due)):
            raise Refused(
                "the moderation does not let this answer pass: what it would take out is spelled with escapes",
                reason="moderation",
            )
        self._due = self._due[len(passed) :]


def _unescaped(text: str, last: bool) -> tuple[str, str]:
    """A text with JSON's escapes undone, and the begin of one at its end, unless nothing follows."""
    found: list[str] = []
    at = 0
    for escape in _ESCAPE.finditer(text):
        if escape["open"] is not None:
            if not last:
                return "".join([*found, text[at : escape.start()]]), text[escape.start() :]
            continue
        found += [text[at : escape.start()], _meant(escape)]
        at = escape.end()
    return "".join([*found, text[at:]]), ""


def _meant(escape: re.Match[str]) -> str:
    if escape["high"] is not None:
        return bytes.fromhex(escape["high"] + escape["low"]).decode("utf-16-be")
    if escape["one"] is not None:
        return bytes.fromhex(escape["one"]).decode("utf-16-be", "replace")
    return _SIGNS.get(escape["sign"], escape["sign"])


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
            each = filters.get(choice.index) or filters.setdefault(choice.index, _AsRead(new_filter))
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
