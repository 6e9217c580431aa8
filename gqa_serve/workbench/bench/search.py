"""The highest rate that a server sustains within objectives: bracket, then bisect.

Owns the search and its criterion. Knows no HTTP: `try_rate` measures one rate.
Invariant: the answer was itself measured and passed, and a rate at most `resolution` above it failed, unless
a bound of the search was hit, which is said.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from gqa_serve.workbench.records import Summary

_STEP = 2.0
_MAX_STEPS = 12
"""Up or down from where it starts: a factor of 4096."""


@dataclass(frozen=True)
class Point:
    """One measured rate. `num_met` of `num_requests` kept the objectives."""

    rate: float
    num_met: int
    summary: Summary
    passed: bool

    @property
    def attainment(self) -> float:
        """The part of all requests that kept the objectives."""
        return self.num_met / self.summary.num_requests

    @property
    def bounds(self) -> tuple[float, float]:
        """Wilson's 95 % interval of `attainment` (Wilson 1927)."""
        return wilson(self.num_met, self.summary.num_requests)


@dataclass(frozen=True)
class Found:
    """All points by rate, the best that passed, and the lowest that failed above it."""

    points: list[Point]
    best: Point | None
    failed: Point | None


def wilson(successes: int, count: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Bounds of a proportion; z = 1.96 is 95 %."""
    share = successes / count
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)


async def find_highest_rate(
    try_rate: Callable[[float], Awaitable[Point | None]],
    start: float,
    *,
    resolution: float = 0.1,
    max_rate: float = math.inf,
) -> Found:
    """Search from `start` requests/s. `try_rate` returns None to stop early (Ctrl-C)."""
    points: list[Point] = []

    async def tried(rate: float) -> Point | None:
        point = await try_rate(rate)
        if point is not None:
            points.append(point)
        return point

    def found() -> Found:
        points.sort(key=lambda point: point.rate)
        passed = [point for point in points if point.passed]
        best = passed[-1] if passed else None
        above = [point for point in points if not point.passed and (best is None or point.rate > best.rate)]
        return Found(points, best, above[0] if above else None)

    rate = min(start, max_rate)
    point = await tried(rate)
    if point is None:
        return found()
    rising = point.passed
    for _ in range(_MAX_STEPS):
        if rising and rate >= max_rate:
            return found()
        rate = min(rate * _STEP, max_rate) if rising else rate / _STEP
        point = await tried(rate)
        if point is None:
            return found()
        if point.passed != rising:
            break
    while True:
        now = found()
        if now.best is None or now.failed is None or now.failed.rate <= now.best.rate * (1 + resolution):
            return now
        if await tried(math.sqrt(now.best.rate * now.failed.rate)) is None:
            return found()
