"""The byte and flop account: by hand, against a count of what the kernels read, and as laws."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gqa_serve.workbench.cost_tables import LLAMA_3_8B, TABLES
from gqa_serve.workbench.hardware import A100, GPUS, H100
from gqa_serve.workbench.kernel_cost import (
    BF16,
    FP8,
    INT4,
    INT8,
    KV_BF16,
    KV_FP8,
    SPLIT,
    WEIGHTS,
    Cost,
    Formats,
    Heads,
    decode_attention,
    linear,
    prefill_attention,
    prefill_tokens_per_tile,
    product_splits,
    sample,
)
from gqa_serve.workbench.step_cost import decode_step, kv_bytes, step, weight_bytes

SOME = settings(max_examples=60, deadline=None)

heads = st.builds(
    lambda kv, group, dim: Heads(kv * group, kv, dim),
    st.integers(1, 8),
    st.sampled_from([1, 3, 4, 8]),
    st.sampled_from([64, 80, 128, 256]),
)
windows = st.none() | st.integers(1, 3000)
context_lens = st.lists(st.integers(1, 5000), min_size=1, max_size=4)
formats = st.builds(
    Formats,
    st.sampled_from(WEIGHTS),
    kv=st.sampled_from([KV_BF16, KV_FP8]),
    block_size=st.sampled_from([16, 64]),
)


def test_one_decode_step_of_llama_3_8b_by_hand() -> None:
    """Batch 1, context 2,048, bf16: every number below was worked out with pencil from the shapes."""
    cost = decode_step(LLAMA_3_8B, 1, 2048)

    # K and V: 2 * 8 heads * 128 numbers * 2 bytes = 4,096 bytes a token; 2,048 tokens; 128 ids; q and out.
    # The kernel: 8 splits, so q 7 times more and the ids for 7 heads more (from L2), and 8 partial results of
    # 32 heads * (128 + 2) float32, written and read.
    attention = cost.parts["decode attention"]
    assert attention.must_bytes == 32 * (8_388_608 + 512 + 16_384)
    assert attention.cached_bytes == 32 * (7 * 8_192 + 7 * 512)
    assert attention.moved_bytes == attention.must_bytes + attention.cached_bytes + 32 * 2 * 8 * 16_640
    assert attention.flops == 32 * 33_554_432  # 4 * 32 heads * 128 * 2,048

    assert cost.parts["qkv"].must_bytes == 32 * (50_331_648 + 8_192 + 12_288)  # 4096 -> 6144
    assert cost.parts["o"].must_bytes == 32 * (33_554_432 + 8_192 + 8_192)  # 4096 -> 4096
    assert cost.parts["gate, up"].must_bytes == 32 * (234_881_024 + 8_192 + 57_344)  # 4096 -> 28672
    assert cost.parts["down"].must_bytes == 32 * (117_440_512 + 28_672 + 8_192)  # 14336 -> 4096
    assert cost.parts["gated activation"].must_bytes == 32 * 86_016  # 3 * 14336 * 2
    assert cost.parts["norms"].must_bytes == 64 * (32_768 + 16_384)  # 4 * 4096 * 2, and weights in float32
    assert cost.parts["first norm"].must_bytes == 16_384 + 16_384
    # 48 heads read, 32 written, 2 * 8 into the cache, all of 256 bytes; 2 * 128 angles; a slot.
    assert cost.parts["rotate, write"].must_bytes == 32 * (48 * 256 + 32 * 256 + 4_096 + 1_024 + 4)
    assert cost.parts["embed"].must_bytes == 16_384 + 4
    assert (
        cost.parts["logits"].must_bytes == 1_050_673_152 + 8_192 + 513_024
    )  # 128256 * 4096 * 2, float32 out
    assert cost.parts["logits"].moved_bytes == cost.parts["logits"].must_bytes + 2 * 256_512  # widened
    assert cost.parts["sample"].must_bytes == 513_024 + 4

    assert (
        weight_bytes(LLAMA_3_8B) == 2 * 8_029_995_008
    )  # the checkpoint's 8,030,261,248 less 65 norms of 4096
    assert kv_bytes(LLAMA_3_8B, 1) == 131_072
    assert cost.parts["qkv"].flops == 32 * 50_331_648
    assert cost.seconds(H100) == pytest.approx(4.57e-3, rel=2e-3)  # 15.3 GB at 3.35 TB/s


@SOME
@given(heads, st.lists(st.tuples(st.integers(1, 2000), windows), min_size=1, max_size=3), formats)
def test_decode_attention_counts_what_its_items_read(
    shape: Heads, requests: list[tuple[int, int | None]], held: Formats
) -> None:
    """Against a walk over items and tokens, as the kernel does it."""
    for context_len, window in requests:
        low = 0 if window is None else max(0, context_len - window)
        tokens = range(low, context_len)
        splits = {token // SPLIT for token in tokens}
        blocks = {token // held.block_size for token in tokens}
        row = shape.num_heads * shape.head_dim * held.activation_bytes
        kv_bytes_read = len(tokens) * held.kv.bytes_per_token(shape.num_kv_heads, shape.head_dim)
        partials = 0 if len(splits) == 1 else len(splits) * shape.num_heads * (shape.head_dim + 2) * 4
        cost = decode_attention(shape, [context_len], held, window)
        assert cost.must_bytes == kv_bytes_read + 4 * len(blocks) + 2 * row
        assert cost.moved_bytes == (
            kv_bytes_read + 4 * len(blocks) * shape.num_kv_heads + (len(splits) + 1) * row + 2 * partials
        )
        assert cost.flops == 4 * shape.num_heads * shape.head_dim * len(tokens)


@SOME
@given(heads, st.integers(1, 700), st.integers(0, 1500), windows, formats)
def test_prefill_attention_counts_what_its_tiles_read(
    shape: Heads, query_len: int, computed: int, window: int | None, held: Formats
) -> None:
    """Against a walk over tiles and the tokens that each query sees."""

    def seen(token: int) -> range:
        end = computed + token + 1
        return range(0 if window is None else max(0, end - window), end)

    tile = prefill_tokens_per_tile(shape, held.kv)
    row = shape.num_heads * shape.head_dim * held.activation_bytes
    token_bytes = held.kv.bytes_per_token(shape.num_kv_heads, shape.head_dim)
    moved = 2 * query_len * row
    for start in range(0, query_len, tile):
        last = min(start + tile, query_len) - 1
        tokens = range(seen(start).start, seen(last).stop)
        blocks = tokens[-1] // held.block_size - tokens[0] // held.block_size + 1
        moved += len(tokens) * token_bytes + 4 * blocks * shape.num_kv_heads
    cost = prefill_attention(shape, [(query_len, computed + query_len)], held, window)
    assert cost.moved_bytes == moved
    assert cost.flops == 4 * shape.num_heads * shape.head_dim * sum(len(seen(t)) for t in range(query_len))
    read_once = range(seen(0).start, computed + query_len)
    blocks = read_once[-1] // held.block_size - read_once[0] // held.block_size + 1
    assert cost.must_bytes == len(read_once) * token_bytes + 4 * blocks + 2 * query_len * row
    assert cost.must_bytes == cost.moved_bytes - cost.cached_bytes


@SOME
@given(heads, context_lens, windows, formats, st.integers(1, 2000))
def test_more_context_never_costs_less(
    shape: Heads, lens: list[int], window: int | None, held: Formats, more: int
) -> None:
    less = decode_attention(shape, lens, held, window)
    grown = decode_attention(shape, [lens[0] + more, *lens[1:]], held, window)
    longer = decode_attention(shape, [*lens, more], held, window)
    if window is None:
        assert grown.must_bytes > less.must_bytes
        assert grown.moved_bytes > less.moved_bytes
        assert grown.flops > less.flops
    else:
        assert grown.flops >= less.flops
    assert longer.must_bytes > less.must_bytes
    assert longer.moved_bytes > less.moved_bytes


@SOME
@given(st.sampled_from([1, 2, 4, 8, 16, 32]), st.integers(1, 20_000), formats)
def test_grouping_divides_kv_bytes_by_the_group_size(num_kv_heads: int, tokens: int, held: Formats) -> None:
    mha = replace(LLAMA_3_8B, num_kv_heads=32)
    gqa = replace(LLAMA_3_8B, num_kv_heads=num_kv_heads)
    assert kv_bytes(mha, tokens, held) == gqa.group_size * kv_bytes(gqa, tokens, held)
    if held.kv is KV_BF16:
        assert kv_bytes(gqa, 1, held) == gqa.kv_bytes_per_token(2)


@SOME
@given(st.lists(st.tuples(st.integers(1, 300), st.integers(0, 600)), min_size=1, max_size=4), formats)
def test_a_step_is_the_sum_of_its_parts(lens: list[tuple[int, int]], held: Formats) -> None:
    cost = step(LLAMA_3_8B, [(new, new + computed) for new, computed in lens], held)
    for gpu in GPUS:
        assert cost.seconds(gpu) == pytest.approx(sum(part.seconds(gpu) for part in cost.parts.values()))
    assert cost.must_bytes == sum(part.must_bytes for part in cost.parts.values())
    assert cost.moved_bytes == sum(part.moved_bytes for part in cost.parts.values())
    assert cost.flops == sum(part.flops for part in cost.parts.values())
    for name, part in cost.parts.items():
        assert part.must_bytes <= part.moved_bytes - part.cached_bytes, name


@SOME
@given(st.integers(2, 600), st.data())
def test_chunks_of_a_prompt_compute_what_the_whole_prompt_does(length: int, data: st.DataObject) -> None:
    cut = data.draw(st.integers(1, length - 1))
    shape = Heads.of(LLAMA_3_8B)
    window = data.draw(windows)
    whole = prefill_attention(shape, [(length, length)], window=window).flops
    parts = [(cut, cut), (length - cut, length)]
    assert whole == sum(prefill_attention(shape, [part], window=window).flops for part in parts)


def test_layers_with_windows_are_parts_of_their_own() -> None:
    config = replace(LLAMA_3_8B, windows=(512, None) * 16)
    parts = step(config, [(1, 2048), (64, 2048)]).parts
    assert {name for name in parts if "attention" in name} == {
        "decode attention",
        "decode attention, window 512",
        "prefill attention",
        "prefill attention, window 512",
    }
    ratio = parts["decode attention"].flops / parts["decode attention, window 512"].flops
    assert ratio == 2048 / 512


def test_time_is_bound_by_memory_or_by_arithmetic() -> None:
    small, large = linear(1, 4096, 4096), linear(4096, 4096, 4096)
    assert small.seconds(A100) == small.moved_bytes / A100.bandwidth
    assert large.seconds(A100) == large.flops / A100.bf16_flops
    cached = Cost(must_bytes=10, moved_bytes=30, flops=0, cached_bytes=20)
    assert cached.seconds(H100) == 10 / H100.bandwidth


def test_passes_over_logits() -> None:
    """As the module of the sampling kernels counts them."""
    row = 4 * 128_256

    def passes(**how: bool) -> float:
        return (sample(1, 128_256, **how).moved_bytes - 4) / row

    assert passes() == 1
    assert passes(draw=True) == 2
    assert passes(draw=True, top_k=True) == 2 + 8
    assert passes(draw=True, top_p=True) == 2 + 9
    assert passes(draw=True, top_k=True, top_p=True) == 2 + 8 + 9


def test_weight_formats() -> None:
    assert BF16.matrix_bytes(4096, 4096) == 2 * 4096 * 4096
    assert FP8.matrix_bytes(4096, 4096) == 4096 * 4096 + 4 * 4096  # a float32 per output
    assert INT8.matrix_bytes(4096, 4096) == 4096 * 4096 + 2 * 32 * 4096  # two bytes per 128 inputs
    assert INT4.matrix_bytes(4096, 4096) == 4096 * 4096 // 2 + 4 * 128 * 4096  # scale and minimum per 32
    assert Formats.quantized(INT4).head is INT8
    tied = replace(LLAMA_3_8B, tie_embeddings=True)
    difference = weight_bytes(LLAMA_3_8B) - weight_bytes(tied)
    assert difference == 128_256 * 4096 * 2
    assert product_splits(1, 4096, 4096, BF16) == 1
    assert linear(1, 4096, 4096, weights=FP8).seconds(A100) < linear(1, 4096, 4096).seconds(A100)
    assert linear(4096, 4096, 4096, weights=FP8).seconds(H100) < linear(4096, 4096, 4096).seconds(H100)


def test_the_document_shows_these_tables() -> None:
    document = Path(__file__).parents[2].joinpath("docs", "cuda.md").read_text(encoding="utf-8")
    for title, table in TABLES.items():
        assert table() in document, f"{title}: run `python -m gqa_serve.workbench.cost_tables`"


def test_the_account_and_the_kernels_cut_work_alike() -> None:
    pytest.importorskip("triton")
    from gqa_serve.engine.kernels.triton import decode_attention as decode
    from gqa_serve.engine.kernels.triton import prefill_attention as prefill
    from gqa_serve.engine.kernels.triton import quantized_linear as quantized

    assert SPLIT == decode.SPLIT
    for kv in (KV_BF16, KV_FP8):
        for group_size in (1, 3, 4, 7, 8, 16):
            for head_dim in (64, 80, 96, 128, 256):
                expected = prefill.tokens_per_tile(group_size, head_dim, kv.element_bytes, False)
                assert prefill_tokens_per_tile(Heads(group_size, 1, head_dim), kv) == expected
    for weights in (INT8, INT4):
        for rows in (1, 16, 64, 65, 256):
            for inputs, outputs in ((4096, 4096), (4096, 28_672), (14_336, 4096), (2048, 256)):
                steps = inputs // (weights.group_size * 8 // weights.bits)
                tile = quantized.config(
                    rows=rows,
                    n=outputs,
                    steps=steps,
                    width=weights.group_size,
                    bits=weights.bits,
                    itemsize=2,
                    deterministic=False,
                )
                assert product_splits(rows, inputs, outputs, weights) == tile.splits
