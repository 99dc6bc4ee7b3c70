"""Where a request goes and what it counts as: one question, asked once, of the routers that answer it.

A path is normalized first, in one place. Then the routes of the apps are asked in the order in which the apps would ask
them, and the request is bound to the one that takes it: a route refuses whatever was not decided for it, so that no
spelling of a path is answered that the table below did not see. What stands in no row of the table is not served, so a
route that a newer vLLM adds is closed until someone says what it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.routing import Match

from kserve_vllm.core.errors import MethodNotAllowed, NotFound, RequestError
from kserve_vllm.core.request_context import RequestContext
from kserve_vllm.policy.enforcement import Kind
from kserve_vllm.protocols import errors as protocol_errors
from kserve_vllm.telemetry.requests import RequestRecorder

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.routing import BaseRoute
    from starlette.types import ASGIApp, Receive, Scope, Send

OTHER = "other"

# The table: route templates by what a request to them is. A GET of a question may be a HEAD too.
_QUESTIONS = frozenset(
    """/v1/models /v1/models/{model_name} /v1/adapters /v1/adapters/stats /v1/adapters/{name} /v1/queue/stats
    /v1/responses/{response_id} /v1/files /v1/files/{file_id} /v1/files/{file_id}/content
    /v1/batches /v1/batches/{batch_id}
    /v2 /v2/models /v2/models/{model_name} /v2/models/{model_name}/ready /v2/health/live /v2/health/ready
    /v2/models/{model_name}/versions/{model_version} /v2/models/{model_name}/versions/{model_version}/ready
    /v2/models/stats /v2/models/{model_name}/config /v2/models/{model_name}/stats
    /v2/models/{model_name}/versions/{model_version}/config /v2/models/{model_name}/versions/{model_version}/stats
    /docs /docs/oauth2-redirect /openapi.json /version /load /tokenizer_info /health /ping
    /ui /ui/app.js /ui/style.css""".split()
)
# OpenAI's operations whose paths another template of ours would take for a name, and which are not served.
_NOT_A_NAME = frozenset({"/v1/responses/compact", "/v1/responses/input_tokens"})
_ASKED_BY_POST = frozenset({"/v2/repository/index", "/ping"})
# What callers keep here, each for its tenant: the model does not work for these, and no administrator is needed.
_KEPT = frozenset(
    {
        ("POST", "/v1/files"),
        ("DELETE", "/v1/files/{file_id}"),
        ("POST", "/v1/batches"),
        ("POST", "/v1/batches/{batch_id}/cancel"),
    }
)
_WORK = frozenset(
    """/v1/chat/completions /v1/chat/completions/batch /v1/chat/completions/render /v1/chat/completions/derender
    /v1/completions /v1/completions/render /v1/completions/derender /v1/responses /v1/responses/render
    /v1/responses/{response_id}/cancel /v1/messages /v1/messages/count_tokens /v1/messages/render /v1/embeddings
    /v1/audio/transcriptions /v1/audio/translations /v1/systemone /v1/decisions /score /v1/score /rerank /v1/rerank
    /v2/rerank /v2/embed /pooling /classify /tokenize /detokenize /inference/v1/generate /generative_scoring
    /cohere/v2/chat /invocations /v1/models/{model_name}:predict
    /v2/models/{model_name}/infer /v2/models/{model_name}/versions/{model_version}/infer
    /v2/models/{model_name}/generate /v2/models/{model_name}/versions/{model_version}/generate
    /v2/models/{model_name}/generate_stream
    /v2/models/{model_name}/versions/{model_version}/generate_stream""".split()
)
_WORK_BY_WEBSOCKET = frozenset({"/v1/realtime"})
# What changes the server's state, or shows of it what is the operator's: for administrators.
_CONTROL = frozenset(
    """/v1/load_lora_adapter /v1/unload_lora_adapter /adapters /adapters/{adapter_name}
    /v1/adapters/{name} /v1/adapters/{name}/load
    /v2/repository/models/{model_name}/load /v2/repository/models/{model_name}/unload
    /kv_event_sources /server_info /start_profile /stop_profile /reset_prefix_cache /reset_mm_cache
    /reset_encoder_cache /collective_rpc /sleep /wake_up /release_kv_cache_memory /is_sleeping /pause /resume
    /abort_requests /inference/v1/abort_requests /is_paused /init_weight_transfer_engine
    /shutdown_weight_transfer_engine /start_weight_update /start_draft_weight_update /update_weights
    /finish_weight_update /update_weight_version /weight_info /weight_checker /get_world_size
    /fault_tolerance/status /fault_tolerance/apply /cohere/v2/chat/render /readyz /ready""".split()
)
NOT_SERVED = frozenset({"/metrics", "/metrics/{path}", "/redoc", "/scale_elastic_ep", "/is_scaling_elastic_ep"})
"""Routes of vLLM's app that are closed on purpose: metrics are answered before any route is asked."""

# Where a model's name stands in a path, it may hold a slash, which clients write as %2F.
_NAMED = ("/v1/models/", "/v1/adapters/", "/v2/models/", "/v2/repository/models/")
_NOT_CANONICAL = re.compile("[\x00-\x1f\x7f-\x9f\ufffd\ud800-\udfff\\\\]|//|/\\.\\.?(/|$)")
_ENCODED_SLASH = re.compile(rb"%2f", re.IGNORECASE)
_CHOSEN = "kserve_vllm.route"


def kind_of(method: str, endpoint: str) -> Kind | None:
    """Whether a request asks, puts the model to work, or changes the server's state; None: it is not served.

    Args:
        method: of HTTP, or `WEBSOCKET`.
        endpoint: the route's template.
    """
    if (method == "POST" and endpoint in _WORK) or (method == "WEBSOCKET" and endpoint in _WORK_BY_WEBSOCKET):
        return Kind.WORK
    if (method in ("GET", "HEAD") and endpoint in _QUESTIONS) or (method == "POST" and endpoint in _ASKED_BY_POST):
        return Kind.QUESTION
    if (method, endpoint) in _KEPT:
        return Kind.QUESTION
    return Kind.CONTROL if endpoint in _CONTROL and method not in ("OPTIONS", "WEBSOCKET") else None


@dataclass(frozen=True, slots=True)
class Target:
    """Where a request goes.

    Attributes:
        endpoint: the route's template; `other` where no route takes the path.
        kind: what the request is; None where it is refused.
        app, route: what answers it.
        method: to ask the route with: GET for a HEAD where the route knows no HEAD; what was asked with, if refused.
        model: the name that stands in the path, or None.
        refusal: why it is not served, or None.
        allow: methods that the path is served for, where its method is none of them.
        why: what a client is told of a path that no route takes.
    """

    endpoint: str = OTHER
    kind: Kind | None = None
    app: ASGIApp | None = None
    route: BaseRoute | None = None
    method: str = "GET"
    model: str | None = None
    refusal: type[RequestError] | None = NotFound
    allow: tuple[str, ...] = ()
    why: str = "no such path"

    def check(self) -> None:
        """Raise why the request is not served, if it is not.

        Raises:
            NotFound: no route takes the path.
            MethodNotAllowed: a route takes it, but not with this method; `allow` says which.
        """
        if self.refusal is MethodNotAllowed:
            raise MethodNotAllowed(
                f"this path does not take {self.method}, but {', '.join(self.allow)}", allow=self.allow
            )
        if self.refusal is not None:
            raise self.refusal(self.why)


def normalize(scope: Scope) -> str:
    """Write a request's path into its scope in the one form that everything behind compares: without the alias
    `/openai`, and without a slash at the end.

    Raises:
        NotFound: the path holds a control character, bytes that are no UTF-8, doubled slashes, dot segments, or a slash
            that is encoded where no name stands. Those are refused and not repaired: who stands in front of this server
            may have repaired them in another way.
    """
    path: str = scope["path"]
    raw: bytes = scope.get("raw_path") or b""
    if path == protocol_errors.OPENAI_ALIAS + "/v1" or path.startswith(protocol_errors.OPENAI_ALIAS + "/v1/"):
        path = path.removeprefix(protocol_errors.OPENAI_ALIAS)
    if len(path) > 1 and path.endswith("/") and not path.endswith("//"):
        path = path[:-1]
    if _NOT_CANONICAL.search(path):
        raise NotFound("no such path")
    if b"%" in raw and not path.startswith(_NAMED) and _ENCODED_SLASH.search(raw):
        raise NotFound("no such path")
    if path != scope["path"]:
        scope["path"], scope["raw_path"] = path, path.encode()
    return path


def is_classified(endpoint: str) -> bool:
    """Whether somebody has said what a route is for."""
    kept = {template for _, template in _KEPT}
    return endpoint in _QUESTIONS | _ASKED_BY_POST | kept | _WORK | _WORK_BY_WEBSOCKET | _CONTROL | NOT_SERVED


class Endpoints:
    """The routes of some apps, each bound to what was decided for it.

    Args:
        apps: FastAPI or Starlette apps, or what wraps one and has it as `app`; the first that takes a request wins.
    """

    def __init__(self, *apps: ASGIApp) -> None:
        self._routes: list[tuple[ASGIApp, BaseRoute]] = []
        self._found: dict[tuple[str, str], Target] = {}
        self._plain: set[str] = set()
        for app in apps:
            # Starlette, and FastAPI is one; what else it may be has no routes.
            inner: Any = getattr(app, "app", app)
            routes = getattr(inner, "routes", None)
            if routes is None:
                continue
            # Starlette would answer with a redirect, which loses /openai and the scheme of a proxy.
            inner.router.redirect_slashes = False
            for route in routes:
                self._routes.append((app, route))
                _bind(inner, route)
                template = _template(route)
                if "{" not in template:
                    self._plain.add(template)

    @property
    def any(self) -> bool:
        """Whether there is any route yet."""
        return bool(self._routes)

    def find(self, method: str, path: str) -> Target:
        """What takes a request.

        Args:
            method: of HTTP, or `WEBSOCKET`.
            path: from `normalize`.
        """
        found = self._found.get((method, path))
        if found is None:
            found = self._ask(method, path)
            if path in self._plain and found.kind is not None:  # a bounded set
                self._found[method, path] = found
        return found

    def _ask(self, method: str, path: str) -> Target:
        # KServe's verb beside `:predict`; a model's name may hold a colon, but a POST to a name is no request to it.
        if path in _NOT_A_NAME or (method == "POST" and path.endswith(":explain")):
            return Target()
        asked = [method, "GET"] if method == "HEAD" else [method]
        allow: set[str] = set()
        template: str | None = None
        for each in asked:
            scope = _scope(each, path)
            for app, route in self._routes:
                match, child = route.matches(scope)
                if match is Match.NONE:
                    continue
                if match is Match.FULL and (kind := kind_of(each, _template(route))) is not None:
                    model = child.get("path_params", {}).get("model_name")
                    return Target(_template(route), kind, app, route, each, model, None)
                served = [m for m in getattr(route, "methods", None) or () if kind_of(m, _template(route)) is not None]
                if served:
                    template = template or _template(route)
                    allow.update(served)
        if template is None and method != "WEBSOCKET" and path in _WORK:
            return Target(why=f"no such path here: the model that is served does not do what {path} is for")
        if template is None or method == "WEBSOCKET":
            return Target()
        if "GET" in allow:
            allow.add("HEAD")
        return Target(template, method=method, refusal=MethodNotAllowed, allow=tuple(sorted(allow)))


def choose(scope: Scope, target: Target) -> Scope:
    """The scope with which the target's app has to be called."""
    return (
        {**scope, "method": target.method, _CHOSEN: target.route}
        if scope["type"] == "http"
        else {**scope, _CHOSEN: target.route}
    )


def _bind(app: Starlette, route: BaseRoute) -> None:
    """Let a route answer nothing but what was decided for it."""
    handle = route.handle
    if getattr(handle, "bound", False):
        return

    async def handle_if_chosen(scope: Scope, receive: Receive, send: Send) -> None:
        if scope.get(_CHOSEN) is route:
            await handle(scope, receive, send)
        else:
            await app.router.not_found(scope, receive, send)

    handle_if_chosen.bound = True  # type: ignore[attr-defined]
    route.handle = handle_if_chosen  # type: ignore[method-assign]


def _template(route: BaseRoute) -> str:
    return str(getattr(route, "path_format", None) or getattr(route, "path", ""))


def _scope(method: str, path: str) -> Scope:
    scope: dict[str, object] = {"path": path, "root_path": "", "headers": [], "path_params": {}, "query_string": b""}
    return scope | ({"type": "websocket"} if method == "WEBSOCKET" else {"type": "http", "method": method})


def templates(routes: Iterable[BaseRoute]) -> list[tuple[str, str]]:
    """Every method and template of some routes, for who checks that each is classified."""
    found = []
    for route in routes:
        methods = getattr(route, "methods", None) or ({"WEBSOCKET"} if "WebSocket" in type(route).__name__ else {"*"})
        found += [(method, _template(route)) for method in sorted(methods)]
    return found


def protocol_of(path: str) -> str:
    """`generate`, `v2`, `v1` or `openai`."""
    if not protocol_errors.is_kserve_path(path):
        return "openai"
    if not path.startswith("/v2"):
        return "v1"
    return "generate" if path.endswith(("/generate", "/generate_stream")) else "v2"


def of_http(
    requests: RequestRecorder,
    target: Target,
    scope: Scope,
    headers: Mapping[bytes, bytes],
    request_id: str,
) -> AbstractContextManager[RequestContext]:
    """The request context of an HTTP request. Questions (GET) are logged at the level debug."""
    path = scope["path"]
    trace = {
        name: headers[name.encode()].decode("latin-1")
        for name in ("traceparent", "tracestate")
        if name.encode() in headers
    }
    quiet = scope.get("method", "GET") in ("GET", "HEAD", "OPTIONS")
    return requests.open(protocol_of(path), target.endpoint, request_id, trace, target.model, quiet)
