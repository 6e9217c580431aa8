"""RMSNorm kernels against their twins and against float64 arithmetic."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from gqa_serve.engine.kernels.triton.norms import (
    add_rms_norm,
    add_rms_norm_twin,
    config,
    rms_norm,
    rms_norm_twin,
)

WIDTHS = [1, 2, 64, 80, 100, 576, 1000, 2048]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3}
EPS = 1e-5


def random_rows(rows: int, width: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(-2, 2, rows)[:, None]
    return (torch.randn(rows, width, generator=generator) * scales).to(dtype)


def poisoned(rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full((rows, width), torch.nan, dtype=dtype)


def exact(x: torch.Tensor, weight: torch.Tensor, eps: float = EPS) -> torch.Tensor:
    wide = x.double()
    return wide / (wide.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def check(got: torch.Tensor, twin: torch.Tensor, wanted: torch.Tensor) -> None:
    tolerance = TOLERANCE[got.dtype]
    torch.testing.assert_close(got, twin, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(got.double(), wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm(width: int, dtype: torch.dtype) -> None:
    x, weight = random_rows(5, width, dtype), random_rows(1, width, torch.float32, 1)[0]
    before = x.clone()
    got = rms_norm(x, weight, EPS, poisoned(5, width, dtype))
    check(got, rms_norm_twin(x, weight, EPS, poisoned(5, width, dtype)), exact(x, weight))
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rows_of_a_wider_matrix_in_place(dtype: torch.dtype) -> None:
    """As queries lie between keys and values; what is beside them stays as it is."""
    wide, weight = random_rows(4, 300, dtype), random_rows(1, 96, torch.float32, 1)[0]
    before = wide.clone()
    part = wide[:, 100:196]
    assert rms_norm(part, weight, EPS, part) is part
    check(part, rms_norm_twin(before[:, 100:196], weight, EPS, poisoned(4, 96, dtype)),
          exact(before[:, 100:196], weight))  # fmt: skip
    assert torch.equal(wide[:, :100], before[:, :100])
    assert torch.equal(wide[:, 196:], before[:, 196:])


@pytest.mark.parametrize("scale", [1.0, 0.22])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width", WIDTHS)
def test_add_rms_norm(width: int, dtype: torch.dtype, scale: float) -> None:
    x, residual = random_rows(3, width, dtype), random_rows(3, width, dtype, 1)
    weight = random_rows(1, width, torch.float32, 2)[0]
    sum_, twins = (residual.double() + scale * x.double()), residual.clone()
    twin = add_rms_norm_twin(x, twins, weight, EPS, scale, poisoned(3, width, dtype))
    out = poisoned(3, width, dtype)
    assert add_rms_norm(x, residual, weight, EPS, scale, out) is out
    check(residual, twins, sum_)
    # The norm is of the stream as it is stored, rounded.
    check(out, twin, exact(residual, weight))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_without_a_weight_the_stream_is_returned(dtype: torch.dtype) -> None:
    x, residual = random_rows(3, 80, dtype), random_rows(3, 80, dtype, 1)
    sum_, twins = (residual.double() + 0.5 * x.double()), residual.clone()
    assert add_rms_norm(x, residual, None, EPS, 0.5, None) is residual
    check(residual, add_rms_norm_twin(x, twins, None, EPS, 0.5, None), sum_)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    x, weight = random_rows(6, 1000, torch.float32), torch.ones(1000)
    together = rms_norm(x, weight, EPS, torch.empty_like(x))
    for row in range(6):
        alone = rms_norm(x[row : row + 1], weight, EPS, torch.empty(1, 1000))
        assert torch.equal(alone[0], together[row])


def test_a_tile_holds_a_row() -> None:
    for width in (*WIDTHS, 5120, 8192, 16384):
        tile = config(width)
        assert width <= tile.block < 2 * width
        assert tile.num_warps in (1, 2, 4, 8, 16)
