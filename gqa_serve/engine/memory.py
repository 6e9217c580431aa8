"""How much memory there is, and how much of it the KV cache may take.

Owns the shares, for the engine that allocates the cache and for the tools that say beforehand what will fit.
Knows no model and no torch: what a GPU has is told by whoever asked it.
"""

from __future__ import annotations

from pathlib import Path

import psutil

# What the KV cache may take of a CPU's free memory, which is shared with everything else on the machine,
# where --kv-cache-memory does not say. Of a GPU's, --gpu-memory-utilization decides.
_CPU_MEMORY_SHARE = 0.5
_CPU_KV_CACHE = 4 * 2**30  # unless one request of the longest context needs more


def cpu_kv_budget(free: float, request_bytes: float) -> int:
    """Bytes for the KV cache on a CPU with so many free, where the longest request takes `request_bytes`."""
    return int(min(free * _CPU_MEMORY_SHARE, max(_CPU_KV_CACHE, request_bytes)))


def gpu_kv_budget(total: float, in_use: float, utilization: float) -> int:
    """Bytes for the KV cache on a GPU, 0 or fewer if there are none: its share less what is in use."""
    return int(total * utilization) - int(in_use)


def machine_memory() -> int:
    """Bytes that this machine, or this container, has."""
    return min(psutil.virtual_memory().total, *(limit for limit, _ in _cgroup_limits()))


def free_machine_memory() -> int:
    """Bytes free on this machine, or in this container."""
    return min(psutil.virtual_memory().available, *(max(0, limit - used) for limit, used in _cgroup_limits()))


def _cgroup_limits() -> list[tuple[int, int]]:
    """A container's memory limits (cgroup v2, then v1) and what is used of them; psutil does not see them."""
    found = [(2**63 - 1, 0)]
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        if Path(limit).exists() and Path(used).exists():
            text = Path(limit).read_text().strip()
            if text != "max":
                found.append((int(text), int(Path(used).read_text())))
    return found


def format_bytes(count: float) -> str:
    """512.0 MiB"""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
