"""Open Inference Protocol V2: from an `InferRequest` to engine calls and back, and model metadata.

Text models take one of
- `text_input` BYTES, any shape: every element is a prompt of its own;
- `input_ids` INT32 or INT64, `[tokens]` or `[batch, tokens]`, with `input_lengths` `[batch]` where rows are padded.

Sampling parameters stand in the request's `parameters` under OpenAI's names. The tensors of Triton's vLLM backend
(`stream`, `sampling_parameters`, `exclude_input_in_output`, `return_*`) are taken too; where one of them is present,
the backend's rules hold: the prompt is repeated in the output unless excluded, `lora_name` among the sampling
parameters names an adapter, and log probabilities are `null` where `logprobs` was not set.
Of Triton's protocol parameters, `timeout` (microseconds) ends a request that takes longer, `priority` reaches vLLM's
priority scheduling where that is on, and sequences have no meaning for a model without state.
Sources: triton-inference-server/vllm_backend, README and docs; Triton's schedule policy and sequence extensions.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from kserve.protocol.infer_type import InferInput, InferOutput, InferRequest, InferResponse

from kserve_vllm.core.errors import DeadlinePassed, InvalidRequest
from kserve_vllm.core.types import Piece, TextJob
from kserve_vllm.policy.enforcement import may_see
from kserve_vllm.protocols.oip import tensors
from kserve_vllm.protocols.text_engine import TextEngine

PLATFORM = "vllm"
VERSION = "1"

_TRITON_FLAGS = (
    "stream",
    "exclude_input_in_output",
    "return_finish_reason",
    "return_cumulative_logprob",
    "return_logprobs",
    "return_num_input_tokens",
    "return_num_output_tokens",
)
_TEXT_INPUTS = {"text_input", "input_ids", "input_lengths", "sampling_parameters", *_TRITON_FLAGS}
# Parameters of the protocol and of its clients that are no sampling parameters.
_PROTOCOL_PARAMETERS = {
    "binary_data_output",
    "triton_enable_empty_final_response",
    "sequence_id",
    "sequence_start",
    "sequence_end",
}
_JSON_OPTIONS = {
    "logit_bias",
    "stop",
    "stop_token_ids",
    "allowed_token_ids",
    "bad_words",
    "response_format",
    "structured_outputs",
}


@dataclass(frozen=True)
class Wanted:
    """What a text request asks to be answered beside the text.

    `null_logprobs`: the client did not set `logprobs`, so that there are none to show. `texts` and `ids`: also where
    the prompts came in the other form, since the output was asked for by name. `details`: those of the generate
    extension, as JSON.
    """

    stream: bool = False
    repeat_prompt: bool = False
    finish_reason: bool = False
    cumulative_logprob: bool = False
    logprobs: bool = False
    num_input_tokens: bool = False
    num_output_tokens: bool = False
    null_logprobs: bool = False
    texts: bool = False
    ids: bool = False
    details: bool = False


@dataclass(frozen=True)
class TextRequest:
    """A decoded text request.

    Attributes:
        prompts: texts, or rows of token ids.
        shape: shape of the batch.
        as_ids: whether token ids came in, and token ids go out.
        ids_dtype: datatype of the token ids that came in.
        chat: whether each text is put through the chat template as a user's message.
        options: sampling parameters.
        wanted: what to answer.
        adapter: asked for as `lora_name`, or None.
        timeout_s: after which the request is given up, or None.
    """

    prompts: Sequence[str | Sequence[int]]
    shape: tuple[int, ...]
    as_ids: bool
    ids_dtype: str
    chat: bool
    options: dict[str, object]
    wanted: Wanted
    adapter: str | None = None
    timeout_s: float | None = None

    def jobs(self, model: str, request_id: str, trace: Mapping[str, str] | None, stream: bool) -> list[TextJob]:
        """One engine job per prompt, each scheduled on its own."""
        jobs = []
        model = self.adapter or model
        for position, prompt in enumerate(self.prompts):
            job = TextJob(
                model, f"{request_id}-{position}", prompt, options=self.options, stream=stream, trace_headers=trace
            )
            if self.chat:
                job = replace(job, prompt=None, messages=[{"role": "user", "content": prompt}])
            jobs.append(job)
        return jobs


class V2Text:
    """Answers V2 requests with the engine.

    Args:
        engine: the started engine.
        max_batch: most prompts in one request.
    """

    def __init__(self, engine: TextEngine, max_batch: int) -> None:
        self._engine = engine
        self._max_batch = max_batch

    async def infer(self, request: InferRequest, request_id: str, trace: Mapping[str, str] | None) -> InferResponse:
        """Answer a whole request at once.

        Raises:
            InvalidRequest: a tensor or parameter is missing, malformed or out of range.
            RequestError: whatever the engine answers.
        """
        if self._engine.embeds or self._engine.classifies:
            outputs = await self._pool(request, request_id)
        else:
            text = self.parse(request)
            if text.wanted.stream:
                raise InvalidRequest(
                    "stream=true can't be answered by infer; use ModelStreamInfer or generate_stream", field="stream"
                )
            jobs = text.jobs(request.model_name, request_id, trace, stream=False)
            async with _within(text.timeout_s):
                results = await collect_all(self._engine, jobs)
            outputs = self._outputs(text, results)
        outputs = tensors.select_outputs(outputs, request.request_outputs)
        return InferResponse(request.id, request.model_name, outputs, model_version=request.model_version or VERSION)

    @property
    def generates(self) -> bool:
        """Whether the model continues text."""
        return self._engine.generates

    async def stream(
        self, request: InferRequest, request_id: str, trace: Mapping[str, str] | None
    ) -> AsyncGenerator[tuple[InferResponse, bool], None]:
        """Answer a request with one prompt piece by piece: what is new, and whether it is the last.

        Raises:
            InvalidRequest: as for `infer`, or more than one prompt.
        """
        text = self.parse(request)
        if len(text.prompts) != 1:
            raise InvalidRequest("a streamed request takes one prompt", field="text_input")
        if not text.wanted.stream:
            yield await self.infer(request, request_id, trace), True
            return
        if text.wanted.repeat_prompt:
            raise InvalidRequest(
                "exclude_input_in_output=false does not go with stream=true", field="exclude_input_in_output"
            )
        (job,) = text.jobs(request.model_name, request_id, trace, stream=True)
        async with contextlib.aclosing(self._engine.generate(job)) as pieces:
            async for piece in _until(pieces, text.timeout_s):
                outputs = tensors.select_outputs(self._outputs(text, [[piece]]), request.request_outputs)
                response = InferResponse(
                    request.id, request.model_name, outputs, model_version=request.model_version or VERSION
                )
                if text.options.get("n", 1) != 1:
                    response.parameters = {"index": piece.index}
                yield response, piece.last

    def plain_stream(
        self, request: InferRequest, request_id: str, trace: Mapping[str, str] | None
    ) -> tuple[TextJob, tuple[int, ...]] | None:
        """The job of a streamed request for one prompt that is answered with text alone, and the shape of each answer;
        None for any other.

        Raises:
            InvalidRequest: as for `infer`.
        """
        text = self.parse(request)
        plain = text.wanted == Wanted(stream=True) and not text.as_ids and len(text.prompts) == 1
        if not plain or text.options.get("n", 1) != 1 or text.options.get("logprobs") is not None or text.timeout_s:
            return None
        (job,) = text.jobs(request.model_name, request_id, trace, stream=True)
        return job, text.shape

    def parse(self, request: InferRequest) -> TextRequest:
        """Decode and check the tensors and parameters of a text request.

        Raises:
            InvalidRequest: names the tensor or parameter that is wrong.
        """
        by_name = _by_name(request)
        for name in by_name:
            if name not in _TEXT_INPUTS:
                raise InvalidRequest(
                    f"unknown input {name!r}; a text model takes {', '.join(sorted(_TEXT_INPUTS))}", field=name
                )
        options = {k: v for k, v in (request.parameters or {}).items() if k not in _PROTOCOL_PARAMETERS}
        chat = _flag(options.pop("apply_chat_template", False), "apply_chat_template")
        triton = "sampling_parameters" in by_name or any(name in by_name for name in _TRITON_FLAGS)
        if "sampling_parameters" in by_name:
            options |= _sampling_tensor(by_name["sampling_parameters"])
        flags = {name: _flag_of(by_name, options, name) for name in _TRITON_FLAGS}
        asked = {output.name for output in request.request_outputs or ()}
        details = _flag(options.pop("details", False), "details")
        timeout_s = _timeout_s(options.pop("timeout", None))
        if not self._engine.prioritizes:
            # Triton's clients may set it for any model; it has a meaning where the model has levels of priority.
            options.pop("priority", None)
        adapter = self._adapter(options.pop("lora_name", None))
        stream = bool(flags["stream"])
        exclude = flags["exclude_input_in_output"]
        options = _typed_options(options)
        prompts, shape, as_ids, dtype = self._prompts(by_name)
        given = options.get("logprobs") is not None
        wanted = Wanted(
            stream=stream,
            repeat_prompt=not exclude if exclude is not None else triton and not stream and not as_ids,
            finish_reason=bool(flags["return_finish_reason"]) or "finish_reason" in asked,
            cumulative_logprob=bool(flags["return_cumulative_logprob"]) or "cumulative_logprob" in asked,
            logprobs=bool(flags["return_logprobs"]) or "logprobs" in asked,
            num_input_tokens=bool(flags["return_num_input_tokens"]) or "num_input_tokens" in asked,
            num_output_tokens=bool(flags["return_num_output_tokens"]) or "num_output_tokens" in asked,
            texts="text_output" in asked,
            ids=bool(asked & {"output_ids", "output_lengths"}),
            details=details,
            null_logprobs=bool(flags["return_logprobs"]) and not given,
        )
        by_name_alone = wanted.logprobs and not flags["return_logprobs"]
        shown = details and self._engine.shows_logprobs
        if (wanted.cumulative_logprob or by_name_alone or shown) and not given:
            options["logprobs"] = 0
        if chat and as_ids:
            raise InvalidRequest("apply_chat_template takes text_input, not input_ids", field="apply_chat_template")
        return TextRequest(prompts, shape, as_ids, dtype, chat, options, wanted, adapter, timeout_s)

    def _adapter(self, name: object) -> str | None:
        """The adapter of that name, for the caller of the running request.

        Raises:
            InvalidRequest: there is none.
        """
        if name is None:
            return None
        info = self._engine.find(name) if isinstance(name, str) else None
        if info is None or info.parent is None or not may_see(self._engine, info.name):
            raise InvalidRequest(f"lora_name: no adapter is named {name!r}", field="lora_name")
        return info.name

    def _prompts(
        self, by_name: Mapping[str, InferInput]
    ) -> tuple[Sequence[str | Sequence[int]], tuple[int, ...], bool, str]:
        if ("text_input" in by_name) == ("input_ids" in by_name):
            raise InvalidRequest("give one of the inputs text_input and input_ids", field="text_input")
        if "text_input" in by_name:
            if "input_lengths" in by_name:
                raise InvalidRequest("input_lengths goes with input_ids", field="input_lengths")
            tensor = by_name["text_input"]
            texts = self._texts(tensor)
            return texts, tuple(tensor.shape) or (1,), False, "INT64"
        tensor = by_name["input_ids"]
        if tensor.datatype not in ("INT32", "INT64"):
            raise InvalidRequest("input_ids must have datatype INT32 or INT64", field="input_ids")
        if len(tensor.shape) == 2:
            self._check_batch(tensor.shape[0], "input_ids")
        ids = tensors.decode(tensor)
        if ids.ndim not in (1, 2):
            raise InvalidRequest("input_ids must have the shape [tokens] or [batch, tokens]", field="input_ids")
        rows = ids.reshape(1, -1) if ids.ndim == 1 else ids
        self._check_batch(len(rows), "input_ids")
        lengths = [rows.shape[1]] * len(rows)
        if "input_lengths" in by_name:
            given = tensors.decode(by_name["input_lengths"]).reshape(-1)
            if given.dtype.kind not in "iu" or len(given) != len(rows):
                raise InvalidRequest("input_lengths must hold one integer per row of input_ids", field="input_lengths")
            lengths = [int(n) for n in given]
        if not all(0 < n <= rows.shape[1] for n in lengths):
            raise InvalidRequest(
                "input_ids: every prompt needs at least one token, and no more than its row has", field="input_ids"
            )
        prompts = [row[:n].tolist() for row, n in zip(rows, lengths, strict=True)]
        return prompts, (len(rows),), True, tensor.datatype

    def _texts(self, tensor: InferInput) -> list[str]:
        """The texts of an input; their number is checked before they are decoded, as its shape has it."""
        tensors.check_shape(tensor)
        self._check_batch(math.prod(tensor.shape), tensor.name)
        return tensors.decode_texts(tensor)

    def _check_batch(self, size: int, name: str) -> None:
        if not 0 < size <= self._max_batch:
            raise InvalidRequest(f"{name} has {size} prompts; 1 to {self._max_batch} are taken", field=name)

    async def _pool(self, request: InferRequest, request_id: str) -> list[InferOutput]:
        by_name = _by_name(request)
        options = {k: v for k, v in (request.parameters or {}).items() if k not in _PROTOCOL_PARAMETERS}
        if not self._engine.prioritizes:
            options.pop("priority", None)
        async with _within(_timeout_s(options.pop("timeout", None))):
            return await self._pooled(request, by_name, options, request_id)

    async def _pooled(
        self, request: InferRequest, by_name: Mapping[str, InferInput], options: dict[str, object], request_id: str
    ) -> list[InferOutput]:
        if set(by_name) == {"query", "documents"}:
            queries = self._texts(by_name["query"])
            documents = self._texts(by_name["documents"])
            if len(queries) not in (1, len(documents)):
                raise InvalidRequest("query must hold one text, or as many as documents", field="query")
            scores = await self._engine.score(request.model_name, queries, documents, options, request_id)
            return [tensors.output("scores", "FP32", scores, [len(scores)])]
        if set(by_name) != {"text_input"}:
            raise InvalidRequest(
                "this model takes the input text_input, or the inputs query and documents", field="inputs"
            )
        texts = self._texts(by_name["text_input"])
        if self._engine.embeds:
            rows = await self._engine.embed(request.model_name, texts, options, request_id)
            return [tensors.output("embedding", "FP32", rows, [len(rows), len(rows[0])])]
        rows = await self._engine.classify(request.model_name, texts, options, request_id)
        return [tensors.output("scores", "FP32", rows, [len(rows), len(rows[0])])]

    def _outputs(self, text: TextRequest, results: Sequence[Sequence[Piece]]) -> list[InferOutput]:
        """Output tensors of the batch's shape, with a last axis for `n` where it is above 1."""
        flat = [piece for pieces in results for piece in pieces]
        n = len(results[0])
        shape = list(text.shape) + ([n] if n > 1 else [])
        wanted = text.wanted
        outputs = []
        if text.as_ids or wanted.ids:
            width = max(len(piece.token_ids) for piece in flat)
            ids = np.zeros((len(flat), width), dtype=tensors.DTYPES[text.ids_dtype])
            for row, piece in zip(ids, flat, strict=True):
                row[: len(piece.token_ids)] = piece.token_ids
            outputs.append(tensors.output("output_ids", text.ids_dtype, ids, [*shape, width]))
            outputs.append(tensors.output("output_lengths", "INT32", [len(p.token_ids) for p in flat], shape))
        if not text.as_ids or wanted.texts:
            prompts = [prompt if wanted.repeat_prompt else "" for prompt in text.prompts for _ in range(n)]
            texts = [f"{prompt}{piece.text}" for prompt, piece in zip(prompts, flat, strict=True)]
            outputs.append(tensors.output("text_output", "BYTES", texts, shape))
        if wanted.finish_reason:
            # Triton's backend writes Python's None where an answer goes on.
            outputs.append(tensors.output("finish_reason", "BYTES", [str(p.finish_reason) for p in flat], shape))
        if wanted.cumulative_logprob:
            values = [p.cumulative_logprob or 0.0 for p in flat]
            outputs.append(tensors.output("cumulative_logprob", "FP32", values, shape))
        if wanted.logprobs:
            found = ["null" if wanted.null_logprobs else json.dumps(p.logprobs) for p in flat]
            outputs.append(tensors.output("logprobs", "BYTES", found, shape))
        if wanted.num_input_tokens:
            outputs.append(tensors.output("num_input_tokens", "UINT32", [p.prompt_tokens for p in flat], shape))
        if wanted.num_output_tokens:
            outputs.append(tensors.output("num_output_tokens", "UINT32", [len(p.token_ids) for p in flat], shape))
        if wanted.details:
            special = self._engine.special_tokens
            found = [json.dumps(_details(piece, special, wanted.stream)) for piece in flat]
            outputs.append(tensors.output("details", "BYTES", found, shape))
        return outputs

    def inputs(self) -> list[dict[str, object]]:
        """Input tensors for the model's metadata."""
        text = [_meta("text_input", "BYTES", [-1])]
        if self._engine.embeds or self._engine.classifies:
            return [*text, _meta("query", "BYTES", [-1]), _meta("documents", "BYTES", [-1])]
        return [
            *text,
            _meta("input_ids", "INT64", [-1, -1]),
            _meta("input_lengths", "INT32", [-1]),
            _meta("sampling_parameters", "BYTES", [1]),
            *(_meta(name, "BOOL", [1]) for name in _TRITON_FLAGS),
        ]

    def outputs(self) -> list[dict[str, object]]:
        """Output tensors for the model's metadata."""
        if self._engine.embeds:
            return [_meta("embedding", "FP32", [-1, -1]), _meta("scores", "FP32", [-1])]
        if self._engine.classifies:
            return [_meta("scores", "FP32", [-1, -1])]
        return [
            _meta("text_output", "BYTES", [-1]),
            _meta("output_ids", "INT64", [-1, -1]),
            _meta("output_lengths", "INT32", [-1]),
            _meta("finish_reason", "BYTES", [-1]),
            _meta("cumulative_logprob", "FP32", [-1]),
            _meta("logprobs", "BYTES", [-1]),
            _meta("num_input_tokens", "UINT32", [-1]),
            _meta("num_output_tokens", "UINT32", [-1]),
        ]


def _details(piece: Piece, special: frozenset[int], streamed: bool) -> dict[str, object]:
    """What the Open Inference Protocol's generate calls `details`: why the answer ended, and its tokens.

    Of a stream, each event has its last token as `token`; a piece may have more than one, which stand in `logprobs`.
    """
    tokens = []
    for token, position in zip(piece.token_ids, piece.logprobs or (), strict=False):
        entry = position.get(str(token)) or {}
        text, logprob = entry.get("decoded_token") or "", entry.get("logprob")
        tokens.append({"id": int(token), "text": text, "logprob": logprob, "special": token in special})
    reason = piece.finish_reason
    if reason == "stop":
        reason = "eos_token" if piece.stop_reason is None else "stop_sequence"
    details: dict[str, object] = {"finish_reason": reason, "logprobs": tokens}
    if streamed:
        details["token"] = tokens[-1] if tokens else None
    return details


@contextlib.asynccontextmanager
async def _within(timeout_s: float | None) -> AsyncIterator[None]:
    """Give up what is done inside after `timeout_s` seconds.

    Raises:
        DeadlinePassed: it took longer.
    """
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except TimeoutError:
        raise _deadline_passed(timeout_s) from None


def _deadline_passed(timeout_s: float | None) -> DeadlinePassed:
    return DeadlinePassed(f"the request's timeout of {timeout_s:g} s ran out", field="timeout", reason="timeout")


async def _until(pieces: AsyncGenerator[Piece, None], timeout_s: float | None) -> AsyncIterator[Piece]:
    """The pieces that come within `timeout_s` seconds.

    Raises:
        DeadlinePassed: the last one did not.
    """
    if timeout_s is None:
        async for piece in pieces:
            yield piece
        return
    until = asyncio.get_running_loop().time() + timeout_s
    while True:
        try:
            async with asyncio.timeout_at(until):
                piece = await anext(pieces)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise _deadline_passed(timeout_s) from None
        yield piece


def _timeout_s(value: object) -> float | None:
    """Triton's `timeout`, in microseconds; 0 is none.

    Raises:
        InvalidRequest: it is no number of microseconds.
    """
    if value is None:
        return None
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise InvalidRequest("timeout must be a number of microseconds", field="timeout")
    return value / 1e6 or None


async def collect(engine: TextEngine, job: TextJob) -> list[Piece]:
    """Run an unstreamed job; one piece per continuation, in order of index."""
    pieces = [piece async for piece in engine.generate(job)]
    return sorted(pieces, key=lambda piece: piece.index)


async def collect_all(engine: TextEngine, jobs: Sequence[TextJob]) -> list[list[Piece]]:
    """Run unstreamed jobs side by side. The first error cancels the others and is raised.

    Raises:
        RequestError: whatever the engine answers.
    """
    if len(jobs) == 1:
        return [await collect(engine, jobs[0])]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(collect(engine, job)) for job in jobs]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


def _by_name(request: InferRequest) -> dict[str, InferInput]:
    by_name: dict[str, InferInput] = {}
    for tensor in request.inputs:
        if tensor.name in by_name:
            raise InvalidRequest(f"input {tensor.name!r} is given twice", field=tensor.name)
        by_name[tensor.name] = tensor
    return by_name


def _sampling_tensor(tensor: InferInput) -> dict[str, object]:
    texts = tensors.decode_texts(tensor)
    if len(texts) != 1:
        raise InvalidRequest("sampling_parameters must hold one JSON object", field="sampling_parameters")
    try:
        values = json.loads(texts[0] or "{}")
    except (ValueError, RecursionError):  # no JSON, or a number of thousands of digits
        values = None
    if not isinstance(values, dict):
        raise InvalidRequest("sampling_parameters must hold one JSON object", field="sampling_parameters")
    return values


def _flag_of(by_name: Mapping[str, InferInput], options: dict[str, object], name: str) -> bool | None:
    """A BOOL `[1]` tensor or a parameter of that name; None where neither is given."""
    from_options = options.pop(name, None)
    if name in by_name:
        tensor = by_name[name]
        array = tensors.decode(tensor).reshape(-1)
        if tensor.datatype != "BOOL" or array.size != 1:
            raise InvalidRequest(f"input {name!r} must be BOOL with one element", field=name)
        return bool(array[0])
    return None if from_options is None else _flag(from_options, name)


def _flag(value: object, name: str) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    raise InvalidRequest(f"{name} must be true or false", field=name)


def _typed_options(options: Mapping[str, object]) -> dict[str, object]:
    """Options whose values the wire could carry only as text, parsed. OpenAI's newer name of max_tokens is taken."""
    typed: dict[str, object] = {}
    for name, value in options.items():
        key = "max_tokens" if name == "max_completion_tokens" else name
        if key in _JSON_OPTIONS and isinstance(value, str) and value[:1] in ("[", "{"):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):  # also a number of thousands of digits
                if key != "stop":
                    raise InvalidRequest(f"{name} is not valid JSON", field=name) from None
        typed[key] = value
    return typed


def _meta(name: str, datatype: str, shape: list[int]) -> dict[str, object]:
    return {"name": name, "datatype": datatype, "shape": shape}
