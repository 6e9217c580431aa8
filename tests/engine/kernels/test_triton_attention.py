"""Attention kernels in Triton, interpreted, against their twins and against float64."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from paged_layer import Paged, paged

from gqa_serve.engine.backends.cuda_step import StepArrays, StepTensors
from gqa_serve.engine.kernels.triton import decode_attention as decode
from gqa_serve.engine.kernels.triton import prefill_attention as prefill
from gqa_serve.engine.kernels.triton.decode_attention import Partials, Scores

FORMATS = {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}


class _Layout:
    """What StepTensors reads of an AttentionLayout."""

    def __init__(self, window: int | None) -> None:
        self.windows = (window,)


def oracle(case: Paged, q: torch.Tensor, scores: Scores) -> torch.Tensor:
    """Attention of all new tokens, [T, H, D] float64: grouped heads by repeating K and V."""
    result, token = [], 0
    for request, row in enumerate(case.plan.rows):
        k, v = (case.context(request, name) for name in ("k", "v"))
        group = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))  # [context, H, D]
        for position in range(row.start, row.start + len(row.token_ids)):
            first = 0 if scores.window is None else max(0, position + 1 - scores.window)
            s = torch.einsum("hd,nhd->hn", q[token].double(), k[first : position + 1]) * scores.scale
            if scores.soft_cap is not None:
                s = torch.tanh(s / scores.soft_cap) * scores.soft_cap
            result.append(torch.einsum("hn,nhd->hd", s.softmax(-1), v[first : position + 1]))
            token += 1
    return torch.stack(result)


def attend(
    case: Paged, q: torch.Tensor, scores: Scores, *, exact: bool, twin: bool, programs: int = 3
) -> torch.Tensor:
    """Both kernels over a step, as the backend calls them; rows that nobody writes stay NaN."""
    num_kv_heads, block_size, head_dim = case.kv.k.shape[1:]
    group = q.shape[1] // num_kv_heads
    tile_tokens = prefill.tokens_per_tile(group, head_dim, case.kv.k.element_size(), exact)
    arrays = StepArrays.from_plan(case.plan, block_size, [scores.window], tile_tokens)
    tensors = {name: torch.from_numpy(array).to(q.device) for name, array in arrays.regions.items()}
    step = StepTensors.of(tensors, _Layout(scores.window))
    out = torch.full_like(q, torch.nan)
    if step.splits is not None:
        room = len(step.splits[0].requests)
        partials = Partials.allocate(room, num_kv_heads, group, head_dim, q.device)
        for part in partials:
            part.fill_(torch.nan)
        run = decode.decode_attention_twin if twin else decode.decode_attention
        run(q, case.kv, step.blocks, step.splits[0], scores, out, partials, programs)
    if step.chunks is not None:
        run = prefill.prefill_attention_twin if twin else prefill.prefill_attention
        run(q, case.kv, step.blocks, step.chunks, scores, out, exact)
    return out


def queries(case: Paged, group: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    _, num_kv_heads, _, head_dim = case.kv.k.shape
    generator = torch.Generator().manual_seed(seed)
    tokens = case.plan.num_tokens
    return torch.randn(tokens, num_kv_heads * group, head_dim, generator=generator).to(dtype)


def check(
    lens: Sequence[tuple[int, int]],
    *,
    group: int = 3,
    num_kv_heads: int = 2,
    head_dim: int = 64,
    block_size: int = 16,
    form: str = "float32",
    window: int | None = None,
    soft_cap: float | None = None,
    exact: bool = False,
) -> None:
    """Kernel and twin against float64."""
    case = paged(
        lens, num_kv_heads=num_kv_heads, head_dim=head_dim, block_size=block_size, dtype=FORMATS[form]
    )
    q = queries(case, group, torch.float16 if form == "float16" else torch.float32)
    scores = Scores(head_dim**-0.5, soft_cap, window)
    expected = oracle(case, q, scores)
    for twin in (False, True):
        tolerance = 4e-3 if form == "float16" else 2e-5
        result = attend(case, q, scores, exact=exact, twin=twin).double()
        torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)


DECODE = [(0, 1), (6, 1), (63, 1), (64, 1), (255, 1), (256, 1), (700, 1)]
CHUNKS = [(0, 5), (0, 70), (30, 40), (250, 12), (0, 2)]


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 7, 8, 16, 20])
def test_group_sizes(group: int) -> None:
    check([(70, 1), (300, 1), (10, 9), (250, 10)], group=group)


@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 256])
def test_head_dims(head_dim: int) -> None:
    check([(40, 1), (300, 1), (33, 20)], head_dim=head_dim, num_kv_heads=1)


@pytest.mark.parametrize(("num_kv_heads", "block_size"), [(1, 16), (3, 32), (2, 64), (2, 1), (4, 128)])
def test_kv_heads_and_block_sizes(num_kv_heads: int, block_size: int) -> None:
    check([(70, 1), (260, 1), (60, 9)], num_kv_heads=num_kv_heads, block_size=block_size)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("lens", [DECODE, CHUNKS], ids=["decode", "chunks"])
def test_kv_formats(form: str, lens: list[tuple[int, int]]) -> None:
    check(lens, form=form)


@pytest.mark.parametrize("window", [1, 64, 100, 300])
@pytest.mark.parametrize("exact", [False, True])
def test_windows(window: int, exact: bool) -> None:
    check([(255, 1), (700, 1), (0, 30), (250, 12)], window=window, exact=exact)


@pytest.mark.parametrize("form", ["float32", "int8"])
def test_soft_cap(form: str) -> None:
    check([(70, 1), (300, 1), (10, 9)], soft_cap=3.0, form=form, window=50)


def test_a_window_does_not_read_outside_itself() -> None:
    """Blocks before the window may have been given away: their ids are out of bounds here."""
    case = paged([(600, 1), (500, 8)], num_kv_heads=1, head_dim=32, block_size=16)
    scores = Scores(0.2, None, 40)
    q = queries(case, 2, torch.float32)
    expected = attend(case, q, scores, exact=False, twin=False)
    for row in case.plan.rows:
        kept = (row.start + 1 - 40) // 16
        case.kv.k[row.block_ids[:kept]] = torch.nan
        case.kv.v[row.block_ids[:kept]] = torch.nan
    assert torch.equal(attend(case, q, scores, exact=False, twin=False), expected)


@pytest.mark.usefixtures("ordered_dot")
@pytest.mark.parametrize("window", [None, 90])
@pytest.mark.parametrize("group", [3, 20])
def test_exact_chunks_have_the_bytes_of_decoding(group: int, window: int | None) -> None:
    """A prompt in one chunk, in several, and token by token."""
    computed, length, head_dim = 238, 36, 32
    scores = Scores(head_dim**-0.5, None, window)
    whole = paged([(computed, length)], num_kv_heads=1, head_dim=head_dim, block_size=16)
    q = queries(whole, group, torch.float32)
    expected = attend(whole, q, scores, exact=True, twin=False)
    (row,) = whole.plan.rows
    cuts = [0, 1, 12, 18, 19, length]  # 18: a split ends at position 256
    for begin, end in itertools.pairwise(cuts):
        row.start, row.token_ids = computed + begin, [1] * (end - begin)
        part = attend(whole, q[begin:end], scores, exact=True, twin=False, programs=1 + begin % 2)
        assert torch.equal(part, expected[begin:end])


@pytest.mark.usefixtures("ordered_dot")
def test_neighbours_do_not_change_a_byte() -> None:
    lens = [(300, 1), (17, 1), (90, 30), (600, 1)]
    scores = Scores(0.3, None, None)
    case = paged(lens, num_kv_heads=2, head_dim=32, block_size=16)
    q = queries(case, 3, torch.float32)
    together = attend(case, q, scores, exact=False, twin=False)
    rows, begin = list(case.plan.rows), 0
    for row in rows:
        end = begin + len(row.token_ids)
        case.plan.rows = [row]
        alone = attend(case, q[begin:end], scores, exact=False, twin=False, programs=1)
        assert torch.equal(alone, together[begin:end])
        begin = end
