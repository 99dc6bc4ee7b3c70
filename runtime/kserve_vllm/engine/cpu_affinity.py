"""Which processors the front end runs on, where the engine computes on processors too.

On a CPU vLLM binds the threads of its workers to processors, and leaves at least one to everything else
(`VLLM_CPU_OMP_THREADS_BIND`, `VLLM_CPU_NUM_OF_RESERVED_CPU`). The kernel knows nothing of that: whenever the front end
wakes up it may take a worker's processor, and the whole step of the engine waits for that worker.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable

import psutil

log = logging.getLogger(__name__)


def leave_processors_of(workers: Iterable[psutil.Process]) -> set[int]:
    """Keep this process off the processors that others are bound to, if that leaves any.

    Args:
        workers: those that may be bound to some of the processors that this process may use.

    Returns:
        numbers of the processors that are left; empty where nothing was changed.
    """
    own = os.sched_getaffinity(0)
    bound: set[int] = set()
    for worker in workers:
        with contextlib.suppress(psutil.Error):
            has = set(worker.cpu_affinity() or ())
            if has < own:
                bound |= has
    left = own - bound
    if not bound & own or not left:
        return set()
    # Threads that begin later are where those are that began them.
    for thread in psutil.Process().threads():
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(thread.id, left)
    log.info("on processors %s: the engine's workers are bound to %s", sorted(left), sorted(bound))
    return left
