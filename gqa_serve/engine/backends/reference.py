"""Plain torch: runs wherever torch runs, and says what every other backend must compute.

Owns the simple operations; grouped attention over the paged cache is in `reference_attention.py`. Knows no
model.
Invariant: readable first; where two ways are equally readable, the one with fewer torch calls, because at
batch 1 a small model's step is mostly the cost of calling.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from gqa_serve.engine.backends.base import AttentionLayout, AttentionStep, Backend, Linear
from gqa_serve.engine.backends.reference_attention import ReferenceAttentionStep

if TYPE_CHECKING:
    from gqa_serve.engine.batch import ForwardBatch
    from gqa_serve.engine.kv_cache import KVCache
    from gqa_serve.engine.model_config import Activation

# Numbers of tokens for which weight @ x.T beats x @ weight.T on CPUs (measured with MKL, float32).
_MIN_COLUMNS, _MAX_COLUMNS = 6, 48


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
    """The oracle."""

    name = "reference"

    def __init__(self, device: torch.device) -> None:
        # CPU matrix libraries multiply few rows by a tall weight much faster as weight times columns.
        self.columns = device.type == "cpu"
        # As tensors, because a Python number costs an operation of its own to become one.
        self.epsilons: dict[float, torch.Tensor] = {}

    def pack_linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        return ReferenceLinear(weight, bias, self.columns)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.float()
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        epsilon = self.epsilons.get(eps)
        if epsilon is None:
            epsilon = self.epsilons[eps] = torch.tensor(eps, device=x.device)
        inverse = torch.addcmul(epsilon, norm, norm, value=1.0 / x.shape[-1]).rsqrt_()
        normed: torch.Tensor = (wide * inverse).mul_(weight).to(x.dtype)
        return normed

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, scale: float
    ) -> torch.Tensor:
        return self.rms_norm(residual.add_(x, alpha=scale), weight, eps)

    def gated_activation(self, gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        if activation == "silu":
            return F.silu(gate).mul_(up)
        return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none").mul_(up)

    def prepare(self, batch: ForwardBatch, cache: KVCache, layout: AttentionLayout) -> AttentionStep:
        return ReferenceAttentionStep(batch, cache, layout)
