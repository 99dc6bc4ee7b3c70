"""Records what vLLM knows of a finished request on the request context under which it was taken up.

vLLM keeps the figures of each request (tokens, queue, first token, decode) in its output processor. They are read there
once, in the same step in which the last output is handed over, so that the request context is complete before the
answer is:
vLLM's stat loggers are told a step later and without the time of the first token. Nothing is added per token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Protocol

from kserve_vllm.core.request_context import RequestContext, current
from kserve_vllm.engine.engine_request import EngineRequest

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.output_processor import OutputProcessor, RequestState

_PHASES_SHOWN = 8  # sequences of one request whose phases become spans
_SHOWN = {"max_tokens": "max_tokens", "temperature": "temperature", "top_p": "top_p", "n": "n"}


class LoRAVersions(Protocol):
    """What the accounting need of the adapters."""

    def admit(self, lora: LoRARequest) -> LoRARequest:
        """The adapter under which a request is run: the given one, or its successor where that is gone."""

    def plain(self, key: str) -> str:
        """The name that clients know for an adapter's name in the engine."""

    def book(self, key: str, requests: int, prompt_tokens: int, output_tokens: int) -> None:
        """Add what a request did with an adapter."""


class TokenAccounting:
    """Watches one output processor of vLLM.

    Args:
        processor: vLLM's `OutputProcessor`; five of its methods are wrapped.
        base_model: tells the served name that requests without an adapter count under.
        loras: the adapters.
    """

    def __init__(self, processor: OutputProcessor, base_model: Callable[[], str], loras: LoRAVersions) -> None:
        self._processor = processor
        self._base_model = base_model
        self._loras = loras
        self.unfinished: dict[str, tuple[RequestContext, RequestState]] = {}
        self._with_grammar: set[str] = set()
        self._with_bans: set[str] = set()
        self._add, processor.add_request = processor.add_request, self.add_request
        self._finish, processor._update_stats_from_finished = processor._update_stats_from_finished, self.finish
        self._abort, processor.abort_requests = processor.abort_requests, self.abort_requests
        self._fail, processor.propagate_error = processor.propagate_error, self.propagate_error
        self._drop, processor._finish_request = processor._finish_request, self.drop

    def add_request(self, request: EngineRequest, *args: object, **kwargs: object) -> None:
        """A sequence is taken up, in the task of the request that it belongs to."""
        if request.lora_request is not None:
            request.lora_request = self._loras.admit(request.lora_request)
        self._add(request, *args, **kwargs)
        context = current.get()
        if context is None or request.request_id in self.unfinished:
            self._finish_session(request.request_id)
            return
        self.unfinished[request.request_id] = context, self._processor.request_states[request.request_id]
        params = request.sampling_params
        if params is not None and getattr(params, "structured_outputs", None) is not None:
            self._with_grammar.add(request.request_id)
            if params.bad_words or params.allowed_token_ids or params.min_tokens or params.logit_bias:
                self._with_bans.add(request.request_id)
        context.engine.sequences += 1
        if self._processor.tracing_enabled:
            request.trace_headers = context.trace.headers
        if context.engine.sequences > 1:
            return
        lora = request.lora_request
        context.base_model = self._base_model()
        context.adapter = self._loras.plain(lora.lora_name) if lora is not None else None
        context.model = context.adapter or context.base_model
        if params := request.sampling_params:
            for name, shown in _SHOWN.items():
                value = getattr(params, name, None)
                if value is not None:
                    context.engine.sampling[shown] = value

    def hand_over(self, left: RequestContext, stays: RequestContext, external_id: str) -> None:
        """Book the open sequences of one call of `generate` on another request, whose client still waits for them.

        Args:
            left: on which they are booked.
            stays: on which they are booked from now on.
            external_id: request id of the call.
        """
        for request_id, (context, state) in self.unfinished.items():
            if context is left and state.external_req_id == external_id:
                self.unfinished[request_id] = stays, state
                left.engine.sequences -= 1
                stays.engine.sequences += 1
                stays.model, stays.base_model, stays.adapter = left.model, left.base_model, left.adapter

    def finish(self, state: RequestState, finish_reason: object, stats: object) -> None:
        """A sequence has its last token."""
        self._finish(state, finish_reason, stats)
        self._book_adapter(state)
        known = self.unfinished.pop(state.request_id, None)
        with_grammar = state.request_id in self._with_grammar
        self._with_grammar.discard(state.request_id)
        with_bans = state.request_id in self._with_bans
        self._with_bans.discard(state.request_id)
        if known is None:
            return
        context, _ = known
        reason = str(finish_reason)
        if reason == "error":
            context.engine.failed += 1
            first = state.detokenizer is None or state.detokenizer.num_output_tokens() <= 1
            context.engine.stuck |= with_grammar and (first or with_bans)
        else:
            context.engine.finished += 1
        context.engine.finish_reasons.append(reason)
        _book(context, state)

    def _finish_session(self, request_id: str) -> None:
        """Book a realtime session that was told its last input when all before was answered: vLLM just drops it."""
        if request_id in self.unfinished and request_id not in self._processor.request_states:
            context, state = self.unfinished.pop(request_id)
            self._with_grammar.discard(request_id)
            self._with_bans.discard(request_id)
            self._book_adapter(state)
            context.engine.finished += 1
            context.engine.finish_reasons.append("stop")
            _book(context, state)

    def _book_adapter(self, state: RequestState) -> None:
        if state.lora_name is not None:
            first = state.parent_req is None or state.request_index == 0
            self._loras.book(state.lora_name, int(first), state.prompt_len if first else 0, _output_tokens(state))

    def abort_requests(self, request_ids: Iterable[str], internal: bool) -> list[str]:
        """Sequences are given up, since their client is gone or the server stops."""
        aborted: list[str] = self._abort(request_ids, internal)
        for request_id in aborted:
            known = self.unfinished.pop(request_id, None)
            self._with_grammar.discard(request_id)
            self._with_bans.discard(request_id)
            if known is not None:
                context, state = known
                self._book_adapter(state)
                context.engine.aborted += 1
                context.engine.finish_reasons.append("abort")
                _book(context, state)
        return aborted

    def drop(self, state: RequestState) -> None:
        """A sequence leaves vLLM's books. One that the engine has refused (from vLLM 0.33 on, as while it is paused)
        does so with an error in its queue and without figures."""
        self._drop(state)
        refused = any(isinstance(getattr(state.queue, name, None), Exception) for name in ("output", "error"))
        known = self.unfinished.pop(state.request_id, None) if refused else None
        if known is not None:
            self._with_grammar.discard(state.request_id)
            known[0].engine.failed += 1

    def propagate_error(self, error: Exception) -> None:
        """The engine failed under everything that is open."""
        for context, _ in self.unfinished.values():
            context.engine.failed += 1
        self._fail(error)


def _output_tokens(state: RequestState) -> int:
    if state.stats is not None:
        return int(state.stats.num_generation_tokens)
    return 0 if state.detokenizer is None else int(state.detokenizer.num_output_tokens())


def _book(context: RequestContext, state: RequestState) -> None:
    """Add one sequence's figures. Time stamps of the engine's clock are used only as differences."""
    figures = context.engine
    if state.parent_req is None or state.request_index == 0:
        figures.prompt_tokens += state.prompt_len
        # A router may have named any number (`--allow-transfer-params`).
        figures.cached_tokens += min(max(0, state.num_cached_tokens), state.prompt_len)
    stats = state.stats
    figures.output_tokens += _output_tokens(state)
    if stats is None:  # --disable-log-stats
        return
    figures.preemptions += stats.num_preemptions
    if stats.scheduled_ts:
        figures.queue_s = max(figures.queue_s or 0.0, stats.scheduled_ts - stats.queued_ts)
    if not stats.num_generation_tokens or not stats.first_token_ts:
        return
    prefill = stats.first_token_ts - stats.scheduled_ts
    decode = stats.last_token_ts - stats.first_token_ts
    figures.prefill_s = max(figures.prefill_s or 0.0, prefill)
    figures.decode_s += decode
    figures.gaps += stats.num_generation_tokens - 1
    first = stats.arrival_time + stats.first_token_latency
    if figures.first_token_at is None or first < figures.first_token_at:
        figures.first_token_at = first
    if context.trace.span is not None and len(figures.phases) < 3 * _PHASES_SHOWN:
        scheduled = first - prefill
        queued = scheduled - (stats.scheduled_ts - stats.queued_ts)
        end = min(first + decode, time.time())
        figures.phases += [("queue", queued, scheduled), ("prefill", scheduled, first), ("decode", first, end)]
