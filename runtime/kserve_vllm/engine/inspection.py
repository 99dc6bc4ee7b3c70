"""Looks at Python sources without importing them: whether a name is there, and a fingerprint of what it names.

The same code looks at what is installed and at a wheel, so that a version can be judged before anything of it runs.
Fingerprints are of the syntax tree: comments, docstrings, line breaks and the Python that reads it make no difference.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

Kind = Literal["exists", "source", "signature", "fields", "holds"]
Definition: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
_FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
_DEEPEST = 12  # re-exports and bases that are followed


class Sources(Protocol):
    """Where modules' texts come from."""

    def text(self, module: str) -> str | None:
        """The source of a module, or None where there is none."""


class Installed:
    """What this Python would import; only a top-level package's place is asked for, nothing runs."""

    def __init__(self) -> None:
        self._roots: dict[str, Path | None] = {}

    def text(self, module: str) -> str | None:
        """The source of an installed module."""
        top, *rest = module.split(".")
        root = self.folder(top)
        if root is None:
            return None
        for file in (root.joinpath(*rest, "__init__.py"), root.joinpath(*rest).with_suffix(".py") if rest else None):
            if file is not None and file.is_file():
                return file.read_text(encoding="utf-8")
        return None

    def folder(self, package: str) -> Path | None:
        """Where a top-level package lies; None where it is no package, or not there."""
        if package not in self._roots:
            spec = importlib.util.find_spec(package)
            places = list(spec.submodule_search_locations or ()) if spec is not None else []
            self._roots[package] = Path(places[0]) if places else None
        return self._roots[package]


class Wheel:
    """A wheel's modules.

    Args:
        path: of the `.whl` file.
    """

    def __init__(self, path: Path) -> None:
        self._zip = zipfile.ZipFile(path)
        self._names = frozenset(self._zip.namelist())

    def text(self, module: str) -> str | None:
        """The source of a module in the wheel."""
        base = module.replace(".", "/")
        for name in (f"{base}/__init__.py", f"{base}.py"):
            if name in self._names:
                return self._zip.read(name).decode()
        return None

    def modules(self, package: str) -> list[str]:
        """All modules of the wheel below a package."""
        below = package.replace(".", "/") + "/"
        return sorted(
            name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            for name in self._names
            if name.startswith(below) and name.endswith(".py")
        )


class Inspector:
    """Finds names in sources.

    Args:
        sources: where the modules are.
    """

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self._trees: dict[str, ast.Module | None] = {}

    def module(self, name: str) -> ast.Module | None:
        """A module's tree, or None."""
        if name not in self._trees:
            text = self._sources.text(name)
            self._trees[name] = None if text is None else ast.parse(text)
        return self._trees[name]

    def look(self, dotted: str, kind: Kind, what: str = "") -> str | None:
        """The fingerprint of what a dotted name stands for; None where the name is not there.

        Args:
            dotted: module, and what is in it: a class, function, method, or an attribute that a method sets on `self`.
            kind: `exists`: "yes"; `source`: a hash; `signature`: the parameters; `fields`: names of a class's fields,
                inherited ones included; `holds`: "yes" where the text `what` is in the source.
            what: for `holds`.
        """
        found = self._find(dotted)
        if found is None:
            return None
        module, node = found
        if kind == "holds":
            text = self._sources.text(module) or ""
            segment = text if isinstance(node, ast.Module) else ast.get_source_segment(text, node) or ""
            return "yes" if what in segment else None
        if kind == "signature" and isinstance(node, ast.ClassDef):
            inner = self._member(module, node, "__init__", _DEEPEST)
            node = inner[1] if inner is not None else node
        if kind == "signature" and isinstance(node, _FUNCTION):
            return _signature(node.args)
        if kind == "fields" and isinstance(node, ast.ClassDef):
            return " ".join(sorted(self._fields(module, node, _DEEPEST)))
        if kind == "source":
            return hashlib.sha256("\n".join(_words(node)).encode()).hexdigest()[:16]
        return "yes" if kind == "exists" else None

    def _find(self, dotted: str) -> tuple[str, ast.AST] | None:
        parts = dotted.split(".")
        for length in range(len(parts), 0, -1):
            module = ".".join(parts[:length])
            tree = self.module(module)
            if tree is not None:
                return self._resolve(module, tree, parts[length:], _DEEPEST)
        return None

    def _resolve(self, module: str, tree: ast.AST, parts: list[str], left: int) -> tuple[str, ast.AST] | None:
        found: tuple[str, ast.AST] | None = (module, tree)
        for part in parts:
            if found is None or left <= 0:
                return None
            module, node = found
            if isinstance(node, ast.Module):
                found = self._in_module(module, node, part, left - 1)
            elif isinstance(node, ast.ClassDef):
                found = self._member(module, node, part, left - 1)
            else:
                return None
        return found

    def _in_module(self, module: str, tree: ast.Module, name: str, left: int) -> tuple[str, ast.AST] | None:
        for node in _statements(tree.body):
            if isinstance(node, (*_FUNCTION, ast.ClassDef)) and node.name == name:
                return module, node
            if isinstance(node, (ast.Assign, ast.AnnAssign)) and name in _targets(node):
                return module, node
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        source = self._absolute(module, node)
                        inner = self._find(f"{source}.{alias.name}") if left > 0 else None
                        # From another package, or made at run time: that it is imported has to do.
                        return inner if inner is not None else (module, node)
        return None

    def _member(self, module: str, cls: ast.ClassDef, name: str, left: int) -> tuple[str, ast.AST] | None:
        for node in _statements(cls.body):
            if isinstance(node, (*_FUNCTION, ast.ClassDef)) and node.name == name:
                return module, node
            if isinstance(node, (ast.Assign, ast.AnnAssign)) and name in _targets(node):
                return module, node
        for inner in ast.walk(cls):
            if isinstance(inner, (ast.Assign, ast.AnnAssign)) and f"self.{name}" in _targets(inner):
                return module, inner
        for base_module, base in self._bases(module, cls, left):
            found = self._member(base_module, base, name, left - 1)
            if found is not None:
                return found
        return None

    def _fields(self, module: str, cls: ast.ClassDef, left: int) -> set[str]:
        own = {
            node.target.id
            for node in _statements(cls.body)
            if isinstance(node, ast.AnnAssign)
            and isinstance(node.target, ast.Name)
            and "ClassVar" not in ast.unparse(node.annotation)
        }
        for base_module, base in self._bases(module, cls, left):
            own |= self._fields(base_module, base, left - 1)
        return own

    def _bases(self, module: str, cls: ast.ClassDef, left: int) -> Iterator[tuple[str, ast.ClassDef]]:
        tree = self.module(module)
        if tree is None or left <= 0:
            return
        for base in cls.bases:
            bare = base.value if isinstance(base, ast.Subscript) else base
            found = self._resolve(module, tree, ast.unparse(bare).split("."), left)
            if found is not None and isinstance(found[1], ast.ClassDef) and found[1] is not cls:
                yield found[0], found[1]

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        # A package is a module that has modules below it: what it imports relatively is one of those.
        parts = module.split(".")
        for base in (parts[: len(parts) - node.level + 1], parts[: len(parts) - node.level]):
            name = ".".join([*base, *([node.module] if node.module else [])])
            if name != module and self.module(name) is not None:
                return name
        return ".".join(parts)


def imports_of(text: str, package: str) -> set[str]:
    """Dotted names that a source imports from a package, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == package:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == package}
    return found


def routes_of(tree: ast.AST) -> set[tuple[str, str]]:
    """(method, path) of the routes that a module's decorators declare."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, _FUNCTION):
            for call in node.decorator_list:
                if (
                    isinstance(call, ast.Call)
                    and isinstance(call.func, ast.Attribute)
                    and call.func.attr in ("get", "post", "put", "delete", "patch", "head", "websocket")
                    and call.args
                    and isinstance(call.args[0], ast.Constant)
                    and str(call.args[0].value).startswith("/")
                ):
                    found.add((call.func.attr.upper(), str(call.args[0].value)))
    return found


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a body, those under `if` and `try` included."""
    for node in body:
        yield node
        for name in ("body", "orelse", "finalbody"):
            if isinstance(node, (ast.If, ast.Try, ast.With)):
                yield from _statements(getattr(node, name, []))
        if isinstance(node, ast.Try):
            for handler in node.handlers:
                yield from _statements(handler.body)


def _targets(node: ast.Assign | ast.AnnAssign) -> list[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    flat = [each for target in targets for each in (target.elts if isinstance(target, ast.Tuple) else [target])]
    return [ast.unparse(each) for each in flat if isinstance(each, (ast.Name, ast.Attribute))]


def _signature(args: ast.arguments) -> str:
    """Parameters as a caller sees them; `=` marks those that may be left out."""
    positional = [*args.posonlyargs, *args.args]
    optional = len(positional) - len(args.defaults)
    words = [f"{each.arg}{'=' if at >= optional else ''}" for at, each in enumerate(positional)]
    if args.vararg is not None or args.kwonlyargs:
        words.append(f"*{args.vararg.arg if args.vararg is not None else ''}")
    words += [
        f"{each.arg}{'=' if default is not None else ''}"
        for each, default in zip(args.kwonlyargs, args.kw_defaults, strict=True)
    ]
    if args.kwarg is not None:
        words.append(f"**{args.kwarg.arg}")
    return " ".join(words)


def _words(node: ast.AST) -> Iterator[str]:
    """A tree as words that are the same for every Python: without what is empty, docstrings and annotations."""
    yield type(node).__name__
    for name, value in ast.iter_fields(node):
        if name in ("ctx", "type_comment", "kind", "annotation", "returns", "decorator_list", "type_params"):
            continue
        if name == "body" and isinstance(value, list) and isinstance(node, (*_FUNCTION, ast.ClassDef)):
            value = value[1:] if ast.get_docstring(node, clean=False) is not None else value
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, ast.AST):
                yield f"{name}("
                yield from _words(each)
                yield ")"
            elif each is not None:
                yield f"{name}={each!r}"
