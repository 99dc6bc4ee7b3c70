"""The counting of the suite for clusters sees what it is there for: a stream that is cut, an error, a refusal.

The server is a fake, since no real one cuts its streams to order.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tests.e2e.traffic import Load, Target, fingerprint, percentile, within_three_sigma

_EVENT = {"choices": [{"text": "x"}], "system_fingerprint": "one"}


class _Handler(BaseHTTPRequestHandler):
    """Does to a completion what its model's name says."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        how, status = body["model"], int(body["model"]) if body["model"].isdigit() else 200
        if not body["stream"] or status != 200:
            self._send(status, json.dumps(_EVENT).encode())
            return
        events = [f"data: {json.dumps(_EVENT)}\n\n".encode()] * 3
        if how == "whole":
            events.append(b"data: [DONE]\n\n")
        elif how == "error":
            events.append(b'data: {"error": {"message": "no"}}\n\n')
        data = b"".join(events)
        if how == "closed":
            # More is promised than is sent.
            self._send(200, data, len(data) + 10)
            self.close_connection = True
            return
        self._send(200, data)

    def _send(self, status: int, data: bytes, length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("content-length", str(length or len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("model", "whole", "lost", "refused", "says"),
    [
        ("whole", 6, 0, 0, ""),
        ("ended", 0, 6, 0, "a cut stream"),
        ("error", 0, 6, 0, "a cut stream"),
        ("closed", 0, 6, 0, "RemoteProtocolError"),
        ("503", 0, 6, 0, "status 503"),
        ("429", 0, 0, 6, ""),
    ],
)
def test_every_request_is_whole_lost_or_refused(
    url: str, model: str, whole: int, lost: int, refused: int, says: str
) -> None:
    count = Load(Target(url, "h", model), workers=2, count=6, stream=True, expected=(429,)).run(30)
    assert (count.whole, len(count.lost), count.refused) == (whole, lost, refused)
    assert count.sent == 6
    assert all(says in line for line in count.lost), count.lost


def test_a_server_that_is_gone_loses_every_request() -> None:
    count = Load(Target("http://127.0.0.1:9", "h", "whole"), workers=2, count=4).run(30)
    assert len(count.lost) == 4


def test_who_answered_is_counted_for_streams_and_whole_answers(url: str) -> None:
    count = Load(Target(url, "h", "whole"), workers=2, count=8).run(30)
    assert count.who == {"one": 8}
    assert fingerprint(Target(url, "h", "whole")) == "one"


def test_a_load_without_a_count_ends_when_it_is_told(url: str) -> None:
    with Load(Target(url, "h", "whole"), workers=3, pause_s=0.01) as load:
        while load.count.whole < 10:
            pass
        load.keep(0)
        for worker in load.workers:
            worker.join(10)
            assert not worker.is_alive()


def test_a_split_is_within_three_sigma_or_not() -> None:
    assert within_three_sigma(22, 400, 10)
    assert not within_three_sigma(21, 400, 10)
    assert within_three_sigma(0, 400, 0)
    assert not within_three_sigma(1, 400, 0)
    assert not within_three_sigma(399, 400, 100)


def test_percentiles_are_values_that_were_seen() -> None:
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([1.0], 0.99) == 1.0
