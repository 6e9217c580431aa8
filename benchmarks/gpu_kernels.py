"""How near the CUDA kernels come to what the GPU can do, beside PyTorch's own.

Each line: the time of one call on the device (median of rounds that alternate between ours and PyTorch's,
the L2 cache flushed before each), the bytes it moves by the account of
`gqa_serve/workbench/kernel_cost.py`, and the fraction of the GPU's data sheet. Sizes are Llama 3 8B's.

    make bench-cuda
    make bench-cuda ARGS="--only decode --rounds 50"
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from gqa_serve.engine.backends.cuda_linear import CudaWeights
from gqa_serve.engine.backends.cuda_step import StepArrays
from gqa_serve.engine.batch import PlanRow, StepPlan
from gqa_serve.engine.kernels.triton.decode_attention import (
    Blocks,
    Partials,
    Scores,
    SplitWork,
    decode_attention,
)
from gqa_serve.engine.kernels.triton.prefill_attention import ChunkWork, prefill_attention, tokens_per_tile
from gqa_serve.engine.kv_cache import LARGEST, LayerKV, quantize_kv
from gqa_serve.workbench import kernel_cost
from gqa_serve.workbench.gpus import GPUS
from gqa_serve.workbench.kernel_cost import BF16, FP8, INT4, INT8, KV_BF16, KV_FP8, KV_INT8, Formats, Heads

HEADS = Heads(num_heads=32, num_kv_heads=8, head_dim=128)
MATRICES = {"qkv": (4096, 6144), "gate, up": (4096, 28672), "down": (14336, 4096)}
KV = {"bf16": (torch.bfloat16, KV_BF16), "int8": (torch.int8, KV_INT8), "fp8": (torch.float8_e4m3fn, KV_FP8)}
WEIGHTS = {"none": BF16, "int8": INT8, "int4": INT4, "fp8": FP8}
BLOCK = 16
PARTS = ("decode", "prefill", "linear")

Case = tuple[str, kernel_cost.Cost, Callable[[], object], Callable[[], object] | None]


def attention_case(name: str, lens: list[tuple[int, int]], form: str) -> Case:
    """Our kernel over scattered blocks; PyTorch's attention over K and V that lie side by side."""
    dtype, kv_format = KV[form]
    used = [-(-(computed + new) // BLOCK) for computed, new in lens]
    order = torch.randperm(sum(used)).tolist()
    rows = []
    for (computed, new), count in zip(lens, used, strict=True):
        rows.append(PlanRow([0] * new, computed, [order.pop() for _ in range(count)], 1))
    shape = (sum(used), HEADS.num_kv_heads, BLOCK, HEADS.head_dim)
    k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    kv = LayerKV(k, v, None, None)
    if dtype in LARGEST:
        (k8, k_scale), (v8, v_scale) = quantize_kv(k, dtype), quantize_kv(v, dtype)
        kv = LayerKV(k8, v8, k_scale, v_scale)
    tokens = tokens_per_tile(HEADS.group_size, HEADS.head_dim, kv.k.element_size(), False)
    arrays = StepArrays.from_plan(StepPlan(rows), BLOCK, [None], tokens)
    t = {key: torch.from_numpy(array).cuda() for key, array in arrays.regions.items()}
    blocks = Blocks(t["block_ids"], t["block_starts"], t["context_lens"])
    q = torch.randn(arrays.num_tokens, HEADS.num_heads, HEADS.head_dim, device="cuda", dtype=torch.bfloat16)
    out, scores = torch.empty_like(q), Scores(HEADS.head_dim**-0.5, None, None)
    context = lens[0][0] + lens[0][1]
    wide_k, wide_v = (
        torch.randn(
            len(lens), HEADS.num_kv_heads, context, HEADS.head_dim, device="cuda", dtype=torch.bfloat16
        )
        for _ in range(2)
    )
    wide_q = q.view(len(lens), -1, HEADS.num_heads, HEADS.head_dim).transpose(1, 2)

    def torchs() -> object:
        causal = lens[0][1] > 1
        return F.scaled_dot_product_attention(wide_q, wide_k, wide_v, is_causal=causal, enable_gqa=True)

    formats = Formats(kv=kv_format)
    if lens[0][1] > 1:
        chunks = ChunkWork(t["query_starts"], t["chunk_requests"], t["chunk_firsts"])
        both = [(new, computed + new) for computed, new in lens]
        cost = kernel_cost.prefill_attention(HEADS, both, formats)
        return name, cost, lambda: prefill_attention(q, kv, blocks, chunks, scores, out, False), torchs
    work = SplitWork(t["last_rows"], t["item_starts0"], t["item_requests0"], t["item_splits0"])
    items = len(work.requests)
    partials = Partials.allocate(items, HEADS.num_kv_heads, HEADS.group_size, HEADS.head_dim, q.device)
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    programs = min(items, 4 * processors // HEADS.num_kv_heads)
    cost = kernel_cost.decode_attention(HEADS, [computed + 1 for computed, _ in lens], formats)
    return name, cost, lambda: decode_attention(q, kv, blocks, work, scores, out, partials, programs), torchs


def linear_case(matrix: str, form: str, tokens: int) -> Case:
    inputs, outputs = MATRICES[matrix]
    weight = torch.randn(outputs, inputs, device="cuda", dtype=torch.bfloat16) / inputs**0.5
    weights = CudaWeights(weight.device, torch.bfloat16, form, deterministic=False)
    linear = weights.linear([weights.pack(weight, "linear")], None)
    x = torch.randn(tokens, inputs, device="cuda", dtype=torch.bfloat16)
    cost = kernel_cost.linear(tokens, inputs, outputs, Formats(weights=WEIGHTS[form]))
    plain = None if form == "none" else lambda: F.linear(x, weight)
    return f"{matrix} {form}, {tokens} tokens", cost, lambda: linear(x), plain


def cases(part: str) -> list[Callable[[], Case]]:
    """Made one by one, since each takes memory."""
    fp8 = torch.cuda.get_device_capability() >= (8, 9)
    made: list[Callable[[], Case]] = []
    if part == "linear":
        forms = [form for form in WEIGHTS if fp8 or form != "fp8"]
        sizes = itertools.product(MATRICES, forms, (1, 16, 256, 2048))
        return [partial(linear_case, matrix, form, tokens) for matrix, form, tokens in sizes]
    for form in [form for form in KV if fp8 or form != "fp8"]:
        if part == "decode":
            for batch, context in ((1, 2048), (1, 32768), (32, 2048), (128, 2048), (256, 1024)):
                name = f"decode {form}, {batch} x {context}"
                made.append(partial(attention_case, name, [(context - 1, 1)] * batch, form))
        else:
            for batch, length in ((1, 2048), (1, 16384), (8, 2048)):
                name = f"prefill {form}, {batch} x {length}"
                made.append(partial(attention_case, name, [(0, length)] * batch, form))
    return made


def seconds(runs: list[Callable[[], object]], rounds: int) -> list[float]:
    """Median time of each, alternating; the host runs ahead while the flush is under way."""
    flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    for run in runs * 3:
        run()
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for run, into in zip(runs, times, strict=True):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            flush.zero_()
            torch.cuda._sleep(1_000_000)  # about half a millisecond, in which the host runs ahead
            begin.record()
            run()
            end.record()
            end.synchronize()
            into.append(begin.elapsed_time(end) / 1e3)
    return [statistics.median(of) for of in times]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("There is no CUDA device here.", file=sys.stderr)
        return 1
    name = torch.cuda.get_device_name()
    sheet = next((gpu for gpu in GPUS if gpu.name.split()[0] in name), None)
    limits = sheet.name if sheet else "not known"
    table = Table(title=f"{name}, PyTorch {torch.__version__}; limits: {limits}")
    for column in ("kernel", "µs", "GB/s", "TFLOP/s", "of its limit", "PyTorch, µs", "ours / PyTorch"):
        table.add_column(column, justify="left" if column == "kernel" else "right")
    for make in [make for part in args.only for make in cases(part)]:
        label, cost, ours, torchs = make()
        times = seconds([ours] if torchs is None else [ours, torchs], args.rounds)
        own = times[0]
        table.add_row(
            label,
            f"{own * 1e6:.1f}",
            f"{cost.must_bytes / own / 1e9:.0f}",
            f"{cost.flops / own / 1e12:.1f}",
            f"{cost.seconds(sheet) / own:.0%}" if sheet else "-",
            f"{times[1] * 1e6:.1f}" if torchs else "-",
            f"{own / times[1]:.2f}" if torchs else "-",
        )
    Console(width=120).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
