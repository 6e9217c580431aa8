"""The learning rate of each step: linear warm-up, then half a cosine down to a share of the peak.

A pure function of the step (Loshchilov and Hutter 2017, arXiv 1608.03983, without restarts), so that a run
which is resumed needs no state for it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """`peak` is reached at the end of `warmup_steps`; the last step runs at `peak * final_share`."""

    peak: float
    num_steps: int
    warmup_steps: int
    final_share: float

    def rate(self, step: int) -> float:
        """Of step 0, 1, ... num_steps - 1."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        length = self.num_steps - 1 - self.warmup_steps
        progress = min(1.0, (step - self.warmup_steps) / length) if length > 0 else 0.0
        share = self.final_share + (1 - self.final_share) * 0.5 * (1 + math.cos(math.pi * progress))
        return self.peak * share
