"""The front end stays off the processors that the engine's workers are bound to."""

from __future__ import annotations

import os
import subprocess
import sys

import psutil
import pytest

from tests.support import Server, not_checked

# In a process of its own, since it changes where that runs: a child bound to the given processors; then where the main
# thread, one that ran before and one that began later may run.
_SCRIPT = """
import json, os, subprocess, sys, threading, psutil
from kserve_vllm.engine.cpu_affinity import leave_processors_of
bound = json.loads(sys.argv[1])
worker = subprocess.Popen(["sleep", "60"])
os.sched_setaffinity(worker.pid, bound)
found, end, early = [], threading.Event(), []
before = threading.Thread(target=lambda: (early.append(threading.get_native_id()), end.wait()))
before.start()
while not early:
    pass
gone = subprocess.Popen(["true"])
lost = psutil.Process(gone.pid)
gone.wait()
left = leave_processors_of([psutil.Process(worker.pid), lost])
worker.kill(), worker.wait()
after = threading.Thread(target=lambda: found.append(sorted(os.sched_getaffinity(0))))
after.start(), after.join()
found += [sorted(os.sched_getaffinity(0)), sorted(os.sched_getaffinity(early[0]))]
end.set()
print(json.dumps([sorted(left), found]))
"""


@pytest.fixture
def processors() -> list[int]:
    """Those that there are; two at least."""
    found = sorted(os.sched_getaffinity(0))
    if len(found) < 2:
        not_checked("one processor alone: nothing can be left to the front end")
    return found


def left(bound: list[int]) -> str:
    command = [sys.executable, "-c", _SCRIPT, str(bound)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_all_threads_leave_a_bound_processor(processors: list[int]) -> None:
    rest = processors[1:]
    assert left(processors[:1]).strip() == str([rest, [rest] * 3])


def test_nothing_changes_where_nobody_is_bound_or_nothing_would_be_left(processors: list[int]) -> None:
    assert left(processors).strip() == str([[], [processors] * 3])


def test_a_server_is_not_where_its_workers_compute(server: Server, processors: list[int]) -> None:
    front = psutil.Process(server.process.pid)
    workers = [set(each.cpu_affinity()) for each in front.children(recursive=True)]
    bound = set().union(*(each for each in workers if each < set(processors)))
    assert bound
    assert bound < set(processors)
    assert {frozenset(os.sched_getaffinity(thread.id)) for thread in front.threads()} == {
        frozenset(set(processors) - bound)
    }
