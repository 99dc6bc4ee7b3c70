"""Texts made at the end of an answer are those that vLLM's incremental detokenizer makes, token by token."""

from __future__ import annotations

import random
import types
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from kserve_vllm.engine.patches import late_text
from kserve_vllm.engine.patches.late_text import is_local, late_detokenizer, make_texts_at_the_end
from tests.unit.engine.test_outputs import Front, output, told

SPECIAL = ["<s>", "</s>", "<|im_end|>"]
WORDS = [
    "the",
    "ing",
    "foo",
    ".",
    ",",
    "Grüße",
    "ß",
    "漢字",
    "日",
    "🙂",
    "e\u0301",
    "a",
    "b",
    "\n",
    "\t",
    "0x",
    "\ufffd",
]


def sentencepiece_like(*parts: Any) -> Tokenizer:
    """Pieces with `\u2581` for a space, and a token for each byte."""
    words = [*WORDS, *(f"\u2581{word}" for word in WORDS), "\u2581", "\u2581\u2581", "\u2581\u2581\u2581"]
    names = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    vocabulary = {name: number for number, name in enumerate(dict.fromkeys(names))}
    made = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    made.decoder = decoders.Sequence(list(parts)) if len(parts) > 1 else parts[0]
    return made


def of_bytes(decoder: Any) -> Tokenizer:
    """Pieces of bytes, of which characters outside of ASCII have several; some pieces hold half a character."""
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = [split.pre_tokenize_str(word)[0][0] for word in [*WORDS, *(f" {word}" for word in WORDS)]]
    halves = [word[:cut] for word in words for cut in (1, 2) if len(word) > cut]
    names = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *words, *halves]
    vocabulary = {name: number for number, name in enumerate(dict.fromkeys(names))}
    made = Tokenizer(models.BPE(vocabulary, []))
    made.decoder = decoder
    return made


SPACE = decoders.Replace("\u2581", " ")
TOKENIZERS = {
    "bytes": of_bytes(decoders.ByteLevel()),
    "bytes in a sequence": of_bytes(decoders.Sequence([decoders.ByteLevel()])),
    "llama": sentencepiece_like(SPACE, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)),
    "gemma": sentencepiece_like(SPACE, decoders.ByteFallback(), decoders.Fuse()),
    "metaspace": sentencepiece_like(decoders.Metaspace()),
    "metaspace, never in front": sentencepiece_like(decoders.Metaspace(prepend_scheme="never")),
}
for each in TOKENIZERS.values():
    each.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    each.add_tokens([AddedToken("<tool>", special=False), AddedToken("Ünder", special=False)])


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    from transformers import PreTrainedTokenizerFast

    made = PreTrainedTokenizerFast(tokenizer_object=TOKENIZERS[request.param])
    made.vocab_cache = None
    return made


def pieces(tokenizer: Any, chance: random.Random, count: int, broken: float) -> list[int]:
    """Ids of words, special tokens and characters' bytes in order; some, as `broken` says, of any kind at all."""
    vocabulary = tokenizer._tokenizer.get_vocab() if tokenizer.vocab_cache is None else tokenizer.vocab_cache
    tokenizer.vocab_cache = vocabulary
    size = len(vocabulary)
    of_bytes = "<0x00>" not in vocabulary
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    found: list[int] = []
    while len(found) < count:
        if chance.random() < broken:
            found.append(chance.choice([chance.randrange(size), chance.randrange(size), size + 7]))
        elif chance.random() < 0.1:
            found.append(vocabulary[chance.choice([*SPECIAL, "<tool>"])])
        elif chance.random() < 0.3:
            raw = chance.choice(["é", "漢", "🙂", "x"]).encode()
            if of_bytes:
                found += [vocabulary[each] for each in split.pre_tokenize_str(raw.decode())[0][0]]
            else:
                found += [vocabulary[f"<0x{byte:02X}>"] for byte in raw]
        else:
            word = chance.choice(WORDS[:-1])
            if of_bytes:
                found.append(vocabulary[split.pre_tokenize_str(chance.choice(["", " "]) + word)[0][0]])
            else:
                found.append(vocabulary[chance.choice(["", "\u2581"]) + word])
                if chance.random() < 0.2:
                    found.append(vocabulary["\u2581" * chance.choice([1, 2, 3])])
    return found if chance.random() < 0.3 else found[:count]


def request(prompt: list[int] | None, **params: Any) -> Any:
    from vllm.sampling_params import SamplingParams

    return types.SimpleNamespace(request_id="r", prompt_token_ids=prompt, sampling_params=SamplingParams(**params))


@pytest.mark.parametrize("at_once", [late_text.AT_ONCE, 12, 3])
@pytest.mark.parametrize("broken", [0.0, 0.02, 0.5])
def test_texts_are_those_that_vllm_makes_token_by_token(
    tokenizer: Any, broken: float, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer

    monkeypatch.setattr(late_text, "AT_ONCE", at_once)
    stayed = 0
    for seed in range(60):
        chance = random.Random(seed)
        prompt = pieces(tokenizer, chance, chance.choice([0, 1, 2, 5, 30]), broken * chance.choice([0, 1]))
        tokens = pieces(tokenizer, chance, chance.choice([0, 1, 2, 9, 60]), broken)
        skip, stopped, shown = (chance.random() < 0.5 for _ in range(3))
        asked = request(
            prompt if chance.random() < 0.9 else None, skip_special_tokens=skip, include_stop_str_in_output=shown
        )
        both = [FastIncrementalDetokenizer(tokenizer, asked) for _ in range(2)]
        late = both[1]
        late.__class__ = late_detokenizer()
        late.begin(asked.prompt_token_ids or [])
        cuts = sorted(chance.randrange(len(tokens) + 1) for _ in range(chance.choice([0, 3, len(tokens)])))
        parts = [tokens[a:b] for a, b in zip([0, *cuts], [*cuts, len(tokens)], strict=True)]
        for number, part in enumerate(parts):
            ends = stopped and number == len(parts) - 1
            assert [each.update(list(part), ends) for each in both] == [None, None]
            assert late.num_output_tokens() == both[0].num_output_tokens()
        texts = [each.get_next_output_text(True, False) for each in both]
        assert texts[1] == texts[0], (seed, prompt, tokens)
        assert late.output_token_ids == both[0].output_token_ids
        assert late.get_next_output_text(True, False) == texts[0]
        stayed += type(late) is not FastIncrementalDetokenizer
    # Whole characters need nothing of vLLM's stream, but for parts too short to have neighbours.
    assert stayed > (30 if broken == 0 and at_once > 3 else 0)


def test_a_text_that_is_asked_for_before_its_end_is_vllms(tokenizer: Any) -> None:
    from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer

    chance = random.Random(5)
    for _ in range(20):
        tokens = pieces(tokenizer, chance, 30, 0.1)
        both = [FastIncrementalDetokenizer(tokenizer, request([1, 5])) for _ in range(2)]
        both[1].__class__ = late_detokenizer()
        both[1].begin([1, 5])
        for part in (tokens[:11], tokens[11:]):
            for each in both:
                each.update(list(part), False)
            assert both[0].get_next_output_text(False, False) == both[1].get_next_output_text(False, False)


@pytest.mark.parametrize(
    "params",
    [
        {"stop": ["x"]},
        {"logprobs": 1},
        {"prompt_logprobs": 1},
        {"detokenize": False},
        {"skip_special_tokens": False, "spaces_between_special_tokens": False},
        {"output_kind": "DELTA"},
        {"output_kind": "CUMULATIVE"},
    ],
    ids=str,
)
def test_other_requests_are_vllms(tokenizer: Any, params: dict[str, Any]) -> None:
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer, IncrementalDetokenizer

    front = Front(tokenizer, apart=False)
    assert make_texts_at_the_end(types.SimpleNamespace(output_processor=front.processor))  # type: ignore[arg-type]
    kind = RequestOutputKind[params.get("output_kind", "FINAL_ONLY")]
    front.add("r", [1, 5], **{**params, "output_kind": kind})
    front.add("late", [1, 5], output_kind=RequestOutputKind.FINAL_ONLY)
    kinds = {name: type(state.detokenizer) for name, state in front.processor.request_states.items()}
    assert kinds["r"] in (FastIncrementalDetokenizer, IncrementalDetokenizer)
    assert kinds["late"] is late_detokenizer()


@pytest.mark.parametrize("apart", [False, True], ids=["outputs by vLLM", "plain outputs apart"])
@pytest.mark.parametrize("ending", ["length", "stop", "abort"])
def test_answers_are_those_of_vllms_processor(tokenizer: Any, ending: str, apart: bool) -> None:
    """Through the output processor: one answer, and three of one request (n=3)."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams
    from vllm.v1.engine import FinishReason
    from vllm.v1.engine.parallel_sampling import ParentRequest

    chance = random.Random(3)
    names = ["r0", "0_p", "1_p", "2_p"]
    tokens = {name: pieces(tokenizer, chance, 25, 0.03 * number) for number, name in enumerate(names)}
    answers = []
    for late in (False, True):
        front = Front(tokenizer, apart=apart and late)
        if late:
            make_texts_at_the_end(types.SimpleNamespace(output_processor=front.processor))  # type: ignore[arg-type]
        front.add("r0", [1, 5], output_kind=RequestOutputKind.FINAL_ONLY)
        parent = ParentRequest(_engine_request("p", SamplingParams(n=3, output_kind=RequestOutputKind.FINAL_ONLY)))
        given = front.handed_over["p"] = []
        for index in range(3):
            name, params = parent.get_child_info(index)
            child = _engine_request(name, params)
            front.processor.add_request(child, "prompt", parent, index, types.SimpleNamespace(put=given.append))
        for step in range(0, 24, 3):
            front.step(1.0 + step, *(output(name, ids[step : step + 3]) for name, ids in tokens.items()))
        if ending == "abort":
            front.processor.abort_requests(list(tokens), internal=True)
        else:
            reason = FinishReason.STOP if ending == "stop" else FinishReason.LENGTH
            front.step(99.0, *(output(name, ids[24:25], finish_reason=reason) for name, ids in tokens.items()))
        assert not front.processor.request_states
        answers.append({name: told(found) for name, found in front.handed_over.items()})
    assert answers[1] == answers[0]
    assert all(answers[0].values())


def _engine_request(name: str, params: Any) -> Any:
    from vllm.v1.engine import EngineCoreRequest

    return EngineCoreRequest(
        request_id=name,
        external_req_id=name,
        prompt_token_ids=[1, 5],
        mm_features=None,
        sampling_params=params,
        pooling_params=None,
        arrival_time=1.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        decoders.WordPiece(),
        decoders.CTC(),
        decoders.BPEDecoder(),
        decoders.Sequence([SPACE, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 0, 1)]),
        decoders.Sequence([decoders.Replace(".", "!"), decoders.ByteFallback(), decoders.Fuse()]),
        decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()]),
        decoders.Sequence([decoders.ByteLevel(), decoders.WordPiece()]),
    ],
    ids=str,
)
def test_other_decoders_stay_vllms(decoder: Any) -> None:
    assert not is_local(decoder)
    made = of_bytes(decoder) if decoder is not None else Tokenizer(models.BPE())
    processor = types.SimpleNamespace(tokenizer=types.SimpleNamespace(_tokenizer=made))
    assert not make_texts_at_the_end(types.SimpleNamespace(output_processor=processor))  # type: ignore[arg-type]


def test_a_model_without_a_tokenizer_stays_vllms() -> None:
    processor = types.SimpleNamespace(tokenizer=None)
    assert not make_texts_at_the_end(types.SimpleNamespace(output_processor=processor))  # type: ignore[arg-type]
