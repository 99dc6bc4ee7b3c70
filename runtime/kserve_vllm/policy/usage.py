"""One JSON record per request: who used how much of which model.

A record is handed over in the event loop and costs a few microseconds there; a thread of its own writes. Records wait
in a buffer that is bounded in bytes while a disk is full or a receiver is away, and are tried again until they are
through. What does not fit is lost, counted and said in the log. A receiver may get a batch twice, when its answer got
lost; `request_id` tells.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, Protocol

import orjson
import structlog

from kserve_vllm.core.errors import ConfigError

log = logging.getLogger(__name__)

Count = Literal["sent", "dropped", "failed"]

BUFFER_BYTES = 16 << 20
_BATCH_BYTES = 256 << 10
_REPORT_EVERY_S = 60.0
_RETRY_FIRST_S = 0.2
_RETRY_MOST_S = 10.0
_RETRY_CLOSING_S = 0.2
_HTTP_TIMEOUT_S = 10.0
_FORMS = (
    "--usage-sink must be one of: log (a log line of the logger kserve_vllm.usage), file:PATH (JSON lines are appended "
    "to the file), or an http:// or https:// URL (JSON lines are posted to it)."
)
# The receiver has read the batch and won't have it; it won't have it the next time either.
_REFUSING = frozenset({400, 413, 415, 422})


def timestamp(at: float) -> str:
    """Seconds since 1970 as RFC 3339 in UTC with milliseconds, such as `2026-01-31T12:00:00.250Z`."""
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").removesuffix("+00:00") + "Z"


@dataclass(frozen=True)
class UsageRecord:
    """What one request used.

    Attributes:
        time: when it came in; RFC 3339, UTC; see `timestamp`.
        request_id: as in the answer's header and in the log.
        tenant, key_id: who asked; `key_id` is the key's name, never the key.
        model, adapter: the served base model, and the adapter or None.
        protocol, endpoint: as in metrics.
        outcome: as in metrics, such as `ok` or `rejected`.
        status: HTTP status or gRPC status name.
        prompt_tokens, cached_tokens, output_tokens: sums over the request's sequences; `cached_tokens` are those of
            the prompt that the prefix cache held.
        duration_s, ttft_s: seconds to the end and to the first token.
        priority: class in the queue.
        cache: `hit`, `miss` or `bypass` of the response cache, or None where there is none.
    """

    time: str
    request_id: str
    tenant: str
    key_id: str | None
    model: str | None
    adapter: str | None
    protocol: str
    endpoint: str
    outcome: str
    status: int | str | None
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    duration_s: float
    ttft_s: float | None
    priority: str | None
    cache: str | None


class _Refused(Exception):
    """The receiver won't ever take this batch."""


class _Sink(Protocol):
    """Where batches go. Only the writer's thread calls it, except for its construction."""

    name: str
    """For the log; no secret is in it."""
    gather_s: float
    """How long records may wait for others to go with them."""

    def write(self, batch: bytes, timeout_s: float) -> None:
        """Write whole lines; may take longer than `timeout_s` by little.

        Called again with the same bytes after any error but `_Refused`.
        """

    def close(self) -> None:
        """Nothing is written after this."""


class _File:
    """Appends to a file, and to its successor when the file was moved away or removed."""

    gather_s = 0.1

    def __init__(self, path: str) -> None:
        self.name = f"file {path}"
        self._path = path
        self._written = 0
        try:
            self._file = self._open()
        except OSError as error:
            raise ConfigError(f"--usage-sink: {path} can't be opened to append to it: {error.strerror}.") from error

    def write(self, batch: bytes, timeout_s: float) -> None:
        if self._moved():
            file = self._open()
            os.close(self._file)
            self._file = file
            # A line that was cut off in the old file stands whole in the new one.
            self._written = batch.rfind(b"\n", 0, self._written) + 1
        while self._written < len(batch):
            self._written += os.write(self._file, memoryview(batch)[self._written :])
        self._written = 0

    def close(self) -> None:
        try:
            os.fsync(self._file)
        except OSError as error:
            # A pipe or a terminal has nothing to synchronize.
            if error.errno != errno.EINVAL:
                log.error("usage records may not have reached the disk: %s", error)
        finally:
            os.close(self._file)

    def _open(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)

    def _moved(self) -> bool:
        try:
            there = os.stat(self._path)
        except FileNotFoundError:
            return True
        here = os.fstat(self._file)
        return (there.st_dev, there.st_ino) != (here.st_dev, here.st_ino)


class _Http:
    """Posts JSON lines (`application/x-ndjson`); a name and password in the URL go as basic authentication."""

    gather_s = 1.0

    def __init__(self, url: str) -> None:
        # Here, since it takes a while to import and most servers have no such sink.
        import httpx

        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL:
            # Its words may have a part of a password in them that was taken for a port.
            raise ConfigError(
                f"--usage-sink: the URL can't be read; a name or password needs %-escapes for / # ? : @. {_FORMS}"
            ) from None
        if not parsed.host:
            raise ConfigError(f"--usage-sink: the URL names no host. {_FORMS}")
        self.name = f"{parsed.scheme}://{parsed.netloc.decode()}"
        self._url = parsed
        self._client = httpx.Client(headers={"content-type": "application/x-ndjson"})

    def write(self, batch: bytes, timeout_s: float) -> None:
        answer = self._client.post(self._url, content=batch, timeout=timeout_s)
        if answer.status_code in _REFUSING:
            raise _Refused(f"the receiver answered {answer.status_code}")
        if not answer.is_success:
            raise OSError(f"the receiver answered {answer.status_code}")

    def close(self) -> None:
        self._client.close()


def _open_sink(spelling: str) -> _Sink:
    kind, colon, rest = spelling.partition(":")
    if kind == "file" and rest and (not rest.startswith("//") or rest.startswith("///")):
        return _File(os.path.abspath(rest))
    if kind.lower() in ("http", "https") and colon:
        return _Http(spelling)
    # Not the rest: it may be a URL with a password in it.
    raise ConfigError(f"{_FORMS} This is none of them: {kind}{colon}{'...' if rest else ''}")


def _nobody(kind: Count, records: int) -> None:
    """Nobody counts along."""


class Usage:
    """Takes records and sees that they arrive.

    Args:
        sink: `log`, `file:PATH`, or an `http://` or `https://` URL.
        on_count: called with `sent` or `dropped` and a number of records, or with `failed` and 1; also from the
            writer's thread.
        buffer_bytes: most bytes of records that wait to be written.

    Attributes:
        sent: records that were written.
        dropped: records that are lost.
        failed: attempts to write that failed and were, or will be, made again.

    Raises:
        ConfigError: the sink is spelled wrong, or its file can't be opened.
    """

    def __init__(
        self, sink: str, on_count: Callable[[Count, int], None] = _nobody, buffer_bytes: int = BUFFER_BYTES
    ) -> None:
        self._to_log: structlog.stdlib.BoundLogger | None = (
            structlog.stdlib.get_logger("kserve_vllm.usage") if sink == "log" else None
        )
        self._sink = None if sink == "log" else _open_sink(sink)
        self._on_count = on_count
        self._most = buffer_bytes
        self.sent = 0
        self.dropped = 0
        self.failed = 0
        self._lock = threading.Lock()
        """Held for a few instructions at a time, never while something is written."""
        self._lines: deque[bytes] = deque()
        self._in_hand = 0
        """Records that the writer has taken and not yet written."""
        self._bytes = 0
        """Of the lines and of what the writer has in hand."""
        self._closed = False
        self._deadline: float | None = None
        self._thread: threading.Thread | None = None
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._given_up = threading.Event()
        self._unreported = 0
        self._why = ""
        self._report_at = 0.0
        self._trouble_at: float | None = None

    @property
    def waiting(self) -> int:
        """Records that are not yet written."""
        return len(self._lines) + self._in_hand

    def record(self, record: UsageRecord) -> None:
        """Hand over a record. Never waits and never raises."""
        try:
            if self._to_log is not None:
                self._to_log.info("usage", **record.__dict__)
                self._count("sent", 1)
                return
            line = orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE)
        except Exception as error:
            self._lose(1, f"{type(error).__name__}: {error}")
            return
        with self._lock:
            fits = not self._closed and self._bytes + len(line) <= self._most
            if fits:
                self._lines.append(line)
                self._bytes += len(line)
        if not fits:
            self._lose(1, "they came after the end" if self._closed else "the buffer is full")
        elif not self._wake.is_set():
            self._wake.set()
            if self._thread is None:
                self._start()

    async def close(self, timeout_s: float) -> None:
        """Write everything that waits, for up to `timeout_s` seconds; what is left then is lost, counted and logged."""
        self._deadline = time.monotonic() + timeout_s
        with self._lock:
            self._closed = True
        self._closing.set()
        self._wake.set()
        if self._sink is not None and self._thread is None:
            if self._lines:
                self._start()
            else:
                self._sink.close()
                self._sink = None
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, timeout_s)
        with self._lock:
            lost = len(self._lines) + self._in_hand
            self._lines.clear()
            self._in_hand = self._bytes = 0
            self._given_up.set()
        if lost:
            self._lose(lost, "they could not be written before the end")
        self._report(now=True)

    def _start(self) -> None:
        # A daemon: a receiver that hangs must not keep the process.
        thread = threading.Thread(target=self._run, name="usage", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            # Out of threads for now; the records wait, and the next one tries again.
            self._wake.clear()
            log.warning("the usage writer can't be started: %s", error)
            return
        self._thread = thread

    def _run(self) -> None:
        """The writer's thread."""
        assert self._sink is not None
        while True:
            self._wake.wait(_REPORT_EVERY_S if self._unreported else None)
            self._closing.wait(self._sink.gather_s)
            self._wake.clear()
            last = self._closing.is_set()
            while batch := self._take():
                self._deliver(self._sink, batch)
            self._report()
            if last or self._given_up.is_set():
                break
        self._sink.close()

    def _take(self) -> list[bytes]:
        """The oldest lines, up to the size of a batch, one at least if there are any."""
        with self._lock:
            batch: list[bytes] = []
            size = 0
            while self._lines and (not batch or size + len(self._lines[0]) <= _BATCH_BYTES):
                line = self._lines.popleft()
                batch.append(line)
                size += len(line)
            self._in_hand = len(batch)
        return batch

    def _deliver(self, sink: _Sink, batch: list[bytes]) -> None:
        """Write a batch, however long that takes; returns early only when `close` has given up."""
        data = b"".join(batch)
        pause_s = _RETRY_FIRST_S
        while not self._given_up.is_set():
            timeout_s = _HTTP_TIMEOUT_S
            if self._deadline is not None:
                timeout_s = max(0.05, min(timeout_s, self._deadline - time.monotonic()))
            try:
                sink.write(data, timeout_s)
            except _Refused as error:
                if self._put_down(data):
                    self._lose(len(batch), str(error))
                return
            except Exception as error:
                self._count("failed", 1)
                self._tell_trouble(sink, error)
                if self._closing.is_set():
                    self._given_up.wait(min(pause_s, _RETRY_CLOSING_S))
                else:
                    self._closing.wait(pause_s)
                pause_s = min(_RETRY_MOST_S, 2 * pause_s)
            else:
                if self._put_down(data):
                    self._count("sent", len(batch))
                if self._trouble_at is not None:
                    self._trouble_at = None
                    log.info("usage records go to %s again", sink.name)
                    self._report(now=True)
                return

    def _put_down(self, data: bytes) -> bool:
        """The batch in hand is dealt with. False if `close` has already counted it as lost."""
        with self._lock:
            if self._given_up.is_set():
                return False
            self._in_hand = 0
            self._bytes -= len(data)
            return True

    def _count(self, kind: Count, records: int) -> None:
        with self._lock:
            setattr(self, kind, getattr(self, kind) + records)
        try:
            self._on_count(kind, records)
        except Exception:
            log.exception("usage records can't be counted")

    def _tell_trouble(self, sink: _Sink, error: Exception) -> None:
        now = time.monotonic()
        if self._trouble_at is None or now >= self._trouble_at + _REPORT_EVERY_S:
            self._trouble_at = now
            log.warning(
                "usage records can't be written to %s, tried again until they can: %s: %s; %d wait",
                sink.name,
                type(error).__name__,
                error,
                self.waiting,
            )

    def _lose(self, records: int, why: str) -> None:
        self._count("dropped", records)
        with self._lock:
            self._unreported += records
            self._why = why
        self._report()

    def _report(self, now: bool = False) -> None:
        """Say what was lost since the last time, once a minute at most unless it has to be now."""
        at = time.monotonic()
        with self._lock:
            lost, why = self._unreported, self._why
            if not lost or (at < self._report_at and not now):
                return
            self._unreported = 0
            self._report_at = at + _REPORT_EVERY_S
        log.error("%d usage records are lost: %s (%d since the start)", lost, why, self.dropped)
