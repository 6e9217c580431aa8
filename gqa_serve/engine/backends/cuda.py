"""The CUDA backend: the model's operations as Triton kernels, and decode steps as captured graphs.

Owns which kernel computes which operation, and scratch memory. Kernels are in `kernels/triton/`, a step's
integers in `cuda_step.py`, graphs in `cuda_graphs.py`, matrices in `cuda_linear.py`.

Invariants: a step enqueues work and waits for nothing. With `deterministic`, what a request's tokens give
depends on the request alone; without, only cuBLAS may choose another order of sums for another number of
rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch
from triton import knobs

from gqa_serve.engine.backends.base import (
    AttentionLayout,
    AttentionStep,
    Backend,
    Entries,
    ForwardPass,
    HeadNorms,
    Linear,
    Packed,
    Role,
)
from gqa_serve.engine.backends.cuda_graphs import Capture, DecodeGraphs
from gqa_serve.engine.backends.cuda_libraries import Attend, AttentionLibrary
from gqa_serve.engine.backends.cuda_linear import CudaWeights
from gqa_serve.engine.backends.cuda_step import StepArrays, StepBuffer, StepTensors, decode_capacities
from gqa_serve.engine.kernels.triton import sampling
from gqa_serve.engine.kernels.triton.activations import gated_activation
from gqa_serve.engine.kernels.triton.decode_attention import SPLIT, Partials, Scores, decode_attention
from gqa_serve.engine.kernels.triton.norms import add_rms_norm, rms_norm
from gqa_serve.engine.kernels.triton.prefill_attention import prefill_attention, tokens_per_tile
from gqa_serve.engine.kernels.triton.rotary import rotate_and_write
from gqa_serve.engine.kv_cache import KVCache, TensorKVCache
from gqa_serve.engine.row_kernels import KernelRows, RowKernels

if TYPE_CHECKING:
    from gqa_serve.engine.batch import ForwardBatch, StepPlan
    from gqa_serve.engine.model_config import Activation, ModelConfig
    from gqa_serve.engine.models.decoder import Decoder
    from gqa_serve.engine.sampler import RowOperations
    from gqa_serve.engine.weights.quantized_matrix import QuantizedMatrix

# Programs of the decode kernel per multiprocessor, over all KV heads: two or three run at once, and what is
# over evens out items of different lengths.
_PROGRAMS_PER_PROCESSOR = 4


class CudaBackend(Backend):
    """Kernels in Triton. Weights and activations are in `dtype` where `quantization` does not say otherwise.

    `kv_dtype`: a float dtype, torch.int8 or torch.float8_e4m3fn. `capture` is how decode steps of up to
    `max_num_seqs` requests are captured; None computes them kernel by kernel. The device is a GPU, or a CPU
    where Triton interprets.
    """

    name = "cuda"
    lookahead = True

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        *,
        kv_dtype: torch.dtype | None = None,
        quantization: str = "none",
        deterministic: bool = False,
        capture: Capture | None = None,
        max_num_seqs: int = 1,
        library: AttentionLibrary | None = None,
    ) -> None:
        self.device = device
        self.dtype = dtype
        self.cache_dtype = kv_dtype or dtype
        self.kv_dtype = _KV_NAMES.get(self.cache_dtype, str(self.cache_dtype).removeprefix("torch."))
        self.deterministic = deterministic
        self._capture = capture
        self.library = library
        self.block_multiple = 1 if library is None else library.block_multiple
        self.max_num_seqs = max_num_seqs
        self.weights = CudaWeights(device, dtype, quantization, deterministic)
        self.processors = _processors(device)
        self._partials: Partials | None = None
        # Multiply-adds that round once: Triton warns where nobody chooses, and means to change its default.
        if hasattr(knobs.language, "default_fp_fusion"):
            knobs.language.default_fp_fusion = True

    # --- at load ---

    def pack(self, weight: torch.Tensor | QuantizedMatrix, role: Role) -> Packed:
        return self.weights.pack(weight, role)

    def linear(self, parts: Sequence[Packed], bias: torch.Tensor | None) -> Linear:
        return self.weights.linear(parts, bias)

    def block_bytes(self, config: ModelConfig, block_size: int) -> int:
        return TensorKVCache.block_bytes(config, block_size, self.cache_dtype)

    def allocate_cache(self, config: ModelConfig, num_blocks: int, block_size: int) -> KVCache:
        return TensorKVCache.allocate(config, num_blocks, block_size, self.cache_dtype, self.device)

    def compile(self, decoder: Decoder) -> CudaForward:
        return CudaForward(self, decoder)

    def capture(self, forward: ForwardPass, cache: KVCache) -> None:
        if self._capture is not None:
            cast("CudaForward", forward).capture(cache, self._capture)

    # --- in a step ---

    def embed(
        self, table: Packed, token_ids: torch.Tensor, scale: float, entries: Entries | None = None
    ) -> torch.Tensor:
        if entries is None:
            return self.weights.embed(table, token_ids, scale)
        row, elsewhere = entries.place(token_ids)
        return self.weights.embed(table, row, scale).masked_fill_(elsewhere[:, None], 0.0)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return rms_norm(x, weight, eps, torch.empty_like(x))

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float, scale: float
    ) -> torch.Tensor:
        out = None if weight is None else torch.empty_like(x)
        return add_rms_norm(x, residual, weight, eps, scale, out)

    def gated_activation(self, gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
        out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
        return gated_activation(gate_up, activation, out)

    def prepare(self, batch: ForwardBatch, cache: KVCache, layout: AttentionLayout) -> AttentionStep:
        return CudaAttentionStep(self, cast("StepTensors", batch), cast("TensorKVCache", cache), layout)

    def logits(self, head: Linear, hidden: torch.Tensor, scale: float, cap: float | None) -> torch.Tensor:
        logits = head(hidden).float()  # [R, V]
        if scale != 1.0:
            logits = logits * scale
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def row_operations(self) -> RowOperations:
        return KernelRows(cast("RowKernels", sampling))

    def partials(self, room: int, layout: AttentionLayout) -> Partials:
        """Scratch of the decode kernel for `room` items at least, the same from layer to layer."""
        if self._partials is None or len(self._partials.maxima) < room:
            self._partials = Partials.allocate(
                room, layout.num_kv_heads, layout.group_size, layout.head_dim, self.device
            )
        return self._partials


class CudaAttentionStep(AttentionStep):
    """Attention of one step: requests with one new token by the decode kernel, chunks of prompts by the
    other.
    """

    def __init__(
        self, backend: CudaBackend, step: StepTensors, cache: TensorKVCache, layout: AttentionLayout
    ) -> None:
        self.step = step
        self.cache = cache
        self.layout = layout
        self.exact = backend.deterministic
        self.scores = [Scores(layout.scale, layout.soft_cap, window) for window in layout.windows]
        angles = [rotary.angles(step.positions, torch.float32) for rotary in layout.rotaries]
        self.angles = [(cos[:, 0], sin[:, 0]) for cos, sin in angles]  # [T, rotary_dim] each
        self.attends: Sequence[Attend] | None = None
        if backend.library is not None and step.arrays is not None:
            self.attends = backend.library.plan(step.arrays, layout, cache.block_size, backend.dtype)
        elif step.splits is not None:
            room = max(len(work.requests) for work in step.splits)
            self.partials = backend.partials(room, layout)
            self.programs = max(1, _PROGRAMS_PER_PROCESSOR * backend.processors // layout.num_kv_heads)

    def rotate_and_write(self, layer: int, qkv: torch.Tensor, norms: HeadNorms | None) -> torch.Tensor:
        layout, index = self.layout, self.layout.layer_rotaries[layer]
        q = qkv.new_empty(qkv.shape[0], layout.num_heads, layout.head_dim)
        angles = None if index is None else self.angles[index]
        return rotate_and_write(qkv, q, self.cache.layer(layer), self.step.slots, angles, norms)

    def attend(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        step, kv, window = self.step, self.cache.layer(layer), self.layout.layer_windows[layer]
        if self.attends is not None:
            return self.attends[window](q, kv).flatten(1)
        out = torch.empty_like(q)
        if step.splits is not None:
            work = step.splits[window]
            programs = min(self.programs, len(work.requests))
            decode_attention(q, kv, step.blocks, work, self.scores[window], out, self.partials, programs)
        if step.chunks is not None:
            prefill_attention(q, kv, step.blocks, step.chunks, self.scores[window], out, self.exact)
        return out.flatten(1)


class CudaForward:
    """The forward pass over plans: hidden states [R, E] of their logit rows. `capture` makes the graphs."""

    def __init__(self, backend: CudaBackend, decoder: Decoder) -> None:
        self.backend = backend
        self.decoder = decoder
        layout = decoder.layout
        self.tile_tokens = tokens_per_tile(
            layout.group_size, layout.head_dim, backend.cache_dtype.itemsize, backend.deterministic
        )
        self.buffer = StepBuffer(backend.device)
        self.graphs: DecodeGraphs | None = None
        self.scratch: Partials | None = None

    def capture(self, cache: KVCache, capture: Capture) -> None:
        """Capture decode steps over this cache, which all later steps must use."""
        layout = self.decoder.layout
        # Each block that a request holds is at most once in its table, so tables are longer than the cache
        # only where requests share blocks; the same goes for items.
        tokens = cache.num_blocks * cache.block_size
        most_blocks = cache.num_blocks

        def capacities(rung: int) -> dict[str, int]:
            return decode_capacities(rung, len(layout.windows), -(-tokens // SPLIT) + rung, most_blocks)

        def forward(regions: Mapping[str, torch.Tensor], previous: torch.Tensor) -> torch.Tensor:
            return self._compute(StepTensors.of(regions, layout), cache, previous)

        # Kept, because graphs write there: a larger step computed without them may replace the backend's.
        self.scratch = self.backend.partials(capacities(self.backend.max_num_seqs)["item_splits0"], layout)
        self.graphs = DecodeGraphs(
            self.backend.max_num_seqs, capacities, forward, capture, self.backend.device
        )

    def __call__(self, plan: StepPlan, cache: KVCache, previous: torch.Tensor | None = None) -> torch.Tensor:
        layout = self.decoder.layout
        arrays = StepArrays.from_plan(plan, cache.block_size, layout.windows, self.tile_tokens)
        hidden = None if self.graphs is None else self.graphs.run(arrays, previous)
        if hidden is not None:
            return hidden
        step = StepTensors.of(self.buffer.load(arrays), layout, arrays)
        rows = self._compute(step, cache, previous)
        return rows if arrays.is_decode else rows[step.logit_rows]

    def _compute(self, step: StepTensors, cache: KVCache, previous: torch.Tensor | None) -> torch.Tensor:
        """Hidden states [T, E]; tokens that only the device knows are taken from `previous`."""
        if previous is not None:
            known = step.previous_rows < 0
            sampled = previous[step.previous_rows.clamp(min=0)].clamp(min=0).to(torch.int32)  # -1: no token
            step = replace(step, token_ids=torch.where(known, step.token_ids, sampled))
        return self.decoder.forward(cast("ForwardBatch", step), cache)


_KV_NAMES = {torch.float8_e4m3fn: "fp8"}


def _processors(device: torch.device) -> int:
    """Streaming multiprocessors; where Triton interprets, programs run one after the other."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
