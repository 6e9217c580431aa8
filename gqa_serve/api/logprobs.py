"""Log-probabilities as the API spells them: chat objects with bytes, and the legacy parallel lists.

Owns the text of single tokens (which need not be whole characters) and the clamp that keeps -inf and NaN
out of JSON. Knows no HTTP. Invariant: entries correspond one to one to the tokens whose text is returned.
"""

from __future__ import annotations

import codecs
import math
from collections.abc import Iterable, Sequence
from typing import Protocol

from gqa_serve.api.answers import (
    ChatLogprobs,
    ChatTokenLogprob,
    LegacyLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TopLogprob,
)
from gqa_serve.engine.request import TokenLogprobs

LOWEST_LOGPROB = -9999.0  # JSON has no -inf; this is what vLLM's clients already know


class TokenText(Protocol):
    """The part of the tokenizer needed here."""

    @property
    def special_ids(self) -> frozenset[int]: ...

    def token_bytes(self, token_id: int) -> bytes: ...


def finite(logprob: float) -> float:
    """`logprob`, with what JSON cannot say (-inf, NaN, inf) replaced by `LOWEST_LOGPROB`."""
    return logprob if LOWEST_LOGPROB <= logprob < math.inf else LOWEST_LOGPROB


def chat_logprobs(
    entries: Sequence[TokenLogprobs], num_top: int, tokenizer: TokenText, *, as_ids: bool = False
) -> ChatLogprobs:
    """One entry per token with its `num_top` likeliest alternatives. `as_ids` spells tokens "token_id:7"."""
    content = []
    for entry in entries:
        text, data = _chat_token(entry.token_id, tokenizer, as_ids)
        top = [
            TopLogprob(*_swap(_chat_token(token, tokenizer, as_ids), finite(logprob)))
            for token, logprob in entry.top[:num_top]
        ]
        content.append(ChatTokenLogprob(text, finite(entry.logprob), data, top))
    return ChatLogprobs(content)


def _swap(token: tuple[str, list[int]], logprob: float) -> tuple[str, float, list[int]]:
    return token[0], logprob, token[1]


def _chat_token(token_id: int, tokenizer: TokenText, as_ids: bool) -> tuple[str, list[int]]:
    data = tokenizer.token_bytes(token_id)
    return f"token_id:{token_id}" if as_ids else data.decode("utf-8", "replace"), list(data)


def prompt_logprobs(
    token_ids: Sequence[int],
    entries: Sequence[TokenLogprobs | None],
    num_top: int,
    tokenizer: TokenText,
    *,
    as_ids: bool = False,
) -> PromptLogprobs:
    """Per prompt token: itself and the `num_top` likeliest at its place; null for the first token."""
    result: PromptLogprobs = []
    for token_id, entry in zip(token_ids, entries, strict=True):
        if entry is None:
            result.append(None)
            continue
        ranked = [(token_id, entry.logprob, entry.rank)]
        ranked += [(token, logprob, rank) for rank, (token, logprob) in enumerate(entry.top[:num_top], 1)]
        place: dict[str, PromptLogprob] = {}
        for token, logprob, rank in ranked:
            text = f"token_id:{token}" if as_ids else tokenizer.token_bytes(token).decode("utf-8", "replace")
            place.setdefault(str(token), PromptLogprob(finite(logprob), rank, text))
        result.append(place)
    return result


def legacy_token(token_id: int, tokenizer: TokenText, as_ids: bool = False) -> str:
    """The token's text; half a character as OpenAI spells it, "bytes:\\xe2\\x82": keys must differ.

    `as_ids` gives "token_id:7" instead.
    """
    if as_ids:
        return f"token_id:{token_id}"
    data = tokenizer.token_bytes(token_id)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class LegacyLogprobsWriter:
    """Turns the tokens of one choice, in order, into pieces of the legacy lists with running offsets.

    `text_offset` counts characters of the choice's `text`; a token that continues a character carries the
    offset of that character. Special tokens have width 0 unless they are shown.
    """

    def __init__(
        self, tokenizer: TokenText, num_top: int, show_special: bool, *, as_ids: bool = False
    ) -> None:
        self._tokenizer = tokenizer
        self._as_ids = as_ids
        self._num_top = num_top
        self._show_special = show_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def prompt(
        self, token_ids: Sequence[int], entries: Sequence[TokenLogprobs | None], text: str
    ) -> LegacyLogprobs:
        """The echoed prompt `text`: its first token has no logprob (null), nothing precedes it."""
        result = self._write(zip(token_ids, entries, strict=True))
        if surplus := max(0, self._offset - len(text)):  # the space SentencePiece puts before a text
            self._offset -= surplus
            result.text_offset = [max(0, offset - surplus) for offset in result.text_offset]
        return result

    def output(
        self, entries: Sequence[TokenLogprobs], hidden_stop: TokenLogprobs | None = None
    ) -> LegacyLogprobs:
        """Generated tokens; `hidden_stop` ended the text, without being part of it: nothing follows."""
        all_entries = entries if hidden_stop is None else [*entries, hidden_stop]
        return self._write((entry.token_id, entry) for entry in all_entries)

    def _write(self, tokens: Iterable[tuple[int, TokenLogprobs | None]]) -> LegacyLogprobs:
        result = LegacyLogprobs()
        for token_id, entry in tokens:
            result.text_offset.append(self._offset)
            result.tokens.append(legacy_token(token_id, self._tokenizer, self._as_ids))
            result.token_logprobs.append(None if entry is None else finite(entry.logprob))
            result.top_logprobs.append(None if entry is None else self._top(entry))
            if self._show_special or token_id not in self._tokenizer.special_ids:
                self._offset += len(self._decoder.decode(self._tokenizer.token_bytes(token_id)))
        return result

    def _top(self, entry: TokenLogprobs) -> dict[str, float]:
        """The likeliest tokens, and the chosen one even if it is not among them, as OpenAI does."""
        top: dict[str, float] = {}
        for token, logprob in [*entry.top[: self._num_top], (entry.token_id, entry.logprob)]:
            top.setdefault(legacy_token(token, self._tokenizer, self._as_ids), finite(logprob))
        return top


def join_legacy(pieces: Iterable[LegacyLogprobs]) -> LegacyLogprobs:
    """Consecutive pieces of one choice as one."""
    joined = LegacyLogprobs()
    for piece in pieces:
        joined.text_offset += piece.text_offset
        joined.token_logprobs += piece.token_logprobs
        joined.tokens += piece.tokens
        joined.top_logprobs += piece.top_logprobs
    return joined
