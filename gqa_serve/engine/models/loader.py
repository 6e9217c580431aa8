"""From a checkpoint's tensors to a Decoder.

Owns the streaming: each matrix is packed by the backend as it comes by, each vector copied into its rows.
Does not know file formats (`weights/`) or what the parameters mean.
Invariant: when it returns, every row of every parameter came from exactly one tensor; else it raises, naming
the tensors. Peak memory is one copy of the model plus one tensor (reference backend: one fused parameter).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Protocol

import torch

from gqa_serve.engine.backends.base import Backend, Role
from gqa_serve.engine.model_config import ModelConfig
from gqa_serve.engine.models import family_of
from gqa_serve.engine.models.decoder import Decoder
from gqa_serve.engine.models.family import Family, WeightSlot, parameter_shapes, weight_slots
from gqa_serve.engine.models.parameters import Loaded
from gqa_serve.engine.weights.quantized_matrix import QuantizedMatrix
from gqa_serve.errors import ModelError

if TYPE_CHECKING:
    from gqa_serve.engine.distributed.members import Members
    from gqa_serve.engine.distributed.shard import Shard

_NAMED = 5
# Buffers that older releases saved with the weights; they follow from the config.
_DERIVED = re.compile(r"\.rotary_emb\.inv_freq$")


class TensorSource(Protocol):
    """The part of a checkpoint the loader needs. Names are Hugging Face's."""

    def tensor_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every tensor by name, without reading any."""

    def tensors(self) -> Iterator[tuple[str, torch.Tensor | QuantizedMatrix]]:
        """Names and tensors, one by one; a tensor may alias a memory mapping."""


def load_model(
    checkpoint: TensorSource,
    config: ModelConfig,
    *,
    device: torch.device,
    backend: Backend,
    on_tensor: Callable[[str], None] | None = None,
    members: Members | None = None,
) -> Decoder:
    """Load the weights of `config` from `checkpoint`; `on_tensor(name)` is called after each tensor.

    With `members` only this rank's part of each is read and kept, and the model is that part.

    Matrices are held as the backend packs them; norm weights (with Gemma's 1 added) and biases in float32.
    Raises ModelError if tensors are missing, unexpected, duplicated or wrongly shaped; names and shapes are
    compared before any memory is taken, so that a wrong config.json costs none.
    """
    family = family_of(config.architecture)
    plan = plan_tensors(checkpoint.tensor_shapes(), config, family)
    shard = None if members is None else members.shard
    local = config if shard is None else shard.local
    loaded = Loaded()
    for name, shape in parameter_shapes(local, family.names).items():
        if len(shape) == 1:
            loaded.vectors[name] = torch.empty(shape, dtype=torch.float32, device=device)
    _load_all(checkpoint.tensors(), plan, config, backend, loaded, on_tensor, shard)
    if config.norm_plus_one:
        for name, vector in loaded.vectors.items():
            if name.split(".")[-2].endswith("norm"):
                vector.add_(1.0)
    return Decoder(local, loaded, backend, device, members)


def plan_tensors(
    shapes: Mapping[str, tuple[int, ...]], config: ModelConfig, family: Family
) -> dict[str, WeightSlot | None]:
    """Each tensor's slot, None for one left out; the first name that fits a prefix says where the decoder is.

    Raises ModelError unless every slot is filled once, in its shape.
    """
    by_prefix = {prefix: weight_slots(config, family, prefix) for prefix in family.prefixes}
    slots = next(
        (
            candidate
            for name in shapes
            if name not in family.heads
            for candidate in by_prefix.values()
            if name in candidate
        ),
        by_prefix[family.prefixes[0]],
    )
    missing = {_key(slot): name for name, slot in slots.items()}
    plan: dict[str, WeightSlot | None] = {}
    unexpected = []
    for name, shape in shapes.items():
        slot = plan[name] = slots.get(name)
        if slot is None:
            if not _is_ignored(name, config, family):
                unexpected.append(name)
        elif missing.pop(_key(slot), None) is None:
            raise _twice(name)
        elif shape != slot.shape:
            raise ModelError(
                f"Tensor {name} has shape {list(shape)}, but config.json describes {list(slot.shape)}; "
                "check that config.json belongs to these weights."
            )
    if missing:
        raise ModelError(
            f"The checkpoint lacks {_some(missing.values())} that {config.architecture} needs; "
            "download it again, or check that config.json belongs to these weights."
        )
    if unexpected:
        raise ModelError(
            f"The checkpoint holds {_some(unexpected)} that {config.architecture} with this config.json does "
            "not have; check that config.json belongs to these weights."
        )
    return plan


def _load_all(
    tensors: Iterable[tuple[str, torch.Tensor | QuantizedMatrix]],
    plan: Mapping[str, WeightSlot | None],
    config: ModelConfig,
    backend: Backend,
    loaded: Loaded,
    on_tensor: Callable[[str], None] | None,
    shard: Shard | None,
) -> None:
    """Put each tensor into its slot. What comes must be what the headers named, each once."""
    left = dict(plan)
    for name, tensor in tensors:
        if name not in left:
            raise _twice(name)
        slot = left.pop(name)
        if slot is not None:
            parts = [(tensor, slot)] if shard is None else list(cut_tensor(tensor, slot, shard))
            for part, place in parts:
                load_tensor(name, part, place, config, backend, loaded)
        if on_tensor is not None:
            on_tensor(name)
    if left:
        raise ModelError(f"The checkpoint did not hand out {_some(left)}; download it again.")


def _twice(name: str) -> ModelError:
    return ModelError(f"The checkpoint holds tensor {name} twice, or under two names.")


def _key(slot: WeightSlot) -> tuple[str, int]:
    return slot.parameter, slot.row


def load_tensor(
    name: str,
    tensor: torch.Tensor | QuantizedMatrix,
    slot: WeightSlot,
    config: ModelConfig,
    backend: Backend,
    loaded: Loaded,
) -> None:
    """Pack one tensor into its slot; a vector's parameter must be there already. Raises ModelError."""
    if isinstance(tensor, torch.Tensor) and (not tensor.is_floating_point() or tensor.itemsize == 1):
        raise ModelError(
            f"Tensor {name} holds {str(tensor.dtype).removeprefix('torch.')} numbers, and config.json does "
            "not say how they were quantized; download the checkpoint again, or use a GGUF file."
        )
    if slot.parameter in loaded.vectors:
        vector = tensor if isinstance(tensor, torch.Tensor) else tensor.dequantize()
        loaded.vectors[slot.parameter][slot.row : slot.row + slot.shape[0]].copy_(vector)
        return
    try:
        packed = backend.pack(tensor, _role(slot.parameter, config))
    except ValueError as error:
        raise ModelError(f"Tensor {name} {error}.") from error
    loaded.matrices.setdefault(slot.parameter, {})[slot.row] = packed


def cut_tensor(
    tensor: torch.Tensor | QuantizedMatrix, slot: WeightSlot, shard: Shard
) -> Iterator[tuple[torch.Tensor | QuantizedMatrix, WeightSlot]]:
    """The parts of a tensor that are the shard's, each with its slot in the shard's own parameter.

    A fused projection has several: its queries, keys and values are cut each for themselves.
    """
    columns = shard.columns(slot.parameter)
    kept = shard.rows(slot.parameter)
    if kept is None:
        kept = ((slot.row, slot.row + slot.shape[0]),)
    row = 0
    for first, end in kept:
        begin, stop = max(first, slot.row), min(end, slot.row + slot.shape[0])
        if begin < stop:
            rows = slice(begin - slot.row, stop - slot.row)
            part = _cut(tensor, rows, columns)
            if shard.leaves_out(slot.parameter):
                assert isinstance(part, torch.Tensor)
                part = torch.zeros_like(part)
            yield part, WeightSlot(slot.parameter, row + begin - first, tuple(part.shape))
        row += end - first


def _cut(
    tensor: torch.Tensor | QuantizedMatrix, rows: slice, columns: tuple[int, int] | None
) -> torch.Tensor | QuantizedMatrix:
    if isinstance(tensor, QuantizedMatrix):
        return tensor.cut(rows, slice(*columns or (0, tensor.shape[1])))
    return tensor[rows] if columns is None else tensor[rows, slice(*columns)]


def _role(parameter: str, config: ModelConfig) -> Role:
    if parameter == "lm_head.weight" or (parameter == "embed.weight" and config.tie_embeddings):
        return "head"
    return "embedding" if parameter == "embed.weight" else "linear"


def _is_ignored(name: str, config: ModelConfig, family: Family) -> bool:
    """Tensors left out knowingly: a tied head's copy, rotary buffers, the parts that are not served."""
    tied_copy = config.tie_embeddings and name in family.heads
    return tied_copy or _DERIVED.search(name) is not None or name.startswith(family.ignored)


def _some(names: Iterable[str]) -> str:
    """ "tensor a", or "12 tensors (a, b, c, d, e, ...)"."""
    listed = sorted(names)
    if len(listed) == 1:
        return f"tensor {listed[0]}"
    more = ", ..." if len(listed) > _NAMED else ""
    return f"{len(listed)} tensors ({', '.join(listed[:_NAMED])}{more})"
