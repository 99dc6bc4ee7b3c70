"""vLLM's classes that tests build, imported when the first one is asked for.

vLLM's import takes 20 s of processor time: where a test file does it at its top, each process of a run pays that while
it collects, also the ones that run none of the file's tests.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = [
    "EngineCoreOutput",
    "EngineCoreRequest",
    "FinishReason",
    "LogprobsLists",
    "OutputProcessor",
    "ParentRequest",
    "RepetitionDetectionParams",
    "RequestOutput",
    "RequestOutputCollector",
    "RequestOutputKind",
    "SamplingParams",
    "StructuredOutputsParams",
    "get_tokenizer",
]

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput
    from vllm.sampling_params import (
        RepetitionDetectionParams,
        RequestOutputKind,
        SamplingParams,
        StructuredOutputsParams,
    )
    from vllm.tokenizers import get_tokenizer
    from vllm.v1.engine import (
        EngineCoreOutput,
        EngineCoreRequest,
        FinishReason,
    )
    from vllm.v1.engine.output_processor import (
        OutputProcessor,
        RequestOutputCollector,
    )
    from vllm.v1.engine.parallel_sampling import ParentRequest
    from vllm.v1.outputs import LogprobsLists

_MODULES = {
    "RequestOutput": "vllm.outputs",
    "RepetitionDetectionParams": "vllm.sampling_params",
    "RequestOutputKind": "vllm.sampling_params",
    "SamplingParams": "vllm.sampling_params",
    "StructuredOutputsParams": "vllm.sampling_params",
    "get_tokenizer": "vllm.tokenizers",
    "EngineCoreOutput": "vllm.v1.engine",
    "EngineCoreRequest": "vllm.v1.engine",
    "FinishReason": "vllm.v1.engine",
    "OutputProcessor": "vllm.v1.engine.output_processor",
    "RequestOutputCollector": "vllm.v1.engine.output_processor",
    "ParentRequest": "vllm.v1.engine.parallel_sampling",
    "LogprobsLists": "vllm.v1.outputs",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(name)
    return getattr(import_module(_MODULES[name]), name)
