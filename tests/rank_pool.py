"""Tensor-parallel ranks for tests: processes that meet once and then run one task after the other.

A task is a function of a module that the processes can import. Every rank calls it with its `RankGroup` and
the arguments; what the ranks return comes back as a list.
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

TIMEOUT_S = 240


def _work(rank: int, size: int, meeting: str, paths: list[str], orders: Connection) -> None:
    sys.path[:] = paths
    import torch

    from gqa_serve.config import adopt_loopback
    from gqa_serve.engine.distributed.group import RankGroup

    torch.set_num_threads(1)
    adopt_loopback()
    group = RankGroup(Path(meeting), rank, size, torch.device("cpu"), exact=True)
    while True:
        try:
            task, args = orders.recv()
        except EOFError:
            break
        try:
            orders.send((task(group, *args), None))
        except Exception:
            orders.send((None, traceback.format_exc()))
    group.close()


class RankPool:
    """`size` ranks on one thread each. A task that fails on one rank alone leaves the others waiting."""

    def __init__(self, size: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        meeting = str(Path(self._folder.name) / "ranks")
        self._lines: list[Connection] = []
        self._processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(rank, size, meeting, sys.path, theirs), daemon=True)
            process.start()
            theirs.close()
            self._lines.append(ours)
            self._processes.append(process)

    def run(self, task: Callable[..., Any], *args: Any) -> list[Any]:
        """What task(group, *args) returned on each rank; RuntimeError with the trace of one that failed."""
        for line in self._lines:
            line.send((task, args))
        results = []
        for rank, line in enumerate(self._lines):
            if not line.poll(TIMEOUT_S):
                raise TimeoutError(f"rank {rank} did not answer")
            result, failure = line.recv()
            if failure is not None:
                raise RuntimeError(f"rank {rank}: {failure}")
            results.append(result)
        return results

    def close(self) -> None:
        for line in self._lines:
            line.close()
        for process in self._processes:
            process.join(20)
            process.kill()
            process.join()
        self._folder.cleanup()
