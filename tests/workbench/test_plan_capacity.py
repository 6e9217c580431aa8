"""What fits: against the engine that measures it, and as laws; formats and refusals as the server's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from demo_model import demo_path
from hypothesis import given, settings
from hypothesis import strategies as st

from gqa_serve.engine.memory import (
    cpu_kv_budget,
    free_machine_memory,
    gpu_kv_budget,
    machine_memory,
)
from gqa_serve.errors import ConfigError
from gqa_serve.workbench.cost_tables import LLAMA_3_8B
from gqa_serve.workbench.hardware import A100, H100, L4, Hardware
from gqa_serve.workbench.kernel_cost import BF16, FLOAT32, FP8, INT8, Formats
from gqa_serve.workbench.model_source import ModelSource, read_model
from gqa_serve.workbench.plan.capacity import MemorySettings, capacity, held_weight_bytes
from gqa_serve.workbench.plan.serving_formats import served_formats, served_kv_dtype

SOME = settings(max_examples=40, deadline=None)
CPU = Hardware("a CPU", 32e9, 2e10, 2e11, 2e11, None, is_cpu=True)
MODEL = ModelSource("llama", replace(LLAMA_3_8B, dtype="bfloat16"))


@pytest.mark.parametrize(
    ("quantization", "kv_dtype", "within"),
    [("auto", "auto", 0), ("int8", "int8", 0.02), ("int4", "float32", 0.02), ("none", "auto", 0)],
)
def test_the_engine_holds_what_the_plan_says(quantization: str, kv_dtype: str, within: float) -> None:
    """Int8 in groups of 128 pads the demo's rows of 576, which the account leaves out."""
    from gqa_serve.config import EngineConfig
    from gqa_serve.engine.model_runner import ModelRunner

    settings = EngineConfig(
        model="demo",
        quantization=quantization,
        kv_cache_dtype=kv_dtype,
        backend="native",
        device="cpu",
        max_model_len=512,
        kv_cache_memory=2**27,
    )
    info = ModelRunner(demo_path(), settings).info
    source = read_model("demo")
    served = served_kv_dtype(source, CPU, quantization, kv_dtype)
    formats = served_formats(source, CPU, quantization, served, 16)
    found = capacity(source.config, 1, formats, CPU, MemorySettings(kv_cache_memory=2**27))
    assert served == info.kv_dtype
    assert found.block_bytes == info.kv_bytes_per_token * info.block_size
    assert found.num_blocks == info.num_blocks
    assert found.weight_bytes == pytest.approx(info.weight_bytes, rel=within)


def test_a_quantized_checkpoint_is_counted_as_it_lies_on_disk() -> None:
    source = read_model("demo")
    formats = served_formats(source, CPU, "auto", "bfloat16", 16)
    assert held_weight_bytes(source.config, 1, formats) == source.stored_bytes


def test_a_gpu_gets_its_share_less_weights_and_context() -> None:
    formats = Formats()
    found = capacity(LLAMA_3_8B, 1, formats, H100, MemorySettings(reserve=0))
    weights = 2 * 8_030_261_248 + 2 * 65 * 4096  # norms take four bytes
    assert found.weight_bytes == weights
    assert found.kv_budget_bytes == 72_000_000_000 - weights
    assert found.max_tokens == (72_000_000_000 - weights) // (16 * 131_072) * 16
    assert found.max_requests(4096) == found.num_blocks // 256
    assert found.max_requests(4097) == found.num_blocks // 257


def test_activations_bound_the_cache_where_the_share_leaves_them_no_room() -> None:
    found = capacity(LLAMA_3_8B, 1, Formats(), H100, MemorySettings(utilization=1.0, reserve=0))
    assert found.kv_budget_bytes == 80_000_000_000 - found.weight_bytes - found.activation_bytes
    by_hand = 2 * 2048 * (2 * 4096 + 3 * 14_336) + 6 * 128 * 128_256
    assert found.activation_bytes == by_hand


def test_asked_memory_is_given_only_if_it_is_there() -> None:
    assert capacity(LLAMA_3_8B, 1, Formats(), H100, MemorySettings(kv_cache_memory=2**30)).num_blocks == 512
    full = capacity(LLAMA_3_8B, 1, Formats(), L4, MemorySettings(kv_cache_memory=2**40))
    assert full.kv_budget_bytes + full.weight_bytes + full.activation_bytes < L4.memory_bytes


def test_nothing_fits_beside_too_large_weights() -> None:
    found = capacity(LLAMA_3_8B, 1, Formats(), replace(H100, memory_bytes=16e9), MemorySettings())
    assert (found.num_blocks, found.max_tokens, found.max_requests(1)) == (0, 0, 0)
    assert found.kv_budget_bytes < 0


@SOME
@given(
    st.sampled_from([1, 2, 4, 8, 16, 32]),
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from([A100, H100, CPU]),
    st.integers(1, 8192),
)
def test_fewer_kv_heads_and_more_ranks_never_hold_less(
    kv_heads: int, ranks: int, device: Hardware, context_len: int
) -> None:
    def requests(heads: int, count: int) -> int:
        config = replace(LLAMA_3_8B, num_kv_heads=heads)
        return capacity(config, count, Formats(), device, MemorySettings()).max_requests(context_len)

    assert requests(max(1, kv_heads // 2), ranks) >= requests(kv_heads, ranks)
    if not device.is_cpu:
        assert requests(kv_heads, 2 * ranks) >= requests(kv_heads, ranks)


def test_this_machine_has_memory() -> None:
    assert 2**28 < free_machine_memory() <= machine_memory() < 2**50


def test_shares_of_memory() -> None:
    assert cpu_kv_budget(2 * 2**30, 1) == 2**30
    assert cpu_kv_budget(100 * 2**30, 1) == 4 * 2**30
    assert cpu_kv_budget(100 * 2**30, 8 * 2**30) == 8 * 2**30
    assert gpu_kv_budget(100, 30, 0.9) == 60
    assert gpu_kv_budget(100, 95, 0.9) == -5


@pytest.mark.parametrize(
    ("hardware", "quantization", "kv", "message"),
    [
        (CPU, "fp8", "bfloat16", "no fp8 units; use int8 or int4"),
        (A100, "fp8", "bfloat16", "no fp8 units; use int8 or int4"),
        (CPU, "auto", "fp8", "not served on CPUs; use float32, bfloat16 or int8"),
        (CPU, "auto", "float16", "not served on CPUs"),
        (A100, "auto", "fp8", "no fp8 units; use int8"),
    ],
)
def test_what_the_server_refuses_is_refused(
    hardware: Hardware, quantization: str, kv: str, message: str
) -> None:
    def choose() -> None:
        served = served_kv_dtype(MODEL, hardware, quantization, kv)
        served_formats(MODEL, hardware, quantization, served, 16)

    with pytest.raises(ConfigError, match=message):
        choose()


@pytest.mark.parametrize(
    ("stored", "hardware", "kv", "weights"),
    [
        ("bfloat16", H100, "bfloat16", BF16),
        ("float16", H100, "float16", BF16),
        ("float32", H100, "bfloat16", BF16),
        ("bfloat16", CPU, "bfloat16", BF16),
        ("float16", CPU, "float32", BF16),
        ("float32", CPU, "float32", FLOAT32),
        (None, CPU, "bfloat16", FLOAT32),
    ],
)
def test_auto_is_what_the_server_chooses(
    stored: str | None, hardware: Hardware, kv: str, weights: object
) -> None:
    source = replace(MODEL, config=replace(MODEL.config, dtype=stored))
    served = served_kv_dtype(source, hardware, "auto", "auto")
    formats = served_formats(source, hardware, "auto", served, 16)
    assert (served, formats.weights) == (kv, weights)
    assert formats.activation_bytes == (0 if hardware.is_cpu else 2)


def test_quantized_weights() -> None:
    assert served_formats(MODEL, H100, "fp8", "bfloat16", 16).weights is FP8
    on_cpu = served_formats(MODEL, CPU, "int4", "bfloat16", 16)
    assert (on_cpu.weights.bits, on_cpu.head.bits, on_cpu.weights.precision) == (4, 8, "int8")
    stored = replace(MODEL, weights=FP8, head=BF16)
    assert served_formats(stored, H100, "auto", "bfloat16", 16).weights is FP8
    assert served_formats(stored, A100, "auto", "bfloat16", 16).weights is INT8
    assert served_formats(stored, A100, "none", "bfloat16", 16).weights is BF16


def test_configs_are_test_data() -> None:
    """So that a moved folder does not silently empty the tests of published figures."""
    assert len(list((Path(__file__).parent / "configs").glob("*.json"))) == 13
