"""Replicas behind a router, in virtual time: who sends what when, and where it goes.

Owns arrivals (those of the trace, next turns after their thinking time, the next of a closed loop) and the
order of events. Knows no scheduler. Events happen in order of time, arrivals before what a replica does at
the same moment, so that a router which asks for loads sees those of that very moment; a replica sleeps from
event to event. Without such questions replicas are independent of each other, and are computed by several
processes.
Invariant: each job ends exactly once, and time never runs backwards.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Sequence

from gqa_serve.workbench.simulate.cost_model import CostModel
from gqa_serve.workbench.simulate.jobs import Job
from gqa_serve.workbench.simulate.routing import Routing
from gqa_serve.workbench.simulate.twin import Replica, ReplicaSpec

NOT_SENT = "not sent: the turn before it failed"
OnProgress = Callable[[int, float], None]
"""Called now and then with the number of requests that have ended, and the virtual time."""


class Fleet:
    """`replicas` of one kind behind a router. With `concurrency`, arrival times are not looked at: so many
    requests (or conversations) are under way at any time, the next beginning when one ends."""

    def __init__(
        self,
        spec: ReplicaSpec,
        cost: CostModel,
        replicas: int,
        routing: Routing,
        concurrency: int | None = None,
    ) -> None:
        self._cost = cost
        self._routing = routing
        self._concurrency = concurrency
        self._backlog: deque[Job] = deque()
        self.replicas = [Replica(spec, cost, index) for index in range(replicas)]
        self._loads = [0] * replicas
        self._events: list[tuple[float, int, int, Job | None]] = []
        self.num_ended = 0
        self.now = 0.0

    def run(self, jobs: Sequence[Job], on_progress: OnProgress | None = None) -> None:
        """Until every job has ended."""
        first = [job for job in jobs if job.request.turn == 0]
        if self._concurrency is None:
            for one in first:
                self._send(one, one.request.arrival_s)
        else:
            self._backlog.extend(first[self._concurrency :])
            for one in first[: self._concurrency]:
                self._send(one, 0.0)
        count = 0
        while self._events:
            at, _, index, job = heapq.heappop(self._events)
            if job is not None:
                self.now = at
                self._arrive(job, at)
            elif self.replicas[index].next_s == at:  # else it has been put off or brought forward
                self.now = at
                self._advance(index)
            count += 1
            if on_progress is not None and count % 512 == 0:
                on_progress(self.num_ended, self.now)
        if on_progress is not None:
            on_progress(self.num_ended, self.now)

    def _send(self, job: Job, at: float) -> None:
        job.sent_s = at
        heapq.heappush(self._events, (at + self._cost.request_s, 0, job.number, job))

    def _arrive(self, job: Job, at: float) -> None:
        index = self._routing.choose(job, self._loads)
        replica = self.replicas[index]
        before_s = replica.next_s
        if not replica.submit(job, at):
            self._after(job, at)
            return
        self._loads[index] += 1
        if replica.next_s != before_s:
            heapq.heappush(self._events, (replica.next_s, 1, index, None))

    def _advance(self, index: int) -> None:
        replica = self.replicas[index]
        now = replica.next_s
        for job in replica.advance():
            self._loads[index] -= 1
            self._after(job, now)
        if replica.next_s < math.inf:
            heapq.heappush(self._events, (replica.next_s, 1, index, None))

    def _after(self, job: Job, at: float) -> None:
        """A job ended: the next turn of its conversation, or the next of a closed loop."""
        self.num_ended += 1
        turn = job.next_turn
        if turn is not None and job.error is None:
            self._send(turn, at + turn.request.think_s)
            return
        while turn is not None:
            turn.error, turn.sent_s, turn.end_s = NOT_SENT, at, at
            self.num_ended += 1
            turn = turn.next_turn
        if self._backlog:
            self._send(self._backlog.popleft(), at)
