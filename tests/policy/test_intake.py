"""The door of the engine, with a stand-in for vLLM's client that notes what it is asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest

from kserve_vllm import cli
from kserve_vllm.engine.intake import Intake
from kserve_vllm.errors import RateLimited
from kserve_vllm.ticket import Ticket, current
from kserve_vllm.types import Priority, Work

PROMPT = {"type": "token", "prompt_token_ids": [1, 2, 3]}
PARAMS = SimpleNamespace(max_tokens=10, n=2, output_kind=SimpleNamespace(name="DELTA"))


class Client:
    """Stands for vLLM's client."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    async def generate(self, prompt: Any, params: Any, request_id: str, **options: Any) -> AsyncGenerator[str, None]:
        """Note the options and answer once."""
        self.asked.append(options)
        yield "output"

    async def encode(self, prompt: Any, params: Any, request_id: str, **options: Any) -> AsyncGenerator[str, None]:
        """Note the options and answer once."""
        self.asked.append(options)
        yield "output"


class Door:
    """Lets pass, or refuses."""

    def __init__(self, refusal: RateLimited | None = None) -> None:
        self.refusal = refusal
        self.work: list[Work] = []

    async def take_up(self, ticket: Ticket, work: Work) -> None:
        """Note the work."""
        self.work.append(work)
        if self.refusal is not None:
            raise self.refusal

    def answer_filter(self, ticket: Ticket) -> None:
        """Nobody looks at answers."""

    def asking(self, ticket: Ticket, request_id: str) -> None:
        """There is no cache."""


def ask(door: Door, prioritized: bool, method: str = "generate", **options: Any) -> tuple[Client, Ticket, list[Any]]:
    """One request of class batch."""
    client = Client()
    Intake(client, door, prioritized)
    ticket = Ticket("r", "openai", "/v1/completions", priority=Priority.BATCH)

    async def run() -> list[Any]:
        current.set(ticket)
        return [output async for output in getattr(client, method)(PROMPT, PARAMS, "r", **options)]

    return client, ticket, asyncio.run(run())


@pytest.mark.parametrize("method", ["generate", "encode"])
def test_the_class_becomes_vllms_priority_whatever_the_client_asked_for(method: str) -> None:
    client, _, outputs = ask(Door(), True, method, priority=-100)
    assert client.asked[0]["priority"] == 4
    assert outputs == ["output"]


def test_without_priority_scheduling_nothing_is_set() -> None:
    client, _, _ = ask(Door(), False)
    assert "priority" not in client.asked[0]


def test_prompt_and_all_continuations_are_reserved_under_the_adapters_name() -> None:
    door = Door()
    ask(door, True, lora_request=SimpleNamespace(lora_name="upper"))
    assert door.work == [Work("upper", 3 + 2 * 10)]
    ask(door, True, "encode")
    assert door.work[1] == Work(None, 3)


def test_what_is_refused_is_left_on_the_ticket_and_never_reaches_the_engine() -> None:
    refusal = RateLimited("no")
    door = Door(refusal)
    client = Client()
    Intake(client, door, True)
    ticket = Ticket("r", "openai", "/v1/completions")

    async def run() -> None:
        current.set(ticket)
        async for _ in client.generate(PROMPT, PARAMS, "r"):
            pass

    with pytest.raises(RateLimited):
        asyncio.run(run())
    assert ticket.refusal is refusal
    assert client.asked == []


@pytest.mark.parametrize("arguments", [["--keys-file", "k.yaml"], ["--max-concurrent", "8"]])
def test_classes_switch_vllms_priority_scheduling_on_unless_told_otherwise(arguments: list[str]) -> None:
    argv = cli.resolve(["--demo", *arguments], {}).engine_argv()
    assert "--scheduling-policy=priority" in argv
    argv = cli.resolve(["--demo", *arguments, "--scheduling-policy", "fcfs"], {}).engine_argv()
    assert "--scheduling-policy=priority" not in argv
    assert not any("scheduling-policy" in word for word in cli.resolve(["--demo"], {}).engine_argv())
