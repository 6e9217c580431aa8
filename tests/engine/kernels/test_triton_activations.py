"""Gated activation kernels against their twin and against float64 arithmetic."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch

pytest.importorskip("triton")

from gqa_serve.engine.kernels.triton.activations import gated_activation, gated_activation_twin
from gqa_serve.engine.model_config import Activation

TOLERANCE = {torch.float32: 5e-6, torch.float16: 2e-3}


def exact(gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
    gate, up = gate_up.double().chunk(2, dim=-1)
    if activation == "silu":
        return gate / (1 + (-gate).exp()) * up
    if activation == "gelu":
        return gate * (1 + (gate / math.sqrt(2)).erf()) / 2 * up
    return gate * (1 + (math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)).tanh()) / 2 * up


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("activation", get_args(Activation))
@pytest.mark.parametrize("width", [1, 3, 96, 1024, 1536, 2050])
def test_gated_activation(width: int, activation: Activation, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(width)
    gate_up = (torch.randn(3, 2 * width, generator=generator) * 4).to(dtype)
    poison = torch.full((3, width), torch.nan, dtype=dtype)
    got = gated_activation(gate_up, activation, poison.clone())
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(got.double(), exact(gate_up, activation), atol=tolerance, rtol=tolerance)
    twin = gated_activation_twin(gate_up, activation, poison.clone())
    torch.testing.assert_close(got, twin, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("activation", get_args(Activation))
def test_far_from_zero_it_is_the_gate_or_nothing(activation: Activation) -> None:
    gate_up = torch.tensor([[-1e4, -200.0, 0.0, 200.0, 1e4] + [1.0] * 5])
    got = gated_activation(gate_up, activation, torch.full((1, 5), torch.nan))
    assert got.tolist() == [[0.0, 0.0, 0.0, 200.0, 1e4]]


def test_rows_may_lie_apart() -> None:
    wide = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    out = torch.full((4, 40), torch.nan)
    gated_activation(wide[:, :20], "silu", out[:, 5:15])
    torch.testing.assert_close(out[:, 5:15].double(), exact(wide[:, :20], "silu"), atol=2e-6, rtol=2e-6)
    assert out[:, :5].isnan().all()
    assert out[:, 15:].isnan().all()
