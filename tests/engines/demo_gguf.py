"""Write the demo model as a GGUF file, with the PyPI package `gguf`: what llama.cpp reads.

The names of keys and tensors are those of GGUF's architecture `llama` (docs/gguf.md of ggml-org/ggml, and the
constants of the package). llama.cpp rotates neighbouring pairs of a head's dimensions and Hugging Face the two
halves, so the rows of the query and key weights change places.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

# In the file: type and shape of the only kind of tensor that the demo model has.
_TYPES = {"BF16": 2, "F16": 2, "F32": 4}


def tensors(path: Path) -> dict[str, NDArray[np.float32]]:
    """The tensors of a safetensors file as float32 (format: 8 bytes of length, a JSON header, the data)."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    found = {}
    for name, about in json.loads(data[8 : 8 + length]).items():
        if name == "__metadata__":
            continue
        begin, end = (8 + length + offset for offset in about["data_offsets"])
        raw = data[begin:end]
        assert len(raw) == _TYPES[about["dtype"]] * int(np.prod(about["shape"]))
        if about["dtype"] == "BF16":
            # The upper half of a float32.
            values = (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
        else:
            values = np.frombuffer(raw, {"F16": "<f2", "F32": "<f4"}[about["dtype"]]).astype("<f4")
        found[name] = values.reshape(about["shape"])
    return found


def neighbours(weights: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows of `weights` (heads x size, width) from two halves a head to neighbouring pairs."""
    rows, width = weights.shape
    return weights.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)


def write(model: Path, target: Path) -> None:
    """Write the model of folder `model` (config, tokenizer, template, weights) to the file `target`."""
    config = json.loads((model / "config.json").read_text())
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_name("demo")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)

    special = {entry["id"] for entry in tokenizer["added_tokens"]}
    words = {number: word for word, number in tokenizer["model"]["vocab"].items()}
    words |= {entry["id"]: entry["content"] for entry in tokenizer["added_tokens"]}
    numbers = range(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    # The kind that looks a whole word up before it merges letters: the demo model's tokenizer has words and no merges.
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list([words.get(number, f"[unused{number}]") for number in numbers])
    kinds = [gguf.TokenType.CONTROL if n in special else gguf.TokenType.NORMAL for n in numbers]
    writer.add_token_types(
        [kind if n in words else gguf.TokenType.UNUSED for n, kind in zip(numbers, kinds, strict=True)]
    )
    assert not tokenizer["model"]["merges"]
    assert tokenizer["model"]["ignore_merges"]
    # llama.cpp wants a list of merges that is not empty. This pair, of the bytes 0 and 1, makes no token, so nothing
    # is merged.
    writer.add_token_merges(["Ā ā"])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_pad_token_id(config["pad_token_id"])
    writer.add_add_bos_token(True)
    writer.add_chat_template((model / "chat_template.jinja").read_text())

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, values in tensors(model / "model.safetensors").items():
        found = names.get_name(name, try_suffixes=(".weight",))
        assert found, name
        if name.endswith("q_proj.weight"):
            values = neighbours(values, heads)
        elif name.endswith("k_proj.weight"):
            values = neighbours(values, groups)
        writer.add_tensor(found, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]))
