"""Bytes over a socket, and what comes back: for requests that no client library would send."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvloop

from kserve_vllm.config.settings import ServerSettings
from kserve_vllm.servers.listeners import HTTPServer


def connect(port: int, timeout_s: float = 20.0) -> socket.socket:
    """A connection on which each part goes out at once, and does not wait until the one before was acknowledged."""
    sock = socket.create_connection(("127.0.0.1", port), timeout=timeout_s)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


opened: list[socket.socket] = []
"""Of clients that a test leaves open."""


def close_clients() -> None:
    """Close them, so that the end of a server does not wait for them."""
    while opened:
        opened.pop().close()


async def listening(server: HTTPServer) -> HTTPServer:
    """The server, once it answers; its port is bound before, and nobody listens yet."""
    while not server.uvicorn.started:
        await asyncio.sleep(0.01)
    return server


def ask(port: int, *parts: bytes, within_s: float = 20.0, pause_s: float = 0.0, eof: bool = False) -> bytes:
    """Send the parts, and read until the server closes the connection."""
    with connect(port, within_s) as sock:
        for number, part in enumerate(parts):
            if number:
                time.sleep(pause_s)
            try:
                sock.sendall(part)
            except OSError:
                break
        if eof:
            sock.shutdown(socket.SHUT_WR)
        return read_all(sock)


def read_all(sock: socket.socket) -> bytes:
    """What comes until the connection is closed."""
    answer = b""
    while True:
        try:
            part = sock.recv(1 << 16)
        except ConnectionResetError:
            return answer
        if not part:
            return answer
        answer += part


def read_answer(sock: socket.socket) -> bytes:
    """One answer that says its length."""
    answer = b""
    while b"\r\n\r\n" not in answer:
        part = sock.recv(1 << 16)
        if not part:
            return answer
        answer += part
    head, _, body = answer.partition(b"\r\n\r\n")
    length = next(
        (int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-len")), 0
    )
    while len(body) < length:
        body += sock.recv(1 << 16)
    return head + b"\r\n\r\n" + body


def statuses(answer: bytes) -> list[int]:
    """The status of each answer in what came back."""
    return [int(status) for status in re.findall(rb"HTTP/1\.1 ([0-9]{3}) [A-Z]", answer)]


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answers with what it was asked; `/stream` in parts, `/endless` until the client is gone."""
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept"})
        while (await receive())["type"] != "websocket.disconnect":
            pass
        return
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        size += len(message.get("body", b""))
        more = message.get("more_body", False)
    asked = {
        "method": scope["method"],
        "path": scope["path"],
        "version": scope["http_version"],
        "headers": [[name.decode("latin-1"), value.decode("latin-1")] for name, value in scope["headers"]],
        "size": size,
    }
    body = json.dumps(asked).encode()
    if scope["path"] in ("/stream", "/endless"):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
        for _ in range(3):
            await send({"type": "http.response.body", "body": b"part ", "more_body": True})
        gone = asyncio.ensure_future(receive())
        while scope["path"] == "/endless" and not gone.done():
            await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
            await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": b""})
        gone.cancel()
        return
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@contextmanager
def served(app: Any = echo, **settings: Any) -> Iterator[HTTPServer]:
    """An app on a port of its own, behind the runtime's HTTP server, on the loop that the runtime uses."""
    box: list[HTTPServer] = []
    started, ending = threading.Event(), threading.Event()

    async def main() -> None:
        server = HTTPServer(app, ServerSettings(host="127.0.0.1", **settings), 0)
        server.start()
        box.append(await listening(server))
        started.set()
        while not ending.is_set():
            await asyncio.sleep(0.02)
        await server.stop(1)

    def run() -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(main())

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert started.wait(30)
        yield box[0]
    finally:
        close_clients()
        ending.set()
        thread.join(30)
    assert not thread.is_alive()
