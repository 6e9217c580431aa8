"""The engine over a runner that shows every mistake: batching is invisible, every request ends once."""

from __future__ import annotations

import functools
import random
from collections import Counter
from collections.abc import Callable

import msgspec
import pytest
import torch
from fake_runner import (
    EOS,
    VOCAB,
    assert_conserved,
    context_hash,
    expected,
    logits_of,
    make_engine,
    request,
    run,
    tokens_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule
from toy_constraints import ToyService

from gqa_serve.engine import constrained, hidden_rows
from gqa_serve.engine.batch import StepPlan
from gqa_serve.engine.metrics import BlockState
from gqa_serve.engine.request import Request, SamplingParams, TokenOutput
from gqa_serve.engine.sampler import Sample
from gqa_serve.errors import ContextLengthError, RequestError


@pytest.fixture(scope="module", params=[False, True], ids=["at_once", "ahead"])
def lookahead(request: pytest.FixtureRequest) -> bool:
    """Whether a step is launched before the one before it is collected."""
    return request.param


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(4, VOCAB), k=length)


def test_one_request_generates_what_the_oracle_does(lookahead: bool) -> None:
    engine = make_engine(lookahead)
    engine.add(request("a", prompt_of(11), max_tokens=20))
    outputs = run(engine)["a"]
    assert tokens_of(outputs) == expected(prompt_of(11), SamplingParams(max_tokens=20, ignore_eos=True))
    assert [o.finish_reason for o in outputs] == [None] * 19 + ["length"]
    assert_conserved(engine)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 20)), min_size=1, max_size=12),
    num_blocks=st.integers(16, 40),
    budget=st.integers(4, 40),
    caching=st.booleans(),
    shared=st.integers(0, 30),
    arrivals=st.randoms(use_true_random=False),
)
def test_batching_chunking_reuse_and_preemption_are_invisible(
    lookahead: bool,
    lengths: list[tuple[int, int]],
    num_blocks: int,
    budget: int,
    caching: bool,
    shared: int,
    arrivals: random.Random,
) -> None:
    engine = make_engine(
        lookahead, num_blocks, max_num_batched_tokens=budget, max_num_seqs=4, prefix_caching=caching
    )
    common = prompt_of(shared, 99)
    wanted, outputs = {}, {}
    pending = [
        (f"r{i}", (common + prompt_of(40, i))[:length], max_tokens)
        for i, (length, max_tokens) in enumerate(lengths)
    ]
    while pending or engine.has_work:
        while pending and arrivals.random() < 0.4:
            name, prompt, max_tokens = pending.pop()
            engine.add(request(name, prompt, max_tokens=max_tokens, priority=arrivals.choice([0, 0, 1])))
            wanted[name] = expected(prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=True))
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
        assert_conserved(engine)
        assert all(plan.num_tokens <= budget for plan in engine.runner.plans[-1:])
    assert {name: tokens_of(o) for name, o in outputs.items()} == wanted
    for parts in outputs.values():
        assert [part.finish_reason is not None for part in parts] == [False] * (len(parts) - 1) + [True]


def test_preemption_happens_in_a_small_pool_and_changes_nothing(lookahead: bool) -> None:
    engine = make_engine(lookahead, num_blocks=12, max_num_batched_tokens=64)
    for i in range(6):
        engine.add(request(f"r{i}", prompt_of(7, i), max_tokens=24))
    outputs = run(engine)
    assert engine.scheduler.num_preemptions > 0
    for i in range(6):
        wanted = expected(prompt_of(7, i), SamplingParams(max_tokens=24, ignore_eos=True))
        assert tokens_of(outputs[f"r{i}"]) == wanted


def test_the_first_in_order_is_never_preempted_and_keeps_its_count_of_cached_tokens(lookahead: bool) -> None:
    engine = make_engine(lookahead, num_blocks=12, max_num_batched_tokens=64)
    for i in range(6):
        engine.add(request(f"r{i}", prompt_of(7, i), max_tokens=24))
    cached = {}
    while engine.has_work:
        for output in engine.step():
            cached.setdefault(output.request_id, set()).add(output.num_cached_tokens)
        assert "r0" not in [r.request_id for r in engine.scheduler.waiting]
    assert engine.scheduler.num_preemptions > 0
    assert all(values == {0} for values in cached.values())  # finding its own blocks again is no prefix hit


def test_nobody_is_admitted_into_room_that_running_requests_are_about_to_need(lookahead: bool) -> None:
    # 6 blocks of 4: two requests hold 2 each and need a third each for their 9th token.
    engine = make_engine(lookahead, num_blocks=6, max_model_len=24, prefix_caching=False)
    for name in ("a", "b"):
        engine.add(request(name, prompt_of(7), max_tokens=3))
    engine.step()
    engine.add(request("later", prompt_of(7, 1), max_tokens=3))
    run(engine)
    assert engine.scheduler.num_preemptions == 0


def test_a_prompt_scored_twice_because_of_preemption_has_one_entry_per_token(lookahead: bool) -> None:
    engine = make_engine(lookahead, num_blocks=12, max_num_batched_tokens=8, max_num_seqs=4)
    for i in range(2):
        engine.add(request(f"old{i}", prompt_of(4, i), max_tokens=20))
    engine.step()
    engine.add(request("scored", prompt_of(28, 5), prompt_logprobs=0, max_tokens=1))
    preempted = False
    outputs = []
    while engine.has_work:
        partly = {r.request_id for r in engine.scheduler.running if r.request_id == "scored"}
        outputs += engine.step()
        preempted |= bool(partly) and "scored" in {r.request_id for r in engine.scheduler.waiting}
    assert preempted
    scored = next(o for o in outputs if o.request_id == "scored")
    assert scored.prompt_logprobs is not None
    assert [entry is None for entry in scored.prompt_logprobs] == [True] + [False] * 27


def test_equal_blocks_after_different_beginnings_are_different(lookahead: bool) -> None:
    engine = make_engine(lookahead, block_size=4)
    first, second, block = prompt_of(4, 1), prompt_of(4, 2), prompt_of(4, 3)
    for number, prompt in enumerate([first + block, second]):
        engine.add(request(f"r{number}", [*prompt, 50], max_tokens=1))
        run(engine)
    engine.add(request("last", [*second, *block, 50]))
    outputs = run(engine)["last"]
    assert outputs[0].num_cached_tokens == 4
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    assert tokens_of(outputs) == expected([*second, *block, 50], params)


def test_a_chain_is_evicted_from_its_end(lookahead: bool) -> None:
    engine = make_engine(lookahead, num_blocks=8, block_size=4, max_model_len=32)
    chain = prompt_of(12, 1)
    engine.add(request("chain", [*chain, 50], max_tokens=1))
    run(engine)
    engine.add(request("other", prompt_of(24, 2), max_tokens=1))  # takes the untouched blocks and one of ours
    run(engine)
    engine.add(request("again", [*chain, 50], max_tokens=1))
    assert run(engine)["again"][0].num_cached_tokens == 8


def test_others_are_admitted_past_a_sibling_that_waits(lookahead: bool) -> None:
    engine = make_engine(lookahead, max_num_batched_tokens=16)
    for name in ("c0", "c1"):
        engine.add(request(name, prompt_of(14), group="g"))
    engine.add(request("x", prompt_of(2, 1)))
    engine.step()
    assert [len(row.token_ids) for row in engine.runner.plans[0].rows] == [14, 2]


def test_the_count_of_failed_steps_starts_again_after_a_success(lookahead: bool) -> None:
    fail = {"now": False}

    def on_execute(plan: object) -> None:
        if fail["now"]:
            raise RuntimeError("injected")

    engine = make_engine(lookahead, on_execute=on_execute)
    for planned in (True, True, False, True):
        fail["now"] = planned
        engine.add(request(f"r{planned}", prompt_of(3), max_tokens=1))
        engine.step()
    assert engine.num_failed_steps == 1


def test_seeded_sampling_is_the_same_alone_and_in_a_preempting_crowd(lookahead: bool) -> None:
    def seeded(name: str) -> object:
        return request(name, prompt_of(9), max_tokens=24, temperature=1.0, seed=7, top_p=0.9)

    alone = make_engine(lookahead)
    alone.add(seeded("x"))
    crowd = make_engine(lookahead, num_blocks=12, max_num_batched_tokens=9, prefix_caching=False)
    for i in range(5):
        crowd.add(request(f"r{i}", prompt_of(7, i), max_tokens=24, temperature=1.0))
    crowd.add(seeded("x"))
    assert tokens_of(run(alone)["x"]) == tokens_of(run(crowd)["x"])
    assert crowd.scheduler.num_preemptions > 0


def test_engine_seed_makes_unseeded_requests_repeatable(lookahead: bool) -> None:
    def once(seed: int | None) -> list[int]:
        engine = make_engine(lookahead, seed=seed)
        engine.add(request("a", prompt_of(5), temperature=1.0, max_tokens=16))
        return tokens_of(run(engine)["a"])

    assert once(1) == once(1)
    assert once(1) != once(2)
    assert once(None) != once(None)


def test_a_prompt_seen_before_is_found_in_the_cache_but_for_its_last_token(lookahead: bool) -> None:
    engine = make_engine(lookahead, block_size=4)
    engine.add(request("a", prompt_of(16)))
    first = run(engine)["a"]
    engine.add(request("b", prompt_of(16)))
    second = run(engine)["b"]
    assert first[0].num_cached_tokens == 0
    assert second[0].num_cached_tokens == 12  # the fourth block would leave nothing to compute
    assert tokens_of(first) == tokens_of(second)


def test_cache_salt_separates_prefixes(lookahead: bool) -> None:
    engine = make_engine(lookahead)
    for name, salt in (("a", "x"), ("b", "y"), ("c", "x")):
        spec = request(name, prompt_of(16))
        import msgspec

        engine.add(msgspec.structs.replace(spec, cache_salt=salt))
        cached = run(engine)[name][0].num_cached_tokens
        assert cached == (12 if name == "c" else 0)


@pytest.mark.parametrize("caching", [True, False])
def test_choices_of_a_group_compute_the_shared_prompt_once(lookahead: bool, caching: bool) -> None:
    engine = make_engine(lookahead, max_num_batched_tokens=64, prefix_caching=caching)
    for i in range(4):
        engine.add(request(f"c{i}", prompt_of(17), group="g", temperature=1.0, seed=i, max_tokens=3))
    outputs = run(engine)
    computed = sum(plan.num_tokens for plan in engine.runner.plans)
    # 17 once; 16 found and 1 computed for each of the three siblings; two decode steps for each of four
    assert computed == 17 + 3 * 1 + 4 * 2
    assert len({tuple(tokens_of(o)) for o in outputs.values()}) > 1
    if not caching:
        engine.add(request("later", prompt_of(17)))
        assert run(engine)["later"][0].num_cached_tokens == 0


def test_siblings_go_on_when_the_first_of_the_group_is_aborted(lookahead: bool) -> None:
    engine = make_engine(lookahead, max_num_batched_tokens=8, max_num_seqs=8)
    for i in range(3):
        engine.add(request(f"c{i}", prompt_of(30), group="g"))
    engine.step()
    engine.abort("c0")
    outputs = run(engine)
    assert set(outputs) == {"c1", "c2"}
    assert_conserved(engine)


def test_decoding_advances_in_every_step_beside_a_long_prompt(lookahead: bool) -> None:
    engine = make_engine(lookahead, num_blocks=64, max_num_batched_tokens=8)
    engine.add(request("decoding", prompt_of(3), max_tokens=30))
    engine.step()
    engine.add(request("long", prompt_of(50)))
    for _ in range(6):
        assert "decoding" in {output.request_id for output in engine.step()}


def test_lower_priority_numbers_run_first(lookahead: bool) -> None:
    engine = make_engine(lookahead, max_num_seqs=1, max_num_batched_tokens=8)
    engine.add(request("late", prompt_of(4), priority=1, max_tokens=2))
    engine.add(request("soon", prompt_of(4, 1), priority=0, max_tokens=2))
    ended = []
    while engine.has_work:
        ended += [o.request_id for o in engine.step() if o.finish_reason]
    assert ended == ["soon", "late"]


def test_eos_stop_token_min_tokens_and_ignore_eos(lookahead: bool) -> None:
    prompt = prompt_of(5)
    stream = expected(prompt, SamplingParams(max_tokens=12, ignore_eos=True))
    engine = make_engine(lookahead)
    engine.add(request("stop", prompt, max_tokens=12, stop_token_ids=[stream[4]]))
    (*_, last) = outputs = run(engine)["stop"]
    first = stream.index(stream[4])
    assert tokens_of(outputs) == stream[: first + 1]
    assert (last.finish_reason, last.stop_token_id) == ("stop", stream[4])

    engine.add(request("min", prompt, max_tokens=12, stop_token_ids=[stream[4]], min_tokens=8))
    assert stream[4] not in tokens_of(run(engine)["min"])[:8]


def test_eos_ends_unless_ignored(lookahead: bool) -> None:
    # A bias makes the end-of-sequence token certain.
    engine = make_engine(lookahead)
    engine.add(request("ends", prompt_of(5), ignore_eos=False, logit_bias={EOS: 100.0}))
    engine.add(request("goes on", prompt_of(5), ignore_eos=True, logit_bias={EOS: 100.0}, max_tokens=5))
    engine.add(request("min", prompt_of(5), ignore_eos=False, logit_bias={EOS: 100.0}, min_tokens=3))
    outputs = run(engine)
    assert tokens_of(outputs["ends"]) == [EOS]
    assert outputs["ends"][-1].finish_reason == "stop"
    assert tokens_of(outputs["goes on"]) == [EOS] * 5
    assert outputs["goes on"][-1].finish_reason == "length"
    assert tokens_of(outputs["min"]).index(EOS) == 3


def test_end_tokens_of_a_request_end_it_as_the_models_own_do(lookahead: bool) -> None:
    prompt = prompt_of(5)
    stream = expected(prompt, SamplingParams(max_tokens=12, ignore_eos=True))
    end = stream[4]
    first = stream.index(end)
    engine = make_engine(lookahead)
    for name, more in {"ends": {}, "goes on": {"ignore_eos": True}, "min": {"min_tokens": 8}}.items():
        spec = request(name, prompt, **{"max_tokens": 12, "ignore_eos": False, **more})
        engine.add(msgspec.structs.replace(spec, end_token_ids=(end,)))
    outputs = run(engine)
    assert tokens_of(outputs["ends"]) == stream[: first + 1]
    last = outputs["ends"][-1]
    assert (last.finish_reason, last.stop_token_id) == ("stop", end)
    assert tokens_of(outputs["goes on"]) == stream
    assert end not in tokens_of(outputs["min"])[:8]
    with pytest.raises(RequestError, match="end_token_ids"):
        engine.add(msgspec.structs.replace(request("bad", prompt), end_token_ids=(10**6,)))


def test_the_context_length_ends_a_request(lookahead: bool) -> None:
    engine = make_engine(lookahead, max_model_len=20)
    engine.add(request("a", prompt_of(15), max_tokens=100))
    outputs = run(engine)["a"]
    assert len(tokens_of(outputs)) == 5
    assert outputs[-1].finish_reason == "length"


@pytest.mark.parametrize(
    ("spec", "error"),
    [
        (request("a", []), RequestError),
        (request("a", [VOCAB]), RequestError),
        (request("a", [-1]), RequestError),
        (request("a", [5] * 64), ContextLengthError),
        (request("a", [5], temperature=-1.0), RequestError),
        (request("a", [5], logit_bias={VOCAB: 1.0}), RequestError),
    ],
)
def test_what_cannot_be_computed_is_refused(lookahead: bool, spec: object, error: type[Exception]) -> None:
    engine = make_engine(lookahead)
    with pytest.raises(error):
        engine.add(spec)
    assert not engine.has_work


@pytest.mark.parametrize("budget", [4, 7, 64])
def test_prompt_logprobs_score_every_prompt_token(
    lookahead: bool, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hidden_rows, "SCORING_ROWS", 4)
    prompt = prompt_of(19)
    engine = make_engine(lookahead, max_num_batched_tokens=budget, max_num_seqs=4)
    engine.add(request("warm", prompt))  # fills the prefix cache, which scoring must not use
    run(engine)
    engine.add(request("a", prompt, prompt_logprobs=2, max_tokens=0))
    (only,) = run(engine)["a"]
    assert only.finish_reason == "length"
    assert only.token_ids == []
    assert only.prompt_logprobs is not None
    assert only.prompt_logprobs[0] is None
    assert len(only.prompt_logprobs) == 19
    for position, entry in enumerate(only.prompt_logprobs[1:], 1):
        logprobs = torch.log_softmax(
            logits_of(torch.tensor([context_hash(prompt[:position])]))[0].double(), -1
        )
        assert entry is not None
        assert entry.token_id == prompt[position]
        assert entry.logprob == pytest.approx(float(logprobs[prompt[position]]), abs=1e-5)
        assert [token for token, _ in entry.top] == logprobs.topk(2).indices.tolist()


def test_a_step_that_raises_fails_only_its_requests(lookahead: bool) -> None:
    fail = {"now": False}

    def on_execute(plan: object) -> None:
        if fail["now"]:
            raise RuntimeError("injected")

    engine = make_engine(lookahead, on_execute=on_execute, max_num_seqs=2, max_num_batched_tokens=32)
    for i in range(4):
        engine.add(request(f"r{i}", prompt_of(5, i)))
    engine.step()
    fail["now"] = True
    failed = engine.step()
    fail["now"] = False
    if lookahead:  # the step launched before it went well
        assert [(o.request_id, len(o.token_ids), o.finish_reason) for o in failed[:2]] == [
            ("r0", 1, None),
            ("r1", 1, None),
        ]
        failed = failed[2:]
    assert {o.request_id: o.finish_reason for o in failed} == {"r0": "error", "r1": "error"}
    assert all("RuntimeError" in (o.error or "") for o in failed)
    assert_conserved(engine)
    outputs = run(engine)
    for i in (2, 3):
        assert tokens_of(outputs[f"r{i}"]) == expected(
            prompt_of(5, i), SamplingParams(max_tokens=8, ignore_eos=True)
        )


def test_logits_that_are_not_finite_fail_only_their_row(lookahead: bool) -> None:
    engine = make_engine(lookahead)
    original = engine.runner.logits

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        values = original(hidden)
        values[0, 5] = float("nan")
        return values

    engine.add(request("bad", prompt_of(5)))
    engine.add(request("good", prompt_of(6)))
    engine.runner.logits = logits
    outputs = engine.step()
    engine.runner.logits = original
    if lookahead:  # the next step is launched on a row that has no token
        outputs += engine.step()
    assert {o.request_id: o.finish_reason for o in outputs} == {"bad": "error", "good": None}
    good = outputs + run(engine)["good"]
    # not the oracle's: its first token was chosen from other logits
    assert len(tokens_of(good)) == 8
    assert good[-1].finish_reason == "length"
    assert engine.num_discarded_tokens == lookahead


@pytest.mark.parametrize(
    "params",
    [
        {"repetition_penalty": 0.01, "temperature": 1.0},
        {"min_tokens": 2, "stop_token_ids": list(range(VOCAB)), "temperature": 1.0},
        {"min_tokens": 2, "stop_token_ids": list(range(VOCAB))},
        {"logit_bias": dict.fromkeys(range(VOCAB), -100.0), "temperature": 2.0, "logprobs": 20},
        {
            "frequency_penalty": -2.0,
            "presence_penalty": 2.0,
            "repetition_penalty": 100.0,
            "temperature": 1e-4,
        },
        {"top_k": -1, "top_p": 1e-9, "min_p": 1.0, "temperature": 2.0, "seed": -(2**63)},
    ],
)
def test_extreme_parameters_never_touch_a_neighbour(lookahead: bool, params: dict[str, object]) -> None:
    engine = make_engine(lookahead)
    engine.add(request("neighbour", prompt_of(5), max_tokens=10))
    for number in range(3):
        engine.add(request(f"extreme{number}", prompt_of(6, number), **{"max_tokens": 6, **params}))
    outputs = run(engine)
    assert engine.num_failed_steps == 0
    assert tokens_of(outputs["neighbour"]) == expected(
        prompt_of(5), SamplingParams(max_tokens=10, ignore_eos=True)
    )
    for number in range(3):
        assert all(0 <= token < VOCAB for token in tokens_of(outputs[f"extreme{number}"]))
        assert outputs[f"extreme{number}"][-1].finish_reason in ("length", "error")


# --- looking ahead ---


def greedy(prompt: list[int], max_tokens: int) -> list[int]:
    return expected(prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=True))


def test_a_step_is_launched_on_tokens_that_only_the_device_knows() -> None:
    engine = make_engine(True)
    engine.add(request("a", prompt_of(5), max_tokens=3))
    engine.add(request("b", prompt_of(6, 1), max_tokens=3))
    assert engine.step() == []
    first = engine.step()
    assert [len(output.token_ids) for output in first] == [1, 1]
    _, second = engine.runner.plans
    assert [(row.token_ids, row.start, row.previous_row) for row in second.rows] == [([0], 5, 0), ([0], 6, 1)]
    run(engine)


def test_a_request_known_to_end_is_not_computed_again(lookahead: bool) -> None:
    engine = make_engine(lookahead, max_model_len=20)
    engine.add(request("tokens", prompt_of(5), max_tokens=4))
    engine.add(request("context", prompt_of(11, 1), max_tokens=100))
    outputs = run(engine)
    assert (len(tokens_of(outputs["tokens"])), len(tokens_of(outputs["context"]))) == (4, 9)
    assert [len(plan.rows) for plan in engine.runner.plans] == [2] * 4 + [1] * 5
    assert engine.num_discarded_tokens == 0


def test_what_was_computed_for_an_ended_request_is_discarded_once(lookahead: bool) -> None:
    prompt = prompt_of(5)
    stream = greedy(prompt, 12)
    stop = next(token for i, token in enumerate(stream) if i >= 3 and token not in stream[:i])
    engine = make_engine(lookahead)
    engine.add(request("stops", prompt, max_tokens=12, stop_token_ids=[stop]))
    engine.add(request("goes on", prompt_of(6, 1), max_tokens=12))
    outputs: dict[str, list[TokenOutput]] = {"stops": [], "goes on": []}
    while not any(output.finish_reason for output in outputs["stops"]):
        for output in engine.step():
            outputs[output.request_id].append(output)
    assert engine.scheduler.get("stops") is None
    assert_conserved(engine)  # its blocks are free though the step in flight writes to one
    outputs["goes on"] += run(engine)["goes on"]
    assert tokens_of(outputs["stops"]) == stream[: stream.index(stop) + 1]
    assert tokens_of(outputs["goes on"]) == expected(
        prompt_of(6, 1), SamplingParams(max_tokens=12, ignore_eos=True)
    )
    assert engine.num_discarded_tokens == lookahead


def test_a_block_freed_under_a_step_in_flight_belongs_to_who_gets_it_next() -> None:
    engine = make_engine(True, num_blocks=4, max_model_len=16)
    engine.add(request("gone", prompt_of(13), max_tokens=3))
    engine.step()
    engine.abort("gone")
    engine.add(request("next", prompt_of(12, 1), max_tokens=4))
    outputs = run(engine)
    assert set(outputs) == {"next"}
    assert tokens_of(outputs["next"]) == expected(
        prompt_of(12, 1), SamplingParams(max_tokens=4, ignore_eos=True)
    )
    assert engine.num_discarded_tokens == 1


def test_penalties_wait_for_the_last_token_and_only_they_do() -> None:
    engine = make_engine(True)
    engine.add(request("free", prompt_of(5), max_tokens=12))
    engine.add(request("penalised", prompt_of(30, 1), max_tokens=3, frequency_penalty=2.0))
    outputs = run(engine)
    waits = [all(row.previous_row < 0 for row in plan.rows) for plan in engine.runner.plans]
    # the prompt takes three steps; its token and the next two are chosen with the ones before them known
    assert waits == [True, False, False, True, True] + [False] * (len(waits) - 5)
    assert tokens_of(outputs["penalised"]) == alone("penalised", 30, 1)[0][:3]
    assert tokens_of(outputs["free"]) == expected(
        prompt_of(5), SamplingParams(max_tokens=12, ignore_eos=True)
    )


def test_a_step_that_cannot_be_collected_fails_and_so_does_what_was_launched_on_it(lookahead: bool) -> None:
    failing = []

    def on_collect() -> None:
        if failing:
            raise RuntimeError(failing.pop())

    engine = make_engine(lookahead, on_collect=on_collect, max_num_batched_tokens=8, max_num_seqs=2)
    engine.add(request("first", prompt_of(8)))
    engine.add(request("second", prompt_of(4, 1)))
    engine.add(request("third", prompt_of(4, 2)))
    if lookahead:
        engine.step()  # "first" is in flight, and will be under "second"
    failing.append("injected")
    failed = engine.step()
    assert {o.request_id: o.finish_reason for o in failed} == dict.fromkeys(
        ["first", "second"] if lookahead else ["first"], "error"
    )
    assert all("RuntimeError" in (o.error or "") for o in failed)
    assert engine.num_failed_steps == 1
    assert_conserved(engine)
    assert not engine.scheduler.kv.pool._entries  # nothing of a failed step may be found in the cache
    outputs = run(engine)
    assert tokens_of(outputs["third"]) == expected(
        prompt_of(4, 2), SamplingParams(max_tokens=8, ignore_eos=True)
    )
    assert engine.num_failed_steps == 0


def test_a_request_preempted_under_a_step_in_flight_keeps_the_token_of_that_step() -> None:
    engine = make_engine(True, num_blocks=6, max_num_batched_tokens=64, max_model_len=24)
    engine.add(request("a", prompt_of(7), max_tokens=16))
    engine.add(request("b", prompt_of(7, 1), max_tokens=16))
    outputs: dict[str, list[TokenOutput]] = {"a": [], "b": []}
    unknown = []
    while engine.has_work:
        preemptions = engine.scheduler.num_preemptions
        step = engine._collect

        def collect(before: int = preemptions, step: Callable[[], list[TokenOutput]] = step) -> list:
            if engine.scheduler.num_preemptions > before:
                unknown.append([r.num_tokens - len(r.tokens) for r in engine.scheduler.waiting])
            return step()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine, "_collect", collect)
            for output in engine.step():
                outputs[output.request_id].append(output)
        assert all(r.num_tokens == len(r.tokens) for r in engine.scheduler.waiting)
    assert [1] in unknown
    for number, name in enumerate("ab"):
        wanted = greedy(prompt_of(7, number), 16)
        assert tokens_of(outputs[name]) == wanted


def test_an_engine_whose_requests_are_all_aborted_still_collects() -> None:
    engine = make_engine(True)
    engine.add(request("a", prompt_of(5)))
    engine.step()
    engine.abort("a")
    assert (engine.num_requests, engine.has_work) == (0, True)
    assert engine.step() == []
    assert not engine.has_work
    assert engine.num_discarded_tokens == 1


@settings(max_examples=25, deadline=None)
@given(
    requests=st.lists(
        st.tuples(st.sampled_from([1, 5, 16, 23]), st.integers(0, 2), st.integers(1, 12)),
        min_size=1,
        max_size=6,
    ),
    temperature=st.sampled_from([0.0, 1.0]),
)
def test_both_ways_find_the_same_prefixes_and_tokens(
    requests: list[tuple[int, int, int]], temperature: float
) -> None:
    def serve(lookahead: bool) -> list[tuple[int, list[int]]]:
        engine = make_engine(lookahead)
        results = []
        for number, (length, like, max_tokens) in enumerate(requests):  # one after the other
            name = f"r{number}"
            engine.add(
                request(name, prompt_of(40, like)[:length], max_tokens=max_tokens, temperature=temperature)
            )
            outputs = run(engine)[name]
            results.append((outputs[0].num_cached_tokens, tokens_of(outputs)))
        return results

    assert serve(True) == serve(False)


KINDS: dict[str, dict[str, object]] = {
    "greedy": {},
    "stops": {"stop_token_ids": list(range(4, 30))},
    "late stop": {"stop_token_ids": list(range(4, 30)), "min_tokens": 3},
    "seeded": {"temperature": 1.0, "seed": 5, "top_p": 0.9},
    "penalised": {"frequency_penalty": 2.0, "repetition_penalty": 1.5},
    "scored": {"prompt_logprobs": 1, "logprobs": 1},
    "scored only": {"prompt_logprobs": 0, "max_tokens": 0},
    "one token": {"max_tokens": 1},
    "allowed": {"allowed_token_ids": [5, 7, 11], "temperature": 1.0, "seed": 3},
    "last state": {"max_tokens": 0, "pooling": "last"},
    "mean state": {"max_tokens": 0, "pooling": "mean"},
    "constrained": {"grammar": "toy:1:40"},
    "constrained whole": {"grammar": "toy:2:4", "ignore_eos": False},
    "constrained, many": {"grammar": "toy:3:40", "max_tokens": 20, "temperature": 1.0, "seed": 3},
    "constrained, scored": {"grammar": "toy:4:40", "logprobs": 1, "prompt_logprobs": 1},
    "constrained, stops": {"grammar": "toy:5:40", "min_tokens": 2, "stop_token_ids": list(range(4, 40))},
    "constrained, penalised": {"grammar": "toy:6:9", "frequency_penalty": 2.0},
}


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constrained, "PATIENCE_S", 0.0)


@functools.cache
def alone(kind: str, length: int, like: int) -> tuple[list[int], object]:
    """Tokens of a request that has the engine to itself, and what its first output tells of the prompt."""
    engine = make_engine(False, num_blocks=14, constraints=ToyService(forcing=False))
    engine.add(request("x", prompt_of(40, like)[:length], **{"max_tokens": 6, **KINDS[kind]}))
    outputs = run(engine)["x"]
    return tokens_of(outputs), (outputs[0].prompt_logprobs, outputs[0].pooled)


COUNTS = ("num_queried_tokens", "num_hit_tokens", "num_preemptions", "num_discarded_tokens")


class EngineMachine(RuleBasedStateMachine):
    """Any interleaving of adds, aborts, failures, shortages of memory and steps conserves blocks, ends each
    request once, and gives each what it gets alone, up to where it ended. What steps count adds up."""

    lookahead: bool
    ids = Bundle("ids")

    def __init__(self) -> None:
        super().__init__()
        self.failing = ""
        self.memory = 9  # tokens that may be computed at once
        self.totals: Counter[str] = Counter()
        self.service = ToyService(patient=True)
        self.engine = make_engine(
            self.lookahead,
            constraints=self.service,
            num_blocks=14,
            max_num_seqs=4,
            max_num_batched_tokens=9,
            on_execute=self._launch,
            on_collect=lambda: self._fault("collect"),
        )
        self.count = 0
        self.num_accepted = self.num_plans = 0
        self.accept, self.engine._accept = self.engine._accept, self._accept
        self.open: set[str] = set()
        self.wanted: dict[str, tuple[list[int], object]] = {}
        self.produced: dict[str, list[TokenOutput]] = {}

    def _accept(self, request: Request, sample: Sample) -> TokenOutput:
        self.num_accepted += 1
        return self.accept(request, sample)

    def _fault(self, where: str) -> None:
        if self.failing == where:
            raise RuntimeError("injected")

    def _launch(self, plan: StepPlan) -> None:
        self._fault("launch")
        if plan.num_tokens > self.memory or len(plan.rows) > self.memory:
            raise MemoryError

    def _add(self, name: str, kind: str, length: int, like: int, group: str | None = None) -> None:
        params = {"max_tokens": 6, **KINDS[kind]}
        prompt = prompt_of(40, like)[:length]
        self.engine.add(request(name, prompt, group=group, priority=like % 2, **params))
        self.open.add(name)
        self.wanted[name] = alone(kind, length, like)
        self.produced[name] = []

    @rule(
        target=ids,
        kind=st.sampled_from(list(KINDS)),
        length=st.integers(1, 40),
        like=st.integers(0, 3),
        n=st.sampled_from([1, 1, 3]),
    )
    def add(self, kind: str, length: int, like: int, n: int) -> str:
        self.count += 1
        for choice in range(n):
            self._add(f"r{self.count}-{choice}", kind, length, like, f"g{self.count}" if n > 1 else None)
        return f"r{self.count}-0"

    @rule(name=consumes(ids))
    def abort(self, name: str) -> None:
        assert self.engine.abort(name) == (name in self.open)
        self.open.discard(name)

    @rule(name=ids, kind=st.sampled_from(list(KINDS)), length=st.integers(1, 40))
    def another_of_the_same_name(self, name: str, kind: str, length: int) -> None:
        self.engine.abort(name)  # its tokens that are still on their way are not the new one's
        self._add(name, kind, length, 2)

    @rule(times=st.integers(1, 6))
    def step(self, times: int) -> None:
        for _ in range(times):
            self._take(self.engine.step())
            assert_conserved(self.engine)

    @rule(count=st.integers(1, 5))
    def constraints_come(self, count: int) -> None:
        self.service.release(count)

    @rule(where=st.sampled_from(["launch", "collect"]))
    def failing_step(self, where: str) -> None:
        self.failing = where
        try:
            self._take(self.engine.step())
        finally:
            self.failing = ""

    @rule(memory=st.integers(0, 9))
    def memory_runs_out(self, memory: int) -> None:
        """For one step, in which requests may end by that only if there is not the memory for one token."""
        self.memory = memory
        ended = self._take(self.engine.step())
        self.memory = 9
        assert memory == 0 or not any(output.finish_reason == "error" for output in ended)

    @rule(memory=st.integers(1, 8), times=st.integers(2, 12))
    def memory_is_short(self, memory: int, times: int) -> None:
        self.memory = memory
        for _ in range(times):
            self.step(1)
        self.memory = 9

    def _count(self) -> None:
        """What the last step says of itself, against what it did."""
        stats, scheduler = self.engine.stats, self.engine.scheduler
        for name in COUNTS:
            self.totals[name] += getattr(stats, name)
        plans = self.engine.runner.plans[self.num_plans :]
        self.num_plans += len(plans)
        assert stats.num_requests == sum(len(plan.rows) for plan in plans)
        assert stats.num_prompt_tokens + stats.num_decode_tokens == sum(plan.num_tokens for plan in plans)
        preparing = self.engine._constrained.requests
        waiting = scheduler.waiting + preparing
        assert (stats.num_running, stats.num_waiting) == (len(scheduler.running), len(waiting))
        assert stats.num_waiting_tokens == sum(request.num_prompt_tokens for request in waiting)
        assert stats.num_free_blocks == scheduler.kv.pool.num_free

    def _take(self, outputs: list[TokenOutput]) -> list[TokenOutput]:
        self._count()
        for output in outputs:
            assert output.request_id in self.open, "an output after the end"
            self.produced[output.request_id].append(output)
            if output.finish_reason is not None:
                self.open.discard(output.request_id)
        return outputs

    @invariant()
    def conserved(self) -> None:
        assert_conserved(self.engine)
        scheduler = self.engine.scheduler
        here = [r.request_id for r in scheduler.waiting + scheduler.running]
        here += self.engine._constrained._waiting
        assert sorted(here) == sorted(self.open)

    @invariant()
    def every_token_is_handed_out_or_discarded_once(self) -> None:
        collected = sum(pending.num_collected for pending in self.engine.sampler.launched)
        assert collected == self.num_accepted + self.engine.num_discarded_tokens

    @invariant()
    def counts_of_steps_add_up(self) -> None:
        scheduler = self.engine.scheduler
        assert [self.totals[name] for name in COUNTS] == [
            scheduler.num_queried_tokens,
            scheduler.num_hit_tokens,
            scheduler.num_preemptions,
            self.engine.num_discarded_tokens,
        ]

    @invariant()
    def the_snapshot_shows_what_there_is(self) -> None:
        picture, pool = self.engine.snapshot(), self.engine.scheduler.kv.pool
        wanted = [
            (BlockState.ACTIVE if count == 1 else BlockState.SHARED)
            if (count := pool._ref_counts[block])
            else (BlockState.CACHED if block in pool._key_of_block else BlockState.FREE)
            for block in range(pool.num_blocks)
        ]
        assert list(picture.blocks) == wanted
        assert pool.num_cached == picture.blocks.count(BlockState.CACHED)
        assert sorted(request.request_id for request in picture.requests) == sorted(self.open)
        for shown in picture.requests:
            assert (shown.num_blocks > 0) <= (shown.state == "running")
            assert (shown.state == "preparing") == (shown.request_id in self.engine._constrained)

    def teardown(self) -> None:
        self.service.release()
        for _ in range(2000):
            if not self.engine.has_work:
                break
            self._take(self.engine.step())
        assert not self.open
        assert_conserved(self.engine)
        assert self.engine.scheduler.kv.pool.num_free == 14
        for name, outputs in self.produced.items():
            tokens, of_prompt = self.wanted[name]
            whole = bool(outputs) and outputs[-1].finish_reason in ("length", "stop")
            assert tokens_of(outputs) == (tokens if whole else tokens[: len(tokens_of(outputs))])
            if outputs and outputs[0].finish_reason != "error":
                assert (outputs[0].prompt_logprobs, outputs[0].pooled) == of_prompt


class MachineAtOnce(EngineMachine):
    lookahead = False


class MachineAhead(EngineMachine):
    lookahead = True


TestMachineAtOnce = MachineAtOnce.TestCase
TestMachineAhead = MachineAhead.TestCase
for case in (TestMachineAtOnce, TestMachineAhead):
    case.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_chunk_that_samples_nothing_is_waited_for_like_any_step() -> None:
    """A prompt's middle chunk fails where it is collected: nothing of it may have been published by then."""
    fails = False

    def on_collect() -> None:
        if fails:
            raise RuntimeError("the device failed")

    engine = make_engine(True, on_collect=on_collect, max_num_batched_tokens=16)
    engine.add(request("a", range(5, 45)))
    assert engine.step() == []
    fails = True
    (output,) = engine.step()
    assert (output.request_id, output.finish_reason) == ("a", "error")
    assert not engine.scheduler.kv.pool._entries
    assert_conserved(engine)


# --- memory runs out in a step ---


SHORTAGES = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("std::bad_alloc"),
    OSError(12, "Cannot allocate memory"),
]


@pytest.mark.parametrize("shortage", SHORTAGES, ids=repr)
def test_a_step_that_is_too_large_is_computed_in_parts(lookahead: bool, shortage: Exception) -> None:
    def on_execute(plan: StepPlan) -> None:
        if plan.num_tokens > 3:
            raise shortage

    engine = make_engine(lookahead, on_execute=on_execute)
    for number in range(5):
        engine.add(request(f"r{number}", prompt_of(9, number)))
    num_shrunk, outputs = 0, {}
    while engine.has_work:
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
        num_shrunk += engine.stats.num_shrunk
        assert_conserved(engine)
    for number in range(5):
        assert tokens_of(outputs[f"r{number}"]) == greedy(prompt_of(9, number), 8)
    assert num_shrunk > 0


def test_memory_that_runs_out_while_sampling_changes_nothing_either(lookahead: bool) -> None:
    """The model has computed then, and penalties have counted."""
    engine = make_engine(lookahead)
    launch = engine.sampler.launch

    def launch_few(logits: torch.Tensor, requests: list[Request]) -> object:
        pending = launch(logits, requests)
        if len(requests) > 2:
            raise MemoryError
        return pending

    engine.sampler.launch = launch_few
    for number in range(5):
        engine.add(request(f"r{number}", prompt_of(30, 1), **KINDS["penalised"], max_tokens=6))
    outputs = run(engine)
    for number in range(5):
        assert tokens_of(outputs[f"r{number}"]) == alone("penalised", 30, 1)[0]


def test_a_request_too_large_for_memory_ends_alone(lookahead: bool) -> None:
    others = {f"r{number}": prompt_of(9, number) for number in range(4)}
    wanted = {name: greedy(ids, 8) for name, ids in others.items()}
    used = {token for ids in [*others.values(), *wanted.values()] for token in ids}
    large = next(token for token in range(4, VOCAB) if token not in used)

    def on_execute(plan: StepPlan) -> None:
        if any(large in row.token_ids for row in plan.rows):
            raise MemoryError

    engine = make_engine(lookahead, on_execute=on_execute, max_num_batched_tokens=32)
    for name, ids in others.items():
        engine.add(request(name, ids))
    engine.add(request("large", [5, 6, 7, large]))
    outputs = run(engine)
    (end,) = outputs.pop("large")
    assert end.finish_reason == "error"
    assert "not enough memory" in (end.error or "")
    assert {name: tokens_of(outputs) for name, outputs in outputs.items()} == wanted
    assert_conserved(engine)


def test_steps_grow_again_once_there_is_memory(lookahead: bool) -> None:
    memory = 4

    def on_execute(plan: StepPlan) -> None:
        if plan.num_tokens > memory:
            raise MemoryError

    engine = make_engine(lookahead, num_blocks=400, on_execute=on_execute, max_num_batched_tokens=32)
    for number in range(8):
        engine.add(request(f"r{number}", prompt_of(40, number)))
    for _ in range(4):
        engine.step()
    memory = 32
    sizes = []
    while engine.has_work:
        engine.step()
        assert not engine.stats.num_shrunk
        sizes.append(engine.stats.num_prompt_tokens + engine.stats.num_decode_tokens)
    assert max(sizes) == 32


def test_a_shortage_that_stays_ends_every_request_and_tells_the_process(lookahead: bool) -> None:
    def on_execute(plan: StepPlan) -> None:
        raise MemoryError

    engine = make_engine(lookahead, on_execute=on_execute)
    for number in range(4):
        engine.add(request(f"r{number}", prompt_of(4, number)))
    outputs = run(engine)
    assert {name: parts[-1].finish_reason for name, parts in outputs.items()} == dict.fromkeys(
        [f"r{number}" for number in range(4)], "error"
    )
    assert engine.num_failed_steps == 4  # one each: the process gives way to a fresh one
    assert_conserved(engine)


# --- what is counted of steps ---


def test_a_step_counts_what_it_computes_and_who_begins() -> None:
    engine = make_engine(False, max_num_batched_tokens=8, max_num_seqs=2)
    engine.add(request("a", prompt_of(5), max_tokens=3))
    engine.add(request("b", prompt_of(6, 1), max_tokens=3))
    engine.add(request("c", prompt_of(7, 2), max_tokens=3))
    seen, begun = [], []
    engine.on_begin = begun.append
    for _ in range(3):
        engine.step()
        stats = engine.stats
        seen.append((stats.phase, stats.num_prompt_tokens, stats.num_decode_tokens))
    assert seen == [
        ("prefill", 8, 0),
        ("mixed", 3, 1),
        ("decode", 0, 2),
    ]
    assert begun == [["a", "b"]]
    assert (stats.num_running, stats.num_waiting, stats.num_waiting_tokens) == (1, 1, 7)
    assert stats.num_queried_tokens == 0
    engine.step()
    assert (begun[1:], engine.stats.num_queried_tokens) == ([["c"]], 7)
    run(engine)
    assert (engine.stats.num_running, engine.stats.num_waiting, engine.stats.num_waiting_tokens) == (0, 0, 0)
    assert engine.stats.num_free_blocks == 64
    assert engine.stats.step_s >= engine.stats.schedule_s + engine.stats.forward_s + engine.stats.sample_s > 0


def test_the_queue_is_searched_by_order_not_from_its_beginning(lookahead: bool) -> None:
    engine = make_engine(lookahead)
    for number in range(200):
        engine.add(request(f"r{number}", prompt_of(5, number), priority=number % 3))
    engine.step()
    names = [f"r{number}" for number in range(200)]
    random.Random(0).shuffle(names)
    for name in names:
        assert engine.abort(name)
        assert not engine.abort(name)
    assert engine.scheduler.num_waiting_tokens == 0
    run(engine)
    assert_conserved(engine)
