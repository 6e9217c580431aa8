"""Filling in the middle: the prompt that makes a code model write what belongs between two texts.

Owns the markers that model families were trained with, found as whole tokens of the vocabulary (or by the
ids a GGUF file names), and the order they go in. Knows no requests. Invariant: prompt and suffix are
ordinary text in it; what spells a marker there is encoded as the characters it is.

    Qwen, StarCoder, DeepSeek, ...   <prefix> before <suffix> after <middle>  -> the model goes on
    CodeLlama                        the same; `after` without the space that SentencePiece puts first
    Codestral                        [SUFFIX] after [PREFIX] before           -> the model goes on
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass

from gqa_serve.engine.tokenizer import Tokenizer

# prefix, suffix, middle; DeepSeek calls the place of the suffix a hole, and what ends the prompt the end.
_FAMILIES: tuple[tuple[str, str, str | None], ...] = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen2.5 and later, CodeGemma
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, Granite Code
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),  # CodeLlama
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek Coder
    ("[PREFIX]", "[SUFFIX]", None),  # Codestral
)

# What these models write after the middle, beside the end of sequence.
_ENDS = (
    *("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|fim_pad|>", "<|endoftext|>"),
    *("<|file_sep|>", "<|repo_name|>", "<|file_separator|>", "<file_sep>", "<repo_name>"),
    *("<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<fim_pad>", "▁<EOT>", "<EOT>", "<|EOT|>"),
)

_ANCHOR = "☺"  # encoded in front of a text and taken away again, with the space that comes before a text


@dataclass(frozen=True)
class FillInMiddle:
    """A model's markers, and the tokens that end what it fills in. `middle` None: the suffix goes first."""

    prefix: int
    suffix: int
    middle: int | None
    end_ids: frozenset[int]

    @property
    def ids(self) -> list[int]:
        """The markers."""
        return [token for token in (self.prefix, self.suffix, self.middle) if token is not None]

    def encode(
        self, tokenizer: Tokenizer, before: str | list[int], after: list[int], *, add_special_tokens: bool
    ) -> list[int]:
        """Token ids of the prompt that asks for the text between `before` and `after` (`encode_suffix`)."""
        first = tokenizer.bos_token_id
        begins = first is not None and tokenizer.encode("", add_special_tokens=True)[:1] == [first]
        start = [first] if add_special_tokens and begins and first is not None else []
        ids = self._literal(tokenizer, before, spaced=True) if isinstance(before, str) else before
        if self.middle is None:
            return [*start, self.suffix, *after, self.prefix, *ids]
        return [*start, self.prefix, *ids, self.suffix, *after, self.middle]

    def encode_suffix(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """Token ids of the text after the middle."""
        return self._literal(tokenizer, text, spaced=False)

    def _literal(self, tokenizer: Tokenizer, text: str, *, spaced: bool) -> list[int]:
        """`text` as ordinary tokens. Qwen's markers are added tokens that are not special, which a tokenizer
        reads in any text; so each spelling of one is cut in two."""
        spellings = "|".join(re.escape(tokenizer.token(id_)) for id_ in sorted(self.end_ids))
        cuts = [0, *(match.start() + 1 for match in re.finditer(spellings, text)), len(text)]
        ids: list[int] = []
        for begin, end in itertools.pairwise(cuts):
            ids += _encode(tokenizer, text[begin:end], spaced=spaced and begin == 0)
        return ids


def _encode(tokenizer: Tokenizer, text: str, *, spaced: bool) -> list[int]:
    """The tokens of `text`; not `spaced`: without the space that some vocabularies put before any text."""
    plain = tokenizer.encode(text, add_special_tokens=False)
    if spaced or not text:
        return plain
    anchor = tokenizer.encode(_ANCHOR, add_special_tokens=False)
    joined = tokenizer.encode(_ANCHOR + text, add_special_tokens=False)
    return joined[len(anchor) :] if joined[: len(anchor)] == anchor else plain


def find_fill_in_middle(tokenizer: Tokenizer) -> FillInMiddle | None:
    """The markers of this model's vocabulary; None if it was not made for filling in."""
    named = [tokenizer.special_tokens.get(f"fim_{part}_token") for part in ("pre", "suf", "mid")]
    if named[0] is not None and named[1] is not None:  # a GGUF file says it
        ids = [None if text is None else tokenizer.token_id(text) for text in named]
        if ids[0] is not None and ids[1] is not None:
            return _made(tokenizer, ids[0], ids[1], ids[2])
    for prefix, suffix, middle in _FAMILIES:
        before, after = tokenizer.added_token_id(prefix), tokenizer.added_token_id(suffix)
        last = None if middle is None else tokenizer.added_token_id(middle)
        if before is not None and after is not None and (last is not None or middle is None):
            return _made(tokenizer, before, after, last)
    return None


def _made(tokenizer: Tokenizer, prefix: int, suffix: int, middle: int | None) -> FillInMiddle:
    ends = {prefix, suffix, middle, *map(tokenizer.added_token_id, _ENDS)}
    return FillInMiddle(prefix, suffix, middle, frozenset(token for token in ends if token is not None))
