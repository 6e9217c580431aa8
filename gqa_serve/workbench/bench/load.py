"""Sends traffic and records what came back: the clock of the load generator.

Owns when requests are sent. A request with an arrival time is sent then, however many still run (open loop),
so that a slow server is not spared the load it would get; where `concurrency` delays it all the same, the
record says by how much (`late_s`). Without arrival times `concurrency` users send one request after another
(closed loop). Knows no HTTP. Invariant: every request that was sent and not cancelled has one record.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from gqa_serve.workbench.bench.answer import Answer
from gqa_serve.workbench.bench.target import Message, Target
from gqa_serve.workbench.bench.words import Words
from gqa_serve.workbench.records import RequestRecord
from gqa_serve.workbench.trace import TraceRequest

_PREPARE_S = 0.02
"""How long before a request is due its prompt is written, which takes a moment for long ones."""


@dataclass
class Prompts:
    """Writes prompts. `salt` makes them unlike those of other runs, whose KV a server may still have."""

    words: Words
    salt: str

    def write(self, request: TraceRequest, before: TraceRequest | None, number: int) -> str:
        """What the user says in this turn; `before` is the turn before, `number` the conversation's."""
        if before is None:
            shared, fixed = request.prefix_tokens, request.prefix_tokens + self.words.overhead
        else:
            shared, fixed = 0, before.prompt_tokens + before.output_tokens + self.words.turn_overhead
        prefix = self.words.text(shared, f"{self.salt}/prefix/{request.prefix}")
        if request.prompt is not None:
            return f"{prefix} {request.prompt}" if prefix else request.prompt
        own = max(1, request.prompt_tokens - fixed)
        return prefix + self.words.text(own, f"{self.salt}/{number}/{request.turn}")


@dataclass
class Monitor:
    """What a run looks like from outside while it goes on. `on_record` is called with each record."""

    total: int
    running: int = 0
    done: int = 0
    failed: int = 0
    output_tokens: int = 0
    recent_ttft_s: list[float] = field(default_factory=list)
    on_record: Callable[[RequestRecord], None] | None = None

    def add_tokens(self, count: int) -> None:
        """Tokens have arrived."""
        self.output_tokens += count

    def add(self, record: RequestRecord) -> None:
        """A request has ended."""
        self.done += 1
        self.failed += record.error is not None
        if record.error is None and record.ttft_s is not None:
            self.recent_ttft_s.append(record.ttft_s)
            del self.recent_ttft_s[:-100]
        if self.on_record is not None:
            self.on_record(record)


@dataclass(frozen=True)
class Sent:
    """A request as it was wanted, and what came of it."""

    request: TraceRequest
    record: RequestRecord


@dataclass
class Run:
    """Everything of a run, in the order of ending. `num_cut`: in flight when it was interrupted."""

    sent: list[Sent]
    scheduled: bool
    num_wanted: int
    num_cut: int = 0
    interrupted: bool = False

    @property
    def records(self) -> list[RequestRecord]:
        """By the time they were sent."""
        return sorted((one.record for one in self.sent), key=lambda record: record.sent_s)

    @property
    def num_unsent(self) -> int:
        """Requests that were never sent: after an interruption, or after the failure of an earlier turn."""
        return self.num_wanted - len(self.sent) - self.num_cut


class Load:
    """One run of traffic over one target."""

    def __init__(
        self,
        target: Target,
        requests: Sequence[TraceRequest],
        prompts: Prompts,
        *,
        concurrency: int | None = None,
        monitor: Monitor | None = None,
    ) -> None:
        self._target = target
        self._prompts = prompts
        self._sessions = _sessions(requests)
        self._gate = None if concurrency is None else asyncio.Semaphore(concurrency)
        self.monitor = monitor or Monitor(len(requests))
        scheduled = any(request.arrival_s > 0 for request in requests)
        self.run_so_far = Run([], scheduled, len(requests))
        self._start = 0.0

    async def run(self, stop: asyncio.Event | None = None) -> Run:
        """Send everything; what is in flight when `stop` is set is cancelled and not recorded."""
        self._start = time.perf_counter()
        tasks = [asyncio.ensure_future(self._session(*one)) for one in enumerate(self._sessions)]
        ended: asyncio.Future[list[None]] = asyncio.gather(*tasks)
        stopped: asyncio.Future[bool] = asyncio.ensure_future((stop or asyncio.Event()).wait())
        try:
            either: list[asyncio.Future[Any]] = [ended, stopped]
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                await ended  # raises what was not foreseen
            else:
                self.run_so_far.interrupted = True
        finally:
            self.run_so_far.num_cut = self.monitor.running
            stopped.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, ended, stopped, return_exceptions=True)
        return self.run_so_far

    async def _session(self, number: int, turns: Sequence[TraceRequest]) -> None:
        """A conversation, or one request."""
        await self._sleep_until(turns[0].arrival_s - _PREPARE_S)
        if self._gate is None:
            await self._turns(number, turns)
        else:
            async with self._gate:
                await self._turns(number, turns)

    async def _turns(self, number: int, turns: Sequence[TraceRequest]) -> None:
        messages: list[Message] = []
        due_s = turns[0].arrival_s if self.run_so_far.scheduled else 0.0
        before = None
        for request in turns:
            if before is not None:
                due_s = self._now() + request.think_s
                await self._sleep_until(due_s - _PREPARE_S)
            messages.append({"role": "user", "content": self._prompts.write(request, before, number)})
            await self._sleep_until(due_s)
            timed = self.run_so_far.scheduled or before is not None
            answer = await self._send(request, messages, due_s if timed else None)
            if answer.error is not None:
                return
            messages.append({"role": "assistant", "content": answer.text})
            before = request

    async def _send(self, request: TraceRequest, messages: Sequence[Message], due_s: float | None) -> Answer:
        monitor = self.monitor
        monitor.running += 1
        answer, start = await self._target.ask(messages, request.output_tokens, on_tokens=monitor.add_tokens)
        end = time.perf_counter()
        monitor.running -= 1
        sent_s = start - self._start
        record = _record(request, answer, sent_s, end - start)
        record.late_s = 0.0 if due_s is None else max(0.0, sent_s - due_s)
        self.run_so_far.sent.append(Sent(request, record))
        monitor.add(record)
        return answer

    def _now(self) -> float:
        return time.perf_counter() - self._start

    async def _sleep_until(self, at_s: float) -> None:
        if (left := at_s - self._now()) > 0:
            await asyncio.sleep(left)


def _sessions(requests: Sequence[TraceRequest]) -> list[list[TraceRequest]]:
    """Conversations with their turns in order, and single requests, by arrival."""
    names = itertools.count()
    sessions: dict[object, list[TraceRequest]] = {}
    for request in requests:
        sessions.setdefault(request.conversation or next(names), []).append(request)
    return list(sessions.values())


def _record(request: TraceRequest, answer: Answer, sent_s: float, seconds: float) -> RequestRecord:
    """Token counts are the server's; without usage the wanted prompt, and the events with tokens."""
    usage = answer.usage
    output_tokens = usage.completion_tokens if usage is not None else sum(answer.event_tokens)
    details = usage.prompt_tokens_details if usage is not None else None
    whole = answer.error is None and bool(answer.event_s)
    return RequestRecord(
        sent_s=sent_s,
        prompt_tokens=usage.prompt_tokens if usage is not None else request.prompt_tokens,
        output_tokens=output_tokens,
        token_s=answer.token_times(output_tokens),
        e2e_s=answer.event_s[-1] if whole else seconds,
        cached_tokens=None if details is None else details.cached_tokens,
        conversation=request.conversation,
        turn=request.turn,
        finish_reason=answer.finish_reason,
        error=answer.error,
    )
