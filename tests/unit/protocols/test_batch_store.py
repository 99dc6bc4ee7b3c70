"""Files and batches on the disk, and who works on them; requests are answered by a small app instead of an engine."""

from __future__ import annotations

import asyncio
import fcntl
import io
import json
import logging
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kserve_vllm.core.errors import ConfigError, InvalidRequest, NotFound, Unauthenticated, Unavailable
from kserve_vllm.policy import tenants as keys
from kserve_vllm.policy.tenants import Tenants
from kserve_vllm.protocols.batch import runner as room
from kserve_vllm.protocols.batch import store as store_room
from kserve_vllm.protocols.batch.bucket import LEASE_S, Bucket, Lost
from kserve_vllm.protocols.batch.places import Folder
from kserve_vllm.protocols.batch.runner import Runner, check_lines
from kserve_vllm.protocols.batch.store import KEEP_S, BatchStore, Bounds, Owner, place_of
from kserve_vllm.protocols.http.middleware import OWNER
from tests.support_s3 import SECRET, S3Server, bucket_url

CHAT = "/v1/chat/completions"
BOUNDS = Bounds(files=20, size=1 << 20, lines=1000)
OWN = Owner("team-a", "key-1")


class Clock:
    """Seconds of the wall clock, set by a test."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


class Shown:
    """What was told of batches."""

    def __init__(self) -> None:
        self.lines: Counter[str] = Counter()

    def show_batches(self, running: int, unfinished: int, in_flight: int) -> None:
        """Not looked at here."""

    def count_batch_line(self, outcome: str, count: int = 1) -> None:
        """Count it."""
        self.lines[outcome] += count


class App:
    """An ASGI app that answers a chat with the text that it was asked, and keeps who asked.

    Args:
        status: of the answer to the text of a line; 200 for all others.
    """

    def __init__(self, status: Callable[[str], int] = lambda text: 200) -> None:
        self.asked: list[tuple[str, Any, str]] = []
        self.status = status
        self.gate = asyncio.Event()
        self.gate.set()
        self.at_once = self.most = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        text = json.loads((await receive())["body"])["messages"][0]["content"]
        self.asked.append((text, scope[OWNER], dict(scope["headers"])[b"x-priority"].decode()))
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        try:
            await self.gate.wait()
            await asyncio.sleep(0)
        finally:
            self.at_once -= 1
        status = self.status(text)
        headers = [(b"retry-after", b"0")] if status in (429, 503) else []
        body = {"text": text, "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}}
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps(body).encode()})


def line(number: int, **changed: Any) -> dict[str, Any]:
    """A request of a batch."""
    body = {"model": "demo", "messages": [{"role": "user", "content": f"text {number}"}]}
    return {"custom_id": f"id-{number}", "method": "POST", "url": CHAT, "body": body, **changed}


def upload(store: BatchStore, lines: list[Any], owner: Owner = OWN) -> str:
    """The id of a file with these lines."""
    content = io.BytesIO(b"".join(json.dumps(each).encode() + b"\n" for each in lines))
    return str(store.add_file(owner.tenant, "in.jsonl", "batch", content)["id"])


def begin(store: BatchStore, lines: list[Any], window_s: int = 3600) -> str:
    """The id of a batch of these lines."""
    wanted = {"input_file_id": upload(store, lines), "endpoint": CHAT, "completion_window": "24h", "metadata": None}
    return str(store.add_batch(OWN, wanted, window_s, None)["id"])


def results(store: BatchStore, file_id: str | None) -> list[dict[str, Any]]:
    """The answers in a results file."""
    assert file_id is not None
    content = b"".join(store.content(OWN.tenant, file_id).pieces)
    return [json.loads(each) for each in content.splitlines()]


def beside(store: BatchStore, clock: Clock) -> BatchStore:
    """What another process has of the same place."""
    place = store.place
    if isinstance(place, Folder):
        return BatchStore(Folder(str(place.root)), BOUNDS, clock)
    assert isinstance(place, Quick)
    return BatchStore(Quick(place.url, place.clock), BOUNDS, clock)


class Quick(Bucket):
    """A bucket that is looked at more often than a folder."""

    look_every_s = watch_every_s = 0.05

    def __init__(self, url: str, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(url, clock)
        self.url = url


async def work(
    store: BatchStore, app: Any, batch_id: str, shown: Shown | None = None, others: int = 0
) -> dict[str, Any]:
    """Let a runner work until a batch is over; the batch."""
    running = Runner(store, app, lambda: others + getattr(app, "at_once", 0), 4, shown or Shown())
    running.start()
    try:
        async with asyncio.timeout(30):
            while (found := store.batch(OWN.tenant, batch_id))["status"] not in store_room.OVER:
                await asyncio.sleep(0.02)
    finally:
        await running.close()
    return found


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["folder", "bucket"])
def store(request: pytest.FixtureRequest, tmp_path: Path, clock: Clock) -> Iterator[BatchStore]:
    if request.param == "folder":
        yield BatchStore(Folder(str(tmp_path / "batches")), BOUNDS, clock)
        return
    with bucket_url() as (url, _):
        yield BatchStore(Quick(url), BOUNDS, clock)


@pytest.fixture
def folder(tmp_path: Path, clock: Clock) -> BatchStore:
    return BatchStore(Folder(str(tmp_path / "batches")), BOUNDS, clock)


def test_every_line_is_answered_once_and_the_batch_tells_how_many(store: BatchStore) -> None:
    shown = Shown()

    async def ask() -> None:
        batch_id = begin(store, [line(n) for n in range(50)])
        app = App(lambda text: 400 if text.endswith("7") else 200)
        found = await work(store, app, batch_id, shown)
        assert found["status"] == "completed"
        assert found["request_counts"] == {"total": 50, "completed": 45, "failed": 5}
        assert found["usage"]["total_tokens"] == 45 * 5
        assert found["model"] == "demo"
        good, bad = results(store, found["output_file_id"]), results(store, found["error_file_id"])
        assert Counter(each["custom_id"] for each in good + bad) == Counter(f"id-{n}" for n in range(50))
        assert {each["response"]["status_code"] for each in good} == {200}
        assert {each["response"]["status_code"] for each in bad} == {400}
        assert all(each["error"] is None and each["id"].startswith("batch_req_") for each in good + bad)
        assert {(owner, priority) for _, owner, priority in app.asked} == {(("team-a", "key-1"), "batch")}

    asyncio.run(ask())
    assert shown.lines == {"completed": 45, "failed": 5}


def test_what_is_turned_away_for_now_is_tried_again(store: BatchStore, monkeypatch: pytest.MonkeyPatch) -> None:
    tries: Counter[str] = Counter()

    def status(text: str) -> int:
        tries[text] += 1
        return {1: 429, 2: 503}.get(tries[text], 200)

    async def ask() -> None:
        found = await work(store, App(status), begin(store, [line(n) for n in range(3)]))
        assert found["request_counts"] == {"total": 3, "completed": 3, "failed": 0}

    asyncio.run(ask())
    assert set(tries.values()) == {3}


def test_beside_live_traffic_one_line_is_worked_on_at_a_time(store: BatchStore) -> None:
    async def ask(others: int) -> int:
        app = App()
        await work(store, app, begin(store, [line(n) for n in range(20)]), others=others)
        return app.most

    assert asyncio.run(ask(1)) == 1
    assert 1 < asyncio.run(ask(0)) <= 4


def test_a_crash_loses_no_line_and_answers_none_twice(folder: BatchStore, tmp_path: Path, clock: Clock) -> None:
    store, root = folder, tmp_path / "batches"

    async def ask() -> None:
        batch_id = begin(store, [line(n) for n in range(30)])
        app = App()
        running = Runner(store, app, lambda: app.at_once, 4, Shown())
        running.start()
        kept = root / "tenants/team-a/batches" / batch_id / "output.jsonl"
        async with asyncio.timeout(20):
            while not kept.exists() or kept.stat().st_size < 500:
                await asyncio.sleep(0.001)
        # What is on the disk at this moment is all that a machine has which is switched off now.
        shutil.copytree(root, tmp_path / "after")
        await running.close()
        output = tmp_path / "after/tenants/team-a/batches" / batch_id / "output.jsonl"
        with output.open("ab") as file:
            file.write(b'{"id": "batch_req_half", "custom_id": "id-2')
        again = BatchStore(Folder(str(tmp_path / "after")), BOUNDS, clock)
        found = await work(again, App(), batch_id)
        assert found["request_counts"] == {"total": 30, "completed": 30, "failed": 0}
        answered = Counter(each["custom_id"] for each in results(again, found["output_file_id"]))
        assert answered == Counter(f"id-{n}" for n in range(30))

    asyncio.run(ask())


def test_a_batch_that_was_ending_when_the_process_ended_is_ended(store: BatchStore) -> None:
    async def ask() -> None:
        batch_id = begin(store, [line(n) for n in range(5)])
        taken = store.take(OWN.tenant, batch_id)
        assert taken is not None
        taken.counts.total = 5
        taken.recall()
        answer = {"id": "batch_req_1", "custom_id": "id-0", "response": {"status_code": 200, "body": {}}, "error": None}
        taken.append([{**answer, "custom_id": f"id-{n}"} for n in range(5)])
        taken.set(status="finalizing", finalizing_at=1, _end=["completed", "completed_at"])
        store.move_results(taken, "output.jsonl", taken.tree["_output"], None)
        taken.release()
        found = await work(store, App(), batch_id)
        assert found["request_counts"] == {"total": 5, "completed": 5, "failed": 0}
        assert len(results(store, found["output_file_id"])) == 5
        assert found["error_file_id"] is None

    asyncio.run(ask())


def test_one_process_works_on_a_batch(store: BatchStore, clock: Clock) -> None:
    batch_id = begin(store, [line(0)])
    taken = store.take(OWN.tenant, batch_id)
    assert taken is not None
    other = beside(store, clock)
    assert other.take(OWN.tenant, batch_id) is None
    taken.release()
    again = other.take(OWN.tenant, batch_id)
    assert again is not None
    again.release()


async def under_way(store: BatchStore, app: App, batch_id: str) -> asyncio.Task[None]:
    """Who works on a batch, once it has begun: the app has questions, and answers none before its gate is opened."""
    app.gate.clear()
    working = asyncio.create_task(work(store, app, batch_id))
    while not app.at_once:
        await asyncio.sleep(0.01)
    return working


def test_a_cancelled_batch_ends_with_what_it_has(store: BatchStore) -> None:
    async def ask() -> None:
        batch_id = begin(store, [line(n) for n in range(20)])
        app = App()
        async with asyncio.timeout(20):
            working = await under_way(store, app, batch_id)
        found = store.cancel(OWN.tenant, batch_id)
        assert found["status"] == "cancelling"
        assert found["cancelling_at"]
        found = await working
        assert found["status"] == "cancelled"
        left = results(store, found["error_file_id"])
        assert {each["error"]["code"] for each in left} == {"batch_cancelled"}
        assert (found["request_counts"]["failed"], len(left)) == (20, 20)
        with pytest.raises(InvalidRequest, match="cancelled and can't be cancelled"):
            store.cancel(OWN.tenant, batch_id)

    asyncio.run(ask())


def test_a_batch_that_is_late_expires(store: BatchStore, clock: Clock) -> None:
    async def ask() -> None:
        batch_id = begin(store, [line(n) for n in range(10)], window_s=60)
        clock.now += 61
        found = await work(store, App(lambda text: 503), batch_id)
        assert found["status"] == "expired"
        assert {each["error"]["code"] for each in results(store, found["error_file_id"])} == {"batch_expired"}

    asyncio.run(ask())


@pytest.mark.parametrize(
    ("lines", "code", "number"),
    [
        ([], "empty_file", None),
        ([line(0), "text"], "invalid_json_line", 2),
        ([line(0), line(0)], "duplicate_custom_id", 2),
        ([line(0, custom_id=7)], "missing_required_parameter", 1),
        ([line(0, method="GET")], "invalid_method", 1),
        ([line(0, url="/v1/embeddings")], "mismatched_endpoint", 1),
        ([line(0, body=[])], "missing_required_parameter", 1),
        ([line(0, body={"stream": True})], "invalid_request", 1),
        ([line(n) for n in range(6)], "too_many_tasks", 6),
    ],
)
def test_a_file_that_can_not_be_used_fails_the_batch_with_the_line(
    tmp_path: Path, lines: list[Any], code: str, number: int | None
) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    _, _, (error, *_) = check_lines(path, CHAT, 5)
    assert (error["code"], error["line"]) == (code, number)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"[" + b"{}," * 20_000 + b"{}]", "objects and lists"),
        (b'["a"' + b',"a"' * 60_000 + b"]", "strings"),
        (b'"' + b"a" * (20 << 20) + b'"', "20 MiB"),
    ],
)
def test_a_line_that_would_hold_everybody_up_is_not_read(tmp_path: Path, text: bytes, why: str) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(json.dumps(line(0)).encode() + b"\n" + text + b"\n")
    *_, (error, *_) = check_lines(path, CHAT, 5)
    assert (error["code"], error["line"]) == ("invalid_json_line", 2)
    assert why in str(error["message"])


def test_a_failed_batch_says_what_is_wrong(store: BatchStore) -> None:
    found = asyncio.run(work(store, App(), begin(store, [line(0), line(0)])))
    assert found["status"] == "failed"
    assert found["errors"]["data"][0]["line"] == 2
    assert list(store.active()) == []


def test_a_tenant_sees_and_keeps_only_its_own(store: BatchStore) -> None:
    mine = upload(store, [line(0)])
    assert [each["id"] for each in store.list_files("team-a")] == [mine]
    assert store.list_files("team-b") == []
    for call in (store.file, store.content, store.delete_file):
        with pytest.raises(NotFound):
            call("team-b", mine)
    batch_id = begin(store, [line(0)])
    with pytest.raises(NotFound):
        store.batch("team-b", batch_id)
    with pytest.raises(NotFound):
        store.cancel("team-b", batch_id)
    wanted = {"input_file_id": mine, "endpoint": CHAT, "completion_window": "24h", "metadata": None}
    with pytest.raises(NotFound):
        store.add_batch(Owner("team-b", None), wanted, 60, None)
    for strange in ("../x", "file-..", "", "x" * 10_000):
        with pytest.raises(NotFound):
            store.file("team-a", strange)


def test_a_file_that_is_being_read_comes_whole_where_it_is_deleted_meanwhile(store: BatchStore) -> None:
    """Between the look at it and its first byte there is time, in which its answer would be a fault of ours."""
    lines = [line(n) for n in range(3)]
    file_id = upload(store, lines)
    found = store.content(OWN.tenant, file_id)
    store.delete_file(OWN.tenant, file_id)
    read = b"".join(found.pieces)
    assert [json.loads(each) for each in read.splitlines()] == lines
    assert len(read) == found.size


def test_a_file_may_be_deleted_while_its_batch_is_worked_on(store: BatchStore) -> None:
    batch_id = begin(store, [line(0)])
    store.delete_file(OWN.tenant, store.batch(OWN.tenant, batch_id)["input_file_id"])
    assert asyncio.run(work(store, App(), batch_id))["request_counts"]["completed"] == 1


def test_numbers_and_bytes_are_bounded_and_what_has_expired_goes(store: BatchStore, clock: Clock) -> None:
    with pytest.raises(InvalidRequest, match="--batch-max-mib"):
        store.add_file("team-a", "in", "batch", io.BytesIO(b"x" * ((1 << 20) + 1)))
    for _ in range(BOUNDS.files):
        upload(store, [line(0)])
    with pytest.raises(InvalidRequest, match="--batch-max-files"):
        upload(store, [line(0)])
    upload(store, [line(0)], Owner("team-b", None))
    clock.now += KEEP_S + 1
    assert store.list_files("team-a") == []
    store.sweep()
    assert store.place.entries("tenants/") == []


def test_a_folder_that_can_not_be_used_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--batch-dir"):
        place_of(str(tmp_path / "file"))
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    with pytest.raises(ConfigError, match="keeps no locks"):
        place_of(str(tmp_path / "folder"))


class Leases:
    """Two processes at one bucket, with clocks that a test moves; the first one's may stand `behind`."""

    def __init__(self, url: str, clock: Clock) -> None:
        self.now, self.behind = 100.0, 0.0
        self.first = BatchStore(Quick(url, lambda: self.now - self.behind), BOUNDS, clock)
        self.second = BatchStore(Quick(url, lambda: self.now), BOUNDS, clock)

    def renewals(self) -> int:
        """How often the lock of the one batch was renewed."""
        (key,) = (each.key for each in self.first.place.entries("tenants/") if each.key.endswith("/lock"))
        data = self.first.place.read(key)
        assert data is not None
        return int(json.loads(data)["renewals"])


@pytest.fixture
def leases(clock: Clock) -> Iterator[Leases]:
    with bucket_url() as (url, _):
        yield Leases(url, clock)


def answered(number: int) -> dict[str, Any]:
    """An answer as it stands in the results."""
    response = {"status_code": 200, "request_id": "r", "body": {"text": str(number)}}
    return {"id": "batch_req_1", "custom_id": f"id-{number}", "response": response, "error": None}


def test_a_bucket_s_batch_is_taken_over_once_its_lock_is_not_renewed(
    leases: Leases, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its holder stands still: its machine is gone, or was held up for long and then goes on."""
    monkeypatch.setattr("kserve_vllm.protocols.batch.bucket._RENEW_S", 1000)
    batch_id = begin(leases.first, [line(n) for n in range(6)])
    held = leases.first.take(OWN.tenant, batch_id)
    assert held is not None
    held.counts.total = 6
    held.recall()
    held.set(status="in_progress", model="demo")
    held.append([answered(n) for n in range(3)])
    held.append([answered(3)])
    assert leases.second.take(OWN.tenant, batch_id) is None  # seen for the first time
    leases.now += LEASE_S - 1
    assert leases.second.take(OWN.tenant, batch_id) is None
    with pytest.raises(Lost):  # its holder stops before others may begin
        held.append([answered(4)])
    leases.now += 1
    taken = leases.second.take(OWN.tenant, batch_id)
    assert taken is not None
    taken.recall()
    assert taken.done == {f"id-{n}" for n in range(4)}
    assert (taken.counts.total, taken.counts.completed) == (6, 4)
    # What its holder was just writing comes late.
    leases.behind = LEASE_S
    held.append([answered(4)])
    leases.behind = 0
    taken.set(status="in_progress")
    with pytest.raises(Lost):
        held.set(status="completed")
    taken.append([answered(4), answered(5)])
    taken.release()
    held.release()  # does not let go what is another's
    last = leases.first.take(OWN.tenant, batch_id)
    assert last is not None
    last.recall()
    assert (len(last.done), last.counts.completed) == (6, 6)
    last.finish("completed", "completed_at")
    last.release()
    found = leases.first.batch(OWN.tenant, batch_id)
    assert found["status"] == "completed"
    names = [each["custom_id"] for each in results(leases.second, found["output_file_id"])]  # type: ignore[arg-type]
    assert sorted(names) == [f"id-{n}" for n in range(6)]
    left = [each.key for each in leases.first.place.entries("") if "/batches/" in each.key or "active/" in each.key]
    assert [each.rpartition("/")[2] for each in left] == ["batch.json", "lock"]


def test_a_lock_that_is_renewed_stays_its_holder_s(leases: Leases, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kserve_vllm.protocols.batch.bucket._RENEW_S", 0.01)
    batch_id = begin(leases.first, [line(0)])
    held = leases.first.take(OWN.tenant, batch_id)
    assert held is not None
    for _ in range(4):
        before = leases.renewals()
        while leases.renewals() < before + 3:
            time.sleep(0.01)
        assert leases.second.take(OWN.tenant, batch_id) is None
        leases.now += LEASE_S / 2
    held.release()


def test_a_bucket_that_does_not_hold_to_conditions_or_is_away_is_refused() -> None:
    with bucket_url() as (url, server):
        if server is None:
            pytest.skip("a real store is not broken for a test")
        server.conditions = False
        with pytest.raises(ConfigError, match="does not hold to conditions of writes"):
            place_of(url)
        server.conditions = True
        server.away = True
        with pytest.raises(ConfigError, match=r"can't be used: .*SlowDown"):
            place_of(url)
    for strange in ("s3://", "s3://bucket/?x=1"):
        with pytest.raises(ConfigError, match="named as s3://BUCKET"):
            place_of(strange)
    with pytest.raises(ConfigError) as caught:
        place_of(f"s3://known:{SECRET}@bucket/where")
    assert SECRET not in str(caught.value)


def test_a_bucket_that_is_away_holds_a_batch_up_and_tells_no_secret(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(room, "AFTER_FAILURE_S", 0.1)
    caplog.set_level(logging.DEBUG)
    with bucket_url() as (url, server):
        if server is None:
            pytest.skip("a real store is not broken for a test")
        store = BatchStore(Quick(url), BOUNDS, clock)
        asyncio.run(_through_an_outage(store, server))
    assert "SlowDown" in caplog.text
    assert SECRET not in caplog.text
    assert "AWS4-HMAC" not in caplog.text


async def _through_an_outage(store: BatchStore, server: S3Server) -> None:
    batch_id = begin(store, [line(n) for n in range(10)])
    app = App()
    async with asyncio.timeout(20):
        working = await under_way(store, app, batch_id)
        server.away = True
        app.gate.set()
        for call in (store.list_files, store.list_batches):
            with pytest.raises(Unavailable) as caught:
                await asyncio.to_thread(call, OWN.tenant)
            assert caught.value.retry_after_s is not None
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
        server.away = False
        # The lock could not be given back, so whoever goes on waits for it.
        for key in [each.key for each in store.place.entries("tenants/") if each.key.endswith("/lock")]:
            store.place.remove(key)
        found = await work(store, app, batch_id)
    assert found["request_counts"] == {"total": 10, "completed": 10, "failed": 0}


def test_a_full_disk_stops_a_batch_and_it_is_taken_up_again(store: BatchStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "AFTER_FAILURE_S", 0.0)
    failures = 1
    append = store_room.Taken.append

    def full(self: Any, answers: Any) -> None:
        nonlocal failures
        if failures:
            failures -= 1
            raise OSError(28, "No space left on device")
        append(self, answers)

    monkeypatch.setattr(store_room.Taken, "append", full)
    found = asyncio.run(work(store, App(), begin(store, [line(n) for n in range(10)])))
    assert found["request_counts"] == {"total": 10, "completed": 10, "failed": 0}


def test_whose_a_batch_is_is_asked_again_for_each_line(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(f"keys: [{{id: k1, tenant: team-a, sha256: {keys.digest('one')}}}]\n")
    tenants = Tenants(str(path))
    assert tenants.recall("team-a", "k1").tenant == "team-a"
    for tenant, key_id in (("team-b", "k1"), ("team-a", "k2"), ("none", None)):
        with pytest.raises(Unauthenticated):
            tenants.recall(tenant, key_id)
    path.write_text(f"keys: [{{id: k2, tenant: team-a, sha256: {keys.digest('two')}}}]\n")
    assert tenants.reload()
    with pytest.raises(Unauthenticated):
        tenants.recall("team-a", "k1")
    assert tenants.recall("team-a", "k2").key_id == "k2"
    assert Tenants(None, ["plain"]).recall("none", "api-key").key_id == "api-key"
    assert Tenants().recall("none", None) is keys.ANYONE
    with pytest.raises(Unauthenticated):
        Tenants().recall("team-a", "k1")
