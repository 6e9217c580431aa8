"""The CUDA backend's weights: what a matrix of the checkpoint is packed into, and the layers made of it.

Owns the choice of a format for each matrix and of the product that computes with it. Kernels and their
layouts are in `kernels/triton/`; how codes and scales are chosen is `weights/quantize.py`'s business.
Invariant: the parts of a layer whose formats agree are one matrix and one product; every product can be
captured in a CUDA graph; with `deterministic` a row's bytes do not depend on the other rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import cast

import torch
import torch.nn.functional as F

from gqa_serve.engine.backends.base import Linear, Packed, Role
from gqa_serve.engine.kernels.triton.embedding import embed
from gqa_serve.engine.kernels.triton.matmul import matmul
from gqa_serve.engine.kernels.triton.quantize import quantize_rows
from gqa_serve.engine.kernels.triton.quantized_linear import GROUPS, Quantized, arrange, quantized_linear
from gqa_serve.engine.weights.quantize import quantize_fp8, quantize_int4, quantize_int8
from gqa_serve.engine.weights.quantized_matrix import GroupedTensor, QuantizedMatrix
from gqa_serve.errors import ConfigError

_FP8_CAPABILITY = (8, 9)


@dataclass(frozen=True, eq=False)
class PlainMatrix:
    """[n, k] in the model's dtype."""

    tensor: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    @property
    def format(self) -> str:
        return str(self.tensor.dtype).removeprefix("torch.")

    @property
    def kind(self) -> tuple[object, ...]:
        """Matrices of one kind can be one matrix."""
        return (PlainMatrix,)


@dataclass(frozen=True, eq=False)
class IntegerMatrix:
    """[n, k] in 8 or 4 bits."""

    weight: Quantized

    @property
    def nbytes(self) -> int:
        weight = self.weight
        tensors = (weight.codes, weight.scale, weight.zero, weight.minimum)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    @property
    def format(self) -> str:
        return f"int{self.weight.bits}"

    @property
    def kind(self) -> tuple[object, ...]:
        weight = self.weight
        extra = (weight.zero is None, None if weight.minimum is None else weight.minimum.dtype)
        return (IntegerMatrix, weight.bits, weight.group, weight.scale.dtype, *extra)


@dataclass(frozen=True, eq=False)
class Float8Matrix:
    """codes [n, k] float8_e4m3fn with a scale [n] per output."""

    codes: torch.Tensor
    scale: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes

    @property
    def format(self) -> str:
        return "fp8"

    @property
    def kind(self) -> tuple[object, ...]:
        return (Float8Matrix,)


CudaMatrix = PlainMatrix | IntegerMatrix | Float8Matrix


class PlainLinear:
    """cuBLAS, which may order its additions by the number of rows."""

    def __init__(self, matrix: PlainMatrix, bias: torch.Tensor | None) -> None:
        self.weight = matrix.tensor
        self.bias = None if bias is None else bias.to(matrix.tensor.dtype)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


class InvariantLinear:
    """The same product in an order that the number of rows does not change."""

    def __init__(self, matrix: PlainMatrix, bias: torch.Tensor | None) -> None:
        self.weight = matrix.tensor
        self.bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return matmul(x, self.weight, self.bias, x.new_empty(x.shape[0], self.weight.shape[0]))


class IntegerLinear:
    """Weights of 8 or 4 bits, activations as they are."""

    def __init__(self, matrix: IntegerMatrix, bias: torch.Tensor | None, deterministic: bool) -> None:
        self.weight = matrix.weight
        self.bias = bias
        self.deterministic = deterministic

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        out = x.new_empty(x.shape[0], self.weight.n)
        return quantized_linear(x, self.weight, self.bias, out, self.deterministic)


class Float8Linear:
    """Weights and, row by row, activations in float8; the scales of both multiply the sums.

    `library`: by torch, whose choice of an order is its own, else by our kernel.
    """

    def __init__(self, matrix: Float8Matrix, bias: torch.Tensor | None, library: bool) -> None:
        self.matrix = matrix
        self.bias = bias
        self.library = library

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        codes, scale = self.matrix.codes, self.matrix.scale
        x_codes = torch.empty_like(x, dtype=torch.float8_e4m3fn)
        x_scale = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
        quantize_rows(x, x_codes, x_scale)
        if not self.library:
            out = x.new_empty(x.shape[0], codes.shape[0])
            return matmul(x_codes, codes, self.bias, out, x_scale, scale)
        out = torch._scaled_mm(x_codes, codes.t(), x_scale[:, None], scale[None, :], out_dtype=x.dtype)
        return out if self.bias is None else out.add_(self.bias)


class SplitLinear:
    """Parts whose formats differ, each with a product of its own."""

    def __init__(self, parts: Sequence[Linear]) -> None:
        self.parts = list(parts)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([part(x) for part in self.parts], dim=1)


class CudaWeights:
    """Packs matrices, makes layers of them, and looks up embeddings.

    `dtype` is the model's, of activations and of weights that are not quantized; `quantization` as
    --quantization. Raises ConfigError for fp8 on a GPU that cannot multiply it.
    """

    def __init__(
        self, device: torch.device, dtype: torch.dtype, quantization: str, deterministic: bool
    ) -> None:
        self.device = device
        self.dtype = dtype
        self.quantization = quantization
        self.deterministic = deterministic
        if quantization == "fp8" and self.capability < _FP8_CAPABILITY:
            raise ConfigError(
                f"--quantization fp8 needs a GPU of compute capability 8.9 or higher (Ada, Hopper or later), "
                f"not {'.'.join(map(str, self.capability))}; use --quantization int8."
            )

    @cached_property
    def capability(self) -> tuple[int, int]:
        """The GPU's; where Triton interprets on a CPU, that of what can do everything."""
        return torch.cuda.get_device_capability(self.device) if self.device.type == "cuda" else (10, 0)

    # --- at load ---

    def pack(self, weight: torch.Tensor | QuantizedMatrix, role: Role) -> CudaMatrix:
        """Copy [n, k] to the device in the format that `quantization` says. Raises ValueError as
        `Backend.pack`.

        "auto": as the checkpoint has it, where one of our formats holds that exactly; other quantized
        matrices become int8 in groups of 32.
        """
        grouped = None if isinstance(weight, torch.Tensor) else weight.grouped(self.device)
        if grouped is not None and self._keeps(grouped, role):
            return self._pack_grouped(grouped)
        if isinstance(weight, torch.Tensor):
            numbers = weight
        else:
            numbers = weight.dequantize() if grouped is None else grouped.dequantize()
        asked = self._asked(weight, role)
        if asked is None:
            return PlainMatrix(numbers.to(self.device, self.dtype, copy=True))
        numbers = numbers.to(self.device)
        if asked == "fp8":
            return self._pack_grouped(quantize_fp8(numbers))
        if asked == "int4":
            return self._pack_grouped(quantize_int4(numbers, 32))
        return self._pack_grouped(quantize_int8(numbers, 32 if self.quantization == "auto" else 128))

    def _asked(self, weight: torch.Tensor | QuantizedMatrix, role: Role) -> str | None:
        """What to quantize to. The vocabulary's matrices stay at int8: they are where few bits cost most."""
        if self.quantization == "auto":
            return None if isinstance(weight, torch.Tensor) else "int8"
        if self.quantization == "none":
            return None
        return self.quantization if role == "linear" else "int8"

    def _keeps(self, grouped: GroupedTensor, role: Role) -> bool:
        """Whether a matrix stays as its checkpoint has it."""
        if self.quantization == "none" or not self._maps(grouped, role):
            return False
        name = f"int{grouped.bits}" if grouped.is_integer else "fp8"
        return self.quantization == "auto" or name == (self.quantization if role == "linear" else "int8")

    def _maps(self, grouped: GroupedTensor, role: Role) -> bool:
        """Whether one of our formats holds exactly these numbers."""
        if not grouped.is_integer:
            one_scale = grouped.group >= grouped.codes.shape[1]
            return one_scale and role == "linear" and self.capability >= _FP8_CAPABILITY
        return _served_group(grouped) is not None

    def _pack_grouped(self, grouped: GroupedTensor) -> CudaMatrix:
        """Numbers on the device, in a format that `_maps`."""
        if not grouped.is_integer:
            return Float8Matrix(grouped.codes.contiguous(), grouped.scale.float().reshape(-1).contiguous())
        group = _served_group(grouped)
        assert group is not None
        if group not in (0, grouped.group):
            grouped = grouped.in_groups_of(group)
        return IntegerMatrix(
            arrange(grouped.codes, grouped.scale, grouped.zero, grouped.minimum, grouped.bits, group)
        )

    def linear(self, parts: Sequence[Packed], bias: torch.Tensor | None) -> Linear:
        """One layer of matrices stacked along their outputs; bias [out] float32."""
        matrices = [cast("CudaMatrix", part) for part in parts]
        if len({matrix.kind for matrix in matrices}) == 1:
            return self._linear(_joined(matrices), bias)
        linears: list[Linear] = []
        first = 0
        for matrix in matrices:
            n = _outputs(matrix)
            linears.append(self._linear(matrix, None if bias is None else bias[first : first + n]))
            first += n
        return SplitLinear(linears)

    def _linear(self, matrix: CudaMatrix, bias: torch.Tensor | None) -> Linear:
        if isinstance(matrix, PlainMatrix):
            return InvariantLinear(matrix, bias) if self.deterministic else PlainLinear(matrix, bias)
        if isinstance(matrix, IntegerMatrix):
            return IntegerLinear(matrix, bias, self.deterministic)
        return Float8Linear(matrix, bias, self._library_multiplies(matrix))

    def _library_multiplies(self, matrix: Float8Matrix) -> bool:
        """torch._scaled_mm with scales by rows: for bfloat16, sizes in whole 16s, and GPUs that all releases
        have it for (Hopper, data-centre Blackwell)."""
        whole = all(size % 16 == 0 for size in matrix.codes.shape)
        served = (9, 0) <= self.capability < (12, 0)
        return whole and served and not self.deterministic and self.dtype == torch.bfloat16

    # --- in a step ---

    def embed(self, table: Packed, token_ids: torch.Tensor, scale: float) -> torch.Tensor:
        """Rows [T, E] of the table, times `scale` rounded to the model's dtype."""
        if isinstance(table, IntegerMatrix):
            out = torch.empty(token_ids.shape[0], table.weight.k, dtype=self.dtype, device=self.device)
            return embed(table.weight, token_ids, _rounded(scale, self.dtype), out)
        rows = F.embedding(token_ids, cast("PlainMatrix", table).tensor)
        return rows if scale == 1.0 else rows.mul_(_rounded(scale, self.dtype))


@cache
def _rounded(number: float, dtype: torch.dtype) -> float:
    return torch.tensor(number, dtype=dtype, device="cpu").item()


def _served_group(grouped: GroupedTensor) -> int | None:
    """The group that the kernels know these integers by (0: one scale for all), None if by none."""
    whole = grouped.group >= grouped.codes.shape[1]
    plain = grouped.zero is None and grouped.minimum is None
    if whole and plain and grouped.bits == 8:
        return 0
    if grouped.group in GROUPS:
        return grouped.group
    return GROUPS[-1] if whole or grouped.group % GROUPS[-1] == 0 else None


def _outputs(matrix: CudaMatrix) -> int:
    if isinstance(matrix, IntegerMatrix):
        return matrix.weight.n
    return (matrix.tensor if isinstance(matrix, PlainMatrix) else matrix.codes).shape[0]


def _joined(matrices: Sequence[CudaMatrix]) -> CudaMatrix:
    """Matrices of one kind as one, stacked along their outputs."""
    first = matrices[0]
    if len(matrices) == 1:
        return first
    if isinstance(first, PlainMatrix):
        return PlainMatrix(torch.cat([cast("PlainMatrix", matrix).tensor for matrix in matrices]))
    if isinstance(first, Float8Matrix):
        stacked = [cast("Float8Matrix", matrix) for matrix in matrices]
        codes = torch.cat([matrix.codes.view(torch.uint8) for matrix in stacked])
        return Float8Matrix(codes.view(torch.float8_e4m3fn), torch.cat([matrix.scale for matrix in stacked]))
    weights = [cast("IntegerMatrix", matrix).weight for matrix in matrices]

    def side_by_side(tensors: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
        present = [tensor for tensor in tensors if tensor is not None]
        return torch.cat(present, dim=1) if present else None

    return IntegerMatrix(
        weights[0]._replace(
            codes=torch.cat([weight.codes for weight in weights], dim=1),
            scale=torch.cat([weight.scale for weight in weights], dim=1),
            zero=side_by_side([weight.zero for weight in weights]),
            minimum=side_by_side([weight.minimum for weight in weights]),
            n=sum(weight.n for weight in weights),
        )
    )
