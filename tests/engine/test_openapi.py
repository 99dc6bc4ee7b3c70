"""One OpenAPI document of everything that is served."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.support import Server


@pytest.fixture
def document(server: Server) -> dict[str, Any]:
    tree: dict[str, Any] = httpx.get(server.url + "/openapi.json").raise_for_status().json()
    return tree


@pytest.mark.parametrize(
    ("path", "method"),
    [
        ("/v1/chat/completions", "post"),
        ("/v1/completions", "post"),
        ("/v1/responses", "post"),
        ("/v1/messages", "post"),
        ("/tokenize", "post"),
        ("/v2", "get"),
        ("/v2/health/ready", "get"),
        ("/v2/models/{model_name}", "get"),
        ("/v2/models/{model_name}/infer", "post"),
        ("/v2/models/{model_name}/versions/{model_version}/infer", "post"),
        ("/v2/models/{model_name}/generate", "post"),
        ("/v2/models/{model_name}/generate_stream", "post"),
        ("/v2/repository/index", "post"),
        ("/v2/repository/models/{model_name}/load", "post"),
        ("/v1/models", "get"),
        ("/v1/models/{model_name}", "get"),
        ("/v1/models/{model_name}:predict", "post"),
        ("/metrics", "get"),
    ],
)
def test_one_document_holds_every_protocol(document: dict[str, Any], path: str, method: str) -> None:
    assert method in document["paths"][path]


def test_the_route_that_rescales_the_engine_is_not_served(document: dict[str, Any], server: Server) -> None:
    assert not [path for path in document["paths"] if "elastic" in path]
    answer = httpx.post(server.url + "/scale_elastic_ep", json={"new_data_parallel_size": 2})
    assert answer.status_code == 404


def test_every_reference_in_the_document_leads_somewhere(document: dict[str, Any]) -> None:
    def references(node: Any) -> set[str]:
        if isinstance(node, dict):
            own = {node["$ref"]} if isinstance(node.get("$ref"), str) else set()
            return own.union(*map(references, node.values())) if node else own
        return set().union(*map(references, node)) if isinstance(node, list) else set()

    found = references(document)
    assert found
    for reference in found:
        node: Any = document
        for part in reference.removeprefix("#/").split("/"):
            assert part in node, reference
            node = node[part]


def test_docs_are_a_page(server: Server) -> None:
    page = httpx.get(server.url + "/docs")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    assert "/openapi.json" in page.text
