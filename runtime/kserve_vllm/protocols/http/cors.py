"""What browsers ask of every route (CORS), answered in one place for vLLM's routes, ours and those of the edge.

vLLM's flags say who may ask (`--allowed-origins`, `--allowed-methods`, `--allowed-headers`, `--allow-credentials`); the
rules are Starlette's, whose middleware vLLM uses. Requests without an `Origin` pass untouched, so that nothing is done
for the messages of their answers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.middleware.cors import CORSMiddleware

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send


_EXPOSED = ("x-request-id", "request-id", "retry-after", "x-refusal-reason", "inference-header-content-length")


class Browsers:
    """An app that browsers may ask from pages of other origins.

    Args:
        app: answers the requests.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._rules: CORSMiddleware | None = None

    def allow(self, origins: list[str], methods: list[str], headers: list[str], credentials: bool) -> None:
        """Set who may ask; before that, no page of another origin may."""
        self._rules = CORSMiddleware(
            self._app,  # type: ignore[arg-type]
            allow_origins=origins,
            allow_methods=methods,
            allow_headers=headers,
            allow_credentials=credentials,
            expose_headers=_EXPOSED,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http" and self._rules is not None:
            for name, _ in scope["headers"]:
                if name == b"origin":
                    await self._rules(scope, receive, send)  # type: ignore[arg-type]
                    return
        await self._app(scope, receive, send)
