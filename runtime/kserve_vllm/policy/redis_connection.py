"""Redis or Valkey, for whoever can do without it for a while.

A call is answered, or fails after `--redis-timeout` and a little; once one has failed, the next ones fail at once, and
a probe in the background finds out when the server is back. No request waits for a server that is known to be away.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

import structlog

from kserve_vllm.core.errors import ConfigError, KServeVLLMError

if TYPE_CHECKING:
    from redis.asyncio import Redis

T = TypeVar("T")

_TIMEOUT_S = 0.25
_PROBE_S = 1.0  # at most, between two probes
_FIRST_PROBE_S = 0.1
_LATE_S = 0.05  # a timer that fires this late says that our own loop was busy, not that the server is slow
_GRACE_S = 0.1
# Calls; the others wait for their turn before their time begins. More would not be faster, since it is this process
# that is busy with them, and each would take longer.
_AT_ONCE = 8

_log = structlog.stdlib.get_logger(__name__)


class RedisUnavailable(KServeVLLMError):
    """The server did not answer, or answered that it can't.

    Attributes:
        sent: whether the call may have been carried out all the same.
    """

    def __init__(self, message: str, sent: bool) -> None:
        super().__init__(message)
        self.sent = sent


class RedisConnection:
    """A client of one Redis or Valkey server (or of a proxy; it does not follow a cluster's redirections).

    Nothing is connected before the first call. Calls are not repeated: what was sent may have been carried out.

    Args:
        url: `redis://`, `rediss://`, `valkey://`, `valkeys://` or `unix://`, with user, password and database.
        on_state: told False when the server is lost and True when it is back; the start counts as there.
        timeout_s: seconds for one call, connecting included.

    Raises:
        ConfigError: the URL can't be used.
    """

    def __init__(
        self, url: str, on_state: Callable[[bool], None] = lambda there: None, timeout_s: float = _TIMEOUT_S
    ) -> None:
        # Here, not above: the limits import this module also without a Redis, and this takes a quarter of a second.
        from redis.asyncio import Redis
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff
        from redis.exceptions import RedisError
        from redis.maint_notifications import MaintNotificationsConfig

        self._errors: tuple[type[Exception], ...] = (RedisError, OSError)
        scheme, separator, rest = url.partition("://")
        scheme = {"valkey": "redis", "valkeys": "rediss"}.get(scheme, scheme)
        try:
            # Timeouts are ours alone: the client's own can't tell a slow server from a busy event loop.
            self._client: Redis = Redis.from_url(
                scheme + separator + rest,
                socket_timeout=None,
                socket_connect_timeout=None,
                retry=Retry(NoBackoff(), 0),
                # While they are on, a connection that the server has closed meanwhile is not told from a good one, so
                # a server that was started again between two calls would be lost at the second.
                maint_notifications_config=MaintNotificationsConfig(enabled=False),
                max_connections=2 * _AT_ONCE,
            )
        except ValueError:
            # The client's own words may have a part of a password in them that was taken for a port.
            raise ConfigError(
                "--redis-url can't be read: write redis://user:password@host:6379/0 or rediss://..., "
                "with %-escapes for / # ? : @ in the name and the password"
            ) from None
        self._on_state = on_state
        self._timeout_s = timeout_s
        self._turns = asyncio.Semaphore(_AT_ONCE)
        self._probe: asyncio.Task[None] | None = None
        self._pause_s = _FIRST_PROBE_S
        self._closed = False

    @property
    def there(self) -> bool:
        """Whether the server answered when it was asked last."""
        return self._probe is None

    async def call(self, work: Callable[[Redis], Awaitable[T]]) -> T:
        """Do something with the server.

        Args:
            work: gets the client, which gives answers as bytes.

        Raises:
            Away: no answer in time, or an error for an answer.
        """
        if self._probe is not None:
            raise RedisUnavailable("Redis is away", sent=False)
        async with self._turns:
            if self._probe is not None or self._closed:
                raise RedisUnavailable("Redis is away", sent=False)
            try:
                answer = await self._in_time(work)
            except self._errors as error:
                self._lost(error)
                raise RedisUnavailable(_sentence(error), sent=True) from error
        self._pause_s = _FIRST_PROBE_S
        return answer

    async def close(self) -> None:
        """Stop probing and close the connections."""
        self._closed = True
        if self._probe is not None:
            self._probe.cancel()
            await asyncio.gather(self._probe, return_exceptions=True)
        with contextlib.suppress(*self._errors):
            await self._client.aclose()

    async def _in_time(self, work: Callable[[Redis], Awaitable[T]]) -> T:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(None) as limit:
            timer: asyncio.TimerHandle

            def check(due: float) -> None:
                nonlocal timer
                now = loop.time()
                if now - due < _LATE_S:
                    limit.reschedule(now)
                else:  # the answer may lie in the socket, unread
                    timer = loop.call_at(now + _GRACE_S, check, now + _GRACE_S)

            due = loop.time() + self._timeout_s
            timer = loop.call_at(due, check, due)
            try:
                return await work(self._client)
            finally:
                timer.cancel()

    def _lost(self, error: Exception) -> None:
        if self._probe is not None or self._closed:
            return
        _log.warning("redis is away", error=_sentence(error))
        self._probe = asyncio.get_running_loop().create_task(self._find(), name="redis probe")
        self._on_state(False)

    async def _find(self) -> None:
        while True:
            await asyncio.sleep(self._pause_s)
            # Not reset before a real call has passed: a server that refuses our calls but not the probe
            # would be lost and found many times a second.
            self._pause_s = min(_PROBE_S, 2 * self._pause_s)
            try:
                # Written, since a server without memory or a replica would answer a PING.
                await self._in_time(lambda client: client.set("{kserve-vllm}:probe", b"1", px=1000))
            except self._errors:
                continue
            break
        self._probe = None
        _log.info("redis is back")
        self._on_state(True)


def _sentence(error: Exception) -> str:
    return str(error) or type(error).__name__
