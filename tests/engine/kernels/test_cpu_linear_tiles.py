"""Products of bfloat16 weights on AMX tiles, to the last bit and against float64.

Expected values are the arithmetic that linear_amx_float.inl documents, written in numpy: a float32 activation
is three bfloat16 numbers, and the products of 32 inputs with each are summed and added one after the other.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from native_calls import LEVELS, Machine, bits, fma, multiply, pack, set_bias, unpack

pytestmark = pytest.mark.skipif("amx" not in LEVELS, reason="this processor has no AMX, or nothing is built")

TILES = Machine("amx", 1)
SMALLEST = 2.0**-126  # magnitudes below count as zero


def make(seed: int, n: int, k: int, rows: int) -> tuple[Any, np.ndarray, np.ndarray]:
    """A packed matrix, its values, and activations."""
    rng = np.random.default_rng(seed)
    weight = pack(torch.from_numpy(rng.standard_normal((n, k)).astype(np.float32)).bfloat16(), "bfloat16")
    return weight, unpack(weight), rng.standard_normal((rows, k)).astype(np.float32)


def split(x: np.ndarray) -> list[np.ndarray]:
    """x as the sum of three numbers of 8 bits each."""
    parts = []
    for _ in range(3):
        parts.append((np.ascontiguousarray(x).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32))
        x = x - parts[-1]
    assert not x.any()
    return parts


def tile_product(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """No number below the smallest normal one may occur."""
    missing = -x.shape[1] % 32
    x, weight = np.pad(x, ((0, 0), (0, missing))), np.pad(weight, ((0, 0), (0, missing)))
    total = np.zeros((len(x), len(weight)), np.float32)
    parts = split(x)
    for step in range(0, x.shape[1], 32):
        for part in parts:
            sums = [np.zeros_like(total), np.zeros_like(total)]
            for i in range(32):
                sums[i % 2] = fma(part[:, step + i, None], weight[None, :, step + i], sums[i % 2])
            total = total + (sums[0] + sums[1])
    return total


def exact(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    product: np.ndarray = x.astype(np.float64) @ weight.T.astype(np.float64)
    return product


def check_error(got: np.ndarray, x: np.ndarray, weight: np.ndarray) -> None:
    """Within the bound that float32 sums one after the other have in test_cpu_linear.py."""
    bound = 1e-6 * np.sqrt(x.shape[1]) * np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(weight, axis=1)
    assert (np.abs(got - exact(x, weight)) <= bound).all()


@pytest.mark.parametrize("k", [1, 2, 31, 32, 33, 63, 64, 300, 1027])
@pytest.mark.parametrize("n", [1, 31, 33, 64])
def test_the_documented_sums(n: int, k: int) -> None:
    for rows in (1, 5, 16, 17, 33):
        weight, values, x = make(rows, n, k, rows)
        wanted = tile_product(x, values)
        for threads in (1, 3):
            assert np.array_equal(bits(multiply(weight, x, Machine("amx", threads))), bits(wanted))
        check_error(wanted, x, values)
        bias = values[:, 0].copy()
        set_bias(weight, bias)
        assert np.array_equal(bits(multiply(weight, x, TILES)), bits(wanted + bias))


@pytest.mark.parametrize(("n", "k"), [(33, 33), (70, 576), (40, 2049)])
def test_a_row_does_not_depend_on_the_others(n: int, k: int) -> None:
    """Also where a panel is cut into chunks, and rows into several tiles and blocks."""
    weight, values, x = make(0, n, k, 200)
    alone = np.concatenate([multiply(weight, row[None], TILES) for row in x])
    check_error(alone, x, values)
    for rows in [*range(2, 41), 64, 65, 96, 97, 113, 200]:
        for threads in (1, 2):
            got = multiply(weight, x[-rows:], Machine("amx", threads))
            assert np.array_equal(bits(got), bits(alone[-rows:])), (rows, threads)


@pytest.mark.parametrize("size", [1e30, 1e-30, 3e38, 2.0**-126])
def test_an_input_of_any_size(size: float) -> None:
    """One input far from the others, and all of them."""
    weight, values, x = make(3, 40, 70, 20)
    values = values * np.float32(2.0**-8)  # so that no sum overflows
    weight = pack(torch.from_numpy(values), "bfloat16")
    one, all_of_them = x.copy(), (x * 0.25 * size).astype(np.float32)
    one[::2, 69] = size
    for inputs in (one, np.clip(all_of_them, -3e38, 3e38)):
        got = multiply(weight, inputs, TILES)
        assert np.isfinite(got).all()
        norms = np.linalg.norm(inputs.astype(np.float64), axis=1)[:, None] * np.linalg.norm(values, axis=1)
        # Parts of an input and products may be lost below the smallest number.
        lost = 3 * 70 * SMALLEST * (1 + np.abs(values).max())
        assert (np.abs(got - exact(inputs, values)) <= 1e-5 * norms + lost).all()


def test_numbers_below_the_smallest_normal_one_count_as_zero() -> None:
    weight, _, x = make(4, 40, 64, 3)
    x[1] = np.float32(1e-40)
    assert not multiply(weight, x, TILES)[1].any()
    tiny = pack(torch.full((5, 64), 1e-40).bfloat16(), "bfloat16")
    assert (unpack(tiny) > 0).all()
    assert not multiply(tiny, x, TILES).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, np.uint32(0x7F800001).view(np.float32)])
def test_what_is_not_finite_stays_in_its_row(bad: float) -> None:
    """Also a NaN whose first 16 bits are those of an infinity, and weights of zero."""
    weight, values, x = make(5, 40, 70, 40)
    values[7] = 0.0
    weight = pack(torch.from_numpy(values), "bfloat16")
    wanted = multiply(weight, x, TILES)
    for row in (0, 16, 20, 39):
        spoilt = x.copy()
        spoilt[row, 69] = bad
        for got in (multiply(weight, spoilt, TILES), multiply(weight, spoilt, Machine("amx", 3))):
            assert not np.isfinite(got[row]).any()
            others = np.arange(40) != row
            assert np.array_equal(bits(got[others]), bits(wanted[others]))
        assert not np.isfinite(multiply(weight, spoilt[row : row + 1], TILES)).any()
