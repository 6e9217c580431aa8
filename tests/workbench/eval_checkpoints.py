"""Tiny random checkpoints with a tokenizer of single bytes, for evaluation: transformers is their oracle."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tiny
import tokenizers
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from gqa_serve.config import EngineConfig
from gqa_serve.workbench.evaluate.engines import LoadedModel

VOCAB = 260


def byte_tokenizer(*, bos: bool, merges: Sequence[tuple[str, str]] = ()) -> tokenizers.Tokenizer:
    """One token per byte and per pair of `merges`, and <s>, which begins every text if `bos`."""
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(first + second for first, second in merges)]
    vocab = {word: number for number, word in enumerate(words)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    return backend


def checkpoint(folder: Path, family: str = "llama", *, bos: bool = False, **overrides: Any) -> Path:
    """A directory with weights, config and tokenizer. `overrides` go to `tiny_checkpoint`."""
    folder.mkdir(exist_ok=True)
    options = {"vocab_size": VOCAB, "bos_token_id": 256, "eos_token_id": 257, "max_position_embeddings": 512}
    path = tiny.tiny_checkpoint(family, folder, **{**options, **overrides})
    byte_tokenizer(bos=bos).save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return path


def transformers_model(path: Path) -> Any:
    """The same weights, float64."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float64, attn_implementation="eager"
    )
    return model.eval()


def loaded(path: Path, **settings: Any) -> LoadedModel:
    """By the reference backend, in float32, unless `settings` say otherwise."""
    options = {"backend": "reference", "dtype": "float32", "kv_cache_memory": 2**24, "max_num_seqs": 8}
    return LoadedModel(path, EngineConfig(model=str(path), **{**options, **settings}))
