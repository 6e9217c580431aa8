"""Calls of the native CPU kernels, on arrays, as tests make them; and float32 fma, as the kernels compute it.

Owns the way from arrays to addresses: whatever a call reads is kept alive until it returns. Knows no expected
values. A Program is made for each call, so that no test sees what another left in its buffers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gqa_serve.engine.backends import native_is_built
from gqa_serve.engine.batch import PlanRow
from gqa_serve.engine.kernels.cpu import load

# Instruction sets to test; none where the extension is not built, and then no test runs.
LEVELS: list[str] = load().isa_levels() if native_is_built() else []


@dataclass(frozen=True)
class Machine:
    """Where a call computes: it must not matter, but for what `agreeing` says."""

    isa: str
    threads: int

    def program(self) -> Any:
        return load().Program(self.isa, self.threads)


def machines(threads: Sequence[int] = (1, 3), levels: Sequence[str] = LEVELS) -> list[Machine]:
    return [Machine(isa, count) for isa in levels for count in threads]


def agreeing(form: str) -> list[list[str]]:
    """LEVELS in groups of the same bits, for weights of this format: AMX sums bfloat16 in its own order."""
    if form != "bfloat16" or "amx" not in LEVELS:
        return [LEVELS]
    return [[isa for isa in LEVELS if isa != "amx"], ["amx"]]


def pack(weight: torch.Tensor, form: str, group: int = 0, has_min: bool = False, threads: int = 1) -> Any:
    """Rows of `weight` may be further apart than they are long."""
    n, k = weight.shape
    assert weight.stride(1) == 1
    dtype = str(weight.dtype).removeprefix("torch.")
    packer = load().Packer(threads)
    return packer.pack(weight.data_ptr(), dtype, n, k, weight.stride(0), form, group, has_min)


def pack_blocks(rows: np.ndarray, kind: str, k: int) -> Any:
    """`rows` [n, row_bytes] uint8, blocks of a GGUF type."""
    rows = np.ascontiguousarray(rows)
    return load().Packer(1).pack_gguf(rows.ctypes.data, kind, rows.shape[0], k, rows.shape[1])


def set_bias(weight: Any, bias: np.ndarray) -> None:
    bias = np.ascontiguousarray(bias, np.float32)
    assert bias.shape == (weight.n,)
    weight.set_bias(bias.ctypes.data)


def unpack(weight: Any) -> np.ndarray:
    """Its values [n, k], float32."""
    out = np.full((weight.n, weight.k), np.nan, np.float32)
    weight.unpack(0, weight.n, out.ctypes.data)
    return out


def multiply(
    weight: Any, x: np.ndarray, machine: Machine, scale: float = 1.0, cap: float = 0.0
) -> np.ndarray:
    """x [rows, k] -> scaled and capped x @ weight.T + bias. What is not written is not a number."""
    x = np.ascontiguousarray(x, np.float32)
    assert x.shape[1] == weight.k
    out = np.full((x.shape[0], weight.n), np.nan, np.float32)
    machine.program().logits(weight, x.ctypes.data, x.shape[0], out.ctypes.data, scale, cap)
    return out


def run(program: Any, cache: Any, rows: Sequence[PlanRow], value: int, width: int) -> np.ndarray:
    """A step: `value` [R, width] of the logit rows."""
    out = np.full((sum(row.num_logits for row in rows), width), np.nan, np.float32)
    program.run(cache, list(rows), value, out.ctypes.data)
    return out


def bits(x: np.ndarray) -> np.ndarray:
    """To compare floats as bytes: -0.0 is not 0.0, a NaN equals itself."""
    return np.ascontiguousarray(x, np.float32).view(np.uint32)


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c of finite float32, rounded once.

    The product is exact in float64. The sum is rounded to odd there, so that rounding it again to float32 is
    as good as rounding once.
    """
    product, addend = a.astype(np.float64) * b, c.astype(np.float64)
    total = product + addend
    back = total - product
    error = (product - (total - back)) + (addend - back)
    even = (total.view(np.int64) & 1) == 0
    odd = np.nextafter(total, np.copysign(np.inf, error))
    return np.where((error != 0) & even, odd, total).astype(np.float32)
