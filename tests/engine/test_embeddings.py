"""An embedding model, over V2, V1 and OpenAI's API. The demo model serves as one, on an engine of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import openai
import pytest

from kserve_vllm.config import demo
from tests.clients import assert_unharmed, infer, post, tensor
from tests.support import Server
from tests.triton import service_pb2, service_pb2_grpc

TEXTS = ["What is 17 + 25?", "Repeat the word apple.", "Überraschung"]


@pytest.fixture(scope="module")
def pooling() -> Iterator[Server]:
    arguments = [
        str(demo.folder()),
        "--model-name",
        "demo",
        "--runner",
        "pooling",
        "--convert",
        "embed",
        "--enforce-eager",
        "--max-model-len",
        "512",
    ]
    running = Server(arguments)
    try:
        yield running.wait_ready()
        assert_unharmed(running)
    finally:
        running.stop()


@pytest.fixture
def client(pooling: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=pooling.url + "/openai/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def expected(client: openai.OpenAI) -> np.ndarray[Any, Any]:
    """What OpenAI's API answers, shape [texts, dimensions]."""
    answer = client.embeddings.create(model="demo", input=TEXTS, encoding_format="float")
    return np.array([row.embedding for row in answer.data], dtype=np.float32)


def test_the_embeddings_are_unit_vectors_that_differ(expected: np.ndarray[Any, Any]) -> None:
    assert len(expected) == len(TEXTS)
    assert np.linalg.norm(expected, axis=1) == pytest.approx(1.0, abs=1e-3)
    assert np.abs(expected[0] - expected[1]).max() > 1e-3


def test_v2_rest_gives_the_same_embeddings(pooling: Server, expected: np.ndarray[Any, Any]) -> None:
    (output,) = infer(pooling, {"inputs": [tensor("text_input", TEXTS)]})["outputs"]
    assert (output["name"], output["datatype"], output["shape"]) == ("embedding", "FP32", list(expected.shape))
    assert np.reshape(output["data"], expected.shape) == pytest.approx(expected, abs=2e-2)


@pytest.mark.parametrize("raw", [True, False])
def test_v2_grpc_gives_the_same_embeddings(pooling: Server, expected: np.ndarray[Any, Any], raw: bool) -> None:
    request = service_pb2.ModelInferRequest(model_name="demo")
    item = request.inputs.add(name="text_input", datatype="BYTES", shape=[len(TEXTS)])
    data = [text.encode() for text in TEXTS]
    if raw:
        request.raw_input_contents.append(b"".join(len(text).to_bytes(4, "little") + text for text in data))
    else:
        item.contents.bytes_contents.extend(data)
    with grpc.insecure_channel(pooling.grpc_address) as channel:
        answer = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request)
        request.parameters["stream"].bool_param = True
        (refused,) = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer(iter([request]))
    (output,) = answer.outputs
    assert (output.name, output.datatype, list(output.shape)) == ("embedding", "FP32", list(expected.shape))
    found = np.frombuffer(answer.raw_output_contents[0], "<f4") if raw else output.contents.fp32_contents
    assert np.reshape(found, expected.shape) == pytest.approx(expected, abs=2e-2)
    assert "does not generate text" in refused.error_message


def test_v1_gives_the_same_embeddings(pooling: Server, expected: np.ndarray[Any, Any]) -> None:
    answer = post(pooling, "/v1/models/demo:predict", {"instances": TEXTS})
    assert answer.status_code == 200, answer.text
    assert np.array(answer.json()["predictions"]) == pytest.approx(expected, abs=2e-2)


def test_the_metadata_name_the_tensors_of_an_embedding_model(pooling: Server) -> None:
    about = pooling.health("/v2/models/demo")
    assert {row["name"] for row in about["inputs"]} == {"text_input", "query", "documents"}
    assert about["outputs"][0] == {"name": "embedding", "datatype": "FP32", "shape": [-1, -1]}


@pytest.mark.parametrize("queries", [TEXTS[:1], [TEXTS[0]] * 2])
def test_a_query_and_documents_give_scores(pooling: Server, queries: list[str]) -> None:
    documents = [TEXTS[0], TEXTS[1]]
    body = {"inputs": [tensor("query", queries), tensor("documents", documents)]}
    (output,) = infer(pooling, body)["outputs"]
    assert (output["name"], output["datatype"], output["shape"]) == ("scores", "FP32", [2])
    theirs = post(pooling, "/score", {"model": "demo", "text_1": TEXTS[0], "text_2": documents}).json()["data"]
    assert output["data"] == pytest.approx([row["score"] for row in theirs], abs=2e-2)
    same, other = output["data"]
    assert same == pytest.approx(1.0, abs=2e-2)
    assert other < same


def test_rerank_puts_the_nearest_document_first(pooling: Server) -> None:
    body = {"model": "demo", "query": TEXTS[1], "documents": TEXTS}
    for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
        answer = post(pooling, path, body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["results"][0]["index"] == 1


@pytest.mark.parametrize(
    ("path", "body", "word"),
    [
        ("/v2/models/demo/infer", {"inputs": [tensor("documents", ["a"])]}, "query"),
        ("/v2/models/demo/infer", {"inputs": [tensor("query", ["a", "b"]), tensor("documents", ["a"])]}, "query"),
        ("/v2/models/demo/infer", {"inputs": [tensor("text_input", [1], "INT64")]}, "BYTES"),
        ("/v2/models/demo/infer", {"inputs": [tensor("text_input", ["word " * 600])]}, "512"),
        ("/v2/models/demo/infer", {"inputs": [tensor("text_input", ["a"])], "parameters": {"nope": 1}}, "nope"),
        ("/v2/models/demo/infer", {"inputs": [tensor("text_input", ["a"])], "parameters": {"input": 1}}, "input"),
        ("/v2/models/demo/infer", {"inputs": [tensor("text_input", ["a"])], "parameters": {"dimensions": 0}}, ""),
        ("/v2/models/demo/generate", {"text_input": "a"}, "does not generate text"),
        ("/v1/models/demo:predict", {"instances": [{"prompt": "a"}]}, "instances"),
        ("/v1/models/demo:predict", {"instances": ["word " * 600]}, "512"),
    ],
)
def test_what_is_wrong_is_named(pooling: Server, path: str, body: dict[str, Any], word: str) -> None:
    answer = post(pooling, path, body)
    assert answer.status_code == 400, answer.text
    assert word in answer.json()["error"]
