"""Kernels that a compile report must tell apart: good ones, one that spills, one too large, one wrong.

Run as a program, without TRITON_INTERPRET, it compiles each and prints what was found as JSON.
"""

from __future__ import annotations

import dataclasses
import json
import sys

import triton
import triton.language as tl

from gqa_serve.engine.kernels.triton.compiled import compile_variant
from gqa_serve.engine.kernels.triton.variants import Variant


@triton.jit
def copy_kernel(source, target, size, BLOCK: tl.constexpr):
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + offset, tl.load(source + offset, mask=offset < size), mask=offset < size)


@triton.jit
def square_kernel(source, target, steps, SIDE: tl.constexpr):
    offset = tl.arange(0, SIDE)[:, None] * SIDE + tl.arange(0, SIDE)[None, :]
    total = tl.zeros([SIDE, SIDE], tl.float32)
    for step in range(steps):
        tile = tl.load(source + step * SIDE * SIDE + offset)
        total = tl.dot(tile, tl.trans(tile), total)
    tl.store(target + offset, total)


@triton.jit
def wrong_kernel(source, target, BLOCK: tl.constexpr):
    tl.store(target + tl.arange(0, BLOCK), tl.load(source + tl.arange(0, 2 * BLOCK)))


def copying(size: str = "i32:16", source: str = "*bf16") -> Variant:
    signature = {"source": source, "target": "*bf16", "size": size}
    return Variant(copy_kernel, "copy", signature, {"BLOCK": 1024}, num_warps=4, num_stages=1)


def squaring(side: int, num_warps: int, num_stages: int) -> Variant:
    signature = {"source": "*bf16", "target": "*fp32", "steps": "i32"}
    return Variant(square_kernel, f"square {side}", signature, {"SIDE": side}, num_warps, num_stages)


WRONG = Variant(wrong_kernel, "wrong", {"source": "*bf16", "target": "*bf16"}, {"BLOCK": 64}, 4, 1)

CASES = {
    "copy": copying(),
    "copy, any size": copying(size="i32"),
    "copy from anywhere": copying(source="*bf16:1"),
    "square": squaring(64, num_warps=4, num_stages=2),
    "spilling": squaring(128, num_warps=2, num_stages=1),
    "too large": squaring(128, num_warps=4, num_stages=8),
}


def main() -> None:
    found: dict[str, object] = {}
    for name, variant in CASES.items():
        compiled = compile_variant(variant, 80)
        found[name] = dataclasses.asdict(compiled) | {
            "fits": compiled.fits,
            "blocks_per_sm": compiled.blocks_per_sm,
        }
    try:
        compile_variant(WRONG, 80)
    except triton.CompilationError as error:
        found["wrong"] = str(error)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
