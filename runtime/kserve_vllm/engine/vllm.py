"""The engine: vLLM's client and app in this process, and what is done with them.

vLLM moves its modules between minor versions; whatever moves is mended here. Imports of vLLM stand inside functions,
because they take seconds and the process has to answer probes before them.

Written against vLLM 0.32 and 0.33; `compat` holds the table of what is leant on.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import logging
import os
import signal
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING, TypeVar

import psutil

from kserve_vllm.adapters.registry import AdapterRegistry
from kserve_vllm.core.fingerprint import fingerprint
from kserve_vllm.core.supervisor_channel import SupervisorChannel
from kserve_vllm.core.types import TextJob
from kserve_vllm.engine.arguments import configure
from kserve_vllm.engine.compat import Shortcuts
from kserve_vllm.engine.cpu_affinity import leave_processors_of
from kserve_vllm.engine.hooks import guards
from kserve_vllm.engine.hooks.accounting import TokenAccounting
from kserve_vllm.engine.hooks.answer_shape import leave_out_nulls
from kserve_vllm.engine.hooks.anthropic_repair import mend_messages
from kserve_vllm.engine.hooks.media import fetch_from_outside
from kserve_vllm.engine.hooks.request_repair import Mender, mender_of
from kserve_vllm.engine.hooks.responses_repair import mend_responses
from kserve_vllm.engine.hooks.stored_responses import keep_apart
from kserve_vllm.engine.hooks.submission import AnswerCache, Lookup, SequenceChecks, SubmissionHooks
from kserve_vllm.engine.loras import LoRAs
from kserve_vllm.engine.patches.inline_rendering import ShortPrompts, render_short_prompts_in_place
from kserve_vllm.engine.patches.late_text import make_texts_at_the_end
from kserve_vllm.engine.patches.plain_outputs import process_plain_outputs_apart
from kserve_vllm.engine.served_models import ServedModels
from kserve_vllm.engine.text_tasks import TextTasks

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.middleware import Middleware
    from vllm.v1.engine.async_llm import AsyncLLM

log = logging.getLogger(__name__)
L = TypeVar("L", bound=Lookup)


IDLE_WORKERS_EVERY_S = 300.0
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


async def _sign_of_life(client: AsyncLLM, with_workers: bool) -> None:
    """Return once the engine's step loop has answered, and its workers with it."""
    if with_workers:
        await client.collective_rpc("check_health")
    else:
        # Answered between two steps, from the scheduler's own state.
        await client.is_paused()


class VLLMEngine:
    """vLLM's engine in its own process, and its HTTP app.

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
        self.accounting: TokenAccounting | None = None
        """The accounting of what the engine works on; only after `start`."""
        self.mender: Mender
        """Mends what clients send to vLLM's routes; only after `start`."""
        self.submission: SubmissionHooks[Lookup] | None = None
        """Before the engine, where policies stand before it."""
        self.short_prompts: ShortPrompts | None = None
        """What short prompts are made with, where that is not vLLM's alone."""
        self.models: ServedModels
        """The names that clients may ask for; only after `start`."""
        self.text: TextTasks
        """What V1 and V2 have done; only after `start`."""

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
        self.accounting = TokenAccounting(client.output_processor, lambda: self.models.names[0], loras)
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
        state = self._app.state
        self.models = ServedModels(state.openai_serving_models, self._adapters)
        prioritizes = bool(self._args.scheduling_policy == "priority")
        self.text = TextTasks(client, state, self._tasks, self.models, prioritizes)

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
        no longer looks at that: the middleware does, for all routes."""
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

    def stand_before(self, sequences: SequenceChecks[L], cache: AnswerCache[L] | None = None) -> None:
        """Let `sequences` decide about every sequence from now on, and `cache` answer those that it knows."""
        prioritized = self._args.scheduling_policy == "priority"
        model = f"{self._fingerprint()} {self.client.model_config.dtype}" if cache is not None else ""
        assert self._loras is not None
        guards.check_models(sequences, self._loras.plain, self.models.plain)
        self.submission = SubmissionHooks(
            self.client, sequences, prioritized, cache, model, lambda: self.models.names[0], self._loras.plain
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

        if self.text.generates:
            job = TextJob(self.models.names[0], "warm-up", prompt=[1], options={"max_tokens": 1, "temperature": 0.0})
            async for _ in self.text.generate(job):
                pass
        elif self.text.embeds:
            await self.text.embed(self.models.names[0], ["warm-up"], {}, "warm-up")
        if self._channel is None:
            self._processes = psutil.Process().children(recursive=True)
            # Several front ends need more than the one processor that vLLM leaves.
            if current_platform.is_cpu():
                leave_processors_of(self._processes)
        # vLLM's engine does so too; its front end would read a variable of the environment for every token.
        envs.enable_envs_cache()
        # What is here stays, and is not looked through any more, which vLLM's lifespan would do: it takes a second.
        gc.freeze()
        gc.enable()
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
        workers_due = loop.time() + IDLE_WORKERS_EVERY_S
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
                    workers_due = now + IDLE_WORKERS_EVERY_S
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
    def media(self) -> frozenset[str]:
        """What the model takes beside text: of `image`, `audio` and `video`, those that vLLM lets a prompt have."""
        processor = getattr(self.client.renderer, "mm_processor", None)
        limits = {} if processor is None else processor.info.allowed_mm_limits
        return frozenset(medium for medium in ("image", "audio", "video") if limits.get(medium, 0) > 0)

    @property
    def tasks(self) -> tuple[str, ...]:
        """vLLM's names of what the model can do."""
        return self._tasks

    @property
    def adapters(self) -> AdapterRegistry:
        """The adapters; only after `start`."""
        if self._adapters is None:
            raise RuntimeError("the engine is not started")
        return self._adapters
