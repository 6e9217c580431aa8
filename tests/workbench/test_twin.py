"""The twin decides what the engine decides, ends everything it begins, and takes the time it should."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gqa_serve.workbench.simulate.fleet import NOT_SENT, Fleet
from gqa_serve.workbench.simulate.jobs import Job, make_jobs
from gqa_serve.workbench.simulate.routing import POLICIES, RoundRobin, make_routing
from gqa_serve.workbench.simulate.twin import QUEUE_FULL, TOO_LONG, Replica, ReplicaSpec
from gqa_serve.workbench.trace import TraceRequest, checked
from tests.workbench.virtual_engine import DyadicCost, Log, VirtualEngine


def make_spec(**settings: object) -> ReplicaSpec:
    values: dict[str, object] = {
        "num_blocks": 24,
        "block_size": 4,
        "max_model_len": 64,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 16,
        "max_waiting": 1000,
        "max_waiting_tokens": 10**9,
        "prefix_caching": True,
        "lookahead": False,
        **settings,
    }
    return ReplicaSpec(**values)  # type: ignore[arg-type]


def run_twin(jobs: list[Job], spec: ReplicaSpec, *, windows: bool) -> tuple[Log, Replica]:
    """One replica over the jobs, watched."""
    fleet = Fleet(spec, DyadicCost(), 1, RoundRobin())
    replica = fleet.replicas[0] = Replica(spec, DyadicCost(), windows=windows)
    log = Log()
    log.watch(replica.scheduler)
    fleet.run(jobs)
    log.times = {str(job.number): job.token_s for job in jobs}
    log.close(replica.scheduler)
    return log, replica


@st.composite
def traces(draw: st.DrawFn) -> list[TraceRequest]:
    """A few requests, some with prefixes, some in conversations, in bursts and alone."""
    requests: list[TraceRequest] = []
    for index in range(draw(st.integers(1, 9))):
        arrival_s = draw(st.integers(0, 40)) / 64
        prefix = draw(st.sampled_from([None, "a", "b"]))
        prefix_tokens = 0 if prefix is None else draw(st.integers(1, 12))
        prompt = prefix_tokens + draw(st.integers(1, 14))
        turns = draw(st.integers(1, 3))
        for turn in range(turns):
            output = draw(st.integers(1, 16))
            if prompt + output > 60:
                break
            requests.append(
                TraceRequest(
                    arrival_s=0.0 if turn else arrival_s,
                    prompt_tokens=prompt,
                    output_tokens=output,
                    prefix=prefix,
                    prefix_tokens=prefix_tokens,
                    conversation=f"c{index}",
                    turn=turn,
                    think_s=draw(st.integers(1, 8)) / 64 if turn else 0.0,
                )
            )
            prompt += output + draw(st.integers(1, 6))
    return checked(requests, "test")


@pytest.mark.parametrize("lookahead", [False, True])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    requests=traces(),
    num_blocks=st.integers(16, 40),
    max_num_seqs=st.sampled_from([1, 3, 8]),
    prefix_caching=st.booleans(),
)
def test_the_twin_decides_what_the_engine_decides(
    lookahead: bool, requests: list[TraceRequest], num_blocks: int, max_num_seqs: int, prefix_caching: bool
) -> None:
    limits = {"num_blocks": num_blocks, "max_num_seqs": max_num_seqs, "prefix_caching": prefix_caching}
    engine = VirtualEngine(lookahead, DyadicCost(), max_num_batched_tokens=16, **limits)
    with pytest.MonkeyPatch.context() as patch:
        expected = engine.run(make_jobs(requests), patch)
    spec = make_spec(lookahead=lookahead, **limits)
    jobs = make_jobs(requests)
    plain, asked = run_twin(jobs, spec, windows=False)
    assert plain == expected
    fast, replica = run_twin(make_jobs(requests), spec, windows=True)
    assert fast.times == expected.times
    assert (fast.preemptions, fast.queried, fast.hits) == (plain.preemptions, plain.queried, plain.hits)
    assert replica.timeline.used_seconds == pytest.approx(asked.timeline.used_seconds)
    assert replica.timeline.peak_used == asked.timeline.peak_used
    assert replica.kv.pool.num_free == num_blocks
    assert replica.num_steps == sum(bool(plan) for plan in plain.plans)


@pytest.mark.parametrize("lookahead", [False, True])
def test_preemptions_and_cache_hits_are_the_engines_too(lookahead: bool) -> None:
    """A case in which both happen, so that agreeing on them says something."""
    requests = [
        TraceRequest(
            arrival_s=index / 64, prompt_tokens=14 + index % 3, output_tokens=20, prefix="p", prefix_tokens=9
        )
        for index in range(10)
    ]
    limits = {"num_blocks": 18, "max_num_seqs": 6}
    with pytest.MonkeyPatch.context() as patch:
        engine = VirtualEngine(lookahead, DyadicCost(), max_num_batched_tokens=16, **limits)
        expected = engine.run(make_jobs(requests), patch)
    jobs = make_jobs(requests)
    plain, _ = run_twin(jobs, make_spec(lookahead=lookahead, **limits), windows=False)
    assert plain == expected
    assert plain.preemptions > 0
    assert plain.hits > 0
    assert sum(job.preemptions for job in jobs) == plain.preemptions
    assert sum(job.cached_tokens or 0 for job in jobs) > 0


class FixedCost(DyadicCost):
    """Each step takes a second."""

    def step_seconds(self, contexts: Any, chunks: Any, num_sampled: int) -> float:
        return 1.0


def run_fleet(
    requests: list[TraceRequest], spec: ReplicaSpec, cost: DyadicCost, replicas: int = 1, **options: Any
) -> tuple[list[Job], Fleet]:
    jobs = make_jobs(requests)
    fleet = Fleet(spec, cost, replicas, make_routing(options.pop("routing", "round-robin")), **options)
    fleet.run(jobs)
    return jobs, fleet


@pytest.mark.parametrize("lookahead", [False, True])
def test_a_request_alone_takes_the_sum_of_its_steps(lookahead: bool) -> None:
    cost = DyadicCost()
    spec = make_spec(lookahead=lookahead)  # 16 tokens a step
    jobs, _ = run_fleet([TraceRequest(prompt_tokens=40, output_tokens=5, arrival_s=3.0)], spec, cost)
    first = sum(
        cost.step_seconds([], [chunk], n) for chunk, n in [((16, 16), 0), ((16, 32), 0), ((8, 40), 1)]
    )
    record = jobs[0].record()
    assert record.ttft_s == first
    assert record.itl_s == [cost.step_seconds([41 + step], [], 1) for step in range(4)]
    assert record.e2e_s == first + sum(record.itl_s)


def test_a_batch_of_equal_requests_ends_together() -> None:
    """Four prompts of 4 tokens fill the first step's budget of 16; then each step gives each a token."""
    requests = [TraceRequest(prompt_tokens=4, output_tokens=6) for _ in range(4)]
    jobs, fleet = run_fleet(requests, make_spec(max_num_seqs=4), FixedCost())
    assert [job.token_s for job in jobs] == [[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]] * 4
    assert fleet.replicas[0].num_steps == 6


def test_a_queue_with_fixed_service_waits_as_long_as_theory_says() -> None:
    """M/D/1 (Pollaczek 1930, Khinchine 1932): mean wait rho / (2 (1 - rho)) service times.

    One place, one step of one second per request; the engine begins steps when it likes, not at ticks.
    """
    random = Random(1)
    rho, at, requests = 0.6, 0.0, []
    for _ in range(20_000):
        at += random.expovariate(rho)
        requests.append(TraceRequest(prompt_tokens=2, output_tokens=1, arrival_s=at))
    spec = make_spec(max_num_seqs=1, max_waiting=10**6)
    jobs, _ = run_fleet(requests, spec, FixedCost())
    waits = [job.end_s - job.sent_s - 1.0 for job in jobs]
    assert sum(waits) / len(waits) == pytest.approx(rho / (2 * (1 - rho)), rel=0.05)


@settings(max_examples=40, deadline=None)
@given(
    requests=traces(),
    replicas=st.integers(1, 3),
    routing=st.sampled_from(POLICIES),
    max_waiting=st.integers(0, 3),
    concurrency=st.none() | st.integers(1, 4),
    lookahead=st.booleans(),
)
def test_everything_ends_once_and_nothing_is_kept(
    requests: list[TraceRequest],
    replicas: int,
    routing: str,
    max_waiting: int,
    concurrency: int | None,
    lookahead: bool,
) -> None:
    spec = make_spec(max_waiting=max_waiting, max_num_seqs=2, lookahead=lookahead)
    jobs, fleet = run_fleet(requests, spec, DyadicCost(), replicas, routing=routing, concurrency=concurrency)
    assert fleet.num_ended == len(jobs)
    for job in jobs:
        assert (job.error is None) == (len(job.token_s) == job.request.output_tokens)
        assert job.token_s == sorted(job.token_s)
        assert job.sent_s <= job.end_s
        if job.error is None:
            assert job.end_s == job.token_s[-1]
    for replica in fleet.replicas:
        assert replica.kv.pool.num_free == spec.num_blocks
        assert replica.num_requests == 0
        assert len(replica.scheduler) == 0
        times = [point[0] for point in replica.timeline.points]
        assert times == sorted(times)
    again, _ = run_fleet(requests, spec, DyadicCost(), replicas, routing=routing, concurrency=concurrency)
    assert [job.record() for job in again] == [job.record() for job in jobs]


def test_a_full_queue_refuses_and_a_conversation_stops_there() -> None:
    spec = make_spec(max_num_seqs=1, max_waiting=1)
    requests = [TraceRequest(prompt_tokens=8, output_tokens=4) for _ in range(2)]
    requests += [
        TraceRequest(prompt_tokens=8, output_tokens=4, conversation="c"),
        TraceRequest(prompt_tokens=20, output_tokens=4, conversation="c", turn=1),
        TraceRequest(prompt_tokens=64, output_tokens=1, arrival_s=9.0),
    ]
    jobs, _ = run_fleet(checked(requests, "test"), spec, DyadicCost())
    assert [job.error for job in jobs] == [None, None, QUEUE_FULL, NOT_SENT, TOO_LONG]
