"""Starts the real server as a process of its own, and waits for what it says."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import httpx
import psutil
import pytest
from starlette.routing import Route

from tests.zygote import ForkedProcess

ROOT = Path(__file__).resolve().parents[1]
READY_WITHIN_S = 300.0
_READ_AT_IMPORT = ("HF_", "TRANSFORMERS_", "TORCH", "OMP_")
"""How variables begin that libraries read when they are imported, which a copy of a process has long done."""
DEMO = ["--demo"]


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def self_signed(folder: Path, name: str = "localhost") -> tuple[Path, Path]:
    """Files in a folder, `tls.crt` and `tls.key`: a certificate for localhost by this common name, and its key."""
    cert, key = folder / "tls.crt", folder / "tls.key"
    subject = ["-subj", f"/CN={name}", "-addext", "subjectAltName=DNS:localhost"]
    files = ["-keyout", str(key), "-out", str(cert)]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject, *files]
    subprocess.run(command, check=True, capture_output=True)
    return cert, key


def not_checked(why: str) -> NoReturn:
    """For what this machine lacks: skips the test, or fails it where `CI` is set, whose green says that all was run."""
    if os.environ.get("CI"):
        pytest.fail(f"NOT CHECKED: {why}", pytrace=False)
    pytest.skip(f"NOT CHECKED: {why}")


def wait_until(done: Callable[[], bool], timeout_s: float, what: str | Callable[[], str]) -> None:
    """Wait until `done()` holds; fail with `what` when that takes longer than `timeout_s` seconds."""
    deadline = time.monotonic() + timeout_s
    while not done():
        if time.monotonic() > deadline:
            raise AssertionError(what if isinstance(what, str) else what())
        time.sleep(0.02)


Process = subprocess.Popen[bytes] | ForkedProcess


def end(process: Process, timeout_s: float) -> None:
    """End a process: SIGTERM, then SIGKILL after `timeout_s`; and whatever it started and left behind."""
    children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


class Server:
    """`kserve-vllm serve` as a process, on loopback, logging to a file.

    Args:
        arguments: further arguments; `--demo` where none is given.
        env: further variables.
        fresh: in an interpreter of its own, for tests of the start; else a copy of one that has imported vLLM.
    """

    def __init__(
        self, arguments: Sequence[str] = ("--demo",), env: Mapping[str, str] | None = None, fresh: bool = False
    ) -> None:
        self.http_port, self.grpc_port = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.http_port}"
        self.grpc_address = f"127.0.0.1:{self.grpc_port}"
        self.one_port_address = f"127.0.0.1:{self.http_port}"
        self._log_file = tempfile.NamedTemporaryFile("w+", prefix="kserve-vllm-", suffix=".log")  # noqa: SIM115
        ports = ["--host", "127.0.0.1", "--http-port", str(self.http_port), "--grpc-port", str(self.grpc_port)]
        command = ["serve", *arguments, *ports]
        variables = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", **(env or {})}
        self.started_at = time.monotonic()
        self.process: Process = (
            subprocess.Popen(
                [sys.executable, "-m", "kserve_vllm", *command],
                stdout=self._log_file,
                stderr=subprocess.STDOUT,
                env=variables,
            )
            if fresh or any(name.startswith(_READ_AT_IMPORT) for name in env or ())
            else ForkedProcess(command, variables, self._log_file.fileno())
        )

    @property
    def log(self) -> str:
        """Everything that the process has written."""
        return Path(self._log_file.name).read_text(errors="replace")

    def wait_ready(self) -> Server:
        """Wait until the server is ready; fail with its log when it ends before that."""
        deadline = time.monotonic() + READY_WITHIN_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(f"the server ended with {self.process.returncode}:\n{self.log[-6000:]}")
            if self.health("/v2/health/ready").get("ready"):
                return self
            time.sleep(0.2)
        raise AssertionError(f"not ready within {READY_WITHIN_S:g} s:\n{self.log[-6000:]}")

    def health(self, path: str) -> dict[str, Any]:
        """The body of a health answer; empty where nothing answers."""
        try:
            body: dict[str, Any] = httpx.get(self.url + path, timeout=5).json()
        except (httpx.TransportError, ValueError):
            return {}
        return body

    def status(self, path: str) -> int:
        """The status of a GET; 0 where nothing answers."""
        try:
            return httpx.get(self.url + path, timeout=5).status_code
        except httpx.TransportError:
            return 0

    def metric(self, name: str, **labels: str) -> float:
        """Sum of a metric's samples whose labels include the given ones; 0 where there is none."""
        total = 0.0
        for line in httpx.get(self.url + "/metrics", timeout=10).text.splitlines():
            match = re.match(rf"{re.escape(name)}(?:\{{(.*)\}})? (\S+)$", line)
            if match and all(f'{key}="{value}"' in (match[1] or "") for key, value in labels.items()):
                total += float(match[2])
        return total

    def children(self, name: str = "") -> list[psutil.Process]:
        """Processes below the server whose command or title holds `name`."""
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if name in " ".join(child.cmdline()) or name in child.name():
                    found.append(child)
            except psutil.NoSuchProcess:
                continue
        return found

    def stop(self, timeout_s: float = 60.0) -> int:
        """End the server as a kubelet does: SIGTERM, then SIGKILL after `timeout_s`. Returns its exit code."""
        end(self.process, timeout_s)
        self._log_file.close()
        return self.process.wait()


class Routed:
    """A plain ASGI callable with routes, as the edge asks them: for tests that answer requests themselves."""

    def __init__(self, app: Any, *paths: str) -> None:
        self.routes: list[Any] = [Route(path, self, methods=["GET", "POST"]) for path in paths]
        self.router = self
        self.redirect_slashes = False
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self._app(scope, receive, send)
