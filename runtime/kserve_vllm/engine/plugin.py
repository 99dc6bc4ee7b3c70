"""What every process of vLLM runs before it loads a model: vLLM's own plugin mechanism (`vllm.general_plugins`).

Only this reaches the engine's process and its workers, which import nothing of ours otherwise.
"""

from __future__ import annotations

import logging

log = logging.getLogger(__name__)


def register() -> None:
    """Ask the kernel for AMX's registers where this processor has them.

    vLLM's attention on a CPU uses AMX as soon as the processor has it, but Linux kills a process (SIGILL) that touches
    those registers without having asked (`arch_prctl(ARCH_REQ_XCOMP_PERM)`, Documentation/arch/x86/xstate.rst).
    PyTorch's CPU build happens to ask in time; its build with CUDA's libraries does not.
    """
    import torch

    if torch.cpu._is_amx_tile_supported() and not torch.cpu._init_amx():
        log.warning("the kernel gives this process no AMX registers: attention uses AVX-512")
        torch.cpu._is_amx_tile_supported = lambda: False
