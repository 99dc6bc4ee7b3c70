"""vLLM's side of the adapters.

Written against vLLM 0.32.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kserve_vllm.adapters.files import Broken, read_shapes
from kserve_vllm.adapters.registry import AdapterRegistry, Version

if TYPE_CHECKING:
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.async_llm import AsyncLLM

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Base:
    """What is known of the base model: its layers, and the shapes of its tensors."""

    layers: int | None
    shapes: Mapping[str, tuple[int, ...]]


class LoRAs:
    """vLLM's side of the adapters: versions under names of their own in the engine, plain names for clients.

    vLLM keeps the adapters of a batch in a set by name, so that two versions of one adapter that run together need two
    names there. Where vLLM shows a name to a client or in a metric, the plain one is put in its place.

    Args:
        client: vLLM's client.
        shared: whether other processes use the engine too. A version then has the same number in all of them.
    """

    def __init__(self, client: AsyncLLM, shared: bool = False) -> None:
        self._client = client
        self._shared = shared
        self._models: OpenAIServingModels
        """vLLM's registry of models; only after `attach`."""
        self._names: dict[str, str] = {}
        """Name in the engine to the adapter's name."""
        self._asked: dict[int, tuple[LoRARequest, str]] = {}
        """Identity of a published `LoRARequest` to itself and the name that its requests asked for."""
        self._requests: dict[int, list[LoRARequest]] = {}
        """A version's number to its `LoRARequest`s, one per name that clients may ask for."""
        self._freed: set[tuple[int, str]] = set()
        """Number and folder of versions that are gone."""
        self.adapters: AdapterRegistry | None = None
        states = client.output_processor.lora_states
        update = states._request_update
        states._request_update = lambda request_id, name, *args, **kwargs: update(
            request_id, name and self.plain(name), *args, **kwargs
        )

    def attach(self, models: OpenAIServingModels) -> None:
        """Set vLLM's registry of models, once it is there."""
        self._models = models
        theirs = models.model_name
        models.model_name = lambda lora=None: theirs(None) if lora is None else self._asked_name(lora)
        models.show_available_models = self._show

    def _asked_name(self, lora: LoRARequest) -> str:
        known = self._asked.get(id(lora))
        return self.plain(lora.lora_name) if known is None else known[1]

    async def _show(self) -> object:
        """vLLM's list of models, with the adapters that are served here."""
        from vllm.entrypoints.serve.engine.protocol import ModelCard, ModelPermission

        found = await self._models.registry.show_available_models()
        assert self.adapters is not None
        for each in self.adapters.all():
            if each.version is not None:
                name, source = each.declared.name, each.declared.source
                found.data.append(
                    ModelCard(id=name, root=source, parent=self.base_names[0], permission=[ModelPermission()])
                )
        return found

    # For the adapters

    @property
    def base_names(self) -> list[str]:
        return [path.name for path in self._models.base_model_paths]

    @property
    def max_rank(self) -> int | None:
        config = self._client.vllm_config.lora_config
        return None if config is None else int(config.max_lora_rank)

    def base_model(self) -> Base:
        config = self._client.model_config
        layers = getattr(config.hf_text_config, "num_hidden_layers", None)
        shapes: dict[str, tuple[int, ...]] = {}
        try:
            folder = Path(config.model)
            if not folder.is_dir():
                from huggingface_hub import snapshot_download

                folder = Path(snapshot_download(config.model, revision=config.revision, local_files_only=True))
            for file in folder.glob("*.safetensors"):
                shapes |= read_shapes(file)
        except Exception as error:
            log.warning("adapters are not checked against the shapes of the base model: %s", error)
        return Base(layers, shapes)

    def number(self, key: str) -> int:
        if self._shared:
            # Above what vLLM gives out to those of `--lora-modules`: 1, 2, ...
            return (1 << 32) + int.from_bytes(hashlib.sha256(key.encode()).digest()[:7])
        return int(self._models.lora_id_counter.inc(1))

    async def add(self, name: str, version: Version) -> None:
        from vllm.lora.request import LoRARequest

        request = LoRARequest(version.key, version.number, str(version.folder))
        try:
            await self._client.add_lora(request)
        except Exception as error:
            # What failed halfway would keep a slot.
            with contextlib.suppress(Exception):
                await self._client.remove_lora(version.number)
            raise Broken(f"the engine can't load it: {str(error) or type(error).__name__}") from error
        self._names[version.key] = name

    async def remove(self, version: Version) -> None:
        self._freed.add((version.number, str(version.folder)))
        for request in self._requests.pop(version.number, ()):
            self._asked.pop(id(request), None)
        with contextlib.suppress(Exception):
            await self._client.remove_lora(version.number)

    def publish(self, name: str, version: Version) -> None:
        from vllm.lora.request import LoRARequest

        self._names[version.key] = name
        before = self._models.lora_requests.get(name)
        same = before is not None and before.lora_int_id == version.number
        fused = same and before.is_3d_lora_weight
        requests = self._requests.setdefault(version.number, [])
        for asked in [name, *(f"{base}:{name}" for base in self.base_names)]:
            request = LoRARequest(version.key, version.number, str(version.folder), is_3d_lora_weight=fused)
            requests.append(request)
            self._asked[id(request)] = request, asked
            self._models.lora_requests[asked] = request

    def withdraw(self, name: str) -> None:
        for asked in [name, *(f"{base}:{name}" for base in self.base_names)]:
            self._models.lora_requests.pop(asked, None)

    def in_flight(self, version: Version) -> int:
        states = self._client.output_processor.request_states.values()
        return sum(1 for state in states if state.lora_name == version.key)

    def foreign(self) -> dict[str, tuple[str, int]]:
        return {
            name: (request.lora_path, request.lora_int_id)
            for name, request in self._models.lora_requests.items()
            if id(request) not in self._asked
        }

    def published(self, name: str) -> bool:
        return name in self._models.lora_requests

    # For the accounting

    def admit(self, lora: LoRARequest) -> LoRARequest:
        if (lora.lora_int_id, lora.lora_path) not in self._freed:
            return lora
        current = self._models.lora_requests.get(self.plain(lora.lora_name))
        if current is None:
            from vllm.exceptions import VLLMNotFoundError

            raise VLLMNotFoundError(f"The model `{self.plain(lora.lora_name)}` does not exist.")
        return current

    def plain(self, key: str) -> str:
        return self._names.get(key, key)

    def book(self, key: str, requests: int, prompt_tokens: int, output_tokens: int) -> None:
        if self.adapters is not None:
            self.adapters.book(self.plain(key), requests, prompt_tokens, output_tokens)
