"""What is said of adapters and warm-up prompts in files, and what is checked without an engine."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file

from kserve_vllm.adapters import files as adapters
from kserve_vllm.adapters.files import Broken, Declaration
from kserve_vllm.cli import command as cli
from kserve_vllm.core.errors import ConfigError
from kserve_vllm.core.watched_file import WatchedFile
from kserve_vllm.engine import warmup
from tests.support import ROOT

DEMO = ROOT / "runtime" / "kserve_vllm" / "demo"
BASE = SimpleNamespace(layers=4, shapes=adapters.read_shapes(DEMO / "model" / "model.safetensors"))


def parse(rows: object, taken: tuple[str, ...] = ()) -> dict[str, Declaration]:
    """A list of adapters as the file holds it."""
    return adapters.parse(json.dumps({"adapters": rows}).encode(), "a.yaml", taken)


def test_yaml_and_json_declare_the_same() -> None:
    yaml = b"adapters:\n- name: a\n  source: /x\n  description: An adapter\n- {name: b, source: 'hf://org/b@v1'}\n"
    rows = [
        {"name": "a", "source": "/x", "description": "An adapter"},
        {"name": "b", "source": "hf://org/b", "revision": "v1"},
    ]
    assert adapters.parse(yaml, "a.yaml") == parse(rows)
    assert parse(rows)["b"] == Declaration("b", "hf://org/b", "", "v1")
    assert parse([{"name": "c", "source": "file:///x"}])["c"].source == "/x"
    assert adapters.parse(b"", "a.yaml") == adapters.parse(b"adapters:", "a.yaml") == {}


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([{"name": "a", "source": "/x"}] * 2, "two adapters named 'a'"),
        ([{"name": "base", "source": "/x"}], "'base' is taken"),
        ([{"name": "a:b", "source": "/x"}], "entry 1: name 'a:b' can't be used"),
        ([{"name": "../a", "source": "/x"}], "can't be used"),
        ([{"source": "/x"}], "name ''"),
        ([{"name": "a", "source": "x"}], "absolute path"),
        ([{"name": "a", "source": "ftp://x"}], "s3://"),
        ([{"name": "a", "source": "hf://x"}], "hf://organisation/name"),
        ([{"name": "a", "source": "hf://o/x@1", "revision": "2"}], "twice"),
        ([{"name": "a", "source": "/x", "revision": "2"}], "hf:// sources alone"),
        ([{"name": "a", "source": "/x", "rank": 8}], "unknown field 'rank'"),
        ([{"name": "a", "source": 1}], "source must be text"),
        (["a"], "must be a mapping"),
        ({"a": "/x"}, "must hold `adapters:`"),
    ],
)
def test_a_list_that_can_not_be_used_is_refused_with_the_entry(rows: object, sentence: str) -> None:
    with pytest.raises(ConfigError, match=r"a\.yaml") as refused:
        parse(rows, ("base",))
    assert sentence in str(refused.value)


@pytest.mark.parametrize("content", [b"{", b"[]", b"adapters: []\nmore: 1", b"\xff\xfe\x00"])
def test_a_file_that_is_no_list_is_refused(content: bytes) -> None:
    with pytest.raises(ConfigError):
        adapters.parse(content, "a.yaml")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of a demo adapter."""
    return Path(shutil.copytree(DEMO / "adapters" / "upper", tmp_path / "upper"))


def configure(folder: Path, **values: object) -> None:
    """Change the adapter's configuration."""
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **values}))


def weights(folder: Path, module: str, down: tuple[int, int], up: tuple[int, int] | None) -> None:
    """Weights of one module alone."""
    tensors = {f"base_model.model.{module}.lora_A.weight": np.zeros(down, np.float32)}
    if up is not None:
        tensors[f"base_model.model.{module}.lora_B.weight"] = np.zeros(up, np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")


def test_a_demo_adapter_fits_the_demo_model(folder: Path) -> None:
    adapters.check(folder, 8, BASE)


@pytest.mark.parametrize(
    ("rank", "sentence"),
    [(9, "set --max-lora-rank 16"), (300, "set --max-lora-rank 320"), (600, "at most 512")],
)
def test_a_rank_above_the_servers_is_refused_with_what_to_set(folder: Path, rank: int, sentence: str) -> None:
    configure(folder, r=rank)
    with pytest.raises(Broken, match=f"its rank is {rank} and --max-lora-rank is 8; .*{sentence}"):
        adapters.check(folder, 8, BASE)
    configure(folder, r=8, rank_pattern={"q_proj": rank})
    with pytest.raises(Broken, match=sentence):
        adapters.check(folder, 8, BASE)


@pytest.mark.parametrize("values", [{"peft_type": "IA3"}, {"r": "8"}, {"r": 0}, {"r": None}])
def test_a_configuration_that_is_no_lora_is_refused(folder: Path, values: dict[str, object]) -> None:
    configure(folder, **values)
    with pytest.raises(Broken):
        adapters.check(folder, 8, BASE)


@pytest.mark.parametrize(
    ("module", "down", "up", "sentence"),
    [
        ("model.layers.0.self_attn.q_proj", (8, 64), (128, 8), "128 x 64 in the adapter and 128 x 128"),
        ("model.layers.0.self_attn.q_proj", (8, 128), (64, 8), "64 x 128 in the adapter and 128 x 128"),
        ("model.layers.4.self_attn.q_proj", (8, 128), (128, 8), "the base model 4 layers"),
        ("model.layers.0.self_attn.q_proj", (8, 128), (128, 4), "differ"),
        ("model.layers.0.self_attn.q_proj", (16, 128), (128, 16), "has rank 16"),
        ("model.layers.0.self_attn.q_proj", (8, 128), None, "only one of"),
    ],
)
def test_weights_of_another_shape_are_refused(
    folder: Path, module: str, down: tuple[int, int], up: tuple[int, int] | None, sentence: str
) -> None:
    weights(folder, module, down, up)
    with pytest.raises(Broken, match=sentence):
        adapters.check(folder, 8, BASE)


def test_damaged_weights_are_refused(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    for content in (b"", b"\xff" * 100, file.read_bytes()[:-1]):
        file.write_bytes(content)
        with pytest.raises(Broken, match="is damaged"):
            adapters.check(folder, 8, BASE)


def test_a_copy_stands_alone_and_its_digest_is_of_the_content(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first, digest = adapters.stage(folder, cache, "org/a")
    again, same = adapters.stage(folder, cache, "org/a")
    assert first != again
    assert digest == same
    configure(folder, r=4)
    _, changed = adapters.stage(folder, cache, "org/a")
    assert changed != digest
    shutil.rmtree(folder)
    shutil.rmtree(again)
    adapters.check(first, 8, BASE)
    with pytest.raises(Broken):
        adapters.stage(tmp_path, cache, "org/a")
    assert len(list(cache.glob("*/*"))) == 2


def test_what_to_install_for_storage_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The locks install it; this is for who installs the package another way.
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    declared = parse([{"name": "a", "source": "s3://bucket/a"}])["a"]
    with pytest.raises(Broken, match=r"s3:// needs .* pip install kserve-storage==0\.21"):
        adapters.fetch(declared, tmp_path)


def test_a_swapped_symlink_changes_a_folders_signature(folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(folder, tmp_path / "other")
    link = tmp_path / "link"
    link.symlink_to(folder)
    before = adapters.signature(str(link))
    link.unlink()
    link.symlink_to(other)
    assert adapters.signature(str(link)) != before
    assert adapters.signature(str(tmp_path / "nothing")) == ()


def test_a_watched_file_is_compared_by_content(tmp_path: Path) -> None:
    file = tmp_path / "file"

    async def follow() -> None:
        with pytest.raises(ConfigError, match=r"--x .*file can't be read"):
            await WatchedFile(str(file), "--x").first()
        file.write_bytes(b"1")
        watched = WatchedFile(str(file), "--x")
        assert await watched.first() == b"1"
        file.write_bytes(b"1")
        assert await watched.changed() is None
        file.write_bytes(b"2")
        assert await watched.changed() == b"2"
        assert await watched.changed() is None
        file.unlink()
        with pytest.raises(FileNotFoundError):
            await watched.changed()
        assert await watched.changed() is None
        file.write_bytes(b"3")
        assert await watched.changed() == b"3"

    asyncio.run(follow())


def flags(*arguments: str) -> dict[str, str]:
    """Engine flags and where they come from."""
    settings = cli.resolve(["some/model", *arguments], {})
    return {flag.key: flag.source for flag in settings.engine}


def test_an_adapters_file_switches_lora_on() -> None:
    assert "enable-lora" not in flags()
    chosen = flags("--adapters-file", "/a.yaml")
    assert chosen["enable-lora"] == chosen["max-loras"] == chosen["max-cpu-loras"] == "adapters file"
    chosen = flags("--adapters-file", "/a.yaml", "--enable-lora", "--max-loras", "64")
    assert (chosen["enable-lora"], chosen["max-loras"]) == ("flag --enable-lora", "flag --max-loras")
    assert "max-cpu-loras" not in chosen
    with pytest.raises(ConfigError, match="--no-enable-lora"):
        flags("--adapters-file", "/a.yaml", "--no-enable-lora")


def test_warm_up_entries_end_with_a_user_turn_unless_they_are_raw() -> None:
    turn = ("user", ".")
    found = warmup.parse(
        b"""
- Be brief.
- {system: Be brief., model: a}
- {messages: [{role: system, content: S}, {role: user, content: U}]}
- {system: S, messages: [{role: user, content: U}, {role: assistant, content: A}]}
- {prompt: 'Once upon'}
- Be brief.
""",
        "w.yaml",
    )
    assert found == [
        warmup.WarmupPrompt(None, (("system", "Be brief."), turn)),
        warmup.WarmupPrompt("a", (("system", "Be brief."), turn)),
        warmup.WarmupPrompt(None, (("system", "S"), ("user", "U"))),
        warmup.WarmupPrompt(None, (("system", "S"), ("user", "U"), ("assistant", "A"), turn)),
        warmup.WarmupPrompt(None, prompt="Once upon"),
    ]
    assert warmup.parse(b"", "w.yaml") == []


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "a: b",
        "- 1",
        "- ''",
        "- {}",
        "- {system: 1}",
        "- {model: a}",
        "- {prompt: a, system: b}",
        "- {prompts: a}",
        "- {messages: a}",
        "- {messages: [a]}",
        "- {messages: [{role: user}]}",
        "- {messages: [{role: user, content: 1}]}",
    ],
)
def test_a_warm_up_list_that_can_not_be_used_is_refused(content: str) -> None:
    with pytest.raises(ConfigError, match=r"--warmup-file w\.yaml"):
        warmup.parse(content.encode(), "w.yaml")
