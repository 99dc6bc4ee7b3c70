"""Usage records arrive, whole and once, or are counted as lost."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from kserve_vllm.core.errors import ConfigError
from kserve_vllm.policy.usage import Usage, UsageRecord, timestamp
from tests.services import Receiver, ids
from tests.support import ROOT, wait_until

RECORD = UsageRecord(
    time=timestamp(1_767_225_600.25),
    request_id="r-0",
    tenant="team-a",
    key_id="team-a-2026",
    model="demo",
    adapter="pirate",
    protocol="openai",
    endpoint="/v1/chat/completions",
    outcome="ok",
    status=200,
    prompt_tokens=12,
    cached_tokens=8,
    output_tokens=5,
    duration_s=0.5,
    ttft_s=0.1,
    priority="normal",
    cache="miss",
)
LINE_BYTES = 340


def many(number: int) -> list[UsageRecord]:
    return [replace(RECORD, request_id=f"r-{i:06}", prompt_tokens=i) for i in range(number)]


def fill(usage: Usage, records: list[UsageRecord]) -> None:
    for record in records:
        usage.record(record)


def close(usage: Usage, timeout_s: float = 20.0) -> None:
    asyncio.run(usage.close(timeout_s))


def losses(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR and "lost" in r.getMessage()]


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try again sooner than a server does."""
    monkeypatch.setattr("kserve_vllm.policy.usage._RETRY_FIRST_S", 0.02)


@pytest.fixture
def receiver() -> Receiver:
    return Receiver()


# --- spelling ---


@pytest.mark.parametrize(
    "spelling",
    [
        "",
        "stdout",
        "file",
        "file:",
        "file://usage.jsonl",
        "LOG",
        "ftp://host/x",
        "http",
        "http://",
        "https:///path",
        "http://host:port/",
        "/var/log/usage",
    ],
)
def test_a_wrong_spelling_is_answered_with_the_three_right_ones(spelling: str) -> None:
    with pytest.raises(ConfigError) as error:
        Usage(spelling)
    for form in ("--usage-sink", "log (", "file:PATH", "http://"):
        assert form in str(error.value)


def test_a_wrong_spelling_does_not_put_a_password_into_the_log() -> None:
    for spelling in ("htps://me:secret@host/", "http://me:secret@host:port/", "http://me:secret/x@host/"):
        with pytest.raises(ConfigError) as error:
            Usage(spelling)
        assert "secret" not in str(error.value)


def test_a_file_that_can_not_be_opened_ends_the_start(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing" / "usage.jsonl"):
        with pytest.raises(ConfigError, match=str(path)):
            Usage(f"file:{path}")


def test_times_are_rfc_3339_in_utc() -> None:
    assert timestamp(1_767_225_600.25) == "2026-01-01T00:00:00.250Z"
    assert timestamp(0) == "1970-01-01T00:00:00.000Z"


# --- file ---


def test_a_line_has_every_field_under_its_name(tmp_path: Path) -> None:
    path = tmp_path / "usage.jsonl"
    usage = Usage(f"file:{path}")
    usage.record(RECORD)
    usage.record(replace(RECORD, adapter=None, status="OK", ttft_s=None))
    close(usage)
    first, second = [json.loads(line) for line in path.read_text().splitlines()]
    assert first == {
        "time": "2026-01-01T00:00:00.250Z",
        "request_id": "r-0",
        "tenant": "team-a",
        "key_id": "team-a-2026",
        "model": "demo",
        "adapter": "pirate",
        "protocol": "openai",
        "endpoint": "/v1/chat/completions",
        "outcome": "ok",
        "status": 200,
        "prompt_tokens": 12,
        "cached_tokens": 8,
        "output_tokens": 5,
        "duration_s": 0.5,
        "ttft_s": 0.1,
        "priority": "normal",
        "cache": "miss",
    }
    assert second == {**first, "adapter": None, "status": "OK", "ttft_s": None}


def test_ten_thousand_records_and_an_end_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "usage.jsonl"
    path.write_text('{"request_id": "before"}\n')
    counts: Counter[str] = Counter()
    before = set(threading.enumerate())
    usage = Usage(f"file:{path}", lambda kind, n: counts.update({kind: n}))
    records = many(10_000)
    fill(usage, records)
    close(usage)
    assert ids(path.read_text()) == ["before", *(r.request_id for r in records)]
    assert (usage.sent, usage.dropped, usage.failed, usage.waiting) == (10_000, 0, 0, 0)
    assert counts == {"sent": 10_000}
    assert set(threading.enumerate()) <= before, "who writes has ended"


def test_records_from_many_threads_are_all_written(tmp_path: Path) -> None:
    path = tmp_path / "usage.jsonl"
    usage = Usage(f"file:{path}")
    records = many(4000)
    threads = [threading.Thread(target=fill, args=(usage, records[i::4])) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    close(usage)
    assert sorted(ids(path.read_text())) == [r.request_id for r in records]


def test_a_record_is_in_the_file_soon_without_any_end(tmp_path: Path) -> None:
    path = tmp_path / "usage.jsonl"
    usage = Usage(f"file:{path}")
    for i, record in enumerate(many(3), start=1):
        usage.record(record)
        wait_until(lambda i=i: len(path.read_text().splitlines()) == i, 10, "not written")  # type: ignore[misc]
    close(usage)


@pytest.mark.parametrize("way", ["moved", "removed", "truncated"])
def test_the_file_is_made_anew_when_it_is_rotated(tmp_path: Path, way: str) -> None:
    path, old = tmp_path / "usage.jsonl", tmp_path / "usage.jsonl.1"
    usage = Usage(f"file:{path}")
    records = many(900)
    seen = []
    for start in range(0, 900, 300):
        fill(usage, records[start : start + 300])
        wait_until(lambda sent=start + 300: usage.sent == sent, 10, "not written")  # type: ignore[misc]
        seen += ids(path.read_text())
        if way == "moved":
            path.rename(old)
        elif way == "removed":
            path.unlink()
        else:
            os.truncate(path, 0)
    close(usage)
    assert seen == [r.request_id for r in records]


def test_nothing_is_lost_while_the_folder_is_away(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    usage = Usage(f"file:{folder}/usage.jsonl")
    folder.rename(tmp_path / "away")
    fill(usage, many(100))
    wait_until(lambda: usage.failed > 0, 10, "no attempt")
    folder.mkdir()
    close(usage)
    assert ids((folder / "usage.jsonl").read_text()) == [r.request_id for r in many(100)]
    assert (usage.sent, usage.dropped) == (100, 0)
    assert "tried again" in caplog.text


def test_a_line_cut_off_by_a_full_disk_is_finished_later(tmp_path: Path) -> None:
    """The limit on a file's size cuts writes in the middle of a line, as a full disk does."""
    code = """
import asyncio, os, resource, sys, time
from kserve_vllm.policy.usage import Usage
from tests.unit.policy.test_usage import many, fill
usage = Usage("file:" + sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
fill(usage, many(50))
while not usage.failed: time.sleep(0.01)
if sys.argv[2] == "rotate":
    os.rename(sys.argv[1], sys.argv[1] + ".1")
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
asyncio.run(usage.close(20))
print(usage.sent, usage.dropped)
"""
    for way in ("stay", "rotate"):
        path = tmp_path / f"{way}.jsonl"
        command = [sys.executable, "-c", code, str(path), way]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        assert done.stdout.split() == ["50", "0"], done.stderr
        expected = [r.request_id for r in many(50)]
        if way == "stay":
            assert ids(path.read_text()) == expected
        else:
            whole, _, cut = Path(f"{path}.1").read_text().rpartition("\n")
            assert cut
            assert ids(whole + "\n") + ids(path.read_text()) == expected


def test_what_a_full_disk_leaves_no_room_for_is_counted_and_said(caplog: pytest.LogCaptureFixture) -> None:
    counts: Counter[str] = Counter()
    usage = Usage("file:/dev/full", lambda kind, n: counts.update({kind: n}), buffer_bytes=100 * LINE_BYTES)
    fill(usage, many(1000))
    kept = usage.waiting
    assert 90 <= kept <= 110
    assert usage.dropped == 1000 - kept
    assert len(losses(caplog)) == 1, "once a minute, not once a record"
    wait_until(lambda: usage.failed > 0, 10, "no attempt")
    started = time.monotonic()
    close(usage, 0.5)
    assert time.monotonic() - started < 5
    assert (usage.sent, usage.dropped, usage.waiting) == (0, 1000, 0)
    assert counts["dropped"] == 1000
    said = losses(caplog)
    assert sum(int(line.split()[0]) for line in said) == 1000, "all losses are in the log"
    assert "(1000 since the start)" in said[-1]


def test_written_records_make_room_in_the_buffer(tmp_path: Path) -> None:
    path = tmp_path / "usage.jsonl"
    usage = Usage(f"file:{path}", buffer_bytes=100 * LINE_BYTES)
    for start in range(0, 400, 80):
        fill(usage, many(400)[start : start + 80])
        wait_until(lambda sent=start + 80: usage.sent == sent, 10, "not written")  # type: ignore[misc]
    close(usage)
    assert usage.dropped == 0
    assert len(ids(path.read_text())) == 400


# --- HTTP ---


def test_a_receiver_that_is_down_at_first_gets_everything_once_it_is_up(
    receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    usage = Usage(receiver.url)
    records = many(3000)
    fill(usage, records[:2000])
    wait_until(lambda: usage.failed >= 2, 10, "no attempt")
    with receiver.up():
        wait_until(lambda: usage.sent == 2000, 20, "not delivered")
        fill(usage, records[2000:])
        close(usage)
    assert receiver.ids == [r.request_id for r in records]
    assert (usage.sent, usage.dropped) == (3000, 0)
    assert {h["content-type"] for h in receiver.headers} == {"application/x-ndjson"}
    assert 3 <= len(receiver.bodies) <= 20, "in batches"
    assert max(len(body) for body in receiver.bodies) <= 256 << 10
    assert f"127.0.0.1:{receiver.port} again" in caplog.text


def test_at_the_end_a_receiver_that_comes_back_in_time_gets_everything(receiver: Receiver) -> None:
    async def work() -> None:
        usage = Usage(receiver.url)
        fill(usage, many(500))
        ending = asyncio.create_task(usage.close(20))
        await asyncio.sleep(0.5)
        assert not ending.done()
        with receiver.up():
            await ending
        assert (usage.sent, usage.dropped) == (500, 0)

    asyncio.run(work())
    assert receiver.ids == [r.request_id for r in many(500)]


@pytest.mark.parametrize("status", [301, 401, 404, 429, 500, 503])
def test_a_batch_that_was_not_taken_is_posted_again(receiver: Receiver, status: int) -> None:
    receiver.answers = [status, status]
    usage = Usage(receiver.url)
    with receiver.up():
        fill(usage, many(10))
        close(usage)
    assert receiver.ids == [r.request_id for r in many(10)]
    assert (usage.sent, usage.dropped, usage.failed) == (10, 0, 2)


def test_a_batch_that_the_receiver_will_never_take_does_not_hold_up_the_others(
    receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    receiver.answers = [400]
    usage = Usage(receiver.url)
    with receiver.up():
        fill(usage, many(5))
        wait_until(lambda: usage.dropped == 5, 10, "not dropped")
        usage.record(RECORD)
        close(usage)
    assert receiver.ids == ["r-0"]
    assert (usage.sent, usage.dropped) == (1, 5)
    assert ["answered 400" in line for line in losses(caplog)] == [True]


def test_the_end_does_not_wait_for_a_receiver_that_never_answers(
    receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    receiver.hang.clear()
    usage = Usage(receiver.url)
    with receiver.up():
        fill(usage, many(10))
        wait_until(lambda: len(receiver.headers) == 1, 10, "nothing posted")
        started = time.monotonic()
        close(usage, 0.5)
        assert time.monotonic() - started < 5
    assert (usage.sent, usage.dropped, usage.waiting) == (0, 10, 0)
    assert losses(caplog) == [
        "10 usage records are lost: they could not be written before the end (10 since the start)"
    ]


def test_the_password_of_a_receiver_is_sent_and_never_logged(
    receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "kserve_vllm")
    usage = Usage(receiver.url.replace("://", "://me:s3cret@") + "?token=s3cret")
    receiver.answers = [500]
    usage.record(RECORD)
    wait_until(lambda: usage.failed > 0, 10, "no attempt")
    with receiver.up():
        close(usage)
    assert receiver.headers[0]["authorization"] == "Basic " + base64.b64encode(b"me:s3cret").decode()
    ours = [r.getMessage() for r in caplog.records if r.name.startswith("kserve_vllm")]
    assert any("again" in line for line in ours)
    assert not [line for line in ours if "s3cret" in line]


# --- log ---


def test_the_log_sink_writes_a_line_of_its_own_logger() -> None:
    code = """
import asyncio
from kserve_vllm.policy.usage import Usage
from kserve_vllm.telemetry import logs
from tests.unit.policy.test_usage import RECORD
logs.configure("json")
usage = Usage("log")
usage.record(RECORD)
asyncio.run(usage.close(1))
logs.forget()
print(usage.sent, usage.dropped)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == ["1", "0"]
    line = json.loads(done.stderr)
    assert (line["logger"], line["event"], line["level"]) == ("kserve_vllm.usage", "usage", "info")
    assert {name: line[name] for name in RECORD.__dict__} == RECORD.__dict__


# --- whatever happens ---


def test_a_record_that_can_not_be_written_is_counted_and_raises_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "usage.jsonl"
    usage = Usage(f"file:{path}")
    usage.record(replace(RECORD, tenant=object()))  # type: ignore[arg-type]
    usage.record(RECORD)
    close(usage)
    usage.record(RECORD)
    assert (usage.sent, usage.dropped) == (1, 2)
    assert ids(path.read_text()) == ["r-0"]
    assert "lost: TypeError" in caplog.text


def test_a_callback_that_raises_loses_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def broken(kind: str, records: int) -> None:
        raise ValueError("broken")

    path = tmp_path / "usage.jsonl"
    usage = Usage(f"file:{path}", broken)
    fill(usage, many(3))
    close(usage)
    assert len(ids(path.read_text())) == usage.sent == 3
    assert "can't be counted" in caplog.text


def test_an_end_with_nothing_to_write_is_an_end_at_once_and_may_come_twice(tmp_path: Path) -> None:
    threads = threading.active_count()
    usage = Usage(f"file:{tmp_path}/usage.jsonl")
    assert threading.active_count() == threads, "no thread before the first record"

    async def work() -> None:
        await usage.close(10)
        await usage.close(10)

    asyncio.run(work())
    usage.record(RECORD)
    assert usage.dropped == 1
