"""Media are fetched from the public internet, and from hosts inside only where the operator names them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest

from kserve_vllm.engine.hooks import media

IMAGE = b"an image"


class Inside(BaseHTTPRequestHandler):
    """A service of the cluster; `/to/HOST` sends on to another name of it."""

    asked: list[str] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        port = self.server.server_address[1]
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", f"http://{self.path.removeprefix('/to/')}:{port}/secret")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(IMAGE)))
        self.end_headers()
        self.wfile.write(IMAGE)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Inside) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield int(server.server_address[1])
        server.shutdown()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "getproxies", dict)
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    Inside.asked.clear()


def fetch(url: str, *named: str) -> bytes:
    connection: Any = SimpleNamespace()
    media.fetch_from_outside(connection, named)

    async def run() -> bytes:
        async with await connection.get_async_client() as client, client.get(url) as answer:
            return bytes(await answer.read())

    return asyncio.run(run())


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "LOCALHOST", "127.1", "2130706433", "0.0.0.0"])
def test_nothing_is_fetched_from_inside(port: int, host: str) -> None:
    # Numbers that stand for an address are no host for the client in the first place.
    with pytest.raises(
        Exception, match="public internet" if host.lower() == "localhost" or host.count(".") == 3 else host
    ):
        fetch(f"http://{host}:{port}/secret")
    assert Inside.asked == []


def test_what_the_operator_names_is_fetched(port: int) -> None:
    assert fetch(f"http://localhost:{port}/image", "localhost") == IMAGE
    assert fetch(f"http://LocalHost:{port}/image", "localhost") == IMAGE
    assert fetch(f"http://127.0.0.1:{port}/image", "127.0.0.1") == IMAGE


def test_a_redirect_leads_nowhere_inside(port: int) -> None:
    with pytest.raises(Exception, match="public internet"):
        fetch(f"http://127.0.0.1:{port}/to/127.0.0.2", "127.0.0.1")
    assert Inside.asked == ["/to/127.0.0.2"]


def test_a_proxy_decides_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "getproxies", lambda: {"https": "http://proxy:3128"})
    connection: Any = SimpleNamespace()
    media.fetch_from_outside(connection, ())
    assert not vars(connection)


def test_nobody_fetches_in_another_way() -> None:
    connection: Any = SimpleNamespace()
    media.fetch_from_outside(connection, ())
    with pytest.raises(NotImplementedError):
        connection.get_sync_client()


@pytest.mark.parametrize(
    ("address", "outside"),
    [
        ("8.8.8.8", True),
        ("2606:4700:4700::1111", True),
        ("64:ff9b::808:808", True),
        ("::ffff:8.8.8.8", True),
        ("169.254.169.254", False),
        ("::ffff:169.254.169.254", False),
        ("64:ff9b::a9fe:a9fe", False),
        ("2002:a9fe:a9fe::1", False),
        ("fd00:ec2::254", False),
        ("fe80::1%eth0", False),
        ("10.0.0.1", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("100.64.0.1", False),
        ("127.0.0.1", False),
        ("::1", False),
        ("0.0.0.0", False),
        ("::", False),
        ("224.0.0.1", False),
        ("ff0e::1", False),
        ("255.255.255.255", False),
        ("no address", False),
    ],
)
def test_an_address_is_of_the_public_internet_or_not(address: str, outside: bool) -> None:
    assert media.is_outside(address) is outside
