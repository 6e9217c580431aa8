"""The gated activation between the two halves of an MLP: activation(gate) * up.

One program per row and tile of columns, every number by itself, so nothing here depends on the batch.
Computed in float32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, get_args

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from gqa_serve.engine.kernels.triton.variants import Variant
from gqa_serve.engine.model_config import Activation


class Config(NamedTuple):
    """Columns and warps of one program."""

    block: int
    num_warps: int


def config(width: int) -> Config:
    """Eight numbers per thread, 16 bytes in half precision; small tiles, so that one row fills many SMs."""
    block = min(triton.next_power_of_2(width), 1024)
    return Config(block, max(block // 256, 1))


@triton.jit
def _sigmoid(x):
    """1 / (1 + exp(-x)), of which no intermediate overflows."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, small) / (1.0 + small)


@triton.jit
def _activated(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        return x * _sigmoid(x)
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))  # 1 / sqrt(2)
    else:
        # (1 + tanh(u)) / 2 = sigmoid(2u), with u = sqrt(2 / pi) (x + 0.044715 x^3)
        tl.static_assert(ACTIVATION == "gelu_tanh")
        return x * _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def _gated_activation_kernel(
    gate_up, out, gate_up_stride, out_stride, width, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    source = gate_up + row * gate_up_stride + column
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + width, mask=inside, other=0.0).to(tl.float32)
    result = _activated(gate, ACTIVATION) * up
    tl.store(out + row * out_stride + column, result.to(out.dtype.element_ty), mask=inside)


def gated_activation(gate_up: torch.Tensor, activation: Activation, out: torch.Tensor) -> torch.Tensor:
    """gate_up [T, 2I] -> out = activation(first half) * second half, [T, I]; returns `out`."""
    rows, width = out.shape
    block, num_warps = config(width)
    _gated_activation_kernel[(rows, triton.cdiv(width, block))](
        gate_up,
        out,
        gate_up.stride(0),
        out.stride(0),
        width,
        ACTIVATION=activation,
        BLOCK=block,
        num_warps=num_warps,
        num_stages=1,
    )
    return out


def gated_activation_twin(gate_up: torch.Tensor, activation: Activation, out: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.float().chunk(2, dim=-1)
    if activation == "silu":
        return out.copy_(F.silu(gate) * up)
    return out.copy_(F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none") * up)


def variants() -> Iterator[Variant]:
    """The tile is the same from 1024 columns on; narrower MLPs are those of toys."""
    block, num_warps = config(14336)
    for dtype in ("bf16", "fp16"):
        for activation in get_args(Activation):
            signature = {
                "gate_up": f"*{dtype}", "out": f"*{dtype}",
                "gate_up_stride": "i32:16", "out_stride": "i32:16", "width": "i32:16",
            }  # fmt: skip
            yield Variant(
                _gated_activation_kernel, f"{dtype} {activation}", signature,
                {"ACTIVATION": activation, "BLOCK": block}, num_warps=num_warps, num_stages=1,
            )  # fmt: skip
