"""Files and batches in a bucket of S3, or of another store that speaks it and has its conditional writes.

A bucket can neither append nor lock, so:

- Answers are kept in pieces, `output.jsonl/TURN-NUMBER`, each replaced as a whole while it grows.
- A batch's lock is an object that its holder renews, by writes on the condition that it is still the holder's
  (https://docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-writes.html). Who has seen it unchanged for
  `LEASE_S`, by a clock of its own, may take it over; who could not renew it for less than that writes no more. Each
  turn has its number in the keys of its pieces, and `batch.json` is replaced on a condition too, so what a process
  writes that was held up for long is either refused or told from what stands.

Address, region, credentials and certificates are boto3's own: `AWS_ENDPOINT_URL_S3`, `AWS_REGION`, a role of the pod's
service account, `AWS_ACCESS_KEY_ID`, `AWS_CA_BUNDLE` and so on.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, TypeAlias
from urllib.parse import urlsplit

from kserve_vllm.core.errors import ConfigError, Unavailable
from kserve_vllm.protocols.batch.places import ERRORS, INPUT, LOCK, OUTPUT, Desk, Entry, Streamed

log = logging.getLogger(__name__)

LEASE_S = 30.0
_RENEW_S = 5.0
_SURE_S = 20.0
"""How long after its last renewal a holder still writes: less than `LEASE_S` by what a write may take."""
_PIECE = 1 << 20
_AT_ONCE = 16
_RETRY_AFTER_S = 10


class Lost(RuntimeError):
    """Another process may have taken the batch up, so nothing more is written for it here."""


Answer: TypeAlias = dict[str, Any]
"""Of boto3: a tree of the field names of S3's API."""


class Body(AbstractContextManager["Body"], Protocol):
    """A content that is read from the connection that it comes over; closed at its end."""

    def read(self) -> bytes:
        """All of it."""

    def iter_chunks(self, chunk_size: int) -> Iterator[bytes]:
        """A piece after the other."""


class Paginator(Protocol):
    """A list that comes in several answers."""

    def paginate(self, **fields: object) -> Iterable[Answer]:
        """The answers."""


class BucketClient(Protocol):
    """What is used of boto3's client."""

    def get_object(self, **fields: object) -> Answer:
        """https://docs.aws.amazon.com/AmazonS3/latest/API/API_GetObject.html"""

    def put_object(self, **fields: object) -> Answer:
        """https://docs.aws.amazon.com/AmazonS3/latest/API/API_PutObject.html"""

    def copy_object(self, **fields: object) -> Answer:
        """https://docs.aws.amazon.com/AmazonS3/latest/API/API_CopyObject.html"""

    def delete_object(self, **fields: object) -> Answer:
        """https://docs.aws.amazon.com/AmazonS3/latest/API/API_DeleteObject.html"""

    def get_paginator(self, name: str) -> Paginator:
        """Of a method that lists."""

    def upload_fileobj(self, content: IO[bytes], bucket: str, key: str) -> None:
        """In several parts where it is large."""


class Bucket:
    """A part of a bucket. See `places.Place`.

    Args:
        url: `s3://BUCKET` or `s3://BUCKET/PREFIX`.
        clock: seconds that only ever grow, for leases.

    Raises:
        ConfigError: it can't be reached, read or written, or it does not hold to conditions of writes.
    """

    look_every_s = 10.0
    watch_every_s = 5.0

    def __init__(self, url: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._bucket, self._prefix = _parsed(url)
        self.clock = clock
        self._client = _client(url)
        self._pool = ThreadPoolExecutor(_AT_ONCE, "bucket")
        self.seen: dict[str, tuple[str, float]] = {}
        """Locks of others: the version that was seen last, and when it was seen first."""
        self._check(url)

    def read(self, key: str) -> bytes | None:
        """See `Place`."""
        found = self.version(key)
        return None if found is None else found[0]

    def version(self, key: str) -> tuple[bytes, str] | None:
        """What is there, and the tag of this version of it; None if nothing is."""
        with _told():
            try:
                answer = self._client.get_object(**self._at(key))
            except _client_error() as error:
                if _status(error) == 404:
                    return None
                raise
            with answer["Body"] as body:
                return body.read(), str(answer["ETag"])

    def read_all(self, keys: Iterable[str]) -> list[bytes | None]:
        """See `Place`; several at once."""
        return list(self._pool.map(self.read, keys))

    def write(self, key: str, data: bytes) -> None:
        """See `Place`."""
        with _told():
            self._client.put_object(**self._at(key), Body=data)

    def write_if(self, key: str, data: bytes, tag: str | None) -> str | None:
        """Write where this version is still there, or with None where nothing is; the new tag, or None if it is not."""
        condition = {"IfNoneMatch": "*"} if tag is None else {"IfMatch": tag}
        with _told():
            try:
                return str(self._client.put_object(**self._at(key), Body=data, **condition)["ETag"])
            except _client_error() as error:
                if _status(error) not in (404, 409, 412):
                    raise
        # It may have been written at once, and refused when it was sent again because the answer was lost.
        found = self.version(key)
        return found[1] if found is not None and found[0] == data else None

    def keep(self, key: str, content: IO[bytes]) -> None:
        """See `Place`."""
        with _told():
            self._client.upload_fileobj(content, self._bucket, self._prefix + key)

    def content(self, key: str) -> Streamed:
        """See `Place`."""
        with _told():
            try:
                answer = self._client.get_object(**self._at(key))
            except _client_error() as error:
                if _status(error) == 404:
                    raise FileNotFoundError(key) from None
                raise
        return Streamed(int(answer["ContentLength"]), _pieces(answer["Body"]))

    def copy(self, source: str, target: str) -> None:
        """See `Place`; within the store."""
        with _told():
            try:
                self._client.copy_object(**self._at(target), CopySource=self._at(source))
            except _client_error() as error:
                if _status(error) == 404:
                    raise FileNotFoundError(source) from None
                raise

    def entries(self, prefix: str) -> list[Entry]:
        """See `Place`."""
        with _told():
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=self._prefix + prefix
            )
            return [
                Entry(each["Key"][len(self._prefix) :], int(each["Size"]), each["LastModified"].timestamp())
                for page in pages
                for each in page.get("Contents", ())
            ]

    def remove(self, *keys: str) -> None:
        """See `Place`; several at once."""

        def one(key: str) -> None:
            with _told():
                self._client.delete_object(**self._at(key))

        list(self._pool.map(one, keys))

    def desk(self, key: str) -> Desk | None:
        """See `Place`."""
        lease = _Lease.of(self, f"{key}/{LOCK}")
        return None if lease is None else _BucketDesk(self, key, lease)

    def _at(self, key: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._prefix + key}

    def _check(self, url: str) -> None:
        """Conditions of writes must hold, or two replicas would work on one batch."""
        key = f"probe/{uuid.uuid4().hex}"
        try:
            first = self.write_if(key, b"first", None)
            try:
                good = first is not None and self.write_if(key, b"second", None) is None
                second = self.write_if(key, b"second", first) if good else None
                good = second is not None and self.write_if(key, b"third", first) is None
                self.entries("probe/")
            finally:
                self.remove(key)
        except Unavailable as error:
            raise ConfigError(f"--batch-dir {url} can't be used: {_reason(error.__cause__)}") from error.__cause__
        if not good:
            raise ConfigError(
                f"--batch-dir {url}: this store does not hold to conditions of writes (If-None-Match, If-Match), "
                "without which two replicas could work on one batch"
            )


class _Lease:
    """A lock that is held by renewing it.

    Args:
        place: it is in.
        key: of it.
        turn: how often it was taken before.
        holder: who holds it: made up for each turn.
        tag: of the version that says so.
        at: when it was asked for, by the place's clock.
    """

    def __init__(self, place: Bucket, key: str, turn: int, holder: str, tag: str, at: float) -> None:
        self.turn = turn
        self._place, self._key, self._holder = place, key, holder
        self._tag, self._renewed_at, self._renewals = tag, at, 0
        self._lost = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="batch-lease", daemon=True)
        self._thread.start()

    @classmethod
    def of(cls, place: Bucket, key: str) -> _Lease | None:
        """Take the lock; None where another process has it."""
        found, now = place.version(key), place.clock()
        turn, tag = 0, None
        if found is not None:
            tree, tag = json.loads(found[0]), found[1]
            turn = tree["turn"]
            if tree["holder"] is not None:
                seen = place.seen.get(key)
                if seen is None or seen[0] != tag:
                    place.seen[key] = tag, now
                    return None
                if now - seen[1] < LEASE_S:
                    return None
        holder, now = uuid.uuid4().hex, place.clock()
        place.seen.pop(key, None)
        made = place.write_if(key, _lock(holder, turn + 1), tag)
        return None if made is None else cls(place, key, turn + 1, holder, made, now)

    def check(self) -> None:
        """Make sure that it is held.

        Raises:
            Lost: it may not be.
        """
        if self._lost or self._place.clock() - self._renewed_at > _SURE_S:
            raise Lost("the batch's lock could not be renewed; another process may work on it")

    def release(self) -> None:
        """Let another process take it at once."""
        self._ended.set()
        self._thread.join()
        if not self._lost:
            self._place.write_if(self._key, _lock(None, self.turn), self._tag)

    def _renew(self) -> None:
        while not self._ended.wait(_RENEW_S):
            now, self._renewals = self._place.clock(), self._renewals + 1
            try:
                tag = self._place.write_if(self._key, _lock(self._holder, self.turn, self._renewals), self._tag)
            except Exception as error:
                log.warning("a batch's lock can't be renewed for now: %s", error)
                continue
            if tag is None:
                self._lost = True
                return
            self._tag, self._renewed_at = tag, now


def _lock(holder: str | None, turn: int, renewals: int = 0) -> bytes:
    return json.dumps({"holder": holder, "turn": turn, "renewals": renewals}).encode()


@dataclass
class _Piece:
    """Answers in one object, which is replaced as they get more."""

    key: str
    data: bytearray


class _BucketDesk:
    """A folder of this process alone, and the pieces of answers in the bucket. See `places.Desk`.

    Args:
        place: it is in.
        key: of the batch.
        lease: that it is held by.
    """

    def __init__(self, place: Bucket, key: str, lease: _Lease) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="kserve-vllm-batch-"))
        self._place, self._key, self._lease = place, key, lease
        self._tag: str | None = None
        self._fetched = False
        self._pieces: dict[str, _Piece] = {}
        self._begun = 0

    def read(self) -> bytes | None:
        """See `Desk`."""
        found = self._place.version(f"{self._key}/batch.json")
        self._tag = None if found is None else found[1]
        return None if found is None else found[0]

    def write(self, data: bytes) -> None:
        """See `Desk`.

        Raises:
            Lost: someone else has written it.
        """
        self._lease.check()
        self._tag = self._place.write_if(f"{self._key}/batch.json", data, self._tag)
        if self._tag is None:
            raise Lost("another process has taken the batch up")

    def fetch(self) -> None:
        """See `Desk`. An answer that two turns have brought stands once: the later turn had not seen the earlier's."""
        for name in (INPUT, OUTPUT, ERRORS):
            (self.folder / name).unlink(missing_ok=True)
        with suppress(FileNotFoundError), (self.folder / INPUT).open("xb") as file:
            for piece in self._place.content(f"{self._key}/{INPUT}").pieces:
                file.write(piece)
        have: set[str] = set()
        for name in (OUTPUT, ERRORS):
            with (self.folder / name).open("xb") as file:
                for key in self._kept(name):  # one at a time: all of them may be larger than the memory
                    for line in (self._place.read(key) or b"").split(b"\n"):
                        if not line:
                            continue
                        custom_id = json.loads(line)["custom_id"]
                        if custom_id not in have:
                            have.add(custom_id)
                            file.write(line + b"\n")
        self._fetched = True

    def append(self, name: str, lines: bytes) -> None:
        """See `Desk`."""
        self._lease.check()
        piece = self._pieces.get(name)
        if piece is None or len(piece.data) >= _PIECE:
            self._begun += 1
            piece = _Piece(f"{self._key}/{name}/{self._lease.turn:08}-{self._begun:08}", bytearray())
            self._pieces[name] = piece
        piece.data += lines
        self._place.write(piece.key, bytes(piece.data))
        with (self.folder / name).open("ab") as file:
            file.write(lines)

    def hand_in(self, name: str, key: str) -> int | None:
        """See `Desk`: the file is written anew from what is here."""
        if not self._fetched:
            self.fetch()
        path = self.folder / name
        size = path.stat().st_size if path.exists() else 0
        if not size:
            return None
        self._lease.check()
        with path.open("rb") as file:
            self._place.keep(key, file)
        return size

    def clear(self) -> None:
        """See `Desk`."""
        self._place.remove(f"{self._key}/{INPUT}", *self._kept(OUTPUT), *self._kept(ERRORS))

    def release(self) -> None:
        """See `Desk`. Where the store is away, others wait until the lock has not been renewed for long enough."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(Unavailable):
            self._lease.release()

    def _kept(self, name: str) -> list[str]:
        return sorted(each.key for each in self._place.entries(f"{self._key}/{name}/"))


def _parsed(url: str) -> tuple[str, str]:
    """Bucket, and what all keys in it begin with."""
    parts = urlsplit(url)
    if "@" in parts.netloc:
        raise ConfigError("--batch-dir s3://...: credentials are not part of the URL; boto3 takes them from AWS_*")
    if not parts.netloc or parts.query or parts.fragment:
        raise ConfigError(f"--batch-dir {url}: an object store is named as s3://BUCKET or s3://BUCKET/PREFIX")
    prefix = parts.path.strip("/")
    return parts.netloc, f"{prefix}/" if prefix else ""


def _client(url: str) -> BucketClient:
    try:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError
    except ImportError as error:
        raise ConfigError(f"--batch-dir {url} needs boto3: pip install 'kserve-vllm[s3]'") from error
    # Their debug lines hold headers and bodies as they are sent, web identity tokens among them.
    for name in ("boto3", "botocore", "s3transfer", "urllib3"):
        logging.getLogger(name).setLevel(max(logging.INFO, logging.getLogger(name).level))
    config = Config(
        connect_timeout=5,
        read_timeout=15,
        retries={"mode": "standard", "total_max_attempts": 3},
        max_pool_connections=2 * _AT_ONCE,
        # Checksums at the end of a body are not understood by many stores beside Amazon's.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    try:
        # S3 has addresses without a region; other stores ask for none, and boto3 wants one to sign with.
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        made: BucketClient = boto3.session.Session().client("s3", region_name=region, config=config)
    except (BotoCoreError, ValueError) as error:
        raise ConfigError(f"--batch-dir {url} can't be used: {_reason(error)}") from error
    return made


def _client_error() -> type[Exception]:
    """The class of errors that the store answers; boto3 is there once there is a client."""
    from botocore.exceptions import ClientError

    found: type[Exception] = ClientError
    return found


@contextmanager
def _told() -> Iterator[None]:
    """What the store does not do, as an error for clients: 503, to be tried again."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (Boto3Error, BotoCoreError, ClientError) as error:
        log.warning("the object store of --batch-dir: %s", _reason(error))
        raise Unavailable(
            "files and batches can't be reached for now: their object store does not answer as it should",
            retry_after_s=_RETRY_AFTER_S,
            reason="object_store",
        ) from error


def _status(error: Exception) -> int:
    answer: Answer = getattr(error, "response", {})
    return int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _reason(error: BaseException | None) -> str:
    """Of boto3, in a line: an operation and a code, or an address; never a header, body or key."""
    return " ".join(str(error).split())[:300]


def _pieces(body: Body) -> Iterator[bytes]:
    with body, _told():
        yield from body.iter_chunks(1 << 20)
