"""The one path of a request: who is it, may it pass now, in which class, and is anything still in flight.

Every protocol passes it once per request; nothing here runs per token. What enforcement asks for is off by default, and
what is off costs nothing. The order of the policies stands here and nowhere else: `Enforcement.enforce` for what is
asked of a request, `SequencePolicy.take_up` for what is asked of each sequence of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Protocol

from kserve_vllm.core.errors import EngineGone, Forbidden, InvalidRequest, RateLimited, Unavailable
from kserve_vllm.core.lifecycle import Lifecycle, State
from kserve_vllm.core.request_context import RequestContext, Rights, current
from kserve_vllm.core.types import Priority, Work
from kserve_vllm.policy.priority_queue import PriorityQueue, Slot
from kserve_vllm.policy.quotas.limiter import Quota, RateLimiter
from kserve_vllm.policy.tenants import Caller, Tenants

if TYPE_CHECKING:
    from kserve_vllm.policy.moderation.hooks import AnswerFilter, Moderation
    from kserve_vllm.policy.response_cache import CacheLookup

_RETRY_LOADING_S = 5
_RETRY_DRAINING_S = 1


class Kind(Enum):
    """What a request wants: to know something, to put the model to work, or to change the server's state."""

    QUESTION = "question"
    WORK = "work"
    CONTROL = "control"


@dataclass
class Policies:
    """What decides about requests; None for what is off.

    Attributes:
        tenants: who is asking.
        limits: requests and tokens per minute, and requests at once.
        service: limits of the whole service.
        admission: the queue in front of the engine.
        moderation: looks at prompts and answers.
        default_priority: class of requests for which neither tenant nor tier names one.
        open_control: whether everybody may change the server's state where there is no key file.
    """

    tenants: Tenants = field(default_factory=Tenants)
    limits: RateLimiter | None = None
    service: Quota | None = None
    admission: PriorityQueue | None = None
    moderation: Moderation | None = None
    default_priority: Priority | None = None
    open_control: bool = False


class ServedNames(Protocol):
    """What enforcement needs of the engine: the names of the base model."""

    @property
    def names(self) -> list[str]:
        """Served names of the base model."""


class Enforcement:
    """Admits requests while the server is ready and counts those in flight.

    Args:
        lifecycle: whether the server is ready.
        policies: who may ask for what.
    """

    def __init__(self, lifecycle: Lifecycle, policies: Policies | None = None) -> None:
        self._lifecycle = lifecycle
        self._policies = policies or Policies()
        self._in_flight = 0
        self._closed = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def in_flight(self) -> int:
        """Requests that have entered and not left."""
        return self._in_flight

    @property
    def moderation(self) -> Moderation | None:
        """Looks at prompts and answers, or None."""
        return self._policies.moderation

    def close(self) -> None:
        """Refuse everything new from now on. What is in flight goes on."""
        self._closed = True

    def refusal(self, needs_model: bool = True) -> Unavailable | None:
        """Why a request that arrives now is refused, or None if it may pass.

        Args:
            needs_model: False for a request about models, such as one that loads them; those pass while the base
                model is unloaded.
        """
        life = self._lifecycle
        if life.state is State.FAILED:
            return EngineGone(life.sentence(), retry_after_s=_RETRY_LOADING_S, close=True)
        if self._closed or life.state is State.STOPPED:
            return Unavailable(life.sentence(), retry_after_s=_RETRY_DRAINING_S, close=True)
        if life.ready or life.state is State.DRAINING:
            return None
        if life.state is State.READY and not needs_model:
            return None
        return Unavailable(life.sentence(), retry_after_s=_RETRY_LOADING_S)

    @contextmanager
    def enter(self, needs_model: bool = True) -> Iterator[None]:
        """Count one request for as long as the block runs.

        Args:
            needs_model: as for `refusal`.

        Raises:
            Unavailable: the server is loading, draining or unloaded.
            EngineGone: the engine is dead.
        """
        refusal = self.refusal(needs_model)
        if refusal is not None:
            raise refusal
        self._in_flight += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self._idle.set()

    async def wait_idle(self, timeout_s: float) -> bool:
        """Wait until nothing is in flight; False if that takes longer than `timeout_s` seconds."""
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    # Policies

    @asynccontextmanager
    async def enforce(
        self,
        context: RequestContext,
        headers: Mapping[str, str],
        kind: Kind,
        *,
        check: Callable[[], None] | None = None,
        body: Callable[[], Awaitable[None]] | None = None,
        waiting: Callable[[Awaitable[Slot]], Awaitable[Slot]] | None = None,
        moderate: Callable[[], Awaitable[None]] | None = None,
        owner: tuple[str, str | None] | None = None,
    ) -> AsyncIterator[Caller]:
        """Ask all policies about one request, in their order, and count it for as long as the block runs.

        1. key: who is asking;
        2. what the protocol knows against the request (`check`), told to nobody without a key;
        3. permission, for what changes the server's state;
        4. state: loading, draining, unloaded;
        5. the body has come (`body`): a client that sends nothing holds no place of what follows;
        6. limits, then the queue, for work;
        7. moderation (`moderate`), for work whose texts are known already; else where they are known.

        The engine asks `SequencePolicy` about each sequence after that: model, tokens, class, then the response cache.

        Args:
            request context: of this request.
            headers: with lower-case names; or metadata.
            kind: what the request is.
            check, body, moderate: what a protocol does at these steps.
            waiting: as for `admit`.
            owner: tenant and key id of who asked for this before, as for the requests of a batch; instead of a key.

        Raises:
            RequestError: a policy refuses the request.
        """
        key, wanted = headers_of(headers)
        caller = self.identify(context, key) if owner is None else self.recall(context, *owner)
        if check is not None:
            check()
        if kind is Kind.CONTROL:
            self.check_control(caller)
        with self.enter(needs_model=kind is Kind.WORK):
            if body is not None:
                await body()
            if kind is Kind.WORK:
                context.access.cache_control = headers.get("cache-control", "").lower()
                await self.admit(context, caller, wanted, waiting)
                if moderate is not None and self.moderation is not None:
                    await moderate()
            yield caller

    def identify(self, context: RequestContext, key: str | None) -> Caller:
        """Find out who is asking, and write it on the request context.

        Raises:
            Unauthenticated: the key is missing, wrong or expired.
        """
        caller = self._policies.tenants.identify(key)
        access = context.access
        access.caller, access.tenant, access.key_id = caller, caller.tenant, caller.key_id
        return caller

    def recall(self, context: RequestContext, tenant: str, key_id: str | None) -> Caller:
        """Find out what a caller may do now that was identified before, and write it on the request context.

        Raises:
            Unauthenticated: its key is not valid any more.
        """
        caller = self._policies.tenants.recall(tenant, key_id)
        access = context.access
        access.caller, access.tenant, access.key_id = caller, caller.tenant, caller.key_id
        return caller

    def check_control(self, caller: Caller) -> None:
        """Let only administrators change the server's state.

        Raises:
            Forbidden: the key is not an administrator's; or there is no key file, and no flag opens these calls.
        """
        if self._policies.tenants.has_file:
            if not caller.admin:
                raise Forbidden("this call needs a key that is marked `admin` in the key file", reason="not_admin")
        elif not self._policies.open_control:
            raise Forbidden(
                "calls that change the server's state are switched off; --allow-model-control opens them to everyone, "
                "--keys-file to administrators",
                reason="control_closed",
            )

    def check_operator(self, caller: Rights) -> None:
        """Let only administrators see what concerns all tenants, where there is a key file.

        Raises:
            Forbidden: the key is not an administrator's.
        """
        if self._policies.tenants.has_file and not caller.admin:
            raise Forbidden("this call needs a key that is marked `admin` in the key file", reason="not_admin")

    async def admit(
        self,
        context: RequestContext,
        caller: Caller,
        wanted: str | None = None,
        waiting: Callable[[Awaitable[Slot]], Awaitable[Slot]] | None = None,
    ) -> None:
        """Pass the limits and the queue. Whatever is taken is given back when the request context closes.

        Args:
            request context: of this request.
            caller: from `identify`.
            wanted: the class that the client asks for, or None.
            waiting: waits for an awaitable, or gives it up when the client goes away.

        Raises:
            InvalidRequest: there is no such class.
            Forbidden: the tenant may not choose its class.
            RateLimited: over a limit, or no room in the queue.
            QueueTimeout: waited too long.
        """
        policies = self._policies
        if policies.limits is None and policies.admission is None and policies.default_priority is None:
            return
        priority = self._priority(caller, wanted)
        context.access.priority = priority
        if policies.limits is not None:
            try:
                grant = await policies.limits.enter(self._quotas(caller))
            except RateLimited as error:
                context.answer_headers += error.headers
                raise
            context.access.grant = grant
            limits = policies.limits
            context.closers.append(
                lambda t: limits.settle(
                    grant, t.engine.prompt_tokens + t.engine.output_tokens - t.engine.replayed_tokens
                )
            )
            context.answer_headers += grant.headers()
        if policies.admission is not None:
            acquiring = policies.admission.acquire(priority)
            if waiting is None or policies.admission.passes(priority):
                slot = await acquiring
            else:
                slot = await waiting(acquiring)
            context.closers.append(lambda _: slot.release())

    def _priority(self, caller: Caller, wanted: str | None) -> Priority:
        own = caller.priority if caller.priority is not None else self._policies.default_priority
        own = Priority.NORMAL if own is None else own
        if wanted is None:
            return own
        try:
            chosen = Priority[wanted.strip().upper()]
        except KeyError:
            names = ", ".join(each.name.lower() for each in Priority)
            raise InvalidRequest(f"x-priority: {wanted!r} is none of {names}", field="x-priority") from None
        # Stepping back is open to everyone.
        if chosen < own and not caller.may_choose_priority and self._policies.tenants.has_file:
            raise Forbidden(
                f"this tenant may not choose the class {chosen.name.lower()}; its own is {own.name.lower()}",
                field="x-priority",
                reason="priority_not_allowed",
            )
        return chosen

    def _quotas(self, caller: Caller) -> list[Quota]:
        quotas = [self._policies.service] if self._policies.service is not None else []
        for kind, name, limits in (
            ("tenant", caller.tenant, caller.tenant_limits),
            ("key", caller.key_id, caller.key_limits),
        ):
            if any(value is not None for _, value in limits):
                quotas.append(Quota(f"{kind}:{name}", **limits.model_dump()))
        return quotas


class SequencePolicy:
    """What the engine asks before it takes up a sequence: the same for every protocol.

    Args:
        policies: as enforcement's.
        engine: for the names of the base model.
    """

    def __init__(self, policies: Policies, engine: ServedNames) -> None:
        self._policies = policies
        self._engine = engine

    async def take_up(self, context: RequestContext, work: Work) -> None:
        """Check the model, and reserve the tokens that the sequence may use.

        Raises:
            Forbidden: the caller may not use this model.
            RateLimited: there are not that many tokens left.
        """
        self.permit(context, work.adapter)
        grant = context.access.grant
        if grant is not None:
            try:
                await grant.reserve(work.tokens)
            finally:
                others = [pair for pair in context.answer_headers if not pair[0].startswith("x-ratelimit-")]
                context.answer_headers[:] = [*others, *grant.headers()]

    def permit(self, context: RequestContext, adapter: str | None, asked: str | None = None) -> None:
        """Let a request use the base model, under any of its names, or an adapter.

        Args:
            request context: of the request.
            adapter: or a name of the base model; None for that, too. It need not be there.
            asked: the model's name as the client wrote it, where it is known.

        Raises:
            Forbidden: the caller may not use it.
        """
        caller = context.access.caller
        if caller is None or not caller.models:
            return
        base = self._engine.names
        if not caller.may_use(base if adapter is None or adapter in base else [adapter]):
            raise _not_allowed(asked or adapter)

    def knows_base(self, context: RequestContext) -> bool:
        """Whether the caller of a request may know the names of the base model."""
        caller = context.access.caller
        return caller is None or not caller.models or caller.may_use(self._engine.names)

    def answer_filter(self, context: RequestContext) -> AnswerFilter | None:
        """A filter for one answer to this request, or None where nobody looks at its answers."""
        moderation = self._policies.moderation
        return moderation.answer(context.access.tenant) if moderation is not None else None

    def asking(self, context: RequestContext, request_id: str) -> CacheLookup | None:
        """This request's side of the response cache, or None where its client wants none of it."""
        from kserve_vllm.policy.response_cache import CacheLookup, Use, allowed_use

        use = allowed_use(context.access.cache_control)
        if use is Use.NONE:
            return None
        return CacheLookup(context, request_id, context.access.priority or 0, use is Use.FRESH)


def may_see(engine: ServedNames, name: str) -> bool:
    """Whether the caller of the running request gets to know of a model or adapter.

    That is who may use it, and an administrator, who may change the server's state.

    Args:
        engine: for the names of the base model, which is allowed under any of them.
        name: of the model or adapter, as lists have it.
    """
    context = current.get()
    caller = context.access.caller if context is not None else None
    if caller is None or not caller.models or caller.admin:
        return True
    return caller.may_use(engine.names if name in engine.names else [name])


def check_permitted(engine: ServedNames, name: str, plain: str) -> None:
    """Let the caller of the running request ask a model for work, by its name, before anybody looks whether it is
    there: else the answers would tell which of the others are.

    Args:
        engine: for the names of the base model, which is allowed under any of them.
        name: as it was asked for.
        plain: the same as lists have it.

    Raises:
        Forbidden: its key is limited to others.
    """
    if not may_see(engine, plain):
        raise _not_allowed(name)


def _not_allowed(name: str | None) -> Forbidden:
    """The refusal of a model, with no name but the one that was asked for: the caller may not know the others."""
    what = "the base model" if name is None else f"the model {name!r}"
    return Forbidden(f"this key may not use {what}", field="model", reason="model_not_allowed")


def headers_of(values: Mapping[str, str]) -> tuple[str | None, str | None]:
    """The API key and the class that a client sent, from headers or metadata with lower-case names.

    The key is `Authorization: Bearer KEY`, or `x-api-key: KEY`, as Anthropic's clients send it.
    """
    scheme, _, key = values.get("authorization", "").partition(" ")
    found = key.strip() if scheme.lower() == "bearer" else None
    return found or values.get("x-api-key") or None, values.get("x-priority")
