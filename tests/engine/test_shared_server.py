"""Keys, models, limits, classes, usage and the admin port on one real server, over every protocol."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import openai
import pytest
from openai.types import Batch, FileObject

from kserve_vllm.policy.tenants import digest
from tests.engine.calls import PROTOCOLS, call
from tests.support import DEMO, Server, free_port, wait_until
from tests.triton import service_pb2, service_pb2_grpc

ADMIN, GOLD, BATCH, UPPER = "kv-admin", "kv-gold", "kv-batch", "kv-upper"
ALL_MODELS = {"demo", "upper", "french"}
MANY = 100


def key_file(**more: Any) -> dict[str, Any]:
    """A key file with a tenant for each thing that is shown."""
    tenants: dict[str, Any] = {
        "gold": {"priority": "high", "may_choose_priority": True},
        "batch": {"priority": "batch"},
        "upper": {"models": ["upper"]},
        "base": {"models": ["demo"]},
        "tokens": {"limits": {"tokens_per_minute": 300}},
        "many": {"limits": {"requests_per_minute": MANY}},
        "one-at-a-time": {"limits": {"concurrent": 1}},
        **{f"rpm-{protocol}": {"limits": {"requests_per_minute": 2}} for protocol in PROTOCOLS},
        **{f"tpm-{protocol}": {"limits": {"tokens_per_minute": 100}} for protocol in PROTOCOLS},
    }
    keys = [{"id": name, "tenant": name, "sha256": digest(f"kv-{name}")} for name in tenants]
    keys.append({"id": "admin", "tenant": "ops", "sha256": digest(ADMIN), "admin": True})
    return {"tenants": tenants, "keys": keys, **more}


class Shared(Server):
    """A server with everything on."""

    def __init__(self, folder: Path) -> None:
        self.keys, self.usage, self.batches = folder / "keys.json", folder / "usage.jsonl", folder / "batches"
        self.keys.write_text(json.dumps(key_file()))
        self.admin_port = free_port()
        self.admin_url = f"http://127.0.0.1:{self.admin_port}"
        super().__init__(
            [
                *DEMO,
                "--max-model-len",
                "1024",
                "--max-num-seqs",
                "16",
                "--keys-file",
                str(self.keys),
                "--admin-port",
                str(self.admin_port),
                "--usage-sink",
                f"file:{self.usage}",
                "--max-concurrent",
                "8",
                "--queue-size",
                "1024",
                "--queue-timeout",
                "5",
                "--body-timeout",
                "2",
                "--allowed-origins",
                '["https://page"]',
                "--batch-dir",
                str(self.batches),
            ],
            {"VLLM_SERVER_DEV_MODE": "1"},
        )

    def records(self, **wanted: Any) -> list[dict[str, Any]]:
        """Usage records with these values."""
        lines = self.usage.read_text().splitlines() if self.usage.exists() else []
        found = [json.loads(line) for line in lines]
        return [record for record in found if all(record[name] == value for name, value in wanted.items())]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    """The server, for all tests of this module."""
    running = Shared(tmp_path_factory.mktemp("shared"))
    try:
        yield running.wait_ready()  # type: ignore[misc]
    finally:
        running.stop()


# Keys


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("key", [None, "kv-wrong"])
def test_without_a_valid_key_nothing_is_answered(shared: Shared, protocol: str, key: str | None) -> None:
    answer = call(shared, protocol, key)
    assert answer.status == 401
    assert "missing or wrong API key" in answer.body
    shape = {"chat": '"type":"AuthenticationError"', "messages": '"type":"authentication_error"', "infer": '{"error":"'}
    assert shape.get(protocol, "") in answer.body


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_valid_key_is_answered(shared: Shared, protocol: str) -> None:
    answer = call(shared, protocol, GOLD)
    assert answer.status == 200, answer.body
    if not protocol.endswith("stream"):
        assert "42" in answer.body


def test_a_browser_may_ask_without_a_key_what_it_may_send(shared: Shared) -> None:
    asking = {"origin": "https://page", "access-control-request-method": "POST"}
    answer = httpx.options(f"{shared.url}/v1/chat/completions", headers=asking)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "https://page"
    for headers in ({}, {"origin": "https://page"}):
        assert httpx.options(f"{shared.url}/v1/chat/completions", headers=headers).status_code == 401


def test_a_key_may_come_as_x_api_key(shared: Shared) -> None:
    assert call(shared, "messages", x_api_key=GOLD).status == 200
    assert call(shared, "grpc", x_api_key=GOLD).status == 200


def test_probes_need_no_key(shared: Shared) -> None:
    for path in ("/v2/health/live", "/v2/health/ready", "/health", "/ping"):
        assert shared.status(path) == 200
    with grpc.insecure_channel(shared.grpc_address) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        assert stub.ServerReady(service_pb2.ServerReadyRequest()).ready


def test_keys_rotate_without_a_restart(shared: Shared) -> None:
    assert call(shared, "chat", "kv-next").status == 401
    tree = key_file()
    tree["keys"].append({"id": "next", "tenant": "gold", "sha256": digest("kv-next")})
    shared.keys.write_text(json.dumps(tree))
    wait_until(lambda: call(shared, "chat", "kv-next").status == 200, 10, "the new key never held")
    assert call(shared, "chat", GOLD).status == 200
    shared.keys.write_text(json.dumps(key_file()))
    wait_until(lambda: call(shared, "chat", "kv-next").status == 401, 10, "the old key stays valid")


# Models


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_tenant_gets_only_its_models(shared: Shared, protocol: str) -> None:
    refused = call(shared, protocol, UPPER)
    assert refused.status == (0 if protocol == "grpc-stream" else 403), refused.body
    assert "may not use the model 'demo'" in refused.body
    assert call(shared, protocol, UPPER, model="upper").status == 200


ASKED = {
    "/tokenize": {"prompt": "hello"},
    "/detokenize": {"tokens": [5, 6, 7]},
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "hi"}]},
}


@pytest.mark.parametrize("path", ASKED)
def test_a_tenant_has_tokens_made_and_counted_by_its_models_only(shared: Shared, path: str) -> None:
    """None of these asks anything of the engine."""
    headers = {"authorization": f"Bearer {UPPER}"}
    named = [{"model": "demo"}] if path.endswith("count_tokens") else [{"model": "demo"}, {}]
    for model in named:
        answer = httpx.post(shared.url + path, json={**ASKED[path], **model}, headers=headers)
        assert answer.status_code == 403, answer.text
        assert "may not use" in answer.text
        assert model or "demo" not in answer.text
    assert httpx.post(shared.url + path, json={**ASKED[path], "model": "upper"}, headers=headers).status_code == 200
    base = httpx.post(
        shared.url + path, json={**ASKED[path], "model": "demo"}, headers={"authorization": f"Bearer {GOLD}"}
    )
    assert base.status_code == 200


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_work_with_a_model_of_others_is_refused_as_with_one_that_is_not_there(shared: Shared, protocol: str) -> None:
    answers = [call(shared, protocol, UPPER, model=model) for model in ("french", "fresno", "demo:french", "demo:none")]
    for answer, model in zip(answers, ("french", "fresno", "demo:french", "demo:none"), strict=True):
        assert answer.status == (0 if protocol == "grpc-stream" else 403), answer.body
        assert f"may not use the model '{model}'" in answer.body
    told = [(each.headers.get("x-refusal-reason"), sorted(each.headers)) for each in answers]
    assert told == told[:1] * 4
    assert call(shared, protocol, GOLD, model="fresno").status == (0 if protocol == "grpc-stream" else 404)


@pytest.mark.parametrize("path", ["infer", "generate", "generate_stream", "versions/1/infer"])
def test_nor_does_a_wrong_request_tell_which_models_there_are(shared: Shared, path: str) -> None:
    headers = {"authorization": f"Bearer {UPPER}"}
    for body in ({}, {"inputs": 1}, {"text_input": 1}):
        answers = [
            httpx.post(f"{shared.url}/v2/models/{model}/{path}", json=body, headers=headers)
            for model in ("french", "fresno")
        ]
        assert [answer.status_code for answer in answers] == [403, 403]
        assert answers[0].text == answers[1].text.replace("fresno", "french")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/tokenize", "/v1/messages"])
def test_a_model_that_is_not_there_tells_nobody_what_is(shared: Shared, path: str) -> None:
    body = {"model": "none", "prompt": "x", "max_tokens": 1}
    if "chat" in path or "messages" in path:
        body = {"model": "none", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    for stream in (False, True):
        answer = httpx.post(
            shared.url + path, json={**body, "stream": stream}, headers={"authorization": f"Bearer {UPPER}"}
        )
        assert answer.status_code == 403, answer.text
        assert "demo" not in answer.text


def shown(shared: Shared, key: str) -> dict[str, set[str]]:
    """The names in each list of models that a key gets."""

    def ask(path: str, method: str = "GET") -> Any:
        answer = httpx.request(method, shared.url + path, headers={"authorization": f"Bearer {key}"})
        assert answer.status_code == 200, answer.text
        return answer.json()

    with grpc.insecure_channel(shared.grpc_address) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        metadata = (("authorization", f"Bearer {key}"),)
        index = stub.RepositoryIndex(service_pb2.RepositoryIndexRequest(), metadata=metadata)
    models = ask("/v1/models")
    return {
        "openai": {card["id"] for card in models["data"]},
        "openai alias": {card["id"] for card in ask("/openai/v1/models")["data"]},
        "v1": set(models["models"]),
        "v2": set(ask("/v2/models")["models"]),
        "index": {row["name"] for row in ask("/v2/repository/index", "POST")},
        "grpc": {row.name for row in index.models},
        "adapters": {row["name"] for row in ask("/v1/adapters")["data"]},
    }


@pytest.mark.parametrize(
    ("key", "names"), [(UPPER, {"upper"}), ("kv-base", {"demo"}), (GOLD, ALL_MODELS), (ADMIN, ALL_MODELS)]
)
def test_a_tenant_is_shown_only_its_models(shared: Shared, key: str, names: set[str]) -> None:
    lists = shown(shared, key)
    assert lists.pop("adapters") == names - {"demo"}
    assert lists == dict.fromkeys(lists, names)


@pytest.mark.parametrize(
    "path",
    [
        "/v1/models/{}",
        "/openai/v1/models/{}",
        "/v1/models/demo:{}",
        "/v2/models/{}",
        "/v2/models/{}/ready",
        "/v2/models/{}/versions/1",
        "/v1/adapters/{}",
    ],
)
def test_a_model_of_others_is_answered_as_one_that_does_not_exist(shared: Shared, path: str) -> None:
    def ask(name: str, key: str) -> httpx.Response:
        headers = {"authorization": f"Bearer {key}", "x-request-id": "r"}
        return httpx.get(shared.url + path.format(name), headers=headers)

    others, unknown = ask("french", UPPER), ask("nope", UPPER)
    assert (others.status_code, others.headers["content-type"]) == (404, unknown.headers["content-type"])
    assert others.text == unknown.text.replace("nope", "french")
    assert ask("upper", UPPER).status_code == 200
    assert ask("french", ADMIN).status_code == 200


def test_a_model_of_others_is_not_found_over_grpc(shared: Shared) -> None:
    def ask(method: str, name: str) -> Any:
        request = getattr(service_pb2, f"{method}Request")(name=name)
        return getattr(stub, method)(request, metadata=(("authorization", f"Bearer {UPPER}"),))

    with grpc.insecure_channel(shared.grpc_address) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        for name in ("demo", "french", "nope"):
            with pytest.raises(grpc.RpcError, match=f"no model named '{name}'") as caught:
                ask("ModelMetadata", name)
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND
            assert not ask("ModelReady", name).ready, "as of one that is not there at all"
        ask("ModelMetadata", "upper")
        assert ask("ModelReady", "upper").ready


# Limits


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_requests_over_the_limit_are_refused_in_each_protocols_shape(shared: Shared, protocol: str) -> None:
    key = f"kv-rpm-{protocol}"
    answers = [call(shared, protocol, key) for _ in range(3)]
    assert [answer.status for answer in answers[:2]] == [200, 200]
    refused = answers[2]
    assert refused.status == (0 if protocol == "grpc-stream" else 429)
    assert "requests" in refused.body
    if protocol != "grpc-stream":
        assert 1 <= int(refused.headers["retry-after"]) <= 66
        assert refused.headers["x-refusal-reason"] == "requests_per_minute"
    if protocol == "chat":
        assert answers[0].headers["x-ratelimit-limit-requests"] == "2"
        assert answers[0].headers["x-ratelimit-remaining-requests"] == "1"
        assert answers[1].headers["x-ratelimit-remaining-requests"] == "0"


def test_grpc_says_when_to_retry_in_its_error_details(shared: Shared) -> None:
    from google.rpc import error_details_pb2, status_pb2

    for _ in range(3):
        answer = call(shared, "grpc", "kv-rpm-grpc")
    status = status_pb2.Status.FromString(answer.headers["grpc-status-details-bin"])
    info = error_details_pb2.RetryInfo()
    assert status.details[0].Unpack(info)
    assert info.retry_delay.seconds >= 1


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_tokens_over_the_limit_are_refused_before_the_engine_sees_them(shared: Shared, protocol: str) -> None:
    refused = call(shared, protocol, f"kv-tpm-{protocol}", max_tokens=500)
    assert refused.status == (0 if protocol == "grpc-stream" else 429), refused.body
    assert "tokens" in refused.body
    if protocol != "grpc-stream":
        assert refused.headers["x-refusal-reason"] == "tokens_per_minute"
    # What was refused took nothing away.
    assert call(shared, protocol, f"kv-tpm-{protocol}", max_tokens=20).status == 200


def test_reserved_tokens_that_were_not_used_come_back(shared: Shared) -> None:
    # 200 tokens are reserved each time, some 25 are used: without settling, the second one is refused.
    answers = [call(shared, "completions", "kv-tokens", max_tokens=200) for _ in range(4)]
    assert [answer.status for answer in answers] == [200] * 4
    left = int(answers[-1].headers["x-ratelimit-remaining-tokens"])
    assert 0 < left < 300


def test_exactly_as_many_as_allowed_pass_at_once(shared: Shared) -> None:
    def one(_: int) -> int:
        return call(shared, "completions", "kv-many", max_tokens=1).status

    with ThreadPoolExecutor(40) as pool:
        statuses = list(pool.map(one, range(2 * MANY)))
    assert Counter(statuses) == {200: MANY, 429: MANY}


def test_a_tenant_has_no_more_at_once_than_it_may(shared: Shared) -> None:
    started, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        body = {"model": "demo", "prompt": "1, 2", "max_tokens": 900, "ignore_eos": True, "stream": True}
        headers = {"authorization": "Bearer kv-one-at-a-time"}
        with httpx.stream("POST", shared.url + "/v1/completions", json=body, headers=headers, timeout=60) as response:
            for _ in response.iter_lines():
                started.set()
                if go_on.is_set():
                    return

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert started.wait(20)
        refused = call(shared, "chat", "kv-one-at-a-time")
        assert refused.status == 429
        assert refused.headers["x-refusal-reason"] == "concurrent"
    finally:
        go_on.set()
        thread.join()
    wait_until(lambda: call(shared, "chat", "kv-one-at-a-time").status == 200, 5, "its place did not come back")


# Control and operators


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v2/repository/models/upper/unload"),
        ("POST", "/v2/repository/models/upper/load"),
        ("POST", "/reset_prefix_cache"),  # vLLM's, served in its development mode
        ("GET", "/is_sleeping"),
    ],
)
def test_calls_that_change_the_server_need_an_administrator_and_the_admin_port(
    shared: Shared, method: str, path: str
) -> None:
    def status(url: str, key: str) -> int:
        return httpx.request(method, url + path, json={}, headers={"authorization": f"Bearer {key}"}).status_code

    assert status(shared.url, GOLD) == 404
    assert status(shared.url, ADMIN) == 404
    assert status(shared.admin_url, "kv-wrong") == 401
    assert status(shared.admin_url, GOLD) == 403
    assert status(shared.admin_url, ADMIN) == 200


def test_loading_over_grpc_needs_an_administrator(shared: Shared) -> None:
    with grpc.insecure_channel(shared.grpc_address) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        request = service_pb2.RepositoryModelLoadRequest(model_name="upper")
        with pytest.raises(grpc.RpcError) as caught:
            stub.RepositoryModelLoad(request, metadata=(("authorization", f"Bearer {GOLD}"),))
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        stub.RepositoryModelLoad(request, metadata=(("authorization", f"Bearer {ADMIN}"),))


def test_metrics_are_on_the_admin_port_alone(shared: Shared) -> None:
    assert shared.status("/metrics") == 401
    text = httpx.get(shared.admin_url + "/metrics").text
    assert 'tenant="gold"' in text
    assert "vllm:num_requests_running" in text
    assert httpx.get(shared.admin_url + "/v2/health/ready").status_code == 200


def test_the_queue_is_shown_to_operators(shared: Shared) -> None:
    headers = {"authorization": f"Bearer {ADMIN}"}
    stats = httpx.get(shared.url + "/v1/queue/stats", headers=headers).json()
    assert stats["slots"] == 8


@pytest.mark.parametrize("path", ["/v1/queue/stats", "/v1/adapters/stats"])
def test_what_all_tenants_did_is_for_operators(shared: Shared, path: str) -> None:
    def status(key: str) -> int:
        return httpx.get(shared.url + path, headers={"authorization": f"Bearer {key}"}).status_code

    assert status(ADMIN) == 200
    assert status(GOLD) == 403


# Classes


@pytest.mark.parametrize("protocol", ["chat", "infer", "grpc"])
def test_only_who_may_chooses_a_higher_class(shared: Shared, protocol: str) -> None:
    assert call(shared, protocol, GOLD, x_priority="critical").status == 200
    assert call(shared, protocol, BATCH, x_priority="critical").status == 403
    assert call(shared, protocol, GOLD, x_priority="low").status == 200
    assert call(shared, protocol, GOLD, x_priority="urgent").status == 400


def test_who_waits_too_long_in_the_queue_is_told_so(shared: Shared) -> None:
    go_on = threading.Event()
    body = {"model": "demo", "prompt": "1, 2", "max_tokens": 1000, "n": 8, "ignore_eos": True, "stream": True}

    def hold() -> None:
        headers = {"authorization": f"Bearer {GOLD}"}
        while not go_on.is_set():
            with httpx.stream("POST", shared.url + "/v1/completions", json=body, headers=headers, timeout=60) as held:
                for _ in held.iter_lines():
                    if go_on.is_set():
                        return

    def stats() -> dict[str, Any]:
        headers = {"authorization": f"Bearer {ADMIN}"}
        tree: dict[str, Any] = httpx.get(shared.url + "/v1/queue/stats", headers=headers, timeout=20).json()
        return tree

    threads = [threading.Thread(target=hold) for _ in range(12)]
    for thread in threads:
        thread.start()
    try:
        wait_until(lambda: stats()["in_use"] == 8, 20, "the slots were never full")
        # Below the others, so that it never gets a turn before them.
        answer = call(shared, "chat", BATCH)
        assert answer.status == 503
        assert answer.headers["x-refusal-reason"] == "queue_timeout"
        assert int(answer.headers["retry-after"]) >= 1
        assert stats()["timed_out"] >= 1
    finally:
        go_on.set()
        for thread in threads:
            thread.join()
    wait_until(lambda: stats()["in_use"] == 0, 10, "slots did not come back")


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/v1/chat/completions", "application/json"),
        ("/v1/messages", "application/json"),
        ("/v1/completions", "text/plain"),  # read by vLLM's own handler
        ("/v2/models/demo/infer", "application/json"),
        ("/v1/models/demo:predict", "application/json"),
    ],
)
def test_bodies_that_do_not_come_give_their_slots_back(shared: Shared, path: str, kind: str) -> None:
    request_id = f"slow-{time.time_ns()}"
    head = (
        f"POST {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {GOLD}\r\nx-request-id: {request_id}\r\n"
        f'content-type: {kind}\r\ncontent-length: 100\r\n\r\n{{"model": '
    )

    def send(_: int) -> bytes:
        with socket.create_connection(("127.0.0.1", shared.http_port), timeout=20) as sock:
            sock.sendall(head.encode())
            return b"".join(iter(lambda: sock.recv(65536), b""))

    with ThreadPoolExecutor(12) as pool:  # more than there are slots
        slow = pool.map(send, range(12))
        time.sleep(1)
        assert call(shared, "chat", GOLD).status == 200
        for answer in slow:
            assert answer.startswith(b"HTTP/1.1 408 "), answer
            assert b"--body-timeout" in answer
            assert b"connection: close" in answer.lower()
    stats = httpx.get(shared.url + "/v1/queue/stats", headers={"authorization": f"Bearer {ADMIN}"}).json()
    assert (stats["in_use"], stats["waiting"]) == (0, 0)
    wait_until(lambda: len(shared.records(request_id=request_id)) == 12, 5, "records are missing")
    for record in shared.records(request_id=request_id):
        assert (record["outcome"], record["status"], record["output_tokens"]) == ("refused", 408, 0)


# Usage


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_each_request_leaves_one_usage_record(shared: Shared, protocol: str) -> None:
    request_id = f"usage-{protocol}-{time.time_ns()}"
    answer = call(shared, protocol, GOLD, x_request_id=request_id)
    assert answer.status == 200
    wanted = request_id + ("-1" if protocol == "grpc-stream" else "")
    wait_until(lambda: len(shared.records(request_id=wanted)) == 1, 5, "no record")
    record = shared.records(request_id=wanted)[0]
    assert (record["tenant"], record["key_id"], record["model"]) == ("gold", "gold", "demo")
    assert record["outcome"] == "ok"
    assert record["prompt_tokens"] > 0
    assert record["output_tokens"] > 0
    assert record["priority"] == "high"
    assert GOLD not in json.dumps(record)


def test_what_was_refused_leaves_a_record_too(shared: Shared) -> None:
    request_id = f"refused-{time.time_ns()}"
    assert call(shared, "chat", UPPER, x_request_id=request_id).status == 403
    wait_until(lambda: len(shared.records(request_id=request_id)) == 1, 5, "no record")
    record = shared.records(request_id=request_id)[0]
    assert (record["outcome"], record["status"], record["output_tokens"]) == ("refused", 403, 0)


def test_no_key_is_in_the_log(shared: Shared) -> None:
    assert call(shared, "chat", "kv-wrong").status == 401
    for key in (GOLD, ADMIN, "kv-wrong"):
        assert key not in shared.log


# Files and batches


def batch_line(number: int, url: str = "/v1/chat/completions", **changed: Any) -> dict[str, Any]:
    """A request of a batch."""
    body: dict[str, Any] = {"model": "demo", "max_tokens": 8, "temperature": 0}
    if url == "/v1/chat/completions":
        body["messages"] = [{"role": "user", "content": f"What is {number} + 1?"}]
    else:
        body |= {"/v1/completions": {"prompt": f"{number} + 1 ="}, "/v1/responses": {"input": f"{number} + 1 ="}}[url]
    if url == "/v1/responses":
        body["max_output_tokens"] = body.pop("max_tokens")
    return {"custom_id": f"id-{number}", "method": "POST", "url": url, "body": {**body, **changed}}


def client(server: Server, tenant: str, prefix: str = "/v1") -> openai.OpenAI:
    """OpenAI's SDK with a tenant's key."""
    return openai.OpenAI(base_url=server.url + prefix, api_key=f"kv-{tenant}", max_retries=0)


def uploaded(api: openai.OpenAI, lines: list[dict[str, Any]]) -> FileObject:
    """A file with these lines."""
    content = "".join(json.dumps(each) + "\n" for each in lines).encode()
    return api.files.create(file=("in.jsonl", content), purpose="batch")


def over(api: openai.OpenAI, batch_id: str, timeout_s: float = 120.0) -> Batch:
    """A batch, once it is over."""
    deadline = time.monotonic() + timeout_s
    while (found := api.batches.retrieve(batch_id)).status not in ("completed", "failed", "expired", "cancelled"):
        assert time.monotonic() < deadline, found
        time.sleep(0.2)
    return found


def answers(api: openai.OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    """What stands in a results file."""
    assert file_id is not None
    return [json.loads(each) for each in api.files.content(file_id).text.splitlines()]


@pytest.mark.parametrize("prefix", ["/v1", "/openai/v1"])
def test_openais_sdk_keeps_files(shared: Shared, prefix: str) -> None:
    api, other = client(shared, "gold", prefix), client(shared, "batch", prefix)
    kept = uploaded(api, [batch_line(0)])
    assert (kept.object, kept.purpose, kept.filename, kept.status) == ("file", "batch", "in.jsonl", "processed")
    assert kept.expires_at is not None
    assert kept.expires_at - kept.created_at == 30 * 86_400
    assert api.files.retrieve(kept.id) == kept
    assert json.loads(api.files.content(kept.id).text) == batch_line(0)
    second = api.files.create(file=b"{}", purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600})
    assert second.expires_at == second.created_at + 3600
    # Two pages of one.
    assert [each.id for each in api.files.list(limit=1)][:2] == [second.id, kept.id]
    assert [each.id for each in api.files.list(order="asc", purpose="batch")][-1] == second.id
    assert list(api.files.list(purpose="vision")) == []
    assert kept.id not in [each.id for each in other.files.list()]
    for asking in (other.files.retrieve, other.files.content, other.files.delete):
        with pytest.raises(openai.NotFoundError, match="there is no file"):
            asking(kept.id)
    for each in (kept, second):
        assert api.files.delete(each.id).deleted
    with pytest.raises(openai.NotFoundError):
        api.files.retrieve(kept.id)
    with pytest.raises(openai.BadRequestError, match="purpose must be batch"):
        api.files.create(file=b"{}", purpose="fine-tune")
    with pytest.raises(openai.AuthenticationError):
        client(shared, "nobody").files.list()


@pytest.mark.parametrize("url", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
def test_openais_sdk_runs_batches(shared: Shared, url: str) -> None:
    api = client(shared, "gold")
    lines = [*(batch_line(n, url) for n in range(6)), {**batch_line(6, url), "body": {"model": "nobody"}}]
    source = uploaded(api, lines)
    made = api.batches.create(
        input_file_id=source.id,
        endpoint=url,
        completion_window="24h",
        metadata={"run": url},  # type: ignore[arg-type]
    )
    assert (made.object, made.endpoint, made.metadata) == ("batch", url, {"run": url})
    assert made.expires_at == made.created_at + 86_400
    api.files.delete(source.id)
    done = over(api, made.id)
    assert done.status == "completed", done
    assert done.request_counts is not None
    assert done.request_counts.model_dump() == {"completed": 6, "failed": 1, "total": 7}
    assert done.model == "demo"
    good, bad = answers(api, done.output_file_id), answers(api, done.error_file_id)
    assert sorted(each["custom_id"] for each in good) == [f"id-{n}" for n in range(6)]
    assert [each["custom_id"] for each in bad] == ["id-6"]
    assert bad[0]["response"]["status_code"] == 400
    assert bad[0]["response"]["body"]["error"]["message"]
    assert set(good[0]) == {"id", "custom_id", "response", "error"}
    assert done.usage is not None
    assert done.usage.output_tokens > 0
    # The same as a client of its own is answered, and accounted for its tenant.
    line = next(each for each in lines if each["custom_id"] == good[0]["custom_id"])
    alone = httpx.post(shared.url + url, json=line["body"], headers={"authorization": "Bearer kv-gold"}).json()
    assert text_of(alone) == text_of(good[0]["response"]["body"])
    records = shared.records(request_id=good[0]["response"]["request_id"])
    assert [(each["tenant"], each["priority"], each["outcome"]) for each in records] == [("gold", "batch", "ok")]
    assert made.id in [each.id for each in api.batches.list(limit=3)]
    other = client(shared, "batch")
    assert list(other.batches.list()) == []
    for asking in (other.batches.retrieve, other.batches.cancel):
        with pytest.raises(openai.NotFoundError, match="there is no batch"):
            asking(made.id)


def text_of(answer: dict[str, Any]) -> Any:
    """The text of an answer of any of the three endpoints."""
    if "output" in answer:
        return answer["output"][-1]["content"][0]["text"]
    choice = answer["choices"][0]
    return choice["message"]["content"] if "message" in choice else choice["text"]


def test_a_batch_that_can_not_be_done_is_refused_or_fails_with_the_line(shared: Shared) -> None:
    api = client(shared, "gold")
    with pytest.raises(openai.BadRequestError, match="endpoint must be one of /v1/chat/completions"):
        api.batches.create(input_file_id="file-x", endpoint="/v1/moderations", completion_window="24h")
    with pytest.raises(openai.NotFoundError, match="there is no file 'file-x'"):
        api.batches.create(input_file_id="file-x", endpoint="/v1/completions", completion_window="24h")
    source = uploaded(api, [batch_line(0), batch_line(0)])
    with pytest.raises(openai.BadRequestError, match="completion_window must be 24h"):
        api.batches.create(input_file_id=source.id, endpoint="/v1/completions", completion_window="1y")  # type: ignore[arg-type]
    made = api.batches.create(input_file_id=source.id, endpoint="/v1/chat/completions", completion_window="24h")
    done = over(api, made.id)
    assert done.status == "failed"
    assert done.errors is not None
    assert done.errors.data is not None
    assert (done.errors.data[0].code, done.errors.data[0].line) == ("duplicate_custom_id", 2)


def test_limits_of_the_tenant_hold_for_its_batch(shared: Shared) -> None:
    api = client(shared, "upper")
    made = api.batches.create(
        input_file_id=uploaded(api, [batch_line(0), batch_line(1, model="upper")]).id,
        endpoint="/v1/chat/completions",
        completion_window="24h",
    )
    done = over(api, made.id)
    (good,), (bad,) = answers(api, done.output_file_id), answers(api, done.error_file_id)
    assert good["custom_id"] == "id-1"
    assert bad["response"]["status_code"] == 403


def test_what_a_killed_replica_had_begun_is_finished_by_another(shared: Shared) -> None:
    arguments = [
        *DEMO,
        "--max-model-len",
        "1024",
        "--keys-file",
        str(shared.keys),
        "--batch-dir",
        str(shared.batches),
        "--batch-concurrency",
        "2",
    ]
    replica = Server(arguments)
    try:
        replica.wait_ready()
        api = client(replica, "gold")
        lines = [batch_line(n, max_tokens=60, ignore_eos=True) for n in range(150)]
        source = uploaded(api, lines)
        made = api.batches.create(input_file_id=source.id, endpoint="/v1/chat/completions", completion_window="24h")

        def begun() -> int:
            counts = api.batches.retrieve(made.id).request_counts
            return counts.completed if counts is not None else 0

        wait_until(lambda: begun() >= 10, 60, "the batch did not begin")
        assert begun() < 150
        children = replica.children()
        replica.process.kill()
        for child in children:
            child.kill()
        done = over(client(shared, "gold"), made.id)
    finally:
        replica.stop()
    assert done.request_counts is not None
    assert done.request_counts.model_dump() == {"completed": 150, "failed": 0, "total": 150}
    answered = sorted(each["custom_id"] for each in answers(client(shared, "gold"), done.output_file_id))
    assert answered == sorted(each["custom_id"] for each in lines)


def test_a_cancelled_batch_is_cancelled(shared: Shared) -> None:
    api = client(shared, "gold")
    lines = [batch_line(n, max_tokens=900, ignore_eos=True) for n in range(100)]
    made = api.batches.create(
        input_file_id=uploaded(api, lines).id, endpoint="/v1/chat/completions", completion_window="24h"
    )
    assert api.batches.cancel(made.id).status == "cancelling"
    done = over(api, made.id)
    assert done.status == "cancelled"
    assert done.cancelled_at is not None
    left = [each for each in answers(api, done.error_file_id) if each["response"] is None]
    assert {each["error"]["code"] for each in left} == {"batch_cancelled"}
    with pytest.raises(openai.BadRequestError, match="can't be cancelled"):
        api.batches.cancel(made.id)
    text = httpx.get(shared.admin_url + "/metrics").text
    assert 'kserve_vllm_batch_lines_total{outcome="cancelled"}' in text
