"""What becomes of a step's hidden states: rows to choose tokens from, prompt scores, pooled states.

Owns which row of `hidden` [R, E] belongs to whom: each plan row brings its last `num_logits` tokens, in turn.
Only tells the device what to do. Knows no blocks and no ends.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from gqa_serve.engine.batch import PlanRow
from gqa_serve.engine.request import Request
from gqa_serve.engine.sampler import SCORING_ROWS, PendingScores, PendingStates, Sampler
from gqa_serve.engine.scheduler import Scheduled

if TYPE_CHECKING:
    import torch


class PromptScores(NamedTuple):
    """Log-probabilities of prompt tokens whose predecessors `row` computes, in parts."""

    request: Request
    row: PlanRow
    parts: list[PendingScores]


class PooledStates(NamedTuple):
    """Hidden states of `row`, to be pooled."""

    request: Request
    row: PlanRow
    states: PendingStates


def last_rows(scheduled: Scheduled) -> list[tuple[Request, int]]:
    """Requests that caught up in this step, with the row of `hidden` that predicts their next token."""
    result, end = [], 0
    for request, row in scheduled:
        end += row.num_logits
        if row.start + len(row.token_ids) == request.num_tokens:
            result.append((request, end - 1))
    return result


def score_prompts(
    scheduled: Scheduled,
    hidden: torch.Tensor,
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    sampler: Sampler,
) -> list[PromptScores]:
    """Log-probabilities of the prompt tokens whose predecessors this step computes."""
    result = []
    begin = 0
    for request, row in scheduled:
        if request.scores_prompt and row.start < request.num_prompt_tokens:
            prompt = request.tokens[: request.num_prompt_tokens]
            targets = prompt[row.start + 1 : row.start + 1 + len(row.token_ids)]
            parts = []
            for first in range(0, len(targets), SCORING_ROWS):
                part = targets[first : first + SCORING_ROWS]
                logits = logits_of(hidden[begin + first : begin + first + len(part)])
                parts.append(sampler.score(logits, part, request.params.prompt_logprobs or 0))
            result.append(PromptScores(request, row, parts))
        begin += row.num_logits
    return result


def fetch_states(scheduled: Scheduled, hidden: torch.Tensor, sampler: Sampler) -> list[PooledStates]:
    """The hidden states that this step computes for requests with `pooling`."""
    result, end = [], 0
    for request, row in scheduled:
        begin, end = end, end + row.num_logits
        if request.spec.pooling is not None and row.num_logits:
            result.append(PooledStates(request, row, sampler.states(hidden[begin:end])))
    return result
