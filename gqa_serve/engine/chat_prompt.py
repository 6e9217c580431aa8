"""From a conversation to token ids: normalise the messages, render the template, encode.

Owns the rule that only the template writes control tokens: a message that spells one ("<|im_end|>") reaches
the model as those characters. Such spellings are replaced by markers before the template sees them, and
encoded as ordinary text after it. (Around such a spelling the text is encoded in pieces; a SentencePiece
vocabulary that prefixes a space does so for each.) Two texts that a template writes side by side could spell
one together: where that happens, their ends are marked, too. Also finds out which control token ends a turn.
Knows no HTTP.
"""

from __future__ import annotations

import functools
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from gqa_serve.engine.chat_messages import normalise_messages
from gqa_serve.engine.chat_template import ChatTemplate
from gqa_serve.engine.tokenizer import Tokenizer
from gqa_serve.engine.tokenizer_files import SPECIAL_TOKEN_NAMES
from gqa_serve.errors import RequestError

_PROBE = "qzprobeqz"
# Words that templates compare, and of which some build control tokens ("<|" + role + "|>").
_NO_TEXT = frozenset({"role", "type"})


def encode_chat(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Mapping[str, Any]],
    /,
    *,
    add_special_tokens: bool = False,
    max_model_len: int | None = None,
    **options: Any,
) -> list[int]:
    """Token ids of `messages` as `template` renders them; `options` are those of `ChatTemplate.render`.

    `add_special_tokens` adds the tokenizer's own (a BOS, usually) to what the template wrote. With
    `max_model_len` a rendered text that cannot fit is refused before it is tokenized. Raises RequestError if
    a message or the template's verdict on them makes that impossible.
    """
    texts = {"messages": normalise_messages(messages, template)}
    # What a client sets in chat_template_kwargs is text like a message's, but for tokens the template names.
    texts |= {name: value for name, value in options.items() if name not in SPECIAL_TOKEN_NAMES}
    spellings = _spellings(tuple(tokenizer.special_texts))
    parts = _render(spellings, template, texts, options)
    if tokenizer.normalizes_special_texts:
        parts = spellings.apart(parts)
    if max_model_len is not None:
        tokenizer.check_length(sum(len(part) for part, _ in parts), max_model_len, param="messages")
    ids: list[int] = []
    encoded: dict[str, list[int]] = {}  # of spellings, which may come by the thousand
    for number, (part, is_literal) in enumerate(parts):
        add = add_special_tokens and number == 0
        if is_literal and not add:
            if part not in encoded:
                encoded[part] = tokenizer.encode(part, add_special_tokens=False)
            ids += encoded[part]
        else:
            ids += tokenizer.encode(part, add_special_tokens=add, parse_special=not is_literal)
    return ids


def _render(
    spellings: _Spellings, template: ChatTemplate, texts: dict[str, Any], options: dict[str, Any]
) -> list[tuple[str, bool]]:
    """The rendered `texts` in pieces, each with whether it is a spelling to take literally."""

    def render(literal: _Literals) -> list[tuple[str, bool]]:
        hidden = {name: literal.hide(value) for name, value in texts.items()}
        messages = hidden.pop("messages")
        return literal.split(template.render(messages, **{**options, **hidden}))

    parts = render(_Literals(spellings))
    if not spellings.in_part(texts):
        return parts
    # Some text may be a part of a spelling. Templates may look at how a text begins or ends, so its ends are
    # hidden only if that makes a difference to what is spelled.
    apart = render(_Literals(spellings, ends=True))
    return parts if spellings.count(parts) == spellings.count(apart) else apart


def end_of_turn(tokenizer: Tokenizer, template: ChatTemplate) -> int | None:
    """The control token that the template writes after an assistant's message, None if it writes none.

    A model ends its turn with this token, whether or not its settings call it an end of sequence.
    """
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
    try:
        text = template.render(normalise_messages(chat, template), add_generation_prompt=False)
    except RequestError:  # a template that takes no such conversation never writes that token
        return None
    after = text.rpartition(_PROBE)[2]
    ids = tokenizer.encode(after.lstrip(), add_special_tokens=False, parse_special=True)
    return ids[0] if ids and ids[0] in tokenizer.special_ids else None


class _Spellings:
    """The texts of control tokens, whole and in part."""

    def __init__(self, texts: Sequence[str]) -> None:
        longest_first = sorted(texts, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first))) if texts else None
        self._beginnings = frozenset(text[:end] for text in texts for end in range(1, len(text)))
        self._ends = frozenset(text[start:] for text in texts for start in range(1, len(text)))
        self._all = "\0".join(texts)
        self._longest = max(map(len, texts), default=0)

    def in_part(self, value: Any) -> bool:
        """Whether any string in `value` (JSON-like) could spell one with what stands beside it."""
        if isinstance(value, str):
            return self.end_spans(value) != (0, 0)
        if isinstance(value, Mapping):
            return any(self.in_part(item) for key, item in value.items() if key not in _NO_TEXT)
        return isinstance(value, list) and any(map(self.in_part, value))

    def end_spans(self, text: str) -> tuple[int, int]:
        """How many characters at the beginning of `text` could end a spelling, and at its end begin one.

        Without the white space around it, which templates like to trim; a text that can be the inside of one
        is all beginning.
        """
        text = text.strip()
        if 0 < len(text) < self._longest and text in self._all:
            return len(text), 0
        longest = min(len(text), self._longest - 1)
        first = next((size for size in range(longest, 0, -1) if text[:size] in self._ends), 0)
        last = next((size for size in range(longest, 0, -1) if text[-size:] in self._beginnings), 0)
        return first, last

    def count(self, parts: Sequence[tuple[str, bool]]) -> int:
        """How many control tokens are spelled outside of literal parts."""
        if self.pattern is None:
            return 0
        return sum(len(self.pattern.findall(text)) for text, is_literal in parts if not is_literal)

    def apart(self, parts: Sequence[tuple[str, bool]]) -> list[tuple[str, bool]]:
        """`parts` with nothing but exact spellings left to be read as control tokens.

        For a tokenizer that looks for them after it has normalized the text ("＜s＞" is "<s>" then).
        """
        result: list[tuple[str, bool]] = []
        for text, is_literal in parts:
            end = 0
            for match in () if self.pattern is None or is_literal else self.pattern.finditer(text):
                result += [(text[end : match.start()], True), (match[0], False)]
                end = match.end()
            result.append((text[end:], True))
        return [part for number, part in enumerate(result) if part[0] or number == 0]


_spellings = functools.lru_cache(maxsize=8)(_Spellings)


class _Literals:
    """Spellings of control tokens found in messages, and the markers that stand for them.

    With `ends`, also for what could be parts of one at the ends of a text.
    """

    def __init__(self, spellings: _Spellings, *, ends: bool = False) -> None:
        self._spellings = spellings
        self._ends = ends
        # Private-use characters around a number nobody can guess: a message can't hold a marker of its own.
        self._nonce = secrets.token_hex(8)
        self._found: list[str] = []

    def hide(self, value: Any) -> Any:
        """`value` (JSON-like) with every control-token spelling in its strings replaced by a marker."""
        if isinstance(value, str):
            return self._hide_ends(self._hide_whole(value)) if self._ends else self._hide_whole(value)
        if isinstance(value, Mapping):
            return {
                self._hide_whole(key) if isinstance(key, str) else key: (
                    self._hide_whole(item) if key in _NO_TEXT and isinstance(item, str) else self.hide(item)
                )
                for key, item in value.items()
            }
        if isinstance(value, list):
            return [self.hide(item) for item in value]
        return value

    def _hide_whole(self, text: str) -> str:
        pattern = self._spellings.pattern
        return text if pattern is None else pattern.sub(lambda match: self._mark(match[0]), text)

    def _hide_ends(self, text: str) -> str:
        first, last = self._spellings.end_spans(text)
        inner = text.strip()
        before, after = text[: len(text) - len(text.lstrip())], text[len(text.rstrip()) :]
        if first:
            before, inner = before + self._mark(inner[:first]), inner[first:]
        if last and len(inner) >= last:
            inner, after = inner[:-last], self._mark(inner[-last:]) + after
        return before + inner + after if first or last else text

    def _mark(self, text: str) -> str:
        self._found.append(text)
        return f"\ue000{self._nonce}:{len(self._found) - 1}\ue001"

    def split(self, text: str) -> list[tuple[str, bool]]:
        """`text` in pieces, each with whether it is a spelling to take literally."""
        if not self._found:
            return [(text, False)]
        pieces = re.split(f"\ue000{self._nonce}:(\\d+)\ue001", text)
        return [
            (self._found[int(piece)], True) if number % 2 else (piece, False)
            for number, piece in enumerate(pieces)
            if piece or number == 0
        ]
