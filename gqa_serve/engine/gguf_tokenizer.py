"""The tokenizer inside a GGUF file, rebuilt from its metadata.

Keys are those of the GGUF specification (`tokenizer.ggml.*`); defaults for absent keys are llama.cpp's.
Two kinds are supported: `gpt2` (byte-level BPE with stored merges and a named pre-tokenizer) and `llama`
(SentencePiece BPE with scores). Invariant: ids are those llama.cpp gives, except where it approximates the
model's original tokenizer (see docs and `pre_tokenizers.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import decoders, models

from gqa_serve.engine.pre_tokenizers import find_pre_tokenizer
from gqa_serve.engine.spm_tokenizer import (
    SpmVocabulary,
    TokenType,
    add_sequence_tokens,
    added_tokens,
    build_spm_backend,
)
from gqa_serve.engine.tokenizer import Tokenizer
from gqa_serve.errors import ModelError, UnsupportedModelError

logger = logging.getLogger(__name__)

_KEY = "tokenizer.ggml."

# Entries that end or structure a turn, which older conversions stored as normal text: llama.cpp treats these
# exact spellings as control tokens whatever the file says, and so do we.
_ALWAYS_CONTROL = frozenset(
    {"<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<EOT>"}
    | {"<|eom_id|>", "</s>", "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|fim_pad|>"}
    | {"<|fim_repo|>", "<|repo_name|>", "<|file_sep|>"}
)

_NAMES = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
    "sep_token": "seperator_token_id",  # spelled so in the format
    "mask_token": "mask_token_id",
}
_FIM_NAMES = {  # newer name, older name
    "fim_pre_token": ("fim_pre_token_id", "prefix_token_id"),
    "fim_suf_token": ("fim_suf_token_id", "suffix_token_id"),
    "fim_mid_token": ("fim_mid_token_id", "middle_token_id"),
}


def build_gguf_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that `metadata` (all GGUF keys, as plain values) describes.

    Raises ModelError for missing or contradictory keys, UnsupportedModelError for other kinds of tokenizer.
    """
    kind = metadata.get(_KEY + "model")
    if kind is None:
        raise ModelError(
            "The GGUF file has no tokenizer (tokenizer.ggml.model is missing); use a file converted with its "
            "vocabulary."
        )
    if kind == "gpt2":
        return _build_bpe(metadata)
    if kind == "llama":
        return _build_spm(metadata)
    raise UnsupportedModelError(
        f"The GGUF file's tokenizer kind {kind!r} (tokenizer.ggml.model) is not supported; "
        "gpt2 and llama are. Serve the original checkpoint with its tokenizer.json instead."
    )


def gguf_special_tokens(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The named special tokens ("bos_token", ...) of a GGUF file as text, for encoding and chat templates."""
    tokens = _tokens(metadata)
    is_spm = metadata.get(_KEY + "model") == "llama"
    defaults = {"bos_token": 1, "eos_token": 2, "unk_token": 0} if is_spm else {}
    found = {}
    for name, key in _NAMES.items():
        token_id = metadata.get(_KEY + key, defaults.get(name))
        if token_id is not None and 0 <= token_id < len(tokens):
            found[name] = tokens[token_id]
    for name, keys in _FIM_NAMES.items():
        token_id = next((metadata[_KEY + key] for key in keys if _KEY + key in metadata), None)
        if token_id is not None and 0 <= token_id < len(tokens):
            found[name] = tokens[token_id]
    return found


def _tokens(metadata: Mapping[str, Any]) -> list[str]:
    tokens = metadata.get(_KEY + "tokens")
    if not tokens:
        raise ModelError("The GGUF file has no vocabulary (tokenizer.ggml.tokens is missing or empty).")
    return [token or f"[EMPTY_{index}]" for index, token in enumerate(tokens)]


def _types(metadata: Mapping[str, Any], tokens: Sequence[str]) -> list[int]:
    types = metadata.get(_KEY + "token_type")
    if types is None:
        types = [TokenType.NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise ModelError(
            f"The GGUF file has {len(tokens)} tokens but {len(types)} token types; the file is damaged."
        )
    return [
        int(TokenType.CONTROL) if token in _ALWAYS_CONTROL else int(kind)
        for token, kind in zip(tokens, types, strict=True)
    ]


def _build_bpe(metadata: Mapping[str, Any]) -> Tokenizer:
    tokens = _tokens(metadata)
    types = _types(metadata, tokens)
    pre_name = metadata.get(_KEY + "pre")
    if pre_name is None:
        logger.warning(
            "The GGUF file does not name its pre-tokenizer (tokenizer.ggml.pre); using 'default'. "
            "Text may be tokenized slightly wrongly; a newer conversion of the model fixes that."
        )
        pre_name = "default"
    rule = find_pre_tokenizer(pre_name)
    if len(set(tokens)) != len(tokens):
        raise ModelError("The GGUF file's vocabulary holds the same token twice; the file is damaged.")
    model = models.BPE(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=_merges(metadata, set(tokens)),
        ignore_merges=rule.ignore_merges,
    )
    backend = tokenizers.Tokenizer(model)
    if (normalizer := rule.build_normalizer()) is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = rule.build()
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(added_tokens(tokens, types))
    return _finish(backend, metadata, len(tokens), add_bos=rule.add_bos)


def _merges(metadata: Mapping[str, Any], tokens: set[str]) -> list[tuple[str, str]]:
    stored = metadata.get(_KEY + "merges")
    if stored is None:
        raise ModelError("The GGUF file's BPE tokenizer has no merges (tokenizer.ggml.merges is missing).")
    merges = []
    for merge in stored:
        cut = merge.find(" ", 1)  # from 1: the left part is never empty
        left, right = merge[:cut], merge[cut + 1 :]
        if cut > 0 and left in tokens and right in tokens and left + right in tokens:
            merges.append((left, right))
    return merges


def _build_spm(metadata: Mapping[str, Any]) -> Tokenizer:
    tokens = _tokens(metadata)
    scores = metadata.get(_KEY + "scores")
    if scores is None or len(scores) != len(tokens):
        raise ModelError(
            "The GGUF file's SentencePiece tokenizer has no score for each token (tokenizer.ggml.scores)."
        )
    vocabulary = SpmVocabulary(
        pieces=tokens,
        scores=scores,
        types=_types(metadata, tokens),
        add_space_prefix=bool(metadata.get(_KEY + "add_space_prefix", True)),
    )
    return _finish(build_spm_backend(vocabulary), metadata, len(tokens), add_bos=True)


def _finish(
    backend: tokenizers.Tokenizer, metadata: Mapping[str, Any], num_tokens: int, *, add_bos: bool
) -> Tokenizer:
    special_tokens = gguf_special_tokens(metadata)
    add_sequence_tokens(
        backend,
        special_tokens,
        add_bos=bool(metadata.get(_KEY + "add_bos_token", add_bos)),
        add_eos=bool(metadata.get(_KEY + "add_eos_token", False)),
    )
    return Tokenizer(backend, special_tokens=special_tokens, vocab_size=num_tokens)
