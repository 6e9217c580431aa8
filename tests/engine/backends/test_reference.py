"""The reference backend against float64 arithmetic written per query head."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from gqa_serve.engine.backends import reference_attention
from gqa_serve.engine.backends.base import AttentionLayout, AttentionStep, HeadNorms
from gqa_serve.engine.backends.reference import ReferenceBackend
from gqa_serve.engine.batch import ForwardBatch, PlanRow, StepPlan
from gqa_serve.engine.kv_cache import LARGEST, TensorKVCache, dequantize_kv, quantize_kv
from gqa_serve.engine.model_config import RopeConfig
from gqa_serve.engine.rope import Rotary

CPU = torch.device("cpu")
GROUP_SIZES = (1, 2, 3, 4, 5, 7, 8, 16)
HEAD_DIMS = (32, 64, 80, 96, 128, 256)


@dataclass
class Case:
    """Grouped attention of some requests, each (computed tokens, new tokens)."""

    requests: list[tuple[int, int]]
    num_kv_heads: int = 2
    group_size: int = 3
    head_dim: int = 32
    block_size: int = 16
    window: int | None = None
    soft_cap: float | None = None
    dtype: torch.dtype = torch.float32
    kv_dtype: torch.dtype | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        kv_shape = (self.num_kv_heads, self.head_dim)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(self.dtype)

        contexts = [computed + new for computed, new in self.requests]
        self.k = [normal(context, *kv_shape) for context in contexts]
        self.v = [normal(context, *kv_shape) for context in contexts]
        self.q = [normal(new, self.num_kv_heads * self.group_size, self.head_dim) for _, new in self.requests]
        counts = [-(-context // self.block_size) for context in contexts]
        free = torch.randperm(sum(counts) + 2, generator=generator).tolist()
        self.num_blocks = len(free)
        self.blocks = [[free.pop() for _ in range(count)] for count in counts]

    def layout(self) -> AttentionLayout:
        return AttentionLayout(
            num_heads=self.num_kv_heads * self.group_size,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            scale=0.7 / math.sqrt(self.head_dim),
            soft_cap=self.soft_cap,
            windows=(self.window,),
            layer_windows=(0,),
            rotaries=(),
            layer_rotaries=(None,),
        )

    def prepare(self) -> AttentionStep:
        """A step over a cache that holds the computed tokens, and garbage everywhere else."""
        shape = (self.num_blocks, self.num_kv_heads, self.block_size, self.head_dim)
        kv_dtype = self.kv_dtype or self.dtype
        quantized = kv_dtype in LARGEST
        k_cache, v_cache = (torch.full(shape, 100.0).to(kv_dtype) for _ in range(2))
        scales = [torch.full(shape[:3], 100.0)] if quantized else None
        cache = TensorKVCache(
            [k_cache], [v_cache], self.block_size, self.num_blocks, scales, scales and [scales[0].clone()]
        )
        for (computed, _), blocks, *kv in zip(self.requests, self.blocks, self.k, self.v, strict=True):
            for position in range(computed):
                block, offset = blocks[position // self.block_size], position % self.block_size
                held = cache.layer(0)
                for numbers, scale, x in ((held.k, held.k_scale, kv[0]), (held.v, held.v_scale, kv[1])):
                    written = x[position].to(kv_dtype)
                    if scale is not None:
                        written, scale[block, :, offset] = quantize_kv(x[position], kv_dtype)
                    numbers[block, :, offset] = written
        rows = [
            PlanRow([0] * new, computed, blocks, 0)
            for (computed, new), blocks in zip(self.requests, self.blocks, strict=True)
        ]
        batch = ForwardBatch.from_plan(StepPlan(rows), self.block_size, CPU)
        return ReferenceBackend(CPU, self.dtype, kv_dtype).prepare(batch, cache, self.layout())

    def new_qkv(self) -> torch.Tensor:
        """Queries, keys and values of the new tokens, [T, (H + 2 KV) * D]."""
        news = [new for _, new in self.requests]
        k = torch.cat([k[len(k) - new :] for k, new in zip(self.k, news, strict=True)])
        v = torch.cat([v[len(v) - new :] for v, new in zip(self.v, news, strict=True)])
        return torch.cat((torch.cat(self.q), k, v), dim=1).flatten(1)

    @torch.inference_mode()
    def run(self) -> torch.Tensor:
        step = self.prepare()
        return step.attend(0, step.rotate_and_write(0, self.new_qkv(), None))

    def held(self, x: torch.Tensor) -> torch.Tensor:
        """K or V [tokens, KV, D] as a quantized cache has it."""
        if self.kv_dtype not in LARGEST:
            return x
        return dequantize_kv(*quantize_kv(x, self.kv_dtype), torch.float32)

    def expected(self) -> torch.Tensor:
        """Each query head by itself, float64, [T, H * D]."""
        layout, outs = self.layout(), []
        k_held, v_held = map(self.held, self.k), map(self.held, self.v)
        for (computed, new), q, k, v in zip(self.requests, self.q, k_held, v_held, strict=True):
            query_positions = torch.arange(computed, computed + new)[:, None]
            key_positions = torch.arange(computed + new)[None]
            seen = key_positions <= query_positions
            if self.window is not None:
                seen &= key_positions > query_positions - self.window
            heads = []
            for head in range(layout.num_heads):
                group = head // self.group_size
                scores = q[:, head].double() @ k[:, group].double().T * layout.scale
                if self.soft_cap is not None:
                    scores = self.soft_cap * torch.tanh(scores / self.soft_cap)
                weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
                heads.append(weights @ v[:, group].double())
            outs.append(torch.stack(heads, dim=1).flatten(1))
        return torch.cat(outs)

    def check(self) -> None:
        exact = self.dtype == torch.float32 and self.kv_dtype in (None, torch.float32, *LARGEST)
        tolerance = 2e-5 if exact else 3e-2
        torch.testing.assert_close(self.run().double(), self.expected(), atol=tolerance, rtol=tolerance)


RAGGED = [(0, 7), (20, 1), (33, 5), (0, 1), (47, 1), (15, 1), (5, 30)]


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_every_group_size_and_head_dim(group_size: int, head_dim: int) -> None:
    Case(RAGGED, group_size=group_size, head_dim=head_dim).check()


@pytest.mark.parametrize("kv_dtype", LARGEST)
@pytest.mark.parametrize("window", [None, 5])
def test_quantized_caches(window: int | None, kv_dtype: torch.dtype) -> None:
    """As exact as float caches, once K and V are what the cache holds."""
    Case(RAGGED, kv_dtype=kv_dtype, window=window).check()
    Case([(50, 1)], kv_dtype=kv_dtype, window=window, head_dim=80, soft_cap=2.0).check()


@pytest.mark.parametrize("soft_cap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 1, 5, 16, 17, 64])
@pytest.mark.parametrize("block_size", [1, 3, 16, 64])
def test_every_block_size_window_and_soft_cap(
    block_size: int, window: int | None, soft_cap: float | None
) -> None:
    Case(RAGGED, block_size=block_size, window=window, soft_cap=soft_cap).check()
    Case([(30, 1), (64, 1), (3, 1)], block_size=block_size, window=window, soft_cap=soft_cap).check()
    Case([(50, 1)], block_size=block_size, window=window, soft_cap=soft_cap).check()


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    requests=st.lists(
        st.tuples(st.integers(0, 80), st.one_of(st.just(1), st.integers(1, 40))), min_size=1, max_size=6
    ),
    num_kv_heads=st.sampled_from([1, 2, 3, 8]),
    group_size=st.sampled_from(GROUP_SIZES),
    head_dim=st.sampled_from(HEAD_DIMS[:3]),
    block_size=st.sampled_from([1, 4, 7, 16, 32]),
    window=st.one_of(st.none(), st.integers(1, 70)),
    soft_cap=st.sampled_from([None, None, 4.0]),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16]),
    kv_dtype=st.sampled_from([None, None, torch.float32, torch.bfloat16, torch.float16, *LARGEST]),
    seed=st.integers(0, 9),
)
def test_random_shapes(**fields: Any) -> None:
    Case(**fields).check()


@pytest.mark.parametrize("window", [None, 9, 40])
@pytest.mark.parametrize("limits", [(8, 1 << 20, 1 << 20), (256, 600, 1 << 20), (8, 600, 0)])
def test_tiles_of_query_rows(
    limits: tuple[int, int, int], window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, limit in zip(
        ("_MAX_TILE_TOKENS", "_MAX_TILE_SCORES", "_MAX_KEPT_MASK_BYTES"), limits, strict=True
    ):
        monkeypatch.setattr(reference_attention, name, limit)
    Case([(0, 65), (31, 17), (12, 1)], window=window).check()
    Case([(10, 33)], window=window, soft_cap=2.0).check()


def test_decode_contexts_of_very_different_length() -> None:
    Case([(3, 1), (600, 1), (5, 1), (580, 1), (200, 1)]).check()
    Case([(3, 1), (600, 1), (5, 1), (580, 1), (200, 1)], window=300, soft_cap=3.0).check()


def test_result_does_not_depend_on_the_neighbours() -> None:
    """Up to float rounding: each request alone gives the same rows as in the ragged batch."""
    together = Case(RAGGED).run()
    start = 0
    for index, (_, new) in enumerate(RAGGED):
        alone = Case(RAGGED)
        for name in ("requests", "q", "k", "v", "blocks"):
            setattr(alone, name, [getattr(alone, name)[index]])
        torch.testing.assert_close(alone.run(), together[start : start + new], atol=1e-6, rtol=1e-5)
        start += new


class Outputs(TorchDispatchMode):
    """Records every tensor operation: (name, does its first input alias the cache, output)."""

    def __init__(self, cache: TensorKVCache) -> None:
        super().__init__()
        self.memory = {tensor.untyped_storage().data_ptr() for tensor in (*cache.k, *cache.v)}
        self.from_cache: list[torch.Tensor] = []
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.memory:
                self.sizes.append(tensor.untyped_storage().nbytes())
                first = args[0] if args else None
                if isinstance(first, torch.Tensor) and first.untyped_storage().data_ptr() in self.memory:
                    self.from_cache.append(tensor)
        return out


@pytest.mark.parametrize("tile", [256, 3])
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("requests", [[(99, 1)], [(99, 1)] * 3, [(96, 4)], [(90, 10)]])
def test_keys_and_values_are_read_once_per_group(
    requests: list[tuple[int, int]], window: int | None, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What leaves the cache is each block once, and nothing larger is ever made of it."""
    monkeypatch.setattr(reference_attention, "_MAX_TILE_TOKENS", tile)
    case = Case(requests, group_size=8, head_dim=64, block_size=10, window=window)
    step = case.prepare()
    q = step.rotate_and_write(0, case.new_qkv(), None)
    with Outputs(step.cache) as outputs:  # type: ignore[attr-defined]
        step.attend(0, q)
    blocks = 0
    for computed, new in requests:
        first = 0 if window is None else max(0, computed + 1 - window) // 10
        blocks += -(-(computed + new) // 10) - first
    once = blocks * case.num_kv_heads * case.block_size * case.head_dim * 4
    assert sum(tensor.untyped_storage().nbytes() for tensor in outputs.from_cache) == 2 * once
    scores_and_queries = sum(new for _, new in requests) * case.num_kv_heads * case.group_size * 128 * 4
    assert max(outputs.sizes) <= max(once, scores_and_queries)
    assert scores_and_queries < once * case.group_size, "the bound would allow an expansion to query heads"


@pytest.mark.parametrize("kv_dtype", [torch.float16, *LARGEST])
def test_float16_overflow_does_not_reach_the_next_owner_of_a_block(kv_dtype: torch.dtype) -> None:
    case = Case([(4, 1), (20, 1)], dtype=torch.float16, kv_dtype=kv_dtype)
    case.k[0][4] = torch.inf
    case.v[0][4] = torch.nan
    step = case.prepare()
    step.rotate_and_write(0, case.new_qkv(), None)
    for tensor in step.cache.layer(0):  # type: ignore[attr-defined]
        assert tensor is None or tensor.float().isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 64), (5, 96), (3, 4, 32)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (torch.randn(shape) * 3).to(dtype)
    weight = torch.randn(shape[1:])
    wide = x.double()
    expected = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    got = ReferenceBackend(CPU, dtype).rms_norm(x, weight, 1e-5)
    assert got.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=tolerance)


def test_add_rms_norm_updates_the_residual() -> None:
    torch.manual_seed(0)
    x, residual, weight = torch.randn(4, 32), torch.randn(4, 32), torch.randn(32)
    backend = ReferenceBackend(CPU, torch.float32)
    total = residual + 0.25 * x
    got = backend.add_rms_norm(x, residual, weight, 1e-6, 0.25)
    torch.testing.assert_close(residual, total)
    torch.testing.assert_close(got, backend.rms_norm(total, weight, 1e-6))
    assert backend.add_rms_norm(x, residual, None, 1e-6, 2.0) is residual
    torch.testing.assert_close(residual, total + 2 * x)


@pytest.mark.parametrize("mode", ["head", "full"])
def test_queries_and_keys_are_normed_before_they_are_written(mode: Any) -> None:
    case = Case([(0, 5), (20, 1)])
    layout = case.layout()
    generator = torch.Generator().manual_seed(0)
    heads = 1 if mode == "head" else layout.num_heads
    kv_heads = 1 if mode == "head" else layout.num_kv_heads
    q_weight, k_weight = (torch.randn(n * case.head_dim, generator=generator) for n in (heads, kv_heads))
    step = case.prepare()
    q = step.rotate_and_write(0, case.new_qkv(), HeadNorms(mode, q_weight, k_weight, 1e-5))

    def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        flat = x.view(*x.shape[:-2], -1, len(weight)).double()  # [..., normed together]
        flat = flat / (flat.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
        return flat.view(x.shape).float()

    torch.testing.assert_close(q, normed(torch.cat(case.q), q_weight))
    block, offset = case.blocks[1][20 // case.block_size], 20 % case.block_size
    written = step.cache.k[0][block, :, offset]  # type: ignore[attr-defined]
    torch.testing.assert_close(written, normed(case.k[1][20], k_weight))


def test_logits_are_scaled_then_capped_in_float32() -> None:
    backend = ReferenceBackend(CPU, torch.bfloat16)
    head = backend.linear([backend.pack(torch.eye(4), "head")], None)
    hidden = torch.tensor([[1.0, -2.0, 4.0, 8.0]], dtype=torch.bfloat16)
    torch.testing.assert_close(backend.logits(head, hidden, 1.0, None), hidden.float())
    expected = 3.0 * torch.tanh(hidden.float() * 0.5 / 3.0)
    torch.testing.assert_close(backend.logits(head, hidden, 0.5, 3.0), expected)


def test_embeddings_are_scaled_by_a_rounded_factor() -> None:
    backend = ReferenceBackend(CPU, torch.bfloat16)
    table = backend.pack(torch.arange(6.0).view(3, 2), "head")
    got = backend.embed(table, torch.tensor([2, 0]), 1.001)  # 1 in bfloat16
    assert got.tolist() == [[4.0, 5.0], [0.0, 1.0]]
    assert backend.embed(table, torch.tensor([1]), 3.0).tolist() == [[6.0, 9.0]]


@pytest.mark.parametrize(
    ("activation", "value"), [("silu", 0.7310586), ("gelu", 0.8413447), ("gelu_tanh", 0.8411920)]
)
def test_gated_activation(activation: Any, value: float) -> None:
    gate_up = torch.tensor([[1.0, 0.0, 3.0, 5.0]])
    got = ReferenceBackend(CPU, torch.float32).gated_activation(gate_up, activation)
    torch.testing.assert_close(got, torch.tensor([[3 * value, 0.0]]))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("split", [[40], [24, 8, 8]])
@pytest.mark.parametrize("tokens", [1, 3, 6, 16, 48, 49])
def test_linear(tokens: int, split: list[int], bias: bool) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(tokens, 24), torch.randn(40, 24)
    offset = torch.randn(40) if bias else None
    backend = ReferenceBackend(CPU, torch.float32)
    parts = [backend.pack(part, "linear") for part in weight.split(split)]
    got = backend.linear(parts, offset)(x)
    expected = x.double() @ weight.double().T + (0 if offset is None else offset.double())
    assert got.is_contiguous()
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rotary_dim", [32, 16])
def test_rotation_turns_pairs_by_position_times_frequency(rotary_dim: int) -> None:
    """Pairs (i, i + rotary_dim / 2) are complex numbers turned by p * theta^(-2i / rotary_dim)."""
    rotary = Rotary.build(RopeConfig("default", 100.0, rotary_dim), 64, CPU)
    positions = torch.tensor([0, 3, 41])
    torch.manual_seed(0)
    x = torch.randn(3, 2, 32)
    got = reference_attention._rotate(x, *rotary.angles(positions, torch.float32))
    half = rotary_dim // 2
    expected = x.clone()
    for token, head, i in itertools.product(range(3), range(2), range(half)):
        angle = positions[token].item() * 100.0 ** (-2 * i / rotary_dim)
        turned = complex(x[token, head, i], x[token, head, i + half]) * complex(
            math.cos(angle), math.sin(angle)
        )
        expected[token, head, i], expected[token, head, i + half] = turned.real, turned.imag
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
