"""Activations to float8, each row by its own scale.

What goes before a product of float8 rows. Does not know the product.
Invariant: codes and scale of a row depend on that row alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from gqa_serve.engine.kernels.triton.variants import Variant

FP8_MAX = 448.0  # the largest finite float8_e4m3fn
_LONGEST = 4096  # elements a program holds at once


def config(k: int) -> tuple[int, int]:
    """(elements at once, warps) for rows of k."""
    block: int = min(_LONGEST, triton.next_power_of_2(k))
    return block, 8 if block >= 2048 else 4


@triton.jit
def _quantize_rows_kernel(
    x_ptr, codes_ptr, scale_ptr, K, x_stride, codes_stride, HIGHEST: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    peak = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, K, BLOCK):
        x = tl.load(x_ptr + row * x_stride + start + offsets, mask=offsets < K - start, other=0.0)
        peak = tl.maximum(peak, tl.abs(x.to(tl.float32)))
    scale = tl.max(peak, axis=0) / HIGHEST
    tl.store(scale_ptr + row, scale)
    inverse = tl.where(scale > 0.0, 1.0 / tl.where(scale > 0.0, scale, 1.0), 0.0)
    for start in range(0, K, BLOCK):  # once more: the row is in the cache
        inside = offsets < K - start
        x = tl.load(x_ptr + row * x_stride + start + offsets, mask=inside, other=0.0).to(tl.float32)
        x = tl.minimum(tl.maximum(x * inverse, -HIGHEST), HIGHEST)
        tl.store(
            codes_ptr + row * codes_stride + start + offsets, x.to(codes_ptr.dtype.element_ty), mask=inside
        )


def quantize_rows(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> None:
    """codes [T, K] float8_e4m3fn and scale [T] float32 such that x [T, K] is about codes * scale[:, None].

    scale = amax / 448, 0 for a row of zeros.
    """
    rows, k = x.shape
    if rows == 0:
        return
    block, num_warps = config(k)
    _quantize_rows_kernel[(rows,)](
        x, codes, scale, k, x.stride(0), codes.stride(0), HIGHEST=FP8_MAX, BLOCK=block, num_warps=num_warps
    )


def quantize_rows_twin(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> None:
    """What `quantize_rows` computes, in plain torch."""
    scale.copy_(x.float().abs().amax(dim=1) / FP8_MAX)
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    codes.copy_((x.float() * inverse[:, None]).clamp(-FP8_MAX, FP8_MAX))


def variants() -> Iterator[Variant]:
    """Rows of a model's dtypes; long rows all compile alike."""
    block, num_warps = config(_LONGEST)
    for element in ("bf16", "fp16"):
        yield Variant(
            kernel=_quantize_rows_kernel,
            name=element,
            signature={
                "x_ptr": f"*{element}", "codes_ptr": "*fp8e4nv", "scale_ptr": "*fp32",
                "K": "i32:16", "x_stride": "i32:16", "codes_stride": "i32:16",
            },
            constexprs={"HIGHEST": FP8_MAX, "BLOCK": block},
            num_warps=num_warps,
            num_stages=3,
            targets=(90, 100),
        )  # fmt: skip
