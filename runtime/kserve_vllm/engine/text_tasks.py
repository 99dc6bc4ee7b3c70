"""What the engine does for V1 and V2: continue text, embed it, score it, classify it, with vLLM's own request types.

Imports of vLLM stand inside functions, see `vllm`.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypedDict

import orjson

from kserve_vllm.core.errors import InvalidRequest, RequestError
from kserve_vllm.core.types import ModelInfo, Piece, TextJob
from kserve_vllm.engine.hooks.request_repair import LEAST_TOP_P
from kserve_vllm.engine.requests import (
    plain_logprobs,
    raise_error_response,
    reject_unknown_options,
    translate,
    validated,
)
from kserve_vllm.engine.served_models import ServedModels

if TYPE_CHECKING:
    from pydantic import BaseModel
    from starlette.datastructures import State
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM


class Prepared(NamedTuple):
    """What vLLM's client is handed for one prompt.

    Attributes:
        engine_input: the rendered prompt.
        params: with `max_tokens` resolved.
        priority: vLLM's; the smaller the sooner.
        lora: the adapter, None for the base model.
    """

    engine_input: object
    params: SamplingParams
    priority: int
    lora: LoRARequest | None


class _PooledRow(TypedDict, total=False):
    """What vLLM answers to one text; of the three what was asked for."""

    embedding: list[float]
    score: float
    probs: list[float]


class TextTasks:
    """The tasks of a started engine; a `protocols.text_engine.TextEngine`.

    Args:
        client: vLLM's.
        state: of vLLM's HTTP app, which holds the handlers.
        tasks: vLLM's names of what the model can do.
        models: by which a request names its model.
        prioritizes: whether requests are scheduled by their priority.
    """

    shows_logprobs = True
    """Answers may have log probabilities; what moderates them says no."""

    def __init__(
        self, client: AsyncLLM, state: State, tasks: Sequence[str], models: ServedModels, prioritizes: bool
    ) -> None:
        self._client = client
        self._state = state
        self._tasks = tasks
        self._models = models
        self._prioritizes = prioritizes
        self._special_tokens: frozenset[int] | None = None

    @property
    def names(self) -> list[str]:
        """Served names of the base model, first one first."""
        return self._models.names

    def find(self, name: str) -> ModelInfo | None:
        """What is served under a name, loaded or not, or None."""
        return self._models.find(name)

    @property
    def generates(self) -> bool:
        """Whether the model continues text."""
        return "generate" in self._tasks

    @property
    def embeds(self) -> bool:
        """Whether the model gives embeddings."""
        return "embed" in self._tasks and not self.generates

    @property
    def classifies(self) -> bool:
        """Whether the model gives class probabilities, or scores of text pairs."""
        return "classify" in self._tasks and not self.generates

    @property
    def prioritizes(self) -> bool:
        """Whether requests are scheduled by their priority."""
        return self._prioritizes

    @property
    def caches_prefixes(self) -> bool:
        """Whether the prefix cache is on."""
        return bool(self._client.vllm_config.cache_config.enable_prefix_caching)

    @property
    def special_tokens(self) -> frozenset[int]:
        """Ids of the tokenizer's special tokens, which stand for no text."""
        if self._special_tokens is None:
            self._special_tokens = frozenset(self._client.get_tokenizer().all_special_ids)
        return self._special_tokens

    async def generate(self, job: TextJob) -> AsyncGenerator[Piece, None]:
        """Continue one prompt. Cancelling the task, or closing the generator, aborts the request in the engine.

        Raises:
            InvalidRequest: an option or the prompt can't be used.
            NotFound: no such model.
            Unavailable: the engine's queue is full.
            EngineGone: the engine died.
            InternalError: anything else.
        """
        started = False
        try:
            engine_input, params, priority, lora = await self.prepare(job)
            stream = self._client.generate(
                engine_input,
                params,
                job.request_id,
                lora_request=lora,
                priority=priority,
                trace_headers=job.trace_headers,
            )
            async with contextlib.aclosing(stream):
                prompt_tokens = 0
                async for output in stream:
                    started = True
                    if output.prompt_token_ids is not None:
                        prompt_tokens = len(output.prompt_token_ids)
                    for choice in output.outputs:
                        if choice.finish_reason == "error":
                            raise self.translate(None, job.request_id, started)
                        yield Piece(
                            choice.index,
                            choice.text,
                            choice.token_ids,
                            choice.finish_reason,
                            choice.cumulative_logprob,
                            plain_logprobs(choice.logprobs) if choice.logprobs else None,
                            prompt_tokens,
                            output.finished and choice is output.outputs[-1],
                            choice.stop_reason,
                        )
        except Exception as error:
            raise self.translate(error, job.request_id, started) from error

    async def prepare(self, job: TextJob) -> Prepared:
        """Validate options and render the prompt with vLLM's own OpenAI request types."""
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.entrypoints.openai.completion.protocol import CompletionRequest
        from vllm.entrypoints.serve.utils.api_utils import get_max_tokens

        state = self._state
        reject_unknown_options(job.options)
        if isinstance(job.prompt, list) and not job.options.get("truncate_prompt_tokens"):
            most = self._client.model_config.max_model_len
            if len(job.prompt) > most:
                # vLLM would look at each of them, several times, before it counts them.
                sentence = f"the prompt has {len(job.prompt)} tokens; the model takes {most}"
                raise InvalidRequest(sentence, field="input_ids")
        if job.options.get("priority"):
            raise InvalidRequest(
                "priority is not taken from a request; its class decides, and the header x-priority", field="priority"
            )
        # Null means what is the default, as over OpenAI's routes.
        given = {name: value for name, value in job.options.items() if value is not None}
        if given.get("top_p") == 0 and not isinstance(given["top_p"], bool):
            given["top_p"] = LEAST_TOP_P
        common = {**given, "model": job.model, "stream": job.stream, "request_id": job.request_id}
        request: ChatCompletionRequest | CompletionRequest
        if job.messages is not None:
            logprobs = common.pop("logprobs", None)
            if logprobs is not None:
                common |= {"logprobs": True, "top_logprobs": logprobs}
            request = validated(ChatCompletionRequest, {**common, "messages": job.messages})
            handler = state.openai_serving_chat
            rendered = await handler.render_chat_request(request)
            raise_error_response(rendered)
            inputs = rendered[1]
        else:
            request = validated(CompletionRequest, {**common, "prompt": job.prompt})
            handler = state.openai_serving_completion
            inputs = await handler.render_completion_request(request)
            raise_error_response(inputs)
        engine_input = inputs[0]
        max_tokens = get_max_tokens(
            handler.model_config.max_model_len,
            request.max_tokens,
            handler._extract_prompt_len(engine_input),
            handler.default_sampling_params,
            handler.override_max_tokens,
            truncate_prompt_tokens=request.truncate_prompt_tokens,
        )
        params = request.to_sampling_params(max_tokens, handler.default_sampling_params)
        # Raises where the adapter went while its prompt was rendered: without one the base model would answer.
        return Prepared(engine_input, params, request.priority, handler._maybe_get_adapters(request))

    async def embed(
        self, model: str, texts: Sequence[str] | Sequence[Sequence[int]], options: Mapping[str, object], request_id: str
    ) -> list[list[float]]:
        """One embedding per text, shape [texts][dimensions].

        Raises:
            InvalidRequest, NotFound, EngineGone, InternalError: as for `generate`.
        """
        from vllm.entrypoints.pooling.embed.protocol import EmbeddingCompletionRequest

        body: dict[str, object] = {"model": model, "input": list(texts), "encoding_format": "float"}
        rows = await self._pool("serving_embedding", EmbeddingCompletionRequest, body, options, request_id)
        return [row["embedding"] for row in rows]

    async def score(
        self,
        model: str,
        queries: Sequence[str],
        documents: Sequence[str],
        options: Mapping[str, object],
        request_id: str,
    ) -> list[float]:
        """One score per pair of a query and a document; a single query is paired with every document.

        Raises:
            InvalidRequest, NotFound, EngineGone, InternalError: as for `generate`.
        """
        from vllm.entrypoints.pooling.scoring.protocol import ScoreQueriesDocumentsRequest

        first = list(queries) if len(queries) != 1 else queries[0]
        body: dict[str, object] = {"model": model, "queries": first, "documents": list(documents)}
        rows = await self._pool("serving_scores", ScoreQueriesDocumentsRequest, body, options, request_id)
        return [row["score"] for row in rows]

    async def classify(
        self, model: str, texts: Sequence[str], options: Mapping[str, object], request_id: str
    ) -> list[list[float]]:
        """Class probabilities per text, shape [texts][classes].

        Raises:
            InvalidRequest, NotFound, EngineGone, InternalError: as for `generate`.
        """
        from vllm.entrypoints.pooling.classify.protocol import ClassificationCompletionRequest

        body: dict[str, object] = {"model": model, "input": list(texts)}
        rows = await self._pool("serving_classification", ClassificationCompletionRequest, body, options, request_id)
        return [row["probs"] for row in rows]

    async def _pool(
        self,
        handler_name: str,
        request_type: type[BaseModel],
        body: dict[str, object],
        options: Mapping[str, object],
        request_id: str,
    ) -> list[_PooledRow]:
        handler = getattr(self._state, handler_name, None)
        if handler is None:
            raise InvalidRequest(f"this model has no such task; it has {', '.join(self._tasks)}", field="inputs")
        try:
            body["request_id"] = request_id
            reject_unknown_options(options, set(request_type.model_fields) - set(body))
            request = validated(request_type, {**options, **body})
            response = await handler(request)
        except Exception as error:
            raise self.translate(error, request_id, started=False) from error
        rows: list[_PooledRow] = orjson.loads(response.body)["data"]
        return rows

    def translate(self, error: Exception | None, request_id: str, started: bool) -> RequestError:
        """What an exception of vLLM's becomes for a client; see `requests.translate`."""
        # With a connector, a sequence may also fail since its cache did not arrive.
        grammar_alone = self._client.vllm_config.kv_transfer_config is None
        return translate(error, request_id, started, self._client.errored, grammar_alone)
