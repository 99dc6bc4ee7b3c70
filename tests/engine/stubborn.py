"""Workers that will not do what vLLM wants of them, for `--worker-cls`."""

from __future__ import annotations

import signal
import time
from typing import Any, NoReturn

from vllm.v1.worker.cpu_worker import CPUWorker


def _stay() -> NoReturn:
    """Neither work nor end: signals and SystemExit are swallowed, as by the callback of a weak reference."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    while True:
        try:
            time.sleep(3600)
        except BaseException:
            continue


class Silent(CPUWorker):  # type: ignore[misc]
    """Stops in the middle of its start."""

    def load_model(self, *_: Any, **__: Any) -> None:
        """Never return."""
        _stay()


class Failing(CPUWorker):  # type: ignore[misc]
    """Lets the engine fail, and stays when it is told to end."""

    def determine_available_memory(self) -> int:
        """Fail."""
        raise MemoryError("the demo model does not fit (as this test wants it)")

    def shutdown(self) -> None:
        """Never return."""
        _stay()
