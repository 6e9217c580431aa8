"""Grouped attention of decode steps: one new token per request over its blocks of the paged KV cache.

    K, V of one KV head        0        64       128       192       256       320   (positions)
                               +---------+---------+---------+---------+---------+---
                               |  tile   |  tile   |  tile   |  tile   |  tile   |
                               +---------+---------+---------+---------+---------+---
                               `------------- split 0 ----------------´ `- split 1 ...

A program takes one item at a time: (request, split of 256 positions), for one KV head. All G query heads of
the group are rows of one tile (padded to the 16 rows that a tensor core multiplies), so each K and V is
read once per group. Splits are combined by their running maxima and sums: by a second kernel where a
request has several.

Owns the order in which a row is reduced: tiles and splits are counted from position 0, so it depends on the
position alone. Knows no model, and nothing of which requests are computed: items come from the host.

Invariants: tokens outside a request's [context - window, context) are never read; splits without any are no
items. K and V of positions that no row sees are replaced by zeros before they are multiplied.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from gqa_serve.engine.kernels.triton.variants import Variant
from gqa_serve.engine.kv_cache import LayerKV

TILE = 64  # positions that are multiplied at once
SPLIT = 256  # positions of one item
MIN_ROWS = 16  # of a tensor core's tile
LOG2_E = 1.4426950408889634


class Blocks(NamedTuple):
    """Where the blocks of B requests are: request b's i-th is `ids[starts[b] + i]`.

    ids: [N] int32; starts, context_lens: [B] int32. A padding request has context_len 0.
    """

    ids: torch.Tensor
    starts: torch.Tensor
    context_lens: torch.Tensor


class SplitWork(NamedTuple):
    """The items of a decode step, those of one request together and in order.

    requests, splits: [room for items] int32; starts: [B + 1] int32, request b has items starts[b] to
    starts[b + 1]; `starts[B]` items in all. tokens: [B] int32, the row of q that is request b's.
    """

    tokens: torch.Tensor
    starts: torch.Tensor
    requests: torch.Tensor
    splits: torch.Tensor


class Partials(NamedTuple):
    """Items until they are merged: values [room, KV, G, D], maxima and sums [room, KV, G], all float32."""

    values: torch.Tensor
    maxima: torch.Tensor
    sums: torch.Tensor

    @classmethod
    def allocate(
        cls, room: int, num_kv_heads: int, group_size: int, head_dim: int, device: torch.device
    ) -> Partials:
        """Scratch for up to `room` items."""
        shape = (room, num_kv_heads, group_size)
        values = torch.empty((*shape, head_dim), dtype=torch.float32, device=device)
        return cls(values, *torch.empty((2, *shape), dtype=torch.float32, device=device))


class Scores(NamedTuple):
    """How scores are made: q k^T * scale, then cap * tanh(. / cap) if there is a cap; who sees whom."""

    scale: float
    soft_cap: float | None
    window: int | None


@triton.jit
def load_tile(
    k,
    v,
    k_scale,
    v_scale,
    block_ids,
    kv_head,
    first,
    low,
    high,
    KV: tl.constexpr,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    DIMS: tl.constexpr,
    TILE: tl.constexpr,
    SCALED: tl.constexpr,
):
    """K [DIMS, TILE] and V [TILE, DIMS] of positions first .. first + TILE, zeros outside [low, high); and
    scales.
    """
    position = first + tl.arange(0, TILE)
    seen = (position >= low) & (position < high)
    block = tl.load(block_ids + position // BLOCK, mask=seen, other=0).to(tl.int64)
    row = (block * KV + kv_head) * BLOCK + position % BLOCK  # of [num_blocks * KV * BLOCK, D]
    dim = tl.arange(0, DIMS)
    in_head = dim < D
    tile_k = tl.load(k + row[None, :] * D + dim[:, None], mask=seen[None, :] & in_head[:, None], other=0.0)
    tile_v = tl.load(v + row[:, None] * D + dim[None, :], mask=seen[:, None] & in_head[None, :], other=0.0)
    if SCALED:
        of_k = tl.load(k_scale + row, mask=seen, other=0.0)
        of_v = tl.load(v_scale + row, mask=seen, other=0.0)
    else:
        of_k = tl.full([TILE], 1.0, tl.float32)
        of_v = of_k
    return tile_k, tile_v, of_k, of_v


@triton.jit
def add_tile(
    q,
    tile_k,
    tile_v,
    of_k,
    of_v,
    visible,
    values,
    maxima,
    sums,
    scale,
    cap,
    CAPPED: tl.constexpr,
    SCALED: tl.constexpr,
):
    """One tile more of the online softmax to base 2. q [ROWS, DIMS]; visible [ROWS, TILE]; values [ROWS,
    DIMS].
    """
    scores = tl.dot(q, tile_k.to(q.dtype), input_precision="ieee")  # [ROWS, TILE]
    if SCALED:
        scores = scores * of_k[None, :]
    if CAPPED:  # scale is divided by the cap, cap multiplied by log2 e
        scores = cap * (2.0 * tl.sigmoid(2.0 * (scores * scale)) - 1.0)
    else:  # scale is multiplied by log2 e
        scores = scores * scale
    scores = tl.where(visible, scores, float("-inf"))
    new_maxima = tl.maximum(maxima, tl.max(scores, 1))
    finite = tl.where(new_maxima == float("-inf"), 0.0, new_maxima)  # a row that has seen nothing yet
    weights = tl.exp2(scores - finite[:, None])
    factor = tl.exp2(maxima - finite)
    sums = sums * factor + tl.sum(weights, 1)
    if SCALED:
        weights = weights * of_v[None, :]
    values = values * factor[:, None]
    values = tl.dot(weights.to(q.dtype), tile_v.to(q.dtype), values, input_precision="ieee")
    return values, new_maxima, sums


@triton.jit
def merge_parts(values, maxima, sums, more_values, more_maxima, more_sums):
    """Two parts of a softmax become one; one that saw nothing has maximum -inf, sum 0. values [ROWS, DIMS].

    Which product is rounded first is said, not left to the compiler: two kernels must agree to the bit.
    """
    new_maxima = tl.maximum(maxima, more_maxima)
    finite = tl.where(new_maxima == float("-inf"), 0.0, new_maxima)
    factor, more = tl.exp2(maxima - finite), tl.exp2(more_maxima - finite)
    added = more_values * more[:, None]
    values = tl.fma(values, tl.broadcast_to(factor[:, None], values.shape), added)
    return values, new_maxima, tl.fma(sums, factor, more_sums * more)


@triton.jit
def normalize(values, sums):
    """Zeros for rows that saw nothing: padding."""
    return values / tl.where(sums == 0.0, 1.0, sums)[:, None]


@triton.jit(do_not_specialize=["num_requests", "window"])
def split_kernel(
    q,
    k,
    v,
    k_scale,
    v_scale,
    block_ids,
    block_starts,
    context_lens,
    tokens,
    item_starts,
    item_requests,
    item_splits,
    part_values,
    part_maxima,
    part_sums,
    out,
    num_requests,
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
):
    """Items program_id(0), + num_programs(0), ... of KV head program_id(1)."""
    kv_head = tl.program_id(1)
    head, dim = tl.arange(0, ROWS), tl.arange(0, DIMS)
    real = (head < G)[:, None] & (dim < D)[None, :]
    num_items = tl.load(item_starts + num_requests)
    for item in range(tl.program_id(0), num_items, tl.num_programs(0)):
        request = tl.load(item_requests + item)
        split = tl.load(item_splits + item)
        end = tl.load(context_lens + request)
        low = 0
        if WINDOWED:
            low = tl.maximum(end - window, 0)
        first = tl.maximum(split * SPLIT, low // TILE * TILE)
        last = tl.minimum(split * SPLIT + SPLIT, end)
        row = (tl.load(tokens + request).to(tl.int64) * KV + kv_head) * G + head  # of [T * H, D]
        tile_q = tl.load(q + row[:, None] * D + dim[None, :], mask=real, other=0.0)
        ids = block_ids + tl.load(block_starts + request)
        values = tl.zeros([ROWS, DIMS], tl.float32)
        maxima = tl.full([ROWS], float("-inf"), tl.float32)
        sums = tl.zeros([ROWS], tl.float32)
        for start in range(first, last, TILE):
            tile_k, tile_v, of_k, of_v = load_tile(
                k, v, k_scale, v_scale, ids, kv_head, start, low, end, KV, BLOCK, D, DIMS, TILE, SCALED
            )
            position = start + tl.arange(0, TILE)
            visible = ((position >= low) & (position < end))[None, :]
            values, maxima, sums = add_tile(
                tile_q, tile_k, tile_v, of_k, of_v, visible, values, maxima, sums, scale, cap, CAPPED, SCALED
            )
        if tl.load(item_starts + request + 1) - tl.load(item_starts + request) == 1:
            result = normalize(values, sums)
            tl.store(out + row[:, None] * D + dim[None, :], result.to(out.dtype.element_ty), mask=real)
        else:
            part = (item * KV + kv_head) * G + head.to(tl.int64)
            tl.store(part_values + part[:, None] * D + dim[None, :], values, mask=real)
            tl.store(part_maxima + part, maxima, mask=head < G)
            tl.store(part_sums + part, sums, mask=head < G)


@triton.jit
def merge_kernel(
    part_values,
    part_maxima,
    part_sums,
    tokens,
    item_starts,
    out,
    KV: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    DIMS: tl.constexpr,
):
    """The items of request program_id(0), KV head program_id(1), in order; one alone is written already."""
    request, kv_head = tl.program_id(0), tl.program_id(1)
    begin, end = tl.load(item_starts + request), tl.load(item_starts + request + 1)
    if end - begin != 1:
        head, dim = tl.arange(0, ROWS), tl.arange(0, DIMS)
        in_group = head < G
        real = in_group[:, None] & (dim < D)[None, :]
        values = tl.zeros([ROWS, DIMS], tl.float32)
        maxima = tl.full([ROWS], float("-inf"), tl.float32)
        sums = tl.zeros([ROWS], tl.float32)
        for item in tl.range(begin, end, num_stages=4):  # without a dot, it must be told to load ahead
            part = (item * KV + kv_head) * G + head.to(tl.int64)
            more_values = tl.load(part_values + part[:, None] * D + dim[None, :], mask=real, other=0.0)
            more_maxima = tl.load(part_maxima + part, mask=in_group, other=float("-inf"))
            more_sums = tl.load(part_sums + part, mask=in_group, other=0.0)
            values, maxima, sums = merge_parts(values, maxima, sums, more_values, more_maxima, more_sums)
        row = (tl.load(tokens + request).to(tl.int64) * KV + kv_head) * G + head
        result = normalize(values, sums)
        tl.store(out + row[:, None] * D + dim[None, :], result.to(out.dtype.element_ty), mask=real)


class DecodeConfig(NamedTuple):
    """What a launch is compiled for beside the shapes."""

    rows: int
    dims: int
    num_warps: int
    num_stages: int


def config(group_size: int, head_dim: int, element_size: int) -> DecodeConfig:
    """Tiles by shapes alone; `element_size` is of the KV cache, in bytes.

    Block ids are loaded one iteration before the K and V that they point to, so it takes five stages until
    the next tile of K and V is on its way while one is multiplied. Where tiles are larger, or widening takes
    the registers, there are three, and other programs of the multiprocessor hide the wait. Eight warps hold
    what four would spill.
    """
    rows = max(MIN_ROWS, triton.next_power_of_2(group_size))
    dims = triton.next_power_of_2(head_dim)
    num_stages = 5 if element_size > 1 and 2 * TILE * dims * element_size <= 2**15 else 3
    if element_size > 2 and dims > 64:  # float32, which is for comparisons
        num_stages = 1
    few = rows <= 16 and dims <= 128 and dims * element_size <= 256
    return DecodeConfig(rows, dims, 4 if few else 8, num_stages)


def score_factors(scores: Scores) -> tuple[float, float]:
    """(scale, cap) as add_tile takes them: the softmax is to base 2."""
    if scores.soft_cap is None:
        return scores.scale * LOG2_E, 0.0
    return scores.scale / scores.soft_cap, scores.soft_cap * LOG2_E


def decode_attention(
    q: torch.Tensor,
    kv: LayerKV,
    blocks: Blocks,
    work: SplitWork,
    scores: Scores,
    out: torch.Tensor,
    partials: Partials,
    programs: int,
) -> None:
    """out[t, h] = softmax(q[t, h] K^T) V for the tokens t of `work`; other rows of out are left alone.

    q, out: [T, H, D]; query head h reads KV head h // G. `programs`: how many share the items, per KV head.
    """
    num_kv_heads, block_size, head_dim = kv.k.shape[1:]
    group_size = q.shape[1] // num_kv_heads
    tile = config(group_size, head_dim, kv.k.element_size())
    scale, cap = score_factors(scores)
    num_requests = work.tokens.shape[0]
    split_kernel[(programs, num_kv_heads)](
        q,
        kv.k,
        kv.v,
        kv.k_scale,
        kv.v_scale,
        blocks.ids,
        blocks.starts,
        blocks.context_lens,
        work.tokens,
        work.starts,
        work.requests,
        work.splits,
        *partials,
        out,
        num_requests,
        scale,
        cap,
        scores.window or 0,
        KV=num_kv_heads,
        G=group_size,
        D=head_dim,
        ROWS=tile.rows,
        DIMS=tile.dims,
        BLOCK=block_size,
        TILE=TILE,
        SPLIT=SPLIT,
        WINDOWED=scores.window is not None,
        CAPPED=scores.soft_cap is not None,
        SCALED=kv.k_scale is not None,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    merge_kernel[(num_requests, num_kv_heads)](
        *partials,
        work.tokens,
        work.starts,
        out,
        KV=num_kv_heads,
        G=group_size,
        D=head_dim,
        ROWS=triton.next_power_of_2(group_size),
        DIMS=tile.dims,
        num_warps=4,
        num_stages=4,
    )


def decode_attention_twin(
    q: torch.Tensor,
    kv: LayerKV,
    blocks: Blocks,
    work: SplitWork,
    scores: Scores,
    out: torch.Tensor,
    partials: Partials,
    programs: int,
) -> None:
    """`decode_attention`, in plain torch and float32; without splits, so `partials` stay as they are."""
    del partials, programs  # how the work is cut does not change what is computed
    for request, token in enumerate(work.tokens.tolist()):
        end = int(blocks.context_lens[request])
        out[token] = 0 if end == 0 else attend_twin(q[token], kv, blocks, request, end, scores)


def attend_twin(
    q: torch.Tensor, kv: LayerKV, blocks: Blocks, request: int, end: int, scores: Scores
) -> torch.Tensor:
    """One token's heads q [H, D] over positions [end - window, end) of a request: [H, D] float32."""
    num_kv_heads, block_size, head_dim = kv.k.shape[1:]
    first = 0 if scores.window is None else max(0, end - scores.window)
    position = torch.arange(first, end, device=q.device)
    block = blocks.ids[blocks.starts[request] + position // block_size].long()
    k = kv.k[block, :, position % block_size].float()  # [keys, KV, D]
    v = kv.v[block, :, position % block_size].float()
    if kv.k_scale is not None and kv.v_scale is not None:
        k = k * kv.k_scale[block, :, position % block_size][..., None]
        v = v * kv.v_scale[block, :, position % block_size][..., None]
    grouped = q.float().view(num_kv_heads, -1, head_dim)  # [KV, G, D]
    weights = torch.einsum("kgd,nkd->kgn", grouped, k) * scores.scale
    if scores.soft_cap is not None:
        weights = torch.tanh(weights / scores.soft_cap) * scores.soft_cap
    return torch.einsum("kgn,nkd->kgd", weights.softmax(-1), v).reshape(-1, head_dim)


def variants() -> Iterator[Variant]:
    """What differs in code: types, head sizes, groups (up to 16 heads are the same rows, masked otherwise),
    windows and caps. The number of KV heads and the block size are factors of addresses.
    """
    shapes = [("bf16", "bf16", dim, group) for dim in (64, 80, 96, 128, 256) for group in (1, 4)]
    shapes += [("bf16", "bf16", 128, group) for group in (3, 5, 7, 8, 16)]
    shapes += [(element, element, dim, 4) for element in ("fp16", "fp32") for dim in (64, 128, 256)]
    shapes += [("bf16", kv, dim, 4) for kv in ("i8", "fp8e4nv") for dim in (64, 80, 96, 128, 256)]
    shapes += [("fp16", "i8", 128, 4)]
    for element, kv, dim, group in shapes:
        yield _split_variant(element, kv, dim, group)
    for dim in (128, 256):  # Mistral, Gemma 3, Gemma 2
        yield _split_variant("bf16", "bf16", dim, 4, windowed=True)
        yield _split_variant("bf16", "bf16", dim, 4, windowed=True, capped=True)
    for dim, group in ((64, 3), (80, 1), (96, 4), (128, 4), (128, 16), (256, 4)):
        floats = dict.fromkeys(("part_values", "part_maxima", "part_sums"), "*fp32")
        yield Variant(
            kernel=merge_kernel,
            name=f"bf16 D{dim} G{group}",
            signature={**floats, "tokens": "*i32", "item_starts": "*i32", "out": "*bf16"},
            constexprs={
                "KV": 8, "G": group, "D": dim, "ROWS": triton.next_power_of_2(group),
                "DIMS": triton.next_power_of_2(dim),
            },
            num_warps=4,
            num_stages=4,
        )  # fmt: skip


def _split_variant(
    element: str, kv: str, dim: int, group: int, windowed: bool = False, capped: bool = False
) -> Variant:
    scaled = kv in ("i8", "fp8e4nv")
    tile = config(group, dim, {"i8": 1, "fp8e4nv": 1, "fp32": 4}.get(kv, 2))
    ints = (
        "block_ids",
        "block_starts",
        "context_lens",
        "tokens",
        "item_starts",
        "item_requests",
        "item_splits",
    )
    signature = {"q": f"*{element}", "k": f"*{kv}", "v": f"*{kv}", "out": f"*{element}"}
    signature |= dict.fromkeys(ints, "*i32")
    signature |= dict.fromkeys(("part_values", "part_maxima", "part_sums"), "*fp32")
    signature |= {"num_requests": "i32", "scale": "fp32", "cap": "fp32", "window": "i32"}
    constexprs: dict[str, object] = {
        "KV": 8, "G": group, "D": dim, "ROWS": tile.rows, "DIMS": tile.dims, "BLOCK": 16, "TILE": TILE,
        "SPLIT": SPLIT, "WINDOWED": windowed, "CAPPED": capped, "SCALED": scaled,
    }  # fmt: skip
    if scaled:
        signature |= {"k_scale": "*fp32", "v_scale": "*fp32"}
    else:
        constexprs |= {"k_scale": None, "v_scale": None}
    kinds = [element, *([kv] if scaled else []), f"D{dim}", f"G{group}"]
    kinds += ["window"] * windowed + ["cap"] * capped
    return Variant(
        kernel=split_kernel,
        name=" ".join(kinds),
        signature=signature,
        constexprs=constexprs,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        targets=(90, 100) if kv == "fp8e4nv" else (80, 90, 100),
    )
