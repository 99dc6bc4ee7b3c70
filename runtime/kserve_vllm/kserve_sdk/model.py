"""The model that KServe hosts, and the repository and data plane around it."""

from __future__ import annotations

import uuid
from collections.abc import Mapping

import kserve
from kserve import ModelRepository
from kserve.protocol.dataplane import DataPlane
from kserve.protocol.infer_type import InferRequest, InferResponse

from kserve_vllm.core.errors import NotFound, Unavailable
from kserve_vllm.core.lifecycle import Lifecycle
from kserve_vllm.engine.vllm import VLLMEngine
from kserve_vllm.policy.enforcement import check_permitted, may_see
from kserve_vllm.protocols.http.routes import trace_headers
from kserve_vllm.protocols.oip import text as v2
from kserve_vllm.protocols.oip.text import V2Text
from kserve_vllm.protocols.v1 import V1Text


class VLLMModel(kserve.Model):  # type: ignore[misc]
    """A model or adapter that vLLM serves, as KServe's SDK sees it.

    A subclass may override `preprocess` and `postprocess`, as with any KServe model.

    Args:
        name: served name.
        text: the V2 translation.
        instances: the V1 translation.
        lifecycle: the state that health reads.
        engine: for whether the model is loaded.
    """

    def __init__(self, name: str, text: V2Text, instances: V1Text, lifecycle: Lifecycle, engine: VLLMEngine) -> None:
        super().__init__(name)
        self._text = text
        self._instances = instances
        self._lifecycle = lifecycle
        self._engine_of_model = engine
        self.ready = True

    async def healthy(self) -> bool:
        """Whether requests for this model are answered now."""
        info = self._engine_of_model.models.find(self.name)
        return self._lifecycle.live and info is not None and info.loaded

    async def predict(
        self,
        payload: InferRequest | Mapping[str, object],
        headers: Mapping[str, str] | None = None,
        response_headers: dict[str, str] | None = None,
    ) -> InferResponse | dict[str, object]:
        """Answer a V2 request, or a V1 request given as a mapping.

        Raises:
            RequestError: the request can't be used or the engine fails.
        """
        given = headers or {}
        request_id = given.get("x-request-id") or uuid.uuid4().hex
        if isinstance(payload, InferRequest):
            return await self._text.infer(payload, request_id, trace_headers(given))
        return await self._instances.predict(self.name, payload, request_id, trace_headers(given))

    def get_input_types(self) -> list[dict[str, object]]:
        """Input tensors, for the model's metadata."""
        return self._text.inputs()

    def get_output_types(self) -> list[dict[str, object]]:
        """Output tensors, for the model's metadata."""
        return self._text.outputs()


class EngineModels(ModelRepository):  # type: ignore[misc]
    """The models and adapters that the engine serves now, looked up when asked for.

    Args:
        engine: the started engine.
        lifecycle: told when the base model is unloaded.
        text, instances: the translations handed to each model.
    """

    def __init__(self, engine: VLLMEngine, lifecycle: Lifecycle, text: V2Text, instances: V1Text) -> None:
        super().__init__()
        self._engine = engine
        self._lifecycle = lifecycle
        self._text = text
        self._instances = instances

    def get_model(self, name: str) -> VLLMModel | None:
        """The model of that name, loaded or not, or None."""
        model: VLLMModel | None = self.models.get(name)
        if model is None and self._engine.models.find(name) is not None:
            model = VLLMModel(name, self._text, self._instances, self._lifecycle, self._engine)
            self.models[name] = model
        return model

    def get_models(self) -> dict[str, VLLMModel]:
        """All models by name."""
        return {info.name: model for info in self._engine.models.all() if (model := self.get_model(info.name))}

    def index(self) -> list[dict[str, str]]:
        """Name, version, state and reason of every model that the caller may use, as Triton's repository index gives
        them."""
        return [
            {
                "name": info.name,
                "version": v2.VERSION,
                "state": "READY" if info.loaded else "UNAVAILABLE",
                "reason": info.error or ("" if info.loaded else "unloaded"),
            }
            for info in self._engine.models.all()
            if may_see(self._engine.models, info.name)
        ]

    def check_known(self, name: str) -> None:
        """Let a caller know only of the models that it may use.

        Raises:
            NotFound: no such model, or not for this caller.
        """
        info = self._engine.models.find(name)
        if info is None or not may_see(self._engine.models, info.name):
            raise NotFound(f"no model named {name!r}", field="model_name")

    async def load_model_by_name(self, name: str) -> None:
        """Serve a model or adapter again.

        Raises:
            NotFound: no such model.
            InvalidRequest: there are several front ends.
        """
        self.check_known(name)
        self._engine.adapters.check_alone()
        if name in self._engine.models.names:
            self._set_served(True)
        else:
            await self._engine.adapters.load(name)

    async def unload_model_by_name(self, name: str) -> None:
        """Serve no new request with a model or adapter. Without the base model, the server is not ready.

        Raises:
            NotFound: no such model.
            InvalidRequest: there are several front ends.
        """
        self.check_known(name)
        self._engine.adapters.check_alone()
        if name in self._engine.models.names:
            self._set_served(False)
        else:
            await self._engine.adapters.unload(name)

    def _set_served(self, served: bool) -> None:
        self._engine.models.served = served
        self._lifecycle.set_loaded(served)


class EngineDataPlane(DataPlane):  # type: ignore[misc]
    """KServe's data plane with health that reads the engine's state, and errors that carry a status.

    KServe's own `live` is constant, and its `ready` looks at no model.
    """

    def __init__(self, models: EngineModels, engine: VLLMEngine, lifecycle: Lifecycle, version: str) -> None:
        super().__init__(models)
        self._models = models
        self._engine = engine
        self._lifecycle = lifecycle
        self._version = version

    def metadata(self) -> dict[str, object]:
        """Name, version and extensions of the server."""
        return {
            "name": "kserve-vllm",
            "version": self._version,
            "extensions": [
                "model_repository",
                "model_configuration",
                "statistics",
                "generate",
                "binary_tensor_data",
                "parameters",
            ],
        }

    async def live(self) -> dict[str, str]:  # type: ignore[override]
        """KServe's form of liveness."""
        return {"status": "alive" if self._lifecycle.live else "dead"}

    async def ready(self) -> bool:
        """Whether new requests should be sent here."""
        return self._lifecycle.ready

    async def model_ready(self, model_name: str, disable_predictor_health_check: bool = False) -> bool:
        """Whether a model answers requests now.

        Raises:
            Forbidden: the key of the running request may not use it, whether there is one or not.
            NotFound: no such model.
        """
        check_permitted(self._engine.models, model_name, self._engine.models.plain(model_name))
        model = self._models.get_model(model_name)
        if model is None:
            raise NotFound(f"no model named {model_name!r}", field="model_name")
        return await model.healthy()

    async def model_metadata(self, model_name: str) -> dict[str, object]:
        """Platform, versions, inputs and outputs of a model.

        Raises:
            NotFound: no such model.
        """
        await self.model_ready(model_name)
        body: dict[str, object] = await super().model_metadata(model_name)
        return {**body, "versions": [v2.VERSION], "platform": v2.PLATFORM}

    async def get_model(self, name: str) -> VLLMModel:
        """The model to run a request.

        Raises:
            NotFound: no such model.
            Unavailable: it is unloaded.
        """
        if not await self.model_ready(name):
            raise Unavailable(f"model {name!r} is not loaded", retry_after_s=5)
        model = self._models.get_model(name)
        assert model is not None
        return model
