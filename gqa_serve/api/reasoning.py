"""Separates the thinking of reasoning models, `<think>...</think>`, from what follows it.

Owns the two tags and the blanks around them; what follows the thinking goes to the parser of the answer.
Knows no templates: whether the prompt already opened the thinking is the caller's to say. Invariant: however
a text is cut into pieces, the parts (merged) are the same.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from gqa_serve.api.answers import CompletionTokensDetails, Usage
from gqa_serve.api.message_parts import MessageParser, Part, ReasoningPart
from gqa_serve.api.tools.call_object import BLANKS
from gqa_serve.api.tools.syntax import Vocabulary, lark_text
from gqa_serve.engine.grammars import lark_grammar
from gqa_serve.engine.tokenizer import Tokenizer

OPENING, CLOSING = "<think>", "</think>"


class ReasoningParser:
    """Thinking, if the text begins with it (or, with `is_open`, the prompt did), then `inner`'s parts.

    Thinking that never ends is thinking to the last character: the answer is then empty.
    """

    def __init__(self, inner: MessageParser, *, is_open: bool) -> None:
        self._inner = inner
        self._is_open = is_open
        self._has_begun = False  # some of the thinking was told
        self._pending = ""
        self._blanks: list[str] = []  # that came after it, in pieces: there can be many
        self._step = self._before

    @property
    def is_cut(self) -> bool:
        """Whether the text ended within the arguments of a call."""
        return self._inner.is_cut

    def feed(self, text: str, *, final: bool = False) -> list[Part]:
        """The parts that became certain with `text`; with `final`, all that is left."""
        if not (final or self._step == self._answer or text.strip(BLANKS)):
            self._blanks.append(text)
            return []
        self._pending = "".join([self._pending, *self._blanks, text])
        self._blanks.clear()
        parts: list[Part] = []
        step = None
        while step != self._step:
            step = self._step
            parts += step(final)
        return parts

    def _before(self, final: bool) -> list[Part]:
        """At the start: a model may open the thinking, even if the prompt did so already."""
        text = self._pending.lstrip(BLANKS)
        if text.startswith(OPENING):
            self._pending = text.removeprefix(OPENING)
            self._step = self._thinking
        elif final or not OPENING.startswith(text):
            self._step = self._thinking if self._is_open else self._answer
        return []

    def _thinking(self, final: bool) -> list[Part]:
        if not self._has_begun:
            self._pending = self._pending.lstrip(BLANKS)
        text, closing, rest = self._pending.partition(CLOSING)
        if closing:
            self._pending, self._step = rest, self._between
            text = text.rstrip(BLANKS)
        elif final:
            self._pending, self._step = "", self._answer
        else:
            text = _without_ending(text)
            self._pending = self._pending[len(text) :]
        self._has_begun = self._has_begun or bool(text)
        return [ReasoningPart(text)] if text else []

    def _between(self, final: bool) -> list[Part]:
        self._pending = self._pending.lstrip(BLANKS)
        if self._pending or final:
            self._step = self._answer
        return []

    def _answer(self, final: bool) -> list[Part]:
        text, self._pending = self._pending, ""
        return self._inner.feed(text, final=final)


def _without_ending(text: str) -> str:
    """`text` without what may turn out to be the closing tag and blanks before it."""
    length = next((n for n in range(len(CLOSING) - 1, 0, -1) if text.endswith(CLOSING[:n])), 0)
    return text[: len(text) - length].rstrip(BLANKS)


def after_thinking(grammar: str, vocabulary: Vocabulary, *, is_open: bool) -> str:
    """`grammar` once the thinking is over; unless `is_open`, the model may also go without thinking."""
    top, *others = json.loads(grammar)["grammars"]
    closing = lark_text(CLOSING, vocabulary)
    lazy = "[lazy]" if closing.startswith('"') else ""
    opening = "" if is_open else lark_text(OPENING, vocabulary)
    name = top["name"] + "-after-thinking"
    rules = [
        f"start: thinking GAP @{name}" + ("" if is_open else f" | @{name}"),
        f"thinking{lazy}: {opening} TEXT {closing}",
        "TEXT: /(?s:.*)/",
        r"GAP: /[ \n]{0,4}/",
    ]
    head = json.loads(lark_grammar("\n".join(rules)))["grammars"]
    return json.dumps({"grammars": [*head, {**top, "name": name}, *others]}, ensure_ascii=False)


class ThinkingCounter:
    """Counts the tokens of the thinking, tags included, where each tag is one token."""

    def __init__(self, opening: int | None, closing: int, *, is_open: bool) -> None:
        self._opening = opening
        self._closing = closing
        self._is_open = is_open
        self._patience = 0 if is_open else 4  # blanks may come before the opening tag

    def count(self, token_ids: Sequence[int]) -> int:
        """How many of these, the next tokens, belong to the thinking."""
        number = 0
        for token in token_ids:
            if not self._is_open and self._patience:
                self._patience -= 1
                self._is_open = token == self._opening
                self._patience *= not self._is_open
            number += self._is_open
            if token == self._closing:
                self._is_open, self._patience = False, 0
        return number


def thinking_tokens(usage: Usage, thinking: str, tokenizer: Tokenizer) -> int:
    """How many tokens of an answer were thinking: as counted, or of its text where tags are no tokens."""
    details = usage.completion_tokens_details
    if isinstance(details, CompletionTokensDetails):
        return details.reasoning_tokens
    number = len(tokenizer.encode(thinking, add_special_tokens=False)) if thinking else 0
    return min(number, usage.completion_tokens)
