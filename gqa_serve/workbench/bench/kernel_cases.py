"""The cases of `bench kernel`: which kernel on which shape, what it must read and compute, and what it took.

Owns the account: K and V are read once a KV head, each block for all query heads of its group. Knows no
kernel and imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gqa_serve.workbench.bench.limits import Work
from gqa_serve.workbench.bench.measured import Measured
from gqa_serve.workbench.kernel_cost import Heads

Part = Literal["decode", "prefill", "linear"]


@dataclass(frozen=True)
class AttentionCase:
    """Attention of one layer. Decoding: one new token each of `batch_size` requests over `context_len`, that
    one included. Prefill: `batch_size` prompts of `context_len` new tokens, causal."""

    part: Part
    heads: Heads
    kv_dtype: str
    batch_size: int
    context_len: int

    def work(self, kv_token_bytes: int) -> Work:
        """`kv_token_bytes`: K and V of a token in one layer, as the cache holds them. Operations: q.k and
        p.v, a multiply-add is two, for every position that a query sees."""
        seen = self.context_len
        if self.part == "prefill":
            seen = self.context_len * (self.context_len + 1) // 2
        operations = 4 * self.heads.num_heads * self.heads.head_dim * seen * self.batch_size
        return Work(self.batch_size * self.context_len * kv_token_bytes, 0.0, operations)

    def __str__(self) -> str:
        return (
            f"{self.part}, {self.heads.num_heads}/{self.heads.num_kv_heads} heads of {self.heads.head_dim}, "
            f"{self.kv_dtype}, batch {self.batch_size}, {self.context_len:,} tokens"
        )


@dataclass(frozen=True)
class LinearCase:
    """x [T, inputs] times a matrix [outputs, inputs] held as `weights`."""

    name: str
    inputs: int
    outputs: int
    weights: str
    num_tokens: int

    @property
    def part(self) -> Part:
        return "linear"

    def work(self, matrix_bytes: int) -> Work:
        """`matrix_bytes`: the matrix as it is held, scales included."""
        return Work(matrix_bytes, 2 * self.num_tokens * self.inputs * self.outputs)

    def __str__(self) -> str:
        return f"{self.name} {self.weights}, {self.num_tokens} tokens"


KernelCase = AttentionCase | LinearCase


@dataclass(frozen=True)
class KernelResult:
    """Seconds of one call, a layer's, in every round, and its work."""

    case: KernelCase
    seconds: Measured
    work: Work
