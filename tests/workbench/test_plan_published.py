"""Published figures: parameters and KV bytes per token of models as their papers and cards state them.

The configs are written from what the models' cards and papers say; no weight is needed.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from gqa_serve.workbench.hardware import A100, H100
from gqa_serve.workbench.model_source import ModelSource, group_counts, read_model
from gqa_serve.workbench.plan.answer import Answer, Case
from gqa_serve.workbench.plan.capacity import MemorySettings
from gqa_serve.workbench.plan.serving_formats import served_formats

CONFIGS = Path(__file__).parent / "configs"
KIB = 1024


def source(name: str) -> ModelSource:
    return read_model(str(CONFIGS / f"{name}.json"))


def answer(name: str, num_kv_heads: int | None = None, ranks: int = 1, context_len: int = 4096) -> Answer:
    model = source(name)
    config = model.config if num_kv_heads is None else model.with_kv_heads(num_kv_heads)
    formats = served_formats(model, A100, "auto", "bfloat16", 16)
    return Answer(model, config, Case("bfloat16", ranks, context_len), formats, A100, MemorySettings())


@pytest.mark.parametrize(
    ("name", "heads", "kv_heads", "parameters", "kib_per_token"),
    [
        ("llama-2-7b", 32, 32, 6_738_415_616, 512),
        ("llama-2-70b", 64, 8, 68_976_648_192, 320),
        ("llama-3-8b", 32, 8, 8_030_261_248, 128),
        ("llama-3-70b", 64, 8, 70_553_706_496, 320),
        ("mistral-7b-v0.1", 32, 8, 7_241_732_096, 128),
        ("qwen2.5-0.5b", 14, 2, 494_032_768, 12),
        ("qwen2.5-1.5b", 12, 2, 1_543_714_304, 28),
        ("qwen2.5-7b", 28, 4, 7_615_616_512, 56),
        ("qwen2.5-72b", 64, 8, 72_706_203_648, 320),
        ("gemma-3-270m", 4, 1, 268_098_176, 18),
        ("gemma-3-1b", 4, 1, 999_885_952, 26),
        ("gemma-3-4b", 8, 4, 3_880_263_168, 136),  # the text decoder of 4,300,079,472
        ("gemma-3-27b", 32, 16, 27_009_346_304, 496),  # the text decoder of 27,432,406,640
    ],
)
def test_published_figures(name: str, heads: int, kv_heads: int, parameters: int, kib_per_token: int) -> None:
    found = answer(name)
    assert (found.config.num_heads, found.config.num_kv_heads) == (heads, kv_heads)
    assert found.source.num_parameters == parameters
    assert found.kv_bytes_per_token == kib_per_token * KIB


def test_llama_2_70b_as_the_paper_argues_for_grouping() -> None:
    """Touvron et al. 2023, A.2.1: MHA's cache would be eight times as large."""
    assert answer("llama-2-70b", 64).kv_bytes_per_token == 2560 * KIB
    assert answer("llama-2-70b", 1).kv_bytes_per_token == 40 * KIB
    assert group_counts(source("llama-2-70b").config) == [64, 32, 16, 8, 4, 2, 1]


def test_kv_projections_change_the_weights() -> None:
    """Llama 3 8B as MHA: k and v of 32 layers grow from 1,024 to 4,096 outputs, of 4,096 inputs, in bf16."""
    grown = 2 * 32 * (4096 - 1024) * 4096 * 2
    mha, gqa = answer("llama-3-8b", 32), answer("llama-3-8b")
    assert mha.memory.weight_bytes - gqa.memory.weight_bytes == grown
    assert mha.decode.read_weight_bytes - gqa.decode.read_weight_bytes == grown


def test_a_step_reads_the_weights_but_the_embedding() -> None:
    """Untied, an embedding is looked up, not multiplied; tied, it is the output head."""
    llama = answer("llama-3-8b")
    assert llama.decode.read_weight_bytes == 2 * (8_030_261_248 - 65 * 4096 - 128_256 * 4096)
    qwen = answer("qwen2.5-0.5b")
    norms, biases = (2 * 24 + 1) * 896, 24 * (14 + 2 * 2) * 64
    assert qwen.decode.read_weight_bytes == 2 * (494_032_768 - norms - biases) + 4 * biases


def test_windows_bound_what_is_read_and_not_what_is_stored() -> None:
    mistral = answer("mistral-7b-v0.1", context_len=32_768)
    assert mistral.decode.read_bytes_per_request == 4096 * 128 * KIB
    numbers = mistral.numbers(32_768, None)
    assert numbers["kv_bytes_per_request"] == 32_768 * 128 * KIB

    gemma = answer("gemma-3-27b", context_len=32_768)
    per_layer = 2 * 16 * 128 * 2
    by_hand = sum(
        per_layer * sum(1 for key in range(32_768) if window is None or 32_767 - key < window)
        for window in (1024, None)
        for _ in range(52 if window else 10)
    )
    assert gemma.decode.read_bytes_per_request == by_hand
    assert gemma.kv_bytes_per_token * 32_768 > 4 * by_hand


def test_replicated_kv_heads_cost_memory_on_every_rank() -> None:
    whole, four, sixteen = (answer("llama-3-8b", ranks=ranks) for ranks in (1, 4, 16))
    assert four.kv_bytes_per_token == whole.kv_bytes_per_token
    assert sixteen.kv_bytes_per_token == 2 * whole.kv_bytes_per_token  # 8 heads over 16 ranks: two of each
    assert sixteen.decode.read_bytes_per_request * 8 == whole.decode.read_bytes_per_request


def test_llama_3_70b_needs_more_than_two_of_80_gb_at_full_length() -> None:
    assert answer("llama-3-70b").max_requests == 0
    assert answer("llama-3-70b", ranks=2).memory.kv_budget_bytes < 2e9
    assert answer("llama-3-70b", ranks=4).max_requests > 0


def test_a_prompt_takes_two_operations_per_weight_and_token() -> None:
    """Plus attention's triangle; what is above that is memory-bound: norms, rotation, gated activation."""
    model = source("llama-3-8b")
    formats = served_formats(model, H100, "auto", "bfloat16", 16)
    found = Answer(model, model.config, Case("bfloat16", 1, 8192), formats, H100, MemorySettings())
    matrices = 8_030_261_248 - 65 * 4096 - 2 * 128_256 * 4096
    for tokens in (512, 2048, 8192):
        triangle = 4 * 32 * 128 * 32 * tokens * (tokens + 1) // 2
        least = (2 * matrices * tokens + triangle) / H100.bf16_flops
        assert least < found.prompt_seconds(tokens) < 1.17 * least


def test_a_step_of_llama_3_8b_by_hand() -> None:
    """Batch 1, 2,048 tokens: 15.0 GB of weights and 0.27 GB of KV at 3.35 TB/s; with activations 4.56 ms."""
    model = source("llama-3-8b")
    formats = served_formats(model, H100, "auto", "bfloat16", 16)
    found = Answer(model, model.config, Case("bfloat16", 1, 2048), formats, H100, MemorySettings())
    least = (found.decode.read_weight_bytes + found.decode.read_bytes_per_request) / H100.bandwidth
    assert found.decode.seconds(1) == pytest.approx(least, rel=2e-3)
    assert found.decode.seconds(1) == pytest.approx(4.561e-3, rel=1e-3)
    cost = found.cost_per_million(2.5, 1)
    assert cost == pytest.approx(2.5 / 3600 * 1e6 * found.decode.seconds(1))
