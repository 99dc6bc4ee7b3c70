"""How much a key, a tenant and the whole service may use: requests and tokens per minute, and requests at once.

A request takes one request and one place of each of its subjects in one step, all or none. Tokens are reserved before
the engine sees a prompt, and settled with what was really used when the request is over.

The package `limits` does not do this: it has no taking of several counters in one step, and no giving back.

While Redis is away, `allow` goes on with counters of this process, so that each replica alone holds the limits (all of
them together may then let pass as many times as much as there are replicas); `deny` refuses with 503.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from kserve_vllm.core.errors import RateLimited, Unavailable
from kserve_vllm.policy.quotas.counters import Ask, CounterAnswer, Counters, Kind, MemoryCounters, RedisCounters
from kserve_vllm.policy.redis_connection import RedisUnavailable

_REASONS: dict[Kind, str] = {
    "requests": "requests_per_minute",
    "tokens": "tokens_per_minute",
    "concurrent": "concurrent",
}
_RETRY_AWAY_S = 1


@dataclass(frozen=True, slots=True)
class Quota:
    """What one subject may use; None where there is no limit.

    Attributes:
        subject: `key:ID`, `tenant:NAME` or `service`.
        requests_per_minute, tokens_per_minute: in any 60 s.
        concurrent: requests at once.
    """

    subject: str
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent: int | None = None


class Grant:
    """What one request was given; made by `RateLimiter.enter`, ended by `RateLimiter.settle`."""

    __slots__ = ("homes", "lease", "limits", "places", "remaining", "reserved", "settled", "token_asks")

    def __init__(self, limits: RateLimiter, places: list[Ask], token_asks: list[Ask], lease: str) -> None:
        self.limits = limits
        self.lease = lease
        self.places = places
        self.token_asks = token_asks
        self.homes: list[Counters] = []  # where the places are held
        self.reserved: list[tuple[Counters, int, int]] = []  # where, bucket, tokens
        self.settled = False
        self.remaining: dict[Kind, tuple[int, int, float]] = {}  # limit, remaining, seconds until all is free

    async def reserve(self, tokens: int) -> None:
        """Reserve tokens for a sequence; as `RateLimiter.reserve`."""
        await self.limits.reserve(self, tokens)

    def headers(self) -> list[tuple[str, str]]:
        """OpenAI's `x-ratelimit-*` headers, of the subject that has least left; empty where nothing is limited."""
        found = []
        for kind, (limit, remaining, reset_s) in self.remaining.items():
            found += [
                (f"x-ratelimit-limit-{kind}", str(limit)),
                (f"x-ratelimit-remaining-{kind}", str(remaining)),
                (f"x-ratelimit-reset-{kind}", _duration(reset_s)),
            ]
        return found

    def note(self, asks: Sequence[Ask], answer: CounterAnswer) -> None:
        """Keep what the headers say."""
        tightest: dict[Kind, tuple[int, int, float]] = {}
        for ask, level in zip(asks, answer.levels, strict=True):
            if ask.kind == "concurrent":
                continue
            left = max(0, ask.limit - level.used)
            other = tightest.get(ask.kind)
            if other is None or left < other[1]:
                tightest[ask.kind] = ask.limit, left, level.reset_s
        self.remaining.update(tightest)


class RateLimiter:
    """Holds requests to their quotas.

    Args:
        store: of this process, or shared by replicas.
        away: what happens while a shared store does not answer: `allow` counts in this process alone, `deny` refuses.
    """

    def __init__(self, store: Counters, away: Literal["allow", "deny"] = "allow") -> None:
        self._store = store
        self._shared = store if isinstance(store, RedisCounters) else None
        self._alone: MemoryCounters | None = None
        if self._shared is not None and away == "allow":
            self._alone = MemoryCounters(self._shared.window_s, self._shared.buckets)
        self._name, self._leases = uuid.uuid4().hex, 0  # no two leases are called the same, in any replica

    async def enter(self, quotas: Sequence[Quota]) -> Grant:
        """Take one request and one place of each subject, or nothing. The grant must be settled.

        Raises:
            RateLimited: one of them is used up, or owes tokens. Its `headers` are those that a grant would have.
            Unavailable: the shared store is away, and `deny` was chosen.
        """
        asks: list[Ask] = []
        for quota in quotas:
            if quota.requests_per_minute is not None:
                asks.append(Ask(quota.subject, "requests", quota.requests_per_minute, 1))
            if quota.concurrent is not None:
                asks.append(Ask(quota.subject, "concurrent", quota.concurrent, 1))
            if quota.tokens_per_minute is not None:
                asks.append(Ask(quota.subject, "tokens", quota.tokens_per_minute, 0))
        places = [ask for ask in asks if ask.kind == "concurrent"]
        self._leases += 1
        grant = Grant(self, places, [ask for ask in asks if ask.kind == "tokens"], f"{self._name}-{self._leases}")
        if not asks:
            return grant
        _, store = await self._take(grant, asks)
        if grant.places:
            grant.homes.append(store)
            if self._shared is not None and store is not self._shared:
                self._shared.adopt(grant.places, grant.lease)
                grant.homes.append(self._shared)
        return grant

    async def reserve(self, grant: Grant, tokens: int) -> None:
        """Reserve tokens of each subject, or of none. A grant may reserve several times.

        What is reserved after the grant was settled stays booked as it is.

        Raises:
            RateLimited: there are not that many left, or the limit is smaller than that.
            Unavailable: the shared store is away, and `deny` was chosen.
        """
        if not grant.token_asks or tokens <= 0:
            return
        over = grant.settled
        asks = [Ask(ask.subject, "tokens", ask.limit, tokens) for ask in grant.token_asks]
        answer, store = await self._take(grant, asks)
        if not grant.settled:
            grant.reserved.append((store, answer.bucket, tokens))
        elif not over:  # its request ended meanwhile
            store.give([ask.subject for ask in asks], answer.bucket, tokens)

    def settle(self, grant: Grant, used_tokens: int) -> None:
        """Free the places, give back what was reserved and not used, and book what was used beyond that.

        Returns at once; a shared store is told in the background. A second call does nothing.
        """
        if grant.settled:
            return
        grant.settled = True
        for home in grant.homes:
            home.leave(grant.places, grant.lease)
        if not grant.token_asks:
            return
        subjects = [ask.subject for ask in grant.token_asks]
        spare = sum(tokens for _, _, tokens in grant.reserved) - used_tokens
        for store, bucket, tokens in reversed(grant.reserved):
            if spare <= 0:
                break
            part = min(spare, tokens)
            store.give(subjects, bucket, part)
            spare -= part
        if spare < 0:
            (grant.reserved[-1][0] if grant.reserved else self._store).add(subjects, -spare)

    async def close(self) -> None:
        """Wait until a shared store knows of everything that was settled, for two seconds at most."""
        await self._store.close()

    async def _take(self, grant: Grant, asks: Sequence[Ask]) -> tuple[CounterAnswer, Counters]:
        for ask in asks:
            if ask.amount > ask.limit:
                raise _never(ask)
        store: Counters = self._store
        try:
            answer = await store.take(asks, grant.lease)
        except RedisUnavailable as error:
            if self._alone is None:
                raise Unavailable(
                    "The limits can't be checked: their store does not answer.",
                    retry_after_s=_RETRY_AWAY_S,
                    reason="limits_unavailable",
                ) from error
            store = self._alone
            answer = self._alone.take_now(asks)
        grant.note(asks, answer)
        if answer.short is not None:
            refusal = _refusal(asks[answer.short], answer.wait_s)
            refusal.headers = grant.headers()
            raise refusal
        return answer, store


def _refusal(ask: Ask, wait_s: float) -> RateLimited:
    wait = max(1, math.ceil(wait_s))
    what = "at once" if ask.kind == "concurrent" else "per minute"
    noun = "tokens" if ask.kind == "tokens" else "requests"
    return RateLimited(
        f"Rate limit reached for {_whom(ask.subject)}: {ask.limit} {noun} {what}. Try again in {wait} s.",
        retry_after_s=wait,
        reason=_REASONS[ask.kind],
    )


def _never(ask: Ask) -> RateLimited:
    if ask.kind == "tokens":
        sentence = (
            f"This request is too large for {_whom(ask.subject)}: it may use {ask.amount} tokens (prompt and answer), "
            f"and the limit is {ask.limit} tokens per minute. Shorten the prompt or ask for fewer tokens; waiting "
            "does not help."
        )
    else:
        what = "at once" if ask.kind == "concurrent" else "per minute"
        sentence = f"The limit of {_whom(ask.subject)} is {ask.limit} requests {what}; waiting does not help."
    return RateLimited(sentence, reason=_REASONS[ask.kind])


def _whom(subject: str) -> str:
    kind, _, name = subject.partition(":")
    return f"{kind} {name!r}" if name else f"the whole {kind}"


def _duration(seconds: float) -> str:
    """As OpenAI writes it: `20ms`, `1s`, `6m0s`."""
    if 0 < seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"
