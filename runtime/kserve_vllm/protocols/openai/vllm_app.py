"""vLLM's app as OpenAI's clients expect it: bodies are mended on their way in, chunks on their way out."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import orjson

from kserve_vllm.engine.hooks.request_repair import Mender, with_null_usage

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send


_STREAMS = ("/v1/chat/completions", "/v1/completions")
_SAGEMAKER = "/invocations"
_ADAPTER = b"x-amzn-sagemaker-adapter-identifier"


class MendedApp:
    """vLLM's app.

    Args:
        app: vLLM's own.
        mender: mends the bodies.
        always_usage: whether every stream has the usage (`--enable-force-include-usage`).
    """

    def __init__(self, app: ASGIApp, mender: Mender, always_usage: bool) -> None:
        self.app = app
        self._mender = mender
        self._always_usage = always_usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI.

        Raises:
            InvalidRequest: the body asks for what is not done here.
        """
        path = scope["path"]
        covered = scope["type"] == "http" and (path == _SAGEMAKER or self._mender.covers(path))
        if not covered or not _has_json(scope):
            await self.app(scope, receive, send)
            return
        messages: list[Message] = []
        while not messages or messages[-1].get("more_body"):
            messages.append(await receive())
        body = b"".join(message.get("body", b"") for message in messages)
        tree = _object(body)
        if tree is not None and path == _SAGEMAKER:
            self._mender.check(tree)
            _name_model(scope, tree)
        elif tree is not None:
            if self._mender.mend(scope["path"], tree):
                # Again with Python's parser, as vLLM does: it keeps numbers of any size.
                whole = json.loads(body)
                self._mender.mend(scope["path"], whole)
                body = json.dumps(whole).encode()
                messages = [{"type": "http.request", "body": body, "more_body": False}]
                kept = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
                scope["headers"] = [*kept, (b"content-length", b"%d" % len(body))]
            if scope["path"] in _STREAMS and tree.get("stream") is True and self._wants_usage(tree):
                send = _with_null_usage(send)
        messages.reverse()

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        await self.app(scope, replay, send)

    def _wants_usage(self, tree: dict[str, object]) -> bool:
        options = tree.get("stream_options")
        return self._always_usage or (isinstance(options, dict) and bool(options.get("include_usage")))


def _name_model(scope: Scope, tree: dict[str, object]) -> None:
    """Write the body's model where SageMaker's routes look for it: without that field they answer with the base model,
    whatever the body says."""
    model = tree.get("model")
    if isinstance(model, str) and not any(name == _ADAPTER for name, _ in scope["headers"]):
        scope["headers"] = [*scope["headers"], (_ADAPTER, model.encode())]


def _with_null_usage(send: Send) -> Send:
    async def sent(message: Message) -> None:
        body = message.get("body")
        if message["type"] == "http.response.body" and body:
            frames = bytes(body).split(b"\n\n")
            message = {**message, "body": b"\n\n".join(map(with_null_usage, frames))}
        await send(message)

    return sent


def _has_json(scope: Scope) -> bool:
    kind = next((value for name, value in scope["headers"] if name == b"content-type"), b"")
    return scope["method"] == "POST" and b"json" in kind.lower()


def _object(body: bytes) -> dict[str, object] | None:
    """A body that is an object: of all that vLLM's parser takes, which is more than JSON (UTF-16, NaN)."""
    try:
        tree = orjson.loads(body)
    except orjson.JSONDecodeError:
        try:
            tree = json.loads(body)
        except (ValueError, RecursionError):
            return None
    return tree if isinstance(tree, dict) else None
