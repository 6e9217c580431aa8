"""ForwardBatch: tokens that only the device knows are filled in there."""

from __future__ import annotations

import pytest
import torch
from fake_runner import OnDevice, on_device

from gqa_serve.engine.batch import ForwardBatch, PlanRow, StepPlan

CPU = torch.device("cpu")
PLAN = StepPlan(
    [
        PlanRow([0], 3, [2], 1, previous_row=2),
        PlanRow([7, 8, 9], 0, [0], 1),
        PlanRow([0], 4, [1, 3], 1, previous_row=0),
        PlanRow([0], 1, [4], 1, previous_row=1),
    ]
)


def test_the_last_token_of_a_row_comes_from_the_step_before() -> None:
    previous = on_device(torch.tensor([50, -1, 52]))
    batch = ForwardBatch.from_plan(PLAN, 4, CPU, previous)
    assert not isinstance(batch.token_ids, OnDevice)
    # -1, no token, must not reach an embedding table
    assert batch.token_ids.tolist() == [52, 7, 8, 9, 50, 0]
    assert batch.positions.tolist() == [3, 0, 1, 2, 4, 1]
    assert batch.slots.tolist() == [11, 0, 1, 2, 12, 17]
    assert batch.logit_rows.tolist() == [0, 3, 4, 5]


def test_a_plan_that_continues_needs_the_step_before() -> None:
    with pytest.raises(ValueError, match="were not given"):
        ForwardBatch.from_plan(PLAN, 4, CPU)
