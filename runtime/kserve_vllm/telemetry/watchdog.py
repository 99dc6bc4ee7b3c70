"""A watchdog on the event loop: how long one thing kept it from everything else, probes included."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

log = logging.getLogger(__name__)

HOLD_S = 0.2
"""No request may hold the loop for longer."""
_EVERY_S = 0.1


async def watch_loop(observe: Callable[[float, bool], None], every_s: float = _EVERY_S) -> None:
    """Ask for a wake-up time and again, and tell how late each one was, in seconds.

    Args:
        observe: told the lateness, and whether work of this process was to blame for over `HOLD_S` of it. A process
            that waits for a processor, which others use, is late too; it does not hold its loop then.
        every_s: seconds between two wake-ups.
    """
    loop = asyncio.get_running_loop()
    while True:
        due, used = loop.time() + every_s, time.process_time()
        await asyncio.sleep(every_s)
        lag = max(0.0, loop.time() - due)
        held = min(lag, time.process_time() - used)
        if held > HOLD_S:
            log.warning("the event loop was held for %.2f s", held)
        observe(lag, held > HOLD_S)
