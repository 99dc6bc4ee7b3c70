"""What tells one set of weights from another, wherever it lies and whatever its folder is called.

Every model of KServe lies in `/mnt/models`, and replicas that share a cache have copies with other dates: neither path
nor time says anything.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

_SAMPLES = 64
_SAMPLE_BYTES = 4096
_WHOLE_BYTES = 4 << 20


@functools.lru_cache(maxsize=1024)
def fingerprint(path: str) -> str:
    """SHA-256 of a model's or adapter's folder, hexadecimal; of the name itself where there is no such folder.

    Small files count in full. Of a large one its size and 64 samples of 4 KiB count, spread over all of it: enough to
    tell apart any two trainings, which change every tensor, at a cost of milliseconds instead of minutes.
    """
    folder = Path(path)
    digest = hashlib.sha256()
    if not folder.is_dir():
        digest.update(path.encode())
        return digest.hexdigest()
    for file in sorted(each for each in folder.rglob("*") if each.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder)}\0{size}\0".encode())
        with file.open("rb") as handle:
            if size <= _WHOLE_BYTES:
                digest.update(handle.read())
                continue
            for number in range(_SAMPLES):
                handle.seek(number * (size - _SAMPLE_BYTES) // (_SAMPLES - 1))
                digest.update(handle.read(_SAMPLE_BYTES))
    return digest.hexdigest()
