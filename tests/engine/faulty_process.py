"""The engine process with planted faults.

Token 100 raises, 101 ends the process, 102 slows the step, 103 hangs it, 104 needs more memory than there is
unless it is alone in its step, 105 more than there is for any step. A file named FAULT beside the weights
says what goes wrong while loading: "die", or "raise" what nobody foresaw.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from gqa_serve.config import EngineConfig
from gqa_serve.engine import model_runner, process
from gqa_serve.engine.batch import StepPlan

RAISE, DIE, SLOW, HANG, LARGE, TOO_LARGE = 100, 101, 102, 103, 104, 105


class FaultyRunner(model_runner.ModelRunner):
    def __init__(
        self,
        path: Path,
        config: EngineConfig,
        on_tensor: model_runner.OnTensor | None = None,
        **options: Any,
    ) -> None:
        fault = path / "FAULT"
        if fault.exists() and fault.read_text() == "die":
            os._exit(9)
        if fault.exists() and fault.read_text() == "raise":
            raise KeyError("planted")
        super().__init__(path, config, on_tensor, **options)

    def execute(self, plan: StepPlan, previous: torch.Tensor | None = None) -> torch.Tensor:
        # Of prompts only: the model chooses any token.
        tokens = {token for row in plan.rows if row.start == 0 for token in row.token_ids}
        if RAISE in tokens:
            raise RuntimeError("planted")
        if DIE in tokens:
            os._exit(9)
        if HANG in tokens:
            time.sleep(10_000)
        if TOO_LARGE in tokens or (LARGE in tokens and plan.num_tokens > 1):
            raise MemoryError
        if SLOW in tokens:
            time.sleep(0.2)
        return super().execute(plan, previous)


if __name__ == "__main__":
    model_runner.ModelRunner = FaultyRunner
    sys.exit(process.main(int(sys.argv[1])))
