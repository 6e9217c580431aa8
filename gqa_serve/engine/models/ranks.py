"""What a model needs of the ranks that hold its other parts (`gqa_serve/engine/distributed/`).

Owns the interface alone. A model that is whole has no `Ranks`.
"""

from __future__ import annotations

from typing import Protocol

import torch

from gqa_serve.engine.backends.base import Entries, HeadNorms, InPlace


class Ranks(Protocol):
    """All ranks call the same of these in the same order."""

    @property
    def entries(self) -> Entries:
        """Of the vocabulary, those whose embeddings and logits are here."""

    def add_up(self, x: torch.Tensor) -> None:
        """x [T, E] becomes the sum of all ranks' x, in place."""

    def full_norms(self, norms: HeadNorms) -> InPlace:
        """What norms queries and keys in [T, (H + 2 KV) * D] over all ranks' heads; `norms` are ours."""

    def join(self, logits: torch.Tensor) -> torch.Tensor:
        """This rank's columns [R, entries] -> those of the whole vocabulary [R, V]."""
