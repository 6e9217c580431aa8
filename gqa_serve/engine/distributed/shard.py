"""Which part of a model one tensor-parallel rank holds.

Attention is cut by KV heads with the query heads of their groups, the MLP by its inner width, embedding and
output head by vocabulary entries, as in Megatron-LM (Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053):
what a rank computes between two sums needs nothing of the others.

    num_kv_heads >= ranks    each rank has whole groups            8 KV heads, 3 ranks: 3, 3 and 2 of them
    num_kv_heads <  ranks    each rank has a copy of a KV head     2 KV heads, 4 ranks: 0, 0, 1 and 1
                             and some of its query heads

Owns this arithmetic, for the loader that cuts tensors and for the tools that plan. Knows no processes and no
torch. Invariant: the ranks together hold every query head, inner column and vocabulary entry exactly once,
and each rank's heads are whole groups of one size, so that a rank's part is a model like any other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from gqa_serve.engine.model_config import ModelConfig
from gqa_serve.errors import ConfigError

Range = tuple[int, int]
"""From the first up to, but without, the second."""

_UNITS = (128, 64, 32, 16, 8)  # of tiles in kernels and of groups in quantized formats


@dataclass(frozen=True)
class Shard:
    """Rank `rank` of `ranks` of the model `whole`. Raises ConfigError for more ranks than query heads."""

    whole: ModelConfig
    rank: int
    ranks: int

    def __post_init__(self) -> None:
        if not 1 <= self.ranks <= self.whole.num_heads:
            raise ConfigError(
                f"A model of {self.whole.num_heads} query heads can be divided over 1 to "
                f"{self.whole.num_heads} ranks, not {self.ranks}; lower --tensor-parallel-size."
            )

    @cached_property
    def _team(self) -> tuple[int, Range]:
        """With fewer KV heads than ranks: this rank's, and the ranks that share it."""
        heads = self.whole.num_kv_heads
        teams = [_part(self.ranks, heads, head) for head in range(heads)]
        return next((head, team) for head, team in enumerate(teams) if team[0] <= self.rank < team[1])

    @cached_property
    def kv_heads(self) -> Range:
        """KV heads in this rank's cache."""
        if self.whole.num_kv_heads >= self.ranks:
            return _part(self.whole.num_kv_heads, self.ranks, self.rank)
        head, _ = self._team
        return head, head + 1

    @cached_property
    def heads(self) -> Range:
        """Query heads that this rank computes."""
        size, (first, end) = self.whole.group_size, self.kv_heads
        if self.whole.num_kv_heads >= self.ranks:
            return first * size, end * size
        _, (begin, stop) = self._team
        start, past = _part(size, stop - begin, self.rank - begin)
        return first * size + start, first * size + past

    @property
    def is_first_copy(self) -> bool:
        """Whether no rank before this one holds its KV heads too."""
        return self.whole.num_kv_heads >= self.ranks or self.rank == self._team[1][0]

    @cached_property
    def inner(self) -> Range:
        """Columns of the MLP's inner width."""
        return self._cut(self.whole.intermediate_size)

    @cached_property
    def vocabulary(self) -> Range:
        """Entries of the embedding and of the output head."""
        return self._cut(self.whole.vocab_size)

    def _cut(self, size: int) -> Range:
        """This rank's part: as large as the others' where that is possible, and in whole units of kernels."""
        even = [unit for unit in _UNITS if size % (unit * self.ranks) == 0]
        whole = [unit for unit in _UNITS if size % unit == 0 and size // unit >= self.ranks]
        unit = (even or whole or [1])[0]
        return _times(_part(size // unit, self.ranks, self.rank), unit)

    @cached_property
    def local(self) -> ModelConfig:
        """What this rank holds, as a model of its own; hidden size, layers and windows are the whole's."""
        return replace(
            self.whole,
            num_heads=_size(self.heads),
            num_kv_heads=_size(self.kv_heads),
            intermediate_size=_size(self.inner),
            vocab_size=_size(self.vocabulary),
        )

    def rows(self, parameter: str) -> tuple[Range, ...] | None:
        """Rows of a parameter (see `family.parameter_shapes`) that are this rank's; None: all of them."""
        config, dim = self.whole, self.whole.head_dim
        name, kind = parameter.split(".")[-2:]
        queries, keys = (_times(heads, dim) for heads in (self.heads, self.kv_heads))
        if name == "qkv":
            first_k = config.num_heads * dim
            first_v = first_k + config.num_kv_heads * dim
            return queries, _shift(keys, first_k), _shift(keys, first_v)
        if name in ("q_norm", "k_norm") and config.qk_norm == "full":
            return (queries,) if name == "q_norm" else (keys,)
        if name == "gate_up":
            return self.inner, _shift(self.inner, config.intermediate_size)
        if name in ("embed", "lm_head") and kind == "weight":
            return (self.vocabulary,)
        return None

    def columns(self, parameter: str) -> Range | None:
        """Columns of a matrix that are this rank's; None: all of them."""
        name, kind = parameter.split(".")[-2:]
        if kind != "weight":
            return None
        if name == "o":
            return _times(self.heads, self.whole.head_dim)
        return self.inner if name == "down" else None

    def leaves_out(self, parameter: str) -> bool:
        """Whether it is zero here: a bias of what the ranks add up is the first rank's alone."""
        name, kind = parameter.split(".")[-2:]
        return self.rank > 0 and kind == "bias" and name in ("o", "down")


def _part(count: int, parts: int, index: int) -> Range:
    """Part `index` of `count` things in `parts` runs, the first of which are one longer where it must be."""
    size, over = divmod(count, parts)
    first = index * size + min(index, over)
    return first, first + size + (index < over)


def _size(part: Range) -> int:
    return part[1] - part[0]


def _times(part: Range, factor: int) -> Range:
    return part[0] * factor, part[1] * factor


def _shift(part: Range, by: int) -> Range:
    return part[0] + by, part[1] + by
