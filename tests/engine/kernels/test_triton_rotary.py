"""Norm, rotation and cache write against their twin and against float64 arithmetic, element by element."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from gqa_serve.engine.backends.base import HeadNorms
from gqa_serve.engine.kernels.triton import rotary
from gqa_serve.engine.kernels.triton.rotary import rotate_and_write, rotate_and_write_twin
from gqa_serve.engine.kv_cache import LARGEST, LayerKV, dequantize_kv, quantize_kv

EPS = 1e-6
NUM_BLOCKS = 5


@dataclass
class Case:
    """Tokens with slots in a small cache; a third of them pad the batch and have none."""

    tokens: int = 7
    num_heads: int = 6
    num_kv_heads: int = 2
    head_dim: int = 32
    rotary_dim: int | None = None  # None: no positions
    block_size: int = 4
    norms: str | None = None
    dtype: torch.dtype = torch.float32
    kv_dtype: torch.dtype = torch.float32
    seed: int = 0

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator)

        heads = self.num_heads + 2 * self.num_kv_heads
        rows = normal(self.tokens, heads * self.head_dim + 16) * 3  # a row is longer than its heads
        self.qkv = rows.to(self.dtype)[:, : heads * self.head_dim]
        slots = torch.randperm(NUM_BLOCKS * self.block_size, generator=generator)[: self.tokens]
        slots[2::3] = -1
        self.slots = slots.int()
        self.angles = None
        if self.rotary_dim is not None:
            half = normal(self.tokens, self.rotary_dim // 2) * 10
            cos, sin = half.cos() * 1.1, half.sin() * 1.1  # scaled, as yarn does
            self.angles = (torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))
        self.head_norms = None
        if self.norms is not None:
            counts = (1, 1) if self.norms == "head" else (self.num_heads, self.num_kv_heads)
            q, k = (normal(count * self.head_dim) for count in counts)
            self.head_norms = HeadNorms(self.norms, q, k, EPS)  # type: ignore[arg-type]

    def poisoned(self) -> tuple[torch.Tensor, LayerKV]:
        """Outputs in which whatever is not written can be told from what is."""
        q = torch.full((self.tokens, self.num_heads, self.head_dim), torch.nan, dtype=self.dtype)
        shape = (NUM_BLOCKS, self.num_kv_heads, self.block_size, self.head_dim)
        if self.kv_dtype in LARGEST:
            bits = [torch.full(shape, 0x7F, dtype=torch.uint8).view(self.kv_dtype) for _ in range(2)]
            return q, LayerKV(*bits, *(torch.full(shape[:3], torch.nan) for _ in range(2)))
        return q, LayerKV(*(torch.full(shape, torch.nan, dtype=self.kv_dtype) for _ in range(2)), None, None)

    def expected(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q [T, H, D], k and v [T, KV, D], float64, before the cache's format."""
        heads = self.qkv.double().view(self.tokens, -1, self.head_dim)
        q, k, v = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        if self.head_norms is not None:
            q, k = _normed(q, self.head_norms.q), _normed(k, self.head_norms.k)
        return self._rotated(q), self._rotated(k), v

    def _rotated(self, x: torch.Tensor) -> torch.Tensor:
        """One pair of numbers after the other."""
        out = x.clone()
        if self.angles is not None and self.rotary_dim is not None:
            half = self.rotary_dim // 2
            for i in range(half):
                cos, sin = self.angles[0][:, i, None].double(), self.angles[1][:, half + i, None].double()
                first, second = x[..., i], x[..., half + i]
                out[..., i] = first * cos - second * sin
                out[..., half + i] = second * cos + first * sin
        return out

    def check(self) -> None:
        twin_q, twin_kv = self.poisoned()
        rotate_and_write_twin(self.qkv.clone(), twin_q, twin_kv, self.slots, self.angles, self.head_norms)
        wanted_q, *wanted_kv = self.expected()
        q, kv = self.poisoned()
        assert rotate_and_write(self.qkv, q, kv, self.slots, self.angles, self.head_norms) is q
        half = torch.float16 in (self.dtype, self.kv_dtype)
        tolerance = {"atol": 5e-2, "rtol": 5e-3} if half else {"atol": 1e-5, "rtol": 1e-5}
        torch.testing.assert_close(q.double(), wanted_q, **tolerance)
        torch.testing.assert_close(q, twin_q, **tolerance)
        for got, scale, twin, twin_scale, wanted in zip(
            kv[:2], kv[2:], twin_kv[:2], twin_kv[2:], wanted_kv, strict=True
        ):
            self._check_written(got, scale, wanted, tolerance)
            self._check_written(twin, twin_scale, wanted, tolerance)

    def _check_written(
        self, got: torch.Tensor, scale: torch.Tensor | None, wanted: torch.Tensor, tolerance: dict[str, float]
    ) -> None:
        """The tokens' slots hold `wanted` [T, KV, D], all others what they held before."""
        untouched = torch.ones(NUM_BLOCKS, self.block_size, dtype=torch.bool)
        for token, slot in enumerate(self.slots.tolist()):
            if slot < 0:
                continue
            block, offset = divmod(slot, self.block_size)
            untouched[block, offset] = False
            for head in range(self.num_kv_heads):
                numbers = got[block, head, offset].double()
                if scale is None:
                    torch.testing.assert_close(numbers, wanted[token, head], **tolerance)
                    continue
                step = scale[block, head, offset].double()
                exact = wanted[token, head]
                torch.testing.assert_close(step * LARGEST[self.kv_dtype], exact.abs().max(), **tolerance)
                # Half a step of int8; of fp8 half of 2^-3 of the number, or of 2^-9 near zero.
                error = (numbers * step - exact).abs()
                half = (
                    0.5 * step
                    if self.kv_dtype == torch.int8
                    else (exact.abs() / 16).clamp(min=step * 2.0**-10)
                )
                assert (error <= half * 1.001 + tolerance["atol"]).all()
        rest = (
            got.transpose(1, 2)[untouched]
            if got.dtype.itemsize > 1
            else got.view(torch.uint8).transpose(1, 2)[untouched]
        )
        assert (rest == 0x7F).all() if got.dtype.itemsize == 1 else rest.isnan().all()
        assert scale is None or scale.transpose(1, 2)[untouched].isnan().all()


def _normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [T, heads, D] normed over as many numbers as `weight` has."""
    flat = x.reshape(len(x), -1, len(weight))
    flat = flat / (flat.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
    return flat.view(x.shape)


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.float16, *LARGEST])
@pytest.mark.parametrize(
    ("head_dim", "rotary_dim"), [(64, 64), (80, 80), (96, 72), (128, 32), (256, 256), (6, 4)]
)
def test_head_sizes_and_formats(head_dim: int, rotary_dim: int, kv_dtype: torch.dtype) -> None:
    Case(
        tokens=4, num_heads=3, num_kv_heads=1, head_dim=head_dim, rotary_dim=rotary_dim, kv_dtype=kv_dtype
    ).check()


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    tokens=st.integers(1, 9),
    num_kv_heads=st.sampled_from([1, 2, 3]),
    group_size=st.sampled_from([1, 3, 4, 7]),
    dims=st.sampled_from([(16, 16), (24, 24), (40, 20), (32, None), (80, 64)]),
    block_size=st.sampled_from([2, 3, 16]),
    norms=st.sampled_from([None, "head", "full"]),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.float16]),
    kv_dtype=st.sampled_from([torch.float32, torch.float16, *LARGEST]),
    seed=st.integers(0, 99),
)
def test_random_shapes(
    group_size: int, dims: tuple[int, int | None], num_kv_heads: int, **fields: Any
) -> None:
    fields["tokens"] = min(fields["tokens"], NUM_BLOCKS * fields["block_size"])
    Case(
        num_heads=num_kv_heads * group_size,
        num_kv_heads=num_kv_heads,
        head_dim=dims[0],
        rotary_dim=dims[1],
        **fields,
    ).check()


def written(x: torch.Tensor, kv_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, D] as keys of one head, not rotated, through the kernel: (numbers [T, D], scales [T])."""
    tokens, head_dim = x.shape
    q = torch.empty(tokens, 1, head_dim)
    qkv = torch.cat((torch.zeros_like(x), x, torch.zeros_like(x)), dim=1)
    numbers = [torch.zeros(tokens, 1, 1, head_dim).to(kv_dtype) for _ in range(2)]
    kv = LayerKV(*numbers, *(torch.zeros(tokens, 1, 1) for _ in range(2)))
    rotate_and_write(qkv, q, kv, torch.arange(tokens).int(), None, None)
    assert kv.k_scale is not None
    return kv.k[:, 0, 0], kv.k_scale[:, 0, 0]


@pytest.mark.parametrize("kv_dtype", LARGEST)
def test_quantized_numbers_are_those_of_the_twin_bit_for_bit(kv_dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 128, generator=generator) * torch.logspace(-6, 4, 24)[:, None]
    x[:, :8] *= torch.logspace(-6, 0, 8)  # of one head, numbers of all sizes
    x[:, 8], x[5] = 0.0, 0.0
    x[6, 1], x[6, 2] = -0.0, 1e-42
    got, got_scale = written(x, kv_dtype)
    wanted, scale = quantize_kv(x, kv_dtype)
    assert torch.equal(got_scale, scale)
    assert torch.equal(got.view(torch.uint8), wanted.view(torch.uint8))


def test_every_float8_and_what_lies_between() -> None:
    """Each number of the format, the middle between each two neighbours, and the numbers beside that."""
    codes = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # 0 .. 448
    middles = (codes[1:] + codes[:-1]) / 2
    x = torch.cat(
        (codes, middles, middles.nextafter(torch.tensor(1e9)), middles.nextafter(torch.tensor(-1e9)))
    )
    x = torch.cat((x, -x))
    x = torch.nn.functional.pad(x, (0, -len(x) % 127)).view(-1, 127)
    x = torch.cat((torch.full_like(x[:, :1], 448.0), x), dim=1)  # scale 1
    got, scale = written(x, torch.float8_e4m3fn)
    assert (scale == 1).all()
    assert torch.equal(got.view(torch.uint8), x.to(torch.float8_e4m3fn).view(torch.uint8))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's, of inf - inf
@pytest.mark.parametrize("kv_dtype", [torch.float16, *LARGEST])
def test_what_is_not_finite_is_not_written(kv_dtype: torch.dtype) -> None:
    case = Case(kv_dtype=kv_dtype, rotary_dim=16)
    case.slots = torch.arange(7).int()
    keys = slice(case.num_heads * 32, None)
    case.qkv[1, keys] = torch.inf
    case.qkv[2, keys] = torch.nan
    case.qkv[3, keys] = -1e30
    q, kv = case.poisoned()
    rotate_and_write(case.qkv, q, kv, case.slots, case.angles, None)
    for numbers, scale in ((kv.k, kv.k_scale), (kv.v, kv.v_scale)):
        rows = numbers.float().transpose(1, 2).flatten(0, 1)[:7]  # [slots, KV, D]
        if scale is not None:
            rows = dequantize_kv(rows, scale.transpose(1, 2).flatten(0, 1)[:7], torch.float32)
        assert rows.isfinite().all()
    v = kv.v.float().transpose(1, 2).flatten(0, 1)
    assert (v[2] == 0).all()
    assert (v[1] == LARGEST.get(kv_dtype, 65504.0)).all()
    assert (v[3] == -LARGEST.get(kv_dtype, 65504.0)).all()


def test_a_token_does_not_depend_on_its_neighbours() -> None:
    case = Case(rotary_dim=32, norms="head", kv_dtype=torch.int8)
    q, kv = case.poisoned()
    rotate_and_write(case.qkv, q, kv, case.slots, case.angles, case.head_norms)
    for token in (0, 4):
        one = slice(token, token + 1)
        alone, alone_kv = case.poisoned()
        angles = None if case.angles is None else (case.angles[0][one], case.angles[1][one])
        rotate_and_write(case.qkv[one], alone[one], alone_kv, case.slots[one], angles, case.head_norms)
        assert torch.equal(alone[token], q[token])
        block, offset = divmod(int(case.slots[token]), case.block_size)
        assert torch.equal(alone_kv.k[block, :, offset], kv.k[block, :, offset])


def test_variants_cover_what_is_launched() -> None:
    names = [str(variant) for variant in rotary.variants()]
    assert len(names) == len(set(names))
    for head_dim in (64, 80, 96, 128, 256):
        for held in ("bf16", "int8", "fp8"):
            assert f"_rotate_and_write_kernel bf16 D{head_dim} KV {held}" in names
