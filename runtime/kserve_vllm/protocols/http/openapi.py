"""Schemas of V1, V2 and generate for the OpenAPI document, and its merge with vLLM's."""

from __future__ import annotations

from collections.abc import Mapping

DESCRIPTION = (
    "One engine, three protocols: OpenAI's API (vLLM's own, also under the prefix /openai), the Open Inference "
    "Protocol V2 with its generate extension, and KServe's V1."
)

_SCALAR: dict[str, object] = {"type": ["string", "number", "boolean"]}
_PARAMETERS: dict[str, object] = {
    "type": "object",
    "description": "Sampling parameters under OpenAI's names: max_tokens, temperature, top_p, stop, seed, n, ...",
    "additionalProperties": True,
}
_DATATYPE: dict[str, object] = {
    "type": "string",
    "enum": [
        *("BOOL", "BYTES", "FP16", "FP32", "FP64"),
        *(f"{sign}INT{n}" for sign in ("", "U") for n in (8, 16, 32, 64)),
    ],
}
_SHAPE: dict[str, object] = {"type": "array", "items": {"type": "integer", "minimum": 0}, "maxItems": 8}
_TEXT: dict[str, object] = {"type": "string"}
_FLAG: dict[str, object] = {"type": "boolean"}
_COUNT: dict[str, object] = {"type": "integer", "minimum": 0}
_MAYBE_TEXT: dict[str, object] = {"type": ["string", "null"]}


def _object(required: list[str] | None = None, extra: bool = False, **properties: object) -> dict[str, object]:
    return {
        "type": "object",
        "properties": properties,
        "required": required or [],
        "additionalProperties": extra,
    }


def _list(items: Mapping[str, object]) -> dict[str, object]:
    return {"type": "array", "items": items}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


_TENSOR_METADATA = _object(
    ["name", "datatype", "shape"], name=_TEXT, datatype=_DATATYPE, shape=_list({"type": "integer"})
)
_OUTPUT_TENSOR = _object(
    ["name", "datatype", "shape"],
    name=_TEXT,
    datatype=_DATATYPE,
    shape=_SHAPE,
    data={"type": "array"},
    parameters={"type": "object"},
)

SCHEMAS: Mapping[str, dict[str, object]] = {
    "Error": _object(["error"], error=_TEXT),
    "OpenAIError": _object(
        ["error"],
        error=_object(
            ["message", "type", "param", "code"], message=_TEXT, type=_TEXT, param=_MAYBE_TEXT, code=_MAYBE_TEXT
        ),
    ),
    "InferInputTensor": _object(
        ["name", "datatype", "shape"],
        extra=True,
        name=_TEXT,
        datatype=_DATATYPE,
        shape=_SHAPE,
        data={"type": "array"},
        parameters={"type": "object"},
    ),
    "InferRequest": _object(
        ["inputs"],
        extra=True,
        id=_TEXT,
        parameters=_PARAMETERS,
        inputs=_list(_ref("InferInputTensor")),
        outputs=_list(_object(["name"], extra=True, name=_TEXT, parameters={"type": "object"})),
    ),
    "InferResponse": _object(
        ["model_name", "model_version", "outputs"],
        id=_TEXT,
        model_name=_TEXT,
        model_version=_TEXT,
        parameters={"type": "object"},
        outputs=_list(_OUTPUT_TENSOR),
    ),
    "GenerateRequest": _object(
        ["text_input"],
        extra=True,
        id=_TEXT,
        text_input=_TEXT,
        parameters=_PARAMETERS,
        sampling_parameters={"type": ["string", "object"]},
        exclude_input_in_output=_FLAG,
    ),
    "GenerateResponse": _object(
        ["model_name", "model_version", "text_output"],
        extra=True,
        id=_TEXT,
        model_name=_TEXT,
        model_version=_TEXT,
        text_output={"type": ["string", "array"]},
    ),
    "RepositoryIndexRequest": _object(extra=True, ready=_FLAG),
    "PredictRequest": _object(
        ["instances"],
        extra=True,
        parameters=_PARAMETERS,
        instances={"type": "array", "minItems": 1, "items": {"type": ["string", "object"]}},
    ),
    "PredictResponse": _object(["predictions"], predictions={"type": "array"}),
    "Health": _object(
        ["ready", "live", "state", "seconds"],
        extra=True,
        ready=_FLAG,
        live=_FLAG,
        state=_TEXT,
        seconds={"type": "number"},
        reason=_TEXT,
    ),
    "ServerMetadata": _object(["name", "version", "extensions"], name=_TEXT, version=_TEXT, extensions=_list(_TEXT)),
    "ModelList": _object(["models"], models=_list(_TEXT)),
    "ModelMetadata": _object(
        ["name", "platform", "inputs", "outputs"],
        name=_TEXT,
        versions=_list(_TEXT),
        platform=_TEXT,
        inputs=_list(_TENSOR_METADATA),
        outputs=_list(_TENSOR_METADATA),
    ),
    "ModelConfig": _object(
        ["name", "backend", "input", "output"],
        extra=True,
        name=_TEXT,
        backend=_TEXT,
        input=_list({"type": "object"}),
        output=_list({"type": "object"}),
    ),
    "ModelStatistics": _object(["model_stats"], model_stats=_list({"type": "object"})),
    "ModelReady": _object(["name", "ready"], name=_TEXT, ready=_FLAG),
    "ModelState": _object(
        ["name", "version", "state", "reason"],
        name=_TEXT,
        version=_TEXT,
        state={"enum": ["READY", "UNAVAILABLE"]},
        reason=_TEXT,
    ),
    "Control": _object(["name"], extra=True, name=_TEXT),
    "Adapter": _object(
        ["name", "object", "source", "description", "origin", "state", "error", "revision", "digest", "since"],
        name=_TEXT,
        object=_TEXT,
        source=_TEXT,
        description=_TEXT,
        origin={"enum": ["file", "flag", "api"]},
        state={"enum": ["loaded", "loading", "failed", "unloaded"]},
        error=_MAYBE_TEXT,
        revision=_MAYBE_TEXT,
        digest=_MAYBE_TEXT,
        since={"type": "number"},
        in_use=_FLAG,
    ),
    "AdapterStats": _object(
        ["name"],
        name=_TEXT,
        requests=_COUNT,
        in_flight=_COUNT,
        prompt_tokens=_COUNT,
        output_tokens=_COUNT,
        loads=_COUNT,
        reloads=_COUNT,
        failures=_COUNT,
        unloads=_COUNT,
    ),
    "Models": _object(["object", "data", "models"], object=_TEXT, data=_list({"type": "object"}), models=_list(_TEXT)),
    "File": _object(
        ["id", "object", "bytes", "created_at", "filename", "purpose", "status"],
        extra=True,
        id=_TEXT,
        object={"enum": ["file"]},
        bytes=_COUNT,
        created_at=_COUNT,
        expires_at=_COUNT,
        filename=_TEXT,
        purpose={"enum": ["batch", "batch_output"]},
        status=_TEXT,
    ),
    "Batch": _object(
        ["id", "object", "endpoint", "input_file_id", "completion_window", "status", "created_at"],
        extra=True,
        id=_TEXT,
        object={"enum": ["batch"]},
        endpoint=_TEXT,
        input_file_id=_TEXT,
        completion_window=_TEXT,
        created_at=_COUNT,
        status={
            "enum": [
                "validating",
                "failed",
                "in_progress",
                "finalizing",
                "completed",
                "expired",
                "cancelling",
                "cancelled",
            ]
        },
    ),
    "BatchRequest": _object(
        ["input_file_id", "endpoint", "completion_window"],
        extra=True,
        input_file_id=_TEXT,
        endpoint=_TEXT,
        completion_window=_TEXT,
        metadata={"type": ["object", "null"]},
    ),
    "KeptList": _object(
        ["object", "data", "has_more"],
        object={"enum": ["list"]},
        data=_list({"type": "object"}),
        first_id=_MAYBE_TEXT,
        last_id=_MAYBE_TEXT,
        has_more=_FLAG,
    ),
    "Deleted": _object(["id", "object", "deleted"], id=_TEXT, object=_TEXT, deleted=_FLAG),
    "QueueStats": _object(["slots", "in_use", "waiting"], extra=True, slots={"type": "integer"}),
    "Model": _object(["name", "ready"], extra=True, name=_TEXT, ready=_FLAG),
}


def _answer(
    schema: Mapping[str, object] | str, media_type: str = "application/json", more: Mapping[str, object] | None = None
) -> dict[int | str, dict[str, object]]:
    content = {media_type: {"schema": _ref(schema) if isinstance(schema, str) else schema}, **(more or {})}
    return {200: {"description": "Answered", "content": content}}


def _error(description: str, schema: str = "Error") -> dict[str, object]:
    return {"description": description, "content": {"application/json": {"schema": _ref(schema)}}}


ERRORS: dict[int | str, dict[str, object]] = {
    400: _error("The request can't be used; the sentence names the field"),
    403: _error("Not allowed"),
    404: _error("No such model or version"),
    401: _error("The API key is missing or wrong"),
    408: _error("The body did not come in time"),
    413: _error("The body is too large"),
    415: _error("The body is compressed in another way than gzip or deflate"),
    429: _error("Over a limit, or no room in the queue; `Retry-After` says when to try again"),
    503: _error("Loading, draining, unloaded, or the engine is gone"),
}
OPENAI_ERRORS: dict[int | str, dict[str, object]] = {
    400: _error("The adapter is broken; the sentence says what is wrong with it", "OpenAIError"),
    403: _error("Not allowed", "OpenAIError"),
    404: _error("No adapter of that name is declared", "OpenAIError"),
    503: _error("Not now, or the adapter's source can't be reached", "OpenAIError"),
}
HEALTH = {"/health/live": "server_live", "/health/ready": "server_ready"}
HEALTH_ANSWERS: dict[int | str, dict[str, object]] = {
    **_answer("Health"),
    503: {"description": "No", "content": {"application/json": {"schema": _ref("Health")}}},
}
SERVER_METADATA = _answer("ServerMetadata")
MODEL_LIST = _answer("ModelList")
MODEL_METADATA = _answer("ModelMetadata")
MODEL_READY = _answer("ModelReady")
MODEL_CONFIG = _answer("ModelConfig")
STATISTICS = _answer("ModelStatistics")
REPOSITORY_INDEX = _answer(_list(_ref("ModelState")))
CONTROL = _answer("Control")
INFER = _answer("InferResponse", more={"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}})
GENERATE = _answer("GenerateResponse")
GENERATE_STREAM = _answer({"type": "string"}, "text/event-stream")
PREDICT = _answer("PredictResponse", more={"application/cloudevents+json": {"schema": {"type": "object"}}})
ADAPTER = _answer("Adapter")
ADAPTERS = _answer(_object(["object", "data"], object=_TEXT, data=_list(_ref("Adapter"))))
ADAPTER_STATS = _answer(
    _object(
        ["object", "data", "states"],
        object=_TEXT,
        data=_list(_ref("AdapterStats")),
        states={"type": "object", "additionalProperties": {"type": "integer"}},
    )
)
V1_MODELS = _answer("Models")
V1_MODEL = _answer("Model")
QUEUE_STATS = _answer("QueueStats")
FILE, BATCH, KEPT_LIST, DELETED = (_answer(name) for name in ("File", "Batch", "KeptList", "Deleted"))
CONTENT = _answer({"type": "string", "format": "binary"}, "application/octet-stream")
KEPT_ERRORS: dict[int | str, dict[str, object]] = {
    400: _error("The request can't be used; the sentence names the field", "OpenAIError"),
    404: _error("The caller's tenant has none of that id, or files and batches are switched off", "OpenAIError"),
}
UPLOAD: dict[str, object] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": _object(
                    ["file", "purpose"],
                    extra=True,
                    file={"type": "string", "format": "binary"},
                    purpose={"enum": ["batch"]},
                )
            }
        },
    }
}


def body(schema: str, required: bool = True) -> dict[str, object]:
    """The `requestBody` of an operation whose handler parses the body itself."""
    return {"requestBody": {"required": required, "content": {"application/json": {"schema": _ref(schema)}}}}


def merge(own: dict[str, object], vllm: dict[str, object]) -> dict[str, object]:
    """One document of both apps. Where both have a path, ours is the one that answers."""
    document = dict(own)
    document["paths"] = {**_part(vllm, "paths"), **_part(own, "paths")}
    theirs, ours = _part(vllm, "components"), _part(own, "components")
    schemas = {**_part(theirs, "schemas"), **_part(ours, "schemas"), **SCHEMAS}
    document["components"] = {**theirs, **ours, "schemas": schemas}
    return document


def _part(document: Mapping[str, object], name: str) -> Mapping[str, object]:
    found = document.get(name, {})
    assert isinstance(found, dict)
    return found
