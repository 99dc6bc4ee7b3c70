"""Files and batches of each tenant in a folder or bucket, which processes and replicas may share.

    tenants/NAME/files/ID.json, ID.data    a file of a client: what is known of it, and its content
    tenants/NAME/batches/ID/batch.json     a batch, replaced as a whole
                           input.jsonl     its requests: a copy of the file's content
                           output.jsonl    answers with status 200, appended; becomes a file at the batch's end
                           errors.jsonl    all others
                           cancel          there once it is to be cancelled
                           lock            held by the process that works on it
    active/ID                              a batch that is not over; holds its tenant's name

In a bucket, which can't append, answers are pieces below `output.jsonl/` and `errors.jsonl/`; see `bucket`.

What is written outlives this process and its machine (fsync, or an object) before anyone is told of it. `batch.json` is
written by who holds the lock alone; what it counts is counted again from the answers themselves when a batch is taken
up. Functions here block: they are called in threads.
"""

from __future__ import annotations

import json
import os
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from kserve_vllm.core.errors import InvalidRequest, NotFound
from kserve_vllm.protocols.batch.places import ERRORS, INPUT, OUTPUT, Desk, Entry, Folder, Place, Streamed

FILE_ID = re.compile(r"file-[0-9a-f]{32}")
BATCH_ID = re.compile(r"batch_[0-9a-f]{32}")
OVER = frozenset({"failed", "completed", "expired", "cancelled"})
"""States of a batch that do not change any more."""
KEEP_S = 30 * 86_400
"""How long files and finished batches are kept where nobody says otherwise: OpenAI's 30 days."""
_HIDDEN = "_"
"""Fields that begin with it are not shown to clients."""

Tree = dict[str, Any]
"""What stands in a JSON file here, or in a line of one: written or checked by us, so its fields are known."""


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


def place_of(where: str) -> Place:
    """The place that `--batch-dir` names: a folder, or a bucket by `s3://BUCKET/PREFIX`.

    Raises:
        ConfigError: it can't be used.
    """
    if not where.startswith("s3://"):
        return Folder(where)
    from kserve_vllm.protocols.batch.bucket import Bucket

    return Bucket(where)


class BatchStore:
    """The files and batches of a place.

    Args:
        place: where they are kept.
        bounds: for each tenant.
        clock: seconds of the wall clock.
    """

    def __init__(self, place: Place, bounds: Bounds, clock: Callable[[], float] = time.time) -> None:
        self.place = place
        self.bounds = bounds
        self._clock = clock
        self._tenants: dict[str, str] = {}
        """Of batches that are not over: whose they are does not change."""

    # Files

    def add_file(
        self, tenant: str, filename: str, purpose: str, content: IO[bytes], keep_s: int | None = None
    ) -> dict[str, object]:
        """Keep a file.

        Raises:
            InvalidRequest: the tenant has as many, or as much, as it may.
        """
        content.seek(0, os.SEEK_END)
        size = content.tell()
        content.seek(0)
        self._check_room(tenant, size)
        file_id = f"file-{uuid.uuid4().hex}"
        self.place.keep(_data(tenant, file_id), content)
        return self._describe(tenant, file_id, filename, purpose, size, keep_s)

    def _describe(
        self, tenant: str, file_id: str, filename: str, purpose: str, size: int, keep_s: int | None
    ) -> dict[str, object]:
        now = self._clock()
        tree = {
            "id": file_id,
            "object": "file",
            "bytes": size,
            "created_at": int(now),
            "expires_at": int(now) + (KEEP_S if keep_s is None else keep_s),
            "filename": filename[:255],
            "purpose": purpose,
            "status": "processed",
            "_order": now,
        }
        self._write(_about(tenant, file_id), tree)
        return _shown(tree)

    def file(self, tenant: str, file_id: str) -> dict[str, object]:
        """What is known of a file.

        Raises:
            NotFound: the tenant has none of that id.
        """
        tree = self._read(_about(tenant, file_id)) if FILE_ID.fullmatch(file_id) else None
        if tree is None or tree["expires_at"] <= self._clock():
            raise _no_file(file_id)
        return _shown(tree)

    def content(self, tenant: str, file_id: str) -> Streamed:
        """A file's content.

        Raises:
            NotFound: the tenant has none of that id.
        """
        self.file(tenant, file_id)
        try:
            return self.place.content(_data(tenant, file_id))
        except FileNotFoundError:
            raise _no_file(file_id) from None

    def delete_file(self, tenant: str, file_id: str) -> None:
        """Forget a file. A batch that works on it goes on: it has a copy of its own.

        Raises:
            NotFound: the tenant has none of that id.
        """
        self.file(tenant, file_id)
        self.place.remove(_about(tenant, file_id), _data(tenant, file_id))

    def list_files(self, tenant: str) -> list[dict[str, object]]:
        """All files of a tenant, the newest first."""
        now = self._clock()
        keys = [each.key for each in self.place.entries(_files(tenant)) if each.key.endswith(".json")]
        return [_shown(tree) for tree in _newest_first(self._trees(keys)) if tree["expires_at"] > now]

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
        source: str = wanted["input_file_id"]
        self.file(owner.tenant, source)
        self._check_room(owner.tenant, 0)
        if len(self._batch_keys(owner.tenant)) >= self.bounds.files:
            raise InvalidRequest(
                f"there are {self.bounds.files} batches already, as many as are kept (--batch-max-files)"
            )
        now = self._clock()
        batch_id = f"batch_{uuid.uuid4().hex}"
        key = _batch(owner.tenant, batch_id)
        try:
            self.place.copy(_data(owner.tenant, source), f"{key}/{INPUT}")
        except FileNotFoundError:
            raise _no_file(source) from None
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
        self._write(f"{key}/batch.json", tree)
        self._write(f"active/{batch_id}", {"tenant": owner.tenant})
        return _batch_shown(tree)

    def batch(self, tenant: str, batch_id: str) -> dict[str, object]:
        """A batch, as its client sees it now.

        Raises:
            NotFound: the tenant has none of that id.
        """
        key = _batch(tenant, batch_id)
        tree = self._read(f"{key}/batch.json") if BATCH_ID.fullmatch(batch_id) else None
        if tree is None:
            raise NotFound(f"there is no batch {batch_id[:64]!r}", field="id")
        return _batch_shown(self._with_cancel(key, tree))

    def list_batches(self, tenant: str) -> list[dict[str, object]]:
        """All batches of a tenant, the newest first."""
        found = self._trees(self._batch_keys(tenant))
        return [_batch_shown(self._with_cancel(_batch(tenant, tree["id"]), tree)) for tree in _newest_first(found)]

    def cancel(self, tenant: str, batch_id: str) -> dict[str, object]:
        """Have a batch cancelled by whoever works on it.

        Raises:
            NotFound: the tenant has none of that id.
            InvalidRequest: it is over.
        """
        found = self.batch(tenant, batch_id)
        if found["status"] in OVER or found["status"] == "finalizing":
            raise InvalidRequest(f"the batch is {found['status']} and can't be cancelled any more", field="id")
        key = f"{_batch(tenant, batch_id)}/cancel"
        if self.place.read(key) is None:
            self._write(key, {"at": int(self._clock())})
        return self.batch(tenant, batch_id)

    def active(self) -> Iterator[tuple[str, str]]:
        """(tenant, id) of all batches that are not over, of all tenants, the oldest first."""
        found = [
            (entry.changed_at, entry.key.rpartition("/")[2])
            for entry in self.place.entries("active/")
            if BATCH_ID.fullmatch(entry.key.rpartition("/")[2])
        ]
        known = {batch_id: self._tenants.get(batch_id) for _, batch_id in found}
        new = [batch_id for batch_id, tenant in known.items() if tenant is None]
        for batch_id, data in zip(new, self.place.read_all(f"active/{each}" for each in new), strict=True):
            tree = _tree(data)
            known[batch_id] = None if tree is None else tree["tenant"]
        self._tenants = {batch_id: tenant for batch_id, tenant in known.items() if tenant is not None}
        for _, batch_id in sorted(found):
            if (tenant := self._tenants.get(batch_id)) is not None:
                yield tenant, batch_id

    def take(self, tenant: str, batch_id: str) -> Taken | None:
        """Take up a batch; None where another process works on it, or it is over."""
        key = _batch(tenant, batch_id)
        desk = self.place.desk(key)
        if desk is None:
            return None
        try:
            tree = _tree(desk.read())
        except BaseException:
            desk.release()
            raise
        if tree is None or tree["status"] in OVER:
            self.place.remove(f"active/{batch_id}")
            desk.release()
            return None
        return Taken(self, tenant, desk, tree)

    def sweep(self) -> None:
        """Remove what has expired."""
        now = self._clock()
        kept: dict[str, list[Entry]] = {}
        """What belongs together, by what its keys begin with: a file, or a batch."""
        for entry in self.place.entries("tenants/"):
            if entry.key.count("/") >= 3:
                kept.setdefault(_whole(entry.key), []).append(entry)
        batches = [f"{name}/batch.json" for name in kept if "/batches/" in name]
        files = [f"{name}.json" for name in kept if "/files/" in name]
        for name, data in zip(batches, self.place.read_all(batches), strict=True):
            tree = _tree(data)
            if tree is not None and tree["status"] in OVER and tree["created_at"] + 2 * KEEP_S <= now:
                self.place.remove(*(entry.key for entry in kept[name.removesuffix("/batch.json")]))
        for name, data in zip(files, self.place.read_all(files), strict=True):
            tree, entries = _tree(data), kept[name.removesuffix(".json")]
            # Without a description, it is what an upload left behind that a crash ended.
            lost = data is None and all(entry.changed_at + 86_400 <= now for entry in entries)
            if lost or (tree is not None and tree["expires_at"] <= now):
                self.place.remove(*(entry.key for entry in entries))

    def now(self) -> float:
        """Seconds of the wall clock."""
        return self._clock()

    def move_results(self, taken: Taken, name: str, file_id: str, keep_s: int | None) -> str | None:
        """Make a file of a batch's results; its id, or None where there are none. Again, it does the same."""
        size = taken.desk.hand_in(name, _data(taken.tenant, file_id))
        if size is None:
            return None
        if self._read(_about(taken.tenant, file_id)) is None:
            called = f"{taken.batch_id}_{name}"
            self._describe(taken.tenant, file_id, called, "batch_output", size, keep_s)
        return file_id

    def _check_room(self, tenant: str, size: int) -> None:
        kept = [each.size for each in self.place.entries(_files(tenant)) if each.key.endswith(".data")]
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

    def _batch_keys(self, tenant: str) -> list[str]:
        entries = self.place.entries(f"tenants/{tenant}/batches/")
        return [each.key for each in entries if each.key.endswith("/batch.json")]

    def _with_cancel(self, key: str, tree: Tree) -> Tree:
        """A batch whose client has cancelled it, and whose worker has not seen that yet."""
        if tree["status"] in OVER or tree["status"] == "finalizing":
            return tree
        mark = self._read(f"{key}/cancel")
        return tree if mark is None else {**tree, "status": "cancelling", "cancelling_at": mark["at"]}

    def _read(self, key: str) -> Tree | None:
        return _tree(self.place.read(key))

    def _trees(self, keys: Iterable[str]) -> list[Tree]:
        found = map(_tree, self.place.read_all(keys))
        return [tree for tree in found if tree is not None]

    def _write(self, key: str, tree: Mapping[str, object]) -> None:
        self.place.write(key, json.dumps(tree).encode())


class Taken:
    """A batch that this process works on, until it is released.

    Args:
        store: it is of.
        tenant: it is of.
        desk: its files on a disk.
        tree: `batch.json`.
    """

    def __init__(self, store: BatchStore, tenant: str, desk: Desk, tree: Tree) -> None:
        self.store, self.tenant, self.desk, self.tree = store, tenant, desk, tree
        self.batch_id: str = tree["id"]
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
    def source(self) -> Path:
        """Its requests, once they were recalled."""
        return self.desk.folder / INPUT

    @property
    def cancelled(self) -> bool:
        """Whether its client wants it ended."""
        return self.store.place.read(f"{_batch(self.tenant, self.batch_id)}/cancel") is not None

    def set(self, **fields: object) -> None:
        """Change what is known of it."""
        self.tree = {**self.tree, **fields, **self.counts.shown()}
        self.desk.write(json.dumps(self.tree).encode())

    def recall(self) -> None:
        """Read which requests have an answer. What a crash left half written is cut off."""
        self.counts = Counts(total=self.counts.total)
        self.done = set()
        self.desk.fetch()
        for name in (OUTPUT, ERRORS):
            for answer in whole_lines(self.desk.folder / name):
                self.done.add(answer["custom_id"])
                self.counts.add(answer)

    def append(self, answers: list[Tree]) -> None:
        """Keep answers; when this returns they outlive this process and its machine."""
        lines: dict[str, list[bytes]] = {OUTPUT: [], ERRORS: []}
        for answer in answers:
            good = (answer["response"] or {}).get("status_code") == 200
            lines[OUTPUT if good else ERRORS].append(json.dumps(answer).encode() + b"\n")
        for name, found in lines.items():
            if found:
                self.desk.append(name, b"".join(found))
        for answer in answers:
            self.done.add(answer["custom_id"])
            self.counts.add(answer)

    def finish(self, status: str, at: str, **fields: object) -> None:
        """Make files of the results, and end the batch."""
        store, keep_s = self.store, self.tree["_keep_s"]
        self.set(status="finalizing", finalizing_at=int(store.now()), _end=[status, at])
        output = store.move_results(self, OUTPUT, self.tree["_output"], keep_s)
        errors = store.move_results(self, ERRORS, self.tree["_errors"], keep_s)
        self.end(status, at, output_file_id=output, error_file_id=errors, **fields)

    def end(self, status: str, at: str, **fields: object) -> None:
        """End the batch; `at` names the field that says when."""
        self.set(status=status, **{at: int(self.store.now())}, **fields)
        self.desk.clear()
        self.store.place.remove(f"active/{self.batch_id}")

    def release(self) -> None:
        """Let others take it up."""
        self.desk.release()


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


def _batch_shown(tree: Mapping[str, object]) -> dict[str, object]:
    """All of OpenAI's fields, as its SDK has them."""
    times = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
    empty = dict.fromkeys(("errors", "model", "output_file_id", "error_file_id", *(f"{each}_at" for each in times)))
    return {**empty, **_shown(tree)}


def _shown(tree: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in tree.items() if not name.startswith(_HIDDEN)}


def _newest_first(trees: list[Tree]) -> list[Tree]:
    return sorted(trees, key=lambda tree: (tree["_order"], tree["id"]), reverse=True)


def _files(tenant: str) -> str:
    return f"tenants/{tenant}/files/"


def _about(tenant: str, file_id: str) -> str:
    return f"{_files(tenant)}{file_id}.json"


def _data(tenant: str, file_id: str) -> str:
    return f"{_files(tenant)}{file_id}.data"


def _batch(tenant: str, batch_id: str) -> str:
    return f"tenants/{tenant}/batches/{batch_id}"


def _whole(key: str) -> str:
    """What the keys of a file, or of a batch, begin with: `tenants/NAME/files/ID` or `tenants/NAME/batches/ID`."""
    top, tenant, kind, name = key.split("/")[:4]
    return f"{top}/{tenant}/{kind}/{name.partition('.')[0]}"


def _no_file(file_id: str) -> NotFound:
    return NotFound(f"there is no file {file_id[:64]!r}", field="id")


def _tree(data: bytes | None) -> Tree | None:
    try:
        tree = None if data is None else json.loads(data)
    except ValueError:
        return None
    return tree if isinstance(tree, dict) else None
