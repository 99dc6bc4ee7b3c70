"""Adapters (LoRA): a declared list that is watched and reconciled while requests run.

What is loaded is always a copy of ours. vLLM may read an adapter's files again at any step, when
it comes back from its cache, and a file that has gone by then would end the engine; and vLLM's prefix cache knows an
adapter by its name and path, so that two contents, in two copies, never share blocks.

Each content of an adapter is a `Version` with a name and number of its own in the engine. Clients see the adapter's
plain name, which is moved to a new version in one assignment; the old version stays in the engine until its last
request is done.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

from kserve_vllm.adapters.files import (
    FLAG,
    HUB,
    BaseModel,
    Broken,
    Declaration,
    Signature,
    check,
    fetch,
    is_local,
    parse,
    signature,
    stage,
)
from kserve_vllm.core.errors import ConfigError, InvalidRequest, NotFound, Unavailable
from kserve_vllm.core.watched_file import POLL_S, WatchedFile

log = logging.getLogger(__name__)
T = TypeVar("T")

_DOWNLOADS = 4  # at a time
_FIRST_LOADS_S = 300.0  # how long ready waits for the first attempts
GRACE_S = 10.0  # between an adapter's look-up by a request and its arrival in the engine there are milliseconds
_RETRY_FIRST_S, _RETRY_MOST_S = 5.0, 300.0


class AdapterState(enum.StrEnum):
    """Where an adapter is."""

    LOADED = "loaded"
    LOADING = "loading"
    FAILED = "failed"
    UNLOADED = "unloaded"


@dataclass(eq=False)
class Version:
    """One content of an adapter in the engine.

    Attributes:
        key: its name in the engine and in the prefix cache.
        number: its id in the engine, of this content alone.
        folder: the files that the engine reads.
        digest: SHA-256 of the files; empty for an adapter of `--lora-modules`, which is served from where it lies.
        revision: commit on the hub, where it came from there.
        ours: whether the folder is a copy of ours.
        retired_at: when it was replaced or unloaded, on the monotonic clock; None while new requests get it.
    """

    key: str
    number: int
    folder: Path
    digest: str = ""
    revision: str | None = None
    ours: bool = True
    retired_at: float | None = None


@dataclass(eq=False)
class Adapter:
    """One adapter and how it is doing.

    Attributes:
        declared: what is wanted.
        origin: `file`, `flag` (`--lora-modules`) or `api` (vLLM's own call for that).
        wanted: False while it is unloaded.
        removed: whether the list no longer has it.
        error: why the last attempt failed. With the state `loaded`, the version before is still served.
        since: when the state was entered, in seconds of the wall clock.
        requests, prompt_tokens, output_tokens: what was done with it.
        loads, failures, unloads: how often.
    """

    declared: Declaration
    origin: str
    state: AdapterState = AdapterState.LOADING
    wanted: bool = True
    removed: bool = False
    error: str | None = None
    since: float = field(default_factory=time.time)
    version: Version | None = None
    retired: list[Version] = field(default_factory=list)
    requests: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    loads: int = 0
    failures: int = 0
    unloads: int = 0
    attempt: asyncio.Task[None] | None = None
    attempts: int = 0
    retry_at: float | None = None
    tried: Signature | None = None
    """Signature of a local source when it was last tried."""
    pending: Signature | None = None
    """A newer signature, until it holds for two looks in a row."""

    def enter(self, state: AdapterState, error: str | None = None) -> None:
        """Note a state and what is wrong."""
        if state is not self.state:
            self.state, self.since = state, time.time()
        self.error = error


class Host(Protocol):
    """What is needed of the engine."""

    @property
    def base_names(self) -> Sequence[str]:
        """Served names of the base model."""

    @property
    def max_rank(self) -> int | None:
        """The highest rank that the engine takes; None where adapters are switched off."""

    def base_model(self) -> BaseModel:
        """Shapes of the base model's weights. Reads files."""

    def number(self, key: str) -> int:
        """The number of a new version."""

    async def add(self, name: str, version: Version) -> None:
        """Load a version into the engine.

        Raises:
            Broken: the engine can't use it.
        """

    async def remove(self, version: Version) -> None:
        """Drop a version from the engine."""

    def publish(self, name: str, version: Version) -> None:
        """Give new requests for an adapter this version."""

    def withdraw(self, name: str) -> None:
        """Serve no new request for an adapter."""

    def in_flight(self, version: Version) -> int:
        """Sequences that the engine runs with a version."""

    def foreign(self) -> Mapping[str, tuple[str, int]]:
        """Folder and number of adapters that vLLM serves and nobody here published, by name."""

    def published(self, name: str) -> bool:
        """Whether new requests for an adapter are served."""


class AdapterRegistry:
    """All adapters of the process.

    Args:
        host: the engine.
        front_ends: processes that share the engine, each with a table of its own.
    """

    def __init__(self, host: Host, front_ends: int = 1) -> None:
        self._host = host
        self._front_ends = front_ends
        self.entries: dict[str, Adapter] = {}
        self._file: WatchedFile | None = None
        self.cache_folder: Path | None = None
        self._loop: asyncio.Task[None] | None = None
        self._downloads = asyncio.Semaphore(_DOWNLOADS)
        self._base: BaseModel | None = None
        self._served: frozenset[str] | None = None
        self.on_load: Callable[[str, bool], None] = lambda name, done: None
        """Called with an adapter's name after each load (True) or failure (False)."""
        self._sync()

    # Life

    async def start(self, path: str | None) -> None:
        """Load what a file declares, and watch it from now on. Broken adapters don't stop it.

        Raises:
            ConfigError: the file can't be used, or adapters are switched off.
        """
        if path is not None:
            if self._host.max_rank is None:
                raise ConfigError(f"{FLAG} is given, and the engine runs without --enable-lora")
            self._file = WatchedFile(path, FLAG)
            self._apply(parse(await self._file.first(), path, self._taken()))
            attempts = {each.attempt for each in self.entries.values() if each.attempt is not None}
            if attempts:
                log.info("loading %d adapters", len(attempts))
                _, late = await asyncio.wait(attempts, timeout=_FIRST_LOADS_S)
                if late:
                    log.warning("%d adapters are still loading after %g s; going on without", len(late), _FIRST_LOADS_S)
        if self._host.max_rank is not None:
            self._loop = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        """Watch no longer, and delete the copies."""
        tasks = [task for task in (self._loop, *(each.attempt for each in self.entries.values())) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self.cache_folder is not None:
            shutil.rmtree(self.cache_folder, ignore_errors=True)

    # What there is

    def all(self) -> list[Adapter]:
        """All adapters, in the order in which they came."""
        self._sync()
        return [each for each in self.entries.values() if not each.removed]

    def find(self, name: str) -> Adapter | None:
        """The adapter of a name, `adapter` or `base:adapter`, or None."""
        plain = self.plain(name)
        if plain not in self.entries:
            self._sync()
        adapter = self.entries.get(plain)
        return None if adapter is None or adapter.removed else adapter

    def served_names(self) -> frozenset[str]:
        """Plain names that new requests may ask for now."""
        if self._served is None:
            self._served = frozenset(name for name, each in self.entries.items() if each.version is not None)
        return self._served

    def plain(self, name: str) -> str:
        """`base:adapter` to `adapter`; anything else as it is."""
        base, colon, rest = name.rpartition(":")
        return rest if colon and base in self._host.base_names else name

    def by_state(self) -> dict[str, int]:
        """Number of adapters in each state."""
        counts = dict.fromkeys((state.value for state in AdapterState), 0)
        for each in self.all():
            counts[each.state.value] += 1
        return counts

    def in_flight(self, adapter: Adapter) -> int:
        """Sequences that the engine runs with an adapter, old versions included."""
        versions = [*adapter.retired, *([adapter.version] if adapter.version else [])]
        return sum(self._host.in_flight(version) for version in versions)

    def serving(self, name: str) -> str:
        """What identifies the version that new requests for a name get; empty for the base model or none."""
        adapter = self.find(name)
        return adapter.version.key if adapter is not None and adapter.version is not None else ""

    def book(self, name: str, requests: int, prompt_tokens: int, output_tokens: int) -> None:
        """Add what a request did."""
        adapter = self.entries.get(name)
        if adapter is not None:
            adapter.requests += requests
            adapter.prompt_tokens += prompt_tokens
            adapter.output_tokens += output_tokens

    # What is asked for

    @property
    def shared(self) -> bool:
        """Whether other processes have tables of their own."""
        return self._front_ends > 1

    def check_alone(self) -> None:
        """Refuse what would reach, or count, one of several front ends.

        Raises:
            InvalidRequest: there are several.
        """
        if self.shared:
            raise InvalidRequest(
                f"{self._front_ends} front-end processes serve here (--api-server-count), and this call would reach "
                "one of them. Change the adapters file for all of them; /metrics adds up what they did."
            )

    async def load(self, name: str) -> Adapter:
        """Load an adapter that is unloaded or failed; look at the source again of one that is loaded.

        One of `--lora-modules` that is loaded stays as it is.

        Raises:
            NotFound: no adapter of that name is declared.
            InvalidRequest: it is broken, or there are several front ends.
            Unavailable: its source can't be reached now.
        """
        self.check_alone()
        adapter = self._known(name)
        if adapter.version is not None and not adapter.version.ours:
            return adapter
        adapter.wanted, adapter.retry_at, adapter.attempts = True, None, 0
        if adapter.attempt is None or adapter.attempt.done():
            self._begin(adapter)
        assert adapter.attempt is not None
        # A client that goes away does not stop it.
        await asyncio.wait({adapter.attempt})
        if adapter.error is not None:
            if adapter.retry_at is not None:
                raise Unavailable(f"adapter {name!r}: {adapter.error}", retry_after_s=int(_RETRY_FIRST_S))
            raise InvalidRequest(f"adapter {name!r}: {adapter.error}", field="name")
        return adapter

    async def unload(self, name: str) -> Adapter:
        """Serve no new request with an adapter until it is loaded again or its entry changes. What is in flight ends.

        Raises:
            NotFound: no adapter of that name is declared.
            InvalidRequest: there are several front ends.
        """
        self.check_alone()
        adapter = self._known(name)
        adapter.wanted = False
        self._retire(adapter)
        adapter.enter(AdapterState.UNLOADED)
        log.info("adapter %s is unloaded", adapter.declared.name)
        return adapter

    def _known(self, name: str) -> Adapter:
        self._sync()
        adapter = self.find(name)
        if adapter is None:
            raise NotFound(f"no adapter named {name!r} is declared", field="name")
        return adapter

    # Reconciling

    def _taken(self) -> list[str]:
        flags = [name for name, each in self.entries.items() if each.origin != "file" and not each.removed]
        return [*self._host.base_names, *flags]

    def _apply(self, declared: Mapping[str, Declaration]) -> None:
        """Make the table what the list says."""
        for name, adapter in self.entries.items():
            if adapter.origin == "file" and not adapter.removed and name not in declared:
                log.info("adapter %s is no longer declared", name)
                adapter.removed, adapter.wanted = True, False
                self._retire(adapter)
                adapter.enter(AdapterState.UNLOADED)
        for name, wanted in declared.items():
            known = self.entries.get(name)
            if known is None:
                self.entries[name] = known = Adapter(wanted, "file")
            elif known.declared == wanted and not known.removed:
                continue
            elif (known.declared.source, known.declared.revision) == (wanted.source, wanted.revision) and known.wanted:
                known.declared = wanted
                continue
            known.declared, known.origin, known.removed, known.wanted = wanted, "file", False, True
            known.attempts, known.retry_at = 0, None
            self._begin(known)

    def _sync(self) -> None:
        """Take over what vLLM loaded by itself, and note what it unloaded."""
        for name, (folder, number) in self._host.foreign().items():
            known = self.entries.get(name)
            if known is not None and known.version is not None and known.version.number == number:
                continue
            if known is None or known.origin != "file":
                origin = "flag" if self._loop is None else "api"
                version = Version(name, number, Path(folder), ours=False)
                if known is None:
                    source = str(Path(folder).resolve()) if Path(folder).is_dir() else f"{HUB}{folder}"
                    known = self.entries[name] = Adapter(Declaration(name, source), origin)
                known.version, known.removed, known.wanted = version, False, True
                self._served = None
                self._host.publish(name, version)
                known.loads += 1
                known.enter(AdapterState.LOADED)
        for name, known in self.entries.items():
            if known.version is not None and not self._host.published(name):
                known.wanted = False
                self._retire(known)
                known.enter(AdapterState.UNLOADED)

    def _begin(self, adapter: Adapter) -> None:
        if adapter.attempt is None or adapter.attempt.done():
            adapter.attempt = asyncio.create_task(self._attempt(adapter))

    async def _attempt(self, adapter: Adapter) -> None:
        """Load what is declared, again where the declaration changed meanwhile."""
        while adapter.wanted:
            declared = adapter.declared
            if adapter.version is None:
                adapter.enter(AdapterState.LOADING)
            try:
                await self._load(adapter, declared)
                error, retry = None, False
            except Broken as broken:
                error, retry = str(broken), False
            except Exception as failure:
                log.debug("adapter %s", declared.name, exc_info=failure)
                error, retry = str(failure) or type(failure).__name__, True
            if adapter.declared is not declared:
                continue
            if not adapter.wanted:
                return
            if error is None:
                adapter.attempts, adapter.retry_at = 0, None
                adapter.enter(AdapterState.LOADED)
                return
            self._fail(adapter, " ".join(error.split())[:600], retry)
            return

    def _fail(self, adapter: Adapter, error: str, retry: bool) -> None:
        name = adapter.declared.name
        adapter.attempts += 1
        adapter.failures += 1
        wait_s = min(_RETRY_MOST_S, _RETRY_FIRST_S * 2 ** min(adapter.attempts - 1, 10))
        adapter.retry_at = time.monotonic() + wait_s if retry else None
        then = f"; next attempt in {wait_s:g} s" if retry else ""
        if adapter.version is not None:
            log.error("adapter %s: the version before is still served: %s%s", name, error, then)
            adapter.enter(AdapterState.LOADED, error)
        else:
            log.error("adapter %s failed: %s%s", name, error, then)
            adapter.enter(AdapterState.FAILED, error)
        self.on_load(name, False)

    async def _load(self, adapter: Adapter, declared: Declaration) -> None:
        name, host = declared.name, self._host
        max_rank = host.max_rank
        if max_rank is None:
            raise Broken("the engine runs without --enable-lora")
        if self.cache_folder is None:
            self.cache_folder = Path(tempfile.mkdtemp(prefix="kserve-vllm-adapters-"))
        cache = self.cache_folder
        if is_local(declared.source):
            adapter.tried = adapter.pending = await asyncio.to_thread(signature, declared.source)
        async with self._downloads:
            folder, digest, revision = await _in_thread(lambda: self._bring(declared, cache, max_rank))
        used = False
        try:
            if adapter.version is not None and adapter.version.digest == digest:
                adapter.version.revision = revision
                return
            key = f"{name}@{digest[:12]}"
            # A version that still finishes its requests is taken back as it is: one name is one number in a batch.
            version = next((each for each in adapter.retired if each.key == key), None)
            if version is None:
                version = Version(key, host.number(key), folder, digest, revision)
                await host.add(name, version)
                used = True
            else:
                adapter.retired.remove(version)
                version.retired_at = None
        finally:
            if not used:
                shutil.rmtree(folder, ignore_errors=True)
        if not adapter.wanted or adapter.declared is not declared:
            version.retired_at = time.monotonic()
            adapter.retired.append(version)
            return
        before, adapter.version, self._served = adapter.version, version, None
        host.publish(name, version)
        if before is not None:
            before.retired_at = time.monotonic()
            adapter.retired.append(before)
        adapter.loads += 1
        log.info("adapter %s is loaded from %s (%s)", name, declared.source, digest[:12])
        self.on_load(name, True)

    def _bring(self, declared: Declaration, cache: Path, max_rank: int) -> tuple[Path, str, str | None]:
        """Fetch, copy and check, in a thread of its own."""
        with tempfile.TemporaryDirectory(prefix="download-", dir=cache) as download:
            found, revision = fetch(declared, Path(download))
            folder, digest = stage(found, cache, declared.name)
        if self._base is None:
            self._base = self._host.base_model()
        try:
            check(folder, max_rank, self._base)
        except Broken:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return folder, digest, revision

    def _retire(self, adapter: Adapter) -> None:
        version, adapter.version, self._served = adapter.version, None, None
        self._host.withdraw(adapter.declared.name)
        if version is not None:
            adapter.unloads += 1
            version.retired_at = time.monotonic()
            adapter.retired.append(version)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(POLL_S)
            try:
                await self.look()
            except Exception as error:
                log.exception("looking after the adapters failed", exc_info=error)

    async def look(self) -> None:
        """One round: the file, the folders, what is to be tried again, what can go."""
        self._sync()
        if self._file is not None:
            try:
                content = await self._file.changed()
                if content is not None:
                    self._apply(parse(content, self._file.path, self._taken()))
            except OSError as error:
                log.error("%s %s can't be read, the adapters stay as they are: %s", FLAG, self._file.path, error)
            except ConfigError as error:
                log.error("the adapters stay as they are: %s", error)
        now = time.monotonic()
        seen = await asyncio.to_thread(_signatures, [each.declared.source for each in self.entries.values()])
        for adapter in list(self.entries.values()):
            if adapter.attempt is not None and not adapter.attempt.done():
                continue
            if adapter.wanted and adapter.origin == "file":
                due = adapter.retry_at is not None and now >= adapter.retry_at
                if self._moved(adapter, seen.get(adapter.declared.source)) or due:
                    self._begin(adapter)
            await self._free(adapter, now)
            if adapter.removed and not adapter.retired and (adapter.attempt is None or adapter.attempt.done()):
                self.entries.pop(adapter.declared.name)

    def _moved(self, adapter: Adapter, seen: Signature | None) -> bool:
        """Whether a folder has changed since it was tried, and no longer changes."""
        if seen is None:
            return False
        settled = seen == adapter.pending
        adapter.pending = seen
        return settled and seen != adapter.tried

    async def _free(self, adapter: Adapter, now: float) -> None:
        """Drop versions whose last request is done."""
        for version in list(adapter.retired):
            if version.retired_at is None or now - version.retired_at < GRACE_S or self._host.in_flight(version):
                continue
            adapter.retired.remove(version)
            await self._host.remove(version)
            log.debug("adapter version %s is freed", version.key)
            if version.ours:
                await asyncio.to_thread(shutil.rmtree, version.folder, True)


def _signatures(sources: Sequence[str]) -> dict[str, Signature]:
    return {source: signature(source) for source in sources if is_local(source)}


async def _in_thread(work: Callable[[], T]) -> T:
    """Run blocking work in a thread that doesn't keep the process from ending, as a download that hangs would."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(end: Callable[[], None]) -> None:
        if not future.done():
            end()

    def run() -> None:
        try:
            end = partial(future.set_result, work())
        except BaseException as error:
            end = partial(future.set_exception, error)
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(settle, end)

    threading.Thread(target=run, name="adapter", daemon=True).start()
    return await future
