"""Mistral 7B v0.1 to v0.3, Nemo, Small; Ministral.

Adds a sliding window: on every layer (Mistral), or on the layers `layer_types` names (Ministral). head_dim
may differ from hidden_size / num_attention_heads (Nemo, Small). Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gqa_serve.engine.model_config import ModelConfig
from gqa_serve.engine.models.family import Family
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
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}


def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """A Mistral config.json: `sliding_window` (null = none) holds for all layers."""
    fields = Fields(raw, defaults=DEFAULTS)
    kinds = _uniform_types(fields)
    explicit = explicit_layer_types(fields)
    if explicit is not None and explicit != kinds:
        raise fields.unsupported(
            "layer_types", "the same window on every layer, or the architecture MinistralForCausalLM"
        )
    return _build(fields, kinds)


def ministral_config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """A Ministral config.json: `layer_types` says which layers have the window."""
    fields = Fields(raw, defaults=DEFAULTS)
    return _build(fields, explicit_layer_types(fields) or _uniform_types(fields))


def _uniform_types(fields: Fields) -> list[str]:
    kind = FULL if fields.optional_positive_int("sliding_window") is None else SLIDING
    return [kind] * fields.positive_int("num_hidden_layers")


def _build(fields: Fields, kinds: list[str]) -> ModelConfig:
    common = common_fields(fields)
    return ModelConfig(
        **common,
        **uniform_rope(fields, common),
        windows=layer_windows(fields, kinds),
        attention_scale=common["head_dim"] ** -0.5,
    )


FAMILY = Family("mistral", ("MistralForCausalLM",), ("mistral",), config_from_hf)
MINISTRAL = Family("ministral", ("MinistralForCausalLM",), ("ministral",), ministral_config_from_hf)
