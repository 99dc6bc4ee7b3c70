"""Tensors of the Open Inference Protocol V2, from and to the protocol_errors.

Formats: the protocol's required API, and its binary tensor data extension (the JSON header's length in
`Inference-Header-Content-Length`, raw tensors behind it, little-endian, BYTES elements each with a 4-byte length).
Requests become KServe's `InferRequest`; its inputs keep what came over the wire until `decode` checks it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import orjson
from kserve.protocol.infer_type import InferInput, InferOutput, InferRequest, InferResponse, RequestedOutput

from kserve_vllm.core.errors import BodyTooLarge, InvalidRequest
from kserve_vllm.protocols import errors as protocol_errors

if TYPE_CHECKING:
    import numpy.typing as npt
    from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb2

    Array: TypeAlias = npt.NDArray[np.generic]

DTYPES: Mapping[str, np.dtype[np.generic]] = {
    "BOOL": np.dtype("?"),
    "UINT8": np.dtype("<u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("<i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BYTES": np.dtype("O"),
}
"""V2 datatype to the numpy type it has in memory. BYTES elements are `bytes`."""

CONTENTS_FIELD: Mapping[str, str] = {
    "BOOL": "bool_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
"""V2 datatype to the field of `InferTensorContents` that holds it. FP16 travels raw alone."""

MAX_ELEMENTS = 1 << 20
"""Numbers in one tensor."""
MAX_TEXTS = 65_536
"""Elements of one BYTES tensor; no more than the largest `--max-batch`."""
MAX_JSON = 32 << 20
"""Bytes of JSON in a request of V2, V1 or generate; tensors in binary form come on top."""
MAX_JSON_VALUES = 512 << 10
"""Commas and opening brackets in that JSON, which are as many as its values, or more where texts have some too."""
MAX_TENSORS = 64
"""Inputs of one request, and outputs that it asks for."""
MAX_PARAMETERS = 256
"""Parameters of one request, or of one tensor."""
_MAX_RANK = 8
_LENGTH = struct.Struct("<I")


# Requests


def parse_rest(body: bytes, header_length: str | None, model_name: str, model_version: str | None) -> InferRequest:
    """Parse the body of a REST infer request.

    Args:
        body: the whole body.
        header_length: value of `Inference-Header-Content-Length`, or None where all of the body is JSON.
        model_name, model_version: from the path.

    Raises:
        InvalidRequest: malformed JSON, a missing or mistyped field, binary sizes that don't add up.
    """
    json_length = len(body)
    if header_length is not None:
        length = protocol_errors.whole_number(header_length, len(body))
        if length is None:
            raise InvalidRequest(
                f"Inference-Header-Content-Length must be a number of bytes up to the body's {len(body)}",
                field="Inference-Header-Content-Length",
            )
        json_length = length
        if json_length == 0 and body:
            return _raw_request(body, model_name, model_version)
    tree = parse_json_object(body[:json_length])
    binary = memoryview(body)[json_length:]
    offset = 0
    inputs = []
    for position, item in enumerate(_objects(tree, "inputs", required=True)):
        where = f"inputs[{position}]"
        name = _string(item, "name", where)
        datatype = _string(item, "datatype", where).upper()
        shape = _shape(item.get("shape"), where)
        parameters = _of_tensor(_parameters(item, where), where)
        tensor = InferInput(name, shape, datatype, parameters=parameters)
        size = parameters.get("binary_data_size")
        if size is not None:
            if isinstance(size, bool) or not isinstance(size, int) or size < 0 or "data" in item:
                raise InvalidRequest(
                    f"{where}.parameters.binary_data_size must be a number of bytes, and excludes data", field=name
                )
            if offset + size > len(binary):
                raise InvalidRequest(f"{where}: {size} bytes of binary data are announced, fewer follow", field=name)
            tensor._raw_data = bytes(binary[offset : offset + size])
            offset += size
        elif "data" in item:
            tensor._data = item["data"]
        else:
            raise InvalidRequest(f"{where}.data is missing", field=name)
        inputs.append(tensor)
    if offset != len(binary):
        raise InvalidRequest(f"{len(binary) - offset} bytes of binary data belong to no input", field="inputs")
    outputs = [
        RequestedOutput(
            _string(item, "name", f"outputs[{i}]"), _of_tensor(_parameters(item, f"outputs[{i}]"), f"outputs[{i}]")
        )
        for i, item in enumerate(_objects(tree, "outputs", required=False))
    ]
    request_id = tree.get("id")
    if request_id is not None and not isinstance(request_id, str):
        raise InvalidRequest("id must be a string", field="id")
    return InferRequest(
        model_name,
        inputs,
        request_id=request_id,
        parameters=_parameters(tree, "request"),
        request_outputs=outputs or None,
        model_version=model_version,
    )


def _raw_request(body: bytes, model_name: str, model_version: str | None) -> InferRequest:
    """A body without JSON: all of it is the only element of the input `text_input`, and outputs are binary.

    Source: Triton's binary tensor data extension, "Raw Binary Request". A 4-byte length that says just what follows it
    is left out.
    """
    whole = len(body) >= _LENGTH.size and _LENGTH.unpack_from(body)[0] == len(body) - _LENGTH.size
    tensor = InferInput("text_input", [1], "BYTES")
    tensor._raw_data = body if whole else _LENGTH.pack(len(body)) + body
    return InferRequest(
        model_name, [tensor], parameters={"binary_data_output": True}, request_outputs=None, model_version=model_version
    )


def parse_json_object(body: bytes) -> dict[str, object]:
    """Parse JSON that must be an object.

    All of it is parsed in one go, during which nobody else is served; so it is looked at before how much that will be.

    Raises:
        BodyTooLarge: it is longer than `MAX_JSON`.
        InvalidRequest: it isn't an object, or has too many values.
    """
    if len(body) > MAX_JSON:
        raise BodyTooLarge(
            f"the JSON of this request is larger than {MAX_JSON >> 20} MiB; send tensors in binary form", field="body"
        )
    if len(body) > MAX_JSON_VALUES and sum(map(body.count, (b",", b"[", b"{"))) > MAX_JSON_VALUES:
        raise InvalidRequest(
            f"the body has more than {MAX_JSON_VALUES} values (commas and brackets, also those in texts); send tensors "
            "in binary form",
            field="body",
        )
    try:
        tree = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}", field="body") from None
    if not isinstance(tree, dict):
        raise InvalidRequest("the body must be a JSON object", field="body")
    return tree


def from_grpc(request: pb2.ModelInferRequest) -> InferRequest:
    """A `ModelInferRequest` message as KServe's `InferRequest`.

    Raises:
        InvalidRequest: raw and typed contents are mixed, or their numbers don't match.
    """
    raw = request.raw_input_contents
    for what, messages in (("inputs", request.inputs), ("outputs", request.outputs)):
        if len(messages) > MAX_TENSORS:
            raise InvalidRequest(f"{what} has {len(messages)} entries; at most {MAX_TENSORS} are taken", field=what)
    if raw and len(raw) != len(request.inputs):
        raise InvalidRequest(
            f"raw_input_contents has {len(raw)} entries for {len(request.inputs)} inputs", field="raw_input_contents"
        )
    inputs = []
    for position, message in enumerate(request.inputs):
        datatype = message.datatype.upper()
        shape = list(message.shape[: _MAX_RANK + 1])
        where = f"inputs[{position}]"
        parameters = _of_tensor(grpc_parameters(message.parameters), where)
        tensor = InferInput(message.name, shape, datatype, parameters=parameters)
        _shape(tensor.shape, where)
        if raw:
            if message.HasField("contents"):
                raise InvalidRequest(
                    f"inputs[{position}].contents must be empty beside raw_input_contents", field=message.name
                )
            tensor._raw_data = raw[position]
        elif datatype in CONTENTS_FIELD:
            contents = getattr(message.contents, CONTENTS_FIELD[datatype])
            _check_count(len(contents), datatype, message.name)
            tensor._data = list(contents)
        elif datatype in DTYPES:
            raise InvalidRequest(
                f"inputs[{position}]: {datatype} must be sent in raw_input_contents", field=message.name
            )
        inputs.append(tensor)
    return InferRequest(
        request.model_name,
        inputs,
        request_id=request.id or None,
        from_grpc=True,
        raw_inputs=None,
        parameters=grpc_parameters(request.parameters),
        request_outputs=[
            RequestedOutput(o.name, _of_tensor(grpc_parameters(o.parameters), f"outputs[{i}]"))
            for i, o in enumerate(request.outputs)
        ]
        or None,
        model_version=request.model_version or None,
    )


def grpc_parameters(parameters: Mapping[str, pb2.InferParameter]) -> dict[str, object]:
    """A map of `InferParameter` messages as plain values.

    Raises:
        InvalidRequest: there are more than `MAX_PARAMETERS`.
    """
    if len(parameters) > MAX_PARAMETERS:
        raise InvalidRequest(f"there are more than {MAX_PARAMETERS} parameters", field="parameters")
    values = {}
    for name, message in parameters.items():
        choice = message.WhichOneof("parameter_choice")
        if choice is not None:
            values[name] = getattr(message, choice)
    return values


def decode(tensor: InferInput) -> Array:
    """The data of an input as an array of its shape; BYTES become `bytes` objects.

    Raises:
        InvalidRequest: unknown datatype, a value that the datatype can't hold, or a shape that doesn't match.
    """
    name, datatype = tensor.name, tensor.datatype
    if datatype not in DTYPES:
        raise InvalidRequest(f"input {name!r} has unknown datatype {datatype!r}", field=name)
    shape = _shape(tensor.shape, f"input {name!r}")
    count = math.prod(shape)
    _check_count(count, datatype, name)
    if tensor._raw_data is not None:
        flat = _decode_raw(tensor._raw_data, datatype, name, count)
    elif isinstance(tensor.data, np.ndarray):
        flat = tensor.data.reshape(-1)
    else:
        flat = _decode_list(_flatten(tensor.data, shape, name), datatype, name)
    if flat.size != count:
        raise InvalidRequest(
            f"input {name!r} has {flat.size} elements, but its shape {list(shape)} takes {count}", field=name
        )
    try:
        return flat.reshape(shape)
    except ValueError:  # no element, and the other sizes are more than an address holds
        raise InvalidRequest(f"input {name!r}: the shape {list(shape)} is too large", field=name) from None


def check_shape(tensor: InferInput) -> None:
    """Let the sizes of an input's shape be used.

    Raises:
        InvalidRequest: it is no list of sizes.
    """
    _shape(tensor.shape, f"input {tensor.name!r}")


def decode_texts(tensor: InferInput) -> list[str]:
    """The elements of a BYTES tensor as text, in row-major order.

    Raises:
        InvalidRequest: another datatype, or bytes that are no UTF-8.
    """
    if tensor.datatype != "BYTES":
        raise InvalidRequest(
            f"input {tensor.name!r} must have datatype BYTES, not {tensor.datatype}", field=tensor.name
        )
    texts = []
    for item in decode(tensor).reshape(-1):
        try:
            texts.append(item.decode("utf-8") if isinstance(item, bytes) else str(item))
        except UnicodeDecodeError:
            raise InvalidRequest(f"input {tensor.name!r} is not valid UTF-8", field=tensor.name) from None
    return texts


def _check_count(count: int, datatype: str, name: str) -> None:
    """Refuse more elements than are decoded while others wait."""
    most = MAX_TEXTS if datatype == "BYTES" else MAX_ELEMENTS
    if count > most:
        raise InvalidRequest(
            f"input {name!r} has a shape or contents of {count} elements; at most {most} are taken", field=name
        )


def _decode_raw(raw: bytes, datatype: str, name: str, count: int) -> Array:
    """Elements in the binary extension's form: `count` of them, or some other number where that does not hold."""
    if datatype != "BYTES":
        dtype = DTYPES[datatype]
        if len(raw) % dtype.itemsize:
            raise InvalidRequest(
                f"input {name!r} has {len(raw)} bytes, no multiple of {datatype}'s {dtype.itemsize}", field=name
            )
        if len(raw) != count * dtype.itemsize:
            raise InvalidRequest(
                f"input {name!r} has {len(raw) // dtype.itemsize} elements, but its shape takes {count}", field=name
            )
        return np.frombuffer(raw, dtype=dtype)
    items: list[bytes] = []
    offset = 0
    while offset < len(raw):
        if len(items) == count:
            raise InvalidRequest(f"input {name!r} has more elements than its shape takes, {count}", field=name)
        if offset + 4 > len(raw):
            raise InvalidRequest(f"input {name!r} ends inside the length of an element", field=name)
        (length,) = _LENGTH.unpack_from(raw, offset)
        offset += 4
        if offset + length > len(raw):
            raise InvalidRequest(f"input {name!r} has an element of {length} bytes that is cut off", field=name)
        items.append(raw[offset : offset + length])
        offset += length
    return _objects_array(items)


def _flatten(data: object, shape: Sequence[int], name: str) -> list[object]:
    """Row-major elements of JSON data, which may be flat or nested in the tensor's shape."""
    if not isinstance(data, list):
        raise InvalidRequest(f"input {name!r}: data must be a list", field=name)
    if not any(isinstance(item, list) for item in data):
        return data
    level: list[Any] = [data]
    for size in shape:
        if not all(isinstance(item, list) and len(item) == size for item in level):
            raise InvalidRequest(f"input {name!r}: data is not nested in the shape {list(shape)}", field=name)
        level = [inner for item in level for inner in item]
    return level


def _decode_list(items: list[object], datatype: str, name: str) -> Array:
    if datatype == "BYTES":
        if not all(isinstance(item, (str, bytes)) for item in items):
            raise InvalidRequest(f"input {name!r}: BYTES data must be strings", field=name)
        try:
            return _objects_array([item.encode("utf-8") if isinstance(item, str) else item for item in items])
        except UnicodeEncodeError:
            raise InvalidRequest(f"input {name!r} has text that is no valid Unicode", field=name) from None
    dtype = DTYPES[datatype]
    allowed: tuple[type, ...] = (int, float) if dtype.kind == "f" else (int,)
    allowed = (bool,) if dtype.kind == "b" else allowed
    if not set(map(type, items)).issubset(allowed):
        item = next(item for item in items if type(item) not in allowed)
        raise InvalidRequest(f"input {name!r}: {_short(item)} is no {datatype}", field=name)
    try:
        with np.errstate(over="ignore"):  # becomes infinite, which is refused below
            array = np.array(items, dtype=dtype)
    except (OverflowError, ValueError):
        raise InvalidRequest(f"input {name!r} has a value out of {datatype}'s range", field=name) from None
    if dtype.kind == "f" and not np.isfinite(array).all():
        raise InvalidRequest(f"input {name!r} has a value out of {datatype}'s range", field=name)
    return array


def _objects_array(items: Sequence[object]) -> Array:
    array = np.empty(len(items), dtype=object)
    array[:] = items
    return array


def _shape(shape: object, where: str) -> tuple[int, ...]:
    if (
        not isinstance(shape, (list, tuple))
        or len(shape) > _MAX_RANK
        or not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**31 for n in shape)
    ):
        raise InvalidRequest(f"{where}.shape must be a list of at most {_MAX_RANK} sizes", field="shape")
    return tuple(shape)


def _objects(tree: Mapping[str, object], key: str, required: bool) -> Iterable[dict[str, object]]:
    items = tree.get(key)
    if items is None and not required:
        return []
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise InvalidRequest(f"{key} must be a list of objects", field=key)
    if len(items) > MAX_TENSORS:
        raise InvalidRequest(f"{key} has {len(items)} entries; at most {MAX_TENSORS} are taken", field=key)
    return items


def _string(item: Mapping[str, object], key: str, where: str) -> str:
    value = item.get(key)
    if not isinstance(value, str):
        raise InvalidRequest(f"{where}.{key} must be a string", field=key)
    return value


def _parameters(item: Mapping[str, object], where: str) -> dict[str, object]:
    value = item.get("parameters")
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InvalidRequest(f"{where}.parameters must be an object", field="parameters")
    if len(value) > MAX_PARAMETERS:
        raise InvalidRequest(f"{where}.parameters has more than {MAX_PARAMETERS} entries", field="parameters")
    return value


def _of_tensor(parameters: dict[str, object], where: str) -> dict[str, object]:
    """A tensor's parameters, without those of Triton's that would be answered as if they had not been there.

    Raises:
        InvalidRequest: one of its extensions is asked for, which are not done here.
    """
    if "shared_memory_region" in parameters:
        raise InvalidRequest(
            f"{where}: shared memory is not used here; send the data in the request, and take it from the answer",
            field="shared_memory_region",
        )
    if parameters.get("classification"):
        raise InvalidRequest(f"{where}: the outputs of a text model have no classes", field="classification")
    return parameters


def _short(item: object) -> str:
    try:
        text = repr(item)
    except RecursionError:
        return "a list in lists in lists"
    return text if len(text) <= 40 else text[:40] + "..."


# Responses


def output(name: str, datatype: str, values: Sequence[object] | Array, shape: Sequence[int]) -> InferOutput:
    """An output tensor from row-major values; text is encoded as UTF-8."""
    if datatype == "BYTES":
        array = _objects_array([v.encode("utf-8", "replace") if isinstance(v, str) else v for v in values])
    else:
        array = np.asarray(values, dtype=DTYPES[datatype])
    return InferOutput(name, list(shape), datatype, data=array.reshape(shape))


def select_outputs(outputs: Sequence[InferOutput], requested: Sequence[RequestedOutput] | None) -> list[InferOutput]:
    """The outputs that the client asked for, in its order; all of them where it named none.

    Raises:
        InvalidRequest: there is no output of that name.
    """
    if not requested:
        return list(outputs)
    by_name = {tensor.name: tensor for tensor in outputs}
    for wanted in requested:
        if wanted.name not in by_name:
            raise InvalidRequest(f"no output named {wanted.name!r}; there are {', '.join(by_name)}", field="outputs")
    return [by_name[wanted.name] for wanted in requested]


def encode_raw(tensor: InferOutput) -> bytes:
    """An output tensor's data in the binary extension's form."""
    array = tensor.data
    if tensor.datatype != "BYTES":
        return bytes(np.ascontiguousarray(array, dtype=DTYPES[tensor.datatype]).tobytes())
    return b"".join(_LENGTH.pack(len(item)) + item for item in array.reshape(-1))


def encode_rest(response: InferResponse, request: InferRequest) -> tuple[bytes, int | None]:
    """The body of a REST response, and the length of its JSON where binary tensors follow it.

    A tensor is binary where the request says so for it (`binary_data`) or for all (`binary_data_output`).
    """
    by_default = bool((request.parameters or {}).get("binary_data_output", False))
    chosen = {o.name: o.binary_data for o in request.request_outputs or []}
    items, raws = [], []
    for tensor in response.outputs:
        item: dict[str, object] = {"name": tensor.name, "datatype": tensor.datatype, "shape": tensor.shape}
        parameters = dict(tensor.parameters or {})
        choice = chosen.get(tensor.name)
        if by_default if choice is None else choice:
            raws.append(encode_raw(tensor))
            parameters["binary_data_size"] = len(raws[-1])
        elif tensor.datatype == "BYTES":
            item["data"] = [value.decode("utf-8", "replace") for value in tensor.data.reshape(-1)]
        else:
            item["data"] = tensor.data.reshape(-1).tolist()
        if parameters:
            item["parameters"] = parameters
        items.append(item)
    tree: dict[str, object] = {"model_name": response.model_name, "model_version": response.model_version or "1"}
    if response.id:
        tree["id"] = response.id
    if response.parameters:
        tree["parameters"] = response.parameters
    tree["outputs"] = items
    head = orjson.dumps(tree)
    return (b"".join([head, *raws]), len(head)) if raws else (head, None)


def to_grpc(response: InferResponse, message: pb2.ModelInferResponse, raw: bool) -> pb2.ModelInferResponse:
    """Fill a `ModelInferResponse` message; raw contents where `raw` or the datatype has no typed field."""
    message.model_name = response.model_name
    message.model_version = response.model_version or "1"
    message.id = response.id or ""
    set_grpc_parameters(message.parameters, response.parameters or {})
    raw = raw or any(tensor.datatype not in CONTENTS_FIELD for tensor in response.outputs)
    for tensor in response.outputs:
        target = message.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        if raw:
            message.raw_output_contents.append(encode_raw(tensor))
        else:
            getattr(target.contents, CONTENTS_FIELD[tensor.datatype]).extend(tensor.data.reshape(-1).tolist())
    return message


def set_grpc_parameters(target: MutableMapping[str, pb2.InferParameter], values: Mapping[str, object]) -> None:
    """Write plain values into a map of `InferParameter` messages."""
    for name, value in values.items():
        if isinstance(value, bool):
            target[name].bool_param = value
        elif isinstance(value, int):
            target[name].int64_param = value
        elif isinstance(value, float):
            target[name].double_param = value
        else:
            target[name].string_param = str(value)
