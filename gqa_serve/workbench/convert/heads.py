"""How one layer's KV heads become fewer or more, and what that does to each tensor of the layer.

A `LayerMerge` says which old KV heads each new one stands for. Everything else follows from it:

    new k or v head g  = mean (or first, or sum of E_h x) of the old heads h of group g   k_proj, v_proj
    query heads        = those of the group's old heads, one after the other              q_proj
    o_proj             = its columns in the order of the query heads

With a fitted merge an old head is read back as D_h x' from the new head x' (D, E: matrices [head_dim,
head_dim] per old head); D_h is absorbed where the old head was read: W_q of its query heads becomes D_h' W_q
(because q . D k = D' q . k), and their columns of o_proj become W_o D_h. Owns this algebra. Does not know
which groups are good (`grouping.py`) nor how D and E are found (`methods.py`).
Invariant: where each group has one head, or equal heads and a mean, the layer computes what it did before.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from gqa_serve.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from gqa_serve.engine.model_config import ModelConfig
    from gqa_serve.engine.models.family import WeightSlot

Pooling = Literal["mean", "first", "random"]


@dataclass(frozen=True)
class HeadMap:
    """A fitted merge of K or of V, float64 [old KV heads, D, D]: new = sum of encode[h] @ old h over the
    group, and decode[h] @ new stands for old head h."""

    encode: torch.Tensor
    decode: torch.Tensor


@dataclass(frozen=True)
class LayerMerge:
    """`groups[g]`: the old KV heads that new head g stands for. All groups have the same size.

    With more heads than before, groups of one head repeat it as often as needed, neighbouring. `k` and `v`
    are fitted maps; where None, `pooling` says what becomes of a group.
    """

    groups: tuple[tuple[int, ...], ...]
    pooling: Pooling = "mean"
    k: HeadMap | None = None
    v: HeadMap | None = None
    seed: int = 0

    @property
    def expands(self) -> bool:
        return len(self.groups) > len({head for group in self.groups for head in group})

    def query_order(self, num_heads: int) -> list[int]:
        """Old query head at each new place, so that new query head h reads new KV head h // G."""
        if self.expands:
            return list(range(num_heads))
        old_kv = sum(len(group) for group in self.groups)
        size = num_heads // old_kv
        return [head * size + i for group in self.groups for head in group for i in range(size)]


def neighbours(old: int, new: int) -> tuple[tuple[int, ...], ...]:
    """The groups of Ainslie et al. 2023: neighbouring heads; or each head repeated, if there will be more."""
    if new <= old:
        size = old // new
        return tuple(tuple(range(start, start + size)) for start in range(0, old, size))
    return tuple((head // (new // old),) for head in range(new))


def check_counts(num_heads: int, old: int, new: int) -> None:
    """Raise ConfigError, naming what is possible, unless `old` KV heads can become `new`."""
    possible = [
        count
        for count in range(1, num_heads + 1)
        if count != old and num_heads % count == 0 and (old % count == 0 or count % old == 0)
    ]
    if new in possible:
        return
    names = ", ".join(map(str, possible))
    if new == old:
        raise ConfigError(f"The model has {old} KV heads already; --num-kv-heads can be: {names}.")
    raise ConfigError(
        f"--num-kv-heads {new} is not possible: groups of equal size must be made of the model's {old} KV "
        f"heads, and share {num_heads} query heads evenly; it can be: {names}."
    )


def convert_tensor(
    slot: WeightSlot, tensor: torch.Tensor, merge: LayerMerge, config: ModelConfig
) -> torch.Tensor:
    """A tensor of the layer, of the old `config`, as the new model has it; others come back as they are.

    `slot` is the tensor's place in the old model. The result is float64 where heads were pooled, so that it
    is rounded once, and of the tensor's dtype where they were only moved.
    """
    owner, kind = slot.parameter.split(".")[-2:]
    heads = config.num_heads
    if owner == "o" and kind == "weight":
        return _columns(tensor, merge, heads, config.head_dim)
    if owner == "q_norm" and config.qk_norm == "full":
        return _queries(tensor, merge, heads, config.head_dim, mapped=False)
    if owner == "k_norm" and config.qk_norm == "full":
        return _pooled(tensor, merge, None, config.head_dim, "")
    if owner != "qkv":
        return tensor
    return _projection(slot, tensor, merge, config)


def is_changed(slot: WeightSlot, config: ModelConfig) -> bool:
    """Whether `convert_tensor` does anything to the tensor."""
    parts = slot.parameter.split(".")
    norms = ("q_norm", "k_norm") if config.qk_norm == "full" else ()
    return parts[-2] in ("qkv", *norms) or parts[-2:] == ["o", "weight"]


def converted_shape(slot: WeightSlot, config: ModelConfig, num_kv_heads: int) -> tuple[int, ...]:
    """The shape that `convert_tensor` gives."""
    if not is_changed(slot, config) or slot.parameter.split(".")[-2] in ("o", "q_norm"):
        return slot.shape
    old, new = config.num_kv_heads * config.head_dim, num_kv_heads * config.head_dim
    q_rows = config.num_heads * config.head_dim
    if slot.parameter.split(".")[-2] == "k_norm":
        return (new,)
    rows = slot.shape[0]
    if rows == q_rows + 2 * old and slot.row == 0:
        return (q_rows + 2 * new, *slot.shape[1:])
    return slot.shape if slot.row == 0 else (new, *slot.shape[1:])


def _projection(
    slot: WeightSlot, tensor: torch.Tensor, merge: LayerMerge, config: ModelConfig
) -> torch.Tensor:
    """Weight or bias of q, k, v, or of all three fused; told apart by their first row in the fused one."""
    import torch

    dim = config.head_dim
    q_rows, kv_rows = config.num_heads * dim, config.num_kv_heads * dim

    def query(part: torch.Tensor) -> torch.Tensor:
        return _queries(part, merge, config.num_heads, dim, mapped=True)

    def key(part: torch.Tensor) -> torch.Tensor:
        return _pooled(part, merge, merge.k, dim, f"{slot.parameter} k")

    def value(part: torch.Tensor) -> torch.Tensor:
        return _pooled(part, merge, merge.v, dim, f"{slot.parameter} v")

    if slot.row == 0 and tensor.shape[0] == q_rows + 2 * kv_rows:
        q, k, v = tensor.split_with_sizes([q_rows, kv_rows, kv_rows])
        return torch.cat([query(q).double(), key(k), value(v)])
    if slot.row == 0:
        return query(tensor)
    return key(tensor) if slot.row == q_rows else value(tensor)


def _queries(
    tensor: torch.Tensor, merge: LayerMerge, num_heads: int, dim: int, *, mapped: bool
) -> torch.Tensor:
    """Rows [H * D, ...] of queries in the new order; `mapped`: and seen through the fitted map of K."""
    import torch

    order = merge.query_order(num_heads)
    heads = tensor.reshape(num_heads, dim, -1)
    if mapped and merge.k is not None:
        group_size = num_heads // merge.k.decode.shape[0]
        decode = merge.k.decode.repeat_interleave(group_size, 0)  # [H, D, D]
        heads = torch.stack([matrix.T @ head.double() for matrix, head in zip(decode, heads, strict=True)])
    return heads[order].reshape(tensor.shape)


def _columns(tensor: torch.Tensor, merge: LayerMerge, num_heads: int, dim: int) -> torch.Tensor:
    """o_proj [E, H * D]."""
    import torch

    heads = tensor.reshape(-1, num_heads, dim)
    if merge.v is not None:
        group_size = num_heads // merge.v.decode.shape[0]
        columns = [heads[:, h].double() @ merge.v.decode[h // group_size] for h in range(num_heads)]
        heads = torch.stack(columns, dim=1)
    return heads[:, merge.query_order(num_heads)].reshape(tensor.shape)


def _pooled(
    tensor: torch.Tensor, merge: LayerMerge, fitted: HeadMap | None, dim: int, name: str
) -> torch.Tensor:
    """Rows [KV * D, ...] of K or V to the new heads', float64."""
    import torch

    heads = tensor.reshape(tensor.shape[0] // dim, dim, -1)

    def new_head(group: tuple[int, ...]) -> torch.Tensor:
        if fitted is not None:
            parts = [fitted.encode[head] @ heads[head].double() for head in group]
            return torch.stack(parts).sum(0)
        if merge.pooling == "first" or len(group) == 1:
            return heads[group[0]].double()
        return heads[list(group)].double().mean(0)

    new = torch.stack([new_head(group) for group in merge.groups])
    if merge.pooling == "random" and name and fitted is None:
        generator = torch.Generator().manual_seed(merge.seed + zlib.crc32(name.encode()))
        spread = tensor.double().std(correction=0) if tensor.dim() > 1 else torch.zeros(())
        new = torch.randn(new.shape, generator=generator, dtype=torch.float64) * spread
    return new.reshape(-1, *tensor.shape[1:])
