"""Phi-3, Phi-3.5, Phi-4-mini, Phi-4.

Adds checkpoints with fused qkv and gate-up projections, partial rotary embeddings and LongRoPE. Imports no
torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gqa_serve.engine.model_config import ModelConfig
from gqa_serve.engine.models.family import Family, WeightNames
from gqa_serve.engine.models.fields import Fields, common_fields
from gqa_serve.engine.models.rope_fields import context_lengths, read_rope, rope_parameters

DEFAULTS = {"hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 4096}
# Names under which earlier releases published LongRoPE.
_LONGROPE_NAMES = ("su", "yarn")


def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """A Phi-3 config.json; the trained context length stands beside the rotary parameters, not in them."""
    fields = Fields(raw, defaults=DEFAULTS)
    common = common_fields(fields)
    num_layers = common["num_layers"]
    parameters = rope_parameters(fields)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind in _LONGROPE_NAMES:
        kind = "longrope"
    if kind not in ("default", "longrope"):
        raise Fields({"rope_type": kind}, source="config.json: rope_scaling").unsupported(
            "rope_type", "default, longrope"
        )
    parameters["rope_type"] = kind
    if fields.get("original_max_position_embeddings") is not None:
        original = fields.positive_int("original_max_position_embeddings")
        parameters["original_max_position_embeddings"] = original
    else:
        parameters.setdefault("original_max_position_embeddings", 4096)
    rope = read_rope(fields, parameters, common["head_dim"], where="rope_scaling")
    max_model_len, limit = context_lengths(rope, fields.positive_int("max_position_embeddings"))
    return ModelConfig(
        **common,
        windows=(fields.optional_positive_int("sliding_window"),) * num_layers,
        ropes=(rope,) * num_layers,
        max_model_len=max_model_len,
        context_limit=limit,
        attention_scale=common["head_dim"] ** -0.5,
    )


FAMILY = Family("phi3", ("Phi3ForCausalLM",), ("phi3",), config_from_hf, WeightNames(fused=True))
