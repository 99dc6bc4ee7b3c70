"""Work that is given up when its client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

import pytest

from kserve_vllm.protocols.http.disconnect import ClientGone, until_disconnect

_SOON_S = 0.05


async def stays() -> dict[str, Any]:
    await asyncio.Event().wait()
    raise AssertionError


async def leaves() -> dict[str, Any]:
    await asyncio.sleep(_SOON_S)
    return {"type": "http.disconnect"}


async def breaks() -> dict[str, Any]:
    await asyncio.sleep(_SOON_S)
    raise RuntimeError("the connection is in no state to be read")


async def value() -> int:
    await asyncio.sleep(0)
    return 7


async def failure() -> int:
    await asyncio.sleep(0)
    raise KeyError("x")


async def endless() -> int:
    await asyncio.Event().wait()
    return 7


async def swallows() -> int:
    """As vLLM's handlers, which answer where they are cancelled."""
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        return 7
    return 8


async def fails_when_given_up() -> int:
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        raise KeyError("x") from None
    return 8


async def alone(work: Awaitable[Any]) -> Any:
    """`work`, after which no task may be left."""
    try:
        return await work
    finally:
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0


def test_a_value_comes_through() -> None:
    assert asyncio.run(alone(until_disconnect(stays, value()))) == 7


def test_an_error_comes_through() -> None:
    with pytest.raises(KeyError):
        asyncio.run(alone(until_disconnect(stays, failure())))


@pytest.mark.parametrize("work", [endless, swallows, fails_when_given_up])
@pytest.mark.parametrize("receive", [leaves, breaks])
def test_work_is_given_up_however_it_ends(receive: Any, work: Any) -> None:
    with pytest.raises(ClientGone):
        asyncio.run(alone(until_disconnect(receive, work())))


def test_a_server_that_stops_is_no_client_that_left() -> None:
    async def both() -> None:
        task = asyncio.create_task(until_disconnect(stays, endless()))
        await asyncio.sleep(_SOON_S)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(both())


def test_a_server_that_stops_while_the_client_leaves_stops() -> None:
    async def both() -> None:
        left = asyncio.Event()

        async def leaves_too() -> dict[str, Any]:
            await left.wait()
            return {"type": "http.disconnect"}

        task = asyncio.create_task(until_disconnect(leaves_too, endless()))
        await asyncio.sleep(_SOON_S)
        left.set()
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(both())
