"""From the hidden states of a prompt to one vector: `Pool` in the engine, `unit_vector` for who asked.

Owns the order of the sum: tokens are added one by one in the order of their positions, in float64, so that
the mean has the same bits however the prompt was cut into steps and whatever else these computed. Knows
neither requests nor devices.
"""

from __future__ import annotations

import numpy as np

_ROWS = 64
"""Rows summed at a time: bounds the float64 temporaries."""


class Pool:
    """The hidden states [n, E] float32 of one prompt, chunk by chunk: the last one, and the sum of all."""

    def __init__(self) -> None:
        self._sum: np.ndarray | None = None  # [E] float64
        self._count = 0
        self._last: np.ndarray | None = None  # [E] float32

    def add(self, start: int, hidden: np.ndarray) -> None:
        """Those of the tokens from position `start` on. After a preemption they all come again."""
        if start == 0:
            self._sum, self._count = None, 0
        for first in range(0, len(hidden), _ROWS):
            rows = hidden[first : first + _ROWS].astype(np.float64)
            if self._sum is not None:
                rows[0] += self._sum
            self._sum = rows.cumsum(axis=0)[-1]  # unlike sum(), which may add in any order
        self._count += len(hidden)
        self._last = np.array(hidden[-1])

    def last(self) -> np.ndarray:
        """[E] float32: the state of the last token."""
        assert self._last is not None
        return self._last

    def mean(self) -> np.ndarray:
        """[E] float32: the mean over all tokens."""
        assert self._sum is not None
        return np.asarray(self._sum / self._count, np.float32)


def unit_vector(pooled: bytes, dimensions: int | None = None) -> np.ndarray:
    """`TokenOutput.pooled`, cut to its first `dimensions`, as float32 of length 1. All zeros stay so."""
    vector = np.frombuffer(pooled, "<f4")[:dimensions].astype(np.float64)
    length = float(np.sqrt(np.cumsum(vector * vector)[-1]))
    return np.asarray(vector / length if length > 0 else vector, np.float32)
