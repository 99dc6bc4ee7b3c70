"""The process that servers of the tests are forked from: what comes of it is as a fresh interpreter's."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest

from tests.support import ROOT, free_port, wait_until
from tests.zygote import ForkedProcess

COMMANDS = [["--version"], ["config", "--demo", "--no-such"], ["serve", "--demo", "--http-port", "none"], ["health"]]


def forked(arguments: list[str], env: Mapping[str, str], log: Path) -> tuple[int, str]:
    """Exit code and output of a command in a copy of the zygote."""
    with log.open("w") as file:
        code = ForkedProcess(arguments, {**os.environ, **env}, file.fileno()).wait(60)
    return code, log.read_text()


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_a_copy_says_what_a_fresh_process_says_and_ends_with_its_code(arguments: list[str], tmp_path: Path) -> None:
    env = {"KSERVE_VLLM_HTTP_PORT": str(free_port())}
    command = [sys.executable, "-m", "kserve_vllm", *arguments]
    fresh = subprocess.run(
        command, env={**os.environ, **env}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    code, said = forked(arguments, env, tmp_path / "log")
    assert code == fresh.returncode
    assert said.splitlines()[-1:] == fresh.stdout.splitlines()[-1:]


def test_what_one_copy_is_told_no_other_one_knows(tmp_path: Path) -> None:
    first = forked(["config", "--demo"], {"KSERVE_VLLM_MAX_NUM_SEQS": "7"}, tmp_path / "first")[1]
    second = forked(["config", "--demo"], {}, tmp_path / "second")[1]
    assert "max-num-seqs: 7" in first.replace('"', "")
    assert "KSERVE_VLLM_MAX_NUM_SEQS" not in second


def test_nothing_is_left_of_a_test_run_that_is_killed(tmp_path: Path) -> None:
    script = """
        import os, pathlib, time
        from tests.zygote import ForkedProcess
        with open("log", "w") as log:
            ports = ["--host", "127.0.0.1", "--http-port", "0", "--grpc-port", "0"]
            process = ForkedProcess(["serve", "--demo", *ports], dict(os.environ), log.fileno())
        pathlib.Path("pid").write_text(str(process.pid))
        time.sleep(60)
    """
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    env.pop("PYTEST_XDIST_TESTRUNUID", None)  # a zygote of its own
    pid = tmp_path / "pid"
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], cwd=tmp_path, env=env) as run:
        wait_until(lambda: pid.exists() and bool(pid.read_text()), 60, "no server was forked")
        server = psutil.Process(int(pid.read_text()))
        zygote = next(each for each in psutil.Process(run.pid).children() if "tests.zygote" in each.cmdline())
        run.kill()
    _, alive = psutil.wait_procs([server, zygote], timeout=30)
    assert not alive
