"""How streams are written: all frames of a step before the first write, and few writes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from kserve_vllm.engine.patches.openai_stream import Hub
from kserve_vllm.grpc_server.http2 import Connection, Connections


def test_all_frames_of_a_step_are_made_before_the_first_is_written_and_one_fault_stops_no_other() -> None:
    async def run() -> None:
        done: list[str] = []

        class Stream:
            def __init__(self, name: str) -> None:
                self.name = name

            def wake(self) -> Callable[[], None] | None:
                done.append(f"make {self.name}")
                if self.name == "broken":
                    raise RuntimeError
                return self.write if self.name != "silent" else None

            def write(self) -> None:
                done.append(f"write {self.name}")
                if self.name == "unwritten":
                    raise RuntimeError

        hub = Hub()
        names = ["one", "broken", "silent", "unwritten", "two"]
        for name in names:
            hub.add(Stream(name))  # type: ignore[arg-type]
        await asyncio.sleep(0.01)
        assert done == [*(f"make {name}" for name in names), "write one", "write unwritten", "write two"]

    asyncio.run(run())


class Written(asyncio.Transport):
    """Not a real transport: keeps what is written, write by write."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        self.writes.append(bytes(data))

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return 0

    def close(self) -> None:
        pass


def test_what_a_pass_writes_on_a_grpc_connection_is_one_write_and_much_of_it_does_not_wait() -> None:
    async def run() -> None:
        transport = Written()
        connection = Connection(lambda *_: pytest.fail("nobody asks"), Connections())
        connection.connection_made(transport)
        assert transport.writes == []
        assert not connection.flushed
        await asyncio.sleep(0)
        assert len(transport.writes) == 1
        assert connection.flushed

        for piece in (b"a", b"b", b"c"):
            connection.write(piece)
        await asyncio.sleep(0)
        assert transport.writes[1:] == [b"abc"]

        connection.write(bytes(40 << 10))
        connection.write(b"d")
        assert list(map(len, transport.writes[2:])) == [40 << 10]
        connection.write(b"e")
        connection.close()
        assert transport.writes[3:] == [b"de"]
        connection.write(b"f")
        await asyncio.sleep(0)
        assert len(transport.writes) == 4
        connection.connection_lost(None)

    asyncio.run(run())


def test_the_connections_of_a_pass_are_written_in_a_row_and_one_that_fails_stops_no_other() -> None:
    class Broken(Written):
        def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
            raise OSError

    async def run() -> None:
        connections, transports = Connections(), [Written(), Broken(), Written()]
        made = [Connection(lambda *_: pytest.fail("nobody asks"), connections) for _ in transports]
        for connection, transport in zip(made, transports, strict=True):
            connection.connection_made(transport)
        assert connections == set(made)
        await asyncio.sleep(0)
        assert [len(transport.writes) for transport in transports] == [1, 0, 1]
        for connection in made:
            connection.write(b"a")
            connection.write(b"b")
        await asyncio.sleep(0)
        assert [transport.writes[1:] for transport in transports] == [[b"ab"], [], [b"ab"]]
        for connection in made:
            connection.connection_lost(None)
        assert not connections

    asyncio.run(run())
