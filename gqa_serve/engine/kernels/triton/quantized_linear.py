"""Linear layers whose weights are 8 or 4 bits with a scale per group of inputs; activations stay bf16 or f16.

Owns the layout of such weights and the product. Does not know who quantized them (`weights/`), or why.

    codes [S, N, G] uint8    8 bits: step s, of S, holds group s
                             4 bits: group 2s in the low halves of its bytes, group 2s + 1 in the high ones
    scale [groups, N]        weight = scale * (code - zero), or scale * code + minimum

A tile of a step is one run of memory whatever the group is, and the inputs of an output lie side by side, as
the tensor cores take them.
Invariant: codes are multiplied exactly and a group's sum is scaled in float32 (with a minimum, weights are
rounded to the activations' dtype first). Groups are added in order, in splits that depend on N and K.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from gqa_serve.engine.kernels.triton.variants import Variant

GROUPS = (32, 64, 128)
ONE_GROUP = 128  # inputs at a time where one scale serves all of them
_BUSY = 256  # programs that keep a large GPU busy: two for each multiprocessor
_MAX_SPLITS = 8


class Quantized(NamedTuple):
    """A matrix [n, k] in the layout above, k padded with zeros to whole steps.

    `group` 0: one scale for all inputs, 8 bits only. `zero` is uint8; without it and `minimum`, codes are
    symmetric around 128 or 8.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    minimum: torch.Tensor | None
    n: int
    k: int
    bits: int
    group: int


class Config(NamedTuple):
    """The tile of a program, the parts that K is split into, and how it is compiled."""

    block_t: int
    block_n: int
    splits: int
    num_warps: int
    num_stages: int


def config(
    rows: int, n: int, steps: int, width: int, bits: int, itemsize: int, deterministic: bool
) -> Config:
    """The tile for `rows` tokens and weights of n outputs and `steps` steps of `width` bytes of each.

    With few rows weights are all the traffic: K is split until there are programs for the whole GPU, each
    with 12 to 24 KiB of weights under way. With many the tile is the largest whose sums stay in registers,
    twice over for the two groups of 4-bit steps. With `deterministic` nothing depends on the number of rows.
    """
    if itemsize == 4:
        return Config(32, 64, 1, 4, 2)
    if deterministic:
        return Config(32, 64, 1, 4, 2 + 128 // width)
    if rows > 64:
        return Config(128, 128 if bits == 8 else 64, 1, 8, 2)
    splits = max(1, min(_BUSY // triton.cdiv(n, 64), steps // 4, _MAX_SPLITS))
    stages = 3 if rows > 32 else 3 + 128 // width
    return Config(max(16, triton.next_power_of_2(rows)), 64, splits, 4, stages)


@triton.jit
def _numbers(codes, zero, BITS: tl.constexpr, like: tl.constexpr):
    """codes - zero in the dtype `like`, exactly and without a conversion, which GPUs do slowly.

    The low bits of 2^m in a float of m + 1 bits are a code's own: 2^m + code by an "or".
    """
    if like == tl.float16:
        return (codes.to(tl.int16) | 0x6400).to(tl.float16, bitcast=True) - (zero + 1024.0).to(tl.float16)
    elif like == tl.bfloat16 and BITS == 4:
        return (codes.to(tl.int16) | 0x4300).to(tl.bfloat16, bitcast=True) - (zero + 128.0).to(tl.bfloat16)
    else:
        return ((codes.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - (zero + 8388608.0)).to(like)


@triton.jit
def _add_group(
    acc, x, codes, scale_ptrs, zero_ptrs, minimum_ptrs, inside, BITS: tl.constexpr, ONE_SCALE: tl.constexpr
):  # fmt: skip
    """acc + x @ the weights of one group, whose codes are [BLOCK_N, GROUP]."""
    middle = tl.full((1, 1), 1 << (BITS - 1), dtype=tl.float32)
    if ONE_SCALE:  # applied once, at the end
        weights = _numbers(codes, middle, BITS, x.dtype)
        return tl.dot(x, weights.trans(), acc, input_precision="ieee")
    scale = tl.load(scale_ptrs, mask=inside, other=0.0).to(tl.float32)
    if minimum_ptrs is not None:
        minimum = tl.load(minimum_ptrs, mask=inside, other=0.0).to(tl.float32)
        weights = _numbers(codes, middle * 0.0, BITS, tl.float32) * scale[:, None] + minimum[:, None]
        return tl.dot(x, weights.to(x.dtype).trans(), acc, input_precision="ieee")
    if zero_ptrs is not None:
        middle = tl.load(zero_ptrs, mask=inside, other=0).to(tl.float32)[:, None]
    weights = _numbers(codes, middle, BITS, x.dtype)
    return acc + tl.dot(x, weights.trans(), input_precision="ieee") * scale[None, :]


@triton.jit(do_not_specialize=["T", "split_stride", "steps", "steps_per_split"])
def _quantized_linear_kernel(
    x_ptr, codes_ptr, scale_ptr, zero_ptr, minimum_ptr, bias_ptr, out_ptr,
    T, N, K, x_stride, out_stride, split_stride, steps, steps_per_split,
    BITS: tl.constexpr, GROUP: tl.constexpr, ONE_SCALE: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # Programs that share a tile of weights run side by side, so that it comes from memory once.
    tiles_t = tl.cdiv(T, BLOCK_T)
    row = (tl.program_id(0) % tiles_t) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = (tl.program_id(0) // tiles_t) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    inside = column < N
    i = tl.arange(0, GROUP)
    x_ptrs = x_ptr + tl.minimum(row, T - 1).to(tl.int64)[:, None] * x_stride + i[None, :]
    first = split * steps_per_split
    code_ptrs = codes_ptr + (first.to(tl.int64) * N + column)[:, None] * GROUP + i[None, :]
    PARTS: tl.constexpr = 8 // BITS  # groups in a byte
    acc = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
    for step in range(first, tl.minimum(steps, first + steps_per_split)):
        packed = tl.load(code_ptrs, mask=inside[:, None], other=0)
        code_ptrs += N * GROUP
        for part in tl.static_range(PARTS):
            group = step * PARTS + part
            start = group * GROUP
            if EVEN_K:
                x = tl.load(x_ptrs + start)
            else:
                x = tl.load(x_ptrs + start, mask=i[None, :] < K - start, other=0.0)
            codes = packed if BITS == 8 else (packed & 15 if part == 0 else packed >> 4)
            at = group * N + column
            zero_ptrs = None if zero_ptr is None else zero_ptr + at
            minimum_ptrs = None if minimum_ptr is None else minimum_ptr + at
            acc = _add_group(
                acc, x, codes, scale_ptr + at, zero_ptrs, minimum_ptrs, inside, BITS, ONE_SCALE
            )  # fmt: skip
    if ONE_SCALE:
        acc *= tl.load(scale_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + column, mask=inside, other=0.0)[None, :]
    out_ptrs = out_ptr + split.to(tl.int64) * split_stride + row.to(tl.int64)[:, None] * out_stride
    mask = (row[:, None] < T) & inside[None, :]
    tl.store(out_ptrs + column[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T"])
def _sum_splits_kernel(
    partial_ptr, bias_ptr, out_ptr, T, N, out_stride, SPLITS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < N
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(partial_ptr + (split * T.to(tl.int64) + row) * N + column, mask=inside, other=0.0)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + column, mask=inside, other=0.0)
    tl.store(out_ptr + row * out_stride + column, total.to(out_ptr.dtype.element_ty), mask=inside)


def quantized_linear(
    x: torch.Tensor,
    weight: Quantized,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    deterministic: bool = False,
) -> torch.Tensor:
    """out [T, n] = x [T, k] @ weight.T + bias [n], float32; x's rows are contiguous. Returns `out`.

    With `deterministic` a row's bytes do not depend on the number of rows.
    """
    (rows, k), n = x.shape, weight.n
    if rows == 0:
        return out
    group = weight.group or ONE_GROUP
    steps = weight.codes.shape[0]
    tile = config(rows, n, steps, group, weight.bits, x.element_size(), deterministic)
    split = tile.splits > 1
    # The parts of a split sum, in order.
    target = torch.empty((tile.splits, rows, n), dtype=torch.float32, device=x.device) if split else out
    grid = (triton.cdiv(rows, tile.block_t) * triton.cdiv(n, tile.block_n), tile.splits)
    _quantized_linear_kernel[grid](
        x, weight.codes, weight.scale, weight.zero, weight.minimum, None if split else bias, target,
        rows, n, k, x.stride(0), target.stride(-2), target.stride(0) if split else 0,
        steps, triton.cdiv(steps, tile.splits),
        BITS=weight.bits, GROUP=group, ONE_SCALE=weight.group == 0,
        EVEN_K=k == steps * group * (8 // weight.bits),
        BLOCK_T=tile.block_t, BLOCK_N=tile.block_n, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    if split:
        _sum_splits_kernel[(rows, triton.cdiv(n, 256))](
            target, bias, out, rows, n, out.stride(0), SPLITS=tile.splits, BLOCK=256, num_warps=4
        )
    return out


def quantized_linear_twin(
    x: torch.Tensor,
    weight: Quantized,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    deterministic: bool = False,
) -> torch.Tensor:
    """What `quantized_linear` computes, in plain torch and always in one order."""
    weights = dequantize(weight)  # [n, k]
    if weight.minimum is not None:
        weights = weights.to(x.dtype).float()
    product = x.float() @ weights.t()
    return out.copy_(product if bias is None else product + bias)


def arrange(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    minimum: torch.Tensor | None,
    bits: int,
    group: int,
) -> Quantized:
    """The layout above of codes [n, k], from 0 to 2^bits - 1, and scale, zero and minimum [n, groups].

    `group` is one of GROUPS, or 0 for one scale of 8-bit codes without zero or minimum.
    """
    n, k = codes.shape
    width = group or ONE_GROUP
    padding = -k % (width * (8 // bits))
    steps = F.pad(codes, (0, padding)).view(n, -1, 8 // bits, width).permute(1, 2, 0, 3)  # [S, 1 or 2, n, G]
    packed = steps[:, 0] if bits == 8 else steps[:, 0] | steps[:, 1] << 4

    def by_group(values: torch.Tensor | None) -> torch.Tensor | None:
        if values is None:
            return None
        missing = (k + padding) // width - values.shape[1] if group else 0
        return F.pad(values, (0, missing)).t().contiguous()

    scales = by_group(scale)
    assert scales is not None
    return Quantized(packed.contiguous(), scales, by_group(zero), by_group(minimum), n, k, bits, group)


def dequantize(weight: Quantized) -> torch.Tensor:
    """The matrix [n, k] in float32."""
    steps = weight.codes[:, None]
    if weight.bits == 4:
        steps = torch.cat((steps & 15, steps >> 4), dim=1)
    codes = steps.permute(2, 0, 1, 3).reshape(weight.n, -1).float()  # [n, K]

    def by_input(values: torch.Tensor) -> torch.Tensor:
        """[groups, n] -> [n, K], or [n, 1]."""
        return values.t().float().repeat_interleave(weight.group or 1, dim=1)

    if weight.minimum is not None:
        numbers = codes * by_input(weight.scale) + by_input(weight.minimum)
    else:
        zero = float(1 << (weight.bits - 1)) if weight.zero is None else by_input(weight.zero)
        numbers = (codes - zero) * by_input(weight.scale)
    return numbers[:, : weight.k]


def variants() -> Iterator[Variant]:
    """Decoding one and 32 tokens, prefill, and --deterministic, for every kind of weight."""
    kinds = (
        (8, 0, "fp16", None), (8, 128, "fp16", None), (8, 32, "fp16", None), (4, 32, "fp16", "minimum"),
        (4, 32, "fp16", None), (4, 128, "fp16", "zero"), (4, 128, "bf16", None), (4, 64, "fp16", None),
    )  # fmt: skip
    for rows, (bits, group, scale, extra) in product((1, 32, 2048, None), kinds):
        width = group or ONE_GROUP
        tile = config(
            rows or 1, 4096, 4096 // (width * (8 // bits)), width, bits, 2, deterministic=rows is None
        )
        for element in ("bf16", "fp16") if rows == 1 else ("bf16",):
            signature = {"x_ptr": f"*{element}", "codes_ptr": "*u8", "scale_ptr": f"*{scale}"}
            signature["out_ptr"] = f"*{'fp32' if tile.splits > 1 else element}"
            signature |= {"T": "i32", "steps": "i32", "steps_per_split": "i32", "split_stride": "i32"}
            signature |= dict.fromkeys(("N", "K", "x_stride", "out_stride"), "i32:16")
            absent = dict.fromkeys({"zero_ptr", "minimum_ptr", "bias_ptr"} - {f"{extra}_ptr"})
            if extra is not None:
                signature[f"{extra}_ptr"] = "*u8" if extra == "zero" else f"*{scale}"
            yield Variant(
                kernel=_quantized_linear_kernel,
                name=f"{element} int{bits} group {group or 'all'}{f' {extra}' if extra else ''} "
                + ("deterministic" if rows is None else f"T {rows}"),
                signature=signature,
                constexprs={
                    **absent, "BITS": bits, "GROUP": width, "ONE_SCALE": group == 0, "EVEN_K": True,
                    "BLOCK_T": tile.block_t, "BLOCK_N": tile.block_n,
                },
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
            )  # fmt: skip
    yield Variant(
        kernel=_sum_splits_kernel,
        name="bf16 4 splits",
        signature={
            "partial_ptr": "*fp32", "out_ptr": "*bf16", "T": "i32", "N": "i32:16", "out_stride": "i32:16"
        },
        constexprs={"bias_ptr": None, "SPLITS": 4, "BLOCK": 256},
        num_warps=4,
        num_stages=3,
    )  # fmt: skip
