"""GPUs and what they cost, from `ops/data/gpus.yaml` and a dated file of prices."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from kserve_vllm.core.errors import ConfigError

HOURS_PER_MONTH = 730.0  # 365 * 24 / 12


@dataclass(frozen=True)
class GPU:
    """A GPU; units and sources stand in `ops/data/gpus.yaml`."""

    name: str
    memory_gib: float
    bandwidth_gb_s: float
    tflops: Mapping[int, float]
    link_gb_s: float
    node: int
    product: str
    resource: str = "nvidia.com/gpu"
    aiconfigurator: str = ""
    fp8: bool = True

    def operations(self, bits: int) -> float:
        """Dense operations per second at a width of `bits`, or of the next wider one that the chip has."""
        for width in (4, 8, 16):
            if width >= bits and width in self.tflops:
                return self.tflops[width] * 1e12
        return self.tflops[16] * 1e12


@dataclass(frozen=True)
class Prices:
    """Price per GPU and hour.

    Attributes:
        per_hour: GPU's name to a price.
        currency: its unit.
        dated: when they were written down.
        source: where the file is, for people.
    """

    per_hour: Mapping[str, float]
    currency: str
    dated: date
    source: str


@functools.cache
def gpus() -> Mapping[str, GPU]:
    """All GPUs that are known, by name."""
    text = (files("kserve_vllm.ops") / "data" / "gpus.yaml").read_text(encoding="utf-8")
    return {name: GPU(name=name, **entry) for name, entry in yaml.safe_load(text).items()}


def gpu(name: str) -> GPU:
    """A GPU by name, whatever its case. Raises ConfigError with the names that are known."""
    known = {key.lower(): value for key, value in gpus().items()}
    found = known.get(name.lower()) or known.get(name.lower().replace("_", "-").removesuffix("-sxm"))
    if found is None:
        raise ConfigError(f"--gpu {name!r} is none of {', '.join(gpus())}")
    return found


def prices(path: Path | None = None, overrides: Mapping[str, float] | None = None) -> Prices:
    """Read a file of prices; the package's own where none is named.

    Raises:
        ConfigError: the file can't be read, or lacks its date.
    """
    where = path or files("kserve_vllm.ops") / "data" / "prices.yaml"
    try:
        content: Any = yaml.safe_load(where.read_text(encoding="utf-8"))
        found = {}
        if not isinstance(content, dict) or not isinstance(content.get("prices", {}), dict):
            raise ValueError("not a table with prices by GPU")
        for name, entry in content["prices"].items():
            try:
                known = gpu(str(name))
            except ConfigError as error:
                raise ConfigError(str(error).removeprefix("--gpu ")) from None
            per_hour = entry["per_hour"] if isinstance(entry, Mapping) else entry
            if isinstance(per_hour, bool) or not isinstance(per_hour, (int, float)):
                raise ValueError(f"the price of {known.name} is no number")
            found[known.name] = float(per_hour)
        dated = content["date"]
        dated = dated if isinstance(dated, date) else date.fromisoformat(str(dated))
        currency = content.get("currency", "USD")
        if not isinstance(currency, str):
            raise ValueError(f"{currency!r} is no currency such as USD")
    except ConfigError as error:
        raise ConfigError(f"--prices {where}: {error}") from None
    except KeyError as error:
        raise ConfigError(
            f"--prices {where}: no {error.args[0]}; it needs date: 2026-01-31 and prices: {{H100: 2.5}}"
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"--prices {where}: not YAML: {' '.join(str(error).split())}") from None
    except (OSError, ValueError, OverflowError) as error:
        raise ConfigError(f"--prices {where}: {error}; it needs date: 2026-01-31 and prices: {{H100: 2.5}}") from None
    if any(not 0 < value < 1e6 for value in found.values()):
        raise ConfigError(f"--prices {where}: a price is not above 0")
    return Prices({**found, **(overrides or {})}, currency, dated, str(path) if path else "the package's list")
