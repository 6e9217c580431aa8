"""Tokens out of rows of logits: the largest, or one drawn at random, without sorting a row.

A row of V logits is cut into chunks, a program for each, so that many multiprocessors read a single row. What
chunks find is combined by the kernels that come after, in the order of the chunks. A draw inverts the
cumulative distribution in the order of the vocabulary, as `engine/sampler.py` says; of what top-k and top-p
keep, the smallest logit is searched for:

    a float32's bits, as an ordered integer    d d d d d d d d     8 digits of 4 bits, the highest first
    one search pass                            for each of the 16 values of the next digit: how many tokens
                                               (top-k), or how much probability (top-p), is at or above it

The threshold is the largest number that enough tokens, or enough probability, is at or above. Passes over the
row: 1 for the largest; a draw 2 and a chunk, 8 more where any row of the batch has a top-k, 9 where any has a
top-p. Rows without that filter take no part in its passes. A pass is a launch, and none waits for the host.

Invariant: a sum over a row is added up in an order that depends on V alone; and since the sum of a part of
non-negative numbers, added in the same order, never exceeds that of all, the searches need no tolerance.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from gqa_serve.engine.kernels.triton.variants import Variant

PASSES = 8
PICK_WARPS = 16  # one program per row scans a whole chunk in float64
_VALUES = tl.constexpr(16)  # of a digit
_LOWEST = tl.constexpr(-(2**31))  # below the key of every number
_LAST = tl.constexpr(2**31 - 1)


class Config(NamedTuple):
    """Tokens of one program, how many of them it compares with 16 thresholds at once, and its warps."""

    chunk: int
    tile: int
    num_warps: int


def config(vocab: int) -> Config:
    """32 programs for a row of 128k tokens; a tile of 16 x 512 sums takes 64 registers of each thread."""
    chunk = min(triton.next_power_of_2(vocab), 4096)
    return Config(chunk, min(chunk, 512), 4)


# --- the largest ---


@triton.jit
def _argmax_chunk_kernel(logits, values, indices, stride, vocab, num_chunks, CHUNK: tl.constexpr):
    """values [R, chunks]: the chunk's largest; indices: its first index, -1 if a logit is not finite."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    index = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = index < vocab
    x = tl.load(logits + row * stride + index, mask=inside, other=0.0)
    bad = tl.max((inside & ((x != x) | (tl.abs(x) == float("inf")))).to(tl.int32))
    x = tl.where(inside & (x == x), x, float("-inf"))
    best = tl.max(x)
    first = tl.min(tl.where(x == best, index, _LAST))
    tl.store(values + row * num_chunks + chunk, best)
    tl.store(indices + row * num_chunks + chunk, tl.where(bad > 0, -1, first))


@triton.jit
def _argmax_row_kernel(values, indices, out, num_chunks, CHUNKS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, CHUNKS)
    inside = chunk < num_chunks
    value = tl.load(values + row * num_chunks + chunk, mask=inside, other=float("-inf"))
    index = tl.load(indices + row * num_chunks + chunk, mask=inside, other=_LAST)
    best = tl.min(tl.where(value == tl.max(value), index, _LAST))
    tl.store(out + row, tl.where(tl.min(index) < 0, -1, best).to(out.dtype.element_ty))


def argmax(logits: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """The first index of each row's largest value, -1 where a value is not finite; returns `out`.

    logits [R, V] float32; out [R] int32 or int64.
    """
    rows, vocab = logits.shape
    chunk, _, num_warps = config(vocab)
    num_chunks = triton.cdiv(vocab, chunk)
    values = torch.empty(rows, num_chunks, dtype=torch.float32, device=logits.device)
    indices = torch.empty(rows, num_chunks, dtype=torch.int32, device=logits.device)
    _argmax_chunk_kernel[(rows, num_chunks)](
        logits, values, indices, logits.stride(0), vocab, num_chunks,
        CHUNK=chunk, num_warps=num_warps, num_stages=1,
    )  # fmt: skip
    _argmax_row_kernel[(rows,)](
        values, indices, out, num_chunks,
        CHUNKS=triton.next_power_of_2(num_chunks), num_warps=1, num_stages=1,
    )  # fmt: skip
    return out


def argmax_twin(logits: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    finite = torch.isfinite(logits).all(dim=-1)
    return out.copy_(torch.where(finite, logits.argmax(dim=-1), -1))


# --- a draw ---
#
# Sizes change from step to step and from launch to launch, and so do the addresses of what is one number per
# sample (parts of one buffer, it may be): none of that is a reason to compile a kernel anew.
_SIZES = ["number", "samples"]
_PER_SAMPLE = ["rows", "temperature", "top_k", "top_p", "min_p", "unit", "out"]


@triton.jit
def _key(x):
    """Float32 -> int32, in the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _number(key):
    """The float32 whose key it is."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def _scaled(logits, rows, temperature, sample, index, stride, vocab):
    """Logits of the sample's row over its temperature; -inf beyond the vocabulary, and no -0."""
    row = tl.load(rows + sample).to(tl.int64)
    x = tl.load(logits + row * stride + index, mask=index < vocab, other=float("-inf"))
    x = tl.div_rn(x, tl.load(temperature + sample) + tl.zeros_like(x))
    return tl.where(x == 0.0, 0.0, x)


@triton.jit
def _largest(bests, sample, num_chunks, CHUNKS: tl.constexpr):
    """Of the sample's row; 0 if that has no finite logit, so that differences are numbers."""
    chunk = tl.arange(0, CHUNKS)
    best = tl.max(tl.load(bests + sample * num_chunks + chunk, mask=chunk < num_chunks, other=float("-inf")))
    return tl.where(best > float("-inf"), best, 0.0)


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_PER_SAMPLE)
def _best_kernel(logits, rows, temperature, bests, stride, vocab, num_chunks, CHUNK: tl.constexpr):
    """bests [S, chunks]: the largest of each chunk."""
    sample, chunk = tl.program_id(0), tl.program_id(1)
    index = chunk * CHUNK + tl.arange(0, CHUNK)
    x = _scaled(logits, rows, temperature, sample, index, stride, vocab)
    tl.store(bests + sample * num_chunks + chunk, tl.max(tl.where(x == x, x, float("-inf"))))


@triton.jit
def _threshold(digits, totals, sample, limit, number, samples, num_chunks, CHUNKS: tl.constexpr):
    """The first `number` digits of a threshold, the others 0, as an int64 from 0 on.

    digits [PASSES, S]: the same, as each pass found them; totals [2, S, chunks, 16]: what is at or above each
    value of the digit before, of even passes and of odd ones.
    """
    chunk, value = tl.arange(0, CHUNKS)[:, None], tl.arange(0, _VALUES)[None, :]
    before = ((number + 1) % 2) * samples + sample
    part = tl.load(
        totals + (before * num_chunks + chunk) * _VALUES + value, mask=chunk < num_chunks, other=0.0
    )
    reached = tl.sum(part.to(tl.float64), axis=0) >= limit
    digit = tl.maximum(tl.sum(reached.to(tl.int32)) - 1, 0).to(tl.int64)
    found = tl.load(digits + (number - 1) * samples + sample)
    return found + (digit << (32 - 4 * number))


@triton.jit
def _as_key(threshold):
    return (threshold - 2147483648).to(tl.int32)


@triton.jit
def _mass_limit(top_k, top_p, k_floors, above, best, sample, vocab, num_chunks, CHUNKS: tl.constexpr):
    """The probability that top-p keeps, of weights exp(x - best): top_p of the weight of all tokens, or of
    exactly top_k of them, however many tie with the last. above [S, chunks, 2]: see `_measure_kernel`."""
    chunk = tl.arange(0, CHUNKS)
    inside = chunk < num_chunks
    source = above + (sample * num_chunks + chunk) * 2
    mass = tl.sum(tl.load(source, mask=inside, other=0.0))
    if top_k is not None:
        k = tl.load(top_k + sample)
        count = tl.sum(tl.load(source + 1, mask=inside, other=0.0))
        if (k > 0) & (k < vocab):
            ties = tl.exp(_number(tl.load(k_floors + sample)) - best)
            mass += ties.to(tl.float64) * (k.to(tl.float64) - count)
    return mass * tl.load(top_p + sample)


@triton.jit
def _add_up(
    logits, rows, temperature, digits, totals, sample, chunk, threshold, best, stride, vocab, number, samples,
    num_chunks, BY_MASS: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One search pass over one chunk: its 16 totals, and the digits the pass began with."""
    if chunk == 0:
        tl.store(digits + number * samples + sample, threshold)
    value = tl.arange(0, _VALUES)
    floor = _as_key(threshold + (value.to(tl.int64) << (28 - 4 * number)))[:, None]  # [16, 1]
    total = tl.zeros((_VALUES, TILE), tl.float32)
    for tile in range(0, CHUNK, TILE):
        index = chunk * CHUNK + tile + tl.arange(0, TILE)
        x = _scaled(logits, rows, temperature, sample, index, stride, vocab)
        weight = tl.exp(x - best) if BY_MASS else tl.where(index < vocab, 1.0, 0.0)
        total += tl.where(_key(x)[None, :] >= floor, weight[None, :], 0.0)
    place = ((number % 2) * samples + sample) * num_chunks + chunk
    tl.store(totals + place * _VALUES + value, tl.sum(total, axis=1))


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_PER_SAMPLE)
def _count_kernel(
    logits, rows, temperature, top_k, digits, totals, stride, vocab, number, samples, num_chunks,
    CHUNK: tl.constexpr, TILE: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Pass `number` of the search for the k-th largest logit."""
    sample, chunk = tl.program_id(0), tl.program_id(1)
    k = tl.load(top_k + sample)
    if (k > 0) & (k < vocab):
        threshold = tl.full((), 0, tl.int64)
        if number > 0:
            threshold = _threshold(digits, totals, sample, k, number, samples, num_chunks, CHUNKS)
        _add_up(
            logits, rows, temperature, digits, totals, sample, chunk, threshold, 0.0, stride, vocab, number,
            samples, num_chunks, False, CHUNK, TILE,
        )  # fmt: skip


@triton.jit
def _k_floor(
    top_k, digits, totals, sample, vocab, samples, num_chunks, PASSES: tl.constexpr, CHUNKS: tl.constexpr
):
    """Key of the k-th largest logit, below every key if the sample has no top-k."""
    floor = tl.full((), _LOWEST, tl.int32)
    k = tl.load(top_k + sample)
    if (k > 0) & (k < vocab):
        floor = _as_key(_threshold(digits, totals, sample, k, PASSES, samples, num_chunks, CHUNKS))
    return floor


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_PER_SAMPLE)
def _measure_kernel(
    logits, rows, temperature, top_k, top_p, bests, k_digits, k_totals, k_floors, above, stride, vocab,
    samples, num_chunks, PASSES: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """above [S, chunks, 2] float64: weight and number of the tokens above the k-th largest, of all without
    top-k; k_floors [S]: its key."""
    sample, chunk = tl.program_id(0), tl.program_id(1)
    if tl.load(top_p + sample) < 1.0:
        floor = tl.full((), _LOWEST, tl.int32)
        if top_k is not None:
            floor = _k_floor(top_k, k_digits, k_totals, sample, vocab, samples, num_chunks, PASSES, CHUNKS)
        if chunk == 0:
            tl.store(k_floors + sample, floor)
        index = chunk * CHUNK + tl.arange(0, CHUNK)
        x = _scaled(logits, rows, temperature, sample, index, stride, vocab)
        kept = (index < vocab) & (_key(x) > floor)
        weight = tl.where(kept, tl.exp(x - _largest(bests, sample, num_chunks, CHUNKS)), 0.0)
        target = above + (sample * num_chunks + chunk) * 2
        tl.store(target, tl.sum(weight.to(tl.float64)))
        tl.store(target + 1, tl.sum(kept.to(tl.int32)).to(tl.float64))


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_PER_SAMPLE)
def _mass_kernel(
    logits, rows, temperature, top_k, top_p, bests, k_floors, above, digits, totals, stride, vocab, number,
    samples, num_chunks, CHUNK: tl.constexpr, TILE: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Pass `number` of the search for the smallest logit that top-p keeps: the largest number that enough
    weight is at or above."""
    sample, chunk = tl.program_id(0), tl.program_id(1)
    if tl.load(top_p + sample) < 1.0:
        best = _largest(bests, sample, num_chunks, CHUNKS)
        threshold = tl.full((), 0, tl.int64)
        if number > 0:
            limit = _mass_limit(top_k, top_p, k_floors, above, best, sample, vocab, num_chunks, CHUNKS)
            threshold = _threshold(digits, totals, sample, limit, number, samples, num_chunks, CHUNKS)
        _add_up(
            logits, rows, temperature, digits, totals, sample, chunk, threshold, best, stride, vocab, number,
            samples, num_chunks, True, CHUNK, TILE,
        )  # fmt: skip


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_PER_SAMPLE)
def _weigh_kernel(
    logits, rows, temperature, top_k, top_p, min_p, bests, k_digits, k_totals, k_floors, above, p_digits,
    p_totals, floors, weights, stride, vocab, samples, num_chunks,
    PASSES: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """floors [S]: key of the smallest logit that all filters keep; weights [S, chunks] float64: of the tokens
    from there on."""
    sample, chunk = tl.program_id(0), tl.program_id(1)
    best = _largest(bests, sample, num_chunks, CHUNKS)
    floor = tl.full((), _LOWEST, tl.int32)
    if top_k is not None:
        floor = _k_floor(top_k, k_digits, k_totals, sample, vocab, samples, num_chunks, PASSES, CHUNKS)
    if top_p is not None:  # noqa: SIM102 (known when the kernel is compiled; the other is not)
        if tl.load(top_p + sample) < 1.0:
            limit = _mass_limit(top_k, top_p, k_floors, above, best, sample, vocab, num_chunks, CHUNKS)
            found = _threshold(p_digits, p_totals, sample, limit, PASSES, samples, num_chunks, CHUNKS)
            floor = tl.maximum(floor, _as_key(found))
    if min_p is not None:
        share = tl.load(min_p + sample)
        if share > 0.0:
            floor = tl.maximum(floor, _key((best.to(tl.float64) + tl.log(share)).to(tl.float32)))
    floor = tl.minimum(floor, _key(best))  # the likeliest is always kept
    if chunk == 0:
        tl.store(floors + sample, floor)
    index = chunk * CHUNK + tl.arange(0, CHUNK)
    x = _scaled(logits, rows, temperature, sample, index, stride, vocab)
    weight = tl.where(_key(x) >= floor, tl.exp(x - best), 0.0)
    tl.store(weights + sample * num_chunks + chunk, tl.sum(weight.to(tl.float64)))


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_PER_SAMPLE)
def _pick_kernel(
    logits, rows, temperature, unit, bests, floors, weights, out, stride, vocab, num_chunks,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """The first token whose cumulative weight exceeds `unit` of the whole: first its chunk, then itself."""
    sample = tl.program_id(0)
    chunk = tl.arange(0, CHUNKS)
    held = tl.load(weights + sample * num_chunks + chunk, mask=chunk < num_chunks, other=0.0)
    whole = tl.sum(held)
    target = tl.load(unit + sample) * whole
    # Rounding may leave the target beyond the end: then it is the last one of any weight, here and below.
    chosen = tl.min(tl.where((tl.cumsum(held) > target) & (held > 0.0), chunk, _LAST))
    chosen = tl.maximum(tl.minimum(chosen, tl.max(tl.where(held > 0.0, chunk, 0))), 0)
    before = tl.sum(tl.where(chunk < chosen, held, 0.0))
    index = chosen * CHUNK + tl.arange(0, CHUNK)
    x = _scaled(logits, rows, temperature, sample, index, stride, vocab)
    best = _largest(bests, sample, num_chunks, CHUNKS)
    weight = tl.where(_key(x) >= tl.load(floors + sample), tl.exp(x - best), 0.0).to(tl.float64)
    over = (before + tl.cumsum(weight) > target) & (weight > 0.0)
    token = tl.min(tl.where(over, index, _LAST))
    token = tl.minimum(token, tl.max(tl.where(weight > 0.0, index, 0)))
    token = tl.where((whole > 0.0) & (whole < float("inf")), token, -1)
    tl.store(out + sample, token.to(out.dtype.element_ty))


def draw(
    logits: torch.Tensor,
    rows: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
    min_p: torch.Tensor | None,
    unit: torch.Tensor,
    out: torch.Tensor,
) -> torch.Tensor:
    """For each sample the token at `unit` of the distribution that its parameters leave; returns `out`.

    logits [R, V] float32, which may be -inf; rows [S] int32 or int64: the row of each sample. temperature [S]
    float32, above 0; top_k [S] int32, off at 0 and from V on; top_p [S] float64, off from 1 on; min_p [S]
    float64, off at 0; each of the three may be None where no sample has it, which changes no token. unit [S]
    float64 in [0, 1). out [S] int32 or int64: -1 for a row without a finite logit, any number for a row that
    holds NaN or infinity. Temperature comes first, then top-k, top-p, min-p; tokens that tie with the last
    one kept are kept.
    """
    samples, vocab = len(rows), logits.shape[1]
    chunk, _, num_warps = config(vocab)
    num_chunks = triton.cdiv(vocab, chunk)
    chunks = triton.next_power_of_2(num_chunks)
    grid, sizes = (samples, num_chunks), (logits.stride(0), vocab, samples, num_chunks)
    options = {"CHUNK": chunk, "num_warps": num_warps, "num_stages": 1}
    given = (logits, rows, temperature)
    bests = torch.empty(grid, dtype=torch.float32, device=logits.device)
    _best_kernel[grid](*given, bests, logits.stride(0), vocab, num_chunks, **options)
    k_search = None if top_k is None else _search_k(*given, top_k)
    p_search = None if top_p is None else _search_p(*given, top_k, top_p, bests, k_search)
    floors = torch.empty(samples, dtype=torch.int32, device=logits.device)
    weights = torch.empty(grid, dtype=torch.float64, device=logits.device)
    _weigh_kernel[grid](
        *given, top_k, top_p, min_p, bests, *(k_search or (None,) * 2), *(p_search or (None,) * 4), floors,
        weights, *sizes, PASSES=PASSES, CHUNKS=chunks, **options,
    )  # fmt: skip
    _pick_kernel[(samples,)](
        *given, unit, bests, floors, weights, out, logits.stride(0), vocab, num_chunks,
        CHUNK=chunk, CHUNKS=chunks, num_warps=PICK_WARPS, num_stages=1,
    )  # fmt: skip
    return out


class _Search(NamedTuple):
    """What the passes of a search leave, as `_threshold` says."""

    digits: torch.Tensor
    totals: torch.Tensor

    @classmethod
    def empty(cls, samples: int, num_chunks: int, device: torch.device) -> _Search:
        digits = torch.empty(PASSES, samples, dtype=torch.int64, device=device)
        return cls(digits, torch.empty(2, samples, num_chunks, 16, dtype=torch.float32, device=device))


class _MassSearch(NamedTuple):
    """For top-p: the floors of top-k and what is above them, then as `_Search`."""

    k_floors: torch.Tensor
    above: torch.Tensor
    digits: torch.Tensor
    totals: torch.Tensor


def _search_k(
    logits: torch.Tensor, rows: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor
) -> _Search:
    """The passes for top-k."""
    samples, vocab = len(rows), logits.shape[1]
    chunk, tile, num_warps = config(vocab)
    num_chunks = triton.cdiv(vocab, chunk)
    found = _Search.empty(samples, num_chunks, logits.device)
    for number in range(PASSES):
        _count_kernel[(samples, num_chunks)](
            logits, rows, temperature, top_k, *found, logits.stride(0), vocab, number, samples, num_chunks,
            CHUNK=chunk, TILE=tile, CHUNKS=triton.next_power_of_2(num_chunks),
            num_warps=num_warps, num_stages=1,
        )  # fmt: skip
    return found


def _search_p(
    logits: torch.Tensor,
    rows: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor,
    bests: torch.Tensor,
    k_search: _Search | None,
) -> _MassSearch:
    """The passes for top-p, among the tokens that top-k keeps."""
    samples, vocab = len(rows), logits.shape[1]
    chunk, tile, num_warps = config(vocab)
    num_chunks = triton.cdiv(vocab, chunk)
    found = _MassSearch(
        torch.empty(samples, dtype=torch.int32, device=logits.device),
        torch.empty(samples, num_chunks, 2, dtype=torch.float64, device=logits.device),
        *_Search.empty(samples, num_chunks, logits.device),
    )
    grid, given = (samples, num_chunks), (logits, rows, temperature, top_k, top_p, bests)
    options = {
        "CHUNK": chunk, "CHUNKS": triton.next_power_of_2(num_chunks), "num_warps": num_warps, "num_stages": 1
    }  # fmt: skip
    _measure_kernel[grid](
        *given, *(k_search or (None, None)), found.k_floors, found.above, logits.stride(0), vocab, samples,
        num_chunks, PASSES=PASSES, **options,
    )  # fmt: skip
    for number in range(PASSES):
        _mass_kernel[grid](
            *given, *found, logits.stride(0), vocab, number, samples, num_chunks, TILE=tile, **options
        )
    return found


def draw_twin(
    logits: torch.Tensor,
    rows: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
    min_p: torch.Tensor | None,
    unit: torch.Tensor,
    out: torch.Tensor,
) -> torch.Tensor:
    """The same by sorting, in float64."""
    scaled = logits[rows.long()] / temperature[:, None]  # [S, V]
    vocab = scaled.shape[-1]
    ordered = scaled.sort(dim=-1, descending=True).values.double()
    rank = torch.arange(vocab, device=scaled.device)
    kept = torch.ones_like(ordered, dtype=torch.bool)
    if top_k is not None:
        kept = rank < torch.where((top_k > 0) & (top_k < vocab), top_k, vocab)[:, None]
    probs = ordered.masked_fill(~kept, -torch.inf).softmax(dim=-1)
    if top_p is not None:
        before = probs.cumsum(dim=-1) - probs
        limit = torch.where(top_p < 1, top_p, torch.inf)[:, None]
        kept = kept & ((before < limit) | (rank == 0))
    floor = ordered.gather(-1, kept.sum(dim=-1, keepdim=True) - 1)  # [S, 1]
    if min_p is not None:
        floor = floor.maximum(ordered[:, :1] + min_p.log()[:, None])
    weights = scaled.masked_fill(scaled < floor.float(), -torch.inf).double().softmax(dim=-1)
    cumulative = weights.cumsum(dim=-1)
    target = (unit * cumulative[:, -1]).nan_to_num()[:, None]
    token = ((cumulative > target) & (weights > 0)).int().argmax(dim=-1)
    finite = torch.isfinite(ordered[:, 0])
    return out.copy_(torch.where(finite, token, -1))


def variants() -> Iterator[Variant]:
    """Vocabularies of 32k to 256k tokens differ in the number of chunks; batches in the filters they have."""
    for vocab in (32000, 128256, 256000):
        yield from _variants_of(vocab)


def _variants_of(vocab: int) -> Iterator[Variant]:
    chunk, tile, num_warps = config(vocab)
    num_chunks = triton.cdiv(vocab, chunk)
    integers = {"stride": "i32:16", "vocab": "i32:16", "samples": "i32", "number": "i32"}
    integers["num_chunks"] = "i32:16" if num_chunks % 16 == 0 else "i32"
    pointers = {
        "logits": "*fp32", "values": "*fp32", "indices": "*i32", "rows": "*i32:1", "temperature": "*fp32:1",
        "top_k": "*i32:1", "top_p": "*fp64:1", "min_p": "*fp64:1", "unit": "*fp64:1", "out": "*i64:1",
        "bests": "*fp32",
        "digits": "*i64", "totals": "*fp32", "k_digits": "*i64", "k_totals": "*fp32", "k_floors": "*i32",
        "above": "*fp64", "p_digits": "*i64", "p_totals": "*fp32", "floors": "*i32", "weights": "*fp64",
    }  # fmt: skip
    constants = {
        "CHUNK": chunk, "TILE": tile, "CHUNKS": triton.next_power_of_2(num_chunks), "PASSES": PASSES
    }  # fmt: skip
    filters = {"top_k", "top_p", "min_p", "k_digits", "k_totals", "k_floors", "above", "p_digits", "p_totals"}

    def variant(kernel: triton.JITFunction, name: str, absent: set[str], warps: int = num_warps) -> Variant:
        arguments = [argument for argument in kernel.arg_names if argument not in absent]
        types = {**pointers, **integers}
        signature = {argument: types[argument] for argument in arguments if argument in types}
        constexprs = {argument: constants[argument] for argument in arguments if argument in constants}
        missing = {argument: None for argument in kernel.arg_names if argument in absent}
        return Variant(kernel, f"V{vocab}{name}", signature, {**constexprs, **missing}, warps, num_stages=1)

    yield variant(_argmax_chunk_kernel, "", set())
    yield variant(_argmax_row_kernel, "", set(), 1)
    yield variant(_best_kernel, "", set())
    yield variant(_count_kernel, "", set())
    yield variant(_pick_kernel, "", set(), PICK_WARPS)
    no_k = {"top_k", "k_digits", "k_totals"}
    for kernel in (_measure_kernel, _mass_kernel):
        yield variant(kernel, "", set())
        yield variant(kernel, " without top-k", no_k)
    yield variant(_weigh_kernel, "", set())
    yield variant(_weigh_kernel, " without filters", filters)
