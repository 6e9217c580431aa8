"""Grouped attention over the paged KV cache, in plain torch.

    cache, one layer     [num_blocks, KV, block_size, D] seen as [num_blocks * KV, block_size * D]
    gathered             index_select of (block * KV + head) in the order [requests, KV, blocks], which is
                         [requests, KV, context, D] without another copy
    queries, folded      [requests, KV, G * query_len, D]: a group's G query heads are rows of one product

so each K and V of a KV head is read once for its whole group and never repeated per query head.
Requests with one new token are computed together (padded, in groups of similar length); the others one by
one, gathered once, in tiles of query rows. A layer with a window gathers only the blocks the window touches.
Invariant: what a token's attention reads depends on its request alone, and padding is masked, never read as
values: gathered padding repeats the request's own last block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from gqa_serve.engine.backends.base import AttentionLayout, AttentionStep, HeadNorms
from gqa_serve.engine.kv_cache import dequantize_kv, quantize_kv

if TYPE_CHECKING:
    from gqa_serve.engine.batch import ForwardBatch
    from gqa_serve.engine.kv_cache import TensorKVCache

# Scores (query rows * keys, per KV head) of one tile: bounds masks and score matrices to 16 MiB in float32.
_MAX_TILE_SCORES = 4 << 20
_MAX_TILE_TOKENS = 256
# Decode requests are padded to the longest of their group; a group ends where that wastes this many tokens
# and more than half of what is read.
_MAX_PADDING_TOKENS = 128
# Masks of one step that are kept from layer to layer; beyond this they are made again in each layer.
_MAX_KEPT_MASK_BYTES = 64 << 20


@dataclass
class _Piece:
    """Query rows that are computed in one call: one decode group, or one tile of one request's new tokens.

    `rows`: which of the T tokens, None for all of them in order. `gather`: cache rows to read. `keys` is the
    part of the gathered context that any of the rows may see, `mask` what of it each row may not see, or None
    if every row sees all of it.
    """

    rows: torch.Tensor | slice | None
    num_requests: int
    tokens_per_request: int
    gather: torch.Tensor
    keys: slice
    mask: _Mask | None


@dataclass
class _Mask:
    """Row r sees keys first[r] <= k < end[r] of `num_keys`; first None: from the start.

    first, end: [requests, 1, rows, 1] int64. The additive mask is kept once made, if `keep`.
    """

    first: torch.Tensor | None
    end: torch.Tensor
    num_keys: int
    keep: bool
    made: torch.Tensor | None = None

    def additive(self, dtype: torch.dtype) -> torch.Tensor:
        """0 where visible, -inf where not: [requests, 1, rows, num_keys]."""
        if self.made is not None:
            return self.made
        positions = torch.arange(self.num_keys, device=self.end.device)
        hidden = positions >= self.end
        if self.first is not None:
            hidden = hidden.logical_or_(positions < self.first)
        mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
        mask.masked_fill_(hidden, float("-inf"))
        if self.keep:
            self.made = mask
        return mask


class ReferenceAttentionStep(AttentionStep):
    """One step: angles and slots, and per distinct window the pieces to compute. Computes in `dtype`."""

    def __init__(
        self,
        batch: ForwardBatch,
        cache: TensorKVCache,
        layout: AttentionLayout,
        dtype: torch.dtype,
        rms_norm: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor],
    ) -> None:
        self.cache = cache
        self.dtype = dtype
        self.cache_dtype = cache.k[0].dtype
        self.layout = layout
        self.rms_norm = rms_norm
        self.split = (layout.num_heads + layout.num_kv_heads, layout.num_kv_heads)
        angles = [rotary.angles(batch.positions, dtype) for rotary in layout.rotaries]
        self.angles = [None if i is None else angles[i] for i in layout.layer_rotaries]
        self.blocks = batch.slots // cache.block_size  # [T]
        self.offsets = batch.slots % cache.block_size  # [T]
        pieces = [_plan(batch, cache.block_size, layout, window) for window in layout.windows]
        self.pieces = [pieces[i] for i in layout.layer_windows]
        self.clamp = self.cache_dtype == torch.float16

    def rotate_and_write(self, layer: int, qkv: torch.Tensor, norms: HeadNorms | None) -> torch.Tensor:
        heads = qkv.view(qkv.shape[0], -1, self.layout.head_dim)  # [T, H + 2 KV, D]
        qk, v = heads.split_with_sizes(self.split, 1)  # [T, H + KV, D], [T, KV, D]
        if norms is not None:
            qk = self._normalize(qk, norms)
        angles = self.angles[layer]
        if angles is not None:
            qk = _rotate(qk, *angles)
        q, k = qk.split_with_sizes((self.layout.num_heads, self.layout.num_kv_heads), 1)
        held = self.cache.layer(layer)
        self._write(held.k, held.k_scale, k)
        self._write(held.v, held.v_scale, v)
        return q

    def _write(self, target: torch.Tensor, scales: torch.Tensor | None, x: torch.Tensor) -> None:
        """x [T, KV, D] into the slots of the new tokens; `target` and `scales` as `LayerKV` has them."""
        where = (self.blocks, self.offsets)
        if scales is not None:
            x, scale = quantize_kv(x, self.cache_dtype)
            scales.transpose(1, 2).index_put_(where, scale)  # view [num_blocks, block_size, KV]
        else:
            x = x.to(self.cache_dtype)
        if self.clamp:
            # A float16 overflow must not reach the request that owns the block next: a masked NaN is still a
            # NaN after the product with its zero weight.
            x = x.nan_to_num()
        if target.dtype.itemsize == 1:  # torch moves bytes where it has no operations on float8
            target, x = target.view(torch.uint8), x.view(torch.uint8)
        target.transpose(1, 2).index_put_(where, x)  # view [num_blocks, block_size, KV, D]

    def _normalize(self, qk: torch.Tensor, norms: HeadNorms) -> torch.Tensor:
        """qk [T, H + KV, D] -> the same, normed."""
        num_heads, num_kv_heads = self.layout.num_heads, self.layout.num_kv_heads
        if norms.mode == "head":  # queries and keys in one call
            weight = torch.cat((norms.q.expand(num_heads, -1), norms.k.expand(num_kv_heads, -1)))
            return self.rms_norm(qk, weight, norms.eps)
        q = self.rms_norm(qk[:, :num_heads].flatten(1), norms.q, norms.eps)  # [T, H * D]
        k = self.rms_norm(qk[:, num_heads:].flatten(1), norms.k, norms.eps)  # [T, KV * D]
        return torch.cat((q, k), dim=1).view(qk.shape)

    def attend(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        pieces = self.pieces[layer]
        source, gathered = pieces[0].gather, self._gather(layer, pieces[0])
        if pieces[0].rows is None:
            return self._compute(pieces[0], q, *gathered)
        out = torch.empty(q.shape[0], q.shape[1] * q.shape[2], dtype=q.dtype, device=q.device)
        for piece in pieces:
            if piece.gather is not source:  # the tiles of one request share what they read
                source, gathered = piece.gather, self._gather(layer, piece)
            out[piece.rows] = self._compute(piece, q[piece.rows], *gathered)
        return out

    def _gather(self, layer: int, piece: _Piece) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of the piece's blocks, in order of position: [requests, KV, gathered context, D] each."""
        shape = (piece.num_requests, self.layout.num_kv_heads, -1, self.layout.head_dim)

        def gather(source: torch.Tensor) -> torch.Tensor:
            rows = source.view(source.shape[0] * source.shape[1], -1)  # [num_blocks * KV, block_size * D]
            return rows.index_select(0, piece.gather)

        def read(source: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
            if scales is None:
                return gather(source).view(shape)
            numbers = gather(source.view(torch.uint8)).view(source.dtype).view(shape)
            return dequantize_kv(numbers, gather(scales).view(shape[:3]), self.dtype)

        held = self.cache.layer(layer)
        return read(held.k, held.k_scale), read(held.v, held.v_scale)

    def _compute(self, piece: _Piece, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q [rows of the piece, H, D] -> [rows, H * D]; k and v as `_gather` returns them."""
        layout = self.layout
        count, tokens = piece.num_requests, piece.tokens_per_request
        first, length = piece.keys.start, piece.keys.stop - piece.keys.start
        k = k.narrow(2, first, length).to(q.dtype)  # [count, KV, keys, D]
        v = v.narrow(2, first, length).to(q.dtype)
        if tokens == 1:
            folded = q.reshape(count, layout.num_kv_heads, layout.group_size, layout.head_dim)
        else:
            folded = q.view(tokens, layout.num_kv_heads, layout.group_size, layout.head_dim)
            folded = folded.transpose(0, 1).reshape(1, layout.num_kv_heads, -1, layout.head_dim)
        mask = None if piece.mask is None else piece.mask.additive(q.dtype)
        if layout.soft_cap is None:
            out = F.scaled_dot_product_attention(folded, k, v, attn_mask=mask, scale=layout.scale)
        else:
            out = _soft_capped_attention(folded, k, v, mask, layout.scale, layout.soft_cap)
        if tokens > 1:  # [1, KV, tokens * G, D] -> [tokens, KV, G, D]
            out = out.view(layout.num_kv_heads, tokens, layout.group_size, layout.head_dim).transpose(0, 1)
        return out.reshape(count * tokens, -1)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the first rotary_dim of D dimensions; x [T, heads, D], cos and sin [T, 1, rotary_dim]."""
    rotary_dim = cos.shape[-1]
    turned = x if rotary_dim == x.shape[-1] else x[..., :rotary_dim]
    turned = (turned * cos).addcmul_(turned.roll(rotary_dim // 2, -1), sin)
    return turned if rotary_dim == x.shape[-1] else torch.cat((turned, x[..., rotary_dim:]), dim=-1)


def _soft_capped_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float, cap: float
) -> torch.Tensor:
    """softmax(cap * tanh(q k^T scale / cap) + mask) v, in float32.

    q [N, KV, rows, D], k and v [N, KV, keys, D] -> [N, KV, rows, D].
    """
    scores = torch.matmul(q.float(), k.float().transpose(-1, -2))  # [N, KV, rows, keys]
    scores.mul_(scale / cap).tanh_().mul_(cap)
    if mask is not None:
        scores.add_(mask)
    return torch.matmul(scores.softmax(dim=-1), v.float()).to(q.dtype)


def _plan(batch: ForwardBatch, block_size: int, layout: AttentionLayout, window: int | None) -> list[_Piece]:
    """Cut a step into pieces for layers with this window."""
    starts = [0]
    for length in batch.query_lens:
        starts.append(starts[-1] + length)
    decode = [index for index, length in enumerate(batch.query_lens) if length == 1]
    pieces = []
    for members in _decode_groups(decode, batch.context_lens, block_size, window):
        whole = len(members) == starts[-1]
        tokens = None if whole else batch.block_tables.new_tensor([starts[index] for index in members])
        pieces.append(_decode_piece(batch, members, tokens, block_size, layout, window))
    for index, length in enumerate(batch.query_lens):
        if length > 1:
            pieces += _prefill_pieces(batch, index, starts[index], block_size, layout, window)
    return pieces


def _decode_groups(
    members: list[int], context_lens: list[int], block_size: int, window: int | None
) -> list[list[int]]:
    """Split requests with one new token so that padding to a group's longest stays cheap."""
    lengths = {
        index: _span(context_lens[index], context_lens[index], window, block_size) for index in members
    }
    sizes = {index: (last - first) * block_size for index, (first, last) in lengths.items()}
    groups: list[list[int]] = []
    longest = 0
    for index in sorted(members, key=lambda index: -sizes[index]):
        waste = longest - sizes[index]
        if not groups or (waste > _MAX_PADDING_TOKENS and waste * 2 > longest):
            groups.append([])
            longest = sizes[index]
        groups[-1].append(index)
    return [sorted(group) for group in groups]


def _span(first_query_end: int, context: int, window: int | None, block_size: int) -> tuple[int, int]:
    """[first, last) of the request's blocks that queries see; the first query ends at `first_query_end`."""
    first = 0 if window is None else max(0, first_query_end - window) // block_size
    return first, -(-context // block_size)


def _decode_piece(
    batch: ForwardBatch,
    members: list[int],
    tokens: torch.Tensor | None,
    block_size: int,
    layout: AttentionLayout,
    window: int | None,
) -> _Piece:
    """One query token of each member over its own context, padded to the longest."""
    tables, device = batch.block_tables, batch.block_tables.device
    contexts = [batch.context_lens[index] for index in members]
    spans = [_span(context, context, window, block_size) for context in contexts]
    width = max(last - first for first, last in spans)
    ends = [context - first * block_size for context, (first, _) in zip(contexts, spans, strict=True)]
    begins = [0 if window is None else max(0, end - window) for end in ends]
    if len(members) == 1:
        blocks = tables[members[0], spans[0][0] : spans[0][1]][None]  # [1, width]
    else:
        columns = torch.tensor([first for first, _ in spans], device=device)[:, None]
        columns = columns + torch.arange(width, device=device)  # [members, width]
        last = torch.tensor([last for _, last in spans], device=device)[:, None]
        columns = torch.where(columns < last, columns, last - 1)  # padding repeats the last block
        whole = len(members) == tables.shape[0]
        blocks = (tables if whole else tables[torch.tensor(members, device=device)]).gather(1, columns)
    mask = None
    if len(set(ends)) > 1 or len(set(begins)) > 1:
        end = torch.tensor(ends, device=device).view(-1, 1, 1, 1)
        begin = torch.tensor(begins, device=device).view(-1, 1, 1, 1) if any(begins) else None
        keys = slice(0, max(ends))
        mask = _Mask(begin, end, max(ends), keep=True)
    else:
        keys = slice(begins[0], ends[0])
    return _Piece(tokens, len(members), 1, _cache_rows(blocks, layout.num_kv_heads), keys, mask)


def _cache_rows(blocks: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """blocks [N, width] -> rows of the cache seen as [num_blocks * KV, ...], in the order [N, KV, width]."""
    heads = torch.arange(num_kv_heads, device=blocks.device)[:, None]
    return (blocks[:, None] * num_kv_heads + heads).flatten()


def _prefill_pieces(
    batch: ForwardBatch, index: int, start: int, block_size: int, layout: AttentionLayout, window: int | None
) -> list[_Piece]:
    """The new tokens of one request, in tiles of query tokens over one gathered context."""
    query_len, context = batch.query_lens[index], batch.context_lens[index]
    computed = context - query_len
    first, last = _span(computed + 1, context, window, block_size)
    gather = _cache_rows(batch.block_tables[index, first:last][None], layout.num_kv_heads)
    seen = context if window is None else min(context, window + _MAX_TILE_TOKENS)
    tile = max(1, min(_MAX_TILE_TOKENS, _MAX_TILE_SCORES // (layout.group_size * seen)))
    keep = query_len * layout.group_size * seen * 4 <= _MAX_KEPT_MASK_BYTES
    whole = query_len == len(batch.positions) <= tile
    pieces = []
    for begin in range(0, query_len, tile):
        size = min(tile, query_len - begin)
        position, end = computed + begin, computed + begin + size
        lowest = 0 if window is None else max(0, position + 1 - window)
        keys = slice(lowest - first * block_size, end - first * block_size)
        mask = None
        if size > 1:
            ends = torch.arange(position + 1 - lowest, end + 1 - lowest, device=batch.positions.device)
            ends = ends.repeat_interleave(layout.group_size).view(1, 1, -1, 1)
            begins = None if window is None or end <= window else ends - window
            mask = _Mask(begins, ends, end - lowest, keep)
        rows = None if whole else slice(start + begin, start + begin + size)
        pieces.append(_Piece(rows, 1, size, gather, keys, mask))
    return pieces
