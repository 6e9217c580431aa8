"""A trainer over random tokens, to measure what a step takes before there is a text.

Invariant: nothing is written, and what it trains is thrown away.
"""

from __future__ import annotations

import numpy as np

from gqa_serve.engine.model_config import ModelConfig
from gqa_serve.engine.models import family_of
from gqa_serve.engine.models.family import weight_slots
from gqa_serve.engine.models.loader import TensorSource
from gqa_serve.engine.weights.checkpoint import open_checkpoint
from gqa_serve.engine.weights.hub import resolve_model
from gqa_serve.errors import ModelError
from gqa_serve.workbench.uptrain.compute import Machine
from gqa_serve.workbench.uptrain.corpus import Order, PackedSequence
from gqa_serve.workbench.uptrain.model import FreshTensors, TrainableModel, first_names
from gqa_serve.workbench.uptrain.options import Options
from gqa_serve.workbench.uptrain.preparation import open_trainable, trainer_settings
from gqa_serve.workbench.uptrain.trainer import Trainer


class RandomTokens:
    """Stands for a corpus: sequences of one text each."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def sequence(self, index: int, seq_len: int) -> PackedSequence:
        tokens = np.random.default_rng(index).integers(0, self.vocab_size, seq_len + 1)
        return PackedSequence(tokens[:-1], tokens[1:], [seq_len])


def rehearse(
    options: Options, config: ModelConfig, seq_len: int, num_steps: int, machine: Machine
) -> Trainer:
    """The run's trainer but for its text."""
    source: TensorSource
    if options.model is not None:
        source = open_trainable(
            resolve_model(options.model, revision=options.revision, offline=options.offline)
        )
    else:
        family = family_of(config.architecture)
        source = FreshTensors(config, first_names(weight_slots(config, family, family.prefixes[0])), 0)
    model = TrainableModel(
        source, config, trained=options.train, device=machine.device, recompute=options.recompute
    )
    teacher = None
    if options.teacher is not None:
        checkpoint = open_checkpoint(resolve_model(options.teacher, offline=options.offline))
        taught = ModelConfig.from_hf(checkpoint.raw_config, checkpoint.generation_config)
        if taught.vocab_size != config.vocab_size:
            raise ModelError(f"The teacher {options.teacher} has another vocabulary than the model.")
        teacher = TrainableModel(
            checkpoint, taught, trained="none", device=machine.device, dtype=machine.compute_dtype
        )
    order = Order(max(2, 2 * options.batch_size), 0, 0)
    settings = trainer_settings(options, config, machine, num_steps)
    return Trainer(model, teacher, RandomTokens(config.vocab_size), order, settings)
