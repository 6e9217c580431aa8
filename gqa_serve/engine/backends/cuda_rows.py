"""The sampler's operations on rows of logits, by the kernels of `kernels/triton/sampling.py`.

Owns how parameters of requests become tensors. Waits for nothing: parameters go to the device in one pinned
copy, tokens stay there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from gqa_serve.engine.kernels.triton.sampling import argmax, draw
from gqa_serve.engine.request import SamplingParams
from gqa_serve.engine.transfer import to_device


class CudaRows:
    """`RowOperations` on a GPU (engine/sampler.py)."""

    def argmax(self, logits: torch.Tensor) -> torch.Tensor:
        return argmax(logits, _tokens(len(logits), logits.device))

    def draw(
        self,
        logits: torch.Tensor,
        rows: Sequence[int],
        params: Sequence[SamplingParams],
        units: Sequence[float],
    ) -> torch.Tensor:
        columns = [(p.temperature, p.top_p, p.min_p) for p in params]
        numbers = np.array([[*column, unit] for column, unit in zip(columns, units, strict=True)])
        temperature, top_p, min_p, unit = to_device(numbers.T.copy(), logits.device)  # [S] float64 each
        integers = np.array([rows, [max(0, p.top_k) for p in params]])
        row, top_k = to_device(np.minimum(integers, np.iinfo(np.int32).max), logits.device).int()
        return draw(
            logits,
            row,
            temperature.float(),
            top_k if any(p.top_k > 0 for p in params) else None,
            top_p if any(p.top_p < 1 for p in params) else None,
            min_p if any(p.min_p > 0 for p in params) else None,
            unit,
            _tokens(len(rows), logits.device),
        )


def _tokens(count: int, device: torch.device) -> torch.Tensor:
    return torch.empty(count, dtype=torch.int64, device=device)
