"""Linear layers of the native CPU kernels: packing, and products to the last bit.

Expected values are the arithmetic that linear.inl documents, written in numpy: sequential fma for float
weights; for int8 and int4 exact integer sums per group of activations, which are quantized per row and group
but for outliers, which stay float32. What AMX does with bfloat16 weights is in test_cpu_linear_tiles.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_calls import (
    LEVELS,
    Machine,
    agreeing,
    bits,
    fma,
    machines,
    multiply,
    pack,
    pack_blocks,
    run,
    set_bias,
    unpack,
)

from gqa_serve.engine.backends import native_is_built
from gqa_serve.engine.batch import PlanRow
from gqa_serve.engine.kernels.cpu import load

pytestmark = pytest.mark.skipif(not native_is_built(), reason="the native kernels are not built")

FLOATS = ("float32", "bfloat16", "float16")
BLOCKS = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20}  # bytes of a block of 32 weights
SHAPES = [(1, 1), (31, 24), (33, 40), (100, 63), (32, 32), (64, 128), (7, 100), (65, 300)]


def generator(*seed: object) -> np.random.Generator:
    return np.random.default_rng([ord(c) for c in repr(seed)])


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


# --- what the kernels document, in numpy ---


def float_product(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """fma over inputs 0, 1, ... from 0.0f."""
    total = np.zeros((len(x), len(weight)), np.float32)
    for i in range(x.shape[1]):
        total = fma(x[:, i, None], weight[None, :, i], total)
    return total


@dataclass
class Quantized:
    """Weights [n, k] = scale * code + minimum, with a scale and a minimum per output and group."""

    codes: np.ndarray  # [n, k], int64
    scale: np.ndarray  # [n, groups], float32 that are halves
    minimum: np.ndarray | None
    group: int

    def values(self) -> np.ndarray:
        """float32 [n, k]."""
        group_of = np.arange(self.codes.shape[1]) // self.group
        value = self.scale[:, group_of] * self.codes.astype(np.float32)
        return value if self.minimum is None else value + self.minimum[:, group_of]

    def product(self, x: np.ndarray) -> np.ndarray:
        total = np.zeros((len(x), len(self.codes)), np.float32)
        outliers = np.zeros(x.shape, bool)
        for g in range(self.scale.shape[1]):
            part = slice(g * self.group, (g + 1) * self.group)
            outliers[:, part] = outliers_of(x[:, part])
            q, x_scale = quantize_rows(np.where(outliers[:, part], np.float32(0), x[:, part]))
            products = (q @ self.codes[:, part].T).astype(np.float32) * x_scale
            total = fma(products, self.scale[None, :, g], total)
            if self.minimum is not None:
                sums = q.sum(axis=1, keepdims=True).astype(np.float32) * x_scale
                total = fma(np.broadcast_to(sums, total.shape), self.minimum[None, :, g], total)
        values = self.values()
        for row, i in np.argwhere(outliers):
            total[row] = fma(x[row, i], values[:, i], total[row])
        return total


def outliers_of(x: np.ndarray) -> np.ndarray:
    """Which inputs of one group [rows, inputs] are more than 8 times the mean magnitude of their row."""
    magnitude = np.abs(x.astype(np.float64))
    return magnitude > 8 * magnitude.mean(axis=1, keepdims=True)


def quantize_rows(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One group of activations: q [rows, inputs] int64 and scales [rows, 1], of 22 significant bits."""
    largest = np.abs(x).max(axis=1, keepdims=True)
    empty = largest < np.float32(1e-30)
    inverse = np.where(empty, np.float32(0), np.float32(127) / np.where(empty, np.float32(1), largest))
    scale = np.where(empty, np.float32(0), largest / np.float32(127))
    scale = (scale.view(np.uint32) & ~np.uint32(3)).view(np.float32)
    return np.rint(x * inverse).astype(np.int64), scale


# --- weights whose codes are known ---


def halves(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Halves from 2^-4 to 2^-3 of either sign, as float32: multiples of 2^-14."""
    return ((rng.integers(1024, 2048, shape) * rng.choice([-1, 1], shape)) / 2.0**14).astype(np.float32)


def known_weights(form: str, n: int, k: int, group: int, has_min: bool) -> tuple[Any, Quantized]:
    """A matrix that the format holds without loss. Each group uses the whole range of codes, which is how the
    packer finds its scale."""
    rng = generator(form, n, k, group, has_min)
    padded = -(-k // 32) * 32
    group = group or padded
    low, high = (-127, 127) if form == "int8" else (0, 15) if has_min else (-8, 7)
    codes = rng.integers(low, high + 1, (n, k))
    starts = range(0, k, group)
    for start in starts:
        width = min(group, k - start)
        codes[:, start] = low
        if width > 1:
            codes[:, start + width - 1] = high
    scale = np.abs(halves(rng, n, len(starts)))
    if form == "int4" and not has_min:
        scale *= rng.choice(np.float32([-1, 1]), scale.shape)
    quantized = Quantized(codes, scale, halves(rng, n, len(starts)) if has_min else None, group)
    weight = pack(torch.from_numpy(quantized.values()), form, group, has_min)
    assert np.array_equal(unpack(weight), quantized.values())
    return weight, quantized


def gguf_rows(kind: str, n: int, k: int, rng: np.random.Generator) -> np.ndarray:
    """Blocks with random codes, all of them possible, and finite scales."""
    rows = rng.integers(0, 256, (n, k // 32, BLOCKS[kind]), dtype=np.uint8)
    for start in (0, 2) if kind == "Q4_1" else (0,):
        rows[:, :, start : start + 2] = halves(rng, n, k // 32, 1).astype(np.float16).view(np.uint8)
    return rows.reshape(n, -1)


def known_blocks(kind: str, n: int, k: int) -> tuple[Any, Quantized]:
    rows = gguf_rows(kind, n, k, generator(kind, n, k))
    blocks = rows.reshape(n, k // 32, -1)
    scale = blocks[:, :, :2].copy().view(np.float16)[:, :, 0].astype(np.float32)
    minimum = None
    if kind == "Q8_0":
        codes = blocks[:, :, 2:].view(np.int8).astype(np.int64)
    else:
        packed = blocks[:, :, BLOCKS[kind] - 16 :]
        codes = np.concatenate((packed & 15, packed >> 4), axis=2).astype(np.int64)
    if kind == "Q4_0":
        codes -= 8
    if kind == "Q4_1":
        minimum = blocks[:, :, 2:4].copy().view(np.float16)[:, :, 0].astype(np.float32)
    return pack_blocks(rows, kind, k), Quantized(codes.reshape(n, k), scale, minimum, 32)


# --- products ---


def check(
    weight: Any, product: Callable[[np.ndarray], np.ndarray], x: np.ndarray, levels: Sequence[str] = LEVELS
) -> None:
    """The same bits as `product` on every machine, without and with a bias."""
    wanted = product(x)
    assert np.isfinite(wanted).all()
    for machine in machines(levels=levels):
        assert np.array_equal(bits(multiply(weight, x, machine)), bits(wanted)), machine
    bias = normal(generator("bias"), weight.n)
    set_bias(weight, bias)
    for machine in machines(levels=levels):
        assert np.array_equal(bits(multiply(weight, x, machine)), bits(wanted + bias)), machine


def test_fma_is_rounded_once() -> None:
    """The test's own arithmetic: 1 + 2^-24 is halfway between floats, 2^-60 more decides."""
    one, half, tiny = np.float32([1.0]), np.float32([2.0**-12]), np.float32([2.0**-60])
    a, b = np.float32([1 + 2.0**-12]), np.float32([1 - 2.0**-12])  # product: 1 - 2^-24
    assert fma(a, b, tiny)[0] == np.float32(1 - 2.0**-24)
    assert fma(half, half, one)[0] == 1.0  # a tie, to even
    for sign in (1, -1):
        nearly = np.float32([2.0**-12 * (1 + sign * 2.0**-23)])
        wanted = 1 + 2.0**-23 if sign > 0 else 1.0
        assert fma(half, nearly, one)[0] == np.float32(wanted)
    # 2^30 (1 + 2^-23) + 2^6 + 2^-40: float64 drops the last, and a tie would go down.
    big = np.float32([2.0**30 * (1 + 2.0**-22)])
    step = np.float32([2.0**6 * (1 + 2.0**-23)])
    assert fma(step, np.float32([1 + 2.0**-23]), big)[0] == np.float32(2.0**30 * (1 + 2.0**-22) + 2.0**7)


@pytest.mark.parametrize("rows", [1, 2, 17])
@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("form", FLOATS)
def test_float_weights(form: str, n: int, k: int, rows: int) -> None:
    rng = generator(form, n, k, rows)
    stored = torch.from_numpy(normal(rng, n, k)).to(getattr(torch, form))
    weight = pack(stored, form)
    values = stored.float().numpy()
    assert np.array_equal(bits(unpack(weight)), bits(values))
    assert (weight.n, weight.k, weight.format) == (n, k, form)
    x = normal(rng, rows, k)
    exact = x.astype(np.float64) @ values.T.astype(np.float64)
    bound = 1e-6 * np.sqrt(k) * np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(values, axis=1)
    assert (np.abs(multiply(weight, x, Machine(LEVELS[-1], 1)) - exact) <= bound).all()
    check(weight, lambda rows: float_product(rows, values), x, agreeing(form)[0])


INTEGERS = [("int8", False), ("int4", False), ("int4", True)]


@pytest.mark.parametrize("group", [32, 64, 128, 0])
@pytest.mark.parametrize(("form", "has_min"), INTEGERS)
def test_integer_weights(form: str, has_min: bool, group: int) -> None:
    for n, k in SHAPES[1:]:
        weight, quantized = known_weights(form, n, k, group, has_min)
        rng = generator("x", n, k)
        for rows in (1, 3, 17):
            x = normal(rng, rows, k) * rng.choice(np.float32([1e-20, 0.01, 1, 1e10]), (rows, 1))
            x[rows // 2, : k // 2] = 0.0  # groups of zeros
            x[0, :: k // 4] *= 100.0  # outliers
            check(pack_again(weight, form, group, has_min, quantized), quantized.product, x)


def pack_again(weight: Any, form: str, group: int, has_min: bool, quantized: Quantized) -> Any:
    """The same weights without the bias that `check` sets."""
    fresh = pack(torch.from_numpy(quantized.values()), form, group, has_min, threads=2)
    assert fresh.nbytes == weight.nbytes
    return fresh


@pytest.mark.parametrize("kind", BLOCKS)
def test_gguf_weights(kind: str) -> None:
    for n, k in [(31, 32), (33, 64), (100, 288), (64, 320)]:
        _, quantized = known_blocks(kind, n, k)
        rng = generator("x", n, k)
        for rows in (1, 3, 17):
            weight, _ = known_blocks(kind, n, k)
            check(weight, quantized.product, normal(rng, rows, k))


@pytest.mark.parametrize(
    ("form", "has_min", "k", "group"),
    [("int8", False, 256, 0), ("int8", False, 544, 0), ("int4", True, 2176, 0), ("int4", True, 4096, 0)],
)
def test_integer_sums_are_exact_at_their_largest(form: str, has_min: bool, k: int, group: int) -> None:
    """Also beyond the 22 bits from which on a sum is converted in another way."""
    rng = generator(form, k)
    codes = rng.integers(120, 128, (40, k)) if form == "int8" else rng.integers(9, 16, (40, k))
    codes[:, 0], codes[:, 1] = (127, -127) if form == "int8" else (15, 0)
    codes[::2] *= -1 if form == "int8" else 1
    minimum = np.full((40, 1), 0.09375, np.float32) if has_min else None
    quantized = Quantized(codes, np.full((40, 1), 0.1875, np.float32), minimum, -(-k // 32) * 32)
    weight = pack(torch.from_numpy(quantized.values()), form, group, has_min)
    if minimum is not None:  # in groups this large, least squares find scale and minimum nearly
        values = unpack(weight)
        minimum[:] = values[:, 1:2]
        quantized.scale[:] = ((values[:, :1] - minimum) / 15).astype(np.float16)
    np.testing.assert_array_equal(unpack(weight), quantized.values())
    assert abs(quantized.scale - 0.1875).max() < 1e-3
    x = np.ones((16, k), np.float32)
    x[1::3] = -1.0
    x[2] = 0.7
    x[3, ::2] = 0.3
    check(weight, quantized.product, x)


@pytest.mark.parametrize("kind", [*FLOATS, "int8", "int4", "int4 min", "Q8_0", "Q4_0", "Q4_1"])
def test_a_row_does_not_depend_on_its_batch(kind: str) -> None:
    n, k = 70, 96 if kind.startswith("Q") else 100
    rng = generator(kind)
    if kind in BLOCKS:
        weight, _ = known_blocks(kind, n, k)
    else:
        form, _, minimum = kind.partition(" ")
        weight = pack(torch.from_numpy(normal(rng, n, k)), form, 32 if form == "int4" else 64, bool(minimum))
    set_bias(weight, normal(rng, n))
    x = normal(rng, 40, k)
    x[::3, 7] *= 50.0  # outliers
    for levels in agreeing(kind):
        alone = np.concatenate([multiply(weight, row[None], Machine(levels[-1], 1)) for row in x])
        assert len(np.unique(alone)) > 0.9 * alone.size
        for machine in machines((1, 2, 3), levels):
            assert np.array_equal(bits(multiply(weight, x[5:6], machine)), bits(alone[5:6]))
            for count in range(2, 41):
                begin = int(rng.integers(0, 41 - count))
                got = multiply(weight, x[begin : begin + count], machine)
                assert np.array_equal(bits(got), bits(alone[begin : begin + count])), (machine, count)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_an_outlier_does_not_spoil_its_group(count: int) -> None:
    """`count` equal inputs among zeros of a group of 32: up to three are outliers, and exact."""
    weight, quantized = known_weights("int8", 40, 32, 0, False)
    x = np.zeros((9, 32), np.float32)
    x[:, 4 : 4 + count] = 1000.0
    x[1::2, 20] = 1.0
    check(weight, quantized.product, x)
    assert outliers_of(x)[0].sum() == (count if count < 4 else 0)
    weight, _ = known_weights("int8", 40, 32, 0, False)
    exact = x.astype(np.float64) @ quantized.values().T.astype(np.float64)
    error = np.abs(multiply(weight, x, Machine(LEVELS[-1], 1)) - exact)[1::2]  # rows with a 1 beside them
    assert (error < 1e-6 * np.abs(exact).max()).all() == (count < 4)


@pytest.mark.parametrize("form", ["float32", "bfloat16", "int8", "int4"])
def test_rows_beyond_every_block_of_rows(form: str) -> None:
    """More rows than are kept in sums, in a block of prepared activations, and in a step's buffers."""
    rng = generator(form)
    weight = pack(torch.from_numpy(normal(rng, 40, 1100)), form, 128)
    x = normal(rng, 530, 1100)
    rows = [0, 1, 111, 112, 113, 178, 179, 300, 510, 511, 512, 513, 529]
    for machine in machines((1, 2)):
        together = multiply(weight, x, machine)
        alone = np.concatenate([multiply(weight, x[row : row + 1], machine) for row in rows])
        assert np.array_equal(bits(together[rows]), bits(alone))
        assert np.isfinite(together).all()
        assert len(np.unique(together)) > 0.9 * together.size


def test_logits_are_scaled_then_capped() -> None:
    rng = generator("cap")
    weight = pack(torch.from_numpy(normal(rng, 33, 40)), "float32")
    x = normal(rng, 3, 40)
    plain = float_product(x, unpack(weight))
    for machine in machines():
        assert np.array_equal(bits(multiply(weight, x, machine, 0.5)), bits(plain * np.float32(0.5)))
        got = multiply(weight, x, machine, 0.5, 3.0)
        np.testing.assert_allclose(got, 3.0 * np.tanh(plain.astype(np.float64) / 6.0), rtol=1e-6)
        assert np.abs(got).max() <= 3.0


# --- as operations of a program ---


def run_linear(table: Any, scale: float, parts: list[Any], tokens: list[int], machine: Machine) -> np.ndarray:
    """embed, then the parts side by side."""
    program = machine.program()
    width = sum(part.n for part in parts)
    x, out = program.add_value(table.k), program.add_value(width)
    program.embed(table, x, scale)
    program.linear(parts, x, out)
    cache = load().KVCache(1, 2, "float32", 1, 16, 512)
    return run(program, cache, [PlanRow(tokens, 0, [0, 1], len(tokens))], out, width)


def test_parts_of_different_formats_lie_side_by_side() -> None:
    rng = generator("parts")
    formats = [("bfloat16", 0), ("float32", 0), ("int8", 32), ("int8", 32), ("int8", 64), ("int4", 64)]
    sizes = [33, 1, 40, 31, 32, 7]
    parts = [
        pack(torch.from_numpy(normal(rng, n, 64)), form, group)
        for (form, group), n in zip(formats, sizes, strict=True)
    ]
    for part in parts[::2]:
        set_bias(part, normal(rng, part.n))
    values = normal(rng, 50, 64)
    table = pack(torch.from_numpy(values), "float32")
    tokens = rng.integers(0, 50, 23).tolist()
    for levels in agreeing("bfloat16"):
        first = Machine(levels[-1], 1)
        wanted = np.concatenate([multiply(part, values[tokens], first) for part in parts], axis=1)
        for machine in machines((1, 2, 3), levels):
            for count in (23, 1):
                got = run_linear(table, 1.0, parts, tokens[:count], machine)
                assert np.array_equal(bits(got), bits(wanted[:count])), machine


@pytest.mark.parametrize("form", [*FLOATS, "int8", "int4"])
def test_embeddings_are_rows_of_the_table_times_the_scale(form: str) -> None:
    table = pack(torch.from_numpy(normal(generator(form), 70, 33)), form, 32)
    eye = pack(torch.eye(33), "float32")
    tokens = [69, 0, 31, 32, 0, 64]
    for machine in machines():
        plain = run_linear(table, 1.0, [eye], tokens, machine)
        assert np.array_equal(plain, unpack(table)[tokens])
        scaled = run_linear(table, 1.7, [eye], tokens, machine)
        assert np.array_equal(scaled, unpack(table)[tokens] * np.float32(1.7))


def test_a_step_may_have_more_rows_than_the_buffers() -> None:
    rng = generator("long")
    values, weight = normal(rng, 700, 16), pack(torch.from_numpy(normal(rng, 5, 16)), "float32")
    table = pack(torch.from_numpy(values), "float32")
    wanted = float_product(values, unpack(weight))
    for machine in machines():
        got = run_linear(table, 1.0, [weight], list(range(700)), machine)
        assert np.array_equal(bits(got), bits(wanted))


# --- packing ---


@pytest.mark.parametrize("form", FLOATS)
@pytest.mark.parametrize("source", FLOATS)
def test_packing_floats_rounds_to_nearest(source: str, form: str) -> None:
    """From any float type to any, and rows further apart than they are long."""
    wide = torch.from_numpy(normal(generator(source, form), 45, 90)).to(getattr(torch, source))
    wide[0, :4] = torch.tensor([0.0, -0.0, 6e-8, -1e-6]).to(wide.dtype)  # halves below the smallest normal
    wide[1, 0] = 1 + 2.0**-9  # a tie in bfloat16
    weight = pack(wide[:, :70], form)
    wanted = wide[:, :70].to(getattr(torch, form)).float().numpy()
    assert np.array_equal(bits(unpack(weight)), bits(wanted))


@pytest.mark.parametrize("kind", BLOCKS)
def test_gguf_blocks_are_unpacked_as_gguf_does(kind: str) -> None:
    rng = generator(kind)
    rows = gguf_rows(kind, 37, 96, rng)
    blocks = rows.reshape(37, 3, -1)
    # Also subnormal, zero and negative zero scales.
    blocks[0, :, :2] = np.array([[3, 0], [0, 0], [0, 0x80]], np.uint8)
    wanted = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[kind])
    weight = pack_blocks(rows, kind, 96)
    assert np.array_equal(bits(unpack(weight)), bits(wanted))
    assert weight.format == ("int8" if kind == "Q8_0" else "int4")
    assert weight.nbytes == 64 * 3 * BLOCKS[kind]  # as many bytes as the file has, for whole panels


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("source", FLOATS)
@pytest.mark.parametrize("form", [*FLOATS, "int8", "int4"])
def test_weights_that_are_not_finite_are_refused(form: str, source: str, bad: float) -> None:
    for row, column in [(0, 0), (32, 70), (33, 31)]:
        weight = torch.zeros(34, 71, dtype=getattr(torch, source))
        weight[row, column] = bad
        with pytest.raises(ValueError, match="finite"):
            pack(weight, form, 32)


def test_weights_beyond_the_range_of_a_format_are_refused() -> None:
    for form, value in [("int8", 1e7), ("int4", 1e6), ("float16", 1e5), ("bfloat16", 3.4e38)]:
        with pytest.raises(ValueError, match="finite"):
            pack(torch.full((3, 32), value), form, 32)
    with pytest.raises(ValueError, match="multiple of 32"):
        pack(torch.zeros(3, 64), "int8", 48)
    with pytest.raises(ValueError, match="unknown name"):
        pack(torch.zeros(3, 64), "int5")


def groups_of(weight: np.ndarray, group: int) -> list[np.ndarray]:
    return [weight[:, start : start + group] for start in range(0, weight.shape[1], group)]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    k=st.integers(1, 200),
    group=st.sampled_from([32, 64, 128, 0]),
    exponent=st.floats(-38, 4.5),  # beyond, an outlier's scale is too large for a half and refused
    outlier=st.sampled_from([0.0, 30.0]),
    seed=st.integers(0, 1000),
)
def test_int8_is_within_half_a_step(k: int, group: int, exponent: float, outlier: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weight = np.clip(normal(rng, 3, k), -6, 6) * np.float32(10.0**exponent)
    weight[0, k // 2] *= 1 + outlier
    got = unpack(pack(torch.from_numpy(weight), "int8", group))
    for part, back in zip(groups_of(weight, group or 256), groups_of(got, group or 256), strict=True):
        # Half a step; a scale rounded to a half is off by 2^-12, or by 2^-25 where halves are subnormal.
        step = np.abs(part).max(axis=1, keepdims=True).astype(np.float64) / 127
        assert (np.abs(part - back) <= 0.55 * step + 2.0**-24).all()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    k=st.integers(1, 200),
    group=st.sampled_from([32, 64, 128, 0]),
    has_min=st.booleans(),
    exponent=st.sampled_from([-30, -8, -3, 0, 3]),
    shift=st.sampled_from([0.0, 2.0]),
    seed=st.integers(0, 1000),
)
def test_int4_is_no_worse_than_rounding_to_the_range(
    k: int, group: int, has_min: bool, exponent: int, shift: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    weight = (normal(rng, 3, k) + np.float32(shift)) * np.float32(10.0**exponent)
    got = unpack(pack(torch.from_numpy(weight), "int4", group, has_min))
    assert np.isfinite(got).all()
    for part, back in zip(groups_of(weight, group or 256), groups_of(got, group or 256), strict=True):
        part = part.astype(np.float64)
        low, high = part.min(axis=1, keepdims=True), part.max(axis=1, keepdims=True)
        step = (high - low) / 15 if has_min else np.abs(part).max(axis=1, keepdims=True) / 7
        base = low if has_min else 0.0
        plain = base + np.rint((part - base) / np.where(step == 0, 1, step)) * step
        # Rounding the scale and the minimum to halves: 2^-12 of the largest weight, or 2^-25 for subnormals.
        slack = np.abs(part).max(axis=1) * 2.0**-10 + 16 * 2.0**-24
        error, wanted = (np.sqrt(np.square(part - x).mean(axis=1)) for x in (back, plain))
        if part.shape[1] % 8 == 0:  # else the packer counts the last weight more than once
            assert (error <= wanted + slack).all()
        assert (np.abs(part - back) <= 2.0 * step + slack[:, None]).all()


def test_formats_take_the_bytes_they_should() -> None:
    for (form, has_min), per_group in zip(INTEGERS, (32 + 2, 16 + 2, 16 + 4), strict=True):
        weight = pack(torch.ones(33, 65), form, 32, has_min)
        assert weight.nbytes == 64 * 3 * per_group  # 33 outputs are two panels, 65 inputs three groups
    # Pairs of inputs, padded to 32.
    assert pack(torch.ones(33, 65), "bfloat16").nbytes == 64 * 96 * 2
    assert pack(torch.ones(33, 65), "float16").nbytes == 64 * 65 * 2


# --- activations that are not finite ---


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("form", [*FLOATS, "int8", "int4", "int4 min"])
def test_what_is_not_finite_stays_in_its_row(form: str, bad: float) -> None:
    form, _, minimum = form.partition(" ")
    rng = generator(form, bad)
    weight = pack(torch.from_numpy(normal(rng, 40, 70)), form, 32, bool(minimum))
    x = normal(rng, 9, 70)
    x[4, 69] = bad
    others = [row for row in range(9) if row != 4]
    for machine in machines():
        got = multiply(weight, x, machine)
        assert not np.isfinite(got[4]).any()
        assert np.array_equal(bits(got[others]), bits(multiply(weight, x[others], machine)))
        assert not np.isfinite(multiply(weight, x[4:5], machine)).any()
        assert np.isfinite(got[others]).all()


@pytest.mark.parametrize("kind", BLOCKS)
def test_gguf_scales_that_are_not_finite_are_refused(kind: str) -> None:
    rows = gguf_rows(kind, 37, 96, generator(kind))
    rows.reshape(37, 3, -1)[36, 1, :2] = [0, 0x7C]  # infinity
    with pytest.raises(ValueError, match="finite"):
        pack_blocks(rows, kind, 96)


def test_only_int4_has_minima() -> None:
    with pytest.raises(ValueError, match="only int4 has minima"):
        pack(torch.ones(4, 32), "int8", 32, True)
