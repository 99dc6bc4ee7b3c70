"""The API of the adapters: what there is, how it is doing, load and unload. Errors have OpenAI's shape."""

from __future__ import annotations

from collections.abc import Callable

import orjson
from fastapi import APIRouter, Response

from kserve_vllm.adapters.registry import Adapter, AdapterRegistry
from kserve_vllm.core.errors import NotFound
from kserve_vllm.protocols.http import openapi as schemas


class AdapterRoutes:
    """Handlers of `/v1/adapters`.

    Args:
        adapters: of the engine.
        operators_only: raises where the running request's caller may not see what all tenants did.
        may_see: whether that caller gets to know of an adapter.
    """

    def __init__(
        self, adapters: AdapterRegistry, operators_only: Callable[[], None], may_see: Callable[[str], bool]
    ) -> None:
        self._adapters = adapters
        self._operators_only = operators_only
        self._may_see = may_see

    async def list_adapters(self) -> Response:
        """All adapters that the caller may use: state, source, version and what is wrong."""
        rows = [self._row(each) for each in self._adapters.all() if self._may_see(each.declared.name)]
        return _json({"object": "list", "data": rows})

    async def adapter(self, name: str) -> Response:
        """One adapter."""
        found = self._adapters.find(name)
        if found is None or not self._may_see(found.declared.name):
            raise NotFound(f"no adapter named {name!r} is declared", field="name")
        return _json(self._row(found))

    async def stats(self) -> Response:
        """Requests, tokens, loads and failures of each adapter since the start. Refused with several front ends."""
        self._operators_only()
        self._adapters.check_alone()
        rows = [
            {
                "name": each.declared.name,
                "requests": each.requests,
                "in_flight": self._adapters.in_flight(each),
                "prompt_tokens": each.prompt_tokens,
                "output_tokens": each.output_tokens,
                "loads": each.loads,
                "reloads": max(0, each.loads - 1),
                "failures": each.failures,
                "unloads": each.unloads,
            }
            for each in self._adapters.all()
        ]
        return _json({"object": "list", "data": rows, "states": self._adapters.by_state()})

    async def load(self, name: str) -> Response:
        """Load an adapter that is declared, or look at its source again; answered when that is done."""
        return _json(self._row(await self._adapters.load(name)))

    async def unload(self, name: str) -> Response:
        """Serve no new request with an adapter until it is loaded again or its entry changes. Requests in flight
        finish."""
        return _json(self._row(await self._adapters.unload(name)))

    def router(self) -> APIRouter:
        """The routes."""
        router = APIRouter(prefix="/v1/adapters", tags=["Adapters"])
        errors, one = schemas.OPENAI_ERRORS, schemas.ADAPTER
        router.add_api_route("", self.list_adapters, methods=["GET"], responses=schemas.ADAPTERS)
        router.add_api_route("/stats", self.stats, methods=["GET"], responses=schemas.ADAPTER_STATS)
        router.add_api_route("/{name:model}/load", self.load, methods=["POST"], responses=one | errors)
        router.add_api_route("/{name:model}", self.adapter, methods=["GET"], responses=one | errors)
        router.add_api_route("/{name:model}", self.unload, methods=["DELETE"], responses=one | errors)
        return router

    def _row(self, adapter: Adapter) -> dict[str, object]:
        version = adapter.version
        # With several front ends nobody knows what the others run.
        in_use = {} if self._adapters.shared else {"in_use": self._adapters.in_flight(adapter) > 0}
        return {
            "name": adapter.declared.name,
            "object": "adapter",
            "source": adapter.declared.source,
            "description": adapter.declared.description,
            "origin": adapter.origin,
            "state": adapter.state.value,
            "error": adapter.error,
            "revision": (version.revision if version else None) or adapter.declared.revision,
            "digest": (version.digest if version else "") or None,
            "since": round(adapter.since, 3),
            **in_use,
        }


def _json(tree: object) -> Response:
    return Response(orjson.dumps(tree), media_type="application/json")
