"""The outputs of the engine, without what vLLM asks about each of them.

In most outputs there is nothing but the next token of a request that wanted nothing but text. vLLM's output processor
asks of each whether there is anything else (log probabilities, stop strings, a grammar's end, pooled values, ...), in a
dozen calls. Here such outputs are told from the others, which stay vLLM's.

Written against vLLM 0.32. Where an output has other fields than in that version, all of them stay vLLM's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from kserve_vllm.engine.patches.late_text import late_detokenizer

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreOutput
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.output_processor import OutputProcessor, OutputProcessorOutput, RequestState
    from vllm.v1.metrics.stats import IterationStats

log = logging.getLogger(__name__)

_FIELDS = frozenset(
    "request_id new_token_ids new_logprobs new_prompt_logprobs_tensors pooling_output finish_reason stop_reason events "
    "kv_transfer_params ec_transfer_params trace_headers prefill_stats routed_experts num_nans_in_logits "
    "mm_cache_miss_hashes new_sampling_mask spec_decode_metrics prompt_token_id_logprobs".split()
)
"""Of `EngineCoreOutput` in vLLM 0.32. From 0.33 on it has `error` too, which comes with a finish reason."""


def process_plain_outputs_apart(client: AsyncLLM) -> bool:
    """Let `client` do so. Must run before its first request.

    Returns:
        False where all outputs stay vLLM's.
    """
    from vllm import envs
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine import EngineCoreOutput
    from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer
    from vllm.v1.engine.output_processor import OutputProcessor, OutputProcessorOutput

    processor = client.output_processor
    unknown = _FIELDS.symmetric_difference(EngineCoreOutput.__struct_fields__) - {"error"}
    if unknown or type(processor) is not OutputProcessor:
        log.warning("vLLM processes all outputs: its own differ from those known here (%s)", ", ".join(sorted(unknown)))
        return False

    def has_plain_outputs(state: RequestState) -> bool:
        """Whether outputs with no more than a token are a matter of text alone: decided once for each request."""
        return (
            type(state.detokenizer) in (FastIncrementalDetokenizer, late_detokenizer())
            and not state.detokenizer.stop
            and not state.streaming_input
            and state.input_chunk_queue is None
            and (state.output_kind == RequestOutputKind.FINAL_ONLY or sink_of(state) is not None)
        )

    # vLLM would look for such numbers in each output.
    if envs.VLLM_COMPUTE_NANS_IN_LOGITS:
        return False
    plain = PlainOutputs(processor, has_plain_outputs, OutputProcessorOutput)
    processor.process_outputs = plain.process
    return True


Sink = Callable[[str, int], None]


def send_to(state: RequestState, sink: Sink) -> None:
    """Have the texts of a request's plain outputs handed over instead of kept.

    Args:
        state: of a request whose outputs are new text only (`RequestOutputKind.DELTA`).
        sink: called with new text and the number of tokens behind it.
    """
    state.sink = sink


def sink_of(state: RequestState) -> Sink | None:
    """Who gets the texts of a request's plain outputs."""
    found: Sink | None = vars(state).get("sink")
    return found


class PlainOutputs:
    """Takes the place of `OutputProcessor.process_outputs`.

    Args:
        processor: vLLM's.
        allowed: whether a request's plain outputs may be processed here; asked once for each request.
        result: vLLM's class of what the method returns.
    """

    def __init__(
        self,
        processor: OutputProcessor,
        allowed: Callable[[RequestState], bool],
        result: type[OutputProcessorOutput],
    ) -> None:
        self._states: dict[str, RequestState] = processor.request_states
        self._allowed = allowed
        self._result = result
        self._process = processor.process_outputs

    def process(
        self,
        outputs: Iterable[EngineCoreOutput],
        timestamp: float | None = None,
        iteration_stats: IterationStats | None = None,
        weight_version: str | None = None,
    ) -> OutputProcessorOutput:
        """As vLLM's: text is made of new tokens and handed over, and statistics are kept.

        Args:
            outputs: of one step of the engine, which has at most one for each request.
            timestamp: of that step, in seconds of the engine's clock.
            iteration_stats: filled in; None where none are kept.
            weight_version: which weights the tokens are of.
        """
        others: list[EngineCoreOutput] = []
        tokens = 0
        states = self._states
        gaps = [] if iteration_stats is None else iteration_stats.inter_token_latencies_iter
        for output in outputs:
            state = states.get(output.request_id)
            if state is None:
                continue
            new = output.new_token_ids
            if not (new and not state.is_prefilling and _has_only_tokens(output) and self._is_plain(state)):
                others.append(output)
                continue
            if weight_version is not None:
                starts = state.weight_version_starts
                if not starts or starts[-1][0] != weight_version:
                    others.append(output)
                    continue
            if iteration_stats is not None:
                stats = state.stats
                stats.num_generation_tokens += len(new)
                gaps.append(timestamp - stats.last_token_ts)
                stats.last_token_ts = timestamp
                tokens += len(new)
            detokenizer = state.detokenizer
            sink = state.sink
            if sink is None:
                detokenizer.update(new, False)
                continue
            text = ""
            for token in new:
                detokenizer.token_ids.append(token)
                text += detokenizer.decode_next(token)
            sink(text, len(new))
        if tokens and iteration_stats is not None:
            iteration_stats.num_generation_tokens += tokens
        if others:
            return self._process(others, timestamp, iteration_stats, weight_version=weight_version)
        return self._result(request_outputs=[], reqs_to_abort=[])

    def _is_plain(self, state: RequestState) -> bool:
        known: bool | None = vars(state).get("plain")
        if known is None:
            known = state.plain = self._allowed(state)
            state.sink = sink_of(state)
        return known


def _has_only_tokens(output: EngineCoreOutput) -> bool:
    """Whether an output says no more than what the next tokens are."""
    return (
        output.finish_reason is None
        and output.events is None
        and output.new_logprobs is None
        and output.new_prompt_logprobs_tensors is None
        and output.pooling_output is None
        and output.kv_transfer_params is None
        and output.ec_transfer_params is None
        and output.prefill_stats is None
        and output.routed_experts is None
        and output.new_sampling_mask is None
        and output.spec_decode_metrics is None
        and output.prompt_token_id_logprobs is None
    )
