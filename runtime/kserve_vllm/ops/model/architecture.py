"""What a model's config.json says: layers, heads, experts, what each layer keeps per token, and how many parameters.

Sources of the formulas: the model definitions of Transformers (field names of config.json) and of vLLM 0.32 (what its
attention layers ask for in the KV cache: `vllm/v1/kv_cache_interface.py`, `vllm/model_executor/layers/mamba`).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from typing import Any, Literal

import yaml

from kserve_vllm.core.errors import ConfigError

Config = Mapping[str, Any]
"""A config.json. Which fields it has, and of which type, differs by family; whoever reads one converts it."""
Kind = Literal["full", "sliding", "chunked", "mla", "state"]

# Bytes of one number. torch's names; the float8 formats have 8 bits, nvfp4 and mxfp4 four.
DTYPE_BYTES = {
    "float32": 4.0,
    "float": 4.0,
    "bfloat16": 2.0,
    "float16": 2.0,
    "half": 2.0,
    "fp8": 1.0,
    "fp8_e4m3": 1.0,
    "fp8_e5m2": 1.0,
    "float8_e4m3fn": 1.0,
    "int8": 1.0,
}


@dataclass(frozen=True)
class LayerCache:
    """What one layer keeps for the tokens of a sequence.

    Attributes:
        kind: `full` attention; `sliding` or `chunked` attention over the last `window` tokens; `mla`, one compressed
            vector per token that all heads share; `state`, a fixed number of bytes per sequence (Mamba, linear
            attention).
        kv_heads: heads whose keys and values are kept (`full`, `sliding`, `chunked`).
        width: numbers per head and token: keys and values together; for `mla` the whole vector.
        window: tokens, for `sliding` and `chunked`.
        state: for `state`, numbers per sequence as (numbers, bytes of one number or None for the cache's own).
    """

    kind: Kind
    kv_heads: int = 0
    width: int = 0
    window: int = 0
    state: tuple[tuple[int, float | None], ...] = ()


@dataclass(frozen=True)
class Quantization:
    """How weights are stored.

    Attributes:
        method: vLLM's name: awq, gptq, fp8, int8, gguf, nvfp4, mxfp4, ... or "none".
        bits: bits of one weight of a linear layer, scales left out.
        group: weights that share a scale; 0 means one scale per row or tensor, which is next to nothing.
        act_bits: bits at which matrices are multiplied (16 where weights are unpacked first).
    """

    method: str = "none"
    bits: float = 16.0
    group: int = 0
    act_bits: int = 16

    @property
    def bytes_per_weight(self) -> float:
        """Bytes of a linear layer's weight, its share of the scales included (fp16 scale, and a zero point of the
        weight's own bits for the 4-bit integer formats; NVFP4 and MXFP4 have one-byte scales)."""
        if not self.group:
            return self.bits / 8
        scale = 1.0 if self.method in ("nvfp4", "mxfp4") else 2.0 + (self.bits / 8 if self.bits <= 4 else 0)
        return self.bits / 8 + scale / self.group


# Names for --quantization. Bits of the GGUF mixes: llama.cpp, tools/quantize/README.md, "bits/weight" of Llama 3.1 8B.
QUANTIZATIONS: Mapping[str, Quantization] = {
    "none": Quantization(),
    "fp8": Quantization("fp8", 8, 0, 8),
    "int8": Quantization("int8", 8, 0, 8),
    "awq": Quantization("awq", 4, 128, 16),
    "gptq": Quantization("gptq", 4, 128, 16),
    "gptq-8bit": Quantization("gptq", 8, 128, 16),
    "bitsandbytes": Quantization("bitsandbytes", 4, 64, 16),
    "nvfp4": Quantization("nvfp4", 4, 16, 4),
    "mxfp4": Quantization("mxfp4", 4, 32, 16),
    "gguf-q8_0": Quantization("gguf", 8.50, 0, 16),
    "gguf-q6_k": Quantization("gguf", 6.56, 0, 16),
    "gguf-q5_k_m": Quantization("gguf", 5.70, 0, 16),
    "gguf-q4_k_m": Quantization("gguf", 4.89, 0, 16),
    "gguf-q3_k_m": Quantization("gguf", 3.98, 0, 16),
}


@dataclass(frozen=True)
class Parameters:
    """How many numbers a model has, in parts that are stored or read differently.

    Attributes:
        embedding: input table, and the output table unless they are tied.
        head: the output table as it is read in each step (equal to the input table where they are tied).
        linear: matrices that every token passes.
        experts: matrices of routed experts, all together.
        other: norms, biases and convolutions.
        tower: encoders of images and sound.
    """

    embedding: int = 0
    head: int = 0
    linear: int = 0
    experts: int = 0
    other: int = 0
    tower: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.embedding + self.linear + self.experts + self.other + self.tower


@dataclass(frozen=True)
class Architecture:
    """A model as far as memory and speed depend on it.

    Attributes:
        name: where it came from, for people.
        family: `model_type` of the config.
        layers: one entry per layer that keeps something; layers without a cache are absent.
        depth: number of layers.
        hidden: width of the residual stream.
        heads: query heads.
        head_dim: numbers per query head.
        vocab: entries of the vocabulary.
        intermediate: inner width of the dense feed-forward layer.
        experts: routed experts of one layer, 0 for a dense model.
        experts_per_token: how many of them a token passes.
        expert_width: inner width of one expert.
        parameters: counts, by part.
        dtype_bytes: bytes of an unquantized weight and of the KV cache by default.
        quantization: as the config says.
        max_len: longest context that the config allows.
        exact: False when the shape was guessed from a number of parameters.
        approximate: why the cache or the counts are only near for this family, or "".
        generates: False for encoders, which keep no cache.
    """

    name: str
    family: str
    layers: tuple[LayerCache, ...]
    depth: int
    hidden: int
    heads: int
    head_dim: int
    vocab: int
    intermediate: int
    parameters: Parameters
    experts: int = 0
    experts_per_token: int = 0
    expert_width: int = 0
    dtype_bytes: float = 2.0
    quantization: Quantization = field(default_factory=Quantization)
    max_len: int = 8192
    exact: bool = True
    approximate: str = ""
    generates: bool = True

    @property
    def active_parameters(self) -> int:
        """Parameters that one token is multiplied with."""
        share = self.experts_per_token / self.experts if self.experts else 0.0
        return int(self.parameters.linear + self.parameters.head + self.parameters.experts * share)

    def with_quantization(self, name: str) -> Architecture:
        """The same model, stored otherwise.

        Raises:
            ConfigError: no such name.
        """
        if name not in QUANTIZATIONS:
            raise ConfigError(f"--quantization {name!r} is none of {', '.join(QUANTIZATIONS)}")
        return replace(self, quantization=QUANTIZATIONS[name])


# Families whose caches are laid out in ways that are not modelled here.
_APPROXIMATE = {
    "deepseek_v4": "its cache is compressed in a way that is not modelled",
    "mimo_v2": "its layers differ in ways that are not modelled",
    "kimi_k3": "its layers differ in ways that are not modelled",
    "nemotron-nas": "its blocks differ in ways that are not modelled",
    "deci": "its blocks differ in ways that are not modelled",
}


_MODELLED = {"none", *(quantization.method for quantization in QUANTIZATIONS.values())}


def parse(config: Config, name: str = "") -> Architecture:
    """Read a config.json.

    Raises:
        ConfigError: fields are missing that every language model has.
    """
    outer = _checked(config, name)
    inner = _language_part(outer)
    inner = _checked({**_defaults().get(str(inner.get("model_type")), {}), **inner}, name)
    if _first(inner, "is_encoder_decoder", fallback=outer.get("is_encoder_decoder")) or "decoder_layers" in inner:
        raise ConfigError(
            f"{name or 'config.json'}: an encoder with a decoder ({inner.get('model_type')}), which this runtime does "
            "not serve and these figures do not describe"
        )
    quantization = _quantization(inner.get("quantization_config") or outer.get("quantization_config") or {})
    family = str(inner.get("model_type") or outer.get("model_type") or "unknown")
    hidden = _first(inner, "hidden_size", "n_embd", "d_model", "dim")
    depth = _first(inner, "num_hidden_layers", "n_layer", "num_layers", "n_layers")
    listed = _first(inner, "hybrid_override_pattern", "layers_block_type", "layer_types")
    depth = depth or (len(listed) if listed else None)
    vocab = _first(inner, "vocab_size", fallback=outer.get("vocab_size"))
    if not (hidden and depth and vocab):
        missing = [
            n for n, v in (("hidden_size", hidden), ("num_hidden_layers", depth), ("vocab_size", vocab)) if not v
        ]
        raise ConfigError(f"{name or 'config.json'}: no {', '.join(missing)}; is this a language model's config.json?")
    heads = _first(inner, "num_attention_heads", "n_head", "n_heads") or 1
    kv_heads = _first(inner, "num_key_value_heads", "n_kv_heads", "n_head_kv", "num_kv_heads")
    if kv_heads is None:
        kv_heads = 1 if inner.get("multi_query") else heads
    head_dim = _first(inner, "head_dim", "attention_head_dim") or hidden // heads
    intermediate = _first(inner, "intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size") or 4 * hidden
    experts = _first(inner, "n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts") or 0
    per_token = (
        _first(inner, "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "top_k_experts") or 0
    )
    if isinstance(intermediate, list):
        intermediate = max(intermediate)
    dtype = str(
        inner.get("dtype") or inner.get("torch_dtype") or outer.get("dtype") or outer.get("torch_dtype") or "bfloat16"
    )
    max_len = _first(
        inner, "max_position_embeddings", "n_positions", "max_sequence_length", "seq_length", "model_max_length"
    )
    base = Architecture(
        name=name or str(outer.get("_name_or_path") or family),
        family=family,
        layers=(),
        depth=depth,
        hidden=hidden,
        heads=heads,
        head_dim=head_dim,
        vocab=vocab,
        intermediate=intermediate,
        parameters=Parameters(),
        experts=experts,
        experts_per_token=per_token if experts else 0,
        expert_width=int(_first(inner, "moe_intermediate_size", "expert_ffn_hidden_size") or intermediate)
        if experts
        else 0,
        # vLLM runs float32 checkpoints in bfloat16 unless told otherwise.
        dtype_bytes=min(DTYPE_BYTES.get(dtype.removeprefix("torch."), 2.0), 2.0),
        quantization=quantization,
        max_len=max_len or 8192,
        generates=_generates(outer),
        approximate=next(
            (why for start, why in _APPROXIMATE.items() if family.startswith(start)),
            ""
            if quantization.method in _MODELLED or quantization.method.startswith("int")
            else f"its weights are stored as {quantization.method}, whose size is not modelled: only where the files "
            "are there it is exact",
        ),
    )
    kinds = _layer_kinds(inner, depth)
    layers = tuple(_layer(inner, kind, index, kv_heads, head_dim, base) for index, kind in enumerate(kinds))
    shared = _first(inner, "num_kv_shared_layers") or 0  # Gemma 3n: the last layers read an earlier layer's cache
    kept = layers[: depth - shared] if shared else layers
    return replace(
        base,
        layers=tuple(layer for layer in kept if layer is not None) if base.generates else (),
        parameters=_count(inner, outer, kinds, kv_heads, base),
    )


def from_parameters(text: str) -> Architecture:
    """A guess for `--params 70B`, `1.5e9`, `235B-A22B` or `8x7B`: the shape of common dense models of that size.

    Depth and width follow Llama 3's and Qwen 3's published shapes (8B: 32 x 4096, 32B: 64 x 5120, 70B: 80 x 8192,
    405B: 126 x 16384), log-linear in between; eight KV heads of 128, as in all of these.

    Raises:
        ConfigError: the text is not a number of parameters.
    """
    total, active, mixture = _sizes(text)
    shapes = [
        (0.5e9, 24, 896),
        (1e9, 16, 2048),
        (3e9, 28, 3072),
        (8e9, 32, 4096),
        (14e9, 40, 5120),
        (32e9, 64, 5120),
        (70e9, 80, 8192),
        (405e9, 126, 16384),
    ]
    # Width follows what a token passes (within a factor), depth too.
    size = (active * total) ** 0.5 if active < total else total
    _, depth, hidden = min(
        shapes, key=lambda shape: abs(shape[0] / size - 1) if shape[0] >= size else size / shape[0] - 1
    )
    vocab = 128_256 if total >= 1e9 else 32_000
    kv_heads = 8 if hidden >= 2048 else 2
    head_dim = 128 if hidden >= 3072 else 64
    embedding = 2 * vocab * hidden if total >= 4e9 else vocab * hidden
    embedding = min(embedding, int(total * 0.4))
    attention = depth * hidden * (2 * hidden + 2 * kv_heads * head_dim)
    if active < total:
        shared = max(active - embedding / 2 - attention, 0.1 * active) * 0.1
        expert_total = int(total - embedding - attention - shared)
        linear = int(attention + shared)
        # So many of the experts that a token passes what was said.
        experts = mixture or 128
        share = max(active - linear - vocab * hidden, 0) / max(expert_total, 1)
        per_token = min(experts, max(1, round(share * experts)))
    else:
        experts, per_token, expert_total = 0, 0, 0
        linear = int(total - embedding)
    return Architecture(
        name=text,
        family="guessed",
        layers=(LayerCache("full", kv_heads, 2 * head_dim),) * depth,
        depth=depth,
        hidden=hidden,
        heads=hidden // head_dim,
        head_dim=head_dim,
        vocab=vocab,
        intermediate=int(3.5 * hidden),
        parameters=Parameters(embedding, vocab * hidden, linear, expert_total, 0),
        experts=experts,
        experts_per_token=per_token,
        max_len=131_072,
        exact=False,
    )


_SIZE = r"(\d+(?:\.\d+)?(?:[Ee]\d+)?) ?([BbMmTt]?)"
_UNITS = {"": 1.0, "m": 1e6, "b": 1e9, "t": 1e12}


def _sizes(text: str) -> tuple[float, float, int]:
    """Parameters of `--params`: all of them, those that a token passes, and experts of a layer where they are said."""
    experts = 0
    how = "write for example 70B, 0.5B, 1.5e9 or, with experts, 235B-A22B or 8x7B"
    if mixture := re.fullmatch(r"(\d+) ?[Xx] ?" + _SIZE, text.strip()):
        # Names such as Mixtral's count each expert as a whole model: what is not experts (attention, tables: a fifth of
        # a dense model of Llama's shape) is there once, and a token passes two experts.
        one = float(mixture[2]) * _UNITS[mixture[3].lower()]
        experts = count = int(mixture[1])
        total, active = one * (0.2 + 0.8 * count), one * (0.2 + 0.8 * min(2, count))
    elif match := re.fullmatch(_SIZE + r"(?:[- ]?[Aa]" + _SIZE + ")?", text.strip()):
        total = float(match[1]) * _UNITS[match[2].lower()]
        active = float(match[3]) * _UNITS[(match[4] or "B").lower()] if match[3] else total
    else:
        raise ConfigError(f"--params {text!r}: {how}")
    if not 1e6 <= total <= 1e14:
        raise ConfigError(f"--params {text!r} is {total:g} parameters, not 1M to 100T; {how}")
    if not 1e5 <= active <= total:
        raise ConfigError(f"--params {text!r}: a token passes {active:g} of {total:g} parameters; {how}")
    return total, active, experts


_MOST_LAYERS = 10_000
_MOST = 10**9
"""Of any width, length or number of heads and experts: beyond it a file is broken, and products no longer fit."""
_LAYERS = frozenset("num_hidden_layers n_layer num_layers n_layers".split())
_LENGTHS = frozenset(
    "max_position_embeddings n_positions max_sequence_length seq_length model_max_length sliding_window "
    "attention_chunk_size".split()
)
_KV_HEADS = frozenset("num_key_value_heads n_kv_heads n_head_kv num_kv_heads".split())
_BY_LAYER = _KV_HEADS | frozenset(
    "intermediate_size ffn_hidden_size moe_intermediate_size moe_layer_freq moe_topk num_shared_expert".split()
)
"""Fields that some families give for each layer."""
_WHOLE = (
    _LAYERS
    | _LENGTHS
    | _BY_LAYER
    | frozenset(
        """hidden_size n_embd d_model dim vocab_size num_attention_heads n_head n_heads head_dim attention_head_dim
        n_inner ffn_dim n_routed_experts num_local_experts num_experts moe_num_experts num_experts_per_tok
        num_experts_per_token moe_top_k top_k_experts expert_ffn_hidden_size kv_lora_rank qk_rope_head_dim
        qk_nope_head_dim v_head_dim q_lora_rank num_global_key_value_heads global_head_dim first_k_dense_replace
        num_dense_layers decoder_sparse_step interleave_moe_layer_step expert_layer_period expert_layer_offset
        moe_latent_size shared_expert_intermediate_size moe_shared_expert_intermediate_size n_shared_experts
        num_shared_experts intermediate_size_mlp full_attention_interval attn_layer_period attn_layer_offset
        max_window_layers num_kv_shared_layers linear_num_key_heads linear_num_value_heads linear_key_head_dim
        linear_value_head_dim linear_conv_kernel_dim conv_L_cache mamba_d_conv conv_kernel d_conv mamba_d_state
        ssm_state_size state_size d_state mamba_n_heads mamba_num_heads mamba_d_head mamba_head_dim mamba_n_groups
        n_groups mamba_expand depth embed_dim width encoder_layers encoder_ffn_dim""".split()
    )
)


def _checked(config: Config, name: str) -> dict[str, Any]:
    """A config whose sizes are whole numbers.

    Raises:
        ConfigError: names the field that is none, or is one that no model has.
    """
    found = dict(config)
    for key in _WHOLE & found.keys():
        value = found[key]
        if value is None or value is False:
            continue
        if isinstance(value, list) and key in _BY_LAYER and value:
            found[key] = [_whole(key, each, name) for each in value]
        else:
            found[key] = _whole(key, value, name, int(key in _KV_HEADS))
    return found


def _whole(key: str, value: object, name: str, least: int = 0) -> int:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value >= least:
        if key in _LENGTHS:
            return int(min(value, _MOST))
        if value <= (_MOST_LAYERS if key in _LAYERS else _MOST) and value == int(value):
            return int(value)
    shown = repr(value) if isinstance(value, (int, float, str)) else f"a {type(value).__name__}"
    raise ConfigError(f"{name or 'config.json'}: config.json's {key} is {shown[:40]}, which no model has")


def _first(config: Config, *names: str, fallback: Any = None) -> Any:
    return next((config[name] for name in names if config.get(name) is not None), fallback)


@functools.cache
def _defaults() -> Mapping[str, Config]:
    """Fields that a config.json of a family may leave out, by model_type."""
    text = (files("kserve_vllm.ops") / "data" / "config_defaults.yaml").read_text(encoding="utf-8")
    found: Mapping[str, Config] = yaml.safe_load(text)
    return found


def _language_part(config: Config) -> Config:
    """The part that generates text; multimodal configs hold it inside another."""
    for name in ("text_config", "llm_config", "language_config", "thinker_config"):
        part = config.get(name)
        known = isinstance(part, Mapping) and part.get("model_type") in _defaults()
        if isinstance(part, Mapping) and (known or "hidden_size" in part or "text_config" in part):
            return _language_part({**part})
    return dict(config)


def _generates(config: Config) -> bool:
    names = [str(name) for name in config.get("architectures") or ()]
    return not names or not all(
        re.search(r"Bert|Roberta|^Gte|^New(Model|For)|Electra|MPNet|Deberta|^CLIP|^Siglip", n) for n in names
    )


def _quantization(config: Config) -> Quantization:
    """`quantization_config`, as AWQ, GPTQ, compressed-tensors, ModelOpt, bitsandbytes and FP8 checkpoints write it."""
    method = str(config.get("quant_method") or config.get("quant_algo") or "").lower()
    if not config or not method:
        return Quantization()
    if method in ("compressed-tensors", "compressed_tensors"):
        for group in (config.get("config_groups") or {}).values():
            weights, inputs = group.get("weights") or {}, group.get("input_activations")
            bits = int(weights.get("num_bits") or 8)
            kind = (
                "fp8"
                if weights.get("type") == "float" and bits == 8
                else "nvfp4"
                if weights.get("type") == "float"
                else f"int{bits}"
            )
            return Quantization(
                kind, bits, int(weights.get("group_size") or 0), int((inputs or {}).get("num_bits") or 16)
            )
        return Quantization("fp8", 8, 0, 8)
    if method in ("awq", "gptq", "gptq_marlin", "awq_marlin", "auto-round"):
        bits = int(config.get("bits") or config.get("w_bit") or 4)
        return Quantization(
            method.split("_")[0], bits, max(int(config.get("group_size") or config.get("q_group_size") or 128), 0)
        )
    if method == "bitsandbytes":
        return Quantization(method, 4, 64) if config.get("load_in_4bit") else Quantization(method, 8, 0, 8)
    method = f"{method} {config.get('quant_algo') or ''}".strip().lower()
    if "fp4" in method:
        return QUANTIZATIONS["mxfp4" if "mx" in method else "nvfp4"]
    if "fp8" in method or "modelopt" in method:
        return QUANTIZATIONS["fp8"]
    return QUANTIZATIONS.get(method, Quantization(method, float(config.get("bits") or 8)))


def _layer_kinds(config: Config, depth: int) -> list[str]:
    """One of full, sliding, chunked, state, none for each layer."""
    names = {
        "full_attention": "full",
        "attention": "full",
        "sliding_attention": "sliding",
        "chunked_attention": "chunked",
        "linear_attention": "state",
        "mamba": "state",
        "mamba2": "state",
        "conv": "state",
        "hybrid": "full",
        "mlp": "mlp",
        "moe": "moe",
    }
    listed = _first(config, "layer_types", "layers_block_type")
    if isinstance(listed, Sequence) and not isinstance(listed, str) and len(listed) >= depth:
        kinds = [names.get(str(kind), "full") for kind in listed[:depth]]
        return kinds if config.get("sliding_window") else ["full" if kind == "sliding" else kind for kind in kinds]
    if pattern := config.get("hybrid_override_pattern"):  # Nemotron-H: M Mamba, * attention, - and E feed-forward
        return [{"M": "state", "*": "full", "E": "moe"}.get(mark, "mlp") for mark in str(pattern)[:depth]]
    if indices := config.get("attn_layer_indices"):
        return ["full" if i in indices else "state" for i in range(depth)]
    if (period := config.get("attn_layer_period")) and config.get("mamba_d_state"):  # Jamba
        return ["full" if i % period == (config.get("attn_layer_offset") or 0) else "state" for i in range(depth)]
    if interval := config.get("full_attention_interval"):
        return ["full" if (i + 1) % interval == 0 else "state" for i in range(depth)]
    family = str(config.get("model_type") or "")
    if family in ("mamba", "mamba2", "falcon_mamba"):
        return ["state"] * depth
    if config.get("attention_chunk_size") and family.startswith(
        "llama4"
    ):  # every fourth layer sees all, without positions
        rotary = config.get("no_rope_layers") or [int((i + 1) % 4 != 0) for i in range(depth)]
        return ["chunked" if uses else "full" for uses in rotary[:depth]]
    if not config.get("sliding_window") or config.get("use_sliding_window") is False:
        return ["full"] * depth
    if pattern := _first(config, "sliding_window_pattern", "_sliding_window_pattern"):  # Gemma 3: every sixth is full
        if isinstance(pattern, str):  # EXAONE 4 writes LLLG: local, global
            return ["full" if pattern[i % len(pattern)] == "G" else "sliding" for i in range(depth)]
        return ["full" if (i + 1) % pattern == 0 else "sliding" for i in range(depth)]
    if family.startswith("gemma2"):  # every second one
        return ["sliding" if i % 2 == 0 else "full" for i in range(depth)]
    if family.startswith("qwen2"):
        first = config.get("max_window_layers") or 0
        return ["full" if i < first else "sliding" for i in range(depth)]
    return ["sliding"] * depth


def _layer(
    config: Config, kind: str, index: int, kv_heads: int, head_dim: int, base: Architecture
) -> LayerCache | None:
    if kind in ("mlp", "moe"):
        return None
    if kind == "state":
        return LayerCache("state", state=_state(config, base))
    if (rank := config.get("kv_lora_rank")) and config.get("qk_rope_head_dim"):
        return LayerCache("mla", 1, int(rank) + int(config["qk_rope_head_dim"]))
    per_layer = config.get("num_key_value_heads")
    if isinstance(per_layer, list):
        kv_heads = int(per_layer[index])
    elif isinstance(kv_heads, list):
        kv_heads = int(kv_heads[index])
    if kind == "full":  # Gemma 4 has wider heads in its full layers
        kv_heads = int(config.get("num_global_key_value_heads") or kv_heads)
        head_dim = int(config.get("global_head_dim") or head_dim)
    width = head_dim + int(config.get("v_head_dim") or head_dim)
    if kind == "sliding":
        return LayerCache("sliding", kv_heads, width, int(config["sliding_window"]))
    if kind == "chunked":
        return LayerCache("chunked", kv_heads, width, int(config.get("attention_chunk_size") or 8192))
    return LayerCache("full", kv_heads, width)


def _state(config: Config, base: Architecture) -> tuple[tuple[int, float | None], ...]:
    """Numbers that a recurrent layer keeps per sequence: its convolution's last inputs, and its state."""
    ssm_dtype = _first(config, "mamba_ssm_dtype", "mamba_ssm_cache_dtype")
    if ssm_dtype is None and str(config.get("model_type")).startswith("nemotron_h"):
        ssm_dtype = "float32"  # vLLM's default for this family
    wide: float | None = DTYPE_BYTES.get(str(ssm_dtype)) if ssm_dtype else None
    if config.get("linear_num_value_heads"):  # gated delta net: Qwen3-Next, Qwen3.5
        k_heads, v_heads = int(config["linear_num_key_heads"]), int(config["linear_num_value_heads"])
        k_dim, v_dim = int(config["linear_key_head_dim"]), int(config["linear_value_head_dim"])
        kernel = int(config.get("linear_conv_kernel_dim") or 4)
        return ((2 * k_heads * k_dim + v_heads * v_dim) * (kernel - 1), None), (v_heads * k_dim * v_dim, wide)
    if config.get("conv_L_cache"):  # LFM2's short convolution
        return ((base.hidden * (int(config["conv_L_cache"]) - 1), None),)
    kernel = int(_first(config, "mamba_d_conv", "conv_kernel", "d_conv") or 4)
    size = int(_first(config, "mamba_d_state", "ssm_state_size", "state_size", "d_state") or 16)
    heads = _first(config, "mamba_n_heads", "mamba_num_heads")
    if heads is None and config.get("model_type") == "mamba2":
        heads = config.get("num_heads")
    if heads:  # Mamba 2
        dim = int(_first(config, "mamba_d_head", "mamba_head_dim", "head_dim") or 64)
        groups = int(_first(config, "mamba_n_groups", "n_groups") or 1)
        return ((int(heads) * dim + 2 * groups * size) * (kernel - 1), None), (int(heads) * dim * size, wide)
    inner = int(_first(config, "intermediate_size") or 0) if str(config.get("model_type")).endswith("mamba") else 0
    inner = inner or int(config.get("mamba_expand") or config.get("expand") or 2) * base.hidden
    return (inner * (kernel - 1), None), (inner * size, wide)


def _count(config: Config, outer: Config, kinds: Sequence[str], kv_heads: int, base: Architecture) -> Parameters:
    """Count parameters from the shapes. Within a few percent for families that this was not written for."""
    tied = bool(_first(config, "tie_word_embeddings", fallback=outer.get("tie_word_embeddings", False)))
    if base.family.startswith(("gemma", "qwen3_5")) and "tie_word_embeddings" not in {**outer, **config}:
        tied = base.family.startswith("gemma")
    table = base.vocab * base.hidden
    if not base.generates:
        tied = True  # no output table
    gated = base.family not in (
        "gpt2",
        "gpt_neox",
        "opt",
        "falcon",
        "phi",
        "bloom",
        "starcoder2",
        "gpt_bigcode",
        "nemotron",
        "bert",
        "roberta",
        "xlm-roberta",
        "camembert",
        "electra",
        "mpnet",
        "distilbert",
    )
    matrices = 3 if gated else 2
    if isinstance(kv_heads, list):
        kv_heads = max(kv_heads)
    linear = experts = other = 0
    moe_size = int(_first(config, "moe_intermediate_size", "expert_ffn_hidden_size") or base.intermediate)
    dense_first = int(_first(config, "first_k_dense_replace", "num_dense_layers") or 0)
    step = (
        int(_first(config, "decoder_sparse_step", "interleave_moe_layer_step", "moe_layer_freq") or 1)
        if not isinstance(config.get("moe_layer_freq"), list)
        else 1
    )
    offset = step - 1
    if period := int(config.get("expert_layer_period") or 0):  # Jamba says which layer of a period has the experts
        step, offset = period, int(config.get("expert_layer_offset") or 0)
    only_dense = set(config.get("mlp_only_layers") or ())
    apart = "mlp" in kinds or "moe" in kinds  # Nemotron-H: a layer is a mixer or a feed-forward part, not both
    if base.family.startswith("nemotron_h"):
        matrices = 2
    for index, kind in enumerate(kinds):
        other += 2 * base.hidden
        if kind == "state":
            linear += _mixer(config, base)
        elif kind not in ("mlp", "moe"):
            linear += _attention(config, kv_heads, base, kind)
        if kind not in ("mlp", "moe") and (apart or base.family in ("mamba", "mamba2", "falcon_mamba")):
            continue
        own = base.experts and index >= dense_first and index not in only_dense and index % step == offset
        if kind == "moe" or (own and not apart):
            narrow = int(config.get("moe_latent_size") or 0)  # experts work on a narrower copy of the stream
            experts += base.experts * matrices * (narrow or base.hidden) * moe_size
            linear += 2 * base.hidden * narrow
            shared = int(_first(config, "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size") or 0)
            shared = shared or moe_size * int(_first(config, "n_shared_experts", "num_shared_experts") or 0)
            if base.family.startswith("llama4"):
                shared = base.intermediate
            linear += matrices * base.hidden * shared + base.hidden * base.experts
        else:
            width = int(config.get("intermediate_size_mlp") or base.intermediate)
            linear += matrices * base.hidden * width
    return Parameters(table * (1 if tied else 2), table, linear, experts, other, _tower(outer))


def _tower(outer: Config) -> int:
    """Parameters of encoders of images and sound, from their depth and width: four square matrices of attention and two
    of a feed-forward layer, four times as wide unless the config says so."""
    found = 0
    for name in ("vision_config", "audio_config"):
        part = outer.get(name)
        if not isinstance(part, Mapping):
            continue
        part = _checked(part, name)
        depth = _first(part, "num_hidden_layers", "depth", "encoder_layers", fallback=0)
        width = _first(part, "embed_dim", "hidden_size", "width", "d_model", fallback=0)
        inner = _first(part, "intermediate_size", "encoder_ffn_dim", fallback=4 * width)
        found += int(depth) * (4 * int(width) ** 2 + 2 * int(width) * int(inner))
    return found


def _mixer(config: Config, base: Architecture) -> int:
    """Parameters of a recurrent layer's projections."""
    if config.get("linear_num_value_heads"):
        keys = int(config["linear_num_key_heads"]) * int(config["linear_key_head_dim"])
        values = int(config["linear_num_value_heads"]) * int(config["linear_value_head_dim"])
        return base.hidden * (2 * keys + 3 * values)
    if config.get("conv_L_cache"):
        return 4 * base.hidden**2
    state = _state(config, base)
    kernel = int(_first(config, "mamba_d_conv", "conv_kernel", "d_conv") or 4)
    size = int(_first(config, "mamba_d_state", "ssm_state_size", "state_size", "d_state") or 16)
    inner = state[1][0] // size
    conv = state[0][0] // max(kernel - 1, 1)  # what the convolution sees: the inner width and, in Mamba 2, B and C
    if (
        conv == inner
    ):  # Mamba 1 makes B, C and the step's size from the inner stream, and has an A for each of its states
        rank = _first(config, "mamba_dt_rank", "time_step_rank", "dt_rank")
        rank = rank if isinstance(rank, int) else -(-base.hidden // 16)
        return base.hidden * 2 * inner + inner * base.hidden + inner * (2 * rank + 3 * size)
    return base.hidden * (inner + conv) + inner * base.hidden


def _attention(config: Config, kv_heads: int, base: Architecture, kind: str) -> int:
    if (rank := config.get("kv_lora_rank")) and config.get("qk_rope_head_dim"):
        rope, nope = int(config["qk_rope_head_dim"]), int(config.get("qk_nope_head_dim") or 128)
        value = int(config.get("v_head_dim") or 128)
        queries = base.heads * (nope + rope)
        q_rank = config.get("q_lora_rank")
        down = base.hidden * int(q_rank) + int(q_rank) * queries if q_rank else base.hidden * queries
        return (
            down
            + base.hidden * (int(rank) + rope)
            + int(rank) * base.heads * (nope + value)
            + base.heads * value * base.hidden
        )
    head_dim = base.head_dim
    if kind == "full":
        kv_heads = int(config.get("num_global_key_value_heads") or kv_heads)
        head_dim = int(config.get("global_head_dim") or head_dim)
    queries, kept = base.heads * head_dim, kv_heads * head_dim
    enforcement = queries if config.get("attn_output_gate") or base.family in ("qwen3_next", "qwen3_5_text") else 0
    return base.hidden * (queries + enforcement + 2 * kept) + queries * base.hidden
