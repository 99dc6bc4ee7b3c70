"""vLLM's outputs as plain values that can be kept and given again, and what makes two requests the same.

A record is what one `RequestOutput` of a generation with `RequestOutputKind.DELTA` says:

    [finished, cached prompt tokens, prompt tokens newly cached, [part, ...]]

and a part is what is new of one of the `n` continuations:

    [index, text, token ids, finish reason, stop reason, cumulative logprob, logprobs, weight versions]

with logprobs, if asked for, as [[[token id, logprob, rank, decoded token], ...] of one position, ...]. A record that
has just been made has the `RequestOutput` as a fifth value, and vLLM's own objects for its logprobs.

A generation for the cache always runs with DELTA, whatever the first client asked for, so that a client that streams
can join one that doesn't; `flight_params` says at what price.

Written against vLLM 0.32.
"""

from __future__ import annotations

import functools
import math
from array import array
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec
import orjson

if TYPE_CHECKING:
    from vllm.logprobs import Logprob
    from vllm.lora.request import LoRARequest
    from vllm.outputs import CompletionOutput, RequestOutput
    from vllm.sampling_params import RequestOutputKind, SamplingParams

Part: TypeAlias = list[Any]
Record: TypeAlias = list[Any]
"""Lists, as JSON has them: what stands at which place is said above."""

UNSTREAMED_INTERVAL = 16
"""Tokens per piece of a generation whose first client doesn't stream."""

_GREEDY_BELOW = 1e-5  # vLLM's bound on the temperature
# What doesn't change the answer, or follows from the other parameters and the model.
_NOT_IN_KEY = (
    *("output_kind", "stream_interval", "skip_clone"),
    *("output_text_buffer_length", "_eos_token_id", "_all_stop_token_ids", "_bad_words_token_ids"),
    "_watermarking_skipped",
)
# Their results are in no record, or come from elsewhere.
_NOT_CACHEABLE = ("prompt_logprobs", "prompt_logprob_token_ids", "trace_decode_token_ids")
_PROMPT_FIELDS = frozenset({"type", "prompt_token_ids", "prompt", "prompt_token_offsets", "cache_salt", "arrival_time"})
_STORED_REASONS = (None, "stop", "length")


def canonical(
    prompt: object,
    params: SamplingParams,
    reasoning_ended: object = None,
    reasoning_parser_kwargs: object = None,
) -> bytes | None:
    """Everything in a call of vLLM's `generate` that the answer depends on, beside model and adapter.

    Every sampling parameter that vLLM has is in it, also one that this code has never heard of, but for a few named
    above. The vLLM version is in it too. A seed is not where the temperature is 0: it changes nothing.

    Args:
        prompt: a tokenized prompt: vLLM's `TokensInput` or `TokensPrompt`, or token ids, shape [prompt tokens].
        params: with `max_tokens` resolved.
        reasoning_ended: as handed to `generate`.
        reasoning_parser_kwargs: as handed to `generate`.

    Returns:
        bytes, or None where the answer must not be kept: it depends on chance (temperature above 0 and no seed), or
        on something that this code doesn't know (images, embeddings, KV transfer, plugins' arguments), or has parts
        that no record holds (logprobs of the prompt).
    """
    if params.temperature >= _GREEDY_BELOW and params.seed is None:
        return None
    if params.flat_logprobs or params.extra_args or any(getattr(params, name) is not None for name in _NOT_CACHEABLE):
        return None
    salt = None
    ids: object = prompt
    if isinstance(prompt, dict):
        if any(value is not None and name not in _PROMPT_FIELDS for name, value in prompt.items()):
            return None
        ids, salt = prompt.get("prompt_token_ids"), prompt.get("cache_salt")
    if not isinstance(ids, (list, tuple)) or not ids:
        return None
    fields = msgspec.structs.asdict(params)
    for name in _NOT_IN_KEY:
        fields.pop(name, None)
    if params.temperature < _GREEDY_BELOW:
        del fields["seed"]
    if params.logit_bias is not None:
        fields["logit_bias"] = sorted(params.logit_bias.items())
    try:
        if params.structured_outputs is not None:
            # vLLM notes in the private ones which backend it has taken.
            given = vars(params.structured_outputs)
            fields["structured_outputs"] = {name: given[name] for name in given if name[0] != "_"}
        head = [_vllm_version(), fields, salt, reasoning_ended, reasoning_parser_kwargs]
        # Keys are not sorted: a model fills a JSON schema in the order of its properties. Where the list's brackets
        # close it ends, so token ids can follow without a separator.
        return msgspec.json.encode(head) + array("I", ids).tobytes()
    except (TypeError, ValueError, OverflowError, RecursionError):
        return None


@functools.cache
def _vllm_version() -> str:
    from vllm.version import __version__

    return str(__version__)


def flight_params(params: SamplingParams) -> SamplingParams:
    """Parameters for a generation that several clients may read: the same, in pieces.

    Where the client does not stream, vLLM would make one output at the end; a piece is made of every 16 tokens
    instead, which costs the event loop one output and one wake-up per 16 tokens (per token where it streams, as
    ever). Who joins such a generation with a stream gets it in these pieces.
    """
    from vllm.sampling_params import RequestOutputKind

    copy = params.clone()
    if params.output_kind != RequestOutputKind.DELTA:
        copy.stream_interval = max(params.stream_interval or 1, UNSTREAMED_INTERVAL)
    copy.output_kind = RequestOutputKind.DELTA
    return copy


async def records(outputs: AsyncGenerator[RequestOutput, None]) -> AsyncGenerator[Record, None]:
    """The records of a generation; closes it."""
    try:
        async for output in outputs:
            yield to_record(output)
    finally:
        await outputs.aclose()


def to_record(output: RequestOutput) -> Record:
    """What one output with DELTA says."""
    return [
        output.finished,
        output.num_cached_tokens,
        output.num_cache_creation_tokens,
        [
            [
                part.index,
                part.text,
                list(part.token_ids),
                part.finish_reason,
                part.stop_reason,
                part.cumulative_logprob,
                part.logprobs,
                [[span.version, span.start, span.end] for span in part.weight_versions]
                if part.weight_versions
                else None,
            ]
            for part in output.outputs
        ],
        output,
    ]


class CacheCodec:
    """Records as JSON, for `policy.response_cache`."""

    def pack(self, piece: Record) -> bytes | None:
        """A record as JSON, or None: the generation was aborted or failed, or the record can't hold all of it."""
        if len(piece) > 4 and _has_more(piece[4]):
            return None
        parts = []
        for part in piece[3]:
            cumulative, logprobs = part[5], part[6]
            if part[3] not in _STORED_REASONS or (cumulative is not None and not math.isfinite(cumulative)):
                return None
            if logprobs and isinstance(logprobs[0], dict):
                positions = []
                for position in logprobs:
                    entries = [[t, e.logprob, e.rank, e.decoded_token] for t, e in position.items()]
                    if any(math.isnan(entry[1]) for entry in entries):
                        return None
                    positions.append(entries)
                part = [*part[:6], positions, part[7]]
            parts.append(part)
        try:
            return orjson.dumps([*piece[:3], parts])
        except TypeError:  # half of a surrogate pair, a number of numpy's
            return None

    def unpack(self, value: bytes) -> list[Record]:
        """Records of a JSON list.

        Raises:
            ValueError: it is none, or not of records.
        """
        found = orjson.loads(value)
        if not isinstance(found, list) or not all(
            isinstance(record, list) and len(record) == 4 and isinstance(record[3], list) for record in found
        ):
            raise ValueError("not a list of records")
        return found

    def ends(self, piece: Record) -> bool:
        """Whether all continuations are complete with this record."""
        return bool(piece[0])


def _has_more(output: RequestOutput) -> bool:
    """Whether an output has parts that no record holds. Timings don't count; a replay has none."""
    return (
        output.prompt_logprobs is not None
        or output.prompt_token_id_logprobs is not None
        or output.kv_transfer_params is not None
        or output.ec_transfer_params is not None
        or output.encoder_prompt_token_ids is not None
        or any(
            part.routed_experts is not None or part.sampling_mask is not None or part.spec_decode_metrics is not None
            for part in output.outputs
        )
    )


@dataclass(slots=True)
class Figures:
    """What was given to a client, for its usage; counted while it is given.

    Attributes:
        prompt_tokens: length of the prompt.
        output_tokens: sum over all continuations.
        finish_reasons: one per continuation that has ended.
    """

    prompt_tokens: int = 0
    output_tokens: int = 0
    finish_reasons: list[str] = field(default_factory=list)


async def replay(
    source: AsyncIterator[Record],
    kind: RequestOutputKind,
    request_id: str,
    prompt_token_ids: Sequence[int],
    prompt: str | None = None,
    lora_request: LoRARequest | None = None,
    figures: Figures | None = None,
) -> AsyncGenerator[RequestOutput, None]:
    """Give records to one client as the outputs that vLLM would have made for it.

    Args:
        source: records of a generation that runs, or stored ones; closed in the end where it can be.
        kind: DELTA: an output per record; CUMULATIVE: the same, each with everything so far; FINAL_ONLY: one output
            with all continuations, by index.
        request_id: this client's.
        prompt_token_ids: shape [prompt tokens].
        prompt: its text, as this client sent it.
        lora_request: the adapter.
        figures: filled in.
    """
    from vllm.sampling_params import RequestOutputKind

    vllm = _classes()
    prompt_ids = list(prompt_token_ids)
    if figures is not None:
        figures.prompt_tokens = len(prompt_ids)
    whole: dict[int, _Whole] = {}

    def output(record: Record, parts: list[CompletionOutput]) -> RequestOutput:
        live: RequestOutput | None = record[4] if len(record) > 4 else None
        made: RequestOutput = vllm.RequestOutput(
            request_id=request_id,
            prompt=prompt,
            prompt_token_ids=prompt_ids,
            prompt_logprobs=None,
            outputs=parts,
            finished=record[0],
            lora_request=lora_request,
            num_cached_tokens=record[1],
            num_cache_creation_tokens=record[2],
        )
        if live is not None:
            made.metrics = live.metrics
            made.kv_transfer_params = live.kv_transfer_params
            made.ec_transfer_params = live.ec_transfer_params
        return made

    record: Record | None = None
    try:
        async for record in source:
            if figures is not None:
                for part in record[3]:
                    figures.output_tokens += len(part[2])
                    if part[3] is not None:
                        figures.finish_reasons.append(part[3])
            live = record[4].outputs if len(record) > 4 else [None] * len(record[3])
            if kind == RequestOutputKind.DELTA:
                if len(record) > 4 and record[4].request_id == request_id:
                    yield record[4]  # made for this very client
                    continue
                parts = zip(record[3], live, strict=True)
                yield output(
                    record, [_completion(p, list(p[2]), _positions(p[6]), old, lora_request) for p, old in parts]
                )
                continue
            for part, old in zip(record[3], live, strict=True):
                if part[0] not in whole:
                    whole[part[0]] = _Whole(part[0])
                whole[part[0]].add(part, old)
            if kind == RequestOutputKind.CUMULATIVE:
                yield output(record, [whole[part[0]].completion(lora_request) for part in record[3]])
        if record is not None and kind == RequestOutputKind.FINAL_ONLY:
            yield output(record, [whole[index].completion(lora_request) for index in sorted(whole)])
    finally:
        if isinstance(source, AsyncGenerator):
            await source.aclose()


@functools.cache
def _classes() -> SimpleNamespace:
    """vLLM's classes; an import statement in a function that runs per token would cost more than the rest of it."""
    from vllm.logprobs import Logprob
    from vllm.outputs import CompletionOutput, RequestOutput, SamplingMask, WeightVersionSpan

    return SimpleNamespace(
        Logprob=Logprob,
        CompletionOutput=CompletionOutput,
        RequestOutput=RequestOutput,
        SamplingMask=SamplingMask,
        WeightVersionSpan=WeightVersionSpan,
    )


class _Whole:
    """One continuation, put together of its parts."""

    def __init__(self, index: int) -> None:
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[dict[int, Logprob]] | None = None
        self._last: Part = [index, "", [], None, None, None, None, None]
        self._live: CompletionOutput | None = None
        self._masks: list[list[int]] | None = None

    def add(self, part: Part, live: CompletionOutput | None) -> None:
        """Append what is new."""
        self._texts.append(part[1])
        self._token_ids += part[2]
        positions = _positions(part[6])
        if positions is not None:
            self._logprobs = [] if self._logprobs is None else self._logprobs
            self._logprobs += positions
        self._last, self._live = part, live
        if live is not None and live.sampling_mask is not None:
            self._masks = (self._masks or []) + live.sampling_mask.token_ids

    def completion(self, lora_request: LoRARequest | None) -> CompletionOutput:
        """Everything so far."""
        self._texts = ["".join(self._texts)]
        logprobs = None if self._logprobs is None else list(self._logprobs)
        made = _completion(self._last, list(self._token_ids), logprobs, self._live, lora_request)
        made.text = self._texts[0]
        if self._masks is not None:
            made.sampling_mask = _classes().SamplingMask(list(self._masks))
        return made


def _completion(
    part: Part,
    token_ids: list[int],
    logprobs: list[dict[int, Logprob]] | None,
    live: CompletionOutput | None,
    lora_request: LoRARequest | None,
) -> CompletionOutput:
    index, text, _, reason, stop_reason, cumulative, _, versions = part
    vllm = _classes()
    made: CompletionOutput = vllm.CompletionOutput(
        index=index,
        text=text,
        token_ids=token_ids,
        cumulative_logprob=cumulative,
        logprobs=logprobs,
        finish_reason=reason,
        stop_reason=stop_reason,
        weight_versions=versions and [vllm.WeightVersionSpan(*span) for span in versions],
    )
    if live is not None:
        made.routed_experts = live.routed_experts
        made.sampling_mask = live.sampling_mask
        made.spec_decode_metrics = live.spec_decode_metrics
    return made


def _positions(stored: Sequence[Any] | None) -> list[dict[int, Logprob]] | None:
    """vLLM's logprobs per position."""
    if stored is None:
        return None
    if not stored or isinstance(stored[0], dict):
        return list(stored)
    make = _classes().Logprob
    # JSON has no infinity: it was stored as null.
    return [
        {
            token: make(-math.inf if logprob is None else logprob, rank, decoded)
            for token, logprob, rank, decoded in position
        }
        for position in stored
    ]
