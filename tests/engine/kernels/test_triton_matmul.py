"""The batch-invariant product against its twin, float64, and itself among other rows."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from gqa_serve.engine.kernels.triton.matmul import matmul, matmul_twin

F8 = torch.float8_e4m3fn


def operands(
    rows: int, n: int, k: int, dtype: torch.dtype, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, k, generator=generator).to(dtype)
    return x, (torch.randn(n, k, generator=generator) / k**0.5).to(dtype)


def poisoned(rows: int, n: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full((rows, n), torch.nan, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 1, 1), (3, 70, 33), (65, 64, 128), (33, 130, 300)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_its_twin_and_float64(rows: int, n: int, k: int, dtype: torch.dtype, with_bias: bool) -> None:
    x, weight = operands(rows, n, k, dtype)
    bias = torch.linspace(-1, 1, n) if with_bias else None
    out = matmul(x, weight, bias, poisoned(rows, n, dtype))
    exact = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    error = 2e-6 if dtype == torch.float32 else 2e-3
    torch.testing.assert_close(out.double(), exact, rtol=error, atol=error)
    twin = matmul_twin(x, weight, bias, poisoned(rows, n, dtype))
    torch.testing.assert_close(out, twin, rtol=error, atol=error)


def test_rows_of_a_wider_tensor() -> None:
    x, weight = operands(5, 40, 64, torch.float32)
    wide = torch.full((5, 100), torch.nan)
    wide[:, :64] = x
    out = poisoned(5, 50, torch.float32)
    matmul(wide[:, :64], weight, None, out[:, 3:43])
    torch.testing.assert_close(out[:, 3:43], x @ weight.t(), rtol=1e-5, atol=1e-5)
    assert out[:, :3].isnan().all()
    assert out[:, 43:].isnan().all()


def test_scales_multiply_rows_and_columns() -> None:
    x, weight = operands(7, 24, 160, torch.float32)
    x8, weight8 = x.to(F8), weight.to(F8)
    x_scale, weight_scale = torch.rand(7) + 0.5, torch.rand(24) + 0.5
    bias = torch.randn(24)
    out = matmul(x8, weight8, bias, poisoned(7, 24, torch.float16), x_scale, weight_scale)
    exact = (x8.double() * x_scale.double()[:, None]) @ (
        weight8.double() * weight_scale.double()[:, None]
    ).t()
    torch.testing.assert_close(out.double(), exact + bias.double(), rtol=2e-3, atol=2e-3)
    twin = matmul_twin(x8, weight8, bias, poisoned(7, 24, torch.float16), x_scale, weight_scale)
    torch.testing.assert_close(out, twin, rtol=2e-3, atol=2e-3)


@pytest.mark.usefixtures("ordered_dot")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_row_does_not_depend_on_the_others(dtype: torch.dtype) -> None:
    x, weight = operands(67, 33, 200, dtype)
    whole = matmul(x, weight, None, poisoned(67, 33, dtype))
    for begin, end in ((0, 1), (5, 8), (30, 67), (66, 67)):
        part = matmul(x[begin:end], weight, None, poisoned(end - begin, 33, dtype))
        assert torch.equal(part, whole[begin:end])
    others = x.clone()
    others[1:] = torch.nan
    assert torch.equal(matmul(others, weight, None, poisoned(67, 33, dtype))[0], whole[0])


def test_no_rows() -> None:
    _, weight = operands(1, 8, 8, torch.float32)
    assert matmul(torch.empty(0, 8), weight, None, torch.empty(0, 8)).shape == (0, 8)
