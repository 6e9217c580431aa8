"""What each token id adds to a text: `PieceTable`.

A `tokenizers` decoder is a short chain of steps (byte-level alphabet, "▁" to space, byte fallback, ...).
This module reads that chain once and then answers, per token id, "these bytes" or "this text", so that text
can be built incrementally. It knows no requests, no stop strings and no control tokens. Invariant: feeding
the pieces of any ids, in order, to `detokenizer.IncrementalDetokenizer` gives exactly
`Tokenizer.decode(ids)`; a chain for which that cannot be promised is refused when the model loads.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import tokenizers

from gqa_serve.errors import UnsupportedModelError

Piece = bytes | str


def byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in byte-level BPE vocabularies (the GPT-2 table).

    The 188 printable Latin-1 bytes stand for themselves; the other 68 are numbered from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_BYTE_OF = byte_alphabet()
_LEAD_BYTES = {2: range(0xC2, 0xE0), 3: range(0xE0, 0xF0), 4: range(0xF0, 0xF5)}


@dataclass(frozen=True)
class DecoderSteps:
    """A decoder chain, reduced to what matters.

    `replacements` are applied to a token's text in order. `strip_first` is how many leading spaces the whole
    text loses. `metaspace` is the character that a Metaspace decoder drops from the very first token.
    """

    byte_level: bool = False
    byte_fallback: bool = False
    replacements: tuple[tuple[str, str], ...] = ()
    strip_first: int = 0
    metaspace: str | None = None


def read_decoder(backend: tokenizers.Tokenizer) -> DecoderSteps:
    """The decoder chain of `backend`; UnsupportedModelError if this package cannot stream it exactly."""
    if backend.decoder is None:
        raise UnsupportedModelError(
            "The tokenizer has no decoder, so its tokens cannot be turned into text; use a tokenizer.json "
            "saved with its decoder (ByteLevel, or Replace/ByteFallback/Fuse/Strip)."
        )
    steps = list(_flatten(json.loads(backend.decoder.__getstate__())))
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return DecoderSteps(byte_level=True)
    return _read_piece_steps(steps)


def _flatten(decoder: dict[str, Any]) -> Iterable[dict[str, Any]]:
    if decoder["type"] == "Sequence":
        for step in decoder["decoders"]:
            yield from _flatten(step)
    else:
        yield decoder


def _read_piece_steps(steps: list[dict[str, Any]]) -> DecoderSteps:
    replacements: list[tuple[str, str]] = []
    byte_fallback = fused = False
    strip_first = 0
    metaspace = None
    for step in steps:
        match step:
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if (
                not byte_fallback and not fused and old
            ):
                replacements.append((old, new))
            case {"type": "ByteFallback"} if not fused:
                byte_fallback = True
            case {"type": "Fuse"}:
                fused = True
            case {"type": "Strip", "content": " ", "start": int(start), "stop": 0} if (
                fused and not strip_first
            ):
                strip_first = start
            case {"type": "Metaspace", "replacement": str(mark)} if len(steps) == 1:
                replacements.append((mark, " "))
                metaspace = mark if step.get("prepend_scheme", "always") != "never" else None
            case _:
                raise UnsupportedModelError(
                    f"The tokenizer's decoder step {step['type']!r} (in {[s['type'] for s in steps]}) is not "
                    "supported; ByteLevel, Metaspace and chains of Replace, ByteFallback, Fuse and Strip are."
                )
    return DecoderSteps(False, byte_fallback, tuple(replacements), strip_first, metaspace)


class PieceTable:
    """Token id -> piece. Entries are made on first use; safe to share between threads."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self.steps = read_decoder(backend)
        self._backend = backend
        self._cache: dict[int, Piece] = {}

    def get(self, token_id: int) -> Piece | None:
        """`bytes` (part of a byte run), `str` (whole characters), None for an id outside the vocabulary."""
        try:
            return self._cache[token_id]
        except KeyError:
            pass
        token = self._token(token_id)
        if token is None:
            return None
        piece = self._cache[token_id] = self._convert(token)
        return piece

    def get_first(self, token_id: int) -> Piece | None:
        """Like `get`, for the first token of a text."""
        mark = self.steps.metaspace
        token = self._token(token_id) if mark is not None else None
        if mark is None or token is None:
            return self.get(token_id)
        return token.replace(mark, "")

    def _token(self, token_id: int) -> str | None:
        token: str | None = self._backend.id_to_token(token_id) if 0 <= token_id < 2**32 else None
        return token

    def _convert(self, token: str) -> Piece:
        steps = self.steps
        if steps.byte_level:
            try:
                return bytes([_BYTE_OF[char] for char in token])
            except KeyError:  # an added token with characters outside the alphabet stands for its own text
                return token.encode()
        if steps.byte_fallback and (byte := fallback_byte(token)) is not None:
            return bytes([byte])
        for old, new in steps.replacements:
            token = token.replace(old, new)
        return token


def fallback_byte(token: str) -> int | None:
    """The byte that a SentencePiece byte token such as "<0x0A>" stands for, else None."""
    if len(token) != 6 or not (token.startswith("<0x") and token.endswith(">")):
        return None
    digits = token[3:5]
    if any(digit not in "0123456789abcdefABCDEF" for digit in digits):
        return None
    return int(digits, 16)


def incomplete_suffix(data: bytes) -> bytes:
    """The 0 to 3 trailing bytes of `data` that begin a UTF-8 character whose rest is still to come."""
    for length in range(1, min(3, len(data)) + 1):
        lead = data[-length]
        if lead & 0xC0 != 0x80:
            needed = next((size for size, leads in _LEAD_BYTES.items() if lead in leads), 1)
            return data[-length:] if needed > length else b""
    return b""
