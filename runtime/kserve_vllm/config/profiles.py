"""Profiles: documented sets of vLLM engine flags.

A profile sets only how requests are scheduled, never anything that changes an answer (no quantization, no KV-cache
precision). An explicit flag overrides its entry of the profile.

Sources of the figures: vLLM's documentation, "Optimization and Tuning" (larger batches of tokens favour throughput,
smaller ones inter-token latency), and its defaults for `vllm serve`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Profile:
    """A named set of engine flags.

    Attributes:
        summary: when to choose it.
        flags: flag name (no dashes in front) to its value.
    """

    summary: str
    flags: Mapping[str, int | float | bool]


PROFILES: Mapping[str, Profile] = {
    "balanced": Profile(
        "Chat for many users: a mix of throughput and latency.",
        {"max-num-seqs": 128, "max-num-batched-tokens": 8192, "enable-prefix-caching": True},
    ),
    "high-throughput": Profile(
        "Batch work: as many tokens per second as the device gives, at the price of latency.",
        {"max-num-seqs": 512, "max-num-batched-tokens": 16384, "enable-prefix-caching": True},
    ),
    "low-latency": Profile(
        "Few users who wait for each token: small batches, short steps.",
        {"max-num-seqs": 16, "max-num-batched-tokens": 2048, "enable-prefix-caching": True},
    ),
    "cost-optimized": Profile(
        "A shared or small device: many sequences, more of the memory for the KV cache.",
        {
            "max-num-seqs": 256,
            "max-num-batched-tokens": 8192,
            "gpu-memory-utilization": 0.95,
            "enable-prefix-caching": True,
        },
    ),
    "long-context": Profile(
        "Long documents: few sequences, prompts cut into chunks so that short requests are not stuck behind them.",
        {
            "max-num-seqs": 16,
            "max-num-batched-tokens": 4096,
            "enable-chunked-prefill": True,
            "enable-prefix-caching": True,
        },
    ),
}
