"""How many CPUs this process may use at once, and how many threads a step should have: affinity, cgroups, cores."""

from __future__ import annotations

import math
import os
from pathlib import Path


def usable_cpus(root: Path = Path("/")) -> int:
    """The least of the CPUs of our affinity and the quota of our cgroup (rounded up): more never run at once."""
    return max(1, math.ceil(min(len(os.sched_getaffinity(0)), _quota(root))))


def usable_threads(root: Path = Path("/")) -> int:
    """Threads worth having: one a physical core, and no more than usable_cpus(). `root` is for tests."""
    return min(usable_cpus(root), _cores(root, os.sched_getaffinity(0)))


def _cores(root: Path, cpus: set[int]) -> int:
    """Physical cores among `cpus`. CPUs whose topology is not told count as one each."""
    cores: set[str] = set()
    for cpu in cpus:
        topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        siblings = _read(topology / "core_cpus_list") or _read(topology / "thread_siblings_list")
        cores.add(siblings or f"cpu{cpu}")
    return len(cores)


def _quota(root: Path) -> float:
    """CPUs that the cgroups above us allow; infinite where none limits. Version 2 and 1."""
    quotas = [math.inf]
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            quotas += _quotas_v2(root / "sys/fs/cgroup", path)
        elif "cpu" in controllers.split(","):
            quotas += _quotas_v1(root / "sys/fs/cgroup" / "cpu", path)
    return min(quotas)


def _quotas_v2(mount: Path, path: str) -> list[float]:
    quotas = []
    for directory in _upward(mount, path):
        words = _read(directory / "cpu.max").split()
        if len(words) == 2 and words[0] != "max":
            quotas.append(int(words[0]) / int(words[1]))
    return quotas


def _quotas_v1(mount: Path, path: str) -> list[float]:
    quotas = []
    for directory in _upward(mount, path):
        quota, period = _read(directory / "cpu.cfs_quota_us"), _read(directory / "cpu.cfs_period_us")
        if quota and period and int(quota) > 0:
            quotas.append(int(quota) / int(period))
    return quotas


def _upward(mount: Path, path: str) -> list[Path]:
    """The directories of a cgroup and of all above it. In a container its path may lie outside of what is mounted."""
    inside = Path(path.lstrip("/"))
    return [mount / inside, *(mount / parent for parent in inside.parents)]


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
