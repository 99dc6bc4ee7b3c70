"""OpenAI's SDK on the real edge, with real keys, limits and queue; a small app answers in place of vLLM's.

The same on the engine, and a replica that is killed, are in tests/engine/test_shared_server.py.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path
from typing import Any

import openai
import pytest
from fastapi import FastAPI
from openai.types import Batch
from prometheus_client import CollectorRegistry

from kserve_vllm.config.settings import ServerSettings
from kserve_vllm.core.errors import RequestError
from kserve_vllm.core.lifecycle import Lifecycle, State
from kserve_vllm.core.request_context import RequestContext
from kserve_vllm.core.types import Priority
from kserve_vllm.policy.enforcement import Enforcement, Policies
from kserve_vllm.policy.priority_queue import PriorityQueue
from kserve_vllm.policy.quotas.counters import MemoryCounters
from kserve_vllm.policy.quotas.limiter import RateLimiter
from kserve_vllm.policy.tenants import Tenants, digest
from kserve_vllm.protocols.batch.routes import BatchRoutes
from kserve_vllm.protocols.batch.runner import Runner
from kserve_vllm.protocols.batch.store import BatchStore, Bounds, place_of
from kserve_vllm.protocols.http.middleware import RequestMiddleware
from kserve_vllm.protocols.http.routes import answer_error
from kserve_vllm.servers.listeners import HTTPServer
from kserve_vllm.telemetry.metrics import Metrics
from kserve_vllm.telemetry.requests import RequestRecorder
from kserve_vllm.telemetry.tracing import Tracing
from tests.robustness.wire import listening
from tests.support import Routed
from tests.support_s3 import bucket_url

CHAT = "/v1/chat/completions"
WINDOW: Any = "24h"


async def answer(scope: Any, receive: Any, send: Any) -> None:
    """Say what was asked, as a chat; 400 to whoever asks for nothing."""
    body = json.loads((await receive())["body"])
    text = body["messages"][0]["content"]
    await asyncio.sleep(0.005)
    tree: dict[str, Any] = {
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    }
    status = 200 if text else 400
    raw = json.dumps(tree if text else {"error": {"message": "nothing is asked", "code": None}}).encode()
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": raw})


class Edge:
    """An edge on a port of its own, with batches in a folder.

    Args:
        folder: for keys, and for batches unless they are off.
        on: whether batches are on.
        where: they are kept, if not in the folder.
    """

    def __init__(self, folder: Path, on: bool = True, where: str | None = None) -> None:
        keys = folder / "keys.json"
        tenants = {"slow": {"limits": {"requests_per_minute": 2}}}
        rows = [{"id": name, "tenant": name, "sha256": digest(f"kv-{name}")} for name in ("gold", "other", "slow")]
        keys.write_text(json.dumps({"tenants": tenants, "keys": rows}))
        lifecycle = Lifecycle()
        lifecycle.to(State.READY)
        self.tenants = Tenants(str(keys))
        self.enforcement = Enforcement(
            lifecycle,
            Policies(
                tenants=self.tenants,
                limits=RateLimiter(MemoryCounters()),
                default_priority=Priority.NORMAL,
                admission=PriorityQueue(8, 64, {}, 60, {Priority.BATCH: 0.5}),
            ),
        )
        self.metrics = Metrics(lifecycle, lambda: 0, registry=CollectorRegistry())
        self.closed: list[RequestContext] = []
        self.opened: list[openai.AsyncOpenAI] = []
        recorder = RequestRecorder(self.metrics, Tracing(), lifecycle, self.closed.append)
        middleware = RequestMiddleware(lifecycle, self.enforcement, 1 << 20, self.metrics.render, dict, recorder)
        self.middleware = middleware
        self.store = BatchStore(place_of(where or str(folder / "batches")), Bounds(10, 1 << 20, 100)) if on else None
        self.runner = (
            Runner(self.store, middleware, self.in_flight, 4, self.metrics) if self.store is not None else None
        )
        app = FastAPI()
        app.include_router(BatchRoutes(self.store, self.runner, middleware.works).router())
        app.add_exception_handler(RequestError, answer_error)
        middleware.attach(app, Routed(answer, CHAT))
        self.server = HTTPServer(middleware, ServerSettings(host="127.0.0.1"), 0)

    def in_flight(self) -> int:
        """Requests that are answered now."""
        return self.enforcement.in_flight

    def sdk(self, tenant: str, prefix: str = "/v1") -> openai.AsyncOpenAI:
        """OpenAI's SDK with a tenant's key."""
        url = f"http://127.0.0.1:{self.server.port}{prefix}"
        made = openai.AsyncOpenAI(base_url=url, api_key=f"kv-{tenant}", max_retries=0)
        self.opened.append(made)
        return made


@asynccontextmanager
async def running(folder: Path, on: bool = True, where: str | None = None) -> AsyncIterator[Edge]:
    edge = Edge(folder, on, where)
    edge.server.start()
    await listening(edge.server)
    if edge.runner is not None:
        edge.runner.start()
    try:
        yield edge
    finally:
        for each in edge.opened:
            await each.close()
        if edge.runner is not None:
            await edge.runner.close()
        await edge.server.stop(1)
    assert edge.enforcement.in_flight == 0


def run(folder: Path, work: Callable[[Edge], Awaitable[None]], on: bool = True, where: str | None = None) -> None:
    """Do something with an edge."""

    async def go() -> None:
        async with asyncio.timeout(60), running(folder, on, where) as edge:
            await work(edge)

    asyncio.run(go())


def line(number: int, text: str | None = None) -> dict[str, Any]:
    """A request of a batch."""
    body = {"model": "demo", "messages": [{"role": "user", "content": f"text {number}" if text is None else text}]}
    return {"custom_id": f"id-{number}", "method": "POST", "url": CHAT, "body": body}


def content(lines: list[dict[str, Any]]) -> tuple[str, bytes]:
    """A file for the SDK."""
    return "in.jsonl", "".join(json.dumps(each) + "\n" for each in lines).encode()


async def over(api: openai.AsyncOpenAI, batch_id: str) -> Batch:
    """A batch, once it is over."""
    while (found := await api.batches.retrieve(batch_id)).status not in ("completed", "failed", "expired", "cancelled"):
        await asyncio.sleep(0.05)
    return found


async def answers(api: openai.AsyncOpenAI, file_id: str | None) -> list[dict[str, Any]]:
    """What stands in a results file."""
    assert file_id is not None
    return [json.loads(each) for each in (await api.files.content(file_id)).text.splitlines()]


@pytest.mark.parametrize("prefix", ["/v1", "/openai/v1"])
def test_openais_sdk_keeps_files(tmp_path: Path, prefix: str) -> None:
    async def ask(edge: Edge) -> None:
        api, other = edge.sdk("gold", prefix), edge.sdk("other", prefix)
        kept = await api.files.create(file=content([line(0)]), purpose="batch")
        assert (kept.object, kept.purpose, kept.filename, kept.status) == ("file", "batch", "in.jsonl", "processed")
        assert kept.expires_at is not None
        assert kept.expires_at - kept.created_at == 30 * 86_400
        assert await api.files.retrieve(kept.id) == kept
        assert await answers(api, kept.id) == [line(0)]
        second = await api.files.create(
            file=b"{}", purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600}
        )
        assert second.expires_at == second.created_at + 3600
        assert [each.id async for each in api.files.list(limit=1)] == [second.id, kept.id]  # two pages
        assert [each.id async for each in api.files.list(order="asc", purpose="batch")] == [kept.id, second.id]
        assert [each.id async for each in api.files.list(purpose="vision")] == []
        assert [each.id async for each in other.files.list()] == []
        for asking in (other.files.retrieve, other.files.content, other.files.delete):
            with pytest.raises(openai.NotFoundError, match="there is no file"):
                await asking(kept.id)
        assert (await api.files.delete(kept.id)).deleted
        with pytest.raises(openai.NotFoundError):
            await api.files.retrieve(kept.id)
        with pytest.raises(openai.BadRequestError, match="purpose must be batch"):
            await api.files.create(file=b"{}", purpose="fine-tune")
        with pytest.raises(openai.AuthenticationError):
            await edge.sdk("nobody", prefix).files.list()
        with pytest.raises(openai.APIStatusError, match="larger than 1 MiB") as caught:
            await api.files.create(file=b"x" * (2 << 20), purpose="batch")
        assert caught.value.status_code == 413

    run(tmp_path, ask)


@pytest.mark.parametrize("kind", ["folder", "bucket"])
def test_openais_sdk_runs_a_batch_as_its_tenants_requests(tmp_path: Path, kind: str) -> None:
    async def ask(edge: Edge) -> None:
        api, other = edge.sdk("gold"), edge.sdk("other")
        lines = [*(line(n) for n in range(30)), line(30, "")]
        source = await api.files.create(file=content(lines), purpose="batch")
        made = await api.batches.create(
            input_file_id=source.id, endpoint=CHAT, completion_window="24h", metadata={"run": "1"}
        )
        assert (made.object, made.endpoint, made.metadata) == ("batch", CHAT, {"run": "1"})
        assert made.expires_at == made.created_at + 86_400
        await api.files.delete(source.id)
        done = await over(api, made.id)
        assert done.status == "completed", done
        assert done.request_counts is not None
        assert done.request_counts.model_dump() == {"completed": 30, "failed": 1, "total": 31}
        assert done.usage is not None
        assert done.usage.total_tokens == 150
        good, bad = await answers(api, done.output_file_id), await answers(api, done.error_file_id)
        assert Counter(each["custom_id"] for each in good) == Counter(f"id-{n}" for n in range(30))
        texts = {each["custom_id"]: each["response"]["body"]["choices"][0]["message"]["content"] for each in good}
        assert texts["id-7"] == "text 7"
        assert [(each["custom_id"], each["response"]["status_code"]) for each in bad] == [("id-30", 400)]
        worked = {each.request_id: each for each in edge.closed if each.endpoint == CHAT}
        for each in (*good, *bad):
            context = worked[each["response"]["request_id"]]
            assert (context.access.tenant, context.access.key_id, context.access.priority) == (
                "gold",
                "gold",
                Priority.BATCH,
            )
        assert [each.id async for each in api.batches.list()] == [made.id]
        assert [each.id async for each in other.batches.list()] == []
        for asking in (other.batches.retrieve, other.batches.cancel):
            with pytest.raises(openai.NotFoundError, match="there is no batch"):
                await asking(made.id)
        shown = edge.metrics.render()[0].decode()
        assert 'kserve_vllm_batch_lines_total{outcome="completed"} 30.0' in shown

    with bucket_url() if kind == "bucket" else nullcontext((None, None)) as (where, _):
        run(tmp_path, ask, where=where)


def test_what_can_not_be_done_is_said(tmp_path: Path) -> None:
    async def ask(edge: Edge) -> None:
        api = edge.sdk("gold")
        source = await api.files.create(file=content([line(0), line(0)]), purpose="batch")
        for wrong, sentence in (
            ({"endpoint": "/v1/embeddings"}, "endpoint must be one of /v1/chat/completions"),
            ({"completion_window": "1y"}, "completion_window must be 24h"),
            ({"metadata": {"a": "b" * 600}}, "metadata must be an object"),
            ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, "output_expires_after.seconds must be"),
        ):
            wanted: Any = {"input_file_id": source.id, "endpoint": CHAT, "completion_window": "24h", **wrong}
            with pytest.raises(openai.BadRequestError, match=sentence):
                await api.batches.create(**wanted)
        with pytest.raises(openai.NotFoundError, match="there is no file 'file-x'"):
            await api.batches.create(input_file_id="file-x", endpoint=CHAT, completion_window=WINDOW)
        made = await api.batches.create(input_file_id=source.id, endpoint=CHAT, completion_window=WINDOW)
        done = await over(api, made.id)
        assert done.status == "failed"
        assert done.errors is not None
        assert done.errors.data is not None
        assert (done.errors.data[0].code, done.errors.data[0].line) == ("duplicate_custom_id", 2)
        with pytest.raises(openai.BadRequestError, match="failed and can't be cancelled"):
            await api.batches.cancel(made.id)

    run(tmp_path, ask)


@pytest.mark.slow
def test_a_tenants_limit_holds_its_batch_back_and_a_key_that_is_gone_ends_it(tmp_path: Path) -> None:
    async def ask(edge: Edge) -> None:
        api = edge.sdk("slow")
        source = await api.files.create(file=content([line(n) for n in range(10)]), purpose="batch")
        made = await api.batches.create(input_file_id=source.id, endpoint=CHAT, completion_window=WINDOW)
        while (
            found := await api.batches.retrieve(made.id)
        ).request_counts is None or not found.request_counts.completed:
            await asyncio.sleep(0.05)
        await asyncio.sleep(1.5)
        assert (
            sum(each.access.tenant == "slow" and each.endpoint == CHAT and each.outcome == "ok" for each in edge.closed)
            == 2
        )
        assert (await api.batches.cancel(made.id)).status == "cancelling"
        done = await over(api, made.id)
        assert done.status == "cancelled"
        assert done.request_counts is not None
        assert (done.request_counts.completed, done.request_counts.failed) == (2, 8)
        assert {each["error"]["code"] for each in await answers(api, done.error_file_id)} == {"batch_cancelled"}
        # A key that is taken out of the file: what is left of its batches is refused as it is.
        own = edge.sdk("other")
        source = await own.files.create(file=content([line(0)]), purpose="batch")
        keys = tmp_path / "keys.json"
        tree = json.loads(keys.read_text())
        tree["keys"] = [each for each in tree["keys"] if each["id"] == "gold"]
        made = await own.batches.create(input_file_id=source.id, endpoint=CHAT, completion_window=WINDOW)
        await over(own, made.id)
        assert edge.store is not None
        assert edge.runner is not None
        await edge.runner.close()
        made = await own.batches.create(input_file_id=source.id, endpoint=CHAT, completion_window=WINDOW)
        keys.write_text(json.dumps(tree))
        assert edge.tenants.reload()
        edge.runner.__init__(  # type: ignore[misc]
            edge.store, edge.middleware, edge.in_flight, 4, edge.metrics
        )
        edge.runner.start()
        while (left := edge.store.batch("other", made.id))["status"] != "completed":
            await asyncio.sleep(0.05)
        assert left["request_counts"] == {"total": 1, "completed": 0, "failed": 1}
        kept = edge.store.content("other", left["error_file_id"])
        (refused,) = b"".join(kept.pieces).splitlines()
        assert json.loads(refused)["response"]["status_code"] == 401

    run(tmp_path, ask)


def test_switched_off_the_routes_say_how_to_switch_them_on(tmp_path: Path) -> None:
    async def ask(edge: Edge) -> None:
        api = edge.sdk("gold")
        for asking in (api.files.list, api.batches.list):
            with pytest.raises(openai.NotFoundError, match="--batch-dir switches them on") as caught:
                await asking()
            assert caught.value.type == "NotFoundError"
        with pytest.raises(openai.NotFoundError, match="--batch-dir"):
            await api.files.create(file=b"{}", purpose="batch")

    run(tmp_path, ask, on=False)
