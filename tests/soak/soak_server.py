"""The server of a soak: gqa-serve, with an engine process that fails when a signal tells it to.

`python soak_server.py FLAGS` is `gqa-serve FLAGS`. SIGUSR1 to its engine process makes the next step raise,
SIGUSR2 makes it run out of memory. To be killed or to hang (SIGSTOP), a process needs nothing planted.
"""

from __future__ import annotations

import signal
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import FrameType

PLANTED = {
    "exception": (signal.SIGUSR1, RuntimeError("planted")),
    "out of memory": (signal.SIGUSR2, MemoryError("planted")),
}


def run_engine(fd: int) -> int:
    """The engine process."""
    import torch

    from gqa_serve.engine import model_runner, process
    from gqa_serve.engine.batch import StepPlan

    planted: list[Exception] = []

    class FaultyRunner(model_runner.ModelRunner):
        def execute(self, plan: StepPlan, previous: torch.Tensor | None = None) -> torch.Tensor:
            if planted:
                raise planted.pop()
            return super().execute(plan, previous)

    def plant(number: int, frame: FrameType | None) -> None:
        planted[:] = [error for known, error in PLANTED.values() if known == number]

    for number, _ in PLANTED.values():
        signal.signal(number, plant)
    model_runner.ModelRunner = FaultyRunner  # type: ignore[misc]
    return process.main(fd)


if __name__ == "__main__":
    if sys.argv[1] == "engine":
        sys.exit(run_engine(int(sys.argv[2])))
    from gqa_serve.cli import main
    from gqa_serve.engine.client import AsyncEngine

    AsyncEngine.command = (sys.executable, __file__, "engine")
    sys.exit(main(sys.argv[1:]))
