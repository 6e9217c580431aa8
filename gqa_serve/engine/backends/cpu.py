"""The native CPU backend: the model's forward pass, recorded once and replayed by one native call per step.

Owns the choice of a format for each matrix, and the replay. The recording is in `cpu_recorder.py`, kernels
and their layouts are in `kernels/cpu/`; how a forward pass goes is the Decoder's business.
Invariant: activations are float32. What a request's tokens give depends on the request alone, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from gqa_serve.engine.backends.base import (
    AttentionLayout,
    AttentionStep,
    Backend,
    Entries,
    ForwardPass,
    HeadNorms,
    InPlace,
    Linear,
    Packed,
    Role,
)
from gqa_serve.engine.backends.cpu_recorder import Recorder
from gqa_serve.engine.kernels.cpu import load
from gqa_serve.engine.transfer import to_device
from gqa_serve.engine.weights.block_tensor import BlockTensor
from gqa_serve.engine.weights.quantized_matrix import QuantizedMatrix
from gqa_serve.errors import CacheCapacityError, UnsupportedModelError

if TYPE_CHECKING:
    from gqa_serve.engine.batch import ForwardBatch, StepPlan
    from gqa_serve.engine.kv_cache import KVCache
    from gqa_serve.engine.model_config import Activation, ModelConfig
    from gqa_serve.engine.models.decoder import Decoder
    from gqa_serve.engine.request import SamplingParams
    from gqa_serve.engine.sampler import RowOperations

# Block types of GGUF files that int8 and int4 hold exactly, so that they are served as they are.
_EXACT_BLOCKS = {"Q8_0": "int8", "Q4_0": "int4", "Q4_1": "int4"}

_MAX_KEPT_LOGITS = 1 << 24  # floats


@dataclass(frozen=True)
class _Format:
    """How a matrix is packed; `group` and `has_min` are of int8 and int4."""

    name: str
    group: int = 0
    has_min: bool = False


# What --quantization makes of a checkpoint, and what becomes of other quantized weights: of GGUF files' other
# block types, whose own scales are of 16 or 32 weights, and of quantized safetensors.
_INT8, _INT4, _BLOCKS = _Format("int8", 128), _Format("int4", 32, has_min=True), _Format("int8", 32)


class CpuLinear:
    """Packed matrices side by side. Records itself when it is called."""

    def __init__(self, backend: CpuBackend, parts: Sequence[Any]) -> None:
        self.backend = backend
        self.parts = list(parts)
        self.out_features = sum(part.n for part in self.parts)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.backend.recorder.linear(x, self.parts, self.out_features)


class CpuBackend(Backend):
    """Kernels in C++. Raises ImportError, with the reason, where they were not built or cannot run.

    `dtype`: how float weights are kept, None for as they are stored. `quantization` as `--quantization`.
    `threads`: of the OpenMP runtime that torch uses too. `isa`: one of the native module's `isa_levels()`, or
    "auto" for the best.
    """

    name = "native"
    block_multiple = 16

    def __init__(
        self,
        *,
        dtype: torch.dtype | None = None,
        quantization: str = "auto",
        kv_dtype: str = "float32",
        threads: int = 1,
        isa: str = "auto",
    ) -> None:
        native = load()
        self.native = native
        self.instruction_set: str = native.isa_levels()[-1] if isa == "auto" else isa
        self.threads = threads
        self.dtype = dtype
        self.quantization = quantization
        self.kv_dtype = kv_dtype
        self.packer = native.Packer(threads)
        self.program = native.Program(self.instruction_set, threads)  # of single operations on tensors
        self._recorder: Recorder | None = None
        self._logits = _floats(0)

    @property
    def recorder(self) -> Recorder:
        """What operations on activations write to. There is none but while `compile` runs."""
        if self._recorder is None:
            raise RuntimeError("The native backend computes compiled forward passes only.")
        return self._recorder

    # --- at load ---

    def pack(self, weight: torch.Tensor | QuantizedMatrix, role: Role) -> Packed:
        form = self._format(weight, role)
        if isinstance(weight, QuantizedMatrix):
            if form is None and isinstance(weight, BlockTensor):
                return self._pack_blocks(weight)
            weight = weight.dequantize()
        dtype = _dtype_name(weight.dtype)
        if dtype not in ("float32", "bfloat16", "float16"):
            weight, dtype = weight.float(), "float32"
        form = form or _Format(dtype)
        weight = weight.contiguous()
        n, k = weight.shape
        packed: Packed = self.packer.pack(
            weight.data_ptr(), dtype, n, k, k, form.name, form.group, form.has_min
        )
        return packed

    def _pack_blocks(self, weight: BlockTensor) -> Packed:
        rows = weight.rows.contiguous()
        packed: Packed = self.packer.pack_gguf(rows.data_ptr(), weight.type, *weight.shape, rows.shape[1])
        return packed

    def _format(self, weight: torch.Tensor | QuantizedMatrix, role: Role) -> _Format | None:
        """None: as the checkpoint has it."""
        asked = self._asked(role)
        if isinstance(weight, QuantizedMatrix):
            exact = _EXACT_BLOCKS.get(weight.type) if isinstance(weight, BlockTensor) else None
            if self.quantization == "auto":
                return None if exact else _BLOCKS
            if exact is not None and exact == asked:
                return None
        if asked is not None:
            return _INT8 if asked == "int8" else _INT4
        if self.dtype is not None:
            return _Format(_dtype_name(self.dtype))
        return _Format("float32") if isinstance(weight, QuantizedMatrix) else None

    def _asked(self, role: Role) -> str | None:
        """The integer format that --quantization asks for. The vocabulary's matrices stay at int8: they are
        where four bits cost most."""
        if self.quantization == "int4":
            return "int4" if role == "linear" else "int8"
        return "int8" if self.quantization == "int8" else None

    def linear(self, parts: Sequence[Packed], bias: torch.Tensor | None) -> Linear:
        linear = CpuLinear(self, parts)
        if bias is not None:
            bias = bias.float().contiguous()
            first = 0
            for part in linear.parts:
                part.set_bias(bias.data_ptr() + 4 * first)
                first += part.n
        return linear

    def block_bytes(self, config: ModelConfig, block_size: int) -> int:
        per_layer: int = self.native.KVCache.block_bytes(
            self.kv_dtype, config.num_kv_heads, config.head_dim, block_size
        )
        return config.num_layers * per_layer

    def allocate_cache(self, config: ModelConfig, num_blocks: int, block_size: int) -> KVCache:
        try:
            native = self.native.KVCache(
                config.num_layers, num_blocks, self.kv_dtype, config.num_kv_heads, config.head_dim, block_size
            )
        except MemoryError as error:
            raise CacheCapacityError(
                f"There is no memory for {num_blocks} KV blocks of {block_size} tokens; "
                "lower --kv-cache-memory."
            ) from error
        return NativeKVCache(native, block_size, num_blocks)

    def compile(self, decoder: Decoder) -> ForwardPass:
        if decoder.config.head_dim % 2:
            raise UnsupportedModelError(
                f"The native backend needs an even head_dim, not {decoder.config.head_dim}; "
                "use --backend reference."
            )
        program = self.native.Program(self.instruction_set, self.threads)
        self._recorder = recorder = Recorder(program)
        try:
            result = decoder.forward(cast("ForwardBatch", _NoBatch()), cast("KVCache", None))
        finally:
            self._recorder = None
        return NativeForward(program, recorder.finish(result), decoder.config.hidden_size)

    def row_operations(self) -> RowOperations:
        return NativeRows(self.program)

    # --- in a step, while it is recorded ---

    def embed(
        self, table: Packed, token_ids: torch.Tensor, scale: float, entries: Entries | None = None
    ) -> torch.Tensor:
        return self.recorder.embed(table, scale, entries)

    def apply(self, function: InPlace, x: torch.Tensor) -> torch.Tensor:
        return self.recorder.apply(function, x)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return self.recorder.rms_norm(x, weight, eps)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float, scale: float
    ) -> torch.Tensor:
        return self.recorder.add_rms_norm(x, residual, weight, eps, scale)

    def gated_activation(self, gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
        return self.recorder.gated(gate_up, activation)

    def prepare(self, batch: ForwardBatch, cache: KVCache, layout: AttentionLayout) -> AttentionStep:
        return _RecordedAttention(self.recorder, layout)

    # --- in a step, computed at once ---

    def logits(self, head: Linear, hidden: torch.Tensor, scale: float, cap: float | None) -> torch.Tensor:
        assert isinstance(head, CpuLinear)
        (part,) = head.parts
        hidden = hidden.to("cpu", torch.float32).contiguous()
        out = self._rows_of_logits(hidden.shape[0], part.n)
        self.program.logits(part, hidden.data_ptr(), hidden.shape[0], out.data_ptr(), scale, cap or 0.0)
        return out

    def _rows_of_logits(self, rows: int, vocab: int) -> torch.Tensor:
        """Room for logits, the same from step to step: fresh memory would cost a fault per page."""
        size = rows * vocab
        if size > _MAX_KEPT_LOGITS:
            return _floats(size).view(rows, vocab)
        if self._logits.numel() < size:
            self._logits = _floats(size)
        return self._logits[:size].view(rows, vocab)


def _floats(count: int) -> torch.Tensor:
    """Memory for native code, whatever torch's defaults are."""
    return torch.empty(count, dtype=torch.float32, device="cpu")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _NoBatch:
    """The batch while a forward pass is recorded: operations are handed its tensors and look at none."""

    token_ids = None


class _RecordedAttention(AttentionStep):
    """Attention of the recorded step."""

    def __init__(self, recorder: Recorder, layout: AttentionLayout) -> None:
        self.recorder = recorder
        self.layout = layout
        self.rotaries = [recorder.add_rotary(rotary) for rotary in layout.rotaries]

    def rotate_and_write(self, layer: int, qkv: torch.Tensor, norms: HeadNorms | None) -> torch.Tensor:
        index = self.layout.layer_rotaries[layer]
        rotary = None if index is None else self.rotaries[index]
        return self.recorder.rotate_and_write(layer, qkv, self.layout, rotary, norms)

    def attend(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        return self.recorder.attend(layer, q, self.layout)


class NativeKVCache:
    """The native cache behind the attributes of `KVCache`; its layout is in `kernels/cpu/formats.h`."""

    def __init__(self, native: Any, block_size: int, num_blocks: int) -> None:
        self.native = native
        self.block_size = block_size
        self.num_blocks = num_blocks


class NativeForward:
    """A recorded forward pass: hidden states [R, E] of a plan's logit rows, over the backend's own cache."""

    def __init__(self, program: Any, result: int, width: int) -> None:
        self.program = program
        self.result = result
        self.width = width

    def __call__(self, plan: StepPlan, cache: KVCache, previous: torch.Tensor | None = None) -> torch.Tensor:
        assert isinstance(cache, NativeKVCache)
        if previous is not None:
            raise ValueError(
                "The native backend computes a step when it is called; no token is unknown then."
            )
        rows = sum(row.num_logits for row in plan.rows)
        out = _floats(rows * self.width).view(rows, self.width)
        self.program.run(cache.native, plan.rows, self.result, out.data_ptr())
        return out


class NativeRows:
    """`RowOperations` (engine/sampler.py) on rows in memory; the rules of a draw are in `sampling.h`."""

    def __init__(self, program: Any) -> None:
        self.program = program

    def argmax(self, logits: torch.Tensor) -> torch.Tensor:
        logits = logits.contiguous()
        return to_device(self.program.argmax(logits.data_ptr(), *logits.shape), logits.device)

    def mask(self, logits: torch.Tensor, rows: Sequence[int], masks: Sequence[bytes]) -> torch.Tensor:
        assert logits.is_contiguous()
        tokens = self.program.mask(logits.data_ptr(), logits.shape[-1], list(rows), list(masks))
        return to_device(tokens, logits.device)

    def draw(
        self,
        logits: torch.Tensor,
        rows: Sequence[int],
        params: Sequence[SamplingParams],
        units: Sequence[float],
    ) -> torch.Tensor:
        logits = logits.contiguous()
        vocab = logits.shape[-1]
        tokens = self.program.draw(
            logits.data_ptr(),
            vocab,
            list(rows),
            [p.temperature for p in params],
            [min(max(0, p.top_k), vocab) for p in params],
            [p.top_p for p in params],
            [p.min_p for p in params],
            list(units),
        )
        return to_device(tokens, logits.device)
