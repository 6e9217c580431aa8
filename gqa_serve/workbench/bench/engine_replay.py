"""A trace replayed in this process: its requests at their times, into the engine, without a server.

Owns when requests begin, what their prompts are in tokens, and what becomes of each, as `RequestRecord`s.
Times count from when a request was due, so that what it waits for the step under way to end is in its TTFT,
as it is for a client of the server.
Invariant: one record a request, in the order in which they began.
"""

from __future__ import annotations

import heapq
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from gqa_serve.engine.request import EngineRequest, SamplingParams, TokenOutput
from gqa_serve.errors import RequestError
from gqa_serve.workbench.bench.step_recorder import StepTimer
from gqa_serve.workbench.records import RequestRecord
from gqa_serve.workbench.step_samples import StepSample
from gqa_serve.workbench.trace import TraceRequest

Encode = Callable[[str], list[int]]


@dataclass
class _Live:
    """A request under way."""

    request: TraceRequest
    record: RequestRecord
    prompt: list[int]
    answer: list[int] = field(default_factory=list)


class Replay:
    """One run of a trace. `encode` is for requests that bring their text; `now` and `sleep` are the clock."""

    def __init__(
        self,
        timer: StepTimer,
        requests: Sequence[TraceRequest],
        encode: Encode | None = None,
        *,
        now: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._timer = timer
        self._engine = timer.engine
        self._encode = encode
        self._now = now
        self._sleep = sleep
        self._total = len(requests)
        self._later = {(r.conversation, r.turn): r for r in requests if r.turn}
        self._due: list[tuple[float, int, TraceRequest, list[int]]] = [
            (request.arrival_s, number, request, [])
            for number, request in enumerate(requests)
            if not request.turn
        ]
        heapq.heapify(self._due)
        self._order = len(requests)
        self._live: dict[str, _Live] = {}
        self._preempted: set[str] = set()
        self._numbers = random.Random("prompts of a trace")
        self.records: list[RequestRecord] = []
        self.samples: list[StepSample] = []

    def run(self, on_done: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Until every request has ended; `on_done(ended, requests)` after each step."""
        start = self._now()
        while self._due or self._live or self._engine.has_work:
            while self._due and self._due[0][0] <= self._now() - start:
                due_s, _, request, before = heapq.heappop(self._due)
                self._begin(request, due_s, before)
            if not self._engine.has_work:
                if self._due:
                    self._sleep(max(0.0, self._due[0][0] - (self._now() - start)))
                continue
            outputs = self._timer.step()
            at = self._now() - start
            for output in outputs:
                self._take(output, at)
            self._count_preemptions()
            if self._timer.last is not None:
                self.samples.append(self._timer.last)
            on_done(len(self.records) - len(self._live), self._total)

    def _begin(self, request: TraceRequest, due_s: float, before: list[int]) -> None:
        """Queue a request; one that the engine refuses has ended with that."""
        prompt = self._prompt(request, before)
        record = RequestRecord(
            sent_s=due_s,
            prompt_tokens=len(prompt),
            output_tokens=0,
            preemptions=0,
            conversation=request.conversation,
            turn=request.turn,
        )
        name = f"trace-{len(self.records)}"
        self.records.append(record)
        live = _Live(request, record, prompt)
        params = SamplingParams(temperature=0, max_tokens=request.output_tokens, ignore_eos=True)
        try:
            fitted = params.fit(len(prompt), self._engine.info.max_model_len)
            self._engine.add(EngineRequest(request_id=name, prompt=prompt, params=fitted))
        except RequestError as error:
            record.error = error.message
            self._next_turn(live, due_s)
        else:
            self._live[name] = live

    def _prompt(self, request: TraceRequest, before: list[int]) -> list[int]:
        """The text's tokens; else those of the conversation or the shared prefix, and random ones."""
        if request.prompt is not None and self._encode is not None:
            return self._encode(request.prompt)
        prompt = before[: request.prompt_tokens]
        if not prompt and request.prefix_tokens:
            prefix = random.Random(f"prefix {request.prefix}")
            prompt = [self._token(prefix) for _ in range(request.prefix_tokens)]
        return prompt + [self._token(self._numbers) for _ in range(request.prompt_tokens - len(prompt))]

    def _token(self, numbers: random.Random) -> int:
        return numbers.randrange(self._engine.info.vocab_size)

    def _take(self, output: TokenOutput, at: float) -> None:
        live = self._live[output.request_id]
        record = live.record
        record.token_s += [at - record.sent_s] * len(output.token_ids)
        record.output_tokens += len(output.token_ids)
        record.cached_tokens = output.num_cached_tokens
        live.answer += output.token_ids
        if output.finish_reason is not None:
            record.e2e_s = at - record.sent_s
            record.finish_reason, record.error = output.finish_reason, output.error
            del self._live[output.request_id]
            self._next_turn(live, at)

    def _next_turn(self, live: _Live, at: float) -> None:
        """The turn that follows in its conversation, if there is one, after the time to think."""
        later = self._later.pop((live.request.conversation, live.request.turn + 1), None)
        if later is not None:
            self._order += 1
            entry = (at + later.think_s, self._order, later, live.prompt + live.answer)
            heapq.heappush(self._due, entry)

    def _count_preemptions(self) -> None:
        """Whoever waits though it was computed before gave way."""
        if not self._engine.stats.num_preemptions and not self._preempted:
            return
        waiting = {
            request.request_id for request in self._engine.scheduler.waiting if request.queue_s is not None
        }
        for name in waiting - self._preempted:
            record = self._live[name].record
            record.preemptions = (record.preemptions or 0) + 1
        self._preempted = waiting
