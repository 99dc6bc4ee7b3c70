"""`kserve-vllm plan`: memory, parallel sizes, GPUs and cost for a model and its traffic, and the chart's values."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from kserve_vllm.core.errors import ConfigError
from kserve_vllm.ops import argument_types
from kserve_vllm.ops.model import hardware, measured, traffic, weights
from kserve_vllm.ops.model.architecture import QUANTIZATIONS, Architecture
from kserve_vllm.ops.model.memory import CACHE_DTYPES, EngineSettings, whole_experts
from kserve_vllm.ops.model.steptime import StepTime
from kserve_vllm.ops.planner import LOAD, EngineFit, Lever, Option, Wish, best, engines, levers, options
from kserve_vllm.ops.tables import gib, money, seconds, table

_EPILOG = """
Start with a model and a rate; every GPU whose price is known is tried:
  kserve-vllm plan ./Qwen3-8B --rate 20 --prompt 1500 --output 300
No files yet, two kinds of GPU, bounds for the first token and for the time between tokens:
  kserve-vllm plan --params 70B --quantization fp8 --rate 8 --gpu H100 --gpu H200 --first-token 1 --gap 0.05
From what a service really did (its --usage-sink file), with your own prices and your own benchmark:
  kserve-vllm plan ./Qwen3-8B --trace usage.jsonl --prices prices.yaml --calibrate bench.json
The chart's values, or an InferenceService, ready to apply:
  kserve-vllm plan ./Qwen3-8B --rate 20 --storage-uri s3://models/qwen3-8b --values values.yaml
  helm upgrade --install llm charts/kserve-vllm -f values.yaml
  kserve-vllm plan ./Qwen3-8B --rate 20 --storage-uri s3://models/qwen3-8b --manifest isvc.yaml

A hub id works where its files are in the local Hugging Face cache; nothing is downloaded. Nothing is sent anywhere.
The model of speed is a roofline; `pip install 'kserve-vllm[plan]'` adds NVIDIA's AIConfigurator, which speaks where it
knows GPU and model. Which of them spoke, and how far it may be off, is printed. docs/guides/sizing.md explains the
figures.

Exit codes: 0 a plan was made, 1 no GPU that was asked for can do it, 2 an argument or a file can't be used.
"""


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    top = argparse.ArgumentParser(
        prog="kserve-vllm plan",
        description="How many GPUs of which kind a model needs for its traffic, and what they cost.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    top.add_argument(
        "model", nargs="?", help="folder with config.json and safetensors, a .gguf file, or a hub id in the cache"
    )
    top.add_argument("--params", help="instead of a model: its size, such as 70B, or 235B-A22B with experts")
    what = top.add_argument_group("model")
    what.add_argument(
        "--quantization",
        choices=sorted(QUANTIZATIONS),
        metavar="NAME",
        help=f"weights as they will be stored, where the files are not yet: {', '.join(QUANTIZATIONS)}",
    )
    what.add_argument(
        "--kv-cache-dtype",
        default="auto",
        choices=CACHE_DTYPES,
        help="precision of the cache (default: the model's)",
    )
    what.add_argument(
        "--max-model-len",
        type=argument_types.count,
        help="tokens of the longest sequence (default: what the traffic needs)",
    )
    what.add_argument(
        "--max-num-seqs", type=argument_types.count, help="sequences at once (default: what the plan finds)"
    )
    what.add_argument(
        "--max-num-batched-tokens", type=argument_types.count, default=8192, help="tokens of one step (default: 8192)"
    )
    what.add_argument(
        "--gpu-memory-utilization",
        type=argument_types.share,
        default=0.92,
        help="vLLM's share of the GPU (default: 0.92)",
    )
    what.add_argument("--adapters", type=argument_types.whole, default=0, help="LoRA adapters in one batch")
    what.add_argument("--adapter-rank", type=argument_types.count, default=16, help="their rank (default: 16)")
    what.add_argument("--draft", help="folder of a draft model for speculation")
    load = top.add_argument_group("traffic")
    load.add_argument("--rate", type=argument_types.positive, help="requests per second at the peak (default: 1)")
    load.add_argument("--prompt", type=argument_types.count, help="mean tokens of a prompt (default: 1000)")
    load.add_argument("--output", type=argument_types.count, help="mean tokens of an answer (default: 250)")
    load.add_argument(
        "--shared-prefix",
        type=argument_types.fraction,
        default=0.0,
        help="share of a prompt that the prefix cache holds, 0 to 1 (default: 0)",
    )
    load.add_argument(
        "--trace", type=Path, help="JSON lines or CSV with time, prompt_tokens and output_tokens per request"
    )
    load.add_argument(
        "--first-token", type=argument_types.positive, metavar="SECONDS", help="bound of 95 of 100 first tokens"
    )
    load.add_argument(
        "--gap", type=argument_types.positive, metavar="SECONDS", help="bound of the mean time between tokens"
    )
    load.add_argument(
        "--load",
        type=argument_types.share,
        default=LOAD,
        help=f"share of a replica's capacity to plan (default: {LOAD})",
    )
    load.add_argument("--spare", type=argument_types.whole, default=0, help="replicas more than the traffic needs")
    gpus = top.add_argument_group("GPUs and prices")
    gpus.add_argument(
        "--gpu",
        action="append",
        default=[],
        metavar="NAME",
        help=f"may be repeated (default: all with a price): {', '.join(hardware.gpus())}",
    )
    gpus.add_argument("--tensor", type=argument_types.count, help="GPUs that share each layer (default: searched)")
    gpus.add_argument("--pipeline", type=argument_types.count, help="stages of layers (default: searched)")
    gpus.add_argument("--prices", type=Path, help="YAML: date, currency, prices by GPU and hour")
    gpus.add_argument("--price", action="append", default=[], metavar="GPU=PRICE", help="one price per GPU and hour")
    speed = top.add_argument_group("model of speed")
    speed.add_argument(
        "--speed",
        default="auto",
        choices=["auto", "roofline", "aiconfigurator"],
        help="which figures speak (default: AIConfigurator where it can, else the roofline)",
    )
    speed.add_argument("--like", metavar="HUB_ID", help="the model's name for AIConfigurator, such as Qwen/Qwen3-8B")
    speed.add_argument(
        "--calibrate", type=Path, metavar="JSON", help="result of `kserve-vllm bench --save` on that GPU"
    )
    out = top.add_argument_group("output")
    out.add_argument("--json", action="store_true", help="for machines")
    out.add_argument("--name", default="model", help="name of the service in values and manifest (default: model)")
    out.add_argument("--storage-uri", help="where KServe fetches the model from, for values and manifest")
    out.add_argument("--values", type=Path, metavar="FILE", help="write the chart's values (- for standard output)")
    out.add_argument("--manifest", type=Path, metavar="FILE", help="write an InferenceService (- for standard output)")
    out.add_argument("--picture", type=Path, metavar="PNG", help="draw memory and cost; needs matplotlib")
    return top


def main(arguments: Sequence[str]) -> int:
    """Run `kserve-vllm plan ...`; returns the exit code.

    Raises:
        ConfigError: an argument or a file can't be used.
    """
    args = parser().parse_args(list(arguments))
    if args.json and any(str(path) == "-" for path in (args.values, args.manifest)):
        raise ConfigError("--json and a file - would both be on standard output: name a file")
    if str(args.values) == str(args.manifest) == "-":
        raise ConfigError("--values - and --manifest - would both be on standard output: name a file for one of them")
    if (args.values or args.manifest) and not re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", args.name):
        raise ConfigError(f"--name {args.name!r}: small letters, digits and dashes, as Kubernetes names services")
    wish = _wish(args)
    price_list = hardware.prices(args.prices, _overrides(args.price))
    names = args.gpu or [name for name in hardware.gpus() if name in price_list.per_hour]
    chips = [hardware.gpu(name) for name in dict.fromkeys(names)]
    if not chips:
        raise ConfigError(f"--prices {args.prices} has no GPU in it; name one with --gpu")
    if args.calibrate and len(chips) != 1:
        raise ConfigError("--calibrate: name the GPU that it was measured on with --gpu")
    refusals: dict[str, str] = {}
    found = {
        chip.name: options(wish, chip, price_list, lambda *a: _refine(args, wish, refusals, *a))
        for chip in _progress(chips, args)
    }
    picks = {name: best(choices) for name, choices in found.items()}
    chosen = best([pick for pick in picks.values() if pick])
    levers_found: list[Lever] = []
    if chosen:
        levers_found = levers(wish, chosen, price_list, lambda method: _requantized(args, wish, method), _smaller(wish))
    made = _Made(wish, found, picks, chosen, levers_found, engines(wish, chosen), price_list, refusals)
    if args.json:
        print(json.dumps(_machine(made), indent=2))
    elif not any(str(path) == "-" for path in (args.values, args.manifest)):
        print(_human(made))
    if chosen is None:
        if args.values or args.manifest:
            raise ConfigError("no GPU that was asked for can do it, so there are no values to write")
        return 1
    if args.values:
        _write(args.values, values_text(wish, chosen, args.name, args.storage_uri, args.model))
    if args.manifest:
        _write(args.manifest, manifest_text(wish, chosen, args.name, args.storage_uri))
    if args.picture:
        from kserve_vllm.ops.pictures import draw_plan

        draw_plan(args.picture, [pick for pick in picks.values() if pick], price_list)
        print(f"drawn: {args.picture}", file=sys.stderr)
    return 0


def _progress(chips: Sequence[hardware.GPU], args: argparse.Namespace) -> Sequence[hardware.GPU]:
    """AIConfigurator takes seconds for each size: say so where a person waits."""
    if args.speed != "roofline" and not args.calibrate and measured.aiconfigurator_installed() and sys.stderr.isatty():
        print(f"asking AIConfigurator about {len(chips)} kinds of GPU; --speed roofline skips it", file=sys.stderr)
    return chips


def _overrides(words: Sequence[str]) -> dict[str, float]:
    found = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not name or not equals:
            raise ConfigError(f"--price {word!r}: write GPU=PRICE, such as H100=2.10")
        try:
            found[hardware.gpu(name).name] = argument_types.positive(value)
        except (ValueError, argparse.ArgumentTypeError):
            raise ConfigError(f"--price {word!r}: write GPU=PRICE, such as H100=2.10") from None
    return found


def _wish(args: argparse.Namespace) -> Wish:
    if bool(args.model) == bool(args.params):
        raise ConfigError("name a model (folder, .gguf file or hub id), or say --params 70B; not both")
    model = (
        weights.read_model(args.model, args.quantization)
        if args.model
        else weights.guess_model(args.params, args.quantization)
    )
    if args.trace:
        if args.rate or args.prompt or args.output:
            raise ConfigError("--trace has rate, prompt and output in it; leave out --rate, --prompt and --output")
        load = traffic.describe(traffic.read_trace(args.trace), source=args.trace.name)
    else:
        prompt, output = args.prompt or 1000, args.output or 250
        if not model.architecture.generates:  # an encoder's answer is one step
            prompt, output = args.prompt or min(1000, model.architecture.max_len - 1), 1
        rate = args.rate or 1.0
        load = traffic.Traffic(
            rate,
            prompt,
            output,
            prompt,
            output,
            min(int(prompt * args.shared_prefix), prompt - 1),
            rate,
            f"{rate:g} requests/s of {prompt:,} + {output:,} tokens",
        )
    draft = weights.read_model(args.draft) if args.draft else None
    return Wish(
        model=model,
        traffic=load,
        first_token_s=args.first_token,
        gap_s=args.gap,
        gpu_memory_utilization=args.gpu_memory_utilization,
        kv_cache_dtype=args.kv_cache_dtype,
        max_num_batched_tokens=args.max_num_batched_tokens,
        max_model_len=args.max_model_len,
        max_num_seqs=args.max_num_seqs,
        adapters=args.adapters,
        adapter_rank=args.adapter_rank,
        draft=draft,
        load=args.load,
        spare=args.spare,
        tensor=args.tensor,
        pipeline=args.pipeline,
    )


def _refine(
    args: argparse.Namespace,
    wish: Wish,
    refusals: dict[str, str],
    step: StepTime,
    architecture: Architecture,
    gpu: hardware.GPU,
    settings: EngineSettings,
) -> StepTime:
    if args.calibrate:
        return measured.with_benchmark(step, args.calibrate, settings.pipeline_parallel_size)
    if args.speed == "roofline":
        return step
    hub_id = args.like or (args.model if args.model and re.fullmatch(r"[\w.-]+/[\w.-]+", args.model) else None)
    if not measured.aiconfigurator_installed():
        if args.speed == "aiconfigurator":
            raise ConfigError("--speed aiconfigurator: it is not installed; pip install 'kserve-vllm[plan]'")
        return step
    if not hub_id:
        if args.speed == "aiconfigurator":
            raise ConfigError(
                "--speed aiconfigurator: say with --like which of its models this is, such as Qwen/Qwen3-8B"
            )
        refusals[gpu.name] = "AIConfigurator was not asked: --like HUB_ID says which of its models this is"
        return step
    try:
        return measured.with_aiconfigurator(
            step, architecture, gpu, settings, hub_id, wish.traffic.prompt, wish.traffic.output
        )
    except LookupError as error:
        if args.speed == "aiconfigurator":
            raise ConfigError(f"--speed aiconfigurator: {error}") from None
        refusals[gpu.name] = str(error)
        return step


def _requantized(args: argparse.Namespace, wish: Wish, method: str) -> weights.Model | None:
    """The same model stored otherwise; None where its files are quantized already, or would not shrink."""
    own = wish.model.architecture.quantization
    if own.bits <= QUANTIZATIONS[method].bits or (own.method not in ("none",) and not args.params):
        return None
    if args.params:
        return weights.guess_model(args.params, method)
    return weights.read_model(args.model, method)


def _smaller(wish: Wish) -> weights.Model | None:
    total = wish.model.architecture.parameters.total
    return weights.guess_model(f"{max(0.5, total / 8e9):.3g}B") if total > 2e9 else None


def _option_machine(option: Option | None) -> dict[str, Any] | None:
    if option is None:
        return None
    memory = option.budget
    return {
        "gpu": option.gpu.name,
        "tensor_parallel_size": option.settings.tensor_parallel_size,
        "pipeline_parallel_size": option.settings.pipeline_parallel_size,
        "max_model_len": option.settings.max_model_len,
        "max_num_seqs": option.settings.max_num_seqs,
        "gpus_per_replica": option.gpus_per_replica,
        "replicas": option.replicas,
        "gpus": option.gpus,
        "requests_per_s_per_replica": option.capacity,
        "first_token_p95_s": option.first_token_s,
        "gap_s": option.operation.gap_s,
        "sequences": option.operation.sequences,
        "per_hour": option.per_hour,
        "per_month": option.per_month,
        "per_million_tokens": option.per_million,
        "reason": option.reason or None,
        "speed": {"source": option.step.source, "band": option.step.band},
        "memory_bytes": {k: v for k, v in asdict(memory).items() if k not in ("cache", "kv_tokens")},
        "kv_tokens": memory.kv_tokens,
        "kv_bytes_per_token": memory.cache.bytes_per_token,
    }


@dataclass(frozen=True)
class _Made:
    """All that a plan comes to.

    Attributes:
        wish: what was asked.
        found: all options by GPU.
        picks: the best of each GPU, or None.
        chosen: the best of all.
        levers: what would save most.
        fits: which engines suit.
        prices: per hour.
        refusals: by GPU, why AIConfigurator did not speak.
    """

    wish: Wish
    found: dict[str, list[Option]]
    picks: dict[str, Option | None]
    chosen: Option | None
    levers: Sequence[Lever]
    fits: Sequence[EngineFit]
    prices: hardware.Prices
    refusals: dict[str, str]


def _machine(made: _Made) -> dict[str, Any]:
    architecture = made.wish.model.architecture
    return {
        "model": {
            "name": architecture.name,
            "family": architecture.family,
            "parameters": architecture.parameters.total,
            "active_parameters": architecture.active_parameters,
            "weights_bytes": made.wish.model.weights.total,
            "weights_source": made.wish.model.weights.source,
            "weights_exact": made.wish.model.weights.exact,
            "quantization": architecture.quantization.method,
            "approximate": architecture.approximate or None,
            "max_len": architecture.max_len,
        },
        "traffic": asdict(made.wish.traffic),
        "prices": {
            "date": made.prices.dated.isoformat(),
            "currency": made.prices.currency,
            "source": made.prices.source,
        },
        "chosen": _option_machine(made.chosen),
        "gpus": {
            name: {"best": _option_machine(made.picks[name]), "tried": [_option_machine(o) for o in tried]}
            for name, tried in made.found.items()
        },
        "levers": [asdict(lever) for lever in made.levers],
        "engines": [asdict(fit) for fit in made.fits],
        "not_asked": made.refusals,
    }


def _human(made: _Made) -> str:
    wish, found, picks, chosen, price_list = made.wish, made.found, made.picks, made.chosen, made.prices
    architecture, model_weights = wish.model.architecture, wish.model.weights
    count = architecture.parameters.total
    words = [f"{count / 1e9:.1f}B parameters" if count >= 1e8 else f"{count / 1e6:.1f}M parameters"]
    if architecture.experts:
        words.append(f"{architecture.active_parameters / 1e9:.1f}B per token")
    if not architecture.exact:
        words.append("shape guessed")
    exact = "exact" if model_weights.exact else "about"
    lines = [
        f"model     {architecture.name}: {', '.join(words)}, {architecture.quantization.method}",
        f"weights   {exact} {gib(model_weights.total)} GiB ({model_weights.source})",
        f"traffic   {wish.traffic.source}; at the peak {wish.traffic.rate:g} requests/s of {wish.traffic.prompt:,} + "
        f"{wish.traffic.output:,} tokens"
        + (f", {wish.traffic.cached:,} of them cached" if wish.traffic.cached else ""),
        "",
    ]
    rows: list[tuple[str, ...]] = [
        (
            "GPU",
            "TPxPP",
            "REPLICAS",
            "GPUS",
            "REQ/S EACH",
            "FIRST TOKEN P95",
            "GAP",
            f"{price_list.currency}/HOUR",
            "/MONTH",
            "/M TOKENS",
        )
    ]
    for name, pick in sorted(
        picks.items(), key=lambda item: (item[1] is None, (item[1] and item[1].per_hour) or math.inf)
    ):
        if pick is None:
            nearest = found[name][-1]
            rows.append((name, "-", "-", "-", "-", "-", "-", "-", "-", nearest.reason))
            continue
        rows.append(
            (
                name,
                f"{pick.settings.tensor_parallel_size}x{pick.settings.pipeline_parallel_size}",
                str(pick.replicas),
                str(pick.gpus),
                f"{pick.capacity:.2f}",
                seconds(pick.first_token_s),
                seconds(pick.operation.gap_s),
                *("-" if v is None else money(v) for v in (pick.per_hour, pick.per_month, pick.per_million)),
            )
        )
    lines += [table(rows, right=range(1, 9)), f"prices of {price_list.dated} from {price_list.source}", ""]
    if chosen is None:
        return "\n".join([*lines, "No GPU that was asked for can do it; the last column says why."])
    memory, settings = chosen.budget, chosen.settings
    lines += [
        f"Cheapest: {chosen.replicas} x {chosen.gpus_per_replica} {chosen.gpu.name}",
        f"  --tensor-parallel-size {settings.tensor_parallel_size} "
        f"--pipeline-parallel-size {settings.pipeline_parallel_size} --max-model-len {settings.max_model_len} "
        f"--max-num-seqs {settings.max_num_seqs}",
        f"  speed from {chosen.step.source}; a real server may be {chosen.step.band:.0%} off",
        "",
        f"Memory of one GPU ({gib(memory.total)} GiB, of which {gib(memory.usable)} are vLLM's):",
    ]
    parts = [
        ("weights", memory.weights),
        ("draft model", memory.draft),
        ("adapters", memory.adapters),
        ("activations", memory.activations),
        ("CUDA graphs", memory.graphs),
        ("outside torch", memory.outside),
        ("KV cache" if architecture.generates else "free", memory.kv_cache),
    ]
    width = max(size for _, size in parts) or 1
    lines += [
        f"  {label:<14}{gib(size):>7} GiB  {'█' * max(1, round(30 * size / width))}" for label, size in parts if size
    ]
    lines.append(
        "  an encoder: it keeps no cache, its answer is one step"
        if not architecture.generates
        else f"  {memory.kv_tokens:,} tokens of {memory.cache.bytes_per_token:,.0f} bytes: {memory.sequences:.1f} "
        f"sequences of {settings.max_model_len:,} tokens at once"
    )
    if made.levers:
        lines += ["", "What would save most (on the same GPU):"]
        lines.append(
            table(
                [("", "LESS", f"{price_list.currency}/HOUR", "TAKES")]
                + [(lever.name, f"{lever.saving:.0%}", money(lever.per_hour), lever.cost) for lever in made.levers[:5]],
                right=(1, 2),
            )
        )
    lines += ["", "Engines:", table([("", "FITS", "WHY"), *((fit.engine, fit.fit, fit.why) for fit in made.fits)])]
    if architecture.approximate:
        lines += ["", f"note: {architecture.family}: {architecture.approximate}; trust the weights, measure the rest"]
    if made.refusals:
        lines += ["", *(f"note: {name}: {why}" for name, why in made.refusals.items())]
    return "\n".join(lines)


def service_values(wish: Wish, option: Option, storage_uri: str | None, model: str | None) -> dict[str, Any]:
    """An entry of the chart's `inferenceServices`."""
    settings, architecture = option.settings, wish.model.architecture
    entry: dict[str, Any] = {}
    if storage_uri:
        entry["storageUri"] = storage_uri
    elif model and re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        entry["model"] = model
    else:
        raise ConfigError("--values and --manifest: say with --storage-uri where KServe fetches the model from")
    entry |= {"maxNumSeqs": settings.max_num_seqs, "maxModelLen": settings.max_model_len}
    if not wish.model.formats and architecture.quantization.method not in ("none", "gguf"):
        entry["quantization"] = architecture.quantization.method
    elif wish.model.formats and not wish.model.weights.exact and architecture.quantization.method == "fp8":
        entry["quantization"] = "fp8"  # vLLM rounds these weights when it loads them
    entry["parallelism"] = {"tensor": settings.tensor_parallel_size, "pipeline": settings.pipeline_parallel_size}
    entry["gpu"] = {"products": [option.gpu.product]}
    if option.gpu.resource != "nvidia.com/gpu":
        entry["gpu"] |= {"resource": option.gpu.resource, "productLabel": "amd.com/gpu.product-name"}
    # Weights pass through the page cache on their way to the GPU; half of them, and what the processes need.
    own = math.ceil(max(8, wish.model.weights.total / (1 << 30) / 2 + 4 + 4 * settings.tensor_parallel_size))
    entry["resources"] = {"requests": {"cpu": str(2 + 2 * settings.tensor_parallel_size), "memory": f"{own}Gi"}}
    extra = [
        f"--gpu-memory-utilization={settings.gpu_memory_utilization:g}",
        f"--max-num-batched-tokens={settings.max_num_batched_tokens}",
    ]
    if whole_experts(architecture, settings.tensor_parallel_size):
        extra.append("--enable-expert-parallel")
    if settings.kv_cache_dtype != "auto":
        extra.append(f"--kv-cache-dtype={settings.kv_cache_dtype}")
    entry["extraArgs"] = extra
    spread = settings.pipeline_parallel_size > 1 and option.gpus_per_replica > option.gpu.node
    if spread:
        if not (storage_uri or "").startswith(("pvc://", "oci://")):
            raise ConfigError(
                f"--storage-uri: {option.gpus_per_replica} {option.gpu.name} are more than a node, and over several "
                "nodes the chart takes the model from pvc:// or oci:// only"
            )
        entry |= {"multiNode": {"enabled": True}, "deploymentMode": "Standard"}
    else:
        # Knative aims at 70 % of the target: so many sequences run in a replica at its planned load.
        target = max(1, round(option.planned.sequences / 0.7))
        entry["autoscaling"] = {
            "minReplicas": 1,
            "maxReplicas": max(option.replicas, 1),
            "target": min(target, settings.max_num_seqs),
        }
    return entry


def values_text(wish: Wish, option: Option, name: str, storage_uri: str | None, model: str | None = None) -> str:
    """The chart's values as YAML, with where they come from."""
    entry = service_values(wish, option, storage_uri, model)
    return _heading(wish, option) + yaml.safe_dump({"inferenceServices": {name: entry}}, sort_keys=False)


def manifest_text(wish: Wish, option: Option, name: str, storage_uri: str | None) -> str:
    """An InferenceService on the chart's runtimes, without the chart.

    Raises:
        ConfigError: no storage, or a size that only the chart's multi-node values can say.
    """
    if not storage_uri:
        raise ConfigError("--manifest: say with --storage-uri where KServe fetches the model from")
    entry = service_values(wish, option, storage_uri, None)
    if entry.get("multiNode"):
        raise ConfigError("--manifest: over several nodes use --values and the chart")
    settings, gpus = option.settings, str(option.gpus_per_replica)
    args = [
        "--profile=balanced",
        f"--max-num-seqs={settings.max_num_seqs}",
        f"--max-model-len={settings.max_model_len}",
    ]
    if settings.tensor_parallel_size > 1:
        args.append(f"--tensor-parallel-size={settings.tensor_parallel_size}")
    if settings.pipeline_parallel_size > 1:
        args.append(f"--pipeline-parallel-size={settings.pipeline_parallel_size}")
    if "quantization" in entry:
        args.append(f"--quantization={entry['quantization']}")
    args += [*entry["extraArgs"], "--drain-timeout=60"]
    resource = option.gpu.resource
    predictor: dict[str, Any] = {
        "minReplicas": entry["autoscaling"]["minReplicas"],
        "maxReplicas": entry["autoscaling"]["maxReplicas"],
        "scaleMetric": "concurrency",
        "scaleTarget": entry["autoscaling"]["target"],
        "timeout": 600,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "affinity": {
            "nodeAffinity": {
                "requiredDuringSchedulingIgnoredDuringExecution": {
                    "nodeSelectorTerms": [
                        {
                            "matchExpressions": [
                                {
                                    "key": entry["gpu"].get("productLabel", "nvidia.com/gpu.product"),
                                    "operator": "In",
                                    "values": entry["gpu"]["products"],
                                }
                            ]
                        }
                    ]
                }
            }
        },
        "model": {
            "runtime": "kserve-vllm-gpu",
            "modelFormat": {"name": "kserve-vllm"},
            "protocolVersion": "v2",
            "storageUri": storage_uri,
            "args": args,
            "resources": {"requests": {**entry["resources"]["requests"], resource: gpus}, "limits": {resource: gpus}},
        },
    }
    document = {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {"name": name, "annotations": {"serving.kserve.io/deploymentMode": "Knative"}},
        "spec": {"predictor": predictor},
    }
    return _heading(wish, option) + yaml.safe_dump(document, sort_keys=False)


def _heading(wish: Wish, option: Option) -> str:
    bounds = [f"first token {wish.first_token_s:g} s"] if wish.first_token_s else []
    bounds += [f"gap {wish.gap_s:g} s"] if wish.gap_s else []
    return (
        f"# {wish.model.architecture.name} for {wish.traffic.source}{', ' if bounds else ''}{', '.join(bounds)}.\n"
        f"# Planned: {option.replicas} replicas of {option.gpus_per_replica} {option.gpu.name}; speed from "
        f"{option.step.source}, band {option.step.band:.0%}.\n"
    )


def _write(path: Path, text: str) -> None:
    if str(path) == "-":
        print(text, end="")
        return
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} can't be written: {error}") from None
    print(f"written: {path}", file=sys.stderr)
