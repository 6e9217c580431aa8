"""The user's own traffic from a file: ShareGPT JSON, or JSON lines of prompts, messages, or lengths alone.

    {"prompt": "...", "output": "..."}            a request with its answer as text
    {"prompt_tokens": 812, "output_tokens": 97}   lengths alone (any other fields are passed over)
    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}, ...]}
    [{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}, ...]}, ...]

Owns these formats. Knows no tokenizer: whoever needs lengths of text passes one.
Invariant: a conversation has at least one exchange, each with a prompt, and an answer or its length.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gqa_serve.errors import ConfigError

CountTokens = Callable[[str], int]
"""Tokens of a text."""

_USER = frozenset({"human", "user"})
_MODEL = frozenset({"gpt", "assistant", "chatgpt", "bard", "bing", "model"})
_OUTPUT_NAMES = ("output", "completion", "response", "answer")


@dataclass(frozen=True)
class Exchange:
    """One turn: tokens of what is new in the prompt and of the answer, 0 where only the texts are known."""

    prompt_tokens: int = 0
    output_tokens: int = 0
    prompt: str | None = None
    answer: str | None = None

    def counted(self, count_tokens: CountTokens | None) -> Exchange:
        """The same with both numbers, without the answer's text. Raises ConfigError if it can't count."""

        def tokens(known: int, text: str | None) -> int:
            if known or text is None:
                return known
            if count_tokens is None:
                raise ConfigError(
                    "The dataset holds text, whose tokens need a tokenizer: give --tokenizer a hub id, a "
                    "directory or a GGUF file; or write prompt_tokens and output_tokens into the file."
                )
            return max(1, count_tokens(text))

        prompt_tokens = tokens(self.prompt_tokens, self.prompt)
        return Exchange(prompt_tokens, tokens(self.output_tokens, self.answer), self.prompt)


def read_dataset(path: Path, *, output_tokens: int = 0) -> list[list[Exchange]]:
    """Conversations, each a list of exchanges, not counted yet: a file holds more than a run draws.

    `output_tokens`, if not 0: of all answers, those that the file does not have too. Entries without a prompt
    or an answer (half conversations) are left out. Raises ConfigError if nothing is left, or the file is none
    of the formats.
    """
    conversations = [
        found for where, entry in _entries(path) if (found := _exchanges(entry, where, output_tokens))
    ]
    if not conversations:
        raise ConfigError(
            f"{path} holds no request with an answer. Expected ShareGPT conversations, or JSON lines with "
            "prompt and output, messages, or prompt_tokens and output_tokens; for prompts without answers "
            "give --output-len."
        )
    return conversations


def _entries(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Could not read {path}: {error}.") from error
    if text.lstrip().startswith("["):
        parts = [(f"{path}, entry {number}", text_of) for number, text_of in enumerate(_json(text, path), 1)]
    else:
        lines = enumerate(text.split("\n"), 1)
        parts = [
            (f"{path}, line {number}", _json(line, f"{path}, line {number}"))
            for number, line in lines
            if line.strip()
        ]
    for where, entry in parts:
        if not isinstance(entry, dict):
            raise ConfigError(f"{where}: expected an object.")
        yield where, entry


def _json(text: str, where: object) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{where}: not JSON ({error}).") from error


def _exchanges(entry: dict[str, Any], where: str, output_tokens: int) -> list[Exchange]:
    if "prompt_tokens" in entry:
        asked, answered = entry["prompt_tokens"], output_tokens or entry.get("output_tokens")
        if not (isinstance(asked, int) and isinstance(answered, int) and asked > 0 and answered > 0):
            raise ConfigError(f"{where}: prompt_tokens and output_tokens must be whole numbers of 1 or more.")
        return [Exchange(asked, answered)]
    if isinstance(entry.get("prompt"), str):
        answer = next((entry[name] for name in _OUTPUT_NAMES if isinstance(entry.get(name), str)), None)
        pairs = iter([(entry["prompt"], answer)])
    else:
        pairs = _pairs(_messages(entry, where))
    exchanges = []
    for prompt, answer in pairs:
        if not prompt or not (answer or output_tokens):
            break
        exchanges.append(Exchange(0, output_tokens, prompt, answer))
    return exchanges


def _messages(entry: dict[str, Any], where: str) -> list[tuple[str, str]]:
    """(role, text) of an entry in either spelling; a system message goes before the first question."""
    if isinstance(entry.get("messages"), list):
        raw, role_key, text_key = entry["messages"], "role", "content"
    elif isinstance(entry.get("conversations"), list):
        raw, role_key, text_key = entry["conversations"], "from", "value"
    else:
        raise ConfigError(
            f"{where}: expected prompt, messages, conversations, or prompt_tokens and output_tokens."
        )
    if not all(isinstance(message, dict) for message in raw):
        raise ConfigError(f"{where}: messages must be objects.")
    return [(str(message.get(role_key)), str(message.get(text_key) or "")) for message in raw]


def _pairs(messages: list[tuple[str, str]]) -> Iterator[tuple[str, str | None]]:
    """Questions with their answers, from the beginning, as long as they alternate."""
    opening = [text for role, text in messages if role == "system" and text]
    spoken = [(role, text) for role, text in messages if role != "system"]
    for index in range(0, len(spoken), 2):
        (asker, question), *rest = spoken[index : index + 2]
        if asker not in _USER or not question or (rest and rest[0][0] not in _MODEL):
            return
        yield "\n".join([*opening, question]), rest[0][1] if rest else None
        opening = []
