"""The gated MLP and the decoder layer.

Owns how a layer's parts follow each other in every norm placement. Does not know the family: `ModelConfig`
and the parameters that are there say all of it.
Invariant: the residual stream is one tensor [T, E] that layers add to in place.
"""

from __future__ import annotations

import torch

from gqa_serve.engine.backends.base import AttentionStep, Backend
from gqa_serve.engine.model_config import ModelConfig
from gqa_serve.engine.models.attention import Attention
from gqa_serve.engine.models.parameters import Parameters
from gqa_serve.engine.models.ranks import Ranks


class GatedMLP:
    """down(activation(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, parameters: Parameters, backend: Backend) -> None:
        self.backend = backend
        self.activation = config.activation
        self.gate_up = parameters.linear("gate_up")
        self.down = parameters.linear("down")

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.backend.gated_activation(self.gate_up(x), self.activation))


class DecoderLayer:
    """Attention and MLP around the residual stream; a norm that the family lacks is None.

    A layer is given its input already normed and norms the next layer's, because adding to the residual
    stream and norming it is one operation of the backend.
    """

    def __init__(
        self,
        config: ModelConfig,
        parameters: Parameters,
        layer: int,
        backend: Backend,
        ranks: Ranks | None = None,
    ) -> None:
        self.backend = backend
        self.ranks = ranks
        self.eps = config.norm_eps
        self.scale = config.residual_scale
        self.attn_norm = parameters.optional_norm("attn_norm")
        self.post_attn_norm = parameters.optional_norm("post_attn_norm")
        self.mlp_norm = parameters.optional_norm("mlp_norm")
        self.post_mlp_norm = parameters.optional_norm("post_mlp_norm")
        self.attention = Attention(config, parameters, layer, backend, ranks)
        self.mlp = GatedMLP(config, parameters, backend)

    def __call__(
        self, x: torch.Tensor, residual: torch.Tensor, next_norm: torch.Tensor | None, step: AttentionStep
    ) -> torch.Tensor:
        """x [T, E], the normed input, -> the next layer's normed input; adds to `residual` in place."""
        x = self._summed(self.attention(x, step))
        if self.post_attn_norm is not None:
            x = self.backend.rms_norm(x, self.post_attn_norm, self.eps)
        x = self.backend.add_rms_norm(x, residual, self.mlp_norm, self.eps, self.scale)
        x = self._summed(self.mlp(x))
        if self.post_mlp_norm is not None:
            x = self.backend.rms_norm(x, self.post_mlp_norm, self.eps)
        return self.backend.add_rms_norm(x, residual, next_norm, self.eps, self.scale)

    def _summed(self, x: torch.Tensor) -> torch.Tensor:
        """Of attention or MLP: all ranks' parts together."""
        return x if self.ranks is None else self.backend.apply(self.ranks.add_up, x)
