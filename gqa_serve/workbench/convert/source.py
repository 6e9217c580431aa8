"""The model to convert: an opened checkpoint, its config, and where each of its tensors belongs.

Owns opening, and the layer-by-layer view of a checkpoint. Names come from the model's family, never from the
spelling of a tensor. Invariant: only the tensors that are asked for are read.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gqa_serve.engine.model_config import ModelConfig
from gqa_serve.engine.models import family_of
from gqa_serve.engine.models.family import Family, WeightSlot
from gqa_serve.engine.weights.checkpoint import Checkpoint, open_checkpoint
from gqa_serve.engine.weights.quantized_matrix import QuantizedMatrix

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Source:
    """`slots`: every tensor of the checkpoint by name; None for those that the engine does not read."""

    name: str
    path: Path
    checkpoint: Checkpoint
    config: ModelConfig
    family: Family
    slots: dict[str, WeightSlot | None]

    @functools.cached_property
    def names_by_layer(self) -> dict[int | None, frozenset[str]]:
        """Tensor names of each layer; under None those of no layer (embedding, last norm, head)."""
        names: dict[int | None, set[str]] = defaultdict(set)
        for name, slot in self.slots.items():
            if slot is not None:
                names[layer_of(slot)].add(name)
        return {layer: frozenset(found) for layer, found in names.items()}

    def tensors(self, layer: int | None) -> Iterator[tuple[str, WeightSlot, torch.Tensor]]:
        """Names, slots and numbers of one layer; valid until the next one is asked for."""
        for name, tensor in self.checkpoint.tensors(self.names_by_layer[layer]):
            slot = self.slots[name]
            assert slot is not None
            yield name, slot, numbers(tensor)


def open_source(model: str, *, revision: str | None = None, offline: bool = False) -> Source:
    """Open a hub id, directory, GGUF file or "demo". Raises ModelError, HubError."""
    from gqa_serve.engine.models.loader import plan_tensors
    from gqa_serve.engine.weights.hub import resolve_model

    path = resolve_model(model, revision=revision, offline=offline)
    checkpoint = open_checkpoint(path)
    config = ModelConfig.from_hf(checkpoint.raw_config, checkpoint.generation_config)
    family = family_of(config.architecture)
    slots = plan_tensors(checkpoint.tensor_shapes(), config, family)
    return Source(model, path, checkpoint, config, family, dict(slots))


def layer_of(slot: WeightSlot) -> int | None:
    """The layer that a slot's parameter is in, None for one outside all."""
    parts = slot.parameter.split(".")
    return int(parts[1]) if parts[0] == "layers" else None


def numbers(tensor: torch.Tensor | QuantizedMatrix) -> torch.Tensor:
    """Plain numbers; a quantized matrix in float32."""
    return tensor.dequantize() if isinstance(tensor, QuantizedMatrix) else tensor
