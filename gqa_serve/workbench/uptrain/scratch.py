"""A new model to train from scratch: a starting checkpoint of random weights, and if asked a tokenizer.

Owns the files of that checkpoint; from then on it is trained like any other. Knows no training.
Invariant: a function of the config, the tokenizer or the text it is made of, and the seed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gqa_serve.engine.model_config import ModelConfig
from gqa_serve.engine.models import find_family
from gqa_serve.engine.models.family import weight_slots
from gqa_serve.engine.weights.checkpoint import read_json_object
from gqa_serve.errors import ConfigError, ModelError
from gqa_serve.workbench.checkpoint_files import CONFIG, GENERATION, copy_small_files
from gqa_serve.workbench.uptrain.corpus import documents
from gqa_serve.workbench.uptrain.options import Options

END_OF_TEXT = "<|endoftext|>"


def make_start(folder: Path, options: Options, files: Sequence[Path]) -> None:
    """Write config.json, a tokenizer and random weights into `folder`, unless they are there."""
    from safetensors.torch import save_file

    from gqa_serve.workbench.uptrain.model import FreshTensors, first_names

    if folder.exists():
        return
    if options.from_config is None:
        raise ValueError("from scratch needs a config")
    raw = read_json_object(options.from_config)
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if options.train_tokenizer is not None:
        raw = {**raw, **_train_tokenizer(partial, options.train_tokenizer, files)}
    elif options.tokenizer is not None:
        if not (options.tokenizer / "tokenizer.json").is_file():
            raise ConfigError(f"{options.tokenizer} has no tokenizer.json; give a folder that has one.")
        copy_small_files(options.tokenizer, partial, but=(CONFIG, GENERATION))
    raw.setdefault("torch_dtype", "float32")
    config = ModelConfig.from_hf(raw)
    (partial / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    family = find_family(raw)
    slots = first_names(weight_slots(config, family, family.prefixes[0]))
    tensors = dict(FreshTensors(config, slots, options.seed).tensors())
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    os.replace(partial, folder)


def _train_tokenizer(folder: Path, size: int, files: Sequence[Path]) -> dict[str, Any]:
    """Write a byte-level BPE tokenizer of `size` tokens made of `files`; what config.json must say of it.

    Sennrich et al. 2016 (arXiv 1508.07909) over bytes: every text can be encoded, none is unknown.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def texts() -> Iterator[str]:
        for file in files:
            yield from (text for text, _ in documents(file))

    tokenizer.train_from_iterator(texts(), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    end = tokenizer.token_to_id(END_OF_TEXT)
    if end is None:
        raise ModelError(
            "The tokenizer made of the text lacks its end of a text; give a --tokenizer instead."
        )
    return {"vocab_size": tokenizer.get_vocab_size(), "bos_token_id": end, "eos_token_id": end}
