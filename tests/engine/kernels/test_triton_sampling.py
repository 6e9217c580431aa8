"""Argmax and draws in Triton against their twins, the sampler's torch operations and float64 arithmetic.

A draw inverts a cumulative distribution, so what the filters keep is seen from outside: in the middle of its
interval each kept token must be drawn, and at no unit any other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from gqa_serve.engine.kernels.triton import sampling
from gqa_serve.engine.kernels.triton.sampling import Config, argmax, argmax_twin, draw, draw_twin
from gqa_serve.engine.request import SamplingParams
from gqa_serve.engine.sampler import TorchRows, random_unit

INF = math.inf
LAST_UNIT = 1 - 2.0**-53
# How far a cumulative probability of float32 weights may be from the exact one.
ERROR = 2e-6


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a hundred tokens have two chunks. Few samples: each takes 20 launches, slow to interpret."""
    monkeypatch.setattr(sampling, "config", lambda vocab: Config(64, 64, 1))


def random_logits(rows: int, vocab: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def tensors(params: Sequence[SamplingParams]) -> list[torch.Tensor]:
    """temperature, top_k, top_p, min_p, as the launcher takes them."""
    types = {
        "temperature": torch.float32,
        "top_k": torch.int32,
        "top_p": torch.float64,
        "min_p": torch.float64,
    }
    return [torch.tensor([getattr(p, name) for p in params], dtype=dtype) for name, dtype in types.items()]


def draw_rows(
    logits: torch.Tensor, rows: Sequence[int], params: Sequence[SamplingParams], units: Sequence[float],
    launch: object = draw,
) -> list[int]:  # fmt: skip
    out = torch.full((len(rows),), -7, dtype=torch.int32)
    unit = torch.tensor(units, dtype=torch.float64)
    launch(logits, torch.tensor(rows, dtype=torch.int32), *tensors(params), unit, out)  # type: ignore[operator]
    tokens: list[int] = out.tolist()
    return tokens


def distribution(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Probabilities [V] of one row in float64, token by token.

    Not for rows where what a filter keeps is decided within rounding.
    """
    scaled = (logits / torch.tensor(params.temperature)).tolist()
    order = sorted(range(len(scaled)), key=lambda token: -scaled[token])
    count = params.top_k if 0 < params.top_k < len(scaled) else len(scaled)
    weights = [math.exp(scaled[token] - scaled[order[0]]) for token in order]
    mass, before, floor = math.fsum(weights[:count]), 0.0, INF
    for rank, token in enumerate(order[:count]):
        share = before / mass
        if rank and params.top_p < 1:
            assert abs(share - params.top_p) > ERROR, "an unlucky row"
            if share > params.top_p:
                break
        floor, before = scaled[token], before + weights[rank]
    if params.min_p > 0:
        floor = max(floor, scaled[order[0]] + math.log(params.min_p))
    assert all(x >= floor or floor - x > 1e-6 for x in scaled), "an unlucky row"  # min_p's floor is rounded
    probs = torch.tensor([math.exp(x - scaled[order[0]]) if x >= floor else 0.0 for x in scaled]).double()
    return probs / probs.sum()


def check(logits: torch.Tensor, params: SamplingParams) -> None:
    """Tokens that are kept are drawn from their own part of the unit interval, and no other token ever.

    The least likely that is kept is drawn, which is the first to go if a floor is wrong, and the last.
    """
    probs = distribution(logits, params)
    after = probs.cumsum(0)
    likely = (probs > 10 * ERROR).nonzero()[:, 0]
    likely = likely[[-1, int(probs[likely].argmin())]]
    units = (after - probs / 2)[likely].clamp(max=LAST_UNIT).tolist()
    units.append(LAST_UNIT)
    got = draw_rows(logits[None], [0] * len(units), [params] * len(units), units)
    assert got[: len(likely)] == likely.tolist()
    for unit, token in zip(units, got, strict=True):
        assert probs[token] > 0
        assert after[token] - probs[token] - ERROR <= unit <= after[token] + ERROR


@pytest.mark.usefixtures("small_chunks")
@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    vocab=st.sampled_from([1, 12, 64, 65, 100]),
    temperature=st.sampled_from([0.05, 0.7, 1.0, 1.9]),
    top_k=st.sampled_from([0, 1, 2, 5, 40, 99, 5000]),
    top_p=st.sampled_from([1e-6, 0.05, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.0, 1e-4, 0.02, 0.5, 1.0]),
    scale=st.sampled_from([0.01, 1.0, 5.0]),
    seed=st.integers(0, 100),
)
def test_every_filter(
    vocab: int, temperature: float, top_k: int, top_p: float, min_p: float, scale: float, seed: int
) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    check(random_logits(1, vocab, seed, scale)[0], params)


def agree(logits: torch.Tensor, params: Sequence[SamplingParams], units: Sequence[float]) -> None:
    """The kernel's tokens are those of torch, but where a unit is within rounding of a boundary."""
    rows = list(range(len(params)))
    got = draw_rows(logits, rows, params, units)
    wanted = TorchRows().draw(logits, rows, params, units).tolist()
    assert draw_rows(logits, rows, params, units, draw_twin) == wanted
    differing = [row for row in rows if got[row] != wanted[row]]
    for row in differing:
        after = distribution(logits[row], params[row]).cumsum(0)
        ends = sorted((got[row], wanted[row]))
        assert after[ends[1]] - after[ends[0]] > 0
        assert (after[ends[0] : ends[1]] - units[row]).abs().max() < ERROR
    assert len(differing) <= 1


@pytest.mark.usefixtures("small_chunks")
@settings(max_examples=2, deadline=None, derandomize=True)
@given(seed=st.integers(0, 100), ties=st.booleans())
def test_tokens_are_those_of_torch_whatever_a_batch_mixes(seed: int, ties: bool) -> None:
    logits = random_logits(12, 100, seed)
    if ties:  # as logits of a model in bfloat16 have many
        logits = (logits * 4).round() / 4
    logits[3:9, :50] = -INF
    params = [
        SamplingParams(
            temperature=(0.3, 1.0, 1.7)[row % 3],
            top_k=(0, 8, 0, 40, 0, 1)[row % 6],
            top_p=(1.0, 0.9, 0.6, 1.0)[row % 4],
            min_p=(0.0, 0.0, 0.05)[row % 3],
        )
        for row in range(12)
    ]
    agree(logits, params, [random_unit(seed, row) for row in range(12)])


@pytest.mark.usefixtures("small_chunks")
def test_ties_with_the_last_kept_are_kept_and_weigh_on_top_p_only_once() -> None:
    """Five tokens of which four tie; top_k 2 keeps all five, but top_p is of the mass of exactly two."""
    logits = torch.tensor([[0.0, 1.0, 0.0, 0.0, 0.0, -9.0]])
    check(logits[0], SamplingParams(top_k=2))
    share = math.e / (math.e + 1)  # of the largest among two
    for top_p, kept in ((share - 0.01, [1]), (share + 0.01, [0, 1, 2, 3, 4])):
        params = SamplingParams(top_k=2, top_p=top_p)
        units = [0.05, 0.25, 0.6, 0.75, 0.99] if len(kept) > 1 else [0.0, LAST_UNIT]
        got = draw_rows(logits, [0] * len(units), [params] * len(units), units)
        assert got == draw_rows(logits, [0] * len(units), [params] * len(units), units, draw_twin)
        assert sorted(set(got)) == kept


@pytest.mark.usefixtures("small_chunks")
def test_zeros_of_both_signs_tie() -> None:
    logits = torch.tensor([[-0.0, 0.0, -0.0, 0.0, 0.1]])
    got = draw_rows(logits, [0] * 4, [SamplingParams(top_k=2)] * 4, [0.1, 0.3, 0.5, 0.7])
    assert got == [0, 1, 2, 3]


@pytest.mark.usefixtures("small_chunks")
def test_the_likeliest_is_kept_even_by_a_top_p_of_nothing() -> None:
    logits = random_logits(2, 100)
    temperature, _, top_p, _ = tensors([SamplingParams()] * 2)
    unit, out = torch.tensor([0.0, LAST_UNIT], dtype=torch.float64), torch.full((2,), -7)
    draw(logits, torch.arange(2), temperature, None, top_p * 0, None, unit, out)
    assert torch.equal(out, logits.argmax(-1))


@pytest.mark.usefixtures("small_chunks")
def test_rows_in_any_order_more_than_once_and_of_a_wider_matrix() -> None:
    wide = random_logits(5, 100)
    logits = wide[:, 20:90]
    rows = [4, 0, 0, 3]
    units = [0.2, 0.4, 0.8, 0.6]
    params = [SamplingParams(top_p=0.9)] * 4
    got = draw_rows(logits, rows, params, units)
    assert got == [
        draw_rows(logits[row : row + 1].clone(), [0], params[:1], [unit])[0]
        for row, unit in zip(rows, units, strict=True)
    ]
    assert got == TorchRows().draw(logits[rows], range(4), params, units).tolist()


@pytest.mark.usefixtures("small_chunks")
def test_a_filter_that_no_sample_has_may_be_left_out() -> None:
    logits, rows = random_logits(3, 100), torch.arange(3)
    temperature, top_k, top_p, min_p = tensors([SamplingParams(temperature=0.8)] * 3)
    unit = torch.tensor([random_unit(3, row) for row in range(3)], dtype=torch.float64)
    given_all, given_none = torch.full((3,), -7), torch.full((3,), -7)
    draw(logits, rows, temperature, top_k, top_p, min_p, unit, given_all)
    draw(logits, rows, temperature, None, None, None, unit, given_none)
    assert torch.equal(given_all, given_none)
    assert len(set(given_all.tolist())) > 1
    top_p[:] = 0.5
    draw(logits, rows, temperature, top_k, top_p, min_p, unit, given_all)
    draw(logits, rows, temperature, None, top_p, None, unit, given_none)
    assert torch.equal(given_all, given_none)


@pytest.mark.usefixtures("small_chunks")
def test_a_row_that_leaves_nothing_to_choose() -> None:
    logits = torch.full((2, 100), -INF)
    logits[1, 70] = -5.0
    params = [SamplingParams(top_k=3, top_p=0.5, min_p=0.1)] * 2
    assert draw_rows(logits, [0, 1], params, [0.5, 0.999]) == [-1, 70]
    assert draw_rows(logits, [0, 1], params, [0.5, 0.999], draw_twin) == [-1, 70]


def test_a_vocabulary_of_several_whole_chunks() -> None:
    params = [SamplingParams(top_k=20, top_p=0.9), SamplingParams(top_p=0.6, temperature=2.0)]
    agree(random_logits(2, 9000, 5), params, [0.3, 0.97])


@pytest.mark.parametrize("vocab", [1, 2, 16, 63, 300])
@pytest.mark.usefixtures("small_chunks")
def test_argmax_is_the_first_of_the_largest(vocab: int) -> None:
    logits = random_logits(8, vocab).round()  # many ties
    logits[:3] = 0.0
    logits[3] = -torch.arange(vocab)
    logits[4] = torch.arange(vocab)
    wanted = [row.index(max(row)) for row in logits.tolist()]
    assert argmax(logits, torch.full((8,), -7, dtype=torch.int32)).tolist() == wanted
    assert argmax_twin(logits, torch.full((8,), -7)).tolist() == wanted


@pytest.mark.parametrize("bad", [math.nan, INF, -INF])
@pytest.mark.parametrize("vocab", [1, 50, 300])
@pytest.mark.usefixtures("small_chunks")
def test_argmax_of_rows_that_are_not_finite(vocab: int, bad: float) -> None:
    places = sorted({0, vocab // 3, vocab - 1})
    logits = random_logits(2 * len(places), vocab)
    wanted = logits.argmax(-1).tolist()
    for row, place in enumerate(places):
        logits[2 * row, place] = bad
        wanted[2 * row] = -1
    assert argmax(logits, torch.full((len(logits),), -7)).tolist() == wanted
    assert argmax_twin(logits, torch.full((len(logits),), -7)).tolist() == wanted
    assert TorchRows().argmax(logits).tolist() == wanted


def test_argmax_of_whole_chunks() -> None:
    logits = random_logits(2, 10_000)
    logits[1, 9_999] = 100.0
    assert argmax(logits, torch.empty(2, dtype=torch.int32)).tolist() == logits.argmax(-1).tolist()
