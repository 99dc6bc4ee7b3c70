"""Two real servers with one Redis, one moderation and one receiver of usage records, over every protocol.

One of them denies while Redis is away, the other one allows. What each request should leave in the usage records is
noted while the tests run and is compared after both servers have ended, which the last tests do. So the tests of this
file run in their order.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from kserve_vllm.policy.tenants import digest
from tests.clients import tensor
from tests.engine.calls import CHATS, PROTOCOLS, Answer, call, texts
from tests.services import Endpoint, Receiver
from tests.support import DEMO, Server, wait_until
from tests.support_redis import RedisServer

MANY = 100
PASSWORD, VENDOR_KEY = "receivers-password", "vendors-key"
RULES = """
from kserve_vllm.policy.moderation.hooks import Refusal

def check(text, where, tenant):
    assert tenant == "ours"
    if where == "prompt":
        return Refusal() if "attack" in text else text.replace("25", "26")
    if "59" in text:
        raise Refusal
    return text.replace("43", "[sum]")
"""


def key_file() -> dict[str, Any]:
    """A tenant for each thing that is shown."""
    limits: dict[str, dict[str, int]] = {
        "free": {},
        "limited": {"requests_per_minute": 100_000, "tokens_per_minute": 10**9},
        "place": {"concurrent": 1},
        "alone": {"requests_per_minute": 3},
        **{f"three-{use}": {"requests_per_minute": 3} for use in ("first", "denied", "allowed")},
        "many": {"requests_per_minute": MANY},
        "vendor": {},
        "vendor-by-steps": {},
        "ours": {},
    }
    return {
        "tenants": {name: {"limits": each} for name, each in limits.items()},
        "keys": [{"id": name, "tenant": name, "sha256": digest(f"kv-{name}")} for name in limits],
    }


def key(tenant: str) -> dict[str, str]:
    """The header with a tenant's key."""
    return {"authorization": f"Bearer kv-{tenant}"}


class Replicas:
    """The two servers and what stands around them.

    Attributes:
        denying, allowing: the servers, by what they do while Redis is away.
        redis, receiver, vendor: what they ask.
        expected: outcome that the usage record of each request should have, by request id.
    """

    def __init__(self, folder: Path, redis: RedisServer, receiver: Receiver, vendor: Endpoint) -> None:
        self.redis, self.receiver, self.vendor = redis, receiver, vendor
        self.expected: dict[str, str] = {}
        self._numbers = itertools.count()
        keys, hooks, modules = folder / "keys.json", folder / "hooks.yaml", folder / "modules"
        keys.write_text(json.dumps(key_file()))
        (folder / "vendor").write_text(VENDOR_KEY)
        endpoint = {"url": vendor.url("/ok"), "model": "omni", "api_key_file": str(folder / "vendor")}
        hooks.write_text(
            json.dumps(
                {
                    "hooks": [
                        {"name": "the-vendor", "tenants": ["vendor"], "endpoint": endpoint},
                        {"name": "by-steps", "tenants": ["vendor-by-steps"], "endpoint": endpoint, "window_chars": 16},
                        {"name": "house-rules", "tenants": ["ours"], "entry_point": "house_rules:check"},
                    ]
                }
            )
        )
        modules.mkdir()
        (modules / "house_rules.py").write_text(textwrap.dedent(RULES))
        path = os.pathsep.join([str(modules), *filter(None, [os.environ.get("PYTHONPATH")])])
        sink = receiver.url.replace("://", f"://name:{PASSWORD}@")
        common = [
            *DEMO,
            "--max-model-len",
            "2048",
            "--max-num-seqs",
            "16",
            "--keys-file",
            str(keys),
            "--redis-url",
            redis.url,
            "--redis-timeout",
            "30",  # on a crowded machine it may be slow; where it is away, its port is closed
            "--usage-sink",
            sink,
        ]
        env = {"PYTHONPATH": path, "NO_PROXY": "127.0.0.1"}
        self.denying = Server([*common, "--redis-away", "deny", "--moderation-file", str(hooks)], env)
        self.allowing = Server([*common, "--drain-timeout", "0.2", "--drain-delay", "0"], env)

    @property
    def both(self) -> tuple[Server, Server]:
        return self.denying, self.allowing

    def request_id(self, outcome: str, stream_infer: bool = False) -> str:
        """An id for a request that should end so."""
        request_id = f"replicas-{next(self._numbers)}"
        self.expected[request_id + ("-1" if stream_infer else "")] = outcome
        return request_id

    def ask(
        self, server: Server, protocol: str, tenant: str, status: int = 200, outcome: str = "", **more: Any
    ) -> Answer:
        """Send one prompt, which must get this status."""
        outcome = outcome or {200: "ok", 400: "refused", 429: "refused", 503: "unavailable"}[status]
        request_id = self.request_id(outcome, protocol == "grpc-stream")
        answer = call(server, protocol, f"kv-{tenant}", x_request_id=request_id, **more)
        # An error of one of its requests is a message in a gRPC stream, without a status.
        expected = 0 if protocol == "grpc-stream" and status != 200 else status
        assert answer.status == expected, (protocol, answer.body)
        return answer

    @contextmanager
    def outage(self) -> Iterator[None]:
        """Redis is gone for as long as the block runs, with all that it knew."""
        self.redis.stop()
        try:
            yield
        finally:
            self.redis.start()
        for server in self.both:
            wait_until(lambda server=server: server.metric("kserve_vllm_redis_up") == 1, 10, "Redis is not found again")  # type: ignore[misc]

    @contextmanager
    def held(self, server: Server, tenant: str, outcome: str = "cancelled") -> Iterator[Callable[[], list[str]]]:
        """A stream that runs for as long as the block does, unless it is called: then it is read to its end."""
        # What is to be cut off must be too long to end by itself meanwhile: connections are closed after two seconds.
        tokens = 400 if outcome == "ok" else 2000
        body = {"model": "demo", "prompt": "1, 2", "max_tokens": tokens, "ignore_eos": True, "stream": True}
        headers = {**key(tenant), "x-request-id": self.request_id(outcome)}
        url = server.url + "/v1/completions"
        with httpx.stream("POST", url, json=body, headers=headers, timeout=60) as response:
            lines = response.iter_lines()
            assert "text" in next(lines)
            yield lambda: [line for line in lines if line]


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replicas]:
    """All of it, for all tests of this module."""
    receiver, vendor = Receiver(), Endpoint("attack", "42", "11")
    with ExitStack() as stack:
        redis = stack.enter_context(RedisServer())
        stack.enter_context(receiver.up())
        stack.enter_context(vendor.up())
        running = Replicas(tmp_path_factory.mktemp("replicas"), redis, receiver, vendor)
        for server in running.both:
            stack.callback(server.stop)
        for server in running.both:
            server.wait_ready()
        yield running


# Limits that two servers hold together


def all_at_once(replicas: Replicas, tenant: str, number: int) -> list[tuple[int, int]]:
    """Send requests at the same time, in turn to both servers and over two protocols: which server, and the status."""

    async def one(client: httpx.AsyncClient, at: int) -> tuple[int, int]:
        which = at % 2
        if at % 4 < 2:
            path, body = "/v1/completions", {"model": "demo", "prompt": "1 +", "max_tokens": 1}
        else:
            inputs = [tensor("text_input", ["1 +"])]
            path, body = "/v2/models/demo/infer", {"inputs": inputs, "parameters": {"max_tokens": 1}}
        response = await client.post(replicas.both[which].url + path, json=body, headers=key(tenant))
        return which, response.status_code

    async def every() -> list[tuple[int, int]]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(limits=limits, timeout=120, trust_env=False) as client:
            return await asyncio.gather(*[one(client, at) for at in range(number)])

    return asyncio.run(every())


def test_of_200_at_once_over_two_servers_exactly_100_pass(replicas: Replicas) -> None:
    # First one to each: of two servers that are not equally busy, one may answer all that pass of the others.
    answers = all_at_once(replicas, "many", 2) + all_at_once(replicas, "many", 2 * MANY - 2)
    statuses = Counter(status for _, status in answers)
    assert statuses == {200: MANY, 429: MANY}
    assert {which for which, status in answers if status == 200} == {0, 1}
    assert {which for which, status in answers if status == 429} == {0, 1}


def test_what_is_left_and_what_is_refused_is_the_same_on_both(replicas: Replicas) -> None:
    first, second = replicas.both
    left = [
        replicas.ask(server, "chat", "three-first").headers["x-ratelimit-remaining-requests"]
        for server in (first, second, first)
    ]
    assert left == ["2", "1", "0"]
    for server in replicas.both:
        for protocol in PROTOCOLS:
            refused = replicas.ask(server, protocol, "three-first", 429)
            assert "3 requests per minute" in refused.body


def test_a_place_that_is_held_on_one_server_is_taken_on_the_other(replicas: Replicas) -> None:
    first, second = replicas.both
    with replicas.held(first, "place"):
        assert replicas.ask(second, "chat", "place", 429).headers["x-refusal-reason"] == "concurrent"

    def passes() -> bool:
        return call(second, "chat", "kv-place").status == 200

    wait_until(passes, 5, "its place did not come back")


# Redis away


def test_deny_refuses_over_every_protocol_and_goes_on_when_redis_is_back(replicas: Replicas) -> None:
    server = replicas.denying
    shapes = {
        "chat": '"type":"ServiceUnavailableError"',
        "messages": '"type":"overloaded_error"',
        "infer": '{"error":"',
        "generate": '{"error":"',
        "predict": '{"error":"',
    }
    assert server.metric("kserve_vllm_redis_up") == 1
    # A rush before may have had some of these: a call to Redis is given up after a quarter of a second.
    before = server.metric("kserve_vllm_rejections_total", reason="limits_unavailable")
    with replicas.held(server, "limited", "ok") as read_to_its_end:
        with replicas.outage():
            for protocol in PROTOCOLS:
                refused = replicas.ask(server, protocol, "limited", 503)
                assert "limits can't be checked" in refused.body
                assert shapes.get(protocol, "") in refused.body
                if protocol != "grpc-stream":
                    assert refused.headers["x-refusal-reason"] == "limits_unavailable"
                    assert refused.headers["retry-after"] == "1"
            assert server.metric("kserve_vllm_redis_up") == 0
            refusals = server.metric("kserve_vllm_rejections_total", reason="limits_unavailable") - before
            assert refusals == len(PROTOCOLS)
            # Nothing has to be looked up for those, nor for what runs already.
            replicas.ask(server, "chat", "free")
        assert read_to_its_end()[-1] == "data: [DONE]"
    for protocol in PROTOCOLS:
        replicas.ask(server, protocol, "limited")
    for _ in range(3):
        replicas.ask(server, "chat", "three-denied")
    for each in replicas.both:
        replicas.ask(each, "chat", "three-denied", 429)


def test_allow_goes_on_alone_and_together_again_when_redis_is_back(replicas: Replicas) -> None:
    server = replicas.allowing
    with replicas.outage():
        for protocol in PROTOCOLS:
            replicas.ask(server, protocol, "limited")
        assert server.metric("kserve_vllm_redis_up") == 0
        for _ in range(3):
            replicas.ask(server, "chat", "alone")
        for protocol in PROTOCOLS:
            replicas.ask(server, protocol, "alone", 429)
    for each in (server, replicas.denying, server):
        replicas.ask(each, "chat", "three-allowed")
    for each in replicas.both:
        replicas.ask(each, "chat", "three-allowed", 429)


def test_a_redis_that_came_back_between_two_requests_was_never_away(replicas: Replicas) -> None:
    def warnings() -> list[int]:
        return [server.log.count("redis is away") for server in replicas.both]

    before = warnings()
    with replicas.outage():
        pass
    for server in replicas.both:
        replicas.ask(server, "chat", "limited")
    assert warnings() == before


# Moderation by an endpoint and by Python code


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(("tenant", "hook"), [("vendor", "the-vendor"), ("ours", "house-rules")])
def test_a_flagged_prompt_is_refused_and_does_not_reach_the_engine(
    replicas: Replicas, protocol: str, tenant: str, hook: str
) -> None:
    def counts() -> tuple[float, float]:
        finished = replicas.denying.metric("vllm:request_success_total")
        return finished, replicas.denying.metric("kserve_vllm_rejections_total", reason="moderation")

    finished, refusals = counts()
    refused = replicas.ask(replicas.denying, protocol, tenant, 400, prompt="Repeat the word attack.")
    assert hook in refused.body
    assert "attack" not in refused.body
    assert counts() == (finished, refusals + 1)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("tenant", "hook", "sum_"), [("vendor", "the-vendor", "17 + 25"), ("ours", "house-rules", "90 - 31")]
)
def test_an_answer_that_may_not_be_shown_is_refused(
    replicas: Replicas, protocol: str, tenant: str, hook: str, sum_: str
) -> None:
    prompt = f"What is {sum_}?" if protocol in CHATS else f"{sum_} ="
    refused = replicas.ask(replicas.denying, protocol, tenant, 400, prompt=prompt)
    assert hook in refused.body


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_python_code_redacts_the_prompt_and_the_answer(replicas: Replicas, protocol: str) -> None:
    # The code makes it 17 + 26, and the answer to that is no number.
    said = texts(replicas.ask(replicas.denying, protocol, "ours").body)
    assert "[sum]" in said
    assert "42" not in said
    assert "43" not in said


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_no_hook_minds_passes_unchanged(replicas: Replicas, protocol: str) -> None:
    prompt = "What is 90 - 31?" if protocol in CHATS else "90 - 31 ="
    told, asked = (
        texts(replicas.ask(replicas.denying, protocol, "free", prompt=prompt).body),
        len(replicas.vendor.asked),
    )
    assert "59" in told
    assert texts(replicas.ask(replicas.denying, protocol, "vendor", prompt=prompt).body) == told
    assert len(replicas.vendor.asked) > asked
    assert set(replicas.vendor.keys) == {f"Bearer {VENDOR_KEY}"}


def test_a_stream_that_is_refused_later_ends_with_content_filter(replicas: Replicas) -> None:
    prompt = "Count from 3 to 12."
    answer = replicas.ask(replicas.denying, "chat-stream", "vendor-by-steps", outcome="refused", prompt=prompt)
    said = texts(answer.body)
    assert said.startswith("3 4 5")
    assert "11" not in said
    assert '"finish_reason":"content_filter"' in answer.body
    assert answer.body.rstrip().endswith("data: [DONE]")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_vendor_that_fails_is_503_until_it_is_mended(replicas: Replicas, protocol: str) -> None:
    replicas.vendor.broken = True
    try:
        refused = replicas.ask(replicas.denying, protocol, "vendor", 503)
    finally:
        replicas.vendor.broken = False
    assert "the-vendor" in refused.body
    replicas.ask(replicas.denying, protocol, "vendor", prompt="90 - 31 =")


# Usage records. These tests end the servers.


def test_what_the_end_of_a_drain_cuts_off_leaves_its_record(replicas: Replicas) -> None:
    server = replicas.allowing
    with replicas.held(server, "limited"):
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
    assert "1 requests are cut off" in server.log


def test_a_drain_waits_for_a_slow_receiver_and_every_request_has_exactly_one_record(replicas: Replicas) -> None:
    server, receiver = replicas.denying, replicas.receiver
    answers: list[list[str]] = []
    begun = threading.Semaphore(0)

    def to_its_end() -> None:
        with replicas.held(server, "limited", "ok") as read_to_its_end:
            begun.release()
            answers.append(read_to_its_end())

    threads = [threading.Thread(target=to_its_end) for _ in range(4)]
    with replicas.held(server, "limited"):
        pass  # its client is gone
    for thread in threads:
        thread.start()
    for _ in threads:
        assert begun.acquire(timeout=20)
    receiver.delay_s = 3.0
    server.process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join(60)
    assert [lines[-1] for lines in answers] == ["data: [DONE]"] * len(threads)
    while not replicas.expected.keys() <= set(receiver.ids):
        assert server.process.poll() is None, f"lost: {replicas.expected.keys() - set(receiver.ids)}"
        time.sleep(0.05)
    assert server.process.wait(60) == 0
    log = "".join(each.log for each in replicas.both)
    assert "usage records are lost" not in log

    records = receiver.records
    assert [r for r in records if replicas.expected.get(r["request_id"], r["outcome"]) != r["outcome"]] == []
    assert [name for name, times in Counter(receiver.ids).items() if times > 1] == []
    assert {each["authorization"][:6] for each in receiver.headers} == {"Basic "}
    for secret in (PASSWORD, VENDOR_KEY, "kv-limited", "attack"):
        assert secret not in log
