"""A start that fails, or in which nothing moves, comes to an end and says why."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from kserve_vllm.engine.start_watchdog import Movement, stall
from tests.support import DEMO, ROOT, Server


class Still:
    """Stands for processes: what moves is given by hand."""

    def __init__(self, *moves: bool) -> None:
        self.moves = list(moves)

    def look(self) -> bool:
        """The next of those that were given; nothing moves after them."""
        return self.moves.pop(0) if self.moves else False


def reason(still: Still, failures: list[tuple[str, str]], timeout_s: float = 0.3, grace_s: float = 0.1) -> str:
    """What the watchdog says."""

    async def main() -> str:
        watched: Movement = still  # type: ignore[assignment]
        return await asyncio.wait_for(stall(watched, lambda: failures, timeout_s, 0.02, grace_s), 20)

    return asyncio.run(main())


def test_a_start_that_stands_still_has_failed() -> None:
    assert reason(Still(), []) == "for 0.3 s no process used a processor, read or wrote"
    # The cause, where one of vLLM's processes has told it.
    assert reason(Still(), [("an error", "OSError: no space left")]).endswith("wrote: OSError: no space left")


def test_time_counts_from_the_last_movement() -> None:
    still = Still(*[True] * 30)
    reason(still, [])
    assert not still.moves


def test_a_start_that_has_failed_is_not_waited_for() -> None:
    busy = Still(*[True] * 100_000)
    failed = [("WorkerProc failed to start.", "MemoryError: no room"), ("EngineCore failed to start.", "Other: later")]
    assert reason(busy, failed) == "MemoryError: no room; its processes did not end by themselves"


def test_without_a_bound_a_start_may_stand_still() -> None:
    async def main() -> None:
        watched: Movement = Still()  # type: ignore[assignment]
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(stall(watched, list, 0.0, 0.01), 0.5)

    asyncio.run(main())


@contextmanager
def child(code: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process below this one, which has said that it runs."""
    process = subprocess.Popen([sys.executable, "-c", f"print(flush=True)\n{code}"], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
    finally:
        for each in [*psutil.Process(process.pid).children(recursive=True), process]:
            each.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def moved(movement: Movement, seconds: float = 0.5) -> bool:
    """Whether anything moves in a while."""
    movement.look()
    time.sleep(seconds)
    return movement.look()


def others() -> list[int]:
    """Pids of what other tests have left running below this process."""
    return [each.pid for each in psutil.Process().children(recursive=True)]


def test_sleeping_processes_do_not_move() -> None:
    running = others()
    movement = Movement(lambda: running)
    with child("import time; time.sleep(60)"):
        assert not moved(movement)


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "import time\nwhile True: open('/proc/meminfo').read(); time.sleep(0.05)",
        "import sys, time\nwhile True: print('a log line: still downloading shard 3 of 9 ... ' * 3, file=sys.stderr); "
        "time.sleep(0.05)",
        # below the process that was started
        "import subprocess, sys; subprocess.run([sys.executable, '-c', 'while True: pass'])",
    ],
)
def test_work_reading_and_log_lines_are_movement(code: str) -> None:
    movement = Movement()
    with child(code):
        assert any(moved(movement) for _ in range(20))


def test_processes_that_are_left_out_do_not_count() -> None:
    running = others()
    with child("while True: pass") as process:
        movement = Movement(lambda: [process.pid, *running])
        assert not moved(movement)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("worker", "arguments", "cause"),
    [
        ("Silent", ["--start-stall-timeout", "10"], "for 10 s no process used a processor"),
        ("Failing", [], "MemoryError: the demo model does not fit"),
        ("Silent", ["--start-stall-timeout", "10", "--api-server-count", "2"], "for 10 s no process used a processor"),
    ],
)
def test_a_worker_that_ignores_sigterm_and_systemexit_does_not_keep_the_server(
    worker: str, arguments: list[str], cause: str, tmp_path: Path
) -> None:
    message = tmp_path / "termination-log"
    message.touch()
    server = Server(
        [
            *DEMO,
            "--worker-cls",
            f"tests.engine.stubborn.{worker}",
            "--termination-message-path",
            str(message),
            *arguments,
        ],
        env={"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"},
    )
    try:
        below: dict[int, psutil.Process] = {}
        while server.process.poll() is None:
            assert time.monotonic() - server.started_at < 550, server.log[-4000:]
            below |= {each.pid: each for each in server.children()}
            time.sleep(0.5)
        assert server.process.returncode == 1, server.log[-4000:]
        last = server.log.strip().splitlines()[-1]
        assert "the start failed: " in last
        assert cause in last
        assert cause in message.read_text()
        assert message.read_text().startswith("the start failed: ")
        _, alive = psutil.wait_procs(below.values(), timeout=5)
        assert not [each for each in alive if each.status() != psutil.STATUS_ZOMBIE], "processes are left over"
    finally:
        server.stop()
