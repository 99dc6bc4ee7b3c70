"""Exact bytes of a model from its files' headers; where there are none, an estimate from its shape.

Formats: safetensors (8 bytes little-endian length, then a JSON object of tensor name to dtype, shape and data_offsets;
https://github.com/huggingface/safetensors#format), its index (`model.safetensors.index.json`: weight_map), and GGUF
version 2 and 3 (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). Only headers are read, never weights.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from kserve_vllm.core.errors import ConfigError
from kserve_vllm.ops.model.architecture import (
    Architecture,
    Config,
    LayerCache,
    Parameters,
    Quantization,
    from_parameters,
    parse,
)

_MAX_HEADER = 100 << 20  # bytes; safetensors itself refuses longer ones


@dataclass(frozen=True)
class Weights:
    """Bytes of a model's weights.

    Attributes:
        total: all of them.
        embedding: input and output tables, which a tensor parallel rank holds a share of.
        experts: matrices of routed experts.
        other_modal: vision and audio towers.
        tensors: how many tensors were read, 0 for an estimate.
        source: where the figure comes from, for people.
        exact: whether it was read from files.
    """

    total: int
    embedding: int
    experts: int
    other_modal: int
    tensors: int
    source: str
    exact: bool


@dataclass(frozen=True)
class Model:
    """A model that a plan is made for."""

    architecture: Architecture
    weights: Weights
    # Formats of the weights that the engine could load from here.
    formats: tuple[str, ...] = ()


_MOST_PATH = 1024
_MOST_BYTES = 1 << 60


def read_model(source: str, quantization: str | None = None) -> Model:
    """Read a model from a folder, a GGUF file, or a hub id whose files are in the local Hugging Face cache.

    Args:
        source: a path or an id such as `Qwen/Qwen3-8B`.
        quantization: a name of `architecture.QUANTIZATIONS`, for weights that the files do not have yet.

    Raises:
        ConfigError: nothing is found there, or a file can't be read. The message says what to do without a network.
    """
    if "\0" in source or len(os.fsencode(source)) > _MOST_PATH:
        raise ConfigError(f"{source[:40]!r}...: no file has such a name")
    path = Path(os.path.expanduser(source))
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ConfigError(f"{path}: there is no such file")
        return _read_gguf(path)
    folder = path if path.is_dir() else cached(source)
    config_path = folder / "config.json"
    if not config_path.exists():
        if ggufs := sorted(folder.glob("*.gguf")):
            return _read_gguf(_one_of(ggufs))
        if (own_format := folder / "params.json").exists():
            return _modelled(_mistral(_object(own_format)), own_format, folder, source, quantization)
        raise ConfigError(f"{folder}: no config.json there, and neither a .gguf file nor Mistral's params.json")
    config = _object(config_path)
    own = folder / "hf_quant_config.json"  # where ModelOpt writes what it did
    if "quantization_config" not in config and own.exists():
        try:
            found = json.loads(own.read_text(encoding="utf-8"))["quantization"]
            config["quantization_config"] = {"quant_method": "modelopt", **found}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{own}: {error}") from None
    return _modelled(config, config_path, folder, source, quantization)


def _object(path: Path) -> dict[str, Any]:
    """A file that holds a JSON object. Raises ConfigError where it does not."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON ({error})") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: not an object")
    return found


def _mistral(params: Config) -> Config:
    """Mistral's own params.json with the names of a config.json; names as in vLLM's
    `transformers_utils/configs/mistral.py`."""
    names = {
        "dim": "hidden_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "n_kv_heads": "num_key_value_heads",
        "hidden_dim": "intermediate_size",
        "max_seq_len": "max_position_embeddings",
        "tied_embeddings": "tie_word_embeddings",
    }
    found = {names.get(name, name): value for name, value in params.items()}
    found.setdefault("model_type", "mistral")
    found.setdefault("sliding_window", None)
    if isinstance(moe := params.get("moe"), dict):
        found |= {
            "num_local_experts": moe.get("num_experts"),
            "num_experts_per_tok": moe.get("num_experts_per_tok"),
            "moe_intermediate_size": moe.get("expert_hidden_dim"),
        }
    if isinstance(vision := params.get("vision_encoder"), dict):
        found["vision_config"] = vision
    if "fp8" in str((params.get("quantization") or {}).get("qformat_weight", "")):
        found["quantization_config"] = {"quant_method": "fp8"}
    return found


def _modelled(config: Config, config_path: Path, folder: Path, source: str, quantization: str | None) -> Model:
    try:
        architecture = parse(config, source.rstrip("/"))
    except (TypeError, ValueError, KeyError, ZeroDivisionError, AttributeError, IndexError):
        raise ConfigError(
            f"{config_path}: a field is missing, or has a value that no model has; compare it with the file that the "
            "model's makers publish"
        ) from None
    tensors = list(safetensors_of(folder))
    if not tensors:
        estimate = architecture.with_quantization(quantization) if quantization else architecture
        return Model(estimate, estimated_weights(estimate, f"estimated from {config_path.name}: no safetensors here"))
    weights = _sum(tensors, str(folder), bool(config.get("tie_word_embeddings")))
    if quantization and quantization not in ("none", own_method := architecture.quantization.method):
        if own_method != "none":
            raise ConfigError(
                f"--quantization {quantization}: the files in {folder} are stored as {own_method} already; leave it "
                "out, or name a folder of the unquantized model"
            )
        architecture = architecture.with_quantization(quantization)
        linear = weights.total - weights.embedding - weights.other_modal
        shrunk = architecture.quantization.bytes_per_weight / architecture.dtype_bytes
        weights = replace(
            weights,
            exact=False,
            experts=int(weights.experts * shrunk),
            total=int(weights.embedding + weights.other_modal + linear * shrunk),
            source=f"{weights.source}, its linear layers stored as {quantization}",
        )
    return Model(architecture, weights, ("safetensors",))


def guess_model(params: str, quantization: str | None = None) -> Model:
    """A model of which only the number of parameters is known. Raises ConfigError when it can't be read."""
    architecture = from_parameters(params)
    if quantization:
        architecture = architecture.with_quantization(quantization)
    return Model(architecture, estimated_weights(architecture, f"estimated from --params {params}"))


def estimated_weights(architecture: Architecture, source: str) -> Weights:
    """Bytes from counts of parameters: tables and norms as they are, linear layers as the quantization stores them."""
    count, linear = architecture.parameters, architecture.dtype_bytes
    if architecture.quantization.method != "none":
        linear = architecture.quantization.bytes_per_weight
    tables = count.embedding * architecture.dtype_bytes
    if architecture.quantization.method == "gguf":
        tables = count.embedding * linear
    towers = count.tower * architecture.dtype_bytes
    total = tables + towers + count.other * architecture.dtype_bytes + (count.linear + count.experts) * linear
    return Weights(int(total), int(tables), int(count.experts * linear), int(towers), 0, source, False)


def _one_of(ggufs: list[Path]) -> Path:
    """The GGUF file that a folder is about: its only one, or the first part of its only split one."""
    ggufs = [f for f in ggufs if not f.name.startswith("mmproj")] or ggufs  # llama.cpp's name for an image encoder
    models = [f for f in ggufs if not (part := _SPLIT.search(f.name)) or int(part[1]) == 1]
    if len(models) != 1:
        raise ConfigError(
            f"{ggufs[0].parent} has several GGUF files ({', '.join(f.name for f in (models or ggufs)[:6])}): name one"
        )
    return models[0]


_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})\.[a-z]+$")


def _parts(first: Path) -> list[Path]:
    """All files of a model that is split as `-00001-of-00003` says, in order.

    Raises:
        ConfigError: one of them is missing.
    """
    match = _SPLIT.search(first.name)
    if not match:
        return [first]
    number = int(match[2])
    files = [
        first.with_name(f"{first.name[: match.start()]}-{i:05d}-of-{number:05d}{first.suffix}")
        for i in range(1, number + 1)
    ]
    for file in files:
        if not file.exists():
            raise ConfigError(
                f"{first.name} is one of {number} parts, {file.name} is not there: an incomplete download"
            )
    return files


def cached(hub_id: str) -> Path:
    """The folder of a hub id in the local cache (HF_HUB_CACHE, HF_HOME, ~/.cache/huggingface).

    Raises:
        ConfigError: it is not there.
    """
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    root = Path(os.path.expanduser(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")))
    if re.fullmatch(r"[\w.-]+/[\w.-]+", hub_id):
        repository = root / f"models--{hub_id.replace('/', '--')}"
        head = repository / "refs" / "main"
        if head.exists() and (found := repository / "snapshots" / head.read_text().strip()).is_dir():
            return found
        for snapshot in sorted((repository / "snapshots").glob("*")):
            return snapshot
        if hub_id.startswith("."):
            raise ConfigError(f"{hub_id}: there is no such folder")
        raise ConfigError(
            f"{hub_id} is neither a folder nor in the local cache ({root}). With a network: "
            f"hf download {hub_id} config.json model.safetensors.index.json (their total size is in these two, "
            "the weights' headers are not). Without one: name a folder that has config.json, or say --params 70B"
        )
    if "/" in hub_id.strip("/") or hub_id.startswith(("/", "~", ".")):
        raise ConfigError(f"{hub_id}: there is no such folder")
    raise ConfigError(f"{hub_id!r} is neither a folder, a .gguf file nor a hub id such as Qwen/Qwen3-8B")


def safetensors_of(folder: Path) -> Iterator[tuple[str, int]]:
    """Name and bytes of each tensor in a folder's safetensors files.

    Where the files themselves are absent and only the index is there (a download of the small files), one entry stands
    for all: the index's own `total_size`.

    Raises:
        ConfigError: a file's header can't be read, the index or a file's name speaks of a file that is not there while
            others are, or the index of tensors that no file has.
    """
    index = folder / "model.safetensors.index.json"
    named: set[str] = set()
    if index.exists():
        try:
            named, names, size = _index(json.loads(index.read_text(encoding="utf-8")))
        except (OSError, ValueError, RecursionError) as error:
            what = "not JSON" if isinstance(error, json.JSONDecodeError) else str(error)
            raise ConfigError(f"{index}: {what}; download it again") from None
        files = [folder / name for name in names]
        missing = [file.name for file in files if not file.exists()]
        if missing and len(missing) == len(files):
            if size:
                yield "(index)", size
            return
        if missing:
            raise ConfigError(f"{index} names {missing[0]}, which is not there: the download is not complete")
    else:
        # Mistral's repositories hold the same weights twice: model*.safetensors and consolidated*.safetensors.
        files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors"))
        files = [file for file in files if not file.name.startswith("adapter_")]
        if files:
            files = sorted({*files, *_parts(files[0])})
    found = 0
    for file in files:
        for name, entry in header(file).items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                named.discard(name)
                found += end - start
                yield name, end - start
    if files and not found:
        raise ConfigError(f"{folder}: its files hold no weights; half a download?")
    if named:
        raise ConfigError(
            f"{index} speaks of {min(named)} and {len(named) - 1} more tensors that its files do not have: they belong "
            "to different versions, or a download is not complete"
        )


def _index(content: object) -> tuple[set[str], list[str], int]:
    """Tensors, files and bytes of an index. Raises ValueError where it is none."""
    table = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(content, dict) or not isinstance(table, dict):
        raise ValueError("it has no weight_map of tensors and their files")
    for name in table.values():
        if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\0" in name:
            raise ValueError(f"weight_map names {name!r}, which is no file of its folder")
    metadata = content.get("metadata") or {}
    size = metadata.get("total_size") or 0 if isinstance(metadata, dict) else None
    if isinstance(size, bool) or not isinstance(size, (int, float)) or not 0 <= size < _MOST_BYTES:
        raise ValueError("its metadata has a total_size that is no number of bytes")
    return set(table), sorted(set(table.values())), int(size)


def _is_tensor(entry: object) -> bool:
    """Whether an entry of a header says where a tensor begins and ends."""
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(each) is int for each in offsets):
        return False
    return bool(0 <= offsets[0] <= offsets[1] < _MOST_BYTES)


def header(file: Path) -> dict[str, Any]:
    """The header of a safetensors file: tensor name to {dtype, shape, data_offsets}.

    Raises:
        ConfigError: the file has no such header.
    """
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if not 2 <= length <= _MAX_HEADER:
                raise ValueError(f"a header of {length} bytes")
            found = json.loads(stream.read(length))
        if not isinstance(found, dict) or not all(_is_tensor(v) for k, v in found.items() if k != "__metadata__"):
            raise ValueError("the header is no table of tensors")
    except (OSError, ValueError, struct.error, TypeError) as error:
        raise ConfigError(
            f"{file}: not a safetensors file ({error}); a pointer of git-lfs, or half a download?"
        ) from None
    return found


_EMBEDDING = re.compile(
    r"(embed_tokens|lm_head|wte|word_embeddings|embed_in|embed_out|tok_embeddings|token_embd|^output\.)"
)
_EXPERTS = re.compile(r"(\.experts\.|_exps\.)")
_TOWER = re.compile(r"^(model\.)?(vision|visual|audio|image|multi_modal|mm_|vit|aligner|embed_vision|embed_audio)")


def _sum(tensors: list[tuple[str, int]], source: str, tied: bool) -> Weights:
    embedding = sum(size for name, size in tensors if _EMBEDDING.search(name))
    if tied and any("lm_head" in name for name, _ in tensors) and any("embed_tokens" in name for name, _ in tensors):
        # Some checkpoints store the tied table twice; the engine loads it once.
        twice = sum(size for name, size in tensors if "lm_head" in name)
        tensors = [(name, size) for name, size in tensors if "lm_head" not in name]
        embedding -= twice
    if tensors[0][0] == "(index)":
        return Weights(tensors[0][1], 0, 0, 0, 0, f"total_size of the index in {source}", True)
    return Weights(
        sum(size for _, size in tensors),
        embedding,
        sum(size for name, size in tensors if _EXPERTS.search(name)),
        sum(size for name, size in tensors if _TOWER.search(name)),
        len(tensors),
        f"headers of the files in {source}",
        True,
    )


# ggml type to (weights of a block, bytes of a block): ggml/src/ggml-common.h, block_* structures.
_GGML = {
    0: (1, 4),
    1: (1, 2),
    2: (32, 18),
    3: (32, 20),
    6: (32, 22),
    7: (32, 24),
    8: (32, 34),
    10: (256, 84),
    11: (256, 110),
    12: (256, 144),
    13: (256, 176),
    14: (256, 210),
    15: (256, 292),
    16: (256, 66),
    17: (256, 74),
    18: (256, 98),
    19: (256, 50),
    20: (32, 18),
    21: (256, 110),
    22: (256, 82),
    23: (256, 136),
    24: (1, 1),
    25: (1, 2),
    26: (1, 4),
    27: (1, 8),
    28: (1, 8),
    29: (256, 56),
    30: (1, 2),
    34: (256, 54),
    35: (256, 66),
    39: (32, 17),
}
_SCALAR = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}


def _read_gguf(path: Path) -> Model:
    try:
        meta: Config = {}
        tensors: list[tuple[str, int, int]] = []
        for part in _parts(path):
            with part.open("rb") as stream:
                own, more = _gguf_header(stream)
            meta, tensors = {**own, **meta}, tensors + more
    except (OSError, struct.error, KeyError, ValueError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a GGUF file of version 2 or 3 ({error})") from None
    arch = str(meta.get("general.architecture", "unknown"))

    def value(name: str, default: Any = None) -> Any:
        return meta.get(f"{arch}.{name}", default)

    depth, hidden = int(value("block_count", 0)), int(value("embedding_length", 0))
    heads = value("attention.head_count", 1)
    heads = max(heads) if isinstance(heads, list) else int(heads)
    kv_heads = value("attention.head_count_kv", heads)
    if not depth or not hidden:
        raise ConfigError(f"{path}: the metadata of {arch!r} has no block_count or embedding_length")
    head_dim = int(value("attention.key_length", hidden // heads))
    width = head_dim + int(value("attention.value_length", head_dim))
    per_layer = kv_heads if isinstance(kv_heads, list) else [int(kv_heads)] * depth
    if rank := value("attention.kv_lora_rank"):
        layers = tuple(LayerCache("mla", 1, int(rank) + int(value("rope.dimension_count", 64))) for _ in per_layer)
    else:
        layers = tuple(LayerCache("full", int(count), width) for count in per_layer if count)
    sizes = [(name, count, size) for name, count, size in tensors]
    table = sum(count for name, count, _ in sizes if _EMBEDDING.search(name))
    expert_count = sum(count for name, count, _ in sizes if _EXPERTS.search(name))
    total_count = sum(count for _, count, _ in sizes)
    weights = _sum([(name, size) for name, _, size in sizes], path.name, False)
    vocab = len(meta.get("tokenizer.ggml.tokens") or ()) or int(value("vocab_size", 0)) or table // hidden
    architecture = Architecture(
        name=path.stem,
        family=arch,
        layers=layers,
        depth=depth,
        hidden=hidden,
        heads=heads,
        head_dim=head_dim,
        vocab=vocab,
        intermediate=int(_scalar(value("feed_forward_length", 4 * hidden))),
        parameters=Parameters(table, vocab * hidden, total_count - table - expert_count, expert_count, 0),
        experts=int(value("expert_count", 0)),
        experts_per_token=int(value("expert_used_count", 0)),
        quantization=Quantization("gguf", 8 * weights.total / max(total_count, 1), 0, 16),
        max_len=int(value("context_length", 8192)),
    )
    return Model(architecture, replace(weights, source=f"tensor table of {path.name}"), ("gguf",))


def _scalar(value: int | list[int]) -> int:
    return max(value) if isinstance(value, list) else int(value)


def _gguf_header(stream: BinaryIO) -> tuple[Mapping[str, Any], list[tuple[str, int, int]]]:
    """Metadata, and (name, numbers, bytes) of each tensor."""

    def read(form: str) -> Any:
        return struct.unpack(form, stream.read(struct.calcsize(form)))[0]

    def text() -> str:
        length = read("<Q")
        if length > _MAX_HEADER:
            raise ValueError("a string longer than any header")
        return stream.read(length).decode("utf-8", "replace")

    def value(kind: int) -> Any:
        if kind == 8:
            return text()
        if kind == 9:
            inner, length = read("<I"), read("<Q")
            if length > 10_000_000:
                raise ValueError("a list longer than any vocabulary")
            return [value(inner) for _ in range(length)]
        return read(_SCALAR[kind])

    if stream.read(4) != b"GGUF":
        raise ValueError("no magic number")
    if read("<I") not in (2, 3):
        raise ValueError("another version")
    count, entries = read("<Q"), read("<Q")
    if count > 1_000_000 or entries > 1_000_000:
        raise ValueError("more entries than any model has")
    meta = {}
    for _ in range(entries):
        key = text()
        meta[key] = value(read("<I"))
    tensors = []
    for _ in range(count):
        name = text()
        shape = [read("<Q") for _ in range(read("<I"))]
        kind, _offset = read("<I"), read("<Q")
        numbers = math.prod(shape)
        weights, size = _GGML[kind]
        tensors.append((name, numbers, -(-numbers // weights) * size))
    return meta, tensors


def adapter_bytes(folder: str) -> int:
    """Bytes of a LoRA adapter's file. Raises ConfigError when it can't be read."""
    file = Path(os.path.expanduser(folder)) / "adapter_model.safetensors"
    return sum(
        int(e["data_offsets"][1]) - int(e["data_offsets"][0]) for n, e in header(file).items() if n != "__metadata__"
    )
