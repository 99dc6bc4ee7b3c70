"""Hooks that look at prompts before the engine and at answers after it, and refuse them or take parts out.

A YAML file lists the hooks; each sees what the one before it left:

    hooks:
      - name: cards
        patterns: [{regex: '\\b(?:\\d[ -]?){13,16}\\b', replacement: '[card]'}]
        action: redact                # or refuse
        on: [prompt, answer]          # the default
        tenants: [team-a]             # the default: all
        holdback_chars: 64            # of a streamed answer, see below
        timeout_s: 0.1                # processor time for each 20,000 characters
        on_error: refuse              # or allow: what becomes of a text that a hook can't look at
      - name: vendor
        endpoint:
          url: https://host/v1/moderations
          api_key_file: /keys/vendor
          model: m
          timeout_s: 2
          on_error: refuse
        window_chars: 400
      - name: ours
        entry_point: 'package.module:callable'
        timeout_s: 5                  # for all texts of a request together, as for an endpoint
        on_error: refuse
        window_chars: 400

An endpoint answers `POST {"input": [texts]}` with `{"results": [{"flagged": bool}, ...]}`, as OpenAI's does; it can
only refuse. An entry point is called as `callable(text, where, tenant)`, with `where` either `prompt` or `answer`; it
returns None, a text to use instead, or a `Refusal` (or raises it). It may be a coroutine function; any other one runs
in one of eight threads, and keeps it when it does not come back in time.

Streamed answers. Patterns hold back only what could still become a match, at most `holdback_chars`; a longer match may
pass in part. Endpoints and entry points see windows of `window_chars`, cut at white space where there is some in the
second half, and a window passes when it was looked at. An endpoint is also shown the last quarter of a window that
passed; an entry point is not, so what lies across the border of two windows is not seen by it in one piece.

When a hook can't look (`on_error: refuse`, the default): a pattern that takes too long refuses the text; an endpoint or
entry point that fails answers 503, since the text may well be fine.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import inspect
import logging
import queue
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Literal, ParamSpec, Protocol, TypeVar, cast

import httpx
import regex
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from kserve_vllm.core.errors import ConfigError, Refused, RequestError, Unavailable
from kserve_vllm.policy.moderation.patterns import PatternError, Patterns, Reading, Rule

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

log = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")
Where = Literal["prompt", "answer"]
OnError = Literal["allow", "refuse"]
Verdict = str | RequestError
Check = Callable[[str, Where, str], object]
"""An operator's own function: text, where it stands and tenant to a `Refusal`, a text, None, or an awaitable of such.
What it really returns is looked at."""
"""The text that passes, or why none does."""

_LARGE = 20_000
"""Characters from which on patterns are looked for in a thread."""
_AT_ONCE = 8
"""Calls of one hook that one request makes at a time."""
_BATCH = 32
"""Texts in one call of an endpoint."""


class Refusal(Exception):
    """What an entry point returns or raises for a text that may not pass."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _PatternSpec(_Model):
    regex: str | None = Field(None, min_length=1)
    literal: str | None = Field(None, min_length=1)
    replacement: str = "[redacted]"
    ignore_case: bool = False

    @model_validator(mode="after")
    def _one(self) -> _PatternSpec:
        if (self.regex is None) == (self.literal is None):
            raise ValueError("a pattern has either `regex` or `literal`")
        return self


class _EndpointSpec(_Model):
    url: str = Field(pattern=r"^https?://[^\s]+$")
    api_key_file: str | None = None
    model: str | None = None
    timeout_s: float = Field(2.0, gt=0, le=60, strict=False)
    on_error: OnError = "refuse"


class _HookSpec(_Model):
    name: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")
    on: list[Where] = Field(["prompt", "answer"], min_length=1)
    tenants: list[str] | None = Field(None, min_length=1)
    action: Literal["refuse", "redact"] | None = None
    patterns: list[_PatternSpec] | None = Field(None, min_length=1)
    endpoint: _EndpointSpec | None = None
    entry_point: str | None = Field(None, pattern=r"^[\w.]+:[\w.]+$")
    on_error: OnError = "refuse"
    timeout_s: float | None = Field(None, gt=0, le=60, strict=False)
    holdback_chars: int = Field(64, ge=1, le=4096)
    window_chars: int = Field(400, ge=16, le=20_000)

    @field_validator("on", mode="before")
    @classmethod
    def _one_or_more(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_kind(self) -> _HookSpec:
        kinds = [kind for kind in ("patterns", "endpoint", "entry_point") if getattr(self, kind) is not None]
        if len(kinds) != 1:
            raise ValueError("a hook has one of `patterns`, `endpoint` and `entry_point`")
        useless = {
            "patterns": {"window_chars"},
            "endpoint": {"action", "holdback_chars", "timeout_s", "on_error"},
            "entry_point": {"action", "holdback_chars"},
        }[kinds[0]]
        for field in sorted(useless & self.model_fields_set):
            below = kinds[0] == "endpoint" and field in ("timeout_s", "on_error")
            hint = "; it belongs below `endpoint`" if below else ""
            raise ValueError(f"`{field}` does nothing for a hook with `{kinds[0]}`{hint}")
        if kinds[0] == "patterns" and self.action is None:
            raise ValueError("a hook with `patterns` needs `action: refuse` or `action: redact`")
        if self.action == "refuse" and any("replacement" in each.model_fields_set for each in self.patterns or ()):
            raise ValueError("`replacement` does nothing with `action: refuse`")
        return self


class _FileSpec(_Model):
    hooks: list[_HookSpec] = Field(min_length=1)

    @model_validator(mode="after")
    def _names(self) -> _FileSpec:
        names = [hook.name for hook in self.hooks]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two hooks have the name {name!r}")
        return self


class _Stage(Protocol):
    """One hook's part in one growing answer."""

    async def feed(self, text: str, last: bool) -> tuple[str, RequestError | None]:
        """What may pass now, and why nothing more may."""


class _Hook:
    """One hook; the kinds differ in how they look."""

    def __init__(self, spec: _HookSpec, on_error: OnError, seen: Callable[[str, str, str], None]) -> None:
        self.name = spec.name
        self.on = frozenset(spec.on)
        self.tenants = frozenset(spec.tenants) if spec.tenants is not None else None
        self._on_error = on_error
        self._seen = seen
        self._logged_at = 0.0

    async def look(self, texts: list[str], where: Where, tenant: str) -> Sequence[Verdict]:
        """A verdict for each text."""
        raise NotImplementedError

    def stage(self, tenant: str) -> _Stage:
        """A new part in an answer."""
        raise NotImplementedError

    async def close(self) -> None:
        """Let go of connections and threads."""

    def refused(self, where: Where) -> Refused:
        self._seen(self.name, where, "refused")
        return Refused(f"the moderation hook {self.name!r} does not let this {where} pass", reason="moderation")

    def redacted(self, where: Where) -> None:
        self._seen(self.name, where, "redacted")

    def failed(self, where: Where, why: str) -> RequestError | None:
        """Note that the hook could not look; the error to raise, or None where that is allowed."""
        self._seen(self.name, where, "failed")
        now = time.monotonic()
        if now - self._logged_at > 10 or not self._logged_at:
            self._logged_at = now
            log.warning(
                "the moderation hook %s could not look at a %s (on_error: %s): %s",
                self.name,
                where,
                self._on_error,
                why,
            )
        if self._on_error == "allow":
            return None
        return self._error(where)

    def _error(self, where: Where) -> RequestError:
        return Unavailable(
            f"the moderation hook {self.name!r} can't look at this {where} now", retry_after_s=5, reason="moderation"
        )


class _PatternHook(_Hook):
    def __init__(self, spec: _HookSpec, seen: Callable[[str, str, str], None]) -> None:
        super().__init__(spec, spec.on_error, seen)
        rules = []
        for index, each in enumerate(spec.patterns or ()):
            source = each.regex if each.regex is not None else regex.escape(each.literal or "")
            try:
                rules.append(Rule(source, each.replacement, each.ignore_case))
            except PatternError as error:
                raise ConfigError(f"hook {spec.name!r}, pattern {index + 1}: {error}") from error
        self._patterns = Patterns(rules, spec.holdback_chars, spec.timeout_s if spec.timeout_s is not None else 0.1)
        self._stop = spec.action == "refuse"

    async def look(self, texts: list[str], where: Where, tenant: str) -> Sequence[Verdict]:
        # Each text costs a call for each pattern, however short it is.
        large = sum(map(len, texts)) + 200 * len(texts) >= _LARGE
        reading = self._reading(concurrent=large)
        try:
            changed = await asyncio.to_thread(reading.whole, texts) if large else reading.whole(texts)
        except TimeoutError:
            return [self._slow(where)] * len(texts)
        if reading.slow:
            self.failed(where, "a pattern took too long and was left out")
        if reading.stopped:
            return [self.refused(where)] * len(texts)
        if reading.replaced:
            self.redacted(where)
        return changed

    def stage(self, tenant: str) -> _Stage:
        return _PatternStage(self, self._reading())

    def _reading(self, concurrent: bool = False) -> Reading:
        return Reading(self._patterns, self._stop, self._on_error == "allow", concurrent)

    def _slow(self, where: Where) -> RequestError:
        error = self.failed(where, "a pattern took too long")
        assert error is not None
        return error

    def _error(self, where: Where) -> RequestError:
        return Refused(f"the moderation hook {self.name!r} could not look at this {where} in time", reason="moderation")


class _PatternStage:
    __slots__ = ("_hook", "_reading", "_told")

    def __init__(self, hook: _PatternHook, reading: Reading) -> None:
        self._hook, self._reading, self._told = hook, reading, False

    async def feed(self, text: str, last: bool) -> tuple[str, RequestError | None]:
        reading = self._reading
        try:
            out = reading.feed(text, last)
        except TimeoutError:
            return "", self._hook._slow("answer")
        if reading.stopped:
            return out, self._hook.refused("answer")
        if not self._told and (reading.slow or reading.replaced):
            self._told = True
            if reading.slow:
                self._hook.failed("answer", "a pattern took too long and was left out")
            else:
                self._hook.redacted("answer")
        return out, None


class _WindowHook(_Hook):
    """A hook that looks at windows of a growing answer."""

    overlap = 0

    def __init__(
        self, spec: _HookSpec, on_error: OnError, timeout_s: float, seen: Callable[[str, str, str], None]
    ) -> None:
        super().__init__(spec, on_error, seen)
        self.window = spec.window_chars
        self._timeout_s = timeout_s

    def stage(self, tenant: str) -> _Stage:
        return _WindowStage(self, tenant)

    async def look_at_windows(self, windows: list[str], before: str, tenant: str) -> Sequence[Verdict]:
        """A verdict for each of some windows that follow each other, and the text `before`."""
        return await self.look(windows, "answer", tenant)


class _WindowStage:
    __slots__ = ("_before", "_hook", "_tenant", "_text")

    def __init__(self, hook: _WindowHook, tenant: str) -> None:
        self._hook, self._tenant = hook, tenant
        self._text = self._before = ""

    async def feed(self, text: str, last: bool) -> tuple[str, RequestError | None]:
        self._text += text
        windows = []
        while len(self._text) >= self._hook.window:
            cut = _cut(self._text, self._hook.window)
            windows.append(self._text[:cut])
            self._text = self._text[cut:]
        if last and self._text:
            windows.append(self._text)
            self._text = ""
        if not windows:
            return "", None
        verdicts = await self._hook.look_at_windows(windows, self._before, self._tenant)
        overlap = self._hook.overlap
        self._before = (self._before + "".join(windows[-2:]))[-overlap:] if overlap else ""
        passed: list[str] = []
        for verdict in verdicts:
            if isinstance(verdict, RequestError):
                return "".join(passed), verdict
            passed.append(verdict)
        return "".join(passed), None


def _cut(text: str, window: int) -> int:
    """Where a window ends: behind the last white space of its second half, if there is some."""
    for at in range(window, window // 2, -1):
        if text[at - 1].isspace():
            return at
    return window


class _EndpointHook(_WindowHook):
    def __init__(self, spec: _HookSpec, seen: Callable[[str, str, str], None]) -> None:
        assert spec.endpoint is not None
        self._endpoint = spec.endpoint
        super().__init__(spec, spec.endpoint.on_error, spec.endpoint.timeout_s, seen)
        self.overlap = self.window // 4
        self._client: httpx.AsyncClient | None = None
        if self._endpoint.api_key_file is not None:
            try:
                self._headers()
            except (OSError, ValueError) as error:
                raise ConfigError(f"hook {spec.name!r}: api_key_file can't be used: {error}") from error

    async def look(self, texts: list[str], where: Where, tenant: str) -> Sequence[Verdict]:
        # Two texts that are equal are one question, and an empty one is none.
        asked = list(dict.fromkeys(text for text in texts if text.strip()))
        batches = [asked[at : at + _BATCH] for at in range(0, len(asked), _BATCH)]
        flagged: dict[str, bool] = {}
        try:
            async with asyncio.timeout(self._timeout_s):
                for batch, flags in zip(batches, await _some_at_once([self._ask(b) for b in batches]), strict=True):
                    flagged.update(zip(batch, flags, strict=True))
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError, OSError, ValueError) as error:
            failure = self.failed(where, f"{type(error).__name__}: {error}")
            return texts if failure is None else [failure] * len(texts)
        return [self.refused(where) if flagged.get(text) else text for text in texts]

    async def look_at_windows(self, windows: list[str], before: str, tenant: str) -> Sequence[Verdict]:
        texts = []
        for window in windows:
            texts.append(before + window)
            before = (before + window)[-self.overlap :]
        verdicts = await self.look(texts, "answer", tenant)
        return [v if isinstance(v, RequestError) else w for v, w in zip(verdicts, windows, strict=True)]

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    async def _ask(self, texts: list[str]) -> list[bool]:
        if self._client is None:
            self._client = httpx.AsyncClient(timeout=self._timeout_s)
        body: dict[str, object] = {"input": texts}
        if self._endpoint.model is not None:
            body["model"] = self._endpoint.model
        response = await self._client.post(self._endpoint.url, json=body, headers=self._headers())
        if response.status_code != 200:
            raise ValueError(f"it answered with status {response.status_code}")
        tree = response.json()
        results = tree.get("results") if isinstance(tree, dict) else None
        if not isinstance(results, list) or len(results) != len(texts):
            raise ValueError(f"it did not answer with {len(texts)} `results`")
        flags = [result.get("flagged") if isinstance(result, dict) else None for result in results]
        if not all(isinstance(flag, bool) for flag in flags):
            raise ValueError("a result has no `flagged`, true or false")
        return [flag is True for flag in flags]

    def _headers(self) -> dict[str, str]:
        """Read at every call: a mounted key may be rotated."""
        if self._endpoint.api_key_file is None:
            return {}
        key = Path(self._endpoint.api_key_file).read_text("utf-8").strip()
        if not key or not key.isascii() or not key.isprintable():
            raise ValueError("it holds no key")
        return {"authorization": f"Bearer {key}"}


class _EntryPointHook(_WindowHook):
    def __init__(self, spec: _HookSpec, seen: Callable[[str, str, str], None]) -> None:
        super().__init__(spec, spec.on_error, spec.timeout_s if spec.timeout_s is not None else 5.0, seen)
        self._call = _load(spec.entry_point or "", spec.name)
        self._is_async = inspect.iscoroutinefunction(self._call) or inspect.iscoroutinefunction(
            getattr(self._call, "__call__", None)  # noqa: B004
        )
        self._threads = _Threads(f"moderation-{spec.name}", _AT_ONCE)

    async def look(self, texts: list[str], where: Where, tenant: str) -> Sequence[Verdict]:
        if not texts:
            return []
        enforcement = asyncio.Semaphore(_AT_ONCE)
        tasks = [asyncio.ensure_future(self._one(enforcement, text, where, tenant)) for text in texts]
        try:
            done, late = await asyncio.wait(tasks, timeout=self._timeout_s)
        finally:
            for task in tasks:
                task.cancel()
        # Not by us, nor by a client that left, which ends the wait itself: the hook raised it.
        cancelled = {task for task in done if task.cancelled()}
        why = f"no answer within {self._timeout_s:g} s" if late else "CancelledError"
        failure = self.failed(where, why) if late or cancelled else None
        return [
            (text if failure is None else failure) if task in late or task in cancelled else task.result()
            for task, text in zip(tasks, texts, strict=True)
        ]

    async def close(self) -> None:
        self._threads.close()

    async def _one(self, enforcement: asyncio.Semaphore, text: str, where: Where, tenant: str) -> Verdict:
        try:
            async with enforcement:
                if self._is_async:
                    found = await cast("Awaitable[object]", self._call(text, where, tenant))
                else:
                    found = await asyncio.wrap_future(self._threads.submit(self._call, text, where, tenant))
        except (Refusal, Refused):
            return self.refused(where)
        except (Exception, SystemExit) as error:  # who calls `sys.exit` should not end the server
            # The message of a foreign exception may hold the text, which no log should.
            failure = self.failed(where, type(error).__name__)
            return text if failure is None else failure
        if isinstance(found, (Refusal, Refused)):
            return self.refused(where)
        if found is None or found == text:
            return text
        if not isinstance(found, str):
            failure = self.failed(where, f"it returned {type(found).__name__}, not a text, None or a Refusal")
            return text if failure is None else failure
        self.redacted(where)
        return found


class _Threads:
    """Threads for calls that may never come back. Unlike an executor's, they don't keep the process from ending."""

    def __init__(self, name: str, most: int) -> None:
        self._name, self._most = name, most
        self._work: queue.SimpleQueue[tuple[Future[object], Callable[[], object]] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def submit(self, call: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> Future[object]:
        """The result to come."""
        future: Future[object] = Future()
        self._work.put((future, functools.partial(call, *args, **kwargs)))
        if len(self._threads) < self._most:
            self._threads.append(threading.Thread(target=self._serve, name=self._name, daemon=True))
            self._threads[-1].start()
        return future

    def close(self) -> None:
        """Let the threads end that have nothing to do."""
        for _ in self._threads:
            self._work.put(None)

    def _serve(self) -> None:
        while (item := self._work.get()) is not None:
            future, call = item
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = call()
                if inspect.iscoroutine(result):
                    result = asyncio.run(result)  # a plain function that hands on a coroutine
                future.set_result(result)
            except StopIteration:  # can't be handed to a coroutine
                future.set_exception(RuntimeError("StopIteration"))
            except BaseException as error:
                future.set_exception(error)


def _load(entry_point: str, name: str) -> Check:
    module, _, path = entry_point.partition(":")
    try:
        found: object = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except Exception as error:
        raise ConfigError(f"hook {name!r}: {entry_point} can't be loaded: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise ConfigError(f"hook {name!r}: {entry_point} can't be called")
    return found


async def _some_at_once(work: Sequence[Coroutine[object, None, T]]) -> list[T]:
    """Results in order, a few at a time; the first exception ends the others."""
    if len(work) == 1:
        return [await work[0]]
    enforcement = asyncio.Semaphore(_AT_ONCE)

    async def one(each: Coroutine[object, None, T]) -> T:
        async with enforcement:
            return await each

    tasks = [asyncio.ensure_future(one(each)) for each in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for each in work:
            each.close()


class AnswerFilter:
    """All hooks over one growing answer (one of the `n` of a request).

    What passes does not depend on how the answer was cut, for matches no longer than the hold-back.
    """

    __slots__ = ("_refusal", "_stages", "rest")

    def __init__(self, stages: Sequence[_Stage]) -> None:
        self._stages = stages
        self.rest = ""
        """What may still be sent where `finish` raised."""
        self._refusal: RequestError | None = None

    async def feed(self, text: str) -> str:
        """What may be sent now; often less than was fed, at times more.

        Raises:
            Refused: a hook lets nothing more pass. All that may pass before was returned by an earlier call.
            Unavailable: a hook can't look, and is not to be left out.
        """
        return await self._feed(text, False)

    async def finish(self) -> str:
        """The rest, when the answer has ended; to be called once, and not after an error.

        Raises:
            Refused, Unavailable: as for `feed`; what stands in front of it and may pass is then in `rest`.
        """
        rest = await self._feed("", True)
        if self._refusal is not None:
            self.rest = rest
            raise self._refusal
        return rest

    async def _feed(self, text: str, last: bool) -> str:
        if self._refusal is not None:
            raise self._refusal
        for stage in self._stages:
            if not text and not last:
                return ""
            text, refusal = await stage.feed(text, last)
            if refusal is not None:
                # Nothing follows, so what stands before it can be decided by the hooks behind.
                last = True
                self._refusal = refusal
        if self._refusal is not None and not text:
            raise self._refusal
        return text


class Moderation:
    """The hooks of a file.

    Args:
        path: the YAML file.
        on_verdict: called with the hook's name, `prompt` or `answer`, and `refused`, `redacted` or `failed`; for
            counters: mostly once per prompt and once per answer.

    Raises:
        ConfigError: the file can't be read or used.
    """

    def __init__(self, path: str | Path, on_verdict: Callable[[str, str, str], None] = lambda *_: None) -> None:
        try:
            self._hooks = [_build(spec, on_verdict) for spec in _read(path).hooks]
        except ConfigError as error:
            raise ConfigError(f"{path} (--moderation-file): {error}") from error
        self.media: frozenset[str] = frozenset()
        """What the model takes beside text (`image`, `audio`, `video`), as far as it is known: that is not looked at
        where a part of a message brings it."""

    def looks_at(self, where: Where, tenant: str) -> bool:
        """Whether any hook looks at prompts, or answers, of a tenant."""
        return bool(self._of(where, tenant))

    def reads(self, where: Where) -> bool:
        """Whether any hook looks at prompts, or answers, of anyone."""
        return any(where in hook.on for hook in self._hooks)

    async def prompt(self, texts: list[str], tenant: str) -> list[str]:
        """The texts as the model may see them; the same list where nothing was changed.

        Raises:
            Refused: a hook does not let one of them pass. The message names the hook and never the text.
            Unavailable: a hook can't look, and is not to be left out.
        """
        current = texts
        for hook in self._of("prompt", tenant):
            passed = []
            for verdict in await hook.look(current, "prompt", tenant):
                if isinstance(verdict, RequestError):
                    raise verdict
                passed.append(verdict)
            if passed != current:
                current = passed
        return current

    def answer(self, tenant: str) -> AnswerFilter | None:
        """A filter for one answer of a tenant, or None where no hook looks at its answers."""
        stages = [hook.stage(tenant) for hook in self._of("answer", tenant)]
        return AnswerFilter(stages) if stages else None

    async def close(self) -> None:
        """Let go of connections and threads."""
        for hook in self._hooks:
            await hook.close()

    def _of(self, where: Where, tenant: str) -> list[_Hook]:
        return [h for h in self._hooks if where in h.on and (h.tenants is None or tenant in h.tenants)]


def _build(spec: _HookSpec, seen: Callable[[str, str, str], None]) -> _Hook:
    if spec.patterns is not None:
        return _PatternHook(spec, seen)
    return _EndpointHook(spec, seen) if spec.endpoint is not None else _EntryPointHook(spec, seen)


class _Loader(yaml.SafeLoader):
    """YAML with `on` as a word: YAML 1.1 reads it as true, and it is a field here."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", regex.compile(r"^(?:true|false|True|False)$"), list("tTfF"))


def _read(path: str | Path) -> _FileSpec:
    try:
        tree = yaml.load(Path(path).read_text("utf-8"), _Loader)  # noqa: S506 - a safe loader
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"can't be read: {error}") from error
    try:
        return _FileSpec.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(tree, each) for each in error.errors())) from error


def _explain(tree: Mapping[str, Sequence[object]], error: ErrorDetails) -> str:
    """One line for one of pydantic's errors, with the hook's name where it has one."""
    place = list(error["loc"])
    name = None
    if len(place) > 1 and place[0] == "hooks" and isinstance(place[1], int):
        hook = tree["hooks"][place[1]]
        name = hook.get("name") if isinstance(hook, dict) else None
        head = f"hook {name!r}" if isinstance(name, str) else f"hook {place[1] + 1}"
        place = place[2:]
    else:
        head = "the file"
    field = ".".join(str(part + 1) if isinstance(part, int) else str(part) for part in place)
    message = {"extra_forbidden": "no such field"}.get(error["type"], error["msg"].removeprefix("Value error, "))
    return f"{head}: {field}: {message}" if field else f"{head}: {message}"
