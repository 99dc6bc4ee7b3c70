"""The fast way of a common OpenAI request, past vLLM's web framework.

Answers `POST /v1/chat/completions` and `/v1/completions`. A stream is put together from bytes and written as the
engine's output comes, where the body holds nothing but fields that are known not to change how a stream looks. A whole
answer is that of vLLM's handler, whatever the body holds. Everything else is handed to vLLM's app with the body
replayed, and so is a body that vLLM refuses. To a client the two are the same.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Generator
from functools import partial
from typing import TYPE_CHECKING

import orjson

from kserve_vllm.core.errors import RequestError
from kserve_vllm.engine.patches.openai_answer import AnswerHandler, Question
from kserve_vllm.engine.patches.openai_stream import Kind, OpenAIStream, StreamHandler, headers
from kserve_vllm.engine.vllm import VLLMEngine
from kserve_vllm.protocols import errors as protocol_errors
from kserve_vllm.protocols.http.disconnect import resume, until_disconnect

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger(__name__)

Headers = list[tuple[bytes, bytes]]

PATHS: dict[str, Kind] = {"/v1/chat/completions": "chat", "/v1/completions": "completion"}

# Fields that change what the engine is asked for, but not how the answer is written down. vLLM checks their values.
_FIELDS = frozenset(
    "model stream stream_options temperature top_p top_k min_p n max_tokens stop seed presence_penalty "
    "frequency_penalty repetition_penalty logit_bias ignore_eos min_tokens stop_token_ids include_stop_str_in_output "
    "skip_special_tokens spaces_between_special_tokens user response_format structured_outputs priority cache_salt "
    "bad_words allowed_token_ids truncate_prompt_tokens truncation_side add_special_tokens request_id "
    "session_id".split()
)
_ALLOWED: dict[Kind, frozenset[str]] = {
    "chat": _FIELDS
    | {"messages", "max_completion_tokens", "chat_template_kwargs", "add_generation_prompt", "continue_final_message"},
    "completion": _FIELDS | {"prompt"},
}
_MESSAGE_FIELDS = frozenset({"role", "content", "name"})
_STREAM_OPTIONS = frozenset({"include_usage", "continuous_usage_stats"})
_DONE = b"data: [DONE]\n\n"


class FastPath:
    """Answers one of the two paths.

    Args:
        kind: which one.
        streams: begins streams in the engine; None where vLLM has to write them.
        answers: takes requests for whole answers; None where vLLM has to.
        vllm: vLLM's own app, which mends bodies itself.
        mend: mends a parsed body for a path.
        stream_headers, answer_headers: at the head of every stream and of every whole answer.
        count: told for every request whether it was answered here (`fast`) or by vLLM (`vllm`).
    """

    def __init__(
        self,
        kind: Kind,
        streams: StreamHandler | None,
        answers: AnswerHandler | None,
        vllm: ASGIApp,
        mend: Callable[[str, dict[str, object]], bool],
        stream_headers: Headers,
        answer_headers: Headers,
        count: Callable[[str], None],
    ) -> None:
        self._kind = kind
        self._streams = streams
        self._answers = answers
        self._vllm = vllm
        self._mend = mend
        self._stream_headers = stream_headers
        self._answer_headers = answer_headers
        self._count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send, body_send: Send) -> None:
        """ASGI, with a second `send` for all of a body but its first message, past whatever wraps the first.

        Raises:
            RequestError: a policy refused the request before its first token, or it asks for what is not done here.
            ClientGone: the client left before its answer.
        """
        if scope["method"] != "POST" or not _headers_allow(scope):
            self._count("vllm")
            return await self._vllm(scope, receive, send)
        chunks: list[bytes] = []
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return None
            chunks.append(message.get("body", b""))
            if not message.get("more_body"):
                break
        body = b"".join(chunks)
        tree = _parsed(body)
        if tree is not None:
            self._mend(scope["path"], tree)
        if tree is not None and tree.get("stream") is True:
            if self._streams is not None and streamable(self._kind, tree):
                stream = await self._streams.begin(self._kind, tree, scope)
                if stream is not None:
                    return await self._stream(stream, scope["path"], receive, send, body_send)
        elif tree is not None and not tree.get("stream") and self._answers is not None:
            question = self._answers.take(self._kind, tree, scope, streamable(self._kind, tree))
            if question is not None:
                return await self._answer(question, receive, send)
        self._count("vllm")
        return await self._vllm(scope, _replay(body, receive), send)

    async def _stream(self, stream: OpenAIStream, path: str, receive: Receive, send: Send, body_send: Send) -> None:
        self._count("fast")
        try:
            await _Response(stream, path, self._stream_headers, send, body_send).run(receive)
        finally:
            await stream.close()

    async def _answer(self, question: Question, receive: Receive, send: Send) -> None:
        self._count("fast")
        answer = await until_disconnect(receive, question.answer())
        head = [(b"content-length", b"%d" % len(answer.body)), *self._answer_headers]
        await send({"type": "http.response.start", "status": answer.status, "headers": head})
        await send({"type": "http.response.body", "body": answer.body})


async def fast_paths(
    engine: VLLMEngine,
    streams: StreamHandler | None,
    answers: AnswerHandler | None,
    vllm: ASGIApp,
    count: Callable[[str], None],
) -> dict[str, FastPath]:
    """The paths that are answered here, as far as this model and vLLM's flags allow it; None leaves a kind of answers
    to vLLM."""
    stream_headers = await headers(engine, "text/event-stream; charset=utf-8")
    answer_headers = await headers(engine, "application/json")
    return {
        path: FastPath(
            kind,
            streams if streams is not None and streams.serves(kind) else None,
            answers if answers is not None and answers.serves(kind) else None,
            vllm,
            engine.mender.mend,
            stream_headers,
            answer_headers,
            count,
        )
        for path, kind in PATHS.items()
        if any(each is not None and each.serves(kind) for each in (streams, answers))
    }


def _parsed(body: bytes) -> dict[str, object] | None:
    """A body that is a JSON object."""
    try:
        tree = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    return tree if isinstance(tree, dict) else None


def streamable(kind: Kind, tree: dict[str, object]) -> bool:
    """Whether a stream, or a whole answer, can be written here; else vLLM's own code has to."""
    if not _ALLOWED[kind].issuperset(tree):
        return False
    if tree.get("n", 1) not in (None, 1) or isinstance(tree.get("n"), bool):
        return False
    options = tree.get("stream_options")
    if options is not None and not (
        isinstance(options, dict)
        and _STREAM_OPTIONS.issuperset(options)
        and all(value is None or isinstance(value, bool) for value in options.values())
    ):
        return False
    if kind == "completion":
        return _plain_prompt(tree.get("prompt"))
    messages = tree.get("messages")
    return isinstance(messages, list) and all(map(_plain_message, messages))


def _plain_prompt(prompt: object) -> bool:
    """Whether a prompt is one text, or the token ids of one."""
    if isinstance(prompt, list):
        return bool(prompt) and all(type(token) is int for token in prompt)
    return isinstance(prompt, str)


def _plain_message(message: object) -> bool:
    """Whether a message is text alone."""
    if not isinstance(message, dict) or not _MESSAGE_FIELDS.issuperset(message):
        return False
    content = message.get("content")
    if isinstance(content, list):
        return all(
            isinstance(part, dict) and part.keys() == {"type", "text"} and part["type"] == "text" for part in content
        )
    return content is None or isinstance(content, str)


def _headers_allow(scope: Scope) -> bool:
    """Whether the body is said to be JSON, and nobody wants headers that vLLM's app would add."""
    content_type = b""
    for name, value in scope["headers"]:
        if name == b"content-type":
            content_type = value
        elif name in (b"origin", b"endpoint-load-metrics-format"):
            return False
    return content_type.split(b";", 1)[0].lower() == b"application/json"


def _replay(body: bytes, receive: Receive) -> Receive:
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return waiting.pop() if waiting else await receive()

    return replayed


class _Response:
    """Writes one stream. Frames are made and written in callbacks of the event loop, in no task, as outputs come."""

    __slots__ = (
        "_blocked",
        "_ended",
        "_frames",
        "_headers",
        "_opened",
        "_path",
        "_rest",
        "_send",
        "_start",
        "_stream",
        "_tokens",
    )

    def __init__(self, stream: OpenAIStream, path: str, headers: Headers, start: Send, send: Send) -> None:
        self._stream = stream
        self._frames = stream.frames
        self._path = path
        self._headers = headers
        self._start = start
        self._send = send
        self._tokens = 0
        self._opened = False
        self._blocked = False
        self._ended = False
        self._rest: asyncio.Task[None] | None = None

    async def run(self, receive: Receive) -> None:
        """Return when the response is complete or the client is gone.

        Raises:
            RequestError: a policy refused the request before its first token.
        """
        if self._stream.refusable and not await self._first_output(receive):
            return
        await self._start({"type": "http.response.start", "status": 200, "headers": list(self._headers)})
        self._stream.on_ready = self._make
        if self._stream.waiting:
            self._make_and_write()
        try:
            # Says `http.disconnect` when the client is gone, and also when the response is complete.
            while (await receive())["type"] != "http.disconnect":
                pass
        finally:
            self._ended = True
            if self._rest is not None:
                self._rest.cancel()

    async def _first_output(self, receive: Receive) -> bool:
        """Wait for the first output; False if the client left before it."""
        came = asyncio.get_running_loop().create_future()

        def tell() -> None:
            if not came.done():
                came.set_result(None)

        self._stream.on_ready = tell
        leaving = asyncio.ensure_future(receive())
        try:
            if not self._stream.waiting:
                await asyncio.wait({came, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            left = leaving.done() and not self._stream.waiting
            leaving.cancel()
        if isinstance(self._stream.error, RequestError) and not self._stream.begun:
            raise self._stream.error
        return not left

    def _make(self) -> Callable[[], None] | None:
        """Make one message of what has come since the last time; returns what sends it, if there is any."""
        if self._blocked or self._ended:
            return None
        body = self._frame_of_text() or self._frames_so_far()
        if not body:
            return None
        return partial(self._write, body)

    def _write(self, body: bytes) -> None:
        """Send one message."""
        send = self._send if self._opened else self._start
        self._opened = True
        sending = send({"type": "http.response.body", "body": body, "more_body": not self._ended}).__await__()
        try:
            # Done at once, unless the client reads too slowly: no task is needed for that.
            waits_for = next(sending)
        except StopIteration:
            return
        self._blocked = True
        self._rest = asyncio.get_running_loop().create_task(self._go_on(sending, waits_for))

    def _make_and_write(self) -> None:
        if write := self._make():
            write()

    async def _go_on(self, sending: Generator[object, object, None], waits_for: object) -> None:
        """Finish a message that could not be sent at once; then send what came meanwhile."""
        await resume(sending, waits_for)
        self._blocked = False
        if self._stream.waiting:
            self._make_and_write()

    def _frame_of_text(self) -> bytes | None:
        """The frame, where text in the middle of an answer is all that has come: `_frames_so_far`, but cheaper."""
        stream, frames = self._stream, self._frames
        text = stream.text
        if not text or not self._opened or frames.with_usage or stream.finish_reason is not None or stream.error:
            return None
        self._tokens += stream.new_tokens
        stream.text, stream.new_tokens = "", 0
        return b"%b%b%b" % (frames.head, orjson.dumps(text), frames.tail)

    def _frames_so_far(self) -> bytes:
        """Frames for all that has come, as vLLM's generator would write them for an output of the same content."""
        stream, frames = self._stream, self._frames
        text, count, reason = stream.text, stream.new_tokens, stream.finish_reason
        stream.text, stream.new_tokens = "", 0
        before, self._tokens = self._tokens, self._tokens + count
        parts: list[bytes] = []
        if stream.begun and not self._opened and frames.first:
            parts.append(self._counted(frames.first, 0))
        if reason is None:
            if (text or count) and (text or not stream.skips_empty):
                parts.append(self._counted(b"".join((frames.head, orjson.dumps(text), frames.tail)), self._tokens))
            if stream.error is None:
                return b"".join(parts)
            parts.append(self._failure(stream.error))
        elif reason == "error":
            parts.append(stream.failure())
        else:
            if text or count or before or frames.ends_without_tokens:
                empty = not text and (stream.skips_empty or not (count or before))
                parts.append(self._counted(frames.fill_last(text, reason, stream.stop_reason, empty), self._tokens))
            if stream.include_usage:
                parts.append(stream.usage(self._tokens))
        self._ended = True
        parts.append(_DONE)
        return b"".join(parts)

    def _counted(self, frame: bytes, tokens: int) -> bytes:
        """The frame, with token counts where the client wants them in every one."""
        return self._frames.fill_usage(frame, self._stream.prompt_tokens, tokens) if self._frames.with_usage else frame

    def _failure(self, error: Exception) -> bytes:
        if isinstance(error, RequestError):
            return b"data: " + protocol_errors.error_body(self._path, error) + b"\n\n"
        return self._stream.failure()
