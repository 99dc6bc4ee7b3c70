"""What clients send to vLLM's OpenAI and Anthropic routes, in the form in which vLLM reads it.

OpenAI's clients write null for what they leave open, and fields and roles that vLLM has under another name, or had. A
field that would change the answer and that nothing here reads is refused with a sentence: none is dropped in silence.
What is done is told to users in docs/reference/http.md.

Written against vLLM 0.32. What a route takes is read from the models of the installed version.
"""

from __future__ import annotations

import json
import logging
import re
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, Union, get_args, get_origin

from kserve_vllm.core.errors import InvalidRequest
from kserve_vllm.core.request_context import current
from kserve_vllm.engine.hooks.transfers import check_transfers

if TYPE_CHECKING:
    from fastapi import FastAPI
    from pydantic import BaseModel

log = logging.getLogger(__name__)

LEAST_TOP_P = 1e-6
"""Stands for a `top_p` of 0, which means the likeliest token alone, and which vLLM refuses."""

NULL_USAGE = b',"usage":null'
"""In every chunk but the last, where the client asked for the usage: OpenAI's clients read the field."""

# vLLM read these until 0.11, and has them under `structured_outputs` since.
_GUIDED = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "guided_json_object": "json_object",
    "guided_whitespace_pattern": "whitespace_pattern",
    "structural_tag": "structural_tag",
}
_BACKEND = "guided_decoding_backend"


_MOST_NAMED = 16
"""Types of tools that one answer names."""
_MOST_TOLD = 32
"""Types of tools that the log says are left out; a client may make up any."""

_NAME_A_MODEL = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings"})
"""Where OpenAI's description requires `model`, and vLLM takes the served one without it."""


_RESPONSES = "/v1/responses"
_CALLED = frozenset({"function", "custom", "namespace"})
"""Types of a response's tools that the model is told of, and that the client runs."""
_WORD = re.compile("[a-z0-9_]{1,64}")
LEFT_OUT = "x-ignored-tools"
"""Header of an answer that names the types of tools which the model was not told of."""


@dataclass(frozen=True)
class Route:
    """What one of vLLM's routes takes.

    Attributes:
        fields: names of the body's top-level fields, in any of its forms.
        not_null: those of them that may be left out, but where null is refused or trips vLLM over.
    """

    fields: frozenset[str]
    not_null: frozenset[str]


_Mend: TypeAlias = Callable[[str, dict[str, object], Route], None]
"""Mends one field of a body in place: its name, the body, and what the route takes."""


class Mender:
    """Mends the bodies of requests.

    Args:
        routes: by path.
        backend: of structured outputs, as the server is configured.
        knows_developer: whether chat templates here have the role `developer`; else it becomes `system`.
        strict: whether a request has to name its model where OpenAI's has to, and may not have tools left out.
        has_tools: whether vLLM runs tools by itself (`--tool-server`).
        transfers: whether clients are routers, which say where caches are (`--allow-transfer-params`).
    """

    def __init__(
        self,
        routes: Mapping[str, Route],
        backend: str,
        knows_developer: bool,
        strict: bool = False,
        has_tools: bool = False,
        transfers: bool = False,
    ) -> None:
        self._routes = routes
        self._backend = backend
        self._knows_developer = knows_developer
        self._strict = strict
        self._has_tools = has_tools
        self._transfers = transfers
        self._told: set[str] = set()

    def covers(self, path: str) -> bool:
        """Whether bodies for this path are mended."""
        return path in self._routes

    def check(self, tree: Mapping[str, object]) -> None:
        """Refuse what clients may not say, on whatever path.

        Raises:
            InvalidRequest: names the field.
        """
        check_transfers(tree, self._transfers)

    def mend(self, path: str, tree: dict[str, object]) -> bool:
        """Mend a parsed body in place. Returns whether anything was changed.

        Raises:
            InvalidRequest: a field asks for what is not done here; the sentence names it.
        """
        self.check(tree)
        route = self._routes.get(path)
        if route is None:
            return False
        if self._strict and path in _NAME_A_MODEL and tree.get("model") in (None, ""):
            raise InvalidRequest("model is missing: name one of those that /v1/models lists", field="model")
        if path == _RESPONSES and not self._has_tools:
            self._look_at_tools(tree)
        dropped = [name for name, value in tree.items() if value is None and name in route.not_null]
        for name in dropped:
            del tree[name]
        changed = bool(dropped)
        if tree.get("top_p") == 0 and not isinstance(tree["top_p"], bool) and "top_p" in route.fields:
            tree["top_p"] = LEAST_TOP_P
            changed = True
        if not route.fields.issuperset(tree):
            changed |= self._mend_unknown(route, tree)
        for name in ("messages", "input"):
            items = tree.get(name)
            if isinstance(items, list):
                for item in items:
                    if isinstance(item, dict):
                        changed |= self._mend_message(item)
        if tree.get("suffix") == "":
            del tree["suffix"]
            changed = True
        return changed

    def _look_at_tools(self, tree: Mapping[str, object]) -> None:
        """Say which tools of a response are left out: OpenAI runs those by itself, vLLM tells the model nothing of
        them. Refused by default they would keep clients away that always send one, as Codex does.

        Raises:
            InvalidRequest: one of them has to be called; or any, where that is wanted.
        """
        tools = tree.get("tools")
        kinds = [tool.get("type") for tool in tools if isinstance(tool, dict)] if isinstance(tools, list) else []
        left_out = sorted({kind for kind in kinds if isinstance(kind, str) and _WORD.fullmatch(kind)} - _CALLED)
        if not left_out:
            return
        names = ", ".join(left_out[:_MOST_NAMED])
        choice = tree.get("tool_choice")
        wanted = choice.get("type") if isinstance(choice, dict) else None
        if self._strict or wanted in left_out:
            field = "tools" if wanted not in left_out else "tool_choice"
            raise InvalidRequest(f"{field}: {names} would be run by the server, which runs no tools", field=field)
        if (context := current.get()) is not None and not any(name == LEFT_OUT for name, _ in context.answer_headers):
            context.answer_headers.append((LEFT_OUT, names))
        if len(self._told) < _MOST_TOLD and (new := [kind for kind in left_out if kind not in self._told]):
            self._told.update(new)
            log.info(
                "tools of the types %s are left out of responses: this server runs none (said once; answers say it in "
                "the header %s, and --strict-openai true refuses such requests)",
                ", ".join(new),
                LEFT_OUT,
            )

    def _mend_message(self, message: dict[str, object]) -> bool:
        """A message as an SDK writes back what it was answered has null in every field that was not set."""
        changed = False
        if message.get("role") == "developer" and not self._knows_developer:
            message["role"] = "system"
            changed = True
        if None in message.values():
            nulls = [name for name, value in message.items() if value is None and name != "content"]
            for name in nulls:
                del message[name]
            changed |= bool(nulls)
        return changed

    def _mend_unknown(self, route: Route, tree: dict[str, object]) -> bool:
        changed = False
        for name in [name for name in tree if name not in route.fields]:
            mend = _UNKNOWN.get(name)
            if name in _GUIDED or name == _BACKEND:
                if "structured_outputs" not in route.fields:
                    raise InvalidRequest(f"{name} has no meaning for this path", field=name)
                self._translate(name, tree)
            elif mend is not None:
                mend(name, tree, route)
            changed |= name not in tree
        return changed

    def _translate(self, name: str, tree: dict[str, object]) -> None:
        """Write a field of the former guided decoding where vLLM reads it now."""
        value = tree.pop(name)
        if value is None:
            return
        if name == _BACKEND:
            # Where the server chooses by request, it is between these two.
            own = ("xgrammar", "guidance") if self._backend == "auto" else (self._backend,)
            if str(value).split(":")[0] not in ("auto", *own):
                sentence = f"{name}: the server decides on it (--structured-outputs-config): {self._backend}"
                raise InvalidRequest(sentence, field=name)
            return
        wanted = tree.get("structured_outputs")
        if wanted is None:
            wanted = {}
        if not isinstance(wanted, dict):
            raise InvalidRequest("structured_outputs must be an object", field="structured_outputs")
        key = _GUIDED[name]
        _check_guided(name, key, value)
        if wanted.get(key) is not None:
            raise InvalidRequest(f"give one of {name} and structured_outputs.{key}", field=name)
        tree["structured_outputs"] = {**wanted, key: value}


def _check_guided(name: str, key: str, value: object) -> None:
    """Refuse at once what vLLM would refuse after a stream has begun, and without the field's name.

    Raises:
        InvalidRequest: nothing can satisfy the value, or it can't be read.
    """
    if key == "choice" and (not isinstance(value, list) or not value):
        raise InvalidRequest(f"{name} must be a list of at least one text", field=name)
    if key == "json" and isinstance(value, str):
        try:
            json.loads(value)
        except (ValueError, RecursionError):
            raise InvalidRequest(f"{name} is not valid JSON", field=name) from None


def _drop_if(*harmless: object, why: str, beside: str | None = None) -> _Mend:
    """Drops a field with a value that asks for nothing, and refuses it with any other; if `beside` is given, where the
    route knows that field: elsewhere it is any unknown field."""

    def mend(name: str, tree: dict[str, object], route: Route) -> None:
        if beside is not None and beside not in route.fields:
            return
        value = tree.pop(name)
        if value is not None and value not in harmless:
            raise InvalidRequest(f"{name}: {why}", field=name)

    return mend


def _best_of(name: str, tree: dict[str, object], route: Route) -> None:
    value = tree.pop(name)
    if value not in (None, 1, tree.get("n") or 1):
        raise InvalidRequest(f"{name}: as many answers are made as n says, and none is left out", field=name)


def _max_completion_tokens(name: str, tree: dict[str, object], route: Route) -> None:
    target = next((each for each in ("max_tokens", "max_output_tokens") if each in route.fields), None)
    value = tree.pop(name)
    if target is not None and tree.get(target) is None and value is not None:
        tree[target] = value


def _modalities(name: str, tree: dict[str, object], route: Route) -> None:
    value = tree.pop(name)
    if value is not None and value != ["text"]:
        raise InvalidRequest(f"{name}: answers are text alone", field=name)


_UNKNOWN: Mapping[str, _Mend] = {
    "best_of": _best_of,
    "max_completion_tokens": _max_completion_tokens,
    "modalities": _modalities,
    "audio": _drop_if(why="answers are text alone"),
    "functions": _drop_if([], why="write them as tools"),
    "function_call": _drop_if("none", "auto", why="write it as tool_choice"),
    "logits_processors": _drop_if([], why="code of a client is not run here"),
    "early_stopping": _drop_if(False, why="it belongs to a beam search that stops otherwise here"),
    "web_search_options": _drop_if({}, why="there is no search of the web here"),
    "conversation": _drop_if(
        why="conversations are not kept here; send what was said before as input", beside="previous_response_id"
    ),
    "mcp_servers": _drop_if([], why="no MCP server is asked from here; send tools as tools", beside="stop_sequences"),
    "container": _drop_if(why="no containers are run here", beside="stop_sequences"),
}
"""Fields that vLLM or OpenAI has or had, and that would change the answer, where the route does not take them."""


def with_null_usage(frame: bytes) -> bytes:
    """A server-sent event with a chunk that has no usage, with null for it."""
    if not frame.startswith(b"data: {") or b'"choices":' not in frame or b'"usage":' in frame:
        return frame
    end = frame.rfind(b"}")
    return frame[:end] + NULL_USAGE + frame[end:]


def mender_of(
    app: FastAPI, backend: str, template: str | None, strict: bool = False, transfers: bool = False
) -> Mender:
    """The mender for the routes of vLLM's app.

    Args:
        app: vLLM's.
        backend: of structured outputs.
        template: the text of the chat templates; None where messages are rendered without one.
        strict, transfers: see `Mender`.
    """
    from pydantic import BaseModel

    routes: dict[str, Route] = {}
    for route in app.routes:
        body = getattr(route, "body_field", None)
        if body is None or "POST" not in (getattr(route, "methods", None) or ()):
            continue
        found = _models(body.field_info.annotation)
        models = [model for model in found if isinstance(model, type) and issubclass(model, BaseModel)]
        if models:
            routes[getattr(route, "path", "")] = _route(models)
    responses = getattr(app.state, "openai_serving_responses", None)
    has_tools = getattr(responses, "tool_server", None) is not None
    return Mender(routes, backend, template is None or "developer" in template, strict, has_tools, transfers)


def _models(annotation: object) -> list[object]:
    """The members of a union, or the one type that it is."""
    if get_origin(annotation) is Annotated:
        return _models(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [model for each in get_args(annotation) for model in _models(each)]
    return [annotation]


def _route(models: list[type[BaseModel]]) -> Route:
    fields: set[str] = set()
    not_null: set[str] = set()
    for model in models:
        answer = _answer_of(model)
        for name, field in model.model_fields.items():
            names = {name, field.alias or name}
            fields |= names
            if field.is_required():
                continue
            shown = answer.model_fields.get(name) if answer is not None else None
            if not _takes_null(field.annotation) or (shown is not None and not _takes_null(shown.annotation)):
                not_null |= names
    return Route(frozenset(fields), frozenset(not_null))


def _answer_of(model: type[BaseModel]) -> type[BaseModel] | None:
    """The model of an answer that repeats fields of its request, which then have to fit it."""
    if model.__name__ != "ResponsesRequest":
        return None
    from vllm.entrypoints.openai.responses.protocol import ResponsesResponse

    answer: type[BaseModel] = ResponsesResponse
    return answer


def _takes_null(annotation: object) -> bool:
    return annotation is Any or any(member in (None, type(None), Any) for member in _models(annotation))
