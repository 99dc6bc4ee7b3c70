"""Before the engine, with a stand-in for vLLM's client that notes what it is asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from kserve_vllm.app.compose import Composition
from kserve_vllm.cli import command as cli
from kserve_vllm.core.errors import Forbidden, RateLimited
from kserve_vllm.core.lifecycle import Lifecycle
from kserve_vllm.core.request_context import Access, RequestContext, current
from kserve_vllm.core.types import Priority, Work
from kserve_vllm.engine.hooks.submission import SubmissionHooks
from kserve_vllm.policy.enforcement import Policies
from kserve_vllm.policy.enforcement import SequencePolicy as TheDoor
from kserve_vllm.policy.tenants import Caller
from kserve_vllm.telemetry.metrics import Metrics

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


class SequencePolicy:
    """Lets pass, or refuses."""

    def __init__(self, refusal: RateLimited | None = None) -> None:
        self.refusal = refusal
        self.work: list[Work] = []

    def permit(self, context: RequestContext, adapter: str | None, asked: str | None = None) -> None:
        """Every model is open."""

    def knows_base(self, context: RequestContext) -> bool:
        """Everybody knows."""
        return True

    async def take_up(self, context: RequestContext, work: Work) -> None:
        """Note the work."""
        self.work.append(work)
        if self.refusal is not None:
            raise self.refusal

    def answer_filter(self, context: RequestContext) -> None:
        """Nobody looks at answers."""

    def asking(self, context: RequestContext, request_id: str) -> None:
        """There is no cache."""


def ask(
    sequences: SequencePolicy,
    prioritized: bool,
    method: str = "generate",
    priority_of: Priority | None = Priority.BATCH,
    **options: Any,
) -> tuple[Client, RequestContext, list[Any]]:
    """One request of a class."""
    client = Client()
    SubmissionHooks(client, sequences, prioritized)
    context = RequestContext("r", "openai", "/v1/completions", access=Access(priority=priority_of))

    async def run() -> list[Any]:
        current.set(context)
        return [output async for output in getattr(client, method)(PROMPT, PARAMS, "r", **options)]

    return client, context, asyncio.run(run())


@pytest.mark.parametrize("method", ["generate", "encode"])
def test_the_class_becomes_vllms_priority_whatever_the_client_asked_for(method: str) -> None:
    client, _, outputs = ask(SequencePolicy(), True, method, priority=-100)
    assert client.asked[0]["priority"] == 4
    assert outputs == ["output"]


@pytest.mark.parametrize("method", ["generate", "encode"])
def test_where_no_class_is_set_the_clients_priority_counts_for_nothing(method: str) -> None:
    client, _, _ = ask(SequencePolicy(), True, method, None, priority=-100)
    assert client.asked[0]["priority"] == Priority.NORMAL


@pytest.mark.parametrize(
    ("arguments", "classes"),
    [
        ([], False),
        (["--scheduling-policy", "priority"], True),
        (["--scheduling-policy=priority"], True),
        (["--scheduling-policy", "fcfs"], False),
        (["--max-concurrent", "8"], True),
    ],
)
def test_who_schedules_by_priority_has_classes(arguments: list[str], classes: bool) -> None:
    settings = cli.resolve(["--demo", *arguments], {})
    lifecycle = Lifecycle()
    assembly = Composition(settings, Metrics(lifecycle, lambda: 0, registry=CollectorRegistry()))
    assert (assembly.policies.default_priority is not None) == classes
    assert assembly.decides == classes


class Names:
    """What a server serves."""

    names = ["served", "served-alias"]


@pytest.mark.parametrize(
    ("models", "adapter", "allowed", "knows"),
    [
        (["upper"], "upper", True, False),
        (["upper"], None, False, False),
        (["upper"], "french", False, False),
        (["served-alias"], None, True, True),
        (["served*"], "upper", False, True),
        (["served-alias"], "served", True, True),
    ],
)
def test_a_key_uses_and_knows_the_models_that_it_is_limited_to(
    models: list[str], adapter: str | None, allowed: bool, knows: bool
) -> None:
    policies = Policies()
    sequences = TheDoor(policies, Names())
    context = RequestContext("r", "openai", "/tokenize", access=Access(caller=Caller(models=(tuple(models),))))
    assert sequences.knows_base(context) == knows
    if allowed:
        sequences.permit(context, adapter)
        return
    with pytest.raises(Forbidden) as caught:
        sequences.permit(context, adapter)
    assert not any(name in caught.value.message for name in Names.names)


def test_without_priority_scheduling_nothing_is_set() -> None:
    client, _, _ = ask(SequencePolicy(), False)
    assert "priority" not in client.asked[0]


def test_prompt_and_all_continuations_are_reserved_under_the_adapters_name() -> None:
    sequences = SequencePolicy()
    ask(sequences, True, lora_request=SimpleNamespace(lora_name="upper"))
    assert sequences.work == [Work("upper", 3 + 2 * 10)]
    ask(sequences, True, "encode")
    assert sequences.work[1] == Work(None, 3)


def test_what_is_refused_is_left_on_the_ticket_and_never_reaches_the_engine() -> None:
    refusal = RateLimited("no")
    sequences = SequencePolicy(refusal)
    client = Client()
    SubmissionHooks(client, sequences, True)
    context = RequestContext("r", "openai", "/v1/completions")

    async def run() -> None:
        current.set(context)
        async for _ in client.generate(PROMPT, PARAMS, "r"):
            pass

    with pytest.raises(RateLimited):
        asyncio.run(run())
    assert context.refusal is refusal
    assert client.asked == []


@pytest.mark.parametrize("arguments", [["--keys-file", "k.yaml"], ["--max-concurrent", "8"]])
def test_classes_switch_vllms_priority_scheduling_on_unless_told_otherwise(arguments: list[str]) -> None:
    argv = cli.resolve(["--demo", *arguments], {}).engine_argv()
    assert "--scheduling-policy=priority" in argv
    argv = cli.resolve(["--demo", *arguments, "--scheduling-policy", "fcfs"], {}).engine_argv()
    assert "--scheduling-policy=priority" not in argv
    assert not any("scheduling-policy" in word for word in cli.resolve(["--demo"], {}).engine_argv())
