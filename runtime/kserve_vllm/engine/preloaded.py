"""What the process that vLLM's processes are copies of imports: what they all need (see `fork_server`).

Importing this module does it. Whatever goes wrong is left to them, who import the same and say what is wrong.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
from collections.abc import Iterator

_OUTPUTS = (1, 2)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """What an import says, the front end says too, and the last line of a start that is refused is to be the reason."""
    before = [os.dup(number) for number in _OUTPUTS]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in _OUTPUTS:
        os.dup2(nowhere, number)
    os.close(nowhere)
    try:
        yield
    finally:
        for number, copy in zip(_OUTPUTS, before, strict=True):
            os.dup2(copy, number)
            os.close(copy)


# Nearly all that is imported stays: looking for what does not takes a fifth of the import.
gc.disable()
with _quietly(), contextlib.suppress(Exception):
    import setproctitle
    import vllm.v1.engine.core
    import vllm.v1.executor.multiproc_executor
    import vllm.v1.worker.cpu_worker  # noqa: F401

    from kserve_vllm.engine import fork_server

    # It looks once for where the title stands, and finds it only while the environment is as the kernel laid it.
    setproctitle.getproctitle()
    fork_server.use_for_workers()
    # A service manager may send the end to every process: if this one died of it, its copies would count as dead.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
# Copies share what is here; the collector would write to all of it.
gc.freeze()
gc.enable()
