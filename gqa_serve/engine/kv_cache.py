"""The KV tensors: one K and one V per layer, holding only the KV heads.

Owns what every backend's cache has in common (`KVCache`), the plain one (`TensorKVCache`) and the arithmetic
of its quantized formats; `block_pool.py` owns which block belongs to whom.

    k[layer]:        [num_blocks, num_kv_heads, block_size, head_dim]
                          |            |             `---- one KV head of one block is one contiguous run,
                          |            `------------------ read once for all `group_size` query heads
                          `------------------------------- a request's blocks need not be adjacent
    k_scale[layer]:  [num_blocks, num_kv_heads, block_size] float32, in the formats int8 and fp8

Invariant: never expanded to query heads. Memory starts at zero so that masked reads of unwritten slots
are finite; in the quantized formats and in float16 whatever is written is finite too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

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


KV_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}
"""What `--kv-cache-dtype` names."""

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""Of the quantized formats: the number that the largest of a head's D numbers becomes."""

KV_LIMIT = 65504.0
"""Quantized formats hold numbers up to this, float16's largest: infinities become it, NaN becomes 0."""


class LayerKV(NamedTuple):
    """K and V of one layer, [num_blocks, KV, block_size, D]; scales [num_blocks, KV, block_size] or None."""

    k: torch.Tensor
    v: torch.Tensor
    k_scale: torch.Tensor | None
    v_scale: torch.Tensor | None


@dataclass
class TensorKVCache:
    """K and V of all layers as torch tensors; see the module's picture for the shapes.

    `k_scale` and `v_scale` are None in the float formats.
    """

    k: list[torch.Tensor]
    v: list[torch.Tensor]
    block_size: int
    num_blocks: int
    k_scale: list[torch.Tensor] | None = None
    v_scale: list[torch.Tensor] | None = None

    @classmethod
    def allocate(
        cls, config: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> TensorKVCache:
        """Zeroed cache of `num_blocks` blocks of `block_size` tokens for every layer of `config`.

        Raises CacheCapacityError if the device does not have the memory.
        """
        slots = (num_blocks, config.num_kv_heads, block_size)

        def per_layer(shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
            return [_zeros(shape, dtype, device) for _ in range(config.num_layers)]

        try:
            k, v = (per_layer((*slots, config.head_dim), dtype) for _ in range(2))
            if dtype not in LARGEST:
                return cls(k, v, block_size, num_blocks)
            k_scale, v_scale = (per_layer(slots, torch.float32) for _ in range(2))
        except (MemoryError, RuntimeError) as error:  # torch reports a failed allocation as RuntimeError
            raise CacheCapacityError(
                f"There is no memory for {num_blocks} KV blocks of {block_size} tokens; "
                "lower --kv-cache-memory."
            ) from error
        return cls(k, v, block_size, num_blocks, k_scale, v_scale)

    @staticmethod
    def block_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
        """Bytes of one block over all layers, scales included."""
        scales = 2 * config.num_layers * config.num_kv_heads * 4 if dtype in LARGEST else 0
        return block_size * (config.kv_bytes_per_token(dtype.itemsize) + scales)

    def layer(self, layer: int) -> LayerKV:
        """The tensors of one layer."""
        if self.k_scale is None or self.v_scale is None:
            return LayerKV(self.k[layer], self.v[layer], None, None)
        return LayerKV(self.k[layer], self.v[layer], self.k_scale[layer], self.v_scale[layer])


def quantize_kv(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., D] -> (numbers [..., D] of `dtype`, scales [...] float32) with x = numbers * scale, nearly.

    One scale for the D numbers of one head of one token: the largest becomes 127 (int8) or 448 (fp8, which is
    float8_e4m3fn); a head of zeros has scale 0. Ties round to even.
    """
    largest = LARGEST[dtype]
    wide = x.float().nan_to_num(nan=0.0).clamp(-KV_LIMIT, KV_LIMIT)
    scale = wide.abs().amax(dim=-1) / largest  # [...]
    numbers = (wide / torch.where(scale > 0, scale, 1.0)[..., None]).clamp(-largest, largest)
    return (numbers.round() if dtype == torch.int8 else numbers).to(dtype), scale


def dequantize_kv(numbers: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The other way: numbers [..., D] * scale [...], multiplied in float32, in `dtype`."""
    return (numbers.float() * scale[..., None]).to(dtype)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros; on a CPU by way of calloc, so that pages cost memory only once a block is used."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)
