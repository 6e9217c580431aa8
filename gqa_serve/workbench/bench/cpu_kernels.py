"""The native kernels alone: programs of nothing but attention, or nothing but a matrix product.

Owns how such a program is made and run. A program goes through enough layers (or copies of the matrix) that
what it reads is several times the last processor cache: else it would measure that. K and V are written
first. Times are of one layer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch

from gqa_serve.engine.batch import PlanRow
from gqa_serve.workbench.bench.kernel_cases import AttentionCase, LinearCase
from gqa_serve.workbench.bench.kv_fill import random_table, run_program, writing_program

BLOCK = 16
_MAX_LAYERS = 2**14  # of a case so small that more would only take time to write
_CHUNK = 2048  # tokens of the table that queries and inputs are taken from
GROUPS = {"int8": (128, False), "int4": (32, True)}  # weights that share a scale, and whether a minimum

Clock = Callable[[], float]


class NativeAttention:
    """A cache filled for a case, and its program. `min_bytes`: of the whole cache."""

    def __init__(self, native: Any, isa: str, threads: int, case: AttentionCase, min_bytes: int) -> None:
        self.case = case
        heads = case.heads
        self._blocks_each = -(-case.context_len // BLOCK)
        block_bytes = native.KVCache.block_bytes(case.kv_dtype, heads.num_kv_heads, heads.head_dim, BLOCK)
        self.token_bytes: int = block_bytes // BLOCK
        """K and V of a token in one layer."""
        num_blocks = self._blocks_each * case.batch_size
        wanted = math.ceil(min_bytes / (num_blocks * block_bytes)) if case.part == "decode" else 1
        self.layers = max(1, min(_MAX_LAYERS, wanted))
        self._cache = native.KVCache(
            self.layers, num_blocks, case.kv_dtype, heads.num_kv_heads, heads.head_dim, BLOCK
        )
        self._width = heads.num_heads * heads.head_dim
        self._fill(native, isa, threads)
        self._program, self._out = self._attending(native, isa, threads)
        self._rows = [self._row(number) for number in range(case.batch_size)]

    def _fill(self, native: Any, isa: str, threads: int) -> None:
        heads = self.case.heads
        program, out = writing_program(
            native, isa, threads, self.layers, heads.num_heads, heads.num_kv_heads, heads.head_dim
        )
        for request in range(self.case.batch_size):
            for begin in range(0, self.case.context_len, _CHUNK):
                count = min(_CHUNK, self.case.context_len - begin)
                row = PlanRow([*range(count)], begin, self._blocks(request), 1)
                run_program(program, self._cache, out, [row], self._width)

    def _attending(self, native: Any, isa: str, threads: int) -> tuple[Any, int]:
        heads = self.case.heads
        program = native.Program(isa, threads)
        q, out = program.add_value(self._width), program.add_value(self._width)
        program.embed(random_table(native, self._width), q, 1.0)
        for layer in range(self.layers):
            program.attend(
                layer,
                q,
                out,
                heads.num_heads,
                heads.num_kv_heads,
                heads.head_dim,
                heads.head_dim**-0.5,
                0.0,
                0,
            )
        return program, out

    def _blocks(self, request: int) -> list[int]:
        return list(range(request * self._blocks_each, (request + 1) * self._blocks_each))

    def _row(self, request: int) -> PlanRow:
        """Prefill asks for every row's result, so that none is left out of the last layer."""
        length, blocks = self.case.context_len, self._blocks(request)
        if self.case.part == "decode":
            return PlanRow([request % _CHUNK], length - 1, blocks, 1)
        return PlanRow([token % _CHUNK for token in range(length)], 0, blocks, length)

    def run(self) -> torch.Tensor:
        """The last layer's result [R, H * D]: of each request, or of each token of the prompts."""
        return run_program(self._program, self._cache, self._out, self._rows, self._width)

    def seconds(self, min_s: float, now: Clock = time.perf_counter) -> float:
        """Of one layer, over at least `min_s` of repetitions."""
        return repeated(self.run, min_s, now) / self.layers


class NativeLinear:
    """Copies of a matrix, and the program that multiplies with them all."""

    def __init__(self, native: Any, isa: str, threads: int, case: LinearCase, min_bytes: int) -> None:
        self.case = case
        source = torch.randn(case.outputs, case.inputs, generator=torch.Generator().manual_seed(0))
        source.mul_(case.inputs**-0.5)
        group, has_min = GROUPS.get(case.weights, (0, False))
        packer = native.Packer(threads)

        def pack() -> Any:
            return packer.pack(
                source.data_ptr(), "float32", *source.shape, case.inputs, case.weights, group, has_min
            )

        parts = [pack()]
        self.matrix_bytes: int = parts[0].nbytes
        self.layers: int = max(1, min(_MAX_LAYERS, math.ceil(min_bytes / self.matrix_bytes)))
        parts += [pack() for _ in range(self.layers - 1)]
        program = native.Program(isa, threads)
        x, self._out = program.add_value(case.inputs), program.add_value(case.outputs)
        program.embed(random_table(native, case.inputs), x, 1.0)
        for part in parts:
            program.linear([part], x, self._out)
        self._program = program
        num_blocks = -(-case.num_tokens // BLOCK)
        self._cache = native.KVCache(1, num_blocks, "float32", 1, BLOCK, BLOCK)
        tokens = [token % _CHUNK for token in range(case.num_tokens)]
        self._rows = [PlanRow(tokens, 0, list(range(num_blocks)), case.num_tokens)]

    def run(self) -> torch.Tensor:
        """The product [T, outputs]."""
        return run_program(self._program, self._cache, self._out, self._rows, self.case.outputs)

    def seconds(self, min_s: float, now: Clock = time.perf_counter) -> float:
        """Of one product, over at least `min_s` of repetitions."""
        return repeated(self.run, min_s, now) / self.layers


def repeated(run: Callable[[], object], min_s: float, now: Clock) -> float:
    """Seconds of one call, the mean of as many as take `min_s`."""
    start, count = now(), 0
    while True:
        run()
        count += 1
        elapsed = now() - start
        if elapsed >= min_s:
            return elapsed / count
