"""When vLLM may bind its threads to processors: control groups as kernels of both versions write them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from kserve_vllm.engine import cpu_binding
from kserve_vllm.engine.cpu_binding import BIND, apply, decide, parse_list, read

POD = {"KUBERNETES_SERVICE_HOST": "10.96.0.1"}
SCOPE = "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1f.slice/cri-containerd-ab.scope"


def v2(cpus: str, maximum: str, weight: int, group: str = "/", at: str = "") -> dict[str, str]:
    """A container's view in version 2: its own group is the root of what it sees, unless it lies at `at`."""
    folder = f"sys/fs/cgroup{at}"
    return {
        "proc/self/cgroup": f"0::{group}\n",
        "sys/fs/cgroup/cgroup.controllers": "cpuset cpu io memory hugetlb pids\n",
        f"{folder}/cpuset.cpus.effective": f"{cpus}\n",
        f"{folder}/cpu.max": f"{maximum} 100000\n",
        f"{folder}/cpu.weight": f"{weight}\n",
    }


def v1(cpus: str, quota: int, shares: int, path: str = "/", effective: bool = True) -> dict[str, str]:
    """The same in version 1, with the names of systemd's hierarchies."""
    own = {
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": f"{quota}\n",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/cpu,cpuacct/cpu.shares": f"{shares}\n",
        "sys/fs/cgroup/cpuset/cpuset.cpus": f"{cpus}\n",
    }
    if effective:
        own["sys/fs/cgroup/cpuset/cpuset.effective_cpus"] = f"{cpus}\n"
    groups = f"11:cpuset:{path}\n4:cpu,cpuacct:{path}\n3:memory:{path}\n1:name=systemd:{path}\n0::/\n"
    return {"proc/self/cgroup": groups, **own}


@dataclass(frozen=True)
class Case:
    """A machine and a container on it.

    Attributes:
        files: of its control groups.
        bind: whether vLLM shall bind.
        threads: what `OMP_NUM_THREADS` becomes.
        environ: of the container.
        online: processors of the machine.
        ranks: workers beside each other.
    """

    files: Mapping[str, str]
    bind: bool
    threads: str | None = None
    environ: Mapping[str, str] = field(default_factory=lambda: POD)
    online: str = "0-15"
    ranks: int = 1


CASES = {
    "a Burstable pod with a limit below the node": Case(v2("0-15", "400000", 79), False, "3"),
    "a Burstable pod with a limit of one and a half": Case(v2("0-15", "150000", 20), False, "1"),
    "a pod with a limit and two ranks": Case(v2("0-15", "800000", 79), False, "3", ranks=2),
    "a pod without a limit": Case(v2("0-15", "max", 4), False),
    "a pod whose limit is the whole node": Case(v2("0-15", "1600000", 622), False),
    "a Guaranteed pod of the static policy, with its quota": Case(v2("2-5", "400000", 157), True),
    "the same without a quota, its weight by the line": Case(v2("2-5", "max", 157), True),
    "the same without a quota, its weight by the curve": Case(v2("2-5", "max", 303), True),
    "a pod in the pool that exclusive ones have left": Case(v2("0-1,6-15", "max", 79), False),
    "a pod in that pool with a limit": Case(v2("0-1,6-15", "400000", 157), False, "3"),
    "version 1: a limit below the node": Case(v1("0-15", 400_000, 2048), False, "3"),
    "version 1: no limit": Case(v1("0-15", -1, 102), False),
    "version 1: exclusive, with its quota": Case(v1("2-5", 400_000, 4096), True),
    "version 1: exclusive, without a quota": Case(v1("2-5", -1, 4096), True),
    "version 1: exclusive, on a kernel without effective_cpus": Case(v1("2-5", -1, 4096, effective=False), True),
    "version 1: in the pool": Case(v1("0-1,6-15", -1, 2048), False),
    "version 1: the path is the one outside of the container": Case(
        v1("0-15", 400_000, 2048, path="/kubepods/burstable/pod1f/ab"), False, "3", environ={}
    ),
    "version 1: no cpuset is mounted": Case(
        {name: text for name, text in v1("0-15", 400_000, 2048).items() if "cpuset/" not in name}, False, "3"
    ),
    "a laptop without containers": Case(v2("0-15", "max", 100), True, environ={}),
    "docker run --cpus 2": Case(v2("0-15", "200000", 100), False, "1", environ={}),
    "docker run --cpuset-cpus 4-7": Case(v2("4-7", "max", 100), True, environ={}),
    "a quota on a group above": Case(
        {
            **v2("0-15", "max", 100, group="/a.slice/b.scope", at="/a.slice/b.scope"),
            "sys/fs/cgroup/a.slice/cpu.max": "300000 100000\n",
        },
        False,
        "2",
        environ={},
    ),
    "a host's view of a pod": Case(v2("0-15", "max", 4, group=f"/{SCOPE}", at=f"/{SCOPE}"), False, environ={}),
    "no control groups at all": Case({"proc/self/cgroup": ""}, True, environ={}),
}


def put(files: Mapping[str, str], root: Path, online: str) -> Path:
    """Write them below `root`."""
    for name, text in {**files, "sys/devices/system/cpu/online": online}.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


@pytest.mark.parametrize("name", CASES)
def test_threads_are_bound_only_where_no_one_else_runs(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    share = read(case.environ, put(case.files, tmp_path, case.online), affinity=range(16))
    decision = decide(share, case.ranks)
    assert decision.bind is case.bind, decision
    assert decision.threads == (None if case.threads is None else int(case.threads)), decision


def test_vllm_is_told_by_its_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    shared = put(v2("0-15", "400000", 79), tmp_path / "shared", "0-15")
    environ = dict(POD)
    apply(environ, 1, shared)
    assert environ == {**POD, BIND: "nobind", "OMP_NUM_THREADS": "3"}
    own = put(v2("2-5", "400000", 157), tmp_path / "own", "0-15")
    environ = dict(POD)
    apply(environ, 1, own)
    assert environ == POD


@pytest.mark.parametrize("given", [{BIND: "auto"}, {BIND: "0-3|4-7"}, {BIND: "nobind"}])
def test_the_operators_own_variable_wins(given: dict[str, str], tmp_path: Path) -> None:
    shared = put(v2("0-15", "400000", 79), tmp_path, "0-15")
    environ = {**POD, **given}
    apply(environ, 1, shared)
    assert environ == {**POD, **given}


def test_the_operators_number_of_threads_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    environ = {**POD, "OMP_NUM_THREADS": "7"}
    apply(environ, 1, put(v2("0-15", "400000", 79), tmp_path, "0-15"))
    assert environ == {**POD, "OMP_NUM_THREADS": "7", BIND: "nobind"}


def test_this_machine_can_be_read() -> None:
    share = read({})
    assert share.usable
    assert share.usable <= os.sched_getaffinity(0)
    assert len(share.usable) <= share.online


def test_lists_of_processors() -> None:
    assert parse_list("0-2,7\n") == {0, 1, 2, 7}
    assert parse_list("") == frozenset()
    assert cpu_binding.parse_list("3") == {3}


def test_weights_are_those_that_container_runtimes_write() -> None:
    # 1024 shares are 39 by the old line and 100 by the new curve.
    assert cpu_binding.weights(1) == {39, 100}
