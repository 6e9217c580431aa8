"""The engine process with planted faults: token 100 raises, 101 ends the process, 102 slows the step."""

from __future__ import annotations

import os
import sys
import time

import torch

from gqa_serve.engine import model_runner, process
from gqa_serve.engine.batch import StepPlan

RAISE, DIE, SLOW = 100, 101, 102


class FaultyRunner(model_runner.ModelRunner):
    def execute(self, plan: StepPlan, previous: torch.Tensor | None = None) -> torch.Tensor:
        tokens = {token for row in plan.rows for token in row.token_ids}
        if RAISE in tokens:
            raise RuntimeError("planted")
        if DIE in tokens:
            os._exit(9)
        if SLOW in tokens:
            time.sleep(0.2)
        return super().execute(plan, previous)


if __name__ == "__main__":
    model_runner.ModelRunner = FaultyRunner
    sys.exit(process.main(int(sys.argv[1])))
