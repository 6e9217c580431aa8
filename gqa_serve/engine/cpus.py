"""How many cores this process should compute on.

Owns reading the affinity mask, the cores' topology and a container's CPU quota (cgroup v2, v1). Knows no
torch.
Invariant: at least 1, and never more than the machine has: one thread per physical core, because two
hyperthreads share the units that multiply, and none beyond the quota, because a container that exceeds it is
stopped for the rest of each period, threads that others wait for included.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import psutil

_TOPOLOGY = Path("/sys/devices/system/cpu")
_CGROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


def usable_cores() -> int:
    """Physical cores in this process's affinity mask, at most the whole cores of its CPU quota."""
    if hasattr(os, "sched_getaffinity"):
        cores = physical_cores(os.sched_getaffinity(0))
    else:
        cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    quota = cpu_quota()
    return cores if quota is None else max(1, min(cores, int(quota)))


def physical_cores(cpus: Iterable[int], topology: Path = _TOPOLOGY) -> int:
    """How many cores the logical CPUs belong to; one each where the system does not say."""
    cores = set()
    for cpu in cpus:
        folder = topology / f"cpu{cpu}" / "topology"
        # The first is the name since Linux 5.4 of the second.
        siblings = _text(folder / "core_cpus_list") or _text(folder / "thread_siblings_list")
        cores.add(siblings or f"cpu {cpu}")
    return max(1, len(cores))


def cpu_quota(cgroups: Path = _CGROUPS, membership: Path = _MEMBERSHIP) -> float | None:
    """Cores' worth of CPU time that this process's control groups allow it, None without a limit."""
    quotas: list[float | None] = []
    for line in _text(membership).splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if hierarchy == "0":  # v2: one hierarchy, "0::/path"
            limits = [_text(group / "cpu.max").partition(" ") for group in _with_ancestors(cgroups, path)]
            quotas += [_ratio(quota, period) for quota, _, period in limits]
        elif "cpu" in controllers.split(","):
            groups = [g for mount in ("cpu", "cpu,cpuacct") for g in _with_ancestors(cgroups / mount, path)]
            quotas += [_ratio(_text(g / "cpu.cfs_quota_us"), _text(g / "cpu.cfs_period_us")) for g in groups]
    return min((quota for quota in quotas if quota is not None), default=None)


def _with_ancestors(root: Path, path: str) -> list[Path]:
    """The folders of a group and of those it is in. Inside a container, `path` may be the host's, whose
    folders do not exist here; the root is the container's own group then."""
    inside = root / path.strip("/")
    return [group for group in (inside, *inside.parents) if group == root or root in group.parents]


def _ratio(quota: str, period: str) -> float | None:
    """quota / period, None for "max", "-1" and what cannot be read."""
    if not (quota.isdecimal() and period.isdecimal() and int(period) > 0):
        return None
    return int(quota) / int(period)


def _text(path: Path) -> str:
    """The file's text, empty if it cannot be read."""
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""
