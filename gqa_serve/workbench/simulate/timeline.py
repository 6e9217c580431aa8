"""How a replica fared over virtual time: KV blocks in use, requests running and waiting.

Owns thinning: a run of seconds or of days keeps about as many points. Knows no scheduler.
Invariant: times rise; means and peaks are over every step, the points are a selection of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

_MOST_POINTS = 1024


@dataclass
class Timeline:
    """Points (time, used blocks, running, waiting), each holding from its time to the next."""

    points: list[tuple[float, int, int, int]] = field(default_factory=lambda: [(0.0, 0, 0, 0)])
    peak_used: int = 0
    peak_running: int = 0
    peak_waiting: int = 0
    used_seconds: float = 0.0
    """Blocks times seconds that they were in use."""
    _last_s: float = 0.0
    _last_used: int = 0
    _next_s: float = 0.0
    _interval_s: float = 0.0

    def add(self, now: float, used: int, running: int, waiting: int) -> None:
        """From `now` on it is so."""
        self.used_seconds += self._last_used * (now - self._last_s)
        self._last_s, self._last_used = now, used
        if used > self.peak_used:
            self.peak_used = used
        if running > self.peak_running:
            self.peak_running = running
        if waiting > self.peak_waiting:
            self.peak_waiting = waiting
        if now >= self._next_s:
            self.points.append((now, used, running, waiting))
            self._next_s = now + self._interval_s
            if len(self.points) >= _MOST_POINTS:
                self.points = self.points[::2]
                self._interval_s = 2 * now / _MOST_POINTS


def on_grid(timelines: Sequence[Timeline], end_s: float, num_points: int = 200) -> npt.NDArray[np.float64]:
    """[4, num_points]: times from 0 to `end_s`, and the sums over the replicas at those times."""
    grid = np.linspace(0.0, end_s, num_points)
    total = np.zeros((4, num_points))
    total[0] = grid
    for timeline in timelines:
        points = np.asarray(timeline.points)
        total[1:] += points[np.searchsorted(points[:, 0], grid, side="right") - 1, 1:].T
    return total
