"""Whether an answer begins with thinking, read off the prompt it continues.

Owns the link between a rendered prompt and `reasoning.py`, which knows the tags. Invariant: only the prompt's
end counts, or the message that is continued; tags elsewhere are somebody's text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from gqa_serve.api.message_parts import MessageParser
from gqa_serve.api.reasoning import CLOSING, OPENING, ReasoningParser, ThinkingCounter, after_thinking
from gqa_serve.api.serving import ServingContext
from gqa_serve.engine.tokenizer import Tokenizer

_END_TOKENS = 16  # of the prompt: more than a tag and the blanks around it


@dataclasses.dataclass(frozen=True)
class Thinking:
    """`is_open`: the prompt opened the thinking. `is_over`: it closed it; the answer comes at once."""

    tokenizer: Tokenizer
    is_open: bool
    is_over: bool

    @property
    def tag_ids(self) -> frozenset[int]:
        """The tags that are single tokens."""
        return frozenset(id for id in map(self.tokenizer.token_id, (OPENING, CLOSING)) if id is not None)

    @property
    def new_counter(self) -> Callable[[], ThinkingCounter] | None:
        """How to make the counter of one choice; None where the closing tag is no token of its own."""
        opening, closing = map(self.tokenizer.token_id, (OPENING, CLOSING))
        if closing is None:
            return None
        return lambda: ThinkingCounter(opening, closing, is_open=self.is_open)

    def parser(self, inner: MessageParser) -> MessageParser:
        """A parser of thinking and what follows it."""
        return ReasoningParser(inner, is_open=self.is_open)

    def before(self, grammar: str) -> str:
        """The grammar of the whole answer, if `grammar` is that of what follows the thinking."""
        return grammar if self.is_over else after_thinking(grammar, self.tokenizer, is_open=self.is_open)


def find_thinking(
    context: ServingContext, messages: Sequence[dict[str, Any]], prompt: Sequence[int], continues: bool
) -> Thinking | None:
    """None for a model that does not think aloud (or a server that does not care)."""
    if not context.chat_format.reasons:
        return None
    content = messages[-1]["content"] if continues else ""
    if not isinstance(content, str):
        content = "\n".join(part["text"] for part in content)
    end = context.tokenizer.decode(prompt[-_END_TOKENS:], skip_special_tokens=False).rstrip()
    is_open = end.endswith(OPENING) or content.rfind(OPENING) > content.rfind(CLOSING)
    # What continues an answer is answer.
    is_over = not is_open and (end.endswith(CLOSING) or bool(content.strip()))
    return Thinking(context.tokenizer, is_open=is_open, is_over=is_over)
