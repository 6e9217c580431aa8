"""When requests arrive: seconds from the start, for a rate.

Owns the arrival processes. Knows no request. Invariant: gaps are drawn for a rate of 1 and then scaled, so
that the same seed at another rate is the same traffic, faster or slower: what a search over rates compares.
"""

from __future__ import annotations

import numpy as np

PROCESSES = ("poisson", "gamma", "constant", "all")


def arrival_times(
    process: str, count: int, rate: float, random: np.random.Generator, *, burstiness: float = 1.0
) -> list[float]:
    """`count` times in seconds, rising from the first, which is 0.

    `poisson`: independent arrivals, gaps exponential. `gamma`: gaps from a gamma distribution whose
    coefficient of variation is `burstiness` (shape 1/burstiness^2, mean 1/rate): 1 is Poisson, more comes in
    bursts, less is more even. `constant`: every 1/rate seconds. `all`: all at 0.
    """
    if process == "all":
        return [0.0] * count
    if process == "constant":
        gaps = np.ones(count - 1)
    elif process == "gamma":
        shape = burstiness**-2
        gaps = random.gamma(shape, 1 / shape, count - 1)
    else:
        gaps = random.exponential(1.0, count - 1)
    return [0.0, *(np.cumsum(gaps) / rate).tolist()]
