"""The quantized formats of the KV cache: how far numbers move, and what must never be written."""

from __future__ import annotations

import pytest
import torch

from gqa_serve.engine.kv_cache import KV_LIMIT, LARGEST, dequantize_kv, quantize_kv


def step_of(numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Distance between neighbours of the format at these numbers, float64."""
    if dtype == torch.int8:
        return torch.ones_like(numbers, dtype=torch.float64)
    exponent = torch.frexp(numbers.double().abs()).exponent - 1
    return torch.exp2((exponent.clamp(min=-6) - 3).double())  # 3 bits of mantissa


@pytest.mark.parametrize("dtype", LARGEST)
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_move_by_at_most_half_a_step(source: torch.dtype, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 3, 80, generator=generator)
    x = (x * torch.logspace(-4, 4, 40)[:, None, None]).to(source)
    numbers, scale = quantize_kv(x, dtype)
    assert (numbers.dtype, numbers.shape) == (dtype, x.shape)
    assert (scale.dtype, scale.shape) == (torch.float32, x.shape[:-1])
    torch.testing.assert_close(numbers.float().abs().amax(-1), torch.full((40, 3), LARGEST[dtype]))
    exact = x.double() / scale[..., None].double()
    half = step_of(exact.float(), dtype) / 2
    assert ((numbers.double() - exact).abs() <= half * (1 + 1e-4)).all()
    got = dequantize_kv(numbers, scale, torch.float32)
    relative = 0.5 / 127 if dtype == torch.int8 else 1 / 16
    assert ((got - x.float()).abs() <= x.float().abs().amax(-1, keepdim=True) * relative * 1.001).all()
    assert torch.equal(dequantize_kv(numbers, scale, source), got.to(source))


@pytest.mark.parametrize("dtype", LARGEST)
def test_ties_round_to_even(dtype: torch.dtype) -> None:
    largest = LARGEST[dtype]
    ties = {torch.int8: [0.5, 1.5, 2.5, -3.5], torch.float8_e4m3fn: [17.0, 19.0, 2.0**-10, -(2.0**-9) * 1.5]}
    even = {torch.int8: [0.0, 2.0, 2.0, -4.0], torch.float8_e4m3fn: [16.0, 20.0, 0.0, -(2.0**-8)]}
    numbers, scale = quantize_kv(torch.tensor([largest, *ties[dtype]]), dtype)
    assert scale == 1
    assert numbers.float().tolist() == [largest, *even[dtype]]


@pytest.mark.parametrize("dtype", LARGEST)
def test_whatever_is_written_is_finite(dtype: torch.dtype) -> None:
    inf, nan = torch.inf, torch.nan
    x = torch.tensor([[inf, -inf, nan, 1.0], [0.0, 0.0, -0.0, 0.0], [3e38, 1.0, 2.0, 3.0], [1e-45, 0, 0, 0]])
    numbers, scale = quantize_kv(x, dtype)
    back = dequantize_kv(numbers, scale, torch.float32)
    assert back.isfinite().all()
    assert scale[1] == 0
    torch.testing.assert_close(back[0, :3], torch.tensor([KV_LIMIT, -KV_LIMIT, 0.0]))
    torch.testing.assert_close(back[2, 0], torch.tensor(KV_LIMIT))
    assert back[1:4:2].abs().max() < 1e-40
