"""What one tensor-parallel rank holds, and how long the ranks need to add up their sums."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gqa_serve.engine.distributed.shard import Shard
from gqa_serve.errors import ConfigError
from gqa_serve.workbench.cost_tables import LLAMA_3_8B
from gqa_serve.workbench.hardware import H100
from gqa_serve.workbench.sharding import all_reduce_seconds, local_config


@given(ranks=st.integers(1, 32), kv_heads=st.sampled_from([1, 2, 4, 8, 16, 32]))
def test_the_busiest_rank_has_the_most_of_each(ranks: int, kv_heads: int) -> None:
    config = replace(LLAMA_3_8B, num_kv_heads=kv_heads)
    local = local_config(config, ranks)
    for rank in range(ranks):
        part = Shard(config, rank, ranks).local
        assert part.num_heads <= local.num_heads
        assert part.num_kv_heads <= local.num_kv_heads
        assert part.intermediate_size <= local.intermediate_size
        assert part.vocab_size <= local.vocab_size
    assert local.num_heads * ranks >= config.num_heads
    assert local.intermediate_size * ranks >= config.intermediate_size
    assert (local.hidden_size, local.windows) == (config.hidden_size, config.windows)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_where_it_divides_all_ranks_are_as_busy(ranks: int) -> None:
    local = local_config(LLAMA_3_8B, ranks)
    assert local.num_heads * ranks == LLAMA_3_8B.num_heads
    assert local.num_kv_heads * ranks == LLAMA_3_8B.num_kv_heads
    assert local.intermediate_size * ranks == LLAMA_3_8B.intermediate_size


def test_three_ranks_of_eight_kv_heads_wait_for_one_with_three() -> None:
    local = local_config(LLAMA_3_8B, 3)
    assert (local.num_heads, local.num_kv_heads) == (12, 3)


def test_one_rank_is_the_model_itself() -> None:
    assert local_config(LLAMA_3_8B, 1) == LLAMA_3_8B
    assert all_reduce_seconds(LLAMA_3_8B, 100, 1, replace(H100, link_bandwidth=None)) == 0


def test_kv_heads_are_copied_when_there_are_more_ranks() -> None:
    assert local_config(LLAMA_3_8B, 4).num_kv_heads == 2
    assert local_config(LLAMA_3_8B, 8).num_kv_heads == 1
    assert local_config(LLAMA_3_8B, 16).num_kv_heads == 1


@pytest.mark.parametrize("ranks", [0, 33])
def test_more_ranks_than_heads_are_refused(ranks: int) -> None:
    with pytest.raises(ConfigError, match=f"32 heads cannot be divided over {ranks} ranks; use 1 to 32"):
        local_config(LLAMA_3_8B, ranks)


def test_activations_that_stay_in_caches_are_sent_all_the_same() -> None:
    cached, sent = (all_reduce_seconds(LLAMA_3_8B, 9, 2, H100, activation_bytes=size) for size in (0, 4))
    assert cached == sent > 0


def test_an_unknown_link_is_told_with_its_cure() -> None:
    with pytest.raises(ConfigError, match="YAML file as --hardware that has link_bandwidth"):
        all_reduce_seconds(LLAMA_3_8B, 1, 2, replace(H100, link_bandwidth=None))


@given(ranks=st.integers(2, 8), size=st.integers(1, 4))
def test_the_ring_sends_what_the_formula_counts(ranks: int, size: int) -> None:
    """Plays a ring over `ranks` parts: reduce-scatter, then all-gather, counting what each link carries."""
    data = np.random.default_rng(0).integers(0, 100, (ranks, ranks, size))  # rank, part, number
    total, held, sent = data.sum(0), data.copy(), 0
    for round_ in range(2 * (ranks - 1)):
        before = held.copy()
        for rank in range(ranks):
            part = (
                (rank - round_) % ranks if round_ < ranks - 1 else (rank + 1 - (round_ - ranks + 1)) % ranks
            )
            to = (rank + 1) % ranks
            held[to, part] = before[rank, part] + (before[to, part] if round_ < ranks - 1 else 0)
        sent += size
    assert (held == total).all()
    config = replace(LLAMA_3_8B, num_layers=1, windows=(None,), hidden_size=size * ranks)
    link = replace(H100, link_bandwidth=1.0)
    assert all_reduce_seconds(config, 1, ranks, link, activation_bytes=1) == pytest.approx(2 * sent)
