"""What a generated message is made of, piece by piece: text, reasoning, tool calls.

Owns the vocabulary between parsers (which take a model's text apart) and replies (which spell the parts the
way an endpoint's clients expect). Knows no model's syntax and no endpoint. Invariant: every character a
parser is fed ends up in exactly one part or is syntax that the parts stand for.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Literal, Protocol

from gqa_serve.api.answers import ApiFinishReason


@dataclasses.dataclass(frozen=True, slots=True)
class TextPart:
    """More of the answer."""

    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class ReasoningPart:
    """More of the thinking before the answer."""

    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class ToolCallPart:
    """A tool call begins: number `index` of the message, counted from 0."""

    index: int
    id: str
    name: str


@dataclasses.dataclass(frozen=True, slots=True)
class ArgumentsPart:
    """More of the arguments (JSON text) of tool call `index`."""

    index: int
    text: str


Part = TextPart | ReasoningPart | ToolCallPart | ArgumentsPart


class MessageParser(Protocol):
    """Takes the text of one choice apart as it comes."""

    @property
    def is_cut(self) -> bool:
        """Once all was fed: whether the text ended within the arguments of a call."""

    def feed(self, text: str, *, final: bool = False) -> list[Part]:
        """The parts that became certain with `text`; with `final`, all that is left."""


class PlainParser:
    """For models and requests without tools and reasoning: all text is the answer."""

    is_cut = False

    def feed(self, text: str, *, final: bool = False) -> list[Part]:
        """One part, if there is text."""
        return [TextPart(text)] if text else []


def finish_reason(
    reason: Literal["stop", "length"] | None, *, has_calls: bool, names_tool: bool, is_cut: bool
) -> ApiFinishReason | None:
    """What OpenAI says of the end: calls are a reason of their own, unless the request named the function.

    Calls of which a stop string took the end are none that a client could make.
    """
    return "tool_calls" if reason == "stop" and has_calls and not (names_tool or is_cut) else reason


def merge_parts(parts: list[Part]) -> list[Part]:
    """Neighbouring parts of the same kind (and call) as one."""
    merged: list[Part] = []
    for _, group in itertools.groupby(parts, key=lambda part: (type(part), getattr(part, "index", None))):
        first, *more = group
        if isinstance(first, ToolCallPart):
            merged += [first, *more]
        else:
            text = "".join(part.text for part in more if not isinstance(part, ToolCallPart))
            merged.append(dataclasses.replace(first, text=first.text + text))
    return merged
