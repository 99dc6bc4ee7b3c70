"""The text of a whole answer is made once, at its end.

vLLM turns each token into text when it comes, also where nobody reads the text before the answer is complete
(`RequestOutputKind.FINAL_ONLY`): a step of its decode stream for each token, which decodes the last few tokens twice.
Where no stop string has to be found in the text, all tokens are decoded at once here.

That comes to the same text where a decoder's text of some tokens is the text of the first of them followed by that of
the others, as long as each character is whole. Decoders of bytes (`ByteLevel`) and of sentencepiece (`Metaspace`, or
`Replace`, `ByteFallback`, `Fuse` and `Strip`) are like that. Other decoders stay vLLM's, and so does each answer that
has a replacement character in it, which is what broken characters come to: how many of those are written depends on
where the stream's steps begin. It is put through vLLM's own stream then.

Written against vLLM 0.32.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING

from kserve_vllm.engine.engine_request import EngineRequest

if TYPE_CHECKING:
    from tokenizers.decoders import Decoder
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer

log = logging.getLogger(__name__)

AT_ONCE = 512
"""Tokens that are decoded at once at most, so that the event loop is not held up by a long answer."""
_BROKEN = "\ufffd"
_CONTEXT = (8, 9, 10, 11)
"""Tokens of a prompt's end that are enough to see how its text ends; more where the first one is half a character."""
_LAST = 8
"""Tokens at the end of a part among which two neighbours with whole characters are looked for."""


def make_texts_at_the_end(client: AsyncLLM) -> bool:
    """Let `client` do so. Must run before its first request.

    Returns:
        False where all texts stay vLLM's, as the model's decoder is none of those above.
    """
    import tokenizers
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer

    processor = client.output_processor
    backend = getattr(processor.tokenizer, "_tokenizer", None)
    if type(backend) is not tokenizers.Tokenizer or not is_local(backend.decoder):
        return False
    late = late_detokenizer()
    add = processor.add_request

    def add_request(request: EngineRequest, *args: object, **kwargs: object) -> None:
        add(request, *args, **kwargs)
        params = request.sampling_params
        if params is None or params.output_kind != RequestOutputKind.FINAL_ONLY or request.resumable:
            return
        if params.logprobs is not None or params.prompt_logprobs is not None:
            return
        detokenizer = processor.request_states[request.request_id].detokenizer
        if (
            type(detokenizer) is FastIncrementalDetokenizer
            and not detokenizer.stop
            and not detokenizer.token_ids
            and detokenizer.spaces_between_special_tokens
        ):
            detokenizer.__class__ = late
            detokenizer.begin(request.prompt_token_ids or [])

    processor.add_request = add_request
    return True


def is_local(decoder: Decoder | None) -> bool:
    """Whether a decoder of the tokenizers library is one of those whose texts can be put together."""
    if decoder is None:
        return False
    found = json.loads(decoder.__getstate__())
    if found["type"] == "Sequence":
        parts = found["decoders"]
        if len(parts) == 1:
            return _is_whole(parts[0])
        order = ["Replace", "ByteFallback", "Fuse", "Strip"]
        kinds = [part["type"] for part in parts]
        return (
            kinds in (order, order[:3])
            and parts[0]["pattern"] == {"String": "\u2581"}
            and parts[0]["content"] == " "
            and (len(parts) == 3 or (parts[3]["content"], parts[3]["start"], parts[3]["stop"]) == (" ", 1, 0))
        )
    return _is_whole(found)


def _is_whole(part: Mapping[str, object]) -> bool:
    return part["type"] in ("ByteLevel", "Metaspace")


@cache
def late_detokenizer() -> type[FastIncrementalDetokenizer]:
    """A class of vLLM's detokenizers that makes text at the end. A function, since vLLM takes seconds to import."""
    import tokenizers.decoders
    from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer

    class LateDetokenizer(FastIncrementalDetokenizer):  # type: ignore[misc]
        """Of a request without stop strings whose text is asked for once. vLLM's own one becomes this, and becomes
        vLLM's again where characters are broken: its stream is kept at where the text that is made ends."""

        def begin(self, prompt: Sequence[int]) -> None:
            """No token has come yet; the stream knows the prompt's tokens."""
            self.before = prompt
            """Tokens that the stream knows."""
            self.made = 0
            """Tokens whose text is made."""
            self.unseen = False
            """Whether the last token is the one that ended the answer, and has no text."""

        def update(self, new_token_ids: list[int], stop_terminated: bool) -> str | None:
            """Keep the tokens. Never finds a stop string."""
            if new_token_ids:
                self.token_ids.extend(new_token_ids)
                self.unseen = stop_terminated and not self.include_stop_str_in_output
                if len(self.token_ids) - self.made >= AT_ONCE and not stop_terminated:
                    self._make_part()
            return None

        def get_next_output_text(self, finished: bool, delta: bool) -> str:
            """All text. Asked for at the end; before that, vLLM has the request from then on."""
            text = self._text_of(self._left()) if finished else None
            if text is None:
                self._leave_to_vllm()
            else:
                self.output_text += text
                self.made = len(self.token_ids)
            # Not super(): this may be vLLM's by now.
            made: str = FastIncrementalDetokenizer.get_next_output_text(self, finished, delta)
            return made

        def _left(self) -> list[int]:
            """Tokens that no text is made of yet."""
            left: list[int] = self.token_ids[self.made : len(self.token_ids) - self.unseen]
            return left

        def _text_of(self, new: list[int]) -> str | None:
            """Text of tokens after those before; None where characters are broken."""
            if not new:
                return ""
            for size in _CONTEXT:
                context = self.before[-size:]
                if len(context) < len(self.before) and self._is_byte(context[0]):
                    continue
                head = self._decoded(context)
                if head is None or (len(context) < len(self.before) and (not head or _BROKEN in head)):
                    continue
                break
            else:
                context = self.before
                head = self._decoded(context)
            if head is None or _BROKEN in head:
                return None
            both = self._decoded([*context, *new])
            if both is None or _BROKEN in both or not both.startswith(head):
                return None
            return both[len(head) :]

        def _is_byte(self, token: int) -> bool:
            """Whether a token is one byte of a character that began before it, maybe."""
            word = self.tokenizer.id_to_token(token)
            return word is None or word.startswith("<0x")

        def _decoded(self, tokens: Sequence[int]) -> str | None:
            try:
                text: str = self.tokenizer.decode(tokens, skip_special_tokens=self.skip_special_tokens)
            except (OverflowError, TypeError):  # a number that no token has; vLLM logs it
                return None
            return text

        def _make_part(self) -> None:
            """Make text up to two neighbours that have whole characters each: vLLM's stream would know nothing but the
            second of them then, and can be made anew at that place."""
            left = self._left()
            if self._text_of(left[:-_LAST]) is None:
                self._leave_to_vllm()
                return
            for end in range(len(left), max(2, len(left) - _LAST), -1):
                texts = [self._text_of(left[:size]) for size in (end - 2, end - 1, end)]
                if None not in texts and len(texts[0] or "") < len(texts[1] or "") < len(texts[2] or ""):
                    self.output_text += texts[2] or ""
                    self.made += end
                    self.before = [left[end - 1]]
                    self.stream = tokenizers.decoders.DecodeStream(
                        ids=self.before, skip_special_tokens=self.skip_special_tokens
                    )
                    return
            self._leave_to_vllm()

        def _leave_to_vllm(self) -> None:
            """Put what is left through vLLM's stream, which takes each token from now on."""
            left, unseen = self._left(), self.unseen
            last = self.token_ids[-1:] if unseen else []
            del self.token_ids[self.made :]
            self.__class__ = FastIncrementalDetokenizer
            FastIncrementalDetokenizer.update(self, left + last, unseen)

    return LateDetokenizer
