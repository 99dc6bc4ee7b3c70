"""Books what vLLM knows of a finished request on the ticket under which it was taken up.

vLLM keeps the figures of each request (tokens, queue, first token, decode) in its output processor. They are read there
once, in the same step in which the last output is handed over, so that the ticket is complete before the answer is:
vLLM's stat loggers are told a step later and without the time of the first token. Nothing is added per token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from kserve_vllm.ticket import Ticket, current

_PHASES_SHOWN = 8  # sequences of one request whose phases become spans
_SHOWN = {"max_tokens": "max_tokens", "temperature": "temperature", "top_p": "top_p", "n": "n"}


class Accounts:
    """Watches one output processor of vLLM.

    Args:
        processor: vLLM's `OutputProcessor`; four of its methods are wrapped.
        base_model: tells the served name that requests without an adapter count under.
    """

    def __init__(self, processor: Any, base_model: Callable[[], str]) -> None:
        self._processor = processor
        self._base_model = base_model
        self._open: dict[str, tuple[Ticket, Any]] = {}
        self._with_grammar: set[str] = set()
        self._add, processor.add_request = processor.add_request, self.add_request
        self._finish, processor._update_stats_from_finished = processor._update_stats_from_finished, self.finish
        self._abort, processor.abort_requests = processor.abort_requests, self.abort_requests
        self._fail, processor.propagate_error = processor.propagate_error, self.propagate_error

    def add_request(self, request: Any, *args: Any, **kwargs: Any) -> None:
        """A sequence is taken up, in the task of the request that it belongs to."""
        self._add(request, *args, **kwargs)
        ticket = current.get()
        if ticket is None or request.request_id in self._open:
            return
        self._open[request.request_id] = ticket, self._processor.request_states[request.request_id]
        if getattr(request.sampling_params, "structured_outputs", None) is not None:
            self._with_grammar.add(request.request_id)
        ticket.sequences += 1
        if self._processor.tracing_enabled:
            request.trace_headers = ticket.trace_headers
        if ticket.sequences > 1:
            return
        lora = request.lora_request
        ticket.base_model = self._base_model()
        ticket.adapter = lora.lora_name if lora is not None else None
        ticket.model = ticket.adapter or ticket.base_model
        if params := request.sampling_params:
            for name, shown in _SHOWN.items():
                value = getattr(params, name, None)
                if value is not None:
                    ticket.sampling[shown] = value

    def hand_over(self, left: Ticket, stays: Ticket, external_id: str) -> None:
        """Book the open sequences of one call of `generate` on another request, whose client still waits for them.

        Args:
            left: on which they are booked.
            stays: on which they are booked from now on.
            external_id: request id of the call.
        """
        for request_id, (ticket, state) in self._open.items():
            if ticket is left and state.external_req_id == external_id:
                self._open[request_id] = stays, state
                left.sequences -= 1
                stays.sequences += 1
                stays.model = left.model

    def finish(self, state: Any, finish_reason: Any, stats: Any) -> None:
        """A sequence has its last token."""
        self._finish(state, finish_reason, stats)
        known = self._open.pop(state.request_id, None)
        with_grammar = state.request_id in self._with_grammar
        self._with_grammar.discard(state.request_id)
        if known is None:
            return
        ticket, _ = known
        reason = str(finish_reason)
        if reason == "error":
            ticket.failed += 1
            ticket.stuck |= with_grammar and (state.detokenizer is None or state.detokenizer.num_output_tokens() <= 1)
        else:
            ticket.finished += 1
        ticket.finish_reasons.append(reason)
        _book(ticket, state)

    def abort_requests(self, request_ids: Iterable[str], internal: bool) -> list[str]:
        """Sequences are given up, since their client is gone or the server stops."""
        aborted: list[str] = self._abort(request_ids, internal)
        for request_id in aborted:
            known = self._open.pop(request_id, None)
            self._with_grammar.discard(request_id)
            if known is not None:
                ticket, state = known
                ticket.aborted += 1
                ticket.finish_reasons.append("abort")
                _book(ticket, state)
        return aborted

    def propagate_error(self, error: Exception) -> None:
        """The engine failed under everything that is open."""
        for ticket, _ in self._open.values():
            ticket.failed += 1
        self._fail(error)


def _book(ticket: Ticket, state: Any) -> None:
    """Add one sequence's figures. Time stamps of the engine's clock are used only as differences."""
    if state.parent_req is None or state.request_index == 0:
        ticket.prompt_tokens += state.prompt_len
        ticket.cached_tokens += state.num_cached_tokens
    stats = state.stats
    if stats is None:  # --disable-log-stats
        if state.detokenizer is not None:
            ticket.output_tokens += state.detokenizer.num_output_tokens()
        return
    ticket.output_tokens += stats.num_generation_tokens
    ticket.preemptions += stats.num_preemptions
    if stats.scheduled_ts:
        ticket.queue_s = max(ticket.queue_s or 0.0, stats.scheduled_ts - stats.queued_ts)
    if not stats.num_generation_tokens or not stats.first_token_ts:
        return
    prefill = stats.first_token_ts - stats.scheduled_ts
    decode = stats.last_token_ts - stats.first_token_ts
    ticket.prefill_s = max(ticket.prefill_s or 0.0, prefill)
    ticket.decode_s += decode
    ticket.gaps += stats.num_generation_tokens - 1
    first = stats.arrival_time + stats.first_token_latency
    if ticket.first_token_at is None or first < ticket.first_token_at:
        ticket.first_token_at = first
    if ticket.span is not None and len(ticket.phases) < 3 * _PHASES_SHOWN:
        scheduled = first - prefill
        queued = scheduled - (stats.scheduled_ts - stats.queued_ts)
        end = min(first + decode, time.time())
        ticket.phases += [("queue", queued, scheduled), ("prefill", scheduled, first), ("decode", first, end)]
