"""The loaded parameters on their way into a model.

Owns nothing for long: the loader fills a dict, the layers take tensors out of it. Names are those of
`family.py`.
Invariant: a parameter is taken once, so that a backend which packs it can free the original, and memory never
holds the model twice.
"""

from __future__ import annotations

from collections.abc import MutableMapping

import torch

from gqa_serve.engine.backends.base import Backend, Linear


class Parameters:
    """The parameters under one prefix. Each is taken out once, so that packing it can free the original."""

    def __init__(self, tensors: MutableMapping[str, torch.Tensor], prefix: str = "") -> None:
        self.tensors = tensors
        self.prefix = prefix

    def under(self, prefix: str) -> Parameters:
        return Parameters(self.tensors, f"{self.prefix}{prefix}.")

    def take(self, name: str) -> torch.Tensor | None:
        return self.tensors.pop(self.prefix + name, None)

    def norm(self, name: str) -> torch.Tensor:
        """A norm's weight [D], float32."""
        return self.tensors.pop(f"{self.prefix}{name}.weight")

    def optional_norm(self, name: str) -> torch.Tensor | None:
        return self.take(f"{name}.weight")

    def linear(self, name: str, backend: Backend) -> Linear:
        weight = self.tensors.pop(f"{self.prefix}{name}.weight")
        return backend.pack_linear(weight, self.take(f"{name}.bias"))
