"""Imports run one way, and importing the package costs nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
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


def imported_rooms(path: Path) -> set[str]:
    """Rooms of our package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
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
        "vllm",
        "hooks/answer_shape",
        "hooks/anthropic_repair",
        "hooks/cache_codec",
        "hooks/guards",
        "hooks/request_repair",
        "hooks/responses_repair",
        "patches/inline_rendering",
        "patches/late_text",
        "patches/openai_stream",
        "patches/plain_outputs",
    )
}

MODULES = sorted(p for p in PACKAGE.rglob("*.py") if room_of(p) != "__init__" and "demo" not in p.parts)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_imports_only_from_lower_floors(path: Path) -> None:
    own = room_of(path)
    for other in imported_rooms(path) - {own}:
        assert floor(own) < floor(other), f"{own} must not import {other}"


def imports_vllm(tree: ast.AST) -> bool:
    """Whether vLLM is imported anywhere in a syntax tree."""
    for node in ast.walk(tree):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if any(name.split(".")[0] == "vllm" for name in names):
            return True
    return False


class WithoutTypeImports(ast.NodeTransformer):
    """Leaves out what only a type checker imports."""

    def visit_If(self, node: ast.If) -> ast.AST | None:
        return None if ast.unparse(node.test) == "TYPE_CHECKING" else self.generic_visit(node)


def test_only_a_few_modules_of_the_engine_room_import_vllm() -> None:
    trees = {path: ast.parse(path.read_text()) for path in MODULES}
    assert [p.name for p, tree in trees.items() if imports_vllm(tree) and room_of(p) != "engine"] == []
    run = {path for path, tree in trees.items() if imports_vllm(WithoutTypeImports().visit(tree))}
    assert run == KNOW_VLLM


MOST_ANY = 100
"""How often `Any` may be written in the package: where a type can't be named. It only goes down."""


def count_any(text: str) -> int:
    """How often a source names `typing.Any`, its imports left out."""
    nodes = ast.walk(ast.parse(text))
    names = sum(isinstance(node, ast.Name) and node.id == "Any" for node in nodes)
    # As `typing.Any`, and in annotations that are texts.
    nodes = ast.walk(ast.parse(text))
    dotted = sum(isinstance(node, ast.Attribute) and node.attr == "Any" for node in nodes)
    return names + dotted


def test_any_is_counted() -> None:
    assert count_any("from typing import Any\ndef f(a: Any, b: list[Any]) -> typing.Any: ...  # Any\n") == 3


def test_types_are_named() -> None:
    found = {path: count_any(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
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
