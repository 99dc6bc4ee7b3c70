"""What stands outside of a server and is asked by it: a receiver of usage records, a moderation endpoint."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.support import free_port


def ids(text: str) -> list[str]:
    """The request ids of usage records, which are whole lines of JSON."""
    assert not text or text.endswith("\n")
    return [json.loads(line)["request_id"] for line in text.splitlines()]


class _Quiet(BaseHTTPRequestHandler):
    disable_nagle_algorithm = True  # a body waits 40 ms behind its head otherwise

    def read(self) -> str:
        return self.rfile.read(int(self.headers["content-length"])).decode()

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def _serving(server: ThreadingHTTPServer) -> Iterator[None]:
    # Connections stay open for the next request; their threads end with the client.
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Receiver:
    """A real HTTP server on loopback that keeps what is posted to it."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/usage"
        self.bodies: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.answers: list[int] = []
        """Statuses of the next answers; 200 when there are none."""
        self.delay_s = 0.0
        """How long it takes with each batch."""
        self.hang = threading.Event()
        self.hang.set()

    @contextmanager
    def up(self) -> Iterator[None]:
        """Answer for as long as the block runs."""
        receiver = self

        class Handler(_Quiet):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.read()
                receiver.headers.append({k.lower(): v for k, v in self.headers.items()})
                receiver.hang.wait(30)
                time.sleep(receiver.delay_s)
                status = receiver.answers.pop(0) if receiver.answers else 200
                if status == 200:
                    receiver.bodies.append(body)
                self.send_response(status)
                self.send_header("content-length", "0")
                self.end_headers()

        with _serving(ThreadingHTTPServer(("127.0.0.1", self.port), Handler)):
            try:
                yield
            finally:
                self.hang.set()

    @property
    def ids(self) -> list[str]:
        """Request ids of the records that came, in their order."""
        return ids("".join(self.bodies))

    @property
    def records(self) -> list[dict[str, Any]]:
        """The records that came, in their order."""
        return [json.loads(line) for line in "".join(self.bodies).splitlines()]


class Endpoint(ThreadingHTTPServer):
    """A moderation endpoint in OpenAI's form that flags some words; what it does depends on the path."""

    def __init__(self, *words: str) -> None:
        super().__init__(("127.0.0.1", 0), _Judge)
        self.words = words
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.broken = False
        """Whether every answer is 500."""

    def url(self, path: str) -> str:
        """For the moderation file."""
        return f"http://127.0.0.1:{self.server_address[1]}{path}"

    @contextmanager
    def up(self) -> Iterator[None]:
        """Answer for as long as the block runs."""
        with _serving(self):
            yield


class _Judge(_Quiet):
    server: Endpoint

    def do_POST(self) -> None:
        body = json.loads(self.read())
        self.server.asked.append(body)
        self.server.keys.append(self.headers["authorization"])
        if self.path == "/slow":
            time.sleep(1.0)
        flags = [any(word in text for word in self.server.words) for text in body["input"]]
        results = [{"flagged": flag, "categories": {}} for flag in flags]
        tree: Any = {
            "/short": {"results": results[1:]},
            "/odd": {"results": [{"flagged": "yes"}] * len(results)},
            "/list": results,
        }.get(self.path, {"id": "m", "model": "m", "results": results})
        reply = b"not json" if self.path == "/garbage" else json.dumps(tree).encode()
        status = 500 if self.server.broken else {"/broken": 500, "/elsewhere": 302}.get(self.path, 200)
        self.send_response(status)
        self.send_header("content-length", str(len(reply)))
        self.end_headers()
        try:
            self.wfile.write(reply)
        except OSError:  # the client did not wait
            self.close_connection = True
