"""TLS: files that change while the server runs, variables of KServe, and the health command."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry

from kserve_vllm.config.settings import ServerSettings
from kserve_vllm.core.errors import ConfigError
from kserve_vllm.core.lifecycle import Lifecycle
from kserve_vllm.policy.enforcement import Enforcement
from kserve_vllm.protocols.oip.grpc_servicer import Servicer
from kserve_vllm.servers import certificates as room
from kserve_vllm.servers.certificates import Certificates
from kserve_vllm.servers.listeners import GRPCServer, HTTPServer
from kserve_vllm.telemetry.metrics import Metrics
from kserve_vllm.telemetry.requests import RequestRecorder
from kserve_vllm.telemetry.tracing import Tracing
from tests.robustness.wire import listening
from tests.support import self_signed


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two folders with a certificate each (`tls.crt`) and its key (`tls.key`), for localhost."""
    folders = []
    for name in ("old", "new"):
        folder = tmp_path_factory.mktemp(name)
        self_signed(folder, name)
        folders.append(folder)
    return folders


@pytest.fixture
def mounted(pairs: list[Path], tmp_path: Path) -> Path:
    """A folder as a Secret is mounted: the files are links into a folder that a link names."""
    for number, folder in enumerate(pairs):
        shutil.copytree(folder, tmp_path / f"..{number}")
    (tmp_path / "..data").symlink_to("..0")
    for name in ("tls.crt", "tls.key"):
        (tmp_path / name).symlink_to(f"..data/{name}")
    return tmp_path


def swap(mounted: Path) -> None:
    """What a kubelet does when the Secret has changed."""
    (mounted / "..tmp").symlink_to("..1")
    (mounted / "..tmp").rename(mounted / "..data")


async def hello(scope: Any, receive: Any, send: Any) -> None:
    """A small ASGI app."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
    await send({"type": "http.response.body", "body": b"hello"})


def shown(port: int, protocols: tuple[str, ...] = ()) -> bytes:
    """The certificate that a new connection sees, in PEM."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if protocols:
        context.set_alpn_protocols(list(protocols))
    with (
        socket.create_connection(("127.0.0.1", port), timeout=10) as raw,
        context.wrap_socket(raw, server_hostname="localhost") as wrapped,
    ):
        der = wrapped.getpeercert(binary_form=True)
    assert der is not None
    return ssl.DER_cert_to_PEM_cert(der).encode()


@contextlib.asynccontextmanager
async def watched(folder: Path, told: list[bool]) -> AsyncIterator[Certificates]:
    """Certificates of a folder, looked at without a pause."""
    found = Certificates(str(folder / "tls.crt"), str(folder / "tls.key"), {}, told.append)
    watching = asyncio.create_task(found.watch())
    try:
        yield found
    finally:
        watching.cancel()


async def until(told: list[bool], count: int) -> None:
    """Wait until the files were looked at that often with a result."""
    async with asyncio.timeout(20):
        while len(told) < count:
            await asyncio.sleep(0.02)


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look at the files more often than a server does."""
    monkeypatch.setattr(room, "POLL_S", 0.02)


def test_new_connections_see_a_new_certificate_and_open_ones_stay(mounted: Path, pairs: list[Path]) -> None:
    async def ask() -> None:
        told: list[bool] = []
        async with watched(mounted, told) as found:
            server = HTTPServer(hello, ServerSettings(host="127.0.0.1"), 0, certificates=found)
            server.start()
            await listening(server)
            trusting = ssl.create_default_context(cafile=str(pairs[0] / "tls.crt"))
            reader, writer = await asyncio.open_connection(
                "127.0.0.1", server.port, ssl=trusting, server_hostname="localhost"
            )

            async def on_open_connection() -> bytes:
                writer.write(b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n")
                await reader.readuntil(b"\r\n\r\n")
                return await reader.readexactly(5)

            assert await on_open_connection() == b"hello"
            assert await asyncio.to_thread(shown, server.port) == (pairs[0] / "tls.crt").read_bytes()
            swap(mounted)
            await until(told, 1)
            assert told == [True]
            assert await asyncio.to_thread(shown, server.port) == (pairs[1] / "tls.crt").read_bytes()
            assert await on_open_connection() == b"hello"
            writer.close()
            with contextlib.suppress(ssl.SSLError):  # the server may have closed it first
                await writer.wait_closed()
            await server.stop(0)

    asyncio.run(ask())


@pytest.mark.parametrize("kind", ["own", "grpcio"])
def test_grpc_calls_see_a_new_certificate_and_open_streams_stay(mounted: Path, pairs: list[Path], kind: str) -> None:
    async def ask() -> None:
        told: list[bool] = []
        lifecycle = Lifecycle()
        recorder = RequestRecorder(Metrics(lifecycle, lambda: 0, registry=CollectorRegistry()), Tracing(), lifecycle)
        async with watched(mounted, told) as found:
            settings = ServerSettings(host="127.0.0.1", grpc_port=0, grpc_server=kind)  # type: ignore[arg-type]
            servicer = Servicer(lifecycle, Enforcement(lifecycle), recorder)
            server = GRPCServer(servicer, settings, lifecycle, certificates=found)
            await server.start()
            trusting = grpc.ssl_channel_credentials((pairs[0] / "tls.crt").read_bytes())
            async with grpc.aio.secure_channel(f"localhost:{server.port}", trusting) as channel:
                stub = health_pb2_grpc.HealthStub(channel)
                watching = stub.Watch(health_pb2.HealthCheckRequest())
                assert (await asyncio.wait_for(watching.read(), 20)).status == 2
                swap(mounted)
                await until(told, 1)
                assert await asyncio.to_thread(shown, server.port, ("h2",)) == (pairs[1] / "tls.crt").read_bytes()
                assert (await stub.Check(health_pb2.HealthCheckRequest(), timeout=20)).status == 2
                assert not watching.done()
                watching.cancel()
            await server.stop(0)

    asyncio.run(ask())


def test_a_folder_that_is_swapped_between_the_two_files_is_no_failure(
    mounted: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    changed, swapped = room.WatchedFile.changed, threading.Event()

    async def swapping(self: room.WatchedFile) -> bytes | None:
        found = await changed(self)
        if self.flag == "--ssl-certfile" and not swapped.is_set():
            swapped.set()
            swap(mounted)
        return found

    monkeypatch.setattr(room.WatchedFile, "changed", swapping)

    async def ask() -> None:
        told: list[bool] = []
        async with watched(mounted, told):
            await until(told, 1)
            assert told == [True]

    asyncio.run(ask())
    assert swapped.is_set()
    assert "can't be used" not in caplog.text


def test_files_that_do_not_fit_are_told_once_and_change_nothing(
    pairs: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("tls.crt", "tls.key"):
        shutil.copy(pairs[0] / name, tmp_path / name)

    async def ask() -> None:
        told: list[bool] = []
        async with watched(tmp_path, told) as found:
            server = HTTPServer(hello, ServerSettings(host="127.0.0.1"), 0, certificates=found)
            server.start()
            await listening(server)
            shutil.copy(pairs[1] / "tls.crt", tmp_path / "tls.crt")
            await until(told, 1)
            await asyncio.sleep(0.2)
            assert told == [False]
            assert await asyncio.to_thread(shown, server.port) == (pairs[0] / "tls.crt").read_bytes()
            shutil.copy(pairs[1] / "tls.key", tmp_path / "tls.key")
            await until(told, 2)
            assert told == [False, True]
            assert await asyncio.to_thread(shown, server.port) == (pairs[1] / "tls.crt").read_bytes()
            await server.stop(0)

    asyncio.run(ask())
    assert "the old certificate is shown on" in caplog.text
    assert "PRIVATE KEY" not in caplog.text


def test_a_key_may_stand_in_the_certificates_file(pairs: list[Path], tmp_path: Path) -> None:
    both = tmp_path / "both.pem"
    both.write_bytes((pairs[0] / "tls.key").read_bytes() + (pairs[0] / "tls.crt").read_bytes())
    assert Certificates(str(both), None, {}).context()


def test_an_encrypted_key_is_refused_with_a_sentence(pairs: list[Path], tmp_path: Path) -> None:
    subprocess.run(
        ["openssl", "rsa", "-aes256", "-passout", "pass:secret", "-in", str(pairs[0] / "tls.key"), "-out", "key.pem"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    with pytest.raises(ConfigError, match="the private key is encrypted"):
        Certificates(str(pairs[0] / "tls.crt"), str(tmp_path / "key.pem"), {})


def test_kserves_variables_restrict_versions_and_ciphers(pairs: list[Path]) -> None:
    files = str(pairs[0] / "tls.crt"), str(pairs[0] / "tls.key")
    environ = {room.MIN_VERSION: "VersionTLS13", room.CIPHERS: "ECDHE-RSA-AES128-GCM-SHA256"}
    found = Certificates(*files, environ)
    assert found.restricted
    assert found.context().minimum_version is ssl.TLSVersion.TLSv1_3
    with pytest.raises(ConfigError, match="KSERVE_TLS_MIN_VERSION is 'TLS1'"):
        Certificates(*files, {room.MIN_VERSION: "TLS1"})
    with pytest.raises(ConfigError, match="names no cipher"):
        Certificates(*files, {room.CIPHERS: "rot13"})


@pytest.mark.parametrize("said", [{}, {"KSERVE_TLS_CERT_FILE": "/somewhere"}])
def test_the_health_command_asks_over_tls(pairs: list[Path], said: dict[str, str]) -> None:
    async def ask() -> tuple[int, str]:
        found = Certificates(str(pairs[0] / "tls.crt"), str(pairs[0] / "tls.key"), {})
        server = HTTPServer(hello, ServerSettings(host="127.0.0.1"), 0, certificates=found)
        server.start()
        await listening(server)
        command = [sys.executable, "-m", "kserve_vllm", "health", "--http-port", str(server.port)]
        process = await asyncio.create_subprocess_exec(
            *command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "https_proxy": "http://127.0.0.1:9", **said},
        )
        out, _ = await process.communicate()
        await server.stop(0)
        return process.returncode or 0, out.decode()

    assert asyncio.run(ask()) == (0, "hello\n")


def test_the_health_command_says_where_nothing_answers() -> None:
    command = [sys.executable, "-m", "kserve_vllm", "health", "--http-port", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "nothing answers at http://127.0.0.1:1/v2/health/ready" in done.stdout
