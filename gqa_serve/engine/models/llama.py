"""Llama 2, 3, 3.1, 3.2, and what shares its architecture: SmolLM2, TinyLlama, Yi, DeepSeek-distilled Llama.

Adds nothing to the plain decoder except optional biases; rotary scaling is the config's. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gqa_serve.engine.model_config import ModelConfig
from gqa_serve.engine.models.family import Family
from gqa_serve.engine.models.fields import Fields, common_fields
from gqa_serve.engine.models.rope_fields import uniform_rope

DEFAULTS = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 2048}


def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """A Llama config.json to a ModelConfig."""
    fields = Fields(raw, defaults=DEFAULTS)
    common = common_fields(fields)
    bias = fields.boolean("attention_bias")
    return ModelConfig(
        **common,
        **uniform_rope(fields, common),
        windows=(None,) * common["num_layers"],
        attention_scale=common["head_dim"] ** -0.5,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=fields.boolean("mlp_bias"),
    )


FAMILY = Family("llama", ("LlamaForCausalLM",), ("llama",), config_from_hf)
