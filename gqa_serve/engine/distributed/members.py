"""`Members`: what one rank's part of a model needs of the others: a `Shard` over a `RankGroup`."""

from __future__ import annotations

from functools import cached_property

import torch

from gqa_serve.engine.backends.base import Entries, HeadNorms, InPlace
from gqa_serve.engine.distributed.full_norms import FullNorms
from gqa_serve.engine.distributed.group import RankGroup
from gqa_serve.engine.distributed.shard import Shard


class Members:
    """`Ranks` (models/ranks.py) of the rank whose part is `shard`."""

    def __init__(self, group: RankGroup, shard: Shard) -> None:
        self.group = group
        self.shard = shard

    @property
    def entries(self) -> Entries:
        return Entries(*self.shard.vocabulary, self.shard.whole.vocab_size)

    @cached_property
    def _widths(self) -> list[int]:
        """Vocabulary entries of each rank."""
        parts = [
            Shard(self.shard.whole, rank, self.shard.ranks).vocabulary for rank in range(self.shard.ranks)
        ]
        return [end - first for first, end in parts]

    def add_up(self, x: torch.Tensor) -> None:
        self.group.add_up(x)

    def full_norms(self, norms: HeadNorms) -> InPlace:
        return FullNorms(self.group, self.shard, norms)

    def join(self, logits: torch.Tensor) -> torch.Tensor:
        return self.group.join_columns(logits, self._widths)
