"""The response cache in a real Redis, limits shared through it, and moderated texts, on a real engine over every
protocol."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.engine.calls import CHATS, PROTOCOLS, call, texts
from tests.support import DEMO, Server, wait_until
from tests.support_redis import RedisServer

HOOKS = """
hooks:
  - name: no-secrets
    on: [prompt]
    action: refuse
    patterns: [{literal: hush}]
  - name: fruit
    on: [prompt]
    action: redact
    patterns: [{literal: banana, replacement: apple}]
  - name: numbers
    on: [answer]
    action: redact
    patterns: [{literal: '59', replacement: '[number]'}]
  - name: no-pears
    on: [answer]
    action: refuse
    patterns: [{literal: pear}]
  - name: far-enough
    on: [answer]
    action: refuse
    patterns: [{literal: ' 10 '}]
"""


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    """The Redis of this module's server."""
    with RedisServer() as server:
        yield server


@pytest.fixture(scope="module")
def answering(redis: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with the cache in Redis, a limit for the whole service, and hooks."""
    hooks: Path = tmp_path_factory.mktemp("hooks") / "hooks.yaml"
    hooks.write_text(HOOKS)
    running = Server(
        [
            *DEMO,
            "--max-model-len",
            "1024",
            "--response-cache",
            "redis",
            "--redis-url",
            redis.url,
            "--moderation-file",
            str(hooks),
            "--requests-per-minute",
            "100000",
        ]
    )
    try:
        yield running.wait_ready()
    finally:
        running.stop()


def finished(server: Server) -> float:
    """Requests that the engine has brought to an end."""
    return server.metric("vllm:request_success_total")


# Cache


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_second_request_is_answered_without_the_engine(answering: Server, protocol: str) -> None:
    prompt = f"What is {PROTOCOLS.index(protocol)} + 3?"
    first = call(answering, protocol, prompt=prompt)
    before = finished(answering)
    second = call(answering, protocol, prompt=prompt)
    assert (first.status, second.status) == (200, 200)
    assert finished(answering) == before
    assert texts(second.body) == texts(first.body) != ""
    if protocol != "grpc-stream":
        # Another protocol may have asked the engine the same before.
        assert first.headers["x-cache"] in ("miss", "hit")
        assert second.headers["x-cache"] == "hit"


def test_a_streamed_answer_is_replayed_as_a_stream(answering: Server) -> None:
    answers = [call(answering, "chat-stream", prompt="What is 31 + 8?") for _ in range(2)]
    assert [answer.headers["x-cache"] for answer in answers] == ["miss", "hit"]
    frames = [answer.body.count("data: ") for answer in answers]
    assert frames[0] > 5
    # Pieces that are there at once are sent together; still, the role comes first, then text, then the end.
    assert frames[1] >= 3
    assert texts(answers[1].body) == texts(answers[0].body)


def test_what_was_answered_whole_is_replayed_as_a_stream_and_the_other_way_round(answering: Server) -> None:
    whole = call(answering, "completions", prompt="11 + 8 =")
    streamed = call(answering, "completions-stream", prompt="11 + 8 =")
    assert (whole.headers["x-cache"], streamed.headers["x-cache"]) == ("miss", "hit")
    assert texts(streamed.body) == texts(whole.body)


def test_no_store_and_chance_pass_by(answering: Server) -> None:
    for _ in range(2):
        assert call(answering, "chat", prompt="What is 2 + 9?", cache_control="no-store").headers["x-cache"] == "bypass"
    body = {"model": "demo", "prompt": "Hello", "max_tokens": 4, "temperature": 1.0}
    for _ in range(2):
        assert httpx.post(answering.url + "/v1/completions", json=body).headers["x-cache"] == "bypass"


def test_adapters_are_kept_apart(answering: Server) -> None:
    base = call(answering, "chat", prompt="Repeat the word apple.")
    upper = call(answering, "chat", prompt="Repeat the word apple.", model="upper")
    assert upper.headers["x-cache"] == "miss"
    assert "APPLE" in upper.body
    assert "APPLE" not in base.body


def test_identical_requests_that_arrive_together_cost_one_engine_call(answering: Server) -> None:
    before = finished(answering)
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: call(answering, "completions", prompt="1, 2, 3", max_tokens=300), range(20)))
    assert {answer.status for answer in answers} == {200}
    assert len({texts(answer.body) for answer in answers}) == 1
    assert finished(answering) - before == 1


def test_a_hit_is_counted_and_its_tokens_are_not_the_engines(answering: Server) -> None:
    call(answering, "completions", prompt="5 + 5 =")
    hits = answering.metric("kserve_vllm_response_cache_requests_total", result="hit")
    tokens = answering.metric("kserve_vllm_output_tokens_total")
    assert call(answering, "completions", prompt="5 + 5 =").headers["x-cache"] == "hit"
    assert answering.metric("kserve_vllm_response_cache_requests_total", result="hit") == hits + 1
    assert answering.metric("kserve_vllm_output_tokens_total") == tokens


def test_redis_may_go_and_come_back_while_requests_are_answered(answering: Server, redis: RedisServer) -> None:
    assert call(answering, "chat", prompt="What is 40 + 7?").headers["x-cache"] == "miss"
    assert call(answering, "chat", prompt="What is 40 + 7?").headers["x-cache"] == "hit"
    statuses: list[int] = []
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            statuses.append(call(answering, "chat", prompt="What is 40 + 7?").status)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        redis.stop()
        wait_until(lambda: answering.metric("kserve_vllm_redis_up") == 0, 10, "it did not notice")
        # Another question: the same one may join the thread's, which is a hit also without Redis.
        assert call(answering, "chat", prompt="What is 41 + 7?").headers["x-cache"] == "bypass"
        redis.start()
        wait_until(lambda: answering.metric("kserve_vllm_redis_up") == 1, 15, "it did not come back")
    finally:
        stop.set()
        thread.join()
    assert set(statuses) == {200}
    call(answering, "chat", prompt="What is 40 + 7?")
    assert call(answering, "chat", prompt="What is 40 + 7?").headers["x-cache"] == "hit"


# Moderation


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_prompt_that_is_refused_never_reaches_the_engine(answering: Server, protocol: str) -> None:
    before = finished(answering)
    answer = call(answering, protocol, prompt="Please hush now")
    assert answer.status == (0 if protocol == "grpc-stream" else 400), answer.body
    assert "no-secrets" in answer.body
    assert "Please" not in answer.body
    assert finished(answering) == before


@pytest.mark.parametrize("protocol", CHATS)
def test_a_prompt_is_redacted_before_the_model_sees_it(answering: Server, protocol: str) -> None:
    assert "apple" in texts(call(answering, protocol, prompt="Repeat the word banana.").body)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_an_answer_is_redacted_before_the_client_sees_it(answering: Server, protocol: str) -> None:
    prompt = "What is 90 - 31?" if protocol in CHATS else "90 - 31 ="
    answer = call(answering, protocol, prompt=prompt)
    assert answer.status == 200
    assert "59" not in texts(answer.body)
    assert "[number]" in texts(answer.body)


@pytest.mark.parametrize("protocol", CHATS)
def test_an_answer_that_is_refused_from_its_beginning_is_an_error(answering: Server, protocol: str) -> None:
    answer = call(answering, protocol, prompt="Repeat the word pear.")
    assert answer.status == 400, answer.body
    assert "no-pears" in answer.body


def test_a_streamed_response_that_is_refused_is_answered_and_not_cut(answering: Server) -> None:
    """vLLM has announced the answer by then."""
    for body, told in (
        ({"input": "Repeat the word pear."}, "no-pears"),
        ({"input": "Hello", "include": ["message.output_text.logprobs"], "top_logprobs": 1}, "moderated"),
    ):
        answer = httpx.post(answering.url + "/v1/responses", json={"model": "demo", "stream": True, **body})
        assert answer.status_code == 400, answer.text
        assert told in answer.json()["error"]["message"]


def test_of_several_answers_all_are_there_where_one_is_refused(answering: Server) -> None:
    body = {"model": "demo", "messages": [{"role": "user", "content": "Count from 3 to 12."}], "temperature": 0.01}
    answer = httpx.post(answering.url + "/v1/chat/completions", json={**body, "n": 3, "max_tokens": 48, "seed": 1})
    assert answer.status_code == 200
    choices = answer.json()["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    assert "content_filter" in {choice["finish_reason"] for choice in choices}
    assert " 10 " not in answer.text


def test_a_stream_that_is_refused_later_ends_with_content_filter(answering: Server) -> None:
    answer = call(answering, "chat-stream", prompt="Count from 3 to 12.")
    assert answer.status == 200
    said = texts(answer.body)
    assert said.startswith("3 4 5")
    assert " 10 " not in said
    assert '"finish_reason":"content_filter"' in answer.body
    assert answer.body.rstrip().endswith("data: [DONE]")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello"}], "logprobs": True}),
        ("/v1/completions", {"prompt": "Hello", "logprobs": 1}),
        ("/v1/completions", {"prompt": "Hello", "return_token_ids": True}),
        ("/v1/completions", {"prompt": "Hello", "use_beam_search": True, "n": 2}),
        ("/v1/completions", {"prompt": [1, 2, 3]}),
    ],
)
def test_what_would_show_texts_past_the_hooks_is_refused(answering: Server, path: str, body: dict[str, object]) -> None:
    answer = httpx.post(answering.url + path, json={"model": "demo", "max_tokens": 4, **body})
    assert answer.status_code == 400
    assert "moderated" in answer.json()["error"]["message"]


def test_verdicts_are_counted(answering: Server) -> None:
    count = answering.metric("kserve_vllm_moderation_verdicts_total", hook="no-secrets", verdict="refused")
    call(answering, "chat", prompt="hush")
    assert answering.metric("kserve_vllm_moderation_verdicts_total", hook="no-secrets", verdict="refused") == count + 1
