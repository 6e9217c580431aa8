"""Reads a SentencePiece `tokenizer.model` file without the sentencepiece library.

The file is one protocol-buffer message (`sentencepiece_model.proto`, ModelProto); the few fields that
matter are picked out by number. Only models of type BPE without text normalization are accepted, which is
what Llama 2, Mistral, TinyLlama, Yi, Phi-3 and Gemma ship; anything else is refused, not approximated.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

from gqa_serve.engine.spm_tokenizer import SpmVocabulary, TokenType
from gqa_serve.errors import ModelError, UnsupportedModelError

_BPE = 2
Field = tuple[int, int | bytes]


def read_sentencepiece_model(path: Path) -> SpmVocabulary:
    """The vocabulary in `path`. ModelError for a damaged file, UnsupportedModelError for other types."""
    try:
        return _parse_model(path.read_bytes())
    except (OSError, LookupError, ValueError, struct.error) as error:
        raise ModelError(
            f"{path} is not a SentencePiece model ({error}); download it again, or use a tokenizer.json."
        ) from error


def _parse_model(data: bytes) -> SpmVocabulary:
    pieces: list[str] = []
    scores: list[float] = []
    types: list[int] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for number, value in _fields(data):
        if number == 1:
            entry = dict(_fields(_as_bytes(value)))
            pieces.append(_as_bytes(entry[1]).decode())
            scores.append(struct.unpack("<f", _as_bytes(entry[2]))[0] if 2 in entry else 0.0)
            types.append(_as_int(entry.get(3, int(TokenType.NORMAL))))
        elif number == 2:
            trainer = dict(_fields(_as_bytes(value)))
        elif number == 3:
            normalizer = dict(_fields(_as_bytes(value)))
    if not pieces:
        raise ValueError("it holds no pieces")
    _check_supported(trainer, normalizer)
    return SpmVocabulary(
        pieces=pieces,
        scores=scores,
        types=types,
        add_space_prefix=bool(normalizer.get(3, 1)),
        special_tokens=_special_tokens(trainer, pieces),
    )


def _check_supported(trainer: dict[int, int | bytes], normalizer: dict[int, int | bytes]) -> None:
    """Field numbers: trainer 3 model_type; normalizer 2 precompiled_charsmap, 4 remove_extra_whitespaces."""
    problem = None
    if trainer.get(3, 1) != _BPE:
        problem = "is not a BPE model"
    elif normalizer.get(2):
        problem = "normalizes text before tokenizing"
    elif normalizer.get(4, 1):
        problem = "removes extra whitespace"
    if problem is not None:
        raise UnsupportedModelError(
            f"The SentencePiece tokenizer.model {problem}, which is not supported; convert it with "
            "transformers: AutoTokenizer.from_pretrained(MODEL).save_pretrained(DIRECTORY)."
        )


def _special_tokens(trainer: dict[int, int | bytes], pieces: list[str]) -> dict[str, str]:
    """Field numbers: trainer 40 unk_id, 41 bos_id, 42 eos_id, 43 pad_id; their defaults are 0, 1, 2, -1."""
    numbers = {"unk_token": (40, 0), "bos_token": (41, 1), "eos_token": (42, 2), "pad_token": (43, -1)}
    found = {}
    for name, (number, default) in numbers.items():
        index = _as_int(trainer.get(number, default))
        index = index - 2**64 if index >= 2**63 else index  # int32 fields store -1 as a 64-bit varint
        if 0 <= index < len(pieces):
            found[name] = pieces[index]
    return found


def _fields(data: bytes) -> Iterator[Field]:
    """(field number, value) of one message; varints as int, all else as bytes (protobuf wire format)."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        wire_type = key & 7
        if wire_type == 0:
            number, position = _varint(data, position)
            yield key >> 3, number
            continue
        if wire_type == 2:
            length, position = _varint(data, position)
        elif wire_type in (1, 5):
            length = 8 if wire_type == 1 else 4
        else:
            raise ValueError(f"unknown wire type {wire_type}")
        if position + length > len(data):
            raise ValueError("it is truncated")
        yield key >> 3, data[position : position + length]
        position += length


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position
        if shift > 63:
            raise ValueError("a number is too long")


def _as_bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a field has the wrong type")
    return value


def _as_int(value: int | bytes) -> int:
    if not isinstance(value, int):
        raise ValueError("a field has the wrong type")
    return value
