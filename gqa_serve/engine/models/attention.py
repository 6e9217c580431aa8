"""The attention block: projection, query and key norms, rotation and cache write, grouped attention, output.

Owns the order of these operations. Does not know how any is computed (the backend) or where a request's
blocks are (the step). Shapes: hidden [T, E] in, [T, E] out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from gqa_serve.engine.backends.base import AttentionStep, Backend
from gqa_serve.engine.model_config import ModelConfig
from gqa_serve.engine.models.parameters import Parameters


class Attention:
    """Grouped-query attention of one layer; MHA and MQA are its two ends."""

    def __init__(self, config: ModelConfig, parameters: Parameters, layer: int, backend: Backend) -> None:
        self.layer = layer
        self.backend = backend
        self.num_heads = config.num_heads
        self.split = (config.num_heads + config.num_kv_heads, config.num_kv_heads)
        self.head_dim = config.head_dim
        self.eps = config.norm_eps
        self.qkv = parameters.linear("qkv", backend)
        self.o = parameters.linear("o", backend)
        self.normalize: Callable[[torch.Tensor], torch.Tensor] | None = None
        if config.qk_norm != "none":
            self.q_norm = parameters.norm("q_norm")
            self.k_norm = parameters.norm("k_norm")
        if config.qk_norm == "head":
            num_kv_heads = config.num_kv_heads
            self.qk_weight = torch.cat(
                (self.q_norm.expand(self.num_heads, -1), self.k_norm.expand(num_kv_heads, -1))
            )  # [H + KV, D]: queries and keys in one call
            self.normalize = self._normalize_heads
        elif config.qk_norm == "full":
            self.normalize = self._normalize_full

    def __call__(self, x: torch.Tensor, step: AttentionStep) -> torch.Tensor:
        qkv = self.qkv(x).view(x.shape[0], -1, self.head_dim)  # [T, H + 2 KV, D]
        qk, v = qkv.split_with_sizes(self.split, 1)  # [T, H + KV, D], [T, KV, D]
        if self.normalize is not None:
            qk = self.normalize(qk)
        q = step.rotate_and_write(self.layer, qk, v)  # [T, H, D]
        return self.o(step.attend(self.layer, q))

    def _normalize_heads(self, qk: torch.Tensor) -> torch.Tensor:
        """Each head by itself (Qwen3, Gemma 3)."""
        return self.backend.rms_norm(qk, self.qk_weight, self.eps)

    def _normalize_full(self, qk: torch.Tensor) -> torch.Tensor:
        """All query heads together, all key heads together (OLMo 2)."""
        q, k = (
            qk[:, : self.num_heads].flatten(1),
            qk[:, self.num_heads :].flatten(1),
        )  # [T, H * D], [T, KV * D]
        q = self.backend.rms_norm(q, self.q_norm, self.eps)
        k = self.backend.rms_norm(k, self.k_norm, self.eps)
        return torch.cat((q, k), dim=1).view(qk.shape)
