"""The attention block: projection, query and key norms, rotation and cache write, grouped attention, output.

Owns the order of these operations. Does not know how any is computed (the backend) or where a request's
blocks are (the step). Shapes: hidden [T, E] in, [T, E] out: with `ranks`, this rank's part of a sum.
"""

from __future__ import annotations

import torch

from gqa_serve.engine.backends.base import AttentionStep, Backend, HeadNorms, InPlace
from gqa_serve.engine.model_config import ModelConfig
from gqa_serve.engine.models.parameters import Parameters
from gqa_serve.engine.models.ranks import Ranks


class Attention:
    """Grouped-query attention of one layer; MHA and MQA are its two ends."""

    def __init__(
        self,
        config: ModelConfig,
        parameters: Parameters,
        layer: int,
        backend: Backend,
        ranks: Ranks | None = None,
    ) -> None:
        self.layer = layer
        self.backend = backend
        self.qkv = parameters.linear("qkv")
        self.o = parameters.linear("o")
        self.norms: HeadNorms | None = None
        if config.qk_norm != "none":
            q, k = parameters.norm("q_norm"), parameters.norm("k_norm")
            self.norms = HeadNorms(config.qk_norm, q, k, config.norm_eps)
        self.full_norms: InPlace | None = None
        if ranks is not None and self.norms is not None and self.norms.mode == "full":
            self.full_norms, self.norms = ranks.full_norms(self.norms), None

    def __call__(self, x: torch.Tensor, step: AttentionStep) -> torch.Tensor:
        qkv = self.qkv(x)  # [T, (H + 2 KV) * D]
        if self.full_norms is not None:
            qkv = self.backend.apply(self.full_norms, qkv)
        q = step.rotate_and_write(self.layer, qkv, self.norms)  # [T, H, D]
        return self.o(step.attend(self.layer, q))
