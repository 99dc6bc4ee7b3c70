"""Records of vLLM's outputs: kept as bytes, and given again in every form as vLLM itself would have.

The outputs are made by vLLM's own output processor; only the tokens come from the test and not from a model.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import math
from collections.abc import AsyncGenerator, Iterable
from functools import cache
from typing import Any

import msgspec
import numpy as np
import pytest

from kserve_vllm.config import demo
from kserve_vllm.core.request_context import RequestContext, current
from kserve_vllm.engine.hooks import cache_codec as records
from kserve_vllm.engine.hooks.accounting import TokenAccounting
from kserve_vllm.engine.hooks.cache_codec import (
    CacheCodec,
    Figures,
    Record,
    canonical,
    flight_params,
    replay,
    to_record,
)
from kserve_vllm.policy.response_cache import CacheLookup, CacheOutcome, MemoryStore, ResponseCache
from tests.unit.engine import upstream

PROMPT = [5, 6, 7, 8]
ANSWER = "The quick brown fox jumps over the lazy dog, and then it does so again, until the evening comes."
KINDS = ["CUMULATIVE", "DELTA", "FINAL_ONLY"]


@cache
def tokenizer() -> Any:
    return upstream.get_tokenizer(str(demo.folder("model")))


def tokens_of(text: str) -> list[int]:
    return list(tokenizer().encode(text, add_special_tokens=False))


def greedy(**more: Any) -> upstream.SamplingParams:
    """Parameters; what is an object of vLLM's in them may be given as its fields."""
    for name, made in (
        ("structured_outputs", "StructuredOutputsParams"),
        ("repetition_detection", "RepetitionDetectionParams"),
    ):
        if isinstance(more.get(name), dict):
            more[name] = getattr(upstream, made)(**more[name])
    return upstream.SamplingParams(**{"temperature": 0.0, "max_tokens": 64, **more})


class Processor:
    """vLLM's output processor, fed by hand: one token of every continuation per step."""

    def __init__(self) -> None:
        self.vllm = upstream.OutputProcessor(tokenizer(), log_stats=False)

    def run(self, params: upstream.SamplingParams, texts: Iterable[str] = (ANSWER,)) -> list[upstream.RequestOutput]:
        """All outputs of a request that is answered with `texts`, the last one of each token's step."""
        params = params.clone()
        request = upstream.EngineCoreRequest(
            request_id="inner",
            external_req_id="outer",
            prompt_token_ids=PROMPT,
            mm_features=None,
            sampling_params=params,
            pooling_params=None,
            arrival_time=0.0,
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
        )
        queue = upstream.RequestOutputCollector(params.output_kind, "inner")
        answers = {}
        if params.n == 1:
            self.vllm.add_request(request, "text", None, 0, queue)
            answers["inner"] = tokens_of(next(iter(texts)))
        else:
            parent = upstream.ParentRequest(request)
            for index, text in zip(range(params.n), texts, strict=True):
                name, child = parent.get_child_info(index)
                one = msgspec.structs.replace(request, request_id=name, sampling_params=child)
                self.vllm.add_request(one, "text", parent, index, queue)
                answers[name] = tokens_of(text)
        outputs = []
        for step in itertools.count():
            made = [
                upstream.EngineCoreOutput(
                    name,
                    [tokens[step]],
                    new_logprobs=_logprobs(tokens[step], params.logprobs),
                    finish_reason=upstream.FinishReason.LENGTH if step == len(tokens) - 1 else None,
                )
                for name, tokens in answers.items()
                if step < len(tokens) and self.vllm.has_request(name)
            ]
            if not made:
                return outputs
            self.vllm.process_outputs(made)
            output = queue.get_nowait()
            if output is not None:
                assert isinstance(output, upstream.RequestOutput)
                outputs.append(copy.deepcopy(output))  # vLLM goes on to fill some of its lists
        raise AssertionError


def _logprobs(token: int, count: int | None) -> upstream.LogprobsLists | None:
    if count is None:
        return None
    ids = [token, *range(10, 10 + count)]
    values = [-0.1 * token / 7, *(-float(i) if i else -math.inf for i in range(count))]
    return upstream.LogprobsLists(np.array([ids]), np.array([values], dtype=np.float32), np.array([3]))


async def stream(items: Iterable[Record]) -> AsyncGenerator[Record, None]:
    for item in items:
        yield item


def replayed(
    items: Iterable[Record], kind: upstream.RequestOutputKind, figures: Figures | None = None
) -> list[upstream.RequestOutput]:
    async def run() -> list[upstream.RequestOutput]:
        return [output async for output in replay(stream(items), kind, "outer", PROMPT, "text", figures=figures)]

    return asyncio.run(run())


def stored(items: Iterable[Record]) -> list[Record]:
    """The same records from bytes."""
    codec = CacheCodec()
    packed = [codec.pack(item) for item in items]
    assert None not in packed
    return codec.unpack(b"[" + b",".join(filter(None, packed)) + b"]")


def plain(output: upstream.RequestOutput) -> dict[str, Any]:
    """All that an output says, comparable."""
    return {**vars(output), "metrics": None, "outputs": [vars(part) for part in output.outputs]}


CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "plain": ({}, [ANSWER]),
    "one token": ({}, ["The"]),
    "logprobs": ({"logprobs": 3}, [ANSWER]),
    "logprobs of the sampled token": ({"logprobs": 0}, [ANSWER]),
    "a stop string": ({"stop": ["lazy"]}, [ANSWER]),
    "a stop string that is shown": ({"stop": ["lazy"], "include_stop_str_in_output": True}, [ANSWER]),
    "three": ({"temperature": 1.0, "n": 3, "seed": 1}, [ANSWER, "Short.", "Something in between, so to speak."]),
    "two with logprobs": ({"temperature": 1.0, "n": 2, "seed": 1, "logprobs": 2}, ["Short.", ANSWER]),
    "letters of more than one token": ({}, ["äöü 漢字 🙂🙂 end"]),
}


def test_these_are_all_kinds() -> None:
    assert [kind.name for kind in upstream.RequestOutputKind] == KINDS


@pytest.mark.parametrize("kept", [False, True], ids=["running", "stored"])
@pytest.mark.parametrize("first", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_a_whole_answer_is_what_vllm_would_have_given(case: str, first: str, kept: bool) -> None:
    settings, texts = CASES[case]
    params = greedy(**settings)
    wanted = Processor().run(_with(params, upstream.RequestOutputKind.FINAL_ONLY), texts)
    items = [
        to_record(output)
        for output in Processor().run(flight_params(_with(params, upstream.RequestOutputKind[first])), texts)
    ]
    if kept:
        items = stored(items)
    figures = Figures()
    given = replayed(items, upstream.RequestOutputKind.FINAL_ONLY, figures)
    assert [plain(output) for output in given] == [plain(output) for output in wanted]
    assert figures.prompt_tokens == len(PROMPT)
    assert figures.output_tokens == sum(len(part.token_ids) for part in wanted[0].outputs)
    assert sorted(figures.finish_reasons) == sorted(str(part.finish_reason) for part in wanted[0].outputs)


@pytest.mark.parametrize("kept", [False, True], ids=["running", "stored"])
@pytest.mark.parametrize("name", ["DELTA", "CUMULATIVE"])
@pytest.mark.parametrize("case", CASES)
def test_a_streamed_answer_is_piece_by_piece_what_vllm_would_have_given(case: str, name: str, kept: bool) -> None:
    settings, texts = CASES[case]
    params, kind = greedy(**settings), upstream.RequestOutputKind[name]
    wanted = Processor().run(_with(params, kind), texts)
    items = [
        to_record(o) for o in Processor().run(flight_params(_with(params, upstream.RequestOutputKind.DELTA)), texts)
    ]
    if kept:
        items = stored(items)
    given = replayed(items, kind)
    if params.n > 1 and kind == upstream.RequestOutputKind.CUMULATIVE:
        # vLLM's collector replaces and ours shows what is new; the sum is the same.
        assert _last(given) == _last(wanted)
    else:
        assert [plain(output) for output in given] == [plain(output) for output in wanted]


def _with(params: upstream.SamplingParams, kind: upstream.RequestOutputKind) -> upstream.SamplingParams:
    changed = params.clone()
    changed.output_kind = kind
    return changed


def _last(outputs: list[upstream.RequestOutput]) -> dict[int, Any]:
    return {part.index: vars(part) for output in outputs for part in output.outputs}


def test_a_generation_for_somebody_who_does_not_stream_has_few_pieces_and_the_same_answer() -> None:
    answer = " ".join([ANSWER] * 5)
    params = greedy(max_tokens=1000, output_kind=upstream.RequestOutputKind.FINAL_ONLY)
    few = Processor().run(flight_params(params), [answer])
    tokens = len(tokens_of(answer))
    assert tokens > 100
    assert len(few) <= tokens / records.UNSTREAMED_INTERVAL + 2
    many = replayed([to_record(output) for output in few], upstream.RequestOutputKind.DELTA)
    assert len(many) == len(few)
    assert "".join(output.outputs[0].text for output in many) == answer


def test_what_one_client_does_with_its_outputs_is_not_seen_by_another() -> None:
    items = [
        to_record(output)
        for output in Processor().run(flight_params(greedy(output_kind=upstream.RequestOutputKind.DELTA)))
    ]
    before = [CacheCodec().pack(item) for item in items]
    for output in replayed(items, upstream.RequestOutputKind.DELTA):
        output.outputs[0].token_ids.append(0)  # type: ignore[attr-defined]
        output.outputs[0].text = ""
    assert [CacheCodec().pack(item) for item in items] == before


@pytest.mark.parametrize(
    ("name", "value"),
    [("kv_transfer_params", {"a": 1}), ("prompt_logprobs", [None]), ("encoder_prompt_token_ids", [1])],
)
def test_an_output_that_says_more_than_a_record_is_not_stored(name: str, value: object) -> None:
    (output,) = Processor().run(greedy(output_kind=upstream.RequestOutputKind.FINAL_ONLY))
    assert CacheCodec().pack(to_record(output)) is not None
    setattr(output, name, value)
    assert CacheCodec().pack(to_record(output)) is None


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_an_aborted_or_failed_generation_is_not_stored(reason: str) -> None:
    (output,) = Processor().run(greedy(output_kind=upstream.RequestOutputKind.FINAL_ONLY))
    output.outputs[0].finish_reason = reason
    assert CacheCodec().pack(to_record(output)) is None


@pytest.mark.parametrize("value", [b"{}", b"[1]", b"[[1,2,3]]", b"[[true,0,0,5]]", b"nonsense", b""])
def test_bytes_that_hold_no_records_are_refused(value: bytes) -> None:
    with pytest.raises(ValueError):
        CacheCodec().unpack(value)


# What is the same

CHANGES: dict[str, dict[str, Any]] = {
    "max_tokens": {"max_tokens": 63},
    "min_tokens": {"min_tokens": 1},
    "stop": {"stop": ["a"]},
    "shown stop": {"include_stop_str_in_output": True},
    "stop token": {"stop_token_ids": [3]},
    "ignore_eos": {"ignore_eos": True},
    "logprobs": {"logprobs": 1},
    "logprob tokens": {"logprob_token_ids": [1]},
    "presence": {"presence_penalty": 0.5},
    "frequency": {"frequency_penalty": 0.5},
    "repetition": {"repetition_penalty": 1.1},
    "bias": {"logit_bias": {5: 1.0}},
    "three biases": {"logit_bias": {7: 1.0, 5: 2.0, 6: 3.0}},
    "another bias": {"logit_bias": {5: 2.0}},
    "allowed": {"allowed_token_ids": [5]},
    "bad words": {"bad_words": ["x"]},
    "special tokens": {"skip_special_tokens": False},
    "spaces": {"spaces_between_special_tokens": False},
    "no text": {"detokenize": False},
    "schema": {"structured_outputs": {"json": {"type": "object"}}},
    "another schema": {"structured_outputs": {"json": {"type": "string"}}},
    "choice": {"structured_outputs": {"choice": ["a"]}},
    "thinking": {"thinking_token_budget": 5},
    "repetition found": {"repetition_detection": {"max_pattern_size": 3, "min_count": 2}},
    "seed": {"temperature": 0.5, "seed": 1},
    "another seed": {"temperature": 0.5, "seed": 2},
    "temperature": {"temperature": 0.6, "seed": 1},
    "top_p": {"temperature": 0.5, "seed": 1, "top_p": 0.9},
    "top_k": {"temperature": 0.5, "seed": 1, "top_k": 4},
    "min_p": {"temperature": 0.5, "seed": 1, "min_p": 0.1},
    "n": {"temperature": 0.5, "seed": 1, "n": 2},
}


def test_every_parameter_that_changes_the_answer_makes_another_key() -> None:
    keys = {name: canonical(PROMPT, greedy(**change)) for name, change in CHANGES.items()}
    keys["as it is"] = canonical(PROMPT, greedy())
    keys["longer prompt"] = canonical([*PROMPT, 1], greedy())
    keys["other prompt"] = canonical([5, 6, 8, 7], greedy())
    keys["salt"] = canonical({"type": "token", "prompt_token_ids": PROMPT, "cache_salt": "a"}, greedy())
    keys["other salt"] = canonical({"type": "token", "prompt_token_ids": PROMPT, "cache_salt": "b"}, greedy())
    keys["thought"] = canonical(PROMPT, greedy(), reasoning_ended=True)
    keys["template"] = canonical(PROMPT, greedy(), reasoning_parser_kwargs={"chat_template_kwargs": {"a": 1}})
    assert None not in keys.values()
    assert len(set(keys.values())) == len(keys)


def test_a_field_that_no_vllm_has_today_is_part_of_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    real = msgspec.structs.asdict
    keys = set()
    for value in (1, 2):
        monkeypatch.setattr(msgspec.structs, "asdict", lambda params, v=value: {**real(params), "from_the_future": v})
        keys.add(canonical(PROMPT, greedy()))
    assert len(keys) == 2


@pytest.mark.parametrize(
    "same",
    [
        {"output_kind": "DELTA"},
        {"output_kind": "FINAL_ONLY"},
        {"stream_interval": 5},
        {"skip_clone": True},
        {"seed": 4},
        {"top_p": 0.3},
    ],
    ids=str,
)
def test_what_does_not_change_the_answer_makes_no_other_key(same: dict[str, Any]) -> None:
    if "output_kind" in same:
        same = {"output_kind": upstream.RequestOutputKind[same["output_kind"]]}
    assert canonical(PROMPT, greedy(**same)) == canonical(PROMPT, greedy()) is not None


def test_the_key_is_the_same_for_every_way_to_give_the_prompt_and_after_vllm_has_used_the_parameters() -> None:
    params = greedy(bad_words=["the"], structured_outputs=upstream.StructuredOutputsParams(json={"b": 1, "a": 2}))
    key = canonical(PROMPT, params)
    prompt = {"type": "token", "prompt_token_ids": PROMPT, "prompt": "text", "arrival_time": 3.5}
    assert canonical(prompt, params) == canonical({"prompt_token_ids": PROMPT}, params) == key
    biased = [greedy(logit_bias=bias) for bias in ({1: 2.0, 3: 4.0}, {3: 4.0, 1: 2.0})]
    assert canonical(PROMPT, biased[0]) == canonical(PROMPT, biased[1])
    params.update_from_tokenizer(tokenizer())
    params.update_from_generation_config({}, 2)
    assert params.structured_outputs is not None
    params.structured_outputs._backend = "xgrammar"
    assert canonical(PROMPT, params) == key


def test_the_order_of_a_schema_is_part_of_the_key_since_models_follow_it() -> None:
    schemas: list[Any] = [{"properties": {key: {"type": "string"} for key in names}} for names in ("ab", "ba")]
    keys = {
        canonical(PROMPT, greedy(structured_outputs=upstream.StructuredOutputsParams(json=schema)))
        for schema in schemas
    }
    assert len(keys) == 2


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.5},
        {"temperature": 0.01},
        {"prompt_logprobs": 1},
        {"extra_args": {"kv_transfer_params": {"do_remote_prefill": True}}},
        {"flat_logprobs": True},
    ],
    ids=["chance", "a little chance", "prompt logprobs", "plugin arguments", "flat logprobs"],
)
def test_what_chance_or_the_unknown_has_a_part_in_is_not_cacheable(settings: dict[str, Any]) -> None:
    assert canonical(PROMPT, greedy(**settings)) is None


@pytest.mark.parametrize(
    "prompt",
    [
        "text",
        {"prompt": "text"},
        [],
        {"type": "embeds", "prompt_embeds": ...},
        {"prompt_token_ids": PROMPT, "multi_modal_data": {"image": ...}},
        {"prompt_token_ids": PROMPT, "mm_kwargs": {}},
        ["a"],
        [-1],
    ],
    ids=str,
)
def test_a_prompt_that_is_more_or_less_than_tokens_is_not_cacheable(prompt: object) -> None:
    assert canonical(prompt, greedy()) is None


# With the cache, and the accounting


class NoLoRAs:
    """Stands for the adapters of a model that has none."""

    def admit(self, lora: Any) -> Any:
        """The one that was asked for."""
        return lora

    def plain(self, key: str) -> str:
        """The name itself."""
        return key

    def book(self, key: str, requests: int, prompt_tokens: int, output_tokens: int) -> None:
        """Nobody asks."""


def test_a_realtime_session_whose_last_input_comes_late_is_booked() -> None:
    processor = Processor()
    accounts = TokenAccounting(processor.vllm, lambda: "base", NoLoRAs())
    context = RequestContext("r", "openai", "realtime")
    queue = upstream.RequestOutputCollector(upstream.RequestOutputKind.DELTA, "inner")

    def add(resumable: bool) -> None:
        request = upstream.EngineCoreRequest(
            "inner", PROMPT, None, greedy(), None, 0.0, None, None, None, external_req_id="outer", resumable=resumable
        )
        processor.vllm.add_request(request, "text", None, 0, queue)

    token = current.set(context)
    add(resumable=True)
    for each in tokens_of(ANSWER)[:3]:
        processor.vllm.process_outputs([upstream.EngineCoreOutput("inner", [each])])
        assert queue.get_nowait()
    processor.vllm.process_outputs([upstream.EngineCoreOutput("inner", [], finish_reason=upstream.FinishReason.STOP)])
    assert not context.engine.finished
    add(resumable=False)
    current.reset(token)
    assert not accounts.unfinished
    assert (context.engine.finished, context.engine.finish_reasons, context.engine.output_tokens) == (1, ["stop"], 3)
    assert context.engine.prompt_tokens == len(PROMPT)


def test_a_replay_is_booked_nowhere_and_a_generation_goes_to_who_stays() -> None:
    processor = Processor()
    accounts = TokenAccounting(processor.vllm, lambda: "base", NoLoRAs())
    cache: ResponseCache[Record] = ResponseCache(
        MemoryStore(1 << 20, 60), CacheCodec(), "tenant", hand_over=accounts.hand_over
    )
    enforcement = asyncio.Event()
    params = greedy(output_kind=upstream.RequestOutputKind.DELTA)

    def request_for(name: str, external: str) -> upstream.EngineCoreRequest:
        own = flight_params(params)
        return upstream.EngineCoreRequest(
            name, PROMPT, None, own, None, 0.0, None, None, None, external_req_id=external
        )

    async def generate() -> AsyncGenerator[upstream.RequestOutput, None]:
        queue = upstream.RequestOutputCollector(upstream.RequestOutputKind.DELTA, "inner")
        processor.vllm.add_request(request_for("inner", "outer"), "text", None, 0, queue)
        tokens = tokens_of(ANSWER)
        for at, token in enumerate(tokens):
            if at == 5:
                await enforcement.wait()
            end = upstream.FinishReason.LENGTH if at == len(tokens) - 1 else None
            processor.vllm.process_outputs([upstream.EngineCoreOutput("inner", [token], finish_reason=end)])
            output = queue.get_nowait()
            assert isinstance(output, upstream.RequestOutput)
            yield output

    async def client(asking: CacheLookup) -> str:
        current.set(asking.request_context)
        source = cache.answer("k", lambda: records.records(generate()), asking)
        outputs = [o async for o in replay(source, upstream.RequestOutputKind.FINAL_ONLY, "r", PROMPT)]
        return outputs[0].outputs[0].text

    async def scene() -> None:
        asked = [CacheLookup(RequestContext(name, "openai", "e"), "outer") for name in "abc"]
        assert asked[0].request_context is not None
        # The first client has a second sequence running, which nobody else waits for.
        token = current.set(asked[0].request_context)
        processor.vllm.add_request(
            request_for("alone", "other"),
            "text",
            None,
            0,
            upstream.RequestOutputCollector(upstream.RequestOutputKind.CUMULATIVE, "x"),
        )
        current.reset(token)
        tasks = [asyncio.create_task(client(asking)) for asking in asked]
        await asyncio.sleep(0.01)
        tasks[0].cancel()
        await asyncio.sleep(0.01)
        enforcement.set()
        assert await tasks[1] == await tasks[2] == ANSWER
        hit = CacheLookup(RequestContext("d", "openai", "e"))
        assert await client(hit) == ANSWER
        assert hit.outcome is CacheOutcome.HIT
        contexts = [asking.request_context for asking in [*asked, hit] if asking.request_context]
        assert [(t.engine.sequences, t.engine.finished, t.engine.output_tokens) for t in contexts] == [
            (1, 0, 0),
            (1, 1, len(tokens_of(ANSWER))),
            (0, 0, 0),
            (0, 0, 0),
        ]
        assert contexts[1].model == "base"

    asyncio.run(scene())
