"""How each family of models spells tool calls: what to look for, and the grammar of calls that must fit.

Owns the one description of a spelling from which parser, grammar and shown control tokens follow. Knows no
requests. Invariant: what a grammar built here lets through, the family's parser reads as calls (or text).
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any, Protocol

from gqa_serve.api.tools.choice import ToolPlan
from gqa_serve.api.tools.parsers import HermesParser, Llama3Parser, MistralParser, ToolParser
from gqa_serve.engine.grammars import json_rule, lark_grammar, text_literal

MAX_CALLS = 32  # of one answer that a grammar constrains
_TEXT = "(?s:.*)"
_SPLIT = r"(<tool_call>|</tool_call>|<\|python_tag\|>|\[TOOL_CALLS\]|\[ARGS\]|\[CALL_ID\]|<think>|</think>)"
_MARKERS = re.compile(_SPLIT)


class Vocabulary(Protocol):
    """The part of the tokenizer needed here."""

    @property
    def special_ids(self) -> frozenset[int]: ...

    def token_id(self, token: str) -> int | None: ...


@dataclasses.dataclass(frozen=True)
class ToolSyntax:
    """One spelling: `trigger` `opening` (`begin` arguments `end`) and `separator` between calls, `closing`.

    Where there is no trigger a call is told from text by its form, and a `tag` before it makes that sure. In
    `begin`, %s is the function's name. A `separator` that holds the trigger begins a call of its own.
    `shown` are markers that may be control tokens, which the parser has to see.
    """

    name: str
    parser: type[ToolParser]
    trigger: str
    begin: str
    end: str
    separator: str
    opening: str = ""
    closing: str = ""
    tag: str = ""
    shown: tuple[str, ...] = ()

    def shown_ids(self, vocabulary: Vocabulary) -> frozenset[int]:
        """Control tokens that are part of the spelling."""
        ids = {vocabulary.token_id(marker) for marker in self.shown}
        return frozenset(id for id in ids if id is not None) & vocabulary.special_ids

    def spell(self, name: str, arguments: str) -> str:
        """A call as the model would write it."""
        call = self.begin % name + arguments + self.end
        return self.trigger + self.opening + call + self.closing

    def grammar(self, plan: ToolPlan, vocabulary: Vocabulary, answer: str | None = None) -> str:
        """Calls that fit the plan; without `must_call` also text, or what the grammar `answer` says."""

        def lark(text: str) -> str:
            return lark_text(text, vocabulary)

        rules = [
            f"call: {' | '.join(f'call_{number}' for number in range(len(plan.functions)))}",
            *(
                f"call_{number}: {lark(self.begin % function.name)} arguments_{number} {lark(self.end)}\n"
                f"arguments_{number}: {json_rule(plan.schema(function))}"
                for number, function in enumerate(plan.functions)
            ),
        ]
        more = f"({lark(self.separator)} call){{0,{MAX_CALLS - 1}}}" if plan.is_parallel else ""
        # Calls must differ from an answer that has a form from the first character on.
        trigger = self.trigger if answer is None else self.trigger or self.tag
        calls = f"calls: {lark(trigger + self.opening)} call {more} {lark(self.closing)}"
        if plan.must_call:
            return lark_grammar("\n".join(["start: calls", calls, *rules]))
        if answer is not None:
            top, *others = json.loads(answer)["grammars"]
            body = lark_grammar("\n".join([f"start: calls | @{top['name']}", calls, *rules]))
            return _join(body, [top, *others])
        return lark_grammar("\n".join([*self._free(plan, vocabulary, calls, more), *rules]))

    def _free(self, plan: ToolPlan, vocabulary: Vocabulary, calls: str, more: str) -> list[str]:
        """Text with calls in it, wherever the trigger comes; without a trigger, text or calls."""
        if not self.trigger:
            # Text that begins with a brace would be taken for a call.
            return ["start: calls | TEXT", r"TEXT: /[ \t\r\n]*([^{ \t\r\n](?s:.*))?/", calls]
        trigger = lark_text(self.trigger, vocabulary)
        is_text = trigger.startswith('"')
        opening, closing = (lark_text(text, vocabulary) for text in (self.opening, self.closing))
        within = "" if self.trigger in self.separator else more
        return [
            "start: (lead tail)* TEXT" if plan.is_parallel else "start: lead tail | TEXT",
            f"lead{'[lazy]' if is_text else ''}: TEXT {trigger}",
            f"tail: {opening} call {within} {closing}",
            f"TEXT: /{_TEXT}/",
        ]


def lark_text(text: str, vocabulary: Vocabulary) -> str:
    """`text` in a Lark grammar: strings, and the ids of those markers that are control tokens."""
    pieces = []
    for piece in _MARKERS.split(text):
        token = vocabulary.token_id(piece) if piece else None
        if token is not None and token in vocabulary.special_ids:
            pieces.append(f"<[{token}]>")
        elif piece:
            if pieces and pieces[-1].startswith('"'):
                piece = json.loads(pieces.pop()) + piece
            pieces.append(text_literal(piece))
    return " ".join(pieces)


def _join(grammar: str, others: list[dict[str, Any]]) -> str:
    return json.dumps({"grammars": [*json.loads(grammar)["grammars"], *others]}, ensure_ascii=False)


HERMES = ToolSyntax(
    name="hermes",
    parser=HermesParser,
    trigger="<tool_call>",
    begin='\n{"name": "%s", "arguments": ',
    end="}\n</tool_call>",
    separator="\n<tool_call>",
    shown=("<tool_call>", "</tool_call>"),
)
LLAMA3 = ToolSyntax(
    name="llama3",
    parser=Llama3Parser,
    trigger="",
    begin='{"name": "%s", "parameters": ',
    end="}",
    separator="; ",
    tag="<|python_tag|>",
    shown=("<|python_tag|>",),
)
_MISTRAL_MARKERS = ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")
MISTRAL = ToolSyntax(
    name="mistral",
    parser=MistralParser,
    trigger="[TOOL_CALLS]",
    begin='{"name": "%s", "arguments": ',
    end="}",
    separator=", ",
    opening="[",
    closing="]",
    shown=_MISTRAL_MARKERS,
)
MISTRAL_ARGS = dataclasses.replace(
    MISTRAL, begin="%s[ARGS]", end="", separator="[TOOL_CALLS]", opening="", closing=""
)
SYNTAXES: Sequence[ToolSyntax] = (HERMES, MISTRAL, LLAMA3)
