"""Which log-probabilities belong to which part of a message, when a parser took its text apart.

Owns the walk along the tokens' bytes. Knows no model's syntax: what no part accounts for was syntax, and its
tokens are passed over. Invariant: tokens are handed out in order, each at most once.
"""

from __future__ import annotations

from collections.abc import Sequence

from gqa_serve.api.answers import ChatTokenLogprob


class PartLogprobs:
    """Tokens that came, and whose parts have not come yet."""

    def __init__(self) -> None:
        self._entries: list[ChatTokenLogprob] = []

    def add(self, entries: Sequence[ChatTokenLogprob]) -> None:
        """More tokens."""
        self._entries += entries

    def take(self, text: str) -> list[ChatTokenLogprob]:
        """The tokens of the next part, which reads `text`; those before it are gone.

        All there are, if the text cannot be found in them: bytes that are no text are shown as U+FFFD.
        """
        if not self._entries:
            return []
        data = b"".join(bytes(entry.bytes) for entry in self._entries)
        wanted = text.encode()
        start = data.find(wanted)
        end = len(data) if start < 0 else start + len(wanted)
        start = max(start, 0)
        taken: list[ChatTokenLogprob] = []
        position = number = 0
        while number < len(self._entries) and position < end:
            entry = self._entries[number]
            number += 1
            position += len(entry.bytes)
            if position > start:
                taken.append(entry)
        self._entries = self._entries[number:]
        return taken
