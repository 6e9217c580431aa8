"""The tables of docs/cuda.md: what Llama 3 8B's kernels and steps cost on four GPUs, by arithmetic.

    python -m gqa_serve.workbench.cost_tables

Owns which cases are shown and how numbers are written. Nothing is measured, so the text is the same
everywhere; a test compares the document with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from gqa_serve.engine.model_config import ModelConfig, RopeConfig
from gqa_serve.workbench.hardware import GPUS, H100
from gqa_serve.workbench.kernel_cost import BF16, FP8, INT4, INT8, KV_BF16, KV_FP8, KV_INT8, Formats
from gqa_serve.workbench.step_cost import StepCost, decode_step, kv_bytes, step, weight_bytes

CONTEXT_LEN = 2048
BATCH_SIZES = (1, 32, 256)

LLAMA_3_8B = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=128_256,
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=14_336,
    max_model_len=8192,
    context_limit=8192,
    windows=(None,) * 32,
    ropes=(RopeConfig("default", theta=500_000.0, rotary_dim=128),) * 32,
    attention_scale=128**-0.5,
    norm_eps=1e-5,
)


def gpu_table() -> str:
    """The data sheets."""
    return _table(
        ["GPU", "memory", "bandwidth", "bf16, dense", "fp8, dense", "flops per byte, bf16"],
        [
            [
                gpu.name,
                f"{gpu.memory_bytes / 1e9:.0f} GB",
                f"{gpu.bandwidth / 1e12:.2f} TB/s",
                f"{gpu.bf16_flops / 1e12:,.0f} TFLOP/s",
                "-" if gpu.fp8_flops is None else f"{gpu.fp8_flops / 1e12:,.0f} TFLOP/s",
                f"{gpu.bf16_flops / gpu.bandwidth:.0f}",
            ]
            for gpu in GPUS
        ],
    )


def part_table(cost: StepCost) -> str:
    """A step's kernels, each over all its layers, and their sum."""
    rows = [
        [
            name,
            f"{part.must_bytes / 1e6:,.1f}",
            f"{part.moved_bytes / 1e6:,.1f}",
            f"{part.cached_bytes / 1e6:,.1f}",
            f"{part.flops / 1e9:,.1f}",
            *(f"{part.seconds(gpu) * 1e6:,.0f}" for gpu in GPUS),
        ]
        for name, part in cost.parts.items()
    ]
    total = [
        "**step**",
        f"{cost.must_bytes / 1e6:,.1f}",
        f"{cost.moved_bytes / 1e6:,.1f}",
        f"{sum(part.cached_bytes for part in cost.parts.values()) / 1e6:,.1f}",
        f"{cost.flops / 1e9:,.1f}",
        *(f"{cost.seconds(gpu) * 1e6:,.0f}" for gpu in GPUS),
    ]
    head = ["kernel", "must move, MB", "moves, MB", "from L2, MB", "GFLOP"]
    return _table([*head, *(f"{_short(gpu.name)}, µs" for gpu in GPUS)], [*rows, total])


def decode_table() -> str:
    """Whole decode steps; a dash where weights and KV cache do not fit into the GPU's memory."""
    rows = []
    for batch_size in BATCH_SIZES:
        cost = decode_step(LLAMA_3_8B, batch_size, CONTEXT_LEN)
        needed = weight_bytes(LLAMA_3_8B) + kv_bytes(LLAMA_3_8B, batch_size * CONTEXT_LEN)
        cells = []
        for gpu in GPUS:
            seconds = cost.seconds(gpu)
            fits = needed <= gpu.memory_bytes
            cells.append(f"{seconds * 1e3:.2f} ms, {batch_size / seconds:,.0f}/s" if fits else "-")
        moved = [f"{value / 1e9:.1f}" for value in (cost.must_bytes, cost.moved_bytes)]
        rows.append([str(batch_size), f"{needed / 1e9:.1f}", *moved, *cells])
    head = ["requests", "in memory, GB", "must move, GB", "moves, GB"]
    return _table([*head, *(_short(gpu.name) for gpu in GPUS)], rows)


def kv_heads_table() -> str:
    """The same model with more and fewer KV heads: MHA, GQA, MQA."""
    rows = []
    for num_kv_heads in (32, 8, 4, 1):
        config = replace(LLAMA_3_8B, num_kv_heads=num_kv_heads)
        cost = decode_step(config, 32, CONTEXT_LEN)
        rows.append(
            [
                str(num_kv_heads),
                f"{kv_bytes(config, 1) / 1024:.0f} KiB",
                f"{kv_bytes(config, 32 * CONTEXT_LEN) / 1e9:.2f}",
                f"{weight_bytes(config) / 1e9:.2f}",
                f"{cost.parts['decode attention'].seconds(H100) * 1e3:.2f}",
                f"{cost.seconds(H100) * 1e3:.2f}",
            ]
        )
    head = ["KV heads", "KV of a token", "KV cache, GB", "weights, GB", "attention, ms", "step, ms"]
    return _table(head, rows)


def format_table() -> str:
    """The same step with weights and KV cache in fewer bits."""
    rows = []
    for weights, kv in [(BF16, KV_BF16), (BF16, KV_FP8), (FP8, KV_FP8), (INT8, KV_INT8), (INT4, KV_INT8)]:
        formats = Formats.quantized(weights, kv)
        sizes = (weight_bytes(LLAMA_3_8B, formats), kv_bytes(LLAMA_3_8B, 32 * CONTEXT_LEN, formats))
        times = (decode_step(LLAMA_3_8B, size, CONTEXT_LEN, formats).seconds(H100) for size in (1, 32))
        rows.append(
            [weights.name, kv.name, *(f"{s / 1e9:.2f}" for s in sizes), *(f"{t * 1e3:.2f}" for t in times)]
        )
    head = ["weights", "KV cache", "weights, GB", "KV cache of 32, GB", "step of 1, ms", "step of 32, ms"]
    return _table(head, rows)


TABLES: dict[str, Callable[[], str]] = {
    "GPUs": gpu_table,
    "Decode, 32 requests of 2,048 tokens": lambda: part_table(decode_step(LLAMA_3_8B, 32, CONTEXT_LEN)),
    "Prefill, one prompt of 2,048 tokens": lambda: part_table(step(LLAMA_3_8B, [(CONTEXT_LEN, CONTEXT_LEN)])),
    "Decode steps": decode_table,
    "KV heads": kv_heads_table,
    "Formats": format_table,
}


def _short(name: str) -> str:
    """ "H100" of "H100 SXM"."""
    return name.split()[0]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown; the first column to the left, numbers to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """All tables to standard output."""
    for title, table in TABLES.items():
        print(f"{title}\n\n{table()}\n")


if __name__ == "__main__":
    main()
