"""A model over 2 and 4 ranks computes what it does on one: every family, MHA to MQA, every backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import rank_tasks
import torch
from gguf_files import base_metadata, convert_tensors, write_gguf
from quantized_files import FORMATS, write_quantized
from rank_pool import RankPool
from tiny import FAMILIES, tiny_checkpoint, tiny_model

from gqa_serve.engine.backends import native_is_built

TOLERANCE = 1e-4
needs_native = pytest.mark.skipif(not native_is_built(), reason="the native kernels are not built")
# Query heads over KV heads: over 2 and 4 ranks these are even, uneven (2 + 1; one of three copied), copied.
HEADS = [(4, 4), (6, 3), (5, 1)]


def prompts_of(lengths: list[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 128, (length,), generator=generator).tolist() for length in lengths]


def sizes_of(num_heads: int, num_kv_heads: int) -> dict[str, int]:
    """Not every family takes a hidden size that its heads do not divide."""
    heads = {"num_attention_heads": num_heads, "num_key_value_heads": num_kv_heads}
    return {**heads, "hidden_size": 16 * num_heads, "head_dim": 16}


def check(pool: RankPool, path: Path, backend: str, *, ragged: bool = True, lengths: Any = (30, 7)) -> None:
    prompts = prompts_of(list(lengths))
    whole = rank_tasks.logits_of(None, path, backend, prompts, ragged)
    assert min(logits.std() for logits in whole) > 0.2, "logits near zero prove nothing"
    ranks = pool.run(rank_tasks.logits_of, path, backend, prompts, ragged)
    for got in ranks:
        for logits, expected, first in zip(got, whole, ranks[0], strict=True):
            assert np.abs(logits - expected).max() < TOLERANCE
            assert np.array_equal(logits, first), "all ranks have the same sums"


@pytest.mark.parametrize("heads", HEADS, ids=lambda heads: f"{heads[0]}q{heads[1]}kv")
@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str, heads: tuple[int, int], pool: RankPool, tmp_path: Path) -> None:
    check(pool, tiny_checkpoint(family, tmp_path, **sizes_of(*heads)), "reference")


@needs_native
@pytest.mark.parametrize("family", FAMILIES)
def test_family_on_the_native_backend(family: str, pool: RankPool, tmp_path: Path) -> None:
    check(pool, tiny_checkpoint(family, tmp_path, **sizes_of(6, 3)), "native")


@needs_native
def test_steps_longer_than_the_native_backend_computes_at_a_time(two_ranks: RankPool, tmp_path: Path) -> None:
    path = tiny_checkpoint("llama", tmp_path, max_position_embeddings=1024)
    check(two_ranks, path, "native", ragged=False, lengths=(600, 20))


def test_biases_are_added_once(pool: RankPool, tmp_path: Path) -> None:
    path = tiny_checkpoint("llama", tmp_path, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
    check(pool, path, "reference")


@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_native)])
def test_a_vocabulary_that_does_not_divide(backend: str, pool: RankPool, tmp_path: Path) -> None:
    path = tiny_checkpoint("gemma2", tmp_path, vocab_size=131)  # tied, soft caps
    check(pool, path, backend)


@pytest.mark.parametrize("family", ["gemma3", "olmo2"])
def test_interpreted_kernels(family: str, two_ranks: RankPool, tmp_path: Path) -> None:
    path = tiny_checkpoint(family, tmp_path, num_hidden_layers=1, layer_types=["full_attention"])
    check(two_ranks, path, "cuda", ragged=False, lengths=(5, 2))


@needs_native
@pytest.mark.parametrize("blocks", ["Q8_0", "Q4_1"])
def test_quantized_blocks_stay_as_they_are(blocks: str, pool: RankPool, tmp_path: Path) -> None:
    """Cut at multiples of their 32 numbers; only the quantized activations' groups are others then."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}
    model = tiny_model("llama", **sizes)
    metadata = {**base_metadata(model.config), "vocab_size": model.config.vocab_size}
    kind = gguf.GGMLQuantizationType[blocks]
    path = write_gguf(tmp_path / "model.gguf", "llama", metadata, convert_tensors(model, "llama"), kind)
    prompts = prompts_of([20])
    whole = rank_tasks.logits_of(None, path, "native as stored", prompts, False)
    for (got,) in pool.run(rank_tasks.logits_of, path, "native as stored", prompts, False):
        error = np.abs(got - whole[0]).max() / whole[0].std()
        assert error < 0.1


@pytest.mark.parametrize("name", FORMATS)
def test_quantized_files_are_cut_within_their_groups(name: str, pool: RankPool, tmp_path: Path) -> None:
    """Four ranks have 32 and 16 of the 96 inputs of the output projection, and rows within fp8's blocks."""
    write_quantized(tmp_path, tiny_model("llama", **sizes_of(6, 3)), name)
    check(pool, tmp_path, "reference", ragged=False)


def test_each_rank_holds_its_part_alone(four_ranks: RankPool, tmp_path: Path) -> None:
    path = tiny_checkpoint("llama", tmp_path, num_attention_heads=8, num_key_value_heads=2)
    held, blocks = zip(*four_ranks.run(rank_tasks.num_parameters, path), strict=True)
    whole = rank_tasks.load(path, "reference")
    assert len(set(held)) == 1
    norms = 64 * 9  # which all have
    copied = 2 * 8 * 64 * 4 * 2  # K and V projections, once more
    assert sum(held) == whole.weight_bytes // 4 + 3 * norms + copied
    assert sum(blocks) == 2 * whole.backend.block_bytes(whole.config, 16)


def test_tokens_that_only_the_first_rank_has_reach_all(pool: RankPool, tmp_path: Path) -> None:
    (unknown, known), *_ = pool.run(rank_tasks.two_steps, tiny_checkpoint("llama", tmp_path))
    assert known.shape == (2, 128)
    assert np.array_equal(unknown, known)
    assert not np.allclose(known[0], known[1])


def test_a_sum_does_not_depend_on_how_many_rows_it_has(four_ranks: RankPool) -> None:
    few = four_ranks.run(rank_tasks.sums, 1, 7)
    many = four_ranks.run(rank_tasks.sums, 64, 7)
    for (one, numbers), (all_rows, _) in zip(few, many, strict=True):
        assert one.tobytes() == all_rows[:1].tobytes()
        assert numbers == [0, 10, 20, 30]
    parts = [torch.randn(64, 8, generator=torch.Generator().manual_seed(7 + rank)) for rank in range(4)]
    expected = ((parts[0] + parts[1]) + parts[2]) + parts[3]
    assert many[0][0].tobytes() == expected.numpy().tobytes()
