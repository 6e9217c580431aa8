"""Plain torch: runs wherever torch runs, and says what every other backend must compute.

Owns the simple operations; grouped attention over the paged cache is in `reference_attention.py`. Knows no
model.
Invariant: readable first; where two ways are equally readable, the one with fewer torch calls, because at
batch 1 a small model's step is mostly the cost of calling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F

from gqa_serve.engine.backends.base import (
    AttentionLayout,
    AttentionStep,
    Backend,
    Entries,
    Linear,
    Packed,
    Role,
)
from gqa_serve.engine.backends.reference_attention import ReferenceAttentionStep
from gqa_serve.engine.kv_cache import KV_DTYPES, KVCache, TensorKVCache

if TYPE_CHECKING:
    from gqa_serve.engine.batch import ForwardBatch
    from gqa_serve.engine.model_config import Activation, ModelConfig
    from gqa_serve.engine.weights.quantized_matrix import QuantizedMatrix

# Numbers of tokens for which weight @ x.T beats x @ weight.T on CPUs (measured with MKL, float32).
_MIN_COLUMNS, _MAX_COLUMNS = 6, 48


@dataclass(frozen=True, eq=False)
class ReferenceMatrix:
    """[n, k] in the backend's dtype, as it is."""

    tensor: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    @property
    def format(self) -> str:
        return dtype_name(self.tensor.dtype)


class ReferenceLinear:
    """weight [out, in] and bias [out] as they are."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, columns: bool) -> None:
        self.weight = weight
        self.transposed = weight.t()  # a view, made once
        self.bias = bias
        self.columns = columns

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.columns and _MIN_COLUMNS <= x.shape[0] <= _MAX_COLUMNS:
            out = torch.mm(self.weight, x.t()).t().contiguous()  # [T, out]
            return out if self.bias is None else out.add_(self.bias)
        if self.bias is None:
            return torch.mm(x, self.transposed)
        return torch.addmm(self.bias, x, self.transposed)


class ReferenceBackend(Backend):
    """The oracle. Weights and activations are in `dtype`, K and V in `kv_dtype` (default: the same)."""

    name = "reference"

    def __init__(self, device: torch.device, dtype: torch.dtype, kv_dtype: torch.dtype | None = None) -> None:
        self.device = device
        self.dtype = dtype
        self.cache_dtype = kv_dtype or dtype
        self.kv_dtype = next(name for name, held in KV_DTYPES.items() if held == self.cache_dtype)
        # CPU matrix libraries multiply few rows by a tall weight much faster as weight times columns.
        self.columns = device.type == "cpu"
        # As tensors, because a Python number costs an operation of its own to become one.
        self.epsilons: dict[float, torch.Tensor] = {}

    def pack(self, weight: torch.Tensor | QuantizedMatrix, role: Role) -> Packed:
        tensor = weight if isinstance(weight, torch.Tensor) else weight.dequantize()
        return ReferenceMatrix(tensor.to(self.device, self.dtype, copy=True))

    def linear(self, parts: Sequence[Packed], bias: torch.Tensor | None) -> Linear:
        tensors = [cast("ReferenceMatrix", part).tensor for part in parts]
        weight = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        return ReferenceLinear(weight, None if bias is None else bias.to(self.dtype), self.columns)

    def block_bytes(self, config: ModelConfig, block_size: int) -> int:
        return TensorKVCache.block_bytes(config, block_size, self.cache_dtype)

    def allocate_cache(self, config: ModelConfig, num_blocks: int, block_size: int) -> KVCache:
        return TensorKVCache.allocate(config, num_blocks, block_size, self.cache_dtype, self.device)

    def embed(
        self, table: Packed, token_ids: torch.Tensor, scale: float, entries: Entries | None = None
    ) -> torch.Tensor:
        matrix = cast("ReferenceMatrix", table).tensor
        if entries is None:
            rows = F.embedding(token_ids, matrix)  # [T, E]
        else:
            row, elsewhere = entries.place(token_ids)
            rows = F.embedding(row, matrix).masked_fill_(elsewhere[:, None], 0.0)  # [T, E]
        return rows if scale == 1.0 else rows * torch.tensor(scale, dtype=rows.dtype)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Also for heads: weight [heads, D] and x [T, heads, D]."""
        wide = x.float()
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        epsilon = self.epsilons.get(eps)
        if epsilon is None:
            epsilon = self.epsilons[eps] = torch.tensor(eps, device=x.device)
        inverse = torch.addcmul(epsilon, norm, norm, value=1.0 / x.shape[-1]).rsqrt_()
        normed: torch.Tensor = (wide * inverse).mul_(weight).to(x.dtype)
        return normed

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float, scale: float
    ) -> torch.Tensor:
        residual.add_(x, alpha=scale)
        return residual if weight is None else self.rms_norm(residual, weight, eps)

    def gated_activation(self, gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        if activation == "silu":
            return F.silu(gate).mul_(up)
        return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none").mul_(up)

    def prepare(self, batch: ForwardBatch, cache: KVCache, layout: AttentionLayout) -> AttentionStep:
        return ReferenceAttentionStep(batch, cast("TensorKVCache", cache), layout, self.dtype, self.rms_norm)

    def logits(self, head: Linear, hidden: torch.Tensor, scale: float, cap: float | None) -> torch.Tensor:
        logits = head(hidden).float()  # [R, V]
        if scale != 1.0:
            logits = logits * scale
        return logits if cap is None else torch.tanh(logits / cap) * cap


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" of torch.float32."""
    return str(dtype).removeprefix("torch.")
