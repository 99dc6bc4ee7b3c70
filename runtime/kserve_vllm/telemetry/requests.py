"""Opens a request context for each request and closes it once, whatever happened: counters, log line, span."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from kserve_vllm.core.errors import (
    BodyTimeout,
    BodyTooLarge,
    EngineGone,
    Forbidden,
    QueueFull,
    QueueTimeout,
    RateLimited,
    Refused,
    RequestError,
    Unauthenticated,
    Unavailable,
)
from kserve_vllm.core.lifecycle import Lifecycle, State
from kserve_vllm.core.request_context import RequestContext, current
from kserve_vllm.telemetry.logs import write_event
from kserve_vllm.telemetry.metrics import Metrics
from kserve_vllm.telemetry.tracing import Tracing

log = logging.getLogger(__name__)

_LATE_S = 0.25
_REFUSED = {
    Unauthenticated: "unauthenticated",
    Forbidden: "forbidden",
    BodyTimeout: "body_timeout",
    BodyTooLarge: "body_too_large",
    EngineGone: "engine_dead",
    QueueTimeout: "queue_timeout",
    QueueFull: "queue_full",
    RateLimited: "too_many_requests",
    Refused: "moderation",
}
_REFUSED_STATUS = {401: "unauthenticated", 403: "forbidden", 413: "body_too_large", 429: "too_many_requests"}
_STATES = {
    State.STARTING: "loading",
    State.LOADING: "loading",
    State.WARMING: "loading",
    State.DRAINING: "draining",
    State.STOPPED: "draining",
    State.FAILED: "engine_dead",
}


class RequestRecorder:
    """The accounting of all requests.

    Args:
        metrics: counts them.
        tracing: opens and ends their spans.
        lifecycle: says why the server was not available.
        record: called with each request context that is closed.
    """

    def __init__(
        self,
        metrics: Metrics,
        tracing: Tracing,
        lifecycle: Lifecycle,
        record: Callable[[RequestContext], None] = lambda _: None,
    ) -> None:
        self._record = record
        self._metrics = metrics
        self._tracing = tracing
        self._lifecycle = lifecycle
        self._late: dict[RequestContext, float] = {}
        self._log = logging.getLogger("kserve_vllm.request")

    @contextmanager
    def open(
        self,
        protocol: str,
        endpoint: str,
        request_id: str,
        headers: Mapping[str, str],
        model: str | None = None,
        quiet: bool = False,
    ) -> Iterator[RequestContext]:
        """A request context for as long as the block runs; it is the current one in the block and in tasks started
        there.

        Args:
            protocol: `openai`, `v2`, `generate`, `v1` or `grpc`.
            endpoint: one of a bounded set.
            request_id: for logs and traces.
            headers: with lower-case names; `traceparent` and `tracestate` are read.
            model: the name asked for, where it is known already.
            quiet: write its log line at the level debug.
        """
        context = RequestContext(request_id, protocol, endpoint, quiet, model=model)
        self._tracing.open(context, headers)
        token = current.set(context)
        try:
            yield context
        except BaseException as error:
            context.error = context.error or error
            raise
        finally:
            duration_s = time.monotonic() - context.started
            if context.engine.unfinished and context.error is None:
                # vLLM gives up the request of a client that is gone a moment after its handler returned.
                self._late[context] = duration_s
                asyncio.get_running_loop().call_later(_LATE_S, self._close_late, context)
            else:
                self._close(context, duration_s)
            current.reset(token)

    def response_header(self, context: RequestContext) -> str | None:
        """Value of the `traceresponse` header (W3C Trace Context), or None where nothing is traced."""
        return self._tracing.response_header(context)

    def flush(self) -> None:
        """Close the request contexts that still wait for the engine's last word."""
        for context in list(self._late):
            self._close_late(context)

    def _close_late(self, context: RequestContext) -> None:
        duration_s = self._late.pop(context, None)
        if duration_s is not None:
            self._close(context, duration_s)

    def _close(self, context: RequestContext, duration: float) -> None:
        outcome, reason = self._outcome(context)
        context.outcome, context.duration_s = outcome, duration
        # First of all: a place that is not given back is lost for good.
        for closer in context.closers:
            try:
                closer(context)
            except Exception:
                log.exception("request %s: not everything was given back", context.request_id)
        try:
            self._metrics.count(context, outcome, duration)
            if reason is not None:
                self._metrics.reject(context.protocol, reason)
        except Exception:
            log.exception("request %s: not everything was counted", context.request_id)
        self._tracing.close(context, outcome)
        self._record(context)
        self._write(context, outcome, reason, duration)

    def _write(self, context: RequestContext, outcome: str, reason: str | None, duration_s: float) -> None:
        level = logging.DEBUG if context.quiet and outcome in ("ok", "client_error") else logging.INFO
        if outcome == "server_error":
            level = logging.ERROR
        if not self._log.isEnabledFor(level):
            return
        fields: dict[str, object] = {
            "protocol": context.protocol,
            "endpoint": context.endpoint,
            "model": self._metrics.model_label(context.model),
            "tenant": context.access.tenant,
            **({"key_id": context.access.key_id} if context.access.key_id else {}),
            **({"cache": context.cache} if context.cache else {}),
            "outcome": outcome,
            "status": context.status,
            "duration_s": round(duration_s, 6),
        }
        if reason is not None:
            fields["reason"] = reason
        if context.engine.sequences:
            fields |= {
                "prompt_tokens": context.engine.prompt_tokens,
                "cached_tokens": context.engine.cached_tokens,
                "output_tokens": context.engine.output_tokens,
                "finish_reasons": context.engine.finish_reasons,
            }
            for name, value in (
                ("queue_s", context.engine.queue_s),
                ("ttft_s", context.ttft_s),
                ("itl_s", context.engine.itl_s),
            ):
                if value is not None:
                    fields[name] = round(value, 6)
            if context.engine.preemptions:
                fields["preemptions"] = context.engine.preemptions
        write_event(self._log, level, "request", fields)

    def _outcome(self, context: RequestContext) -> tuple[str, str | None]:
        """What became of a request, and why it was turned away if it was."""
        error = context.error
        if isinstance(error, (asyncio.CancelledError, GeneratorExit)) or context.status in (499, "CANCELLED"):
            return "cancelled", None
        if isinstance(error, RequestError):
            return self._of_request_error(context, error)
        if error is not None:
            return "server_error", None
        status = context.status
        if isinstance(status, int) and status >= 400:
            if status in _REFUSED_STATUS:
                return "refused", _REFUSED_STATUS[status]
            if status == 503:
                return "unavailable", _STATES.get(self._lifecycle.state, "queue_full")
            return ("client_error" if status < 500 else "server_error"), None
        if context.engine.failed:
            # A stream that began with 200 and whose engine then failed, or whose grammar no text could satisfy.
            return ("client_error" if context.engine.stuck else "server_error"), None
        if context.cut_off:
            # The engine was stopped by us, not by the client.
            return "refused", "moderation"
        if context.engine.aborted or context.engine.unfinished or status is None:
            return "cancelled", None
        return "ok", None

    def _of_request_error(self, context: RequestContext, error: RequestError) -> tuple[str, str | None]:
        for cls, reason in _REFUSED.items():
            if isinstance(error, cls):
                return ("unavailable" if issubclass(cls, Unavailable) else "refused"), error.reason or reason
        if isinstance(error, Unavailable):
            return "unavailable", error.reason or _STATES.get(self._lifecycle.state, "unloaded")
        return ("client_error" if error.http_status < 500 else "server_error"), None
