"""`kserve-vllm batch` against a small HTTP server instead of an engine: what is asked, kept, gone on with and told."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from kserve_vllm.core.errors import ConfigError
from kserve_vllm.ops import batch

CHAT = "/v1/chat/completions"


class Answering(ThreadingHTTPServer):
    """Answers each request with what it asked for.

    Attributes:
        status: of the answer to a text, and how often that was asked before.
    """

    daemon_threads = True

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.headers: list[dict[str, str]] = []
        self.status: Callable[[str, int], int] = lambda text, before: 200
        self._lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def take(self, text: str, headers: dict[str, str]) -> int:
        """Note a request; the status of its answer."""
        with self._lock:
            before = self.asked[text]
            self.asked[text] += 1
            self.headers.append(headers)
        return self.status(text, before)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # as in `fake_api`
    server: Answering

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        status = self.server.take(body["text"], {name.lower(): value for name, value in self.headers.items()})
        answer = json.dumps({"text": body["text"]}).encode()
        self.send_response(status)
        if status in (429, 503):
            self.send_header("retry-after", "0")
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: Any) -> None:
        """Not to stderr."""


@pytest.fixture
def server() -> Iterator[Answering]:
    running = Answering()
    yield running
    running.shutdown()
    running.server_close()


def written(path: Path, count: int, **changed: Any) -> Path:
    """A file of requests."""
    lines = [
        {"custom_id": f"id-{n}", "method": "POST", "url": CHAT, "body": {"text": f"text {n}"}, **changed}
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    return path


def answered(path: Path) -> Counter[str]:
    """How often each request has an answer."""
    return Counter(json.loads(each)["custom_id"] for each in path.read_text().splitlines())


ALL = Counter(f"id-{n}" for n in range(40))


def test_every_request_is_answered_once_and_what_is_there_is_not_asked_again(
    server: Answering, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-one")
    source, out = written(tmp_path / "in.jsonl", 40), tmp_path / "out.jsonl"
    arguments = [str(source), "--out", str(out), "--url", server.url + "/v1/", "--concurrency", "4"]
    assert batch.main(arguments) == 0
    assert answered(out) == ALL
    assert {(each["authorization"], each["x-priority"]) for each in server.headers} == {("Bearer sk-one", "batch")}
    assert "40/40 requests, 0 failed" in capsys.readouterr().err
    first = json.loads(out.read_text().splitlines()[0])
    assert set(first) == {"id", "custom_id", "response", "error"}
    # As a machine leaves it that is switched off: half a line, and fewer of them.
    kept = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(kept[:10]) + kept[10][:20])
    server.asked.clear()
    assert batch.main(arguments) == 0
    assert answered(out) == ALL
    assert sum(server.asked.values()) == 30
    server.asked.clear()
    assert batch.main(arguments) == 0
    assert not server.asked


def test_errors_are_answers_and_are_asked_again_where_that_is_wanted(server: Answering, tmp_path: Path) -> None:
    source, out = written(tmp_path / "in.jsonl", 40), tmp_path / "out.jsonl"
    arguments = [str(source), "--out", str(out), "--url", server.url]
    server.status = lambda text, before: 400 if text.endswith("7") else 503 if before == 0 else 200
    assert batch.main(arguments) == 1
    assert answered(out) == ALL
    assert set(server.asked.values()) == {1, 2}
    assert batch.main(arguments) == 1
    server.status = lambda text, before: 200
    assert batch.main([*arguments, "--retry-failed"]) == 0
    assert answered(out) == ALL


def test_where_nothing_answers_it_ends_and_can_be_gone_on_with(
    server: Answering, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = written(tmp_path / "in.jsonl", 3), tmp_path / "out.jsonl"
    nowhere = ["--url", "http://127.0.0.1:9", "--give-up-after", "0.3"]
    assert batch.main([str(source), "--out", str(out), *nowhere]) == 3
    assert "the same command goes on from here" in capsys.readouterr().err
    assert batch.main([str(source), "--out", str(out), "--url", server.url]) == 0


def test_a_server_that_does_not_start_ends_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = written(tmp_path / "in.jsonl", 1)
    assert batch.main([str(source), "--out", str(tmp_path / "out.jsonl"), "--demo", "--ssl-keyfile", "/key"]) == 3
    assert "the server did not start" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"custom_id": "one"}, "line 2: custom_id 'one' stands in an earlier line too"),
        ({"custom_id": 1}, "line 1: custom_id must be a text"),
        ({"method": "GET"}, "line 1: method must be POST"),
        ({"url": "http://elsewhere/v1"}, "line 1: url must be a path such as"),
        ({"body": "text"}, "line 1: body must be an object"),
        ({"body": {"stream": True}}, "line 1: a batch has no streams"),
    ],
)
def test_a_file_that_can_not_be_used_is_refused_with_the_line(
    tmp_path: Path, changed: dict[str, Any], sentence: str
) -> None:
    source = written(tmp_path / "in.jsonl", 2, **changed)
    with pytest.raises(ConfigError, match=sentence):
        batch.main([str(source), "--out", str(tmp_path / "out.jsonl"), "--url", "http://127.0.0.1:9"])


def test_an_output_of_something_else_is_not_touched(tmp_path: Path) -> None:
    source, out = written(tmp_path / "in.jsonl", 2), tmp_path / "out.jsonl"
    arguments = [str(source), "--out", str(out), "--url", "http://127.0.0.1:9"]
    out.write_text("notes\n")
    with pytest.raises(ConfigError, match="is no file of answers"):
        batch.main(arguments)
    out.write_text(json.dumps({"custom_id": "other", "response": None}) + "\n")
    with pytest.raises(ConfigError, match="holds answers to other requests, such as 'other'"):
        batch.main(arguments)
    with pytest.raises(ConfigError, match="holds no requests"):
        batch.main([str(written(tmp_path / "empty.jsonl", 0)), "--out", str(out)])
    with pytest.raises(ConfigError, match="can't be read"):
        batch.main([str(tmp_path / "nothing"), "--out", str(out)])
    with pytest.raises(ConfigError, match="with --url nothing is started"):
        batch.main([*arguments, "--demo"])


@pytest.mark.parametrize(
    ("out", "url", "words"),
    [
        ("nowhere/out.jsonl", "http://127.0.0.1:9", "is no folder to write in"),
        (".", "http://127.0.0.1:9", "a folder"),
        ("out.jsonl", "models.example.com", "write http://HOST:PORT"),
    ],
)
def test_a_place_that_can_not_be_used_is_named_at_once(out: str, url: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        batch.main(["in.jsonl", "--out", str(tmp_path / out), "--url", url])
