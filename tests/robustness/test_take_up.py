"""A request whose client goes away while the engine takes it up is aborted, with a stand-in for vLLM's client."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from kserve_vllm.engine.hooks.guards import take_up_whole


class Client:
    """Stands for vLLM's client: has the request on its books before it has answered who it is."""

    def __init__(self, waits: bool, error: Exception | None = None) -> None:
        self.waits, self.error = waits, error
        self.sent = asyncio.Event()
        self.open: set[str] = set()
        self.aborted: list[tuple[str, bool]] = []

    async def add_request(self, request_id: str, *_: Any, **__: Any) -> Any:
        """Take a request up."""
        self.open.add(request_id)
        if self.waits:
            await self.sent.wait()
        if self.error is not None:
            self.open.remove(request_id)
            raise self.error
        return SimpleNamespace(request_id=request_id)

    async def abort(self, request_id: str, internal: bool = False) -> None:
        """Give a request up."""
        self.open.discard(request_id)
        self.aborted.append((request_id, internal))


def test_who_is_cancelled_while_it_is_taken_up_leaves_nothing_running() -> None:
    async def run() -> Client:
        client = Client(waits=True)
        take_up_whole(client)
        task = asyncio.create_task(client.add_request("r"))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert client.open == {"r"}, "it can't be given up before the engine has it"
        client.sent.set()
        for _ in range(5):
            await asyncio.sleep(0)
        return client

    client = asyncio.run(run())
    assert (client.open, client.aborted) == (set(), [("r", True)])


@pytest.mark.parametrize("waits", [True, False])
def test_what_is_taken_up_or_refused_is_told(waits: bool) -> None:
    async def run(client: Client) -> Any:
        take_up_whole(client)
        client.sent.set()
        return await client.add_request("r")

    async def both() -> None:
        client = Client(waits)
        assert (await run(client)).request_id == "r"
        assert (client.open, client.aborted) == ({"r"}, [])
        with pytest.raises(ValueError, match="no"):
            await run(Client(waits, ValueError("no")))

    asyncio.run(both())


def test_who_is_cancelled_while_it_is_refused_aborts_nothing() -> None:
    async def run() -> Client:
        client = Client(True, ValueError("no"))
        take_up_whole(client)
        task = asyncio.create_task(client.add_request("r"))
        await asyncio.sleep(0)
        task.cancel()
        client.sent.set()
        for _ in range(5):
            await asyncio.sleep(0)
        assert task.cancelled()
        return client

    assert asyncio.run(run()).aborted == []
