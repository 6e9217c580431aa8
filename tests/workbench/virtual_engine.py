"""The real Engine over the fake runner, in virtual time: what the twin is compared with.

A plan takes what a cost model says. With lookahead the runner's device works on its own, and collecting a
step waits for it; the loop around the engine is that of `engine/process.py`.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from gqa_serve.engine import core
from gqa_serve.engine.batch import StepPlan
from gqa_serve.engine.scheduler import Scheduled, Scheduler
from gqa_serve.workbench.simulate.cost_model import Chunk
from gqa_serve.workbench.simulate.jobs import Job
from tests.engine.fake_runner import FakeRunner, assert_conserved, make_engine, request

Plan = list[tuple[str, int, int, int, int]]
"""(request id, start, new tokens, blocks, rows of logits) of each row."""


class DyadicCost:
    """Linear, in multiples of 1/4096 s, so that sums of floats are exact in any order."""

    request_s = 0.0

    def step_seconds(self, contexts: Any, chunks: Any, num_sampled: int) -> float:
        tokens = sum(query_len for query_len, _ in chunks)
        return (40 + 3 * len(contexts) + sum(contexts) + 16 * tokens + num_sampled) / 4096

    def decode_seconds(self, contexts: Any, num_steps: int) -> list[float]:
        lens = [[length + step for length in contexts] for step in range(num_steps)]
        return [self.step_seconds(now, [], len(now)) for now in lens]

    def to_json(self) -> dict[str, Any]:
        return {}


@dataclass
class Log:
    """What a scheduler decided, step by step, and when each request got its tokens."""

    plans: list[Plan] = field(default_factory=list)
    free: list[int] = field(default_factory=list)
    times: dict[str, list[float]] = field(default_factory=dict)
    preemptions: int = 0
    queried: int = 0
    hits: int = 0

    def watch(self, scheduler: Scheduler) -> None:
        """Note everything that `scheduler` plans from now on."""
        schedule = scheduler.schedule

        def noted() -> Scheduled:
            scheduled = schedule()
            self.plans.append(
                [
                    (r.request_id, row.start, len(row.token_ids), len(row.block_ids), row.num_logits)
                    for r, row in scheduled
                ]
            )
            self.free.append(scheduler.kv.pool.num_free)
            return scheduled

        scheduler.schedule = noted  # type: ignore[method-assign]

    def close(self, scheduler: Scheduler) -> None:
        """The run is over."""
        self.preemptions = scheduler.num_preemptions
        self.queried, self.hits = scheduler.num_queried_tokens, scheduler.num_hit_tokens


class VirtualEngine:
    """An engine of `make_engine` with a clock of its own."""

    def __init__(self, lookahead: bool, cost: DyadicCost, **settings: Any) -> None:
        self.now = 0.0
        self._device_s = 0.0
        self._done: deque[float] = deque()
        self._cost = cost
        self._lookahead = lookahead
        self.engine = make_engine(lookahead, on_execute=self._execute, on_collect=self._collect, **settings)
        self.log = Log()
        self.log.watch(self.engine.scheduler)

    def _execute(self, plan: StepPlan) -> None:
        contexts = [row.start + 1 for row in plan.rows if len(row.token_ids) == 1]
        chunks: list[Chunk] = [
            (len(row.token_ids), row.start + len(row.token_ids))
            for row in plan.rows
            if len(row.token_ids) > 1
        ]
        seconds = self._cost.step_seconds(contexts, chunks, sum(row.num_logits for row in plan.rows))
        self._device_s = max(self.now, self._device_s) + seconds
        self._done.append(self._device_s)
        if not self._lookahead:
            self.now = self._device_s

    def _collect(self) -> None:
        self.now = max(self.now, self._done.popleft())

    def run(self, jobs: list[Job], monkeypatch: pytest.MonkeyPatch) -> Log:
        """Serve the jobs as the trace says; answers are the model's own."""
        clock = SimpleNamespace(perf_counter=lambda: self.now, monotonic=lambda: self.now)
        monkeypatch.setattr(core, "time", clock)
        arrivals: list[tuple[float, int, Job, list[int]]] = [
            (job.request.arrival_s, job.number, job, []) for job in jobs if job.request.turn == 0
        ]
        heapq.heapify(arrivals)
        prompts: dict[str, list[int]] = {}
        while arrivals or self.engine.has_work:
            if not self.engine.has_work:
                self.now = max(self.now, arrivals[0][0])
            while arrivals and arrivals[0][0] <= self.now:
                _, number, job, before = heapq.heappop(arrivals)
                tokens = job.tokens()
                # Pieces are numbers; the fake's vocabulary is small, and 3 ends a sequence.
                prompt = before + [5 + token % 90 for token in tokens[len(before) :]]
                prompts[str(number)] = prompt
                self.log.times[str(number)] = []
                self.engine.add(request(str(number), prompt, max_tokens=job.request.output_tokens))
            for output in self.engine.step():
                own = prompts[output.request_id]
                own += output.token_ids
                self.log.times[output.request_id].append(self.now)
                job = jobs[int(output.request_id)]
                if output.finish_reason is not None and job.next_turn is not None:
                    turn = job.next_turn
                    heapq.heappush(arrivals, (self.now + turn.request.think_s, turn.number, turn, own))
        assert_conserved(self.engine)
        assert isinstance(self.engine.runner, FakeRunner)
        self.log.close(self.engine.scheduler)
        return self.log
