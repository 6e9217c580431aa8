"""The one model: a decoder-only transformer as `ModelConfig` describes it, over a backend's operations.

Owns the forward pass. Does not know families, requests or sampling: a `ForwardBatch` says which tokens to
compute and where their K and V go.
Invariant: a token's hidden state depends only on the tokens of its own request.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from gqa_serve.engine.backends.base import AttentionLayout, Backend
from gqa_serve.engine.model_config import ModelConfig
from gqa_serve.engine.models.layers import DecoderLayer
from gqa_serve.engine.models.parameters import Parameters

if TYPE_CHECKING:
    from gqa_serve.engine.batch import ForwardBatch
    from gqa_serve.engine.kv_cache import KVCache


class Decoder:
    """A loaded model. Call `forward`, then `logits` on the rows that sample, under torch.inference_mode."""

    def __init__(
        self,
        config: ModelConfig,
        tensors: MutableMapping[str, torch.Tensor],
        backend: Backend,
        device: torch.device,
    ) -> None:
        """Takes the parameters out of `tensors` (names and shapes as `family.parameter_shapes` says)."""
        self.config = config
        self.backend = backend
        self.layout = AttentionLayout.from_config(config, device)
        self.weight_bytes = sum(tensor.nbytes for tensor in tensors.values())
        parameters = Parameters(tensors)
        self.embedding = tensors.pop("embed.weight")  # [V, E]
        self.layers = [
            DecoderLayer(config, parameters.under(f"layers.{layer}"), layer, backend)
            for layer in range(config.num_layers)
        ]
        self.final_norm = parameters.norm("norm")
        head = self.embedding if config.tie_embeddings else tensors.pop("lm_head.weight")
        self.lm_head = backend.pack_linear(head, None)
        # The norm of what each layer hands on: the next layer's input norm, at the end the model's.
        self.next_norms = [*(layer.attn_norm for layer in self.layers[1:]), self.final_norm]

    def forward(self, batch: ForwardBatch, cache: KVCache) -> torch.Tensor:
        """Compute the batch's tokens and write their K and V; returns the normed hidden states [T, E]."""
        residual = F.embedding(batch.token_ids, self.embedding)  # [T, E]
        if self.config.embedding_scale != 1.0:
            # The factor is rounded to the model's dtype first, as in training.
            residual = residual * torch.tensor(self.config.embedding_scale, dtype=residual.dtype)
        step = self.backend.prepare(batch, cache, self.layout)
        first_norm = self.layers[0].attn_norm
        x = residual
        if first_norm is not None:
            x = self.backend.rms_norm(residual, first_norm, self.config.norm_eps)
        for layer, next_norm in zip(self.layers, self.next_norms, strict=True):
            x = layer(x, residual, next_norm, step)
        return x

    __call__ = forward

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [R, E] -> logits [R, V], float32."""
        logits = self.lm_head(hidden).float()  # [R, V]
        if self.config.logits_scale != 1.0:
            logits = logits * self.config.logits_scale
        cap = self.config.logits_soft_cap
        return logits if cap is None else torch.tanh(logits / cap) * cap
