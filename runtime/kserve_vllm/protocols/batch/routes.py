"""OpenAI's `/v1/files` and `/v1/batches`. A caller sees what its tenant has, and nothing else."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable

import orjson
from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from starlette.datastructures import FormData, UploadFile

from kserve_vllm.core.errors import InvalidRequest, NotFound
from kserve_vllm.core.request_context import current
from kserve_vllm.policy.tenants import NO_TENANT
from kserve_vllm.protocols.batch.runner import ENDPOINTS, Runner
from kserve_vllm.protocols.batch.store import BatchStore, Owner
from kserve_vllm.protocols.http import openapi as schemas

_WINDOW = re.compile(r"([1-9][0-9]{0,4})([mhd])")
_WINDOW_MAX_S = 7 * 86_400
_KEEP_LEAST_S, _KEEP_MOST_S = 3600, 2_592_000
_PAIRS = 16
_PAGE = {"files": 10_000, "batches": 100}


class BatchRoutes:
    """Handlers of files and batches.

    Args:
        store: where they are; None where they are switched off.
        runner: told of new batches.
        does: whether the model does what a path asks for.
    """

    def __init__(self, store: BatchStore | None, runner: Runner | None, does: Callable[[str], bool]) -> None:
        self._kept = store
        self._runner = runner
        self._does = does

    # Files

    async def upload(self, request: Request) -> Response:
        """Keep a file, for a batch."""
        store = self._store
        form = await _form(request)
        try:
            content, purpose = form.get("file"), form.get("purpose")
            if not isinstance(content, UploadFile):
                raise InvalidRequest("file: a file is needed, as a part of a form", field="file")
            if purpose != "batch":
                raise InvalidRequest("purpose must be batch: that is what files are kept for here", field="purpose")
            keep_s = _keep_s(form.get("expires_after[anchor]"), form.get("expires_after[seconds]"), "expires_after")
            name = content.filename or "batch.jsonl"
            kept = await asyncio.to_thread(store.add_file, _owner().tenant, name, purpose, content.file, keep_s)
        finally:
            await form.close()
        return _json(kept)

    async def files(self, request: Request) -> Response:
        """The tenant's files, a page at a time."""
        found = await asyncio.to_thread(self._store.list_files, _owner().tenant)
        purpose = request.query_params.get("purpose")
        return _page(request, [each for each in found if purpose in (None, each["purpose"])], "files")

    async def file(self, file_id: str) -> Response:
        """What is known of a file."""
        return _json(await asyncio.to_thread(self._store.file, _owner().tenant, file_id))

    async def content(self, file_id: str) -> Response:
        """A file's content."""
        found = await asyncio.to_thread(self._store.content, _owner().tenant, file_id)
        length = {"content-length": str(found.size)}
        return StreamingResponse(found.pieces, headers=length, media_type="application/octet-stream")

    async def delete(self, file_id: str) -> Response:
        """Forget a file."""
        await asyncio.to_thread(self._store.delete_file, _owner().tenant, file_id)
        return _json({"id": file_id, "object": "file", "deleted": True})

    # Batches

    async def create(self, request: Request) -> Response:
        """Have the requests of a file answered."""
        store = self._store
        try:
            tree = orjson.loads(await request.body())
        except orjson.JSONDecodeError:
            tree = None
        if not isinstance(tree, dict):
            raise InvalidRequest("the body must be a JSON object", field="body")
        endpoint = tree.get("endpoint")
        possible = [path for path in ENDPOINTS if self._does(path)]
        if endpoint not in possible:
            raise InvalidRequest(f"endpoint must be one of {', '.join(possible)}", field="endpoint")
        source = tree.get("input_file_id")
        if not isinstance(source, str):
            raise InvalidRequest("input_file_id must be the id of a file", field="input_file_id")
        metadata = tree.get("metadata")
        if not _is_metadata(metadata):
            raise InvalidRequest(
                f"metadata must be an object of at most {_PAIRS} texts, of up to 512 characters", field="metadata"
            )
        window = tree.get("completion_window")
        window_s = _window_s(window)
        after = tree.get("output_expires_after") or {}
        if not isinstance(after, dict):
            raise InvalidRequest("output_expires_after must be an object", field="output_expires_after")
        keep_s = _keep_s(after.get("anchor"), after.get("seconds"), "output_expires_after")
        wanted = {"input_file_id": source, "endpoint": endpoint, "completion_window": window, "metadata": metadata}
        made = await asyncio.to_thread(store.add_batch, _owner(), wanted, window_s, keep_s)
        self._wake()
        return _json(_batch(made))

    async def batches(self, request: Request) -> Response:
        """The tenant's batches, a page at a time."""
        found = await asyncio.to_thread(self._store.list_batches, _owner().tenant)
        return _page(request, [_batch(each) for each in found], "batches")

    async def batch(self, batch_id: str) -> Response:
        """How a batch is doing."""
        return _json(_batch(await asyncio.to_thread(self._store.batch, _owner().tenant, batch_id)))

    async def cancel(self, batch_id: str) -> Response:
        """Answer no more of a batch's requests."""
        found = await asyncio.to_thread(self._store.cancel, _owner().tenant, batch_id)
        self._wake()
        return _json(_batch(found))

    def router(self) -> APIRouter:
        """The routes."""
        router = APIRouter(prefix="/v1", tags=["Files and batches"])
        file, batch, errors = schemas.FILE, schemas.BATCH, schemas.KEPT_ERRORS
        router.add_api_route(
            "/files", self.upload, methods=["POST"], openapi_extra=schemas.UPLOAD, responses=file | errors
        )
        router.add_api_route("/files", self.files, methods=["GET"], responses=schemas.KEPT_LIST | errors)
        router.add_api_route(
            "/files/{file_id}/content", self.content, methods=["GET"], responses=schemas.CONTENT | errors
        )
        router.add_api_route("/files/{file_id}", self.file, methods=["GET"], responses=file | errors)
        router.add_api_route("/files/{file_id}", self.delete, methods=["DELETE"], responses=schemas.DELETED | errors)
        router.add_api_route(
            "/batches",
            self.create,
            methods=["POST"],
            openapi_extra=schemas.body("BatchRequest"),
            responses=batch | errors,
        )
        router.add_api_route("/batches", self.batches, methods=["GET"], responses=schemas.KEPT_LIST | errors)
        router.add_api_route("/batches/{batch_id}/cancel", self.cancel, methods=["POST"], responses=batch | errors)
        router.add_api_route("/batches/{batch_id}", self.batch, methods=["GET"], responses=batch | errors)
        return router

    @property
    def _store(self) -> BatchStore:
        if self._kept is None:
            raise NotFound("files and batches are switched off here; --batch-dir switches them on")
        return self._kept

    def _wake(self) -> None:
        if self._runner is not None:
            self._runner.wake()


def _owner() -> Owner:
    """Who asks, as enforcement has found out."""
    context = current.get()
    return Owner(context.access.tenant, context.access.key_id) if context is not None else Owner(NO_TENANT, None)


async def _form(request: Request) -> FormData:
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise InvalidRequest("a file is sent as multipart/form-data", field="file")
    from starlette.exceptions import HTTPException

    try:
        return await request.form(max_files=1, max_fields=16)
    except HTTPException as error:
        raise InvalidRequest(f"the form can't be read: {error.detail}", field="file") from None


def _page(request: Request, found: list[dict[str, object]], what: str) -> Response:
    """A page of a list, by OpenAI's `after`, `limit` and `order`."""
    asked = request.query_params
    most = _PAGE[what]
    limit = asked.get("limit", str(most if what == "files" else 20))
    if not (limit.isascii() and limit.isdigit() and len(limit) <= 5 and 1 <= int(limit) <= most):
        raise InvalidRequest(f"limit must be a whole number from 1 to {most}", field="limit")
    if asked.get("order", "desc") not in ("asc", "desc"):
        raise InvalidRequest("order must be asc or desc", field="order")
    if asked.get("order") == "asc":
        found = found[::-1]
    if (after := asked.get("after")) is not None:
        at = next((index for index, each in enumerate(found) if each["id"] == after), None)
        if at is None:
            raise InvalidRequest("after must be the id of one of them", field="after")
        found = found[at + 1 :]
    page = found[: int(limit)]
    first, last = (page[0]["id"], page[-1]["id"]) if page else (None, None)
    has_more = len(found) > len(page)
    return _json({"object": "list", "data": page, "first_id": first, "last_id": last, "has_more": has_more})


def _window_s(window: object) -> int:
    match = _WINDOW.fullmatch(window) if isinstance(window, str) else None
    seconds = int(match[1]) * {"m": 60, "h": 3600, "d": 86_400}[match[2]] if match else 0
    if not 0 < seconds <= _WINDOW_MAX_S:
        raise InvalidRequest(
            "completion_window must be 24h, or another time up to 7d in minutes, hours or days",
            field="completion_window",
        )
    return seconds


def _keep_s(anchor: object, seconds: object, field: str) -> int | None:
    if anchor is None and seconds is None:
        return None
    text = str(seconds)
    if anchor != "created_at" or not (text.isascii() and text.isdigit() and len(text) <= 7):
        raise InvalidRequest(f"{field} must have the anchor created_at, and seconds", field=field)
    if not _KEEP_LEAST_S <= int(text) <= _KEEP_MOST_S:
        raise InvalidRequest(f"{field}.seconds must be from {_KEEP_LEAST_S} to {_KEEP_MOST_S}", field=field)
    return int(text)


def _is_metadata(tree: object) -> bool:
    if tree is None:
        return True
    return (
        isinstance(tree, dict)
        and len(tree) <= _PAIRS
        and all(isinstance(value, str) and len(name) <= 64 and len(value) <= 512 for name, value in tree.items())
    )


def _batch(tree: dict[str, object]) -> dict[str, object]:
    """A batch without what it has not come to: OpenAI's description lets `metadata` alone be null."""
    return {name: value for name, value in tree.items() if value is not None or name == "metadata"}


def _json(tree: object) -> Response:
    return Response(orjson.dumps(tree), media_type="application/json")
