"""Attention alone: decoding one token per request over a long context, in the shape of Llama 3.2 1B.

A program of nothing but attention runs over a cache of enough layers to be several times the last processor
cache. K and V are written first by a program that rotates and writes and attends to nothing. The limit is the
read bandwidth over the bytes of K and V, counted once for the G query heads of a group.
"""

from __future__ import annotations

from typing import Any

from cpu_limits import Report, Result

from gqa_serve.engine.kernels.cpu import load
from gqa_serve.workbench.bench.cpu_kernels import NativeAttention
from gqa_serve.workbench.bench.kernel_cases import AttentionCase
from gqa_serve.workbench.kernel_cost import Heads

HEADS = Heads(num_heads=32, num_kv_heads=8, head_dim=64)
_MIN_S = 0.3  # of a round


def rates(native: Any, report: Report, case: AttentionCase, min_bytes: int, rounds: int) -> list[float]:
    """Bytes of K and V read per second."""
    attention = NativeAttention(native, report.isa, report.threads, case, min_bytes)
    attention.run()
    read = case.work(attention.token_bytes).read_bytes
    return [read / attention.seconds(_MIN_S) for _ in range(rounds)]


def bench_attention(report: Report, args: Any) -> None:
    """Every context, batch size and format of the cache."""
    native = load()
    for kv_dtype in args.kv_formats:
        before = report.measure_limits()
        measured = {
            (context, batch): rates(
                native,
                report,
                AttentionCase("decode", HEADS, kv_dtype, batch, context),
                args.attention_bytes,
                args.rounds,
            )
            for context in args.contexts
            for batch in args.attention_batches
        }
        limits = before.better(report.measure_limits())
        report.section(
            f"attention: {HEADS.num_heads}/{HEADS.num_kv_heads} heads of {HEADS.head_dim}, KV {kv_dtype}; "
            f"{limits}"
        )
        report.add(
            [
                Result(
                    "attention",
                    kv_dtype,
                    f"context {context:,}, batch {batch}",
                    "B/s",
                    rate,
                    {"bandwidth": limits.read_bytes},
                )
                for (context, batch), rate in measured.items()
            ]
        )
