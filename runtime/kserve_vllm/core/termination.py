"""One sentence on why the process ended, where Kubernetes looks for it.

The kubelet shows what a container has left in its `terminationMessagePath` with `kubectl describe pod`, and KServe puts
it into `status.modelStatus.lastFailureInfo`. The file is there before the container starts; where it is not, nobody
would read it, and nothing is written.
Source: Kubernetes, "Determine the Reason for Pod Failure".
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence

DEFAULT_PATH = "/dev/termination-log"
FLAG = "--termination-message-path"
VARIABLE = "KSERVE_VLLM_TERMINATION_MESSAGE_PATH"
_MOST_BYTES = 4096  # the kubelet reads no more
_MOST_CHARACTERS = 700


def path_of(arguments: Sequence[str], environ: Mapping[str, str]) -> str:
    """Where to write while the settings themselves may be what is wrong."""
    for at, word in enumerate(arguments):
        name, equals, value = word.partition("=")
        if name.replace("_", "-") == FLAG:
            return value if equals else next(iter(arguments[at + 1 : at + 2]), DEFAULT_PATH)
    return environ.get(VARIABLE, DEFAULT_PATH)


def clear(path: str) -> None:
    """Forget what an earlier process has left: of what is written from now on, the first sentence stays."""
    _write(path, b"", fresh=True)


def write(path: str, sentence: str) -> None:
    """Leave a sentence, unless there is one: what was noticed first is nearest to the cause. Raises nothing."""
    _write(path, sentence.encode(errors="replace")[:_MOST_BYTES], fresh=False)


def describe(error: BaseException) -> str:
    """An exception in one line, as `kubectl describe` has room for."""
    return in_one_line(type(error).__name__, str(error))


def in_one_line(kind: str, text: str) -> str:
    """The kind of an exception and its text, without line breaks and cut to a bearable length."""
    words = " ".join(text.split())
    cut = words if len(words) <= _MOST_CHARACTERS else f"{words[:_MOST_CHARACTERS]} ..."
    return f"{kind}: {cut}" if cut else kind


def _write(path: str, content: bytes, fresh: bool) -> None:
    try:
        # Never created, and no device is written to: outside of Kubernetes there may be anything.
        handle = os.open(path, os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            return
        if fresh:
            os.ftruncate(handle, 0)
        elif found.st_size == 0:
            os.write(handle, content)
    except OSError:
        return
    finally:
        os.close(handle)
