"""Who is asking: API keys, tenants and tiers from a file, read again when the file changes.

The file is YAML or JSON (a Secret, mounted). Keys stand in it as SHA-256, so who reads it can't use them:

    tiers:                                # optional: what several tenants have in common
      gold: {priority: high, limits: {requests_per_minute: 600, tokens_per_minute: 200000, concurrent: 32}}
    tenants:
      team-a: {tier: gold, models: ["demo*"], may_choose_priority: true}
    keys:
      - {id: team-a-2026, tenant: team-a, sha256: 3f79bb7b..., expires: 2027-06-30T00:00:00Z}
      - {id: operators, tenant: ops, sha256: 9c56cc51..., admin: true}

Finding a key is one look into a dictionary by digest, then a comparison in constant time; how many keys there are does
not matter. A tenant that only keys name exists, with no limits.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import logging
import os
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kserve_vllm.core.errors import ConfigError, Unauthenticated
from kserve_vllm.core.types import Priority

log = logging.getLogger(__name__)

KEY_PREFIX = "kv-"
NO_TENANT = "none"
_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
_Class = Literal["critical", "high", "normal", "low", "batch"]


class Limits(BaseModel):
    """Most requests and tokens in any 60 s, and most requests at once; None: no limit."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    requests_per_minute: int | None = Field(default=None, ge=1)
    tokens_per_minute: int | None = Field(default=None, ge=1)
    concurrent: int | None = Field(default=None, ge=1)

    def over(self, other: Limits) -> Limits:
        """These limits, and `other`'s where this one has none."""
        return Limits(**{**other.model_dump(exclude_none=True), **self.model_dump(exclude_none=True)})


_NO_LIMITS = Limits()


class Tier(BaseModel):
    """What the tenants of a tier have in common."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    priority: _Class | None = None
    may_choose_priority: bool | None = None
    models: list[str] | None = None
    limits: Limits = Limits()


class Tenant(Tier):
    """One tenant; what it does not say, its tier says."""

    tier: str | None = None


class Key(BaseModel):
    """One key. Its own limits and models come on top of its tenant's."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    id: _Name
    tenant: _Name
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    expires: datetime | None = None
    admin: bool = False
    models: list[str] | None = None
    limits: Limits = Limits()


class KeyFile(BaseModel):
    """The whole file."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    tiers: dict[str, Tier] = {}
    tenants: dict[_Name, Tenant] = {}
    keys: list[Key] = []

    @model_validator(mode="after")
    def _consistent(self) -> KeyFile:
        for name, tenant in self.tenants.items():
            if tenant.tier is not None and tenant.tier not in self.tiers:
                raise ValueError(f"tenant {name!r} has the tier {tenant.tier!r}, which is not among tiers")
        ids: set[str] = set()
        digests: set[str] = set()
        for key in self.keys:
            if key.id in ids:
                raise ValueError(f"two keys have the id {key.id!r}")
            if key.sha256 in digests:
                raise ValueError(f"key {key.id!r} is in the file twice")
            ids.add(key.id)
            digests.add(key.sha256)
        return self


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request.

    Attributes:
        tenant: name of the tenant; `none` where there are no keys.
        key_id: name of the key; None where there are no keys.
        priority: class of its requests, or None for the server's default.
        may_choose_priority: whether a header may choose another class.
        admin: whether it may change the server's state.
        models: patterns (as in a shell) of models and adapters; every tuple must let a name pass.
        key_limits, tenant_limits: limits of the key alone, and of all keys of the tenant together.
    """

    tenant: str = NO_TENANT
    key_id: str | None = None
    priority: Priority | None = None
    may_choose_priority: bool = False
    admin: bool = False
    models: tuple[tuple[str, ...], ...] = ()
    key_limits: Limits = _NO_LIMITS
    tenant_limits: Limits = _NO_LIMITS

    def may_use(self, names: Iterable[str]) -> bool:
        """Whether one of the names of a model is allowed."""
        wanted = list(names)
        return all(
            any(fnmatchcase(name, pattern) for pattern in patterns for name in wanted) for patterns in self.models
        )


ANYONE = Caller()
"""The caller where no keys are asked for."""


_Known: TypeAlias = tuple[str, Caller, float | None]
"""A key's digest, whose it is, and when it expires, in seconds of the wall clock; None: never."""


def digest(key: str) -> str:
    """SHA-256 of a key, as 64 hexadecimal digits."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def new_key() -> str:
    """A new key with 256 random bits."""
    return KEY_PREFIX + secrets.token_urlsafe(32)


def parse(text: str, source: str) -> KeyFile:
    """Read a key file.

    Raises:
        ConfigError: it is not YAML or JSON, or not such a file. No value that stands in it is repeated.
    """
    loader: type[yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        tree = json.loads(text) if text.lstrip().startswith("{") else yaml.load(text, Loader=loader)  # noqa: S506
    except (ValueError, yaml.YAMLError) as error:
        where = getattr(error, "problem_mark", None)
        line = getattr(error, "lineno", None) or (where.line + 1 if where is not None else "?")
        raise ConfigError(f"--keys-file {source} is neither YAML nor JSON: line {line}") from None
    if isinstance(tree, dict):
        # A part that is only begun: `keys:` and nothing below it.
        tree = {name: part for name, part in tree.items() if part is not None}
    elif tree is None:
        tree = {}
    try:
        return KeyFile.model_validate(tree)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False, include_context=False)
        lines = [f"{'.'.join(map(str, problem['loc'])) or 'the file'}: {problem['msg']}" for problem in problems[:5]]
        raise ConfigError(f"--keys-file {source} can't be used: " + "; ".join(lines)) from None


class Tenants:
    """All keys that are valid now.

    Args:
        path: the key file, or None.
        plain: keys given as flags or variables; they belong to no tenant.

    Raises:
        ConfigError: the file can't be read or used.
    """

    def __init__(self, path: str | None = None, plain: Iterable[str] = ()) -> None:
        self._path = path
        self._plain = {each: (each, Caller(key_id="api-key"), None) for each in map(digest, plain)}
        self._callers: dict[str, _Known] = {}
        self._named: tuple[dict[str, _Known], dict[str | None, tuple[Caller, float | None]]] | None = None
        self._stamp: tuple[int, ...] | None = None
        self.failures = 0
        """How often a changed file could not be used."""
        if path is not None:
            self._stamp = self._stamp_now()
            self._callers = _callers(parse(_read(path), path))

    @property
    def needed(self) -> bool:
        """Whether requests need a key."""
        return self._path is not None or bool(self._plain)

    @property
    def has_file(self) -> bool:
        """Whether there is a key file, and with it keys for administrators."""
        return self._path is not None

    def __len__(self) -> int:
        return len(self._callers) + len(self._plain)

    def identify(self, key: str | None) -> Caller:
        """Whose key it is.

        Raises:
            Unauthenticated: it is missing, wrong or expired.
        """
        if not self.needed:
            return ANYONE
        found = digest(key or "")
        known, caller, expires = self._callers.get(found) or self._plain.get(found) or ("", None, None)
        # Of the digest, which nobody can choose: how long the look above took tells nothing about a key.
        if not key or caller is None or not hmac.compare_digest(found, known):
            raise Unauthenticated(
                "missing or wrong API key; send it as `Authorization: Bearer KEY` or `x-api-key: KEY`"
            )
        if expires is not None and time.time() >= expires:
            raise Unauthenticated(f"the API key {caller.key_id!r} has expired")
        return caller

    def recall(self, tenant: str, key_id: str | None) -> Caller:
        """Who a caller is now that was identified before, for work that was accepted then.

        Raises:
            Unauthenticated: its key is gone or expired, or belongs to another tenant now.
        """
        if not self.needed:
            if tenant == NO_TENANT:
                return ANYONE
            raise Unauthenticated("there are no keys any more, and this work belongs to a tenant")
        if self._named is None or self._named[0] is not self._callers:
            # What several plain keys do has one name, and they are alike.
            known = {**self._plain, **self._callers}.values()
            self._named = self._callers, {caller.key_id: (caller, expires) for _, caller, expires in known}
        caller, expires = self._named[1].get(key_id, (None, None))
        if caller is None or caller.tenant != tenant or (expires is not None and time.time() >= expires):
            raise Unauthenticated(f"the API key {key_id!r} is not valid any more")
        return caller

    def reload(self) -> bool:
        """Read the file again if it has changed; True if new keys hold now. A file that can't be used changes nothing.

        May take seconds with very many keys: call it in a thread.
        """
        if self._path is None:
            return False
        stamp = self._stamp_now()
        if stamp is None or stamp == self._stamp:
            return False
        self._stamp = stamp
        try:
            callers = _callers(parse(_read(self._path), self._path))
        except ConfigError as error:
            self.failures += 1
            log.error("the old keys stay valid: %s", error)
            return False
        self._callers = callers
        log.info("%s changed: %d keys", self._path, len(callers))
        return True

    def _stamp_now(self) -> tuple[int, ...] | None:
        with contextlib.suppress(OSError):
            # Follows links: a mounted Secret is swapped by one.
            stat = os.stat(str(self._path))
            return stat.st_mtime_ns, stat.st_ino, stat.st_size, stat.st_ctime_ns
        return None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--keys-file {path} can't be read: {error}") from None


def _callers(file: KeyFile) -> dict[str, _Known]:
    """By each key's digest."""
    tenants: dict[str, Caller] = {}
    found: dict[str, _Known] = {}
    for key in file.keys:
        if key.tenant not in tenants:
            tenants[key.tenant] = _of_tenant(file, key.tenant)
        shared = tenants[key.tenant]
        own = () if key.models is None else (tuple(key.models),)
        caller = replace(shared, key_id=key.id, admin=key.admin, models=(*shared.models, *own), key_limits=key.limits)
        expires = key.expires
        if expires is not None and expires.tzinfo is None:
            expires = expires.replace(tzinfo=UTC)
        found[key.sha256] = key.sha256, caller, expires.timestamp() if expires is not None else None
    return found


def _of_tenant(file: KeyFile, name: str) -> Caller:
    """What all keys of a tenant are allowed."""
    tenant = file.tenants.get(name, Tenant())
    tier = file.tiers[tenant.tier] if tenant.tier is not None else Tier()
    priority = tenant.priority or tier.priority
    choose = tenant.may_choose_priority if tenant.may_choose_priority is not None else tier.may_choose_priority
    models = tenant.models if tenant.models is not None else tier.models
    return Caller(
        tenant=name,
        priority=Priority[priority.upper()] if priority else None,
        may_choose_priority=bool(choose),
        models=() if models is None else (tuple(models),),
        tenant_limits=tenant.limits.over(tier.limits),
    )
