"""One replica in virtual time: the engine's scheduler, KV manager and prefix cache over a cost model.

Owns the clock of a replica and the order in which things happen, which is that of `engine/core.py` and
`engine/process.py`: read the inbox, schedule, launch, collect. Where the device works on its own
(`lookahead`) a step is collected after the next has been launched; else at once, and `Pace` bounds what goes
beside answers. Who may queue is `engine/admission.py`'s. Knows no fleet and no report.

    advance()   at `next_s`: what was under way is done; hand out its tokens, then begin the next
                               |                                      |
                          collect, ends                read the inbox, schedule, launch

Steps in which every running request computes one token, nobody ends and nobody can be admitted are computed
together (`_Window`): the same blocks are allocated and published in the same order, and the same times come
out, without asking the scheduler what it would decide.
Invariant: the decisions are the engine's for the same arrivals and the same seconds per step (tested against
it), and what happens at a time depends on nothing later.
"""

from __future__ import annotations

import bisect
import math
from collections import deque
from dataclasses import dataclass

import numpy as np

from gqa_serve.engine.admission import Admission
from gqa_serve.engine.batch import PlanRow
from gqa_serve.engine.block_pool import BlockPool
from gqa_serve.engine.kv_manager import KVManager
from gqa_serve.engine.pace import Pace
from gqa_serve.engine.request import EngineRequest, Request, SamplingParams
from gqa_serve.engine.scheduler import Scheduled, Scheduler, SchedulerLimits
from gqa_serve.errors import QueueFullError
from gqa_serve.workbench.simulate.cost_model import CostModel
from gqa_serve.workbench.simulate.jobs import Job
from gqa_serve.workbench.simulate.timeline import Timeline

_LONGEST_WINDOW = 256  # steps
QUEUE_FULL = "the queue is full (429)"
TOO_LONG = "longer than the context (400)"


@dataclass(frozen=True, kw_only=True)
class ReplicaSpec:
    """The settings of a replica, by the names of EngineConfig, and what follows from its memory."""

    num_blocks: int
    block_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_waiting: int
    max_waiting_tokens: int
    prefix_caching: bool
    lookahead: bool


@dataclass
class Counts:
    """What a replica did, or several together."""

    num_steps: int = 0
    num_rows: int = 0
    num_computed_tokens: int = 0
    num_preemptions: int = 0
    num_queried_tokens: int = 0
    num_hit_tokens: int = 0
    busy_s: float = 0.0

    def add(self, other: Counts) -> None:
        """Add another's numbers to these."""
        for name in self.__dataclass_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


class _JobRequest(Request):
    """A request of the engine that knows its job."""

    job: Job


@dataclass
class _Step:
    """A step in flight: its rows, who gets a token, when the device is done."""

    scheduled: Scheduled
    sampling: list[_JobRequest]
    done_s: float


@dataclass
class _Window:
    """Decode steps computed together from `began_s`: `times` when each is over for the host, `done` for the
    device, which takes `costs`. Only the first `num_steps` will be."""

    num_steps: int
    began_s: float
    times: list[float]
    done: list[float]
    costs: list[float]


class Replica:
    """One engine, `index` of a fleet. With `windows` False the scheduler is asked for every step."""

    def __init__(self, spec: ReplicaSpec, cost: CostModel, index: int = 0, *, windows: bool = True) -> None:
        self.spec = spec
        self.index = index
        self._cost = cost
        self._windows = windows
        self._pace = None if spec.lookahead else Pace()
        self.kv = KVManager(BlockPool(spec.num_blocks, spec.block_size))
        limits = SchedulerLimits(spec.max_num_seqs, spec.max_num_batched_tokens)
        self.scheduler = Scheduler(self.kv, limits, prefix_caching=spec.prefix_caching, pace=self._pace)
        self._admission = Admission(
            spec.max_num_seqs + spec.max_waiting, spec.max_waiting_tokens, clock=lambda: 0.0
        )  # nobody reads its Retry-After
        self._inbox: deque[tuple[float, _JobRequest]] = deque()
        self._params: dict[int, SamplingParams] = {}
        self._num_added = 0
        self.now = 0.0
        self.next_s = math.inf
        """When something happens here next: infinite while there is nothing to do."""
        self.num_requests = 0
        """Requests taken that have not ended: what a router sees as load."""
        self._in_flight: deque[_Step] = deque()
        self._num_collect = 0  # steps that are over at `next_s`
        self._device_free_s = 0.0
        self._window: _Window | None = None
        self._last_is_decode = False  # the last step launched continued answers by a token each and did no
        self._last_is_whole = False  # other work; and it computed all that were running then
        self._blocked = False  # whoever waits first does not fit, and nothing has changed since
        self._preempted: set[Request] = set()  # and not computed since
        self.timeline = Timeline()
        self.num_steps = self.num_rows = 0
        self.num_computed_tokens = 0
        self.busy_s = 0.0

    def submit(self, job: Job, at: float) -> bool:
        """A request arrives; False if it is refused, which its job then says. Times must not fall."""
        request = job.request
        room = self.spec.max_model_len - request.prompt_tokens
        job.replica = self.index
        if room < 1:
            job.error, job.end_s = TOO_LONG, at
            return False
        tokens = min(request.output_tokens, room)
        params = self._params.get(tokens)
        if params is None:
            params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
            self._params[tokens] = params
        spec = EngineRequest(request_id=str(job.number), prompt=job.tokens(), params=params)
        try:
            self._admission.check([spec])
        except QueueFullError:
            job.error, job.end_s = QUEUE_FULL, at
            return False
        self._admission.enter(spec)
        added = _JobRequest(spec, self._num_added, 0, self.spec.max_model_len)
        added.job = job
        self._num_added += 1
        self.num_requests += 1
        self._inbox.append((at, added))
        if self.next_s == math.inf:
            self.next_s = max(self.now, at)
        elif self._window is not None and not self.scheduler.waiting and not self._is_full():
            window = self._window
            window.num_steps = min(window.num_steps, bisect.bisect_left(window.times, at) + 1)
            self.next_s = window.times[window.num_steps - 1]
        return True

    def advance(self) -> list[Job]:
        """What was under way is over at `next_s`; begin the next. Returns the jobs that ended."""
        self.now = now = self.next_s
        ended: list[Job] = []
        if self._window is not None:
            self._coast(self._window)
            self._window = None
        for _ in range(self._num_collect):
            self._collect(self._in_flight.popleft(), ended)
        self._num_collect = 0
        while self._inbox and self._inbox[0][0] <= now:
            self.scheduler.add(self._inbox.popleft()[1])
        self.next_s = self._begin()
        pool = self.kv.pool
        self.timeline.add(
            now, pool.num_blocks - pool.num_free, len(self.scheduler.running), len(self.scheduler.waiting)
        )
        return ended

    def _begin(self) -> float:
        """Begin a step, or several; when something is to be done next."""
        if len(self.scheduler) == 0 and not self._in_flight:
            return self._inbox[0][0] if self._inbox else math.inf
        if self._windows and self._can_coast() and (window := self._plan_window()) is not None:
            self._window = window
            return window.times[-1]
        preemptions = self.scheduler.num_preemptions
        scheduled = self.scheduler.schedule()
        if preempted := self.scheduler.num_preemptions != preemptions:
            self._note_preemptions()
        if not scheduled:
            if not self._in_flight:
                raise RuntimeError("The scheduler has requests and plans nothing.")
            self._num_collect = len(self._in_flight)
            return max(self.now, self._in_flight[-1].done_s)
        seconds = self._launch(scheduled)
        # Room was left and whoever waits first was looked at: it does not fit, until a block is freed.
        looked = self._last_is_decode and not preempted and not self._is_full()
        self._blocked = looked and len(self.scheduler.waiting) > 0
        if not self.spec.lookahead:
            self._num_collect = 1
            end_s = self.now + seconds
            self.scheduler.took(scheduled, end_s - self.now)
            return end_s
        if len(self._in_flight) == 1:
            return self.now  # nothing to wait for: launch the next on top of it
        self._num_collect = 1
        return max(self.now, self._in_flight[0].done_s)

    def _launch(self, scheduled: Scheduled) -> float:
        """Seconds that the device takes for the plan, which it begins when it is free."""
        contexts, chunks, is_decode = [], [], True
        sampling: list[_JobRequest] = []
        begun: list[str] = []
        launched = self.scheduler.launched
        for request, row in scheduled:
            assert isinstance(request, _JobRequest)
            launched(request, row)
            end, start = request.num_computed_tokens, row.start
            if end - start == 1:
                contexts.append(end)
            else:
                chunks.append((end - start, end))
            if start < request.num_prompt_tokens:
                is_decode = False
                if request.queue_s is None:
                    request.queue_s = self.now
                    begun.append(request.request_id)
            if row.num_logits:
                request.num_tokens += 1
                sampling.append(request)
        if begun:
            self._admission.begun(begun)
        if self._preempted:
            self._preempted.difference_update([request for request, _ in scheduled])
        seconds = self._cost.step_seconds(contexts, chunks, len(sampling))
        done_s = max(self.now, self._device_free_s) + seconds
        self._device_free_s = done_s
        self._last_is_decode = is_decode and not chunks
        self._last_is_whole = len(scheduled) == len(self.scheduler.running)
        self._in_flight.append(_Step(scheduled, sampling, done_s))
        self.num_steps += 1
        self.num_rows += len(scheduled)
        self.num_computed_tokens += len(contexts) + sum([count for count, _ in chunks])
        self.busy_s += seconds
        return seconds

    def _note_preemptions(self) -> None:
        """Tell the jobs that wait again, of the last plan."""
        for request in self.scheduler.waiting:
            if request.queue_s is not None and request not in self._preempted:
                self._preempted.add(request)
                assert isinstance(request, _JobRequest)
                request.job.preemptions += 1

    def _collect(self, step: _Step, ended: list[Job]) -> None:
        """The step is over: publish what it filled, and hand out its tokens."""
        size = self.spec.block_size
        collected, now = self.scheduler.collected, self.now
        for request, row in step.scheduled:
            if len(row.token_ids) > 1 or (row.start + 1) % size == 0:  # else it filled no block
                collected(request, row)
        for request in step.sampling:
            # Nobody aborts, and a request is not computed beyond its last token: it has not ended.
            job, tokens = request.job, request.tokens
            tokens.append(job.answer_piece)
            job.token_s.append(now)
            if not request.has_output:
                request.has_output = True
                job.cached_tokens = request.num_cached_tokens
            if len(tokens) >= request.max_num_tokens:
                self._end(request)
                ended.append(job)

    def _end(self, request: _JobRequest) -> None:
        self.scheduler.remove(request.request_id)
        self._admission.leave(request.request_id)
        request.job.end_s = self.now
        self.num_requests -= 1
        self._blocked = False

    def counts(self) -> Counts:
        """What was done so far."""
        scheduler = self.scheduler
        return Counts(
            num_steps=self.num_steps,
            num_rows=self.num_rows,
            num_computed_tokens=self.num_computed_tokens,
            num_preemptions=scheduler.num_preemptions,
            num_queried_tokens=scheduler.num_queried_tokens,
            num_hit_tokens=scheduler.num_hit_tokens,
            busy_s=self.busy_s,
        )

    # --- steps computed together ---------------------------------------------------------------------------

    def _is_full(self) -> bool:
        return len(self.scheduler.running) >= self.spec.max_num_seqs

    def _can_coast(self) -> bool:
        """Whether the next step only continues the answers of all that run."""
        running, waiting = self.scheduler.running, self.scheduler.waiting
        if not self._last_is_decode or (waiting and not self._blocked and not self._is_full()):
            return False
        if self.spec.lookahead:  # whoever runs is in the step in flight, and in no other
            return len(self._in_flight) == 1 and len(self._in_flight[0].scheduled) == len(running) > 0
        return self._last_is_whole and len(running) > 0

    def _plan_window(self) -> _Window | None:
        """As many steps as nobody ends in and blocks suffice for; None if that is less than two."""
        running, size = self.scheduler.running, self.spec.block_size
        count = min([request.max_num_tokens - request.num_tokens for request in running]) - 1
        count = min(count, _LONGEST_WINDOW)
        if count < 2:
            return None
        computed = [request.num_computed_tokens for request in running]
        free = self.kv.pool.num_free
        if len(running) * (count // size + 1) > free:
            opened = np.zeros(size, np.int64)  # blocks opened by step j, for j modulo the block size
            np.add.at(opened, -np.asarray(computed) % size, 1)
            total = np.cumsum(np.resize(opened, count))
            count = int(np.searchsorted(total, free, side="right"))
            if count < 2:
                return None
        costs = self._cost.decode_seconds([length + 1 for length in computed], count)
        window = _Window(count, self.now, [], [], costs)
        launch_s, before_s, device_s = self.now, self._device_free_s, self._device_free_s
        for seconds in costs:
            if self.spec.lookahead:
                device_s = max(launch_s, device_s) + seconds
                launch_s = max(launch_s, before_s)  # the step before is collected
                before_s = device_s
            else:
                launch_s += seconds
            window.times.append(launch_s)
            window.done.append(device_s)
        return window

    def _coast(self, window: _Window) -> None:
        """The window's steps are over: what `_launch` and `_collect` would have done, in their order."""
        running, size, count = self.scheduler.running, self.spec.block_size, window.num_steps
        ahead = 1 if self.spec.lookahead else 0
        times = window.times[:count]
        events: list[tuple[int, bool, int, int]] = []  # (step, whether to publish, row, up to which token)
        opened = [0] * count  # blocks that each step begins
        for index, request in enumerate(running):
            assert isinstance(request, _JobRequest)
            start = request.num_computed_tokens
            opens = -start % size  # steps until its next block begins
            for step in range(opens, count, size):
                opened[step] += 1
                events.append((step, False, index, start + step + 1))
            # Step s fills it up to start + s + 1; collected at once, or after the next has been launched.
            fills = range(opens - 1 + size * (opens < 1 - ahead), count - ahead, size)
            events += [(step + ahead, True, index, start + step + 1) for step in fills]
            job = request.job
            request.tokens += [job.answer_piece] * count
            job.token_s += times
            request.num_tokens += count
            request.num_computed_tokens += count
        self._note_opened(window, opened)
        events.sort()
        for _, is_publish, index, end in events:
            request = running[index]
            if is_publish:
                self.kv.publish(request.request_id, request.tokens, end)
            elif not self.kv.extend(request.request_id, end):
                raise RuntimeError("A window was planned for more blocks than are free.")
        self._finish_window(window, times)

    def _note_opened(self, window: _Window, opened: list[int]) -> None:
        """Tell the timeline of blocks when they were taken: at the beginning of their steps."""
        pool, scheduler = self.kv.pool, self.scheduler
        used, began_s = pool.num_blocks - pool.num_free, window.began_s
        for blocks, end_s in zip(opened, window.times, strict=False):  # the window may have been cut short
            if blocks:
                used += blocks
                self.timeline.add(began_s, used, len(scheduler.running), len(scheduler.waiting))
            began_s = end_s

    def _finish_window(self, window: _Window, times: list[float]) -> None:
        running, count = self.scheduler.running, window.num_steps
        if self._pace is not None:
            began_s = window.began_s
            for end_s in times:
                self._pace.took(end_s - began_s, answers=len(running), plain=0, scored=0)
                began_s = end_s
        else:
            self._device_free_s = window.done[count - 1]
            self._in_flight[0] = _Step(
                [(r, PlanRow([0], r.num_computed_tokens - 1, [], 1)) for r in running],
                self._in_flight[0].sampling,
                self._device_free_s,
            )
        self.num_steps += count
        self.num_rows += count * len(running)
        self.num_computed_tokens += count * len(running)
        self.busy_s += sum(window.costs[:count])
