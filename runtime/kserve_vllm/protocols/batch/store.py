"""Files and batches of each tenant in a folder, which processes and replicas may share.

    DIR/tenants/NAME/files/ID.json, ID.data    a file of a client: what is known of it, and its content
    DIR/tenants/NAME/batches/ID/batch.json     a batch, replaced as a whole
                               input.jsonl     its requests: a second link to the file's content
                               output.jsonl    answers with status 200, appended; becomes a file at the batch's end
                               errors.jsonl    all others
                               cancel          there once it is to be cancelled
                               lock            held by the process that works on it
    DIR/active/ID                              a batch that is not over; holds its tenant's name

What is written is on the disk (fsync) before anyone is told of it. `batch.json` is written by who holds the lock alone;
what it counts is counted again from the answers themselves when a batch is taken up. Functions here block: they are
called in threads.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from kserve_vllm.core.errors import ConfigError, InvalidRequest, NotFound

FILE_ID = re.compile(r"file-[0-9a-f]{32}")
BATCH_ID = re.compile(r"batch_[0-9a-f]{32}")
OVER = frozenset({"failed", "completed", "expired", "cancelled"})
"""States of a batch that do not change any more."""
KEEP_S = 30 * 86_400
"""How long files and finished batches are kept where nobody says otherwise: OpenAI's 30 days."""
_HIDDEN = "_"
"""Fields that begin with it are not shown to clients."""

Tree = dict[str, Any]
"""What stands in a JSON file of this folder, or in a line of one: written or checked by us, so its fields are known."""


@dataclass(frozen=True)
class Bounds:
    """What one tenant may keep.

    Attributes:
        files: number of files, and of batches.
        size: bytes of all files together, those of results included.
        lines: requests of one batch.
    """

    files: int
    size: int
    lines: int


@dataclass
class Owner:
    """Who a batch belongs to, as far as that is kept: never the key."""

    tenant: str
    key_id: str | None


@dataclass
class Counts:
    """What became of a batch's requests, and the tokens that they used."""

    total: int = 0
    completed: int = 0
    failed: int = 0
    usage: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("input", "cached", "output", "reasoning"), 0))

    def add(self, answer: Tree) -> None:
        """Count an answer as it stands in a results file."""
        response = answer.get("response") or {}
        if response.get("status_code") != 200:
            self.failed += 1
            return
        self.completed += 1
        used = response["body"].get("usage") if isinstance(response.get("body"), dict) else None
        if not isinstance(used, dict):
            return
        for name, keys in (
            ("input", ("prompt_tokens", "input_tokens")),
            ("output", ("completion_tokens", "output_tokens")),
        ):
            self.usage[name] += next((int(used[key]) for key in keys if isinstance(used.get(key), int)), 0)
        for name, outer, inner in (
            ("cached", ("prompt_tokens_details", "input_tokens_details"), "cached_tokens"),
            ("reasoning", ("completion_tokens_details", "output_tokens_details"), "reasoning_tokens"),
        ):
            for key in outer:
                if isinstance(details := used.get(key), dict) and isinstance(details.get(inner), int):
                    self.usage[name] += details[inner]

    def shown(self) -> dict[str, object]:
        """The fields of a batch that come of it."""
        used = self.usage
        return {
            "request_counts": {"total": self.total, "completed": self.completed, "failed": self.failed},
            "usage": {
                "input_tokens": used["input"],
                "input_tokens_details": {"cached_tokens": used["cached"]},
                "output_tokens": used["output"],
                "output_tokens_details": {"reasoning_tokens": used["reasoning"]},
                "total_tokens": used["input"] + used["output"],
            },
        }


class Store:
    """The folder.

    Args:
        path: of it; made if it is not there.
        bounds: for each tenant.
        clock: seconds of the wall clock.

    Raises:
        ConfigError: it can't be written to, or its file system keeps no locks.
    """

    def __init__(self, path: str, bounds: Bounds, clock: Callable[[], float] = time.time) -> None:
        self.root = Path(path)
        self.bounds = bounds
        self._clock = clock
        try:
            (self.root / "active").mkdir(parents=True, exist_ok=True)
            _check_locks(self.root)
        except OSError as error:
            raise ConfigError(f"--batch-dir {path} can't be used: {error.strerror}") from error

    # Files

    def add_file(
        self, tenant: str, filename: str, purpose: str, content: IO[bytes], keep_s: int | None = None
    ) -> dict[str, object]:
        """Keep a file.

        Raises:
            InvalidRequest: the tenant has as many, or as much, as it may.
        """
        folder = self._files(tenant)
        content.seek(0, os.SEEK_END)
        size = content.tell()
        content.seek(0)
        self._check_room(tenant, size)
        file_id = f"file-{uuid.uuid4().hex}"
        with (folder / f"{file_id}.data").open("xb") as kept:
            shutil.copyfileobj(content, kept, 1 << 20)
            kept.flush()
            os.fsync(kept.fileno())
        return self._describe(tenant, file_id, filename, purpose, keep_s)

    def _describe(
        self, tenant: str, file_id: str, filename: str, purpose: str, keep_s: int | None
    ) -> dict[str, object]:
        now = self._clock()
        tree = {
            "id": file_id,
            "object": "file",
            "bytes": (self._files(tenant) / f"{file_id}.data").stat().st_size,
            "created_at": int(now),
            "expires_at": int(now) + (KEEP_S if keep_s is None else keep_s),
            "filename": filename[:255],
            "purpose": purpose,
            "status": "processed",
            "_order": now,
        }
        _write(self._files(tenant) / f"{file_id}.json", tree)
        return _shown(tree)

    def file(self, tenant: str, file_id: str) -> dict[str, object]:
        """What is known of a file.

        Raises:
            NotFound: the tenant has none of that id.
        """
        tree = _read(self._files(tenant) / f"{file_id}.json") if FILE_ID.fullmatch(file_id) else None
        if tree is None or tree["expires_at"] <= self._clock():
            raise NotFound(f"there is no file {file_id[:64]!r}", field="id")
        return _shown(tree)

    def content(self, tenant: str, file_id: str) -> Path:
        """Where a file's content is.

        Raises:
            NotFound: the tenant has none of that id.
        """
        self.file(tenant, file_id)
        return self._files(tenant) / f"{file_id}.data"

    def delete_file(self, tenant: str, file_id: str) -> None:
        """Forget a file. A batch that works on it goes on: it has a link of its own.

        Raises:
            NotFound: the tenant has none of that id.
        """
        self.file(tenant, file_id)
        for suffix in (".json", ".data"):
            (self._files(tenant) / f"{file_id}{suffix}").unlink(missing_ok=True)

    def list_files(self, tenant: str) -> list[dict[str, object]]:
        """All files of a tenant, the newest first."""
        now = self._clock()
        found = [tree for tree in map(_read, self._files(tenant).glob("file-*.json")) if tree is not None]
        return [_shown(tree) for tree in _newest_first(found) if tree["expires_at"] > now]

    # Batches

    def add_batch(self, owner: Owner, wanted: Tree, window_s: int, keep_s: int | None) -> dict[str, object]:
        """Keep a batch, for whoever takes it up first.

        Args:
            owner: whose it is.
            wanted: `input_file_id`, `endpoint`, `completion_window` and `metadata`, as checked.
            window_s: seconds until it expires.
            keep_s: how long its results are kept.

        Raises:
            NotFound: the tenant has no such file.
            InvalidRequest: the tenant has as many batches as it may.
        """
        source = self.content(owner.tenant, wanted["input_file_id"])
        self._check_room(owner.tenant, 0)
        batches = self._batches(owner.tenant)
        if sum(1 for _ in batches.glob("batch_*")) >= self.bounds.files:
            raise InvalidRequest(
                f"there are {self.bounds.files} batches already, as many as are kept (--batch-max-files)"
            )
        now = self._clock()
        batch_id = f"batch_{uuid.uuid4().hex}"
        folder = batches / batch_id
        folder.mkdir()
        try:
            os.link(source, folder / "input.jsonl")
        except OSError:  # a file system without links
            shutil.copyfile(source, folder / "input.jsonl")
        tree = {
            "id": batch_id,
            "object": "batch",
            **wanted,
            "status": "validating",
            "created_at": int(now),
            "expires_at": int(now) + window_s,
            "_order": now,
            "_key_id": owner.key_id,
            "_keep_s": keep_s,
            "_output": f"file-{uuid.uuid4().hex}",
            "_errors": f"file-{uuid.uuid4().hex}",
            **Counts().shown(),
        }
        _write(folder / "batch.json", tree)
        _write(self.root / "active" / batch_id, {"tenant": owner.tenant})
        return _batch_shown(tree)

    def batch(self, tenant: str, batch_id: str) -> dict[str, object]:
        """A batch, as its client sees it now.

        Raises:
            NotFound: the tenant has none of that id.
        """
        folder = self._batches(tenant) / batch_id
        tree = _read(folder / "batch.json") if BATCH_ID.fullmatch(batch_id) else None
        if tree is None:
            raise NotFound(f"there is no batch {batch_id[:64]!r}", field="id")
        return _batch_shown(_with_cancel(folder, tree))

    def list_batches(self, tenant: str) -> list[dict[str, object]]:
        """All batches of a tenant, the newest first."""
        found = []
        for path in self._batches(tenant).glob("batch_*/batch.json"):
            tree = _read(path)
            if tree is not None:
                found.append(_with_cancel(path.parent, tree))
        return [_batch_shown(tree) for tree in _newest_first(found)]

    def cancel(self, tenant: str, batch_id: str) -> dict[str, object]:
        """Have a batch cancelled by whoever works on it.

        Raises:
            NotFound: the tenant has none of that id.
            InvalidRequest: it is over.
        """
        found = self.batch(tenant, batch_id)
        if found["status"] in OVER or found["status"] == "finalizing":
            raise InvalidRequest(f"the batch is {found['status']} and can't be cancelled any more", field="id")
        path = self._batches(tenant) / batch_id / "cancel"
        if not path.exists():
            _write(path, {"at": int(self._clock())})
        return self.batch(tenant, batch_id)

    def active(self) -> Iterator[tuple[str, str]]:
        """(tenant, id) of all batches that are not over, of all tenants, the oldest first."""
        found = []
        for path in (self.root / "active").iterdir():
            tree = _read(path) if BATCH_ID.fullmatch(path.name) else None
            if tree is not None:
                with suppress(OSError):
                    found.append((path.stat().st_mtime, tree["tenant"], path.name))
        for _, tenant, batch_id in sorted(found):
            yield tenant, batch_id

    def take(self, tenant: str, batch_id: str) -> Taken | None:
        """Take up a batch; None where another process works on it, or it is over."""
        folder = self._batches(tenant) / batch_id
        try:
            lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError:
            return None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            return None
        tree = _read(folder / "batch.json")
        if tree is None or tree["status"] in OVER:
            (self.root / "active" / batch_id).unlink(missing_ok=True)
            os.close(lock)
            return None
        return Taken(self, tenant, folder, tree, lock)

    def sweep(self) -> None:
        """Remove what has expired."""
        now = self._clock()
        for path in self.root.glob("tenants/*/files/file-*.json"):
            tree = _read(path)
            if tree is not None and tree["expires_at"] <= now:
                path.with_suffix(".data").unlink(missing_ok=True)
                path.unlink(missing_ok=True)
        for path in self.root.glob("tenants/*/files/file-*.data"):
            # What an upload left behind that a crash ended.
            with suppress(OSError):
                if not path.with_suffix(".json").exists() and path.stat().st_mtime + 86_400 <= now:
                    path.unlink()
        for path in self.root.glob("tenants/*/batches/batch_*/batch.json"):
            tree = _read(path)
            if tree is not None and tree["status"] in OVER and tree["created_at"] + 2 * KEEP_S <= now:
                shutil.rmtree(path.parent, ignore_errors=True)

    def now(self) -> float:
        """Seconds of the wall clock."""
        return self._clock()

    def move_results(self, taken: Taken, name: str, file_id: str, keep_s: int | None) -> str | None:
        """Make a file of a batch's results; its id, or None where there are none. Again, it does the same."""
        target = self._files(taken.tenant) / f"{file_id}.data"
        source = taken.folder / f"{name}.jsonl"
        if source.exists() and source.stat().st_size:
            os.replace(source, target)
        if not target.exists():
            return None
        if _read(target.with_suffix(".json")) is None:
            self._describe(taken.tenant, file_id, f"{taken.folder.name}_{name}.jsonl", "batch_output", keep_s)
        return file_id

    def _check_room(self, tenant: str, size: int) -> None:
        kept = [path.stat().st_size for path in self._files(tenant).glob("file-*.data")]
        if len(kept) >= self.bounds.files:
            raise InvalidRequest(
                f"there are {len(kept)} files already, as many as are kept (--batch-max-files); delete some",
                field="file",
            )
        if sum(kept) + size > self.bounds.size:
            raise InvalidRequest(
                f"there would be more than {self.bounds.size >> 20} MiB of files (--batch-max-mib); delete some",
                field="file",
            )

    def _files(self, tenant: str) -> Path:
        return _made(self.root / "tenants" / tenant / "files")

    def _batches(self, tenant: str) -> Path:
        return _made(self.root / "tenants" / tenant / "batches")


class Taken:
    """A batch that this process works on, until it is released.

    Args:
        store: it is of.
        tenant: it is of.
        folder: of the batch.
        tree: `batch.json`.
        lock: open file that holds the lock.
    """

    def __init__(self, store: Store, tenant: str, folder: Path, tree: Tree, lock: int) -> None:
        self.store, self.tenant, self.folder, self.tree = store, tenant, folder, tree
        self._lock = lock
        self._output: IO[bytes] | None = None
        self._errors: IO[bytes] | None = None
        counted, used = tree["request_counts"], tree["usage"]
        self.counts = Counts(
            counted["total"],
            counted["completed"],
            counted["failed"],
            {
                "input": used["input_tokens"],
                "cached": used["input_tokens_details"]["cached_tokens"],
                "output": used["output_tokens"],
                "reasoning": used["output_tokens_details"]["reasoning_tokens"],
            },
        )
        self.done: set[str] = set()
        """`custom_id`s that have an answer."""

    @property
    def owner(self) -> Owner:
        """Whose it is."""
        return Owner(self.tenant, self.tree["_key_id"])

    @property
    def cancelled(self) -> bool:
        """Whether its client wants it ended."""
        return (self.folder / "cancel").exists()

    def set(self, **fields: object) -> None:
        """Change what is known of it."""
        self.tree = {**self.tree, **fields, **self.counts.shown()}
        _write(self.folder / "batch.json", self.tree)

    def recall(self) -> None:
        """Read which requests have an answer. What a crash left half written is cut off."""
        self.counts = Counts(total=self.counts.total)
        self.done = set()
        for name in ("output", "errors"):
            path = self.folder / f"{name}.jsonl"
            for answer in whole_lines(path):
                self.done.add(answer["custom_id"])
                self.counts.add(answer)
        self._output = (self.folder / "output.jsonl").open("ab")
        self._errors = (self.folder / "errors.jsonl").open("ab")
        _sync_folder(self.folder)

    def append(self, answers: list[Tree]) -> None:
        """Keep answers; when this returns they are on the disk."""
        assert self._output is not None
        assert self._errors is not None
        for answer in answers:
            good = (answer["response"] or {}).get("status_code") == 200
            (self._output if good else self._errors).write(json.dumps(answer).encode() + b"\n")
        for file in (self._output, self._errors):
            file.flush()
            os.fsync(file.fileno())
        for answer in answers:
            self.done.add(answer["custom_id"])
            self.counts.add(answer)

    def finish(self, status: str, at: str, **fields: object) -> None:
        """Make files of the results, and end the batch."""
        store, keep_s = self.store, self.tree["_keep_s"]
        self.set(status="finalizing", finalizing_at=int(store.now()), _end=[status, at])
        self._close()
        output = store.move_results(self, "output", self.tree["_output"], keep_s)
        errors = store.move_results(self, "errors", self.tree["_errors"], keep_s)
        self.end(status, at, output_file_id=output, error_file_id=errors, **fields)

    def end(self, status: str, at: str, **fields: object) -> None:
        """End the batch; `at` names the field that says when."""
        self.set(status=status, **{at: int(self.store.now())}, **fields)
        for name in ("input.jsonl", "output.jsonl", "errors.jsonl"):
            (self.folder / name).unlink(missing_ok=True)
        (self.store.root / "active" / self.folder.name).unlink(missing_ok=True)

    def release(self) -> None:
        """Let others take it up."""
        self._close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _close(self) -> None:
        for file in (self._output, self._errors):
            if file is not None and not file.closed:
                with suppress(OSError):
                    file.close()


def whole_lines(path: Path) -> Iterator[Tree]:
    """The answers in a results file; what was written last is cut off where it is not whole."""
    if not path.exists():
        return
    good = 0
    with path.open("r+b") as file:
        for line in file:
            try:
                answer = json.loads(line)
                if not line.endswith(b"\n") or not isinstance(answer["custom_id"], str):
                    break
            except (ValueError, LookupError, TypeError):
                break
            good += len(line)
            yield answer
        file.truncate(good)
        os.fsync(file.fileno())


def _with_cancel(folder: Path, tree: Tree) -> Tree:
    """A batch whose client has cancelled it, and whose worker has not seen that yet."""
    if tree["status"] in OVER or tree["status"] == "finalizing":
        return tree
    mark = _read(folder / "cancel")
    return tree if mark is None else {**tree, "status": "cancelling", "cancelling_at": mark["at"]}


def _batch_shown(tree: Mapping[str, object]) -> dict[str, object]:
    """All of OpenAI's fields, as its SDK has them."""
    times = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
    empty = dict.fromkeys(("errors", "model", "output_file_id", "error_file_id", *(f"{each}_at" for each in times)))
    return {**empty, **_shown(tree)}


def _shown(tree: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in tree.items() if not name.startswith(_HIDDEN)}


def _newest_first(trees: list[Tree]) -> list[Tree]:
    return sorted(trees, key=lambda tree: (tree["_order"], tree["id"]), reverse=True)


def _made(folder: Path) -> Path:
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def _read(path: Path) -> Tree | None:
    try:
        tree = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return tree if isinstance(tree, dict) else None


def _write(path: Path, tree: Mapping[str, object]) -> None:
    """Replace a file as a whole: a reader sees the old or the new one, also after a crash."""
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with beside.open("xb") as file:
        file.write(json.dumps(tree).encode())
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    _sync_folder(path.parent)


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
