"""Argmax and random draws of the native CPU kernels against those in torch and float64 arithmetic.

A draw inverts a cumulative distribution, so the tokens that the filters keep and their probabilities are seen
from outside: in the middle of its interval each kept token must be drawn, and at no unit any other.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_calls import LEVELS, Machine, machines

from gqa_serve.engine.backends import native_is_built
from gqa_serve.engine.backends.cpu import NativeRows
from gqa_serve.engine.request import EngineRequest, Request, SamplingParams
from gqa_serve.engine.sampler import Sampler, TorchRows, _filter_floor, random_unit

pytestmark = pytest.mark.skipif(not native_is_built(), reason="the native kernels are not built")

INF = math.inf
LAST_UNIT = 1 - 2.0**-53
# How far a kernel's cumulative probability may be from the exact one.
ERROR = 2e-6


def native_rows(machine: Machine | None = None) -> NativeRows:
    return NativeRows((machine or Machine(LEVELS[-1], 1)).program())


def random_logits(rows: int, vocab: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def draw_all(logits: torch.Tensor, params: SamplingParams, units: Sequence[float]) -> list[int]:
    """One row [V], a token for each unit."""
    return native_rows().draw(logits[None], [0] * len(units), [params] * len(units), units).tolist()


def distribution(logits: torch.Tensor, params: SamplingParams) -> np.ndarray:
    """Probabilities [V] of one row, float64, 0 for tokens that the filters of engine/sampler.py drop."""
    scaled = (logits / params.temperature)[None]
    kept = scaled >= _filter_floor(scaled, [params])[:, None]
    probs: np.ndarray = torch.softmax(scaled.double().masked_fill(~kept, -INF), -1)[0].numpy()
    return probs


def check(logits: torch.Tensor, params: SamplingParams) -> None:
    """Each token that is kept is drawn from its own part of the unit interval, and no other token ever."""
    probs = distribution(logits, params)
    after = probs.cumsum()
    (likely,) = np.nonzero(probs > 10 * ERROR)
    assert len(likely) > 0
    middles = (after - probs / 2)[likely].clip(0, LAST_UNIT).tolist()
    assert draw_all(logits, params, middles) == likely.tolist()
    units = [0.0, LAST_UNIT, *np.random.default_rng(0).random(50).tolist()]
    for unit, token in zip(units, draw_all(logits, params, units), strict=True):
        assert probs[token] > 0
        assert after[token] - probs[token] - ERROR <= unit <= after[token] + ERROR


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    vocab=st.sampled_from([1, 2, 12, 16, 300, 2000]),
    temperature=st.sampled_from([0.05, 0.7, 1.0, 1.9]),
    top_k=st.sampled_from([0, 1, 2, 5, 40, 299, 5000, -1]),
    top_p=st.sampled_from([1e-6, 0.05, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.0, 1e-4, 0.02, 0.5, 1.0]),
    scale=st.sampled_from([0.01, 1.0, 5.0]),
    seed=st.integers(0, 100),
)
def test_every_filter_keeps_what_torch_keeps(
    vocab: int, temperature: float, top_k: int, top_p: float, min_p: float, scale: float, seed: int
) -> None:
    params = SamplingParams(temperature=temperature, top_k=max(0, top_k), top_p=top_p, min_p=min_p)
    check(random_logits(1, vocab, seed, scale)[0], params)


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.3), (0, 0.99), (20, 0.9), (49_999, 0.9999), (0, 1.0)])
@pytest.mark.parametrize("scale", [0.001, 3.0])
def test_a_large_vocabulary(top_k: int, top_p: float, scale: float) -> None:
    """Also where a nucleus reaches far beyond the likeliest tokens."""
    logits = random_logits(1, 50_000, 5, scale)[0]
    params = SamplingParams(top_k=top_k, top_p=top_p)
    probs = distribution(logits, params)
    units = np.random.default_rng(1).random(30).tolist()
    after = probs.cumsum()
    for unit, token in zip(units, draw_all(logits, params, units), strict=True):
        assert probs[token] > 0
        # Sums of 50,000 float32 numbers in blocks: a few tokens of equal weight off, at most.
        assert after[token] - probs[token] - 5e-6 <= unit <= after[token] + 5e-6


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    vocab=st.sampled_from([12, 300, 5000]),
    temperature=st.sampled_from([0.3, 1.0]),
    top_k=st.sampled_from([0, 8]),
    top_p=st.sampled_from([0.9, 1.0]),
    seed=st.integers(0, 100),
)
def test_tokens_are_those_of_torch(
    vocab: int, temperature: float, top_k: int, top_p: float, seed: int
) -> None:
    """For the same units. A unit may fall within rounding of a boundary, once in thousands of draws."""
    logits = random_logits(64, vocab, seed)
    params = [SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)] * 64
    units = [random_unit(seed, row) for row in range(64)]
    got = native_rows().draw(logits, range(64), params, units).tolist()
    wanted = TorchRows().draw(logits, range(64), params, units).tolist()
    assert sum(a != b for a, b in zip(got, wanted, strict=True)) <= 1
    for row, (token, other) in enumerate(zip(got, wanted, strict=True)):
        if token != other:
            probs = distribution(logits[row], params[row])
            boundary = probs.cumsum()[min(token, other)]
            assert abs(boundary - units[row]) < ERROR


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    vocab=st.sampled_from([1, 7, 8, 9, 300, 5001]),
    num_bytes=st.sampled_from([0, 1, 30, 700]),
    density=st.sampled_from([0.0, 0.01, 0.5, 1.0]),
    threads=st.sampled_from([1, 2]),
    seed=st.integers(0, 1000),
)
def test_masks_are_those_of_torch(
    vocab: int, num_bytes: int, density: float, threads: int, seed: int
) -> None:
    logits = random_logits(5, vocab, seed)
    source = np.random.default_rng(seed)
    masks = [np.packbits(source.random(8 * num_bytes) < density).tobytes() for _ in range(3)]
    native, plain = logits.clone(), logits.clone()
    if vocab > 8:
        native[2, 3] = plain[2, 3] = INF  # as a penalty may leave it
    best = native_rows(Machine(LEVELS[-1], threads)).mask(native, [0, 2, 3], masks)
    assert torch.equal(best, TorchRows().mask(plain, [0, 2, 3], masks))
    assert torch.equal(native, plain)
    assert torch.equal(native[[1, 4]], logits[[1, 4]])


def test_draws_follow_the_distribution() -> None:
    vocab, draws = 12, 20_000
    logits = random_logits(1, vocab, 3)[0]
    params = SamplingParams(temperature=0.8, top_k=8)
    counts = Counter(draw_all(logits, params, [random_unit(seed, 1) for seed in range(draws)]))
    probs = distribution(logits, params)
    assert (probs > 0).sum() == 8
    assert {token for token in range(vocab) if counts[token]} <= set(np.nonzero(probs)[0].tolist())
    chi_square = sum((counts[t] - draws * p) ** 2 / (draws * p) for t, p in enumerate(probs) if p > 0)
    assert chi_square < 30  # 7 degrees of freedom: p < 0.0001 beyond this


# --- ties and limits ---


def kept(logits: Sequence[float], **params: float) -> set[int]:
    units = [(i + 0.5) / 1000 for i in range(1000)]
    return set(draw_all(torch.tensor(logits), SamplingParams(**params), [0.0, *units, LAST_UNIT]))


def test_ties_with_the_last_token_kept_are_kept() -> None:
    logits = [1.0, 2.0, 1.0, 0.5, 2.0, 1.0, -3.0]
    assert kept(logits, top_k=1) == {1, 4}
    assert kept(logits, top_k=2) == {1, 4}
    assert kept(logits, top_k=3) == {0, 1, 2, 4, 5}
    assert kept(logits, top_p=0.01) == {1, 4}
    assert kept(logits, min_p=1.0) == {1, 4}
    assert kept([0.25] * 40, top_k=3) == set(range(40))
    assert kept([0.25] * 40, top_p=0.5) == set(range(40))


def test_filters_are_applied_in_order() -> None:
    """Of 0.4, 0.3, 0.2, 0.1: top_p is of what top_k leaves, min_p of the best."""
    logits = np.log([0.1, 0.4, 0.2, 0.3]).tolist()
    assert kept(logits) == {0, 1, 2, 3}
    assert kept(logits, top_p=0.65) == {1, 3}
    assert kept(logits, top_p=0.75) == {1, 2, 3}
    assert kept(logits, top_k=3, top_p=0.75) == {1, 3}  # 0.7 / 0.9 > 0.75
    assert kept(logits, min_p=0.45) == {1, 2, 3}
    assert kept(logits, min_p=0.55) == {1, 3}
    assert kept(logits, top_k=1, min_p=0.1) == {1}
    assert kept(logits, temperature=0.1, min_p=0.1) == {1}  # 0.3 is 0.06 of the best then


def test_a_very_low_temperature_is_the_argmax() -> None:
    for vocab in (1, 12, 300):
        logits = random_logits(1, vocab)[0]
        units = [0.0, 0.5, LAST_UNIT]
        for top_p in (1.0, 0.5):
            tokens = draw_all(logits, SamplingParams(temperature=1e-4, top_p=top_p), units)
            assert tokens == [int(logits.argmax())] * 3


@pytest.mark.parametrize("vocab", [1, 3, 16, 17, 300, 1000])
def test_tokens_at_minus_infinity_are_never_drawn(vocab: int) -> None:
    for finite in {0, vocab // 2, vocab - 1}:
        logits = torch.full((vocab,), -INF)
        logits[finite] = -50.0
        for params in (
            SamplingParams(),
            SamplingParams(top_k=2),
            SamplingParams(top_p=0.5),
            SamplingParams(top_k=5, top_p=0.999, min_p=0.1),
        ):
            assert draw_all(logits, params, [0.0, 0.3, LAST_UNIT]) == [finite] * 3
    if vocab > 1:
        logits = random_logits(1, vocab)[0]
        logits[::3] = -INF
        check(logits, SamplingParams(top_k=vocab - 1, top_p=0.95))


@pytest.mark.parametrize("vocab", [1, 12, 300, 50_000])
def test_rows_without_a_token(vocab: int) -> None:
    """-1 for nothing but -inf, and for NaN and +inf wherever they are; the rows beside have theirs."""
    good = random_logits(1, vocab)[0]
    rows = [good, torch.full((vocab,), -INF)]
    for bad in (math.nan, INF):
        for place in {0, vocab // 2, vocab - 1}:
            row = good.clone()
            row[place] = bad
            rows += [row, good]
    logits = torch.stack(rows)
    usable = [bool(torch.equal(row, good)) for row in rows]
    for params in (SamplingParams(), SamplingParams(top_k=3), SamplingParams(top_p=0.9, min_p=0.01)):
        count = len(rows)
        tokens = native_rows().draw(logits, range(count), [params] * count, [0.4] * count).tolist()
        assert [token >= 0 for token in tokens] == usable
        assert len({token for token in tokens if token >= 0}) == 1


def test_the_sampler_finds_no_token_in_such_rows() -> None:
    """The sampler's own rules over these operations: bans, NaN, and what is drawn beside them."""
    logits = random_logits(4, 300)
    logits[2, 7] = math.nan

    def request(index: int, **params: object) -> Request:
        spec = EngineRequest(request_id=str(index), prompt=[1], params=SamplingParams(**params))
        return Request(spec, 0, index, 4096)

    banned = {"min_tokens": 1, "stop_token_ids": list(range(300))}
    requests = [request(0), request(1, **banned), request(2), request(3, temperature=0)]
    samples = Sampler([], native_rows()).launch(logits, requests).result()
    assert [sample.token_id is None for sample in samples] == [False, True, True, False]
    assert samples == Sampler([]).launch(logits, requests).result()


# --- rows ---


def test_a_row_does_not_depend_on_its_neighbours_or_the_machine() -> None:
    logits = random_logits(30, 777)
    params = [
        SamplingParams(temperature=0.5 + 0.05 * row, top_k=[0, 40][row % 2], top_p=[1.0, 0.8, 0.95][row % 3])
        for row in range(30)
    ]
    units = [random_unit(1, row) for row in range(30)]
    operations = native_rows()
    wanted = [int(operations.draw(logits, [row], [params[row]], [units[row]])) for row in range(30)]
    assert len(set(wanted)) > 15
    order = list(range(29, -1, -2))
    for machine in machines((1, 2, 3)):
        operations = native_rows(machine)
        assert operations.draw(logits, range(30), params, units).tolist() == wanted
        got = operations.draw(logits, order, [params[row] for row in order], [units[row] for row in order])
        assert got.tolist() == [wanted[row] for row in order]


@pytest.mark.parametrize("vocab", [1, 2, 15, 16, 17, 300, 50_000])
def test_argmax_is_the_first_of_the_largest(vocab: int) -> None:
    logits = random_logits(20, vocab).round()  # many ties
    logits[:5] = 0.0
    logits[5] = -torch.arange(vocab)
    logits[6] = torch.arange(vocab)
    wanted = [row.index(max(row)) for row in logits.tolist()]
    for machine in machines((1, 3)):
        assert native_rows(machine).argmax(logits).tolist() == wanted


@pytest.mark.parametrize("bad", [math.nan, INF, -INF])
@pytest.mark.parametrize("vocab", [1, 16, 50, 300])
def test_argmax_of_rows_that_are_not_finite(vocab: int, bad: float) -> None:
    places = sorted({0, vocab // 3, vocab - 1})
    logits = random_logits(2 * len(places), vocab)
    wanted = logits.argmax(-1).tolist()
    for row, place in enumerate(places):
        logits[2 * row, place] = bad
        wanted[2 * row] = -1
    for machine in machines((1, 2)):
        assert native_rows(machine).argmax(logits).tolist() == wanted
    assert TorchRows().argmax(logits).tolist() == wanted
