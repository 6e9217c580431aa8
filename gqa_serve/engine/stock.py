"""Taking stock: what a step did and how things stand, as the messages of `metrics.py`.

Owns the counting of what is planned and computed (`core.py` counts what goes wrong), which only looks and
changes nothing. Knows no sampling and no text. Invariant: the counts of all steps add up to those of the
scheduler.
"""

from __future__ import annotations

import time

from gqa_serve.engine.metrics import EngineSnapshot, RequestSnapshot, RequestState, StepStats
from gqa_serve.engine.request import Request
from gqa_serve.engine.scheduler import Scheduled, Scheduler


class StockTaker:
    """Fills one `StepStats` after the other."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self.stats = StepStats()
        """Of the step under way, or the last one."""
        self._num_queried_tokens = self._num_hit_tokens = self._num_preemptions = 0

    def begin(self) -> StepStats:
        """A step begins."""
        self.stats = StepStats()
        return self.stats

    def computing(self, scheduled: Scheduled) -> None:
        """Count the rows of a plan; a step may have several."""
        stats = self.stats
        stats.num_requests += len(scheduled)
        for request, row in scheduled:
            num_prompt = max(0, min(len(row.token_ids), request.num_prompt_tokens - row.start))
            stats.num_prompt_tokens += num_prompt
            stats.num_decode_tokens += len(row.token_ids) - num_prompt

    def complete(self, preparing: list[Request]) -> None:
        """The step is over; `preparing` wait outside the scheduler."""
        stats, scheduler = self.stats, self._scheduler
        stats.num_running = len(scheduler.running)
        stats.num_waiting = len(scheduler.waiting) + len(preparing)
        stats.num_waiting_tokens = scheduler.num_waiting_tokens
        stats.num_waiting_tokens += sum(request.num_prompt_tokens for request in preparing)
        stats.num_free_blocks = scheduler.kv.pool.num_free
        stats.num_cached_blocks = scheduler.kv.pool.num_cached
        stats.num_queried_tokens = scheduler.num_queried_tokens - self._num_queried_tokens
        stats.num_hit_tokens = scheduler.num_hit_tokens - self._num_hit_tokens
        stats.num_preemptions = scheduler.num_preemptions - self._num_preemptions
        self._num_queried_tokens = scheduler.num_queried_tokens
        self._num_hit_tokens = scheduler.num_hit_tokens
        self._num_preemptions = scheduler.num_preemptions

    def snapshot(self, preparing: list[Request]) -> EngineSnapshot:
        """The engine at this moment: its blocks, and its requests in the order in which they are computed."""
        scheduler, now = self._scheduler, time.monotonic()
        held: tuple[tuple[RequestState, list[Request]], ...] = (
            ("running", scheduler.running),
            ("waiting", scheduler.waiting),
            ("preparing", preparing),
        )
        return EngineSnapshot(
            scheduler.kv.pool.states(),
            [
                RequestSnapshot(
                    request.request_id,
                    state,
                    now - request.added_s,
                    request.num_prompt_tokens,
                    request.num_output_tokens,
                    request.num_computed_tokens,
                    request.num_cached_tokens,
                    len(scheduler.kv.block_ids(request.request_id)) if state == "running" else 0,
                    request.spec.priority,
                )
                for state, requests in held
                for request in requests
            ],
        )
