"""A matrix that its checkpoint holds in fewer bits, and the one form that all such matrices have.

Owns what every file format has in common: numbers of 8 or 4 bits with a scale per group of inputs. Does not
know file formats (each is a `QuantizedMatrix` of its own) or the layouts that backends compute with.
Invariant: `grouped` and `dequantize` say the same numbers, exactly those the checkpoint means.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class QuantizedMatrix(ABC):
    """A matrix [n, k] as its file holds it; the numbers may alias a file mapping.

    `name` is the tensor's, for messages.
    """

    name: str
    shape: tuple[int, int]

    @abstractmethod
    def grouped(self, device: torch.device) -> GroupedTensor | None:
        """The numbers by groups, unpacked on `device`; None for a format that is not made of such groups."""

    @abstractmethod
    def dequantize(self) -> torch.Tensor:
        """[n, k] float32, where the numbers are. Raises UnsupportedModelError where that is not known."""

    def cut(self, rows: slice, columns: slice) -> QuantizedMatrix:
        """The part of these rows and columns, each `slice(first, end)`."""
        return MatrixPart(self, rows, columns)


@dataclass(frozen=True, eq=False)
class MatrixPart(QuantizedMatrix):
    """Rows and columns of a matrix that is read whole."""

    source: QuantizedMatrix
    rows: slice
    columns: slice

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.source.name

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start

    def grouped(self, device: torch.device) -> GroupedTensor | None:
        whole = self.source.grouped(device)
        return None if whole is None else whole.cut(self.rows, self.columns)

    def dequantize(self) -> torch.Tensor:
        return self.source.dequantize()[self.rows, self.columns]


@dataclass(frozen=True, eq=False)
class GroupedTensor:
    """A matrix [n, k] of numbers that share scales by groups of `group` inputs, the last perhaps shorter.

    codes [n, k]    uint8 of `bits` bits, or float8_e4m3fn
    scale, zero, minimum [n, groups]    weight = scale * (code - zero), or scale * code + minimum

    Without `zero` (uint8) and `minimum` integers are symmetric around 2^(bits - 1); float8 has neither.
    """

    bits: int
    group: int
    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None = None
    minimum: torch.Tensor | None = None

    @property
    def is_integer(self) -> bool:
        return not self.codes.is_floating_point()

    def dequantize(self) -> torch.Tensor:
        """[n, k] float32."""
        numbers = self.codes.float()
        if self.minimum is not None:
            return numbers.mul_(self._by_input(self.scale)).add_(self._by_input(self.minimum))
        if self.zero is not None:
            numbers.sub_(self._by_input(self.zero))
        elif self.is_integer:
            numbers.sub_(float(1 << (self.bits - 1)))
        return numbers.mul_(self._by_input(self.scale))

    def in_groups_of(self, group: int) -> GroupedTensor:
        """The same numbers in groups of `group`, which divides their own, or theirs are all the inputs."""

        def repeated(values: torch.Tensor | None) -> torch.Tensor | None:
            if values is None:
                return None
            count = -(-min(self.group, self.codes.shape[1]) // group)
            return values.repeat_interleave(count, dim=1)[:, : -(-self.codes.shape[1] // group)]

        scale = repeated(self.scale)
        assert scale is not None
        return GroupedTensor(self.bits, group, self.codes, scale, repeated(self.zero), repeated(self.minimum))

    def cut(self, rows: slice, columns: slice) -> GroupedTensor:
        """The part of these rows and columns, in smaller groups where the columns begin or end within one."""
        k = self.codes.shape[1]
        own = min(self.group, k)
        end = 0 if columns.stop == k else columns.stop  # the last group may be short as it is
        group = math.gcd(own, columns.start, end)
        if group < own:
            return self.in_groups_of(group).cut(rows, columns)

        def part(values: torch.Tensor | None) -> torch.Tensor | None:
            first, end = columns.start // self.group, -(-columns.stop // self.group)
            return None if values is None else values[rows, first:end]

        scale = part(self.scale)
        assert scale is not None
        codes = self.codes[rows, columns]
        return GroupedTensor(self.bits, self.group, codes, scale, part(self.zero), part(self.minimum))

    def _by_input(self, values: torch.Tensor) -> torch.Tensor:
        """[n, groups] -> [n, k]."""
        k = self.codes.shape[1]
        return values.float().repeat_interleave(min(self.group, k), dim=1)[:, :k]
