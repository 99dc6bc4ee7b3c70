"""The declared list of adapters and the files of an adapter: parsed, fetched, copied and checked.

All of it blocks, and none of it needs the engine.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import quote

import yaml

from kserve_vllm.core.errors import ConfigError

FLAG = "--adapters-file"
HUB = "hf://"
_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,127}$")
_STORAGE = ("s3://", "gs://", "hdfs://", "webhdfs://", "https://", "http://", "oci://")
_CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt")
_STORAGE_CODE = "import sys; from kserve_storage import Storage; print(Storage.download(*sys.argv[1:]))"
_DOWNLOAD_S = 3600.0
_FIELDS = {"name", "source", "description", "revision"}
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes
_LAYER = re.compile(r"\.layers\.(\d+)\.")
_PLAIN_DTYPES = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I8"})  # one number an element


class Broken(Exception):
    """An adapter that can't be used as it is; nothing but a change of it helps."""


@dataclass(frozen=True)
class Declaration:
    """One entry of the list.

    Attributes:
        name: what clients ask for.
        source: a folder, `hf://org/name[@revision]`, or a URI that KServe's storage downloads.
        description: for people.
        revision: branch, tag or commit on the hub; stands in for `@revision`.
    """

    name: str
    source: str
    description: str = ""
    revision: str | None = None


class BaseModel(Protocol):
    """What an adapter is checked against."""

    @property
    def layers(self) -> int | None:
        """Number of layers, if known."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of weights by name, as far as they are known."""


def parse(content: bytes, path: object, taken: Sequence[str] = ()) -> dict[str, Declaration]:
    """Read the declared list: YAML or JSON, `adapters: [{name, source, description?, revision?}]`.

    Args:
        content: of the file; an empty one declares nothing.
        path: of the file, for messages.
        taken: names that an adapter can't have.

    Raises:
        ConfigError: it can't be read; the sentence names the entry.
    """
    try:
        tree = yaml.safe_load(content)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{FLAG} {path} is neither YAML nor JSON: {error}") from error
    rows = [] if tree is None else tree.get("adapters") if isinstance(tree, dict) else None
    if rows is None and isinstance(tree, dict) and "adapters" in tree:
        rows = []
    if not isinstance(rows, list) or (isinstance(tree, dict) and set(tree) != {"adapters"}):
        raise ConfigError(f"{FLAG} {path} must hold `adapters:` with a list of {{name, source}}, and nothing else")
    found: dict[str, Declaration] = {}
    for index, row in enumerate(rows):
        declared = _parse_row(row, f"{FLAG} {path}, entry {index + 1}")
        if declared.name in found:
            raise ConfigError(f"{FLAG} {path} has two adapters named {declared.name!r}")
        if declared.name in taken:
            raise ConfigError(f"{FLAG} {path}: the name {declared.name!r} is taken by the model or by --lora-modules")
        found[declared.name] = declared
    return found


def _parse_row(row: object, where: str) -> Declaration:
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: must be a mapping with name and source")
    if unknown := sorted(str(key) for key in row.keys() - _FIELDS):
        raise ConfigError(f"{where}: unknown field {unknown[0]!r}; the fields are {', '.join(sorted(_FIELDS))}")
    values = {key: "" if value is None else value for key, value in row.items()}
    for key, value in values.items():
        if not isinstance(value, str):
            raise ConfigError(f"{where}: {key} must be text")
    name, source = values.get("name", ""), values.get("source", "")
    if not _NAME.match(name):
        raise ConfigError(
            f"{where}: name {name!r} can't be used; letters, digits and . _ / - make a name, 128 of them at most"
        )
    where = f"{where} ({name})"
    revision = values.get("revision") or None
    if source.startswith(HUB):
        repository, _, suffix = source.removeprefix(HUB).partition("@")
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
            raise ConfigError(f"{where}: source {source!r} must be hf://organisation/name or ...@revision")
        if suffix and revision:
            raise ConfigError(f"{where}: the revision is given twice, in source and in revision")
        revision = suffix or revision
        source = HUB + repository
    elif revision:
        raise ConfigError(f"{where}: revision is for hf:// sources alone")
    elif source.startswith("file://"):
        source = source.removeprefix("file://")
    if not source.startswith(("/", HUB, *_STORAGE)):
        raise ConfigError(
            f"{where}: source {source!r} must be a folder's absolute path, hf://organisation/name, or begin with one "
            f"of {', '.join(_STORAGE)}"
        )
    return Declaration(name, source, values.get("description", ""), revision)


def is_local(source: str) -> bool:
    """Whether a source is a folder of this machine."""
    return source.startswith("/")


Signature = tuple[tuple[str, int, int, int, int], ...]
"""Name, device, inode, size in bytes and time of change in nanoseconds, of each file."""


def signature(folder: str) -> Signature:
    """What changes when the files of an adapter's folder do: inode, size and time of each, symlinks followed."""
    found = []
    for name in (_CONFIG, *_WEIGHTS):
        try:
            info = (Path(folder) / name).stat()
        except OSError:
            continue
        found.append((name, info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns))
    return tuple(found)


def fetch(declared: Declaration, cache: Path) -> tuple[Path, str | None]:
    """Bring an adapter's files to this machine. Blocks.

    Args:
        declared: what to fetch.
        cache: an empty folder for a download.

    Returns:
        the folder, and the commit for a source on the hub.

    Raises:
        Broken: the source can't be used at all.
        Exception: whatever the download raised; another attempt may succeed.
    """
    source = declared.source
    if is_local(source):
        if not Path(source).is_dir():
            raise Broken(f"{source} is no folder")
        return Path(source), None
    if source.startswith(HUB):
        from huggingface_hub import snapshot_download

        folder = Path(
            snapshot_download(source.removeprefix(HUB), revision=declared.revision, allow_patterns=[_CONFIG, *_WEIGHTS])
        )
        return folder, folder.name
    return _from_storage(source, cache), None


def _from_storage(source: str, cache: Path) -> Path:
    """Let KServe's storage download, in a process of its own: it forks, which a process with threads, sockets and gRPC
    does not survive unharmed."""
    if importlib.util.find_spec("kserve_storage") is None:
        raise Broken(
            f"{source.split('://', 1)[0]}:// needs KServe's storage, which is not installed here: "
            f"pip install kserve-storage=={importlib.metadata.version('kserve')}"
        )
    command = [sys.executable, "-P", "-c", _STORAGE_CODE, source, str(cache)]
    done = subprocess.run(  # noqa: S603 - the operator's own list names the source
        command, capture_output=True, text=True, timeout=_DOWNLOAD_S, check=False
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise OSError(lines[-1] if lines else f"KServe's storage ended with {done.returncode}")
    return Path(done.stdout.splitlines()[-1])


def stage(folder: Path, cache: Path, name: str) -> tuple[Path, str]:
    """Copy the files that the engine reads to a new folder. Blocks.

    Returns:
        the copy, and its digest.

    Raises:
        Broken: a file is missing.
    """
    if not (folder / _CONFIG).is_file():
        raise Broken(f"{folder} has no {_CONFIG}")
    weights = next((each for each in _WEIGHTS if (folder / each).is_file()), None)
    if weights is None:
        raise Broken(f"{folder} has no {_WEIGHTS[0]}")
    home = cache / quote(name, safe="")
    home.mkdir(parents=True, exist_ok=True)
    copy = Path(tempfile.mkdtemp(dir=home))
    try:
        digest = hashlib.sha256()
        for each in (_CONFIG, weights):
            shutil.copyfile(folder / each, copy / each)
            with open(copy / each, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        # A folder of its own for every copy: one that is deleted is nobody else's.
        target = home / f"{digest.hexdigest()[:16]}-{copy.name}"
        return copy.rename(target), digest.hexdigest()
    except BaseException:
        shutil.rmtree(copy, ignore_errors=True)
        raise


def check(folder: Path, max_rank: int, base: BaseModel) -> None:
    """Check an adapter's files against the base model, as far as that can be done outside the engine. Blocks.

    vLLM copies weights of a wrong shape into the corner of its own where they fit, without a word.

    Raises:
        Broken: it can't be used; the sentence says why, and what to do where there is something.
    """
    try:
        config = json.loads((folder / _CONFIG).read_bytes())
    except ValueError as error:
        raise Broken(f"{_CONFIG} is no JSON: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise Broken(f"{_CONFIG} does not describe a LoRA adapter (peft_type LORA)")
    ranks = [config.get("r"), *(config.get("rank_pattern") or {}).values()]
    if not all(isinstance(rank, int) and rank > 0 for rank in ranks):
        raise Broken(f"{_CONFIG} has no usable rank: r is {config.get('r')!r}")
    rank = max(ranks)
    if rank > max_rank:
        enough = next((each for each in _RANKS if each >= rank), None)
        advice = f"set --max-lora-rank {enough}" if enough else f"the engine takes at most {_RANKS[-1]}"
        raise Broken(f"its rank is {rank} and --max-lora-rank is {max_rank}; {advice}")
    weights = folder / _WEIGHTS[0]
    if weights.is_file():
        _check_shapes(read_shapes(weights), max_rank, base)


def _check_shapes(shapes: Mapping[str, tuple[int, ...]], max_rank: int, base: BaseModel) -> None:
    pairs: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, shape in shapes.items():
        match = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora_([AB])\.weight", key)
        if match:
            pairs.setdefault(match[1], {})[match[2]] = shape
    if not pairs:
        raise Broken("its weights hold no lora_A and lora_B")
    for module, pair in pairs.items():
        if len(pair) != 2:
            raise Broken(f"{module} has only one of lora_A and lora_B")
        layer = _LAYER.search(f".{module}.")
        if layer and base.layers is not None and int(layer[1]) >= base.layers and "vis" not in module:
            raise Broken(f"it is for another base model: it has {module}, and the base model {base.layers} layers")
        down, up = pair["A"], pair["B"]
        if len(down) != 2 or len(up) != 2:
            continue
        if down[0] != up[1]:
            raise Broken(f"{module}: the ranks of lora_A {list(down)} and lora_B {list(up)} differ")
        if down[0] > max_rank:
            raise Broken(f"{module} has rank {down[0]} and --max-lora-rank is {max_rank}")
        wanted = base.shapes.get(f"{module}.weight")
        if wanted is not None and len(wanted) == 2 and wanted != (up[0], down[1]):
            raise Broken(
                f"it is for another base model: {module} is {up[0]} x {down[1]} in the adapter and "
                f"{wanted[0]} x {wanted[1]} in the base model"
            )


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in a safetensors file whose elements are not packed. Blocks.

    Raises:
        Broken: the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            return {key: tuple(s.get_shape()) for key, s in slices.items() if s.get_dtype() in _PLAIN_DTYPES}
    except SafetensorError as error:
        raise Broken(f"{path.name} is damaged: {error}") from error
