"""The Triton kernels alone, beside PyTorch's own: what `bench kernel` and benchmarks/gpu_kernels.py time.

Owns the tensors of a case (K and V in scattered blocks, quantized where asked) and the timing on the device:
the L2 cache is flushed before each call, and the host runs ahead so that launching costs nothing. Needs a
CUDA device.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

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
from gqa_serve.workbench.bench.kernel_cases import AttentionCase, KernelCase
from gqa_serve.workbench.bench.limits import Work
from gqa_serve.workbench.kernel_cost import BF16, FP8, INT4, INT8, KV_BF16, KV_FP8, KV_INT8, Heads

KV = {
    "bfloat16": (torch.bfloat16, KV_BF16),
    "int8": (torch.int8, KV_INT8),
    "fp8": (torch.float8_e4m3fn, KV_FP8),
}
WEIGHTS = {"bfloat16": BF16, "int8": INT8, "int4": INT4, "fp8": FP8}
BLOCK = 16
_CALLS = 10  # of a round

Run = Callable[[], object]


def prepare(case: KernelCase) -> tuple[Callable[[], float], Work]:
    """The case on the device, ready to be timed: seconds of a call, and what it must read and compute."""
    if isinstance(case, AttentionCase):
        lens = [(case.context_len - 1, 1)] if case.part == "decode" else [(0, case.context_len)]
        ours, _ = attention_calls(case.heads, lens * case.batch_size, case.kv_dtype)
        held = KV[case.kv_dtype][1].bytes_per_token(case.heads.num_kv_heads, case.heads.head_dim)
    else:
        ours, _ = linear_calls(case.inputs, case.outputs, case.weights, case.num_tokens)
        held = WEIGHTS[case.weights].matrix_bytes(case.outputs, case.inputs)
    return lambda: seconds([ours], _CALLS)[0], case.work(held)


def attention_calls(heads: Heads, lens: Sequence[tuple[int, int]], form: str) -> tuple[Run, Run]:
    """Our kernel over scattered blocks; PyTorch's attention over K and V that lie side by side.

    `lens`: (computed, new) tokens of each request, all alike.
    """
    dtype, _ = KV[form]
    used = [-(-(computed + new) // BLOCK) for computed, new in lens]
    order = torch.randperm(sum(used)).tolist()
    rows = []
    for (computed, new), count in zip(lens, used, strict=True):
        rows.append(PlanRow([0] * new, computed, [order.pop() for _ in range(count)], 1))
    kv = _layer_kv(heads, sum(used), dtype)
    tokens = tokens_per_tile(heads.group_size, heads.head_dim, kv.k.element_size(), False)
    arrays = StepArrays.from_plan(StepPlan(rows), BLOCK, [None], tokens)
    t = {key: torch.from_numpy(array).cuda() for key, array in arrays.regions.items()}
    blocks = Blocks(t["block_ids"], t["block_starts"], t["context_lens"])
    q = torch.randn(arrays.num_tokens, heads.num_heads, heads.head_dim, device="cuda", dtype=torch.bfloat16)
    out, scores = torch.empty_like(q), Scores(heads.head_dim**-0.5, None, None)
    torchs = _torch_attention(heads, lens, q)
    if lens[0][1] > 1:
        chunks = ChunkWork(t["query_starts"], t["chunk_requests"], t["chunk_firsts"])
        return lambda: prefill_attention(q, kv, blocks, chunks, scores, out, False), torchs
    work = SplitWork(t["last_rows"], t["item_starts0"], t["item_requests0"], t["item_splits0"])
    items = len(work.requests)
    partials = Partials.allocate(items, heads.num_kv_heads, heads.group_size, heads.head_dim, q.device)
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    programs = min(items, max(1, 4 * processors // heads.num_kv_heads))
    return lambda: decode_attention(q, kv, blocks, work, scores, out, partials, programs), torchs


def _layer_kv(heads: Heads, num_blocks: int, dtype: torch.dtype) -> LayerKV:
    """Random K and V."""
    shape = (num_blocks, heads.num_kv_heads, BLOCK, heads.head_dim)
    k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    if dtype not in LARGEST:
        return LayerKV(k, v, None, None)
    (k8, k_scale), (v8, v_scale) = quantize_kv(k, dtype), quantize_kv(v, dtype)
    return LayerKV(k8, v8, k_scale, v_scale)


def _torch_attention(heads: Heads, lens: Sequence[tuple[int, int]], q: torch.Tensor) -> Run:
    """PyTorch's own, grouped too, over as much K and V."""
    computed, new = lens[0]
    shape = (len(lens), heads.num_kv_heads, computed + new, heads.head_dim)
    k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    wide_q = q.view(len(lens), -1, heads.num_heads, heads.head_dim).transpose(1, 2)
    return lambda: F.scaled_dot_product_attention(wide_q, k, v, is_causal=new > 1, enable_gqa=True)


def linear_calls(inputs: int, outputs: int, form: str, tokens: int) -> tuple[Run, Run]:
    """Our product with a matrix held as `form`; PyTorch's in bfloat16."""
    weight = torch.randn(outputs, inputs, device="cuda", dtype=torch.bfloat16) / inputs**0.5
    quantization = "none" if form == "bfloat16" else form
    weights = CudaWeights(weight.device, torch.bfloat16, quantization, deterministic=False)
    linear = weights.linear([weights.pack(weight, "linear")], None)
    x = torch.randn(tokens, inputs, device="cuda", dtype=torch.bfloat16)
    return lambda: linear(x), lambda: F.linear(x, weight)


def seconds(runs: Sequence[Run], rounds: int) -> list[float]:
    """Median time of each, alternating; the host runs ahead while the flush is under way."""
    flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    for run in [*runs] * 3:
        run()
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for run, into in zip(runs, times, strict=True):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            flush.zero_()
            # About half a millisecond, in which the host runs ahead.
            torch.cuda._sleep(1_000_000)  # type: ignore[no-untyped-call]
            begin.record()
            run()
            end.record()
            end.synchronize()
            into.append(begin.elapsed_time(end) / 1e3)
    return [statistics.median(of) for of in times]
