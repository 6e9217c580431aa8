"""A document's tokens, and the windows in which they are scored.

Owns the convention of strided scoring. Computes nothing. Invariant: every token that something precedes is
scored exactly once, from a document's second window on with at least `window - stride` tokens before it.

    window 8, stride 4, and b for what the tokenizer begins a text with (often nothing):

    tokens          0  1  2  3  4  5  6  7  8  9 10 11 12
    window 0     b [0  1  2  3  4  5  6]                      scores 0 .. 6
    window 1             b [4  5  6  7  8  9 10]              scores 7 .. 10, 4 .. 6 are context
    window 2                         b [8  9 10 11 12]        scores 11, 12

Each window begins with b, because models are trained to find it at position 0 and some (Gemma) predict badly
without. Where a tokenizer begins with nothing, the first token of a document has nothing before it: it is
not scored, and its bytes are not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gqa_serve.errors import ConfigError
from gqa_serve.workbench.evaluate.text import Corpus

if TYPE_CHECKING:
    from gqa_serve.engine.tokenizer import Tokenizer


@dataclass(frozen=True)
class Window:
    """Token ids as the model gets them, of which the last `num_scored` are scored.

    Scored are tokens `first` .. `first + num_scored - 1` of the whole corpus.
    """

    token_ids: Sequence[int]
    num_scored: int
    first: int


@dataclass(frozen=True)
class TokenizedCorpus:
    """All documents' tokens as one sequence of N, their windows, and what to count each token as.

    token_ids [N]. num_bytes [N] float: bytes of text that a token stands for. blocks [N]: the number of its
    block, 0 .. num_blocks - 1. scored [N] bool: whether something precedes it.
    """

    token_ids: np.ndarray
    num_bytes: np.ndarray
    blocks: np.ndarray
    num_blocks: int
    scored: np.ndarray
    windows: Sequence[Window]

    @property
    def longest(self) -> int:
        """Tokens of the longest window."""
        return max(len(window.token_ids) for window in self.windows)


def tokenize(corpus: Corpus, tokenizer: Tokenizer, window: int, stride: int) -> TokenizedCorpus:
    """Cut a corpus into windows of at most `window` tokens, `stride` tokens apart.

    Raises ConfigError if `stride` leaves no context or tokens unscored.
    """
    beginning = tokenizer.encode("")
    size = window - len(beginning)
    if not 0 < stride <= size or size < 2:
        raise ConfigError(
            f"--stride {stride} must be between 1 and {max(1, size)}, the tokens of a --window of {window} "
            f"without the {len(beginning)} that begin a text."
        )
    ids: list[int] = []
    widths: list[np.ndarray] = []
    blocks: list[int] = []
    num_blocks = 0
    scored: list[bool] = []
    windows: list[Window] = []
    for number, document in enumerate(corpus.documents):
        tokens = tokenizer.encode(document.text, add_special_tokens=False)
        width = _token_bytes(tokens, tokenizer, document.num_bytes)
        offsets = np.concatenate([[0.0], np.cumsum(width)[:-1]]) if tokens else np.zeros(0)
        # Half a byte in: rounding in the sum must not move a token to its neighbour's block.
        blocks += [num_blocks + corpus.block_in(number, int(offset + 0.5)) for offset in offsets]
        num_blocks += corpus.num_blocks(number)
        scored += [bool(beginning) or index > 0 for index in range(len(tokens))]
        windows += cut(tokens, beginning, size, stride, first=len(ids))
        ids += tokens
        widths.append(width)
    if not windows:
        raise ConfigError("The text has no token that another precedes; give more with --text.")
    return TokenizedCorpus(
        np.asarray(ids),
        np.concatenate(widths),
        np.asarray(blocks),
        num_blocks,
        np.asarray(scored),
        windows,
    )


def cut(tokens: list[int], beginning: list[int], size: int, stride: int, *, first: int = 0) -> list[Window]:
    """Windows over one document's tokens, each `beginning` and at most `size` tokens; see the picture."""
    windows, done = [], 0 if beginning else 1
    for begin in range(0, len(tokens), stride):
        part = tokens[begin : begin + size]
        end = begin + len(part)
        if end > done:
            windows.append(Window(beginning + part, end - done, first + done))
            done = end
        if end == len(tokens):
            break
    return windows


def _token_bytes(tokens: Sequence[int], tokenizer: Tokenizer, num_bytes: int) -> np.ndarray:
    """[N] the bytes each token stands for, which sum to the text's.

    Tokenizers that change a text (a space before its first word, Unicode normalization) give other sums: the
    difference, a byte or a few, is spread over all.
    """
    raw = np.asarray([len(tokenizer.token_bytes(token)) for token in tokens], float)
    total = raw.sum()
    return raw if total in (0, num_bytes) else raw * (num_bytes / total)
