"""The watch over the engine, whose sign of life is given by hand: what counts as hanging."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any

from kserve_vllm.engine.vllm import VLLMEngine


class Engine:
    """Stands for the engine that is watched.

    Attributes:
        answers: whether it gives a sign of life.
        gone: what the watch said of it.
    """

    def __init__(self) -> None:
        self.answers = True
        self.gone: list[str] = []
        self.killed = False
        self.client = SimpleNamespace(errored=False, collective_rpc=self._check)
        self._seat = None

    async def _check(self, _: str) -> None:
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


def test_an_engine_that_owes_its_answer_is_killed() -> None:
    async def main() -> None:
        engine = Engine()
        engine.answers = False
        began = time.monotonic()
        await engine.watched()
        assert engine.gone == ["the engine has not answered for 0.3 s"]
        assert engine.killed
        assert time.monotonic() - began < 2

    asyncio.run(main())


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


def test_a_dead_engine_is_told() -> None:
    async def main() -> None:
        engine = Engine()
        watch = engine.watched()
        await asyncio.sleep(0.1)
        engine.client.errored = True
        await asyncio.wait_for(watch, 1)
        assert engine.gone == ["the engine process died"]

    asyncio.run(main())
