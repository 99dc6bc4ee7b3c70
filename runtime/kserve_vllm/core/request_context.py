"""What is known about one request, from enforcement to its last token.

A request context is opened where a request comes in, left in a context variable, filled by whoever learns something,
and closed once. What one subject writes stands in a part of its own: enforcement in `access`, tracing in `trace`, the
engine's hooks in `engine`. Nothing here runs per token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from kserve_vllm.core.errors import RequestError

if TYPE_CHECKING:
    from opentelemetry.trace import Span

IDENTIFIED = "kserve_vllm.identified"
"""Key of an ASGI scope: to be called once the request has shown a key, or none is asked for."""


class Rights(Protocol):
    """What the key file says of a caller."""

    @property
    def admin(self) -> bool:
        """Whether it may change the server's state."""

    @property
    def models(self) -> Sequence[Sequence[str]]:
        """Patterns of models and adapters; empty where all are allowed."""

    def may_use(self, names: Iterable[str]) -> bool:
        """Whether one of the names of a model is allowed."""


class Allowance(Protocol):
    """What the limits gave a request."""

    async def reserve(self, tokens: int) -> None:
        """Reserve tokens for one more sequence of it.

        Raises:
            RateLimited: there are not that many left.
        """

    def headers(self) -> list[tuple[str, str]]:
        """What the client is told of its limits."""


@dataclass(slots=True, eq=False)
class Access:
    """Who asks, and what enforcement let it have.

    Attributes:
        tenant: who asks; `none` where there are no keys.
        key_id: the name of the key that was shown, or None; never the key.
        caller: what the key file says of the caller, or None before it is identified.
        priority: the class of the request (`types.Priority`), or None where there are no classes.
        grant: what the limits gave, or None where there are none.
        cache_control: the client's `Cache-Control`, in lower case.
    """

    tenant: str = "none"
    key_id: str | None = None
    caller: Rights | None = None
    priority: int | None = None
    grant: Allowance | None = None
    cache_control: str = ""


@dataclass(slots=True, eq=False)
class Trace:
    """Where a request stands in its trace (W3C Trace Context).

    Attributes:
        trace_id: 32 hexadecimal digits, or None.
        sampled: whether the trace is recorded, here or by the caller.
        headers: to hand on, with this request as the parent.
        span: the tracer's own object.
    """

    trace_id: str | None = None
    sampled: bool = False
    headers: Mapping[str, str] | None = None
    span: Span | None = None


@dataclass(slots=True, eq=False)
class EngineFigures:
    """What the engine did for a request, summed over its sequences.

    Attributes:
        sequences: continuations (or pooled texts) that the engine took up.
        finished, aborted, failed: how many of them ended in which way.
        stuck: whether a sequence with a grammar failed at its first token, or anywhere where tokens were banned beside
            it.
        prompt_tokens, cached_tokens, output_tokens: sums over all sequences; a prompt counts once for all its `n`.
        replayed_tokens: those of them that came out of the response cache and cost the engine nothing.
        first_token_at: when the first token of any sequence came, in seconds of the wall clock.
        queue_s, prefill_s: longest time of a sequence in the engine's queue and in prefill, in seconds.
        decode_s, gaps: seconds between the first and the last token, and number of tokens after the first, summed.
        preemptions: how often the scheduler took a sequence back.
        finish_reasons: one per finished sequence.
        phases: (name, start, end) of the engine's phases of the first sequences, in seconds of the wall clock.
        sampling: sampling parameters worth showing on a span.
    """

    sequences: int = 0
    finished: int = 0
    aborted: int = 0
    failed: int = 0
    stuck: bool = False
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    replayed_tokens: int = 0
    first_token_at: float | None = None
    queue_s: float | None = None
    prefill_s: float | None = None
    decode_s: float = 0.0
    gaps: int = 0
    preemptions: int = 0
    finish_reasons: list[str] = field(default_factory=list)
    phases: list[tuple[str, float, float]] = field(default_factory=list)
    sampling: dict[str, int | float] = field(default_factory=dict)

    @property
    def unfinished(self) -> int:
        """Sequences of which the engine has not said how they ended."""
        return max(0, self.sequences - self.finished - self.aborted - self.failed)

    @property
    def itl_s(self) -> float | None:
        """Mean seconds between two tokens, or None where there were not two."""
        return self.decode_s / self.gaps if self.gaps else None


@dataclass(slots=True, eq=False)
class RequestContext:
    """One request of a client.

    Attributes:
        request_id: the client's `x-request-id`, or one that was made for it.
        protocol: `openai`, `v2`, `generate`, `v1` or `grpc`.
        endpoint: route template or gRPC method; `other` for a path that nothing serves.
        quiet: whether its log line has the level debug, as for questions about models.
        model: the name that was asked for, as the client wrote it, or None.
        base_model, adapter: what the engine worked with; `adapter` is None for the base model itself.
        access, trace, engine: what enforcement, tracing and the engine's hooks know of it.
        cache: `hit`, `miss` or `bypass` where there is a response cache, else None.
        cut_off: whether the moderation ended an answer that had begun.
        refusal: why the request was turned away at the engine, where that happened.
        answer_headers: headers to add to the start of the answer.
        closers: called once with the request context when it is closed.
        status: HTTP status or gRPC status name of the answer; None while there is none.
        error: what went wrong, if anything was raised.
        outcome, duration_s: what became of the request, and its seconds from arrival to end; set when it is closed.
        started, started_at: its arrival, in seconds of the monotonic and of the wall clock.
    """

    request_id: str
    protocol: str
    endpoint: str
    quiet: bool = False
    model: str | None = None
    base_model: str | None = None
    adapter: str | None = None
    access: Access = field(default_factory=Access)
    trace: Trace = field(default_factory=Trace)
    engine: EngineFigures = field(default_factory=EngineFigures)
    cache: str | None = None
    cut_off: bool = False
    refusal: RequestError | None = None
    answer_headers: list[tuple[str, str]] = field(default_factory=list)
    closers: list[Callable[[RequestContext], None]] = field(default_factory=list)
    status: int | str | None = None
    error: BaseException | None = None
    outcome: str | None = None
    duration_s: float = 0.0
    started: float = field(default_factory=time.monotonic)
    started_at: float = field(default_factory=time.time)

    @property
    def ttft_s(self) -> float | None:
        """Seconds from the request's arrival to its first token, or None."""
        first = self.engine.first_token_at
        return None if first is None else max(0.0, first - self.started_at)


current: ContextVar[RequestContext | None] = ContextVar("request_context", default=None)
"""The request context of the request that the running task works for."""
