"""A checkpoint as a model that trains: its tensors as parameters, the engine's `Decoder` over them.

    checkpoint tensor            parameters (masters, float32)
    ...self_attn.q_proj.weight   one, of the whole tensor
    ...self_attn.qkv_proj.weight three, of its rows: queries, keys, values (checkpoints that fuse them)

Owns the map between the two and which parameters are trained. Does not know how they are trained. Invariant:
written back untrained, every tensor is bit for bit what was read, in the dtype it was stored in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from gqa_serve.engine.model_config import ModelConfig
from gqa_serve.engine.models import family_of
from gqa_serve.engine.models.decoder import Decoder
from gqa_serve.engine.models.family import WeightSlot
from gqa_serve.engine.models.loader import TensorSource, plan_tensors
from gqa_serve.engine.models.parameters import Loaded
from gqa_serve.errors import ModelError
from gqa_serve.workbench.uptrain.backend import (
    NoCache,
    RecomputedLayer,
    TrainablePart,
    TrainingBackend,
    packed_batch,
)
from gqa_serve.workbench.uptrain.options import Trained

if TYPE_CHECKING:
    from collections.abc import Sequence

_FINGERPRINT_NUMBERS = 256


@dataclass(frozen=True, eq=False)
class Piece:
    """Rows `row` .. of the checkpoint tensor `name`, as one parameter. `projection`: "q", "k" or "v" if the
    rows belong to one of these."""

    name: str
    row: int
    slot: WeightSlot
    projection: str
    parameter: torch.nn.Parameter

    @property
    def key(self) -> str:
        """Names the piece in files of its own."""
        return f"{self.name}:{self.row}" if self.row else self.name


class TrainableModel:
    """Parameters and forward pass. `dtype`: of the parameters; what is trained should be float32."""

    def __init__(
        self,
        source: TensorSource,
        config: ModelConfig,
        *,
        trained: Trained,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        recompute: bool = False,
    ) -> None:
        """Read all tensors of `source`. Raises ModelError where they are not those of `config`."""
        self.config = config
        self.device = device
        self.stored_dtypes: dict[str, torch.dtype] = {}
        self.pieces = _read(source, config, trained, device, dtype, self.stored_dtypes)
        embedding_dtype = getattr(torch, config.dtype or "float32")
        backend = TrainingBackend(norm_plus_one=config.norm_plus_one, embedding_dtype=embedding_dtype)
        self.decoder = Decoder(config, _loaded(self.pieces), backend, device)
        if recompute:
            self.decoder.layers = [RecomputedLayer(layer, backend) for layer in self.decoder.layers]  # type: ignore[misc]

    @property
    def num_parameters(self) -> int:
        return sum(piece.parameter.numel() for piece in self.pieces)

    def trained_pieces(self) -> list[Piece]:
        return [piece for piece in self.pieces if piece.parameter.requires_grad]

    def fingerprint(self) -> str:
        """Of the weights: the first numbers of each tensor, whatever dtype they are held in."""
        total = hashlib.sha256()
        for piece in self.pieces:
            numbers = piece.parameter.detach().flatten()[:_FINGERPRINT_NUMBERS].bfloat16().float().cpu()
            total.update(piece.key.encode() + numbers.numpy().tobytes())
        return total.hexdigest()

    def hidden(self, token_ids: torch.Tensor, lens: Sequence[int]) -> torch.Tensor:
        """The normed last hidden states [T, E] of texts of `lens` tokens, flat in token_ids [T]."""
        return self.decoder.forward(packed_batch(token_ids, lens), NoCache())

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [R, E] -> logits [R, V], float32."""
        return self.decoder.logits(hidden)

    def layout(self) -> Iterator[tuple[str, tuple[int, ...], str]]:
        """(name, shape, dtype as stored) of the checkpoint's tensors, in its order."""
        for name, pieces in self._by_name().items():
            shapes = [piece.parameter.shape for piece in pieces]
            stored = str(self.stored_dtypes[name]).removeprefix("torch.")
            yield name, (sum(shape[0] for shape in shapes), *shapes[0][1:]), stored

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The checkpoint's tensors by name, in its order, in the dtype that is trained in."""
        for name, pieces in self._by_name().items():
            parts = [piece.parameter.detach() for piece in pieces]
            yield name, parts[0] if len(parts) == 1 else torch.cat(parts)

    def _by_name(self) -> dict[str, list[Piece]]:
        by_name: dict[str, list[Piece]] = {}
        for piece in self.pieces:
            by_name.setdefault(piece.name, []).append(piece)
        return by_name

    def masters(self) -> dict[str, torch.Tensor]:
        """The trained parameters by key, as they are."""
        return {piece.key: piece.parameter.detach() for piece in self.trained_pieces()}

    def load_masters(self, masters: Mapping[str, torch.Tensor]) -> None:
        """The other way. Raises ModelError where they are not those of this model."""
        pieces = {piece.key: piece for piece in self.trained_pieces()}
        if pieces.keys() != masters.keys():
            raise ModelError("The training state holds other parameters than this run trains; use --restart.")
        with torch.no_grad():
            for key, piece in pieces.items():
                piece.parameter.copy_(masters[key])


def _read(
    source: TensorSource,
    config: ModelConfig,
    trained: Trained,
    device: torch.device,
    dtype: torch.dtype,
    stored_dtypes: dict[str, torch.dtype],
) -> list[Piece]:
    plan = plan_tensors(source.tensor_shapes(), config, family_of(config.architecture))
    pieces = []
    for name, tensor in source.tensors():
        slot = plan.get(name)
        if slot is None:
            continue
        whole = tensor if isinstance(tensor, torch.Tensor) else tensor.dequantize()
        stored_dtypes[name] = whole.dtype
        for row, end, projection in _cuts(slot, config):
            values = whole[row:end].to(device=device, dtype=dtype, copy=True).contiguous()
            needs_grad = _is_trained(slot.parameter, projection, trained)
            parameter = torch.nn.Parameter(values, requires_grad=needs_grad)
            pieces.append(Piece(name, row, slot, projection, parameter))
    return pieces


def _cuts(slot: WeightSlot, config: ModelConfig) -> Iterator[tuple[int, int, str]]:
    """(first row, end, projection) of the parts of a tensor; `slot.row` is where it begins in its layer."""
    rows = slot.shape[0]
    if _layer_part(slot.parameter) != "qkv":
        yield 0, rows, ""
        return
    q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    bounds = {
        "q": (0, q_rows),
        "k": (q_rows, q_rows + kv_rows),
        "v": (q_rows + kv_rows, q_rows + 2 * kv_rows),
    }
    for projection, (begin, end) in bounds.items():
        first, last = max(begin - slot.row, 0), min(end - slot.row, rows)
        if first < last:
            yield first, last, projection


def _layer_part(parameter: str) -> str:
    """ "qkv" of "layers.3.qkv.bias"."""
    return parameter.split(".")[-2]


def _is_trained(parameter: str, projection: str, trained: Trained) -> bool:
    if trained in ("all", "none"):
        return trained == "all"
    if trained == "kv":
        return projection in ("k", "v")
    return _layer_part(parameter) in ("qkv", "o", "q_norm", "k_norm")


def _loaded(pieces: Sequence[Piece]) -> Loaded:
    """The pieces under the engine's names. A layer's bias goes with its matrix, see `TrainablePart`."""
    biases = {(_stem(piece), _row(piece)): piece.parameter for piece in pieces if _is_bias(piece)}
    loaded = Loaded()
    for piece in pieces:
        if _is_bias(piece):
            continue
        if piece.parameter.dim() == 1:
            loaded.vectors[piece.slot.parameter] = piece.parameter
        else:
            part = TrainablePart(piece.parameter, biases.pop((_stem(piece), _row(piece)), None))
            loaded.matrices.setdefault(piece.slot.parameter, {})[_row(piece)] = part
    if biases:
        raise ModelError("The checkpoint splits a bias differently from its matrix; it can't be trained.")
    return loaded


def _is_bias(piece: Piece) -> bool:
    return piece.slot.parameter.endswith(".bias")


def _stem(piece: Piece) -> str:
    return piece.slot.parameter.rpartition(".")[0]


def _row(piece: Piece) -> int:
    """Where the piece begins in the engine's parameter."""
    return piece.slot.row + piece.row


def first_names(slots: Mapping[str, WeightSlot]) -> dict[str, WeightSlot]:
    """One name for each place: a family may know its output head under several."""
    by_place: dict[tuple[str, int], tuple[str, WeightSlot]] = {}
    for name, slot in slots.items():
        by_place.setdefault((slot.parameter, slot.row), (name, slot))
    return dict(by_place.values())


class FreshTensors:
    """The tensors of a new model, as a source to load: drawn from `seed`.

    Matrices from a normal distribution of standard deviation 0.02, those that write into the residual stream
    divided by sqrt(2 L) as in GPT-2 (Radford et al. 2019, section 2.3); norms at 1, biases at 0.
    """

    def __init__(self, config: ModelConfig, slots: Mapping[str, WeightSlot], seed: int) -> None:
        self.config = config
        self.slots = slots
        self.seed = seed

    def tensor_shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: slot.shape for name, slot in self.slots.items()}

    def tensors(self) -> Iterator[tuple[str, Any]]:
        generator = torch.Generator().manual_seed(self.seed)
        for name, slot in self.slots.items():
            part = _layer_part(slot.parameter)
            if part.endswith("norm"):
                yield name, torch.full(slot.shape, 0.0 if self.config.norm_plus_one else 1.0)
            elif slot.parameter.endswith(".bias"):
                yield name, torch.zeros(slot.shape)
            else:
                deviation = 0.02 / (2 * self.config.num_layers) ** 0.5 if part in ("o", "down") else 0.02
                yield name, torch.randn(slot.shape, generator=generator) * deviation
