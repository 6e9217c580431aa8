"""Shard: the ranks' parts are the whole model, each thing once, and each part a model of whole groups."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gqa_serve.engine.distributed.shard import Shard
from gqa_serve.engine.model_config import ModelConfig
from gqa_serve.errors import ConfigError

BASE = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=1000,
    hidden_size=64,
    num_layers=2,
    num_heads=8,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=128,
    max_model_len=64,
    context_limit=64,
    windows=(None, None),
    ropes=(None, None),
    attention_scale=1.0,
)


@st.composite
def cuts(draw: st.DrawFn) -> list[Shard]:
    kv_heads, group = draw(st.integers(1, 12)), draw(st.integers(1, 9))
    ranks = draw(st.integers(1, kv_heads * group))
    whole = replace(
        BASE,
        num_heads=kv_heads * group,
        num_kv_heads=kv_heads,
        intermediate_size=draw(st.integers(ranks, 3000)),
        vocab_size=draw(st.integers(ranks, 3000)),
    )
    return [Shard(whole, rank, ranks) for rank in range(ranks)]


def covered(parts: list[tuple[int, int]]) -> list[int]:
    return [index for first, end in parts for index in range(first, end)]


@given(cuts())
def test_every_part_of_the_model_is_on_one_rank(shards: list[Shard]) -> None:
    whole = shards[0].whole
    assert covered([shard.heads for shard in shards]) == list(range(whole.num_heads))
    assert covered([shard.inner for shard in shards]) == list(range(whole.intermediate_size))
    assert covered([shard.vocabulary for shard in shards]) == list(range(whole.vocab_size))
    firsts = [shard.kv_heads for shard in shards if shard.is_first_copy]
    assert covered(firsts) == list(range(whole.num_kv_heads))


@given(cuts())
def test_each_query_head_is_with_the_kv_head_it_reads(shards: list[Shard]) -> None:
    for shard in shards:
        assert shard.local.num_heads % shard.local.num_kv_heads == 0
        for index in range(shard.local.num_heads):
            reads = (shard.heads[0] + index) // shard.whole.group_size
            assert reads == shard.kv_heads[0] + index // shard.local.group_size


@given(cuts())
def test_no_rank_is_idle_and_kv_heads_are_copied_only_where_they_must_be(shards: list[Shard]) -> None:
    whole, ranks = shards[0].whole, len(shards)
    for shard in shards:
        local = shard.local
        assert min(local.num_heads, local.num_kv_heads, local.intermediate_size, local.vocab_size) > 0
    held = sum(shard.local.num_kv_heads for shard in shards)
    assert held == max(whole.num_kv_heads, ranks)
    sizes = [shard.local.num_kv_heads for shard in shards]
    assert max(sizes) - min(sizes) <= 1


def test_the_mlp_is_cut_evenly_in_whole_groups_where_that_is_possible() -> None:
    def inner(width: int, ranks: int) -> list[int]:
        whole = replace(BASE, intermediate_size=width)
        parts = [Shard(whole, rank, ranks).inner for rank in range(ranks)]
        return [end - first for first, end in parts]

    assert inner(14336, 4) == [3584] * 4
    assert inner(11008, 4) == [2752] * 4  # of 64
    assert inner(384, 2) == [192, 192]
    assert inner(300, 4) == [75] * 4
    assert inner(32 * 3, 4) == [24] * 4


def test_a_fused_projection_is_cut_part_by_part() -> None:
    shard = Shard(BASE, 1, 2)  # query heads 4 to 7, KV head 1
    assert shard.rows("layers.0.qkv.weight") == ((64, 128), (144, 160), (176, 192))
    assert shard.rows("layers.0.gate_up.weight") == ((64, 128), (192, 256))
    assert shard.columns("layers.0.o.weight") == (64, 128)
    assert shard.columns("layers.0.down.weight") == (64, 128)
    assert shard.rows("layers.0.o.weight") is None
    assert shard.columns("layers.0.qkv.weight") is None
    assert shard.rows("embed.weight") == (shard.vocabulary,)
    assert shard.rows("layers.0.q_norm.weight") is None
    assert Shard(replace(BASE, qk_norm="full"), 1, 2).rows("layers.0.q_norm.weight") == ((64, 128),)


def test_mqa_on_eight_ranks() -> None:
    whole = replace(BASE, num_kv_heads=1)
    locals_ = [Shard(whole, rank, 8).local for rank in range(8)]
    assert {(local.num_heads, local.num_kv_heads) for local in locals_} == {(1, 1)}


@pytest.mark.parametrize("ranks", [0, 9])
def test_more_ranks_than_query_heads_are_refused(ranks: int) -> None:
    with pytest.raises(ConfigError, match=r"8 query heads .* lower --tensor-parallel-size"):
        Shard(BASE, 0, ranks)
