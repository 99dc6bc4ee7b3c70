"""Phases of a start follow each other, and add up to it."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import psutil
import pytest

from kserve_vllm.core.lifecycle import Lifecycle, State
from kserve_vllm.core.start_phases import PHASES, StartPhases
from kserve_vllm.telemetry import logs


def test_phases_add_up_to_the_whole_start() -> None:
    phases = StartPhases(began=100.0)
    ends = {
        "process": 101.0,
        "imports": 104.0,
        "engine_process": 110.0,
        "weights": 111.0,
        "compile": 120.0,
        "graphs": 121.5,
        "warm_up": 125.0,
    }
    for phase, at in ends.items():
        phases.end(phase, at)
    found = phases.seconds()
    assert found == {
        "process": 1,
        "imports": 3,
        "engine_process": 6,
        "weights": 1,
        "compile": 9,
        "graphs": 1.5,
        "warm_up": 3.5,
    }
    assert sum(found.values()) == 25.0
    phases.end("first_probe", 127.0)
    assert list(phases.seconds()) == list(PHASES)
    assert phases.seconds()["first_probe"] == 2.0
    assert phases.sentence().startswith("started in 27.0 s: process 1.0, imports 3.0, engine process 6.0")


def test_a_phase_that_was_not_seen_leaves_its_time_to_the_next() -> None:
    phases = StartPhases(began=0.0)
    for phase, at in {"process": 1.0, "imports": 2.0, "weights": 9.0, "compile": 8.0, "warm_up": 10.0}.items():
        phases.end(phase, at)
    assert phases.seconds() == {
        "process": 1,
        "imports": 1,
        "engine_process": 0,
        "weights": 7,
        "compile": 0,
        "graphs": 0,
        "warm_up": 1,
    }


def test_a_process_began_when_the_kernel_says() -> None:
    assert StartPhases().began == psutil.Process().create_time()


def test_the_first_probe_that_is_told_ready_is_noted_once() -> None:
    life = Lifecycle()
    noted: list[int] = []
    life.on_first_probe(lambda: noted.append(1))
    assert not life.probed()
    assert not noted
    life.to(State.READY)
    assert [life.probed(), life.probed()] == [True, True]
    assert noted == [1]


def test_vllms_processes_tell_of_phases_through_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_LOGGING_CONFIG_PATH", str(tmp_path / "logging.json"))
    assert logs.milestones() == {}
    workers = [logs.Milestones(f"{os.environ['VLLM_LOGGING_CONFIG_PATH']}.milestones") for _ in range(2)]
    for at, (worker, message, args) in enumerate(
        [
            (workers[0], "Starting to load model %s...", ("demo",)),
            (workers[0], "Loading weights took %.2f seconds", (0.5,)),
            (workers[1], "Loading weights took %.2f seconds", (0.7,)),
            (workers[0], "something else about loading weights", ()),
            (workers[0], "%storch.compile took %.2f s in total", ("", 3.0)),
        ]
    ):
        record = logging.LogRecord("vllm.x", logging.INFO, "x.py", 1, message, args, None)
        record.created = 1000.0 + at
        worker.emit(record)
    assert logs.milestones() == {"engine_process": 1000.0, "weights": 1002.0, "compile": 1004.0}
    assert set(logs.STAGES.values()) < set(PHASES)
