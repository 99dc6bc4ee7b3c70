"""How long a step of the engine takes: a roofline, moved to measurements where there are some.

A step computes one token for each running sequence and a piece of some prompts. It takes the longer of two times:
reading (weights once, each sequence's cache) and multiplying, plus what tensor parallel ranks tell each other, plus
what is left of the host's work. References: S. Williams et al., "Roofline", CACM 52(4), 2009; R. Pope et al.,
"Efficiently Scaling Transformer Inference", 2022 (operations and bytes of prefill and decode); A. Agrawal et al.,
"Sarathi-Serve", OSDI 2024 (steps that mix both).
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from kserve_vllm.ops.model.architecture import Architecture
from kserve_vllm.ops.model.hardware import GPU
from kserve_vllm.ops.model.memory import EngineSettings, kv_bytes
from kserve_vllm.ops.model.weights import Weights

# What a well-written kernel gets of the data sheet. Fitted to the published figures in tests/ops/published.yaml and to
# A. Musgrave, vLLM 0.23 on an A100, Llama 3.1 8B: decoding reads at 77 % of the data sheet's bandwidth.
BANDWIDTH_SHARE = 0.78
COMPUTE_SHARE = {16: 0.62, 8: 0.50, 4: 0.36}  # the faster the units, the more the rest of a layer weighs
# A reduction between ranks of one node: start of the collective, and share of the link that it gets (NCCL's ring).
REDUCE_START_S = 12e-6
LINK_SHARE = 0.6
# The host: scheduling, sampling, handing out tokens. Seconds per step, and per sequence in it.
STEP_S = 0.8e-3
SEQUENCE_S = 9e-6
LAYER_S = 6e-6  # launching a layer's kernels from a CUDA graph
# How far off it may be: nine of ten published figures lie within; see docs/guides/sizing.md.
BAND = 0.40


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step as a function of what is in it.

    Attributes:
        fixed: per step: host and reading what every step reads.
        read_per_kv_token: seconds to read the cache of one token of context.
        read_weights: seconds to read the dense weights once.
        read_experts: seconds to read all routed experts once.
        experts, experts_per_token: to know how many of them a step touches.
        compute_per_token: seconds of multiplication per token of a prompt or of decoding.
        compute_per_pair: seconds per (token, token of its context) in attention.
        reduce_start, reduce_per_token: ranks' reductions.
        per_sequence: host's share per running sequence.
        window: tokens of context that are read at most, averaged over layers, as (share of layers, window) pairs.
        decode_scale: measured over computed time of decoding, as (batch, factor), by batch.
        prefill_scale: the same for prompts.
        source: which figures spoke, for people.
        band: relative error to expect.
    """

    fixed: float
    read_per_kv_token: float
    read_weights: float
    read_experts: float
    experts: int
    experts_per_token: int
    compute_per_token: float
    compute_per_pair: float
    reduce_start: float
    reduce_per_token: float
    per_sequence: float
    window: tuple[tuple[float, float], ...] = ((1.0, math.inf),)
    decode_scale: tuple[tuple[float, float], ...] = ()
    prefill_scale: float = 1.0
    source: str = "roofline"
    band: float = BAND

    def step(self, sequences: int, context: float, prompt_tokens: int = 0, prompt_context: float = 0.0) -> float:
        """Seconds of one step.

        Args:
            sequences: sequences that get one token.
            context: their mean length, tokens.
            prompt_tokens: tokens of prompts that are computed beside.
            prompt_context: mean number of tokens that each of those attends to.
        """
        decode = self._part(sequences, context, 0, 0.0) if sequences else 0.0
        if not prompt_tokens:
            return decode * self._scale(sequences) if sequences else 0.0
        both = self._part(sequences, context, prompt_tokens, prompt_context)
        if not sequences:
            return both * self.prefill_scale
        return decode * self._scale(sequences) + (both - decode) * self.prefill_scale

    def prefill(self, tokens: int, cached: int = 0) -> float:
        """Seconds to compute a prompt alone, of which `cached` tokens are in the prefix cache."""
        new = max(tokens - cached, 1)
        return self.step(0, 0.0, new, cached + new / 2)

    def _part(self, sequences: int, context: float, prompt_tokens: int, prompt_context: float) -> float:
        tokens = sequences + prompt_tokens
        touched = 0.0
        if self.experts:
            touched = 1.0 - (1.0 - self.experts_per_token / self.experts) ** tokens
        seen = sum(share * min(context, window) for share, window in self.window)
        seen_prompt = sum(share * min(prompt_context, window) for share, window in self.window)
        read = self.read_weights + self.read_experts * touched + self.read_per_kv_token * sequences * seen
        compute = self.compute_per_token * tokens + self.compute_per_pair * (prompt_tokens * seen_prompt)
        # Decoding's attention is bound by reading whatever the rest of the step is bound by: the two add up.
        attention = self.read_per_kv_token * sequences * seen
        busy = max(read, compute + attention)
        return self.fixed + busy + self.reduce_start + self.reduce_per_token * tokens + self.per_sequence * sequences

    def function(self) -> Callable[[int, float, int, float], float]:
        """`step` as a plain function with everything bound, for a simulation that asks millions of times."""
        if self.experts or self.window != ((1.0, math.inf),):
            return self.step
        fixed, read, kv, seq = (
            self.fixed + self.reduce_start,
            self.read_weights,
            self.read_per_kv_token,
            self.per_sequence,
        )
        token, pair, talk = self.compute_per_token, self.compute_per_pair, self.reduce_per_token
        prefill_scale = self.prefill_scale
        # Batches are small whole numbers: their factors are looked up.
        scales = [self._scale(max(n, 1)) for n in range(2049)] if self.decode_scale else []

        def step(sequences: int, context: float, prompt_tokens: int = 0, prompt_context: float = 0.0) -> float:
            attention = kv * sequences * context
            decode = 0.0
            if sequences:
                compute = token * sequences
                decode = fixed + attention + (read if read > compute else compute) + (talk + seq) * sequences
            if not prompt_tokens:
                return decode * (scales[sequences if sequences < 2048 else 2048] if scales else 1.0)
            tokens = sequences + prompt_tokens
            compute = token * tokens + pair * prompt_tokens * prompt_context
            both = fixed + attention + (read if read > compute else compute) + talk * tokens + seq * sequences
            if not sequences:
                return both * prefill_scale
            factor = scales[sequences if sequences < 2048 else 2048] if scales else 1.0
            return decode * factor + (both - decode) * prefill_scale

        return step

    def _scale(self, sequences: int) -> float:
        """Measured over computed, between two measured batches linear in the batch's logarithm."""
        points = self.decode_scale
        if not points:
            return 1.0
        at = bisect.bisect_left([batch for batch, _ in points], sequences)
        if at == 0:
            return points[0][1]
        if at == len(points):
            return points[-1][1]
        (low, low_factor), (high, high_factor) = points[at - 1], points[at]
        part = (math.log(sequences) - math.log(low)) / (math.log(high) - math.log(low))
        return low_factor + (high_factor - low_factor) * part

    def moved(
        self, decode: Sequence[tuple[int, float, float]], prefill: Sequence[tuple[int, float]], source: str, band: float
    ) -> StepTime:
        """The same model through measurements.

        Args:
            decode: (sequences, mean context in tokens, seconds of a step).
            prefill: (tokens of a prompt, seconds).
            source: who measured.
            band: relative error that is left.
        """
        bare = replace(self, decode_scale=(), prefill_scale=1.0)
        found: dict[int, list[float]] = {}
        for sequences, context, seconds in decode:
            found.setdefault(sequences, []).append(seconds / bare.step(sequences, context))
        ratios = [seconds / bare.prefill(tokens) for tokens, seconds in prefill]
        return replace(
            self,
            source=source,
            band=band,
            decode_scale=tuple(sorted((float(batch), sum(f) / len(f)) for batch, f in found.items())),
            prefill_scale=math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else 1.0,
        )


def roofline(architecture: Architecture, weights: Weights, gpu: GPU, settings: EngineSettings) -> StepTime:
    """The step time of a model on a GPU from the data sheet.

    Pipeline stages work on different batches at the same time: a stage's step is that of its share of the layers, and a
    token passes all stages, which `plan` accounts for in the latency.
    """
    tp, pp = settings.tensor_parallel_size, settings.pipeline_parallel_size
    ranks = tp * pp
    bandwidth = gpu.bandwidth_gb_s * 1e9 * BANDWIDTH_SHARE
    bits = architecture.quantization.act_bits
    if architecture.quantization.method == "fp8" and not gpu.fp8:
        bits = 16
    share = COMPUTE_SHARE[min((width for width in (4, 8, 16) if width >= bits and width in gpu.tflops), default=16)]
    operations = gpu.operations(bits) * share * ranks
    attention_operations = gpu.operations(16) * COMPUTE_SHARE[16] * ranks
    # The input table is looked up, not read; a tied one is read as the output table.
    tables = weights.embedding if weights.embedding else 0
    count = architecture.parameters
    head = tables * min(1.0, count.head / count.embedding) if count.embedding else 0.0
    dense = weights.total - weights.embedding - weights.experts - weights.other_modal + head
    number = kv_bytes(settings.kv_cache_dtype, architecture)
    per_token = 0.0
    windows: list[tuple[float, float]] = []
    for layer in architecture.layers:
        if layer.kind == "state":
            continue
        replicas = max(1.0, tp / layer.kv_heads) if layer.kind != "mla" else float(tp)
        size = layer.kv_heads * layer.width * number * replicas
        per_token += size
        windows.append((size, float(layer.window or math.inf)))
    total = sum(size for size, _ in windows) or 1.0
    merged: dict[float, float] = {}
    for size, window in windows:
        merged[window] = merged.get(window, 0.0) + size / total
    if len(merged) == 1:  # not 0.999...: `function` has a quicker way for it
        merged = dict.fromkeys(merged, 1.0)
    layers_per_stage = architecture.depth / pp
    reductions = 2 * layers_per_stage if tp > 1 else 0.0
    ring = 2 * (tp - 1) / tp
    sends = (pp - 1) / pp if pp > 1 else 0.0
    message = architecture.hidden * 2.0  # bf16
    attention_layers = sum(1 for layer in architecture.layers if layer.kind != "state")
    return StepTime(
        fixed=STEP_S + LAYER_S * layers_per_stage,
        read_per_kv_token=per_token / (bandwidth * ranks),
        read_weights=dense / (bandwidth * ranks),
        read_experts=weights.experts / (bandwidth * ranks),
        experts=architecture.experts,
        experts_per_token=architecture.experts_per_token,
        compute_per_token=2.0 * architecture.active_parameters / operations,
        compute_per_pair=4.0 * attention_layers * architecture.heads * architecture.head_dim / attention_operations,
        reduce_start=reductions * REDUCE_START_S + sends * REDUCE_START_S,
        reduce_per_token=(reductions * ring + sends) * message / (gpu.link_gb_s * 1e9 * LINK_SHARE),
        per_sequence=SEQUENCE_S,
        window=tuple((share_, window) for window, share_ in sorted(merged.items())) or ((1.0, math.inf),),
        source=f"roofline on {gpu.name}'s data sheet",
    )


@dataclass(frozen=True)
class Operation:
    """A replica under a steady load.

    Attributes:
        sequences: mean number that run at once.
        requests_per_s: requests that are finished per second.
        gap_s: mean time between two tokens of a stream.
        first_token_s: time to the first token, without waiting in a queue.
        busy: share of the time that steps take.
    """

    sequences: float
    requests_per_s: float
    gap_s: float
    first_token_s: float
    busy: float


def operate(step: StepTime, sequences: float, prompt: int, output: int, cached: int, stages: int = 1) -> Operation:
    """What a replica does with `sequences` always running: each one costs a prompt and `output` steps.

    Args:
        step: the step time of one stage.
        sequences: sequences at once.
        prompt: tokens of a prompt.
        output: tokens of an answer.
        cached: tokens of the prompt that are in the prefix cache.
        stages: pipeline stages: each works on its share of the sequences.
    """
    own = max(1, round(sequences / stages))
    context = prompt + output / 2
    new = max(prompt - cached, 1)
    bare = step.step(own, context)
    # In each output-th of the steps a prompt is computed beside, for every running sequence.
    loaded = step.step(own, context, max(1, new), cached + new / 2) - bare
    per_step = bare + own / max(output, 1) * loaded
    gap = per_step * stages
    first = max(step.step(0, 0.0, new, cached + new / 2) * stages, loaded * stages) + gap
    return Operation(sequences, sequences / (max(output, 1) * gap), gap, first, 1.0)
