"""Intervals and comparisons against scipy, closed forms, and data whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from gqa_serve.workbench.evaluate import compare
from gqa_serve.workbench.evaluate.compare import Estimate
from gqa_serve.workbench.evaluate.intervals import (
    MIN_BLOCKS,
    Interval,
    bootstrap,
    median_interval,
    student_t_quantile,
    wilson,
)
from gqa_serve.workbench.evaluate.results import CandidateResult, Held, Speed, TextScores, Trial


@pytest.mark.parametrize(("hits", "trials"), [(0, 5), (5, 5), (3, 7), (1, 400), (399, 400), (0, 1)])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_wilson_is_scipys(hits: int, trials: int, confidence: float) -> None:
    wanted = scipy.stats.binomtest(hits, trials).proportion_ci(confidence, method="wilson")
    assert wilson(hits, trials, confidence) == pytest.approx((wanted.low, wanted.high), abs=1e-12)


def test_wilson_without_a_trial_says_nothing() -> None:
    assert wilson(0, 0) is None


@pytest.mark.parametrize("degrees", [1, 2, 3, 7, 30, 400])
@pytest.mark.parametrize("probability", [0.6, 0.95, 0.975, 0.995])
def test_student_t_is_scipys(degrees: int, probability: float) -> None:
    wanted = scipy.stats.t.ppf(probability, degrees)
    assert student_t_quantile(probability, degrees) == pytest.approx(wanted, rel=1e-8)


@pytest.mark.parametrize("count", [6, 9, 10, 25])
def test_the_median_lies_between_these_with_the_stated_probability(count: int) -> None:
    interval = median_interval(list(range(count, 0, -1)))
    assert interval is not None
    rank = int(interval.low)  # the values are 1 .. count
    assert interval.high == count + 1 - rank

    def outside(rank: int) -> float:
        return float(2 * scipy.stats.binom.cdf(rank - 1, count, 0.5))

    assert outside(rank) <= 0.05 < outside(rank + 1)


@pytest.mark.parametrize("count", [1, 3, 5])
def test_few_values_have_no_interval_of_a_median(count: int) -> None:
    assert median_interval([1.0] * count) is None


def mean_interval(values: np.ndarray) -> Interval | None:
    blocks = np.stack([values, np.ones(len(values))], axis=1)
    return bootstrap(lambda sums: sums[:, 0] / sums[:, 1], blocks)


def test_for_many_blocks_the_bootstrap_is_the_textbook_interval() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, size=400)
    interval = mean_interval(values)
    half = scipy.stats.t.ppf(0.975, 399) * values.std(ddof=1) / 20
    assert interval == pytest.approx((values.mean() - half, values.mean() + half), abs=0.06 * half)


@pytest.mark.parametrize("count", [6, 12, 30])
def test_the_bootstrap_covers_the_truth_as_often_as_it_says(count: int) -> None:
    generator = np.random.default_rng(2)
    hits = 0
    for _ in range(200):
        blocks = np.stack([generator.normal(1.0, 1.0, size=count), np.ones(count)], axis=1)
        interval = bootstrap(lambda sums: sums[:, 0] / sums[:, 1], blocks, replicates=300)
        assert interval is not None
        hits += interval.holds(1.0)
    # 95 % of 200 are 190, four standard errors are 12. The plain percentile interval of 6 gives about 168.
    assert hits >= 178


def test_too_few_blocks_have_no_interval() -> None:
    assert mean_interval(np.ones(MIN_BLOCKS - 1)) is None
    assert mean_interval(np.arange(float(MIN_BLOCKS))) is not None


def scores(
    nll: list[float], tokens: list[int] | None = None, num_bytes: list[float] | None = None
) -> TextScores:
    tokens = tokens or [100] * len(nll)
    return TextScores(nll=nll, num_tokens=tokens, num_bytes=num_bytes or [4.0 * count for count in tokens])


def test_perplexity_and_bits_per_byte_by_hand() -> None:
    text = scores([math.log(8) * 30, math.log(2) * 10], [30, 10], [90.0, 30.0])
    assert compare.perplexity(text).value == pytest.approx(2 ** ((3 * 30 + 10) / 40))
    assert compare.bits_per_byte(text).value == pytest.approx(100 / 120)


@given(
    st.lists(st.tuples(st.floats(10, 500), st.floats(10, 500), st.integers(10, 90)), min_size=4, max_size=20)
)
@settings(max_examples=40, deadline=None)
def test_with_one_tokenizer_the_ratio_is_that_of_the_perplexities(
    blocks: list[tuple[float, float, int]],
) -> None:
    tokens = [count for *_, count in blocks]
    mine, other = (scores([block[side] for block in blocks], tokens) for side in (0, 1))
    ratio = compare.log_perplexity_ratio(mine, other)
    wanted = compare.perplexity(mine).value / compare.perplexity(other).value
    assert math.exp(ratio.value) == pytest.approx(wanted)
    back = compare.log_perplexity_ratio(other, mine)
    assert ratio.interval is not None
    assert back.interval == pytest.approx((-ratio.interval.high, -ratio.interval.low))


def test_a_tokenizer_with_twice_the_tokens_has_the_same_quality_if_it_says_as_much() -> None:
    coarse = scores([300.0, 500.0, 410.0, 380.0], [100] * 4, [400.0] * 4)
    fine = scores([300.0, 500.0, 410.0, 380.0], [200] * 4, [400.0] * 4)
    assert compare.perplexity(fine).value < compare.perplexity(coarse).value  # which means nothing
    assert compare.log_perplexity_ratio(fine, coarse) == Estimate(0.0, Interval(0.0, 0.0))


def test_pairing_removes_what_passages_have_in_common() -> None:
    generator = np.random.default_rng(3)
    hard = generator.uniform(100, 600, size=30)  # passages differ far more than the two models do
    reference = scores(hard.tolist())
    worse = scores((hard + 2.0 + generator.normal(0, 0.5, size=30)).tolist())
    ratio = compare.log_perplexity_ratio(worse, reference)
    assert compare.verdict(ratio, margin=0.001) == "worse"
    mine, other = compare.perplexity(worse).interval, compare.perplexity(reference).interval
    assert mine is not None
    assert other is not None
    assert mine.low < other.high  # by themselves they overlap


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [
        (-0.005, 0.008, "same"),
        (0.002, 0.009, "same"),
        (0.002, 0.02, "worse"),
        (-0.3, -0.1, "better"),
        (-0.02, 0.005, "not separated"),
        (-0.5, 0.5, "not separated"),
    ],
)
def test_verdicts(low: float, high: float, wanted: str) -> None:
    assert compare.verdict(Estimate((low + high) / 2, Interval(low, high)), 0.01) == wanted


def test_nothing_is_said_without_an_interval() -> None:
    assert compare.verdict(Estimate(0.0, None), 0.01) == "not separated"
    assert compare.verdict(None, 0.01) == "not measured"


def test_how_much_more_text() -> None:
    assert compare.more_text(Estimate(0.0, Interval(-0.04, 0.04)), 0.01) == pytest.approx(16)


def held(weight_bytes: int, kv_bytes_per_token: int = 100) -> Held:
    return Held(
        num_heads=8,
        num_kv_heads=2,
        weight_bytes=weight_bytes,
        kv_bytes_per_token=kv_bytes_per_token,
        block_size=16,
        weights="bfloat16",
        kv_dtype="bfloat16",
        backend="native",
        device="cpu",
    )


def candidate(name: str, memory: int, seconds: float, nll: list[float]) -> CandidateResult:
    speed = Speed(
        context=16,
        requests=1,
        prefill_tokens=4,
        decode_s=[seconds] * 9,
        prefill_s=[1.0] * 9,
        reference_decode_s=[1.0] * 9,
        reference_prefill_s=[1.0] * 9,
    )
    return CandidateResult(name=name, key=name, settings={}, held=held(memory), text=scores(nll), speed=speed)


def test_memory_counts_whole_blocks() -> None:
    assert held(1000, 10).memory_bytes(context=17, requests=3) == 1000 + 3 * 32 * 10


BASE = [300.0, 310.0, 320.0, 330.0, 340.0, 350.0]


def noisy(shift: float) -> list[float]:
    return [value + shift + 0.1 * (-1) ** index for index, value in enumerate(BASE)]


def test_dominated_are_those_that_nobody_needs() -> None:
    reference = candidate("reference", 1_000_000, 1.0, BASE)
    smaller = candidate("smaller", 500_000, 1.0, noisy(0.2))  # half a percent of a nat per token: within 1 %
    bad = candidate("bad", 500_000, 1.0, noisy(50.0))
    fast = candidate("fast", 900_000, 0.5, noisy(30.0))
    judged = compare.judge([reference, smaller, bad, fast], 16, 1, math.log(1.01))
    found = {item.result.name: (item.verdict, item.dominated_by) for item in judged}
    assert found == {
        "reference": ("reference", ["smaller"]),
        "smaller": ("same", []),
        "bad": ("worse", ["smaller"]),
        "fast": ("worse", []),  # twice as fast
    }


def test_what_the_data_do_not_separate_dominates_nobody() -> None:
    reference = candidate("reference", 1_000_000, 1.0, BASE)
    wild = candidate("wild", 500_000, 1.0, [value + (-1) ** index * 80 for index, value in enumerate(BASE)])
    judged = compare.judge([reference, wild], 16, 1, math.log(1.01))
    assert [(item.verdict, item.dominated_by) for item in judged] == [
        ("reference", []),
        ("not separated", []),
    ]


@given(
    st.lists(
        st.tuples(
            st.integers(1, 5), st.sampled_from([0.5, 1.0, 1.02, 2.0]), st.sampled_from([0.0, 0.2, 5.0])
        ),
        min_size=2,
        max_size=4,
    )
)
@settings(max_examples=25, deadline=None)
def test_two_never_dominate_each_other(kinds: list[tuple[int, float, float]]) -> None:
    results = [
        candidate(str(index), memory * 10_000, seconds, noisy(shift))
        for index, (memory, seconds, shift) in enumerate(kinds)
    ]
    for first in results:
        assert not compare.dominates(first, first, 16, 1, 0.01)
        for second in results:
            both = [compare.dominates(*pair, 16, 1, 0.01) for pair in ((first, second), (second, first))]
            assert both != [True, True]


def trial(sample: int, correct: bool, logprob: float, num_tokens: int = 2) -> Trial:
    return Trial(
        task="passkey",
        length=64,
        depth=0.5,
        sample=sample,
        key=str(sample),
        answer="",
        correct=correct,
        logprobs=[logprob] * num_tokens,
    )


def test_retrieval_is_compared_prompt_by_prompt() -> None:
    reference = [trial(sample, True, -0.1) for sample in range(10)]
    mine = [trial(sample, sample >= 8, -1.1 - 0.01 * sample) for sample in range(10)]
    change = compare.answer_change(mine, reference)
    assert change is not None
    assert (change.lost, change.won, change.verdict) == (8, 0, "worse")
    softer = compare.key_logprob_difference(mine, reference)
    assert softer is not None
    assert softer.value == pytest.approx(-1.045)
    assert compare.accuracy(mine).value == pytest.approx(0.2)
    assert compare.answer_change(mine, [trial(99, True, 0.0)]) is None


@pytest.mark.parametrize("lost", range(12))
@pytest.mark.parametrize("won", range(12))
def test_answers_differ_where_the_exact_test_says_so(lost: int, won: int) -> None:
    chance = scipy.stats.binomtest(lost, lost + won).pvalue if lost + won else 1.0
    verdict = compare.AnswerChange(lost, won).verdict
    assert verdict == ("not separated" if chance > 0.05 else "worse" if lost > won else "better")


def test_who_loses_hidden_facts_is_not_recommended_for_its_perplexity() -> None:
    reference = candidate("reference", 1_000_000, 1.0, BASE)
    smaller = candidate("smaller", 500_000, 1.0, noisy(0.2))
    reference.trials = [trial(sample, True, -0.1) for sample in range(12)]
    smaller.trials = [trial(sample, sample > 6, -0.1) for sample in range(12)]
    judged = compare.judge([reference, smaller], 16, 1, math.log(1.01))
    assert judged[1].verdict == "same"
    assert not judged[1].keeps_quality
    assert not judged[0].dominated_by
    smaller.trials[0].correct = smaller.trials[1].correct = True  # 5 of 12: as likely as 1 in 16
    judged = compare.judge([reference, smaller], 16, 1, math.log(1.01))
    assert judged[1].keeps_quality


def test_speed_is_the_median_round() -> None:
    ratio = compare.speed_ratio([1.0, 2.0, 4.0, 1.0, 1.0, 1.0], [2.0, 4.0, 8.0, 2.0, 2.0, 90.0])
    assert ratio is not None
    assert ratio.value == pytest.approx(2.0)
