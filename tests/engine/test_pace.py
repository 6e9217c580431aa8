"""Prompts beside answers: a step takes about as long as somebody who reads one may wait, on any machine."""

from __future__ import annotations

import time

import pytest
from fake_runner import assert_conserved, expected, make_engine, request, tokens_of
from hypothesis import given, settings
from hypothesis import strategies as st

from gqa_serve.engine.batch import StepPlan
from gqa_serve.engine.pace import FIRST_TOKENS, MIN_TOKENS, STEP_S, Pace
from gqa_serve.engine.request import SamplingParams

LONG = [5 + n % 80 for n in range(1500)]


class Machine:
    """A clock that only computing moves: so many seconds for a step, and for each token beside answers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step_s: float, token_s: float) -> None:
        self.step_s, self.token_s = step_s, token_s
        self.now = 0.0
        self.steps: list[tuple[int, float]] = []  # rows, seconds
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def compute(self, plan: StepPlan) -> None:
        counts = [len(row.token_ids) for row in plan.rows]
        took = self.step_s + self.token_s * sum(count for count in counts if count > 1)
        self.now += took
        self.steps.append((len(counts), took))


@pytest.mark.parametrize(("step_s", "token_s"), [(0.03, 0.002), (0.05, 0.006), (0.01, 0.0001), (0.4, 0.01)])
@pytest.mark.parametrize("scored", [False, True])
def test_a_long_prompt_leaves_time_for_answers(
    monkeypatch: pytest.MonkeyPatch, step_s: float, token_s: float, scored: bool
) -> None:
    machine = Machine(monkeypatch, step_s, token_s)
    engine = make_engine(
        False, 800, max_model_len=2000, on_execute=machine.compute, max_num_batched_tokens=2048
    )
    engine.add(request("answer", [5, 6, 7], max_tokens=400, ignore_eos=True))
    for _ in range(20):
        engine.step()
    wanted = {"prompt_logprobs": 0} if scored else {}
    engine.add(request("prompt", LONG, max_tokens=1, ignore_eos=True, **wanted))
    got = []
    machine.steps.clear()
    while engine.scheduler.get("prompt") is not None:
        got += engine.step()
    beside = [took for rows, took in machine.steps if rows > 1]
    aim = max(STEP_S, 2 * step_s)
    most = max(aim, step_s + FIRST_TOKENS * token_s, step_s + MIN_TOKENS * token_s)
    assert max(beside) <= 1.05 * most
    assert sum(took > 1.05 * aim for took in beside) <= 1  # the first, before anything was known
    assert sum(output.request_id == "answer" for output in got) == len(machine.steps)
    end = [output for output in got if output.request_id == "prompt"]
    assert tokens_of(end) == expected(LONG, SamplingParams(max_tokens=1, ignore_eos=True), 2000)
    engine.abort("answer")
    assert_conserved(engine)


def test_alone_a_prompt_takes_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, 0.05, 0.006)
    engine = make_engine(
        False, 800, max_model_len=2000, on_execute=machine.compute, max_num_batched_tokens=2048
    )
    engine.add(request("prompt", LONG, max_tokens=1))
    engine.step()
    assert len(machine.steps) == 1
    assert engine.num_requests == 0
    assert_conserved(engine)


def test_a_device_that_works_on_its_own_is_not_paced() -> None:
    engine = make_engine(True, 800, max_model_len=2000, max_num_batched_tokens=2048)
    engine.add(request("answer", [5, 6, 7], max_tokens=50, ignore_eos=True))
    engine.step()
    engine.step()
    engine.add(request("prompt", LONG, max_tokens=1))
    engine.step()
    assert max(len(row.token_ids) for row in engine.runner.plans[-1].rows) == len(LONG)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0, 100), st.integers(0, 300), st.integers(0, 2048), st.integers(0, 2048)),
        max_size=30,
    )
)
def test_whatever_steps_took_prompts_advance(steps: list[tuple[float, int, int, int]]) -> None:
    pace = Pace()
    for seconds, answers, plain, scored in steps:
        pace.took(seconds, answers=answers, plain=plain, scored=scored)
        assert pace.most(answers, scored=False) >= MIN_TOKENS
        assert pace.most(answers, scored=True) >= MIN_TOKENS


def test_two_prompts_share_the_time_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, 0.05, 0.004)
    engine = make_engine(
        False, 800, max_model_len=2000, on_execute=machine.compute, max_num_batched_tokens=2048
    )
    engine.add(request("answer", [5, 6, 7], max_tokens=300, ignore_eos=True))
    for _ in range(10):
        engine.step()
    engine.add(request("first", LONG[:200], max_tokens=1))
    engine.add(request("second", LONG[100:400], max_tokens=1))
    machine.steps.clear()
    while engine.num_requests > 1:
        engine.step()
    assert max(took for _, took in machine.steps) <= 0.05 + 0.004 * FIRST_TOKENS
