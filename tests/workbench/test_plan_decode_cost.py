"""The lines of a decode step against the account step by step, and as laws."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gqa_serve.engine.model_config import ModelConfig
from gqa_serve.workbench.cost_tables import LLAMA_3_8B
from gqa_serve.workbench.hardware import A100, B200, H100, L4, Hardware
from gqa_serve.workbench.kernel_cost import (
    BF16,
    FP8,
    INT4,
    INT8,
    KV_BF16,
    KV_FLOAT32,
    KV_FP8,
    KV_INT8,
    Formats,
)
from gqa_serve.workbench.plan.answer import batch_ladder
from gqa_serve.workbench.plan.decode_cost import LINEAR, DecodeCost
from gqa_serve.workbench.sharding import local_config
from gqa_serve.workbench.step_cost import decode_step, kv_bytes, weight_bytes

SOME = settings(max_examples=40, deadline=None)
SLOW_CHIP = Hardware("a CPU", 64e9, 2e10, 1e11, 5e11, None, is_cpu=True, int8_flops=4e11)
FAST_MEMORY = Hardware("all memory", 64e9, 1e15, 1e12, 1e12, None, 1e11)

configs = st.builds(
    lambda group, kv, layers, dim, hidden, inner, vocab, windowed, tied, bias: replace(
        LLAMA_3_8B,
        num_heads=group * kv,
        num_kv_heads=kv,
        num_layers=layers,
        head_dim=dim,
        hidden_size=hidden,
        intermediate_size=inner,
        vocab_size=vocab,
        windows=((windowed, None) * layers)[:layers],
        ropes=(LLAMA_3_8B.ropes[0],) * layers,
        tie_embeddings=tied,
        qkv_bias=bias,
    ),
    st.sampled_from([1, 2, 4, 7]),
    st.sampled_from([1, 2, 4, 8]),
    st.integers(1, 6),
    st.sampled_from([64, 128]),
    st.sampled_from([256, 1024, 4096]),
    st.sampled_from([512, 4096]),
    st.sampled_from([1000, 32_000]),
    st.none() | st.integers(1, 3000),
    st.booleans(),
    st.booleans(),
)
formats = st.builds(
    Formats,
    st.sampled_from([BF16, FP8, INT8, INT4]),
    kv=st.sampled_from([KV_BF16, KV_FP8, KV_INT8, KV_FLOAT32]),
    activation_bytes=st.sampled_from([0, 2, 4]),
)
hardware = st.sampled_from([A100, H100, B200, L4, SLOW_CHIP, FAST_MEMORY])


@SOME
@given(configs, formats, hardware, st.integers(1, 5000), st.integers(1, 300), st.booleans())
def test_lines_are_the_account(
    config: ModelConfig, held: Formats, device: Hardware, context_len: int, batch: int, post: bool
) -> None:
    """At every batch: bytes, operations and time of `decode_step`, part by part."""
    lines = DecodeCost(config, context_len, held, device, post_norms=post)
    cost = decode_step(config, batch, context_len, held, post_norms=post)
    assert lines.lines.keys() == cost.parts.keys()
    for name, part in cost.parts.items():
        assert lines.lines[name].bytes_at(batch) == part.must_bytes, name
        assert lines.lines[name].flops_at(batch) == part.flops, name
    assert lines.seconds(batch) == pytest.approx(cost.least_seconds(device))
    assert lines.memory_seconds(batch) == pytest.approx(cost.must_bytes / device.bandwidth)
    assert lines.seconds(batch) <= cost.seconds(device) * (1 + 1e-12)


@SOME
@given(configs, formats, hardware, st.integers(1, 5000), st.booleans())
def test_the_crossover_is_the_first_batch_that_trying_all_finds(
    config: ModelConfig, held: Formats, device: Hardware, context_len: int, only_linear: bool
) -> None:
    """Against the account at each batch, from its totals alone."""
    lines = DecodeCost(config, context_len, held, device)
    parts = LINEAR if only_linear else None
    one, two = (decode_step(config, batch, context_len, held).parts for batch in (1, 2))
    names = list(parts or one)

    def at(batch: int) -> float:
        """Arithmetic less memory, each part grown by what its second request added."""
        compute = memory = 0.0
        for name in names:
            flops = one[name].flops + (batch - 1) * (two[name].flops - one[name].flops)
            moved = one[name].must_bytes + (batch - 1) * (two[name].must_bytes - one[name].must_bytes)
            compute += flops / device.peak(one[name].precision)
            memory += moved / device.bandwidth
        return compute - memory

    found = lines.compute_bound_from(parts)
    tried = next((batch for batch in range(1, 3000) if at(batch) >= 0), None)
    if tried is not None:
        assert found is not None
        assert found in (tried, tried + 1) if abs(at(tried)) < 1e-15 else found == tried
    elif found is None:
        assert at(10**7) < 0
        assert at(10**7) <= at(10**6)
    else:
        assert found >= 3000
        assert at(found - 1) < 0 <= at(found + 1)


def test_the_crossover_step_by_step() -> None:
    """A full walk with real steps: a small model whose whole step turns within the walk."""
    config = replace(
        LLAMA_3_8B, num_layers=2, windows=(None,) * 2, ropes=LLAMA_3_8B.ropes[:2], num_kv_heads=1
    )
    lines = DecodeCost(config, 64, Formats(), H100)
    turned = [
        batch
        for batch in range(1, 700)
        if sum(
            part.flops / H100.peak(part.precision)
            for part in decode_step(config, batch, 64, Formats()).parts.values()
        )
        >= decode_step(config, batch, 64, Formats()).must_bytes / H100.bandwidth
    ]
    assert turned
    assert lines.compute_bound_from() == turned[0]
    assert turned == list(range(turned[0], 700))


def test_attention_never_turns_where_a_group_is_small() -> None:
    """2 G / bytes operations per byte of K and V: 4 for Llama 3 8B in bf16, on a GPU that needs 295."""
    lines = DecodeCost(LLAMA_3_8B, 8192, Formats(), H100)
    assert lines.intensity(lines.attention, 1) == pytest.approx(4, rel=0.01)
    assert lines.compute_bound_from(lines.attention) is None
    assert lines.compute_bound_from() is None
    fast = DecodeCost(LLAMA_3_8B, 8192, Formats(), FAST_MEMORY)
    assert fast.compute_bound_from(fast.attention) == 1


@SOME
@given(configs, formats, hardware, st.integers(1, 5000), st.integers(1, 2000))
def test_more_requests_take_longer_and_give_more(
    config: ModelConfig, held: Formats, device: Hardware, context_len: int, batch: int
) -> None:
    lines = DecodeCost(config, context_len, held, device)
    assert lines.seconds(batch) < lines.seconds(batch + 1)
    rate, more = batch / lines.seconds(batch), (batch + 1) / lines.seconds(batch + 1)
    assert rate <= more * (1 + 1e-12)  # equal where all is bound by arithmetic


@SOME
@given(configs, formats, hardware, st.integers(1, 5000), st.integers(1, 100))
def test_fewer_kv_heads_never_take_longer(
    config: ModelConfig, held: Formats, device: Hardware, context_len: int, batch: int
) -> None:
    counts = [count for count in range(1, config.num_heads + 1) if config.num_heads % count == 0]
    variants = [
        DecodeCost(replace(config, num_kv_heads=count), context_len, held, device) for count in counts
    ]
    times = [lines.seconds(batch) for lines in variants]
    assert times == sorted(times)
    for count, lines in zip(counts, variants, strict=True):
        assert lines.read_bytes_per_request == count * variants[0].read_bytes_per_request


@SOME
@given(st.sampled_from([1, 2, 4, 8]), formats, st.integers(1, 5000), st.integers(1, 100))
def test_ranks_together_read_what_one_would(ranks: int, held: Formats, context_len: int, batch: int) -> None:
    whole = DecodeCost(LLAMA_3_8B, context_len, held, H100)
    rank = DecodeCost(LLAMA_3_8B, context_len, held, H100, ranks)
    assert rank.read_bytes_per_request * ranks == whole.read_bytes_per_request
    if held.weights is BF16:
        assert rank.read_weight_bytes * ranks == whole.read_weight_bytes
    local = local_config(LLAMA_3_8B, ranks)
    assert kv_bytes(local, 7, held) * ranks == kv_bytes(LLAMA_3_8B, 7, held)
    if held.weights is BF16:
        assert weight_bytes(local, held) * ranks == weight_bytes(LLAMA_3_8B, held)
    assert rank.seconds(batch) >= whole.seconds(batch) / ranks * (1 - 1e-9)


@pytest.mark.parametrize(
    ("most", "ladder"), [(0, [1]), (1, [1]), (2, [1, 2]), (5, [1, 2, 4, 5]), (8, [1, 2, 4, 8])]
)
def test_the_ladder_of_batches(most: int, ladder: list[int]) -> None:
    assert batch_ladder(most) == ladder
