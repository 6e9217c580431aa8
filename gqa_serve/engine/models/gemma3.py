"""Gemma 3, the text models, and the text decoder inside the multimodal checkpoints.

Adds to Gemma 2 an RMSNorm of each query and key head, five window layers to each full one, and a second
rotary base for the window layers; drops the soft cap on scores. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gqa_serve.engine.model_config import ModelConfig, RopeConfig
from gqa_serve.engine.models import gemma2
from gqa_serve.engine.models.family import Family
from gqa_serve.engine.models.fields import (
    FULL,
    SLIDING,
    Fields,
    architecture_name,
    common_fields,
    explicit_layer_types,
    layer_windows,
    refuse_quantized,
)
from gqa_serve.engine.models.rope_fields import read_rope

# What the architecture means by an absent field. Multimodal configs rely on it: their `text_config` names
# only what differs.
DEFAULTS = {
    **gemma2.DEFAULTS,
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "max_position_embeddings": 131072,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "sliding_window_pattern": 6,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
}


def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """A Gemma 3 text config.json to a ModelConfig."""
    fields = Fields(raw, defaults=DEFAULTS)
    common = common_fields(fields, activation="hidden_activation")
    if fields.get("attn_logit_softcapping") is not None:
        raise fields.unsupported("attn_logit_softcapping", "null, as in all Gemma 3 models")
    kinds = explicit_layer_types(fields)
    if kinds is None:
        pattern = fields.positive_int("sliding_window_pattern")
        kinds = [SLIDING if (layer + 1) % pattern else FULL for layer in range(common["num_layers"])]
    ropes = _ropes(fields, common["head_dim"])
    max_position = fields.positive_int("max_position_embeddings")  # counts the stretched context
    return ModelConfig(
        **common,
        **gemma2.gemma_fields(fields, common["hidden_size"]),
        windows=layer_windows(fields, kinds),
        ropes=tuple(ropes[kind] for kind in kinds),
        max_model_len=max_position,
        context_limit=max_position,
        qk_norm="head",
    )


def _ropes(fields: Fields, head_dim: int) -> dict[str, RopeConfig]:
    """The embeddings of full and of window layers; `rope_scaling` (older) is for full layers only."""
    nested = fields.get("rope_parameters")
    if nested is not None and not isinstance(nested, Mapping):
        raise fields.error("rope_parameters", "an object")
    extra = set(nested or {}) - {FULL, SLIDING}
    if extra:
        raise fields.error("rope_parameters", f"an object with {FULL} and {SLIDING}, each an object")
    ropes = {}
    for kind, base in ((FULL, "rope_theta"), (SLIDING, "rope_local_base_freq")):
        parameters = (nested or {}).get(kind) or {}
        scaling = fields.get("rope_scaling") if kind == FULL else None
        for name, value in ((f"rope_parameters.{kind}", parameters), ("rope_scaling", scaling or {})):
            if not isinstance(value, Mapping):
                raise fields.error(name, "an object")
        merged = {base: fields.get(base), **parameters, **(scaling or {})}
        merged.setdefault("rope_theta", merged.pop(base))
        ropes[kind] = read_rope(fields, merged, head_dim, where=f"rope_parameters.{kind}")
    return ropes


def multimodal_config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """The text decoder of a multimodal Gemma 3 config.json; fields of the whole stand in for absent ones."""
    text = raw.get("text_config")
    if not isinstance(text, Mapping):
        raise Fields(raw).error("text_config", "an object")
    refuse_quantized(Fields(raw))
    shared = ("dtype", "torch_dtype", "bos_token_id", "eos_token_id", "tie_word_embeddings")
    outer = {name: raw[name] for name in shared if raw.get(name) is not None}
    return config_from_hf({**outer, **text, "architectures": [architecture_name(raw)]})


FAMILY = Family(
    "gemma3",
    ("Gemma3ForCausalLM",),
    ("gemma3_text",),
    config_from_hf,
    gemma2.NAMES,
)
MULTIMODAL = Family(
    "gemma3 (text part)",
    ("Gemma3ForConditionalGeneration",),
    ("gemma3",),
    multimodal_config_from_hf,
    gemma2.NAMES,
    prefixes=("language_model.model.", "model.language_model."),
    heads=("language_model.lm_head.weight", "lm_head.weight"),
    ignored=(
        "vision_tower.",
        "multi_modal_projector.",
        "model.vision_tower.",
        "model.multi_modal_projector.",
    ),
)
