"""Reading rotary embeddings out of a `config.json`, in either spelling.

    older:  "rope_theta": 1e4, "rope_scaling": {"type" or "rope_type": "linear", "factor": 2.0}
    newer:  "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
            "rope_parameters": {"full_attention": {...}, "sliding_attention": {...}}   (two per model)

Owns the translation to `RopeConfig` and the context length a scaling type stands for. Does not know the
formulas (`engine/rope.py`) or any family. Imports no torch.
Invariant: both spellings of one embedding give equal RopeConfigs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from gqa_serve.engine.model_config import RopeConfig, RopeType
from gqa_serve.engine.models.fields import Fields

_TYPES: dict[str, RopeType] = {
    "default": "default",
    "linear": "linear",
    "dynamic": "dynamic",
    "llama3": "llama3",
    "yarn": "yarn",
    "longrope": "longrope",
    "factors": "factors",
}


def rope_parameters(fields: Fields) -> dict[str, Any]:
    """The one rotary embedding of a config, older or newer spelling, as a flat dict of the newer one.

    As in transformers, a `rope_scaling` that is there wins over `rope_parameters`, and a `rope_theta` inside
    the dict over one beside it.
    """
    value = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    name = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    if not isinstance(value, Mapping):
        raise fields.error(name, "an object")
    parameters = dict(value)
    for key in ("rope_theta", "partial_rotary_factor"):
        if parameters.get(key) is None and fields.get(key) is not None:
            parameters[key] = fields.get(key)
    return parameters


def read_rope(fields: Fields, parameters: Mapping[str, Any], head_dim: int, *, where: str) -> RopeConfig:
    """One flat dict of the newer spelling to a RopeConfig. `where` names it in errors.

    `rope_theta` must be in the dict or in the family's defaults; `partial_rotary_factor` is the caller's
    (only some architectures have it), in the dict if it applies.
    """
    max_position = fields.positive_int("max_position_embeddings")
    rope = Fields(
        parameters,
        source=f"{fields.source}: {where}",
        defaults={
            "rope_theta": fields.defaults.get("rope_theta", 10000.0),
            "rope_type": parameters.get("type", "default"),
            "partial_rotary_factor": 1.0,
            "original_max_position_embeddings": max_position,
        },
    )
    kind = rope.get("rope_type")
    if not isinstance(kind, str) or kind not in _TYPES or "mrope_section" in parameters:
        raise rope.unsupported("mrope_section" if "mrope_section" in parameters else "rope_type", _names())
    rotary_dim = int(head_dim * rope.number("partial_rotary_factor", above=0))
    if rotary_dim < 2 or rotary_dim % 2 or rotary_dim > head_dim:
        raise rope.error(
            "partial_rotary_factor", f"such that an even part of head_dim ({head_dim}) is rotated"
        )
    return RopeConfig(
        rope_type=_TYPES[kind],
        theta=rope.number("rope_theta", above=0),
        rotary_dim=rotary_dim,
        **_scaling(rope, _TYPES[kind], rotary_dim, max_position),
    )


def _names() -> str:
    return ", ".join(name for name in _TYPES if name != "factors")


def _scaling(rope: Fields, kind: RopeType, rotary_dim: int, max_position: int) -> dict[str, Any]:
    """The fields of RopeConfig that belong to one scaling type."""
    if kind == "linear":
        return {"factor": rope.number("factor", above=0)}
    if kind == "dynamic":
        if rotary_dim < 4:
            raise rope.error("partial_rotary_factor", "such that at least 4 dimensions are rotated")
        return {"factor": rope.number("factor", above=0), "original_max_position": max_position}
    if kind == "llama3":
        return _llama3(rope)
    if kind == "yarn":
        return _yarn(rope, max_position)
    if kind == "longrope":
        return _longrope(rope, rotary_dim, max_position)
    if kind == "factors":
        return {"short_factors": rope.numbers("factors", rotary_dim // 2)}
    return {}


def _llama3(rope: Fields) -> dict[str, Any]:
    low = rope.number("low_freq_factor", above=0)
    return {
        "factor": rope.number("factor", above=0),
        "low_freq_factor": low,
        "high_freq_factor": rope.number("high_freq_factor", above=low),
        "original_max_position": rope.positive_int("original_max_position_embeddings"),
    }


def _yarn(rope: Fields, max_position: int) -> dict[str, Any]:
    """YaRN (Peng et al. 2023, arXiv 2309.00071) with the attention factor resolved to a number."""
    original = rope.positive_int("original_max_position_embeddings")
    # As in transformers: null (DeepSeek) is the ratio of the two lengths, a missing factor is an error.
    factor = max_position / original
    if "factor" not in rope.raw or rope.get("factor") is not None:
        factor = rope.number("factor", above=0)
    attention_factor = rope.optional_number("attention_factor", above=0)
    if attention_factor is None:
        mscale = rope.optional_number("mscale") or 0.0
        mscale_all = rope.optional_number("mscale_all_dim") or 0.0
        if mscale and mscale_all:
            attention_factor = _yarn_mscale(factor, mscale) / _yarn_mscale(factor, mscale_all)
        else:
            attention_factor = _yarn_mscale(factor, 1.0)
    return {
        "factor": factor,
        "original_max_position": original,
        "attention_factor": attention_factor,
        "beta_fast": rope.optional_number("beta_fast", above=0) or 32.0,
        "beta_slow": rope.optional_number("beta_slow", above=0) or 1.0,
        "truncate": rope.get("truncate") is None or rope.boolean("truncate"),
    }


def _yarn_mscale(factor: float, mscale: float) -> float:
    """Eq. 22 of the YaRN paper, with DeepSeek's multiplier `mscale`."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _longrope(rope: Fields, rotary_dim: int, max_position: int) -> dict[str, Any]:
    """LongRoPE (Ding et al. 2024, arXiv 2402.13753) with the attention factor resolved to a number."""
    original = rope.positive_int("original_max_position_embeddings")
    factor = rope.optional_number("factor", above=0)
    if factor is None:
        factor = max_position / original
    attention_factor = rope.optional_number("attention_factor", above=0)
    if attention_factor is None:
        attention_factor = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return {
        "factor": factor,
        "original_max_position": original,
        "attention_factor": attention_factor,
        "short_factors": rope.numbers("short_factor", rotary_dim // 2),
        "long_factors": rope.numbers("long_factor", rotary_dim // 2),
    }


def context_lengths(rope: RopeConfig | None, max_position: int) -> tuple[int, int]:
    """(max_model_len, context_limit) that `max_position_embeddings` and a rotary embedding stand for.

    `max_position_embeddings` counts the stretched context, except that
    * "linear" leaves it at the trained length, and every position is divided by the factor;
    * "yarn" may leave it at the trained length: the context is factor * original_max_position_embeddings;
    * "dynamic" leaves it at the trained length too, but changes the embedding as soon as the context is
      longer, so the trained length stays the default and factor times it is the limit.
    """
    if rope is None:
        return max_position, max_position
    if rope.rope_type == "linear":
        stretched = max(max_position, int(max_position * rope.factor))
        return stretched, stretched
    if rope.rope_type == "yarn":
        stretched = max(max_position, int(rope.original_max_position * rope.factor))
        return stretched, stretched
    if rope.rope_type == "dynamic":
        return max_position, max(max_position, int(max_position * rope.factor))
    return max_position, max_position


def uniform_rope(fields: Fields, common: Mapping[str, Any]) -> dict[str, Any]:
    """`ropes`, `max_model_len` and `context_limit` of a model with one embedding for all layers.

    These architectures rotate the whole head; a `partial_rotary_factor` other than 1 is refused.
    """
    parameters = rope_parameters(fields)
    if parameters.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise fields.unsupported("partial_rotary_factor", "1.0 for this architecture")
    parameters.pop("partial_rotary_factor", None)
    where = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    rope = read_rope(fields, parameters, common["head_dim"], where=where)
    max_model_len, limit = context_lengths(rope, fields.positive_int("max_position_embeddings"))
    return {
        "ropes": (rope,) * common["num_layers"],
        "max_model_len": max_model_len,
        "context_limit": limit,
    }
