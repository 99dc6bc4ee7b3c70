"""From a model, traffic and GPUs to parallel sizes, replicas and cost. No input or output here; see `plan`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from kserve_vllm.core.errors import ConfigError
from kserve_vllm.ops.model.architecture import Architecture
from kserve_vllm.ops.model.hardware import GPU, HOURS_PER_MONTH, Prices
from kserve_vllm.ops.model.memory import EngineSettings, MemoryBudget, budget, lora_bytes
from kserve_vllm.ops.model.steptime import Operation, StepTime, operate, roofline
from kserve_vllm.ops.model.traffic import Traffic
from kserve_vllm.ops.model.weights import Model

# A replica that is planned full waits without bound: queues grow as 1 / (1 - load). Share of its capacity that is
# planned.
LOAD = 0.75
Refine = Callable[[StepTime, Architecture, GPU, EngineSettings], StepTime]


@dataclass(frozen=True)
class Wish:
    """What is asked of the plan.

    Attributes:
        model: the model.
        traffic: the requests.
        first_token_s: bound of the time to first token (95 of 100 requests), seconds, or None.
        gap_s: bound of the mean time between tokens, seconds, or None.
        gpu_memory_utilization, kv_cache_dtype, max_num_batched_tokens: engine flags.
        max_model_len: tokens, or None for what the traffic needs.
        max_num_seqs: or None for what the plan finds.
        adapters, adapter_rank: LoRA adapters in one batch, and their rank.
        draft: a draft model, or None.
        load: share of a replica's capacity that is planned.
        spare: replicas more than the traffic needs.
        tensor, pipeline: parallel sizes, or None to search.
    """

    model: Model
    traffic: Traffic
    first_token_s: float | None = None
    gap_s: float | None = None
    gpu_memory_utilization: float = 0.92
    kv_cache_dtype: str = "auto"
    max_num_batched_tokens: int = 8192
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    adapters: int = 0
    adapter_rank: int = 16
    draft: Model | None = None
    load: float = LOAD
    spare: int = 0
    tensor: int | None = None
    pipeline: int | None = None


_IDLE = Operation(0, 0, 0, 0, 0)


@dataclass(frozen=True)
class Option:
    """One way to serve it.

    Attributes:
        gpu: the device.
        settings: engine flags.
        budget: memory of one GPU.
        step: step time of one stage.
        operation: a replica at its planned load.
        capacity: requests per second of a replica that is never idle, within the SLO's gap.
        replicas: how many.
        first_token_s: time to first token of 95 of 100 requests, waiting included.
        per_hour: cost of all replicas, or None without a price.
        per_million: cost of a million tokens, prompts and answers together, at the peak rate.
        reason: why it is no option, or "".
        planned: a replica at the share of its capacity that is planned, which an autoscaler should hold it at.
    """

    gpu: GPU
    settings: EngineSettings
    budget: MemoryBudget
    step: StepTime
    operation: Operation
    capacity: float
    replicas: int
    first_token_s: float
    per_hour: float | None
    per_million: float | None
    reason: str = ""
    planned: Operation = _IDLE

    @property
    def gpus(self) -> int:
        """GPUs of all replicas."""
        return self.replicas * self.gpus_per_replica

    @property
    def gpus_per_replica(self) -> int:
        """GPUs of one replica."""
        return self.settings.tensor_parallel_size * self.settings.pipeline_parallel_size

    @property
    def per_month(self) -> float | None:
        """Cost of a month of 730 hours."""
        return None if self.per_hour is None else self.per_hour * HOURS_PER_MONTH


def needed_length(wish: Wish) -> int:
    """`max-model-len` for the traffic: the longest prompt and answer, a half more, in steps of 1,024; never above the
    model's own."""
    longest = wish.traffic.prompt_max + wish.traffic.output_max
    wanted = wish.max_model_len or min(-(-int(longest * 1.5) // 1024) * 1024, wish.model.architecture.max_len)
    own = wish.model.architecture
    if wanted > own.max_len and own.exact and any(layer.kind != "state" for layer in own.layers):
        raise ConfigError(
            f"--max-model-len {wanted:,} is more than the {own.max_len:,} tokens that the model's config.json allows; "
            "the engine would refuse it"
        )
    if wanted < longest:
        raise ConfigError(f"the longest request has {longest:,} tokens; the context has {wanted:,}")
    return wanted


def options(wish: Wish, gpu: GPU, prices: Prices, refine: Refine | None = None) -> list[Option]:
    """All parallel sizes of one kind of GPU, those that don't fit with a reason."""
    return [_option(wish, gpu, settings, prices, refine) for settings in _settings(wish, gpu)]


def best(found: Sequence[Option]) -> Option | None:
    """The cheapest option that fits; without prices the one with the fewest GPUs; then the one with fewer ranks."""
    fitting = [option for option in found if not option.reason]
    return min(
        fitting,
        key=lambda o: (o.per_hour if o.per_hour is not None else math.inf, o.gpus, o.gpus_per_replica),
        default=None,
    )


def _settings(wish: Wish, gpu: GPU) -> Iterator[EngineSettings]:
    architecture = wish.model.architecture
    if wish.tensor and architecture.heads % wish.tensor:
        raise ConfigError(f"--tensor {wish.tensor} does not divide the model's {architecture.heads} attention heads")
    if wish.pipeline and wish.pipeline > architecture.depth:
        raise ConfigError(f"--pipeline {wish.pipeline} is more than the model's {architecture.depth} layers")
    tensors = (
        [wish.tensor] if wish.tensor else [n for n in (1, 2, 4, 8, 16) if n <= gpu.node and architecture.heads % n == 0]
    )
    for tensor in tensors:
        # Stages over nodes only where a node is not enough.
        for pipeline in [wish.pipeline] if wish.pipeline else ([1, 2, 4] if tensor == max(tensors) else [1]):
            yield EngineSettings(
                tensor_parallel_size=tensor,
                pipeline_parallel_size=pipeline,
                gpu_memory_utilization=wish.gpu_memory_utilization,
                max_model_len=needed_length(wish),
                max_num_seqs=wish.max_num_seqs or 256,
                max_num_batched_tokens=wish.max_num_batched_tokens,
                kv_cache_dtype=wish.kv_cache_dtype,
            )


def _option(wish: Wish, gpu: GPU, settings: EngineSettings, prices: Prices, refine: Refine | None) -> Option:
    model, traffic = wish.model, wish.traffic
    adapters = lora_bytes(model.architecture, wish.adapters, wish.adapter_rank, settings)
    draft = wish.draft
    memory = budget(
        model.architecture,
        model.weights,
        gpu,
        settings,
        adapters=adapters,
        draft=draft.weights.total if draft else 0,
        draft_cache=draft.architecture.layers if draft else (),
    )
    step = roofline(model.architecture, model.weights, gpu, settings)

    def refused(reason: str, operation: Operation = _IDLE, capacity: float = 0.0, first_token_s: float = 0.0) -> Option:
        return Option(gpu, settings, memory, step, operation, capacity, 0, first_token_s, None, None, reason)

    if memory.kv_cache <= 0:
        short = -memory.kv_cache / (1 << 30)
        return refused(f"{short:.1f} GiB short on each GPU")
    if memory.sequences < 1 and model.architecture.layers:
        return refused(f"the cache has {memory.kv_tokens:,} tokens, a sequence may have {settings.max_model_len:,}")
    if refine:
        step = refine(step, model.architecture, gpu, settings)
    stages = settings.pipeline_parallel_size

    def at(sequences: float) -> Operation:
        return operate(step, max(1, sequences), traffic.prompt, traffic.output, traffic.cached, stages)

    per_sequence = memory.cache.sequence_bytes(traffic.prompt + traffic.output / 2) or 1.0
    room = max(1, min(int(memory.kv_cache / per_sequence), wish.max_num_seqs or 1024))
    if not model.architecture.layers:
        room = wish.max_num_seqs or 256
    if wish.gap_s is not None and at(1).gap_s > wish.gap_s:
        return refused(f"one stream alone has {at(1).gap_s * 1000:.0f} ms between tokens", at(1))
    most = _largest(room, lambda n: wish.gap_s is None or at(n).gap_s <= wish.gap_s)
    capacity = at(most).requests_per_s
    prefill_s = step.prefill(traffic.prompt, traffic.cached) * stages
    if wish.first_token_s is not None and prefill_s + at(1).gap_s > wish.first_token_s:
        return refused(f"a prompt alone takes {prefill_s * 1000:.0f} ms", at(1), first_token_s=prefill_s)
    replicas = max(1, math.ceil(traffic.rate / (capacity * wish.load)))
    first_token = _first_token(at, most, capacity, traffic.rate / replicas, prefill_s)
    while wish.first_token_s is not None and first_token > wish.first_token_s and replicas < 10_000:
        replicas = math.ceil(replicas * 1.1 + 0.5)
        first_token = _first_token(at, most, capacity, traffic.rate / replicas, prefill_s)
    if wish.first_token_s is not None and first_token > wish.first_token_s:
        return refused(f"first token after {first_token:.2f} s however many replicas", at(1), capacity, first_token)
    replicas += wish.spare
    running = at(_running(at, traffic.rate / replicas, most))
    price = prices.per_hour.get(gpu.name)
    gpus = replicas * settings.tensor_parallel_size * stages
    per_hour = None if price is None else price * gpus
    tokens = traffic.rate * (traffic.prompt + traffic.output) * 3600
    settings = replace(settings, max_num_seqs=wish.max_num_seqs or max(8, -(-int(most) // 8) * 8))
    return Option(
        gpu,
        settings,
        memory,
        step,
        running,
        capacity,
        replicas,
        first_token,
        per_hour,
        None if per_hour is None else per_hour / tokens * 1e6,
        planned=at(_running(at, capacity * wish.load, most)),
    )


def _largest(top: int, holds: Callable[[int], bool]) -> int:
    """The largest number up to `top` for which a monotonous condition holds; it holds for 1."""
    low, high = 1, top
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def _running(at: Callable[[float], Operation], rate: float, most: int) -> int:
    """Sequences that run at once at a rate: the fewest whose throughput is the rate."""
    return (
        min(most, 1 + _largest(most, lambda n: n == 1 or at(n).requests_per_s <= rate))
        if rate > at(1).requests_per_s
        else 1
    )


def _first_token(at: Callable[[float], Operation], most: int, capacity: float, rate: float, prefill_s: float) -> float:
    """Time to first token of 95 of 100 requests: its own prompt, a step, and prompts before it.

    Prompts are computed one after the other, so a replica is an M/D/1 queue for them (Pollaczek-Khinchine); the 95th
    percentile of the wait is taken as three times its mean, as of an exponential tail.
    """
    own = at(_running(at, rate, most))
    load = min(rate * prefill_s, 0.999)
    filling = min(rate / capacity, 0.999)
    wait = prefill_s * load / (2 * (1 - load))
    if filling > 0.9:  # slots run out too
        wait += own.gap_s / (1 - filling)
    return prefill_s + own.gap_s + 3 * wait


@dataclass(frozen=True)
class Lever:
    """One thing that would change the bill.

    Attributes:
        name: what to do.
        per_hour: the bill then.
        saving: share of the bill that goes.
        cost: what it takes, in words.
    """

    name: str
    per_hour: float
    saving: float
    cost: str


def levers(
    wish: Wish, chosen: Option, prices: Prices, requantize: Callable[[str], Model | None], small: Model | None
) -> list[Lever]:
    """What each change would save on the chosen GPU, most first.

    Args:
        wish: what was asked.
        chosen: the option that is compared with.
        prices: prices per hour.
        requantize: gives the same model with another quantization, or None where that makes no sense.
        small: a model an eighth of the size, for routing, or None.
    """
    base = chosen.per_hour
    if base is None:
        return []
    found: list[Lever] = []

    def cheaper(changed: Wish) -> float | None:
        option = best(options(changed, chosen.gpu, prices))
        return None if option is None else option.per_hour

    # The same yardstick for all: the roofline without measurements.
    plain = cheaper(wish)
    if plain is None:
        return []

    def add(name: str, changed: Wish | None, cost: str, extra: float = 0.0) -> None:
        per_hour = None if changed is None else cheaper(changed)
        if per_hour is not None:
            share = 1 - (per_hour + extra) / plain
            if share > 0.005:
                found.append(Lever(name, base * (1 - share), share, cost))

    for method in ("fp8", "awq", "nvfp4"):
        if method == "fp8" and not any(bits <= 8 for bits in chosen.gpu.tflops):
            continue
        if method == "nvfp4" and 4 not in chosen.gpu.tflops:
            continue
        other = requantize(method)
        add(f"weights in {method}", None if other is None else replace(wish, model=other), "check the answers' quality")
    if wish.kv_cache_dtype == "auto":
        add("cache in fp8 (--kv-cache-dtype fp8)", replace(wish, kv_cache_dtype="fp8"), "check long answers' quality")
    if wish.traffic.cached < wish.traffic.prompt // 2:
        add(
            "half of each prompt from the prefix cache",
            replace(wish, traffic=replace(wish.traffic, cached=wish.traffic.prompt // 2)),
            "put what prompts share at their beginning; route by it",
        )
    if small is not None:
        half = replace(wish.traffic, rate=wish.traffic.rate / 2)
        small_cost = cheaper(replace(wish, model=small, traffic=half, draft=None))
        if small_cost is not None:
            add(
                "half of the requests to a model an eighth of the size",
                replace(wish, traffic=half),
                "a router, and a test that the small model's answers will do",
                small_cost,
            )
    if wish.gap_s is not None or wish.first_token_s is not None:
        add(
            "no bound on latency (batch windows)",
            replace(wish, gap_s=None, first_token_s=None, load=0.95),
            "only for work that nobody waits for",
        )
    if wish.traffic.mean_rate < wish.traffic.rate * 0.8:
        add(
            "replicas that follow the load",
            replace(wish, traffic=replace(wish.traffic, rate=wish.traffic.mean_rate)),
            "an upper bound: see `kserve-vllm simulate`",
        )
    return sorted(found, key=lambda lever: -lever.saving)


@dataclass(frozen=True)
class EngineFit:
    """Whether an engine suits, and why."""

    engine: str
    fit: str
    why: str


def engines(wish: Wish, chosen: Option | None) -> list[EngineFit]:
    """Six engines, each with what speaks for or against it here.

    The rules are the engines' own documentation as of 2026: llama.cpp and Ollama run GGUF, one process, few sequences;
    TensorRT-LLM runs on NVIDIA only; TGI is in maintenance (its README); SGLang and vLLM cover the same models.
    """
    model, traffic = wish.model, wish.traffic
    gguf = model.formats == ("gguf",)
    amd = chosen is not None and chosen.gpu.resource.startswith("amd")
    running = chosen.operation.sequences if chosen else traffic.rate
    few = running <= 4
    share = traffic.cached / traffic.prompt
    found = []
    if gguf:
        found.append(
            EngineFit("vLLM", "with care", "reads GGUF through a plug-in; safetensors of the same model run faster")
        )
    else:
        words = [
            f"{running:.0f} sequences at once need continuous batching"
            if not few
            else "runs it; its batching is not needed for so few"
        ]
        if wish.adapters:
            words.append(f"{wish.adapters} adapters in one batch")
        if wish.draft:
            words.append("a draft model")
        found.append(EngineFit("vLLM", "yes", "; ".join(words) + "; what this runtime hosts"))
    found.append(
        EngineFit(
            "SGLang",
            "no" if gguf else "yes",
            "no GGUF in production"
            if gguf
            else f"{share:.0%} of a prompt is shared: its radix tree and vLLM's prefix cache do the same work"
            if share >= 0.3
            else "as fast within noise on most models; measure both where prefixes are shared in trees",
        )
    )
    found.append(
        EngineFit(
            "TensorRT-LLM",
            "no" if amd or gguf else "with care",
            "NVIDIA only"
            if amd
            else "does not read GGUF"
            if gguf
            else "the last 10-30 % on Hopper and Blackwell, for a model that seldom changes",
        )
    )
    found.append(EngineFit("TGI", "no", "in maintenance: no new models or features"))
    found.append(
        EngineFit(
            "llama.cpp",
            "yes" if gguf and few else "no",
            "reads this file; runs on CPUs and small GPUs"
            if gguf and few
            else f"made for few sequences, {running:.0f} run here"
            if not few
            else "needs a GGUF file; then it is the smallest way",
        )
    )
    found.append(
        EngineFit(
            "Ollama",
            "with care" if gguf and few else "no",
            "llama.cpp with a model library: for a desk, without tenants, limits or metrics",
        )
    )
    return found
