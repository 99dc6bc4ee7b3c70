"""Tensors of V2 survive every way over the wire, and no input makes their parser fail unforeseen."""

from __future__ import annotations

import contextlib
import json
import math
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from kserve.protocol.infer_type import InferRequest, InferResponse, RequestedOutput

from kserve_vllm.core.errors import InvalidRequest
from kserve_vllm.protocols.oip import generate, tensors
from kserve_vllm.protocols.oip.grpc_servicer import Messages

MESSAGES = Messages()
PLAIN = [name for name in tensors.DTYPES if name != "BYTES"]

bounded = settings(deadline=None, max_examples=150, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def shapes(max_size: int = 12) -> st.SearchStrategy[tuple[int, ...]]:
    return arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4).filter(
        lambda shape: math.prod(shape) <= max_size
    )


@st.composite
def tensor(draw: st.DrawFn) -> tuple[str, np.ndarray[Any, Any]]:
    """A datatype and an array of it; BYTES hold UTF-8."""
    datatype = draw(st.sampled_from(list(tensors.DTYPES)))
    shape = draw(shapes())
    if datatype == "BYTES":
        items = draw(st.lists(st.text(max_size=6), min_size=math.prod(shape), max_size=math.prod(shape)))
        array = np.empty(len(items), dtype=object)
        array[:] = [item.encode() for item in items]
        return datatype, array.reshape(shape)
    dtype = tensors.DTYPES[datatype]
    elements = {"allow_nan": False, "allow_infinity": False} if dtype.kind == "f" else None
    return datatype, draw(arrays.arrays(dtype, shape, elements=elements))


def decoded(request: InferRequest) -> np.ndarray[Any, Any]:
    (found,) = request.inputs
    return tensors.decode(found)


def same(found: np.ndarray[Any, Any], array: np.ndarray[Any, Any]) -> None:
    assert found.shape == array.shape
    assert found.dtype == array.dtype
    assert found.tolist() == array.tolist()


def json_values(array: np.ndarray[Any, Any], nested: bool) -> Any:
    values = array.tolist() if nested and array.ndim else array.reshape(-1).tolist()
    return json.loads(json.dumps(values, default=lambda value: value.decode()))


@bounded
@given(tensor(), st.booleans())
def test_json_is_read_as_it_was_written(case: tuple[str, np.ndarray[Any, Any]], nested: bool) -> None:
    datatype, array = case
    item = {"name": "x", "datatype": datatype, "shape": list(array.shape), "data": json_values(array, nested)}
    same(decoded(tensors.parse_rest(orjson.dumps({"inputs": [item]}), None, "m", None)), array)


@bounded
@given(tensor(), tensor())
def test_an_answer_is_read_back_as_a_request(
    case: tuple[str, np.ndarray[Any, Any]], other: tuple[str, np.ndarray[Any, Any]]
) -> None:
    outputs = [
        tensors.output(name, datatype, array.reshape(-1), array.shape)
        for name, (datatype, array) in (("a", case), ("b", other))
    ]
    binary_of_a = RequestedOutput("a", {"binary_data": True})
    for wish in (
        InferRequest("m", []),
        InferRequest("m", [], parameters={"binary_data_output": True}),
        InferRequest("m", [], request_outputs=[binary_of_a, RequestedOutput("b")]),
    ):
        body, header_length = tensors.encode_rest(InferResponse("", "m", outputs), wish)
        cut = len(body) if header_length is None else header_length
        tree = json.loads(body[:cut])
        head = orjson.dumps({"inputs": tree["outputs"]})
        back = tensors.parse_rest(head + body[cut:], str(len(head)), "m", None)
        for found, (_, array) in zip(back.inputs, (case, other), strict=True):
            same(tensors.decode(found), array)


@bounded
@given(tensor(), st.booleans())
def test_grpc_is_read_as_it_was_written(case: tuple[str, np.ndarray[Any, Any]], raw: bool) -> None:
    datatype, array = case
    raw = raw or datatype not in tensors.CONTENTS_FIELD
    output = tensors.output("x", datatype, array.reshape(-1), array.shape)
    message = tensors.to_grpc(InferResponse("", "m", [output]), MESSAGES.ModelInferResponse(), raw=raw)
    request = MESSAGES.ModelInferRequest(model_name="m")
    (sent,) = message.outputs
    target = request.inputs.add(name="x", datatype=datatype, shape=sent.shape)
    if raw:
        request.raw_input_contents.extend(message.raw_output_contents)
    else:
        assert not message.raw_output_contents
        target.contents.CopyFrom(sent.contents)
    same(decoded(tensors.from_grpc(MESSAGES.ModelInferRequest.FromString(request.SerializeToString()))), array)


@bounded
@given(st.dictionaries(st.text(max_size=5), st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text() | st.floats()))
def test_parameters_survive_grpc(values: dict[str, Any]) -> None:
    message = MESSAGES.ModelInferResponse()
    tensors.set_grpc_parameters(message.parameters, values)
    back = tensors.grpc_parameters(message.parameters)
    assert {name: repr(value) for name, value in back.items()} == {name: repr(value) for name, value in values.items()}


# What is malformed

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from([*tensors.DTYPES]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
odd_shape = st.lists(st.integers(-2, 4) | st.sampled_from([2**31 - 1, 2**31, 2**63]), max_size=9) | anything
odd_input = st.fixed_dictionaries(
    {},
    optional={
        "name": st.sampled_from(["x", "y"]) | anything,
        "datatype": st.sampled_from([*tensors.DTYPES, "fp32", "FP8"]) | anything,
        "shape": odd_shape,
        "data": anything,
        "parameters": st.fixed_dictionaries({}, optional={"binary_data_size": st.integers(-1, 12)}) | anything,
    },
)
odd_request = st.fixed_dictionaries(
    {"inputs": st.lists(odd_input, max_size=3) | anything},
    optional={"id": anything, "parameters": anything, "outputs": anything},
)


def decode_all(parse: Any) -> None:
    """Parse and decode everything; `InvalidRequest` is the one way to fail."""
    with contextlib.suppress(InvalidRequest):
        for found in parse().inputs:
            for read in (tensors.decode, tensors.decode_texts):
                with contextlib.suppress(InvalidRequest):
                    read(found)


def dumps(tree: Any) -> bytes:
    return json.dumps(tree).encode("utf-8", "surrogatepass")


@pytest.mark.slow
@settings(bounded, max_examples=600)
@given(odd_request, st.binary(max_size=12), st.none() | st.integers(-1, 300) | st.text(max_size=4))
def test_any_rest_request_is_taken_or_refused(tree: Any, tail: bytes, length: Any) -> None:
    head = dumps(tree)
    header_length = length if length is None or isinstance(length, str) else str(length)
    decode_all(lambda: tensors.parse_rest(head + tail, header_length, "m", None))
    decode_all(lambda: tensors.parse_rest(head + tail, str(len(head)), "m", None))


@bounded
@given(st.binary(max_size=40), st.none() | st.text(max_size=6))
def test_any_bytes_are_taken_or_refused(body: bytes, header_length: str | None) -> None:
    decode_all(lambda: tensors.parse_rest(body, header_length, "m", None))


@pytest.mark.slow
@settings(bounded, max_examples=400)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([*tensors.DTYPES, "FP8", ""]),
            st.lists(st.integers(-1, 4) | st.sampled_from([2**31 - 1, 2**63 - 1]), max_size=9),
            st.sampled_from([None, *sorted(set(tensors.CONTENTS_FIELD.values()))]),
            st.integers(0, 3),
        ),
        max_size=3,
    ),
    st.lists(st.binary(max_size=20), max_size=3),
)
def test_any_grpc_request_is_taken_or_refused(inputs: list[Any], raw: list[bytes]) -> None:
    request = MESSAGES.ModelInferRequest(model_name="m", raw_input_contents=raw)
    for datatype, shape, field, count in inputs:
        message = request.inputs.add(name="x", datatype=datatype, shape=shape)
        if field is not None:
            value = {"bytes_contents": b"\xff", "bool_contents": True, "fp32_contents": math.nan}.get(field, 1)
            getattr(message.contents, field).extend([value] * count)
    decode_all(lambda: tensors.from_grpc(request))


@pytest.mark.parametrize(
    ("item", "sentence"),
    [
        ({"shape": [0, 2**31 - 1, 2**31 - 1, 2**31 - 1], "data": []}, "shape"),
        ({"shape": [2**31 - 1] * 8, "data": []}, "shape"),
        ({"shape": [-1], "data": ["a"]}, "shape"),
        ({"shape": [2], "data": ["a"]}, "1 elements"),
        ({"shape": [2, 2], "data": [["a", "b"], ["c"]]}, "nested"),
        ({"shape": [1], "data": [3]}, "BYTES data must be strings"),
        ({"shape": [1], "data": "a"}, "data must be a list"),
        ({"shape": [1], "datatype": "FP32", "data": [1e39]}, "range"),
        ({"shape": [1], "datatype": "UINT8", "data": [256]}, "range"),
        ({"shape": [1], "datatype": "INT32", "data": [1.5]}, "no INT32"),
        ({"shape": [1], "datatype": "BOOL", "data": [1]}, "no BOOL"),
        ({"shape": [1], "datatype": "INT64", "data": [True]}, "no INT64"),
    ],
)
def test_the_sentence_names_the_input_and_what_is_wrong(item: dict[str, Any], sentence: str) -> None:
    body = orjson.dumps({"inputs": [{"name": "x", "datatype": "BYTES", **item}]})
    with pytest.raises(InvalidRequest, match=sentence):
        decoded(tensors.parse_rest(body, None, "m", None))


@pytest.mark.parametrize("raw", [b"\x01", b"\x05\x00\x00\x00abc", b"\xff\xff\xff\xff"])
def test_cut_off_bytes_elements_are_refused(raw: bytes) -> None:
    request = MESSAGES.ModelInferRequest(model_name="m", raw_input_contents=[raw])
    request.inputs.add(name="x", datatype="BYTES", shape=[1])
    with pytest.raises(InvalidRequest, match="'x'"):
        decoded(tensors.from_grpc(request))


@pytest.mark.parametrize("where", ["inputs", "outputs"])
@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"shared_memory_region": "r", "shared_memory_byte_size": 8}, "shared memory is not used here"),
        ({"classification": 2}, "have no classes"),
    ],
)
def test_what_triton_does_with_a_tensor_beside_its_data_is_refused(
    where: str, parameters: dict[str, Any], sentence: str
) -> None:
    tree: dict[str, Any] = {
        "inputs": [{"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["a"]}],
        "outputs": [{"name": "text_output"}],
    }
    tree[where][0]["parameters"] = parameters
    with pytest.raises(InvalidRequest, match=rf"{where}\[0\].*{sentence}"):
        tensors.parse_rest(json.dumps(tree).encode(), None, "m", None)
    message = MESSAGES.ModelInferRequest(model_name="m")
    message.inputs.add(name="text_input", datatype="BYTES", shape=[1]).contents.bytes_contents.append(b"a")
    message.outputs.add(name="text_output")
    for name, value in parameters.items():
        kind = "string_param" if isinstance(value, str) else "int64_param"
        setattr(getattr(message, where)[0].parameters[name], kind, value)
    with pytest.raises(InvalidRequest, match=sentence):
        tensors.from_grpc(message)


def test_what_is_null_for_generate_is_left_out() -> None:
    parameters = {"stream": None, "details": None, "temperature": None, "max_tokens": 4}
    tree = {"text_input": "x", "stream": None, "sampling_parameters": None, "id": None, "parameters": parameters}
    request, details = generate.to_request(tree, "m", None, False)
    assert (request.parameters, details) == ({"max_tokens": 4, "stream": False}, False)
    assert [each.name for each in request.inputs] == ["text_input"]
