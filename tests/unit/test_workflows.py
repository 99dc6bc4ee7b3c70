"""What GitHub reads: workflows, issue forms, dependabot. It says only after a push that one is wrong."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support import ROOT

GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
SCHEMAS = {
    **dict.fromkeys(WORKFLOWS, "vendor.github-workflows"),
    GITHUB / "dependabot.yml": "vendor.dependabot",
    **{
        path: f"vendor.github-issue-{'config' if path.stem == 'config' else 'forms'}"
        for path in sorted((GITHUB / "ISSUE_TEMPLATE").glob("*.yml"))
    },
}


def commands(path: Path) -> list[str]:
    """All scripts of a workflow's steps."""
    jobs: dict[str, Any] = yaml.safe_load(path.read_text())["jobs"]
    return [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]


def test_every_file_has_a_schema() -> None:
    assert set(SCHEMAS) == set(GITHUB.rglob("*.yml")) | set(GITHUB.rglob("*.yaml"))


@pytest.mark.parametrize("path", SCHEMAS, ids=lambda path: path.name)
def test_a_file_is_as_its_published_schema_says(path: Path) -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", SCHEMAS[path], str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_scripts_run_targets_and_files_that_exist_and_parse(path: Path) -> None:
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for script in commands(path):
        for words in re.findall(r"^\s*make ((?:[a-z][\w-]*\s?)+)", script, re.MULTILINE):
            assert set(words.split()) <= targets, script
        for word in re.findall(r"(?:^|\s)bash (\S+)", script):
            assert (ROOT / word).is_file(), script
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_no_script_holds_an_expression_and_rights_are_given_job_by_job(path: Path) -> None:
    # GitHub pastes an expression's value into the script before the shell reads it; variables are safe.
    assert not [script for script in commands(path) if "${{" in script]
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        for step in job["steps"]:
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False


def test_a_release_takes_the_tag_of_the_version_alone() -> None:
    script = commands(GITHUB / "workflows" / "release.yml")[0]
    version = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version
    for tag, code in ((f"v{version[1]}", 0), ("v9.9.9", 1)):
        env = {"PATH": "/usr/bin:/bin", "GITHUB_REF_NAME": tag, "GITHUB_REPOSITORY": "Some/Fork"}
        done = subprocess.run(
            ["bash", "-e", "-c", script],
            cwd=ROOT,
            env={**env, "GITHUB_ENV": "/dev/stdout"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == code, done.stderr
        assert code or done.stdout == f"IMAGE=ghcr.io/some/fork:{version[1]}\n"
