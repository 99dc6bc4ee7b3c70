"""What a GPU's memory holds: weights, cache, graphs, working space; and how many tokens the cache takes.

The cache's arithmetic is that of vLLM 0.32 (`vllm/v1/core/kv_cache_utils.py`): the memory is cut into blocks, each
group of layers takes blocks of its own, and the capacity that the engine reports is the number of sequences of
`max-model-len` that fit, times that length. The rest of the budget follows `vllm/v1/worker/gpu_worker.py`:
gpu-memory-utilization times the whole memory, minus weights, peak of activations, CUDA graphs and what is allocated
outside of torch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from kserve_vllm.ops.model.architecture import DTYPE_BYTES, Architecture, LayerCache
from kserve_vllm.ops.model.hardware import GPU
from kserve_vllm.ops.model.weights import Weights

GIB = 1 << 30
CACHE_DTYPES = ("auto", "fp8", "fp8_e4m3", "fp8_e5m2")  # of --kv-cache-dtype, those whose width is known here


@dataclass(frozen=True)
class EngineSettings:
    """The engine's flags that memory and speed depend on; names as vLLM's.

    Attributes:
        tensor_parallel_size: GPUs that share each layer.
        pipeline_parallel_size: stages of layers.
        gpu_memory_utilization: share of the GPU's memory that the engine may take.
        max_model_len: tokens of the longest sequence.
        max_num_seqs: sequences that run at once.
        max_num_batched_tokens: tokens of one step.
        kv_cache_dtype: `auto` for the model's own, or fp8.
        block_size: tokens of a cache block: 16 on GPUs, 128 on CPUs.
        prefix_caching: whether prompts' common beginnings are kept.
        async_scheduling: the next step is scheduled while one runs (vLLM's default).
        enforce_eager: no CUDA graphs.
    """

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    gpu_memory_utilization: float = 0.92
    max_model_len: int = 8192
    max_num_seqs: int = 128
    max_num_batched_tokens: int = 8192
    kv_cache_dtype: str = "auto"
    block_size: int = 16
    prefix_caching: bool = True
    async_scheduling: bool = True
    enforce_eager: bool = False


@dataclass(frozen=True)
class CacheGroup:
    """Layers that share a block table.

    Attributes:
        layers: how many.
        block_tokens: tokens of a block.
        page: bytes of a block in one layer.
        blocks: blocks that one sequence of max-model-len takes.
        bytes: bytes of one block in all of the group's layers.
    """

    layers: int
    block_tokens: int
    page: int
    blocks: int
    bytes: int


@dataclass(frozen=True)
class KVCache:
    """The KV cache of one rank.

    Attributes:
        groups: its groups of layers.
        block_bytes: bytes that a block takes from the pool.
        blocks_per_sequence: of one sequence of max-model-len, all groups together.
        max_model_len: tokens of that sequence.
    """

    groups: tuple[CacheGroup, ...]
    block_bytes: int
    blocks_per_sequence: int
    max_model_len: int

    def tokens(self, available: float) -> int:
        """Tokens that vLLM reports as "KV cache size" for so many bytes."""
        if not self.blocks_per_sequence or available <= 0:
            return 0
        return int(int(available // self.block_bytes) / self.blocks_per_sequence * self.max_model_len)

    @property
    def bytes_per_token(self) -> float:
        """Bytes per token of a sequence of max-model-len."""
        return self.block_bytes * self.blocks_per_sequence / self.max_model_len if self.max_model_len else 0.0

    def sequence_bytes(self, tokens: float) -> float:
        """Bytes that a sequence of `tokens` takes; windows and states do not grow past their size."""
        blocks = sum(min(-(-tokens // group.block_tokens), group.blocks) for group in self.groups)
        return blocks * self.block_bytes


@dataclass(frozen=True)
class MemoryBudget:
    """Bytes of one GPU's memory.

    `total` is the GPU's; `usable` what gpu-memory-utilization leaves; the rest are its parts. `kv_cache` is negative
    when the parts don't fit.
    """

    total: int
    usable: int
    weights: int
    draft: int
    adapters: int
    activations: int
    graphs: int
    outside: int
    kv_cache: int
    kv_tokens: int
    cache: KVCache

    @property
    def sequences(self) -> float:
        """Sequences of max-model-len that fit at once ("maximum concurrency")."""
        return self.kv_tokens / self.cache.max_model_len if self.cache.max_model_len else 0.0


def kv_bytes(dtype: str, architecture: Architecture) -> float:
    """Bytes of one number in the cache."""
    return architecture.dtype_bytes if dtype == "auto" else DTYPE_BYTES.get(dtype, 1.0)


def cache_of(architecture: Architecture, settings: EngineSettings) -> KVCache:
    """Lay the layers of one rank into groups, as vLLM does.

    Pipeline stages are taken to be equal; the last one decides where they are not.
    """
    tp = settings.tensor_parallel_size
    number = kv_bytes(settings.kv_cache_dtype, architecture)
    stages = settings.pipeline_parallel_size
    layers = list(architecture.layers)
    if stages > 1:
        layers = layers[::stages] if len({*layers}) > 1 else layers[: -(-len(layers) // stages)]
    if not layers:
        return KVCache((), 1, 0, settings.max_model_len)
    in_flight = settings.max_num_batched_tokens * max(2 if settings.async_scheduling else 1, stages)
    states = [layer for layer in layers if layer.kind == "state"]
    attention = [layer for layer in layers if layer.kind != "state"]
    state_bytes = max((_state_bytes(layer, tp, architecture) for layer in states), default=0)
    block = settings.block_size
    widest = max((_token_bytes(layer, tp, number) for layer in attention), default=0)
    if states and attention:
        # The attention block grows, in steps of its own size, until a page holds a whole state; the state's page is
        # padded to that (vllm/platforms/interface.py). MLA's kernels want steps of 128.
        step = max(block, 128) if any(layer.kind == "mla" for layer in attention) else block
        block = step * -(-state_bytes // (step * widest))
        state_bytes = block * widest
    specs: list[tuple[LayerCache, int, int]] = []  # layer, tokens of a block, page in bytes
    for layer in layers:
        page = state_bytes if layer.kind == "state" else block * _token_bytes(layer, tp, number)
        specs.append((layer, block, page))
    buckets: dict[tuple[str, int], list[tuple[LayerCache, int, int]]] = defaultdict(list)
    for spec in specs:
        buckets[(spec[0].kind, spec[0].window)].append(spec)
    if len(buckets) == 1:  # one kind: one group, whatever the pages
        (bucket,) = buckets.values()
        bytes_ = sum(page for _, _, page in bucket)
        blocks = _blocks(bucket[0][0], block, settings, in_flight)
        return KVCache(
            (CacheGroup(len(bucket), block, bucket[0][2], blocks, bytes_),), bytes_, blocks, settings.max_model_len
        )
    # Several kinds share one pool, so all pages must be equal: a smaller page gets more tokens, or is padded.
    page = max(page for _, _, page in specs)
    unified = []
    for bucket in buckets.values():
        layer, tokens, own = bucket[0]
        tokens = tokens * (page // own) if layer.kind != "state" and page % own == 0 else tokens
        unified.append((layer, tokens, len(bucket)))
    counts = [count for _, _, count in unified]
    size = max(counts) if max(counts) < min(counts) * 1.5 else min(counts)
    groups = []
    for layer, tokens, count in unified:
        blocks = _blocks(layer, tokens, settings, in_flight)
        split = -(-count // size)
        for index in range(split):
            own_layers = len(range(index, count, split))
            groups.append(CacheGroup(own_layers, tokens, page, blocks, own_layers * page))
    return KVCache(tuple(groups), max(g.bytes for g in groups), sum(g.blocks for g in groups), settings.max_model_len)


def _token_bytes(layer: LayerCache, tp: int, number: float) -> int:
    if layer.kind == "mla":  # one vector for all heads: every rank holds it whole
        return int(layer.width * number)
    return int(max(1, layer.kv_heads // tp) * layer.width * number)


def _state_bytes(layer: LayerCache, tp: int, architecture: Architecture) -> int:
    return int(sum(-(-count // tp) * (width or architecture.dtype_bytes) for count, width in layer.state))


def _blocks(layer: LayerCache, tokens: int, settings: EngineSettings, in_flight: int) -> int:
    """Blocks that a sequence of max-model-len takes in one group."""
    length = settings.max_model_len
    if layer.kind == "sliding":  # its window, what is being computed, and one more where the window straddles a block
        return -(-min(layer.window - 1 + in_flight, length) // tokens) + 1
    if layer.kind == "chunked":
        return -(-min(layer.window + in_flight, length) // tokens)
    if layer.kind == "state":  # the state, and with prefix caching one to copy from
        return 2 if settings.prefix_caching else 1
    return -(-length // tokens)


def whole_experts(architecture: Architecture, tensor: int) -> bool:
    """Whether ranks must hold whole experts (`--enable-expert-parallel`) rather than a slice of each.

    FP8 checkpoints scale blocks of 128 weights; a slice that is no multiple of 128 wide can't be cut, and vLLM refuses
    it (Qwen3-235B-A22B-FP8 over eight GPUs: 1536 / 8 = 192).
    """
    if not architecture.experts or tensor == 1 or architecture.quantization.bits > 8:
        return False
    return architecture.expert_width > 0 and architecture.expert_width / tensor % 128 != 0


# What is allocated outside of torch: the CUDA context, cuBLAS' and NCCL's buffers. Seen in vLLM's start-up logs: 0.25
# GiB for two ranks of Qwen2 14B (vllm-project/vllm#13061); NCCL's buffers grow with ranks. GiB.
OUTSIDE_GIB = 0.25
OUTSIDE_PER_RANK_GIB = 0.10
# CUDA graphs: vLLM 0.32 captures up to 51 sizes piecewise and as many whole; seen 0.3-0.6 GiB for 32 layers, 0.9-1.6
# GiB for 80. GiB per layer.
GRAPHS_GIB_PER_LAYER = 0.015


def activation_bytes(architecture: Architecture, settings: EngineSettings) -> int:
    """Peak of a step's working memory.

    The larger of two moments: the widest feed-forward layer of a full step (residual stream, its norm's copy, gate, up
    and their product; experts' copies per token for a mixture), and the logits of a full batch (fp32 twice: the
    sampler sorts a copy).
    """
    tp, tokens = settings.tensor_parallel_size, settings.max_num_batched_tokens
    wide = (
        architecture.intermediate
        if not architecture.experts
        else max(architecture.intermediate, architecture.experts_per_token * (architecture.intermediate // 4))
    )
    layer = tokens * (3 * architecture.hidden + 3 * wide / tp) * architecture.dtype_bytes
    logits = settings.max_num_seqs * architecture.vocab * 4 * 2
    return int(max(layer, logits))


def rank_weights(weights: Weights, settings: EngineSettings, architecture: Architecture) -> int:
    """Bytes of weights on the fullest rank: matrices are cut by tensor parallelism, layers by stages; norms are not
    worth counting. The first and last stages hold the tables."""
    tp, pp = settings.tensor_parallel_size, settings.pipeline_parallel_size
    layers = weights.total - weights.embedding
    if pp > 1:
        share = -(-architecture.depth // pp) / architecture.depth
        tables = (
            weights.embedding
            if architecture.parameters.embedding <= architecture.parameters.head
            else (weights.embedding / 2)
        )
        return int((layers * share + tables) / tp)
    return int((layers + weights.embedding) / tp)


def budget(
    architecture: Architecture,
    weights: Weights,
    gpu: GPU,
    settings: EngineSettings,
    *,
    draft: int = 0,
    draft_cache: Sequence[LayerCache] = (),
    adapters: int = 0,
) -> MemoryBudget:
    """Divide a GPU's memory.

    Args:
        architecture: the model.
        weights: its bytes.
        gpu: the device.
        settings: the engine's flags.
        draft: bytes of a draft model's weights, which every rank holds whole.
        draft_cache: its layers, which take cache too.
        adapters: bytes of the slots for LoRA adapters on one rank.
    """
    cache = cache_of(architecture, settings)
    if draft_cache:
        extra = sum(_token_bytes(layer, 1, architecture.dtype_bytes) for layer in draft_cache if layer.kind != "state")
        full = settings.max_model_len * extra
        if cache.blocks_per_sequence:
            cache = KVCache(
                cache.groups,
                cache.block_bytes + int(full / cache.blocks_per_sequence),
                cache.blocks_per_sequence,
                cache.max_model_len,
            )
    total = int(gpu.memory_gib * GIB)
    usable = int(total * settings.gpu_memory_utilization)
    ranks = settings.tensor_parallel_size * settings.pipeline_parallel_size
    outside = int((OUTSIDE_GIB + OUTSIDE_PER_RANK_GIB * (ranks - 1 if ranks > 1 else 0) ** 0.5) * GIB)
    graphs = (
        0
        if settings.enforce_eager
        else int(GRAPHS_GIB_PER_LAYER * architecture.depth / settings.pipeline_parallel_size * GIB)
    )
    own = rank_weights(weights, settings, architecture)
    activations = activation_bytes(architecture, settings)
    left = usable - own - draft - adapters - activations - graphs - outside
    return MemoryBudget(
        total, usable, own, draft, adapters, activations, graphs, outside, left, cache.tokens(left), cache
    )


def lora_bytes(architecture: Architecture, slots: int, rank: int, settings: EngineSettings) -> int:
    """Bytes of the slots that vLLM keeps on one rank for `--max-loras` adapters of `--max-lora-rank`: A and B of every
    linear layer of every block, A whole and B cut by tensor parallelism (`--fully-sharded-loras` off)."""
    if not slots:
        return 0
    kept = architecture.layers[0].kv_heads * architecture.head_dim if architecture.layers else architecture.hidden
    queries = architecture.heads * architecture.head_dim
    ins = 2 * architecture.hidden * 2 + queries + 2 * architecture.hidden + architecture.intermediate
    outs = (
        queries + 2 * kept + 2 * architecture.intermediate
    ) / settings.tensor_parallel_size + 2 * architecture.hidden
    layers = -(-architecture.depth // settings.pipeline_parallel_size)
    return int(slots * rank * (ins + outs) * layers * architecture.dtype_bytes)
