"""The tokenizer of a checkpoint directory: tokenizer.json with the settings files beside it.

Reads `tokenizer.json`, or a SentencePiece `tokenizer.model` where there is no tokenizer.json, and applies
`tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json` the way transformers does:
missing added tokens are added and named special tokens are marked special. What surrounds a text (a
beginning-of-sequence token, usually) is what tokenizer.json says; `add_bos_token` and `add_eos_token` are
read only for a tokenizer.model. Knows no templates and no weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from gqa_serve.engine.sentencepiece_model import read_sentencepiece_model
from gqa_serve.engine.spm_tokenizer import add_sequence_tokens, build_spm_backend
from gqa_serve.engine.tokenizer import Tokenizer
from gqa_serve.engine.weights.checkpoint import read_json_object
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

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_EXTRA_KEYS = ("additional_special_tokens", "extra_special_tokens")
_MOST_DIGITS = 10  # of a token id

_CURE = (
    "download tokenizer.json with the model, or write one with transformers: "
    "AutoTokenizer.from_pretrained(MODEL).save_pretrained(DIRECTORY)"
)


def load_directory_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in directory `path`. Raises ModelError for missing or damaged files."""
    settings = read_tokenizer_settings(path)
    backend, model_special = _load_backend(path)
    special_tokens = {**model_special, **named_special_tokens(settings)}
    listed, extra = _listed_tokens(path, settings), _extra_tokens(path, settings)
    _add_missing_tokens(backend, listed, [*special_tokens.values(), *extra])
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
        **read_optional_json(path / "special_tokens_map.json"),
        **{
            name: value
            for name, value in read_optional_json(path / "tokenizer_config.json").items()
            if value is not None or name not in SPECIAL_TOKEN_NAMES
        },
    }


def read_optional_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, {} if there is no such file; ModelError if it is damaged."""
    return read_json_object(path) if path.exists() else {}


def named_special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """The texts of the named special tokens, each stored as a string or as {"content": ...}.

    Raises ModelError, naming the key, for anything else but null.
    """
    texts: dict[str, str] = {}
    for name in SPECIAL_TOKEN_NAMES:
        if settings.get(name) is None:
            continue
        if (text := _token_text(settings[name])) is None:
            raise ModelError(
                f"{name} in tokenizer_config.json or special_tokens_map.json must be a text or an object "
                "with a text as its content; download the files again."
            )
        texts[name] = text
    return texts


def _token_text(token: object) -> str | None:
    """The text of a token, None if it is stored in no way we know or is not valid Unicode."""
    if isinstance(token, dict):
        token = token.get("content")
    if not isinstance(token, str) or any("\ud800" <= char <= "\udfff" for char in token):
        return None
    return token


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


def _listed_tokens(path: Path, settings: Mapping[str, Any]) -> list[AddedToken]:
    """The tokens of `added_tokens_decoder` in id order."""
    listed = settings.get("added_tokens_decoder") or {}
    wanted = "an object from token ids to objects with a content"
    if not isinstance(listed, dict) or any(not _is_token_id(key) for key in listed):
        raise _damaged(path, "added_tokens_decoder", wanted)
    tokens = []
    for key in sorted(listed, key=int):
        entry = listed[key]
        text = _token_text(entry)
        if text is None or not isinstance(entry, dict):
            raise _damaged(path, "added_tokens_decoder", wanted)
        tokens.append(AddedToken(text, **{name: bool(entry[name]) for name in _FLAGS if name in entry}))
    return tokens


def _is_token_id(key: str) -> bool:
    return len(key) <= _MOST_DIGITS and key.isascii() and key.isdigit()


def _extra_tokens(path: Path, settings: Mapping[str, Any]) -> list[str]:
    """The texts of the special tokens without a role, as a list or, in newer files, an object by name."""
    key = next((key for key in _EXTRA_KEYS if settings.get(key)), None)
    if key is None:
        return []
    extra = settings[key]
    items = list(extra.values()) if isinstance(extra, dict) else extra
    texts = [_token_text(item) for item in items] if isinstance(items, list) else [None]
    known = [text for text in texts if text is not None]
    if len(known) < len(texts):
        raise _damaged(path, key, "a list of texts or of objects with a content")
    return known


def _damaged(path: Path, key: str, wanted: str) -> ModelError:
    return ModelError(f"{path / 'tokenizer_config.json'}: {key} must be {wanted}; download the file again.")


def _add_missing_tokens(
    backend: tokenizers.Tokenizer, listed: Sequence[AddedToken], special_texts: Sequence[str]
) -> None:
    """Adds what the settings list and the tokenizer lacks, in id order, with their special flags."""
    known = {str(token): token for token in backend.get_added_tokens_decoder().values()}
    tokens = [token for token in listed if repr(known.get(str(token))) != repr(token)]
    for text in special_texts:
        if not (text in known and known[text].special) and all(str(token) != text for token in tokens):
            tokens.append(AddedToken(text, special=True, normalized=False))
    backend.add_tokens(tokens)
