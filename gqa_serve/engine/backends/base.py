"""The operations a model is made of: what every backend must offer, and nothing a model may bypass.

Owns the interface (`Backend`, `Packed`, `Linear`, `AttentionStep`) and `AttentionLayout`, the part of
attention that is fixed when the model is loaded. Knows no implementation.
Invariant: a model calls only these operations on activations and looks into none of them, so one model
definition serves every backend, and a backend may record a forward pass with stand-ins for tensors.
`reference.py` says what each operation must compute.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import torch

from gqa_serve.engine.rope import Rotary

if TYPE_CHECKING:
    from gqa_serve.engine.batch import ForwardBatch, StepPlan
    from gqa_serve.engine.kv_cache import KVCache
    from gqa_serve.engine.model_config import Activation, ModelConfig
    from gqa_serve.engine.models.decoder import Decoder
    from gqa_serve.engine.sampler import RowOperations
    from gqa_serve.engine.weights.quantized_matrix import QuantizedMatrix

Role = Literal["linear", "head", "embedding"]
"""What a matrix is for. The one matrix of a model with tied embeddings is a "head" that is also looked up."""


@dataclass(frozen=True)
class AttentionLayout:
    """Attention of a loaded model: sizes, and the distinct windows and rotary embeddings of its layers.

    Layer l has window `windows[layer_windows[l]]` (None: everything before it) and rotary embedding
    `rotaries[layer_rotaries[l]]` (None: no position encoding).
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    soft_cap: float | None
    windows: tuple[int | None, ...]
    layer_windows: tuple[int, ...]
    rotaries: tuple[Rotary, ...]
    layer_rotaries: tuple[int | None, ...]

    @property
    def group_size(self) -> int:
        """G: query heads per KV head."""
        return self.num_heads // self.num_kv_heads

    @classmethod
    def from_config(cls, config: ModelConfig, device: torch.device) -> AttentionLayout:
        """Number the distinct windows and embeddings of `config`, and compute the embeddings' frequencies."""
        windows = tuple(dict.fromkeys(config.windows))
        ropes = tuple(dict.fromkeys(rope for rope in config.ropes if rope is not None))
        return cls(
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            scale=config.attention_scale,
            soft_cap=config.attention_soft_cap,
            windows=windows,
            layer_windows=tuple(windows.index(window) for window in config.windows),
            rotaries=tuple(Rotary.build(rope, config.max_model_len, device) for rope in ropes),
            layer_rotaries=tuple(None if rope is None else ropes.index(rope) for rope in config.ropes),
        )


class Entries(NamedTuple):
    """Part of a vocabulary: tokens `first` <= id < `end` of `total`."""

    first: int
    end: int
    total: int

    def place(self, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Each token's row of a table with these entries alone, and whether the token is none of them. [T]"""
        rows = token_ids - self.first
        elsewhere = (rows < 0) | (rows >= self.end - self.first)
        return rows.masked_fill(elsewhere, 0), elsewhere


InPlace = Callable[[torch.Tensor], None]
"""Changes an activation [T, n] in place."""


class Packed(Protocol):
    """One matrix [n, k] of the checkpoint in a backend's own layout and precision."""

    @property
    def nbytes(self) -> int:
        """Memory it takes."""

    @property
    def format(self) -> str:
        """How a weight is held: "float32", "bfloat16", "float16", "int8", "int4", "fp8"."""


class Linear(Protocol):
    """A linear layer: x [T, in] -> x @ weight.T + bias [T, out]."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True, eq=False)
class HeadNorms:
    """RMSNorm of queries and keys before the rotation. Weights are float32.

    "head": each head by itself, `q` and `k` [D] (Qwen3, Gemma 3). "full": all query heads together, all key
    heads together, `q` [H * D] and `k` [KV * D] (OLMo 2).
    """

    mode: Literal["head", "full"]
    q: torch.Tensor
    k: torch.Tensor
    eps: float


class ForwardPass(Protocol):
    """A decoder ready to run: hidden states [R, E] of a plan's logit rows."""

    def __call__(self, plan: StepPlan, cache: KVCache, previous: torch.Tensor | None = None) -> torch.Tensor:
        """`previous` [R]: the tokens that the step before sampled, for rows that have a `previous_row`."""


class AttentionStep(ABC):
    """Attention of one step, over all layers: what depends on the batch is computed once, when it is made."""

    @abstractmethod
    def rotate_and_write(self, layer: int, qkv: torch.Tensor, norms: HeadNorms | None) -> torch.Tensor:
        """Norm and rotate queries and keys, write K and V of the new tokens into their slots.

        qkv: [T, (H + 2 KV) * D], query heads first, then keys, then values. Returns the queries [T, H, D].
        """

    @abstractmethod
    def attend(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        """Causal grouped attention of each new token over its request's blocks. q [T, H, D] -> [T, H * D].

        Query head h reads KV head h // G; a KV head's block is read once for its G query heads. A token at
        position p sees positions max(0, p - window + 1) .. p. Softmax and soft cap are in float32.
        """


class Backend(ABC):
    """A set of kernels on one kind of device.

    `kv_dtype` is how the KV cache holds numbers ("float32", "bfloat16", "float16", "int8", "fp8");
    `block_multiple` divides every block size that the backend serves.
    """

    name: str
    instruction_set = ""
    """Which of several kernels for one processor compute, where there are several."""
    kv_dtype: str
    block_multiple: int = 1
    lookahead: bool = False
    """Whether a step is only enqueued when it is called for, so that the next can be prepared meanwhile."""

    # --- at load ---

    @abstractmethod
    def pack(self, weight: torch.Tensor | QuantizedMatrix, role: Role) -> Packed:
        """Copy a checkpoint's matrix [n, k] into the backend's layout; called as each tensor streams by.

        `weight` may alias a file mapping and is not kept. Raises ValueError for numbers that cannot be
        served, as the end of a sentence that begins with the tensor's name: "holds NaN".
        """

    @abstractmethod
    def linear(self, parts: Sequence[Packed], bias: torch.Tensor | None) -> Linear:
        """One layer out of matrices stacked along their outputs, in order; bias [out], float32."""

    @abstractmethod
    def block_bytes(self, config: ModelConfig, block_size: int) -> int:
        """Bytes of one KV block over all layers, everything included that the cache keeps for it."""

    @abstractmethod
    def allocate_cache(self, config: ModelConfig, num_blocks: int, block_size: int) -> KVCache:
        """A zeroed cache. Raises CacheCapacityError if the device does not have the memory."""

    def compile(self, decoder: Decoder) -> ForwardPass:
        """What runs the decoder's forward pass over a plan.

        Here it is the pass itself; a backend may know a faster way.
        """
        from gqa_serve.engine.batch import ForwardBatch

        def run(plan: StepPlan, cache: KVCache, previous: torch.Tensor | None = None) -> torch.Tensor:
            batch = ForwardBatch.from_plan(plan, cache.block_size, decoder.device, previous)
            return decoder.forward(batch, cache)[batch.logit_rows]

        return run

    def capture(self, forward: ForwardPass, cache: KVCache) -> None:  # noqa: B027 - most have nothing to do
        """Make ready what serves this cache alone, before the first request: all later steps use it.

        `forward` is what `compile` gave.
        """

    def row_operations(self) -> RowOperations | None:
        """The sampler's operations on rows of logits, where the backend has faster ones than plain torch."""
        return None

    # --- in a step ---

    @abstractmethod
    def embed(
        self, table: Packed, token_ids: torch.Tensor, scale: float, entries: Entries | None = None
    ) -> torch.Tensor:
        """Rows of the table [V, E] times `scale`, which is first rounded to the model's dtype: [T, E].

        `entries`: the table holds these of the vocabulary alone; other tokens' rows are zeros.
        """

    def apply(self, function: InPlace, x: torch.Tensor) -> torch.Tensor:
        """x [T, n] after `function(x)` has changed it in place: what ranks tell each other."""
        function(x)
        return x

    @abstractmethod
    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in float32, returned in x's dtype.

        x [T, E]; weight [E], float32.
        """

    @abstractmethod
    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float, scale: float
    ) -> torch.Tensor:
        """residual += scale * x in place, then rms_norm(residual), or `residual` without a weight. [T, E]."""

    @abstractmethod
    def gated_activation(self, gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
        """gate_up [T, 2I] -> activation(first half) * second half, [T, I]."""

    @abstractmethod
    def prepare(self, batch: ForwardBatch, cache: KVCache, layout: AttentionLayout) -> AttentionStep:
        """What all layers of one step share: angles, slots, masks and the blocks to read per window."""

    @abstractmethod
    def logits(self, head: Linear, hidden: torch.Tensor, scale: float, cap: float | None) -> torch.Tensor:
        """head(hidden [R, E]) * scale, then cap * tanh(logits / cap) where there is a cap: [R, V] float32.

        The result may be overwritten by the next call.
        """
