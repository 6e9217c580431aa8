"""The one model: a decoder-only transformer as `ModelConfig` describes it, over a backend's operations.

Owns the forward pass. Does not know families, requests or sampling: a `ForwardBatch` says which tokens to
compute and where their K and V go.
Invariant: a token's hidden state depends only on the tokens of its own request; and only operations of the
backend touch activations, here and in the layers, so that a backend can record them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from gqa_serve.engine.backends.base import AttentionLayout, Backend
from gqa_serve.engine.model_config import ModelConfig
from gqa_serve.engine.models.layers import DecoderLayer
from gqa_serve.engine.models.parameters import Loaded, Parameters
from gqa_serve.engine.models.ranks import Ranks

if TYPE_CHECKING:
    from gqa_serve.engine.batch import ForwardBatch
    from gqa_serve.engine.kv_cache import KVCache


class Decoder:
    """A loaded model. Call `forward`, then `logits` on the rows that sample, under torch.inference_mode."""

    def __init__(
        self,
        config: ModelConfig,
        loaded: Loaded,
        backend: Backend,
        device: torch.device,
        ranks: Ranks | None = None,
    ) -> None:
        """Takes the parameters out of `loaded` (names as `family.parameter_shapes` says).

        `ranks`: the others that hold this model's other parts; `config` describes the part that is here.
        """
        self.config = config
        self.backend = backend
        self.device = device
        self.ranks = ranks
        self.layout = AttentionLayout.from_config(config, device)
        self.weight_formats = loaded.formats()
        parameters = Parameters(loaded, backend)
        self.embedding = parameters.matrix("embed")  # [V, E]
        self.layers = [
            DecoderLayer(config, parameters.under(f"layers.{layer}"), layer, backend, ranks)
            for layer in range(config.num_layers)
        ]
        self.final_norm = parameters.norm("norm")
        self.lm_head = (
            backend.linear([self.embedding], None) if config.tie_embeddings else parameters.linear("lm_head")
        )
        # The norm of what each layer hands on: the next layer's input norm, at the end the model's.
        self.next_norms = [*(layer.attn_norm for layer in self.layers[1:]), self.final_norm]

    @property
    def weight_bytes(self) -> int:
        """Memory of all parameters."""
        return sum(self.weight_formats.values())

    def forward(self, batch: ForwardBatch, cache: KVCache) -> torch.Tensor:
        """Compute the batch's tokens and write their K and V; returns the normed hidden states [T, E]."""
        step = self.backend.prepare(batch, cache, self.layout)
        residual = self._embed(batch.token_ids)  # [T, E]
        first_norm = self.layers[0].attn_norm
        x = residual
        if first_norm is not None:
            x = self.backend.rms_norm(residual, first_norm, self.config.norm_eps)
        for layer, next_norm in zip(self.layers, self.next_norms, strict=True):
            x = layer(x, residual, next_norm, step)
        return x

    __call__ = forward

    def _embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        scale, ranks = self.config.embedding_scale, self.ranks
        if ranks is None:
            return self.backend.embed(self.embedding, token_ids, scale)
        rows = self.backend.embed(self.embedding, token_ids, scale, ranks.entries)
        return self.backend.apply(ranks.add_up, rows)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [R, E] -> logits [R, V], float32."""
        config = self.config
        logits = self.backend.logits(self.lm_head, hidden, config.logits_scale, config.logits_soft_cap)
        return logits if self.ranks is None else self.ranks.join(logits)
