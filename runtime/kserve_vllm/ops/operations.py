"""The commands for operators. Each is a module with `main(arguments)`, imported when it is called, not before."""

from __future__ import annotations

import argparse
import importlib
import io
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from urllib.parse import SplitResult, urlsplit

from kserve_vllm.core.errors import ConfigError, KServeVLLMError

_USAGE = 2
_INTERRUPTED = 130
COMMANDS = {
    "plan": ("GPUs, parallel sizes, replicas and cost for a model and its traffic", "kserve_vllm.ops.plan"),
    "simulate": ("try an autoscaler on recorded or made-up traffic", "kserve_vllm.ops.simulate"),
    "batch": ("answer the requests of a file in OpenAI's batch form, and go on where it was", "kserve_vllm.ops.batch"),
    "bench": ("load a server, say what its clients see, and compare two results", "kserve_vllm.ops.bench.command"),
    "top": ("watch a server or a service: load, speed, cache, tenants", "kserve_vllm.ops.top.command"),
    "diagnose": ("say what is wrong with a service, why, and what mends it", "kserve_vllm.ops.diagnose.command"),
    "restart": ("start a service's pods anew, one after the other", "kserve_vllm.ops.restart"),
    "rollout": (
        "give a new model its traffic step by step, and take it back where it is worse",
        "kserve_vllm.ops.rollout.command",
    ),
}


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Name the commands in the help of `kserve-vllm`."""
    for name, (text, _) in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)


class CommandFailed(KServeVLLMError):
    """A command can't do what it is for.

    Attributes:
        code: its exit code.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def run(arguments: Sequence[str]) -> int:
    """Run one of them; returns its exit code.

    With `--json` standard output has one document, also where the command fails: then that is
    `{"error": {"message", "exit_code"}}`.
    """

    def command() -> int:
        return int(importlib.import_module(COMMANDS[arguments[0]][1]).main(list(arguments[1:])))

    if "--json" not in arguments:
        return _run(command)
    if arguments[0] == "top" and "--once" not in arguments:  # a document for each interval
        return _run(command, lambda message, code: _print_error(message, code, None))
    out, failed = io.StringIO(), list[tuple[str, int]]()
    try:
        with redirect_stdout(out):
            code = _run(command, lambda message, code: failed.append((message, code)))
    except SystemExit as end:
        if end.code != _USAGE:  # help is none
            print(out.getvalue(), end="")
            raise
        _print_error("an argument can't be used; standard error says which", _USAGE)
        raise
    if failed:
        _print_error(*failed[0])
    else:
        print(out.getvalue(), end="")
    return code


def _run(command: Callable[[], int], tell: Callable[[str, int], object] = lambda message, code: None) -> int:
    """Run a command; `tell` gets the message and the exit code of one that fails."""
    try:
        return command()
    except (ConfigError, CommandFailed) as error:
        message, code = str(error), error.code if isinstance(error, CommandFailed) else _USAGE
        print(f"kserve-vllm: {message}", file=sys.stderr)
    except KeyboardInterrupt:  # a second Ctrl-C comes while a command tidies up after the first
        message, code = "interrupted", _INTERRUPTED
    tell(message, code)
    return code


def _print_error(message: str, code: int, indent: int | None = 2) -> None:
    print(json.dumps({"error": {"message": message, "exit_code": code}}, indent=indent), flush=True)


def split_url(url: str, schemes: Sequence[str] = ("http", "https")) -> SplitResult:
    """The parts of an address.

    Raises:
        ConfigError: it is none of a server, with one of these schemes.
    """
    try:
        parts = urlsplit(url)
        if parts.scheme in schemes and parts.hostname and parts.port != 0:
            return parts
    except ValueError:
        pass  # a port or an IPv6 address that is none
    raise ConfigError(f"{url!r} is no address of a server: write {' or '.join(f'{s}://HOST:PORT' for s in schemes)}")


def add_cluster_arguments(parser: argparse.ArgumentParser) -> None:
    """How a cluster is named, as kubectl has it."""
    group = parser.add_argument_group("cluster")
    group.add_argument("-n", "--namespace", help="of the service; default: the context's")
    group.add_argument("--context", help="of the kubeconfig; default: the current one")
    group.add_argument("--kubeconfig", metavar="FILE", help="default: $KUBECONFIG, ~/.kube/config, or the pod's own")
