"""A figure as several rounds gave it: its median, and how far the rounds lie apart.

Owns the order of measuring (each round runs every case once, so that a machine that gets faster or slower
does so for all of them) and what is told of the values. Knows no engine and no clock.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

Result = TypeVar("Result")


@dataclass(frozen=True)
class Measured:
    """One value a round, in the order of the rounds. There is at least one."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def low(self) -> float:
        return min(self.values)

    @property
    def high(self) -> float:
        return max(self.values)

    @property
    def spread(self) -> float:
        """Half the distance from the lowest to the highest value, as a share of the median."""
        return (self.high - self.low) / 2 / self.median if self.median else 0.0

    def per(self, amount: float) -> Measured:
        """`amount` a value: tokens / seconds."""
        return Measured(tuple(amount / value for value in self.values))


def rounds_of(
    cases: Sequence[Callable[[], Result]],
    rounds: int,
    *,
    warm_up: bool = True,
    on_done: Callable[[int], None] = lambda done: None,
) -> list[list[Result]]:
    """The results of each case, one a round; rounds go through all cases forwards and backwards by turns.

    With `warm_up` every case runs once before, and that result is dropped. `on_done` is told how many runs
    are done, of `num_runs`.
    """
    results: list[list[Result]] = [[] for _ in cases]
    done = 0
    for number in range(-1 if warm_up else 0, rounds):
        order = range(len(cases)) if number % 2 == 0 else reversed(range(len(cases)))
        for index in order:
            result = cases[index]()
            if number >= 0:
                results[index].append(result)
            done += 1
            on_done(done)
    return results


def num_runs(num_cases: int, rounds: int, *, warm_up: bool = True) -> int:
    """How often `rounds_of` runs a case, all together."""
    return num_cases * (rounds + warm_up)
