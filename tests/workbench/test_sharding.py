"""What one tensor-parallel rank holds, and how long the ranks need to add up their sums."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gqa_serve.engine.model_config import ModelConfig
from gqa_serve.errors import ConfigError
from gqa_serve.workbench.cost_tables import LLAMA_3_8B
from gqa_serve.workbench.hardware import H100
from gqa_serve.workbench.sharding import all_reduce_seconds, local_config


@st.composite
def cut_models(draw: st.DrawFn) -> tuple[ModelConfig, int]:
    """A model and a number of ranks that it can be cut into."""
    ranks = draw(st.sampled_from([1, 2, 3, 4, 6, 8]))
    kv_heads = draw(st.sampled_from([n for n in range(1, 25) if n % ranks == 0 or ranks % n == 0]))
    local_heads = max(kv_heads // ranks, 1) * draw(st.integers(1, 4))
    config = replace(
        LLAMA_3_8B,
        num_heads=local_heads * ranks,
        num_kv_heads=kv_heads,
        intermediate_size=ranks * draw(st.integers(1, 50)),
        vocab_size=draw(st.integers(1, 5000)),
    )
    return config, ranks


@given(cut_models())
def test_the_ranks_together_are_the_model(drawn: tuple[ModelConfig, int]) -> None:
    config, ranks = drawn
    local = local_config(config, ranks)
    assert local.num_heads * ranks == config.num_heads
    assert local.intermediate_size * ranks == config.intermediate_size
    assert local.num_kv_heads * ranks == max(config.num_kv_heads, ranks)
    assert 0 <= local.vocab_size * ranks - config.vocab_size < ranks
    assert (local.hidden_size, local.windows) == (config.hidden_size, config.windows)


@given(cut_models())
def test_a_rank_holds_the_kv_heads_that_its_query_heads_read(drawn: tuple[ModelConfig, int]) -> None:
    config, ranks = drawn
    local = local_config(config, ranks)
    for rank in range(ranks):
        heads = range(rank * local.num_heads, (rank + 1) * local.num_heads)
        read = {head * config.num_kv_heads // config.num_heads for head in heads}
        assert len(read) == local.num_kv_heads


def test_one_rank_is_the_model_itself() -> None:
    assert local_config(LLAMA_3_8B, 1) == LLAMA_3_8B
    assert all_reduce_seconds(LLAMA_3_8B, 100, 1, replace(H100, link_bandwidth=None)) == 0


def test_kv_heads_are_copied_when_there_are_more_ranks() -> None:
    assert local_config(LLAMA_3_8B, 4).num_kv_heads == 2
    assert local_config(LLAMA_3_8B, 8).num_kv_heads == 1
    assert local_config(LLAMA_3_8B, 16).num_kv_heads == 1


@pytest.mark.parametrize(
    ("changes", "ranks", "message"),
    [
        ({}, 0, "1 rank or more"),
        ({"num_heads": 9, "num_kv_heads": 3, "intermediate_size": 1536}, 2, r"9 heads .* use 1 or 3\."),
        ({"num_heads": 12, "num_kv_heads": 3}, 2, "3 KV heads cannot be divided over 2 ranks"),
        ({"intermediate_size": 14_337}, 2, "inner width of 14337"),
    ],
)
def test_what_does_not_divide_is_refused(changes: dict[str, int], ranks: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        local_config(replace(LLAMA_3_8B, **changes), ranks)  # type: ignore[arg-type]


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
