"""The server's certificate: read at the start, and again when its files change, for every port at once.

What is served is always a pair that belongs together. Both files are read into memory first, and tried on a context
that nobody uses: a certificate that was replaced before its key changes nothing until the key has come too. Handshakes
that begin after a change see the new pair; connections that are open stay as they are.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import ssl
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence

import grpc

from kserve_vllm.core.errors import ConfigError
from kserve_vllm.core.watched_file import POLL_S, WatchedFile

log = logging.getLogger(__name__)

MIN_VERSION, CIPHERS = "KSERVE_TLS_MIN_VERSION", "KSERVE_TLS_CIPHERS"
_VERSIONS = {"VersionTLS12": ssl.TLSVersion.TLSv1_2, "VersionTLS13": ssl.TLSVersion.TLSv1_3}


class Certificates:
    """A certificate with its key, and every TLS context that shows it.

    Args:
        certfile: PEM, the chain with the server's own certificate first.
        keyfile: PEM; None where the key stands in `certfile`.
        environ: `KSERVE_TLS_MIN_VERSION` (`VersionTLS12` or `VersionTLS13`) and `KSERVE_TLS_CIPHERS` (OpenSSL's names,
            with colons between them) are read from it.
        count: told after each change whether the new files could be used.

    Raises:
        ConfigError: the files can't be used, or one of those variables can't.
    """

    def __init__(
        self,
        certfile: str,
        keyfile: str | None,
        environ: Mapping[str, str],
        count: Callable[[bool], None] = lambda usable: None,
    ) -> None:
        self._files = [WatchedFile(certfile, "--ssl-certfile"), WatchedFile(keyfile or certfile, "--ssl-keyfile")]
        self._minimum, self._ciphers = environ.get(MIN_VERSION), environ.get(CIPHERS)
        self._count = count
        self._contexts: list[ssl.SSLContext] = []
        self._failed: tuple[bytes, bytes] | None = None
        self._pair = self._read()
        try:
            with _on_disk(self._pair) as (cert, key):
                _load(self._new_context(), cert, key)
        except (OSError, ValueError) as error:
            raise ConfigError(f"--ssl-certfile or --ssl-keyfile can't be used: {error}") from error

    @property
    def restricted(self) -> bool:
        """Whether a variable restricts versions or ciphers, which grpcio's server can't be told."""
        return bool(self._minimum or self._ciphers)

    def context(self, protocols: Sequence[str] = ()) -> ssl.SSLContext:
        """A context for a server, which follows the files from now on.

        Args:
            protocols: for ALPN.
        """
        made = self._new_context()
        if protocols:
            made.set_alpn_protocols(list(protocols))
        with _on_disk(self._pair) as (cert, key):
            _load(made, cert, key)
        self._contexts.append(made)
        return made

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """Credentials for grpcio's server, which asks at each handshake."""
        shown: list[tuple[bytes, bytes] | None] = [None]

        def newest() -> grpc.ServerCertificateConfiguration | None:
            # Called in one of grpcio's threads. None: what it was before.
            pair = self._pair
            if pair is shown[0]:
                return None
            shown[0] = pair
            return configuration()

        def configuration() -> grpc.ServerCertificateConfiguration:
            cert, key = self._pair
            return grpc.ssl_server_certificate_configuration([(key, cert)])

        # grpcio's stubs don't know of None, which its documentation names.
        return grpc.dynamic_ssl_server_credentials(configuration(), newest)  # type: ignore[arg-type]

    async def watch(self) -> None:
        """Look at the files every two seconds, until cancelled."""
        newest, before = list(self._pair), self._pair
        while True:
            await asyncio.sleep(POLL_S)
            for index, file in enumerate(self._files):
                try:
                    newest[index] = await file.changed() or newest[index]
                except OSError as error:
                    log.error("%s %s can't be read; the old certificate is shown on: %s", file.flag, file.path, error)
            pair = (newest[0], newest[1])
            if pair not in (self._pair, self._failed):
                await self._renew(pair, settled=pair == before)
            before = pair

    async def _renew(self, pair: tuple[bytes, bytes], settled: bool) -> None:
        """Show a new pair, if it can be used. One that can't is complained of once it is `settled`: the same at two
        looks: kubelet may swap the folder between the two files of one."""
        with _on_disk(pair) as (cert, key):
            try:
                await asyncio.to_thread(_load, self._new_context(), cert, key)
            except (OSError, ValueError) as error:
                if not settled:
                    return
                # Said once of one pair.
                self._failed = pair
                self._count(False)
                log.error("the old certificate is shown on: the files that changed can't be used: %s", error)
                return
            # In the thread of the handshakes: a context may not change while one begins.
            for each in self._contexts:
                _load(each, cert, key)
        self._pair, self._failed = pair, None
        self._count(True)
        log.info("%s changed: new connections see the new certificate", self._files[0].path)

    def _read(self) -> tuple[bytes, bytes]:
        """Both files.

        Raises:
            ConfigError: one can't be read.
        """
        found = []
        for each in self._files:
            try:
                found.append(each.path.read_bytes())
            except OSError as error:
                raise ConfigError(f"{each.flag} {each.path} can't be read: {error.strerror}") from error
        return found[0], found[1]

    def _new_context(self) -> ssl.SSLContext:
        made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        if self._minimum:
            if self._minimum not in _VERSIONS:
                raise ConfigError(f"the variable {MIN_VERSION} is {self._minimum!r}, not {' or '.join(_VERSIONS)}")
            made.minimum_version = _VERSIONS[self._minimum]
        if self._ciphers:
            try:
                made.set_ciphers(self._ciphers)
            except ssl.SSLError as error:
                raise ConfigError(f"the variable {CIPHERS} names no cipher that OpenSSL has") from error
        return made


def _load(context: ssl.SSLContext, cert: str, key: str) -> None:
    def no_password() -> bytes:
        raise ValueError("the private key is encrypted; a server that starts by itself needs one that is not")

    context.load_cert_chain(cert, key, password=no_password)


@contextlib.contextmanager
def _on_disk(pair: tuple[bytes, bytes]) -> Iterator[tuple[str, str]]:
    """Paths with these contents, since OpenSSL takes no bytes from Python. Where there is a choice, in memory."""
    if hasattr(os, "memfd_create"):
        handles = [os.memfd_create("kserve-vllm-tls") for _ in pair]
        try:
            for handle, content in zip(handles, pair, strict=True):
                os.write(handle, content)
            yield f"/proc/self/fd/{handles[0]}", f"/proc/self/fd/{handles[1]}"
        finally:
            for handle in handles:
                os.close(handle)
        return
    with tempfile.NamedTemporaryFile() as cert, tempfile.NamedTemporaryFile() as key:  # readable by this user alone
        for file, content in zip((cert, key), pair, strict=True):
            file.write(content)
            file.flush()
        yield cert.name, key.name
