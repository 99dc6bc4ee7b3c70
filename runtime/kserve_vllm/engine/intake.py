"""The door of the engine: what is asked once per sequence, in the request's own task, whatever the protocol.

vLLM's routers and our own protocols all call `AsyncLLM.generate` and `AsyncLLM.encode`. There the prompt is tokenized,
the number of tokens to generate is resolved and the adapter is known, so this is where models are permitted, tokens
are reserved and priorities are set. The two methods are replaced on the instance, and only where a policy is on.

What is refused here is left on the ticket: vLLM's handlers make an error of their own of every exception, and the edge
answers the one on the ticket instead.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncGenerator, Sized
from typing import Any, Protocol

from kserve_vllm.engine.answers import Filter, check_parameters, filtered
from kserve_vllm.errors import RequestError
from kserve_vllm.ticket import Ticket, current
from kserve_vllm.types import Work


class Door(Protocol):
    """What decides about a sequence."""

    async def take_up(self, ticket: Ticket, work: Work) -> None:
        """Let a sequence pass, or raise a `RequestError`."""

    def answer_filter(self, ticket: Ticket) -> Filter | None:
        """A filter for one answer to this request, or None where nobody looks at its answers."""


class Intake:
    """Stands in front of one vLLM client.

    Args:
        client: vLLM's `AsyncLLM`; its `generate` and `encode` are replaced.
        door: decides.
        prioritized: whether vLLM schedules by priority.
    """

    def __init__(self, client: Any, door: Door, prioritized: bool) -> None:
        self._door = door
        self._prioritized = prioritized
        self._generate, client.generate = client.generate, self.generate
        self._encode, client.encode = client.encode, self.encode

    async def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, **options: Any
    ) -> AsyncGenerator[Any, None]:
        """vLLM's `generate`, once the door lets the sequence pass."""
        ticket = current.get()
        looked_at = ticket is not None and self._door.answer_filter(ticket) is not None
        if ticket is not None:
            tokens = _length(prompt) + (sampling_params.max_tokens or 0) * (sampling_params.n or 1)
            await self._pass(ticket, options, tokens, sampling_params if looked_at else None)
        stream = self._generate(prompt, sampling_params, request_id, **options)
        async with contextlib.aclosing(stream):
            if ticket is not None and looked_at:
                cumulative = sampling_params.output_kind.name == "CUMULATIVE"
                new_filter = functools.partial(self._door.answer_filter, ticket)
                stream = filtered(stream, ticket, new_filter, cumulative)
            async for output in stream:
                yield output

    async def encode(
        self, prompt: Any, pooling_params: Any, request_id: str, lora_request: Any = None, **options: Any
    ) -> AsyncGenerator[Any, None]:
        """vLLM's `encode`, once the door lets the text pass."""
        ticket = current.get()
        options["lora_request"] = lora_request
        if ticket is not None:
            await self._pass(ticket, options, _length(prompt))
        stream = self._encode(prompt, pooling_params, request_id, **options)
        async with contextlib.aclosing(stream):
            async for output in stream:
                yield output

    async def _pass(self, ticket: Ticket, options: dict[str, Any], tokens: int, shown: Any = None) -> None:
        lora = options.get("lora_request")
        try:
            if shown is not None:
                check_parameters(shown)
            await self._door.take_up(ticket, Work(lora.lora_name if lora is not None else None, tokens))
        except RequestError as error:
            ticket.refusal = error
            raise
        if self._prioritized and ticket.priority is not None:
            options["priority"] = ticket.priority


def _length(prompt: Any) -> int:
    """Tokens of a rendered prompt; 0 where it is not tokenized, as audio that streams in."""
    ids = prompt.get("prompt_token_ids") if isinstance(prompt, dict) else getattr(prompt, "prompt_token_ids", None)
    return len(ids) if isinstance(ids, Sized) else 0
