"""Clients that people bring, driven by scripts of ours in environments of their own."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.compat.base import Case, Folder, Suite, Target, script

_PYTHON = {
    "litellm": ("litellm_client.py", "litellm's providers for OpenAI, vLLM and Anthropic", ("litellm==1.105.0",)),
    "langchain": ("langchain_client.py", "LangChain's ChatOpenAI and OpenAI", ("langchain-openai==1.7.4",)),
    "tools": (
        "tools_client.py",
        "tools and JSON over chat, responses and messages, by OpenAI's and Anthropic's SDKs",
        ("openai==3.51.0", "anthropic==2.10.0"),
    ),
    "agents": ("agents_client.py", "OpenAI's Agents SDK: its loop over chat and responses", ("openai-agents==0.24.0",)),
    "langchain-tools": ("langchain_tools.py", "LangChain's ChatOpenAI with tools", ("langchain-openai==1.7.4",)),
    "grpclib": ("grpclib_client.py", "V2 over gRPC with grpclib", ("grpclib==0.4.9", "protobuf==6.33.5")),
}
_NODE = {
    "openai-node": ("openai_node.mjs", "OpenAI's SDK for Node", ("openai@7.55.0",)),
    "ai-sdk": ("ai_sdk.mjs", "Vercel's AI SDK", ("ai@6.0.326", "@ai-sdk/openai-compatible@2.0.92")),
    "ai-sdk-tools": (
        "ai_sdk_tools.mjs",
        "Vercel's AI SDK with tools",
        ("ai@6.0.326", "@ai-sdk/openai-compatible@2.0.92"),
    ),
    "grpc-js": ("grpc_js.mjs", "V2 over gRPC with grpc-js", ("@grpc/grpc-js@1.14.7", "@grpc/proto-loader@0.8.1")),
}
_WITH_TOOLS = {"tools", "agents", "langchain-tools", "ai-sdk-tools"}
_FOLDERS = {"langchain-tools": "langchain", "ai-sdk-tools": "ai-sdk"}
"""Of another suite, whose packages they share."""

_DESCRIBE = """
import sys
from google.protobuf import descriptor_pb2
from tritonclient.grpc import service_pb2
files = descriptor_pb2.FileDescriptorSet()
for each in [*service_pb2.DESCRIPTOR.dependencies, service_pb2.DESCRIPTOR]:
    each.CopyToProto(files.file.add())
open(sys.argv[1], "wb").write(files.SerializeToString())
"""


def describe_v2(folder: Path) -> None:
    """Write `v2.bin`, V2's messages and methods as Triton's client declares them, for clients that read descriptors.

    In a process of its own: protobuf takes one declaration of these messages in each.
    """
    subprocess.run([sys.executable, "-c", _DESCRIBE, str(folder / "v2.bin")], check=True, capture_output=True)


def _python(name: str, target: Target, folder: Path) -> list[Case]:
    file, _, requirements = _PYTHON[name]
    where = folder / _FOLDERS.get(name, name)
    python = Folder(where).python(*requirements)
    describe_v2(where)
    return script(file, [str(python)], target, where)


def node(name: str, target: Target, folder: Path) -> list[Case]:
    """The script of a client of Node's."""
    file, _, packages = _NODE[name]
    where = Folder(folder / _FOLDERS.get(name, name)).node(*packages)
    describe_v2(where)
    return script(file, ["node"], target, where)


def _suite(name: str, what: str, registry: str, pinned: Sequence[str], run: object) -> Suite:
    asking = functools.partial(run, name)  # type: ignore[arg-type]
    return Suite(name, what, f"{registry} {', '.join(pinned)}", asking, tools=name in _WITH_TOOLS)


SUITES = [
    *(_suite(name, what, "npm", pinned, node) for name, (_, what, pinned) in _NODE.items()),
    *(_suite(name, what, "PyPI", pinned, _python) for name, (_, what, pinned) in _PYTHON.items()),
]
