"""The attention block: projection, query and key norms, rotation and cache write, grouped attention, output.

Owns the order of these operations. Does not know how any is computed (the backend) or where a request's
blocks are (the step). Shapes: hidden [T, E] in, [T, E] out.
"""

from __future__ import annotations

import torch

from gqa_serve.engine.backends.base import AttentionStep, HeadNorms
from gqa_serve.engine.model_config import ModelConfig
from gqa_serve.engine.models.parameters import Parameters


class Attention:
    """Grouped-query attention of one layer; MHA and MQA are its two ends."""

    def __init__(self, config: ModelConfig, parameters: Parameters, layer: int) -> None:
        self.layer = layer
        self.qkv = parameters.linear("qkv")
        self.o = parameters.linear("o")
        self.norms: HeadNorms | None = None
        if config.qk_norm != "none":
            q, k = parameters.norm("q_norm"), parameters.norm("k_norm")
            self.norms = HeadNorms(config.qk_norm, q, k, config.norm_eps)

    def __call__(self, x: torch.Tensor, step: AttentionStep) -> torch.Tensor:
        qkv = self.qkv(x)  # [T, (H + 2 KV) * D]
        q = step.rotate_and_write(self.layer, qkv, self.norms)  # [T, H, D]
        return self.o(step.attend(self.layer, q))
