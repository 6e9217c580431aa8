"""A part of a quantized matrix says the numbers that the whole says there, in every format."""

from __future__ import annotations

from dataclasses import dataclass

import gguf
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gqa_serve.engine.weights.block_tensor import BlockTensor
from gqa_serve.engine.weights.quantized_matrix import GroupedTensor, MatrixPart, QuantizedMatrix

CPU = torch.device("cpu")


def blocks(kind: str, n: int, k: int) -> BlockTensor:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(1))
    rows = torch.from_numpy(gguf.quantize(weight.numpy(), gguf.GGMLQuantizationType[kind]))
    return BlockTensor("t", kind, (n, k), rows)


@dataclass(frozen=True, eq=False)
class Grouped(QuantizedMatrix):
    """A matrix that a file would hold as these groups."""

    tensor: GroupedTensor
    name: str
    shape: tuple[int, int]

    def grouped(self, device: torch.device) -> GroupedTensor:
        return self.tensor

    def dequantize(self) -> torch.Tensor:
        return self.tensor.dequantize()


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0"])
@pytest.mark.parametrize(("columns", "is_blocks"), [(slice(32, 96), True), (slice(16, 128), False)])
def test_blocks_are_cut_where_they_begin(kind: str, columns: slice, is_blocks: bool) -> None:
    whole = blocks(kind, 6, 128)
    part = whole.cut(slice(2, 5), columns)
    assert isinstance(part, BlockTensor) == is_blocks
    assert part.shape == (3, columns.stop - columns.start)
    assert part.name == "t"
    expected = whole.dequantize()[2:5, columns]
    assert torch.equal(part.dequantize(), expected)
    grouped = part.grouped(CPU)
    assert (grouped is None) == (kind == "Q5_0")
    if grouped is not None:
        torch.testing.assert_close(grouped.dequantize(), expected, rtol=1e-6, atol=1e-9)


@given(st.data(), st.integers(1, 90), st.integers(1, 100), st.sampled_from(["zero", "minimum", "neither"]))
def test_groups_are_cut_anywhere(data: st.DataObject, k: int, group: int, extra: str) -> None:
    count = -(-k // group)
    generator = torch.Generator().manual_seed(k)
    codes = torch.randint(0, 16, (5, k), dtype=torch.uint8, generator=generator)
    zero = torch.randint(0, 16, (5, count), dtype=torch.uint8, generator=generator)
    numbers = GroupedTensor(
        4,
        group,
        codes,
        torch.rand(5, count, generator=generator),
        zero if extra == "zero" else None,
        torch.rand(5, count, generator=generator) if extra == "minimum" else None,
    )
    first = data.draw(st.integers(0, k - 1))
    columns = slice(first, data.draw(st.integers(first + 1, k)))
    whole = Grouped(numbers, "t", (5, k))
    part = whole.cut(slice(1, 4), columns)
    assert isinstance(part, MatrixPart)
    expected = whole.dequantize()[1:4, columns]
    assert torch.equal(part.dequantize(), expected)
    grouped = part.grouped(CPU)
    assert grouped is not None
    assert grouped.codes.shape == part.shape == (3, columns.stop - columns.start)
    assert torch.equal(grouped.dequantize(), expected)


def test_aligned_groups_stay_as_large_as_they_are() -> None:
    numbers = GroupedTensor(4, 32, torch.zeros(2, 96, dtype=torch.uint8), torch.ones(2, 3))
    part = numbers.cut(slice(0, 2), slice(32, 96))
    assert (part.group, part.scale.shape) == (32, (2, 2))
