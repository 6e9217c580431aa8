"""A matrix in the quantized blocks of its GGUF file.

Owns the bytes by rows and the way to float32. Does not know what the matrix is for; a backend that computes
with blocks of this type reads `rows`, any other calls `dequantize`. Imports no torch by itself, like the rest
of this package.
Invariant: rows are in Hugging Face's order, whatever order the file keeps them in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gguf.constants import GGMLQuantizationType

from gqa_serve.engine.weights.gguf_file import dequantize_blocks

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class BlockTensor:
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
