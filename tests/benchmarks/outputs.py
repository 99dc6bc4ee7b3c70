"""What the output processor takes for a token of a whole answer, with and without two shortcuts, apart from a server.

    python -m tests.benchmarks.outputs [--rounds 9]

64 requests, 128 tokens each, a step gives each of them one; processor time, median of rounds in turns, in microseconds
a token. What a server does beside it (sockets, event loop, histograms) is not in it.
"""

from __future__ import annotations

import argparse
import statistics
import time
import types
from typing import Any

REQUESTS, TOKENS = 64, 128
WAYS: dict[str, tuple[str, ...]] = {
    "vLLM's": (),
    "outputs": ("outputs",),
    "texts": ("texts",),
    "outputs and texts": ("texts", "outputs"),
}


def one(tokenizer: Any, ids: list[int], shortcuts: tuple[str, ...]) -> float:
    """Seconds of processor time for all tokens of one round."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams
    from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
    from vllm.v1.engine.output_processor import OutputProcessor
    from vllm.v1.metrics.stats import IterationStats, PrefillStats

    from kserve_vllm.engine.patches.late_text import make_texts_at_the_end
    from kserve_vllm.engine.patches.plain_outputs import process_plain_outputs_apart

    processor: Any = OutputProcessor(tokenizer, log_stats=True)
    client: Any = types.SimpleNamespace(output_processor=processor)
    if "texts" in shortcuts:
        assert make_texts_at_the_end(client)
    if "outputs" in shortcuts:
        assert process_plain_outputs_apart(client)
    answers: list[Any] = []
    queue: Any = types.SimpleNamespace(put=answers.append)
    names = [f"r{number}" for number in range(REQUESTS)]
    for name in names:
        params = SamplingParams(max_tokens=TOKENS, output_kind=RequestOutputKind.FINAL_ONLY)
        request = EngineCoreRequest(
            request_id=name,
            external_req_id=name,
            prompt_token_ids=ids[:64],
            mm_features=None,
            sampling_params=params,
            pooling_params=None,
            arrival_time=1.0,
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
        )
        processor.add_request(request, "prompt", None, 0, queue)
    steps = []
    for step in range(TOKENS):
        last = FinishReason.LENGTH if step == TOKENS - 1 else None
        prefill = PrefillStats(64, 64, 0, 0, 0, 64) if step == 0 else None
        steps.append(
            [
                EngineCoreOutput(request_id=name, new_token_ids=[ids[step]], finish_reason=last, prefill_stats=prefill)
                for name in names
            ]
        )
    began = time.process_time()
    for number, outputs in enumerate(steps):
        processor.process_outputs(outputs, 1.0 + number, IterationStats())
    took = time.process_time() - began
    assert len(answers) == REQUESTS
    return took


def main() -> None:
    """Print a line for each way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    from vllm.tokenizers import get_tokenizer

    from kserve_vllm.config import demo

    tokenizer: Any = get_tokenizer(str(demo.folder("model")))
    text = "17 + 25 is 42, and the sum of both numbers is what you asked for. " * 9
    ids = tokenizer.encode(text, add_special_tokens=False)
    found: dict[str, list[float]] = {name: [] for name in WAYS}
    for number in range(args.rounds + 1):
        for name, shortcuts in WAYS.items():
            took = one(tokenizer, ids, shortcuts)
            if number:  # the first round warms up
                found[name].append(took)
    for name, times in found.items():
        ratios = [a / b for a, b in zip(times, found["vLLM's"], strict=True)]
        each = 1e6 * statistics.median(times) / (REQUESTS * TOKENS)
        print(
            f"{name:18} {each:6.2f} us a token, {statistics.median(ratios):.2f} of vLLM's "
            f"({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
