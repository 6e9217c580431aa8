"""The loaded parameters on their way into a model.

Owns nothing for long: the loader fills it, the layers take parameters out. Names are those of `family.py`.
Invariant: a parameter is taken once, so that a backend which joins the parts of one can free them, and memory
never holds the model twice.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from gqa_serve.engine.backends.base import Backend, Linear, Packed


@dataclass
class Loaded:
    """What a checkpoint holds, by parameter.

    `matrices`: packed parts by the row of the parameter they begin at. `vectors`: norm weights and biases,
    float32.
    """

    matrices: dict[str, dict[int, Packed]] = field(default_factory=dict)
    vectors: dict[str, torch.Tensor] = field(default_factory=dict)

    def formats(self) -> dict[str, int]:
        """Bytes by the format they are held in, the largest first."""
        sizes = {"float32": sum(vector.nbytes for vector in self.vectors.values())}
        for parts in self.matrices.values():
            for part in parts.values():
                sizes[part.format] = sizes.get(part.format, 0) + part.nbytes
        return dict(sorted(sizes.items(), key=lambda item: -item[1]))


class Parameters:
    """The parameters under one prefix. Each is taken out once."""

    def __init__(self, loaded: Loaded, backend: Backend, prefix: str = "") -> None:
        self.loaded = loaded
        self.backend = backend
        self.prefix = prefix

    def under(self, prefix: str) -> Parameters:
        return Parameters(self.loaded, self.backend, f"{self.prefix}{prefix}.")

    def norm(self, name: str) -> torch.Tensor:
        """A norm's weight [D], float32."""
        return self.loaded.vectors.pop(f"{self.prefix}{name}.weight")

    def optional_norm(self, name: str) -> torch.Tensor | None:
        return self.loaded.vectors.pop(f"{self.prefix}{name}.weight", None)

    def matrix(self, name: str) -> Packed:
        """A matrix that is one tensor in every checkpoint."""
        (part,) = self.loaded.matrices.pop(f"{self.prefix}{name}.weight").values()
        return part

    def linear(self, name: str) -> Linear:
        parts = self.loaded.matrices.pop(f"{self.prefix}{name}.weight")
        bias = self.loaded.vectors.pop(f"{self.prefix}{name}.bias", None)
        return self.backend.linear([part for _, part in sorted(parts.items())], bias)
