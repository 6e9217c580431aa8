"""The operations a model is made of: what every backend must offer, and nothing a model may bypass.

Owns the interface (`Backend`, `Linear`, `AttentionStep`) and `AttentionLayout`, the part of attention that is
fixed when the model is loaded. Knows no implementation.
Invariant: a model calls only these operations, so one model definition serves every backend, and
`reference.py` says what each must compute.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from gqa_serve.engine.rope import Rotary

if TYPE_CHECKING:
    from gqa_serve.engine.batch import ForwardBatch
    from gqa_serve.engine.kv_cache import KVCache
    from gqa_serve.engine.model_config import Activation, ModelConfig


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


class Linear(Protocol):
    """A packed linear layer: x [T, in] -> x @ weight.T + bias [T, out]."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...


class AttentionStep(ABC):
    """Attention of one step, over all layers: what depends on the batch is computed once, when it is made."""

    @abstractmethod
    def rotate_and_write(self, layer: int, qk: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Rotate queries and keys, write K and V of the new tokens into their slots.

        qk: [T, H + KV, D], query heads first; v: [T, KV, D]; either may be a view. Returns rotated queries
        [T, H, D].
        """

    @abstractmethod
    def attend(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        """Causal grouped attention of each new token over its request's blocks. q [T, H, D] -> [T, H * D].

        Query head h reads KV head h // G; a KV head's block is read once for its G query heads. A token at
        position p sees positions max(0, p - window + 1) .. p. Softmax and soft cap are in float32.
        """


class Backend(ABC):
    """A set of kernels on one kind of device."""

    name: str

    @abstractmethod
    def pack_linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        """Take over weight [out, in] and bias [out], in whatever layout suits; called once, at load."""

    @abstractmethod
    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in float32, returned in x's dtype.

        weight is float32 and broadcasts against x: [D], or [heads, D] for x [T, heads, D].
        """

    @abstractmethod
    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, scale: float
    ) -> torch.Tensor:
        """residual += scale * x in place, then rms_norm(residual). All [T, E]."""

    @abstractmethod
    def gated_activation(self, gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
        """gate_up [T, 2I] -> activation(first half) * second half, [T, I]."""

    @abstractmethod
    def prepare(self, batch: ForwardBatch, cache: KVCache, layout: AttentionLayout) -> AttentionStep:
        """What all layers of one step share: angles, slots, masks and the blocks to read per window."""
