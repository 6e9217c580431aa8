"""Constrained requests in the engine: forced tokens change nothing but the number of steps, endings are those
of sampling one by one, and nobody waits for another's grammar."""

from __future__ import annotations

import msgspec
import pytest
from fake_runner import EOS, VOCAB, assert_conserved, expected, make_engine, request, run, tokens_of
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_constraints import ToyService, allowed

from gqa_serve.engine.request import SamplingParams, TokenOutput
from gqa_serve.errors import RequestError

PROMPT = [5, 6, 7, 8, 9]


@pytest.fixture(params=[False, True], ids=["at_once", "ahead"])
def lookahead(request: pytest.FixtureRequest) -> bool:
    return request.param


def serve(lookahead: bool, *, forcing: bool = True, **params: object) -> tuple[list[TokenOutput], int]:
    """Outputs of one request, and the steps it took. All but `end_token_ids` are sampling parameters."""
    engine = make_engine(lookahead, constraints=ToyService(forcing=forcing))
    ends = params.pop("end_token_ids", ())
    engine.add(msgspec.structs.replace(request("a", PROMPT, **params), end_token_ids=ends))
    outputs = run(engine)["a"]
    assert_conserved(engine)
    return outputs, len(engine.runner.plans)


def ending(outputs: list[TokenOutput]) -> tuple[list[int], object]:
    assert [output.finish_reason is not None for output in outputs] == [False] * (len(outputs) - 1) + [True]
    last = outputs[-1]
    return tokens_of(outputs), (last.finish_reason, last.stop_token_id, last.error)


@settings(max_examples=150, deadline=None)
@given(
    lookahead=st.booleans(),
    seed=st.integers(0, 200),
    length=st.integers(1, 30),
    max_tokens=st.integers(1, 30),
    min_tokens=st.integers(0, 8),
    ignore_eos=st.booleans(),
    stops=st.booleans(),
    ends=st.booleans(),
    allows=st.booleans(),
    temperature=st.sampled_from([0.0, 1.0]),
)
def test_forced_tokens_change_nothing_but_the_number_of_steps(
    lookahead: bool,
    seed: int,
    length: int,
    max_tokens: int,
    min_tokens: int,
    ignore_eos: bool,
    stops: bool,
    ends: bool,
    allows: bool,
    temperature: float,
) -> None:
    params = {
        "grammar": f"toy:{seed}:{length}",
        "max_tokens": max_tokens,
        "min_tokens": min(min_tokens, max_tokens),
        "ignore_eos": ignore_eos,
        "stop_token_ids": list(range(4, 20)) if stops else [],
        "end_token_ids": tuple(range(20, 30)) if ends else (),
        "temperature": temperature,
        "seed": 7,
    }
    if allows:
        params |= {"allowed_token_ids": [EOS, *range(4, VOCAB, 2)], "min_tokens": 0}
    fast, few = serve(lookahead, **params)
    slow, many = serve(lookahead, forcing=False, **params)
    assert ending(fast) == ending(slow)
    assert few <= many
    tokens = tokens_of(fast)
    assert all(token in allowed(params["grammar"], place) for place, token in enumerate(tokens))
    if fast[-1].finish_reason == "length":
        assert len(tokens) == max_tokens


def test_forced_tokens_are_computed_as_one_chunk() -> None:
    name = next(
        f"toy:{s}:30"
        for s in range(99)
        if [len(allowed(f"toy:{s}:30", i)) for i in range(5)] == [13, 1, 1, 1, 12]
    )
    engine = make_engine(False, constraints=ToyService())
    engine.add(request("a", PROMPT, grammar=name, max_tokens=5))
    first = engine.step()
    assert [len(output.token_ids) for output in first] == [4]
    run(engine)
    assert [len(plan.rows[0].token_ids) for plan in engine.runner.plans] == [5, 4]


def test_tokens_that_must_come_first_are_computed_with_the_prompt() -> None:
    name = next(
        f"toy:{s}:30" for s in range(99) if [len(allowed(f"toy:{s}:30", i)) for i in range(3)] == [1, 1, 12]
    )
    engine = make_engine(False, constraints=ToyService())
    engine.add(request("a", PROMPT, grammar=name, max_tokens=3))
    (output,) = engine.step()
    assert len(output.token_ids) == 3
    assert [len(plan.rows[0].token_ids) for plan in engine.runner.plans] == [7]


def test_an_output_without_any_choice_needs_no_step(lookahead: bool) -> None:
    name = next(
        f"toy:{s}:2" for s in range(99) if [len(allowed(f"toy:{s}:2", i)) for i in range(2)] == [1, 1]
    )
    outputs, steps = serve(lookahead, grammar=name)
    assert (len(tokens_of(outputs)), outputs[-1].finish_reason, steps) == (2, "stop", 0)


def test_every_token_has_its_logprobs_if_they_are_wanted(lookahead: bool) -> None:
    outputs, steps = serve(lookahead, grammar="toy:1:12", max_tokens=12, logprobs=2)
    assert all(len(output.token_ids) == len(output.logprobs or []) == 1 for output in outputs)
    assert steps == 12 - (outputs[-1].finish_reason == "error")


def test_a_finished_output_ends_without_the_end_token(lookahead: bool) -> None:
    outputs, _ = serve(lookahead, grammar="toy:11:6", max_tokens=20)
    assert outputs[-1].finish_reason == "stop"
    assert EOS not in tokens_of(outputs)
    assert outputs[-1].stop_token_id is None


def test_a_request_whose_grammar_is_not_ready_holds_up_nobody(lookahead: bool) -> None:
    service = ToyService(patient=True)
    engine = make_engine(lookahead, constraints=service)
    engine.add(request("waits", PROMPT, grammar="toy:1:9"))
    assert (engine.has_work, engine.num_requests) == (True, 1)
    assert engine.step() == []
    engine.add(request("free", PROMPT))
    for _ in range(20):
        engine.step()
    assert engine.num_requests == 1
    with pytest.raises(RequestError, match="in use"):
        engine.add(request("waits", PROMPT))
    service.release()
    assert tokens_of(run(engine)["waits"])


def test_a_grammar_that_cannot_be_made_ends_its_request_alone(lookahead: bool) -> None:
    engine = make_engine(lookahead, constraints=ToyService())
    engine.add(request("bad", PROMPT, grammar="bad"))
    engine.add(request("good", PROMPT))
    outputs = run(engine)
    assert [(o.finish_reason, o.error, o.refused) for o in outputs["bad"]] == [("error", "bad grammar", True)]
    assert tokens_of(outputs["good"]) == expected(PROMPT, SamplingParams(max_tokens=8, ignore_eos=True))
    assert engine.num_failed_steps == 0


@pytest.mark.parametrize("where", ["append", "mask"])
@pytest.mark.parametrize("forcing", [False, True])
def test_a_constraint_that_fails_ends_its_request_alone(lookahead: bool, where: str, forcing: bool) -> None:
    engine = make_engine(lookahead, constraints=ToyService(forcing=forcing))
    engine.add(request("bad", PROMPT, grammar=f"toy:12:20:{where}", max_tokens=20))
    engine.add(request("good", PROMPT))
    outputs = run(engine)
    assert (outputs["bad"][-1].finish_reason, outputs["bad"][-1].error) == ("error", f"{where} failed")
    assert outputs["bad"][-1].refused
    assert tokens_of(outputs["good"]) == expected(PROMPT, SamplingParams(max_tokens=8, ignore_eos=True))
    assert engine.num_failed_steps == 0
    assert_conserved(engine)


def test_a_request_may_be_aborted_while_its_grammar_is_made(lookahead: bool) -> None:
    service = ToyService(patient=True)
    engine = make_engine(lookahead, constraints=service)
    engine.add(request("a", PROMPT, grammar="toy:1:9"))
    assert engine.abort("a")
    assert not engine.abort("a")
    assert not engine.has_work
    assert [future.cancelled() for future, _ in service.held] == [True]  # nobody waits for it
    service.release()
    assert engine.step() == []


def test_choices_of_one_prompt_share_its_blocks(lookahead: bool) -> None:
    engine = make_engine(lookahead, constraints=ToyService(), prefix_caching=False)
    prompt = list(range(4, 21))
    for choice in range(3):
        engine.add(request(f"a{choice}", prompt, group="a", grammar="toy:1:9", temperature=1.0, seed=choice))
    outputs = run(engine)
    assert [parts[0].num_cached_tokens for parts in outputs.values()] == [0, 16, 16]


def test_scoring_a_prompt_needs_no_grammar(lookahead: bool) -> None:
    outputs, _ = serve(lookahead, grammar="bad", max_tokens=0, prompt_logprobs=0)
    assert outputs[-1].finish_reason == "length"


def test_an_engine_without_grammars_says_so() -> None:
    with pytest.raises(RequestError, match="no grammars"):
        make_engine(False).add(request("a", PROMPT, grammar="toy:1:9"))


@pytest.mark.parametrize(("others", "taken"), [(7, True), (8, False)])
def test_a_busy_cpu_takes_no_forced_tokens_and_gives_the_same(others: int, taken: bool) -> None:
    name = next(
        f"toy:{s}:30"
        for s in range(99)
        if [len(allowed(f"toy:{s}:30", i)) > 1 for i in range(4)] == [True, False, False, True]
    )
    engine = make_engine(
        False, num_blocks=200, constraints=ToyService(), max_num_seqs=16, max_num_batched_tokens=200
    )
    for number in range(others):
        engine.add(request(f"free{number}", PROMPT, max_tokens=20))
    engine.add(request("a", PROMPT, grammar=name, max_tokens=5))
    outputs = run(engine)["a"]
    assert (max(len(output.token_ids) for output in outputs) > 1) == taken
    slow, _ = serve(False, forcing=False, grammar=name, max_tokens=5)
    assert tokens_of(outputs) == tokens_of(slow)


def test_nobody_waits_for_anothers_mask() -> None:
    service = ToyService()
    engine = make_engine(False, constraints=service)
    params = {"max_tokens": 12, "ignore_eos": True}
    engine.add(request("slow", PROMPT, grammar="toy:1:20", **params))
    engine.add(request("plain", PROMPT, **params))
    service.late.add("toy:1:20")
    got = [output for _ in range(12) for output in engine.step()]
    assert {output.request_id for output in got} == {"plain"}
    assert tokens_of(got) == expected(PROMPT, SamplingParams(**params))
    service.late.clear()
    late = run(engine)["slow"]
    assert tokens_of(late) == tokens_of(serve(False, grammar="toy:1:20", **params)[0])
    assert_conserved(engine)
