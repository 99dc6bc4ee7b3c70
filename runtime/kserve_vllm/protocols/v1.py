"""KServe's V1 protocol: `{"instances": [...]}` to `{"predictions": [...]}`.

An instance is a string (a prompt), or an object with `prompt` or `messages` and sampling parameters of its own. The
sampling parameters of the whole request stand in `parameters`. A string is answered with a string, an object with an
object. Embedding and classification models take strings and answer with lists of numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kserve_vllm.core.errors import InvalidRequest
from kserve_vllm.core.types import Piece, TextJob
from kserve_vllm.protocols.oip.text import collect_all
from kserve_vllm.protocols.text_engine import TextEngine


class V1Text:
    """Answers V1 requests with the engine.

    Args:
        engine: the started engine.
        max_batch: most instances in one request.
    """

    def __init__(self, engine: TextEngine, max_batch: int) -> None:
        self._engine = engine
        self._max_batch = max_batch

    async def predict(
        self, model: str, payload: Mapping[str, object], request_id: str, trace: Mapping[str, str] | None
    ) -> dict[str, object]:
        """Answer a V1 request.

        Raises:
            InvalidRequest: names the instance or parameter that is wrong.
            RequestError: whatever the engine answers.
        """
        instances = payload.get("instances", payload.get("inputs"))
        if not isinstance(instances, list):
            raise InvalidRequest("instances must be a list", field="instances")
        if not 0 < len(instances) <= self._max_batch:
            raise InvalidRequest(
                f"instances has {len(instances)} entries; 1 to {self._max_batch} are taken", field="instances"
            )
        parameters = {} if payload.get("parameters") is None else payload["parameters"]
        if not isinstance(parameters, dict):
            raise InvalidRequest("parameters must be an object", field="parameters")
        if not self._engine.generates:
            return {"predictions": await self._pool(model, instances, parameters, request_id)}
        jobs = [
            _job(model, instance, parameters, f"{request_id}-{i}", trace, f"instances[{i}]")
            for i, instance in enumerate(instances)
        ]
        results = await collect_all(self._engine, jobs)
        return {"predictions": [_answer(instance, pieces) for instance, pieces in zip(instances, results, strict=True)]}

    async def _pool(
        self, model: str, instances: Sequence[object], parameters: dict[str, object], request_id: str
    ) -> list[list[float]]:
        texts = [instance for instance in instances if isinstance(instance, str)]
        if len(texts) < len(instances):
            raise InvalidRequest("instances must be strings for this model", field="instances")
        if self._engine.embeds:
            return await self._engine.embed(model, texts, parameters, request_id)
        return await self._engine.classify(model, texts, parameters, request_id)


def _job(
    model: str,
    instance: object,
    parameters: Mapping[str, object],
    request_id: str,
    trace: Mapping[str, str] | None,
    where: str,
) -> TextJob:
    options = _renamed(parameters)
    if isinstance(instance, str):
        return TextJob(model, request_id, instance, options=options, trace_headers=trace)
    if not isinstance(instance, dict):
        raise InvalidRequest(f"{where} must be a string or an object", field="instances")
    own = dict(instance)
    prompt, messages = own.pop("prompt", None), own.pop("messages", None)
    if (prompt is None) == (messages is None):
        raise InvalidRequest(f"{where} needs one of prompt and messages", field="instances")
    if prompt is not None and not isinstance(prompt, str):
        raise InvalidRequest(f"{where}.prompt must be a string", field="instances")
    if messages is not None and not (isinstance(messages, list) and all(isinstance(m, dict) for m in messages)):
        raise InvalidRequest(f"{where}.messages must be a list of objects", field="instances")
    return TextJob(model, request_id, prompt, messages, options | _renamed(own), trace_headers=trace)


def _renamed(options: Mapping[str, object]) -> dict[str, object]:
    return {"max_tokens" if k == "max_completion_tokens" else k: v for k, v in options.items()}


def _answer(instance: object, pieces: Sequence[Piece]) -> object:
    answers = [
        piece.text
        if isinstance(instance, str)
        else {
            "text": piece.text,
            "finish_reason": piece.finish_reason,
            "prompt_tokens": piece.prompt_tokens,
            "completion_tokens": len(piece.token_ids),
        }
        for piece in pieces
    ]
    return answers[0] if len(answers) == 1 else answers
