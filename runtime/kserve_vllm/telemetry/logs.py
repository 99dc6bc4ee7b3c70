"""How log lines look."""

from __future__ import annotations

import logging
import sys


def configure() -> None:
    """Write our own lines and those of the libraries to standard error, one a line. vLLM formats its own."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s %(asctime)s %(name)s: %(message)s", "%m-%d %H:%M:%S"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    logging.getLogger("kserve").setLevel(logging.WARNING)
