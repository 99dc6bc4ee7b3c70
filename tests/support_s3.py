"""A fake of S3 for tests: the few operations that batches use, in memory, on the loopback.

It is a fake, since no store comes as a Python package. With `KSERVE_VLLM_TEST_S3` set to `s3://BUCKET`, and boto3's
own variables (`AWS_ENDPOINT_URL`, ...) to a real store, the same tests run against that one: `make compat` does, see
`tests/compat/suites/object_store.py`.
"""

from __future__ import annotations

import functools
import hashlib
import os
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import botocore.session
import pytest
from botocore.loaders import Loader, create_loader

REAL = "KSERVE_VLLM_TEST_S3"
BUCKET = "batches"
SECRET = "not-to-be-told"
_PAGE = 10  # so that lists have several


class S3Server:
    """The server.

    Attributes:
        objects: content and time of change, by key.
        away: whether all is answered 503.
        conditions: whether conditions of writes are looked at.
    """

    def __init__(self) -> None:
        self.objects: dict[str, tuple[bytes, datetime]] = {}
        self.away = False
        self.conditions = True
        self.lock = threading.Lock()
        owner = self

        class Handler(_Handler):
            store = owner

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self) -> str:
        """For `AWS_ENDPOINT_URL`."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def stop(self) -> None:
        """Close the port."""
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    store: S3Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # a body waits 40 ms behind its head otherwise

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        with self.store.lock:
            there = self.store.objects.get(self._key)
            if self.store.conditions and (
                (self.headers.get("if-none-match") == "*" and there is not None)
                or ("if-match" in self.headers and (there is None or _tag(there[0]) != self.headers["if-match"]))
            ):
                self._answer(412, _error("PreconditionFailed"))
                return
            copied = self.headers.get("x-amz-copy-source")
            if copied is not None:
                source = self.store.objects.get(unquote(copied).lstrip("/").partition("/")[2])
                if source is None:
                    self._answer(404, _error("NoSuchKey"))
                    return
                body = source[0]
            self._put(body)
        tag = _tag(body)
        text = (
            f"<CopyObjectResult><ETag>{escape(tag)}</ETag></CopyObjectResult>".encode() if copied is not None else b""
        )
        self._answer(200, text, {"ETag": tag})

    def _put(self, body: bytes) -> None:
        if not self.store.away:
            self.store.objects[self._key] = body, datetime.now(UTC)

    def do_GET(self) -> None:
        asked = parse_qs(urlsplit(self.path).query)
        with self.store.lock:
            if "list-type" in asked:
                self._answer(200, self._listed(asked["prefix"][0], asked.get("continuation-token", [""])[0]))
                return
            there = self.store.objects.get(self._key)
        if there is None:
            self._answer(404, _error("NoSuchKey"))
        else:
            self._answer(200, there[0], {"ETag": _tag(there[0])})

    def do_DELETE(self) -> None:
        with self.store.lock:
            self.store.objects.pop(self._key, None)
        self._answer(204, b"")

    def _listed(self, prefix: str, after: str) -> bytes:
        keys = [key for key in sorted(self.store.objects) if key.startswith(prefix) and key > after]
        rows = [
            f"<Contents><Key>{escape(key)}</Key><Size>{len(self.store.objects[key][0])}</Size>"
            f"<LastModified>{self.store.objects[key][1].isoformat()}</LastModified></Contents>"
            for key in keys[:_PAGE]
        ]
        more = len(keys) > _PAGE
        rows += [f"<IsTruncated>{str(more).lower()}</IsTruncated>"]
        rows += [f"<NextContinuationToken>{escape(keys[_PAGE - 1])}</NextContinuationToken>"] if more else []
        return f"<ListBucketResult>{''.join(rows)}</ListBucketResult>".encode()

    @property
    def _key(self) -> str:
        return unquote(urlsplit(self.path).path).lstrip("/").partition("/")[2]

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        if self.store.away:
            status, body, headers = 503, _error("SlowDown"), None
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


def _tag(data: bytes) -> str:
    return f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"'


def _error(code: str) -> bytes:
    return f"<Error><Code>{code}</Code><Message>as a test wants it</Message></Error>".encode()


@functools.cache
def _loader(search_path: str | None) -> Loader:
    """What reads boto3's descriptions of services, megabytes of JSON: once for all clients."""
    return create_loader(search_path)


@contextmanager
def bucket_url() -> Iterator[tuple[str, S3Server | None]]:
    """A place in a bucket for `--batch-dir`, and the fake that it is in; None for a real store. boto3 finds either."""
    if real := os.environ.get(REAL):
        yield f"{real}/{uuid.uuid4().hex}", None
        return
    server = S3Server()
    variables = {
        "AWS_ENDPOINT_URL": server.url,
        "AWS_ACCESS_KEY_ID": "known",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_MAX_ATTEMPTS": "1",
    }
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(botocore.session, "create_loader", _loader)
        for name, value in variables.items():
            patched.setenv(name, value)
        try:
            yield f"s3://{BUCKET}/some/where", server
        finally:
            server.stop()
