"""Plain outputs processed apart come to the same as those that vLLM processes: texts, tokens, statistics, metrics."""

from __future__ import annotations

import random
import types
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest

from kserve_vllm.config import demo
from kserve_vllm.engine.patches import plain_outputs as outputs
from kserve_vllm.engine.patches.plain_outputs import process_plain_outputs_apart, send_to

TEXTS = ["12 + 7 = 19.", "ü 漢字 🙂🙃 ß", "a b  c\n\n\td", "\ufffd x \ufffd", "x" * 30]
ENDS = ["length", "stop", "stop_token", "abort", "stop_string"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from vllm.tokenizers import get_tokenizer

    return get_tokenizer(str(demo.folder("model")))


class Front:
    """vLLM's output processor with requests in it, and all that it hands over."""

    def __init__(self, tokenizer: Any, apart: bool) -> None:
        from vllm.v1.engine.output_processor import OutputProcessor

        self.processor: Any = OutputProcessor(tokenizer, log_stats=True)
        self.vllms = 0
        self.versions: tuple[str | None, str | None] = "v1", "v2"
        """Of the weights, in the beginning and later."""
        if apart:
            process = self.processor.process_outputs

            def counted(given: list[Any], *args: Any, **kwargs: Any) -> Any:
                self.vllms += len(given)
                return process(given, *args, **kwargs)

            self.processor.process_outputs = counted
            process_plain_outputs_apart(types.SimpleNamespace(output_processor=self.processor, logger_manager=None))  # type: ignore[arg-type]
        self.handed_over: dict[str, list[Any]] = {}
        self.statistics: list[dict[str, Any]] = []
        self.aborts: list[str] = []

    def add(self, request_id: str, prompt: list[int], **params: Any) -> None:
        """Take a request up; with `sink`, its texts are handed over."""
        from vllm.sampling_params import SamplingParams
        from vllm.v1.engine import EngineCoreRequest

        wants_sink = params.pop("sink", False)
        given = self.handed_over[request_id] = []
        request = EngineCoreRequest(
            request_id=request_id,
            external_req_id=request_id,
            prompt_token_ids=prompt,
            mm_features=None,
            sampling_params=SamplingParams(**params),
            pooling_params=None,
            arrival_time=1.0,
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
        )
        self.processor.add_request(request, "prompt", None, 0, types.SimpleNamespace(put=given.append))
        if wants_sink:
            state = self.processor.request_states[request_id]
            take = state.detokenizer.get_next_output_text

            def make(new_token_ids: list[int], pooling_output: Any, finish_reason: Any, *_: Any, **__: Any) -> None:
                given.append((take(finish_reason is not None, True), len(new_token_ids)))

            state.make_request_output = make
            send_to(state, lambda text, tokens: given.append((text, tokens)))

    def step(self, timestamp: float, *found: Any) -> None:
        """One step of the engine."""
        from vllm.v1.metrics.stats import IterationStats

        stats = IterationStats()
        stats.iteration_timestamp = 100.0 + timestamp
        done = self.processor.process_outputs(
            list(found), timestamp, stats, weight_version=self.versions[timestamp >= 1.5]
        )
        assert done.request_outputs == []
        self.aborts += done.reqs_to_abort
        noted = dict(vars(stats))
        noted["inter_token_latencies_iter"] = sorted(noted["inter_token_latencies_iter"])
        noted["finished_requests"] = sorted(map(str, noted["finished_requests"]))
        noted["prompt_token_stats"] = asdict(noted["prompt_token_stats"])
        self.statistics.append(noted)


def output(request_id: str, tokens: list[int], **more: Any) -> Any:
    from vllm.v1.engine import EngineCoreOutput

    return EngineCoreOutput(request_id=request_id, new_token_ids=list(tokens), **more)


def told(given: list[Any]) -> list[Any]:
    """What was handed over of one request, to be compared."""
    return [
        each if isinstance(each, tuple) else (str([vars(part) for part in each.outputs]), str(vars(each)))
        for each in given
    ]


def play(front: Front, tokenizer: Any, seed: int) -> None:
    """A few requests of all kinds, which end in all ways."""
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine import EngineCoreEvent, EngineCoreEventType, FinishReason
    from vllm.v1.metrics.stats import PrefillStats

    chance = random.Random(seed)
    kinds = [RequestOutputKind.FINAL_ONLY, RequestOutputKind.DELTA, RequestOutputKind.CUMULATIVE]
    left: dict[str, list[int]] = {}
    ends: dict[str, str] = {}
    for number in range(12):
        name, end = f"r{number}", chance.choice(ENDS)
        tokens = tokenizer.encode("".join(chance.choices(TEXTS, k=3)), add_special_tokens=False)
        chance.shuffle(tokens)
        options: dict[str, Any] = {"sink": True, "output_kind": RequestOutputKind.DELTA}
        if number % 2:
            options = {"output_kind": kinds[number // 2 % 3]}
        if end == "stop_string":
            options["stop"] = [tokenizer.decode(tokens[8:10]) or "x"]
        front.add(
            name,
            tokenizer.encode("2 + 2 ="),
            skip_special_tokens=chance.random() < 0.5,
            spaces_between_special_tokens=chance.random() < 0.5,
            **options,
        )
        left[name], ends[name] = tokens, end
    begun: set[str] = set()
    for step in range(200):
        found = []
        for name in [name for name in left if chance.random() < 0.8]:
            count = chance.choice([0, 1, 1, 1, 1, 2, 3])
            new, left[name] = left[name][:count], left[name][count:]
            more: dict[str, Any] = {}
            if name not in begun:
                begun.add(name)
                taken_up = EngineCoreEventType.QUEUED, EngineCoreEventType.SCHEDULED
                events = [EngineCoreEvent(kind, 0.5) for kind in taken_up]
                if chance.random() < 0.8:
                    more = {"events": events, "prefill_stats": PrefillStats(9, 5, 4, 4, 0, 5)}
            elif chance.random() < 0.05:
                more = {"events": [EngineCoreEvent(EngineCoreEventType.PREEMPTED, 0.7)]}
            if not left[name]:
                del left[name]
                if ends[name] == "abort":
                    front.processor.abort_requests([name], internal=True)
                    continue
                more["finish_reason"] = FinishReason.STOP if ends[name] == "stop_token" else FinishReason.LENGTH
            found.append(output(name, new, **more))
        front.step(1.0 + step / 7, *found)
        if not left:
            break
    assert not front.processor.request_states


@pytest.mark.parametrize("seed", range(25))
def test_all_is_as_vllm_has_it(tokenizer: Any, seed: int) -> None:
    fronts = [Front(tokenizer, apart) for apart in (False, True)]
    for front in fronts:
        if seed % 2:
            front.versions = None, None
        play(front, tokenizer, seed)
    vllm, ours = fronts
    assert {name: told(given) for name, given in ours.handed_over.items()} == {
        name: told(given) for name, given in vllm.handed_over.items()
    }
    assert ours.statistics == vllm.statistics
    assert ours.aborts == vllm.aborts


def begin(front: Front, tokenizer: Any, **params: Any) -> Callable[..., int]:
    """A request with its first token; returns what gives it another, and tells how many outputs vLLM has seen."""
    front.add("r", tokenizer.encode("2 + 2 ="), **params)
    front.step(1.0, output("r", tokenizer.encode("4", add_special_tokens=False)[:1]))

    def more(**fields: Any) -> int:
        front.step(1.1, output("r", tokenizer.encode("5", add_special_tokens=False)[:1], **fields))
        return front.vllms

    return more


def delta() -> Any:
    from vllm.sampling_params import RequestOutputKind

    return RequestOutputKind.DELTA


def final() -> Any:
    from vllm.sampling_params import RequestOutputKind

    return RequestOutputKind.FINAL_ONLY


@pytest.mark.parametrize("params", [lambda: {"output_kind": final()}, lambda: {"output_kind": delta(), "sink": True}])
def test_plain_outputs_do_not_reach_vllm(tokenizer: Any, params: Callable[[], dict[str, Any]]) -> None:
    more = begin(Front(tokenizer, apart=True), tokenizer, **params())
    assert [more() for _ in range(5)] == [1] * 5


@pytest.mark.parametrize(
    "params",
    [
        lambda: {"output_kind": final(), "stop": ["x"]},
        lambda: {"output_kind": final(), "detokenize": False},
        lambda: {"output_kind": delta()},
        dict,
    ],
    ids=["stop strings", "no text", "nobody takes text alone", "cumulative"],
)
def test_outputs_of_other_requests_do(tokenizer: Any, params: Callable[[], dict[str, Any]]) -> None:
    more = begin(Front(tokenizer, apart=True), tokenizer, **params())
    assert [more() for _ in range(3)] == [2, 3, 4]


def test_an_output_with_more_than_tokens_does(tokenizer: Any) -> None:
    import numpy as np

    front = Front(tokenizer, apart=True)
    more = begin(front, tokenizer, output_kind=final())
    assert more() == 1
    assert more(routed_experts=np.zeros((1, 1, 1))) == 2
    assert more() == 2
    front.step(1.2, output("r", []))
    assert front.vllms == 3


def test_another_version_of_vllm_keeps_its_own_way(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(outputs, "_FIELDS", outputs._FIELDS - {"events"})
    more = begin(Front(tokenizer, apart=True), tokenizer, output_kind=final())
    assert more() == 2
    assert "its own differ from those known here (events)" in caplog.text
