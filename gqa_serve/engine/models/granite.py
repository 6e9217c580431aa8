"""Granite 3, the dense models.

Adds multipliers: on embeddings, scores, residual additions and (as a divisor) logits. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gqa_serve.engine.model_config import ModelConfig
from gqa_serve.engine.models.family import Family
from gqa_serve.engine.models.fields import Fields, common_fields
from gqa_serve.engine.models.rope_fields import uniform_rope

DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "embedding_multiplier": 1.0,
    "logits_scaling": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": 1.0,
}


def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """A Granite config.json to a ModelConfig."""
    fields = Fields(raw, defaults=DEFAULTS)
    common = common_fields(fields)
    bias = fields.boolean("attention_bias")
    return ModelConfig(
        **common,
        **uniform_rope(fields, common),
        windows=(None,) * common["num_layers"],
        attention_scale=fields.number("attention_multiplier"),
        embedding_scale=fields.number("embedding_multiplier"),
        residual_scale=fields.number("residual_multiplier"),
        logits_scale=1.0 / fields.number("logits_scaling", above=0),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=fields.boolean("mlp_bias"),
    )


FAMILY = Family("granite", ("GraniteForCausalLM",), ("granite",), config_from_hf)
