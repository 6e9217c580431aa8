"""SmolLM3.

Adds layers without any position encoding (`no_rope_layers`, where 0 means none). Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gqa_serve.engine.model_config import ModelConfig
from gqa_serve.engine.models.family import Family
from gqa_serve.engine.models.fields import FULL, SLIDING, Fields, common_fields, explicit_layer_types
from gqa_serve.engine.models.fields import layer_windows as windows_of
from gqa_serve.engine.models.rope_fields import uniform_rope

DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rope_theta": 2_000_000.0,
    "no_rope_layer_interval": 4,
    "tie_word_embeddings": True,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}


def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """A SmolLM3 config.json to a ModelConfig."""
    fields = Fields(raw, defaults=DEFAULTS)
    common = common_fields(fields)
    rotated = _rotated_layers(fields, common["num_layers"])
    rope = uniform_rope(fields, common)
    rope["ropes"] = tuple(r if on else None for r, on in zip(rope["ropes"], rotated, strict=True))
    bias = fields.boolean("attention_bias")
    return ModelConfig(
        **common,
        **rope,
        windows=_windows(fields, rotated),
        attention_scale=common["head_dim"] ** -0.5,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=fields.boolean("mlp_bias"),
    )


def _rotated_layers(fields: Fields, num_layers: int) -> list[bool]:
    flags = fields.get("no_rope_layers")
    if flags is None:
        interval = fields.positive_int("no_rope_layer_interval")
        return [(layer + 1) % interval != 0 for layer in range(num_layers)]
    if not isinstance(flags, list) or len(flags) < num_layers or any(flag not in (0, 1) for flag in flags):
        raise fields.error("no_rope_layers", f"a list of at least {num_layers} zeros and ones")
    return [bool(flag) for flag in flags[:num_layers]]


def _windows(fields: Fields, rotated: list[bool]) -> tuple[int | None, ...]:
    """Without `layer_types`, the window is on the layers without rotary embedding."""
    kinds = explicit_layer_types(fields)
    if not fields.boolean("use_sliding_window") or fields.get("sliding_window") is None:
        if kinds and SLIDING in kinds:
            raise fields.error("layer_types", f"without {SLIDING} where use_sliding_window is off")
        return (None,) * len(rotated)
    return windows_of(fields, kinds or [FULL if on else SLIDING for on in rotated])


FAMILY = Family("smollm3", ("SmolLM3ForCausalLM",), ("smollm3",), config_from_hf)
