"""OLMo 2.

Norms the output of attention and MLP instead of their input, and queries and keys over the full projection
instead of per head. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gqa_serve.engine.model_config import ModelConfig
from gqa_serve.engine.models.family import Family, WeightNames
from gqa_serve.engine.models.fields import Fields, common_fields
from gqa_serve.engine.models.rope_fields import uniform_rope

DEFAULTS = {"hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 2048}
NAMES = WeightNames(
    attn_norm=None,
    post_attn_norm="post_attention_layernorm",
    mlp_norm=None,
    post_mlp_norm="post_feedforward_layernorm",
)


def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """An OLMo 2 config.json to a ModelConfig."""
    fields = Fields(raw, defaults=DEFAULTS)
    common = common_fields(fields)
    bias = fields.boolean("attention_bias")
    return ModelConfig(
        **common,
        **uniform_rope(fields, common),
        windows=(None,) * common["num_layers"],
        attention_scale=common["head_dim"] ** -0.5,
        qk_norm="full",
        qkv_bias=bias,
        o_bias=bias,
    )


FAMILY = Family("olmo2", ("Olmo2ForCausalLM",), ("olmo2",), config_from_hf, NAMES)
