"""From a step plan (ints) to a forward batch (flat tensors).

Owns the two shapes of one step's work: `StepPlan`, which the scheduler makes and which can be sent to
another rank as it is, and `ForwardBatch`, which the model reads. Knows nothing of requests: a plan row
carries everything a rank needs, so ranks keep no request state.
Invariant: tokens of one row are contiguous, rows keep the plan's order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
import numpy as np

if TYPE_CHECKING:
    import torch


class PlanRow(msgspec.Struct, array_like=True):
    """One request's share of a step.

    `token_ids` are the new tokens, at positions `start` .. `start + len(token_ids) - 1`; `block_ids` covers
    at least all positions up to the last new one. Logits are needed for the last `num_logits` new tokens:
    0 in the middle of a prompt, 1 to sample, more to score a prompt or to take the mean of its hidden states.

    `previous_row` >= 0: the last new token was chosen by the step before and its value is known on the device
    alone. It is that row of what that step sampled; its entry in `token_ids` is 0.
    """

    token_ids: list[int]
    start: int
    block_ids: list[int]
    num_logits: int
    previous_row: int = -1


class StepPlan(msgspec.Struct, array_like=True):
    """What one step computes: rows of requests, in order."""

    rows: list[PlanRow]

    @property
    def num_tokens(self) -> int:
        """T: new tokens of the step."""
        return sum(len(row.token_ids) for row in self.rows)


@dataclass
class ForwardBatch:
    """One step as the model sees it: T new tokens of B requests, flat.

    token_ids, positions, slots: [T] int64. The token's K and V are written to `slots`
    (block_id * block_size + offset). block_tables: [B, max_blocks] int64, padded with 0.
    logit_rows: [R] int64, the rows of T whose logits are needed. `query_lens[b]` new tokens,
    `context_lens[b]` computed + new.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    block_tables: torch.Tensor
    logit_rows: torch.Tensor
    query_lens: list[int]
    context_lens: list[int]

    @classmethod
    def from_plan(
        cls,
        plan: StepPlan,
        block_size: int,
        device: torch.device,
        previous: torch.Tensor | None = None,
    ) -> ForwardBatch:
        """Lay the plan's rows out flat on `device`, without waiting for it.

        `previous`: the tokens that the step before sampled, on `device`; rows with a `previous_row` need it.
        """
        from gqa_serve.engine.transfer import all_to_device

        rows = plan.rows
        query_lens = [len(row.token_ids) for row in rows]
        context_lens = [row.start + len(row.token_ids) for row in rows]
        total = sum(query_lens)
        token_ids = np.empty(total, np.int64)
        positions = np.empty(total, np.int64)
        slots = np.empty(total, np.int64)
        width = max(-(-context // block_size) for context in context_lens)
        block_tables = np.zeros((len(rows), width), np.int64)
        logit_rows: list[int] = []
        unknown: list[tuple[int, int]] = []
        end = 0
        for index, row in enumerate(rows):
            begin, end = end, end + query_lens[index]
            used = -(-context_lens[index] // block_size)
            block_tables[index, :used] = row.block_ids[:used]
            token_ids[begin:end] = row.token_ids
            position = np.arange(row.start, context_lens[index])
            positions[begin:end] = position
            block, offset = np.divmod(position, block_size)
            slots[begin:end] = block_tables[index, block] * block_size + offset
            logit_rows.extend(range(end - row.num_logits, end))
            if row.previous_row >= 0:
                unknown.append((end - 1, row.previous_row))

        tensors = all_to_device(
            [token_ids, positions, slots, block_tables, np.array(logit_rows, np.int64)], device
        )
        if unknown:
            if previous is None:
                raise ValueError("A row continues from the step before, whose tokens were not given.")
            fill_in(tensors[0], previous, unknown)
        return cls(
            token_ids=tensors[0],
            positions=tensors[1],
            slots=tensors[2],
            block_tables=tensors[3],
            logit_rows=tensors[4],
            query_lens=query_lens,
            context_lens=context_lens,
        )


def fill_in(token_ids: torch.Tensor, previous: torch.Tensor, unknown: Sequence[tuple[int, int]]) -> None:
    """token_ids[place] = previous[row] for each (place, row), on the device. token_ids [T], previous [R].

    A row of `previous` that has no token holds -1, which no embedding table has; it becomes 0, and what is
    computed from it is dropped when the host learns of it.
    """
    from gqa_serve.engine.transfer import to_device

    index = to_device(np.asarray(unknown, np.int64), token_ids.device)  # [n, 2]
    token_ids[index[:, 0]] = previous[index[:, 1]].clamp(min=0).to(token_ids.dtype)
