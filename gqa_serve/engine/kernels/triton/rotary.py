"""Between the QKV projection and attention: norm and rotate queries and keys, write K and V into the cache.

    program (token, heads)   a tile [HEADS, D] of a row of qkv,  q_0 .. q_H-1 | k_0 .. k_KV-1 | v_0 .. v_KV-1
    queries                  normed, rotated                         ->  q_out [T, H, D]
    keys                     normed, rotated, in the cache's format  ->  the token's slot
    values                   in the cache's format                   ->  the token's slot

A tile may hold heads of all three kinds: each row of it is masked into the one place where it belongs. Every
head is computed by itself in float32, in an order that depends on D alone. Knows nothing of requests: where a
token goes is its slot, and a slot below 0 (a row that pads a batch) is written nowhere.
Invariant: the quantized formats and float16 never receive a number that is not finite, because the block's
next owner may read it: a masked NaN is still a NaN after the product with its zero weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from gqa_serve.engine.backends.base import HeadNorms
from gqa_serve.engine.kernels.triton.norms import rms_norm, rms_norm_twin
from gqa_serve.engine.kernels.triton.variants import Variant
from gqa_serve.engine.kv_cache import LayerKV, quantize_kv

# How the cache's dtype is written: "float" as it is, the others as the functions below say.
_FORMATS = {torch.float16: "float16", torch.int8: "int8", torch.float8_e4m3fn: "fp8"}
_LIMIT = tl.constexpr(65504.0)  # float16's largest, and kv_cache.KV_LIMIT


class Config(NamedTuple):
    """Tile of one program and its warps."""

    heads: int
    block_d: int
    num_warps: int


def config(head_dim: int) -> Config:
    """About 512 numbers per program: one token's heads then spread over a dozen SMs."""
    block_d = triton.next_power_of_2(head_dim)
    return Config(max(512 // block_d, 1), block_d, 4)


@triton.jit
def _finite(x):
    """NaN as 0, infinities and what is beyond float16 as its largest number."""
    return tl.minimum(tl.maximum(tl.where(x == x, x, 0.0), -_LIMIT), _LIMIT)


@triton.jit
def _e4m3_bits(x):
    """Float32 of at most 448 -> the bits of the nearest float8_e4m3fn, ties to even.

    In integers, because GPUs before sm_89 have no instruction for it.
    """
    size = tl.abs(x)
    bits = size.to(tl.int32, bitcast=True)
    # Round 23 bits of mantissa to 3, then move the exponent's bias from 127 to 7.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 neighbours are 2^-9 apart: as far as those of float32 are at 2^14.
    small = (size + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    return (tl.where(size < 0.015625, small, normal) | sign).to(tl.uint8)


@triton.jit
def _write(cache, scales, row, x, d, inside, FORMAT: tl.constexpr, D: tl.constexpr):
    """x [HEADS, BLOCK_D] float32, 0 beyond D, to rows `row` [HEADS] of the cache seen as [slots * KV, D]."""
    target = cache + row[:, None] * D + d[None, :]
    mask = inside[:, None] & (d < D)[None, :]
    if FORMAT == "float":
        tl.store(target, x.to(cache.dtype.element_ty), mask=mask)
    elif FORMAT == "float16":
        tl.store(target, _finite(x).to(tl.float16), mask=mask)
    else:
        x = _finite(x)
        LARGEST: tl.constexpr = 127.0 if FORMAT == "int8" else 448.0
        scale = tl.div_rn(tl.max(tl.abs(x), axis=1), LARGEST)  # [HEADS]
        tl.store(scales + row, scale, mask=inside)
        divisor = tl.where(scale > 0.0, scale, 1.0)[:, None]
        numbers = tl.div_rn(x, tl.broadcast_to(divisor, x.shape))
        numbers = tl.minimum(tl.maximum(numbers, -LARGEST), LARGEST)
        if FORMAT == "int8":
            # Neighbours of 1.5 * 2^23 are 1 apart: adding it rounds to whole numbers, ties to even.
            numbers = (numbers + 12582912.0) - 12582912.0
            tl.store(target, numbers.to(tl.int8), mask=mask)
        else:
            tl.store(target, _e4m3_bits(numbers), mask=mask)


@triton.jit(do_not_specialize_on_alignment=["slots"])  # which may be part of a larger buffer
def _rotate_and_write_kernel(
    qkv, q_out, k_cache, v_cache, k_scale, v_scale, slots, cos, sin, q_norm, k_norm,
    qkv_stride, num_heads, num_kv_heads, block_size, eps,
    D: tl.constexpr, ROTARY_DIM: tl.constexpr, FORMAT: tl.constexpr,
    HEADS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    d = tl.arange(0, BLOCK_D)
    is_query = head < num_heads
    is_key = (head >= num_heads) & (head < num_heads + num_kv_heads)
    is_value = (head >= num_heads + num_kv_heads) & (head < num_heads + 2 * num_kv_heads)
    inside = (is_query | is_key | is_value)[:, None] & (d < D)[None, :]
    source = qkv + token * qkv_stride + head[:, None] * D
    loaded = tl.load(source + d[None, :], mask=inside, other=0.0).to(tl.float32)  # [HEADS, BLOCK_D]
    x = loaded
    inverse = 1.0
    if q_norm is not None:
        inverse = tl.rsqrt(tl.sum(loaded * loaded, axis=1) / D + eps)[:, None]
        q_weight = tl.load(q_norm + d, mask=d < D, other=0.0)[None, :]
        k_weight = tl.load(k_norm + d, mask=d < D, other=0.0)[None, :]
        x = loaded * inverse * tl.where(is_query[:, None], q_weight, k_weight)
    if cos is not None:
        # The other number of each rotated pair, half of ROTARY_DIM away: it lies in the same cache lines.
        turned = d < ROTARY_DIM
        other = tl.where(d < ROTARY_DIM // 2, d + ROTARY_DIM // 2, d - ROTARY_DIM // 2)
        y = tl.load(source + other[None, :], mask=inside & turned[None, :], other=0.0).to(tl.float32)
        if q_norm is not None:
            q_weight = tl.load(q_norm + other, mask=turned, other=0.0)[None, :]
            k_weight = tl.load(k_norm + other, mask=turned, other=0.0)[None, :]
            y = y * inverse * tl.where(is_query[:, None], q_weight, k_weight)
        angle = token * ROTARY_DIM + d
        c = tl.load(cos + angle, mask=turned, other=1.0)[None, :]
        s = tl.load(sin + angle, mask=turned, other=0.0)[None, :]
        x = x * c + y * s
    x = tl.where(is_value[:, None], loaded, x)
    target = q_out + (token * num_heads + head[:, None]) * D + d[None, :]
    tl.store(target, x.to(q_out.dtype.element_ty), mask=inside & is_query[:, None])
    slot = tl.load(slots + token) + tl.zeros_like(head)  # [HEADS]
    used = slot >= 0
    block = (slot // block_size).to(tl.int64)
    kv_head = tl.where(is_key, head - num_heads, head - num_heads - num_kv_heads)
    row = (block * num_kv_heads + kv_head) * block_size + slot % block_size  # [HEADS]
    _write(k_cache, k_scale, row, x, d, is_key & used, FORMAT, D)
    _write(v_cache, v_scale, row, x, d, is_value & used, FORMAT, D)


def rotate_and_write(
    qkv: torch.Tensor,
    q_out: torch.Tensor,
    kv: LayerKV,
    slots: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor] | None,
    norms: HeadNorms | None,
) -> torch.Tensor:
    """Norm and rotate queries and keys, write K and V into their slots; returns `q_out`.

    qkv [T, (H + 2 KV) * D], heads of a row adjacent; overwritten in part by norms over all heads. q_out
    [T, H, D], contiguous. slots [T] int32; K and V of a token whose slot is negative are written nowhere.
    angles: cos and sin, [T, rotary_dim] float32 and contiguous, as `engine/rope.py` makes them (the sine of
    the first half negated), or None for a layer without positions. D is even.
    """
    tokens, num_heads, head_dim = q_out.shape
    num_kv_heads, block_size = kv.k.shape[1:3]
    if norms is not None and norms.mode == "full":
        _norm_all_heads(qkv, num_heads * head_dim, num_kv_heads * head_dim, norms)
        norms = None
    cos, sin = angles if angles is not None else (None, None)
    write_format = _FORMATS.get(kv.k.dtype, "float")
    bytes_alone = write_format == "fp8"
    tile = config(head_dim)
    _rotate_and_write_kernel[(tokens, triton.cdiv(num_heads + 2 * num_kv_heads, tile.heads))](
        qkv,
        q_out,
        kv.k.view(torch.uint8) if bytes_alone else kv.k,
        kv.v.view(torch.uint8) if bytes_alone else kv.v,
        kv.k_scale,
        kv.v_scale,
        slots,
        cos,
        sin,
        None if norms is None else norms.q,
        None if norms is None else norms.k,
        qkv.stride(0),
        num_heads,
        num_kv_heads,
        block_size,
        0.0 if norms is None else norms.eps,
        D=head_dim,
        ROTARY_DIM=0 if cos is None else cos.shape[-1],
        FORMAT=write_format,
        HEADS=tile.heads,
        BLOCK_D=tile.block_d,
        num_warps=tile.num_warps,
        num_stages=1,
    )
    return q_out


def _norm_all_heads(qkv: torch.Tensor, q_width: int, k_width: int, norms: HeadNorms) -> None:
    """Norm all query heads of a row together, and all its key heads, in place."""
    q, k = qkv[:, :q_width], qkv[:, q_width : q_width + k_width]
    rms_norm(q, norms.q, norms.eps, q)
    rms_norm(k, norms.k, norms.eps, k)


def rotate_and_write_twin(
    qkv: torch.Tensor,
    q_out: torch.Tensor,
    kv: LayerKV,
    slots: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor] | None,
    norms: HeadNorms | None,
) -> torch.Tensor:
    num_heads, head_dim = q_out.shape[1:]
    num_kv_heads, block_size = kv.k.shape[1:3]
    if norms is not None and norms.mode == "full":
        q_width, k_width = num_heads * head_dim, num_kv_heads * head_dim
        q, k = qkv[:, :q_width], qkv[:, q_width : q_width + k_width]
        rms_norm_twin(q, norms.q, norms.eps, q)
        rms_norm_twin(k, norms.k, norms.eps, k)
    heads = qkv.float().view(len(qkv), -1, head_dim)  # [T, H + 2 KV, D]
    q, k, v = heads.split_with_sizes((num_heads, num_kv_heads, num_kv_heads), dim=1)
    if norms is not None and norms.mode == "head":
        q = rms_norm_twin(q, norms.q, norms.eps, torch.empty_like(q))
        k = rms_norm_twin(k, norms.k, norms.eps, torch.empty_like(k))
    if angles is not None:
        q, k = _rotated(q, *angles), _rotated(k, *angles)
    q_out.copy_(q)
    used = slots >= 0
    block, offset = slots[used].long() // block_size, slots[used].long() % block_size
    for numbers, scales, x in ((kv.k, kv.k_scale, k[used]), (kv.v, kv.v_scale, v[used])):
        if scales is not None:
            written, scale = quantize_kv(x, numbers.dtype)
            scales.transpose(1, 2)[block, offset] = scale
        elif numbers.dtype == torch.float16:
            written = x.half().nan_to_num()
        else:
            written = x.to(numbers.dtype)
        raw = {1: torch.uint8}.get(numbers.dtype.itemsize, numbers.dtype)  # float8 cannot be indexed
        numbers.view(raw).transpose(1, 2)[block, offset] = written.view(raw)
    return q_out


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [T, heads, D]; cos, sin [T, rotary_dim]."""
    rotary_dim = cos.shape[-1]
    turned, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    turned = turned * cos[:, None] + turned.roll(rotary_dim // 2, dims=-1) * sin[:, None]
    return torch.cat((turned, rest), dim=-1)


def variants() -> Iterator[Variant]:
    """Head sizes by formats; once for each dtype norms, partial and no rotation, and a single KV head."""
    for dtype in ("bf16", "fp16"):
        for head_dim in (64, 80, 96, 128, 256):
            for held in (dtype, "int8", "fp8"):
                yield _variant(dtype, head_dim, held)
        for held in (dtype, "fp8"):
            yield _variant(dtype, 128, held, normed=True)
        yield _variant(dtype, 96, dtype, rotary_dim=72)
        yield _variant(dtype, 128, dtype, rotary_dim=0)
        yield _variant(dtype, 256, dtype, single=True, normed=True)


def _variant(
    dtype: str,
    head_dim: int,
    held: str,
    *,
    rotary_dim: int | None = None,
    normed: bool = False,
    single: bool = False,
) -> Variant:
    """One form of the kernel: K and V held as `held`; `single`: one KV head."""
    rotary_dim = head_dim if rotary_dim is None else rotary_dim
    heads, block_d, num_warps = config(head_dim)
    quantized = held in ("int8", "fp8")
    number = {"int8": "*i8", "fp8": "*u8"}.get(held, f"*{held}")
    signature: dict[str, str] = {
        "qkv": f"*{dtype}", "q_out": f"*{dtype}", "k_cache": number, "v_cache": number,
        "slots": "*i32:1", "qkv_stride": "i32:16", "num_heads": "i32", "block_size": "i32:16", "eps": "fp32",
    }  # fmt: skip
    constexprs: dict[str, Any] = {
        "D": head_dim,
        "ROTARY_DIM": rotary_dim,
        "FORMAT": {"fp16": "float16", "bf16": "float"}.get(held, held),
        "HEADS": heads,
        "BLOCK_D": block_d,
    }
    optional = {"k_scale": quantized, "v_scale": quantized, "q_norm": normed, "k_norm": normed}
    for name, there in {**optional, "cos": rotary_dim > 0, "sin": rotary_dim > 0}.items():
        if there:
            signature[name] = "*fp32"
        else:
            constexprs[name] = None
    if single:
        constexprs["num_kv_heads"] = 1
    else:
        signature["num_kv_heads"] = "i32"
    words = [dtype, f"D{head_dim}", f"KV {held}"]
    words += [f"rotary {rotary_dim}"] * (rotary_dim != head_dim)
    words += ["normed"] * normed + ["one KV head"] * single
    return Variant(
        _rotate_and_write_kernel, " ".join(words), signature, constexprs, num_warps=num_warps, num_stages=1
    )
