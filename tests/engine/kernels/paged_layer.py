"""Random requests over one layer of paged KV cache: scattered blocks, stale garbage where nobody looks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gqa_serve.engine.batch import PlanRow, StepPlan
from gqa_serve.engine.kv_cache import LayerKV, quantize_kv


@dataclass
class Paged:
    """One layer's cache, and the requests that have blocks in it."""

    kv: LayerKV
    plan: StepPlan
    block_size: int

    def context(self, request: int, name: str) -> torch.Tensor:
        """K or V of a request as attention should see it: [context, KV, D] float64."""
        row = self.plan.rows[request]
        stored = getattr(self.kv, name)
        position = torch.arange(row.start + len(row.token_ids))
        block = torch.tensor(row.block_ids)[position // self.block_size]
        values = stored[block, :, position % self.block_size].double()
        scale = getattr(self.kv, f"{name}_scale")
        return (
            values if scale is None else values * scale[block, :, position % self.block_size, None].double()
        )


def paged(
    lens: Sequence[tuple[int, int]],
    *,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Paged:
    """`lens`: (computed tokens, new tokens) of each request. Everything that no request holds is NaN (float
    formats) or full scale."""
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-(computed + new) // block_size) for computed, new in lens]
    order = torch.randperm(sum(counts) + 3, generator=generator).tolist()
    shape = (len(order), num_kv_heads, block_size, head_dim)
    rows = []
    used = torch.zeros(shape[0], block_size, dtype=torch.bool)
    for (computed, new), count in zip(lens, counts, strict=True):
        blocks, order = order[:count], order[count:]
        rows.append(PlanRow([1] * new, computed, blocks, 1))
        position = torch.arange(computed + new)
        used[torch.tensor(blocks)[position // block_size], position % block_size] = True
    stored = []
    for _ in range(2):
        x = torch.randn(shape, generator=generator)
        if dtype.itemsize == 1:
            q, scale = quantize_kv(x, dtype)
            scale = torch.where(used[:, None], scale, torch.nan)
            stored.append((q, scale))
        else:
            stored.append((torch.where(used[:, None, :, None], x, torch.nan).to(dtype), None))
    (k, k_scale), (v, v_scale) = stored
    return Paged(LayerKV(k, v, k_scale, v_scale), StepPlan(rows), block_size)
