"""How sure a measured number is: Wilson's interval for shares, the bootstrap for ratios.

Owns the statistics. Knows no model. Numpy alone, so that no answer depends on an extra that may be missing.
Invariant: deterministic (a fixed seed), and an interval that the data cannot give is None, never a guess.

The bootstrap resamples whole blocks of text, because the tokens of one passage are not independent of each
other, and it resamples the same blocks for both sides of a difference: most of what varies from passage to
passage is then common to both and cancels (a paired comparison).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95
REPLICATES = 4000
MIN_BLOCKS = 4
"""With fewer the bootstrap has next to nothing to draw from."""

_SEED = 20170612
_ROWS = 500  # replicates at a time: bounds temporaries


class Interval(NamedTuple):
    """Where the true value lies, with the stated confidence."""

    low: float
    high: float

    def holds(self, value: float) -> bool:
        """Whether `value` can't be told from the measured one."""
        return self.low <= value <= self.high


def wilson(num_hits: int, num_trials: int, confidence: float = CONFIDENCE) -> Interval | None:
    """Interval of a share (E. B. Wilson 1927, "Probable inference, the law of succession, and statistical
    inference"): right also near 0 and 1 and for few trials, where +-2 standard errors is not. None without a
    trial."""
    if num_trials == 0:
        return None
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share, weight = num_hits / num_trials, z * z / num_trials
    center = (share + weight / 2) / (1 + weight)
    half = z / (1 + weight) * math.sqrt(share * (1 - share) / num_trials + weight / (4 * num_trials))
    return Interval(max(0.0, center - half), min(1.0, center + half))


def bootstrap(
    statistic: Callable[[np.ndarray], np.ndarray],
    blocks: np.ndarray,
    confidence: float = CONFIDENCE,
    replicates: int = REPLICATES,
) -> Interval | None:
    """Interval of `statistic`, a function of sums over blocks, by resampling blocks with replacement.

    blocks [B, K]: K sums of each block (say of negative log-likelihoods, and of tokens). `statistic` takes
    sums [R, K] over R resampled sets of blocks and gives [R] values. None with fewer than `MIN_BLOCKS`.

    Percentiles are taken further out than their names, as Hesterberg 2015 ("What teachers should know about
    the bootstrap", section 3.2, the expanded percentile interval) corrects the plain interval, which is too
    narrow for few blocks: by sqrt(B / (B - 1)), and by Student's t for the normal quantile.
    """
    count = len(blocks)
    if count < MIN_BLOCKS:
        return None
    values = [statistic(picks @ blocks) for picks in _draws(count, replicates)]
    reach = math.sqrt(count / (count - 1)) * student_t_quantile(0.5 + confidence / 2, count - 1)
    tail = NormalDist().cdf(-reach)
    low, high = np.quantile(np.concatenate(values), [tail, 1 - tail])
    return Interval(float(low), float(high))


@functools.lru_cache(maxsize=2)
def _draws(count: int, replicates: int) -> list[np.ndarray]:
    """How often each of `count` blocks is drawn, [rows, count] in parts: the same for every statistic."""
    generator = np.random.default_rng(_SEED)
    sizes = [min(_ROWS, replicates - begin) for begin in range(0, replicates, _ROWS)]
    even = np.full(count, 1 / count)
    return [generator.multinomial(count, even, size=rows).astype(np.float64) for rows in sizes]


def median_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval | None:
    """Interval of the median of what `values` are drawn from, between two of them: exact whatever their
    distribution (the order statistics' coverage is binomial; David and Nagaraja, "Order statistics", 7.1).
    None with too few."""
    ordered, count = sorted(values), len(values)
    below, rank = 0.0, 0
    while (below := below + math.comb(count, rank) / 2**count) <= (1 - confidence) / 2:
        rank += 1
    return Interval(ordered[rank - 1], ordered[count - rank]) if rank else None


@functools.cache
def student_t_quantile(probability: float, degrees: int) -> float:
    """The quantile of Student's t, for probabilities of at least 1/2, by bisection over `_t_mass`."""
    low, high = 0.0, 2.0
    while 0.5 + _t_mass(high, degrees) < probability:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if 0.5 + _t_mass(middle, degrees) < probability else (low, middle)
    return (low + high) / 2


@functools.cache
def _legendre() -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights on [-1, 1]."""
    return np.polynomial.legendre.leggauss(200)


def _t_mass(t: float, degrees: int) -> float:
    """P(0 < T < t). With T = sqrt(degrees) tan(angle) the density is that of cos(angle)^(degrees - 1), which
    is smooth and bounded: Gauss and Legendre's rule integrates it to machine precision."""
    log_scale = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2) - 0.5 * math.log(math.pi)
    nodes, weights = _legendre()
    half = math.atan(t / math.sqrt(degrees)) / 2
    cosines = np.cos(half * (nodes + 1))
    return float(math.exp(log_scale) * half * np.sum(weights * cosines ** (degrees - 1)))
