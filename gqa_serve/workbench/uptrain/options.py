"""What was asked for: every flag of `gqa-serve uptrain` after checking, and what of it makes a run the same.

Owns checks that need no file and no torch. Imports nothing heavy.
Invariant: an Options that exists makes sense by itself; what depends on the model or the text is checked
where that is read.
"""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gqa_serve.errors import ConfigError
from gqa_serve.settings import flag_of
from gqa_serve.workbench.uptrain.budget import parse_count

Trained = Literal["all", "attention", "kv", "none"]
"""Which parameters are trained: all, those of the attention blocks, the K and V projections, none."""

GIVEN = ("distill_weight", "temperature", "validation_share", "alpha")
"""Flags with defaults that mean something only beside others: `NAME_given` tells whether they were typed."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """See `gqa-serve uptrain --help` for each. None: not given, and decided later."""

    model: str | None
    revision: str | None
    offline: bool
    from_config: Path | None
    tokenizer: Path | None
    train_tokenizer: int | None
    output: Path | None
    text: list[Path]
    validation_text: list[Path]
    validation_share: float
    seq_len: int | None
    teacher: str | None
    distill_weight: float
    temperature: float
    tokens: int | None
    original_tokens: int | None
    alpha: float
    train: Trained
    learning_rate: float | None
    warmup_share: float
    final_share: float
    weight_decay: float
    clip: float
    batch_size: int
    micro_batch_size: int | None
    seed: int
    device: str
    dtype: str
    threads: int | None
    recompute: bool
    save_steps: int | None
    save_minutes: float
    keep: int
    validate_steps: int | None
    save_dtype: str
    restart: bool
    budget_only: bool
    dry_run: bool

    # What of these does not change the weights that come out, and may differ from start to resumption.
    FREE = frozenset(
        {
            "offline", "output", "threads", "recompute", "save_steps", "save_minutes", "keep",
            "validate_steps", "restart", "budget_only", "dry_run", "text", "validation_text", "device",
        }
    )  # fmt: skip

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> Options:
        """Raises ConfigError for what contradicts itself."""
        values = {field.name: getattr(args, field.name) for field in dataclasses.fields(cls)}
        for name in ("tokens", "original_tokens"):
            values[name] = None if values[name] is None else parse_count(values[name])
        options = cls(**values)
        _check_source(options)
        _check_teacher(options, args)
        _check_budget(options, args)
        _check_numbers(options)
        if options.validation_text and args.validation_share_given:
            raise ConfigError("--validation-text is what is measured on; leave out --validation-share.")
        if options.budget_only and options.dry_run:
            raise ConfigError("--dry-run measures what --budget-only leaves out; give one of them.")
        if not (options.budget_only or options.dry_run):
            if options.output is None:
                raise ConfigError("Where to? Give --output a new folder; it becomes an ordinary checkpoint.")
            if not options.text:
                raise ConfigError("Train on what? Give --text files or folders (.txt, .md, .jsonl).")
        return options

    def identity(self) -> dict[str, Any]:
        """The flags that a run and its resumption must share."""
        facts = {}
        for field in dataclasses.fields(self):
            if field.name not in self.FREE:
                value = getattr(self, field.name)
                facts[field.name] = str(value) if isinstance(value, Path) else value
        return facts


def _check_source(options: Options) -> None:
    if (options.model is None) == (options.from_config is None):
        raise ConfigError(
            "Which model? Give --model a checkpoint to go on from, or --from-config a config.json to begin "
            "from scratch (one of them)."
        )
    tokenizers = (options.tokenizer is not None) + (options.train_tokenizer is not None)
    if options.model is not None and tokenizers:
        raise ConfigError(
            "--model brings its tokenizer; --tokenizer and --train-tokenizer go with --from-config."
        )
    if options.model is None and options.revision is not None:
        raise ConfigError("--revision is of --model's repository on the hub; leave it out.")
    needed = not (options.budget_only or options.dry_run)
    if options.from_config is not None and tokenizers != 1 and (needed or tokenizers > 1):
        raise ConfigError(
            "--from-config needs --tokenizer FOLDER (one with tokenizer.json) or --train-tokenizer SIZE, one "
            "of them."
        )
    if options.from_config is not None and options.train != "all":
        raise ConfigError("From scratch all parameters are trained; leave out --train.")


def _check_teacher(options: Options, args: argparse.Namespace) -> None:
    if options.teacher is None:
        for name in ("distill_weight", "temperature"):
            if getattr(args, f"{name}_given"):
                raise ConfigError(f"{flag_of(name)} is for distillation; give --teacher MODEL too.")
    if not 0 < options.distill_weight <= 1:
        raise ConfigError("--distill-weight must be above 0 and at most 1.")
    if not options.temperature > 0:
        raise ConfigError("--temperature must be above 0.")


def _check_budget(options: Options, args: argparse.Namespace) -> None:
    given = ["alpha"] if args.alpha_given else []
    if options.original_tokens is not None:
        given.insert(0, "original_tokens")
    flags = " and ".join(flag_of(name) for name in given)
    if given and options.tokens is not None:
        raise ConfigError(f"--tokens is the budget itself; leave out {flags}.")
    if given and options.from_config is not None:
        raise ConfigError(f"From scratch there is no earlier pretraining; give --tokens instead of {flags}.")


def _check_numbers(options: Options) -> None:
    for name in (
        "seq_len", "batch_size", "micro_batch_size", "keep", "threads", "save_steps", "validate_steps",
        "train_tokenizer",
    ):  # fmt: skip
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"{flag_of(name)} must be at least 1, got {value}.")
    if options.seq_len == 1:
        raise ConfigError("--seq-len 1 leaves nothing to learn from; give at least 2.")
    for name in ("learning_rate", "alpha", "clip", "save_minutes"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise ConfigError(f"{flag_of(name)} must be above 0, got {value}.")
    for name in ("warmup_share", "final_share", "validation_share"):
        if not 0 <= getattr(options, name) < 1:
            raise ConfigError(f"{flag_of(name)} is a share: at least 0 and below 1.")
    if not options.weight_decay >= 0 or options.seed < 0:
        raise ConfigError("--weight-decay and --seed must not be negative.")
    if options.micro_batch_size is not None and options.batch_size % options.micro_batch_size:
        raise ConfigError(
            f"--micro-batch-size {options.micro_batch_size} must divide --batch-size {options.batch_size}."
        )
    if options.train_tokenizer is not None and options.train_tokenizer < 257:
        raise ConfigError("--train-tokenizer needs at least 257: 256 bytes and the end of a text.")
