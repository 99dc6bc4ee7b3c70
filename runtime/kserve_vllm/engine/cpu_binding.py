"""Whether vLLM binds its worker's threads to processors, where the engine computes on processors.

vLLM binds by default, to processors that it picks by itself: two pods of one node pick the same ones, and each step of
either waits for the other. That is right only where no one else runs on them. Which it is follows from the container's
control group: the processors that it may use (cpuset), and how much of their time (quota).

Kubernetes gives a container processors of its own where the kubelet's CPU manager is static and the pod is Guaranteed
with whole numbers: then its cpuset is smaller than the machine, and it asks for just as many processors.
Sources: the kernel's cgroup-v1/cpusets, sched-bwc and cgroup-v2 documents; Kubernetes, "Control CPU Management Policies
on the Node".
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Callable, Collection, MutableMapping
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

BIND = "VLLM_CPU_OMP_THREADS_BIND"
_THREADS = "OMP_NUM_THREADS"
_SHARES_EACH = 1024  # what Kubernetes and Docker write for one processor
_ROUNDING = 1e-6


@dataclass(frozen=True)
class CPUShare:
    """What a container may use of the machine's processors.

    Attributes:
        usable: numbers of the processors that it may run on.
        online: how many the machine has.
        quota: processors' worth of time that it may use; None where that is not bounded.
        asked_for: whether its weight is the one of a container that asks for so many processors.
        kubernetes: whether it runs in a pod, so beside others.
    """

    usable: frozenset[int]
    online: int
    quota: float | None
    asked_for: Callable[[int], bool]
    kubernetes: bool


@dataclass(frozen=True)
class Binding:
    """What is done, and why.

    Attributes:
        bind: whether vLLM binds its threads.
        threads: how many it starts where it does not bind; None for one a processor, as OpenMP does.
        why: a sentence's part, for the log.
    """

    bind: bool
    threads: int | None
    why: str


def decide(share: CPUShare, ranks: int = 1) -> Binding:
    """Whether to bind.

    Args:
        share: what the container may use.
        ranks: workers that compute beside each other (tensor and pipeline parallel).
    """
    count = len(share.usable)
    if share.quota is not None and share.quota < count - _ROUNDING:
        # As vLLM does where it binds: a processor a rank is left to what schedules.
        threads = max(1, (math.floor(share.quota + _ROUNDING) - ranks) // ranks)
        return Binding(False, threads, f"its quota is {share.quota:g} of the {count} processors that it may run on")
    if not share.kubernetes:
        return Binding(True, None, f"all {count} processors that it may run on are its own")
    if count >= share.online:
        return Binding(False, None, f"every pod of the node may run on its {count} processors")
    if share.quota is not None or share.asked_for(count):
        return Binding(True, None, f"it has {count} of the node's {share.online} processors to itself")
    return Binding(False, None, f"other pods may run on its {count} of the node's {share.online} processors too")


def apply(environ: MutableMapping[str, str], ranks: int, root: Path = Path("/")) -> None:
    """Decide, and tell vLLM and OpenMP through their variables. What the operator has set stays.

    To be called before the engine's processes start.
    """
    if BIND in environ:
        return
    decision = decide(read(environ, root), ranks)
    if decision.bind:
        log.info("vLLM binds its threads to processors: %s (%s)", decision.why, BIND)
        return
    environ[BIND] = "nobind"
    if decision.threads is not None:
        environ.setdefault(_THREADS, str(decision.threads))
    log.info(
        "threads are not bound to processors: %s; %s a worker (set %s to have it otherwise)",
        decision.why,
        f"{environ[_THREADS]} threads" if _THREADS in environ else "a thread a processor for",
        BIND,
    )


def read(
    environ: MutableMapping[str, str], root: Path = Path("/"), affinity: Collection[int] | None = None
) -> CPUShare:
    """Read the control groups of this process, of version 1 or 2. What can't be read bounds nothing.

    Args:
        environ: tells of Kubernetes.
        root: where `proc` and `sys` lie.
        affinity: processors that the scheduler lets this process run on; asked for by default.
    """
    groups = _own_groups(root / "proc/self/cgroup")
    usable = frozenset(os.sched_getaffinity(0) if affinity is None else affinity)
    mount = root / "sys/fs/cgroup"
    two = (mount / "cgroup.controllers").exists()
    if two:
        folders = _folders(mount, groups.get("", "/"))
        cpus = _first(folders[:1], "cpuset.cpus.effective")
        quota = min((q for f in folders if (q := _quota_v2(f / "cpu.max")) is not None), default=None)
        weight = _number(folders[0] / "cpu.weight")
        asked_for = lambda count: weight is not None and weight in weights(count)  # noqa: E731
    else:
        cpu = _folders(_mounted(mount, "cpu"), groups.get("cpu", "/"))
        sets = _folders(mount / "cpuset", groups.get("cpuset", "/"))
        cpus = _first(sets[:1], "cpuset.effective_cpus") or _first(sets[:1], "cpuset.cpus")
        quota = min((q for f in cpu if (q := _quota_v1(f)) is not None), default=None)
        shares = _number(cpu[0] / "cpu.shares")
        asked_for = lambda count: shares == _SHARES_EACH * count  # noqa: E731
    if cpus:
        usable = usable & parse_list(cpus) or usable
    online = parse_list(_text(root / "sys/devices/system/cpu/online") or "") or usable
    pods = "KUBERNETES_SERVICE_HOST" in environ or any("kubepods" in path for path in groups.values())
    return CPUShare(usable, len(online), quota, asked_for, pods)


def parse_list(text: str) -> frozenset[int]:
    """The kernel's lists of processors: `0-2,7` is 0, 1, 2 and 7."""
    found: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        with contextlib.suppress(ValueError):
            found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)


def weights(count: int) -> set[int]:
    """What container runtimes write as `cpu.weight` for so many processors: by the straight line of old, and by the
    curve of runc 1.3.2 and crun 1.23 on (opencontainers/cgroups, `ConvertCPUSharesToCgroupV2Value`)."""
    shares = _SHARES_EACH * count
    line = 1 + (shares - 2) * 9999 // 262142
    exponent = math.log2(shares)
    curve = math.ceil(10 ** ((exponent * exponent + 125 * exponent) / 612 - 7 / 34))
    return {line, curve}


def _own_groups(file: Path) -> dict[str, str]:
    """This process's group in each hierarchy, by controller; the one of version 2 has no name."""
    found = {}
    for line in (_text(file) or "").splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        found.update(dict.fromkeys(controllers.split(","), path))
    return found


def _mounted(mount: Path, controller: str) -> Path:
    """The folder of a hierarchy of version 1, which may have several controllers (`cpu,cpuacct`)."""
    joined = (each for each in sorted(mount.glob(f"*{controller}*")) if controller in each.name.split(","))
    return mount / controller if (mount / controller).is_dir() else next(joined, mount / controller)


def _folders(mount: Path, path: str) -> list[Path]:
    """A group's folder and those above it. In a container the path may be the one outside; its own group is the root
    then."""
    own = mount / path.strip("/")
    if not own.is_dir():
        own = mount
    return [own, *(each for each in own.parents if each.is_relative_to(mount))]


def _quota_v2(file: Path) -> float | None:
    words = (_text(file) or "max").split()
    if len(words) != 2 or words[0] == "max":
        return None
    return int(words[0]) / int(words[1])


def _quota_v1(folder: Path) -> float | None:
    quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
    return quota / period if quota is not None and quota > 0 and period else None


def _first(folders: list[Path], name: str) -> str | None:
    return next((text for folder in folders if (text := _text(folder / name))), None)


def _number(file: Path) -> int | None:
    text = _text(file)
    return int(text) if text and text.lstrip("-").isdigit() else None


def _text(file: Path) -> str | None:
    with contextlib.suppress(OSError):
        return file.read_text().strip()
    return None
