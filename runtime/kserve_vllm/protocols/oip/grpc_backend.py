"""What the gRPC service answers with once the engine runs: messages to KServe's data plane and back."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING

from kserve.protocol.infer_type import InferResponse

from kserve_vllm.core.errors import InvalidRequest, NotFound, RequestError, Unavailable
from kserve_vllm.engine.patches.openai_stream import StreamHandler
from kserve_vllm.protocols.http.routes import Plane, Repository, check_version, trace_headers
from kserve_vllm.protocols.oip import tensors
from kserve_vllm.protocols.oip.grpc_stream import Pieces
from kserve_vllm.protocols.oip.statistics import Statistics, configuration
from kserve_vllm.protocols.oip.text import VERSION, V2Text

if TYPE_CHECKING:
    from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb2

_EMPTY_FINAL = "triton_enable_empty_final_response"
_FINAL = "triton_final_response"


class Backend:
    """Inference, metadata and repository calls over gRPC.

    Args:
        plane: KServe's data plane over our models.
        repository: the models.
        text: the V2 translation, for streams.
        statistics: what each model has answered.
        streams: for streams of plain text, past the translation of each piece; None leaves all to it.
    """

    def __init__(
        self,
        plane: Plane,
        repository: Repository,
        text: V2Text,
        statistics: Statistics,
        streams: StreamHandler | None = None,
    ) -> None:
        self._statistics = statistics
        self._streams = streams
        self._plane = plane
        self._repository = repository
        self._text = text

    def server_metadata(self) -> dict[str, object]:
        """Name, version and extensions of the server."""
        return self._plane.metadata()

    async def model_metadata(self, name: str, version: str) -> dict[str, object]:
        """Fields of `ModelMetadataResponse`.

        Raises:
            NotFound: no such model or version, or not for this caller.
        """
        check_version(name, version)
        self._repository.check_known(name)
        return await self._plane.model_metadata(name)

    async def model_config(self, name: str, version: str) -> dict[str, object]:
        """Fields of `ModelConfig`.

        Raises:
            NotFound: no such model or version, or not for this caller.
        """
        return configuration(await self.model_metadata(name, version), self._text.generates)

    def model_statistics(self, name: str, version: str) -> dict[str, object]:
        """Fields of `ModelStatisticsResponse`; of all models that the caller may use where `name` is empty.

        Raises:
            NotFound: no such model or version, or not for this caller.
        """
        if not name:
            return self._statistics.of([row["name"] for row in self._repository.index()])
        check_version(name, version)
        self._repository.check_known(name)
        return self._statistics.of([name])

    async def model_ready(self, name: str, version: str) -> bool:
        """Whether a model answers requests. One that is not there, or not for this caller, is not ready: an answer, as
        Triton gives it, and no error."""
        try:
            check_version(name, version)
            self._repository.check_known(name)
        except NotFound:
            return False
        return await self._plane.model_ready(name)

    async def infer(
        self, request: pb2.ModelInferRequest, metadata: dict[str, str], message: pb2.ModelInferResponse
    ) -> pb2.ModelInferResponse:
        """Answer a `ModelInferRequest`; the answer is written into `message`.

        Raises:
            RequestError: the request can't be used or the engine fails.
        """
        await self._require(request)
        parsed = tensors.from_grpc(request)
        response, _ = await self._plane.infer(request.model_name, parsed, metadata)
        return tensors.to_grpc(response, message, raw=bool(request.raw_input_contents))

    async def stream(
        self, request: pb2.ModelInferRequest, metadata: dict[str, str], new: Callable[[], pb2.ModelInferResponse]
    ) -> AsyncIterator[pb2.ModelInferResponse]:
        """Answer a request of `ModelStreamInfer` with `ModelInferResponse` messages, the last one marked as final.

        Raises:
            RequestError: the request can't be used or the engine fails.
        """
        await self._require(request)
        parsed = tensors.from_grpc(request)
        wants_empty = bool((parsed.parameters or {}).get(_EMPTY_FINAL, False))
        if not self._text.generates:
            raise InvalidRequest("this model does not generate text; use ModelInfer", field="model_name")
        stream = self._text.stream(parsed, metadata["x-request-id"], trace_headers(metadata))
        try:
            async for response, final in stream:
                message = tensors.to_grpc(response, new(), raw=True)
                message.parameters[_FINAL].bool_param = final and not wants_empty
                yield message
        finally:
            await stream.aclose()
        if wants_empty:
            yield _empty_final(request, new())

    async def pieces(
        self, request: pb2.ModelInferRequest, metadata: dict[str, str], new: Callable[[], pb2.ModelInferResponse]
    ) -> Pieces | None:
        """The answer to a request of `ModelStreamInfer` that asks for text alone; None where `stream` has to answer.

        Raises:
            RequestError: the request can't be used or the engine fails.
        """
        if self._streams is None or not self._text.generates or request.outputs:
            return None
        await self._require(request)
        parsed = tensors.from_grpc(request)
        found = self._text.plain_stream(parsed, metadata["x-request-id"], trace_headers(metadata))
        if found is None:
            return None
        job, shape = found
        wants_empty = bool((parsed.parameters or {}).get(_EMPTY_FINAL, False))
        version = parsed.model_version or VERSION
        answer = InferResponse(
            parsed.id, parsed.model_name, [tensors.output("text_output", "BYTES", [""], shape)], model_version=version
        )
        message = tensors.to_grpc(answer, new(), raw=True)
        del message.raw_output_contents[:]
        heads = []
        for final in (False, not wants_empty):
            message.parameters[_FINAL].bool_param = final
            heads.append(message.SerializeToString())
        after = _empty_final(request, new()).SerializeToString() if wants_empty else None
        streams = self._streams
        stream = await streams.begin_job(job)
        return Pieces(
            stream,
            (heads[0], heads[1]),
            after,
            lambda error, begun: streams.translate(error, job.request_id, begun),
        )

    async def load(self, name: str) -> None:
        """Serve a model again."""
        await self._repository.load_model_by_name(name)

    async def unload(self, name: str) -> None:
        """Serve no new request with a model."""
        await self._repository.unload_model_by_name(name)

    def index(self) -> list[dict[str, str]]:
        """State of every model that the caller may use."""
        return self._repository.index()

    async def _require(self, request: pb2.ModelInferRequest) -> None:
        check_version(request.model_name, request.model_version)
        if not await self._plane.model_ready(request.model_name):
            error: RequestError = Unavailable(f"model {request.model_name!r} is not loaded", retry_after_s=5)
            raise error


def _empty_final(request: pb2.ModelInferRequest, message: pb2.ModelInferResponse) -> pb2.ModelInferResponse:
    """The message without outputs that ends a stream for clients that ask for one."""
    message.model_name, message.id, message.model_version = request.model_name, request.id, "1"
    message.parameters[_FINAL].bool_param = True
    return message
