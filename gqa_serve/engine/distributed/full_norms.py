"""RMSNorm over all query heads, and over all key heads, where each rank has some of them (OLMo 2).

Owns the mean over heads of other ranks: the sums of squares are added up, one pair of numbers per token. What
is normed then is each rank's own. The formula is that of `Backend.rms_norm`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gqa_serve.engine.backends.base import HeadNorms
from gqa_serve.engine.distributed.group import RankGroup
from gqa_serve.engine.distributed.shard import Shard


@dataclass(frozen=True, eq=False)
class FullNorms:
    """`norms` has this rank's part of the weights: q [H * D], k [KV * D], float32."""

    group: RankGroup
    shard: Shard
    norms: HeadNorms

    def __call__(self, qkv: torch.Tensor) -> None:
        """Norm queries and keys in qkv [T, (H + 2 KV) * D], in place."""
        whole = self.shard.whole
        queries, keys = self.norms.q.numel(), self.norms.k.numel()
        q, k, _ = qkv.split_with_sizes((queries, keys, keys), 1)
        squares = torch.stack([part.float().square().sum(1) for part in (q, k)], 1)  # [T, 2]
        if not self.shard.is_first_copy:
            squares[:, 1] = 0.0  # these keys are counted by another rank
        self.group.add_up(squares)
        for part, weight, heads, total in (
            (q, self.norms.q, whole.num_heads, squares[:, :1]),
            (k, self.norms.k, whole.num_kv_heads, squares[:, 1:]),
        ):
            mean = total / (heads * whole.head_dim)
            part.copy_(part.float() * torch.rsqrt(mean + self.norms.eps) * weight)
