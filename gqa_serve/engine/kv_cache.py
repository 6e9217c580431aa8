"""The KV tensors: one K and one V per layer, holding only the KV heads.

Owns what every backend's cache has in common (`KVCache`) and the plain one (`TensorKVCache`); `block_pool.py`
owns which block belongs to whom.

    k[layer]:  [num_blocks, num_kv_heads, block_size, head_dim]
                    |            |             `---- one KV head of one block is one contiguous run,
                    |            `------------------ read once for all `group_size` query heads
                    `------------------------------- a request's blocks need not be adjacent

Invariant: never expanded to query heads. Memory starts at zero so that masked reads of unwritten slots
are finite.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from gqa_serve.errors import CacheCapacityError

if TYPE_CHECKING:
    from gqa_serve.engine.model_config import ModelConfig


class KVCache(Protocol):
    """K and V of all layers; how they lie in memory is the business of the backend that allocated them."""

    @property
    def block_size(self) -> int: ...

    @property
    def num_blocks(self) -> int: ...


@dataclass
class TensorKVCache:
    """K and V of all layers as torch tensors; see the module's picture for the shape."""

    k: list[torch.Tensor]
    v: list[torch.Tensor]
    block_size: int
    num_blocks: int

    @classmethod
    def allocate(
        cls, config: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> TensorKVCache:
        """Zeroed cache of `num_blocks` blocks of `block_size` tokens for every layer of `config`.

        Raises CacheCapacityError if the device does not have the memory.
        """
        shape = (num_blocks, config.num_kv_heads, block_size, config.head_dim)
        try:
            k, v = ([_zeros(shape, dtype, device) for _ in range(config.num_layers)] for _ in range(2))
        except (MemoryError, RuntimeError) as error:  # torch reports a failed allocation as RuntimeError
            raise CacheCapacityError(
                f"There is no memory for {num_blocks} KV blocks of {block_size} tokens; "
                "lower --kv-cache-memory."
            ) from error
        return cls(k, v, block_size, num_blocks)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros; on a CPU by way of calloc, so that pages cost memory only once a block is used."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)
