"""Qwen2, Qwen2.5, QwQ.

Adds a bias on q, k and v, and a sliding window on the layers from `max_window_layers` on, if
`use_sliding_window` switches it on at all. Imports no torch.
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
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def qwen_windows(fields: Fields) -> tuple[int | None, ...]:
    """The windows of Qwen2 and Qwen3: `layer_types`, or else every layer from `max_window_layers` on."""
    num_layers = fields.positive_int("num_hidden_layers")
    kinds = explicit_layer_types(fields)
    if not fields.boolean("use_sliding_window") or fields.optional_positive_int("sliding_window") is None:
        if kinds and SLIDING in kinds:
            raise fields.error("layer_types", f"without {SLIDING} where use_sliding_window is off")
        return (None,) * num_layers
    if kinds is None:
        first = fields.get("max_window_layers")
        if isinstance(first, bool) or not isinstance(first, int) or first < 0:
            raise fields.error("max_window_layers", "an integer, 0 or greater")
        kinds = [SLIDING if layer >= first else FULL for layer in range(num_layers)]
    return layer_windows(fields, kinds)


def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """A Qwen2 config.json to a ModelConfig."""
    fields = Fields(raw, defaults=DEFAULTS)
    common = common_fields(fields)
    return ModelConfig(
        **common,
        **uniform_rope(fields, common),
        windows=qwen_windows(fields),
        attention_scale=common["head_dim"] ** -0.5,
        qkv_bias=True,
    )


FAMILY = Family("qwen2", ("Qwen2ForCausalLM",), ("qwen2",), config_from_hf)
