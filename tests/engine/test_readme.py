"""Every block of code in the README and the documentation is run, and answers what its page says."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator

import httpx
import pytest

from tests.support import ROOT, free_port, wait_until

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, code) of a page's fenced blocks."""
    return re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.M | re.S)


README = blocks(PAGES[0].read_text())
BLOCKS = list(dict.fromkeys(block for page in PAGES for block in blocks(page.read_text())))
SERVE = "make serve\n"


def answers(block: str) -> list[str]:
    """What the block's comments promise."""
    return re.findall(r"# answers: (.+)", block)


def moved(block: str, ports: tuple[int, int]) -> str:
    """The block, talking to the ports of this test instead of the default ones."""
    return block.replace("localhost:8080", f"127.0.0.1:{ports[0]}").replace("localhost:8081", f"127.0.0.1:{ports[1]}")


@pytest.fixture(scope="module")
def ports() -> Iterator[tuple[int, int]]:
    """The ports of a server that the README's own command started."""
    chosen = free_port(), free_port()
    # As on a terminal, where the banner says what to type next.
    arguments = f"--host 127.0.0.1 --http-port {chosen[0]} --grpc-port {chosen[1]} --log-format console"
    command = [*SERVE.split(), f"ARGS={arguments}"]
    environ = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("Ready: demo on http://localhost:"):
                break
        else:
            pytest.fail("`make serve` ended:\n" + "".join(lines[-40:]))
        os.set_blocking(process.stdout.fileno(), False)
        yield chosen
        # What Ctrl-C sends: to make and everything below it.
        os.killpg(process.pid, signal.SIGINT)
        wait_until(lambda: not _answers(chosen[0]), 30, "the server still answers after Ctrl-C")


def _answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/v2/health/live", timeout=2).status_code > 0
    except httpx.TransportError:
        return False


def test_the_readme_starts_with_one_command_and_has_an_answer_for_each_protocol() -> None:
    assert ("bash", SERVE) in README
    text = "".join(block for _, block in README)
    for what in ("/v1/chat/completions", "/infer", "/generate_stream", ":predict", "tritonclient.grpc", "OpenAI("):
        assert what in text, what
    assert {language for language, _ in README} == {"bash", "python"}, "a block of another language would not be run"
    assert len(PAGES[0].read_text().splitlines()) <= 150


def test_what_is_not_run_is_a_picture_or_a_session_on_a_cluster() -> None:
    """`console` shows commands that need a cluster; the suite for clusters (`make e2e`) runs their like."""
    assert {language for language, _ in BLOCKS} == {"bash", "python", "console", "text"}


@pytest.mark.parametrize("block", [b for lang, b in BLOCKS if lang == "bash" and b != SERVE], ids=lambda b: b[:30])
def test_a_shell_block_runs(block: str, ports: tuple[int, int]) -> None:
    environ = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", moved(block, ports)],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rest = done.stdout
    for answer in answers(block):
        assert answer in rest, f"{answer!r} is missing, or out of order:\n{done.stdout}"
        rest = rest[rest.index(answer) + len(answer) :]


@pytest.mark.parametrize("block", [b for lang, b in BLOCKS if lang == "python"], ids=lambda b: b[:30])
def test_a_python_block_runs(block: str, ports: tuple[int, int]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", moved(block, ports)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert answers(block)
    for answer in answers(block):
        assert answer in done.stdout


def test_the_reference_tables_are_what_the_code_says() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "runtime/tools/gen_reference.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
