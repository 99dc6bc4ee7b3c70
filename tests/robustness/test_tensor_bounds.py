"""Tensors are counted before they are decoded, and what can't be used is the client's fault, whatever it is."""

from __future__ import annotations

import asyncio
import json
import struct
from typing import Any

import numpy as np
import pytest

from kserve_vllm.core.errors import BodyTooLarge, InvalidRequest, RequestError
from kserve_vllm.protocols.oip import generate, protobuf, tensors
from kserve_vllm.protocols.oip.grpc_servicer import Messages, Servicer
from kserve_vllm.protocols.oip.text import V2Text

MESSAGES = Messages()
DIGITS = "9" * 5000


class Engine:
    """A model that generates, of which nothing is asked: requests of these tests end before it."""

    generates, embeds, classifies, prioritizes = True, False, False, False


TEXT = V2Text(Engine(), 512)  # type: ignore[arg-type]


def rest(tree: Any, *raw: bytes) -> Any:
    head = json.dumps(tree).encode()
    return tensors.parse_rest(head + b"".join(raw), str(len(head)) if raw else None, "m", None)


def one(name: str, datatype: str, shape: list[int], data: Any = None, raw: bytes | None = None) -> Any:
    item: dict[str, Any] = {"name": name, "datatype": datatype, "shape": shape}
    if raw is None:
        return rest({"inputs": [{**item, "data": data}]})
    return rest({"inputs": [{**item, "parameters": {"binary_data_size": len(raw)}}]}, raw)


def refused(error: type[RequestError], call: Any, *args: Any) -> str:
    with pytest.raises(error) as caught:
        call(*args)
    return caught.value.message


@pytest.fixture
def nothing_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where elements are read one by one, which is what costs time."""

    def read(*_: Any) -> Any:
        raise AssertionError("elements were decoded before they were counted")

    for name in ("_decode_raw", "_decode_list"):
        monkeypatch.setattr(tensors, name, read)


@pytest.mark.usefixtures("nothing_decoded")
@pytest.mark.parametrize(
    "request_",
    [
        one("text_input", "BYTES", [513], raw=struct.pack("<I", 0) * 513),
        one("text_input", "BYTES", [10_000_000], raw=b""),
        one("text_input", "BYTES", [513], data=[""] * 513),
        one("text_input", "BYTES", [2**31 - 1] * 8, data=[]),
        one("input_ids", "INT64", [513, 1], data=[1] * 513),
        one("input_ids", "INT64", [1, tensors.MAX_ELEMENTS + 1], raw=bytes(8)),
        one("input_ids", "INT32", [2**31 - 1, 0], data=[]),
    ],
    ids=lambda r: f"{r.inputs[0].name}-{r.inputs[0].shape}",
)
def test_elements_are_counted_by_the_shape(request_: Any) -> None:
    refused(InvalidRequest, TEXT.parse, request_)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_elements_beyond_the_shape_are_not_read(count: int) -> None:
    """The raw form tells its number of elements nowhere but in the shape."""
    raw = b"".join(struct.pack("<I", 1) + b"x" for _ in range(100_000))
    (tensor,) = one("x", "BYTES", [count], raw=raw).inputs
    assert "more elements than its shape" in refused(InvalidRequest, tensors.decode, tensor)
    (tensor,) = one("x", "INT32", [count], raw=bytes(400_000)).inputs
    assert "its shape" in refused(InvalidRequest, tensors.decode, tensor)


def test_what_is_within_the_bounds_is_read() -> None:
    (tensor,) = one("x", "INT32", [2, 3], raw=np.arange(6, dtype="<i4").tobytes()).inputs
    assert tensors.decode(tensor).tolist() == [[0, 1, 2], [3, 4, 5]]
    (tensor,) = one("x", "BYTES", [2], raw=struct.pack("<I", 1) + b"a" + struct.pack("<I", 0)).inputs
    assert tensors.decode(tensor).tolist() == [b"a", b""]
    assert len(TEXT.parse(one("text_input", "BYTES", [512], data=["x"] * 512)).prompts) == 512


@pytest.mark.parametrize(
    ("tree", "sentence"),
    [
        ({"inputs": [{}] * 65}, "inputs has 65 entries"),
        ({"inputs": [], "outputs": [{"name": "x"}] * 65}, "outputs has 65 entries"),
        ({"inputs": [], "parameters": {str(i): i for i in range(257)}}, "more than 256"),
    ],
)
def test_parts_of_a_request_are_counted(tree: Any, sentence: str) -> None:
    assert sentence in refused(InvalidRequest, rest, tree)


@pytest.mark.parametrize("part", [b",", b"[", b'{"":'])
def test_json_is_counted_before_it_is_parsed(monkeypatch: pytest.MonkeyPatch, part: bytes) -> None:
    monkeypatch.setattr(tensors, "orjson", None)
    assert "values" in refused(InvalidRequest, tensors.parse_json_object, part * (tensors.MAX_JSON_VALUES + 1))
    assert "32 MiB" in refused(BodyTooLarge, tensors.parse_json_object, b" " * (tensors.MAX_JSON + 1))


@pytest.mark.parametrize("length", [DIGITS, "9" * 20, "-1", "1e3", "²", "", " 1"])
def test_a_header_length_that_is_none_is_refused(length: str) -> None:
    assert "Inference-Header" in refused(InvalidRequest, tensors.parse_rest, b"{}", length, "m", None)


# gRPC


def message(**fields: Any) -> Any:
    return MESSAGES.ModelInferRequest(model_name="m", **fields)


def deserialize(data: bytes) -> Any:
    """As the service does it: what is refused is handed on as the error."""
    handler = Servicer(None, None, None).handler()  # type: ignore[arg-type]
    details: Any = type("Details", (), {"method": "/inference.GRPCInferenceService/ModelInfer"})
    return handler.service(details).request_deserializer(data)


LARGE = protobuf.MAX_FIELDS * 2 + 1


@pytest.mark.parametrize(
    "data",
    [
        b"\x2a\x00" * LARGE,
        b"\x3a\x00" * LARGE,
        b"\x22\x00" * LARGE,
        b"\x78\x01" * LARGE,
        message(inputs=[{"contents": {"bytes_contents": [b""] * LARGE}}]).SerializeToString(),
        message(inputs=[{"contents": {"bool_contents": [True] * (protobuf.MAX_PACKED + 1)}}]).SerializeToString(),
        b"\x2b" * LARGE,
        # The elements of one tensor, in many messages that are put together as one.
        b"".join(b"\x2a\x04\x2a\x02\x42\x00" for _ in range(LARGE)),
        b"\x2a\x03\x2a\x01" * LARGE,
    ],
    ids=["inputs", "raw", "parameters", "unknown", "elements", "packed", "groups", "pieces", "malformed"],
)
def test_fields_of_a_message_are_counted_before_it_is_parsed(data: bytes) -> None:
    assert isinstance(deserialize(data), InvalidRequest)


@pytest.mark.parametrize(
    "sent",
    [
        message(inputs=[{"name": "x", "contents": {"bytes_contents": [b"a"] * 60_000}}]),
        message(inputs=[{"name": "x"}], raw_input_contents=[bytes(3 << 20)]),
        message(inputs=[{"name": "x", "contents": {"int64_contents": range(200_000)}}]),
        message(id="x" * 1_000_000),
    ],
    ids=["texts", "raw", "numbers", "text"],
)
def test_large_messages_within_the_bounds_are_parsed(sent: Any) -> None:
    data = sent.SerializeToString()
    assert deserialize(data).ByteSize() == len(data)


@pytest.mark.parametrize("cut", [1, 2, 3, 200_001])
def test_a_large_message_that_is_cut_off_is_left_to_the_parser(cut: int) -> None:
    data = message(inputs=[{"name": "x"}], raw_input_contents=[bytes(400_000)]).SerializeToString()
    assert isinstance(deserialize(data[:-cut]), Exception)


@pytest.mark.parametrize(
    "sent",
    [
        message(inputs=[{"name": str(i)} for i in range(65)]),
        message(outputs=[{"name": str(i)} for i in range(65)]),
        message(inputs=[{"name": "x", "datatype": "INT64", "shape": [1] * 1000, "contents": {"int64_contents": [1]}}]),
        message(inputs=[{"name": "x", "datatype": "BYTES", "contents": {"bytes_contents": [b""] * 65_537}}]),
        message(parameters={str(i): {"int64_param": i} for i in range(257)}),
        message(inputs=[{"name": "x", "parameters": {str(i): {"int64_param": i} for i in range(257)}}]),
    ],
    ids=["inputs", "outputs", "shape", "texts", "parameters", "input parameters"],
)
def test_parts_of_a_message_are_counted(sent: Any) -> None:
    refused(InvalidRequest, tensors.from_grpc, sent)


# What Python's parsers refuse in their own words


@pytest.mark.parametrize(
    "options", [f'{{"seed": {DIGITS}}}', f"[{DIGITS}]", DIGITS, "[" * 50_000, '{"seed": 1e999999}x']
)
def test_sampling_parameters_that_are_no_object_are_refused(options: str) -> None:
    request = rest(
        {
            "inputs": [
                {"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["x"]},
                {"name": "sampling_parameters", "datatype": "BYTES", "shape": [1], "data": [options]},
            ]
        }
    )
    assert "sampling_parameters" in refused(InvalidRequest, TEXT.parse, request)


@pytest.mark.parametrize("name", ["logit_bias", "stop_token_ids", "structured_outputs", "response_format", "bad_words"])
@pytest.mark.parametrize("value", [f'{{"a": {DIGITS}}}', f"[{DIGITS}]", "[" * 50_000, "{not json"])
def test_options_in_json_that_can_not_be_read_are_refused(name: str, value: str) -> None:
    request = rest(
        {
            "inputs": [{"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["x"]}],
            "parameters": {name: value},
        }
    )
    assert name in refused(InvalidRequest, TEXT.parse, request)


def test_sampling_parameters_nested_without_end_are_refused() -> None:
    deep: Any = 1
    for _ in range(3000):
        deep = [deep]
    tree = {"text_input": "x", "sampling_parameters": deep}
    assert "nested" in refused(InvalidRequest, generate.to_request, tree, "m", None, False)


@pytest.mark.parametrize("value", [[[[1]]], "x", None, {"a": 1}, 1.5, True])
def test_a_value_of_another_type_is_named(value: Any) -> None:
    (tensor,) = one("x", "INT32", [1], data=[value]).inputs
    refused(InvalidRequest, tensors.decode, tensor)


def test_half_a_surrogate_pair_in_an_error_is_answered() -> None:
    error = InvalidRequest("no \ud800 such", field="\udfff")
    assert error.message.encode() == b"no ? such"
    assert error.field == "?"
    answer = MESSAGES.ModelStreamInferResponse(error_message=error.message)
    assert answer.SerializeToString()


def test_a_stream_goes_on_after_a_message_that_is_too_much() -> None:
    """The refusal has no id to answer with; that must not end the other requests of the stream."""
    from kserve_vllm.core.lifecycle import Lifecycle, State
    from kserve_vllm.policy.enforcement import Enforcement
    from tests.accounting import recorder

    lifecycle = Lifecycle()
    for state in (State.LOADING, State.WARMING, State.READY):
        lifecycle.to(state)
    servicer = Servicer(lifecycle, Enforcement(lifecycle), recorder(lifecycle))
    answers: list[Any] = []
    asyncio.run(servicer.answer_one(InvalidRequest("more than is taken"), answers.append, {"x-request-id": "r"}))
    assert answers[0].error_message == "more than is taken"
