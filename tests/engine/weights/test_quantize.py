"""Quantizing at load: errors within what the bits allow, the native backend's choices, and refusals."""

from __future__ import annotations

import math

import gguf
import pytest
import torch

from gqa_serve.engine.backends import native_is_built
from gqa_serve.engine.weights.block_tensor import BlockTensor
from gqa_serve.engine.weights.quantize import quantize_fp8, quantize_int4, quantize_int8
from gqa_serve.engine.weights.quantized_matrix import GroupedTensor

CPU = torch.device("cpu")


def weight_of(n: int, k: int) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(n + k)) * 0.02


def by_group(error: torch.Tensor, group: int) -> torch.Tensor:
    """The largest error of each group, spread over its inputs."""
    parts = [part.abs().amax(1, keepdim=True).expand_as(part) for part in error.split(group, dim=1)]
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "k", "group"), [(3, 128, 128), (5, 200, 128), (7, 96, 32), (2, 33, 32)])
def test_int8_errs_by_half_a_step(n: int, k: int, group: int, dtype: torch.dtype) -> None:
    weight = weight_of(n, k).to(dtype)
    packed = quantize_int8(weight, group)
    assert packed.scale.shape == (n, math.ceil(k / group))
    step = by_group(weight.float(), group) / 127
    assert ((packed.dequantize() - weight.float()).abs() <= step * 0.502).all()


@pytest.mark.parametrize(("n", "k"), [(4, 128), (3, 77)])
def test_int4_is_better_than_spreading_from_least_to_largest(n: int, k: int) -> None:
    weight = weight_of(n, k)
    packed = quantize_int4(weight, 32)
    assert packed.minimum is not None
    error = (packed.dequantize() - weight).square().mean()
    plain = torch.empty_like(weight)
    for part, out in zip(weight.split(32, dim=1), plain.split(32, dim=1), strict=True):
        low, high = part.amin(1, keepdim=True), part.amax(1, keepdim=True)
        step = (high - low) / 15
        out.copy_(((part - low) / step).round() * step + low)
    assert error < 0.97 * (plain - weight).square().mean()


def test_groups_of_one_number_and_of_none() -> None:
    weight = torch.cat((torch.full((1, 32), 0.25), torch.zeros(1, 32), torch.full((1, 32), 1e-38)))
    for packed in (quantize_int4(weight, 32), quantize_int8(weight, 32)):
        torch.testing.assert_close(packed.dequantize(), weight, rtol=1e-3, atol=1e-7)
    assert quantize_fp8(torch.zeros(2, 16)).dequantize().eq(0).all()


def test_float8_errs_by_half_a_unit() -> None:
    weight = weight_of(6, 100)
    packed = quantize_fp8(weight)
    assert (packed.codes.dtype, packed.group, packed.scale.shape) == (torch.float8_e4m3fn, 100, (6, 1))
    error = (packed.dequantize() - weight).abs()
    assert (error <= torch.maximum(weight.abs() / 16, packed.scale * 2.0**-10) * 1.001).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite_are_refused(value: float) -> None:
    weight = weight_of(4, 64)
    weight[2, 5] = value
    for quantize in (lambda w: quantize_int8(w, 32), lambda w: quantize_int4(w, 32), quantize_fp8):
        with pytest.raises(ValueError, match="not finite"):
            quantize(weight)
    with pytest.raises(ValueError, match="too large"):
        quantize_int8(torch.full((1, 32), 1e20), 32)


def test_rows_are_quantized_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weight_of(9, 64)
    whole = quantize_int4(weight, 32)
    monkeypatch.setattr("gqa_serve.engine.weights.quantize._AT_ONCE", 128)
    parts = quantize_int4(weight, 32)
    assert torch.equal(whole.codes, parts.codes)
    assert torch.equal(whole.scale, parts.scale)


@pytest.mark.parametrize("bits", [8, 4])
def test_the_choices_are_those_of_the_native_backend(bits: int) -> None:
    if not native_is_built():
        pytest.skip("the native backend was not built")
    from gqa_serve.engine.backends.cpu import CpuBackend

    weight = weight_of(32, 256)
    backend = CpuBackend(dtype=torch.float32, quantization=f"int{bits}")
    packed = backend.pack(weight, "linear")
    theirs = torch.empty(32, 256)
    packed.unpack(0, 32, theirs.data_ptr())  # type: ignore[attr-defined]
    ours = (quantize_int8(weight, 128) if bits == 8 else quantize_int4(weight, 32)).dequantize()
    differ = (ours - theirs).abs() > 1e-6
    assert differ.float().mean() < 0.005  # ties between candidates, and sums in another order


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_blocks_of_gguf_files_are_groups(kind: str) -> None:
    weight = weight_of(6, 96)
    rows = torch.from_numpy(gguf.quantize(weight.numpy(), gguf.GGMLQuantizationType[kind]))
    tensor = BlockTensor("t", kind, (6, 96), rows)
    grouped = tensor.grouped(CPU)
    assert grouped is not None
    assert (grouped.group, grouped.bits) == (32, 8 if kind == "Q8_0" else 4)
    torch.testing.assert_close(grouped.dequantize(), tensor.dequantize(), rtol=1e-6, atol=1e-9)


def test_other_blocks_of_gguf_files_are_not() -> None:
    assert BlockTensor("t", "Q5_0", (1, 32), torch.zeros(1, 22, dtype=torch.uint8)).grouped(CPU) is None


@pytest.mark.parametrize(("k", "group", "finer"), [(300, 300, 128), (640, 256, 128), (512, 512, 128)])
def test_finer_groups_hold_the_same_numbers(k: int, group: int, finer: int) -> None:
    codes = torch.randint(0, 16, (5, k), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    count = math.ceil(k / group)
    zero = torch.randint(0, 16, (5, count), dtype=torch.uint8)
    coarse = GroupedTensor(4, group, codes, torch.rand(5, count), zero)
    fine = coarse.in_groups_of(finer)
    assert fine.scale.shape == (5, math.ceil(k / finer))
    assert torch.equal(fine.dequantize(), coarse.dequantize())
