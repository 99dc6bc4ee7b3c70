"""What is known about one request, from enforcement to its last token.

A request context is opened where a request comes in, left in a context variable, filled by whoever learns something,
and closed once. Nothing here runs per token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kserve_vllm.core.errors import RequestError

if TYPE_CHECKING:
    from opentelemetry.trace import Span


@dataclass(slots=True, eq=False)
class RequestContext:
    """One request of a client.

    Attributes:
        request_id: the client's `x-request-id`, or one that was made for it.
        protocol: `openai`, `v2`, `generate`, `v1` or `grpc`.
        endpoint: route template or gRPC method; `other` for a path that nothing serves.
        quiet: whether its log line has the level debug, as for questions about models.
        tenant: who asks; `none` where there are no keys.
        key_id: the name of the key that was shown, or None; never the key.
        caller: what the key file says of the caller, as enforcement left it.
        priority: the class of the request (`types.Priority`), or None where there are no classes.
        cache_control: the client's `Cache-Control`, in lower case.
        cache: `hit`, `miss` or `bypass` where there is a response cache, else None.
        grant: what the limits gave, or None.
        cut_off: whether the moderation ended an answer that had begun.
        refusal: why the request was turned away at the engine, where that happened.
        answer_headers: headers to add to the start of the answer.
        closers: called once with the request context when it is closed.
        model: the name that was asked for, as the client wrote it, or None.
        base_model, adapter: what the engine worked with; `adapter` is None for the base model itself.
        trace_id: 32 hexadecimal digits, or None.
        sampled: whether the trace is recorded, here or by the caller.
        trace_headers: W3C trace context to hand on, with this request as the parent.
        span: the tracer's own object.
        status: HTTP status or gRPC status name of the answer; None while there is none.
        outcome, duration_s: what became of the request, and its seconds from arrival to end; set when it is closed.
        error: what went wrong, if anything was raised.
        sequences: continuations (or pooled texts) that the engine took up, and how many of them finished, were
            aborted, or failed.
        stuck: whether a sequence with a grammar failed at its first token, or anywhere where tokens were banned beside
            it.
        prompt_tokens, cached_tokens, output_tokens: sums over all sequences; a prompt counts once for all its `n`.
        replayed_tokens: those of them that came out of the response cache and cost the engine nothing.
        first_token_at: when the first token of any sequence came, in seconds of the wall clock.
        queue_s, prefill_s: longest time of a sequence in the engine's queue and in prefill, in seconds.
        decode_s, gaps: seconds between the first and the last token, and number of tokens after the first, summed.
        preemptions: how often the scheduler took a sequence back.
        finish_reasons: one per finished sequence.
        sampling: sampling parameters worth showing on a span.
    """

    request_id: str
    protocol: str
    endpoint: str
    quiet: bool = False
    tenant: str = "none"
    key_id: str | None = None
    caller: Any = None
    priority: int | None = None
    cache_control: str = ""
    cache: str | None = None
    grant: Any = None
    cut_off: bool = False
    refusal: RequestError | None = None
    answer_headers: list[tuple[str, str]] = field(default_factory=list)
    closers: list[Callable[[RequestContext], None]] = field(default_factory=list)
    model: str | None = None
    base_model: str | None = None
    adapter: str | None = None
    trace_id: str | None = None
    sampled: bool = False
    trace_headers: Mapping[str, str] | None = None
    span: Span | None = None
    status: int | str | None = None
    outcome: str | None = None
    duration_s: float = 0.0
    error: BaseException | None = None
    started: float = field(default_factory=time.monotonic)
    started_at: float = field(default_factory=time.time)
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
    """(name, start, end) of the engine's phases of the first sequences, in seconds of the wall clock."""
    sampling: dict[str, int | float] = field(default_factory=dict)

    @property
    def unfinished(self) -> int:
        """Sequences of which the engine has not said how they ended."""
        return max(0, self.sequences - self.finished - self.aborted - self.failed)

    @property
    def ttft_s(self) -> float | None:
        """Seconds from the request's arrival to its first token, or None."""
        return None if self.first_token_at is None else max(0.0, self.first_token_at - self.started_at)

    @property
    def itl_s(self) -> float | None:
        """Mean seconds between two tokens, or None where there were not two."""
        return self.decode_s / self.gaps if self.gaps else None


current: ContextVar[RequestContext | None] = ContextVar("request_context", default=None)
"""The request context of the request that the running task works for."""
