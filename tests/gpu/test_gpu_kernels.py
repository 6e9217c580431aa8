"""The other kernels on a GPU, compiled, against their twins there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch

from gqa_serve.engine.backends.base import HeadNorms
from gqa_serve.engine.backends.cuda_linear import CudaWeights
from gqa_serve.engine.kernels.triton import activations, matmul, norms, quantize, rotary, sampling
from gqa_serve.engine.kv_cache import LARGEST, LayerKV
from gqa_serve.engine.model_config import Activation
from gqa_serve.engine.request import SamplingParams
from gqa_serve.engine.row_kernels import KernelRows
from gqa_serve.engine.sampler import TorchRows

DTYPES = [torch.bfloat16, torch.float16]
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 3e-3}


def close(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(got.float(), expected.float(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def random(gpu: torch.device, dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    generator = torch.Generator(gpu).manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator, device=gpu).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 4096), (300, 2048), (33, 576), (7, 14336)])
def test_norms(gpu: torch.device, rows: int, width: int, dtype: torch.dtype) -> None:
    draw = random(gpu, dtype)
    x, residual, weight = draw(rows, width), draw(rows, width), draw(width).float()
    nan = torch.full_like(x, torch.nan)
    close(
        norms.rms_norm(x, weight, 1e-5, nan.clone()), norms.rms_norm_twin(x, weight, 1e-5, nan.clone()), dtype
    )
    ours, theirs = residual.clone(), residual.clone()
    got = norms.add_rms_norm(x, ours, weight, 1e-5, 0.5, nan.clone())
    close(got, norms.add_rms_norm_twin(x, theirs, weight, 1e-5, 0.5, nan.clone()), dtype)
    close(ours, theirs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", get_args(Activation))
def test_activations(gpu: torch.device, activation: Activation, dtype: torch.dtype) -> None:
    gate_up = random(gpu, dtype)(65, 2 * 1536)
    nan = gate_up.new_full((65, 1536), torch.nan)
    got = activations.gated_activation(gate_up, activation, nan.clone())
    close(got, activations.gated_activation_twin(gate_up, activation, nan.clone()), dtype)


@pytest.mark.parametrize("kv_dtype", [*DTYPES, *LARGEST])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(128, 128), (64, 64), (80, 20), (256, 256), (96, 0)])
@pytest.mark.parametrize("normed", [False, True])
def test_rotation_and_write(
    gpu: torch.device, head_dim: int, rotary_dim: int, kv_dtype: torch.dtype, normed: bool
) -> None:
    """Both write the same bytes but for rounding; a token without a slot writes nothing."""
    dtype = kv_dtype if kv_dtype in DTYPES else torch.bfloat16
    draw, num_heads, num_kv_heads, tokens = random(gpu, dtype), 6, 2, 37
    qkv = draw(tokens, (num_heads + 2 * num_kv_heads) * head_dim)
    slots = torch.randperm(6 * 16, device=gpu)[:tokens].int()
    slots[3] = -1
    angle = draw(tokens, rotary_dim).float()
    angles = (angle.cos().contiguous(), angle.sin().contiguous()) if rotary_dim else None
    weights = (draw(head_dim).float() + 1, draw(head_dim).float() + 1)
    head_norms = HeadNorms("head", *weights, 1e-6) if normed else None
    results = []
    for run in (rotary.rotate_and_write, rotary.rotate_and_write_twin):
        k, v = (torch.zeros(6, num_kv_heads, 16, head_dim, device=gpu).to(kv_dtype) for _ in range(2))
        scales = [
            torch.zeros(6, num_kv_heads, 16, device=gpu) if kv_dtype in LARGEST else None for _ in range(2)
        ]
        q = qkv.new_full((tokens, num_heads, head_dim), torch.nan)
        run(qkv.clone(), q, LayerKV(k, v, *scales), slots, angles, head_norms)
        wide = [
            stored.float() if scale is None else stored.float() * scale[..., None]
            for stored, scale in zip((k, v), scales, strict=True)
        ]
        results.append((q, *wide))
    step = 0.15 if kv_dtype in LARGEST else 0.0  # one step of a quantized number
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got.float(), expected.float(), rtol=step + 2e-2, atol=step + 2e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 4096, 4096), (17, 576, 1536), (300, 1024, 576)])
def test_invariant_matmul(gpu: torch.device, rows: int, n: int, k: int, dtype: torch.dtype) -> None:
    draw = random(gpu, dtype)
    x, weight, bias = draw(rows, k), draw(n, k) / k**0.5, draw(n).float()
    out = matmul.matmul(x, weight, bias, x.new_full((rows, n), torch.nan))
    close(out, matmul.matmul_twin(x, weight, bias, torch.empty_like(out)), dtype)
    for begin in range(0, rows, 13):
        part = x[begin : begin + 13]
        alone = matmul.matmul(part, weight, bias, part.new_full((len(part), n), torch.nan))
        assert torch.equal(alone, out[begin : begin + 13])


@pytest.mark.parametrize("form", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("rows", [1, 5, 16, 100, 700])
def test_quantized_linears(gpu: torch.device, form: str, deterministic: bool, rows: int) -> None:
    """Near what the unquantized weights give: int4 is the coarsest. And exactly so, row for row."""
    if form == "fp8" and torch.cuda.get_device_capability(gpu) < (8, 9):
        pytest.skip("fp8 needs compute capability 8.9")
    draw = random(gpu, torch.bfloat16)
    weight, x = draw(2048, 1024), draw(rows, 1024) / 32
    weights = CudaWeights(gpu, torch.bfloat16, form, deterministic)
    linear = weights.linear([weights.pack(weight, "linear")], None)
    got, expected = linear(x).float(), x.float() @ weight.float().t()
    assert (got - expected).norm() / expected.norm() < {"int8": 0.02, "int4": 0.12, "fp8": 0.06}[form]
    if deterministic:
        assert torch.equal(linear(x[:1]).float(), got[:1])


def test_rows_to_fp8(gpu: torch.device) -> None:
    if torch.cuda.get_device_capability(gpu) < (8, 9):
        pytest.skip("fp8 needs compute capability 8.9")
    x = random(gpu, torch.bfloat16)(50, 1536)
    results = []
    for run in (quantize.quantize_rows, quantize.quantize_rows_twin):
        codes = torch.zeros(x.shape, device=gpu).to(torch.float8_e4m3fn)
        scale = torch.full((50,), torch.nan, device=gpu)
        run(x, codes, scale)
        results.append((codes.float() * scale[:, None], scale))
    torch.testing.assert_close(results[0][1], results[1][1])
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0.13, atol=0.0)


def test_rows_of_logits(gpu: torch.device) -> None:
    """Tokens of many draws; one may lie within rounding of its neighbour's."""
    generator = torch.Generator(gpu).manual_seed(0)
    logits = torch.randn(64, 128256, generator=generator, device=gpu) * 3
    logits[5, 100] = torch.nan
    kinds: list[dict[str, Any]] = [{}, {"top_k": 40}, {"top_p": 0.9}, {"min_p": 0.05}]
    kinds.append({"top_k": 50, "top_p": 0.8, "min_p": 0.01, "temperature": 0.7})
    rows = [row for row in range(64) if row != 5]
    params = [SamplingParams(**{"temperature": 1.0, **kinds[row % len(kinds)]}) for row in rows]
    units = [(row * 0.6180339) % 1 for row in rows]
    ours, theirs = KernelRows(sampling), TorchRows()
    assert torch.equal(ours.argmax(logits), theirs.argmax(logits))
    got, expected = (of.draw(logits, rows, params, units) for of in (ours, theirs))
    assert (got != expected).sum() <= 1
