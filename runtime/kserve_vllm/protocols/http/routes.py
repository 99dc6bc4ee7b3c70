"""The HTTP routes of V1, V2 and the generate extension, and the one OpenAPI document."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from typing import Any, Protocol

import orjson
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from kserve.protocol.infer_type import InferRequest, InferResponse
from starlette.convertors import Convertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.routing import Route, request_response

from kserve_vllm.core.errors import InvalidRequest, MethodNotAllowed, NotFound, RequestError, Unavailable
from kserve_vllm.core.request_context import current
from kserve_vllm.engine.vllm import VLLMEngine
from kserve_vllm.policy.enforcement import Enforcement, may_see
from kserve_vllm.protocols import errors as protocol_errors
from kserve_vllm.protocols.cloudevents import event_of
from kserve_vllm.protocols.http import openapi as schemas
from kserve_vllm.protocols.http.adapters import AdapterRoutes
from kserve_vllm.protocols.http.disconnect import ClientGone, until_disconnect
from kserve_vllm.protocols.oip import generate, tensors
from kserve_vllm.protocols.oip.statistics import Statistics, configuration
from kserve_vllm.protocols.oip.text import VERSION, V2Text

_HEADER_LENGTH = "inference-header-content-length"
_ANTHROPIC = "anthropic-version"
"""The header by which Anthropic's clients tell themselves."""


class Plane(Protocol):
    """What the routes need of KServe's data plane."""

    def metadata(self) -> dict[str, object]:
        """The server's name, version and extensions."""

    async def model_metadata(self, model_name: str) -> dict[str, object]:
        """A model's platform, versions, inputs and outputs."""

    async def model_ready(self, model_name: str, disable_predictor_health_check: bool = False) -> bool:
        """Whether a model answers requests; raises where there is none of that name."""

    async def infer(
        self, model_name: str, request: InferRequest | Mapping[str, object], headers: dict[str, str] | None = None
    ) -> tuple[Any, dict[str, str]]:
        """Run KServe's preprocess, predict and postprocess."""


class Repository(Protocol):
    """What the routes need of the model repository."""

    def index(self) -> list[dict[str, str]]:
        """Name, version, state and reason of every model that the caller may use."""

    def check_known(self, name: str) -> None:
        """Raises where there is no model of that name, or not for the caller."""

    async def load_model_by_name(self, name: str) -> None:
        """Serve the model again."""

    async def unload_model_by_name(self, name: str) -> None:
        """Serve no new request with the model."""


def check_version(model: str, version: str | None) -> None:
    """There is one version of every model, `1`.

    Raises:
        NotFound: another one is asked for.
    """
    if version not in (None, "", VERSION):
        raise NotFound(f"model {model!r} has no version {version!r}; there is {VERSION!r}", field="model_version")


def trace_headers(headers: Mapping[str, str]) -> dict[str, str] | None:
    """The W3C trace context among headers, or None."""
    found = {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
    return found or None


class Routes:
    """Handlers of the V1, V2 and generate routes.

    Args:
        plane: KServe's data plane over our models.
        repository: the models.
        engine: for names, and for streams, which KServe's data plane does not know.
        text: the V2 translation.
        enforcement: who may see what concerns all tenants.
        queue: what `/v1/queue/stats` answers.
        statistics: what each model has answered.
    """

    def __init__(
        self,
        plane: Plane,
        repository: Repository,
        engine: VLLMEngine,
        text: V2Text,
        enforcement: Enforcement,
        queue: Callable[[], dict[str, object]],
        statistics: Statistics,
    ) -> None:
        self._plane = plane
        self._repository = repository
        self._engine = engine
        self._text = text
        self._enforcement = enforcement
        self._queue = queue
        self._statistics = statistics

    # V2

    async def server_metadata(self) -> Response:
        """Name, version and extensions of the server."""
        return _json(self._plane.metadata())

    async def list_models(self) -> Response:
        """Names of all models that the caller may use."""
        models = self._engine.models
        return _json({"models": [model.name for model in models.all() if may_see(models, model.name)]})

    async def model_metadata(self, model_name: str, model_version: str | None = None) -> Response:
        """Platform, versions, inputs and outputs of a model."""
        check_version(model_name, model_version)
        self._repository.check_known(model_name)
        return _json(await self._plane.model_metadata(model_name))

    async def model_ready(self, model_name: str, model_version: str | None = None) -> Response:
        """Whether a model answers requests."""
        check_version(model_name, model_version)
        self._repository.check_known(model_name)
        await self._require(model_name)
        return _json({"name": model_name, "ready": True})

    async def model_config(self, model_name: str, model_version: str | None = None) -> Response:
        """A model's configuration, as Triton gives it."""
        check_version(model_name, model_version)
        self._repository.check_known(model_name)
        metadata = await self._plane.model_metadata(model_name)
        return _json(configuration(metadata, self._engine.text.generates))

    async def model_statistics(self, model_name: str, model_version: str | None = None) -> Response:
        """What a model has answered since the start, as Triton counts it."""
        check_version(model_name, model_version)
        self._repository.check_known(model_name)
        return _json(self._statistics.of([model_name]))

    async def all_statistics(self) -> Response:
        """The same of all models that the caller may use."""
        names = [model.name for model in self._engine.models.all() if may_see(self._engine.models, model.name)]
        return _json(self._statistics.of(names))

    async def infer(self, request: Request, model_name: str, model_version: str | None = None) -> Response:
        """Infer: tensors in, tensors out."""
        check_version(model_name, model_version)
        await self._require(model_name)
        headers = dict(request.headers)
        parsed = tensors.parse_rest(await request.body(), headers.get(_HEADER_LENGTH), model_name, model_version)
        response, extra = await until_disconnect(request.receive, self._plane.infer(model_name, parsed, headers))
        extra = {**extra, **_logged(headers)}
        body, header_length = tensors.encode_rest(response, parsed)
        if header_length is None:
            return Response(body, media_type="application/json", headers=extra)
        extra = {**extra, "Inference-Header-Content-Length": str(header_length)}
        return Response(body, media_type="application/octet-stream", headers=extra)

    async def generate(self, request: Request, model_name: str, model_version: str | None = None) -> Response:
        """Continue one prompt."""
        parsed, details, headers = await self._generate_request(request, model_name, model_version, stream=False)
        response, _ = await until_disconnect(request.receive, self._plane.infer(model_name, parsed, headers))
        return _json(generate.from_response(response, details))

    async def generate_stream(self, request: Request, model_name: str, model_version: str | None = None) -> Response:
        """Continue one prompt, piece by piece, as server-sent events."""
        parsed, details, headers = await self._generate_request(request, model_name, model_version, stream=True)
        stream = self._text.stream(parsed, headers["x-request-id"], trace_headers(headers))
        # The first piece comes before the response starts, so that an error still has a status of its own.
        first, _ = await until_disconnect(request.receive, anext(stream))
        return StreamingResponse(
            _events(first, stream, details), media_type="text/event-stream", headers={"cache-control": "no-cache"}
        )

    async def _generate_request(
        self, request: Request, model: str, version: str | None, stream: bool
    ) -> tuple[InferRequest, bool, dict[str, str]]:
        check_version(model, version)
        await self._require(model)
        if not self._engine.text.generates:
            raise InvalidRequest(f"model {model!r} does not generate text", field="model_name")
        tree = tensors.parse_json_object(await request.body())
        parsed, details = generate.to_request(tree, model, version, stream)
        return parsed, details, dict(request.headers)

    # Repository

    async def repository_index(self, request: Request) -> Response:
        """State of every model that the caller may use; `{"ready": true}` leaves out those that are not loaded."""
        body = await request.body()
        only_ready = tensors.parse_json_object(body).get("ready") is True if body else False
        return _json([row for row in self._repository.index() if not only_ready or row["state"] == "READY"])

    async def repository_load(self, model_name: str) -> Response:
        """Serve a model again that was unloaded."""
        await self._repository.load_model_by_name(model_name)
        return _json({"name": model_name, "load": True})

    async def repository_unload(self, model_name: str) -> Response:
        """Serve no new request with a model. Requests in flight finish."""
        await self._repository.unload_model_by_name(model_name)
        return _json({"name": model_name, "unload": True})

    # Operators

    async def queue_stats(self) -> Response:
        """What runs and what waits in front of the engine, by class."""
        self.operators_only()
        return _json(self._queue())

    def operators_only(self) -> None:
        """Let only administrators see what concerns all tenants, where there is a key file.

        Raises:
            Forbidden: the caller of the running request is none.
        """
        context = current.get()
        if context is not None and context.access.caller is not None:
            self._enforcement.check_operator(context.access.caller)

    # V1

    async def v1_and_openai_models(self, request: Request) -> Response:
        """All models that the caller may use, for OpenAI's clients (`data`) and V1's (`models`) in one body; for
        Anthropic's, which tell themselves by a header, as theirs."""
        engine = self._engine
        body = await engine.models.openai_list()
        cards = [card for card in body["data"] if may_see(engine.models, card["id"])]
        if _ANTHROPIC in request.headers:
            shown = [_anthropic_card(card) for card in cards]
            ids = [card["id"] for card in shown] or [None]
            return _json({"data": shown, "has_more": False, "first_id": ids[0], "last_id": ids[-1]})
        names = [model.name for model in engine.models.all() if model.loaded and may_see(engine.models, model.name)]
        return _json({**body, "data": cards, "models": names})

    async def v1_and_openai_model(self, request: Request, model_name: str) -> Response:
        """One model, for OpenAI's clients (`id`) and V1's (`name`, `ready`) in one body; for Anthropic's as theirs."""
        self._repository.check_known(model_name)
        await self._require(model_name)
        cards = (await self._engine.models.openai_list())["data"]
        card: dict[str, object] = next((card for card in cards if card["id"] == model_name), {})
        if _ANTHROPIC in request.headers and card:
            return _json(_anthropic_card(card))
        return _json({**card, "name": model_name, "ready": True})

    async def v1_predict(self, request: Request, model_name: str) -> Response:
        """Predict: instances in, predictions out."""
        await self._require(model_name)
        headers = dict(request.headers)
        data, event = event_of(await request.body(), headers)
        tree = tensors.parse_json_object(data)
        response, extra = await until_disconnect(request.receive, self._plane.infer(model_name, tree, headers))
        if event is None:
            return _json(response, {**extra, **_logged(headers)})
        body, described = event.answer(model_name, response)
        return Response(body, headers={**extra, **described})

    async def _require(self, name: str) -> None:
        if not await self._plane.model_ready(name, True):
            raise Unavailable(f"model {name!r} is not loaded", retry_after_s=5)


def build_app(routes: Routes, engine: VLLMEngine, version: str, batches: APIRouter | None = None) -> FastAPI:
    """The FastAPI app of our own routes, with those of `batches`; its OpenAPI document holds vLLM's routes too.

    vLLM's app is told to answer unknown paths and methods in the shape of the protocol, as ours does.
    """
    register_url_convertor("model", _ModelName())
    app = FastAPI(title="kserve-vllm", version=version, redoc_url=None, description=schemas.DESCRIPTION)
    app.include_router(_v2_router(routes))
    app.include_router(_v1_router(routes))
    adapters = AdapterRoutes(engine.adapters, routes.operators_only, lambda name: may_see(engine.models, name))
    app.include_router(adapters.router())
    if batches is not None:
        app.include_router(batches)
    app.add_exception_handler(RequestError, answer_error)
    app.add_exception_handler(ClientGone, _answer_nobody)
    for each in (app, engine.app):
        each.add_exception_handler(HTTPException, _answer_http)
        # vLLM's SageMaker routes build the stack before anything is asked, and handlers take effect when it is built.
        each.middleware_stack = None
    own_openapi = app.openapi
    making = threading.Lock()

    def merged() -> dict[str, object]:
        with making:
            if not getattr(app.state, "document", None):
                app.state.document = schemas.merge(own_openapi(), engine.app.openapi())
            document: dict[str, object] = app.state.document
            return document

    async def describe(request: Request) -> Response:
        # Made when it is first asked for, which takes more than a second.
        return JSONResponse(await asyncio.to_thread(merged))

    app.openapi = merged  # type: ignore[method-assign]
    (described,) = (route for route in app.routes if isinstance(route, Route) and route.path == app.openapi_url)
    described.app = request_response(describe)
    return app


def _v2_router(routes: Routes) -> APIRouter:
    router = APIRouter(prefix="/v2", tags=["Open Inference Protocol V2"])
    errors = schemas.ERRORS
    router.add_api_route("", routes.server_metadata, methods=["GET"], responses=schemas.SERVER_METADATA)
    for path, summary in schemas.HEALTH.items():
        router.add_api_route(
            path,
            _answered_by_edge,
            methods=["GET"],
            summary=summary,
            responses=schemas.HEALTH_ANSWERS,
            operation_id=summary,
        )
    router.add_api_route("/models", routes.list_models, methods=["GET"], responses=schemas.MODEL_LIST)
    router.add_api_route("/models/stats", routes.all_statistics, methods=["GET"], responses=schemas.STATISTICS)
    router.add_api_route(
        "/repository/index",
        routes.repository_index,
        methods=["POST"],
        openapi_extra=schemas.body("RepositoryIndexRequest", required=False),
        responses=schemas.REPOSITORY_INDEX | errors,
    )
    model = "/repository/models/{model_name:model}"
    router.add_api_route(f"{model}/load", routes.repository_load, methods=["POST"], responses=schemas.CONTROL | errors)
    router.add_api_route(
        f"{model}/unload", routes.repository_unload, methods=["POST"], responses=schemas.CONTROL | errors
    )
    # The longer one first: a model's name may hold slashes.
    for prefix in ("/models/{model_name:model}/versions/{model_version}", "/models/{model_name:model}"):
        router.add_api_route(
            f"{prefix}/ready", routes.model_ready, methods=["GET"], responses=schemas.MODEL_READY | errors
        )
        config, statistics = schemas.MODEL_CONFIG | errors, schemas.STATISTICS | errors
        router.add_api_route(f"{prefix}/config", routes.model_config, methods=["GET"], responses=config)
        router.add_api_route(f"{prefix}/stats", routes.model_statistics, methods=["GET"], responses=statistics)
        router.add_api_route(
            f"{prefix}/infer",
            routes.infer,
            methods=["POST"],
            openapi_extra=schemas.body("InferRequest"),
            responses=schemas.INFER | errors,
        )
        router.add_api_route(
            f"{prefix}/generate",
            routes.generate,
            methods=["POST"],
            openapi_extra=schemas.body("GenerateRequest"),
            responses=schemas.GENERATE | errors,
        )
        router.add_api_route(
            f"{prefix}/generate_stream",
            routes.generate_stream,
            methods=["POST"],
            openapi_extra=schemas.body("GenerateRequest"),
            responses=schemas.GENERATE_STREAM | errors,
        )
        router.add_api_route(prefix, routes.model_metadata, methods=["GET"], responses=schemas.MODEL_METADATA | errors)
    return router


def _v1_router(routes: Routes) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["KServe V1"])
    router.add_api_route(
        "/queue/stats", routes.queue_stats, methods=["GET"], tags=["operators"], responses=schemas.QUEUE_STATS
    )
    router.add_api_route("/models", routes.v1_and_openai_models, methods=["GET"], responses=schemas.V1_MODELS)
    router.add_api_route(
        "/models/{model_name:model}:predict",
        routes.v1_predict,
        methods=["POST"],
        openapi_extra=schemas.body("PredictRequest"),
        responses=schemas.PREDICT | schemas.ERRORS,
    )
    router.add_api_route(
        "/models/{model_name:model}",
        routes.v1_and_openai_model,
        methods=["GET"],
        responses=schemas.V1_MODEL | schemas.ERRORS,
    )
    return router


class _ModelName(Convertor[str]):
    """A model's name in a path. It may hold slashes, as names on a hub do, and does not end like one of our verbs."""

    regex = (
        r".+(?<!/infer)(?<!/generate)(?<!/generate_stream)(?<!/ready)(?<!/config)(?<!/stats)(?<!/load)(?<!/unload)"
        r"(?<!:predict)"
    )

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


async def _answered_by_edge() -> Response:
    """Answered before any route, from the lifecycle."""
    raise NotFound("no such path")


async def _events(
    first: InferResponse, stream: AsyncGenerator[tuple[InferResponse, bool], None], details: bool
) -> AsyncIterator[bytes]:
    async with contextlib.aclosing(stream):
        yield _event(generate.from_response(first, details))
        try:
            async for response, _ in stream:
                yield _event(generate.from_response(response, details))
        except RequestError as error:
            yield _event({"error": error.message})


def _event(tree: object) -> bytes:
    return b"data: " + orjson.dumps(tree) + b"\n\n"


def _logged(headers: Mapping[str, str]) -> dict[str, str]:
    """The id by which KServe's logger knows a request, for its answer."""
    return {"ce-id": headers["ce-id"]} if "ce-id" in headers else {}


def _anthropic_card(card: Mapping[str, object]) -> dict[str, object]:
    """A model as Anthropic's clients know one, from OpenAI's card of it.

    Since when a model is there is not known: it counts from the epoch, as Anthropic's description has it for that.
    """
    return {
        "type": "model",
        "id": card["id"],
        "display_name": card["id"],
        "created_at": "1970-01-01T00:00:00Z",
        "lifecycle": "active",
        "max_input_tokens": card.get("max_model_len"),
        "max_tokens": card.get("max_model_len"),
        "capabilities": None,
        "deprecated_at": None,
        "line": None,
        "retires_at": None,
    }


def _json(tree: object, headers: Mapping[str, str] | None = None) -> Response:
    return Response(orjson.dumps(tree), media_type="application/json", headers=dict(headers or {}))


async def answer_error(request: Request, error: Exception) -> Response:
    """The answer to one of our errors, in the shape of the protocol that was asked."""
    assert isinstance(error, RequestError)
    context = current.get()
    if context is not None:  # for the accounting: a status alone does not say why
        context.error = context.error or error
    headers = protocol_errors.error_headers(error, request.headers.get("x-request-id", ""))
    path = request.scope.get(protocol_errors.SHAPE_PATH, request.url.path)
    response = Response(protocol_errors.error_body(path, error), status_code=error.http_status)
    response.raw_headers.extend(headers)
    return response


async def _answer_http(request: Request, error: Exception) -> Response:
    """What Starlette refuses by itself: unknown paths and methods."""
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        answer: RequestError = NotFound("no such path")
    elif error.status_code == 405:
        answer = MethodNotAllowed(f"{request.method} is not answered at this path")
    else:
        answer = InvalidRequest(str(error.detail))
        answer.http_status = error.status_code
    response = await answer_error(request, answer)
    response.headers.update(error.headers or {})
    return response


async def _answer_nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=499)
