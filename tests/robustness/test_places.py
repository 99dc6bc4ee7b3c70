"""A place in front of the engine is for requests that are there: heads without a body hold none."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry

from kserve_vllm.core.errors import Unavailable
from kserve_vllm.core.lifecycle import Lifecycle, State
from kserve_vllm.core.request_context import Access, RequestContext
from kserve_vllm.policy.enforcement import Enforcement, Policies
from kserve_vllm.policy.priority_queue import PriorityQueue
from kserve_vllm.policy.quotas.counters import MemoryCounters
from kserve_vllm.policy.quotas.limiter import Quota, RateLimiter
from kserve_vllm.protocols.http.body import BodyBudget
from kserve_vllm.protocols.http.middleware import RequestMiddleware
from kserve_vllm.protocols.http.page import Asset
from kserve_vllm.telemetry.metrics import Metrics
from kserve_vllm.telemetry.requests import RequestRecorder
from kserve_vllm.telemetry.tracing import Tracing
from tests.robustness.wire import ask, echo, read_answer, served, statuses
from tests.support import Routed

CHAT = "/v1/chat/completions"
BODY = json.dumps({"model": "demo"}).encode()
HEAD = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(BODY)}\r\n".encode()


def test_a_place_is_given_back_whatever_can_not_be_counted() -> None:
    """A figure that the engine got wrong must not cost a place, nor the answer of the next request."""
    lifecycle, given, recorded = Lifecycle(), [], []
    metrics = Metrics(lifecycle, lambda: 0, registry=CollectorRegistry())
    requests = RequestRecorder(metrics, Tracing(), lifecycle, recorded.append)
    with requests.open("openai", CHAT, "r", {}) as context:
        context.engine.sequences, context.engine.cached_tokens, context.status = 1, -5, 200
        context.engine.finished = 1
        context.closers.append(lambda _: given.append(1))
    assert given == [1]
    assert [each.outcome for each in recorded] == ["ok"]


def middleware(page: Mapping[str, Asset] | None = None, **policies: Any) -> RequestMiddleware:
    """An edge before an app that answers at once."""
    lifecycle = Lifecycle()
    lifecycle.to(State.READY)
    enforcement = Enforcement(lifecycle, Policies(**policies))
    metrics = Metrics(lifecycle, lambda: 0, registry=CollectorRegistry())
    recorder = RequestRecorder(metrics, Tracing(), lifecycle)
    found = RequestMiddleware(lifecycle, enforcement, 1 << 20, metrics.render, dict, recorder, page=page)
    found.attach(Routed(echo), Routed(echo, CHAT))
    return found


def test_heads_without_a_body_hold_no_place_in_the_queue() -> None:
    admission = PriorityQueue(2, 4, {}, 5, {})
    with served(middleware(admission=admission)) as server:
        socks = [socket.create_connection(("127.0.0.1", server.port), timeout=20) for _ in range(70)]
        for sock in socks:
            sock.sendall(HEAD + b"\r\n")
        for _ in range(4):
            assert statuses(ask(server.port, HEAD + b"Connection: close\r\n\r\n" + BODY)) == [200]
        assert (admission.stats()["in_use"], admission.stats()["waiting"]) == (0, 0)
        # They get theirs with their body.
        for sock in socks:
            sock.sendall(BODY)
            assert statuses(read_answer(sock)) == [200]
            sock.close()
        assert admission.stats()["in_use"] == 0


def test_nor_one_of_a_limits_requests_at_once() -> None:
    limits = {"limits": RateLimiter(MemoryCounters()), "service": Quota("service", None, None, 2)}
    with served(middleware(**limits)) as server:
        socks = [socket.create_connection(("127.0.0.1", server.port), timeout=20) for _ in range(10)]
        for sock in socks:
            sock.sendall(HEAD + b"\r\n")
        assert statuses(ask(server.port, HEAD + b"Connection: close\r\n\r\n" + BODY)) == [200]
        for sock in socks:
            sock.close()


def test_bodies_together_are_bounded_for_all_and_for_each_key() -> None:
    budget = BodyBudget(100)

    def refused(context: RequestContext, size: int) -> bool:
        try:
            budget.take(context, size)
        except Unavailable:
            return True
        return False

    one, other, third = (RequestContext("r", "v2", "e", access=Access(key_id=key)) for key in ("one", "other", "third"))
    assert [refused(one, 30), refused(one, 30), refused(one, 20), refused(other, 50)] == [False, True, False, False]
    assert refused(third, 1)
    assert refused(RequestContext("r", "v2", "e"), 1)
    budget.give(other, 50)
    assert not refused(third, 1)
    budget.give(one, 50)
    budget.give(third, 1)
    assert budget.held == 0


def test_what_a_request_held_is_given_back_however_it_ends() -> None:
    app = middleware()
    with served(app) as server:
        head = HEAD.replace(b"Content-Length: %d" % len(BODY), b"Content-Length: 1000000")
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", server.port), timeout=20) as sock:
                sock.sendall(head + b"\r\n" + b"x" * 500_000)
        assert statuses(ask(server.port, HEAD + b"Connection: close\r\n\r\n" + BODY)) == [200]
        deadline = time.monotonic() + 20
        while app.bodies.held and time.monotonic() < deadline:
            time.sleep(0.02)
        assert app.bodies.held == 0
