"""RankGroup, where it depends on the kind of device."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from gqa_serve.engine.distributed.group import RankGroup


def test_a_gpu_leaves_without_waiting_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """`destroy_process_group` waits in NCCL until the sums under way have ended: not if a rank is dead."""
    called = []
    monkeypatch.setattr(dist, "destroy_process_group", lambda: called.append("destroy"))
    monkeypatch.setattr(distributed_c10d, "_abort_process_group", lambda: called.append("abort"))
    group = RankGroup.__new__(RankGroup)
    for kind in ("cuda", "cpu"):
        group.device = torch.device(kind)
        group.close()
    assert called == ["abort", "destroy"]
