"""Works on batches: each line is a request like any other, with its owner's key, in the class `batch`.

A line goes through the same ASGI app as a client's request, so limits, queue, moderation, usage records and metrics
hold for it. It is told from a client's by its scope alone: whose it is stands there, instead of a key.

Live traffic goes first. While there is any, and for a moment after it, one line is worked on at a time, else
`concurrency` of them; lines have the queue's lowest class, and the engine's where it schedules by class. A line that is
turned away for now (429, 503) is tried again; a line that was being answered when the process ended is answered again
by who takes the batch up, and its answer is kept once.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from kserve_vllm.protocols.batch.store import BatchStore, Taken, Tree
from kserve_vllm.protocols.http import bounds
from kserve_vllm.protocols.http.middleware import OWNER

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message

log = logging.getLogger(__name__)

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
"""What a batch may ask for, where the model does it."""
_SWEEP_EVERY_S = 3600.0
AFTER_FAILURE_S = 30.0
_LONGEST = 20 << 20  # bytes of a line: as much JSON as a request may have (--max-json-mib)
_AT_ONCE = 4  # batches
_RETRY_MAX_S = 60.0
_ERRORS_SHOWN = 100
_AGAIN = (429, 503)
_TRIES = 3  # of what fails by a fault of ours
_POLL_S = 0.01
_CALM_S = 2.0
"""How long nobody else may have asked before more lines than one are begun."""


class Shown(Protocol):
    """What the runner tells of itself."""

    def show_batches(self, running: int, unfinished: int, in_flight: int) -> None:
        """How many batches there are, and how many of their requests are being answered."""

    def count_batch_line(self, outcome: str, count: int = 1) -> None:
        """A request of a batch is over."""


class Runner:
    """Takes up batches, one process each.

    Args:
        store: where they are.
        app: answers requests.
        in_flight: requests of all kinds that are being answered in this process.
        concurrency: most lines at once.
        shown: metrics.
    """

    def __init__(
        self, store: BatchStore, app: ASGIApp, in_flight: Callable[[], int], concurrency: int, shown: Shown
    ) -> None:
        self._store = store
        self._app = app
        self._in_flight = in_flight
        self.concurrency = concurrency
        """Most lines at once."""
        self._shown = shown
        self._lines = 0
        self._others_at = -_CALM_S
        self._changed = asyncio.Event()
        self._running: dict[str, asyncio.Task[None]] = {}
        self._later: dict[str, float] = {}
        self._unfinished = 0
        self._stopping = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin, in a task of the running loop."""
        self._task = asyncio.create_task(self._look())

    def wake(self) -> None:
        """There is a new batch, or one was cancelled."""
        self._changed.set()

    def show(self) -> None:
        """Set the metrics."""
        self._shown.show_batches(len(self._running), self._unfinished, self._lines)

    def stop(self) -> None:
        """Begin no more lines. Those in flight are answered, as any request is in a drain."""
        self._stopping.set()
        self._changed.set()

    async def close(self) -> None:
        """Give up what is in flight, and let others take the batches up."""
        self.stop()
        tasks = [*self._running.values(), *([self._task] if self._task is not None else [])]
        # What is answered is still to be written.
        if tasks:
            await asyncio.wait(tasks, timeout=2)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _look(self) -> None:
        swept = 0.0
        while not self._stopping.is_set():
            self._changed.clear()
            try:
                if time.monotonic() - swept > _SWEEP_EVERY_S or not swept:
                    swept = time.monotonic()
                    await asyncio.to_thread(self._store.sweep)
                await self._take_up()
            except Exception:
                log.exception("batches can't be looked at; trying again")
            try:
                await asyncio.wait_for(self._changed.wait(), self._store.place.look_every_s)
            except TimeoutError:
                continue

    async def _take_up(self) -> None:
        found = await asyncio.to_thread(lambda: list(self._store.active()))
        self._unfinished = len(found)
        now = time.monotonic()
        for tenant, batch_id in found:
            if len(self._running) >= _AT_ONCE or self._stopping.is_set():
                return
            if batch_id in self._running or self._later.get(batch_id, 0.0) > now:
                continue
            taken = await asyncio.to_thread(self._store.take, tenant, batch_id)
            if taken is not None:
                self._running[batch_id] = asyncio.create_task(self._work(batch_id, taken))

    async def _work(self, batch_id: str, taken: Taken) -> None:
        try:
            await self._run(taken)
        except Exception:
            # A full disk, or one that is gone: the batch waits, and what was answered is kept.
            log.exception("batch %s stopped; it is taken up again in %g s", batch_id, AFTER_FAILURE_S)
            self._later[batch_id] = time.monotonic() + AFTER_FAILURE_S
        finally:
            await asyncio.to_thread(taken.release)
            self._running.pop(batch_id, None)
            if not self._stopping.is_set():
                self._changed.set()

    async def _run(self, taken: Taken) -> None:
        if taken.tree["status"] == "finalizing":
            await asyncio.to_thread(taken.finish, *taken.tree["_end"])
            return
        await asyncio.to_thread(taken.recall)
        source = taken.source
        if taken.tree["status"] == "validating":
            total, model, errors = await asyncio.to_thread(
                check_lines, source, taken.tree["endpoint"], self._store.bounds.lines
            )
            if errors:
                data = {"object": "list", "data": errors}
                await asyncio.to_thread(taken.end, "failed", "failed_at", errors=data)
                return
            taken.counts.total = total
            fields = {"status": "in_progress", "in_progress_at": int(self._store.now()), "model": model}
            await asyncio.to_thread(lambda: taken.set(**fields))
        await _Work(self, taken, source).run()

    # One line

    async def hold(self, ended: asyncio.Event) -> bool:
        """Wait until one more line may begin; False where it is not to begin any more."""
        while not (ended.is_set() or self._stopping.is_set()):
            now = time.monotonic()
            if self._in_flight() > self._lines:
                self._others_at = now
            if self._lines < (1 if now - self._others_at < _CALM_S else self.concurrency):
                self._lines += 1
                return True
            # Requests come and go by the millisecond; nobody is told of each.
            await asyncio.sleep(_POLL_S)
        return False

    def let_go(self) -> None:
        """A line is over."""
        self._lines -= 1

    async def ask(self, taken: Taken, line: Tree) -> Tree:
        """Answer one line: as it stands in the results."""
        request_id = f"batch_req_{uuid.uuid4().hex}"
        body = json.dumps(line["body"]).encode()
        path = taken.tree["endpoint"]
        owner = taken.owner
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "client": None,
            "server": None,
            OWNER: (owner.tenant, owner.key_id),
            "headers": [
                (b"host", b"batch"),
                (b"content-type", b"application/json"),
                (b"content-length", b"%d" % len(body)),
                (b"x-priority", b"batch"),
                (b"x-request-id", request_id.encode()),
            ],
        }
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        status, headers, parts = 500, {}, []

        async def receive() -> Message:
            if messages:
                return messages.pop()
            await asyncio.Event().wait()  # this client does not go away
            raise AssertionError

        async def send(message: Message) -> None:
            nonlocal status, headers
            if message["type"] == "http.response.start":
                status, headers = message["status"], dict(message.get("headers", ()))
            else:
                parts.append(bytes(message.get("body", b"")))

        await self._app(scope, receive, send)
        text = b"".join(parts)
        try:
            answer = json.loads(text)
        except ValueError:
            answer = {
                "error": {"message": text[:1000].decode("utf-8", "replace"), "type": None, "param": None, "code": None}
            }
        return {
            "id": request_id,
            "custom_id": line["custom_id"],
            "response": {"status_code": status, "request_id": request_id, "body": answer},
            "error": None,
            "_retry_after": headers.get(b"retry-after"),
        }

    def count(self, answer: Tree) -> None:
        """A line has its answer on the disk."""
        self._shown.count_batch_line("completed" if answer["response"]["status_code"] == 200 else "failed")

    def count_left(self, outcome: str, count: int) -> None:
        """Lines ended without an answer."""
        self._shown.count_batch_line(outcome, count)

    @property
    def stopping(self) -> asyncio.Event:
        """Set once no line is to begin any more."""
        return self._stopping


class _Work:
    """The lines of one batch."""

    def __init__(self, runner: Runner, taken: Taken, source: Path) -> None:
        self._runner = runner
        self._taken = taken
        self._source = source
        self._ended = asyncio.Event()
        self._end: tuple[str, str, str] | None = None
        self._answers: asyncio.Queue[Tree | None] = asyncio.Queue()

    async def run(self) -> None:
        """Answer what has no answer yet, and end the batch; or stop where the process does."""
        runner, taken = self._runner, self._taken
        watching = asyncio.create_task(self._watch())
        writing = asyncio.create_task(self._write())
        ended = asyncio.create_task(self._ended.wait())
        tasks: set[asyncio.Task[None]] = set()
        try:
            async for line in _lines(self._source):
                if line["custom_id"] in taken.done:
                    continue
                # Those that were turned away hold no place, but wait here as well.
                while len(tasks) >= runner.concurrency and not (ended.done() or writing.done()):
                    await asyncio.wait({*tasks, ended, writing}, return_when=asyncio.FIRST_COMPLETED)
                if writing.done() or not await runner.hold(self._ended):
                    break
                task = asyncio.create_task(self._answer(line))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            answering = asyncio.gather(*tasks, return_exceptions=True)
            first: set[asyncio.Future[Any]] = {answering, ended, writing}
            await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
            # A client that cancels wants no more of it, and one that came too late neither.
            if not answering.done():
                for task in list(tasks):
                    task.cancel()
            failures = [each for each in await answering if isinstance(each, Exception)]
            self._answers.put_nowait(None)
            await writing
        finally:
            for each in (*tasks, watching, writing, ended):
                each.cancel()
            await asyncio.gather(*tasks, watching, writing, ended, return_exceptions=True)
        if self._end is None and len(taken.done) < taken.counts.total:
            if runner.stopping.is_set():
                return
            raise RuntimeError("lines were left without an answer") from (failures[0] if failures else None)
        await self._finish()

    async def _finish(self) -> None:
        taken, end = self._taken, self._end
        if end is None:
            await asyncio.to_thread(taken.finish, "completed", "completed_at")
            return
        status, code, message = end
        left = []
        async for line in _lines(self._source):
            if line["custom_id"] not in taken.done:
                left.append(
                    {
                        "id": f"batch_req_{uuid.uuid4().hex}",
                        "custom_id": line["custom_id"],
                        "response": None,
                        "error": {"code": code, "message": message},
                    }
                )
        await asyncio.to_thread(taken.append, left)
        self._runner.count_left(status, len(left))
        await asyncio.to_thread(taken.finish, status, f"{status}_at")

    async def _watch(self) -> None:
        """See that the batch is cancelled, or late."""
        taken = self._taken
        while self._end is None:
            try:
                if await asyncio.to_thread(lambda: taken.cancelled):
                    self._end = (
                        "cancelled",
                        "batch_cancelled",
                        "The batch was cancelled before this request was answered.",
                    )
                    fields = {"status": "cancelling", "cancelling_at": int(taken.store.now())}
                    await asyncio.to_thread(taken.set, **fields)
                elif taken.store.now() >= taken.tree["expires_at"]:
                    self._end = (
                        "expired",
                        "batch_expired",
                        "The completion window ended before this request was answered.",
                    )
                else:
                    await asyncio.sleep(taken.store.place.watch_every_s)
            except Exception as error:  # a disk or object store that is away for now: looked at again
                log.warning("batch %s can't be looked at: %s", taken.batch_id, error)
                await asyncio.sleep(taken.store.place.watch_every_s)
        self._ended.set()

    async def _answer(self, line: Tree) -> None:
        """Answer one line, however often it is turned away for now."""
        runner, pause, tries, held = self._runner, 1.0, 0, True
        try:
            while True:
                answer = await runner.ask(self._taken, line)
                retry_after = answer.pop("_retry_after")
                status = answer["response"]["status_code"]
                tries += status >= 500 and status not in _AGAIN
                if status not in _AGAIN and not (status >= 500 and tries < _TRIES):
                    self._answers.put_nowait(answer)
                    return
                runner.let_go()
                held = False
                if runner.stopping.is_set():
                    return
                pause = min(_RETRY_MAX_S, pause * 2)
                wait_s = float(retry_after) if retry_after is not None and retry_after.isdigit() else pause
                await _first(min(_RETRY_MAX_S, max(wait_s, 0.1)), self._ended, runner.stopping)
                if not await runner.hold(self._ended):
                    return
                held = True
        finally:
            if held:
                runner.let_go()

    async def _write(self) -> None:
        """Keep answers as they come, several at once where the disk is slow."""
        saved = 0.0
        while True:
            answers = [await self._answers.get()]
            while not self._answers.empty():
                answers.append(self._answers.get_nowait())
            found = [each for each in answers if each is not None]
            await asyncio.to_thread(self._taken.append, found)
            for each in found:
                self._runner.count(each)
            if None in answers:
                return
            if time.monotonic() - saved > self._taken.store.place.watch_every_s and self._end is None:
                saved = time.monotonic()
                await asyncio.to_thread(self._taken.set)


async def _first(timeout_s: float, *events: asyncio.Event) -> None:
    """Wait for the first of some events, or until the time is up."""
    tasks = [asyncio.create_task(event.wait()) for event in events]
    await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()


async def _lines(source: Path) -> AsyncIterator[Tree]:
    """The requests of a batch that was checked, read a piece at a time."""
    file = await asyncio.to_thread(source.open, "rb")
    try:
        while piece := await asyncio.to_thread(file.readlines, 1 << 20):
            for line in piece:
                if line.strip():
                    yield json.loads(line)
    finally:
        file.close()


def check_lines(source: Path, endpoint: str, most: int) -> tuple[int, str | None, list[dict[str, object]]]:
    """How many requests a file holds, the first one's model, and what is wrong with it, with numbers of lines from 1.

    Args:
        source: a file in OpenAI's form: a JSON object a line, with `custom_id`, `method`, `url` and `body`.
        endpoint: that all are for.
        most: requests.
    """
    errors: list[dict[str, object]] = []
    seen: set[str] = set()
    model: str | None = None

    def wrong(line: int | None, code: str, message: str, param: str | None = None) -> None:
        errors.append({"code": code, "line": line, "message": message, "param": param})

    with source.open("rb") as file:
        for number, text in enumerate(file, 1):
            if not text.strip():
                continue
            if len(errors) >= _ERRORS_SHOWN:
                break
            if len(seen) >= most:
                wrong(number, "too_many_tasks", f"the file holds more than {most} requests (--batch-max-lines)")
                break
            # Python's parser lets no other thread run, and the event loop is one.
            too_much = "it is longer than 20 MiB" if len(text) > _LONGEST else bounds.excess(text)
            if too_much is not None:
                wrong(number, "invalid_json_line", f"this line can't be read: {too_much}")
                continue
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                wrong(number, "invalid_json_line", "this line is no JSON")
                continue
            fault = _fault(line, endpoint, seen)
            if fault is not None:
                wrong(number, *fault)
                continue
            seen.add(line["custom_id"])
            named = line["body"].get("model")
            model = model or (named if isinstance(named, str) else None)
    if not seen and not errors:
        wrong(None, "empty_file", "the file holds no requests")
    return len(seen), model, errors


def _fault(line: object, endpoint: str, seen: set[str]) -> tuple[str, str, str | None] | None:
    """Code, sentence and field of what is wrong with a line, or None."""
    if not isinstance(line, dict):
        return "invalid_json_line", "this line is no JSON object", None
    custom_id, body = line.get("custom_id"), line.get("body")
    if not isinstance(custom_id, str) or not custom_id:
        return "missing_required_parameter", "custom_id must be a text", "custom_id"
    if custom_id in seen:
        return "duplicate_custom_id", f"custom_id {custom_id[:64]!r} stands in an earlier line too", "custom_id"
    if line.get("method") != "POST":
        return "invalid_method", "method must be POST", "method"
    if line.get("url") != endpoint:
        return "mismatched_endpoint", f"url must be the batch's endpoint, {endpoint}", "url"
    if not isinstance(body, dict):
        return "missing_required_parameter", "body must be an object", "body"
    if body.get("stream"):
        return "invalid_request", "a batch has no streams: leave stream out", "body.stream"
    return None
