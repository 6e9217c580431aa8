"""A parser for tests of endpoints that tell of reasoning and tool calls, whatever the model's syntax.

Control characters stand for it: \\x01 thinking \\x02, \\x03 name \\x04 arguments \\x05; all else is text.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from gqa_serve.api.message_parts import ArgumentsPart, Part, ReasoningPart, TextPart, ToolCallPart


def think(text: str) -> str:
    """Text that the parser takes for thinking."""
    return f"\x01{text}\x02"


def call(name: str, arguments: str) -> str:
    """Text that the parser takes for a tool call."""
    return f"\x03{name}\x04{arguments}\x05"


class ScriptedParser:
    """A MessageParser; calls are `call_0`, `call_1`, …"""

    def __init__(self) -> None:
        self._state = "text"
        self._name = ""
        self._num_calls = 0

    def feed(self, text: str, *, final: bool = False) -> list[Part]:
        parts: list[Part] = []
        for char in text:
            if char in "\x01\x02\x03\x05":
                self._state = {"\x01": "thinking", "\x03": "name"}.get(char, "text")
                self._name = ""
            elif char == "\x04":
                self._state = "arguments"
                parts.append(ToolCallPart(self._num_calls, f"call_{self._num_calls}", self._name))
                self._num_calls += 1
            elif self._state == "name":
                self._name += char
            elif self._state == "arguments":
                parts.append(ArgumentsPart(self._num_calls - 1, char))
            else:
                parts.append(TextPart(char) if self._state == "text" else ReasoningPart(char))
        return parts


def install(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    """Let the endpoint in `module` use this parser."""
    real = module.prepare_chat

    async def prepare_chat(*args: Any, **options: Any) -> Any:
        return dataclasses.replace(await real(*args, **options), new_parser=ScriptedParser)

    monkeypatch.setattr(module, "prepare_chat", prepare_chat)
