"""Tokens of prompts from the tokenizers library itself are those of vLLM's tokenizer, remembered or not."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from kserve_vllm.config import demo
from kserve_vllm.core.request_context import RequestContext, current
from kserve_vllm.engine.patches import prompt_tokens as module
from kserve_vllm.engine.patches.prompt_tokens import PromptTokens, prompt_tokens

SPECIAL = ("<|im_start|>", "<|im_end|>", "<s>", "</s>", "<|im|>")
WORDS = (
    "the cat ",
    "sat",
    " on  ",
    "\n\n",
    "ü漢字",
    "🙂",
    "12345",
    " <",
    "|im_start|>",
    "<|im_",
    "<s",
    "",
    "e\u0301",
    " " * 9,
    "\u2581",
    "x" * 80,
    "</s",
    "A quick brown fox jumps over the lazy dog, and again. " * 3,
)


def bytelevel(prefix_space: bool = False) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(WORDS, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet))
    return made


def sentencepiece(scheme: str) -> Tokenizer:
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)  # type: ignore[arg-type]
    made.decoder = decoders.Metaspace(prepend_scheme=scheme)  # type: ignore[arg-type]
    made.train_from_iterator(WORDS, trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>"]))
    return made


def llama() -> Tokenizer:
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    made.train_from_iterator(WORDS, trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>"]))
    return made


def composing() -> Tokenizer:
    made = bytelevel()
    made.normalizer = normalizers.NFC()
    return made


def with_special(made: Tokenizer, **options: bool) -> Tokenizer:
    """With special tokens, and one at both ends of a text."""
    made.add_special_tokens([AddedToken(each, normalized=False, special=True, **options) for each in SPECIAL])
    ends = [(each, made.token_to_id(each)) for each in ("<s>", "</s>")]
    made.post_processor = processors.TemplateProcessing("<s> $A </s>", "<s> $A </s> $B", ends)
    return made


def hf(backend: Tokenizer) -> Any:
    """As vLLM has it."""
    from transformers import PreTrainedTokenizerFast
    from vllm.tokenizers.hf import get_cached_tokenizer, maybe_make_thread_pool

    made = get_cached_tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))
    return maybe_make_thread_pool(made, 2)


def texts() -> list[str]:
    rng = random.Random(7)
    pieces = [*WORDS, *SPECIAL, *SPECIAL]
    found = ["".join(rng.choice(pieces) for _ in range(rng.randint(0, 24))) for _ in range(300)]
    # Again, so that parts are known.
    return found + rng.sample(found, 100)


BACKENDS = {
    "bytes": bytelevel,
    "bytes with a blank before them": lambda: bytelevel(prefix_space=True),
    "sentencepiece": lambda: sentencepiece("first"),
    "sentencepiece, always": lambda: sentencepiece("always"),
    "llama": llama,
    "composed characters": composing,
}


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("added", [True, False])
def test_the_tokens_are_those_of_vllms_tokenizer(name: str, added: bool) -> None:
    tokenizer = hf(with_special(BACKENDS[name]()))
    found = prompt_tokens(tokenizer)
    assert found is not None
    assert found.remembers
    for text in texts():
        assert found.of(text, added) == tokenizer(text, add_special_tokens=added)["input_ids"], repr(text)


@pytest.mark.parametrize("option", ["lstrip", "rstrip", "single_word"])
def test_nothing_is_remembered_where_special_tokens_look_at_what_is_beside_them(option: str) -> None:
    tokenizer = hf(with_special(bytelevel(), **{option: True}))
    found = prompt_tokens(tokenizer)
    assert found is not None
    assert not found.remembers
    for text in texts():
        assert found.of(text, True) == tokenizer(text)["input_ids"]


def test_the_demo_model() -> None:
    from vllm.tokenizers import get_tokenizer

    tokenizer = get_tokenizer(str(demo.folder("model")))
    found = prompt_tokens(tokenizer)
    assert found is not None
    assert found.remembers
    rng = random.Random(3)
    special = [token.content for token in tokenizer._tokenizer.get_added_tokens_decoder().values()]
    for _ in range(200):
        text = "".join(rng.choice([*WORDS, *special]) for _ in range(12))
        assert found.of(text, True) == tokenizer(text)["input_ids"]


def test_a_truncating_backend_is_left_as_it_is() -> None:
    backend = with_special(bytelevel())
    backend.enable_truncation(4)
    tokenizer = hf(backend)
    found = prompt_tokens(tokenizer)
    assert found is not None
    assert len(found.of("the cat sat on the mat", True)) > 4
    assert backend.truncation is not None


def test_a_tokenizer_with_code_of_its_own_is_left_to_vllm() -> None:
    from transformers import PreTrainedTokenizerFast

    class Own(PreTrainedTokenizerFast):  # type: ignore[misc]
        def _encode_plus(self, *args: Any, **kwargs: Any) -> Any:
            return super()._encode_plus(*args, **kwargs)

    assert prompt_tokens(Own(tokenizer_object=with_special(bytelevel()))) is None
    assert prompt_tokens(object()) is None


def test_tokens_that_come_out_otherwise_are_left_to_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PromptTokens, "_encoded", lambda *_: [1, 2, 3])
    assert prompt_tokens(hf(with_special(bytelevel()))) is None


class Counting:
    """A backend that counts what it is asked for."""

    def __init__(self, backend: Tokenizer) -> None:
        self._backend = backend
        self.asked: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def encode_batch_fast(self, texts: list[str], add_special_tokens: bool) -> Any:
        self.asked += texts
        return self._backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)


def counting() -> tuple[PromptTokens, Counting]:
    backend = Counting(with_special(bytelevel()))
    return PromptTokens(backend), backend  # type: ignore[arg-type]


SYSTEM = "<|im_start|>" + "You are kind to cats. " * 5
QUESTION = "<|im_start|>" + "May the cat sit on the mat? " * 5


def test_a_part_that_was_there_before_is_not_tokenized_again() -> None:
    found, backend = counting()
    found.of(SYSTEM + QUESTION, False)
    found.of(SYSTEM + "<|im_start|>" + "And the dog? " * 9, False)
    assert backend.asked.count(SYSTEM) == 1
    assert len(backend.asked) == 3


def test_tenants_share_nothing() -> None:
    found, backend = counting()
    for tenant in ("a", "b", "a"):
        context = RequestContext("1", "openai", "/")
        context.access.tenant = tenant
        token = current.set(context)
        found.of(SYSTEM, False)
        current.reset(token)
    assert backend.asked == [SYSTEM, SYSTEM]


def test_what_is_remembered_is_bounded_and_the_oldest_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_REMEMBERED", 10 * (len(SYSTEM) + module.OVERHEAD))
    found, backend = counting()
    for number in range(100):
        found.of(SYSTEM, False)
        found.of(f"{QUESTION} {number}", False)
    assert backend.asked.count(SYSTEM) == 1
    assert len(found.known) <= 10
    assert found.size == sum(len(part) + module.OVERHEAD for _, part in found.known)


def test_what_is_found_can_be_changed_by_who_asked() -> None:
    found, _ = counting()
    for text in (SYSTEM, SYSTEM + QUESTION):
        first = found.of(text, False)
        expected = list(first)
        first.append(0)
        assert found.of(text, False) == expected


def test_a_text_of_nothing_but_special_tokens_is_tokenized_at_once() -> None:
    found, backend = counting()
    text = "<s>" * 1000
    assert len(found.of(text, False)) == 1000
    assert backend.asked == [text]


def test_the_longest_special_token_counts() -> None:
    made = bytelevel()
    names = ["<a>", "<a><b>", "<b>"]
    made.add_special_tokens([AddedToken(each, normalized=False) for each in names])
    found = PromptTokens(made)
    for parts in itertools.product(["<a>", "<b>", "cat " * 20], repeat=4):
        text = "".join(parts)
        assert found.of(text, False) == made.encode(text, add_special_tokens=False).ids


def test_the_library_has_what_is_leant_on() -> None:
    assert hasattr(tokenizers.Tokenizer, "encode_batch_fast")
