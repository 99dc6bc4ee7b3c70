"""The engine: vLLM's client and app in this process, and what is done with them.

vLLM moves its modules between minor versions; whatever moves is mended here. Imports of vLLM stand inside functions,
because they take seconds and the process has to answer probes before them.

Written against vLLM 0.32 and 0.33; `compat` holds the table of what is leant on.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict, TypeVar

import orjson
import psutil

from kserve_vllm.adapters.registry import Adapter, AdapterRegistry
from kserve_vllm.core.errors import (
    InvalidRequest,
    RequestError,
)
from kserve_vllm.core.fingerprint import fingerprint
from kserve_vllm.core.supervisor_channel import SupervisorChannel
from kserve_vllm.core.types import ModelInfo, Piece, TextJob
from kserve_vllm.engine.arguments import configure
from kserve_vllm.engine.compat import Shortcuts
from kserve_vllm.engine.cpu_affinity import leave_processors_of
from kserve_vllm.engine.hooks import guards
from kserve_vllm.engine.hooks.accounting import TokenAccounting
from kserve_vllm.engine.hooks.answer_shape import leave_out_nulls
from kserve_vllm.engine.hooks.anthropic_repair import mend_messages
from kserve_vllm.engine.hooks.media import fetch_from_outside
from kserve_vllm.engine.hooks.request_repair import LEAST_TOP_P, Mender, mender_of
from kserve_vllm.engine.hooks.responses_repair import mend_responses
from kserve_vllm.engine.hooks.stored_responses import keep_apart
from kserve_vllm.engine.hooks.submission import Cache, Lookup, SequencePolicy, SubmissionHooks
from kserve_vllm.engine.loras import LoRAs
from kserve_vllm.engine.patches.inline_rendering import ShortPrompts, render_short_prompts_in_place
from kserve_vllm.engine.patches.late_text import make_texts_at_the_end
from kserve_vllm.engine.patches.plain_outputs import process_plain_outputs_apart
from kserve_vllm.engine.requests import (
    plain_logprobs,
    raise_error_response,
    reject_unknown_options,
    translate,
    validated,
)

if TYPE_CHECKING:
    from fastapi import FastAPI
    from pydantic import BaseModel
    from starlette.middleware import Middleware
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM

log = logging.getLogger(__name__)
L = TypeVar("L", bound=Lookup)
M = TypeVar("M", bound="BaseModel")


_IDLE_WORKERS_EVERY_S = 300.0
"""How often workers are asked for a sign of life while no request is in flight."""

# Routes of vLLM's app that steer the engine rather than use it, and are open to every client that may ask for text.
_NOT_SERVED = frozenset({"/scale_elastic_ep", "/is_scaling_elastic_ep"})


@contextlib.contextmanager
def spared_interrupts() -> Iterator[None]:
    """Start processes that a terminal's Ctrl-C does not reach, so that they finish what is drained.

    To be used outside of the main thread, which wants its own interrupts. vLLM sets a handler in each of its processes,
    so that ignoring the signal would not be handed on; a blocked one is.
    """
    # It is started with the first process otherwise, and leaves the signal unblocked behind itself.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def is_for_browsers(middleware: Middleware) -> bool:
    """Whether this part of vLLM's app decides about pages of other origins."""
    from fastapi.middleware.cors import CORSMiddleware

    cls: object = middleware.cls
    return cls is CORSMiddleware


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


class ModelList(TypedDict):
    """OpenAI's list of models; what a card has beside its `id` is vLLM's matter."""

    object: str
    data: list[dict[str, Any]]


class _PooledRow(TypedDict, total=False):
    """What vLLM answers to one text; of the three what was asked for."""

    embedding: list[float]
    score: float
    probs: list[float]


async def _sign_of_life(client: AsyncLLM, with_workers: bool) -> None:
    """Return once the engine's step loop has answered, and its workers with it."""
    if with_workers:
        await client.collective_rpc("check_health")
    else:
        # Answered between two steps, from the scheduler's own state.
        await client.is_paused()


class VLLMEngine:
    """vLLM's engine in its own process, its HTTP app, and the few calls that our protocols need.

    Args:
        args: vLLM's arguments, from `parse_engine_args`.
        place: the place of this front end where several share an engine that their supervisor starts; None where this
            process starts an engine of its own.
    """

    def __init__(self, args: argparse.Namespace, channel: SupervisorChannel | None = None) -> None:
        self._args = args
        self._channel = channel
        self._client: AsyncLLM | None = None
        self._app: FastAPI | None = None
        self._tasks: tuple[str, ...] = ()
        self._stack = contextlib.AsyncExitStack()
        self._loras: LoRAs | None = None
        self._adapters: AdapterRegistry | None = None
        self._processes: list[psutil.Process] = []
        self._special_tokens: frozenset[int] | None = None
        self.accounts: TokenAccounting | None = None
        """The accounting of what the engine works on; only after `start`."""
        self.mender: Mender
        """Mends what clients send to vLLM's routes; only after `start`."""
        self.intake: SubmissionHooks[Lookup] | None = None
        """Before the engine, where policies stand before it."""
        self.short_prompts: ShortPrompts | None = None
        """What short prompts are made with, where that is not vLLM's alone."""
        self.served = True
        """False while the base model is unloaded through the repository API."""

    # Life

    async def start(self) -> None:
        """Start the engine process, or meet the one that is shared, and build vLLM's app once the model is loaded.
        Takes seconds to many minutes.

        Raises:
            ConfigError: the flags contradict each other or the model.
            Exception: whatever vLLM raises where loading fails.
        """
        addresses = None if self._channel is None else await self._channel.addresses()
        self._client = client = await asyncio.to_thread(self._start_client, addresses)
        self._loras = loras = LoRAs(client, shared=self._channel is not None)
        self.accounts = TokenAccounting(client.output_processor, lambda: self.names[0], loras)
        guards.guard_engine(client, self._args.allow_transfer_params)
        from vllm.connections import global_http_connection

        fetch_from_outside(global_http_connection, client.model_config.allowed_media_domains or ())
        # Not before the engine runs: these want the event loop.
        await client.reset_mm_cache()
        self._tasks = tuple(await client.get_supported_tasks())
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.app import build_app

        self._app = build_app(self._args, self._tasks, client.model_config)  # type: ignore[arg-type]
        routes = self._app.router.routes
        routes[:] = [route for route in routes if getattr(route, "path", None) not in _NOT_SERVED]
        guards.answer_errors(self._app, client)
        await init_app_state(client, self._app.state, self._args, self._tasks)  # type: ignore[arg-type]
        guards.check_before_stream(self._app, client, self._tasks)
        leave_out_nulls()
        mend_responses(self._app)
        keep_apart(self._app)
        mend_messages(self._app)
        backend = client.vllm_config.structured_outputs_config.backend
        own = self._args.strict_openai, self._args.allow_transfer_params
        self.mender = mender_of(self._app, backend, self._chat_template(), *own)
        loras.attach(self._app.state.openai_serving_models)
        self._adapters = loras.adapters = AdapterRegistry(loras, 1 if self._channel is None else self._channel.count)

    def _chat_template(self) -> str | None:
        """The text of all chat templates that may be used; None where messages are rendered in code."""
        given = getattr(getattr(self.app.state, "openai_serving_chat", None), "chat_template", None)
        tokenizer = self.client.renderer.tokenizer
        found = given or getattr(tokenizer, "chat_template", None)
        if isinstance(found, dict):
            found = "\n".join(map(str, found.values()))
        return found if isinstance(found, str) and not self.answers_from_token_ids else None

    def take_browser_rules(self) -> tuple[list[str], list[str], list[str], bool]:
        """Who may ask from pages of other origins: origins, methods, headers, and whether with credentials. vLLM's app
        no longer looks at that: the edge does, for all routes."""
        middleware = self.app.user_middleware
        middleware[:] = [each for each in middleware if not is_for_browsers(each)]
        self.app.middleware_stack = None
        args = self._args
        return args.allowed_origins, args.allowed_methods, args.allowed_headers, args.allow_credentials

    @property
    def always_usage(self) -> bool:
        """Whether every stream tells its usage."""
        return bool(self._args.enable_force_include_usage)

    def shorten(self, shortcuts: Shortcuts) -> None:
        """Do the work of vLLM's front end on fewer detours, those that are taken. Before the first request."""
        if shortcuts.takes("rendering"):
            foreign = bool(self._args.trust_request_chat_template)
            self.short_prompts = render_short_prompts_in_place(self.client, foreign_templates=foreign)
        if shortcuts.takes("texts") and not make_texts_at_the_end(self.client):
            shortcuts.does_not_apply("texts")
        if shortcuts.takes("outputs") and not process_plain_outputs_apart(self.client):
            shortcuts.does_not_apply("outputs")
        if shortcuts.takes("gaps"):
            from kserve_vllm.engine.hooks.stat_logger import stat_logger_of

            logger = stat_logger_of(self.client)
            if logger is None or not logger.observe_equal_gaps_together():
                shortcuts.does_not_apply("gaps")

    def stand_before(self, sequences: SequencePolicy[L], cache: Cache[L] | None = None) -> None:
        """Let `sequences` decide about every sequence from now on, and `cache` answer those that it knows."""
        prioritized = self._args.scheduling_policy == "priority"
        model = f"{self._fingerprint()} {self.client.model_config.dtype}" if cache is not None else ""
        assert self._loras is not None
        guards.check_models(sequences, self._loras.plain, self.plain)
        self.intake = SubmissionHooks(
            self.client, sequences, prioritized, cache, model, lambda: self.names[0], self._loras.plain
        )

    def _fingerprint(self) -> str:
        config = self.client.model_config
        name = str(config.model)
        if not os.path.isdir(name):
            from huggingface_hub import try_to_load_from_cache

            found = try_to_load_from_cache(name, "config.json", revision=config.revision)
            name = os.path.dirname(found) if isinstance(found, str) else f"{name}@{config.revision}"
        return fingerprint(name)

    @property
    def answers_from_token_ids(self) -> bool:
        """Whether vLLM makes the text of chat answers from token ids again, as it does for gpt-oss (Harmony)."""
        return bool(self.client.model_config.hf_config.model_type == "gpt_oss")

    def _start_client(self, addresses: dict[str, object] | None) -> AsyncLLM:
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

        from kserve_vllm.engine.hooks.stat_logger import StatLogger

        index, count = (0, 1) if self._channel is None else (self._channel.index, self._channel.count)
        config, engine_args = configure(self._args, count, index)
        if addresses is not None and self._channel is not None and self._channel.counters is not None:
            addresses["mp_admission_counters"] = self._channel.counters
        # The constructor blocks until the model is loaded; outside the event loop's thread it starts no tasks, they
        # begin with the first request.
        with spared_interrupts():
            return AsyncLLM.from_vllm_config(
                vllm_config=config,
                usage_context=UsageContext.OPENAI_API_SERVER,
                # A logger switches the statistics on.
                stat_loggers=None if engine_args.disable_log_stats else [StatLogger],
                enable_log_requests=engine_args.enable_log_requests,
                aggregate_engine_logging=engine_args.aggregate_engine_logging,
                disable_log_stats=engine_args.disable_log_stats,
                client_addresses=addresses,
                client_count=count,
                client_index=index,
            )

    async def warm_up(self) -> None:
        """Answer one short request, so that ready means that answers come; then freeze the heap for the collector."""
        from vllm import envs
        from vllm.platforms import current_platform

        if self.generates:
            job = TextJob(self.names[0], "warm-up", prompt=[1], options={"max_tokens": 1, "temperature": 0.0})
            async for _ in self.generate(job):
                pass
        elif self.embeds:
            await self.embed(self.names[0], ["warm-up"], {}, "warm-up")
        if self._channel is None:
            self._processes = psutil.Process().children(recursive=True)
            # Several front ends need more than the one processor that vLLM leaves.
            if current_platform.is_cpu():
                leave_processors_of(self._processes)
        # vLLM's engine does so too; its front end would read a variable of the environment for every token.
        envs.enable_envs_cache()
        # vLLM's lifespan writes the statistics line and freezes the heap.
        await self._stack.enter_async_context(self.app.router.lifespan_context(self.app))

    async def watch(self, interval_s: float, stall_timeout_s: float, on_gone: Callable[[str], None]) -> None:
        """Watch the engine until cancelled; call `on_gone` once with the reason when it is dead or hangs.

        A dead engine process is seen within half a second. Every `interval_s` seconds a sign of life is asked of the
        engine's step loop, and of all workers while requests are in flight; when it is owed for `stall_timeout_s`
        seconds, the engine counts as hanging and is killed, so that every request in flight gets its error. Bound: the
        sum of the two, but for time in which this process itself stood still. Without requests, workers are asked
        every 300 s: a message makes their queue spin for a second, on each one's processor.
        """
        loop = asyncio.get_running_loop()
        probe: asyncio.Task[None] | None = None
        next_probe = loop.time() + interval_s
        workers_due = loop.time() + _IDLE_WORKERS_EVERY_S
        deadline = 0.0
        while True:
            before, pause_s = loop.time(), min(0.25, interval_s)
            await asyncio.sleep(pause_s)
            # An answer may wait unread since the event loop was held up.
            deadline += max(0.0, loop.time() - before - pause_s)
            if self.client.errored:
                on_gone("the engine process died")
                return
            now = loop.time()
            if probe is None and now >= next_probe:
                with_workers = self.client.output_processor.has_unfinished_requests() or now >= workers_due
                if with_workers:
                    workers_due = now + _IDLE_WORKERS_EVERY_S
                probe = asyncio.create_task(_sign_of_life(self.client, with_workers))
                deadline = now + stall_timeout_s
            elif probe is not None and probe.done():
                if probe.exception() is not None and not self.client.errored:
                    log.error("a worker failed its health check: %r", probe.exception())
                probe, next_probe = None, now + interval_s
            elif probe is not None and now > deadline:
                probe.cancel()
                reason = f"the engine has not answered for {stall_timeout_s:g} s"
                on_gone(reason)
                if self._channel is not None:
                    self._channel.report_hang(reason)
                self.kill()
                return

    def lose(self) -> None:
        """Give every request in flight its error: an engine that is shared has died, which vLLM's client can't see."""
        if self._client is not None:
            self._client.engine_core.shutdown()

    def kill(self) -> None:
        """Send SIGKILL to the engine and worker processes that this process started."""
        # Not by descent: a worker whose engine died belongs to init. psutil checks that a pid was not taken over.
        for process in self._processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    async def stop(self) -> None:
        """End the engine process. Whatever is still in flight is aborted."""
        await self._stack.aclose()
        if self._adapters is not None:
            await self._adapters.stop()
        if self._client is not None:
            # It would take the engine's end, which is meant, for its death.
            outputs = self._client.output_handler
            if outputs is not None:
                outputs.cancel()
                await asyncio.gather(outputs, return_exceptions=True)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.to_thread(self._client.shutdown, 5.0), 15.0)
            self.kill()

    # What it is

    @property
    def client(self) -> AsyncLLM:
        """vLLM's client; only after `start`."""
        if self._client is None:
            raise RuntimeError("the engine is not started")
        return self._client

    @property
    def app(self) -> FastAPI:
        """vLLM's own HTTP app; only after `start`."""
        if self._app is None:
            raise RuntimeError("the engine is not started")
        return self._app

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
    def media(self) -> frozenset[str]:
        """What the model takes beside text: of `image`, `audio` and `video`, those that vLLM lets a prompt have."""
        processor = getattr(self.client.renderer, "mm_processor", None)
        limits = {} if processor is None else processor.info.allowed_mm_limits
        return frozenset(medium for medium in ("image", "audio", "video") if limits.get(medium, 0) > 0)

    @property
    def prioritizes(self) -> bool:
        """Whether requests are scheduled by their priority."""
        return bool(self._args.scheduling_policy == "priority")

    @property
    def shows_logprobs(self) -> bool:
        """Whether answers may have log probabilities."""
        return True

    @property
    def special_tokens(self) -> frozenset[int]:
        """Ids of the tokenizer's special tokens, which stand for no text."""
        if self._special_tokens is None:
            self._special_tokens = frozenset(self.client.get_tokenizer().all_special_ids)
        return self._special_tokens

    @property
    def tasks(self) -> tuple[str, ...]:
        """vLLM's names of what the model can do."""
        return self._tasks

    @property
    def names(self) -> list[str]:
        """Served names of the base model, first one first."""
        return [path.name for path in self.app.state.openai_serving_models.base_model_paths]

    def models(self) -> list[ModelInfo]:
        """All names that clients can ask for: base model, adapters, and adapters that were unloaded."""
        registry = self.app.state.openai_serving_models
        found = [ModelInfo(p.name, p.model_path, None, self.served) for p in registry.base_model_paths]
        found += [self._info(each) for each in self.adapters.all()]
        return found

    def find(self, name: str) -> ModelInfo | None:
        """The model of that name, loaded or not, or None. `base:adapter` names an adapter too."""
        for path in self.app.state.openai_serving_models.base_model_paths:
            if path.name == name:
                return ModelInfo(path.name, path.model_path, None, self.served)
        adapter = self.adapters.find(name)
        return None if adapter is None else self._info(adapter)

    def plain(self, name: str) -> str:
        """A name that was asked for, as lists have it, whether there is such a model or not."""
        return name if name in self.names else self.adapters.plain(name)

    def _info(self, adapter: Adapter) -> ModelInfo:
        declared, loaded = adapter.declared, self.served and adapter.version is not None
        return ModelInfo(declared.name, declared.source, self.names[0], loaded, adapter.error)

    def serves(self, name: str) -> bool:
        """Whether requests may ask for this name now, of an adapter the plain one."""
        return name in self.names or name in self.adapters.served_names()

    def adapters_by_state(self) -> dict[str, int]:
        """Number of adapters in each state."""
        return self.adapters.by_state()

    async def openai_models(self) -> ModelList:
        """OpenAI's list of models as vLLM makes it."""
        models = await self.app.state.openai_serving_models.show_available_models()
        body: ModelList = models.model_dump()
        return body

    @property
    def adapters(self) -> AdapterRegistry:
        """The adapters; only after `start`."""
        if self._adapters is None:
            raise RuntimeError("the engine is not started")
        return self._adapters

    def adapter_name(self, key: str) -> str:
        """The name that clients know for a `LoRARequest.lora_name`, which names one content of an adapter."""
        return key if self._loras is None else self._loras.plain(key)

    @property
    def caches_prefixes(self) -> bool:
        """Whether the prefix cache is on."""
        return bool(self.client.vllm_config.cache_config.enable_prefix_caching)

    # Work

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
            stream = self.client.generate(
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

        state = self.app.state
        reject_unknown_options(job.options)
        if isinstance(job.prompt, list) and not job.options.get("truncate_prompt_tokens"):
            most = self.client.model_config.max_model_len
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
        handler = getattr(self.app.state, handler_name, None)
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
        grammar_alone = self.client.vllm_config.kv_transfer_config is None
        return translate(error, request_id, started, self.client.errored, grammar_alone)
