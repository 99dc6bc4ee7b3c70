"""Which protocol and endpoint a path belongs to, out of a bounded set, for the books."""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping
from contextlib import AbstractContextManager
from typing import Any

from kserve_vllm.gate import Kind
from kserve_vllm.protocol import wire
from kserve_vllm.telemetry.requests import Requests
from kserve_vllm.ticket import Ticket

OTHER = "other"

# What clients may do with any key; every other route is for administrators. A route that a newer vLLM adds is so until
# it stands here.
_QUESTIONS = re.compile(
    r"/|/v1/models(/.*)?|/v1/adapters(/.*)?|/v1/queue/stats|/v1/responses/.*|/v2(/.*)?|/docs(/.*)?|/openapi\.json|"
    r"/version|/load|/tokenizer_info|/metrics|/health|/ping|other"
)
_WORK = re.compile(
    r"/v1/(chat/)?completions(/(batch|render|derender))?|/v1/responses(/render|/\{response_id\}/cancel)?|"
    r"/v1/messages(/count_tokens|/render)?|/v1/embeddings|/v1/audio/\w+|/v1/systemone|/v1/decisions|/(v1/)?(score|rerank)|"
    r"/v2/(rerank|embed|models/.*)|/v1/models/.*|/pooling|/classify|/(de)?tokenize|/inference/v1/generate|"
    r"/generative_scoring|/cohere/v2/chat|/invocations"
)
# For administrators on purpose: they change the engine, or tell of its inside.
_CONTROL = re.compile(
    r"/(is_)?(paused?|sleep(ing)?|scal(e|ing)_elastic_ep)|/resume|/wake_up|/abort_requests|/collective_rpc|"
    r"/(start|stop)_profile|/reset_(encoder|mm|prefix)_cache|/release_kv_cache_memory|/fault_tolerance/(status|apply)|"
    r"/(start|finish)_(draft_)?weight_update|/(init|shutdown)_weight_transfer_engine|/update_weights|"
    r"/update_weight_version|/weight_(checker|info)|/get_world_size|/kv_event_sources|/server_info|/readyz?|"
    r"/v1/(un)?load_lora_adapter|/v1/realtime|/cohere/v2/chat/render"
)
_ASKED_BY_POST = {"/v2/repository/index", "/ping", OTHER}


def kind_of(method: str, endpoint: str) -> Kind:
    """Whether a request asks, puts the model to work, or changes the server's state.

    Args:
        method: of HTTP.
        endpoint: the route's template, from `Endpoints.find`.
    """
    work = _WORK.fullmatch(endpoint) is not None
    if method == "POST" and work:
        return Kind.WORK
    reads = method in ("GET", "HEAD", "OPTIONS") and _QUESTIONS.fullmatch(endpoint) is not None
    # With another method, a path for work is answered 405.
    return Kind.QUESTION if reads or work or endpoint in _ASKED_BY_POST else Kind.CONTROL


def is_classified(endpoint: str) -> bool:
    """Whether somebody has said what a route is for. Those of `CONTROL` are for administrators on purpose."""
    return any(each.fullmatch(endpoint) for each in (_QUESTIONS, _WORK, _CONTROL))


class Endpoints:
    """The route templates of some apps.

    Args:
        apps: FastAPI or Starlette apps; the first one that knows a path wins.
    """

    def __init__(self, *apps: Any) -> None:
        self._plain: dict[str, str] = {}
        self._patterns: list[tuple[re.Pattern[str], str]] = []
        for app in apps:
            for route in getattr(app, "routes", ()):
                template = getattr(route, "path_format", None)
                if template is None:
                    continue
                if "{" in template:
                    self._patterns.append((route.path_regex, template))
                else:
                    self._plain.setdefault(template, template)

    def find(self, path: str) -> tuple[str, str | None]:
        """The route template of a path and the model that the path names; `other` where no route has it."""
        plain = self._plain.get(path)
        if plain is not None:
            return plain, None
        for pattern, template in self._patterns:
            if match := pattern.match(path):
                return template, match.groupdict().get("model_name")
        return OTHER, None


def protocol_of(path: str) -> str:
    """`generate`, `v2`, `v1` or `openai`."""
    if not wire.is_kserve_path(path):
        return "openai"
    if not path.startswith("/v2"):
        return "v1"
    return "generate" if path.endswith(("/generate", "/generate_stream")) else "v2"


def of_http(
    requests: Requests,
    endpoints: Endpoints,
    scope: MutableMapping[str, Any],
    headers: Mapping[bytes, bytes],
    request_id: str,
) -> AbstractContextManager[Ticket]:
    """The ticket of an HTTP request. Questions (GET) are logged at the level debug."""
    path = scope["path"]
    endpoint, model = endpoints.find(path)
    trace = {
        name: headers[name.encode()].decode("latin-1")
        for name in ("traceparent", "tracestate")
        if name.encode() in headers
    }
    quiet = scope.get("method", "GET") in ("GET", "HEAD", "OPTIONS")
    return requests.open(protocol_of(path), endpoint, request_id, trace, model, quiet)
