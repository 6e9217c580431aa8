"""Pooled hidden states: the right rows in any company, the same bits in any pieces, those of transformers."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_runner import VOCAB, assert_conserved, context_hash, make_engine, request, run
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model

from gqa_serve.config import EngineConfig
from gqa_serve.engine.core import Engine
from gqa_serve.engine.model_runner import ModelRunner
from gqa_serve.engine.pooling import Pool, unit_vector
from gqa_serve.engine.request import Pooling, TokenOutput
from gqa_serve.errors import RequestError


@pytest.fixture(scope="module", params=[False, True], ids=["at_once", "ahead"])
def lookahead(request: pytest.FixtureRequest) -> bool:
    """Whether a step is launched before the one before it is collected."""
    return request.param


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(4, VOCAB), k=length)


def states(prompt: list[int]) -> np.ndarray:
    """The fake model's hidden state of each token is a hash of what it sees."""
    return np.array([context_hash(prompt[: end + 1]) for end in range(len(prompt))], np.float32)


def vector(outputs: list[TokenOutput]) -> np.ndarray:
    (output,) = outputs
    assert output.finish_reason == "length"
    assert output.token_ids == []
    assert output.pooled is not None
    return np.frombuffer(output.pooled, "<f4")


# --- sums ---


@given(seed=st.integers(0, 1000), cuts=st.lists(st.integers(1, 299), max_size=5))
def test_a_mean_has_the_same_bits_in_any_pieces(seed: int, cuts: list[int]) -> None:
    hidden = np.random.default_rng(seed).normal(size=(300, 7)).astype(np.float32)
    whole, pieces = Pool(), Pool()
    whole.add(0, hidden)
    pieces.add(0, hidden[:200])  # preempted: it all comes again
    bounds = sorted({0, *cuts, 300})
    for begin, end in itertools.pairwise(bounds):
        pieces.add(begin, hidden[begin:end])
    assert whole.mean().tobytes() == pieces.mean().tobytes()
    assert np.array_equal(pieces.last(), hidden[-1])
    np.testing.assert_allclose(whole.mean(), hidden.mean(axis=0, dtype=np.float64), rtol=1e-6, atol=1e-7)


def test_vectors_are_cut_and_then_scaled() -> None:
    pooled = np.array([3, 4, 12, 84], "<f4").tobytes()
    assert unit_vector(pooled, 2).tolist() == pytest.approx([0.6, 0.8])
    assert np.linalg.norm(unit_vector(pooled)) == pytest.approx(1)
    assert unit_vector(np.zeros(3, "<f4").tobytes()).tolist() == [0, 0, 0]


# --- rows ---


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    num_blocks=st.integers(16, 40),
    budget=st.integers(4, 40),
    kinds=st.randoms(use_true_random=False),
)
def test_batching_chunking_and_preemption_are_invisible(
    lookahead: bool, lengths: list[int], num_blocks: int, budget: int, kinds: random.Random
) -> None:
    engine = make_engine(lookahead, num_blocks, max_num_batched_tokens=budget, max_num_seqs=4)
    wanted: dict[str, np.float32] = {}
    for number, length in enumerate(lengths):
        prompt = prompt_of(40, number % 3)[:length]
        kind = kinds.choice(["last", "mean", "generates", "scores"])
        name = f"{kind}{number}"
        if kind == "generates":
            engine.add(request(name, prompt, max_tokens=9))
            continue
        if kind == "scores":
            engine.add(request(name, prompt, max_tokens=0, prompt_logprobs=1))
            continue
        engine.add(request(name, prompt, max_tokens=0, pooling=kind))
        hidden = states(prompt)
        wanted[name] = (
            hidden[-1] if kind == "last" else np.float32(hidden.astype(np.float64).cumsum()[-1] / length)
        )
        for _ in range(kinds.choice([0, 1, 3])):
            for output in engine.step():
                if output.request_id in wanted:
                    assert vector([output])[0] == wanted.pop(output.request_id)
    for name, outputs in run(engine).items():
        if name in wanted:
            assert vector(outputs)[0] == wanted.pop(name)
    assert not wanted
    assert_conserved(engine)


def test_only_the_last_state_may_come_from_the_prefix_cache(lookahead: bool) -> None:
    prompt = prompt_of(21)
    engine = make_engine(lookahead)
    engine.add(request("first", prompt, max_tokens=0, pooling="mean"))
    first = vector(run(engine)["first"])
    computed = len(engine.runner.plans)
    engine.add(request("last", prompt, max_tokens=0, pooling="last"))
    (last,) = run(engine)["last"]
    assert last.num_cached_tokens == 20
    assert sum(plan.num_tokens for plan in engine.runner.plans[computed:]) == 1
    engine.add(request("again", prompt, max_tokens=0, pooling="mean"))
    (again,) = run(engine)["again"]
    assert again.num_cached_tokens == 0
    assert vector([again]).tobytes() == first.tobytes()
    assert vector([last])[0] == states(prompt)[-1]


def test_an_aborted_one_leaves_nothing(lookahead: bool) -> None:
    engine = make_engine(lookahead)
    engine.add(request("gone", prompt_of(40), max_tokens=0, pooling="mean"))
    engine.step()
    assert engine.abort("gone")
    assert run(engine) == {}
    assert_conserved(engine)


@pytest.mark.parametrize("where", ["launch", "collect"])
def test_a_failed_step_ends_it_with_an_error(lookahead: bool, where: str) -> None:
    failing = [where]

    def fail(here: str) -> None:
        if here in failing:
            failing.remove(here)
            raise RuntimeError("injected")

    engine = make_engine(
        lookahead, on_execute=lambda plan: fail("launch"), on_collect=lambda: fail("collect")
    )
    engine.add(request("a", prompt_of(40), max_tokens=0, pooling="mean"))
    (output,) = run(engine)["a"]
    assert (output.finish_reason, output.pooled) == ("error", None)
    engine.add(request("b", prompt_of(40), max_tokens=0, pooling="mean"))
    assert vector(run(engine)["b"]).size == 1
    assert_conserved(engine)


def test_states_that_are_not_finite_are_an_error(lookahead: bool) -> None:
    engine = make_engine(lookahead)
    execute = engine.runner.execute

    def broken(*args: Any) -> torch.Tensor:
        return execute(*args).double() * float("inf")

    engine.runner.execute = broken
    engine.add(request("a", prompt_of(5), max_tokens=0, pooling="last"))
    (output,) = run(engine)["a"]
    assert (output.finish_reason, output.pooled) == ("error", None)
    assert "not finite" in (output.error or "")


def test_it_generates_nothing() -> None:
    with pytest.raises(RequestError, match="max_tokens must be 0"):
        make_engine(False).add(request("a", prompt_of(5), max_tokens=1, pooling="last"))


# --- transformers ---


def pooled_by(model: Any, prompt: list[int], pooling: Pooling) -> np.ndarray:
    """What transformers' last_hidden_state pools to."""
    with torch.inference_mode():
        hidden = model.base_model(torch.tensor([prompt])).last_hidden_state[0]
    pooled = hidden[-1] if pooling == "last" else hidden.double().mean(dim=0).float()
    return np.asarray(pooled.numpy())


def pooled_in(engine: Engine, prompts: list[list[int]], pooling: Pooling) -> list[np.ndarray]:
    for number, prompt in enumerate(prompts):
        engine.add(request(str(number), prompt, max_tokens=0, pooling=pooling))
    outputs = run(engine)
    return [vector(outputs[str(number)]) for number in range(len(prompts))]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_hidden_states_are_those_of_transformers(family: str, pooling: Pooling, tmp_path: Path) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    config = EngineConfig(
        model="tiny", backend="reference", kv_cache_memory=2**22, max_num_batched_tokens=32, max_num_seqs=8
    )
    engine = Engine(ModelRunner(tmp_path, config), config)
    rng = random.Random(1)
    prompts = [[rng.randrange(3, 128) for _ in range(length)] for length in (1, 7, 33, 90)]
    for prompt, got in zip(prompts, pooled_in(engine, prompts, pooling), strict=True):
        np.testing.assert_allclose(got, pooled_by(model, prompt, pooling), atol=2e-4, rtol=1e-4)
