"""Plain values that protocols and the engine exchange. No transport and no vLLM type is in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum


class Priority(IntEnum):
    """Classes of requests, the most urgent first; vLLM's priority scheduling takes the number."""

    CRITICAL = 0
    HIGH = 1
    NORMAL = 2
    LOW = 3
    BATCH = 4


@dataclass(frozen=True, slots=True)
class Work:
    """A sequence that the engine is about to take up.

    Attributes:
        adapter: name of the adapter, None for the base model.
        tokens: most tokens that it can use: prompt plus what may be generated, in all its continuations.
    """

    adapter: str | None
    tokens: int


@dataclass(frozen=True)
class TextJob:
    """One prompt to be continued.

    Attributes:
        model: served name of the base model or of an adapter.
        prompt: text or token ids, shape [prompt tokens]; None where `messages` is given.
        messages: a conversation in OpenAI's form, put through the model's chat template.
        options: sampling parameters under OpenAI's (and vLLM's) names.
        stream: whether pieces are wanted as they come, or one at the end.
        request_id: for logs and for vLLM's own id.
        trace_headers: W3C trace context of the caller.
    """

    model: str
    request_id: str
    prompt: str | Sequence[int] | None = None
    messages: Sequence[Mapping[str, object]] | None = None
    options: Mapping[str, object] = field(default_factory=dict)
    stream: bool = False
    trace_headers: Mapping[str, str] | None = None


@dataclass(slots=True)
class Piece:
    """A part of one continuation: everything when not streamed, else what is new.

    Attributes:
        index: which of the `n` continuations.
        text: generated text.
        token_ids: generated token ids.
        finish_reason: `stop`, `length`, ... on the last piece, else None.
        cumulative_logprob: natural log of the probability of all tokens so far, if logprobs were asked for.
        logprobs: per generated token, token id to {`logprob`, `rank`, `decoded_token`}, if asked for.
        prompt_tokens: length of the prompt in tokens.
        last: whether this is the job's last piece, of all its continuations.
        stop_reason: the stop text or token that ended it, on the last piece; None where the model ended by itself.
    """

    index: int
    text: str
    token_ids: Sequence[int]
    finish_reason: str | None
    cumulative_logprob: float | None
    logprobs: list[dict[str, dict[str, object]]] | None
    prompt_tokens: int
    last: bool
    stop_reason: int | str | None = None


@dataclass(frozen=True)
class ModelInfo:
    """A name that clients can ask for.

    Attributes:
        name: served name.
        root: folder or hub id of its weights.
        parent: the base model's name for an adapter, else None.
        loaded: whether requests for it are served now.
        error: what is wrong with it, or None.
    """

    name: str
    root: str
    parent: str | None
    loaded: bool
    error: str | None = None
