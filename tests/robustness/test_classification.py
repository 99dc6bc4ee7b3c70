"""What a request counts as is decided once, for the route that answers it, and no spelling of a path changes it."""

from __future__ import annotations

import asyncio
import importlib
import pkgutil
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote

import httpx
import pytest
from fastapi import APIRouter, FastAPI
from starlette.exceptions import HTTPException

from kserve_vllm.core.errors import MethodNotAllowed, NotFound
from kserve_vllm.policy.enforcement import Kind
from kserve_vllm.protocols.http.endpoints import NOT_SERVED, Endpoints, Target, choose, kind_of, normalize, templates

ANSWERED_BEFORE = {"/metrics", "/health", "/ping", "/version"}
CHAT = "/v1/chat/completions"


def vllm_routers() -> Iterator[Any]:
    """Every router that the installed vLLM could put into its app, whatever its flags."""
    entrypoints = importlib.import_module("vllm.entrypoints")
    for module in pkgutil.walk_packages(entrypoints.__path__, "vllm.entrypoints."):
        if module.name.endswith("api_router") or ".instrumentator." in module.name:
            loaded = importlib.import_module(module.name)
            yield from {id(each): each for each in vars(loaded).values() if isinstance(each, APIRouter)}.values()


@pytest.fixture(scope="module")
def apps() -> tuple[FastAPI, FastAPI]:
    """Our app and one with all of vLLM's routes."""
    from vllm.entrypoints.launchers.app import build_app as build_vllm_app

    from kserve_vllm.config.demo import folder
    from kserve_vllm.engine.arguments import parse_engine_args
    from kserve_vllm.protocols.batch.routes import BatchRoutes
    from kserve_vllm.protocols.http.routes import Routes, build_app

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_SERVER_DEV_MODE", "1")
        patch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
        args = parse_engine_args(["--model", str(folder()), "--enable-lora"])
        vllm = build_vllm_app(args, ("generate", "transcription", "realtime", "render"), None)  # type: ignore[arg-type]
    assert {"/v1/load_lora_adapter", "/sleep", "/invocations"} <= {path for _, path in templates(vllm.routes)}
    for router in vllm_routers():
        vllm.include_router(router)
    engine: Any = SimpleNamespace(app=vllm, adapters=None)
    nothing: Any = None
    routes = Routes(nothing, nothing, engine, nothing, nothing, dict, nothing)
    batches = BatchRoutes(None, None, lambda path: True)
    return build_app(routes, engine, "0", batches.router()), vllm


@pytest.fixture(scope="module")
def endpoints(apps: tuple[FastAPI, FastAPI]) -> Endpoints:
    return Endpoints(*apps)


def filled(template: str) -> str:
    """A path of a route."""
    for name, value in {
        "model_name": "demo",
        "model_version": "1",
        "response_id": "r",
        "name": "a",
        "adapter_name": "a",
        "path": "",
        "file_id": "f",
        "batch_id": "b",
    }.items():
        template = template.replace("{" + name + "}", value)
    assert "{" not in template, template
    return template


def all_routes(apps: tuple[FastAPI, FastAPI]) -> list[tuple[str, str]]:
    return sorted({row for app in apps for row in templates(app.routes)})


def asked(endpoints: Endpoints, method: str, raw_path: str) -> Target:
    """What the edge makes of a path as it stands in a request's first line."""
    scope: dict[str, Any] = {"path": unquote(raw_path), "raw_path": raw_path.encode()}
    try:
        return endpoints.find(method, normalize(scope))
    except NotFound:
        return Target()


def test_every_route_is_classified_on_purpose(apps: tuple[FastAPI, FastAPI]) -> None:
    rows = all_routes(apps)
    assert len(rows) > 80
    unknown = [
        (method, template)
        for method, template in rows
        if template not in NOT_SERVED and method != "HEAD" and kind_of(method, template) is None
    ]
    assert not unknown, "a route that no row of `protocol.endpoints` names is not served; say what it is"


def test_what_the_table_does_not_know_is_not_served() -> None:
    app = FastAPI()

    @app.post("/v1/new/generate")
    async def generate() -> str:
        return "unlimited"

    for method in ("POST", "GET", "WEBSOCKET"):
        assert Endpoints(app).find(method, "/v1/new/generate").refusal is NotFound


# Each row: what is done to a path that stands in a request's first line.
VARIANTS = {
    "as it is": lambda path: path,
    "line feed at the end (RFC 9112, 3: no control characters)": lambda path: path + "%0A",
    "carriage return at the end": lambda path: path + "%0D",
    "both": lambda path: path + "%0D%0A",
    "zero at the end": lambda path: path + "%00",
    "tab in the middle": lambda path: path.replace("/", "/%09", 1),
    "next line (U+0085) at the end": lambda path: path + "%C2%85",
    "slash at the end": lambda path: path + "/",
    "two slashes at the end": lambda path: path + "//",
    "slash and line feed at the end": lambda path: path + "/%0A",
    "doubled first slash": lambda path: "/" + path,
    "doubled last slash": lambda path: "//".join(path.rsplit("/", 1)),
    "encoded last slash": lambda path: "%2F".join(path.rsplit("/", 1)),
    "encoded last slash, small": lambda path: "%2f".join(path.rsplit("/", 1)),
    "encoded twice": lambda path: "%252F".join(path.rsplit("/", 1)),
    "backslash": lambda path: "%5C".join(path.rsplit("/", 1)),
    "one dot (RFC 3986, 5.2.4)": lambda path: "/." + path,
    "one dot at the end": lambda path: path + "/.",
    "two dots": lambda path: "/x/.." + path,
    "two dots, encoded": lambda path: "/x/%2E%2E" + path,
    "two dots at the end": lambda path: path + "/x/..",
    "capitals": lambda path: path.upper(),
    "one capital": lambda path: path[:1] + path[1:2].upper() + path[2:],
    "encoded letter (RFC 3986, 2.3: the same path)": lambda path: path[:-1] + f"%{ord(path[-1]):02X}",
    "semicolon": lambda path: path + ";x=1",
    "below /openai": lambda path: "/openai" + path,
    "below /openai twice": lambda path: "/openai/openai" + path,
    "below /OPENAI": lambda path: "/OPENAI" + path,
    "below /openai/, doubled": lambda path: "/openai/" + path,
    "below /openai, with a line feed": lambda path: "/openai" + path + "%0A",
    "not UTF-8": lambda path: path + "%FF",
    "space at the end": lambda path: path + "%20",
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_spelling_of_a_path_makes_its_class_weaker(
    apps: tuple[FastAPI, FastAPI], endpoints: Endpoints, variant: str
) -> None:
    weaker = []
    for method, template in all_routes(apps):
        path = filled(template)
        plain, found = asked(endpoints, method, path), asked(endpoints, method, VARIANTS[variant](path))
        refused = found.kind is None
        # A name may hold nearly anything: the spelling then names another model, in a request of the same class.
        same = found.kind is plain.kind and found.method == plain.method
        if not refused and not same:
            weaker.append((method, path, plain.kind, found.kind))
    assert not weaker


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_websocket_is_work_or_refused(endpoints: Endpoints, variant: str) -> None:
    for path in ("/v1/realtime", CHAT, "/v1/responses", "/v2/models/demo/infer", "/sleep", "/v1/models"):
        found = asked(endpoints, "WEBSOCKET", VARIANTS[variant](path))
        assert found.kind is (Kind.WORK if found.endpoint == "/v1/realtime" else None)


def test_a_route_answers_nothing_that_was_not_decided_for_it(apps: tuple[FastAPI, FastAPI]) -> None:
    Endpoints(*apps)

    async def ask(app: Any, route: Any, scope: dict[str, Any]) -> str:
        try:
            await route.handle(scope, None, None)
        except HTTPException as error:
            return str(error.status_code)
        except Exception as error:
            return type(error).__name__
        return "answered"

    for app in apps:
        for route in app.routes:
            if "WebSocket" in type(route).__name__:
                continue
            scope = {"type": "http", "method": "POST", "path": "/", "app": app, "headers": [], "path_params": {}}
            other = choose(scope, Target(route=app.routes[0] if route is not app.routes[0] else None))
            for each in (scope, dict(other)):
                assert asyncio.run(ask(app, route, each)) == "404", route


def test_a_wrong_method_is_told_the_right_ones(endpoints: Endpoints) -> None:
    for method, path, allow in (
        ("GET", CHAT, ("POST",)),
        ("PUT", "/v1/models", ("GET", "HEAD")),
        ("POST", "/v1/models", ("GET", "HEAD")),
        ("POST", "/v1/responses/resp_1", ("GET", "HEAD")),
        ("DELETE", "/v2/models/org/demo/infer", ("POST",)),
        ("GET", "/v1/models/demo:predict", ("POST",)),
        ("DELETE", "/v2", ("GET", "HEAD")),
        ("PATCH", "/v1/adapters/a", ("DELETE", "GET", "HEAD")),
        ("GET", "/v2/repository/index", ("POST",)),
        ("OPTIONS", CHAT, ("POST",)),
    ):
        found = endpoints.find(method, path)
        assert (found.refusal, found.allow) == (MethodNotAllowed, allow), (method, path)


@pytest.mark.parametrize(
    "path",
    [
        "/v2/nope",
        "/v1/nope",
        "/v1/responses/compact",
        "/v1/responses/input_tokens",
        "/nope",
        "/openai/v2",
        "/V1/models",
        "/metrics/x",
        "/redoc",
    ],
)
def test_an_unknown_path_is_not_found(endpoints: Endpoints, path: str) -> None:
    for method in ("GET", "POST", "PUT", "WEBSOCKET"):
        assert asked(endpoints, method, path).refusal is NotFound


def test_a_head_is_answered_where_a_get_is(apps: tuple[FastAPI, FastAPI], endpoints: Endpoints) -> None:
    for method, template in all_routes(apps):
        if method == "GET" and kind_of(method, template) is not None:
            assert endpoints.find("HEAD", filled(template)).kind is endpoints.find("GET", filled(template)).kind


@pytest.mark.parametrize(
    ("raw_path", "path"),
    [
        ("/v2/", "/v2"),
        ("/v2/models/org%2Fdemo/infer", "/v2/models/org/demo/infer"),
        ("/v2/models/org%2fdemo/infer/", "/v2/models/org/demo/infer"),
        ("/openai/v1/chat/completions", CHAT),
        ("/openai/v1/chat/completions/", CHAT),
        ("/v1/models/org%2Fdemo:predict", "/v1/models/org/demo:predict"),
    ],
)
def test_a_path_is_written_in_one_form(raw_path: str, path: str) -> None:
    scope: dict[str, Any] = {"path": unquote(raw_path), "raw_path": raw_path.encode()}
    assert normalize(scope) == scope["path"] == path


def test_the_description_is_made_beside_the_loop() -> None:
    """It takes more than a second, which would hold up every other request, probes included."""
    from kserve_vllm.protocols.http.routes import Routes, build_app

    vllm, made_in = FastAPI(), []
    own = vllm.openapi

    def described() -> dict[str, Any]:
        made_in.append(threading.current_thread())
        return own()

    vllm.openapi = described  # type: ignore[method-assign]
    engine: Any = SimpleNamespace(app=vllm, adapters=None)
    nothing: Any = None
    app = build_app(Routes(nothing, nothing, engine, nothing, nothing, dict, nothing), engine, "0")

    async def ask() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            return await asyncio.gather(*[client.get("/openapi.json") for _ in range(3)])

    for answer in asyncio.run(ask()):
        assert "/v2/models/{model_name}/infer" in answer.json()["paths"]
    assert len(made_in) == 1
    assert made_in[0] is not threading.main_thread()
