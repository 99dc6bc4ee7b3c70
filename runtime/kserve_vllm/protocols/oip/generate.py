"""The generate extension of V2: one prompt as plain JSON, answered whole or as server-sent events.

Request: `{"text_input": "...", "parameters": {...}}`; every other field names an input tensor with one element.
Response: `{"model_name", "model_version", "text_output", ...}`, with a field per further output tensor, and `details`
where `parameters.details` is true: `finish_reason` (`eos_token`, `stop_sequence`, `length`; null while a stream goes
on), `logprobs` (every token with its id, text and log probability) and, in a stream, `token`.
Sources: Triton's generate extension; KServe's Open Inference Protocol, "Generate".
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from kserve.protocol.infer_type import InferInput, InferRequest, InferResponse

from kserve_vllm.core.errors import InvalidRequest

_RESERVED = {"id", "parameters", "model_name", "model_version"}


def to_request(tree: Mapping[str, object], model: str, version: str | None, stream: bool) -> tuple[InferRequest, bool]:
    """The request as an `InferRequest`, and whether `details` are asked for.

    Args:
        tree: the parsed body.
        model, version: from the path.
        stream: whether the path streams; it overrides `parameters.stream`.

    Raises:
        InvalidRequest: a field is missing or has the wrong type.
    """
    text = tree.get("text_input")
    if not isinstance(text, str):
        raise InvalidRequest("text_input must be a string", field="text_input")
    parameters = {} if tree.get("parameters") is None else tree["parameters"]
    if not isinstance(parameters, dict):
        raise InvalidRequest("parameters must be an object", field="parameters")
    for where in (tree, parameters):
        if not isinstance(where.get("stream"), bool | None):
            raise InvalidRequest("stream must be true or false", field="stream")
    details = False if parameters.get("details") is None else parameters["details"]
    if not isinstance(details, bool):
        raise InvalidRequest("details must be true or false", field="details")
    given = {name: value for name, value in parameters.items() if value is not None}
    parameters = {**given, "stream": stream}
    inputs = [InferInput("text_input", [1], "BYTES", data=[text])]
    for name, value in tree.items():
        if value is None or name in _RESERVED or name in ("text_input", "stream"):
            continue
        if name == "sampling_parameters":
            try:
                body = value if isinstance(value, str) else json.dumps(value)
            except RecursionError:
                raise InvalidRequest("sampling_parameters is nested too deeply", field="sampling_parameters") from None
            inputs.append(InferInput(name, [1], "BYTES", data=[body]))
        elif isinstance(value, bool):
            inputs.append(InferInput(name, [1], "BOOL", data=[value]))
        else:
            raise InvalidRequest(
                f"{name}: no such input, or not of its type; sampling parameters belong in parameters", field=name
            )
    request_id = tree.get("id")
    if request_id is not None and not isinstance(request_id, str):
        raise InvalidRequest("id must be a string", field="id")
    return InferRequest(model, inputs, request_id=request_id, parameters=parameters, model_version=version), details


def from_response(response: InferResponse, details: bool) -> dict[str, object]:
    """The response as plain JSON: one-element tensors as values, others as lists."""
    tree: dict[str, object] = {"model_name": response.model_name, "model_version": response.model_version}
    if response.id:
        tree["id"] = response.id
    for tensor in response.outputs:
        values = [v.decode("utf-8", "replace") if isinstance(v, bytes) else v for v in tensor.data.reshape(-1).tolist()]
        tree[tensor.name] = values[0] if len(values) == 1 else values
    if details:
        found = tree.pop("details")
        tree["details"] = [json.loads(each) for each in found] if isinstance(found, list) else json.loads(str(found))
    return tree
