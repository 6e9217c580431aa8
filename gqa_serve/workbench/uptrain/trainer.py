"""One optimizer step, and the validation loss: the arithmetic of training.

Owns the optimizer and how a batch of sequences becomes an update: micro batches, losses, gradients, clipping.
Does not know files, progress or when to stop.
Invariant: the update of a step is a function of the parameters, the optimizer's state and the step's number;
an update that is not finite is never applied.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from gqa_serve.errors import ModelError
from gqa_serve.workbench.uptrain.corpus import IGNORED, Order, PackedSequence
from gqa_serve.workbench.uptrain.losses import Distillation, summed_losses
from gqa_serve.workbench.uptrain.model import TrainableModel
from gqa_serve.workbench.uptrain.schedule import Schedule

_BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class StepResult:
    """Of one step: `loss` is what was minimised, per token; `cross_entropy` and `divergence` its parts."""

    loss: float
    cross_entropy: float
    divergence: float | None
    learning_rate: float
    gradient_norm: float


class NonFiniteError(ModelError):
    """A loss or a gradient is infinite or not a number."""


@dataclass(frozen=True)
class TrainerSettings:
    """How a step is computed. Sizes in sequences; `compute_dtype` of matrix products."""

    seq_len: int
    batch_size: int
    micro_batch_size: int
    schedule: Schedule
    weight_decay: float
    max_gradient_norm: float
    compute_dtype: torch.dtype
    distillation: Distillation | None = None


class Sequences(Protocol):
    """What a trainer needs of a corpus."""

    def sequence(self, index: int, seq_len: int) -> PackedSequence: ...


class Trainer:
    """`data` and `order` say what step n trains on; `teacher` is there exactly if something is distilled."""

    def __init__(
        self,
        model: TrainableModel,
        teacher: TrainableModel | None,
        data: Sequences,
        order: Order,
        settings: TrainerSettings,
    ) -> None:
        self.model = model
        self.teacher = teacher
        self.data = data
        self.order = order
        self.settings = settings
        self.pieces = model.trained_pieces()
        self.parameters = [piece.parameter for piece in self.pieces]
        matrices = [p for p in self.parameters if p.dim() >= 2]
        vectors = [p for p in self.parameters if p.dim() < 2]
        groups = [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=settings.schedule.peak,
            betas=_BETAS,
            fused=True,
        )

    # --- a step ---

    def step(self, index: int) -> StepResult:
        """Train on batch `index`. Raises NonFiniteError, before any parameter has changed."""
        settings = self.settings
        chosen = self.order.take(index * settings.batch_size, settings.batch_size)
        sequences = [self.data.sequence(i, settings.seq_len) for i in chosen]
        num_targets = max(1, sum(int((sequence.targets != IGNORED).sum()) for sequence in sequences))
        totals = torch.zeros(3, dtype=torch.float64)
        for begin in range(0, len(sequences), settings.micro_batch_size):
            losses = self.losses(sequences[begin : begin + settings.micro_batch_size])
            (losses[0] / num_targets).backward()  # type: ignore[no-untyped-call]
            totals += torch.stack([loss.detach() for loss in losses]).double().cpu()
        loss, entropy, divergence = (totals / num_targets).tolist()
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, settings.max_gradient_norm))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NonFiniteError(f"step {index + 1}: loss {loss:g}, gradient norm {norm:g}")
        rate = settings.schedule.rate(index)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(loss, entropy, None if self.teacher is None else divergence, rate, norm)

    def losses(self, sequences: Sequence[PackedSequence]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(minimised, cross-entropy, divergence) summed over the tokens of one micro batch."""
        token_ids, targets, lens = self._flat(sequences)
        with self._autocast():
            teacher = None
            if self.teacher is not None and self.settings.distillation is not None:
                with torch.no_grad():
                    hidden = self.teacher.hidden(token_ids, lens)
                teacher = (hidden, self.teacher.logits, self.settings.distillation)
            hidden = self.model.hidden(token_ids, lens)
            return summed_losses(hidden, targets, self.model.logits, self.model.config.vocab_size, teacher)

    def _flat(self, sequences: Sequence[PackedSequence]) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """token_ids [T], targets [T], lens of all texts."""
        device = self.model.device
        token_ids = torch.from_numpy(np.concatenate([sequence.inputs for sequence in sequences])).to(device)
        targets = torch.from_numpy(np.concatenate([sequence.targets for sequence in sequences])).to(device)
        return token_ids, targets, [length for sequence in sequences for length in sequence.lens]

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        dtype = self.settings.compute_dtype
        if dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.model.device.type, dtype)

    @torch.no_grad()
    def validate(self, model: TrainableModel, sequences: Sequence[PackedSequence]) -> float:
        """Mean cross-entropy of `model` in nats per token over `sequences`."""
        total, count = 0.0, 0
        size = self.settings.micro_batch_size
        for begin in range(0, len(sequences), size):
            token_ids, targets, lens = self._flat(sequences[begin : begin + size])
            with self._autocast():
                hidden = model.hidden(token_ids, lens)
                entropy = summed_losses(hidden, targets, model.logits, model.config.vocab_size)[1]
            total += float(entropy)
            count += int((targets != IGNORED).sum())
        return total / max(1, count)

    # --- what a resumed run needs ---

    def optimizer_tensors(self) -> dict[str, torch.Tensor]:
        """AdamW's state by "key|name"."""
        return {
            f"{piece.key}|{name}": value.detach().contiguous()
            for piece in self.pieces
            for name, value in self.optimizer.state[piece.parameter].items()
        }

    def load_optimizer(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """The other way."""
        by_key = {piece.key: piece.parameter for piece in self.pieces}
        for name, value in tensors.items():
            key, _, field = name.rpartition("|")
            parameter = by_key[key]
            self.optimizer.state[parameter][field] = value.to(parameter.device)
