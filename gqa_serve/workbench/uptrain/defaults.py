"""What is chosen where a flag is not given, as far as the model's config decides it.

Owns the defaults that `--help` states in words. Imports no torch, so that a budget can be had without it.
"""

from __future__ import annotations

import math

from gqa_serve.engine.model_config import ModelConfig
from gqa_serve.errors import ConfigError
from gqa_serve.workbench.uptrain.budget import Budget, Parameters
from gqa_serve.workbench.uptrain.options import Options

_MICRO_TOKENS = 4096
_DEFAULT_SEQ_LEN = 1024


def choose_learning_rate(options: Options) -> float:
    """The peak: as given, else 1e-4, and 1e-3 for a new model."""
    if options.learning_rate is not None:
        return options.learning_rate
    return 1e-3 if options.from_config is not None else 1e-4


def choose_num_steps(options: Options, budget: Budget, seq_len: int) -> int:
    """Whole steps that use at least the budget."""
    return max(1, math.ceil(budget.num_tokens / (options.batch_size * seq_len)))


def choose_seq_len(options: Options, config: ModelConfig) -> int:
    """As given, at most what the model is made for."""
    if options.seq_len is None:
        return min(_DEFAULT_SEQ_LEN, config.max_model_len)
    if options.seq_len > config.max_model_len:
        raise ConfigError(
            f"--seq-len {options.seq_len} is beyond the model's context, {config.max_model_len}."
        )
    return options.seq_len


def choose_budget(options: Options, parameters: Parameters) -> Budget:
    """The recipe's for a converted model, the whole of a pretraining for a new one."""
    return Budget.choose(
        parameters,
        tokens=options.tokens,
        original_tokens=options.original_tokens,
        alpha=options.alpha if options.from_config is None else 1.0,
    )


def choose_micro_batch(options: Options, seq_len: int) -> int:
    """As given, else the largest divisor of the batch of at most _MICRO_TOKENS tokens."""
    if options.micro_batch_size is not None:
        return options.micro_batch_size
    fits = [n for n in range(1, options.batch_size + 1) if options.batch_size % n == 0]
    return max((n for n in fits if n * seq_len <= _MICRO_TOKENS), default=1)
