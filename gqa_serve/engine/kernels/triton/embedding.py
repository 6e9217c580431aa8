"""Rows of a quantized table: the embedding of a model whose vocabulary is held in 8 or 4 bits.

Owns the lookup in the layout of `quantized_linear`, where only a group's numbers lie side by side, so that
one matrix serves as the output head and as the table. Tables that are not quantized are torch's business.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from gqa_serve.engine.kernels.triton.quantized_linear import ONE_GROUP, Quantized, dequantize
from gqa_serve.engine.kernels.triton.variants import Variant

_BLOCK = 256  # numbers of a token that one program looks up


@triton.jit
def _embed_kernel(
    ids_ptr, codes_ptr, scale_ptr, zero_ptr, minimum_ptr, out_ptr, factor, N, K, out_stride,
    BITS: tl.constexpr, GROUP: tl.constexpr, ONE_SCALE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(ids_ptr + row).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = k < K
    group = k // GROUP
    step = group if BITS == 8 else group // 2
    codes = tl.load(codes_ptr + (step.to(tl.int64) * N + token) * GROUP + k % GROUP, mask=inside, other=0)
    if BITS == 4:
        codes = tl.where(group % 2 == 0, codes & 15, codes >> 4)
    at = token if ONE_SCALE else group.to(tl.int64) * N + token
    scale = tl.load(scale_ptr + at, mask=None if ONE_SCALE else inside).to(tl.float32)
    numbers = codes.to(tl.float32)
    if minimum_ptr is not None:
        numbers = numbers * scale + tl.load(minimum_ptr + at, mask=inside, other=0.0).to(tl.float32)
    elif zero_ptr is not None:
        numbers = (numbers - tl.load(zero_ptr + at, mask=inside, other=0).to(tl.float32)) * scale
    else:
        numbers = (numbers - (1 << (BITS - 1))) * scale
    element = out_ptr.dtype.element_ty
    numbers = numbers.to(element).to(tl.float32) * factor
    tl.store(out_ptr + row * out_stride + k, numbers.to(element), mask=inside)


def embed(table: Quantized, ids: torch.Tensor, factor: float, out: torch.Tensor) -> torch.Tensor:
    """out [T, k] = rows `ids` [T] of the table [n, k] in out's dtype, times `factor`. Returns `out`."""
    if ids.shape[0] == 0:
        return out
    _embed_kernel[(ids.shape[0], triton.cdiv(table.k, _BLOCK))](
        ids, table.codes, table.scale, table.zero, table.minimum, out,
        factor, table.n, table.k, out.stride(0),
        BITS=table.bits, GROUP=table.group or ONE_GROUP, ONE_SCALE=table.group == 0, BLOCK=_BLOCK,
        num_warps=4,
    )  # fmt: skip
    return out


def embed_twin(table: Quantized, ids: torch.Tensor, factor: float, out: torch.Tensor) -> torch.Tensor:
    """What `embed` computes, in plain torch."""
    return out.copy_(dequantize(table)[ids.long()].to(out.dtype).float() * factor)


def variants() -> Iterator[Variant]:
    """The formats that --quantization and GGUF files give a vocabulary."""
    for element in ("bf16", "fp16"):
        for bits, group in ((8, 128), (8, 32), (4, 32)):
            yield Variant(
                kernel=_embed_kernel,
                name=f"{element} int{bits} group {group}",
                signature={
                    "ids_ptr": "*i32", "codes_ptr": "*u8", "scale_ptr": "*fp16", "out_ptr": f"*{element}",
                    "factor": "fp32", "N": "i32:16", "K": "i32:16", "out_stride": "i32:16",
                },
                constexprs={
                    "zero_ptr": None, "minimum_ptr": None, "BITS": bits, "GROUP": group, "ONE_SCALE": False,
                    "BLOCK": _BLOCK,
                },
                num_warps=4,
                num_stages=3,
            )  # fmt: skip
