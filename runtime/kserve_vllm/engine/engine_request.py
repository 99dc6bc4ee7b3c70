"""What vLLM's front end hands to the engine, as far as it is read here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import SamplingParams


class EngineRequest(Protocol):
    """One sequence: vLLM's `EngineCoreRequest`.

    Attributes:
        request_id: the engine's name for it.
        prompt_token_ids: shape [prompt tokens]; None where the prompt is given as embeddings.
        sampling_params: None where nothing is generated.
        pooling_params: None where nothing is pooled.
        lora_request: the adapter, None for the base model.
        trace_headers: W3C trace context of the caller.
        resumable: whether more input may follow, as in a realtime session.
    """

    request_id: str
    prompt_token_ids: Sequence[int] | None
    sampling_params: SamplingParams | None
    pooling_params: object
    lora_request: LoRARequest | None
    trace_headers: Mapping[str, str] | None
    resumable: bool
