"""What a client may make the gRPC server do before it is known, and what callers may do to each other."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from h2.events import ConnectionTerminated
from h2.stream import H2Stream
from h2.windows import WindowManager
from hpack import Encoder

from kserve_vllm.config.settings import ServerSettings
from kserve_vllm.core.errors import ConfigError, InvalidRequest
from kserve_vllm.core.lifecycle import Lifecycle, State
from kserve_vllm.grpc_server import calls as grpc_calls
from kserve_vllm.grpc_server import http2, self_test
from kserve_vllm.grpc_server.receive_buffer import ReceiveBudget, ReceiveShare
from kserve_vllm.policy.enforcement import Enforcement, Policies
from kserve_vllm.policy.tenants import Tenants
from kserve_vllm.protocols.oip.grpc_servicer import SERVICE, Servicer
from kserve_vllm.servers.listeners import GRPCServer
from tests.accounting import recorder
from tests.unit.servers.test_grpc_server import Raw, Running, framed, until

Code = grpc.StatusCode
KEYS = {"alpha": "key-of-alpha", "beta": "key-of-beta"}
INFER = f"/{SERVICE}/ModelInfer"


class Backend:
    """Counts what reaches it, and refuses it."""

    def __init__(self) -> None:
        self.asked = 0

    async def infer(self, *_: Any) -> None:
        self.asked += 1
        raise InvalidRequest("this far and no further")

    async def load(self, name: str) -> None:
        self.asked += 1


class Product:
    """The service as the product serves it, with a key file, on a loop in a thread of its own."""

    def __init__(self, folder: Path, kind: str) -> None:
        keys = [
            {"id": f"{tenant}-key", "tenant": tenant, "sha256": hashlib.sha256(key.encode()).hexdigest()}
            for tenant, key in KEYS.items()
        ]
        (folder / "keys.json").write_text(json.dumps({"keys": keys}))
        self.backend = Backend()
        self.lifecycle = Lifecycle()
        enforcement = Enforcement(self.lifecycle, Policies(tenants=Tenants(str(folder / "keys.json"))))
        for state in (State.LOADING, State.WARMING, State.READY):
            self.lifecycle.to(state)
        self._loop = Running("ours")
        self.servicer = Servicer(self.lifecycle, enforcement, recorder(self.lifecycle))
        self.servicer.attach(self.backend)
        settings = ServerSettings(host="127.0.0.1", grpc_port=0, grpc_server=kind, max_body_mib=1)  # type: ignore[arg-type]
        self._loop.do(self._start(settings))

    async def _start(self, settings: ServerSettings) -> None:
        self._server = GRPCServer(self.servicer, settings, self.lifecycle)
        await self._server.start()

    @property
    def port(self) -> int:
        return self._server.port

    @property
    def services(self) -> grpc_calls.Services:
        """Our own server's."""
        found: grpc_calls.Services = self._server.services  # type: ignore[assignment]
        return found

    def do(self, work: Any) -> Any:
        return self._loop.do(work)

    def end(self) -> None:
        self._loop.do(self._server.stop(0))
        self._loop.end()


@pytest.fixture(params=["own", "grpcio"])
def product(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Product]:
    running = Product(tmp_path, request.param)
    yield running
    running.end()


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Product]:
    running = Product(tmp_path, "own")
    yield running
    running.end()


@pytest.fixture
def ours() -> Iterator[Running]:
    running = Running("ours")
    yield running
    running.end()


def with_key(tenant: str) -> dict[str, str]:
    return {":path": INFER, "authorization": f"Bearer {KEYS[tenant]}"}


# Before the key


@pytest.mark.parametrize("method", ["ModelInfer", "ModelStreamInfer", "ModelMetadata", "RepositoryModelLoad"])
@pytest.mark.parametrize("key", [{}, {"authorization": "Bearer wrong"}, {"x-api-key": "wrong"}], ids=str)
def test_without_a_key_the_headers_alone_are_refused(product: Product, method: str, key: dict[str, str]) -> None:
    """Not a byte of a message has been sent when the answer comes."""
    client = Raw(product.port)
    trailers = client.status(client.ask("", None, end=False, **{":path": f"/{SERVICE}/{method}"}, **key))
    assert trailers["grpc-status"] == str(Code.UNAUTHENTICATED.value[0])
    assert product.backend.asked == 0
    client.sock.close()


@pytest.mark.parametrize("name", ["authorization", "x-api-key", "x-priority"])
def test_of_two_keys_or_classes_neither_is_taken(product: Product, name: str) -> None:
    """As over HTTP: who stands in front of this server may have looked at the other one."""
    both = [("authorization", f"Bearer {KEYS['alpha']}"), (name, "high"), (name, f"Bearer {KEYS['alpha']}")]
    with grpc.insecure_channel(f"127.0.0.1:{product.port}") as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary(INFER)(b"", timeout=20, metadata=both)
    assert caught.value.code() is Code.INVALID_ARGUMENT
    assert f"{name} is given more than once" in str(caught.value.details())
    assert product.backend.asked == 0


def test_what_changes_the_server_is_refused_by_its_headers_too(product: Product) -> None:
    client = Raw(product.port)
    path = {**with_key("alpha"), ":path": f"/{SERVICE}/RepositoryModelLoad"}
    assert client.status(client.ask("", None, end=False, **path))["grpc-status"] == str(Code.PERMISSION_DENIED.value[0])
    client.sock.close()


def test_a_server_that_drains_refuses_by_the_headers(product: Product) -> None:
    product.do(_call(lambda: product.lifecycle.to(State.DRAINING)))
    product.do(_call(lambda: product.lifecycle.to(State.STOPPED)))
    client = Raw(product.port)
    trailers = client.status(client.ask("", None, end=False, **with_key("alpha")))
    assert trailers["grpc-status"] == str(Code.UNAVAILABLE.value[0])
    assert trailers["retry-after"] == "1"
    client.sock.close()


async def _call(work: Callable[[], Any]) -> None:
    work()


def test_health_is_open_and_a_key_lets_a_message_through(product: Product) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{product.port}") as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=20)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        metadata = (("authorization", f"Bearer {KEYS['alpha']}"),)
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(INFER)(b"", timeout=20, metadata=metadata)
    assert caught.value.code() is Code.INVALID_ARGUMENT
    assert product.backend.asked == 1


def test_clients_without_a_key_hold_nothing_and_stand_in_nobodys_way(own: Product) -> None:
    strangers = [Raw(own.port) for _ in range(3)]
    for each in strangers:
        for _ in range(60):
            stream = each.ask("", None, end=False, **{":path": INFER})
            with contextlib.suppress(Exception):  # it may have been told already
                each.h2.send_data(stream, bytes(900))
                each.flush()
    until(lambda: not own.services.open_calls)
    assert own.services.budget.held == own.services.keyless_budget.held == 0
    client = Raw(own.port)
    client.greet()
    stream = client.ask("", None, end=False, **with_key("alpha"))
    # 400 KiB that are no message of the service: it is read whole, and then it can't be decoded.
    message = framed(b"\xff" * (400 << 10))
    _send(client, stream, message)
    assert client.status(stream)["grpc-status"] == str(Code.INVALID_ARGUMENT.value[0])
    for each in [*strangers, client]:
        each.sock.close()


def _send(client: Raw, stream: int, data: bytes) -> None:
    """Send a message of any size to its end, as the windows let it."""
    while data:
        size = min(client.h2.local_flow_control_window(stream), 16_384, len(data))
        if not size:
            client.h2.receive_data(client.sock.recv(65536))
            client.flush()
            continue
        chunk, data = data[:size], data[size:]
        client.h2.send_data(stream, chunk, end_stream=not data)
        client.flush()


def test_a_call_that_needs_no_key_takes_small_messages(own: Product) -> None:
    client = Raw(own.port)
    path = {":path": "/grpc.health.v1.Health/Check"}
    announced = b"\0" + (grpc_calls.KEYLESS_MESSAGE + 1).to_bytes(4, "big")
    trailers = client.status(client.ask("", announced, end=False, **path))
    assert trailers["grpc-status"] == str(Code.RESOURCE_EXHAUSTED.value[0])
    assert client.status(client.ask("", framed(b""), **path))["grpc-status"] == "0"
    client.sock.close()


def test_messages_that_need_no_key_and_are_not_read_end_their_call(own: Product) -> None:
    client = Raw(own.port, window=0)
    client.greet()
    path = {":path": "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"}
    stream = client.ask("", None, end=False, **path)
    listing = framed(b"\x3a\x00")  # list_services: an answer that this client does not take
    client.send(stream, listing * 12_000)
    trailers = client.status(stream)
    assert trailers["grpc-status"] == str(Code.RESOURCE_EXHAUSTED.value[0])
    until(lambda: own.services.keyless_budget.held == 0)
    client.sock.close()


def test_calls_that_need_no_key_are_few_on_one_connection(own: Product, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_calls, "MAX_KEYLESS_STREAMS", 3)
    client = Raw(own.port)
    watch = {":path": "/grpc.health.v1.Health/Watch"}
    streams = [client.ask("", framed(b""), **watch) for _ in range(3)]
    assert client.status(client.ask("", framed(b""), **watch))["grpc-status"] == str(Code.RESOURCE_EXHAUSTED.value[0])
    client.h2.reset_stream(streams[0])
    client.flush()
    assert client.status(client.ask("", framed(b""), **{":path": "/grpc.health.v1.Health/Check"}))["grpc-status"] == "0"
    client.sock.close()


def test_who_has_most_calls_without_a_key_goes_when_there_are_too_many(
    own: Product, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpc_calls, "MAX_KEYLESS_CALLS", 6)
    watch = {":path": "/grpc.health.v1.Health/Watch"}
    greedy, modest = Raw(own.port), Raw(own.port)
    for _ in range(5):
        greedy.ask("", framed(b""), **watch)
    modest.ask("", framed(b""), **watch)
    until(lambda: len(own.services.open_calls) == 6)
    modest.ask("", framed(b""), **watch)
    until(lambda: len(own.services.open_calls) == 2)
    assert any(
        isinstance(e, ConnectionTerminated) for e in greedy.events(lambda e: isinstance(e, ConnectionTerminated))
    )
    for each in (greedy, modest):
        each.sock.close()


def test_the_oldest_stranger_goes_when_there_are_too_many_connections(
    own: Product, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http2, "MAX_CONNECTIONS", 3)
    known = Raw(own.port)
    known.status(known.ask("", framed(b""), **with_key("alpha")))
    strangers = []
    for number in range(4):
        strangers.append(Raw(own.port))
        until(lambda many=number: len(own.services.connections) == min(3, many + 2))
    with contextlib.suppress(ConnectionError):
        while strangers[0].sock.recv(65536):
            pass
    trailers = known.status(known.ask("", framed(b""), **with_key("alpha")))
    assert trailers["grpc-status"] == str(Code.INVALID_ARGUMENT.value[0]), "who has shown a key stays"
    for each in [known, *strangers]:
        each.sock.close()


def test_who_comes_where_all_have_shown_a_key_is_sent_away(own: Product, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http2, "MAX_CONNECTIONS", 1)
    known = Raw(own.port)
    known.status(known.ask("", framed(b""), **with_key("alpha")))
    late = Raw(own.port)
    assert any(isinstance(e, ConnectionTerminated) for e in late.events(lambda e: isinstance(e, ConnectionTerminated)))
    trailers = known.status(known.ask("", framed(b""), **with_key("alpha")))
    assert trailers["grpc-status"] == str(Code.INVALID_ARGUMENT.value[0])
    for each in (known, late):
        each.sock.close()


# Between callers


def test_one_caller_fills_its_own_share_and_not_that_of_others() -> None:
    class Box:
        def __init__(self, share: ReceiveShare) -> None:
            self.share, self.credited = share, 0

        def credit(self) -> None:
            self.credited += 1

    budget = ReceiveBudget(limit=1000, least=10)
    greedy, modest = ReceiveShare(budget), ReceiveShare(budget)
    boxes: list[Any] = [Box(greedy) for _ in range(3)]
    for box in boxes:
        greedy.change(900)
        budget.lets(box)
    assert [budget.refuses(box) for box in boxes] == [True, False, True], "the one that waits longest goes on"
    small: Any = Box(modest)
    modest.change(400)
    assert budget.lets(small)
    assert not budget.refuses(small), "no more than half of the budget, where two have some of it"
    greedy.change(-2700)
    assert boxes[1].credited
    modest.change(-400)
    assert (budget.held, budget.shares) == (0, set())


@pytest.mark.slow
def test_a_tenants_message_comes_whatever_another_tenant_holds(own: Product) -> None:
    """Two of the eight MiB at which parts of messages are refused would be all the others'."""
    holders = []
    for _ in range(3):
        client = Raw(own.port)
        client.greet()
        for _ in range(16):
            stream = client.ask("", None, end=False, **with_key("alpha"))
            part = b"\0" + (1 << 20).to_bytes(4, "big") + bytes(200 << 10)
            _part(client, stream, part)
        holders.append(client)
    until(lambda: own.services.budget.held > own.services.budget.limit)
    honest = Raw(own.port)
    honest.greet()
    stream = honest.ask("", None, end=False, **with_key("beta"))
    _send(honest, stream, framed(b"\xff" * (1 << 20)))
    assert honest.status(stream)["grpc-status"] == str(Code.INVALID_ARGUMENT.value[0])
    for each in [honest, *holders]:
        each.sock.close()
    until(lambda: own.services.budget.held == 0)


def _part(client: Raw, stream: int, data: bytes) -> None:
    """Send what the windows let through, unless the call is refused meanwhile."""
    client.sock.settimeout(0.02)
    for at in range(0, len(data), 16_384):
        with contextlib.suppress(TimeoutError):
            client.h2.receive_data(client.sock.recv(65536))
            client.flush()
        with contextlib.suppress(Exception):
            client.h2.send_data(stream, data[at : at + 16_384])
            client.flush()
    client.sock.settimeout(30)


# The end of a call


@pytest.mark.parametrize("details", ["half \ud800 a pair", "line\r\nbreak", "x" * 20_000, "日本語 50 %"])
def test_a_call_ends_whatever_stands_in_its_status(ours: Running, details: str) -> None:
    async def refuse(request: bytes, context: Any) -> bytes:
        await context.abort(Code.INVALID_ARGUMENT, details, (("why", f"{details[:200]}\n"), ("why-bin", b"\x00")))
        raise AssertionError

    handlers = {"refuse": grpc.unary_unary_rpc_method_handler(refuse, bytes, bytes)}
    ours.services.handlers.append(grpc.method_handlers_generic_handler("my.Own", handlers))
    client = Raw(ours.port)
    trailers = client.status(client.ask("", framed(b""), **{":path": "/my.Own/refuse"}))
    assert trailers["grpc-status"] == str(Code.INVALID_ARGUMENT.value[0])
    assert not ours.services.open_calls
    client.sock.close()


def test_a_call_ends_where_its_status_can_not_be_written(ours: Running) -> None:
    async def refuse(request: bytes, context: Any) -> bytes:
        await context.abort(Code.INVALID_ARGUMENT, "no", ((object(), "not a name"),))
        raise AssertionError

    handlers = {"refuse": grpc.unary_unary_rpc_method_handler(refuse, bytes, bytes)}
    ours.services.handlers.append(grpc.method_handlers_generic_handler("my.Own", handlers))
    client = Raw(ours.port)
    trailers = client.status(client.ask("", framed(b""), **{":path": "/my.Own/refuse"}))
    assert trailers["grpc-status"] == str(Code.INTERNAL.value[0])
    client.sock.close()


@pytest.mark.parametrize("method", ["echo", "count"])
def test_a_client_that_takes_nothing_does_not_hold_up_the_end(ours: Running, method: str) -> None:
    clients = [Raw(ours.port, window=0) for _ in range(3)]
    for client in clients:
        client.ask(method, framed(b"5 1000"))
    until(lambda: len(ours.services.open_calls) == 3)
    began = time.monotonic()
    ours.stop(0.3)
    assert time.monotonic() - began < 0.3 + 4 * grpc_calls.LAST_WORD_S
    assert not ours.services.open_calls
    assert not ours.services.connections
    for client in clients:
        client.sock.close()


# Whether our own server works with what is installed


def test_the_server_that_is_installed_passes_its_own_test() -> None:
    asyncio.run(self_test.check())


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (H2Stream, "acknowledge_received_data"),
        (WindowManager, "process_bytes"),
        (Encoder, "encode"),
        (http2.Connection, "pump_all"),
    ],
)
def test_the_test_fails_where_a_part_of_h2_is_gone(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
    monkeypatch.setattr(self_test, "LIMIT_S", 1.0)
    monkeypatch.setattr(owner, name, _changed)
    with pytest.raises(Exception):  # noqa: B017
        asyncio.run(self_test.check())


def test_the_test_fails_where_the_frame_buffer_has_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from h2.frame_buffer import FrameBuffer

    monkeypatch.setattr(self_test, "LIMIT_S", 1.0)
    monkeypatch.setattr(FrameBuffer, "_headers_buffer", property(_changed), raising=False)
    with pytest.raises(Exception):  # noqa: B017
        asyncio.run(self_test.check())


def _changed(*_: Any, **__: Any) -> Any:
    raise AttributeError("moved")


@pytest.mark.parametrize(
    ("wanted", "fails", "serves", "told"),
    [
        ("auto", False, "_OwnListener", [False]),
        ("auto", True, "_UpstreamListener", [True]),
        ("own", False, "_OwnListener", [False]),
        ("grpcio", True, "_UpstreamListener", [False]),
    ],
)
def test_grpcio_answers_where_ours_does_not_work(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    wanted: Any,
    fails: bool,
    serves: str,
    told: list[bool],
) -> None:
    if fails:
        monkeypatch.setattr(self_test, "check", _changed)
    heard: list[bool] = []

    async def ask() -> str:
        async with serving(wanted, heard.append) as server:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
                answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=20)
            assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
            return type(server.listener).__name__

    assert asyncio.run(ask()) == serves
    assert heard == told
    assert ("failed its test" in caplog.text) == (told == [True])


def test_our_own_server_is_not_replaced_where_it_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_test, "check", _changed)

    async def ask() -> None:
        async with serving("own", lambda fallen: None):
            raise AssertionError

    with pytest.raises(ConfigError, match="--grpc-server own"):
        asyncio.run(ask())


@contextlib.asynccontextmanager
async def serving(wanted: Any, told: Callable[[bool], None]) -> AsyncIterator[GRPCServer]:
    lifecycle = Lifecycle()
    servicer = Servicer(lifecycle, Enforcement(lifecycle), recorder(lifecycle))
    settings = ServerSettings(host="127.0.0.1", grpc_port=0, grpc_server=wanted)
    server = GRPCServer(servicer, settings, lifecycle, on_fallback=told)
    await server.start()
    try:
        yield server
    finally:
        await server.stop(0)
