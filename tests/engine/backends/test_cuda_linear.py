"""The CUDA backend's weights where Triton interprets: what becomes of a matrix, and what layers compute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

pytest.importorskip("triton")

from quantized_files import FORMATS, write_quantized
from tiny import tiny_model

from gqa_serve.engine.backends import cuda_linear
from gqa_serve.engine.backends.cuda_linear import (
    CudaWeights,
    Float8Linear,
    IntegerLinear,
    IntegerMatrix,
    InvariantLinear,
    PlainLinear,
    SplitLinear,
)
from gqa_serve.engine.weights.block_tensor import BlockTensor
from gqa_serve.engine.weights.checkpoint import open_checkpoint
from gqa_serve.engine.weights.quantized_matrix import QuantizedMatrix
from gqa_serve.errors import ConfigError

CPU = torch.device("cpu")
F8 = torch.float8_e4m3fn


def weights(
    quantization: str = "auto", dtype: torch.dtype = torch.float32, deterministic: bool = False
) -> CudaWeights:
    return CudaWeights(CPU, dtype, quantization, deterministic)


def random_matrix(n: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) / k**0.5


def blocks(matrix: torch.Tensor, kind: str) -> BlockTensor:
    rows = torch.from_numpy(gguf.quantize(matrix.numpy(), gguf.GGMLQuantizationType[kind]))
    return BlockTensor("t", kind, (matrix.shape[0], matrix.shape[1]), rows)


@pytest.mark.parametrize(
    ("quantization", "role", "packed_as"),
    [
        ("auto", "linear", "float32"), ("none", "head", "float32"), ("int8", "linear", "int8"),
        ("int8", "embedding", "int8"), ("int4", "linear", "int4"), ("int4", "head", "int8"),
        ("fp8", "linear", "fp8"), ("fp8", "head", "int8"), ("fp8", "embedding", "int8"),
    ],
)  # fmt: skip
def test_formats_of_plain_weights(quantization: str, role: Any, packed_as: str) -> None:
    matrix = random_matrix(20, 256)
    packed = weights(quantization).pack(matrix, role)
    assert packed.format == packed_as
    if packed_as == "float32":
        assert packed.nbytes == matrix.nbytes
        assert packed.tensor.data_ptr() != matrix.data_ptr()  # type: ignore[union-attr]
    else:
        assert packed.nbytes < matrix.nbytes / 3


@pytest.mark.parametrize(
    ("kind", "quantization", "role", "packed_as", "exact"),
    [
        ("Q8_0", "auto", "linear", "int8", True), ("Q4_0", "auto", "head", "int4", True),
        ("Q4_1", "auto", "linear", "int4", True), ("Q5_0", "auto", "linear", "int8", False),
        ("Q8_0", "none", "linear", "float32", True), ("Q4_0", "int4", "linear", "int4", True),
        ("Q4_0", "int4", "head", "int8", False), ("Q8_0", "int8", "head", "int8", True),
        ("Q8_0", "int4", "linear", "int4", False), ("Q4_1", "fp8", "linear", "fp8", False),
    ],
)  # fmt: skip
def test_formats_of_gguf_blocks(kind: str, quantization: str, role: Any, packed_as: str, exact: bool) -> None:
    tensor = blocks(random_matrix(24, 64), kind)
    made = weights(quantization)
    packed = made.pack(tensor, role)
    assert packed.format == packed_as
    identity = made.linear([packed], None)(torch.eye(64)).t()
    tolerance = 1e-6 if exact else 0.1 * float(tensor.dequantize().abs().max())
    torch.testing.assert_close(identity, tensor.dequantize(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", FORMATS)
def test_quantized_checkpoints_keep_their_numbers(tmp_path: Path, name: str) -> None:
    """What maps on a kernel is exact; groups of single inputs (desc_act) and blocks become int8."""
    meaning = write_quantized(tmp_path, tiny_model("llama", num_hidden_layers=1), name)
    made = weights()
    mapped = name not in ("gptq4 desc_act", "fp8 blocks")
    for key, tensor in open_checkpoint(tmp_path).tensors():
        if not key.endswith(("k_proj.weight", "down_proj.weight")):
            continue
        assert isinstance(tensor, QuantizedMatrix)
        packed = made.pack(tensor, "linear")
        bits = (
            "fp8"
            if name.startswith(("float8", "fp8 static"))
            else "int4"
            if "4" in name or name == "awq"
            else "int8"
        )
        assert packed.format == (bits if mapped else "int8")
        if packed.format == "fp8":
            assert torch.equal(packed.codes.float() * packed.scale[:, None], meaning[key])  # type: ignore[union-attr]
            continue
        identity = made.linear([packed], None)(torch.eye(meaning[key].shape[1])).t()
        tolerance = 1e-6 if mapped else 0.01 * float(meaning[key].abs().max())
        torch.testing.assert_close(identity, meaning[key], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("quantization", ["none", "int8", "int4", "fp8"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_parts_of_one_kind_are_one_product(quantization: str, deterministic: bool) -> None:
    sizes = (40, 24, 24)
    made = weights(quantization, deterministic=deterministic)
    parts = [made.pack(random_matrix(n, 96, seed), "linear") for seed, n in enumerate(sizes)]
    bias = torch.linspace(-1, 1, sum(sizes))
    layer = made.linear(parts, bias)
    plain = InvariantLinear if deterministic else PlainLinear
    assert type(layer) is {"none": plain, "fp8": Float8Linear}.get(quantization, IntegerLinear)
    x = random_matrix(5, 96, 9) * 10
    out = layer(x)
    stacked = torch.cat([random_matrix(n, 96, seed) for seed, n in enumerate(sizes)])
    exact = x @ stacked.t() + bias
    error = {"none": 1e-5, "int8": 0.01, "int4": 0.15, "fp8": 0.06}[quantization]
    assert (out - exact).abs().max() <= error * exact.abs().max()
    apart = torch.cat([made.linear([part], None)(x) for part in parts], dim=1) + bias
    torch.testing.assert_close(out, apart, rtol=1e-5, atol=1e-5)


def test_parts_that_differ_are_multiplied_apart() -> None:
    made = weights()
    parts = [
        made.pack(blocks(random_matrix(40, 64, 0), "Q4_0"), "linear"),
        made.pack(blocks(random_matrix(24, 64, 1), "Q8_0"), "linear"),
        made.pack(random_matrix(8, 64, 2), "linear"),
    ]
    bias = torch.linspace(-1, 1, 72)
    layer = made.linear(parts, bias)
    assert isinstance(layer, SplitLinear)
    x = random_matrix(3, 64, 3)
    apart = torch.cat([made.linear([part], None)(x) for part in parts], dim=1) + bias
    torch.testing.assert_close(layer(x), apart, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("ordered_dot")
@pytest.mark.parametrize("quantization", ["none", "int8", "int4", "fp8"])
def test_deterministic_layers_do_not_see_the_other_rows(quantization: str) -> None:
    made = weights(quantization, torch.float16, deterministic=True)
    layer = made.linear([made.pack(random_matrix(48, 160).half(), "linear")], None)
    x = random_matrix(70, 160, 1).half()
    whole = layer(x)
    assert not whole.isnan().any()
    for begin, end in ((0, 1), (3, 20), (40, 70)):
        assert torch.equal(layer(x[begin:end]), whole[begin:end])


def test_torch_multiplies_float8_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 and sizes in whole 16s; what it gives is what our kernel gives."""
    made = weights("fp8", torch.bfloat16)
    matrix = random_matrix(32, 64)
    layer = made.linear([made.pack(matrix, "linear")], torch.linspace(-1, 1, 32))
    assert isinstance(layer, Float8Linear)
    assert layer.library

    def twin(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> None:
        from gqa_serve.engine.kernels.triton.quantize import quantize_rows_twin

        quantize_rows_twin(x, codes, scale)

    monkeypatch.setattr(cuda_linear, "quantize_rows", twin)  # the interpreter does not know bfloat16 well
    x = random_matrix(5, 64, 1).bfloat16()
    codes, scale = torch.empty(5, 64, dtype=F8), torch.empty(5)
    twin(x, codes, scale)
    exact = (codes.double() * scale.double()[:, None]) @ (
        layer.matrix.codes.double() * layer.matrix.scale.double()[:, None]
    ).t() + torch.linspace(-1, 1, 32).double()
    torch.testing.assert_close(layer(x).double(), exact, rtol=0.01, atol=0.01)
    for other in (weights("fp8", torch.float16), weights("fp8", torch.bfloat16, True)):
        assert not other.linear([other.pack(matrix, "linear")], None).library  # type: ignore[attr-defined]
    odd = made.linear([made.pack(random_matrix(40, 24), "linear")], None)
    assert not odd.library  # type: ignore[attr-defined]


def capability(major: int, minor: int) -> Callable[[Any], tuple[int, int]]:
    return lambda device: (major, minor)


def test_gpus_without_float8_products(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability(8, 0))
    cuda = torch.device("cuda:0")
    with pytest.raises(
        ConfigError, match=r"needs a GPU of compute capability 8\.9 .* not 8\.0; use --quantization int8"
    ):
        CudaWeights(cuda, torch.bfloat16, "fp8", False)
    CudaWeights(cuda, torch.bfloat16, "auto", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability(8, 9))
    CudaWeights(cuda, torch.bfloat16, "fp8", False)
    monkeypatch.undo()
    write_quantized(tmp_path, tiny_model("llama", num_hidden_layers=1), "float8 channels")
    made = weights()
    made.__dict__["capability"] = (8, 0)
    formats = {
        made.pack(t, "linear").format
        for _, t in open_checkpoint(tmp_path).tensors()
        if isinstance(t, QuantizedMatrix)
    }
    assert formats == {"int8"}


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
@pytest.mark.parametrize("scale", [1.0, 5.3])
def test_embeddings_are_rows_of_the_head(quantization: str, scale: float) -> None:
    made = weights(quantization, torch.float16)
    matrix = random_matrix(50, 96).half()
    table = made.pack(matrix, "head")
    ids = torch.tensor([3, 49, 0, 3], dtype=torch.int32)
    rows = made.embed(table, ids, scale)
    assert (rows.dtype, rows.shape) == (torch.float16, (4, 96))
    rounded = float(torch.tensor(scale).half())
    error = 1e-3 if quantization == "none" else 0.01
    torch.testing.assert_close(rows.float(), matrix[ids.long()].float() * rounded, rtol=error, atol=error)
    head = made.linear([table], None)
    if isinstance(table, IntegerMatrix):
        assert head.weight is table.weight  # type: ignore[attr-defined]
    else:
        assert head.weight is table.tensor  # type: ignore[attr-defined, union-attr]


def test_numbers_that_are_not_finite_are_refused() -> None:
    matrix = random_matrix(4, 32)
    matrix[1, 1] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        weights("int8").pack(matrix, "linear")
