"""Qwen3, the dense models.

Adds an RMSNorm of each query and key head before the rotation, and an explicit head_dim. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gqa_serve.engine.model_config import ModelConfig
from gqa_serve.engine.models import qwen2
from gqa_serve.engine.models.family import Family
from gqa_serve.engine.models.fields import Fields, common_fields
from gqa_serve.engine.models.rope_fields import uniform_rope

DEFAULTS = {**qwen2.DEFAULTS, "head_dim": 128}


def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """A Qwen3 config.json to a ModelConfig."""
    fields = Fields(raw, defaults=DEFAULTS)
    common = common_fields(fields)
    bias = fields.boolean("attention_bias")
    return ModelConfig(
        **common,
        **uniform_rope(fields, common),
        windows=qwen2.qwen_windows(fields),
        attention_scale=common["head_dim"] ** -0.5,
        qk_norm="head",
        qkv_bias=bias,
        o_bias=bias,
    )


FAMILY = Family("qwen3", ("Qwen3ForCausalLM",), ("qwen3",), config_from_hf)
