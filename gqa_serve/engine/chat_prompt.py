"""From a conversation to token ids: normalise the messages, render the template, encode.

Owns the rule that only the template writes control tokens: a message that spells one ("<|im_end|>") reaches
the model as those characters. Such spellings are replaced by markers before the template sees them, and
encoded as ordinary text after it. (Around such a spelling the text is encoded in pieces; a SentencePiece
vocabulary that prefixes a space does so for each.) Also finds out which control token ends a turn. Knows no
HTTP.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from gqa_serve.engine.chat_messages import normalise_messages
from gqa_serve.engine.chat_template import ChatTemplate
from gqa_serve.engine.tokenizer import Tokenizer
from gqa_serve.errors import RequestError

_PROBE = "qzprobeqz"


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
    literal = _Literals(tokenizer.special_texts)
    prepared = [literal.hide(message) for message in normalise_messages(messages, template)]
    for name in ("tools", "documents"):
        if options.get(name) is not None:
            options[name] = literal.hide(options[name])
    text = template.render(prepared, **options)
    parts = literal.split(text)
    if max_model_len is not None:
        tokenizer.check_length(sum(len(part) for part, _ in parts), max_model_len, param="messages")
    ids: list[int] = []
    for number, (part, is_literal) in enumerate(parts):
        add = add_special_tokens and number == 0
        ids += tokenizer.encode(part, add_special_tokens=add, parse_special=not is_literal)
    return ids


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


class _Literals:
    """Spellings of control tokens found in messages, and the markers that stand for them."""

    def __init__(self, special_texts: Sequence[str]) -> None:
        longest_first = sorted(special_texts, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first))) if special_texts else None
        # Private-use characters around a number nobody can guess: a message can't hold a marker of its own.
        self._nonce = secrets.token_hex(8)
        self._found: list[str] = []

    def hide(self, value: Any) -> Any:
        """`value` (JSON-like) with every control-token spelling in its strings replaced by a marker."""
        if isinstance(value, str):
            return value if self._special is None else self._special.sub(self._mark, value)
        if isinstance(value, Mapping):
            return {self.hide(key): self.hide(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.hide(item) for item in value]
        return value

    def _mark(self, match: re.Match[str]) -> str:
        self._found.append(match[0])
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
