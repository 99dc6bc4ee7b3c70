"""Prompt warm-up: system prompts are run through the engine before anyone asks, so that the prefix cache has them.

A system prompt goes through the model's chat template with a short user turn behind it, by the same code as a chat's
request. The cache keeps whole blocks of tokens, so what a request shares is every block up to its own first word.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import yaml

from kserve_vllm.core.errors import ConfigError, RequestError
from kserve_vllm.core.types import Piece, TextJob
from kserve_vllm.core.watched_file import POLL_S, WatchedFile

log = logging.getLogger(__name__)

FLAG = "--warmup-file"
_FIELDS = {"model", "system", "messages", "prompt"}
_AT_ONCE = 4
_USER_TURN = "."
_PROGRESS_EVERY = 50


@dataclass(frozen=True)
class WarmupPrompt:
    """One entry of the list.

    Attributes:
        model: served name, or None for the base model.
        messages: (role, content) of each message; None where `prompt` is given.
        prompt: raw text.
    """

    model: str | None
    messages: tuple[tuple[str, str], ...] | None = None
    prompt: str | None = None


class Engine(Protocol):
    """What is needed of the engine."""

    @property
    def names(self) -> Sequence[str]:
        """Served names of the base model."""

    @property
    def generates(self) -> bool:
        """Whether the model continues text."""

    @property
    def caches_prefixes(self) -> bool:
        """Whether the prefix cache is on."""

    def generate(self, job: TextJob) -> AsyncIterator[Piece]:
        """Continue one prompt."""


def parse(content: bytes, path: object) -> list[WarmupPrompt]:
    """Read the list: texts (system prompts) and mappings of model, and one of system, messages and prompt.

    Raises:
        ConfigError: it can't be read; the sentence names the entry.
    """
    try:
        rows = yaml.safe_load(content)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{FLAG} {path} is neither YAML nor JSON: {error}") from error
    if rows is None:
        rows = []
    if not isinstance(rows, list):
        raise ConfigError(f"{FLAG} {path} must hold a list of system prompts, or of mappings")
    return list(dict.fromkeys(_parse_row(row, f"{FLAG} {path}, entry {i + 1}") for i, row in enumerate(rows)))


def _parse_row(row: object, where: str) -> WarmupPrompt:
    if isinstance(row, str) and row.strip():
        return WarmupPrompt(None, (("system", row), ("user", _USER_TURN)))
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: must be text, a system prompt, or a mapping of {', '.join(sorted(_FIELDS))}")
    if unknown := sorted(str(key) for key in row.keys() - _FIELDS):
        raise ConfigError(f"{where}: unknown field {unknown[0]!r}; the fields are {', '.join(sorted(_FIELDS))}")
    for name in ("model", "system", "prompt"):
        if name in row and not (isinstance(row[name], str) and row[name]):
            raise ConfigError(f"{where}: {name} must be text")
    model = row.get("model")
    if "prompt" in row:
        if "system" in row or "messages" in row:
            raise ConfigError(f"{where}: prompt stands alone, without system and messages")
        return WarmupPrompt(model, prompt=row["prompt"])
    messages = _parse_messages(row.get("messages", []), where)
    if "system" in row:
        messages.insert(0, ("system", row["system"]))
    if not messages:
        raise ConfigError(f"{where}: needs one of system, messages and prompt")
    if messages[-1][0] != "user":
        messages.append(("user", _USER_TURN))
    return WarmupPrompt(model, tuple(messages))


def _parse_messages(rows: object, where: str) -> list[tuple[str, str]]:
    if not isinstance(rows, list):
        raise ConfigError(f"{where}: messages must be a list of {{role, content}}")
    found = []
    for row in rows:
        if not isinstance(row, dict) or set(row) != {"role", "content"}:
            raise ConfigError(f"{where}: a message is {{role, content}}, both text")
        if not all(isinstance(value, str) for value in row.values()):
            raise ConfigError(f"{where}: a message is {{role, content}}, both text")
        found.append((row["role"], row["content"]))
    return found


class Warmup:
    """Runs the prompts of a file, and again what is new when the file or an adapter changes.

    Args:
        path: of the file.
        engine: the started engine.
        version: tells what identifies the version of the adapter behind a model's name; empty for the base model.
        count: called after each prompt with whether it was run.
    """

    def __init__(self, path: str, engine: Engine, version: Callable[[str], str], count: Callable[[bool], None]) -> None:
        self._file = WatchedFile(path, FLAG)
        self._engine = engine
        self._version = version
        self._count = count
        self._prompts: list[WarmupPrompt] = []
        self._done: set[tuple[WarmupPrompt, str]] = set()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Run all prompts, then watch the file.

        Raises:
            ConfigError: the file can't be used, or the engine has no use for it.
        """
        self._prompts = parse(await self._file.first(), self._file.path)
        if not self._engine.generates:
            raise ConfigError(f"{FLAG} is for models that generate text")
        if not self._engine.caches_prefixes:
            raise ConfigError(f"{FLAG} does nothing without the prefix cache (--enable-prefix-caching)")
        await self._run()
        self._task = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        """Watch no longer."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(POLL_S)
            try:
                content = await self._file.changed()
                if content is not None:
                    self._prompts = parse(content, self._file.path)
                    self._done.clear()
            except OSError as error:
                log.error("%s %s can't be read, the list stays as it is: %s", FLAG, self._file.path, error)
            except ConfigError as error:
                log.error("the warm-up list stays as it is: %s", error)
            await self._run()

    async def _run(self) -> None:
        """Run what was not run yet on the adapters' present versions."""
        wanted = {(prompt, self._version(prompt.model or "")) for prompt in self._prompts}
        self._done &= wanted
        todo = [each for each in wanted if each not in self._done]
        if not todo:
            return
        log.info("warming the prefix cache with %d prompts", len(todo))
        limit = asyncio.Semaphore(_AT_ONCE)
        results: list[bool] = []

        async def one(number: int, prompt: WarmupPrompt) -> None:
            async with limit:
                results.append(await self._warm(prompt, number))
            self._count(results[-1])
            if len(results) % _PROGRESS_EVERY == 0:
                log.info("warm-up: %d of %d prompts", len(results), len(todo))

        self._done.update(todo)
        await asyncio.gather(*(one(number, prompt) for number, (prompt, _) in enumerate(todo)))
        log.info("warm-up: %d of %d prompts are in the prefix cache", sum(results), len(todo))

    async def _warm(self, prompt: WarmupPrompt, number: int) -> bool:
        job = TextJob(
            prompt.model or self._engine.names[0],
            f"warm-up-{number}",
            prompt=prompt.prompt,
            messages=None if prompt.messages is None else [_message(*each) for each in prompt.messages],
            options={"max_tokens": 1, "temperature": 0.0},
        )
        try:
            async for _ in self._engine.generate(job):
                pass
        except RequestError as error:
            start = (prompt.prompt or (prompt.messages or (("", ""),))[0][1])[:60]
            log.error("warm-up of %r for %s failed: %s", start, job.model, error.message)
            return False
        return True


def _message(role: str, content: str) -> Mapping[str, str]:
    return {"role": role, "content": content}
