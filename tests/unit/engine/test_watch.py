"""The watch over the engine, whose sign of life is given by hand: what counts as hanging."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from kserve_vllm.engine import vllm
from kserve_vllm.engine.vllm import VLLMEngine


class Engine:
    """Stands for the engine that is watched.

    Attributes:
        answers: whether it gives a sign of life.
        in_flight: whether it has requests.
        asked: what it was asked, in order.
        gone: what the watch said of it.
    """

    def __init__(self) -> None:
        self.answers = True
        self.gone: list[str] = []
        self.killed = False
        self.in_flight = True
        self.asked: list[str] = []
        self.client = SimpleNamespace(
            errored=False,
            collective_rpc=self._check,
            is_paused=self._check,
            output_processor=SimpleNamespace(has_unfinished_requests=lambda: self.in_flight),
        )
        self._channel = None

    async def _check(self, method: str = "is_paused") -> None:
        self.asked.append(method)
        if not self.answers:
            await asyncio.Event().wait()
        # As over a socket: the answer is there, and reading it takes some turns of the loop.
        until = time.monotonic() + 0.1
        while time.monotonic() < until:
            await asyncio.sleep(0.01)
        for _turn in range(5):
            await asyncio.sleep(0)

    def kill(self) -> None:
        """Note it."""
        self.killed = True

    def watched(self) -> asyncio.Task[None]:
        """The watch, with a sign of life owed for 0.3 s at most."""
        engine: Any = self
        return asyncio.create_task(VLLMEngine.watch(engine, 0.05, 0.3, self.gone.append))


@pytest.mark.parametrize("in_flight", [True, False])
def test_an_engine_that_owes_its_answer_is_killed(in_flight: bool) -> None:
    async def main() -> None:
        engine = Engine()
        engine.in_flight = in_flight
        engine.answers = False
        began = time.monotonic()
        await engine.watched()
        assert engine.gone == ["the engine has not answered for 0.3 s"]
        assert engine.killed
        assert time.monotonic() - began < 2

    asyncio.run(main())


@pytest.mark.slow
def test_an_event_loop_that_was_held_up_is_not_taken_for_a_hanging_engine() -> None:
    async def main() -> None:
        engine = Engine()
        watch = engine.watched()
        for _ in range(8):
            await asyncio.sleep(0.08)
            time.sleep(0.5)  # noqa: ASYNC251 - this is what it is about
        assert not engine.gone
        watch.cancel()

    asyncio.run(main())


def test_workers_are_asked_while_requests_are_in_flight_and_seldom_else(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        engine = Engine()
        engine.in_flight = False
        watch = engine.watched()
        await until(lambda: len(engine.asked) >= 2)
        assert set(engine.asked) == {"is_paused"}
        engine.in_flight = True
        await until(lambda: "check_health" in engine.asked)
        engine.in_flight = False
        await until(lambda: engine.asked[-1] == "is_paused")
        watch.cancel()
        # Now and then, workers that nobody needs are asked too.
        monkeypatch.setattr(vllm, "IDLE_WORKERS_EVERY_S", 0.3)
        engine.asked.clear()
        watch = engine.watched()
        await until(lambda: engine.asked.count("check_health") == 2)
        assert "is_paused" in engine.asked
        watch.cancel()

    asyncio.run(main())


async def until(done: Callable[[], bool]) -> None:
    """Wait for it, 20 s at most."""
    async with asyncio.timeout(20):
        while not done():
            await asyncio.sleep(0.02)


def test_a_dead_engine_is_told() -> None:
    async def main() -> None:
        engine = Engine()
        watch = engine.watched()
        await asyncio.sleep(0.1)
        engine.client.errored = True
        await asyncio.wait_for(watch, 1)
        assert engine.gone == ["the engine process died"]

    asyncio.run(main())
