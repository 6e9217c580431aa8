"""A KV cache full of random numbers, so that a step can be measured over a context nobody computed.

Owns how that is written for each kind of cache. Memory that was never written would not do: the system backs
it with a single page of zeros, and reading that is reading the processor's cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from gqa_serve.engine.backends.cpu import CpuBackend, NativeKVCache
from gqa_serve.engine.batch import PlanRow
from gqa_serve.engine.kv_cache import LARGEST, TensorKVCache, quantize_kv
from gqa_serve.engine.model_config import ModelConfig
from gqa_serve.engine.model_runner import ModelRunner

_CHUNK = 2048  # tokens written at once


def fill_cache(runner: ModelRunner, on_token: Callable[[int, int], None] | None = None) -> None:
    """Write every slot of a loaded model's cache; `on_token(done, total)` tells how far it is."""
    cache = runner.cache
    if isinstance(cache, NativeKVCache):
        assert isinstance(runner.backend, CpuBackend)
        config, backend = runner.config, runner.backend
        fill_native(
            backend.native,
            cache.native,
            config,
            cache.block_size,
            backend.instruction_set,
            backend.threads,
            on_token,
        )
    else:
        assert isinstance(cache, TensorKVCache)
        fill_tensors(cache)


def fill_native(
    native: Any,
    cache: Any,
    shape: ModelConfig,
    block_size: int,
    isa: str,
    threads: int,
    on_token: Callable[[int, int], None] | None = None,
) -> None:
    """All layers of a native cache, by a program that only writes K and V."""
    program, out = writing_program(
        native, isa, threads, shape.num_layers, shape.num_heads, shape.num_kv_heads, shape.head_dim
    )
    total = cache.num_blocks * block_size
    blocks_each = -(-_CHUNK // block_size)
    for first in range(0, cache.num_blocks, blocks_each):
        blocks = list(range(first, min(first + blocks_each, cache.num_blocks)))
        count = len(blocks) * block_size
        row = PlanRow([token % _CHUNK for token in range(count)], 0, blocks, 1)
        run_program(program, cache, out, [row], shape.num_heads * shape.head_dim)
        if on_token is not None:
            on_token(first * block_size + count, total)


def writing_program(
    native: Any, isa: str, threads: int, num_layers: int, num_heads: int, num_kv_heads: int, head_dim: int
) -> tuple[Any, int]:
    """A native program that writes random K and V for its tokens (ids below 2048) and attends to nothing, and
    the value it leaves: [T, num_heads * head_dim]."""
    width = (num_heads + 2 * num_kv_heads) * head_dim
    program = native.Program(isa, threads)
    source, out = program.add_value(width), program.add_value(num_heads * head_dim)
    program.embed(random_table(native, width), source, 1.0)
    for layer in range(num_layers):
        program.rotate_and_write(
            layer, source, out, num_heads, num_kv_heads, head_dim, -1, 0, "none", 0, 0, 0, 0, 0.0
        )
    return program, out


def random_table(native: Any, width: int) -> Any:
    """An embedding of 2048 random rows, which gives programs something to start from."""
    rows = torch.randn(_CHUNK, width, generator=torch.Generator().manual_seed(0))
    return native.Packer(1).pack(rows.data_ptr(), "float32", _CHUNK, width, width, "float32")


def run_program(program: Any, cache: Any, result: int, rows: list[PlanRow], width: int) -> torch.Tensor:
    """The value `result` [R, width] at the rows' logit positions. Raises RuntimeError if it isn't finite."""
    out = torch.empty(sum(row.num_logits for row in rows), width)
    program.run(cache, rows, result, out.data_ptr())
    if not out.isfinite().all():
        raise RuntimeError("The kernel gave values that are not finite.")
    return out


def fill_tensors(cache: TensorKVCache) -> None:
    """K and V as torch tensors, scales included."""
    for layer in range(len(cache.k)):
        kv = cache.layer(layer)
        for numbers, scales in ((kv.k, kv.k_scale), (kv.v, kv.v_scale)):
            if numbers.dtype in LARGEST:
                assert scales is not None
                for block in range(cache.num_blocks):  # one by one: in float32 they are four times as large
                    wide = torch.randn(numbers.shape[1:], device=numbers.device)
                    small, scale = quantize_kv(wide, numbers.dtype)
                    numbers[block].copy_(small)
                    scales[block].copy_(scale)
            else:
                numbers.normal_()
