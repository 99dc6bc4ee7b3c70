"""Under which names the engine is asked, and what stands behind each: the base model and its adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypedDict

from kserve_vllm.adapters.registry import Adapter, AdapterRegistry
from kserve_vllm.core.types import ModelInfo

if TYPE_CHECKING:
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels


class ModelList(TypedDict):
    """OpenAI's list of models; what a card has beside its `id` is vLLM's matter."""

    object: str
    data: list[dict[str, Any]]


class ServedModels:
    """The names that clients may ask for.

    Args:
        registry: vLLM's, which knows the names of the base model.
        adapters: ours.
    """

    def __init__(self, registry: OpenAIServingModels, adapters: AdapterRegistry) -> None:
        self._registry = registry
        self._adapters = adapters
        self.served = True
        """False while the base model is unloaded through the repository API."""

    @property
    def names(self) -> list[str]:
        """Served names of the base model, first one first."""
        return [path.name for path in self._registry.base_model_paths]

    def all(self) -> list[ModelInfo]:
        """All names that clients can ask for: base model, adapters, and adapters that were unloaded."""
        found = [ModelInfo(p.name, p.model_path, None, self.served) for p in self._registry.base_model_paths]
        found += [self._info(each) for each in self._adapters.all()]
        return found

    def find(self, name: str) -> ModelInfo | None:
        """The model of that name, loaded or not, or None. `base:adapter` names an adapter too."""
        for path in self._registry.base_model_paths:
            if path.name == name:
                return ModelInfo(path.name, path.model_path, None, self.served)
        adapter = self._adapters.find(name)
        return None if adapter is None else self._info(adapter)

    def plain(self, name: str) -> str:
        """A name that was asked for, as lists have it, whether there is such a model or not."""
        return name if name in self.names else self._adapters.plain(name)

    def _info(self, adapter: Adapter) -> ModelInfo:
        declared, loaded = adapter.declared, self.served and adapter.version is not None
        return ModelInfo(declared.name, declared.source, self.names[0], loaded, adapter.error)

    def serves(self, name: str) -> bool:
        """Whether requests may ask for this name now, of an adapter the plain one."""
        return name in self.names or name in self._adapters.served_names()

    async def openai_list(self) -> ModelList:
        """OpenAI's list of models as vLLM makes it."""
        models = await self._registry.show_available_models()
        body: ModelList = models.model_dump()
        return body
