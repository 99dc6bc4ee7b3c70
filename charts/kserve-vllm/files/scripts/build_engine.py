"""Build an engine of TensorRT-LLM from a model in /models, and the repository from which Triton serves it.

The argument is JSON: model and repository (directories in /models), name (of the model in Triton), tensor (GPUs),
maxBatchSize, maxSeqLen, maxNumTokens. What is there already, built of the same, stays. It runs in Triton's own image:
the templates of the repository and their placeholders are those of the image.
"""

import json
import os
import re
import shutil
import sys
from pathlib import Path

TEMPLATES = Path(os.environ.get("TEMPLATES", "/app/all_models/inflight_batcher_llm"))
# The place where KServe mounts the repository's directory.
SERVED = "/mnt/models"


def build(model, target, wanted):
    """Write the engine of `model` to `target`."""
    from tensorrt_llm import BuildConfig
    from tensorrt_llm._tensorrt_engine import LLM

    limits = BuildConfig(
        max_batch_size=wanted["maxBatchSize"], max_seq_len=wanted["maxSeqLen"], max_num_tokens=wanted["maxNumTokens"]
    )
    llm = LLM(model=str(model), tensor_parallel_size=wanted["tensor"], build_config=limits)
    llm.save(str(target))
    llm.shutdown()


def fill(text, values, where):
    """Fill the placeholders of a template; one without a value is an error that names it."""
    filled = re.sub(r"\$\{(\w+)\}", lambda found: str(values.get(found[1], found[0])), text)
    missing = sorted(set(re.findall(r"\$\{(\w+)\}", filled)))
    # Placeholders inside a string are optional parameters, and empty means that they are not given.
    filled = re.sub(r'"\$\{\w+\}"', '""', filled)
    left = re.findall(r"\$\{(\w+)\}", filled)
    if left:
        sys.exit(
            f"{where}: this image's template asks for {', '.join(sorted(set(left)))}, which this script does not know"
        )
    if missing:
        print(f"{where}: not given: {', '.join(missing)}")
    return filled


def values_of(wanted, tokenizer, engine):
    """What the placeholders of the pipeline's parts are."""
    size = wanted["maxBatchSize"]
    return {
        "triton_backend": "tensorrtllm",
        "triton_max_batch_size": size,
        "decoupled_mode": "true",
        "engine_dir": engine,
        "gpt_model_path": engine,
        "tokenizer_dir": tokenizer,
        "batching_strategy": "inflight_fused_batching",
        "max_queue_delay_microseconds": 0,
        "max_queue_size": 0,
        "skip_special_tokens": "true",
        "add_special_tokens": "false",
        "preprocessing_instance_count": 1,
        "postprocessing_instance_count": 1,
        "bls_instance_count": 1,
        "accumulate_tokens": "false",
        "logits_datatype": "TYPE_FP32",
        "encoder_input_features_data_type": "TYPE_FP16",
        "prompt_embedding_table_data_type": "TYPE_FP16",
        "kv_cache_free_gpu_mem_fraction": "0.9",
        "exclude_input_in_output": "true",
        "enable_kv_cache_reuse": "true",
        "enable_chunked_context": "true",
        "max_beam_width": 1,
    }


def main():
    """Build what the argument says."""
    wanted = json.loads(sys.argv[1])
    models = Path(os.environ.get("MODELS", "/models"))
    model, repository = models / wanted["model"], models / wanted["repository"]
    mark = repository / ".built.json"
    if mark.is_file() and json.loads(mark.read_text()) == wanted:
        print(f"{repository} is built already")
        return
    # Beside it and renamed at the end: a service that starts meanwhile finds all of it or nothing.
    part = models / f"{wanted['repository']}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for name in ("preprocessing", "postprocessing", "tensorrt_llm", "ensemble"):
        shutil.copytree(TEMPLATES / name, part / name)
    # Only its own name stands in it: clients ask for this one.
    (part / "ensemble").rename(part / wanted["name"])
    (part / wanted["name"] / "1").mkdir(exist_ok=True)
    version = part / "tensorrt_llm" / "1"
    build(model, version / "engine", wanted)
    tokenizer = version / "tokenizer"
    tokenizer.mkdir()
    for file in model.iterdir():
        if file.is_file() and file.suffix in (".json", ".model", ".txt", ".jinja"):
            shutil.copy(file, tokenizer)
    served = f"{SERVED}/tensorrt_llm/1"
    values = values_of(wanted, f"{served}/tokenizer", f"{served}/engine")
    for config in sorted(part.glob("*/config.pbtxt")):
        text = fill(config.read_text(), values, config.parent.name)
        if config.parent.name == wanted["name"]:
            text = re.sub(r'^name: *"ensemble"', f'name: "{wanted["name"]}"', text, flags=re.MULTILINE)
        config.write_text(text)
    (part / mark.name).write_text(json.dumps(wanted))
    shutil.rmtree(repository, ignore_errors=True)
    part.rename(repository)
    print(f"built {repository}")


main()
