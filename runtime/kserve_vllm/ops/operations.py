"""The commands for operators. Each is a module with `main(arguments)`, imported when it is called, not before."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

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


def run(arguments: Sequence[str]) -> int:
    """Run one of them; returns its exit code."""
    try:
        return int(importlib.import_module(COMMANDS[arguments[0]][1]).main(list(arguments[1:])))
    except KeyboardInterrupt:  # a second Ctrl-C comes while a command tidies up after the first
        return _INTERRUPTED


def add_cluster_arguments(parser: argparse.ArgumentParser) -> None:
    """How a cluster is named, as kubectl has it."""
    group = parser.add_argument_group("cluster")
    group.add_argument("-n", "--namespace", help="of the service; default: the context's")
    group.add_argument("--context", help="of the kubeconfig; default: the current one")
    group.add_argument("--kubeconfig", metavar="FILE", help="default: $KUBECONFIG, ~/.kube/config, or the pod's own")
