"""RMSNorm of rows, alone or after adding to the residual stream.

One program per row, the whole row in one tile: a row's sum of squares is added up in an order that depends on
its width alone. Rows may lie apart (a part of a wider matrix), their numbers may not. In place is fine: a
program has read its row before it writes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from gqa_serve.engine.kernels.triton.variants import Variant


class Config(NamedTuple):
    """Tile width (at least a row's) and warps of one program."""

    block: int
    num_warps: int


def config(width: int) -> Config:
    """Eight numbers per thread, 16 bytes in half precision, until a program has 16 warps."""
    block = triton.next_power_of_2(width)
    return Config(block, min(max(block // 256, 1), 16))


@triton.jit
def _normed(wide, weight, column, width, eps, inside):
    """wide [BLOCK] float32, 0 outside the row -> the same, normed and weighted."""
    inverse = tl.rsqrt(tl.sum(wide * wide) / width + eps)
    return wide * inverse * tl.load(weight + column, mask=inside, other=0.0)


@triton.jit
def _rms_norm_kernel(x, weight, out, x_stride, out_stride, width, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    wide = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    normed = _normed(wide, weight, column, width, eps, inside)
    tl.store(out + row * out_stride + column, normed.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _add_rms_norm_kernel(
    x, residual, weight, out, x_stride, residual_stride, out_stride, width, eps, scale, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    added = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    stream = residual + row * residual_stride + column
    total = tl.load(stream, mask=inside, other=0.0).to(tl.float32) + added * scale
    kept = total.to(residual.dtype.element_ty)
    tl.store(stream, kept, mask=inside)
    if weight is not None:
        # What is normed is what the stream holds, rounded: a later layer reads the same number.
        normed = _normed(kept.to(tl.float32), weight, column, width, eps, inside)
        tl.store(out + row * out_stride + column, normed.to(out.dtype.element_ty), mask=inside)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> torch.Tensor:
    """out = x / sqrt(mean(x^2) + eps) * weight, row by row, computed in float32; returns `out`.

    x, out [T, E], numbers of a row adjacent, `out` may be `x`; weight [E] float32. For norms of single heads
    T counts heads.
    """
    rows, width = x.shape
    block, num_warps = config(width)
    _rms_norm_kernel[(rows,)](
        x, weight, out, x.stride(0), out.stride(0), width, eps, BLOCK=block, num_warps=num_warps, num_stages=1
    )
    return out


def rms_norm_twin(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    inverse = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return out.copy_(wide * inverse * weight)


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    scale: float,
    out: torch.Tensor | None,
) -> torch.Tensor:
    """residual += scale * x in place, then out = rms_norm(residual); returns `out`.

    Without a weight there is no norm and no `out`: returns `residual`. All [T, E]; weight [E] float32.
    """
    rows, width = x.shape
    block, num_warps = config(width)
    _add_rms_norm_kernel[(rows,)](
        x,
        residual,
        weight,
        out,
        x.stride(0),
        residual.stride(0),
        0 if out is None else out.stride(0),
        width,
        eps,
        scale,
        BLOCK=block,
        num_warps=num_warps,
        num_stages=1,
    )
    return residual if out is None else out


def add_rms_norm_twin(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    scale: float,
    out: torch.Tensor | None,
) -> torch.Tensor:
    residual.copy_(residual.float() + x.float() * scale)
    if weight is None or out is None:
        return residual
    return rms_norm_twin(residual, weight, eps, out)


def variants() -> Iterator[Variant]:
    """Hidden sizes of models from 135 million to 70 billion parameters, and the norm of one head."""
    for dtype in ("bf16", "fp16"):
        alone = {
            "x": f"*{dtype}", "weight": "*fp32", "out": f"*{dtype}",
            "x_stride": "i32:16", "out_stride": "i32:16", "width": "i32:16", "eps": "fp32",
        }  # fmt: skip
        added = {**alone, "residual": f"*{dtype}", "residual_stride": "i32:16", "scale": "fp32"}
        unnormed = {name: kind for name, kind in added.items() if name not in ("weight", "out")}
        absent = {"weight": None, "out": None}
        for width in (128, 576, 2048, 4096, 5120, 8192):
            block, num_warps = config(width)
            yield from (
                Variant(kernel, name, signature, {"BLOCK": block, **constexprs}, num_warps, num_stages=1)
                for kernel, name, signature, constexprs in (
                    (_rms_norm_kernel, f"{dtype} E{width}", alone, {}),
                    (_add_rms_norm_kernel, f"{dtype} E{width}", added, {}),
                    (_add_rms_norm_kernel, f"{dtype} E{width} without a norm", unnormed, absent),
                )
            )
