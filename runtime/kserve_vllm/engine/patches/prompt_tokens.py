"""The tokens of a prompt, from the tokenizers library itself, and those of parts that were there before from memory.

vLLM asks transformers, which asks the library and makes five lists of what it says, of which one is read: besides the
tokens themselves where each of them stands in the text, which nobody asked for. Here the library is asked for tokens
alone.

What follows a special token is tokenized as if nothing stood before it. So a chat falls apart into its messages, and
those that a client sends again with each turn, or with each question, as a system prompt, need not be tokenized again.
They are remembered for each tenant apart, as how long an answer takes would tell one what another has asked. Nor is
anything remembered of a tokenizer whose special tokens take blanks beside them, or whose text of parts is another.

Written against vLLM 0.32, transformers 5 and tokenizers 0.23.
"""

from __future__ import annotations

import copy
import itertools
import logging
import re
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kserve_vllm.core.request_context import current

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

log = logging.getLogger(__name__)

MOST_REMEMBERED = 4 << 20
"""Characters of the parts that are remembered, of all tenants."""
_LEAST_PART = 64
"""Characters of a part that is worth remembering."""
_MOST_PARTS = 64
OVERHEAD = 256
"""Characters that a remembered part counts for beside its own."""
_TRIED_SPECIAL = 16
_TRIED = ("2 + 2", " of bread", "ü 漢字\n\n🙂  ", "<0x41>")


def prompt_tokens(tokenizer: object) -> PromptTokens | None:
    """What tokenizes prompts as a tokenizer of vLLM's does; None where that does more than ask the library."""
    import tokenizers
    from transformers import PreTrainedTokenizerBase, TokenizersBackend
    from vllm.tokenizers.hf import ThreadSafeHFTokenizerMixin

    backend = getattr(tokenizer, "_tokenizer", None)
    if type(backend) is not tokenizers.Tokenizer or not isinstance(tokenizer, TokenizersBackend):
        return None
    known = (PreTrainedTokenizerBase, TokenizersBackend)
    for cls in type(tokenizer).__mro__:
        # vLLM's pool of copies goes on to the same method of one of them.
        pool = ThreadSafeHFTokenizerMixin in cls.__bases__
        if cls not in known and not pool and not vars(cls).keys().isdisjoint(("__call__", "_encode_plus")):
            return None
    made = copy.deepcopy(backend)
    made.no_truncation()
    made.no_padding()
    made.encode_special_tokens = tokenizer.split_special_tokens
    found = PromptTokens(made)
    special = [token.content for token in made.get_added_tokens_decoder().values()][:_TRIED_SPECIAL]
    for text in (*_TRIED, "".join(f"{token} {text}" for token in special for text in _TRIED)):
        for added in (True, False):
            if found.of(text, added) != tokenizer(text, add_special_tokens=added)["input_ids"]:
                log.warning("prompts are tokenized by transformers: its tokens of %r are others", text[:40])
                return None
    found.forget()
    return found


class PromptTokens:
    """Tokenizes texts.

    Args:
        backend: without truncation and padding; of nobody else.
    """

    def __init__(self, backend: Tokenizer) -> None:
        self._backend = backend
        self._beginnings = _beginnings(backend)
        self._around = _around(backend) if self._beginnings is not None else None
        # Four bytes a token, of which a list of numbers takes forty.
        self.known: dict[tuple[str, str], array[int]] = {}
        self.size = 0

    @property
    def remembers(self) -> bool:
        """Whether parts are remembered."""
        return self._around is not None

    def forget(self) -> None:
        """Remember nothing of what came so far."""
        self.known.clear()
        self.size = 0

    def of(self, text: str, special: bool) -> list[int]:
        """The tokens of a text.

        Args:
            text: of any length.
            special: whether the tokenizer adds its special tokens at beginning and end.
        """
        parts = self._parts(text)
        if parts is None or self._around is None:
            return self._encoded(text, special)
        context = current.get()
        tenant = "" if context is None else context.access.tenant
        found: list[int] = []
        for part in parts:
            found += self._of_part(part, tenant)
        if not special:
            return found
        before, after = self._around
        return [*before, *found, *after]

    def _parts(self, text: str) -> list[str] | None:
        """The text, cut before each special token; None where it is not worth it."""
        if self._beginnings is None or len(text) < _LEAST_PART:
            return None
        places = [match.start() for match in self._beginnings.finditer(text)]
        if len(places) > _MOST_PARTS:
            return None
        places = [0, *(place for place in places if place), len(text)]
        return [text[begin:end] for begin, end in itertools.pairwise(places)]

    def _of_part(self, part: str, tenant: str) -> Sequence[int]:
        if len(part) < _LEAST_PART:
            return self._encoded(part, False)
        key = tenant, part
        tokens = self.known.pop(key, None)
        if tokens is None:
            tokens = array("I", self._encoded(part, False))
            self.size += len(part) + OVERHEAD
        # Last used, last forgotten.
        self.known[key] = tokens
        while self.size > MOST_REMEMBERED:
            oldest = next(iter(self.known))
            del self.known[oldest]
            self.size -= len(oldest[1]) + OVERHEAD
        return tokens

    def _encoded(self, text: str, special: bool) -> list[int]:
        # A batch, since only that can be had without the places of tokens.
        ids: list[int] = self._backend.encode_batch_fast([text], add_special_tokens=special)[0].ids
        return ids


def _beginnings(backend: Tokenizer) -> re.Pattern[str] | None:
    """Finds the special tokens in a text as the library does, from the left and the longest first; None where a text
    can't be cut before them."""
    # Where there is a normalizer, others are looked for in what it has made of the parts between these.
    added: list[AddedToken] = list(backend.get_added_tokens_decoder().values())
    found = [token for token in added if not token.normalized or backend.normalizer is None]
    if not found or backend.encode_special_tokens:
        return None
    if any(token.lstrip or token.rstrip or token.single_word or not token.content for token in found):
        return None
    contents = sorted((token.content for token in found), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, contents)))


def _around(backend: Tokenizer) -> tuple[list[int], list[int]] | None:
    """The tokens that are added before and after those of a text; None where it is not that simple."""
    around: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()
    for text in _TRIED:
        inner = backend.encode(text, add_special_tokens=False).ids
        whole = backend.encode(text, add_special_tokens=True).ids
        places = [at for at in range(len(whole) - len(inner) + 1) if whole[at : at + len(inner)] == inner]
        if len(places) != 1:
            return None
        around.add((tuple(whole[: places[0]]), tuple(whole[places[0] + len(inner) :])))
    if len(around) != 1:
        return None
    before, after = around.pop()
    return list(before), list(after)
