"""Imports run one way, and importing the package costs nothing."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import ROOT

PACKAGE = ROOT / "runtime" / "kserve_vllm"
# Left imports right, never the other way; siblings of one floor do not import each other.
FLOORS = [
    {"__main__"},
    {"cli"},
    {"app", "ops"},
    {"servers", "kserve_sdk"},
    {"grpc_server"},
    {"protocols"},
    {"policy", "engine", "telemetry"},
    {"adapters"},
    {"config"},
    {"core"},
]


def floor(room: str) -> int:
    """The floor of a room, from the top."""
    return next(i for i, rooms in enumerate(FLOORS) if room in rooms)


def room_of(path: Path) -> str:
    """The first part of a module's path in the package."""
    part = path.relative_to(PACKAGE).parts[0]
    return part.removesuffix(".py")


@functools.cache
def parsed(path: Path) -> ast.Module:
    """A module's syntax tree; read by all, changed by none."""
    return ast.parse(path.read_text())


def imported_rooms(path: Path) -> set[str]:
    """Rooms of our package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if node.module != "kserve_vllm" else [f"kserve_vllm.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("kserve_vllm.")}
    return found


# vLLM moves its modules; whatever moves is mended in these.
KNOW_VLLM = {
    PACKAGE / "engine" / f"{name}.py"
    for name in (
        "arguments",
        "fork_server",
        "items",
        "loras",
        "preloaded",
        "processes",
        "requests",
        "text_tasks",
        "vllm",
        "hooks/answer_shape",
        "hooks/anthropic_repair",
        "hooks/cache_codec",
        "hooks/guards",
        "hooks/media",
        "hooks/request_repair",
        "hooks/responses_repair",
        "hooks/stat_logger",
        "patches/answer_bytes",
        "patches/inline_rendering",
        "patches/late_text",
        "patches/openai_stream",
        "patches/plain_chats",
        "patches/plain_outputs",
        "patches/prompt_tokens",
    )
}

MODULES = sorted(p for p in PACKAGE.rglob("*.py") if room_of(p) != "__init__" and "demo" not in p.parts)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_imports_only_from_lower_floors(path: Path) -> None:
    own = room_of(path)
    for other in imported_rooms(path) - {own}:
        assert floor(own) < floor(other), f"{own} must not import {other}"


def nodes_of(tree: ast.AST, type_imports: bool) -> Iterator[ast.AST]:
    """All nodes of a syntax tree, with or without what only a type checker imports."""
    left = [tree]
    while left:
        node = left.pop()
        if not type_imports and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        left.extend(ast.iter_child_nodes(node))


def imports_vllm(tree: ast.AST, type_imports: bool = True) -> bool:
    """Whether vLLM is imported anywhere in a syntax tree."""
    for node in nodes_of(tree, type_imports):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if any(name.split(".")[0] == "vllm" for name in names):
            return True
    return False


def test_only_a_few_modules_of_the_engine_room_import_vllm() -> None:
    trees = {path: parsed(path) for path in MODULES}
    assert [p.name for p, tree in trees.items() if imports_vllm(tree) and room_of(p) != "engine"] == []
    run = {path for path, tree in trees.items() if imports_vllm(tree, type_imports=False)}
    assert run == KNOW_VLLM


MOST_ANY = 100
"""How often `Any` may be written in the package: where a type can't be named. It only goes down."""


def count_any(tree: ast.AST) -> int:
    """How often a source names `typing.Any`, its imports left out."""
    return sum(
        (isinstance(node, ast.Name) and node.id == "Any") or (isinstance(node, ast.Attribute) and node.attr == "Any")
        for node in ast.walk(tree)
    )


def test_any_is_counted() -> None:
    text = "from typing import Any\ndef f(a: Any, b: list[Any]) -> typing.Any: ...  # Any\n"
    assert count_any(ast.parse(text)) == 3


def test_types_are_named() -> None:
    found = {path: count_any(parsed(path)) for path in sorted(PACKAGE.rglob("*.py"))}
    total = sum(found.values())
    worst = ", ".join(f"{p.relative_to(PACKAGE)}: {n}" for p, n in sorted(found.items(), key=lambda e: -e[1])[:5])
    assert total <= MOST_ANY, f"`Any` is written {total} times, most often in {worst}: say what the values are"


def test_importing_the_package_imports_nothing_else() -> None:
    code = (
        "import sys; before = set(sys.modules); import kserve_vllm; "
        "print([m for m in set(sys.modules) - before if not m.startswith('kserve_vllm')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_command_line_answers_without_importing_vllm_or_kserve() -> None:
    code = (
        "import sys; from kserve_vllm.cli import command as cli; sys.argv = ['kserve-vllm']; "
        "cli.resolve(['some/model'], {}); print([m for m in ('vllm', 'kserve', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_public_class_name_exists_twice() -> None:
    """Who searches for a name finds one thing. Classes inside of functions and generated modules are left out."""
    found: dict[str, list[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        if not path.stem.endswith("_pb2"):
            for node in parsed(path).body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    found.setdefault(node.name, []).append(str(path.relative_to(PACKAGE)))
    assert len(found) > 200, "else this looked at nothing"
    assert {name: where for name, where in found.items() if len(where) > 1} == {}
