"""How many cores to compute on: topology and quota files as Linux writes them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gqa_serve.engine import cpus
from gqa_serve.engine.cpus import cpu_quota, physical_cores, usable_cores


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize("name", ["core_cpus_list", "thread_siblings_list"])
def test_hyperthreads_of_one_core_count_once(name: str, tmp_path: Path) -> None:
    for cpu, siblings in enumerate(["0,4", "1,5", "2,6", "3,7"] * 2):
        write(tmp_path / f"cpu{cpu}" / "topology" / name, siblings + "\n")
    assert physical_cores(range(8), tmp_path) == 4
    assert physical_cores([1, 5, 6], tmp_path) == 2
    assert physical_cores([3], tmp_path) == 1


def test_without_topology_each_cpu_is_a_core(tmp_path: Path) -> None:
    assert physical_cores([0, 1, 5], tmp_path) == 3
    assert physical_cores([], tmp_path) == 1


@pytest.mark.parametrize(
    ("membership", "files", "quota"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/\n", {}, None),
        # A group's own limit and those of the groups it is in: the smallest holds.
        ("0::/a/b\n", {"a/b/cpu.max": "400000 100000", "a/cpu.max": "300000 100000"}, 3.0),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "cpu.max": "50000 100000"}, 0.5),
        # The host's path, seen inside a container.
        ("0::/docker/0123\n", {"cpu.max": "200000 100000"}, 2.0),
        (
            "5:cpu,cpuacct:/x\n4:memory:/y\n0::/\n",
            {"cpu/x/cpu.cfs_quota_us": "250000\n", "cpu/x/cpu.cfs_period_us": "100000\n"},
            2.5,
        ),
        ("5:cpuacct,cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("5:cpuset:/\n", {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("0::/\n", {"cpu.max": "100000 0"}, None),
        ("nonsense\n", {"cpu.max": "100000 100000"}, None),
    ],
)
def test_quota(membership: str, files: dict[str, str], quota: float | None, tmp_path: Path) -> None:
    write(tmp_path / "membership", membership)
    (tmp_path / "cgroup").mkdir()
    for name, text in files.items():
        write(tmp_path / "cgroup" / name, text)
    write(tmp_path / "cpu.max", "1000 100000")  # above the mount: none of ours
    assert cpu_quota(tmp_path / "cgroup", tmp_path / "membership") == quota


@pytest.mark.parametrize(
    ("cores", "quota", "usable"), [(8, None, 8), (8, 2.5, 2), (8, 0.3, 1), (2, 6.0, 2), (1, None, 1)]
)
def test_usable_cores(cores: int, quota: float | None, usable: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpus, "physical_cores", lambda mask: cores)
    monkeypatch.setattr(cpus.psutil, "cpu_count", lambda logical: cores)
    monkeypatch.setattr(cpus, "cpu_quota", lambda: quota)
    assert usable_cores() == usable


def test_this_machine() -> None:
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity masks")
def test_the_affinity_mask_counts() -> None:
    mask = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(mask)})
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, mask)
