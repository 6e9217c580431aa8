"""The parts of a run before it begins: the checkpoint, the teacher, the texts, and defaults filled in.

Owns what of the flags depends on the model and the text. Trains nothing.
Invariant: what does not fit together is refused here, before the first step.
"""

from __future__ import annotations

import math
from pathlib import Path

from gqa_serve.engine.model_config import ModelConfig
from gqa_serve.engine.tokenizer import Tokenizer, load_tokenizer
from gqa_serve.engine.weights.checkpoint import Checkpoint, open_checkpoint
from gqa_serve.engine.weights.hub import resolve_model
from gqa_serve.engine.weights.safetensors import DirectoryCheckpoint
from gqa_serve.errors import ConfigError, ModelError
from gqa_serve.progress import ProgressBar
from gqa_serve.workbench.uptrain.compute import Machine
from gqa_serve.workbench.uptrain.corpus import Corpus, Order, build_corpus, digest, find_texts, spread
from gqa_serve.workbench.uptrain.defaults import choose_learning_rate, choose_micro_batch, choose_seq_len
from gqa_serve.workbench.uptrain.losses import Distillation
from gqa_serve.workbench.uptrain.model import TrainableModel
from gqa_serve.workbench.uptrain.options import Options
from gqa_serve.workbench.uptrain.schedule import Schedule
from gqa_serve.workbench.uptrain.scratch import make_start
from gqa_serve.workbench.uptrain.trainer import TrainerSettings

MOST_HELD_OUT = 64
"""Sequences that are measured on."""


def open_trainable(path: Path) -> DirectoryCheckpoint:
    """A checkpoint whose weights are floating-point numbers in safetensors files, else ModelError."""
    checkpoint: Checkpoint = open_checkpoint(path)
    if not isinstance(checkpoint, DirectoryCheckpoint):
        raise ModelError(
            f"{path} is quantized; training needs the model in bf16, fp16 or float32 safetensors."
        )
    return checkpoint


def load_teacher(
    name: str,
    tokenizer: Tokenizer,
    config: ModelConfig,
    machine: Machine,
    sample: str,
    *,
    offline: bool = False,
) -> TrainableModel:
    """The model to learn from. Raises ModelError unless it has the student's tokens."""
    path = resolve_model(name, offline=offline)
    source = open_checkpoint(path)
    taught = ModelConfig.from_hf(source.raw_config, source.generation_config)
    if taught.vocab_size != config.vocab_size or not same_tokens(tokenizer, load_tokenizer(path), sample):
        raise ModelError(
            f"The teacher {name} has another tokenizer, so its predictions are of other tokens; give the "
            "model that was converted, or another with the same tokenizer."
        )
    return TrainableModel(source, taught, trained="none", device=machine.device, dtype=machine.compute_dtype)


def same_tokens(one: Tokenizer, other: Tokenizer, sample: str) -> bool:
    """Whether every id stands for the same entry and the sample is cut alike."""
    return digest(one) == digest(other) and one.encode(sample) == other.encode(sample)


def trainer_settings(
    options: Options, config: ModelConfig, machine: Machine, num_steps: int
) -> TrainerSettings:
    """Defaults filled in."""
    seq_len = choose_seq_len(options, config)
    warmup = math.ceil(num_steps * options.warmup_share)
    return TrainerSettings(
        seq_len=seq_len,
        batch_size=options.batch_size,
        micro_batch_size=choose_micro_batch(options, seq_len),
        schedule=Schedule(choose_learning_rate(options), num_steps, warmup, options.final_share),
        weight_decay=options.weight_decay,
        max_gradient_norm=options.clip,
        compute_dtype=machine.compute_dtype,
        distillation=None
        if options.teacher is None
        else Distillation(options.distill_weight, options.temperature),
    )


def start_of(options: Options, folder: Path, files: list[Path]) -> Path:
    """The folder of the checkpoint to begin from."""
    if options.model is not None:
        return resolve_model(options.model, revision=options.revision, offline=options.offline)
    start = folder / "start"
    make_start(start, options, files)
    return start


def read_texts(
    options: Options, folder: Path, files: list[Path], tokenizer: Tokenizer
) -> tuple[Corpus, Corpus | None]:
    """What is trained on, and what is measured on if that is text of its own."""
    held_files = find_texts(options.validation_text, outside=options.output)
    both = {file.resolve() for file in files} & {file.resolve() for file in held_files}
    if both:
        raise ConfigError(f"{min(both)} is in --text and in --validation-text; leave it out of one.")
    corpora = []
    for name, chosen in (("text", files), ("held_out", held_files)):
        if chosen:
            bar = ProgressBar("Tokenizing")
            try:
                corpora.append(build_corpus(folder / name, chosen, tokenizer, bar.update))
            finally:
                bar.close()
    return corpora[0], corpora[1] if held_files else None


def held_sequences(corpus: Corpus, seq_len: int) -> list[int]:
    """Those of a --validation-text that are measured: at most MOST_HELD_OUT, spread evenly over it."""
    total = corpus.num_sequences(seq_len)
    if total == 0:
        raise ConfigError(f"--validation-text has {len(corpus.tokens)} tokens, less than one of --seq-len.")
    return spread(total, min(MOST_HELD_OUT, total))


def order_of(options: Options, text: Corpus, held_text: Corpus | None, seq_len: int) -> Order:
    count = text.num_sequences(seq_len)
    if count < 2:
        raise ConfigError(
            f"The text has {len(text.tokens)} tokens, less than two sequences of {seq_len}; give more text, "
            "or a smaller --seq-len."
        )
    held_out = 0
    if held_text is None and options.validation_share > 0:
        held_out = min(MOST_HELD_OUT, count // 2, max(1, round(options.validation_share * count)))
    return Order(count, held_out, options.seed)


def check_vocabulary(tokenizer: Tokenizer, config: ModelConfig) -> None:
    if tokenizer.vocab_size > config.vocab_size:
        raise ModelError(
            f"The tokenizer has {tokenizer.vocab_size} tokens and the model's vocabulary "
            f"{config.vocab_size}; they do not belong together."
        )
