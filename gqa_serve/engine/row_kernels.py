"""The sampler's row operations over a backend's kernels, which take tensors where they lie.

Owns how parameters of requests get to the device: all of them in one copy that nobody waits for. What a draw
is, the kernels know (`kernels/triton/sampling.py`); which rows are drawn, the sampler.
Invariant: a filter that no row has is not computed, and that changes no token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from gqa_serve.engine.sampler import mask_rows
from gqa_serve.engine.transfer import all_to_device

if TYPE_CHECKING:
    from gqa_serve.engine.request import SamplingParams


class RowKernels(Protocol):
    """Functions that launch kernels; a module of such functions will do."""

    def argmax(self, logits: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """logits [R, V] float32 -> out [R] int64, -1 for a row with a value that is not finite."""

    def draw(
        self,
        logits: torch.Tensor,
        rows: torch.Tensor,
        temperature: torch.Tensor,
        top_k: torch.Tensor | None,
        top_p: torch.Tensor | None,
        min_p: torch.Tensor | None,
        unit: torch.Tensor,
        out: torch.Tensor,
    ) -> torch.Tensor:
        """logits [R, V] float32 -> out [S] int64, of row `rows[s]` the token at `unit[s]`.

        rows, top_k [S] int32; temperature [S] float32; top_p, min_p, unit [S] float64. None: no row has it.
        """


class KernelRows:
    """`RowOperations` (engine/sampler.py) of a device with kernels for them."""

    def __init__(self, kernels: RowKernels) -> None:
        self.kernels = kernels

    def argmax(self, logits: torch.Tensor) -> torch.Tensor:
        return self.kernels.argmax(logits, _tokens(logits.shape[0], logits))

    def mask(self, logits: torch.Tensor, rows: Sequence[int], masks: Sequence[bytes]) -> torch.Tensor:
        return mask_rows(logits, rows, masks)

    def draw(
        self,
        logits: torch.Tensor,
        rows: Sequence[int],
        params: Sequence[SamplingParams],
        units: Sequence[float],
    ) -> torch.Tensor:
        row, temperature, top_k, top_p, min_p, unit = all_to_device(
            [
                np.array(rows, np.int32),
                np.array([p.temperature for p in params], np.float32),
                np.array([min(max(0, p.top_k), logits.shape[1]) for p in params], np.int32),
                np.array([p.top_p for p in params]),
                np.array([p.min_p for p in params]),
                np.array(units),
            ],
            logits.device,
        )
        return self.kernels.draw(
            logits,
            row,
            temperature,
            top_k if any(p.top_k > 0 for p in params) else None,
            top_p if any(p.top_p < 1 for p in params) else None,
            min_p if any(p.min_p > 0 for p in params) else None,
            unit,
            _tokens(len(rows), logits),
        )


def _tokens(count: int, logits: torch.Tensor) -> torch.Tensor:
    return torch.empty(count, dtype=torch.int64, device=logits.device)
