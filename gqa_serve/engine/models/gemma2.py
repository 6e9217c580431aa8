"""Gemma 2.

Adds norms on both sides of attention and MLP, norm weights stored minus one, scaled embeddings, a query scale
of its own, tanh soft caps on scores and logits, and a window on every other layer. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gqa_serve.engine.model_config import ModelConfig
from gqa_serve.engine.models.family import Family, WeightNames
from gqa_serve.engine.models.fields import (
    FULL,
    SLIDING,
    Fields,
    common_fields,
    explicit_layer_types,
    layer_windows,
)
from gqa_serve.engine.models.rope_fields import uniform_rope

DEFAULTS = {
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
NAMES = WeightNames(
    attn_norm="input_layernorm",
    post_attn_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    post_mlp_norm="post_feedforward_layernorm",
)


def gemma_fields(fields: Fields, hidden_size: int) -> dict[str, Any]:
    """What Gemma 2 and Gemma 3 have in common beyond the common fields."""
    if fields.boolean("use_bidirectional_attention"):
        raise fields.unsupported("use_bidirectional_attention", "false (causal attention)")
    bias = fields.boolean("attention_bias")
    return {
        "norm_plus_one": True,
        "embedding_scale": hidden_size**0.5,
        "attention_scale": fields.number("query_pre_attn_scalar", above=0) ** -0.5,
        "logits_soft_cap": fields.optional_number("final_logit_softcapping", above=0),
        "qkv_bias": bias,
        "o_bias": bias,
    }


def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """A Gemma 2 config.json to a ModelConfig."""
    fields = Fields(raw, defaults=DEFAULTS)
    common = common_fields(fields, activation="hidden_activation")
    kinds = explicit_layer_types(fields)
    if kinds is None:
        kinds = [FULL if layer % 2 else SLIDING for layer in range(common["num_layers"])]
    return ModelConfig(
        **common,
        **gemma_fields(fields, common["hidden_size"]),
        **uniform_rope(fields, common),
        windows=layer_windows(fields, kinds),
        attention_soft_cap=fields.optional_number("attn_logit_softcapping", above=0),
    )


FAMILY = Family("gemma2", ("Gemma2ForCausalLM",), ("gemma2",), config_from_hf, NAMES)
