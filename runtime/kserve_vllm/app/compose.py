"""Builds the policies out of the settings. What is off is not built, and its libraries are not imported."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kserve_vllm.config.settings import Settings
from kserve_vllm.core.errors import ConfigError
from kserve_vllm.core.request_context import RequestContext
from kserve_vllm.core.types import Priority
from kserve_vllm.policy.enforcement import Policies
from kserve_vllm.policy.priority_queue import PriorityQueue, class_values
from kserve_vllm.policy.quotas.counters import MemoryCounters, RedisCounters
from kserve_vllm.policy.quotas.limiter import Quota, RateLimiter
from kserve_vllm.policy.tenants import Tenants
from kserve_vllm.policy.usage import Usage, UsageRecord, timestamp
from kserve_vllm.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from kserve_vllm.policy.moderation.hooks import Moderation
    from kserve_vllm.policy.redis_connection import RedisConnection
    from kserve_vllm.policy.response_cache import ResponseCache

log = logging.getLogger(__name__)

_RELOAD_EVERY_S = 2.0
_SHARES = {Priority.LOW: 0.75, Priority.BATCH: 0.5}


class Composition:
    """The policies of one process, and what has to run and to be closed for them.

    Args:
        settings: the effective settings.
        metrics: shows whether Redis is there, and what became of usage records.

    Raises:
        ConfigError: a file or a value can't be used.
    """

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings = chosen = settings.policy
        self._metrics = metrics
        self._cache: ResponseCache[Any] | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._tenants = Tenants(chosen.keys_file, (key.get_secret_value() for key in settings.server.api_key))
        self._remote = self._connect(settings)
        self._limits = self._build_limits(settings)
        self.admission = self._build_admission(settings)
        self.usage: Usage | None = None
        if chosen.usage_sink:
            self.usage = Usage(chosen.usage_sink.get_secret_value(), metrics.count_usage)
        self.moderation = self._build_moderation(settings)
        classes = chosen.keys_file is not None or chosen.max_concurrent > 0 or _scheduled_by_class(settings)
        service = Quota("service", chosen.requests_per_minute or None, chosen.tokens_per_minute or None, None)
        self.policies = Policies(
            tenants=self._tenants,
            limits=self._limits,
            service=service if chosen.requests_per_minute or chosen.tokens_per_minute else None,
            admission=self.admission,
            moderation=self.moderation,
            default_priority=Priority[chosen.default_priority.upper()] if classes else None,
            open_control=settings.server.allow_model_control,
        )
        metrics.watch(self._show)

    def _show(self, metrics: Metrics) -> None:
        metrics.show_key_file_failures(self._tenants.failures)
        if self.admission is not None:
            classes = self.admission.stats()["classes"]
            metrics.set_waiting({name: each["waiting"] for name, each in classes.items()})

    def _connect(self, settings: Settings) -> RedisConnection | None:
        url = settings.policy.redis_url
        if url is None:
            if settings.policy.response_cache == "redis":
                raise ConfigError("--response-cache redis needs --redis-url")
            return None
        from kserve_vllm.policy.redis_connection import RedisConnection

        self._metrics.show_redis(True)
        return RedisConnection(url.get_secret_value(), self._metrics.show_redis, settings.policy.redis_timeout)

    def _build_limits(self, settings: Settings) -> RateLimiter | None:
        chosen = settings.policy
        if not (chosen.keys_file or chosen.requests_per_minute or chosen.tokens_per_minute):
            return None
        if self._remote is None:
            return RateLimiter(MemoryCounters())
        return RateLimiter(RedisCounters(self._remote), chosen.redis_away)

    def _build_moderation(self, settings: Settings) -> Moderation | None:
        if settings.policy.moderation_file is None:
            return None
        from kserve_vllm.policy.moderation.hooks import Moderation

        return Moderation(settings.policy.moderation_file, self._metrics.count_verdict)

    def _build_admission(self, settings: Settings) -> PriorityQueue | None:
        chosen = settings.policy
        if not chosen.max_concurrent:
            return None
        sizes = {each: int(n) for each, n in class_values(chosen.queue_class_size, "--queue-class-size").items()}
        shares = {**_SHARES, **class_values(chosen.class_share, "--class-share")}
        return PriorityQueue(chosen.max_concurrent, chosen.queue_size, sizes, chosen.queue_timeout, shares)

    def record(self, context: RequestContext) -> None:
        """Write the usage record of a request that is over. Questions have none."""
        if self.usage is None or context.quiet:
            return
        self.usage.record(_usage(context))

    def build_cache(
        self, hand_over: Callable[[RequestContext, RequestContext, str], None]
    ) -> ResponseCache[Any] | None:
        """The response cache, or None.

        Args:
            hand_over: records what is open of a generation on another request context.
        """
        chosen = self._settings
        if chosen.response_cache == "off":
            return None
        from kserve_vllm.engine.hooks.cache_codec import CacheCodec
        from kserve_vllm.policy import response_cache

        store: response_cache.AnswerStore = response_cache.MemoryStore(chosen.cache_max_mib << 20, chosen.cache_ttl)
        if chosen.response_cache == "redis":
            assert self._remote is not None
            store = response_cache.RedisStore(self._remote, chosen.cache_ttl)
        self._cache = response_cache.ResponseCache(store, CacheCodec(), chosen.cache_scope, hand_over=hand_over)
        return self._cache

    @property
    def decides(self) -> bool:
        """Whether anything has to be asked before the engine takes up a sequence."""
        policies = self.policies
        return bool(
            policies.tenants.has_file
            or policies.limits is not None
            or policies.default_priority is not None
            or policies.moderation is not None
            or self._settings.response_cache != "off"
        )

    def queue_stats(self) -> dict[str, object]:
        """What runs and what waits in front of the engine."""
        if self.admission is None:
            return {"slots": 0, "in_use": 0, "waiting": 0}
        return dict(self.admission.stats())

    def start(self) -> None:
        """Begin to watch the key file."""
        if self._tenants.has_file:
            self._tasks.append(asyncio.create_task(_every(_RELOAD_EVERY_S, self._tenants.reload)))

    async def close(self, timeout_s: float) -> None:
        """Write what is still to be written, for up to `timeout_s` seconds, and close connections."""
        for task in self._tasks:
            task.cancel()
        if self.admission is not None:
            self.admission.close()
        if self._cache is not None:
            await self._cache.close()
        if self._limits is not None:
            await self._limits.close()
        if self.usage is not None:
            await self.usage.close(timeout_s)
        if self.moderation is not None:
            await self.moderation.close()
        if self._remote is not None:
            await self._remote.close()


async def _every(seconds: float, work: Callable[[], object]) -> None:
    while True:
        await asyncio.sleep(seconds)
        try:
            await asyncio.to_thread(work)
        except Exception:
            log.exception("will be tried again")


def _scheduled_by_class(settings: Settings) -> bool:
    """Whether the engine schedules by priority, which is the class of a request, and nothing that its body says."""
    chosen = [flag for flag in settings.engine if flag.name == "scheduling-policy"]
    return bool(chosen) and chosen[-1].tokens[-1].rpartition("=")[2] == "priority"


def _usage(context: RequestContext) -> UsageRecord:
    return UsageRecord(
        time=timestamp(context.started_at),
        request_id=context.request_id,
        tenant=context.access.tenant,
        key_id=context.access.key_id,
        model=context.base_model or context.model,
        adapter=context.adapter,
        protocol=context.protocol,
        endpoint=context.endpoint,
        outcome=context.outcome or "",
        status=context.status,
        prompt_tokens=context.engine.prompt_tokens,
        cached_tokens=context.engine.cached_tokens,
        output_tokens=context.engine.output_tokens,
        duration_s=round(context.duration_s, 6),
        ttft_s=None if context.ttft_s is None else round(context.ttft_s, 6),
        priority=None if context.access.priority is None else Priority(context.access.priority).name.lower(),
        cache=context.cache,
    )
