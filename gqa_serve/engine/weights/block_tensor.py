"""A matrix in the quantized blocks of its GGUF file.

Owns the bytes by rows and the way to numbers. Does not know what the matrix is for; a backend that computes
with blocks of this type reads `rows` or `grouped()`, any other calls `dequantize`. Imports no torch by
itself, like the rest of this package.
Invariant: rows are in Hugging Face's order, whatever order the file keeps them in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from gqa_serve.engine.weights.gguf_file import dequantize_blocks
from gqa_serve.engine.weights.quantized_matrix import GroupedTensor, QuantizedMatrix

if TYPE_CHECKING:
    import torch

_BLOCK = 32  # weights in a block of the types below


@dataclass(frozen=True, eq=False)
class BlockTensor(QuantizedMatrix):
    """`rows` [n, row_bytes] uint8 of a matrix [n, k]; they may alias a file mapping.

    `type` is ggml's name of the block format ("Q8_0", "Q4_K"), `name` the tensor's, for messages.
    """

    name: str
    type: str
    shape: tuple[int, int]
    rows: torch.Tensor

    def dequantize(self) -> torch.Tensor:
        """[n, k] float32. Raises UnsupportedModelError for a type the `gguf` library cannot dequantize."""
        import torch

        kind = GGMLQuantizationType[self.type]
        return torch.from_numpy(dequantize_blocks(self.rows.numpy(), kind, self.shape, self.name))

    def cut(self, rows: slice, columns: slice) -> QuantizedMatrix:
        """Blocks as they are; columns that begin or end within one are cut from the numbers instead."""
        size, size_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[self.type]]
        if columns.start % size or columns.stop % size:
            return super().cut(rows, columns)
        blocks = slice(columns.start // size * size_bytes, columns.stop // size * size_bytes)
        shape = rows.stop - rows.start, columns.stop - columns.start
        return BlockTensor(self.name, self.type, shape, self.rows[rows, blocks].contiguous())

    def grouped(self, device: torch.device) -> GroupedTensor | None:
        """Q8_0 (scale, 32 int8), Q4_0 and Q4_1 (scale, perhaps a minimum, 16 bytes: inputs i and i + 16)."""
        import torch

        halves = {"Q8_0": 1, "Q4_0": 1, "Q4_1": 2}.get(self.type)  # float16 numbers before the codes
        if halves is None:
            return None
        blocks = self.rows.to(device).view(self.shape[0], self.shape[1] // _BLOCK, -1)
        numbers = blocks[..., : 2 * halves].contiguous().view(torch.float16)  # [n, groups, halves]
        codes = blocks[..., 2 * halves :]
        if self.type == "Q8_0":
            codes = codes ^ 128  # two's complement, so that this adds 128
        else:
            codes = torch.cat((codes & 15, codes >> 4), dim=-1)
        minimum = numbers[..., 1] if halves == 2 else None
        bits = 8 if self.type == "Q8_0" else 4
        return GroupedTensor(bits, _BLOCK, codes.reshape(self.shape), numbers[..., 0], None, minimum)
