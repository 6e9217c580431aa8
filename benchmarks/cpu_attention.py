"""Attention alone: decoding one token per request over a long context, in the shape of Llama 3.2 1B.

A program of nothing but attention runs over a cache of enough layers to be several times the last processor
cache. K and V are written first by a program that rotates and writes and attends to nothing. The limit is the
read bandwidth over the bytes of K and V, counted once for the G query heads of a group.
"""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any

import torch
from cpu_limits import Report, Result

from gqa_serve.engine.batch import PlanRow
from gqa_serve.engine.kernels.cpu import load

HEADS, KV_HEADS, HEAD_DIM, BLOCK = 32, 8, 64, 16
_MAX_LAYERS = 16
_CHUNK = 2048  # tokens written at once
_MIN_S = 0.3  # of a round


@dataclasses.dataclass
class Bench:
    """A cache filled for `batch` requests of `context` tokens."""

    native: Any
    isa: str
    threads: int
    kv_dtype: str
    batch: int
    context: int
    min_bytes: int

    def __post_init__(self) -> None:
        self.blocks_each = -(-self.context // BLOCK)
        block_bytes = self.native.KVCache.block_bytes(self.kv_dtype, KV_HEADS, HEAD_DIM, BLOCK)
        self.layer_bytes = block_bytes * self.blocks_each * self.batch
        self.layers = min(_MAX_LAYERS, max(1, math.ceil(self.min_bytes / self.layer_bytes)))
        num_blocks = self.blocks_each * self.batch
        self.cache = self.native.KVCache(self.layers, num_blocks, self.kv_dtype, KV_HEADS, HEAD_DIM, BLOCK)

    def table(self, width: int) -> Any:
        """A small embedding of random rows, which gives programs something to start from."""
        rows = torch.randn(_CHUNK, width)
        return self.native.Packer(1).pack(rows.data_ptr(), "float32", _CHUNK, width, width, "float32")

    def fill(self) -> None:
        """Write K and V of every request."""
        width = (HEADS + 2 * KV_HEADS) * HEAD_DIM
        program = self.native.Program(self.isa, self.threads)
        source, out = program.add_value(width), program.add_value(HEADS * HEAD_DIM)
        program.embed(self.table(width), source, 1.0)
        for layer in range(self.layers):
            program.rotate_and_write(
                layer, source, out, HEADS, KV_HEADS, HEAD_DIM, -1, 0, "none", 0, 0, 0, 0, 0.0
            )
        for request in range(self.batch):
            for begin in range(0, self.context, _CHUNK):
                count = min(_CHUNK, self.context - begin)
                self.run(program, out, [PlanRow([*range(count)], begin, self.blocks(request), 1)])

    def blocks(self, request: int) -> list[int]:
        return list(range(request * self.blocks_each, (request + 1) * self.blocks_each))

    def run(self, program: Any, result: int, rows: list[PlanRow]) -> None:
        out = torch.empty(len(rows), HEADS * HEAD_DIM)
        program.run(self.cache, rows, result, out.data_ptr())
        if not out.isfinite().all():
            raise RuntimeError("attention gave values that are not finite")

    def rates(self, rounds: int) -> list[float]:
        """Bytes of K and V read per second."""
        program = self.native.Program(self.isa, self.threads)
        width = HEADS * HEAD_DIM
        q, out = program.add_value(width), program.add_value(width)
        program.embed(self.table(width), q, 1.0)
        for layer in range(self.layers):
            program.attend(layer, q, out, HEADS, KV_HEADS, HEAD_DIM, HEAD_DIM**-0.5, 0.0, 0)
        last = self.context - 1
        rows = [PlanRow([request], last, self.blocks(request), 1) for request in range(self.batch)]
        self.run(program, out, rows)
        rates = []
        for _ in range(rounds):
            start, count = time.perf_counter(), 0
            while time.perf_counter() - start < _MIN_S:
                self.run(program, out, rows)
                count += 1
            rates.append(count * self.layers * self.layer_bytes / (time.perf_counter() - start))
        return rates


def bench_attention(report: Report, args: Any) -> None:
    """Every context, batch size and format of the cache."""
    native = load()
    for kv_dtype in args.kv_formats:
        before = report.measure_limits()
        rates = {}
        for context in args.contexts:
            for batch in args.attention_batches:
                bench = Bench(
                    native, report.isa, report.threads, kv_dtype, batch, context, args.attention_bytes
                )
                bench.fill()
                rates[context, batch] = bench.rates(args.rounds)
        limits = before.better(report.measure_limits())
        report.section(f"attention: {HEADS}/{KV_HEADS} heads of {HEAD_DIM}, KV {kv_dtype}; {limits}")
        report.add(
            [
                Result(
                    "attention",
                    kv_dtype,
                    f"context {context:,}, batch {batch}",
                    "B/s",
                    measured,
                    {"bandwidth": limits.read_bytes},
                )
                for (context, batch), measured in rates.items()
            ]
        )
