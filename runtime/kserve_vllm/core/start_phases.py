"""Where the time of a start went, from the creation of the process until it was ready.

The phases follow each other without a gap, so that their sum is the whole. What marks their ends comes from this
process and from what vLLM's processes log on their way (`kserve_vllm.telemetry.logs.Milestones`). A phase that a model
or a flag leaves out (no compilation, no graphs) takes no time, and so does one whose end is not seen: its time counts
for the next one that is.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import psutil

PHASES: Mapping[str, str] = {
    "process": "until our first line ran: the container's file system, Python, our imports",
    "imports": "vLLM and torch are imported and flags checked in the front end",
    "engine_process": "vLLM's engine process and its workers start and import the same",
    "weights": "the model is loaded",
    "compile": "a first pass is run and compiled, or read from the compile cache",
    "graphs": "memory for the KV cache is taken and CUDA graphs are captured",
    "warm_up": "routes are built, adapters loaded, a first request and the warm-up file run",
    "first_probe": "from ready to the first readiness probe that said so",
}
"""Phases in their order, and what they hold."""
_AFTER_READY = "first_probe"


class StartPhases:
    """Notes when phases end.

    Args:
        began: when the process was created, in seconds of the wall clock; None asks the kernel.
    """

    def __init__(self, began: float | None = None) -> None:
        self._ends: dict[str, float] = {}
        self.began = psutil.Process().create_time() if began is None else began

    def end(self, phase: str, at: float | None = None) -> None:
        """A phase is over, now or at a time of the wall clock in seconds. The last word counts."""
        self._ends[phase] = time.time() if at is None else at

    def ended(self, phase: str) -> bool:
        """Whether its end is known."""
        return phase in self._ends

    def seconds(self) -> dict[str, float]:
        """Phases whose end is known, or that were left out, with their length in seconds."""
        found, before = {}, self.began
        for phase in PHASES:
            end = self._ends.get(phase)
            if end is None and phase == _AFTER_READY:
                break
            # Clocks of one machine; a line may still be a moment late.
            after = before if end is None else max(before, end)
            found[phase], before = after - before, after
        return found

    def sentence(self) -> str:
        """One line for the log."""
        found = self.seconds()
        parts = ", ".join(f"{phase.replace('_', ' ')} {length:.1f}" for phase, length in found.items())
        return f"started in {sum(found.values()):.1f} s: {parts}"
