"""The KV tensors: one K and one V per layer, holding only the KV heads.

Owns the memory and its layout; `block_pool.py` owns which block belongs to whom.

    k[layer]:  [num_blocks, num_kv_heads, block_size, head_dim]
                    |            |             `---- one KV head of one block is one contiguous run,
                    |            `------------------ read once for all `group_size` query heads
                    `------------------------------- a request's blocks need not be adjacent

Invariant: never expanded to query heads. Memory starts at zero so that masked reads of unwritten slots
are finite.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from gqa_serve.engine.model_config import ModelConfig


@dataclass
class KVCache:
    """K and V of all layers; see the module's picture for the shape."""

    k: list[torch.Tensor]
    v: list[torch.Tensor]
    block_size: int
    num_blocks: int

    @classmethod
    def allocate(
        cls, config: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> KVCache:
        """Zeroed cache of `num_blocks` blocks of `block_size` tokens for every layer of `config`."""
        shape = (num_blocks, config.num_kv_heads, block_size, config.head_dim)
        k, v = (
            [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
            for _ in range(2)
        )
        return cls(k, v, block_size, num_blocks)


def block_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block over all layers: 2 (K, V) * layers * KV heads * block_size * head_dim * itemsize."""
    return block_size * config.kv_bytes_per_token(dtype.itemsize)
