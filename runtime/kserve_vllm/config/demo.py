"""Where the demo model lies in the installed package, and the engine flags it wants."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

from kserve_vllm.core.errors import ConfigError

NAME = "demo"
ADAPTERS = ("upper", "french")


def folder(part: str = "model") -> Path:
    """The folder of the demo model (`model`), an adapter (`adapters/upper`) or the draft model (`draft`).

    Raises:
        ConfigError: the package was built without its data.
    """
    path = Path(str(files("kserve_vllm"))) / "demo" / part
    if not path.is_dir():
        raise ConfigError(f"the demo model is missing from this installation: {path} is no folder")
    return path


def engine_flags() -> Mapping[str, str | bool | list[str]]:
    """Engine flags under which the demo model starts quickly on a laptop and offers its adapters."""
    return {
        "enforce-eager": True,
        "enable-lora": True,
        "max-loras": str(len(ADAPTERS)),
        "max-lora-rank": "8",
        "lora-modules": [f"{name}={folder(f'adapters/{name}')}" for name in ADAPTERS],
    }
