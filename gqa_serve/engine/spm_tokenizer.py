"""SentencePiece BPE vocabularies (pieces with scores) as a `tokenizers` backend.

SentencePiece merges, of all neighbours whose concatenation is a piece, the pair with the best score, the
leftmost among equals; llama.cpp does the same. `tokenizers` merges by a ranked list of pairs, so the list
is derived: every way to cut a piece into two pieces, ranked by the piece's score. This module owns that
derivation, byte fallback and the "▁" convention. It reads no files. Invariant: no merge ever produces or
consumes a control token, so ordinary text cannot become one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, processors

from gqa_serve.errors import ModelError

SPACE = "▁"


class TokenType(IntEnum):
    """Kinds of vocabulary entry; the numbers of both SentencePiece models and GGUF files."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class SpmVocabulary:
    """Pieces by id, with score and type; `add_space_prefix` puts a space before each stretch of text."""

    pieces: Sequence[str]
    scores: Sequence[float]
    types: Sequence[int]
    add_space_prefix: bool = True
    special_tokens: Mapping[str, str] = field(default_factory=dict)


def spm_merges(vocabulary: SpmVocabulary) -> list[tuple[str, str]]:
    """Pairs to merge, best first: by score, then by id of the result, then the shorter left part first."""
    mergeable = {
        piece: score
        for piece, score, kind in zip(vocabulary.pieces, vocabulary.scores, vocabulary.types, strict=True)
        if kind in (TokenType.NORMAL, TokenType.USER_DEFINED, TokenType.UNUSED)
    }
    ranked = sorted(mergeable, key=lambda piece: -mergeable[piece])  # stable: equal scores stay in id order
    return [
        (piece[:cut], piece[cut:])
        for piece in ranked
        for cut in range(1, len(piece))
        if piece[:cut] in mergeable and piece[cut:] in mergeable
    ]


def build_spm_backend(vocabulary: SpmVocabulary) -> tokenizers.Tokenizer:
    """A backend that encodes as SentencePiece and llama.cpp do. ModelError for a damaged vocabulary."""
    unknown = next(
        (p for p, t in zip(vocabulary.pieces, vocabulary.types, strict=True) if t == TokenType.UNKNOWN), None
    )
    vocab = {piece: id_ for id_, piece in enumerate(vocabulary.pieces)}
    if len(vocab) != len(vocabulary.pieces):
        raise ModelError("The SentencePiece vocabulary holds the same piece twice; the file is damaged.")
    has_bytes = TokenType.BYTE in vocabulary.types
    if unknown is None and not has_bytes:
        raise ModelError(
            "The SentencePiece vocabulary has neither byte tokens nor an unknown token; the file is damaged."
        )
    model = models.BPE(
        vocab=vocab,
        merges=spm_merges(vocabulary),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=has_bytes,
    )
    backend = tokenizers.Tokenizer(model)
    replace = normalizers.Replace(" ", SPACE)
    prefix = vocabulary.add_space_prefix
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace]) if prefix else replace
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    backend.add_tokens(added_tokens(vocabulary.pieces, vocabulary.types))
    return backend


def added_tokens(pieces: Sequence[str], types: Sequence[int]) -> list[AddedToken]:
    """The entries recognised in raw text first: control and unknown (special), user-defined."""
    special = (TokenType.CONTROL, TokenType.UNKNOWN)
    return [
        AddedToken(piece, special=kind in special, normalized=False)
        for piece, kind in zip(pieces, types, strict=True)
        if kind in special or kind == TokenType.USER_DEFINED
    ]


def add_sequence_tokens(
    backend: tokenizers.Tokenizer, special_tokens: Mapping[str, str], *, add_bos: bool, add_eos: bool
) -> None:
    """Makes encoding with special tokens put the beginning / end token around the text.

    Raises ModelError where a token to add is not in the vocabulary.
    """
    used: list[tuple[str, int]] = []
    for wanted, name in ((add_bos, "bos_token"), (add_eos, "eos_token")):
        if not wanted:
            continue
        token = special_tokens.get(name)
        token_id = None if token is None else backend.token_to_id(token)
        if token is None or token_id is None:
            raise ModelError(
                f"The tokenizer's settings add the {name}, but it defines none (add_{name} is true); "
                "fix the checkpoint's tokenizer settings."
            )
        used.append((token, token_id))
    texts = [token for token, _ in used]
    single = ([texts[0]] if add_bos else []) + ["$A"] + ([texts[-1]] if add_eos else [])
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=used)
