"""Moments of the adapters' table that can't be met on time with a real engine: things that happen while one loads."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kserve_vllm.adapters import registry as adapters
from kserve_vllm.adapters.files import Broken, read_shapes
from kserve_vllm.adapters.registry import AdapterRegistry, AdapterState, Version
from kserve_vllm.core.errors import ConfigError, InvalidRequest, NotFound
from kserve_vllm.core.types import TextJob
from tests.support import ROOT

DEMO = ROOT / "runtime" / "kserve_vllm" / "demo"


class StandIn:
    """In the engine's place: keeps what it is told, and loads when it is let."""

    base_names = ("base",)
    max_rank: int | None = 8

    def __init__(self) -> None:
        self.may_add = asyncio.Event()
        self.may_add.set()
        self.adding = asyncio.Event()
        self.held: dict[int, Path] = {}
        self.served: dict[str, int] = {}
        self.busy: set[int] = set()
        self.refuse = False
        self._number = 0

    def base_model(self) -> Any:
        return SimpleNamespace(layers=4, shapes=read_shapes(DEMO / "model" / "model.safetensors"))

    def number(self, key: str) -> int:
        self._number += 1
        return self._number

    async def add(self, name: str, version: Version) -> None:
        self.adding.set()
        await self.may_add.wait()
        if self.refuse:
            raise Broken("no")
        self.held[version.number] = version.folder

    async def remove(self, version: Version) -> None:
        assert version.number not in self.busy
        del self.held[version.number]

    def publish(self, name: str, version: Version) -> None:
        assert version.number in self.held
        self.served[name] = version.number

    def withdraw(self, name: str) -> None:
        self.served.pop(name, None)

    def in_flight(self, version: Version) -> int:
        return int(version.number in self.busy)

    def foreign(self) -> Mapping[str, tuple[str, int]]:
        return {}

    def published(self, name: str) -> bool:
        return name in self.served


class Stage:
    """A table over the stand-in, with one declared adapter `a`."""

    def __init__(self, folder: Path) -> None:
        self.host = StandIn()
        self.table = AdapterRegistry(self.host)
        self.folder = Path(shutil.copytree(DEMO / "adapters" / "upper", folder / "a"))
        self.other = Path(shutil.copytree(DEMO / "adapters" / "french", folder / "b"))
        self.file = folder / "adapters.json"

    def declare(self, source: Path | None) -> None:
        """Write the list."""
        rows = [] if source is None else [{"name": "a", "source": str(source)}]
        self.file.write_text(json.dumps({"adapters": rows}))

    async def begin_to_load(self, source: Path) -> None:
        """Write the list, and come to where the engine loads what it says. It goes on with `may_add`."""
        self.host.may_add.clear()
        self.host.adding.clear()
        self.declare(source)
        await self.table.look()
        await asyncio.wait_for(self.host.adding.wait(), 10)

    async def round(self) -> None:
        """Look once, and wait for what that began."""
        await self.table.look()
        await asyncio.gather(*(each.attempt for each in self.table.entries.values() if each.attempt is not None))

    def consistent(self) -> bool:
        """Whether the engine holds and the disk keeps exactly the versions that the table knows."""
        versions = [v for each in self.table.entries.values() for v in [*each.retired, each.version]]
        known = {v.number for v in versions if v is not None}
        assert set(self.host.held) == known
        assert all(path.is_dir() for path in self.host.held.values())
        cache = self.table.cache_folder
        assert cache is not None
        assert {path for path in cache.glob("*/*")} == set(self.host.held.values())
        return True


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Stage], Awaitable[None]]], None]:
    """Runs a story on a stage whose table was started with `a` declared."""
    monkeypatch.setattr(adapters, "GRACE_S", 0.0)

    def run(story: Callable[[Stage], Awaitable[None]]) -> None:
        async def all_of_it() -> None:
            stage = Stage(tmp_path)
            stage.declare(stage.folder)
            await stage.table.start(str(stage.file))
            try:
                await story(stage)
            finally:
                await stage.table.stop()
            assert stage.table.cache_folder is None or not stage.table.cache_folder.exists()

        asyncio.run(all_of_it())

    return run


Play = Callable[[Callable[[Stage], Awaitable[None]]], None]


def test_an_old_version_is_freed_when_its_last_request_is_done(play: Play) -> None:
    async def story(stage: Stage) -> None:
        stage.host.busy.add(1)
        stage.declare(stage.other)
        await stage.round()
        assert stage.host.served == {"a": 2}
        await stage.round()
        assert set(stage.host.held) == {1, 2}
        assert stage.consistent()
        stage.host.busy.clear()
        await stage.round()
        assert set(stage.host.held) == {2}
        assert stage.consistent()

    play(story)


def test_a_content_that_comes_back_while_it_still_runs_is_the_same_version(play: Play) -> None:
    async def story(stage: Stage) -> None:
        stage.host.busy.add(1)
        stage.declare(stage.other)
        await stage.round()
        stage.declare(stage.folder)
        await stage.round()
        assert stage.host.served == {"a": 1}
        await stage.round()
        assert set(stage.host.held) == {1}
        assert stage.consistent()

    play(story)


def test_an_adapter_unloaded_while_it_loads_is_not_served_and_is_freed(play: Play) -> None:
    async def story(stage: Stage) -> None:
        await stage.begin_to_load(stage.other)
        await stage.table.unload("a")
        stage.host.may_add.set()
        await stage.round()
        await stage.round()
        assert stage.host.served == {}
        assert stage.host.held == {}
        assert stage.table.all()[0].state is AdapterState.UNLOADED
        assert stage.consistent()

    play(story)


def test_unload_and_load_while_it_loads_leave_one_version(play: Play) -> None:
    async def story(stage: Stage) -> None:
        await stage.begin_to_load(stage.other)
        await stage.table.unload("a")
        loading = asyncio.create_task(stage.table.load("base:a"))
        await asyncio.sleep(0)
        stage.host.may_add.set()
        assert (await loading).state is AdapterState.LOADED
        await stage.round()
        await stage.round()
        assert list(stage.host.served) == ["a"]
        assert set(stage.host.held) == set(stage.host.served.values())
        assert stage.consistent()

    play(story)


def test_a_declaration_that_changes_while_it_loads_wins(play: Play) -> None:
    async def story(stage: Stage) -> None:
        await stage.begin_to_load(stage.other)
        stage.declare(stage.folder)
        await stage.table.look()
        stage.host.may_add.set()
        await stage.round()
        await stage.round()
        assert stage.host.served == {"a": 1}
        assert stage.consistent()

    play(story)


def test_removed_and_declared_again_is_loaded_again(play: Play) -> None:
    async def story(stage: Stage) -> None:
        stage.host.busy.add(1)
        stage.declare(None)
        await stage.round()
        assert (stage.table.all(), stage.table.find("a"), stage.host.served) == ([], None, {})
        with pytest.raises(NotFound):
            await stage.table.load("a")
        stage.declare(stage.folder)
        await stage.round()
        assert stage.host.served == {"a": 1}
        stage.declare(None)
        await stage.round()
        stage.host.busy.clear()
        await stage.round()
        assert (stage.host.held, stage.table.entries) == ({}, {})
        assert stage.consistent()

    play(story)


def test_an_unloaded_adapter_stays_so_until_its_own_entry_changes(play: Play) -> None:
    async def story(stage: Stage) -> None:
        await stage.table.unload("a")
        rows = [{"name": "b", "source": str(stage.other)}, {"name": "a", "source": str(stage.folder)}]
        stage.file.write_text(json.dumps({"adapters": rows}))
        await stage.round()
        assert list(stage.host.served) == ["b"]
        rows[1]["description"] = "changed"
        stage.file.write_text(json.dumps({"adapters": rows}))
        await stage.round()
        assert set(stage.host.served) == {"a", "b"}
        assert stage.table.served_names() == {"a", "b"}

    play(story)


def test_what_the_engine_refuses_leaves_nothing_behind(play: Play) -> None:
    async def story(stage: Stage) -> None:
        stage.host.refuse = True
        stage.declare(stage.other)
        await stage.round()
        adapter = stage.table.all()[0]
        assert (adapter.state, adapter.error, adapter.failures) == (AdapterState.LOADED, "no", 1)
        assert stage.consistent()
        with pytest.raises(InvalidRequest, match="no"):
            await stage.table.load("a")
        assert stage.host.served == {"a": 1}
        assert stage.consistent()

    play(story)


def test_an_adapter_that_goes_while_its_prompt_is_rendered_is_not_answered_by_the_base_model() -> None:
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion

    from kserve_vllm.engine.text_tasks import TextTasks

    class Handler(OpenAIServingCompletion):  # type: ignore[misc]
        override_max_tokens = None

        def __init__(self) -> None:
            self.models = SimpleNamespace(lora_requests={"a": object()}, is_base_model=lambda name: name == "base")
            self.model_config = SimpleNamespace(max_model_len=100)
            self.default_sampling_params: dict[str, Any] = {}

        async def render_completion_request(self, request: Any) -> Any:
            self.models.lora_requests.pop("a", None)
            return [{"type": "token", "prompt_token_ids": [1, 2]}]

        def _extract_prompt_len(self, prompt: Any) -> int:
            return 2

    client: Any = SimpleNamespace()
    models: Any = SimpleNamespace()
    state: Any = SimpleNamespace(openai_serving_completion=Handler())
    tasks = TextTasks(client, state, ("generate",), models, False)
    asyncio.run(tasks.prepare(TextJob("base", "r", prompt="1 +")))
    with pytest.raises(Exception, match="`a` does not exist"):
        asyncio.run(tasks.prepare(TextJob("a", "r", prompt="1 +")))


def test_a_file_needs_lora(tmp_path: Path) -> None:
    async def start() -> None:
        host = StandIn()
        host.max_rank = None
        with pytest.raises(ConfigError, match="--enable-lora"):
            await AdapterRegistry(host).start(str(tmp_path / "a"))

    asyncio.run(start())
