"""The families that are served, and the choice among them.

Owns the registry. A new family is one file beside this one and one line below. Imports no torch, because
`ModelConfig.from_hf` runs where torch is not loaded.
Invariant: an architecture belongs to one family; what is not listed is refused, never guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gqa_serve.engine.models import (
    gemma2,
    gemma3,
    granite,
    llama,
    mistral,
    olmo2,
    phi3,
    qwen2,
    qwen3,
    smollm3,
)
from gqa_serve.engine.models.family import Family
from gqa_serve.errors import ModelError, UnsupportedModelError

FAMILIES: tuple[Family, ...] = (
    llama.FAMILY,
    mistral.FAMILY,
    mistral.MINISTRAL,
    qwen2.FAMILY,
    qwen3.FAMILY,
    gemma2.FAMILY,
    gemma3.FAMILY,
    gemma3.MULTIMODAL,
    phi3.FAMILY,
    smollm3.FAMILY,
    olmo2.FAMILY,
    granite.FAMILY,
)


def find_family(raw: Mapping[str, Any]) -> Family:
    """The family of a config: by `architectures[0]`, or by `model_type` where it names no architecture."""
    if not isinstance(raw, Mapping):
        raise ModelError(f"config.json must hold a JSON object, got {type(raw).__name__}.")
    architectures = raw.get("architectures")
    if architectures is not None and not (
        isinstance(architectures, list) and all(isinstance(name, str) for name in architectures)
    ):
        raise ModelError("config.json: architectures must be a list of names.")
    for family in FAMILIES:
        if architectures:
            if architectures[0] in family.architectures:
                return family
        elif raw.get("model_type") in family.model_types:
            return family
    return _refuse(architectures[0] if architectures else None, raw.get("model_type"))


def family_of(architecture: str) -> Family:
    """The family that a ModelConfig's `architecture` names."""
    for family in FAMILIES:
        if architecture in family.architectures or architecture in family.model_types:
            return family
    return _refuse(architecture, None)


def _refuse(architecture: str | None, model_type: object) -> Family:
    supported = ", ".join(name for family in FAMILIES for name in family.architectures)
    if architecture is None and model_type is None:
        raise ModelError(
            f"config.json names neither architectures nor model_type, so the model cannot be known; "
            f"add architectures, one of: {supported}."
        )
    given = f"architecture {architecture!r}" if architecture is not None else f"model_type {model_type!r}"
    raise UnsupportedModelError(f"config.json: {given} is not supported; supported: {supported}.")
