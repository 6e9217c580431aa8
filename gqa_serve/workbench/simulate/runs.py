"""Computes cases, by several processes where they do not depend on each other.

Owns what may be computed apart: cases always; the replicas of one where the router asks for nothing and all
arrivals are known (round robin, no later turns, no closed loop), since then request i goes to replica
i modulo their number. Knows no scheduler and no report.
Invariant: how many processes there are changes no number but the wall time.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.sharedctypes import SynchronizedArray
from typing import Any

from gqa_serve.workbench.records import RequestRecord
from gqa_serve.workbench.simulate.case import Case
from gqa_serve.workbench.simulate.fleet import Fleet
from gqa_serve.workbench.simulate.jobs import Job, make_jobs
from gqa_serve.workbench.simulate.routing import Routing, make_routing
from gqa_serve.workbench.simulate.timeline import Timeline
from gqa_serve.workbench.simulate.twin import Counts
from gqa_serve.workbench.trace import TraceRequest

OnProgress = Callable[[int, float], None]
"""Called now and then with the number of requests that have ended, and the virtual time that all reached."""
_POLL_S = 0.2


@dataclass
class CaseResult:
    """Records in the order of the trace, and what the replicas did. `wall_s`: of all its processes."""

    case: Case
    records: list[RequestRecord]
    timelines: list[Timeline]
    counts: Counts = field(default_factory=Counts)
    wall_s: float = 0.0


@dataclass(frozen=True)
class _Unit:
    """Replicas `first`, `first + every`, ... of a case."""

    number: int
    case_index: int
    case: Case
    first: int = 0
    every: int = 1


@dataclass
class _UnitResult:
    unit: _Unit
    records: list[tuple[int, RequestRecord]]
    timelines: list[Timeline]
    counts: Counts
    wall_s: float


class _Assigned(Routing):
    """Round robin over all replicas of a case, of which this process has every `every`-th."""

    def __init__(self, replicas: int, every: int) -> None:
        self._replicas, self._every = replicas, every

    def choose(self, job: Job, loads: Sequence[int]) -> int:
        return job.number % self._replicas // self._every


def run_cases(
    cases: Sequence[Case], traces: Sequence[Sequence[TraceRequest]], processes: int, on_progress: OnProgress
) -> list[CaseResult]:
    """Simulate each case over its trace."""
    units: list[_Unit] = []
    for index, (case, trace) in enumerate(zip(cases, traces, strict=True)):
        parts = min(case.replicas, 4 * processes) if processes > 1 and _is_independent(case, trace) else 1
        units += [_Unit(len(units) + part, index, case, part, parts) for part in range(parts)]
    if processes == 1 or len(units) == 1:
        done = 0
        results = []
        for unit in units:
            trace, before = traces[unit.case_index], done

            def report(ended: int, now: float, before: int = before) -> None:
                on_progress(before + ended, now)

            results.append(_compute(unit, trace, report))
            done += len(trace)
    else:
        results = _compute_apart(units, traces, processes, on_progress)
    return [_joined(case, index, results) for index, case in enumerate(cases)]


def _is_independent(case: Case, trace: Sequence[TraceRequest]) -> bool:
    open_loop = case.concurrency is None and all(request.turn == 0 for request in trace)
    return open_loop and case.routing == "round-robin"


def _compute(unit: _Unit, trace: Sequence[TraceRequest], on_progress: OnProgress | None) -> _UnitResult:
    began = time.perf_counter()
    case, jobs = unit.case, make_jobs(trace)
    indices = range(unit.first, case.replicas, unit.every)
    routing = make_routing(case.routing)
    if unit.every > 1:
        routing = _Assigned(case.replicas, unit.every)
        jobs = [job for job in jobs if job.number % case.replicas % unit.every == unit.first]
    fleet = Fleet(case.spec, case.cost, len(indices), routing, case.concurrency)
    for replica, index in zip(fleet.replicas, indices, strict=True):
        replica.index = index
    fleet.run(jobs, on_progress)
    counts = Counts()
    for replica in fleet.replicas:
        counts.add(replica.counts())
    timelines = [replica.timeline for replica in fleet.replicas]
    records = [(job.number, job.record()) for job in jobs]
    return _UnitResult(unit, records, timelines, counts, time.perf_counter() - began)


def _joined(case: Case, index: int, results: Sequence[_UnitResult]) -> CaseResult:
    own = [result for result in results if result.unit.case_index == index]
    numbered = sorted((pair for result in own for pair in result.records), key=lambda pair: pair[0])
    timelines: list[Timeline] = [Timeline()] * case.replicas
    joined = CaseResult(case, [record for _, record in numbered], timelines)
    for result in own:
        timelines[result.unit.first :: result.unit.every] = result.timelines
        joined.counts.add(result.counts)
        joined.wall_s += result.wall_s
    return joined


# --- several processes -------------------------------------------------------------------------------------

_shared: tuple[Sequence[Sequence[TraceRequest]], Any, Any] | None = None


def _compute_apart(
    units: Sequence[_Unit], traces: Sequence[Sequence[TraceRequest]], processes: int, on_progress: OnProgress
) -> list[_UnitResult]:
    context = multiprocessing.get_context("spawn")  # no state of this process, no thread half copied
    ended: SynchronizedArray[int] = context.Array("q", len(units))
    times: SynchronizedArray[float] = context.Array("d", len(units))
    with context.Pool(min(processes, len(units)), _begin_process, (traces, ended, times)) as pool:
        pending = pool.map_async(_compute_shared, units, chunksize=1)
        while not pending.ready():
            pending.wait(_POLL_S)
            started = [time for time, count in zip(times[:], ended[:], strict=True) if count]
            on_progress(sum(ended[:]), min(started, default=0.0))
        return pending.get()


def _begin_process(traces: Sequence[Sequence[TraceRequest]], ended: Any, times: Any) -> None:
    global _shared
    _shared = traces, ended, times


def _compute_shared(unit: _Unit) -> _UnitResult:
    assert _shared is not None
    traces, ended, times = _shared

    def report(count: int, now: float) -> None:
        ended[unit.number], times[unit.number] = count, now

    return _compute(unit, traces[unit.case_index], report)
