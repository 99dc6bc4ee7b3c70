"""Responses that vLLM keeps (`VLLM_ENABLE_RESPONSES_API_STORE`), each for the tenant that asked for it.

vLLM keeps them by id for whoever names it, lets a client choose the id of its response, and never forgets one. Here a
response of another tenant is one that is not there, an id can't be taken twice, and of each tenant as many are kept as
`MOST`.

Written against vLLM 0.32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from kserve_vllm.core.errors import InvalidRequest, NotFound, RequestError
from kserve_vllm.core.request_context import current

if TYPE_CHECKING:
    from fastapi import FastAPI
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
    from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses

E = TypeVar("E", bound=RequestError)

_NOT_KEPT = (
    "previous_response_id: responses are not stored here; send what was said before as input "
    "(who runs the server can set VLLM_ENABLE_RESPONSES_API_STORE=1)"
)
MOST = 1000
"""Responses that are kept for one tenant; the oldest goes first."""


def keep_apart(app: FastAPI) -> None:
    """Keep the responses of tenants apart, where any are kept. Before the first request."""
    handler: OpenAIServingResponses | None = getattr(app.state, "openai_serving_responses", None)
    if handler is None:
        return
    if not handler.enable_store:
        _say_that_none_is_kept(handler)
        return
    kept = _Kept(handler)
    create, retrieve, cancel = handler.create_responses, handler.retrieve_responses, handler.cancel_responses

    async def created(request: ResponsesRequest, *args: object, **kwargs: object) -> object:
        if request.previous_response_id is not None:
            kept.check(request.previous_response_id)
        if request.store:
            kept.add(request.request_id)
        return await create(request, *args, **kwargs)

    async def retrieved(response_id: str, *args: object, **kwargs: object) -> object:
        kept.check(response_id)
        return await retrieve(response_id, *args, **kwargs)

    async def cancelled(response_id: str, *args: object, **kwargs: object) -> object:
        kept.check(response_id)
        return await cancel(response_id, *args, **kwargs)

    handler.create_responses = created
    handler.retrieve_responses, handler.cancel_responses = retrieved, cancelled


def _say_that_none_is_kept(handler: OpenAIServingResponses) -> None:
    """Tell a client why there is no response to go on from, which vLLM does not."""
    create = handler.create_responses

    async def created(request: ResponsesRequest, *args: object, **kwargs: object) -> object:
        if request.previous_response_id is not None:
            raise _told(NotFound(_NOT_KEPT, field="previous_response_id"))
        return await create(request, *args, **kwargs)

    handler.create_responses = created


class _Kept:
    """Whose response is whose.

    Args:
        handler: vLLM's, which has them.
    """

    def __init__(self, handler: OpenAIServingResponses) -> None:
        self._handler = handler
        self._owners: dict[str, str] = {}
        self._of: dict[str, dict[str, None]] = {}
        """Ids by tenant, the oldest first."""

    def add(self, response_id: str) -> None:
        """A response is asked for, and will be kept.

        Raises:
            InvalidRequest: there is one of that id.
        """
        if response_id in self._owners:
            raise _told(InvalidRequest("request_id is that of another response", field="request_id"))
        tenant = _tenant()
        self._owners[response_id] = tenant
        own = self._of.setdefault(tenant, {})
        own[response_id] = None
        if len(own) > MOST:
            self._forget(own)

    def check(self, response_id: str) -> None:
        """Let a tenant name its own.

        Raises:
            NotFound: it has none of that id.
        """
        if self._owners.get(response_id) != _tenant():
            raise _told(NotFound(f"there is no response {response_id[:64]!r}", field="response_id"))

    def _forget(self, own: dict[str, None]) -> None:
        oldest = next(iter(own))
        del own[oldest], self._owners[oldest]
        handler = self._handler
        for store in (handler.response_store, handler.msg_store, handler.event_store):
            store.pop(oldest, None)


def _tenant() -> str:
    context = current.get()
    return context.access.tenant if context is not None else ""


def _told(error: E) -> E:
    """An error that the middleware answers, whatever vLLM makes of it."""
    if (context := current.get()) is not None:
        context.refusal = error
    return error
