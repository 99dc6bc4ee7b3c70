"""Before the engine: what is asked once per sequence, in the request's own task, whatever the protocol.

vLLM's routers and our own protocols all call `AsyncLLM.generate` and `AsyncLLM.encode`. There the prompt is tokenized,
the number of tokens to generate is resolved and the adapter is known, so this is where models are permitted, tokens
are reserved and priorities are set. The two methods are replaced on the instance, and only where a policy is on. What
else the client can be called for stands in `ASKED` and `OPERATED`. A method that a newer vLLM adds is in neither, and
is refused, since it may be a way to the engine past the policies.

What is refused here is left on the request context: vLLM's handlers make an error of their own of every exception, and
the middleware answers the one on the request context instead.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence, Sized
from typing import TYPE_CHECKING, Generic, NoReturn, Protocol, TypeVar, cast

from kserve_vllm.core.errors import RequestError
from kserve_vllm.core.fingerprint import fingerprint
from kserve_vllm.core.request_context import RequestContext, current
from kserve_vllm.core.types import Priority, Work
from kserve_vllm.engine.hooks import cache_codec as records
from kserve_vllm.engine.hooks.output_filter import Filter, check_parameters, filtered

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest
    from vllm.outputs import RequestOutput
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM

log = logging.getLogger(__name__)

_OUTCOMES = ("hit", "bypass", "miss")


TAKEN_UP = frozenset({"generate", "encode"})
"""Methods of vLLM's client that take up work, replaced here."""

ASKED = frozenset(
    """abort add_request check_admission check_health dead_error errored get_kv_event_sources get_num_queued_tokens
    get_num_unfinished_requests get_status get_supported_tasks get_tokenizer get_weight_version is_paused is_running
    is_sleeping is_stopped is_tracing_enabled list_loras notify_kv_transfer_request_rejected tokenizer
    wait_for_requests_to_drain""".split()
)
"""What is asked of the client, or is called by `generate` and `encode` alone (`add_request`)."""

OPERATED = frozenset(
    """add_lora checkpoint_prepare checkpoint_restore collective_rpc compute_weight_checksums do_log_stats
    finish_weight_update from_engine_args from_vllm_config handle_fault init_weight_transfer_engine pause_generation
    pin_lora release_kv_cache_memory remove_lora reset_encoder_cache reset_mm_cache reset_prefix_cache
    resume_generation scale_elastic_ep shutdown shutdown_weight_transfer_engine sleep start_draft_weight_update
    start_profile start_weight_update stop_profile update_weight_version update_weights wake_up""".split()
)
"""What changes the engine's state; who may, is decided where it is asked for."""


def unclassified(client: AsyncLLM) -> list[str]:
    """Public methods and properties of vLLM's client that are in none of the lists."""
    known = TAKEN_UP | ASKED | OPERATED
    return [name for name in dir(type(client)) if not name.startswith("_") and name not in known]


class LookupOutcome(Protocol):
    """What a cache did for a request."""

    @property
    def header(self) -> str:
        """The value of `x-cache`: one of `_OUTCOMES`."""


class Lookup(Protocol):
    """One request's side of a cache."""

    @property
    def outcome(self) -> LookupOutcome | None:
        """What became of it; set before the first piece is given."""

    @property
    def pays(self) -> bool:
        """Whether the engine's figures go to this request."""


L_co = TypeVar("L_co", bound=Lookup, covariant=True)
L_contra = TypeVar("L_contra", bound=Lookup, contravariant=True)


class SequenceChecks(Protocol[L_co]):
    """What decides about a sequence."""

    async def take_up(self, context: RequestContext, work: Work) -> None:
        """Let a sequence pass, or raise a `RequestError`."""

    def permit(self, context: RequestContext, adapter: str | None, asked: str | None = None) -> None:
        """Let a request use the base model (None) or an adapter, or raise a `RequestError`."""

    def knows_base(self, context: RequestContext) -> bool:
        """Whether the caller of a request may know the names of the base model."""

    def answer_filter(self, context: RequestContext) -> Filter | None:
        """A filter for one answer to this request, or None where nobody looks at its answers."""

    def asking(self, context: RequestContext, request_id: str) -> L_co | None:
        """This request's side of the cache, or None where its client wants none of it."""


class AnswerCache(Protocol[L_contra]):
    """Answers that were given before."""

    def key(self, request: bytes, *, model: str, adapter: str | None, tenant: str) -> str:
        """Under which an answer is kept."""

    def answer(
        self, key: str, start: Callable[[], AsyncGenerator[records.Record, None]], asking: L_contra
    ) -> AsyncGenerator[records.Record, None]:
        """The pieces of an answer."""


class SubmissionHooks(Generic[L_co]):
    """Stands in front of one vLLM client.

    Args:
        client: vLLM's `AsyncLLM`; its `generate` and `encode` are replaced.
        sequences: decides.
        prioritized: whether vLLM schedules by priority.
        cache: answers that were given before, or None.
        model: tells the weights of the base model from others.
        base_model: tells its served name.
        plain: tells the name of an adapter for its name in the engine.
    """

    def __init__(
        self,
        client: AsyncLLM,
        sequences: SequenceChecks[L_co],
        prioritized: bool,
        cache: AnswerCache[L_co] | None = None,
        model: str = "",
        base_model: Callable[[], str] = str,
        plain: Callable[[str], str] = str,
    ) -> None:
        self._sequences = sequences
        self._cache = cache
        self._model = model
        self._base_model = base_model
        self._plain = plain
        self._prioritized = prioritized
        self._generate, client.generate = client.generate, self.generate
        self._encode, client.encode = client.encode, self.encode
        for name in unclassified(client):
            if callable(getattr(type(client), name)):
                log.warning("vLLM's %s is not used here: it may be a way past the policies", name)
                setattr(client, name, functools.partial(_refuse, name))

    async def generate(
        self, prompt: object, sampling_params: SamplingParams, request_id: str, **options: object
    ) -> AsyncGenerator[RequestOutput, None]:
        """vLLM's `generate`, once the policies let the sequence pass."""
        context = current.get()
        looked_at = context is not None and self._sequences.answer_filter(context) is not None
        if context is not None:
            tokens = _most_tokens(prompt, sampling_params)
            await self._pass(context, options, tokens, sampling_params if looked_at else None)
        stream = None
        if context is not None and self._cache is not None:
            stream = self._cached(self._cache, context, prompt, sampling_params, request_id, options)
        if stream is None:
            stream = self._generate(prompt, sampling_params, request_id, **options)
        async with contextlib.aclosing(stream):
            if context is not None and looked_at:
                cumulative = sampling_params.output_kind.name == "CUMULATIVE"
                new_filter = functools.partial(self._sequences.answer_filter, context)
                stream = filtered(stream, context, cast("Callable[[], Filter]", new_filter), cumulative)
            async for output in stream:
                yield output

    def follows(self) -> bool:
        """Whether the outputs for the running request have to pass `generate`; else `admit` is enough."""
        context = current.get()
        return context is not None and (self._cache is not None or self._sequences.answer_filter(context) is not None)

    async def admit(self, prompt: object, sampling_params: SamplingParams, options: dict[str, object]) -> None:
        """What `generate` asks at its beginning, for who goes on to vLLM alone. A priority is set in `options`.

        Raises:
            RequestError: the policies do not let the sequence pass.
        """
        context = current.get()
        if context is not None:
            await self._pass(context, options, _most_tokens(prompt, sampling_params))

    def _cached(
        self,
        cache: AnswerCache[L_co],
        context: RequestContext,
        prompt: object,
        params: SamplingParams,
        request_id: str,
        options: dict[str, object],
    ) -> AsyncGenerator[RequestOutput, None] | None:
        """The answer out of the cache, or by way of it; None where it passes by."""
        request = records.canonical(
            prompt, params, options.get("reasoning_ended"), options.get("reasoning_parser_kwargs")
        )
        asking = self._sequences.asking(context, request_id) if request is not None else None
        if request is None or asking is None:
            _note(context, "bypass")
            return None
        lora = _adapter(options)
        key = cache.key(
            request,
            model=self._model,
            adapter=fingerprint(lora.lora_path) if lora is not None else None,
            tenant=context.access.tenant,
        )

        def start() -> AsyncGenerator[records.Record, None]:
            return records.records(self._generate(prompt, records.flight_params(params), request_id, **options))

        return self._replay(cache.answer(key, start, asking), asking, context, prompt, params, request_id, lora)

    async def _replay(
        self,
        pieces: AsyncGenerator[records.Record, None],
        asking: Lookup,
        context: RequestContext,
        prompt: object,
        params: SamplingParams,
        request_id: str,
        lora: LoRARequest | None,
    ) -> AsyncGenerator[RequestOutput, None]:
        figures = records.Figures()
        text = prompt.get("prompt") if isinstance(prompt, dict) else None
        # What `canonical` took is one of the two.
        ids = prompt["prompt_token_ids"] if isinstance(prompt, dict) else cast("Sequence[int]", prompt)
        told = False
        outputs = records.replay(pieces, params.output_kind, request_id, ids, text, lora, figures)
        try:
            async with contextlib.aclosing(outputs):
                async for output in outputs:
                    if not told and asking.outcome is not None:
                        told = True
                        _note(context, asking.outcome.header)
                    yield output
        finally:
            if not asking.pays:
                context.base_model = self._base_model()
                context.adapter = self._plain(lora.lora_name) if lora is not None else None
                context.model = context.adapter or context.base_model
                engine = context.engine
                engine.prompt_tokens += figures.prompt_tokens
                engine.output_tokens += figures.output_tokens
                engine.replayed_tokens += figures.prompt_tokens + figures.output_tokens
                engine.finish_reasons += figures.finish_reasons

    async def encode(
        self,
        prompt: object,
        pooling_params: object,
        request_id: str,
        lora_request: LoRARequest | None = None,
        **options: object,
    ) -> AsyncGenerator[object, None]:
        """vLLM's `encode`, once the policies let the text pass."""
        context = current.get()
        options["lora_request"] = lora_request
        if context is not None:
            await self._pass(context, options, _length(prompt))
        stream = self._encode(prompt, pooling_params, request_id, **options)
        async with contextlib.aclosing(stream):
            async for output in stream:
                yield output

    async def _pass(
        self, context: RequestContext, options: dict[str, object], tokens: int, shown: SamplingParams | None = None
    ) -> None:
        lora = _adapter(options)
        adapter = self._plain(lora.lora_name) if lora is not None else None
        try:
            if shown is not None:
                check_parameters(shown)
            await self._sequences.take_up(context, Work(adapter, tokens))
        except RequestError as error:
            context.refusal = error
            raise
        if self._prioritized:
            # Never what the request itself says.
            priority = context.access.priority
            options["priority"] = priority if priority is not None else int(Priority.NORMAL)


def _refuse(name: str, *_: object, **__: object) -> NoReturn:
    raise NotImplementedError(f"{name} is a way to the engine that the policies do not know")


def _most_tokens(prompt: object, params: SamplingParams) -> int:
    return _length(prompt) + (params.max_tokens or 0) * (params.n or 1)


def _adapter(options: Mapping[str, object]) -> LoRARequest | None:
    """The adapter, of the arguments of a call of vLLM's client; None for the base model."""
    return cast("LoRARequest | None", options.get("lora_request"))


def _length(prompt: object) -> int:
    """Tokens of a rendered prompt; 0 where it is not tokenized, as audio that streams in."""
    ids = prompt.get("prompt_token_ids") if isinstance(prompt, dict) else getattr(prompt, "prompt_token_ids", None)
    return len(ids) if isinstance(ids, Sized) else 0


def _note(context: RequestContext, outcome: str) -> None:
    """Tell the client what the cache had: of several prompts in one request, what was worst."""
    if context.cache is None or _OUTCOMES.index(outcome) > _OUTCOMES.index(context.cache):
        context.cache = outcome
        others = [pair for pair in context.answer_headers if pair[0] != "x-cache"]
        context.answer_headers[:] = [*others, ("x-cache", outcome)]
