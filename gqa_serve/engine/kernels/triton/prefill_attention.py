"""Grouped attention of prompts: chunks of new tokens over the paged KV cache, ragged over requests.

A program computes one tile of one request's new tokens for one KV head. A tile's rows are tokens times the
G heads of the group, so that here too each K and V that is loaded serves the whole group:

    row          0     1     2     3     4     5   ...      (G = 3)
    token        t     t     t    t+1   t+1   t+1
    query head   0     1     2     0     1     2

Owns which tiles of K and V a tile of rows reads: from the first position that its first token sees to the
last that its last token sees. Softmax and splits are those of `decode_attention.py`.

Invariant: with `exact`, a token's result has the bytes that the decode kernel gives for the same position,
however its prompt was cut into chunks: rows and tiles have the same shapes, splits are merged in the same
order. It costs speed, since a tile then has 16 rows instead of 128.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from gqa_serve.engine.kernels.triton.decode_attention import (
    SPLIT,
    TILE,
    Blocks,
    Scores,
    add_tile,
    attend_twin,
    load_tile,
    merge_parts,
    normalize,
    score_factors,
)
from gqa_serve.engine.kernels.triton.decode_attention import config as decode_config
from gqa_serve.engine.kernels.triton.variants import Variant
from gqa_serve.engine.kv_cache import LayerKV

_ROWS = 128
_WIDE_ROWS = 64  # for head_dim above 128, whose K and V take the room


class ChunkWork(NamedTuple):
    """The tiles of rows of a step.

    query_starts: [B + 1] int32, request b's new tokens are rows query_starts[b] to query_starts[b + 1] of q.
    requests, firsts: [tiles] int32, a tile's request and the first of its tokens, counted from the
    request's first new one.
    """

    query_starts: torch.Tensor
    requests: torch.Tensor
    firsts: torch.Tensor


@triton.jit(do_not_specialize=["window"])
def chunk_kernel(
    q,
    k,
    v,
    k_scale,
    v_scale,
    block_ids,
    block_starts,
    context_lens,
    query_starts,
    tile_requests,
    tile_firsts,
    out,
    scale,
    cap,
    window,
    KV: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    SCALED: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Tile program_id(0) of KV head program_id(1)."""
    kv_head = tl.program_id(1)
    request = tl.load(tile_requests + tl.program_id(0))
    first_token = tl.load(tile_firsts + tl.program_id(0))
    query_start = tl.load(query_starts + request)
    num_tokens = tl.load(query_starts + request + 1) - query_start
    computed = tl.load(context_lens + request) - num_tokens
    ids = block_ids + tl.load(block_starts + request)

    row, dim = tl.arange(0, ROWS), tl.arange(0, DIMS)
    token = first_token + row // G
    in_tile = (row < ROWS // G * G) & (token < num_tokens)
    place = ((query_start + token).to(tl.int64) * KV + kv_head) * G + row % G  # of [T * H, D]
    real = in_tile[:, None] & (dim < D)[None, :]
    tile_q = tl.load(q + place[:, None] * D + dim[None, :], mask=real, other=0.0)
    end = tl.where(in_tile, computed + token + 1, 0)  # [ROWS]; rows of padding see nothing
    high = computed + tl.minimum(first_token + ROWS // G, num_tokens)
    low, low_of_row = 0, tl.zeros([ROWS], tl.int32)
    if WINDOWED:
        low = tl.maximum(computed + first_token + 1 - window, 0)
        low_of_row = tl.maximum(end - window, 0)

    values = tl.zeros([ROWS, DIMS], tl.float32)
    maxima = tl.full([ROWS], float("-inf"), tl.float32)
    sums = tl.zeros([ROWS], tl.float32)
    if EXACT:
        for split in range(low // SPLIT, (high + SPLIT - 1) // SPLIT):
            more_values = tl.zeros([ROWS, DIMS], tl.float32)
            more_maxima = tl.full([ROWS], float("-inf"), tl.float32)
            more_sums = tl.zeros([ROWS], tl.float32)
            start = tl.maximum(split * SPLIT, low // TILE * TILE)
            stop = tl.minimum(split * SPLIT + SPLIT, high)
            for at in range(start, stop, TILE):
                tile_k, tile_v, of_k, of_v = load_tile(
                    k, v, k_scale, v_scale, ids, kv_head, at, low, high, KV, BLOCK, D, DIMS, TILE, SCALED
                )
                position = (at + tl.arange(0, TILE))[None, :]
                visible = (position >= low_of_row[:, None]) & (position < end[:, None])
                more_values, more_maxima, more_sums = add_tile(
                    tile_q,
                    tile_k,
                    tile_v,
                    of_k,
                    of_v,
                    visible,
                    more_values,
                    more_maxima,
                    more_sums,
                    scale,
                    cap,
                    CAPPED,
                    SCALED,
                )
            values, maxima, sums = merge_parts(values, maxima, sums, more_values, more_maxima, more_sums)
    else:
        for at in range(low // TILE * TILE, high, TILE):
            tile_k, tile_v, of_k, of_v = load_tile(
                k, v, k_scale, v_scale, ids, kv_head, at, low, high, KV, BLOCK, D, DIMS, TILE, SCALED
            )
            position = (at + tl.arange(0, TILE))[None, :]
            visible = (position >= low_of_row[:, None]) & (position < end[:, None])
            values, maxima, sums = add_tile(
                tile_q, tile_k, tile_v, of_k, of_v, visible, values, maxima, sums, scale, cap, CAPPED, SCALED
            )
    result = normalize(values, sums)
    tl.store(out + place[:, None] * D + dim[None, :], result.to(out.dtype.element_ty), mask=real)


class PrefillConfig(NamedTuple):
    """What a launch is compiled for beside the shapes."""

    rows: int
    dims: int
    num_warps: int
    num_stages: int
    tile: int = TILE


def config(group_size: int, head_dim: int, element_size: int, exact: bool) -> PrefillConfig:
    """Tiles by shapes alone; with `exact`, the decode kernel's. `element_size`: of the cache, in bytes."""
    if exact:
        return PrefillConfig(*decode_config(group_size, head_dim, element_size))
    dims = triton.next_power_of_2(head_dim)
    if element_size > 2:  # no tensor cores: small tiles, one of K and V at a time
        return PrefillConfig(max(16, triton.next_power_of_2(group_size)), dims, 8, 1, TILE // 2)
    rows = _ROWS if dims <= 128 else _WIDE_ROWS
    tile = TILE if dims <= 128 else TILE // 2  # so that GPUs with 99 KiB of shared memory have room
    return PrefillConfig(max(rows, triton.next_power_of_2(group_size)), dims, 8, 2, tile)


def tokens_per_tile(group_size: int, head_dim: int, element_size: int, exact: bool) -> int:
    """How many tokens of a request one tile of rows holds: what `ChunkWork.firsts` counts in."""
    return config(group_size, head_dim, element_size, exact).rows // group_size


def prefill_attention(
    q: torch.Tensor,
    kv: LayerKV,
    blocks: Blocks,
    work: ChunkWork,
    scores: Scores,
    out: torch.Tensor,
    exact: bool,
) -> None:
    """out[t, h] = softmax(q[t, h] K^T) V, causal, for the tokens t in the tiles of `work`.

    q, out: [T, H, D]; K and V of the new tokens are in the cache already; query head h reads KV head h // G.
    """
    num_kv_heads, block_size, head_dim = kv.k.shape[1:]
    group_size = q.shape[1] // num_kv_heads
    tile = config(group_size, head_dim, kv.k.element_size(), exact)
    scale, cap = score_factors(scores)
    chunk_kernel[(work.requests.shape[0], num_kv_heads)](
        q,
        kv.k,
        kv.v,
        kv.k_scale,
        kv.v_scale,
        blocks.ids,
        blocks.starts,
        blocks.context_lens,
        work.query_starts,
        work.requests,
        work.firsts,
        out,
        scale,
        cap,
        scores.window or 0,
        KV=num_kv_heads,
        G=group_size,
        D=head_dim,
        ROWS=tile.rows,
        DIMS=tile.dims,
        BLOCK=block_size,
        TILE=tile.tile,
        SPLIT=SPLIT,
        WINDOWED=scores.window is not None,
        CAPPED=scores.soft_cap is not None,
        SCALED=kv.k_scale is not None,
        EXACT=exact,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def prefill_attention_twin(
    q: torch.Tensor,
    kv: LayerKV,
    blocks: Blocks,
    work: ChunkWork,
    scores: Scores,
    out: torch.Tensor,
    exact: bool,
) -> None:
    """`prefill_attention`, in plain torch and float32, token by token."""
    num_kv_heads, _, head_dim = kv.k.shape[1:]
    tokens = tokens_per_tile(q.shape[1] // num_kv_heads, head_dim, kv.k.element_size(), exact)
    for request, first in zip(work.requests.tolist(), work.firsts.tolist(), strict=True):
        begin, stop = work.query_starts[request : request + 2].tolist()
        computed = int(blocks.context_lens[request]) - (stop - begin)
        for token in range(first, min(first + tokens, stop - begin)):
            out[begin + token] = attend_twin(
                q[begin + token], kv, blocks, request, computed + token + 1, scores
            )


def variants() -> Iterator[Variant]:
    """What differs in code, for chunks as they are and for those that have the decode kernel's bytes."""
    shapes = [("bf16", "bf16", dim, group) for dim in (64, 80, 96, 128, 256) for group in (1, 4)]
    shapes += [("bf16", "bf16", 128, group) for group in (3, 7, 16)]
    shapes += [(element, element, dim, 4) for element in ("fp16", "fp32") for dim in (64, 128, 256)]
    shapes += [("bf16", kv, dim, 4) for kv in ("i8", "fp8e4nv") for dim in (64, 128, 256)]
    for element, kv, dim, group in shapes:
        yield _chunk_variant(element, kv, dim, group)
    for kv in ("bf16", "i8"):
        for dim in (64, 128, 256):
            yield _chunk_variant("bf16", kv, dim, 4, exact=True)
    for dim in (128, 256):
        yield _chunk_variant("bf16", "bf16", dim, 4, windowed=True)
        yield _chunk_variant("bf16", "bf16", dim, 4, windowed=True, capped=True)


def _chunk_variant(
    element: str,
    kv: str,
    dim: int,
    group: int,
    windowed: bool = False,
    capped: bool = False,
    exact: bool = False,
) -> Variant:
    scaled = kv in ("i8", "fp8e4nv")
    tile = config(group, dim, {"i8": 1, "fp8e4nv": 1, "fp32": 4}.get(kv, 2), exact)
    ints = ("block_ids", "block_starts", "context_lens", "query_starts", "tile_requests", "tile_firsts")
    signature = {"q": f"*{element}", "k": f"*{kv}", "v": f"*{kv}", "out": f"*{element}"}
    signature |= dict.fromkeys(ints, "*i32")
    signature |= {"scale": "fp32", "cap": "fp32", "window": "i32"}
    constexprs: dict[str, object] = {
        "KV": 8, "G": group, "D": dim, "ROWS": tile.rows, "DIMS": tile.dims, "BLOCK": 16, "TILE": tile.tile,
        "SPLIT": SPLIT, "WINDOWED": windowed, "CAPPED": capped, "SCALED": scaled, "EXACT": exact,
    }  # fmt: skip
    if scaled:
        signature |= {"k_scale": "*fp32", "v_scale": "*fp32"}
    else:
        constexprs |= {"k_scale": None, "v_scale": None}
    kinds = [element, *([kv] if scaled else []), f"D{dim}", f"G{group}"]
    kinds += ["window"] * windowed + ["cap"] * capped + ["exact"] * exact
    return Variant(
        kernel=chunk_kernel,
        name=" ".join(kinds),
        signature=signature,
        constexprs=constexprs,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        targets=(90, 100) if kv == "fp8e4nv" else (80, 90, 100),
    )
