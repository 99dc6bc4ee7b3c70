"""`kserve-vllm keys`: what it prints, what it writes, and that no key ends up in a file."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from kserve_vllm.cli import command as cli
from kserve_vllm.policy.tenants import Tenants, digest, parse


def run(*arguments: str) -> int:
    """Run the command in this process."""
    return cli.main(["keys", *arguments])


def test_new_prints_a_key_once_and_writes_only_its_hash(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "keys.yaml"
    assert run("new", "--file", str(file), "--tenant", "team-a", "--expires", "90d", "--admin") == 0
    key = capsys.readouterr().out.strip()
    assert key not in file.read_text()
    assert digest(key) in file.read_text()
    caller = Tenants(str(file)).identify(key)
    assert (caller.tenant, caller.admin) == ("team-a", True)
    assert file.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    "text",
    [
        "# ours\ntenants:\n  team-a: {}\nkeys:\n",
        f"# ours\nkeys:\n- {{id: x, tenant: team-a, sha256: {digest('x')}}}\n",
        f"# ours\ntenants: {{team-a: {{}}}}\nkeys:\n    - id: x\n      tenant: team-a\n      sha256: {digest('x')}\n",
        "# ours\ntenants: {team-a: {}}\n",
    ],
)
def test_new_adds_to_a_file_and_keeps_its_comments(tmp_path: Path, text: str) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(text)
    before = len(parse(text, "f").keys)
    for _ in range(2):
        assert run("new", "--file", str(file), "--tenant", "team-a") == 0
    assert "# ours" in file.read_text()
    assert len(parse(file.read_text(), "f").keys) == before + 2


@pytest.mark.parametrize("text", ["{}", f"keys: [{{id: x, tenant: t, sha256: {digest('x')}}}]\ntenants: {{t: {{}}}}\n"])
def test_new_adds_to_json_and_to_flow_style(tmp_path: Path, text: str) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    before = len(parse(text, "f").keys)
    assert run("new", "--file", str(file), "--tenant", "team-a") == 0
    assert len(parse(file.read_text(), "f").keys) == before + 1


def test_a_broken_file_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text("keys: [")
    assert run("new", "--file", str(file), "--tenant", "team-a") == 2
    assert file.read_text() == "keys: ["
    assert "neither YAML nor JSON" in capsys.readouterr().err


def test_hash_reads_standard_input(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("kv-secret\n"))
    assert run("hash") == 0
    assert capsys.readouterr().out.strip() == digest("kv-secret")


def test_list_shows_everything_but_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(
        "tiers: {gold: {limits: {requests_per_minute: 60}}}\ntenants: {a: {tier: gold}}\n"
        f"keys:\n  - {{id: one, tenant: a, sha256: {digest('x')}, expires: 2020-01-01}}\n"
        f"  - {{id: two, tenant: b, sha256: {digest('y')}, admin: true}}\n"
    )
    assert run("list", "--file", str(file)) == 0
    shown = capsys.readouterr().out
    assert "one  a       gold  -      2020-01-01 00:00Z (ended)  requests_per_minute=60" in shown
    assert digest("x") not in shown


def test_a_date_that_is_none_is_refused_with_an_example(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("new", "--file", str(tmp_path / "k"), "--tenant", "t", "--expires", "soon") == 2
    assert "90d" in capsys.readouterr().err
