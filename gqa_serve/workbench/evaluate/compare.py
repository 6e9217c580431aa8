"""What the results say: values with intervals, paired comparisons, and which candidates are dominated.

Owns the definitions of every figure that is shown. Knows no models and no page. Invariant: a comparison is
paired (the same blocks of text, the same prompts), and what the data do not separate is called that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

import numpy as np

from gqa_serve.workbench.evaluate.intervals import CONFIDENCE, Interval, bootstrap, median_interval, wilson
from gqa_serve.workbench.evaluate.results import CandidateResult, Speed, TextScores, Trial

SAME_SPEED = 0.05
"""Decode speeds within this share of each other count as equal: runs differ by as much."""

SAME_MEMORY = 0.01

Verdict = Literal["reference", "same", "better", "worse", "not separated", "not measured"]


@dataclass(frozen=True)
class Estimate:
    """A measured value, and where the true one lies; None where the data are too few to say."""

    value: float
    interval: Interval | None

    def map(self, function: Callable[[float], float]) -> Estimate:
        """The estimate of a growing function of the value."""
        interval = self.interval
        mapped = None if interval is None else Interval(function(interval.low), function(interval.high))
        return Estimate(function(self.value), mapped)


# --- text --------------------------------------------------------------------------------------------------


def perplexity(text: TextScores) -> Estimate:
    """exp of the mean negative log-likelihood per token."""
    return _ratio(text.nll, text.num_tokens).map(math.exp)


def bits_per_byte(text: TextScores) -> Estimate:
    """Negative log-likelihood in bits over bytes of text: comparable between tokenizers."""
    return _ratio([nats / math.log(2) for nats in text.nll], text.num_bytes)


def divergence(text: TextScores) -> Estimate | None:
    """Mean KL(reference || candidate) per token, in nats."""
    return None if text.divergence is None else _ratio(text.divergence, text.num_tokens)


def top_1_agreement(text: TextScores) -> Estimate | None:
    """Share of positions where reference and candidate predict the same token."""
    if text.same_top is None:
        return None
    share = _ratio(text.same_top, text.num_tokens)
    if share.interval is not None and share.interval.low == share.interval.high:  # all the same
        return Estimate(share.value, wilson(sum(text.same_top), sum(text.num_tokens)))
    return share


def log_perplexity_ratio(text: TextScores, reference: TextScores) -> Estimate:
    """ln of the candidate's perplexity over the reference's, from the same blocks of text.

    With two tokenizers: nats per byte, times the reference's bytes per token. With one that is the difference
    of mean log-likelihoods.
    """
    blocks = np.array(
        [text.nll, text.num_bytes, reference.nll, reference.num_bytes, reference.num_tokens], float
    ).T  # [B, 5]

    def statistic(sums: np.ndarray) -> np.ndarray:
        nll, num_bytes, nll_r, bytes_r, tokens_r = sums.T
        result: np.ndarray = (nll / num_bytes - nll_r / bytes_r) * (bytes_r / tokens_r)
        return result

    return Estimate(float(statistic(blocks.sum(axis=0)[None])[0]), bootstrap(statistic, blocks))


def _ratio(above: Sequence[float], below: Sequence[float]) -> Estimate:
    """Sum over sum, with the bootstrap's interval."""
    blocks = np.array([above, below], float).T
    return Estimate(
        math.fsum(above) / math.fsum(below), bootstrap(lambda sums: sums[:, 0] / sums[:, 1], blocks)
    )


# --- retrieval ---------------------------------------------------------------------------------------------


def accuracy(trials: Sequence[Trial]) -> Estimate:
    """Share of answers that hold the key."""
    hits = sum(trial.correct for trial in trials)
    return Estimate(hits / len(trials), wilson(hits, len(trials)))


def key_logprob(trials: Sequence[Trial]) -> Estimate:
    """Mean log-probability of a key's token, in nats: moves long before answers do."""
    return _ratio([math.fsum(trial.logprobs) for trial in trials], [len(trial.logprobs) for trial in trials])


def paired_trials(trials: Sequence[Trial], reference: Sequence[Trial]) -> list[tuple[Trial, Trial]]:
    """The trials of both that asked for the same."""

    def place(trial: Trial) -> tuple[str, int, float, int, str]:
        return trial.task, trial.length, trial.depth, trial.sample, trial.key

    others = {place(trial): trial for trial in reference}
    return [(trial, others[place(trial)]) for trial in trials if place(trial) in others]


@dataclass(frozen=True)
class AnswerChange:
    """Of the same prompts: those that the reference alone answers (`lost`), and the candidate alone."""

    lost: int
    won: int

    @property
    def verdict(self) -> Verdict:
        """ "worse" or "better" if the exact sign test over the prompts that only one answers says so (McNemar
        1947, with the binomial distribution): a bootstrap over few such prompts says so too easily."""
        few, count = min(self.lost, self.won), self.lost + self.won
        chance = 2 * sum(math.comb(count, hits) for hits in range(few + 1)) / 2**count
        if chance > 1 - CONFIDENCE:
            return "not separated"
        return "worse" if self.lost > self.won else "better"


def answer_change(trials: Sequence[Trial], reference: Sequence[Trial]) -> AnswerChange | None:
    """How answers differ from the reference's; None where not the same was asked."""
    pairs = paired_trials(trials, reference)
    if not pairs:
        return None
    return AnswerChange(
        sum(other.correct and not mine.correct for mine, other in pairs),
        sum(mine.correct and not other.correct for mine, other in pairs),
    )


def key_logprob_difference(trials: Sequence[Trial], reference: Sequence[Trial]) -> Estimate | None:
    """Mean difference of a key's log-probability per token of the reference's, over the same prompts."""
    pairs = paired_trials(trials, reference)
    if not pairs:
        return None
    differences = [math.fsum(mine.logprobs) - math.fsum(other.logprobs) for mine, other in pairs]
    return _ratio(differences, [len(other.logprobs) for _, other in pairs])


# --- speed -------------------------------------------------------------------------------------------------


def decode_tokens_per_s(speed: Speed) -> float:
    """Of all requests together, from the median step."""
    return speed.requests / median(speed.decode_s)


def prefill_tokens_per_s(speed: Speed) -> float:
    """From the median step."""
    return speed.prefill_tokens / median(speed.prefill_s)


def speed_ratio(mine: Sequence[float], reference: Sequence[float] | None) -> Estimate | None:
    """How many times the reference's speed: the median over rounds in which both ran one after the other."""
    if reference is None:
        return None
    ratios = [other / own for own, other in zip(mine, reference, strict=True)]
    return Estimate(median(ratios), median_interval(ratios))


# --- verdicts ----------------------------------------------------------------------------------------------


def verdict(estimate: Estimate | None, margin: float) -> Verdict:
    """What an estimate of the log perplexity ratio says. `margin` > 0: differences that do not matter.

    "same": the whole interval lies within the margin. "worse", "better": it does not hold 0. Else the data do
    not separate the two: neither a difference nor its absence is shown.
    """
    if estimate is None or estimate.interval is None:
        return "not measured" if estimate is None else "not separated"
    low, high = estimate.interval
    if -margin <= low and high <= margin:
        return "same"
    if low > 0:
        return "worse"
    return "better" if high < 0 else "not separated"


def more_text(estimate: Estimate, margin: float) -> float | None:
    """How many times the text would show whether the difference matters: intervals shrink with its root."""
    if estimate.interval is None:
        return None
    half = (estimate.interval.high - estimate.interval.low) / 2
    return max(1.0, (half / margin) ** 2)


@dataclass(frozen=True)
class Judged:
    """A candidate against the reference: `log_ratio` of perplexities, the `verdict` on it, how `answers` of
    retrieval changed. `dominated_by`: those that cost no more and give no less."""

    result: CandidateResult
    log_ratio: Estimate | None
    verdict: Verdict
    answers: AnswerChange | None
    dominated_by: list[str]

    @property
    def keeps_quality(self) -> bool:
        """Shown to be as good as the reference on the text, and not shown to be worse at retrieval."""
        worse = self.answers is not None and self.answers.verdict == "worse"
        return self.verdict in ("reference", "same", "better") and not worse


def judge(results: Sequence[CandidateResult], context: int, requests: int, margin: float) -> list[Judged]:
    """All candidates; the first is the reference."""
    reference = results[0]
    judged = []
    for result in results:
        ratio = None
        if result.text is not None and reference.text is not None and result is not reference:
            ratio = log_perplexity_ratio(result.text, reference.text)
        judged.append(
            Judged(
                result,
                ratio,
                "reference" if result is reference else verdict(ratio, margin),
                None if result is reference else answer_change(result.trials, reference.trials),
                [
                    o.name
                    for o in results
                    if o is not result and dominates(o, result, context, requests, margin)
                ],
            )
        )
    return judged


def dominates(
    first: CandidateResult, second: CandidateResult, context: int, requests: int, margin: float
) -> bool:
    """Whether nobody needs `second`: `first` takes no more memory, decodes no slower, is shown to be no worse
    by more than `margin` on the text and not shown to be worse at retrieval, and is better at one of these.

    Only what was measured counts. Nothing dominates where no quality was measured.
    """
    checks: list[tuple[bool, bool]] = []  # (no worse, better)
    memory = [result.held.memory_bytes(context, requests) for result in (first, second)]
    checks.append((memory[0] <= memory[1], memory[0] < (1 - SAME_MEMORY) * memory[1]))
    if first.speed is not None and second.speed is not None:
        ratio = relative_speed(first, second)
        checks.append((ratio >= 1 - SAME_SPEED, ratio > 1 + SAME_SPEED))
    measured = False
    if first.text is not None and second.text is not None:
        interval = log_perplexity_ratio(first.text, second.text).interval
        checks.append(
            (interval is not None and interval.high <= margin, interval is not None and interval.high < 0)
        )
        measured = True
    change = answer_change(first.trials, second.trials)
    if change is not None:
        checks.append((change.verdict != "worse", change.verdict == "better"))
        measured = True
    return measured and all(no_worse for no_worse, _ in checks) and any(better for _, better in checks)


def relative_speed(first: CandidateResult, second: CandidateResult) -> float:
    """Decode speed of `first` over that of `second`, each taken as a ratio to the reference where it ran
    beside it, so that a busy minute of the machine does not decide."""
    assert first.speed is not None
    assert second.speed is not None
    ratios = [speed_ratio(s.decode_s, s.reference_decode_s) for s in (first.speed, second.speed)]
    one, other = (1.0 if ratio is None else ratio.value for ratio in ratios)
    return one / other
