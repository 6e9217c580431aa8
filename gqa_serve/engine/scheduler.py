"""Who computes how many tokens in this step, and who gives way when memory runs out.

Owns the waiting and running requests and decides; `kv_manager.py` does the block accounting. Knows
nothing of tensors, sampling or text.

One rule: each step hands out tokens, up to `max_num_batched_tokens`, until every request's
`num_computed_tokens` catches up with its `num_tokens`. Requests with one token to go come first (so
decoding never starves behind a long prompt), then running ones in the middle of a prompt, then waiting
ones. A prompt longer than what is left of the budget is computed in chunks over several steps. Where a long
step holds up those who read answers (on a CPU), a `Pace` says how many tokens of prompts go beside them.

When blocks run out, the running request that is last in order (priority, then arrival) is preempted: its
blocks are released and it waits, to be computed again from its tokens. The first in order is never
preempted for another, and a request alone always fits (`Engine.add` checks), so the oldest always advances.

Planning may run ahead of what is known: a token that a step in flight chooses counts like any other, and a
request that needs nothing but the value of its last one is left alone. Nothing is published before the host
knows that the step which computed it went well.

Invariant: a request is in exactly one of waiting and running from `add` to `remove`; only running
requests hold blocks.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

from gqa_serve.engine.batch import PlanRow
from gqa_serve.engine.block_pool import Chain
from gqa_serve.engine.kv_manager import KVManager
from gqa_serve.engine.pace import Pace
from gqa_serve.engine.request import Request

Scheduled = list[tuple[Request, PlanRow]]
"""The requests of a step, each with its row of the plan."""


@dataclass
class SchedulerLimits:
    """Per step: most requests computed, most tokens computed."""

    max_num_seqs: int
    max_num_batched_tokens: int


class Scheduler:
    """The one rule over waiting and running requests."""

    def __init__(
        self, kv: KVManager, limits: SchedulerLimits, *, prefix_caching: bool, pace: Pace | None = None
    ) -> None:
        self.kv = kv
        self.limits = limits
        self._pace = pace
        self._answers = 0  # rows of the step that the others must not hold up
        self._room = 1.0  # what is left of the time for the others
        self.prefix_caching = prefix_caching
        self.waiting: list[Request] = []  # both sorted by `order`
        self.running: list[Request] = []
        self.num_waiting_tokens = 0  # of their prompts
        self._budget = limits.max_num_batched_tokens
        self.num_preemptions = 0
        self.num_queried_tokens = 0  # of prompts looked up in the prefix cache
        self.num_hit_tokens = 0
        self._requests: dict[str, Request] = {}
        self._groups: dict[str, list[Request]] = {}

    def add(self, request: Request) -> None:
        """Queue a new request."""
        self._requests[request.request_id] = request
        if request.spec.group is not None:
            self._groups.setdefault(request.spec.group, []).append(request)
        self._wait(request)

    def get(self, request_id: str) -> Request | None:
        """The request, if it is waiting or running."""
        return self._requests.get(request_id)

    def holds(self, request: Request) -> bool:
        """Whether this very request (another may have taken its id) has not ended."""
        return self._requests.get(request.request_id) is request

    def __len__(self) -> int:
        return len(self._requests)

    def remove(self, request_id: str) -> Request | None:
        """Forget a request and release its blocks; None if it is not here (already ended)."""
        request = self._requests.pop(request_id, None)
        if request is None:
            return None
        if not _take_out(self.running, request):
            _take_out(self.waiting, request)
            self.num_waiting_tokens -= request.num_prompt_tokens
        self.kv.release(request_id)
        if request.spec.group is not None:
            siblings = self._groups[request.spec.group]
            siblings.remove(request)
            if not siblings:
                del self._groups[request.spec.group]
        return request

    def schedule(self) -> Scheduled:
        """The requests of the next step with their rows; every block they need is allocated."""
        chosen: dict[Request, int] = {}
        preemptions = self.num_preemptions
        budget = self._schedule_running(chosen)
        if self.num_preemptions == preemptions:
            self._schedule_waiting(chosen, budget)
        return [(request, self._row(request, count)) for request, count in chosen.items()]

    def shrink(self, scheduled: Scheduled) -> None:
        """Memory ran out while this was computed: plan half as many tokens, then gradually more again."""
        self._budget = max(1, sum(len(row.token_ids) for _, row in scheduled) // 2)

    def halves(self, scheduled: Scheduled) -> list[Scheduled]:
        """What is left to compute of a plan that was not launched, in two parts, or as a smaller one.

        Of a single row, the first half of its tokens; the others are for later steps. Nothing of a single
        token.
        """
        rows = [
            (request, min(len(row.token_ids), request.num_pending_tokens))
            for request, row in scheduled
            if self.holds(request) and request.num_pending_tokens > 0
        ]
        if len(rows) > 1:
            parts = [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
        else:
            parts = [[(request, count // 2)] for request, count in rows if count > 1]
        return [[(request, self._row(request, count)) for request, count in part] for part in parts]

    def launched(self, request: Request, row: PlanRow) -> None:
        """The step that computes `row` of `request` is on its way: plan on as if it were done."""
        request.num_computed_tokens += len(row.token_ids)

    def collected(self, request: Request, row: PlanRow) -> None:
        """The step went well, and all of the row's tokens are known: publish the blocks they filled."""
        end = row.start + len(row.token_ids)
        if request.num_computed_tokens >= end:  # else it was preempted since, and its blocks are gone
            self.kv.publish(request.request_id, request.tokens, end)

    def took(self, scheduled: Scheduled, seconds: float) -> None:
        """Computing this took so long: the next may have to be smaller."""
        if self._pace is None:
            return
        answers = sum(len(row.token_ids) == 1 for _, row in scheduled)
        tokens = sum(len(row.token_ids) for _, row in scheduled) - answers
        scored = sum(len(row.token_ids) for request, row in scheduled if _is_scored(request, row.start))
        self._pace.took(seconds, answers=answers, plain=max(0, tokens - scored), scored=scored)

    def _paced(self, request: Request, count: int) -> int:
        """How many of `count` tokens to compute now; 0 if the step is long enough."""
        if self._pace is None or not self._answers:
            return count
        if self._room <= 0:
            return 0
        most = self._pace.most(self._answers, scored=_is_scored(request, request.num_computed_tokens))
        count = min(count, max(1, int(self._room * most)))
        self._room -= count / most
        return count

    def _schedule_running(self, chosen: dict[Request, int]) -> int:
        """Give tokens to running requests; returns what is left of the budget."""
        decoding: list[tuple[Request, int]] = []
        forced: list[tuple[Request, int]] = []  # an answer's tokens that a grammar left no choice of
        catching_up: list[tuple[Request, int]] = []
        for request in self.running:
            pending = request.num_pending_tokens
            if pending == 1:
                decoding.append((request, pending))
            elif pending > 1:
                is_answer = request.num_computed_tokens >= request.num_prompt_tokens
                (forced if is_answer else catching_up).append((request, pending))
        self._room, self._answers = 1.0, len(decoding) + len(forced)
        budget = self._budget
        self._budget = min(self.limits.max_num_batched_tokens, budget + max(1, budget // 8))
        preemptions = self.num_preemptions
        for request, pending in decoding + forced + catching_up:
            if budget == 0:
                break
            if self.num_preemptions > preemptions and request not in self.running:
                continue  # preempted by one before it in this loop
            count = min(pending, budget)
            if pending > 1 and (count := self._paced(request, count)) == 0:
                break
            while not self.kv.extend(request.request_id, request.num_computed_tokens + count):
                victim = self.running[-1]
                budget += chosen.pop(victim, 0)
                self._preempt(victim)
                if victim is request:
                    break
            else:
                chosen[request] = count
                budget -= count
        return budget

    def _schedule_waiting(self, chosen: dict[Request, int], budget: int) -> None:
        """Admit waiting requests in order while budget, places and blocks last."""
        if len(self.running) >= self.limits.max_num_seqs:
            return
        for request in list(self.waiting):
            if budget == 0 or self._room <= 0 or len(self.running) >= self.limits.max_num_seqs:
                return
            if self._waits_for_sibling(request):
                continue
            found = self._start(request)
            if found is None:
                return  # those behind it may be smaller, but passing it would starve it
            request.num_computed_tokens = found
            if not request.has_output:
                request.num_cached_tokens = found
            if request.queue_s is None and not request.needs_whole_prompt:
                self.num_queried_tokens += request.num_prompt_tokens
                self.num_hit_tokens += found
            count = self._paced(request, min(request.num_pending_tokens, budget))
            self.kv.extend(request.request_id, found + count)
            _take_out(self.waiting, request)
            self.num_waiting_tokens -= request.num_prompt_tokens
            bisect.insort(self.running, request, key=_order)
            chosen[request] = count
            budget -= count

    def _start(self, request: Request) -> int | None:
        """Look the request's tokens up in the cache; None if the rest of them does not fit now.

        Room is asked for all its tokens, though blocks are taken chunk by chunk, beside what running requests
        still need for theirs and one more: admitting a prompt only to preempt it again would waste the work.
        """
        tokens = request.tokens
        reuse = not request.needs_whole_prompt
        found = self.kv.start(request.request_id, tokens, self._salt(request), reuse)
        promised = sum(self._missing_blocks(other, other.num_tokens + 1) for other in self.running)
        if self.running and self._missing_blocks(request, len(tokens)) > self.kv.pool.num_free - promised:
            self.kv.release(request.request_id)
            return None
        return found

    def _missing_blocks(self, request: Request, num_tokens: int) -> int:
        return self.kv.blocks_for(num_tokens) - len(self.kv.block_ids(request.request_id))

    def _salt(self, request: Request) -> Chain | None:
        """What starts the request's chain in the prefix cache; None if it shares nothing."""
        spec = request.spec
        if self.prefix_caching:
            return f"salt:{spec.cache_salt}" if spec.cache_salt is not None else "all"
        return f"group:{spec.group}" if spec.group is not None else None

    def _waits_for_sibling(self, request: Request) -> bool:
        """Whether the first of the request's group has yet to publish the blocks that they can share."""
        if request.spec.group is None:
            return False
        first = self._groups[request.spec.group][0]
        size = self.kv.pool.block_size
        shared = (request.num_prompt_tokens - 1) // size * size
        return first is not request and self.kv.num_published_tokens(first.request_id) < shared

    def _wait(self, request: Request) -> None:
        bisect.insort(self.waiting, request, key=_order)
        self.num_waiting_tokens += request.num_prompt_tokens

    def _preempt(self, request: Request) -> None:
        _take_out(self.running, request)
        self.kv.release(request.request_id)
        request.num_computed_tokens = 0
        self._wait(request)
        self.num_preemptions += 1

    def _row(self, request: Request, count: int) -> PlanRow:
        start = request.num_computed_tokens
        end = start + count
        num_logits = 1 if end == request.num_tokens else 0
        if request.needs_whole_prompt:
            num_logits = count
        token_ids, previous_row = request.tokens[start:end], -1
        if len(token_ids) < count:  # by one: the token that the step in flight chooses
            token_ids.append(0)
            previous_row = request.sample_row
        return PlanRow(token_ids, start, self.kv.block_ids(request.request_id), num_logits, previous_row)


def _is_scored(request: Request, position: int) -> bool:
    return request.params.prompt_logprobs is not None and position < request.num_prompt_tokens


def _order(request: Request) -> tuple[int, int]:
    return request.order


def _take_out(queue: list[Request], request: Request) -> bool:
    """Remove `request` from a sorted queue; False if it is not there."""
    index = bisect.bisect_left(queue, request.order, key=_order)
    if index == len(queue) or queue[index] is not request:
        return False
    del queue[index]
    return True
