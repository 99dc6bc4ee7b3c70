"""A file that is replaced while the process runs, as kubelet replaces a ConfigMap's by swapping a symlink."""

from __future__ import annotations

import asyncio
from pathlib import Path

from kserve_vllm.core.errors import ConfigError

POLL_S = 2.0
"""How often watched files are looked at, in seconds."""


class WatchedFile:
    """One watched file. Its content is compared, not its time or inode: a swapped symlink changes neither reliably.

    Args:
        path: of the file.
        flag: the flag that named it, for messages.
    """

    def __init__(self, path: str, flag: str) -> None:
        self.path = Path(path)
        self.flag = flag
        self._seen: bytes | None = None
        self._gone = False

    async def first(self) -> bytes:
        """Read the file at the start.

        Raises:
            ConfigError: it can't be read.
        """
        try:
            self._seen = await asyncio.to_thread(self.path.read_bytes)
        except OSError as error:
            raise ConfigError(f"{self.flag} {self.path} can't be read: {error.strerror}") from error
        return self._seen

    async def changed(self) -> bytes | None:
        """The file's new content, or None where it is what it was.

        Raises:
            OSError: it can't be read now; raised once until it can be read again.
        """
        try:
            content = await asyncio.to_thread(self.path.read_bytes)
        except OSError:
            if self._gone:
                return None
            self._gone = True
            raise
        self._gone = False
        if content == self._seen:
            return None
        self._seen = content
        return content
