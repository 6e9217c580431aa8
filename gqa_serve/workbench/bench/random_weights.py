"""A checkpoint of random weights in any model's shape, made as it is read: nothing to download, no file.

Owns the names and shapes (from the model's family) and the numbers. What a step costs depends on shapes, not
on what the weights say, so that models can be timed which nobody has trained: the same one with more or fewer
KV heads.
Invariant: activations stay finite, so that nothing is slow or fails because of its values.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from gqa_serve.engine.model_config import ModelConfig
from gqa_serve.engine.models import family_of
from gqa_serve.engine.models.family import weight_slots
from gqa_serve.engine.weights.checkpoint import Checkpoint

if TYPE_CHECKING:
    import torch

_POOL = 1 << 22  # random numbers that all matrices are cut from


class RandomCheckpoint(Checkpoint):
    """Weights of `config` in bfloat16: matrices with gain 1, norms of ones, biases of zeros."""

    def __init__(self, config: ModelConfig) -> None:
        self.path = Path("random")
        self.raw_config = {}
        self.generation_config = {}
        self.config = config
        family = family_of(config.architecture)
        slots = weight_slots(config, family, family.prefixes[0])
        self._shapes = {name: slot.shape for name, slot in slots.items() if name not in family.heads[1:]}
        self.num_tensors = len(self._shapes)
        self.weight_bytes = sum(2 * _count(shape) for shape in self._shapes.values())

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    def tensors(self, names: Collection[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        import torch

        pool = torch.randn(_POOL, generator=torch.Generator().manual_seed(0))
        for number, (name, shape) in enumerate(self._shapes.items()):
            if len(shape) == 1:
                zero = name.endswith(".bias") or self.config.norm_plus_one
                yield name, torch.full(shape, 0.0 if zero else 1.0, dtype=torch.bfloat16)
            else:
                yield name, _matrix(pool.roll(997 * number), shape)


def _matrix(pool: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    scaled = pool.mul(shape[1] ** -0.5).bfloat16()
    count = _count(shape)
    return scaled.repeat(-(-count // len(pool)))[:count].view(shape)


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
