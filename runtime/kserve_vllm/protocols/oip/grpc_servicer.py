"""V2 over gRPC: KServe's `GRPCInferenceService` with Triton's `ModelStreamInfer` under the same service name.

The messages are KServe's own, read from the descriptor that kserve ships, with what Triton's clients need beside them:
`ModelStreamInferResponse`, `InferParameter.double_param` and `uint64_param`, the repository index, a model's
configuration and statistics, and the field in which load and unload name the model. They live in a descriptor pool of
their own, since Triton's client library declares the same names.
Source of the additions' field numbers: triton-inference-server/common, `grpc_service.proto` and `model_config.proto`.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import ParseDict
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from kserve_vllm.core.errors import InternalError, InvalidRequest, NotFound, RequestError
from kserve_vllm.core.lifecycle import Lifecycle
from kserve_vllm.core.request_context import RequestContext
from kserve_vllm.policy.enforcement import Enforcement, Kind, headers_of
from kserve_vllm.protocols import errors as protocol_errors
from kserve_vllm.protocols.oip.grpc_enforcement import KEYLESS, Metadata, Screened
from kserve_vllm.protocols.oip.grpc_stream import Pieces
from kserve_vllm.protocols.oip.protobuf import check_size
from kserve_vllm.protocols.oip.statistics import DATA_TYPES, SPANS
from kserve_vllm.telemetry.requests import RequestRecorder

log = logging.getLogger(__name__)

SERVICE = "inference.GRPCInferenceService"
# Characters of an error's sentence that fit into the trailers (8 KiB by default), percent-encoded.
_MAX_DETAILS = 500
# Requests of one stream that are answered at once, and messages that wait for its client; no more are read then.
MAX_OPEN, MAX_WAITING = 1024, 1024
_KINDS = {"ModelInfer": Kind.WORK, "RepositoryModelLoad": Kind.CONTROL, "RepositoryModelUnload": Kind.CONTROL}
_CONTROL = {"RepositoryModelLoad", "RepositoryModelUnload"}
_WORK = {"ModelInfer", "ModelStreamInfer"}
_OPEN = {"ServerLive", "ServerReady"}
_Field = descriptor_pb2.FieldDescriptorProto
if TYPE_CHECKING:
    from google.protobuf.message import Message
    from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb2

    from kserve_vllm.protocols.oip.grpc_backend import Backend

    _Item: TypeAlias = Message | Pieces
    _Context: TypeAlias = grpc.aio.ServicerContext[Message, Message]


def _descriptor() -> descriptor_pb2.FileDescriptorProto:
    """KServe's file with Triton's additions."""
    # By path: importing the kserve package takes seconds, and this has to answer probes before that.
    spec = importlib.util.find_spec("kserve")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("the kserve package is not installed")
    path = Path(spec.submodule_search_locations[0]) / "protocol" / "grpc" / "grpc_predict_v2_pb2.py"
    module_spec = importlib.util.spec_from_file_location("_kserve_grpc_predict_v2_pb2", path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    file = descriptor_pb2.FileDescriptorProto()
    module.DESCRIPTOR.CopyToProto(file)

    parameter = next(m for m in file.message_type if m.name == "InferParameter")
    present = {f.name for f in parameter.field}
    for name, number, kind in (("double_param", 4, _Field.TYPE_DOUBLE), ("uint64_param", 5, _Field.TYPE_UINT64)):
        if name not in present:
            parameter.field.add(name=name, number=number, type=kind, label=_Field.LABEL_OPTIONAL, oneof_index=0)

    answer = file.message_type.add(name="ModelStreamInferResponse")
    answer.field.add(name="error_message", number=1, type=_Field.TYPE_STRING, label=_Field.LABEL_OPTIONAL)
    answer.field.add(
        name="infer_response",
        number=2,
        type=_Field.TYPE_MESSAGE,
        label=_Field.LABEL_OPTIONAL,
        type_name=".inference.ModelInferResponse",
    )

    index = file.message_type.add(name="RepositoryIndexRequest")
    index.field.add(name="repository_name", number=1, type=_Field.TYPE_STRING, label=_Field.LABEL_OPTIONAL)
    index.field.add(name="ready", number=2, type=_Field.TYPE_BOOL, label=_Field.LABEL_OPTIONAL)
    listing = file.message_type.add(name="RepositoryIndexResponse")
    row = listing.nested_type.add(name="ModelIndex")
    for number, name in enumerate(("name", "version", "state", "reason"), start=1):
        row.field.add(name=name, number=number, type=_Field.TYPE_STRING, label=_Field.LABEL_OPTIONAL)
    listing.field.add(
        name="models",
        number=1,
        type=_Field.TYPE_MESSAGE,
        label=_Field.LABEL_REPEATED,
        type_name=".inference.RepositoryIndexResponse.ModelIndex",
    )

    # Triton's field 1 names a repository, of which there is one here; KServe's names the model.
    for name in ("RepositoryModelLoadRequest", "RepositoryModelUnloadRequest"):
        control = next(m for m in file.message_type if m.name == name)
        control.field.add(name="triton_model_name", number=2, type=_Field.TYPE_STRING, label=_Field.LABEL_OPTIONAL)

    _add_statistics(file)
    service = next(s for s in file.service if s.name == "GRPCInferenceService")
    service.method.add(
        name="ModelStreamInfer",
        input_type=".inference.ModelInferRequest",
        output_type=".inference.ModelStreamInferResponse",
        client_streaming=True,
        server_streaming=True,
    )
    service.method.add(
        name="RepositoryIndex",
        input_type=".inference.RepositoryIndexRequest",
        output_type=".inference.RepositoryIndexResponse",
    )
    for name in ("ModelConfig", "ModelStatistics"):
        service.method.add(name=name, input_type=f".inference.{name}Request", output_type=f".inference.{name}Response")
    return file


def _add_statistics(file: descriptor_pb2.FileDescriptorProto) -> None:
    """Triton's messages for a model's configuration and statistics, as far as they are filled here."""
    types = file.enum_type.add(name="DataType")
    for number, name in enumerate(("TYPE_INVALID", *DATA_TYPES.values(), "TYPE_BF16")):
        types.value.add(name=name, number=number)
    text, whole, flag, count = _Field.TYPE_STRING, _Field.TYPE_INT64, _Field.TYPE_BOOL, _Field.TYPE_UINT64

    def message(added: str, *fields: tuple[int, str, int | str, bool]) -> None:
        """A message; each field has a number, a name, a type, and whether it is repeated."""
        made = file.message_type.add(name=added)
        for number, name, kind, many in fields:
            field = made.field.add(name=name, number=number)
            field.label = _Field.LABEL_REPEATED if many else _Field.LABEL_OPTIONAL
            if isinstance(kind, int):
                field.type = kind  # type: ignore[assignment]
            else:
                field.type = _Field.TYPE_ENUM if kind == "DataType" else _Field.TYPE_MESSAGE
                field.type_name = f".inference.{kind}"

    message(
        "ModelInput",
        (1, "name", text, False),
        (2, "data_type", "DataType", False),
        (4, "dims", whole, True),
        (8, "optional", flag, False),
    )
    message("ModelOutput", (1, "name", text, False), (2, "data_type", "DataType", False), (3, "dims", whole, True))
    message("ModelTransactionPolicy", (1, "decoupled", flag, False))
    message(
        "ModelConfig",
        (1, "name", text, False),
        (2, "platform", text, False),
        (17, "backend", text, False),
        (4, "max_batch_size", _Field.TYPE_INT32, False),
        (5, "input", "ModelInput", True),
        (6, "output", "ModelOutput", True),
        (19, "model_transaction_policy", "ModelTransactionPolicy", False),
    )
    message("StatisticDuration", (1, "count", count, False), (2, "ns", count, False))
    message("InferStatistics", *((number, name, "StatisticDuration", False) for number, name in enumerate(SPANS, 1)))
    message(
        "ModelStatistics",
        (1, "name", text, False),
        (2, "version", text, False),
        (3, "last_inference", count, False),
        (4, "inference_count", count, False),
        (5, "execution_count", count, False),
        (6, "inference_stats", "InferStatistics", False),
    )
    for name in ("ModelConfig", "ModelStatistics"):
        message(f"{name}Request", (1, "name", text, False), (2, "version", text, False))
    message("ModelConfigResponse", (1, "config", "ModelConfig", False))
    message("ModelStatisticsResponse", (1, "model_stats", "ModelStatistics", True))


class _Outbox(Protocol):
    """Sends what is put in as soon as the client takes it."""

    def put_nowait(self, item: _Item) -> None:
        """Put something in."""

    async def join(self) -> None:
        """Wait until all is sent."""


@runtime_checkable
class _WritesAtOnce(Protocol):
    """The context of our own server, which can write a message in no task of its own."""

    def outbox(self, take: Callable[[_Item], list[bytes]]) -> _Outbox:
        """A queue that sends the messages which `take` makes of what is put in."""


class _Turns:
    """Bounds what one stream holds: requests that are being answered, and answers that its client does not take.

    Attributes:
        send: takes what is put.
    """

    def __init__(self) -> None:
        self.send: Callable[[_Item], None]
        self._open = 0
        self._waiting = 0
        self._room: asyncio.Future[None] | None = None

    def put(self, item: _Item) -> None:
        """Send a message, or `Pieces` that have some."""
        self._waiting += 1
        self.send(item)

    def take(self, item: _Item) -> list[bytes]:
        """Serialized messages of what was put, now that they can be sent."""
        self._waiting -= 1
        if self._room is not None:
            self._tell()
        return item.take() if isinstance(item, Pieces) else [_serialized(item)]

    async def begin(self) -> None:
        """Wait until one request more may be answered."""
        while self._open >= MAX_OPEN or self._waiting >= MAX_WAITING:
            self._room = asyncio.get_running_loop().create_future()
            await self._room
        self._open += 1

    def end(self, _: asyncio.Task[None]) -> None:
        """A request was answered."""
        self._open -= 1
        self._tell()

    def _tell(self) -> None:
        if self._room is not None and not self._room.done():
            self._room.set_result(None)


def _serialized(message: Message | bytes) -> bytes:
    """A message's bytes; what was put together as bytes already stays so."""
    return message if isinstance(message, bytes) else message.SerializeToString()  # type: ignore[no-any-return]


class Messages:
    """The service's message classes, by name: `messages.ModelInferRequest`."""

    def __init__(self) -> None:
        self.pool = descriptor_pool.DescriptorPool()
        self._file = _descriptor()
        self.pool.Add(self._file) if hasattr(self.pool, "Add") else self.pool.AddSerializedFile(
            self._file.SerializeToString()
        )
        self.methods = {
            m.name: m for m in next(s for s in self._file.service if s.name == "GRPCInferenceService").method
        }

    def __getattr__(self, name: str) -> type[Message]:
        if name.startswith("_"):
            raise AttributeError(name)
        return self.of(f"inference.{name}")

    def of(self, type_name: str) -> type[Message]:
        """The class of a descriptor's type name, `.inference.ModelInferRequest`."""
        found: type[Message] = message_factory.GetMessageClass(self.pool.FindMessageTypeByName(type_name.lstrip(".")))
        return found


class Servicer:
    """Answers the service's calls.

    Args:
        lifecycle: the state that health answers read.
        enforcement: admits calls and counts them.
        requests: the accounting of all requests.
    """

    def __init__(self, lifecycle: Lifecycle, enforcement: Enforcement, requests: RequestRecorder) -> None:
        self.messages = Messages()
        self._lifecycle = lifecycle
        self._enforcement = enforcement
        self._requests = requests
        self._backend: Backend

    def attach(self, backend: Backend) -> None:
        """Set the object that answers inference, once the engine runs."""
        self._backend = backend

    def handler(self) -> grpc.GenericRpcHandler[Message, Message]:
        """The generic handler to add to a `grpc.aio` server."""
        handlers = {}
        for name, method in self.messages.methods.items():
            options = {
                "request_deserializer": decoder(self.messages.of(method.input_type)),
                "response_serializer": _serialized,
            }
            if name == "ModelStreamInfer":
                handlers[name] = grpc.stream_stream_rpc_method_handler(self._model_stream_infer, **options)
            else:
                handlers[name] = grpc.unary_unary_rpc_method_handler(self._unary(name), **options)
        return grpc.method_handlers_generic_handler(SERVICE, handlers)

    def screen(self, path: str, metadata: Metadata) -> Screened:
        """Decide about a call by its path and metadata, before any of its messages is read.

        A call that is refused here is in the accounting like one that is refused later; no handler is asked about it.
        """
        service, _, name = path.removeprefix("/").partition("/")
        if service != SERVICE or name in _OPEN or (name == "ModelReady" and not self._lifecycle.ready):
            return KEYLESS
        request_id, text = _readable(metadata)
        try:
            _check_single(metadata, text)
            caller = self._enforcement.identify(RequestContext(request_id, "grpc", name), headers_of(text)[0])
            if name in _CONTROL:
                self._enforcement.check_control(caller)
            refusal = self._enforcement.refusal(needs_model=name in _WORK)
            if refusal is not None:
                raise refusal
        except RequestError as error:
            with self._requests.open("grpc", name, request_id, text, None, name not in _WORK) as request_context:
                traced = self._requests.response_header(request_context)
                request_context.status, request_context.error = error.grpc_status, error
            code, details, trailing = _status_of(error)
            more = () if traced is None else (("traceresponse", traced),)
            return Screened(refusal=(code, details, (*trailing, *more)))
        return Screened(owner=caller.tenant if caller.tenant != "none" else caller.key_id)

    def _unary(self, name: str) -> Callable[[Message, _Context], Awaitable[Message]]:
        answer = {
            "ServerLive": self._server_live,
            "ServerReady": self._server_ready,
        }.get(name)
        if answer is not None:
            return answer
        work = {
            "ModelReady": self._model_ready,
            "ServerMetadata": self._server_metadata,
            "ModelMetadata": self._model_metadata,
            "ModelInfer": self._model_infer,
            "RepositoryModelLoad": self._load,
            "RepositoryModelUnload": self._unload,
            "RepositoryIndex": self._index,
            "ModelConfig": self._model_config,
            "ModelStatistics": self._model_statistics,
        }.get(name)

        async def call(request: Message, context: _Context) -> Message:
            request_id, metadata = _metadata(context)
            model = getattr(request, "model_name", None) or None
            with self._requests.open(
                "grpc", name, request_id, metadata, model, name != "ModelInfer"
            ) as request_context:
                traced = self._requests.response_header(request_context)
                try:
                    _check_decoded(request)
                    if work is None:
                        raise NotFound(f"{name} is not served")
                    if name == "ModelReady" and not self._lifecycle.ready:
                        request_context.status = "OK"
                        return self.messages.ModelReadyResponse(ready=False)
                    async with self._enforcement.enforce(request_context, metadata, _KINDS.get(name, Kind.QUESTION)):
                        answer = await work(request, {**metadata, "x-request-id": request_id})
                    request_context.status = "OK"
                    await _send_metadata(context, request_context, traced)
                    return answer
                except RequestError as error:
                    request_context.status, request_context.error = error.grpc_status, error
                    await _send_metadata(context, request_context, traced)
                    await _abort(context, error)
                except Exception as error:
                    request_context.status, request_context.error = InternalError.grpc_status, error
                    log.exception("request %s failed", request_id, exc_info=error)
                    await _abort(context, InternalError(request_id))

        return call

    async def _server_live(self, request: Message, context: _Context) -> Message:
        return self.messages.ServerLiveResponse(live=self._lifecycle.live)

    async def _server_ready(self, request: Message, context: _Context) -> Message:
        return self.messages.ServerReadyResponse(ready=self._lifecycle.ready)

    async def _model_ready(self, request: Message, metadata: Mapping[str, str]) -> Message:
        ready = await self._backend.model_ready(request.name, request.version)
        return self.messages.ModelReadyResponse(ready=ready)

    async def _server_metadata(self, request: Message, metadata: Mapping[str, str]) -> Message:
        return self.messages.ServerMetadataResponse(**self._backend.server_metadata())

    async def _model_metadata(self, request: Message, metadata: Mapping[str, str]) -> Message:
        return self.messages.ModelMetadataResponse(**await self._backend.model_metadata(request.name, request.version))

    async def _model_config(self, request: Message, metadata: Mapping[str, str]) -> Message:
        tree = await self._backend.model_config(request.name, request.version)
        return ParseDict({"config": tree}, self.messages.ModelConfigResponse(), ignore_unknown_fields=True)

    async def _model_statistics(self, request: Message, metadata: Mapping[str, str]) -> Message:
        tree = self._backend.model_statistics(request.name, request.version)
        return ParseDict(tree, self.messages.ModelStatisticsResponse(), ignore_unknown_fields=True)

    async def _model_infer(self, request: pb2.ModelInferRequest, metadata: dict[str, str]) -> pb2.ModelInferResponse:
        return await self._backend.infer(request, metadata, self.messages.ModelInferResponse())

    async def _load(self, request: Message, metadata: Mapping[str, str]) -> Message:
        name = request.triton_model_name or request.model_name
        await self._backend.load(name)
        return self.messages.RepositoryModelLoadResponse(model_name=name, isLoaded=True)

    async def _unload(self, request: Message, metadata: Mapping[str, str]) -> Message:
        name = request.triton_model_name or request.model_name
        await self._backend.unload(name)
        return self.messages.RepositoryModelUnloadResponse(model_name=name, isUnloaded=True)

    async def _index(self, request: Message, metadata: Mapping[str, str]) -> Message:
        rows = [row for row in self._backend.index() if not request.ready or row["state"] == "READY"]
        return self.messages.RepositoryIndexResponse(models=rows)

    async def _model_stream_infer(
        self, requests: AsyncIterator[pb2.ModelInferRequest], context: _Context
    ) -> AsyncIterator[bytes]:
        """Answer the requests of one stream side by side; responses carry their request's id."""
        request_id, metadata = _metadata(context)
        # The call is only the frame of requests with request contexts of their own; it has one where it is refused as
        # a whole.
        refusal: RequestError | None = self._enforcement.refusal()
        try:
            self._enforcement.identify(RequestContext(request_id, "grpc", "ModelStreamInfer"), headers_of(metadata)[0])
        except RequestError as error:
            refusal = error
        if refusal is not None:
            with self._requests.open("grpc", "ModelStreamInfer", request_id, metadata) as request_context:
                request_context.status, request_context.error = refusal.grpc_status, refusal
            await _abort(context, refusal)
        await context.send_initial_metadata((("x-request-id", request_id),))
        turns = _Turns()
        if isinstance(context, _WritesAtOnce):
            outbox = context.outbox(turns.take)
            turns.send = outbox.put_nowait
            await self._read_stream(requests, turns, request_id, metadata)
            await outbox.join()
            return
        queue: asyncio.Queue[_Item | None] = asyncio.Queue()
        turns.send = queue.put_nowait
        reader = asyncio.create_task(self._read_stream(requests, turns, request_id, metadata))
        reader.add_done_callback(lambda _: queue.put_nowait(None))
        try:
            while (item := await queue.get()) is not None:
                for message in turns.take(item):
                    yield message
            await reader
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    async def _read_stream(
        self,
        requests: AsyncIterator[pb2.ModelInferRequest],
        turns: _Turns,
        request_id: str,
        metadata: Mapping[str, str],
    ) -> None:
        count = 0
        async with asyncio.TaskGroup() as group:
            async for request in requests:
                count += 1
                headers = {**metadata, "x-request-id": f"{request_id}-{count}"}
                await turns.begin()
                task = group.create_task(self.answer_one(request, turns.put, headers))
                task.add_done_callback(turns.end)

    async def answer_one(
        self, request: pb2.ModelInferRequest, put: Callable[[_Item], None], metadata: dict[str, str]
    ) -> None:
        """Answer one request of a `ModelStreamInfer` call, as a request of its own."""
        model = getattr(request, "model_name", None) or None
        with self._requests.open(
            "grpc", "ModelStreamInfer", metadata["x-request-id"], metadata, model
        ) as request_context:
            await self._answer_request(request_context, request, put, metadata)

    async def _answer_request(
        self,
        request_context: RequestContext,
        request: pb2.ModelInferRequest,
        put: Callable[[_Item], None],
        metadata: dict[str, str],
    ) -> None:
        new = self.messages.ModelStreamInferResponse
        try:
            _check_decoded(request)
            # Once more for each request: a key may end while its stream is open.
            async with self._enforcement.enforce(request_context, metadata, Kind.WORK):
                pieces = await self._backend.pieces(request, metadata, self.messages.ModelInferResponse)
                if pieces is not None:
                    await pieces.run(put)
                else:
                    async for response in self._backend.stream(request, metadata, self.messages.ModelInferResponse):
                        put(new(infer_response=response))
            request_context.status = "OK"
        except RequestError as error:
            request_context.status, request_context.error = error.grpc_status, error
            answer = new(error_message=error.message)
            if not isinstance(request, Exception):
                answer.infer_response.id = request.id
                answer.infer_response.model_name = request.model_name
            put(answer)
        except Exception as error:
            request_context.status, request_context.error = InternalError.grpc_status, error
            log.exception("request %s failed", metadata["x-request-id"], exc_info=error)
            answer = new(error_message=InternalError(metadata["x-request-id"]).message)
            answer.infer_response.id = getattr(request, "id", "")
            put(answer)


def decoder(message: type[Message]) -> Callable[[bytes], Message | DecodeError | InvalidRequest]:
    """Parses a message. What can't be parsed is handed on as the error, since grpc itself would answer INTERNAL."""

    def decode(data: bytes) -> Message | DecodeError | InvalidRequest:
        try:
            check_size(data)
            return message.FromString(data)
        except (DecodeError, InvalidRequest) as error:
            return error

    return decode


def _check_decoded(request: Message | DecodeError | InvalidRequest) -> None:
    if isinstance(request, InvalidRequest):
        raise request
    if isinstance(request, DecodeError):
        raise InvalidRequest("the message can't be decoded: it is cut off, or has text that is not valid UTF-8")


def _metadata(context: _Context) -> tuple[str, dict[str, str]]:
    """The call's request id, and its text metadata."""
    pairs: Any = context.invocation_metadata()
    return _readable(pairs or ())


def _readable(pairs: Metadata) -> tuple[str, dict[str, str]]:
    metadata = {key: value for key, value in pairs if isinstance(value, str)}
    given = metadata.get("x-request-id", "")
    # Of two, neither is taken, as over HTTP.
    once = len(metadata) == len(pairs) or sum(key == "x-request-id" for key, _ in pairs) == 1
    return given if once and protocol_errors.REQUEST_ID.fullmatch(given) else uuid.uuid4().hex, metadata


def _check_single(pairs: Metadata, metadata: Mapping[str, str]) -> None:
    """Refuse a call that gives a key or a class twice: who stands in front of this server may have looked at the other.

    Raises:
        InvalidRequest: names the field.
    """
    if len(pairs) > len(metadata):
        fields = [(key.encode("latin-1"), b"") for key, _ in pairs]
        protocol_errors.check_single(fields, dict(fields))


async def _send_metadata(context: _Context, request_context: RequestContext, traced: str | None) -> None:
    """Send what goes before the answer."""
    headers = [("x-request-id", request_context.request_id), *request_context.answer_headers]
    if traced is not None:
        headers.append(("traceresponse", traced))
    await context.send_initial_metadata(tuple(headers))


async def _abort(context: _Context, error: RequestError) -> None:
    """End a call with an error."""
    code, details, trailing = _status_of(error)
    await context.abort(code, details, tuple(trailing))


def _status_of(error: RequestError) -> tuple[grpc.StatusCode, str, list[tuple[str, str | bytes]]]:
    """Status, sentence and trailing metadata of an error.

    When to try again stands in `retry-after` (seconds) and as `google.rpc.RetryInfo` in the error's details.
    """
    details = error.message[:_MAX_DETAILS]
    code = grpc.StatusCode[error.grpc_status]
    trailing: list[tuple[str, str | bytes]] = []
    if error.reason is not None:
        trailing.append(("x-refusal-reason", error.reason))
    if error.retry_after_s is not None:
        trailing.append(("retry-after", str(error.retry_after_s)))
        info = error_details_pb2.RetryInfo(retry_delay=Duration(seconds=error.retry_after_s))
        status = status_pb2.Status(code=code.value[0], message=details)
        status.details.add().Pack(info)
        trailing.append(("grpc-status-details-bin", status.SerializeToString()))
    return code, details, trailing
