"""What is printed reaches whoever reads it: a terminal without UTF-8, and a pipe whose reader has left."""

from __future__ import annotations

import codecs
import io
import os
import sys
from collections.abc import Callable

# 128 and SIGPIPE, as a shell has it.
_NO_READER = 141
_PLAIN = "kserve_vllm.plain"
# Bars, by their height; what has no likeness becomes a question mark.
_LIKE = dict(zip("▁▂▃▄▅▆▇█", "._-~=+*#", strict=True))


def printing(command: Callable[[], int]) -> int:
    """Run a command that prints; returns its exit code, or what a shell says of a reader that went away (`| head`)."""
    _speak_plainly()
    try:
        code = command()
        sys.stdout.flush()
    except BrokenPipeError:
        # Python would try to flush once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _NO_READER
    return code


def _speak_plainly() -> None:
    """Where standard output can't say a character, let it say one that is like it, in place of ending with an error."""
    codecs.register_error(_PLAIN, _plain)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors=_PLAIN)


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_LIKE.get(sign, "?") for sign in error.object[error.start : error.end]), error.end
