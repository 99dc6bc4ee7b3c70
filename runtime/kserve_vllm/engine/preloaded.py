"""What the process that vLLM's processes are copies of imports: what they all need (see `fork_server`).

Importing this module does it. Whatever goes wrong is left to them, who import the same and say what is wrong.
"""

from __future__ import annotations

import contextlib
import gc

with contextlib.suppress(Exception):
    import setproctitle
    import vllm.v1.engine.core
    import vllm.v1.executor.multiproc_executor
    import vllm.v1.worker.cpu_worker  # noqa: F401

    from kserve_vllm.engine import fork_server

    # It looks once for where the title stands, and finds it only while the environment is as the kernel laid it.
    setproctitle.getproctitle()
    fork_server.use_for_workers()
    # Copies share what is here; the collector would write to all of it.
    gc.collect()
    gc.freeze()
