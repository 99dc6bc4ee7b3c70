"""Starts vLLM on small models with random weights and prints what cache it reports.

python -m tests.ops.capacity FOLDER...

A line of JSON for each. Each model has a process of its own, a copy of one that has imported vLLM.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

CACHE_BYTES = 256 << 20
_COMMON: dict[str, Any] = {"dtype": "bfloat16", "max_position_embeddings": 4096, "vocab_size": 512}
# Architectures whose caches differ in kind: grouped heads, windows in five of six layers, a compressed vector, experts,
# and recurrent layers beside attention.
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        **_COMMON,
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 256,
        "moe_intermediate_size": 64,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "tie_word_embeddings": False,
    },
    "gemma3_text": {
        **_COMMON,
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_size": 128,
        "num_hidden_layers": 12,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 256,
        "sliding_window": 256,
        "query_pre_attn_scalar": 32,
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 2,
    },
    "deepseek_v2": {
        **_COMMON,
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "hidden_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 256,
        "moe_intermediate_size": 64,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 512,
        "q_lora_rank": None,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
        "topk_method": "greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "moe_layer_freq": 1,
    },
    "mistral": {
        **_COMMON,
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "intermediate_size": 256,
        "sliding_window": 512,
    },
    "qwen3_next": {
        **_COMMON,
        "architectures": ["Qwen3NextForCausalLM"],
        "model_type": "qwen3_next",
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "intermediate_size": 256,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 8,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "linear_conv_kernel_dim": 4,
        # vLLM keeps these states in float32 on a CPU, whatever is asked.
        "mamba_ssm_dtype": "float32",
        "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    },
}
ENGINE = {"max_model_len": 2048, "max_num_seqs": 8, "max_num_batched_tokens": 512}


def write(name: str, root: Path) -> Path:
    """A folder with one of the configs."""
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS[name]))
    return folder


def report(folder: str) -> None:
    """Start the engine and print its figures."""
    from vllm import LLM

    llm = LLM(
        folder,
        load_format="dummy",
        skip_tokenizer_init=True,
        enforce_eager=True,
        kv_cache_memory_bytes=CACHE_BYTES,
        **ENGINE,
    )
    config = llm.llm_engine.vllm_config
    print(
        json.dumps(
            {
                "folder": folder,
                "tokens": config.cache_config.kv_cache_size_tokens,
                "block_size": config.cache_config.block_size,
                "prefix_caching": config.cache_config.enable_prefix_caching,
                "async_scheduling": bool(config.scheduler_config.async_scheduling),
                "blocks": config.cache_config.num_gpu_blocks,
            }
        ),
        flush=True,
    )


def main() -> None:
    """Import once, and report in a copy of this process for each folder; exit code 1 where one has failed."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import vllm.model_executor.models.registry
    import vllm.v1.engine.llm_engine
    import vllm.v1.worker.cpu_worker  # noqa: F401

    failed = False
    for folder in sys.argv[1:]:
        child = os.fork()
        if child == 0:
            report(folder)
            sys.exit(0)
        failed |= os.waitpid(child, 0)[1] != 0
    sys.exit(failed)


if __name__ == "__main__":
    main()
