"""Metrics need no key, and cost the server more than whoever asks for them."""

from __future__ import annotations

import asyncio
import time

from kserve_vllm.protocols.http.scrapes import SHARE, Scrapes


def test_however_many_ask_the_loop_is_left_to_others() -> None:
    rendered: list[str] = []

    def render(accept: str) -> tuple[bytes, str]:
        rendered.append(accept)
        ends = time.perf_counter() + 0.005
        while time.perf_counter() < ends:
            pass
        return str(len(rendered)).encode(), "text"

    async def run() -> float:
        scrapes = Scrapes(render)

        async def client(accept: str) -> None:
            while True:
                await scrapes.answer(accept)
                await asyncio.sleep(0)

        began = time.perf_counter()
        accepts = ["", "text/plain", "application/openmetrics-text; version=1.0.0", *map(str, range(20))]
        clients = [asyncio.create_task(client(accept)) for accept in accepts]
        await asyncio.sleep(0.4)
        for each in clients:
            each.cancel()
        return time.perf_counter() - began

    passed_s = asyncio.run(run())
    assert 4 <= len(rendered) <= passed_s * SHARE / 0.005 + 3
    assert set(rendered) == {"", "application/openmetrics-text"}, "a client names no text of its own"


def test_nobody_gets_what_was_rendered_before_it_asked() -> None:
    value = 0

    async def run() -> None:
        nonlocal value

        def render(_: str) -> tuple[bytes, str]:
            time.sleep(0.002)
            return str(value).encode(), "text"

        scrapes = Scrapes(render)
        for value in range(10):
            assert (await scrapes.answer(""))[0] == str(value).encode()
        # One that waits and leaves takes it from no other.
        waiting = [asyncio.create_task(scrapes.answer("")) for _ in range(3)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        value = 99
        assert {found[0] for found in await asyncio.gather(*waiting[1:])} == {b"99"}

    asyncio.run(run())
