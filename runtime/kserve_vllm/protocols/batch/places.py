"""Where files and batches are kept, by keys such as `tenants/NAME/files/ID.json`: a folder (here), or `bucket`.

Functions here block: they are called in threads.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO, Protocol

from kserve_vllm.core.errors import ConfigError

INPUT, OUTPUT, ERRORS = "input.jsonl", "output.jsonl", "errors.jsonl"
LOCK = "lock"


@dataclass(frozen=True)
class Entry:
    """Something that is kept.

    Attributes:
        key: of it.
        size: bytes.
        changed_at: seconds of the wall clock.
    """

    key: str
    size: int
    changed_at: float


@dataclass(frozen=True)
class Streamed:
    """A content, piece by piece.

    Attributes:
        size: bytes.
        pieces: of it; the file or connection that they come from is closed at their end.
    """

    size: int
    pieces: Iterator[bytes]


class Desk(Protocol):
    """A batch's files on a disk, for the one process that has taken it up.

    Attributes:
        folder: holds `input.jsonl`, and `output.jsonl` and `errors.jsonl` once there are answers.
    """

    folder: Path

    def fetch(self) -> None:
        """Bring the requests, and the answers that are kept, to the disk."""

    def append(self, name: str, lines: bytes) -> None:
        """Add whole lines to a file of answers. When this returns, they outlive this process and its machine."""

    def hand_in(self, name: str, key: str) -> int | None:
        """Keep a file of answers under a key of its own; its bytes, or None if it has none. Again, it does the same."""

    def read(self) -> bytes | None:
        """What stands in `batch.json`."""

    def write(self, data: bytes) -> None:
        """Replace `batch.json`."""

    def clear(self) -> None:
        """Forget requests and answers: the batch is over."""

    def release(self) -> None:
        """Let others take the batch up."""


class Place(Protocol):
    """What keeps things by key. Nobody sees half of anything, also after a crash.

    Attributes:
        look_every_s: how often it is looked for batches to take up.
        watch_every_s: how often a batch is looked after: whether it was cancelled, and what it has done so far.
    """

    look_every_s: float
    watch_every_s: float

    def read(self, key: str) -> bytes | None:
        """What is there; None if nothing is."""

    def read_all(self, keys: Iterable[str]) -> list[bytes | None]:
        """The same of many, in their order."""

    def write(self, key: str, data: bytes) -> None:
        """Replace as a whole what is there."""

    def keep(self, key: str, content: IO[bytes]) -> None:
        """Keep what can be read from a file, which may be large."""

    def content(self, key: str) -> Streamed:
        """A large thing. Once it is returned, it is there to its end, also where it is removed meanwhile.

        Raises:
            FileNotFoundError: it is not there.
        """

    def copy(self, source: str, target: str) -> None:
        """Have a second one of what does not change; it stays when the first one is removed."""

    def entries(self, prefix: str) -> list[Entry]:
        """All whose key begins with this, which ends in a slash."""

    def remove(self, *keys: str) -> None:
        """Remove; what is not there is no fault."""

    def desk(self, key: str) -> Desk | None:
        """Lock a batch, by the key that what belongs to it begins with; None where another process has it."""


class Folder:
    """A folder, on a file system that keeps locks.

    Args:
        path: of it; made if it is not there.

    Raises:
        ConfigError: it can't be written to, or keeps no locks.
    """

    look_every_s = 2.0
    watch_every_s = 1.0

    def __init__(self, path: str) -> None:
        self.root = Path(path)
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            _check_locks(self.root)
        except OSError as error:
            raise ConfigError(f"--batch-dir {path} can't be used: {error.strerror}") from error

    def read(self, key: str) -> bytes | None:
        """See `Place`."""
        try:
            return (self.root / key).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def read_all(self, keys: Iterable[str]) -> list[bytes | None]:
        """See `Place`."""
        return [self.read(key) for key in keys]

    def write(self, key: str, data: bytes) -> None:
        """See `Place`; a hidden file beside it is renamed to it once it is on the disk."""
        path = self._made(key)
        beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        with beside.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        _sync_folder(path.parent)

    def keep(self, key: str, content: IO[bytes]) -> None:
        """See `Place`."""
        with self._made(key).open("xb") as kept:
            shutil.copyfileobj(content, kept, 1 << 20)
            kept.flush()
            os.fsync(kept.fileno())

    def content(self, key: str) -> Streamed:
        """See `Place`."""
        file = (self.root / key).open("rb")
        return Streamed(os.fstat(file.fileno()).st_size, _pieces(file))

    def copy(self, source: str, target: str) -> None:
        """See `Place`; a second link, where the file system has them."""
        path = self._made(target)
        try:
            os.link(self.root / source, path)
        except OSError:
            shutil.copyfile(self.root / source, path)

    def entries(self, prefix: str) -> list[Entry]:
        """See `Place`; hidden files, which are being written, are left out."""
        found = []
        for path in (self.root / prefix).rglob("[!.]*"):
            with suppress(FileNotFoundError):
                about = path.stat()
                if path.is_file():
                    found.append(Entry(path.relative_to(self.root).as_posix(), about.st_size, about.st_mtime))
        return found

    def remove(self, *keys: str) -> None:
        """See `Place`; a batch's folder goes with the last that is in it."""
        for key in keys:
            path = self.root / key
            path.unlink(missing_ok=True)
            if path.parent.name.startswith("batch_") and not any(path.parent.glob("[!.]*")):
                shutil.rmtree(path.parent, ignore_errors=True)

    def desk(self, key: str) -> Desk | None:
        """See `Place`."""
        try:
            lock = os.open(self.root / key / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError:
            return None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            return None
        return _FolderDesk(self, key, lock)

    def _made(self, key: str) -> Path:
        path = self.root / key
        if not path.parent.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
        return path


class _FolderDesk:
    """The batch's own folder: its answers are appended where they are kept.

    Args:
        place: it is in.
        key: of the batch.
        lock: open file that holds the lock.
    """

    def __init__(self, place: Folder, key: str, lock: int) -> None:
        self.folder = place.root / key
        self._place, self._key, self._lock = place, key, lock
        self._open: dict[str, IO[bytes]] = {}

    def fetch(self) -> None:
        """See `Desk`: all is there."""

    def append(self, name: str, lines: bytes) -> None:
        """See `Desk`."""
        if name not in self._open:
            self._open[name] = (self.folder / name).open("ab")
            _sync_folder(self.folder)
        file = self._open[name]
        file.write(lines)
        file.flush()
        os.fsync(file.fileno())

    def hand_in(self, name: str, key: str) -> int | None:
        """See `Desk`: the file moves."""
        self._close()
        source, target = self.folder / name, self._place.root / key
        if source.exists() and source.stat().st_size:
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(source, target)
        return target.stat().st_size if target.exists() else None

    def read(self) -> bytes | None:
        """See `Desk`."""
        return self._place.read(f"{self._key}/batch.json")

    def write(self, data: bytes) -> None:
        """See `Desk`."""
        self._place.write(f"{self._key}/batch.json", data)

    def clear(self) -> None:
        """See `Desk`."""
        self._close()
        for name in (INPUT, OUTPUT, ERRORS):
            (self.folder / name).unlink(missing_ok=True)

    def release(self) -> None:
        """See `Desk`."""
        self._close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _close(self) -> None:
        for file in self._open.values():
            with suppress(OSError):
                file.close()
        self._open = {}


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _check_locks(root: Path) -> None:
    """Two locks on one file must not both be had, or two replicas would work on one batch.

    Raises:
        ConfigError: they are.
    """
    path = root / f".lock.{uuid.uuid4().hex}"
    first, second = (os.open(path, os.O_RDWR | os.O_CREAT, 0o600) for _ in range(2))
    try:
        fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with suppress(BlockingIOError):
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
            raise ConfigError(f"--batch-dir {root}: its file system keeps no locks (flock)")
    finally:
        os.close(first)
        os.close(second)
        path.unlink(missing_ok=True)


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    with file:
        while piece := file.read(1 << 20):
            yield piece
