"""What is minimised: the cross-entropy of the text, and the distance to a teacher's predictions.

Owns the formulas, and computing them for a few tokens at a time, because logits of a large vocabulary are the
largest tensors of a training step. Knows no optimizer.
Invariant: sums over predicted tokens, never means, so that micro batches add up to exactly their batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from gqa_serve.workbench.uptrain.budget import MAX_LOGITS
from gqa_serve.workbench.uptrain.corpus import IGNORED

Logits = Callable[[torch.Tensor], torch.Tensor]
"""hidden [R, E] -> logits [R, V] float32."""


@dataclass(frozen=True)
class Distillation:
    """Minimise (1 - weight) * cross-entropy + weight * temperature^2 * KL(teacher || student), both softened
    by `temperature` (Hinton et al. 2015, arXiv 1503.02531, section 2)."""

    weight: float
    temperature: float


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum over the targets [R] that are not IGNORED, in nats. logits [R, V]."""
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")


def divergence(
    logits: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor, temperature: float
) -> torch.Tensor:
    """temperature^2 * KL(teacher || student), summed over the same tokens. logits, teacher [R, V]."""
    known = targets != IGNORED
    student_log = F.log_softmax(logits[known] / temperature, dim=-1)
    teacher_log = F.log_softmax(teacher[known] / temperature, dim=-1)
    return F.kl_div(student_log, teacher_log, reduction="sum", log_target=True) * temperature**2


def summed_losses(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    logits_of: Logits,
    vocab_size: int,
    teacher: tuple[torch.Tensor, Logits, Distillation] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(what is minimised, cross-entropy, divergence), each summed over tokens. hidden [T, E], targets [T].

    `teacher`: its hidden states [T, E'], its output layer, the mix. The second and third are detached.
    """

    def losses(
        hidden: torch.Tensor, targets: torch.Tensor, teacher_hidden: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = logits_of(hidden)
        entropy = cross_entropy(logits, targets)
        if teacher is None or teacher_hidden is None:
            return entropy, entropy.detach(), torch.zeros_like(entropy)
        _, teacher_logits_of, mix = teacher
        with torch.no_grad():
            teacher_logits = teacher_logits_of(teacher_hidden)
        distance = divergence(logits, teacher_logits, targets, mix.temperature)
        return (1 - mix.weight) * entropy + mix.weight * distance, entropy.detach(), distance.detach()

    rows = max(1, MAX_LOGITS // vocab_size)
    if hidden.shape[0] <= rows:
        return losses(hidden, targets, None if teacher is None else teacher[0])
    parts = []
    for begin in range(0, hidden.shape[0], rows):
        chosen = slice(begin, begin + rows)
        held = None if teacher is None else teacher[0][chosen]
        arguments = hidden[chosen], targets[chosen], held
        parts.append(checkpoint(losses, *arguments, use_reentrant=False, preserve_rng_state=False))
    total, entropy, distance = (torch.stack(column).sum() for column in zip(*parts, strict=True))
    return total, entropy, distance
