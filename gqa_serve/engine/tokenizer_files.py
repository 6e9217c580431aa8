"""The tokenizer of a checkpoint directory: tokenizer.json with the settings files beside it.

Reads `tokenizer.json`, or a SentencePiece `tokenizer.model` where there is no tokenizer.json, and applies
`tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json` the way transformers does:
missing added tokens are added and named special tokens are marked special. What surrounds a text (a
beginning-of-sequence token, usually) is what tokenizer.json says; `add_bos_token` and `add_eos_token` are
read only for a tokenizer.model. Knows no templates and no weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from gqa_serve.engine.sentencepiece_model import read_sentencepiece_model
from gqa_serve.engine.spm_tokenizer import add_sequence_tokens, build_spm_backend
from gqa_serve.engine.tokenizer import Tokenizer
from gqa_serve.errors import ModelError

SPECIAL_TOKEN_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)

_CURE = (
    "download tokenizer.json with the model, or write one with transformers: "
    "AutoTokenizer.from_pretrained(MODEL).save_pretrained(DIRECTORY)"
)


def load_directory_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in directory `path`. Raises ModelError for missing or damaged files."""
    settings = read_tokenizer_settings(path)
    backend, model_special = _load_backend(path)
    special_tokens = {**model_special, **named_special_tokens(settings)}
    _add_missing_tokens(backend, settings, special_tokens)
    if model_special:  # a bare vocabulary: the settings, else Llama's habit, say what surrounds the text
        add_sequence_tokens(
            backend,
            special_tokens,
            add_bos=bool(settings.get("add_bos_token", "bos_token" in special_tokens)),
            add_eos=bool(settings.get("add_eos_token", False)),
        )
    return Tokenizer(backend, special_tokens=special_tokens)


def read_tokenizer_settings(path: Path) -> dict[str, Any]:
    """tokenizer_config.json over special_tokens_map.json; {} if neither exists."""
    return {
        **read_json_object(path / "special_tokens_map.json"),
        **{
            name: value
            for name, value in read_json_object(path / "tokenizer_config.json").items()
            if value is not None or name not in SPECIAL_TOKEN_NAMES
        },
    }


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, {} if the file does not exist; ModelError if it is not a JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read as JSON ({error}); download it again.") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} must hold a JSON object; download it again.")
    return value


def named_special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """The texts of the named special tokens, each stored as a string or as {"content": ...}."""
    texts = {name: _token_text(settings.get(name)) for name in SPECIAL_TOKEN_NAMES}
    return {name: text for name, text in texts.items() if text is not None}


def _token_text(token: object) -> str | None:
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _load_backend(path: Path) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """The bare backend, and the named special tokens that a SentencePiece model itself defines."""
    file = path / "tokenizer.json"
    if file.exists():
        try:
            return tokenizers.Tokenizer.from_file(str(file)), {}
        except Exception as error:  # the library raises plain Exception for anything wrong with the file
            raise ModelError(f"{file} is not a tokenizer the tokenizers library can read: {error}") from error
    model_file = path / "tokenizer.model"
    if model_file.exists():
        vocabulary = read_sentencepiece_model(model_file)
        return build_spm_backend(vocabulary), dict(vocabulary.special_tokens)
    raise ModelError(f"{path} has neither tokenizer.json nor tokenizer.model; {_CURE}.")


def _add_missing_tokens(
    backend: tokenizers.Tokenizer, settings: Mapping[str, Any], special_tokens: Mapping[str, str]
) -> None:
    """Adds what the settings list and the tokenizer lacks, in id order, with their special flags."""
    listed = settings.get("added_tokens_decoder") or {}
    known = {str(token): token for token in backend.get_added_tokens_decoder().values()}
    wanted = [_added_token(listed[key]) for key in sorted(listed, key=int)]
    tokens = [token for token in wanted if repr(known.get(str(token))) != repr(token)]
    extra = settings.get("additional_special_tokens") or settings.get("extra_special_tokens") or []
    extra = list(extra.values()) if isinstance(extra, dict) else extra
    for text in [*special_tokens.values(), *filter(None, map(_token_text, extra))]:
        if not (text in known and known[text].special) and all(str(token) != text for token in tokens):
            tokens.append(AddedToken(text, special=True, normalized=False))
    backend.add_tokens(tokens)


def _added_token(entry: Mapping[str, Any]) -> AddedToken:
    flags = {
        name: bool(entry[name])
        for name in ("single_word", "lstrip", "rstrip", "normalized", "special")
        if name in entry
    }
    return AddedToken(entry["content"], **flags)
