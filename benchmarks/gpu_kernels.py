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
import sys
from collections.abc import Callable
from functools import partial

import torch
from rich.console import Console
from rich.table import Table

from gqa_serve.workbench import kernel_cost
from gqa_serve.workbench.bench.cuda_kernels import KV, WEIGHTS, attention_calls, linear_calls, seconds
from gqa_serve.workbench.hardware import GPUS
from gqa_serve.workbench.kernel_cost import Formats, Heads

HEADS = Heads(num_heads=32, num_kv_heads=8, head_dim=128)
MATRICES = {"qkv": (4096, 6144), "gate, up": (4096, 28672), "down": (14336, 4096)}
PARTS = ("decode", "prefill", "linear")

Case = tuple[str, kernel_cost.Cost, Callable[[], object], Callable[[], object] | None]


def attention_case(name: str, lens: list[tuple[int, int]], form: str) -> Case:
    """Our kernel over scattered blocks; PyTorch's attention over K and V that lie side by side."""
    formats = Formats(kv=KV[form][1])
    if lens[0][1] > 1:
        both = [(new, computed + new) for computed, new in lens]
        cost = kernel_cost.prefill_attention(HEADS, both, formats)
    else:
        cost = kernel_cost.decode_attention(HEADS, [computed + 1 for computed, _ in lens], formats)
    return name, cost, *attention_calls(HEADS, lens, form)


def linear_case(matrix: str, form: str, tokens: int) -> Case:
    inputs, outputs = MATRICES[matrix]
    cost = kernel_cost.linear(tokens, inputs, outputs, Formats(weights=WEIGHTS[form]))
    ours, torchs = linear_calls(inputs, outputs, form, tokens)
    return f"{matrix} {form}, {tokens} tokens", cost, ours, None if form == "bfloat16" else torchs


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
