"""The two listeners, both open before anything is loaded: HTTP (uvicorn, and HTTP/2 with gRPC beside it) and gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import grpc
import uvicorn
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc

from kserve_vllm.config.settings import ServerSettings
from kserve_vllm.core.errors import ConfigError
from kserve_vllm.core.lifecycle import Lifecycle
from kserve_vllm.grpc_server.health import Health
from kserve_vllm.protocols.oip.grpc_enforcement import Metadata, Screened
from kserve_vllm.protocols.oip.grpc_servicer import SERVICE, Servicer
from kserve_vllm.servers import http1
from kserve_vllm.servers.certificates import Certificates
from kserve_vllm.servers.websocket import Turns, WebSocket

if TYPE_CHECKING:
    from google.protobuf.descriptor import FileDescriptor
    from google.protobuf.descriptor_pool import DescriptorPool
    from google.protobuf.message import Message
    from starlette.types import ASGIApp

    Handler: TypeAlias = grpc.RpcMethodHandler[Message, Message]
    from kserve_vllm.grpc_server.calls import Services
    from kserve_vllm.servers.http2 import HTTP2

log = logging.getLogger(__name__)

_BACKLOG = 2048
_MAX_STREAMS = 1000
# Longer than the idle timeout of the proxies in front (Envoy: 60 s), so that they close first.
_KEEP_ALIVE_S = 75
_MAX_WEBSOCKET_MESSAGE = 16 << 20  # a second of audio has 64 KiB


class _QuietServer(uvicorn.Server):
    """uvicorn without its own signal handlers; the bootstrap owns those."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HTTPServer:
    """Serves one ASGI app on one port.

    Args:
        app: what answers, with its middleware.
        settings: host and bounds.
        port: to listen on; 0 chooses a free one.
        flag: that sets the port, for the error's sentence.
        shared: whether other processes listen on the port too.
        certificates: shown where TLS is on; else None.
        http2: whether HTTP/2 is spoken where the settings want it.

    Raises:
        ConfigError: the port can't be had.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: ServerSettings,
        port: int,
        flag: str = "--http-port",
        shared: bool = False,
        certificates: Certificates | None = None,
        http2: bool = True,
    ) -> None:
        self._socket = _bind(settings.host, port, flag, shared)
        self.connections = http1.HTTPConnections(settings.max_connections)
        """Those that are open."""
        self.http2: HTTP2 | None = None
        config = uvicorn.Config(
            app,
            http=self._connect,  # type: ignore[arg-type]
            ws=partial(WebSocket, Turns()),  # type: ignore[arg-type]
            ws_max_size=_MAX_WEBSOCKET_MESSAGE,
            # A message of 15 MiB can come in as many KiB.
            ws_per_message_deflate=False,
            log_config=None,
            access_log=settings.access_log,
            interface="asgi3",
            lifespan="off",
            timeout_keep_alive=_KEEP_ALIVE_S,
            server_header=False,
            ssl_context_factory=None if certificates is None else lambda config, default: certificates.context(),
            backlog=_BACKLOG,
        )
        config.load()
        self.uvicorn = _QuietServer(config)
        self._task: asyncio.Task[None] | None = None
        if http2 and settings.http2:
            self._begin_http2(settings)

    def _begin_http2(self, settings: ServerSettings) -> None:
        config = self.uvicorn.config
        try:
            from kserve_vllm.servers.http2 import HTTP2
        except ImportError as error:
            self._end_http2(error)
            return
        self.http2 = HTTP2(config.loaded_app, self.connections, settings.max_connections, settings.access_log)
        if config.ssl is not None:
            config.ssl.set_alpn_protocols(["h2", "http/1.1"])

    def _end_http2(self, why: Exception) -> None:
        log.error("HTTP/2 is off: it does not work with the installed h2, which was not tested", exc_info=why)
        self.http2 = None
        if (tls := self.uvicorn.config.ssl) is not None:
            tls.set_alpn_protocols(["http/1.1"])

    def _connect(self, **named: Any) -> http1.HTTP1:
        """The protocol of a new connection, which is HTTP/1.1's until it begins with HTTP/2's preface."""
        return http1.HTTP1(self.connections, self.http2.connect if self.http2 is not None else None, **named)

    @property
    def port(self) -> int:
        """The port that is bound."""
        return int(self._socket.getsockname()[1])

    @property
    def answers_grpc(self) -> bool:
        """Whether gRPC is answered here, since `join`."""
        return self.http2 is not None and self.http2.answers_calls

    async def join(self, grpc_server: GRPCServer | None) -> None:
        """Answer gRPC on this port as well, where HTTP/2 is spoken; to be called once that server has started.

        Where our own server has not shown that it works with the installed `h2`, that is tried here; if it does not,
        this port speaks HTTP/1.1 alone.
        """
        if self.http2 is None:
            return
        services = grpc_server.services if grpc_server is not None else None
        if services is not None:
            services.shared.append(self.http2.connections)
            self.http2.take_calls(services.accept)
            return
        if grpc_server is None:
            self.http2.refuse_calls("gRPC is switched off (--grpc-server off)")
        else:
            self.http2.refuse_calls(
                f"gRPC is answered by grpcio's server, which has port {grpc_server.port} and can't share this one"
                if grpc_server.port
                else "gRPC is not answered: grpcio's server needs a port of its own (--grpc-port)"
            )
        try:
            from kserve_vllm.grpc_server import self_test

            await self_test.check()
        except Exception as error:
            self._end_http2(error)

    def leave(self) -> None:
        """Send clients of HTTP/2 that are connected elsewhere with their next request; open ones go on."""
        if self.http2 is not None:
            self.http2.leave()

    async def settle(self, timeout_s: float) -> None:
        """Wait until clients of HTTP/2 have taken what was answered, up to `timeout_s` seconds."""
        if self.http2 is not None:
            await self.http2.settle(timeout_s)

    def start(self) -> None:
        """Begin to serve, in a task of the running loop."""
        self._task = asyncio.create_task(self.uvicorn.serve(sockets=[self._socket]))

    async def stop(self, grace_s: float) -> None:
        """Close the port, give open connections `grace_s` seconds, then cancel what is left. Clients that do not take
        what is sent to them had their time, and are not waited for."""
        http1.abort_stalled(self.uvicorn.server_state.connections)
        self.uvicorn.config.timeout_graceful_shutdown = max(1, round(grace_s))
        self.uvicorn.should_exit = True
        ending = [self._task] if self._task is not None else []
        await asyncio.gather(*ending, *([self.http2.stop(grace_s)] if self.http2 is not None else []))
        self._socket.close()


class GRPCServer:
    """Serves V2 gRPC, standard health and reflection, on a port of its own and beside HTTP.

    Args:
        servicer: answers the calls.
        settings: host, port, the largest message, and whether the server is ours or gRPC's own.
        lifecycle: the state that health answers read.
        shared: whether other processes listen on the port too.
        own: whether the server may be ours, where the settings want that.
        on_fallback: told once whether gRPC's own server answers since ours failed its test.
        certificates: shown where TLS is on; else None.
        listen: whether it has a port of its own.
    """

    def __init__(
        self,
        servicer: Servicer,
        settings: ServerSettings,
        lifecycle: Lifecycle,
        shared: bool = False,
        own: bool = True,
        on_fallback: Callable[[bool], None] = lambda fallen: None,
        certificates: Certificates | None = None,
        listen: bool = True,
    ) -> None:
        self._certificates = certificates
        self._own = own and "grpc-server" in settings.shortcuts
        self._servicer = servicer
        self._on_fallback = on_fallback
        self._settings = settings
        self._shared = shared
        self._lifecycle = lifecycle
        self.listener: _OwnListener | _UpstreamListener | None = None
        self._health = Health()
        self._listen = listen
        self.port = 0
        """That it listens on; 0: it has none of its own."""

    @property
    def services(self) -> Services | None:
        """What answers calls on other ports, too; None where grpcio's server does, or nothing has started."""
        return self.listener.target if isinstance(self.listener, _OwnListener) else None

    async def start(self) -> None:
        """Open the port.

        Raises:
            ConfigError: the port can't be had, the server that was asked for does not work, or it can't be restricted
                as KServe's variables want it.
        """
        kind = _OwnListener if await self._own_works() else _UpstreamListener
        listener = kind(self._settings, self._shared, self._servicer, self._certificates)
        target = listener.target
        target.add_generic_rpc_handlers((self._servicer.handler(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, target)
        pool = self._servicer.messages.pool
        pool.AddSerializedFile(health_pb2.DESCRIPTOR.serialized_pb)
        names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        pool.AddSerializedFile(reflection_pb2.DESCRIPTOR.serialized_pb)
        servicer = reflection.aio.ReflectionServicer(service_names=names, pool=_Symbols(pool))  # type: ignore[attr-defined]
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(servicer, target)
        if self._listen:
            self.port = await listener.open()
        elif kind is _UpstreamListener:
            log.warning("gRPC is not answered: grpcio's server needs a port of its own (--grpc-port)")
        self.listener = listener
        self._publish(self._lifecycle)
        self._lifecycle.on_change(self._publish)

    async def _own_works(self) -> bool:
        """Whether our own server is wanted and passes its test."""
        wanted = self._settings.grpc_server
        if wanted == "grpcio" or (wanted == "auto" and not self._own):
            self._on_fallback(False)
            return False
        try:
            from kserve_vllm.grpc_server import self_test

            await self_test.check()
        except Exception as error:
            if wanted == "own":
                raise ConfigError(
                    f"--grpc-server own: that server failed its test ({error!r}); the installed h2 may be a version "
                    "that was not tested. Take --grpc-server auto or grpcio"
                ) from error
            log.error(
                "our own gRPC server failed its test, so grpcio's server answers, which takes more CPU for each token; "
                "the installed h2 may be a version that was not tested",
                exc_info=error,
            )
            self._on_fallback(True)
            return False
        self._on_fallback(False)
        return True

    def _publish(self, lifecycle: Lifecycle) -> None:
        self._health.set(("", SERVICE), lifecycle.ready)

    def leave(self) -> None:
        """Send clients that are connected to another server with their next call; open calls go on."""
        if self.listener is not None:
            self.listener.leave()

    async def settle(self, timeout_s: float) -> None:
        """Wait until clients have taken what was answered, up to `timeout_s` seconds."""
        if self.listener is not None:
            await self.listener.settle(timeout_s)

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, give open ones `grace_s` seconds, then cancel what is left."""
        if self.listener is not None:
            await self.listener.close(grace_s)


class _Symbols:
    """A pool of descriptors in which methods and fields are found as well, by which ghz and others ask for their file.

    Args:
        pool: finds services, messages and enums.
    """

    def __init__(self, pool: DescriptorPool) -> None:
        self._pool = pool

    def __getattr__(self, name: str) -> object:
        return getattr(self._pool, name)

    def FindFileContainingSymbol(self, symbol: str) -> FileDescriptor:
        """The pool's.

        Raises:
            KeyError: nothing has this name.
        """
        try:
            return self._pool.FindFileContainingSymbol(symbol)
        except KeyError:
            within, _, name = symbol.rpartition(".")
            found = self._pool.FindFileContainingSymbol(within)
            of_service = found.services_by_name.get(within.rpartition(".")[2])
            if of_service is not None and of_service.full_name == within and name in of_service.methods_by_name:
                return found
            if name not in self._pool.FindMessageTypeByName(within).fields_by_name:
                raise
            return found


class _OwnListener:
    """Our own gRPC server, which costs a tenth of gRPC's for a token."""

    def __init__(
        self, settings: ServerSettings, shared: bool, servicer: Servicer, certificates: Certificates | None
    ) -> None:
        from kserve_vllm.grpc_server.calls import Services

        self._certificates = certificates
        self.target = Services(settings.max_body_mib << 20, settings.body_timeout, servicer.screen)
        self._settings = settings
        self._shared = shared
        self._server: asyncio.Server | None = None

    async def open(self) -> int:
        settings = self._settings
        sock = _bind(settings.host, settings.grpc_port, "--grpc-port", self._shared)
        tls = None if self._certificates is None else self._certificates.context(["h2"])
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self.target.connect, sock=sock, ssl=tls, backlog=_BACKLOG)
        return int(sock.getsockname()[1])

    def leave(self) -> None:
        self.target.leave()

    async def settle(self, timeout_s: float) -> None:
        await self.target.settle(timeout_s)

    async def close(self, grace_s: float) -> None:
        if self._server is not None:
            self._server.close()
        await self.target.stop(grace_s)


class _Screening(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Refuses a call by its headers, before grpcio reads a message of it."""

    def __init__(self, screen: Callable[[str, Metadata], Screened]) -> None:
        self._screen = screen

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        """grpcio's: the handler of a call."""
        found = self._screen(handler_call_details.method, tuple(handler_call_details.invocation_metadata or ()))
        if found.refusal is None:
            return await continuation(handler_call_details)
        code, details, trailing = found.refusal

        async def refuse(_: object, context: grpc.aio.ServicerContext[Message, Message]) -> None:
            await context.abort(code, details, tuple(trailing))

        # Of this kind nothing is read until the handler asks for it.
        return grpc.stream_stream_rpc_method_handler(refuse)


class _UpstreamListener:
    """The server of the grpcio package: where it is asked for, or ours does not work."""

    def __init__(
        self, settings: ServerSettings, shared: bool, servicer: Servicer, certificates: Certificates | None
    ) -> None:
        if certificates is not None and certificates.restricted:
            raise ConfigError(
                "KSERVE_TLS_MIN_VERSION and KSERVE_TLS_CIPHERS can't be given to grpcio's server. Take our own "
                "(--grpc-server own), or switch gRPC off (--grpc-port 0)"
            )
        self._certificates = certificates
        self._settings = settings
        # Without SO_REUSEPORT a second process on the same port fails instead of taking half of the calls.
        self.target = grpc.aio.server(
            interceptors=[_Screening(servicer.screen)],
            options=[
                ("grpc.max_concurrent_streams", _MAX_STREAMS),
                ("grpc.max_receive_message_length", settings.max_body_mib << 20),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", int(shared)),
            ],
        )

    async def open(self) -> int:
        settings = self._settings
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        address = f"{host}:{settings.grpc_port}"
        try:
            if self._certificates is None:
                port = self.target.add_insecure_port(address)
            else:
                port = self.target.add_secure_port(address, self._certificates.grpc_credentials())
        except RuntimeError as error:
            raise ConfigError(f"--grpc-port {settings.grpc_port} can't be opened: {error}") from error
        await self.target.start()
        return port

    def leave(self) -> None:
        """gRPC's server says so when it is stopped, and not before."""

    async def settle(self, timeout_s: float) -> None:
        """gRPC's server does not tell what it still has to send."""

    async def close(self, grace_s: float) -> None:
        await self.target.stop(grace_s)


def reserve(host: str, port: int, flag: str) -> socket.socket:
    """Hold a port for processes that will listen on it together. The socket itself does not listen.

    Raises:
        ConfigError: the port can't be had.
    """
    # Alone first: with SO_REUSEPORT it would be had even where a stranger listens who allows that.
    _bind(host, port, flag).close()
    return _bind(host, port, flag, shared=True)


def _bind(host: str, port: int, flag: str, shared: bool = False) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is named, since asyncio asks for it before it sets TCP_NODELAY on what is accepted.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise ConfigError(f"{flag} {port} can't be opened: {error.strerror}. Choose another one with {flag}") from error
    return sock
