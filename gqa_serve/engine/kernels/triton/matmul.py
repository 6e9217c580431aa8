"""A matrix product in which a row's result does not depend on the other rows.

Stands in for cuBLAS under --deterministic, and multiplies float8 rows where `torch._scaled_mm` cannot. cuBLAS
chooses tiles, splits and so the order of additions by the number of rows; here the tile is a function of the
operands' types alone.
Invariant: every output is the sum over K in steps of BLOCK_K from 0, in one program, whatever T is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from gqa_serve.engine.kernels.triton.variants import Variant


class Config(NamedTuple):
    """The tile of a program, and how it is compiled."""

    block_t: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def config(itemsize: int) -> Config:
    """The tile for operands of `itemsize` bytes, the same for every T, N and K.

    64 rows are the least that a Hopper warp group multiplies; 64 columns keep most of a GPU busy at N = 4096.
    A stage is 16 KiB of weights for two-byte types, enough in flight to read memory at its speed.
    """
    if itemsize == 4:
        return Config(32, 64, 32, 4, 2)
    return Config(64, 64, 128, 4, 3 if itemsize == 2 else 4)


@triton.jit(do_not_specialize=["T"])
def _matmul_kernel(
    x_ptr, weight_ptr, bias_ptr, x_scale_ptr, weight_scale_ptr, out_ptr,
    T, N, K, x_stride, weight_stride, out_stride,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    # Programs that share a tile of weights run side by side, so that it comes from memory once.
    tiles_t = tl.cdiv(T, BLOCK_T)
    row = (tl.program_id(0) % tiles_t) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = (tl.program_id(0) // tiles_t) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Past the end the last row is read again, which costs no mask; what it gives is not stored.
    x_ptrs = x_ptr + tl.minimum(row, T - 1).to(tl.int64)[:, None] * x_stride + k[None, :]
    w_ptrs = weight_ptr + tl.minimum(column, N - 1).to(tl.int64)[None, :] * weight_stride + k[:, None]
    acc = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs + start)
            w = tl.load(w_ptrs + start)
        else:
            x = tl.load(x_ptrs + start, mask=k[None, :] < K - start, other=0.0)
            w = tl.load(w_ptrs + start, mask=k[:, None] < K - start, other=0.0)
        if x_scale_ptr is not None:  # Hopper adds float8 products in 14 bits: no further than one step
            acc = tl.dot(x, w, acc, max_num_imprecise_acc=BLOCK_K)
        else:
            acc = tl.dot(x, w, acc, input_precision="ieee")
    if x_scale_ptr is not None:
        acc *= tl.load(x_scale_ptr + row, mask=row < T, other=0.0)[:, None]
        acc *= tl.load(weight_scale_ptr + column, mask=column < N, other=0.0)[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + column, mask=column < N, other=0.0)[None, :]
    out_ptrs = out_ptr + row.to(tl.int64)[:, None] * out_stride + column[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=(row[:, None] < T) & (column[None, :] < N))


def matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    x_scale: torch.Tensor | None = None,
    weight_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """out [T, N] = (x [T, K] @ weight [N, K].T) * x_scale [T] * weight_scale [N] + bias [N].

    x and weight are of one dtype, their rows contiguous; scales (both or none) and bias are float32. Returns
    `out`, in its own dtype.
    """
    (rows, k), n = x.shape, weight.shape[0]
    if rows == 0:
        return out
    tile = config(x.element_size())
    grid = (triton.cdiv(rows, tile.block_t) * triton.cdiv(n, tile.block_n),)
    _matmul_kernel[grid](
        x, weight, bias, x_scale, weight_scale, out,
        rows, n, k, x.stride(0), weight.stride(0), out.stride(0),
        BLOCK_T=tile.block_t, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, EVEN_K=k % tile.block_k == 0,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out


def matmul_twin(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    x_scale: torch.Tensor | None = None,
    weight_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """What `matmul` computes, in plain torch."""
    product = x.float() @ weight.float().t()  # [T, N]
    if x_scale is not None and weight_scale is not None:
        product = product * x_scale[:, None] * weight_scale
    if bias is not None:
        product = product + bias
    return out.copy_(product)


def variants() -> Iterator[Variant]:
    """Every launch of --deterministic: a model's dtypes, with and without a bias, and float8 with scales."""
    forms = [("bf16", "bf16", 2, bias) for bias in (False, True)] + [("fp16", "fp16", 2, False)]
    for element, result, itemsize, bias in [*forms, ("fp8e4nv", "bf16", 1, False)]:
        tile = config(itemsize)
        signature = {"x_ptr": f"*{element}", "weight_ptr": f"*{element}", "out_ptr": f"*{result}", "T": "i32"}
        signature |= dict.fromkeys(("N", "K", "x_stride", "weight_stride", "out_stride"), "i32:16")
        absent = []
        for name, present in (
            ("bias_ptr", bias), ("x_scale_ptr", itemsize == 1), ("weight_scale_ptr", itemsize == 1)
        ):  # fmt: skip
            if present:
                signature[name] = "*fp32"
            else:
                absent.append(name)
        yield Variant(
            kernel=_matmul_kernel,
            name=f"{element}{' bias' if bias else ''}",
            signature=signature,
            constexprs={
                **dict.fromkeys(absent), "BLOCK_T": tile.block_t, "BLOCK_N": tile.block_n,
                "BLOCK_K": tile.block_k, "EVEN_K": True,
            },
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            targets=(80, 90, 100) if itemsize > 1 else (90, 100),
        )  # fmt: skip
